"""A run folder: what a run leaves on disk, where it lies, and who may write there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tunefork.errors import MissingFileError, RunError, UnsupportedError
from tunefork.files import (
    LEFTOVERS,
    LOCK,
    FolderLock,
    append_line,
    clean_leftovers,
    explained,
    make_folder,
    remove_folder,
    repair_lines,
    sync_file,
    write_atomic,
    write_json,
)

RESULT_SCHEMA = 1
HOSTED_STATE = "hosted.json"
_STEP = re.compile(r"step-(\d{8,})")


def refuse_hosted(path: str | Path) -> None:
    """Raises UnsupportedError for a run whose weights lie at a service."""
    if (Path(path) / HOSTED_STATE).is_file():
        raise UnsupportedError(
            f"The weights must lie here. Received {str(path)!r}, whose model a service keeps. Try `tunefork predict`, "
            "`chat` or `evaluate`, which ask it there, or `tunefork migrate`."
        )


class RunFolder:
    """One run on disk; made by `create` or `open`, closed by `close` or at the end of a `with`.

    recipe.yaml      the resolved recipe; with log.jsonl it marks a folder as a run
    log.jsonl        one line an event: {"step": 3, "kind": "step", "loss": 0.7, ...}
    checkpoints/     step-00000120/ and so on (train.checkpoint)
    trajectory       every step of the method zo (zo.trajectory)
    model/           the artefact, once training is done
    hosted.json      of a hosted run: its files and its job at the service, which keeps the model
    result.json      the figures; its presence says that the run is finished
    report.html, predictions/, error.log
    """

    def __init__(self, path: Path, lock: FolderLock | None) -> None:
        self.path, self._lock = path, lock
        self.recipe_path = path / "recipe.yaml"
        self.log_path = path / "log.jsonl"
        self.checkpoints_path = path / "checkpoints"
        self.trajectory_path = path / "trajectory"
        self.model_path = path / "model"
        self.result_path = path / "result.json"
        self.report_path = path / "report.html"
        self.predictions_path = path / "predictions"
        self.error_path = path / "error.log"

    @classmethod
    def create(cls, path: str | Path, recipe: str) -> RunFolder:
        """A new run in `path` with `recipe` (YAML text), locked for writing.

        The folder may be missing, empty, or a run that ended before its first checkpoint, which is begun over.
        Raises RunError, before anything is written, for a folder with other things in it, a finished run, a run with
        checkpoints (they are for `open`, --resume) and a run that another process is writing.
        """
        run = cls.refuse_taken(path)
        make_folder(run.path)
        run._lock = FolderLock(run.path)
        try:
            run._refuse_to_overwrite()  # again: another process may have been at work until now
            run._clean()
            make_folder(run.checkpoints_path)
            if run.trajectory_path.exists():
                remove_folder(run.trajectory_path)
            write_atomic(run.log_path, b"")
            write_atomic(run.recipe_path, recipe)  # last: from here on it is a run
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def refuse_taken(cls, path: str | Path) -> RunFolder:
        """Raises what `create` would raise for this folder before anything is written; returns it, not locked."""
        run = cls(Path(path), None)
        with explained(run.path):
            run._refuse_to_overwrite()
        return run

    @classmethod
    def open(cls, path: str | Path, *, write: bool) -> RunFolder:
        """The run in `path`, to read it or, locked, to go on with it (resume, report, predictions).

        Opened for writing, what a kill left behind is cleaned up. Raises MissingFileError when there is no such
        folder, RunError when it is not a run or another process is writing there.
        """
        run = cls(Path(path), None)
        with explained(run.path):
            if not run.path.exists():
                raise MissingFileError(
                    f"A run must be a folder that is there. Received {str(run.path)!r}, which is not. "
                    "Try the folder that was given to `tunefork train` as --out; without --resume it begins a new run."
                )
            if not run._is_run():
                raise RunError(
                    f"A run folder must hold recipe.yaml and log.jsonl. Received {run.path}, which does not. "
                    "Try the folder that was given to `tunefork train` as --out."
                )
        if write:
            run._lock = FolderLock(run.path)
            try:
                run._clean()
                repair_lines(run.log_path)
            except BaseException:
                run.close()
                raise
        return run

    def close(self) -> None:
        """Lets other processes write here."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def finished(self) -> bool:
        """Whether the run has its result."""
        return self.result_path.exists()

    def checkpoint_path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.checkpoints_path / f"step-{step:08d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a checkpoint folder, good or damaged, in rising order."""
        if not self.checkpoints_path.is_dir():
            return []
        found = (_STEP.fullmatch(entry.name) for entry in self.checkpoints_path.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def append_log(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Adds an event of `step` to the log. Numbers that are not finite are written as null."""
        self.require_writable()
        append_line(self.log_path, {"step": step, "kind": kind, **{k: v for k, v in values.items() if k != "step"}})

    def sync_log(self) -> None:
        """Flushes the log to the disk, so that it has every event up to a checkpoint written after this."""
        self.require_writable()
        if self.log_path.exists():
            sync_file(self.log_path)

    def read_log(self) -> list[dict[str, Any]]:
        """Every event, oldest first.

        A line that cannot be read any more stands as {"step": of the event before it, "kind": "damaged", "line": its
        number}; a last line without its line break is still being written, or was when the process was killed, and is
        left out.
        """
        return [entry for entry, _ in self._log_lines()]

    def truncate_log(self, step: int | None) -> None:
        """Takes the events after `step` out of the log, as a run that resumes from there will write them again.

        None: all but the plan, for a run that begins over.
        """
        self.require_writable()
        lines = self._log_lines()
        kept = [line for e, line in lines if (e["kind"] == "plan" if step is None else e["step"] <= step)]
        data = b"".join(line + b"\n" for line in kept)
        if not self.log_path.exists() or data != self.log_path.read_bytes():
            write_atomic(self.log_path, data)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes result.json, which finishes the run. `schema` is added; numbers that are not finite become null."""
        self.require_writable()
        write_json(self.result_path, {"schema": RESULT_SCHEMA, **result})

    def read_result(self) -> dict[str, Any]:
        """The content of result.json. Raises RunError when the run is not finished or the file cannot be read."""
        if not self.finished:
            raise RunError(f"{self.path} must be a finished run. It has no result.json. Try `tunefork train --resume`.")
        try:
            result = json.loads(self.result_path.read_bytes())
            schema = result["schema"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self.result_path} must be JSON with a `schema`. Received: {error}. Try `tunefork train --resume`."
            ) from error
        if schema != RESULT_SCHEMA:
            raise RunError(
                f"{self.result_path} must have schema {RESULT_SCHEMA}. Received {schema}. Try a newer Tunefork."
            )
        return result

    def write_report(self, html: str) -> None:
        """Writes report.html."""
        self.require_writable()
        write_atomic(self.report_path, html)

    def write_predictions(self, name: str, data: bytes | str) -> Path:
        """Writes a file into predictions/ and returns where it lies."""
        self.require_writable()
        make_folder(self.predictions_path)
        write_atomic(self.predictions_path / name, data)
        return self.predictions_path / name

    def write_error(self, text: str) -> Path:
        """Writes error.log, the place of a traceback that the terminal is spared, and returns where it lies."""
        self.require_writable()
        write_atomic(self.error_path, text)
        return self.error_path

    def require_writable(self) -> None:
        """Raises RunError unless this run was created or opened for writing, and not closed since."""
        if self._lock is None or not self._lock.held:
            raise RunError(f"{self.path} must be open for writing. It is open for reading, or closed. Try write=True.")

    def _is_run(self) -> bool:
        return self.recipe_path.is_file() and self.log_path.is_file()

    def _refuse_to_overwrite(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise RunError(f"A run must be a folder. Received {self.path}, which is a file. Try another name.")
        if self.finished and self._is_run():
            raise RunError(
                f"A new run must not replace a finished one. {self.path} is finished. Try another --out, or --resume."
            )
        if steps := self.checkpoint_steps():
            raise RunError(
                f"A new run must not replace one that can go on. {self.path} has a checkpoint of step {steps[-1]}. "
                "Try --resume, or another --out."
            )
        made_first = {LOCK, self.log_path.name, self.checkpoints_path.name}  # a kill during `create` may leave these
        others = [p.name for p in self.path.iterdir() if p.name not in made_first and not p.name.startswith(LEFTOVERS)]
        if others and not self._is_run():
            raise RunError(
                f"A new run needs an empty folder. {self.path} holds {len(others)} other "
                f"{'thing' if len(others) == 1 else 'things'}, {min(others)} among them. Try another --out."
            )

    def _clean(self) -> None:
        clean_leftovers(self.path)
        clean_leftovers(self.checkpoints_path)

    def _log_lines(self) -> list[tuple[dict[str, Any], bytes]]:
        if not self.log_path.exists():
            return []
        lines: list[tuple[dict[str, Any], bytes]] = []
        step = 0
        for number, line in enumerate(self.log_path.read_bytes().split(b"\n")[:-1], 1):
            try:
                entry = json.loads(line)
                step = int(entry["step"])
            except (ValueError, KeyError, TypeError):
                entry = {"step": step, "kind": "damaged", "line": number}
                line = json.dumps(entry).encode()
            lines.append((entry, line))
        return lines
