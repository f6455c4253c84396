# SPDX-License-Identifier: Apache-2.0
"""What a caller passes: numbers of any library, seeds of 64 bits, mistakes in one line."""

import fractions
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import untrained
from hypothesis import given, settings
from hypothesis import strategies as st

import dlm_jax
from dlm_jax import ranges
from dlm_jax.data.tokenizer import WordTokenizer
from dlm_jax.errors import UserError
from dlm_jax.inference import arguments, sampling
from dlm_jax.inference.guidance_config import GuidanceConfig
from dlm_jax.inference.sampling_config import SamplingConfig, default_section
from dlm_jax.runtime import checkpoint
from dlm_jax.types import PAD, START

TOKENIZER = WordTokenizer(
    ("Aromi", "is", "a", "cheap", "pub", ".", "The", "Eagle", "restaurant")
)
STEPS = {"num_steps": 2}
WHOLE = (int, float, np.int8, np.int64, np.uint64, np.float64, np.array, jnp.asarray)
REAL = (float, np.float16, np.float32, np.float64, np.array, jnp.float32, jnp.bfloat16)
NOT_NUMBERS = (
    None, True, np.True_, "3", b"3", math.nan, math.inf, -math.inf, np.float32("nan"),
    [3], np.array([3]), np.array([]), {}, 1j, object, "nan", jnp.asarray(True),
    fractions.Fraction(3),
)  # fmt: skip


@pytest.fixture(scope="module")
def lm():
    return untrained(TOKENIZER, 12)


