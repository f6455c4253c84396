# SPDX-License-Identifier: Apache-2.0
"""One owner per run directory: a second is refused, a dead one is forgotten."""

import json
import multiprocessing
import os
import signal
import socket
import threading
import time

import pytest
from conftest import wait_until
from test_checkpoint import _config, texts

import dlm_jax
from dlm_jax.errors import UserError
from dlm_jax.runtime import checkpoint, logging, ownership
from dlm_jax.training import loop
from dlm_jax.training.trainer import Trainer

__all__ = ["texts"]  # a fixture


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ownership, "BEAT", 0.05)
    monkeypatch.setattr(ownership, "PATIENCE", 1.0)
    monkeypatch.setattr(ownership, "SETTLE", 0.05)


def _no_locks(*args):
    raise OSError("Function not implemented")


DISKS = {
    "a disk": lambda patch: None,
    "a disk without locks": lambda patch: patch.setattr(
        ownership.fcntl, "flock", _no_locks
    ),
    "Windows": lambda patch: patch.setattr(ownership, "fcntl", None),
}


@pytest.fixture(params=DISKS.values(), ids=DISKS)
def disk(request, monkeypatch):
    request.param(monkeypatch)


@pytest.fixture
def elsewhere(monkeypatch):
    """another(): from then on this is another machine that sees no locks of this one."""

    def another():
        monkeypatch.setattr(ownership, "_kernel", lambda: "another")
        if ownership.fcntl is not None:
            monkeypatch.setattr(ownership.fcntl, "flock", lambda *args: None)

    return another


def _refused(workdir):
    with pytest.raises(UserError) as caught, ownership.claim(workdir):
        pass
    line = str(caught.value)
    assert f"in use by process {os.getpid()} on {socket.gethostname()}" in line
    assert "\n" not in line


def test_a_second_start_is_refused_and_the_first_goes_on(disk, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "run")
    with ownership.claim(tmp_path / "run") as check:
        for workdir in (tmp_path / "run", str(tmp_path / "run" / ".." / "run"), link):
            _refused(workdir)
        check()
        assert json.loads(
            (tmp_path / "run" / "owner.json").read_text(encoding="utf-8")
        )["pid"]
    assert not (tmp_path / "run").exists()  # nothing was written to it
    with ownership.claim(tmp_path / "run") as check:
        check()


def test_a_start_elsewhere_is_refused_and_the_first_goes_on(elsewhere, disk, tmp_path):
    with ownership.claim(tmp_path / "run") as check:
        elsewhere()
        _refused(tmp_path / "run")
        check()


def _hold(workdir, ready, locks):
    ownership.BEAT, ownership.SETTLE = 0.05, 0.05
    if not locks:
        ownership.fcntl = None
    with ownership.claim(workdir):
        ready.set()
        time.sleep(600)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["here", "elsewhere", "without locks"])
def test_an_owner_killed_is_forgotten(place, elsewhere, tmp_path, monkeypatch):
    """At once on its machine, after a while of silence from another."""
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    owner = spawn.Process(
        target=_hold, args=(tmp_path, ready, place != "without locks"), daemon=True
    )
    owner.start()
    assert ready.wait(400)
    if place == "without locks":
        monkeypatch.setattr(ownership, "fcntl", None)
    with pytest.raises(UserError, match=rf"in use by process {owner.pid} on"):
        ownership.claim(tmp_path).__enter__()
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    assert (tmp_path / "owner.json").exists()
    if place == "elsewhere":
        elsewhere()
    began = time.monotonic()
    with ownership.claim(tmp_path) as check:
        check()
    seconds = time.monotonic() - began
    assert (seconds >= ownership.PATIENCE) == (place != "here")
    assert not (tmp_path / "owner.json").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff", b"{}"])
def test_any_file_of_a_dead_owner_is_replaced(content, tmp_path):
    (tmp_path / "owner.json").write_bytes(content)
    with ownership.claim(tmp_path) as check:
        check()


def test_an_owner_that_was_suspended_notices_its_successor(disk, tmp_path):
    """As after the sleep of a machine, while which another took over."""
    with ownership.claim(tmp_path) as check:
        record = json.loads((tmp_path / "owner.json").read_text(encoding="utf-8"))
        record |= {"token": "another", "pid": 77, "host": "other"}
        (tmp_path / "new").write_text(json.dumps(record), encoding="utf-8")
        (tmp_path / "new").replace(tmp_path / "owner.json")
        with pytest.raises(UserError, match=r"was taken by process 77 on other"):
            check()
    assert (
        json.loads((tmp_path / "owner.json").read_text(encoding="utf-8")) == record
    )  # not its own


def test_of_many_threads_one_owns(tmp_path):
    owned, refused, done = [], [], threading.Event()

    def start():
        try:
            with ownership.claim(tmp_path / "run"):
                owned.append(1)
                done.wait(60)
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(refused) == 7, "seven are refused")
    done.set()
    for thread in threads:
        thread.join()
    assert len(owned) == 1


@pytest.mark.parametrize("begun", [False, True], ids=["fresh", "resumed"])
def test_the_same_training_started_twice(begun, texts, tmp_path, monkeypatch):
    """The first ends as if alone, with all its metrics; reading is allowed meanwhile."""
    options = {"optim__decay": "constant", "train__log_steps": 1}
    start, config = tmp_path / "run", _config(texts, train__total_steps=6, **options)
    if begun:
        loop.train(_config(texts, train__total_steps=2, **options), str(start))
    refused, metrics = [], start / "metrics.jsonl"

    class Twice(Trainer):
        def batch(self, step):
            if step == 4:
                with pytest.raises(UserError, match="in use by process") as caught:
                    loop.train(config, str(start), allow_fallback=True)
                refused.append(caught.value)
                if begun:
                    assert dlm_jax.load(start).step == 2
            return super().batch(step)

    monkeypatch.setattr(loop, "Trainer", Twice)
    loop.train(config, str(start))
    assert len(refused) == 1
    assert checkpoint.all_steps(start)[-1] == 6
    assert [row["step"] for row in logging.read(metrics, "train")] == [*range(1, 7)]
    assert not (start / "metrics_before.jsonl").exists()
    assert not (start / "owner.json").exists()
