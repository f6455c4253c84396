# SPDX-License-Identifier: Apache-2.0
"""A model as a folder to share: weights in safetensors, the rest in JSON; no pickle.

model.safetensors  the averaged weights, and the statistics of an adaptive schedule
config.json        the config of the run, its step, the lengths of its texts, and the
                   checksum of the weights
tokenizer.json     the vocabulary
README.md          a model card
classifiers/TASK/  model.safetensors and config.json of each classifier
"""

import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from dlm_jax.data import tokenizer
from dlm_jax.errors import UserError, choose, environment_reason
from dlm_jax.types import Array, PyTree

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
CARD, CLASSIFIERS = "README.md", "classifiers"
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
FORMAT = 1  # of config.json


class Pretrained(NamedTuple):
    """The contents of a folder. arrays: by path, such as ema/table; see `unflatten`.

    classifiers: (record, arrays) by task; the record holds its model and its labels.
    card: the text of README.md.
    """

    config: dict
    tokenizer: tokenizer.Tokenizer
    arrays: Mapping[str, Array]
    step: int
    lengths: tuple[int, ...]
    classifiers: Mapping[str, tuple[dict, Mapping[str, Array]]] = {}
    card: str = ""


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
    record = {
        "config": _without_paths(model.config),
        "step": model.step,
        "lengths": model.lengths,
    }
    _write_part(folder, record, model.arrays, kind)
    for task, (its_record, arrays) in model.classifiers.items():
        _write_part(folder / CLASSIFIERS / task, its_record, arrays, kind)
    _write_text(folder / TOKENIZER, _json(model.tokenizer.to_dict()))
    _write_text(folder / CARD, model.card)


def _write_part(
    folder: Path, record: dict, arrays: Mapping[str, Array], kind: Any
) -> None:
    """Writes the weights, ema/..., in dtype kind, and the record with their checksum."""
    import safetensors.flax  # late: sampling does without it

    cast: Any = {n: x.astype(kind) if n[:4] == "ema/" else x for n, x in arrays.items()}
    data = safetensors.flax.save(cast)
    own = {"format": FORMAT, "sha256": hashlib.sha256(data).hexdigest()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(data)
    _write_text(folder / CONFIG, _json(own | record))


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _write_text(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


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
        words = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
        record, arrays = _read_part(folder)
        config, step = record["config"], int(record["step"])
        lengths = tuple(map(int, record["lengths"]))
        parts = sorted((folder / CLASSIFIERS).glob(f"*/{CONFIG}"))
        classifiers = {p.parent.name: _read_part(p.parent) for p in parts}
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
    return Pretrained(config, tok, arrays, step, lengths, classifiers)


def _read_part(folder: Path) -> tuple[dict, dict[str, Array]]:
    """Returns the record and the arrays of a folder, after its checksum."""
    record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    data = (folder / WEIGHTS).read_bytes()
    if record["format"] > FORMAT:
        raise UserError(
            f"{folder}: written by a newer version of dlm_jax; install that version"
        )
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise ValueError(f"{folder / WEIGHTS} is not the file that was written")
    with safetensors.safe_open(folder / WEIGHTS, framework="numpy") as file:
        names = list(file.keys())
        # cast by NumPy: JAX would compile a program for each shape
        arrays = {n: np.asarray(file.get_tensor(n)).astype(np.float32) for n in names}
    return record, {name: jnp.asarray(x) for name, x in arrays.items()}
