"""The fixtures of `measuring`, for all tests here."""

from measuring import made_up, own_cache, stack, stopwatch, widths_timed

__all__ = ["made_up", "own_cache", "stack", "stopwatch", "widths_timed"]
