# SPDX-License-Identifier: Apache-2.0
"""Published weights and checkpoint folders; what is not one is refused in one line."""

import json
import os
import sys
import types

import jax
import numpy as np
import pytest

import dlm_jax
from dlm_jax import published
from dlm_jax.diffusion import model, schedule
from dlm_jax.errors import UserError
from dlm_jax.nn.transformer import DenoiserConfig

WORDS = ["The", "Eagle", "pub", "\n", "£20"]
VOCAB = {word: i for i, word in enumerate(["START", "END", "UNK", "PAD", *WORDS])}
# as `json.dump(args.__dict__)` of the published training script, the flags that matter
ARGS = {
    "model_arch": "transformer",
    "training_mode": "e2e",
    "experiment_mode": "lm",
    "config_name": "bert-base-uncased",
    "image_size": 8,
    "in_channel": 4,
    "num_channels": 16,
    "num_heads": 4,
    "dropout": 0.1,
    "diffusion_steps": 2000,
    "noise_schedule": "sqrt",
    "predict_xstart": True,
    "learn_sigma": False,
    "class_cond": False,
    "rescale_timesteps": True,
    "timestep_respacing": "",
    "use_bert_tokenizer": "no",
    "logits_mode": 1,
    "vocab_size": len(VOCAB),
    "modality": "e2e-tgt",
    "padding_mode": "block",
    "seed": 102,
}
NEW, OLD = "ema_0.9999_000100.pt", "ema_0.9999_000050.pt"


def published_weights(hidden_dim=24, dim=4, out=None, positions=64, layers=2, seed=0):
    """A state dict of the published names and shapes, tiny, with random values."""
    rng = np.random.default_rng(seed)
    weights = {"position_ids": np.arange(positions)[None]}

    def put(name, *shape):
        weights[name] = 0.3 * rng.standard_normal(shape).astype(np.float32)

    def linear(name, rows, columns):
        put(name + ".weight", rows, columns)
        put(name + ".bias", rows)

    put("word_embedding.weight", len(VOCAB), dim)
    weights["lm_head.weight"] = weights["word_embedding.weight"]
    put("lm_head.bias", len(VOCAB))
    linear("time_embed.0", 64, 16)
    linear("time_embed.2", hidden_dim, 64)
    linear("input_up_proj.0", hidden_dim, dim)
    linear("input_up_proj.2", hidden_dim, hidden_dim)
    put("position_embeddings.weight", positions, hidden_dim)
    for i in range(layers):
        base = f"input_transformers.layer.{i}."
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{base}attention.{part}", hidden_dim, hidden_dim)
        linear(base + "intermediate.dense", 32, hidden_dim)
        linear(base + "output.dense", hidden_dim, 32)
        for part in ("attention.output", "output"):
            for kind in ("weight", "bias"):
                put(f"{base}{part}.LayerNorm.{kind}", hidden_dim)
    put("LayerNorm.weight", hidden_dim)
    put("LayerNorm.bias", hidden_dim)
    linear("output_down_proj.0", hidden_dim, hidden_dim)
    linear("output_down_proj.2", dim if out is None else out, hidden_dim)
    return weights


@pytest.fixture
def torch_stub(monkeypatch):
    """A module `torch` whose load reads NumPy's format, and only weights."""

    def load(path, *, map_location, weights_only):
        assert map_location == "cpu"
        assert weights_only is True
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    stub = types.ModuleType("torch")
    stub.load = load
    monkeypatch.setitem(sys.modules, "torch", stub)


def write(folder, weights=None, *, vocab=VOCAB, **flags):
    """A checkpoint folder for the stub; its older file holds other weights."""
    folder.mkdir(exist_ok=True)
    (folder / "training_args.json").write_text(
        json.dumps(ARGS | flags, indent=2), encoding="utf-8"
    )
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    for name, seed in ((NEW, 0), (OLD, 1)):
        with (folder / name).open("wb") as file:
            np.savez(
                file, **(published_weights(seed=seed) if weights is None else weights)
            )
    return folder


def one_line(folder):
    """The line with which loading the folder is refused."""
    with pytest.raises(UserError) as caught:
        dlm_jax.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- weights


def golden_weights(golden):
    return {name[2:]: v for name, v in golden.items() if name.startswith("w/")}


@pytest.mark.parametrize("part", [0, 1, 2])
def test_query_key_and_value_are_thirds_of_qkv(golden, part):
    weights = golden_weights(golden)
    _, before = published.from_reference(weights, heads=4)
    name = ("query", "key", "value")[part]
    changed = f"input_transformers.layer.1.attention.self.{name}.weight"
    _, after = published.from_reference(
        weights | {changed: weights[changed] + 1.0}, heads=4
    )
    difference = jax.tree.map(lambda a, b: a - b, after, before)
    moved = difference.denoiser["trunk"]["layer_1"]["attention"]["qkv"].pop("kernel")
    thirds = np.split(np.asarray(moved), 3, -1)
    for i, third in enumerate(thirds):
        np.testing.assert_allclose(third, float(i == part), atol=1e-6)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(difference))


