"""The pictures of the documentation, each computed with the formula that it shows: `python docs/pictures/draw.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

Array = np.ndarray

BLUE, ORANGE, GREY, INK = "#1f5a94", "#d9822b", "#9aa3ad", "#25313c"
BLUES = LinearSegmentedColormap.from_list("computed", ["#eef4fa", BLUE])
ORANGES = LinearSegmentedColormap.from_list("reconstructed", ["#fdf4ea", ORANGE])

plt.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "approx_attn",  # the same file every time
    }
)


def main(folder: Path) -> None:
    """Draw all pictures into a folder."""
    for name, draw in {"idea": idea, "row": row, "rest": rest, "clusters": clusters}.items():
        figure = draw()
        figure.savefig(folder / f"{name}.svg", bbox_inches="tight", pad_inches=0.12, metadata={"Date": None})
        plt.close(figure)


# -- the method ------------------------------------------------------------------------------------------


def content_basis(queries: Array, keys: Array, rank: int) -> tuple[Array, Array]:
    """Query map A and key map B, (d, r) each, whose products estimate scores best in the mean square."""
    centred = keys - keys.mean(0)
    lower_q = np.linalg.cholesky(queries.T @ queries / len(queries))
    lower_k = np.linalg.cholesky(centred.T @ centred / len(keys))
    left, values, right = np.linalg.svd(lower_q.T @ lower_k)
    root = np.sqrt(values[:rank])
    return np.linalg.solve(lower_q.T, left[:, :rank] * root), np.linalg.solve(lower_k.T, right[:rank].T * root)


def estimated_scores(queries: Array, keys: Array, rank: int) -> Array:
    """(n, n) rank-r estimates of the scores q·k / √d; the mean of every row is exact."""
    query_map, key_map = content_basis(queries, keys, rank)
    mean = keys.mean(0)
    return (queries @ query_map @ ((keys - mean) @ key_map).T + (queries @ mean)[:, None]) / np.sqrt(keys.shape[1])


def largest(scores: Array, count: int) -> Array:
    """True at the `count` largest of every row."""
    place = np.argsort(np.argsort(-scores, axis=-1), axis=-1)
    return place < count


def softmax(scores: Array) -> Array:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def some_tokens(number: int, dim: int, seed: int) -> tuple[Array, Array]:
    """Queries and keys of a few topics, with details of their own."""
    rng = np.random.default_rng(seed)
    topics = rng.normal(size=(4, dim)) * 1.5
    topic = np.repeat(np.arange(4), -(-number // 4))[:number]
    spread = np.linspace(1.3, 0.25, dim)
    queries = topics[topic] + rng.normal(size=(number, dim)) * spread
    keys = topics[rng.permutation(topic)] * 0.7 + rng.normal(size=(number, dim)) * spread
    return queries, keys


# -- the pictures ----------------------------------------------------------------------------------------


def idea() -> Figure:
    """Pairs computed, an eigenbasis, all pairs."""
    number, rank = 16, 2
    queries, keys = some_tokens(number, 8, seed=2)
    exact = queries @ keys.T / np.sqrt(8)
    estimate = estimated_scores(queries, keys, rank)
    chosen = largest(estimate, number // 4)
    query_map, key_map = content_basis(queries, keys, rank)
    low, high = exact.min(), exact.max()

    figure = plt.figure(figsize=(9.2, 3.3))
    size = 0.27
    computed, basis_q, basis_k, result = (
        figure.add_axes((x, y, w, h))
        for x, y, w, h in (
            (0.0, 0.08, size, 0.75),
            (0.393, 0.08, 0.034, 0.75),
            (0.437, 0.736, size * 0.62, 0.094),
            (0.73, 0.08, size, 0.75),
        )
    )
    grid(computed, np.where(chosen, exact, np.nan), BLUES, low, high)
    grid(basis_q, queries @ query_map, ORANGES)
    grid(basis_k, ((keys - keys.mean(0)) @ key_map).T, ORANGES)
    grid(result, np.where(chosen, np.nan, estimate), ORANGES, low, high)
    grid(result, np.where(chosen, exact, np.nan), BLUES, low, high)
    computed.set_title("a quarter of the scores,\ncomputed exactly", fontsize=11, color=BLUE)
    result.set_title("all scores: computed where chosen,\nreconstructed elsewhere", fontsize=11)
    figure.text(0.5, 0.875, "a learned eigenbasis,\nrank 2 here", fontsize=11, color=ORANGE, ha="center", va="bottom")
    figure.text(0.525, 0.43, "queries and keys\nin its coordinates", fontsize=9.5, color=ORANGE, ha="center")
    for axes in (computed, result):
        axes.set_xlabel("keys", labelpad=2)
        axes.set_ylabel("queries", labelpad=2)
    for x, sign in ((0.325, "+"), (0.66, "→")):
        figure.text(x, 0.43, sign, fontsize=24, ha="center", va="center")
    figure.text(1.04, 0.43, "one softmax\nover all,\ntimes values", fontsize=10.5, ha="left", va="center")
    figure.text(1.018, 0.43, "→", fontsize=16, ha="center", va="center")
    return figure


def grid(
    axes: Axes, values: Array, colours: LinearSegmentedColormap, low: float | None = None, high: float | None = None
):
    """A matrix as cells with thin lines between them."""
    axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    rows, columns = values.shape
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(which="minor", color="#e3e7eb", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(GREY)


def row() -> Figure:
    """One row of scores, its observed keys, and the posterior mean with its spread."""
    rng = np.random.default_rng(5)
    number, rank, noise = 64, 8, 0.15
    position = (np.arange(number) + 0.5) / number
    basis = np.stack([np.cos(np.pi * k * position) for k in range(rank)], axis=1)  # (n, r)
    variances = 1.6 / (1 + np.arange(rank)) ** 1.2
    truth = basis @ (rng.normal(size=rank) * np.sqrt(variances)) + noise * rng.normal(size=number)
    observed = np.arange(2, number, 6)
    part = basis[observed]
    precision = part.T @ part / noise**2 + np.diag(1 / variances)
    mean = basis @ np.linalg.solve(precision, part.T @ truth[observed] / noise**2)
    spread = np.sqrt(np.einsum("nr,rs,ns->n", basis, np.linalg.inv(precision), basis) + noise**2)

    figure, axes = plt.subplots(figsize=(8.2, 2.9))
    keys = np.arange(number)
    axes.fill_between(keys, mean - 2 * spread, mean + 2 * spread, color=ORANGE, alpha=0.16, linewidth=0)
    axes.plot(keys, truth, ".", color=GREY, markersize=4, label="true score")
    axes.plot(keys, mean, color=ORANGE, linewidth=2, label="reconstructed: posterior mean, ± 2 standard deviations")
    axes.plot(observed, truth[observed], "o", color=BLUE, markersize=7, label="computed exactly")
    axes.set_xlabel("key position")
    axes.set_ylabel("score of one query")
    axes.set_xlim(-1, number)
    axes.legend(frameon=False, ncol=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9, handletextpad=0.4)
    return figure


def rest() -> Figure:
    """What one query reads: exactly, with the rest dropped, and with the rest kept at its estimate."""
    queries, keys = some_tokens(48, 16, seed=7)
    exact = queries @ keys.T / 4
    estimate = estimated_scores(queries, keys, 4)
    chosen = largest(estimate, 6)
    dropped = softmax(np.where(chosen, exact, -np.inf))
    kept = softmax(np.where(chosen, exact, estimate))
    truth = softmax(exact)
    missed = 1 - (truth * chosen).sum(-1)
    query = int(np.argsort(np.abs(missed - 0.35))[0])
    order = np.argsort(-exact[query])[:30]

    figure, panels = plt.subplots(1, 3, figsize=(9.4, 2.6), sharey=True)
    titles = ("exact attention", "the rest dropped", "the rest kept at its estimate")
    for axes, weights, title in zip(panels, (truth, dropped, kept), titles, strict=True):
        is_exact = chosen[query, order] if title != titles[0] else np.ones(len(order), bool)
        axes.bar(np.arange(len(order)), weights[query, order], color=np.where(is_exact, BLUE, ORANGE), width=0.8)
        axes.step(np.arange(len(order)), truth[query, order], where="mid", color=INK, linewidth=0.8)
        axes.set_title(title, fontsize=11)
        axes.set_xticks([])
        if title != titles[0]:
            off = np.abs(weights[query] - truth[query]).sum() / 2
            axes.text(
                0.97,
                0.9,
                f"{off:.0%} of the weight\nin the wrong place",
                transform=axes.transAxes,
                ha="right",
                va="top",
            )
    panels[0].set_ylabel("attention weight")
    figure.supxlabel("30 of 48 keys, heaviest first; the thin line is exact attention", fontsize=9.5, y=0.03)
    figure.tight_layout(w_pad=1.2)
    return figure


def clusters() -> Figure:
    """Keys in two coordinates of the eigenbasis, cut into clusters: two enter key by key, the others as one term."""
    rng = np.random.default_rng(11)
    centres = np.array([[-2.2, 1.2], [0.4, 2.0], [2.4, 0.4], [-0.6, -1.6], [1.6, -1.9], [-2.4, -0.9]])
    keys = np.concatenate([centre + rng.normal(size=(12, 2)) * (0.55, 0.4) for centre in centres])[:64]
    parts = [np.arange(len(keys))]
    for axis in (0, 1, 0):  # halved at the median of one coordinate after the other: eight clusters of eight
        halves = [np.array_split(part[np.argsort(keys[part, axis])], 2) for part in parts]
        parts = [half for pair in halves for half in pair]
    query = np.array([1.1, 0.55])
    mass = [np.log(len(part)) + (keys[part] @ query).mean() + np.sqrt((keys[part] @ query).var()) for part in parts]
    own = set(np.argsort(mass)[-2:])

    figure, axes = plt.subplots(figsize=(6.4, 3.9))
    for index, part in enumerate(parts):
        colour = BLUE if index in own else ORANGE
        points, mean = keys[part], keys[part].mean(0)
        axes.plot(*points.T, "o", color=colour, markersize=5, alpha=1.0 if index in own else 0.35, linewidth=0)
        if index not in own:
            values, vectors = np.linalg.eigh(np.cov(points.T))
            angle = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))
            width, height = 2 * 1.5 * np.sqrt(values[::-1])
            axes.add_patch(Ellipse(mean, width, height, angle=angle, facecolor=ORANGE, alpha=0.2, edgecolor=ORANGE))
            axes.plot(*mean, "x", color=ORANGE, markersize=8, markeredgewidth=2.2)
    axes.annotate("", query * 1.9, (0, 0), arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.8})
    axes.text(*(query * 1.9 + (0.08, 0.12)), "query", fontsize=10)
    axes.set_xlabel("first coordinate of the keys")
    axes.set_ylabel("second coordinate")
    axes.set_xticks([])
    axes.set_yticks([])
    figure.text(0.5, 0.95, "the query's own clusters: every key exact", color=BLUE, ha="center", fontsize=10)
    figure.text(
        0.5, 0.9, "all others: one term per cluster, from its mean and spread", color=ORANGE, ha="center", fontsize=10
    )
    return figure


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
