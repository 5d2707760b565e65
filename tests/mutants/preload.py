"""Imported once, in a process that each run of pytest is a fork of: what takes seconds and holds no fault."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a fork cannot use a GPU that was touched before it

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read as triton is imported, which transformers does

import networkx
import pytest
import torch._dynamo
import transformers.generation
import transformers.modeling_utils

__all__ = ["networkx", "pytest", "torch", "transformers"]

assert "vlmrewrite" not in sys.modules, "the forks are to import copies of it"
