"""`slimvit` below torchrun: fine-tuning is shared, everything else is one process's."""

import copy
import json

import pytest
import torch
from builders import in_two_processes, random_plan
from safetensors.torch import load_file
from torch import nn

from toolchain.errors import RecipeError
from toolchain.pipeline.job import prepare
from toolchain.pipeline.run import run
from toolchain.recipe import Recipe
from toolchain.surgery.mask import mask_model
from toolchain.surgery.replay import save_model

RECIPE = """[model]
name = "vit_tiny_patch16_224"
kwargs = { img_size = 8, patch_size = 4, in_chans = 1, num_classes = 10, embed_dim = 48, depth = 2, num_heads = 3 }
pretrained = false
[data]
source = "digits"
[train]
[budget]
params = 0.6
[finetune]
epochs = 1
lr = 1e-3
batch_size = 100
"""


@pytest.fixture
def arguments(tmp_path):
    """`finetune` and what it takes, but --out."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    dense = prepare(Recipe.load(recipe)).dense
    nn.init.normal_(dense.module.head.weight, std=0.3, generator=torch.Generator().manual_seed(0))  # timm's is 0
    save_model(dense, tmp_path / "dense")
    masked = mask_model(dense, copy.deepcopy(dense.module), random_plan(dense, low_rank=False))
    save_model(masked, tmp_path / "masked")
    return ["finetune", tmp_path / "masked", "--recipe", recipe, "--teacher", tmp_path / "dense", "--json"]


@pytest.mark.slow
def test_the_documented_line_gives_the_model_of_one_process(command, arguments, tmp_path):
    ended = in_two_processes("-m", "toolchain", *arguments, "--out", tmp_path / "two")
    assert ended.returncode == 0, ended.stderr
    two = json.loads(ended.stdout)  # one document: one process speaks
    outcome = command(*arguments, "--out", tmp_path / "one")
    assert outcome.code == 0, outcome.err
    one = json.loads(outcome.out)
    assert one["finetune"]["kept"] == two["finetune"]["kept"] == "after"
    assert one["finetune"]["before"] == two["finetune"]["before"]
    assert {file.name for file in (tmp_path / "two").iterdir()} == {"model.safetensors", "model.json"}
    shared, alone, before = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one", "masked"))
    assert max((alone[name] - before[name]).abs().max() for name in alone) > 1e-3, "it was trained"
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=0, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_batch_that_two_cannot_share_ends_both(arguments, tmp_path):
    ended = in_two_processes(
        "-m", "toolchain", *arguments, "--set", "finetune.batch_size=33", "--out", tmp_path / "two"
    )
    assert ended.returncode != 0
    assert "batch_size 33 is shared by 2 processes" in ended.stderr
    assert not (tmp_path / "two").exists()


def test_what_one_process_does_is_refused_to_several(command, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="torchrun --nproc_per_node 2 -m toolchain finetune DIR/masked"):
        run(recipe, tmp_path / "out")
    for verb in (["run", recipe], ["load", recipe], ["compress", tmp_path, "--recipe", recipe]):
        outcome = command(*verb, "--out", tmp_path / "out")
        assert outcome.code == 2
        assert "only fine-tuning runs in several" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_source_without_labels_is_fine_tuned_and_judged_by_the_teacher(command, arguments, tmp_path):
    outcome = command(*arguments, "--set", "finetune.labels=false", "--out", tmp_path / "one")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)["finetune"]
    assert (found["loss"], found["judged_by"], found["kept"]) == ("imitation", "divergence", "after")
    assert found["after"] < found["before"]
    outcome = command(*arguments[:-1], "--set", "finetune.labels=false", "--out", tmp_path / "again")
    assert f"KL divergence from the dense model {found['before']:.3g} before, {found['after']:.3g} after" in outcome.out
