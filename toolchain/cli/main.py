"""All verbs, and the one place where an error becomes a line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import logging
import os
import sys
import traceback
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from toolchain.cli.outputs import expand_homes, refuse_empty, require_apart
from toolchain.cli.screen import line
from toolchain.errors import SlimvitError, StorageError, fault_words
from toolchain.version import tool

if TYPE_CHECKING:
    from toolchain.measure.samples import Design

VERBS = (
    "shrink",
    "pipeline",
    "sweep",
    "stages",
    "measure",
    "bench",
    "devices",
    "limits",
    "gate",
    "inspect",
    "models",
    "doctor",
    "report",
    "push",
    "manifest",
    "schema",
    "init",
)
"""The files of the verbs, in the order of `--help`. All are imported for it, so a file imports at its head what its signatures
need, and in a function what that function calls."""
RESUMED = ("run", "shrink", "sweep", "plan", "bench", "gate")
"""Verbs that keep what they finished."""
COMPLETING = "_SLIMVIT_COMPLETE"
INTERRUPTED, INTERNAL, STORAGE, USAGE, UNREAD = 130, 70, 74, 2, 141
_UsageError: type[Any] = typer.BadParameter.__bases__[0]  # click's, or that of the copy which typer carries since 0.26

app = typer.Typer(
    name="slimvit",
    help="Compress a timm Vision Transformer, export it, build its engine, and verify size and latency.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for verb in VERBS:
    importlib.import_module(f"toolchain.cli.{verb}").register(app)


def _version(asked: bool) -> None:
    if asked:
        line(tool())
        raise typer.Exit


@app.callback()
def options(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log what is done, to stderr."),
    _: bool = typer.Option(False, "--version", help="Print the version and exit.", callback=_version, is_eager=True),
) -> None:
    """Set up logging before any verb runs."""
    logging.basicConfig(level=logging.WARNING, handlers=[_Stderr()], force=True)
    logging.getLogger("toolchain").setLevel(logging.INFO if verbose else logging.WARNING)
    for noisy in ("huggingface_hub", "timm", "onnxscript", "torch.onnx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


class _Stderr(logging.Handler):
    """One line a record on whatever stderr is now: a progress bar replaces it while it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"slimvit: {record.levelname.lower()}: {_one_line(record.getMessage())}\n")


def main(arguments: list[str] | None = None, design: Design | None = None) -> None:
    """Runs the command and exits with its code; SLIMVIT_DEBUG=1 shows the traceback of any error.

    Args:
        arguments: of the command; None are those of the process.
        design: how latency is timed where no option says otherwise; None is `Design()`.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    _open_streams()
    gc.set_threshold(50_000)  # what a verb imports stays; looking for garbage in it, as often as usual, takes longer
    sys.exit(_code(arguments, design))


def _open_streams() -> None:
    """Opens standard streams that are closed on /dev/null, since the next file to be opened would take their place.

    What a terminal's encoding lacks is written as Python spells it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # it takes the lowest number that is free, which is this one
            os.set_inheritable(null, True)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - for as long as the process
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # not every terminal can show every name and sign


def _require_folder() -> None:
    """Raises StorageError if the current folder is gone, without which some libraries end the process."""
    try:
        Path.cwd()
    except OSError as error:
        raise StorageError("the current folder is gone; cd to one that is there") from error


@cache
def _command() -> Any:
    """The command of all verbs; making it takes longer than most of what is asked of it."""
    command = typer.main.get_command(app)
    _guard(command)
    return command


def _guard(command: Any) -> None:
    """Lets a command, and all below it, read `~` in paths, and refuse empty values and outputs in place of what it reads."""
    for parameter in command.params:
        refuse_empty(parameter)
    work = command.invoke

    def invoke(context: Any) -> Any:
        expand_homes(context)
        require_apart(context)
        return work(context)

    command.invoke = invoke
    for each in getattr(command, "commands", {}).values():
        _guard(each)


def _code(arguments: list[str] | None, design: Design | None) -> int:
    try:
        _require_folder()
        # Not `main` of the command: it ends the program by itself on Ctrl-C and on a closed pipe, without a word.
        command = _command()
        if COMPLETING in os.environ:  # a shell asks what could come next
            command.main([], "slimvit")
        with command.make_context(
            "slimvit", sys.argv[1:] if arguments is None else list(arguments), obj=design
        ) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as end:
        return end.exit_code
    except SlimvitError as error:
        return _fail(str(error), error.exit_code)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(error.format_message() + "\n")
            return USAGE
        return _fail(_with_help(error), USAGE)
    except (KeyboardInterrupt, typer.Abort):
        words = sys.argv[1:] if arguments is None else arguments
        resumes = any(word in RESUMED for word in words)
        what = "to resume" if resumes else "again; it starts anew"
        return _fail(f"Interrupted. Run the same command {what}.", INTERRUPTED)
    except BrokenPipeError:  # whoever read stdout has seen enough: `slimvit … | head`
        _discard_stdout()
        return UNREAD  # as shells tell of a program that such a pipe ended
    except OSError as error:
        _discard_stdout()
        return _fail(f"{error.filename or 'input/output'}: {fault_words(error)}", STORAGE)
    except Exception as error:  # noqa: BLE001 - the last boundary: a fault of slimvit, told as such
        return _fail(
            f"internal error: {type(error).__name__}: {error}. Run it again with SLIMVIT_DEBUG=1 to see where, and report it.",
            INTERNAL,
        )
    return 0


def _with_help(error: Any) -> str:
    """What is wrong with a command line, and whose help says what would be right."""
    path = error.ctx.command_path if error.ctx is not None else "slimvit"
    return f"{error.format_message().rstrip('.?')}{'?' if error.format_message().endswith('?') else '.'} See `{path} --help`."


def _discard_stdout() -> None:
    """Sends what is still buffered nowhere, so that the interpreter's own last flush cannot fail and complain."""
    with contextlib.suppress(OSError, ValueError):  # there may be no file below stdout
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _one_line(text: str) -> str:
    return " ".join(part.strip() for part in text.splitlines() if part.strip())


def _fail(message: str, code: int) -> int:
    if os.environ.get("SLIMVIT_DEBUG") and sys.exc_info()[0] is not None:
        traceback.print_exc()
    sys.stderr.write(f"slimvit: error: {_one_line(message)}\n")
    return code
