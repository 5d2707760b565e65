"""DAPE's Triton kernels; imported when one first runs."""
