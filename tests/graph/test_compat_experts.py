"""Private interfaces of mixtures of experts."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaConfig, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from vlmrewrite import compat


def test_experts_implementation_is_that_of_one_config() -> None:
    config = LlavaConfig()
    config.text_config._experts_implementation_internal = "eager"
    compat.set_experts_implementation(config, "vlmrewrite-eager")
    assert compat.experts_implementation(config) == "vlmrewrite-eager"
    assert compat.experts_implementation(config.text_config) == "eager"


def test_gates_of_experts() -> None:
    config = Qwen3MoeConfig(hidden_size=8, moe_intermediate_size=4, num_experts=2)
    experts, x = Qwen3MoeExperts(config), torch.randn(3, 2, 8)
    assert not compat.experts_apart(experts)
    assert torch.equal(compat.apply_gate(experts, x), torch.nn.functional.silu(x[..., :4]) * x[..., 4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [8, 3])
def test_products_of_groups(dtype: torch.dtype, width: int) -> None:
    x, weight = torch.randn(5, 8).to(dtype).requires_grad_(), torch.randn(3, 8, width).to(dtype)
    out = compat.grouped_mm(x, weight, torch.tensor([2, 2, 5], dtype=torch.int32))
    expected = torch.cat([x[:2] @ weight[0], x[2:] @ weight[2]])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad((out * out).sum(), x),
        torch.autograd.grad((expected * expected).sum(), x),
        rtol=2e-2,
        atol=2e-2,
    )
