"""Triton kernels: one family a file, the launcher beside its kernel.

In: what the operator of :mod:`vlmrewrite.ops` takes, on a GPU. Out: what its reference returns. ``import vlmrewrite``
works where triton is not installed: nothing here is imported before a kernel first runs.
"""

from vlmrewrite import moved

moved.register(__name__)
