# SPDX-License-Identifier: Apache-2.0
"""Devices: data parallelism by pmap, placement, multi-host start; the one such file.

pmap is used without a leading device axis for the state (in_axes=None, out_axes=None):
the same TrainState serves jit, pmap, evaluation, sampling and checkpoints.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dlm_jax.types import PyTree, UserError

AXIS = "data"


def start(coordinator: str, processes: int, process: int) -> None:
    """Joins the other hosts, before any device is touched; a no-op for one host."""
    if processes == 1:
        return
    if not coordinator or not 0 <= process < processes:
        raise UserError(
            f"--processes={processes} --process_id={process} "
            f"--coordinator={coordinator!r}: give host:port of process 0 and a number "
            "from 0 up to processes"
        )
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--coordinator={coordinator}: {error}") from error


def hosts() -> tuple[int, int]:
    """(this host's number, number of hosts)."""
    return jax.process_index(), jax.process_count()


def describe() -> str:
    """One line on the devices at hand."""
    kind = jax.devices()[0].device_kind
    return (
        f"process {jax.process_index()} of {jax.process_count()}, "
        f"{jax.local_device_count()} local of {jax.device_count()} devices ({kind})"
    )


def check_batch(batch: int, accumulate: int = 1) -> None:
    """UserError unless the devices and the microbatches divide the batch."""
    count = jax.device_count() * accumulate
    if batch % count:
        raise UserError(
            f"config.train.batch={batch} is not a multiple of {count} "
            f"({jax.device_count()} devices x optim.accumulate={accumulate}): "
            f"take {batch // count * count or count}"
        )


def map_step(step: Callable) -> Callable:
    """(key, state, ids [devices b l]) -> (state, metrics), the state donated."""
    return jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(None, None, 0),
        out_axes=None,
        donate_argnums=1,
    )


def shard(ids: np.ndarray) -> np.ndarray:
    """This host's rows [b l] as [local devices, b / devices, l]."""
    return ids.reshape(jax.local_device_count(), -1, *ids.shape[1:])


def place(tree: PyTree) -> PyTree:
    """Copies onto all local devices; donation needs this before the first step."""
    mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def to_global(tree: PyTree) -> PyTree:
    """Host-local replicas as global arrays without a copy: Orbax refuses the former."""
    if jax.process_count() == 1:
        return tree
    sharding = NamedSharding(Mesh(np.array(jax.devices()), (AXIS,)), PartitionSpec())

    def convert(x: jax.Array) -> jax.Array:
        parts = [s.data for s in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

    return jax.tree.map(convert, tree)


def global_like(tree: PyTree) -> PyTree:
    """Shapes and dtypes with the replicated sharding over all devices, to restore."""
    sharding = NamedSharding(Mesh(np.array(jax.devices()), (AXIS,)), PartitionSpec())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def to_local(tree: PyTree) -> PyTree:
    """The inverse of `to_global`: global arrays as this host's replicas."""
    if jax.process_count() == 1:
        return place(tree)
    sharding = NamedSharding(
        Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec()
    )

    def convert(x: jax.Array) -> jax.Array:
        parts = [s.data for s in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

    return jax.tree.map(convert, tree)
