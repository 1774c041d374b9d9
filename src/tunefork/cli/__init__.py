"""The command line's outermost edge: every error becomes one sentence and an exit code."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback

EXIT_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> None:
    """Runs `tunefork`. Exits 0 done, 2 refused, 1 failed, 130 interrupted. Tracebacks go to a file."""
    import click

    from tunefork.cli.app import app
    from tunefork.errors import TuneforkError

    try:
        app(args=arguments, standalone_mode=False)
    except TuneforkError as error:
        _say(str(error))
        sys.exit(error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.exceptions.Abort):
        _say("Interrupted.")
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 - the one edge: a person gets a sentence, the file the traceback
        with tempfile.NamedTemporaryFile("w", prefix="tunefork-", suffix=".log", delete=False) as file:
            file.write(traceback.format_exc())
        _say(f"Something unexpected failed: {type(error).__name__}: {error}\nThe traceback is in {file.name}")
        sys.exit(1)


def _say(text: str) -> None:
    sys.stderr.write(f"tunefork: {text}\n")
