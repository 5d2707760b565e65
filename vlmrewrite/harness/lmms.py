"""The classes that lmms-eval makes for ``--model vlmrewrite``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models import get_model
from lmms_eval.utils import simple_parse_args_string
from torch import nn
from tqdm import tqdm

from vlmrewrite.api import applied_recipe, apply, processor_set
from vlmrewrite.errors import one_of
from vlmrewrite.evaluate import Sample
from vlmrewrite.harness.answering import Answering
from vlmrewrite.harness.questions import of_chat, of_prompt
from vlmrewrite.harness.settings import settings_of

RECIPE = ("recipe", "backend", "kernels", "strict")
"""Arguments that say what is done to a model, whichever class of lmms-eval loads it."""

OTHERS = ("pretrained", *RECIPE, "base", "dtype", "device", "batch_size", "revision", "trust_remote_code")


class Asked(lmms):
    """A vision-language model of transformers under a recipe, or as it is."""

    def __init__(
        self,
        pretrained: str = "",
        recipe: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        """Load the model that ``--model_args`` names, in each process of ``accelerate launch`` for itself.

        Args:
            pretrained, recipe, options: as for :class:`vlmrewrite.harness.answering.Answering`.
            device: a GPU if there is one, where it is not said.
            batch_size: requests at a time.
            max_batch_size: no part is played by it.

        Raises:
            ValueError: an argument is none, or as ``Answering``.
        """
        super().__init__()
        for key in options:
            if key not in OTHERS:
                raise ValueError(f"--model_args: unknown {key!r}, {one_of(key, OTHERS)}")
        if not pretrained:
            raise ValueError("--model_args: expected pretrained=<folder or repository of the Hub>, got none")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"--batch_size: expected an integer >= 1, got {batch_size!r}")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        alone = self._world_size == 1
        self.device = torch.device(device) if alone and device else self.accelerator.device
        self.asks = Answering(str(pretrained), None if recipe is None else str(recipe), self.device, **options)
        self._told = set[str]()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """The model that arguments name; with ``base=...``, that model of lmms-eval with the recipe applied to it.

        Raises:
            ValueError: a class of lmms-eval has no model that a recipe can be applied to, or cannot be used with it.
        """
        given = simple_parse_args_string(arg_string)
        if "base" not in given:
            return super().create_from_arg_string(arg_string, additional_config)
        base, options = given.pop("base"), {key: given.pop(key) for key in RECIPE if key in given}
        if "recipe" not in options:
            raise ValueError(f"--model_args: expected recipe=... beside base={base}: --model {base} runs it without")
        fixed = {key: value for key, value in (additional_config or {}).items() if value is not None}
        made = get_model(base, force_simple=cls.is_simple)(**given, **fixed)
        model = getattr(made, "model", None)
        if not isinstance(model, nn.Module):
            raise ValueError(f"base={base}: expected a class whose model is a torch module, got {type(model).__name__}")
        with processor_set():
            apply(model, **options)
        if applied_recipe(model).sets_processor:
            raise ValueError(f"base={base} makes its inputs itself: expected a recipe that leaves pictures as large")
        return made

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answers to requests, in their order."""
        groups: dict[str, list[int]] = {}
        wishes = [self.wishes(request.args) for request in requests]
        for i, wish in enumerate(wishes):
            groups.setdefault(repr(sorted(wish.items())), []).append(i)
        found: list[Any] = [None] * len(requests)
        with self._bar(len(requests)) as bar:
            for group in groups.values():
                settings = settings_of(wishes[group[0]])
                self._ignored(settings.others)
                for samples in self._batches(group, lambda i: self.sample(i, requests[i].args)):
                    for sample, (text, n) in zip(samples, self.asks.answers(samples, settings), strict=True):
                        found[int(sample.id)] = GenerationResult(text, TokenCounts(output_tokens=n))
                    bar.update(len(samples))
        return found

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Of each continuation the loss per token, as lmms-eval's own classes have it, and whether it is greedy.

        Each pair is wrapped: lmms-eval makes a text of a bare one, which its tasks then cannot score (0.7.3).
        """
        found: list[Any] = [None] * len(requests)
        with self._bar(len(requests)) as bar:
            for samples in self._batches(range(len(requests)), lambda i: self._continued(i, requests[i].args)):
                for sample, pair in zip(samples, self.asks.losses(samples), strict=True):
                    found[int(sample.id)] = GenerationResult(pair)
                bar.update(len(samples))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Not offered."""
        raise NotImplementedError("--model vlmrewrite: expected a task of one round, got one of several")

    def clean(self) -> None:
        """Let go of the model."""
        del self.asks
        super().clean()

    def wishes(self, args: Any) -> dict[str, Any]:
        """The ``generation_kwargs`` of a request."""
        raise NotImplementedError

    def sample(self, number: int, args: Any) -> Sample:
        """The sample of a request."""
        raise NotImplementedError

    def document(self, task: str, split: str, number: int) -> Any:
        """What a request is about."""
        return self.task_dict[task][split][number]

    def _continued(self, i: int, args: Any) -> Sample:
        text, target, visual, number, task, split = args
        document = self.document(task, split, number)
        answer = target if isinstance(target, str) else str(target(document))
        asked = of_prompt(self.asks.processor, i, text, visual(document) or [])
        return Sample(asked.id, asked.prompt, asked.messages, asked.images, (answer.strip(),))

    def _batches(self, numbers: Sequence[int], sample: Callable[[int], Sample]) -> Iterator[list[Sample]]:
        """Samples, so many at a time, those with pictures apart from those without."""
        for start in range(0, len(numbers), self.batch_size):
            batch = [sample(i) for i in numbers[start : start + self.batch_size]]
            for some in ([s for s in batch if s.images], [s for s in batch if not s.images]):
                if some:
                    yield some

    def _bar(self, total: int) -> Any:
        return tqdm(total=total, disable=self.rank != 0, desc="Model Responding")

    def _ignored(self, names: Sequence[str]) -> None:
        """Say once of each setting of a task that no part is played by it."""
        if new := sorted({*names} - self._told):
            self._told.update(new)
            warnings.warn(f"generation_kwargs: no part is played by {', '.join(new)} here", stacklevel=2)


class AskedChats(Asked):
    """Asked by what tasks of lmms-eval give as messages."""

    is_simple = False

    def wishes(self, args: Any) -> dict[str, Any]:
        """The ``generation_kwargs`` of a request."""
        return dict(args[2])

    def sample(self, number: int, args: Any) -> Sample:
        """The sample of a request."""
        _, messages, _, document, task, split = args
        return of_chat(self.asks.processor, number, messages(self.document(task, split, document)))


class AskedPrompts(Asked):
    """Asked by a text and pictures (``--force_simple``); continuations are compared this way alone."""

    is_simple = True

    def wishes(self, args: Any) -> dict[str, Any]:
        """The ``generation_kwargs`` of a request."""
        return dict(args[1])

    def sample(self, number: int, args: Any) -> Sample:
        """The sample of a request."""
        text, _, visual, document, task, split = args
        return of_prompt(self.asks.processor, number, text, visual(self.document(task, split, document)) or [])
