"""Point clouds against their definition: what was done to a copy can be found again."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from approx_attn.data.generators.point_cloud import PointCloudData, copies, template

PLAIN = {"max_angle": 0.0, "deformation": 0.0, "noise": 0.0}


@pytest.fixture(scope="module")
def shape():
    return template(np.random.default_rng(0), 40)


def drawn(shape, count=200, **options):
    """Points in the order of the shape, (count, n, 3)."""
    points, labels = copies(np.random.default_rng(1), shape, count, **{**PLAIN, **options})
    assert (np.sort(labels, axis=1) == np.arange(len(shape))).all()
    assert (labels != np.arange(len(shape))).any()
    ordered = np.empty_like(points)
    np.put_along_axis(ordered, labels[..., None], points, axis=1)
    return ordered


def test_the_shape_has_size_one_and_no_two_points_alike(shape):
    np.testing.assert_allclose(shape.mean(axis=0), 0.0, atol=1e-12)
    assert np.square(shape).sum(axis=1).mean() == pytest.approx(1.0)
    distances = np.linalg.norm(shape[:, None] - shape, axis=-1) + 9.0 * np.eye(len(shape))
    assert distances.min() > 0.1


def test_labels_name_the_points(shape):
    np.testing.assert_allclose(drawn(shape), np.tile(shape, (200, 1, 1)))


@pytest.mark.parametrize("max_angle", [30.0, 180.0])
def test_copies_are_turned_by_angles_up_to_the_largest(shape, max_angle):
    angles = []
    for points in drawn(shape, max_angle=max_angle):
        turn, error = Rotation.align_vectors(points, shape)
        assert error < 1e-6
        angles.append(np.rad2deg(turn.magnitude()))
    assert max(angles) <= max_angle + 1e-6
    assert np.mean(angles) == pytest.approx(max_angle / 2, rel=0.1)


def test_noise_has_its_scale_and_bending_keeps_neighbours_together(shape):
    noise = drawn(shape, noise=0.05) - shape
    assert noise.std() == pytest.approx(0.05, rel=0.03)
    bend = drawn(shape, deformation=0.1) - shape
    assert np.square(bend).sum(axis=-1).mean() == pytest.approx(3 * 0.1**2 / 2, rel=0.1)  # E cos² = 1/2
    nearest = np.argsort(np.linalg.norm(shape[:, None] - shape, axis=-1), axis=1)[:, 1]

    def relative(moved):
        return np.square(moved - moved[:, nearest]).mean() / np.square(moved).mean()

    assert relative(bend) < 0.5 < 1.8 < relative(noise)


def small(folder, **options):
    sizes = {"train_size": 32, "val_size": 8, "test_size": 8}
    return PointCloudData(cache_dir=str(folder), num_points=12, batch_size=4, **{**sizes, **options})


def test_batches_hold_points_and_splits_are_seeded(tmp_path):
    data = small(tmp_path)
    data.setup()
    assert (data.spec.num_classes, data.spec.coordinate_dim, data.spec.causal) == (12, 3, False)
    batch = next(iter(data.train_dataloader()))
    assert batch["coordinates"].shape == (4, 12, 3)
    assert batch["coordinates"].dtype == torch.float32
    assert batch["keep"].all()
    val, test = (next(iter(loader()))["coordinates"] for loader in (data.val_dataloader, data.test_dataloader))
    assert not torch.equal(val, test)
    fewer = next(iter(small(tmp_path, train_size=16).test_dataloader()))["coordinates"]
    other = next(iter(small(tmp_path, data_seed=1).test_dataloader()))["coordinates"]
    assert torch.equal(test, fewer)
    assert not torch.equal(test, other)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_points", 1),
        ("max_angle", 181),
        ("max_angle", -1.0),
        ("deformation", -0.1),
        ("noise", float("inf")),
        ("noise", float("nan")),
        ("noise", "some"),
    ],
)
def test_impossible_options_are_named(option, value):
    with pytest.raises(ValueError, match=rf"data\.{option} must be .*, got"):
        PointCloudData(**{option: value})
