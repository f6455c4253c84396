# SPDX-License-Identifier: Apache-2.0
"""Speed of a training step and of a sampling step, against this machine's matmul peak.

    python benchmarks/speed.py --config configs/grammar.py --config configs/e2e_small.py
    python benchmarks/speed.py --config configs/e2e.py --batch 512 --dtype bfloat16

Each config runs in a process of its own, so that the peak memory is its own. Prints a
table and writes JSON beside it (--out). Random ids stand for text: no data is read.
"""

import argparse
import importlib.util
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax import control, model, parallel, samplers, train


def seconds(run: Callable[[], Any], repeats: int) -> list[float]:
    """Wall times of repeated calls, each waited for."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return times


def matmul_peak(dtype: str, size: int) -> float:
    """The best of ten [size size] products, FLOP/s."""
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
    jax.block_until_ready(product(x, x))
    return 2 * size**3 / min(seconds(lambda: product(x, x), 10))


def trunk_flops(config: Any, tokens: int) -> float:
    """Multiply-adds of one forward pass times two: the layers' matrices, attention."""
    m = config.model
    layer = 4 * m.width**2 + 2 * m.width * m.ff + 2 * config.data.length * m.width
    return 2.0 * m.layers * layer * tokens


def measure(path: str, batch: int, dtype: str, repeats: int) -> dict[str, Any]:
    """One config's row: medians in seconds, tokens a second, shares, memory."""
    config = _read(path)
    config.train.batch = batch or config.train.batch
    config.model.dtype = dtype or config.model.dtype
    recipe = train.recipe_of(config)
    vocab = {"grammar": 151}.get(config.data.source, 821)
    shape = (recipe.batch, config.data.length)
    tokens = recipe.batch * config.data.length
    key = jax.random.key(0)
    state = parallel.place(train.init_state(key, recipe, vocab))
    ids = np.random.default_rng(0).integers(4, vocab, shape, dtype=np.int32)
    ema = jax.tree.map(np.asarray, state.ema)
    row = {"config": path, "batch": recipe.batch, "length": shape[1]}
    row |= {"dtype": recipe.cfg.dtype, "parameters": model.count(ema)}
    row |= _training(key, state, ids, recipe, repeats)
    row |= _sampling(ema, recipe, ids, repeats, config.sample)
    row["solver"] = config.sample.solver
    peak = matmul_peak(
        recipe.cfg.dtype, 1024 if jax.devices()[0].platform == "cpu" else 8192
    )
    flops = trunk_flops(config, tokens)
    row["peak_gflops"] = peak / 1e9
    row["train_tokens_per_s"] = tokens / row["train_s"]
    row["sample_tokens_per_s"] = tokens / row["sample_s"]
    row["train_share"] = 3 * flops / row["train_s"] / peak
    row["sample_share"] = flops / row["sample_s"] / peak
    row["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    stats = jax.devices()[0].memory_stats() or {}
    row["device_memory_mb"] = stats.get("peak_bytes_in_use", 0) / 2**20
    return row


def _training(key, state, ids, recipe, repeats) -> dict[str, Any]:
    one = partial(train.train_step, recipe=recipe, axis=parallel.AXIS)
    step = parallel.PMAP.step(one, state)
    rows, holder = parallel.PMAP.rows(ids[None]), [state]

    def run():
        holder[0], metrics = step(key, holder[0], rows)
        return metrics

    compile_s = seconds(run, 1)[0]
    times = seconds(run, repeats)
    return {
        "train_s": float(np.median(times)),
        "train_all_s": times,
        "train_compile_s": compile_s,
    }


def _sampling(ema, recipe, ids, repeats, sample) -> dict[str, Any]:
    """A step of the config's solver and clamp inside the scan, by slope: 4 to 12 steps."""
    keys = samplers.keys_of(jax.random.key(1), ids.shape[0])
    x_T = samplers.noise(keys, (ids.shape[1], recipe.cfg.dim))

    def chain(steps: int) -> Callable:
        def run(params, keys, x_T):
            denoise = model.bind(params, recipe.cfg, schedule=recipe.schedule)
            if sample.clamp >= 0:
                denoise = control.clamp(denoise, params.table, below=sample.clamp)
            options = {"eta": sample.eta} if sample.solver == "ddim" else {}
            step = samplers.SOLVERS[sample.solver](denoise, recipe.schedule, **options)
            times = samplers.time_grid(recipe.schedule, steps)
            return samplers.sample(keys, step, x_T, times)[0].x0_hat

        return partial(jax.jit(run), ema, keys, x_T)

    short, long = chain(4), chain(12)
    compile_s = seconds(long, 1)[0]
    jax.block_until_ready(short())
    pairs = [(seconds(short, 1)[0], seconds(long, 1)[0]) for _ in range(repeats)]
    slopes = [(b - a) / 8 for a, b in pairs]
    return {
        "sample_s": float(np.median(slopes)),
        "sample_all_s": slopes,
        "sample_compile_s": compile_s,
    }


def _read(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def main() -> None:
    """Measures every config named, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", action="append", required=True)
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--dtype", default="")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", default="runs/speed.json")
    parser.add_argument("--child", action="store_true")
    args = parser.parse_args()
    if args.child:
        row = measure(args.config[0], args.batch, args.dtype, args.repeats)
        print(json.dumps(row))
        return
    rows = []
    for path in args.config:
        command = [sys.executable, __file__, "--child", "--config", path]
        command += ["--batch", str(args.batch), "--dtype", args.dtype]
        command += ["--repeats", str(args.repeats)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        shown = {k: v for k, v in rows[-1].items() if not isinstance(v, list)}
        for name, value in shown.items():
            print(
                f"  {name:20s} {value:.4g}"
                if isinstance(value, float)
                else f"  {name:20s} {value}"
            )
        print()
    record = {"machine": platform.platform(), "jax": jax.__version__}
    record |= {"device": parallel.describe(), "cores": len(_cores()), "rows": rows}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(record, indent=1))
    print(args.out)


def _cores() -> set[int]:
    import os

    return os.sched_getaffinity(0)


if __name__ == "__main__":
    main()
