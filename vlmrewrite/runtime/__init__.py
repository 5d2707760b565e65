"""A recipe at work on a model: what happens in one call, and what the last call did.

In: the arguments of ``forward`` and ``generate``. Out: the model's own outputs.
"""

from vlmrewrite.runtime.facts import LastCall, Layout
from vlmrewrite.runtime.install import SESSIONS, install_session, remove_session, session_of
from vlmrewrite.runtime.last_call import Stage, kept_tokens, last_call, prompt_ends, routing
from vlmrewrite.runtime.session import Session, trace

__all__ = [
    "SESSIONS",
    "LastCall",
    "Layout",
    "Session",
    "Stage",
    "install_session",
    "kept_tokens",
    "last_call",
    "prompt_ends",
    "remove_session",
    "routing",
    "session_of",
    "trace",
]
