# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by Orbax: <workdir>/checkpoints/<step>/{state, config, tokenizer}.

Saves are asynchronous and atomic: a step directory appears under its plain integer when
it is complete. config and tokenizer are JSON; nothing here is ever unpickled.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from dlm_jax.types import PyTree, UserError

FOLDER = "checkpoints"
# a run may be resumed with these changed: they do not touch the training itself
FREE = {
    f"train.{name}"
    for name in (
        "ckpt_steps",
        "keep",
        "log_steps",
        "valid_steps",
        "valid_batches",
        "sample_steps",
    )
}


def folder(workdir: str | Path) -> Path:
    """Where a run's checkpoints lie; Orbax needs the absolute path."""
    return Path(os.path.abspath(workdir)) / FOLDER


def manager(workdir: str | Path, *, keep: int) -> ocp.CheckpointManager:
    """The writer of a run: it keeps the newest `keep` steps."""
    logging.getLogger("absl").setLevel(logging.WARNING)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(folder(workdir), options=options)


def save(
    writer: ocp.CheckpointManager,
    step: int,
    state: PyTree,
    config: dict,
    tokenizer: dict,
) -> None:
    """Starts an asynchronous save of `step`; UserError if nothing would be written.

    state: global arrays where there are several hosts (`parallel.to_global`).
    """
    parts = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        config=ocp.args.JsonSave(config),
        tokenizer=ocp.args.JsonSave(tokenizer),
    )
    if not writer.save(step, args=parts):
        raise UserError(
            f"{writer.directory}: step {step} was not saved, as step "
            f"{writer.latest_step()} is there; take a fresh --workdir"
        )


def steps(workdir: str | Path) -> list[int]:
    """The complete checkpoints of a run, oldest first."""
    path = folder(workdir)
    if not path.is_dir():
        return []
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit())


def latest(workdir: str | Path, step: int | None = None) -> int:
    """The newest complete step, or `step` if it exists; UserError otherwise."""
    there = steps(workdir)
    if not there:
        raise UserError(
            f"{folder(workdir)}: no checkpoint; train first with this workdir"
        )
    if step is not None and step not in there:
        raise UserError(f"{folder(workdir)}: no step {step}; there are {there}")
    return there[-1] if step is None else step


def restore(workdir: str | Path, step: int, like: PyTree) -> PyTree:
    """The state saved at `step`; like: its shapes and shardings."""
    return _read(workdir, step, state=ocp.args.StandardRestore(like)).state


def restore_part(workdir: str | Path, step: int, like: dict[str, PyTree]) -> PyTree:
    """Some fields of the state, such as {"ema": ...}: enough to sample."""
    args = ocp.args.PyTreeRestore(
        like,
        restore_args=ocp.checkpoint_utils.construct_restore_args(like),
        partial_restore=True,
    )
    return _read(workdir, step, state=args).state


def read_json(workdir: str | Path, step: int) -> tuple[dict, dict]:
    """(resolved config, tokenizer record) of a checkpoint."""
    json_args = ocp.args.JsonRestore()
    found = _read(workdir, step, config=json_args, tokenizer=json_args)
    return found.config, found.tokenizer


def _read(workdir: str | Path, step: int, **parts: Any) -> Any:
    """One read-only restore; whatever is wrong with the files is one line."""
    logging.getLogger("absl").setLevel(logging.WARNING)
    options = ocp.CheckpointManagerOptions(read_only=True)
    try:
        with ocp.CheckpointManager(folder(workdir), options=options) as reader:
            return reader.restore(step, args=ocp.args.Composite(**parts))
    except Exception as error:  # Orbax raises many kinds for damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"{folder(workdir) / str(step)}: damaged or not of this model ({reason}); "
            "use another step, or move this one away to fall back on the one before"
        ) from error


def claim(workdir: str | Path, config: dict, *, write: bool = True) -> None:
    """Makes the run directory this config's, or refuses it with the reason.

    <workdir>/config.json is the run's identity. Intervals may change, sampling
    settings too, and train.total_steps may grow where the learning rate is constant.
    write: False on all hosts but the first.
    """
    path = Path(workdir) / "config.json"
    if not write:
        return
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if steps(workdir):
                raise UserError(f"{path}: missing beside checkpoints; restore it")
            _write_json(path, config)
    except OSError as error:
        raise UserError(
            f"--workdir {workdir}: cannot write ({error.strerror}); choose another"
        ) from error
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON; take a fresh --workdir") from error
    differing = sorted(_differences(there, config))
    if differing:
        name, old, new = differing[0]
        raise UserError(
            f"--workdir {workdir} was begun with {name}={old!r}, not {new!r} "
            f"({len(differing)} differing): take a fresh --workdir or the old value"
        )
    _write_json(path, config)


def _write_json(path: Path, record: dict) -> None:
    """Replaces the file at once, so that a kill leaves the old or the new one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1, sort_keys=True))
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
    a, b = flatten(old), flatten(new)
    found = []
    for name in a.keys() | b.keys():
        if a.get(name) == b.get(name) or name in FREE or name.startswith("sample."):
            continue
        grows = name == "train.total_steps" and b.get("optim.decay") == "constant"
        if grows and b[name] >= a[name]:
            continue
        found.append((f"config.{name}", a.get(name), b.get(name)))
    return found
