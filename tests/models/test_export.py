"""Models under recipes as programs of torch.export: what they give, what they hold, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import vlmrewrite as vr
from tests.small import CHAIN, family
from vlmrewrite.compat import generation_positions
from vlmrewrite.hf import encode_images
from vlmrewrite.oracle import layer_masks
from vlmrewrite.passes import DPVR, STS, VISOR, FastV, Random, Stride
from vlmrewrite.testing.agreement import extended, logits_agreement
from vlmrewrite.testing.models import FAMILIES, Row

MODELS = {name: family(name) for name in FAMILIES}
RECIPES = {
    "stride": [Stride(keep=0.5)],
    "sts": [STS(keep=5, refine=2, at=1)],
    "visor": [VISOR([0], [2])],
    "dpvr": [DPVR(at=1, branch="random")],
    "fastv": [FastV(keep=0.5, at=1)],
    "random": [Random(keep=3, at=1, seed=5)],
    "all": [STS(keep=6, refine=3, at=2), VISOR([0], [1, 2]), DPVR(at=2, branch="copy")],
}
ROWS = [Row(2, 1, 2), Row(2, 4, 3)]
LONGER = [Row(2, 3, 9), Row(2, 2, 1)]
NEW = 4

slow = pytest.mark.slow


def given(name, rows, seed=1):
    """What is exported: pixels, or images encoded and positions given where the tower and they cannot be traced."""
    tiny = MODELS[name]
    inputs = tiny.inputs(rows, side="left", seed=seed)
    if name != "qwen2_5_vl":
        return inputs
    with torch.no_grad():
        positions = generation_positions(tiny.model, inputs["input_ids"], inputs)
        return encode_images(tiny.model, inputs | {"position_ids": positions})


def greedy(exported, inputs, new=NEW, ends=()):
    """Tokens [B, new] and their logits, by the two programs."""
    prefill, decode = exported.prefill.module(), exported.decode.module()
    ids, at = inputs["input_ids"], inputs.get("position_ids")
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    out, tokens, logits = prefill(**exported.arguments(inputs)), [], []
    while True:
        logits.append(out["logits"][:, -1])
        tokens.append(logits[-1].index_fill(1, torch.tensor(ends, dtype=torch.int64), -torch.inf).argmax(1)[:, None])
        if len(tokens) == new:
            return torch.cat(tokens, 1), torch.stack(logits, 1), out["past_key_values"]
        mask = F.pad(mask, (0, 1), value=1)
        step = {"input_ids": tokens[-1], "attention_mask": mask, "past_key_values": out["past_key_values"]}
        more = {} if at is None else {"position_ids": at[..., -1:] + len(tokens)}
        out = decode(**step, **more)


def generated(model, inputs):
    """The same by ``generate()`` under the recipe, and what each layer did, for the oracle."""
    out = model.generate(
        **inputs, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, return_dict_in_generate=True
    )
    return out.sequences[:, -NEW:], out.past_key_values, layer_masks(model, out.sequences.shape[1] - 1)


def ends_of(model):
    """What ``generate()`` never picks: the end, which it must not come to, and what the tiny models suppress."""
    settings = model.generation_config
    ends = settings.eos_token_id
    return [*settings.suppress_tokens, *([] if ends is None else ends if isinstance(ends, list) else [ends])]


@slow
@pytest.mark.wide
@pytest.mark.parametrize(("name", "recipe"), [(n, r) for r in RECIPES for n in ("llava", "qwen2_5_vl")])
@torch.no_grad()
def test_the_programs_generate_what_the_model_does(name, recipe):
    tiny = MODELS[name]
    with vr.applied(tiny.model, RECIPES[recipe]):
        exported = vr.export(tiny.model, given(name, ROWS))
        ran = []
        for rows in (ROWS, LONGER):
            raw = tiny.inputs(rows, side="left", seed=1)
            tokens, cache, masks = generated(tiny.model, raw)
            found, logits, past = greedy(exported, given(name, rows), ends=ends_of(tiny.model))
            assert torch.equal(found, tokens)
            assert [x[0].shape[2] for x in past] >= cache.kv_lengths()
            ran.append((raw, tokens, masks, logits))
    assert ran[0][0]["input_ids"].shape != ran[1][0]["input_ids"].shape
    for raw, tokens, masks, logits in ran:
        logits_agreement(tiny.model, extended(tiny.model, raw, tokens[:, :-1]), masks, logits).check()


@slow
@torch.no_grad()
def test_layers_hold_as_many_tokens_as_the_recipe_says():
    """Where all rows have the same images, none is longer than in the rewritten model."""
    tiny = MODELS["llava"]
    inputs = tiny.inputs(ROWS, side="left", seed=2)
    with vr.applied(tiny.model, RECIPES["sts"]):
        out = vr.export(tiny.model, inputs).prefill.module()(**inputs)
        assert [k.shape[2] for k, _, _ in out["past_key_values"]] == tiny.model(**inputs).past_key_values.kv_lengths()


@slow
@torch.no_grad()
def test_without_a_mask_or_a_batch(tmp_path):
    """Also saved and loaded; the programs are read where neither this package nor transformers can be imported."""
    tiny = MODELS["llava"]
    inputs, other = ({**tiny.inputs([Row(1, 2, n)], seed=n)} for n in (3, 7))
    for each in (inputs, other):
        del each["attention_mask"]
    with vr.applied(tiny.model, RECIPES["sts"]):
        vr.export(tiny.model, inputs).save(tmp_path / "there")
        exported = vr.load_export(tmp_path / "there")
        tokens, _, _ = generated(tiny.model, other)
        want = tiny.model(**other).logits
    assert torch.equal(greedy(exported, other, ends=ends_of(tiny.model))[0], tokens)
    torch.testing.assert_close(exported.prefill.module()(**other)["logits"], want)
    assert repr(exported) == (
        "Exported(LlavaForConditionalGeneration under 'custom'; input_ids, pixel_values; 1 image of 16 vision tokens)"
    )
    alone = (
        "import sys, torch\n"
        "sys.modules['vlmrewrite'] = sys.modules['transformers'] = None\n"
        f"for name in ('prefill', 'decode'): torch.export.load(r'{tmp_path}/there/' + name + '.pt2').module()\n"
    )
    subprocess.run([sys.executable, "-c", alone], check=True, timeout=300)
    (tmp_path / "there" / "vlmrewrite_export.json").write_text("[]")
    with pytest.raises(ValueError, match="is damaged"):
        vr.load_export(tmp_path / "there")
    (tmp_path / "there" / "decode.pt2").unlink()
    with pytest.raises(FileNotFoundError, match=r"decode.pt2 is missing; expected a folder that Exported.save"):
        vr.load_export(tmp_path / "there")


@slow
@torch.no_grad()
def test_other_images_are_refused_as_they_run():
    tiny = MODELS["llava"]
    exported = vr.export(tiny.model, tiny.inputs(ROWS, side="left", seed=1), RECIPES["stride"])
    other = tiny.inputs([Row(1, 1, 2), Row(3, 4, 3)], side="left", seed=1)
    with pytest.raises(RuntimeError, match=r"expected \[32, 32\] vision tokens in the rows"):
        exported.prefill.module()(**other)
    with pytest.raises(ValueError, match="the inputs lack pixel_values; expected input_ids, attention_mask, pixel"):
        exported.arguments({"input_ids": other["input_ids"], "attention_mask": other["attention_mask"]})


@slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Inductor's own
@torch.no_grad()
def test_compiled_ahead_of_time(tmp_path):
    """By AOTInductor, on this CPU; what runs then is no Python."""
    tiny = FAMILIES["llava"](layers=2)
    inputs, longer = (tiny.inputs(rows, side="left", seed=1) for rows in (ROWS, LONGER))
    with vr.applied(tiny.model, RECIPES["sts"]):
        exported = vr.export(tiny.model, inputs)
        tokens, _, _ = generated(tiny.model, longer)
    made = {}
    for name in ("prefill", "decode"):
        path = str(tmp_path / f"{name}.pt2")
        torch._inductor.aoti_compile_and_package(getattr(exported, name), package_path=path)
        made[name] = torch._inductor.aoti_load_package(path)

    class Compiled:
        def __init__(self, run):
            self.module = lambda: run

    both = vr.Exported(Compiled(made["prefill"]), Compiled(made["decode"]), exported.takes, "", "", exported.images)
    assert torch.equal(greedy(both, longer, ends=ends_of(tiny.model))[0], tokens)


def test_torch_export_points_here(llava):
    inputs = llava.inputs([Row(1, 2, 3)])
    with (
        vr.applied(llava.model, RECIPES["stride"]),
        pytest.raises(
            NotImplementedError, match=r"torch.export.export\(\) cannot look into .*: call vlmrewrite.export"
        ),
    ):
        torch.export.export(llava.model, (), inputs)


def test_bad_input(llava):
    inputs = llava.inputs([Row(1, 2, 3)])
    with pytest.raises(ValueError, match=r"no recipe for this Llava.*; expected export\(model, inputs, recipe\), or a"):
        vr.export(llava.model, inputs)
    with pytest.raises(ValueError, match="expected strict with a recipe to export"):
        vr.export(llava.model, inputs, strict=True)
    with pytest.raises(ValueError, match="expected input_ids of a whole prompt"):
        vr.export(llava.model, {"pixel_values": inputs["pixel_values"]}, RECIPES["stride"])
    llava.model.train()
    try:
        with pytest.raises(ValueError, match=r"is in training mode; expected model.eval\(\)"):
            vr.export(llava.model, inputs, RECIPES["stride"])
    finally:
        llava.model.eval()
    tiny = MODELS["qwen2_5_vl"]
    with pytest.raises(ValueError, match="makes positions of its own"):
        vr.export(tiny.model, tiny.inputs([Row(1, 2, 3)]), RECIPES["stride"])
    with pytest.raises(TypeError, match="inputs is a str; expected what the model's forward takes, by name"):
        vr.export(llava.model, "hello", RECIPES["stride"])
    with pytest.raises(
        ValueError, match=r"inputs hold images, which Llava.* does not take; expected some of attention_"
    ):
        vr.export(llava.model, inputs | {"images": inputs["pixel_values"]}, RECIPES["stride"])
    with pytest.raises(TypeError, match="inputs hold pixel_values as a ndarray; expected a tensor"):
        vr.export(llava.model, inputs | {"pixel_values": inputs["pixel_values"].numpy()}, RECIPES["stride"])
    with pytest.raises(ValueError, match="inputs hold labels, and an export gives logits and no loss; leave them out"):
        vr.export(llava.model, inputs | {"labels": inputs["input_ids"]}, RECIPES["stride"])


def test_a_folder_that_is_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="vlmrewrite_export.json is missing"):
        vr.load_export("nowhere")
    told = {"takes": ["input_ids"], "model": "M", "recipe": "r", "images": [4]}
    for name in ("prefill", "decode"):
        (tmp_path / f"{name}.pt2").write_bytes(b"no program")
    file = tmp_path / "vlmrewrite_export.json"
    for text in ("{", json.dumps(told | {"takes": "abc"}), json.dumps(told | {"images": None})):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"vlmrewrite_export.json is damaged \(.*\); expected what Exported.save"):
            vr.load_export(tmp_path)
    file.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"prefill.pt2 is damaged \(.*\); expected what Exported.save has written"):
        vr.load_export(tmp_path)


@slow
@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([VISOR(policy="confidence", chain=CHAIN[:2], threshold=0.9)], "chooses among plans while it runs"),
        ([Stride(keep=8), Random(keep=4)], "draws random numbers"),
    ],
)
def test_recipes_that_are_refused(llava, passes, message):
    with pytest.raises(NotImplementedError, match=message):
        vr.export(llava.model, llava.inputs([Row(1, 2, 3)]), passes)
    assert not hasattr(llava.model, "vlmrewrite_undo")
