"""What the dense weights depend on, which decides whether they are trained again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from PIL import Image

from toolchain.pipeline.job import begin
from toolchain.pipeline.stages.dense import Dense, dense_inputs
from toolchain.recipe import ModelSection, Recipe


def test_classes_that_were_renamed_in_a_table_are_others(tmp_path):
    """Kind: a model that is taken from before and names its classes as they were called then."""
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("L", (8, 8), 10 * number) for number in range(20)]

    def inputs(*names):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
        rows = {"image": pictures, "label": [number % 2 for number in range(20)]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / names[0]))
        kwargs = {
            "img_size": 8,
            "patch_size": 4,
            "in_chans": 1,
            "num_classes": 2,
            "embed_dim": 16,
            "depth": 1,
            "num_heads": 1,
        }
        raw = {
            "model": {"name": "vit_tiny_patch16_224", "kwargs": kwargs, "pretrained": False},
            "data": {"source": f"hf:{tmp_path / names[0]}"},
            "train": {},
            "compress": {"method": "none"},
        }
        start = begin(Recipe.from_dict(raw))
        return start.source.digest, dense_inputs(start)

    (digest, cats), (same, dogs) = inputs("cat", "dog"), inputs("dog", "cat")
    assert digest == same
    assert cats != dogs


def test_without_a_checkpoint_the_current_folder_is_none(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    monkeypatch.chdir(tmp_path)

    def entries(checkpoint):
        model = ModelSection(name="vit_tiny_patch16_224", checkpoint=checkpoint)
        return [*Dense(SimpleNamespace(job=SimpleNamespace(recipe=SimpleNamespace(model=model)))).entries]

    assert entries(str(tmp_path))
    assert not entries("")
