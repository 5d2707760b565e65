"""Faces for the pages: files of Debian packages, some of which matplotlib carries too.

A face that is on neither is an error that says what to install. ``DOCUMENT_FONTS`` names a further folder to look in.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

FACES = {
    "DejaVuSans.ttf": "fonts-dejavu-core",
    "DejaVuSans-Bold.ttf": "fonts-dejavu-core",
    "DejaVuSansMono.ttf": "fonts-dejavu-core",
    "DejaVuSerif.ttf": "fonts-dejavu-core",
    "LiberationSans-Regular.ttf": "fonts-liberation",
    "LiberationSerif-Regular.ttf": "fonts-liberation",
    "LiberationSerif-Bold.ttf": "fonts-liberation",
    "LiberationMono-Regular.ttf": "fonts-liberation",
    "FreeSans.ttf": "fonts-freefont-ttf",
    "FreeSerif.ttf": "fonts-freefont-ttf",
}
"""Name of a file -> Debian package that has it."""

IN_MATPLOTLIB = tuple(name for name, package in FACES.items() if package == "fonts-dejavu-core")
DEBIAN = Path("/usr/share/fonts/truetype")
VARIABLE = "DOCUMENT_FONTS"


@cache
def _files() -> dict[str, Path]:
    """Every TrueType file that can be found, by its name."""
    import matplotlib

    folders = [Path(matplotlib.get_data_path(), "fonts", "ttf"), DEBIAN]
    if own := os.environ.get(VARIABLE):
        folders.append(Path(own))
    return {path.name: path for folder in folders for path in sorted(folder.rglob("*.ttf"))}


def face(name: str) -> Path:
    """Where a face of ``FACES`` lies.

    Raises:
        FileNotFoundError: it is not on this machine.
    """
    found = _files().get(name)
    if found is None:
        raise FileNotFoundError(
            f"font {name} is neither in {DEBIAN} nor in matplotlib: apt-get install {FACES[name]}, or let {VARIABLE}"
            " name a folder that has it"
        )
    return found
