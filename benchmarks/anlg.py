# SPDX-License-Identifier: Apache-2.0
"""Sentence infilling on stories: the middle of three (arXiv:2205.14217, section 6.3).

    python benchmarks/anlg.py --data tinystories.lower.4MB.txt \\
        --out benchmarks/results/anlg.json

Trains a model on windows of three sentences, nine of ten with some words given. It
generates the middle sentence of held-out stories from its neighbours, as candidates of
several lengths. Minimum Bayes risk chooses one. BLEU-4 (sacrebleu) and ROUGE-L
(rouge-score) compare it with the true sentence. The baselines are the same weights with
the known words only overwritten in the sample (`guidance.infill`), a copy of either
neighbour, and a sentence of another story.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from nltk.tokenize import wordpunct_tokenize
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

import dlm_jax
from dlm_jax.configs import stories as stories_config
from dlm_jax.evaluation import text_metrics
from dlm_jax.inference import constraints, loading, mbr
from dlm_jax.inference.pipeline import DiffusionLM
from dlm_jax.training import loop
from dlm_jax.types import UNK

LENGTH = 64
Window = tuple[str, str, str]


def windows(path: str) -> tuple[list[Window], list[Window]]:
    """Returns (train, held-out) windows of three sentences that fit in LENGTH.

    The last twentieth of the stories is held out, and its windows do not overlap. A
    story ends at a single newline.
    """
    stories = re.split(r"(?<!\n)\n(?!\n)", Path(path).read_text("utf-8").lower())
    parts = [[" ".join(wordpunct_tokenize(s)) for s in _sentences(x)] for x in stories]
    last = len(parts) * 19 // 20

    def rows(stories: list[list[str]], stride: int) -> list[Window]:
        threes = (
            (s[i], s[i + 1], s[i + 2])
            for s in stories
            for i in range(0, len(s) - 2, stride)
        )
        return [w for w in threes if len(" ".join(w).split()) <= LENGTH - 2]

    return rows(parts[:last], 1), rows(parts[last:], 3)


def _sentences(story: str) -> list[str]:
    return [s for s in re.split(r'(?<=[.!?])"?\s+', story) if s.strip()]


def trained(
    workdir: str, steps: int, train_rows: list[Window], valid_rows: list[Window]
) -> DiffusionLM:
    """Trains the model, or resumes its run, and loads it."""
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train_rows), ("valid", valid_rows)):
        (folder / f"{name}.txt").write_text("\n".join(map(" ".join, rows)), "utf-8")
    config = stories_config.get_config()
    config.data.update(
        path=str(folder / "train.txt"),
        valid_path=str(folder / "valid.txt"),
        tokenizer="word",
        min_count=3,
        mode="pad",
        length=LENGTH,
    )
    config.loss.conditioning_prob, config.train.total_steps = 0.9, steps
    config.train.sample_steps, config.sample.batch = 0, 32
    loop.train(config, str(folder / "run"))
    return dlm_jax.load(folder / "run")


def candidates(
    lm: DiffusionLM, rows: list[Window], lengths: list[int], n: int, **options: Any
) -> list[list[str]]:
    """Generates n middles per window, with lengths drawn from those in training."""
    rng, constraint_rows, sizes = np.random.default_rng(0), [], []
    vocab = lm.tokenizer.vocab_size
    for i, (first, _, last) in enumerate(rows):
        template = constraints.parse_template(lm.tokenizer, f"{first} [...] {last}")
        room = lm.length - 1 - template.size
        for j in range(n):
            width = min(int(rng.choice(lengths)), room)
            words, seed = template.size - 1 + width, i * n + j
            constraint_rows.append(
                constraints.template_constraints(
                    template, lm.length, vocab, 1, seed, words=words
                )
            )
            sizes.append((len(first.split()), width))
    rows_together = jax.tree.map(lambda *x: np.concatenate(x), *constraint_rows)
    total = len(constraint_rows)
    texts = lm.generate(total, constraints=rows_together, **options).texts
    middles = [
        " ".join(text.split()[start : start + width])
        for text, (start, width) in zip(texts, sizes, strict=True)
    ]
    return [middles[i : i + n] for i in range(0, len(middles), n)]


def scores(texts: list[str], true: list[str]) -> dict[str, float]:
    """Computes corpus BLEU-4 and mean ROUGE-L (F), both times 100, and diversity.

    Diversity: unigram entropy (nats) and the share of distinct texts.
    """
    bleu = BLEU(tokenize="none").corpus_score(texts, [true]).score
    scorer = RougeScorer(["rougeL"])
    rouge = [
        scorer.score(a, b)["rougeL"].fmeasure for a, b in zip(true, texts, strict=True)
    ]
    return {
        "BLEU-4": bleu,
        "ROUGE-L": 100 * float(np.mean(rouge)),
        "unigram entropy": text_metrics.unigram_entropy(texts),
        "distinct": len(set(texts)) / len(texts),
    }


def main() -> None:
    """Trains the model, measures all methods, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="text file, a story per line")
    parser.add_argument("--workdir", default="runs/anlg")
    parser.add_argument("--train-steps", type=int, default=3000)
    parser.add_argument("--n", type=int, default=300, help="number of windows")
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--num_steps", type=int, default=32)
    parser.add_argument("--out", default="benchmarks/results/anlg.json")
    args = parser.parse_args()
    train_rows, valid_rows = windows(args.data)
    lm = trained(args.workdir, args.train_steps, train_rows, valid_rows)
    tok = lm.tokenizer
    rows = [w for w in valid_rows if UNK not in tok.encode(" ".join((w[0], w[2])))]
    rows = rows[: args.n]
    lengths = [len(middle.split()) for _, middle, _ in train_rows]
    true = [middle for _, middle, _ in rows]
    others = np.random.default_rng(1).permutation(len(train_rows))[: len(rows)]
    outputs = {
        "copy of the first": [first for first, _, _ in rows],
        "copy of the last": [last for _, _, last in rows],
        "a sentence of another story": [train_rows[i][1] for i in others],
    }
    unaware = lm.config | {"loss": lm.config["loss"] | {"conditioning_prob": 0.0}}
    for name, config in (("conditioned", lm.config), ("overwritten only", unaware)):
        model = loading.from_parts(
            lm.cfg, lm.params, tok, config, ema=lm.ema, schedule_state=lm.schedule_state
        )
        choices = candidates(
            model, rows, lengths, args.candidates, num_steps=args.num_steps
        )
        chosen = [mbr.select(texts) for texts in choices]
        outputs[f"{name}, one sample"] = [texts[0] for texts in choices]
        outputs[f"{name}, by minimum Bayes risk"] = chosen
    record = {
        "windows": len(rows),
        "candidates": args.candidates,
        "num_steps": args.num_steps,
        "step": lm.step,
        "held-out": text_metrics.unigram_entropy(true),
        "scores": {name: scores(texts, true) for name, texts in outputs.items()},
        "texts": [
            {"window": window, **{name: texts[i] for name, texts in outputs.items()}}
            for i, window in enumerate(rows[:5])
        ],
    }
    Path(args.out).write_text(
        json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    for name, row in record["scores"].items():
        print(f"{name:40s}", *(f"{k} {v:.2f}" for k, v in row.items()))


if __name__ == "__main__":
    main()
