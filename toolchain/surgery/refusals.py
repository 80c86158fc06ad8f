"""Turns an error of the hub's client into one sentence that ends in what to do."""

from __future__ import annotations

import re
from json import JSONDecodeError

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from toolchain.foreign import first_line

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
"""How a client of the hub gets a token."""


CONFLICT = 409
"""HTTP status for something that exists already, or was changed in the meantime."""


def refusal(error: Exception, place: str, right: str = "read") -> str:
    """One sentence on an error of the hub's client.

    Args:
        error: what the client raised.
        place: the repository as a user calls it, perhaps with "@revision".
        right: what was to be done there: "read" or "write".
    """
    repository, _, revision = place.partition("@")
    while isinstance(error, RuntimeError | LocalEntryNotFoundError) and isinstance(
        error.__cause__, Exception
    ):  # as wrapped
        error = error.__cause__
    if isinstance(error, GatedRepoError):
        return f"{repository} is gated: accept its conditions on its page, then {LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no repository {repository} that you may {right}: check its name; if it is private, {LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no revision {revision or 'main'!r}: name a branch, a tag or a commit behind @"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"{place} lacks a file that is needed: name a repository of timm or of transformers with weights"
    if isinstance(error, LocalTokenNotFoundError):
        return f"there is no token to {right} {repository} with: {LOG_IN}"
    status, said = status_of(error), _said(error)
    if status == 401:
        return f"the hub does not accept the token for {repository}: {said}{LOG_IN} again"
    if status == 403:
        return f"the token may not {right} {repository}: {said}{LOG_IN} to a token with that right"
    if status in (CONFLICT, 412):
        return f"someone else wrote to {repository} meanwhile: {said}push again"
    if status == 429:
        return f"the hub takes no more requests for now: {said}wait some minutes, then {right} {repository} again"
    verb = "give" if right == "read" else "take"
    if status in range(400, 500):
        return f"the hub does not {verb} {place}, with status {status}: {said}check the name and what is asked for"
    if status:
        return f"the hub fails with status {status} at {repository}: try again later"
    if isinstance(error, ValueError) and not isinstance(
        error, JSONDecodeError | UnicodeError
    ):  # of the client, or of what it asked the hub about, such as a card
        return f"the hub does not {verb} {place}: {_joined(str(error)) or type(error).__name__}. Change what is refused, and try again"
    return f"the hub does not {verb} {place}: {first_line(error).rstrip('.')}. Check the name and the network"


def _said(error: Exception) -> str:
    """The hub's own reason, to stand before the advice; "" if it gave none."""
    message = error.server_message if isinstance(error, HfHubHTTPError) else None
    reason = _joined(message or "")
    return f"the hub says {reason!r}; " if reason else ""


def _joined(text: str) -> str:
    """The lines of a message as one, without the dots at its end."""
    listed = re.sub(r"(?<![.:;,])\s*\n\s*- ", "; ", text.strip())
    return re.sub(r"\s*\n\s*(- )?", " ", listed).rstrip(". ")


def status_of(error: Exception) -> int:
    """The status of HTTP that a hub answered with; 0 if it did not answer."""
    response = error.response if isinstance(error, HfHubHTTPError) else None
    return 0 if response is None else int(response.status_code)
