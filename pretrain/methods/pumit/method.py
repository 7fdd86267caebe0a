"""PUMIT: learn a vocabulary of image patches, then predict the words that stand where a scan is masked.

Luo et al., "Building Universal Foundation Models for Medical Image Analysis with Spatially Adaptive Networks", 2023,
arXiv:2312.07630. Consulted: function2-llx/PUMIT:pumit/{datamodule,transforms}.py, pumit/model/mim.py,
scripts/tokenizer/main.py, conf/.

Stage `tokenizer` trains an autoencoder whose code of a patch is a distribution over a codebook. In stage `mim` it rests, and
the transformer of the plan's network predicts its distributions. One channel is seen at a time: the transformer's input
channels all get the same image, which is what the transfer rule makes of a network with one.

Differs from the authors' code on purpose: L1 + MSE instead of a perceptual loss; other weights of the prior; intensities of the
plan for the transformer; views of what is smaller than the crop are padded and the padding does not count.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from planners.decisions import times
from planners.errors import AutosegError, PlanError, SettingsError
from pretrain.crops import best_of
from pretrain.encoders import encoder_of
from pretrain.importers.pumit import read_tokenizer
from pretrain.method import Batch, Export, ParameterGroup, PretrainMethod, Stage, Step, Target, Terms
from pretrain.methods.pumit.losses import code_counts, reconstruction, sharpness_weight, usage
from pretrain.methods.pumit.masking import draw_visible, masked_terms, masked_tokens
from pretrain.methods.pumit.sampler import Crops, View, degree_of, draw_views, usable, view_size
from pretrain.methods.pumit.settings import OFFICIAL, PUMITConfig, Scale, by_size
from pretrain.methods.pumit.tokenizer import Tokenizer
from pretrain.methods.pumit.views import draw_placement, other_intensities, resampled, tokens_inside
from pretrain.networks.sac import Spacing
from pretrain.volumes import CaseInfo, Volume

logger = logging.getLogger("autoseg")

TOKENIZER, MIM = "tokenizer", "mim"
_CONFIGURATION = "3d_fullres_sac"
_BRIGHT = 0.02  # of the scan's range; what is darker counts as air
_WANTED_SHOWN = 0.1
_COLLAPSED_SHARE = 0.1  # of the stage's steps with a single code in use, after which the run stops
_COLLAPSE_FROM = 200  # steps, before which one code is no bad sign
_HARDLY_ANY = 0.05
_LEAST_RATE, _RATE_OF_256 = 5e-5, 1.5e-4
_DEEP = 12  # blocks; above, the first three quarters see the visible tokens only


@dataclass(frozen=True)
class PUMITSpec:
    """What is cut from the scans."""

    crops: Mapping[str, Crops]
    """By stage."""
    masked: float
    rotate: float
    mirror: float
    intensity: float


class PUMITPretraining(PretrainMethod):
    """A tokenizer learns to restore crops from soft words; then the transformer predicts the words of masked places."""

    Config = PUMITConfig
    presets = {  # noqa: RUF012
        "default": {},
        # Two cores: minutes.
        "cpu": {
            "steps": 600,
            "tokenizer_share": 0.6,
            "channels": (16, 32, 64),
            "codes": 64,
            "tokenizer_crop": (2, 2, 2),
            "mim_crop": (2, 4, 4),
            "tokenizer_rate": 1e-3,
            "tokenizer_schedule": "constant",
            "diversity": 0.05,
            "sharpness": 0.02,
            "mim_rate": 1e-3,
            "weight_decay": 0.0,
        },
    }
    citation = "Luo et al.: Building Universal Foundation Models for Medical Image Analysis (arXiv:2312.07630)"
    own_grid = True

    # What is cut ------------------------------------------------------------------------------------------------------------

    @classmethod
    def configuration(cls, settings: Mapping[str, Any]) -> str:
        size = str(settings.get("size")).lower()
        return _CONFIGURATION if size == "none" else f"{_CONFIGURATION}_{'b' if size == OFFICIAL else size}"

    @classmethod
    def plan(cls, target: Target, pool: Sequence[CaseInfo], config: PUMITConfig) -> PUMITSpec:
        if config.size is not None and target.configuration != cls.configuration({"size": config.size}):
            raise SettingsError(
                "pumit.size and the configuration contradict each other",
                found=f"{config.size} and {target.configuration}",
                remedy="leave one of them out",
            )
        cases = [case for case in pool if usable(case)]
        if not cases:
            raise PlanError("All scans are constant", remedy="autoseg verify looks for such scans")
        wanted = {
            TOKENIZER: (config.tokenizer_crop, config.tokenizer_batch),
            MIM: (by_size(config).mim_crop, config.mim_batch),
        }
        crops = {stage: Crops(_limited(tokens, cases), batch, config.zoom) for stage, (tokens, batch) in wanted.items()}
        if math.prod(crops[MIM].tokens[1:]) < 2:
            raise PlanError(
                "Crops of one token have nothing to mask",
                found=f"{times(crops[MIM].tokens)} tokens",
                remedy="--set pumit.mim_crop=2,4,4, or larger scans",
            )
        degrees = sorted({degree_of(case) for case in cases})
        logger.info(
            "PUMIT cuts crops of %s and %s voxels (tokens: %s and %s), zoomed at random; the scans have DA %s",
            times(view_size(crops[TOKENIZER].tokens, degrees[0])),
            times(view_size(crops[MIM].tokens, degrees[0])),
            times(crops[TOKENIZER].tokens),
            times(crops[MIM].tokens),
            ", ".join(map(str, degrees)),
        )
        return PUMITSpec(crops, config.masked, config.rotate, config.mirror, config.intensity)

    @staticmethod
    def draw(
        spec: PUMITSpec, pool: Sequence[CaseInfo], rng: np.random.Generator, step: Step
    ) -> list[tuple[str, tuple[str, View]]]:
        """Views of one DA, each with the stage it is for."""
        return [(case, (step.stage, view)) for case, view in draw_views(spec.crops[step.stage], pool, rng)]

    @staticmethod
    def sample(
        spec: PUMITSpec, case: Volume, parameters: tuple[str, View], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """One view.

        Returns:
            image (1, z, y, x) in [0, 1]; low and high: the intensities, as the plan normalised them, that are 0 and 1; degree:
            DA; inside (tokens,): not wholly padding; valid: whether it shows anything; in stage mim visible (n,): numbers of
            the tokens that are seen.
        """
        stage, view = parameters

        def one() -> tuple[tuple[np.ndarray, np.ndarray], float]:
            image, inside = resampled(
                case, view, *draw_placement(case.info, view, rng, rotate=spec.rotate, mirror=spec.mirror)
            )
            return (image, inside), float((image > _BRIGHT).mean())

        (image, inside), _ = best_of(10, one, _WANTED_SHOWN)
        low, high = case.info.channel_ranges[view.channel]
        tokens = tokens_inside(
            inside, [n // s for n, s in zip(view.size, view_size((1, 1, 1), view.degree), strict=True)]
        )
        made = {
            "image": other_intensities(image, rng, spec.intensity)[None],
            "low": np.float32(low),
            "high": np.float32(high),
            "degree": np.int64(view.degree),
            "inside": tokens,
            "valid": np.bool_(np.ptp(image) > _BRIGHT and tokens.sum() > 1),
        }
        return made | ({"visible": draw_visible(tokens, spec.masked, rng)} if stage == MIM else {})

    @staticmethod
    def collate(samples: list[dict[str, np.ndarray]]) -> Batch:
        """`degree` becomes one number: kernels depend on it, so a batch has one."""
        (degree,) = {int(sample["degree"]) for sample in samples}
        return PretrainMethod.collate(samples) | {"degree": degree}

    # What is learned --------------------------------------------------------------------------------------------------------

    single_code_steps: Tensor

    def __init__(self, network: nn.Module, spec: PUMITSpec, config: PUMITConfig) -> None:
        super().__init__()
        self.config, self.scale, self.spec = config, by_size(config), spec
        self.encoder = encoder_of(network)
        if config.tokenizer is None:
            self.tokenizer = _new_tokenizer(self.scale, config.size)
        else:
            self.tokenizer = _published(config.tokenizer)
        self._codes = self.tokenizer.quantize.embedding.num_embeddings
        width, blocks = self.encoder.vit.cls_token.shape[-1], len(self.encoder.vit.blocks)
        self.mask_block = 3 * blocks // 4 if blocks > _DEEP else 0
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, 1, width), std=0.02))
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, self._codes))
        for parameter in self.head.parameters():
            nn.init.trunc_normal_(parameter, std=0.02) if parameter.ndim == 2 else nn.init.zeros_(parameter)
        with torch.no_grad():
            kernel = self.encoder.vit.patch_embed["proj"].weight
            kernel.copy_(kernel.mean(1, keepdim=True).expand_as(kernel))
        self.register_buffer("single_code_steps", torch.zeros((), dtype=torch.long))

    def stages(self) -> Sequence[Stage]:
        """The tokenizer's, unless it is there already, and the transformer's."""
        config = self.config
        rate = max(_LEAST_RATE, _RATE_OF_256 * math.sqrt(config.mim_batch / 256))
        tokenizer = Stage(
            TOKENIZER,
            share=config.tokenizer_share,
            learning_rate=config.tokenizer_rate,
            weight_decay=config.weight_decay,
            warm_up=0.05,
            schedule=config.tokenizer_schedule,
            clip_norm=1.0,
        )
        mim = Stage(
            MIM,
            share=1 - config.tokenizer_share,
            learning_rate=config.mim_rate or rate,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.95),
            warm_up=1 / 30,
            clip_norm=0.5,
            frozen=(TOKENIZER,),
        )
        return [mim] if config.tokenizer else [tokenizer, mim]

    def parameter_groups(self, stage: Stage) -> Sequence[ParameterGroup]:
        """Matrices, and what has no weight decay."""
        if stage.name == TOKENIZER:
            named = dict(self.tokenizer.named_parameters())
        else:
            named = {**dict(self.encoder.vit.named_parameters()), **dict(self.head.named_parameters())}
            named["mask_token"] = self.mask_token
        plain = [n for n, p in named.items() if p.ndim < 2 or n.endswith(("_embed", "_token", "embedding.weight"))]
        return [
            ParameterGroup([p for name, p in named.items() if name not in plain]),
            ParameterGroup([named[name] for name in plain], weight_decay=0.0),
        ]

    def loss(self, batch: Batch, step: Step) -> Terms:
        """Reconstruction and prior in stage tokenizer, the divergence from the tokenizer's words in stage mim."""
        return self._masked_loss(batch) if step.stage == MIM else self._tokenizer_loss(batch, step)

    def _tokenizer_loss(self, batch: Batch, step: Step) -> Terms:
        image, valid = 2 * batch["image"] - 1, batch["valid"]
        tokens, output = self.tokenizer(image, Spacing(batch["degree"]))
        tokens = tokens.flatten(1, 3)
        counted = batch["inside"] & valid[:, None]
        codes = usage(tokens, self.gather, counted)
        late = 1.0 if self.config.size == OFFICIAL else step.progress
        prior = codes.prior(self.scale.diversity, sharpness_weight(late, self.scale.sharpness))
        shown = valid.float().mean()
        # Where no view counts the result has no meaning, but a gradient, which is 0.
        output, image = (output[valid], image[valid]) if valid.any() else (0 * output, 0 * image)
        restored = reconstruction(output, image)
        used = self.gather(code_counts(tokens.detach()[counted])[None].float()).sum(0)
        return {
            "loss": restored["l1"] + restored["mse"] + prior,
            **restored,
            f"l1_DA{batch['degree']}": restored["l1"],
            "explained": 1 - restored["mse"].detach() / image.var().clamp_min(1e-6),
            "unevenness": codes.unevenness,
            "sharpness": codes.sharpness,
            "perplexity": codes.perplexity,
            "choices": codes.choices,
            "used": (used > 0).sum().float(),
            "degree": shown.new_tensor(float(batch["degree"])),
            "shown": shown,
        }

    def _masked_loss(self, batch: Batch) -> Terms:
        targets = self._targets(batch)
        logits = self.answers(batch)
        hidden = masked_tokens(batch["visible"], targets.shape[1])
        terms = masked_terms(logits, targets, hidden & batch["inside"] & batch["valid"][:, None])
        prior = terms.pop("prior")
        return {
            "loss": terms["kl"],
            **terms,
            "kl_share": terms["kl"].detach() / prior.clamp_min(1e-6),
            "degree": prior.new_tensor(float(batch["degree"])),
            "shown": batch["valid"].float().mean(),
        }

    @torch.no_grad()
    def _targets(self, batch: Batch) -> Tensor:
        """What the tokenizer says of the whole image, (N, L, V)."""
        return self.tokenizer.soft_tokens(2 * batch["image"] - 1, Spacing(batch["degree"]))

    def answers(self, batch: Batch) -> Tensor:
        """Logits (N, L, V) of all tokens from those that are seen."""
        vit = self.encoder.vit
        low, high = (batch[key].reshape(-1, 1, 1, 1, 1) for key in ("low", "high"))
        image = low + (high - low) * batch["image"]
        image = image.expand(-1, vit.patch_embed["proj"].in_channels, -1, -1, -1)
        hidden = vit(image, batch["degree"], batch["visible"], mask_token=self.mask_token, mask_block=self.mask_block)
        return self.head(hidden[:, 1:])

    def after_step(self, batch: Batch, terms: Terms, step: Step) -> None:
        """Stop where all tokens have been the same code for long: nothing can be predicted of such tokens."""
        if step.stage != TOKENIZER:
            return
        if terms["used"] == 1 and terms["shown"] > 0:
            self.single_code_steps += 1
        else:
            self.single_code_steps.zero_()
        if step.index >= _COLLAPSE_FROM and self.single_code_steps >= _COLLAPSED_SHARE * step.total:
            raise AutosegError(
                "The tokenizer's codebook has collapsed: every token is the same code",
                found=f"{int(self.single_code_steps)} steps in a row, up to step {step.index + 1} of {step.total}",
                remedy=f"start again with --overwrite and --set pumit.diversity={3 * self.scale.diversity:g}, or a lower "
                "pumit.sharpness or pumit.tokenizer_rate",
            )

    def chance(self) -> Mapping[str, float]:
        """`explained`: a constant image. `kl_share`: always the mean of all tokens."""
        return {"explained": 0.0, "kl_share": 1.0}

    def diagnose(self, recent: Mapping[str, float], step: Step) -> str | None:
        if step.stage != TOKENIZER or step.progress < 0.9 or "used" not in recent:
            return None
        if recent["explained"] < _HARDLY_ANY:
            return (
                f"The tokenizer restores {recent['explained']:.0%} of the variance: its words say little of what is there. "
                "A longer stage (--steps, pumit.tokenizer_share), or a smaller pumit.diversity and pumit.sharpness, helps"
            )
        if recent["used"] < 0.25 * self._codes:
            return (
                f"Only {recent['used']:.0f} of {self._codes} codes are in use in a batch. --set pumit.diversity="
                f"{3 * self.scale.diversity:g} uses more of them"
            )
        if recent["choices"] > 0.1 * self._codes:
            return (
                f"A token is undecided among {recent['choices']:.0f} codes. A longer stage, or --set pumit.sharpness="
                f"{3 * self.scale.sharpness:g}, makes tokens sharper"
            )
        return None

    @torch.no_grad()
    def picture(self, batch: Batch) -> Any:
        from pretrain.methods.pumit.picture import draw_task

        spacing = Spacing(batch["degree"])
        image = 2 * batch["image"] - 1
        logits, below = self.tokenizer.encode(image, spacing)
        tokens = logits.float().softmax(-1)

        def decoded(words: Tensor) -> Tensor:
            return (self.tokenizer.decode(self.tokenizer.quantize(words), below)[0].float() + 1) / 2

        masked = predicted = None
        if "visible" in batch:
            masked = masked_tokens(batch["visible"], tokens[0, ..., 0].numel())
            answers = torch.where(masked[..., None], self.answers(batch).float().softmax(-1), tokens.flatten(1, 3))
            predicted = decoded(answers.reshape(tokens.shape))
        return draw_task(batch, tokens, decoded(tokens), masked, predicted)

    def export(self) -> Export:
        return Export(self.encoder, "encoder", {TOKENIZER: self.tokenizer})


