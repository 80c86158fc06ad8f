"""Numbers that hold where nobody names others; alone here, so that a command can tell them without what they are for."""

from __future__ import annotations

PARAMS = 0.5
"""The share of the parameters that is left."""

LOOKS = 3
"""How often a comparison is judged at most while it grows."""

SESSIONS, BLOCKS, WARMUP_S = 6, 12, 0.5
"""A comparison's first look: many short sessions, as processes differ by more than blocks do. Six let every variant be opened
first twice."""

COLD_STARTS = 5
"""Fresh processes that say how long an artifact takes to open, and what memory it needs."""

FLOOR_SESSIONS, FLOOR_BLOCKS = 3, 10
"""A block of a floor holds one slot of every model, of A once more, and of every shape of product."""
