"""A profile as a picture."""

from __future__ import annotations

from pathlib import Path


def check_plot(path: Path | str) -> None:
    """Raise what :meth:`LayerProfile.plot` would raise for this path, before anything is measured."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as e:
        raise ImportError("plots need matplotlib, which is not installed: pip install matplotlib") from e
    known, path = FigureCanvasBase.get_supported_filetypes(), Path(path)
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"plot: expected a file that ends in one of .{', .'.join(sorted(known))}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"plot: expected a file in a folder that exists, got {str(path)!r}")
