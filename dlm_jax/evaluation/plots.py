# SPDX-License-Identifier: Apache-2.0
"""Plots of a run as PNG files: embeddings, denoising, loss over t, training."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from dlm_jax import console
from dlm_jax.data import encoding, grammar, pairs, sources
from dlm_jax.data.tokenizer import SPECIALS, WordTokenizer
from dlm_jax.diffusion import losses, samplers, time_sampling
from dlm_jax.errors import UserError
from dlm_jax.evaluation import fonts
from dlm_jax.inference.pipeline import DiffusionLM
from dlm_jax.runtime import backend, logging
from dlm_jax.types import END, PAD, START, Array, Ids, Table

Points: TypeAlias = Float[np.ndarray, "n 2"]

WORDS = 200  # labels on the embedding map
FRAMES = 12  # moments of a sample in film.png
WRAP = 104  # characters per line in film.png
NUM_TIMES = 25  # points of the loss curve
ROWS = 64  # held-out sequences for the loss curve
FONT = 8.5  # of film.png; with line height, character width and left margin, in points
LINE, CHAR, LEFT = 1.5 * FONT, 0.602 * FONT, 62.0
DARK, PALE, BLUE, RED = "#111111", "#a8a8a8", "#1f5fa8", "#c0392b"
# colours of tags, the most frequent tag first; dark enough for small text
COLOURS = (
    BLUE, RED, "#1e8449", "#8e44ad", "#d35400", "#00838f", "#9a7d0a", "#ad1457",
    "#5d6d7e", "#6e2c00", "#283593", "#000000", "#7cb342", "#ef6c9a",
)  # fmt: skip
# unit of the diffusion term, by objective
UNITS: dict[str, str] = {
    "x0": "squared error of x_0 per coordinate",
    "mu": "squared error of the mean per coordinate",
    "eps": "squared error of the noise per coordinate",
    "vlb": "T x KL, nats per position",
    "vlb_legacy": "T x KL, bits per dimension",
    "nelbo": "-dSNR/dt x squared error / 2, nats per position",
    "ce": "cross-entropy, nats per position",
}


@backend.prepared
def save_plots(lm: DiffusionLM, workdir: str | Path) -> list[Path]:
    """Draws the plots into <workdir>/plots and returns their paths.

    Prints the neighbour agreement, and why a plot is missing. Raises UserError.
    """
    folder = Path(workdir) / "plots"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; change --workdir") from error
    held_out = _held_out(lm)
    fonts.warn_of_missing(lm.tokenizer.tokens())
    drawn = {
        "embedding.png": embedding_map(lm, held_out),
        "film.png": trajectory_figure(lm) if _has_film(lm) else None,
        "loss_over_t.png": loss_plot(lm, held_out),
        "training.png": training(Path(workdir) / "metrics.jsonl"),
    }
    paths = []
    for name, figure in drawn.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=130, facecolor="white")
            paths.append(folder / name)
    return paths


def _has_film(lm: DiffusionLM) -> bool:
    """Whether it denoises texts of its own, not targets or word by word."""
    return not (lm.cfg.causal or lm.cfg.known_source)


def _held_out(lm: DiffusionLM) -> Ids | None:
    """Returns the validation ids [n l]; without them, prints why and returns None."""
    cfg: Any = ml_collections.ConfigDict(lm.config["data"])
    if "source" not in cfg:
        console.say(
            "no plot of the loss over t: the saved config does not name its data"
        )
        return None
    try:
        layout = {name: cfg[name] for name in ("length", "mode", "too_long")}
        if lm.cfg.known_source:
            del layout["mode"]
            layout["delexicalize"] = cfg["delexicalize"]
            return pairs.encode_pairs(
                pairs.load_pairs(cfg, "valid"), lm.tokenizer, **layout
            )
        texts = sources.load_texts(cfg, "valid")
        return encoding.encode(texts, lm.tokenizer, **layout)
    except UserError as error:
        console.say(f"no plot of the loss over t: {error}")
        return None


def _axes(figure: Figure, xlabel: str, ylabel: str) -> Any:
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _printable(word: str) -> str:
    return fonts.shown(word.replace("\n", "\u21b5").replace("\t", "\u21e5"))


def save_frontier(points: Sequence[dict], entropy: float, workdir: Path) -> Path:
    """Plots quality over sampling steps and over entropy, as plots/frontier.png.

    points: dicts of num_steps, quality, entropy (nats) and measure, the name of the
    quality; entropy: that of held-out text, nats. Returns the path.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_steps, by_entropy = figure.subplots(1, 2, sharey=True)
    quality = [p["quality"] for p in points]
    by_steps.semilogx(
        [p["num_steps"] for p in points], quality, "o-", color=BLUE, base=2
    )
    by_steps.set(xlabel="sampling steps", ylabel=points[0]["measure"])
    by_entropy.plot([p["entropy"] for p in points], quality, "o", color=BLUE)
    for p in points:
        by_entropy.annotate(f" {p['num_steps']}", (p["entropy"], p["quality"]))
    by_entropy.axvline(entropy, color=PALE, label="held-out text")
    by_entropy.set(xlabel="unigram entropy, nats")
    by_entropy.legend(frameon=False)
    path = workdir / "plots" / "frontier.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
    return path


