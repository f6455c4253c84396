# SPDX-License-Identifier: Apache-2.0
"""Training of a guidance classifier on a model's frozen embeddings."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dlm_jax.data import annotations, reading
from dlm_jax.data.annotations import LabelVocab
from dlm_jax.data.corpus import Corpus
from dlm_jax.data.tokenizer import WordTokenizer
from dlm_jax.diffusion import classifier
from dlm_jax.errors import UserError
from dlm_jax.inference import loading
from dlm_jax.inference.pipeline import DiffusionLM
from dlm_jax.runtime import backend, checkpoint
from dlm_jax.training import loop
from dlm_jax.training.config import refuse_ignored, resolve_config
from dlm_jax.training.train_step import StepConfig, TrainingTask
from dlm_jax.training.trainer import Job

PLACES = ("path", "valid_path", "tfds_dir")  # of texts, which may move
UNREAD = (
    *("loss.objective", "loss.mask_pad", "loss.source_drop_prob", "train.sample_steps"),
    *("model.predicts", "model.time_input", "model.token_posterior_input"),
    *("model.known_length", "model.known_source"),
    *("embedding", "sample", "evaluate", "control", "distill"),
)


@backend.prepared
def train_classifier(
    config: Any,
    workdir: str,
    *,
    allow_fallback: bool = False,
    given: Mapping[str, Any] | None = None,
) -> None:
    """Trains a classifier; arguments and errors are those of `loop.train`.

    given: {name: value} of config's flags, of which none may be without effect.
    """
    loop.run(classifier_job(config, given), workdir, allow_fallback=allow_fallback)


def classifier_job(config: Any, given: Mapping[str, Any] | None = None) -> Job:
    """Returns the job of training a classifier for the run config.classifier.model.

    Text, noise schedule, vocabulary and embedding table are those of that run. It has
    no preview, because classifiers generate no text. given: as of `train_classifier`.
    """
    if not config.classifier.model:
        raise UserError("config.classifier.model: name the run that is to be steered")
    base = loading.load(config.classifier.model)
    config = with_base_settings(config, base)
    refuse_ignored(given or {}, config, UNREAD, "classifier.model")
    vocab, corpus = labelled_corpus(config, base)
    task = classifier_task(vocab, np.asarray(base.ema.table))
    step_cfg = resolve_config(config)._replace(schedule=base.schedule, task=task)
    return Job(config, step_cfg, "classifier", lambda tokenizer: corpus)


def classifier_task(vocab: LabelVocab, table: np.ndarray) -> TrainingTask:
    """Returns the task of predicting labels from noisy latents of a frozen table."""
    spec = vocab.head_spec

    def init(key: Any, step_cfg: StepConfig, vocab: int) -> classifier.Classifier:
        return classifier.init(key, step_cfg.cfg, spec)

    def terms(
        key: Any, params: Any, rows: Any, draws: Any, step_cfg: StepConfig
    ) -> classifier.ClassifierTerms:
        ids, labels = rows[:, : -spec.size], rows[:, -spec.size :]
        return classifier.loss(
            params,
            ids,
            labels,
            draws,
            cfg=step_cfg.cfg,
            spec=spec,
            schedule=step_cfg.schedule,
            table=jnp.asarray(table),
            key=key,
        )

    return TrainingTask(init, terms, spec.size)


def with_base_settings(config: Any, base: DiffusionLM) -> Any:
    """Returns the config with the model's data, schedule, length and embedding width.

    The text is the model's own unless config.data.path names another, which is read as
    config.data says, or as the model's if that has the default source, the grammar.
    Raises UserError.
    """
    if not config.classifier.task or config.model.causal or config.model.self_cond:
        raise UserError("--config: take --config classifier, or a config like it")
    if config.loss.time_sampler == "importance" or config.loss.conditioning_prob:
        raise UserError(
            "config.loss: a classifier takes neither time_sampler='importance' nor "
            "conditioning_prob"
        )
    if base.cfg.known_source:
        raise UserError(
            f"config.classifier.model={config.classifier.model}: a model of pairs, which "
            "takes no classifier; guide its targets by lm.translate(sources, contains=...)"
        )
    data = base.config["data"]
    if data["mode"] != "pad":
        raise UserError(
            f"config.classifier.model: its texts are packed (mode {data['mode']!r}); "
            "a label needs a row for each text, config.data.mode=pad"
        )
    own = {name: config.data[name] for name in PLACES if config.data[name]}
    if config.data.path:
        names = ("valid_path",)
        if config.data.source != "grammar":  # which has no path
            names += ("source", "valid_fraction", "column", "delimiter")
        own |= {name: config.data[name] for name in names}
    with config.unlocked():
        config.data.update(data, **own)
        config.schedule.update(base.config["schedule"], adaptive="")
    config.model.update(dim=base.cfg.dim, positions=base.length)
    return config


def labelled_corpus(config: Any, base: DiffusionLM) -> tuple[LabelVocab, Corpus]:
    """Returns the label vocabulary, and rows of ids and labels of both splits."""
    task, tok = config.classifier.task, base.tokenizer
    if task in ("pos", "tree") and not isinstance(tok, WordTokenizer):
        raise UserError(
            f"config.classifier.task={task}: its labels are of words, and the model's "
            "tokens are pieces of words; train it with config.data.tokenizer=word"
        )
    train, valid = (
        annotations.load_annotated(config, task, split) for split in ("train", "valid")
    )
    vocab = annotations.build_label_vocab(task, train[1], base.length)

    ids = {"train": base.encode(train[0]), "valid": base.encode(valid[0])}
    texts = {"train": (train[0], ids["train"]), "valid": (valid[0], ids["valid"])}
    read = reading.describe(config.data, tok, texts)
    train_rows, valid_rows = (
        np.concatenate([ids[split], annotations.encode(notes, vocab)], -1)
        for split, (_, notes) in (("train", train), ("valid", valid))
    )
    metadata = {
        "labels": vocab.to_dict(),
        "table": checkpoint.checksum(base.ema.table),
    }
    return vocab, Corpus(train_rows, valid_rows, tok, metadata, read)
