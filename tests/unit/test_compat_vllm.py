"""What is done with an engine's configuration and models, on stand-ins: vLLM itself is asked in ``tests/serving``."""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vlmrewrite import compat
from vlmrewrite.compat import vllm


def engine(rope: dict[str, Any] | None = None) -> Any:
    text = SimpleNamespace(max_position_embeddings=64, rope_parameters=rope)
    whole = SimpleNamespace(vlmrewrite={"name": "x"}, text_config=text, get_text_config=lambda: text)
    return SimpleNamespace(model_config=SimpleNamespace(hf_config=whole, hf_text_config=text, other=1), shared=[])


def test_a_configuration_without_the_recipe() -> None:
    given = engine({"rope_type": "default"})
    made = vllm.as_unchanged(given, "vlmrewrite", 2)
    assert made.shared is given.shared and made.model_config.other == 1
    assert not hasattr(made.model_config.hf_config, "vlmrewrite") and hasattr(
        given.model_config.hf_config, "vlmrewrite"
    )
    longer = made.model_config.hf_config.text_config
    assert longer.max_position_embeddings == 128 and longer is made.model_config.hf_text_config
    assert given.model_config.hf_text_config.max_position_embeddings == 64


def test_ropes_that_are_stretched_by_their_length_keep_it() -> None:
    made = vllm.as_unchanged(engine({"rope_type": "dynamic"}), "vlmrewrite", 2)
    assert made.model_config.hf_text_config.max_position_embeddings == 64


def test_how_many_positions_ropes_have() -> None:
    class Rope(nn.Module):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.register_buffer("cos_sin_cache", torch.zeros(rows, 4))

    assert vllm.rows_of_ropes(nn.Sequential(nn.Linear(1, 1))) is None
    text, tower = nn.Sequential(Rope(9), nn.Sequential(Rope(7))), Rope(5)
    assert vllm.rows_of_ropes(text) == vllm.rows_of_ropes(nn.Sequential(Rope(7), Rope(9))) == 7
    model = nn.ModuleDict({"text": text, "tower": tower})
    assert vllm.rows_of_ropes(model) == 5
    model.get_language_model = lambda: text
    assert vllm.rows_of_ropes(model) == 7
    text[0].register_buffer("long_short_cos_sin_cache", torch.zeros(20, 4))
    with pytest.raises(ValueError, match=r"got Rope\.long_short_cos_sin_cache"):
        vllm.rows_of_ropes(model)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "No module named 'triton'"),
        (ModuleNotFoundError("No module named 'vllm.own'", name="vllm.own"), "No module named 'vllm.own'"),
        (RuntimeError("no driver"), "RuntimeError: no driver"),
        (ModuleNotFoundError("gone", name="vllm.v1.worker.gpu"), None),
    ],
)
def test_a_second_runner_that_is_not_imported(
    error: Exception, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it needs is not there, which is said; or it is not where it was, which is another version."""

    def importing(name: str) -> Any:
        if name == vllm.PRUNER[0]:
            raise error
        return SimpleNamespace(__version__="9")

    vllm.second_runner.cache_clear()
    monkeypatch.setattr(importlib, "import_module", importing)
    if why is None:
        with pytest.raises(compat.VersionError, match=r"^vllm 9 has no vllm\.v1\.worker\.gpu\.model_states\.default"):
            vllm.second_runner()
    else:
        assert vllm.second_runner() == why
    vllm.second_runner.cache_clear()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_there() -> None:
    with pytest.raises(compat.VersionError, match=r"^vllm is not installed: install vllm>=0.32,<0.33$"):
        vllm.versions()
