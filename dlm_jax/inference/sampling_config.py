# SPDX-License-Identifier: Apache-2.0
"""Sampling settings, checked, and the solver step built from them."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from dlm_jax.diffusion import model, rounding, samplers
from dlm_jax.diffusion.model import Params
from dlm_jax.diffusion.schedule import Schedule, make_schedule
from dlm_jax.errors import UserError, choices, choose
from dlm_jax.inference.settings import Settings
from dlm_jax.ranges import flag, integer, real
from dlm_jax.types import Ids, Integer, Latent, Real


def _most_likely(params: Params, x: Latent, allowed: Any) -> Ids:
    logits = rounding.logits(params.table, params.bias, x)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    return jnp.argmax(logits, -1)


ROUNDINGS: dict[str, Callable[..., Ids]] = {
    "nearest": lambda params, x, allowed: rounding.nearest(params.table, x, allowed),
    "logits": _most_likely,
}


@dataclasses.dataclass(frozen=True)
class SamplingConfig(Settings):
    """How to sample. Without solver_options ddim has eta 0. Raises UserError.

    num_steps: denoiser calls. clamp: x0_hat is moved to the nearest embeddings at times
    t <= clamp, from -1 to 1; -1 turns it off. rounding: how the last x0_hat becomes ids, by the
    largest logit or the nearest embedding. churn, temperature: see `samplers`;
    asymmetry: the gap of `samplers.shift_timesteps`. solver_options: keyword arguments
    of the solver. trajectory: also return the ids of every step. sharpness: the gain of
    `samplers.sharpen`, or of `samplers.flow` if ddim has eta 0, from the temperature.
    """

    num_steps: Integer = 200
    solver: str = "ddim"
    clamp: Real = 1.0
    rounding: str = "logits"
    churn: Real = 0.0
    temperature: Real = 1.0
    asymmetry: Real = 0.0
    solver_options: tuple[tuple[str, Any], ...] = ()
    trajectory: Any = False
    sharpness: Real = dataclasses.field(init=False)

    NUMBERS: ClassVar[Mapping[str, float | None]] = {
        "clamp": -1.0,
        "churn": 0.0,
        "temperature": 1.0,
        "sharpness": 0.0,
        "asymmetry": None,
    }

    def __post_init__(self) -> None:
        choose("solver", samplers.SOLVERS, self.solver)
        choose("rounding", ROUNDINGS, self.rounding)
        defaults = samplers.solver_options(self.solver)
        own = {  # the solvers check the ranges
            name: real(name, value) if isinstance(defaults.get(name), float) else value
            for name, value in self.solver_options
        }
        checked = {
            "num_steps": integer("num_steps", self.num_steps, 1),
            "clamp": real("clamp", self.clamp, -1, 1),
            "churn": real("churn", self.churn, 0),
            "temperature": real("temperature", self.temperature, over=0),
            "asymmetry": real("asymmetry", self.asymmetry, 0),
            "solver_options": tuple(own.items()),
            "trajectory": flag("trajectory", self.trajectory),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "sharpness", 1 / self.temperature - 1)
        for name in ("churn", "temperature"):
            if self.uses(name) and self.solver not in samplers.ONE_STEP:
                raise UserError(f"{name}: solver {self.solver!r} does not take it")
        self.step(lambda x_t, t, x0_prev: x_t, make_schedule("sqrt"))  # checks options

    def numbers(self) -> dict[str, Any]:
        """Returns also the solver's options that are numbers; 0 turns one off."""
        own = {n: v for n, v in self.solver_options if isinstance(v, float) and v}
        return super().numbers() | own

    def join(self, numbers: Mapping[str, Any]) -> Any:
        """Returns a copy with these numbers, the solver's options among them."""
        names = [name for name, _ in self.solver_options]
        options = dict(self.solver_options) | {
            n: numbers[n] for n in names if n in numbers
        }
        rest = {name: value for name, value in numbers.items() if name not in names}
        return super().join(rest | {"solver_options": tuple(options.items())})

    def times(self, schedule: Schedule) -> samplers.Times:
        """Returns the times of the steps."""
        times = samplers.schedule_timesteps(schedule, self.num_steps)
        return samplers.shift_timesteps(times, self.asymmetry)

    @classmethod
    def from_config(
        cls, section: Mapping[str, Any], *, trajectory: Any = False, **overrides: Any
    ) -> "SamplingConfig":
        """Builds from a run's `sample` section; overrides that are None are ignored.

        The section also holds the options of other solvers. Raises UserError for an
        override that the solver does not take, and for an option of another solver that
        the section sets to something else than its default.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        values, wanted = dict(section) | given, FIELDS
        check_names(overrides, {*FIELDS, *_OPTIONS})
        for name in sorted(wanted - values.keys()):
            raise UserError(f"{name}: the saved config does not set it; pass it")
        solver = values["solver"]
        choose("solver", samplers.SOLVERS, solver)
        own = samplers.solver_options(solver)
        unknown = given.keys() - wanted
        if "solver" not in given:  # the section was written for this solver
            unknown |= {
                n for n, v in _OPTIONS.items() if n in values and values[n] != v
            }
        for name in sorted(unknown - own.keys()):
            raise UserError(f"{name}: solver {solver!r} does not take it")
        settings = {name: values[name] for name in wanted}
        if isinstance(values["clamp"], bool | np.bool_):
            settings["clamp"] = 1.0 if values["clamp"] else -1.0
        both = own | values
        options = tuple((name, both[name]) for name in own)
        return cls(**settings, solver_options=options, trajectory=trajectory)

    def check_schedule(self, schedule: Schedule) -> None:
        """Raises UserError if a discretised schedule has fewer steps than num_steps."""
        most = schedule.num_steps
        if most is not None and self.num_steps > most:
            raise UserError(
                f"num_steps={self.num_steps}: this model's schedule has only {most} "
                "steps"
            )

    def step(self, denoise: model.Denoise, schedule: Schedule) -> samplers.Step:
        """Returns the solver's step, at the wanted temperature."""

        def solver(denoise: model.Denoise) -> samplers.Step:
            make = samplers.SOLVERS[self.solver]
            return make(denoise, schedule, **dict(self.solver_options))

        if not self.uses("sharpness"):
            return solver(denoise)
        options = {"eta": 0.0} | dict(self.solver_options)
        if self.solver == "ddim" and samplers.is_off(options["eta"]):
            return samplers.flow(denoise, schedule, gain=self.sharpness)
        return samplers.sharpen(solver, denoise, schedule, gain=self.sharpness)


