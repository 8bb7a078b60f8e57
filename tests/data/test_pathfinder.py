"""Pathfinder images against their definition, with a plain renderer beside the fast one."""

import math

import numpy as np
import pytest

from approx_attn.data.generators import pathfinder
from approx_attn.data.generators.pathfinder import PathfinderData
from approx_attn.data.generators.pathfinder_images import Scenes, Setting, random_scenes

SMALL = Setting(resolution=16, contour_length=4, num_distractors=2, distractor_length=2, seed_distance=3)


@pytest.fixture(scope="module")
def full() -> Scenes:
    return random_scenes(np.random.default_rng(0), 150, Setting())


def distance(point: np.ndarray, front: np.ndarray, angle: float, length: float) -> float:
    """From a point to the dash that ends at `front` and points in the direction `angle`."""
    back = -length * np.array([math.sin(angle), math.cos(angle)])
    along = np.clip(np.dot(point - front, back) / np.dot(back, back), 0.0, 1.0)
    return float(np.linalg.norm(point - front - along * back))


def render(scenes: Scenes, index: int, setting: Setting) -> np.ndarray:
    """Brightness of target contours and marks, subpixel by subpixel."""
    n, sub = setting.resolution, 8
    image = np.zeros((n, n))
    dashes = list(zip(scenes.dashes[index].reshape(-1, 2), scenes.angles[index].ravel(), strict=True))
    for y in range(n):
        for x in range(n):
            points = [
                np.array([y + (i + 0.5) / sub - 0.5, x + (j + 0.5) / sub - 0.5]) for i in range(sub) for j in range(sub)
            ]
            for front, angle in dashes:
                if np.abs(front - (y, x)).max() <= setting.paddle_length + 1:
                    covered = [
                        distance(point, front, angle, setting.paddle_length) <= setting.paddle_thickness / 2
                        for point in points
                    ]
                    image[y, x] = max(image[y, x], setting.target_contrast * np.mean(covered))
            for mark in scenes.marks[index]:
                image[y, x] = max(
                    image[y, x], np.mean([np.linalg.norm(point - mark) <= setting.marker_radius for point in points])
                )
    return image


def test_images_show_the_dashes_and_the_marks():
    setting = Setting(resolution=16, contour_length=4, num_distractors=0, seed_distance=3)
    scenes = random_scenes(np.random.default_rng(1), 3, setting)
    for index in range(3):
        expected = render(scenes, index, setting)
        np.testing.assert_array_equal(scenes.images[index], np.rint(255 * expected / expected.max()))


def test_label_says_whether_the_marks_are_on_one_contour(full):
    assert 0.35 < full.labels.mean() < 0.65
    for label, (start, end), dashes, angles in zip(full.labels, full.marks, full.dashes, full.angles, strict=True):
        which_end = [bool((dashes[contour, -1] == end).all()) for contour in range(2)]
        back = 2.0 * np.stack([np.sin(angles[:, 0]), np.cos(angles[:, 0])], axis=-1)
        tails = dashes[:, 0] - back
        which_start = int(np.argmin(np.linalg.norm(tails - start, axis=1)))
        assert sum(which_end) == 1
        assert np.linalg.norm(tails[which_start] - start) < 1.0
        assert (which_end.index(True) == which_start) == bool(label)


def test_contours_start_at_their_distance_and_go_on_without_a_jump(full):
    setting = Setting()
    for dashes, angles in zip(full.dashes, full.angles, strict=True):
        back = setting.paddle_length * np.stack([np.sin(angles), np.cos(angles)], axis=-1)
        tails = dashes - back
        apart = np.linalg.norm(tails[0, 0] - tails[1, 0])
        assert apart == pytest.approx(setting.seed_distance, abs=2.0)
        gaps = np.linalg.norm(tails[:, 1:] - dashes[:, :-1], axis=-1)
        assert gaps.max() <= 2 * setting.margin + 1.5
        turns = np.abs(np.angle(np.exp(1j * (angles[:, 1:] - angles[:, :-1]))))
        assert turns.max() <= np.pi / 2 + 1e-6
        assert dashes.min() >= setting.padding
        assert dashes.max() < setting.resolution - setting.padding


