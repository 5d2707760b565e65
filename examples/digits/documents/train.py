"""Train the model that reads, from scratch on a CPU, and save it in fp16.

    python -m examples.digits.documents.train                         # from the root of the repository; resumable

Four stages, each with AdamW, warm-up and a cosine:
  L  the tower alone, a line at a time, learns to name, of what is under each patch: letter, word, the words beside it,
     place in the line, number and colour;
  A  the same of more and more lines, then of whole pages, and the number of the line; with projector and word
     embeddings: a patch's projected feature shall lie nearest to the words for it and its place, as in CLIP;
  B  projector and decoder answer questions about pages whose upper part alone holds text and is seen, packed into one
     sequence in which a question sees the page and itself only; the tower stays as it is;
  C  the same of whole pages.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import WIDTH, final_accuracy
from ..train import Log, build_optimizer, descend, trained
from .attention import use
from .fonts import FACES, IN_MATPLOTLIB
from .model import CHECKPOINT, build_model, load, save
from .pages import GRID, LABELS, Batch, PageSampler, held_out_questions
from .questions import BOS, DIGITS, KINDS, MOST_LINES, QUESTION_WORDS, SIDES, VOCABULARY, WORDS

SLOT = QUESTION_WORDS + 2  # a question and its answer; what is behind the answer's last token is target only


@dataclass(frozen=True)
class Stage:
    """One stage of training. ``patch``, ``align`` and ``answer`` are loss weights; 0 switches a loss off."""

    name: str
    steps: int
    learning_rate: float
    warmup: int
    pages: int
    questions: int = 0
    patch: float = 1.0
    align: float = 0.0
    answer: float = 0.0
    tower_rate: float = 1.0
    full: bool = False  # whether all pages have as many lines as fit; labels of what is around a word weigh less
    rows: int = GRID  # of patches that hold text, from the top; the decoder sees these alone
    held_out: int = 24

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then a straight line down to 3 %."""
        x = min(1.0, max(0.0, (step - self.warmup) / max(1, self.steps - self.warmup)))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * (1 - 0.97 * x)


STAGES = (
    Stage("L", steps=1300, learning_rate=2e-3, warmup=60, pages=8, full=True),
    Stage("A", steps=400, learning_rate=1.5e-3, warmup=15, pages=8, align=1.0),
    Stage("B", steps=1250, learning_rate=1.2e-3, warmup=40, pages=8, questions=32, patch=0.3, align=1.0, answer=1.0,
          tower_rate=0.3, rows=12),
    Stage("C", steps=1500, learning_rate=1e-3, warmup=30, pages=8, questions=32, patch=0.3, align=0.5, answer=1.0,
          tower_rate=0.3),
)  # fmt: skip


