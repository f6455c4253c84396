# SPDX-License-Identifier: Apache-2.0
"""Rounding: the nearest word, exact and lean at any vocabulary; logits and nll."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import sizes

from dlm_jax.diffusion import rounding

BIG = rounding.MAX_DENSE_VOCAB + 100  # scanned in chunks, the last one partly empty


def whole_numbers(seed, *shape):
    """Small integers: float32 products of them are exact, so ties are true ties."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def distances(table, x):
    return np.linalg.norm(x[..., None, :].astype(float) - table, axis=-1)


def test_big_is_awkward():
    assert BIG % rounding.CHUNK
    assert BIG > rounding.MAX_DENSE_VOCAB


@pytest.mark.parametrize("vocab", [1, 11, 100, 821, BIG])
def test_nearest_is_the_closest_word(vocab):
    """Brute force over all distances; ties, frequent here, go to the lowest id."""
    table, x = whole_numbers(0, vocab, 4), whole_numbers(1, 6, 7, 4)
    square = np.round(distances(table, x) ** 2)
    want = square.argmin(-1)
    if vocab > 100:
        ties = square == square.min(-1, keepdims=True)
        group = rounding.CHUNK if vocab == BIG else rounding.GROUP
        groups = np.arange(vocab) // group
        split = [len(set(groups[tie])) > 1 for tie in ties.reshape(-1, vocab)]
        assert sum(split) > 5  # ties across groups do occur
    np.testing.assert_array_equal(jax.jit(rounding.nearest)(table, x), want)


@pytest.mark.parametrize("vocab", [11, 100, 821, BIG])
def test_nearest_of_the_words_allowed(vocab):
    """Whatever may stand at a position, down to one word in another group."""
    table, x = whole_numbers(0, vocab, 4), whole_numbers(1, 3, 5, 4)
    allowed = np.random.default_rng(2).random((3, 5, vocab)) < 0.2
    allowed[..., -1] |= ~allowed.any(-1)
    allowed[0, 0] = np.arange(vocab) == vocab - 1
    square = np.round(distances(table, x) ** 2)
    want = np.where(allowed, square, np.inf).argmin(-1)
    found = jax.jit(rounding.nearest)(table, x, allowed)
    np.testing.assert_array_equal(found, want)


def test_nearest_is_a_word_whatever_x_is():
    x = np.array([np.nan, np.inf, -np.inf], "f")[:, None, None] * np.ones(
        (1, 2, 4), "f"
    )
    for vocab in (11, 100):
        assert np.max(rounding.nearest(whole_numbers(0, vocab, 4), x)) < vocab


def test_the_last_chunk_has_no_word_at_zero():
    """Words far from zero and a query at zero, where a padded row would lie."""
    table, x = whole_numbers(11, BIG, 3) + 9, np.zeros((1, 1, 3), np.float32)
    want = (table.astype(float) ** 2).sum(-1).argmin()
    assert jax.jit(rounding.nearest)(table, x).item() == want


def test_ties_across_chunk_borders():
    """Copies of one row, the query on it: the first copy wins wherever it lies."""
    edge = rounding.CHUNK
    copies = [edge - 1, edge, 3 * edge - 1, 3 * edge, BIG - 1]
    nearest, x = jax.jit(rounding.nearest), np.full((1, 1, 3), 9.0, np.float32)
    for first in range(len(copies)):
        table = whole_numbers(2, BIG, 3)
        table[copies[first:]] = 9.0
        assert nearest(table, x).item() == copies[first]


def test_nearest_on_gaussians():
    """Not only on whole numbers: a word's own vector, moved by a little."""
    rng = np.random.default_rng(3)
    table = rng.normal(size=(BIG, 16)).astype(np.float32)
    ids = rng.integers(0, BIG, (4, 8))
    x = table[ids] + 0.1 * rng.normal(size=(4, 8, 16)).astype(np.float32)
    np.testing.assert_array_equal(rounding.nearest(table, x), ids)


def test_chunks_hold_no_score_for_every_word():
    b, l, d = 16, 32, 8
    x = jnp.zeros((b, l, d))

    def largest(vocab):
        table = jnp.zeros((vocab, d))
        return max(sizes(jax.make_jaxpr(rounding.nearest)(table, x).jaxpr))

    assert (
        largest(rounding.MAX_DENSE_VOCAB) == b * l * rounding.MAX_DENSE_VOCAB
    )  # sizes() sees them
    assert largest(BIG) <= max(b * l * rounding.CHUNK, BIG * d * 2)


@pytest.mark.parametrize("vocab", [11, BIG])
def test_project_is_idempotent(vocab):
    table, x = whole_numbers(4, vocab, 3), whole_numbers(5, 2, 4, 3) + 0.25
    once = rounding.project(table, x)
    np.testing.assert_array_equal(rounding.project(table, once), once)
    words = {tuple(row) for row in table.tolist()}
    assert {tuple(row) for row in np.asarray(once).reshape(-1, 3).tolist()} <= words


def test_logits():
    table, x = whole_numbers(8, 6, 3), whole_numbers(9, 2, 4, 3)
    bias = np.arange(6, dtype=np.float32)
    np.testing.assert_array_equal(rounding.logits(table, bias, x), x @ table.T + bias)


def test_nll():
    """-log softmax at the word, in nats; equal logits give log v."""
    rng = np.random.default_rng(10)
    scores = rng.normal(size=(2, 3, 5)).astype(np.float32)
    ids = np.array([[0, 4, 2], [1, 1, 3]])
    probability = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    want = -np.log(np.take_along_axis(probability, ids[..., None], -1)[..., 0])
    np.testing.assert_allclose(rounding.nll(scores, ids), want, rtol=1e-5)
    np.testing.assert_allclose(rounding.nll(0 * scores, ids), np.log(5), rtol=1e-6)
