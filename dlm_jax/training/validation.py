# SPDX-License-Identifier: Apache-2.0
"""The loss on held-out sequences during training."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.data import batching
from dlm_jax.data.array_record import ArrayRecordDataset
from dlm_jax.runtime import sharding
from dlm_jax.training.train_step import StepConfig, loss_fn, make_draws
from dlm_jax.types import Array, Ids, PyTree


class Validation:
    """The loss of the averaged weights on held-out sequences, without dropout.

    Every call uses the same noise. An adaptive run is judged under the schedule that it
    began with, so that its losses can be compared.
    """

    def __init__(
        self, ids: np.ndarray | ArrayRecordDataset, step_cfg: StepConfig, batches: int
    ):
        size = min(step_cfg.batch, len(ids))
        self.step_cfg = step_cfg._replace(
            batch=size,
            time_sampler="low_discrepancy",
            conditioning_prob=0.0,
            source_drop_prob=0.0,
        )
        rows = itertools.islice(batching.batches(ids, size), batches)
        self.batches = [sharding.shard_rows(row) for row in rows]
        self.run = jax.jit(self._batch)

    def _batch(self, params: PyTree, number: Array, ids: Ids, mask: Array) -> PyTree:
        key = jax.random.fold_in(jax.random.key(0), number)
        draws = make_draws(key, ids, self.step_cfg, 0, ())
        _, terms = loss_fn(params, ids, draws, self.step_cfg)
        named = {"loss": terms.total(), **terms._asdict()}
        del named["weight"]
        return {k: jnp.sum(v * mask) for k, v in named.items()} | {"n": jnp.sum(mask)}

    def __call__(self, params: PyTree) -> dict[str, float]:
        """Returns the loss and its named terms, means over the sequences."""
        sums = [self.run(params, i, *b) for i, b in enumerate(self.batches)]
        total = jax.tree.map(lambda *x: float(sum(x)), *jax.device_get(sums))
        n = total.pop("n")
        return {name: value / n for name, value in total.items()}
