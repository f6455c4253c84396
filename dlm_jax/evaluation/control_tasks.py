# SPDX-License-Identifier: Apache-2.0
"""The control tasks: targets, constraints and scores, as a table and JSON files.

The scores are those of arXiv:2205.14217, section 6 (docs/method.md, section 7.8). Each
is reported with the fluency of the texts. Targets come from `control_targets`.
"""

import dataclasses
import json
import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from dlm_jax.data.annotations import Fields, Spans
from dlm_jax.errors import UserError, choose
from dlm_jax.evaluation import text_metrics
from dlm_jax.evaluation.control_targets import (
    Scorer,
    Sentence,
    fields_in_text,
    has_phrase,
    load_targets,
    make_scorer,
)
from dlm_jax.inference import loading
from dlm_jax.inference.constraints import (
    BLANK,
    UNCONSTRAINED,
    Constraints,
    batch_constraints,
    pad_to_power_of_two,
    parse_constraints,
    parse_template,
    template_constraints,
)
from dlm_jax.inference.guidance_config import GuidanceConfig
from dlm_jax.inference.pipeline import DiffusionLM
from dlm_jax.runtime import checkpoint, hosts
from dlm_jax.types import UNK


class ControlTask(NamedTuple):
    """A task: its target, the constraint that asks for it, and its score.

    target(sentence, rng): draws a target from a held-out sentence. constrain(target,
    lm): the constraints of one text, as a row. score(text, target, scorer): named
    scores in [0, 1]. needs: the label tasks whose classifiers it uses.
    """

    target: Callable[[Sentence, Any], Any]
    constrain: Callable[[Any, DiffusionLM], Constraints]
    score: Callable[[str, Any, Scorer], dict[str, float]]
    needs: tuple[str, ...] = ()


# --- targets


def _one_field(sentence: Sentence, rng: Any) -> Fields:
    """Draws a field whose value occurs in the text, or any field if none does."""
    assert sentence.fields is not None
    fields = fields_in_text(sentence) or sentence.fields
    field = sorted(fields)[rng.integers(len(fields))]
    return {field: fields[field]}


def _one_span(sentence: Sentence, rng: Any) -> tuple[int, int, str]:
    """Draws a constituent other than the whole text."""
    inner = _inner(sentence)
    return inner[rng.integers(len(inner))]


def _inner(sentence: Sentence) -> list[tuple[int, int, str]]:
    whole = (0, len(sentence.text.split()) - 1)
    return [span for span in sentence.spans or [] if span[:2] != whole]


