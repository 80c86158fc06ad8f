"""A recipe's [model] → a dense module: from a checkpoint that fits, or does not, or from none."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from builders import TINY, dense_model
from safetensors.torch import save_file
from torch import Tensor

from toolchain.errors import ArtifactError, ModelError, SlimvitError, StorageError
from toolchain.plan import NOT_KWARGS, ModelRef
from toolchain.recipe import ModelSection
from toolchain.surgery.candidates import architecture_of
from toolchain.surgery.load import load_checkpoint, load_dense, randomise_untrained
from toolchain.surgery.replay import create_dense

NAME = "deit_tiny_patch16_224"
SECTION = ModelSection(name=NAME, kwargs=TINY, pretrained=False)


def weights(**kwargs: object) -> dict[str, Tensor]:
    model = dense_model(NAME, seed=3, **{**TINY, **kwargs})
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def at(path: Path) -> ModelSection:
    return SECTION.model_copy(update={"checkpoint": str(path)})


def saved(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.path,))


# Layouts


LAYOUTS = {
    "plain": lambda state: state,
    "official DeiT": lambda state: {"model": state},
    "timm": lambda state: {"epoch": 3, "arch": NAME, "state_dict": state},
    "data parallel": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    "EMA in timm": lambda state: {"state_dict": {k: v + 1 for k, v in state.items()}, "state_dict_ema": state},
    "EMA in DeiT": lambda state: {"model": {k: v + 1 for k, v in state.items()}, "model_ema": state},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_published_layouts(tmp_path, layout, zipped):
    state, path = weights(), tmp_path / "a.pth"
    torch.save(LAYOUTS[layout](state), path, _use_new_zipfile_serialization=zipped)
    loaded = load_dense(at(path))
    module, provenance = loaded.module, loaded.provenance
    assert loaded.family.name == "vit"
    assert not module.training
    assert provenance["weights"] == "checkpoint"
    assert len(provenance["checkpoint_sha256"]) == 64
    found = module.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_safetensors(tmp_path):
    state, path = weights(), tmp_path / "a.safetensors"
    save_file(state, path)
    module = load_dense(at(path)).module
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_what_timm_drops_of_a_checkpoint_is_told(tmp_path):
    """Kind: dropping. timm leaves out the representation layer of old weights, and the model is then another function."""
    state = weights()
    state |= {"pre_logits.fc.weight": torch.eye(48), "pre_logits.fc.bias": torch.zeros(48)}
    (note,) = load_dense(at(saved(tmp_path / "a.pth", state))).provenance["notes"]
    one = load_dense(at(saved(tmp_path / "b.pth", {**weights(), "mask_token": torch.zeros(1)}))).provenance["notes"]
    assert one == ["Of the checkpoint b.pth, mask_token was left out: timm's model has no such part."]
    assert note.startswith(
        "Of the checkpoint a.pth, 2 tensors (pre_logits.fc.weight, pre_logits.fc.bias) were left out"
    )


def test_deit3_layer_scale_names(tmp_path):
    kwargs = {"name": "deit3_small_patch16_224"}
    model = dense_model(kwargs["name"], seed=1, **TINY)
    state = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v
        for name, v in model.module.state_dict().items()
    }
    assert any("gamma_1" in name for name in state)
    path = saved(tmp_path / "a.pth", {"model": state})
    section = ModelSection(name=kwargs["name"], kwargs=TINY, checkpoint=str(path))
    module = load_dense(section).module
    assert torch.equal(module.blocks[1].ls2.gamma, model.module.blocks[1].ls2.gamma)


def test_positions_are_resampled_to_another_image_size(tmp_path):
    """A 2×2 grid becomes 3×3: timm's own resampling, class token untouched; the rest is loaded as it is."""
    from timm.layers import resample_abs_pos_embed

    state = weights()
    path = saved(tmp_path / "a.pth", {"model": state})
    section = SECTION.model_copy(update={"checkpoint": str(path), "kwargs": {**TINY, "img_size": 48}})
    module = load_dense(section).module
    assert module.pos_embed.shape == (1, 10, 48)
    assert torch.equal(module.pos_embed[:, 0], state["pos_embed"][:, 0])
    assert torch.equal(module.pos_embed, resample_abs_pos_embed(state["pos_embed"], [3, 3]))
    assert torch.equal(module.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])


