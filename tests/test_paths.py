# SPDX-License-Identifier: Apache-2.0
"""A run is what it was, wherever its files are; a flag has an effect or is refused."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags
from test_checkpoint import _config, _digest, _saved

from dlm_jax import main
from dlm_jax.data import corpus, prepare, sources
from dlm_jax.errors import UserError
from dlm_jax.inference import loading
from dlm_jax.runtime import checkpoint, paths, sharding
from dlm_jax.training import loop
from dlm_jax.training.trainer import Trainer, language_job

WORDS = [f"word{i % 5} is not word{i % 3}" for i in range(32)]
WRITERS = {
    "text": lambda texts: "\n".join(texts) + "\n",
    "csv": lambda texts: "\n".join(["text", *texts]) + "\n",
    "jsonl": lambda texts: "".join(json.dumps({"text": t}) + "\n" for t in texts),
    "e2e": lambda texts: "".join(f"name : x||{text}\n" for text in texts),
}
SOURCES = (*WRITERS, "prepared")


def _write(source, folder, texts=WORDS):
    """Writes the texts as a source; returns the path of what config.data.path names."""
    folder.mkdir()
    if source != "prepared":
        (folder / "texts").write_text(WRITERS[source](texts), encoding="utf-8")
        return folder / "texts"
    raw = str(_write("text", folder / "raw", texts))
    prepare.prepare_data(_config(raw), str(folder))
    return folder


def _run(source, path, **changes):
    return _config(str(path), data__source=source, **changes)


def _resumes(config, workdir):
    return int(Trainer(language_job(config), str(workdir)).state.step)


@pytest.fixture(scope="module", params=SOURCES)
def run(request, tmp_path_factory):
    """(source, folder with `data` and `run`): a run that was begun from its folder."""
    source, folder = request.param, tmp_path_factory.mktemp(request.param)
    before = os.getcwd()
    os.chdir(folder)
    try:
        path = _write(source, folder / "data").relative_to(folder)
        trainer = Trainer(language_job(_run(source, path)), "run")
        trainer.state = trainer.state._replace(step=trainer.state.step + 1)
        writer = checkpoint.manager("run", keep=2)
        trainer.save(writer)
        writer.close()
    finally:
        os.chdir(before)
    return source, folder


@pytest.fixture
def moved(run, tmp_path):
    """(source, the new path of the text, the run): both are moved."""
    source, folder = run
    shutil.copytree(folder / "run", tmp_path / "run")
    path = tmp_path / "new"
    shutil.copytree(folder / "data", path)
    return source, path if source == "prepared" else path / "texts", tmp_path / "run"


def test_text_that_moved_is_the_same_text(moved, monkeypatch):
    """By an absolute path, and by one relative to any folder."""
    source, path, workdir = moved
    assert _resumes(_run(source, path), workdir) == 1
    monkeypatch.chdir(path.parent)
    assert _resumes(_run(source, path.name), workdir) == 1


def test_other_text_is_refused_in_the_same_place(run, tmp_path):
    source, folder = run
    workdir = shutil.copytree(folder / "run", tmp_path / "run")
    before = _digest(workdir)
    other = _write(source, tmp_path / "data", WORDS[::-1])
    with pytest.raises(UserError, match=r"not the one that .* was begun with"):
        _resumes(_run(source, other), workdir)
    assert _digest(workdir) == before


def test_a_run_of_before_an_option_came_resumes_and_is_evaluated(tmp_path):
    """Its saved config lacks the option."""
    path = _write("csv", tmp_path / "data")
    trainer = Trainer(language_job(_run("csv", path)), str(tmp_path / "run"))
    for name in loading.LATER:
        del trainer.record["data"][name]
    checkpoint.write_run_config(tmp_path / "run", trainer.record)
    writer = checkpoint.manager(tmp_path / "run", keep=2)
    trainer.save(writer)
    writer.close()
    assert _resumes(_run("csv", path), tmp_path / "run") == 0
    lm = loading.load(tmp_path / "run")
    again = corpus.load_corpus(ConfigDict(lm.config), lm.tokenizer)
    assert again.identity() == trainer.corpus.identity()


@pytest.mark.parametrize("source", ["text", "jsonl", "prepared", "grammar"])
def test_a_delimiter_without_columns_is_refused(source, tmp_path):
    path = "" if source == "grammar" else _write(source, tmp_path / "data")
    config = _run(source, path, data__delimiter=";")
    with pytest.raises(UserError, match="delimiter=';' has no effect"):
        language_job(config).load_corpus(None)
    if source != "prepared":
        with pytest.raises(UserError, match="delimiter=';' has no effect"):
            prepare.prepare_data(config, str(tmp_path / "p"))


def test_a_file_is_no_run(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"model\.safetensors is a file: give the folder"
    ):
        loading.load(tmp_path / "model.safetensors")


def test_other_validation_text_is_refused(tmp_path):
    for name, texts in (("a", WORDS[:8]), ("b", WORDS[:8]), ("c", WORDS[1:9])):
        _write("text", tmp_path / name, texts)
    train = _write("text", tmp_path / "train")
    a, b, c = (str(tmp_path / name / "texts") for name in "abc")
    _saved(str(train), tmp_path / "run", (1,), data__valid_path=a)
    assert _resumes(_config(str(train), data__valid_path=b), tmp_path / "run") == 1
    with pytest.raises(UserError, match="validation text is not the one"):
        _resumes(_config(str(train), data__valid_path=c), tmp_path / "run")


def test_a_tokenizer_may_move_or_vanish_but_not_change(tmp_path):
    train, words = (
        str(_write("text", tmp_path / "train")),
        sorted({*" ".join(WORDS).split()}),
    )
    for name, listed in (("a", words), ("b", words), ("c", words[::-1])):
        (tmp_path / name).write_text("\n".join(listed), encoding="utf-8")
    a, b, c = (str(tmp_path / name) for name in "abc")
    run = tmp_path / "run"
    _saved(train, run, (1,), data__tokenizer_path=a)
    before = _digest(run)
    for path in (c, ""):
        with pytest.raises(
            UserError, match=r"tokenizer_path=.* was begun with, of .*/a;"
        ):
            _resumes(_config(train, data__tokenizer_path=path), run)
    with pytest.raises(UserError, match="nowhere does not exist"):
        _resumes(_config(train, data__tokenizer_path="nowhere"), run)
    assert _digest(run) == before
    assert _resumes(_config(train, data__tokenizer_path=a), run) == 1
    os.replace(c, a)
    with pytest.raises(UserError, match=r"tokenizer_path=.*not the tokenizer"):
        _resumes(_config(train, data__tokenizer_path=a), run)
    os.remove(a)
    assert _resumes(_config(train, data__tokenizer_path=a), run) == 1
    assert _resumes(_config(train, data__tokenizer_path=b), run) == 1


def test_a_run_that_trained_its_tokenizer_takes_no_other(tmp_path):
    train = str(_write("text", tmp_path / "train"))
    trained = _saved(train, tmp_path / "run", (1,)).corpus.tokenizer
    for name, words in (("a", trained.words), ("b", trained.words[::-1])):
        (tmp_path / name).write_text("\n".join(words), encoding="utf-8")
    a, b = (str(tmp_path / name) for name in "ab")
    assert _resumes(_config(train, data__tokenizer_path=a), tmp_path / "run") == 1
    with pytest.raises(UserError, match=r"tokenizer_path=.*not the tokenizer"):
        _resumes(_config(train, data__tokenizer_path=b), tmp_path / "run")


def test_a_first_table_may_move_or_vanish_but_not_change(tmp_path):
    train = str(_write("text", tmp_path / "train"))
    vocab = sources.train_tokenizer(_config(train).data, WORDS).vocab_size
    tables = np.random.default_rng(0).normal(size=(2, vocab, 8))
    for name, table in zip("abc", (*tables, tables[0]), strict=True):
        np.save(tmp_path / f"{name}.npy", table)
    a, b, c = (str(tmp_path / f"{name}.npy") for name in "abc")
    _saved(train, tmp_path / "run", (1,), embedding__path=a)
    assert _resumes(_config(train, embedding__path=c), tmp_path / "run") == 1
    with pytest.raises(UserError, match=r"config\.embedding\.path: its table"):
        _resumes(_config(train, embedding__path=b), tmp_path / "run")
    config = _config(train, embedding__path=a)
    Trainer(language_job(config), str(tmp_path / "run"))
    os.remove(a)
    assert _resumes(config, tmp_path / "run") == 1


def test_only_paths_that_exist_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    record = {"a": 1, "data": {"source": "text", "path": "x", "valid_path": ""}}
    record["classifier"] = {"model": "grammar", "task": "x"}
    record["control"] = {"classifiers": "x z y", "targets": "gs://b/x"}
    found = paths.absolute(record)
    assert found["data"] == record["data"] | {"path": str(tmp_path / "x")}
    assert found["classifier"] == record["classifier"]
    assert found["control"]["classifiers"] == f"{tmp_path}/x z {tmp_path}/y"
    assert found["control"]["targets"] == "gs://b/x"
    assert record["data"]["path"] == "x"
    record["data"].update(path="x,y", valid_path="?")
    found = paths.absolute(record)["data"]
    assert found["path"] == f"{tmp_path}/x,{tmp_path}/y"
    assert found["valid_path"] == f"{tmp_path}/?"
    record["data"].update(source="tfds", path="x")
    assert paths.absolute(record)["data"]["path"] == "x"


# --- names of folders

NAMES = ("a b", "a%41b", "a#b", "a|b", "a:b", "\u00fc", "a{b}", "~", "a\nb", "'\"$x")
UNSAFE = ("a[b]", "a*", "a?b", "a\\b")  # where what is saved may not be found again


def _arrays(folder):
    """Saves an array as a checkpoint in this folder, and reads it back."""
    state = {"ema": jnp.arange(4.0)}
    writer = checkpoint.manager(folder, keep=1)
    checkpoint.save(writer, 1, state, checkpoint.Records({}, {}, {}))
    checkpoint.wait(writer)
    writer.close()
    like = sharding.global_like(jax.eval_shape(lambda: state))
    return checkpoint.restore(folder, 1, like)["ema"]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_may_have_any_name(name, tmp_path):
    checkpoint.check_name(tmp_path / name)
    np.testing.assert_array_equal(_arrays(tmp_path / name), np.arange(4.0))


@pytest.mark.parametrize("name", UNSAFE)
def test_a_name_under_which_a_checkpoint_would_be_lost_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"choose another name"):
        loop.train(_config("unread"), str(tmp_path / name / "run"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [b"a\\b", b"\xff"])
def test_a_run_that_was_renamed_is_not_called_damaged(name, tmp_path):
    _arrays(tmp_path / "run")
    moved = (tmp_path / "run").rename(tmp_path / os.fsdecode(name))
    like = sharding.global_like(jax.eval_shape(lambda: {"ema": jnp.zeros(4)}))
    with pytest.raises(UserError, match=r"rename the folder") as caught:
        checkpoint.restore(moved, 1, like)
    assert not isinstance(caught.value, checkpoint.CorruptCheckpointError)


TRAINS_AND_LOADS = """
import sys
import dlm_jax
from dlm_jax.configs import smoke
from dlm_jax.training import loop
folder = sys.argv[1]
print(dlm_jax.load(folder + "/run").sample(1, seed=0, num_steps=1)[0].isascii())
try:
    loop.train(smoke.get_config(), folder + "/other")
