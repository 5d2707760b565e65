"""What several tests begin with."""

from __future__ import annotations

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlmrewrite.plan.pipeline import run_passes
from vlmrewrite.plan.plan import Plan
from vlmrewrite.testing import models


def planned(*passes, depth=8, features=frozenset()):
    """The text of the plan that passes make, none of which refuses."""
    return str(run_passes(Plan(depth, features), passes, strict=True)[0])


def with_grid(name):
    """A model on whose grids there are regions: LLaVA with 36 tokens an image, the others as they are."""
    if name != "llava":
        return models.FAMILIES[name]()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**models._tower(image_size=24, projection_dim=models.HIDDEN)),
        text_config=LlamaConfig(**models._decoder(4)),
        image_token_index=models.IMAGE,
        image_seq_length=36,
        vision_feature_layer=-1,
    )
    return models._tiny("llava", LlavaForConditionalGeneration, config, models._square(24, 36), 0)
