# SPDX-License-Identifier: Apache-2.0
"""Loads checkpoints of the published PyTorch code."""

import dataclasses
import json
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dlm_jax.data.tokenizer import SPECIALS, WordTokenizer
from dlm_jax.diffusion import schedule
from dlm_jax.diffusion.model import Params
from dlm_jax.diffusion.schedule import QUANTILE_SCHEDULES, SCHEDULES, Schedule
from dlm_jax.errors import UserError, environment_reason
from dlm_jax.inference.sampling_config import default_section
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.types import PyTree

HEADS = 12  # bert-base; the published code ignores its flag `num_heads`
LAYERS = "input_transformers.layer."
LAYER = LAYERS + "{}."
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
# the values that a flag in `training_args.json` may have; others are other models
READABLE: dict[str, tuple] = {
    "model_arch": ("transformer",),
    "training_mode": ("e2e", "e2e-simple"),  # others keep the embedding elsewhere
    "experiment_mode": ("lm",),
    "config_name": ("bert-base-uncased",),  # it sets the heads
    "learn_sigma": (False,),
    "class_cond": (False,),
    "rescale_timesteps": (True,),
    "timestep_respacing": ("",),
    "noise_schedule": tuple(n for n in SCHEDULES if n not in QUANTILE_SCHEDULES),
    "logits_mode": (1, 2),
    "use_bert_tokenizer": ("no",),
}


def from_reference(
    weights: Mapping[str, Any], *, heads: int
) -> tuple[DenoiserConfig, Params]:
    """Converts a published state dict (names to arrays) to (DenoiserConfig, Params).

    Any mapping of the same layout works: weights, gradients, an EMA. The weights do not
    tell the number of heads. Raises UserError naming a missing entry.
    """
    read = _reader(weights)
    layers = len({n.split(".")[2] for n in weights if n.startswith(LAYERS)})
    # In a published EMA file word_embedding.weight is averaged and the tied
    # lm_head.weight is not; PyTorch loads lm_head.weight last, so it is what is used.
    tied = "lm_head.weight" in weights
    table = read("lm_head.weight" if tied else "word_embedding.weight")
    up = read(LAYER.format(0) + "intermediate.dense.weight")
    cfg = DenoiserConfig(
        dim=table.shape[1],
        hidden_dim=up.shape[1],
        layers=layers,
        heads=heads,
        mlp_dim=up.shape[0],
        positions=read("position_embeddings.weight").shape[0],
        time_dim=read("time_embed.0.weight").shape[1],
    )
    _check_widths(cfg, out=read("output_down_proj.2.weight").shape[0])
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


def _check_widths(cfg: DenoiserConfig, *, out: int) -> None:
    if out != cfg.dim:
        raise UserError(
            f"output_down_proj.2.weight: {out} outputs for embeddings of {cfg.dim}; a "
            "network that learns its variance (learn_sigma) is not read"
        )
    if cfg.hidden_dim % cfg.heads:
        raise UserError(
            f"a width of {cfg.hidden_dim} does not divide by {cfg.heads} heads"
        )


def _to_jax(tree: PyTree) -> PyTree:
    if isinstance(tree, dict):
        return {name: _to_jax(value) for name, value in tree.items()}
    return jnp.asarray(tree)


def _reader(weights: Mapping[str, Any]) -> Callable[[str], np.ndarray]:
    def read(name: str) -> np.ndarray:
        if name not in weights:
            raise UserError(
                f"{name}: not among the {len(weights)} weights; expected the state "
                "dict of the published TransformerNetModel2"
            )
        value = weights[name]
        if hasattr(value, "detach"):  # an average is saved as a Parameter
            value = value.detach().float().numpy()
        return np.asarray(value, np.float32)

    return read


def _linear(read, name: str) -> dict[str, np.ndarray]:
    """Reads a linear layer, whose weight is transposed here, or a norm's scale and bias."""
    weight, bias = read(name + ".weight"), read(name + ".bias")
    if weight.ndim == 1:
        return {"scale": weight, "bias": bias}
    return {"kernel": weight.T, "bias": bias}


