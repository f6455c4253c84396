# SPDX-License-Identifier: Apache-2.0
"""Scores of texts: the bound on -log p, and an autoregressive model's features."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.data import batching
from dlm_jax.diffusion import autoregressive, likelihood, losses, model
from dlm_jax.diffusion.model import Params
from dlm_jax.inference.trained_model import TrainedModel
from dlm_jax.runtime import sharding
from dlm_jax.types import PAD, Array, Ids, PyTree

BATCH = 256  # rows scored at once
REPEATS, MAX_DRAWS = 8, 2**16  # per text: the least estimates, the most noise levels
MAX_ROWS = 2**16  # of one round of estimates

# (key, params, ids [b l]) -> arrays [b ...]
Score = Callable[[jax.Array, Params, Ids], PyTree]


class EstimatedBound(likelihood.Bound):
    """Estimates of the named terms of each text [n], nats, with their standard error.

    stderr [n]: of `total()`, in nats, over the draws of the noise. It is 0 if -log p is
    exact, nan with a single draw. tokens [n l]: the share of each token in the terms
    but that of the length, nats.
    """

    stderr: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(
        cls, terms: likelihood.Bound, stderr: np.ndarray, tokens: np.ndarray
    ) -> "EstimatedBound":
        """Returns the terms with a standard error, and the share of each token."""
        made = cls(*terms)
        made.stderr, made.tokens = stderr, tokens
        return made


def make_nll(lm: TrainedModel, draws: int) -> Score:
    """Returns (Bound, stderr, tokens): the bound on -log p of each row, as `EstimatedBound`.

    In nats. An autoregressive model's is exact. Of a pair it is that of the target given
    the source.
    """

    def exact(key: jax.Array, params: Params, ids: Ids) -> PyTree:
        nats = autoregressive.nll(params, lm.cfg, ids)
        if lm.cfg.known_source:
            nats = jnp.where(model.source(ids), 0.0, nats)
        total = jnp.sum(nats, -1)
        zero = 0.0 * total
        return likelihood.Bound(zero, zero, total, zero), zero, nats

    def bound(key: jax.Array, params: Params, ids: Ids) -> PyTree:
        sigma_0 = losses.sigma_0(lm.config["loss"]["objective"], lm.schedule)
        predict = likelihood.latent_predictor(
            params, lm.cfg, lm.schedule, sigma_0=sigma_0
        )
        options = {"draws": draws, "given": model.given_tokens(ids, lm.cfg)}
        by_token, profile = likelihood.bound_by_token(
            key, ids, params.table, predict, lm.schedule, **options
        )
        stderr, nats = likelihood.profile_stderr(profile), by_token.total()
        terms = by_token.bound()
        if not lm.cfg.known_length:
            return terms, stderr, nats
        counts = jnp.asarray(lm.lengths + (0,) * (lm.length + 1 - len(lm.lengths)))
        share = (counts + 0.01) / jnp.sum(counts + 0.01)  # unseen lengths are possible
        tokens = jnp.sum(jnp.asarray(ids) != PAD, -1)
        return terms._replace(length=-jnp.log(share[tokens])), stderr, nats

    return exact if lm.cfg.causal else bound


def nll(
    key: jax.Array, lm: TrainedModel, ids: Ids, draws: int, tolerance: float | None
) -> EstimatedBound:
    """Estimates the bound of each row of ids [n l], until its error is at most tolerance.

    draws: noise levels per estimate. Without a tolerance there is one estimate per row.
    """

    def estimate(key: jax.Array, rows: Ids) -> tuple[likelihood.Bound, Any, Any]:
        return by_batches(key, lm, ("nll", draws), lambda: make_nll(lm, draws), rows)

    if tolerance is None or lm.cfg.causal:
        return EstimatedBound.of(*estimate(key, ids))
    # sums over the estimates of each text: the terms, total^2 and stderr^2; the tokens
    sums, open_, done = np.zeros((6, len(ids))), np.arange(len(ids)), 0
    by_token = np.zeros(np.shape(ids))
    error, counts = np.full(len(ids), np.inf), np.zeros(len(ids))
    while len(open_):
        room = max(REPEATS, MAX_ROWS // len(open_))
        repeats = min(max(REPEATS, done), room)
        terms, stderr, tokens = estimate(
            jax.random.fold_in(key, done), np.repeat(ids[open_], repeats, 0)
        )
        values = np.stack([*terms, terms.total() ** 2, stderr**2]).astype(np.float64)
        sums[:, open_] += values.reshape(6, len(open_), repeats).sum(-1)
        by_token[open_] += tokens.reshape(len(open_), repeats, -1).sum(1)
        done += repeats
        counts[open_] = done
        means = sums[:, open_] / done
        between = (means[4] - means[:4].sum(0) ** 2) * done / (done - 1)
        error[open_] = np.sqrt(np.fmax(between, means[5]) / done)
        open_ = open_[(error[open_] > tolerance) & (done * draws < MAX_DRAWS)]
    terms = likelihood.Bound(*(sums[:4] / counts).astype(np.float32))
    by_token = (by_token / counts[:, None]).astype(np.float32)
    return EstimatedBound.of(terms, error.astype(np.float32), by_token)


def features(lm: TrainedModel, ids: Ids) -> np.ndarray:
    """Returns an autoregressive model's mean hidden state of each row [n h]."""

    def score(key: jax.Array, params: Params, ids: Ids) -> Array:
        return autoregressive.features(params, lm.cfg, ids)

    return by_batches(jax.random.key(0), lm, "features", lambda: score, ids)


def by_batches(
    key: jax.Array, lm: TrainedModel, name: Any, make: Callable[[], Score], ids: Ids
) -> PyTree:
    """Scores all rows of ids [n l], up to BATCH at a time, each batch with its own key.

    name, make: of the compiled score. Batches have few sizes, for few compilations.
    """
    size = min(BATCH, 1 << (len(ids) - 1).bit_length())
    score = lm.cached((name, size, ids.shape[1]), make)
    parts = []
    for i, (rows, mask) in enumerate(batching.batches(np.asarray(ids), size)):
        out = score(jax.random.fold_in(key, i), lm.ema, sharding.shard_rows(rows))
        out = sharding.gather_to_host(out)
        parts.append(jax.tree.map(lambda x, m=mask: x[m > 0], out))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)
