"""GPTQ: weights rounded one input after another, so that the inputs that are left take up what rounding did to the output.

Frantar et al. 2023, arXiv 2210.17323. Legend: p inputs, q outputs, C [p, p] the covariance of the inputs; what rounding a
weight W [p, q] to Ŵ does to the output is E‖Δy‖² = tr(W − Ŵ)ᵀ C (W − Ŵ).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.artifacts.onnx_plain import Codes

Array = NDArray[Any]
LEVELS = 7
"""Codes are −7 … 7: those of four bits that have a counterpart of the other sign."""
SHARES = np.linspace(0.6, 1.0, 9)
"""Scales that are tried, as shares of the one that reaches the largest weight: cutting off a few makes all other steps finer."""
DAMPING = 0.01
"""Share of the mean diagonal of C that is added to the diagonal."""
BLOCK = 128
"""Number of inputs whose rounding errors are passed on to the later inputs in one product."""


def nearest(weight: Array) -> Codes:
    """Every weight [p, q] at the nearest of the codes that reach the largest of its output; a scale of 1 where all are 0."""
    scales = (np.abs(weight).max(axis=0) / LEVELS).astype(np.float32)
    scales = np.where(scales >= np.finfo(np.float32).tiny, scales, np.float32(1))
    return Codes(np.clip(np.rint(weight / scales), -LEVELS, LEVELS).astype(np.int8), scales)


def gptq(weight: Array, covariance: Array) -> Codes:
    """A weight [p, q] rounded by GPTQ: each output with that of several scales which moves it least, or as by `nearest`.

    Args:
        weight: W.
        covariance: C; about 0 where no bias can take up a mean.
    """
    weight, plain = weight.astype(np.float64), nearest(weight)
    factor = _factor(covariance)
    tries = [plain]
    for share in SHARES:
        scales = (plain.scales * share).astype(np.float32)
        tries.append(Codes(_codes(weight, scales.astype(np.float64), *factor), scales))
    best = np.argmin([output_error(weight - each.weight, covariance) for each in tries], axis=0)
    columns = np.arange(weight.shape[1])
    codes, scales = np.stack([each.codes for each in tries]), np.stack([each.scales for each in tries])
    return Codes(codes[best, :, columns].T, scales[best, columns])


def output_error(difference: Array, covariance: Array) -> Array:
    """E Δy² of each output [q], for a difference of weights [p, q]."""
    error: Array = np.einsum("pq,pq->q", difference, covariance @ difference)
    return error


def _factor(covariance: Array) -> tuple[Array, Array]:
    """(the order in which inputs are rounded; U with (C + λI)⁻¹ = UᵀU in that order): those that vary most come first.

    The most are then left to make up for them.
    """
    order = np.argsort(-covariance.diagonal(), kind="stable")
    level = DAMPING * float(covariance.diagonal().mean()) or 1.0
    inverse = np.linalg.inv(covariance[np.ix_(order, order)] + level * np.eye(len(order)))
    return order, np.linalg.cholesky((inverse + inverse.T) / 2).T


def _codes(weight: Array, scales: Array, order: Array, upper: Array) -> Array:
    """int8 [p, q]: input j is rounded, and W_k −= U_jk/U_jj · (W_j − Ŵ_j) for every later k."""
    left, codes = weight[order], np.empty(weight.shape, np.int8)
    for start in range(0, len(order), BLOCK):
        end = min(start + BLOCK, len(order))
        errors = np.empty((end - start, weight.shape[1]))
        for j in range(start, end):
            code = np.clip(np.rint(left[j] / scales), -LEVELS, LEVELS)
            codes[order[j]] = code
            errors[j - start] = (left[j] - code * scales) / upper[j, j]
            left[j + 1 : end] -= np.outer(upper[j, j + 1 : end], errors[j - start])
        left[end:] -= upper[start:end, end:].T @ errors
    return codes
