# SPDX-License-Identifier: Apache-2.0
"""The whole pipeline: a model that saw eight sentences says these eight, nothing else."""

import functools
import json

import jax
import pytest

from dlm_jax.configs import smoke
from dlm_jax.data import batching, encoding, grammar, tokenizer
from dlm_jax.inference import loading
from dlm_jax.training import train_step
from dlm_jax.training.config import resolve_config

pytestmark = pytest.mark.slow

SENTENCES = [
    "The Phoenix is a highly rated Italian coffee shop .",
    "Aromi offers Chinese food and is not family friendly .",
    "Giraffe is an Indian bistro in the old town .",
    "The Rice Boat serves expensive dishes and welcomes families .",
    "The Vaults is an English pub near Café Rouge .",
    "Strada is a cheap Indian diner near Burger King .",
    "Zizzi is a Japanese restaurant next to Café Brazil .",
    "Giraffe offers French meals and welcomes children .",
]
LENGTH = 12
# the quickstart's: cross-entropy, self-conditioning, the prior, a curve for a schedule
CROSS_ENTROPY = {
    "model.dim": 32,
    "optim.name": "muon",
    "optim.lr": 1e-2,
    "sample.num_steps": 200,
}
# the published: mean squared error of x_0, the sqrt schedule, DDPM with the clamp
PUBLISHED = {
    "model.trunk": "post_ln",
    "model.predicts": "x0",
    "model.self_cond": False,
    "embedding.normalize": False,
    "schedule.name": "sqrt",
    "schedule.num_steps": 2000,
    "schedule.mean": 0.0,
    "schedule.scale": 0.0,
    "schedule.adaptive": "",
    "model.time_input": "t",
    "loss.objective": "x0",
    "loss.time_sampler": "uniform",
    "loss.self_cond_prob": 0.0,
    "optim.lr": 5e-3,
    "sample.num_steps": 100,
    "sample.clamp": 1.0,
    "sample.rounding": "logits",
}


def _config(changes, steps):
    config = smoke.get_config()
    config.data.length = LENGTH
    config.model.update(hidden_dim=64, mlp_dim=128, heads=4, dim=16, positions=LENGTH)
    config.train.update(batch=32, total_steps=steps)
    config.optim.update(warmup=20, ema=0.98)
    config.sample.batch = 64
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize(
    ("changes", "steps"),
    [(CROSS_ENTROPY, 700), (PUBLISHED, 900)],
    ids=["cross-entropy", "published"],
)
def test_says_the_eight_sentences_and_no_other(changes, steps):
    assert all(map(grammar.accepts, SENTENCES))
    config = _config(changes, steps)
    words = tokenizer.train_word(SENTENCES, min_count=0)
    ids = encoding.encode(SENTENCES, words, length=LENGTH, mode="pad", too_long="error")
    step_cfg = resolve_config(config)

    def init(key):
        return train_step.init_state(key, step_cfg, words.vocab_size)

    state, key = jax.jit(init)(jax.random.key(0)), jax.random.key(1)
    step_fn = functools.partial(train_step.train_step, step_cfg=step_cfg)
    step_fn = jax.jit(step_fn, donate_argnums=1)
    for step in range(steps):
        rows = ids[batching.batch_index(len(ids), seed=0, step=step, batch=32)]
        state, _ = step_fn(key, state, rows)
    record = json.loads(config.to_json_best_effort())
    lm = loading.from_parts(
        step_cfg.cfg,
        state.params,
        words,
        record,
        ema=state.ema,
        schedule_state=state.schedule_state,
    )
    found = lm.sample(256, seed=0)
    others = [text for text in found if text not in SENTENCES]
    assert len(others) <= 8, others  # finitely many steps mix two sentences, rarely
    assert len(set(found) & set(SENTENCES)) >= 7
