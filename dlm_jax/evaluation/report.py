# SPDX-License-Identifier: Apache-2.0
"""Evaluates samples by metrics, next to the same metrics of held-out text.

A metric is flagged if samples are worse than held-out text by more than its margin and
five standard errors. Degenerate samples that win one metric are flagged by another.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from dlm_jax import console
from dlm_jax.data import files, grammar, reading, sources
from dlm_jax.data.normalization import normalize
from dlm_jax.diffusion import likelihood
from dlm_jax.diffusion.likelihood import MeanStderr
from dlm_jax.errors import UserError
from dlm_jax.evaluation import gpt2, plots, text_metrics
from dlm_jax.evaluation.exact import gap_rows
from dlm_jax.inference import loading
from dlm_jax.inference.pipeline import DiffusionLM
from dlm_jax.ranges import check_ranges
from dlm_jax.runtime import backend, hosts
from dlm_jax.types import PAD, START, UNK, Array


class Reference(NamedTuple):
    """The data and the model that metrics compare samples with.

    held_out: texts that metrics compare with; the held-out column uses the other half.
    train_grams: the 4-grams of train. on_grammar: the data is the built-in grammar.
    judge: a GPT-2, which was not trained on this data.
    """

    train: frozenset[str]
    train_grams: frozenset[tuple[str, ...]]
    held_out: list[str]
    ar_model: DiffusionLM | None
    on_grammar: bool
    judge: gpt2.GPT2 | None = None


class Row(NamedTuple):
    """A metric of samples and of held-out text, over seeds; note: why it is missing."""

    samples: MeanStderr
    held_out: MeanStderr
    flag: bool
    note: str = ""


# --- metrics: (texts, reference) -> a number


def _ar_model(reference: Reference) -> DiffusionLM:
    if reference.ar_model is None:
        raise UserError("needs config.evaluate.ar_model, a run of objective 'ar'")
    return reference.ar_model


def _ar_nll(texts: list[str], reference: Reference) -> float:
    ar_model = _ar_model(reference)
    ids = ar_model.encode(texts)
    return float(ar_model.nll(ids).total().sum() / tokens(ids).sum())


def _judge(reference: Reference) -> gpt2.GPT2:
    if reference.judge is None:
        raise UserError("needs config.evaluate.gpt2, the folder of a GPT-2")
    return reference.judge


def _energy(texts: list[str], reference: Reference) -> float:
    ar_model = _ar_model(reference)
    sampled, real = (
        ar_model.features(ar_model.encode(t)) for t in (texts, reference.held_out)
    )
    return text_metrics.energy_distance(sampled, real)


def _accepted(texts: list[str], reference: Reference) -> float:
    if not reference.on_grammar:
        raise UserError("needs the grammar")
    return float(np.mean([grammar.accepts(text) for text in texts]))


def _exact_nll(texts: list[str], reference: Reference) -> float:
    """Returns nats per token, END counted, of the texts that the grammar accepts."""
    if not reference.on_grammar:
        raise UserError("needs the grammar")
    good = [text for text in texts if grammar.accepts(text)]
    if not good:
        raise UserError("needs a text that the grammar accepts")
    count = sum(text_metrics.lengths(good)) + len(good)
    return -sum(map(grammar.log_prob, good)) / count


class Metric(NamedTuple):
    """worse: +1 if larger is worse, -1 if smaller is; margin: tolerated difference."""

    value: Callable[[list[str], Reference], float]
    worse: int
    margin: float


METRICS: dict[str, Metric] = {
    "accepted by the grammar": Metric(_accepted, -1, 0.5),
    "exact nats/token, accepted": Metric(_exact_nll, +1, 0.5),
    "autoregressive nats/token": Metric(_ar_nll, +1, 0.5),
    "energy distance": Metric(_energy, +1, 0.1),
    "unigram entropy, nats": Metric(
        lambda t, r: text_metrics.unigram_entropy(t), -1, 0.25
    ),
    "distinct texts": Metric(lambda t, r: len(set(t)) / len(t), -1, 0.1),
    "distinct-1": Metric(lambda t, r: text_metrics.distinct(t, 1), -1, 0.05),
    "distinct-4": Metric(lambda t, r: text_metrics.distinct(t, 4), -1, 0.25),
    "repetition within a text": Metric(
        lambda t, r: text_metrics.repetition(t), +1, 0.1
    ),
    "length distance, words": Metric(
        lambda t, r: text_metrics.length_distance(t, r.held_out), +1, 3.0
    ),
    "texts copied from train": Metric(
        lambda t, r: text_metrics.copied(t, r.train), +1, 0.25
    ),
    "4-grams of train": Metric(
        lambda t, r: text_metrics.copied_grams(t, r.train_grams), -1, 0.5
    ),
}  # fmt: skip


# by reference.judge, on its own tokens
GPT2_METRICS: dict[str, Metric] = {
    "GPT-2 nats/token": Metric(lambda t, r: _judge(r).nats_per_token(t), +1, 0.5),
    "GPT-2 entropy per text, nats": Metric(
        lambda t, r: _judge(r).entropy_per_text(t), -1, 0.25
    ),
    "GPT-2 entropy, nats": Metric(lambda t, r: _judge(r).entropy(t), -1, 0.25),
}


def tokens(ids: np.ndarray) -> np.ndarray:
    """Counts the tokens of each row [n]: words and END, without START and PAD."""
    return np.sum((ids != PAD) & (ids != START), -1)


def over_seeds(values: list[float]) -> MeanStderr:
    """Returns the mean and standard error of the mean; the error of one seed is nan."""
    many = len(values) > 1
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if many else math.nan
    return MeanStderr(float(np.mean(values)), float(error))


def _row(metric: Metric, samples: list, held_out: list, reference: Reference) -> Row:
    none = MeanStderr(math.nan, math.nan)
    try:
        sampled, real = (
            over_seeds([metric.value(texts, reference) for texts in part])
            for part in (samples, held_out)
        )
    except UserError as error:
        return Row(none, none, False, str(error))
    if math.isnan(sampled.mean) or math.isnan(real.mean):
        return Row(sampled, real, False, "needs longer texts")
    worse = metric.worse * (sampled.mean - real.mean)
    errors = (sampled.stderr, real.stderr)
    noise = math.hypot(*(0.0 if math.isnan(e) else e for e in errors))
    return Row(sampled, real, worse > max(metric.margin, 5 * noise))


def compare(
    samples: list[list[str]], held_out: list[str], reference: Reference
) -> dict:
    """Returns {metric: Row} of samples, a list of texts per seed, and held-out text.

    Each seed's samples are compared with as many held-out texts, because entropy and
    distinct-n depend on the number. Raises UserError if a list is too short.
    """
    size = min(map(len, samples))
    if size < 2 or len(held_out) < size * len(samples):
        raise UserError(
            f"config.evaluate: {len(samples)} x {size} samples and {len(held_out)} "
            "held-out texts; give 2 or more samples per seed, and as many held-out "
            "texts as samples"
        )
    real = [held_out[i * size : (i + 1) * size] for i in range(len(samples))]
    samples = [texts[:size] for texts in samples]
    metrics = METRICS if reference.judge is None else METRICS | GPT2_METRICS
    rows = {name: _row(m, samples, real, reference) for name, m in metrics.items()}
    if (nats := rows.get("GPT-2 nats/token")) and not nats.note:
        both = (_exp(nats.samples), _exp(nats.held_out))
        rows["GPT-2 perplexity"] = Row(*both, flag=False)
    return rows


def _exp(nats: MeanStderr) -> MeanStderr:
    """Returns exp of a mean, and its standard error to first order."""
    mean = math.exp(nats.mean)
    return MeanStderr(mean, mean * nats.stderr)


# --- likelihood


def likelihood_rows(
    lm: DiffusionLM, texts: list[str], draws: int
) -> dict[str, MeanStderr]:
    """Estimates the bound on -log p of texts, per token and per position.

    draws: noise levels per text. For an autoregressive model the values are exact. In
    bits per character, too, unless a text has UNK. On the grammar, adds the excess over the exact -log p, and the gap by level of noise.
    """
    ids = lm.encode(texts)
    terms, count = lm.nll(ids, draws=draws), tokens(ids)
    total = terms.total()
    rows = {"nats/token": likelihood.ratio_with_stderr(total, count)}
    rows["bits/token"] = MeanStderr(*(x / math.log(2) for x in rows["nats/token"]))
    rows["nats/position"] = likelihood.ratio_with_stderr(
        total, np.full(len(ids), ids.shape[1])
    )
    if UNK not in ids:
        rows["bits/character"] = _per_character(lm, texts, total / math.log(2), count)
    if not lm.cfg.causal:
        for name, term in terms._asdict().items():
            if name == "length" and not lm.cfg.known_length:
                continue
            rows[f"{name}, nats/token"] = likelihood.ratio_with_stderr(term, count)
    if lm.config["data"]["source"] == "grammar" and len(ids) == len(texts):
        exact = -np.array([grammar.log_prob(text) for text in texts])
        rows["above the language, nats/token"] = likelihood.ratio_with_stderr(
            total - exact, count
        )
        rows |= gap_rows(lm, ids, count)
    return rows


def _per_character(
    lm: DiffusionLM, texts: list[str], bits: Array, count: np.ndarray
) -> MeanStderr:
    """Divides bits of rows by the characters of their tokens, of `count` per row.

    Rows that hold whole texts have these texts' characters, others the mean per token.
    """
    characters = np.array(list(map(len, texts)))
    sizes = np.array([len(lm.tokenizer.encode(text)) + 1 for text in texts])
    if np.array_equal(sizes, count):
        return likelihood.ratio_with_stderr(bits, characters)
    mean = characters.sum() / sizes.sum()
    return likelihood.ratio_with_stderr(bits, count * mean)


def ode_rows(lm: DiffusionLM, texts: list[str], draws: int) -> dict[str, MeanStderr]:
    """Estimates -log p of texts under the ODE sampler, nats per token, and the difference.

    {} without texts, and of an autoregressive model. Raises UserError.
    """
    if not texts or lm.cfg.causal:
        return {}
    ids = lm.encode(texts)
    ode, other = (
        lm.nll(ids, draws=n, estimator=name).total()
        for name, n in (("ode", 1), ("variational", draws))
    )
    rows = {"ODE, nats/token": ode, "ODE less variational, nats/token": ode - other}
    count = tokens(ids)
    return {n: likelihood.ratio_with_stderr(x, count) for n, x in rows.items()}


# --- the command


def references(lm: DiffusionLM, config: Any) -> tuple[Reference, list[str]]:
    """Loads the reference, and the held-out texts of the table. Raises UserError."""
    ar_model = loading.load_ar_model(
        "config.evaluate.ar_model", config.evaluate.ar_model, lm
    )
    judge = _load_judge(config.evaluate.gpt2)
    train = sources.load_texts(config.data, "train")
    held_out = sources.load_texts(config.data, "valid")
    splits = {"train": train, "valid": held_out}
    encoded = {split: (texts, lm.encode(texts)) for split, texts in splits.items()}
    for line in reading.describe(config.data, lm.tokenizer, encoded):
        console.say(line)
    half = len(held_out) // 2
    seen = frozenset(text_metrics.all_grams(train))
    on_grammar = config.data.source == "grammar"
    reference = Reference(
        frozenset(train), seen, held_out[half:], ar_model, on_grammar, judge
    )
    return reference, held_out[:half]


def _load_judge(folder: str) -> gpt2.GPT2 | None:
    try:
        return gpt2.load(folder) if folder else None
    except UserError as error:
        raise UserError(f"config.evaluate.gpt2={folder}: {error}") from error


def _check(options: Any, lm: DiffusionLM) -> None:
    """Raises UserError for settings that would fail only after sampling."""
    check_ranges(lm.config, "evaluate")
    if not lm.cfg.causal:
        for num_steps in options.num_steps:
            lm.sampling_config(num_steps=num_steps)


def read_samples(path: str) -> list[str]:
    """Reads a file of samples, a text per line, empty ones too. Raises UserError."""
    try:
        numbered = enumerate(files.every_line(Path(path)), 1)
        return [normalize(line, f"line {number}") for number, line in numbered]
    except UserError as error:
        raise UserError(f"config.evaluate.texts={path}: {error}") from error


def _samples(lm: DiffusionLM, options: Any) -> list[list[str]]:
    """Returns a list of texts per seed: generated, or a file's, split."""
    if not options.texts:
        seeds = console.progress(range(options.seeds), "samples of each seed")
        return [lm.sample(options.n, seed=seed) for seed in seeds]
    texts = read_samples(options.texts)
    size = len(texts) // options.seeds
    if size < 2:
        raise UserError(
            f"config.evaluate.texts={options.texts} holds {len(texts)} texts: give at "
            f"least {2 * options.seeds}, or lower config.evaluate.seeds"
        )
    return [texts[i * size : (i + 1) * size] for i in range(options.seeds)]


