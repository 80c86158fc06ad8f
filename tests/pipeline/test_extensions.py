"""Code of other packages is part of what a stage depends on."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from itertools import chain

import pytest
from recipes import tiny_recipe

from toolchain.compress.criteria import CRITERIA, Criterion
from toolchain.compress.factorisations import FACTORISATIONS
from toolchain.compress.reductions import REDUCTIONS
from toolchain.compress.solver import ALLOCATIONS
from toolchain.export.precision import PRECISIONS
from toolchain.families import FAMILIES
from toolchain.pipeline import extensions
from toolchain.pipeline.extensions import foreign_code
from toolchain.pipeline.stages.base import _key
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
    assert [name for name, _ in first] == ["other_scores"]
    assert code(1) == first
    assert code(2) != first
    assert foreign_code([Criterion("theirs", partial(package(1).score))]) == first


def test_what_a_script_defines_is_known_by_its_own_lines():
    def other(known):
        return known

    def same(known):
        return known

    for function in (other, same):
        function.__module__ = "__main__"
    one, two = (foreign_code([function]) for function in (other, same))
    assert one[0][0].startswith("__main__.")
    assert one != two


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
            return _key(Dense(run)), _key(Masked(run, job.dense, Known((), (), (), None)))

    (dense, masked), (same, changed) = keys(1), keys(2)
    assert dense == same
    assert masked != changed
