"""A residual stream of fewer dims: which ones, the model that writes no others, and the stock model of that width.

LayerNorm takes the mean away and divides by the deviation. Within a subspace of the mean-free stream that has the orthonormal basis
B [D, D′−1], x = B z, and with an orthonormal basis E [D′, D′−1] of the mean-free vectors of D′, LayerNorm(D′) of E z is that of x in
other coordinates, up to √(D/D′): W′ = W diag(γ) B Eᵀ √(D/D′) reads it, ε′ = ε D/D′, and what is written is multiplied by E Bᵀ.

Legend: D width, D′ narrower width, N tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor, nn

from toolchain.compress.moments import damped
from toolchain.compress.sensitivity import BATCH, DAMPING
from toolchain.data import Images, batches
from toolchain.families import Block, Branch
from toolchain.families.vit import VitFamily
from toolchain.likelihood import Likelihood


@dataclass(frozen=True)
class Stream:
    """What is kept of a stream.

    Attributes:
        basis: B [D, D′−1], orthonormal, without a mean; float64.
        onto: P [D, D], x → P x keeps what is in B's span, not always at right angles.
    """

    basis: Tensor
    onto: Tensor

    @property
    def width(self) -> int:
        """D′."""
        return self.basis.shape[1] + 1


@dataclass(frozen=True)
class Reading:
    """What norms make of a stream before their affine part, over all of them.

    Attributes:
        moment: E[x̂ x̂ᵀ], float64 [D, D].
        fisher: E[g gᵀ] of the gradients g of what the model says with respect to x̂, float64 [D, D].
    """

    moment: Tensor
    fisher: Tensor


def norms_of(model: nn.Module) -> dict[str, nn.LayerNorm]:
    """Path → norm of all that read the stream of timm's plain ViT, in forward order."""
    return {
        name: each
        for name, each in model.named_modules()
        if isinstance(each, nn.LayerNorm) and each.normalized_shape == (model.embed_dim,)
    }


def read(model: nn.Module, images: Images, likelihood: Likelihood, seed: int) -> Reading:
    """What all norms read, and how much the output cares, by one backward pass; no label is looked at."""
    norms, generator = norms_of(model), torch.Generator().manual_seed(seed)
    moment = fisher = torch.zeros((), dtype=torch.float64)
    seen: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        output.retain_grad()
        seen[name] = output
        return output

    handles = [
        norm.register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
        for name, norm in norms.items()
    ]
    try:
        for batch, _ in batches(images, BATCH):
            with torch.enable_grad():
                likelihood.score_loss(model(batch), generator).backward()  # type: ignore[no-untyped-call]
            for name, norm in norms.items():
                assert seen[name].grad is not None
                plain = ((seen[name].detach() - norm.bias) / norm.weight).flatten(0, 1).double()
                gradient = (seen[name].grad * norm.weight).flatten(0, 1).double()
                moment, fisher = moment + plain.T @ plain, fisher + gradient.T @ gradient
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    return Reading(moment.detach(), fisher.detach())


def mean_free(width: int) -> Tensor:
    """An orthonormal basis [D, D−1] of the vectors of `width` whose mean is 0."""
    start = torch.eye(width, dtype=torch.float64)
    start[:, 0] = 1
    return torch.linalg.qr(start).Q[:, 1:]


def narrow(reading: Reading, width: int, *, weighed: bool = True) -> Stream:
    """The stream of D′ = `width` that loses least of what the output cares about, or least of all with `weighed` off."""
    free = mean_free(len(reading.moment))
    moment, fisher = (free.T @ each @ free for each in (reading.moment, reading.fisher))
    root = inverse = torch.eye(len(moment), dtype=torch.float64)
    if weighed:
        values, vectors = torch.linalg.eigh(damped(fisher / fisher.diagonal().mean(), DAMPING))
        root, inverse = ((vectors * values.pow(power)) @ vectors.T for power in (0.5, -0.5))
    kept = torch.linalg.eigh(root @ moment @ root).eigenvectors[:, -(width - 1) :]
    basis = torch.linalg.qr(inverse @ kept).Q
    return Stream(free @ basis, free @ inverse @ kept @ kept.T @ root @ free.T)


