# SPDX-License-Identifier: Apache-2.0
"""The PyTorch peers compute what we compute: only then is their speed a yardstick."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the peers need the extra `peer`")
pytest.importorskip("transformers", reason="the peers need the extra `peer`")

from dlm_jax.configs import e2e_small  # noqa: E402
from dlm_jax.diffusion import (  # noqa: E402
    classifier,
    guidance,
    model,
    samplers,
    time_sampling,
)
from dlm_jax.nn.transformer import DenoiserConfig  # noqa: E402
from dlm_jax.training import train_step  # noqa: E402
from dlm_jax.training.config import resolve_config  # noqa: E402
from dlm_jax.types import HeadSpec  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from lib import torch_peer as peer  # noqa: E402

VOCAB, BATCH, LENGTH = 13, 4, 6
IDS = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)


def close(found, wanted, tolerance=2e-5):
    found = found.detach().numpy() if hasattr(found, "detach") else np.asarray(found)
    scale = max(float(np.abs(wanted).max()), 1e-3)  # of the keys' bias it is 0
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * scale)


@pytest.fixture(scope="module", params=["faithful", "modern"])
def ours(request):
    """(config, step config, parameters) of a tiny run whose zeros are moved."""
    config = e2e_small.get_config(request.param)
    config.model.update(
        dim=8, hidden_dim=16, layers=2, heads=2, mlp_dim=32, positions=LENGTH
    )
    config.model.update(dropout=0.0, attention_dropout=0.0, dtype="float32")
    config.model.known_length, config.schedule.adaptive = False, ""
    config.data.length, config.train.batch = LENGTH, BATCH
    step_cfg = resolve_config(config)
    params = train_step.init_state(jax.random.key(0), step_cfg, VOCAB).params
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    moved = [x + 0.1 * rng.standard_normal(x.shape).astype("f") for x in leaves]
    return config, step_cfg, jax.tree.unflatten(tree, moved)


def theirs(ours, *, plain):
    _, step_cfg, params = ours
    net = peer.Model(step_cfg.cfg, VOCAB, step_cfg.schedule, plain=plain)
    return peer.load(net, peer.tree_of(params))


@pytest.mark.parametrize("plain", [True, False])
def test_loss_and_gradients_are_ours(ours, plain):
    config, step_cfg, params = ours
    draws = time_sampling.draw_noise(
        jax.random.key(2),
        (BATCH, LENGTH, step_cfg.cfg.dim),
        num_steps=step_cfg.schedule.num_steps,
        self_cond_prob=1.0,
    )
    draws = draws._replace(t=draws.t.at[0].set(0.0))
    value, grads = jax.value_and_grad(
        lambda p: train_step.loss_fn(p, jnp.asarray(IDS), draws, step_cfg)[0]
    )(params)
    net = theirs(ours, plain=plain)
    arrays = [torch.tensor(np.asarray(x)) for x in (draws.t, draws.eps_0, draws.eps_t)]
    batch = peer.Batch(torch.tensor(IDS).long(), *arrays)
    found = peer.loss(
        net,
        batch,
        objective=config.loss.objective,
        normalize=config.embedding.normalize,
    )
    found.backward()
    close(found, value)
    want = peer.load(
        peer.Model(step_cfg.cfg, VOCAB, step_cfg.schedule, plain=plain),
        peer.tree_of(grads),
    )
    slopes = dict(want.named_parameters())
    for name, p in net.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        close(grad, slopes[name].detach().numpy(), 1e-4)


def test_every_weight_is_trained_under_autocast(ours):
    """A first estimate without gradients must leave no cast weights behind."""
    config, net = ours[0], theirs(ours, plain=False)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    of = {"objective": config.loss.objective, "normalize": config.embedding.normalize}
    step = peer.trainer(net, "bf16", optim=config.optim, **of)
    assert np.isfinite(step(torch.tensor(IDS).long()))
    still = {n for n, p in net.named_parameters() if torch.equal(p, before[n])}
    assert still <= {"bias"}, "which cross-entropy has no use for"


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("clamp", [True, False])
def test_the_estimate_and_a_step_without_noise_are_ours(ours, plain, clamp):
    _, step_cfg, params = ours
    rng, schedule = np.random.default_rng(3), step_cfg.schedule
    x = rng.standard_normal((BATCH, LENGTH, step_cfg.cfg.dim)).astype("f")
    before = rng.standard_normal(x.shape).astype("f")
    times = samplers.schedule_timesteps(schedule, 20)
    own = model.bind(params, step_cfg.cfg, schedule=schedule)
    if clamp:
        own = guidance.clamp(own, params.table)
    t = np.full(BATCH, times.now[7], "f")
    wanted = own(x, jnp.asarray(t), before)
    net, inputs = theirs(ours, plain=plain), map(torch.tensor, (x, t, before))
    if plain:
        found = peer.denoise(net, "eager", clamp=clamp)(*inputs)
    else:  # the arithmetic without bfloat16
        found = net.raw(net.table, *inputs)[1]
        found = peer.nearest(net.table, found, plain=False) if clamp else found
    close(found, np.asarray(wanted), 1e-4)
    # q(x_next | x_t, x0_hat) and its spread
    mean, std = guidance.posterior(
        wanted, x, np.asarray(times.now[7]), schedule, t_next=np.asarray(times.next[7])
    )
    levels = [net.noise(torch.tensor(float(s))) for s in (times.now[7], times.next[7])]
    of_x0, of_x, fresh = peer._ddim(*levels[0], *levels[1])
    close(of_x0 * torch.tensor(np.asarray(wanted)) + of_x * torch.tensor(x), mean, 1e-4)
    close(fresh, np.asarray(std), 1e-4)


def test_a_push_of_the_classifier_is_ours(ours):
    _, step_cfg, _ = ours
    cfg = DenoiserConfig(
        dim=8,
        hidden_dim=16,
        layers=1,
        heads=2,
        mlp_dim=32,
        positions=LENGTH,
        trunk="adaln",
    )
    layout = HeadSpec("tags", (LENGTH,), 5)
    head = classifier.init(jax.random.key(4), cfg, layout)
    rng = np.random.default_rng(5)
    head = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape), head)
    x, mean = rng.standard_normal((2, BATCH, LENGTH, 8)).astype("f")
    labels = rng.integers(0, 5, (BATCH, LENGTH))
    t, std = np.full(BATCH, 0.4, "f"), np.float32(0.3)
    of = classifier.log_prob(head, cfg, layout, labels, step_cfg.schedule)
    wanted = guidance.gradient_updates(
        jnp.asarray(x),
        lambda y: of(y, jnp.asarray(t)),
        jnp.asarray(mean),
        jnp.asarray(std),
        update=guidance.UPDATE_RULES["sign"].update,
        power=1,
        lr=0.2,
        num_updates=3,
        fluency=0.01,
    )
    tagger = peer.Tagger(cfg, 5, step_cfg.schedule, plain=True)
    trunk = {name: part for name, part in head.trunk.items() if name != "head"}
    peer.load(tagger, {"trunk": trunk, "head": head.head})
    push = peer.pusher(tagger, torch.tensor(labels), "eager")
    found = push(*(torch.tensor(v) for v in (x, mean, std, t)))
    close(found, np.asarray(wanted), 1e-4)
