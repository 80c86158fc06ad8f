from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from toolchain.errors import ArtifactError, RecipeError, StorageError
from toolchain.targets import BuildOptions
from toolchain.targets.eager import EAGER


@pytest.fixture
def model(monkeypatch):
    """A loader that gives a model which remembers how it was called."""

    class Summing(nn.Module):
        def forward(self, image):
            self.seen = (image.shape, torch.get_num_threads(), torch.is_inference_mode_enabled())
            return image.sum(dim=(2, 3))

    module = Summing().eval()
    monkeypatch.setattr(
        "toolchain.surgery.replay.load_model", lambda folder: SimpleNamespace(module=module, output_names=("logits",))
    )
    return module


def test_a_runner_computes_under_inference_mode_with_the_asked_threads_and_puts_them_back(model, tmp_path):
    before = torch.get_num_threads()
    asked = before + 1
    image = np.arange(2 * 3 * 4 * 4, dtype=np.float32).reshape(2, 3, 4, 4)
    with EAGER.open(tmp_path, threads=asked) as runner:
        logits = runner.infer({"image": image})["logits"]
        assert len(runner.time_ns([{"image": image}], 4)) == 4
    np.testing.assert_allclose(logits, image.sum(axis=(2, 3)))
    assert model.seen == (image.shape, asked, True)
    assert torch.get_num_threads() == before


def test_outside_its_block_a_runner_does_nothing(model, tmp_path):
    runner = EAGER.open(tmp_path, threads=1)
    with pytest.raises(RuntimeError, match="with"):
        runner.infer({"image": np.zeros((1, 1, 2, 2), np.float32)})


def test_a_folder_that_is_no_model_changes_nothing(tmp_path):
    before = torch.get_num_threads()
    with pytest.raises((ArtifactError, StorageError)), EAGER.open(tmp_path, threads=before + 1):
        pass
    assert torch.get_num_threads() == before


def test_there_is_no_engine_to_build(tmp_path):
    with pytest.raises(RecipeError, match="eager"):
        EAGER.build(tmp_path / "m.onnx", tmp_path, BuildOptions())


def test_the_probe_names_torch():
    assert EAGER.probe().version == torch.__version__
