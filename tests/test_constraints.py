# SPDX-License-Identifier: Apache-2.0
"""Constraints: known tokens come back for every solver, strength 0 changes nothing."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import sizes

from dlm_jax.configs import smoke
from dlm_jax.data.annotations import LabelVocab
from dlm_jax.diffusion import classifier, samplers
from dlm_jax.errors import UserError
from dlm_jax.inference import conditioning, constraints, loading, sampling
from dlm_jax.inference.constraints import GuidanceClassifier
from dlm_jax.inference.guidance_config import GuidanceConfig
from dlm_jax.training.trainer import Trainer, language_job
from dlm_jax.types import END, PAD, START

LENGTH = 10
TEXT = "the cat saw a dog near the old house\n"


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """A small model of a few words, untrained, and an untrained tagger."""
    folder = tmp_path_factory.mktemp("steering")
    (folder / "texts.txt").write_text(TEXT * 40, encoding="utf-8")
    config = smoke.get_config()
    path = str(folder / "texts.txt")
    config.data.update(source="text", path=path, length=LENGTH, too_long="truncate")
    config.model.update(layers=1, hidden_dim=16, mlp_dim=16, dim=8, positions=LENGTH)
    config.sample.update(n=3, batch=8, num_steps=6)
    run = Trainer(language_job(config), str(folder / "run"))
    cfg, state, tok = run.step_cfg.cfg, run.state, run.corpus.tokenizer
    made = loading.from_parts(cfg, state.params, tok, run.record, ema=state.ema)
    vocab = LabelVocab("pos", {"pos": ["START", "END", "PAD", "DET", "NOUN"]}, LENGTH)
    cfg = dataclasses.replace(made.cfg, self_cond=False, token_posterior_input=False)
    params = classifier.init(jax.random.key(1), cfg, vocab.head_spec)
    return dataclasses.replace(
        made, classifiers={"pos": GuidanceClassifier(params, cfg, vocab)}
    )


def ids_of(lm, text):
    return lm.tokenizer.encode(text)


def test_known_tokens_are_in_the_sample_not_only_in_the_output(lm):
    """Without a list of allowed words it is infilling alone that puts them there."""
    parts = constraints.parse_template(lm.tokenizer, "the ___ saw [...] house")
    wanted = constraints.template_constraints(
        parts, LENGTH, lm.tokenizer.vocab_size, 6, 0
    )
    drawn = lm.generate(6, constraints=wanted._replace(allowed=None), clamp=False)
    clean, known = np.asarray(lm.ema.table)[wanted.ids], wanted.known
    np.testing.assert_allclose(drawn.latents[known], clean[known], atol=1e-6)


@pytest.mark.parametrize("solver", sorted(samplers.SOLVERS))
@pytest.mark.parametrize("noised", [True, False])
def test_known_tokens_come_back_exactly(lm, solver, noised):
    parts = constraints.parse_template(lm.tokenizer, "the ___ saw [...] house")
    wanted = constraints.template_constraints(
        parts, LENGTH, lm.tokenizer.vocab_size, 6, 0
    )
    drawn = lm.generate(
        6,
        constraints=wanted,
        guidance=GuidanceConfig(noise_known=noised),
        solver=solver,
    )
    assert (drawn.ids[wanted.known] == wanted.ids[wanted.known]).all()
    clean = np.asarray(lm.ema.table)[wanted.ids]
    np.testing.assert_allclose(
        drawn.latents[wanted.known], clean[wanted.known], atol=1e-6
    )
    assert (wanted.ids[~wanted.known] == PAD).all()  # what is open is not given away
    assert (drawn.ids[~wanted.known] > PAD).all()  # and no special fills it
    assert all(
        text.startswith("the ") and text.endswith(" house") for text in drawn.texts
    )


def test_known_tokens_under_classifier_free_guidance_are_noised_in_the_sample(lm):
    """Else the unconditional half would see the known tokens, clean."""
    parts = constraints.parse_template(lm.tokenizer, "the ___ saw [...] house")
    wanted = constraints.template_constraints(
        parts, LENGTH, lm.tokenizer.vocab_size, 6, 0
    )
    table, x = lm.ema.table, np.zeros((6, LENGTH, 8), "f")
    keys = samplers.per_example_keys(jax.random.key(0), 6)
    times = samplers.Times(*map(np.float32, (0.6, 0.5, 0.4)))
    clean, seen = np.asarray(table)[wanted.ids][wanted.known], {}
    for weight in (1.0, 2.0):
        rest = (table, lm.schedule, wanted, {}, GuidanceConfig(cfg_weight=weight))
        step = conditioning.constrain_step(lambda keys, state, times: state, *rest)
        state = step(keys, samplers.State(x, x), times)
        np.testing.assert_array_equal(state.x0_hat[wanted.known], clean)
        seen[weight] = np.abs(state.x_t[wanted.known] - clean).mean()
    assert seen[1.0] == 0
    assert seen[2.0] > 0.1


@pytest.mark.slow
def test_no_constraint_or_no_strength_changes_nothing(lm):
    free = lm.generate(5, seed=3)
    asked = constraints.parse_constraints(
        lm.tokenizer, LENGTH, lm.classifiers, pos=["DET", "NOUN"]
    )
    rows = jax.tree.map(lambda x: np.repeat(x, 5, 0), asked)
    weak = lm.generate(5, seed=3, constraints=rows, guidance=GuidanceConfig(lr=0.0))
    assert (weak.ids == free.ids).all()
    words = constraints.parse_constraints(
        lm.tokenizer, LENGTH, {}, contains="cat", lacks="dog"
    )
    words = jax.tree.map(lambda x: np.repeat(x, 5, 0), words)
    weightless = lm.generate(
        5, seed=3, constraints=words, guidance=GuidanceConfig(token_weight=0.0)
    )
    assert (weightless.ids == free.ids).all()
    strong = lm.generate(5, seed=3, constraints=rows, guidance=GuidanceConfig(lr=1.0))
    assert (strong.ids != free.ids).any()
    leaning = lm.generate(
        5, seed=3, constraints=rows, guidance=GuidanceConfig(lr=0.0, x0_weight=50.0)
    )
    assert (leaning.ids != free.ids).any()


def test_a_text_depends_on_its_own_constraint_alone(lm):
    rows = [
        constraints.parse_constraints(lm.tokenizer, LENGTH, lm.classifiers, length=n)
        for n in (2, 5, 7)
    ]
    wanted = jax.tree.map(lambda *x: np.concatenate(x), *rows)
    texts = lm.generate(3, seed=1, constraints=wanted).texts
    assert [len(text.split()) for text in texts] == [2, 5, 7]
    assert lm.generate(3, seed=1, constraints=wanted, batch=1).texts == texts
    compiled = sum(run._cache_size() for run in lm.compiled.values())
    lm.generate(3, seed=1, constraints=jax.tree.map(lambda x: x[::-1], wanted))
    assert sum(run._cache_size() for run in lm.compiled.values()) == compiled


def test_gaps_and_ends(lm):
    tok = lm.tokenizer
    open_end = constraints.parse_template(tok, "the cat [...]")
    ids, known = constraints.fill_template(open_end, LENGTH, [])
    assert ids[:3].tolist() == [START, *ids_of(lm, "the cat")]
    assert known.tolist() == [True] * 3 + [False] * 7
    allowed = constraints.allowed_tokens(ids[None], known[None], tok.vocab_size)[0]
    assert not allowed[3, END]  # one word at the least
    assert allowed[4, END]
    assert allowed[4, PAD]
    assert not allowed[4, START]
    gap = constraints.parse_template(tok, "[...] cat")
    ids, known = constraints.fill_template(gap, LENGTH, [4])
    assert np.flatnonzero(known).tolist() == [0, 5, 6, 7, 8, 9]
    assert ids[5:7].tolist() == [*ids_of(lm, "cat"), END]
    blanks = constraints.parse_template(tok, "the ___ ___ [...]")
    row = constraints.template_constraints(blanks, LENGTH, tok.vocab_size, 1, 0)
    assert row.allowed[0, :, END].tolist() == [False] * 5 + [True] * 5
    widths = constraints.template_constraints(
        gap, LENGTH, tok.vocab_size, 20, 0
    ).known.sum(-1)
    assert len(set(widths.tolist())) > 3


def test_a_template_of_a_given_length(lm):
    template = "[...] cat ___ [...]"
    for words in (4, 6, 8):
        texts = lm.infill(template, n=6, length=words, seed=2)
        assert {len(text.split()) for text in texts} == {words}
        assert all("cat" in text.split()[1:-2] for text in texts)
    parts = constraints.parse_template(lm.tokenizer, template)
    sizes = constraints.template_constraints(
        parts, LENGTH, lm.tokenizer.vocab_size, 200, 0, 7
    )
    places = np.argmax(sizes.ids == ids_of(lm, "cat")[0], -1)
    assert set(places.tolist()) == {2, 3, 4, 5}
    with pytest.raises(UserError, match="length=3: the template needs 4 words or more"):
        lm.infill(template, n=1, length=3)
    with pytest.raises(UserError, match="length=5: the template needs 2 words"):
        lm.infill("the ___", n=1, length=5)
    with pytest.raises(UserError, match="length=1: the template needs 2 words"):
        lm.infill("the ___", n=1, pos=["NOUN"])
    assert constraints.num_words({"tree": [(0, 0, "DET"), (0, 3, "S")]}) == 4
    assert constraints.num_words({"pos": []}) is None
    with pytest.raises(UserError, match="'the' is in the template and must not occur"):
        lm.infill("the ___", n=1, lacks=["dog", "the"])


@pytest.mark.slow
def test_a_classifier_and_a_template(lm):
    """The classifier's log-probability rises, and the known word stays."""
    tags, n = ["DET", "NOUN", "DET", "NOUN"], 8
    asked = constraints.parse_constraints(
        lm.tokenizer, LENGTH, lm.classifiers, pos=tags
    )
    parts = constraints.parse_template(lm.tokenizer, "the ___ [...]")
    vocab = lm.tokenizer.vocab_size
    placed = constraints.template_constraints(parts, LENGTH, vocab, n, 1, len(tags))
    rows = jax.tree.map(lambda x: np.repeat(x, n, 0), asked)
    wanted = rows._replace(ids=placed.ids, known=placed.known, allowed=placed.allowed)
    of = conditioning.label_log_prob(wanted, lm.classifiers, lm.schedule)
    options = {"constraints": wanted, "seed": 1, "clamp": False}
    free, steered = (
        lm.generate(n, guidance=GuidanceConfig(lr=lr), **options) for lr in (0.0, 1.0)
    )
    before, after = (of(x.latents, np.full(n, 0.01, "f")) for x in (free, steered))
    assert np.mean(after - before) > 0
    assert all(text.startswith("the ") for text in steered.texts)
    assert lm.infill("the ___ [...]", n=4, pos=tags, seed=1)


