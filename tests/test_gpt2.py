# SPDX-License-Identifier: Apache-2.0
"""GPT-2 against transformers' on random weights, its windows, and bad folders."""

import json
import math

import numpy as np
import pytest
import safetensors.numpy

from dlm_jax.data import grammar
from dlm_jax.errors import UserError
from dlm_jax.evaluation import gpt2, report

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra `hf`")

CONFIG = {
    "model_type": "gpt2",
    "n_layer": 3,
    "n_head": 4,
    "n_embd": 16,
    "n_positions": 24,
    "vocab_size": 60,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}
TEXTS = ["abc ab", "a", "", "bcab cab " * 7]
# -log p of TEXTS, nats, as transformers 5.24.0 computes them from `_weights`: the test
# of transformers below compares them
GOLDEN = [19.364281, 3.598210, 0.0, 202.080592]


def _weights(cfg):
    """Random arrays in the order of `shapes`, layer by layer: seeded NumPy draws."""
    rng, arrays = np.random.default_rng(0), {}
    for name, shape in gpt2.shapes(cfg).items():
        layers = range(cfg.layers) if "*" in name else [0]
        for i in layers:
            x = 0.3 * rng.standard_normal(shape)
            x = x + 1 if ".ln_" in f".{name}" and name.endswith("weight") else x
            arrays[name.replace("*", str(i))] = x.astype(np.float32)
    return arrays


def _tokenizer():
    """Byte-level BPE with the 26 letters, space and two merges, as GPT-2's."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    strings = [*letters, "\u0120", "ab", "\u0120c"]
    vocab = {s: i for i, s in enumerate(strings)}
    merges = [("a", "b"), ("\u0120", "c")]
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.add_special_tokens([gpt2.START])
    return tok


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpt2")
    (path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    cfg = gpt2._read_config(json.dumps(CONFIG))
    safetensors.numpy.save_file(_weights(cfg), path / "model.safetensors")
    _tokenizer().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def judge(folder):
    return gpt2.load(folder)


def test_scores_are_the_golden_ones(judge):
    scores = judge.score(TEXTS)
    np.testing.assert_allclose(scores.nats, GOLDEN, atol=1e-4)
    assert scores.tokens.tolist() == [len(row) for row in judge.encode(TEXTS)]


def test_scores_are_those_of_transformers(folder, judge):
    """Also of the folder that transformers itself writes."""
    torch = pytest.importorskip("torch", reason="needs the extra `peer`")
    reason = "needs the extra `peer`"
    transformers = pytest.importorskip("transformers", reason=reason)
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(**CONFIG))
    state = {f"transformer.{n}": torch.tensor(x) for n, x in _read(folder).items()}
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    net.tie_weights()
    net.eval()
    wanted = []
    for row in judge.encode(TEXTS):
        nats = 0.0
        for at in range(0, len(row), CONFIG["n_positions"] - 1):
            part = row[at : at + CONFIG["n_positions"] - 1]
            ids = torch.tensor([[judge.start, *part]])
            with torch.no_grad():
                nats += float(net(ids, labels=ids).loss) * len(part)
        wanted.append(nats)
    np.testing.assert_allclose(judge.score(TEXTS).nats, wanted, atol=1e-4)
    np.testing.assert_allclose(GOLDEN, wanted, atol=1e-4)
    net.save_pretrained(folder / "again")
    _tokenizer().save(str(folder / "again" / "tokenizer.json"))
    again = gpt2.load(folder / "again")
    np.testing.assert_allclose(again.score(TEXTS).nats, wanted, atol=1e-4)


def _read(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def test_a_text_does_not_depend_on_the_others(judge):
    many = [text for text in TEXTS for _ in range(700)]
    nats = judge.score(many).nats.reshape(len(TEXTS), -1)
    np.testing.assert_allclose(nats, np.tile(GOLDEN, (700, 1)).T, atol=1e-4)


def test_lengths_at_the_edges_of_widths_and_windows(judge):
    texts = ["b" * n for n in (15, 16, 22, 23, 24, 47)]
    nats = judge.score(texts).nats
    alone = [float(judge.score([text]).nats[0]) for text in texts]
    np.testing.assert_allclose(nats, alone, atol=1e-4)
    start = judge.score(["b" * 23, "b"]).nats
    assert nats[4] == pytest.approx(start.sum(), abs=1e-4)  # a second window of one


def test_a_special_token_in_a_text_is_text(judge):
    assert judge.start not in judge.encode([f"a{gpt2.START}b"])[0]


def test_measures(judge):
    nats, tokens = judge.score(TEXTS)
    assert judge.nats_per_token(TEXTS) == pytest.approx(nats.sum() / tokens.sum())
    assert math.isnan(judge.nats_per_token([""]))
    # "ab" and "a b" are 1 and 3 tokens
    assert judge.entropy_per_text(["abab", "a b"]) == pytest.approx(math.log(3) / 2)
    wanted = -(0.4 * math.log(0.4) + 3 * 0.2 * math.log(0.2))
    assert judge.entropy(["abab", "a b"]) == pytest.approx(wanted)


def test_rows_of_the_report(judge):
    texts = [grammar.sample(i, 12) for i in range(2)]
    reference = report.Reference(frozenset(), frozenset(), texts[0], None, True, judge)
    rows = report.compare(texts, [*texts[0], *texts[1]], reference)
    nats = rows["GPT-2 nats/token"].samples
    assert rows["GPT-2 perplexity"].samples.mean == pytest.approx(math.exp(nats.mean))
    for name in (*report.GPT2_METRICS, "GPT-2 perplexity"):
        assert rows[name].samples == rows[name].held_out, name
        assert np.isfinite(rows[name].samples).all(), name
    without = report.compare(texts, texts[0] * 2, reference._replace(judge=None))
    assert not [name for name in without if "GPT-2" in name]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.safetensors", None, "has no model.safetensors: give a folder"),
        ("config.json", None, "has no config.json"),
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("model.safetensors", b"junk", "damaged"),
        ("config.json", b"{", "damaged"),
        ("config.json", {"model_type": "llama"}, r"model_type='llama'.*'gpt2'"),
        ("config.json", {"activation_function": "relu"}, "activation_function='relu'"),
        ("config.json", {"n_layer": None}, "n_layer=None"),
        ("config.json", {"n_head": 3}, "n_head=3"),
        ("config.json", {"n_layer": 4}, r"no h\.3\..* of shape"),
        ("config.json", {"n_inner": 32}, r"mlp\.c_fc.*of shape \[16, 32\]"),
        ("config.json", {"vocab_size": 20}, "has 30 tokens, and the model has 20"),
        ("tokenizer.json", b"{}", "not a tokenizer's"),
    ],
)
def test_bad_folders(name, content, says, folder, tmp_path):
    for path in folder.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    elif isinstance(content, dict):
        (tmp_path / name).write_text(json.dumps(CONFIG | content), encoding="utf-8")
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as raised:
        report._load_judge(str(tmp_path))
    assert str(raised.value).startswith(f"config.evaluate.gpt2={tmp_path}")
