"""Triton kernels without a GPU: the interpreter made trustworthy, and compilation ahead of time."""
