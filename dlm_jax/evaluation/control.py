# SPDX-License-Identifier: Apache-2.0
"""Runs the control tasks: success beside fluency, as a table and JSON files."""

import dataclasses
import json
import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from dlm_jax import console
from dlm_jax.errors import UserError, choose
from dlm_jax.evaluation import text_metrics
from dlm_jax.evaluation.control_targets import Scorer, load_targets, make_scorer
from dlm_jax.evaluation.control_tasks import (
    CONTROL_TASKS,
    ControlTask,
    is_feasible,
    task_of,
)
from dlm_jax.inference import loading
from dlm_jax.inference.constraints import UNCONSTRAINED, batch_constraints
from dlm_jax.inference.guidance_config import GuidanceConfig
from dlm_jax.inference.pipeline import DiffusionLM
from dlm_jax.ranges import check_ranges
from dlm_jax.runtime import backend, checkpoint, hosts, paths


def guidance_of(config: Any, task: str) -> GuidanceConfig:
    """Returns a task's guidance settings. Raises UserError for an unknown preset."""
    presets = config.control.presets.to_dict()
    preset = choose("config.control.preset", presets, config.control.preset)
    settings = dict(preset[task])
    if "t_range" in settings:
        settings["t_range"] = tuple(settings["t_range"])  # JSON has only lists
    return GuidanceConfig(**settings)


def run_task(
    lm: DiffusionLM,
    task: ControlTask | None,
    targets: list,
    scorer: Scorer,
    guidance: GuidanceConfig,
    tick: Callable[[], Any] = lambda: None,
    **options: Any,
) -> dict[str, Any]:
    """Measures success, fluency and cost; task None generates without constraints.

    options: samples (per target), seeds and num_steps. Success is a mean over targets
    with the standard error over seeds, or over targets if there is one seed. "seconds
    per 50" texts is that of the fastest seed; a single seed includes compilation.
    tick: called after every seed.
    """
    samples, seeds, num_steps = (
        options[name] for name in ("samples", "seeds", "num_steps")
    )
    n, constraints = len(targets) * samples, UNCONSTRAINED
    if task is not None:
        rows = [task.constrain(target, lm) for target in targets]
        constraints = jax.tree.map(
            lambda x: np.repeat(x, samples, 0), batch_constraints(rows)
        )
    scores, texts, seconds = [], [], []
    for seed in range(seeds):
        began = time.monotonic()
        drawn = lm.generate(
            n,
            seed=seed,
            num_steps=num_steps,
            constraints=constraints,
            guidance=guidance,
        ).texts
        seconds.append(time.monotonic() - began)
        texts += drawn
        if task is not None:
            pairs = zip(drawn, np.repeat(np.arange(len(targets)), samples), strict=True)
            scores.append([task.score(x, targets[i], scorer) for x, i in pairs])
        tick()
    return {
        "success": summaries(scores, samples),
        **fluency(texts, scorer),
        "seconds per 50": min(seconds) / n * 50,
        "denoiser calls": num_steps,
        "classifier calls": num_steps
        * guidance.num_updates
        * len(task.needs if task else ()),
        "texts": texts[:: max(1, samples)][:8],
    }


def summaries(scores: list[list[dict]], samples: int) -> dict[str, tuple]:
    """Returns {name: (mean, standard error)} of scores by seed and text, if any."""
    names = scores[0][0] if scores else ()
    return {
        n: _summary([[s[n] for s in rows] for rows in scores], samples) for n in names
    }


def _summary(scores: list[list[float]], samples: int) -> tuple[float, float]:
    """Returns (mean, standard error) of one score by seed and text."""
    by_target = np.array(scores).reshape(len(scores), -1, samples).mean(-1)
    parts = by_target.mean(-1) if len(scores) > 1 else by_target[0]
    error = np.std(parts, ddof=1) / math.sqrt(len(parts)) if len(parts) > 1 else 0.0
    return float(by_target.mean()), float(error)


def fluency(texts: list[str], scorer: Scorer) -> dict[str, float | None]:
    """Computes the share of accepted texts, nats per token and unigram entropy (nats).

    accepted: by the grammar; None for other data. nats/token: over texts of finite
    -log p, counting END; None if there are none, or without an autoregressive model.
    """
    nats = scorer.nats(texts)
    good = np.isfinite(nats)
    tokens = np.array(text_metrics.lengths(texts)) + 1
    return {
        "accepted": float(good.mean()) if scorer.exact else None,
        "nats/token": float(nats[good].sum() / tokens[good].sum())
        if good.any()
        else None,
        "unigram entropy": text_metrics.unigram_entropy(texts),
    }


@backend.prepared
def evaluate_control(lm: DiffusionLM, workdir: str) -> list[dict]:
    """Measures the tasks of config.control; prints a table, writes a JSON file per row.

    A row that exists for the same model, classifiers and settings is reused. Raises
    UserError.
    """
    if "control" not in lm.config:
        raise UserError(
            f"{workdir}: the saved config has no section control; pass --config"
        )
    config: Any = ml_collections.ConfigDict(lm.config)
    options = config.control
    names = ["unguided", *CONTROL_TASKS] if options.task == "all" else [options.task]
    lm = _with_classifiers(lm, config, names)
    ar_model = loading.load_ar_model("config.control.ar_model", options.ar_model, lm)
    pairs = [(name, steps) for name in names for steps in options.num_steps]
    # all hosts generate and score; the first one writes
    rows, main = [], hosts.process_index_and_count()[0] == 0
    with console.Bar(
        total=len(pairs) * options.seeds, disable=None if main else True
    ) as bar:
        for name, num_steps in pairs:
            bar.set_description(f"{name}, {num_steps} steps")
            identity = _identity(lm, config, name, num_steps, ar_model)
            file = f"{name}_{num_steps}_{_crc(identity)}.json"
            path = Path(workdir) / "control" / file
            if hosts.broadcast_from_host0(path.exists()):
                bar.update(options.seeds)
            else:
                row = _row(lm, config, name, num_steps, ar_model, bar.update)
                path.parent.mkdir(exist_ok=True)
                if main:
                    checkpoint.write_json(path, identity | row)
            rows += [json.loads(path.read_text("utf-8"))] if main else []
    if main:
        console.say(markdown_table(rows))
    return rows


