# SPDX-License-Identifier: Apache-2.0
"""A minute's guard against slowness: steps beside plain products, in one process.

    python benchmarks/quick.py

The reference is as many products of the step's own largest shape as its operations make.
A step takes a few times as long; more than BOUNDS is a regression, and status 1. The
bounds are wide, as machines differ and are shared.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import alternate
import jax
import jax.numpy as jnp
import limit
import ours
from alternate import Case

CASE = Case("configs/e2e_small.py:faithful", batch=32, steps=10)
BOUNDS = {"training step": 6.0, "10 reverse steps": 4.5}  # about 3 times the usual


def products(config: Any, operations: float) -> Callable[[], Any]:
    """Products in float32 of so many operations."""
    m, k, n = limit.shapes(config)["up"]
    x, w = jnp.ones((m, k)), jnp.full((k, n), 1e-3)
    times = max(1, round(operations / (4 * m * k * n)))

    def run(x: Any, w: Any) -> Any:
        for _ in range(times):
            x = (x @ w) @ w.T
        return x

    return partial(jax.jit(run), x, w)


def seconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def main() -> None:
    """Prints ratios of interleaved calls; status 1 beyond the bounds."""
    config = alternate.settings(CASE)
    forward = limit.operations(config, CASE.vocab)
    work = {
        "training step": (ours.Training(CASE), 3 * forward),
        "10 reverse steps": (ours.chain(CASE._replace(job="chain")), 10 * forward),
    }
    slow = False
    for name, (run, operations) in work.items():
        reference = products(config, operations)
        for warm in (run, reference):
            seconds(warm)
        pairs = [(seconds(run), seconds(reference)) for _ in range(9)]
        ratio = statistics.median(a / b for a, b in pairs)
        slow |= ratio > BOUNDS[name]
        print(f"{name}: {ratio:.2f} times its products (bound {BOUNDS[name]})")
    sys.exit(int(slow))


if __name__ == "__main__":
    main()
