"""Where Inductor keeps what it compiled, for the next process."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import torch

from vlmrewrite.compat.private import find

_LOG = logging.getLogger(__name__)

_INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"


def keep_compiled() -> None:
    """Let Inductor keep its files in the folder ``VLMREWRITE_CACHE``, where that is set, by torch's version.

    Without it PyTorch keeps them in a folder for temporary files, which may not outlast a restart, and sets the
    variable ``TORCHINDUCTOR_CACHE_DIR`` of the process to it by itself. Another value, which a user has set, stays.

    Inductor names its files by graph, options, source code and device, puts them in place at once, and makes anew what
    it cannot read. It loads them by pickle, so that a folder that others can write to is not used, which is logged.
    """
    usual = os.path.abspath(find("torch._inductor.runtime.cache_dir_utils", "default_cache_dir")())
    wanted = os.environ.get("VLMREWRITE_CACHE")
    if not wanted or os.environ.get(_INDUCTOR, usual) != usual:
        return
    folder = Path(wanted).expanduser().absolute() / f"torch-{torch.__version__}"
    try:
        folder.parent.mkdir(0o700, parents=True, exist_ok=True)
        folder.mkdir(0o700, exist_ok=True)
        reason = _unsafe(folder) or _unsafe(folder.parent)
    except OSError as e:
        reason = str(e)
    if reason is None:
        os.environ[_INDUCTOR] = str(folder)
    else:
        _LOG.warning("what Inductor compiles is kept where PyTorch puts it, not in %s: %s", folder, reason)


def _unsafe(folder: Path) -> str | None:
    """Why somebody else may have put something into a folder, or None."""
    found = folder.stat()
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        return f"{folder} belongs to user {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and os.name == "posix":
        return f"others may write to {folder}; expected mode 0o700, got {stat.S_IMODE(found.st_mode):#o}"
    return None if os.access(folder, os.W_OK) else f"{folder} cannot be written to"
