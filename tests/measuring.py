"""Fixtures of all tests that measure, or that judge made-up samples."""

from collections.abc import Callable
from pathlib import Path

import pytest
from builders import write_samples, write_stack

from toolchain.measure.comparison import Comparison


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Sessions of an interrupted test are no business of the next."""
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def stack() -> Callable[..., Path]:
    return write_stack


@pytest.fixture
def made_up() -> Callable[..., Comparison]:
    return write_samples
