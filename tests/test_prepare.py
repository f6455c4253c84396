# SPDX-License-Identifier: Apache-2.0
"""Preparing: the rows of the text as it is trained on in memory."""

import csv
import itertools
import json
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
    config.data.source, config.data.path = "prepared", str(tmp_path / "p")
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


def _fails(says, call, *args):
    with pytest.raises(UserError, match=says) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


def test_mistakes_are_one_line(tmp_path):
    config = _config(tmp_path)
    prepare.prepare_data(config, str(tmp_path / "p"))
    _fails("prepared already", prepare.prepare_data, config, str(tmp_path / "p"))
    config.data.source, config.data.path = "prepared", str(tmp_path / "p")
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
