"""Train the digits model from scratch on a CPU, in one command, and save it in fp16.

    python -m examples.digits.train                         # from the root of the repository; resumable
    python -m examples.digits.train --resume                # go on after an interruption
    python -m examples.digits.train --smoke --out smoke --scratch smoke-scratch         # does it run?

Three stages, each with AdamW, warm-up and a cosine:
  A  the vision tower alone learns to name digit, colour and size of the scan under each patch;
  P  tower, projector and word embeddings: a patch's projected feature shall lie nearest to the words for its digit,
     its colour and its cell, as in CLIP;
  B  the whole model answers questions: 32 scenes a step with 16 questions each, packed into one sequence in which
     a question sees the picture and itself only. The losses of A and P stay on with small weights.
The linear heads of stage A are thrown away in the end.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .model import CHECKPOINT, WIDTH, build_model, final_accuracy, load, save
from .questions import BOS, CELLS, COLOR_NAMES, DIGITS, EOS, KINDS, QUESTION_WORDS, VOCABULARY
from .scenes import (
    DIGITS_SHARES,
    EASY_SHARES,
    GRID,
    SIZES,
    VISION_TOKENS,
    Batch,
    SceneSampler,
    held_out_questions,
    split_scans,
)

PREFIX = 1 + VISION_TOKENS  # <bos> and the image
SLOT = QUESTION_WORDS + 1  # a question and its answer


@dataclass(frozen=True)
class Stage:
    """One stage of training. ``patch``, ``align`` and ``answer`` are loss weights; 0 switches a loss off."""

    name: str
    steps: int
    learning_rate: float
    warmup: int
    scenes: int
    questions: int = 0
    dense: float = 0.0  # share of scenes with all nine cells filled
    easy: float = 0.0  # share of the steps, from the first, on scenes with fewer digits
    patch: float = 1.0
    align: float = 0.0
    answer: float = 0.0
    tower_rate: float = 1.0  # learning rate of the tower, relative
    variants: int = 12  # of each scan: as it is, and warped
    backgrounds: int = 1500
    held_out: int = 64  # scenes of a held-out batch

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then a cosine down to 2 %."""
        x = min(1.0, max(0.0, (step - self.warmup) / max(1, self.steps - self.warmup)))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * x)))


STAGES = (
    Stage("A", steps=1300, learning_rate=1.5e-3, warmup=100, scenes=64, dense=0.8),
    Stage("P", steps=500, learning_rate=1e-3, warmup=50, scenes=64, dense=0.8, align=1.0),
    Stage("B", steps=2400, learning_rate=1.2e-3, warmup=150, scenes=32, questions=16, easy=0.15, patch=0.5, align=0.1,
          answer=1.0, tower_rate=0.3),
)  # fmt: skip


