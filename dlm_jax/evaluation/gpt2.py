# SPDX-License-Identifier: Apache-2.0
"""GPT-2 as a judge of texts: generation perplexity, and entropies of its tokens.

The network of Radford et al. 2019 as Hugging Face's GPT2LMHeadModel computes it. Its
weights are not part of this package: a user names a folder with model.safetensors,
config.json and tokenizer.json. docs/measures.md says what is scored.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
from jaxtyping import Float

from dlm_jax.data import tokenizer
from dlm_jax.errors import UserError, environment_reason
from dlm_jax.evaluation import text_metrics
from dlm_jax.runtime import backend, sharding
from dlm_jax.types import Array, Ids, PyTree

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
START = "<|endoftext|>"
NORM = ("weight", "bias")
TOKENS = 8192  # of a batch
# what another network of the same layout would set, and what is computed here
FIXED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


class Config(NamedTuple):
    """The sizes of a GPT-2; mlp: width of the feed-forward layer."""

    layers: int
    heads: int
    width: int
    mlp: int
    positions: int
    vocab: int
    eps: float


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array by its name; those of layers, h.*, are of one."""
    h, m = cfg.width, cfg.mlp
    weights = {
        "attn.c_attn": (h, 3 * h),
        "attn.c_proj": (h, h),
        "mlp.c_fc": (h, m),
        "mlp.c_proj": (m, h),
    }
    layer = {f"h.*.{name}.weight": shape for name, shape in weights.items()}
    layer |= {f"h.*.{name}.bias": shape[1:] for name, shape in weights.items()}
    norms = [f"{n}.{part}" for n in ("h.*.ln_1", "h.*.ln_2", "ln_f") for part in NORM]
    outer = {"wte.weight": (cfg.vocab, h), "wpe.weight": (cfg.positions, h)}
    return outer | layer | dict.fromkeys(norms, (h,))


def nll(params: PyTree, cfg: Config, ids: Ids) -> Float[Array, "b l-1"]:
    """Computes -log p of each token after the first, given those before it, in nats.

    params: arrays by the names of `shapes`, those of layers stacked. The logits of one
    row are in memory at a time.
    """
    x = params["wte.weight"][ids] + params["wpe.weight"][: ids.shape[1]]

    def norm(x: Array, p: PyTree, name: str) -> Array:
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + cfg.eps)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x: Array, p: PyTree, name: str) -> Array:
        return x @ p[f"h.*.{name}.weight"] + p[f"h.*.{name}.bias"]

    def layer(x: Array, p: PyTree) -> tuple[Array, None]:
        qkv = linear(norm(x, p, "h.*.ln_1"), p, "attn.c_attn")
        qkv = qkv.reshape(*x.shape[:2], 3, cfg.heads, -1)
        q, k, v = (qkv[:, :, i] for i in range(3))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(mixed.reshape(x.shape), p, "attn.c_proj")
        up = linear(norm(x, p, "h.*.ln_2"), p, "mlp.c_fc")
        return x + linear(jax.nn.gelu(up, approximate=True), p, "mlp.c_proj"), None

    layers = {name: p for name, p in params.items() if name.startswith("h.*.")}
    x = norm(jax.lax.scan(layer, x, layers)[0], params, "ln_f")

    def head(row: tuple[Array, Array]) -> Array:
        logits = row[0] @ params["wte.weight"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, row[1])

    return jax.lax.map(head, (x[:, :-1], jnp.asarray(ids)[:, 1:]))


_nll = jax.jit(nll, static_argnums=1)


class Scores(NamedTuple):
    """-log p of each text [n], nats, and the number of its tokens [n]."""

    nats: np.ndarray
    tokens: np.ndarray