def test_a_guided_text_does_not_depend_on_its_batch(lm):
    asked = constraints.parse_constraints(
        lm.tokenizer, LENGTH, lm.classifiers, pos=["DET", "NOUN"]
    )
    wanted = jax.tree.map(lambda x: np.repeat(x, 5, 0), asked)
    options = {"seed": 3, "constraints": wanted, "guidance": GuidanceConfig(lr=0.5)}
    assert lm.generate(5, **options).texts == lm.generate(5, batch=2, **options).texts


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("the cat", "has no blank"),
        ("", "has no blank"),
        ("the ___ zebra", "'zebra' is not in the model's vocabulary"),
        ("the ___ " + "cat " * 9, "needs 13 positions"),
    ],
)
def test_bad_templates(lm, template, message):
    with pytest.raises(UserError, match=message):
        lm.infill(template, n=1)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"length": 9}, "length=9: must be from 1 to 8 words"),
        ({"length": 0}, "length=0"),
        ({"length": "12"}, "length=12: must be"),
        ({"contains": "zebra"}, "'zebra' is not in"),
        ({"contains": ""}, "contains: empty"),
        (
            {"contains": "the old house", "length": 2},
            "a phrase of 3 words exceeds the text's 2",
        ),
        ({"contains": "cat " * 9}, "a phrase of 9 words exceeds the text's 8"),
        ({"contains": "cat", "lacks": "cat"}, "'cat' must both occur and not occur"),
        ({"lacks": "the cat"}, "'the cat' is 2 tokens of this model"),
        (
            {"pos": ["NOUN"], "length": 2},
            "imply different numbers of words: length 2, pos 1",
        ),
        (
            {"contains": ["cat", "dog", "old"], "length": 2},
            "3 different words exceed the text's 2",
        ),
        ({"span": (3, 8, "NP"), "length": 4}, "span: needs a classifier"),
        ({"span": (0, 1, "NP"), "tree": [(0, 1, "S")]}, "set one of the two"),
        ({"pos": ["VERB"]}, "pos 'VERB': not seen"),
        ({"tree": [(0, 1, "NP")]}, "tree: needs a classifier"),
        ({"span": (0, 1, "NP")}, "span: needs a classifier.*classifier:tree"),
        ({"semantic": {"animal": "zebra"}}, "'zebra' is not in"),
        ({"semantic": "cat"}, "semantic='cat': give"),
    ],
)
def test_bad_constraints(lm, asked, message):
    with pytest.raises(UserError, match=message):
        lm.control(1, **asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "adam"}, "guidance.rule='adam': choose one of"),
        ({"num_updates": -1}, "guidance.num_updates=-1: must be 0 or more"),
        ({"token_time_floor": 1.5}, "token_time_floor=1.5: must be from 0 to 1"),
    ],
)
def test_bad_guidance(options, message):
    with pytest.raises(UserError, match=message):
        GuidanceConfig(**options)


