# SPDX-License-Identifier: Apache-2.0
"""The control tasks: targets, how to steer, how to score; one table, one JSON a row.

Targets of the grammar are drawn from a seed that nothing was trained on; of E2E they
come from the published files, and from its validation split. Scores are those of
arXiv:2205.14217 section 6 (REFERENCE 1.9); beside each stands the fluency.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from dlm_jax import data, generate, grammar, labels, measures, parallel, steering
from dlm_jax.generate import Bundle
from dlm_jax.labels import Fields, Spans
from dlm_jax.steering import Plan, Wishes
from dlm_jax.types import UserError

TARGET_SEED = 2_000_003  # added to the seed of the data: never trained or validated on


class Sentence(NamedTuple):
    """A held-out text, and what it says; None where that is not known."""

    text: str
    fields: Fields | None = None
    tags: list[str] | None = None
    spans: Spans | None = None


class Judge(NamedTuple):
    """How texts are read: tags; constituents of a parse, and of parts that parse.

    nats(texts) gives -log p of each, not finite outside the language: exact for the
    grammar, else the teacher's.
    """

    tags: Callable[[str], list[str]]
    spans: Callable[[str], Spans]
    derived: Callable[[str], set]
    nats: Callable[[list[str]], np.ndarray]


class Task(NamedTuple):
    """target(sentence, rng): what is asked for, of a held-out sentence; wish(target,
    bundle): the row of wishes; score(text, target, judge): named shares, the first of
    which are its success; needs: classifiers."""

    target: Callable[[Sentence, Any], Any]
    wish: Callable[[Any, Bundle], Wishes]
    score: Callable[[str, Any, Judge], dict[str, float]]
    needs: tuple[str, ...] = ()
    successes: int = 1


# --- targets


def _one_field(sentence: Sentence, rng: Any) -> Fields:
    """A field whose value is words of the text."""
    assert sentence.fields is not None
    told = {f: v for f, v in sentence.fields.items() if contained(v, sentence.text)}
    field = sorted(told)[rng.integers(len(told))]
    return {field: told[field]}


def _one_span(sentence: Sentence, rng: Any) -> tuple[int, int, str]:
    """A constituent, but not the whole text."""
    assert sentence.spans is not None
    inner = [s for s in sentence.spans if s[:2] != (0, len(sentence.text.split()) - 1)]
    return inner[rng.integers(len(inner))]


def _middle(sentence: Sentence, rng: Any) -> str:
    """The text with its middle third left open, word by word."""
    words = sentence.text.split()
    third = max(1, len(words) // 3)
    return " ".join([*words[:third], *["___"] * third, *words[2 * third :]])


# --- wishes: (target, bundle) -> a row


def _asked(name: str) -> Callable[[Any, Bundle], Wishes]:
    def wish(target: Any, bundle: Bundle) -> Wishes:
        tok, guides = bundle.tokenizer, bundle.guides
        return steering.wish(tok, bundle.length, guides, **{name: target})

    return wish


def _span(target: tuple, bundle: Bundle) -> Wishes:
    chart = labels.one_span(target, bundle.guides["tree"].names)
    return Wishes(labels={"tree": chart[None]})


def _template(target: str, bundle: Bundle) -> Wishes:
    parts = steering.parse(bundle.tokenizer, target)
    return steering.of_template(parts, bundle.length, bundle.tokenizer.vocab_size, 1, 0)


# --- scores


def contained(value: str, text: str) -> bool:
    """Whether the words of the value stand in the text, one after the other."""
    return f" {value} " in f" {text} "


def _value(text: str, target: Fields, judge: Judge) -> dict[str, float]:
    return {"value": float(all(contained(v, text) for v in target.values()))}


def _tags(text: str, target: list[str], judge: Judge) -> dict[str, float]:
    """Tags that are right, position by position, cut or filled up to the target's."""
    found = judge.tags(text)[: len(target)]
    found += [""] * (len(target) - len(found))
    right = [a == b for a, b in zip(found, target, strict=True)]
    return {"tags": sum(right) / len(right), "all tags": float(all(right))}


