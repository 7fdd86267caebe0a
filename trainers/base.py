"""nnU-Net's trainer with options instead of subclasses, nothing lost on interruption, and checkpoints that are safe to read.

What is trained — network, loss, augmentation, sampling — is nnU-Net's own code. Options come from `plans["autoseg"]["train"]`,
because nnU-Net fixes the constructor's signature.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.helpers import empty_cache
from torch import nn
from torch.nn.utils import clip_grad_norm_

from planners.errors import DatasetError, SettingsError
from planners.files import copy_file, write_json
from planners.interruption import stop_signal
from planners.plans import resolved
from planners.progress import duration
from planners.quiet import nnunet_quiet
from pretrain.encoders import encoder_of
from pretrain.fit import transfer_weights
from pretrain.importers.weights import Weights
from pretrain.networks.registry import build_network, has_deep_supervision
from pretrain.optimisers import SGD, AdamW
from pretrain.transfer import TransferReport
from trainers.checkpoint import load_checkpoint, save_checkpoint
from trainers.data import SafeDataset, in_processes, label_subset, loader_workers, seed_all
from trainers.device_augmentation import DeviceAugmentation
from trainers.journal import Journal
from trainers.label_names import class_names
from trainers.patches import BoxLoader, PatchLoader, can_load
from trainers.runs import BEST, FINAL, LATEST, options_of, run_folder_name
from trainers.settings import KEYS, TrainSettings, learning_rate, resolve, validated

logger = logging.getLogger("autoseg")

_TIMED_ITERATIONS = 5
_NNUNET_CLIP = 12


class AutosegTrainer(nnUNetTrainer):
    """Trains one configuration of a plan on one fold; see `trainers.train.train` for the whole job."""

    pretrained: Weights | None = None
    """What to start from; set before `initialize`."""
    minimum_share: float = 1.0
    """Share of the encoder that it must fill."""
    transfer_report: TransferReport | None = None
    current_epoch: int
    dataset_class: Any
    _best_ema: float | None

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        plans.setdefault("continue_training", False)  # nnU-Net pops it, but writes it only in its own command
        self.settings = _settings(plans, configuration, device)
        self.iteration = 0
        """Training iterations done of the current epoch."""
        self.elapsed_seconds = 0.0
        """Time spent in training iterations and online validation, over all sessions."""
        self._losses: list[float] = []
        self._epoch_seconds = 0.0
        self._journal: Journal | None = None
        self._announced = False
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = has_deep_supervision(self.configuration_manager.configuration["architecture"])
        self.num_epochs = self.settings.epochs
        self.num_iterations_per_epoch = self.settings.iterations
        self.num_val_iterations_per_epoch = self.settings.validation_iterations
        self.initial_lr = self.settings.lr
        self.weight_decay = self.settings.weight_decay

    # Where results go. nnU-Net makes the folder in its constructor, so the run's name enters when the folder is set.

    @property
    def output_folder_base(self) -> str | None:
        return self._output_folder_base

    @output_folder_base.setter
    def output_folder_base(self, folder: str | None) -> None:
        if folder is not None:
            name = Path(folder).name.split("__", 1)[1]
            run = options_of(self.plans_manager.plans).get("run")
            folder = str(Path(folder).with_name(f"{run_folder_name(type(self).__name__, run)}__{name}"))
        self._output_folder_base = folder

    def print_to_log_file(self, *args: Any, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        """nnU-Net's messages go to its log file only; `say` is for the user."""
        if self.local_rank == 0:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S: ") if add_timestamp else ""
            with Path(self.log_file).open("a", encoding="utf-8") as file:
                file.write(stamp + " ".join(str(a) for a in args) + "\n")

    def say(self, message: str) -> None:
        """A line for the user and the log file."""
        if self.local_rank == 0:
            logger.info(message)
        self.print_to_log_file(message)

    # What is built.

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """nnU-Net's network of the plan, its class looked up in the exact table."""
        return build_network(
            configuration_manager.configuration["architecture"],
            num_input_channels,
            num_output_channels,
            deep_supervision=enable_deep_supervision,
        )

    @staticmethod
    def get_training_transforms(*args: Any, **kwargs: Any) -> Any:
        """nnU-Net's augmentation, without its timing of two equal ways to blur: they round differently, and which
        one is faster changes from one run to the next."""
        transforms = nnUNetTrainer.get_training_transforms(*args, **kwargs)
        for transform in transforms.transforms:
            inner = getattr(transform, "transform", None)
            if isinstance(inner, GaussianBlurTransform):
                inner.benchmark = False
        return transforms

    def initialize(self) -> None:
        seed_all(self.settings.seed)
        with nnunet_quiet():
            super().initialize()
        if not issubclass(self.dataset_class, nnUNetDatasetBlosc2):
            raise DatasetError(
                "The preprocessed cases are in the format of an older nnU-Net",
                where=self.preprocessed_dataset_folder,
                remedy="preprocess again with `autoseg plan_and_preprocess`",
            )
        self.dataset_class = SafeDataset
        if self.pretrained is not None:
            # In place: compiled and distributed wrappers, and the optimiser, hold the same parameters.
            self.transfer_report = transfer_weights(
                self.pretrained,
                self.bare_network,
                self.minimum_share,
                self.configuration_manager.normalization_schemes,
            )

    @property
    def bare_network(self) -> nn.Module:
        """The network without the wrappers of torch.compile and distributed training."""
        network = self.network.module if self.is_ddp else self.network
        return getattr(network, "_orig_mod", network)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Nothing to switch in a network with one output."""
        if self.enable_deep_supervision:
            super().set_deep_supervision_enabled(enabled)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, None]:
        """Optimiser with the encoder as its own group, so that it can rest, or one for each of its layers, so that they can
        have rates of their own; rates are set at each iteration."""
        encoder = encoder_of(self.bare_network)
        others = {id(p): p for p in self.network.parameters()}
        for parameter in encoder.parameters():
            others.pop(id(parameter), None)
        groups = [
            {"params": parameters, "part": "encoder", "scale": scale * self.settings.encoder_lr}
            for parameters, scale in _layers(encoder, self.settings.llrd)
        ]
        groups.append({"params": list(others.values()), "part": "other", "scale": 1.0})
        if self.settings.decayed == "matrices":
            groups = _without_decay_of_vectors(groups, self.network)
        decay, optimizer = self.settings.weight_decay, self.settings.optimizer
        made: torch.optim.Optimizer = (
            AdamW(groups, self.settings.lr, betas=(0.9, self.settings.beta2), weight_decay=decay)
            if optimizer == "adamw"
            else SGD(groups, self.settings.lr, weight_decay=decay, momentum=0.99, nesterov=True)
        )
        if self.settings.clip < _NNUNET_CLIP:
            made.register_step_pre_hook(self._shorten_gradient)
        return made, None

    def _shorten_gradient(self, *_: Any) -> None:
        """Before each step of the optimiser. nnU-Net's training step has shortened the gradient to a norm of 12 by then, which
        leaves its direction as it is."""
        clip_grad_norm_(self.network.parameters(), self.settings.clip)

    def do_split(self) -> tuple[list[str], list[str]]:
        """The fold's training cases, or the share of them that `label_fraction` asks for, and its validation cases."""
        learn, held_out = super().do_split()
        if self.settings.label_fraction < 1:
            chosen = label_subset(learn, self.settings.label_fraction, self.settings.seed)
            self.print_to_log_file(f"Training on {len(chosen)} of {len(learn)} cases: {', '.join(chosen)}")
            learn = chosen
        return list(learn), list(held_out)

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's batches for training and validation. Unlike nnU-Net's this draws none to throw it away."""
        patch = self.configuration_manager.patch_size
        scales = self._get_deep_supervision_scales()
        rotation, dummy_2d, window, axes = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        regions = self.label_manager.foreground_regions if self.label_manager.has_regions else None
        kinds = {
            "is_cascaded": self.is_cascaded,
            "foreground_labels": self.label_manager.foreground_labels,
            "regions": regions,
            "ignore_label": self.label_manager.ignore_label,
        }
        masked = self.configuration_manager.use_mask_for_norm
        augmentation = self.get_training_transforms(
            patch, rotation, scales, axes, dummy_2d, use_mask_for_norm=masked, **kinds
        )
        learning, held_out = self.get_tr_and_val_datasets()
        covered = can_load(augmentation) and not self.is_cascaded
        on_device = self.settings.augment_on == "device" and self._can_augment(covered)
        loader = (BoxLoader if on_device else PatchLoader) if covered else nnUNetDataLoader
        sampling = {
            "oversample_foreground_percent": self.oversample_foreground_percent,
            "probabilistic_oversampling": self.probabilistic_oversampling,
        }
        train = loader(
            learning, self.batch_size, window, patch, self.label_manager, transforms=augmentation, **sampling
        )
        plain = self.get_validation_transforms(scales, **kinds)
        validation = nnUNetDataLoader(
            held_out, self.batch_size, patch, patch, self.label_manager, transforms=plain, **sampling
        )
        workers, pinned = loader_workers(self.device.type), self.device.type == "cuda"
        # nnU-Net's numbers of processes and of batches kept ready.
        batches = in_processes(train, workers, ahead=max(6, workers // 2), pinned=pinned)
        return (
            DeviceAugmentation(batches, train, self.device) if on_device else batches,
            in_processes(validation, min(workers, max(1, workers // 2)), ahead=max(3, workers // 4), pinned=pinned),
        )

    def _can_augment(self, covered: bool) -> bool:
        """Whether the device can do it; `covered` is whether our loaders can. Said, because it was asked for."""
        can = covered and self.device.type != "mps"  # which has no float64, in which positions are computed
        self.say(
            f"Patches are augmented on {self.device}"
            if can
            else "Patches are augmented on the CPU: train.augment_on=device is neither for a cascade, nor for other rotations "
            "and scalings than nnU-Net's, nor for an Apple GPU"
        )
        return can

    def plot_network_architecture(self) -> None:
        """Not drawn: the tool nnU-Net uses for it is not maintained."""

    # How it is trained.

    @property
    def progress(self) -> float:
        """Share of the training that is over, in [0, 1]: by iterations, or by time where that is what ends it."""
        done = (self.current_epoch * self.settings.iterations + self.iteration) / self.settings.total_iterations
        if self.settings.max_minutes is not None:
            done = max(done, self.elapsed_seconds / 60 / self.settings.max_minutes)
        return min(done, 1.0)

    def run_training(self) -> None:
        """Train to the end, or until SIGINT or SIGTERM: then save and exit with 128 + the signal's number."""
        self.on_train_start()
        if self.current_epoch or self.iteration:
            self.say(f"Continuing at epoch {self.current_epoch + 1}, iteration {self.iteration + 1}")
        with stop_signal() as received:
            # An epoch that was begun is validated and recorded, even if its training iterations were the last.
            while self.current_epoch < self.num_epochs and (self.progress < 1 or self.iteration):
                if not self._train_epoch(received) or not self._end_epoch(received):
                    self._save_and_exit(received())
        if self.current_epoch < self.num_epochs:
            self.say(
                f"Ended in epoch {self.current_epoch} of {self.num_epochs} by max_minutes "
                f"({self.settings.max_minutes:g}); the learning rate was brought to its end by then"
            )
        self.on_train_end()

    def on_train_start(self) -> None:
        if not self.was_initialized:
            self.initialize()
        self.dataloader_train, self.dataloader_val = self.get_dataloaders()
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        empty_cache(self.device)
        if self.local_rank == 0:
            folder = Path(self.output_folder_base or "")
            write_json(folder / "plans.json", self.plans_manager.plans)
            write_json(folder / "dataset.json", self.dataset_json)
            fingerprint = Path(self.preprocessed_dataset_folder_base or "") / "dataset_fingerprint.json"
            if fingerprint.is_file():
                copy_file(fingerprint, folder / fingerprint.name)
            self._journal = Journal(
                Path(self.output_folder), class_names(self.dataset_json), first_epoch=self.current_epoch
            )

    def train_step(self, batch: dict) -> dict:
        rate = learning_rate(self.settings, self.progress)
        resting = self.current_epoch < self.settings.frozen_epochs
        for group in self.optimizer.param_groups:
            # Runs begun by an older version have no scales in their optimiser's state.
            group["lr"] = 0.0 if resting and group["part"] == "encoder" else rate * group.get("scale", 1.0)
        return super().train_step(batch)

    def _train_epoch(self, received: Callable[[], int]) -> bool:
        """The rest of the epoch's iterations; False when a signal asked to stop."""
        self.network.train()
        timed: list[float] = []
        while self.iteration < self.num_iterations_per_epoch and self.progress < 1:
            start = time.monotonic()
            # Every batch has its own seed, so that an interrupted run continues with the batches it would have seen.
            # That holds in one process; several loader processes draw in the order they happen to work.
            seed_all(self.settings.seed, self.fold, self.current_epoch, "train", self.iteration, *self._rank)
            loss = float(self.train_step(next(self.dataloader_train))["loss"])
            if not np.isfinite(loss):
                raise SettingsError(
                    "The loss is not finite any more",
                    where=f"{self.output_folder}, epoch {self.current_epoch + 1}, iteration {self.iteration + 1}",
                    remedy=f"train with a lower rate: --set train.lr={self.settings.lr / 10:g} --overwrite",
                )
            self._losses.append(loss)
            self.iteration += 1
            timed.append(time.monotonic() - start)
            self._count_time(timed[-1])
            if len(timed) == _TIMED_ITERATIONS and not self._announced:
                self._announce(float(np.median(timed)))
            if received():
                return False
        return True

    @property
    def _rank(self) -> tuple[int, ...]:
        """What tells the seeds of processes that train together apart; nothing in a single process."""
        return (self.local_rank,) if self.is_ddp else ()

    def _end_epoch(self, received: Callable[[], int]) -> bool:
        """Online validation, logs and checkpoints; False when a signal asked to stop before the epoch was whole."""
        start = time.monotonic()
        outputs = []
        with torch.no_grad():
            self.on_validation_epoch_start()
            for index in range(self.num_val_iterations_per_epoch):
                seed_all(self.settings.seed, self.fold, self.current_epoch, "validation", index)
                outputs.append(self.validation_step(next(self.dataloader_val)))
                if received():
                    return False
        self._count_time(time.monotonic() - start)
        # nnU-Net's logger wants exactly one value an epoch, so nothing is logged before the epoch is whole.
        now = time.time()
        self.logger.log("epoch_start_timestamps", now - self._epoch_seconds, self.current_epoch)
        self.logger.log("epoch_end_timestamps", now, self.current_epoch)
        self.logger.log("lrs", self.optimizer.param_groups[-1]["lr"], self.current_epoch)
        self.on_train_epoch_end([{"loss": np.array(loss)} for loss in self._losses])
        self.on_validation_epoch_end(outputs)
        self.on_epoch_end()
        return True

    def on_epoch_end(self) -> None:
        self.current_epoch += 1
        self.iteration, self._losses, self._epoch_seconds = 0, [], 0.0
        ema = self.logger.get_value("ema_fg_dice", step=-1)
        is_best = self._best_ema is None or ema > self._best_ema
        if is_best:
            self._best_ema = ema
        latest = Path(self.output_folder) / LATEST
        self.save_checkpoint(str(latest))
        if self.local_rank == 0 and self._journal is not None:
            if is_best:
                copy_file(latest, latest.with_name(BEST))
            line = self._journal.write(self.logger.local_logger, is_last=self.current_epoch == self.num_epochs)
            self.say(f"Epoch {self.current_epoch}/{self.num_epochs}  {line}, {duration(self._seconds_left())} left")

    def on_train_end(self) -> None:
        self.save_checkpoint(str(Path(self.output_folder) / FINAL))
        self._close()
        if self.local_rank == 0:
            (Path(self.output_folder) / LATEST).unlink(missing_ok=True)
        empty_cache(self.device)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict and measure the fold's validation cases; see `trainers.validation`."""
        from trainers.validation import validate_fold

        validate_fold(self, save_probabilities=save_probabilities)

    # What is kept.

    def save_checkpoint(self, filename: str) -> None:
        """Everything that is needed to continue or to predict, in nnU-Net's format."""
        if self.local_rank != 0 or self.disable_checkpointing:
            return
        content = {
            "network_weights": self.bare_network.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch,
            "init_args": self.my_init_kwargs,
            # The plan alone rebuilds the network, so stock nnU-Net needs no trainer of ours to predict with it.
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "autoseg": {
                "trainer_name": type(self).__name__,
                "iteration": self.iteration,
                "losses": self._losses,
                "epoch_seconds": self._epoch_seconds,
                "elapsed_seconds": self.elapsed_seconds,
            },
        }
        save_checkpoint(filename, content)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Continue from a checkpoint of this trainer."""
        if not self.was_initialized:
            self.initialize()
        content = load_checkpoint(filename_or_checkpoint, self.device)
        own = content.get("autoseg", {})
        self.bare_network.load_state_dict(content["network_weights"])
        self.optimizer.load_state_dict(content["optimizer_state"])
        if self.grad_scaler is not None and content["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(content["grad_scaler_state"])
        self.logger.load_checkpoint(content["logging"])
        self._best_ema = content["_best_ema"]
        self.current_epoch = content["current_epoch"]
        self.inference_allowed_mirroring_axes = content["inference_allowed_mirroring_axes"]
        self.iteration = own.get("iteration", 0)
        self._losses = own.get("losses", [])
        self._epoch_seconds = own.get("epoch_seconds", 0.0)
        self.elapsed_seconds = own.get("elapsed_seconds", 0.0)

    def _save_and_exit(self, signal_number: int) -> None:
        self.save_checkpoint(str(Path(self.output_folder) / LATEST))
        self._close()
        self.say(
            f"Stopped in epoch {self.current_epoch + 1} after {self.iteration} iterations; "
            "everything is saved, the same command continues"
        )
        raise SystemExit(128 + signal_number)

    def _close(self) -> None:
        if self._journal is not None:
            self._journal.close()
        for loader in (self.dataloader_train, self.dataloader_val):
            if hasattr(loader, "_finish"):
                with nnunet_quiet():
                    loader._finish()

    # Time.

    def _count_time(self, seconds: float) -> None:
        self._epoch_seconds += seconds
        self.elapsed_seconds += seconds

    def _announce(self, seconds_per_iteration: float) -> None:
        self._announced = True
        left = self.settings.total_iterations - self.current_epoch * self.settings.iterations - self.iteration
        # A fifth as many validation iterations, each about a third of a training iteration: no backward pass.
        expected = seconds_per_iteration * left * (1 + 0.2 / 3)
        text = f"About {duration(expected)} to go: {seconds_per_iteration:.2g} s per iteration, {left} left"
        if self.settings.max_minutes is not None and expected > self.settings.max_minutes * 60 - self.elapsed_seconds:
            text += f"; the schedule is shortened to end after {self.settings.max_minutes:g} min"
        self.say(text)

    def _seconds_left(self) -> float:
        return self.elapsed_seconds / max(self.progress, 1e-9) * (1 - self.progress)


def _layers(encoder: Any, decay: float) -> list[tuple[list[nn.Parameter], float]]:
    """Parameters of the encoder and the share of the rate they have: decay^n, with n layers between them and the decoder."""
    if decay == 1:
        return [(list(encoder.parameters()), 1.0)]
    if not hasattr(encoder, "layers"):
        raise SettingsError(
            "Layer-wise decay of the learning rate needs a network that says what its layers are",
            found=f"train.llrd={decay:g} with the encoder {type(encoder).__name__}",
            expected="-c 3d_fullres_sac or 2d_vit",
            remedy="leave train.llrd out",
        )
    layers = encoder.layers()
    return [(layer, decay ** (len(layers) - 1 - index)) for index, layer in enumerate(layers)]


def _without_decay_of_vectors(groups: list[dict[str, Any]], network: nn.Module) -> list[dict[str, Any]]:
    """The groups, each in two: what decays, and norms, biases, scales and tokens, which do not."""
    vectors = {id(p) for name, p in network.named_parameters() if p.ndim < 2 or name.endswith("_token")}
    halves = []
    for group in groups:
        kept = [p for p in group["params"] if id(p) in vectors]
        halves.append({**group, "params": [p for p in group["params"] if id(p) not in vectors]})
        halves.append({**group, "params": kept, "weight_decay": 0.0})
    return [group for group in halves if group["params"]]


def _settings(plans: dict, configuration: str, device: torch.device) -> TrainSettings:
    """The run's settings; a plan without any (nnU-Net's own commands with `-tr AutosegTrainer`) gets the defaults."""
    options = options_of(plans)
    if not options:
        budget = plans.get("autoseg", {}).get("budget", "full")
        network = resolved(plans, configuration)["architecture"]["network_class_name"].rpartition(".")[2]
        return resolve({}, budget=budget, device=device.type, pretrained=False, network=network).settings
    return validated({key: options[key] for key in KEYS if key in options})
