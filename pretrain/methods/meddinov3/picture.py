"""MedDINOv3's task and features as a picture: crops and masks, patch tokens as colours, and what is similar to one patch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, normalize

from pretrain.method import Batch
from pretrain.networks.dino_vit import TOKEN, DinoViT
from pretrain.pictures import show, show_montage

_MOST_SLICES = 4
_HIDDEN = 0.35
_STRIP = 4


@torch.no_grad()
def draw_task(teacher: DinoViT, batch: Batch) -> Figure:
    """One row a slice: its two large crops (masked patches are dark), some small ones; the teacher's patch tokens of the first
    large crop at its size and at twice that, their three main components as red, green and blue; and how similar each
    patch is to the one marked, at both sizes."""
    count = min(_MOST_SLICES, len(batch["large"]))
    columns = ["large crop, masked", "large crop, masked", "small crops"]
    columns += ["patch tokens", "the same at twice the size", "similar to the cross", "the same at twice the size"]
    figure = Figure(figsize=(2.1 * len(columns), 2.15 * count + 0.8), layout="constrained")
    rows = figure.subplots(count, len(columns), squeeze=False)
    images = batch["large"][:count, 0].float()
    larger = interpolate(images, scale_factor=2, mode="bicubic")
    maps = [_map(teacher, images), _map(teacher, larger)]
    colours = [components(tokens) for tokens in maps]
    for number in range(count):
        for axis, title in zip(rows[number], columns, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            if number == 0:
                axis.set_title(title, fontsize=9)
        for crop in range(2):
            show(rows[number, crop], _dimmed(batch, number, crop), columns[crop] if number == 0 else "")
        small = batch["small"][number, :_STRIP].float().cpu().numpy()
        grid = (2, 2) if len(small) == _STRIP else (1, len(small))
        show_montage(rows[number, 2], list(small), grid, [None] * len(small), columns[2] if number == 0 else "")
        place = _telling_patch(maps[0][number], images[number, 0])
        for size, (tokens, colour) in enumerate(zip(maps, colours, strict=True)):
            rows[number, 3 + size].imshow(colour[number].cpu().numpy(), interpolation="nearest")
            axis = rows[number, 5 + size]
            zoom = tokens.shape[1] / maps[0].shape[1]
            centre = [(p + 0.5) * zoom - 0.5 for p in place]
            axis.imshow(_similarity(tokens[number], [int(p * zoom) for p in place]), cmap="viridis", vmin=-0.2, vmax=1)
            axis.plot(centre[1], centre[0], marker="x", color="white", markersize=7, markeredgewidth=2)
        if not bool(batch["valid"][number]):
            rows[number, 0].set_ylabel("not counted", fontsize=9)
    figure.suptitle(
        "Held-out slices, as the teacher sees them; clean features have the shapes of the image", fontsize=10
    )
    return figure


def _map(teacher: DinoViT, images: Tensor) -> Tensor:
    """Patch tokens (B, y, x, features), normalised."""
    grid = [n // TOKEN for n in images.shape[2:]]
    return normalize(teacher.tokens(images)[1].float(), dim=-1).unflatten(1, grid)


def components(tokens: Tensor) -> Tensor:
    """(B, y, x, features) to colours (B, y, x, 3) in [0, 1]: the three main directions in which all of these tokens differ."""
    flat = tokens.flatten(0, 2)
    flat = flat - flat.mean(0)
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)
    found = flat @ directions[:3].T
    low, high = (torch.quantile(found, q, dim=0) for q in (0.02, 0.98))
    scaled = ((found - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    return scaled.unflatten(0, tokens.shape[:3])


def _telling_patch(tokens: Tensor, image: Tensor) -> tuple[int, int]:
    """Of the brighter half of the patches, which show more than air, the one that differs most from their mean."""
    flat, brightness = tokens.flatten(0, 1), avg_pool2d(image[None], TOKEN)[0].flatten()
    bright = brightness >= brightness.median()
    common = flat @ normalize(flat[bright].mean(0), dim=0)
    return divmod(int(common.masked_fill(~bright, torch.inf).argmin()), tokens.shape[1])


def _similarity(tokens: Tensor, place: list[int]) -> np.ndarray:
    return (tokens @ tokens[place[0], place[1]]).cpu().numpy()


def _dimmed(batch: Batch, number: int, crop: int) -> Any:
    """The first channel of a large crop, masked patches darker than anything in it."""
    image = batch["large"][number, crop, 0].float().cpu().numpy()
    masked = batch["masked"][number, crop].cpu().numpy()
    edge = math.isqrt(len(masked))
    hidden = masked.reshape(edge, edge).repeat(TOKEN, 0).repeat(TOKEN, 1)
    low, high = np.quantile(image, [0.01, 0.99])
    return np.where(hidden, low - _HIDDEN * (high - low), image.clip(low, high))
