"""What stands on top of an encoder."""

from __future__ import annotations

import torch
from torch import nn

from pretrain.heads import classifier, last_stage, pooled_stages


class Encoder(nn.Module):
    """Two stages whose values are known."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [torch.cat([x, -x], 1), 10 * x[..., ::2]]


def test_the_vector_of_an_image_is_the_mean_of_the_last_stage() -> None:
    for space in ((4, 6), (2, 4, 6)):
        images = torch.randn(3, 1, *space, generator=torch.Generator().manual_seed(0))
        found = last_stage(Encoder(), images)
        assert found.shape == (3, 1)
        assert torch.allclose(found, 10 * images[..., ::2].flatten(1).mean(1, keepdim=True))
        assert torch.equal(pooled_stages(Encoder(), images)[:, 2:], found)


def test_a_classifier_drops_features_only_while_learning() -> None:
    head = classifier(4, 64, 5, 0.5)
    features = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert head(features).shape == (2, 5)
    assert not torch.equal(head(features), head(features))
    head.eval()
    assert torch.equal(head(features), head(features))
