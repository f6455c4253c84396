# SPDX-License-Identifier: Apache-2.0
"""Every knob and the only defaults: the published E2E recipe (REFERENCE section 2).

A config of its own starts from this one and changes what it must; it is a run record,
whose docstring holds the command, the hardware, the time and the numbers to expect.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from dlm_jax.configs import guidance
from dlm_jax.inference import sampling_config
from dlm_jax.nn.transformer import DenoiserConfig


def get_config() -> Any:
    """All defaults as a locked ConfigDict: a key that is not here is an error."""
    cfg = ConfigDict()
    cfg.seed = 102
    cfg.data = _data()
    cfg.model = ConfigDict(dataclasses.asdict(DenoiserConfig()))
    cfg.embedding = ConfigDict(
        {
            "path": "",  # an .npy table [v d] to start from; "": Gaussian
            "frozen": False,
            "normalize": False,  # rows on the sphere of radius sqrt(d)
        }
    )
    cfg.schedule = ConfigDict(
        {
            "name": "sqrt",
            "num_steps": 2000,  # T; 0 keeps the continuous curve
            "mean": 0.0,  # logistic, gumbel: of log(1/SNR) in nats; scale 0: their own
            "scale": 0.0,
            "noise_factor": 1.0,  # F: as if the noise had F times its size
            "adaptive": "",  # warp | gumbel: follows the loss, from logistic or gumbel
        }
    )
    cfg.loss = ConfigDict(
        {
            "objective": "x0",  # x0 | mu | eps | vlb | vlb_legacy | nelbo | ce | ar
            "time_sampler": "uniform",  # uniform | antithetic | low_discrepancy | importance
            "mask_pad": False,
            "truncate_prob": 0.0,  # the share of texts cut at a random length, then PAD
            "conditioning_prob": 0.0,  # the share given some of their tokens: infilling is learned
            "self_cond_prob": 0.0,  # the share of batches that feed their estimate back
        }
    )
    cfg.optim = _optim()
    cfg.train = ConfigDict(
        {
            "total_steps": 200_000,
            "batch": 64,  # sequences a step, over all devices and hosts
            "ckpt_steps": 10_000,
            "keep": 2,
            "log_steps": 50,
            "valid_steps": 2000,
            "valid_batches": 20,
            "sample_steps": 10_000,
            "on_nonfinite": "stop",  # stop | skip the update | rollback, past its data
        }
    )
    cfg.parallel = ConfigDict(
        {"mode": "pmap"}  # pmap: each device holds all | fsdp: the state is split
    )
    cfg.sample = ConfigDict(sampling_config.default_section())
    cfg.classifier = ConfigDict(
        {
            "model": "",  # the workdir of the run to be steered
            "task": "semantic",  # semantic | pos | tree | label
            "texts": 0,  # how many are annotated; 0: all
            "conllu": "",  # pos, of files: a treebank of Universal Dependencies
            "parser": "benepar_en3",  # tree, of files
            "column": "label",  # label: of csv and jsonl
        }
    )
    cfg.evaluate = ConfigDict(
        {
            "n": 256,  # samples a seed
            "seeds": 3,
            "texts": "",  # a file of texts to measure instead of samples
            "ar_model": "",  # the workdir of a run of objective "ar"
            "nll_texts": 512,  # held-out texts for the bound
            "draws": 16,  # times a text for the bound
            "num_steps": (8, 16, 32, 64),  # denoiser calls of the frontier
        }
    )
    cfg.control = ConfigDict(
        {
            "task": "all",  # all | unguided | one of tasks.TASKS
            "n": 100,  # targets
            "samples": 20,  # a target
            "seeds": 3,
            "num_steps": (32, 16),  # of the denoiser
            "preset": "tuned",  # one of presets
            "presets": guidance.PRESETS,  # settings of GuidanceConfig for each task
            "classifiers": "",  # workdirs of --mode train_classifier, by spaces
            "ar_model": "",  # fluency on files: the workdir of a run of objective "ar"
            "targets": "",  # E2E: the folder of the published ones
        }
    )
    return cfg.lock()


def _data() -> ConfigDict:
    return ConfigDict(
        {
            "source": "grammar",  # grammar text e2e csv jsonl tfds prepared
            "path": "",  # a file, E2E's folder, or the TFDS name
            "valid_path": "",  # "": the last valid_fraction of the file
            "valid_fraction": 0.05,
            "column": "text",  # of csv, jsonl and tfds
            "size": 200_000,  # grammar: training texts
            "valid_size": 2000,
            "seed": 0,  # grammar: a split is a seed
            "tfds_train": "train",
            "tfds_valid": "validation",
            "tfds_dir": "",
            "length": 64,  # positions of a sequence
            "mode": "pad",  # pad | block
            "too_long": "error",  # error | truncate (as published) | drop
            "tokenizer": "word",  # word | sentencepiece
            "min_count": 10,  # word: types seen more often than this
            "vocab_size": 8000,  # sentencepiece
        }
    )


def _optim() -> ConfigDict:
    return ConfigDict(
        {
            "name": "adamw",  # adamw | muon
            "lr": 1e-4,
            "decay": "linear",  # linear | cosine | constant
            "warmup": 0,
            "weight_decay": 0.0,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "clip": 0.0,  # global norm; 0: off
            "ema": 0.9999,
            "accumulate": 1,  # microbatches a step
        }
    )
