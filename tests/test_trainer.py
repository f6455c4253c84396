# SPDX-License-Identifier: Apache-2.0
"""Training: the step is one function of the global batch, wherever its rows lie."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.configs import smoke
from dlm_jax.data import batching, corpus
from dlm_jax.diffusion import time_sampling
from dlm_jax.errors import UserError
from dlm_jax.runtime import checkpoint, logging, sharding
from dlm_jax.training import loop, train_step, validation
from dlm_jax.training.config import resolve_config
from dlm_jax.training.trainer import NonFiniteError, Trainer, language_job

BATCH, LENGTH, DIM, VOCAB, T = 16, 6, 8, 11, 20
STEPS = 6
KEY = jax.random.key(5)
SMALL = {
    "data.length": LENGTH,
    "model.layers": 1,
    "model.hidden_dim": 16,
    "model.mlp_dim": 16,
    "model.dim": DIM,
    "model.positions": LENGTH,
    "train.batch": BATCH,
    "sample.num_steps": 2,
    "optim.warmup": 0,
    "optim.eps": 1e-3,  # else Adam turns rounding errors of tiny gradients into steps
}
TABLE = {"schedule.name": "sqrt", "schedule.num_steps": T, "schedule.scale": 0.0}
X0 = {
    **TABLE,
    "model.trunk": "post_ln",
    "model.predicts": "x0",
    "model.self_cond": False,
    "embedding.normalize": False,
    "loss.objective": "x0",
    "loss.time_sampler": "antithetic",
    "loss.self_cond_prob": 0.0,
    "loss.mask_pad": True,
}
CONFIGS = {
    "ce": {"loss.self_cond_prob": 1.0},
    "x0": {
        **X0,
        "model.self_cond": True,
        "embedding.frozen": True,
        "loss.time_sampler": "importance",
        "loss.self_cond_prob": 1.0,
    },
}


@functools.cache
def _step_cfg(name, **changes):
    config = smoke.get_config()
    config.update_from_flattened_dict(SMALL | CONFIGS[name])
    return resolve_config(config)._replace(**changes)


@functools.cache
def _start(name):
    step_cfg = _step_cfg(name)
    return jax.jit(lambda key: train_step.init_state(key, step_cfg, VOCAB))(
        jax.random.key(0)
    )


@functools.cache
def _ids():
    return np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)


@functools.cache
def _step(name, devices=1, **changes):
    """The step on the whole batch; on several devices by pmap's meaning, `vmap`."""
    step_cfg = _step_cfg(name, **changes)
    if devices == 1:
        return jax.jit(functools.partial(train_step.train_step, step_cfg=step_cfg))
    one = functools.partial(train_step.train_step, step_cfg=step_cfg, axis="data")
    mapped = jax.jit(jax.vmap(one, in_axes=(None, None, 0), axis_name="data"))

    def step(key, state, ids):
        out = mapped(key, state, ids.reshape(devices, -1, ids.shape[-1]))
        first = jax.tree.map(lambda x: x[0], out)
        for x, whole in zip(*map(jax.tree.leaves, (first, out)), strict=True):
            np.testing.assert_array_equal(whole, np.broadcast_to(x, whole.shape))
        return first

    return step


def _assert_close(a, b, atol=2e-5):
    paths = jax.tree_util.tree_leaves_with_path(a)
    for (path, x), y in zip(paths, jax.tree.leaves(b), strict=True):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4, err_msg=where)


# --- one function of the global batch


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "devices", "accumulate"),
    [("ce", 8, 1), ("ce", 1, 4), ("x0", 2, 4)],
)
def test_rows_may_lie_on_devices_and_in_microbatches(name, devices, accumulate):
    """Times, noise, self-conditioning and moments follow from the global row."""
    start = _start(name)
    whole = _step(name)(KEY, start, _ids())
    split = _step(name, devices, accumulate=accumulate)(KEY, start, _ids())
    _assert_close(whole, split)
    positions = [s.params.denoiser["trunk"] for s in (start, whole[0])]
    assert not np.allclose(*(p["in"]["kernel"] for p in positions), atol=1e-3)


