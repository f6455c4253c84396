# SPDX-License-Identifier: Apache-2.0
"""Pairs of records whose names are placeholders, and which no reader ever sees."""

import json

import jax
import numpy as np
import pytest
from test_translation import _config, file

from dlm_jax.data import corpus, pairs
from dlm_jax.errors import UserError
from dlm_jax.inference import loading, translation
from dlm_jax.training.config import resolve_config
from dlm_jax.training.train_step import init_state

__all__ = ["file"]  # a fixture


def test_delexicalize_replaces_whole_values_on_both_sides():
    pair = pairs.Pair(
        "name : The Eagle | food : French | near : Eagle",
        "Near Eagle , The Eagle serves French food , as The Eagles .",
    )
    made = pairs.delexicalize(pair, ("name", "near"))
    assert made.source == "name : X-name | food : French | near : X-near"
    assert made.target == "Near X-near , X-name serves French food , as The Eagles ."
    assert pairs.delexicalize(pair, ()) == pair
    plain = pairs.Pair("no record at all", "a text")
    assert pairs.delexicalize(plain, ("name",)) == plain


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    return _named(tmp_path_factory.mktemp("named"))


def _named(folder, variant="modern"):
    """A random model of E2E's records whose names are placeholders."""
    names = ["Aromi", "Zizzi", "The Eagle", "Cocum"]
    lines = "".join(f"name : {n} | food : Thai||{n} has Thai food .\n" for n in names)
    for split in ("train", "valid"):
        (folder / f"src1_{split}.txt").write_text(lines, encoding="utf-8")
    config = _config(variant)
    config.data.update(
        source="e2e", path=str(folder), source_column="fields", min_count=0,
        delexicalize=("name",),
    )  # fmt: skip
    loaded = corpus.load_corpus(config)
    step_cfg = resolve_config(config)
    state = init_state(jax.random.key(0), step_cfg, loaded.tokenizer.vocab_size)
    record = json.loads(config.to_json_best_effort())
    return loading.from_parts(step_cfg.cfg, state.params, loaded.tokenizer, record)


def test_names_are_placeholders_within_and_names_outside(named):
    words = set(named.tokenizer.tokens())
    assert "X-name" in words
    assert not words & {"Aromi", "Zizzi", "Eagle"}
    # a name that no training text holds comes back in the text
    new = {"name": "Café Neu", "food": "Thai"}
    template = "Café Neu has [...]"
    assert named.translate(new, template=template)[0].startswith("Café Neu has")
    for source in (new, "name : Aromi | food : Thai"):
        assert "X-name" not in " ".join(named.translate(source, n=20, seed=1)[0])


def test_a_placeholder_without_a_value_reaches_nobody(named, monkeypatch, tmp_path):
    records = [{"food": "Thai"}, {"name": "Café Neu", "food": "Thai"}]
    other = _named(tmp_path, "autoregressive")
    found = [
        *named.translate(records, n=20, seed=1),
        *other.translate(records, n=20, seed=1),
        translation.beam_search(other, records, beams=2),
    ]
    assert "X-name" not in " ".join(map(" ".join, found))
    assert "Café Neu" in " ".join(found[1])
    # diffusion does not even generate it
    monkeypatch.setattr(translation, "show", lambda lm, texts, hidden: texts)
    without, with_ = named.translate(records, n=20, seed=1)
    assert "X-name" not in " ".join(without)
    assert "X-name" in " ".join(with_)
    (text,) = named.translate(records[:1], template="Thai food [...]", seed=1)
    assert text.startswith("Thai food ")


def test_a_field_that_no_source_has_is_no_placeholder(file):
    config = _config()
    config.data.update(path=str(file), delexicalize=("nmae",))
    with pytest.raises(
        UserError, match=r"delexicalize: no source has the field 'nmae'"
    ):
        corpus.load_corpus(config)


def test_a_template_is_read_in_either_form_of_unicode(named):
    record = {"name": "Caf\u00e9 Neu", "food": "Thai"}
    for name in ("Caf\u00e9 Neu", "Cafe\u0301 Neu"):
        (text,) = named.translate(record, template=f"{name} has [...]", seed=1)
        assert text.startswith("Caf\u00e9 Neu has")


def test_words_are_replaced_once_and_left_out_with_their_space():
    new = {"X-near": "", "X-name": "X-near", "The Eagle": "Eagle", "Eagle": "no"}
    text = "X-near X-name near X-near , X-nearby The Eagle Eagle X-near"
    assert pairs.replace_words(text, new) == " X-near near , X-nearby Eagle no"
    assert pairs.replace_words(text, {}) == text


def test_the_likelihood_is_of_the_placeholders(named):
    ids = [
        named.encode([f"{n} has Thai food ."], sources=[f"name : {n} | food : Thai"])
        for n in ("Aromi", "Zizzi")
    ]
    np.testing.assert_array_equal(*ids)
