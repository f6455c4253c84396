# SPDX-License-Identifier: Apache-2.0
"""Reads the arrays of a checkpoint, with checksums, and tells damage from other errors.

TensorStore reads what Orbax wrote. Orbax itself converts types, and makes threads, logs
and barriers of which an error says little. Only bytes that are not those that were saved
are damage. This is judged from the files alone: devices and settings of JAX, memory and
permissions make a read fail, too.
"""

import json
import os
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.errors import UserError, environment_reason
from dlm_jax.types import PyTree

WEIGHT = 2654435761  # odd multiples of it weigh the words of an array


def state_sums(state: PyTree) -> dict[str, int]:
    """Returns {path: checksum} of the leaves, computed on their devices."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(_positioned(state)))
    return {_name(path): int(x) for path, x in leaves}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@jax.jit
def _positioned(tree: PyTree) -> PyTree:
    """Returns per leaf the sum of its bit patterns times odd weights, modulo 2^32.

    The order of additions does not matter, and any single flipped bit changes the sum.
    """

    def one(x: jax.Array) -> jax.Array:
        x = jnp.ravel(x)
        unsigned = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
        bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)
        bits = jnp.ravel(bits).astype(jnp.uint32)
        weight = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(WEIGHT)
        return jnp.sum(bits * (weight | 1), dtype=jnp.uint32)

    return jax.tree.map(one, tree)


def array_sum(x: np.ndarray) -> int:
    """Returns the checksum of one array as `state_sums` does, without JAX."""
    x = np.ravel(x)
    bits = x if x.dtype == bool else x.view(f"uint{8 * min(x.dtype.itemsize, 4)}")
    weight = np.arange(bits.size, dtype=np.uint32) * np.uint32(WEIGHT)
    products = bits.astype(np.uint32) * (weight | np.uint32(1))
    return int(np.sum(products, dtype=np.uint32))


def json_sums(records: Mapping[str, Any]) -> dict[str, int]:
    """Returns {name: checksum} of JSON records."""
    text = {name: json.dumps(value, sort_keys=True) for name, value in records.items()}
    return {name: zlib.crc32(value.encode()) for name, value in text.items()}


def differing(sums: Mapping[str, int], saved: Mapping[str, Any]) -> list[str]:
    """Returns the names whose checksums are not those that were saved."""
    return [name for name, value in sums.items() if saved.get(name) != value]


def read(folder: Any, like: PyTree) -> PyTree:
    """Reads arrays of <folder>/state, in the types that were saved.

    like: their shapes, types and shardings; a host reads only its parts. Raises
    ValueError and the errors of the storage.
    """
    named, tree = jax.tree_util.tree_flatten_with_path(like)
    names, driver = _described(folder)
    if absent := {_name(path) for path, _ in named} - names:
        raise ValueError(f"{min(absent)} was not saved")
    opened = [_open(folder, _name(path), driver) for path, _ in named]
    stores = [future.result() for future in opened]
    for (path, leaf), store in zip(named, stores, strict=True):
        saved = (store.shape, store.dtype.numpy_dtype)
        if saved != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"{_name(path)} is {saved[1]}{list(saved[0])}, not "
                f"{leaf.dtype}{list(leaf.shape)}"
            )
    whole = [  # read at the same time
        store.read() if leaf.sharding.is_fully_replicated else None
        for (_, leaf), store in zip(named, stores, strict=True)
    ]

    def place(leaf: Any, store: Any, value: Any) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return store[index].read().result() if value is None else value.result()

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    leaves = [leaf for _, leaf in named]
    return tree.unflatten(map(place, leaves, stores, whole))


def damage(folder: Any, sums: Mapping[str, Any]) -> str:
    """Returns how the arrays in <folder>/state differ from what was saved, or "".

    sums: those that were saved, by path. Reads array by array into host memory. Raises
    the errors of the storage that `environment_reason` knows.
    """
    try:
        names, driver = _described(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if environment_reason(error):
            raise
        return "state/_METADATA is missing or not as saved"
    if missing := sums.keys() - names:
        return f"state/_METADATA does not name {min(missing)}"
    for name, value in sums.items():
        try:
            array = _open(folder, name, driver).result().read().result()
        except Exception as error:  # TensorStore raises ValueError for all reasons
            if environment_reason(error):
                raise
            return f"{name} cannot be read"
        if array_sum(np.asarray(array)) != value:
            return f"the checksum of {name} differs"
    return ""


def _described(folder: Any) -> tuple[set[str], str]:
    """Returns the names of the arrays that Orbax saved, and their format."""
    described = json.loads((folder / "state" / "_METADATA").read_bytes())
    entries = described["tree_metadata"].values()
    names = {"/".join(str(k["key"]) for k in e["key_metadata"]) for e in entries}
    return names, "zarr3" if described["use_zarr3"] else "zarr"


def utf8(path: str) -> str:
    """Returns a local path as TensorStore wants it, whatever the locale.

    Raises UserError for names that it cannot open.
    """
    try:
        if os.sep == "/" and "\\" in path:
            raise ValueError
        return os.fsencode(path).decode("utf-8")
    except ValueError as error:
        raise UserError(
            f"{path!a}: not in UTF-8, or with a backslash: rename the folder"
        ) from error


def _open(folder: Any, name: str, driver: str) -> Any:
    """Returns a future of the array of that name."""
    path = str(folder / "state")
    if "://" in path:
        base: Any = f"{path}/"
    else:  # not as a URL, in which some characters of a name have a meaning
        base = {"driver": "file", "path": utf8(path) + "/"}
    store = {"driver": "ocdbt", "base": base, "path": f"{name.replace('/', '.')}/"}
    import tensorstore  # late: shared models do without it

    return tensorstore.open({"driver": driver, "kvstore": store}, open=True)
