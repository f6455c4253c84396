# SPDX-License-Identifier: Apache-2.0
"""Measures correctness, speed and training on an accelerator within a time limit.

    python benchmarks/accelerator.py --out FOLDER --minutes 9 --data FOLDER_OF_E2E
    python benchmarks/accelerator.py --out FOLDER --rehearse     # tiny, on the CPU

Each of the four stages runs in its own process with its own time limit. `machine`
measures peak rates. `right` compares results with the CPU. `speed` compares training
and sampling with PyTorch. `learn` trains a small model in the remaining time. FOLDER
receives a JSON file per stage, which grows as results arrive, `log.txt` and the model.
A stage that does not fit is skipped, and the table says so. The exit status is 1 if a
stage failed and 2 for a user's mistake.
"""

import argparse
import fcntl
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
ROOT = str(HERE.parent)
sys.path.insert(0, ROOT)  # this checkout, whatever is installed
# a stage's share of the time left when it starts; unused time goes to later stages
STAGES = {"machine": 0.1, "right": 0.18, "speed": 0.55, "learn": 1.0}
# a stage with fewer seconds left is skipped
LEAST = {"machine": 10, "right": 20, "speed": 60, "learn": 120}
USES = {"speed": "machine", "learn": "speed"}  # stages that read an earlier record
GRACE = 10  # seconds between SIGTERM and SIGKILL
WRONG = 3  # exit status of a stage with wrong results
# programs run only briefly in a rehearsal, so compilation should be fast
REHEARSAL = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def fail(line: str) -> NoReturn:
    """Prints one line and exits with status 2, for a user's mistake."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def arguments() -> argparse.Namespace:
    """Parses and checks the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all stages")
    parser.add_argument("--data", default="data/e2e", help="folder of E2E's src1_*.txt")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--profile", action="store_true", help="trace a training step")
    args = parser.parse_args()
    args.stages = [stage for stage in STAGES if stage in args.stages]  # in this order
    if not 0 < args.minutes <= 24 * 60:
        fail(f"--minutes={args.minutes:g}: give a number of minutes over 0, up to 1440")
    if not args.rehearse:
        check_data(args)
        check_device()
    claim(Path(args.out), args.stages)
    return args


def check_data(args: argparse.Namespace) -> None:
    """Fails if the files of E2E are missing, before any time is spent."""
    for name in ("src1_train.txt", "src1_valid.txt"):
        path = Path(args.data) / name
        exists = path.is_file() and path.stat().st_size > 0
        if "learn" in args.stages and not exists:
            fail(
                f"--data={args.data}: no {name} there; give the folder of the E2E data, "
                "or omit the stage learn: --stages machine right speed"
            )


def check_device() -> None:
    """Fails without an accelerator; a subprocess asks, so the device stays free."""
    program = "import jax; print(jax.default_backend())"
    options: Any = {"capture_output": True, "encoding": "utf-8", "timeout": 180}
    try:
        done = subprocess.run([sys.executable, "-c", program], **options)
    except subprocess.TimeoutExpired:
        fail("JAX found no device within 180 s; check the driver, or use --rehearse")
    backend = done.stdout.strip()
    if done.returncode or backend == "cpu":
        lines = done.stderr.strip().splitlines() or ["JAX sees only the CPU"]
        fail(f"no accelerator ({lines[-1][:150]}); use --rehearse on a CPU")


def claim(out: Path, stages: list[str]) -> None:
    """Locks the folder for this run; fails if it holds results of these stages."""
    try:
        done = [name for name in stages if (out / f"{name}.json").exists()]
        if done:
            fail(
                f"--out={out}: holds results of {', '.join(done)}; choose another folder"
            )
        out.mkdir(parents=True, exist_ok=True)
        log = os.open(out / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o644)
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until this process ends
    except BlockingIOError:
        fail(f"--out={out}: another run writes to it; choose another folder")
    except OSError as error:
        fail(f"--out={str(out)[:200]}: {error.strerror}; choose another folder")


def toy_data(folder: Path) -> str:
    """Writes invented texts in E2E's format for a rehearsal; returns the folder."""
    folder.mkdir(exist_ok=True)
    names, foods = ("Aromi", "Zizzi", "The Mill", "Cotto"), ("Thai", "French", "Indian")
    areas, prices = ("city centre", "riverside"), ("cheap", "moderate", "high")
    lines = [
        f"name : {n} | food : {f} | area : {a}||{n} serves {f} food at {p} prices in "
        f"the {a} ."
        for n in names
        for f in foods
        for a in areas
        for p in prices
    ]
    for split, part in (("train", lines), ("valid", lines[::2])):
        (folder / f"src1_{split}.txt").write_text(
            "\n".join(part) + "\n", encoding="utf-8"
        )
    return str(folder)


