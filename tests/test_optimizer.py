# SPDX-License-Identifier: Apache-2.0
"""Optimiser: learning rates and updates in closed form, and who is moved by what."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dlm_jax.configs import default
from dlm_jax.errors import UserError
from dlm_jax.training import optimizer

TOTAL = 40
STEPS = np.arange(TOTAL + 1)


def config(**change):
    cfg = default.get_config().optim
    cfg.update(change)
    return cfg


def normal(seed, shape, scale=1.0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)


def tree_like(tree, seed, scale=1.0):
    return jax.tree.map(lambda leaf: normal(seed, leaf.shape, scale), tree)


# --- learning rate


@pytest.mark.parametrize(
    ("decay", "share"),
    [
        ("linear", 1 - STEPS / TOTAL),
        ("cosine", (1 + np.cos(np.pi * STEPS / TOTAL)) / 2),
        ("constant", np.ones(TOTAL + 1)),
    ],
)
def test_decay(decay, share):
    """From lr at step 0; the published one is lr (1 - step / total)."""
    lr = optimizer.learning_rate(config(decay=decay, lr=3e-3), TOTAL)
    np.testing.assert_allclose([lr(s) for s in STEPS], 3e-3 * share, atol=1e-9)


@pytest.mark.parametrize("decay", optimizer.DECAYS)
def test_warm_up(decay):
    """A straight line from lr / warmup to lr, then the decay over what is left."""
    lr = optimizer.learning_rate(config(decay=decay, lr=3e-3, warmup=10), TOTAL)
    found = np.array([lr(s) for s in STEPS])
    np.testing.assert_allclose(found[:11], np.linspace(3e-4, 3e-3, 11), rtol=1e-5)
    rest = optimizer.learning_rate(config(decay=decay, lr=3e-3), TOTAL - 10)
    np.testing.assert_allclose(found[10:], [rest(s) for s in range(31)], rtol=1e-6)
    assert (found[-1] < 1e-8) == (decay != "constant")


# --- updates


def updates(cfg, params, grads):
    """What each of a list of gradients adds to the parameters."""
    adamw = optimizer.make(cfg, TOTAL)
    state, found, update = adamw.init(params), [], jax.jit(adamw.update)
    for g in grads:
        move, state = update(g, state, params)
        found.append(move)
        params = optax.apply_updates(params, move)
    return found


def test_adamw():
    """Two steps by hand, with every knob off its default."""
    lr, b1, b2, eps, decay = 0.01, 0.8, 0.95, 1e-3, 0.1
    cfg = config(
        lr=lr, b1=b1, b2=b2, eps=eps, weight_decay=decay, decay="constant", warmup=0
    )
    start, grads = normal(0, (5,)), [normal(1, (5,)), normal(2, (5,))]
    found = updates(cfg, start, grads)
    m = v = 0.0
    p = np.asarray(start, float)
    for i, g in enumerate(np.asarray(grads, float)):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1 ** (i + 1)), v / (1 - b2 ** (i + 1))
        want = -lr * (m_hat / (np.sqrt(v_hat) + eps) + decay * p)
        np.testing.assert_allclose(found[i], want, rtol=1e-4)
        p = p + want


def test_clipping():
    """A gradient tree longer than the bound is shortened to it; a shorter one is not."""
    params = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    grads = [tree_like(params, 3, scale=9.0), tree_like(params, 4, scale=0.1)]
    norms = [np.sqrt(sum(np.sum(g**2) for g in tree.values())) for tree in grads]
    assert norms[1] < 0.5 < norms[0]
    short = [{k: g * (0.5 / norms[0]) for k, g in grads[0].items()}, grads[1]]
    plain = config(eps=1.0)  # Adam forgets the scale of its gradients but for eps
    found, want = (
        updates(config(eps=1.0, clip=0.5), params, grads),
        updates(plain, params, short),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, want)
    assert np.abs(found[0]["a"] - updates(plain, params, grads)[0]["a"]).max() > 1e-6


LAYER = {
    "attention": {"qkv": {"kernel": np.zeros((16, 48)), "bias": np.zeros(48)}},
    "modulation": {"kernel": np.zeros((16, 24)), "bias": np.zeros(24)},
    "down": {"kernel": np.zeros((32, 16)), "bias": np.zeros(16)},
}
TRUNK = {"layer_0": LAYER, "in": {"kernel": np.zeros((4, 16))}}
ZEROS = {"table": np.zeros((6, 4)), "trunk": TRUNK | {"positions": np.zeros((8, 16))}}
MUON = {f"trunk/layer_0/{name}/kernel" for name in ("attention/qkv", "down")}


def test_muon():
    """The layers' kernels but the modulation's move by Muon, all others by AdamW."""
    params, grads = tree_like(ZEROS, 5), tree_like(ZEROS, 6)
    lr, decay = 0.01, 0.1
    cfg = config(name="muon", lr=lr, weight_decay=decay, decay="constant")
    (found,) = updates(cfg, params, [grads])
    nesterov = 1 + cfg.b1 / (1 + cfg.b1)  # of Adam's first step, lr sign(g) without
    seen = set()

    def check(path, move, g, p):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in MUON:
            want = -lr * (nesterov * np.sign(g) + decay * p)
            np.testing.assert_allclose(move, want, rtol=1e-4, err_msg=name)
            return
        seen.add(name)
        # orthogonal times 0.2 sqrt(longer side), so that the mean square is 0.2^2;
        # five Newton-Schulz steps leave singular values of 1 within 0.3 or so
        scale = 0.2 * max(p.shape) ** 0.5
        values = np.linalg.svd(move / -lr - decay * p, compute_uv=False) / scale
        assert np.all((values > 0.65) & (values < 1.25)), name

    jax.tree_util.tree_map_with_path(check, found, grads, params)
    assert seen == MUON


def test_average():
    """rate^n of the start and the rest of what came after, as published: no debias."""
    params = [{"w": normal(i, (3,))} for i in range(4)]
    ema = params[0]
    for p in params[1:]:
        ema = optimizer.average(ema, p, 0.9)
    want = 0.729 * params[0]["w"] + sum(
        0.1 * 0.9 ** (3 - i) * params[i]["w"] for i in (1, 2, 3)
    )
    np.testing.assert_allclose(ema["w"], want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"name": "adam"},
            r"config.optim.name='adam': did you mean 'adamw'\? choose one of adamw, muon",
        ),
        ({"decay": "slow"}, r"config.optim.decay='slow': choose one of linear, cosine"),
    ],
)
def test_unknown_names(change, message):
    with pytest.raises(UserError, match=message):
        optimizer.make(config(**change), TOTAL)
