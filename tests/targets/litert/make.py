"""Writes the tiny files beside it: ONNX files in fp32 and int8, and the .tflite files that are made of them.

    SLIMVIT_LITERT_PYTHON=~/slimvit-litert/bin/python PYTHONPATH=.:tests python tests/targets/litert/make.py

They were made with litert-torch 0.10.0 and torch 2.14.1; the tests that only run .tflite files need neither.
"""

import json
from pathlib import Path

import numpy as np
import onnx
from builders import dense_model

from toolchain.artifacts.onnx_file import PRECISION, PREPROCESS
from toolchain.export.onnx_graph import export_onnx
from toolchain.export.precision import PRECISIONS
from toolchain.targets import BuildOptions, get_target

FOLDER = Path(__file__).parent
MODEL = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 5}


def main():
    model = dense_model(**MODEL)
    metadata = {PREPROCESS: json.dumps(model.preprocess.to_dict())}
    fp32 = FOLDER / "tiny.fp32.onnx"
    export_onnx(model.module, fp32, input_size=(3, 16, 16), opset=20, metadata=metadata, simplify=True)
    images = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)
    int8 = PRECISIONS["int8-dynamic"].convert(onnx.load(fp32), images).model
    onnx.helper.set_model_props(int8, metadata | {PRECISION: "int8-dynamic"})
    onnx.save(int8, FOLDER / "tiny.int8-dynamic.onnx")
    for path in FOLDER.glob("tiny.*.onnx"):
        get_target("litert-cpu").build(path, FOLDER, BuildOptions((1, 1, 3)))


if __name__ == "__main__":
    main()
