"""The export of logits gives nnU-Net's masks and probabilities, whole or slab by slab."""

import numpy as np
import pytest
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.ndimage import gaussian_filter

from tests.tiny import tiny_plan
from trainers.export import export_of_case, is_exact, labels_from_logits
from trainers.winners import Classes


def managers(*, spacing=(2.5, 1.1, 1.0), dims=3, classes=4, regions=None, transpose=(0, 1, 2), **resampling):
    """nnU-Net's three: of the plan, the configuration and the labels."""
    plan = tiny_plan(dims=dims)
    plan["transpose_forward"] = list(transpose)
    plan["transpose_backward"] = [int(axis) for axis in np.argsort(transpose)]
    name = "3d_fullres" if dims == 3 else "2d"
    plan["configurations"][name]["spacing"] = list(spacing)[3 - dims :]
    plan["configurations"][name]["resampling_fn_probabilities_kwargs"] |= resampling
    labels = {"background": 0, **{f"c{label}": label for label in range(1, classes)}}
    dataset_json = {"labels": regions or labels, "channel_names": {"0": "MR"}, "file_ending": ".nii.gz"}
    if regions:
        dataset_json["regions_class_order"] = [1, 2, 3]
    manager = PlansManager(plan)
    return manager, manager.get_configuration(name), manager.get_label_manager(dataset_json)


def properties(shape, spacing=(2.5, 1.1, 1.0), *, before=None, start=(0, 0, 0)):
    return {
        "spacing": list(spacing),
        "shape_before_cropping": before or shape,
        "bbox_used_for_cropping": [[s, s + n] for s, n in zip(start, shape, strict=True)],
        "shape_after_cropping_and_before_resampling": shape,
    }


def smooth(heads, shape, seed=0):
    """Logits with margins and boundaries as a network gives them, (heads, z, y, x) float32."""
    noise = np.random.default_rng(seed).normal(size=(heads, *shape))
    return torch.from_numpy(np.stack([gaussian_filter(n, 1.2) for n in noise]).astype(np.float32) * 20)


def mask_from_logits(logits, case, *parts, **options):
    export = export_of_case(logits.shape[1:], case, *parts, **options)
    export.add(logits)
    return export.result()


def nnunet(logits, case, plan, configuration, labels, **options):
    return convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, plan, configuration, labels, case, num_threads_torch=1, **options
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [((7, 11, 9), (9, 19, 14)), ((11, 13, 9), (5, 8, 7)), ((7, 11, 9), (12, 7, 9)), ((7, 11, 9), (7, 11, 9))],
    ids=["finer", "coarser", "both", "equal"],
)
@pytest.mark.parametrize("rough", [False, True], ids=["smooth", "noise"])
def test_the_mask_is_that_of_nnunet(old, new, rough):
    parts = managers(spacing=(1, 1, 1))
    logits = torch.randn(4, *old, generator=torch.Generator().manual_seed(0)) if rough else smooth(4, old)
    case = properties(new, (1.2, 1, 0.9))
    mask, probabilities = mask_from_logits(logits, case, *parts)
    expected = nnunet(logits, case, *parts)
    assert (mask.dtype, probabilities) == (expected.dtype, None)
    assert (mask == expected).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("planes", [5, 9, 13], ids=["fewer", "more", "many"])
def test_thick_slices_are_not_interpolated(axis, planes):
    old, new, spacing = [6, 7, 9], [11, 12, 8], [1.0, 1.0, 1.0]
    old[axis], new[axis], spacing[axis] = 6, planes, 5.0
    parts = managers(spacing=spacing)
    logits, case = smooth(4, old), properties(tuple(new), spacing)
    assert (mask_from_logits(logits, case, *parts)[0] == nnunet(logits, case, *parts)).all()
    interpolated = labels_from_logits(logits, new)
    assert (interpolated != labels_from_logits(logits, new, separate_axis=axis)).any()


@pytest.mark.parametrize("in_plane", [(1.3, 1.2), (4.0, 1.0)], ids=["square", "oblong"])
def test_slices_of_a_2d_configuration_stay_apart(in_plane):
    parts = managers(dims=2, spacing=(9, *in_plane))
    logits, case = smooth(4, (5, 9, 8)), properties((5, 11, 13), (2.5, 1.1, 1.0))
    assert (mask_from_logits(logits, case, *parts)[0] == nnunet(logits, case, *parts)).all()


REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "rest": 3}


def test_regions_are_painted_one_after_the_other():
    parts = managers(regions=REGIONS, spacing=(1, 1, 1))
    logits, case = smooth(3, (7, 11, 9)), properties((9, 16, 14), (1, 1, 1))
    mask = mask_from_logits(logits, case, *parts)[0]
    assert set(np.unique(mask)) == {0, 1, 2, 3}
    assert (mask == nnunet(logits, case, *parts)).all()


def test_many_classes_need_two_bytes():
    parts = managers(classes=300, spacing=(1, 1, 1))
    logits, case = smooth(300, (5, 9, 8)), properties((7, 12, 10), (1, 1, 1))
    mask = mask_from_logits(logits, case, *parts)[0]
    assert mask.dtype == np.uint16
    assert mask.max() > 255
    assert (mask == nnunet(logits, case, *parts)).all()


