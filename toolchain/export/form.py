"""What an artifact takes and gives, read without opening it, and the artifact as a function from images to its outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from toolchain.artifacts.onnx_file import read_onnx
from toolchain.errors import ArtifactError
from toolchain.export.calls import Outputs, in_parts, opened_outputs
from toolchain.export.inputs import PREPROCESS, ImageInput, declared_preprocess, fit, folder_input, input_of, shown
from toolchain.export.onnx_graph import (
    OUTPUT,
)
from toolchain.export.precision import Reading, precision_in, precision_of, reference_target
from toolchain.export.probabilities import PROBABILITIES, output_in, own_probabilities
from toolchain.export.quantise import STEP
from toolchain.export.stage import torch_call
from toolchain.model import ModelRecord, Preprocess
from toolchain.outputs import Output
from toolchain.surgery.replay import load_model


@dataclass(frozen=True)
class Form:
    """What an artifact takes and gives, read without opening it.

    Attributes:
        path: a model folder or an ONNX file.
        input: its one input.
        outputs: name → rank of its outputs, None where that is not known; without the probabilities that slimvit adds.
        precision: and where that is known from.
        preprocess: what it says about its input; None where it says nothing.
        output: what it says that its outputs are; None where it says nothing.
        fixed_scales: whether it rounds activations by scales that are stored, those of the images that it was calibrated on.
    """

    path: Path
    input: ImageInput
    outputs: Mapping[str, int | None]
    precision: Reading
    preprocess: Preprocess | None
    output: Output | None
    fixed_scales: bool = False

    @property
    def main_output(self) -> str:
        """The output that names classes: "logits", or one that is called so with a number behind; else the first."""
        called = [name for name in self.outputs if name.startswith(OUTPUT)]
        return OUTPUT if OUTPUT in called else next(iter([*called, *self.outputs]))

    @property
    def notes(self) -> list[str]:
        """One sentence each on what was read from the graph or has to be known of it."""
        said = []
        if self.precision.reason:
            said.append(f"{self.path.name} is {self.precision}.")
        if self.input.batch is not None and len(self.input.sample) != 3:
            whole = shown((self.input.batch, *self.input.sample))
            said.append(f"{self.path.name} takes {whole}, of which the first is taken for a fixed batch.")
        elif self.input.batch is not None:
            said.append(f"{self.path.name} has a fixed batch and is run at it: {self.input.batch}.")
        if self.input.channels_last and self.preprocess is None:
            said.append(
                f"{self.path.name} takes {shown(self.input.sample)}, of which the last is taken for the channels."
            )
        if self.preprocess is not None and not fit(self.preprocess.input_size, self.input.size):
            said.append(
                f"{self.path.name} says that images are {list(self.preprocess.input_size)} and takes "
                f"{shown(self.input.size)}, channels first; they are given as it takes them."
            )
        if self.input.takes_pixels and self.preprocess is None:
            said.append(f"{self.path.name} takes uint8 and is fed pixels, 0…255.")
        return said


def form_of(path: Path) -> Form:
    """What an artifact takes and gives.

    Raises:
        StorageError: it cannot be read.
        ArtifactError: it is damaged.
        RecipeError: it is no function of images.
    """
    if path.is_dir():
        record = ModelRecord.load(path / "model.json")
        size = folder_input(record.preprocess)
        return Form(path, size, {OUTPUT: 2}, precision_of(path), record.preprocess, record.model.output)
    model = read_onnx(path)
    kinds = {value.name: value.type.tensor_type for value in model.graph.output}
    outputs = {name: len(kind.shape.dim) if kind.HasField("shape") else None for name, kind in kinds.items()}
    if own_probabilities(model):
        del outputs[PROBABILITIES]
    preprocess, image = declared_preprocess(model, path), input_of(model, path)
    if preprocess and len(image.size) == 3 and not fit(preprocess.input_size[:1], image.size[:1]):
        raise ArtifactError(
            f"{path} says that images are {list(preprocess.input_size)}, channels first, and takes {shown(image.sample)}: its "
            f"metadata is of another file. Remove {PREPROCESS} and name --mean and --std."
        )
    fixed = any(node.op_type == "QuantizeLinear" or node.op_type.startswith("QLinear") for node in model.graph.node)
    return Form(path, image, outputs, precision_in(model), preprocess, output_in(model), fixed)


@contextlib.contextmanager
def opened_form(form: Form, preprocess: Preprocess | None = None) -> Iterator[Outputs]:
    """Images [B, C, H, W] → name → output of an artifact, in a block.

    A folder runs in torch, a file in ONNX Runtime on the CPU, or in what can run its precision.

    Args:
        form: the artifact.
        preprocess: how the images were prepared, for a file that takes pixels and does not say.

    Raises:
        TargetUnavailable: nothing here runs the file's precision.
        StorageError, ArtifactError: it cannot be read.
    """
    if form.path.is_dir():
        logits = torch_call(load_model(form.path).module)
        yield in_parts(lambda images: {OUTPUT: logits(images)}, STEP)
        return
    target, threads = reference_target(form.precision), torch.get_num_threads()
    with opened_outputs(target, form.path, threads, preprocess=preprocess) as run:
        yield run
