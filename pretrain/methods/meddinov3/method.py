"""MedDINOv3: DINOv3's self-distillation on slices, for the vision transformer of configuration 2d_vit.

Li et al., "MedDINOv3: How to adapt vision foundation models for medical image segmentation?", 2025, arXiv:2509.02379; the
stages are those of DINOv3 (Siméoni et al., 2025, arXiv:2508.10104; facebookresearch/dinov3). The authors published no
pretraining code; sizes and rates are those of ricklisz/FlexiCT, their next project, with patches of 16 pixels.

Stage `dino`: a student that sees large and small crops of a slice must give the class tokens (DINO) and, where patches of the
large ones are masked, the patch tokens (iBOT) of its moving average, the teacher, which sees the large ones whole; class tokens
are kept apart (KoLeo). Stage `gram`: similarities between patches stay as an earlier teacher had them, who sees twice the
resolution. Stage `high`: the same with larger crops. The teacher is kept.

Differs from the published recipe on purpose: slices are those of `2d`, whatever the resolution of 2d_vit, since larger ones
show no more; each view has intensities of its own; small data sets have guard rails.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from planners.errors import AutosegError, PlanError, SettingsError
from pretrain.crops import best_of, share_shown
from pretrain.encoders import encoder_of
from pretrain.method import Batch, Export, MomentumPair, ParameterGroup, PretrainMethod, Stage, Step, Target, Terms
from pretrain.methods.meddinov3.heads import HeadPair
from pretrain.methods.meddinov3.losses import (
    dino_loss,
    gram_loss,
    ibot_loss,
    koleo,
    masked_weights,
    moved_centre,
    pair_shares,
    resized_tokens,
    sinkhorn_shift,
    targets_of,
)
from pretrain.methods.meddinov3.masks import block_mask, masked_counts
from pretrain.methods.meddinov3.monitors import rank_me, spread, target_entropy, usage_entropy
from pretrain.methods.meddinov3.schedules import (
    DINO,
    GRAM,
    HIGH,
    WARM_UP,
    gram_weight,
    last_layer_scale,
    late_fall,
    slow_rise,
    teacher_temperature,
)
from pretrain.methods.meddinov3.settings import MedDINOv3Config, heads_of
from pretrain.methods.meddinov3.sizes import Sizes, crop_sizes
from pretrain.methods.meddinov3.views import cut, distorted, draw_box
from pretrain.networks.dino_vit import TOKEN, DinoViT
from pretrain.volumes import CaseInfo, Volume

logger = logging.getLogger("autoseg")

_CONFIGURATION = "2d_vit"
_LARGE_AREA, _SMALL_AREA = (0.32, 1.0), (0.05, 0.32)
_WANTED_SHOWN, _HOPELESS = 0.1, 0.05
_FEW_TO_BEGIN, _FEW, _FEW_FOR_RATE = 500, 5_000, 50_000  # slices
_PASSES, _PASSES_FROM_NEW = 20, 90
"""How often each slice is seen; the former is the specification's, for weights that were trained before."""
_STEPS_FROM_NEW, _STEPS_MEASURED = 4_000, 9_000
"""On phantoms 400 steps from new weights did nothing for training, 1,000 little, and 9,000, 90 views of each slice, saved a
third of the epochs to a Dice: benchmarks/results/2026-11-29_meddinov3_longer.md."""
_SMALL_BATCH = 32  # slices; below, the prototypes of a batch cannot be used equally
_PATCHES_RATE = 0.2
_LATER_LOCAL = 0.5  # weight of the small crops' term in later stages
_MOST_REFRESHES = 3
_ROPE_RESCALE = 2.0
_RANKED_PATCHES = 2048
ROWS = 2048
"""Patches whose scores are there at once: with 65536 prototypes half a gigabyte."""
_COLLAPSE_FROM, _COLLAPSED_SHARE = 200, 0.1  # steps; of the stage's steps in a row
_UNDECIDED, _ALIKE, _ONE_POINT = 0.9995, 0.1, 0.03


