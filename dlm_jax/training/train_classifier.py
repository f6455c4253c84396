# SPDX-License-Identifier: Apache-2.0
"""Training of a classifier on a model's frozen embeddings, by the loop of `trainer`."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from dlm_jax.data import annotations, corpus
from dlm_jax.data.annotations import LabelVocab
from dlm_jax.data.tokenizer import Tokenizer, WordTokenizer
from dlm_jax.diffusion import classifier
from dlm_jax.errors import UserError
from dlm_jax.inference import loading, pipeline
from dlm_jax.runtime import checkpoint
from dlm_jax.training import train_step, trainer, validate
from dlm_jax.training.train_step import TrainingTask


def work(names: LabelVocab, table: np.ndarray) -> TrainingTask:
    """Labels to learn, at the noise of the recipe's schedule, on the frozen table."""
    layout, size = names.layout, names.layout.size

    def init(key: Any, step_cfg: train_step.StepConfig, vocab: int) -> classifier.Classifier:
        return classifier.init(key, step_cfg.cfg, layout)

    def terms(key, params, rows, draws, step_cfg: train_step.StepConfig) -> classifier.ClassifierTerms:
        ids, asked = rows[:, :-size], rows[:, -size:]
        known = {"cfg": step_cfg.cfg, "layout": layout, "schedule": step_cfg.schedule}
        frozen = jnp.asarray(table)
        return classifier.loss(
            params, ids, asked, draws, **known, table=frozen, key=key
        )

    return TrainingTask(init, terms, size)


class ClassifierTrainer(trainer.Trainer):
    """A classifier's run: text, noise, words and table are those of the model."""

    def __init__(self, config: Any, workdir: str):
        if not config.classifier.model:
            raise UserError(
                "config.classifier.model: name the run that is to be steered"
            )
        self.base = loading.load(config.classifier.model)
        config = with_base_settings(config, self.base)
        self.task, self.labelled = labelled_corpus(config, self.base)
        super().__init__(config, workdir)

    def _recipe(self) -> train_step.StepConfig:
        table = np.asarray(self.base.ema.table)
        step_cfg = validate.resolve_config(self.config)
        return step_cfg._replace(schedule=self.base.schedule, work=work(self.task, table))

    def _corpus(self, tokenizer: Tokenizer | None) -> corpus.Corpus:
        return self.labelled

    def _bundle(self) -> None:
        """No text comes of a classifier."""

    def show(self, progress: Any, step: int) -> None:
        """The validation says it all."""


def with_base_settings(config: Any, base: pipeline.DiffusionLM) -> Any:
    """The config with the model's data, noise, length and width of embedding.

    The text is the model's own, unless config.data.path names another; UserError.
    """
    if not config.classifier.task or config.model.causal or config.model.self_cond:
        raise UserError("--config: take configs/classifier.py, or one like it")
    if config.loss.times == "importance" or config.loss.known:
        raise UserError(
            "config.loss.times='importance', config.loss.known: a classifier takes neither"
        )
    theirs = base.config["data"]
    if theirs["mode"] != "pad":
        raise UserError(
            f"config.classifier.model: its texts are packed (mode {theirs['mode']!r}); "
            "a label needs a row for each text, config.data.mode=pad"
        )
    own = {}
    if config.data.path:
        names = ("source", "path", "valid_path", "valid_fraction", "column")
        own = {name: config.data[name] for name in names}
    with config.unlocked():
        config.data.update(theirs, **own)
        config.schedule.update(base.config["schedule"], adaptive="")
    config.model.update(dim=base.cfg.dim, positions=base.length)
    return config


def labelled_corpus(config: Any, base: pipeline.DiffusionLM) -> tuple[LabelVocab, corpus.Corpus]:
    """The labels' names, and rows of ids and labels of both splits."""
    task, tok = config.classifier.task, base.tokenizer
    if task in ("pos", "tree") and not isinstance(tok, WordTokenizer):
        raise UserError(
            f"config.classifier.task={task}: its labels are of words, and the model's "
            "tokens are sentencepiece pieces; train it with config.data.tokenizer=word"
        )
    train_part, valid_part = (
        annotations.load_annotated(config, task, split) for split in ("train", "valid")
    )
    names = annotations.build_label_vocab(task, train_part[1], base.length)

    def rows(texts: list[str], notes: list) -> np.ndarray:
        return np.concatenate(
            [base.encode(texts), annotations.encode(notes, names)], -1
        )

    about = {"names": names.to_dict(), "table": checkpoint.checksum(base.ema.table)}
    return names, corpus.Corpus(rows(*train_part), rows(*valid_part), tok, about)


def train_classifier(config: Any, workdir: str, *, allow_fallback: bool = False) -> None:
    """Trains a classifier, resuming what lies in workdir."""
    trainer.train(config, workdir, ClassifierTrainer, allow_fallback=allow_fallback)