def test_packed_text_has_no_places(lm):
    """A model of packed texts takes words, but no lengths and no templates."""
    data = lm.config["data"] | {"mode": "block"}
    packed = dataclasses.replace(lm, config=lm.config | {"data": data})
    for call in (lambda: packed.infill("the ___"), lambda: packed.control(length=3)):
        with pytest.raises(UserError, match="packed end to end"):
            call()
    assert packed.control(1, contains="cat")


def test_words_are_asked_for_without_a_classifier(lm):
    asked = constraints.parse_constraints(
        lm.tokenizer,
        LENGTH,
        {},
        semantic={"animal": "cat"},
        contains=["old house"],
        lacks="dog",
    )
    assert [p.tolist() for p in asked.phrases] == [
        [ids_of(lm, "old house")],
        [ids_of(lm, "cat")],
    ]
    long = constraints.parse_constraints(
        lm.tokenizer, LENGTH, {}, contains="the old house"
    )
    assert long.phrases[0].tolist() == [[*ids_of(lm, "the old house"), -1]]
    assert asked.excluded.tolist() == [ids_of(lm, "dog")]
    strong = {"seed": 0, "num_steps": 16, "guidance": GuidanceConfig(token_weight=20.0)}
    with_cat = lm.control(8, contains="cat", length=6, **strong)
    without = lm.control(8, lacks="cat", length=6, **strong)
    count = [
        sum("cat" in text.split() for text in texts) for texts in (with_cat, without)
    ]
    assert count[0] > count[1]


