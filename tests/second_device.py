"""A second device where there is none, ``far:0``, in memory of the CPU; run as a script, a model on both of them.

    python -m tests.second_device llava

An operation that is given tensors of both devices fails, as on real ones. PyTorch knows such a device for the whole
process: hence the script.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import vlmrewrite as vr
from vlmrewrite import hf
from vlmrewrite.passes import DAPE, DPVR, STS, VISOR, FastV, ShortV, Stride
from vlmrewrite.testing.models import ZOO, Row

NAME = "far"
ROWS = [Row(1, 3, 4), Row(2, 1, 2)]
MAKERS = ("empty.memory_format", "empty_strided", "_to_copy", "full", "zeros", "ones", "arange.start_step",
          "arange.start", "scalar_tensor")  # fmt: skip
COPY, COPY_, INDEX = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten.index.Tensor


class Far(Tensor):
    """A tensor on the second device; ``inner`` holds its numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Far:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, device=f"{NAME}:0", **layout)
        made.inner = inner
        return made

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def near(x: Any) -> Any:
    if isinstance(x, torch.device) and x.type == NAME:
        return torch.device("cpu")
    return x.inner if isinstance(x, Far) else x


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation of some tensors gives, one of which is on the second device, or is to be."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = {id(x.inner): x for x in given if isinstance(x, Far)}
    others = [x for x in given if not isinstance(x, Far) and x.dim()]
    if here and others and func not in (COPY, COPY_) and not (func is INDEX and isinstance(args[0], Far)):
        raise RuntimeError(f"{func}: expected all tensors on one device, got {[tuple(x.shape) for x in others]} on cpu")
    asked = kwargs.get("device")
    far = torch.device(asked).type == NAME if asked is not None else bool(here)
    out = func(*tree_map(near, args), **tree_map(near, kwargs))
    if func is COPY and any(out is near(x) for x in given):
        out = out.clone()
    return tree_map(lambda x: here.get(id(x), Far(x) if far else x) if isinstance(x, Tensor) else x, out)


def there_is_one() -> torch.library.Library:
    """Tell PyTorch of it; the library has to be kept."""
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")
    for name in MAKERS:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        library.impl(name, lambda *args, _of=operator, **kwargs: run(_of, args, kwargs), "PrivateUse1")
    return library


def scatter(model: nn.Module, layers: list[int], tower: bool) -> None:
    """Some layers, and the vision tower if so wished, on the second device, all else on the CPU, by accelerate."""
    decoder = next(name for name, module in model.named_modules() if module is model.get_decoder().layers)
    places: dict[str, str] = {}
    for name, _ in model.named_modules():
        if f"{decoder}.".startswith(f"{name}.") or not name or any(name.startswith(f"{above}.") for above in places):
            continue
        seen = tower and any(part in name for part in ("vision", "visual"))
        mine = name.startswith(decoder) and int(name.removeprefix(f"{decoder}.")) in layers
        places[name] = f"{NAME}:0" if seen or mine else "cpu"
    accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)


def check(say: str, found: Tensor, expected: Tensor) -> None:
    assert found.device == expected.device, f"{say}: on {found.device}"
    away = (found.double() - expected.double()).abs().max().item()
    assert away <= 1e-9, f"{say}: {away} away"


