"""Tokens of pictures, models on the Hub, and what is said of models that have no vision tokens."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image
from transformers import LlavaOnevisionConfig, Qwen2_5_VLConfig
from typer.testing import CliRunner, Result

from vlmrewrite.cli import counting
from vlmrewrite.cli.app import app
from vlmrewrite.cli.config import local, read_config
from vlmrewrite.testing.models import ZOO

NOWHERE = Path("nowhere")


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def saved(folder: Path, config) -> Path:
    config.save_pretrained(folder)
    return folder / "config.json"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("qwen"), ZOO["qwen2_5_vl"](layers=1).model.config)


# ---- pictures


@pytest.mark.slow
@torch.no_grad()
def test_what_is_counted_is_what_the_model_encodes() -> None:
    """Of every family whose image processor is there and suits its tiny model; whose does not, counts or refuses."""
    compared, refused = set(), set()
    for name in ZOO:
        model = ZOO[name](layers=1).model
        for size in ((40, 40), (30, 80)):
            found = None
            with contextlib.suppress(ValueError):
                found, _ = counting.tokens_of_picture(model.config, model.config.to_dict(), NOWHERE, size)
            if found is None:
                with pytest.raises(ValueError, match="--image-tokens"):
                    counting.tokens_of_picture(model.config, model.config.to_dict(), NOWHERE, size)
                refused.add(name)
                break
            if found > 1000:  # of a processor that enlarges pictures; the others are enough
                break
            image = Image.new("RGB", size, (10, 90, 200))
            try:
                pixels = counting._image_processor(model.config, NOWHERE)(images=[image], return_tensors="pt")
                features = model.get_image_features(**pixels).pooler_output
                expected = sum(x.numel() // x.shape[-1] for x in features)
            except (
                RuntimeError,
                LookupError,
                TypeError,
                ValueError,
                AttributeError,
            ):  # made for towers of another size than a tiny one
                break
            assert found == expected, f"{name}, {size}"
            compared.add(name)
    assert len(compared) >= 15
    assert len(refused) < len(ZOO) / 2


def test_the_merged_patches_of_the_default_processor() -> None:
    config = Qwen2_5_VLConfig()
    name = type(counting._image_processor(config, NOWHERE)).__name__
    assert counting.tokens_of_picture(config, config.to_dict(), NOWHERE, (448, 448)) == (
        256,
        f"{name}, a picture of 448x448: 1024 patches, 2x2 of them a token",
    )


def test_all_tiles_are_counted() -> None:
    config = LlavaOnevisionConfig(image_grid_pinpoints=[[384, 384], [384, 768], [768, 384], [768, 768]])
    whole, source = counting.tokens_of_picture(config, config.to_dict(), NOWHERE, (768, 768))
    assert whole == 729 + 54 * 54 + 54  # a small picture of it, four tiles, a newline behind each row
    assert source == "LlavaOnevisionProcessor, a picture of 768x768"


def test_settings_in_the_folder_count(tmp_path: Path) -> None:
    saved(tmp_path, Qwen2_5_VLConfig())
    config, written = read_config(tmp_path)
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "merge_size": 4, "patch_size": 14}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert counting.tokens_of_picture(config, written, tmp_path, (448, 448))[0] == 64


@torch.no_grad()
def test_what_a_tower_adds_to_each_row_is_counted(tmp_path: Path) -> None:
    model = ZOO["hunyuan_vl"](layers=1).model
    saved(tmp_path, model.config)
    settings = {"image_processor_type": "HunYuanVLImageProcessor", "patch_size": 4, "merge_size": 2}
    settings["size"] = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    config, written = read_config(tmp_path)
    for width, height, tokens in ((24, 16, 2 * (3 + 1) + 2), (16, 40, 5 * (2 + 1) + 2), (4, 4, 2 * (2 + 1) + 2)):
        found, source = counting.tokens_of_picture(config, written, tmp_path, (width, height))
        assert (found, source) == (tokens, f"HunYuanVLProcessor, a picture of {width}x{height}")
        image = Image.new("RGB", (width, height), (10, 90, 200))
        pixels = counting._image_processor(config, tmp_path)(images=[image], return_tensors="pt")
        assert sum(len(x) for x in model.get_image_features(**pixels).pooler_output) == found


def test_inspect_counts_a_picture(qwen: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (30, 80)).save(picture)
    for given in (("--image-size", "30x80"), ("--image", picture)):
        done = inspect(qwen, *given)
        assert done.exit_code == 0, done.output
        assert "; 60 tokens an image (" in done.stdout
        assert "1 row of 124 tokens, 1 image, 60 vision tokens" in done.stdout
    assert "as if alone in its row" in inspect(qwen, "--image-size", "30x80", "--images", 2).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "it takes images of any size; give --image-size, such as 640x480 (pixels), or --image-tokens"),
        (["--image-size", "640"], "--image-size: expected width and height in pixels, such as 640x480, got '640'"),
        (["--image-size", "0x9"], "--image-size: expected width and height in pixels, such as 640x480, got '0x9'"),
        (["--image-size", "9x9", "--image-tokens", "3"], "expected one of --image, --image-size and --image-tokens"),
        (
            ["--image", "a.png", "--image", "b.png"],
            "--image: expected one without --profile, whose size is taken, got 2",
        ),
        (["--image", "a.png"], "a.png: expected an image file"),
        (["--profile", "--image-size", "9x9"], "expected --profile without --image-size"),
    ],
)
def test_what_is_refused_about_pictures(qwen: Path, arguments: list[str], message: str) -> None:
    done = inspect(qwen, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


# ---- models on the Hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub's models, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_model_in_the_cache(cache: Path, qwen: Path) -> None:
    home = cache / "models--some--model"
    copy = home / "snapshots" / "abc"
    copy.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    (copy / "config.json").write_bytes(qwen.read_bytes())
    assert local(Path("some/model")) == copy
    done = inspect("some/model", "--image-size", "30x80")
    assert done.exit_code == 0, done.output
    assert "60 tokens an image" in done.stdout


def test_a_model_that_is_not_there(cache: Path) -> None:
    done = inspect("some/model")
    assert done.exit_code == 2
    assert done.stderr.startswith(
        "error: expected a model folder, a config JSON file or a model on the Hub, got 'some/mod"
    )
    assert "there is no such path, and the Hub's copy cannot be had (LocalEntryNotFoundError: " in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["/a/b", "a/b/c", "./model", "config.json", "a/config.json", "../a"])
def test_what_is_no_hub_id_is_a_path(cache: Path, name: str) -> None:
    assert local(Path(name)) == Path(name)


# ---- models without vision tokens


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("llama", "got model_type 'llama' (str), a model of text alone: it has no vision tokens"),
        ("clip", "got model_type 'clip' (str), a model that compares images with texts and writes none"),
        ("whisper", "a model of text alone"),
        ("vit", "got model_type 'vit' (str), a model that does not answer questions about images (ViTConfig)"),
        ("lava", "got model_type 'lava' (str) (did you mean 'llava'?)"),
    ],
)
def test_what_another_model_is(tmp_path: Path, kind: str, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    done = inspect(tmp_path)
    assert done.exit_code == 2
    assert message in done.stderr
