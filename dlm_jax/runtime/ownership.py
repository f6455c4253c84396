# SPDX-License-Identifier: Apache-2.0
"""One owner of a run directory: the process named in <workdir>/owner.json.

On one machine the kernel's lock on that file decides, which ends with its process, also
after kill -9. Not every shared disk shows such a lock to other machines, and buckets
have none. So the owner also rewrites the file every BEAT seconds, and a start elsewhere
watches it: an owner that is silent for PATIENCE seconds is dead. Clocks do not matter.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dlm_jax import console
from dlm_jax.errors import UserError
from dlm_jax.runtime.checkpoint import PathLike, resolve_workdir

fcntl: Any = None
with contextlib.suppress(ImportError):  # Windows has none: there beats alone decide
    import fcntl

NAME = "owner.json"
BEAT, PATIENCE = 5.0, 20.0  # seconds
SETTLE = 2.0  # seconds after which both of two simultaneous starts see the later one


@contextlib.contextmanager
def claim(workdir: PathLike) -> Iterator[Callable[[], None]]:
    """Owns a run directory for the length of a block; creates it if it is missing.

    Yields a function that raises UserError if another process took the directory, as
    may happen to one that was suspended. Raises UserError if a live process owns it.
    """
    with (
        _directory(workdir) as folder,
        contextlib.closing(_free_file(folder / NAME, workdir)) as file,
    ):
        with _writing(workdir):
            owner = _Owner(file)
        try:
            if not file.locked:
                time.sleep(SETTLE)
            owner.check(workdir)
            yield lambda: owner.check(workdir)
        finally:
            owner.close()


@contextlib.contextmanager
def _directory(workdir: PathLike) -> Iterator[Any]:
    """Yields the directory; one that was made for it and is left empty is removed."""
    folder, made = resolve_workdir(workdir), []
    if isinstance(folder, Path):
        made = [path for path in (folder, *folder.parents) if not path.exists()]
    with _writing(workdir):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def _writing(workdir: PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--workdir {workdir}: cannot write ({error.strerror}); choose another"
        ) from error


class _File:
    """owner.json. locked: by this process; busy: by another, as the kernel knows."""

    def __init__(self, path: Any):
        self.path, self.fd, self.locked, self.busy = path, None, False, False
        while isinstance(path, Path):
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._lock(self.fd)
            if not self.locked or self._is_in_place(self.fd):
                break
            self.close()  # its owner has just removed it: take the next one

    def _lock(self, fd: int) -> None:
        self.locked = self.busy = False
        try:
            if fcntl is not None:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.locked = True
        except BlockingIOError:
            self.busy = True
        except OSError:
            pass  # the file system has no locks

    def _is_in_place(self, fd: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(fd), os.stat(self.path))
        return False

    def read(self) -> bytes:
        """Returns the content; it opens the file anew, as network disks need."""
        with contextlib.suppress(OSError):
            return self.path.read_bytes()
        return b""

    def write(self, content: bytes) -> None:
        if self.fd is None:
            self.path.write_bytes(content)
            return
        os.pwrite(self.fd, content, 0)
        os.ftruncate(self.fd, len(content))
        os.fsync(self.fd)

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def _free_file(path: Any, workdir: PathLike) -> _File:
    """Returns the file of a directory that nobody owns. Raises UserError if one does."""
    while True:
        with _writing(workdir):
            file = _File(path)
        before = file.read()
        here = file.locked and _record(before).get("kernel") == _kernel()
        after = before
        if before and not here and not file.busy:
            after = _watch(file, before, workdir)
        if after == before and not file.busy:
            return file
        file.close()
        if file.busy or after:  # else its owner has just ended
            raise UserError(
                f"--workdir {workdir} is in use by {_describe(before)}: wait until it "
                "ends, stop it, or choose another --workdir"
            )


def _watch(file: _File, before: bytes, workdir: PathLike) -> bytes:
    """Returns the content as soon as it changes, or after PATIENCE seconds."""
    console.say(
        f"{workdir}: waiting {PATIENCE:.0f} s for a sign of life from its owner, "
        f"{_describe(before)}"
    )
    end, after = time.monotonic() + PATIENCE, before
    while after == before and time.monotonic() < end:
        time.sleep(PATIENCE / 20)
        after = file.read()
    return after


def _kernel() -> str:
    """Returns what tells running machines apart; containers of one share it."""
    with contextlib.suppress(OSError):  # the file exists on Linux only
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return socket.gethostname()


def _record(content: bytes) -> dict:
    with contextlib.suppress(ValueError):  # cut short, or not written yet
        record = json.loads(content)
        return record if isinstance(record, dict) else {}
    return {}


def _describe(content: bytes) -> str:
    owner = _record(content)
    if {"pid", "host", "since"} <= owner.keys():
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    return "another process"


class _Owner:
    """This process as the owner: writes its record, then a beat every BEAT seconds."""

    def __init__(self, file: _File):
        self.file, self.end = file, threading.Event()
        self.record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "kernel": _kernel(),
            "token": uuid.uuid4().hex,
            "beat": 0,
        }
        self._write()
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def _write(self) -> None:
        self.file.write(json.dumps(self.record).encode())

    def _beat(self) -> None:
        while not self.end.wait(BEAT):
            self.record["beat"] += 1
            with contextlib.suppress(OSError):  # the next beat may succeed
                if not self._other():
                    self._write()

    def _other(self) -> bytes:
        """Returns the record of another owner, or b""."""
        content = self.file.read()
        token = _record(content).get("token")
        return b"" if token in (None, self.record["token"]) else content

    def check(self, workdir: PathLike) -> None:
        """Raises UserError if another process owns the directory now."""
        if other := self._other():
            raise UserError(
                f"--workdir {workdir} was taken by {_describe(other)}, because this "
                "process gave no sign of life: stopped, nothing more is saved"
            )

    def close(self) -> None:
        self.end.set()
        self.thread.join()
        if not self._other():
            with contextlib.suppress(OSError):
                self.file.path.unlink()
