"""Private interfaces of torch, transformers and Triton that are used, each behind one function with a test of its own.

They may change with any release. Where one is missing, the error names it and the version that is installed; what the
functions do is checked in ``tests/*/test_compat*.py``, which `make oldest` runs with the oldest versions too.
"""

from vlmrewrite.compat.dynamo import (
    at_graph_limit,
    captured,
    forget_code,
    graph_limit,
    graphs_allowed,
    inductor,
    inside_torch_compile,
    tracing_options,
    untraceable,
)
from vlmrewrite.compat.failures import untraced
from vlmrewrite.compat.modules import (
    attention_implementation,
    experts_implementation,
    generation_inputs,
    generation_positions,
    global_hooks,
    gpu_architecture,
    gpu_sleep,
    grouped_mm,
    hooks_of,
    initialise,
    is_compiled,
    memory_is_shared,
    memory_of,
    set_attention_implementation,
    set_experts_implementation,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)
from vlmrewrite.compat.operators import (
    assert_scalar,
    dispatch_mode,
    fake_mode,
    nn_functions,
    schema_of,
    taking,
    unknowable,
)
from vlmrewrite.compat.private import TESTED, VersionError

__all__ = [
    "TESTED",
    "VersionError",
    "assert_scalar",
    "at_graph_limit",
    "attention_implementation",
    "captured",
    "dispatch_mode",
    "experts_implementation",
    "fake_mode",
    "forget_code",
    "generation_inputs",
    "generation_positions",
    "global_hooks",
    "gpu_architecture",
    "gpu_sleep",
    "graph_limit",
    "graphs_allowed",
    "grouped_mm",
    "hooks_of",
    "inductor",
    "initialise",
    "inside_torch_compile",
    "is_compiled",
    "memory_is_shared",
    "memory_of",
    "nn_functions",
    "schema_of",
    "set_attention_implementation",
    "set_experts_implementation",
    "taking",
    "tracing_options",
    "tree_flatten",
    "tree_leaves",
    "tree_unflatten",
    "unknowable",
    "untraceable",
    "untraced",
]
