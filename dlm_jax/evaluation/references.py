# SPDX-License-Identifier: Apache-2.0
"""Measures of one output per record against one or several references per record.

BLEU and chrF are sacrebleu's, ROUGE-L is rouge-score's. All lie in 0 to 100. No measure
alone ranks models: outputs that repeat one sentence score above 0 in each of them. In
scripts without spaces each character counts as a word.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import regex
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from dlm_jax.data.words import words
from dlm_jax.errors import UserError

References = Sequence[Sequence[str]]


def check(outputs: Sequence[str], references: References) -> None:
    """Raises UserError unless there is one output per record, and a reference for it."""
    if len(outputs) != len(references):
        raise UserError(
            f"{len(outputs)} outputs for {len(references)} records: give one output "
            "per record, in the order of the records"
        )
    empty = [i for i, texts in enumerate(references) if not texts]
    if empty or not references:
        where = f"record {empty[0] + 1} has" if empty else "there are"
        raise UserError(f"{where} no references: give at least one text per record")


def _spaced(text: str) -> str:
    return " ".join(words(text))


def _streams(references: References) -> list[Any]:
    """Returns sacrebleu's layout: reference k of every record, or None past its last."""
    most = max(map(len, references))
    return [[x[k] if k < len(x) else None for x in references] for k in range(most)]


def bleu(outputs: Sequence[str], references: References) -> float:
    """Computes corpus BLEU-4 as the E2E NLG Challenge: tokenized by 13a, lower-cased.

    Give ordinary text: 13a splits full stops and commas, but no hyphens, £ or
    apostrophes. Raises UserError as `check`.
    """
    check(outputs, references)
    metric = BLEU(tokenize="13a", lowercase=True)
    references = [list(map(_spaced, texts)) for texts in references]
    return metric.corpus_score(list(map(_spaced, outputs)), _streams(references)).score


def chrf(outputs: Sequence[str], references: References) -> float:
    """Computes corpus chrF2, sacrebleu's defaults. Raises UserError as `check`."""
    check(outputs, references)
    return CHRF().corpus_score(outputs, _streams(references)).score


def rouge_l(outputs: Sequence[str], references: References) -> float:
    """Computes mean ROUGE-L (F1): of each output, that of its best reference.

    The challenge's own script weights recall more, so its figures are higher. Raises
    UserError as `check`, and if rouge-score is not installed.
    """
    check(outputs, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError as error:
        raise UserError(
            "ROUGE-L needs rouge-score: pip install 'dlm_jax[evaluate]'"
        ) from error

    class Words(DefaultTokenizer):  # which knows the letters a to z only
        def tokenize(self, text: str) -> list[str]:
            if regex.search(r"(?!\p{Script=Latin})\p{L}", text):
                return words(text.lower())
            return super().tokenize(text)

    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    pairs = zip(references, outputs, strict=True)
    best = [scorer.score_multi(x, output)["rougeL"].fmeasure for x, output in pairs]
    return 100 * float(np.mean(best))


def distinct(outputs: Sequence[str]) -> float:
    """Computes the share of distinct outputs, in 0 to 1; nan of no outputs."""
    return len(set(outputs)) / len(outputs) if outputs else float("nan")


def measures(outputs: Sequence[str], references: References) -> dict[str, float]:
    """Computes BLEU, chrF and ROUGE-L, distinct outputs (all of 100) and mean words.

    Raises UserError as `check`.
    """
    return {
        "BLEU": bleu(outputs, references),
        "chrF": chrf(outputs, references),
        "ROUGE-L": rouge_l(outputs, references),
        "distinct": 100 * distinct(outputs),
        "words": float(np.mean([len(words(text)) for text in outputs])),
    }
