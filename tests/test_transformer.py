# SPDX-License-Identifier: Apache-2.0
"""Denoiser: what its two trunks promise about time, dropout, precision and the start."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.nn import ops, transformer
from dlm_jax.nn.transformer import DenoiserConfig

TINY = DenoiserConfig(
    dim=4,
    hidden_dim=16,
    layers=1,
    heads=2,
    mlp_dim=32,
    positions=8,
    time_dim=8,
    self_cond=True,
)
# compiles in a fraction of threefry's time
key_of = functools.partial(jax.random.key, impl="unsafe_rbg")
start = jax.jit(transformer.init, static_argnums=(1, 2))
TRUNKS = {trunk: dataclasses.replace(TINY, trunk=trunk) for trunk in transformer.BLOCKS}


@pytest.fixture(scope="module", params=TRUNKS)
def cfg(request):
    return TRUNKS[request.param]


@functools.cache
def weights(cfg):
    """Not the start: adaln's gates are zero there and would hide the layers."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(
        lambda key: transformer.init(key, cfg, 11), jax.random.key(0)
    )
    return jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype("f"), shapes)


@functools.cache
def compiled(cfg):
    return jax.jit(
        lambda params, *x, key=None: transformer.apply(params, cfg, 11, *x, key=key)
    )


def run(cfg, *inputs, key=None):
    return np.asarray(compiled(cfg)(weights(cfg), *inputs, key=key))


def inputs(seed=1):
    """x_t and x0_prev [b l d], t [b]."""
    x_t, x0_prev = jax.random.normal(jax.random.key(seed), (2, 3, 6, 4))
    return x_t, jnp.array([0.0, 0.3, 0.9]), x0_prev


def test_time_features():
    """Cosines first, of 1000 t at frequencies 1 to 1e-4 (excluded)."""
    t = np.array([0.0, 0.0125, 0.9995])
    angle = 1000 * t[:, None] * 1e4 ** (-np.arange(4) / 4)
    want = np.concatenate([np.cos(angle), np.sin(angle)], -1)
    # float32 angles reach 1000: their sines are good to 1000 * 2^-24
    np.testing.assert_allclose(transformer.time_features(t, 8), want, atol=1e-4)


def test_time_per_token(cfg):
    """t [b l] with equal rows is t [b]; with unequal ones it is not."""
    x_t, t, x0_prev = inputs()
    rows = jnp.tile(t[:, None], 6)
    one, many = run(cfg, x_t, t, x0_prev), run(cfg, x_t, rows, x0_prev)
    np.testing.assert_allclose(many, one, atol=1e-6)
    other = run(cfg, x_t, rows.at[0, 0].set(0.8), x0_prev)
    assert np.abs(other[0] - one[0]).max() > 1e-3
    np.testing.assert_allclose(other[1:], one[1:], atol=1e-6)


def test_examples_do_not_meet(cfg):
    """Permuting the batch permutes the output."""
    order = np.array([2, 0, 1])
    want = run(cfg, *inputs())[order]
    found = run(cfg, *(x[order] for x in inputs()))
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_positions_meet_and_matter(cfg):
    """Attention reaches every position, and order is seen."""
    x_t, t, x0_prev = inputs()
    before = run(cfg, x_t, t, x0_prev)
    after = run(cfg, x_t.at[:, 5].add(1.0), t, x0_prev)
    assert np.all(np.abs(after - before).max(-1) > 1e-6)
    turned = run(cfg, x_t[:, ::-1], t, x0_prev[:, ::-1])[:, ::-1]
    assert np.abs(turned - before).max() > 1e-2


def test_every_input_counts(cfg):
    x_t, t, x0_prev = inputs()
    before = run(cfg, x_t, t, x0_prev)
    for change in (
        (x_t + 1, t, x0_prev),
        (x_t, t + 0.05, x0_prev),
        (x_t, t, x0_prev + 1),
    ):
        assert np.abs(run(cfg, *change) - before).max() > 1e-3


