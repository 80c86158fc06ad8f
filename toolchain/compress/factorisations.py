"""How attention shrinks: a new factorisation is one `Factorisation` and its registration in `FACTORISATIONS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toolchain.compress.needs import Needs
from toolchain.registry import Registry
from toolchain.surgery.factorised import FactorisedLinear, replace_module


@dataclass(frozen=True)
class Factorisation:
    """A way to make attention smaller.

    Attributes:
        name: in recipes, as `compress.attention`.
        factorise: (linear, rank) → the low-rank product in its place; None where the closed form makes it from images.
        rotates: head dims shrink where they can be rotated, and only the linears of other attentions become products.
    """

    name: str
    factorise: Callable[[nn.Linear, int], FactorisedLinear] | None
    rotates: bool = False

    @property
    def needs(self) -> Needs:
        """Its requirements on the data and the model."""
        return Needs(images=self.factorise is None)


@torch.no_grad()
def truncated_svd(linear: nn.Linear, rank: int) -> FactorisedLinear:
    """The best rank-r approximation of the weight alone (Eckart–Young): W = U Σ Vᵀ, up = U_r Σ_r^½, down = Σ_r^½ V_rᵀ.

    The singular values are shared evenly so that both factors train at the same scale. Solved in float64; the sign of
    each pair is fixed by its largest entry of U, so that equal weights give equal factors.

    Args:
        linear: weight [out, in], bias [out] or None.
        rank: r, at most min(out, in).
    """
    left, values, right = torch.linalg.svd(linear.weight.double(), full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    peaks = left.abs().argmax(dim=0)
    signs = left[peaks, torch.arange(rank)].sign()
    pair = FactorisedLinear.like(linear, rank)
    pair.up.weight.copy_(left * signs * values.sqrt())
    pair.down.weight.copy_(values.sqrt()[:, None] * signs[:, None] * right)
    if linear.bias is not None:
        pair.up.bias.copy_(linear.bias)
    return pair


def principal_outputs(
    weight: Tensor, covariance: Tensor, roots: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(up [out, k], down [k, in]), k = min(out, in), up·down = W; the directions in which outputs vary most come first.

    U are the eigenvectors of LW S (LW)ᵀ, up = L^{-1}U, down = UᵀLW. Cut to r columns and rows, up·down is the matrix of
    rank r with least E‖L(W − W')x̃‖² (principal components of the outputs; the same optimum as whitened SVD, arXiv 2403.07378,
    without the inverse of S). Where out > in it is found through LW = QR, so that the eigenproblem has size `in`.

    Args:
        weight: W [out, in].
        covariance: S = Cov(x) of what enters the linear, [in, in].
        roots: L and L^{-1}, [out, out]: what counts as an error of the output; None for the identity.
    """
    weight, covariance = weight.detach().double(), covariance.double()
    if roots is not None:
        weight = roots[0] @ weight
    basis, small = torch.linalg.qr(weight) if weight.shape[0] > weight.shape[1] else (None, weight)
    vectors = torch.linalg.eigh(small @ covariance @ small.T).eigenvectors.flip(-1)
    if basis is not None:
        vectors = basis @ vectors
    peaks = vectors.abs().argmax(dim=0)
    vectors = vectors * vectors[peaks, torch.arange(vectors.shape[1])].sign()
    return (vectors if roots is None else roots[1] @ vectors), vectors.T @ weight


FACTORISATIONS: Registry[Factorisation] = Registry(
    "factorisation",
    "slimvit.factorisations",
    {
        "joint": Factorisation("joint", None, rotates=True),
        "data_aware": Factorisation("data_aware", None),
        "svd": Factorisation("svd", truncated_svd),
    },
)


def factorise(
    module: nn.Module, ranks: Mapping[str, int], method: Callable[[nn.Linear, int], FactorisedLinear]
) -> None:
    """Replaces the named linears by low-rank products, in place; a rank that is absent leaves the linear alone."""
    for name, rank in ranks.items():
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        replace_module(module, name, method(linear, rank))
