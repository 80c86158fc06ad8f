"""What every test shares; the builders themselves are in builders.py."""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import pytest
from builders import dense_model

from toolchain.artifact import TimmModel


@pytest.fixture
def tiny() -> TimmModel:
    """A randomised dense model of two blocks."""
    return dense_model()
