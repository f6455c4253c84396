# SPDX-License-Identifier: Apache-2.0
"""Guards against regressions of speed in one minute: steps against plain products.

    python benchmarks/quick.py

The reference performs the step's number of operations as matrix products of its largest
shape, in the same process. A step takes a few times as long. A ratio above BOUNDS is a
regression and exits with status 1. The bounds are wide because machines differ.
"""

import argparse
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
# {case: (training step, reverse steps)}, about 3 times the usual ratio
BOUNDS = {"post_ln": (4.5, 3.5), "adaln": (6.5, 5.0)}


def products(config: Any, operations: float) -> Callable[[], Any]:
    """Returns products in the config's precision with that number of operations."""
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
    """Measures one call."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def main() -> None:
    """Prints the ratios of interleaved calls; exits with 1 above a bound."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    slow = [check(name, case) for name, case in CASES.items()]
    sys.exit(int(any(slow)))


def check(name: str, case: Case) -> bool:
    """Prints a case's ratios; returns whether one exceeds its bound."""
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
