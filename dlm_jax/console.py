# SPDX-License-Identifier: Apache-2.0
"""Lines and progress bars for the terminal, which may not know every character of a text."""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from tqdm import tqdm

from dlm_jax.errors import UserError

Item = TypeVar("Item")


class Bar(tqdm):
    """A progress bar that is tqdm's without what outlives it.

    tqdm's own lock fixes the process's start method of multiprocessing, and its monitor
    is a thread.
    """

    _lock: ClassVar = threading.RLock()
    monitor_interval = 0

    def __init__(self, *args: Any, **options: Any):
        if sys.stderr is None:  # closed, as of a daemon
            options["disable"] = True
        super().__init__(*args, miniters=1, **options)

    def say(self, line: str) -> None:
        """Prints a line above the bar, as `say` does."""
        with contextlib.suppress(BrokenPipeError):
            self.write(printable(line))


def progress(items: Sequence[Item], what: str) -> Iterable[Item]:
    """Returns items, with a bar named `what` on a terminal that goes when they end."""
    return Bar(items, what, disable=None, leave=False)


def printable(line: str) -> str:
    r"""Returns a line with escapes such as \u9f8d for what standard output cannot encode."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)


def say(line: object) -> None:
    """Prints a line, whatever its characters, also if nobody reads on, as after `| head`."""
    with contextlib.suppress(BrokenPipeError):
        print(printable(str(line)), flush=True)


def one_line(text: str) -> str:
    r"""Returns a text on one line of a file: its line breaks become \n and \r."""
    return re.sub(r"[\n\r]", lambda found: repr(found[0])[1:-1], text)


def check_new(path: str) -> None:
    """Raises UserError unless a file can be made there; call it before the work, too."""
    place = Path(path)
    if place.exists():
        raise UserError(f"{path} exists: remove it, or name another file")
    if not (place.parent.is_dir() and os.access(place.parent, os.W_OK)):
        raise UserError(
            f"{path}: {place.parent} is no folder that can be written to; name another file"
        )


def write_lines(texts: Iterable[str], path: str) -> None:
    """Prints texts, a line each; with a path, writes them to a new file instead.

    Raises UserError as `check_new`.
    """
    lines = map(one_line, texts)
    if not path:
        for line in lines:
            say(line)
        return
    check_new(path)
    with Path(path).open("x", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    say(path)
