# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by Orbax: <workdir>/checkpoints/<step>/{state,config,tokenizer,run,sums}.

Saves are asynchronous and atomic: a step directory appears under its plain integer when
it is complete. config, tokenizer and run are JSON; nothing here is ever unpickled. sums
holds checksums of everything saved, because Orbax's compression does not notice a
flipped bit.
"""

import contextlib
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dlm_jax.errors import UserError
from dlm_jax.types import PyTree


class Records(NamedTuple):
    """The JSON records of a checkpoint.

    config: the resolved config; tokenizer: `tokenizer.from_dict` reads it; run: the
    kind of model ("diffusion", "autoregressive" or "classifier"), checksums of the
    corpus and, for a classifier, of the embedding table and its labels, and the
    training batches that rollbacks skipped.
    """

    config: dict
    tokenizer: dict
    run: dict


class CorruptCheckpointError(UserError):
    """A checkpoint that cannot be read; path: its folder."""

    def __init__(self, path: Path, reason: str):
        super().__init__(
            f"{path}: damaged or not of this model ({reason}); start with "
            "--allow_fallback to go on from the one before, or use another step"
        )
        self.path = path


PathLike = str | os.PathLike  # a run's directory; also gs://...
FOLDER, COMMITTED = "checkpoints", "commit_success.txt"
# a run may be resumed with these changed: they do not touch the training itself
RESUMABLE_CHANGES = {
    f"train.{name}"
    for name in (
        "ckpt_steps",
        "keep",
        "log_steps",
        "valid_steps",
        "valid_batches",
        "sample_steps",
        "on_nonfinite",
    )
} | {"sample", "evaluate", "control", "parallel", "model.remat"}


def resolve_workdir(workdir: PathLike) -> Any:
    """A run's directory, absolute as Orbax needs it, or in a bucket (gs://...)."""
    if "://" in str(workdir):
        return epath.Path(workdir)
    return Path(os.path.abspath(workdir))


def check_reachable(workdir: PathLike) -> None:
    """UserError where a bucket cannot be asked."""
    try:
        resolve_workdir(workdir).exists()
    except Exception as error:  # a library is missing, a right, the bucket
        raise UserError(
            f"--workdir {workdir}: cannot be reached ({_reason(error)}); buckets need "
            "pip install 'dlm_jax[bucket]' and your credentials"
        ) from error


def folder(workdir: PathLike) -> Any:
    """Where a run's checkpoints lie."""
    return resolve_workdir(workdir) / FOLDER


def manager(workdir: PathLike, *, keep: int) -> ocp.CheckpointManager:
    """The writer of a run: it keeps the newest `keep` steps."""
    _quiet()
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(folder(workdir), options=options)


def _quiet() -> None:
    """Orbax logs some fifty lines a save; its errors reach us as exceptions."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def save(
    writer: ocp.CheckpointManager,
    step: int,
    state: PyTree,
    records: Records,
) -> None:
    """Starts an asynchronous save of `step`; UserError if nothing would be written.

    state: global arrays where there are several hosts (`sharding.Layout.whole`).
    """
    sums = _sums(state) | _json_sums(records)
    parts = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        sums=ocp.args.JsonSave(sums),
        **{name: ocp.args.JsonSave(r) for name, r in records._asdict().items()},
    )
    with _saving(writer, step):
        done = writer.save(step, args=parts)
    if not done:
        raise UserError(
            f"{writer.directory}: step {step} was not saved, as step "
            f"{writer.latest_step()} is there; take a fresh --workdir"
        )


def wait(writer: ocp.CheckpointManager) -> None:
    """Waits until what was last saved is complete."""
    with _saving(writer, "last"):
        writer.wait_until_finished()


@contextlib.contextmanager
def _saving(writer: ocp.CheckpointManager, step: int | str) -> Iterator[None]:
    """A disk that is full, read-only or gone is one line."""
    try:
        yield
    except Exception as error:  # Orbax and its storage raise many kinds
        there = all_steps(writer.directory.parent)
        raise UserError(
            f"{writer.directory}: step {step} cannot be saved ({_reason(error)}); the last "
            f"complete checkpoint is {there[-1] if there else 'none'}: make room or mend "
            "the folder, and start again to go on from it"
        ) from error


def _reason(error: Exception) -> str:
    """What the system says of it, out of a storage library's lines."""
    text = " ".join(str(error).split()) or type(error).__name__
    known = re.search(
        r"No space left on device|Read-only file system|Permission denied|"
        r"No such file or directory|File too large|Disk quota exceeded",
        text,
    )
    return known.group() if known else text[:200]


