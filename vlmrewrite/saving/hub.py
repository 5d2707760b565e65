"""A recipe and its blocks in a repository of the Hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData

from vlmrewrite.saving.folder import MODEL_FILES, Stored, write

_CARD = """---
{data}
---

# {title}

A recipe of vlmrewrite for a vision-language model of type `{kind}`{base}{blocks}

```python
import vlmrewrite as vr

{how}
print(vr.report(model))
vr.restore(model)
```

Passes, in order:

{passes}
"""


def card(stored: Stored, repo_id: str) -> ModelCard:
    """What a repository says of itself.

    Args:
        stored: what is in it.
        repo_id: its name, ``"owner/name"``.
    """
    base = stored.base_model
    data = ModelCardData(
        library_name="vlmrewrite", base_model=base, pipeline_tag="image-text-to-text", tags=["vlmrewrite"]
    )
    text = _CARD.format(
        data=data.to_yaml(),
        title=repo_id.rpartition("/")[2],
        kind=stored.model.model_type,
        base=f", made for [{base}](https://huggingface.co/{base})" if base else "",
        blocks=", with the blocks that were trained under it." if stored.tensors else "; it has no trained blocks.",
        how=f'model = vr.from_pretrained("{repo_id}")' if base else f'vr.apply(model, "{repo_id}")',
        passes="\n".join(f"- `{p!r}`" for p in stored.recipe.passes),
    )
    return ModelCard(text)


def push(
    stored: Stored,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload the files and a model card; see :func:`vlmrewrite.push_to_hub`."""
    api = HfApi(token=token, library_name="vlmrewrite")
    with tempfile.TemporaryDirectory() as folder:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        there = any(api.file_exists(name, file, revision=revision) for file in MODEL_FILES)
        write(Path(folder), stored, weights=there)
        card(stored, name).save(Path(folder) / "README.md")
        made = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or f"Recipe {stored.recipe.name}",
            create_pr=create_pr,
        )
    return str(made)