@pytest.mark.parametrize("regions", [None, REGIONS], ids=["classes", "regions"])
def test_cropping_and_transposition_are_undone_in_mask_and_probabilities(regions):
    parts = managers(spacing=(1, 1, 1), transpose=(2, 0, 1), regions=regions)
    logits = smooth(parts[2].num_segmentation_heads, (7, 11, 9))
    case = properties((9, 16, 14), (1, 1, 1), before=(12, 17, 19), start=(2, 1, 3))
    mask, probabilities = mask_from_logits(logits, case, *parts, probabilities=True)
    expected, expected_probabilities = nnunet(logits, case, *parts, return_probabilities=True)
    assert mask.shape == (17, 19, 12)
    assert (mask == expected).all()
    assert (probabilities.dtype, probabilities.shape) == (np.float16, expected_probabilities.shape)
    assert np.abs(probabilities - expected_probabilities).max() < 6e-4


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_probabilities_of_thick_slices(axis):
    old, new, spacing = [6, 7, 9], [11, 5, 13], [1.0, 1.0, 1.0]
    if axis is not None:
        spacing[axis] = 5.0
    parts, logits, case = managers(spacing=spacing), smooth(4, old), properties(tuple(new), spacing)
    _, expected = nnunet(logits, case, *parts, return_probabilities=True)
    _, probabilities = mask_from_logits(logits, case, *parts, probabilities=True)
    assert np.abs(probabilities - expected).max() < 6e-4


@pytest.mark.parametrize("planes", [1, 2, 3, 5])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("new", [(17, 12, 13), (5, 12, 13)], ids=["finer", "coarser"])
def test_slabs_give_what_the_whole_gives(planes, axis, new, monkeypatch):
    monkeypatch.setattr("trainers.export._SAMPLES_AT_ONCE", 2 * 12 * 13)
    spacing = [1.0, 1.0, 1.0]
    if axis is not None:
        spacing[axis] = 5.0
    parts, logits, case = managers(spacing=spacing), smooth(4, (11, 9, 8)), properties(new, spacing)
    whole = mask_from_logits(logits, case, *parts, probabilities=True)
    export = export_of_case((11, 9, 8), case, *parts, probabilities=True)
    for start in range(0, 11, planes):
        export.add(logits[:, start : start + planes])
    assert all((a == b).all() for a, b in zip(export.result(), whole, strict=True))


def test_a_class_that_wins_at_no_voxel_wins_between_two():
    """Of ordered classes the middle one wins half way: the bound by the runners-up must not leave it out."""
    logits = torch.tensor([[[[5.0, -5.0]]], [[[1.0, 1.0]]], [[[-5.0, 5.0]]]])
    parts, case = managers(classes=3, spacing=(1, 1, 1)), properties((1, 1, 9), (1, 1, 1))
    mask = mask_from_logits(logits, case, *parts)[0]
    assert 1 in mask
    assert 1 not in logits.argmax(0)
    assert (mask == nnunet(logits, case, *parts)).all()


def test_leaving_classes_out_changes_nothing(monkeypatch):
    logits = torch.randn(40, 6, 9, 8, generator=torch.Generator().manual_seed(0)) + smooth(40, (6, 9, 8))
    fast = labels_from_logits(logits, (11, 13, 17))
    compared = []
    challenge = Classes._challenge

    def count(self, best, value, samples, *rest):
        compared.append(len(samples))
        challenge(self, best, value, samples, *rest)

    monkeypatch.setattr(Classes, "_challenge", count)
    labels_from_logits(logits, (11, 13, 17))
    pruned, compared[:] = sum(compared), []
    monkeypatch.setattr("trainers.winners.np.flatnonzero", lambda found: np.arange(found.size))
    assert (labels_from_logits(logits, (11, 13, 17)) == fast).all()
    assert pruned < sum(compared) / 3


def test_equal_logits_go_to_the_lowest_class():
    logits = torch.zeros(3, 3, 4, 5, dtype=torch.float16)
    logits[1:, :, :, 2:] = 1
    labels = labels_from_logits(logits, (5, 7, 11))
    assert set(np.unique(labels)) == {0, 1}


def test_half_precision_differs_from_nnunet_only_by_its_rounding():
    parts, case = managers(spacing=(1, 1, 1)), properties((9, 19, 14), (1, 1, 1))
    logits = smooth(4, (7, 11, 9)).half()
    mask = mask_from_logits(logits, case, *parts)[0]
    assert (mask == nnunet(logits.float(), case, *parts)).all()
    assert (mask != nnunet(logits, case, *parts)).mean() < 2e-3


@pytest.mark.parametrize("how", [{"order": 3}, {"order_z": 1}], ids=str)
def test_other_resampling_is_left_to_nnunet(how):
    parts = managers(spacing=(5, 1, 1), **how)
    logits, case = smooth(4, (6, 9, 8)), properties((11, 12, 13), (5, 1, 1))
    assert not is_exact(*parts[1:])
    assert (mask_from_logits(logits, case, *parts)[0] == nnunet(logits, case, *parts)).all()
