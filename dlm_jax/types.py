# SPDX-License-Identifier: Apache-2.0
"""Shared types and the axis glossary.

Axes: b batch, l length (positions), d embedding, v vocabulary, h trunk width,
n steps of a sampling grid. Arrays may live on the host (NumPy) or on a device.
"""

import math
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Float, Int, Key

Array: TypeAlias = jax.Array | np.ndarray
PyTree: TypeAlias = Any
Ids: TypeAlias = Int[Array, "b l"]
Latent: TypeAlias = Float[Array, "b l d"]
Logits: TypeAlias = Float[Array, "b l v"]
Table: TypeAlias = Float[Array, "v d"]
Bias: TypeAlias = Float[Array, " v"]
Time: TypeAlias = Float[Array, " b"] | Float[Array, "b l"]
PerExample: TypeAlias = Float[Array, " b"]
PRNGKey: TypeAlias = Key[jax.Array, ""]
PRNGKeys: TypeAlias = Key[jax.Array, " b"]
START, END, UNK, PAD = 0, 1, 2, 3  # the ids of the specials, in every vocabulary


class HeadSpec(NamedTuple):
    """What a classifier predicts of an example: its head, the shape of the labels, and
    the number of classes of each."""

    head: str
    shape: tuple[int, ...]
    classes: int

    @property
    def size(self) -> int:
        """Number of labels of an example."""
        return math.prod(self.shape)