def _middle(sentence: Sentence, rng: Any) -> str:
    """Returns the text with a blank for each word of its middle third."""
    words = sentence.text.split()
    third = max(1, len(words) // 3)
    return " ".join([*words[:third], *["___"] * third, *words[2 * third :]])


# --- constraints: (target, lm) -> one row


def _from_target(name: str) -> Callable[[Any, DiffusionLM], Constraints]:
    def constrain(target: Any, lm: DiffusionLM) -> Constraints:
        tok, classifiers = lm.tokenizer, lm.classifiers
        return parse_constraints(tok, lm.length, classifiers, **{name: target})

    return constrain


def _semantic(target: Fields, lm: DiffusionLM) -> Constraints:
    """Constrains the fields by the classifier, and their words by token guidance."""
    words = [lm.tokenizer.encode(value) for value in target.values()]
    phrases = [pad_to_power_of_two([-1] if UNK in ids else ids) for ids in words]
    return _from_target("semantic")(target, lm)._replace(phrases=tuple(phrases))


def _template(target: str, lm: DiffusionLM) -> Constraints:
    parts = parse_template(lm.tokenizer, target)
    return template_constraints(parts, lm.length, lm.tokenizer.vocab_size, 1, 0)


# --- scores


def _value(text: str, target: Fields, scorer: Scorer) -> dict[str, float]:
    return {"value": float(all(has_phrase(v, text) for v in target.values()))}


def _tags(text: str, target: list[str], scorer: Scorer) -> dict[str, float]:
    """Scores tags by position, after cutting or padding them to the target's length."""
    tags = scorer.tags(text)[: len(target)]
    tags += [""] * (len(target) - len(tags))
    right = [a == b for a, b in zip(tags, target, strict=True)]
    return {"tags": sum(right) / len(right), "all tags": float(all(right))}


def _tree(text: str, target: Spans, scorer: Scorer) -> dict[str, float]:
    """Computes F1 of labelled constituents; a text without a parse has none."""
    spans, wanted = set(scorer.spans(text)), set(target)
    f1 = 2 * len(spans & wanted) / (len(spans) + len(wanted))
    return {"tree F1": f1, "whole tree": float(spans == wanted)}


def _has_span(text: str, target: tuple, scorer: Scorer) -> dict[str, float]:
    """Scores a constituent in its place: alone, and within a parse of the text."""
    first, last, label = target
    derived = scorer.derived(text)
    within = tuple(target) in scorer.spans(text)
    alone = within or all((first, last, name) in derived for name in label.split("::"))
    return {"span": float(alone), "span in a parse": float(within)}


def _length(text: str, target: int, scorer: Scorer) -> dict[str, float]:
    off = abs(len(text.split()) - target)
    return {"exact length": float(off == 0), "length +-2": float(off <= 2)}


def _kept(text: str, target: str, scorer: Scorer) -> dict[str, float]:
    """Scores whether the known words are in place and the length is the template's."""
    words, wanted = text.split(), target.split()
    same = [w in (BLANK, x) for w, x in zip(wanted, words, strict=False)]
    return {"known kept": float(len(words) == len(wanted) and all(same))}


def _both(first: ControlTask, second: ControlTask) -> ControlTask:
    """Combines two classifier tasks; both targets come from the same sentence."""

    def constrain(target: Any, lm: DiffusionLM) -> Constraints:
        one, two = first.constrain(target[0], lm), second.constrain(target[1], lm)
        labels = {**one.labels, **two.labels}
        return Constraints(phrases=one.phrases + two.phrases, labels=labels)

    def score(text: str, target: Any, scorer: Scorer) -> dict[str, float]:
        one = first.score(text, target[0], scorer)
        return {**one, **second.score(text, target[1], scorer)}

    return ControlTask(
        lambda s, rng: (first.target(s, rng), second.target(s, rng)),
        constrain,
        score,
        first.needs + second.needs,
    )


CONTROL_TASKS: dict[str, ControlTask] = {
    "semantic": ControlTask(_one_field, _semantic, _value, ("semantic",)),
    "pos": ControlTask(lambda s, rng: s.tags, _from_target("pos"), _tags, ("pos",)),
    "tree": ControlTask(lambda s, rng: s.spans, _from_target("tree"), _tree, ("tree",)),
    "span": ControlTask(_one_span, _from_target("span"), _has_span, ("tree",)),
    "length": ControlTask(
        lambda s, rng: len(s.text.split()), _from_target("length"), _length
    ),
    "infilling": ControlTask(_middle, _template, _kept),
}
CONTROL_TASKS["semantic+tree"] = _both(CONTROL_TASKS["semantic"], CONTROL_TASKS["tree"])
CONTROL_TASKS["semantic+pos"] = _both(CONTROL_TASKS["semantic"], CONTROL_TASKS["pos"])


def guidance_of(config: Any, task: str) -> GuidanceConfig:
    """Returns a task's guidance settings. Raises UserError for an unknown preset."""
    presets = config.control.presets.to_dict()
    preset = choose("config.control.preset", presets, config.control.preset)
    settings = dict(preset[task])
    if "t_range" in settings:
        settings["t_range"] = tuple(settings["t_range"])  # JSON has only lists
    return GuidanceConfig(**settings)


# --- the command


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
    tokens = np.array([len(text.split()) + 1 for text in texts])
    return {
        "accepted": float(good.mean()) if scorer.exact else None,
        "nats/token": float(nats[good].sum() / tokens[good].sum())
        if good.any()
        else None,
        "unigram entropy": text_metrics.unigram_entropy(texts),
    }


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
    lm = _with_classifiers(lm, options, names)
    ar_model = loading.load_ar_model("config.control.ar_model", options.ar_model, lm)
    pairs, rows = (
        [(name, num_steps) for name in names for num_steps in options.num_steps],
        [],
    )
    main = (
        hosts.process_index_and_count()[0] == 0
    )  # all hosts generate and score; the first one writes
    with tqdm(total=len(pairs) * options.seeds, disable=not main) as bar:
        for name, num_steps in pairs:
            bar.set_description(f"{name}, {num_steps} calls")
            identity = _identity(lm, config, name, num_steps, ar_model)
            path = (
                Path(workdir) / "control" / f"{name}_{num_steps}_{_crc(identity)}.json"
            )
            if hosts.broadcast_from_host0(path.exists()):
                bar.update(options.seeds)
            else:
                row = _row(lm, config, name, num_steps, ar_model, bar.update)
                path.parent.mkdir(exist_ok=True)
                if main:
                    checkpoint.write_json(path, identity | row)
            rows += [json.loads(path.read_text())] if main else []
    if main:
        print(markdown_table(rows))
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
        for k, v in lm.config["control"].items()
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
        "data": lm.config["data"],
        "guidance": dataclasses.asdict(guidance_of(config, name)),
        "autoregressive model": checkpoint.checksum(ar_model.ema) if ar_model else None,
        "target files": _files(options["targets"]),
    }
    if "pos" in name and lm.config["data"]["source"] != "grammar":
        identity["tagger's text"] = _files(lm.config["classifier"]["conllu"])
    return json.loads(json.dumps(identity))


