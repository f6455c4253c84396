# SPDX-License-Identifier: Apache-2.0
"""Launch scripts: what they would call, against a gcloud that only takes notes."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from conftest import wait_until

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
FAKE = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$CALLS"
echo >> "$CALLS"
case "$*" in
  *describe*) [ -f "$MADE" ] && echo ACTIVE || exit 1 ;;
  *" create "*) touch "$MADE" ;;
  *" delete "*) rm "$MADE" ;;
esac
"""


@pytest.fixture
def gcloud(tmp_path):
    """run(script, *arguments): (status, stdout, stderr, the calls of gcloud)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "gcloud").write_text(FAKE, encoding="utf-8")
    (folder / "gcloud").chmod(0o755)
    calls = tmp_path / "calls"
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls)}
    env |= {"MADE": str(tmp_path / "made"), "WAIT_SECONDS": "0"}

    def run(script, *arguments, **more):
        calls.write_text("", encoding="utf-8")
        command = ["bash", str(LAUNCH / script), *arguments]
        kinds = {"capture_output": True, "encoding": "utf-8", "timeout": 60}
        done = subprocess.run(command, env=env | more, cwd=tmp_path, **kinds)
        return (
            done.returncode,
            done.stdout,
            done.stderr,
            calls.read_text(encoding="utf-8").splitlines(),
        )

    return run


SCRIPTS = [*LAUNCH.glob("*.sh"), *ROOT.glob("tests/*.sh"), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(path):
    text = path.read_text(encoding="utf-8")
    sourced = text.startswith("# shellcheck shell=bash")
    assert sourced or text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text or ". " in text
    shellcheck = Path(sys.executable).parent / "shellcheck"  # of the extra `test`
    command = [str(shellcheck), "-x", path.name]
    kinds = {"capture_output": True, "encoding": "utf-8", "timeout": 60}
    done = subprocess.run(command, cwd=path.parent, **kinds)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "kind", "node"),
    [
        ("tpu_vm.sh", "compute tpus tpu-vm", ""),
        ("tpu_pod.sh", "compute tpus queued-resources", "--node-id=mine"),
    ],
)
def test_a_run_is_created_installed_started_and_followed(script, kind, node, gcloud):
    if shutil.which("git") is None:
        pytest.skip("git, which packs what is sent, is not installed")
    arguments = ("--config", "configs/e2e.py", "--workdir", "gs://b/a run")
    options = {"ZONE": "z", "SPOT": "1", "TYPE": "v5p-32"}
    status, _, stderr, calls = gcloud(
        script, "run", "mine", "--", *arguments, **options
    )
    assert status == 0, stderr
    verbs = [
        next(v for v in ("describe", "create", "scp", "ssh") if v in c) for c in calls
    ]
    made = verbs.index("create")
    assert set(verbs[:made]) == {"describe"}
    assert [v for v in verbs[made + 1 :] if v != "describe"] == [
        "scp",
        "ssh",
        "ssh",
        "ssh",
    ]
    assert calls[made].startswith(f"{kind} create mine ")
    for flag in ("--zone=z", "--spot", "--accelerator-type=v5p-32", node):
        assert flag in calls[made]
    install, start, logs = (c for c in calls if " ssh " in c)
    assert "--worker=all" in install
    assert "--worker=all" in start
    assert "--worker=0" in logs
    assert "launch/setup.sh" in install
    assert all("--zone=z" in call for call in calls)
    for part in ("launch/again.sh", "dlm_jax.main", "configs/e2e.py"):
        assert part in start
    status, stdout, _, calls = gcloud(script, "create", "mine", **options)
    assert status == 0
    assert not any(" create " in call for call in calls)  # it is there
    assert "mine is" in stdout


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_pod.sh"])
def test_the_other_actions(script, gcloud):
    assert gcloud(script, "create", "mine", ZONE="z")[0] == 0
    for action, says in {
        "stop": "kill\\ -TERM",
        "logs": "tail",
        "status": "run.pid",
        "delete": " delete mine",
    }.items():
        status, _, stderr, calls = gcloud(script, action, "mine", ZONE="z")
        assert status == 0, stderr
        assert any(says in call for call in calls)
    status, stdout, _, calls = gcloud(script, "delete", "mine", ZONE="z")
    assert (status, stdout) == (0, "mine is gone\n")
    assert not any(" delete " in call for call in calls)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_pod.sh"])
def test_dry_runs_call_nothing_and_show_all(script, gcloud):
    status, stdout, _, calls = gcloud(
        script, "--dry_run", "run", "mine", "--", "--config", "c.py", "--workdir", "w"
    )
    assert status == 0
    assert calls == []
    for verb in (" create mine", " scp ", "launch/again.sh", "tail"):
        assert verb in stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "ACTION"),
        (("run",), "ACTION"),
        (("fly", "mine"), "choose create"),
        (("start", "mine"), "give the command after --"),
    ],
)
def test_mistakes(arguments, says, gcloud):
    status, _, stderr, calls = gcloud("tpu_pod.sh", *arguments)
    assert status == 2
    assert says in stderr
    assert calls == []


# --- again


@contextlib.contextmanager
def _again(tmp_path, script, **env):
    """The script run by again.sh; what is left of both in the end is killed."""
    path = tmp_path / "command.sh"
    path.write_text(script, encoding="utf-8")
    env = (
        os.environ
        | {
            "AGAIN_SECONDS": "0",
            "NOTICE_SECONDS": "0.1",
            "METADATA_URL": "http://127.0.0.1:9",
        }
        | env
    )
    command = ["bash", str(LAUNCH / "again.sh"), "bash", str(path)]
    kinds = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    kinds["start_new_session"] = True
    with subprocess.Popen(command, env=env, cwd=tmp_path, **kinds) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


COUNT = "echo x >> n; n=$(wc -l < n); "


@pytest.mark.parametrize(
    ("script", "status", "times"),
    [
        ("exit 0", 0, 1),
        ("exit 2", 2, 1),
        ("[ $n -lt 3 ] && exit 75; exit 0", 0, 3),
        ("[ $n -lt 3 ] && kill -9 $$; exit 0", 0, 3),
        ("exit 75", 75, 5),  # RESTARTS
    ],
)
def test_again_after_a_preemption_and_nothing_else(script, status, times, tmp_path):
    with _again(tmp_path, COUNT + script, RESTARTS="4") as done:
        done.communicate(timeout=60)
    assert done.returncode == status
    assert len((tmp_path / "n").read_text(encoding="utf-8").splitlines()) == times


def test_a_stopped_run_saves_and_is_not_begun_again(tmp_path):
    script = COUNT + "trap 'sleep 0.3; echo saved > s; exit 75' TERM\n"
    script += "touch up; while true; do sleep 0.05; done"
    with _again(tmp_path, script) as done:
        wait_until((tmp_path / "up").exists, "the command is up")
        done.send_signal(signal.SIGTERM)
        done.communicate(timeout=60)
    assert done.returncode == 75
    assert (tmp_path / "s").exists()
    assert len((tmp_path / "n").read_text(encoding="utf-8").splitlines()) == 1


@pytest.fixture
def metadata(tmp_path):
    """(a file, the address of a metadata server that tells what is in it)."""
    notice = tmp_path / "notice"
    notice.write_text("NONE", encoding="utf-8")

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self):
            ours = self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if ours else 403)
            self.end_headers()
            self.wfile.write(notice.read_bytes() if ours else b"")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield notice, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def few_programs(tmp_path):
    """An environment with Python, bash and three programs that every machine has."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "sleep", "touch", "wc"):
        (folder / name).symlink_to(shutil.which(name))
    return {"PATH": str(folder), "PYTHON": sys.executable}


