"""`vlmrewrite inspect --profile`, in process."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from vlmrewrite.cli.app import app

DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "checkpoint"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)], catch_exceptions=False)


@pytest.mark.slow
def test_inspect_of_the_bundled_model(tmp_path: Path) -> None:
    noise = torch.randint(256, (96, 96, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "scene.png")
    asked = ("--image", tmp_path / "scene.png", "--prompt", "how many digits ?", "--plot", tmp_path / "plot.png")
    done = run(DIGITS, "--profile", *asked, "--device", "cpu")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "LlavaForConditionalGeneration, float32 on cpu"
    assert lines[2].startswith("layer  attention to image  cosine vision  cosine text  KL frozen")
    assert [line.split()[0] for line in lines[3:11]] == [str(i) for i in range(8)]
    assert lines[11] == "mean over 1 prompt with images; KL in nats"
    assert lines[-1] == f"plot: {tmp_path / 'plot.png'}"
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert "\x1b" not in done.stdout


def test_inspect_as_data(folder: Path) -> None:
    """Two prompts about an image each, and one prompt about two images."""
    picture = folder / "picture.png"
    Image.open(picture).rotate(90).save(folder / "other.png")
    images = ("--image", picture, "--image", folder / "other.png")
    done = run(
        folder, "--profile", *images, "--prompt", "w10 w20", "--prompt", "w9", "--json", "-", "--dtype", "float32"
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["prompts"] == ["w10 w20", "w9"]
    assert found["images"] == [str(picture), str(folder / "other.png")]
    assert found["dtype"] == "float32"
    assert found["rows"] == 2
    assert len(found["freeze_kl"]) == 4
    done = run(folder, "--profile", *images, "--prompt", "w10", "--json", "-")
    assert json.loads(done.stdout)["rows"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--profile", "--profile: expected --image and --prompt"),
        ("--profile --image {picture}", "--profile: expected --image and --prompt"),
        ("--profile --image {picture} --prompt a --prompt b", "--prompt: expected one, or one for each of 1 images"),
        ("--profile --image {picture} --prompt a --plot out.text", "plot: expected a file that ends in one of"),
        ("--profile --image {picture} --prompt a --text 3 --recipe b", "expected --profile without --recipe, --text"),
        ("--image {picture} --plot out.png", "expected --profile with --plot"),
    ],
)
def test_faults(folder: Path, arguments: str, message: str) -> None:
    done = run(folder, *arguments.format(picture=folder / "picture.png").split())
    assert done.exit_code == 2
    assert done.stdout == ""
    assert message in done.stderr


def test_a_configuration_has_no_profile(folder: Path) -> None:
    done = run(folder / "config.json", "--profile", "--image", folder / "picture.png", "--prompt", "w10")
    assert done.exit_code == 2
    assert "error: --profile: expected a folder with weights and a processor, got the file" in done.stderr
