# SPDX-License-Identifier: Apache-2.0
"""A folder to share holds measures that anybody can repeat, samples and a picture."""

import dataclasses
import json

import jax
import pytest
from test_known_length import lm, trainer  # noqa: F401 (fixtures)

from dlm_jax.configs import default
from dlm_jax.errors import UserError
from dlm_jax.evaluation import shared
from dlm_jax.inference import pretrained


def _with(lm, **changes):  # noqa: F811
    own = default.get_config().export.to_dict() | {"n": 16} | changes
    return dataclasses.replace(lm, config=lm.config | {"export": own})


@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory):  # noqa: F811
    lm.config["sample"].update(num_steps=2)
    return shared.export(_with(lm), str(tmp_path_factory.mktemp("run")))


def test_a_run_is_exported_with_all_its_files(folder):
    assert folder.name == "pretrained"
    names = {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    names |= {"evaluation.json", "samples.txt", "trajectory.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "samples.txt").read_text(encoding="utf-8").count("\n") == 16


def test_the_measures_are_found_again(folder):
    assert shared.check(folder) == []


def test_other_weights_are_found_out(folder, lm, tmp_path):  # noqa: F811
    """Those of a model whose last layer is scaled: it has another bound."""
    ema = jax.tree.map(lambda x: 3 * x, lm.ema)
    dataclasses.replace(lm, ema=ema).save_pretrained(tmp_path / "other")
    other = tmp_path / "other" / shared.EVALUATION
    other.write_bytes((folder / shared.EVALUATION).read_bytes())
    assert any(
        "bound of these texts" in line for line in shared.check(tmp_path / "other")
    )


def test_too_few_samples_are_refused(lm, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=r"config\.export\.n=3"):
        shared.export(_with(lm, n=3), str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(pretrained.bundled()))
def test_each_bundled_model_is_as_its_evaluation_says(name):
    folder = pretrained.bundled()[name]
    record = json.loads((folder / shared.EVALUATION).read_text(encoding="utf-8"))
    assert len(record["measures"]) >= 4
    assert shared.check(folder) == []