def test_turns_follow_the_squared_cosine():
    """Between free directions only the turn decides; over many dashes small turns prevail as cos² says."""
    setting = Setting(resolution=64, contour_length=2, num_distractors=0, seed_distance=15)
    scenes = random_scenes(np.random.default_rng(0), 6_000, setting)
    turns = np.abs(np.angle(np.exp(1j * (scenes.angles[..., 1] - scenes.angles[..., 0])))).ravel()
    fine = np.linspace(0.0, np.pi / 2, 1001)
    expected = (fine * np.cos(fine) ** 2).sum() / (np.cos(fine) ** 2).sum()
    assert turns.mean() == pytest.approx(expected, abs=0.03)
    straighter = random_scenes(
        np.random.default_rng(0), 2_000, Setting(resolution=64, contour_length=2, seed_distance=15, continuity=2.0)
    )
    assert np.abs(np.angle(np.exp(1j * np.diff(straighter.angles)))).mean() < 0.7 * turns.mean()


def test_dashes_of_different_contours_keep_apart(full):
    closest = []
    for dashes, angles in zip(full.dashes[:40], full.angles[:40], strict=True):
        points = [
            [front - t * np.array([math.sin(a), math.cos(a)]) for t in (0.0, 1.0, 2.0)]
            for front, a in zip(dashes.reshape(-1, 2), angles.ravel(), strict=True)
        ]
        first, second = np.array(points[:14]).reshape(-1, 2), np.array(points[14:]).reshape(-1, 2)
        closest.append(np.linalg.norm(first[:, None] - second, axis=-1).min())
    assert np.mean(closest) > 2.0
    assert min(closest) > 0.9


def test_scenes_are_a_function_of_the_generator():
    one, two, other = (random_scenes(np.random.default_rng(seed), 20, SMALL) for seed in (0, 0, 1))
    assert np.array_equal(one.images, two.images)
    assert not np.array_equal(one.images, other.images)


def test_contour_that_cannot_fit_is_refused():
    with pytest.raises(ValueError, match=r"data\.contour_length=30 does not fit into data\.resolution=16"):
        random_scenes(np.random.default_rng(0), 1, Setting(resolution=16, contour_length=30, seed_distance=3), batch=64)


@pytest.mark.parametrize(("resolution", "contour", "seed_distance"), [(32, 14, 7), (24, 8, 5), (16, 4, 3)])
def test_settings_follow_the_resolution(resolution, contour, seed_distance):
    setting = PathfinderData(resolution=resolution).setting
    assert (setting.contour_length, setting.seed_distance) == (contour, seed_distance)


def small(tmp_path, **options) -> PathfinderData:
    sizes = {"train_size": 40, "val_size": 8, "test_size": 8}
    return PathfinderData(**{"resolution": 16, "cache_dir": str(tmp_path), "batch_size": 8, **sizes, **options})


def test_module(tmp_path, monkeypatch):
    monkeypatch.setattr(pathfinder, "SHARD_SIZE", 20)
    data = small(tmp_path)
    data.prepare_data()
    data.setup()
    assert data.spec.num_items == (40, 8, 8)
    assert (data.spec.num_classes, data.spec.max_length) == (2, 256)
    batch = next(iter(data.train_dataloader()))
    assert batch["tokens"].shape == (8, 256)
    assert batch["keep"].all()
    assert batch["tokens"].min() >= 1
    assert batch["tokens"].max() == 256 < data.spec.vocab_size
    tokens = [next(iter(one.test_dataloader()))["tokens"] for one in (data, small(tmp_path / "2", num_proc=1))]
    assert (tokens[0] == tokens[1]).all()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"resolution": 8}, "data.resolution"),
        ({"contour_length": 1}, "data.contour_length"),
        ({"distractor_length": 0}, "data.distractor_length"),
        ({"seed_distance": 20}, "data.seed_distance"),
        ({"margin": 0}, "data.margin"),
        ({"continuity": 0}, "data.continuity"),
        ({"marker_radius": "big"}, "data.marker_radius"),
        ({"train_size": 0}, "data.train_size"),
    ],
)
def test_impossible_options_are_named(options, key):
    with pytest.raises(ValueError, match=key):
        PathfinderData(**options)
