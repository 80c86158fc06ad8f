"""Each operator of MIL by numpy, and what is not understood by its name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from toolchain.errors import ArtifactError
from toolchain.interpreter.mil_operators import OPERATORS

X = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
IMAGES = np.random.default_rng(1).standard_normal((2, 3, 4, 5)).astype(np.float32)
CODES = np.arange(-12, 12, dtype=np.int8).reshape(4, 6)


def ints(*values):
    return np.array(values, np.int32)


def normed(x, axes, epsilon):
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon)


CASES = {
    "add of a number": ("add", {"x": X, "y": 2.0}, X + 2),
    "sub from a number": ("sub", {"x": 1.0, "y": X}, 1 - X),
    "real_div": ("real_div", {"x": X, "y": np.float32(4) + X**2}, X / (4 + X**2)),
    "cast to integers": ("cast", {"x": X * 3, "dtype": "int32"}, np.trunc(X * 3).astype(np.int32)),
    "matmul": ("matmul", {"x": X, "y": X, "transpose_y": True}, X @ X.transpose(0, 2, 1)),
    "linear": ("linear", {"x": X, "weight": X[0], "bias": X[0, :, 0]}, X @ X[0].T + X[0, :, 0]),
    "layer_norm": ("layer_norm", {"x": X, "axes": ints(-1), "epsilon": 1e-3}, normed(X, -1, 1e-3)),
    "layer_norm over two": ("layer_norm", {"x": X, "axes": ints(1, 2), "epsilon": 1e-3}, normed(X, (1, 2), 1e-3)),
    "reduce_mean of all": ("reduce_mean", {"x": X}, X.mean()),
    "reduce_l2_norm": (
        "reduce_l2_norm",
        {"x": X, "axes": ints(-1), "keep_dims": True},
        np.sqrt((X**2).sum(-1, keepdims=True)),
    ),
    "rsqrt": ("rsqrt", {"x": X**2, "epsilon": 0.5}, 1 / np.sqrt(X**2 + 0.5)),
    "clip": ("clip", {"x": X, "alpha": -0.5, "beta": 0.5}, X.clip(-0.5, 0.5)),
    "reshape": ("reshape", {"x": X, "shape": ints(0, -1)}, X.reshape(2, 12)),
    "split": ("split", {"x": X, "axis": -1, "split_sizes": ints(1, 3)}, [X[..., :1], X[..., 1:]]),
    "split in equal parts": ("split", {"x": X, "axis": 2, "num_splits": 2}, [X[..., :2], X[..., 2:]]),
    "slice that drops an axis": (
        "slice_by_index",
        {
            "x": X,
            "begin": ints(0, -1, 1),
            "end": ints(0, 0, -1),
            "begin_mask": np.array([True, False, False]),
            "end_mask": np.array([True, False, False]),
            "squeeze_mask": np.array([False, True, False]),
        },
        X[:, -1, 1:-1],
    ),
    "slice backwards": (
        "slice_by_index",
        {"x": X, "begin": ints(0, 0, 3), "end": ints(2, 3, 0), "stride": ints(1, 1, -2)},
        X[:, :, 3:0:-2],
    ),
    "slice_by_size": ("slice_by_size", {"x": X, "begin": ints(0, 1, 0), "size": ints(-1, 2, 3)}, X[:, 1:, :3]),
    "gather": ("gather", {"x": X, "indices": ints(2, -3), "axis": 1}, X[:, [2, 0]]),
    "gather of one": ("gather", {"x": X, "indices": 1, "axis": -1}, X[..., 1]),
    "gather_along_axis": (
        "gather_along_axis",
        {"x": X, "indices": np.zeros((2, 3, 1), np.int32), "axis": -1},
        X[..., :1],
    ),
    "expand_dims": ("expand_dims", {"x": X, "axes": ints(0, -1)}, X[None, ..., None]),
    "squeeze": ("squeeze", {"x": X[:, :1], "axes": ints(-2)}, X[:, 0]),
    "tile": ("tile", {"x": X, "reps": ints(1, 2, 1)}, np.tile(X, (1, 2, 1))),
    "stack": ("stack", {"values": [X, X + 1], "axis": 1}, np.stack([X, X + 1], 1)),
    "pad": (
        "pad",
        {"x": X, "pad": ints(0, 1, 2, 0), "constant_val": 5.0},
        np.pad(X, ((0, 0), (0, 1), (2, 0)), constant_values=5),
    ),
    "max_pool": (
        "max_pool",
        {"x": IMAGES, "kernel_sizes": ints(2, 2), "strides": ints(2, 2)},
        IMAGES[..., :4].reshape(2, 3, 2, 2, 2, 2).max((3, 5)),
    ),
    "conv, padded": (
        "conv",
        {"x": IMAGES, "weight": np.ones((1, 3, 1, 1), np.float32), "pad_type": "custom", "pad": ints(1, 0, 0, 2)},
        np.pad(IMAGES.sum(1, keepdims=True), ((0, 0), (0, 0), (1, 0), (0, 2))),
    ),
    "scales of rows": (
        "constexpr_blockwise_shift_scale",
        {"data": CODES, "scale": np.array([[1], [2], [3], [4]], np.float32)},
        CODES * np.array([[1], [2], [3], [4]], np.float32),
    ),
    "scales of blocks, with offsets": (
        "constexpr_blockwise_shift_scale",
        {"data": CODES, "scale": np.array([[1, 2]], np.float32), "offset": np.array([[3, 4]], np.int8)},
        np.hstack([CODES[:, :3] - 3.0, (CODES[:, 3:] - 4.0) * 2]),
    ),
}


def as_given(value):
    """Floats as the interpreter hands them over."""
    if isinstance(value, list):
        return [as_given(each) for each in value]
    return torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value


@pytest.mark.parametrize("case", list(CASES))
def test_an_operator_computes_what_its_specification_says(case):
    name, arguments, expected = CASES[case]
    found = OPERATORS[name](**{key: as_given(value) for key, value in arguments.items()})
    parts = list(found) if isinstance(expected, list) else [found]
    for mine, theirs in zip(parts, expected if isinstance(expected, list) else [expected], strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("cast", {"x": X, "dtype": "int4"}, "a cast to int4"),
        ("gelu", {"x": X, "mode": "SIGMOID_APPROXIMATION"}, "SIGMOID_APPROXIMATION"),
        ("layer_norm", {"x": X, "axes": ints(1)}, r"over axes \[1\]"),
        ("conv", {"x": IMAGES, "weight": IMAGES, "pad_type": "same"}, "'same'"),
        ("concat", {"values": [X, X], "axis": 1, "interleave": True}, "interleaves"),
        ("pad", {"x": X, "pad": ints(1, 1), "mode": "reflect"}, "reflect"),
        ("reshape", {"x": X, "shape": X}, "only constant ones"),
        ("squeeze", {"x": X, "axes": ints(0)}, "a squeeze of an axis of 2"),
        ("split", {"x": X, "axis": 1, "num_splits": 2}, "3 into 2 equal parts"),
        ("gather", {"x": X, "indices": ints(0), "batch_dims": 1}, "batches"),
        ("max_pool", {"x": IMAGES, "kernel_sizes": ints(2, 2), "ceil_mode": True}, "rounds up"),
    ],
)
def test_what_is_not_understood_is_refused(name, arguments, words):
    with pytest.raises(ArtifactError, match=words):
        OPERATORS[name](**{key: as_given(value) for key, value in arguments.items()})
