"""Models whose decoder is captured alone: the rest runs around it, the vision tokens are found where it is entered."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from transformers import GenerationMixin

import vlmrewrite as vr
from tests.models.zoo import build
from tests.small import ONE_EACH, crossed, long
from vlmrewrite.errors import CaptureError
from vlmrewrite.hf import Encoded, decoder_of, language_model, merged_outside
from vlmrewrite.hf.vision import EncoderOutput
from vlmrewrite.passes import STS, DivPrune, Stride
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import ZOO, Row

SEEN = [Row(1, 3, 2), Row(2, 1, 3), Row(1, 4, 1)]
"""Prompts that all have an image."""

ROWS = dict.fromkeys(("blip_2", "instructblip", "instructblipvideo", "kosmos_2"), SEEN) | {
    name: [*SEEN, Row(0, 4, 1)] for name in ("ovis2", "kosmos_2_5")
}
"""Prompts by family: those that branch on tensors around the decoder, that generate inside, that merge inside."""

KINDS = ["ovis2", "blip_2", "kosmos_2"]
"""One family of each kind."""

GREEDY = {"do_sample": False, "max_new_tokens": 3}


@pytest.fixture(autouse=True)
def _right_padding_is_meant():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*right-padding.*")
        yield


@pytest.mark.wide
@pytest.mark.parametrize(("name", "recipe"), crossed(ROWS, ONE_EACH))
def test_agrees_with_the_oracle(name, recipe):
    tiny = build(name)
    for side in ("left", "right") if recipe == "sts" else ("left",):
        inputs = tiny.inputs(ROWS[name], side=side, seed=1)
        forward_agreement(tiny.model, inputs, ONE_EACH[recipe]).check()
        generation_agreement(tiny.model, inputs, ONE_EACH[recipe], new_tokens=3).check()


@pytest.mark.wide
@pytest.mark.parametrize("name", ROWS if long() else KINDS)
def test_keeping_all_changes_nothing(name):
    tiny = build(name)
    inputs = tiny.inputs(ROWS[name], seed=2)
    with torch.no_grad():
        logits, tokens = tiny.model(**inputs).logits, tiny.model.generate(**inputs, **GREEDY)
        with vr.applied(tiny.model, [Stride(1.0)]):
            real = inputs["attention_mask"].bool()
            torch.testing.assert_close(tiny.model(**inputs).logits[real], logits[real], atol=2e-5, rtol=0)
            assert torch.equal(tiny.model.generate(**inputs, **GREEDY), tokens)
    assert not {"forward", "generate", "prepare_inputs_for_generation"} & vars(decoder_of(tiny.model)).keys()
    with torch.no_grad():
        assert torch.equal(tiny.model(**inputs).logits, logits)


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_the_report_says_what_is_captured(name):
    tiny = build(name)
    with vr.applied(tiny.model, [Stride(0.5)]):
        assert (
            "captured and rewritten alone" not in " ".join(vr.report(tiny.model).notes)
            or language_model(tiny.model) is not None
        )
        tiny.model(**tiny.inputs(SEEN))
        report = vr.report(tiny.model)
    (note,) = (n for n in report.notes if "captured and rewritten alone" in n)
    assert note.startswith(type(decoder_of(tiny.model)).__name__)
    assert report.graphs["captured"] >= 1
    if name == "ovis2":
        assert "Python branches on a tensor's value" in note
        assert "modeling_ovis2.py, line" in note


@torch.no_grad()
@pytest.mark.parametrize("name", ["ovis2", "instructblip", "kosmos_2"])
def test_trace_and_verify(name):
    tiny = build(name)
    inputs = tiny.inputs(SEEN, seed=3)
    program = vr.trace(tiny.model, inputs)
    assert len(program.anatomy.layers) == 4
    ids = inputs["input_ids"]
    where = inputs.get("image_embeds_position_mask", ids == tiny.image_token_id).bool()
    assert torch.equal(program.call.vision, where)
    assert not vars(decoder_of(tiny.model)).keys() & {"forward"}
    assert vr.verify(tiny.model, inputs, [STS(keep=3, refine=2, at=2)]) < 1e-4


def test_what_the_projector_took_is_known():
    tiny = build("blip_2")
    inputs = tiny.inputs(SEEN, seed=4)
    recipe = [DivPrune(keep=3), STS(keep=2, refine=None, features="encoder")]
    forward_agreement(tiny.model, inputs, recipe).check()


def test_several_beams_of_a_prompt():
    tiny = build("blip_2")
    inputs = tiny.inputs(SEEN, seed=5)
    how = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 4}
    expected = tiny.model.generate(**inputs, **how)
    with vr.applied(tiny.model, [Stride(1.0)]):
        assert torch.equal(tiny.model.generate(**inputs, **how), expected)
    with vr.applied(tiny.model, [Stride(0.5)]):
        tiny.model.generate(**inputs, **how)
        (stage,) = vr.kept_tokens(tiny.model)
        assert stage.vision.sum(1).tolist() == [2] * 3 + [4] * 3 + [2] * 3


@pytest.mark.parametrize("name", ["blip_2", "kosmos_2"])
def test_one_new_token_is_of_the_rewritten_model(name):
    tiny = build(name)
    inputs = tiny.inputs(SEEN, seed=6)
    with vr.applied(tiny.model, [Stride(1)]):
        tiny.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        (stage,) = vr.kept_tokens(tiny.model)
    assert stage.vision.sum(1).tolist() == [1, 2, 1]


def test_generate_without_a_rewritten_forward_is_an_error():
    tiny = copy.deepcopy(build("ovis2"))

    class Elsewhere(type(tiny.model)):
        def generate(self, **kwargs):
            language_model = self.model.language_model
            return language_model(inputs_embeds=self.get_input_embeddings()(kwargs["input_ids"])).last_hidden_state

    tiny.model.__class__ = Elsewhere
    inputs = tiny.inputs(SEEN)
    with (
        vr.applied(tiny.model, [Stride(0.5)]),
        pytest.raises(RuntimeError, match="given pixel_values, and no rewritten forward ran"),
    ):
        tiny.model.generate(**inputs)


def test_a_text_prompt_is_none_of_it():
    tiny = build("ovis2")
    inputs = {k: x for k, x in tiny.inputs([Row(0, 4, 1), Row(0, 2, 1)]).items() if k != "pixel_values"}
    expected = tiny.model.generate(**inputs, **GREEDY)
    with vr.applied(tiny.model, [Stride(0.5)]):
        assert torch.equal(tiny.model.generate(**inputs, **GREEDY), expected)


def test_features_that_are_changed_before_they_enter_are_an_error():
    tiny = copy.deepcopy(build("ovis2"))

    def double(_, args, kwargs):
        return args, kwargs | {"inputs_embeds": 2 * kwargs["inputs_embeds"]}

    tiny.model.model.language_model.register_forward_pre_hook(double, with_kwargs=True)
    with (
        vr.applied(tiny.model, [Stride(0.5)]),
        pytest.raises(ValueError, match="image features do not stand in the embeddings"),
    ):
        tiny.model(**tiny.inputs(SEEN))


def test_a_decoder_that_cannot_be_traced_says_where():
    tiny = copy.deepcopy(build("ovis2"))

    def branch(module, args, output):
        return output if bool((output > 0).any()) else -output

    tiny.model.model.language_model.layers[1].mlp.register_forward_hook(branch)
    with (
        vr.applied(tiny.model, [Stride(0.5)]),
        pytest.raises(CaptureError, match="depends on a tensor's values") as raised,
    ):
        tiny.model(**tiny.inputs(SEEN))
    assert type(tiny.model).__name__ in str(raised.value)
    assert "test_decoder_alone.py, line" in str(raised.value)


@torch.no_grad()
def test_a_copy_of_a_rewritten_model_is_rewritten_and_restored_as_it_was():
    tiny = build("blip_2")
    inputs = tiny.inputs(SEEN, seed=7)
    with vr.applied(tiny.model, [Stride(0.5)]):
        expected = tiny.model(**inputs).logits
        copied = copy.deepcopy(tiny.model)
        assert torch.equal(copied(**inputs).logits, expected)
        vr.restore(copied)
        assert not {"forward", "generate", "prepare_inputs_for_generation"} & vars(decoder_of(copied)).keys()
        assert torch.equal(tiny.model(**inputs).logits, expected)


# ---- where features stand


def _encoded(features):
    lengths = [features.shape[1]] * len(features) if features.dim() == 3 else [len(features)]
    return Encoded(EncoderOutput({}), {"x": features}, {"x": lengths})


def test_features_are_found_bit_by_bit_and_copies_of_rows_with_them():
    features = torch.randn(3, 4, 8)
    embeddings = torch.randn(2, 11, 8)
    embeddings[0, 2:6], embeddings[1, 1:5], embeddings[1, 6:10] = features
    found = merged_outside(_encoded(features), embeddings)
    assert found.output.mask.sum(1).tolist() == [4, 8]
    assert found.lengths == {"merged": [4, 4, 4]}
    twice = merged_outside(_encoded(features), embeddings.repeat_interleave(2, 0))
    assert twice.output.mask.sum(1).tolist() == [4, 4, 8, 8]
    assert twice.lengths == {"merged": [4] * 6}
    assert torch.equal(twice.output.merged, torch.cat([features[0], features[0], *features[1:], *features[1:]]))


@pytest.mark.parametrize("change", ["order", "value", "missing", "size"])
def test_features_elsewhere_are_not_found(change):
    features = torch.randn(2, 3, 8)
    embeddings = torch.randn(1, 9, 8)
    embeddings[0, 1:4], embeddings[0, 5:8] = features if change != "order" else features.flip(0)
    if change == "value":
        embeddings[0, 2, 0] += 1
    if change == "missing":
        embeddings[0, 5:8] = 0
    if change == "size":
        embeddings = embeddings[..., :4]
    assert merged_outside(_encoded(features), embeddings) is None


def test_a_generate_of_its_own_is_what_counts():
    assert type(build("blip_2").model).generate is not GenerationMixin.generate
    assert language_model(build("blip_2").model) is build("blip_2").model.language_model
    assert language_model(build("ovis2").model) is None


@torch.no_grad()
def test_a_decoder_that_somebody_has_exchanged_is_an_error():
    tiny = ZOO["blip_2"](layers=2)
    model, decoder, inputs = tiny.model, decoder_of(tiny.model), tiny.inputs(SEEN)
    decoder.forward = functools.partial(type(decoder).forward, decoder)
    with vr.applied(model, [Stride(0.25)]), pytest.raises(RuntimeError, match="no rewritten forward ran in it"):
        model(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "blip_2"])
def test_what_somebody_puts_around_a_watched_decoder_stays(name):
    tiny = ZOO[name](layers=2)
    decoder = decoder_of(tiny.model)
    vr.apply(tiny.model, [Stride(0.25)])
    decoder.forward = mine = functools.partial(decoder.forward)
    vr.restore(tiny.model)
    assert decoder.forward is mine
    tiny.model(**tiny.inputs(SEEN))