except dlm_jax.UserError as error:
    print(error)
"""


def test_a_locale_without_the_characters_of_a_folder(tmp_path):
    """A run in it is read; training is refused before anything is written."""
    folder = tmp_path / "\u00fc"
    _saved(str(_write("text", tmp_path / "data")), folder / "run", (1,))
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", TRAINS_AND_LOADS, str(folder)]
    done = subprocess.run(command, env=os.environ | locale, capture_output=True)
    loaded, refused = done.stdout.decode().splitlines()
    assert loaded == "True", done.stderr
    assert "LC_ALL=C.UTF-8" in refused
    assert [path.name for path in folder.iterdir()] == ["run"]


# --- flags of the modes that load a run


@pytest.fixture
def load(monkeypatch):
    """load(mode, *flags): the model as that mode of the command loads it."""

    def load(mode, workdir, *given):
        _parse(monkeypatch, f"--mode={mode}", "--config=smoke", *given)
        main._check_flags()
        with_data = main._load if mode == "sample" else main._load_with_data
        return with_data(main.FLAGS.config, str(workdir), main.FLAGS.step)

    return load


def _parse(monkeypatch, *given):
    """Parses the command's flags anew; those of a config cannot be defined twice."""
    fresh = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=fresh)
    flags.DEFINE_string("mode", "train", "", flag_values=fresh)
    flags.DEFINE_integer("step", None, "", flag_values=fresh)
    for name in ("allow_fallback", "profile"):
        flags.DEFINE_bool(name, False, "", flag_values=fresh)
    argv = list(main._with_config_files(["main", *given]))
    monkeypatch.setattr(sys, "argv", argv)  # ml_collections reads it
    fresh(argv)
    monkeypatch.setattr(main, "FLAGS", fresh)


