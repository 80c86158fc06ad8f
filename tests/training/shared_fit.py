"""A training that several processes may share: `torchrun … shared_fit.py FILE MODE` writes what `train(MODE)` returns.

In batches of 8 the last one of an epoch has 5, 1 or 4 images: two processes share it unequally, not at all, or equally.
"""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
from killable_fit import CONFIG, make_data, make_model
from safetensors.torch import save_file

from toolchain.errors import StorageError
from toolchain.likelihood import CATEGORICAL
from toolchain.training.distill import distillation, imitation
from toolchain.training.loop import fit
from toolchain.training.processes import accelerator, together

ONE_EPOCH = replace(CONFIG, epochs=1)
SIZES = {"labels": 61, "distillation": 57, "imitation": 60}


def train(mode):
    """(loss of every step, mean of every epoch, weights), float64 and float32; EMA and augmentation are on."""
    model = make_model()
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for index, parameter in enumerate(teacher.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(0.02 * noise)
    loss = {
        "labels": None,
        "distillation": distillation(teacher, CATEGORICAL),
        "imitation": imitation(teacher, CATEGORICAL, "blocks.1", 1),
    }[mode]
    seen = []
    config = replace(CONFIG, epochs=2, lr=1e-3, drop=False)
    result = fit(model, make_data(SIZES[mode]), config=config, loss=loss, on_step=seen.append)
    return {
        "steps": torch.tensor([step.batch_loss for step in seen], dtype=torch.float64),
        "running": torch.tensor([step.loss for step in seen], dtype=torch.float64),
        "epochs": torch.tensor(result.losses, dtype=torch.float64),
        **{f"model.{name}": value.clone() for name, value in model.state_dict().items()},
    }


if __name__ == "__main__":
    with together() as writes:
        run = accelerator()
        assert (run.num_processes, run.device.type) == (2, "cpu"), (run.num_processes, run.device)
        outcomes = {f"{mode}/{name}": value for mode in SIZES for name, value in train(mode).items()}
        weights = torch.cat([value.flatten() for name, value in outcomes.items() if "/model." in name])
        assert run.gather(weights[None]).unique(dim=0).shape[0] == 1, "the processes end with the same weights"
        mine = Path(sys.argv[1]).with_name(f"checkpoint{run.process_index}")
        fit(make_model(), make_data(), config=ONE_EPOCH, checkpoint=mine)
        try:
            fit(make_model(), make_data(), config=ONE_EPOCH, checkpoint=mine)
        except StorageError as error:
            assert "epochs done: [1, 0]" in str(error)  # noqa: PT017
        else:
            raise AssertionError("only one of the two has a checkpoint, as without shared storage")
        if writes:
            save_file(outcomes, Path(sys.argv[1]))
