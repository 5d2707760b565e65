"""Rewritten models are saved without their recipe, which lies beside them with its blocks, and are loaded with it."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import vlmrewrite as vr
from vlmrewrite.api import applied_recipe
from vlmrewrite.passes import DPVR, STS, Stride
from vlmrewrite.plan import ATTRIBUTE, Text, frozen_pass
from vlmrewrite.testing.models import FAMILIES, Row

BOTH = ["vlmrewrite.json", "vlmrewrite_blocks.safetensors"]
RECIPE = [STS(keep=5, refine=3, at=1), DPVR(at=2, branch="random")]


def trained(recipe=RECIPE, **how):
    """A rewritten model whose blocks are not as they were made."""
    tiny = FAMILIES["llava"](**how)
    vr.apply(tiny.model, recipe)
    with torch.no_grad():
        for p in getattr(tiny.model, ATTRIBUTE).parameters():
            p.add_(torch.randn_like(p) / 10)
    return tiny


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def changed(folder, to, **what):
    """A copy of a folder whose vlmrewrite.json says something else."""
    shutil.copytree(folder, to)
    path = to / "vlmrewrite.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | what))
    return to


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A model, its inputs and logits, and a folder that it was saved to."""
    tiny, folder = trained(), tmp_path_factory.mktemp("saved")
    inputs = tiny.inputs([Row(1, 2, 3), Row(1, 1, 2)])
    with torch.no_grad():
        expected = tiny.model(**inputs).logits
    tiny.model.save_pretrained(folder)
    return tiny.model, inputs, expected, folder


@torch.no_grad()
@pytest.mark.parametrize(
    "how", [{}, {"max_shard_size": "20KB"}, {"state_dict": True}], ids=["whole", "shards", "given"]
)
def test_a_checkpoint_is_that_of_the_model_alone(one, tmp_path, how):
    model, inputs, expected, _ = one
    before = vars(model).keys()
    state = model.state_dict()
    own = {n: t for n, t in state.items() if n.startswith(ATTRIBUTE)}
    if "state_dict" in how:
        moved = {n: t + 1 for n, t in own.items()}
        how = {"state_dict": state | moved}
    model.save_pretrained(tmp_path, **how)
    assert vars(model).keys() == before
    assert torch.equal(model(**inputs).logits, expected)
    assert {*BOTH} < {*files(tmp_path)}
    assert ("model-00002-of" in "".join(files(tmp_path))) == ("max_shard_size" in how)
    plain, told = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    assert {n: t.tolist() for n, t in plain.state_dict().items()} == {
        n: t.tolist() for n, t in state.items() if n not in own
    }
    found = load_file(tmp_path / BOTH[1])
    given = how.get("state_dict", state)
    assert {n: t.tolist() for n, t in found.items()} == {
        n.removeprefix(f"{ATTRIBUTE}."): given[n].tolist() for n in own
    }


@torch.no_grad()
def test_a_model_is_loaded_with_its_recipe_and_blocks(one):
    model, inputs, expected, folder = one
    for load in (vr.from_pretrained, lambda path: vr.apply(FAMILIES["llava"]().model, str(path))):
        other = load(folder)
        assert applied_recipe(other) == applied_recipe(model)
        assert torch.equal(other(**inputs).logits, expected)
        saved, loaded = getattr(model, ATTRIBUTE).state_dict(), getattr(other, ATTRIBUTE).state_dict()
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[n], saved[n]) for n in saved)
        assert {n for n, p in other.named_parameters() if p.requires_grad} == {f"{ATTRIBUTE}.{n}" for n in saved}
        vr.restore(other)
    made, told = vr.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, backend="eager", model_class=type(model)
    )
    assert not any(told.values())
    assert vr.report(made).to_dict()["backend"] == "eager"


@torch.no_grad()
def test_a_recipe_without_blocks_is_saved_too(one, tmp_path):
    shutil.copytree(one[3], tmp_path, dirs_exist_ok=True)
    model = FAMILIES["llava"]().model
    with vr.applied(model, "stride-half"):
        model.save_pretrained(tmp_path)
    assert BOTH[0] in files(tmp_path)
    assert BOTH[1] not in files(tmp_path), "those of another recipe"
    assert applied_recipe(vr.from_pretrained(tmp_path)) == vr.Recipe.load("stride-half")


def test_what_is_written(one):
    data = json.loads((one[3] / BOTH[0]).read_text())
    assert data.pop("recipe")["passes"][1]["dpvr"]["branch"] == "random"
    assert data == {
        "format": 1,
        "vlmrewrite": vr.__version__,
        "transformers": __import__("transformers").__version__,
        "model": {"model_type": "llava", "hidden_size": 32, "num_hidden_layers": 4},
        "base_model": None,
        "weights": True,
        "blocks": True,
    }