class GPT2(NamedTuple):
    """A GPT-2 with its tokenizer: scores texts. `load` reads one.

    start: the id of <|endoftext|>, which precedes each text.
    """

    cfg: Config
    params: PyTree
    tokenizer: Any
    start: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text's tokens. Text is never a special token."""
        found = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [one.ids for one in found]

    @backend.prepared
    def score(self, texts: Sequence[str]) -> Scores:
        """Computes -log p of each text after <|endoftext|>; its end is not scored.

        A text longer than the positions is scored in parts, each after <|endoftext|>.
        """
        ids, room = self.encode(texts), self.cfg.positions - 1
        parts = [
            (i, row[at : at + room])
            for i, row in enumerate(ids)
            for at in range(0, len(row), room)
        ]
        nats = np.zeros(len(ids))
        for rows, width in _batches(parts, self.cfg.positions):
            filled = np.zeros((max(1, TOKENS // width), width), np.int32)
            filled[:, 0] = self.start
            for row, (_, tokens) in zip(filled, rows, strict=False):
                row[1 : len(tokens) + 1] = tokens
            with jax.default_matmul_precision("highest"):
                out = _nll(self.params, self.cfg, sharding.shard_rows(filled))
            out = np.asarray(sharding.gather_to_host(out), np.float64)
            for one, (i, tokens) in zip(out, rows, strict=False):
                nats[i] += one[: len(tokens)].sum()
        return Scores(nats, np.array(list(map(len, ids))))

    def nats_per_token(self, texts: Sequence[str]) -> float:
        """Returns nats per token of all texts; exp of it is the generation perplexity.

        nan if the texts have no token.
        """
        nats, tokens = self.score(texts)
        return float(nats.sum() / tokens.sum()) if tokens.sum() else float("nan")

    def entropy_per_text(self, texts: Sequence[str]) -> float:
        """Returns the mean over texts of the entropy of a text's own tokens, nats."""
        counts = (Counter(row) for row in self.encode(texts))
        return float(np.mean([text_metrics.entropy(c.values()) for c in counts]))

    def entropy(self, texts: Sequence[str]) -> float:
        """Returns the entropy of the frequencies of tokens in all texts, nats."""
        counts = Counter(i for row in self.encode(texts) for i in row)
        return text_metrics.entropy(counts.values())


def _batches(parts: list, positions: int) -> Iterator[tuple[list, int]]:
    """Yields parts (index, tokens) of similar length and the width of their rows."""
    parts, start = sorted(parts, key=lambda part: len(part[1])), 0
    while start < len(parts):
        # few widths, so few compilations: powers of 2, and the most positions
        width = min(max(16, 1 << len(parts[start][1]).bit_length()), positions)
        most = max(1, TOKENS // width)
        rows = [p for p in parts[start : start + most] if len(p[1]) < width]
        yield rows, width
        start += len(rows)


# --- reading


def load(folder: str | Path) -> GPT2:
    """Reads a folder in Hugging Face's layout. Raises UserError."""
    folder = Path(folder)
    for name in (WEIGHTS, CONFIG, TOKENIZER):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}: give a folder with {WEIGHTS}, {CONFIG} and "
                f"{TOKENIZER} of a GPT-2"
            )
    try:
        cfg = _read_config((folder / CONFIG).read_text(encoding="utf-8"))
        tok, start = _read_tokenizer((folder / TOKENIZER).read_text("utf-8"), cfg)
        params = _read_weights(folder / WEIGHTS, cfg)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        if reason := environment_reason(error):
            raise UserError(f"{folder} cannot be read here ({reason})") from error
        raise UserError(f"{folder}: damaged: {error}; copy it again") from error
    return GPT2(cfg, sharding.to_global(sharding.replicate(params)), tok, start)


def _read_config(text: str) -> Config:
    record = json.loads(text)
    if not isinstance(record, dict) or "model_type" not in record:
        raise UserError(f"{CONFIG} names no model_type; give that of a GPT-2")
    for name, values in FIXED.items():
        if name in record and record[name] not in values:
            raise UserError(
                f"{CONFIG}: {name}={record[name]!r}, and only {values[0]!r} is "
                "computed; give a GPT-2"
            )
    names = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    for name in names:
        if not isinstance(record.get(name), int) or record[name] < 1:
            raise UserError(
                f"{CONFIG}: {name}={record.get(name)!r}; give that of a GPT-2"
            )
    layers, heads, width, positions, vocab = (int(record[name]) for name in names)
    if width % heads or positions < 2:
        raise UserError(
            f"{CONFIG}: n_embd={width}, n_head={heads}, n_positions={positions} are no "
            "sizes of a GPT-2"
        )
    mlp, eps = record.get("n_inner") or 4 * width, record.get("layer_norm_epsilon")
    return Config(layers, heads, width, mlp, positions, vocab, eps or 1e-5)


def _read_tokenizer(text: str, cfg: Config) -> tuple[Any, int]:
    """Returns the tokenizer, and the id of <|endoftext|>."""
    try:
        tok = tokenizer.open_hf(text)
    except UserError:
        raise
    except Exception as error:  # the package has no class of its own
        raise UserError(f"{TOKENIZER} is not a tokenizer's ({error})") from error
    start, size = tok.token_to_id(START), tok.get_vocab_size()
    if start is None or size > cfg.vocab:
        what = f"has {size} tokens" if start is not None else f"lacks {START}"
        raise UserError(
            f"{TOKENIZER} {what}, and the model has {cfg.vocab}: give the tokenizer "
            "of this GPT-2"
        )
    return tok, start


def _read_weights(path: Path, cfg: Config) -> dict[str, jax.Array]:
    """Reads the arrays of `shapes` as float32; those of layers are stacked."""
    with safetensors.safe_open(path, framework="flax") as file:
        stored = set(file.keys())
        prefix = "transformer." if "transformer.wte.weight" in stored else ""

        def read(name: str, shape: tuple[int, ...]) -> jax.Array:
            full = f"{prefix}{name}"
            held = file.get_slice(full).get_shape() if full in stored else None
            if held is None or tuple(held) != shape:
                raise UserError(f"{WEIGHTS} has no {name} of shape {list(shape)}")
            return jnp.asarray(file.get_tensor(full), jnp.float32)

        def stacked(name: str, shape: tuple[int, ...]) -> jax.Array:
            if not name.startswith("h.*."):
                return read(name, shape)
            names = (name.replace("*", str(i)) for i in range(cfg.layers))
            return jnp.stack([read(one, shape) for one in names])

        return {name: stacked(name, shape) for name, shape in shapes(cfg).items()}
