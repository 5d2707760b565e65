"""A recipe and its trained blocks outside of a process: in a folder, on the Hub, in a copy or a pickle of the model.

In: a rewritten model, or the name of a folder. Out: files beside the model's own, and what they hold.
"""

from vlmrewrite.saving.copies import METHODS
from vlmrewrite.saving.fit import put_blocks, refuse_other, stored_of
from vlmrewrite.saving.folder import BLOCKS, FILE, Stored, named_folder, read, write
from vlmrewrite.saving.hub import card, push
from vlmrewrite.saving.twin import sharing

__all__ = [
    "BLOCKS",
    "FILE",
    "METHODS",
    "Stored",
    "card",
    "named_folder",
    "push",
    "put_blocks",
    "read",
    "refuse_other",
    "sharing",
    "stored_of",
    "write",
]
