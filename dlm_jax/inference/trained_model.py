# SPDX-License-Identifier: Apache-2.0
"""The record of a trained model: everything that sampling and scoring read."""

import dataclasses
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dlm_jax.data import encoding
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.diffusion import adaptive, model
from dlm_jax.diffusion.model import Params
from dlm_jax.diffusion.schedule import Schedule
from dlm_jax.errors import UserError
from dlm_jax.inference.constraints import GuidanceClassifier
from dlm_jax.inference.sampling_config import SamplingConfig
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.types import Integer, PyTree

MAX_PROGRAMS = 16  # compiled functions per model, some 14 MB each
_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True, repr=False)
class TrainedModel:
    """A trained model: parameters, network, noise schedule, tokenizer and config.

    params: the parameters as trained; ema: their moving average, which samples.
    schedule_state: the statistics of an adaptive schedule, or (). lengths: the
    number of training texts of 0, 1, ... tokens, if cfg.known_length. classifiers:
    those that can guide it, by task. compiled: functions by name, the one used last at
    the end.
    """

    params: Params
    ema: Params
    cfg: DenoiserConfig
    schedule: Schedule
    tokenizer: Tokenizer
    config: dict
    step: int
    schedule_state: PyTree = ()
    lengths: tuple[int, ...] = ()
    classifiers: Mapping[str, GuidanceClassifier] = dataclasses.field(
        default_factory=dict
    )
    compiled: dict = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({model.count(self.params):,} parameters, "
            f"vocabulary {self.tokenizer.vocab_size}, length {self.length}, "
            f"step {self.step}, schedule {self.config['schedule']['name']!r})"
        )

    @property
    def length(self) -> int:
        """Positions of a sequence, START and END included."""
        return self.config["data"]["length"]

    @property
    def supports_conditioning(self) -> bool:
        """Whether it was trained with given tokens (config.loss.conditioning_prob)."""
        loss = self.config["loss"]
        return "conditioning_prob" in loss and loss["conditioning_prob"] > 0

    @property
    def supports_guidance(self) -> bool:
        """Whether it was trained with and without what is known, for cfg_weight."""
        loss = self.config["loss"]
        drops = "source_drop_prob" in loss and loss["source_drop_prob"] > 0
        return drops or self.supports_conditioning

    @property
    def distilled_steps(self) -> int | None:
        """The number of steps that it was distilled for (--mode distill), or None."""
        section = self.config.get("distill")  # earlier models have none
        return (section["student"] or None) if section else None

    def decode(self, ids: np.ndarray) -> list[str]:
        """Returns the text of each row of ids [n l]; of a packed row, a line per text."""
        mode = self.config["data"].get("mode") or "pad"
        return [encoding.decode(row, self.tokenizer, mode) for row in ids]

    def default(self, name: str, value: Integer | None) -> Integer:
        """Returns the value, or the run's own of config.sample. Raises UserError."""
        if value is None and name not in self.config["sample"]:
            raise UserError(f"{name}: the saved config does not set it; pass it")
        return self.config["sample"][name] if value is None else value

    def sampling_config(self, **options: Any) -> SamplingConfig:
        """Returns the run's sampling settings with these options. Raises UserError."""
        s = SamplingConfig.from_config(self.config["sample"], **options)
        s.check_schedule(self.schedule)
        return s

    def schedule_from(self, schedule_state: PyTree) -> Schedule:
        """Returns the noise schedule, adapted to the statistics if there are any."""
        if not jax.tree.leaves(schedule_state):
            return self.schedule
        return adapted_schedule(self.config, schedule_state)

    def cached(self, name: Any, make: Callable[[], Callable]) -> Callable:
        """Returns the compiled function of that name, made on first use.

        MAX_PROGRAMS are kept, those used last; a name stands for one program.
        """
        with _LOCK:
            run = self.compiled.pop(name, None) or jax.jit(make())
            self.compiled[name] = run
            while len(self.compiled) > MAX_PROGRAMS:
                self.compiled.pop(next(iter(self.compiled))).clear_cache()
        return run


def adapted_schedule(config: dict, schedule_state: PyTree) -> Schedule:
    """Returns the adaptive schedule that follows from its statistics."""
    return adaptive.ADAPTIVE_SCHEDULES[config["schedule"]["adaptive"]](schedule_state)