def packed_layout(questions: int) -> tuple[Tensor, Tensor]:
    """Mask [1, 1, T, T] (True: visible) and positions [1, T] for <bos>, image and ``questions`` independent slots."""
    index = torch.arange(PREFIX + questions * SLOT)
    slot = torch.where(index < PREFIX, -1, (index - PREFIX) // SLOT)
    visible = (index[:, None] >= index) & ((slot == -1) | (slot[:, None] == slot))
    positions = torch.where(index < PREFIX, index, PREFIX + (index - PREFIX) % SLOT)
    return visible[None, None], positions[None]


class Learner(nn.Module):
    """The model, the helper heads of stage A, and the three losses."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build_model()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1 + n) for n in (len(DIGITS), len(COLOR_NAMES), len(SIZES)))
        self.words = [torch.tensor([VOCABULARY[w] for w in group]) for group in (DIGITS, COLOR_NAMES, CELLS)]
        third = torch.arange(GRID) // (GRID // 3)
        self.cell = (third[:, None] * 3 + third).flatten()  # [144] cell of each patch

    def patch_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropies of digit, colour and size per patch. hidden [B, 144, D]; background weighs less."""
        losses = []
        for i, head in enumerate(self.heads):
            logits = head(hidden).float().flatten(0, 1)
            weight = torch.ones(logits.shape[1])
            weight[0] = 0.3
            losses.append(F.cross_entropy(logits, labels[:, i].flatten(), weight))
        return torch.stack(losses).sum()

    def align_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """For features [B, 144, D]: a digit's patch is nearest, by cosine, to the words for its digit, colour, cell."""
        on = labels[:, 0] > 0
        patches = F.normalize(features[on].float(), dim=-1)
        table: Any = self.model.get_input_embeddings()
        words = F.normalize(table.weight, dim=-1)
        targets = (labels[:, 0][on] - 1, labels[:, 1][on] - 1, self.cell.expand(len(labels), -1)[on])
        pairs = zip(self.words, targets, strict=True)
        return torch.stack([F.cross_entropy(20 * patches @ words[group].T, target) for group, target in pairs]).sum()

    def answer_logits(self, features: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Logits at each question's last word [B, n, V] and, for the first question, at its answer [B, V]."""
        embed, core = self.model.get_input_embeddings(), self.model.model.language_model
        n, questions = slots.shape[:2]
        visible, positions = packed_layout(questions)
        bos = embed(torch.full((n, 1), BOS))
        stream = torch.cat([bos, features.to(bos.dtype), embed(slots.flatten(1))], 1)  # [B, T, D]
        hidden = core(
            inputs_embeds=stream,
            attention_mask=visible.expand(n, -1, -1, -1),
            position_ids=positions.expand(n, -1),
            use_cache=False,
        ).last_hidden_state
        hidden = hidden[:, PREFIX:].unflatten(1, (questions, SLOT))
        return self.model.lm_head(hidden[:, :, -2]).float(), self.model.lm_head(hidden[:, 0, -1]).float()

    def losses(self, batch: Batch, stage: Stage) -> dict[str, Tensor]:
        """The losses that the stage asks for, unweighted, and the accuracy of the answers where there are any."""
        hidden = self.model.model.vision_tower(batch.pixels).last_hidden_state[:, 1:]  # without CLS
        out = {"patch": self.patch_loss(hidden, batch.labels)}
        if stage.align:
            features = self.model.model.multi_modal_projector(hidden)
            out["align"] = self.align_loss(features, batch.labels)
        if stage.answer:
            logits, after = self.answer_logits(features, batch.slots)
            truth = batch.slots[:, :, -1]
            stop = F.cross_entropy(after, torch.full((len(after),), EOS))
            out["answer"] = F.cross_entropy(logits.flatten(0, 1), truth.flatten()) + 0.1 * stop
            out["accuracy"] = (logits.detach().argmax(-1) == truth).float().mean()
        return out


def trained(learner: Any, stage: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that a stage trains: those of tower and heads, and the others."""
    core = learner.model.model
    tower = [*core.vision_tower.parameters(), *learner.heads.parameters()]
    if stage.answer:
        return tower, [*core.multi_modal_projector.parameters(), *core.language_model.parameters()]
    if stage.align:
        return tower, [*core.multi_modal_projector.parameters(), learner.model.get_input_embeddings().weight]
    return tower, []


def build_optimizer(tower: list[nn.Parameter], others: list[nn.Parameter], tower_rate: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; each group's ``scale`` multiplies the learning rate."""
    groups = []
    for parameters, scale in ((tower, tower_rate), (others, 1.0)):
        groups.append({"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05, "scale": scale})
        groups.append({"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "scale": scale})
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.98))


def descend(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], losses: Any, stage: Any) -> None:
    """One step down the sum of the losses, each by its weight in the stage."""
    loss = sum((getattr(stage, name) * losses[name] for name in losses if name != "accuracy"), torch.zeros(()))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


@torch.no_grad()
def held_out_accuracy(learner: Learner, stage: Stage, bf16: bool) -> dict[str, float]:
    """Teacher-forced accuracy on scenes of held-out scans: per kind of question, or the digit named per patch."""
    sampler = SceneSampler(split_scans(held_out=True), 1, seed=20, n_backgrounds=min(400, stage.backgrounds))
    hits, asked = Counter[str](), Counter[str]()
    core = learner.model.model
    for _ in range(4):
        batch = sampler.batch(stage.held_out, stage.questions)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = core.vision_tower(batch.pixels).last_hidden_state[:, 1:]
            named = learner.heads[0](hidden).argmax(-1)
            on = batch.labels[:, 0] > 0
            hits["patch"] += int((named == batch.labels[:, 0])[on].sum())
            asked["patch"] += int(on.sum())
            if stage.answer:
                logits, _ = learner.answer_logits(core.multi_modal_projector(hidden), batch.slots)
                right = (logits.argmax(-1) == batch.slots[:, :, -1]).flatten().tolist()
                for kind, ok in zip(batch.kinds.flatten().tolist(), right, strict=True):
                    hits.update({KINDS[kind]: ok, "all": ok})
                    asked.update([KINDS[kind], "all"])
    return {kind: round(hits[kind] / asked[kind], 4) for kind in asked}


class Log:
    """Prints a line and appends it to a jsonl file."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        if not resume:
            path.unlink(missing_ok=True)

    def __call__(self, **entry: Any) -> None:
        """Write one entry."""
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in entry.items()), flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def run_stage(learner: Learner, stage: Stage, seed: int, bf16: bool, scratch: Path, log: Log, minutes: float) -> float:
    """Train one stage, from its snapshot in ``scratch`` if there is one. Returns the minutes used so far."""
    sampler = SceneSampler(split_scans(held_out=False), stage.variants, seed, stage.backgrounds)
    tower, others = trained(learner, stage)
    optimizer = build_optimizer(tower, others, stage.tower_rate)
    snapshot, step, mean = scratch / f"stage-{stage.name}.pt", 0, {}
    if snapshot.exists():
        state = torch.load(snapshot, weights_only=False)
        learner.load_state_dict(state["learner"])
        optimizer.load_state_dict(state["optimizer"])
        sampler.rng.bit_generator.state = state["rng"]
        step, mean, minutes = state["step"], state["mean"], state["minutes"]
    began = time.monotonic() - 60 * minutes
    while step < stage.steps:
        sampler.shares = EASY_SHARES if step < stage.easy * stage.steps else DIGITS_SHARES
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(step) * group["scale"]
        batch = sampler.batch(stage.scenes, stage.questions, stage.dense)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = learner.losses(batch, stage)
        descend(optimizer, [*tower, *others], losses, stage)
        step += 1
        mean = {name: 0.97 * mean.get(name, value.item()) + 0.03 * value.item() for name, value in losses.items()}
        if step % 50 == 0 or step == stage.steps:
            log(stage=stage.name, step=step, minutes=round((time.monotonic() - began) / 60, 2), **mean)
        if step % 250 == 0 or step == stage.steps:
            with torch.compiler.set_stance("force_eager"):  # another batch size, not worth compiling for
                log(stage=stage.name, step=step, held_out=held_out_accuracy(learner, stage, bf16))
            state = {"learner": learner.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "mean": mean}
            state |= {"rng": sampler.rng.bit_generator.state, "minutes": (time.monotonic() - began) / 60}
            torch.save(state, snapshot)
    return (time.monotonic() - began) / 60


def main() -> None:
    """Run the stages, save, and measure what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="folder of the finished model")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir(), "digits"), help="of snapshots")
    parser.add_argument("--resume", action="store_true", help="go on from the snapshots in the scratch folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast (for CPUs without bf16 instructions)")
    parser.add_argument("--compile", action="store_true", help="compile the layers (needs a C++ compiler)")
    parser.add_argument("--smoke", action="store_true", help="one step of each stage on one scene: does it run?")
    parser.add_argument("--questions", type=int, default=3000, help="held-out questions of the final evaluation")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    for folder in (args.out, args.scratch):
        folder.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        for old in args.scratch.glob("stage-*.pt"):
            old.unlink()
    log, learner, minutes = Log(args.out / "train_log.jsonl", args.resume), Learner(), 0.0
    if args.compile:
        for module in learner.modules():
            if isinstance(module, (CLIPEncoderLayer, LlamaDecoderLayer)):
                module.compile(dynamic=False)
    size = sum(p.numel() for p in learner.model.parameters())
    log(parameters=size, seed=args.seed, bf16=not args.fp32, resume=args.resume)
    for i, stage in enumerate(STAGES):
        if args.smoke:
            stage = replace(stage, steps=1, scenes=1, variants=1, backgrounds=9, held_out=1)
        minutes = run_stage(learner, stage, args.seed + 100 * (i + 1), not args.fp32, args.scratch, log, minutes)
    save(learner.model, args.out)
    final = final_accuracy(*load(args.out), held_out_questions(args.questions), KINDS)
    log(minutes=round(minutes, 1), questions=args.questions, final=final)


if __name__ == "__main__":
    main()
