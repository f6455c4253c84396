# SPDX-License-Identifier: Apache-2.0
"""Rounding: p(w | x_0) = softmax(x_0 E^T + c), and the nearest-embedding projection."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from dlm_jax.diffusion.embedding import embed
from dlm_jax.types import Array, Bias, Ids, Latent, Logits, Table

Allowed = Bool[Array, "b l v"]  # the words that each position may take

# An argmax over a large axis costs more than the product before it, and a maximum does
# not: so `nearest` finds the best group of words by maxima, then the word inside it.
GROUP = 32  # words per group, if all scores are in memory
CHUNK = 128  # words per chunk of a large vocabulary
MAX_DENSE_VOCAB = 1024  # above it, `nearest` never stores all scores


def logits(table: Table, bias: Bias, x: Latent) -> Logits:
    """Computes x E^T + c, the tied head (the published `logits_mode` 1) [b l v]."""
    return jnp.einsum("bld,vd->blv", x, table, precision="highest") + bias


def nll(logits: Logits, ids: Ids) -> Float[Array, "b l"]:
    """Computes -log p(w | x) in nats for each position [b l]."""
    return cross_entropy(logits, jnp.asarray(ids))


def cross_entropy(logits: Float[Array, "*n v"], labels: Array) -> Float[Array, "*n"]:
    """Computes -log softmax(logits)[label] in nats, for labels of any leading shape.

    As optax's function, which takes 0.2 seconds to import.
    """
    of_label = jnp.take_along_axis(logits, labels[..., None], axis=-1).take(0, axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - of_label


def nearest(table: Table, x: Latent, allowed: Allowed | None = None) -> Ids:
    """Returns the nearest allowed word of each position in L2; ties: the lowest id.

    argmax_v e_v.x - |e_v|^2 / 2 needs one product and no array [b l v d]. Above
    MAX_DENSE_VOCAB words the vocabulary is scanned in chunks, so that no array [b l v]
    exists either, unless `allowed` is given.
    """
    if table.shape[0] > MAX_DENSE_VOCAB and allowed is None:
        return _nearest_scanned(*_grouped(table, CHUNK), jnp.asarray(x))
    words, halves = _grouped(table, GROUP)
    scores = jnp.einsum("bld,gvd->blgv", x, words, precision="highest") - halves
    if allowed is not None:
        spare = halves.size - table.shape[0]
        kept = jnp.pad(jnp.asarray(allowed), ((0, 0), (0, 0), (0, spare)))
        scores = jnp.where(kept.reshape(scores.shape), scores, -jnp.inf)
    best = jnp.argmax(jnp.max(scores, -1), -1)
    inside = jnp.take_along_axis(scores, best[..., None, None], 2)[:, :, 0]
    return jnp.minimum(best * GROUP + jnp.argmax(inside, -1), table.shape[0] - 1)


def _grouped(table: Table, size: int) -> tuple[Array, Array]:
    """Returns (words [g size d], half their squares [g size]), padded with infinite ones."""
    half = 0.5 * jnp.sum(jnp.asarray(table) ** 2, -1)
    spare = -table.shape[0] % size
    words = jnp.pad(jnp.asarray(table), ((0, spare), (0, 0)))
    halves = jnp.pad(half, (0, spare), constant_values=jnp.inf)
    return words.reshape(-1, size, table.shape[1]), halves.reshape(-1, size)


def _nearest_scanned(
    words: Float[Array, "g k d"], halves: Float[Array, "g k"], x: Latent
) -> Ids:
    """Finds the best chunk by maxima, then the best word inside it."""

    def compare(carry, chunk):
        best, winner = carry
        index, rows, offset = chunk
        score = jnp.max(
            jnp.einsum("bld,vd->blv", x, rows, precision="highest") - offset, -1
        )
        better = score > best
        return (jnp.where(better, score, best), jnp.where(better, index, winner)), None

    start = (
        jnp.full(x.shape[:2], -jnp.inf, x.dtype),
        jnp.zeros(x.shape[:2], jnp.int32),
    )
    (_, winner), _ = jax.lax.scan(
        compare, start, (jnp.arange(len(words)), words, halves)
    )

    def inside(example):
        x_row, chunk = example
        score = (
            jnp.einsum("ld,lvd->lv", x_row, words[chunk], precision="highest")
            - halves[chunk]
        )
        return chunk * CHUNK + jnp.argmax(score, -1)

    return jax.lax.map(inside, (x, winner))


def project(table: Table, x: Latent, allowed: Allowed | None = None) -> Latent:
    """Applies the clamp: moves each position to its nearest embedding [b l d]."""
    return embed(table, nearest(table, x, allowed))
