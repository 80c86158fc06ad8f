"""A suite so small that it runs in seconds, and the threads that a run changes put back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

TINY = """\
title = "A tiny suite"
compare = [["joint.params0.5", "vtp.params0.7"]]

[references.tiny]
seeds = [0]

[references.tiny.recipe]
model = { name = "vit_tiny_patch16_224", pretrained = false, kwargs = { img_size = 8, patch_size = 4, in_chans = 1, \
num_classes = 10, embed_dim = 32, depth = 2, num_heads = 2 } }
data = { source = "digits", calibration_images = 64 }
train = { epochs = 1, lr = 1e-3, batch_size = 64 }

[recovery]
epochs = 1
batch_size = 64

[[cells]]
name = "dense"
reference = "tiny"
settings = { "compress.method" = "none" }

[[cells]]
name = "sweep-lr"
sweep = "lr"
reference = "tiny"
training = ["recovered"]
settings = { "compress.method" = "joint", "budget.params" = 0.5 }
grid = { "finetune.lr" = [1e-5, 1e-3] }

[[cells]]
name = "joint"
reference = "tiny"
training = ["zero", "recovered"]
best = ["lr"]
settings = { "compress.method" = "joint" }
grid = { "budget.params" = [0.5] }

[[cells]]
name = "vtp"
reference = "tiny"
settings = { "compress.method" = "vtp", "compress.vtp.epochs" = 1 }
grid = { "budget.params" = [0.7] }
"""


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def suite_file(tmp_path) -> Path:
    """The tiny suite in a file of its own."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def measured(tmp_path_factory) -> Path:
    """A folder in which the tiny suite was measured once: tiny.toml, results/, work/."""
    import run

    root = tmp_path_factory.mktemp("suite")
    (root / "tiny.toml").write_text(TINY)
    before = torch.get_num_threads()
    arguments = [str(root / "tiny.toml"), "--work", str(root / "work"), "--results", str(root / "results")]
    assert run.main(arguments) == 0
    torch.set_num_threads(before)
    return root