def test_a_checkpoint_wins_over_pretrained_and_nothing_is_fetched(tmp_path, watched):
    watched(timm, "create_model")
    calls = watched(timm.models, "load_pretrained")
    path = saved(tmp_path / "a.pth", weights())
    loaded = load_dense(at(path).model_copy(update={"pretrained": True}))
    assert {call.name for call in calls} == {"create_model"}
    assert not any(call.options.get("pretrained") for call in calls)
    assert loaded.provenance["weights"] == "checkpoint"


# Without a checkpoint


def test_initial_weights_follow_the_seed_and_leave_the_global_state_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    loaded = load_dense(SECTION, seed=1)
    one, provenance = loaded.module, loaded.provenance
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    same, other = load_dense(SECTION, seed=1).module, load_dense(SECTION, seed=2).module
    assert provenance == {"weights": "initial"}
    assert torch.equal(one.blocks[0].mlp.fc1.weight, same.blocks[0].mlp.fc1.weight)
    assert not torch.equal(one.blocks[0].mlp.fc1.weight, other.blocks[0].mlp.fc1.weight)


def test_a_dry_run_reads_no_weights(tmp_path):
    assert load_dense(at(tmp_path / "missing.pth"), weights=False).provenance == {"weights": "initial"}


def test_randomised_weights_leave_nothing_to_fold_away():
    module = load_dense(SECTION.model_copy(update={"name": "deit3_small_patch16_224"})).module
    matrices = {name: p.clone() for name, p in module.named_parameters() if p.ndim > 1}
    randomise_untrained(module, 0)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            assert parameter.unique().numel() == parameter.numel(), name
        else:
            assert torch.equal(parameter, matrices[name]), name
    gammas = [p.detach() for name, p in module.named_parameters() if "gamma" in name]
    assert gammas
    assert all(0.3 < float(p.mean()) < 0.7 for p in gammas)


# What is wrong with it


def refused(section: ModelSection, kind: type[SlimvitError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        load_dense(section)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).replace(str(Path(section.checkpoint).parent), "")) < 300


def test_a_missing_file_and_a_folder(tmp_path):
    refused(at(tmp_path / "a.pth"), StorageError, r"cannot read the checkpoint .*a\.pth: No such file")
    refused(at(tmp_path), StorageError, "is a folder; there is no checkpoint in it")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>\n<html>", b"\x80\x02", b"PK\x03\x04nothing"])
def test_a_file_that_is_no_checkpoint(tmp_path, suffix, content):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    refused(
        at(path),
        ArtifactError,
        rf"checkpoint .*a\.{suffix} is truncated or not a checkpoint .*; fetch or copy it again",
    )


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_truncated_file(tmp_path, form, share):
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pth")
    if form == "safetensors":
        save_file(weights(), path)
    else:
        torch.save(weights(), path, _use_new_zipfile_serialization=form == "zip")
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    refused(at(path), ArtifactError, "is truncated or not a checkpoint")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4:UserWarning")
@pytest.mark.parametrize("form", ["zip", "pickle", "pickle 0", "inside"])
def test_a_pickle_with_code_is_refused_and_never_run(tmp_path, form):
    trace, path = tmp_path / "executed", tmp_path / "a.pth"
    if form == "zip":
        torch.save({"model": weights(), "extra": Evil(trace)}, path)
    elif form == "inside":
        torch.save({**weights(), "head.weight": Evil(trace)}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(trace), protocol=0 if form == "pickle 0" else 4))
    refused(at(path), ArtifactError, r"holds pickled code.*, which slimvit never executes; save .* as \.safetensors")
    assert not trace.exists()
    if form == "zip":  # the proof that the file was dangerous
        torch.load(path, weights_only=False)
        assert trace.exists()


def test_training_arguments_beside_the_weights_do_not_hinder(tmp_path):
    """DeiT's own training script stores its argparse.Namespace, which timm allows by name."""
    state = weights()
    path = saved(tmp_path / "a.pth", {"model": state, "args": argparse.Namespace(lr=1e-3), "epoch": 3})
    module = load_dense(at(path)).module
    assert torch.equal(module.pos_embed, state["pos_embed"])


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file that looks like a TorchScript:UserWarning")
def test_a_torchscript_archive_counts_as_code(tmp_path):
    path = saved(tmp_path / "a.pth", weights())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{path.stem}/constants.pkl", b"\x80\x02).")
    refused(at(path), ArtifactError, "is a TorchScript program, which holds code; .* save its state_dict")


@pytest.mark.parametrize("value", [[1, 2], torch.zeros(3), {}, {"a": 1}, None, {"model": 3}, {"model": {}}])
def test_a_file_without_weights(tmp_path, value):
    refused(at(saved(tmp_path / "a.pth", value)), ArtifactError, "truncated or not a checkpoint|holds no tensors")


