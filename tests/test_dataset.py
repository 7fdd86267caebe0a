"""Which files make a case, and what dataset.json must hold."""

import json

import pytest

from planners import paths
from planners.dataset import load_dataset, original_labels, scans_in_folder
from planners.errors import DatasetError


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """A data root with Dataset017_Toy: two cases of two channels (empty files, only names matter)."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "AUTOSEG_ROOT"):
        monkeypatch.setenv(variable, "")
    paths.configure(tmp_path)
    folder = paths.raw("Dataset017_Toy")
    touch(folder, "imagesTr/a_0000.nrrd", "imagesTr/a_0001.nrrd", "imagesTr/b_0000.nrrd", "labelsTr/a.nrrd")
    write_description(folder)
    return folder


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write_description(folder, **changes):
    content = {
        "channel_names": {"0": "T1c", "1": "Flair"},
        "labels": {"background": 0, "core": 1},
        "numTraining": 2,
        "file_ending": ".nrrd",
        **changes,
    }
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(content))


@pytest.mark.parametrize("named", [17, "17", "Dataset017_Toy"])
def test_cases_carry_the_expected_files_even_when_they_are_missing(raw, named):
    dataset = load_dataset(named)
    assert [case.name for case in dataset.cases] == ["a", "b"]
    assert dataset.cases[1].images == (raw / "imagesTr/b_0000.nrrd", raw / "imagesTr/b_0001.nrrd")
    assert dataset.cases[1].label == raw / "labelsTr/b.nrrd"
    assert (dataset.id, dataset.file_ending, dataset.channel_names) == (17, ".nrrd", ("T1c", "Flair"))


def test_unlabelled_scans_are_listed_apart(raw):
    touch(raw, "imagesUn/x_0000.nrrd", "imagesUn/x_0001.nrrd", "imagesUn/._x_0000.nrrd")
    dataset = load_dataset(17)
    assert [case.name for case in dataset.unlabelled] == ["x"]
    assert dataset.unlabelled[0].label is None
    assert len(dataset.cases) == 2


def test_version_one_json_names_its_channels_modality(raw):
    write_description(raw, channel_names=None, modality={"1": "Flair", "0": "T1c"})
    assert load_dataset(17).channel_names == ("T1c", "Flair")


def test_regions_are_tuples_of_values(raw):
    labels = {"background": 0, "whole": [1, 2], "core": [2]}
    write_description(raw, labels=labels, regions_class_order=[1, 2])
    dataset = load_dataset(17)
    assert dataset.region_based
    assert dataset.labels == {"background": 0, "whole": (1, 2), "core": (2,)}


def test_cases_may_be_listed_in_the_json(raw):
    entry = {"images": ["imagesTr/a_0000.nrrd", "imagesTr/a_0001.nrrd"], "label": "labelsTr/a.nrrd"}
    write_description(raw, dataset={"only": entry})
    (case,) = load_dataset(17).cases
    assert case.name == "only"
    assert case.images[1] == raw / "imagesTr/a_0001.nrrd"
    assert case.label == raw / "labelsTr/a.nrrd"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"channel_names": None}, "channel_names"),
        ({"channel_names": {"0": "a", "2": "b"}}, "without gaps"),
        ({"labels": {"background": 0, "core": 2}}, "without gaps"),
        ({"labels": {"core": 1}}, "background"),
        ({"labels": {"background": 0}}, "nothing but background"),
        ({"labels": {"0": "background", "1": "core"}}, "labels"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, "regions_class_order"),
        ({"file_ending": None}, "file_ending"),
    ],
)
def test_a_broken_description_is_refused_with_its_reason(raw, changes, said):
    write_description(raw, **changes)
    with pytest.raises(DatasetError, match=said):
        load_dataset(17)


def test_all_problems_of_a_description_are_named_at_once(raw):
    write_description(raw, channel_names=None, labels=None, file_ending=None)
    with pytest.raises(DatasetError, match=r"(?s)channel_names.*labels.*file_ending"):
        load_dataset(17)


def test_unreadable_json_is_named(raw):
    (raw / "dataset.json").write_text("{")
    with pytest.raises(DatasetError, match=r"dataset\.json"):
        load_dataset(17)


def test_no_case_shows_what_lies_there_instead(raw):
    write_description(raw, file_ending=".mha")
    with pytest.raises(DatasetError, match=r"(?s)no training case.*a_0000\.nrrd.*CASE_0000\.mha"):
        load_dataset(17)


def test_scans_of_one_channel_need_no_suffix(tmp_path):
    touch(tmp_path, "a_0000.nii.gz", "b.nrrd", "img_2035.mha", "notes.txt")
    assert [case.name for case in scans_in_folder(tmp_path, 1)] == ["a", "b", "img_2035"]


def test_scans_with_missing_channels_are_listed_at_once(tmp_path):
    touch(tmp_path, "a_0000.nii.gz", "b_0001.nii.gz", "c_0000.nii.gz", "c_0001.nii.gz", "d.nii.gz")
    with pytest.raises(DatasetError, match=r"(?s)3 of 4 .*a: a_0000.*b: b_0001.*d: d\.nii\.gz"):
        scans_in_folder(tmp_path, 2)


def test_two_channels_given_to_a_model_of_one_are_refused(tmp_path):
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz")
    with pytest.raises(DatasetError, match="a: a_0000"):
        scans_in_folder(tmp_path, 1)


def test_the_same_scan_in_two_formats_is_ambiguous(tmp_path):
    touch(tmp_path, "a.nii.gz", "a.nrrd")
    with pytest.raises(DatasetError, match="ambiguous"):
        scans_in_folder(tmp_path, 1)


def test_a_single_file_brings_its_other_channels(tmp_path):
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz")
    (case,) = scans_in_folder(tmp_path / "a_0000.nii.gz", 2)
    assert case.name == "a"
    assert [path.name for path in case.images] == ["a_0000.nii.gz", "a_0001.nii.gz"]


def test_an_empty_folder_says_what_it_looked_for(tmp_path):
    touch(tmp_path, "scan.dcm")
    with pytest.raises(DatasetError, match=r"\.nii\.gz"):
        scans_in_folder(tmp_path, 1)


@pytest.mark.parametrize(
    ("remap", "back"),
    [
        ({"500": 1, "205": 2}, {0: 0, 1: 500, 2: 205}),
        ({"500": 1, "14": 0}, {0: 0, 1: 500}),
        ({"1": 1, "2": 2}, None),
        ({"3": 1, "4": 1}, None),
        ({}, None),
    ],
)
def test_a_remap_is_undone_unless_it_merged(remap, back):
    assert original_labels({"autoseg": {"remap": remap}}) == back


def test_natural_images_hold_their_colours_in_one_file(raw):
    write_description(raw, channel_names={"0": "red", "1": "green", "2": "blue"}, file_ending=".png")
    touch(raw, "imagesTr/a_0000.png", "labelsTr/a.png", "scans/b_0000.png")
    assert load_dataset(17).cases[0].images == (raw / "imagesTr/a_0000.png",)
    assert [case.name for case in scans_in_folder(raw / "scans", 3, ".png")] == ["b"]