def _identity(
    lm: DiffusionLM,
    config: Any,
    name: str,
    num_steps: int,
    ar_model: DiffusionLM | None,
) -> dict[str, Any]:
    """Returns all that a row depends on; if any of it changes, the row is a new one."""
    used = CONTROL_TASKS[name].needs if name in CONTROL_TASKS else ()
    weights = {task: lm.classifiers[task].params for task in used}
    options = {
        k: v
        for k, v in paths.without("control", lm.config["control"]).items()
        if k not in ("task", "num_steps", "presets")
    }
    identity = {
        "task": name,
        "num_steps": num_steps,
        "step": lm.step,
        "model": checkpoint.checksum(lm.ema),
        "classifiers in use": {
            task: checkpoint.checksum(w) for task, w in weights.items()
        },
        "control": options,
        "sample": lm.config["sample"],
        "data": paths.without("data", lm.config["data"]),
        "guidance": dataclasses.asdict(guidance_of(config, name)),
        "autoregressive model": checkpoint.checksum(ar_model.ema) if ar_model else None,
        "target files": _files(lm.config["control"]["targets"]),
    }
    if "pos" in name and lm.config["data"]["source"] != "grammar":
        identity["tagger's text"] = _files(lm.config["classifier"]["conllu"])
    return json.loads(json.dumps(identity))


def _files(path: str) -> int:
    """Returns a checksum of a file, or of all files of a folder; 0 if path is empty."""
    if not path:
        return 0
    files = sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]
    total = 0
    for file in filter(Path.is_file, files):
        total = zlib.crc32(file.read_bytes(), total)
    return total


def _crc(record: Any) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


def _row(
    lm: DiffusionLM,
    config: Any,
    name: str,
    num_steps: int,
    ar_model: DiffusionLM | None,
    tick: Callable[[], Any],
) -> dict[str, Any]:
    """Draws targets, generates texts under their constraints, and scores the texts."""
    options, rng = config.control, np.random.default_rng(0)
    task, sentences = task_of(name, lm), load_targets(config, name, options.n)
    usable = [s for s in sentences if is_feasible(lm, name, s)]
    targets = [task.target(s, rng) if task else s.text for s in usable]
    targets = [t for t in targets if task is None or _can_ask(task, t, lm)]
    left_out = len(sentences) - len(targets)
    if left_out:
        console.Bar.write(
            f"{name}: {left_out} of {len(sentences)} sentences cannot be used as targets"
        )
    if not targets:
        raise UserError(
            f"config.control.task={name}: no usable target; raise config.control.n"
        )
    sizes = {"samples": options.samples, "seeds": options.seeds, "num_steps": num_steps}
    guidance = guidance_of(config, name)
    scorer = make_scorer(config, name, ar_model)
    row = run_task(lm, task, targets, scorer, guidance, tick, **sizes)
    head = {"targets": len(targets), "left out": left_out}
    return {**head, **row, "config": lm.config}


def _can_ask(task: ControlTask, target: Any, lm: DiffusionLM) -> bool:
    """Returns whether the target has only words and labels that were trained on."""
    try:
        task.constrain(target, lm)
    except UserError as error:
        console.Bar.write(f"{target}: {error}")
        return False
    return True


def _with_classifiers(lm: DiffusionLM, config: Any, names: list[str]) -> DiffusionLM:
    """Returns lm with the classifiers that the tasks need. Raises UserError."""
    check_ranges(lm.config, "control")
    options = config.control
    for name in names:
        if name not in ("unguided", *CONTROL_TASKS):
            raise UserError(
                f"config.control.task={name!r}: choose all, unguided or one of "
                f"{', '.join(CONTROL_TASKS)}"
            )
        guidance_of(config, name)
    for num_steps in options.num_steps:
        lm.sampling_config(num_steps=num_steps)
    lm = lm.with_classifier(*options.classifiers.split())
    needed = {
        need
        for name in names
        if name in CONTROL_TASKS
        for need in CONTROL_TASKS[name].needs
    }
    for need in sorted(needed - set(lm.classifiers)):
        raise UserError(
            f"config.control.classifiers: no classifier of task {need}; train one with "
            f"--mode train_classifier --config classifier:{need}"
        )
    return lm


def markdown_table(rows: list[dict]) -> str:
    """Formats the rows as a Markdown table."""
    head = ("task", "num_steps", "success", "accepted", "nats/token", "s per 50")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        shares = [
            f"{name} {100 * mean:.1f} ± {100 * error:.1f}"
            for name, (mean, error) in row["success"].items()
        ]
        cells = [row["task"], str(row["num_steps"]), ", ".join(shares)]
        share, nats = row["accepted"], row["nats/token"]
        cells.append("-" if share is None else f"{100 * share:.1f}")
        cells.append("-" if nats is None else f"{nats:.3f}")
        lines.append("| " + " | ".join([*cells, f"{row['seconds per 50']:.1f}"]) + " |")
    return "\n".join(lines)
