# SPDX-License-Identifier: Apache-2.0
"""Long sessions: new numbers compile nothing, programs are few, errors are known."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import untrained

from dlm_jax.data.tokenizer import WordTokenizer
from dlm_jax.errors import UserError
from dlm_jax.inference import constraints, scoring, trained_model
from dlm_jax.inference.guidance_config import GuidanceConfig
from dlm_jax.inference.sampling_config import SamplingConfig

TOKENIZER = WordTokenizer(
    ("Aromi", "is", "a", "cheap", "pub", ".", "The", "Eagle", "restaurant")
)
STEPS = {"num_steps": 2}
# (solver, name, values): each of the values is on
SCALES = (
    ("ddim", "temperature", (0.5, 0.9, 1.1)), ("ancestral", "temperature", (0.5, 2.0)),
    ("ddim", "churn", (0.5, 0.1)), ("ddim", "eta", (1.0, 0.5, 0.3)),
    ("ancestral", "top_p", (0.2, 1.0)), ("marginal", "clamp", (0.0, 0.5, 1.0)),
    ("marginal", "asymmetry", (0.0, 0.5, 2.0)),
)  # fmt: skip
STRENGTHS = {
    "lr": (0.0, 0.1), "fluency": (0.0, 0.1), "t_range": ((0.0, 0.5), (0.2, 1.0)),
    "token_weight": (0.0, 1.0, 2.5), "x0_weight": (0.5, 1.0),
}  # fmt: skip


@pytest.fixture
def lm():
    return untrained(TOKENIZER, 12)


def _programs(lm):
    return sum(run._cache_size() for run in lm.compiled.values())


@pytest.mark.parametrize(("solver", "name", "values"), SCALES)
def test_a_new_number_compiles_nothing_and_acts(lm, solver, name, values):
    found = [
        lm.generate(2, seed=0, solver=solver, **{name: value}, **STEPS).latents
        for value in values
    ]
    assert _programs(lm) == 1
    kept = {x.tobytes() for x in found}
    assert len(kept) == len(values) or name == "clamp"


@pytest.mark.parametrize("name", STRENGTHS)
def test_a_new_strength_compiles_nothing(lm, name):
    rows = constraints.parse_constraints(lm.tokenizer, lm.length, {}, contains="cheap")
    rows = jax.tree.map(lambda x: np.repeat(x, 2, 0), rows)
    for value in STRENGTHS[name]:
        guided = GuidanceConfig(**{name: value})
        lm.generate(2, seed=0, constraints=rows, guidance=guided, **STEPS)
    assert _programs(lm) == 1


@pytest.mark.parametrize(("solver", "name", "values"), SCALES)
def test_the_form_and_the_numbers_make_the_whole(solver, name, values):
    option = name in ("eta", "top_p")
    for value in values:
        s = (
            SamplingConfig(solver=solver, solver_options=((name, value),))
            if option
            else SamplingConfig(solver=solver, **{name: value})
        )
        assert s.form().join(s.numbers()) == s
        assert s.numbers()[name] == value
        assert hash(s.form()) == hash(dataclasses.replace(s).form())
    g = GuidanceConfig(x0_weight=0.5, cfg_weight=2.0)
    assert g.form().join(g.numbers()) == g


def test_a_number_that_is_off_is_part_of_the_form():
    on, off = SamplingConfig(temperature=0.5), SamplingConfig()
    assert on.form() != off.form()
    assert on.form() == SamplingConfig(temperature=0.7).form()
    assert GuidanceConfig(cfg_weight=2.0).form() != GuidanceConfig().form()


def test_programs_are_few_and_the_last_used_stay(lm, monkeypatch):
    monkeypatch.setattr(trained_model, "MAX_PROGRAMS", 3)
    made = [lm.cached(name, lambda: lambda x: x + 1) for name in "abc"]
    assert lm.cached("a", lambda: None) is made[0]
    lm.cached("d", lambda: lambda x: x)
    assert list(lm.compiled) == ["c", "a", "d"]  # b was used longest ago
    for steps in range(1, 6):
        lm.sample(1, num_steps=steps)
    ids = lm.encode(["Aromi is a pub ."])
    for draws in range(1, 6):
        lm.nll(ids, draws=draws)
    assert len(lm.compiled) == 3
    assert _programs(lm) <= 3


def test_constraints_of_many_shapes_are_bounded_too(lm, monkeypatch):
    monkeypatch.setattr(trained_model, "MAX_PROGRAMS", 2)
    for phrases in (["cheap"], ["cheap", "pub"], ["is a"], ["cheap pub ."]):
        lm.control(1, contains=phrases, num_steps=1)
    assert _programs(lm) <= 2


# --- the standard error of a likelihood


@pytest.fixture(scope="module")
def scored():
    lm = untrained(TOKENIZER, 12)
    return lm, lm.encode(["Aromi is a cheap pub .", "The Eagle is a restaurant ."])


def test_few_programs_for_any_number_of_texts(lm):
    texts = ["Aromi is a pub ."] * 9
    for n in range(1, 10):
        lm.nll(lm.encode(texts[:n]), draws=1)
    assert _programs(lm) == 5  # 1, 2, 4, 8 and 16 rows


@pytest.mark.parametrize("draws", [4, 16])
def test_the_standard_error_is_that_over_seeds(scored, draws):
    lm, ids = scored
    repeats = 200
    found = lm.nll(np.repeat(ids[:1], repeats, 0), draws=draws)
    assert found.stderr.shape == (repeats,)
    true = found.total().std(ddof=1)
    claimed = np.sqrt(np.mean(found.stderr**2))
    assert 0.6 < claimed / true < 1.6


def test_one_draw_has_no_standard_error(scored):
    lm, ids = scored
    assert np.isnan(lm.nll(ids, draws=1).stderr).all()


@pytest.mark.parametrize("tolerance", [4.0, 2.0])
def test_estimates_within_a_tolerance(scored, tolerance):
    lm, ids = scored
    found = [lm.nll(ids, seed=seed, tolerance=tolerance) for seed in range(4)]
    for one in found:
        assert (one.stderr <= tolerance).all()
        of_tokens = one.tokens.sum(-1) + one.length
        np.testing.assert_allclose(of_tokens, one.total(), rtol=1e-4)
        assert (one.stderr > 0).all()
        np.testing.assert_allclose(one.total(), sum(one), rtol=1e-6)
    totals = np.stack([one.total() for one in found])
    assert np.ptp(totals, 0).max() < 10 * tolerance
    assert len(np.unique(totals)) == totals.size
    again = lm.nll(ids, seed=0, tolerance=tolerance)
    np.testing.assert_array_equal(again.total(), totals[0])


def test_a_tolerance_out_of_reach_ends_at_the_most_draws(scored, monkeypatch):
    lm, ids = scored
    monkeypatch.setattr(scoring, "MAX_DRAWS", 64)
    found = lm.nll(ids, draws=4, tolerance=1e-9)
    assert (found.stderr > 1e-9).all()


def test_a_wrong_tolerance(scored):
    lm, ids = scored
    for value in (0, -1, float("nan"), "a", True):
        with pytest.raises(UserError, match="tolerance="):
            lm.nll(ids, tolerance=value)
