# SPDX-License-Identifier: Apache-2.0
"""Measures the data loader beside the training step, and text larger than memory.

    python benchmarks/loader.py --data FOLDER_OF_src1_train.txt
    python benchmarks/loader.py --gigabytes 5 --folder SCRATCH

The first command measures tokens per second of the loader alone, in memory and from
prepared files, and of the training step of `configs/e2e_small.py`, interleaved. It also
measures the share of a step that waits for its batch. The second prepares a synthetic
text of that size and trains on it. It reports the peak host memory beyond that of the
same model on a small text.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dlm_jax.configs import e2e_small
from dlm_jax.data import batching, grammar, prepare
from dlm_jax.runtime import hosts
from dlm_jax.training import train_step, trainer


def _trainer(config: Any, workdir: Path) -> trainer.Trainer:
    return trainer.Trainer(trainer.language_job(config), str(workdir))


def rates(folder: str, scratch: Path, repeats: int) -> dict[str, Any]:
    """Measures tokens per second of loaders and step: medians of interleaved rounds."""
    config = e2e_small.get_config()
    config.data.path = folder
    config.model.known_length = False  # which needs the text in memory
    prepare.prepare_data(config, str(scratch / "prepared"))
    runs = {"in memory": _trainer(config, scratch / "run")}
    config.data.source, config.data.path = "prepared", str(scratch / "prepared")
    runs["prepared"] = _trainer(config, scratch / "run_prepared")
    first = runs["in memory"]
    one = partial(
        train_step.train_step, step_cfg=first.step_cfg, axis=first.layout.axis
    )
    step_fn, key = first.layout.step(one, first.state), jax.random.key(0)

    def step(number: int, batch: Any) -> None:
        first.state, metrics = step_fn(key, first.state, batch)
        jax.block_until_ready(metrics["loss"])

    step(0, first.batch(0))
    times: dict[str, list[float]] = {name: [] for name in (*runs, "step", "wait")}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(lambda i, r=run: r.batch(i), 50) / 50)
        ahead = batching.Prefetcher(runs["prepared"].batch, range(100))
        began, waited = time.perf_counter(), 0.0
        for i in range(10):
            waiting_since = time.perf_counter()
            batch = ahead()
            waited += time.perf_counter() - waiting_since
            step(i, batch)
        times["step"].append((time.perf_counter() - began) / 10)
        times["wait"].append(waited / 10)
        ahead.close()
    tokens = first.step_cfg.batch * config.data.length
    rows: dict[str, Any] = {
        name: tokens / float(np.median(times[name])) for name in (*runs, "step")
    }
    rows["times the step"] = {name: rows[name] / rows["step"] for name in runs}
    rows["share of a step that waits"] = float(
        np.median(np.array(times["wait"]) / np.array(times["step"]))
    )
    return {"tokens a second": rows, "seconds": times, "device": hosts.describe()}


def seconds(call: Callable[[int], Any], times: int) -> float:
    """Returns the total seconds of that many calls."""
    began = time.perf_counter()
    for i in range(times):
        call(i)
    return time.perf_counter() - began


def write_text(path: Path, size: float) -> None:
    """Writes random pairs of grammar texts as lines, up to size bytes."""
    lines = grammar.sample(0, 20_000)
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            pairs = rng.integers(0, len(lines), (50_000, 2))
            file.write("".join(f"{lines[a]} {lines[b]}\n" for a, b in pairs))


def large(size: float, scratch: Path) -> dict[str, Any]:
    """Measures seconds and peak memory of preparing and training, in subprocesses."""
    record: dict[str, Any] = {}
    for name, number in (("small", 2e6), ("large", size)):
        text = scratch / f"{name}.txt"
        if not text.exists():
            write_text(text, number)
        common = ["--config", "configs/e2e_small.py"]
        common += ["--config.data.mode=block", "--config.model.known_length=False"]
        out = scratch / f"{name}_prepared"
        source = ["--config.data.source=text", f"--config.data.path={text}"]
        source += ["--config.data.valid_fraction=0.001"]
        steps = [f"--config.train.{n}=1000" for n in ("sample_steps", "valid_steps")]
        steps += ["--config.train.total_steps=20", "--config.data.source=prepared"]
        record[name] = {
            "gigabytes": text.stat().st_size / 1e9,
            "prepare": _watched([*common, *source, "--mode", "prepare_data"], out),
            "train": _watched(
                [*common, *steps, f"--config.data.path={out}"], scratch / f"{name}_run"
            ),
        }
    for part in ("prepare", "train"):
        peaks = [record[name][part]["peak_mb"] for name in ("large", "small")]
        record[f"{part}: beyond the small text, MB"] = peaks[0] - peaks[1]
    return record


WATCH = """
import runpy, sys
sys.argv[0] = "dlm_jax.main"
try:
    runpy.run_module("dlm_jax.main", run_name="__main__")
finally:
    lines = open("/proc/self/status").read().splitlines()
    print("peak", *(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def _watched(flags: list[str], workdir: Path) -> dict[str, float]:
    command = [sys.executable, "-c", WATCH, *flags, "--workdir", str(workdir)]
    began = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    peak = float(done.stdout.rsplit("peak", 1)[1]) / 1024
    return {"seconds": time.monotonic() - began, "peak_mb": peak}


def main() -> None:
    """Measures what the flags ask for; prints and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="", help="folder of E2E's src1_*.txt")
    parser.add_argument("--gigabytes", type=float, default=0.0, help="size of the text")
    parser.add_argument("--folder", default="", help='for large files; "": temporary')
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="benchmarks/results/loader.json")
    args = parser.parse_args()
    out = Path(args.out)
    record = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(args.folder or folder)
        scratch.mkdir(parents=True, exist_ok=True)
        if args.data:
            record["rates"] = rates(args.data, scratch, args.repeats)
        if args.gigabytes:
            record["large"] = large(args.gigabytes * 1e9, scratch)
    out.write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