@pytest.mark.slow
def test_a_step_has_its_own_draws():
    """The key is folded with the step: the same state one step on differs."""
    start, step = _start("x0"), _step("x0")
    losses_ = [
        float(step(KEY, start._replace(step=jnp.asarray(i)), _ids())[1]["loss"])
        for i in (0, 0, 1)
    ]
    assert losses_[0] == losses_[1] != losses_[2]


def test_every_microbatch_has_its_own_dropout(monkeypatch):
    """With equal rows and equal draws only the dropout can tell microbatches apart."""
    step_cfg = _step_cfg("x0", accumulate=4, batch=4, time_sampler="uniform")
    step_cfg = step_cfg._replace(cfg=_with(step_cfg.cfg, dropout=0.5))
    same = train_step.make_draws(KEY, _ids()[:1], step_cfg._replace(batch=1), 0, ())
    monkeypatch.setattr(train_step, "make_draws", lambda *args: same)
    ids, start = np.repeat(_ids()[:1], 4, 0), _start("x0")
    gradients = jax.jit(lambda key: train_step._gradients(key, start, ids, step_cfg, 0))
    _, (terms, *_) = gradients(KEY)
    assert len(np.unique(np.round(terms.total(), 5))) == 4


def _with(cfg, dropout):
    return dataclasses.replace(cfg, dropout=dropout, attention_dropout=dropout)


# --- the table and the moments


def test_frozen_table_stays():
    start = _start("x0")
    after, _ = _step("x0")(KEY, start, _ids())
    np.testing.assert_array_equal(after.params.table, start.params.table)
    np.testing.assert_array_equal(after.ema.table, start.ema.table)
    assert not np.array_equal(after.params.bias, start.params.bias)


def test_normalised_table_stays_on_the_sphere():
    after, _ = _step("ce")(KEY, _start("ce"), _ids())
    assert not np.allclose(after.params.table, _start("ce").params.table, atol=1e-4)
    for params in (after.params, after.ema):
        norms = np.linalg.norm(params.table, axis=-1)
        np.testing.assert_allclose(norms, DIM**0.5, rtol=1e-5)


def test_importance_sampling_warms_up():
    """Uniform until every index has ten losses, then by their size."""
    state, step = _start("x0"), _step("x0")
    uniform = time_sampling.time_probabilities(state.moments)
    np.testing.assert_allclose(uniform, 1 / T, rtol=1e-5)
    seen = [0]
    for _ in range(60):
        state, _ = step(KEY, state, _ids())
        seen.append(int(state.moments.filled.sum()))
    assert seen[1] == BATCH
    assert seen[-1] == 10 * T
    p = time_sampling.time_probabilities(state.moments)
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-5)
    assert float(jnp.max(jnp.abs(p / uniform - 1))) > 0.1


@pytest.mark.parametrize("objective", ["x0", "vlb"])
def test_moments_hold_losses_without_their_weight(objective):
    step_cfg = _step_cfg("x0", objective=objective, batch=4, time_sampler="uniform")
    params, ids = _start("x0").params, _ids()[:4]
    draws = train_step.make_draws(KEY, ids, step_cfg, 0, ())._replace(
        t=jnp.arange(4) / T
    )

    @jax.jit
    def terms_of(weight):
        return train_step.loss_fn(params, ids, draws._replace(weight=weight), step_cfg)[
            1
        ]

    weight = jnp.asarray([0.1, 2.0, 5.0, 0.7])
    terms, empty = terms_of(weight), time_sampling.init_moments(T)
    moments = train_step._update_moments(empty, terms, draws.t, weight, None)
    unweighted = terms_of(jnp.ones(4)).total()
    np.testing.assert_allclose(moments.history[:4, 0], unweighted, rtol=1e-4)


# --- validation and stopping


