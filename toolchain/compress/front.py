"""The Pareto front of other budgets: the least damage at each cost, from the damage of single layers.

A multiplier λ joins damage and cost. For each λ every layer takes the width of least damage + λ · cost by itself, and the model
that this gives does the least damage of all that cost no more (Everett 1963). As λ falls, one layer after another is widened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from toolchain.compress.choices import Choices, Costs, Key
from toolchain.compress.outcome import FrontPoint
from toolchain.compress.solver import Candidate

STEPS = 24
"""How many choices a front holds at most."""


def front(candidates: Sequence[Candidate], choices: Choices, costs: Costs, name: str) -> tuple[FrontPoint, ...]:
    """The choices of least damage from the narrowest widths that were measured to the widest; empty if none were.

    Args:
        candidates: the damage of every layer at some widths, its whole among them.
        choices: what may be reduced.
        costs: of any widths.
        name: of the cost on the other axis of the front.
    """
    if not candidates:
        return ()
    whole = costs.whole
    hulls = {key: _hull(own, choices, costs, name) for key, own in _by_key(candidates).items()}
    # From one corner of a hull to the next damage falls ever less for what it costs: all layers' steps in one order.
    steps = [
        ((before.damage - after.damage) / (cost[after.kept] - cost[before.kept]), key, after)
        for key, (corners, cost) in hulls.items()
        for before, after in pairwise(corners)
    ]
    steps.sort(key=lambda step: -step[0])
    chosen = {key: corners[0] for key, (corners, _) in hulls.items()}
    states = [dict(chosen)]
    for _, key, after in steps:
        chosen[key] = after
        states.append(dict(chosen))
    points = []
    for state in states:
        cost = costs.of(choices.widths({key: candidate.kept for key, candidate in state.items()}))
        ratio = {each: cost[each] / whole[each] for each in whole}
        points.append(FrontPoint(ratio=ratio, damage=sum(candidate.damage for candidate in state.values())))
    return _spread(points, name)


def _by_key(candidates: Sequence[Candidate]) -> dict[Key, list[Candidate]]:
    own: dict[Key, list[Candidate]] = {}
    for candidate in candidates:
        own.setdefault(candidate.key, []).append(candidate)
    return own


def _hull(
    own: Sequence[Candidate], choices: Choices, costs: Costs, name: str
) -> tuple[list[Candidate], dict[int, float]]:
    """(the corners of the lower convex hull of damage over cost, from the least cost on; width → cost of the model)."""
    cost = {each.kept: costs.of(choices.widths({each.key: each.kept}))[name] for each in own}
    corners: list[Candidate] = []
    for each in sorted(own, key=lambda candidate: (cost[candidate.kept], candidate.damage)):
        if corners and each.damage >= corners[-1].damage:
            continue  # dearer, or as dear, and no better
        while len(corners) > 1 and _slope(cost, corners[-1], each) >= _slope(cost, corners[-2], corners[-1]):
            corners.pop()
        corners.append(each)
    return corners, cost


def _slope(cost: Mapping[int, float], before: Candidate, after: Candidate) -> float:
    """By how much damage falls for what it costs."""
    return (before.damage - after.damage) / (cost[after.kept] - cost[before.kept])


def _spread(points: Sequence[FrontPoint], name: str) -> tuple[FrontPoint, ...]:
    """At most `STEPS` of some, about evenly spread over their cost, with both ends."""
    ratios = [point.ratio[name] for point in points]
    wanted = np.linspace(ratios[0], ratios[-1], STEPS)
    nearest = dict.fromkeys(int(np.abs(np.array(ratios) - each).argmin()) for each in wanted)
    return tuple(points[index] for index in nearest)
