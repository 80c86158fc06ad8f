"""Every way in which a hub refuses is a sentence of its own that says what to do."""

from __future__ import annotations

from json import JSONDecodeError
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


def answer(kind, status, message=None):
    response = SimpleNamespace(
        status_code=status, headers={}, request=None
    )  # of whatever library the client uses today
    return kind("Client Error for url https://hub/api?token=hf_secret", response=response, server_message=message)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (answer(GatedRepoError, 403), "a/b is gated: accept its conditions on its page"),
        (answer(RepositoryNotFoundError, 404), "there is no repository a/b that you may write"),
        (answer(HfHubHTTPError, 401), "does not accept the token for a/b: log in"),
        (answer(HfHubHTTPError, 403), "the token may not write a/b: log in"),
        (answer(HfHubHTTPError, 412), "someone else wrote to a/b meanwhile: push again"),
        (answer(HfHubHTTPError, 429), "wait some minutes"),
        (
            answer(HfHubHTTPError, 403, "No right\nto write."),
            "may not write a/b: the hub says 'No right to write'; log in",
        ),
        (answer(HfHubHTTPError, 401, "Expired."), "the token for a/b: the hub says 'Expired'; log in"),
        (answer(HfHubHTTPError, 409, "Exists"), "wrote to a/b meanwhile: the hub says 'Exists'; push again"),
        (answer(HfHubHTTPError, 429, "5 a day"), "for now: the hub says '5 a day'; wait"),
        (
            answer(HfHubHTTPError, 400, "The file is too large."),
            "take a/b@c, with status 400: the hub says 'The file is too large'; check",
        ),
        (answer(HfHubHTTPError, 413), "does not take a/b@c, with status 413: check the name"),
        (
            ValueError('Invalid metadata in README.md.\n- "license" must be one of mit\n- no dataset\n'),
            'does not take a/b@c: Invalid metadata in README.md. "license" must be one of mit; no dataset. Change what',
        ),
        (
            JSONDecodeError("Expecting value", "<html>", 0),
            "Expecting value: line 1 column 1 (char 0). Check the name and the network",
        ),
        (ValueError(), "does not take a/b@c: ValueError. Change"),
        (answer(HfHubHTTPError, 503), "fails with status 503 at a/b: try again later"),
        (LocalTokenNotFoundError(), "there is no token to write a/b with: log in"),
        (LocalEntryNotFoundError("It is not here."), "the hub does not take a/b@c: It is not here. Check"),
    ],
)
def test_a_refusal_says_what_to_do(error, words):
    said = refusal(error, "a/b@c", "write")
    assert words in said
    assert "hf_secret" not in said
    assert "\n" not in said


def test_what_the_client_wrapped_is_told():
    wrapped = RuntimeError("Error while uploading")
    wrapped.__cause__ = answer(HfHubHTTPError, 403)
    assert refusal(wrapped, "a/b", "write") == refusal(wrapped.__cause__, "a/b", "write")


def test_an_error_without_an_answer_is_told():
    error = answer(HfHubHTTPError, 500)
    error.response = None
    assert refusal(error, "a/b", "read").startswith("the hub does not give a/b: Client Error")
