"""PUMIT's network in the trainer: recipe, rates by layer, targets for its outputs; trained and predicted by both."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from planners import paths
from planners.configurations import with_configuration
from planners.errors import SettingsError
from tests.tiny import dataset_json, tiny_plan, tiny_scan, write_tiny_dataset, write_tiny_plan
from tests.trained import predict_with_nnunet, read
from trainers.base import AutosegTrainer
from trainers.predict import predict
from trainers.settings import learning_rate
from trainers.train import train

NAME = "3d_fullres_sac"


def sac_plan(spacing=(2.5, 1.1, 1.0)) -> dict:
    plan = tiny_plan()
    plan["autoseg"] = {"budget": "cpu", "gpu_memory_gb": 8, "labels": 3}
    plan["configurations"]["3d_fullres"]["spacing"] = list(spacing)
    return with_configuration(plan, NAME)


@pytest.fixture
def tiny(tmp_path):
    write_tiny_dataset(tmp_path, cases=5, test_cases=1)
    return tmp_path


def trainer_of(plan, configuration=NAME, **options) -> AutosegTrainer:
    """With its network and optimiser, without data."""
    if options:
        settings = AutosegTrainer(plan, configuration, 0, dataset_json(), torch.device("cpu")).settings
        plan.setdefault("autoseg", {})["train"] = {**vars(settings), **options}
    trainer = AutosegTrainer(plan, configuration, 0, dataset_json(), torch.device("cpu"))
    trainer.network = trainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 3, trainer.enable_deep_supervision
    )
    trainer.optimizer, _ = trainer.configure_optimizers()
    return trainer


def batch(trainer) -> dict:
    patch = trainer.configuration_manager.patch_size
    generator = torch.Generator().manual_seed(1)
    targets = [
        torch.randint(0, 3, (2, 1, *(round(n * s) for n, s in zip(patch, scale, strict=True))), generator=generator)
        for scale in trainer._get_deep_supervision_scales()
    ]
    return {"data": torch.randn(2, 1, *patch, generator=generator), "target": targets}


@pytest.mark.parametrize(("spacing", "degree"), [((1.0, 1.0, 1.0), 0), ((2.5, 1.1, 1.0), 1), ((5.0, 0.7, 0.7), 2)])
def test_every_output_has_a_target_of_its_size_and_the_published_weight(tiny, spacing, degree):
    trainer = trainer_of(sac_plan(spacing))
    targets = batch(trainer)["target"]
    outputs = trainer.network(batch(trainer)["data"])
    assert [output.shape[2:] for output in outputs] == [target.shape[2:] for target in targets[:4]]
    scales = trainer._get_deep_supervision_scales()
    assert np.allclose(scales[:4], [[1 / 2 ** max(m - degree, 0), 2.0**-m, 2.0**-m] for m in range(4)])
    weights = trainer._build_loss().weight_factors
    assert weights == pytest.approx([8 / 15, 4 / 15, 2 / 15, 1 / 15, 0])
    trainer.set_deep_supervision_enabled(False)
    assert trainer.network(batch(trainer)["data"]).shape == (2, 3, *trainer.configuration_manager.patch_size)


def test_rates_fall_from_the_decoder_to_the_image(tiny):
    trainer = trainer_of(sac_plan(), llrd=0.5)
    groups = trainer.optimizer.param_groups
    assert [group["scale"] for group in groups] == [2**-5, 2**-4, 2**-3, 2**-2, 2**-1, 1, 1]
    vit = trainer.network.encoder.vit
    assert any(p is vit.pos_embed for p in groups[0]["params"])
    assert any(p is vit.blocks[3].mlp.fc2.weight for p in groups[4]["params"])
    everything = [id(p) for group in groups for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in trainer.network.parameters())
    trainer.loss, trainer.current_epoch, trainer.iteration = trainer._build_loss(), 1, 7
    trainer.train_step(batch(trainer))
    rate = learning_rate(trainer.settings, trainer.progress)
    assert [group["lr"] / rate for group in groups] == pytest.approx([group["scale"] for group in groups])


def test_resting_layers_have_no_rate(tiny):
    trainer = trainer_of(sac_plan(), llrd=0.5, frozen_epochs=1)
    trainer.loss, trainer.iteration = trainer._build_loss(), 7
    trainer.train_step(batch(trainer))
    *encoder, decoder = (group["lr"] for group in trainer.optimizer.param_groups)
    assert encoder == [0] * 6
    assert decoder > 0


def test_layers_of_other_networks_cannot_have_rates_of_their_own(tiny):
    with pytest.raises(SettingsError, match=r"llrd=0.5 with the encoder ResidualEncoder"):
        trainer_of(tiny_plan(), "3d_fullres", llrd=0.5)


@pytest.mark.parametrize(("clip", "norm"), [(0.25, 0.25), (12.0, 12.0)])
def test_gradients_are_shortened_to_the_setting(tiny, clip, norm):
    trainer = trainer_of(sac_plan(), clip=clip)
    loss = trainer._build_loss()
    trainer.loss = lambda *arguments: 1e4 * loss(*arguments)
    trainer.train_step(batch(trainer))
    gradients = [p.grad for p in trainer.network.parameters() if p.grad is not None]
    assert float(torch.stack([g.norm() for g in gradients]).norm()) == pytest.approx(norm, rel=1e-3)


@pytest.mark.slow
def test_it_is_trained_and_both_predict_the_same(tiny, tmp_path):
    write_tiny_plan(sac_plan())
    settings = {"epochs": 1, "iterations": 8, "lr": 2e-3, "warm_up": 0.0}
    fold = train(901, plan="tinyPlans", configuration=NAME, settings=settings, device="cpu")[0]
    assert (fold / "validation" / "summary.json").is_file()
    scans = paths.raw("Dataset901_Tiny") / "imagesTs"
    ours = predict(scans, tmp_path / "ours", model_folder=fold.parent, device="cpu")
    predict_with_nnunet(fold.parent, scans, tmp_path / "stock")
    for mask in ours.written:
        assert (read(mask) == read(tmp_path / "stock" / mask.name)).mean() >= 0.999
        assert len(np.unique(read(mask))) > 1  # a mask without structures would agree whatever the weights are


@pytest.mark.slow
def test_one_case_can_be_learned_by_heart(tiny):
    """pumit.md 7: to a Dice above 0.9 in a few hundred steps."""
    plan = sac_plan()
    trainer = trainer_of(plan, lr=1e-3)
    patch = trainer.configuration_manager.patch_size
    image, labels = tiny_scan(0)
    image = torch.from_numpy((image - image.mean()) / image.std())[None]
    small = torch.nn.functional.interpolate(image, patch, mode="trilinear")
    truth = torch.nn.functional.interpolate(torch.from_numpy(labels)[None, None].float(), patch, mode="nearest").long()
    torch.manual_seed(0)
    for _ in range(150):
        output = trainer.network(small)
        logits = output[0] if isinstance(output, list | tuple) else output
        shares = logits.softmax(1)
        target = torch.nn.functional.one_hot(truth[:, 0], 3).movedim(-1, 1).float()
        overlap = 2 * (shares * target).sum((0, 2, 3, 4)) / (shares + target).sum((0, 2, 3, 4))
        loss = torch.nn.functional.cross_entropy(logits, truth[:, 0]) + 1 - overlap[1:].mean()
        trainer.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.network.parameters(), 1.0)
        trainer.optimizer.step()
    found = logits.argmax(1)
    dice = [
        2 * float(((found == c) & (truth[:, 0] == c)).sum() / ((found == c).sum() + (truth == c).sum())) for c in (1, 2)
    ]
    print({"Dice": dice, "patch": tuple(patch)})
    assert min(dice) > 0.9
