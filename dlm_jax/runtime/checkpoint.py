# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints: <workdir>/checkpoints/<step>/{state,config,tokenizer,run,sums}.

Saves are asynchronous and atomic: `all_steps` lists a step only once it is complete.
config, tokenizer and run are JSON; nothing is ever unpickled. sums holds checksums of
everything saved, because Orbax's compression does not detect a flipped bit.
"""

import contextlib
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dlm_jax.errors import UserError, environment_reason
from dlm_jax.runtime import integrity, paths
from dlm_jax.types import PyTree


class Records(NamedTuple):
    """The JSON records of a checkpoint.

    config: the resolved config. tokenizer: the record that `tokenizer.from_dict` reads.
    run: the kind of model ("diffusion", "autoregressive" or "classifier"), the corpus's
    checksum, a classifier's labels and its table's checksum, the batches that rollbacks
    skipped, and under known_length the number of texts by length.
    """

    config: dict
    tokenizer: dict
    run: dict


class CorruptCheckpointError(UserError):
    """Raised for a checkpoint whose bytes are not those saved. path: its folder."""

    def __init__(self, path: Path, reason: str):
        super().__init__(
            f"{path}: damaged ({reason}); start with "
            "--allow_fallback to resume from the one before, or use another step"
        )
        self.path = path


PathLike = str | os.PathLike  # a run's directory; also gs://...
FOLDER, COMMITTED = "checkpoints", "commit_success.txt"
# settings that may change when a run resumes: same model, data and objective, the data
# by their checksum
_RESUMABLE = "ckpt_steps keep log_steps valid_steps valid_batches sample_steps "
_RESUMABLE += "profile_steps writers on_nonfinite"  # of config.train
RESUMABLE_CHANGES = {f"train.{name}" for name in _RESUMABLE.split()} | {
    *("sample", "evaluate", "export", "control", "parallel", "model.remat"),
    *paths.TRAINING,
}


def resolve_workdir(workdir: PathLike) -> Any:
    """Returns a run's directory as an absolute path or a bucket path (gs://...)."""
    if "://" in str(workdir):
        from etils import epath

        return epath.Path(workdir)
    return Path(os.path.abspath(workdir))


def check_reachable(workdir: PathLike) -> None:
    """Raises UserError if the bucket of workdir cannot be reached."""
    try:
        resolve_workdir(workdir).exists()
    except Exception as error:  # no library, no permission or no bucket
        raise UserError(
            f"--workdir {workdir}: cannot be reached ({_reason(error)}); buckets need "
            "pip install 'dlm_jax[bucket]' and your credentials"
        ) from error


def check_name(workdir: PathLike) -> None:
    """Raises UserError if what is saved in this folder could not be found again.

    TensorStore takes names in UTF-8 and a backslash for a slash, whatever the system
    does, and Orbax looks for the arrays that it wrote by a pattern.
    """
    name = str(folder(workdir))
    if "://" not in name:
        for character in "*?[\\".replace(os.sep, ""):
            if character in name:
                raise UserError(
                    f"--workdir {name}: no checkpoint can be saved in a folder with "
                    f"{character} in its name; choose another name"
                )
        if integrity.utf8(name) != name:
            raise UserError(
                f"--workdir {name!a}: the locale has no such character, so no checkpoint "
                "can be saved here; set LC_ALL=C.UTF-8, or choose a name in ASCII"
            )


def folder(workdir: PathLike) -> Any:
    """Returns the folder of a run's checkpoints."""
    return resolve_workdir(workdir) / FOLDER


def run_directory(
    path: PathLike, step: int | None = None
) -> tuple[PathLike, int | None]:
    """Returns (workdir, step) for a path to a run, to its checkpoints or to one of them.

    A path to one checkpoint gives its step, unless another is asked for.
    """
    place = resolve_workdir(path)
    if (place / FOLDER).exists():
        return path, step
    if place.parent.name == FOLDER and place.name.isdigit():
        own, place = int(place.name), place.parent
        step = own if step is None else step
    return (str(place.parent) if place.name == FOLDER else path), step


@contextlib.contextmanager
def root_logger_kept() -> Iterator[None]:
    """Removes what absl, by which Orbax logs, adds to a root logger without handlers.

    It would make a later logging.basicConfig of the process do nothing.
    """
    bare = not logging.root.handlers
    try:
        yield
    finally:
        for handler in [*logging.root.handlers] if bare else ():
            if type(handler) is logging.StreamHandler:
                logging.root.removeHandler(handler)


def manager(workdir: PathLike, *, keep: int) -> Any:
    """Returns the checkpoint writer of a run, which keeps the newest `keep` steps.

    It logs: use it under `root_logger_kept`.
    """
    import orbax.checkpoint as ocp  # late: reading does without it

    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(folder(workdir), options=options)


