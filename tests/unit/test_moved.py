"""Names that a user of version 0.1 could have imported still can be, with a warning that says where they are now."""

from __future__ import annotations

import importlib

import pytest

NAMES = [
    ("vlmrewrite.dialect", "define", "vlmrewrite.ops"),
    ("vlmrewrite.dialect", "per_image", "vlmrewrite.ops"),
    ("vlmrewrite.dialect", "like_member", "vlmrewrite.ops"),
    ("vlmrewrite.budget", "frozen_pass", "vlmrewrite.plan"),
    ("vlmrewrite.budget", "Budget", "vlmrewrite.plan"),
    ("vlmrewrite.budget", "Depth", "vlmrewrite.plan"),
    ("vlmrewrite.tokens", "Policy", "vlmrewrite.plan"),
    ("vlmrewrite.tokens", "Vision", "vlmrewrite.plan"),
    ("vlmrewrite.words", "Edit", "vlmrewrite.plan"),
    ("vlmrewrite.blocks", "Weights", "vlmrewrite.plan"),
    ("vlmrewrite.install", "routing", "vlmrewrite.runtime"),
    ("vlmrewrite.install", "prompt_ends", "vlmrewrite.runtime"),
    ("vlmrewrite.layerwise", "profile", "vlmrewrite.report"),
    ("vlmrewrite.cache", "PositionCache", "vlmrewrite.kvcache"),
    ("vlmrewrite.passes.dape_losses", "dape_loss", "vlmrewrite.passes.dape.losses"),
    ("vlmrewrite.testing.oracle", "oracle_logits", "vlmrewrite.oracle"),
    ("vlmrewrite.testing.interpreter", "trustworthy", "vlmrewrite.testing.triton.interpreter"),
]


@pytest.mark.parametrize(("old", "name", "new"), NAMES)
def test_old_names_can_be_imported_with_a_warning(old, name, new):

    module = importlib.import_module(old)
    with pytest.warns(DeprecationWarning, match=rf"{old}.{name} is now vlmrewrite\."):
        found = getattr(module, name)
    assert found is getattr(importlib.import_module(new), name)


def test_old_modules_are_attributes_of_their_package():
    import vlmrewrite.cache

    with pytest.warns(DeprecationWarning, match="vlmrewrite.kvcache"):
        assert vlmrewrite.cache.PositionCache is vlmrewrite.kvcache.PositionCache


def test_a_name_that_never_was_is_an_attribute_error():
    from vlmrewrite.moved import MOVED

    for old in MOVED:
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = importlib.import_module(f"vlmrewrite.{old}").nothing
