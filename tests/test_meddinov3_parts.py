"""MedDINOv3's masks, head, losses and monitors. Values: by hand and from the reference code (meddinov3.md 6.1 and 6.2)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.methods.meddinov3.heads import Head
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
from pretrain.methods.meddinov3.masks import _add_block, block_mask, masked_counts
from pretrain.methods.meddinov3.monitors import rank_me, spread, target_entropy, usage_entropy
from tests.gathering import two_threads


def itself(tensor: Tensor) -> Tensor:
    return tensor


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sinkhorn(logits: Tensor, temperature: float, gather: Any, **options: int) -> Tensor:
    """The targets of logits that are all there."""
    return targets_of(logits, sinkhorn_shift([logits], temperature, gather, **options), temperature)


COUNTS = [24, 29, 34, 39, 44, 49, 53, 58, 63, 68, 73, 78, 83, 88, 93, 98]


def counts_and_masks(seed: int = 0) -> tuple[list[int], Tensor]:
    """Of 32 crops with 14 × 14 patches."""
    rng = np.random.default_rng(seed)
    counts = masked_counts(32, 196, rng)
    return counts, torch.from_numpy(np.stack([block_mask((14, 14), count, rng) for count in counts])).flatten(1)


def test_half_of_the_crops_have_the_published_numbers_of_masks():
    """6.1 (7), from the reference code."""
    counts, masked = counts_and_masks()
    assert sorted(counts) == [0] * 16 + COUNTS
    assert counts != masked_counts(32, 196, np.random.default_rng(1))
    assert masked.sum(1).tolist() == counts
    assert (int(masked.sum()), float(masked_weights(masked).sum())) == (974, pytest.approx(16))


@pytest.mark.parametrize("seed", range(3))
def test_masks_come_in_blocks(seed):
    """6.1 (7): most masked patches have a masked neighbour above, below or beside them."""
    rng = np.random.default_rng(seed)
    touching = total = 0
    for _ in range(20):
        padded = np.pad(block_mask((14, 14), 58, rng), 1)
        inner = padded[1:-1, 1:-1]
        beside = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
        touching, total = touching + int((inner & beside).sum()), total + int(inner.sum())
    # Single patches at random have one with 1 - 0.7^4, about 0.75.
    assert touching / total > 0.95


def test_blocks_are_of_all_shapes():
    """6.1 (7): sides in a ratio of 0.3 to 1/0.3, as often flat as tall, seldom square."""
    rng, ratios = np.random.default_rng(0), []
    while len(ratios) < 300:
        mask = np.zeros((40, 40), bool)
        if _add_block(mask, 400, 400, rng):
            height, width = (int(mask.any(axis).sum()) for axis in (1, 0))
            ratios.append(math.log(height / width) / math.log(1 / 0.3))
    assert -1.2 < min(ratios) < -0.8 and 0.8 < max(ratios) < 1.2  # sides are rounded
    assert abs(np.mean(ratios)) < 0.1
    assert np.std(ratios) == pytest.approx(1 / math.sqrt(3), rel=0.1)  # uniform between -1 and 1


@pytest.mark.parametrize(("grid", "count"), [((2, 2), 2), ((1, 9), 4), ((7, 7), 0), ((4, 6), 24), ((3, 20), 1)])
def test_counts_are_exact_where_no_block_fits(grid, count):
    assert block_mask(grid, count, np.random.default_rng(1)).sum() == count


def test_targets_sum_to_one_and_prototypes_become_equally_used():
    """6.1 (1): 512 samples for 64 prototypes are 8 for each after 50 iterations; after 3 they need not be."""
    few = sinkhorn(noise(8, 64), 0.07, itself)
    assert torch.allclose(few.sum(1), torch.ones(8), atol=1e-6)
    masses = sinkhorn(noise(512, 64), 0.07, itself, iterations=50).sum(0)
    assert float((masses - 8).abs().max()) < 0.2
    assert float((sinkhorn(noise(512, 64), 0.07, itself).sum(0) - 8).abs().max()) > 0.2


def test_targets_are_those_of_the_published_iteration():
    """meddinov3.md 1.5, which divides the exponentials themselves."""
    logits = noise(6, 10).double()
    q = (logits / 0.07).exp().T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True)
        q /= len(q)
        q /= q.sum(0, keepdim=True)
        q /= q.shape[1]
    assert torch.allclose(sinkhorn(logits, 0.07, itself).double(), (q * q.shape[1]).T, atol=1e-5)


def test_targets_stay_finite_where_exponentials_do_not():
    logits = torch.tensor([[300.0, 0, -300], [0, 300, -300]])
    assert sinkhorn(logits, 0.04, itself).isfinite().all()
    assert sinkhorn(logits.half(), 0.04, itself).dtype == torch.float32


def test_targets_do_not_depend_on_the_samples_at_a_time():
    logits = noise(7, 10)
    shift = sinkhorn_shift([logits], 0.07, itself)
    assert torch.allclose(sinkhorn_shift(logits.split(3), 0.07, itself), shift, atol=1e-6)
    assert float(shift.std()) > 0.05


@pytest.mark.parametrize("first", [3, 2], ids=["equal", "unequal"])
def test_two_processes_have_the_targets_of_the_joint_batch(first):
    """6.1 (16), with threads for processes; what joins real ones is tested with the contract."""
    logits = noise(6, 10)
    logits[3:, 0] += 3  # the halves favour other prototypes
    parts = two_threads(lambda part, gather: sinkhorn(part, 0.07, gather), logits.split([first, 6 - first]))
    expected = sinkhorn(logits, 0.07, itself)
    assert torch.allclose(torch.cat(parts), expected, atol=1e-6)
    assert not torch.allclose(sinkhorn(logits[:first], 0.07, itself), expected[:first], atol=1e-2)


def test_a_centre_makes_a_favoured_prototype_as_likely_as_the_others():
    logits = noise(4, 5) * 0 + torch.tensor([0.0, 0, 9, 0, 0])
    total, centre = torch.cat([logits.sum(0), torch.tensor([4.0])]), torch.zeros(5)
    for _ in range(100):
        centre = moved_centre(centre, total, itself)
    assert torch.allclose(centre, logits[0], atol=1e-3)
    assert torch.allclose(targets_of(logits, centre, 0.07), torch.full((4, 5), 0.2), atol=1e-2)
    assert float(moved_centre(torch.zeros(5), total, itself)[2]) == pytest.approx(0.9)
    assert torch.equal(moved_centre(centre, 0 * total, itself), centre)


@pytest.mark.parametrize("same_crops", [False, True])
def test_without_an_opinion_the_dino_loss_is_the_logarithm_of_the_prototypes(same_crops):
    """6.1 (2)."""
    loss = dino_loss(torch.zeros(2, 3, 64), torch.full((2, 3, 64), 1 / 64), same_crops=same_crops)
    assert float(loss) == pytest.approx(4.15888, abs=1e-5)


def test_a_certain_and_right_student_has_no_dino_loss():
    """6.1 (2): one logit 10 and the others 0, which the temperature makes 100."""
    certain = torch.eye(64)[:3][None]
    assert float(dino_loss(10 * certain, certain)) < 1e-6


def test_a_crop_is_not_compared_with_itself():
    """6.1 (3): each agrees with itself and contradicts the other; a contradiction costs 10 / 0.1 = 100."""
    opinions = torch.eye(2)[:, None].repeat(1, 3, 1)
    assert float(dino_loss(10 * opinions, opinions, same_crops=True)) == pytest.approx(100, rel=1e-5)
    assert float(dino_loss(10 * opinions, opinions)) == pytest.approx(50, rel=1e-5)


def test_pairs_of_crops_weigh_alike():
    assert pair_shares(2, 8) == (pytest.approx(2 / 18), pytest.approx(16 / 18))


def test_the_ibot_loss_is_over_all_crops_and_each_masked_crop_weighs_alike():
    """6.1 (8): cross-entropies of 1 with half of the crops masked are 0.5 whatever the counts; patches seen learn nothing."""
    _, masked = counts_and_masks()
    tokens = noise(32, 196, 4).requires_grad_()
    rows = tokens[masked]
    targets = torch.full((len(rows), 4), 0.25)
    loss = ibot_loss(rows, lambda x: 0 * x, targets, itself, masked_weights(masked), 32, rows=2048)
    assert float(loss) / math.log(4) == pytest.approx(0.5)
    ibot_loss(rows, itself, targets, itself, masked_weights(masked), 32, rows=2048).backward()
    assert (tokens.grad[masked] != 0).any(1).all()
    assert not tokens.grad[~masked].any()


def test_the_ibot_loss_and_its_gradients_do_not_depend_on_the_rows_at_a_time():
    features, targets, weights = noise(11, 6), noise(11, 9, seed=1).softmax(1), noise(11, seed=2).abs()
    results, widths = [], []
    for rows in (4, 100):
        torch.manual_seed(0)
        head = Head(6, 9, hidden=8, bottleneck=5)
        head.register_forward_hook(lambda _, __, out: widths.append(len(out)))
        given = features.clone().requires_grad_()
        loss = ibot_loss(given, head, targets, itself, weights, 3, rows=rows)
        loss.backward()
        results.append([loss.detach(), given.grad, *(p.grad for p in head.parameters())])
    assert widths == [4, 4, 3, 3, 4, 4, 11, 11]  # each made again, the last first
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_without_masks_the_ibot_loss_is_0_and_has_a_gradient():
    features = noise(0, 6).requires_grad_()
    loss = ibot_loss(
        features, Head(6, 9, hidden=8, bottleneck=5), torch.empty(0, 9), itself, torch.empty(0), 4, rows=2048
    )
    loss.backward()
    assert float(loss) == 0


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (torch.eye(4), -0.34657),
        (torch.tensor([[1.0, 0], [-1, 0]]), -0.69315),
        (torch.tensor([[math.cos(a), math.sin(a)] for a in (0, 0.1, math.pi, math.pi + 0.1)]), 2.30300),
        (torch.tensor([[1.0, 2, 3]] * 3), 17.416),
    ],
    ids=["orthonormal", "antipodal", "close pairs", "identical"],
)
def test_koleo_is_the_distance_to_the_nearest_other(points, expected):
    """6.1 (4); the reference code takes a lone antipodal point for its own neighbour and finds 8.42."""
    points = (3 * points).requires_grad_()
    loss = koleo(points)
    loss.backward()
    assert float(loss) == pytest.approx(expected, abs=1e-3)
    assert points.grad.isfinite().all()


def test_koleo_of_one_sample_is_0():
    assert float(koleo(noise(1, 8))) == 0


def every_loss() -> list[float]:
    p = noise(2, 4, 9, seed=3).softmax(-1)
    ibot = ibot_loss(p[0], itself, p[1], itself, torch.ones(4), 4, rows=2048)
    losses = [dino_loss(noise(2, 4, 9), p), ibot, koleo(noise(6, 8)), gram_loss(noise(2, 5, 3), noise(2, 5, 3, seed=1))]
    return [float(loss) for loss in losses]


def test_losses_are_in_single_precision_under_autocast():
    expected = every_loss()
    with torch.autocast("cpu", torch.bfloat16):
        assert every_loss() == pytest.approx(expected, rel=1e-6)


def test_the_gram_loss_sees_angles_between_patches_only():
    """6.1 (5)."""
    x = noise(2, 7, 5)
    turn, _ = torch.linalg.qr(noise(5, 5, seed=1))
    assert float(gram_loss(x @ turn, x)) < 1e-10
    assert float(gram_loss(3 * x, x)) < 1e-10
    student = torch.eye(2)[None].requires_grad_()
    anchor = torch.tensor([[[1.0, 0], [1, 0]]], requires_grad=True)
    loss = gram_loss(student, anchor)
    loss.backward()
    assert float(loss) == pytest.approx(0.5)
    assert anchor.grad is None
    assert student.grad.any()


def test_tokens_are_resized_in_their_grid():
    """6.1 (6): 32 × 32 to 16 × 16 keeps a constant, and a ramp in the interior, at the centres of 2 × 2 tokens."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    maps = torch.stack([torch.full_like(y, 7), y, x])
    tokens = maps.flatten(1).T[None].expand(2, -1, -1)
    found = resized_tokens(tokens, (32, 32), (16, 16))
    assert found.shape == (2, 256, 3)
    constant, rows, columns = found[1].T.unflatten(1, (16, 16))
    assert torch.equal(constant, torch.full((16, 16), 7.0))
    centres = torch.arange(16.0) * 2 + 0.5
    assert torch.allclose(rows[1:-1, 0], centres[1:-1], atol=1e-4)
    assert torch.allclose(columns[0, 1:-1], centres[1:-1], atol=1e-4)


