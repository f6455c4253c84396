# SPDX-License-Identifier: Apache-2.0
"""Embedding: EMB(w) is row w of a table; x_0 = EMB(w) + sigma_0 n."""

import jax
import jax.numpy as jnp

from dlm_jax.types import Ids, Latent, PRNGKey, Table


def init_table(
    key: PRNGKey, vocab: int, dim: int, *, scale: float = 1.0, normalize: bool = False
) -> Table:
    """Initialises the table [v d] with Gaussian rows of standard deviation `scale`.

    normalize: scale rows to norm sqrt(d), as arXiv:2211.15089.
    """
    table = scale * jax.random.normal(key, (vocab, dim))
    return unit_rows(table) if normalize else table


def unit_rows(table: Table) -> Table:
    """Rescales rows to norm sqrt(d), so that a coordinate has variance near 1."""
    norm = jnp.linalg.norm(table, axis=-1, keepdims=True)
    return table * (jnp.sqrt(1.0 * table.shape[-1]) / jnp.maximum(norm, 1e-12))


def embed(table: Table, ids: Ids) -> Latent:
    """Looks up EMB(w), the rows of the table [b l d]."""
    return jnp.asarray(table)[ids]