# --- the embedding table


def directions(table: Table) -> Float[np.ndarray, "v d"]:
    """Returns the table's rows scaled to norm 1, to compare words by angle."""
    rows = np.asarray(table, np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def neighbour_agreement(table: Table, tags: Sequence[str]) -> float:
    """Returns the share of words whose nearest word, by angle, has the same tag."""
    rows = directions(table)
    near = rows @ rows.T
    np.fill_diagonal(near, -np.inf)
    named = np.asarray(tags)
    return float(np.mean(named[np.argmax(near, -1)] == named))


def chance_agreement(tags: Sequence[str]) -> float:
    """Returns the expected `neighbour_agreement` of a table independent of the tags."""
    n = len(tags)
    return sum(k * (k - 1) for k in Counter(tags).values()) / (n * (n - 1))


def principal(rows: Float[np.ndarray, "v d"]) -> tuple[Float[np.ndarray, "v 2"], float]:
    """Returns the first two principal components [v 2] and their share of variance."""
    u, s, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    power = s**2 / max(float(np.sum(s**2)), 1e-12)
    return u[:, :2] * s[:2], float(np.sum(power[:2]))


def _chosen(
    lm: DiffusionLM, held_out: Ids | None
) -> tuple[list[int], list[str] | None]:
    """Returns (ids, tags): the grammar's words, or the most frequent words and None."""
    tokens = lm.tokenizer.tokens()
    known = grammar.word_tags()
    if lm.config["data"].get("source") == "grammar":
        ids = [i for i, token in enumerate(tokens) if token in known]
        if len(ids) > 2:
            return ids, [known[tokens[i]] for i in ids]
    order = np.arange(len(tokens))
    if held_out is not None:
        counts = np.bincount(np.ravel(held_out), minlength=len(tokens))
        order = np.argsort(-counts, kind="stable")
    return [int(i) for i in order if i >= len(SPECIALS)][:WORDS], None


def embedding_map(lm: DiffusionLM, held_out: Ids | None) -> Figure:
    """Plots words at the first two principal components of their directions, by tag."""
    ids, tags = _chosen(lm, held_out)
    table, tokens = np.asarray(lm.ema.table)[ids], lm.tokenizer.tokens()
    points, share = principal(directions(table))
    title = (
        f"{len(ids)} word embeddings, two components of PCA ({share:.0%} of variance)"
    )
    if tags is not None:
        agreement, chance = neighbour_agreement(table, tags), chance_agreement(tags)
        line = (
            f"nearest word of the same part of speech: {agreement:.0%} "
            f"(by chance {chance:.0%})"
        )
        console.say(line)
        title += "\n" + line
    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11)
    axes.set_axis_off()
    _words(axes, points, [_printable(tokens[i]) for i in ids], tags)
    return figure


def _words(axes: Any, points: Points, words: list[str], tags: list[str] | None) -> None:
    """Draws a dot and a label per word, with labels moved apart, and a legend."""
    size = np.array([800.0, 590.0])  # axes in points, the unit of boxes
    span = np.ptp(points, 0)
    dots = (points - points.min(0)) / np.where(span > 0, span, 1.0) * size
    boxes = np.array([[0.6 * 7.5 * fonts.columns(word) + 4, 9.5] for word in words])
    labels = spread(dots + np.array([0.0, 6.0]), boxes)
    names, family = tags or [""] * len(words), fonts.families(words, "sans-serif")
    kinds = [tag for tag, _ in Counter(names).most_common()]
    colours = {tag: COLOURS[i % len(COLOURS)] for i, tag in enumerate(kinds)}
    for tag in kinds:
        tagged = np.array([name == tag for name in names])
        x, y = dots[tagged].T
        axes.scatter(x, y, s=7, color=colours[tag], label=f"{tag} ({tagged.sum()})")
    for word, name, dot, label in zip(words, names, dots, labels, strict=True):
        colour = colours[name]
        axes.plot(*zip(dot, label, strict=True), color=colour, lw=0.4, alpha=0.5)
        style = {
            "color": colour,
            "fontsize": 7.5,
            "parse_math": False,
            "family": family,
        }
        axes.text(*label, word, ha="center", va="center", **style)
    if tags is not None:
        place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        axes.legend(frameon=False, markerscale=2.5, **place)


