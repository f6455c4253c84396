# SPDX-License-Identifier: Apache-2.0
"""The protocols' configs: sizes, what each is, and a step of every `small` one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.configs import grammar, protocols
from dlm_jax.data import sources
from dlm_jax.diffusion import model
from dlm_jax.errors import UserError
from dlm_jax.training.config import resolve_config
from dlm_jax.training.train_step import init_state, train_step

# ids of each vocabulary: GPT-2's 50,257 and BERT's 30,522 tokens without their special
# ones (one, and five with [UNK]), and 27 characters, with START, END, UNK and PAD
VOCABULARY = {
    "tinystories256": 50_257 - 1 + 4,
    "text8": 27 + 4,
    "lm1b_packed": 30_522 - 5 + 4,
    "lm1b_padded": 30_522 - 5 + 4,
    "owt": 50_257 - 1 + 4,
}
LAYER = 12 * 768**2  # weights of attention and feed-forward


@pytest.mark.parametrize(
    ("name", "loss"),
    [*((name, "ce") for name in protocols.PROTOCOLS), ("owt", "likelihood")],
)
def test_a_step_of_each_small_config_can_be_traced(name, loss):
    config = protocols.get_config(f"{name}-small-{loss}")
    step_cfg, vocab = resolve_config(config), VOCABULARY[name]
    key = jax.random.key(0)
    state = jax.eval_shape(lambda k: init_state(k, step_cfg, vocab), key)
    dim = {"ce": 128, "likelihood": 16}[loss]
    assert state.params.table.shape == (vocab, dim)
    size = model.count(state.params)
    assert size > 12 * LAYER + vocab * dim
    rows = jax.ShapeDtypeStruct((512, config.data.length), jnp.int32)
    step = functools.partial(train_step, step_cfg=step_cfg)
    new, metrics = jax.eval_shape(step, key, state, rows)
    assert jax.tree.map(np.shape, new) == jax.tree.map(np.shape, state)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_small_is_the_size_of_the_field(name):
    config = protocols.get_config(name)
    assert (config.model.layers, config.model.hidden_dim, config.model.heads) == (
        *(12, 768, 12),
    )
    assert (config.train.batch, config.optim.name, config.optim.lr) == (
        *(512, "adamw", 3e-4),
    )
    assert (config.optim.warmup, config.optim.decay) == (2500, "constant")
    assert (config.optim.clip, config.optim.ema, config.model.dropout) == (
        1,
        0.9999,
        0.1,
    )
    assert config.optim.weight_decay == 0
    assert config.train.total_steps == 30_000 if name == "tinystories256" else 10**6


@pytest.mark.parametrize("loss", ["", *(f"-{loss}" for loss in protocols.LOSSES)])
@pytest.mark.parametrize("size", ["", *(f"-{size}" for size in protocols.SIZES)])
@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_variants_are_named(name, size, loss):
    config = protocols.get_config(f"{name}{size}{loss}")
    step_cfg = resolve_config(config)
    assert step_cfg.objective == ("nelbo" if "likelihood" in loss else "ce")
    assert (config.model.layers == 4) == ("tiny" in size)
    padded = name == "lm1b_padded"
    assert (config.data.mode == "pad") == padded
    for source in sources.READS:  # flags choose the file, or what was prepared
        data = config.data.copy_and_resolve_references()
        data.update(source=source, path="" if source == "grammar" else "x")
        sources.check_options(data, ["source", "path"])


@pytest.mark.parametrize(
    "wrong", ["", "text9", "text8-huge", "text8-ce-tiny", "text8-"]
)
def test_a_wrong_variant_is_refused(wrong):
    with pytest.raises(ValueError, match="choose one of tinystories256, text8"):
        protocols.get_config(wrong)


def test_an_autoregressive_model_takes_no_crops():
    """Its texts begin with START, which such rows lack."""
    config = grammar.get_config("autoregressive")
    config.data.mode = "crop"
    with pytest.raises(UserError, match=r"mode=crop: .*START.* use wrap or block"):
        resolve_config(config)
