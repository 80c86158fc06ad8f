"""Checkpoints as the authors of DeiT, DINO, DINOv2 and MAE, and as training scripts publish them."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from builders import TINY, dense_model
from torch import Tensor

from toolchain.errors import ArtifactError, ModelError
from toolchain.recipe import ModelSection
from toolchain.surgery.load import Loaded, load_dense

State = dict[str, Tensor]
VIT, DINOV2 = "vit_tiny_patch16_224", "vit_small_patch14_dinov2"


def weights(name: str = VIT, seed: int = 3, **kwargs: object) -> State:
    model = dense_model(name, seed=seed, **{**TINY, **kwargs})
    return {key: tensor.clone() for key, tensor in model.module.state_dict().items()}


def below(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def loaded(path: Path, content: object, name: str = VIT, **kwargs: object) -> Loaded:
    torch.save(content, path / "a.pth")
    return load_dense(ModelSection(name=name, kwargs={**TINY, **kwargs}, checkpoint=str(path / "a.pth")))


def is_that(model: Loaded, state: State) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.module.state_dict().items())


def notes(model: Loaded) -> str:
    return "\n".join(model.provenance.get("notes", ()))


def test_deit(tmp_path):
    state = weights("deit_tiny_distilled_patch16_224")
    model = loaded(tmp_path, {"model": state}, "deit_tiny_distilled_patch16_224")
    assert is_that(model, state)
    assert not notes(model)


def test_dino_trains_a_teacher_and_a_student(tmp_path):
    """Weights of the average under "teacher", beside DINO's own head, which the model has no place for."""
    average, plain = weights(num_classes=0), weights(seed=4, num_classes=0)
    head = {"head.mlp.0.weight": torch.ones(4, 48), "head.last_layer.weight_v": torch.ones(9, 4)}
    content = {
        "student": {**below("module.backbone.", plain), **below("module.", head)},
        "teacher": {**below("backbone.", average), **head},
        "epoch": 3,
    }
    model = loaded(tmp_path, content, num_classes=0)
    assert is_that(model, average)
    assert "2 tensors without the prefix 'backbone.' were left out: head.mlp.0.weight" in notes(model)


def test_dino_under_one_key(tmp_path):
    average = weights(num_classes=0)
    content = {"model": {**below("teacher.backbone.", average), "teacher.dino_head.mlp.0.weight": torch.ones(4, 48)}}
    assert is_that(loaded(tmp_path, content, num_classes=0), average)


def official_dinov2(state: State, chunks: int = 0) -> State:
    """timm's names → those of the paper's repository; blocks in chunks, as they are trained."""
    state = dict(state)
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        place = state["pos_embed"].new_full((1, 1, state["cls_token"].shape[-1]), 0.25)
        state["pos_embed"] = torch.cat([place, state["pos_embed"]], 1)
        state["cls_token"] = state["cls_token"] - place
    out = {"mask_token": torch.ones(1, 48)}
    for name, tensor in state.items():
        new = name
        if chunks and name.startswith("blocks."):
            index = int(name.split(".")[1])
            new = name.replace(f"blocks.{index}.", f"blocks.{index // chunks}.{index}.")
        out[new] = tensor
    return out


@pytest.mark.parametrize("chunks", [0, 1])
@pytest.mark.parametrize("name", [DINOV2, "vit_small_patch14_reg4_dinov2"])
def test_dinov2(tmp_path, name, chunks):
    kwargs = {"img_size": 28, "patch_size": 14, "num_classes": 0}
    state = weights(name, **kwargs)
    model = loaded(tmp_path, official_dinov2(state, chunks), name, **kwargs)
    assert all(torch.allclose(x, state[key], atol=1e-6) for key, x in model.module.state_dict().items())
    assert "mask_token was left out" in notes(model)


def test_dinov2_with_a_gated_mlp(tmp_path):
    kwargs = {"img_size": 28, "patch_size": 14, "num_classes": 0}
    state = weights("vit_giant_patch14_dinov2", **kwargs)
    official = {
        k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for k, v in official_dinov2(state).items()
    }
    assert is_that(loaded(tmp_path, official, "vit_giant_patch14_dinov2", **kwargs), state)


