"""Replaces a part of a larger model by a smaller one: checks that it can be replaced, and gives the new one its state."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import MethodType

import torch
from timm.models import FeatureListNet
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from toolchain.compress.oddities import oddity
from toolchain.compress.witness import WAYS
from toolchain.errors import ModelError
from toolchain.families import FAMILIES

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes in which torch keeps a module's hooks."""
CHECKPOINTING = "grad_checkpointing"
"""timm's attribute that says whether a model computes its blocks anew for their gradients."""


@dataclass(frozen=True)
class Submodule:
    """A part of a larger model that can be replaced.

    Attributes:
        model: the larger model, or the part itself.
        part: a model that a family claims.
        paths: all paths of the part in the model; one may be known by several names.
    """

    model: nn.Module
    part: nn.Module
    paths: tuple[str, ...]

    @staticmethod
    def of(model: nn.Module, at: str) -> Submodule:
        """The part at a path; "" is the model itself.

        Raises:
            ModelError: no family supports the part, or a smaller one could not replace everything that the part does.
        """
        part = _claimed(model, at)
        paths = tuple(path for path, module in model.named_modules(remove_duplicate=False) if module is part)
        found = Submodule(model, part, paths)
        if why := found._entangled():
            raise ModelError(f"{at or 'the model'} cannot be replaced by a smaller one: {why}")
        return found

    def _entangled(self) -> str:
        """Why the part cannot be replaced; "" if it can."""
        if overridden := [way for way in WAYS if way in vars(self.part)] or _replaced(self.part):
            return f"its {overridden[0]} was replaced on the instance; take that back first (accelerate: remove_hook_from_module)"
        for path, module in self.model.named_modules():
            if isinstance(module, DistributedDataParallel) and any(each is self.part for each in module.modules()):
                return (
                    f"{path or 'the model'} is a DistributedDataParallel, which would go on with the old parameters; shrink the module "
                    "in it, and wrap that again"
                )
        for path, module in self.part.named_modules():
            if hooks := [hook for kind in HOOKS for hook in vars(module)[kind].values()]:
                name = getattr(hooks[0], "__name__", type(hooks[0]).__name__)
                return (
                    f"{path or 'it'} has the hook {name}, and what hooks do is not seen; take it off first (torch.nn.utils: "
                    "remove_weight_norm, prune.remove), and read intermediate features with forward_intermediates"
                )
        if odd := oddity(self.part):
            return odd
        inner = set(self.part.modules())
        for path, module in self.model.named_modules():
            if module not in inner and (
                names := [name for name, value in vars(module).items() if self._is_in(name, value)]
            ):
                if names[0] in HOOKS:
                    return f"a hook of {path or 'the model'} calls it, and would go on with the old one; take that off first"
                where = ".".join(filter(None, (path, names[0])))
                return f"{where} holds it outside of the modules, and would keep the old one; make it a submodule, or take it out"
        own = {id(tensor) for tensor in self.part.parameters()}
        inside = tuple(f"{path}." for path in self.paths if path)
        for name, parameter in self.model.named_parameters(remove_duplicate=False) if inside else ():
            if id(parameter) in own and not name.startswith(inside):
                return f"{name}, outside of it, is one of its parameters; untie them first"
        return ""

    def _is_in(self, name: str, value: object) -> bool:
        """Whether an attribute of a module is the part, a method of it, or a plain container of either."""
        if name == "_modules":
            return False
        parts = (
            value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else (value,)
        )
        return any(each is self.part or (type(each) is MethodType and each.__self__ is self.part) for each in parts)

    def copied(self) -> nn.Module:
        """A copy of the part; raises ModelError that names what it holds that cannot be copied."""
        try:
            return copy.deepcopy(self.part)
        except (TypeError, RuntimeError) as error:
            places = [
                f"{path}.{name}".removeprefix(".")
                for path, module in self.part.named_modules()
                for name, value in vars(module).items()
                if not (name.startswith("_") or _is_copied(value))
            ]
            raise ModelError(
                f"the model cannot be copied ({str(error).partition('.')[0]}): take off what it holds beside its modules and weights"
                + (f", here {', '.join(places[:3])}" if places else "")
            ) from error

    def fill(self, smaller: nn.Module) -> nn.Module:
        """The model with another module in this place, which becomes of the class, mode, device and type of the part."""
        _become_like(smaller, self.part)
        if self.part is self.model:
            return smaller
        for path in self.paths:
            owner, _, name = path.rpartition(".")
            setattr(self.model.get_submodule(owner), name, smaller)
        return self.model


