import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import killable_fit
import pytest
import torch
from killable_fit import CONFIG, EPOCHS, digest, make_data, make_model, train
from safetensors import safe_open
from sweeps import swept
from torch import nn

from toolchain.errors import DataError, RecipeError, StorageError
from toolchain.training.evaluate import accuracy
from toolchain.training.loop import FitConfig, _cosine, default_param_groups, fit


@pytest.fixture(scope="module")
def undisturbed():
    return train(None)


def test_worker_processes_change_no_bit(undisturbed):
    data, model = make_data(), make_model()
    data.workers = 2
    result = fit(model, data, config=CONFIG)
    assert (digest(model), result.losses) == (undisturbed[0], undisturbed[1].losses)
    assert accuracy(model, data, batch_size=16).predictions.equal(accuracy(model, make_data()).predictions)


class Killed(Exception):
    pass


def stop_at(epoch, step):
    def stop(progress):
        if (progress.epoch, progress.step) == (epoch, step):
            raise Killed

    return stop


def test_the_same_arguments_give_the_same_bits(undisturbed):
    weights, result = train(None)
    assert weights == undisturbed[0]
    assert result.losses == undisturbed[1].losses


CHANGES = (
    {"seed": 4},
    {"lr": 4e-3},
    {"weight_decay": 0.1},
    {"warmup_epochs": 0.5},
    {"label_smoothing": 0.0},
    {"shift_px": 0},
    {"flip": False},
    {"ema_decay": None},
    {"grad_clip": 0.1},
    {"drop": False},
)


@pytest.mark.parametrize("change", swept(CHANGES, CHANGES[::3]))
def test_every_setting_matters(undisturbed, change):
    assert train(None, config=replace(CONFIG, **change))[0] != undisturbed[0]


STOPS = [[(1, 1)], [(2, 1)], [(3, 8)], [(2, 5), (2, 5), (4, 8)]]


@pytest.mark.parametrize("stops", swept(STOPS, STOPS[3:]))
def test_an_interrupted_training_ends_bit_identical(undisturbed, tmp_path, stops):
    path = tmp_path / "fit.safetensors"
    for epoch, step in stops:
        with pytest.raises(Killed):
            train(path, on_step=stop_at(epoch, step))
    begun = []
    weights, result = train(path, on_step=begun.append)
    assert begun[0].epoch == stops[-1][0], "the last epoch that was complete is not trained again"
    assert weights == undisturbed[0]
    assert result.losses == undisturbed[1].losses
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_a_killed_process_ends_bit_identical(undisturbed, tmp_path):
    path = tmp_path / "fit.safetensors"
    command = [sys.executable, killable_fit.__file__, str(path)]
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=threads)
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(random.Random().uniform(0, 0.4))  # any moment will do: in a step, or while writing
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the process ended before it was killed"
    with safe_open(path, "pt") as file:
        assert len(json.loads(file.metadata()["slimvit.fit"])["losses"]) < EPOCHS, "it was killed too late"
    weights, result = train(path)
    assert weights == undisturbed[0]
    assert result.losses == undisturbed[1].losses


def test_a_finished_training_is_only_loaded(undisturbed, tmp_path):
    path = tmp_path / "fit.safetensors"
    _, first = train(path)

    def forbidden(progress):
        raise AssertionError(progress)

    weights, second = train(path, on_step=forbidden)
    assert weights == undisturbed[0]
    assert second.losses == first.losses
    assert second.seconds == pytest.approx(first.seconds, abs=1.0)


@pytest.mark.parametrize("foreign", [{"key": "other data"}, {"config": replace(CONFIG, lr=1e-3)}])
def test_a_checkpoint_of_another_training_is_ignored(undisturbed, tmp_path, foreign):
    path = tmp_path / "fit.safetensors"
    train(path, **foreign)
    begun = []
    weights, _ = train(path, on_step=begun.append)
    assert (begun[0].epoch, weights) == (1, undisturbed[0])


def test_a_damaged_checkpoint_is_ignored(undisturbed, tmp_path, caplog):
    path = tmp_path / "fit.safetensors"
    with pytest.raises(Killed):
        train(path, on_step=stop_at(3, 1))
    path.write_bytes(path.read_bytes()[:-100])
    assert train(path)[0] == undisturbed[0]
    assert "cannot be read" in caplog.text


def test_a_checkpoint_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        train(tmp_path / "file" / "fit.safetensors")


def test_the_global_random_state_mode_and_masks_are_left_alone():
    model = make_model().eval()
    before, masks = torch.random.get_rng_state(), model.blocks[0].mlp.fc1.parametrizations.weight[0].mask.clone()
    fit(model, make_data(), config=CONFIG)
    assert torch.random.get_rng_state().equal(before)
    assert not any(module.training for module in model.modules())
    assert model.blocks[0].mlp.fc1.parametrizations.weight[0].mask.equal(masks)
    assert (model.blocks[0].mlp.fc1.weight[:, masks == 0] == 0).all()


def test_it_learns_and_a_second_training_goes_on():
    model, data = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), make_data(120)
    config = FitConfig(12, 1e-2, 16, ema_decay=0.9)
    result = fit(model, data, config=config)
    assert accuracy(model, data).accuracy > 0.9
    again = fit(model, data, config=replace(config, epochs=2, lr=1e-4))
    assert again.losses[0] < result.losses[0] / 2


