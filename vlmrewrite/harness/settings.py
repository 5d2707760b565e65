"""How a task of lmms-eval wants answers generated, as ``generate()`` takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vlmrewrite.errors import shown

LONGEST = 1024
"""Tokens of an answer where a task does not say it."""

_PLAIN = ("max_new_tokens", "num_beams", "repetition_penalty")
_SAMPLED = ("temperature", "top_p", "top_k")
_STOPS = ("until", "stop_sequences")


class Settings(NamedTuple):
    """Arguments of ``generate()``, texts that end an answer, and what a task names beside them."""

    arguments: dict[str, Any]
    until: tuple[str, ...]
    others: tuple[str, ...]

    def cut(self, text: str) -> str:
        """An answer up to the first text that ends one."""
        for end in self.until:
            text = text.partition(end)[0]
        return text.strip()


def settings_of(given: Mapping[str, Any]) -> Settings:
    """The settings of a task's ``generation_kwargs``.

    Answers are greedy unless there is a temperature above 0; ``do_sample: false`` makes them greedy with one.

    Raises:
        ValueError: texts that end an answer are none.
    """
    given = {key: value for key, value in given.items() if value is not None}
    arguments = {"max_new_tokens": LONGEST} | {key: given[key] for key in _PLAIN if key in given}
    sampled = given.get("do_sample", True) and given.get("temperature", 0) > 0
    arguments |= {"do_sample": bool(sampled)} | {key: given.get(key) if sampled else None for key in _SAMPLED}
    until = list[str]()
    for key in _STOPS:
        texts = given.get(key, [])
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{key}: expected a text, or a list of texts, got {shown(texts)}")
        until += filter(None, texts)
    known = {*_PLAIN, *_SAMPLED, *_STOPS, "do_sample"}
    return Settings(arguments, tuple(until), tuple(key for key in given if key not in known))
