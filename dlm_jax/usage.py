# SPDX-License-Identifier: Apache-2.0
"""What `dlm --help` and `dlm configs` print, without importing JAX."""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

from absl import flags

from dlm_jax import configs

MODES = {
    "prepare_data": "encode text of any size as files of token ids",
    "train": "train a diffusion model, or the autoregressive baseline (the default)",
    "train_classifier": "train a classifier on noisy latents, for control",
    "distill": "train students that need few steps",
    "sample": "print texts of a model",
    "evaluate": "measure samples and likelihood beside held-out text",
    "control": "measure the success and the fluency of control tasks",
    "plot": "draw pictures of a run",
    "export": "save a model as a folder to share",
    "serve": "show a model's steps on a web page, and answer a JSON API",
}
EXAMPLES = {
    "train on the built-in grammar": "dlm --config grammar --workdir runs/first",
    "print 8 texts of that run": (
        "dlm --mode sample --workdir runs/first --config grammar --config.sample.n=8"
    ),
    "train on a file of your own, a text per line": (
        "dlm --config e2e_small --workdir runs/mine "
        "--config.data.source=text --config.data.path=my.txt"
    ),
}


def config_files() -> dict[str, Path]:
    """Returns the files of the bundled configs by name."""
    paths = sorted(Path(configs.__path__[0]).glob("*.py"))
    return {p.stem: p for p in paths if "def get_config" in p.read_text("utf-8")}


def config_lines() -> list[tuple[str, str]]:
    """Returns (NAME or NAME:variant, description) of each bundled config."""
    lines = []
    for name, path in config_files().items():
        doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        about = doc.partition("\n")[0]
        lines.append((name, about))
        variants = re.findall(r"`:(\w+)`", doc)
        lines += [(f"{name}:{v}", f"a variant of {name}") for v in variants]
    return lines


def table(rows: Iterable[tuple[str, str]], margin: str = "  ") -> str:
    """Returns two columns, the first as wide as it needs."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{margin}{name:{width}}  {about}" for name, about in rows)


def help_text(module: str) -> str:
    """Returns the help: modes, examples and the flags that `module` defines."""
    defined = flags.FLAGS.get_flags_for_module(module)
    own = [(f"--{flag.name}", str(flag.help)) for flag in defined]
    examples = "\n".join(f"  # {what}\n  {line}" for what, line in EXAMPLES.items())
    return f"""dlm: continuous text diffusion in JAX

usage:
  dlm [MODE] --workdir FOLDER [--config NAME[:variant] [--config.KEY=VALUE ...]]
  dlm configs      list the bundled configs

modes:
{table(MODES.items())}

flags:
{table(own)}
  --config.KEY=VALUE sets an option; configs/default.py holds all of them
  --helpfull lists the flags of the libraries, too

examples:
{examples}"""
