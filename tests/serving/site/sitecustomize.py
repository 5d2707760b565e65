"""What the environment has to be told where there is no GPU.

torchvision stands beside a torch that it was not built for: its own operators do not load, and are not needed here. It
asks for their schemas when it is imported. What in transformers makes videos smaller is plain Python. Python imports
this file when it starts, in each process that has the folder on its path: vLLM looks at models in processes of its own.
"""

import os
import sys
from importlib.abc import MetaPathFinder
from types import SimpleNamespace
from typing import Any


class Schemas(MetaPathFinder):
    """Names the operators that torchvision looks for before it is imported; nothing computes them."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        kept.append(library)


class Interpreter(MetaPathFinder):
    """vLLM looks for Triton's backend for CPUs, which is not published; kernels that are interpreted need none."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname != "vllm":
            return
        sys.meta_path.remove(self)
        from triton.backends import backends

        backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)


kept: list[Any] = []
sys.meta_path.insert(0, Schemas())
if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    sys.meta_path.insert(0, Interpreter())
