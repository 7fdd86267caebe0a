"""The encoder is described without building it, and is the one the trainer trains."""

import pytest
import torch

from planners.errors import PlanError
from pretrain.encoders import build_segmentation_network, encoder_info, encoder_of
from tests.tiny import dataset_json, tiny_plan


@pytest.mark.parametrize("dims", [2, 3])
def test_the_description_agrees_with_the_skips(dims):
    configuration = "3d_fullres" if dims == 3 else "2d"
    plan = tiny_plan(dims=dims, channels=2)
    info = encoder_info(plan, configuration, dataset_json(2))
    encoder = encoder_of(build_segmentation_network(plan, configuration, dataset_json(2)))
    size = (8, 24, 20)[3 - dims :]
    skips = encoder(torch.zeros(1, info.channels, *size))
    assert (info.channels, info.spatial_dims) == (2, dims)
    assert tuple(skip.shape[1] for skip in skips) == info.features == (8, 16, 32)
    assert tuple(size[a] // skips[-1].shape[2 + a] for a in range(dims)) == info.total_stride
    assert info.total_stride == (2, 4, 4)[3 - dims :]


def test_a_network_without_an_encoder_is_named():
    with pytest.raises(PlanError, match=r"found\s+Linear\n\s+expected\s+a network with .*\n\s+to fix\s+choose"):
        encoder_of(torch.nn.Linear(2, 2))
