"""Kind: a file that is damaged, cut or edited by hand. Every verb that reads it says what is wrong, or does what the file says."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import shutil
import warnings
from pathlib import Path

import modes
import pytest
import torch
from builders import dense_model, few_sessions, random_plan, write_classifier, write_ncnn, write_samples
from damage import bytes_damaged, json_damaged, toml_damaged
from made_up_reports import a_report
from PIL import Image
from safetensors.torch import save_file

from toolchain.artifacts import open_artifact
from toolchain.data import open_source
from toolchain.data.stored import PictureFiles
from toolchain.data.transforms import Wanted
from toolchain.errors import DataError, SlimvitError
from toolchain.gate import GateConfig, run_gate
from toolchain.recipe import Recipe
from toolchain.surgery.replay import load_model, save_model

ROOT = Path(__file__).resolve().parents[2]
SEEDS = range(40)
DOCUMENTED = {0, 1, 2, 3, 4, 5, 6, 74}
"""Exit codes of docs/commands.md; 70 is an error of slimvit itself."""


def faults(path, damaged, read, seeds=SEEDS):
    """What goes wrong when a file is read with each of some damages: an undocumented end, or a refusal without words."""
    whole, found = path.read_bytes(), []
    for seed in seeds:
        path.write_bytes(damaged(whole, seed))
        code, said = read(path)
        if code not in DOCUMENTED or "Traceback" in said or (code and not said.strip()):
            found.append((seed, code, said[-400:]))
    path.write_bytes(whole)
    code, said = read(path)
    assert code == 0, f"what is whole is read: {said}"
    return found


def by_command(command, *arguments):
    """Reads by a verb; PATH stands for the file."""

    def read(path):
        outcome = command(*(path if each == "PATH" else each for each in arguments))
        return outcome.code, outcome.err + ("" if outcome.code == 0 else outcome.out)

    return read


def by_call(call):
    def read(path):
        try:
            call(path)
        except SlimvitError as error:
            return error.exit_code, str(error)
        return 0, ""

    return read


@pytest.mark.parametrize("name", ["recipe.toml", "recipe.vtp.toml"])
def test_recipes(name, tmp_path):
    path = Path(shutil.copy(ROOT / "models/digits_vit" / name, tmp_path))
    assert faults(path, toml_damaged, by_call(Recipe.load), range(80)) == []


def test_gates(command, tmp_path):
    write_classifier(tmp_path / "model.onnx")
    path = tmp_path / "gate.toml"
    path.write_text(
        '[[cell]]\nname = "a"\nartifact = "model.onnx"\nbudget = { size = "1 MB", nodes = 10, params = 10000 }\n'
    )
    assert faults(path, toml_damaged, by_command(command, "gate", "-c", "PATH")) == []


def test_accepts(command, tmp_path):
    write_classifier(tmp_path / "model.onnx")
    gate = tmp_path / "gate.toml"
    gate.write_text('[[cell]]\nname = "a"\nartifact = "model.onnx"\nbudget = { size = "1 MB" }\n')
    path = tmp_path / "gate.accepts.toml"
    path.write_text(
        '[[accept]]\ncell = "a"\ncheck = "budget.size"\nat_most = 5\nreason = "x"\naccepted = 2026-01-01\nexpires = 2027-01-01\n'
    )

    def damaged(whole, seed):  # dates are no JSON
        return bytes_damaged(whole, seed)

    assert faults(path, damaged, lambda _: by_command(command, "gate", "-c", gate)(gate)) == []


def test_devices(command, tmp_path):
    path = tmp_path / "targets.toml"
    path.write_text(
        '[pi]\ntransport = "ssh"\nhost = "127.0.0.1"\nport = 2222\nruntime = "ort-cpu"\nthreads = 2\naffinity = [0, 1]\n'
    )
    read = by_command(command, "gate", "-c", tmp_path / "gate.toml", "--targets", "PATH")
    write_classifier(tmp_path / "model.onnx")
    (tmp_path / "gate.toml").write_text('[[cell]]\nname = "a"\nartifact = "model.onnx"\nbudget = { size = "1 MB" }\n')
    assert faults(path, toml_damaged, read) == []


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(dense_model("test_vit"), tmp_path_factory.mktemp("model") / "dense")


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_model_folders(command, model_folder, name, tmp_path):
    folder = tmp_path / "dense"
    shutil.copytree(model_folder, folder)
    damaged = json_damaged if name.endswith(".json") else bytes_damaged
    assert faults(folder / name, damaged, lambda _: by_command(command, "inspect", folder)(folder)) == []


def test_model_folders_as_they_are_loaded(model_folder, tmp_path):
    folder = tmp_path / "dense"
    shutil.copytree(model_folder, folder)
    assert faults(folder / "model.json", json_damaged, lambda _: by_call(load_model)(folder)) == []


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_checkpoints(command, kind, tmp_path):
    state = {name: value.clone() for name, value in dense_model("test_vit").module.state_dict().items()}
    path = tmp_path / f"weights.{'safetensors' if kind == 'safetensors' else 'pth'}"
    save_file(state, path) if kind == "safetensors" else torch.save({"model": state, "epoch": 3}, path)
    assert faults(path, bytes_damaged, by_command(command, "inspect", "PATH", "--json")) == []


def test_plans(command, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(random_plan(dense_model("test_vit")).to_json())
    assert faults(path, json_damaged, by_command(command, "inspect", "PATH"), range(80)) == []


def test_reports(command, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / "report.json"
    path.write_text(json.dumps(a_report().to_dict()))
    assert faults(path, json_damaged, lambda _: by_command(command, "report", folder)(folder), range(80)) == []


@pytest.mark.parametrize("kind", ["comparison", "gate"])
def test_results(command, kind, tmp_path):
    """An edit that changes nothing that is said may pass; whatever else is altered is refused."""
    if kind == "comparison":
        result = write_samples(design=few_sessions())
    else:
        write_classifier(tmp_path / "model.onnx")
        cell = {"name": "a", "artifact": "model.onnx", "budget": {"size": 10**6, "nodes": 9}}
        config = GateConfig.from_dict({"cell": [cell]}, tmp_path)
        result = run_gate(config, tool="test", day=dt.date(2030, 1, 1))
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result.to_dict()))
    assert faults(path, json_damaged, by_command(command, "bench", "verify", "PATH")) == []


def test_onnx_files(command, tmp_path):
    path = write_classifier(tmp_path / "model.onnx", padding=50)
    assert faults(path, bytes_damaged, by_command(command, "inspect", "PATH"), range(80)) == []


def test_ncnn_files(command, tmp_path):
    path = write_ncnn(tmp_path / "n.param")
    assert faults(path, bytes_damaged, by_command(command, "inspect", "PATH")) == []


def test_manifests(command, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    path = tmp_path / "manifest.json"
    digest = open_artifact(tmp_path / "a.txt").sha256
    path.write_text(json.dumps({"schema": "slimvit.manifest/1", "files": [{"path": "a.txt", "sha256": digest}]}))
    read = by_command(command, "manifest", "verify", tmp_path)
    assert faults(path, json_damaged, lambda _: read(path)) == []


CONFIG = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A picture of every mode and format that is read."""
    folder = tmp_path_factory.mktemp("whole")
    names = sorted(name for name, (_, outcome) in modes.FILES.items() if outcome != "refused")
    files = [modes.write(folder / name) for name in names]
    for suffix in ("jpg", "gif", "webp", "bmp", "tif"):
        files.append(folder / f"plain.{suffix}")
        Image.fromarray(modes.COLOUR).save(files[-1])
    return files


