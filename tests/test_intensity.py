"""Intensity schemes: chosen from voxels, carried out exactly by stock nnU-Net."""

from __future__ import annotations

import numpy as np
import pytest
from nnunetv2.preprocessing.normalization import default_normalization_schemes as stock

from planners.errors import SettingsError
from planners.intensity import WINDOWS, infer_scheme, parse_scheme

MEASURED = {
    "mean": 90.0, "std": 40.0, "median": 92.0, "min": -300.0, "max": 900.0, "percentile_00_5": -120.0,
    "percentile_99_5": 310.0,
}  # fmt: skip
CT_VOXELS = {
    "low": -1024.0,
    "high": 1500.0,
    "integer_share": 1.0,
    "air_share": 0.3,
    "window_share": dict.fromkeys(WINDOWS, 0.99),
}
MR_VOXELS = {
    "low": 0.0,
    "high": 700.0,
    "integer_share": 1.0,
    "air_share": 0.0,
    "window_share": dict.fromkeys(WINDOWS, 0.5),
}


def normalise(scheme, voxels):
    """What nnU-Net's own class makes of `voxels` (z, y, x) with the numbers a plan would hold."""
    cls = getattr(stock, scheme.normalization)
    return cls(scheme.uses_mask, scheme.stock_properties(MEASURED)).run(voxels.copy(), np.zeros_like(voxels, dtype=int))


@pytest.mark.parametrize("name", sorted(WINDOWS))
def test_named_windows_map_to_zero_one_exactly(name):
    low, high = WINDOWS[name]
    voxels = np.random.default_rng(0).uniform(-2000, 3000, (5, 7, 6)).astype(np.float32)
    expected = (np.clip(voxels, low, high) - low) / (high - low)
    np.testing.assert_allclose(normalise(parse_scheme(name), voxels), expected, atol=1e-6)


def test_own_window():
    scheme = parse_scheme("ct:-100,300.5")
    assert scheme.window == (-100.0, 300.5)
    assert normalise(scheme, np.full((2, 2, 2), 300.5, np.float32)).max() == pytest.approx(1.0)


def test_ct_percentile_keeps_the_measured_numbers():
    assert parse_scheme("ct-percentile").stock_properties(MEASURED) == MEASURED


@pytest.mark.parametrize(
    ("name", "normalization", "masked"),
    [
        ("ct-percentile", "CTNormalization", False),
        ("zscore", "ZScoreNormalization", False),
        ("zscore-masked", "ZScoreNormalization", True),
        ("minmax", "RescaleTo01Normalization", False),
        ("rgb", "RGBTo01Normalization", False),
        ("none", "NoNormalization", False),
    ],
)
def test_stock_schemes(name, normalization, masked):
    scheme = parse_scheme(name)
    assert (scheme.normalization, scheme.uses_mask) == (normalization, masked)
    assert hasattr(stock, scheme.normalization)


@pytest.mark.parametrize("text", ["abdomen", "ct:300,-100", "ct:1", "CT"])
def test_unknown_schemes_are_refused(text):
    with pytest.raises(SettingsError):
        parse_scheme(text)


@pytest.mark.parametrize(
    ("labels", "scheme"),
    [
        (["background", "spleen", "rkid", "liver"], "ct-abdomen"),
        (["background", "left lung", "trachea"], "ct-chest"),
        (["background", "parotid_left", "brainstem"], "ct-headneck"),
        (["background", "LV", "RV", "myocardium"], "ct-heart"),
        (["background", "liver", "lung"], "ct-percentile"),  # two regions
        (["background", "label_1"], "ct-percentile"),
    ],
)
def test_region_decides_the_window_of_ct(labels, scheme):
    assert infer_scheme("CT", CT_VOXELS, labels, False).name == scheme


def test_structures_outside_the_window_get_percentiles():
    voxels = {**CT_VOXELS, "window_share": {**CT_VOXELS["window_share"], "ct-abdomen": 0.97}}
    scheme = infer_scheme("CT", voxels, ["liver"], False)
    assert scheme.name == "ct-percentile"
    assert "97.0%" in scheme.because


def test_voxels_overrule_a_channel_name_that_says_nothing():
    assert infer_scheme("scan", CT_VOXELS, ["liver"], False).name == "ct-abdomen"


def test_a_misspelt_ct_channel_is_not_zscored():
    assert infer_scheme("ct scan", CT_VOXELS, ["thing"], False).name == "ct-percentile"


def test_a_channel_called_ct_that_is_already_normalised_is_not_windowed():
    voxels = {**CT_VOXELS, "low": 0.0, "high": 1.0, "air_share": 0.0, "integer_share": 0.01}
    assert infer_scheme("CT", voxels, ["liver"], False).name == "zscore"


@pytest.mark.parametrize(("masked", "name"), [(False, "zscore"), (True, "zscore-masked")])
def test_mr_is_zscored(masked, name):
    assert infer_scheme("T1", MR_VOXELS, ["liver"], masked).name == name


def test_mr_with_a_signed_range_is_not_taken_for_ct():
    voxels = {**MR_VOXELS, "low": -3.5, "high": 9.0, "integer_share": 0.0}
    assert infer_scheme("FLAIR", voxels, ["tumour"], False).name == "zscore"
