"""Two processes, started as users start them, against one."""

import pytest
import shared_fit
import torch
from builders import in_two_processes
from safetensors.torch import load_file

from toolchain.errors import RecipeError
from toolchain.training.processes import accelerator


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_two_processes_train_as_one_does(one_thread, tmp_path):
    path = tmp_path / "outcome"
    ended = in_two_processes(shared_fit.__file__, path)  # it asserts by itself that there are two
    assert ended.returncode == 0, ended.stderr
    shared = load_file(path)
    for mode in shared_fit.SIZES:
        alone = shared_fit.train(mode)
        assert len(alone["steps"]) == 16
        assert alone["steps"][:10].unique().numel() == 10
        for name, value in alone.items():
            torch.testing.assert_close(shared[f"{mode}/{name}"], value, rtol=0, atol=1e-4, msg=f"{mode} {name}")
    assert {file.name for file in tmp_path.iterdir()} == {"outcome", "checkpoint0"}, "the main process alone writes"


def test_processes_that_would_train_alone_are_refused(monkeypatch):
    accelerator()  # of one process, before the launcher is claimed
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match=r"2 processes were started .* but 1 would train together"):
        accelerator()
