"""Fits stored tensors to a model: converts names, and resamples sizes with a note."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from toolchain.errors import ArtifactError, ModelError
from toolchain.families import Family
from toolchain.families.narrow import NarrowParallel
from toolchain.foreign import first_line
from toolchain.surgery.anatomy import Anatomy, anatomy, by, differences, is_square
from toolchain.surgery.names import PRETRAINING
from toolchain.surgery.origin import Fitted, Origin, left_out, some

KERNEL, POSITIONS = "patch_embed.proj.weight", "pos_embed"
HALF_BYTES = 2
"""Bytes of an fp16 or bf16 number; smaller floats are codes whose scales are stored elsewhere."""
TABLE = "relative_position_bias_table"


class _Equal:
    """A count that equals every other count."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True


class _AsStored:
    """A model as timm's conversions read it, with sizes to which they have nothing to resample: that is done here.

    They would take a table of positions for that of a square image, whatever it was, and say nothing.
    """

    def __init__(self, model: nn.Module, kernel: Tensor | None) -> None:
        self._model = model
        self.pretrained_cfg = {"input_size": (1, 1, 1)}  # of which timm would derive another grid
        self.pretrained_model_args: dict[str, object] = {}
        if getattr(model, POSITIONS, None) is not None:
            self.pos_embed = _Shaped((1, _Equal(), 1))
        if kernel is not None and kernel.ndim == 4 and hasattr(model, "patch_embed"):
            self.patch_embed = _Patches(model.get_submodule("patch_embed"), tuple(kernel.shape))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _Shaped:
    def __init__(self, shape: tuple[Any, ...]) -> None:
        self.shape = shape


class _Patches:
    def __init__(self, module: nn.Module, kernel: tuple[int, ...]) -> None:
        self._module, self.proj = module, type("Projection", (), {"weight": _Shaped(kernel)})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def fitted(tensors: Mapping[str, Tensor], module: nn.Module, family: Family, origin: Origin) -> Fitted:
    """The tensors under the model's names and at its sizes.

    Raises:
        ModelError: they have another patch size, or positions of which the grid is not known.
        ArtifactError: they cannot be converted, or hold numbers that are none.
    """
    kernel = next((tensor for name, tensor in tensors.items() if name.endswith((KERNEL, "conv1.weight"))), None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = family.convert_checkpoint(tensors, _AsStored(module, kernel))  # type: ignore[arg-type]
        stored, model = anatomy(state), anatomy(module.state_dict())
    except Exception as error:  # tensors of unexpected shapes make timm's conversions fail in any way there is
        why = first_line(error)
        text = f"{origin.what} {origin.word('does')} not fit the model: the tensors cannot be converted ({why})"
        raise ArtifactError(text) from error
    grid = _grid(module) if model.positions else (0, 0)
    if (embeds := _embeds_tokens(stored, model, grid, origin)) is not None:
        stored, model = replace(stored, embeds_tokens=embeds), replace(model, embeds_tokens=not embeds)
    left = _left_out(tensors, state, module, origin)
    unused = [name for name in state if PRETRAINING.match(name) and name not in module.state_dict()]
    state = {name: tensor for name, tensor in state.items() if name not in unused}
    patches = _patches(state, stored, model, origin)
    positions = _positions(state, stored, model, grid, origin)
    adapted = frozenset(name for name, texts in (("patch_size", patches), ("positions", positions)) if texts)
    if unused:
        left.append(f"Of {origin.what}, {left_out(unused)}: only its pre-training reads that.")
    notes = (*left, *patches, *positions, *_tables(tensors, state, origin), *_numbers(state, module, origin))
    return Fitted(state, stored, model, adapted, notes)


def _grid(module: nn.Module) -> tuple[int, int]:
    """(rows, columns) of a model's patches."""
    rows, columns = module.get_submodule("patch_embed").grid_size  # type: ignore[misc]
    return int(rows), int(columns)


def _left_out(
    tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], module: nn.Module, origin: Origin
) -> list[str]:
    """A sentence on the tensors that timm's conversion drops of a checkpoint under its own names, such as "pre_logits"."""
    if KERNEL not in tensors or KERNEL not in state:
        return []  # another's names: what became of each cannot be told, and what is missing is refused
    kept = {tensor.data_ptr() for tensor in state.values()}
    # The biases q_bias and v_bias of attention become its qkv.bias; a parallel block's two output linears become one.
    joined = {name.rpartition(".")[0].rpartition(".")[0] for name in state if name not in tensors} - {""}
    gathered = {path for path, part in module.named_modules() if isinstance(part, NarrowParallel)}
    dropped = [
        name
        for name, tensor in tensors.items()
        if name not in state and tensor.data_ptr() not in kept
        if (owner := name.rpartition(".")[0]) not in joined and owner.rpartition(".")[0] not in gathered
    ]
    return [f"Of {origin.what}, {left_out(dropped)}: timm's model has no such part."] if dropped else []


