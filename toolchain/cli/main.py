"""All verbs, and the one place where an error becomes a line on stderr and an exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback

import click
import typer
from rich.console import Console
from rich.logging import RichHandler

from toolchain.cli import look, measure, pipeline, stages
from toolchain.errors import SlimvitError

INTERRUPTED, INTERNAL, STORAGE, USAGE = 130, 70, 74, 2

app = typer.Typer(
    name="slimvit",
    help="Compress a timm Vision Transformer, export it, build its engine, and verify size and latency.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for module in (pipeline, stages, measure, look):
    module.register(app)


@app.callback()
def options(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log what is done, to stderr."),
) -> None:
    """Set up logging before any verb runs."""
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("toolchain").setLevel(logging.INFO if verbose else logging.WARNING)
    for noisy in ("huggingface_hub", "timm", "onnxscript", "torch.onnx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and exits with its code; SLIMVIT_DEBUG=1 shows the traceback of any error."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    sys.exit(_code(arguments))


def _code(arguments: list[str] | None) -> int:
    try:
        result = typer.main.get_command(app).main(arguments, prog_name="slimvit", standalone_mode=False)
    except SlimvitError as error:
        return _fail(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        sys.stderr.write(error.format_message() + "\n")
        return USAGE
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted; what was finished is kept, and the same command goes on from there", INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        return STORAGE
    except OSError as error:
        return _fail(f"{error.filename or 'input/output'}: {error.strerror or error}", STORAGE)
    except Exception as error:  # noqa: BLE001 - the last boundary: a fault of slimvit, told as such
        return _fail(f"internal error: {type(error).__name__}: {error}; SLIMVIT_DEBUG=1 shows where", INTERNAL)
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int) -> int:
    if os.environ.get("SLIMVIT_DEBUG") and sys.exc_info()[0] is not None:
        traceback.print_exc()
    sys.stderr.write(f"slimvit: error: {message}\n")
    return code
