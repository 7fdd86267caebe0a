"""MedDINOv3's network in the trainer: recipe, rates, what decays; trained and predicted slice by slice by both."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from planners import paths
from planners.configurations import with_configuration
from tests.test_settings import settings
from tests.tiny import dataset_json, tiny_plan, write_tiny_dataset, write_tiny_plan
from tests.trained import predict_with_nnunet, read
from trainers.base import AutosegTrainer
from trainers.predict import predict
from trainers.settings import learning_rate
from trainers.train import train

NAME = "2d_vit"


def vit_plan(width: int, heads: int) -> dict:
    """Of patches that hold a slice whole, with a transformer of four blocks, less than tiny."""
    plan = tiny_plan(dims=2)
    plan["autoseg"] = {"budget": "cpu", "gpu_memory_gb": 8, "labels": 3}
    plan["configurations"]["2d"]["patch_size"] = [28, 24]
    plan = with_configuration(plan, NAME)
    arguments = plan["configurations"][NAME]["architecture"]["arch_kwargs"]
    arguments |= {"embed_dim": width, "depth": 4, "num_heads": heads}
    return plan


@pytest.fixture
def tiny(tmp_path):
    write_tiny_dataset(tmp_path, cases=5, test_cases=1)
    return tmp_path


def trainer_of(**options) -> AutosegTrainer:
    """With its network and optimiser, without data."""
    plan = vit_plan(24, 2)
    chosen = AutosegTrainer(plan, NAME, 0, dataset_json(), torch.device("cpu")).settings
    plan["autoseg"]["train"] = {**vars(chosen), **options}
    trainer = AutosegTrainer(plan, NAME, 0, dataset_json(), torch.device("cpu"))
    trainer.network = trainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 3, trainer.enable_deep_supervision
    )
    trainer.optimizer, _ = trainer.configure_optimizers()
    return trainer


@pytest.mark.parametrize(("pretrained", "share"), [(True, 0.1), (False, 1)])
def test_the_recipe_is_the_published_one(pretrained, share):
    """meddinov3.md 2.3: 3e-4, and 3e-5 for the encoder when it is pretrained."""
    chosen = settings(network="MedDINOv3", pretrained=pretrained)
    assert (chosen.optimizer, chosen.lr, chosen.weight_decay, chosen.beta2) == ("adamw", 3e-4, 5e-2, 0.98)
    assert (chosen.schedule, chosen.warm_up, chosen.clip, chosen.lr_end) == ("linear", 0.01, 12, 0)
    assert (chosen.encoder_lr, chosen.decayed) == (share, "matrices")
    assert (chosen.epochs, chosen.iterations) == (1000, 250)


def test_the_rate_falls_in_a_straight_line():
    chosen = settings(network="MedDINOv3", warm_up=0.2)
    found = [learning_rate(chosen, progress) / chosen.lr for progress in (0, 0.1, 0.2, 0.4, 0.6, 0.9)]
    assert found == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.125])


def test_the_encoder_has_a_rate_of_its_own(tiny):
    trainer = trainer_of(encoder_lr=0.1)
    patch = trainer.configuration_manager.patch_size
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, 3, (2, 1, *patch), generator=generator)
    trainer.loss, trainer.iteration = trainer._build_loss(), 7
    trainer.train_step({"data": torch.randn(2, 1, *patch, generator=generator), "target": target})
    rate = learning_rate(trainer.settings, trainer.progress)
    rates = {id(p): group["lr"] / rate for group in trainer.optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(trainer.network.parameters()))
    for name, parameter in trainer.network.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.1 if name.startswith("encoder.") else 1), name
    assert trainer.optimizer.defaults["betas"] == (0.9, 0.98)


def test_matrices_decay_and_vectors_and_tokens_do_not(tiny):
    """meddinov3.md 6.1 (14)."""
    trainer = trainer_of()
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    found = {name: decays[id(p)] for name, p in trainer.network.named_parameters()}
    assert {name for name, decay in found.items() if decay not in (0, 5e-2)} == set()
    without = {name.rpartition(".")[2] for name, decay in found.items() if decay == 0}
    assert without == {"bias", "weight", "gamma_1", "gamma_2", "cls_token", "reg_token"}
    assert all(
        "norm" in n or n.startswith("decoder.stages") for n, d in found.items() if d == 0 and n.endswith("weight")
    )
    assert found["encoder.blocks.3.attn.qkv.weight"] == found["decoder.stages.0.0.weight"] == 5e-2
    assert found["decoder.stages.0.1.weight"] == 0


def test_rates_can_fall_from_block_to_block_too(tiny):
    trainer = trainer_of(llrd=0.5, encoder_lr=0.1)
    scales = {group["scale"] for group in trainer.optimizer.param_groups}
    assert sorted(scales) == pytest.approx([0.1 / 2**n for n in (5, 4, 3, 2, 1, 0)] + [1])
    first = trainer.optimizer.param_groups[0]
    assert any(p is trainer.network.encoder.patch_embed.proj.weight for p in first["params"])


@pytest.mark.slow
def test_it_is_trained_and_both_predict_the_same(tiny, tmp_path):
    write_tiny_plan(vit_plan(96, 3))
    chosen = {"epochs": 1, "iterations": 12, "lr": 2e-3, "warm_up": 0.0}
    fold = train(901, plan="tinyPlans", configuration=NAME, settings=chosen, device="cpu")[0]
    assert (fold / "validation" / "summary.json").is_file()
    scans = paths.raw("Dataset901_Tiny") / "imagesTs"
    ours = predict(scans, tmp_path / "ours", model_folder=fold.parent, device="cpu")
    predict_with_nnunet(fold.parent, scans, tmp_path / "stock")
    for mask in ours.written:
        assert (read(mask) == read(tmp_path / "stock" / mask.name)).mean() >= 0.999
        assert len(np.unique(read(mask))) > 1  # a mask without structures would agree whatever the weights are
