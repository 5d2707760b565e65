"""torchvision beside a torch that it was not built for: its own operators do not load, and are not needed here.

It asks for their schemas when it is imported. What in transformers makes videos smaller is plain Python. Python imports
this file when it starts, in each process that has the folder on its path: vLLM looks at models in processes of its own.
"""

import sys
from importlib.abc import MetaPathFinder
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


kept: list[Any] = []
sys.meta_path.insert(0, Schemas())