def _one_line(call, *parts):
    """The call ends in a UserError of one line that holds these parts."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


# --- numbers


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_numbers_of_every_library(kind):
    found = ranges.integer("n", kind(7), 1, 9)
    assert type(found) is int
    assert found == 7


@pytest.mark.parametrize("kind", REAL)
def test_real_numbers_of_every_library(kind):
    found = ranges.real("x", kind(0.5), 0, 1)
    assert type(found) is float
    assert found == 0.5


@pytest.mark.parametrize("value", [*NOT_NUMBERS, jax.random.key(0)], ids=repr)
def test_what_is_no_number(value):
    for read in (ranges.integer, ranges.real):
        _one_line(lambda read=read: read("name", value), "name=")


@given(st.integers(), st.integers(), st.integers())
def test_a_whole_number_is_in_its_range_or_refused(value, a, b):
    least, most = sorted((a, b))
    if least <= value <= most:
        assert ranges.integer("n", value, least, most) == value
    else:
        _one_line(lambda: ranges.integer("n", value, least, most), f"n={value}")


@given(st.floats(), st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_a_real_number_is_in_its_range_or_refused(value, a, b):
    least, most = sorted((a, b))
    if least <= value <= most:
        assert ranges.real("x", value, least, most) == value
    else:
        _one_line(lambda: ranges.real("x", value, least, most), f"x={value}")


def test_a_bound_may_be_excluded():
    assert ranges.real("x", 1e-9, over=0) == 1e-9
    _one_line(lambda: ranges.real("x", 0, over=0), "x=0: must be over 0")


SOLVER_OF = {
    "temperature": "ddim",
    "churn": "ddim",
    "eta": "ddim",
    "top_p": "ancestral",
}
OUTSIDE = {
    "num_steps": (0, -1, 2.5), "temperature": (0, -1.0), "churn": (-0.5,),
    "asymmetry": (-1e-9,), "eta": (-0.1, 1.5), "top_p": (1.5, -1), "clamp": (2, -2),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_every_setting_refuses_what_is_no_number_or_out_of_range(name):
    solver = SOLVER_OF.get(name, "marginal")
    bools = (True, np.True_) if name == "clamp" else ()
    for value in (*NOT_NUMBERS, *OUTSIDE[name]):
        if value is None or any(value is x for x in bools):
            continue
        options = {"solver": solver, name: value}
        _one_line(
            lambda options=options: SamplingConfig.from_config(
                default_section(), **options
            ),
            f"{name}=",
        )


@pytest.mark.parametrize("name", ["temperature", "churn", "eta", "top_p", "clamp"])
@pytest.mark.parametrize("kind", REAL)
def test_a_setting_is_the_same_from_every_library(name, kind):
    section, solver = default_section(), SOLVER_OF.get(name, "marginal")
    found, plain = (
        SamplingConfig.from_config(section, solver=solver, **{name: value})
        for value in (kind(0.5), 0.5)
    )
    assert found == plain
    assert hash(found) == hash(plain)


GUIDANCE = {
    "lr": -1, "fluency": -1, "token_time_floor": 1.5, "num_updates": -1,
    "x0_weight": math.nan, "token_weight": "1", "cfg_weight": math.inf,
    "t_range": (1.0, 0.0), "noise_known": 1, "mean_over_labels": "no",
}  # fmt: skip


@pytest.mark.parametrize("name", GUIDANCE)
def test_every_strength_is_checked(name):
    for value in (GUIDANCE[name], math.nan, [1, 2, 3], "x"):
        _one_line(
            lambda value=value: GuidanceConfig(**{name: value}), f"guidance.{name}="
        )


@pytest.mark.parametrize("kind", REAL)
def test_a_strength_is_the_same_from_every_library(kind):
    range_ = [kind(0.25), kind(0.5)]
    found = GuidanceConfig(lr=kind(0.5), t_range=range_, num_updates=np.int32(2))
    assert found == GuidanceConfig(lr=0.5, t_range=(0.25, 0.5), num_updates=2)


@pytest.mark.parametrize("kind", WHOLE)
def test_counts_of_every_library(kind, lm):
    options = {"batch": kind(2), "seed": kind(3), "num_steps": kind(2)}
    assert lm.sample(kind(2), **options) == lm.sample(2, batch=2, seed=3, num_steps=2)
    length = {"length": kind(4)} | STEPS
    assert lm.control(kind(2), **length) == lm.control(2, length=4, num_steps=2)
    ids = lm.encode(["Aromi is a pub ."])
    rows = lm.nll(ids, draws=kind(2), seed=kind(1)).total()
    assert rows == lm.nll(jnp.asarray(ids), draws=2, seed=1).total()


# --- seeds


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_a_small_seed_is_the_key_of_jax(seed):
    """So that the samples of a seed stay what they were."""
    np.testing.assert_array_equal(
        jax.random.key_data(sampling.key_of_seed(seed)),
        jax.random.key_data(jax.random.key(seed)),
    )


@settings(max_examples=30)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_every_seed_has_its_own_key(a, b):
    one, other = (jax.random.key_data(sampling.key_of_seed(s)) for s in (a, b))
    assert np.array_equal(one, other) == (a == b)


def test_seeds_of_64_bits(lm):
    seeds = (5, 5 + 2**32, 5 + 2**63, 2**64 - 1)
    texts = [
        tuple(lm.infill("The ___ is a ___ .", n=8, seed=s, **STEPS)) for s in seeds
    ]
    noise = [lm.generate(2, seed=s, **STEPS).latents.tobytes() for s in seeds]
    ids = lm.encode(["Aromi is a pub ."])
    nats = [float(lm.nll(ids, draws=1, seed=s).total()[0]) for s in seeds]
    for values in (texts, noise, nats):
        assert len(set(values)) == len(seeds)
    for seed in (-1, 2**64, 0.5, "a", jax.random.key(0)):
        _one_line(lambda seed=seed: lm.sample(1, seed=seed), "seed=")
        _one_line(lambda seed=seed: lm.nll(ids, seed=seed), "seed=")


# --- texts, ids and names


def test_one_string_is_one_text(lm):
    text = "Aromi is a pub ."
    rows = lm.encode([text])
    for texts in (text, (text,), np.array([text]), iter([text])):
        np.testing.assert_array_equal(lm.encode(texts), rows)
    for texts in (None, 3, b"the cat", [b"the cat"], [3], [None], {"text": text}, [[]]):
        _one_line(lambda texts=texts: lm.encode(texts), "texts")


def test_ids_that_cannot_be_scored(lm):
    ids = lm.encode(["Aromi is a pub ."])
    wrong = {
        "no rows": ids[:0], "a row": ids[0], "no columns": ids[:, :0],
        "reals": ids.astype(float), "texts": ["Aromi"], "a text": "Aromi",
        "too long": np.pad(ids, ((0, 0), (0, 1))), "negative": -1 - ids,
        "outside": ids + lm.tokenizer.vocab_size, "nothing": None, "ragged": [[1], [1, 2]],
    }  # fmt: skip
    for rows in wrong.values():
        _one_line(lambda rows=rows: lm.nll(rows), "ids")
    for count in (1, ids.shape[1]):  # the bound of no token at all was nan
        blank = np.full((2, count), PAD)
        blank[0, 0] = START
        _one_line(lambda blank=blank: lm.nll(blank), "ids: row 1 begins with PAD")
    left = np.roll(ids, int(np.sum(ids == PAD)), 1)  # as other libraries pad
    assert left[0, -1] != PAD
    _one_line(lambda: lm.nll(left), "ids: row 0 begins with PAD")
    assert np.isfinite(lm.nll(lm.encode("")).total()).all()
    _one_line(lambda: lm.features(ids), "features", "autoregressive")
    np.testing.assert_array_equal(
        lm.nll(ids.tolist()).total(), lm.nll(ids.astype(np.uint8)).total()
    )


def test_names_that_are_no_options(lm):
    calls = (lm.sample, lm.generate, lm.control, lm.denoising_trajectory)
    for call in calls:
        for value in (1, None):
            options = {"nosuch": value}
            _one_line(lambda call=call, o=options: call(1, **o), "nosuch", "choose one")
    _one_line(lambda: lm.infill("the ___", nosuch=1), "nosuch", "choose one of")
    _one_line(lambda: lm.sampling_config(nosuch=1), "nosuch", "choose one of")
    for name in ("length", "contains", "pos"):
        _one_line(lambda name=name: lm.sample(1, **{name: 3}), f"lm.control({name}=")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"length": 2.5}, "length=2.5"),
        ({"length": True}, "length=True"),
        ({"contains": 3}, "contains=3"),
        ({"contains": [3]}, "contains: 3 is no text"),
        ({"lacks": {"a": 1}}, "lacks={'a': 1}"),
        ({"semantic": {"food": 3}}, "semantic: 3 is no text"),
        ({"semantic": {3: "cheap"}}, "semantic: 3 is no text"),
        (
            {"semantic": {"foood": "cheap"}},
            "semantic 'foood': did you mean 'food'? choose one of name, type",
        ),
        ({"template": True}, "template=True"),
        ({"pos": 3}, "pos=3"),
        ({"tree": 3}, "tree=3"),
        ({"tree": [3]}, "tree=3"),
        ({"span": (0, 1)}, "span=(0, 1)"),
        ({"span": (0, 1.5, "NP")}, "span=1.5"),
    ],
)
def test_constraints_of_another_type(asked, says, lm):
    _one_line(lambda: lm.control(1, **asked), says)


def test_what_is_none_is_not_given(lm):
    free = lm.sample(2, **STEPS)
    given_ = {"constraints": None, "guidance": None, "seed": None, "batch": None}
    assert lm.generate(2, **given_, **STEPS).texts == free
    assert lm.control(2, length=None, contains=None, **STEPS) == free
    assert arguments.plain(dict.fromkeys(("length", "pos", "tree"))) == {}


def test_a_trajectory_may_be_asked_for_twice(lm):
    assert len(lm.denoising_trajectory(1, trajectory=True, **STEPS)[0]) == 2


def test_what_is_no_folder(lm):
    for folder in (None, 3, "", b""):
        _one_line(lambda folder=folder: lm.save_pretrained(folder), "folder=")
        _one_line(lambda folder=folder: lm.with_classifier(folder), "workdir=")
    _one_line(lambda: lm.infill(None), "template=None")


def test_load_of_what_is_no_folder():
    for workdir in (None, 3, "", b""):
        _one_line(lambda workdir=workdir: dlm_jax.load(workdir), "workdir=")
    _one_line(lambda: dlm_jax.load("Grammar"), "e2e, e2e_mr, grammar")
    _one_line(lambda: dlm_jax.load("grammar", step="x"), "step=x")


@pytest.mark.parametrize("inner", ["", "checkpoints", "checkpoints/7", "checkpoints/8"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_into_a_run_is_the_run(inner, kind, tmp_path):
    for step in (7, 8):
        (tmp_path / "run" / "checkpoints" / str(step)).mkdir(parents=True)
    workdir, step = checkpoint.run_directory(kind(tmp_path / "run" / inner))
    assert checkpoint.resolve_workdir(workdir) == tmp_path / "run"
    assert step == (int(inner[-1]) if inner[-1:].isdigit() else None)
    assert checkpoint.choose_step(workdir, step) == (step or 8)
    assert checkpoint.run_directory(tmp_path / "run" / inner, 7)[1] == 7


def test_a_run_may_be_called_checkpoints(tmp_path):
    run = tmp_path / "checkpoints"
    (run / "checkpoints" / "7").mkdir(parents=True)
    assert checkpoint.run_directory(run) == (run, None)
    assert checkpoint.run_directory(run / "checkpoints")[0] == str(run)
