# SPDX-License-Identifier: Apache-2.0
"""The settings of JAX that the library computes under, whatever the process sets.

They hold for the calling thread and the length of a call, so the process keeps its own.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import jax

from dlm_jax.runtime import hosts

P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Computes in 32 bits, compiled, with JAX's standard promotion and random numbers.

    So a seed means the same samples in every process without JAX_RANDOM_SEED_OFFSET.
    """
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.default_prng_impl("threefry2x32"),
        jax.threefry_partitionable(True),
        jax.debug_key_reuse(False),
        jax.disable_jit(False),
        jax.transfer_guard("allow"),
    ):
        yield


def prepared(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates an entry point: it runs under `settings`, on a backend that works.

    Raises UserError if JAX has no backend here (`hosts.check_backend`).
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        hosts.check_backend()
        with settings():
            return function(*args, **kwargs)

    return run


def random_settings() -> dict[str, str | bool]:
    """Returns the settings of JAX that decide its random numbers now."""
    names = ("jax_default_prng_impl", "jax_threefry_partitionable")
    names += ("jax_random_seed_offset",)
    return {name: getattr(jax.config, name) for name in names}
