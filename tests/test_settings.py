"""The rule that fills training options, and what is refused."""

import pytest

from planners.errors import SettingsError
from trainers.settings import KEYS, TrainSettings, learning_rate, resolve


def settings(*, budget="full", device="cuda", pretrained=False, network="", **given) -> TrainSettings:
    return resolve(given, budget=budget, device=device, pretrained=pretrained, network=network).settings


def test_from_scratch_on_a_gpu_it_is_nnunets_schedule():
    chosen = settings()
    assert (chosen.epochs, chosen.iterations, chosen.validation_iterations) == (1000, 250, 50)
    assert (chosen.optimizer, chosen.lr, chosen.weight_decay, chosen.warm_up) == ("sgd", 1e-2, 3e-5, 0)


def test_long_finetuning_warms_up_to_a_tenth_of_the_rate():
    chosen = settings(pretrained=True)
    assert (chosen.optimizer, chosen.lr, chosen.warm_up) == ("sgd", 1e-3, 0.05)
    assert settings(pretrained=True, epochs=199).lr == 1e-2  # 49,750 iterations


@pytest.mark.parametrize("pretrained", [False, True])
def test_short_runs_share_adamw_and_medium_ones_sgd(pretrained):
    short = settings(pretrained=pretrained, epochs=19, iterations=100)
    assert (short.optimizer, short.lr, short.weight_decay, short.warm_up) == ("adamw", 2e-3, 3e-5, 0)
    medium = settings(pretrained=pretrained, epochs=20, iterations=100)
    assert (medium.optimizer, medium.lr, medium.warm_up) == ("sgd", 1e-2, 0)


def test_asking_for_sgd_in_a_short_run_gives_nnunets_rate():
    assert settings(epochs=20, iterations=50, optimizer="sgd").lr == 1e-2


def test_the_small_plan_without_a_gpu_has_a_short_schedule():
    assert settings(budget="cpu", device="cpu").total_iterations == 1500
    assert settings(budget="cpu", device="cuda").epochs == 1000
    assert settings(budget="full", device="cpu").epochs == 1000


def test_every_value_has_an_origin():
    resolved = resolve({"lr": "0.005", "epochs": "3"}, budget="cpu", device="cpu", pretrained=False)
    origins = {key: origin for key, _, origin in resolved.rows()}
    assert set(origins) == {f"train.{key}" for key in KEYS}
    assert origins["train.lr"] == origins["train.epochs"] == "flag"
    assert origins["train.iterations"] == origins["train.optimizer"] == "rule"
    assert origins["train.weight_decay"] == "default"
    assert resolved.settings.lr == 0.005


def test_everything_wrong_is_named_at_once():
    with pytest.raises(SettingsError) as caught:
        settings(epoch=3, lr="fast", iterations=0)
    message = str(caught.value)
    assert "train.epoch: no such setting" in message
    assert "train.lr" in message
    assert "train.iterations" in message
    assert "train.max_minutes" in message  # the list of what there is
    assert caught.value.exit_code == 2


def test_the_rate_rises_then_falls_to_zero():
    chosen = settings(warm_up=0.1, lr=1.0, optimizer="sgd")
    assert learning_rate(chosen, 0.0) == 0
    assert learning_rate(chosen, 0.05) == pytest.approx(0.5)
    assert learning_rate(chosen, 0.1) == pytest.approx(1.0)
    assert learning_rate(chosen, 0.55) == pytest.approx(0.5**0.9)
    assert learning_rate(chosen, 1.0) == 0


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("epochs", [1000, 10, 2])
def test_swin_has_the_published_recipe_at_any_length(pretrained, epochs):
    chosen = settings(network="SwinUNETR", pretrained=pretrained, epochs=epochs)
    assert (chosen.optimizer, chosen.lr, chosen.weight_decay) == ("adamw", 3e-4, 1e-5)
    assert (chosen.warm_up, chosen.schedule) == (0.02, "cosine")


def test_primus_is_finetuned_at_a_third_of_the_rate():
    scratch, tuned = (settings(network="Primus", pretrained=pretrained) for pretrained in (False, True))
    assert (scratch.lr, tuned.lr) == (3e-4, 1e-4)
    for chosen in (scratch, tuned):
        assert (chosen.optimizer, chosen.weight_decay, chosen.warm_up, chosen.schedule) == ("adamw", 5e-2, 0.05, "poly")


@pytest.mark.parametrize(("pretrained", "llrd"), [(False, 1.0), (True, 0.85)])
def test_pumit_has_the_published_recipe_and_decays_pretrained_layers(pretrained, llrd):
    chosen = settings(network="PUMIT", pretrained=pretrained)
    assert (chosen.optimizer, chosen.lr, chosen.lr_end, chosen.weight_decay) == ("adamw", 1e-4, 1e-6, 0.05)
    assert (chosen.schedule, chosen.warm_up, chosen.clip, chosen.llrd) == ("cosine", 0.1, 1.0, llrd)


def test_asking_for_sgd_gives_a_transformer_the_settings_of_sgd():
    chosen = settings(network="SwinUNETR", optimizer="sgd")
    assert (chosen.optimizer, chosen.lr, chosen.weight_decay, chosen.schedule) == ("sgd", 1e-2, 3e-5, "poly")


def test_the_cosine_falls_from_the_rate_to_zero():
    chosen = settings(warm_up=0.2, lr=1.0, schedule="cosine")
    assert learning_rate(chosen, 0.1) == pytest.approx(0.5)
    assert learning_rate(chosen, 0.2) == pytest.approx(1.0)
    assert learning_rate(chosen, 0.4) == pytest.approx((1 + 2**-0.5) / 2)
    assert learning_rate(chosen, 0.6) == pytest.approx(0.5)
    assert learning_rate(chosen, 1.0) == pytest.approx(0)


@pytest.mark.parametrize("schedule", ["poly", "cosine"])
def test_the_rate_can_end_above_zero(schedule):
    chosen = settings(warm_up=0.2, lr=1.0, lr_end=0.1, schedule=schedule)
    assert learning_rate(chosen, 0.2) == pytest.approx(1.0)
    assert learning_rate(chosen, 1.0) == pytest.approx(0.1)
    if schedule == "cosine":
        assert learning_rate(chosen, 0.6) == pytest.approx(0.55)