def damaged_pictures(pictures, folder, seeds):
    """Each picture with each damage in turn, in a folder of its own: (name and seed, path); the first damage leaves no bytes."""
    for original in pictures:
        for seed in seeds:
            path = folder / f"damaged{original.suffix}"
            path.write_bytes(bytes_damaged(original.read_bytes(), seed) if seed else b"")
            with warnings.catch_warnings(action="ignore"):  # Pillow's own, of what it mends
                yield f"{original.name}, {seed}", path
            path.unlink()


@pytest.fixture(autouse=True)
def no_giants(monkeypatch):
    """A header whose size was damaged asks for gigabytes; Pillow refuses what is twice as large as this, and warns before."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures(channels, pictures, tmp_path):
    """Each is finite and of the model's size, or refused by name."""
    size = (channels, 8, 8)
    preprocessing, found = Wanted(size, CONFIG).natural(), []
    for what, path in damaged_pictures(pictures, tmp_path, range(16)):
        try:
            pixels, _ = PictureFiles([path]).images([-1], preprocessing)[0]
        except DataError as error:
            if path.name not in str(error):
                found.append((what, str(error)))
        except Exception as error:  # noqa: BLE001 - that there is none is what is tested
            found.append((what, repr(error)))
        else:
            if pixels.shape != size or not pixels.isfinite().all():
                found.append((what, "another image"))
    assert found == []


def test_a_folder_with_a_damaged_picture(pictures, tmp_path):
    for index in range(8):
        Image.fromarray(modes.COLOUR + index).save(tmp_path / f"{index}.png")
    found = []
    for what, path in damaged_pictures(pictures, tmp_path, range(2)):
        try:
            opened = open_source(f"images:{tmp_path}", Wanted((3, 8, 8), CONFIG, calibration_images=4))
            for name in opened.splits:
                images = opened.split(name)
                found += [
                    (what, "another image") for index in range(len(images)) if not images[index][0].isfinite().all()
                ]
        except SlimvitError as error:
            found += [] if path.name in str(error) else [(what, str(error))]
        except Exception as error:  # noqa: BLE001 - that there is none is what is tested
            found.append((what, repr(error)))
    assert found == []


def test_what_ends_in_an_error_leaves_nothing_behind(command, tmp_path):
    """Kind: half a folder after a refusal, which the next command takes for an outcome."""
    recipe = ROOT / "models/digits_vit/recipe.toml"
    for seed in range(30):
        path = tmp_path / "recipe.toml"
        path.write_bytes(toml_damaged(recipe.read_bytes(), seed))
        with contextlib.suppress(SlimvitError):
            Recipe.load(path)
            continue  # a good recipe would run for minutes
        outcome = command("run", path, "--out", tmp_path / "out")
        assert outcome.code == 2
        assert not (tmp_path / "out").exists()
