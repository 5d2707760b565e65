"""Files of recipes and blocks that are damaged, or belong to something else: an error names the file and the fault."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlmrewrite as vr
from tests.small import with_trained_blocks
from vlmrewrite.api import applied_recipe
from vlmrewrite.passes import DPVR, STS, Stride
from vlmrewrite.plan import ATTRIBUTE
from vlmrewrite.testing.models import FAMILIES

BOTH = ["vlmrewrite.json", "vlmrewrite_blocks.safetensors"]


def changed(folder, to, **what):
    """A copy of a folder whose vlmrewrite.json says something else."""
    shutil.copytree(folder, to)
    path = to / "vlmrewrite.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | what))
    return to


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a model, whose recipe it has, was saved to."""
    path = tmp_path_factory.mktemp("saved")
    model = with_trained_blocks([STS(keep=5, refine=3, at=1), DPVR(at=2, branch="random")]).model
    vr.save_blocks(model, path)
    return path


def test_what_version_0_1_wrote_is_read(folder, tmp_path):
    applied_recipe(vr.load_blocks(FAMILIES["llava"]().model, folder)).to_yaml(tmp_path / "recipe.yaml")
    about = {"model": json.dumps(json.loads((folder / BOTH[0]).read_text())["model"])}
    tensors = load_file(folder / BOTH[1])
    save_file(tensors, tmp_path / "blocks.safetensors", metadata=about)
    other = vr.load_blocks(FAMILIES["llava"]().model, tmp_path)
    assert [type(p) for p in applied_recipe(other).passes] == [STS, DPVR]
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
def test_a_damaged_file_is_named(folder, tmp_path, kind):
    content, message = WRONG[kind]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
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
def test_what_is_wrong_in_the_file_is_named(folder, tmp_path, what, message):
    folder = changed(folder, tmp_path / "x", **what)
    with pytest.raises(ValueError, match=rf"x/vlmrewrite\.json: {message}"):
        vr.load_blocks(FAMILIES["llava"]().model, folder)


def not_finite(tensors, value):
    name = sorted(tensors)[0]
    tensors[name] = torch.full_like(tensors[name], value)
    return name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(folder, tmp_path, value):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / BOTH[1])
    name = not_finite(tensors, value)
    save_file(tensors, tmp_path / BOTH[1])
    model = FAMILIES["llava"]().model
    with pytest.raises(ValueError, match=rf"{BOTH[1]}: {name}: expected finite numbers"):
        vr.load_blocks(model, tmp_path)
    assert not hasattr(model, ATTRIBUTE)


@pytest.mark.parametrize("content", [b"", b"x" * 7, b"\xff" * 64, (2).to_bytes(8, "little") + b"[]"])
def test_a_damaged_header_is_named(folder, tmp_path, content):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / BOTH[1]).write_bytes(content)
    with pytest.raises(ValueError, match=rf"expected a whole safetensors file in '{tmp_path}/{BOTH[1]}'"):
        vr.load_blocks(FAMILIES["llava"]().model, tmp_path)


def test_what_does_not_belong_together_is_refused(folder, tmp_path):
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
