"""Outputs of a model without a classifier: the same at full size, masked, sliced, split and as an ONNX file."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import onnxruntime as ort
import pytest
import timm
import torch
from builders import STRUCTURES, TINY, named, random_plan, randomise
from pydantic import ValidationError
from sweeps import swept

from toolchain.compress.damage import finish, way_through
from toolchain.compress.sensitivity import Teacher
from toolchain.errors import ArtifactError, ModelError, RecipeError
from toolchain.export.stage import Export
from toolchain.families import family_of
from toolchain.families.layered import Layered
from toolchain.likelihood import CATEGORICAL, parts_of
from toolchain.model import Preprocess, TimmModel, run_stage
from toolchain.outputs import KWARGS, output_names
from toolchain.plan import ModelRef
from toolchain.recipe import ExportSection, ModelSection, Recipe
from toolchain.surgery.layers import read_layers
from toolchain.surgery.load import load_dense
from toolchain.surgery.mask import mask_model
from toolchain.surgery.replay import create_dense, load_model, save_model
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split

OUTPUTS = {"features": (), "tokens": (), "layers": (0, 2)}
EVERY = pytest.mark.parametrize("output", OUTPUTS)
FEW = pytest.mark.parametrize("case", ["classic", "registers", "layer scale", "DINOv3", "Swin"])


def dense(case, output):
    name, kwargs = named(case)
    deeper = {"depth": 4} if "depth" in kwargs else {"depths": (1, 3)}
    kwargs = {**kwargs, **deeper, **KWARGS[output]}
    ref = ModelRef(name=name, kwargs=kwargs, output=output, layers=layers_of(case, output))
    torch.manual_seed(0)
    module = randomise(create_dense(ref))
    family = family_of(module, ref.name)
    preprocess = Preprocess(family.input_size(module), (0.5,) * 3, (0.5,) * 3)
    return TimmModel(ref, module, family, tuple(family.unit_groups(module)), preprocess, {"weights": "random"})


def layers_of(case, output):
    """What comes after the last cannot be cut off where stages follow."""
    return () if output != "layers" else (0, 3) if "depths" in named(case)[1] else OUTPUTS[output]


def images(model, count=3):
    return torch.randn(count, *model.preprocess.input_size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def given(model, x):
    return parts_of(model.module(x))


@FEW
@EVERY
def test_every_form_gives_what_the_dense_model_gives_at_its_plan(case, output, tmp_path):
    model = dense(case, output)
    x = images(model)
    masked = mask_model(model, copy.deepcopy(model.module), random_plan(model, low_rank=False))
    deploy = run_stage(Split(), run_stage(Slice(), masked).artifact).artifact
    again = load_model(save_model(deploy, tmp_path / "deploy"))
    expected = given(masked, x)
    assert not any(torch.allclose(y, z, atol=1e-3) for y, z in zip(expected, given(model, x), strict=True))
    for form in (deploy, again):
        for y, z in zip(expected, given(form, x), strict=True):
            torch.testing.assert_close(z, y, atol=2e-5, rtol=1e-5)
    assert again.output_names == output_names(output, layers_of(case, output))


@pytest.mark.parametrize("output", swept(OUTPUTS, ["layers"]))
def test_the_file_has_the_names_and_the_numbers(output, tmp_path):
    model = dense("registers", output)
    masked = mask_model(model, copy.deepcopy(model.module), random_plan(model, low_rank=False))
    deploy = run_stage(Split(), run_stage(Slice(), masked).artifact).artifact
    x = images(model)
    path = tmp_path / "a.onnx"
    run_stage(Export(ExportSection(), path, x.numpy(), False, "test"), deploy)
    session = ort.InferenceSession(str(path))
    names = [each.name for each in session.get_outputs()]
    assert tuple(names) == output_names(output, OUTPUTS[output])
    for found, y in zip(session.run(names, {"image": x.numpy()}), given(deploy, x), strict=True):
        np.testing.assert_allclose(found, y.numpy(), atol=2e-5)
    assert session.get_modelmeta().custom_metadata_map["slimvit.output"] == output


PLACES = [*itertools.product(["classic", "Swin", "attention pool"], ["features", "tokens"])]
PLACES += [(case, "layers") for case in STRUCTURES if case != "distilled"]  # it always pools its two tokens


@pytest.mark.parametrize(("case", "output"), PLACES)
def test_the_way_through_the_blocks_ends_in_the_models_own_outputs(case, output):
    """Damage is measured on it: from any place on it gives the outputs that are read from there on."""
    model = dense(case, output)
    x = images(model)
    teacher = Teacher(model.module, model.family, CATEGORICAL, {})
    way = way_through(teacher)
    stream = []
    first = model.module.get_submodule(model.family.blocks(model.module)[0].path)
    handle = first.register_forward_pre_hook(lambda _module, entering: stream.append(entering[0]))
    expected = given(model, x)
    handle.remove()
    for y, z in zip(finish(teacher, stream, way), expected, strict=True):
        torch.testing.assert_close(y, z)
    y = stream[0]
    for done, place in enumerate(way, 1):
        with torch.no_grad():
            y = place.step(model.module, y)
        later = finish(teacher, [y], way, done)
        for a, b in zip(later, expected[len(expected) - len(later) :], strict=True):
            torch.testing.assert_close(a, b)
    assert len(later) == 1


@pytest.mark.parametrize("case", ["classic", "registers", "layer scale", "DINOv3"])
def test_layers_are_timms_intermediates_with_its_norm(case):
    model = dense(case, "layers")
    x = images(model)
    whole = timm.create_model(model.ref.name, **model.ref.kwargs).eval()
    whole.load_state_dict(model.module.state_dict(), strict=False)
    with torch.no_grad():
        theirs = whole.forward_intermediates(
            x, indices=[0, 2], norm=True, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
        )
    for y, (spatial, prefix) in zip(given(model, x), theirs, strict=True):
        torch.testing.assert_close(y, torch.cat((prefix, spatial), 1))


def test_a_copy_gives_the_layers_too_and_blocks_after_the_last_are_gone():
    model = dense("classic", "layers")
    copied = copy.deepcopy(model.module)
    assert isinstance(copied, Layered)
    assert len(copied.blocks) == 3
    x = images(model)
    for y, z in zip(copied(x), model.module(x), strict=True):
        assert torch.equal(y, z)
    with torch.no_grad():
        copied.norm.weight.zero_()
    assert not torch.equal(copied(x)[0], model.module(x)[0]), "it reads its own weights"


def test_a_block_that_is_not_there_is_refused():
    module = dense("classic", "tokens").module
    with pytest.raises(ModelError, match="asks for block 4; the model's are numbered from 0 to 3"):
        read_layers(module, family_of(module, "tiny"), (1, 4))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"layers": [3, 1]}, "layers are blocks in rising order"),
        ({"output": "layers"}, "needs layers"),
        ({"output": "tokens", "layers": [1]}, "goes with no layers"),
        ({"output": "features", "kwargs": {"num_classes": 3}}, "take num_classes out of kwargs"),
    ],
)
def test_contradictions_in_the_recipe_are_told(model, words):
    with pytest.raises(RecipeError, match=words):
        Recipe.from_dict({"model": {"name": "vit_tiny_patch16_224", **model}, "budget": {"params": 0.5}})


def test_what_a_model_without_classes_gives_is_told_by_its_shape():
    tiny = {"pretrained": False, "name": "vit_tiny_patch16_224"}
    without = {**TINY, "num_classes": 0}
    assert load_dense(ModelSection(**tiny, kwargs=without)).ref.output == "features"
    assert load_dense(ModelSection(**tiny, kwargs={**without, "global_pool": ""})).ref.output == "tokens"
    assert load_dense(ModelSection(**tiny, kwargs=TINY)).ref.output is None
    with pytest.raises(
        ModelError, match=r"1×48 for one image: these are pooled features; set model.output = 'features'"
    ):
        load_dense(ModelSection(**tiny, kwargs=without, output="regression"))


def test_the_dense_model_of_a_run_that_reads_layers_is_a_checkpoint_again(tmp_path):
    model = dense("classic", "layers")
    saved = load_model(save_model(model, tmp_path / "dense"))
    ref = saved.ref
    asked = ModelSection(
        name=ref.name, kwargs=ref.kwargs, layers=ref.layers, checkpoint=str(tmp_path / "dense/model.safetensors")
    )
    again = load_dense(asked)
    assert len(again.module.blocks) == 3, "of 4: the last is not in the file"
    x = images(model)
    with torch.no_grad():
        for y, z in zip(again.module(x), given(model, x), strict=True):
            torch.testing.assert_close(y, z)
    with pytest.raises(ArtifactError, match=r"depth 3 \(the model: 4\)"):
        load_dense(asked.model_copy(update={"layers": (0, 3)}))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_base_patch14_224"])
def test_tokens_of_weights_whose_norm_is_that_of_the_pooled_vector_are_refused(name, tmp_path):
    plain = {key: value for key, value in TINY.items() if key != "num_classes"}
    kwargs = {**plain, "global_pool": "avg"}
    path = tmp_path / "m.pth"
    torch.save(create_dense(ModelRef(name=name, kwargs=kwargs)).state_dict(), path)
    section = ModelSection(name=name, kwargs=plain, checkpoint=str(path), output="tokens")
    with pytest.raises(ArtifactError, match=r"fc_norm.*pooled vector.*output = \"features\""):
        load_dense(section)
    features = section.model_copy(update={"output": "features", "kwargs": kwargs})
    assert load_dense(features).ref.output == "features"
    with pytest.raises(ValidationError, match="read before pooling: take global_pool = 'avg' out of kwargs"):
        ModelSection(name=name, kwargs=kwargs, output="layers", layers=[0])


TOWERS = {
    "vit_base_patch16_clip_224.openai": 512,
    "vit_pe_core_tiny_patch16_384.fb": 512,
    "eva02_base_patch16_clip_224.merged2b": 512,
}


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("declared", [None, "features"])
def test_the_projection_of_an_image_tower_gives_features_and_stays(name, declared):
    small = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32}
    loaded = load_dense(ModelSection(name=name, kwargs=small, pretrained=False, output=declared))
    assert loaded.ref.output == "features"
    assert loaded.module(torch.zeros(1, 3, 32, 32)).shape == (1, TOWERS[name])
    assert any("shares with texts" in note for note in loaded.provenance["notes"])


@pytest.mark.parametrize(
    ("name", "changes", "output", "width"),
    [
        ("vit_base_patch16_clip_224.openai", {"num_classes": 0}, "features", 32),
        ("vit_base_patch16_clip_224.openai", {"num_classes": 10}, None, 10),
        ("vit_base_patch16_clip_224.openai_ft_in1k", {}, None, 1000),
        ("vit_base_patch16_224.augreg_in21k", {"num_classes": 512}, None, 512),
    ],
)
def test_what_has_classes_of_its_own_or_no_head_is_no_projection(name, changes, output, width):
    small = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32, **changes}
    loaded = load_dense(ModelSection(name=name, kwargs=small, pretrained=False))
    assert (loaded.ref.output, loaded.module(torch.zeros(1, 3, 32, 32)).shape[1]) == (output, width)


def test_a_projection_may_be_declared_to_be_classes():
    small = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32}
    section = ModelSection(name="vit_base_patch16_clip_224.openai", kwargs=small, pretrained=False, output="logits")
    assert load_dense(section).ref.output == "logits"