def _put(tree: PyTree, path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def is_reference(folder: str | Path) -> bool:
    """Whether a folder is a published checkpoint: whether it holds `training_args.json`."""
    return (Path(folder) / "training_args.json").is_file()


def load_reference(
    folder: str | Path,
) -> tuple[DenoiserConfig, Params, WordTokenizer, Schedule]:
    """Loads (network, EMA parameters, tokenizer, schedule) of a published checkpoint.

    The folder holds `ema_*.pt`, of which the newest is read with torch (weights only:
    nothing is unpickled), `vocab.json` and `training_args.json`. Raises UserError.
    """
    path = Path(folder)
    args = _args(path / "training_args.json")
    tokenizer = _tokenizer(path / "vocab.json")
    file = _newest(path)
    try:
        cfg, params = from_reference(_torch_weights(file), heads=HEADS)
        _check_sizes(args, cfg, params, tokenizer)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: not a published network's weights ({error})"
        ) from error
    cfg = dataclasses.replace(cfg, **_network(args))
    noise = schedule.make_schedule(**_config(args)["schedule"])
    return cfg, params, tokenizer, noise


def reference_config(folder: str | Path) -> dict:
    """Returns a run's config for a published checkpoint, as far as sampling needs it."""
    return _config(_args(Path(folder) / "training_args.json"))


def _args(path: Path) -> dict:
    """Reads the published flags. Raises UserError for another kind of model."""
    args = _json(path)
    for name, allowed in READABLE.items():
        if args.get(name, allowed[0]) not in allowed:
            can = " or ".join(repr(value) for value in allowed)
            raise UserError(f"{path}: {name}={args[name]!r} is not read, only {can}")
    kinds = {"image_size": (int,), "diffusion_steps": (int,), "predict_xstart": (bool,)}
    kinds |= {"noise_schedule": (str,), "dropout": (float, int)}
    args.setdefault("dropout", 0.1)
    for name, known in kinds.items():
        if type(args.get(name)) not in known:
            raise UserError(
                f"{path}: {name}={args.get(name)!r} must be of type {known[0].__name__}"
            )
    return args


def _tokenizer(path: Path) -> WordTokenizer:
    words = _json(path)
    by_id = {i: word for word, i in words.items() if type(i) is int}
    order = tuple(by_id[i] for i in range(len(words)) if i in by_id)
    if order[:4] != SPECIALS or len(order) != len(words):
        raise UserError(f"{path}: ids must be 0.. with START END UNK PAD first")
    return WordTokenizer(order[4:])


def _newest(folder: Path) -> Path:
    """Returns the `ema_<rate>_<step>.pt` of the latest step with the highest rate."""
    named = {
        p: re.fullmatch(r"ema_(\d*\.?\d+)_(\d+)", p.stem) for p in folder.iterdir()
    }
    age = {
        p: (int(m[2]), float(m[1])) for p, m in named.items() if m and p.suffix == ".pt"
    }
    if not age:
        raise UserError(f"{folder}: no ema_*.pt beside training_args.json; copy one")
    return max(age, key=lambda p: age[p])


def _check_sizes(
    args: dict, cfg: DenoiserConfig, params: Params, tokenizer: WordTokenizer
) -> None:
    words, rows = tokenizer.vocab_size, params.table.shape[0]
    if words != rows:
        raise UserError(f"{rows} embeddings for the {words} words of vocab.json")
    if args["image_size"] ** 2 > cfg.positions:
        raise UserError(
            f"{cfg.positions} positions for image_size={args['image_size']} squared"
        )


def _json(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the folder must hold it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}: not a JSON object")
    return record


def _torch_weights(path: Path) -> Mapping[str, Any]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("reading it needs torch; pip install torch") from error
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch would advise to unpickle it
        raise UserError("holds more than weights; it was not unpickled") from error
    except Exception as error:  # torch raises many kinds for a damaged file
        if machine := environment_reason(error):
            raise UserError(f"cannot be read here ({machine})") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        raise UserError(f"damaged or not of torch ({reason})") from error
    if not isinstance(weights, Mapping):
        raise UserError(f"holds a {type(weights).__name__}, not a state dict")
    return weights


def _network(args: dict) -> dict:
    """Returns the network's settings that the weights do not tell."""
    predicts = "x0" if args["predict_xstart"] else "eps"
    return {"predicts": predicts, "dropout": args["dropout"]}


def _config(args: dict) -> dict:
    """Returns a run's config, as far as sampling needs it."""
    # argmax of -|x - E_v|, the published logits_mode 2, is the nearest embedding
    distance = args.get("logits_mode", 1) == 2
    return {
        "data": {"length": args["image_size"] ** 2, "mode": "pad"},
        "schedule": {
            "name": args["noise_schedule"],
            "num_steps": args["diffusion_steps"],
            "adaptive": "",
        },
        "loss": {"objective": "x0"},  # all published objectives have the same sigma_0
        "sample": default_section()
        | {
            "num_steps": min(200, args["diffusion_steps"]),
            "rounding": "nearest" if distance else "logits",
        },
    }
