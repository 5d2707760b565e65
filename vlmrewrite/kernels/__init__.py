"""Triton kernels: one family a file, the launcher beside its kernel.

Nothing here is imported by `import vlmrewrite`, which must work where triton is not installed.
"""
