"""The command line, in process: what it prints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    InternVLConfig,
    LlavaConfig,
    Mistral3Config,
    PreTrainedConfig,
    SmolVLMConfig,
)
from typer.testing import CliRunner, Result

import vlmrewrite
from vlmrewrite.cli import prompt
from vlmrewrite.cli.app import app
from vlmrewrite.cli.config import image_tokens
from vlmrewrite.cli.loading import question, read_processor
from vlmrewrite.cli.prompt import _NOT_ENCODED
from vlmrewrite.recipe import shipped_recipes
from vlmrewrite.testing.models import FAMILIES, IMAGE


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def output(*arguments: object) -> str:
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# ---- what there is


def test_without_a_command_the_help_is_shown() -> None:
    text = output()
    assert "Usage:" in text
    assert all(f"  {name}  " in text for name in ("recipes", "passes", "inspect", "apply", "bench"))


def test_the_version() -> None:
    text = output("--version")
    assert text.startswith(f"vlmrewrite {vlmrewrite.__version__} (Python 3.")
    assert f"torch {torch.__version__}" in text and "transformers 5." in text


def test_json_is_printed_in_place_of_text_or_written_beside_it(tmp_path: Path) -> None:
    text = output("recipes")
    assert output("recipes", "--json", tmp_path / "out.json") == text
    printed = output("recipes", "--json", "-")
    assert printed == (tmp_path / "out.json").read_text()
    assert len(json.loads(printed)) == len(shipped_recipes())


def test_recipes() -> None:
    text = output("recipes")
    assert all(name in text for name in shipped_recipes())
    found = {r["name"]: r for r in json.loads(output("recipes", "--json", "-"))}
    assert list(found) == list(shipped_recipes())
    assert found["stride-half"] == {
        "name": "stride-half",
        "description": "Control, 1/2 of each image's tokens, evenly spaced, before the decoder.",
        "backend": "auto",
        "kernels": "auto",
        "passes": [{"name": "stride", "options": {"keep": 0.5, "at": 0, "per": "image"}}],
    }


# ---- inspect


@pytest.mark.wide
@pytest.mark.parametrize(
    ("family", "tokens", "source"),
    [
        ("llava", 16, "image_seq_length"),
        ("llava_next", 20, None),
        ("qwen2_5_vl", 12, None),
        ("internvl", 4, "image_seq_length"),
        ("smolvlm", 4, "the tower's patch grid and scale_factor"),
        ("gemma3", 9, "mm_tokens_per_image"),
    ],
)
def test_inspect_of_a_configuration(family: str, tokens: int, source: str | None, tmp_path: Path) -> None:
    tiny = FAMILIES[family]()
    tiny.model.config.save_pretrained(tmp_path)
    given = () if source else ("--image-tokens", tokens)
    found = json.loads(output("inspect", tmp_path, "--text", 7, "--images", 2, "--rows", 2, "--json", "-", *given))
    length, kv = 7 + 2 * tokens, 2 * 2 * 8 * 2  # keys and values, 2 heads of 8, 2 bytes
    assert found["class"] == type(tiny.model).__name__
    assert found["parameters"] == sum(p.numel() for p in tiny.model.parameters())
    assert found["image_tokens_from"] == (source or "as given")
    assert [x["layer"] for x in found["layers"]] == [0, 1, 2, 3]
    for layer in found["layers"]:
        assert layer["run_on"] == layer["attend_to"] == "All"
        assert layer["tokens"] == layer["keys"] == length
        assert layer["kv_bytes"] == 2 * length * kv
        # q, k, v, o and three MLP matrices; scores and weighted values of 4 heads of 8
        assert layer["flops"] == 2 * length * (2 * 32 * (32 + 16 + 16 + 32 + 3 * 64) + 2 * 4 * 16 * length)
    assert found["recipe"] is None
    assert found["totals"]["before"] == found["totals"]["after"]


def test_inspect_with_a_recipe_that_dispatches(folder: Path) -> None:
    arguments = "inspect", folder / "config.json", "--recipe", "visor-policy", "--text", 4, "--dtype", "float32"
    lines = [line.rstrip() for line in output(*arguments).splitlines()]
    at = lines.index("dispatch by Confidence(at=0, threshold=0.8) at layer 0 among")
    assert [line for line in lines[at:] if line.startswith("variant")] == ["variant 0:", "variant 1:", "variant 2:"]
    assert sum(line.startswith("total: ") for line in lines[at:]) == 3
    assert [line.split()[:2] for line in lines if line.startswith("prefill")] == [["prefill", "unmodified"]]
    (kv,) = (line for line in lines if line.startswith("K/V MiB"))
    ratios = [float(part.split()[0]) for part in kv.split("÷")[1:]]
    assert ratios[0] > ratios[1] > ratios[2] == 1.0
    found = json.loads(output(*arguments, "--json", "-"))
    assert found["chooser"] == "Confidence(at=0, threshold=0.8)"
    assert [v["totals"]["after"]["kv_bytes"] for v in found["variants"]] == sorted(
        v["totals"]["after"]["kv_bytes"] for v in found["variants"]
    )
    assert found["totals"] == found["variants"][-1]["totals"]


def test_inspect_with_a_recipe(folder: Path, tmp_path: Path) -> None:
    mine = write(
        tmp_path / "mine.yaml",
        "name: mine\npasses:\n- stride: {keep: 8}\n- random: {keep: 2, at: 2}\n- sts: {features: encoder}\n",
    )
    text = output("inspect", folder / "config.json", "--recipe", mine, "--text", 4, "--dtype", "float32")
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[0] == "LlavaForConditionalGeneration, 54,144 parameters; 16 tokens an image (image_seq_length)"
    assert lines[2] == "program: 4 decoder layers, hidden 32, float32; 1 row of 20 tokens, 1 image, 16 vision tokens"
    at = lines.index("recipe mine")
    assert lines[at + 1 : at + 4] == [
        "  Stride(keep=8, at=0, per='image'): matched",
        "  Random(keep=2, at=2, seed=0, per='image'): matched",
        "  STS(keep=192, refine=64, at=0.5, features='encoder', per='image'): REFUSED: " + _NOT_ENCODED,
    ]
    assert lines[at + 6 : at + 11] == [
        "stride = Vision.select(stride, keep=8) at layer 0",
        "random = stride.select(random, keep=2) at layer 2",
        "layers  run on         attend to      tokens  keys  q    k, v  GFLOP      K/V",
        "0-1     Text | stride  Text | stride  12      12    4x8  2x8   0.0002396  1.5 KiB",
        "2-3     Text | random  Text | random  6       6     4x8  2x8   0.0001152  768 B",
    ]
    assert any(line.split() == ["tokens", "a", "layer", "20", "9", "÷", "2.22"] for line in lines[at + 11 :])
    assert any(line.split()[:2] == ["K/V", "MiB"] and line.endswith("÷ 2.22") for line in lines[at + 11 :])
    assert "note:" not in text


CAPTURED: dict[str, Any] = {}


@pytest.fixture
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One capture for each shape of prompt: all these tests are of one configuration."""
    capture = prompt.captured_prompt

    def once(model: Any, shape: prompt.Shape) -> Any:
        if str(shape) not in CAPTURED:
            CAPTURED[str(shape)] = capture(model, shape)
        return CAPTURED[str(shape)]

    monkeypatch.setattr(prompt, "captured_prompt", once)


