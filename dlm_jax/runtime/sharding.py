# SPDX-License-Identifier: Apache-2.0
"""Distribution of the state and of rows over devices.

Two layouts. `pmap`: every device holds the whole state (in_axes=None, out_axes=None, so
no leading device axis). `fsdp`: jit splits parameters, EMA and optimizer state over all
devices. In both, sampling and evaluation split their rows (`shard_rows`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dlm_jax.errors import UserError
from dlm_jax.types import PyTree

AXIS = "data"
SMALL = 2**12  # leaves with fewer elements are not split


class Layout(NamedTuple):
    """The functions that place state and rows on the devices.

    axis: the step's mapped axis, None if jit sees the global batch. begin(key, init):
    initializes the state. like(shapes): the target to restore a checkpoint into;
    loaded(tree): converts the result to a state. whole(state): global arrays, for
    checkpoints and `shard_rows`. step(fn, state): compiles fn. parts(accumulate):
    number of parts that a host's rows are read in. rows(array): makes them the input
    of a step.
    """

    axis: str | None
    begin: Callable[[jax.Array, Callable], PyTree]
    like: Callable[[PyTree], PyTree]
    loaded: Callable[[PyTree], PyTree]
    whole: Callable[[PyTree], PyTree]
    step: Callable[[Callable, PyTree], Callable]
    parts: Callable[[int], int]
    rows: Callable[[np.ndarray], Any]


def _mesh() -> Mesh:
    """Returns a mesh of all devices of all hosts, grouped by host."""
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    return Mesh(np.array(devices), (AXIS,))


def _everywhere() -> NamedSharding:
    return NamedSharding(_mesh(), PartitionSpec())


def _here() -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec())


def replicate(tree: PyTree) -> PyTree:
    """Copies to all local devices, so that the first step can donate them."""
    return jax.device_put(tree, _here())


def to_global(tree: PyTree) -> PyTree:
    """Converts host-local replicas to global arrays, without a copy, for Orbax."""
    return tree if jax.process_count() == 1 else _renamed(tree, _everywhere())


def to_local(tree: PyTree) -> PyTree:
    """Converts global arrays to this host's replicas: the inverse of `to_global`."""
    return replicate(tree) if jax.process_count() == 1 else _renamed(tree, _here())


def _renamed(tree: PyTree, sharding: NamedSharding) -> PyTree:
    def convert(x: jax.Array) -> jax.Array:
        parts = [s.data for s in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

    return jax.tree.map(convert, tree)


def global_like(tree: PyTree) -> PyTree:
    """Returns shapes and dtypes replicated over all devices, as restore targets."""
    sharding = _everywhere()
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def _mapped(step: Callable, state: PyTree) -> Callable:
    return jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(None, None, 0),
        out_axes=None,
        donate_argnums=1,
    )


def _by_device(rows: np.ndarray) -> np.ndarray:
    """Reshapes this host's rows [1 b l] to [local devices, b / devices, l]."""
    return rows[0].reshape(jax.local_device_count(), -1, *rows.shape[2:])


PMAP = Layout(
    axis=AXIS,
    begin=lambda key, init: replicate(jax.jit(init)(key)),
    like=global_like,
    loaded=to_local,
    whole=to_global,
    step=_mapped,
    parts=lambda accumulate: 1,
    rows=_by_device,
)


def partition_spec(shape: tuple[int, ...], devices: int) -> PartitionSpec:
    """Splits the longest axis that `devices` divides; small leaves stay whole."""
    axes = [i for i, size in enumerate(shape) if size % devices == 0]
    if not axes or np.prod(shape) < SMALL:
        return PartitionSpec()
    longest = max(axes, key=lambda i: shape[i])
    return PartitionSpec(*(AXIS if i == longest else None for i in range(len(shape))))


def _split_like(tree: PyTree) -> PyTree:
    mesh = _mesh()

    def one(x: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, partition_spec(x.shape, mesh.size))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, tree)


def _shardings(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.sharding, tree)


def _begin_split(key: jax.Array, init: Callable) -> PyTree:
    """Initializes the state split: no device ever holds all of it."""
    like = _split_like(jax.eval_shape(init, key))
    return jax.jit(init, out_shardings=_shardings(like))(key)


def _jitted(step: Callable, state: PyTree) -> Callable:
    out = (_shardings(state), _everywhere())
    return jax.jit(step, donate_argnums=1, out_shardings=out)


def _by_part(rows: np.ndarray) -> jax.Array:
    """Returns the global array of rows [parts b l], with b split over all devices."""
    sharding = NamedSharding(_mesh(), PartitionSpec(None, AXIS))
    return jax.make_array_from_process_local_data(sharding, rows)


FSDP = Layout(
    axis=None,
    begin=_begin_split,
    like=_split_like,
    loaded=lambda tree: tree,
    whole=lambda tree: tree,
    step=_jitted,
    parts=lambda accumulate: accumulate,
    rows=_by_part,
)
LAYOUTS = {"pmap": PMAP, "fsdp": FSDP}


def check_batch(batch: int, accumulate: int = 1) -> None:
    """Raises UserError unless devices x microbatches divides the batch."""
    count = jax.device_count() * accumulate
    if batch % count:
        raise UserError(
            f"config.train.batch={batch} is not a multiple of {count} "
            f"({jax.device_count()} devices x optim.accumulate={accumulate}): "
            f"set it to {batch // count * count or count}"
        )


def shard_rows(rows: PyTree) -> PyTree:
    """Splits rows over all devices if those divide their number; else replicates.

    rows: arrays with a leading axis, the same on every host.
    """
    if jax.device_count() == 1:
        return rows
    mesh = _mesh()

    def one(x: Any) -> jax.Array:
        even = x.shape[0] % mesh.size == 0
        sharding = NamedSharding(mesh, PartitionSpec(AXIS if even else None))
        return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

    return jax.tree.map(one, rows)


def gather_to_host(tree: PyTree) -> PyTree:
    """Gathers global arrays as NumPy arrays on every host."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


@jax.jit
def finite(tree: PyTree) -> jax.Array:
    """Returns whether all values of a tree are finite, as a boolean array."""
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))