def test_a_maintenance_notice_is_one_sigterm_however_long_it_stands(
    metadata, few_programs, tmp_path
):
    (notice, url), lives = metadata, tmp_path / "n"
    script = COUNT + "[ $n -gt 1 ] && exit 0\ntrap 'echo x >> terms; exit 75' TERM\n"
    script += "touch up; while true; do sleep 0.05; done"
    with _again(tmp_path, script, METADATA_URL=url, **few_programs) as done:
        wait_until((tmp_path / "up").exists, "the command is up")
        notice.write_text("TERMINATE_ON_HOST_MAINTENANCE", encoding="utf-8")
        wait_until((tmp_path / "terms").exists, "the notice has become a SIGTERM")
        time.sleep(1.0)  # ten times the interval
        assert done.poll() is None
        assert lives.read_text(encoding="utf-8") == "x\n"
        notice.write_text("NONE", encoding="utf-8")
        _, said = done.communicate(timeout=60)
    assert done.returncode == 0
    assert said.count("maintenance notice") == 1
    assert (tmp_path / "terms").read_text(encoding="utf-8") == "x\n"
    assert lives.read_text(encoding="utf-8") == "x\nx\n"


# --- Slurm, containers


def test_slurm_goes_back_into_the_queue(tmp_path):
    """srun and scontrol take notes; an array's run has its own seed and folder."""
    calls, folder = tmp_path / "calls", tmp_path / "bin"
    folder.mkdir()
    for name, status in {"srun": 75, "scontrol": 0}.items():
        (folder / name).write_text(
            f'#!/bin/bash\necho {name} "$@" >> {calls}\nexit {status}', encoding="utf-8"
        )
        (folder / name).chmod(0o755)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    env |= {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    command = [
        "bash",
        str(LAUNCH / "slurm.sh"),
        "--config",
        "c.py",
        "--workdir",
        "runs/x",
    ]
    kinds = {"capture_output": True, "encoding": "utf-8", "timeout": 60}
    done = subprocess.run(command, env=env, cwd=tmp_path, **kinds)
    assert done.returncode == 75
    first, second = calls.read_text(encoding="utf-8").splitlines()
    assert "--workdir runs/x/2 --config.seed=2" in first
    assert second == "scontrol requeue 5_2"
    env = {name: v for name, v in env.items() if "ARRAY" not in name}
    calls.unlink()
    subprocess.run(command, env=env, cwd=tmp_path, **kinds)
    first, second = calls.read_text(encoding="utf-8").splitlines()
    assert first.endswith("--workdir runs/x")
    assert second == "scontrol requeue 7"
    calls.unlink()
    bound = env | {"SLURM_RESTART_COUNT": "100"}
    subprocess.run(command, env=bound, cwd=tmp_path, **kinds)
    assert len(calls.read_text(encoding="utf-8").splitlines()) == 1
    calls.unlink()
    command.insert(2, "--dry_run")
    done = subprocess.run(command, env=env, cwd=tmp_path, **kinds)
    assert done.stdout.startswith("srun --kill-on-bad-exit=0 --wait=120")
    assert not calls.exists()


def test_gpu_dry_run():
    command = ["bash", str(LAUNCH / "gpu.sh"), "--dry_run", "--config", "c.py"]
    kinds = {"capture_output": True, "encoding": "utf-8", "check": True, "timeout": 60}
    done = subprocess.run(command, **kinds)
    assert (
        "launch/again.sh .venv/bin/python -m dlm_jax.main --config c.py" in done.stdout
    )


def test_the_jobset_restarts_all_but_mistakes():
    record = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text(encoding="utf-8"))
    assert record["kind"] == "JobSet"
    job = record["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["containers"][0]["command"][-1] == "dlm_jax.main"


def test_the_image_holds_what_it_runs():
    lines = (LAUNCH / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [
        p for line in lines if line.startswith("COPY") for p in line.split()[1:-1]
    ]
    assert all((ROOT / path).exists() for path in copied)
    assert {"dlm_jax", "configs", "launch", "setup.cfg"} <= set(copied)


@pytest.mark.parametrize("tool", ["mpirun", "srun"])
def test_hosts_of_a_cluster_find_each_other(tool, tmp_path):
    """Open MPI for real where it is installed; Slurm by what it sets."""
    program = (
        "import os, jax; from dlm_jax.runtime import hosts; hosts.initialize('', 1, 0); "
        "os.write(1, b'found %d %d\\n' % hosts.process_index_and_count())"  # in one piece
    )
    command, count = [sys.executable, "-c", program], {"JAX_NUM_CPU_DEVICES": "1"}
    if tool == "mpirun":
        if shutil.which("mpirun") is None:
            pytest.skip("Open MPI is not installed")
        line = [
            "mpirun",
            "--allow-run-as-root",
            "--oversubscribe",
            "-np",
            "2",
            *command,
        ]
        starts = [(line, count)]
    else:
        slurm = {"SLURM_JOB_ID": "41", "SLURM_STEP_NODELIST": "127.0.0.1"}
        slurm |= {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
        slurm |= {"SLURM_STEP_NUM_TASKS": "2", **count}
        ranks = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
        starts = [(command, slurm | rank) for rank in ranks]
    kinds = {"stdout": subprocess.PIPE, "encoding": "utf-8", "cwd": ROOT}
    hosts = [subprocess.Popen(c, env=os.environ | e, **kinds) for c, e in starts]
    try:
        said = "".join(host.communicate(timeout=120)[0] for host in hosts)
    finally:
        for host in hosts:
            host.kill()
    assert sorted(line for line in said.splitlines() if "found" in line) == [
        "found 0 2",
        "found 1 2",
    ]
