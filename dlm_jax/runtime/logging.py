# SPDX-License-Identifier: Apache-2.0
"""Metrics: JSON lines on disk, a progress bar on a terminal, plain lines elsewhere."""

import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlm_jax import console
from dlm_jax.runtime.writers import Writer


class Progress:
    """Shows and records the progress of a run; silent on all hosts but the first.

    writers: where the metrics go besides; `close` closes them.
    """

    def __init__(
        self,
        path: Any,
        *,
        total: int,
        start: int,
        main: bool = True,
        writers: Sequence[Writer] = (),
    ):
        self.path, self.main, self.total, self.writers = path, main, total, writers
        self.terminal = main and sys.stderr is not None and sys.stderr.isatty()
        self.bar = console.Bar(
            total=total, initial=start, unit="step", disable=not self.terminal
        )
        if main and path.exists():
            _prepare(path, start)
        self.first, self.before = start, _last_seconds(path) if start else 0.0
        self.began = time.monotonic()

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        self.bar.update(step - self.bar.n)

    def record(self, step: int, values: Mapping[str, Any], *, kind: str) -> None:
        """Appends one JSON line to the file, and prints the values."""
        if not self.main:
            return
        passed = time.monotonic() - self.began
        seconds = round(self.before + passed, 3)  # including the runs before a resume
        row = {"step": step, "kind": kind, "seconds": seconds, **values}
        _append(self.path, json.dumps(row) + "\n")
        for writer in self.writers:
            writer.write(step, {f"{kind}/{name}": v for name, v in values.items()})
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        done = max(1, step - self.first)
        left = passed / done * (self.total - step)
        self.say(
            f"{kind} {step}/{self.total}  {shown}  [{passed:.0f}s, {left:.0f}s left]"
        )

    def say(self, line: str) -> None:
        """Prints one line, above the bar if there is one."""
        if not self.main:
            return
        if self.terminal:
            self.bar.say(line)
        else:
            console.say(line)

    def close(self) -> None:
        """Closes the bar and the writers."""
        self.bar.close()
        for writer in self.writers:
            writer.close()


def _last_seconds(path: Any) -> float:
    rows = _rows(path) if path.exists() else []
    return rows[-1]["seconds"] if rows else 0.0


def _prepare(path: Any, start: int) -> None:
    """Moves the rows of an earlier start away; ends a line that a kill cut short."""
    if not start:
        _append(path.with_name("metrics_before.jsonl"), path.read_text("utf-8"))
        path.unlink()
    elif not path.read_bytes().endswith(b"\n"):
        _append(path, "\n")


def _append(path: Any, text: str) -> None:
    """Appends to a file; files in a bucket cannot grow, so they are rewritten."""
    if isinstance(path, Path):
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    else:
        before = path.read_text("utf-8") if path.exists() else ""
        path.write_text(before + text, "utf-8")


def _rows(path: Any) -> list[dict]:
    """Returns all rows except those that a kill cut short."""
    rows = []
    for line in path.read_bytes().decode(errors="replace").split("\n"):
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def read(path: Any, kind: str) -> list[dict]:
    """Returns the rows of one kind; if a resume recorded a step again, the last one."""
    return list({r["step"]: r for r in _rows(path) if r["kind"] == kind}.values())
