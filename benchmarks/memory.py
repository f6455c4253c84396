# SPDX-License-Identifier: Apache-2.0
"""Computes the memory per device in both layouts, and that of the compiled step.

    JAX_NUM_CPU_DEVICES=8 python benchmarks/memory.py --compile

From shapes, at 87M and 1B parameters: the parameters, their average and the optimiser
state that each device holds, and what the backward pass of its rows keeps, with and
without remat. --compile adds the memory that XLA plans for the 87M step.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax

from dlm_jax.configs import e2e
from dlm_jax.diffusion import model
from dlm_jax.runtime import sharding
from dlm_jax.training import train_step
from dlm_jax.training.config import resolve_config

SIZES: dict[str, dict[str, int]] = {
    "87M": {},
    "1B": {"hidden_dim": 2048, "layers": 20, "heads": 16, "mlp_dim": 8192},
}
VOCAB = 821


def recipe_of(size: str, *, remat: bool = False) -> tuple[train_step.StepConfig, int]:
    """Returns the step config of configs/e2e.py at a size, and the length."""
    config = e2e.get_config()
    config.model.update(SIZES[size], remat=remat)
    return resolve_config(config), config.data.length


def held(tree: Any) -> int:
    """Returns the bytes that one device holds of a tree of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def by_shapes(size: str) -> dict[str, Any]:
    """Returns the MB per device of each part of the state, in both layouts."""
    step_cfg, _ = recipe_of(size)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda k: train_step.init_state(k, step_cfg, VOCAB), key)
    row: dict[str, Any] = {"parameters": model.count(shapes.params)}
    for name, layout in sharding.LAYOUTS.items():
        like = layout.like(shapes)
        parts = {"parameters": like.params, "average": like.ema, "optimiser": like.opt}
        row[name] = {part: held(tree) / 2**20 for part, tree in parts.items()}
        row[name]["all"] = held(like) / 2**20
    return row


def kept(size: str, *, remat: bool) -> float:
    """Returns the MB that one device keeps for the backward pass, less parameters."""
    step_cfg, length = recipe_of(size, remat=remat)
    batch, key = step_cfg.batch // jax.device_count(), jax.random.key(0)
    params = jax.eval_shape(
        lambda k: train_step.init_state(k, step_cfg, VOCAB), key
    ).params

    def residuals(params: Any, ids: jax.Array) -> Any:
        draws = train_step.make_draws(key, ids, step_cfg, 0, ())

        def loss(p: Any) -> Any:
            return train_step.loss_fn(p, ids, draws, step_cfg, key=key)[0]

        return jax.vjp(loss, params)[1]

    ids = jax.ShapeDtypeStruct((batch, length), "int32")
    leaves = jax.tree.leaves(jax.eval_shape(residuals, params, ids))
    everything = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    return (everything - weights) / 2**20


def by_compiling(mode: str) -> dict[str, float]:
    """Returns the MB per device that XLA plans for the 87M step."""
    step_cfg, length = recipe_of("87M")
    layout, key = sharding.LAYOUTS[mode], jax.random.key(0)
    shapes = jax.eval_shape(lambda k: train_step.init_state(k, step_cfg, VOCAB), key)
    state = layout.like(shapes)
    one = partial(train_step.train_step, step_cfg=step_cfg, axis=layout.axis)
    step: Any = layout.step(one, state)
    devices = jax.device_count()
    rows = (devices, step_cfg.batch // devices, length)
    if mode == "fsdp":
        rows = (1, step_cfg.batch, length)
    plan = step.lower(key, state, jax.ShapeDtypeStruct(rows, "int32")).compile()
    sizes = plan.memory_analysis()
    return {
        "state in": sizes.argument_size_in_bytes / 2**20,
        "beside it": sizes.temp_size_in_bytes / 2**20,
    }


def main() -> None:
    """Computes, prints and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", default="benchmarks/results/memory.json")
    args = parser.parse_args()
    record: dict[str, Any] = {"devices": jax.device_count(), "unit": "MB a device"}
    record |= {size: by_shapes(size) for size in SIZES}
    for size in SIZES:
        for remat in (False, True):
            name = "kept for the backward pass" + (", remat" if remat else "")
            record[size][name] = kept(size, remat=remat)
    if args.compile:
        for mode in sharding.LAYOUTS:
            record[f"87M step, {mode}"] = by_compiling(mode)
    Path(args.out).write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
