# SPDX-License-Identifier: Apache-2.0
"""Writers that mirror metrics.jsonl elsewhere: TensorBoard's event files, and wandb.

Each is made by WRITERS[name](workdir, start, config) and needs the extra of its name.
"""

import importlib
import importlib.util
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from dlm_jax.errors import UserError, choose

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


@runtime_checkable
class Writer(Protocol):
    """Where the metrics of a run go besides metrics.jsonl."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step, such as train/loss."""

    def close(self) -> None:
        """Writes what is left."""


class TensorBoard:
    """Event files in workdir/tensorboard; a resumed run replaces what lay ahead of it."""

    def __init__(self, workdir: Any, start: int, config: Mapping[str, Any]):
        module = importlib.import_module(PACKAGES["tensorboard"])
        folder = str(workdir / "tensorboard")
        self.events = module.SummaryWriter(folder, purge_step=start + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step."""
        for name, value in values.items():
            self.events.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the event file."""
        self.events.close()


class WeightsAndBiases:
    """A run of wandb in the project dlm_jax; a resumed run continues it."""

    def __init__(self, workdir: Any, start: int, config: Mapping[str, Any]):
        module = importlib.import_module(PACKAGES["wandb"])
        try:
            self.run = module.init(
                project="dlm_jax",
                name=workdir.name,
                id=f"{zlib.crc32(str(workdir).encode(errors='replace')):08x}",
                dir=str(workdir),
                config=dict(config),
                resume="allow",
            )
        except Exception as error:  # such as no key, or no network
            raise UserError(
                f"config.train.writers=wandb: {error}; set WANDB_MODE=offline, or leave "
                "it out"
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run of wandb."""
        self.run.finish()


WRITERS: dict[str, Callable[..., Writer]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def check(names: str) -> list[str]:
    """Returns the names of config.train.writers. Raises UserError if one cannot be used."""
    for name in names.split():
        choose("config.train.writers", WRITERS, name)
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"config.train.writers={name}: {PACKAGES[name]} is not installed; "
                f"pip install 'dlm_jax[{name}]', or leave it out"
            )
    return names.split()


def open_all(
    names: str, workdir: Any, start: int, config: Mapping[str, Any]
) -> list[Writer]:
    """Opens the writers of config.train.writers. Raises UserError.

    start: the step at which the run resumes; config: of the run.
    """
    if names and "://" in str(workdir):
        raise UserError(
            f"config.train.writers={names}: needs a --workdir on a disk; leave it out"
        )
    return [WRITERS[name](workdir, start, config) for name in check(names)]
