# SPDX-License-Identifier: Apache-2.0
"""Metrics: JSON lines on disk, a bar on a terminal, plain lines elsewhere."""

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Progress:
    """Shows and records a long run; quiet on all hosts but the first."""

    def __init__(self, path: Any, *, total: int, start: int, main: bool = True):
        self.path, self.main, self.total = path, main, total
        self.terminal = main and sys.stderr.isatty()
        self.bar = tqdm(
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
        """Appends one JSON line, and shows it."""
        if not self.main:
            return
        passed = time.monotonic() - self.began
        seconds = round(self.before + passed, 3)  # of the runs before this one too
        row = {"step": step, "kind": kind, "seconds": seconds, **values}
        _append(self.path, json.dumps(row) + "\n")
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        done = max(1, step - self.first)
        left = passed / done * (self.total - step)
        self.say(
            f"{kind} {step}/{self.total}  {shown}  [{passed:.0f}s, {left:.0f}s left]"
        )

    def say(self, line: str) -> None:
        """One line, above the bar where there is one."""
        if not self.main:
            return
        if self.terminal:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()


def _last_seconds(path: Any) -> float:
    rows = _rows(path) if path.exists() else []
    return rows[-1]["seconds"] if rows else 0.0


def _prepare(path: Any, start: int) -> None:
    """Sets another beginning's rows aside; ends a line that a kill cut short."""
    if not start:
        _append(path.with_name("metrics_before.jsonl"), path.read_text())
        path.unlink()
    elif not path.read_bytes().endswith(b"\n"):
        _append(path, "\n")


def _append(path: Any, text: str) -> None:
    """Adds to a file; one in a bucket, which cannot grow, is written anew."""
    if isinstance(path, Path):
        with path.open("a") as file:
            file.write(text)
    else:
        path.write_text((path.read_text() if path.exists() else "") + text)


def _rows(path: Any) -> list[dict]:
    """All rows but those that a kill cut short."""
    rows = []
    for line in path.read_bytes().decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def read(path: Any, kind: str) -> list[dict]:
    """The rows of one kind; of a step recorded twice, after a resume, the last."""
    return list({r["step"]: r for r in _rows(path) if r["kind"] == kind}.values())
