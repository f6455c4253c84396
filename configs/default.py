# SPDX-License-Identifier: Apache-2.0
"""Every option and its default: the published recipe, on the built-in grammar.

docs/method.md, section 12, lists its values and the published flags. The options are
described here, except these sections: `model` in `nn.transformer.DenoiserConfig`,
`sample` in `inference.sampling_config` (`SamplingConfig`, `default_section`) and in
`diffusion.samplers`, `control.presets` in `inference.guidance_config.GuidanceConfig`.

Other configs start from this one and change values. The docstring of each holds its
command and, where measured, the hardware, the time and the results.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from dlm_jax.configs import guidance
from dlm_jax.inference import sampling_config
from dlm_jax.nn.transformer import DenoiserConfig


def get_config() -> Any:
    """Returns the defaults as a locked ConfigDict: setting an unknown key fails."""
    cfg = ConfigDict()
    cfg.seed = 102
    cfg.data = _data()
    cfg.model = ConfigDict(dataclasses.asdict(DenoiserConfig()))
    cfg.embedding = ConfigDict(
        {
            "path": "",  # an .npy file of the initial table [v d]; "": Gaussian
            "frozen": False,  # keep the table fixed
            "normalize": False,  # keep each row at norm sqrt(d)
        }
    )
    cfg.schedule = ConfigDict(
        {
            "name": "sqrt",  # a key of schedule.SCHEDULES
            "num_steps": 2000,  # T noise levels; 0: continuous time
            "mean": 0.0,  # logistic, gumbel: location of log(1/SNR)
            "scale": 0.0,  # likewise; 0: mean, too, is the schedule's own
            "noise_factor": 1.0,  # F: noise F times larger relative to the signal
            "adaptive": "",  # "" | warp | gumbel (docs/method.md, section 9)
        }
    )
    cfg.loss = ConfigDict(
        {
            "objective": "x0",  # x0 | mu | eps | vlb | vlb_legacy | nelbo | ce | ar
            # uniform | antithetic | low_discrepancy | importance
            "time_sampler": "uniform",
            "mask_pad": False,  # leave PAD positions out of the loss
            "truncate_prob": 0.0,  # share of rows cut at a random length, then padded
            "source_drop_prob": 0.0,  # pairs: share of rows without source, for cfg_weight
            "conditioning_prob": 0.0,  # share of rows given some tokens, for infilling
            "self_cond_prob": 0.0,  # share of batches with self-conditioning
        }
    )
    cfg.optim = _optim()
    cfg.train = ConfigDict(
        {
            "total_steps": 200_000,
            "batch": 64,  # sequences per step, over all devices and hosts
            "ckpt_steps": 10_000,  # steps between checkpoints; 0: only at the end
            "keep": 2,  # number of newest checkpoints that are kept
            "log_steps": 50,
            "valid_steps": 2000,
            "valid_batches": 20,  # at most, per validation
            "sample_steps": 10_000,  # steps between previews of samples
            "profile_steps": 0,  # steps traced to workdir/profile, after the first 10
            "writers": "",  # tensorboard, wandb: metrics also go there; by extras
            "on_nonfinite": "stop",  # stop | skip the update | rollback to a checkpoint
        }
    )
    cfg.parallel = ConfigDict(
        {"mode": "pmap"}  # pmap: state on every device | fsdp: state split
    )
    cfg.sample = ConfigDict(sampling_config.default_section())
    cfg.classifier = ConfigDict(
        {
            "model": "",  # the workdir of the diffusion run to control
            "task": "semantic",  # semantic | pos | tree | label
            "texts": 0,  # number of annotated training texts; 0: all
            "conllu": "",  # pos on files: a CoNLL-U file to train the tagger on
            "parser": "benepar_en3",  # tree on files: a benepar model
            "column": "label",  # label: the column of csv or jsonl that holds it
        }
    )
    cfg.distill = ConfigDict(
        {
            "teacher": "",  # the model to distil: a run, a folder, a bundled name
            "num_steps": (32, 16, 8, 4, 2, 1),  # of each student in turn
            "teacher_steps": 64,  # of the chain that the students replace
            "temperature": 1.0,  # of the chain, and below 1 of the students' DDIM
            "student": 0,  # number of steps of this student; --mode distill sets it
        }
    )
    cfg.evaluate = ConfigDict(
        {
            "n": 256,  # samples per seed; pairs: the number of sources, at most
            "seeds": 3,
            "texts": "",  # a file of texts to measure instead of samples
            "ar_model": "",  # workdir of an autoregressive run, for fluency
            "gpt2": "",  # folder of a GPT-2, for generation perplexity (docs/measures.md)
            "references": "",  # pairs of E2E: testset_w_refs.csv; "": held-out pairs
            "mbr": 10,  # pairs: candidates of minimum Bayes risk; 1: not measured
            "nll_texts": 512,  # held-out texts for the likelihood bound
            "draws": 16,  # noise levels per text for the bound
            "ode_texts": 0,  # held-out texts for the likelihood by the ODE; 0: none
            "num_steps": (8, 16, 32, 64),  # sampling steps of the quality plot
        }
    )
    cfg.export = ConfigDict(
        {
            "folder": "",  # a new one; "": pretrained, in the workdir
            "dtype": "bfloat16",  # bfloat16 | float32, of the weights
            "classifiers": "",  # workdirs of classifiers that travel along, by spaces
            "n": 64,  # samples that are measured; pairs: sources, of config.sample.sources
        }
    )
    cfg.control = ConfigDict(
        {
            "task": "all",  # all | unguided | a key of control_tasks.CONTROL_TASKS
            "n": 100,  # targets per task
            "samples": 20,  # per target and seed
            "seeds": 3,
            "num_steps": (32, 16),  # sampling steps; each value is measured
            "preset": "tuned",  # a key of presets
            "presets": guidance.PRESETS,  # GuidanceConfig fields by task
            "classifiers": "",  # workdirs of classifiers, separated by spaces
            "ar_model": "",  # workdir of an autoregressive run, for fluency on files
            "targets": "",  # E2E: the folder of the published targets
        }
    )
    return cfg.lock()


def _data() -> ConfigDict:
    return ConfigDict(
        {
            # grammar | text | e2e | csv | jsonl | parquet | stream | tfds | prepared
            "source": "grammar",
            # a file, several with commas, a pattern; E2E's or prepared folder; TFDS name
            "path": "",
            "valid_path": "",  # "": src1_valid.txt of E2E, or the end of path
            "valid_fraction": 0.05,
            "column": "text",  # csv, jsonl, parquet and tfds: the column of texts
            # pairs: csv, jsonl, parquet and tfds: the column of sources; e2e, grammar: "fields"
            "source_column": "",
            "delexicalize": (),  # pairs: fields whose values become placeholders
            "delimiter": "",  # csv: between columns; "": told from the first line
            "size": 200_000,  # grammar: number of training texts
            "valid_size": 2000,  # grammar: number of validation texts
            "seed": 0,  # grammar: each seed draws other texts
            "tfds_train": "train",  # tfds: split names
            "tfds_valid": "validation",
            "tfds_dir": "",  # tfds: data folder; "": the default of TFDS
            "length": 64,  # tokens per sequence
            # pad: a text per row | block, wrap: texts end to end | crop: any window
            "mode": "pad",
            "too_long": "error",  # error | truncate (the published code) | drop
            "tokenizer": "word",  # word | char | sentencepiece | hf (from a file only)
            "tokenizer_path": "",  # a vocabulary, model or tokenizer.json; "": train it
            "min_count": 10,  # word, char: keep those that occur more often
            "vocab_size": 8000,  # sentencepiece: number of pieces
            "byte_fallback": False,  # sentencepiece: 256 pieces spell unseen characters
        }
    )


def _optim() -> ConfigDict:
    return ConfigDict(
        {
            "name": "adamw",  # adamw | muon
            "lr": 1e-4,
            "decay": "linear",  # linear | cosine | constant
            "warmup": 0,  # steps
            "weight_decay": 0.0,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "clip": 0.0,  # largest global norm of the gradient; 0: no clipping
            "ema": 0.9999,  # decay per step of the average used for sampling
            "accumulate": 1,  # microbatches per step
        }
    )
