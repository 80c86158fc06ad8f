import json
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from builders import Refusing
from PIL import Image
from safetensors.torch import save_file

from toolchain.errors import ModelError, RecipeError
from toolchain.pipeline.draft import Draft
from toolchain.pipeline.job import begin, prepare
from toolchain.plan import ModelRef
from toolchain.recipe import Recipe
from toolchain.surgery.replay import create_dense
from toolchain.targets import TARGETS, TargetProfile

DIGITS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}


@pytest.mark.parametrize("source", ["digits", "none"])
def test_every_seed_sees_the_same_splits(source):
    jobs = [
        prepare(
            Recipe.from_dict(
                {
                    "model": {"name": "vit_tiny_patch16_224", "kwargs": DIGITS, "pretrained": False},
                    "data": {"source": source},
                    "train": {},
                    "compress": {"method": "hybrid", "seed": seed},
                    "budget": {"params": 0.6},
                }
            )
        )
        for seed in (0, 1)
    ]
    first, second = (job.source for job in jobs)
    assert first.digest == second.digest
    for name in first.splits:
        assert first.split(name).positions.equal(second.split(name).positions)
        assert first.split(name)[0][0].equal(second.split(name)[0][0])


def test_no_pictures_are_anyones_default():
    model = {"name": "vit_tiny_patch16_224", "kwargs": {**DIGITS, "num_classes": 0}}
    recipe = Recipe.from_dict({"model": model, "budget": {"params": 0.6}, "compress": {"align": 1}})
    with pytest.raises(RecipeError, match=r"data\.source is missing: name your pictures"):
        prepare(recipe)
    assert prepare(recipe, shapes_only=True).source.synthetic  # a plan of shapes alone needs none


def test_how_pictures_are_prepared_and_mirrored_reaches_the_model_and_its_files():
    """Kind: a key of [data] that is read and changes nothing. What a file's metadata tells is the model's `preprocess`."""
    said = {"mean": [0.1], "std": [0.2], "crop_pct": 0.9, "interpolation": "lanczos", "crop_mode": "squash"}
    recipe = {
        "model": {"name": "vit_tiny_patch16_224", "kwargs": DIGITS, "pretrained": False},
        "data": {"source": "none", "mirror": True, **said},
    }
    start = begin(Recipe.from_dict(recipe))
    how = start.dense.preprocess.to_dict()
    assert how == {"input_size": (1, 8, 8), **said, "mean": (0.1,), "std": (0.2,)}
    assert start.source.flip


