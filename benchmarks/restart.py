# SPDX-License-Identifier: Apache-2.0
"""Measures the cost of a restart: saving, restoring and compiling, by model size.

    python benchmarks/restart.py --repeats 3

For each size: the bytes of a checkpoint, and the seconds until a save returns to the
loop, until it is complete, and until it is restored. Also the seconds to compile the
step with an empty and with a warm compilation cache, each in its own process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dlm_jax.configs import e2e
from dlm_jax.diffusion import model
from dlm_jax.runtime import checkpoint, hosts, sharding
from dlm_jax.training import train_step
from dlm_jax.training.config import resolve_config

VOCAB, BATCH = 821, 2
SIZES: dict[str, dict[str, int]] = {
    "1.5M": {"hidden_dim": 128, "layers": 6, "heads": 4, "mlp_dim": 512},
    "11M": {"hidden_dim": 384, "layers": 6, "heads": 6, "mlp_dim": 1536},
    "87M": {},
}


def _begun(size: str) -> tuple[train_step.StepConfig, Any]:
    config = e2e.get_config()
    config.model.update(SIZES[size])
    config.train.batch = BATCH
    step_cfg = resolve_config(config)

    def init(key: jax.Array) -> train_step.TrainState:
        return train_step.init_state(key, step_cfg, VOCAB)

    return step_cfg, sharding.PMAP.begin(jax.random.key(0), init)


def saving(size: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Returns the medians over that many saves and restores."""
    _, state = _begun(size)
    state = jax.jit(_worn)(state)  # the initial moments are zeros, which compress
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    times: dict[str, list[float]] = {"returns": [], "complete": [], "restored": []}
    writer = checkpoint.manager(folder, keep=1)
    for step in range(repeats + 1):
        began = time.perf_counter()
        checkpoint.save(writer, step, state, checkpoint.Records({}, {}, {}))
        times["returns"].append(time.perf_counter() - began)
        checkpoint.wait(writer)
        times["complete"].append(time.perf_counter() - began)
        began = time.perf_counter()
        like = sharding.PMAP.like(shapes)
        jax.block_until_ready(checkpoint.restore(folder, step, like))
        times["restored"].append(time.perf_counter() - began)
    writer.close()
    files = [p for p in folder.rglob("*") if p.is_file()]
    row: dict[str, Any] = {n: float(np.median(t[1:])) for n, t in times.items()}
    row["megabytes"] = sum(p.stat().st_size for p in files) / 1e6
    row["parameters"] = model.count(state.params)
    return row


def _worn(state: Any) -> Any:
    def one(x: jax.Array) -> jax.Array:
        fresh = jax.random.normal(jax.random.key(1), x.shape, jax.numpy.float32)
        return fresh if x.dtype == jax.numpy.float32 else x

    return jax.tree.map(one, state)


def compiling(size: str) -> float:
    """Measures the seconds to the end of the first step."""
    step_cfg, state = _begun(size)
    one = partial(train_step.train_step, step_cfg=step_cfg, axis=sharding.AXIS)
    rows = sharding.PMAP.rows(np.full((1, BATCH, 64), 5, np.int32))
    step = sharding.PMAP.step(one, state)
    began = time.perf_counter()
    jax.block_until_ready(step(jax.random.key(0), state, rows)[1]["loss"])
    return time.perf_counter() - began


def main() -> None:
    """Measures every size; prints and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="internal: compile this size")
    parser.add_argument("--out", default="benchmarks/results/restart.json")
    args = parser.parse_args()
    if args.only:
        print(compiling(args.only))
        return
    record: dict[str, Any] = {"device": hosts.describe()}
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            record[size] = saving(size, Path(folder), args.repeats)
        with tempfile.TemporaryDirectory() as cache:
            jax_cache = {"JAX_COMPILATION_CACHE_DIR": cache}
            for name in ("compile, cold", "compile, warm"):
                record[size][name] = _apart(size, jax_cache)
        print(size, record[size], flush=True)
    Path(args.out).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _apart(size: str, env: dict[str, str]) -> float:
    command = [sys.executable, __file__, "--only", size]
    kinds: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "encoding": "utf-8",
        "check": True,
    }
    done = subprocess.run(command, env=os.environ | env, **kinds)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