def test_estimate_needs_self_cond(cfg):
    """Without it the program does not read x0_prev, its last argument."""
    for self_cond in (True, False):
        one = dataclasses.replace(cfg, self_cond=self_cond)
        network = functools.partial(transformer.apply, weights(one), one, 11)
        jaxpr = jax.make_jaxpr(network)(*inputs()).jaxpr
        read = any(jaxpr.invars[-1] is x for e in jaxpr.eqns for x in e.invars)
        assert read == self_cond


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout"])
def test_dropout_needs_a_key(cfg, rate):
    """No key: the rates do not matter. A key: each does, and the key decides."""
    rates = {"dropout": 0.0, "attention_dropout": 0.0, rate: 0.5}
    one, x = dataclasses.replace(cfg, **rates), inputs()
    k_1, k_2 = jax.random.split(key_of(2))
    dropped = run(one, *x, key=k_1)
    assert np.abs(dropped - run(cfg, *x)).max() > 1e-3
    assert np.abs(dropped - run(one, *x, key=k_2)).max() > 1e-3
    np.testing.assert_array_equal(dropped, run(one, *x, key=k_1))
    traces = [
        jax.make_jaxpr(functools.partial(transformer.apply, weights(cfg), c, 11))(*x)
        for c in (cfg, one)
    ]
    assert str(traces[0]) == str(traces[1])


@pytest.mark.slow
def test_remat_keeps_less_and_changes_nothing(cfg):
    """The same output and gradients, dropout too; the layers' insides are not kept."""
    deep = dataclasses.replace(cfg, layers=4, dropout=0.5)
    again, found, kept = dataclasses.replace(deep, remat=True), [], []
    for c in (deep, again):

        def total(params, c=c):
            return jnp.sum(
                transformer.apply(params, c, 11, *inputs(), key=key_of(2)) ** 2
            )

        found.append(jax.jit(jax.value_and_grad(total))(weights(deep)))
        held = jax.eval_shape(lambda p, f=total: jax.vjp(f, p)[1], weights(deep))
        kept.append(sum(x.size for x in jax.tree.leaves(held)))
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    own = sum(x.size for x in jax.tree.leaves(weights(deep)))
    assert kept[1] - own < 0.3 * (kept[0] - own)


@pytest.mark.parametrize("dtype", ["mixed", "bfloat16"])
def test_half_of_the_bits(cfg, dtype):
    """bfloat16 keeps 8 bits: about 0.4% a rounding, some ten of them in a row."""
    half = dataclasses.replace(cfg, dtype=dtype)
    found, want = run(half, *inputs()), run(cfg, *inputs())
    assert found.dtype == np.float32
    error = np.linalg.norm(found - want) / np.linalg.norm(want)
    assert 1e-4 < error < 0.05
    shapes = jax.eval_shape(lambda k: transformer.init(k, half, 11), key_of(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", transformer.DTYPES)
def test_kernels_cast_before_a_chain_change_nothing(cfg, dtype):
    cfg = dataclasses.replace(cfg, dtype=dtype)
    low = transformer.cast_kernels(weights(cfg), cfg)
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(low)}
    assert kinds == {"float32", cfg.matmul_dtype}
    np.testing.assert_array_equal(compiled(cfg)(low, *inputs()), run(cfg, *inputs()))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("trunk", ["post_ln", "adaln"])
def test_fused_attention_is_attention(trunk, causal, monkeypatch):
    """What a GPU does, by XLA's form of the same function."""
    cfg = dataclasses.replace(
        TRUNKS[trunk], dtype="bfloat16", causal=causal, hidden_dim=32
    )
    rows, (x, t, before) = weights(cfg), inputs()
    args = (x[:3, :5], t[:3], before[:3, :5])
    plain = np.asarray(transformer.apply(rows, cfg, 11, *args))
    monkeypatch.setitem(ops.FUSED_ATTENTION, "cpu", "xla")
    calls, known = [], jax.nn.dot_product_attention
    spy = lambda *a, **k: calls.append(k) or known(*a, **k)  # noqa: E731
    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    fused = np.asarray(transformer.apply(rows, cfg, 11, *args))
    assert {call["implementation"] for call in calls} == {"xla"}
    assert np.linalg.norm(fused - plain) < 0.02 * np.linalg.norm(plain)
    calls.clear()
    drops = dataclasses.replace(cfg, attention_dropout=0.5)
    transformer.apply(rows, drops, 11, *args, key=key_of(0))
    assert not calls  # it has no dropout


def test_another_backend_starts_with_the_same_weights(cfg, monkeypatch):
    here = start(key_of(0), cfg, 11)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    there = transformer.init(key_of(0), cfg, 11)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-6), here, there)