def _tree(text: str, target: Spans, judge: Judge) -> dict[str, float]:
    """F1 of labelled constituents; a text without a parse has none."""
    found, wanted = set(judge.spans(text)), set(target)
    f1 = 2 * len(found & wanted) / (len(found) + len(wanted))
    return {"tree F1": f1, "whole tree": float(found == wanted)}


def _has_span(text: str, target: tuple, judge: Judge) -> dict[str, float]:
    """The constituent in its place, whatever the rest; and within a whole parse."""
    first, last, label = target
    found = judge.derived(text)
    there = all((first, last, name) in found for name in label.split("::"))
    within = tuple(target) in judge.spans(text)
    return {"span": float(there), "span in a parse": float(within)}


def _length(text: str, target: int, judge: Judge) -> dict[str, float]:
    off = abs(len(text.split()) - target)
    return {"exact length": float(off == 0), "length +-2": float(off <= 2)}


def _kept(text: str, target: str, judge: Judge) -> dict[str, float]:
    """The known words in their places, and an end where the template ends."""
    words, wanted = text.split(), target.split()
    same = [w in (steering.BLANK, x) for w, x in zip(wanted, words, strict=False)]
    return {"known kept": float(len(words) == len(wanted) and all(same))}


def _both(first: Task, second: Task) -> Task:
    """Two classifiers at once, their targets from one sentence."""

    def wish(target: Any, bundle: Bundle) -> Wishes:
        one, two = first.wish(target[0], bundle), second.wish(target[1], bundle)
        return Wishes(labels={**one.labels, **two.labels})

    def score(text: str, target: Any, judge: Judge) -> dict[str, float]:
        one = first.score(text, target[0], judge)
        return {**one, **second.score(text, target[1], judge)}

    return Task(
        lambda sentence, rng: (
            first.target(sentence, rng),
            second.target(sentence, rng),
        ),
        wish,
        score,
        first.needs + second.needs,
        successes=2,
    )


TASKS: dict[str, Task] = {
    "semantic": Task(_one_field, _asked("semantic"), _value, ("semantic",)),
    "pos": Task(lambda s, rng: s.tags, _asked("pos"), _tags, ("pos",)),
    "tree": Task(lambda s, rng: s.spans, _asked("tree"), _tree, ("tree",)),
    "span": Task(_one_span, _span, _has_span, ("tree",)),
    "length": Task(lambda s, rng: len(s.text.split()), _asked("length"), _length),
    "infilling": Task(_middle, _template, _kept),
}
TASKS["semantic+tree"] = _both(TASKS["semantic"], TASKS["tree"])
TASKS["semantic+pos"] = _both(TASKS["semantic"], TASKS["pos"])

# how strongly: tried on targets of other seeds than the tables' (docs/control.md)
PLANS = {
    "tuned": {
        **dict.fromkeys(TASKS, Plan()),
        "semantic": Plan(lr=0.3),
        "span": Plan(fluency=0.001),
    },
    "published": {  # REFERENCE 1.7: coefficient and step of the code, no push at t < .05
        "semantic": Plan(lr=0.1, fluency=0.01),
        "pos": Plan(lr=0.1, fluency=0.0001),
        "tree": Plan(lr=0.1, fluency=0.0005),
        "span": Plan(lr=0.1, fluency=0.1),
        "length": Plan(noised=False),
        "infilling": Plan(noised=False),
        "semantic+tree": Plan(lr=0.1, fluency=0.0005),
        "semantic+pos": Plan(lr=0.1, fluency=0.0001),
    },
}


# --- a corpus: its held-out sentences, and its judge


EDGES = ("START", "END", "\n")  # of the published targets


def sentences(config: Any, task: str, n: int) -> list[Sentence]:
    """Up to n held-out sentences, annotated as far as that can be done."""
    if config.data.source == "grammar":
        return list(map(annotate, grammar.trees(config.data.seed + TARGET_SEED, n)))
    if config.control.targets:
        return published(Path(config.control.targets), task)
    texts = data.load_texts(config.data, "valid")
    fields: list[Any] = [None] * len(texts)
    if config.data.source == "e2e":
        texts, fields = data.e2e_records(config.data, "valid")
    tags = _tagger(config)
    rows = np.random.default_rng(0).permutation(len(texts))[:n]
    return [Sentence(texts[i], fields[i], tags(texts[i])) for i in rows]


