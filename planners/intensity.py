"""The intensity scheme of a channel, decided from its voxels, written in numbers that stock nnU-Net understands.

A fixed window needs no class of ours: nnU-Net's CTNormalization computes (clip(x, p0.5, p99.5) - mean) / std from the plan,
so (lo, hi, lo, hi - lo) maps [lo, hi] to [0, 1] exactly (verified in the tests).

Windows: Luffy03/Large-Scale-Medical:Self-supervised/utils/data_trans.py (abdomen, head-neck, chest) and
Downstream/monai/MM-WHS/main.py (heart, on the values as stored).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from planners.errors import SettingsError

WINDOWS: dict[str, tuple[float, float]] = {
    "ct-abdomen": (-175.0, 250.0),
    "ct-headneck": (-175.0, 250.0),
    "ct-chest": (-1000.0, 500.0),
    "ct-chest-article": (-500.0, 1000.0),
    "ct-heart": (0.0, 1700.0),
}
"""Named windows in HU (ct-heart: values as stored). `ct-chest-article` is as its source article prints it and cuts off lung."""

_STOCK = {
    "ct-percentile": "CTNormalization",
    "zscore": "ZScoreNormalization",
    "zscore-masked": "ZScoreNormalization",
    "minmax": "RescaleTo01Normalization",
    "rgb": "RGBTo01Normalization",
    "none": "NoNormalization",
}

SCHEMES = (*WINDOWS, *_STOCK, "ct:LO,HI")

# Which part of the body the structures of a dataset lie in, by words of their names. A dataset counts as a region when all
# its recognised names agree.
_REGION_WORDS = {
    "ct-abdomen": (
        "spleen liver kidney rkid lkid gall gallbladder eso esophagus oesophagus sto stomach aorta ivc veins portal pancreas "
        "rad lad adrenal duodenum colon bowel bladder prostate uterus hepatic vena postcava"
    ),
    "ct-headneck": "parotid brainstem mandible chiasm optic submandibular larynx nasopharynx cochlea thyroid",
    "ct-chest": "lung lungs airway airways trachea bronchus bronchi pulmonary lobe nodule covid",
    "ct-heart": "ventricle atrium myocardium myo lv rv la ra lvm coronary",
}
_WORD_REGION = {word: region for region, words in _REGION_WORDS.items() for word in words.split()}

_CT_NAMES = re.compile(r"(^|[^a-z])(ct|cta|cect|ncct|cbct|hu|hounsfield)([^a-z]|$)", re.IGNORECASE)
_WINDOW_TEXT = re.compile(r"ct:(-?\d+(?:\.\d+)?),(-?\d+(?:\.\d+)?)")
# Share of the foreground that must lie inside a region's window for the window to be used.
_NEEDED_INSIDE = 0.98


@dataclass(frozen=True)
class IntensityScheme:
    """One channel's scheme: its name, the window in stored units if it has one, and why it was chosen."""

    name: str
    because: str
    window: tuple[float, float] | None = None

    @property
    def normalization(self) -> str:
        """The nnU-Net class that carries the scheme out."""
        return "CTNormalization" if self.window else _STOCK[self.name]

    @property
    def uses_mask(self) -> bool:
        """Whether nnU-Net normalises inside the nonzero mask only."""
        return self.name == "zscore-masked"

    def stock_properties(self, measured: Mapping[str, float]) -> dict[str, float]:
        """The channel's `foreground_intensity_properties` for the plan: the measured ones, or the window's four numbers."""
        if self.window is None:
            return dict(measured)
        low, high = self.window
        return {**measured, "percentile_00_5": low, "percentile_99_5": high, "mean": low, "std": high - low}

    def to_json(self) -> dict:
        """What the plan keeps under its `autoseg` key."""
        return {"scheme": self.name, "window": list(self.window) if self.window else None, "because": self.because}


def parse_scheme(text: str) -> IntensityScheme:
    """The scheme a user names with `--intensity` (one of `SCHEMES`, `ct:-100,300` for a window of one's own)."""
    because = "asked for with --intensity"
    if text in WINDOWS:
        return IntensityScheme(text, because, WINDOWS[text])
    if text in _STOCK:
        return IntensityScheme(text, because)
    match = _WINDOW_TEXT.fullmatch(text)
    if match:
        low, high = float(match.group(1)), float(match.group(2))
        if low >= high:
            raise SettingsError("An intensity window must rise", found=text, expected="ct:LO,HI with LO < HI")
        return IntensityScheme(text, because, (low, high))
    raise SettingsError("Unknown intensity scheme", found=text, expected=" ".join(SCHEMES))


def infer_scheme(channel_name: str, voxels: Mapping, label_names: Iterable[str], masked: bool) -> IntensityScheme:
    """Decide one channel's scheme.

    Args:
        channel_name: from dataset.json; a hint only.
        voxels: the channel's hints of the fingerprint (`planners.fingerprint`): `low`, `high` (medians over cases of the
            smallest and largest voxel), `integer_share`, `air_share` (share of voxels near -1000), `window_share` (share of
            foreground voxels inside each named window).
        label_names: decide the body region of CT.
        masked: nnU-Net's rule that normalisation should look at the nonzero mask only (most of the image was cropped away).
    """
    is_ct, evidence = _looks_like_ct(channel_name, voxels)
    if not is_ct:
        return IntensityScheme("zscore-masked" if masked else "zscore", evidence)
    region = _body_region(label_names)
    if region is None:
        return IntensityScheme("ct-percentile", f"{evidence}; the label names do not tell one body region")
    inside = voxels["window_share"][region]
    low, high = WINDOWS[region]
    window_text = f"[{low:g}, {high:g}]"
    if inside < _NEEDED_INSIDE:
        return IntensityScheme(
            "ct-percentile",
            f"{evidence}; only {inside:.1%} of the foreground lies in the {region} window {window_text} "
            f"(needed {_NEEDED_INSIDE:.0%})",
        )
    return IntensityScheme(
        region, f"{evidence}; structures of one region, {inside:.1%} of them inside {window_text}", (low, high)
    )


def _looks_like_ct(channel_name: str, voxels: Mapping) -> tuple[bool, str]:
    low, high = voxels["low"], voxels["high"]
    named_ct = bool(_CT_NAMES.search(channel_name))
    span = f"voxels from {low:g} to {high:g}"
    hounsfield_range = -10000 <= low <= -200 and 100 <= high <= 35000
    if hounsfield_range and (voxels["air_share"] >= 0.005 or voxels["integer_share"] >= 0.99 or named_ct):
        air = f", {voxels['air_share']:.0%} of them air near -1000" if voxels["air_share"] >= 0.005 else ""
        return True, f"Hounsfield units: {span}{air}"
    if named_ct and high - low >= 200:
        return True, f"channel is named {channel_name!r} and its {span} are on an absolute scale"
    if named_ct:
        return False, f"channel is named {channel_name!r}, but its {span} are not on a CT scale"
    return False, f"no absolute scale: {span}, channel {channel_name!r}"


def _body_region(label_names: Iterable[str]) -> str | None:
    regions = {
        _WORD_REGION[word]
        for name in label_names
        for word in re.findall(r"[a-z]+", name.lower())
        if word in _WORD_REGION
    }
    return regions.pop() if len(regions) == 1 else None
