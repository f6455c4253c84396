# SPDX-License-Identifier: Apache-2.0
"""Interop: published PyTorch weights (state-dict names of REFERENCE 1.4) to Params."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dlm_jax.denoiser import DenoiserConfig
from dlm_jax.model import Params
from dlm_jax.types import PyTree, UserError

LAYER = "input_transformers.layer.{}."
# our name -> the published name, for the linear layers and norms outside the encoder
OUTSIDE = {
    ("time",): "time_embed.0",
    ("time_2",): "time_embed.2",
    ("trunk", "in"): "input_up_proj.0",
    ("trunk", "in_2"): "input_up_proj.2",
    ("trunk", "norm"): "LayerNorm",
    ("trunk", "out"): "output_down_proj.0",
    ("head",): "output_down_proj.2",
}
INSIDE = {
    ("attention", "out"): "attention.output.dense",
    ("attention_norm",): "attention.output.LayerNorm",
    ("up",): "intermediate.dense",
    ("down",): "output.dense",
    ("norm",): "output.LayerNorm",
}


def from_reference(
    weights: Mapping[str, Any], *, heads: int
) -> tuple[DenoiserConfig, Params]:
    """The published state dict (names to arrays) as (DenoiserConfig, Params).

    Works for any mapping of the same layout: weights, gradients, an EMA. heads cannot
    be read off the weights. Raises UserError naming a missing entry.
    """
    read = _reader(weights)
    layers = 0
    while LAYER.format(layers) + "output.dense.weight" in weights:
        layers += 1
    table = read("word_embedding.weight")
    up = read(LAYER.format(0) + "intermediate.dense.weight")
    cfg = DenoiserConfig(
        dim=table.shape[1],
        width=up.shape[1],
        layers=layers,
        heads=heads,
        ff=up.shape[0],
        positions=read("position_embeddings.weight").shape[0],
        time_dim=read("time_embed.0.weight").shape[1],
    )
    tree: PyTree = {"trunk": {"positions": read("position_embeddings.weight")}}
    for path, name in OUTSIDE.items():
        _put(tree, path, _linear(read, name))
    for i in range(layers):
        base = LAYER.format(i)
        for path, name in INSIDE.items():
            _put(tree, ("trunk", f"layer_{i}", *path), _linear(read, base + name))
        fused = [
            _linear(read, f"{base}attention.self.{part}")
            for part in ("query", "key", "value")
        ]
        qkv = {k: np.concatenate([f[k] for f in fused], -1) for k in fused[0]}
        _put(tree, ("trunk", f"layer_{i}", "attention", "qkv"), qkv)
    tree = _to_jax(tree)
    return cfg, Params(jnp.asarray(table), jnp.asarray(read("lm_head.bias")), tree)


def _to_jax(tree: PyTree) -> PyTree:
    if isinstance(tree, dict):
        return {name: _to_jax(value) for name, value in tree.items()}
    return jnp.asarray(tree)


def _reader(weights: Mapping[str, Any]):
    def read(name: str) -> np.ndarray:
        if name not in weights:
            raise UserError(
                f"{name}: not among the {len(weights)} weights; expected the state "
                "dict of the published TransformerNetModel2"
            )
        value = weights[name]
        value = value.numpy() if hasattr(value, "numpy") else value
        return np.asarray(value, np.float32)

    return read


def _linear(read, name: str) -> dict[str, np.ndarray]:
    """A linear layer's kernel (ours is the transpose) and bias, or a norm's scale."""
    weight, bias = read(name + ".weight"), read(name + ".bias")
    if weight.ndim == 1:
        return {"scale": weight, "bias": bias}
    return {"kernel": weight.T, "bias": bias}


def _put(tree: PyTree, path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
