"""What is said of a recipe that an engine cannot serve, and what its caches tell images by; no engine is needed."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from vlmrewrite.compat import vllm
from vlmrewrite.passes import STS, VTW, DivPrune, FastV, Random
from vlmrewrite.recipe import Recipe
from vlmrewrite.serving.vllm import overrides
from vlmrewrite.serving.vllm.processing import wraps
from vlmrewrite.serving.vllm.settings import check_engine, check_model, serving_of


class Model:
    """What vLLM chooses for an image model."""

    _processor_factory = embed_multimodal = None


def config(recipe: Any, *, images: int = 999, **more: Any) -> Any:
    """An engine's view of a model with four layers."""
    text = SimpleNamespace(**{"rope_parameters": {"rope_type": "default"}} | more.pop("text", {}))
    hf = SimpleNamespace(get_text_config=lambda: text)
    if recipe is not None:
        hf.vlmrewrite = recipe
    limits = SimpleNamespace(get_limit_per_prompt=lambda _: images, video_pruning_rate=more.pop("rate", None))
    settings = {"hf_config": hf, "multimodal_config": limits, "is_encoder_decoder": False, "max_model_len": 64} | more
    return SimpleNamespace(get_total_num_hidden_layers=lambda: 4, **settings)


def written(*passes: Any, tile: int | None = None) -> Any:
    return overrides(Recipe(name="mine", passes=passes), tile)["vlmrewrite"]


