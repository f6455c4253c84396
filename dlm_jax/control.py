# SPDX-License-Identifier: Apache-2.0
"""Control: wrappers of a Denoise or a Step that steer the text."""

import jax.numpy as jnp

from dlm_jax.model import Denoise
from dlm_jax.rounding import project
from dlm_jax.schedule import expand
from dlm_jax.types import Latent, Table, Time


def clamp(denoise: Denoise, table: Table, *, below: float = 1.0) -> Denoise:
    """Snaps x0_hat to the nearest word vectors at times t <= below.

    arXiv:2205.14217 section 4.2; below = 1 clamps throughout, as the published code.
    """

    def clamped(x_t: Latent, t: Time, x0_prev: Latent) -> Latent:
        x0_hat = denoise(x_t, t, x0_prev)
        late = expand(jnp.asarray(t) <= below, x0_hat)
        return jnp.where(late, project(table, x0_hat), x0_hat)

    return clamped
