# SPDX-License-Identifier: Apache-2.0
"""The rows of held-out text: bits per character, and the second estimator."""

import numpy as np
import pytest
from conftest import untrained

from dlm_jax.data import tokenizer
from dlm_jax.evaluation import report
from dlm_jax.inference import loading

TEXTS = ["abc ab", "ab abc abc", "c", "abcab"]


@pytest.fixture(scope="module")
def lm():
    """A model whose tokens are pieces, of any length."""
    made = untrained(tokenizer.train_sentencepiece(TEXTS * 5, vocab_size=9), 16)
    made.config["data"]["source"] = "text"
    return made


def test_bits_per_character_do_not_count_tokens(lm):
    rows = report.likelihood_rows(lm, TEXTS, 2)
    sizes = [len(lm.tokenizer.encode(text)) + 1 for text in TEXTS]
    assert sizes != [len(text) for text in TEXTS]
    bits = rows["bits/token"].mean * sum(sizes)
    assert rows["bits/character"].mean == pytest.approx(bits / sum(map(len, TEXTS)))
    assert rows["bits/character"].stderr > 0


def test_bits_per_character_of_packed_rows(lm, monkeypatch):
    monkeypatch.setitem(lm.config["data"], "mode", "block")
    rows = report.likelihood_rows(lm, TEXTS * 6, 2)
    sizes = [len(lm.tokenizer.encode(text)) + 1 for text in TEXTS]
    mean = sum(map(len, TEXTS)) / sum(sizes)
    wanted = rows["bits/token"].mean / mean
    assert rows["bits/character"].mean == pytest.approx(wanted)


def test_no_bits_per_character_of_unknown_ones(lm):
    rows = report.likelihood_rows(lm, [*TEXTS, "xyz"], 2)
    assert "bits/character" not in rows
    assert "bits/token" in rows


def test_the_ode_beside_the_bound(lm):
    assert report.ode_rows(lm, [], 2) == {}
    rows = report.ode_rows(lm, TEXTS, 2)
    other = report.likelihood_rows(lm, TEXTS, 2)["nats/token"].mean
    ode, difference = (row.mean for row in rows.values())
    assert ode - difference == pytest.approx(other, rel=1e-4)
    assert np.isfinite([ode, difference]).all()


def test_a_run_of_before_these_options_has_them_off(lm):
    config = {**lm.config, "evaluate": {"n": 7}}
    old = loading.from_parts(lm.cfg, lm.params, lm.tokenizer, config)
    assert old.config["evaluate"] == loading.LATER_EVALUATE | {"n": 7}