def test_every_layer_drops_others(cfg):
    """Seeds differ between layers and places."""
    deep = dataclasses.replace(cfg, layers=2, dropout=0.5, attention_dropout=0.5)
    seeds = []
    original = ops.dropout

    def spy(x, seed, rate):
        seeds.append(np.asarray(seed))
        return original(x, seed, rate)

    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        patch.setattr(transformer, "dropout", spy)
        transformer.apply(weights(deep), deep, 11, *inputs(), key=key_of(5))
    assert len(seeds) == 1 + 3 * 2
    assert len({tuple(seed) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shapes", [((2, 3, 5), (2, 5, 4)), ((6, 9), (9, 2))])
@pytest.mark.parametrize("product", [ops.matmul, ops.matmul_nt])
def test_products_and_their_gradients(product, shapes, dtype):
    """Against einsum's, whichever of the two is narrower; inputs that bfloat16 keeps."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 9, shape).astype("f") for shape in shapes)
    if product is ops.matmul_nt:
        b = np.ascontiguousarray(b.swapaxes(-1, -2))
    axes = {"matmul": "...mk,...kn->...mn", "matmul_nt": "...mk,...nk->...mn"}
    g = rng.integers(-8, 9, (*a.shape[:-1], shapes[1][-1])).astype("f")

    def plain(a, b):
        return jnp.einsum(axes[product.__name__], a, b, precision="highest")

    want, back = jax.vjp(plain, a, b)
    found, mine = jax.vjp(lambda a, b: product(a, b, dtype, "float32"), a, b)
    for x, y in zip((found, *mine(g)), (want, *back(g)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("product", [ops.matmul, ops.matmul_nt])
def test_products_are_summed_before_they_are_rounded(product):
    """Returned in bfloat16, the sum of 1,000 ones is not the 256 of a sum in bfloat16."""
    ones = jnp.ones((1000, 1000), "bfloat16")[:2]
    other = jnp.ones((1000, 3) if product is ops.matmul else (3, 1000), "bfloat16")
    found, back = jax.vjp(lambda a: product(a, other, "bfloat16", "bfloat16"), ones)
    assert found.dtype == "bfloat16"
    assert np.all(np.asarray(found, "f") == 1000)
    (slope,) = back(jnp.ones_like(found))
    assert slope.dtype == "bfloat16"
    assert np.all(np.asarray(slope, "f") == 3)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_is_fair(rate):
    """The share kept of rows, columns, pairs of neighbours, and pairs of seeds."""
    shape, seeds = (256, 384), jax.random.bits(key_of(0), (8, 2))
    masks = np.stack([ops.dropout_mask(seed, shape, rate) for seed in seeds])
    p, pairs = 1 - rate, (1 - rate) ** 2

    def fair(share, expected, n):
        spread = np.sqrt(expected * (1 - expected) / n)
        worst = np.abs(np.asarray(share) - expected).max() / spread
        assert worst < 5.5  # of a thousand shares

    fair(masks.mean(), p, masks.size)
    fair(masks.mean((0, 1)), p, 8 * 256)
    fair(masks.mean((0, 2)), p, 8 * 384)
    for shift in (1, 2, 64):
        fair((masks[:, :, shift:] & masks[:, :, :-shift]).mean(), pairs, masks.size)
        fair((masks[:, shift:] & masks[:, :-shift]).mean(), pairs, masks.size)
    fair((masks[1:] & masks[:-1]).mean((1, 2)), pairs, shape[0] * shape[1])


def test_dropout_scales_and_its_gradient_has_the_same_mask():
    x, seed = np.full((64, 64), 3.0, "f"), jax.random.bits(key_of(1), (2,))
    y, back = jax.vjp(lambda x: ops.dropout(x, seed, 0.25), x)
    mask = np.asarray(ops.dropout_mask(seed, x.shape, 0.25))
    np.testing.assert_array_equal(y, np.where(mask, 4.0, 0.0))
    np.testing.assert_array_equal(back(x)[0], y)


@pytest.mark.parametrize(
    ("phi", "approximate"), [(ops.normal_cdf, False), (ops.normal_cdf_tanh, True)]
)
def test_gelu_is_the_known_one(phi, approximate):
    x = np.linspace(-6, 6, 101, dtype="f")

    def known(x):
        return jax.nn.gelu(x, approximate=approximate)

    np.testing.assert_allclose(ops.gelu(x, phi), known(x), atol=2e-6)
    slope = jax.vmap(jax.grad(lambda x: ops.gelu(x, phi)))(x)
    np.testing.assert_allclose(slope, jax.vmap(jax.grad(known))(x), atol=2e-6)


def test_a_layer_is_compiled_on_its_own(cfg):
    """On a CPU: no kernel of the last layer computes the residual stream from the first."""
    deep = dataclasses.replace(cfg, layers=3, self_cond=False)
    rows, x = weights(deep), inputs()[0]
    text = (
        jax.jit(lambda p, x, t: transformer.apply(p, deep, 11, x, t, x))
        .lower(rows, x, inputs()[1])
        .compile()
        .as_text()
    )
    calls = [line for line in text.splitlines() if " call(" in line]
    assert len(calls) == 3, "and what a layer calls is inlined in it"


def test_output_width(cfg):
    words = dataclasses.replace(cfg, predicts="logits", layers=1)
    shape = jax.eval_shape(lambda k: transformer.init(k, words, 11), jax.random.key(0))
    assert shape["head"]["kernel"].shape == (16, 11)
    assert weights(cfg)["head"]["kernel"].shape == (16, 4)


def leaves_of(tree, path=()):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves_of(value, (*path, name))
        else:
            yield (*path, name), np.asarray(value)


def check_spread(name, value, sigma, kurtosis):
    """Mean 0 and deviation sigma, to five standard errors; SE(s) by the kurtosis."""
    n = value.size
    assert abs(value.mean()) < 5 * sigma / n**0.5, name
    assert abs(value.std() - sigma) < 2.5 * sigma * ((kurtosis - 1) / n) ** 0.5, name


def test_post_ln_starts_as_published():
    """docs/method.md, section 2.5: U(-1/sqrt fan_in, +), N(0, 1) positions, norms 1 and 0."""
    cfg = DenoiserConfig(
        dim=16, hidden_dim=64, layers=1, heads=4, mlp_dim=256, positions=64
    )
    tree = start(key_of(3), cfg, 11)
    leaves = dict(leaves_of(tree))
    fans = {path[:-1]: v.shape[0] for path, v in leaves.items() if path[-1] == "kernel"}
    assert len(fans) == 2 + 3 + 4 + 1
    for path, value in leaves.items():
        if path[-1] == "scale":
            np.testing.assert_array_equal(value, 1)
        elif path[-1] == "positions":
            check_spread(path, value, 1.0, 3.0)
        elif path[:-1] not in fans:
            np.testing.assert_array_equal(value, 0)
        else:
            bound = fans[path[:-1]] ** -0.5
            assert np.abs(value).max() <= bound, path
            check_spread(path, value, bound / 3**0.5, 1.8)
    assert {p for p, v in leaves.items() if np.ptp(v) == 0} == {
        p for p in leaves if "norm" in p[-2]
    }


def test_adaln_starts_without_its_layers():
    """All gates are zero: neither the layers' weights nor the time change a thing."""
    cfg = TRUNKS["adaln"]
    params = start(key_of(4), cfg, 11)
    names = [path for path, v in leaves_of(params) if not v.any()]
    assert {path[:-1] for path in names} == {
        ("trunk", "layer_0", "modulation"),
        ("trunk", "modulation"),
    }
    (x_t, t, x0_prev), apply = inputs(), compiled(cfg)
    before = apply(params, x_t, t, x0_prev)
    np.testing.assert_array_equal(apply(params, x_t, t * 0.5, x0_prev), before)
    layer = params["trunk"]["layer_0"]
    for name in ("attention", "up", "down"):
        layer[name] = jax.tree.map(lambda p: 7 * p + 1, layer[name])
    np.testing.assert_array_equal(apply(params, x_t, t, x0_prev), before)
