"""The command, called in this process, and one small run that the tests of the verbs share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from measuring import Stopwatch, widths_timed

from toolchain.cli.main import main
from toolchain.measure.samples import Design
from toolchain.pipeline.run import run

MODEL = """[model]
name = "vit_tiny_patch16_224"
kwargs = { img_size = 8, patch_size = 2, in_chans = 1, num_classes = 10, embed_dim = 32, depth = 2, num_heads = 2 }
pretrained = false
"""
TRAIN = """[train]
epochs = 1
batch_size = 128
"""
RECIPE = f"""{MODEL}
[data]
source = "digits"

{TRAIN}
[compress]
method = "hybrid"
vtp = {{ epochs = 1 }}

[budget]
params = 0.5

[finetune]
epochs = 1
"""


@dataclass(frozen=True)
class Outcome:
    """What a call of the command left: its exit code and its two streams."""

    code: int
    out: str
    err: str


__all__ = ["widths_timed"]


Command = Callable[..., Outcome]
SHORT = Design(sessions=2, blocks=4, looks=1, slot_ms=2.0, warmup_s=0.01)


@pytest.fixture(scope="package")
def one_thread() -> Iterator[None]:
    """One torch thread: these models are too small for more, and the digests of a run depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def command(
    one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Calls `slimvit ARGUMENTS` in an empty folder, with a cache of its own."""
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SLIMVIT_DEBUG", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    names = (None, "toolchain", "huggingface_hub", "timm", "onnxscript", "torch.onnx")
    levels = {name: logging.getLogger(name).level for name in names}
    handlers = list(logging.getLogger().handlers)

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments], SHORT)
        streams = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), streams.out, streams.err)

    yield call
    logging.getLogger().handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of two blocks on the digits, one epoch of everything."""
    path = tmp_path / "tiny" / "recipe.toml"
    path.parent.mkdir()
    path.write_text(RECIPE, encoding="utf-8")
    return path


@dataclass(frozen=True)
class Finished:
    """A run that was carried out once, with made-up latency; tests read it and write elsewhere."""

    recipe: Path
    folder: Path
    report: dict[str, Any]


@pytest.fixture(scope="package")
def finished(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    root = tmp_path_factory.mktemp("finished")
    path = root / "recipe.toml"
    path.write_text(RECIPE + '\n[bench]\ntargets = ["ort-cpu"]\n', encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMVIT_CACHE_DIR", str(root / "cache"))
        report = run(path, root / "run", compare=Stopwatch()).to_dict()
    return Finished(path, root / "run", report)
