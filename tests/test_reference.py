# SPDX-License-Identifier: Apache-2.0
"""Parity with the published code: every value of golden.npz but `langevin/out`.

golden.npz holds what the modules of XiangLi1999/Diffusion-LM (commit 759889d) gave on a
tiny network on a CPU with torch 2.13; REFERENCE section 6.3 of the design lists it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dlm_jax import control, interop, losses, model, rounding, samplers, schedule
from dlm_jax.denoiser import time_features

SQRT = schedule.SCHEDULES["sqrt"]()
T2000, T200, T20 = (schedule.discretize(SQRT, n) for n in (2000, 200, 20))
close = functools.partial(np.testing.assert_allclose, rtol=0)


@pytest.fixture(scope="module")
def net(golden):
    weights = {k[2:]: v for k, v in golden.items() if k.startswith("w/")}
    return interop.from_reference(weights, heads=4)


def tree_of(golden, prefix):
    named = {k[len(prefix) :]: v for k, v in golden.items() if k.startswith(prefix)}
    return interop.from_reference(named, heads=4)[1]


@pytest.fixture(scope="module")
def draws(golden):
    return losses.Draws(golden["t"] / 2000, golden["n0"], golden["n1"])


def run(net, golden, draws, objective, **change):
    cfg, params = net
    return losses.end_to_end(
        params,
        golden["ids"],
        draws,
        cfg=dataclasses.replace(cfg, dropout=0.0, attention_dropout=0.0, **change),
        schedule=T2000,
        objective=objective,
    )


@pytest.mark.parametrize(("steps", "table"), [(2000, T2000), (200, T200)])
def test_schedule_tables(golden, steps, table):
    read = {
        k.split("/")[1]: v for k, v in golden.items() if k.startswith(f"sqrt{steps}/")
    }
    t = np.arange(steps) / steps
    alpha_bar = table.alpha_bar(t)
    close(schedule.betas(SQRT, steps), read["betas"], atol=1e-10)
    close(alpha_bar, read["alphas_cumprod"], atol=1e-10)
    close(alpha_bar**-0.5, read["sqrt_recip_alphas_cumprod"], rtol=1e-10)
    alpha, sigma = table.alpha_sigma(t)
    close(sigma / alpha, read["sqrt_recipm1_alphas_cumprod"], rtol=1e-10)
    coef_1, coef_2, var = schedule.posterior_coefficients(t, t - 1 / steps, table)
    close(coef_1, read["posterior_mean_coef1"], atol=1e-10)
    close(coef_2, read["posterior_mean_coef2"], atol=1e-10)
    close(var, read["posterior_variance"], atol=1e-10)
    clipped = schedule.clipped_variance(t, table)
    close(np.log(clipped), read["posterior_log_variance_clipped"], atol=1e-10)


@pytest.mark.parametrize("spec", ["200", "ddim200", "10,15,20"])
def test_respacing(golden, spec):
    kept = schedule.respace(2000, spec)
    assert kept == golden[f"respace/{spec}/map"].tolist()
    betas = schedule.respaced_betas(T2000, kept)
    close(betas, golden[f"respace/{spec}/betas"], atol=1e-10)


def test_forward(golden, net):
    cfg, params = net
    t = golden["fwd_t"] / 1000
    out = model.bind(params, cfg)(golden["fwd_in"], t, np.zeros_like(golden["fwd_in"]))
    close(out, golden["fwd_out"], atol=1e-5)
    close(time_features(t, cfg.time_dim), golden["temb"], atol=1e-5)


def test_rounding(golden, net):
    _, params = net
    # the logits' input is n1, the sampler's x
    close(
        rounding.logits(params.table, params.bias, golden["n1"]),
        golden["logits1"],
        atol=1e-5,
    )
    close(
        rounding.distance_logits(params.table, golden["n1"]),
        golden["logits2"],
        atol=1e-5,
    )
    close(rounding.project(params.table, golden["n1"]), golden["clamp_out"], atol=1e-6)


def test_losses(golden, net, draws):
    terms = run(net, golden, draws, "x0")
    close(terms.diffusion + terms.t0, golden["mse"], atol=1e-5)
    close(terms.rounding, golden["decoder_nll"], atol=1e-5)
    close(terms.prior, golden["tT"], atol=1e-10)
    close(terms.total(), golden["loss"], atol=1e-5)
    eps = run(net, golden, draws, "eps", predicts="eps")
    close(eps.total(), golden["loss_eps"], rtol=1e-5, atol=1e-5)


def test_bounds(golden, net, draws):
    legacy = run(net, golden, draws, "vlb_legacy")
    np.testing.assert_allclose(legacy.total(), golden["loss_kl"], rtol=1e-4)
    cfg, params = net
    for sigma in ("small", "large"):
        want = f"vb_small{sigma == 'small'}/"
        terms = losses.end_to_end(
            params,
            golden["ids"],
            draws,
            cfg=cfg,
            schedule=T2000,
            objective="vlb_legacy",
            sigma=sigma,
        )
        kl = (terms.diffusion + terms.t0) / 2000
        np.testing.assert_allclose(kl, golden[want + "kl"], rtol=1e-4)
        np.testing.assert_allclose(
            terms.rounding / 2000, golden[want + "decoder_nll"], rtol=1e-4
        )
        np.testing.assert_allclose(terms.prior / 2000, golden[want + "kl_T"], rtol=2e-3)


def loss_of(cfg, draws, ids):
    def loss(params):
        return (
            losses.end_to_end(
                params, ids, draws, cfg=cfg, schedule=T2000, objective="x0"
            )
            .total()
            .mean()
        )

    return loss


def test_gradients(golden, net, draws):
    cfg, params = net
    grads = jax.grad(loss_of(cfg, draws, golden["ids"]))(params)
    want = tree_of(golden, "g/")
    jax.tree.map(lambda a, b: close(a, b, atol=1e-5), grads, want)
    close(optax.global_norm(grads), 3.590718, atol=1e-5)
    close(jnp.linalg.norm(grads.table), 0.559577, atol=1e-5)


def index_times(golden, steps):
    return np.array([0, 1, 99, 199]) / steps if steps == 200 else golden["t"] / steps


@pytest.mark.parametrize("clamped", ["none", "clamp"])
def test_p_sample(golden, net, clamped):
    cfg, params = net
    denoise = model.bind(params, cfg)
    denoise = control.clamp(denoise, params.table) if clamped == "clamp" else denoise
    x, n, t = golden["n1"], golden["n0"], golden["t"] / 2000
    x0_hat = denoise(x, t, jnp.zeros_like(x))
    close(x0_hat, golden[f"p_sample/{clamped}/x0"], atol=1e-5)
    for sigma, flag in (("small", True), ("large", False)):
        mean, std = samplers.posterior(x0_hat, x, t, T2000, sigma=sigma)
        close(mean, golden[f"p_sample/{clamped}/mean"], atol=1e-5)
        out = mean + schedule.expand(std, x) * n
        close(out, golden[f"p_sample/{clamped}/small{flag}"], atol=1e-5)
    np.testing.assert_array_equal(mean[0], x0_hat[0])
