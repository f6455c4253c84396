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

import jax
import jax.numpy as jnp
import limit
from lib import alternate, ours
from lib.alternate import Case

from dlm_jax.main import large_pages
from dlm_jax.nn import ops
from dlm_jax.nn.transformer import DTYPES

CASES = {
    "post_ln": Case("configs/e2e_small.py:faithful", batch=32, num_steps=10),
    "adaln": Case("configs/e2e_small.py", batch=32, num_steps=10),
}
# {case: (training step, reverse steps)}, about 3 times the usual
BOUNDS = {"post_ln": (4.5, 3.5), "adaln": (6.5, 5.0)}


def products(config: Any, operations: float) -> Callable[[], Any]:
    """Products in the config's precision of so many operations."""
    (m, k, n), kind = limit.shapes(config)["up"], DTYPES[config.model.dtype][0]
    x, w = jnp.ones((m, k)), jnp.full((k, n), 1e-3)
    times = max(1, round(operations / (4 * m * k * n)))

    def one(x: Any, w: Any) -> Any:
        return ops.matmul(x, w, kind, "float32")

    def run(x: Any, w: Any) -> Any:
        for _ in range(times):
            x = one(one(x, w), w.T)
        return x

    return partial(jax.jit(run), x, w)


def seconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def main() -> None:
    """Prints ratios of interleaved calls; status 1 beyond the bounds."""
    slow = [check(name, case) for name, case in CASES.items()]
    sys.exit(int(any(slow)))


def check(name: str, case: Case) -> bool:
    """Prints a case's ratios; whether one is beyond its bound."""
    config, slow = alternate.settings(case), False
    forward = limit.operations(config, case.vocab)
    passes = 4 if config.model.self_cond else 3
    work = {
        "training step": (ours.Training(config, case.vocab), passes * forward),
        "10 reverse steps": (ours.chain(case._replace(job="chain")), 10 * forward),
    }
    for (what, (run, operations)), bound in zip(
        work.items(), BOUNDS[name], strict=True
    ):
        reference = products(config, operations)
        for warm in (run, reference):
            seconds(warm)
        pairs = [(seconds(run), seconds(reference)) for _ in range(9)]
        ratio = statistics.median(a / b for a, b in pairs)
        slow |= ratio > bound
        print(f"{name}, {what}: {ratio:.2f} times its products (bound {bound})")
    return slow


if __name__ == "__main__":
    large_pages()
    main()
