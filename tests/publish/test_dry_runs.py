"""`slimvit push --dry-run` refuses a place that is none as a push does, before the run is looked at."""

from __future__ import annotations

import pytest

from toolchain.cli.push import push
from toolchain.errors import RecipeError


@pytest.mark.parametrize(
    ("place", "options", "words"),
    [
        ("hf://name", {}, "hf://name names no repository: write hf://ORG/NAME"),
        ("hf://a/b/c", {}, "names no repository"),
        ("hf://org/name@a", {"revision": "b"}, "name two branches: leave one out"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_place_that_is_none_is_refused_first(tmp_path, place, options, words, dry_run):
    with pytest.raises(RecipeError, match=words):
        push(tmp_path / "no run", place, labels=None, dry_run=dry_run, **options)


def test_a_dry_run_lists_what_is_pushed_and_asks_no_hub(finished, capsys, hub):
    push(finished, "hf://org/name@small", dry_run=True, json_=True)
    assert "onnx/model_quantized.onnx" in capsys.readouterr().out
    assert hub.requests == []
