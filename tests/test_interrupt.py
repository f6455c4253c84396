# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C saves and ends with one line, as SIGTERM does; a second one ends at once."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import wait_until
from test_checkpoint import ROOT, _command, _config, _same_bits, _trainer, texts

from dlm_jax import interrupts, main
from dlm_jax.errors import PreemptedError
from dlm_jax.runtime import checkpoint, hosts
from dlm_jax.training import loop
from dlm_jax.training.trainer import Trainer

__all__ = ["texts"]  # a fixture
SIX = {"train__total_steps": 6, "optim__decay": "constant"}
STOPS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: PreemptedError}


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_is_noticed_and_its_handler_given_back(number):
    before = signal.getsignal(number)
    asked = hosts.Preemption()
    assert not asked(1)
    os.kill(os.getpid(), number)
    assert asked(2)
    assert asked.interrupted == (number == signal.SIGINT)
    asked.close()
    assert signal.getsignal(number) is before


def test_a_second_interrupt_is_raised():
    asked = hosts.Preemption()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        asked.close()


def test_an_interrupt_that_is_ignored_stays_ignored():
    """As of a program that a shell started in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        asked = hosts.Preemption()
        os.kill(os.getpid(), signal.SIGINT)
        assert not asked(1)
        asked.close()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", STOPS)
def test_a_run_that_is_stopped_is_saved_and_resumes(
    number, texts, tmp_path, monkeypatch
):
    """The line says where; the bits are those of a run that was not stopped."""
    config = _config(texts, **SIX)
    loop.train(config, str(tmp_path / "whole"))

    class Stopped(Trainer):
        def batch(self, step):
            if step == 4:
                os.kill(os.getpid(), number)
            return super().batch(step)

    monkeypatch.setattr(loop, "Trainer", Stopped)
    with pytest.raises(STOPS[number]) as caught:
        loop.train(config, str(tmp_path / "run"))
    monkeypatch.undo()
    (step,) = checkpoint.all_steps(tmp_path / "run")
    assert 0 < step < 6
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert f"stopped by {name} at step {step} of 6, which is saved" in str(caught.value)
    assert "rerun the same command" in str(caught.value)
    assert not (tmp_path / "run" / "owner.json").exists()
    loop.train(config, str(tmp_path / "run"))
    _same_bits(*(_trainer(config, tmp_path / w).state for w in ("whole", "run")))


# --- the command


def _start(texts, workdir, **changes):
    changes = {"train__total_steps": 10**6, "train__log_steps": 1} | changes
    kinds = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
        "encoding": "utf-8",
    }
    command = _command(texts, workdir, **changes)
    return subprocess.Popen(command, cwd=ROOT, preexec_fn=_listen, **kinds)


def _listen():
    """What a terminal gives its programs, whatever these tests were started by."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _trains(workdir):
    path = workdir / "metrics.jsonl"
    wait_until(lambda: path.exists() and path.stat().st_size, "a step", seconds=400)


@pytest.mark.slow
def test_ctrl_c_saves_and_exits_with_130(texts, tmp_path):
    with _start(texts, tmp_path / "run") as process:
        try:
            _trains(tmp_path / "run")
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGINT)  # one press may arrive twice
            stderr = process.communicate(timeout=240)[1]
        finally:
            process.kill()
    assert process.returncode == interrupts.INTERRUPTED == 130
    (step,) = checkpoint.all_steps(tmp_path / "run")
    assert stderr.startswith(f"stopped by Ctrl-C at step {step} of")
    assert stderr.count("\n") == 1


PROGRAM = """
import gc, hashlib, time
from dlm_jax import main
def busy(*args):
    print("ready", flush=True)
    {}
main.MODES = dict.fromkeys(main.MODES, busy)
main.command()
"""
# a callback of the garbage collector, such as JAX's, swallows every error; native code
# never comes back to Python, like a compilation
BUSY = {
    "Python": "time.sleep(600)",
    "a callback": "gc.callbacks.append(lambda *_: gc.callbacks.clear() or time.sleep(5)); "
    "gc.collect(); time.sleep(600)",
    "native code": "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",
}


def _press(what, mode, presses):
    """(status, stderr) of the command in a mode, after some presses of Ctrl-C."""
    command = [sys.executable, "-c", PROGRAM.format(BUSY[what])]
    command += [f"--mode={mode}", "--workdir=nowhere", "--config=smoke"]
    kinds = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    with subprocess.Popen(command, preexec_fn=_listen, **kinds) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            for press in range(presses):
                time.sleep(2 * interrupts.ONE_PRESS if press else 0)
                process.send_signal(signal.SIGINT)
            stderr = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    return process.returncode, stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", main.MODES)
def test_ctrl_c_is_one_line_in_every_mode(mode):
    assert _press("Python", mode, 1) == (130, "interrupted\n")


@pytest.mark.slow
def test_ctrl_c_in_a_callback_is_not_lost():
    """A training went on after one press in three."""
    assert _press("a callback", "sample", 1) == (130, "interrupted\n")


EARLY = """
import time
from dlm_jax import main
def slow(argv):
    print("ready", flush=True)
    try:
        time.sleep(600)
    except BaseException as error:
        raise ImportError("as numpy does") from error
main.parse_flags = slow
main.command()
"""


@pytest.mark.slow
def test_ctrl_c_during_imports_is_one_line(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PROGRAM", EARLY)
    assert _press("Python", "train", 1) == (130, "interrupted\n")


FIRST_IMPORT = """
import time
print("ready", flush=True)
try:
    time.sleep(600)
except BaseException as error:
    raise ImportError("as numpy does") from error
"""


@pytest.mark.parametrize("module", ["dlm_jax", "dlm_jax.main"])
def test_ctrl_c_during_the_first_imports_is_one_line(module, tmp_path):
    (tmp_path / "absl.py").write_text(FIRST_IMPORT, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with subprocess.Popen(
        [sys.executable, "-m", module],
        env=environment,
        preexec_fn=_listen,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            stderr = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert (process.returncode, stderr) == (130, "interrupted\n")


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once():
    assert _press("native code", "train", 2) == (130, "")
