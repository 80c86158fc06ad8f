"""Default values, in a module without heavy imports so that `--help` can print them quickly."""

from __future__ import annotations

PARAMS = 0.5
"""Share of the parameters that a compressed model keeps."""

LOOKS = 3
"""How many times at most a comparison is judged while samples are added."""

SESSIONS, BLOCKS, WARMUP_S = 6, 12, 0.5
"""A comparison's first look: many short sessions, as processes differ by more than blocks do. Six let every variant be opened
first twice."""

COLD_STARTS = 5
"""Fresh processes that say how long an artifact takes to open, and what memory it needs."""

FLOOR_SESSIONS, FLOOR_BLOCKS = 3, 10
"""A block of a floor holds one slot of every model, of A once more, and of every shape of product."""
