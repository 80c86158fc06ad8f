from dataclasses import replace

import torch
from builders import dense_model

from toolchain.data import open_source
from toolchain.data.transforms import Wanted
from toolchain.model import run_stage
from toolchain.outputs import CLASS_NAMES
from toolchain.recipe import TrainSection
from toolchain.training.stages import Train

DIGITS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}


def test_a_trained_model_says_what_it_was_trained_on():
    source = open_source("digits", Wanted((1, 8, 8), {}))
    source.splits["train"].positions = torch.arange(32)
    made = run_stage(Train(TrainSection(epochs=1), source), dense_model(**DIGITS)).artifact
    assert made.provenance == {"weights": "random", "trained_on": {"source": "digits", "digest": source.digest}}


def test_a_trained_model_names_the_classes_that_it_learned():
    """Kind: names of classes that the outputs no longer stand for."""
    source = open_source("digits", Wanted((1, 8, 8), {}))
    source.splits["train"].positions = torch.arange(32)
    before = dense_model(**DIGITS)
    before = replace(before, provenance={"weights": "random", CLASS_NAMES: list("jihgfedcba")})
    names = {name: number for number, name in enumerate("bacdefghij")}
    for numbers, expected in ((names, tuple("bacdefghij")), ({"a": 3}, ()), ({}, ())):
        stage = Train(TrainSection(epochs=1), replace(source, class_names=numbers))
        assert run_stage(stage, before).artifact.class_names == expected
