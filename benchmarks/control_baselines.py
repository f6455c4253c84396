# SPDX-License-Identifier: Apache-2.0
"""Control without diffusion: the teacher trained on "control, text", sampled or searched.

    python benchmarks/control_baselines.py --out docs/control_baselines.json

FT-sample and FT-search of arXiv:2205.14217 section 6 on the grammar: the same blocks,
causal, trained from scratch by the same command for as many steps as the quickstart, on
the control's words, a bar, and the text. Targets and scores are those of `dlm_jax.tasks`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from nltk import Tree

import dlm_jax
from configs import grammar as grammar_config
from dlm_jax import grammar, targets, tasks, teacher
from dlm_jax.types import PAD, START

BAR = "||"
TRAIN, LENGTH = 50_000, {"tree": 160, "pos": 64}  # positions; of the others 48


def _flat(tree: Tree) -> str:
    """A tree on one line, a star for each word (REFERENCE 1.9)."""
    if not isinstance(tree, Tree):
        return "*"
    label = tree.label().split("_")[0]
    return " ".join(["(" + label, *map(_flat, tree), ")"])


def _field(target: dict[str, str]) -> str:
    return " ".join(f"{field} : {value}" for field, value in target.items())


# the control's words, of a target and the tree of the sentence it stems from
WORDS: dict[str, Callable[[Any, Tree], str]] = {
    "semantic": lambda target, tree: _field(target),
    "pos": lambda target, tree: " ".join(target),
    "tree": lambda target, tree: _flat(tree),
    "span": lambda target, tree: " , ".join(map(str, target)),
    "length": lambda target, tree: str(target),
}


def pairs(task: str, seed: int, n: int) -> list[tuple[Any, str, str]]:
    """(target, control's words, text) of n sentences of the grammar."""
    rng, found = np.random.default_rng(0), []
    for tree in grammar.trees(seed, n):
        sentence = targets.annotate(tree)
        target = tasks.TASKS[task].target(sentence, rng)
        found.append((target, WORDS[task](target, tree), sentence.text))
    return found


def train(task: str, folder: Path, steps: int) -> Path:
    """The teacher on "control || text", by the command; resumes what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    path, length = folder / "texts.txt", LENGTH.get(task, 48)
    path.write_text(
        "\n".join(f"{words} {BAR} {text}" for _, words, text in pairs(task, 0, TRAIN))
    )
    options = {
        "data.source": "text",
        "data.path": path,
        "data.length": length,
        "data.min_count": 0,
        "data.too_long": "drop",
        "model.positions": length,
        "train.total_steps": steps,
        "train.valid_steps": 0,
        "train.sample_steps": 0,
    }
    command = [sys.executable, "-m", "dlm_jax.main", "--config"]
    command += ["configs/grammar.py:teacher", "--workdir", str(folder / "run")]
    command += [f"--config.{name}={value}" for name, value in options.items()]
    subprocess.run(command, check=True)
    return folder / "run"


def texts(bundle: Any, words: list[str], seed: int, *, search: bool) -> list[str]:
    """What the teacher says after each control."""
    rows = [[START, *bundle.tokenizer.encode(f"{w} {BAR}")] for w in words]
    width = max(map(len, rows))
    prefix = np.array([row + [PAD] * (width - len(row)) for row in rows])

    @jax.jit
    def run(key: jax.Array, prefix: jax.Array) -> Any:
        if search:
            return teacher.search(
                bundle.ema, bundle.cfg, bundle.length, prefix=prefix, beams=4
            )
        keys = jax.random.split(key, len(prefix))
        return teacher.sample(
            keys, bundle.ema, bundle.cfg, bundle.length, prefix=prefix
        )

    parts, size = [], 250
    for first in range(0, len(prefix), size):
        rows = jnp.asarray(prefix[first : first + size])
        parts.append(np.asarray(run(jax.random.key(seed * 1000 + first), rows)))
    said = [bundle.tokenizer.decode(row) for row in np.concatenate(parts)]
    return [text.rpartition(f" {BAR} ")[2] for text in said]


def measure(
    task: str, bundle: Any, args: argparse.Namespace, *, search: bool
) -> dict[str, Any]:
    """A row as `tasks.measure` gives it."""
    config = grammar_config.get_config()
    found = pairs(task, config.data.seed + targets.TARGET_SEED, args.n)
    samples = 1 if search else args.samples
    wanted, words, _ = zip(*found, strict=True)
    judge = targets.judge_of(config, task, None)
    scores, said, began = [], [], time.monotonic()
    for seed in range(1 if search else args.seeds):
        drawn = texts(bundle, np.repeat(words, samples).tolist(), seed, search=search)
        score = tasks.TASKS[task].score
        pair = zip(drawn, [t for t in wanted for _ in range(samples)], strict=True)
        scores.append([score(text, target, judge) for text, target in pair])
        said += drawn
    seconds = (time.monotonic() - began) / len(said) * 50
    return {
        "task": task,
        "method": "FT-search" if search else "FT-sample",
        "targets": args.n,
        "samples": samples,
        "seeds": len(scores),
        "success": tasks.summaries(scores, samples),
        **tasks.fluency(said, judge),
        "seconds per 50": seconds,
        "texts": said[:: max(1, len(said) // 8)][:8],
    }


def main() -> None:
    """Trains and measures whatever has no row yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="*", default=list(WORDS))
    parser.add_argument("--out", default="docs/control_baselines.json")
    args = parser.parse_args()
    out = Path(args.out)
    rows = json.loads(out.read_text()) if out.exists() else []
    for task in args.tasks:
        if any(row["task"] == task for row in rows):
            continue
        bundle = dlm_jax.load(train(task, Path("runs/baselines") / task, args.steps))
        for search in (False, True):
            rows.append(measure(task, bundle, args, search=search))
            print(rows[-1]["method"], task, rows[-1]["success"], flush=True)
        out.write_text(json.dumps(rows, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
