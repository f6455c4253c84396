# SPDX-License-Identifier: Apache-2.0
"""Batches of rows, in an order that depends only on the seed and the step."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from dlm_jax.data import array_record
from dlm_jax.errors import UserError


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    rows = np.arange(n, dtype=np.uint32 if n < 2**32 else np.uint64)
    return np.random.default_rng((seed % 2**64, epoch)).permutation(rows)


def batch_index(
    n: int,
    *,
    seed: int,
    step: int,
    batch: int,
    host: int = 0,
    hosts: int = 1,
) -> np.ndarray:
    """Returns this host's row indices [batch // hosts], of n rows, in a step's batch.

    A pure function of its arguments. Each epoch has its own permutation. A batch may
    span epochs, so every row occurs once per epoch. Host h takes the h-th of `hosts`
    equal slices of the batch. Raises UserError if `hosts` does not divide `batch`.
    """
    if batch % hosts:
        raise UserError(
            f"batch {batch} is not divisible by {hosts} hosts: "
            f"set the batch size to a multiple of {hosts}"
        )
    share = batch // hosts
    epochs, index = np.divmod(step * batch + host * share + np.arange(share), n)
    rows = [
        _permutation(seed, epoch, n)[index[epochs == epoch]]
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
    ]
    return np.concatenate(rows)


def batches(
    ids: Int32[np.ndarray, "n l"] | array_record.ArrayRecordDataset, batch: int
) -> Iterator[tuple[Int32[np.ndarray, "b l"], Float32[np.ndarray, " b"]]]:
    """Yields all rows in order, as (ids [b l], mask [b]), for evaluation.

    The last batch is filled up with the first rows, whose mask is 0.
    """
    for start in range(0, len(ids), batch):
        index = np.arange(start, start + batch)
        yield ids[index % len(ids)], (index < len(ids)).astype(np.float32)


class Prefetcher:
    """Computes make(step) of the next `depth` steps ahead, in a background thread."""

    def __init__(self, make: Callable[[int], Any], steps: range, depth: int = 2):
        self.make, self.left = make, iter(steps)
        self.pool = ThreadPoolExecutor(1)
        self.due = deque(self.pool.submit(make, s) for s in islice(self.left, depth))

    def __call__(self) -> Any:
        """Returns make(step) of the next step."""
        for step in islice(self.left, 1):
            self.due.append(self.pool.submit(self.make, step))
        return self.due.popleft().result()

    def close(self) -> None:
        """Cancels what is pending and ends the thread."""
        self.pool.shutdown(cancel_futures=True)
