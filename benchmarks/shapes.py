"""ONNX files of timm shapes, dense and compressed, for measuring latency: weights are untrained, images are noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from records import UNALIGNED

from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.compress.allocation import Latency
from toolchain.cost import trace
from toolchain.export.convert import Convert
from toolchain.export.onnx_graph import export_onnx
from toolchain.model import run_stage
from toolchain.parity import BATCHES
from toolchain.pipeline.job import prepare
from toolchain.pipeline.stages.compress import compress
from toolchain.recipe import Recipe
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split
from toolchain.version import tool

DENSE = "dense"


@dataclass(frozen=True)
class Shape:
    """One file: a model as it is or in one of a suite's forms, in one precision.

    Attributes:
        model: the name that the suite has for it.
        timm_name: the name that timm has for it.
        form: the name of what was made of it.
        sections: of the recipe that makes it; {} for the dense model.
        precision: of the file.
    """

    model: str
    timm_name: str
    form: str
    sections: dict[str, Any]
    precision: str

    def file(self, work: Path) -> Path:
        """Where the file lies in a folder; made once, the int8 ones from those of fp32."""
        path = work / f"{self.model}.{self.form}.{self.precision}.onnx"
        if path.exists():
            return path
        work.mkdir(parents=True, exist_ok=True)
        if self.precision != "fp32":
            whole = Shape(self.model, self.timm_name, self.form, self.sections, "fp32").file(work)
            size = tuple(axis.dim_value for axis in OnnxFile(whole).model.graph.input[0].type.tensor_type.shape.dim[1:])
            images = np.random.default_rng(0).standard_normal((max(BATCHES), *size), dtype=np.float32)
            run_stage(Convert(self.precision, path, images, images, real_images=False), OnnxFile(whole))
            return path
        raw = {"model": {"name": self.timm_name, "pretrained": False}}
        raw["data"] = {"source": "none", "calibration_images": 32}
        sections = self.sections or {"compress": {"method": "none"}}
        raw |= {**sections, "compress": {"align": UNALIGNED, **sections["compress"]}}
        job = prepare(Recipe.from_dict(raw))
        module, size = job.dense.module, job.dense.preprocess.input_size
        if self.sections:
            masked = compress(job, job.dense, Latency()).artifact
            module = run_stage(Split(), run_stage(Slice(), masked).artifact).artifact.module
        shape = trace(module, job.dense.family, size)
        about = {"slimvit.tool": tool(), "benchmark": path.stem}
        about |= {"params": str(shape.params), "macs": str(shape.macs)}
        export_onnx(module, path, input_size=size, opset=20, metadata=about, simplify=True)
        return path
