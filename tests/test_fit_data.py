"""Spacing and intensities go to the side that loses less."""

import pytest
import torch

from planners.intensity import IntensityScheme, parse_scheme
from pretrain.fit_data import fit_data, spacing_losses, window_losses
from pretrain.importers.weights import Weights

ABDOMEN = parse_scheme("ct-abdomen")
ZSCORE = parse_scheme("zscore")


def weights(spacing=(1.5, 1.5, 1.5), intensity: IntensityScheme | None = ABDOMEN) -> Weights:
    return Weights(
        name="theirs", kind="a test", method="voco", architecture={}, tensors={"a": torch.zeros(1)}, scope="encoder",
        channels=1, spatial_dims=3, patch_size=None, spacing=spacing, intensity=(intensity,) if intensity else None,
        modality="CT", licence=None, citation=None, trained_on=None, dropped=(), warnings=(), sha256="0" * 64,
    )  # fmt: skip


def decide(spacing, scheme="ct-percentile", *, inside=0.99, low=-60.0, high=180.0, theirs=None):
    window = parse_scheme(scheme).window if scheme.startswith("ct-") else None
    plan = {
        "autoseg": {
            "intensity": [
                {"channel": "CT", "scheme": scheme, "window": list(window) if window else None, "because": ""}
            ]
        },
        "foreground_intensity_properties_per_channel": {"0": {"percentile_00_5": low, "percentile_99_5": high}},
    }
    fingerprint = {"autoseg": {"channels": [{"window_share": {"ct-abdomen": inside}}]}}
    return fit_data(plan, {"spacing": list(spacing)}, fingerprint, theirs or weights())


def test_losses_of_spacing_by_hand():
    # r = 0.5, 2, 2: half the scale is lost; three quarters of the voxels are dropped in the plane
    assert spacing_losses((3.0, 0.75, 0.75), (1.5, 1.5, 1.5)) == (0.5, 0.75)
    assert spacing_losses((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)) == (0.0, 0.0)
    # finer on every axis: nothing is dropped
    assert spacing_losses((3.0, 3.0, 3.0), (1.5, 1.5, 1.5)) == (0.5, 0.0)


def test_losses_of_windows_by_hand():
    # [-100, 300] and [-175, 250]: 350 of 475 in common
    kept, taken = window_losses((-100, 300), (-175, 250), 0.9)
    assert kept == pytest.approx(1 - 350 / 475)
    assert taken == pytest.approx(0.1)
    assert window_losses((0, 10), (20, 30), 1.0)[0] == 1.0


@pytest.mark.parametrize(
    ("planned", "chosen", "reason"),
    [
        ((1.5, 1.4, 1.4), None, "close to the weights'"),
        ((3.0, 0.75, 0.75), None, "75% of the voxels"),  # taking theirs would lose more
        ((5.0, 1.4, 1.4), (1.5, 1.5, 1.5), "not the plan's"),
        ((5.0, 4.0, 4.0), None, "times as many voxels"),
    ],
)
def test_spacing_goes_to_the_side_that_loses_less(planned, chosen, reason):
    fit = decide(planned, "ct-abdomen")
    assert fit.spacing == chosen
    assert reason in fit.decisions[0].because


def test_weights_without_a_known_spacing_leave_the_plan_alone():
    fit = decide((5.0, 1.4, 1.4), "ct-abdomen", theirs=weights(spacing=None))
    assert fit.keeps_the_plan


@pytest.mark.parametrize(
    ("scheme", "inside", "low", "high", "changes"),
    [
        ("ct-abdomen", 0.99, 0, 0, False),  # the same already
        ("ct-percentile", 0.99, -60, 180, True),  # 44 % do not overlap, 1 % is cut off
        ("ct-percentile", 0.40, -60, 180, False),  # the window would cut off most
        ("ct-percentile", 0.99, -150, 240, False),  # close enough
        ("zscore", 0.99, -60, 180, False),  # no Hounsfield units
    ],
)
def test_the_window_goes_to_the_side_that_loses_less(scheme, inside, low, high, changes):
    fit = decide((1.5, 1.5, 1.5), scheme, inside=inside, low=low, high=high)
    assert (fit.intensity is not None) == changes
    if changes:
        assert [(s.name, s.window) for s in fit.intensity] == [("ct-abdomen", (-175.0, 250.0))]


def test_weights_trained_on_zscores_leave_the_windows_of_ct():
    assert decide((1.5, 1.5, 1.5), "ct-percentile", theirs=weights(intensity=ZSCORE)).intensity is None
