"""The command line's outermost edge: every error becomes one sentence and an exit code."""

from __future__ import annotations

import io
import signal
import sys
import tempfile
import traceback


def main(arguments: list[str] | None = None) -> None:
    """Runs `tunefork`. Exits 0 done, 2 refused, 1 failed, 130 interrupted. Tracebacks go to a file."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # wherever it comes, it stops like Ctrl-C
    try:
        _run(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(arguments: list[str] | None) -> None:
    from tunefork.cli.app import app
    from tunefork.errors import TuneforkError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without a letter is no reason to stop
    try:
        app(args=arguments, prog_name="tunefork")  # wrong flags, Ctrl-C and closed pipes end here, by typer
    except TuneforkError as error:
        _say(str(error))
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 - the one edge: a person gets a sentence, the file the traceback
        with tempfile.NamedTemporaryFile("w", prefix="tunefork-", suffix=".log", delete=False) as file:
            file.write(traceback.format_exc())
        _say(f"Something unexpected failed: {type(error).__name__}: {error}\nThe traceback is in {file.name}")
        sys.exit(1)


def _say(text: str) -> None:
    from tunefork.data.values import visible

    sys.stderr.write(f"tunefork: {visible(text)}\n")