def test_blocks_of_bfloat16_stay_so(tmp_path):
    tiny = FAMILIES["llava"]()
    tiny.model.to(torch.bfloat16)
    vr.apply(tiny.model, [DPVR(at=1)])
    tiny.model.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / BOTH[1]).values()} == {torch.bfloat16}
    other = vr.from_pretrained(tmp_path)
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"safetensors: dpvr\S+ has dtype bfloat16; this model's blocks expect fl"):
        vr.apply(plain, tmp_path)
    assert not hasattr(plain, ATTRIBUTE)
    with vr.applied(plain, [DPVR(at=1)]):
        before = {n: p.clone() for n, p in plain.state_dict().items()}
        with pytest.raises(ValueError, match="load the model in the dtype of the blocks"):
            vr.load_blocks(plain, tmp_path)
        assert all(torch.equal(p, before[n]) for n, p in plain.state_dict().items())


def test_what_version_0_1_wrote_is_read(one, tmp_path):
    model, folder = one[0], one[3]
    applied_recipe(model).to_yaml(tmp_path / "recipe.yaml")
    about = {"model": json.dumps(json.loads((folder / BOTH[0]).read_text())["model"])}
    tensors = load_file(folder / BOTH[1])
    save_file(tensors, tmp_path / "blocks.safetensors", metadata=about)
    other = vr.load_blocks(FAMILIES["llava"]().model, tmp_path)
    assert applied_recipe(other) == applied_recipe(model)
    assert all(torch.equal(t, getattr(other, ATTRIBUTE).state_dict()[n]) for n, t in tensors.items())
    for wrong, message in (
        ({"model": "{"}, "model: expected JSON"),
        ({"model": "[]"}, "blocks.safetensors: .*expected a valid dictionary"),
        ({}, "model.model_type: required, but missing"),
        (None, "model.model_type: required, but missing"),
        ({"model": '{"model_type": 3, "hidden_size": 32, "num_hidden_layers": 4}'}, "model_type: .*got 3"),
    ):
        save_file(tensors, tmp_path / "blocks.safetensors", metadata=wrong)
        with pytest.raises(ValueError, match=rf"{tmp_path}/blocks\.safetensors[^\n]*{message.split(': .*')[-1]}"):
            vr.load_blocks(FAMILIES["llava"]().model, tmp_path)