def _tables(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], origin: Origin) -> list[str]:
    """A sentence on tables of relative positions that timm's conversion resampled to another grid."""
    tables = [name for name in state if name.endswith(TABLE) and name in tensors]
    changed = [name for name in tables if state[name].shape != tensors[name].shape]
    if not changed:
        return []
    old, new = (len(each[changed[0]]) for each in (tensors, state))
    text = (
        f"The tables of relative positions of {origin.what} ({some(changed)}) were resampled from {old} to {new} rows, those "
        "of the model's grid or window; accuracy can fall."
    )
    return [text]


def _patches(state: dict[str, Tensor], stored: Anatomy, model: Anatomy, origin: Origin) -> list[str]:
    """Resamples the patch embedding in place where that was asked for; a sentence says so."""
    old, new = stored.patch_size, model.patch_size
    if old is None or new is None or old == new:
        return []
    if not origin.resample_patches:
        if differences(stored, model, {"patch_size", *origin.may_differ}):
            return []  # which the names refuse with everything else that differs
        size = str(old[0]) if old[0] == old[1] else str(list(old))
        raise ModelError(
            f"{origin.what} {origin.word('has')} patches of {by(old)} pixels, the model {by(new)}; set "
            f"model.kwargs.patch_size = {size}, or model.resample_patches = true to have them resampled, which costs "
            "accuracy"
        )
    state[KERNEL] = resample_patch_embed(
        state[KERNEL],
        list(new),
        interpolation=origin.patches.mode,
        antialias=origin.patches.antialias,
    )
    text = (
        f"The patch embedding of {origin.what} was resampled from {by(old)} to {by(new)} pixels, as the recipe asks; "
        "accuracy can fall."
    )
    return [text]


_TOKENS = ("class_token", "distilled", "reg_tokens")


def _embeds_tokens(stored: Anatomy, model: Anatomy, grid: tuple[int, int], origin: Origin) -> bool | None:
    """Whether the stored table has positions for class and register tokens, if that differs from the model's; else None.

    The file does not say it. Assume what the model does, unless the other reading gives a better-known grid.
    """
    if not (stored.positions and model.positions and stored.prefix_tokens and model.prefix_tokens):
        return None
    if stored.positions == model.positions:
        return None
    embeds = model.positions > math.prod(grid)
    rows = {True: stored.positions - stored.prefix_tokens, False: stored.positions}

    def trust(count: int) -> int:
        known = _known_grid(count, stored, grid, origin)
        return 0 if known is None else 3 if not known[1] else 2 if known[0] == grid else 1

    return not embeds if trust(rows[not embeds]) > trust(rows[embeds]) else None


