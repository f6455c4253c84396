# SPDX-License-Identifier: Apache-2.0
"""What clients are shown of the model, its frames and its scores, as JSON."""

from typing import Any

import numpy as np

from dlm_jax.data import pairs
from dlm_jax.data.tokenizer import WordTokenizer
from dlm_jax.diffusion import model
from dlm_jax.diffusion.samplers import SOLVERS
from dlm_jax.inference import translation
from dlm_jax.inference.pipeline import DiffusionLM
from dlm_jax.inference.streaming import Frame
from dlm_jax.serving import schema
from dlm_jax.types import END, PAD, START

EXAMPLES = {"e2e": "name : The Eagle | Type : pub | food : English | area : riverside"}


class Presenter:
    """The JSON of one model's results."""

    def __init__(self, lm: DiffusionLM):
        self.lm, self.strings = lm, lm.tokenizer.tokens()

    def model(self, name: str) -> dict:
        """Describes the model: its size, its settings and what it can be asked for."""
        lm, own = self.lm, self.lm.config["sample"]
        names = ("num_steps", "solver", "clamp", "temperature", "eta", "cfg_weight")
        return {
            "name": name,
            "parameters": model.count(lm.ema),
            "vocabulary": lm.tokenizer.vocab_size,
            "length": lm.length,
            "words": isinstance(lm.tokenizer, WordTokenizer),
            "pairs": lm.cfg.known_source,
            "example": EXAMPLES.get(lm.config["data"]["source"], "field : value"),
            "distilled_steps": lm.distilled_steps,
            "classifiers": sorted(lm.classifiers),
            "solvers": list(SOLVERS),
            "defaults": {name: own[name] for name in names},
            "limits": {"texts": schema.MAX_TEXTS, "steps": schema.MAX_STEPS},
        }

    def frame(self, frame: Frame, hidden: list[dict] | None) -> dict:
        """Returns the tokens of each text and their confidence in percent."""
        texts = []
        for i, (row, confidence) in enumerate(
            zip(frame.ids, frame.confidence, strict=True)
        ):
            tokens, places = self._shown(row, None if hidden is None else hidden[i])
            sure = np.round(100 * confidence[places]).astype(int).tolist()
            texts.append({"tokens": tokens, "confidence": sure})
        return {"step": frame.step, "num_steps": frame.num_steps, "texts": texts}

    def scores(
        self, ids: np.ndarray, scores: tuple[np.ndarray, ...], sources: Any
    ) -> list[dict]:
        """Returns the nats of each text of ids [n l] and of its tokens; END is one."""
        texts, hidden = [], [None] * len(ids)
        if sources is not None:
            hidden = translation.hidden_values(self.lm, sources)
        for row, new, total, length, stderr, nats in zip(
            ids, hidden, *scores, strict=True
        ):
            tokens, places = self._shown(row, new, end=True)
            numbers = {"total": total, "length": length, "stderr": stderr}
            texts.append(
                {
                    "tokens": tokens,
                    "nats": [round(float(x), 3) for x in nats[places]],
                    **{name: round(float(x), 3) for name, x in numbers.items()},
                }
            )
        return texts

    def _shown(
        self, row: np.ndarray, hidden: dict | None, *, end: bool = False
    ) -> tuple[list[str], np.ndarray]:
        """Returns the tokens of a row before its END, of a pair's target, and their places."""
        first = 1
        if self.lm.cfg.known_source:
            first = len(row) - len(pairs.source_and_target(row)[1])
        ends = first + np.flatnonzero(row[first:] == END)
        last = ends[0] + end if len(ends) else len(row)
        places = np.arange(first, last)
        places = places[~np.isin(row[places], (START, PAD))]
        values = {word: value for value, word in (hidden or {}).items()}
        strings = (self.strings[i] for i in row[places])
        return [values.get(string, string) for string in strings], places
