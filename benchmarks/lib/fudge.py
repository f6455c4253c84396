# SPDX-License-Identifier: Apache-2.0
"""FUDGE (arXiv:2104.05218): autoregressive sampling weighted by a classifier."""

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
    """Samples ids [b length], each token from p(w | before) p(c | before, w)^weight.

    log_prob: log p(c | tokens so far) [b] in nats, of ids with PAD after these tokens.
    Only the `top` most likely tokens are considered.
    """
    start, _ = autoregressive.start_ids(keys.shape[0], length, None)
    b = keys.shape[0]

    def step(ids: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        scores = autoregressive.trunk_output(params, cfg, ids, head=True)[:, i - 1]
        nats, words = jax.lax.top_k(jax.nn.log_softmax(scores), top)
        tried = jnp.repeat(ids[:, None], top, 1).at[:, :, i].set(words)
        condition = log_prob(tried.reshape(b * top, length)).reshape(b, top)
        token_keys = jax.vmap(lambda k: jax.random.fold_in(k, i))(keys)
        choice = jax.vmap(jax.random.categorical)(token_keys, nats + weight * condition)
        drawn = jnp.take_along_axis(words, choice[:, None], 1)[:, 0]
        return ids.at[:, i].set(
            jnp.where(autoregressive.is_over(ids[:, i - 1]), PAD, drawn)
        ), None

    return jax.lax.scan(step, start, jnp.arange(1, length))[0]
