"""How cost grows with the size of the problem: a curve for nnU-Net and one for autoseg, on logarithmic axes."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.commands import plan_and_preprocess
from benchmarks.measuring import Duel, Made, compare, opened
from benchmarks.resampling import image_duel, labels_duel
from benchmarks.scans import Scan, real_ct
from planners.files import read_json, replacing, write_json

RESULTS = Path(__file__).parent / "results"
_ROUNDS = 2


@dataclass(frozen=True)
class Curve:
    """One picture."""

    axis: str
    """What grows, and its unit."""
    sizes: Sequence[int]
    panels: Mapping[str, Callable[[int], Made]]
    """Title to what is done at a size."""


def image_of(voxels: int) -> Duel:
    """Cubic resampling of a CT, from 1.25 times its final spacing."""
    return image_duel(_scan_before(voxels, 3))


def labels_of(voxels: int) -> Duel:
    """Resampling of its label map with three structures."""
    return labels_duel(_scan_before(voxels, 3))


def number_of_labels(labels: int) -> Duel:
    """Resampling of a label map to 4 million voxels."""
    return labels_duel(_scan_before(4_000_000, labels))


CURVES = {
    "voxels": Curve(
        "voxels after resampling",
        [100_000, 500_000, 2_500_000, 12_500_000],
        {"image, cubic": image_of, "label map, 3 labels": labels_of},
    ),
    "labels": Curve("labels", [1, 3, 10, 30, 62], {"label map, 4 million voxels": number_of_labels}),
    "cases": Curve("cases", [10, 40, 170], {"hippocampus, raw to preprocessed": plan_and_preprocess}),
}


def measure_curve(name: str) -> Path:
    """Measure a curve at each of its sizes; returns the file of the figures."""
    curve = CURVES[name]
    panels: dict[str, list[dict]] = {}
    for title, function in curve.panels.items():
        panels[title] = []
        for size in curve.sizes:
            with opened(function(size)) as duel:
                outcome = compare(duel, _ROUNDS)
            costs = {"size": size, "reference_cpu_s": outcome.reference.cpu_s, "ours_cpu_s": outcome.ours.cpu_s}
            print(f"{title}, {size:,}: {outcome.reference.cpu_s:.3g} and {outcome.ours.cpu_s:.3g} CPU s", flush=True)
            panels[title].append({**costs, "agreement": outcome.agreement.text})
    file = RESULTS / f"{datetime.date.today().isoformat()}_growth_{name}.json"
    write_json(file, {"axis": curve.axis, "panels": panels})
    return file


def plot_curve(figures: Path) -> Path:
    """Draw what `measure_curve` wrote; returns the picture beside it."""
    content = read_json(figures)
    panels = content["panels"]
    figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained", dpi=110)
    for axes, (title, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        sizes = [point["size"] for point in points]
        for key, label, style in (("reference_cpu_s", "nnU-Net", "s--"), ("ours_cpu_s", "autoseg", "o-")):
            axes.loglog(sizes, [point[key] for point in points], style, label=label, linewidth=2)
        for point in points:
            ratio = point["reference_cpu_s"] / point["ours_cpu_s"]
            middle = (point["reference_cpu_s"] * point["ours_cpu_s"]) ** 0.5
            axes.annotate(f"{ratio:.0f}x", (point["size"], middle), ha="center", va="center", color="0.4")
        axes.set(title=title, xlabel=content["axis"], ylabel="CPU s")
        axes.set_xticks(sizes, [f"{size / 1e6:g} M" if size >= 100_000 else str(size) for size in sizes])
        axes.minorticks_off()
        axes.grid(True, which="major", alpha=0.3)
        axes.legend()
    picture = figures.with_suffix(".png")
    with replacing(picture) as temporary:
        figure.savefig(temporary)
    return picture


def _scan_before(voxels: int, labels: int) -> Scan:
    """The CT at 1.25 times the spacing at which it has so many voxels."""
    return real_ct(1.25 * 3.0 * (122 * 101 * 112 / voxels) ** (1 / 3), labels)  # it has 122 x 101 x 112 at 3 mm
