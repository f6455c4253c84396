# SPDX-License-Identifier: Apache-2.0
"""Sampling settings, checked, and the solver step built from them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from dlm_jax.diffusion import model, rounding, samplers
from dlm_jax.diffusion.model import Params
from dlm_jax.diffusion.schedule import Schedule, make_schedule
from dlm_jax.errors import UserError, choose
from dlm_jax.types import Ids, Latent


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
class SamplingConfig:
    """How to sample. Without solver_options ddim has eta 0. Raises UserError.

    num_steps: denoiser calls. clamp: x0_hat is moved to the nearest embeddings at times
    t <= clamp; -1 turns it off. rounding: how the last x0_hat becomes ids, by the
    largest logit or the nearest embedding. churn, temperature: see `samplers`;
    asymmetry: the gap of `samplers.shift_timesteps`. solver_options: keyword arguments
    of the solver. trajectory: also return the ids of every step.
    """

    num_steps: int = 200
    solver: str = "ddim"
    clamp: float = 1.0
    rounding: str = "logits"
    churn: float = 0.0
    temperature: float = 1.0
    asymmetry: float = 0.0
    solver_options: tuple[tuple[str, Any], ...] = ()
    trajectory: bool = False

    def __post_init__(self) -> None:
        choose("solver", samplers.SOLVERS, self.solver)
        choose("rounding", ROUNDINGS, self.rounding)
        if self.num_steps < 1:
            raise UserError(f"num_steps={self.num_steps}: must be 1 or more")
        for name in ("churn", "asymmetry"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: must be 0 or more")
        if self.temperature <= 0:
            raise UserError(f"temperature={self.temperature}: must be over 0")
        for name, off in (("churn", 0), ("temperature", 1)):
            if getattr(self, name) != off and self.solver not in samplers.ONE_STEP:
                raise UserError(f"{name}: solver {self.solver!r} does not take it")
        self.step(lambda x_t, t, x0_prev: x_t, make_schedule("sqrt"))  # checks options

    @classmethod
    def from_config(
        cls, section: Mapping[str, Any], *, trajectory: bool = False, **overrides: Any
    ) -> "SamplingConfig":
        """Builds from a run's `sample` section; overrides that are None are ignored.

        The section also holds the options of other solvers. Raises UserError for an
        override that the solver does not take, and for an option of another solver that
        the section sets to something else than its default.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        values = dict(section) | given
        fields = {field.name for field in dataclasses.fields(cls)}
        wanted = fields - {"solver_options", "trajectory"}
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
        if isinstance(values["clamp"], bool):
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

        if self.temperature == 1:
            return solver(denoise)
        return samplers.temperature(solver, denoise, schedule, tau=self.temperature)


# a run's defaults for every solver option; the published sampler is DDIM with eta 1
_OPTIONS = {
    name: value
    for solver in samplers.SOLVERS
    for name, value in samplers.solver_options(solver).items()
} | {"eta": 1.0}


def default_section() -> dict[str, Any]:
    """Returns the defaults of a run's `sample` section, the published ones.

    n: texts that --mode sample prints; batch: texts generated at once; seed: of the
    samples. The rest are the fields of `SamplingConfig` and the options of all solvers.
    """
    section = {"n": 50, "batch": 50, "seed": 101}
    section |= dataclasses.asdict(SamplingConfig())
    del section["solver_options"], section["trajectory"]
    return section | _OPTIONS
