# SPDX-License-Identifier: Apache-2.0
"""FUDGE (arXiv:2104.05218): an autoregressive model whose tokens a classifier weighs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dlm_jax.diffusion import autoregressive
from dlm_jax.diffusion.model import Params
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.types import PAD, Ids, PerExample, PRNGKeys


def fudge(
    keys: PRNGKeys,
    params: Params,
    cfg: DenoiserConfig,
    length: int,
    log_prob: Callable[[Ids], PerExample],
    *,
    weight: float = 1.0,
    top: int = 20,
) -> Ids:
    """Ids [b length], each token by p(w | before) p(c | before, w)^weight.

    log_prob: of the condition given the tokens so far, PAD after them, nats [b]. Of the
    `top` likeliest tokens alone (FUDGE, arXiv:2104.05218).
    """
    start, _ = autoregressive.start_ids(keys.shape[0], length, None)
    b = keys.shape[0]

    def step(ids: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        scores = autoregressive.trunk_output(params, cfg, ids, head=True)[:, i - 1]
        nats, words = jax.lax.top_k(jax.nn.log_softmax(scores), top)
        tried = jnp.repeat(ids[:, None], top, 1).at[:, :, i].set(words)
        wanted = log_prob(tried.reshape(b * top, length)).reshape(b, top)
        here = jax.vmap(lambda k: jax.random.fold_in(k, i))(keys)
        place = jax.vmap(jax.random.categorical)(here, nats + weight * wanted)
        drawn = jnp.take_along_axis(words, place[:, None], 1)[:, 0]
        return ids.at[:, i].set(
            jnp.where(autoregressive.is_over(ids[:, i - 1]), PAD, drawn)
        ), None

    return jax.lax.scan(step, start, jnp.arange(1, length))[0]
