# SPDX-License-Identifier: Apache-2.0
"""The programmatic API: sample from a trained model, steer it, score texts with it.

bundle = dlm_jax.load("runs/quickstart")
bundle.sample(4, seed=0, steps=64)
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.data import batching, encoding, tokenizer
from dlm_jax.diffusion import (
    adaptive,
    autoregressive,
    guidance,
    likelihood,
    losses,
    model,
    rounding,
    samplers,
    schedule,
)
from dlm_jax.diffusion.embedding import embed
from dlm_jax.diffusion.model import Params
from dlm_jax.diffusion.schedule import Schedule
from dlm_jax.errors import UserError, choose
from dlm_jax.inference import conditioning, constraints
from dlm_jax.inference.constraints import UNCONSTRAINED, DEFAULT_GUIDANCE, GuidanceClassifier, GuidanceConfig, Constraints
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.runtime import sharding
from dlm_jax.types import Ids, Latent, PyTree


class Samples(NamedTuple):
    """texts [n]; ids [n l]; latents [n l d], the last x0_hat; trace [n steps l] or None.

    The trace holds the ids that every step's x0_hat rounds to.
    """

    texts: list[str]
    ids: np.ndarray
    latents: np.ndarray
    trace: np.ndarray | None


class SamplingConfig(NamedTuple):
    """How to sample; one compilation for each value and batch."""

    steps: int
    solver: str
    eta: float
    sigma: str
    top_p: float
    churn: float
    temperature: float
    asymmetry: float
    clamp: float
    rounding: str
    trace: bool = False


def _most_likely(params: Params, x: Latent, allowed: Any) -> Ids:
    scores = rounding.logits(params.table, params.bias, x)
    return jnp.argmax(
        scores if allowed is None else jnp.where(allowed, scores, -jnp.inf), -1
    )


ROUNDINGS: dict[str, Callable] = {
    "nearest": lambda params, x, allowed: rounding.nearest(params.table, x, allowed),
    "logits": _most_likely,
}
# the options each solver takes, out of the settings
OPTIONS: dict[str, tuple[str, ...]] = {
    "ancestral": ("sigma", "top_p", "churn", "temperature"),
    "marginal": (),
    "ddim": ("eta", "churn", "temperature"),
    "dpmpp_2m": (),
}


@dataclasses.dataclass(frozen=True)
class DiffusionLM:
    """A trained model with all it needs: params as trained, ema for sampling."""

    params: Params
    ema: Params
    cfg: DenoiserConfig
    schedule: Schedule
    tokenizer: tokenizer.Tokenizer
    config: dict
    step: int
    schedule_state: PyTree = ()  # of an adaptive schedule: what it knows
    classifiers: Mapping[str, GuidanceClassifier] = dataclasses.field(default_factory=dict, repr=False)
    compiled: dict = dataclasses.field(default_factory=dict, repr=False)

    def with_classifier(self, *workdirs: str | Path) -> "DiffusionLM":
        """This bundle, and classifiers to steer it: runs of --mode train_classifier."""
        found = [conditioning.load_classifier(path, self.ema.table) for path in workdirs]
        classifiers = dict(self.classifiers) | {guide.names.task: guide for guide in found}
        return dataclasses.replace(self, classifiers=classifiers, compiled={})

    @property
    def length(self) -> int:
        """Positions of a sequence."""
        return self.config["data"]["length"]

    @property
    def supports_conditioning(self) -> bool:
        """Whether the model learned to be given tokens: config.loss.known."""
        return "known" in self.config["loss"] and self.config["loss"]["known"] > 0

    def sample(self, n: int, **settings: Any) -> list[str]:
        """n texts without specials; `draw` lists the settings."""
        return self.generate(n, **settings).texts

    def generate(
        self,
        n: int,
        *,
        seed: int | None = None,
        steps: int | None = None,
        solver: str | None = None,
        eta: float | None = None,
        sigma: str | None = None,
        top_p: float | None = None,
        churn: float | None = None,
        temperature: float | None = None,
        asymmetry: float | None = None,
        clamp: float | bool | None = None,
        rounding: str | None = None,
        trace: bool = False,
        batch: int | None = None,
        wishes: Constraints = UNCONSTRAINED,
        plan: GuidanceConfig = DEFAULT_GUIDANCE,
    ) -> Samples:
        """n samples as texts, ids and latents; None means the run's config.

        seed: text i depends on (seed, i) alone, not on n or the batch. steps: denoiser
        calls. churn, temperature, asymmetry: see `samplers`. clamp: True, False or the
        time below which x0_hat is snapped to words. wishes, plan: see `constraints`.
        """
        settings = self.sampling_config(
            trace=trace,
            steps=steps,
            solver=solver,
            eta=eta,
            sigma=sigma,
            top_p=top_p,
            churn=churn,
            temperature=temperature,
            asymmetry=asymmetry,
            clamp=clamp,
            rounding=rounding,
        )
        _require_positive("n", n)
        if self.cfg.causal and jax.tree.leaves(wishes):
            raise UserError("a teacher writes from left to right: it grants no wishes")
        choose("plan.rule", guidance.UPDATE_RULES, plan.rule)
        if plan.scale != 1 and not self.supports_conditioning:
            raise UserError(
                f"plan.scale={plan.scale}: this model did not learn to be given tokens; "
                "train one with config.loss.known over 0"
            )
        key = jax.random.key(self._default("seed", seed))
        size = min(_require_positive("batch", self._default("batch", batch)), _next_power_of_two(n))
        parts = []
        for first in range(0, n, size):
            index = first + np.arange(size)
            rows = jax.tree.map(
                lambda x, i=index: np.asarray(x)[np.minimum(i, n - 1)], wishes
            )
            heads = {task: self.classifiers[task].params for task in wishes.labels}
            run = self._run(settings, size, plan)
            index, rows = sharding.shard_rows((index, rows))
            done = run(key, self.ema, self.schedule_state, index, rows, heads)
            parts.append(sharding.gather_to_host(done))
        latents, ids = (np.concatenate([p[i] for p in parts])[:n] for i in (0, 1))
        traces = np.concatenate([p[2] for p in parts])[:n] if trace else None
        texts = [self.tokenizer.decode(row) for row in ids]
        return Samples(texts, ids, latents, traces)

    def infill(self, template: str, n: int = 5, **options: Any) -> list[str]:
        """n texts of a template: ___ is one open word, [...] any number of them.

        The known words come back exactly. Each text draws the width of its gaps, from 1
        to 10 words as they fit; a gap at the end is as long as the model likes. options:
        those of `control`.
        """
        return self.control(n, template=template, **options)

    def control(
        self,
        n: int = 5,
        *,
        template: str | None = None,
        plan: GuidanceConfig = DEFAULT_GUIDANCE,
        **options: Any,
    ) -> list[str]:
        """n texts that are as `constraints.wish` and the template have it.

        bundle.control(semantic={"food": "Italian"}, length=12). options: the wishes,
        and settings of `draw`.
        """
        _require_positive("n", n)
        tok = self.tokenizer
        asked = {
            name: options.pop(name) for name in constraints.CONSTRAINTS if name in options
        }
        placed = template is not None or asked.keys() & constraints.POSITIONAL
        if placed and self.config["data"].get("mode") == "block":
            raise UserError(
                "this model was trained on texts packed end to end (data.mode=block): "
                "places of words and lengths say nothing to it"
            )
        row = constraints.parse_constraints(tok, self.length, self.classifiers, **asked)
        wishes = jax.tree.map(lambda x: np.repeat(x, n, 0), row)
        if template is not None:
            seed = self._default("seed", options.get("seed"))
            rows = constraints.template_constraints(
                constraints.parse_template(tok, template, row.excluded),
                self.length,
                tok.vocab_size,
                n,
                abs(seed),
                constraints.num_words(asked),
            )
            wishes = wishes._replace(
                ids=rows.ids, known=rows.known, allowed=rows.allowed
            )
        return self.generate(n, wishes=wishes, plan=plan, **options).texts

    def nll(self, ids: Ids, *, draws: int = 8, seed: int = 0) -> likelihood.Bound:
        """The bound on -log p of each row of ids [n l], nats, in three named terms [n].

        draws: times an example. Exact for a teacher, as its `rounding` term.
        """
        key, size = jax.random.key(seed), min(len(ids), 256)
        if ("nll", draws) not in self.compiled:
            self.compiled["nll", draws] = jax.jit(self._nll(draws))
        run, parts = self.compiled["nll", draws], []
        for i, (rows, mask) in enumerate(batching.batches(np.asarray(ids), size)):
            terms = run(jax.random.fold_in(key, i), self.ema, sharding.shard_rows(rows))
            parts.append(
                jax.tree.map(lambda x, m=mask: x[m > 0], sharding.gather_to_host(terms))
            )
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

    def _nll(self, draws: int) -> Callable:
        def score(key: jax.Array, params: Params, ids: Ids) -> likelihood.Bound:
            if self.cfg.causal:
                exact = jnp.sum(autoregressive.nll(params, self.cfg, ids), -1)
                return likelihood.Bound(0.0 * exact, 0.0 * exact, exact)
            noise = losses.sigma_0(self.config["loss"]["objective"], self.schedule)
            predict = likelihood.latent_predictor(
                params, self.cfg, self.schedule, sigma_0=noise
            )
            return likelihood.bound(
                key, ids, params.table, predict, self.schedule, draws=draws
            )[0]

        return score

    def features(self, ids: Ids) -> np.ndarray:
        """A teacher's features of each row [n h]: where texts are near or far."""
        if "features" not in self.compiled:
            self.compiled["features"] = jax.jit(
                lambda params, rows: autoregressive.features(params, self.cfg, rows)
            )
        parts, run = [], self.compiled["features"]
        for rows, mask in batching.batches(np.asarray(ids), min(len(ids), 256)):
            found = run(self.ema, sharding.shard_rows(rows))
            parts.append(sharding.gather_to_host(found)[mask > 0])
        return np.concatenate(parts)

    def encode(self, texts: list[str]) -> np.ndarray:
        """Ids [n l] of texts, START and END added, padded or in blocks as in training.

        A text that is too long loses its end.
        """
        layout = {"length": self.length, "mode": self.config["data"]["mode"]}
        return encoding.encode(texts, self.tokenizer, **layout, too_long="truncate")

    def denoising_trajectory(self, n: int, **settings: Any) -> list[list[str]]:
        """For each of n samples, the text that x0_hat rounds to after every step."""
        trace = self.generate(n, **settings, trace=True).trace
        assert trace is not None
        return [[self.tokenizer.decode(row) for row in rows] for rows in trace]

    def _default(self, name: str, value: Any) -> Any:
        if value is None and name not in self.config["sample"]:
            raise UserError(f"{name}: the saved config does not set it; pass it")
        return self.config["sample"][name] if value is None else value

    def sampling_config(self, *, trace: bool = False, **given: Any) -> SamplingConfig:
        """The run's settings, but those given; UserError for one that cannot be."""
        names = [name for name in SamplingConfig._fields if name != "trace"]
        values = {name: self._default(name, given.get(name)) for name in names}
        choose("solver", samplers.SOLVERS, values["solver"])
        choose("rounding", ROUNDINGS, values["rounding"])
        choose("sigma", schedule.VARIANCES, values["sigma"])
        off = {"eta": None, "sigma": None, "top_p": 0, "churn": 0, "temperature": 1}
        for name, default in off.items():
            set_here = given.get(name) is not None
            wanted = default is not None and values[name] != default
            if name not in OPTIONS[values["solver"]] and (set_here or wanted):
                raise UserError(f"{name}: solver {values['solver']!r} does not take it")
        if not 0 <= values["eta"] <= 1:
            raise UserError(f"eta={values['eta']}: must be from 0 to 1")
        for name in ("churn", "asymmetry"):
            if values[name] < 0:
                raise UserError(f"{name}={values[name]}: must be 0 or more")
        if values["temperature"] <= 0:
            raise UserError(f"temperature={values['temperature']}: must be over 0")
        most = self.schedule.steps
        _require_positive("steps", values["steps"])
        if most is not None and values["steps"] > most:
            raise UserError(f"steps={values['steps']}: this model has {most} at most")
        if isinstance(values["clamp"], bool):
            values["clamp"] = 1.0 if values["clamp"] else -1.0
        return SamplingConfig(**values, trace=trace)

    def _run(self, settings: SamplingConfig, size: int, plan: GuidanceConfig) -> Callable:
        """The compiled chain of a batch size, made once."""
        name = (settings, size, plan)
        if name not in self.compiled:
            self.compiled[name] = jax.jit(self._chain(settings, plan))
        return self.compiled[name]

    def _chain(self, s: SamplingConfig, plan: GuidanceConfig) -> Callable:
        if self.cfg.causal:
            return self._teacher(s)

        def chain(
            key: jax.Array,
            params: Params,
            noise: PyTree,
            index: jax.Array,
            wishes: Constraints,
            heads: dict[str, Any],
        ):
            classifiers = {t: self.classifiers[t]._replace(params=p) for t, p in heads.items()}
            schedule = schedule_from_state(self.config, noise) if noise else self.schedule
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
            k_start, k_steps = jax.vmap(jax.random.split, out_axes=1)(keys)
            denoise = conditioning.constrain_denoiser(
                params, self.cfg, schedule, wishes, classifiers, plan, given=self.supports_conditioning
            )
            if s.clamp >= 0:
                options = {"below": s.clamp, "allowed": wishes.allowed}
                denoise = guidance.clamp(denoise, params.table, **options)
            step = _step(s, denoise, schedule)
            step = conditioning.constrain_step(step, params.table, schedule, wishes, classifiers, plan)
            if s.churn:
                step = samplers.churn(step, schedule, rate=s.churn)

            def to_ids(x):
                ids = ROUNDINGS[s.rounding](params, x, wishes.allowed)
                return conditioning.apply_known(ids, wishes)

            x_T = samplers.standard_normal(k_start, (self.length, self.cfg.dim))
            film = (lambda state: to_ids(state.x0_hat)) if s.trace else None
            times = samplers.schedule_timesteps(self.schedule, s.steps)
            times = samplers.shift_timesteps(times, s.asymmetry)
            state, trace = samplers.sample(k_steps, step, x_T, times, trace=film)
            trace = None if trace is None else jnp.swapaxes(trace, 0, 1)
            return state.x0_hat, to_ids(state.x0_hat), trace

        return chain

    def _teacher(self, s: SamplingConfig) -> Callable:
        """One token after the other: a teacher knows no steps, solver or trace."""
        if s.trace:
            raise UserError("trace: a teacher has none, as it does not denoise")

        def chain(key: jax.Array, params: Params, noise: PyTree, index: jax.Array, *_):
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
            ids = autoregressive.sample(keys, params, self.cfg, self.length)
            return embed(params.table, ids), ids, None

        return chain


def _step(s: SamplingConfig, denoise: model.Denoise, schedule: Schedule) -> samplers.Step:
    options = {n: getattr(s, n) for n in ("eta", "sigma", "top_p")}
    options = {n: v for n, v in options.items() if n in OPTIONS[s.solver]}

    def solver(denoise: model.Denoise) -> samplers.Step:
        return samplers.SOLVERS[s.solver](denoise, schedule, **options)

    if s.temperature == 1:
        return solver(denoise)
    return samplers.temperature(solver, denoise, schedule, tau=s.temperature)


def schedule_from_state(config: dict, noise: PyTree) -> Schedule:
    """The adaptive schedule that follows from what it knows."""
    return adaptive.ADAPTIVE_SCHEDULES[config["schedule"]["adaptive"]](noise)


def _require_positive(name: str, value: int) -> int:
    if value < 1:
        raise UserError(f"{name}={value}: must be 1 or more")
    return value


def _next_power_of_two(n: int) -> int:
    """The power of two at or above n: few batch sizes, few compilations."""
    return 1 << (n - 1).bit_length()
