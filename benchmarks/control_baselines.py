# SPDX-License-Identifier: Apache-2.0
"""Autoregressive baselines of control on the grammar (arXiv:2205.14217, section 6).

    python benchmarks/control_baselines.py \\
        --out benchmarks/results/control_baselines.json

FT-sample and FT-search use the same blocks, causal, trained from scratch by the same
command for as many steps as the quickstart, on the control as words, a bar, and the
text. FUDGE is the plain autoregressive model (configs/grammar.py:autoregressive) whose
tokens are weighted by a classifier of prefixes, trained as the guidance classifiers
are. `dlm_jax.evaluation.control_tasks` gives the targets and scores.
"""

import argparse
import itertools
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
from lib import fudge
from nltk import Tree

import dlm_jax
from dlm_jax.configs import grammar as grammar_config
from dlm_jax.data import grammar
from dlm_jax.diffusion import autoregressive, classifier
from dlm_jax.diffusion.embedding import embed
from dlm_jax.evaluation import control, control_targets, control_tasks
from dlm_jax.inference import pipeline
from dlm_jax.types import PAD, START

BAR = "||"
METHODS = ("FT-sample", "FT-search", "FUDGE")
# lambda, as in the paper; length is missing, as it would need its own classifier
FUDGE = {"semantic": 8.0, "pos": 20.0, "tree": 20.0, "span": 20.0}
TOP = 20  # candidate tokens that FUDGE weights; the paper uses 10 to 200
TRAIN, LENGTH = 50_000, {"tree": 160, "pos": 64}  # positions; other tasks have 48


def _flat(tree: Tree) -> str:
    """Formats a tree on one line, with a star per word, as the published code does."""
    if not isinstance(tree, Tree):
        return "*"
    label = tree.label().split("_")[0]
    return " ".join(["(" + label, *map(_flat, tree), ")"])


def _field(target: dict[str, str]) -> str:
    return " ".join(f"{field} : {value}" for field, value in target.items())


# the control as words, from a target and the tree of its sentence
WORDS: dict[str, Callable[[Any, Tree], str]] = {
    "semantic": lambda target, tree: _field(target),
    "pos": lambda target, tree: " ".join(target),
    "tree": lambda target, tree: _flat(tree),
    "span": lambda target, tree: " , ".join(map(str, target)),
    "length": lambda target, tree: str(target),
}


def pairs(task: str, seed: int, n: int) -> list[tuple[Any, str, str]]:
    """Returns (target, control as words, text) of n sentences of the grammar."""
    rng, rows = np.random.default_rng(0), []
    for tree in grammar.trees(seed, n):
        sentence = control_targets.annotate(tree)
        target = control_tasks.CONTROL_TASKS[task].target(sentence, rng)
        rows.append((target, WORDS[task](target, tree), sentence.text))
    return rows


def command(config: str, workdir: Path, **options: Any) -> Path:
    """Trains by the command, which resumes an existing run; returns workdir."""
    mode = "train_classifier" if "classifier" in config else "train"
    line = [sys.executable, "-m", "dlm_jax.main", "--mode", mode, "--config", config]
    line += [f"--config.{n.replace('__', '.')}={v}" for n, v in options.items()]
    subprocess.run([*line, "--workdir", str(workdir)], check=True)
    return workdir


def fine_tuned(task: str, steps: int) -> pipeline.DiffusionLM:
    """Trains the autoregressive model on lines "control || text"; returns it."""
    folder, length = Path("runs/baselines") / task, LENGTH.get(task, 48)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "texts.txt"
    path.write_text(
        "\n".join(f"{words} {BAR} {text}" for _, words, text in pairs(task, 0, TRAIN))
    )
    run = command(
        "configs/grammar.py:autoregressive",
        folder / "run",
        data__source="text",
        data__path=path,
        data__length=length,
        data__min_count=0,
        data__too_long="drop",
        model__positions=length,
        train__total_steps=steps,
        train__valid_steps=0,
        train__sample_steps=0,
    )
    return dlm_jax.load(run)


def guided(task: str, steps: int) -> pipeline.DiffusionLM:
    """Trains the plain autoregressive model and the task's classifier of prefixes."""
    folder = Path("runs/baselines")
    ar_run = command(
        "configs/grammar.py:autoregressive",
        folder / "ar",
        train__total_steps=steps,
    )
    (need,) = control_tasks.CONTROL_TASKS[task].needs
    run = command(
        f"configs/classifier.py:{need}",
        folder / f"fudge_{need}",
        classifier__model=ar_run,
        loss__truncate_prob=1.0,
    )
    return dlm_jax.load(ar_run).with_classifier(run)


