"""Measuring, side by side in one run: models without and with recipes, kernels and their alternatives."""

from vlmrewrite import moved
from vlmrewrite.bench.kernels import bench_kernels
from vlmrewrite.bench.models import bench

__all__ = ["bench", "bench_kernels"]

moved.register(__name__)