def test_validation_is_deterministic_and_without_dropout():
    step_cfg = _step_cfg("x0", batch=8, self_cond_prob=0.5)
    dropped = step_cfg._replace(cfg=_with(step_cfg.cfg, dropout=0.5))
    ids = _ids()[:13]  # a batch and a part of one
    calls = [validation.Validation(ids, r, 2) for r in (step_cfg, dropped)]
    params = _start("x0").params
    found = [calls[0](params), calls[0](params), calls[1](params)]
    assert found[0] == found[1] == found[2]
    assert set(found[0]) == {"loss", "diffusion", "t0", "rounding", "prior"}


def _run_config(folder, **changes):
    path = folder / "texts.txt"
    path.write_text(
        "".join(f"w{i % 5} and w{i % 3}\n" for i in range(32)), encoding="utf-8"
    )
    config = smoke.get_config()
    options = {"data.source": "text", "data.path": str(path)}
    options |= {"train.total_steps": STEPS, "train.ckpt_steps": 3}
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(SMALL | X0 | options | dotted)
    return config


def _trainer(config, workdir):
    return Trainer(language_job(config), str(workdir))


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    table = np.ones((10, DIM), np.float32)  # five words, `and`, four specials
    table[5] = 1e38  # its square is inf
    np.save(tmp_path / "table.npy", table)
    path = str(tmp_path / "table.npy")
    config = _run_config(tmp_path, embedding__path=path)
    with pytest.raises(UserError, match="is nan at step 1: stopped") as caught:
        loop.train(config, str(tmp_path / "run"))
    assert "\n" not in str(caught.value)
    assert checkpoint.all_steps(tmp_path / "run") == []


def test_a_mistake_in_sampling_shows_before_the_training(tmp_path):
    config = _run_config(tmp_path, sample__solver="euler")
    with pytest.raises(UserError, match="solver='euler': choose"):
        loop.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_bad_metrics_and_weights_are_never_saved(name, tmp_path):
    run = _trainer(_run_config(tmp_path), tmp_path / "run")
    progress = logging.Progress(tmp_path / "m.jsonl", total=9, start=0, main=False)
    values, report = {"loss": 1.0, "grad_norm": 1.0}, loop._Report(run, progress)
    report(3, values)
    report(4, values | {name: np.inf})
    with pytest.raises(UserError, match=f"{name} is inf at step 4"):
        report.flush()
    run.state = run.state._replace(ema=jax.tree.map(lambda x: x / 0, run.state.ema))
    with pytest.raises(UserError, match="weights are not finite at step 0"):
        run.save(None)


# --- losses that are no numbers


BAD = 4  # the row of the training data that spoils its batch


