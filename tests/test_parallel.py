# SPDX-License-Identifier: Apache-2.0
"""Devices and hosts: however a run lies on them, it is the same run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import wait_until
from jax.sharding import PartitionSpec

from dlm_jax.configs import smoke
from dlm_jax.errors import UserError
from dlm_jax.runtime import checkpoint, hosts, logging, sharding
from dlm_jax.runtime.sharding import AXIS
from dlm_jax.training.trainer import Trainer, language_job

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
STARTED = []
HALF, STEPS = 3, 6
SMALL = {
    "data.source": "text",
    "data.length": 8,
    "model.layers": 1,
    "model.hidden_dim": 64,
    "model.mlp_dim": 128,
    "model.positions": 8,
    "train.batch": 16,
    "train.total_steps": STEPS,
    "train.ckpt_steps": HALF,
    "train.log_steps": 1,
    "train.valid_steps": HALF,
    "train.sample_steps": HALF,
    "sample.num_steps": 2,
    "loss.self_cond_prob": 1.0,
    "loss.conditioning_prob": 0.5,
    "optim.accumulate": 2,
    "optim.decay": "constant",
    "optim.warmup": 0,
    "optim.eps": 1e-3,  # else Adam turns rounding errors of tiny gradients into steps
}


def _config(folder, **changes):
    path = folder / "texts.txt"
    path.write_text(
        "".join(f"w{i % 5} and w{i % 3}\n" for i in range(32)), encoding="utf-8"
    )
    config = smoke.get_config()
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict({**SMALL, "data.path": str(path), **dotted})
    return config


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# The command in a namespace whose host name nobody resolves.
NAMELESS = """
import ctypes, socket, sys
if ctypes.CDLL(None).unshare(0x04000000):  # CLONE_NEWUTS
    sys.exit(77)