def test_every_weight_goes_somewhere_and_once():
    """Our parameters are the published values, each once, but the tied copy."""
    weights = published_weights()
    _, params = published.from_reference(weights, heads=12)
    del weights["position_ids"], weights["lm_head.weight"]
    ours = np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])
    theirs = np.concatenate([np.ravel(x) for x in weights.values()])
    np.testing.assert_array_equal(np.sort(ours), np.sort(theirs))


def test_the_tree_is_that_of_a_fresh_model():
    cfg, params = published.from_reference(published_weights(), heads=12)
    assert (cfg.layers, cfg.hidden_dim, cfg.mlp_dim, cfg.dim, cfg.time_dim) == (
        2,
        24,
        32,
        4,
        16,
    )
    fresh = jax.eval_shape(lambda: model.init(jax.random.key(0), cfg, len(VOCAB)))
    assert jax.tree.structure(fresh) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), fresh, params)


def test_the_table_is_the_one_load_state_dict_leaves():
    """Both tied names fill one tensor, lm_head.weight last; gradients have one name."""
    weights = published_weights()
    weights["lm_head.weight"] = weights["word_embedding.weight"] + 1.0
    table = published.from_reference(weights, heads=12)[1].table
    np.testing.assert_array_equal(table, weights["lm_head.weight"])
    del weights["lm_head.weight"]
    table = published.from_reference(weights, heads=12)[1].table
    np.testing.assert_array_equal(table, weights["word_embedding.weight"])


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.bias",
        "LayerNorm.weight",
        "input_transformers.layer.0.attention.self.key.bias",
        "input_transformers.layer.1.output.dense.weight",
    ],
)
def test_a_missing_weight_is_named(name):
    weights = published_weights()
    del weights[name]
    with pytest.raises(UserError, match=f"^{name}: not among the"):
        published.from_reference(weights, heads=12)


@pytest.mark.parametrize(
    ("vocab", "dim", "count"), [(821, 16, 87_129_749), (11_043, 128, 88_712_483)]
)
def test_parameter_counts_of_the_published_models(vocab, dim, count):
    """docs/method.md, section 2.5: counted on the published network, E2E and ROCStories."""
    cfg = DenoiserConfig(dim=dim)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), cfg, vocab))
    assert model.count(shapes) == count


# --- folders


@pytest.mark.usefixtures("torch_stub")
def test_a_folder_becomes_a_model_that_samples(tmp_path):
    lm = dlm_jax.load(write(tmp_path))
    assert lm.length == 64
    assert lm.cfg.predicts == "x0"
    assert lm.cfg.heads == 12
    assert lm.tokenizer.tokens() == list(VOCAB)
    table = schedule.discretize(schedule.SCHEDULES["sqrt"](), 2000).log_alpha_bar_table
    np.testing.assert_array_equal(lm.schedule.log_alpha_bar_table, table)
    texts = lm.sample(3, num_steps=4, seed=1)
    assert len(texts) == 3
    assert all(isinstance(text, str) for text in texts)
    assert texts == lm.sample(3, num_steps=4, seed=1)


@pytest.mark.usefixtures("torch_stub")
def test_the_newest_average_is_read(tmp_path):
    folder = write(tmp_path)
    # later by name, not by step; a lower rate of the same step; the raw weights
    np.savez((folder / "ema_0.9999_00099.pt").open("wb"), **published_weights(seed=2))
    np.savez((folder / "ema_0.99_000100.pt").open("wb"), **published_weights(seed=3))
    np.savez((folder / "model000200.pt").open("wb"), **published_weights(seed=4))
    want = published_weights(seed=0)["word_embedding.weight"]
    np.testing.assert_array_equal(dlm_jax.load(folder).ema.table, want)


@pytest.mark.usefixtures("torch_stub")
def test_flags_reach_network_schedule_and_rounding(tmp_path):
    flags = {"predict_xstart": False, "logits_mode": 2, "noise_schedule": "cosine"}
    lm = dlm_jax.load(write(tmp_path, diffusion_steps=50, image_size=4, **flags))
    assert lm.cfg.predicts == "eps"
    assert (lm.schedule.num_steps, lm.length) == (50, 16)
    cosine = schedule.discretize(schedule.SCHEDULES["cosine"](), 50)
    np.testing.assert_array_equal(
        lm.schedule.log_alpha_bar_table, cosine.log_alpha_bar_table
    )
    found = lm.generate(2, num_steps=3)
    # -|x - E_v|, the published logits_mode 2, is largest at the nearest word
    apart = np.asarray(found.latents)[:, :, None] - np.asarray(lm.ema.table)
    scores = -np.linalg.norm(apart, axis=-1)
    np.testing.assert_array_equal(found.ids, np.argmax(scores, -1))