@pytest.mark.parametrize(
    ("passes", "notes"),
    [
        (
            "- stride: {keep: 999}",
            ["stride drops nothing: at layer 0, keep=999 is", "this recipe saves no FLOPs on"],
        ),
        ("- stride: {keep: 4}\n- random: {keep: 5, at: 1}", ["random drops nothing: at layer 1, keep=5 is all that"]),
        ("- sts: {refine: null}", ["repulsion drops nothing: at layer 0, keep=192", "this recipe saves no FLOPs on"]),
        ("- sts: {features: encoder}", ["this recipe saves no FLOPs on this prompt"]),
        ("- stride: {keep: 15}", []),
    ],
    ids=str,
)
@pytest.mark.usefixtures("captured_once")
def test_inspect_tells_what_apply_tells(folder: Path, tmp_path: Path, passes: str, notes: list[str]) -> None:
    mine = write(tmp_path / "mine.yaml", f"name: mine\npasses:\n{passes}\n")
    text = output("inspect", folder / "config.json", "--recipe", mine, "--images", 2)
    told = [line.removeprefix("note: ") for line in text.splitlines() if line.startswith("note: ")]
    written = output("inspect", folder / "config.json", "--recipe", mine, "--images", 2, "--json", "-")
    found = json.loads(written)["notes"]
    assert told == found
    assert len(found) == len(notes)
    assert all(note.startswith(start) for note, start in zip(found, notes, strict=True))
    assert text.count("REFUSED") == ("encoder" in passes)
    assert json.loads(output("inspect", folder / "config.json", "--json", "-"))["notes"] == []