def test_memory_does_not_grow_with_the_steps(lm):
    """Infilled and guided: as many values of the largest size for 4 calls as for 32."""
    parts = constraints.parse_template(lm.tokenizer, "the ___ saw [...] house")
    wanted = constraints.template_constraints(
        parts, LENGTH, lm.tokenizer.vocab_size, 4, 0
    )
    asked = constraints.parse_constraints(
        lm.tokenizer, LENGTH, lm.classifiers, pos=["DET"] * 3
    )
    labels = jax.tree.map(lambda x: np.repeat(x, 4, 0), asked.labels)
    wanted = wanted._replace(labels=labels)

    def values(steps):
        config = lm.sampling_config(num_steps=steps)
        chain = sampling.make_chain(lm, config, GuidanceConfig())
        heads = {"pos": lm.classifiers["pos"].params}
        args = (jax.random.key(0), lm.ema, (), np.arange(4), wanted, heads)
        return sorted(sizes(jax.make_jaxpr(chain)(*args).jaxpr))

    few, many = values(4), values(32)
    assert few[-1] == many[-1]
    assert len(few) == len(many)  # one loop, whatever its length


def test_an_autoregressive_model_takes_no_constraints(lm):
    ar_model = dataclasses.replace(
        lm, cfg=dataclasses.replace(lm.cfg, causal=True), compiled={}
    )
    with pytest.raises(UserError, match="autoregressive model takes no constraints"):
        ar_model.control(1, length=3)


