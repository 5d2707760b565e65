"""Two processes of one model: DistributedDataParallel and one group of shards train it; layers apart are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import vlmrewrite as vr
from tests.small import ONE_EACH
from vlmrewrite.testing.models import FAMILIES, Row

ROOT = Path(__file__).parents[2]

pytest.importorskip("peft")  # of the environment that `make ecosystem` makes: these take a minute


def train(recipe: str, how: str) -> None:
    """What each of the processes does: three steps on a row of its own; losses, and whether parameters stay equal."""
    dist.init_process_group("gloo")
    rank, tiny = dist.get_rank(), FAMILIES["llava"](layers=3)
    model, inputs = tiny.model.train(), tiny.inputs([Row(1, 3, 4 + dist.get_rank())], seed=dist.get_rank())
    vr.apply(model, ONE_EACH[recipe])
    if how in ("layers", "whole"):
        for layer in model.get_decoder().layers if how == "layers" else ():
            fully_shard(layer)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model, find_unused_parameters=True)
    if how == "checkpointing":
        model.module.activation_checkpointing_enable()
    some = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(some, lr=0.02)
    for _ in range(3):
        loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        say(f"loss {rank} {float(loss.detach()):.6f}")
    whole = [p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in some]
    total = torch.stack([p.double().sum() for p in whole]).sum()
    both = [torch.empty_like(total) for _ in range(2)]
    dist.all_gather(both, total)
    say(f"equal {rank} {both[0].item() == both[1].item()}")
    dist.barrier()
    os._exit(0)  # freeing the model beside gloo's threads now and then never ends


def say(line: str) -> None:
    """A line as one write: with PYTHONUNBUFFERED, `print` writes its end apart, and lines of two processes mix."""
    os.write(1, f"{line}\n".encode())


def two(recipe, how):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    ran = subprocess.run([*command, "tests.ecosystem.test_distributed", recipe, how],
                         cwd=ROOT, capture_output=True, text=True, timeout=300)  # fmt: skip
    return ran.returncode, ran.stdout + ran.stderr


def losses(said, rank):
    return [float(line.split()[2]) for line in said.splitlines() if line.startswith(f"loss {rank} ")]


@pytest.mark.parametrize(("recipe", "how"), [("sts", "plain"), ("dpvr", "plain"), ("sts", "checkpointing")])
def test_data_parallel(recipe, how):
    code, said = two(recipe, how)
    assert code == 0, said
    for rank in (0, 1):
        seen = losses(said, rank)
        assert len(seen) == 3
        assert seen[-1] < seen[0]
        assert f"equal {rank} True" in said


@pytest.mark.parametrize("recipe", ["sts", "dpvr"])
def test_one_group_of_shards_learns_as_copies_do(recipe):
    (code, said), (_, copies) = two(recipe, "whole"), two(recipe, "plain")
    assert code == 0, said
    for rank in (0, 1):
        assert losses(said, rank) == pytest.approx(losses(copies, rank), abs=1e-5)
        assert len(losses(said, rank)) == 3
        assert f"equal {rank} True" in said


def test_shards_of_layers_are_refused():
    code, said = two("sts", "layers")
    assert code != 0
    assert "is sharded over processes (fully_shard of layers, or a tensor-parallel plan): expected whole para" in said
    assert "or one group of them all: apply, then fully_shard(model) alone" in said


if __name__ == "__main__":
    train(*sys.argv[1:])