def packed_layout(prefix: int, questions: int, full: int = 0) -> tuple[Tensor, Tensor]:
    """Mask [1, 1, T, T] (True: visible) and positions [1, T] for <bos>, image and ``questions`` independent slots.

    Questions stand behind position ``full`` where a page of so many patches is seen in part.
    """
    index = torch.arange(prefix + questions * SLOT)
    which = torch.where(index < prefix, -1, (index - prefix) // SLOT)
    visible = (index[:, None] >= index) & ((which == -1) | (which[:, None] == which))
    positions = torch.where(index < prefix, index, max(prefix, 1 + full) + (index - prefix) % SLOT)
    return visible[None, None], positions[None]


class Learner(nn.Module):
    """The model, the helper heads of stage A, and the three losses."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build_model()
        use(self.model)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, n) for n in LABELS.values())

    def seen(self, pixels: Tensor) -> Tensor:
        """What the projector takes, [B, patches, D]."""
        tower: Any = self.model.model.vision_tower
        return torch.as_tensor(tower(pixels, output_hidden_states=True).hidden_states[-1])

    def patch_loss(self, hidden: Tensor, labels: Tensor, others: float = 1.0) -> Tensor:
        """Sum of the cross-entropies per patch; a fifth of the patches without text count."""
        on = (labels[:, 0] > 0) | (torch.rand(labels[:, 0].shape) < 0.2)
        chosen, total = hidden[on], torch.zeros(())
        for i, (name, head) in enumerate(zip(LABELS, self.heads, strict=True)):
            weight = 1.0 if name in ("letter", "word") else others
            total = total + weight * F.cross_entropy(head(chosen).float(), labels[:, i][on])
        return total

    def align_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """A patch's projected feature is nearest, by cosine, to its word, its line, its side, and first or last."""
        word, line, edge = (labels[:, list(LABELS).index(name)] for name in ("word", "line", "edge"))
        side = (torch.arange(GRID) * len(SIDES) // GRID).expand(len(labels), GRID, -1).flatten(1)
        targets = (
            (WORDS, word - 2, word > 1),
            (DIGITS[1 : 1 + MOST_LINES], line - 1, line > 0),
            (SIDES, side, line > 0),
            (["First", "Last"], edge - 2, (edge == 2) | (edge == 3)),
        )
        table: Any = self.model.get_input_embeddings()
        patches, words, total = (
            F.normalize(features.float(), dim=-1),
            F.normalize(table.weight, dim=-1),
            torch.zeros(()),
        )
        for names, target, on in targets:
            known = words[torch.tensor([VOCABULARY[name] for name in names])]
            total = total + F.cross_entropy(20 * patches[on] @ known.T, target[on])
        return total

    def answer_logits(self, features: Tensor, slots: Tensor, full: int = 0) -> Tensor:
        """Logits at each question's last word and at both tokens of its answer, [B, n, 3, V]."""
        embed, core = self.model.get_input_embeddings(), self.model.model.language_model
        n, questions = slots.shape[:2]
        prefix = 1 + features.shape[1]
        visible, positions = packed_layout(prefix, questions, full)
        bos = embed(torch.full((n, 1), BOS))
        stream = torch.cat([bos, features.to(bos.dtype), embed(slots[:, :, :SLOT].flatten(1))], 1)  # [B, T, D]
        hidden = core(
            inputs_embeds=stream,
            attention_mask=visible.expand(n, -1, -1, -1),
            position_ids=positions.expand(n, -1),
            use_cache=False,
        ).last_hidden_state
        hidden = hidden[:, prefix:].unflatten(1, (questions, SLOT))
        return torch.as_tensor(self.model.lm_head(hidden[:, :, QUESTION_WORDS - 1 :])).float()

    def losses(self, batch: Batch, stage: Stage, others: float = 1.0) -> dict[str, Tensor]:
        """The losses that the stage asks for, unweighted, and the accuracy of the answers where there are any."""
        out = {}
        hidden = self.seen(batch.pixels)
        if stage.patch:
            out["patch"] = self.patch_loss(hidden, batch.labels, others)
        features = self.model.model.multi_modal_projector(hidden)
        if stage.align:
            out["align"] = self.align_loss(features, batch.labels)
        if stage.answer:
            full = features.shape[1]
            features = features if stage.rows == GRID else features[:, : stage.rows * GRID]
            logits, truth = self.answer_logits(features, batch.slots, full), batch.slots[:, :, QUESTION_WORDS:]
            first = F.cross_entropy(logits[:, :, 0].flatten(0, 1), truth[:, :, 0].flatten())
            second = F.cross_entropy(logits[:, :, 1:].flatten(0, 2), truth[:, :, 1:].flatten())
            out["answer"] = first + 0.5 * second
            out["accuracy"] = (logits.detach().argmax(-1) == truth).all(-1).float().mean()
        return out


@torch.no_grad()
def held_out_accuracy(learner: Learner, stage: Stage, bf16: bool, faces: Sequence[str]) -> dict[str, float]:
    """Teacher-forced accuracy on pages of held-out prose: per kind of question, and of what is named per patch."""
    sampler = PageSampler(True, 20, faces)
    hits, asked = Counter[str](), Counter[str]()
    core = learner.model.model
    for _ in range(2):
        batch = sampler.batch(stage.held_out, stage.questions)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = learner.seen(batch.pixels)
            for i, (name, head) in enumerate(zip(LABELS, learner.heads, strict=True)):
                on = batch.labels[:, i] > (1 if name in ("word", "after", "before", "tens", "units", "red") else 0)
                hits[f"patch {name}"] += int((head(hidden).argmax(-1) == batch.labels[:, i])[on].sum())
                asked[f"patch {name}"] += int(on.sum())
            if stage.answer:
                logits = learner.answer_logits(core.multi_modal_projector(hidden), batch.slots)
                right = (logits.argmax(-1) == batch.slots[:, :, QUESTION_WORDS:]).all(-1).flatten().tolist()
                for kind, ok in zip(batch.kinds.flatten().tolist(), right, strict=True):
                    hits.update({KINDS[kind]: ok, "all": ok})
                    asked.update([KINDS[kind], "all"])
    return {kind: round(hits[kind] / asked[kind], 3) for kind in asked if asked[kind]}


def run_stage(
    learner: Learner,
    stage: Stage,
    seed: int,
    bf16: bool,
    faces: Sequence[str],
    scratch: Path,
    log: Log,
    minutes: float,
) -> float:
    """Train one stage, from its snapshot in ``scratch`` if there is one. Returns the minutes used so far."""
    sampler = PageSampler(False, seed, faces)
    tower, others = trained(learner, stage)
    optimizer = build_optimizer(tower, others, stage.tower_rate)
    snapshot, step, mean = scratch / f"stage-{stage.name}.pt", 0, dict[str, float]()
    if snapshot.exists():
        state = torch.load(snapshot, weights_only=False)
        learner.load_state_dict(state["learner"])
        if state["optimizer"] is not None:  # of what was trained in this form
            optimizer.load_state_dict(state["optimizer"])
        sampler.rng.bit_generator.state = state["rng"]
        step, mean, minutes = state["step"], state["mean"], state["minutes"]
    began = time.monotonic() - 60 * minutes
    while step < stage.steps:
        sampler.lines = (MOST_LINES, MOST_LINES) if stage.full else (3, min(MOST_LINES, stage.rows // 4))
        sampler.rows = stage.rows
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(step) * group["scale"]
        batch = sampler.batch(stage.pages, stage.questions)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = learner.losses(batch, stage, 0.3 if stage.full else 1.0)
        descend(optimizer, [*tower, *others], losses, stage)
        step += 1
        mean = {name: 0.95 * mean.get(name, value.item()) + 0.05 * value.item() for name, value in losses.items()}
        if step % 20 == 0 or step == stage.steps:
            log(stage=stage.name, step=step, minutes=round((time.monotonic() - began) / 60, 2), **mean)
        if step % 100 == 0 or step == stage.steps:
            log(stage=stage.name, step=step, held_out=held_out_accuracy(learner, stage, bf16, faces))
        if step % 100 == 0 or step == stage.steps:
            state = {"learner": learner.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "mean": mean}
            state |= {"rng": sampler.rng.bit_generator.state, "minutes": (time.monotonic() - began) / 60}
            torch.save(state, snapshot)
    return (time.monotonic() - began) / 60


def main(given: list[str] | None = None) -> None:
    """Run the stages, save, and measure what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="folder of the finished model")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir(), "documents"), help="of snapshots")
    parser.add_argument("--resume", action="store_true", help="go on from the snapshots in the scratch folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast (for CPUs without bf16 instructions)")
    parser.add_argument("--smoke", action="store_true", help="one step of each stage on one page: does it run?")
    parser.add_argument("--fonts", choices=["all", "matplotlib"], default="all", help="faces of the pages")
    parser.add_argument("--questions", type=int, default=500, help="held-out questions of the final evaluation")
    args = parser.parse_args(given)
    faces = tuple(FACES) if args.fonts == "all" else IN_MATPLOTLIB
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    for folder in (args.out, args.scratch):
        folder.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        for old in args.scratch.glob("stage-*.pt"):
            old.unlink()
    log, learner, minutes = Log(args.out / "train_log.jsonl", args.resume), Learner(), 0.0
    size = sum(p.numel() for p in learner.model.parameters())
    log(parameters=size, seed=args.seed, bf16=not args.fp32, resume=args.resume)
    for i, stage in enumerate(STAGES):
        if args.smoke:
            stage = replace(stage, steps=1, pages=1, held_out=1)
        seed = args.seed + 100 * (i + 1)
        minutes = run_stage(learner, stage, seed, not args.fp32, faces, args.scratch, log, minutes)
    save(learner.model, args.out)
    final = final_accuracy(*load(args.out), held_out_questions(args.questions, faces=faces), KINDS)
    log(minutes=round(minutes, 1), questions=args.questions, final=final)


if __name__ == "__main__":
    main()
