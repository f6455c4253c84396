# SPDX-License-Identifier: Apache-2.0
"""The autoregressive baseline: the denoiser's blocks, causal, on clean embeddings.

It is trained by the same loop (objective "ar"). Its likelihood is exact, so it scores
texts and is the baseline for every bound. The first token of a row is START.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from dlm_jax.diffusion import rounding
from dlm_jax.diffusion.embedding import embed
from dlm_jax.diffusion.model import Params
from dlm_jax.nn import transformer
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.types import END, PAD, START, Array, Ids, Logits, PRNGKeys

Prefix = Int[Array, "b k"]


def trunk_output(
    params: Params, cfg: DenoiserConfig, ids: Ids, *, head: bool = False
) -> Array:
    """Computes the trunk's output [b l h], or with head the next token's logits [b l v]."""
    x = embed(params.table, ids)
    vocab, t = params.table.shape[0], jnp.zeros(ids.shape[0])
    return transformer.apply(
        params.denoiser, cfg, vocab, x, t, jnp.zeros_like(x), head=head
    )


def nll(params: Params, cfg: DenoiserConfig, ids: Ids) -> Float[Array, "b l"]:
    """Computes -log p(id | earlier ids) in nats [b l]; 0 for the first of a row."""
    ids = jnp.asarray(ids)
    scores: Logits = trunk_output(params, cfg, ids, head=True)
    return jnp.pad(rounding.nll(scores[:, :-1], ids[:, 1:]), ((0, 0), (1, 0)))


def features(params: Params, cfg: DenoiserConfig, ids: Ids) -> Float[Array, "b h"]:
    """Computes the trunk's output, averaged over the tokens that are not PAD [b h]."""
    real = (jnp.asarray(ids) != PAD)[..., None]
    states = trunk_output(params, cfg, ids)
    return jnp.sum(states * real, 1) / jnp.maximum(jnp.sum(real, 1), 1)


def sample(
    keys: PRNGKeys,
    params: Params,
    cfg: DenoiserConfig,
    length: int,
    *,
    prefix: Prefix | None = None,
) -> Ids:
    """Samples ids [b length] token by token, with PAD after END.

    prefix [b k]: the first tokens, starting with START; PAD ends a shorter one.
    """
    start, given = start_ids(keys.shape[0], length, prefix)

    def step(ids: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        scores = trunk_output(params, cfg, ids, head=True)[:, i - 1]
        here = jax.vmap(lambda k: jax.random.fold_in(k, i))(keys)
        drawn = jax.vmap(jax.random.categorical)(here, scores)
        drawn = jnp.where(is_over(ids[:, i - 1]), PAD, drawn)
        return ids.at[:, i].set(jnp.where(given[:, i], ids[:, i], drawn)), None

    return jax.lax.scan(step, start, jnp.arange(1, length))[0]


def beam_search(
    params: Params, cfg: DenoiserConfig, length: int, *, prefix: Prefix, beams: int = 4
) -> Ids:
    """Returns the most likely ids [b length] that a beam search finds for each prefix."""
    start, given = start_ids(len(prefix), length, prefix)
    b, vocab = len(prefix), params.table.shape[0]
    # the beams start as copies, so only one may be extended first
    nats = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf) + jnp.zeros((b, 1))

    def step(carry: tuple, i: jax.Array) -> tuple[tuple, None]:
        ids, nats = carry  # [b beams length], [b beams]
        last = ids[:, :, i - 1]
        scores = trunk_output(params, cfg, ids.reshape(b * beams, -1), head=True)[
            :, i - 1
        ]
        more = jax.nn.log_softmax(scores).reshape(b, beams, vocab)
        pad = jnp.where(jnp.arange(vocab) == PAD, 0.0, -jnp.inf)
        more = jnp.where(is_over(last)[..., None], pad, more)
        known = jnp.where(jnp.arange(vocab) == ids[:, :, i, None], 0.0, -jnp.inf)
        more = jnp.where(given[:, None, i, None], known, more)
        best, place = jax.lax.top_k((nats[..., None] + more).reshape(b, -1), beams)
        kept = jnp.take_along_axis(ids, (place // vocab)[..., None], 1)
        return (kept.at[:, :, i].set(place % vocab), best), None

    beam = jnp.repeat(start[:, None], beams, 1)
    (ids, nats), _ = jax.lax.scan(step, (beam, nats), jnp.arange(1, length))
    return ids[jnp.arange(b), jnp.argmax(nats, -1)]


def start_ids(count: int, length: int, prefix: Any) -> tuple[jax.Array, jax.Array]:
    """Returns (ids, mask of the given ones) [count length]: START or prefix, then PAD."""
    ids = jnp.full((count, length), PAD).at[:, 0].set(START)
    if prefix is not None:
        ids = ids.at[:, : prefix.shape[1]].set(prefix)
    return ids, jnp.arange(length) < jnp.sum(ids != PAD, -1)[:, None]


def is_over(last: jax.Array) -> jax.Array:
    """Whether a row has ended, by its last token [b]."""
    return (last == END) | (last == PAD)
