"""Kernels against their references and the best library alternatives, side by side."""

from vlmrewrite import moved
from vlmrewrite.bench.kernels.harness import bench_kernels

__all__ = ["bench_kernels"]

moved.register(__name__)
