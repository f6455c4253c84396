# SPDX-License-Identifier: Apache-2.0
"""Evaluation: evaluators yield (name, value); one table on screen, one JSON file."""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from math import log
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from dlm_jax import data, grammar, parallel
from dlm_jax.generate import Bundle
from dlm_jax.types import UserError

SAMPLES = 256
Row = tuple[str, float]


def unigram_entropy(texts: Iterable[str]) -> float:
    """Entropy of the words' frequencies, nats: low where texts repeat themselves."""
    counts = Counter(itertools.chain.from_iterable(t.split() for t in texts))
    total = sum(counts.values())
    return -sum(n / total * log(n / total) for n in counts.values())


def diversity(texts: list[str], train: list[str]) -> Iterator[Row]:
    """Shares of texts that are distinct and that stand in the training data; entropy."""
    seen = set(train)
    yield "distinct", len(set(texts)) / len(texts)
    yield "verbatim_in_train", float(np.mean([t in seen for t in texts]))
    yield "unigram_entropy", unigram_entropy(texts)
    yield "unigram_entropy_of_train", unigram_entropy(train)


def language(texts: list[str]) -> Iterator[Row]:
    """Share of texts that the grammar accepts, with its binomial standard error."""
    accepted = [t for t in texts if grammar.accepts(t)]
    share = len(accepted) / len(texts)
    yield "accepted", share
    yield "accepted_standard_error", (share * (1 - share) / len(texts)) ** 0.5
    yield "distinct_of_accepted", len(set(accepted)) / max(1, len(accepted))


def run(bundle: Bundle, workdir: str) -> dict[str, float]:
    """Draws SAMPLES texts, prints the table and writes evaluation.json."""
    if "source" not in bundle.config["data"]:
        raise UserError(f"{workdir}: does not name its data; use --mode sample")
    config: Any = ml_collections.ConfigDict(bundle.config)
    train = data.load_texts(config.data, "train")
    texts = bundle.sample(SAMPLES)
    rows = dict(diversity(texts, train))
    if config.data.source == "grammar":
        rows |= dict(language(texts))
    for name, value in rows.items():
        print(f"{name:28s} {value:.4f}")
    print("\n".join(f"  | {text}" for text in texts[:8]))
    if parallel.hosts()[0] == 0:
        record = {"step": bundle.step, "samples": SAMPLES, **rows}
        record |= {"sample": bundle.config["sample"], "texts": texts}
        path = Path(workdir) / "evaluation.json"
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False))
        print(path)
    return rows
