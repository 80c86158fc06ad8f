"""What a training script recorded beside weights of the model that it made, which no tensor says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import timm

from toolchain.recipe import Interpolation
from toolchain.surgery.inert import Arguments

FREE = ("num_classes", "img_size")
"""Keyword arguments that a user may change."""


@dataclass(frozen=True)
class Trained:
    """The arguments of timm's train.py, or of one that is like it.

    Attributes:
        name: timm's name of the model; "" where nothing is recorded.
        kwargs: keyword arguments that decide what it computes; not rates, nor the number of classes, which tensors say.
        data: keys of [data]: how its pictures were prepared, where that is not as its name has it.
        in_natural_order: whether class folders were numbered as timm does it: 2 before 10, without regard to case.
    """

    name: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    in_natural_order: bool = False

    @staticmethod
    def of(content: object) -> Trained:
        """What the content of a file says; nothing where it names no model of timm."""
        if not isinstance(content, Mapping):
            return Trained()
        found = content.get("args")
        given = found.values if isinstance(found, Arguments) else found if isinstance(found, Mapping) else {}
        name = content.get("arch") or given.get("model")
        if not isinstance(name, str) or not timm.is_model(name):
            return Trained()
        more = given.get("model_kwargs")
        kwargs = {key: value for key, value in (more.items() if isinstance(more, Mapping) else ()) if _is_plain(value)}
        kwargs |= {key: given[old] for old, key in RENAMED.items() if isinstance(given.get(old), str | int)}
        kwargs = {key: value for key, value in kwargs.items() if key != "num_classes" and not key.endswith("_rate")}
        data: dict[str, Any] = {
            key: [float(each) for each in given[key]] for key in ("mean", "std") if _are_numbers(given.get(key))
        }
        if _is_number(given.get("crop_pct")):
            data["crop_pct"] = float(given["crop_pct"])
        if given.get("interpolation") in get_args(Interpolation):
            data["interpolation"] = given["interpolation"]
        by_folder = given.get("dataset") == "" and not given.get("class_map")
        return Trained(name, kwargs, data, by_folder)


RENAMED = {"gp": "global_pool", "in_chans": "in_chans"}
"""Argument of timm's train.py → keyword argument of its models."""


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, str | int | float | bool)


def _are_numbers(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_number, value))


def _is_number(value: object) -> bool:
    """Whether it is a number; a file of arguments has 0 and 1 as whole ones."""
    return isinstance(value, int | float) and not isinstance(value, bool)