def start(
    stage: str, args: argparse.Namespace, seconds: float, cache: str
) -> dict[str, Any]:
    """Runs a stage as a subprocess; returns its seconds, error and whether it is wrong.

    seconds: its time limit. cache: the compilation cache that all stages share.
    """
    out = Path(args.out)
    flags = [f"--{name}" for name in ("rehearse", "profile") if getattr(args, name)]
    command = [sys.executable, __file__, "--stage", stage, str(out), str(seconds)]
    env = {**os.environ, **(REHEARSAL if args.rehearse else {})}
    env["JAX_COMPILATION_CACHE_DIR"] = cache
    paths = [ROOT, str(HERE), env.get("PYTHONPATH")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    env["DLM_PARENT"] = str(os.getpid())
    if "no fused attention" in read(out, "right"):
        env["DLM_PLAIN_ATTENTION"] = "1"  # read by lib/ours.py
    note = out / f"{stage}.error"
    note.unlink(missing_ok=True)
    began = time.monotonic()
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, args.data, *flags],
            stdout=log,
            stderr=log,
            env=env,
            start_new_session=True,  # a group, so that its children end with it
        )
        try:
            status: int | None = process.wait(seconds + 5)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end(process)
    error = "" if status == 0 else f"ended with status {status}"
    if status is None:
        error = f"stopped after {seconds:.0f} s"
    if note.exists():
        error = note.read_text(encoding="utf-8").strip()
        note.unlink()
    took = time.monotonic() - began
    return {"seconds": took, "error": error, "wrong": status == WRONG}


def end(process: subprocess.Popen) -> None:
    """Terminates a stage and its child processes."""
    for number, wait in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        if number == signal.SIGTERM and process.poll() is not None:
            wait = 1
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            continue


def follow(parent: int) -> None:
    """Kills this stage and its children once the parent process no longer exists."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def inside(stage: str, out: str, seconds: str, data: str, *flags: str) -> None:
    """Runs a stage in this process; writes the first line of an error to a file."""
    began = time.monotonic()
    from stages import Job, Wrong

    module = importlib.import_module(f"stages.{stage}")
    job = Job(
        Path(out) / f"{stage}.json",
        float(seconds),
        began,
        data,
        "--rehearse" in flags,
        "--profile" in flags,
    )
    earlier = USES.get(stage)
    records = [read(Path(out), earlier)] if earlier else []
    try:
        module.run(job, *records)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        name = "" if isinstance(error, Wrong) else f"{type(error).__name__}: "
        job.path.with_suffix(".error").write_text(
            f"{name}{first}"[:300], encoding="utf-8"
        )
        if isinstance(error, Wrong):
            sys.exit(WRONG)
        raise


def read(out: Path, stage: str) -> dict[str, Any]:
    """Returns the record of a stage; {} if it has reported nothing."""
    path = out / f"{stage}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def show(out: Path, states: dict[str, dict[str, Any]]) -> None:
    """Prints the tables of all stages."""
    for stage, state in states.items():
        print(f"\n{stage}: {state.get('error') or 'done'}, {state['seconds']:.0f} s")
        record = read(out, stage)
        if record:
            lines = importlib.import_module(f"stages.{stage}").table(record)
            print("\n".join(f"  {line}" for line in lines))


def main() -> None:
    """Runs the stages in order and prints their tables; wrong results end the run."""
    args = arguments()
    out = Path(args.out)
    if args.rehearse:
        args.data = toy_data(out / "toy_e2e")
    with tempfile.TemporaryDirectory() as cache:
        states = run(args, cache)
    for path in (*out.glob("*.part"), *out.glob("*.error")):  # of killed stages
        path.unlink()
    show(out, states)
    failed = [s["error"] for s in states.values() if s["error"]]
    sys.exit(int(any(not error.startswith("skipped") for error in failed)))


def run(args: argparse.Namespace, cache: str) -> dict[str, dict[str, Any]]:
    """Runs each stage with its share of the remaining time; returns their states."""
    states: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + 60 * args.minutes
    for stage in args.stages:
        left = deadline - time.monotonic()
        if left < LEAST[stage] and not args.rehearse:
            states[stage] = {"seconds": 0.0, "error": f"skipped: {left:.0f} s left"}
            continue
        last = stage == args.stages[-1]
        seconds = left if last or args.rehearse else left * STAGES[stage]
        print(f"{stage}: up to {seconds:.0f} s", flush=True)
        states[stage] = start(stage, args, seconds, cache)
        if states[stage]["wrong"]:
            break
    return states


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stage"]:
        parent = int(os.environ["DLM_PARENT"])
        threading.Thread(target=follow, args=(parent,), daemon=True).start()
        inside(*sys.argv[2:])
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also ends the stage
        main()
