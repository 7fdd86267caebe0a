"""Dice, NSD and HD95 on shapes whose values can be worked out, and the rule for missing structures."""

import numpy as np
import pytest

from trainers.metrics import case_metrics, summarise

SPACING = (3.0, 1.0, 1.0)


def sphere(center, radius_mm, shape=(17, 41, 43)):
    z, y, x = np.ogrid[tuple(slice(n) for n in shape)]
    distance2 = sum(((axis - c) * s) ** 2 for axis, c, s in zip((z, y, x), center, SPACING, strict=True))
    return (distance2 < radius_mm**2).astype(np.uint8)


def test_equal_masks_are_perfect():
    mask = sphere((8, 20, 21), 11)
    row = case_metrics(mask, mask, {"organ": 1}, SPACING)["organ"]
    assert row == {"dice": 1.0, "nsd": 1.0, "hd95_mm": 0.0, "missed": False, "false_alarm": False}


def test_dice_counts_voxels():
    prediction, reference = np.zeros((3, 5, 7), int), np.zeros((3, 5, 7), int)
    prediction[1, 1:4, 1:3] = 2  # 6 voxels
    reference[1, 1:4, 2:6] = 2  # 12 voxels, 3 of them shared
    row = case_metrics(prediction, reference, {"organ": 2}, SPACING)["organ"]
    assert row["dice"] == pytest.approx(2 * 3 / 18)


def test_distances_are_millimetres_along_each_axis():
    """A plate of one voxel's thickness moved by one slice is 3 mm away, moved by one row 1 mm."""
    plate = np.zeros((7, 21, 23), int)
    plate[3, 3:18, 3:20] = 1
    across, along = np.roll(plate, 1, axis=0), np.roll(plate, 1, axis=1)
    assert case_metrics(across, plate, {"a": 1}, SPACING)["a"]["hd95_mm"] == pytest.approx(3)
    assert case_metrics(along, plate, {"a": 1}, SPACING)["a"]["hd95_mm"] <= 1
    assert case_metrics(across, plate, {"a": 1}, SPACING, tolerance_mm=3.0)["a"]["nsd"] == pytest.approx(1)


def test_surface_metrics_equal_deepminds_on_two_spheres():
    """0.7170 and 3.000 are what google-deepmind/surface-distance gives; weighing voxels instead of areas gives 0.6820."""
    row = case_metrics(sphere((8, 20, 20), 15), sphere((8, 22, 21), 14), {"organ": 1}, SPACING)["organ"]
    assert row["nsd"] == pytest.approx(0.7170, abs=5e-5)
    assert row["hd95_mm"] == pytest.approx(3.000)


def test_cropping_does_not_change_the_distances():
    prediction, reference = sphere((8, 20, 21), 11), sphere((8, 22, 21), 12)
    wide = [np.pad(mask, ((9, 4), (12, 31), (5, 17))) for mask in (prediction, reference)]
    assert case_metrics(prediction, reference, {"a": 1}, SPACING) == case_metrics(*wide, {"a": 1}, SPACING)


def test_a_missed_structure_counts_as_the_worst_and_an_absent_one_not_at_all():
    mask, nothing = sphere((8, 20, 21), 6), np.zeros((17, 41, 43), np.uint8)
    diagonal_mm = np.linalg.norm([51, 41, 43])
    missed = case_metrics(nothing, mask, {"a": 1}, SPACING)["a"]
    assert missed == {"dice": 0, "nsd": 0, "hd95_mm": pytest.approx(diagonal_mm), "missed": True, "false_alarm": False}
    invented = case_metrics(mask, nothing, {"a": 1}, SPACING)["a"]
    assert (invented["dice"], invented["missed"], invented["false_alarm"]) == (0, False, True)
    absent = case_metrics(nothing, nothing, {"a": 1}, SPACING)["a"]
    assert absent == {"dice": None, "nsd": None, "hd95_mm": None, "missed": False, "false_alarm": False}


def test_a_region_is_the_union_of_its_values():
    reference = np.zeros((3, 5, 7), int)
    reference[1, 1:4, 1:3], reference[1, 1:4, 3:5] = 1, 2
    swapped = np.where(reference > 0, 3 - reference, 0)
    rows = case_metrics(swapped, reference, {"whole": (1, 2), "core": (2,)}, SPACING)
    assert rows["whole"]["dice"] == 1
    assert rows["core"]["dice"] == 0


def test_two_dimensional_images_are_measured_too():
    reference, prediction = np.zeros((21, 23), int), np.zeros((21, 23), int)
    reference[5:15, 5:15], prediction[5:15, 7:17] = 1, 1
    row = case_metrics(prediction, reference, {"a": 1}, (1.0, 0.5))["a"]
    assert row["hd95_mm"] == pytest.approx(1.0)
    assert 0 < row["nsd"] <= 1


def test_the_summary_counts_the_cases_behind_each_mean():
    def row(dice, missed=False):
        return {
            "dice": dice,
            "nsd": dice,
            "hd95_mm": None if dice is None else 2.0,
            "missed": missed,
            "false_alarm": False,
        }

    summary = summarise(
        {
            "a": {"liver": row(0.8), "gall": row(None), "rad": row(None)},
            "b": {"liver": row(0.6), "gall": row(0.0, missed=True), "rad": row(None)},
        }
    )
    assert summary["liver"]["dice"] == pytest.approx(0.7)
    assert (summary["liver"]["cases"], summary["gall"]["cases"], summary["rad"]["cases"]) == (2, 1, 0)
    assert summary["gall"]["missed"] == 1
    assert summary["rad"]["dice"] is None
    assert summary["mean"]["dice"] == pytest.approx((0.7 + 0.0) / 2)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        case_metrics(np.zeros((2, 3, 4)), np.zeros((2, 3, 5)), {"a": 1}, SPACING)