def test_other_classes(tmp_path):
    path = saved(tmp_path / "a.pth", {"model": weights(num_classes=9)})
    refused(at(path), ModelError, r"has 9 classes, the model 7; set model\.kwargs\.num_classes = 9")


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"depth": 3}, r"it has depth 3 \(the model: 2\); set model\.kwargs\.depth = 3$"),
        ({"depth": 1}, r"it has depth 1 \(the model: 2\); set model\.kwargs\.depth = 1$"),
        (
            {"embed_dim": 96},
            r"it has embed_dim 96 \(the model: 48\), .*; set model\.kwargs\.embed_dim = 96 and model\.kwargs\.num_heads",
        ),
        ({"mlp_ratio": 2}, r"it has MLP width 96 \(the model: 192\); set model\.kwargs\.mlp_ratio = 2$"),
        ({"init_values": 0.1}, r"it has LayerScale yes \(the model: no\)$"),
        ({"qkv_bias": False}, r"qkv bias no \(the model: yes\); set model\.kwargs\.qkv_bias = false$"),
        ({"in_chans": 1}, r"input channels 1 \(the model: 3\); set model\.kwargs\.in_chans = 1$"),
        ({"reg_tokens": 2}, r"register tokens 2 \(the model: 0\); set model\.kwargs\.reg_tokens = 2$"),
        ({"class_token": False, "global_pool": "avg"}, r"class token no .*model\.kwargs\.class_token = false"),
        ({"global_pool": "avg"}, r"last norm fc_norm \(the model: norm\); set model\.kwargs\.global_pool = \"avg\"$"),
        ({"depth": 3, "embed_dim": 96}, r"set model\.kwargs\.embed_dim = 96, model\.kwargs\.depth = 3 and model"),
    ],
)
def test_weights_of_another_architecture(tmp_path, kwargs, words):
    """Kind: a refusal that lists what was not found, and not what was. It says both, in a line, and what to set."""
    words = "^the checkpoint a.pth does not fit the model: .*" + words
    refused(at(saved(tmp_path / "a.pth", weights(**kwargs))), ArtifactError, words)


ADVICE = re.compile(r"model\.kwargs\.(\w+) = ([^\s,;]+)")


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("vit_tiny_patch16_224", {"num_classes": 9, "patch_size": 8}),
        ("vit_tiny_patch16_224", {"no_embed_class": True, "qkv_bias": False}),
        ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
        ("vit_small_patch16_rope_224", {"num_reg_tokens": 2, "depth": 1}),
    ],
)
def test_advice_leads_to_a_model_that_loads(tmp_path, name, stored):
    """Kind: advice that leads into the next refusal. What a message says to set is set, and the weights load."""
    torch.save(dense_model(name, **{**TINY, **stored}).module.state_dict(), tmp_path / "a.pth")
    section = ModelSection(name=name, kwargs=TINY, checkpoint=str(tmp_path / "a.pth"))
    with pytest.raises(SlimvitError) as caught:
        load_dense(section)
    kwargs = {key: json.loads(value) for key, value in ADVICE.findall(str(caught.value))}
    assert kwargs, str(caught.value)
    assert "notes" not in load_dense(section.model_copy(update={"kwargs": {**TINY, **kwargs}})).provenance


def test_weights_without_a_classifier_fit_a_model_without_one(tmp_path):
    """A backbone is refused for a model with a classifier, with both ways out; the advice leads to a model that loads."""
    state = {name: tensor for name, tensor in weights(depth=3).items() if not name.startswith("head.")}
    path = saved(tmp_path / "a.pth", state)
    refused(
        at(path),
        ArtifactError,
        r"no classifier \(the model: 7 classes\); set model\.kwargs\.depth = 3, model\.kwargs\.num_classes = 0 for its "
        "features, or use weights that have a classifier$",
    )
    kwargs = {**TINY, "depth": 3, "num_classes": 0}
    loaded = load_dense(at(path).model_copy(update={"kwargs": kwargs}))
    assert "notes" not in loaded.provenance
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.module.state_dict().items())


def test_attention_pooling_is_named_with_the_keyword_for_it(tmp_path):
    kwargs = {**TINY, "class_token": False, "global_pool": "map"}
    path = saved(tmp_path / "a.pth", timm.create_model("vit_tiny_patch16_224", **kwargs).state_dict())
    refused(at(path), ArtifactError, r'attention pooling yes .*; set .*model\.kwargs\.global_pool = "map"')


