# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false, reportPrivateImportUsage=false
# pyright: reportCallIssue=false, reportArgumentType=false
"""The PyTorch contender of the speed benchmarks: the same networks, losses and chains.

    pip install -e '.[peer]'
    python benchmarks/speed.py --cases e2e

There are three variants. `eager` is the published code as people run it, in float32,
with transformers' BertEncoder. `bf16` is the best effort: layers written here with
scaled_dot_product_attention, fused projections, a fused optimiser, foreach averaging
and autocast to bfloat16. `compiled` adds torch.compile, with CUDA graphs on a GPU. With
the weights of dlm_jax they compute the same numbers (`tests/test_torch_peer.py`).
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lib import alternate, ours

VARIANTS = ("eager", "bf16", "compiled")


def device() -> str:
    """Returns the device: cuda if there is a GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# --- networks, with the names of dlm_jax


class Attention(nn.Module):
    """Self-attention over all positions, with optional RoPE; fused unless plain."""

    def __init__(self, cfg: Any, *, rotary: bool, plain: bool):
        super().__init__()
        self.cfg, self.rotary, self.plain = cfg, rotary, plain
        self.qkv = nn.Linear(cfg.hidden_dim, 3 * cfg.hidden_dim)
        self.out = nn.Linear(cfg.hidden_dim, cfg.hidden_dim)

    def forward(self, x):
        b, l, h = x.shape
        heads = (b, l, 3, self.cfg.heads, h // self.cfg.heads)
        q, k, v = self.qkv(x).view(heads).permute(2, 0, 3, 1, 4)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        rate = self.cfg.attention_dropout if self.training else 0.0
        if self.plain:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            mixed = F.dropout(torch.softmax(scores, -1), rate) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        return self.out(mixed.transpose(1, 2).reshape(b, l, h))


def rotate(x):
    """Applies RoPE to [b n l k]."""
    half = x.shape[-1] // 2
    place = torch.arange(x.shape[2], device=x.device)[:, None]
    angle = place * 100.0 ** (-torch.arange(half, device=x.device) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    u, w = x[..., :half], x[..., half:]
    return torch.cat([u * cos - w * sin, u * sin + w * cos], -1)


class PostBlock(nn.Module):
    """BERT's post-LN layer."""

    def __init__(self, cfg: Any, *, plain: bool):
        super().__init__()
        h, self.rate = cfg.hidden_dim, cfg.dropout
        self.attention = Attention(cfg, rotary=False, plain=plain)
        self.attention_norm = nn.LayerNorm(h, 1e-12)
        self.up, self.down = nn.Linear(h, cfg.mlp_dim), nn.Linear(cfg.mlp_dim, h)
        self.norm = nn.LayerNorm(h, 1e-12)

    def forward(self, x, time):
        drop = partial(F.dropout, p=self.rate, training=self.training)
        x = self.attention_norm(x + drop(self.attention(x)))
        return self.norm(x + drop(self.down(F.gelu(self.up(x)))))


class AdaBlock(nn.Module):
    """A pre-LN layer with AdaLN-Zero, RoPE and tanh GELU."""

    def __init__(self, cfg: Any, *, plain: bool):
        super().__init__()
        h, self.rate = cfg.hidden_dim, cfg.dropout
        self.modulation = nn.Linear(h, 6 * h)
        self.attention = Attention(cfg, rotary=True, plain=plain)
        self.up, self.down = nn.Linear(h, cfg.mlp_dim), nn.Linear(cfg.mlp_dim, h)

    def forward(self, x, time):
        drop = partial(F.dropout, p=self.rate, training=self.training)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.modulation(time).chunk(
            6, -1
        )
        y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        x = x + gate * drop(self.attention(y))
        y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_ff) + shift_ff
        return x + gate_ff * drop(self.down(F.gelu(self.up(y), approximate="tanh")))


class Bert(nn.Module):
    """transformers' BertEncoder, as the published code builds it."""

    def __init__(self, cfg: Any):
        super().__init__()
        from transformers.models.bert.modeling_bert import BertConfig, BertEncoder

        config = BertConfig(
            hidden_size=cfg.hidden_dim,
            num_hidden_layers=cfg.layers,
            num_attention_heads=cfg.heads,
            intermediate_size=cfg.mlp_dim,
            hidden_dropout_prob=cfg.dropout,
            attention_probs_dropout_prob=cfg.attention_dropout,
            attn_implementation="eager",
        )
        self.encoder = BertEncoder(config)

    def forward(self, x, time):
        return self.encoder(x).last_hidden_state


class Trunk(nn.Module):
    """The layers, between tanh projections (post_ln) or under one norm (adaln)."""

    def __init__(self, cfg: Any, inputs: int, *, plain: bool):
        super().__init__()
        self.cfg, self.post, h = cfg, cfg.trunk == "post_ln", cfg.hidden_dim
        self.in_ = nn.Linear(inputs, h)
        self.positions = nn.Parameter(torch.zeros(cfg.positions, h))
        block = PostBlock if self.post else AdaBlock
        if plain and self.post:
            self.layers = nn.ModuleList([Bert(cfg)])
        else:
            self.layers = nn.ModuleList(
                block(cfg, plain=plain) for _ in range(cfg.layers)
            )
        if self.post:
            self.in_2, self.out = nn.Linear(h, h), nn.Linear(h, h)
            self.norm = nn.LayerNorm(h, 1e-12)
        else:
            self.modulation = nn.Linear(h, 2 * h)

    def forward(self, x, time):
        x = self.in_(x)
        if self.post:
            x = self.in_2(torch.tanh(x))
        x = x + self.positions[: x.shape[1]]
        if self.post:
            x = self.norm(x + time)
        x = F.dropout(x, self.cfg.dropout, self.training)
        for layer in self.layers:
            x = layer(x, time)
        if self.post:
            return torch.tanh(self.out(x))
        shift, scale = self.modulation(time).chunk(2, -1)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Denoiser(nn.Module):
    """(x_t, t, x0_prev, posterior_x0) -> output; without a head, the trunk's."""

    def __init__(self, cfg: Any, out: int, *, plain: bool):
        super().__init__()
        self.cfg, inputs = (
            cfg,
            cfg.dim * (1 + cfg.self_cond + cfg.token_posterior_input),
        )
        self.time = nn.Linear(cfg.time_dim, 4 * cfg.time_dim)
        self.time_2 = nn.Linear(4 * cfg.time_dim, cfg.hidden_dim)
        self.trunk = Trunk(cfg, inputs, plain=plain)
        self.head = nn.Linear(cfg.hidden_dim, out) if out else nn.Identity()

    def forward(self, x_t, t, x0_prev=None, posterior_x0=None):
        half = self.cfg.time_dim // 2
        grid = torch.arange(half, device=x_t.device)
        angle = 1000.0 * t[..., None] * torch.exp(-math.log(1e4) * grid / half)
        features = torch.cat([angle.cos(), angle.sin()], -1)
        time = self.time_2(F.silu(self.time(features)))[:, None]
        if self.cfg.trunk == "adaln":
            time = F.silu(time)
        x = x_t if x0_prev is None else torch.cat([x_t, x0_prev], -1)
        x = x if posterior_x0 is None else torch.cat([x, posterior_x0], -1)
        return self.head(self.trunk(x, time)).float()


class Model(nn.Module):
    """Embedding table, rounding bias, denoiser and noise schedule."""

    def __init__(self, cfg: Any, vocab: int, schedule: Any, *, plain: bool = False):
        super().__init__()
        self.cfg, self.noise = cfg, Noise(schedule)
        self.table = nn.Parameter(torch.randn(vocab, cfg.dim))
        self.bias = nn.Parameter(torch.zeros(vocab))
        out = vocab if cfg.predicts == "logits" else cfg.dim
        self.denoiser = Denoiser(cfg, out, plain=plain)

    def raw(self, table, x_t, t, x0_prev):
        """Returns the network's output and the estimate x0_hat it stands for."""
        cfg, time, posterior_x0, prior = self.cfg, t, None, 0.0
        if cfg.time_input == "log_snr":
            time = ((10.0 - self.noise.log_snr(t)) / 24.0).clip(0.0, 1.0)
        if cfg.token_posterior_input:
            alpha, sigma = (part[:, None, None] for part in self.noise(t))
            near = alpha / sigma**2 * (x_t @ table.T)
            prior = near - 0.5 * (alpha / sigma) ** 2 * table.square().sum(-1)
            posterior_x0 = torch.softmax(prior, -1) @ table
        x0_prev = x0_prev if cfg.self_cond else None
        raw = self.denoiser(x_t, time, x0_prev, posterior_x0) + prior
        if cfg.predicts != "logits":
            return raw, raw
        return raw, torch.softmax(raw, -1) @ table


class Noise(nn.Module):
    """(alpha, sigma) at times t: from a discretised schedule's table, or logistic."""

    table: Any

    def __init__(self, schedule: Any):
        super().__init__()
        self.steps = schedule.num_steps
        if self.steps is None:
            options = schedule.curve.keywords
            self.mean, self.scale, self.cut = (
                float(options[n]) for n in ("mean", "scale", "cut")
            )
        else:
            times = np.arange(-1, self.steps) / self.steps
            levels = np.stack(schedule.alpha_sigma(times), -1)
            table = torch.tensor(levels, dtype=torch.float32)
            self.register_buffer("table", table, persistent=False)

    def log_snr(self, t):
        u = t.clip(self.cut, 1 - self.cut)
        return -(self.mean + self.scale * (torch.log(u) - torch.log1p(-u)))

    def forward(self, t):
        if self.steps is not None:
            index = torch.round(t * self.steps).long().clip(-1, self.steps - 1) + 1
            return F.embedding(index, self.table).unbind(-1)
        snr = torch.where(t < 0, 50.0, self.log_snr(t))  # t < 0 is clean
        return torch.sigmoid(snr).sqrt(), torch.sigmoid(-snr).sqrt()


# --- weights of dlm_jax


def load(module: nn.Module, tree: Any) -> nn.Module:
    """Loads a tree of dlm_jax parameters into the module; returns it."""
    flat = {}

    def walk(path: tuple[str, ...], value: Any) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                walk((*path, name), inner)
            return
        last = {"kernel": "weight", "scale": "weight"}.get(path[-1], path[-1])
        array = torch.tensor(np.asarray(value))
        flat[".".join((*path[:-1], last))] = array.T if path[-1] == "kernel" else array

    walk((), tree)
    named = {_torch_name(name): value for name, value in flat.items()}
    if any(isinstance(part, Bert) for part in module.modules()):
        named = dict(pair for item in named.items() for pair in _bert(*item))
    module.load_state_dict(named)
    return module


def tree_of(params: Any) -> dict:
    """Returns Params as one tree."""
    return {
        "table": params.table,
        "bias": params.bias,
        "denoiser": params.denoiser,
    }


def _torch_name(name: str) -> str:
    return name.replace("trunk.in.", "trunk.in_.").replace("layer_", "layers.")


BERT = {
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}


def _bert(name: str, value: Any) -> list[tuple[str, Any]]:
    """Returns BertEncoder's names and values; splits the fused projection in three."""
    before, layers, rest = name.partition("layers.")
    if not layers:
        return [(name, value)]
    number, _, inner = rest.partition(".")
    part, _, kind = inner.rpartition(".")
    base = f"{before}layers.0.encoder.layer.{number}."
    if part == "attention.qkv":
        names = ("query", "key", "value")
        return [
            (f"{base}attention.self.{n}.{kind}", v)
            for n, v in zip(names, value.chunk(3), strict=True)
        ]
    return [(f"{base}{BERT[part]}.{kind}", value)]


# --- training


@dataclasses.dataclass
class Batch:
    """Ids, their times and their noise."""

    ids: Any
    t: Any
    eps_0: Any
    eps_t: Any


def draw(model: Model, ids: Any) -> Batch:
    """Draws uniform times and Gaussian noise."""
    t = torch.rand(len(ids), device=ids.device)
    if model.noise.steps is not None:
        t = torch.floor(t * model.noise.steps) / model.noise.steps
    shape = (2, *ids.shape, model.cfg.dim)
    eps_0, eps_t = torch.randn(shape, device=ids.device)
    return Batch(ids, t, eps_0, eps_t)


def loss(model: Model, batch: Batch, *, objective: str, normalize: bool = False):
    """Computes the loss of objective "x0" or "ce"; self-conditions every batch."""
    table = model.table
    if normalize:
        table = table / table.norm(dim=-1, keepdim=True) * math.sqrt(table.shape[-1])
    clean = F.embedding(batch.ids, table)
    alpha, sigma = (part[:, None, None] for part in model.noise(batch.t))
    sigma_0 = model.noise(torch.zeros((), device=clean.device))[1]
    x_0 = clean if objective == "ce" else clean + sigma_0 * batch.eps_0
    x_t = alpha * x_0 + sigma * batch.eps_t
    x0_prev = torch.zeros_like(x_t)
    if model.cfg.self_cond:
        with torch.no_grad():
            x0_prev = model.raw(table, x_t, batch.t, x0_prev)[1]
    raw, x0_hat = model.raw(table, x_t, batch.t, x0_prev)
    if objective == "ce":
        return F.cross_entropy(raw.flatten(0, 1), batch.ids.flatten())
    zero = (batch.t * model.noise.steps < 0.5)[:, None, None]
    error = (torch.where(zero, clean, x_0) - x0_hat).square().mean()
    scores = x_0 @ table.T + model.bias
    rounding = F.cross_entropy(scores.flatten(0, 1), batch.ids.flatten())
    last = torch.tensor((model.noise.steps - 1) / model.noise.steps, device=x_0.device)
    prior = (model.noise(last)[0] * x_0).square().mean()
    return error + rounding + prior


def trainer(
    model: Model, variant: str, *, optim: Any, objective: str, normalize: bool
) -> Callable[[Any], float]:
    """Returns step(ids) -> loss: forward, backward, optimiser and moving average."""
    model.to(device()).train()
    fast = variant != "eager"
    optimizers = _optimizers(model, optim, fused=fast)
    live = list(model.parameters())
    average = [p.detach().clone() for p in live]

    def objective_of(batch: Batch):
        with torch.autocast(device(), torch.bfloat16, enabled=fast):
            return loss(model, batch, objective=objective, normalize=normalize)

    compiled = _compiled(objective_of) if variant == "compiled" else objective_of

    def step(ids: Any) -> float:
        value = compiled(draw(model, ids))
        for one in optimizers:
            one.zero_grad(set_to_none=True)
        value.backward()
        if optim.clip:
            nn.utils.clip_grad_norm_(live, optim.clip)
        for one in optimizers:
            one.step()
        with torch.no_grad():
            if fast:
                torch._foreach_lerp_(average, live, 1 - optim.ema)
            else:
                for mean, p in zip(average, live, strict=True):
                    mean.mul_(optim.ema).add_(p, alpha=1 - optim.ema)
        return float(value.detach())

    return step


def _compiled(function: Callable) -> Callable:
    mode = "reduce-overhead" if device() == "cuda" else "default"  # CUDA graphs
    return torch.compile(function, mode=mode)


def _optimizers(model: Model, optim: Any, *, fused: bool) -> list[Any]:
    """Returns AdamW, or Muon for the layers' matrices and AdamW for the rest."""

    def adamw(params: list) -> Any:
        betas = (optim.b1, optim.b2)
        return torch.optim.AdamW(
            params,
            optim.lr,
            betas,
            optim.eps,
            optim.weight_decay,
            fused=fused,
        )

    if optim.name == "adamw":
        return [adamw(list(model.parameters()))]
    matrices, rest = [], []
    for name, p in model.named_parameters():
        matrix = ".layers." in name and p.ndim == 2 and "modulation" not in name
        (matrices if matrix else rest).append(p)
    muon = torch.optim.Muon(
        matrices,
        optim.lr,
        optim.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, adamw(rest)]


# --- sampling


def nearest(table: Any, x: Any, *, plain: bool) -> Any:
    """Returns the nearest embeddings; plain: by the published matrix of distances."""
    if plain:
        flat = x.reshape(-1, x.shape[-1])
        distance = (
            table.square().sum(-1)[:, None]
            + flat.square().sum(-1)[None]
            - 2.0 * table @ flat.T
        ).clamp(min=0.0)
        ids = torch.topk(-distance, 1, dim=0).indices[0].view(x.shape[:-1])
    else:
        half = 0.5 * table.square().sum(-1)
        ids = (x @ table.T - half).argmax(-1)
    return F.embedding(ids, table)


def denoise(model: Model, variant: str, *, clamp: bool) -> Callable:
    """Returns x0_hat(x_t, t, x0_prev); all but `eager` keep weights in bfloat16."""
    model.to(device()).eval().requires_grad_(False)
    fast = variant != "eager"
    table = model.table.detach().float()
    if fast:
        for module in (
            model.denoiser.trunk,
            model.denoiser.time,
            model.denoiser.time_2,
        ):
            module.to(torch.bfloat16)

    def run(x_t: Any, t: Any, x0_prev: Any) -> Any:
        with torch.autocast(device(), torch.bfloat16, enabled=fast):
            x0_hat = model.raw(table, x_t, t, x0_prev)[1].float()
        return nearest(table, x0_hat, plain=not fast) if clamp else x0_hat

    return _compiled(run) if variant == "compiled" else run


def chain(
    model: Model,
    variant: str,
    times: Any,
    *,
    solver: str,
    clamp: bool,
    guide: Callable | None = None,
) -> Callable[[Any], Any]:
    """Returns run(x_T) -> x0_hat; guide(x, mean, std, t) updates x after each step."""
    predict = denoise(model, variant, clamp=clamp)
    options = {"dtype": torch.float32, "device": device()}
    both = (times.now, times.next)
    now, after = (torch.tensor(np.asarray(t), **options) for t in both)
    is_guided = [
        a >= 0.05 and b >= 0 for a, b in zip(now.tolist(), after.tolist(), strict=True)
    ]
    step = {"ddim": _ddim, "marginal": _marginal}[solver]
    moves = [
        step(*model.noise(a), *model.noise(b)) for a, b in zip(now, after, strict=True)
    ]
    first = [
        _ddim(*model.noise(a), *model.noise(b)) for a, b in zip(now, after, strict=True)
    ]

    @torch.no_grad()
    def run(x_T: Any) -> Any:
        x, x0_hat = x_T, torch.zeros_like(x_T)
        for i, (of_x0, of_x, of_noise) in enumerate(moves):
            x0_hat = predict(x, now[i].expand(len(x)), x0_hat)
            moved = of_x0 * x0_hat + of_x * x + of_noise * torch.randn_like(x)
            if guide is not None and is_guided[i]:
                a, b, std = first[i]
                moved = guide(moved, a * x0_hat + b * x, std, after[i].expand(len(x)))
            x = moved
        return x0_hat

    return run


def _ddim(alpha, sigma, alpha_next, sigma_next) -> tuple:
    """Returns the coefficients of (x0_hat, x_t, noise) for eta 1."""
    beta = 1 - (alpha / alpha_next) ** 2
    coef_x = sigma_next**2 * (1 - beta).sqrt() / sigma**2
    fresh = (beta * sigma_next**2 / sigma**2).clip(min=0).sqrt()
    return beta * alpha_next / sigma**2, coef_x, fresh


def _marginal(alpha, sigma, alpha_next, sigma_next) -> tuple:
    return alpha_next, torch.zeros_like(alpha), sigma_next


class Tagger(nn.Module):
    """The classifier with a label per position: a trunk and a head."""

    def __init__(self, cfg: Any, classes: int, schedule: Any, *, plain: bool):
        super().__init__()
        self.noise = Noise(schedule)
        self.trunk = Denoiser(cfg, 0, plain=plain)
        self.head = nn.Linear(cfg.hidden_dim, classes)

    def log_prob(self, x: Any, t: Any, labels: Any) -> Any:
        alpha, sigma = self.noise(t)
        time = ((10.0 - 2 * (alpha.log() - sigma.log())) / 24.0).clip(0.0, 1.0)
        scores = self.head(self.trunk(x, time))
        return -F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum")


def pusher(
    tagger: Tagger,
    labels: Any,
    variant: str,
    *,
    lr: float = 0.2,
    updates: int = 3,
    fluency: float = 0.01,
) -> Callable:
    """Returns gradient guidance by the published rule (docs/method.md, section 7.6)."""
    tagger.to(device()).eval().requires_grad_(False)
    fast = variant != "eager"

    def objective(x: Any, mean: Any, std: Any, t: Any) -> Any:
        with torch.autocast(device(), torch.bfloat16, enabled=fast):
            log_prob = tagger.log_prob(x, t, labels)
        return log_prob - fluency * (mean - x).square().sum() / std

    compiled = _compiled(objective) if variant == "compiled" else objective

    def slope(x: Any, mean: Any, std: Any, t: Any) -> Any:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(compiled(x, mean, std, t), x)[0]

    def push(x: Any, mean: Any, std: Any, t: Any) -> Any:
        for _ in range(updates):
            g = slope(x, mean, std, t)
            x = x + lr * g / (g.abs() + 1e-10)
        return x

    return push


# --- the contender


def make(case: Any, variant: str) -> Callable[[], Any]:
    """Returns a function that does the work of a case once."""
    from dlm_jax.diffusion import samplers
    from dlm_jax.training.config import resolve_config

    config = alternate.settings(case)
    step_cfg, plain = resolve_config(config), variant == "eager"
    # dlm_jax's first estimate has no dropout; the peer's would have
    assert not (step_cfg.cfg.self_cond and step_cfg.cfg.dropout)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    net = Model(step_cfg.cfg, case.vocab, step_cfg.schedule, plain=plain)
    ids = torch.tensor(ours.ids_of(config, case.vocab), device=device()).long()
    if case.job == "train":
        options = {"objective": step_cfg.objective, "normalize": step_cfg.normalize}
        step = trainer(net, variant, optim=config.optim, **options)
        return lambda: step(ids)
    guide = None
    if case.job == "guided":
        spec = (ours.tagger_config(config), ours.CLASSES, step_cfg.schedule)
        tagger, labels = Tagger(*spec, plain=plain), ids % ours.CLASSES
        guide = pusher(tagger, labels, variant, updates=case.updates)
    times = samplers.schedule_timesteps(step_cfg.schedule, case.num_steps)
    solver = config.sample.solver
    run = chain(net, variant, times, solver=solver, clamp=case.clamp, guide=guide)
    x_T = torch.randn(*ids.shape, step_cfg.cfg.dim, device=device())
    return lambda: float(run(x_T).sum())


if __name__ == "__main__":
    alternate.serve(make, alone="import torch, transformers")