def test_folders_in_another_order_than_a_model_names_its_classes_are_refused(tmp_path):
    """Kind: accuracy by the labels of other classes."""
    for split, name, index in product(("train", "val"), ("cat", "dog"), range(4)):
        (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 30 * index + (name == "dog")).save(tmp_path / split / name / f"{index}.png")
    kwargs = {**DIGITS, "num_classes": 2}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 2,
        "model_args": kwargs,
        "label_names": ["dog", "cat"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    module = create_dense(ModelRef(name="vit_tiny_patch16_224", kwargs=kwargs))
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    recipe = {"model": {"name": f"local-dir:{tmp_path}"}, "data": {"source": f"imagefolder:{tmp_path}"}}
    with pytest.raises(ModelError, match=r"'cat' is class 0 .* and output 1 of the model"):
        begin(Recipe.from_dict({**recipe, "budget": {"params": 0.6}}))
    for method in ("none", "vtp"):
        learned = {
            **recipe,
            "compress": {"method": method},
            "train": {},
            "budget": {"params": 0.6} if method == "vtp" else {},
        }
        start = prepare(Recipe.from_dict(learned)) if method == "vtp" else begin(Recipe.from_dict(learned))
        assert start.source.ordered_names == ("cat", "dog"), "what learns them anew may begin from any"
    draft = Draft.of(f"local-dir:{tmp_path}", str(tmp_path), {})
    assert draft.classes == {"dog": 0, "cat": 1}


@pytest.mark.parametrize(
    ("engine", "precisions", "error", "words"),
    [
        ({"targets": ["ort-cpu"]}, ["fp32"], RecipeError, "ort-cpu runs files as they are and has no engines"),
        ({"compute_capabilities": ["9.9"]}, ["fp32"], RecipeError, r"compute capability 9\.9"),
        ({"compute_capabilities": ["7.5", "8.9"]}, ["fp16", "fp32"], RecipeError, "engines in fp32 are asked for"),
        ({"strip": True}, ["fp32"], RecipeError, "one compute capability, and 3 are asked for"),
        ({"hardware_compatible": "ampere_plus"}, ["fp32"], RecipeError, "engines of trt-rtx name their GPUs"),
        ({"compute_capabilities": ["7.5", "8.9"]}, ["fp16"], None, ""),
    ],
)
def test_engines_that_cannot_be_built_are_refused_before_any_work(engine, precisions, error, words):
    if "targets" not in engine:
        pytest.importorskip("tensorrt_rtx")
    recipe = Recipe.from_dict(
        {
            "model": {"name": "vit_tiny_patch16_224", "kwargs": DIGITS, "pretrained": False},
            "data": {"source": "none"},
            "compress": {"method": "none"},
            "export": {"precisions": precisions},
            "engine": engine,
        }
    )
    with nullcontext() if error is None else pytest.raises(error, match=words):
        prepare(recipe, shapes_only=True)


class Fixed(Refusing):
    """A target for which engines are built that take single batches: those of `only`, or of the options."""

    profile, takes, builds, only = TargetProfile(), ("onnx",), ("FLOAT",), None

    def batches(self, options):
        return self.only or tuple(sorted(set(options.batch)))


@pytest.mark.parametrize(
    ("engine", "bench", "words"),
    [
        ([1, 1, 8], [1, 8], None),
        (
            [1, 1, 8],
            [1, 3],
            r"fixed take batch 1, 8 alone, .* 3 as well; set .* \[1, 3, 8\]$",
        ),
        ([2, 2, 2], [4], r"; set engine\.batch = \[2, 2, 4\]$"),
        ([1, 2, 8], [4, 16], r"; set engine\.batch = \[4, 4, 16\]$"),
        ([1, 2, 8], [1, 2, 4, 8], r"; keep at most 3 in bench\.batch, and name them in engine\.batch$"),
    ],
)
def test_a_batch_that_no_engine_is_built_for_is_refused_before_any_work(engine, bench, words, register):
    """Kind: the batch is refused when everything else is done. Targets whose engines take a range of batches are not asked."""
    ranging = Fixed("ranging", "yes")
    ranging.batches = lambda _: None
    for target in (ranging, Fixed("fixed", "yes")):
        register(TARGETS, target)
    raw = {
        "model": {"name": "vit_tiny_patch16_224", "kwargs": DIGITS, "pretrained": False},
        "data": {"source": "none"},
        "compress": {"method": "none"},
    }
    for name in ("ranging", "fixed"):
        sections = {"engine": {"targets": [name], "batch": engine}, "bench": {"targets": [name], "batch": bench}}
        fails = pytest.raises(RecipeError, match=words) if words and name == "fixed" else nullcontext()
        with fails:
            prepare(Recipe.from_dict({**raw, **sections}), shapes_only=True)


def test_a_batch_that_a_target_never_takes_is_refused_with_what_would_help(register):
    single = Fixed("single", "yes")
    single.only = (1,)
    register(TARGETS, single)
    raw = {"model": {"name": "vit_tiny_patch16_224", "kwargs": DIGITS, "pretrained": False}, "data": {"source": "none"}}
    raw |= {"compress": {"method": "none"}, "engine": {"targets": ["single"]}}
    prepare(Recipe.from_dict({**raw, "bench": {"targets": ["single"]}}), shapes_only=True)
    for batch in ([1, 1, 1], [1, 1, 8]):
        asked = {
            **raw,
            "engine": {"targets": ["single"], "batch": batch},
            "bench": {"targets": ["single"], "batch": [1, 8]},
        }
        with pytest.raises(
            RecipeError, match=r"8 as well; remove them from bench\.batch, or single from bench\.targets"
        ):
            prepare(Recipe.from_dict(asked), shapes_only=True)


def test_a_section_that_is_not_carried_out_is_told(tmp_path):
    """Kind: something asked for and left out. Beside a checkpoint nothing is trained, and the report says so."""
    torch.save(create_dense(ModelRef(name="vit_tiny_patch16_224", kwargs=DIGITS)).state_dict(), tmp_path / "m.pth")
    raw = {
        "model": {"name": "vit_tiny_patch16_224", "kwargs": DIGITS, "checkpoint": "m.pth"},
        "data": {"source": "digits"},
        "train": {},
        "compress": {"method": "none"},
    }
    notes = prepare(Recipe.from_dict(raw, tmp_path)).dense.provenance["notes"]
    assert notes == ["[train] is not carried out: model.checkpoint has the weights."]
    del raw["train"]
    assert "notes" not in prepare(Recipe.from_dict(raw, tmp_path)).dense.provenance


@pytest.mark.parametrize(
    ("compress", "more", "multiples"),
    [
        ({}, {}, {"mlp_hidden": 8, "head_dim": 8, "rank": 8}),
        ({"align": 1}, {}, {"mlp_hidden": 1, "head_dim": 1, "rank": 1}),
        ({}, {"bench": {"targets": ["ort-cpu"]}}, {"mlp_hidden": 4, "head_dim": 4, "rank": 4}),
        ({"align": 16}, {"bench": {"targets": ["ort-cpu"]}}, {"mlp_hidden": 16, "head_dim": 16, "rank": 16}),
    ],
)
def test_widths_are_aligned_by_the_recipe_its_targets_or_to_8(compress, more, multiples):
    raw = {"model": {"name": "vit_tiny_patch16_224", "kwargs": DIGITS}, "data": {"source": "none"}}
    recipe = Recipe.from_dict({**raw, "compress": compress, "budget": {"params": 0.7}, **more})
    problem = prepare(recipe, shapes_only=True).problem
    assert problem.choices.multiples == multiples
    kept = problem.uniform.kept
    assert {count % multiples[unit] for (_, unit), count in kept.items()} == {0}
    assert ("align" in recipe.model_dump()["compress"]) == bool(compress), "a plan names it where the recipe does"


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"bench": {"targets": ["ort-cpu"]}, "export": {"precisions": ["bf16"]}},
            "ort-cpu runs no file of .*bf16.*; add fp32 or",
        ),
        (
            {"bench": {"targets": ["eager"]}, "export": {"precisions": ["fp16"]}},
            r"eager runs no file of .*; add fp32, or remove it",
        ),
        ({"bench": {"targets": ["eager"]}, "export": {"precisions": ["int8"]}}, None),  # fp32 is timed beside int8
        (
            {"engine": {"targets": ["fixed"]}, "export": {"precisions": ["fp16"]}},
            "fixed builds no engine of .*; add fp32, or",
        ),
        ({"engine": {"targets": ["fixed"]}, "export": {"precisions": ["fp16", "fp32"]}}, None),
    ],
)
def test_a_target_that_has_nothing_to_do_is_refused_before_any_work(sections, words, register):
    """Kind: it is left out of the report without a word."""
    register(TARGETS, Fixed("fixed", "yes"))
    raw = {
        "model": {"name": "vit_tiny_patch16_224", "kwargs": DIGITS, "pretrained": False},
        "data": {"source": "none"},
        "compress": {"method": "none"},
    }
    with pytest.raises(RecipeError, match=words) if words else nullcontext():
        prepare(Recipe.from_dict({**raw, **sections}), shapes_only=True)
