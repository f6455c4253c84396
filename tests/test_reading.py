# SPDX-License-Identifier: Apache-2.0
"""One line says what was read, and a warning what a model cannot learn."""

import json

import pytest

from dlm_jax.configs import smoke
from dlm_jax.data import corpus, prepare
from dlm_jax.evaluation import report
from dlm_jax.inference import loading
from dlm_jax.training import loop

TEXTS = ["the cat sees a tree", "ein Café", "一 只 猫", "the cat"] * 10
SCRIPTS = {"Latin": "xylophone", "Chinese": "龍", "Arabic": "قط", "emoji": "🦜"}


def _config(folder, texts=TEXTS, source="text", **changes):
    lines = {
        "text": texts,
        "csv": ["id;text", *(f"{i};{text}" for i, text in enumerate(texts))],
        "jsonl": [json.dumps({"text": text}) for text in texts],
    }
    (folder / "t").write_text("\n".join(lines[source]), encoding="utf-8")
    config = smoke.get_config()
    config.data.update(source=source, path=str(folder / "t"), valid_fraction=0.1)
    config.data.update(**({"min_count": 0, "length": 32} | changes))
    return config


def _read(config):
    return corpus.load_corpus(config).read


@pytest.mark.parametrize("mode", ["memory", "prepared"])
@pytest.mark.parametrize("source", ["text", "csv", "jsonl"])
@pytest.mark.parametrize("tok", ["word", "sentencepiece"])
def test_one_line_counts_what_was_read(tok, source, mode, tmp_path, capsys):
    config = _config(tmp_path, source=source, tokenizer=tok, vocab_size=23)
    words, size = (sum(len(f(t)) for t in TEXTS) for f in (str.split, str.encode))
    if mode == "prepared":
        prepare.prepare_data(config, str(tmp_path / "p"))
        said = capsys.readouterr().out
        config.data.update(source="prepared", path=str(tmp_path / "p"))
        (line,) = _read(config)
        assert line.removeprefix(f"{tmp_path / 'p'}, prepared from ") in said
    else:
        (line,) = _read(config)
    assert f"{source} {tmp_path / 't'}" in line
    assert f"36 + 4 texts (train + valid), {words:,} words, " in line
    assert "0.00% UNK, 0 too long, 0 dropped, " in line
    assert line.endswith(f" {size:,} bytes")
    assert ("columns end at ';'" in line) == (source == "csv")
    if tok == "word":
        assert f" {words:,} tokens" in line


@pytest.mark.parametrize("tok", ["word", "sentencepiece"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_unknown_is_named_with_its_place(script, tok, tmp_path):
    """The last text is of the validation split, where training sees no character."""
    unseen = SCRIPTS[script]
    texts = ["a b c d e"] * 39 + [f"a b{f' {unseen}' * 9}"]
    config = _config(tmp_path, texts, tokenizer=tok, vocab_size=11, length=128)
    line, warning = _read(config)
    part = unseen if tok == "word" else unseen[0]
    assert f" UNK (first {part!r} in text 4 of valid)" in line
    assert warning.startswith("warning: ")
    remedy = {"word": "min_count=0", "sentencepiece": "byte_fallback=True"}
    assert remedy[tok] in warning
    if tok == "sentencepiece":
        config.data.update(byte_fallback=True, vocab_size=267)
        assert len(_read(config)) == 1


@pytest.mark.parametrize(("unknown", "warns"), [(1, False), (3, True)])
def test_more_than_a_hundredth_is_a_warning(unknown, warns, tmp_path):
    texts = ["x b c d e"] * unknown + ["a b c d e"] * (40 - unknown)
    assert len(_read(_config(tmp_path, texts, min_count=3))) == 1 + warns


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"too_long": "truncate"}, "2 too long (truncated), 0 dropped"),
        ({"too_long": "drop"}, "2 too long, 2 dropped (2 too long)"),
        ({"mode": "block"}, "0 too long, 0 dropped"),
    ],
)
@pytest.mark.parametrize("prepared", [False, True])
def test_long_texts_are_counted(prepared, changes, says, tmp_path):
    texts = [*TEXTS, "a " * 20, *TEXTS, "b " * 30, *TEXTS]
    config = _config(tmp_path, texts, length=12, **changes)
    if prepared:
        prepare.prepare_data(config, str(tmp_path / "p"))
        config.data.update(source="prepared", path=str(tmp_path / "p"))
    assert says in _read(config)[0]


@pytest.mark.parametrize("source", ["csv", "jsonl"])
def test_blank_rows_are_counted(source, tmp_path):
    config = _config(tmp_path, [*TEXTS, "", " ", *TEXTS], source)
    assert "72 + 8 texts" in _read(config)[0]
    assert "2 dropped (2 blank)" in _read(config)[0]


@pytest.mark.parametrize("mode", ["pad", "block", "prepared"])
def test_a_quote_that_swallows_rows_is_named(mode, tmp_path):
    """In any column: the rest is a file of single lines."""
    rows = [f"{i};the cat sees a tree" for i in range(40)]
    config = _config(tmp_path, length=12, mode="block" if mode == "block" else "pad")
    config.data.source = "csv"
    for end in ("\r\n", "\n", "\r"):
        broken = [*rows[:10], '"10;the cat', *rows[11:18], '18";the cat', *rows[19:]]
        text = end.join(["id;text", *broken])
        (tmp_path / "t").write_text(text, encoding="utf-8", newline="")
        made = config.copy_and_resolve_references()
        if mode == "prepared":
            folder = str(tmp_path / f"p{len(end)}{ord(end[0])}")
            prepare.prepare_data(config, folder)
            made.data.update(source="prepared", path=folder)
        line = _read(made)[0]
        assert f"the longest cell has 9 lines, at {tmp_path / 't'} line 12)" in line
        assert "29 + 3 texts" in line
    (tmp_path / "t").write_text("\n".join(["id;text", *rows]), encoding="utf-8")
    assert "longest cell" not in _read(config)[0]


def test_a_tokenizer_that_changes_texts_says_so(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tok = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"the": 0, "[UNK]": 1}, "[UNK]")
    )
    tok.normalizer = tokenizers.normalizers.Lowercase()
    tok.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tok.save(str(tmp_path / "tok.json"))
    path = str(tmp_path / "tok.json")
    texts = ["the the"] * 9 + ["The the"] + ["the"] * 10
    config = _config(tmp_path, texts, tokenizer="hf", tokenizer_path=path)
    line, warning = _read(config)
    assert "0.00% UNK" in line
    assert "changes 1 of the first 20 texts: text 10 of train, 'The the'" in warning


@pytest.mark.slow
def test_training_and_evaluation_print_it(tmp_path, capsys):
    config = _config(tmp_path)
    config.train.update(total_steps=1, valid_batches=1)
    config.evaluate.update(n=2, seeds=1, draws=1, nll_texts=2, num_steps=(1,))
    loop.train(config, str(tmp_path / "run"))
    said = [capsys.readouterr().out]
    report.evaluate(loading.load(str(tmp_path / "run")), str(tmp_path / "run"))
    said.append(capsys.readouterr().out)
    for lines in said:
        assert lines.count("36 + 4 texts (train + valid)") == 1


def test_a_split_of_unknown_words_is_not_hidden_by_the_other(tmp_path):
    config = _config(tmp_path, TEXTS * 50)
    (tmp_path / "v").write_text("zwei Hunde", encoding="utf-8")
    config.data.valid_path = str(tmp_path / "v")
    _, warning = _read(config)
    assert "100.0% of the tokens of valid are UNK" in warning
