# SPDX-License-Identifier: Apache-2.0
"""Checks the config of a run and returns the static settings of a training step."""

from collections.abc import Mapping
from typing import Any

from dlm_jax.diffusion import adaptive, losses, model, schedule, time_sampling
from dlm_jax.errors import UserError, choose
from dlm_jax.nn import transformer
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.ranges import check_ranges
from dlm_jax.runtime import checkpoint, sharding, writers
from dlm_jax.training import optimizer
from dlm_jax.training.train_step import StepConfig


def resolve_config(config: Any) -> StepConfig:
    """Returns the static settings of a step. Raises UserError naming a wrong key."""
    check_ranges(config, "train", "model", "optim", "loss", "data")
    cfg, noise_schedule = network(config), schedule.make_schedule(**config.schedule)
    choose("config.loss.objective", losses.OBJECTIVES, config.loss.objective)
    time_samplers = {**time_sampling.TIME_SAMPLERS, "importance": None}
    choose("config.loss.time_sampler", time_samplers, config.loss.time_sampler)
    losses.check_compatible(config.loss.objective, cfg, noise_schedule)
    if config.schedule.adaptive:
        choose(
            "config.schedule.adaptive",
            adaptive.ADAPTIVE_SCHEDULES,
            config.schedule.adaptive,
        )
        if config.loss.objective in ("nelbo", "ar"):
            raise UserError(
                f"config.schedule.adaptive={config.schedule.adaptive!r}: objective "
                f"{config.loss.objective!r} is not a function of the noise alone; set "
                "it to ''"
            )
    if config.loss.time_sampler == "importance" and noise_schedule.num_steps is None:
        raise UserError(
            "config.loss.time_sampler='importance' needs config.schedule.num_steps > 0"
        )
    if config.loss.self_cond_prob and not cfg.self_cond:
        raise UserError(
            "config.loss.self_cond_prob > 0 needs config.model.self_cond=True"
        )
    if config.loss.conditioning_prob and cfg.causal:
        raise UserError(
            "config.loss.conditioning_prob > 0: an autoregressive model conditions on "
            "earlier tokens; set it to 0"
        )
    if cfg.causal and config.data.mode == "crop":
        raise UserError(
            "config.data.mode=crop: an autoregressive model begins with START, which "
            "these rows lack; use wrap or block"
        )
    if cfg.known_length and config.data.mode != "pad":
        raise UserError(
            "config.model.known_length=True needs config.data.mode=pad: change one of "
            "them"
        )
    _check_pairs(config, cfg)
    choose("config.train.on_nonfinite", ON_NONFINITE, config.train.on_nonfinite)
    writers.check(config.train.writers)
    sharding.check_batch(config.train.batch, config.optim.accumulate)
    return StepConfig(
        cfg=cfg,
        schedule=noise_schedule,
        optimizer=optimizer.make(config.optim, config.train.total_steps),
        batch=config.train.batch,
        normalize=config.embedding.normalize,
        frozen=config.embedding.frozen,
        ema=config.optim.ema,
        adaptive=config.schedule.adaptive,
        accumulate=config.optim.accumulate,
        skip=config.train.on_nonfinite == "skip",
        **config.loss,
    )


def _check_pairs(config: Any, cfg: DenoiserConfig) -> None:
    """Raises UserError if the options of pairs do not fit together."""
    column = config.data.source_column
    if bool(column) != cfg.known_source:
        raise UserError(
            f"config.data.source_column={column!r} and config.model.known_source="
            f"{cfg.known_source}: set both to train on pairs, or neither"
        )
    for name, value in (
        ("loss.source_drop_prob", config.loss.source_drop_prob),
        ("data.delexicalize", config.data.delexicalize),
    ):
        if value and not cfg.known_source:
            raise UserError(
                f"config.{name}={value} needs config.model.known_source=True"
            )
    if cfg.known_source and (config.data.mode != "pad" or config.loss.truncate_prob):
        raise UserError(
            "config.model.known_source=True needs config.data.mode=pad and "
            "config.loss.truncate_prob=0"
        )


def refuse_ignored(
    given: Mapping[str, Any], config: Any, unread: tuple[str, ...], option: str
) -> None:
    """Raises UserError for a flag that would have no effect.

    given: {name: value} of config's flags. config: the run's, of which some values are
    those of the model that config.`option` names. unread: the options and sections that
    the run does not read.
    """
    own = checkpoint.flatten(config.to_dict())
    for name, value in checkpoint.flatten(dict(given)).items():
        if not {name, name.partition(".")[0]}.isdisjoint(unread):
            raise UserError(
                f"config.{name}={value!r} has no effect on this run: leave it out"
            )
        if own[name] != value:
            raise UserError(
                f"config.{name}={value!r} has no effect beside config.{option}, which "
                f"makes it {own[name]!r}: leave it out"
            )


ON_NONFINITE: dict[str, Any] = dict.fromkeys(("stop", "skip", "rollback"))


def network(config: Any) -> DenoiserConfig:
    """Returns config.model as a DenoiserConfig. Raises UserError."""
    cfg = DenoiserConfig(**config.model)
    choose("config.model.trunk", transformer.BLOCKS, cfg.trunk)
    choose("config.model.predicts", model.TO_X0, cfg.predicts)
    choose("config.model.dtype", transformer.DTYPES, cfg.dtype)
    if config.data.length > cfg.positions:
        raise UserError(
            f"config.data.length={config.data.length} exceeds "
            f"config.model.positions={cfg.positions}: raise the latter"
        )
    if cfg.hidden_dim % cfg.heads:
        raise UserError(
            f"config.model.heads={cfg.heads} does not divide "
            f"hidden_dim={cfg.hidden_dim}"
        )
    if cfg.trunk == "adaln" and cfg.hidden_dim % (2 * cfg.heads):
        raise UserError(
            f"config.model.hidden_dim={cfg.hidden_dim}: rotary positions need a "
            f"multiple of 2 x config.model.heads={cfg.heads}"
        )
    return cfg