def frontier(lm: DiffusionLM, reference: Reference, options: Any) -> list[dict]:
    """Measures quality and entropy by number of steps; [] without a quality metric."""
    quality = (
        "accepted by the grammar"
        if reference.on_grammar
        else "autoregressive nats/token"
    )
    if lm.cfg.causal or options.texts or lm.distilled_steps:
        return []
    if not reference.on_grammar and reference.ar_model is None:
        return []
    points = []
    for num_steps in console.progress(options.num_steps, "numbers of steps"):
        texts = lm.sample(options.n, seed=0, num_steps=num_steps)
        points.append(
            {
                "num_steps": num_steps,
                "quality": METRICS[quality].value(texts, reference),
                "entropy": text_metrics.unigram_entropy(texts),
                "measure": quality,
            }
        )
    return points


@backend.prepared
def evaluate(lm: DiffusionLM, workdir: str) -> dict[str, Any]:
    """Measures samples and likelihood; prints a table and writes a JSON file.

    Returns what the file holds. Raises UserError.
    """
    if "source" not in lm.config["data"] or "evaluate" not in lm.config:
        raise UserError(
            f"{workdir}: its config does not name its data; use --mode sample"
        )
    config: Any = ml_collections.ConfigDict(lm.config)
    options = config.evaluate
    _check(options, lm)
    reference, held_out = references(lm, config)
    if len(held_out) < 2 * options.seeds:
        raise UserError(
            f"config.data: {2 * len(held_out)} held-out texts are too few for "
            f"config.evaluate.seeds={options.seeds}; give {4 * options.seeds} or more"
        )
    samples = _samples(lm, options)
    size = min(len(samples[0]), len(held_out) // len(samples))
    if options.texts:
        line = f"measured: {len(samples)} x {size} texts of {options.texts}"
        console.say(f"{line}, beside as many held-out ones")
    rows = compare([texts[:size] for texts in samples], held_out, reference)
    bounds = likelihood_rows(lm, held_out[: options.nll_texts], options.draws)
    bounds |= ode_rows(lm, held_out[: options.ode_texts], options.draws)
    if reference.ar_model is not None:
        ar_rows = likelihood_rows(reference.ar_model, held_out[: options.nll_texts], 1)
        bounds["autoregressive, nats/token"] = ar_rows["nats/token"]
    points = frontier(lm, reference, options)
    estimator = (
        "exact" if lm.cfg.causal else f"variational bound, {options.draws} draws"
    )
    _show(rows, bounds, estimator, points, samples[0][:8])
    record = {
        "step": lm.step,
        "samples": f"{len(samples)} x {size}",
        "measures": {name: row._asdict() for name, row in rows.items()},
        "estimator": estimator,
        "likelihood": {name: value._asdict() for name, value in bounds.items()},
        "frontier": points,
        "sample": lm.config["sample"],
        "evaluate": lm.config["evaluate"],
        "texts": samples[0],
    }
    if hosts.process_index_and_count()[0] == 0:
        _write(record, Path(workdir), rows["unigram entropy, nats"].held_out.mean)
    return record


def _show(
    rows: dict, bounds: dict, estimator: str, points: list, texts: list[str]
) -> None:
    console.say(f"{'':32s}{'samples':>18s}{'held-out text':>18s}")
    for name, row in rows.items():
        values = "".join(f"{m:10.3f} ±{e:6.3f}" for m, e in (row.samples, row.held_out))
        tail = "  worse than held-out text" if row.flag else ""
        console.say(f"{name:32s}" + (f"  {row.note}" if row.note else values + tail))
    console.say(f"-log p of held-out text ({estimator} per text; ± over the texts)")
    for name, value in bounds.items():
        console.say(f"{name:32s}{value.mean:10.3f} ±{value.stderr:6.3f}")
    for point in points:
        console.say(
            f"{point['num_steps']:5d} steps: {point['measure']} {point['quality']:.3f}"
            f", unigram entropy {point['entropy']:.3f}"
        )
    for text in texts:
        console.say(f"  | {console.one_line(text)}")


def _write(record: dict, workdir: Path, entropy: float) -> None:
    from_file = record["evaluate"]["texts"]
    path = workdir / ("evaluation_of_file.json" if from_file else "evaluation.json")
    nan_free = json.loads(json.dumps(record), parse_constant=lambda _: None)
    text = json.dumps(nan_free, indent=1, ensure_ascii=False)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    console.say(path)
    if record["frontier"]:
        console.say(plots.save_frontier(record["frontier"], entropy, workdir))
