"""A model's folder, for the commands."""

from pathlib import Path

import pytest
from saved_llava import saved_llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llava(tmp_path_factory.mktemp("llava"))