def _files(path: str) -> int:
    """Returns a checksum of a file, or of all files of a folder; 0 if path is empty."""
    files = sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]
    total = 0
    for file in (f for f in files if path and f.is_file()):
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
    task, sentences = CONTROL_TASKS.get(name), load_targets(config, name, options.n)
    usable = [s for s in sentences if _can_say(lm, name, s)]
    if usable != sentences:
        tqdm.write(
            f"{name}: {len(sentences) - len(usable)} of {len(sentences)} sentences "
            "cannot be used as targets"
        )
    targets = [task.target(s, rng) if task else s.text for s in usable]
    if not targets:
        raise UserError(
            f"config.control.task={name}: no usable target; raise config.control.n"
        )
    sizes = {"samples": options.samples, "seeds": options.seeds, "num_steps": num_steps}
    guidance = guidance_of(config, name)
    scorer = make_scorer(config, name, ar_model)
    row = run_task(lm, task, targets, scorer, guidance, tick, **sizes)
    left_out = len(sentences) - len(usable)
    return {
        "targets": len(targets),
        "left out": left_out,
        **row,
        "config": lm.config,
    }


def _can_say(lm: DiffusionLM, name: str, sentence: Sentence) -> bool:
    """Returns whether a sentence fits: its length, its words, and a span if needed."""
    if name == "infilling" and UNK in lm.tokenizer.encode(sentence.text):
        return False
    if name == "span" and not _inner(sentence):
        return False
    return name == "unguided" or len(sentence.text.split()) <= lm.length - 2


def _with_classifiers(lm: DiffusionLM, options: Any, names: list[str]) -> DiffusionLM:
    """Returns lm with the classifiers that the tasks need. Raises UserError."""
    for name in names:
        if name not in ("unguided", *CONTROL_TASKS):
            raise UserError(
                f"config.control.task={name!r}: choose all, unguided or one of "
                f"{', '.join(CONTROL_TASKS)}"
            )
    choose("config.control.preset", options.presets.to_dict(), options.preset)
    for name in ("n", "samples", "seeds"):
        if options[name] < 1:
            raise UserError(f"config.control.{name}={options[name]}: must be 1 or more")
    for num_steps in options.num_steps:
        if num_steps < 1:
            raise UserError(f"config.control.num_steps: {num_steps} must be 1 or more")
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
            f"--mode train_classifier --config configs/classifier.py:{need}"
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
