"""DA values of DESIGN §4 and the rule against nnU-Net's own topology (methods/pumit.md §7, check 14)."""

from __future__ import annotations

import numpy as np
import pytest
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

from planners.anisotropy import degree_of_anisotropy, degree_per_stage, leading_in_plane_stages, strides_of_degree


@pytest.mark.parametrize(
    ("spacing", "degree"),
    [
        ((5, 0.7, 0.7), 2),
        ((3, 0.8, 0.8), 1),
        ((1, 1, 1), 0),
        ((10, 1.25, 1.25), 3),
        ((7.5, 0.5, 0.5), 3),
        ((4.9999995, 1.25, 1.25), 2),  # header noise just below a ratio of four
        ((2, 0.5, 2), 2),  # the finer plane spacing counts
        ((0.5, 1, 1), 0),  # slices thinner than the plane are not anisotropic in this sense
    ],
)
def test_degree(spacing, degree):
    assert degree_of_anisotropy(spacing) == degree


@pytest.mark.parametrize("spacing", [(1, 1), (0, 1, 1), (1, float("nan"), 1)])
def test_impossible_spacings_are_refused(spacing):
    with pytest.raises(ValueError, match="three positive lengths"):
        degree_of_anisotropy(spacing)


def test_degree_falls_by_one_a_stage():
    assert degree_per_stage(2, 5) == [2, 1, 0, 0, 0]


def in_tolerance_band(spacing) -> bool:
    """A ratio so close below a power of two that autoseg counts it as one (header noise) and nnU-Net does not."""
    return np.log2(spacing[0] / min(spacing[1:])) % 1 > 0.998


def test_rule_equals_nnunets_topology_on_patches_not_limited_by_size():
    rng = np.random.default_rng(0)
    for _ in range(500):
        plane = rng.uniform(0.3, 2.0)
        spacing = (plane * 2 ** rng.uniform(0, 4.5), plane, plane)
        if in_tolerance_band(spacing):
            continue
        _, strides, kernels, _, _ = get_pool_and_conv_props(spacing, (4096, 4096, 4096), 4, 999999)
        degree = degree_of_anisotropy(spacing)
        assert leading_in_plane_stages(strides) == degree, spacing
        assert [k[0] for k in kernels].index(3) == degree, spacing


def test_rule_equals_nnunets_topology_with_unequal_plane_spacings():
    rng = np.random.default_rng(1)
    for _ in range(500):
        plane = rng.uniform(0.3, 2.0, size=2)
        spacing = (plane.max() * 2 ** rng.uniform(0, 4), *plane)
        if in_tolerance_band(spacing):
            continue
        _, strides, _, _, _ = get_pool_and_conv_props(spacing, (8192, 8192, 8192), 4, 999999)
        assert leading_in_plane_stages(strides) == degree_of_anisotropy(spacing), spacing


def test_strides_leave_the_slices_alone_as_often_as_da_says():
    assert strides_of_degree(0, 3) == [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
    assert strides_of_degree(2, 4) == [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]]
    assert all(leading_in_plane_stages(strides_of_degree(degree, 6)) == degree for degree in range(6))