def spread(centres: Points, boxes: Points) -> Points:
    """Moves centres [n 2] until boxes [n 2] (width, height) overlap little.

    Each of 200 rounds moves every overlapping pair apart, along the axis on which it
    overlaps less.
    """
    centres, reach = centres.copy(), 0.5 * (boxes[:, None] + boxes[None])
    order = np.sign(np.arange(len(boxes))[:, None] - np.arange(len(boxes)))
    for _ in range(200):
        apart = centres[:, None] - centres[None]
        overlap = np.maximum(reach - np.abs(apart), 0.0)
        overlap *= np.min(overlap, -1, keepdims=True) > 0
        overlap[np.eye(len(boxes), dtype=bool)] = 0.0
        least = np.argmin(overlap, -1)[..., None] == np.arange(2)
        way = np.where(apart == 0, order[..., None], np.sign(apart))
        centres += np.sum(0.25 * overlap * least * way, 1)
    return centres


# --- denoising


class Frame(NamedTuple):
    """A moment: its time t, the words that x0_hat rounds to, and which are final."""

    t: float
    words: list[str]
    final: list[bool]


def frames(lm: DiffusionLM, *, seed: int | None = None) -> list[Frame]:
    """Generates a sample and returns FRAMES moments of it, from noise to final text."""
    trace = np.asarray(lm.generate(1, seed=seed, trajectory=True).trajectory)[0]
    steps = len(trace)
    grid = samplers.schedule_timesteps(lm.schedule, steps)
    picked = np.unique(np.round(np.linspace(0, steps - 1, FRAMES)).astype(int))
    return [_frame(lm, grid.now[i], trace[i], trace[-1]) for i in picked]


def _frame(lm: DiffusionLM, t: float, ids: Array, last: Array) -> Frame:
    """Returns the words before the first END, each with its leading space, if any."""
    ends = np.flatnonzero(ids == END)
    stop = int(ends[0]) if len(ends) else len(ids)
    kept = [i for i in range(stop) if ids[i] not in (START, PAD)]
    tokens = lm.tokenizer.tokens()
    words = [tokens[ids[i]] for i in kept]
    if isinstance(lm.tokenizer, WordTokenizer):
        words = [" " + word for word in words]
    words = [word.replace("\u2581", " ") for word in words]
    return Frame(float(t), words, [bool(ids[i] == last[i]) for i in kept])


def trajectory_figure(lm: DiffusionLM) -> Figure:
    """Draws the text at FRAMES moments, one paragraph each; final words are dark."""
    shown = frames(lm)
    placed = [_wrap(frame.words) for frame in shown]
    heights = [(max((row for row, _ in at), default=0) + 1.7) * LINE for at in placed]
    ends = [
        column + fonts.columns(word)
        for frame, at in zip(shown, placed, strict=True)
        for word, (_, column) in zip(frame.words, at, strict=True)
    ]
    width, height = LEFT + CHAR * max([*ends, 60]) + 20, sum(heights) + 52
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    title = "The words that x0_hat rounds to, from noise to text"
    axes.text(14, 20, title, fontsize=11, color=DARK)
    note = "dark: already the word of the final text"
    axes.text(14, 34, note, fontsize=FONT, color=PALE)
    top = 58.0
    for frame, at, tall in zip(shown, placed, heights, strict=True):
        _paragraph(axes, frame, at, top)
        top += tall
    return figure


def _paragraph(axes: Any, frame: Frame, at: list[tuple[int, int]], top: float) -> None:
    family = fonts.families(map(_printable, frame.words), "monospace")
    style = {"fontsize": FONT, "family": family, "parse_math": False}
    axes.text(14, top, f"t {frame.t:5.3f}", color=BLUE, **style)
    if not at:
        axes.text(LEFT, top, "(no words)", color=PALE, **style)
    words = zip(frame.words, frame.final, at, strict=True)
    for word, final, (row, column) in words:
        x, y = LEFT + column * CHAR, top + row * LINE
        axes.text(x, y, _printable(word), color=DARK if final else PALE, **style)


