"""Exports that other people's tools read: stock nnU-Net's model zip and pretrained weights, and nnssl's checkpoint.

nnU-Net: MIC-DKFZ/nnUNet nnunetv2/model_sharing/model_import.py unpacks a zip into nnUNet_results, and
nnunetv2/run/load_pretrained_weights.py wants every tensor of the network but the segmentation layers.
nnssl: MIC-DKFZ/nnssl src/nnssl/adaptation_planning/adaptation_plan.py is the layout; nnU-Net's master reads it in
nnunetv2/experiment_planning/like_nnssl.py and training/nnUNetTrainer/pretraining/pretrainedTrainer.py, which takes the
encoder and the stem by the prefixes named here and loads each strictly, aliases included.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch

from autoseg import archive, contents
from autoseg.install import write_model_folder
from planners.errors import SettingsError
from planners.files import read_json
from planners.intensity import parse_scheme
from planners.quiet import nnunet_quiet
from pretrain.checkpoint import EncoderCard, load_encoder
from pretrain.encoders import encoder_of
from pretrain.networks.registry import build_network
from pretrain.transfer import transfer
from trainers.checkpoint import save_checkpoint
from trainers.runs import stock_command

logger = logging.getLogger("autoseg")

_SEED = 0
"""Of the layers an encoder does not have: equal exports are equal."""
_UNETS = ("ResidualEncoderUNet", "PlainConvUNet")
_PRIMUS = {"PrimusS": (396, 12, 6), "PrimusB": (792, 12, 12), "PrimusM": (864, 16, 12), "PrimusL": (1056, 24, 16)}
"""nnssl names these sizes (embed_dim, eva_depth, eva_numheads) and no other."""
_PRIMUS_OPTIONS = {"patch_embed_size": [8, 8, 8], "init_values": 0.1, "scale_attn_inner": True}


def write_format(format: str, packed: Path, manifest: archive.Manifest, target: Path) -> None:
    """Write the packed and checked files of an export in another format, `nnunet` or `nnssl`."""
    if manifest.kind == "model":
        _write_nnunet_model(packed, manifest, target)
        return
    tensors, card = load_encoder(packed)
    content = nnunet_weights(tensors, card) if format == "nnunet" else nnssl_checkpoint(tensors, card, _plan(packed))
    save_checkpoint(target, content)
    if format == "nnunet":
        logger.info("The decoder in it is new (seed %d): nnU-Net wants the whole network", _SEED)
        options = f"{card.configuration} FOLD -p {card.plan_name} -pretrained_weights {target}"
        logger.info("Use it:   nnUNetv2_train DATASET %s", options)
    else:
        logger.info("Use it:   nnUNetv2_preprocess_like_nnssl -d DATASET -n NAME -pc %s -am like_pretrained", target)


def nnunet_weights(tensors: dict[str, torch.Tensor], card: EncoderCard) -> dict[str, Any]:
    """A checkpoint of the whole network: the encoder's tensors, everything else freshly initialised with a fixed seed."""
    return {
        "network_weights": _whole_network(tensors, card).state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": card.configuration},
        "inference_allowed_mirroring_axes": None,
        "citations": _citations(card),
    }


def nnssl_checkpoint(tensors: dict[str, torch.Tensor], card: EncoderCard, plan: dict | None) -> dict[str, Any]:
    """nnssl's layout, as nnU-Net's master fine-tunes from it. Raises SettingsError for what the layout cannot hold."""
    class_name, arguments, imported = _nnssl_architecture(card)
    network = _whole_network(tensors, card)
    parts = (f"{network.key_to_encoder}.", f"{network.key_to_stem}.")
    return {
        "network_weights": {n: value for n, value in network.state_dict().items() if n.startswith(parts)},
        "trainer_name": f"autoseg_{card.method}",
        "init_args": {"configuration": card.configuration},
        "nnssl_adaptation_plan": {
            "architecture_plans": {
                "arch_class_name": class_name,
                "arch_kwargs": arguments,
                "arch_kwargs_requiring_import": imported,
            },
            "pretrain_plan": _pretrain_plan(card, plan or {}),
            "pretrain_num_input_channels": len(card.channels),
            "recommended_downstream_patchsize": card.patch_size,
            "key_to_encoder": network.key_to_encoder,
            "key_to_stem": network.key_to_stem,
            "keys_to_in_proj": [str(key) for key in network.keys_to_in_proj],
            "key_to_lpe": getattr(network, "key_to_lpe", None),
        },
        "citations": _citations(card),
    }


