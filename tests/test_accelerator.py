# SPDX-License-Identifier: Apache-2.0
"""The accelerator benchmark: its rehearsal, what it refuses, and that wrong is wrong."""

import contextlib
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import wait_until

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import accelerator
from lib import alternate
from stages import Job, Wrong, machine, right

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "benchmarks" / "accelerator.py")


def command(*arguments, seconds=120):
    """The benchmark as a user starts it, where there is no accelerator."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        timeout=seconds,
        env=env,
    )


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """Every stage runs, and the model that it leaves is one that loads."""
    out = tmp_path / "out"
    done = command("--out", out, "--rehearse", seconds=1200)
    assert done.returncode == 0, done.stdout + (out / "log.txt").read_text(
        encoding="utf-8"
    )
    records = {
        name: json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        for name in STAGES
    }
    assert records["machine"]["copy, GB/s"] > 0
    assert len(records["right"]["checks"]) == 15
    rows = records["speed"]["rows"].values()
    assert len(rows) == 8
    assert all(row["contenders"]["ours"]["median"] > 0 for row in rows)
    learned = records["learn"]
    assert len(learned["samples"]) == 64
    assert learned["control: length"]["success"]["exact length"][0] == 1
    assert learned["bound"]["nats/token"][0] > 0
    assert "nats per token" in done.stdout
    packed = b"".join((out / name).read_bytes() for name in learned["model"])
    (tmp_path / "model.tar.xz").write_bytes(packed)
    with tarfile.open(tmp_path / "model.tar.xz") as file:
        file.extractall(tmp_path, filter="data")
    import dlm_jax

    lm = dlm_jax.load(tmp_path / "model")
    assert lm.sample(4, seed=0, batch=64) == learned["samples"][:4]
    again = command("--out", out, "--rehearse")
    assert again.returncode == 2
    assert "holds results of machine, right, speed, learn" in again.stderr


STAGES = ("machine", "right", "speed", "learn")


def test_what_a_user_gets_wrong(tmp_path):
    """One line that names the remedy, and status 2."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    for flags, says in {
        ("--stages", "machine"): "no accelerator",
        ("--data", str(tmp_path)): "no src1_train.txt there",
        ("--minutes", "-1"): "give a number of minutes",
        ("--minutes", "nan"): "give a number of minutes",
        ("--rehearse", "--out", str(tmp_path / "file")): "choose another folder",
    }.items():
        done = command("--out", tmp_path / "out", *flags)
        assert done.returncode == 2, flags
        assert says in done.stderr, flags
        assert len(done.stderr.splitlines()) == 1, flags
    assert "--rehearse" in command("--out", tmp_path / "o", "--stages", "right").stderr


def states_of(monkeypatch, tmp_path, capsys, outcomes, **flags):
    """What main prints and returns when stages end so."""
    started = []

    def start(stage, args, seconds, cache):
        started.append(stage)
        return {"seconds": 1.0, "wrong": False, "error": "", **outcomes.get(stage, {})}

    monkeypatch.setattr(accelerator, "start", start)
    given = {"out": str(tmp_path), "stages": list(STAGES), "minutes": 9.0}
    args = SimpleNamespace(**given | {"rehearse": False} | flags)
    monkeypatch.setattr(accelerator, "arguments", lambda: args)
    with pytest.raises(SystemExit) as end:
        accelerator.main()
    return started, end.value.code, capsys.readouterr().out


def test_a_failed_stage_is_named_and_the_others_run(monkeypatch, tmp_path, capsys):
    failed = {"right": {"error": "ValueError: no"}}
    found = states_of(monkeypatch, tmp_path, capsys, failed)
    assert found[0] == list(STAGES)
    assert found[1] == 1
    assert "right: ValueError: no, 1 s" in found[2]


def test_a_wrong_result_ends_the_run(monkeypatch, tmp_path, capsys):
    wrong = {"right": {"error": "forward: error 0.3, allowed 0.05", "wrong": True}}
    started, status, text = states_of(monkeypatch, tmp_path, capsys, wrong)
    assert started == ["machine", "right"]
    assert status == 1
    assert "forward: error 0.3, allowed 0.05" in text


def test_what_no_longer_fits_is_skipped(monkeypatch, tmp_path, capsys):
    started, status, text = states_of(monkeypatch, tmp_path, capsys, {}, minutes=1.1)
    assert started == ["machine", "right", "speed"]
    assert status == 0
    assert "learn: skipped: " in text


def test_a_stage_reports_its_error(monkeypatch, tmp_path):
    def broken(job):
        job.report({"half": 1})
        raise ValueError("the first line\nand another")

    monkeypatch.setattr(machine, "run", broken)
    with pytest.raises(ValueError, match="the first line"):
        accelerator.inside("machine", str(tmp_path), "5", "")
    assert json.loads((tmp_path / "machine.json").read_text(encoding="utf-8")) == {
        "half": 1
    }
    error = (tmp_path / "machine.error").read_text(encoding="utf-8")
    assert error == "ValueError: the first line"