@pytest.mark.usefixtures("torch_stub")
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"model_arch": "1d-unet"}, "model_arch='1d-unet' is not read, only 'transf"),
        ({"training_mode": "emb"}, "training_mode='emb'"),
        ({"experiment_mode": "conditional_gen"}, "experiment_mode='conditional_gen'"),
        ({"config_name": "bert-large-uncased"}, "config_name='bert-large-uncased'"),
        ({"learn_sigma": True}, "learn_sigma=True"),
        ({"rescale_timesteps": False}, "rescale_timesteps=False"),
        ({"timestep_respacing": "200"}, "timestep_respacing='200'"),
        ({"noise_schedule": "gumbel"}, "noise_schedule='gumbel'"),
        ({"logits_mode": 3}, "logits_mode=3"),
        ({"image_size": "8"}, "image_size='8' must be of type int"),
        ({"diffusion_steps": None}, "diffusion_steps=None must be of type int"),
        ({"image_size": 16}, "64 positions for image_size=16 squared"),
    ],
)
def test_flags_of_another_model_are_refused(tmp_path, flags, named):
    assert named in one_line(write(tmp_path, **flags))


def swap(name, new):
    return {new if key == name else key: i for key, i in VOCAB.items()}


@pytest.mark.usefixtures("torch_stub")
@pytest.mark.parametrize(
    ("vocab", "named"),
    [
        (VOCAB | {"pub": 17}, "ids must be 0.."),
        (VOCAB | {"pub": 5}, "ids must be 0.."),
        (VOCAB | {"pub": "6"}, "ids must be 0.."),
        (swap("PAD", "pad"), "START END UNK PAD first"),
        (VOCAB | {"more": 9}, "9 embeddings for the 10 words of vocab.json"),
        (list(VOCAB), "not a JSON object"),
    ],
)
def test_a_bad_vocabulary_is_refused(tmp_path, vocab, named):
    line = one_line(write(tmp_path, vocab=vocab))
    assert named in line
    assert "vocab.json" in line


@pytest.mark.usefixtures("torch_stub")
def test_a_broken_folder_is_refused(tmp_path):
    folder = write(tmp_path)
    (folder / "vocab.json").unlink()
    assert "vocab.json: No such file" in one_line(folder)
    (folder / "vocab.json").write_text('{"START": 0,', encoding="utf-8")
    assert "vocab.json: not JSON" in one_line(folder)
    write(tmp_path)
    (folder / "training_args.json").write_text("[]", encoding="utf-8")
    assert "training_args.json: not a JSON object" in one_line(folder)
    write(tmp_path)
    for name in (NEW, OLD):
        (folder / name).unlink()
    assert "no ema_*.pt" in one_line(folder)
    (folder / NEW).write_bytes(b"")
    assert f"{NEW}: damaged or not of torch" in one_line(folder)


@pytest.mark.usefixtures("torch_stub")
@pytest.mark.parametrize(
    ("weights", "named"),
    [
        (
            {"head.weight": np.zeros(3)},
            "word_embedding.weight: not among the 1 weights",
        ),
        (
            published_weights(out=8),
            "8 outputs for embeddings of 4; a network that learns",
        ),
        (
            published_weights(hidden_dim=20),
            "a width of 20 does not divide by 12 heads",
        ),
    ],
)
def test_other_weights_are_refused(tmp_path, weights, named):
    line = one_line(write(tmp_path, weights))
    assert named in line
    assert NEW in line


def test_without_torch_the_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert f"{NEW}: reading it needs torch" in one_line(write(tmp_path))


def test_a_run_of_our_own_is_not_taken_for_a_published_one(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert not published.is_reference(tmp_path)
    assert "no checkpoint" in one_line(tmp_path)


# --- with torch itself


def test_torch_file_as_the_published_code_saves_it(tmp_path):
    torch = pytest.importorskip("torch")
    folder, weights = write(tmp_path), published_weights(seed=7)
    # averages are Parameters; lm_head.weight and the buffer are the raw model's tensors
    state = {
        name: torch.from_numpy(value)
        if name in ("lm_head.weight", "position_ids")
        else torch.nn.Parameter(torch.from_numpy(value))
        for name, value in weights.items()
    }
    torch.save(state, folder / NEW)
    lm = dlm_jax.load(folder)
    want = published.from_reference(weights, heads=12)[1]
    jax.tree.map(np.testing.assert_array_equal, lm.ema, want)
    half = {name: value.detach().bfloat16() for name, value in state.items()}
    torch.save(half, folder / NEW)
    table = half["lm_head.weight"].float().numpy()
    np.testing.assert_array_equal(dlm_jax.load(folder).ema.table, table)


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_in_a_torch_file_is_refused_not_run(tmp_path):
    torch = pytest.importorskip("torch")
    folder, made = write(tmp_path), tmp_path / "made"
    torch.save({"word_embedding.weight": Payload(str(made))}, folder / NEW)
    assert f"{NEW}: holds more than weights" in one_line(folder)
    assert not made.exists()
    torch.save(torch.zeros(3), folder / NEW)
    assert f"{NEW}: holds a Tensor" in one_line(folder)
    (folder / NEW).write_bytes(b"junk")
    assert f"{NEW}: damaged or not of torch" in one_line(folder)
