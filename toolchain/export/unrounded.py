"""An ONNX file in fp32 arithmetic, whatever types it declares: what it says, apart from what its types cost."""

from __future__ import annotations

import numpy as np
import torch

from toolchain.artifacts import Artifact
from toolchain.artifacts.onnx_plain import plain
from toolchain.export.calls import STEP, Array, Outputs, feeds_of, in_parts
from toolchain.interpreter import graph_of, module_of
from toolchain.model import Preprocess


def unrounded(file: Artifact, preprocess: Preprocess | None = None) -> Outputs:
    """Images [B, C, H, W] → name → output of an ONNX file, computed in torch with no activation rounded.

    Args:
        file: its weights stay what they are, rounded to the types that hold them.
        preprocess: how the images were prepared, for a file that takes pixels and does not say.

    Raises:
        RecipeError, StorageError, ArtifactError: as `feeds_of` and `module_of`.
    """
    feeds, batch = feeds_of(file, preprocess), file.image.batch
    module = module_of(plain(graph_of(file.path)).model)

    @torch.no_grad()
    def call(images: Array) -> dict[str, Array]:
        named = feeds(images)
        values = module(*(torch.from_numpy(named[name]) for name in module.input_names))
        several = values if isinstance(values, tuple) else (values,)
        return {name: np.asarray(each) for name, each in zip(module.output_names, several, strict=True)}

    return in_parts(call, batch or STEP, fill=batch is not None)
