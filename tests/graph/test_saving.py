"""Rewritten models are saved without their recipe, which lies beside them with its blocks, and are loaded with it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import vlmrewrite as vr
from tests.small import kept_in
from vlmrewrite.api import applied_recipe
from vlmrewrite.passes import DPVR
from vlmrewrite.plan import ATTRIBUTE, Text, frozen_pass
from vlmrewrite.testing.models import FAMILIES

BOTH = ["vlmrewrite.json", "vlmrewrite_blocks.safetensors"]


def files(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A model, its inputs and logits, and a folder that it was saved to."""
    return kept_in(tmp_path_factory.mktemp("saved"), lambda model, folder: model.save_pretrained(folder))


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_folder_called_as_a_recipe_is_is_asked_for_by_its_path(one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stride-half").mkdir()
    model = FAMILIES["llava"]().model
    with vr.applied(model, "stride-half"):
        assert vr.report(model).recipe == "stride-half"
    with pytest.raises(FileNotFoundError, match=r"expected vlmrewrite\.json in '\./stride-half'"):
        vr.apply(model, "./stride-half")
