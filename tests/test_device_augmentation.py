"""Patches finished on the training device: the very patches of the CPU, without mixing the two and nearly without waiting."""

import copy

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import pin_memory_of_all_eligible_items_in_dict
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from tests.pretended_gpu import GPU, content, pretended_gpu
from tests.test_patches import PATCHES, ROTATION, Cases, loader
from tests.test_trainer import short_train, weights
from tests.tiny import tiny_plan, write_tiny_dataset, write_tiny_plan
from trainers import base, spatial
from trainers.base import AutosegTrainer
from trainers.data import in_processes, seed_all
from trainers.device_augmentation import DeviceAugmentation, for_device
from trainers.patches import BoxLoader, PatchLoader, finish

CPU = torch.device("cpu")
ON_DEVICE = {"epochs": 2, "iterations": 2, "augment_on": "device"}


@pytest.fixture
def tiny(tmp_path):
    write_tiny_dataset(tmp_path, cases=5)
    write_tiny_plan(tiny_plan())


def drawn_batch(kind, seed, **options):
    """Two patches that are turned, as the loader's processes send them."""
    seed_all(seed)
    return next(loader(kind, BoxLoader, Cases(**options), p=1))


def every_later_transform(kind):
    """All that nnU-Net's training does to a patch after it is turned, each of them at every patch, with a mask and regions."""
    patch, dims = PATCHES[kind], len(PATCHES[kind])
    made = AutosegTrainer.get_training_transforms(
        patch, ROTATION[kind], [[1.0] * dims, [0.5] * dims], tuple(range(dims)), kind == "anisotropic",
        use_mask_for_norm=[True, False], regions=[[1, 2, 3], 2, (4, 5)],
    ).transforms  # fmt: skip
    for transform in made:
        if isinstance(transform, RandomTransform):
            transform.apply_probability = transform.transform.p_per_channel = 1
    first = next(place for place, transform in enumerate(made) if isinstance(transform, RandomTransform))
    return ComposeTransforms(made[first:])


def turned_axes(kind):
    return PATCHES[kind][1:] if kind == "anisotropic" else PATCHES[kind]


def same(a, b):
    return list(a["keys"]) == list(b["keys"]) and all(
        torch.equal(x, y) for x, y in zip([a["data"], *a["target"]], [b["data"], *b["target"]], strict=True)
    )


@pytest.mark.parametrize("kind", PATCHES)
@pytest.mark.parametrize(
    "options",
    # Several patches only where no change follows: its draws would stand between those of one patch's place and the next's.
    [{"batch": 1}, {"batch": 3, "intensities": False}],
    ids=["all changes", "several patches"],
)
def test_batches_are_those_of_the_cpu(kind, options):
    usual, boxes = (loader(kind, cls, Cases(), **options) for cls in (PatchLoader, BoxLoader))
    ours = DeviceAugmentation(boxes, boxes, CPU)
    for seed in range(8):
        seed_all(seed)
        expected = next(usual)
        seed_all(seed)
        assert same(next(ours), expected)


@pytest.mark.parametrize("kind", PATCHES)
def test_on_a_gpu_patches_are_the_same_and_only_two_lists_of_places_are_waited_for(kind):
    """Those of the voxels between labels, and of the channels with noise."""
    later, patch = every_later_transform(kind), turned_axes(kind)
    for seed in range(3):
        drawn = drawn_batch(kind, seed)["unturned"][0]
        seed_all(seed)
        expected = finish(copy.deepcopy(drawn), patch, later)
        seed_all(seed)
        with pretended_gpu() as waits:
            moved = {**drawn, "image": drawn["image"].to(GPU), "labels": drawn["labels"].to(GPU)}
            ours = finish(moved, patch, for_device(later, GPU))
        assert torch.equal(content(ours["image"]), expected["image"])
        pairs = zip(ours["segmentation"], expected["segmentation"], strict=True)
        assert all(torch.equal(content(a), b) for a, b in pairs)
        assert waits == ["aten.nonzero"] * 2


def test_a_whole_batch_is_made_on_a_gpu():
    boxes = loader("isotropic", BoxLoader, Cases(), p=1)
    batch = drawn_batch("isotropic", 0)
    with pretended_gpu():
        ours = next(DeviceAugmentation(iter([batch]), boxes, GPU))
    assert content(ours["data"]).shape == (2, 2, *PATCHES["isotropic"])
    assert [content(target).shape[:2] for target in ours["target"]] == [(2, 1)] * 2
    assert ours["keys"] is batch["keys"]


