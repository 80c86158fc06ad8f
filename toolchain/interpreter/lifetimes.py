"""Lifetimes of a program's values: each is freed after its last reader, so that memory does not grow with depth."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def last_uses(steps: Sequence[Iterable[str]], kept: Collection[str]) -> list[tuple[str, ...]]:
    """For each step the values that no later one uses, without those that are kept.

    Args:
        steps: names of the values that each reads or makes.
        kept: those that are read after all of them.
    """
    last = {name: index for index, names in enumerate(steps) for name in names}
    done: list[list[str]] = [[] for _ in steps]
    for name, index in last.items():
        if name not in kept:
            done[index].append(name)
    return [tuple(names) for names in done]