socket.sethostname("nowhere.invalid")
from dlm_jax import main
main.cli()
"""


def _start(
    config, workdir, processes=1, devices=1, mode="train", workdirs=(), nameless=()
):
    """The command on every host; workdirs: where they differ; nameless: by NAMELESS."""
    flat, base = (
        checkpoint.flatten(json.loads(cfg.to_json_best_effort()))
        for cfg in (config, smoke.get_config())
    )
    command = ["--config", "configs/smoke.py"]
    for name, value in flat.items():
        if value != base[name]:  # a flag that nothing reads is refused
            command.append(f"--config.{name}={value}")
    command += ["--mode", mode]
    if processes > 1:
        command += ["--num_processes", str(processes)]
        command += ["--coordinator", f"127.0.0.1:{_free_port()}"]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    kinds = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    own = [
        ["--process_id", str(i), "--workdir", str(workdir)] for i in range(processes)
    ]
    for last, folder in zip(own, workdirs, strict=False):
        last[-1] = str(folder)
    hosts = []
    for number, last in enumerate(own):
        program = ["-c", NAMELESS] if number in nameless else ["-m", "dlm_jax.main"]
        whole = [sys.executable, *program, *command, *last]
        hosts.append(subprocess.Popen(whole, cwd=ROOT, env=env, **kinds))
    STARTED.extend(hosts)
    return hosts


@pytest.fixture(autouse=True)
def no_host_outlives_its_test():
    yield
    for host in STARTED:
        host.kill()
        host.wait(timeout=60)
    STARTED.clear()


def _finish(hosts, status=0):
    """What each host printed, once all have ended with that status."""
    ends = [host.communicate(timeout=480) for host in hosts]
    for host, (_, stderr) in zip(hosts, ends, strict=True):
        assert host.returncode == status, stderr
    return [stdout for stdout, _ in ends]


# name: processes, devices of each, layout, begun by
LAYOUTS = {
    "one": (1, 1, "pmap", ""),
    "half": (2, 2, "pmap", ""),
    "then four hosts": (4, 1, "pmap", "half"),
    "then split over eight": (1, 8, "fsdp", "half"),
    "two hosts, split": (2, 2, "fsdp", ""),
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """(config, {layout: workdir}, {layout: what each host printed})."""
    folder = tmp_path_factory.mktemp("layouts")
    workdirs, printed = {name: folder / name for name in LAYOUTS}, {}
    for name, (processes, devices, mode, begun) in LAYOUTS.items():
        if begun:
            shutil.copytree(workdirs[begun], workdirs[name])
        total = HALF if name == "half" else STEPS
        config = _config(folder, parallel__mode=mode, train__total_steps=total)
        hosts = _start(config, workdirs[name], processes, devices)
        printed[name] = _finish(hosts)
    return _config(folder), workdirs, printed


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n not in ("one", "half")])
def test_devices_and_hosts_train_the_same_model(layout, layouts):
    """Also where a run of two hosts goes on with four, or with one and split."""
    config, workdirs, _ = layouts
    job = language_job(config)
    one, many = (Trainer(job, str(workdirs[n])).state for n in ("one", layout))
    assert int(many.step) == STEPS
    paths = jax.tree_util.tree_leaves_with_path(one)
    for (path, x), y in zip(paths, jax.tree.leaves(many), strict=True):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4, err_msg=where)
    for kind in ("train", "valid"):
        rows = [
            logging.read(workdirs[n] / "metrics.jsonl", kind) for n in ("one", layout)
        ]
        assert [row["step"] for row in rows[1]] == [row["step"] for row in rows[0]]
        np.testing.assert_allclose(
            *([row["loss"] for row in r] for r in rows), rtol=1e-4
        )


def test_all_hosts_name_their_devices_and_the_first_says_the_rest(layouts):
    _, workdirs, printed = layouts
    first, second = printed["half"]
    assert "process 0 of 2, 2 local of 4 devices" in first
    said = [line for line in second.splitlines() if "peer ranks" not in line]
    assert said == ["process 1 of 2, 2 local of 4 devices (cpu)"]
    lines = (
        (workdirs["half"] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    )
    steps = [(json.loads(line)["kind"], json.loads(line)["step"]) for line in lines]
    assert len(steps) == len(set(steps))
    assert (workdirs["half"] / "samples" / f"{HALF}.txt").is_file()


def test_hosts_share_the_sampling(layouts):
    """The texts of one host, and only the first prints them."""
    config, workdirs, _ = layouts
    config = config.copy_and_resolve_references()
    config.sample.n = 5
    config.train.total_steps = HALF  # what the run has
    one, two = (
        _finish(_start(config, workdirs["half"], hosts, devices, mode="sample"))
        for hosts, devices in ((1, 1), (2, 2))
    )
    assert len(one[0].splitlines()) == 5
    said = [line for line in two[0].splitlines() if "peer ranks" not in line]
    assert said == one[0].splitlines()
    assert [line for line in two[1].splitlines() if "peer ranks" not in line] == []


# --- hosts that end


def _wait(condition, hosts, seconds=120):
    def ended():
        return any(host.poll() is not None for host in hosts)

    wait_until(lambda: ended() or condition(), "what the test waits for", seconds)
    if ended():
        for host in hosts:
            host.kill()
        pytest.fail("".join(host.communicate(timeout=60)[1] for host in hosts))


def _saves(run):
    """Saves that are not complete."""
    folder = checkpoint.folder(run)
    found = folder.iterdir() if folder.is_dir() else ()
    return {p.name for p in found if "orbax-checkpoint-tmp" in p.name}


def test_a_lost_or_stopped_host_stops_all_and_nothing_is_lost(tmp_path):
    """kill -9 to either of two, in a save too; SIGTERM to one; then the very same bits."""
    never, total = 10**6, 240
    config = _config(
        tmp_path,
        train__total_steps=total,
        train__ckpt_steps=20,
        train__valid_steps=never,
        train__sample_steps=never,
    )
    _finish(_start(config, tmp_path / "undisturbed", 2))
    run = tmp_path / "run"
    before = -1
    for victim, in_save in ((1, False), (0, False), (1, True)):
        hosts, left = _start(config, run, 2), _saves(run)
        _wait(
            lambda at=before, old=left, new=in_save: (
                _saves(run) - old
                if new
                else (checkpoint.all_steps(run) or [-1])[-1] > at
            ),
            hosts,
        )
        hosts[victim].kill()
        began, other = time.monotonic(), hosts[1 - victim]
        _, said = other.communicate(timeout=120)
        assert time.monotonic() - began < 60
        assert other.returncode not in (0, 2), said
        signs = ("another host is lost", "heartbeat", "coordination")
        assert any(sign in said.lower() for sign in signs), said
        before = checkpoint.choose_step(run)
    hosts = _start(config, run, 2)
    _wait(lambda: checkpoint.choose_step(run) > before, hosts)
    hosts[1].send_signal(signal.SIGTERM)
    _finish(hosts, status=75)
    stopped = checkpoint.choose_step(run)
    assert before < stopped < total
    _finish(_start(config, run, 2))
    job = language_job(config)
    one, other = (Trainer(job, str(tmp_path / n)).state for n in ("undisturbed", "run"))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


def _both_say(what, erring, hosts):
    """Both end with status 2, which nothing starts again, and with the line of one."""
    for host in hosts:
        _, said = host.communicate(timeout=240)
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, said
        assert what in lines[0]
        by_other = "error: process " in lines[0]
        assert not by_other or host is not hosts[erring], said
        assert host.returncode == 2, said


@pytest.mark.parametrize("erring", [(0,), (1,), (0, 1)])
def test_the_mistake_of_a_host_ends_all(tmp_path, erring):
    """A file stands where its folder should; its name is no sign of a lost host."""
    folders = [tmp_path / "a", tmp_path / "b"]
    taken = tmp_path / "peer"
    taken.write_text("a file, not a folder", encoding="utf-8")
    for host in erring:
        folders[host] = taken
    _both_say("peer", erring[0], _start(_config(tmp_path), "", 2, workdirs=folders))


def test_hosts_with_a_folder_each_are_told(tmp_path):
    """A disk of one's own, empty or with another's steps, is no run's folder."""
    config, folders = _config(tmp_path), (tmp_path / "a", tmp_path / "b")
    for what in ("does not see what the first host wrote", "does not see step 2"):
        _both_say(what, 1, _start(config, "", 2, workdirs=folders))
        assert not checkpoint.all_steps(folders[1])
        one = _config(tmp_path, train__total_steps=2)
        _finish(_start(one, folders[0]))