def test_a_stage_that_hangs_is_ended_with_its_children(monkeypatch, tmp_path):
    program = (
        "import subprocess, sys, time; open(sys.argv[3] + '/pid', 'w').write("
        "str(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']).pid"
        ")); time.sleep(99)"
    )
    (tmp_path / "hang.py").write_text(program, encoding="utf-8")
    monkeypatch.setattr(accelerator, "__file__", str(tmp_path / "hang.py"))
    args = SimpleNamespace(out=str(tmp_path), data="", rehearse=True, profile=False)
    state = accelerator.start("machine", args, -3.0, str(tmp_path))  # 2 s in all
    assert state["error"].startswith("stopped after")
    status = Path("/proc", (tmp_path / "pid").read_text(encoding="utf-8"), "stat")
    for _ in range(50):  # whoever adopts it may take a moment to bury it
        if not status.exists() or status.read_text(encoding="utf-8").split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("its child lives on")


def test_a_terminated_run_leaves_no_process(tmp_path):
    out = tmp_path / "out"
    flags = ["--out", str(out), "--rehearse", "--stages", "right"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    running = subprocess.Popen([sys.executable, SCRIPT, *flags], env=env)
    wait_until(lambda: processes_of(out) >= 2, "a stage of its own")
    running.terminate()
    assert running.wait(60) == 143
    wait_until(lambda: not processes_of(out), "all of them are gone")


def processes_of(out):
    """How many processes name this folder."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found += str(out).encode() in path.read_bytes()
    return found


def test_a_wrong_number_is_found():
    """Against a reference: other numbers, NaN, another sign, words that differ."""
    name, words = (
        "forward, adaln/float32",
        "20 steps with clamp, other words, adaln/float32",
    )
    true = {name: np.arange(8.0), words: np.ones(100)}
    assert all(c.holds for c in right.compare(dict(true), true).values())
    for wrong in (1.01 * true[name], np.full(8, np.nan), -true[name]):
        assert not right.compare({name: wrong}, true)[name].holds
    other = true[words].copy()
    other[:4] += 1
    assert right.compare({words: other}, true)[words].error == 0.04
    other[4:6] = np.nan
    assert not right.compare({words: other}, true)[words].holds
    low = right.compare({"forward, adaln/bfloat16": 1.01 * true[name]}, true)
    assert low["forward, adaln/bfloat16"].holds


def test_wrong_results_stop_the_stage(monkeypatch, tmp_path):
    monkeypatch.setattr(
        right,
        "compute",
        lambda **options: {"forward, adaln/float32": np.full(3, np.nan)},
    )
    monkeypatch.setattr(right, "compare", lambda found, reference: right_checks())
    job = Job(tmp_path / "right.json", 60.0, time.monotonic(), rehearse=True)
    (tmp_path / "reference.py").write_text(
        "import sys, numpy; numpy.savez(sys.argv[1], a=numpy.ones(1))", encoding="utf-8"
    )
    monkeypatch.setattr(right, "__file__", str(tmp_path / "reference.py"))
    with pytest.raises(Wrong, match=r"forward: error 0.3, allowed 0.05"):
        right.run(job)
    checks = json.loads((tmp_path / "right.json").read_text(encoding="utf-8"))["checks"]
    assert checks["forward"] == {"error": 0.3, "limit": 0.05, "holds": False}


def right_checks():
    return {"forward": right.Check(0.3, 0.05)}


CONTENDER = """
import sys
sys.path.insert(0, {folder!r})
from lib import alternate

def make(case, variant):
    if variant == "memory":
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
    if variant == "broken":
        raise ValueError("no such thing")
    if variant == "harmless":
        print("ran out of memory, but this is no failure", file=sys.stderr)
        raise ValueError("another")
    if variant == "slow":
        import time
        time.sleep(60)
    return lambda: None

alternate.serve(make)
"""


@pytest.mark.slow
def test_a_contender_that_fails_has_a_row(tmp_path):
    """Out of memory, an error, one that never gets ready: the others are measured."""
    script = tmp_path / "contender.py"
    script.write_text(
        CONTENDER.format(folder=str(ROOT / "benchmarks")), encoding="utf-8"
    )
    case = alternate.Case("configs/smoke.py")

    def maker(variant, seconds=60):
        return lambda: alternate.Contender(str(script), case, variant, seconds)

    makers = {"slow": maker("slow", 25), "ours": maker("ours", 20)}  # by its own clock
    makers |= {name: maker(name) for name in ("memory", "broken", "harmless")}
    rows = alternate.race([makers], 2, 0.001)
    assert list(rows) == ["slow", "ours", "memory", "broken", "harmless"]
    assert rows["harmless"] == {"error": "ValueError: another (status 1)"}
    assert len(rows["ours"]["all"]) == 2
    assert rows["memory"] == {"error": "out of memory"}
    assert rows["broken"] == {"error": "ValueError: no such thing (status 1)"}
    assert rows["slow"] == {"error": "not done after 25 s"}
    with pytest.raises(alternate.Ended, match="broken: ValueError: no such thing"):
        alternate.alternate({"broken": maker("broken")}, 1)
