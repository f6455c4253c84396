# SPDX-License-Identifier: Apache-2.0
"""The loader beside the training step that it feeds, and text larger than memory.

    python benchmarks/loader.py --data FOLDER_OF_src1_train.txt
    python benchmarks/loader.py --gigabytes 5 --folder SCRATCH

First: tokens a second of the loader alone (in memory, and prepared on disk) and of
`configs/e2e_small.py`'s training step, interleaved, and the share of a step that waits
for its batch. Second: a synthetic text of that size is prepared and trained on; resident
memory of the host beyond that of the same model on a small text.
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


def rates(folder: str, scratch: Path, repeats: int) -> dict[str, Any]:
    """Tokens a second of loaders and step, medians of interleaved repetitions."""
    config = e2e_small.get_config()
    config.data.path = folder
    prepare.prepare_data(config, str(scratch / "prepared"))
    runs = {"in memory": trainer.Trainer(config, str(scratch / "run"))}
    config.data.source, config.data.path = "prepared", str(scratch / "prepared")
    runs["prepared"] = trainer.Trainer(config, str(scratch / "run_prepared"))
    first = runs["in memory"]
    one = partial(
        train_step.train_step, step_cfg=first.step_cfg, axis=first.layout.axis
    )
    step_fn, key = first.layout.step(one, first.state), jax.random.key(0)

    def step(number: int, batch: Any) -> None:
        first.state, metrics = step_fn(key, first.state, batch)
        jax.block_until_ready(metrics["loss"])

    step(0, first.batch(0))
    found: dict[str, list[float]] = {name: [] for name in (*runs, "step", "wait")}
    for _ in range(repeats):
        for name, run in runs.items():
            found[name].append(seconds(lambda i, r=run: r.batch(i), 50) / 50)
        ahead = batching.Prefetcher(runs["prepared"].batch, range(100))
        began, waited = time.perf_counter(), 0.0
        for i in range(10):
            asked = time.perf_counter()
            batch = ahead()
            waited += time.perf_counter() - asked
            step(i, batch)
        found["step"].append((time.perf_counter() - began) / 10)
        found["wait"].append(waited / 10)
        ahead.close()
    tokens = first.step_cfg.batch * config.data.length
    rows: dict[str, Any] = {
        name: tokens / float(np.median(found[name])) for name in (*runs, "step")
    }
    rows["times the step"] = {name: rows[name] / rows["step"] for name in runs}
    rows["share of a step that waits"] = float(
        np.median(np.array(found["wait"]) / np.array(found["step"]))
    )
    return {"tokens a second": rows, "seconds": found, "device": hosts.describe()}


def seconds(call: Callable[[int], Any], times: int) -> float:
    """Of that many calls."""
    began = time.perf_counter()
    for i in range(times):
        call(i)
    return time.perf_counter() - began


def write_text(path: Path, size: float) -> None:
    """Lines of the grammar, in ever other pairs, up to so many bytes."""
    lines = grammar.sample(0, 20_000)
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        while file.tell() < size:
            pairs = rng.integers(0, len(lines), (50_000, 2))
            file.write("".join(f"{lines[a]} {lines[b]}\n" for a, b in pairs))


def large(size: float, scratch: Path) -> dict[str, Any]:
    """Seconds and peak resident memory of preparing and training, in processes of their own."""
    found: dict[str, Any] = {}
    for name, number in (("small", 2e6), ("large", size)):
        text = scratch / f"{name}.txt"
        if not text.exists():
            write_text(text, number)
        common = [
            "--config",
            "configs/e2e_small.py",
            "--config.data.valid_fraction=0.001",
        ]
        common += ["--config.data.mode=block"]
        out = scratch / f"{name}_prepared"
        source = ["--config.data.source=text", f"--config.data.path={text}"]
        steps = [f"--config.train.{n}=1000" for n in ("sample_steps", "valid_steps")]
        steps += ["--config.train.total_steps=20", "--config.data.source=prepared"]
        found[name] = {
            "gigabytes": text.stat().st_size / 1e9,
            "prepare": _watched([*common, *source, "--mode", "prepare_data"], out),
            "train": _watched(
                [*common, *steps, f"--config.data.path={out}"], scratch / f"{name}_run"
            ),
        }
    for part in ("prepare", "train"):
        peaks = [found[name][part]["peak_mb"] for name in ("large", "small")]
        found[f"{part}: beyond the small text, MB"] = peaks[0] - peaks[1]
    return found


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
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    peak = float(done.stdout.rsplit("peak", 1)[1]) / 1024
    return {"seconds": time.monotonic() - began, "peak_mb": peak}


def main() -> None:
    """Prints the table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="")
    parser.add_argument("--gigabytes", type=float, default=0.0)
    parser.add_argument("--folder", default="")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="benchmarks/results/loader.json")
    args = parser.parse_args()
    out = Path(args.out)
    record = json.loads(out.read_text()) if out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(args.folder or folder)
        scratch.mkdir(parents=True, exist_ok=True)
        if args.data:
            record["rates"] = rates(args.data, scratch, args.repeats)
        if args.gigabytes:
            record["large"] = large(args.gigabytes * 1e9, scratch)
    out.write_text(json.dumps(record, indent=1))
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