def test_two_of_nnunets_transforms_would_mix_devices():
    """What `for_device` is needed for: the blur makes its kernel on the CPU, and regions keep their labels there."""
    wrong = []
    with pretended_gpu():
        for transform in every_later_transform("isotropic").transforms:
            inner = getattr(transform, "transform", transform)
            labels = torch.zeros((1, 9, 8, 7), dtype=torch.int16).to(GPU)
            try:
                inner(image=torch.rand((2, 9, 8, 7)).to(GPU), segmentation=labels)
            except RuntimeError as error:
                assert "same device" in str(error)
                wrong.append(type(inner).__name__)
    assert wrong == ["GaussianBlurTransform", "ConvertSegmentationToRegionsTransform"]


def test_a_gpu_turns_a_patch_at_once_and_a_cpu_in_parts_that_change_nothing(monkeypatch):
    original, parts = spatial._positions, []
    monkeypatch.setattr(spatial, "_positions", lambda *given: parts.append(given) or original(*given))
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.normal(size=(2, 48, 50, 66)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(0, 4, (2, 48, 50, 66), np.int8))
    pose = np.eye(3) + 0.02 * rng.normal(size=(3, 3)), (23.5, 24.5, 32.5), (45, 47, 63)
    expected = spatial.turn(image, labels, *pose)
    assert len(parts) == 2
    with pretended_gpu():
        ours = spatial.turn(image.to(GPU), labels.to(GPU), *pose)
    assert len(parts) == 2 + 1
    assert all(torch.equal(content(a), b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize(("stored", "sent"), [(np.int8, torch.int8), (np.uint8, torch.int16)])
def test_boxes_are_sent_as_they_are_stored(stored, sent):
    cases = Cases(kind=stored)
    for image, *_ in cases.cases.values():
        image.voxels = image.voxels.astype(np.float16)
    boxes = loader("2d", BoxLoader, cases, p=1)
    batch = next(boxes)
    assert [(d["image"].dtype, d["labels"].dtype) for d in batch["unturned"]] == [(torch.float16, sent)] * 2
    assert next(DeviceAugmentation(iter([batch]), boxes, CPU))["data"].dtype == torch.float32


def test_all_voxels_are_pinned(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    pin_memory_of_all_eligible_items_in_dict(drawn_batch("isotropic", 0))
    assert len(pinned) == 2 * 2


def test_processes_send_patches_and_end_with_the_iterator():
    boxes = loader("anisotropic", BoxLoader, Cases())
    processes = in_processes(boxes, 1, ahead=2, pinned=False)
    batches = DeviceAugmentation(processes, boxes, CPU)
    try:
        assert next(batches)["data"].shape == (2, 2, *PATCHES["anisotropic"])
        assert processes._processes
    finally:
        batches._finish()
    assert not processes._processes


def test_an_interrupted_training_continues_with_the_patches_it_would_have_seen(tiny, monkeypatch):
    straight = weights(short_train(run="straight", settings=ON_DEVICE))
    original = AutosegTrainer.train_step

    def die_in_the_second_epoch(trainer, batch):
        if (trainer.current_epoch, trainer.iteration) == (1, 1):
            raise MemoryError("killed")
        return original(trainer, batch)

    monkeypatch.setattr(AutosegTrainer, "train_step", die_in_the_second_epoch)
    with pytest.raises(MemoryError):
        short_train(run="killed", settings=ON_DEVICE)
    monkeypatch.setattr(AutosegTrainer, "train_step", original)
    continued = weights(short_train(run="killed", settings=ON_DEVICE))
    assert all(torch.equal(tensor, continued[name]) for name, tensor in straight.items())


@pytest.mark.parametrize(
    ("covered", "kind", "said"),
    [(True, DeviceAugmentation, "Patches are augmented on cpu"), (False, nnUNetDataLoader, "is neither for a cascade")],
)
def test_what_the_device_cannot_do_is_left_to_nnunets_loader_and_said(tiny, monkeypatch, caplog, covered, kind, said):
    made = []
    monkeypatch.setattr(base, "can_load", lambda transforms: covered)
    monkeypatch.setattr(
        AutosegTrainer,
        "run_training",
        lambda trainer: (
            made.extend(trainer.get_dataloaders()),
            trainer.save_checkpoint(trainer.output_folder + "/checkpoint_final.pth"),
        ),
    )
    caplog.set_level("INFO", logger="autoseg")
    short_train(settings=ON_DEVICE)
    assert [type(loader) for loader in made] == [kind, nnUNetDataLoader]
    assert said in caplog.text
