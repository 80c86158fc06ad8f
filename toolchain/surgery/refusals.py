"""What a hub that refuses means, as one sentence that ends in what to do."""

from __future__ import annotations

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
"""How a client of the hub gets a token."""


CONFLICT = 409
"""The status of what is there already, or was changed meanwhile."""


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
    status = status_of(error)
    if status == 401:
        return f"the hub does not accept the token for {repository}: {LOG_IN} again"
    if status == 403:
        return f"the token may not {right} {repository}: {LOG_IN} to a token with that right"
    if status in (CONFLICT, 412):
        return f"someone else wrote to {repository} meanwhile: push again"
    if status == 429:
        return f"the hub takes no more requests for now: wait some minutes, then {right} {repository} again"
    if status:
        return f"the hub fails with status {status} at {repository}: try again later"
    line = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    verb = "give" if right == "read" else "take"
    return f"the hub does not {verb} {place}: {line}. Check the name and the network"


def status_of(error: Exception) -> int:
    """The status of HTTP that a hub answered with; 0 if it did not answer."""
    response = error.response if isinstance(error, HfHubHTTPError) else None
    return 0 if response is None else int(response.status_code)
