import torch
from builders import dense_model

from toolchain.data import open_source
from toolchain.data.transforms import Wanted
from toolchain.model import run_stage
from toolchain.recipe import TrainSection
from toolchain.training.stages import Train

DIGITS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}


def test_a_trained_model_says_what_it_was_trained_on():
    source = open_source("digits", Wanted((1, 8, 8), {}))
    source.splits["train"].positions = torch.arange(32)
    made = run_stage(Train(TrainSection(epochs=1), source), dense_model(**DIGITS)).artifact
    assert made.provenance == {"weights": "random", "trained_on": {"source": "digits", "digest": source.digest}}
