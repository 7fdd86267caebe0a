"""Mode `official` of PCRL: the parts of the authors' released code (Luchixiang/PCRL:pytorch/pcrl_3d.py), for
comparison.

Against `paper`: the momentum encoding is not restored (issue 4: to save memory); both deepest maps are gated before
they are mixed; a second pass sees images mixed within the batch, without TransAtt; contrast is against noise, on three
pairs. What are mistakes there is not repeated: targets are clean and aligned, keys enter the queue once, the density of
the noise is 1 / images. No sigmoid at the end, because intensities are not in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pretrain.method import Batch, Step, Terms
from pretrain.methods.pcrl_parts import Graph, cosines, mean_over, mean_similarity, noise_contrast, squared_errors
from pretrain.methods.pcrl_picture import Panel
from pretrain.methods.pcrl_three import Contrast, mixed

if TYPE_CHECKING:
    from pretrain.methods.pcrl import PCRLConfig, PCRLSpec


class TwoPasses(Contrast):
    """A pass on the views and one on mixtures of them; in each the ordinary and the hybrid encoding are restored."""

    normaliser: Tensor

    def __init__(self, network: nn.Module, spec: PCRLSpec, config: PCRLConfig) -> None:
        super().__init__(network, spec, config)
        self.register_buffer("normaliser", torch.zeros(()))

    def terms(self, batch: Batch, step: Step, graph: Graph) -> Terms:
        """`contrast`, the mean of three, and `restore`, the mean of four; metrics as in mode `paper`."""
        inputs, clean, codes, valid = batch["input"], batch["clean"], batch["codes"], batch["valid"]
        share, blend, second_share = batch["mix"][0]
        partner = batch["partner"]
        apply = self.spec.contexts.apply

        with torch.no_grad():
            averaged = self.averaged(inputs[:, 1])
            keys, pooled_average = self.embedding_average(averaged[-1])
        maps = graph.cut(self.body.encoder(inputs[:, 0]))
        query, pooled = self.embedding(maps[-1])
        contrasts = [self._contrast(batch, query, keys, valid)]
        terms: Terms = {**mean_similarity(query, valid), "pooled": pooled, "scale": self._scale(batch, query).detach()}
        graph.add(contrasts[0] / 3)
        targets = apply(clean[:, 0], codes[:, 0]), apply(clean[:, 1], codes[:, 1])
        wanted = {"ordinary": targets[0], "hybrid": mixed(*targets, share)}
        passes = [
            ("ordinary", lambda: self.gated(maps, codes[:, 0])),
            (
                "hybrid",
                lambda: [
                    mixed(a, b, share)
                    for a, b in zip(self.gated(maps, codes[:, 0]), self.gated(averaged, codes[:, 1]), strict=True)
                ],
            ),
        ]
        errors = self._restore(passes, wanted, batch, valid, graph, terms)
        graph.close()

        both_valid = valid * valid[partner]
        blended = mixed(inputs, inputs[partner], blend)
        with torch.no_grad():
            second_averaged = self.averaged(blended[:, 1])
            second_keys, _ = self.embedding_average(second_averaged[-1])
        second_maps = graph.cut(self.body.encoder(blended[:, 0]))
        query, _ = self.embedding(second_maps[-1])
        contrasts += [
            self._contrast(batch, query, second_keys, both_valid),
            self._contrast(batch, query, mixed(keys, keys[partner], blend), both_valid),
        ]
        graph.add((contrasts[1] + contrasts[2]) / 3)
        blended_clean = mixed(clean, clean[partner], blend)
        wanted = {"blended": blended_clean[:, 0]}
        wanted["blended_hybrid"] = mixed(blended_clean[:, 0], blended_clean[:, 1], second_share)
        passes = [
            ("blended", lambda: list(second_maps)),
            (
                "blended_hybrid",
                lambda: [mixed(a, b, second_share) for a, b in zip(second_maps, second_averaged, strict=True)],
            ),
        ]
        errors |= self._restore(passes, wanted, batch, both_valid, graph, terms)
        graph.close()
        return {
            "loss": graph.total,  # type: ignore[dict-item]
            "contrast": torch.stack([c.detach() for c in contrasts]).mean(),
            "restore": torch.stack(list(errors.values())).mean(),
            "shown": valid.mean(),
            **errors,
            **terms,
            "keys": keys,
            "pooled_average": pooled_average,
        }

    def _restore(
        self,
        passes: list[tuple[str, Callable[[], list[Tensor]]]],
        wanted: dict[str, Tensor],
        batch: Batch,
        valid: Tensor,
        graph: Graph,
        terms: Terms,
    ) -> dict[str, Tensor]:
        errors = {}
        for name, maps in passes:
            each = squared_errors(self.restored(maps()), wanted[name])
            error = mean_over(each, valid)
            errors[name] = error.detach()
            terms |= self.measured(name, each, wanted[name], batch, valid)
            graph.add(error / 4)
            del each, error
        return errors

    def _contrast(self, batch: Batch, query: Tensor, key: Tensor, valid: Tensor) -> Tensor:
        counted = self.queue.counted(batch["case"], mask_same_case=self.config.mask_same_case)
        scale = self.normaliser if self.normaliser > 0 else self._scale(batch, query).detach()[0]
        scale = scale.where(scale > 0, 1)
        own = self._score((query * key).sum(1)) / scale
        others = self._score(cosines(query, self.queue.keys)) / scale
        return mean_over(noise_contrast(own, others, counted, self.spec.images), valid)

    def _score(self, cosine: Tensor) -> Tensor:
        return (cosine / self.config.temperature).exp()

    def _scale(self, batch: Batch, query: Tensor) -> Tensor:
        """(1,): what makes the mean score of a negative 1 / images; 0 where no valid sample has negatives."""
        counted = self.queue.counted(batch["case"], mask_same_case=self.config.mask_same_case)
        counted = counted & batch["valid"].bool()[:, None]
        scores = self._score(cosines(query, self.queue.keys))
        return ((scores * counted).sum() / counted.sum().clamp(min=1) * self.spec.images)[None]

    def update(self, batch: Batch, terms: Terms, gather: Callable[[Tensor], Tensor]) -> None:
        # Once, from the first step that has negatives, as the authors do; from their mean over the processes that have.
        if self.normaliser == 0:
            scales = gather(terms["scale"])
            self.normaliser.copy_(scales.sum() / (scales > 0).sum().clamp(min=1))
        super().update(batch, terms, gather)

    @torch.no_grad()
    def panels(self, batch: Batch, case: int) -> list[list[Panel]]:
        """A row for the ordinary and one for the hybrid encoding of one case."""
        one = {key: value[case : case + 1] for key, value in batch.items()}
        codes, share = one["codes"], one["mix"][0, 0]
        own = self.gated(list(self.body.encoder(one["input"][:, 0])), codes[:, 0])
        average = self.gated(self.averaged(one["input"][:, 1]), codes[:, 1])
        both = [mixed(a, b, share) for a, b in zip(own, average, strict=True)]
        names = [self.spec.contexts.name(code) for code in codes[0].tolist()]
        targets = [self.spec.contexts.apply(one["clean"][:, view], codes[:, view])[0] for view in range(2)]
        return [
            [
                Panel("ordinary encoder sees", one["input"][0, 0]),
                Panel(f"wanted: {names[0]}", targets[0]),
                Panel("restored", self.restored(own)[0]),
            ],
            [
                Panel("momentum encoder sees", one["input"][0, 1]),
                Panel(f"wanted: {float(share):.0%} of the above + {names[1]}", mixed(targets[0], targets[1], share)),
                Panel("restored from both", self.restored(both)[0]),
            ],
        ]
