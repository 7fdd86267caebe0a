"""Published weights of PCRL and PCRLv2: recognised, read, and the same features. Numbers: specification of PCRL, §5."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from planners.configurations import configuration_like
from planners.errors import PlanError, PretrainedMismatch
from pretrain.encoders import build_segmentation_network, encoder_of
from pretrain.importers.reading import read_weights
from pretrain.networks.registry import build_network, has_deep_supervision
from pretrain.transfer import transfer
from tests.layouts import PCRLNetwork, filled_by_rule, prefixed
from tests.tiny import dataset_json, tiny_plan

IMAGE = torch.linspace(0, 1, 4096, dtype=torch.float64).view(1, 1, 16, 16, 16)


def saved(tmp_path: Path, state: dict[str, Any]) -> Path:
    """As the authors save: options as an argparse.Namespace beside the weights."""
    file = tmp_path / "simance_multi_crop_luna_pretask_1.0_240.pt"
    torch.save({"opt": argparse.Namespace(lr=1e-3), "state_dict": state, "optimizer": {}, "epoch": 240}, file)
    return file


def small(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same names with an eighth of the channels, so that a test trains it."""
    cut = {}
    for name, tensor in state.items():
        sizes = [max(1, n // 8) if axis < 2 and n > 1 else n for axis, n in enumerate(tensor.shape)]
        cut[name] = tensor[tuple(slice(n) for n in sizes)].clone()
    return cut


@pytest.mark.parametrize(("version", "entries", "numbers"), [(1, 114, 19_289_473), (2, 169, 17_111_434)])
def test_the_layouts_have_the_published_counts(version: int, entries: int, numbers: int) -> None:
    network = PCRLNetwork(version)
    assert len(network.state_dict()) == entries
    assert sum(p.numel() for p in network.parameters()) == numbers


@torch.no_grad()
def test_features_are_those_of_the_authors_network(tmp_path: Path) -> None:
    """Means of the maps of 512, 64, 128, 256 channels: 0.34946841, 0.44859338, 3.10233480, 0.62179009."""
    source = filled_by_rule(PCRLNetwork(1))
    weights = read_weights(saved(tmp_path, prefixed("module.", source.state_dict())))
    assert (weights.kind, weights.method, weights.scope) == ("PCRL U-Net encoder", "pcrl", "encoder")
    network = build_network(weights.architecture, 1, 3, deep_supervision=False)
    report = transfer(weights.tensors, encoder_of(network))
    assert (report.encoder_share, report.new, report.unused) == (1.0, (), ())
    # The authors' arrays are (x, y, z).
    maps = [m.transpose(2, 4) for m in encoder_of(network.double().eval())(IMAGE.transpose(2, 4))]
    means = [float(maps[level].mean()) for level in (3, 0, 1, 2)]
    assert means == pytest.approx([0.34946841, 0.44859338, 3.10233480, 0.62179009], abs=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(maps, source.maps(IMAGE), strict=True))


@torch.no_grad()
def test_the_first_versions_embedding_is_the_known_one() -> None:
    embedding = filled_by_rule(PCRLNetwork(1)).embedding(IMAGE)[0]
    assert embedding[:3].tolist() == pytest.approx([2.98927965, -2.13490815, -2.72975707], abs=1e-6)
    assert float(embedding.norm()) == pytest.approx(25.8084541, abs=1e-6)


@torch.no_grad()
def test_the_second_version_computes_the_known_numbers() -> None:
    """Of the stand-in for the authors' PCRLv2, so that its layout is theirs."""
    output, scales = filled_by_rule(PCRLNetwork(2)).pyramid(IMAGE)
    assert [float(output.mean()), float(output.std())] == pytest.approx([0.57393256, 0.00607483], abs=1e-6)
    norms = [(float(z.norm()), float(p.norm())) for z, p, _ in scales]
    known = [(18.2034208, 69.2790201), (12.8591218, 30.4382188), (9.2592004, 21.9637543)]
    assert [n for pair in norms for n in pair] == pytest.approx([n for pair in known for n in pair], abs=1e-6)
    middles = [float(middle.mean()) for _, _, middle in scales]
    assert middles == pytest.approx([0.51366540, 0.33777187, 0.32479823], abs=1e-6)


def test_the_second_version_gives_its_encoder(tmp_path: Path) -> None:
    source = PCRLNetwork(2)
    weights = read_weights(saved(tmp_path, small(source.state_dict())))
    assert (weights.kind, weights.method) == ("PCRLv2 U-Net encoder", "pcrlv2")
    assert weights.architecture["arch_kwargs"] == {"width": 8}
    assert (weights.channels, weights.spacing, weights.intensity[0].window) == (1, (1.0, 1.0, 1.0), (-1000.0, 1000.0))
    assert set(weights.tensors) == {n for n in source.state_dict() if n.startswith("down_tr")}
    reasons = dict(weights.dropped)
    assert reasons["up_tr256.ops.0.conv1.weight"] == "decoder"
    assert reasons["up_tr256.predictor_head.0.weight"] == "head of the pretraining"


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_without_the_heads_of_pcrl_is_not_said_to_be_its(version: int, tmp_path: Path) -> None:
    """Models Genesis has the layout too."""
    heads = ("fc1.", "fc2.", "aug_fc")
    state = {
        n: t
        for n, t in small(PCRLNetwork(version).state_dict()).items()
        if not n.startswith(heads) and "_head." not in n
    }
    weights = read_weights(saved(tmp_path, state))
    assert (weights.kind, weights.method) == ("3D U-Net encoder with the layout of Models Genesis and PCRL", "unknown")
    known = (
        weights.licence,
        weights.citation,
        weights.trained_on,
        weights.modality,
        weights.intensity,
        weights.spacing,
    )
    assert known == (None,) * 6
    assert len(weights.tensors) == len([n for n in state if n.startswith("down_tr")])


@torch.no_grad()
def test_more_channels_share_the_stem(tmp_path: Path) -> None:
    """Repeated and divided: equal channels give the features of one."""
    weights = read_weights(saved(tmp_path, small(PCRLNetwork(2).state_dict())))
    one, four = (build_network(weights.architecture, n, 2, deep_supervision=False).eval() for n in (1, 4))
    for network in (one, four):
        transfer(weights.tensors, encoder_of(network))
    image = IMAGE.float()
    pairs = zip(encoder_of(one)(image), encoder_of(four)(image.expand(1, 4, 16, 16, 16)), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_the_network_gets_a_configuration_of_the_plan() -> None:
    architecture = {"network_class_name": "pretrain.networks.PCRLUNet", "arch_kwargs": {"width": 8}}
    architecture["_kw_requires_import"] = []
    assert not has_deep_supervision(architecture)
    plan = tiny_plan()
    content = configuration_like(plan, architecture, patch_size=(32, 64, 64))
    assert content["patch_size"] == [16, 32, 24]  # multiples of 8 that hold the median case, 13×27×22
    plan["configurations"]["3d_fullres_pcrl"] = content
    network = build_segmentation_network(plan, "3d_fullres_pcrl", dataset_json())
    loss = network(torch.randn(2, 1, *content["patch_size"])).square().mean()
    loss.backward()
    assert network(torch.randn(2, 1, 16, 32, 24)).shape == (2, 3, 16, 32, 24)
    plan = tiny_plan()
    plan["configurations"]["3d_fullres"]["median_image_size_in_voxels"] = [400.0, 400.0, 400.0]
    large = dict(architecture, arch_kwargs={"width": 64})
    patch = configuration_like(plan, large, patch_size=(400, 400, 400))["patch_size"]
    assert 96**3 <= patch[0] * patch[1] * patch[2] <= 680_000_000 / (7.24 * 64)
    assert all(n % 8 == 0 for n in patch)
    plan["autoseg"] = {"gpu_memory_gb": 0.001}
    with pytest.raises(PlanError, match="cannot be trained in the memory"):
        configuration_like(plan, large)


def test_the_network_refuses_deep_supervision() -> None:
    architecture = {"network_class_name": "pretrain.networks.PCRLUNet", "arch_kwargs": {}, "_kw_requires_import": []}
    with pytest.raises(ValueError, match="one output"):
        build_network(architecture, 1, 2, deep_supervision=True)


def test_two_dimensional_files_are_refused_with_the_name_of_their_network(tmp_path: Path) -> None:
    state = {f"encoder.layer{n}.0.conv1.weight": torch.zeros(8, 8, 3, 3) for n in range(1, 5)}
    with pytest.raises(PretrainedMismatch, match="ResNet-18"):
        read_weights(saved(tmp_path, state))
