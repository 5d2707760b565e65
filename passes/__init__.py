"""The passes that come with vlmrewrite, one technique a file.

Each is a frozen dataclass whose fields are its options and whose class attribute `name` is its key in a recipe.
"""

if __name__ != "vlmrewrite.passes":
    raise ImportError(f"expected this package to be imported as 'vlmrewrite.passes', got {__name__!r}")

from vlmrewrite import moved
from vlmrewrite.passes.dape import DAPE
from vlmrewrite.passes.divprune import DivPrune
from vlmrewrite.passes.downsample import Downsample
from vlmrewrite.passes.dpvr import DPVR
from vlmrewrite.passes.fastv import FastV
from vlmrewrite.passes.framestride import FrameStride
from vlmrewrite.passes.random import Random
from vlmrewrite.passes.shortv import ShortV
from vlmrewrite.passes.stride import Stride
from vlmrewrite.passes.sts import STS
from vlmrewrite.passes.vica import ViCA
from vlmrewrite.passes.vidcom2 import VidCom2
from vlmrewrite.passes.visor import VISOR
from vlmrewrite.passes.vtw import VTW

__all__ = [
    "DAPE",
    "DPVR",
    "STS",
    "VISOR",
    "VTW",
    "DivPrune",
    "Downsample",
    "FastV",
    "FrameStride",
    "Random",
    "ShortV",
    "Stride",
    "ViCA",
    "VidCom2",
]

moved.register(__name__)