def _wrap(words: list[str]) -> list[tuple[int, int]]:
    """Returns the (row, column) of each word in lines of WRAP characters."""
    row, column, at = 0, 0, []
    for word in words:
        if column and column + fonts.columns(word) > WRAP:
            row, column = row + 1, 0
        at.append((row, column))
        column += fonts.columns(word)
    return at


# --- the loss over t, and over training


class Curve(NamedTuple):
    """The diffusion term at each time: mean over sequences and its standard error."""

    t: Float[np.ndarray, " n"]
    mean: Float[np.ndarray, " n"]
    error: Float[np.ndarray, " n"]


def times(steps: int | None) -> Float[np.ndarray, " n"]:
    """Returns times in [0, 1]; on a table without index 0, which has the t0 term."""
    if steps is None:
        return np.linspace(0, 1, NUM_TIMES)
    return np.unique(np.round(np.linspace(1, steps - 1, NUM_TIMES))) / steps


def loss_curve(lm: DiffusionLM, ids: Ids, *, feed: bool = False) -> Curve:
    """Computes the objective's diffusion term on ids [b l], same noise at all times.

    feed: feed the first estimate back (self-conditioning) instead of zeros. UNITS lists
    the units.
    """
    config = lm.config

    @jax.jit
    def at(params, ids, t):
        k_0, k_t = jax.random.split(jax.random.key(0))
        shape, rows = (*ids.shape, lm.cfg.dim), ids.shape[:1]
        eps_0, eps_t = (jax.random.normal(k, shape) for k in (k_0, k_t))
        fed = jnp.full(rows, float(feed))
        draws = time_sampling.NoiseDraws(jnp.full(rows, t), eps_0, eps_t, self_cond=fed)
        return losses.end_to_end(
            params,
            ids,
            draws,
            cfg=lm.cfg,
            schedule=lm.schedule,
            objective=config["loss"]["objective"],
            mask_pad=config["loss"]["mask_pad"],
            normalize=config["embedding"]["normalize"],
        ).diffusion

    t = times(lm.schedule.num_steps)
    values = np.stack([np.asarray(at(lm.ema, ids, now)) for now in t])
    error = np.std(values, -1, ddof=1) / np.sqrt(values.shape[-1])
    return Curve(t, np.mean(values, -1), error)


def loss_plot(lm: DiffusionLM, held_out: Ids | None) -> Figure | None:
    """Plots the loss over t with its standard error; None without data or diffusion."""
    if lm.cfg.causal or held_out is None or len(held_out) < 2:
        return None
    ids, objective = held_out[:ROWS], lm.config["loss"]["objective"]
    kinds = {"": False}
    if lm.cfg.self_cond:
        kinds = {"first estimate zero": False, "first estimate fed back": True}
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = _axes(figure, "t (0: text, 1: noise)", UNITS[objective])
    for (label, feed), colour in zip(kinds.items(), (BLUE, RED), strict=False):
        t, mean, error = loss_curve(lm, ids, feed=feed)
        axes.fill_between(t, mean - error, mean + error, color=colour, alpha=0.25, lw=0)
        axes.plot(t, mean, color=colour, marker="o", ms=3, lw=1.2, label=label)
    if lm.cfg.self_cond:
        axes.legend(frameon=False)
    if objective.startswith("vlb"):
        axes.set_yscale("log")
    title = f"Diffusion term ({objective}) on {len(ids)} held-out sequences"
    axes.set_title(f"{title}; band: one standard error", fontsize=11)
    return figure


def training(path: Path) -> Figure | None:
    """Plots training and validation loss from metrics.jsonl; None if there are none."""
    if not path.is_file():
        return None
    try:
        read = {kind: logging.read(path, kind) for kind in ("train", "valid")}
    except (ValueError, KeyError) as error:
        console.say(f"no plot of the training: {path} is damaged ({error})")
        return None
    values = [row["loss"] for rows in read.values() for row in rows]
    if not values:
        console.say(f"no plot of the training: {path} has no complete row")
        return None
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = _axes(figure, "step", "loss")
    styles = {"train": {"color": BLUE, "lw": 1}, "valid": {"color": RED, "marker": "o"}}
    for kind, rows in read.items():
        pairs = [(row["step"], row["loss"]) for row in rows]
        axes.plot(*zip(*pairs, strict=True), label=kind, ms=4, **styles[kind])
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.set_title("Training", fontsize=11)
    axes.legend(frameon=False)
    return figure
