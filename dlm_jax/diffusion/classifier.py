# SPDX-License-Identifier: Apache-2.0
"""Classifiers on noisy latents, p(labels | x_t), for `guidance.gradient_guidance`.

A trunk of the denoiser's blocks reads x_t and its noise level; a head gives logits for
every label of an example. The target -1 means: no target. Source of the tasks:
arXiv:2205.14217 section 6; docs/method.md, section 7, describes the published heads.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from dlm_jax.diffusion import model
from dlm_jax.diffusion.embedding import embed
from dlm_jax.diffusion.rounding import cross_entropy
from dlm_jax.diffusion.schedule import Schedule, add_noise
from dlm_jax.diffusion.time_sampling import NoiseDraws
from dlm_jax.nn import transformer
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.types import (
    Array,
    HeadSpec,
    Ids,
    Latent,
    PerExample,
    PRNGKey,
    PyTree,
    Table,
    Time,
)


class Classifier(NamedTuple):
    """The parameters: a denoiser's trunk and the arrays of the head."""

    trunk: PyTree
    head: Mapping[str, Array]


class ClassifierTerms(NamedTuple):
    """Terms of the loss, each [b]: nll in nats per label, accuracy, importance weight."""

    nll: PerExample
    accuracy: PerExample
    weight: PerExample

    def total(self) -> PerExample:
        """Returns the loss of each example [b]."""
        return self.weight * self.nll


# --- heads: a label per field, per position, or per pair of positions


def _fields(head: Mapping, h: Float[Array, "b l h"]) -> Float[Array, "b f k"]:
    """Pools the positions by attention, with a query per field."""
    places = jax.nn.softmax(h @ head["query"], 1)
    pooled = jnp.einsum("blf,blh->bfh", places, h)
    return jnp.einsum("bfh,fhk->bfk", pooled, head["kernel"]) + head["bias"]


def _tags(head: Mapping, h: Float[Array, "b l h"]) -> Float[Array, "b l k"]:
    return h @ head["kernel"] + head["bias"]


def _chart(head: Mapping, h: Float[Array, "b l h"]) -> Float[Array, "b l l k"]:
    """Scores the constituent from i to j by the product of the features of its ends.

    The published head, tanh of their sum, saturates before it learns, because most
    pairs are no constituent.
    """
    pair = (h @ head["first"])[:, :, None] * (h @ head["last"])[:, None]
    return pair @ head["kernel"] + head["bias"]


PAIR = 32  # features of a pair of positions


def _shapes(spec: HeadSpec, h: int) -> dict[str, tuple[int, ...]]:
    k = spec.classes
    if spec.head == "fields":
        f = spec.shape[0]
        return {"query": (h, f), "kernel": (f, h, k), "bias": (f, k)}
    if spec.head == "tags":
        return {"kernel": (h, k), "bias": (k,)}
    pair = {"first": (h, PAIR), "last": (h, PAIR)}
    return pair | {"kernel": (PAIR, k), "bias": (k,)}


HEADS: dict[str, Callable] = {"fields": _fields, "tags": _tags, "chart": _chart}


def init(key: PRNGKey, cfg: DenoiserConfig, spec: HeadSpec) -> Classifier:
    """Initialises the parameters; biases start at 0."""
    k_trunk, k_head = jax.random.split(key)
    shapes = _shapes(spec, cfg.hidden_dim)
    keys = jax.random.split(k_head, len(shapes))
    head = {
        name: jnp.zeros(shape)
        if name == "bias"
        else jax.random.normal(k, shape) / math.sqrt(shape[-2])
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return Classifier(transformer.init(k_trunk, cfg, 1), head)


def logits(
    params: Classifier,
    cfg: DenoiserConfig,
    spec: HeadSpec,
    x_t: Latent,
    t: Time,
    schedule: Schedule,
    *,
    key: PRNGKey | None = None,
) -> Float[Array, "b ... k"]:
    """Computes the logits of every label; the network's time input is log-SNR."""
    t_cond = model.log_snr_time(schedule, t)
    x = jnp.asarray(x_t)
    h = transformer.apply(
        params.trunk, cfg, 1, x, t_cond, jnp.zeros_like(x), key=key, head=False
    )
    return HEADS[spec.head](params.head, h)


def log_prob(
    params: Classifier,
    cfg: DenoiserConfig,
    spec: HeadSpec,
    labels: Int[Array, "b ..."],
    schedule: Schedule,
    *,
    mean: bool = False,
) -> Callable[[Latent, Time], PerExample]:
    """Returns log p(labels | x_t) in nats, summed over the labels that have a target.

    mean: average over them instead, as the published code does.
    """
    labels = jnp.asarray(labels)

    def of(x_t: Latent, t: Time) -> PerExample:
        scores = logits(params, cfg, spec, x_t, t, schedule)
        nll = cross_entropy(scores, jnp.maximum(labels, 0))
        nll = jnp.where(labels < 0, 0.0, nll)
        total = jnp.sum(nll.reshape(len(nll), -1), -1)
        asked = jnp.sum((labels >= 0).reshape(len(nll), -1), -1)
        return -total / (jnp.maximum(asked, 1) if mean else 1)

    return of


def loss(
    params: Classifier,
    ids: Ids,
    labels: Int[Array, "b m"],
    draws: NoiseDraws,
    *,
    cfg: DenoiserConfig,
    spec: HeadSpec,
    table: Table,
    schedule: Schedule,
    key: PRNGKey | None = None,
) -> ClassifierTerms:
    """Computes the cross-entropy of the labels, at random noise on frozen embeddings."""
    x_t = add_noise(embed(table, ids), draws.t, draws.eps_t, schedule)
    scores = logits(params, cfg, spec, x_t, draws.t, schedule, key=key)
    scores = scores.reshape(len(labels), spec.size, spec.classes)
    asked, labels = jnp.asarray(labels) >= 0, jnp.maximum(labels, 0)
    count = jnp.maximum(jnp.sum(asked, -1), 1)
    nll = jnp.sum(jnp.where(asked, cross_entropy(scores, labels), 0.0), -1) / count
    right = asked & (jnp.argmax(scores, -1) == labels)
    weight = jnp.ones_like(nll) if draws.weight is None else draws.weight
    return ClassifierTerms(nll, jnp.sum(right, -1) / count, weight)
