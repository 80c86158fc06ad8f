"""What a person sees: how long a stage will still take, and commands that may be pasted."""

import shlex

import pytest

from toolchain.cli.screen import Pace, Screen
from toolchain.shell import word


def test_the_time_left_follows_from_the_pace():
    pace = Pace()
    assert pace.left(0.0, 100.0) == ""
    assert pace.left(0.25, 130.0) == "0:01:30"
    assert pace.left(0.5, 220.0) == "0:02:00", "slow steps are not forgotten"
    assert pace.left(1.0, 300.0) == "0:00:00"


def test_a_resumed_stage_is_not_taken_for_a_fast_one():
    pace = Pace()
    assert pace.left(0.6, 1.0) == ""
    assert pace.left(0.6, 31.0) == ""
    assert pace.left(0.7, 61.0) == "0:03:00"


@pytest.fixture
def clock():
    return [1000.0]


def test_without_a_terminal_a_line_tells_share_work_and_time_left(clock, capsys):
    with Screen(lambda: clock[0]) as shown:
        shown.stage("compress")
        for share, text in ((0.0, "measuring"), (0.25, "reducing blocks.0"), (0.5, "reducing blocks.3")):
            shown.at(share, text)
            clock[0] += 40
        shown.stage("finetune")
        clock[0] += 40
        shown.at(0.5, "epoch 1/2, loss 0.100")
        shown.done("finetune", 81.0, reused=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "   25% reducing blocks.0, 0:02:00 left"
    assert lines[1] == "   50% reducing blocks.3, 0:01:20 left"
    assert lines[2] == "   50% epoch 1/2, loss 0.100", "another stage, another pace"
    assert lines[3].split() == ["finetune", "81.0", "s"]


@pytest.mark.parametrize("path", ["runs/a", "a b", "it's", '"q"', "a\nb", "$HOME `x`;|&<>*", "é", "e\u0301", "--help"])
def test_a_path_is_one_word_of_a_command_and_no_option(path):
    assert shlex.split(f"slimvit run {word(path)}") == ["slimvit", "run", f"./{path}" if path[0] == "-" else path]