def check_saves(writer: ocp.CheckpointManager) -> None:
    """UserError if a save that runs beside the training has failed."""
    with _saving(writer, "last"):
        writer.check_for_errors()


def all_steps(workdir: PathLike) -> list[int]:
    """The complete checkpoints of a run, oldest first.

    In a bucket, where nothing can be renamed, Orbax's COMMITTED says which are.
    """
    path = folder(workdir)
    if not path.is_dir():
        return []
    found = [p for p in path.iterdir() if p.name.isdigit()]
    if "://" in str(path):
        found = [p for p in found if (p / COMMITTED).exists()]
    return sorted(int(p.name) for p in found)


def latest_step(workdir: PathLike, step: int | None = None) -> int:
    """The newest complete step, or `step` if it exists; UserError otherwise."""
    there = all_steps(workdir)
    if not there:
        raise UserError(
            f"{folder(workdir)}: no checkpoint; train first with this workdir"
        )
    if step is not None and step not in there:
        raise UserError(f"{folder(workdir)}: no step {step}; there are {there}")
    return there[-1] if step is None else step


def restore(workdir: PathLike, step: int, like: PyTree) -> PyTree:
    """The state saved at `step`; like: its shapes and shardings."""
    return _state(workdir, step, ocp.args.StandardRestore(like))


def restore_part(workdir: PathLike, step: int, like: dict[str, PyTree]) -> PyTree:
    """Some fields of the state, such as {"ema": ...}: enough to sample."""
    args = ocp.args.PyTreeRestore(
        like,
        restore_args=ocp.checkpoint_utils.construct_restore_args(like),
        partial_restore=True,
    )
    return _state(workdir, step, args)


def _state(workdir: PathLike, step: int, args: Any) -> PyTree:
    found = _read(workdir, step, state=args, sums=ocp.args.JsonRestore())
    if not isinstance(found.sums, dict):
        raise _damaged(workdir, step, "its checksums are no object")
    _compare(workdir, step, _sums(found.state), found.sums)
    return found.state


def read_records(workdir: PathLike, step: int) -> Records:
    """Returns the records of a checkpoint. Raises UserError."""
    path = folder(workdir) / str(step)
    if path.is_dir() and not (path / "run").exists():
        raise UserError(
            f"{path}: saved by an older version of dlm_jax, or incomplete; use that "
            "version, or train again"
        )
    json_args = ocp.args.JsonRestore()
    parts = _read(workdir, step, **dict.fromkeys((*Records._fields, "sums"), json_args))
    if not all(isinstance(parts[name], dict) for name in (*Records._fields, "sums")):
        raise _damaged(workdir, step, "its records are no objects")
    records = Records(*(parts[name] for name in Records._fields))
    _compare(workdir, step, _json_sums(records), parts.sums)
    return records


def _sums(state: PyTree) -> dict[str, int]:
    """A checksum of every leaf, by its path, made where it lies, split or not."""
    return _by_path(jax.device_get(_positioned(state)))


@jax.jit
def _positioned(tree: PyTree) -> PyTree:
    """Of each leaf the sum of bits x an odd number of their place, modulo 2^32.

    Any order of the additions gives the same; a flipped bit always shows.
    """

    def one(x: jax.Array) -> jax.Array:
        x = jnp.ravel(x)
        unsigned = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
        bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)
        bits = jnp.ravel(bits).astype(jnp.uint32)
        place = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2654435761)
        return jnp.sum(bits * (place | 1), dtype=jnp.uint32)

    return jax.tree.map(one, tree)


def _by_path(tree: PyTree) -> dict[str, int]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = jax.tree_util.keystr
    return {name(path, simple=True, separator="/"): int(x) for path, x in leaves}


def _json_sums(records: Records) -> dict[str, int]:
    text = {k: json.dumps(v, sort_keys=True) for k, v in records._asdict().items()}
    return {name: zlib.crc32(value.encode()) for name, value in text.items()}


def _compare(workdir: PathLike, step: int, sums: dict, saved: dict) -> None:
    for name, value in sums.items():
        if saved.get(name) != value:
            raise _damaged(workdir, step, f"{name} has another checksum")


