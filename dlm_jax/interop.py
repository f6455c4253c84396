# SPDX-License-Identifier: Apache-2.0
"""Interop: published PyTorch weights (state-dict names of REFERENCE 1.4) to Params."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dlm_jax.denoiser import DenoiserConfig
from dlm_jax.model import Params
from dlm_jax.tokenizer import SPECIALS, WordTokenizer
from dlm_jax.types import PyTree, UserError

HEADS = 12  # bert-base; the published `num_heads` flag is ignored (REFERENCE 1.4)
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


def is_reference(folder: str | Path) -> bool:
    """Whether a folder is a published checkpoint: `training_args.json` and weights."""
    path = Path(folder)
    return (path / "training_args.json").is_file() and any(path.glob("ema_*.pt"))


def load_reference(
    folder: str | Path,
) -> tuple[DenoiserConfig, Params, WordTokenizer, dict]:
    """(network, EMA parameters, tokenizer, config) of a published checkpoint folder.

    Reads the newest `ema_*.pt` (with torch, weights only: nothing is unpickled),
    `vocab.json` and `training_args.json`. Raises UserError, one line.
    """
    path = Path(folder)
    args = _json(path / "training_args.json")
    words = _json(path / "vocab.json")
    files = sorted(path.glob("ema_*.pt"), key=lambda p: int(_digits(p.stem)))
    cfg, params = from_reference(_torch_weights(files[-1]), heads=HEADS)
    cfg = dataclasses.replace(cfg, **_network(args))
    order = sorted(words, key=words.get)
    if order[:4] != list(SPECIALS) or sorted(words.values()) != list(range(len(words))):
        raise UserError(
            f"{path / 'vocab.json'}: ids must be 0.. with START END UNK PAD"
        )
    return cfg, params, WordTokenizer(tuple(order[4:])), _config(args)


def _digits(stem: str) -> str:
    tail = stem.rsplit("_", 1)[-1]
    return tail if tail.isdigit() else "0"


def _json(path: Path) -> dict:
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the folder must hold it") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}: not a JSON object")
    return record


def _torch_weights(path: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path}: reading it needs torch; pip install torch") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = str(error).strip().splitlines()[0][:150]
        raise UserError(f"{path}: not a file of plain weights ({reason})") from error


def _network(args: dict) -> dict:
    """What the published flags say of the network and the weights do not."""
    predicts = "x0" if args.get("predict_xstart", False) else "eps"
    return {"predicts": predicts, "dropout": float(args.get("dropout", 0.1))}


def _config(args: dict) -> dict:
    """A run's config, as far as sampling reads it."""
    return {
        "data": {"length": int(args.get("image_size", 8)) ** 2},
        "schedule": {
            "name": args.get("noise_schedule", "sqrt"),
            "steps": int(args.get("diffusion_steps", 2000)),
        },
        "sample": {
            "n": 50,
            "batch": 50,
            "steps": 200,
            "solver": "ddim",
            "eta": 1.0,
            "sigma": "small",
            "top_p": 0.0,
            "clamp": 1.0,
            "rounding": "logits",
            "seed": 101,
        },
    }
