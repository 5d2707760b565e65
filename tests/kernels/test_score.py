"""Attention received by vision tokens, and the largest weights of each image, against their references."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmrewrite import ops
from vlmrewrite.kernels import score as kernels
from vlmrewrite.ops import scoring
from vlmrewrite.testing.triton.interpreter import guarded

OPS = torch.ops.vlm_triton
U32 = torch.finfo(torch.float32).eps / 2
NAMES = "q k mask q_pos k_pos scale softcap index valid flat length".split()


def make(b=1, heads=2, group=2, t=1, n=40, past=0, d=16, dtype=torch.float32, mask="none", seed=0, **options):
    """Arguments of attention_received: ``past`` cached tokens, and n of n + 7 more, some of them invalid."""
    g = torch.Generator().manual_seed(seed)
    length = n + 7
    index = torch.rand(b, length, generator=g).argsort(1)[:, :n].sort(1).values
    valid = torch.rand(b, n, generator=g) < 0.8
    visible = valid | (torch.rand(b, n, generator=g) < 0.3)  # a slot may be seen and yet not be asked about
    k_pos = torch.cat([torch.arange(past).expand(b, -1), torch.where(visible, index + past, -1)], 1)
    q_pos = torch.randint(past, past + length, (b, t), generator=g)
    q_pos[0, 1:2] = -1
    seen = torch.rand(b, 1, length, past + length, generator=g) < 0.7
    masks = {
        "none": None,
        "bits": seen[:, 0, 0],
        "one row of bits": seen[:1, 0, 0],
        "bool": seen,
        "added": torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min),
        "added bfloat16": torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, float("-inf")),
    }
    q = torch.randn(b, t, heads * group, d, generator=g).transpose(1, 2).to(dtype)
    k = torch.randn(b, past + n + 3, heads, d, generator=g).transpose(1, 2)[:, :, : past + n].to(dtype)
    flat = torch.randperm(b * length, generator=g)[: b * length // 2]
    scale, softcap = options.get("scale"), options.get("softcap")
    return dict(zip(NAMES, (q, k, masks[mask], q_pos, k_pos, scale, softcap, index, valid, flat, length), strict=True))


def there(args, device):
    """On a device, amid memory that may not be written."""
    checks = []
    for name, x in args.items():
        if isinstance(x, torch.Tensor):
            view, check = guarded(x.to(device))
            args = {**args, name: view}
            checks.append(check)
    return args, checks


def expected_of(q, k, mask, q_pos, k_pos, scale, softcap, index, valid, flat, length):
    """In fp64, and what fp32 rounding of the scores and sums may change of a weight, relative, at worst."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    largest = float(q.abs().max() * k.abs().max()) * q.shape[-1] * scale
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = ops.visible(mask, q_pos, k_pos, False)
    scores = scores.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else scores + seen.double()
    weights = scores.softmax(-1).masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0.0).mean(1)
    full = torch.zeros(index.shape[0], length, dtype=torch.float64)
    for b in range(index.shape[0]):
        asked = weights[b, q_pos[b] >= 0]
        mean = asked.mean(0) if len(asked) else torch.zeros(k.shape[2])
        full[b, index[b, valid[b]]] = mean[k.shape[2] - index.shape[1] :].double()[valid[b]]
    scores_off = (q.shape[-1] + 8) * U32 * largest + 8 * U32 * ((softcap or 0.0) + largest)
    return full.flatten()[flat], 2 * scores_off + (k.shape[2] + q.shape[1] * q.shape[2] + 16) * U32


def close(got, args):
    expected, relative = expected_of(**args)
    assert got.dtype == torch.float32 and got.shape == expected.shape and got.is_contiguous()
    assert ((got.cpu().double() - expected).abs() <= expected * relative + 1e-37).all()


