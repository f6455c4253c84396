# SPDX-License-Identifier: Apache-2.0
"""Evaluates a model of pairs: its outputs against references, and its likelihood.

E2E's outputs are detokenized and their slots counted; the grammar's are parsed. Rows of
baselines without a model show what a measure is worth.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dlm_jax import console
from dlm_jax.data import pairs
from dlm_jax.data.pairs import Pair
from dlm_jax.diffusion import likelihood, model
from dlm_jax.errors import UserError
from dlm_jax.evaluation import data_to_text
from dlm_jax.evaluation import references as measured
from dlm_jax.inference import translation
from dlm_jax.inference.pipeline import DiffusionLM
from dlm_jax.ranges import check_ranges
from dlm_jax.runtime import backend, hosts
from dlm_jax.types import PAD

Scores = dict[str, float]
BEAMS = 4  # of an autoregressive model


class Task(NamedTuple):
    """Sources, the measures of an output for each, and outputs made without a model."""

    sources: list[str]
    score: Callable[[Sequence[str]], Scores]
    baselines: dict[str, list[str]]


def _e2e_task(config: Any, held_out: list[Pair], most: int) -> Task:
    path = config.evaluate.references
    records, references = (
        data_to_text.read_references(path)
        if path
        else data_to_text.grouped(
            (source, data_to_text.detokenize(target)) for source, target in held_out
        )
    )
    records, references = records[:most], references[:most]

    def score(outputs: Sequence[str]) -> Scores:
        plain = list(map(data_to_text.detokenize, outputs))
        return data_to_text.scores(plain, records, references)

    sources = list(map(data_to_text.to_source, records))
    template = list(map(data_to_text.template, records))
    return Task(sources, score, {"template": template, "copy of the source": sources})


def _grammar_task(config: Any, held_out: list[Pair], most: int) -> Task:
    sources = [pair.source for pair in held_out[:most]]
    wanted = list(map(pairs.parse_linearized, sources))

    def score(outputs: Sequence[str]) -> Scores:
        return data_to_text.grammar_scores(wanted, outputs)

    return Task(sources, score, {"copy of the source": sources})


def _text_task(config: Any, held_out: list[Pair], most: int) -> Task:
    references: dict[str, list[str]] = {}
    for source, target in held_out:
        references.setdefault(source, []).append(target)
    sources = list(references)[:most]
    wanted = [references[source] for source in sources]

    def score(outputs: Sequence[str]) -> Scores:
        return measured.measures(outputs, wanted)

    return Task(sources, score, {"copy of the source": sources})


TASKS = {"e2e": _e2e_task, "grammar": _grammar_task}


def bound(lm: DiffusionLM, held_out: list[Pair], draws: int) -> likelihood.MeanStderr:
    """Estimates the bound on -log p(target | source), nats per target token, with END."""
    sources, targets = (list(side) for side in zip(*held_out, strict=True))
    ids = lm.encode(targets, sources=sources)
    open_ = ~np.asarray(model.source(ids)) & (ids != PAD)
    return likelihood.ratio_with_stderr(lm.nll(ids, draws=draws).total(), open_.sum(-1))


def outputs_by_row(
    lm: DiffusionLM, sources: list[str], options: Any
) -> dict[str, tuple[list[list[str]], float]]:
    """Generates the outputs of each row: (texts of each seed, seconds per 100 texts)."""
    default = lm.config["sample"]["num_steps"]
    rows = {f"{default} steps": ({}, options.seeds)}
    if options.mbr > 1:
        rows[f"MBR-{options.mbr}, {default} steps"] = ({"mbr": options.mbr}, 1)
    if not (lm.cfg.causal or lm.distilled_steps):
        others = [n for n in options.num_steps if n != default]
        rows |= {f"{n} steps": ({"num_steps": n}, 1) for n in others}
    if lm.cfg.causal:
        rows = {name.removesuffix(f", {default} steps"): x for name, x in rows.items()}
        rows["sampled"] = rows.pop(f"{default} steps")
    made = {}
    bar = console.Bar(list(rows.items()), disable=None)
    for name, (changes, seeds) in bar:
        bar.set_description(name)
        call = {"mbr": 1, **changes}
        lm.translate(
            sources[: lm.config["sample"]["batch"]], seed=0, **call
        )  # compiles
        start = time.perf_counter()
        texts = [lm.translate(sources, seed=seed, **call) for seed in range(seeds)]
        seconds = (time.perf_counter() - start) / (seeds * len(sources)) * 100
        made[name] = (texts, seconds)
        bar.say(f"{name}: {seconds:.1f} s per 100 texts")
    if lm.cfg.causal:
        start = time.perf_counter()
        texts = [translation.beam_search(lm, sources, beams=BEAMS)]
        seconds = (time.perf_counter() - start) / len(sources) * 100
        made[f"beam search, {BEAMS}"] = (texts, seconds)
    return made


def _row(task: Task, texts: list[list[str]]) -> dict[str, dict[str, float]]:
    """Returns each measure's mean over the seeds, and its standard error."""
    scores = [task.score(one) for one in texts]
    values = {name: [score[name] for score in scores] for name in scores[0]}
    error = len(texts) ** 0.5
    return {
        name: {
            "mean": float(np.mean(v)),
            "stderr": float(np.std(v, ddof=1) / error) if len(v) > 1 else float("nan"),
        }
        for name, v in values.items()
    }


