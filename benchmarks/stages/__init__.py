# SPDX-License-Identifier: Apache-2.0
"""The stages of `accelerator.py`: each a module with run(job) and table(record)."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple


class Wrong(Exception):
    """A result differs from the reference, so later stages would mean nothing."""


class Job(NamedTuple):
    """The input of a stage: the path of its JSON file and its time limit in seconds.

    began: time.monotonic() at its start. data: the folder of E2E. rehearse: tiny shapes
    on the CPU. profile: save the trace of a training step.
    """

    path: Path
    seconds: float
    began: float
    data: str = ""
    rehearse: bool = False
    profile: bool = False

    def left(self) -> float:
        """Returns the seconds left of the time limit."""
        return self.seconds - (time.monotonic() - self.began)

    def report(self, record: dict[str, Any]) -> None:
        """Replaces the stage's JSON file by this record, atomically."""
        part = self.path.with_suffix(".part")
        part.write_text(
            json.dumps(record, indent=1, default=float) + "\n", encoding="utf-8"
        )
        part.replace(self.path)


def together(
    work: dict[str, Callable[[], Any]],
    threads: int = 8,
    *,
    done: Callable[[str, Any], None] = lambda name, result: None,
) -> dict[str, Any]:
    """Runs each function in a thread; returns {name: result}.

    Compilation uses one core per program, so threads compile in parallel. done(name,
    result) is called after each function. Raises the first error when all have ended.
    """
    results: dict[str, Any] = {}
    errors: list[BaseException] = []
    with ThreadPoolExecutor(threads) as pool:
        names = {pool.submit(function): name for name, function in work.items()}
        for future in as_completed(names):
            if error := future.exception():
                errors.append(error)
                continue
            results[names[future]] = future.result()
            done(names[future], future.result())
    if errors:
        raise errors[0]
    return results
