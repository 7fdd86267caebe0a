"""Patches beside nnU-Net's, which are the reference: from the same state of the generators come the same patches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from trainers.base import AutosegTrainer
from trainers.data import seed_all
from trainers.patches import PatchLoader, can_load, finish
from trainers.spatial import draw_pose, turn

SHAPE = (19, 45, 37)
PATCHES = {"isotropic": (15, 17, 14), "anisotropic": (6, 25, 22), "2d": (27, 22)}
ROTATION = {"isotropic": (-np.pi / 6, np.pi / 6), "anisotropic": (-np.pi, np.pi), "2d": (-np.pi, np.pi)}


class Read:
    """An array that counts the voxels that are read of it, as a chunked file of nnU-Net's would be."""

    def __init__(self, voxels):
        self.voxels, self.shape, self.count = voxels, voxels.shape, 0

    def __getitem__(self, where):
        part = self.voxels[where].copy()  # transforms work in place
        self.count += part.size
        return part


class Cases:
    """Two scans with blobs of five labels, and -1 along one side, like nnU-Net's dataset."""

    identifiers = ("a", "b")

    def __init__(self, channels=2, kind=np.int8):
        self.cases = {}
        for name, seed in zip(self.identifiers, (0, 1), strict=True):
            rng = np.random.default_rng(seed)
            coarse = rng.integers(0, 6, [-(-n // 4) for n in SHAPE])
            labels = np.kron(coarse, np.ones((4, 4, 4), int))[tuple(slice(n) for n in SHAPE)].astype(kind)
            if np.issubdtype(kind, np.signedinteger):
                labels[:, :, :3] = -1
            image = rng.normal(size=(channels, *SHAPE)).astype(np.float32)
            places = {u: np.argwhere(labels[None] == u) for u in range(1, 6)}
            self.cases[name] = (Read(image), Read(labels[None]), None, {"class_locations": places})

    def load_case(self, name):
        return self.cases[name]

    @property
    def count(self):
        return sum(image.count + labels.count for image, labels, *_ in self.cases.values())


def transforms(kind, p=0.6, intensities=True, **changes):
    """nnU-Net's for training, with rotation and scaling more often than it has them, and changes to the intensities or not."""
    patch, dims = PATCHES[kind], len(PATCHES[kind])
    made = AutosegTrainer.get_training_transforms(
        patch, ROTATION[kind], [[1.0] * dims, [0.5] * dims], tuple(range(dims)), kind == "anisotropic"
    )
    spatial = next(t for t in made.transforms if isinstance(t, SpatialTransform))
    for name, value in {"p_rotation": p, "p_scaling": p, **changes}.items():
        setattr(spatial, name, value)
    if not intensities:
        made.transforms = [t for t in made.transforms if not isinstance(t, RandomTransform)]
    return made


def window(kind):
    size = get_patch_size(np.array(PATCHES[kind]), *[ROTATION[kind]] * 3, (0.85, 1.25))
    if kind == "anisotropic":
        size[0] = PATCHES[kind][0]
    return size


def loader(kind, cls, data, *, oversample=0.33, batch=2, **options):
    labels = SimpleNamespace(all_labels=[0, 1, 2, 3, 4, 5], has_ignore_label=False)
    made = transforms(kind, **options)
    return cls(data, batch, window(kind), PATCHES[kind], labels, oversample, transforms=made)


def both(kind, batches, *, dtype=np.int8, **options):
    """The same batches from nnU-Net's loader and ours."""
    pairs = []
    for cls in (nnUNetDataLoader, PatchLoader):
        made = loader(kind, cls, Cases(kind=dtype), **options)
        drawn = []
        for seed in range(batches):
            seed_all(seed)
            drawn.append(next(made))
        pairs.append(drawn)
    return list(zip(*pairs, strict=True))


@pytest.mark.parametrize("kind", PATCHES)
def test_patches_are_nnunets(kind):
    different = total = 0
    for theirs, ours in both(kind, 12):
        assert list(theirs["keys"]) == list(ours["keys"])
        assert ours["data"].shape == theirs["data"].shape
        assert torch.allclose(ours["data"], theirs["data"], atol=1e-4)
        assert [(t.shape, t.dtype) for t in ours["target"]] == [(t.shape, t.dtype) for t in theirs["target"]]
        different += int((ours["target"][0] != theirs["target"][0]).sum())
        total += ours["target"][0].numel()
    assert different <= max(2, 1e-5 * total)  # half way between two labels the last bit of a position decides


@pytest.mark.parametrize("kind", PATCHES)
def test_patches_that_are_only_cut_out_are_nnunets_to_the_bit(kind):
    for theirs, ours in both(kind, 6, p=0, intensities=False):
        assert torch.equal(ours["data"], theirs["data"])
        assert all(torch.equal(a, b) for a, b in zip(ours["target"], theirs["target"], strict=True))


def test_labels_of_types_without_a_sign_are_nnunets():
    for theirs, ours in both("isotropic", 4, dtype=np.uint8, p=1):
        assert all(torch.equal(a, b) for a, b in zip(ours["target"], theirs["target"], strict=True))


def test_outside_the_scan_the_image_is_zero_and_labels_are_minus_one():
    made = loader("isotropic", PatchLoader, Cases(), p=1, scaling=(2.5, 2.5))
    seed_all(0)
    sample = finish(made.read("a", False), PATCHES["isotropic"], lambda **sample: sample)
    outside = (sample["image"] == 0).all(0)
    assert 0.2 < outside.float().mean() < 0.9
    assert (sample["segmentation"][0][outside] == -1).all()
    assert (sample["segmentation"][0][~outside] >= 0).any()


def test_half_way_between_two_labels_the_nearer_corners_is_taken():
    """nnU-Net compares scores as half-precision numbers: 0.5001 of one label is a tie, which the nearest corner decides."""
    labels = torch.tensor([[[3, 5, 5], [3, 5, 5], [3, 5, 5]]], dtype=torch.int8)
    image = torch.zeros((1, 3, 3))
    reference = SpatialTransform((1, 1), 0, False, border_mode_seg="constant", padding_value_seg=-1)
    for x, label in ((0.4999, 3), (0.5001, 5), (0.499, 3), (0.501, 5)):
        ours = turn(image, labels, np.eye(2), (0.3, x), (1, 1))[1]
        grid = torch.tensor([[[(2 * x + 1) / 3 - 1, (2 * 0.3 + 1) / 3 - 1]]])
        assert ours.item() == reference._apply_to_segmentation(labels, grid=grid).item() == label


def test_scores_that_are_equal_in_half_precision_tie():
    """0.44992 of the nearest corner's label and 0.45005 of another are both 450 thousandths."""
    labels = torch.tensor([[[3, 5], [5, 7]]], dtype=torch.int8)
    y, x = 0.25, 0.4001
    reference = SpatialTransform((1, 1), 0, False, border_mode_seg="constant", padding_value_seg=-1)
    grid = torch.tensor([[[(2 * x + 1) / 2 - 1, (2 * y + 1) / 2 - 1]]])
    wide = torch.nn.functional.pad(labels, (0, 1, 0, 1))  # a box holds one voxel more than the corners
    ours = turn(torch.zeros((1, 3, 3)), wide, np.eye(2), (y, x), (1, 1))[1]
    assert ours.item() == reference._apply_to_segmentation(labels, grid=grid).item() == 3


def test_among_three_tied_labels_the_smallest_wins_unless_the_nearest_is_one_of_them():
    # Three corners with a quarter each but one with more of the fourth's share: none but the nearest may win a tie.
    labels = torch.tensor([[[9, 4, 0], [7, 2, 0], [0, 0, 0]]], dtype=torch.int8)
    tied = turn(torch.zeros((1, 3, 3)), labels, np.eye(2), (0.50004, 0.50004), (1, 1))[1]
    assert tied.item() == 2  # all four tie, and the corner above is the nearest
    loser = torch.tensor([[[9, 4, 0], [4, 9, 0], [0, 0, 0]]], dtype=torch.int8)
    assert turn(torch.zeros((1, 3, 3)), loser, np.eye(2), (0.5, 0.49997), (1, 1))[1].item() == 9


@pytest.mark.parametrize("kind", PATCHES)
def test_rotation_scaling_and_place_are_drawn_as_nnunet_draws_them(kind):
    """The same matrices one by one, and how often there is none, which is nnU-Net's 0.8 * 0.8."""
    spatial = next(t for t in transforms(kind, p=0.2).transforms if isinstance(t, SpatialTransform))
    size = tuple(int(n) for n in window(kind)[-len(spatial.patch_size) :])
    plain = 0
    for seed in range(400):
        np.random.seed(seed)
        ours = draw_pose(spatial, size)
        plain += ours.matrix is None
        if seed < 60:
            np.random.seed(seed)
            theirs = spatial.get_parameters(image=torch.zeros((1, *size)))
            assert ours.centre == tuple(theirs["center_location_in_pixels"])
            assert (
                np.array_equal(ours.matrix, theirs["affine"]) if ours.matrix is not None else theirs["affine"] is None
            )
    assert plain / 400 == pytest.approx(0.64, abs=0.08)


def test_patches_with_forced_foreground_have_some():
    made = loader("isotropic", PatchLoader, Cases(), oversample=1.0, p=0)
    made._data.cases["a"][1].voxels[:] = 0
    made._data.cases["a"][1].voxels[0, 9, 22, 18] = 4
    made._data.cases["a"][3]["class_locations"] = {4: np.array([[0, 9, 22, 18]])}
    made.indices = ["a"]
    for seed in range(5):
        seed_all(seed)
        assert (next(made)["target"][0] == 4).flatten(1).any(1).all()


def test_only_the_voxels_that_are_needed_are_read():
    counts = {}
    for cls in (nnUNetDataLoader, PatchLoader):
        made = loader("isotropic", cls, Cases(), p=0)
        for seed in range(10):
            seed_all(seed)
            next(made)
        counts[cls] = made._data.count
    patch, channels_and_labels = np.prod(PATCHES["isotropic"]), 3
    assert counts[PatchLoader] <= 20 * channels_and_labels * patch
    assert counts[nnUNetDataLoader] > 2 * counts[PatchLoader]


@pytest.mark.parametrize("kind", PATCHES)
def test_transforms_of_nnunets_trainer_are_covered_and_others_are_not(kind):
    assert can_load(transforms(kind))
    for change in (
        {"p_elastic_deform": 0.1},
        {"random_crop": True},
        {"mode_seg": "nearest"},
        {"padding_value_seg": 0},
        {"seg_tiebreak": "lowest"},
        {"rotation": lambda image, dim: 0.1},
    ):
        assert not can_load(transforms(kind, **change))
