"""Folders as people keep them, and Decathlon tasks, become datasets that verify without a problem, or nothing at all."""

import json

import numpy as np
import pytest
import SimpleITK

from autoseg.convert.folder import convert_folder
from autoseg.convert.label_values import plan_labels
from autoseg.convert.msd import convert_msd
from planners import paths
from planners.dataset import load_dataset, original_labels
from planners.errors import DatasetError, SettingsError
from planners.verify import verify_dataset

HEART = (205, 420, 500, 550, 600, 820, 850)  # the values of MM-WHS


@pytest.fixture(autouse=True)
def root(tmp_path):
    paths.configure(tmp_path / "root")
    return tmp_path / "root"


def volume(seed, values=None, shape=(5, 9, 8)):
    """An image of noise, or a label map that holds every one of `values`."""
    rng = np.random.default_rng(seed)
    if values is None:
        return rng.normal(100, 20, shape).astype(np.float32)
    voxels = rng.choice([0, *values], shape).astype(np.int16)
    voxels.flat[: len(values)] = values
    return voxels


def write(path, voxels):
    image = SimpleITK.GetImageFromArray(voxels, isVector=False)
    image.SetSpacing([0.7, 0.8, 5.0] + [1.0] * (voxels.ndim - 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(path))


def read(path):
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def nothing_was_written(root):
    return not root.exists() or not any((root / "raw").iterdir())


def source(folder, files):
    """Write files: a name holding one of the words of labels gets labels 1 and 2, others an image."""
    for index, name in enumerate(files):
        write(folder / name, volume(index, (1, 2) if any(w in name for w in ("label", "seg", "gt")) else None))


LAYOUTS = {
    "numbered channels": (
        ["T1c", "Flair"],
        [
            "im/p1_0000.nii.gz",
            "im/p1_0001.nii.gz",
            "im/p2_0000.nii.gz",
            "im/p2_0001.nii.gz",
            "labels/p1.nii.gz",
            "labels/p2.nii.gz",
        ],
    ),
    "channel names": (
        ["T1c", "Flair"],
        [
            "im/p1_t1c.nrrd",
            "im/p1-FLAIR.nrrd",
            "im/p2_T1c.nrrd",
            "im/p2_Flair.nrrd",
            "labels/p1_seg.nrrd",
            "labels/p2_seg.nrrd",
        ],
    ),
    "plain names of one channel": (["CT"], ["im/p1.mha", "im/p2.mha", "labels/p1.mha", "labels/p2.mha"]),
    "BTCV": (["CT"], ["im/img0001.nii.gz", "im/img0002.nii.gz", "labels/label0001.nii.gz", "labels/label0002.nii.gz"]),
    "MM-WHS, all in one folder": (
        ["CT"],
        ["im/ct_1001_image.nii.gz", "im/ct_1002_image.nii.gz", "im/ct_1001_label.nii.gz", "im/ct_1002_label.nii.gz"],
    ),
    "names that end in four digits": (
        ["CT"],
        ["im/p_0000.nii.gz", "im/p_0001.nii.gz", "labels/p_0000.nii.gz", "labels/p_0001.nii.gz"],
    ),
    "BraTS, a folder per case with its label": (
        ["T1c", "Flair"],
        [f"im/{case}/{case}_{part}.nii.gz" for case in ("p1", "p2") for part in ("t1c", "t2", "flair", "seg")],
    ),
    "a folder per case, labels in a second one": (
        ["CT"],
        ["im/p1/scan.nii.gz", "im/p2/scan.nii.gz", "labels/p1/liver_label.nii.gz", "labels/p2/liver_label.nii.gz"],
    ),
}
NAMES = {
    "BTCV": ["img0001", "img0002"],
    "MM-WHS, all in one folder": ["ct_1001", "ct_1002"],
    "names that end in four digits": ["p_0000", "p_0001"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_people_use_become_sound_datasets(tmp_path, layout):
    channels, files = LAYOUTS[layout]
    source(tmp_path, files)
    labels = tmp_path / ("labels" if any(name.startswith("labels/") for name in files) else "im")
    folder = convert_folder(tmp_path / "im", labels, 5, "Mine", channels)
    assert folder == paths.raw("Dataset005_Mine")
    dataset = load_dataset(5)
    assert [case.name for case in dataset.cases] == NAMES.get(layout, ["p1", "p2"])
    assert dataset.channel_names == tuple(channels)
    assert dataset.labels == {"background": 0, "label_1": 1, "label_2": 2}
    assert verify_dataset(5) == []


def test_channels_keep_their_order_and_voxels(tmp_path):
    source(tmp_path, LAYOUTS["channel names"][1])
    folder = convert_folder(tmp_path / "im", tmp_path / "labels", 5, "Mine", ["T1c", "Flair"])
    assert np.array_equal(read(folder / "imagesTr/p1_0000.nrrd"), read(tmp_path / "im/p1_t1c.nrrd"))
    assert np.array_equal(read(folder / "imagesTr/p1_0001.nrrd"), read(tmp_path / "im/p1-FLAIR.nrrd"))


def test_mixed_formats_become_compressed_nifti_with_the_same_voxels_and_grid(tmp_path):
    source(tmp_path, ["im/p1.nrrd", "im/p2.nii", "im/p3.mhd", "labels/p1.nii.gz", "labels/p2.mha", "labels/p3.nii.gz"])
    folder = convert_folder(tmp_path / "im", tmp_path / "labels", 5, "Mine", ["CT"])
    assert load_dataset(5).file_ending == ".nii.gz"
    for name in ("p1.nrrd", "p2.nii", "p3.mhd"):
        before, after = tmp_path / "im" / name, folder / f"imagesTr/{name[:2]}_0000.nii.gz"
        assert np.array_equal(read(before), read(after))
        assert SimpleITK.ReadImage(str(after)).GetSpacing() == pytest.approx((0.7, 0.8, 5.0))
    assert verify_dataset(5) == []


def test_unlabelled_scans_are_kept_for_pretraining(tmp_path):
    source(tmp_path, ["im/p1.nii.gz", "labels/p1.nii.gz", "more/x.nii.gz", "more/y.nii.gz"])
    convert_folder(tmp_path / "im", tmp_path / "labels", 5, "Mine", ["CT"], unlabelled=tmp_path / "more")
    assert [case.name for case in load_dataset(5).unlabelled] == ["x", "y"]


def test_gaps_between_label_values_are_closed_and_remembered(tmp_path):
    write(tmp_path / "im/p1.nii.gz", volume(0))
    write(tmp_path / "labels/p1.nii.gz", volume(1, HEART))
    folder = convert_folder(tmp_path / "im", tmp_path / "labels", 5, "Heart", ["CT"])
    dataset = load_dataset(5)
    assert dataset.labels == {"background": 0} | {f"label_{value}": index for index, value in enumerate(HEART, start=1)}
    back = original_labels(dataset.json)
    assert back == {0: 0, 1: 205, 2: 420, 3: 500, 4: 550, 5: 600, 6: 820, 7: 850}
    undone = np.vectorize(back.get)(read(folder / "labelsTr/p1.nii.gz"))
    assert np.array_equal(undone, read(tmp_path / "labels/p1.nii.gz"))
    assert verify_dataset(5) == []


def test_a_remap_and_a_label_set_name_the_structures(tmp_path):
    write(tmp_path / "im/p1.nii.gz", volume(0))
    write(tmp_path / "labels/p1.nii.gz", volume(1, (10, 20, 99)).astype(np.float32))
    remap = {10: 6, 20: 1, 99: 0}
    folder = convert_folder(tmp_path / "im", tmp_path / "labels", 5, "B", ["CT"], label_set="btcv", remap=remap)
    dataset = load_dataset(5)
    assert (dataset.labels["spleen"], dataset.labels["liver"], len(dataset.labels)) == (1, 6, 14)
    assert original_labels(dataset.json) == {0: 0, 6: 10, 1: 20}
    before, after = read(tmp_path / "labels/p1.nii.gz"), read(folder / "labelsTr/p1.nii.gz")
    assert np.array_equal(after, np.select([before == 10, before == 20], [6, 1], 0))


@pytest.mark.parametrize(
    ("found", "label_set", "remap", "said"),
    [
        ({0, 1, 14}, "btcv", None, "14, which btcv does not have"),
        ({0, 1, 500}, None, {500: 1}, "1 would mean two structures"),
        ({0, 1}, None, {7: 1}, "no label file holds 7"),
        ({0}, None, None, "no label file holds a value above 0"),
        ({0, 5}, None, {5: 0}, "no label file holds a value above 0"),
        ({0, -1, 1}, None, None, "values below 0"),
    ],
)
def test_contradictions_of_label_values_are_said(found, label_set, remap, said):
    _, problems = plan_labels(found, label_set, remap)
    assert any(said in problem for problem in problems), problems


def test_merging_is_asked_for_with_an_identity(tmp_path):
    plan, problems = plan_labels({0, 1, 500}, None, {500: 1, 1: 1})
    assert problems == []
    assert plan.labels == {"background": 0, "label_1": 1}
    assert plan.values == {1: 1, 500: 1}


def test_unknown_label_sets_are_refused_with_the_known_ones():
    with pytest.raises(SettingsError, match="btcv"):
        plan_labels({0, 1}, "synapse")


def test_all_pairing_problems_are_listed_before_anything_is_written(tmp_path, root):
    scans = ("p1_T1c", "p1_Flair", "p2_T1c", "p3_T1c", "p3_Flair")
    source(tmp_path, [f"im/{name}.nii.gz" for name in scans] + [f"labels/{name}.nii.gz" for name in ("p1", "p2", "p4")])
    (tmp_path / "im/p1_Flair.nii.gz").write_bytes(b"broken")
    with pytest.raises(DatasetError) as error:
        convert_folder(tmp_path / "im", tmp_path / "labels", 5, "Mine", ["T1c", "Flair"])
    for said in (
        "4 problem(s)",
        "p2: no file for channel Flair",
        "p3: no label",
        "p4.nii.gz: no scan for this label",
        "p1_Flair.nii.gz: unreadable",
    ):
        assert said in str(error.value)
    assert nothing_was_written(root)


def test_labels_that_are_probabilities_are_refused(tmp_path, root):
    write(tmp_path / "im/p1.nii.gz", volume(0))
    write(tmp_path / "labels/p1.nii.gz", volume(1) / 200)
    with pytest.raises(DatasetError, match=r"p1\.nii\.gz: values that are not whole numbers"):
        convert_folder(tmp_path / "im", tmp_path / "labels", 5, "Mine", ["CT"])
    assert nothing_was_written(root)


def test_an_existing_dataset_is_never_overwritten(tmp_path):
    source(tmp_path, ["im/p1.nii.gz", "labels/p1.nii.gz"])
    folder = convert_folder(tmp_path / "im", tmp_path / "labels", 5, "Mine", ["CT"])
    before = sorted(folder.rglob("*"))
    with pytest.raises(DatasetError, match=r"(?s)id 5 is taken.*Dataset005_Mine.*another id"):
        convert_folder(tmp_path / "im", tmp_path / "labels", 5, "Other", ["CT"])
    assert sorted(folder.rglob("*")) == before


def test_a_failure_while_writing_leaves_nothing(tmp_path, root, monkeypatch):
    source(tmp_path, ["im/p1.nii.gz", "im/p2.nii.gz", "labels/p1.nii.gz", "labels/p2.nii.gz"])

    def full_disk(source, target):
        if "p2" in source.name:
            raise OSError("No space left on device")

    monkeypatch.setattr("autoseg.convert.writing.copy_file", full_disk)
    with pytest.raises(DatasetError, match=r"(?s)1 of 2 cases.*p2.*No space left"):
        convert_folder(tmp_path / "im", tmp_path / "labels", 5, "Mine", ["CT"])
    assert nothing_was_written(root)


def write_task(folder, channels=1, **changes):
    for index, name in enumerate(("a", "b")):
        shape = (5, 9, 8) if channels == 1 else (channels, 5, 9, 8)
        write(folder / f"imagesTr/{name}.nii.gz", volume(index, shape=shape))
        write(folder / f"labelsTr/{name}.nii.gz", volume(index, (1, 2)))
    write(folder / "imagesTs/t.nii.gz", volume(9, shape=shape))
    task = {
        "name": "Toy",
        "modality": {str(c): f"MR{c}" for c in range(channels)},
        "labels": {"0": "background", "1": "edema", "2": "tumour"},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in ("a", "b")],
        "test": ["./imagesTs/t.nii.gz"],
        **changes,
    }
    (folder / "dataset.json").write_text(json.dumps(task))


@pytest.mark.parametrize("channels", [1, 3])
def test_decathlon_tasks_are_split_into_channels(tmp_path, channels):
    write_task(tmp_path / "Task01_Toy", channels)
    folder = convert_msd(tmp_path / "Task01_Toy", 4)
    dataset = load_dataset("Dataset004_Toy")
    assert dataset.labels == {"background": 0, "edema": 1, "tumour": 2}
    assert len(dataset.channel_names) == channels
    assert sorted(path.name for path in (folder / "imagesTs").iterdir()) == [
        f"t_{c:04d}.nii.gz" for c in range(channels)
    ]
    stored = read(tmp_path / "Task01_Toy/imagesTr/b.nii.gz").reshape(channels, 5, 9, 8)
    last = SimpleITK.ReadImage(str(folder / f"imagesTr/b_{channels - 1:04d}.nii.gz"))
    assert np.array_equal(SimpleITK.GetArrayFromImage(last), stored[-1])
    assert last.GetSpacing() == pytest.approx((0.7, 0.8, 5.0))
    assert verify_dataset(4) == []


def test_problems_of_a_decathlon_task_are_listed_at_once(tmp_path, root):
    task = tmp_path / "Task01_Toy"
    write_task(task, labels={"0": "background", "2": "tumour"})
    (task / "labelsTr/a.nii.gz").unlink()
    write(task / "imagesTr/b.nii.gz", volume(0, shape=(2, 5, 9, 8)))
    with pytest.raises(DatasetError) as error:
        convert_msd(task, 4)
    for said in (
        "3 problem(s)",
        "labels 0, 2 are not",
        "labelsTr/a.nii.gz: no such file",
        "imagesTr/b.nii.gz: 4 dimensions",
    ):
        assert said in str(error.value)
    assert nothing_was_written(root)


def test_a_folder_without_a_task_says_what_to_do(tmp_path):
    with pytest.raises(DatasetError, match="convert folder"):
        convert_msd(tmp_path, 4)


def test_colour_images_are_not_scans(tmp_path):
    source(tmp_path, ["im/p1.nrrd", "labels/p1.nrrd"])
    colours = SimpleITK.GetImageFromArray(np.zeros((5, 9, 8, 3), np.float32), isVector=True)
    SimpleITK.WriteImage(colours, str(tmp_path / "im/p1.nrrd"))
    with pytest.raises(DatasetError, match="3 values each"):
        convert_folder(tmp_path / "im", tmp_path / "labels", 5, "Mine", ["CT"])


def test_a_decathlon_image_with_other_channels_than_promised_is_refused(tmp_path):
    write_task(tmp_path / "Task01_Toy", 3, modality={"0": "T1", "1": "T2"})
    with pytest.raises(DatasetError, match="3 channels, expected 2"):
        convert_msd(tmp_path / "Task01_Toy", 4)