def _write_nnunet_model(packed: Path, manifest: archive.Manifest, target: Path) -> None:
    model = contents.read_model(packed, manifest)
    name = f"{model.plan['dataset_name']}/{model.folder_name}"
    with tempfile.TemporaryDirectory(prefix="autoseg-") as temporary:
        folder = Path(temporary) / name
        write_model_folder(packed, model, folder)
        archive.write_zip(folder, target, inside=f"{name}/")
        logger.info("Use it:   nnUNetv2_install_pretrained_model_from_zip %s", target)
        folds = [int(fold) if fold.isdigit() else fold for fold in model.folds]
        logger.info("          %s", stock_command(folder, folds, "cuda"))


def _nnssl_architecture(card: EncoderCard) -> tuple[str, dict | None, list | None]:
    """Name, arguments and arguments to import as nnssl writes them; a preset has a name only."""
    class_name = str(card.architecture["network_class_name"]).rsplit(".", 1)[-1]
    arguments = card.architecture["arch_kwargs"]
    if class_name in _UNETS and len(card.spacing) == 3:
        return class_name, arguments, card.architecture["_kw_requires_import"]
    if class_name == "Primus" and {**arguments, **_PRIMUS_OPTIONS} == arguments:
        size = tuple(arguments.get(key) for key in ("embed_dim", "eva_depth", "eva_numheads"))
        others = set(arguments) - set(_PRIMUS_OPTIONS) - {"embed_dim", "eva_depth", "eva_numheads", "input_shape"}
        for preset, its_size in _PRIMUS.items():
            if size == its_size and not others:
                return preset, None, None
    raise SettingsError(
        "The format nnssl cannot hold this network",
        found=f"{class_name}, {len(card.spacing)}D",
        expected=f"a 3D {' or '.join(_UNETS)}, or {', '.join(_PRIMUS)}: what nnU-Net's fine-tuning can build",
        remedy="share it with `autoseg export` or `autoseg push`",
    )


def _whole_network(tensors: dict[str, torch.Tensor], card: EncoderCard) -> Any:
    with torch.random.fork_rng(devices=()), nnunet_quiet():
        torch.manual_seed(_SEED)
        network = build_network(card.architecture, len(card.channels), 2, deep_supervision=False)
    transfer(tensors, encoder_of(network) if card.scope == "encoder" else network)
    return network


def _pretrain_plan(card: EncoderCard, plan: dict) -> dict[str, Any]:
    """nnssl's plan of the pretraining data. It knows no windows: nnU-Net's fine-tuning z-scores every channel anyway."""
    dims = len(card.spacing)
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    return {
        "dataset_name": card.dataset,
        "plans_name": card.plan_name,
        "original_median_spacing_after_transp": plan.get("original_median_spacing_after_transp", card.spacing),
        "image_reader_writer": plan.get("image_reader_writer", "SimpleITKIO"),
        "transpose_forward": plan.get("transpose_forward", list(range(dims))),
        "transpose_backward": plan.get("transpose_backward", list(range(dims))),
        "experiment_planner_used": "autoseg",
        "configurations": {
            card.configuration: {
                "data_identifier": f"{card.plan_name}_{card.configuration}",
                "preprocessor_name": "DefaultPreprocessor",
                "spacing_style": "median",
                "normalization_schemes": [_normalization(scheme) for scheme in card.intensity],
                "use_mask_for_norm": [_scheme_name(scheme) == "zscore-masked" for scheme in card.intensity],
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": resampling,
                "resampling_fn_mask": "resample_data_or_seg_to_shape",
                "resampling_fn_mask_kwargs": {**resampling, "is_seg": True, "order": 1},
                "spacing": card.spacing,
                "patch_size": card.patch_size,
            }
        },
    }


def _scheme_name(scheme: Any) -> str:
    return str(scheme["scheme"] if isinstance(scheme, dict) else scheme)


def _normalization(scheme: Any) -> str:
    """The nnU-Net class of a scheme; plans of stock nnU-Net name the class itself."""
    name = _scheme_name(scheme)
    return name if name.endswith("Normalization") else parse_scheme(name).normalization


def _citations(card: EncoderCard) -> list[dict[str, Any]]:
    return [{"type": "Pretraining Method", "name": card.method, "apa_citations": [card.citation]}]


def _plan(packed: Path) -> dict | None:
    return read_json(packed / contents.PLAN) if (packed / contents.PLAN).is_file() else None
