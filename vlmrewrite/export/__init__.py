"""A model under a recipe as programs of ``torch.export``, that run without this package's Python.

In: a model, example inputs, a recipe. Out: an :class:`Exported`.
"""

from vlmrewrite.export.exported import Exported, load_export
from vlmrewrite.export.exporting import export

__all__ = ["Exported", "export", "load_export"]
