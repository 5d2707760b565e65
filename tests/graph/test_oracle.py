"""The oracle itself: what its masks mean, and how exact it is in float64."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from tests.small import family as shared
from vlmrewrite.oracle import hooks
from vlmrewrite.oracle.hooks import masked, mlp_of, oracle_logits
from vlmrewrite.oracle.masks import LayerMasks
from vlmrewrite.testing.agreement import SLACK, InFloat64
from vlmrewrite.testing.models import FAMILIES, Row

BATCH = [Row(1, 12, 8), Row(2, 0, 3), Row(0, 7, 2)]
family = functools.partial(shared, layers=3)
EPS = torch.finfo(torch.float32).eps


@functools.cache
def double(name):
    return copy.deepcopy(family(name).model).double()


def full(inputs, depth=3):
    every = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    return [LayerMasks(every, every) for _ in range(depth)]


def doubled(inputs):
    return inputs | {"pixel_values": inputs["pixel_values"].double()}


# ---- float64


class Narrowed(TorchDispatchMode):
    """Notes the operations that take float64 and give a narrower float."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        wide = any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in args)
        if wide and isinstance(out, torch.Tensor) and out.is_floating_point() and out.dtype != torch.float64:
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_rounded_to_fp32_in_float64(name):
    inputs = doubled(family(name).inputs(BATCH))
    with Narrowed() as plain:
        oracle_logits(double(name), inputs, full(inputs))
    assert plain.found
    with InFloat64(), Narrowed() as precise:
        assert oracle_logits(double(name), inputs, full(inputs)).dtype == torch.float64
    assert not precise.found


@pytest.mark.parametrize("name", FAMILIES)
def test_fp32_is_some_fp32_epsilons_off(name):
    inputs = family(name).inputs(BATCH)
    real = inputs["attention_mask"].bool()
    single = oracle_logits(family(name).model, inputs, full(inputs))[real]
    rounded = oracle_logits(double(name), doubled(inputs), full(inputs))[real]
    with InFloat64():
        exact = oracle_logits(double(name), doubled(inputs), full(inputs))[real]
    epsilon = EPS * float(exact.abs().max())
    assert 2 < float((single - exact).abs().max()) / epsilon < 100
    assert float((rounded - exact).abs().max()) / epsilon > 0.5


def test_norms_compute_in_float64():
    inputs, found = doubled(family("llava").inputs(BATCH)), []
    norm = double("llava").get_decoder().layers[1].input_layernorm
    handle = norm.register_forward_hook(lambda _, args, out: found.append((args[0], out)))
    with InFloat64():
        oracle_logits(double("llava"), inputs, full(inputs))
    oracle_logits(double("llava"), inputs, full(inputs))
    handle.remove()

    def error(x, out):
        expected = norm.weight.detach() * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        return float((out - expected).abs().max() / expected.abs().max())

    assert error(*found[0]) < 1e-15
    assert error(*found[1]) > 1e-9


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.float(),
        lambda x: x.to(torch.float32),
        lambda x: x.to(device="cpu", dtype=torch.float),
        lambda x: x.type(torch.float32),
        lambda x: x.softmax(-1, dtype=torch.float32),
        lambda x: F.softmax(x, dim=-1, dtype=torch.float32),
        lambda x: torch.sum(x, 0, dtype=torch.float32),
        lambda x: torch.zeros_like(x, dtype=torch.float32),
        lambda x: torch.arange(3, dtype=torch.float32),
    ],
)
def test_casts(cast):
    x = torch.ones(2, 3, dtype=torch.float64)
    assert cast(x).dtype == torch.float32
    with InFloat64():
        assert cast(x).dtype == cast(torch.ones(2, 3, dtype=torch.int64).double()).dtype == torch.float64
        assert x.to(torch.float16).dtype == torch.float16
    assert cast(x).dtype == torch.float32


