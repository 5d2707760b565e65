"""The list of faults, ``faults.toml``."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

LIST = Path(__file__).with_name("faults.toml")


@dataclass(frozen=True)
class Fault:
    """One slip in the code; see ``faults.toml``."""

    name: str
    kind: str
    file: str
    old: str
    new: str
    wrong: str
    near: tuple[str, ...]

    def applied(self, text: str) -> str:
        """The text of its file, with the fault.

        Raises:
            ValueError: the text to replace does not stand there exactly once.
        """
        if (found := text.count(self.old)) != 1:
            raise ValueError(
                f"fault {self.name!r}: expected its `old` once in {self.file}, found it {found} times; write it anew in"
                f" {LIST.name}, as the code stands now"
            )
        return text.replace(self.old, self.new)


def faults(path: Path = LIST) -> list[Fault]:
    """All faults, in order.

    Raises:
        TypeError: an entry lacks a key, or has one that is not known.
    """
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["fault"]
    return [Fault(**entry | {"near": tuple(entry["near"])}) for entry in entries]
