# SPDX-License-Identifier: Apache-2.0
"""Classifiers on noisy latents: p(labels | x_t), whose slope steers (`guidance.guide`).

A trunk of the denoiser's blocks reads x_t and its noise; a head of a few arrays gives
logits for every label of an example. A label of -1 is not asked. Source of the tasks:
arXiv:2205.14217 section 6; REFERENCE 1.8 for the published heads.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

from dlm_jax.diffusion import model
from dlm_jax.diffusion.embedding import embed
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
    """The parameters: a denoiser's trunk, and the arrays of the head."""

    trunk: PyTree
    head: Mapping[str, Array]


class ClassifierTerms(NamedTuple):
    """nll: nats per asked label; accuracy: its share that is right; each [b]."""

    nll: PerExample
    accuracy: PerExample
    weight: PerExample

    def total(self) -> PerExample:
        """The loss of each example [b]."""
        return self.weight * self.nll


# --- heads: a label for each of several fields, each position, each pair of positions


def _fields(head: Mapping, h: Float[Array, "b l h"]) -> Float[Array, "b f k"]:
    """Every field attends to the positions that state it."""
    places = jax.nn.softmax(h @ head["query"], 1)
    pooled = jnp.einsum("blf,blh->bfh", places, h)
    return jnp.einsum("bfh,fhk->bfk", pooled, head["kernel"]) + head["bias"]


def _tags(head: Mapping, h: Float[Array, "b l h"]) -> Float[Array, "b l k"]:
    return h @ head["kernel"] + head["bias"]


def _chart(head: Mapping, h: Float[Array, "b l h"]) -> Float[Array, "b l l k"]:
    """[i, j]: the constituent from i to j, from the product of its ends' features.

    The published tanh of their sum saturates before it learns: most pairs are none.
    """
    pair = (h @ head["first"])[:, :, None] * (h @ head["last"])[:, None]
    return pair @ head["kernel"] + head["bias"]


PAIR = 32  # width of a chart's pairs


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
    """Fresh parameters; biases start at 0."""
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
    """Logits of every label; the network is told the noise, whatever the schedule."""
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
    """log p(labels | x_t), nats (`guidance.LogProb`), the sum over those that are asked.

    mean: over them, as the published code has it.
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
    """Cross-entropy of the asked labels, at random noise on frozen embeddings."""
    x_t = add_noise(embed(table, ids), draws.t, draws.eps_t, schedule)
    scores = logits(params, cfg, spec, x_t, draws.t, schedule, key=key)
    scores = scores.reshape(len(labels), spec.size, spec.classes)
    asked, labels = jnp.asarray(labels) >= 0, jnp.maximum(labels, 0)
    count = jnp.maximum(jnp.sum(asked, -1), 1)
    nll = jnp.sum(jnp.where(asked, cross_entropy(scores, labels), 0.0), -1) / count
    right = asked & (jnp.argmax(scores, -1) == labels)
    weight = jnp.ones_like(nll) if draws.weight is None else draws.weight
    return ClassifierTerms(nll, jnp.sum(right, -1) / count, weight)