@pytest.mark.parametrize("name", FAMILIES)
def test_one_key_too_few_is_seen(name):
    """The tolerance would not hide a single vision token that one layer should have seen, or should not have."""
    inputs = family(name).inputs([Row(1, 2, 2)])
    model, layers = family(name).model, full(inputs)
    with InFloat64():
        exact = oracle_logits(double(name), doubled(inputs), layers)
    tolerance = SLACK * float((oracle_logits(model, inputs, layers) - exact).abs().max())
    vision = (inputs["input_ids"][0] == family(name).image_token_id).nonzero()[:, 0].tolist()
    for layer in range(3):
        keys = layers[layer].keys.clone()
        keys[0, vision[len(vision) // 2]] = False
        wrong = [LayerMasks(m.run, keys) if i == layer else m for i, m in enumerate(layers)]
        assert float((oracle_logits(model, inputs, wrong) - exact).abs().max()) > 20 * tolerance


# ---- attention


class Attention(nn.Module):
    layer_idx, head_dim, num_key_value_groups, training = 0, 8, 2, False

    def forward(self, hidden_states, attention_mask):
        """Never called."""


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 5, 8, generator=generator) for h in (4, 2, 2))
    keys = {0: torch.tensor([[True] * 5, [True, False, True, True, False]])}
    token = hooks._STATE.set(hooks._State(keys))
    yield q, k, v, torch.ones(5, 5, dtype=torch.bool).tril()[None, None].expand(2, -1, -1, -1)
    hooks._STATE.reset(token)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_attention_is_transformers_own(qkv, softcap, scaling):
    q, k, v, mask = qkv
    seen = mask & hooks._STATE.get().keys[0][:, None, None, :]
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected, _ = eager_attention_forward(Attention(), q, k, v, bias, scaling=scaling, softcap=softcap)
    got, _ = hooks._attention(Attention(), q, k, v, mask, scaling=scaling, softcap=softcap, sliding_window=3)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "asked", [{"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}, {"dropout": 0.1}, {"output_attentions": 1}]
)
def test_what_attention_does_not_take_is_refused(qkv, asked):
    with pytest.raises(NotImplementedError, match=rf"does not take {next(iter(asked))}, Attention passes it"):
        hooks._attention(Attention(), *qkv, **asked)


def test_a_mask_of_another_kind_is_refused(qkv):
    q, k, v, mask = qkv
    for other, found in ((None, "None"), (mask.long(), "torch.int64")):
        with pytest.raises(NotImplementedError, match=f"expects a mask, bool or to be added, Attention passes {found}"):
            hooks._attention(Attention(), q, k, v, other)


# ---- masks


def some(inputs, seed):
    return torch.rand(inputs["input_ids"].shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize(("name", "before_mlp"), [("llava", "post_attention_layernorm"),
                                                  ("qwen2_5_vl", "post_attention_layernorm"),
                                                  ("gemma3", "pre_feedforward_layernorm")])  # fmt: skip
def test_without_its_mlp_a_token_keeps_the_stream_after_attention(name, before_mlp):
    inputs = family(name).inputs(BATCH)
    layer, only, seen = family(name).model.get_decoder().layers[1], some(inputs, 0), {}
    handles = [
        getattr(layer, before_mlp).register_forward_hook(lambda _, args, __: seen.update(half=args[0])),
        layer.register_forward_hook(lambda _, __, out: seen.update(out=out[0] if isinstance(out, tuple) else out)),
    ]
    entry = full(inputs)[0]
    oracle_logits(family(name).model, inputs, full(inputs))
    whole = seen["out"]
    oracle_logits(family(name).model, inputs, [entry, LayerMasks(entry.run, entry.keys, mlp=only), entry])
    for handle in handles:
        handle.remove()
    assert torch.equal(seen["out"], torch.where(only[..., None], whole, seen["half"]))
    assert not torch.equal(whole[~only], seen["half"][~only])


@pytest.mark.parametrize("name", ["llava", "smolvlm", "internvl"])
def test_no_mlp_at_all_is_a_model_whose_mlp_gives_zeros(name):
    inputs = family(name).inputs(BATCH)
    without = copy.deepcopy(family(name).model)
    mlp_of(without.get_decoder().layers[2]).down_proj.weight.data.zero_()
    a, b, c = full(inputs)
    got = oracle_logits(family(name).model, inputs, [a, b, LayerMasks(c.run, c.keys, mlp=torch.zeros_like(c.run))])
    assert torch.equal(got, oracle_logits(without, inputs, full(inputs)))


def test_entry_changes_the_stream_for_tokens_that_bypass_too():
    model, inputs, seen = family("llava").model, family("llava").inputs(BATCH), []
    run, entry = some(inputs, 1), full(inputs)[0]
    handles = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0] if args else kwargs["x"]),
                                        with_kwargs=True)
        for layer in model.get_decoder().layers[1:]
    ]  # fmt: skip
    oracle_logits(model, inputs, [entry, LayerMasks(run, entry.keys, entry=lambda x: 2 * x + 1), entry])
    for handle in handles:
        handle.remove()
    plain, after = seen
    assert torch.equal(after[~run], (2 * plain + 1)[~run])
    assert not torch.equal(after[run], (2 * plain + 1)[run])


def test_entry_of_the_first_layer_is_an_edit_of_the_embeddings():
    model, inputs = family("llava").model, family("llava").inputs([Row(0, 4, 3), Row(0, 1, 2)])
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    edited = {"inputs_embeds": embeds.sin(), "attention_mask": inputs["attention_mask"]}
    a, b, c = full(inputs)
    expected = oracle_logits(model, edited, [a, b, c])
    assert torch.equal(oracle_logits(model, inputs, [LayerMasks(a.run, a.keys, entry=torch.sin), b, c]), expected)


def test_an_mlp_must_be_one_child():
    class Layer(nn.Module):
        def __init__(self, **children):
            super().__init__()
            self.attention = Attention()
            self.attention.proj = nn.Linear(2, 2)
            self.norm = nn.LayerNorm(2)
            for name, child in children.items():
                setattr(self, name, child)

    layer = Layer(act=nn.SiLU(), ff=nn.Linear(2, 2))
    assert mlp_of(layer) is layer.ff
    layer.ff.layer_idx = 3  # that of HunYuan-VL knows its layer
    assert mlp_of(layer) is layer.ff
    with pytest.raises(ValueError, match=r"one child of Layer to be its MLP, found \['fc1', 'fc2'\]"):
        mlp_of(Layer(fc1=nn.Linear(2, 2), fc2=nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="found none"):
        mlp_of(Layer())


def test_a_model_is_left_as_it_was():
    model, inputs = family("llava").model, family("llava").inputs(BATCH)
    expected, name = model(**inputs).logits, model.config.text_config._attn_implementation
    a, b, c = full(inputs)
    with pytest.raises(ValueError, match="2 layer masks for 3 decoder layers"), masked(model, [a, b]):
        pass
    with pytest.raises(ZeroDivisionError), masked(model, [LayerMasks(a.run, a.keys, a.run, lambda x: x / 0), b, c]):
        raise ZeroDivisionError
    assert model.config.text_config._attn_implementation == name
    assert torch.equal(model(**inputs).logits, expected)