def test_tokens_are_resized_by_cubic_interpolation_without_a_filter():
    """Halved, a token between two has 0.59375 of each and -0.09375 of the next ones: Keys' kernel, a = -0.75."""
    impulse = torch.zeros(1, 8, 1)
    impulse[0, 3] = 1
    found = resized_tokens(impulse.repeat(1, 2, 1), (2, 8), (2, 4))[0, :4, 0]
    assert found.tolist() == pytest.approx([0, 0.59375, -0.09375, 0])


def test_the_head_has_the_published_layers():
    """meddinov3.md 1.5: 6.3 M parameters and 16.8 M of the last layer, at base size."""
    with torch.device("meta"):
        head = Head(768, 65536)
    last = sum(p.numel() for p in head.last_layer.parameters())
    assert last / 1e6 == pytest.approx(16.8, abs=0.05)
    assert sum(p.numel() for p in head.mlp.parameters()) / 1e6 == pytest.approx(6.3, abs=0.05)
    assert [name for name, _ in head.named_parameters()] == [
        *(f"mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")),
        "last_layer.weight",
    ]


def test_scores_are_of_directions():
    head = Head(6, 9, hidden=8, bottleneck=5)
    with torch.no_grad():
        scores = head(noise(3, 2, 6))
        head.mlp[4].weight.mul_(7)  # longer vectors before the last layer; its bias is 0
        assert torch.allclose(head(noise(3, 2, 6)), scores, atol=1e-6)
        head.last_layer.weight.mul_(7)
        assert torch.allclose(head(noise(3, 2, 6)), 7 * scores, atol=1e-6)
    assert scores.shape == (3, 2, 9)


def test_entropies_tell_two_kinds_of_collapse():
    undecided, alike, good = torch.full((8, 8), 1 / 8), torch.eye(8)[:1].expand(8, -1), torch.eye(8)
    found = [[float(measure(p)) for p in (undecided, alike, good)] for measure in (target_entropy, usage_entropy)]
    assert found == [pytest.approx([1, 0, 0]), pytest.approx([1, 0, 1])]


def test_spread_is_1_for_directions_everywhere_and_0_for_one():
    assert float(spread(noise(4000, 16))) == pytest.approx(1, abs=0.02)
    assert float(spread(torch.ones(5, 16) * torch.arange(1, 6)[:, None])) == pytest.approx(0, abs=1e-3)


def test_rank_counts_the_directions_in_use():
    """RankMe of four equal singular values is 4, of one is 1."""
    assert float(rank_me(5 * torch.eye(9)[:4])) == pytest.approx(4, rel=1e-4)
    assert float(rank_me(torch.ones(6, 9))) == pytest.approx(1, rel=1e-4)
