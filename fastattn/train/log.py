"""What a run tells: a line of JSON for each step, and a bar or lines for who watches."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastattn.train.files import write_atomically

LOG = "log.jsonl"


class Log:
    """A file of lines. What cannot be written now is kept, and written with what comes next.

    Args:
        path: where it is; None: nowhere.
        step: where the run goes on; lines of later steps, which will come again, are cut off.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self._path, self._waiting, self._has_told = path, b"", False
        if path is not None and path.exists():
            lines = [x for x in read(path) if x["step"] <= step]
            text = "".join(json.dumps(x) + "\n" for x in lines)
            write_atomically(path, lambda beside: beside.write_text(text))

    def write(self, **facts: Any) -> str | None:
        """Appends a line. Where it could not, returns why, but once for failures in a row."""
        if self._path is None:
            return None
        self._waiting += json.dumps(facts).encode() + b"\n"
        try:
            with self._path.open("ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if file.write(self._waiting) != len(self._waiting):
                    file.truncate(end)  # no half a line
                    raise OSError(f"there is no room for {len(self._waiting)} bytes more")
        except OSError as error:
            has_told, self._has_told = self._has_told, True
            return None if has_told else f"cannot write {self._path}: {error}; its lines are kept till it can"
        self._waiting, self._has_told = b"", False
        return None


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; the last one may be torn, where its writer was killed."""
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


class Display:
    """A bar where there is a terminal, else a line for each evaluation; on stderr, of the first process."""

    def __init__(self, shown: bool, total: int, done: int) -> None:
        self._console = Console(stderr=True, quiet=not shown, highlight=False, soft_wrap=True)
        # No background refresh: its thread would take time from the steps.
        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(20), TextColumn("{task.description}"),
            TimeRemainingColumn(), console=self._console, auto_refresh=False, transient=True,
            disable=not (shown and sys.stderr.isatty()),
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, done: int, text: str) -> None:
        """After each step."""
        self._bar.update(self._task, completed=done, description=text, refresh=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False)
