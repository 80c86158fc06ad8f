"""Files of tensors as people save them: what is taken, what is told, and what a file of another kind is called."""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import uuid
import zipfile
from collections import OrderedDict, defaultdict, deque
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from builders import STRUCTURES, TINY, close, dense_model, named, randomise
from safetensors.torch import save_file
from sweeps import swept
from torch import Tensor, nn

from toolchain.cli.main import main
from toolchain.errors import ArtifactError, SlimvitError, StorageError
from toolchain.recipe import ModelSection
from toolchain.surgery.anatomy import Anatomy, anatomy
from toolchain.surgery.checkpoint import read_checkpoint
from toolchain.surgery.load import Loaded, load_dense

NAME = "vit_tiny_patch16_224"
SECTION = ModelSection(name=NAME, kwargs=TINY, pretrained=False)


def weights(seed: int = 3, **kwargs: object) -> dict[str, Tensor]:
    model = dense_model(NAME, seed=seed, **{**TINY, **kwargs})
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def loaded(content: object, path: Path) -> Loaded:
    torch.save(content, path)
    return load_dense(SECTION.model_copy(update={"checkpoint": str(path)}))


def is_that(model: Loaded, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.module.state_dict().items())


PREFIXES = [
    *("module.", "model.", "backbone.", "timm_model.", "_orig_mod.", "module.model.", "_orig_mod.module.", "net.0."),
    *("_fsdp_wrapped_module.", "student.backbone.", "model._orig_mod."),
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_a_wrapper_is_taken_off(tmp_path, prefix):
    """Kind: a model that was saved inside of another. What stands before all of its names is no part of them."""
    state = weights()
    model = loaded({"state_dict": below(prefix, state), "epoch": 1}, tmp_path / "a.pth")
    assert is_that(model, state)
    assert "notes" not in model.provenance


@pytest.mark.parametrize("case", swept(STRUCTURES))
def test_what_timm_saves_of_a_structure_is_that_model_again(tmp_path, case):
    """Kind: names that only the models of one family have. Under a prefix, too, and nothing is told that was not done."""
    name, kwargs = named(case)
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, **kwargs)).eval()
    torch.save(below("model.", model.state_dict()), tmp_path / "a.pth")
    result = load_dense(ModelSection(name=name, kwargs=kwargs, checkpoint=str(tmp_path / "a.pth"), output=None))
    images = torch.randn(2, *result.family.input_size(result.module), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert close(model(images), result.module(images))
    assert not [note for note in result.provenance.get("notes", ()) if "checkpoint" in note]


def test_a_table_of_positions_of_another_grid_is_refused_with_the_keyword_for_it(tmp_path):
    """Kind: advice that a family has no keyword for. NaFlexVit's positions have a grid and no number."""
    kwargs = {"depth": 1, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
    model = timm.create_model("naflexvit_base_patch16_gap", **kwargs, pos_embed_grid_size=[3, 2])
    torch.save(model.state_dict(), tmp_path / "a.pth")
    section = ModelSection(name="naflexvit_base_patch16_gap", kwargs=kwargs, checkpoint=str(tmp_path / "a.pth"))
    with pytest.raises(ArtifactError, match=r"set model\.kwargs\.pos_embed_grid_size = \[3, 2\]$"):
        load_dense(section)


def test_what_no_model_has_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(
        ArtifactError,
        match=r"it also has aux\.weight; .* or take out of the file what the trained model does not compute with",
    ):
        loaded({**weights(), "aux.weight": torch.zeros(3)}, tmp_path / "a.pth")


@pytest.mark.parametrize(
    "parts",
    [("weight_orig", "weight_mask"), ("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")],
)  # fmt: skip
def test_parts_of_a_weight_are_to_be_joined(tmp_path, parts):
    state = weights()
    weight = state.pop("blocks.0.mlp.fc1.weight")
    state |= {f"blocks.0.mlp.fc1.{part}": weight for part in parts}
    with pytest.raises(ArtifactError, match=rf"fc1\.{parts[0]} is a part of a weight: join them .*prune\.remove"):
        loaded(state, tmp_path / "a.pth")


def narrower(state: dict[str, Tensor]) -> None:
    for name, axis in (("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)):
        state[f"blocks.0.mlp.{name}"] = state[f"blocks.0.mlp.{name}"].narrow(axis, 0, 96)


def split(state: dict[str, Tensor]) -> None:
    weight = state.pop("blocks.1.attn.proj.weight")
    state |= {"blocks.1.attn.proj.down.weight": weight[:8], "blocks.1.attn.proj.up.weight": weight[:, :8]}


@pytest.mark.parametrize(
    ("change", "words"),
    [(narrower, r"blocks of different widths \(blocks\.\d\.mlp\.fc1"), (split, r"blocks\.1\.attn\.proj\.down\.weight instead")],
)  # fmt: skip
def test_a_model_that_was_made_smaller_is_no_dense_one(tmp_path, change, words):
    """Once another width of all blocks was advised, which does not fit either."""
    state = weights()
    change(state)
    with pytest.raises(ArtifactError, match=rf"it has {words}.* made smaller; use its dense weights"):
        loaded(state, tmp_path / "a.pth")


def test_a_wrapper_in_the_middle_of_names(tmp_path):
    """Kind: blocks that were compiled or checkpointed one by one carry a wrapper's name inside of theirs."""
    state = weights()
    assert is_that(
        loaded({k.replace("blocks.1.", "blocks.1._orig_mod."): v for k, v in state.items()}, tmp_path / "a.pth"), state
    )


KEYS = ["state_dict", "model", "model_state_dict", "net", "teacher", "student", "module", "weights", "ema.model", "a.b"]


@pytest.mark.parametrize("key", KEYS)
def test_weights_under_any_key(tmp_path, key):
    """Kind: tensors one level down, under whatever name, beside a trainer's own state."""
    state = weights()
    content: object = state
    for part in reversed(key.split(".")):
        content = {part: content}
    momentum = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}
    assert isinstance(content, dict)
    model = loaded({**content, "optimizer": momentum, "epoch": 3, "loss": 0.5}, tmp_path / "a.pth")
    assert is_that(model, state)
    assert "notes" not in model.provenance


def test_an_average_without_names_is_told(tmp_path):
    """Kind: other weights than those that were evaluated. torch_ema keeps an average as a row of tensors."""
    state, ema = weights(), {"decay": 0.99, "shadow_params": [2 * tensor for tensor in weights().values()]}
    notes = loaded({"model": state, "ema": ema}, tmp_path / "a.pth").provenance["notes"]
    assert len(notes) == 1
    assert f"{len(state)} tensors of the weights' shapes without names, under 'ema.shadow_params'" in notes[0]
    for other in ({"optimizer": ema}, {"rng": [torch.zeros(5056), torch.zeros(16)]}):  # of no model
        assert "notes" not in loaded({"model": state, **other}, tmp_path / "b.pth").provenance


@pytest.mark.parametrize(
    ("taken", "left"),
    [("state_dict_ema", "state_dict"), ("model_ema", "model"), ("teacher", "student"), ("ema", "model")],
)
def test_of_several_weights_that_differ_the_choice_is_told(tmp_path, taken, left):
    """Kind: a silent choice. A file with an average beside the weights gives the average, and says so."""
    average, plain = weights(1), weights(2)
    model = loaded({left: plain, taken: average}, tmp_path / "a.pth")
    assert is_that(model, average)
    assert model.provenance["notes"] == [
        (
            f"The checkpoint holds several weights that differ: those under '{taken}' were taken, not those under '{left}'. "
            "To use others, save them alone."
        )
    ]
    assert "notes" not in loaded({left: average, taken: average}, tmp_path / "b.pth").provenance


def test_of_two_models_side_by_side_the_one_that_fits_is_taken(tmp_path):
    """A distillation's module holds both: the student is the model that is asked for, whatever its teacher is."""
    state, large = weights(), weights(embed_dim=96)
    model = loaded({**below("teacher.", large), **below("student.", state)}, tmp_path / "a.pth")
    assert is_that(model, state)
    assert "notes" not in model.provenance


def test_tensors_that_stand_outside_are_told(tmp_path):
    """Kind: dropping. What does not have the prefix of the model is left out, by name."""
    state = weights()
    model = loaded({**below("model.", state), "criterion.weight": torch.ones(7)}, tmp_path / "a.pth")
    assert is_that(model, state)
    assert model.provenance["notes"] == [
        "Of the checkpoint, 1 tensor without the prefix 'model.' was left out: criterion.weight."
    ]


HEAD = ("head.weight", "head.bias")


@pytest.mark.parametrize("outer", ["", "module.", "model."])
def test_a_classifier_beside_a_prefix_is_taken_and_told(tmp_path, outer):
    """Kind: a part that lies elsewhere. A wrapper holds a model without a classifier, and its own beside it."""
    state = weights()
    content = {outer + (name if name in HEAD else f"backbone.{name}"): tensor for name, tensor in state.items()}
    model = loaded(content, tmp_path / "a.pth")
    assert is_that(model, state)
    (note,) = model.provenance["notes"]
    assert note == (
        f"Of the checkpoint, {outer}head.weight, {outer}head.bias beside the prefix '{outer}backbone.' were taken too: "
        "the model lacked them."
    )


@pytest.mark.parametrize(
    ("names", "shown"),
    [(("fc.weight", "fc.bias"), "fc.weight, fc.bias"), (("head.weight", "bias"), "head.weight, bias")],
)
def test_what_lies_beside_a_prefix_and_is_not_the_models_is_named(tmp_path, names, shown):
    """A part is taken whole, under its own names, or not at all: half a classifier would be half at random."""
    state = weights()
    other = {new: state.pop(old) for old, new in zip(HEAD, names, strict=True)}
    with pytest.raises(ArtifactError, match=rf"no classifier .*; beside 'backbone\.' the file also holds {shown}$"):
        loaded({**below("backbone.", state), **other}, tmp_path / "a.pth")


def test_a_classifier_of_other_classes_beside_a_prefix(tmp_path):
    state = weights(num_classes=9)
    content = {(name if name in HEAD else f"backbone.{name}"): tensor for name, tensor in state.items()}
    with pytest.raises(SlimvitError, match=r"has 9 classes, the model 7; set model\.kwargs\.num_classes = 9"):
        loaded(content, tmp_path / "a.pth")


def test_of_two_classifiers_the_nearer_is_taken_and_the_other_told(tmp_path):
    state = weights()
    content = {f"model.{name}" if name in HEAD else f"model.backbone.{name}": tensor for name, tensor in state.items()}
    model = loaded({"head.weight": torch.ones(7, 48), "head.bias": torch.ones(7), **content}, tmp_path / "a.pth")
    assert is_that(model, state)
    assert "were left out: head.weight, head.bias" in model.provenance["notes"][1]


@pytest.mark.parametrize("depth", [3, 6])
def test_weights_are_looked_for_deeper_where_there_are_none_above(tmp_path, depth):
    state = weights()
    content: object = state
    for index in range(depth):
        content = {f"k{index}": content, "epoch": index}
    assert is_that(loaded(content, tmp_path / "a.pth"), state)


def test_a_mapping_that_holds_itself_ends(tmp_path):
    """Kind: a hostile file. References in circles, and many to one mapping, take no time."""
    content: dict[str, object] = {}
    for _ in range(4):
        content = {str(index): content for index in range(500)}
    content |= {str(index): content for index in range(20)}
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ArtifactError, match="holds no tensors by name: only 0, 1"):
        read_checkpoint(tmp_path / "a.pth")


HARMLESS = {
    "array": np.arange(6).reshape(2, 3),
    "objects": np.array([1, "a", None], object),
    "records": np.zeros(2, [("a", "i4")]),
    "numpy date": np.datetime64("2020-01-01"),
    "numpy's random state": np.random.RandomState(0).get_state(),
    "path": Path("/a/b"),
    "pure path": PureWindowsPath("a"),
    "counts": defaultdict(int, a=3),
    "lists": defaultdict(list, a=[1]),
    "nested": defaultdict(dict, {"b": defaultdict(float, c=1.0)}),
    "date": datetime(2020, 1, 2, tzinfo=UTC),
    "span": timedelta(3),
    "queue": deque([1, 2], maxlen=3),
    "arguments": argparse.Namespace(out=Path("x"), when=date(2020, 1, 2)),
    "identity": uuid.UUID(int=3),
    "decimal": Decimal("0.1"),
    "others": [frozenset([1]), range(3), slice(1, 2), 3j, b"a", 2**80],
}


@pytest.mark.parametrize("key", HARMLESS)
@pytest.mark.parametrize("zipped", [True, False])
def test_harmless_values_beside_weights_are_no_code(tmp_path, key, zipped):
    """Kind: a value that is taken for code. Trainers save arrays, paths and dates beside the weights."""
    state, path = weights(), tmp_path / "a.pth"
    torch.save({"beside": HARMLESS[key], "state_dict": state}, path, _use_new_zipfile_serialization=zipped)
    assert is_that(load_dense(SECTION.model_copy(update={"checkpoint": str(path)})), state)


def test_weights_in_a_mapping_of_another_type(tmp_path):
    state = weights()
    assert is_that(loaded(defaultdict(dict, {"model": defaultdict(int, state)}), tmp_path / "a.pth"), state)


class Hostile:
    """Reconstructed by whatever it is told."""

    def __init__(self, *reduced: object) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[object, ...]:
        return self.reduced


def touch(path: str) -> dict[str, int]:
    Path(path).touch()
    return {}


def hostile(trace: str) -> dict[str, object]:
    """Values that run `touch` if their constructors are called as a pickle says."""
    call = Hostile(touch, (trace,))
    return {
        "a call": call,
        "a factory": defaultdict(functools.partial(touch, trace)),
        "a call as a factory": Hostile(defaultdict, (touch, {"a": 1})),
        "in an array": np.array([call, 1], object),
        "in a dtype": Hostile(np.dtype, (call,)),
        "in a path": Hostile(PurePosixPath, (call,)),
        "in a date": Hostile(datetime, (call, 1, 1)),
        "in arguments": argparse.Namespace(a=call),
        "as a state": Hostile(argparse.Namespace, (), {"__class__": touch}),
        "an attribute": Hostile(getattr, (Path(trace), "touch")),
        "an evaluation": Hostile(eval, (f"open({trace!r}, 'w')",)),
        "a shell": Hostile(os.system, (f"touch {trace}",)),
        "a mapping": Mapped(a=call),
    }


class Mapped(OrderedDict):  # type: ignore[type-arg]
    """A type of somebody's own: which of them run something cannot be told by name."""


@pytest.mark.parametrize("key", hostile(""))
@pytest.mark.parametrize("zipped", [True, False])
def test_values_that_run_something_are_refused_by_name_and_not_run(tmp_path, key, zipped):
    """Kind: a hostile file. What is let through is let through by name, and its own constructor is not called either."""
    trace, path = tmp_path / "executed", tmp_path / "a.pth"
    value = hostile(str(trace))[key]
    torch.save({"beside": value, "state_dict": weights()}, path, _use_new_zipfile_serialization=zipped)
    names = r"touch|functools\.partial|getattr|eval|system|Mapped"
    with pytest.raises(ArtifactError, match=rf"holds pickled code \([^)]*({names})") as caught:
        read_checkpoint(path)
    assert not trace.exists()
    for harmless in ("numpy", "pathlib", "datetime", "defaultdict", "Namespace"):
        assert f"({harmless}" not in str(caught.value)


def test_constructors_of_harmless_values_are_not_called(tmp_path):
    """Kind: a hostile file. numpy's own would take numbers of it for sizes and, without a check, for addresses."""
    scalar, rebuild = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    crash = Hostile(scalar, (Hostile(np.dtype, ([("a", "O")],)), np.full(4, 0x4141414141414141)))
    torch.save({"a": crash, "b": Hostile(rebuild, (np.ndarray, (10**15,), b"b")), **weights()}, tmp_path / "a.pth")
    assert is_that(load_dense(SECTION.model_copy(update={"checkpoint": str(tmp_path / "a.pth")})), weights())


def test_arrays_in_place_of_tensors_are_named_as_such(tmp_path):
    torch.save({"model": {name: tensor.numpy() for name, tensor in weights().items()}}, tmp_path / "a.pth")
    with pytest.raises(ArtifactError, match=r"only model; its arrays are NumPy's: give each to torch\.from_numpy"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("value", [np.float64(0.9), np.float32(1), np.int64(3), np.bool_(True)])
@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_scalars_are_no_code(tmp_path, value, zipped):
    state, path = weights(), tmp_path / "a.pth"
    torch.save({"state_dict": state, "best": value}, path, _use_new_zipfile_serialization=zipped)
    assert is_that(load_dense(SECTION.model_copy(update={"checkpoint": str(path)})), state)


# Numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_exactly(tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in weights().items()}
    model = loaded(state, tmp_path / "a.pth")
    assert all(tensor.dtype == torch.float32 for tensor in model.module.state_dict().values())
    assert is_that(model, {name: tensor.float() for name, tensor in state.items()})
    assert "notes" not in model.provenance


def test_double_precision_is_rounded_and_told(tmp_path):
    """Kind: casting. Loading float64 into a float32 model loses bits without a word of torch's."""
    model = loaded({name: tensor.double() for name, tensor in weights().items()}, tmp_path / "a.pth")
    assert any("rounded to float32" in note for note in model.provenance["notes"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.to(torch.int8), "holds head.weight as int8: it was quantised"),
        (lambda t: t.to(torch.float8_e4m3fn), "holds head.weight as float8_e4m3fn: it was quantised"),
        (lambda t: t.to_sparse(), "holds head.weight as a sparse tensor"),
        (lambda t: t.to("meta"), "holds head.weight as a meta tensor"),
        (lambda t: t * torch.nan, "holds NaN or infinity in head.weight: its training diverged"),
        (lambda t: t.double() * 1e300, "beyond the range of float32"),
    ],
)
def test_numbers_that_no_model_can_have(tmp_path, change, words):
    """Kind: casting. torch copies integers, NaN and overflows into weights as if they were some."""
    state = weights()
    with pytest.raises(ArtifactError, match=words):
        loaded({**state, "head.weight": change(state["head.weight"])}, tmp_path / "a.pth")


# Sizes


def at_size(tmp_path: Path, stored: object, wanted: object, **more: object) -> Loaded:
    torch.save(weights(img_size=stored), tmp_path / "a.pth")
    kwargs = {**TINY, "img_size": wanted, **more}
    return load_dense(SECTION.model_copy(update={"checkpoint": str(tmp_path / "a.pth"), "kwargs": kwargs}))


@pytest.mark.parametrize(
    ("stored", "wanted", "said"),
    [
        (32, 64, "taken for those of a square image, were resampled from a grid of 2×2 to 4×4, that is from images of 32×32 to 64×64 pixels"),
        (64, 32, "from a grid of 4×4 to 2×2"),
        (64, [32, 48], "from a grid of 4×4 to 2×3"),
    ],
)  # fmt: skip
def test_another_image_size_is_resampled_and_told(tmp_path, caplog, stored, wanted, said):
    """Kind: resampling. Positions of another image size cost accuracy: model.json, the report and stderr say from what."""
    model = at_size(tmp_path, stored, wanted)
    (note,) = model.provenance["notes"]
    assert note.startswith("The position embeddings of the checkpoint a.pth")
    assert said in note
    assert caplog.messages == [note]


def test_the_same_size_says_nothing(tmp_path, caplog):
    assert "notes" not in at_size(tmp_path, 32, 32).provenance
    assert not caplog.messages


def test_a_wide_image_of_the_same_size_is_loaded_as_it_is(tmp_path):
    """Kind: a table that is taken for a square's. timm would resample 4×4 rows of positions that are 2×8."""
    state = weights(img_size=[32, 128])
    model = at_size(tmp_path, [32, 128], [32, 128])
    assert is_that(model, state)
    (note,) = model.provenance["notes"]
    assert note == (
        "The 16 position embeddings of the checkpoint a.pth were taken for a grid of 2×8, the model's; the file does not "
        "say of which image size they are."
    )
    other = at_size(tmp_path, [32, 48], [32, 48])
    assert "notes" not in other.provenance


def test_a_wide_image_of_another_size_is_refused_in_plain_words(tmp_path):
    with pytest.raises(SlimvitError, match=r"for 6 patches, the model for 4×4; they are of no square image.*img_size"):
        at_size(tmp_path, [32, 48], 64)


@pytest.mark.parametrize("case", [16, [16, 8]])
def test_another_patch_size_is_refused_unless_it_was_asked_for(tmp_path, case):
    """Kind: resampling. A patch embedding at another size is another layer: only a key in the recipe asks for it."""
    torch.save(weights(patch_size=8), tmp_path / "a.pth")
    kwargs = {**TINY, "patch_size": case}
    section = SECTION.model_copy(update={"checkpoint": str(tmp_path / "a.pth"), "kwargs": kwargs})
    with pytest.raises(
        SlimvitError, match=r"has patches of 8×8 pixels, the model 16×\d+; set model.kwargs.patch_size = 8"
    ):
        load_dense(section)
    model = load_dense(section.model_copy(update={"resample_patches": True}))
    assert [
        note for note in model.provenance["notes"] if "patch embedding of the checkpoint a.pth was resampled" in note
    ]
    assert [note for note in model.provenance["notes"] if "from a grid of 4×4" in note]


# Tokens


def test_distilled_weights_and_plain_models_do_not_mix(tmp_path):
    distilled = dense_model("deit_tiny_distilled_patch16_224", **TINY).module.state_dict()
    with pytest.raises(
        ArtifactError, match=r"distillation token yes .the model: no.; set model.name to its distilled form"
    ):
        loaded(distilled, tmp_path / "a.pth")
    torch.save(weights(), tmp_path / "b.pth")
    section = SECTION.model_copy(
        update={"name": "deit_tiny_distilled_patch16_224", "checkpoint": str(tmp_path / "b.pth")}
    )
    with pytest.raises(ArtifactError, match=r"distillation token no .*set model.name to a form that is not distilled"):
        load_dense(section)


@pytest.mark.parametrize(
    ("names", "whose"),
    [
        (
            "vit.encoder.layer.{}.attention.attention.query.weight",
            "Hugging Face transformers; set model.checkpoint to its",
        ),
        (
            "vision_model.encoder.layers.{}.self_attn.q_proj.weight",
            "Hugging Face transformers; set model.checkpoint to its",
        ),
        ("swin.encoder.layers.{}.blocks.0.attention.self.query.weight", "Hugging Face transformers"),
        ("encoder.layers.encoder_layer_{}.ln_1.weight", "torchvision"),
        ("layer1.{}.conv1.weight", "a ResNet"),
        ("a.{}.b", "its names are not timm's"),
    ],
)
def test_foreign_names_are_told_by_whose_they_are(tmp_path, names, whose):
    with pytest.raises(ArtifactError, match=whose) as caught:
        loaded({names.format(index): torch.ones(3) for index in range(200)}, tmp_path / "a.pth")
    assert len(str(caught.value)) < 300


# Other kinds of file


def test_a_folder_says_what_to_name(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(weights(), folder / "model.safetensors")
    with pytest.raises(StorageError, match=r"is a folder; name a file in it: model\.safetensors"):
        read_checkpoint(folder)
    (folder / ".metadata").touch()
    with pytest.raises(StorageError, match=r"is a folder; torch saved it in parts: join them with .*dcp_to_torch"):
        read_checkpoint(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(StorageError, match=r"is a folder; set model\.name = 'local-dir:.*hub'"):
        read_checkpoint(folder)


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.npy", b"")


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("a.npz", lambda path: np.savez(path, a=np.ones(3)), "is a NumPy archive; .*save the state_dict"),
        ("a.pth", archive, "is a NumPy archive"),
        ("a.h5", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), "is a file of Keras"),
        ("a.pth", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid x"), "a pointer of Git LFS"),
        ("a.gguf", lambda path: path.write_bytes(b"GGUF\3\0\0\0"), "is a GGUF file, of quantised weights"),
        ("a.onnx", lambda path: path.write_bytes(b"\x08\x0a"), "is a graph and not a checkpoint"),
        ("model.safetensors.index.json", lambda path: path.write_text("{}"), "is JSON and not a checkpoint"),
        ("recipe.toml", lambda path: path.write_text("[model]\n"), "is TOML and not a checkpoint; a recipe is carried out by `slimvit run`"),
        ("a.pth", lambda path: torch.save(nn.Linear(2, 2), path), r"a whole pickled module \(torch\.nn\.modules"),
        ("a.pth", lambda path: torch.save({"a": SimpleNamespace(b=1)}, path), r"holds pickled code \(types\.SimpleNamespace\)"),
        ("a.pth", lambda path: torch.save([1, 2], path), "holds no tensors by name: it is a list"),
        ("a.pth", lambda path: torch.save({"epoch": 1, "args": {}}, path), "holds no tensors by name: only args, epoch"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_has_its_own_line(tmp_path, name, write, words):
    write(tmp_path / name)
    with pytest.raises(ArtifactError, match=words) as caught:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 300


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".safetensors", ""])
def test_the_content_and_not_the_suffix_says_what_a_file_is(tmp_path, suffix):
    state = weights()
    save_file(state, tmp_path / f"a{suffix}")
    assert read_checkpoint(tmp_path / f"a{suffix}").form == "safetensors"
    if suffix != ".safetensors":
        torch.save(state, tmp_path / f"b{suffix}")
        assert read_checkpoint(tmp_path / f"b{suffix}").form == "torch"


# inspect


def test_inspect_describes_a_checkpoint(tmp_path, capsys):
    path = tmp_path / "a.pth"
    torch.save({"state_dict": below("model.", weights()), "epoch": 3, "lr": 0.1}, path)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(path), "--json"])
    assert ended.value.code == 0
    facts = json.loads(capsys.readouterr().out)
    assert {name: facts[name] for name in ("kind", "format", "key", "prefix", "dtype", "names")} == {
        "kind": "checkpoint", "format": "torch", "key": "state_dict", "prefix": "model.", "dtype": "float32", "names": "timm"
    }  # fmt: skip
    assert facts["tensors"] == len(weights())
    assert facts["params"] == sum(tensor.numel() for tensor in weights().values())
    assert facts["beside"] == ["epoch", "lr"]
    wanted = {"embed_dim": 48, "depth": 2, "patch_size": "16×16", "in_chans": 3, "grid": "2×2", "img_size": "32×32"}
    assert {name: facts[name] for name in wanted} == wanted
    assert (facts["classes"], facts["norm"], facts["class_token"]) == (7, "norm", True)


def test_what_names_and_shapes_do_not_say_stays_open():
    assert anatomy({"a": torch.ones(3)}) == Anatomy()
    assert anatomy({"blocks.0.norm1.weight": torch.ones(8), "pos_embed": torch.ones(3)}).positions is None
    assert Anatomy(positions=12, class_token=True).grid is None
    assert Anatomy(positions=17, class_token=True).grid == (4, 4)


@pytest.mark.slow
def test_reading_a_checkpoint_runs_nothing(tmp_path):
    """The allowed constructors are listed for one call alone: torch refuses the same file before and after."""
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(2), "best": np.float64(1)}, path)
    code = (
        "import sys, torch, pathlib\n"
        "from toolchain.surgery.checkpoint import read_checkpoint\n"
        "before = set(torch.serialization.get_safe_globals())\n"
        "read_checkpoint(pathlib.Path(sys.argv[1]))\n"
        "assert set(torch.serialization.get_safe_globals()) == before"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
