"""Everything but the kernels works where triton is not installed."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
sys.modules["triton"] = None  # as if it were not installed

import torch
import vlmrewrite as vr
from vlmrewrite.passes import STS
from vlmrewrite.testing.models import FAMILIES, Row

tiny = FAMILIES["llava"]()
inputs = tiny.inputs([Row(images=1)])
with torch.no_grad(), vr.applied(tiny.model, STS(keep=3), kernels="auto"):
    tiny.model(**inputs)
    print(vr.report(tiny.model))
    tiny.model.generate(**inputs, max_new_tokens=2, do_sample=False)
try:
    vr.apply(tiny.model, STS(keep=3), kernels="triton")
except RuntimeError as error:
    print("RuntimeError:", error)
vr.apply(tiny.model, STS(keep=3))
assert not [name for name in sys.modules if name.startswith("triton.")]
"""


@pytest.mark.slow
def test_rewrites_and_generates_without_triton() -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "triton is not installed" in done.stdout.splitlines()[-1]
    assert done.stdout.splitlines()[-1].startswith("RuntimeError:")
    assert "reference" in done.stdout
