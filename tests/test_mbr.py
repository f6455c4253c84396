# SPDX-License-Identifier: Apache-2.0
"""Minimum Bayes risk: the middle of the crowd wins, each way round."""

import numpy as np
import pytest

from dlm_jax.errors import UserError
from dlm_jax.inference import mbr

CROWD = ["the cat sat on the mat", "the cat sat on a mat", "a cat sat on the mat"]


@pytest.mark.parametrize("utility", sorted(mbr.UTILITIES))
@pytest.mark.parametrize("published", [False, True])
def test_the_odd_one_out_loses(utility, published):
    texts = ["purple rain falls", *CROWD]
    assert mbr.select(texts, utility=utility, published=published) in CROWD
    assert np.argmin(mbr.utilities(texts, utility=utility, published=published)) == 0


def test_it_is_the_mean_over_the_others():
    def shared(a, b):  # not symmetric: a share of the hypothesis
        return len(set(a.split()) & set(b.split())) / len(a.split())

    texts = ["a b", "a b c d", "a", "a b"]
    for published in (False, True):
        by_hand = [
            np.mean(
                [
                    shared(y, x) if published else shared(x, y)
                    for j, y in enumerate(texts)
                    if j != i
                ]
            )
            for i, x in enumerate(texts)
        ]
        found = mbr.utilities(texts, utility=shared, published=published)
        np.testing.assert_allclose(found, by_hand)
    assert mbr.select(texts, utility=shared) == "a"
    assert mbr.select(texts, utility=shared, published=True) == "a b c d"


def test_bleu_is_that_of_the_words():
    same = mbr.UTILITIES["bleu"]("the cat sat on the mat .", "the cat sat on the mat .")
    assert same == pytest.approx(100)
    assert mbr.UTILITIES["bleu"]("x y z w", "the cat sat on") < 30


def test_few_candidates_and_wrong_names():
    assert mbr.select(["alone"]) == "alone"
    for wrong in ([], "a text"):
        with pytest.raises(UserError, match="a list of one or more"):
            mbr.select(wrong)
    with pytest.raises(UserError, match="choose one of bleu, chrf"):
        mbr.select(["a"], utility="rouge")
