"""Cases are read, predicted and exported beside each other, and one bad case is that case's problem alone."""

import threading
import time

import numpy as np
import pytest
import SimpleITK
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from planners.dataset import Case
from tests.tiny import dataset_json, tiny_plan, tiny_scan, write_image
from tests.trained import read
from trainers import predict_cases as module
from trainers.predict_cases import predict_cases
from trainers.predictor import _VOXELS_PER_FORWARD, AutosegPredictor


@pytest.fixture
def predictor():
    """One that gives a voxel to class 0, 1 or 2 by its intensity, on a grid finer than the scans'."""
    plan = tiny_plan()
    plan["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 0.9]
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 3, 1))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1, 1))
        network[0].bias.copy_(torch.tensor([0.0, -0.5, -2.0]))
    manager = PlansManager(plan)
    settings = manager.get_configuration("3d_fullres")
    made = AutosegPredictor(torch.device("cpu"))
    made.manual_initialization(
        network, manager, settings, [network.state_dict()], dataset_json(), "nnUNetTrainer", (0, 1, 2)
    )
    made.configuration_name = "3d_fullres"
    return made


@pytest.fixture
def cases(tmp_path):
    made = []
    for number in range(4):
        file = tmp_path / f"case_{number}_0000.nii.gz"
        write_image(tiny_scan(number)[0][0], file)
        made.append((Case(f"case_{number}", (file,)), tmp_path / "masks" / f"case_{number}.nii.gz"))
    return made


def test_masks_are_those_of_one_case_after_the_other(predictor, cases):
    assert list(predict_cases(predictor, cases)) == [None] * 4
    for case, file in cases:
        image, properties = module._read(predictor, case)
        mask, _ = predictor.predict_mask(image, properties)
        assert set(np.unique(mask)) == {0, 1, 2}
        assert (read(file) == mask).all()


@pytest.mark.parametrize("number", [0, 2, 3])
@pytest.mark.parametrize("part", ["reading", "network", "first slab", "last slab", "writing"])
def test_a_problem_belongs_to_its_case_wherever_it_happens(predictor, cases, number, part, monkeypatch):
    monkeypatch.setitem(_VOXELS_PER_FORWARD, "cpu", 2**20)  # two slabs a case
    name = cases[number][0].name
    now = []

    def fail_at_case(function, case_of):
        def wrapped(*args, **kwargs):
            if case_of(*args) == name:
                raise RuntimeError(f"{part} failed")
            return function(*args, **kwargs)

        return wrapped

    start = module._Writing.start
    monkeypatch.setattr(module._Writing, "start", lambda w, *a: now.append(w._case.name) or start(w, *a))
    if part == "reading":
        monkeypatch.setattr(module, "_read", fail_at_case(module._read, lambda _, case: case.name))
    elif part == "network":
        monkeypatch.setattr(predictor, "_answer", fail_at_case(predictor._answer, lambda *_: now[-1]))
    elif "slab" in part:
        made, slabs = predictor.export, []

        def export(*args, **kwargs):
            case_export, owner = made(*args, **kwargs), now[-1]
            add = fail_at_case(case_export.add, lambda *_: owner if slabs.count(owner) == ("last" in part) + 1 else "")
            case_export.add = lambda slab: slabs.append(owner) or add(slab)
            return case_export

        monkeypatch.setattr(predictor, "export", export)
    else:
        monkeypatch.setattr(module._Writing, "_write", fail_at_case(module._Writing._write, lambda w: w._case.name))
    problems = list(predict_cases(predictor, cases))
    assert problems == [f"{part} failed" if index == number else None for index in range(4)]
    assert [file.is_file() for _, file in cases] == [index != number for index in range(4)]
    assert not list(cases[0][1].parent.glob(".*partial*"))
    assert "slab" not in part or slabs.count(cases[number - 1][0].name) == 2


def test_the_next_scan_is_read_while_the_network_works(predictor, cases, monkeypatch):
    reading = threading.Event()
    read_case, answer = module._read, predictor._answer

    def read_and_tell(made, case):
        if case.name == "case_1":
            reading.set()
        return read_case(made, case)

    monkeypatch.setattr(module, "_read", read_and_tell)
    monkeypatch.setattr(predictor, "_answer", lambda *a: answer(*a) if reading.wait(20) else pytest.fail("not read"))
    assert list(predict_cases(predictor, cases[:2])) == [None, None]


def test_a_mask_is_written_while_the_network_is_at_the_next_scan(predictor, cases, monkeypatch):
    at_second = threading.Event()
    start, answer, write, started = module._Writing.start, predictor._answer, module._Writing._write, []

    def tell(fold, images):
        if len(started) == 2:
            at_second.set()
        return answer(fold, images)

    def write_later(writing):
        assert at_second.wait(20)
        write(writing)

    monkeypatch.setattr(module._Writing, "start", lambda *a: started.append(a) or start(*a))
    monkeypatch.setattr(predictor, "_answer", tell)
    monkeypatch.setattr(module._Writing, "_write", write_later)
    assert list(predict_cases(predictor, cases[:2])) == [None, None]


def test_at_most_one_scan_is_read_ahead(predictor, cases, monkeypatch):
    read_case, running, most = module._read, [], []

    def count(made, case):
        running.append(case.name)
        return read_case(made, case)

    monkeypatch.setattr(module, "_read", count)
    for done, _ in enumerate(predict_cases(predictor, cases)):
        time.sleep(0.05)
        most.append(len(running) - done)
    assert max(most) <= 3  # what is yielded, the next, and one more


def test_an_interruption_ends_at_once_and_leaves_no_half_mask(predictor, cases, monkeypatch):
    asked = []

    def interrupt(fold, images):
        asked.append(fold)
        raise KeyboardInterrupt

    monkeypatch.setattr(predictor, "_answer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(predict_cases(predictor, cases))
    assert len(asked) == 1
    assert not any(thread.name.startswith(("reading", "exporting")) for thread in threading.enumerate())
    assert not any(file.exists() for _, file in cases)


def test_probabilities_are_kept_in_half_precision(predictor, cases):
    assert list(predict_cases(predictor, cases[:1], save_probabilities=True)) == [None]
    probabilities = np.load(cases[0][1].with_name("case_0.npz"))["probabilities"]
    assert probabilities.dtype == np.float16
    assert probabilities.shape[1:] == SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(cases[0][1]))).shape
