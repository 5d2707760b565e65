"""Any folder of the package may be what a process imports first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import vlmrewrite

HOME = Path(vlmrewrite.__file__).parent
FOLDERS = sorted(p.parent.name for p in HOME.glob("*/__init__.py") if p.parent.name not in ("harness", "serving"))


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_imported_first(folder: str) -> None:
    subprocess.run([sys.executable, "-c", f"import vlmrewrite.{folder}"], check=True, timeout=300)


@pytest.mark.slow
def test_what_a_user_writes_at_the_top_of_a_script() -> None:
    lines = (
        "import vlmrewrite as vr",
        "from vlmrewrite.training import prompt_ends",
        "from vlmrewrite import hf, report",
        "assert callable(vr.report) and vr.report is report and vr.hf is hf and callable(prompt_ends)",
        "assert not hasattr(vr, 'nothing') and callable(vr.tune) and callable(vr.apply)",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=300)
