"""PCRL's task (version 1): one decoder restores a scan in three contexts, from an ordinary, a momentum and a hybrid
encoding.

`Contrast` is what both modes of version 1 share; `ThreeContexts` is mode `paper`. The hybrid encoder is no network: its
maps are the same mixture of the other two's maps at every level, and its target is that mixture of their targets.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.method import Batch, MomentumPair, Step, Terms
from pretrain.methods.pcrl_parts import (
    Body,
    Embedding,
    Graph,
    KeyQueue,
    TransAtt,
    cosines,
    explained,
    info_nce,
    mean_over,
    mean_similarity,
    metric,
    squared_errors,
)
from pretrain.methods.pcrl_picture import Panel

if TYPE_CHECKING:
    from pretrain.methods.pcrl import PCRLConfig, PCRLSpec

_SHORT_RUN = 5000  # steps, below which the average must follow faster at first
_FIRST_MOMENTUM = 0.99


class Context(NamedTuple):
    """One restoration: what the decoder sees and what it must give."""

    name: str
    maps: Callable[[], list[Tensor]]
    """Made when needed, so that the graph of one context goes before the next comes."""
    code: Tensor
    target: Tensor


class Contrast(nn.Module):
    """Encoder, its average, the shared decoder, and embeddings that are compared with a queue."""

    def __init__(self, network: nn.Module, spec: PCRLSpec, config: PCRLConfig) -> None:
        super().__init__()
        self.spec, self.config = spec, config
        self.body = Body(network)
        # Copies, so that both begin alike.
        self.average = copy.deepcopy(self.body.encoder).requires_grad_(False)
        deepest, finest = self.body.encoder.output_channels[-1], self.body.encoder.output_channels[0]
        self.attention = TransAtt(spec.contexts.length, deepest)
        self.head = (nn.Conv3d if len(spec.patch) == 3 else nn.Conv2d)(finest, spec.channels, 1)
        self.embedding = Embedding(deepest, config.embedding, pooling=config.pooling, running_norm=config.running_norm)
        self.embedding_average = copy.deepcopy(self.embedding).requires_grad_(False)
        self.queue = KeyQueue(spec.queue, config.embedding)

    def pairs(self) -> Sequence[MomentumPair]:
        # The two norms have statistics of their own, which after_step keeps.
        return [
            MomentumPair(self.body.encoder, self.average, self.momentum),
            MomentumPair(self.embedding.layers, self.embedding_average.layers, self.momentum),
        ]

    def momentum(self, step: Step) -> float:
        """Constant; in short runs it rises to that from 0.99, as half a cosine."""
        last = self.config.momentum
        if step.total >= _SHORT_RUN or last <= _FIRST_MOMENTUM:
            return last
        return last - (last - _FIRST_MOMENTUM) * 0.5 * (1 + math.cos(math.pi * step.progress))

    @torch.no_grad()
    def averaged(self, images: Tensor) -> list[Tensor]:
        """Maps of the momentum encoder, without gradient."""
        return list(self.average(images))

    def gated(self, maps: Sequence[Tensor], code: Tensor) -> list[Tensor]:
        """The deepest map gated by TransAtt, the others untouched."""
        return [*maps[:-1], self.attention(maps[-1], code)]

    def restored(self, maps: Sequence[Tensor]) -> Tensor:
        """Decoder and head: (B, image channels, *patch)."""
        return self.head(self.body.decode(maps)[-1])

    def measured(self, name: str, errors: Tensor, target: Tensor, batch: Batch, counted: Tensor) -> Terms:
        """`explained_NAME` of errors (B,). The ordinary encoding's also by context: only where a target stays as it is can
        skips help."""
        terms = explained(name, errors, target, counted)
        if name == "ordinary":
            same = (target == batch["clean"][:, 0]).flatten(1).all(1)
            terms |= explained("as_it_is", errors, target, counted * same)
            terms |= explained("turned", errors, target, counted * ~same)
        return terms

    def usable(self, batch: Batch) -> Tensor:
        """The case of each sample, -1 where its key must not be used."""
        return batch["case"].where(batch["valid"].bool(), -1)

    def update(self, batch: Batch, terms: Terms, gather: Callable[[Tensor], Tensor]) -> None:
        """After a step: the keys enter the queue, the norms learn what is valid of this batch; equal on all processes."""
        cases = gather(self.usable(batch))
        self.queue.push(gather(terms["keys"]), cases)
        for embedding, name in ((self.embedding, "pooled"), (self.embedding_average, "pooled_average")):
            if embedding.norm is not None:
                embedding.norm.update(gather(terms[name])[cases >= 0])


class ThreeContexts(Contrast):
    """Mode `paper`."""

    def terms(self, batch: Batch, step: Step, graph: Graph) -> Terms:
        """`contrast` and `restore`, weights 1, and the parts of `restore`; metrics `told_apart`, `explained_…`,
        `similarity`, and `shown`: the share of samples that show enough to count. Without any only `shown` is told."""
        valid = batch["valid"]
        with torch.no_grad():
            averaged = self.averaged(batch["input"][:, 1])
            keys, pooled_average = self.embedding_average(averaged[-1])
        encoded = self.body.encoder(batch["input"][:, 0])
        maps = graph.cut(encoded)

        contrast, terms = self._contrast(batch, maps[-1], averaged[-1], keys)
        graph.add(contrast)
        errors = {}
        for context in self._contexts(batch, maps, averaged):
            each = squared_errors(self.restored(self.gated(context.maps(), context.code)), context.target)
            error = mean_over(each, valid)
            errors[context.name] = error.detach()
            terms |= self.measured(context.name, each, context.target, batch, valid)
            graph.add(error / (3 if self.config.momentum_reconstruction else 2))
            del each, error  # and with them the graph of this pass
        graph.close()
        return {
            "loss": graph.total,  # type: ignore[dict-item]
            "contrast": contrast.detach(),
            "restore": torch.stack(list(errors.values())).mean(),
            "shown": valid.mean(),
            **errors,
            **terms,
            "keys": keys,
            "pooled_average": pooled_average,
        }

    def _contrast(self, batch: Batch, deepest: Tensor, averaged: Tensor, keys: Tensor) -> tuple[Tensor, Terms]:
        config = self.config
        query, pooled = self.embedding(deepest)
        counted = self.queue.counted(batch["case"], mask_same_case=config.mask_same_case)

        def one(key: Tensor) -> Tensor:
            each = info_nce(query, key, self.queue.keys, counted, config.temperature)
            return mean_over(each, batch["valid"])

        contrast = one(keys)
        if config.hybrid_contrast:
            with torch.no_grad():
                hybrid, _ = self.embedding(mixed(deepest, averaged, batch["mix"][0]))
            contrast = 0.5 * (contrast + one(hybrid))
        with torch.no_grad():
            worse = (cosines(query, self.queue.keys) < (query * keys).sum(1, keepdim=True)) & counted
            share = torch.where(counted.any(1), worse.sum(1) / counted.sum(1).clamp(min=1), 0.5)
            terms = metric("told_apart", share, batch["valid"]) | mean_similarity(query, batch["valid"])
        return contrast, {**terms, "pooled": pooled}

    def _contexts(self, batch: Batch, maps: Sequence[Tensor], averaged: Sequence[Tensor]) -> Iterator[Context]:
        clean, codes, share = batch["clean"], batch["codes"], batch["mix"][0]
        apply = self.spec.contexts.apply
        yield Context("ordinary", lambda: list(maps), codes[:, 0], apply(clean[:, 0], codes[:, 0]))
        if self.config.momentum_reconstruction:
            yield Context("momentum", lambda: list(averaged), codes[:, 1], apply(clean[:, 1], codes[:, 1]))
        yield Context(
            "hybrid",
            lambda: [mixed(a, b, share) for a, b in zip(maps, averaged, strict=True)],
            codes[:, 2],
            apply(mixed(clean[:, 0], clean[:, 1], share), codes[:, 2]),
        )

    @torch.no_grad()
    def panels(self, batch: Batch, case: int) -> list[list[Panel]]:
        """A row for each context of one case: what the encoder saw, the target, the answer."""
        one = {key: value[case : case + 1] for key, value in batch.items()}
        share = float(one["mix"][0])
        maps, averaged = list(self.body.encoder(one["input"][:, 0])), self.averaged(one["input"][:, 1])
        seen = {
            "ordinary": ("ordinary encoder sees", one["input"][0, 0]),
            "momentum": ("momentum encoder sees", one["input"][0, 1]),
            "hybrid": (
                f"hybrid: {share:.0%} ordinary + {1 - share:.0%} momentum",
                mixed(one["input"][0, 0], one["input"][0, 1], one["mix"][0]),
            ),
        }
        rows = []
        for context in self._contexts(one, maps, averaged):
            answer = self.restored(self.gated(context.maps(), context.code))
            title, image = seen[context.name]
            name = self.spec.contexts.name(context.code[0].tolist())
            rows.append(
                [Panel(title, image), Panel(f"wanted: {name}", context.target[0]), Panel("restored", answer[0])]
            )
        return rows


def mixed(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """`share` of the first and the rest of the second."""
    return share.to(first.dtype) * first + (1 - share.to(first.dtype)) * second
