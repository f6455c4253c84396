# SPDX-License-Identifier: Apache-2.0
"""The stages of `accelerator.py`: each a module with run(job) and table(record)."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple


class Wrong(Exception):
    """A result that differs from the reference: nothing after it would mean anything."""


class Job(NamedTuple):
    """What a stage is given: where its JSON goes, and its time box.

    began: time.monotonic() of its start; data: E2E's folder; rehearse: tiny shapes on
    the CPU.
    """

    path: Path
    seconds: float
    began: float
    data: str = ""
    rehearse: bool = False
    profile: bool = False

    def left(self) -> float:
        """Returns the seconds left in the box."""
        return self.seconds - (time.monotonic() - self.began)

    def report(self, record: dict[str, Any]) -> None:
        """Writes what is known so far; the file is always whole."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1, default=float) + "\n")
        part.replace(self.path)


def together(
    work: dict[str, Callable[[], Any]],
    threads: int = 8,
    *,
    done: Callable[[str, Any], None] = lambda name, result: None,
) -> dict[str, Any]:
    """Runs each piece in a thread, as compilers use one core each; name -> result.

    done(name, result) is called as each piece is there. Raises the first error when all
    others are done.
    """
    results: dict[str, Any] = {}
    errors: list[BaseException] = []
    with ThreadPoolExecutor(threads) as pool:
        names = {pool.submit(piece): name for name, piece in work.items()}
        for future in as_completed(names):
            if error := future.exception():
                errors.append(error)
                continue
            results[names[future]] = future.result()
            done(names[future], future.result())
    if errors:
        raise errors[0]
    return results
