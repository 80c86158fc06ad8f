"""Every way in which a hub refuses is a sentence of its own that says what to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)

from toolchain.surgery.refusals import refusal


def answer(kind, status):
    response = SimpleNamespace(
        status_code=status, headers={}, request=None
    )  # of whatever library the client uses today
    return kind("Client Error for url https://hub/api?token=hf_secret", response=response)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (answer(GatedRepoError, 403), "a/b is gated: accept its conditions on its page"),
        (answer(RepositoryNotFoundError, 404), "there is no repository a/b that you may write"),
        (answer(HfHubHTTPError, 401), "does not accept the token for a/b: log in"),
        (answer(HfHubHTTPError, 403), "the token may not write a/b: log in"),
        (answer(HfHubHTTPError, 412), "someone else wrote to a/b meanwhile: push again"),
        (answer(HfHubHTTPError, 429), "wait some minutes"),
        (answer(HfHubHTTPError, 503), "fails with status 503 at a/b: try again later"),
        (LocalTokenNotFoundError(), "there is no token to write a/b with: log in"),
        (LocalEntryNotFoundError("It is not here."), "the hub does not take a/b@c: It is not here. Check"),
    ],
)
def test_a_refusal_says_what_to_do(error, words):
    said = refusal(error, "a/b@c", "write")
    assert words in said
    assert "hf_secret" not in said


def test_what_the_client_wrapped_is_told():
    wrapped = RuntimeError("Error while uploading")
    wrapped.__cause__ = answer(HfHubHTTPError, 403)
    assert refusal(wrapped, "a/b", "write") == refusal(wrapped.__cause__, "a/b", "write")
