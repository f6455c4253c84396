# SPDX-License-Identifier: Apache-2.0
"""Scores of texts: the bound on -log p, and an autoregressive model's features."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.data import batching
from dlm_jax.diffusion import (
    autoregressive,
    likelihood,
    losses,
    model,
    ode_likelihood,
)
from dlm_jax.diffusion.model import Params
from dlm_jax.errors import UserError, choose
from dlm_jax.inference.trained_model import TrainedModel
from dlm_jax.ranges import integer
from dlm_jax.runtime import sharding
from dlm_jax.types import PAD, Array, Ids, Integer, PyTree

BATCH, ODE_BATCH = 256, 32  # rows scored at once; a derivative takes more memory
REPEATS, MAX_DRAWS = 8, 2**16  # per text: the least estimates, the most noise levels
ODE_STEPS = 32
MAX_ROWS = 2**16  # of one round of estimates

# (key, params, ids [b l]) -> arrays [b ...]
Score = Callable[[jax.Array, Params, Ids], PyTree]


class Estimator(NamedTuple):
    """How -log p is estimated, from `draws` draws of the noise.

    name: "variational" (`likelihood.bound`), "ode" (`ode_likelihood.bound`, with
    num_steps steps) or "exact", which an autoregressive model's is.
    """

    name: str
    draws: int
    num_steps: int = 0


def choose_estimator(
    lm: TrainedModel, name: Any, draws: Integer, num_steps: Integer | None
) -> Estimator:
    """Returns an estimator of a diffusion model, or "exact" of others. Raises UserError."""
    choose("estimator", dict.fromkeys(("variational", "ode")), name)
    draws = integer("draws", draws, 1, 2**31 - 1)
    if name == "ode" and lm.cfg.causal:
        raise UserError(
            "estimator='ode': -log p of an autoregressive model is exact; leave it out"
        )
    if name == "ode":
        steps = (
            ODE_STEPS
            if num_steps is None
            else integer("num_steps", num_steps, 2, 2**16)
        )
        return Estimator(name, draws, steps)
    if num_steps is not None:
        raise UserError(f"num_steps={num_steps}: it needs estimator='ode'")
    return Estimator("exact" if lm.cfg.causal else name, draws)


class EstimatedBound(likelihood.Bound):
    """Estimates of the named terms of each text [n], nats, with their standard error.

    estimator: see `Estimator`. stderr [n]: of `total()`, in nats, over the draws of the
    noise. It is 0 if -log p is exact, nan with a single draw. tokens [n l]: the share of
    each token in the terms but that of the length, nats; nan by the ODE.
    """

    stderr: np.ndarray
    tokens: np.ndarray
    estimator: str

    @classmethod
    def of(
        cls,
        terms: likelihood.Bound,
        stderr: np.ndarray,
        tokens: np.ndarray,
        estimator: str,
    ) -> "EstimatedBound":
        """Returns the terms with the other fields."""
        made = cls(*terms)
        made.stderr, made.tokens, made.estimator = stderr, tokens, estimator
        return made


def make_nll(lm: TrainedModel, how: Estimator) -> Score:
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
        given, arrays = model.given_tokens(ids, lm.cfg), (ids, params.table)
        options: Any = {"draws": how.draws, "given": given}
        if how.name == "ode":
            terms, stderr = ode_likelihood.bound(
                key, *arrays, predict, lm.schedule, num_steps=how.num_steps, **options
            )
            nats = jnp.full(ids.shape, jnp.nan)
        else:
            by_token, profile = likelihood.bound_by_token(
                key, *arrays, predict, lm.schedule, **options
            )
            terms, nats = by_token.bound(), by_token.total()
            stderr = likelihood.profile_stderr(profile)
        if not lm.cfg.known_length:
            return terms, stderr, nats
        counts = jnp.asarray(lm.lengths + (0,) * (lm.length + 1 - len(lm.lengths)))
        share = (counts + 0.01) / jnp.sum(counts + 0.01)  # unseen lengths are possible
        tokens = jnp.sum(jnp.asarray(ids) != PAD, -1)
        return terms._replace(length=-jnp.log(share[tokens])), stderr, nats

    return exact if how.name == "exact" else bound


def nll(
    key: jax.Array, lm: TrainedModel, ids: Ids, how: Estimator, tolerance: float | None
) -> EstimatedBound:
    """Estimates the bound of each row of ids [n l], until its error is at most tolerance.

    Without a tolerance there is one estimate per row.
    """
    batch = ODE_BATCH if how.name == "ode" else BATCH

    def estimate(key: jax.Array, rows: Ids) -> tuple[likelihood.Bound, Any, Any]:
        def make() -> Score:
            return make_nll(lm, how)

        return by_batches(key, lm, ("nll", how), make, rows, batch=batch)

    if tolerance is None or how.name == "exact":
        return EstimatedBound.of(*estimate(key, ids), how.name)
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
        open_ = open_[(error[open_] > tolerance) & (done * how.draws < MAX_DRAWS)]
    terms = likelihood.Bound(*(sums[:4] / counts).astype(np.float32))
    by_token = (by_token / counts[:, None]).astype(np.float32)
    return EstimatedBound.of(terms, error.astype(np.float32), by_token, how.name)


def features(lm: TrainedModel, ids: Ids) -> np.ndarray:
    """Returns an autoregressive model's mean hidden state of each row [n h]."""

    def score(key: jax.Array, params: Params, ids: Ids) -> Array:
        return autoregressive.features(params, lm.cfg, ids)

    return by_batches(jax.random.key(0), lm, "features", lambda: score, ids)


def by_batches(
    key: jax.Array,
    lm: TrainedModel,
    name: Any,
    make: Callable[[], Score],
    ids: Ids,
    *,
    batch: int = BATCH,
) -> PyTree:
    """Scores all rows of ids [n l], up to batch at a time, each batch with its own key.

    name, make: of the compiled score. Batches have few sizes, for few compilations.
    """
    size = min(batch, 1 << (len(ids) - 1).bit_length())
    score = lm.cached((name, size, ids.shape[1]), make)
    parts = []
    for i, (rows, mask) in enumerate(batching.batches(np.asarray(ids), size)):
        out = score(jax.random.fold_in(key, i), lm.ema, sharding.shard_rows(rows))
        out = sharding.gather_to_host(out)
        parts.append(jax.tree.map(lambda x, m=mask: x[m > 0], out))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)
