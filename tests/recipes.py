"""The recipe of a model so small that a run of it takes seconds."""

from __future__ import annotations

MODEL = """[model]
name = "vit_tiny_patch16_224"
kwargs = { img_size = 8, patch_size = 2, in_chans = 1, num_classes = 10, embed_dim = 32, depth = 2, num_heads = 2 }
pretrained = false
"""


def tiny_recipe(tables: str, source: str = "digits") -> str:
    """The text of a recipe: two blocks on some data, and the other tables as TOML."""
    return f'{MODEL}\n[data]\nsource = "{source}"\n\n{tables}'
