"""Training the blocks that a recipe adds to a model, on a user's samples.

In: an unmodified model, samples with answers, a recipe with blocks. Out: a folder that `vlmrewrite.apply` takes.
"""

from vlmrewrite.runtime import before_labels, following, prompt_ends, routing
from vlmrewrite.training.batches import answered
from vlmrewrite.training.blocks import trainable_blocks
from vlmrewrite.training.folder import check_folder
from vlmrewrite.training.losses import answer_loss, distillation_loss
from vlmrewrite.training.objective import TRAINED_BY
from vlmrewrite.training.run import Training, train
from vlmrewrite.training.settings import check_settings, is_first_process

__all__ = [
    "TRAINED_BY",
    "Training",
    "answer_loss",
    "answered",
    "before_labels",
    "check_folder",
    "check_settings",
    "distillation_loss",
    "following",
    "is_first_process",
    "prompt_ends",
    "routing",
    "train",
    "trainable_blocks",
]
