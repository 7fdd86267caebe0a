"""Resampling equals nnU-Net's own function on every branch that a plan can take (performance_notes.md, section 1)."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from scipy.ndimage import gaussian_filter

from planners.cells import Cells
from planners.resample import resample_to_shape

SHAPES = [
    ((13, 17, 22), (19, 15, 31)),
    ((13, 40, 22), (7, 20, 22)),
    ((9, 12, 11), (9, 5, 30)),
    ((1, 33, 20), (1, 50, 17)),
]
# Isotropic, then each axis so coarse that it is resampled apart (threshold 3).
SPACINGS = [
    ((1, 1, 1), (0.9, 1, 1.1)),
    ((5, 1, 1), (4, 1, 1)),
    ((1, 5, 1), (1, 4, 1)),
    ((1, 1, 5), (1, 1, 4)),
    ((1, 1, 1), (1, 1, 4)),
]


def image_of(shape, channels=2, dtype=np.float32):
    noise = np.random.default_rng(0).normal(size=(channels, *shape))
    return gaussian_filter(noise, (0, 1, 1, 1)).astype(dtype)


def labels_of(shape, count=6, dtype=np.int8):
    """-1 and the labels 0 to count - 2, in smooth patches."""
    noise = np.random.default_rng(1).normal(size=(count, *shape))
    return (gaussian_filter(noise, (0, 1.5, 1.5, 1.5)).argmax(0) - 1)[None].astype(dtype)


@pytest.mark.parametrize(("shapes", "spacings", "order"), product(SHAPES, SPACINGS, (0, 1, 3)))
def test_images_equal_nnunets(shapes, spacings, order):
    image = image_of(shapes[0])
    expected = resample_data_or_seg_to_shape(image.copy(), shapes[1], *spacings, order=order, force_separate_z=None)
    ours = resample_to_shape(image, shapes[1], *spacings, order=order)
    assert ours.dtype == expected.dtype
    assert np.abs(ours - expected).max() < 1e-5 * expected.std()


@pytest.mark.parametrize(("shapes", "spacings"), product(SHAPES, SPACINGS))
def test_labels_equal_nnunets(shapes, spacings):
    labels = labels_of(shapes[0])
    expected = resample_data_or_seg_to_shape(
        labels.copy(), shapes[1], *spacings, is_seg=True, order=1, force_separate_z=None
    )
    ours = resample_to_shape(labels, shapes[1], *spacings, is_seg=True, order=1)
    assert ours.dtype == expected.dtype
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, np.float64])
def test_labels_keep_their_type(dtype):
    labels = np.abs(labels_of((9, 12, 11))).astype(dtype)
    expected = resample_data_or_seg_to_shape(labels.copy(), (11, 10, 19), (1, 1, 1), (1, 1, 1), is_seg=True, order=1)
    ours = resample_to_shape(labels, (11, 10, 19), (1, 1, 1), (1, 1, 1), is_seg=True, order=1)
    assert ours.dtype == expected.dtype
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("largest", [126, 127, 128, 300, 70_000])
def test_labels_of_any_size_survive(largest):
    labels = np.where(labels_of((9, 12, 11), dtype=np.int32) > 1, largest, 1)
    expected = resample_data_or_seg_to_shape(labels.copy(), (11, 10, 19), (1, 1, 1), (1, 1, 1), is_seg=True, order=1)
    ours = resample_to_shape(labels, (11, 10, 19), (1, 1, 1), (1, 1, 1), is_seg=True, order=1)
    np.testing.assert_array_equal(ours, expected)


def test_ties_go_to_the_nearest_corner():
    """Half the size puts samples exactly between two voxels, five quarters every fifth. Sums are rounded as SciPy rounds them,
    so that they tie where its sums tie."""
    labels = labels_of((8, 12, 10))
    for shape in ((16, 24, 20), (4, 6, 5), (10, 15, 25)):
        expected = resample_data_or_seg_to_shape(labels.copy(), shape, (1, 1, 1), (1, 1, 1), is_seg=True, order=1)
        np.testing.assert_array_equal(
            resample_to_shape(labels, shape, (1, 1, 1), (1, 1, 1), is_seg=True, order=1), expected
        )


@pytest.mark.parametrize(("is_seg", "order", "order_z"), [(True, 0, 0), (True, 1, 1), (True, 3, 0), (False, 3, 1)])
def test_rare_orders_equal_nnunets(is_seg, order, order_z):
    data = labels_of((9, 12, 11)) if is_seg else image_of((9, 12, 11))
    arguments = ((14, 20, 9), (5, 1, 1), (3, 0.6, 1.2), is_seg, order, order_z, None)
    expected, ours = resample_data_or_seg_to_shape(data.copy(), *arguments), resample_to_shape(data, *arguments)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int16])
def test_other_types_of_images_are_kept(dtype):
    image = image_of((9, 12, 11)) * 100
    expected = resample_data_or_seg_to_shape(image.astype(dtype), (12, 9, 14), (1, 1, 1), (1, 1, 1))
    ours = resample_to_shape(image.astype(dtype), (12, 9, 14), (1, 1, 1), (1, 1, 1))
    assert ours.dtype == expected.dtype
    np.testing.assert_allclose(ours.astype(float), expected.astype(float), rtol=2e-3, atol=0.1)


def test_splines_do_not_overshoot_in_any_slice():
    """nnU-Net limits each slice to its own range where slices are resampled apart."""
    image = np.zeros((1, 4, 12, 12), np.float32)
    image[0, :, 4:8, 4:8] = [[[1]], [[10]], [[100]], [[1000]]]
    ours = resample_to_shape(image, (4, 30, 30), (5, 1, 1), (5, 0.4, 0.4))
    assert ours.min() == 0
    np.testing.assert_allclose(ours.max(axis=(0, 2, 3)), [1, 10, 100, 1000], rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_long_axes_are_resampled_in_blocks(axis):
    shape, new = [4, 5, 6], [4, 5, 6]
    shape[axis], new[axis] = 190, 230
    image = np.random.default_rng(2).normal(size=(1, *shape)).astype(np.float32)
    expected = resample_data_or_seg_to_shape(image.copy(), new, (1, 1, 1), (1, 1, 1))
    assert np.abs(resample_to_shape(image, new, (1, 1, 1), (1, 1, 1)) - expected).max() < 1e-5


def test_what_changes_nothing_is_not_copied():
    image = image_of((4, 5, 6))
    assert resample_to_shape(image, (4, 5, 6), (1, 1, 1), (2, 1, 1)) is image


def test_shares_of_the_corners_sum_to_one_and_stay_inside():
    cells = Cells((5, 7, 3), (8, 4, 9))
    corners, shares = cells.corners(np.arange(8 * 4 * 9))
    np.testing.assert_allclose(shares.sum(0), 1)
    assert corners.min() == 0 and corners.max() == 5 * 7 * 3 - 1
