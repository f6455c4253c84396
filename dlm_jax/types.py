# SPDX-License-Identifier: Apache-2.0
"""Shared types and the axis glossary.

Axes: b batch, l length (positions), d embedding, v vocabulary, h hidden width,
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
AnyIds: TypeAlias = Any  # Ids, or what NumPy turns into them; `arguments.check_ids`
Latent: TypeAlias = Float[Array, "b l d"]
Logits: TypeAlias = Float[Array, "b l v"]
Table: TypeAlias = Float[Array, "v d"]
Bias: TypeAlias = Float[Array, " v"]
Time: TypeAlias = Float[Array, " b"] | Float[Array, "b l"]
PerExample: TypeAlias = Float[Array, " b"]
# a number of Python, NumPy or JAX; `ranges.integer` and `ranges.real` check it
Integer: TypeAlias = Any
Real: TypeAlias = Any
PRNGKey: TypeAlias = Key[jax.Array, ""]
PRNGKeys: TypeAlias = Key[jax.Array, " b"]
START, END, UNK, PAD = 0, 1, 2, 3  # ids of the special tokens, in every vocabulary


class HeadSpec(NamedTuple):
    """The output of a classifier: its head, the shape of an example's labels, and the
    number of classes of each label."""

    head: str
    shape: tuple[int, ...]
    classes: int

    @property
    def size(self) -> int:
        """The number of labels per example."""
        return math.prod(self.shape)
