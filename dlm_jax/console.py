# SPDX-License-Identifier: Apache-2.0
"""Lines and progress bars for the terminal, which may not know every character of a text."""

import re
import sys
import threading
from typing import Any, ClassVar

from tqdm import tqdm


class Bar(tqdm):
    """A progress bar that is tqdm's without what outlives it.

    tqdm's own lock fixes the process's start method of multiprocessing, and its monitor
    is a thread.
    """

    _lock: ClassVar = threading.RLock()
    monitor_interval = 0

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, miniters=1, **options)


def printable(line: str) -> str:
    r"""Returns a line with escapes such as \u9f8d for what standard output cannot encode."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)


def say(line: object) -> None:
    """Prints a line, whatever its characters."""
    print(printable(str(line)), flush=True)


def one_line(text: str) -> str:
    r"""Returns a text on one line of a file: its line breaks become \n and \r."""
    return re.sub(r"[\n\r]", lambda found: repr(found[0])[1:-1], text)