@pytest.mark.slow
def test_a_model_trained_with_given_tokens(lm):
    """It is given them in every call, and cfg_weight makes more of them."""
    template = "the ___ saw [...]"
    config = lm.config | {"loss": lm.config["loss"] | {"conditioning_prob": 0.9}}
    ema = jax.tree.map(lambda x: x + 0.1, lm.ema)  # a fresh one ignores context
    lm = dataclasses.replace(lm, ema=ema, compiled={})
    conditional = dataclasses.replace(lm, config=config, compiled={})
    options = {"n": 8, "seed": 1, "num_steps": 6, "clamp": False}
    given = conditional.infill(template, **options)
    assert given != lm.infill(template, **options)
    assert all(text.startswith("the ") and text.split()[2] == "saw" for text in given)
    scaled = conditional.infill(
        template, guidance=GuidanceConfig(cfg_weight=3.0), **options
    )
    assert scaled != given
    parts = constraints.parse_template(lm.tokenizer, template)
    wanted = constraints.template_constraints(
        parts, LENGTH, lm.tokenizer.vocab_size, 8, 1
    )
    args = (lm.ema, lm.cfg, lm.schedule)
    x, t = np.zeros((8, LENGTH, 8), np.float32), np.full(8, 0.7, np.float32)
    plain = conditioning.constrain_denoiser(*args, wanted, {}, GuidanceConfig())(
        x, t, x
    )
    nothing, once = (
        conditioning.constrain_denoiser(
            *args,
            wanted,
            {},
            GuidanceConfig(cfg_weight=weight),
            supports_conditioning=True,
        )(x, t, x)
        for weight in (0.0, 1.0)
    )
    np.testing.assert_allclose(nothing, plain, atol=1e-5)
    assert np.abs(once - plain).max() > 1e-4
    with pytest.raises(UserError, match="was not trained with given tokens"):
        lm.infill(template, guidance=GuidanceConfig(cfg_weight=3.0))


@pytest.mark.slow
def test_tokens_under_guidance_keep_a_share_of_their_time(lm):
    asked = constraints.parse_constraints(
        lm.tokenizer, LENGTH, lm.classifiers, pos=["DET", "NOUN"]
    )
    rows = jax.tree.map(lambda x: np.repeat(x, 8, 0), asked)
    options = {"seed": 3, "constraints": rows, "clamp": False}
    whole, part = (
        lm.generate(
            8, guidance=GuidanceConfig(lr=0.0, token_time_floor=share), **options
        ).latents
        for share in (1.0, 0.5)
    )
    assert np.abs(whole - part).max() > 1e-4


def test_an_empty_folder_is_no_classifier(lm, tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        lm.with_classifier(tmp_path)
