"""Where the prompts of a call end, by what a generation was given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vlmrewrite.hf import Sizes
from vlmrewrite.hf.vision import Encoded, EncoderOutput
from vlmrewrite.runtime.facts import Given, Prompt

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_copies_of_a_row_end_where_the_row_does(copies):
    """The mask of the first forward, which generate() made for several copies of each row, and for a token more."""
    prompt = Prompt.of((), {"input_ids": torch.ones_like(MASK)})
    assert prompt.end.tolist() == [4, 4]
    prompt.see(torch.nn.functional.pad(MASK, (0, 1), value=1).repeat_interleave(copies, 0))
    assert prompt.end.tolist() == [4, 2]
    prompt.see(torch.ones(2 * copies, 5))
    assert prompt.end.tolist() == [4, 2], "the first mask counts"


@pytest.mark.parametrize("copies", [1, 2])
def test_on_a_kept_cache_prompts_end_so_many_tokens_later(copies, monkeypatch):
    vision = torch.tensor([[True, False, False, False]] * 2 * copies)
    features, lengths = {"x": torch.zeros(2 * copies, 8)}, {"x": [1] * 2 * copies}
    images = {"image": Encoded(EncoderOutput({}), features, lengths)}
    given = Given(images, None, 6, (), Sizes(), torch.tensor([9, 7]), [])
    merge = SimpleNamespace(modality="image", name="x")
    program = SimpleNamespace(anatomy=SimpleNamespace(merges=[merge]), vision_masks=lambda: [vision], picks=[])
    monkeypatch.setattr("vlmrewrite.runtime.facts.program_of", lambda _: program)
    call, missing = given.call(None, (), (), True, None)
    assert not missing
    assert call.prompt_end.tolist() == [*[3] * copies, *[1] * copies]
    assert call.past == 6
