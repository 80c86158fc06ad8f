"""What a message offers to be pasted into a shell."""

from __future__ import annotations

import shlex
from pathlib import Path


def word(path: Path | str) -> str:
    """A path as a shell reads it in a command that a user may paste: one word, and no option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