def after_words(
    lm: pipeline.DiffusionLM, words: list[str], seed: int, *, search: bool
) -> list[str]:
    """Generates a text after each control, by beam search or by sampling."""
    rows = [[START, *lm.tokenizer.encode(f"{w} {BAR}")] for w in words]
    width = max(map(len, rows))
    prefix = np.array([row + [PAD] * (width - len(row)) for row in rows])
    model = (lm.ema, lm.cfg)

    def run(key: jax.Array, prefix: jax.Array) -> Any:
        if search:
            return autoregressive.beam_search(*model, lm.length, prefix=prefix, beams=4)
        keys = jax.random.split(key, len(prefix))
        return autoregressive.sample(keys, *model, lm.length, prefix=prefix)

    return [answer(text) for text in _in_slices(lm, run, prefix, seed)]


def answer(text: str) -> str:
    """Returns the text after the control's bar, which may be empty."""
    return f"{text} ".partition(f" {BAR} ")[2].strip()


def by_fudge(
    lm: pipeline.DiffusionLM, task: str, wanted: list, samples: int, seed: int
) -> list[str]:
    """Generates texts by FUDGE, `samples` per target."""
    rows = [
        control_tasks.CONTROL_TASKS[task].constrain(target, lm) for target in wanted
    ]
    (need,) = control_tasks.CONTROL_TASKS[task].needs
    labels = np.repeat(np.concatenate([r.labels[need] for r in rows]), samples, 0)
    guide = lm.classifiers[need]

    def run(key: jax.Array, labels: jax.Array) -> Any:
        def log_prob(ids: Any) -> Any:
            log_prob_at = classifier.log_prob(
                guide.params,
                guide.cfg,
                guide.vocab.head_spec,
                jnp.repeat(labels, TOP, 0),
                lm.schedule,
            )
            return log_prob_at(embed(lm.ema.table, ids), jnp.zeros(len(ids)))

        keys = jax.random.split(key, len(labels))
        return fudge.fudge(
            keys,
            lm.ema,
            lm.cfg,
            lm.length,
            log_prob,
            weight=FUDGE[task],
            top=TOP,
        )

    return _in_slices(lm, run, labels, seed)


def _in_slices(
    lm: pipeline.DiffusionLM, run: Callable, rows: np.ndarray, seed: int
) -> list[str]:
    """Generates the texts of all rows in slices of one size, so it compiles once."""
    size, slices, run = min(100, len(rows)), [], jax.jit(run)
    for first in range(0, len(rows), size):
        part = jnp.asarray(rows[np.arange(first, first + size) % len(rows)])
        key = jax.random.fold_in(jax.random.key(seed), first)
        slices.append(np.asarray(run(key, part)))
    ids = np.concatenate(slices)[: len(rows)]
    return [lm.tokenizer.decode(row) for row in ids]


def measure(
    method: str, task: str, lm: pipeline.DiffusionLM, args: argparse.Namespace
) -> dict[str, Any]:
    """Measures a method on a task; returns a row like those of `--mode control`."""
    config = grammar_config.get_config()
    rows = pairs(task, config.data.seed + control_targets.TARGET_SEED, args.n)
    targets, words, _ = (list(part) for part in zip(*rows, strict=True))
    search = method == "FT-search"  # deterministic: one text per target
    samples, seeds = (1, 1) if search else (args.samples, args.seeds)
    scorer = control_targets.make_scorer(config, task, None)
    scores, texts, began = [], [], time.monotonic()
    for seed in range(seeds):
        if method == "FUDGE":
            drawn = by_fudge(lm, task, targets, samples, seed)
        else:
            all_words = [w for w in words for _ in range(samples)]
            drawn = after_words(lm, all_words, seed, search=search)
        score = control_tasks.CONTROL_TASKS[task].score
        pair = zip(drawn, [t for t in targets for _ in range(samples)], strict=True)
        scores.append([score(text, target, scorer) for text, target in pair])
        texts += drawn
    seconds = (time.monotonic() - began) / len(texts) * 50
    return {
        "task": task,
        "method": method,
        "targets": args.n,
        "samples": samples,
        "seeds": seeds,
        "train_steps": args.steps,
        "success": control.summaries(scores, samples),
        **control.fluency(texts, scorer),
        "seconds per 50": seconds,
        "texts": texts[:: max(1, len(texts) // 8)][:8],
    }


def _sizes(row: dict) -> tuple:
    names = ("task", "method", "targets", "samples", "seeds")
    return (*(row[name] for name in names), row.get("train_steps", 2000))


def main() -> None:
    """Trains and measures every method and task that has no row in --out yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="*", default=list(WORDS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--out", default="benchmarks/results/control_baselines.json")
    args = parser.parse_args()
    out = Path(args.out)
    rows = json.loads(out.read_text()) if out.exists() else []
    sizes = (args.n, args.samples, args.seeds, args.steps)
    done = {_sizes(row) for row in rows}
    for task, method in itertools.product(args.tasks, args.methods):
        mine = (args.n, 1, 1, args.steps) if method == "FT-search" else sizes
        if (task, method, *mine) in done or (method == "FUDGE" and task not in FUDGE):
            continue
        make = guided if method == "FUDGE" else fine_tuned
        rows.append(measure(method, task, make(task, args.steps), args))
        print(method, task, rows[-1]["success"], flush=True)
        out.write_text(json.dumps(rows, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
