# SPDX-License-Identifier: Apache-2.0
"""Preparing: the rows of the text as it is trained on in memory."""

import csv
import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dlm_jax.configs import smoke
from dlm_jax.data import array_record, corpus, prepare, sources
from dlm_jax.errors import UserError
from dlm_jax.training import loop
from dlm_jax.training.trainer import Trainer, language_job

TEXTS = [f"w{i % 7} and w{i % 3} are {'very ' * (i % 4)}near" for i in range(97)]


def _config(folder, **changes):
    (folder / "t.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    (folder / "t.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in TEXTS), encoding="utf-8"
    )
    with (folder / "t.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("label", "text"), *(("a\nb", t) for t in TEXTS)])
    config = smoke.get_config()
    options = {"data.source": "text", "data.path": str(folder / "t.txt")}
    options |= {"data.length": 12, "data.min_count": 2}
    if changes.get("data__source") == "stream":
        options["data.valid_path"] = str(folder / "t.txt")
    options |= {name.replace("__", "."): value for name, value in changes.items()}
    if options["data.source"] in ("csv", "jsonl"):
        options["data.path"] = str(folder / f"t.{options['data.source']}")
    if options["data.source"] == "grammar":
        options["data.path"] = ""
    config.update_from_flattened_dict(options)
    return config


KINDS = {
    "pad": {},
    "block": {"data__mode": "block"},
    "wrap": {"data__mode": "wrap"},
    "crop": {"data__mode": "crop", "data__tokenizer": "char", "data__source": "stream"},
    "csv": {"data__source": "csv"},
    "jsonl": {"data__source": "jsonl"},
    "pieces": {
        "data__tokenizer": "sentencepiece",
        "data__vocab_size": 23,
        "data__length": 32,
    },
    "dropped": {"data__length": 8, "data__too_long": "drop"},
    "grammar": {"data__source": "grammar", "data__length": 48},
}


@pytest.mark.parametrize("name", KINDS)
def test_the_same_rows_as_in_memory(name, tmp_path, monkeypatch):
    """Some texts at a time, from a file that is read line by line."""
    monkeypatch.setattr(prepare, "CHUNK", 10)
    config = _config(tmp_path, **KINDS[name])
    whole = corpus.load_corpus(config)
    prepare.prepare_data(config, str(tmp_path / "p"))
    config.data.update(source="prepared", path=str(tmp_path / "p"), valid_path="")
    found = corpus.load_corpus(config)
    assert found.tokenizer == whole.tokenizer
    for one, other in ((found.train, whole.train), (found.valid, whole.valid)):
        np.testing.assert_array_equal(one[: len(one)], other)


@pytest.mark.parametrize("source", ["text", "csv", "jsonl"])
def test_files_are_read_on_demand(source, tmp_path):
    """A line that cannot be read is not met by who asks for the texts before it."""
    cfg = _config(tmp_path, data__source=source).data
    assert sources.count(cfg, "train") == 92
    with open(cfg.path, "ab") as file:
        file.write(b"\n\xff\n")
    texts = sources.FILES[source](Path(cfg.path), cfg)
    assert list(itertools.islice(texts, len(TEXTS))) == TEXTS
    with pytest.raises(UserError, match="UTF-8"):
        next(texts)


@pytest.mark.slow
def test_a_run_on_prepared_data_has_the_same_bits(tmp_path):
    config = _config(tmp_path, train__total_steps=4, train__valid_steps=2)
    prepare.prepare_data(config, str(tmp_path / "p"))
    states = []
    for source, path in (("text", "t.txt"), ("prepared", "p")):
        config.data.source, config.data.path = source, str(tmp_path / path)
        workdir = str(tmp_path / f"run_{source}")
        loop.train(config, workdir)
        states.append(Trainer(language_job(config), workdir).state)
    np.testing.assert_array_equal(*(state.params.table for state in states))
    assert array_record.read_texts(str(tmp_path / "p"), "valid") == TEXTS[-5:]


class Killed(BaseException):
    """As kill -9: nothing tidies up."""


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("mode", ["pad", "wrap"])
def test_an_interrupted_preparation_is_resumed_to_the_same_bytes(
    mode, tmp_path, monkeypatch
):
    """Killed at every chunk in turn; what is complete is not encoded again."""
    for module, name, value in (
        (prepare, "CHUNK", 10),
        (array_record, "PAGE", 4),
        (array_record, "SHARD", 3),
    ):
        monkeypatch.setattr(module, name, value)
    config = _config(tmp_path, data__mode=mode)
    prepare.prepare_data(config, str(tmp_path / "whole"))
    encode, calls, resumed = prepare.encode_stream, [], 0

    def killed(texts, tok, cfg, left):
        for chunk in encode(texts, tok, cfg, left):
            calls.append(chunk[0][0])
            yield chunk
            if len(calls) == at:
                raise Killed

    monkeypatch.setattr(prepare, "encode_stream", killed)
    for last in range(1, 11):
        at = last
        folder = tmp_path / f"killed {last}"
        with pytest.raises(Killed):
            prepare.prepare_data(config, str(folder))
        assert not (folder / array_record.MANIFEST).exists()
        before, calls, at = set(calls), [], 0
        prepare.prepare_data(config, str(folder))
        resumed, calls = resumed + len(before - set(calls)), []
        assert _files(folder) == _files(tmp_path / "whole")
    assert resumed > 10


KILLED = """
import os, signal, sys
from dlm_jax.configs import smoke
from dlm_jax.data import array_record, prepare

prepare.CHUNK, array_record.PAGE, array_record.SHARD = 10, 4, 3
encode, config = prepare.encode_stream, smoke.get_config()


def killed(*args):
    for i, chunk in enumerate(encode(*args)):
        if i == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        yield chunk


prepare.encode_stream = killed
config.data.update(source="text", path=sys.argv[1], length=12, min_count=2)
prepare.prepare_data(config, sys.argv[2])
"""


@pytest.mark.slow
def test_a_killed_process_is_resumed_to_the_same_bytes(tmp_path, monkeypatch):
    config = _config(tmp_path)
    paths = [config.data.path, str(tmp_path / "p")]
    code = [sys.executable, "-c", KILLED, *paths]
    assert subprocess.run(code, timeout=600).returncode == -signal.SIGKILL
    begun = json.loads((tmp_path / "p" / prepare.PROGRESS).read_text("utf-8"))
    assert begun["at"]["pages"] == 15
    for module, name, value in (
        (prepare, "CHUNK", 10),
        (array_record, "PAGE", 4),
        (array_record, "SHARD", 3),
    ):
        monkeypatch.setattr(module, name, value)
    for folder in ("p", "whole"):
        prepare.prepare_data(config, str(tmp_path / folder))
    assert _files(tmp_path / "p") == _files(tmp_path / "whole")


def test_an_unfinished_preparation_of_other_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 10)
    monkeypatch.setattr(array_record, "PAGE", 4)
    monkeypatch.setattr(array_record, "SHARD", 3)
    config, folder = _config(tmp_path), str(tmp_path / "p")

    def killed(*args):
        raise Killed

    monkeypatch.setattr(prepare, "_manifest", killed)
    with pytest.raises(Killed):
        prepare.prepare_data(config, folder)
    config.data.length = 13
    says = "unfinished preparation with another config.data.length: remove it"
    _fails(says, prepare.prepare_data, config, folder)
    config.data.length = 12
    Path(config.data.path).write_text("other\n" * 99, encoding="utf-8")
    _fails("with another file: remove it", prepare.prepare_data, config, folder)
    (tmp_path / "p" / prepare.PROGRESS).write_text("{", encoding="utf-8")
    _fails("progress.json is damaged", prepare.prepare_data, config, folder)