@dataclass(frozen=True)
class MedDINOv3Spec:
    """What is cut from the scans, and what is known of them."""

    sizes: Mapping[str, tuple[Sizes, ...]]
    """By stage, the combinations of crops of which each batch has one."""
    small_crops: int
    unitless: tuple[bool, ...]
    """The channels whose numbers have no unit."""
    mirror: float
    distort: float
    slices: int
    """With foreground, of all scans."""
    initialised: bool
    checkpoint: bool
    """Whether blocks are computed once more in the backward pass, as the plan does where memory is short."""


class Network(nn.Module):
    """A transformer, its heads for class tokens and patches, and what stands in for masked patches."""

    def __init__(self, backbone: DinoViT, heads: HeadPair) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, heads


class MedDINOv3Pretraining(PretrainMethod):
    """A student learns to say of parts of a slice what its moving average says of the whole."""

    Config = MedDINOv3Config
    presets = {  # noqa: RUF012
        "default": {},
        # Two cores: minutes.
        "cpu": {
            "steps": 300,
            "gram_share": 0.25,
            "high_share": 0.25,
            "batch": 16,
            "large": 64,
            "small": 32,
            "small_crops": 2,
            "codes": 64,
            "hidden": 64,
            "bottleneck": 32,
            "centering": "sinkhorn",
            "temperature": 0.005,
            "momentum": 0.95,
            "late_momentum": 0.98,
            "rate": 5e-3,
            "layer_decay": 1.0,
            "weight_decay": 0.01,
            "koleo": 0.05,
        },
    }
    citation = "Li et al.: MedDINOv3 (arXiv:2509.02379); Siméoni et al.: DINOv3 (arXiv:2508.10104)"

    # What is cut ------------------------------------------------------------------------------------------------------------

    @classmethod
    def configuration(cls, settings: Mapping[str, Any]) -> str:
        size = str(settings.get("size")).lower()
        return _CONFIGURATION if size == "none" else f"{_CONFIGURATION}_{size}"

    @classmethod
    def data_configuration(cls, target: Target) -> str:
        """The slices that 2d_vit enlarges, before that."""
        own = target.plan["configurations"][target.configuration]
        return own.get("inherits_from", target.configuration)

    @classmethod
    def plan(cls, target: Target, pool: Sequence[CaseInfo], config: MedDINOv3Config) -> MedDINOv3Spec:
        if config.size is not None and target.configuration != cls.configuration({"size": config.size}):
            raise SettingsError(
                "meddinov3.size and the configuration contradict each other",
                found=f"{config.size} and {target.configuration}",
                remedy="leave one of them out",
            )
        edge = float(np.median([min(case.shape[1:]) for case in pool]))
        sizes = crop_sizes(config, edge)
        if sizes is None:
            raise PlanError(
                "The slices are too small for crops of several patches",
                found=f"{edge:g} pixels on the shorter side of the median slice",
                expected=f"at least {TOKEN // 2}",
                remedy="take another method, which works on smaller patches (autoseg methods)",
            )
        slices = sum(last - first for first, last in (case.foreground_box[0] for case in pool))
        logger.info(
            "MedDINOv3 cuts 2 large crops of %d×%d pixels and %d small ones of %d×%d from each of %d slices (%d in all)",
            *(sizes[DINO][0].large,) * 2, config.small_crops, *(sizes[DINO][0].small,) * 2, sizes[DINO][0].batch, slices,
        )  # fmt: skip
        _advise(slices, config, target.initialised)
        return MedDINOv3Spec(
            sizes={stage: sizes[stage] for stage in (DINO, GRAM, HIGH)},
            small_crops=config.small_crops,
            unitless=tuple(scheme != "CTNormalization" for scheme in target.settings["normalization_schemes"]),
            mirror=config.mirror,
            distort=config.distort,
            slices=slices,
            initialised=target.initialised,
            checkpoint=bool(target.settings["architecture"]["arch_kwargs"].get("use_checkpoint")),
        )

    @staticmethod
    def draw(
        spec: MedDINOv3Spec, pool: Sequence[CaseInfo], rng: np.random.Generator, step: Step
    ) -> list[tuple[str, tuple[str, Sizes, tuple[int, int]]]]:
        """Scans with probabilities as the square roots of their slices; crops of one combination of sizes; how many patches of
        each large crop are masked."""
        choices = spec.sizes[step.stage]
        sizes = choices[rng.choice(len(choices), p=[choice.share for choice in choices])]
        weights = np.sqrt([last - first for first, last in (case.foreground_box[0] for case in pool)])
        cases = rng.choice(len(pool), sizes.batch, p=weights / weights.sum())
        counts = masked_counts(2 * sizes.batch, (sizes.large // TOKEN) ** 2, rng)
        pairs = zip(counts[::2], counts[1::2], strict=True)
        return [(pool[case].id, (step.stage, sizes, pair)) for case, pair in zip(cases, pairs, strict=True)]

    @staticmethod
    def sample(
        spec: MedDINOv3Spec,
        case: Volume,
        parameters: tuple[str, Sizes, tuple[int, int]],
        rng: np.random.Generator,
    ) -> dict[str, np.ndarray]:
        """The crops of one slice.

        Returns:
            large (2, channels, large, large), small (n, channels, small, small), masked (2, patches), valid; after stage dino
            also fine (2, channels, gram, gram): what `large` shows, undistorted.
        """
        stage, sizes, counts = parameters

        def plane() -> tuple[np.ndarray, float]:
            index = int(rng.integers(*case.info.foreground_box[0]))
            voxels = case.plane(index).read((0, 0), case.info.shape[1:])
            return voxels, share_shown(voxels, case.info)

        image, shown = best_of(10, plane, _WANTED_SHOWN)

        def crop(area: tuple[float, float], *edges: int) -> list[np.ndarray]:
            def one() -> tuple[list[np.ndarray], float]:
                box = draw_box(image.shape[1:], area, rng)
                cuts = [cut(image, box, edge) for edge in edges]
                return cuts, share_shown(cuts[0], case.info)

            (first, *others), _ = best_of(5, one, _WANTED_SHOWN)
            flip = stage != HIGH and rng.random() < spec.mirror
            made = [distorted(first, case.info, spec.unitless, spec.distort, rng), *others]
            return [np.ascontiguousarray(each[:, :, ::-1]) if flip else each for each in made]

        edges = (sizes.large,) if stage == DINO else (sizes.large, sizes.gram)
        large = [crop(_LARGE_AREA, *edges) for _ in range(2)]
        grid = (sizes.large // TOKEN,) * 2
        made: dict[str, Any] = {
            "large": np.stack([each[0] for each in large]),
            "small": np.stack([crop(_SMALL_AREA, sizes.small)[0] for _ in range(spec.small_crops)]),
            "masked": np.stack([block_mask(grid, count, rng).ravel() for count in counts]),
            "valid": np.bool_(shown >= _HOPELESS),
        }
        return made if stage == DINO else made | {"fine": np.stack([each[1] for each in large])}

    # What is learned --------------------------------------------------------------------------------------------------------

    dino_centre: Tensor
    ibot_centre: Tensor
    collapsed_steps: Tensor

    def __init__(self, network: nn.Module, spec: MedDINOv3Spec, config: MedDINOv3Config) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        backbone: Any = encoder_of(network)
        width = backbone.embed_dim
        heads = heads_of(config, width, spec.slices)
        self.student = Network(backbone, HeadPair(width, heads.codes, heads.hidden, heads.bottleneck))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.anchor = copy.deepcopy(backbone).requires_grad_(False)
        backbone.rope.rescale_coords, backbone.rope.aug_active = _ROPE_RESCALE, True
        backbone.set_grad_checkpointing(spec.checkpoint)
        few = spec.slices < _FEW
        self.momentum = config.momentum if config.momentum is not None else 0.996 if few else 0.994
        self.koleo_weight = config.koleo if config.koleo is not None else 0.0 if few else 0.1
        small = config.batch < _SMALL_BATCH
        self.centring = config.centering or ("softmax" if small else "sinkhorn")
        self._compared = min(sizes.batch for choices in spec.sizes.values() for sizes in choices)
        for name in ("dino_centre", "ibot_centre"):
            self.register_buffer(name, torch.zeros(heads.codes))
        self.register_buffer("collapsed_steps", torch.zeros((), dtype=torch.long))

    def stages(self) -> Sequence[Stage]:
        config = self.config
        rate = config.rate * math.sqrt(config.batch / 64)
        if self.spec.initialised and self.spec.slices < _FEW_FOR_RATE:
            rate /= 4
        shared: dict[str, Any] = {
            "weight_decay": config.weight_decay,
            "clip_norm": 3.0,
            "clip_apart": ("student.backbone", "student.heads.dino", "student.heads.ibot"),
            "frozen": ("teacher", "anchor"),
        }
        return [
            Stage(DINO, learning_rate=rate, warm_up=WARM_UP, schedule=late_fall, **shared),
            Stage(
                GRAM,
                share=config.gram_share,
                learning_rate=rate / 2,
                warm_up=0.01,
                schedule="constant",
                goes_on=True,
                **shared,
            ),
            Stage(
                HIGH,
                share=config.high_share,
                learning_rate=rate / 4,
                warm_up=0.0,
                schedule=slow_rise,
                goes_on=True,
                **shared,
            ),
        ]

    def parameter_groups(self, stage: Stage) -> Sequence[ParameterGroup]:
        """The rate falls towards the image, and is a fifth of that for patches that were trained before; last layers rest at
        first; vectors and tokens have no weight decay."""
        backbone, heads = self.student.backbone, self.student.heads
        layers = backbone.layers()
        layers[0].append(heads.mask_token)
        patches = {id(p) for p in backbone.patch_embed.parameters()}
        tokens = {id(p) for p in (backbone.cls_token, backbone.reg_token, heads.mask_token)}
        groups: dict[tuple[Any, bool], list[nn.Parameter]] = {}

        def add(parameter: Any, scale: Any) -> None:
            decays = parameter.ndim > 1 and id(parameter) not in tokens
            groups.setdefault((scale, decays), []).append(parameter)

        for number, layer in enumerate(layers):
            scale = self.config.layer_decay ** (len(layers) - 1 - number)
            for parameter in layer:
                slow = self.spec.initialised and id(parameter) in patches
                add(parameter, scale * _PATCHES_RATE if slow else scale)
        for head in (heads.dino, heads.ibot):
            for parameter in head.mlp.parameters():
                add(parameter, 1.0)
            add(head.last_layer.weight, last_layer_scale)
        return [
            ParameterGroup(found, scale=scale, weight_decay=None if decays else 0.0)
            for (scale, decays), found in groups.items()
        ]

    def momentum_pairs(self) -> Sequence[MomentumPair]:
        def momentum(step: Step) -> float:
            return self.momentum if step.stage == DINO else self.config.late_momentum

        return [MomentumPair(self.student, self.teacher, momentum, copy_buffers=False)]

    def loss(self, batch: Batch, step: Step) -> Terms:
        """Terms `dino_large`, `dino_small`, `ibot`, `koleo`, and after stage dino `gram`; metrics `acc` (which of some slices
        the other large crop is of), `entropy` and `usage` of the teacher's answers, `spread` of its class tokens, and on
        held-out slices `rank` of its patches."""
        valid = batch["valid"]
        kept = valid if valid.any() else torch.ones_like(valid)
        # (slices, crops, …) to (crops, slices, …): the crops of one view stand together.
        views = {key: value[kept].transpose(0, 1) for key, value in batch.items() if key != "valid"}
        terms = self._terms(views, step)
        if not valid.any():
            terms = {key: 0 * terms[key] for key in ("loss", "dino_total", "ibot_total")}
        return {**terms, "shown": valid.float().mean()}

    def _terms(self, views: Batch, step: Step) -> Terms:
        large, small = views["large"].flatten(0, 1), views["small"].flatten(0, 1)
        masked = views["masked"].flatten(0, 1)
        slices, crops = views["large"].shape[1], len(large)
        temperature = teacher_temperature(step, self.config.temperature)

        with torch.no_grad():
            known_class, known_patches = self.teacher.backbone.tokens(large)
            taught = self.teacher.heads
            class_logits = taught.dino(known_class)
            answers = targets_of(class_logits, self._shift("dino", [class_logits], temperature), temperature)
            known = taught.ibot.directions(known_patches[masked])
            scores = Scores(known, taught.ibot.last_layer)
            shift = self._shift("ibot", scores, temperature)

        backbone, heads = self.student.backbone, self.student.heads
        class_tokens, patches = backbone.tokens(large, masked, heads.mask_token)
        small_tokens, _ = backbone.tokens(small)
        by_view = answers.unflatten(0, (-1, slices))
        dino_large = dino_loss(heads.dino(class_tokens).unflatten(0, (-1, slices)), by_view, same_crops=True)
        dino_small = dino_loss(heads.dino(small_tokens).unflatten(0, (-1, slices)), by_view)
        ibot = ibot_loss(
            patches[masked],
            heads.ibot,
            known,
            lambda rows: targets_of(taught.ibot.last_layer(rows), shift, temperature),
            masked_weights(masked),
            crops,
            rows=ROWS,
        )
        apart = sum(koleo(view) for view in class_tokens.unflatten(0, (-1, slices)))

        among, across = pair_shares(len(views["large"]), len(views["small"]))
        across *= 1.0 if step.stage == DINO else _LATER_LOCAL
        terms = {"dino_large": dino_large, "dino_small": dino_small, "ibot": ibot, "koleo": torch.as_tensor(apart)}
        loss = among * dino_large + across * dino_small + ibot + self.koleo_weight * apart
        if step.stage != DINO:
            gram = self._gram(views["fine"].flatten(0, 1), patches)
            loss, terms["gram"] = loss + gram_weight(step) * gram, gram
        with torch.no_grad():
            terms |= {key: value.detach() for key, value in terms.items()} | self._monitored(
                class_tokens, known_class, known_patches, answers, slices
            )
            # For the running means, after the step; the last layers are linear.
            terms["dino_total"] = torch.cat([class_logits.float().sum(0), loss.new_tensor([crops])])
            terms["ibot_total"] = torch.cat(
                [taught.ibot.last_layer(known.sum(0)).float(), loss.new_tensor([len(known)])]
            )
        return {"loss": loss, **terms}

    def _shift(self, name: str, scores: Any, temperature: float) -> Tensor:
        if self.centring == "softmax":
            return getattr(self, f"{name}_centre")
        return sinkhorn_shift(scores, temperature, self.gather)

    def _gram(self, fine: Tensor, patches: Tensor) -> Tensor:
        """How the similarities between the student's patches differ from the anchor's, who sees more detail."""
        with torch.no_grad():
            _, anchored = self.anchor.tokens(fine)
            grids = [(math.isqrt(tokens.shape[1]),) * 2 for tokens in (anchored, patches)]
            anchored = resized_tokens(anchored, *grids)
        return gram_loss(patches, anchored)

    def _monitored(
        self, class_tokens: Tensor, known_class: Tensor, known_patches: Tensor, answers: Tensor, slices: int
    ) -> Terms:
        terms = {
            "entropy": target_entropy(answers),
            "usage": usage_entropy(answers),
            "spread": spread(known_class),
        }
        if slices >= self._compared:
            one, other = class_tokens[: self._compared], known_class[slices : slices + self._compared]
            nearest = cosine_similarity(one[:, None].float(), other[None].float(), dim=-1).argmax(1)
            terms["acc"] = (nearest == torch.arange(self._compared, device=nearest.device)).float().mean()
        if not self.training:
            rows = known_patches.flatten(0, 1)
            terms["rank"] = rank_me(rows[:: -(-len(rows) // _RANKED_PATCHES)])
        return terms

    def after_step(self, batch: Batch, terms: Terms, step: Step) -> None:
        """Running means of the teacher's logits; the anchor of the later stages; stop a run that has collapsed."""
        if self.centring == "softmax":
            self.dino_centre.copy_(moved_centre(self.dino_centre, terms["dino_total"], self.gather))
            self.ibot_centre.copy_(moved_centre(self.ibot_centre, terms["ibot_total"], self.gather))
        if step.stage == DINO and step.index + 1 == max(1, round(self.config.gram_from * step.total)):
            self._anchor_the_teacher()
        every = self.config.gram_refresh
        if step.stage == GRAM and every and (step.index + 1) % every == 0 and step.index < _MOST_REFRESHES * every:
            self._anchor_the_teacher()
        self._stop_if_collapsed(terms, step)

    def _anchor_the_teacher(self) -> None:
        self.anchor.load_state_dict(self.teacher.backbone.state_dict())

    def _stop_if_collapsed(self, terms: Terms, step: Step) -> None:
        nothing = self.dino_centre.new_tensor(torch.nan)  # of a batch that shows nothing
        measured = torch.stack([terms.get(name, nothing).float() for name in ("usage", "entropy", "spread")])
        # All processes stop, or none.
        usage, entropy, spread_ = self.gather(measured[None]).nanmean(0).tolist()
        signs = {
            "all slices get the same answer": usage < _ALIKE,
            "the teacher has no opinion": entropy > _UNDECIDED,
            "all slices have the same features": spread_ < _ONE_POINT,
        }
        begun = step.stage != DINO or step.progress >= WARM_UP  # before, no teacher has an opinion
        seen = [what for what, sign in signs.items() if sign and begun]
        self.collapsed_steps.copy_(self.collapsed_steps + 1 if seen else 0 * self.collapsed_steps)
        if step.index >= _COLLAPSE_FROM and self.collapsed_steps >= _COLLAPSED_SHARE * step.total:
            raise AutosegError(
                f"The features have collapsed: {', '.join(seen)}",
                found=f"{int(self.collapsed_steps)} steps in a row, up to step {step.index + 1} of {step.total}; "
                f"entropy {entropy:.3f}, usage {usage:.3f}, spread {spread_:.3f}",
                remedy=f"start again with --overwrite and --set meddinov3.rate={self.config.rate / 4:g}, or from trained "
                "weights (--init)",
            )

    def chance(self) -> Mapping[str, float]:
        return {"acc": 1 / self._compared}

    def diagnose(self, recent: Mapping[str, float], step: Step) -> str | None:
        if step.stage != DINO or step.progress < 0.5 or "spread" not in recent:
            return None
        if recent["spread"] < 0.3:
            return (
                f"Class tokens of different slices point in much the same direction (spread {recent['spread']:.2f} of 1); more "
                "slices, a larger meddinov3.batch or weights to start from (--init) help"
            )
        return None

    @torch.no_grad()
    def picture(self, batch: Batch) -> Any:
        from pretrain.methods.meddinov3.picture import draw_task

        return draw_task(self.teacher.backbone, batch)

    def export(self) -> Export:
        return Export(self.teacher.backbone, "encoder", {"heads": self.teacher.heads, "anchor": self.anchor})


@dataclass(frozen=True)
class Scores:
    """The teacher's logits of patches, made for some at a time, each time they are gone through."""

    directions: Tensor
    """(M, bottleneck)."""
    last_layer: nn.Module

    def __iter__(self) -> Any:
        for part in self.directions.split(ROWS):
            yield self.last_layer(part)


def _advise(slices: int, config: MedDINOv3Config, initialised: bool) -> None:
    """What the number of slices says about this run."""
    if slices < _FEW_TO_BEGIN:
        logger.warning(
            "%d slices are too few to learn such features from; training from published weights alone (autoseg train "
            "--pretrained FILE) is likely to be better",
            slices,
        )
    elif slices < _FEW and not initialised:
        logger.warning(
            "%d slices are few for new weights: start from published ones (--init FILE of DINOv3 or MedDINOv3)", slices
        )
    passes = config.steps * config.batch / (1 + config.gram_share + config.high_share) / slices
    enough = _PASSES if initialised else _PASSES_FROM_NEW
    if passes > 3 * enough and config.steps > 2_000:
        fewer = max(2_000, round(config.steps * enough / passes, -2))
        logger.warning("These steps see every slice %.0f times; %d are enough (--steps %d)", passes, enough, fewer)
    if config.steps < _STEPS_FROM_NEW and not initialised:
        logger.warning(
            "%d steps show that everything works; new weights that help training take thousands (--steps %d)",
            config.steps, _STEPS_MEASURED,
        )  # fmt: skip
