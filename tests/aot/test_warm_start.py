"""A second process finds what the first one compiled; what is damaged is compiled again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

PROGRAM = """
import json
import torch
import vlmrewrite as vr
from torch._dynamo.utils import counters
from vlmrewrite.passes import Stride
from vlmrewrite.testing.models import FAMILIES, Row

tiny = FAMILIES["llava"](layers=1)
vr.apply(tiny.model, [Stride(0.5)], backend="inductor")
with torch.no_grad():
    logits = tiny.model(**tiny.inputs([Row(1, 2, 3)])).logits
found, said = counters["inductor"], counters["aot_autograd"]
print(json.dumps([found["fxgraph_cache_hit"] + said["autograd_cache_hit"], logits.flatten().tolist()]))
"""


def run(folder):
    env = os.environ | {"VLMREWRITE_CACHE": str(folder)}
    env.pop("TORCHINDUCTOR_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor needs a C++ compiler")
def test_a_second_process_compiles_nothing(tmp_path):
    hits, expected = run(tmp_path)
    assert hits == 0
    assert run(tmp_path) == [2, expected]
    entries = [x for kind in ("fxgraph", "aotautograd") for x in tmp_path.rglob(f"{kind}/**/*") if x.is_file()]
    assert entries
    for i, path in enumerate(entries):
        path.write_bytes(path.read_bytes()[: 99 * (i % 2)])  # empty, or cut off
    assert run(tmp_path) == [0, expected]
