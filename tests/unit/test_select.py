"""What of a recipe can run before the decoder, and what is said of the rest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import vlmrewrite as vr
from vlmrewrite.passes import STS, VTW, DivPrune, Downsample, FastV, FrameStride, Random, ShortV, Stride
from vlmrewrite.plan import Plan, Policy, Weights, frozen_pass
from vlmrewrite.recipe import shipped_recipes
from vlmrewrite.serving import BeforeDecoder, what_runs

ROOT = Path(__file__).parents[2]
INSIDE = "which is not known before the decoder"
ALIKE = "; expected the same tokens in all layers"
STAGE_2 = "left out: policy 'relevance' at layer 16 chooses inside the decoder"
ATTENTION = f"needs 'attention' (weight from the last prompt token, mean of heads, fp32 [F]), {INSIDE}"


def told(*passes: Any, depth: int = 32) -> list[str]:
    return [p.told(576) for p in what_runs(passes, depth=depth)]


def test_the_shipped_recipes() -> None:
    whole, refused = [], []
    for name, recipe in shipped_recipes().items():
        runs = what_runs(recipe, depth=32)
        if all(p.reason is None for p in runs):
            whole.append(name)
            assert BeforeDecoder(recipe, depth=32).told(576) == [p.told(576) for p in runs]
        else:
            refused.append(name)
            with pytest.raises(ValueError, match=r"^\w+: .+"):
                BeforeDecoder(recipe, depth=32)
    assert whole == ("divprune-half random-half stride-half sts-128 sts-32 sts-64 sts-half vidcom2-quarter".split())
    assert len(refused) == 10 and "downsample-half" in refused


@pytest.mark.parametrize(
    ("passes", "lines"),
    [
        ([STS()], [f"STS: stage 1 only, 192 of 576; {STAGE_2}"]),
        ([STS(refine=None)], ["STS: 192 of 576"]),
        ([STS(at=0)], [f"STS: stage 1 only, 192 of 576; left out: policy 'relevance' at layer 0 {ATTENTION}"]),
        ([Stride(1.0)], ["Stride: 576 of 576"]),
        ([Stride(0.5), DivPrune(0.25), STS()], ["Stride: 288 of 576", "DivPrune: 144 of 576", "STS: stage 1 "]),
        ([VTW(at=0)], ["VTW: 0 of 576"]),
        ([FrameStride(7)], ["FrameStride: 7 of 576"]),
        ([FastV()], ["FastV: refused: policy 'fastv' at layer 2 chooses inside the decoder"]),
        ([FastV(at=0)], [f"FastV: refused: policy 'fastv' at layer 0 {ATTENTION}"]),
        ([Stride(0.5, at=0.02)], ["Stride: 288 of 576"]),
        ([Stride(0.5, at=0.04)], ["Stride: refused: policy 'stride' at layer 1 chooses inside the decoder"]),
        ([VTW()], [f"VTW: refused: layer 16 runs on Text and attends to Text{ALIKE}"]),
        ([ShortV([3])], [f"ShortV: refused: layer 3 runs on Text and attends to All{ALIKE}"]),
        ([FastV(), Stride(2)], ["FastV: refused: policy 'fastv' at layer 2", "Stride: 2 of 576"]),
        ([VTW(at=0), Stride(2)], ["VTW: 0", "Stride: refused: an earlier pass leaves no vision tokens from "]),
        (
            [STS(features="encoder")],
            ["STS: refused: before the decoder an engine has what the projector gave, not what it took"],
        ),
    ],
)
def test_what_is_said(passes: list[Any], lines: list[str]) -> None:
    found = told(*passes)
    assert len(found) == len(lines)
    assert all(a.startswith(b) for a, b in zip(found, lines, strict=True)), found


def test_smaller_pictures_are_made_by_the_processor() -> None:
    pictures, stride = what_runs([Downsample(0.5), Stride(0.5)], depth=4)
    assert "recipe.processor(processor)" in str(pictures.reason) and stride.reason is None
    with pytest.raises(ValueError, match="Downsample: it makes pictures smaller"):
        BeforeDecoder([Downsample(0.5)], depth=4)


def test_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    exec(compile(code, "serving.md", "exec"), {})
    said, counts, *shapes = capsys.readouterr().out.splitlines()
    assert said == str([f"STS: stage 1 only, 192 of 576; {STAGE_2}"]) and counts == "[192, 192]"
    assert len(shapes) == 2 and all("torch.Size([192])" in line for line in shapes)


def nearest(x: torch.Tensor, member: torch.Tensor, lengths: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return member


def gridded(grid: torch.Tensor, member: torch.Tensor, lengths: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The first column of each image."""
    return torch.cat([torch.arange(int(r * c)) % int(c) == 0 for r, c in grid])


