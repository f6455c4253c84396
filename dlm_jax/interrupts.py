# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C of the command: one line and status 130, whenever it is pressed.

Python raises KeyboardInterrupt wherever the process is. Packages turn it into other
errors while they are imported, compilations delay it, and callbacks of the garbage
collector, such as JAX's, swallow it.
"""

import math
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

INTERRUPTED = 130
ONE_PRESS = 0.5  # seconds in which several interrupts are one press of Ctrl-C
AGAIN = 0.2  # seconds after which one that was swallowed is raised again
SWALLOWED = 0  # no signal has this number
_writer: socket.socket | None = None  # of the numbers of signals


def end_at_first() -> None:
    """Makes Ctrl-C end the process at once, until `raise_at_first`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: Any) -> NoReturn:
    os.write(2, b"interrupted\n")  # print may be what it interrupts
    os._exit(INTERRUPTED)


def raise_at_first() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt again, as what has begun is to be ended."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_at_second() -> None:
    """Ends the process at a second Ctrl-C, even during a compilation.

    Python's own handlers wait for that. One key press may arrive twice, from the
    terminal and from a program in between: both count as one.
    """
    global _writer
    reader, _writer = socket.socketpair()
    _writer.setblocking(False)
    signal.set_wakeup_fd(_writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def _watch(reader: socket.socket) -> None:
    first, own, main = math.inf, False, threading.main_thread().ident
    while signals := reader.recv(64):
        for number in signals:
            if number == SWALLOWED and main is not None:
                time.sleep(AGAIN)
                own = True
                signal.pthread_kill(main, signal.SIGINT)
            elif number == signal.SIGINT and own:
                own = False
            elif number == signal.SIGINT:
                first = min(first, time.monotonic())
                if time.monotonic() > first + ONE_PRESS:
                    os._exit(INTERRUPTED)


def raise_again() -> None:
    """Raises an interrupt that a callback has swallowed, outside of the callback."""
    if _writer is not None:
        _writer.send(bytes([SWALLOWED]))


def end(error: KeyboardInterrupt) -> NoReturn:
    """Prints one line; ends at once unless the run has ended in order, with a line."""
    print(str(error) or "interrupted", file=sys.stderr, flush=True)
    if str(error):
        sys.exit(INTERRUPTED)
    drop_unread_output()
    os._exit(INTERRUPTED)


def drop_unread_output() -> None:
    """Drops what a reader of the output that has ended, such as head, left unread."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:  # Python itself would report it and exit with status 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
