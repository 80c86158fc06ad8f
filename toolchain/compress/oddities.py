"""Finds what a smaller model would do otherwise: linears and activations that are not what they look like, weights that are shared or no numbers."""

from __future__ import annotations

import copy

import torch
from timm.layers.layer_scale import LayerScale
from timm.layers.linear import Linear
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

PLAIN = (nn.Linear.forward, Linear.forward, NonDynamicallyQuantizableLinear.forward)
"""What a linear may compute."""
MLPS = (Mlp, GluMlp, SwiGLU)


def oddity(model: nn.Module) -> str:
    """What of a model would become another function in a smaller one, and what to do; "" if nothing would."""
    return _odd_weight(model) or _odd_layer(model) or _shared(model) or _mixing(model)


def _odd_weight(model: nn.Module) -> str:
    for path, weight in model.named_parameters():
        if weight.is_meta:
            return f"{path} is on the meta device and has no values; load its weights first"
        if not is_lazy(weight) and type(weight.data) is not Tensor:
            kind = type(weight.data).__name__
            return f"{path} is a {kind}, which nothing can be solved for; shrink the model before it is quantised or distributed"
    return ""


def _odd_layer(model: nn.Module) -> str:
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear | LayerScale) and is_parametrized(layer):
            return f"{path} has parametrizations; take them off first, by torch.nn.utils.parametrize.remove_parametrizations"
        if isinstance(layer, nn.Linear) and (type(layer).forward not in PLAIN or "forward" in vars(layer)):
            return (
                f"{path} is a {type(layer).__name__} whose forward is its own, and would become a plain nn.Linear; merge what it "
                "adds into its weights first"
            )
    return ""


def _shared(model: nn.Module) -> str:
    owners: dict[int, str] = {}
    for path, tensor in model.named_parameters(remove_duplicate=False):  # one block may stand at several places
        first = owners.setdefault(id(tensor) if is_lazy(tensor) else tensor.data_ptr() or id(tensor), path)
        if first != path:
            return f"{path} is {first} as well; give it a copy of its own first"
    return ""


def _mixing(model: nn.Module) -> str:
    for path, part in model.named_modules():
        if isinstance(part, MLPS) and isinstance(part.fc2, nn.Linear):
            name, neurons = "act", part.fc2.in_features
        elif isinstance(part, ParallelScalingBlock | DiffParallelScalingBlock):
            name, neurons = "mlp_act", int(part.in_split[0])
        else:
            continue
        if _mixes(activation := part.get_submodule(name), neurons):
            return (
                f"{path}.{name}, a {type(activation).__name__}, treats neurons differently or together, so none can be taken away; "
                "use an activation that works on each number alone"
            )
    return ""


@torch.no_grad()
def _mixes(activation: nn.Module, neurons: int) -> bool:
    """Whether what an activation makes of a neuron depends on the others, or on which neuron it is."""
    act, draws = copy.deepcopy(activation).to("cpu", torch.float32).eval(), torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, neurons, generator=draws)
    other = torch.cat([x[..., :1] + 1, x[..., 1:]], -1)
    order = torch.randperm(neurons, generator=draws)
    y = act(x.clone())  # it may work in place
    alone = torch.allclose(act(other)[..., 1:], y[..., 1:], atol=1e-6)
    return not (alone and torch.allclose(act(x[..., order]), y[..., order], atol=1e-6))
