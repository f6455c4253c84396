# SPDX-License-Identifier: Apache-2.0
"""Autoregressive baselines of control (arXiv:2205.14217, section 6).

    python benchmarks/control_baselines.py \\
        --out benchmarks/results/control_baselines.json
    python benchmarks/control_baselines.py --e2e FOLDER_OF_src1_train.txt \\
        --conllu en_ewt-ud-dev.conllu --ar_model runs/e2e_ar \\
        --out benchmarks/results/control_baselines_e2e.json

FT-sample and FT-search use the same blocks, causal, trained from scratch by the same
command on the control as words, a bar, and the text. FUDGE is the plain autoregressive
model (`:autoregressive` of the config) whose tokens are weighted by a classifier of
prefixes, trained as the guidance classifiers are. Targets and scores are those of
`--mode control`. E2E has no trees here, as they need a parser.
"""

import argparse
import copy
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from lib import fudge

import dlm_jax
from dlm_jax.configs import e2e_small
from dlm_jax.configs import grammar as grammar_config
from dlm_jax.data import grammar
from dlm_jax.data.annotations import Spans
from dlm_jax.diffusion import autoregressive, classifier
from dlm_jax.diffusion.embedding import embed
from dlm_jax.evaluation import control, control_targets, control_tasks
from dlm_jax.evaluation.control_targets import Sentence
from dlm_jax.inference import pipeline
from dlm_jax.types import PAD, START

BAR = "||"
METHODS = ("FT-sample", "FT-search", "FUDGE")
# lambda, as in the paper; length is missing, as it would need its own classifier
FUDGE = {"semantic": 8.0, "pos": 20.0, "tree": 20.0, "span": 20.0}
TOP = 20  # candidate tokens that FUDGE weights; the paper uses 10 to 200
TRAIN = 50_000  # pairs at most


class Language(NamedTuple):
    """What to control: its config, the folder of its runs, and the tasks.

    lengths: positions of "control || text" by task. options: flags of every training.
    """

    config: Any
    name: str
    folder: Path
    lengths: dict[str, int]
    options: dict[str, Any]


def grammar_language() -> Language:
    """Returns the built-in grammar."""
    lengths = {"semantic": 48, "pos": 64, "tree": 160, "span": 48, "length": 48}
    folder = Path("runs/baselines")
    return Language(grammar_config.get_config(), "grammar", folder, lengths, {})


def e2e_language(path: str, conllu: str, targets: str) -> Language:
    """Returns E2E: texts from path, tags by a tagger, targets held out or published."""
    config = e2e_small.get_config()
    config.data.path, config.control.targets = path, targets
    config.classifier.conllu = conllu
    lengths = {"semantic": 72, "pos": 128, "length": 72}
    options = {"data__path": path, "classifier__conllu": conllu}
    return Language(config, "e2e_small", Path("runs/baselines_e2e"), lengths, options)


def tree_words(spans: Spans, tags: list[str]) -> str:
    """Formats a tree on one line, with a star per word, as the published code does."""
    parts = []
    for i, tag in enumerate(tags):
        opened = sorted((s for s in spans if s[0] == i), key=lambda s: -s[1])
        parts += [f"({label}" for *_, chain in opened for label in chain.split("::")]
        parts.append(f"({tag} * )")
        closed = (chain for _, last, chain in spans if last == i)
        parts += [")" for chain in closed for _ in chain.split("::")]
    return " ".join(parts)


# the control as words, from a target and its sentence
WORDS: dict[str, Callable[[Any, Any], str]] = {
    "semantic": lambda target, _: " ".join(f"{f} : {v}" for f, v in target.items()),
    "pos": lambda target, _: " ".join(target),
    "tree": lambda target, sentence: tree_words(target, sentence.tags),
    "span": lambda target, _: " , ".join(map(str, target)),
    "length": lambda target, _: str(target),
}


def train_sentences(language: Language, task: str) -> list[Sentence]:
    """Returns annotated training sentences, at most TRAIN."""
    if language.name == "grammar":
        return list(map(control_targets.annotate, grammar.trees(0, TRAIN)))
    config = copy.deepcopy(language.config)
    config.data.valid_path = str(Path(config.data.path) / "src1_train.txt")
    config.control.targets = ""
    return control_targets.load_targets(config, task, TRAIN)


def pairs(task: str, sentences: list[Sentence]) -> list[tuple[Any, str, str]]:
    """Returns (target, control as words, text) of each sentence."""
    rng, rows = np.random.default_rng(0), []
    for sentence in sentences:
        target = control_tasks.CONTROL_TASKS[task].target(sentence, rng)
        rows.append((target, WORDS[task](target, sentence), sentence.text))
    return rows