def annotate(tree: Any) -> Sentence:
    """A derivation of the grammar as a sentence with all its notes."""
    notes = (labels.NOTES[name](tree) for name in ("semantic", "pos", "tree"))
    return Sentence(" ".join(tree.leaves()), *notes)


PUBLISHED = {"semantic": "target_attribute.json", "pos": "target_pos.json"}


def published(folder: Path, task: str) -> list[Sentence]:
    """The published targets of semantic content, tags and length (REFERENCE 1.7)."""
    if task == "length":  # 10 to 40, START and END counted
        return [Sentence(" ".join(["word"] * n)) for n in range(8, 39)]
    if task not in PUBLISHED:
        raise UserError(f"config.control.targets: no published ones of {task}")
    path = folder / PUBLISHED[task]
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"config.control.targets: {path}: {error}") from error
    if task == "semantic":
        pairs = [" ".join(row).split(" : ") for row in rows]
        return [Sentence(value, {field: value}) for field, value in pairs]
    kept = [
        [(w, t) for w, t in zip(r["words_"], r["pos"], strict=True) if w not in EDGES]
        for r in rows
    ]
    return [Sentence(" ".join(w for w, _ in k), None, [t for _, t in k]) for k in kept]


def judge_of(config: Any, teacher: Bundle | None) -> Judge:
    """The grammar, or the tagger and the teacher."""
    if config.data.source == "grammar":
        return Judge(_word_tags, _parsed, grammar.derived, _exact_nats)
    nothing = (lambda text: [], lambda text: set())
    return Judge(_tagger(config), *nothing, _teacher_nats(teacher))


def _word_tags(text: str) -> list[str]:
    return [grammar.word_tags().get(word, "") for word in text.split()]


def _parsed(text: str) -> Spans:
    return grammar.spans_of(grammar.parse(text)) if grammar.accepts(text) else []


def _exact_nats(texts: list[str]) -> np.ndarray:
    return -np.array([grammar.log_prob(text) for text in texts])


def _tagger(config: Any) -> Callable[[str], list[str]]:
    if not config.classifier.conllu:
        return lambda text: []
    tagger = labels.train_tagger(config.classifier.conllu)
    return lambda text: labels.tags_of(tagger, text)


def _teacher_nats(teacher: Bundle | None) -> Callable[[list[str]], np.ndarray]:
    if teacher is None:
        return lambda texts: np.full(len(texts), math.nan)
    return lambda texts: np.asarray(teacher.nll(teacher.encode(texts)).total())


# --- the command


