"""The encoder artefact comes back as it was written, and broken ones are named."""

import dataclasses
import json

import pytest
import torch

from planners import paths
from planners.errors import DatasetError, PretrainedMismatch
from pretrain.checkpoint import EncoderCard, encoder_folder, find_encoders, load_encoder, save_encoder
from pretrain.encoders import build_segmentation_network, encoder_of
from pretrain.transfer import transfer
from tests.tiny import DATASET, dataset_json, tiny_plan

PLAN = tiny_plan()


def tiny_encoder():
    return encoder_of(build_segmentation_network(PLAN, "3d_fullres", dataset_json()))


def card(**changes) -> EncoderCard:
    values = EncoderCard(
        method="voco", version="0.1.0", dataset=DATASET, plan_name="tinyPlans", plan_hash="0" * 64,
        configuration="3d_fullres", architecture=PLAN["configurations"]["3d_fullres"]["architecture"], scope="encoder",
        spacing=[2.5, 1.1, 1.0], patch_size=[8, 24, 20], DA=1, channels=["MR0"], intensity=["zscore"], steps_done=10,
        steps_asked=10, metrics={"placement": {"value": 0.5, "chance": 0.25}}, cases=[f"{DATASET}/case_00"],
        held_out=[], excluded_fold=None, licence="Apache-2.0", citation="arXiv:2402.17300",
        task={"views": {"grid": [1, 2, 3]}, "chance": {"acc": 0.25}},
    )  # fmt: skip
    return dataclasses.replace(values, **changes)


def test_an_encoder_comes_back_equal_and_without_aliases(tmp_path):
    encoder = tiny_encoder()
    save_encoder(tmp_path, encoder, card())
    tensors, read = load_encoder(tmp_path)
    assert read == card()
    assert len(tensors) == len(list(encoder.parameters())) < len(encoder.state_dict())
    assert transfer(tensors, tiny_encoder()).encoder_share == 1.0
    assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in tensors.items())
    assert load_encoder(tmp_path / "encoder.safetensors")[1] == card()


def test_an_unfinished_write_is_not_an_encoder(tmp_path):
    save_encoder(tmp_path, tiny_encoder(), card())
    (tmp_path / "encoder.json").unlink()
    with pytest.raises(DatasetError, match=r"no .*encoder\.json"):
        load_encoder(tmp_path)


def test_missing_fields_are_listed_together(tmp_path):
    content = card().to_json()
    del content["method"]
    content["scope"] = "everything"
    with pytest.raises(DatasetError, match=r"method.*scope|scope.*method"):
        EncoderCard.from_json(content)
    assert EncoderCard.from_json(json.loads(json.dumps(card().to_json()))) == card()


def test_an_encoder_from_before_tasks_were_written_is_still_read():
    content = card().to_json()
    del content["task"]
    assert EncoderCard.from_json(content) == card(task={})


def test_broken_weights_are_named(tmp_path):
    save_encoder(tmp_path, tiny_encoder(), card())
    (tmp_path / "encoder.safetensors").write_bytes(b"not at all")
    with pytest.raises(DatasetError, match="safetensors"):
        load_encoder(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    encoder = tiny_encoder()
    with torch.no_grad():
        next(encoder.parameters())[0] = float("nan")
    save_encoder(tmp_path, encoder, card())
    with pytest.raises(PretrainedMismatch, match="not finite"):
        load_encoder(tmp_path)


def test_encoders_are_found_by_name_over_plans_and_configurations(tmp_path):
    paths.configure(tmp_path)
    for plan, configuration, run in (("a", "3d_fullres", None), ("a_cpu", "2d", None), ("a", "2d", "long")):
        save_encoder(encoder_folder(DATASET, plan, configuration, "voco", run), torch.nn.Linear(2, 2), card())
    assert len(find_encoders(DATASET, "voco")) == 2
    assert find_encoders(DATASET, "voco", plan_name="a_cpu")[0].parent.name == "a_cpu__2d"
    assert [folder.name for folder in find_encoders(DATASET, "voco-long", configuration="2d")] == ["voco-long"]
    assert find_encoders(DATASET, "voco", plan_name="b") == []