@pytest.mark.parametrize("size", [{}, {"img_size": 48}])
@pytest.mark.parametrize(
    ("name", "stored", "model", "words"),
    [
        ("deit3_small_patch16_224", {}, {}, "LayerScale yes .*no_embed_class = true"),
        ("vit_tiny_patch16_224", {"no_embed_class": True}, {}, "no_embed_class = true$"),
        ("vit_tiny_patch16_224", {}, {"no_embed_class": True}, "no_embed_class = false$"),
        ("vit_tiny_patch16_224", {"reg_tokens": 4}, {}, "set model.kwargs.reg_tokens = 4$"),
        ("vit_tiny_patch16_224", {"reg_tokens": 4}, {"reg_tokens": 4, "no_embed_class": True}, "embed_class = false$"),
    ],
)
def test_a_table_with_other_tokens_is_no_other_image_size(tmp_path, name, stored, model, words, size):
    """Kind: a message about the wrong thing. A row more or less in the position table is a token and not a patch."""
    torch.save(dense_model(name, **{**TINY, **stored, **size}).module.state_dict(), tmp_path / "a.pth")
    section = at(tmp_path / "a.pth").model_copy(update={"kwargs": {**TINY, **model}})
    refused(section, ArtifactError, words)
    with pytest.raises(ArtifactError) as caught:
        load_dense(section)
    assert "img_size" not in str(caught.value)


def test_a_table_without_tokens_is_resampled_as_such(tmp_path):
    torch.save(weights(no_embed_class=True, img_size=48), tmp_path / "a.pth")
    kwargs = {**TINY, "no_embed_class": True}
    loaded = load_dense(at(tmp_path / "a.pth").model_copy(update={"kwargs": kwargs}))
    assert "from a grid of 3×3 to 2×2" in loaded.provenance["notes"][0]


def test_everything_that_differs_is_told_at_once(tmp_path):
    """Kind: a refusal of one thing that hides another. Patch size and positions are not told before the width is."""
    path = saved(tmp_path / "a.pth", weights(embed_dim=96, patch_size=8, img_size=[16, 24]))
    words = r"embed_dim 96 .*patch size 8×8 .*set model\.kwargs\.embed_dim = 96, model\.kwargs\.patch_size = 8"
    for resample in (False, True):
        section = at(path).model_copy(update={"resample_patches": resample})
        with pytest.raises(ArtifactError, match=words if not resample else "embed_dim 96 .*embed_dim = 96 and"):
            load_dense(section)


@pytest.mark.parametrize(
    "change",
    [
        {"pos_embed": torch.zeros(5)},
        {"pos_embed": torch.zeros(1, 8, 48)},
        {"patch_embed.proj.weight": torch.zeros(48, 3)},
        {"patch_embed.proj.weight": torch.zeros(())},
        {"head.weight": torch.zeros(())},
        {"encoder": torch.zeros(1)},
        {"mask_token": torch.zeros(1), "norm.weight": torch.zeros(())},
        {"visual.class_embedding": torch.zeros(1)},
        {"preprocessor.patchifier.proj.weight": torch.zeros(1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_weights_that_timm_cannot_convert(tmp_path, change):
    kind = ModelError if change.get("pos_embed") is not None and change["pos_embed"].ndim == 3 else ArtifactError
    words = "of no square image" if kind is ModelError else "does not fit the model"
    refused(at(saved(tmp_path / "a.pth", {**weights(), **change})), kind, words)


def test_a_failed_load_is_all_or_nothing(tmp_path):
    loaded = load_dense(SECTION)
    module = loaded.module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ModelError):
        load_checkpoint(module, loaded.family, saved(tmp_path / "a.pth", weights(num_classes=9)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


# create_dense


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "deit_smal_patch16_224",
            r"timm cannot create deit_smal_patch16_224: Unknown model .*mean 'deit_small_patch16",
        ),
        ("vit_tiny_patch16_244", "did you mean 'vit_tiny_patch16_224'"),
        ("qqqq", r"timm cannot create qqqq: Unknown model \(qqqq\)$"),
        ("", "timm cannot create"),
    ],
)
def test_an_unknown_model_offers_the_nearest_name(name, words):
    with pytest.raises(ModelError, match=words) as caught:
        create_dense(ModelRef(name=name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"no_such_argument": 1}, "no_such_argument"),
        ({"embed_dim": 50, "num_heads": 3}, "timm cannot create vit_tiny_patch16_224"),
        ({"img_size": "large"}, "timm cannot create vit_tiny_patch16_224"),
        ({"global_pool": "nonsense"}, "timm cannot create vit_tiny_patch16_224"),
        ({"patch_size": 0}, "timm cannot create vit_tiny_patch16_224"),
        ({"act_layer": "nonsense"}, "timm cannot create vit_tiny_patch16_224"),
    ],
)
def test_arguments_that_timm_rejects(kwargs, words):
    with pytest.raises(ModelError, match=words):
        create_dense(ModelRef(name="vit_tiny_patch16_224", kwargs=kwargs))


