# SPDX-License-Identifier: Apache-2.0
"""Texts a step at a time: the same texts as at once, alone or joined with others."""

import jax.numpy as jnp
import numpy as np
import pytest

import dlm_jax
from dlm_jax.errors import UserError
from dlm_jax.inference import streaming


@pytest.fixture(scope="module")
def grammar():
    return dlm_jax.load("grammar")


@pytest.fixture(scope="module")
def pairs():
    return dlm_jax.load("e2e_mr")


OPTIONS = [
    {},
    {"solver": "ddim", "eta": 0.5, "temperature": 0.7, "clamp": -1},
    {"solver": "dpmpp_2m"},
    {"template": "The ___ is a cheap [...]"},
    {"contains": "family friendly", "length": 9},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_last_frame_is_what_control_makes(grammar, options):
    frames = list(grammar.stream(3, seed=5, num_steps=4, **options))
    assert [(f.step, f.num_steps) for f in frames] == [(i, 4) for i in (1, 2, 3, 4)]
    texts = streaming.texts(grammar, frames[-1].ids, None)
    assert texts == grammar.control(3, seed=5, num_steps=4, **options)


def test_frames_are_the_trajectory(grammar):
    frames = list(grammar.stream(2, seed=1, num_steps=5))
    whole = grammar.generate(2, seed=1, num_steps=5, trajectory=True)
    np.testing.assert_array_equal(
        np.stack([f.ids for f in frames], 1), whole.trajectory
    )


def test_joined_requests_keep_their_texts(grammar):
    requests = [
        streaming.ask(grammar, n, seed=seed, num_steps=4, contains=words).request
        for n, seed, words in ((1, 7, "cheap"), (2, 8, "family friendly"))
    ]
    *_, last = streaming.stream(grammar, requests)
    alone = [
        list(grammar.stream(n, seed=seed, num_steps=4, contains=words))[-1].ids
        for n, seed, words in ((1, 7, "cheap"), (2, 8, "family friendly"))
    ]
    np.testing.assert_array_equal(last.ids, np.concatenate(alone))


def test_targets_of_pairs(pairs):
    options = {"seed": 3, "num_steps": 3, "cfg_weight": 2.0}
    source = {"name": "Fitzbillies", "food": "French"}
    asked = streaming.ask(pairs, 2, sources=[source], **options)
    *_, last = streaming.stream(pairs, [asked.request])
    texts = streaming.texts(pairs, last.ids, asked.hidden)
    assert texts == pairs.translate([source], n=2, **options)[0]
    known = asked.request.constraints.known
    assert (last.confidence[known] == 1).all()
    assert (last.confidence[~known] < 1).any()


def test_another_number_of_steps_compiles_nothing(grammar):
    list(grammar.stream(2, num_steps=3))
    programs = set(grammar.compiled)
    list(grammar.stream(2, num_steps=6, temperature=1.0, clamp=0.3))
    assert set(grammar.compiled) == programs


def test_agreement_is_the_probability_of_orthogonal_words():
    table = jnp.eye(4) * 3.0
    p = jnp.asarray([[[0.1, 0.6, 0.3, 0.0]]])
    ids = jnp.asarray([[1]])
    np.testing.assert_allclose(
        streaming.agreement(table, p @ table, ids), 0.6, rtol=1e-6
    )
    opposite = -1.0 * table[ids]
    np.testing.assert_allclose(streaming.agreement(table, opposite, ids), 0.0)


def test_confidence_grows_on_average(grammar):
    frames = list(grammar.stream(4, seed=0, num_steps=16))
    open_ = ~np.asarray(
        streaming.ask(grammar, 4, seed=0, num_steps=16).request.constraints.known
    )
    means = [float(f.confidence[open_].mean()) for f in frames]
    assert means[0] < 0.4 < 0.8 < means[-1]


def test_mistakes_are_named_before_the_first_step(grammar, pairs):
    with pytest.raises(UserError, match="no option has this name"):
        grammar.stream(1, number=3)
    with pytest.raises(UserError, match="cfg_weight: give sources"):
        grammar.stream(1, cfg_weight=2.0)
    with pytest.raises(UserError, match="was not trained on pairs"):
        grammar.stream(1, sources=["a"])
    with pytest.raises(UserError, match="give it sources"):
        pairs.stream(1)