@torch.no_grad()
def write_within(model: nn.Module, stream: Stream) -> None:
    """Projects all that is written into the stream of timm's plain ViT, in place: the function of the narrower model."""
    for weight in _written(model):
        weight.copy_((stream.onto @ weight.double().flatten(1)).reshape(weight.shape))


def _written(model: nn.Module) -> Iterator[Tensor]:
    """Views [D, …] of all parameters that are written into the stream."""
    for name in ("cls_token", "pos_embed"):
        yield model.get_parameter(name)[0].T
    writers = ["patch_embed.proj"]
    writers += [name for name, _ in model.named_modules() if name.endswith(("attn.proj", "mlp.fc2"))]
    for name in writers:
        yield model.get_submodule(name).weight  # type: ignore[misc]
        yield model.get_submodule(name).bias[:, None]  # type: ignore[index,misc]


@torch.no_grad()
def narrowed(model: nn.Module, stream: Stream) -> nn.Module:
    """The stock model of width D′ that computes what a model computes which writes within the stream."""
    made, wide = copy.deepcopy(model), stream.basis.shape[0]
    ratio, into = wide / stream.width, mean_free(stream.width) @ stream.basis.T  # E Bᵀ [D′, D]
    for name in ("cls_token", "pos_embed"):
        setattr(made, name, nn.Parameter((model.get_parameter(name).double() @ into.T).float()))
    for name, layer in list(made.named_modules()):
        if name == "patch_embed.proj" or name.endswith(("attn.proj", "mlp.fc2")):
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            shape = (stream.width, *layer.weight.shape[1:])
            layer.weight = nn.Parameter((into @ layer.weight.double().flatten(1)).reshape(shape).float())
            layer.bias = nn.Parameter((into @ layer.bias.double()).float())  # type: ignore[union-attr]
            setattr(layer, "out_channels" if isinstance(layer, nn.Conv2d) else "out_features", stream.width)
    for name, norm in norms_of(model).items():
        reader = _reader(made, name)
        weight = reader.weight.double()
        reader.bias.copy_(reader.bias.double() + weight @ norm.bias.double())
        reader.weight = nn.Parameter(((weight * norm.weight.double()) @ into.T * ratio**0.5).float())
        reader.in_features = stream.width
        place, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(place), leaf, nn.LayerNorm(stream.width, eps=norm.eps * ratio))
    made.embed_dim = made.num_features = stream.width  # type: ignore[assignment]
    return made


def _reader(model: nn.Module, norm: str) -> nn.Linear:
    """The linear that reads what a norm makes."""
    place, _, leaf = norm.rpartition(".")
    name = {"norm1": f"{place}.attn.qkv", "norm2": f"{place}.mlp.fc1", "norm": "head"}[leaf]
    reader = model.get_submodule(name)
    assert isinstance(reader, nn.Linear)
    return reader


@dataclass(frozen=True)
class Within(Branch):
    """A branch that is asked for nothing outside of a narrower stream."""

    onto: Tensor = field(default_factory=lambda: torch.zeros(()), compare=False)

    def asked(self, y: Tensor, their: Tensor, our: Tensor, beta: float) -> Tensor:
        return super().asked(y, their, our, beta) @ self.onto.T.to(y)


class NarrowFamily(VitFamily):
    """Timm's plain ViT, whose compressed form is to write within a stream; the dense model stays as it is."""

    def __init__(self, dense: nn.Module, stream: Stream) -> None:
        self._dense, self._stream = dense, stream

    def blocks(self, model: nn.Module) -> list[Block]:
        first, *others = [
            replace(each, branches=tuple(map(self._within, each.branches))) for each in super().blocks(model)
        ]
        return [replace(first, bridge=self._enter), *others]

    def _within(self, branch: Branch) -> Within:
        return Within(**{each.name: getattr(branch, each.name) for each in fields(branch)}, onto=self._stream.onto)

    def _enter(self, model: nn.Module, x: Tensor) -> Tensor:
        return x if model is self._dense else x @ self._stream.onto.T.to(x)
