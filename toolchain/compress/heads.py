"""The four matrices of attention, head by head, from any layout of linears.

Attention sees a head's query and key weights only in the product W_qᵀ W_k, and its value and output weights only in W_o W_v,
so its dimensions may be rotated and cut in these products: A3, arXiv 2505.12942; MoDeGPT, arXiv 2408.09632.

Legend: H heads, d head dim, r reduced head dim, D width, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toolchain.compress.moments import cholesky
from toolchain.families import Span, UnitGroup

DAMPING = 1e-9


@dataclass(frozen=True)
class Heads:
    """Reads and writes one attention through its `head_dim` unit group."""

    module: nn.Module
    group: UnitGroup

    def span(self, role: str) -> Span:
        """The span of "query", "key", "value" or "output"."""
        return next(span for span in self.group.spans if span.role == role)

    def linear(self, role: str) -> nn.Linear:
        """The linear that holds a role."""
        linear = self.module.get_submodule(self.span(role).linear)
        assert isinstance(linear, nn.Linear)
        return linear

    def _range(self, role: str) -> slice:
        span = self.span(role)
        return slice(span.offset, span.offset + self.group.partitions * span.width)

    def activations(self, role: str, output: Tensor) -> Tensor:
        """[B, H, N, d] of a role, from the output [B, N, *] of the linear that holds it."""
        part = output[..., self._range(role)]
        return part.reshape(*part.shape[:-1], self.group.partitions, self.group.total).transpose(1, 2)

    def weight(self, role: str) -> Tensor:
        """float64 [H, d, in] of "query", "key" or "value"; [H, D, d] of "output"."""
        weight = self.linear(role).weight.detach().double()
        shape = (self.group.partitions, self.group.total)
        if self.span(role).axis == 0:
            return weight[self._range(role)].reshape(*shape, -1)
        return weight[:, self._range(role)].reshape(-1, *shape).transpose(0, 1)

    def bias(self, role: str) -> Tensor | None:
        """float64 [H, d], or None."""
        bias: Tensor | None = self.linear(role).bias
        if bias is None:
            return None
        return bias.detach().double()[self._range(role)].reshape(self.group.partitions, self.group.total)

    @torch.no_grad()
    def write(self, role: str, weight: Tensor, bias: Tensor | None = None) -> None:
        """Puts back what `weight` and `bias` gave."""
        linear = self.linear(role)
        if self.span(role).axis == 0:
            linear.weight[self._range(role)] = weight.flatten(0, 1).to(linear.weight)
        else:
            linear.weight[:, self._range(role)] = weight.transpose(0, 1).flatten(1, 2).to(linear.weight)
        if bias is not None:
            linear.bias[self._range(role)] = bias.flatten().to(linear.bias)


@torch.no_grad()
def exact_first_steps(heads: Heads) -> None:
    """Drops b_k and moves b_v into the output bias; the function stays what it is.

    b_k adds q·b_k to every logit of a row, which softmax ignores. Rows of attention sum to one, so that b_v comes out
    of every head once: b_proj += W_proj b_v.
    """
    key, value, output = heads.bias("key"), heads.bias("value"), heads.linear("output")
    if key is not None:
        heads.write("key", heads.weight("key"), torch.zeros_like(key))
    if value is not None and output.bias is not None:
        moved = torch.einsum("hcd,hd->c", heads.weight("output"), value)
        output.bias.add_(moved.to(output.bias))
        heads.write("value", heads.weight("value"), torch.zeros_like(value))


@dataclass
class HeadStatistics:
    """What the joint factorisations need: per head E[qqᵀ], E_image[Cov_tokens(k)], and moments of u, the heads' output.

    Attributes:
        query: [H, d, d], with bias, uncentred.
        key: [H, d, d], centred within each image: softmax does not see a shift.
        mean: E[u], [H, d].
        covariance: Cov(u), [H, d, d].
    """

    query: Tensor
    key: Tensor
    mean: Tensor
    covariance: Tensor


def rotate_query_key(heads: Heads, statistics: HeadStatistics) -> Tensor:
    """σ² [H, d], the logit error of dropping each direction, after rotating q and k so that the least useful come last.

    Cholesky G_q = R_aᵀR_a, G_k = R_bᵀR_b; SVD R_a R_bᵀ = U Σ Vᵀ; T_q = Σ^½ Uᵀ R_a^{−ᵀ}, T_k = Σ^½ Vᵀ R_b^{−ᵀ}. At full
    rank T_qᵀ T_k = I, so nothing changes; keeping the first r rows is the best rank-r approximation of the logits.
    """
    left, right = _cholesky(statistics.query), _cholesky(statistics.key)  # upper: G = RᵀR
    u, values, vt = torch.linalg.svd(left @ right.mT)
    u, vt = _signed(u, vt)
    scale = values.clamp_min(1e-12 * values[:, :1]).sqrt()[..., None]
    query_map = scale * torch.linalg.solve_triangular(left, u, upper=True).mT
    key_map = scale * torch.linalg.solve_triangular(right, vt.mT, upper=True).mT
    # T_qᵀT_k = R_a^{-1} U Σ Vᵀ R_b^{-T}: both maps are inverse transposes of each other up to the floor on Σ.
    for role, matrix in (("query", query_map), ("key", key_map)):
        bias = heads.bias(role)
        heads.write(role, matrix @ heads.weight(role), None if bias is None else (matrix @ bias[..., None])[..., 0])
    squares: Tensor = values.square()
    return squares


def rotate_value_output(
    heads: Heads, statistics: HeadStatistics, root: Tensor, inverse_root: Tensor
) -> tuple[Tensor, Tensor]:
    """(λ [H, d], W_o E[u] per direction [H, d, D]) after rotating v and the output so that the least useful come last.

    With L the root of what the output cares about: LW_o = QR; E, Λ = eigenpairs of R C Rᵀ; U = L^{-1}QE; T = EᵀR;
    W_v ← Λ^{−¼}T W_v, W_o ← UΛ^{¼}. Dropping directions i ≥ r costs Σ λ_i in the norm ‖L·‖² and shifts the output by
    U_i (T_i μ), which the second result holds so that the bias can take it up.

    Args:
        heads: the attention.
        statistics: its statistics.
        root: L, symmetric, [D, D]; the identity for the plain squared error.
        inverse_root: L^{-1}.
    """
    output = root @ heads.weight("output")  # [H, D, d]
    q, r = torch.linalg.qr(output)
    values, vectors = torch.linalg.eigh(r @ statistics.covariance @ r.mT)
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    vectors, _ = _signed(vectors, vectors.mT)
    largest = values[:, :1]
    balance = torch.where(largest > 0, values.clamp_min(1e-12 * largest), torch.ones_like(values)).pow(0.25)  # [H, d]
    basis, maps = inverse_root @ q @ vectors, vectors.mT @ r
    shift = (maps @ statistics.mean[..., None]) * basis.mT  # [H, d, D]
    bias = heads.bias("value")
    new_bias = None if bias is None else (maps @ bias[..., None])[..., 0] / balance
    heads.write("value", (maps @ heads.weight("value")) / balance[..., None], new_bias)
    heads.write("output", basis * balance[:, None, :])
    return values, shift


def _cholesky(matrix: Tensor) -> Tensor:
    return torch.stack([cholesky(m, DAMPING, upper=True) for m in matrix])


def _signed(u: Tensor, vt: Tensor) -> tuple[Tensor, Tensor]:
    """The same pair with the largest entry of each column of U made positive."""
    peaks = u.abs().argmax(dim=-2, keepdim=True)
    signs = u.gather(-2, peaks).sign()
    return u * signs, vt * signs.mT