WRONG = {
    "no JSON": (b"{", "expected JSON"),
    "no text": (b"\xff\xfe", "expected JSON"),
    "deep": (b"[" * 100_000, "expected JSON"),
    "a list": (b"[]", "expected a valid dictionary"),
    "nothing in it": (b"{}", "format: expected 1, got None"),
    "newer": (b'{"format": 2}', "format: expected 1, got 2: this version of vlmrewrite cannot read it"),
    "too long": (b" " * 1_000_001, "expected at most 1,000,000 bytes"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_damaged_file_is_named(one, tmp_path, kind):
    content, message = WRONG[kind]
    shutil.copytree(one[3], tmp_path, dirs_exist_ok=True)
    (tmp_path / BOTH[0]).write_bytes(content)
    model = FAMILIES["llava"]().model
    for load in (vr.load_blocks, vr.apply, lambda _, path: vr.from_pretrained(path)):
        with pytest.raises(ValueError, match=rf"{tmp_path}/vlmrewrite\.json: .*{message}"):
            load(model, tmp_path)
    assert not hasattr(model, ATTRIBUTE)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"model": {"model_type": "llava"}}, "model.hidden_size: required, but missing"),
        ({"recipe": {"name": "x", "passes": [{"dpvr": {"at": 1, "into": 3}}]}}, r"passes\[0\].dpvr.into: unknown key"),
        ({"recipe": {"name": "x", "passes": ["nobody"]}}, r"passes\[0\]: unknown pass 'nobody'"),
        ({"blocks": "yes"}, "blocks: expected a valid boolean, got 'yes'"),
        ({"more": 1}, "more: unknown key"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(one, tmp_path, what, message):
    folder = changed(one[3], tmp_path / "x", **what)
    with pytest.raises(ValueError, match=rf"x/vlmrewrite\.json: {message}"):
        vr.load_blocks(FAMILIES["llava"]().model, folder)


def not_finite(tensors, value):
    name = sorted(tensors)[0]
    tensors[name] = torch.full_like(tensors[name], value)
    return name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(one, tmp_path, value):
    shutil.copytree(one[3], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / BOTH[1])
    name = not_finite(tensors, value)
    save_file(tensors, tmp_path / BOTH[1])
    model = FAMILIES["llava"]().model
    with pytest.raises(ValueError, match=rf"{BOTH[1]}: {name}: expected finite numbers"):
        vr.load_blocks(model, tmp_path)
    assert not hasattr(model, ATTRIBUTE)


@pytest.mark.parametrize("content", [b"", b"x" * 7, b"\xff" * 64, (2).to_bytes(8, "little") + b"[]"])
def test_a_damaged_header_is_named(one, tmp_path, content):
    shutil.copytree(one[3], tmp_path, dirs_exist_ok=True)
    (tmp_path / BOTH[1]).write_bytes(content)
    with pytest.raises(ValueError, match=rf"expected a whole safetensors file in '{tmp_path}/{BOTH[1]}'"):
        vr.load_blocks(FAMILIES["llava"]().model, tmp_path)


def test_what_does_not_belong_together_is_refused(one, tmp_path):
    folder = one[3]
    tensors = load_file(folder / BOTH[1])
    names = sorted(tensors)
    other = changed(folder, tmp_path / "a")
    save_file({n: t for n, t in tensors.items() if n != names[0]}, other / BOTH[1])
    model = FAMILIES["llava"]().model
    with pytest.raises(ValueError, match=f"{names[0]} has shape none; this model's blocks expect"):
        vr.apply(model, other)
    assert not hasattr(model, ATTRIBUTE)
    (other / BOTH[1]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"expected {BOTH[1]} in '.*a', which .*{BOTH[0]} names, found none"):
        vr.apply(model, other)
    with pytest.raises(ValueError, match="belong to a model with num_hidden_layers 4, this Llava.* has 5"):
        vr.apply(FAMILIES["llava"](layers=5).model, folder)
    with vr.applied(model, [Stride(keep=3)]), pytest.raises(ValueError, match="already; call vlmrewrite.restore"):
        vr.apply(model, folder)


def test_where_nothing_was_saved(tmp_path):
    plain = tmp_path / "plain"
    model = FAMILIES["llava"]().model
    model.save_pretrained(plain)
    for load in (vr.from_pretrained, lambda path: vr.apply(model, path)):
        with pytest.raises(FileNotFoundError, match=r"expected vlmrewrite\.json in '.*plain'.*transformers' from_p"):
            load(plain)
    with pytest.raises(FileNotFoundError, match=r"'nobody/nothing', which is no folder here, and the Hub gives no vl"):
        vr.from_pretrained("nobody/nothing")
    with pytest.raises(FileNotFoundError, match=r"'nobody/nothing', which is no folder here, and the Hub gives no vl"):
        vr.apply(model, "nobody/nothing")
    with vr.applied(model, [DPVR(at=1)]):
        vr.save_blocks(model, tmp_path / "blocks")
    with pytest.raises(FileNotFoundError, match="holds a recipe and no model, nor the name of one"):
        vr.from_pretrained(tmp_path / "blocks")


@frozen_pass
class Mine:
    """A pass that is not registered."""

    name = "mine"

    def refuse(self, plan):
        return None

    def change(self, plan):
        plan.layer(1).run_on(Text)


def test_a_pass_that_could_not_be_found_again_writes_nothing(tmp_path):
    model = FAMILIES["llava"]().model
    with vr.applied(model, [Mine()]), pytest.raises(ValueError, match="unknown pass 'mine', expected one of"):
        model.save_pretrained(tmp_path / "x")
    assert files(tmp_path) == []


def test_pushing_while_saving_is_refused(one, tmp_path):
    with pytest.raises(ValueError, match=r"call model\.push_to_hub\(repo_id\)"):
        one[0].save_pretrained(tmp_path, push_to_hub=True)
    assert files(tmp_path) == []


# ---- state dicts


def test_a_state_dict_without_the_blocks_says_so():
    model = trained().model
    state = model.state_dict()
    plain = {n: t for n, t in state.items() if not n.startswith(ATTRIBUTE)}
    with pytest.warns(UserWarning, match=r"none of the blocks of this Llava.*load_blocks\(model, folder\)"):
        model.load_state_dict(plain, strict=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(plain)
    model.load_state_dict(state)


def test_blocks_that_come_from_a_file_stay(one):
    model = FAMILIES["llava"]().model
    vr.apply(model, one[3])
    plain = {n: t for n, t in model.state_dict().items() if not n.startswith(ATTRIBUTE)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(plain, strict=False)
    with torch.no_grad():
        next(getattr(model, ATTRIBUTE).parameters()).add_(1)
    with pytest.warns(UserWarning, match="none of the blocks"):
        model.load_state_dict(plain, strict=False)


@torch.no_grad()
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_holds_the_blocks(one, assign):
    model, inputs, expected, _ = one
    other = FAMILIES["llava"]().model
    vr.apply(other, RECIPE)
    other(**inputs)
    other.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=assign)
    assert torch.equal(other(**inputs).logits, expected)


@torch.no_grad()
def test_other_numbers_in_the_place_of_a_parameter_are_used(one):
    model, inputs = FAMILIES["llava"]().model, one[1]
    vr.apply(model, one[3])
    held = getattr(model, ATTRIBUTE)
    for name, p in list(held.named_parameters()):
        setattr(held, name, torch.nn.Parameter(torch.zeros_like(p)))
    with pytest.raises(KeyError, match="expected one of dpvr"):
        held.register_parameter("more", torch.nn.Parameter(torch.zeros(1)))
    assert not torch.equal(model(**inputs).logits, one[2])
    assert float(held.dpvr.self_attn.q_proj.weight.abs().sum()) == 0.0
    assert held["dpvr"] is held.dpvr and "dpvr" in held and "more" not in held
    assert "q_proj" in repr(held)
    assert [name for name, _ in model.named_modules() if ATTRIBUTE in name] == [ATTRIBUTE]
    model.train()
    assert held.dpvr.self_attn.training