def _held_out(lm: DiffusionLM, cfg: Any) -> list[Pair]:
    """Returns the held-out pairs, without those that are too long if training drops them."""
    found = pairs.load_pairs(cfg, "valid")
    if cfg.too_long != "drop":
        return found
    kept = pairs.fitting(found, lm.tokenizer, cfg.length, cfg.delexicalize)
    if len(kept) < len(found):
        console.say(f"{len(found) - len(kept)} held-out pairs are too long: left out")
    return kept


@backend.prepared
def evaluate(lm: DiffusionLM, workdir: str) -> dict[str, Any]:
    """Measures outputs and likelihood; prints a table and writes a JSON file.

    Returns what the file holds. Raises UserError.
    """
    config: Any = ConfigDict(lm.config)
    options = config.evaluate
    check_ranges(lm.config, "evaluate")
    others = [name for name in ("texts", "gpt2", "ode_texts") if options[name]]
    if options.references and config.data.source != "e2e":
        others.append("references")
    if others:
        raise UserError(
            f"config.evaluate.{others[0]}={options[others[0]]}: not for this model; "
            "leave it out"
        )
    held_out = _held_out(lm, config.data)
    make = TASKS.get(config.data.source, _text_task)
    task = make(config, held_out, options.n)
    console.say(f"{len(task.sources)} sources, {len(held_out)} held-out pairs")
    nats = bound(lm, held_out[: options.nll_texts], options.draws)
    made = outputs_by_row(lm, task.sources, options)
    rows = {name: _row(task, texts) for name, (texts, _) in made.items()}
    rows |= {name: _row(task, [texts]) for name, texts in task.baselines.items()}
    console.say(table(rows))
    console.say(f"bound, nats per target token: {nats.mean:.3f} ± {nats.stderr:.3f}")
    first = next(iter(made.values()))[0][0]
    for source, text in list(zip(task.sources, first, strict=True))[:8]:
        console.say(f"  | {console.one_line(source)} || {console.one_line(text)}")
    record = {
        "step": lm.step,
        "sources": len(task.sources),
        "measures": rows,
        "seconds per 100 texts": {name: seconds for name, (_, seconds) in made.items()},
        "nats/token": nats._asdict(),
        "sample": lm.config["sample"],
        "evaluate": lm.config["evaluate"],
        "texts": {name: texts[0] for name, (texts, _) in made.items()},
    }
    if hosts.process_index_and_count()[0] == 0:
        path = Path(workdir) / "evaluation.json"
        clean = json.loads(json.dumps(record), parse_constant=lambda _: None)
        path.write_text(
            json.dumps(clean, indent=1, ensure_ascii=False), encoding="utf-8"
        )
        console.say(path)
    return record


def table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """Formats the rows as a Markdown table."""
    names = list(next(iter(rows.values())))
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, row in rows.items():
        cells = (
            f"{x['mean']:.2f}"
            + ("" if np.isnan(x["stderr"]) else f" ± {x['stderr']:.2f}")
            for x in row.values()
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