def test_a_mistake_may_be_corrected_in_the_same_folder(tmp_path):
    config, folder = _config(tmp_path, data__length=4), str(tmp_path / "p")
    _fails("more than config.data.length=4", prepare.prepare_data, config, folder)
    config.data.length = 12
    prepare.prepare_data(config, folder)
    assert not (tmp_path / "p" / prepare.PROGRESS).exists()


def test_the_manifest_names_protocol_tokenizer_and_counts(tmp_path):
    config = _config(tmp_path, data__mode="wrap")
    prepare.prepare_data(config, str(tmp_path / "p"))
    path = tmp_path / "p" / array_record.MANIFEST
    manifest = json.loads(path.read_text("utf-8"))
    train, valid, tok, _ = array_record.load_prepared(str(tmp_path / "p"))
    assert manifest["protocol"] == (
        f"wrap (packed), 12 tokens per row of {tok.vocab_size} ids, word tokenizer, "
        "text text"
    )
    assert manifest["rows"] == {"train": len(train), "valid": len(valid)}
    assert manifest["texts"] == {"train": 92, "valid": 5}
    assert manifest["tokens"]["valid"] == np.sum(valid[:] > 3)
    manifest["tokenizer"]["words"][0] += "x"
    path.write_text(json.dumps(manifest), encoding="utf-8")
    says = "another tokenizer than the data's"
    _fails(says, array_record.read_manifest, tmp_path / "p")