def _damaged(workdir: PathLike, step: int, reason: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(folder(workdir) / str(step), reason)


def quarantine(damaged: CorruptCheckpointError, workdir: PathLike) -> Path:
    """Moves a damaged checkpoint of this run away, so that the one before is newest.

    Raises the error itself where that is another run's or there is no other step.
    """
    step, path = (
        damaged.path.name,
        resolve_workdir(workdir) / "damaged" / damaged.path.name,
    )
    if damaged.path.parent != folder(workdir) or all_steps(workdir)[1:] == []:
        raise damaged
    while path.exists():
        path = path.with_name(f"{path.name}_")
    path.parent.mkdir(exist_ok=True)
    (folder(workdir) / step).rename(path)
    return path


def _read(workdir: PathLike, step: int, **parts: Any) -> Any:
    """One read-only restore; whatever is wrong with the files is one line."""
    _quiet()
    _within(workdir, step)
    options = ocp.CheckpointManagerOptions(read_only=True)
    silent = contextlib.redirect_stderr(io.StringIO())  # from its reading threads
    try:
        with silent, ocp.CheckpointManager(folder(workdir), options=options) as reader:
            return reader.restore(step, args=ocp.args.Composite(**parts))
    except Exception as error:  # Orbax raises many kinds for damaged files
        raise _damaged(workdir, step, _reason(error)) from error


def _within(workdir: PathLike, step: int) -> None:
    """Refuses a checkpoint with links, which may lead out of its folder."""
    path = folder(workdir) / str(step)
    inside = path.rglob("*") if isinstance(path, Path) else ()
    for found in (path, *inside):
        if isinstance(found, Path) and found.is_symlink():
            raise _damaged(workdir, step, f"{found.name} is a link")


def checksum(tree: PyTree) -> int:
    """One checksum of all the arrays of a tree, in their order."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total = zlib.crc32(np.asarray(leaf).tobytes(), total)
    return total


def write_run_config(workdir: PathLike, config: dict) -> None:
    """Makes the run directory this config's: <workdir>/config.json is its identity."""
    try:
        resolve_workdir(workdir).mkdir(parents=True, exist_ok=True)
        write_json(resolve_workdir(workdir) / "config.json", config)
    except OSError as error:
        raise UserError(
            f"--workdir {workdir}: cannot write ({error.strerror}); choose another"
        ) from error


def check_config_matches(workdir: PathLike, config: dict) -> None:
    """UserError where the run directory is another config's, with the difference.

    Intervals may change, sampling settings too, and train.total_steps may grow where
    the learning rate is constant.
    """
    path = resolve_workdir(workdir) / "config.json"
    if not all_steps(workdir):
        return  # nothing is saved yet, so nothing can be lost
    try:
        there = json.loads(path.read_text())
        if not isinstance(there, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: missing or damaged beside checkpoints ({error}); restore it, or "
            "take a fresh --workdir"
        ) from error
    differing = sorted(_differences(there, config))
    if differing:
        name, old, new = differing[0]
        raise UserError(
            f"--workdir {workdir} was begun with {name}={old!r}, not {new!r} "
            f"({len(differing)} differing): take a fresh --workdir or the old value"
        )


def write_json(path: Any, record: dict) -> None:
    """Replaces the file at once, so that a kill leaves the old or the new one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False))
    part.replace(path)


def flatten(record: dict, prefix: str = "") -> dict[str, Any]:
    """{"train": {"batch": 64}} as {"train.batch": 64}; tuples become lists."""
    flat = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def _differences(old: dict, new: dict) -> list[tuple[str, Any, Any]]:
    """What differs; a section, or an option that is off, came with a later version."""
    a, b = flatten(old), flatten(new)
    found = []
    for name in a.keys() | b.keys():
        section = name.partition(".")[0]
        if section not in old or (name not in a and not b[name]):
            continue
        if (
            a.get(name) == b.get(name)
            or name in RESUMABLE_CHANGES
            or section in RESUMABLE_CHANGES
        ):
            continue
        grows = name == "train.total_steps" and b.get("optim.decay") == "constant"
        if grows and b[name] >= a[name]:
            continue
        found.append((f"config.{name}", a.get(name), b.get(name)))
    return found
