"""Random Pathfinder images, many at a time: are the two marked ends on the same dashed contour?

Two target contours of `contour_length` dashes start `seed_distance` pixels apart near the middle and grow in
turns, dash by dash. The next dash starts a gap beyond the last one and turns by Δ with probability
∝ cos²(min(continuity·|Δ|, π/2)), among the places that are free. A dash keeps `margin` pixels from all others
but its neighbours in the contour. An image whose contours get stuck is thrown away. Short distractor contours
fill what is left. One disc marks the start of a target contour; the other marks the far end of the same one
(label 1) or of the other one (label 0).

All images of a batch grow together: a dash is one of a few dozen stamps, and a step is a gather and a scatter over
the batch. Coordinates are (y, x) pixels on a canvas with a frame, in which everything is taken.

Sources of the definition: Linsley et al., Learning long-range spatial dependencies with horizontal gated recurrent
units (NeurIPS 2018); Tay et al., Long Range Arena (ICLR 2021). Dashes are drawn by area coverage and
coordinates rounded to the nearest pixel, so images follow that definition but are not equal to theirs pixel by
pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SEED_ANGLES = 360
TRIES_PER_DASH = 3
TRIES_PER_DISTRACTOR = 5
SUBPIXELS = 8
MOSTLY = 0.5
"""Share of a pixel within `margin` of a dash from which on the dash takes it."""


@dataclass(frozen=True)
class Setting:
    """What images look like; lengths in pixels, `contour_length` and `distractor_length` in dashes.

    The contrasts are brightnesses relative to a mark; those of the Long Range Arena are 2 for contours, times 0.75
    for dashes of the target contours.
    """

    resolution: int = 32
    contour_length: int = 14
    num_distractors: int = 5
    distractor_length: int = 4
    seed_distance: int = 7
    paddle_length: int = 2
    paddle_thickness: float = 0.5
    margin: int = 1
    padding: int = 1
    marker_radius: float = 1.5
    continuity: float = 1.0
    target_contrast: float = 1.5
    distractor_contrast: float = 2.0

    @property
    def frame(self) -> int:
        """Width of the frame of the canvas: wide enough for a stamp around any place that a dash may try."""
        return 2 * (self.paddle_length + self.margin + math.ceil(self.paddle_thickness)) + 2 * self.margin + 2

    @property
    def side(self) -> int:
        """Side of the canvas."""
        return self.resolution + 2 * self.frame


class Scenes(NamedTuple):
    """Images with what they show.

    Attributes:
        images: (scenes, resolution, resolution) uint8.
        labels: (scenes,) uint8, 1 if the marks are on the same contour.
        marks: (scenes, 2, 2) int, (y, x) of the marked start and the marked end.
        dashes: (scenes, 2, contour_length, 2) int, (y, x) of the front end of each dash of the two contours.
        angles: (scenes, 2, contour_length) direction of each dash, in radians from x towards y.
    """

    images: np.ndarray
    labels: np.ndarray
    marks: np.ndarray
    dashes: np.ndarray
    angles: np.ndarray


def random_scenes(rng: np.random.Generator, count: int, setting: Setting, batch: int = 2048) -> Scenes:
    """`count` independent scenes.

    Raises:
        ValueError: the contours hardly ever fit into the image.
    """
    stamps = Stamps(setting)
    parts: list[Scenes] = []
    found = drawn = 0
    while found < count:
        scenes = draw_batch(rng, batch, setting, stamps)
        parts.append(scenes)
        found += len(scenes.labels)
        drawn += batch
        if drawn >= 20 * batch and found < drawn / 1000:
            raise ValueError(
                f"data.contour_length={setting.contour_length} does not fit into data.resolution={setting.resolution}: "
                f"{found} of {drawn} images succeed; take a shorter contour or a larger image."
            )
    return Scenes(*(np.concatenate(part)[:count] for part in zip(*parts, strict=True)))


def draw_batch(rng: np.random.Generator, batch: int, setting: Setting, stamps: Stamps) -> Scenes:
    """Those of `batch` tries whose two contours reach their length."""
    canvas = Canvas(batch, setting, stamps)
    starts, targets, finished = grow_targets(rng, canvas)
    canvas, starts, targets = canvas.at(finished), starts[finished], targets.at(finished)
    distractors = [grow_distractors(rng, canvas) for _ in range(setting.num_distractors)]

    count = len(finished)
    everyone = np.arange(count)
    labels = rng.integers(2, size=count)
    origin = rng.integers(2, size=count)
    end = np.where(labels == 1, origin, 1 - origin)
    marks = np.stack([starts[everyone, origin], targets.fronts[everyone, end, -1]], axis=1)  # (b, 2, 2)

    image = np.zeros((count, setting.side, setting.side), np.float32)
    paint_dashes(image, everyone, targets, stamps, setting.target_contrast)
    for rows, contours in distractors:
        paint_dashes(image, rows, contours, stamps, setting.distractor_contrast)
    for which in range(2):
        paint(image, everyone, marks[:, which], stamps.marker)
    frame = setting.frame
    inside = image[:, frame:-frame, frame:-frame]
    grey = np.rint(255.0 * inside / np.maximum(inside.max(axis=(1, 2), keepdims=True), 1e-6)).astype(np.uint8)
    angles = stamps.angles[targets.kinds]
    return Scenes(grey, labels.astype(np.uint8), marks - frame, targets.fronts - frame, angles)


def paint_dashes(image: np.ndarray, rows: np.ndarray, dashes: Dashes, stamps: Stamps, contrast: float) -> None:
    """Lighten the images `rows` where these dashes, of shape (rows, …), cover them."""
    per_row = dashes.kinds[0].size if len(rows) else 0
    fronts, kinds = dashes.fronts.reshape(-1, 2), dashes.kinds.reshape(-1)
    paint(image, np.repeat(rows, per_row), fronts, contrast * stamps.covers[kinds])


def paint(image: np.ndarray, rows: np.ndarray, places: np.ndarray, patches: np.ndarray) -> None:
    """Lighten by patches of (rows or 1, p, p) around the places; the brightest counts."""
    offsets = np.arange(patches.shape[-1]) - patches.shape[-1] // 2
    y, x = places[:, 0, None, None] + offsets[:, None], places[:, 1, None, None] + offsets
    np.maximum.at(image, (rows[:, None, None], y, x), patches)


# -- dashes as stamps ------------------------------------------------------------------------------


class Stamps:
    """What a dash covers and takes, for every direction that a dash can have, around its front end.

    The first `SEED_ANGLES` directions are those of first dashes; the others lead to the pixels on the circle
    that the front end of a next dash can lie on.

    Attributes:
        angles: (kinds,) radians.
        ahead: (kinds, 2) int, from the pivot that a dash turns about to the pivot of the dash after it.
        candidates: (K, 2) int, from a pivot to the front ends of the next dash; kind `SEED_ANGLES` + its row.
        turn_weights: (kinds, K), how likely a dash of this kind is followed by each candidate.
        covers: (kinds, p, p) share of each pixel that is covered.
        takes: (kinds, m) steps from the front end to the pixels that no other dash may take.
        nears: (kinds, m') steps to these and the pixels next to them.
        marker: (p', p') share of each pixel that a mark covers.
    """

    def __init__(self, setting: Setting) -> None:
        step = setting.paddle_length + setting.margin
        around = np.arange(0.0, 2.0 * np.pi, 1.0 / step)  # one pixel of arc apart
        circle = np.rint(step * np.stack([np.sin(around), np.cos(around)], axis=1)).astype(int)
        self.candidates = np.unique(circle, axis=0)  # (K, 2)
        seeds = np.deg2rad(np.arange(SEED_ANGLES) - 180)
        self.angles = np.concatenate([seeds, np.arctan2(self.candidates[:, 0], self.candidates[:, 1])])
        directions = np.stack([np.sin(self.angles), np.cos(self.angles)], axis=1)  # (kinds, 2)
        self.ahead = np.rint((step + setting.margin) * directions).astype(int)
        self.behind = np.rint(step * directions).astype(int)  # from the pivot of a first dash to its front end
        self.body = np.rint(setting.paddle_length * directions).astype(int)  # from its tail to its front end

        turn = np.abs(self.angles[:, None] - self.angles[None, SEED_ANGLES:])
        turn = np.minimum(turn, 2.0 * np.pi - turn)  # (kinds, K)
        self.turn_weights = np.cos(np.minimum(setting.continuity * turn, np.pi / 2.0)) ** 2
        self.turn_weights[self.turn_weights < 1e-9] = 0.0

        reach = setting.paddle_length + setting.margin + math.ceil(setting.paddle_thickness)
        half = setting.paddle_thickness / 2.0
        fine = distance_to_dash(reach, SUBPIXELS, setting.paddle_length * directions)  # (kinds, m, m)
        self.covers = pixel_means(fine <= half, SUBPIXELS)
        takes = pixel_means(fine <= setting.margin + half, SUBPIXELS) >= MOSTLY
        self.takes = as_offsets(takes, setting.side)
        self.nears = as_offsets(beside(takes), setting.side)
        disc = distance_to_dash(math.ceil(setting.marker_radius), SUBPIXELS, np.zeros((1, 2)))
        self.marker = pixel_means(disc <= setting.marker_radius, SUBPIXELS)


def distance_to_dash(reach: int, subpixels: int, dashes: np.ndarray) -> np.ndarray:
    """(dashes, m, m) distance of each subpixel within `reach` pixels to the dash from the origin back to −dash."""
    grid = (np.arange((2 * reach + 1) * subpixels) + 0.5) / subpixels - reach - 0.5
    points = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1)  # (m, m, 2)
    back = -dashes[:, None, None, :]
    squared = np.maximum((back**2).sum(-1), 1e-12)
    along = np.clip((points * back).sum(-1) / squared, 0.0, 1.0)[..., None]
    return np.sqrt(((points - along * back) ** 2).sum(-1))


def pixel_means(fine: np.ndarray, subpixels: int) -> np.ndarray:
    """(…, m·s, m·s) -> (…, m, m): mean over the s × s subpixels of each pixel."""
    m = fine.shape[-1] // subpixels
    return fine.reshape(*fine.shape[:-2], m, subpixels, m, subpixels).mean(axis=(-3, -1)).astype(np.float32)


class Canvas:
    """Which pixels of the images of a batch are taken.

    Attributes:
        taken: (b, side²) bool; the frame and the outermost `padding` pixels are.
        near: (b, side²) bool, taken or next to a taken pixel: no place for the front end of a dash.
    """

    def __init__(self, batch: int, setting: Setting, stamps: Stamps) -> None:
        self.setting, self.stamps = setting, stamps
        edge = setting.frame + setting.padding
        taken = np.ones((setting.side, setting.side), bool)
        taken[edge:-edge, edge:-edge] = False
        self.taken = np.tile(taken.ravel(), (batch, 1))
        self.near = np.tile(beside(taken).ravel(), (batch, 1))

    def at(self, rows: np.ndarray) -> Canvas:
        """A copy of some of the images."""
        other = object.__new__(Canvas)
        other.setting, other.stamps = self.setting, self.stamps
        other.taken, other.near = self.taken[rows], self.near[rows]
        return other

    def put(self, rows: np.ndarray, other: Canvas, chosen: np.ndarray) -> None:
        """Take over the images `chosen` of another canvas as the images `rows`."""
        self.taken[rows], self.near[rows] = other.taken[chosen], other.near[chosen]

    def is_near(self, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Whether places (rows, K, 2) are taken or next to a taken pixel."""
        return self.near[rows[:, None], places[..., 0] * self.setting.side + places[..., 1]]

    def fits(self, rows: np.ndarray, dashes: Dashes) -> np.ndarray:
        """(rows,) whether dashes would take only free pixels."""
        pixels = self._front(dashes) + self.stamps.takes[dashes.kinds]
        return ~self.taken[rows[:, None], pixels].any(axis=1)

    def occupy(self, rows: np.ndarray, dashes: Dashes) -> Callable[[], None]:
        """Take the pixels of dashes, one per row; the function returned gives them back."""
        front = self._front(dashes)
        pixels, around = front + self.stamps.takes[dashes.kinds], front + self.stamps.nears[dashes.kinds]
        taken, near = self.taken[rows[:, None], pixels], self.near[rows[:, None], around]
        self.taken[rows[:, None], pixels] = self.near[rows[:, None], around] = True

        def give_back() -> None:
            self.taken[rows[:, None], pixels] = taken
            self.near[rows[:, None], around] = near

        return give_back

    def _front(self, dashes: Dashes) -> np.ndarray:
        return (dashes.fronts[:, 0] * self.setting.side + dashes.fronts[:, 1])[:, None]


def beside(taken: np.ndarray) -> np.ndarray:
    """Pixels of (…, m, m) that are taken or have a taken one above, below, to the left or to the right."""
    near = taken.copy()
    near[..., 1:, :] |= taken[..., :-1, :]
    near[..., :-1, :] |= taken[..., 1:, :]
    near[..., :, 1:] |= taken[..., :, :-1]
    near[..., :, :-1] |= taken[..., :, 1:]
    return near


def as_offsets(patches: np.ndarray, side: int) -> np.ndarray:
    """(kinds, m, m) masks -> (kinds, most) steps from the middle to each pixel of the mask, in an image `side` wide.

    Masks with fewer pixels repeat one of theirs.
    """
    middle = patches.shape[-1] // 2
    lists = [(ys - middle) * side + xs - middle for ys, xs in map(np.nonzero, patches)]
    most = max(map(len, lists))
    return np.stack([np.resize(steps, most) for steps in lists])


# -- contours --------------------------------------------------------------------------------------


class Dashes(NamedTuple):
    """Dashes in images of a batch.

    Attributes:
        fronts: (b, …, 2) the front end of each.
        kinds: (b, …) the kind of each, its direction.
        pivots: (b, …, 2) the place that each turned about.
    """

    fronts: np.ndarray
    kinds: np.ndarray
    pivots: np.ndarray

    def at(self, rows: np.ndarray) -> Dashes:
        """Those of some of the images."""
        return Dashes(*(part[rows] for part in self))

    def scattered(self, rows: np.ndarray, batch: int) -> Dashes:
        """The same in a batch of so many images, whose `rows` they belong to; zeros elsewhere."""
        everywhere = Dashes(*(np.zeros((batch, *part.shape[1:]), part.dtype) for part in self))
        for whole, part in zip(everywhere, self, strict=True):
            whole[rows] = part
        return everywhere


def stacked(dashes: list[Dashes]) -> Dashes:
    """Dashes of the same images along a new second dimension."""
    return Dashes(*(np.stack(part, axis=1) for part in zip(*dashes, strict=True)))


def first_dash(rng: np.random.Generator, tails: np.ndarray, stamps: Stamps) -> Dashes:
    """Dashes in random directions from these tails, (b, 2)."""
    kinds = rng.integers(SEED_ANGLES, size=len(tails))
    fronts = tails + stamps.body[kinds]
    return Dashes(fronts, kinds, fronts - stamps.behind[kinds])


def next_dash(rng: np.random.Generator, canvas: Canvas, rows: np.ndarray, last: Dashes) -> tuple[Dashes, np.ndarray]:
    """A dash that follows the last one in each of the images `rows`, and which of them found a place.

    The last dash must not have taken its pixels yet, because the new one may touch them.
    """
    stamps, safe = canvas.stamps, canvas.setting.frame // 2
    pivots = last.pivots + stamps.ahead[last.kinds]
    pivots = np.clip(pivots, safe, canvas.setting.side - 1 - safe)  # beyond this all is taken anyway
    places = pivots[:, None] + stamps.candidates  # (b, K, 2)
    likely = np.cumsum(stamps.turn_weights[last.kinds] * ~canvas.is_near(rows, places), axis=1)  # (b, K)
    found = np.zeros(len(rows), bool)
    choice = np.zeros(len(rows), np.int64)
    for _ in range(TRIES_PER_DASH):
        waiting = np.flatnonzero(~found & (likely[:, -1] > 0.0))
        draw = rng.random(len(waiting)) * likely[waiting, -1]
        choice[waiting] = np.minimum((likely[waiting] <= draw[:, None]).sum(axis=1), likely.shape[1] - 1)
        tried = Dashes(places[waiting, choice[waiting]], SEED_ANGLES + choice[waiting], pivots[waiting])
        found[waiting] = canvas.fits(rows[waiting], tried)
    return Dashes(places[np.arange(len(rows)), choice], SEED_ANGLES + choice, pivots), found


def grow_targets(rng: np.random.Generator, canvas: Canvas) -> tuple[np.ndarray, Dashes, np.ndarray]:
    """The two long contours of every image, grown in turns.

    Returns:
        starts (b, 2, 2), dashes (b, 2, contour_length) and the rows that succeeded.
    """
    setting, stamps = canvas.setting, canvas.stamps
    batch, side = len(canvas.taken), setting.side
    spread = max(setting.resolution - 4 * setting.seed_distance, 1)  # contours start near the middle
    first = (side - spread) // 2 + rng.integers(spread, size=(batch, 2))
    around = rng.random(batch) * 2.0 * np.pi
    second = first + np.rint(setting.seed_distance * np.stack([np.sin(around), np.cos(around)], axis=1)).astype(int)
    starts = np.stack([first, second], axis=1)  # (b, 2, 2)

    rows = np.arange(batch)
    contours = [[first_dash(rng, starts[:, which], stamps)] for which in range(2)]
    for _ in range(1, setting.contour_length):
        for contour, other in (contours, contours[::-1]):
            give_back = canvas.occupy(rows, other[-1].at(rows))
            new, found = next_dash(rng, canvas, rows, contour[-1].at(rows))
            give_back()
            rows, new = rows[found], new.at(found)
            canvas.occupy(rows, contour[-1].at(rows))
            contour.append(new.scattered(rows, batch))
    for contour in contours:
        canvas.occupy(rows, contour[-1].at(rows))
    return starts, stacked([stacked(contour) for contour in contours]), rows


def grow_distractors(rng: np.random.Generator, canvas: Canvas) -> tuple[np.ndarray, Dashes]:
    """One short contour per image, where one finds a place: the rows of these images, and (rows, length) dashes."""
    setting = canvas.setting
    waiting = np.arange(len(canvas.taken))
    done: list[np.ndarray] = []
    grown: list[Dashes] = []
    for _ in range(TRIES_PER_DISTRACTOR):
        seeds = first_dash(rng, setting.frame + rng.integers(setting.resolution, size=(len(waiting), 2)), canvas.stamps)
        fit = canvas.fits(waiting, seeds)
        draft, rows = canvas.at(waiting[fit]), np.arange(fit.sum())
        contour = [seeds.at(fit)]
        for _ in range(setting.distractor_length - 1):
            new, found = next_dash(rng, draft, rows, contour[-1])
            rows = rows[found]
            draft.occupy(rows, contour[-1].at(found))
            contour = [dashes.at(found) for dashes in (*contour, new)]
        draft.occupy(rows, contour[-1])
        placed = waiting[fit][rows]
        canvas.put(placed, draft, rows)
        done.append(placed)
        grown.append(stacked(contour))
        waiting = np.setdiff1d(waiting, placed, assume_unique=True)
    return np.concatenate(done), Dashes(*(np.concatenate(part) for part in zip(*grown, strict=True)))
