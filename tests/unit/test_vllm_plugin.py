"""What the plug-in does with classes that vLLM chooses, and where vLLM lacks something; on stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.test_served_recipes import Model, config, engine, written
from vlmrewrite.compat import VersionError, vllm, vllm_patch
from vlmrewrite.passes import DivPrune
from vlmrewrite.serving.vllm import register
from vlmrewrite.serving.vllm.model import before_of, pruned


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned of; versions are those that are tested."""
    found: list[str] = []
    monkeypatch.setattr(vllm, "warn", found.append)
    monkeypatch.setattr(vllm, "versions", lambda: vllm.TESTED_PAIRS[0])
    return found


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> tuple[Callable[..., Any], ...]:
    """The functions that are put into vLLM."""
    found: list[Any] = []
    monkeypatch.setattr(vllm_patch, "install", lambda *functions: found.extend(functions))
    register()
    return tuple(found)


class Draft:
    """Takes images, and has no processor for them."""

    def embed_multimodal(self) -> None: ...


class Another(Draft):
    """Makes what it says by itself."""

    _processor_factory = None

    def __new__(cls) -> Any:
        return Draft()


class Text:
    """Takes no images."""


@pytest.mark.parametrize("chosen", [Draft, Another, Text])
def test_classes_that_stay_as_they_are(chosen: type, given: Any) -> None:
    change, *_ = given
    assert change(chosen, config(None)) is chosen
    with pytest.raises(ValueError, match=f"^{chosen.__name__} cannot be served with a recipe: "):
        change(chosen, config(written(DivPrune(3))))


def test_a_model_that_was_made_in_another_way(given: Any) -> None:
    *_, again = given
    assert again(Draft(), config(None)) is False
    with pytest.raises(ValueError, match="^expected a model that leaves tokens .* got a Draft that vLLM made"):
        again(Draft(), config(written(DivPrune(3))))
    served = SimpleNamespace(vlmrewrite_before="before")
    assert before_of(served) == "before" and again(served, config(written(DivPrune(3)))) is True


def test_untested_versions_are_said_with_a_recipe_alone(
    given: Any, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change, *_ = given
    monkeypatch.setattr(vllm, "processes_with", lambda *_: None)
    for pair in (vllm.TESTED_PAIRS[0], ("0.99.0", "5.19.0")):
        monkeypatch.setattr(vllm, "versions", lambda pair=pair: pair)
        change(Model, config(None))
        assert not said
        change(Model, config(written(DivPrune(3))))
    tested = "; ".join(f"vLLM {a} with transformers {b}" for a, b in vllm.TESTED_PAIRS)
    assert said == [f"vlmrewrite was tested with {tested}; these are vLLM 0.99.0 and transformers 5.19.0"]


def test_models_whose_images_have_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "modalities", lambda _: ["audio", "vision_chunk"])
    settings = config(written(DivPrune(3)), enable_prompt_embeds=False)
    settings.multimodal_config.mm_processor_cache_type = "lru"
    made_of = engine()
    made_of.model_config = settings
    message = r"^expected a model whose processor takes what it calls 'image', got one of \['audio', 'vision_chunk'\]$"
    with pytest.raises(ValueError, match=message):
        pruned(Model)(vllm_config=made_of)


def test_vllm_that_lacks_something(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines without a recipe start; those with one do not, if that can be helped."""

    def lacks(*_: Any) -> None:
        raise VersionError("vllm 9 has no hook")

    guards: list[Any] = []
    monkeypatch.setattr(vllm_patch, "install", lacks)
    monkeypatch.setattr(vllm_patch, "guard", guards.append)
    register()
    [guard] = guards
    assert guard(Model, config(None)) is Model
    with pytest.raises(VersionError, match="^no recipe of vlmrewrite can be served: vllm 9 has no hook$"):
        guard(Model, config(written(DivPrune(3))))
    assert said == ["vlmrewrite does nothing here, and an engine with a recipe does not start: vllm 9 has no hook"]
    monkeypatch.setattr(vllm_patch, "guard", lacks)
    register()
    assert said[1:] == [
        "vlmrewrite does nothing here, also where a recipe is given, which is then IGNORED: vllm 9 has no hook"
    ]
