"""What every test shares; the builders themselves are in builders.py."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from played.cpus import CPUS, VARIABLE, play

if gc.isenabled():  # what is imported and collected stays; looking through it for garbage takes seconds
    gc.disable()
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ["HF_TOKEN_PATH"] = os.devnull  # no test is logged in to a hub as the one who runs it
if played := os.environ.get(VARIABLE):
    # Before torch and others are imported: they look at the processor once.
    if platform.machine() == "x86_64":
        os.environ.update(CPUS[played].environment)
    paths = [str(Path(__file__).parent / "played"), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    play(CPUS[played])

import exports
import hypothesis
import pytest
import torch
from builders import dense_model

from toolchain.model import TimmModel
from toolchain.registry import Registry

# Equal examples in every run, and no clock: a machine that is busy fails no test.
hypothesis.settings.register_profile("slimvit", deadline=None, derandomize=True)
hypothesis.settings.load_profile("slimvit")

# Processes beside each other (`pytest -n 2`) share the cores; each with threads for all of them would only wait.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_finish() -> None:
    """What is there before the first test is no garbage, and is not looked through again."""
    gc.collect()
    gc.freeze()
    gc.enable()


with contextlib.suppress(ImportError):  # of a torch that has it elsewhere, exports just take longer
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    # torch builds its table of operators anew for every file that it exports, a quarter of the time of a small one. It only reads it.
    ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))

with contextlib.suppress(ImportError):
    from torch.fx.traceback import NodeSource

    # Every pass over a graph copies, for each of its nodes, all that the node came from. Nothing changes that afterwards.
    NodeSource.__deepcopy__ = lambda source, _: source


@pytest.fixture(scope="session", autouse=True)
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No model is exported twice in a session, by any of its workers; nor in another that shares its folder of exports."""
    folder = tmp_path_factory.getbasetemp()
    kept = Path(os.environ.get("SLIMVIT_TEST_EXPORTS", (folder.parent if workers else folder) / "exports"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", exports.once(torch.onnx.export, kept))
        yield


@pytest.fixture
def register() -> Iterator[Callable[[Registry[Any], Any], None]]:
    """Puts an entry into a registry until the test ends."""
    before: list[tuple[Registry[Any], str, Any]] = []

    def put(registry: Registry[Any], entry: Any) -> None:
        before.append((registry, entry.name, registry.get(entry.name)))
        registry.add(entry)

    yield put
    for registry, name, entry in reversed(before):
        registry.discard(name) if entry is None else registry.add(entry)


@dataclass(frozen=True)
class Call:
    """What a function was called by, and what it was given."""

    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[object, str], list[Call]]:
    """Lists the calls of `owner.name`, which does what it does; all that one test watches are in one list."""
    calls: list[Call] = []

    def watch(owner: Any, name: str) -> list[Call]:
        real = getattr(owner, name)

        def called(*arguments: Any, **options: Any) -> Any:
            calls.append(Call(name, arguments, options))
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, called)
        return calls

    return watch


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[object, str], None]:
    """Lets `owner.name` fail as on a disk that has no space left."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda owner, name: monkeypatch.setattr(owner, name, fail)


@pytest.fixture
def tiny() -> TimmModel:
    """A randomised dense model of two blocks."""
    return dense_model()