@pytest.mark.parametrize("mode", ["evaluate", "plot", "control"])
def test_a_path_given_to_a_mode_is_the_one_it_reads(mode, moved, load, tmp_path):
    source, path, workdir = moved
    lm = load(mode, workdir, f"--config.data.path={path}")
    assert lm.config["data"]["path"] == str(path)
    other = _write(source, tmp_path / "other", WORDS[::-1])
    with pytest.raises(UserError, match="its text is not the one"):
        load(mode, workdir, f"--config.data.path={other}")
    with pytest.raises(UserError, match="nosuch"):
        load(mode, workdir, "--config.data.path=nosuch")


REFUSED = {
    "--config.model.layers=7": r"--config\.model\.layers=7: --mode \w+ takes it from",
    "--config.data.length=9": r"--config\.data\.length=9",
    "--config.optim.lr=0.5": r"--config\.optim\.lr=0\.5",
    "--allow_fallback": "--allow_fallback: --mode",
}


@pytest.mark.parametrize("mode", ["sample", "evaluate", "plot", "control"])
@pytest.mark.parametrize("flag", REFUSED)
def test_a_flag_without_effect_is_refused(flag, mode, load, tmp_path):
    workdir = tmp_path / "run"
    _saved(str(_write("text", tmp_path / "data")), workdir, (1,))
    with pytest.raises(UserError, match=REFUSED[flag]):
        load(mode, workdir, flag)
    same = load(mode, workdir, "--config.model.layers=1", "--config.sample.n=3")
    assert same.config["sample"]["n"] == 3


@pytest.mark.parametrize("mode", ["train", "train_classifier", "prepare_data"])
def test_a_step_is_refused_where_none_is_chosen(mode, monkeypatch):
    _parse(monkeypatch, f"--mode={mode}", "--step=3")
    with pytest.raises(UserError, match=f"--step=3: --mode {mode} does not"):
        main._check_flags()
