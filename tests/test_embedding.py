# SPDX-License-Identifier: Apache-2.0
"""Embedding: the start of the table, its rows, and the gradient that reaches them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.diffusion.embedding import embed, init_table, unit_rows


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_start_is_gaussian(scale):
    """Five standard errors of the mean and of the deviation."""
    table = np.asarray(init_table(jax.random.key(0), 500, 16, scale=scale))
    assert table.shape == (500, 16)
    assert abs(table.mean()) < 5 * scale / table.size**0.5
    assert abs(table.std() - scale) < 5 * scale / (2 * table.size) ** 0.5


def test_rows_on_the_sphere():
    """Norm sqrt(d), direction kept; a zero row stays finite."""
    table = init_table(jax.random.key(1), 7, 9, scale=0.1)
    unit = unit_rows(table)
    np.testing.assert_allclose(jnp.linalg.norm(unit, axis=-1), 3.0, rtol=1e-6)
    ratio = np.asarray(unit / table)
    np.testing.assert_allclose(ratio, ratio[:, :1] * np.ones(9), rtol=1e-5)
    np.testing.assert_allclose(unit_rows(unit), unit, rtol=1e-6)
    again = init_table(jax.random.key(1), 7, 9, scale=0.1, normalize=True)
    np.testing.assert_array_equal(again, unit)
    np.testing.assert_array_equal(unit_rows(jnp.zeros((1, 3))), 0)


def test_embed():
    table, ids = np.arange(12.0).reshape(4, 3), np.array([[3, 0], [1, 3]])
    np.testing.assert_array_equal(embed(table, ids), table[ids])
    # a row's gradient counts its occurrences
    grad = jax.grad(lambda table: embed(table, ids).sum())(jnp.asarray(table))
    np.testing.assert_array_equal(grad, np.array([1, 1, 0, 2])[:, None] * np.ones(3))