def measure(
    bundle: Bundle,
    task: Task | None,
    targets: list,
    judge: Judge,
    plan: Plan,
    **options: Any,
) -> dict[str, Any]:
    """Success, fluency and cost of one task; without a task, of texts left free.

    options: samples (a target), seeds, calls. Success is the mean over targets, its
    error over seeds; of one seed, over targets. Seconds are of the fastest seed.
    """
    samples, seeds, calls = (options[name] for name in ("samples", "seeds", "calls"))
    n, wishes = len(targets) * samples, steering.FREE
    if task is not None:
        rows = [task.wish(target, bundle) for target in targets]
        wishes = jax.tree.map(
            lambda *x: np.repeat(np.concatenate(x), samples, 0), *rows
        )
    scores, texts, seconds = [], [], []
    for seed in range(seeds):
        began = time.monotonic()
        drawn = bundle.draw(n, seed=seed, steps=calls, wishes=wishes, plan=plan).texts
        seconds.append(time.monotonic() - began)
        texts += drawn
        if task is not None:
            found = [
                task.score(x, targets[i // samples], judge) for i, x in enumerate(drawn)
            ]
            scores.append(found)
    return {
        "success": summaries(scores, samples),
        **fluency(texts, judge),
        "seconds per 50": min(seconds) / n * 50,
        "denoiser calls": calls,
        "classifier calls": calls * plan.updates * len(task.needs if task else ()),
        "texts": texts[:: max(1, samples)][:8],
    }


def summaries(scores: list[list[dict]], samples: int) -> dict[str, tuple]:
    """(mean, standard error) of every score of texts by seed; {} of none."""
    names = scores[0][0] if scores else ()
    return {
        n: _summary([[s[n] for s in rows] for rows in scores], samples) for n in names
    }


def _summary(scores: list[list[float]], samples: int) -> tuple[float, float]:
    """(mean, standard error) of scores by seed and text."""
    by_target = np.array(scores).reshape(len(scores), -1, samples).mean(-1)
    parts = by_target.mean(-1) if len(scores) > 1 else by_target[0]
    error = np.std(parts, ddof=1) / math.sqrt(len(parts)) if len(parts) > 1 else 0.0
    return float(by_target.mean()), float(error)


def fluency(texts: list[str], judge: Judge) -> dict[str, float]:
    """accepted: the share of texts in the language; nats/token of these; entropy."""
    nats = judge.nats(texts)
    good = np.isfinite(nats)
    tokens = np.array([len(text.split()) + 1 for text in texts])
    return {
        "accepted": float(good.mean()),
        "nats/token": float(nats[good].sum() / max(tokens[good].sum(), 1)),
        "unigram entropy": measures.unigram_entropy(texts),
    }


def run(bundle: Bundle, workdir: str) -> list[dict]:
    """Measures config.control's tasks; prints the table, writes a JSON file a row."""
    config: Any = ml_collections.ConfigDict(bundle.config)
    options = config.control
    names = ["unguided", *TASKS] if options.task == "all" else [options.task]
    bundle = _equipped(bundle, options, names)
    teacher = generate.load(options.teacher) if options.teacher else None
    judge, folder = judge_of(config, teacher), Path(workdir) / "control"
    bar = tqdm([(name, calls) for name in names for calls in options.calls])
    rows = []
    for name, calls in bar:
        bar.set_description(f"{name}, {calls} calls")
        size = {k: options[k] for k in ("preset", "samples", "seeds")}
        about = {"task": name, "calls": calls, "step": bundle.step, **size}
        found = sentences(config, name, options.n)
        about["targets"] = len(found)
        path = folder / ("_".join(map(str, about.values())) + ".json")
        if not path.exists():
            rng = np.random.default_rng(0)
            task = TASKS.get(name)
            targets = [task.target(s, rng) if task else s.text for s in found]
            plan = PLANS[options.preset].get(name, Plan())
            sizes = {"samples": options.samples, "seeds": options.seeds, "calls": calls}
            row = about | measure(bundle, task, targets, judge, plan, **sizes)
            row |= {"plan": plan._asdict(), "config": bundle.config}
            if parallel.hosts()[0] == 0:
                folder.mkdir(exist_ok=True)
                path.write_text(json.dumps(row, indent=1, ensure_ascii=False))
        rows.append(json.loads(path.read_text()))
    print(table(rows))
    return rows


def _equipped(bundle: Bundle, options: Any, names: list[str]) -> Bundle:
    """The bundle with the classifiers that the tasks need; UserError."""
    for name in names:
        if name not in ("unguided", *TASKS):
            raise UserError(
                f"config.control.task={name!r}: choose all, unguided or one of "
                f"{', '.join(TASKS)}"
            )
    if options.preset not in PLANS:
        raise UserError(
            f"config.control.preset={options.preset!r}: choose one of {', '.join(PLANS)}"
        )
    for name in ("n", "samples", "seeds"):
        if options[name] < 1:
            raise UserError(f"config.control.{name}={options[name]}: must be 1 or more")
    bundle = bundle.with_classifier(*options.classifiers.split())
    needed = {need for name in names if name in TASKS for need in TASKS[name].needs}
    for need in sorted(needed - set(bundle.guides)):
        raise UserError(
            f"config.control.classifiers: none of task {need}; train one, --mode "
            f"train_classifier --config configs/classifier.py:{need}"
        )
    return bundle


def table(rows: list[dict]) -> str:
    """Markdown: a line a row."""
    head = ("task", "calls", "success", "accepted", "nats/token", "s per 50")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        shares = [
            f"{name} {100 * mean:.1f} ± {100 * error:.1f}"
            for name, (mean, error) in row["success"].items()
        ]
        cells = [row["task"], str(row["calls"]), ", ".join(shares)]
        cells += [f"{100 * row['accepted']:.1f}", f"{row['nats/token']:.3f}"]
        lines.append("| " + " | ".join([*cells, f"{row['seconds per 50']:.1f}"]) + " |")
    return "\n".join(lines)
