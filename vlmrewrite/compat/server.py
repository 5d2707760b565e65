"""The server that transformers brings along, ``transformers serve``, whose parts it does not promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlmrewrite.compat.private import attribute, find, patched


def serve(name: str, load: Callable[[], Any], processor: Any, *, host: str, port: int) -> None:
    """Answer requests about one model, by transformers' server, until the process is told to end.

    Args:
        name: of the model in requests; a path, if it is a folder.
        load: returns the model. It is called before the server listens, and again after it was told to forget its
            models (``/reset``).
        processor: the model's, with a chat template.
        host, port: where it listens.

    Raises:
        ImportError: what the server needs is not installed.
        VersionError: transformers has no such server.
        ValueError: the name has a character that the server takes for the end of a name.
    """
    there, kind = find("transformers.utils.import_utils", "is_serve_available"), find("transformers.cli.serve", "Serve")
    base = find("transformers.cli.serving.model_manager", "ModelManager")
    for method in ("_load_model", "_load_processor", "process_model_name"):
        attribute(base, method, "transformers")
    if not there():
        raise ImportError(
            "transformers' server needs fastapi, uvicorn and openai, and not all of them are installed: pip install"
            " 'transformers[serving]'"
        )
    if "@" in name or name.endswith(".gguf"):
        raise ValueError(f"expected a model whose name has no '@' and does not end in .gguf, got {name!r}")
    own = base.process_model_name(name)

    def check(asked: str) -> None:
        if asked != own:
            raise ValueError(f"this server is for {name!r} alone, got a request for {asked!r}")

    class Manager(base):  # type: ignore[misc, valid-type]
        def _load_model(self, model_id_and_revision: str, *_: Any, **__: Any) -> Any:
            check(model_id_and_revision)
            return load()

        def _load_processor(self, model_id_and_revision: str, *_: Any, **__: Any) -> Any:
            check(model_id_and_revision)
            return processor

    with patched("transformers.cli.serving.model_manager", ModelManager=Manager):
        kind(name, host=host, port=port)