@torch.no_grad()
def start_apart(tokenizer: Tokenizer) -> None:
    """Begin with tokens that differ: nearly decided ones, of codes without a common part.

    With torch's own start a token is nearly uniform, so that the decoder, behind its group norms, sees the mean of the codebook
    and hardly what varies; evenness is then had for nothing, by tokens that stay uniform, and short runs end with codes of
    places instead of contents.
    """
    tokenizer.quantize.proj.weight *= 8
    tokenizer.quantize.embedding.weight -= tokenizer.quantize.embedding.weight.mean(0)


def _limited(tokens: Sequence[int], cases: Sequence[CaseInfo]) -> tuple[int, int, int]:
    """As many tokens along each axis as the median scan has, at most those wanted."""
    edges = [view_size((1, 1, 1), degree_of(case)) for case in cases]
    reached = np.median([np.divide(case.shape, edge) for case, edge in zip(cases, edges, strict=True)], axis=0)
    z, y, x = (max(1, min(wanted, math.ceil(found))) for wanted, found in zip(tokens, reached, strict=True))
    return z, y, x


def _new_tokenizer(scale: Scale, size: str | None) -> Tokenizer:
    tokenizer = Tokenizer(1, scale.channels, scale.codes, transposed_pool="sum" if size == OFFICIAL else "mean")
    start_apart(tokenizer)
    return tokenizer


def _published(path: str) -> Tokenizer:
    """The authors' tokenizer, for one channel."""
    found = read_tokenizer(Path(path), gray=True)
    logger.info("Tokenizer: %s, %d words", found.name, found.options["codes"])
    for warning in found.warnings:
        logger.warning("%s", warning)
    tokenizer = Tokenizer(**found.options)
    tokenizer.load_state_dict(found.tensors)
    return tokenizer
