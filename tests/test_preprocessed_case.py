"""Each step of preprocessing a case gives what nnU-Net's step gives."""

from __future__ import annotations

from pathlib import Path

import blosc2
import numpy as np
import pytest
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero as nnunet_crop
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from planners.class_locations import class_locations
from planners.crop import crop_to_nonzero
from planners.preprocessed_case import preprocess_case, preprocess_voxels, save_case

RNG = np.random.default_rng(0)


def scan(channels=2, shape=(9, 14, 12)):
    """Zeros around a body with a hole and a channel that is zero in places."""
    image = RNG.normal(5, 1, (channels, *shape)).astype(np.float32)
    image[:, :2], image[:, :, -3:], image[:, 4:6, 5:8, 5:7] = 0, 0, 0
    image[0, 3] = 0
    return image


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_crop_is_nnunets(channels, labelled):
    image = scan(channels)
    labels = RNG.integers(0, 3, (1, *image.shape[1:])).astype(np.int8) if labelled else None
    expected = nnunet_crop(image.copy(), None if labels is None else labels.copy())
    ours = crop_to_nonzero(image.copy(), labels)
    for theirs, mine in zip(expected, ours, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert ours[1].dtype == np.int8


def test_a_bay_is_outside_and_a_hole_is_not():
    image = np.ones((1, 5, 6, 7), np.float32)
    image[0, 2, 2, 2] = 0  # a hole
    image[0, 0, 3, 3] = 0  # open to the border
    labels = crop_to_nonzero(image, None)[1]
    assert labels[0, 2, 2, 2] == 0
    assert labels[0, 0, 3, 3] == -1


def test_a_scan_of_zeros_is_kept_whole():
    image = np.zeros((1, 3, 4, 5), np.float32)
    expected = nnunet_crop(image, None)
    for theirs, mine in zip(expected, crop_to_nonzero(image, None), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    "classes", [[1, 2, 3, 7], [(1, 2), (1, 3), (7,)], [1, 2, [-1, 0, 1, 2]], [9], [300, 1]], ids=str
)
def test_class_locations_are_nnunets(classes):
    labels = RNG.choice([-1, 0, 0, 0, 1, 2, 3, 300], (1, 41, 37, 29)).astype(np.int16)
    expected = DefaultPreprocessor._sample_foreground_locations(labels, classes)
    ours = class_locations(labels, classes)
    assert list(ours) == list(expected)
    for key, voxels in expected.items():
        np.testing.assert_array_equal(ours[key], voxels)
        assert np.asarray(ours[key]).dtype == np.asarray(voxels).dtype


def plan(normalisation="ZScoreNormalization", mask=True, spacing=(2.0, 0.8, 1.1), transpose=(1, 0, 2), **preprocessor):
    common = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    settings = {
        "architecture": {},
        "preprocessor_name": "DefaultPreprocessor",
        "patch_size": [8, 8, 8],
        "spacing": list(spacing),
        "normalization_schemes": [normalisation] * 2,
        "use_mask_for_norm": [mask] * 2,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": common,
        "resampling_fn_seg_kwargs": {**common, "is_seg": True, "order": 1},
    } | preprocessor
    numbers = {"mean": 5.0, "std": 1.5, "percentile_00_5": 2.0, "percentile_99_5": 8.0}
    return {
        "transpose_forward": list(transpose),
        "transpose_backward": list(np.argsort(transpose)),
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": numbers, "1": numbers},
        "configurations": {"it": settings},
    }


DATASET = {"channel_names": {"0": "MR", "1": "MR"}, "labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}}
REGIONS = {
    "channel_names": {"0": "MR", "1": "MR"},
    "labels": {"background": 0, "whole": [1, 2], "b": 2},
    "regions_class_order": [1, 2],
}


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    ("settings", "dataset_json"),
    [
        ({}, DATASET),
        ({"transpose": (0, 1, 2), "spacing": (0.9, 0.8, 1.1)}, DATASET),
        ({"normalisation": "CTNormalization", "mask": False}, REGIONS),
        ({"spacing": (0.8, 1.1)}, DATASET),  # 2D: slices keep their distance
        ({"spacing": (7.0, 0.8, 1.1)}, REGIONS),  # the coarse axis apart
        ({"resampling_fn_data": "no_resampling_hack", "resampling_fn_data_kwargs": {}}, DATASET),
    ],
    ids=["transposed", "plain", "CT, regions", "2D", "separate z", "another resampling"],
)
def test_a_case_is_what_nnunet_makes_of_it(settings, dataset_json, labelled):
    made = plan(**settings)
    if "resampling_fn_data" in settings:
        made["configurations"]["it"] |= {"resampling_fn_seg": "no_resampling_hack", "resampling_fn_seg_kwargs": {}}
    manager = PlansManager(made)
    image = scan()
    labels = RNG.integers(0, 3, (1, *image.shape[1:])).astype(np.float32) if labelled else None
    arguments = (manager, manager.get_configuration("it"), dataset_json)
    expected = DefaultPreprocessor(verbose=False).run_case_npy(
        image.copy(), None if labels is None else labels.copy(), {"spacing": [0.7, 2.2, 1.0]}, *arguments
    )
    ours = preprocess_voxels(image.copy(), labels, {"spacing": [0.7, 2.2, 1.0]}, *arguments)
    assert np.abs(ours[0] - expected[0]).max() < 1e-5 * expected[0].std()
    assert ours[1].dtype == expected[1].dtype
    np.testing.assert_array_equal(ours[1], expected[1])
    assert ours[2].keys() == expected[2].keys()
    for key, value in expected[2].items():
        if key != "class_locations":
            assert ours[2][key] == value
    for key, voxels in expected[2].get("class_locations", {}).items():
        np.testing.assert_array_equal(ours[2]["class_locations"][key], voxels)


def test_another_preprocessor_of_a_plan_is_used(monkeypatch):
    class Other(DefaultPreprocessor):
        def run_case(self, images, label, *arguments):
            return images, label, {}

    monkeypatch.setattr(ConfigurationManager, "preprocessor_class", Other)
    made = preprocess_case([Path("a")], Path("b"), plan(preprocessor_name="Other"), "it", DATASET)
    assert made == (["a"], "b", {})


def test_labels_of_another_size_are_refused():
    manager = PlansManager(plan())
    with pytest.raises(ValueError, match=r"\(9, 14, 11\) voxels and the image \(9, 14, 12\)"):
        preprocess_voxels(
            scan(), np.zeros((1, 9, 14, 11)), {"spacing": [1, 1, 1]}, manager, manager.get_configuration("it"), DATASET
        )


def test_stock_nnunet_reads_a_saved_case(tmp_path):
    image, labels = scan(), RNG.integers(-1, 3, (1, 9, 14, 12)).astype(np.int8)
    save_case(image, labels, {"spacing": [1, 1, 1]}, plan(), "it", tmp_path, "case")
    read = nnUNetDatasetBlosc2(str(tmp_path)).load_case("case")
    np.testing.assert_array_equal(read[0][:], image)
    np.testing.assert_array_equal(read[1][:], labels)
    assert read[3] == {"spacing": [1, 1, 1]}
    assert blosc2.open(str(tmp_path / "case_seg.b2nd")).dtype == np.int8
