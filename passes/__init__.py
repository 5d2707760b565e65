"""The passes that come with vlmrewrite, one technique a file.

Each is a frozen dataclass whose fields are its options and whose class attribute `name` is its key in a recipe.
"""

if __name__ != "vlmrewrite.passes":
    raise ImportError(f"expected this package to be imported as 'vlmrewrite.passes', got {__name__!r}")

from vlmrewrite.passes.random import Random
from vlmrewrite.passes.stride import Stride
from vlmrewrite.passes.sts import STS

__all__ = ["STS", "Random", "Stride"]