@pytest.mark.parametrize(
    ("config", "written", "tokens", "source"),
    [
        (LlavaConfig(vision_config=CLIPVisionConfig(image_size=384, patch_size=14)), {}, 729, "the tower's patch grid"),
        (LlavaConfig(image_seq_length=99), {"image_seq_length": 99}, 99, "image_seq_length"),
        (InternVLConfig(), {}, 256, "the tower's patch grid and downsample_ratio"),
        (SmolVLMConfig(vision_config={"image_size": 512, "patch_size": 16}, scale_factor=4), {}, 64, None),
        (Mistral3Config(), {}, 3025, "the tower's patch grid and spatial_merge_size"),
        (Gemma3Config(), {}, 256, "mm_tokens_per_image"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, PreTrainedConfig) else "",
)
def test_image_tokens_of_configurations(
    config: PreTrainedConfig, written: dict[str, Any], tokens: int, source: str | None
) -> None:
    assert image_tokens(config, written) == (tokens, source or "the tower's patch grid and scale_factor")


# ---- questions


def test_image_tokens_and_chat_templates_in_prompts(folder: Path) -> None:
    processor: Any = read_processor(folder)
    picture = Image.open(folder / "picture.png")
    expected = [IMAGE] * 16 + [10]
    for asked in ("w10", "<image> w10"):
        assert question(processor, asked, [picture])["input_ids"].tolist() == [expected]
    assert question(processor, "w10 <image> w11", [picture])["input_ids"].tolist() == [[10, *[IMAGE] * 16, 11]]
    processor.chat_template = (
        "{% for m in messages %}w12 {% for c in m['content'] %}"
        "{{ '<image> ' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %} w13"
    )
    inputs = question(processor, "w10", [picture])
    assert inputs["input_ids"].tolist() == [[12, *expected, 13]]
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)


# ---- bench


@pytest.mark.slow
def test_bench_of_recipes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ("--repeat", 1, "--new-tokens", 2, "--json", out, "--text", 5)
    text = output("bench", folder, "--recipe", "stride-half", "--recipe", "random-half", *options)
    assert all(name in text for name in ("unmodified", "stride-half", "random-half", "decode", "K/V MiB")), text
    found = json.loads(out.read_text())
    assert found["prompt"] == "1 x (5 text tokens, 1 x 16 vision tokens)"
    plain, stride, random = found["rows"]
    assert [len(x[kind]) for x in (plain, stride, random) for kind in ("prefill", "decode")] == [1] * 6
    assert plain["kv_bytes"] == 4 * 21 * 2 * 2 * 8 * 4
    assert stride["kv_bytes"] == random["kv_bytes"] == 4 * 13 * 2 * 2 * 8 * 4
    assert stride["flop_ratio"] > 1.5


@pytest.mark.slow
def test_bench_without_weights_and_with_a_question(folder: Path, tmp_path: Path) -> None:
    internvl = FAMILIES["internvl"]().model.config  # takes its image features as one tensor
    internvl.save_pretrained(tmp_path)
    options = ("--recipe", "stride-half", "--repeat", 1, "--new-tokens", 2)
    text = output("bench", tmp_path / "config.json", "--random-weights", "--rows", 2, *options)
    assert "2 x (64 text tokens, 1 x 4 vision tokens)" in text
    text = output("bench", folder, "--image", folder / "picture.png", "--prompt", "w10 w20", *options)
    assert "prompt w10 w20" in text