def _positions(
    state: dict[str, Tensor], stored: Anatomy, model: Anatomy, grid: tuple[int, int], origin: Origin
) -> list[str]:
    """Resamples the table of positions in place where the model's grid of patches is another; a sentence says so."""
    if not stored.positions or not model.positions:
        return []
    if differences(stored, model).keys() & {*_TOKENS, "embeds_tokens"}:
        return []  # the tokens before the patches differ, which the names refuse
    before = model.positions - math.prod(grid)
    count = stored.positions - before
    known = _known_grid(count, stored, grid, origin)
    if known is None:
        if differences(stored, model, origin.may_differ):
            return []  # as above
        raise ModelError(
            f"{origin.what} {origin.word('has')} position embeddings for {max(count, 0)} patches, the model for {by(grid)}; "
            "they are of no square image, and the file does not say of which. Set model.kwargs.img_size to the "
            f"[height, width] that {origin.word('it')} {origin.word('was')} trained on"
        )
    old, assumed = known
    kernel, new_kernel = stored.patch_size or model.patch_size or (1, 1), model.patch_size or (1, 1)
    from_size, to_size = _times(old, kernel), _times(grid, new_kernel)
    if old == grid:
        if assumed and grid[0] != grid[1] and is_square(count):
            text = (
                f"The {count} position embeddings of {origin.what} were taken for a grid of {by(grid)}, the model's; "
                "the file does not say of which image size they are."
            )
            return [text]
        return []
    state[POSITIONS] = resample_abs_pos_embed(
        state[POSITIONS].float(),
        list(grid),
        list(old),
        num_prefix_tokens=before,
        interpolation=origin.positions.mode,
        antialias=origin.positions.antialias,
    )
    taken = ", taken for those of a square image," if assumed else ""
    text = (
        f"The position embeddings of {origin.what}{taken} were resampled from a grid of {by(old)} to {by(grid)}, that is "
        f"from images of {by(from_size)} to {by(to_size)} pixels; accuracy can fall. "
        "model.kwargs.img_size sets the size."
    )
    return [text]


def _known_grid(
    count: int, stored: Anatomy, grid: tuple[int, int], origin: Origin
) -> tuple[tuple[int, int], bool] | None:
    """(rows and columns of `count` stored positions, whether that is an assumption); None where nothing says it."""
    if origin.made_for is not None and stored.patch_size is not None:
        known = origin.made_for[0] // stored.patch_size[0], origin.made_for[1] // stored.patch_size[1]
        if math.prod(known) == count:
            return known, False
    if count == math.prod(grid):
        return grid, True
    if count > 0 and is_square(count):
        return (math.isqrt(count), math.isqrt(count)), True
    return None


def _times(grid: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
    return grid[0] * kernel[0], grid[1] * kernel[1]


def _numbers(state: Mapping[str, Tensor], module: nn.Module, origin: Origin) -> list[str]:
    """What a conversion to the model's own types loses, in a sentence; raises ArtifactError where that is too much."""
    wanted = module.state_dict()
    shared = {name: tensor for name, tensor in state.items() if name in wanted}
    kinds = {name: tensor.dtype for name, tensor in shared.items() if wanted[name].is_floating_point()}
    whole = [name for name, kind in kinds.items() if not kind.is_floating_point or kind.itemsize < HALF_BYTES]
    if whole:
        kind = str(kinds[whole[0]]).removeprefix("torch.")
        raise ArtifactError(
            f"{origin.what} {origin.word('holds')} {whole[0]} as {kind}: it was quantised, and its scales cannot be "
            "applied; use the weights from before"
        )
    bad = [name for name in kinds if not torch.isfinite(shared[name].float()).all()]
    if bad:
        raise ArtifactError(
            f"{origin.what} {origin.word('holds')} NaN or infinity in {some(bad)}: {origin.word('its')} training diverged, "
            f"or {origin.word('its')} numbers are beyond the range of float32"
        )
    wide = [name for name, kind in kinds.items() if kind == torch.float64]
    subject = f"{origin.what[0].upper()}{origin.what[1:]} {origin.word('holds')}"
    return [f"{subject} float64 ({some(wide)}), rounded to float32."] if wide else []