def test_without_an_average_the_model_stays_what_it_was_trained_to():
    average, plain, trained = make_model(), make_model(), []
    fit(average, make_data(), config=CONFIG, on_step=lambda _: trained.append(digest(average)))
    last = trained[-1]
    fit(plain, make_data(), config=replace(CONFIG, ema_decay=None), on_step=lambda _: trained.append(digest(plain)))
    assert trained[-1] == digest(plain) == last
    assert digest(average) != last


def test_the_average_is_timms_warmed_up_one():
    model = make_model()
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    steps = itertools.count()

    def follow(progress):
        warm = 1 - (1 + next(steps)) ** (-2 / 3)  # timm's ModelEmaV3 with use_warmup, its first step copies
        for name, parameter in model.named_parameters():
            average[name].lerp_(parameter.detach(), 1 - min(warm, CONFIG.ema_decay))

    fit(model, make_data(), config=CONFIG, on_step=follow)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), average[name])


def test_every_epoch_sees_all_images_in_another_order():
    data, seen = make_data(), []

    def loss(module, images, labels):
        seen.extend(image.numpy().tobytes() for image in images)
        return module(images).square().mean()

    fit(make_model(), data, config=replace(CONFIG, epochs=3, shift_px=0, flip=False), loss=loss)
    epochs = [seen[start : start + 60] for start in (0, 60, 120)]
    assert len(seen) == 180
    assert all(set(epoch) == {image.numpy().tobytes() for image, _ in (data[i] for i in range(60))} for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_progress_counts_every_step():
    seen = []
    train(None, on_step=seen.append)
    assert [(it.epoch, it.step) for it in seen] == list(itertools.product(range(1, EPOCHS + 1), range(1, 9)))
    assert {(it.epochs, it.steps) for it in seen} == {(EPOCHS, 8)}


def test_the_learning_rate_warms_up_and_falls_to_zero():
    fast, slow = nn.Linear(1, 1), nn.Linear(1, 1)
    groups = [{"params": fast.parameters()}, {"params": slow.parameters(), "lr": CONFIG.lr / 10}]
    optimizer = torch.optim.AdamW(groups, lr=CONFIG.lr)
    schedule = _cosine(optimizer, CONFIG, steps=8)
    rates = []
    for step in range(EPOCHS * 8):
        schedule.step_update(step)
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))
    for group, peak in enumerate((CONFIG.lr, CONFIG.lr / 10)):
        of_group = [rate[group] for rate in rates]
        assert of_group[:9] == sorted(of_group[:9])
        assert of_group[8] == max(of_group) == pytest.approx(peak)
        assert of_group[8:] == sorted(of_group[8:], reverse=True)
        assert 0 < of_group[-1] < peak / 100


def test_a_training_of_one_step_takes_it_at_the_peak(caplog):
    optimizer = torch.optim.AdamW(nn.Linear(1, 1).parameters(), lr=0.5)
    schedule = _cosine(optimizer, replace(CONFIG, epochs=1), steps=1)
    schedule.step_update(0)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not caplog.records


def test_training_follows_the_schedule():
    """With one step per epoch and no warm-up, the last of many epochs hardly moves the weights."""
    states = []
    config = FitConfig(20, 1e-2, 60, weight_decay=0.0)
    model = make_model()
    fit(model, make_data(), config=config, on_step=lambda _: states.append(model.head.weight.detach().clone()))
    moves = [(after - before).abs().max().item() for before, after in itertools.pairwise(states)]
    assert moves[-1] < 0.02 * max(moves)


def test_the_callers_loss_and_groups_are_used():
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(
        model,
        make_data(),
        config=replace(CONFIG, epochs=1, ema_decay=None),
        param_groups=lambda module, config: [{"params": [module.head.bias], "lr": 0.5, "weight_decay": 0.0}],
        loss=lambda module, images, labels: (module(images)[:, 0] + 3).square().mean(),
    )
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {"head.bias"}
    assert model.head.bias[0] < -1


def test_matrices_decay_and_the_rest_does_not():
    model = make_model()
    groups = {group["weight_decay"]: group["params"] for group in default_param_groups(model, CONFIG)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in groups[CONFIG.weight_decay]}
    spared = {names[id(parameter)] for parameter in groups[0.0]}
    assert decayed | spared == set(names.values())
    assert {"cls_token", "pos_embed", "norm.weight", "blocks.0.attn.qkv.bias"} <= spared
    assert {"head.weight", "blocks.1.mlp.fc1.parametrizations.weight.original"} <= decayed


def test_divergence_and_no_data_are_said(tmp_path):
    path = tmp_path / "fit.safetensors"
    with pytest.raises(RecipeError, match=r"diverged.*nan.*lower the lr \(now 0.003\)"):
        train(path, loss=lambda module, images, labels: module(images).sum() * float("nan"))
    assert not path.exists()
    with pytest.raises(RecipeError, match=r"lower the lr \(now 0.003 and 5\)"):
        train(
            path,
            loss=lambda module, images, labels: module(images).sum() * float("nan"),
            param_groups=lambda module, config: [
                {"params": parameter, "lr": 5.0 if index else config.lr}
                for index, parameter in enumerate(module.parameters())
            ],
        )
    with pytest.raises(DataError, match="no images"):
        fit(make_model(), make_data(0), config=CONFIG)


def test_no_pickle_is_written(tmp_path):
    train(tmp_path / "fit.safetensors", config=replace(CONFIG, epochs=1))
    raw = Path(tmp_path / "fit.safetensors").read_bytes()
    assert raw[8:9] == b"{"
    assert b"torch._utils" not in raw