# a run's defaults for every solver option; the published sampler is DDIM with eta 1
_OPTIONS = {
    name: value
    for solver in samplers.SOLVERS
    for name, value in samplers.solver_options(solver).items()
} | {"eta": 1.0}
# what `from_config` takes from a section, and what a caller may override
FIELDS = {field.name for field in dataclasses.fields(SamplingConfig)} - {
    "solver_options",
    "trajectory",
    "sharpness",
}
OPTIONS = {*FIELDS, *_OPTIONS, "trajectory"}


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Raises UserError for the first name given that is not known."""
    for name in sorted(set(given) - set(known)):
        raise UserError(
            f"{name}: no option has this name; {choices(name, sorted(known))}"
        )


# options of --mode sample, which the configs of older runs lack
TRANSLATION = {"sources": "", "out": "", "mbr": 1, "cfg_weight": 1.0}


def default_section() -> dict[str, Any]:
    """Returns the defaults of a run's `sample` section, the published ones.

    n: texts that --mode sample prints; batch: texts generated at once; seed: of the
    samples. sources: a file of sources, one a line, for a model of pairs; mbr, cfg_weight:
    of `lm.translate`; out: a file for the texts. The rest are the fields of `SamplingConfig` and the options of all solvers.
    """
    section: dict[str, Any] = {"n": 50, "batch": 50, "seed": 101} | TRANSLATION
    section |= dataclasses.asdict(SamplingConfig())
    for name in ("solver_options", "trajectory", "sharpness"):
        del section[name]
    return section | _OPTIONS
