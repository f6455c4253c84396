# SPDX-License-Identifier: Apache-2.0
"""A model as a folder to share: weights in safetensors, the rest in JSON; no pickle.

model.safetensors  the averaged weights, and the statistics of an adaptive schedule
config.json        the config of the run, its step, the lengths of its texts, and the
                   checksum of the weights
tokenizer.json     the vocabulary
"""

import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import safetensors.flax

from dlm_jax.data import tokenizer
from dlm_jax.errors import UserError, choose, environment_reason
from dlm_jax.types import Array, PyTree

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
FORMAT = 1  # of config.json


class Pretrained(NamedTuple):
    """The contents of a folder. arrays: by path, such as ema/table; see `unflatten`."""

    config: dict
    tokenizer: tokenizer.Tokenizer
    arrays: Mapping[str, Array]
    step: int
    lengths: tuple[int, ...]


def flatten(tree: PyTree) -> dict[str, Array]:
    """Returns the leaves of a tree by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_path(path): jnp.asarray(leaf) for path, leaf in leaves}


def unflatten(arrays: Mapping[str, Array], like: PyTree) -> PyTree:
    """Returns a tree like `like`. Raises UserError if a leaf is missing or has another shape."""

    def leaf(path: tuple, shape: Any) -> Array:
        name = _path(path)
        if name not in arrays or arrays[name].shape != shape.shape:
            raise UserError(f"{WEIGHTS} has no {name} of shape {list(shape.shape)}")
        return arrays[name]

    return jax.tree_util.tree_map_with_path(leaf, like)


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def write(folder: str | Path, model: Pretrained, dtype: str) -> None:
    """Writes a folder that `read` reads; the weights, ema/..., in dtype, a key of DTYPES.

    Raises UserError if the folder is not empty.
    """
    folder, kind = Path(folder), choose("dtype", DTYPES, dtype)
    if folder.exists():
        held = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else [""]
        if held:
            what = f"holds {held[0]} already" if held[0] else "is a file"
            raise UserError(
                f"{folder} {what}: choose a new folder, as nothing is overwritten"
            )
    arrays: Any = {
        name: x.astype(kind) if name.startswith("ema/") else x
        for name, x in model.arrays.items()
    }
    data = safetensors.flax.save(arrays)
    record = {
        "format": FORMAT,
        "config": _without_paths(model.config),
        "step": model.step,
        "lengths": model.lengths,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(data)
    for name, value in ((CONFIG, record), (TOKENIZER, model.tokenizer.to_dict())):
        text = json.dumps(value, indent=1, ensure_ascii=False)
        (folder / name).write_bytes((text + "\n").encode("utf-8", "backslashreplace"))


def _without_paths(config: Any) -> Any:
    """Empties absolute paths: they name folders of the machine that trained."""
    if isinstance(config, dict):
        return {key: _without_paths(value) for key, value in config.items()}
    absolute = isinstance(config, str) and Path(config).is_absolute()
    return "" if absolute else config


def find(name: str | Path) -> Path | None:
    """Returns the folder that `name` means: its own path, or a bundled model's; or None."""
    if (Path(name) / WEIGHTS).is_file():
        return Path(name)
    return None if Path(name).exists() else bundled().get(str(name))


def bundled() -> dict[str, Path]:
    """Returns the models that are installed with the package, by name."""
    folder = Path(str(resources.files("dlm_jax") / "pretrained"))
    return {path.parent.name: path.parent for path in folder.glob(f"*/{WEIGHTS}")}


def read(folder: Path) -> Pretrained:
    """Reads a folder. Raises UserError if a file is missing, damaged or of a newer version."""
    try:
        record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        words = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
        data = (folder / WEIGHTS).read_bytes()
        if record["format"] > FORMAT:
            raise UserError(
                f"{folder}: written by a newer version of dlm_jax; install that version"
            )
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise ValueError(f"{WEIGHTS} is not the file that was written")
        with safetensors.safe_open(folder / WEIGHTS, framework="flax") as file:
            arrays = {
                name: jnp.asarray(file.get_tensor(name), jnp.float32)
                for name in file.keys()  # noqa: SIM118
            }
        config, step = record["config"], int(record["step"])
        lengths = tuple(map(int, record["lengths"]))
    except UserError:
        raise
    except (
        OSError,
        KeyError,
        TypeError,
        ValueError,
        safetensors.SafetensorError,
    ) as error:
        if reason := environment_reason(error):
            raise UserError(f"{folder} cannot be read here ({reason})") from error
        raise UserError(
            f"{folder}: missing or damaged: {error}; copy it again"
        ) from error
    try:
        tok = tokenizer.from_dict(words)
    except UserError as error:
        raise UserError(f"{folder / TOKENIZER}: {error}") from error
    return Pretrained(config, tok, arrays, step, lengths)