@frozen_pass
class Own:
    """A pass of somebody else, who asks for one thing."""

    name: ClassVar[str] = "own"
    need: str = "grid"
    weights: bool = False

    def refuse(self, plan: Plan) -> None:
        return None

    def change(self, plan: Plan) -> None:
        weights = (f"{plan.block(Weights(lambda n: torch.nn.Linear(n, 1)))}.weight",) if self.weights else ()
        op = nearest if not self.weights else lambda x, member, lengths, keep, weight: member
        plan.narrow(Policy("own", gridded if self.need == "grid" else op, (self.need,), weights=weights), 3)


def test_a_pass_of_somebody_else() -> None:
    engine = BeforeDecoder(Own(), depth=2)
    assert engine.by_image
    found = engine.choose([torch.zeros(12, 4), torch.zeros(6, 4)], places=[1, 20], grids=[(3, 4), (3, 2)])
    assert [x.positions.tolist() for x in found] == [[1, 5, 9], [20, 22, 24]]
    for grids in (None, [(3, 4)], [(4, 4)], [(3, 4), (1, 1)]):
        with pytest.raises(ValueError, match="^grids: .* got "):
            engine.choose([torch.zeros(12, 4)], grids=grids) if grids != [(3, 4)] else engine.choose(
                [torch.zeros(12, 4)], places=[torch.tensor([*range(6), *range(7, 13)])], grids=grids
            )
    for need in ("stream", "prompt", "text", "flat", "attention_outside"):
        [line] = told(Own(need))
        assert line.startswith(f"Own: refused: policy 'own' at layer 0 needs '{need}' (") and line.endswith(INSIDE)
    [line] = told(Own("features", weights=True))
    assert line.endswith("policy 'own' at layer 0 reads parameters of its own, which an engine does not hold")
    with pytest.raises(ValueError, match=r"policy 'own' chose \[12\] tokens of the images; expected at most \[3\]"):
        BeforeDecoder(Own("features"), depth=2).choose([torch.zeros(12, 4)])


def test_what_text_cuts_is_an_image_of_its_own() -> None:
    """As the rewritten model counts: a budget of two tokens is of each piece."""
    engine, pieces = BeforeDecoder(Stride(2), depth=1), torch.tensor([0, 1, 2, 3, 6, 7, 8, 9])
    [kept] = engine.choose([torch.zeros(8, 1)], places=[pieces])
    assert (kept.indices.tolist(), kept.positions.tolist()) == ([0, 2, 4, 6], [0, 2, 6, 8])
    assert engine.counts([8], [pieces]) == [4] and engine.counts([8]) == [2]


def test_it_is_found_by_its_name() -> None:
    assert vr.serving.BeforeDecoder is BeforeDecoder and vr.serving.select.what_runs is what_runs


def test_who_depends_on_other_images() -> None:
    assert BeforeDecoder([STS(), Stride(0.5)], depth=8).by_image
    assert not BeforeDecoder(Random(0.5), depth=8).by_image
    row = BeforeDecoder(STS(keep=4, per="row"), depth=8)
    assert not row.by_image and row.counts([9]) == [4]
    with pytest.raises(ValueError, match=r"^how many tokens of each image Vision\.repulsion\(4, at=0, per=row\) keeps"):
        row.counts([9, 9])


@pytest.mark.parametrize(
    ("lengths", "places", "message"),
    [
        ([4, 4], [0], "^places: expected one for each of 2 images, got 1$"),
        ([4, 4], [0, 3], "^places: expected positions from 0 that ascend"),
        ([4, 4], [5, 0], "^places: expected positions from 0 that ascend"),
        ([4], [-1], "^places: expected positions from 0 that ascend"),
        ([4], [torch.arange(3)], "^places: expected one position, or one of each token of an image, got 3 of 4$"),
    ],
)
def test_wrong_places(lengths: list[int], places: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BeforeDecoder(Stride(0.5), depth=1).choose([torch.zeros(n, 2) for n in lengths], places=places)


def test_wrong_features_and_layers() -> None:
    with pytest.raises(ValueError, match=r"^features: expected \[N, C\] of each image, got \[\(4,\), \(4,\)\]$"):
        BeforeDecoder(Stride(0.5), depth=1).choose(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"^FastV\.at: expected a layer in 0 \.\. 1 \(the decoder has 2\), got 2$"):
        what_runs(FastV(), depth=2)
