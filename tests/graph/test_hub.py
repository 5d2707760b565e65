"""Recipes and blocks that go to the Hub and come back, by huggingface_hub's own calls, to a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import vlmrewrite as vr
from tests.local_hub import local_hub
from vlmrewrite.passes import DPVR, Stride
from vlmrewrite.saving.fit import stored_of
from vlmrewrite.saving.hub import card
from vlmrewrite.testing.models import FAMILIES

ROOT = Path(__file__).parents[2]

THERE_AND_BACK = """
import huggingface_hub, pytest, torch, transformers
import vlmrewrite as vr
from vlmrewrite.passes import DPVR, STS
from vlmrewrite.testing.models import FAMILIES, Row

torch.manual_seed(0)
tiny = FAMILIES["llava"]()
inputs = tiny.inputs([Row(1, 2, 3)])
tiny.model.push_to_hub("someone/base")
model = transformers.AutoModelForImageTextToText.from_pretrained("someone/base")
vr.apply(model, [STS(keep=5, refine=3, at=1), DPVR(at=2)])
with torch.no_grad():
    for p in model.vlmrewrite_blocks.parameters():
        p.add_(torch.randn_like(p) / 10)
    expected = model(**inputs).logits
    print(vr.push_to_hub(model, "me/recipe"))
    model.push_to_hub("me/whole")
    vr.push_to_hub(model, "me/whole")

    def same(other):
        assert torch.equal(other(**inputs).logits, expected)

    same(vr.from_pretrained("me/recipe"))
    same(vr.from_pretrained("me/whole"))
    same(vr.apply(tiny.model, "me/recipe"))
    with pytest.raises(FileNotFoundError, match="expected vlmrewrite.json in 'someone/base', found none"):
        vr.from_pretrained("someone/base")
    with pytest.raises(FileNotFoundError, match="got 'me/nothing', which is no folder here, and the Hub gives no vlmr"):
        vr.from_pretrained("me/nothing")
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    same(vr.from_pretrained("me/recipe"))
    with pytest.raises(FileNotFoundError, match="'me/never', which is no folder here, and the Hub gives no vlmrewrite"):
        vr.apply(vr.restore(tiny.model), "me/never")
print("done")
"""


@pytest.mark.slow
def test_a_recipe_goes_to_the_hub_and_comes_back(tmp_path):
    with local_hub() as hub:
        where = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "HF_TOKEN": "none", "PYTHONPATH": str(ROOT)}
        how = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [sys.executable, "-c", THERE_AND_BACK],
            env=os.environ | where | how,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr
    assert f"{hub.address}/me/recipe/commit/" in done.stdout
    recipe, whole = hub.repos["me/recipe"], hub.repos["me/whole"]
    assert sorted(recipe) == ["README.md", "vlmrewrite.json", "vlmrewrite_blocks.safetensors"]
    assert {*recipe} < {*whole} and "model.safetensors" in whole
    about = json.loads(recipe["vlmrewrite.json"])
    assert (about["base_model"], about["weights"], about["blocks"]) == ("someone/base", False, True)
    said = ModelCard(recipe["README.md"].decode())
    assert (said.data.base_model, said.data.library_name) == ("someone/base", "vlmrewrite")
    assert 'model = vr.from_pretrained("me/recipe")' in said.text


def test_the_card_of_a_recipe_without_blocks():
    model = FAMILIES["llava"]().model
    with vr.applied(model, [Stride(keep=0.5)]):
        said = card(stored_of(model), "me/half")
    assert said.data.to_dict() == {
        "library_name": "vlmrewrite",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vlmrewrite"],
    }
    assert "# half\n\nA recipe of vlmrewrite for a vision-language model of type `llava`; it has no" in said.text
    assert 'vr.apply(model, "me/half")' in said.text
    assert "- `Stride(keep=0.5, at=0, per='image')`" in said.text


def test_nothing_is_uploaded_without_a_recipe():
    with pytest.raises(ValueError, match="is not rewritten"):
        vr.push_to_hub(FAMILIES["llava"]().model, "me/nothing")


def test_a_folder_of_this_machine_is_no_base(tmp_path):
    model = FAMILIES["llava"]().model
    for name, known in ((str(tmp_path), None), ("", None), ("someone/base", "someone/base")):
        model.name_or_path = name
        with vr.applied(model, [DPVR(at=1)]):
            assert stored_of(model).base_model == known
