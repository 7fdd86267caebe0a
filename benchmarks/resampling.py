"""Images and labels on another grid: nnU-Net's default resampling and ours, from 1.5 to 1.2 mm.

With `Scale.full` a CT of 224 x 202 x 244 voxels becomes 280 x 252 x 305; separate z takes every fourth slice of it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, resample_data_or_seg_to_shape

from benchmarks.measuring import Agreement, Duel, Scale
from benchmarks.scans import Scan, made_up, real_ct
from planners.resample import resample_to_shape

_FINER = 0.8  # of the old spacing
_LIVER, _KIDNEYS = 5, (2, 3)


def image(scale: Scale) -> Duel:
    """Cubic splines on all axes."""
    return image_duel(scan(scale))


def image_separate_z(scale: Scale) -> Duel:
    """Cubic splines in the plane, the nearest slice along the coarse axis."""
    return image_duel(_every_fourth_slice(scan(scale)))


def labels_3(scale: Scale) -> Duel:
    """Liver, kidneys and background."""
    return labels_duel(organs(_structures(scale, (71, 103, 119))))


def labels_62(scale: Scale) -> Duel:
    """As many structures as the CT shows, and background."""
    return labels_duel(_structures(scale, (71, 103, 119)))


def labels_separate_z(scale: Scale) -> Duel:
    """The same where the coarse axis is resampled apart."""
    return labels_duel(_every_fourth_slice(_structures(scale, (35, 253, 271))))


@lru_cache(maxsize=1)
def scan(scale: Scale) -> Scan:
    """The CT, or a made-up body of 47 x 71 x 79 voxels, whose grids share no points where votes tie."""
    return real_ct(1.5) if scale is Scale.full else made_up((47, 71, 79), labels=62)


def organs(whole: Scan) -> Scan:
    """The scan with two labels: liver and kidneys."""
    table = np.zeros(int(whole.labels.max()) + 1, np.int16)
    table[_LIVER], table[list(_KIDNEYS)] = 1, 2
    return Scan(whole.image, table[whole.labels], whole.spacing)


def image_duel(case: Scan) -> Duel:
    """Resampling of z-scores."""
    scores = ((case.image - case.image.mean()) / case.image.std()).astype(np.float32)[None]
    arguments = (scores, *_target(case))
    return Duel(
        lambda: resample_data_or_seg_to_shape(*arguments, is_seg=False, order=3, force_separate_z=None),
        lambda: resample_to_shape(*arguments, is_seg=False, order=3),
        images_agree,
    )


def labels_duel(case: Scan) -> Duel:
    """Resampling of a label map."""
    arguments = (case.labels[None], *_target(case))
    return Duel(
        lambda: resample_data_or_seg_to_shape(*arguments, is_seg=True, order=1, force_separate_z=None),
        lambda: resample_to_shape(*arguments, is_seg=True, order=1),
        labels_agree,
    )


def images_agree(reference: np.ndarray, ours: np.ndarray) -> Agreement:
    """Largest difference in standard deviations of the reference; less than 1e-5 is asked for."""
    difference = float(np.abs(reference - ours).max() / reference.std())
    return Agreement(f"max {difference:.1e} sd", difference < 1e-5)


def labels_agree(reference: np.ndarray, ours: np.ndarray) -> Agreement:
    """Equal voxels; 0.99999 of them are asked for."""
    different = int((np.asarray(reference) != np.asarray(ours)).sum())
    return Agreement(f"{different} of {ours.size:,} voxels differ", different <= 1e-5 * ours.size)


def _structures(scale: Scale, small: tuple[int, ...]) -> Scan:
    # Smaller bodies would be mostly boundary, where ours gains least: 50 times instead of 80 with 62 labels in 47 x 71 x 79.
    return scan(scale) if scale is Scale.full else made_up(small, labels=62)


def _target(case: Scan) -> tuple[np.ndarray, tuple[float, ...], tuple[float, ...]]:
    spacing = tuple(_FINER * s for s in case.spacing)
    return compute_new_shape(case.image.shape, case.spacing, spacing), case.spacing, spacing


def _every_fourth_slice(case: Scan) -> Scan:
    spacing = (4 * case.spacing[0], *case.spacing[1:])
    return Scan(case.image[::4].copy(), case.labels[::4].copy(), spacing)
