# SPDX-License-Identifier: Apache-2.0
"""Measures on texts whose figures are known, and the energy distance on known laws."""

import math

import numpy as np
import pytest

from dlm_jax.evaluation import text_metrics

TEXTS = ["a b c d e", "a b a b a b", "f"]


def test_entropy_of_equal_and_of_single_words():
    assert text_metrics.unigram_entropy(["a b", "c d"]) == pytest.approx(math.log(4))
    assert text_metrics.unigram_entropy(["a a", "a"]) == 0.0


def test_distinct():
    assert text_metrics.distinct(TEXTS, 1) == pytest.approx(6 / 12)
    assert text_metrics.distinct(TEXTS, 4) == pytest.approx(4 / 5)
    assert math.isnan(text_metrics.distinct(["a b"], 4))


def test_repetition():
    assert text_metrics.repetition(TEXTS) == pytest.approx(3 / 9)
    assert text_metrics.repetition(["a b c"]) == 0.0


def test_copied():
    assert text_metrics.copied(TEXTS, {"f", "g"}) == pytest.approx(1 / 3)
    seen = set(text_metrics.all_grams(["x a b c d e"]))
    assert text_metrics.copied_grams(TEXTS, seen) == pytest.approx(2 / 5)


def test_length_distance():
    assert text_metrics.length_distance(TEXTS, TEXTS) == 0.0
    assert text_metrics.length_distance(["a b c"], ["a", "a b"]) == pytest.approx(1.5)


def test_energy_distance_is_unbiased_at_equal_laws():
    rng = np.random.default_rng(0)
    values = [
        text_metrics.energy_distance(rng.normal(size=(40, 3)), rng.normal(size=(60, 3)))
        for _ in range(300)
    ]
    assert abs(np.mean(values)) < 5 * np.std(values) / math.sqrt(300)
    assert min(values) < 0


def test_energy_distance_of_points():
    """All mass at 0 against all at 3: 2 x 3, the scale of a constant set being 1."""
    x, y = np.zeros((4, 1)), np.full((5, 1), 3.0)
    assert text_metrics.energy_distance(x, y) == pytest.approx(6.0)


def test_energy_distance_grows_with_the_shift_and_has_no_unit():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 2)), rng.normal(size=(300, 2))
    near, far = (text_metrics.energy_distance(x + s, y) for s in (0.5, 2.0))
    assert 0 < near < far
    assert text_metrics.energy_distance(7 * (x + 2), 7 * y) == pytest.approx(far)
