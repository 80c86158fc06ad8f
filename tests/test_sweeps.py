"""What runs every time is some of what there is: a name that nothing has would leave its kind to the slow tests alone."""

from __future__ import annotations

import pytest
from builders import BLOCKS, EVA, SWIN, VIT
from sweeps import FEW, USUAL, swept


def test_the_usual_structures_are_there_and_the_fewest_are_among_them():
    assert {*VIT, *SWIN, *EVA, *BLOCKS} >= USUAL > FEW


def test_only_others_are_slow():
    one, other = swept(["a", "b"], ["a"])
    assert one == "a"
    assert other == pytest.param("b", marks=pytest.mark.slow)