def test_an_unsupported_model_is_refused_before_its_checkpoint_is_read(tmp_path):
    section = ModelSection(name="resnet18", checkpoint=str(tmp_path / "missing.pth"))
    refused(section, ModelError, "resnet18 is not supported")


@pytest.mark.parametrize("name", NOT_KWARGS)
def test_weights_do_not_come_in_through_the_kwargs(name: str) -> None:
    section = SECTION.model_copy(update={"kwargs": {**TINY, name: "x.pth"}})
    with pytest.raises(ModelError, match=rf"^model\.kwargs cannot hold {name}: .*use model\.checkpoint"):
        load_dense(section)


VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
ODD: list[dict[str, object]] = [
    *({"depth": value} for value in ("3", 0, -1, 2.5)),
    *({"num_heads": value} for value in (0, 5, 64)),
    *({"embed_dim": value} for value in (0, -32, 33, 10**9)),
    *({"img_size": value} for value in (0, 4, [16], "16", [])),
    *({"patch_size": value} for value in (0, 32, "8", -8)),
    *({"in_chans": value} for value in (0, -1, 2.5)),
    *({"mlp_ratio": value} for value in (-1.0, "4")),
    *({"num_classes": value} for value in (-1, "3", True)),
    *({"drop_rate": value} for value in (2.0, "x")),
    *({"drop_path_rate": value} for value in (1.5, -1, "x")),
    *({"norm_layer": value} for value in ("batchnorm2d", "layernorm2d")),
    {"global_pool": ""}, {"class_token": False}, {"reg_tokens": -1}, {"pos_embed": "rope"},
    {"weight_init": "zz"}, {"block_fn": "x"}, {"attn_layer": "xx"}, {"init_values": "a"}, {"self": 1},
    {"model_name": "x"}, {"model_cfg": 1}, {"kwargs_filter": ["depth"]}, {"device": "meta"}, {"pruned": True}, {"": 1},
]  # fmt: skip


@pytest.mark.parametrize("kwargs", ODD, ids=str)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_rope_224"])
def test_keywords_that_timm_cannot_build_or_run_are_faults_of_the_recipe(name, kwargs):
    """Kind: a library's error that looks like slimvit's own. Whatever timm and torch raise comes from the keywords."""
    with pytest.raises(ModelError) as caught:
        load_dense(ModelSection(name=name, kwargs={**VIT, **kwargs}, pretrained=False))
    assert "\n" not in str(caught.value)


def test_pixels_that_no_patch_covers_are_told(caplog):
    """Kind: cropping. A patch embedding leaves out the rows and columns that fill no patch."""
    section = ModelSection(name="vit_tiny_patch16_224", kwargs={**VIT, "img_size": [20, 16]}, pretrained=False)
    note = (
        "Images of 20×16 are no multiple of the patches of 8×8: the model does not see their last 4 rows and 0 columns."
    )
    assert load_dense(section).provenance["notes"] == [note] == caplog.messages


@pytest.mark.parametrize(
    ("head", "told"),
    [
        ((torch.nn.Linear(48, 9), torch.nn.GELU(), torch.nn.Linear(9, 2)), "takes as before"),
        (
            (torch.nn.Dropout(), torch.nn.Linear(48, 2)),
            "rename head.1.weight and head.1.bias to head.weight and head.bias",
        ),
    ],
)
def test_a_head_of_several_layers_is_told_to_be_none_of_timms_and_what_to_do(tmp_path, head, told, caplog):
    """Kind: a classifier that is left out, with a note that calls it none."""
    module = timm.create_model(NAME, **{**TINY, "num_classes": 0})
    module.head = torch.nn.Sequential(*head)
    torch.save(module.state_dict(), path := tmp_path / "a.pth")
    kwargs = {**TINY, "num_classes": 0}
    loaded = load_dense(ModelSection(name=NAME, kwargs=kwargs, checkpoint=str(path)))
    assert loaded.ref.output == "features"
    (note,) = loaded.provenance["notes"]
    assert "the outputs are the features that enter it" in note
    assert told in note
    caplog.clear()
    assert architecture_of(path, NAME)[1]["num_classes"] == 0
    assert told in caplog.text