def save(
    writer: Any,
    step: int,
    state: PyTree,
    records: Records,
) -> None:
    """Starts an asynchronous save of `step`; raises UserError if it is not saved.

    state: on several hosts, global arrays (`sharding.Layout.whole`).
    """
    import orbax.checkpoint as ocp

    sums = integrity.state_sums(state) | integrity.json_sums(records._asdict())
    parts = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        sums=ocp.args.JsonSave(sums),
        **{name: ocp.args.JsonSave(r) for name, r in records._asdict().items()},
    )
    with _saving(writer, f"step {step}"):
        done = writer.save(step, args=parts)
    if not done:
        raise UserError(
            f"{writer.directory}: step {step} was not saved, because step "
            f"{writer.latest_step()} exists; choose another --workdir"
        )


def wait(writer: Any) -> None:
    """Waits until the last save is complete. Raises UserError."""
    with _saving(writer, "the last step"):
        writer.wait_until_finished()


@contextlib.contextmanager
def _saving(writer: Any, what: str) -> Iterator[None]:
    """Turns an error of the storage, such as a full disk, into a UserError."""
    try:
        yield
    except Exception as error:  # Orbax and its storage raise various types
        steps = all_steps(writer.directory.parent)
        raise UserError(
            f"{writer.directory}: {what} cannot be saved ({_reason(error)}); the "
            f"last complete checkpoint is {steps[-1] if steps else 'none'}: free space "
            "or repair the folder, and rerun the command to resume"
        ) from error


def _reason(error: Exception) -> str:
    """Returns the system's reason for a storage error, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    known = re.search(
        r"No space left on device|Read-only file system|Permission denied|"
        r"No such file or directory|File too large|Disk quota exceeded",
        text,
    )
    return known.group() if known else text[:200]


def check_saves(writer: Any) -> None:
    """Raises UserError if an asynchronous save has failed."""
    with _saving(writer, "the last step"):
        writer.check_for_errors()


def all_steps(workdir: PathLike) -> list[int]:
    """Returns the steps of a run's complete checkpoints, in ascending order.

    Buckets cannot rename folders, so there Orbax marks complete ones with COMMITTED.
    """
    path = folder(workdir)
    if not path.is_dir():
        return []
    folders = [p for p in path.iterdir() if p.name.isdigit()]
    if "://" in str(path):
        folders = [p for p in folders if (p / COMMITTED).exists()]
    return sorted(int(p.name) for p in folders)


def choose_step(workdir: PathLike, step: int | None = None) -> int:
    """Returns `step`, or the newest if None. Raises UserError if it is missing."""
    steps = all_steps(workdir)
    if not steps:
        raise UserError(
            f"{folder(workdir)}: no checkpoint; train first with this workdir"
        )
    if step is not None and step not in steps:
        raise UserError(f"{folder(workdir)}: no step {step}; choose one of {steps}")
    return steps[-1] if step is None else step


def restore(workdir: PathLike, step: int, like: PyTree) -> PyTree:
    """Restores the state saved at `step`, in the types that were saved.

    like: its shapes and shardings. Raises UserError; CorruptCheckpointError only if the
    bytes are not those that were saved.
    """
    return _state(workdir, step, like, partial=False)


def restore_part(workdir: PathLike, step: int, like: dict[str, PyTree]) -> PyTree:
    """Restores only the fields of the state in `like`, such as {"ema": ...}."""
    return _state(workdir, step, like, partial=True)


def _state(workdir: PathLike, step: int, like: PyTree, partial: bool) -> PyTree:
    path, sums = folder(workdir) / str(step), _read_json(workdir, step, "sums")
    integrity.utf8(str(path))  # raises UserError
    try:
        state = integrity.read(path, like)
        found = integrity.state_sums(state)
        if names := integrity.differing(found, sums):
            raise ValueError(f"the checksum of {names[0]} differs")
        if not partial and (more := sums.keys() - found.keys() - {*Records._fields}):
            raise ValueError(f"it also has {min(more)}")
    except Exception as error:  # TensorStore raises ValueError for most reasons
        raise _read_error(path, sums, error) from error
    return state


def _read_error(path: Any, sums: dict, error: Exception) -> UserError:
    """Returns what to raise for an error in reading a state: it is damaged or not."""
    arrays = {k: v for k, v in sums.items() if k not in Records._fields}
    try:
        damage = integrity.damage(path, arrays)
    except Exception as found:  # of the storage
        error, damage = found, ""
    if not path.is_dir():
        return UserError(f"{path}: was removed while it was read; load the newest step")
    if damage:
        return CorruptCheckpointError(path, damage)
    if reason := environment_reason(error):
        return _unreadable(path, reason)
    return UserError(
        f"{path}: its bytes are as saved, but this model cannot be read from them "
        f"({_reason(error)}); use the version, and the settings of JAX, that saved it"
    )


def _unreadable(path: Any, reason: str) -> UserError:
    return UserError(
        f"{path}: cannot be read here ({reason}), and was left as it is; check the "
        "machine's memory, limits and permissions, and rerun"
    )


def _read_json(workdir: PathLike, step: int, name: str) -> dict:
    """Returns a JSON object of a checkpoint. Raises UserError."""
    path = folder(workdir) / str(step)
    _refuse_links(workdir, step)
    try:
        record = json.loads((path / name / "metadata").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if not path.is_dir():
            raise UserError(f"{path}: does not exist; load another step") from error
        if reason := environment_reason(error):
            raise _unreadable(path, reason) from error
        raise CorruptCheckpointError(path, f"{name}: {_reason(error)}") from error
    if not isinstance(record, dict):
        raise CorruptCheckpointError(path, f"{name} is not a JSON object")
    return record


def read_records(workdir: PathLike, step: int) -> Records:
    """Returns the records of a checkpoint. Raises UserError."""
    path = folder(workdir) / str(step)
    if path.is_dir() and not (path / "run").exists():
        raise UserError(
            f"{path}: saved by an older version of dlm_jax, or incomplete; use that "
            "version, or train again"
        )
    records = Records(*(_read_json(workdir, step, name) for name in Records._fields))
    sums = integrity.json_sums(records._asdict())
    if names := integrity.differing(sums, _read_json(workdir, step, "sums")):
        raise CorruptCheckpointError(path, f"the checksum of {names[0]} differs")
    return records


def quarantine(damaged: CorruptCheckpointError, workdir: PathLike) -> Path:
    """Moves a damaged checkpoint to <workdir>/damaged and returns its new path.

    Raises `damaged` if it belongs to another run or the run has no other step.
    """
    step = damaged.path.name
    path = resolve_workdir(workdir) / "damaged" / step
    if damaged.path.parent != folder(workdir) or all_steps(workdir)[1:] == []:
        raise damaged
    while path.exists():
        path = path.with_name(f"{path.name}_")
    path.parent.mkdir(exist_ok=True)
    (folder(workdir) / step).rename(path)
    return path


def _refuse_links(workdir: PathLike, step: int) -> None:
    """Raises UserError if a checkpoint contains links, which may leave its folder."""
    path = folder(workdir) / str(step)
    contents = path.rglob("*") if isinstance(path, Path) else ()
    for entry in (path, *contents):
        if isinstance(entry, Path) and entry.is_symlink():
            raise UserError(
                f"{path}: {entry.name} is a link, which may lead out of the checkpoint; "
                "put the files themselves in its place"
            )


def checksum(tree: PyTree) -> int:
    """Returns one checksum over all arrays of a tree, in order."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total = zlib.crc32(np.asarray(leaf).tobytes(), total)
    return total