def second_turn(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Logits of a second prompt with images behind a first one.

    Dynamo does not take such tensors. It is shown what is in them, and the graph is given them.
    """
    cache, swapped = model(**inputs, use_cache=True).past_key_values, dict[int, Tensor]()
    for layer in cache.layers:
        for part in ("keys", "values", "positions"):
            x = getattr(layer, part)
            swapped[id(near(x))] = x
            setattr(layer, part, near(x))
    inputs = inputs | {"attention_mask": torch.cat([inputs["attention_mask"]] * 2, 1), "past_key_values": cache}

    def given(function: Callable[[Any], Any]) -> Any:
        return lambda inputs: function([swapped.get(id(x), x) for x in inputs])

    with mock.patch.object(hf, "to_bring", given(hf.to_bring)), mock.patch.object(hf, "sites", given(hf.sites)):
        return model(**inputs).logits


def main(name: str) -> None:
    """Logits, tokens, caches, gradients and the oracle, with a model on one device and on two."""
    kept = there_is_one()
    tiny = ZOO[name](layers=4)
    model, greedy = tiny.model.double(), {"do_sample": False, "max_new_tokens": 3}
    recipes = [[STS(keep=3, refine=2, at=1)], [Stride(keep=0.5, at=2), ShortV([1, 3])]]
    calls: list[Callable[[Any], Tensor]] = [
        lambda inputs: model(**inputs).logits,
        lambda inputs: model.generate(**inputs, **greedy),
        lambda inputs: model.generate(**inputs, **greedy, num_beams=2),
    ]
    double = [{k: x.double() if x.is_floating_point() else x for k, x in tiny.inputs(r, side=side).items()}
              for r, side in ((ROWS, "left"), (ROWS[1:], "right"))]  # fmt: skip

    def all_of() -> list[Tensor]:
        with torch.no_grad():
            return [call(x) for x, some in zip(double, (calls, calls[:2]), strict=True) for call in some]

    def trained() -> list[Tensor]:
        model.zero_grad()
        model(**double[0]).logits.square().mean().backward()
        return [p.grad.detach().cpu() for p in model.get_decoder().layers[1].parameters()]

    plain, gradients = all_of(), list[list[Tensor]]()
    alone = []
    for passes in recipes:
        with vr.applied(model, passes):
            alone.append(all_of())
            gradients.append(trained())
    scatter(model, [1, 2], tower=name == "llava")
    for found, expected in zip(all_of(), plain, strict=True):
        check("unmodified", found, expected)
    for passes, before, by_one in zip(recipes, alone, gradients, strict=True):
        vr.apply(model, passes)
        for found, expected in zip(all_of(), before, strict=True):
            check(f"{passes}", found, expected)
        for found, expected in zip(trained(), by_one, strict=True):
            check(f"gradients, {passes}", found, expected)
        with torch.no_grad():
            layers = model(**double[0], use_cache=True).past_key_values.layers
            assert [x.keys.device.type for x in layers] == ["cpu", NAME, NAME, "cpu"]
            assert all(x.keys.device == x.positions.device for x in layers)
            assert layers[1].positions is layers[2].positions or layers[1].keys.shape != layers[2].keys.shape
        for beams in (1, 2):  # keys go to the CPU and come back, with their numbers
            how = greedy | {"num_beams": beams, "return_dict_in_generate": True, "cache_implementation": "offloaded"}
            out = model.generate(**double[0], **how)
            check(f"offloaded, {passes}", out.sequences, before[beams])
            stores = [x.store for x in out.past_key_values.layers]
            assert [x.device.type for x in stores] == ["cpu", NAME, NAME, "cpu"]
            assert {y.device.type for x in stores for y in (x.keys, x.values)} == {"cpu"}
        vr.restore(model)
    with torch.no_grad():
        for passes in [
            [FastV(keep=0.5, at=2)],
            [VISOR([0], [2])],
            [DPVR(at=2, fuse=1, branch="identity")],
            [DAPE(budget=0.5)],
        ]:
            with vr.applied(model, passes):
                assert (away := vr.verify(model, double[0])) < 1e-5, (passes, away)
    one = ZOO[name](layers=4).model.double()
    for passes in [*recipes, [FastV(keep=0.5, at=2)]] if name == "llava" else []:  # others count positions otherwise
        with vr.applied(one, passes), vr.applied(model, passes), torch.no_grad():
            check(f"a second turn, {passes}", second_turn(model, double[0]), second_turn(one, double[0]))

    refused = [
        ([DPVR(at=1)], "offloaded or on several devices: expected a recipe without blocks"),
        (
            [
                VISOR(
                    chain=[{"self_layers": [0], "cross_layers": [2]}, {"self_layers": [0, 1, 2, 3]}],
                    policy="confidence",
                )
            ],
            "the recipe chooses among plans in each call",
        ),
    ]

    def refuse(passes: Any) -> None:
        with vr.applied(model, passes):
            model(**double[0])

    for passes, message in refused:
        with pytest.raises((ValueError, NotImplementedError), match=message):
            refuse(passes)
    del kept
    print(f"{name}: as on one device")


if __name__ == "__main__":
    main(sys.argv[1])
