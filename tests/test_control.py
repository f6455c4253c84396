# SPDX-License-Identifier: Apache-2.0
"""Control: the clamp acts on late estimates alone, and gives rows of the table."""

import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax import control

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(7, 4)).astype(np.float32)
X = RNG.normal(size=(3, 5, 4)).astype(np.float32)
T = np.array([0.2, 0.5, 0.8], np.float32)


def estimate(x_t, t, x0_prev):
    """Reads all three inputs, so that the wrapper must pass them on."""
    return x_t + 0.1 * t.reshape(t.shape + (1,) * (3 - t.ndim)) + 0.5 * x0_prev


BARE = estimate(X, T, 0.2 * X)


def clamped(t=T, **options):
    return np.asarray(control.clamp(estimate, TABLE, **options)(X, t, 0.2 * X))


def nearest_rows(x):
    distance = np.linalg.norm(x[..., None, :].astype(float) - TABLE, axis=-1)
    return TABLE[distance.argmin(-1)]


def test_clamp_throughout():
    """As published: every position of every text becomes its nearest row."""
    np.testing.assert_array_equal(clamped(), nearest_rows(BARE))
    np.testing.assert_array_equal(clamped(below=0.8), clamped())  # t = below counts


@pytest.mark.parametrize(("below", "late"), [(0.5, 2), (0.49, 1), (0.2, 1), (0.1, 0)])
def test_clamp_is_late(below, late):
    """Times at or below the bound snap; the others stay as they were, bit for bit."""
    found = clamped(below=below)
    np.testing.assert_array_equal(found[:late], nearest_rows(BARE)[:late])
    np.testing.assert_array_equal(found[late:], BARE[late:])


def test_no_time_is_below_minus_one():
    np.testing.assert_array_equal(clamped(below=-1.0), BARE)


def test_time_per_token():
    """A text may hold clean and noisy positions: only the clean ones snap."""
    t = jnp.linspace(0.1, 0.9, 15).reshape(3, 5)
    bare, late = np.asarray(estimate(X, t, 0.2 * X)), np.asarray(t <= 0.5)
    found = clamped(t, below=0.5)
    np.testing.assert_array_equal(found[late], nearest_rows(bare)[late])
    np.testing.assert_array_equal(found[~late], bare[~late])
    assert 0 < late.sum() < 15