def _claimed(model: nn.Module, at: str) -> nn.Module:
    """The module at a path, if a family claims it; else ModelError names the paths where one would."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"shrink takes a model in memory, got a {type(model).__name__}; `slimvit shrink` takes names and files"
        )
    try:
        part = model.get_submodule(at)
    except AttributeError:
        part = None
    for path, module in model.named_modules():
        if part is not None and _is_compiled(module) and (part in module.modules() or module in part.modules()):
            raise ModelError(
                f"{path or 'the model'} is compiled and would go on running the old one; shrink before torch.compile"
            )
    if part is not None and _is_claimed(part):
        return part
    claimed = [path for path, module in model.named_modules() if path and _is_claimed(module)]
    what = f"there is nothing at {at!r}" if part is None else f"{at or 'the model'} is {_called(part)}"
    where = f"; at = {' or '.join(map(repr, claimed))} would be" if claimed else ""
    if any(isinstance(module, FeatureListNet) for module in (model if part is None else part).modules()):
        where = " (timm took it apart: make it without features_only, and read its forward_intermediates)"
    saved = ""
    if part is not None and type(part).__module__.startswith("transformers."):
        saved = ". Save it with save_pretrained, and give `slimvit shrink` the folder"
    raise ModelError(
        f"{what}, which is no model of a supported family{where}{saved}. See `slimvit models` for what is."
    )


def _is_copied(value: object) -> bool:
    try:
        copy.deepcopy(value)
    except (TypeError, RuntimeError):
        return False
    return True


def _called(part: nn.Module) -> str:
    """A module's class and whose it is: torchvision has a VisionTransformer of its own."""
    return f"a {type(part).__name__} of {type(part).__module__.partition('.')[0]}"


def _is_claimed(module: nn.Module) -> bool:
    return any(family.matches(module) for family in FAMILIES.values())


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule | OptimizedModule)


def _replaced(part: nn.Module) -> list[str]:
    """The methods of a model's modules that were replaced on the instance by what a copy would share with it.

    What is bound to the module itself is copied with it, and seen by the checks of what the model computes. An odd linear
    has a sentence of its own.
    """
    return [
        f"{path}.{name}" if path else name
        for path, module in part.named_modules()
        for name, value in vars(module).items()
        if not isinstance(module, nn.Linear)
        and callable(value)
        and callable(getattr(type(module), name, None))
        and getattr(value, "__self__", None) is not module
    ]


def _become_like(smaller: nn.Module, part: nn.Module) -> None:
    """Gives a module the class of a part, and each of its modules and tensors the mode, device and type of the one at its path.

    What has a new path, as the halves of a linear that was split have, is as what lies above it, or as the whole.
    """
    smaller.__class__ = type(part)
    modules = dict(part.named_modules())
    tensors = {**dict(part.named_parameters()), **dict(part.named_buffers())}
    first = next(part.parameters())
    for path, module in smaller.named_modules():
        like = modules.get(_known(path, modules), part)
        module.training = like.training
        if hasattr(module, CHECKPOINTING):
            setattr(module, CHECKPOINTING, getattr(like, CHECKPOINTING, False))
    for name, tensor in [*smaller.named_parameters(), *smaller.named_buffers()]:
        path, _, last = name.rpartition(".")
        above = _known(path, modules)
        old = tensors.get(name, tensors.get(f"{above}.{last}", next(modules[above].parameters(), first)))
        tensor.data = tensor.data.to(old.device, old.dtype if tensor.is_floating_point() else tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(old.requires_grad)


def _known(path: str, modules: dict[str, nn.Module]) -> str:
    """The path, or the nearest one above it that is known."""
    while path and path not in modules:
        path = path.rpartition(".")[0]
    return path
