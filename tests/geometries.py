"""Kinds of scans, and a method of the catalog with a small network for them: for the suites over the catalog."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from planners.anisotropy import degree_of_anisotropy
from planners.configurations import with_configuration
from pretrain.catalog import METHODS, entry, load_method
from pretrain.encoders import build_segmentation_network, encoder_info
from pretrain.method import Batch, PretrainMethod, Step, Target
from pretrain.optimise import Phase, phases
from pretrain.settings import configure
from pretrain.volumes import CaseInfo
from tests.tiny import Array, dataset_json, tiny_plan

NAMES = list(METHODS)
every_method = pytest.mark.parametrize("name", NAMES)


@dataclass(frozen=True)
class Geometry:
    """A kind of scans and the network a plan has for them."""

    patch: tuple[int, ...]
    spacing: tuple[float, float, float]
    """mm, (z, y, x); a plan in 2D leaves z out."""
    shape: tuple[int, int, int]
    strides: tuple[tuple[int, int, int], ...]
    channels: int = 1

    @property
    def dims(self) -> int:
        return len(self.patch)


GEOMETRIES = {
    "isotropic": Geometry((24, 28, 24), (1.0, 1.0, 1.0), (30, 41, 35), ((1, 1, 1), (2, 2, 2), (2, 2, 2))),
    "anisotropic": Geometry((8, 40, 32), (5.0, 1.2, 1.2), (9, 55, 47), ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2))),
    "2d": Geometry((40, 32), (4.0, 0.6, 0.6), (7, 55, 47), ((1, 1, 1), (2, 2, 2), (2, 2, 2))),
    "two channels": Geometry((8, 24, 20), (2.5, 1.1, 1.0), (13, 27, 22), ((1, 1, 1), (1, 2, 2), (2, 2, 2)), channels=2),
}


SMALLER = {"meddinov3": {"batch": 4, "large": 64, "small": 32}}
"""Settings with which the suites over the catalog take seconds."""


def target_of(name: str, kind: str) -> Target:
    """A plan and a configuration for a method: the one place that knows which network each gets."""
    networks = entry(name).networks
    assert {"ResidualEncoderUNet", "PUMIT", "MedDINOv3"} & set(networks), (
        f"give {name} a tiny plan of its networks here"
    )
    geometry = GEOMETRIES[kind]
    if networks == ("MedDINOv3",):  # slices of any scans
        return slices_target(geometry)
    degree = degree_of_anisotropy(geometry.spacing)
    plan = tiny_plan(dims=geometry.dims, channels=geometry.channels, strides=geometry.strides, flat=degree)
    configuration = "3d_fullres" if geometry.dims == 3 else "2d"
    plan["configurations"][configuration] |= {
        "patch_size": list(geometry.patch),
        "spacing": list(geometry.spacing[-geometry.dims :]),
        "batch_size": 2,
        "autoseg": {"DA": degree if geometry.dims == 3 else None},
    }
    if networks == ("PUMIT",):
        configuration, small = "3d_fullres_sac", {"budget": "cpu", "gpu_memory_gb": 8, "labels": 3}
        plan = with_configuration(plan | {"autoseg": small}, configuration)
    return Target(plan, configuration, encoder_info(plan, configuration, dataset_json(geometry.channels)))


def slices_target(geometry: Geometry) -> Target:
    """A vision transformer of four blocks, on the slices of any scans."""
    plan = tiny_plan(dims=2, channels=geometry.channels) | {
        "autoseg": {"budget": "cpu", "gpu_memory_gb": 8, "labels": 3}
    }
    plan["configurations"]["2d"] |= {"patch_size": list(geometry.patch[-2:]), "spacing": list(geometry.spacing[1:])}
    plan = with_configuration(plan, "2d_vit")
    plan["configurations"]["2d_vit"]["architecture"]["arch_kwargs"] |= {"embed_dim": 48, "depth": 4, "num_heads": 3}
    return Target(plan, "2d_vit", encoder_info(plan, "2d_vit", dataset_json(geometry.channels)))


def network_of(target: Target) -> Any:
    """The segmentation network of a target, with new weights."""
    return build_segmentation_network(dict(target.plan), target.configuration, dataset_json(target.encoder.channels))


def scans_of(kind: str, number: int = 4) -> dict[str, Array]:
    """Scans of a few textured blobs, of sizes that differ a little."""
    geometry, made = GEOMETRIES[kind], {}
    for index in range(number):
        rng = np.random.default_rng(index)
        shape = tuple(n + int(rng.integers(0, 3)) for n in geometry.shape)
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"), -1)
        blobs = [np.exp(-((grid - rng.uniform(-0.6, 0.6, 3)) ** 2).sum(-1) / 0.2) for _ in range(4)]
        image = np.stack([sum(blobs) * (-1) ** c + rng.normal(0, 0.1, shape) for c in range(geometry.channels)])
        made[f"v{index}"] = Array(image, f"v{index}", spacing=geometry.spacing)
    return made


def build(name: str, target: Target, pool: list[CaseInfo], **settings: Any) -> PretrainMethod:
    """The method as the loop builds it, with its settings for a CPU and new weights. Raises PlanError as `plan` does."""
    method = load_method(name)
    config = configure(method.Config, name, method.presets["cpu"], SMALLER.get(name, {}), settings)
    spec = method.plan(target, pool, config)
    torch.manual_seed(0)
    model = method(network_of(target), spec, config)  # type: ignore[call-arg]
    model.spec = spec  # type: ignore[assignment]
    for pair in model.momentum_pairs():
        pair.average.requires_grad_(False)
    return model


def new(name: str, kind: str) -> PretrainMethod:
    """The method on a kind of scans."""
    return build(name, target_of(name, kind), [scan.info for scan in scans_of(kind).values()])


@cache
def built(name: str, kind: str) -> PretrainMethod:
    """The same, shared by tests that leave its weights alone."""
    return new(name, kind)


def batch_of(model: PretrainMethod, scans: dict[str, Array], step: Step, seed: int = 0) -> Batch:
    pool = [scan.info for scan in scans.values()]
    drawn = model.draw(model.spec, pool, np.random.default_rng([seed, 0]), step)
    return model.collate(
        [
            model.sample(model.spec, scans[case], parameters, np.random.default_rng([seed, 1 + position]))  # type: ignore[arg-type]
            for position, (case, parameters) in enumerate(drawn)
        ]
    )


def stages_of(model: PretrainMethod) -> list[tuple[Phase, Step]]:
    """Each phase with its first step."""
    return [(phase, Step(phase.stage.name, 0, phase.steps, phase.first_step)) for phase in phases(model.stages(), 100)]
