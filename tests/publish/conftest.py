"""One small run in several precisions that the tests of its repository share, and a hub to push it to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hub_server import Hub, visited
from measuring import Stopwatch
from recipes import tiny_recipe

from toolchain.pipeline.run import run
from toolchain.report.files import listing

RECIPE = tiny_recipe("""[train]
epochs = 1
batch_size = 128

[budget]
params = 0.6

[export]
precisions = ["fp32", "fp16", "int8-dynamic"]

[bench]
targets = ["ort-cpu"]
""")


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run; tests only read it."""
    root = tmp_path_factory.mktemp("published")
    (root / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMVIT_CACHE_DIR", str(root / "cache"))
        run(root / "recipe.toml", root / "run", compare=Stopwatch())
    yield root / "run"
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def relisted() -> Callable[[Path], None]:
    """Lists the files of a run anew, as if it had written them as they are now."""

    def relist(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        files = [path for path in folder.rglob("*") if path.is_file() and ".slimvit" not in path.parts]
        listed = listing((path for path in files if path.name != "manifest.json"), folder)
        manifest["files"] = [each.model_dump() for each in listed]
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return relist


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub on this machine, for which there is a token."""
    with visited(monkeypatch, tmp_path / "hub") as server:
        yield server
