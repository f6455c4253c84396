# SPDX-License-Identifier: Apache-2.0
"""Predicts the cost of a run on more hosts: throughput, checkpoints and restarts.

    JAX_NUM_CPU_DEVICES=8 python benchmarks/plan.py --measure
    python benchmarks/plan.py --peak 459e12 --links 600e9

Measured here: the bytes per parameter that the compiled step of the 87M model sends
between devices, and the seconds from the start of 1, 2 and 4 processes to their first
step. `restart.py` measures how fast a checkpoint is written, read and compiled for. The
flags give an accelerator's operations per second and its links' bytes per second. The
table is arithmetic on these: computation and communication overlap, and the slower one
sets the time of a step.
"""

import argparse
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import memory

from dlm_jax.runtime import sharding
from dlm_jax.training import train_step

ROOT = Path(__file__).parent.parent
HOSTS, CHIPS = (1, 4, 16, 64, 256), 4  # chips per host
PARAMETERS = {"87M": 87_129_749, "1B": 1_017_809_045}
# how often a result passes a device's links in a ring of many devices
TRAVELS = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0}


def exchanged(mode: str) -> dict[str, float]:
    """Returns the bytes per parameter that a device sends in a step, by operation."""
    step_cfg, length = memory.recipe_of("87M")
    layout, key = sharding.LAYOUTS[mode], jax.random.key(0)
    shapes = jax.eval_shape(
        lambda k: train_step.init_state(k, step_cfg, memory.VOCAB), key
    )
    state, devices = layout.like(shapes), jax.device_count()
    one = partial(train_step.train_step, step_cfg=step_cfg, axis=layout.axis)
    step: Any = layout.step(one, state)
    parts = devices if mode == "pmap" else 1
    rows = jax.ShapeDtypeStruct((parts, step_cfg.batch // parts, length), "int32")
    text = step.lower(key, state, rows).compile().as_text()
    sent = dict.fromkeys(TRAVELS, 0.0)
    for shape, kind in re.findall(
        r"= (\(.*?\)|\S+) (all-reduce|all-gather|reduce-scatter)(?:-start)?\(", text
    ):
        scattered = devices if kind == "reduce-scatter" else 1
        sent[kind] += TRAVELS[kind] * scattered * _bytes(shape)
    return {kind: size / PARAMETERS["87M"] for kind, size in sent.items()}


def _bytes(shape: str) -> float:
    """Returns the bytes of an HLO shape, or of a tuple of them."""
    sizes = {"f32": 4, "bf16": 2, "u32": 4, "s32": 4, "pred": 1}
    parts = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(
        sizes[t] * math.prod(map(int, filter(None, n.split(",")))) for t, n in parts
    )


def start(hosts: int) -> float:
    """Measures the seconds from process start to a first step, compilation cached."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "dlm_jax.main", "--config", "configs/smoke.py"]
        line += ["--config.train.total_steps=1", "--config.train.sample_steps=0"]
        line += ["--workdir", f"{folder}/run"]
        if hosts > 1:
            line += [
                "--num_processes",
                str(hosts),
                "--coordinator",
                f"127.0.0.1:{port}",
            ]
        began = time.perf_counter()
        own = [[*line, "--process_id", str(i)] for i in range(hosts)]
        env = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
        quiet = {"stdout": subprocess.DEVNULL, "cwd": ROOT, "env": env}
        for process in [subprocess.Popen(command, **quiet) for command in own]:
            if process.wait():
                raise RuntimeError(f"{process.args} ended with {process.returncode}")
        return time.perf_counter() - began


def measured() -> dict[str, Any]:
    """Measures everything that this machine can measure."""
    sent = {mode: exchanged(mode) for mode in sharding.LAYOUTS}
    start(1)  # fills the compilation cache, if there is one
    return {
        "devices": jax.device_count(),
        "bytes sent a step, per parameter": sent,
        "start to first step, s": {str(n): start(n) for n in (1, 2, 4)},
    }


def plan(known: dict, restart: dict, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Computes a row per model, layout and number of hosts."""
    disk = restart["87M"]["megabytes"] * 1e6
    write, read = (disk / restart["87M"][n] for n in ("complete", "restored"))
    rows = []
    for name, count in PARAMETERS.items():
        for mode, hosts in ((m, h) for m in sharding.LAYOUTS for h in HOSTS):
            tokens = args.tokens * hosts * CHIPS
            work = 6 * count * args.tokens / (args.peak * args.share)
            sent = sum(known["bytes sent a step, per parameter"][mode].values()) * count
            step = max(work, sent / args.links) if hosts * CHIPS > 1 else work
            writers = hosts if mode == "fsdp" else 1
            size = 16.0 * count
            began = max(known["start to first step, s"].values())
            compiled = restart["87M"]["compile, warm"]
            rows.append(
                {
                    "model": name,
                    "layout": mode,
                    "hosts": hosts,
                    "tokens/s": tokens / step,
                    "efficiency": work / step,
                    "checkpoint, GB": size / 1e9,
                    "save, s": size / write / writers,
                    "restart, s": began + compiled + size / read / writers,
                }
            )
    return rows


def main() -> None:
    """Prints the table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="else read from --out")
    parser.add_argument("--peak", type=float, default=459e12, help="FLOP/s per chip")
    parser.add_argument("--links", type=float, default=600e9, help="bytes/s per chip")
    parser.add_argument("--share", type=float, default=0.5, help="sustained, of --peak")
    parser.add_argument("--tokens", type=int, default=4096, help="per chip and step")
    parser.add_argument("--out", default="benchmarks/results/plan.json")
    args = parser.parse_args()
    out = Path(args.out)
    known = (
        measured()
        if args.measure
        else json.loads(out.read_text(encoding="utf-8"))["measured"]
    )
    restart = json.loads(
        (ROOT / "benchmarks/results/restart.json").read_text(encoding="utf-8")
    )
    rows = plan(known, restart, args)
    given = {n: getattr(args, n) for n in ("peak", "links", "share", "tokens")}
    record = {"measured": known, "told": given, "rows": rows}
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(known, indent=1))
    print("| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|", sep="\n")
    for row in rows:
        cells = [v if isinstance(v, str) else f"{v:.3g}" for v in row.values()]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
