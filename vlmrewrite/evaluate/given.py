"""What a run is given: samples, recipes, a metric and a model, checked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase

from vlmrewrite.errors import one_of, shown
from vlmrewrite.evaluate.asking import refuse_chats
from vlmrewrite.evaluate.data import fingerprint, read_data
from vlmrewrite.evaluate.metrics import METRICS, Metric, lacking, usual
from vlmrewrite.evaluate.results import AGREEMENT
from vlmrewrite.evaluate.sample import Sample
from vlmrewrite.evaluate.subject import Subject, numbers_of
from vlmrewrite.hf import base_model_of
from vlmrewrite.ops import Backend, Kernels
from vlmrewrite.plan import Pass
from vlmrewrite.recipe import Recipe


class Given(NamedTuple):
    """What a run is of: the samples, the unmodified model and the recipes, the score, and what tells one run apart."""

    samples: list[Sample]
    subjects: list[Subject]
    score: Metric | None
    about: dict[str, Any]


def checked(
    model: Any, processor: Any, data: Any, recipes: Any, metric: str | Metric, backend: Backend, kernels: Kernels
) -> Given:
    """Read and check what :func:`vlmrewrite.evaluate` was given.

    Raises:
        ValueError, TypeError: it cannot be used; of data one line for each faulty row.
    """
    if not isinstance(base_model_of(model), nn.Module):
        raise TypeError(f"expected a Hugging Face model, got {shown(model)}")
    if processor is None or isinstance(processor, PreTrainedTokenizerBase):
        raise TypeError(f"expected a processor of texts and images, got {shown(processor)}")
    one = isinstance(recipes, str | os.PathLike | Recipe | Pass)
    if not one and not isinstance(recipes, Iterable):
        raise TypeError(f"expected a recipe or a list of recipes, got {shown(recipes)}")
    samples = read_data(data)
    name, score = metric_of(metric, samples)
    refuse_chats(processor, samples)
    if base_model_of(model).training:
        raise ValueError(f"expected a {type(model).__name__} in eval mode, got one in training: call model.eval()")
    given = [recipes] if one else list(recipes)
    subjects = [Subject(model, processor)]
    subjects += [Subject(model, processor, recipe, backend=backend, kernels=kernels) for recipe in given]
    names = [subject.name for subject in subjects]
    if running := [s.name for s in subjects if s.session is not None and s.session.running is not None]:
        raise ValueError(
            f"recipe {running[0]!r} begins where earlier rows say (start: running), so that its answers depend on their"
            " order, and parts of a run do not share it; expected a start by number, as vlmrewrite.calibrate finds it"
        )
    for subject in subjects[1:]:
        subject.try_pictures(samples[0])
    if not given or len(set(names)) < len(names):
        raise ValueError(f"expected recipes with names of their own, got {', '.join(names[1:]) or 'none'}")
    told = {"recipes": {s.name: s.recipe for s in subjects[1:]}, "model": identity_of(base_model_of(model))}
    about = {"data": fingerprint(samples), "samples": len(samples), "metric": name, "metric_code": _code(metric)}
    return Given(samples, subjects, score, about | {"backend": backend, "kernels": kernels} | told)


def check_counts(least: int = 1, **counts: Any) -> None:
    """Raise ValueError for arguments that are no integers, or are too small; by name."""
    for name, value in counts.items():
        if type(value) is bool or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {shown(value)}")


def metric_of(metric: str | Metric, samples: Sequence[Sample]) -> tuple[str, Metric | None]:
    """A metric's name and function; no function for agreement with the unmodified model.

    Raises:
        ValueError: there is no such metric, or samples lack what it needs: one line each.
    """
    if callable(metric):
        return (
            f"{getattr(metric, '__module__', '')}.{getattr(metric, '__qualname__', type(metric).__qualname__)}",
            metric,
        )
    if metric != "auto" and metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}, {one_of(str(metric), ['auto', *METRICS])}, or a function")
    if not samples[0].answers:
        if metric != "auto":
            raise ValueError(
                f"metric {metric!r} needs references, and the data has none: expected 'answer' in each row"
            )
        return AGREEMENT, None
    if wrong := [f"sample {s.id!r}: {why}" for s in samples if (why := lacking(metric, s))]:
        raise ValueError("\n".join(wrong[:20]))
    if metric == "auto":
        kinds = sorted({"choice" if s.choices else "exact" for s in samples})
        return " and ".join(kinds), usual
    return metric, METRICS[metric]


def _code(metric: object) -> str:
    """What tells two functions of one name apart, as far as it can be seen."""
    code = getattr(metric, "__code__", None)
    if code is None:
        return ""
    plain = [x for x in code.co_consts if isinstance(x, str | bytes | int | float | None)]
    told = f"{code.co_code.hex()} {code.co_names} {plain}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def identity_of(model: Any) -> dict[str, str]:
    """What says that a model is the same: its class, its configuration, and some numbers of each parameter."""
    configuration = hashlib.sha256(model.config.to_json_string().encode()).hexdigest()[:16]
    return {"class": type(model).__name__, "configuration": configuration, "parameters": numbers_of(model)}
