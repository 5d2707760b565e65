"""A recipe at work on a model: what happens in one call, and what the last call did.

In: the arguments of ``forward`` and ``generate``. Out: the model's own outputs.
"""

from vlmrewrite.runtime.facts import LastCall, Layout, Stage
from vlmrewrite.runtime.install import install_session, kept_tokens, last_call, remove_session, routing
from vlmrewrite.runtime.session import SESSIONS, Session, session_of
from vlmrewrite.runtime.told import before_labels, following, prompt_ends
from vlmrewrite.runtime.tracing import trace

__all__ = [
    "SESSIONS",
    "LastCall",
    "Layout",
    "Session",
    "Stage",
    "before_labels",
    "following",
    "install_session",
    "kept_tokens",
    "last_call",
    "prompt_ends",
    "remove_session",
    "routing",
    "session_of",
    "trace",
]
