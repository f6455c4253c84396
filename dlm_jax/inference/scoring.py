# SPDX-License-Identifier: Apache-2.0
"""Scores of texts: the bound on -log p, and an autoregressive model's features."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.data import batching
from dlm_jax.diffusion import autoregressive, likelihood, losses
from dlm_jax.diffusion.model import Params
from dlm_jax.inference.trained_model import TrainedModel
from dlm_jax.runtime import sharding
from dlm_jax.types import PAD, Array, Ids, PyTree

BATCH = 256  # rows scored at once

# (key, params, ids [b l]) -> arrays [b ...]
Score = Callable[[jax.Array, Params, Ids], PyTree]


def make_nll(lm: TrainedModel, draws: int) -> Score:
    """Returns the bound on -log p of each row, nats; exact if autoregressive."""

    def exact(key: jax.Array, params: Params, ids: Ids) -> likelihood.Bound:
        nats = jnp.sum(autoregressive.nll(params, lm.cfg, ids), -1)
        return likelihood.Bound(0.0 * nats, 0.0 * nats, nats, 0.0 * nats)

    def bound(key: jax.Array, params: Params, ids: Ids) -> likelihood.Bound:
        sigma_0 = losses.sigma_0(lm.config["loss"]["objective"], lm.schedule)
        predict = likelihood.latent_predictor(
            params, lm.cfg, lm.schedule, sigma_0=sigma_0
        )
        known = lm.cfg.known_length
        options = {"draws": draws, "known_length": known}
        terms, _ = likelihood.bound(
            key, ids, params.table, predict, lm.schedule, **options
        )
        if not known:
            return terms
        counts = jnp.asarray(lm.lengths + (0,) * (lm.length + 1 - len(lm.lengths)))
        share = (counts + 0.01) / jnp.sum(counts + 0.01)  # unseen lengths are possible
        tokens = jnp.sum(jnp.asarray(ids) != PAD, -1)
        return terms._replace(length=-jnp.log(share[tokens]))

    return exact if lm.cfg.causal else bound


def make_features(lm: TrainedModel) -> Score:
    """Returns an autoregressive model's mean hidden state of each row [b h]."""

    def features(key: jax.Array, params: Params, ids: Ids) -> Array:
        return autoregressive.features(params, lm.cfg, ids)

    return features


def by_batches(key: jax.Array, score: Score, params: Params, ids: Ids) -> PyTree:
    """Scores all rows of ids [n l], BATCH at a time, each batch with its own key."""
    batches, parts = batching.batches(np.asarray(ids), min(len(ids), BATCH)), []
    for i, (rows, mask) in enumerate(batches):
        out = score(jax.random.fold_in(key, i), params, sharding.shard_rows(rows))
        out = sharding.gather_to_host(out)
        parts.append(jax.tree.map(lambda x, m=mask: x[m > 0], out))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)
