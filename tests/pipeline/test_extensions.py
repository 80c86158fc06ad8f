"""Code of other packages is part of what a stage depends on."""

from __future__ import annotations

import functools
import importlib
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Lock
from types import FunctionType, ModuleType

import numpy as np
import pytest
import torch
from recipes import tiny_recipe

from toolchain.compress.criteria import CRITERIA, Criterion
from toolchain.compress.factorisations import FACTORISATIONS
from toolchain.compress.reductions import REDUCTIONS
from toolchain.compress.solver import ALLOCATIONS
from toolchain.export.precision import PRECISIONS
from toolchain.families import FAMILIES
from toolchain.pipeline import extensions
from toolchain.pipeline.extensions import foreign_code
from toolchain.surgery.huggingface import LAYOUTS
from toolchain.targets import TARGETS

OWN = (ALLOCATIONS, CRITERIA, FACTORISATIONS, FAMILIES, LAYOUTS, PRECISIONS, REDUCTIONS, TARGETS)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a package of two files, and imports it as a new process would."""
    monkeypatch.syspath_prepend(tmp_path)

    def written(number):
        (tmp_path / "other_scores").mkdir(exist_ok=True)
        (tmp_path / "other_scores" / "__init__.py").write_text("from other_scores.score import score\n")
        (tmp_path / "other_scores" / "score.py").write_text(f"def score(known):\n    return {number}\n")
        for name in ("other_scores", "other_scores.score"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        extensions._sources.cache_clear()
        return importlib.import_module("other_scores")

    yield written
    for name in ("other_scores", "other_scores.score"):
        sys.modules.pop(name, None)
    extensions._sources.cache_clear()


def test_entries_of_slimvits_own_have_no_foreign_code():
    assert foreign_code(chain.from_iterable(registry.values() for registry in OWN)) == []


def test_an_entry_of_a_package_changes_with_any_of_its_files(package):
    def code(number):
        return foreign_code([Criterion("theirs", package(number).score)])

    first = code(1)
    assert {name for code, _ in first for name, _ in code} == {"other_scores"}
    assert code(1) == first
    assert code(2) != first


def test_a_package_is_known_by_what_is_imported_of_it(package, tmp_path):
    first = foreign_code([package(1).score])
    (tmp_path / "other_scores" / "gone.py").symlink_to("nowhere.py")
    (tmp_path / "other_scores" / "folder.py").mkdir()
    (tmp_path / "other_scores" / "runs.py").write_text("never imported\n")
    assert foreign_code([package(1).score]) == first

    library = ModuleType("other_scores.library")
    library.__file__ = str(tmp_path / "library.so")
    digests = []
    for content in (b"1", b"2"):
        Path(library.__file__).write_bytes(content)
        score = package(1).score
        sys.modules[library.__name__] = library
        digests.append(foreign_code([score]))
        del sys.modules[library.__name__]
    assert digests[0] != digests[1]


class Scorer:
    def __init__(self, share):
        self.share, self.table = share, {"all": (share, [share])}

    def score(self, known):
        return known


class Slotted:
    __slots__ = ("share",)

    def __init__(self, share):
        self.share = share


def scored(known, share=0):
    return known, share


def of_share(share):
    return lambda known: (known, share)


def counted(share):
    return functools.cache(of_share(share))


def of_a_table(share):
    return Criterion("theirs", scored, needs=(share, {"all": [of_share(share)]}))


def held(share):
    tensor = torch.zeros(2000)
    tensor[1000] = share
    return partial(scored, share=tensor)


def wrapped(share):
    @functools.wraps(scored)
    def other(known):
        return scored(known, share)

    return torch.no_grad()(other)


def of_nothing(share):
    function = FunctionType(scored.__code__, {"__name__": None}, argdefs=(share,))
    function.__module__ = None
    return function


ENTRIES = {
    "partial": lambda share: partial(scored, share=share),
    "method": lambda share: Scorer(share).score,
    "instance": Scorer,
    "slots": Slotted,
    "closure": of_share,
    "cache": counted,
    "table": of_a_table,
    "tensor": held,
    "decorated": wrapped,
    "default": lambda share: FunctionType(scored.__code__, scored.__globals__, argdefs=(share,)),
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_an_entry_is_known_by_its_code_and_its_values(kind):
    one, same, other = (foreign_code([Criterion("theirs", ENTRIES[kind](share))]) for share in (1, 1, 2))
    assert "test_extensions" in {name for code, _ in one for name, _ in code}
    assert one == same != other


@pytest.mark.parametrize(
    "entry", [of_nothing(1), partial(scored, share=Lock()), type("Zipped", (), {"__module__": "of_a_zip.scores"})]
)
def test_what_cannot_be_read_is_another_in_every_process(entry, monkeypatch):
    one = foreign_code([entry])
    extensions._sources.cache_clear()
    monkeypatch.setattr(extensions, "UNREADABLE", "another process")
    assert one != foreign_code([entry]) == foreign_code([entry])
    extensions._sources.cache_clear()


def test_a_dependency_is_known_by_its_version():
    (((code,), _),) = foreign_code([np.ufunc])
    assert code == ["numpy", np.__version__]


def test_what_a_script_defines_is_known_by_its_own_lines():
    def other(known):
        return known

    def same(known):
        return known

    scripts = [FunctionType(function.__code__, {"__name__": "__main__"}) for function in (other, same)]
    one, two = (foreign_code([function]) for function in scripts)
    assert one[0][0][0][0].startswith("__main__.")
    assert one != two
    assert extensions.UNREADABLE not in str(one)


def test_a_stage_depends_on_the_criterion_that_a_package_adds(tmp_path, package, register):
    from toolchain.devices.device import Devices
    from toolchain.pipeline.folder import Workspace
    from toolchain.pipeline.job import prepare
    from toolchain.pipeline.stages.base import Run
    from toolchain.pipeline.stages.compress import Known, Masked
    from toolchain.pipeline.stages.dense import Dense
    from toolchain.progress import SILENT
    from toolchain.recipe import Recipe

    path = tmp_path / "recipe.toml"
    method = '[compress]\nattention = "none"\nneurons = "theirs"\nallocation = "uniform"\n[budget]\nparams = 0.6\n'
    path.write_text(tiny_recipe(f"[train]\nepochs = 1\n{method}"))
    for name in ("model.safetensors", "model.json"):
        (tmp_path / "dense").mkdir(exist_ok=True)
        (tmp_path / "dense" / name).write_text("")

    def keys(number):
        register(CRITERIA, Criterion("theirs", package(number).score))
        job = prepare(Recipe.load(path))
        with Devices() as devices:
            run = Run(job, Workspace(tmp_path), devices, SILENT, None)
            return Dense(run).key, Masked(run, job.dense, Known((), (), (), None)).key

    (dense, masked), (same, changed) = keys(1), keys(2)
    assert dense == same
    assert masked != changed
