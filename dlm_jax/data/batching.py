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
from dlm_jax.types import PAD


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
    lengths: np.ndarray | None = None,
) -> np.ndarray:
    """Returns this host's row indices [batch // hosts], of n rows, in a step's batch.

    A pure function of its arguments. Each epoch has its own permutation. A batch may
    span epochs, so every row occurs once per epoch. Host h takes the h-th of `hosts`
    equal slices of the batch. lengths [n]: of all rows; a batch then has rows of
    similar length. Raises UserError if `hosts` does not divide `batch`.
    """
    if batch % hosts:
        raise UserError(
            f"batch {batch} is not divisible by {hosts} hosts: "
            f"set the batch size to a multiple of {hosts}"
        )
    share = batch // hosts
    if lengths is not None:
        return _rows_by_length(lengths, seed, step, batch).reshape(hosts, -1)[host]
    epochs, index = np.divmod(step * batch + host * share + np.arange(share), n)
    rows = [
        _permutation(seed, epoch, n)[index[epochs == epoch]]
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
    ]
    return np.concatenate(rows)


class Windows:
    """Every window of l tokens in rows [n l] that continue each other.

    Window i begins at token i, so a row may begin anywhere in the text. Indexing reads
    windows, as rows of an array.
    """

    def __init__(self, rows: Any):
        self.rows = rows
        self.length = np.shape(rows[:1])[1]

    def __len__(self) -> int:
        return (len(self.rows) - 1) * self.length + 1

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns the windows of an index array: [... l]."""
        index = np.asarray(index)
        row, offset = np.divmod(index, self.length)
        both = np.minimum(np.stack([row, row + 1], -1), len(self.rows) - 1)
        tokens = self.rows[both].reshape(*index.shape, 2 * self.length)
        at = offset[..., None] + np.arange(self.length)
        return np.take_along_axis(tokens, at, -1)


WINDOW = 16  # steps whose rows are sorted by length together


def _rows_by_length(
    lengths: np.ndarray, seed: int, step: int, batch: int
) -> np.ndarray:
    """Returns the row indices [batch] of a step's batch, rows of similar length.

    The rows of WINDOW steps are sorted by length and dealt to these steps in random
    order, so every row still occurs once per epoch.
    """
    window = step // WINDOW
    rows = _window(len(lengths), seed, window, batch)
    rows = rows[np.argsort(lengths[rows], kind="stable")].reshape(WINDOW, batch)
    order = np.random.default_rng((seed % 2**64, window, 1)).permutation(WINDOW)
    return rows[order[step % WINDOW]]


@lru_cache(maxsize=2)
def _window(n: int, seed: int, window: int, batch: int) -> np.ndarray:
    steps = range(window * WINDOW, (window + 1) * WINDOW)
    return np.concatenate(
        [batch_index(n, seed=seed, step=s, batch=batch) for s in steps]
    )


def row_lengths(rows: Any) -> np.ndarray:
    """Returns the number of tokens of each row, PAD not counted. Raises UserError."""
    if not isinstance(rows, np.ndarray):
        raise UserError(
            "config.model.known_length needs the text in memory: set it to False, or "
            "config.data.source to the text's own source instead of prepared"
        )
    return np.sum(rows != PAD, -1)


def count_lengths(rows: Any) -> tuple[int, ...]:
    """Returns the number of rows of 0, 1, ... tokens, PAD not counted."""
    return tuple(np.bincount(row_lengths(rows)).tolist())


def row_widths(lengths: np.ndarray, longest: int) -> tuple[int, ...]:
    """Returns the few widths that rows are cut to: compilation is needed for each.

    Multiples of 4 at the median and the 85th percentile of the lengths, and `longest`.
    """
    cuts = 4 * np.ceil(np.quantile(lengths, (0.5, 0.85)) / 4).astype(int)
    return tuple(sorted({min(int(c), longest) for c in cuts} | {longest}))


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