@pytest.mark.parametrize("erring", [(1,), (0, 1)])
def test_a_host_name_that_does_not_resolve_ends_all(tmp_path, erring):
    """Gloo asks for the address of a host's own name; see /etc/hosts."""
    hosts = _start(_config(tmp_path), tmp_path / "run", 2, nameless=erring)
    wait_until(lambda: hosts[1].poll() is not None, "the end of the second host", 120)
    if hosts[1].returncode == 77:
        pytest.skip("this user may give no process a host name of its own")
    says = "host name nowhere.invalid does not resolve; add it to /etc/hosts"
    _both_say(says, erring[0], hosts)


# --- alone


def test_an_error_that_came_of_a_lost_host_says_so(monkeypatch):
    error = UserError("cannot be saved: make room")
    error.__cause__ = RuntimeError("Gloo all-reduce failed: peer closed\nand more")
    assert not hosts.host_loss_reason(error)  # with one host there is none to lose
    monkeypatch.setattr(hosts.distributed.global_state, "num_processes", 2)
    assert hosts.host_loss_reason(error) == "Gloo all-reduce failed: peer closed"
    assert not hosts.host_loss_reason(UserError("peers.txt does not exist"))
    assert not hosts.host_loss_reason(
        OSError(28, "No space left on device", "heartbeats.txt")
    )


def test_errors_are_handled_without_a_backend():
    """The error may be that none can be started."""
    program = (
        "import jax; from dlm_jax.runtime import hosts; "
        "jax.config.update('jax_platforms', 'none_such'); "
        "hosts.distributed.global_state.num_processes = 2; "
        "print(repr(hosts.host_loss_reason(RuntimeError('peer closed'))), flush=True); "
        "hosts._linger(); hosts.fail_all_hosts('')"
    )
    command = [sys.executable, "-c", program]
    kinds = {"capture_output": True, "encoding": "utf-8", "timeout": 120}
    done = subprocess.run(command, cwd=ROOT, **kinds)
    assert (done.returncode, done.stdout) == (2, "'peer closed'\n"), done.stderr


FAR = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))]  # of no machine
HERE = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]


@pytest.mark.parametrize(
    ("found", "says"),
    [([], "does not resolve"), (FAR, "is not an address of this"), (FAR + HERE, None)],
)
def test_a_host_is_to_be_found_by_its_name(found, says, monkeypatch):
    def look_up(name, *_, **__):
        if not found:
            raise socket.gaierror(-2, "Name or service not known")
        return found

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    if says is None:
        hosts._check_name("mine")
        return
    with pytest.raises(UserError, match=f"the host name mine {says}.*/etc/hosts"):
        hosts._check_name("mine")
    config = {"jax_platforms": "cuda", "jax_cpu_collectives_implementation": "gloo"}
    monkeypatch.setattr(jax, "config", SimpleNamespace(**config))
    hosts._check_name("mine")  # only CPUs are linked by it


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((64, 512), PartitionSpec(None, AXIS)),
        ((821, 16), PartitionSpec(None, AXIS)),
        ((821, 15), PartitionSpec()),
        ((64,), PartitionSpec()),
        ((8192,), PartitionSpec(AXIS)),
    ],
)
def test_the_longest_axis_that_divides_is_split(shape, spec):
    assert sharding.partition_spec(shape, 8) == spec


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "2"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ],
)
def test_clusters_are_known_by_what_they_set(env, found):
    assert hosts.in_cluster(env) == found


def test_sigterm_is_noticed_and_given_back():
    before = signal.getsignal(signal.SIGTERM)
    asked = hosts.Preemption()
    assert not asked(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked(2)
    asked.close()
    assert signal.getsignal(signal.SIGTERM) is before
