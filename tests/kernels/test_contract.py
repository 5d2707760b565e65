"""Operators with kernels: counted in FLOPs, compiled as one graph, exported."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.grids import Batch
from vlmrewrite import passes as passes
from vlmrewrite.ops.library import KERNELS, REFERENCES
from vlmrewrite.ops.positional import attention_blocks
from vlmrewrite.passes.dape.regions import coarsest


def _calls(device):
    torch.manual_seed(0)
    at = torch.arange(6, device=device)[None]
    q, k, v = (torch.randn(1, h, 6, 16, device=device) for h in (4, 2, 2))
    index = torch.tensor([[0, 2, 5]], device=device)
    valid = torch.ones_like(index, dtype=torch.bool)
    member = torch.tensor([1, 1, 1, 1, 1, 1], dtype=torch.bool, device=device)
    lengths, keep = torch.tensor([3, 3]), torch.tensor([1, 2])
    some = at.to(torch.int32)
    grid, sizes = torch.tensor([[4, 5], [3, 3]]), torch.tensor([20, 9])
    cover = torch.zeros(29, dtype=torch.bool)
    cover[[4, 12, 14, 24, 0, 28]] = True
    dape = Batch((grid, sizes, cover | coarsest(sizes, grid, [20, 9])), device)
    return {
        "gather": ([torch.randn(1, 6, 8, device=device), at], [1, 1], index),
        "restore": (torch.randn(1, 6, 8, device=device), torch.randn(1, 3, 8, device=device), index, valid),
        "positional_attention": (q, k, v, *attention_blocks(None, at, at)),
        "decode_attention": (q[:, :, -1:], k, v, some[:, -1:], some),
        "attention_received": (
            q[:, :, -1:], k, None, at[:, -1:], at, None, None, at, torch.ones_like(at, dtype=torch.bool), at[0], 6
        ),
        "top_attention": (torch.rand(6, device=device), member, lengths, keep),
        "sts_sample": (torch.randn(6, 8, device=device), member, lengths, keep),
        "divprune_sample": (torch.randn(6, 8, device=device), member, lengths, keep),
        "region_owner": (dape.member, sizes, grid),
        "dape_cover": dape.cover([9, 3], *dape.matching),
        "dape_pool": dape.pool(),
        "dape_split": (dape.attention, dape.features, grid, ~dape.member, sizes, torch.tensor([2, 1])),
        "dape_inject": dape.inject(0.5),
    }  # fmt: skip


NO_ARITHMETIC = ("gather", "restore", "top_attention", "region_owner")
CALLS = sorted(_calls("cpu"))


def _close(got, wanted):
    for x, y in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(wanted), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # Inductor's
@pytest.mark.parametrize("name", CALLS)
def test_compiled_and_exported_it_is_the_kernel_still(device, name):
    torch._dynamo.reset()  # one code object calls all operators
    args = _calls(device)[name]
    op = getattr(torch.ops.vlm_triton, name)
    wanted = REFERENCES[getattr(torch.ops.vlm, name).default](*args)
    _close(op(*args), wanted)
    _close(torch.compile(op, fullgraph=True)(*args), wanted)

    class Module(torch.nn.Module):
        def forward(self, *given):
            return op(*given)

    exported = torch.export.export(Module(), args)
    assert op.default in {n.target for n in exported.graph.nodes}
    _close(exported.module()(*args), wanted)


@pytest.mark.parametrize("name", CALLS)
def test_flops_are_known_of_both_operators(device, name):
    args, counts = _calls(device)[name], []
    for namespace in (torch.ops.vlm_triton, torch.ops.vlm):
        with FlopCounterMode(display=False) as counter:
            getattr(namespace, name)(*args)
        counts.append(counter.get_total_flops())
    seen_through = ("positional_attention", "attention_received", "gather", "restore", "dape_pool")
    assert counts[0] == counts[1] or name in seen_through
    assert counts[0] > 0 or name in NO_ARITHMETIC


def test_every_kernel_is_here_and_has_the_schema_of_its_operator():
    ours = {op: kernel for op, kernel in KERNELS.items() if REFERENCES[op].__module__.startswith("vlmrewrite.")}
    assert sorted(op._schema.name.removeprefix("vlm::") for op in ours) == CALLS
    for op, kernel in ours.items():
        assert str(op._schema).replace("vlm::", "vlm_triton::") == str(kernel._schema)


@pytest.mark.parametrize("channels", [64, 65])
def test_learned_matching_is_more_work_at_any_width(device, channels):
    grid, lengths = torch.tensor([[4, 5]]), torch.tensor([20])
    batch = Batch((grid, lengths, coarsest(lengths, grid, [20])), device, channels=channels)
    counts = []
    for weights in ((), batch.matching):
        with FlopCounterMode(display=False) as counter:
            torch.ops.vlm.dape_cover(*batch.cover([9]), *weights)
        counts.append(counter.get_total_flops())
    assert counts[1] > counts[0] > 0
