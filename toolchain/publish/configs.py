"""Writes config.json and preprocessor_config.json, which transformers and transformers.js read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from pydantic import JsonValue

from toolchain.errors import ArtifactError, RecipeError
from toolchain.families import family_of
from toolchain.model import ModelRecord, Preprocess
from toolchain.outputs import FEATURES, Output
from toolchain.surgery.huggingface.layout import OUTPUTS
from toolchain.surgery.huggingface.processor import FILTERS
from toolchain.surgery.replay import create_dense

Json = dict[str, JsonValue]
MODEL_TYPE = "vit"
"""The interface for every family: one input `pixel_values`, and the outputs of a ViT of transformers."""
TRAINED_BY = ("_rate", "weight_init", "fix_init", "grad_checkpointing")
"""How names of timm's arguments end that change nothing once a model is trained: dropout, and what weights begin as."""


def config(record: ModelRecord, output: Output, labels: Sequence[str], browser: Mapping[str, JsonValue]) -> Json:
    """The content of config.json.

    It describes what goes in and comes out, and the dense model's size. The widths of the compressed one differ from block
    to block, for which transformers has no words; they are in plan.json.

    Args:
        record: of the deploy model.
        output: what its outputs are.
        labels: the names of its classes in order, in which a word may occur twice; () if there are none.
        browser: the settings for transformers.js.
    """
    channels, height, width = record.preprocess.input_size
    head = output not in FEATURES
    content: Json = {
        "architectures": ["ViTForImageClassification" if head else "ViTModel"],
        "model_type": MODEL_TYPE,
        "image_size": height if height == width else [height, width],
        "num_channels": channels,
        **_shape(record),
    }
    if head:
        content["id2label"] = {str(index): name for index, name in enumerate(labels)}
        content["label2id"] = {name: index for index, name in enumerate(distinct(labels))}
    if problem := next((name for name, kind in OUTPUTS.items() if kind == output), ""):
        content["problem_type"] = problem
    content["transformers.js_config"] = dict(browser)
    content["slimvit"] = {"timm": record.model.name, "kwargs": architecture(record.model.kwargs), "output": output}
    return content


def architecture(kwargs: Mapping[str, object]) -> Json:
    """Those keyword arguments of a model that say what it computes, as JSON.

    What is left out says how it was trained or first filled, is a place on one machine, or has no word in JSON: a page in a
    browser reads none of the file if there is one NaN in it.
    """
    named = {name: value for name, value in kwargs.items() if not name.endswith(TRAINED_BY)}
    return {name: value for name, value in named.items() if _is_plain(value)}  # type: ignore[misc]


def _is_plain(value: object) -> bool:
    """Whether JSON has a word for a value, in which no place on one machine is named."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return not any(mark in value for mark in ("/", "\\", "~"))
    return value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))


def distinct(labels: Sequence[str]) -> list[str]:
    """The same names, with a number behind repeated ones: ImageNet has "crane" the bird and "crane" the machine."""
    taken, result = set(labels), dict[str, None]()
    for label in labels:
        name, number = label, 2
        if label in result:
            while name in taken:
                name, number = f"{label} ({number})", number + 1
            taken.add(name)
        result[name] = None
    return list(result)


def _shape(record: ModelRecord) -> Json:
    """Of the dense model, as far as transformers has words for it."""
    with torch.device("meta"):
        module = create_dense(record.model)
    family = family_of(module, record.model.name)
    blocks = list(family.trunk(module))
    patch = family.patch_size(module)
    heads = getattr(getattr(module.get_submodule(blocks[0].path), "attn", None), "num_heads", None)
    content: Json = {"num_hidden_layers": len(blocks), "hidden_size": int(module.num_features)}  # type: ignore[arg-type]
    if isinstance(heads, int):
        content["num_attention_heads"] = heads
    if patch is not None:
        content["patch_size"] = patch[0] if patch[0] == patch[1] else list(patch)
    return content


def preprocessor(how: Preprocess) -> Json:
    """The content of preprocessor_config.json; as the files' own metadata have it.

    Args:
        how: pictures become the input.

    Raises:
        RecipeError: no image processor does the same.
        ArtifactError: the filter is unknown.
    """
    channels, *size = how.input_size
    filters = {name: number for number, name in FILTERS.items()}
    crop, mode = how.crop_pct, how.crop_mode or "center"
    if how.interpolation not in filters:
        raise ArtifactError(
            f"the run's model.json names the unknown filter {how.interpolation[:40]!r}: run the recipe again"
        )
    whole = crop is None or (mode == "squash" and crop == 1)
    edges = size if crop is None else [math.floor(edge / crop) for edge in size]
    if not whole and (mode == "border" or (mode == "center" and edges[0] != edges[1])):
        raise RecipeError(
            f"no preprocessor_config.json says how these pictures are cropped (crop_mode {mode!r} to {size[0]}×{size[1]}); "
            "run the recipe with data.crop_mode = 'squash'"
        )
    both: Json = {"height": edges[0], "width": edges[1]}
    content: Json = {
        "image_processor_type": "ViTImageProcessor" if whole else "BitImageProcessor",
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "size": both if mode == "squash" or whole else {"shortest_edge": edges[0]},
        "resample": filters[how.interpolation],
        "do_center_crop": not whole,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(how.mean),
        "image_std": list(how.std),
    }
    if not whole:
        content["crop_size"] = {"height": size[0], "width": size[1]}
    return content