def test_swin(tmp_path):
    """The paper's repository halves the grid where a stage ends, calls its classifier "head", and keeps what it computes."""
    kwargs = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    state = dense_model("swin_tiny_patch4_window7_224", num_classes=5, **kwargs).module.state_dict()
    official = {
        name.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc.", "head."): tensor
        for name, tensor in state.items()
    }
    official["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    torch.save({"model": official}, tmp_path / "a.pth")
    section = ModelSection(name="swin_tiny_patch4_window7_224", checkpoint=str(tmp_path / "a.pth"))

    def with_kwargs(**changes: object) -> Loaded:
        return load_dense(section.model_copy(update={"kwargs": {**kwargs, "num_classes": 5, **changes}}))

    assert is_that(with_kwargs(), state)
    assert "head.fc.weight, head.fc.bias) were left out: the model has no classifier" in notes(
        with_kwargs(num_classes=0)
    )
    assert "were resampled from 49 to 225 rows" in notes(with_kwargs(window_size=8))
    with pytest.raises(ModelError, match=r"has 5 classes, the model 7"):
        with_kwargs(num_classes=7)


DECODER = {
    "mask_token": torch.ones(1, 1, 16),
    "decoder_pos_embed": torch.ones(1, 5, 16),
    "decoder_embed.weight": torch.ones(16, 48),
    "decoder_blocks.0.norm1.weight": torch.ones(16),
    "decoder_norm.weight": torch.ones(16),
    "decoder_pred.bias": torch.ones(768),
}


def test_mae_without_its_decoder(tmp_path):
    state = weights(num_classes=0)
    model = loaded(tmp_path, {"model": {**state, **DECODER}}, num_classes=0)
    assert is_that(model, state)
    assert (
        "5 tensors (decoder_pos_embed, decoder_embed.weight, …) were left out: only its pre-training reads that"
        in notes(model)
    )


def test_mae_fine_tuned_pools_the_patches(tmp_path):
    state = weights(global_pool="avg")
    with pytest.raises(
        ArtifactError, match=r'last norm fc_norm \(the model: norm\); set model\.kwargs\.global_pool = "avg"'
    ):
        loaded(tmp_path, {"model": state})
    assert is_that(loaded(tmp_path, {"model": state}, global_pool="avg"), state)


def test_a_backbone_is_refused_for_a_model_with_classes_and_loads_without(tmp_path):
    state = weights(num_classes=0)
    with pytest.raises(
        ArtifactError, match=r"no classifier .*; set model\.kwargs\.num_classes = 0 for its features, or use"
    ):
        loaded(tmp_path, state)
    assert is_that(loaded(tmp_path, state, num_classes=0), state)


def test_a_training_checkpoint_of_timm(tmp_path):
    plain, average = weights(seed=1), weights(seed=2)
    content = {"epoch": 3, "arch": VIT, "state_dict": plain, "state_dict_ema": average, "version": 2, "metric": 0.7}
    assert is_that(loaded(tmp_path, content), average)


@pytest.fixture
def foreign() -> Iterator[type[dict[str, object]]]:
    """Lightning's mapping of hyper-parameters, of which a file holds the name alone."""
    name = "lightning_fabric.utilities.data"
    kind = type("AttributeDict", (dict,), {"__module__": name})
    modules = {".".join(name.split(".")[: count + 1]): types.ModuleType("m") for count in range(3)}
    modules[name].AttributeDict = kind  # type: ignore[attr-defined]
    present = {key: sys.modules[key] for key in modules if key in sys.modules}
    sys.modules.update(modules)
    yield kind
    for key in modules:
        sys.modules.pop(key)
    sys.modules.update(present)


@pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.", "model._orig_mod."])
def test_lightning(tmp_path, foreign, prefix):
    """Weights lie under the name of the module's attribute, beside what the trainer was set to."""
    state = weights()
    content = {
        "state_dict": {**below(prefix, state), "criterion.weight": torch.ones(7)},
        "hyper_parameters": foreign(lr=1e-3, name=VIT),
        "hparams_name": "kwargs",
        "pytorch-lightning_version": "2.5.0",
        "callbacks": {"ModelCheckpoint{}": {"best_model_score": torch.tensor(0.7), "best_model_path": "/a"}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}],
        "loops": {"fit_loop": {"state_dict": {}}},
    }
    model = loaded(tmp_path, content)
    assert is_that(model, state)
    assert "criterion.weight" in notes(model)