def command(config: str, workdir: Path, **options: Any) -> Path:
    """Trains by the command, which resumes an existing run; returns workdir."""
    mode = "train_classifier" if "classifier" in config else "train"
    line = [sys.executable, "-m", "dlm_jax.main", "--mode", mode, "--config", config]
    line += [f"--config.{n.replace('__', '.')}={v}" for n, v in options.items()]
    subprocess.run([*line, "--workdir", str(workdir)], check=True)
    return workdir


def fine_tuned(task: str, steps: int, language: Language) -> pipeline.DiffusionLM:
    """Trains the autoregressive model on lines "control || text"; returns it."""
    folder, length = language.folder / task, language.lengths[task]
    folder.mkdir(parents=True, exist_ok=True)
    path, rows = folder / "texts.txt", pairs(task, train_sentences(language, task))
    path.write_text(
        "\n".join(f"{words} {BAR} {text}" for _, words, text in rows), encoding="utf-8"
    )
    options = language.options | {
        "data__source": "text",
        "data__path": path,
        "data__length": length,
        "data__min_count": 0,
        "data__too_long": "drop",
        "model__positions": length,
        "train__total_steps": steps,
        "train__valid_steps": 0,
        "train__sample_steps": 0,
    }
    config = f"configs/{language.name}.py:autoregressive"
    return dlm_jax.load(command(config, folder / "run", **options))


def guided(task: str, steps: int, language: Language) -> pipeline.DiffusionLM:
    """Trains the plain autoregressive model and the task's classifier of prefixes."""
    config, folder = f"configs/{language.name}.py:autoregressive", language.folder
    options = language.options
    ar_run = command(config, folder / "ar", **options, train__total_steps=steps)
    (need,) = control_tasks.CONTROL_TASKS[task].needs
    run = command(
        f"configs/classifier.py:{need}",
        folder / f"fudge_{need}",
        classifier__model=ar_run,
        classifier__conllu=language.config.classifier.conllu,
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
    method: str, task: str, language: Language, args: argparse.Namespace
) -> dict[str, Any]:
    """Measures a method on a task; returns a row like those of `--mode control`."""
    make = guided if method == "FUDGE" else fine_tuned
    lm, config = make(task, args.steps, language), language.config
    rows = pairs(task, control_targets.load_targets(config, task, args.n))
    targets, words, _ = (list(part) for part in zip(*rows, strict=True))
    search = method == "FT-search"  # deterministic: one text per target
    samples, seeds = (1, 1) if search else (args.samples, args.seeds)
    judge = dlm_jax.load(args.ar_model) if args.ar_model else None
    scorer = control_targets.make_scorer(config, task, judge)
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
        "targets": len(targets),
        "n": args.n,
        "published": bool(config.control.targets),
        "samples": samples,
        "seeds": seeds,
        "train_steps": args.steps,
        "success": control.summaries(scores, samples),
        **control.fluency(texts, scorer),
        "seconds per 50": seconds,
        "texts": texts[:: max(1, len(texts) // 8)][:8],
    }


def _sizes(row: dict) -> tuple:
    n, published = row.get("n", row["targets"]), row.get("published", False)
    sizes = (row["samples"], row["seeds"], row.get("train_steps", 2000))
    return (row["task"], row["method"], n, published, *sizes)


def main() -> None:
    """Trains and measures every method and task that has no row in --out yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--e2e", default="", help="the folder of E2E; else the grammar")
    parser.add_argument("--conllu", default="", help="E2E: texts to train the tagger")
    parser.add_argument("--targets", default="", help="E2E: published targets")
    parser.add_argument("--ar_model", default="", help="E2E: the judge of fluency")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="*", default=list(WORDS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--out", default="benchmarks/results/control_baselines.json")
    args = parser.parse_args()
    language = grammar_language()
    if args.e2e:
        language = e2e_language(args.e2e, args.conllu, args.targets)
    out = Path(args.out)
    rows = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    done = {_sizes(row) for row in rows}
    tasks = [task for task in args.tasks if task in language.lengths]
    for task, method in itertools.product(tasks, args.methods):
        each = (1, 1) if method == "FT-search" else (args.samples, args.seeds)
        key = (task, method, args.n, bool(args.targets), *each, args.steps)
        if key in done or (method == "FUDGE" and task not in FUDGE):
            continue
        rows.append(measure(method, task, language, args))
        print(method, task, rows[-1]["success"], flush=True)
        out.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