@st.composite
def calls(draw):
    sizes = {
        "b": draw(st.integers(1, 2)), "heads": draw(st.integers(1, 2)), "group": draw(st.integers(1, 7)),
        "t": draw(st.sampled_from([1, 1, 2, 5, 20])), "n": draw(st.sampled_from([1, 16, 33, 130])),
        "past": draw(st.sampled_from([0, 3, 140])), "d": draw(st.sampled_from([8, 64, 80, 96, 128, 256])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "mask": draw(st.sampled_from(["none", "bits", "one row of bits", "bool", "added", "added bfloat16"])),
        "scale": draw(st.sampled_from([None, 0.2])), "softcap": draw(st.sampled_from([None, 5.0])),
    }  # fmt: skip
    return make(**sizes, seed=draw(st.integers(0, 99)))


@given(calls())
def test_attention_received(device, args):
    close(scoring.attention_received(**args), args)
    views, checks = there(args, device)
    close(kernels.attention_received(**views), args)
    for check in checks:
        check()


def test_nothing_is_written_beside_the_outputs(monkeypatch, device):
    checks = []

    def guard(*shape, dtype, device):
        view, check = guarded(torch.zeros(*shape, dtype=dtype, device=device))
        checks.append(check)
        return view

    args, _ = there(make(b=2, n=300, t=2, past=9), device)
    weights, keep = torch.ones(300, device=device), torch.tensor([3, 250])
    names = {name: getattr(torch, name) for name in ("float32", "float64", "bool", "stack", "finfo")}
    monkeypatch.setattr(kernels, "torch", SimpleNamespace(**names, empty=guard, zeros=guard))
    kernels.attention_received(**args)
    kernels.top_attention(weights, weights > 0, torch.tensor([7, 293]), keep)
    assert len(checks) == 3
    for check in checks:
        check()


def test_many_splits_are_one(monkeypatch, device):
    n = 400
    args = make(n=n, past=100, mask="bits", heads=1)
    views, _ = there(args, device)
    for length in (128, 896):
        monkeypatch.setattr(kernels, "splits", lambda *_, length=length: (-(-(n + 100) // length), length))
        close(kernels.attention_received(**views), args)
    monkeypatch.setattr(kernels, "processors", lambda _: 1)  # larger blocks of keys
    close(kernels.attention_received(**views), args)


def test_several_queries_are_the_mean_of_each(device):
    args, _ = there(make(b=2, t=3, mask="bool", past=4), device)
    args["q_pos"] = args["q_pos"].abs()
    each = [
        kernels.attention_received(**{**args, "q": args["q"][:, :, i : i + 1], "q_pos": args["q_pos"][:, i : i + 1]})
        for i in range(3)
    ]
    torch.testing.assert_close(kernels.attention_received(**args), torch.stack(each).mean(0), atol=1e-7, rtol=1e-5)
    args["q_pos"][:, 1:] = -1
    torch.testing.assert_close(kernels.attention_received(**args), each[0], atol=1e-7, rtol=1e-5)


def test_the_reference_for_one_query_is_the_definition(device):
    args = make(b=2, past=5, mask="bits")
    q, k, valid = args["q"], args["k"].repeat_interleave(2, 1), args["valid"]
    seen = ops.visible(args["mask"], args["q_pos"], args["k_pos"], False)
    bias = torch.zeros(2, 1, 1, k.shape[2]).masked_fill(~seen, float("-inf"))
    weights = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1).mean(1)[:, 0, 5:]
    full = torch.zeros(2, args["length"]).scatter(1, args["index"], weights.masked_fill(~valid, 0.0))
    expected = full.flatten()[args["flat"]]
    torch.testing.assert_close(scoring.attention_received(**args), expected, atol=1e-7, rtol=1e-5)


def test_heads_have_no_order_and_a_batch_is_its_rows(device):
    args, _ = there(make(b=2, heads=3, group=2, past=4, mask="bits"), device)
    args["flat"] = torch.arange(2 * args["length"], device=device)
    both = kernels.attention_received(**args)
    order = torch.tensor([2, 0, 1], device=device)
    q = args["q"].view(2, 3, 2, *args["q"].shape[2:])[:, order].flatten(1, 2)
    mixed = kernels.attention_received(**{**args, "q": q, "k": args["k"][:, order]})
    torch.testing.assert_close(mixed, both, atol=1e-7, rtol=1e-5)
    for i in range(2):
        one = {k: x[i : i + 1] if isinstance(x, torch.Tensor) and x.dim() > 1 else x for k, x in args.items()}
        got = kernels.attention_received(**{**one, "flat": args["flat"][: args["length"]]})
        torch.testing.assert_close(got, both.view(2, -1)[i], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("change", ["nothing visible", "nothing visible, bool", "nobody asked", "no tokens"])
def test_empty(device, change):
    args = make(b=2, past=3, mask="bool" if change.endswith("bool") else "bits")
    if change.startswith("nothing"):
        args["mask"] = torch.zeros_like(args["mask"])
    elif change == "nobody asked":
        args["q_pos"] = torch.full_like(args["q_pos"], -1)
    else:
        args["index"], args["valid"] = args["index"][:, :0], args["valid"][:, :0]
    views, _ = there(args, device)
    got = kernels.attention_received(**views)
    assert got.shape == args["flat"].shape and not got.any()
    assert not scoring.attention_received(**args).any()


SPECIAL = torch.tensor([0.0, -0.0, 0.5, 1.0, float("nan"), float("inf"), float("-inf"), 1e-40, -1e-40, -2.0])


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40)), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([1, 3]),
    st.integers(0, 999),
)
def test_top_attention(device, images, dtype, ordinary, step, seed):
    lengths, keep = (torch.tensor(x) for x in zip(*images, strict=True))
    total, g = int(lengths.sum()), torch.Generator().manual_seed(seed)
    special = SPECIAL[torch.randint(0, len(SPECIAL), (total,), generator=g)]
    numbers = torch.randn(total, generator=g)
    weights = torch.where(torch.rand(total, generator=g) < ordinary, numbers, special).to(dtype)
    member = torch.rand(total, generator=g) < 0.8
    spread = weights.repeat_interleave(step)[::step], member.repeat_interleave(step)[::step]
    views, checks = zip(*(guarded(x.to(device)) for x in spread), strict=True)
    got = kernels.top_attention(*views, lengths, keep)
    assert got.dtype == torch.bool and got.is_contiguous()
    assert torch.equal(got.cpu(), scoring.top_attention(weights, member, lengths, keep))
    for check in checks:
        check()


@pytest.mark.parametrize("distinct", [1, 40, 100000])
def test_top_attention_of_large_images(device, distinct):
    g = torch.Generator().manual_seed(distinct)
    lengths, keep = torch.tensor([9000, 1, 4096]), torch.tensor([700, 1, 5000])
    weights = torch.randint(-distinct, distinct, (13097,), generator=g) / 7
    member = torch.rand(13097, generator=g) < 0.9
    expected = scoring.top_attention(weights, member, lengths, keep)
    assert torch.equal(kernels.top_attention(weights.to(device), member.to(device), lengths, keep).cpu(), expected)
    assert torch.equal(expected[9001:], member[9001:])  # what there is to choose is fewer than may be kept


def test_a_batch_of_images_is_each_image(device):
    g = torch.Generator().manual_seed(0)
    lengths, keep = torch.tensor([30, 0, 500]), torch.tensor([7, 0, 99])
    weights, member = torch.rand(530, generator=g).to(device), torch.ones(530, dtype=torch.bool, device=device)
    together = kernels.top_attention(weights, member, lengths, keep).split(lengths.tolist())
    for i, (w, m) in enumerate(zip(weights.split(lengths.tolist()), member.split(lengths.tolist()), strict=True)):
        assert torch.equal(kernels.top_attention(w, m, lengths[i : i + 1], keep[i : i + 1]), together[i])
    doubled = kernels.top_attention(weights * 2**20, member, lengths, keep)
    assert torch.equal(doubled, torch.cat(together))


def test_top_attention_of_nothing_and_of_fp64(device):
    nothing = torch.zeros(0, device=device)
    assert kernels.top_attention(nothing, nothing > 0, torch.tensor([0, 0]), torch.tensor([3, 0])).shape == (0,)
    with pytest.raises(TypeError, match=r"fp16, bf16 and fp32; got weights in torch\.float64"):
        kernels.top_attention(nothing.double(), nothing > 0, torch.tensor([0]), torch.tensor([0]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["attention_received", "top_attention"])
def test_operators(device, name):
    if name == "attention_received":
        args = tuple(there(make(b=2, past=3, mask="bits"), device)[0].values())
    else:
        weights = torch.rand(9, device=device)
        args = (weights, weights > 0.3, torch.tensor([5, 0, 4]), torch.tensor([2, 0, 4]))
    torch.library.opcheck(getattr(OPS, name).default, args)