@pytest.fixture
def spoilt(tmp_path, monkeypatch):
    """config(**changes) of a run in which row BAD alone gives no number."""
    draws = train_step.make_draws

    def spoil(key, ids, step_cfg, first, moments):
        found = draws(key, ids, step_cfg, first, moments)
        bad = jnp.any(jnp.all(ids == row, -1))
        return found._replace(eps_t=jnp.where(bad, jnp.nan, found.eps_t))

    def config(**changes):
        options = {"train__batch": 2, "train__total_steps": 14, "train__log_steps": 1}
        options |= {"optim__decay": "constant", "train__valid_steps": 100}
        config = _run_config(tmp_path, **options | changes)
        lines = [f"w{i % 5} and w{i % 3} w{i}" for i in range(32)]
        (tmp_path / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
        config.data.min_count = 0
        return config

    row = corpus.load_corpus(config()).train[BAD]
    monkeypatch.setattr(train_step, "make_draws", spoil)
    return config


def _rows_of(config, step):
    rows = batching.batch_index(30, seed=config.seed, step=step, batch=2)
    return " ".join(map(str, rows))


def _bad_step(config):
    return next(i for i in range(14) if str(BAD) in _rows_of(config, i).split())


@pytest.mark.slow
def test_the_rows_of_a_bad_batch_are_named(spoilt, tmp_path):
    config = spoilt()
    step = _bad_step(config)
    says = f"loss is nan at step {step + 1}: .*training data: {_rows_of(config, step)}$"
    with pytest.raises(NonFiniteError, match=says):
        loop.train(config, str(tmp_path / "run"))


@pytest.mark.slow
def test_a_bad_update_is_skipped(spoilt, tmp_path, capsys):
    config = spoilt(train__on_nonfinite="skip")
    loop.train(config, str(tmp_path / "run"))
    said = [
        line for line in capsys.readouterr().out.splitlines() if "was skipped" in line
    ]
    assert len(said) == 1
    assert _rows_of(config, _bad_step(config)) in said[0]
    state = _trainer(config, tmp_path / "run").state
    assert int(state.step) == 14
    assert sharding.finite(state._replace(step=()))


def test_a_skipped_update_leaves_all_but_the_step(spoilt, tmp_path):
    run = _trainer(spoilt(train__on_nonfinite="skip"), tmp_path / "run")
    step = jax.jit(functools.partial(train_step.train_step, step_cfg=run.step_cfg))
    after, seen = step(KEY, run.state, run.corpus.train[[BAD, 0]])
    assert np.isnan(seen["loss"])
    assert int(after.step) == 1
    same = run.state._replace(step=after.step)
    for x, y in zip(*map(jax.tree.leaves, (after, same)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_a_run_that_rolled_back_is_past_its_data_and_resumes_so(
    spoilt, tmp_path, capsys
):
    """PreemptedError after the rollback and resumed: the bits of the one that was not."""
    config = spoilt(train__on_nonfinite="rollback")
    step = _bad_step(config)
    assert 3 <= step < 11, "another seed: the test needs a checkpoint before and after"
    loop.train(config, str(tmp_path / "run"))
    assert "back to step" in capsys.readouterr().out
    saved = step // 3 * 3
    whole = _trainer(config, tmp_path / "run")
    assert whole.skipped_batches == [(saved, step + 1 - saved)]
    first = whole.row_index(saved, hosts=1)
    assert " ".join(map(str, first.ravel())) == _rows_of(config, step + 1)
    config = spoilt(train__on_nonfinite="rollback", train__total_steps=saved + 3)
    loop.train(config, str(tmp_path / "two"))
    loop.train(spoilt(train__on_nonfinite="rollback"), str(tmp_path / "two"))
    two = _trainer(spoilt(train__on_nonfinite="rollback"), tmp_path / "two")
    assert two.skipped_batches == whole.skipped_batches
    for x, y in zip(*map(jax.tree.leaves, (two.state, whole.state)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_nowhere_to_roll_back_to(spoilt, tmp_path):
    config = spoilt(train__on_nonfinite="rollback", train__ckpt_steps=100)
    with pytest.raises(NonFiniteError, match="last checkpoint is none"):
        loop.train(config, str(tmp_path / "run"))


@pytest.mark.parametrize("cut", [0, 15])
def test_metrics_go_on_after_a_line_cut_short(cut, tmp_path):
    path, options = tmp_path / "metrics.jsonl", {"total": 9, "main": True}
    first = logging.Progress(path, start=0, **options)
    for step in (1, 2):
        first.record(step, {"loss": step}, kind="train")
    path.write_bytes(path.read_bytes()[: -cut or None])
    second = logging.Progress(path, start=2, **options)
    second.record(3, {"loss": 3}, kind="train")
    found = [row["step"] for row in logging.read(path, "train")]
    assert found == ([1, 3] if cut else [1, 2, 3])
    third = logging.Progress(path, start=0, **options)
    third.record(1, {"loss": 7}, kind="train")
    assert [row["loss"] for row in logging.read(path, "train")] == [7]
    logging.Progress(path, start=0, **options)
    before = logging.read(tmp_path / "metrics_before.jsonl", "train")
    assert [row["step"] for row in before] == ([1, 3] if cut else [1, 2, 3])
    assert before[0]["loss"] == 7  # both beginnings are there
