# SPDX-License-Identifier: Apache-2.0
"""Compares the data loader with Grain: microseconds per batch of shuffled rows.

    pip install grain
    python benchmarks/loader_grain.py

Both return any batch of any epoch from (seed, step), so both resume exactly. Grain
calls Python once per row, `batching.batch_index` once per batch. docs/performance.md
holds the figures and the conclusion.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import grain  # pyright: ignore[reportMissingImports]
import numpy as np

from dlm_jax.data import batching

ROWS, LENGTH, BATCH = 190_000, 32, 64  # those of the quickstart


def microseconds(batch_of: Callable[[int], np.ndarray], batches: int) -> float:
    """Returns the mean microseconds per batch."""
    began = time.perf_counter()
    for step in range(batches):
        batch_of(step)
    return (time.perf_counter() - began) / batches * 1e6


def main() -> None:
    """Prints the medians of interleaved repetitions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    ids = np.random.default_rng(0).integers(0, 800, (ROWS, LENGTH)).astype(np.int32)
    shuffled = grain.MapDataset.source(ids).seed(1).shuffle().repeat().batch(BATCH)

    def ours(step: int) -> np.ndarray:
        return ids[batching.batch_index(ROWS, seed=1, step=step, batch=BATCH)]

    loaders = {"ours": ours, "grain": lambda step: shuffled[step]}
    times = {name: [] for name in loaders}
    for _ in range(args.repeats):
        for name, batch_of in loaders.items():
            times[name].append(microseconds(batch_of, args.batches))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:6s}{value:10.1f} us per batch of {BATCH}")
    print(f"grain / ours {medians['grain'] / medians['ours']:.0f}")


if __name__ == "__main__":
    main()