def write_run_config(workdir: PathLike, config: dict) -> None:
    """Writes <workdir>/config.json, the config that a resume must match."""
    try:
        resolve_workdir(workdir).mkdir(parents=True, exist_ok=True)
        write_json(resolve_workdir(workdir) / "config.json", config)
    except OSError as error:
        raise UserError(
            f"--workdir {workdir}: cannot write ({error.strerror}); choose another"
        ) from error


def check_config_matches(workdir: PathLike, config: dict) -> None:
    """Raises UserError naming a difference if the run began with another config.

    RESUMABLE_CHANGES may differ, and train.total_steps may grow if the learning rate
    is constant.
    """
    path = resolve_workdir(workdir) / "config.json"
    if not all_steps(workdir):
        return  # nothing is saved yet, so nothing can be lost
    try:
        saved = json.loads(path.read_text("utf-8"))
        if not isinstance(saved, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        if reason := environment_reason(error):
            raise _unreadable(path, reason) from error
        raise UserError(
            f"{path}: missing or damaged, but checkpoints exist ({error}); restore it, "
            "or choose another --workdir"
        ) from error
    differing = sorted(_differences(saved, config))
    if differing:
        name, old, new = differing[0]
        raise UserError(
            f"--workdir {workdir} was begun with {name}={old!r}, not {new!r} "
            f"({len(differing)} differing): choose another --workdir or the old value"
        )


def write_json(path: Any, record: dict) -> None:
    """Replaces a file atomically: a kill leaves either the old or the new file."""
    part = path.with_suffix(".part")
    text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False)
    # a path of bytes that are not UTF-8 becomes an escape, which JSON reads back
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    part.replace(path)


def flatten(record: dict, prefix: str = "") -> dict[str, Any]:
    """Flattens {"train": {"batch": 64}} to {"train.batch": 64}; tuples become lists."""
    flat = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def _differences(old: dict, new: dict) -> list[tuple[str, Any, Any]]:
    """Returns (name, old, new) of the settings that differ and may not.

    A section, or an option that is off, may be missing from an older version's config.
    """
    a, b = flatten(old), flatten(new)
    differing = []
    for name in a.keys() | b.keys():
        section = name.partition(".")[0]
        if section not in old or (name not in a and not b[name]):
            continue
        if a.get(name) == b.get(name) or {name, section} & RESUMABLE_CHANGES:
            continue
        grows = name == "train.total_steps" and b.get("optim.decay") == "constant"
        if grows and b[name] >= a[name]:
            continue
        differing.append((f"config.{name}", a.get(name), b.get(name)))
    return differing