def test_a_recipe_travels_as_json() -> None:
    assert serving_of(config(None)) is None
    served = serving_of(config(written(DivPrune(0.5), tile=16)))
    assert served is not None and served.tile == 16 and served.before.recipe.passes == (DivPrune(0.5),)
    assert served.before.told(10) == ["DivPrune: 5 of 10"]
    digests = [serving_of(config(written(DivPrune(k), tile=t))).digest for k, t in [(0.5, 16), (0.5, None), (0.25, 16)]]  # type: ignore[union-attr]
    assert len(set(digests)) == 3 and served.digest == digests[0]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "sts-half",
            "hf_overrides['vlmrewrite']: expected a recipe as `vlmrewrite serve-args` prints it, got 'sts-half'",
        ),
        ({"name": "x"}, "hf_overrides['vlmrewrite']: passes: "),
        (
            written(Random(2)) | {"tile": 0},
            "hf_overrides['vlmrewrite']: tile: expected how many of an image's tokens a tile has",
        ),
        (
            written(FastV(at=1), STS(refine=2, at=0.5), Random(2)),
            "recipe 'mine' cannot be served: FastV: policy 'fastv' at layer 1 chooses inside the decoder",
        ),
        (
            written(VTW(at=0)),
            "recipe 'mine' cannot be served: it keeps no vision token: expected a recipe that keeps some",
        ),
        (
            written(FastV(at=9)),
            "recipe 'mine' cannot be served: hf_overrides['vlmrewrite']: passes[0].fastv.at: expected a layer",
        ),
    ],
)
def test_what_is_no_recipe_for_an_engine(recipe: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check_model(Model, config(recipe))


@pytest.mark.parametrize(
    ("chosen", "more", "reason"),
    [
        (
            {"embed_multimodal": None},
            {},
            "vLLM knows no images for it; expected a model that takes images and a processor",
        ),
        (
            {"supports_multimodal_raw_input_only": True},
            {},
            "it encodes images inside its forward pass, where no token can be",
        ),
        ({}, {"is_encoder_decoder": True}, "its decoder attends to the image from outside of the prompt"),
        ({}, {"text": {"rope_parameters": None}}, "its text model has no rotary positions, so that kept tokens cannot"),
        (
            {"__new__": object.__new__},
            {},
            "it has a __new__ of its own, so that what is loaded may be of another class",
        ),
        (
            {},
            {"text": {"rope_parameters": {"full": {"rope_type": "default"}, "near": {"rope_type": "longrope"}}}},
            "its rope type 'longrope' goes by the length of a prompt",
        ),
        ({}, {"rate": 0.5, "images": 1}, "video_pruning_rate=0.5 uses what a recipe needs; leave it out"),
        (
            {},
            {"images": 2},
            'a budget per="row" is of all images of a prompt together; set limit_mm_per_prompt={"image": 1}',
        ),
    ],
)
def test_models_that_cannot_be_served_so(chosen: dict[str, Any], more: dict[str, Any], reason: str) -> None:
    without = "embed_multimodal" in chosen
    kind = type("Model", () if without else (Model,), {} if without else chosen)
    with pytest.raises(ValueError, match="^Model cannot be served with a recipe: " + re.escape(reason)):
        check_model(kind, config(written(DivPrune(3, per="row")), **more))


def test_models_that_can_be_served() -> None:
    check_model(Model, config(written(DivPrune(3, per="row")), images=1))
    check_model(Model, config(written(DivPrune(3), Random(2))))


def engine(**more: Any) -> Any:
    """An engine's settings; each argument is one of them."""
    given = {"drafts": None, "stages": 1, "graph": False, "cache": "lru", "embeds": False, "lora": None} | more
    images = SimpleNamespace(mm_processor_cache_type=given["cache"])
    return SimpleNamespace(
        speculative_config=given["drafts"],
        parallel_config=SimpleNamespace(pipeline_parallel_size=given["stages"]),
        compilation_config=SimpleNamespace(cudagraph_mm_encoder=given["graph"]),
        model_config=SimpleNamespace(multimodal_config=images, enable_prompt_embeds=given["embeds"]),
        lora_config=given["lora"],
        use_v2_model_runner=given.get("second", False),
    )


def test_settings_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    check_engine(engine(lora=SimpleNamespace(enable_tower_connector_lora=False)))
    monkeypatch.setattr(vllm, "second_runner", lambda: "No module named 'some'")
    tower = SimpleNamespace(enable_tower_connector_lora=True)
    all_wrong = engine(drafts="draft", stages=2, graph=True, cache="shm", embeds=True, lora=tower, second=True)
    with pytest.raises(ValueError, match="^with a recipe of vlmrewrite: ") as caught:
        check_engine(all_wrong)
    assert [
        x.split(": expected ")[0] for x in str(caught.value).removeprefix("with a recipe of vlmrewrite: ").split("; ")
    ] == [
        "speculative_config",
        "pipeline_parallel_size",
        "compilation_config.cudagraph_mm_encoder",
        "mm_processor_cache_type",
        "enable_prompt_embeds",
        "enable_tower_connector_lora",
        "VLLM_USE_V2_MODEL_RUNNER",
    ]
    monkeypatch.setattr(vllm, "second_runner", lambda: None)
    check_engine(engine(second=True))


def keys(recipe: Any, images: list[str]) -> list[str]:
    processor = SimpleNamespace(info=SimpleNamespace(ctx=SimpleNamespace(model_config=config(recipe))))
    hashes = wraps()["_get_mm_hashes"](processor)(lambda _: {"image": images, "video": ["v"]})
    found = hashes(None)
    assert found["video"] == ["v"]
    return list(found["image"])


def test_what_caches_tell_images_by() -> None:
    """An image has a key for each recipe; where its number counts, for each place too."""
    assert keys(None, ["a", "b"]) == ["a", "b"]
    half, third = written(DivPrune(0.5)), written(DivPrune(0.3))
    assert keys(half, ["a", "b"]) == keys(half, ["b", "a"])[::-1] == keys(half, ["a"]) + keys(half, ["b"])
    assert not set(keys(half, ["a", "b"])) & {
        *keys(third, ["a", "b"]),
        *keys(written(DivPrune(0.5), tile=4), ["a"]),
        "a",
    }
    random = written(Random(0.5))
    assert keys(random, ["a", "b"])[0] == keys(random, ["a", "c"])[0]
    assert len({*keys(random, ["a", "b"]), *keys(random, ["b", "a"]), *keys(random, ["c", "b"])}) == 6
