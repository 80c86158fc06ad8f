"""`hf://org/name` as a model: fetched through the hub's own client, and a refusal is one sentence that says what to do."""

from __future__ import annotations

import pytest
import timm
import torch
from hub_server import Repository
from safetensors.torch import save

from toolchain.errors import ModelError
from toolchain.places import model_source
from toolchain.recipe import ModelSection, Recipe
from toolchain.surgery.load import load_dense

ARGUMENTS = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CONFIG = """{"architecture": "vit_tiny_patch16_224", "num_classes": 7,
 "model_args": {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
 "pretrained_cfg": {"input_size": [3, 16, 16], "num_classes": 7, "first_conv": "patch_embed.proj", "classifier": "head"}}"""


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=7, **ARGUMENTS).state_dict()


@pytest.fixture
def stocked(hub, weights):
    """A hub with one timm repository, whose branch `zeros` has other weights."""
    files = {"config.json": CONFIG.encode(), "model.safetensors": save(weights)}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    hub.repositories["org/name"] = Repository()
    hub.repositories["org/name"].branches["main"] |= files
    hub.repositories["org/name"].branches["zeros"] = {**files, "model.safetensors": save(zeros)}
    return hub


def test_a_repository_is_fetched_by_its_address(stocked, weights):
    loaded = load_dense(ModelSection(name="hf://org/name"))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.module.state_dict().items())
    assert loaded.provenance["pretrained"] == "hf-hub:org/name"
    assert loaded.ref.kwargs["embed_dim"] == 32


def test_a_revision_is_that_branch(stocked):
    loaded = load_dense(ModelSection(name="hf://org/name@zeros"))
    assert not any(tensor.any() for tensor in loaded.module.state_dict().values())


def test_both_spellings_are_one_recipe():
    assert model_source("hf://org/name@v1") == model_source("hf-hub:org/name@v1") == ("hf-hub", "org/name@v1")
    recipes = [Recipe.from_dict({"model": {"name": name}}) for name in ("hf://a/b", "hf-hub:a/b", "hf-hub:a/c")]
    assert recipes[0].digest == recipes[1].digest != recipes[2].digest


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf://org/none", "no repository org/none that you may read: check its name; if it is private, log in with"),
        ("hf://org/name@none", "org/name has no revision 'none': name a branch"),
        ("hf://org/empty", "org/empty lacks a file that is needed: name a repository of timm or of transformers"),
        ("hf://org/bare", "pretrained weights cannot be fetched: org/bare lacks a file"),
        ("hf://org/secret", "no repository org/secret that you may read"),
    ],
)
def test_what_cannot_be_fetched_is_told(stocked, monkeypatch, name, words):
    stocked.repositories["org/empty"] = Repository()
    stocked.repositories["org/bare"] = Repository()
    stocked.repositories["org/bare"].branches["main"]["config.json"] = CONFIG.encode()
    stocked.repositories["org/secret"] = Repository(private=True)
    if name == "hf://org/secret":
        monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ModelError, match=words) as told:
        load_dense(ModelSection(name=name))
    assert "\n" not in str(told.value)


def test_a_token_that_is_refused_is_told_and_not_repeated(stocked, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ModelError, match="log in with `hf auth login`") as told:
        load_dense(ModelSection(name="hf://org/name"))
    assert "hf_wrong" not in str(told.value)
