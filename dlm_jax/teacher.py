# SPDX-License-Identifier: Apache-2.0
"""The autoregressive teacher: the denoiser's blocks, causal, over clean embeddings.

Trained by the same loop (objective "ar"); it scores texts, and is the baseline of every
likelihood: its nats are exact. The first token of a row, START, is given.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dlm_jax import denoiser, rounding
from dlm_jax.denoiser import DenoiserConfig
from dlm_jax.embedding import embed
from dlm_jax.model import Params
from dlm_jax.types import END, PAD, START, Array, Ids, Logits, PRNGKeys


def hidden(
    params: Params, cfg: DenoiserConfig, ids: Ids, *, head: bool = False
) -> Array:
    """The trunk's output [b l h], or with the head its logits of the next ids [b l v]."""
    x = embed(params.table, ids)
    vocab, t = params.table.shape[0], jnp.zeros(ids.shape[0])
    return denoiser.apply(
        params.denoiser, cfg, vocab, x, t, jnp.zeros_like(x), head=head
    )


def nll(params: Params, cfg: DenoiserConfig, ids: Ids) -> Float[Array, "b l"]:
    """-log p(id | the ids before it), nats; 0 for the first of a row."""
    ids = jnp.asarray(ids)
    scores: Logits = hidden(params, cfg, ids, head=True)
    return jnp.pad(rounding.nll(scores[:, :-1], ids[:, 1:]), ((0, 0), (1, 0)))


def features(params: Params, cfg: DenoiserConfig, ids: Ids) -> Float[Array, "b h"]:
    """The trunk's output, mean over the tokens that are not PAD."""
    real = (jnp.asarray(ids) != PAD)[..., None]
    states = hidden(params, cfg, ids)
    return jnp.sum(states * real, 1) / jnp.maximum(jnp.sum(real, 1), 1)


def sample(keys: PRNGKeys, params: Params, cfg: DenoiserConfig, length: int) -> Ids:
    """Ids [b length] by ancestral sampling, one token after the other; PAD after END."""
    count = keys.shape[0]
    start = jnp.full((count, length), PAD).at[:, 0].set(START)

    def step(ids: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        scores = hidden(params, cfg, ids, head=True)[:, i - 1]
        here = jax.vmap(lambda k: jax.random.fold_in(k, i))(keys)
        drawn = jax.vmap(jax.random.categorical)(here, scores)
        over = (ids[:, i - 1] == END) | (ids[:, i - 1] == PAD)
        return ids.at[:, i].set(jnp.where(over, PAD, drawn)), None

    return jax.lax.scan(step, start, jnp.arange(1, length))[0]