def test_what_does_not_fit_prepared_data_is_one_line(tmp_path):
    """A padded config on packed rows, another tokenizer, a shard that is missing."""
    config = _config(tmp_path, data__mode="wrap")
    prepare.prepare_data(config, str(tmp_path / "p"))
    config.data.update(source="prepared", path=str(tmp_path / "p"), mode="pad")
    _fails("mode=pad: .*p was prepared with wrap", corpus.load_corpus, config)
    config.data.update(mode="wrap", tokenizer_path="tokenizer.json")
    _fails("tokenizer_path=.* no effect with prepared", corpus.load_corpus, config)
    config.data.tokenizer_path = ""
    (tmp_path / "p" / "train-00000.array_record").unlink()
    _fails("train-00000.array_record is missing", corpus.load_corpus, config)


@pytest.mark.parametrize("at", ["memory", "prepared"])
def test_training_takes_any_window_of_a_stream(at, tmp_path):
    """crop: a row of a batch begins at any character; the same from memory and disk."""
    config = _config(tmp_path, **KINDS["crop"])
    if at == "prepared":
        prepare.prepare_data(config, str(tmp_path / "p"))
        config.data.update(source="prepared", path=str(tmp_path / "p"), valid_path="")
    trainer = Trainer(language_job(config), str(tmp_path / "run"))
    stream = np.asarray(trainer.corpus.train[: len(trainer.corpus.train)]).ravel()
    index = trainer.row_index(0, hosts=1)
    assert np.any(index % 12)
    expected = stream[index[..., None] + np.arange(12)]
    np.testing.assert_array_equal(
        np.asarray(trainer.batch(0)).ravel(), expected.ravel()
    )


def _fails(says, call, *args):
    with pytest.raises(UserError, match=says) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


def test_mistakes_are_one_line(tmp_path):
    config = _config(tmp_path)
    prepare.prepare_data(config, str(tmp_path / "p"))
    _fails("prepared already", prepare.prepare_data, config, str(tmp_path / "p"))
    config.data.update(source="prepared", path=str(tmp_path / "p"), valid_path="")
    _fails("name the text", prepare.prepare_data, config, str(tmp_path / "q"))
    pairs = _config(tmp_path, data__source="jsonl", data__source_column="source")
    _fails("pairs are not prepared", prepare.prepare_data, pairs, str(tmp_path / "q"))
    config.data.length = 16
    _fails("length=16: .* prepared with 12", corpus.load_corpus, config)
    config.data.path = str(tmp_path)
    _fails("--mode prepare_data", corpus.load_corpus, config)
    config = _config(tmp_path, data__source="jsonl", data__tokenizer="sentencepiece")
    config.data.valid_path = config.data.path
    (tmp_path / "none.jsonl").touch()
    for name in ("path", "valid_path"):
        config.data[name] = str(tmp_path / "none.jsonl")
        _fails(
            "none.jsonl holds no text",
            prepare.prepare_data,
            config,
            str(tmp_path / "e"),
        )
        config.data[name] = str(tmp_path / "t.jsonl")
    assert not (tmp_path / "e").exists()
    config = _config(tmp_path, data__length=4)
    _fails(
        "more than config.data.length=4",
        prepare.prepare_data,
        config,
        str(tmp_path / "r"),
    )
    config = _config(tmp_path, data__length=4, data__too_long="drop")
    _fails("no row", prepare.prepare_data, config, str(tmp_path / "s"))
    assert not (tmp_path / "s" / array_record.MANIFEST).exists()
