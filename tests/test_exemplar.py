"""Exemplar's views, mining and losses. Values: by hand (specification of the five tasks, §2.5 and §5)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from planners.errors import PlanError
from pretrain.encoders import build_segmentation_network, encoder_info
from pretrain.method import Step, Target
from pretrain.methods.exemplar import (
    Exemplar,
    ExemplarConfig,
    ExemplarSpec,
    case_number,
    found_among,
    infonce_terms,
    may_be_negative,
    semi_hard,
    told_apart,
    triplet_terms,
)
from pretrain.methods.exemplar_picture import draw_task
from pretrain.methods.exemplar_views import Changes, draw_matrix, draw_views, fit_window, look, room_of_views
from pretrain.turns import Turn, TurnableCrop, turns_of
from tests.tiny import Array, dataset_json, tiny_plan

STEP = Step("main", 0, 10, 0)
CROP = TurnableCrop(turns_of(3, (1, 2)), (1, 2), (4, 8, 8), (4, 8, 8))
PLAIN = Changes(mirror=0, turn=0, zoom=0, contrast=0)
ALL = Changes(mirror=1, turn=1, zoom=1, contrast=1)
SPEC = ExemplarSpec(CROP, (2.5, 1.1, 1.0), volumes=3, accumulate=1, changes=dataclasses.replace(ALL, turn=0.5))


def noise(*shape: int, seed: int = 0, name: str = "a") -> Array:
    return Array(np.random.default_rng(seed).normal(size=shape), name)


# Losses ---------------------------------------------------------------------------------------------------------------


def of_cosines(partner: float, negative: float) -> float:
    one = torch.ones(1, 1, dtype=torch.bool)
    return float(triplet_terms(torch.tensor([float(partner)]), torch.tensor([[float(negative)]]), one, 1.0)["loss"])


def test_the_loss_of_equal_embeddings_is_the_margin() -> None:
    z = functional.normalize(torch.randn(1, 16), dim=1).expand(8, -1)
    similarity = z @ z.T
    negative = may_be_negative(torch.arange(8) // 2, torch.arange(8) // 2)
    partner = similarity[torch.arange(8), torch.arange(8) ^ 1]
    assert float(triplet_terms(partner, similarity, negative, 1.0)["loss"]) == 1.0
    assert float(triplet_terms(partner, similarity, negative, 0.25)["loss"]) == 0.25


@pytest.mark.parametrize(
    ("partner", "negative", "loss"), [(1, 0, 0), (1, 0.5, 0), (0.9, 0.5, 0.2), (-1, 1, 5), (1, 0.75, 0.5)]
)
def test_triplets_cost_what_is_missing_to_the_margin(partner: float, negative: float, loss: float) -> None:
    assert of_cosines(partner, negative) == pytest.approx(loss, abs=1e-6)


def test_the_loss_is_that_of_squared_distances() -> None:
    torch.manual_seed(0)
    anchor, partner, other = functional.normalize(torch.randn(3, 5, 16), dim=-1)
    expected = (((anchor - partner) ** 2).sum(1) - ((anchor - other) ** 2).sum(1) + 1).clamp(min=0).mean()
    only = torch.eye(5, dtype=torch.bool)
    terms = triplet_terms((anchor * partner).sum(1), anchor @ other.T, only, 1.0)
    assert float(terms["loss"]) == pytest.approx(float(expected), abs=1e-6)


def test_the_loss_does_not_change_when_all_embeddings_turn_together() -> None:
    torch.manual_seed(0)
    z = functional.normalize(torch.randn(8, 16), dim=1)
    basis = torch.linalg.qr(torch.randn(16, 16))[0]
    negative = may_be_negative(torch.arange(8) // 2, torch.arange(8) // 2)
    partners = torch.arange(8), torch.arange(8) ^ 1
    losses = [
        float(triplet_terms((e @ e.T)[partners], e @ e.T, negative, 1.0)["loss"])
        for e in (z, functional.normalize(z @ basis))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(
    ("distances", "chosen"),
    [([0.1, 0.5, 0.9, 3.0], 0.5), ([0.1], 0.1), ([3.0], 3.0), ([3.0, 0.1], 0.1), ([0.2, 0.3], 0.3)],
)
def test_the_nearest_negative_beyond_the_partner_is_taken(distances: list[float], chosen: float) -> None:
    far = torch.tensor([distances])
    index = semi_hard(torch.tensor([0.2]), far, torch.ones_like(far, dtype=torch.bool), 1.0)
    assert float(far[0, index]) == pytest.approx(chosen)


def test_a_far_negative_costs_nothing() -> None:
    assert of_cosines(1 - 0.1, 1 - 1.5) == 0


def test_a_negative_is_never_of_the_own_case_nor_of_nobody() -> None:
    negative = may_be_negative(torch.tensor([3, 5, -1]), torch.tensor([3, 5, -1, 7]))
    assert negative.tolist() == [[False, True, False, True], [True, False, False, True], [False] * 4]
    far = torch.tensor([[0.3, 0.9]])
    assert int(semi_hard(torch.tensor([0.2]), far, torch.tensor([[False, True]]), 1.0)) == 1


def test_anchors_without_a_negative_do_not_count() -> None:
    partner, similarity = torch.tensor([0.5, 0.9]), torch.tensor([[0.5, 0.2], [0.8, 0.7]])
    negative = torch.tensor([[False, False], [True, True]])
    both, one = (triplet_terms(partner[i:], similarity[i:], negative[i:], 1.0)["loss"] for i in (0, 1))
    assert float(both) == float(one)
    for terms in (triplet_terms, infonce_terms):
        assert float(terms(partner[:1], similarity[:1], negative[:1], 1.0)["loss"]) == 0


def test_infonce_of_equal_scores_is_the_logarithm_of_the_candidates() -> None:
    similarity, negative = torch.full((2, 7), 0.3), torch.ones(2, 7, dtype=torch.bool)
    loss = infonce_terms(torch.full((2,), 0.3), similarity, negative, 0.1)["loss"]
    assert float(loss) == pytest.approx(math.log(8), abs=1e-6)
    negative[:, 3:] = False
    assert float(infonce_terms(torch.full((2,), 0.3), similarity, negative, 0.1)["loss"]) == pytest.approx(math.log(4))
    sure = infonce_terms(torch.ones(2), torch.zeros(2, 17), torch.ones(2, 17, dtype=torch.bool), 0.1)["loss"]
    assert float(sure) == pytest.approx(math.log(1 + 17 * math.exp(-10)), rel=1e-3)


def test_the_partner_is_looked_for_among_as_many_scans_as_chance_says() -> None:
    torch.manual_seed(0)
    z = functional.normalize(torch.randn(3000, 40), dim=1)
    negative = torch.ones(2999, 12, dtype=torch.bool)
    found = found_among((z[:-1] * z[1:]).sum(1), z[:-1] @ torch.randn(40, 12) / 6.3, negative, 3)
    assert float(found["acc"]) == pytest.approx(0.25, abs=0.04)


def test_anchors_with_fewer_scans_than_chance_says_do_not_count() -> None:
    negative = torch.tensor([[True, True, False], [True, True, True]])
    partner, similarity = torch.tensor([1.0, 0.0]), torch.full((2, 3), 0.5)
    assert float(found_among(partner, similarity, negative, 3)["acc"]) == 0
    assert float(found_among(partner, similarity, negative, 2)["acc"]) == 0.5
    assert found_among(partner[:1], similarity[:1], negative[:1], 3) == {}


def test_the_share_of_less_alike_negatives_is_a_mean_over_anchors() -> None:
    similarity = torch.tensor([[0.1, 0.5, 0.9, 0.2], [0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]])
    negative = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])
    partner = torch.tensor([0.6, 0.1, 0.9])
    assert float(told_apart(partner, similarity, negative)["told_apart"]) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert told_apart(partner[2:], similarity[2:], negative[2:]) == {}


# The module -----------------------------------------------------------------------------------------------------------


def model(**settings: object) -> Exemplar:
    torch.manual_seed(0)
    network = build_segmentation_network(tiny_plan(), "3d_fullres", dataset_json())
    return Exemplar(network, SPEC, ExemplarConfig(**{"hidden": 16, "embedding": 8, "queue": 10, **settings}))  # type: ignore[arg-type]


def batch(names: str = "abc", seed: int = 0) -> dict[str, torch.Tensor]:
    scans = [noise(1, 13, 27, 22, seed=seed + ord(name), name=name) for name in names]
    rng = np.random.default_rng(seed)
    return Exemplar.collate([Exemplar.sample(SPEC, scan, case_number(scan.info.id), rng) for scan in scans])  # type: ignore[arg-type]


def test_the_queue_is_written_after_steps_over_the_oldest() -> None:
    exemplar = model()
    for seed in range(3):
        one = batch(seed=seed)
        terms = exemplar.loss(one, STEP)
        before = exemplar.queue.clone()
        with torch.no_grad():
            exemplar.after_step(one, terms, STEP)
        place = [(6 * seed + i) % 10 for i in range(6)]
        kept = [i for i in range(10) if i not in place]
        assert torch.equal(exemplar.queue[kept], before[kept])
        assert torch.equal(exemplar.queue[place], terms["embeddings"].transpose(0, 1).flatten(0, 1))
        assert exemplar.queue_cases[place].tolist() == 2 * [case_number(name) for name in "abc"]
    assert not exemplar.queue.requires_grad


def test_the_queue_stands_in_where_a_batch_has_no_negative() -> None:
    exemplar = model().eval()
    alone = batch("a")
    assert float(exemplar.loss(alone, STEP)["loss"]) == 0
    with torch.no_grad():
        exemplar.after_step(alone, exemplar.loss(alone, STEP), STEP)
        assert float(exemplar.loss(alone, STEP)["loss"]) == 0  # its own views in the queue are no negatives
        others = batch("bc")
        without = exemplar.loss(batch("abc"), STEP)
        exemplar.after_step(others, exemplar.loss(others, STEP), STEP)
    assert float(exemplar.loss(alone, STEP)["loss"]) > 0
    assert float(exemplar.loss(batch("abc"), STEP)["loss"]) == float(without["loss"])


def test_a_batch_without_a_negative_says_nothing_but_that() -> None:
    for loss in ("triplet", "infonce"):
        exemplar = model(loss=loss)
        terms = exemplar.loss(batch("a"), STEP)
        assert {name: float(value) for name, value in terms.items() if value.ndim == 0} == {"loss": 0, "shown": 0}
        terms["loss"].backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in exemplar.parameters())
    assert exemplar.diagnose({"shown": 0.0}, Step("main", 100, 200, 100)) is None


def test_scans_with_nothing_to_see_are_not_shown() -> None:
    some = batch("abc")
    some["case"][1] = -1
    assert float(model().loss(some, STEP)["shown"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("number", [1, 3])
def test_knowing_nothing_is_not_above_chance_when_few_scans_are_held_out(number: int) -> None:
    """The queue is full of views that other weights embedded, which are less alike than any two of the batch. Four views of
    two other scans are not the four scans that `acc` asks for."""
    exemplar = model(queue=64).eval()
    exemplar.spec = dataclasses.replace(SPEC, volumes=5)
    exemplar.queue.copy_(functional.normalize(torch.randn(exemplar.queue.shape), dim=1))
    exemplar.queue_cases.copy_(torch.arange(100, 164))
    rows = []
    for _ in range(60):
        # Without any anatomy the partner is like the others.
        few = {"views": torch.randn(number, 2, 1, 4, 8, 8), "case": torch.arange(number)}
        rows.append({name: float(value) for name, value in exemplar.loss(few, STEP).items() if value.ndim == 0})
    measured = [name for name in exemplar.chance() if name in rows[0]]
    assert measured == ([] if number == 1 else ["told_apart"])
    for name in measured:
        assert np.mean([row[name] for row in rows]) == pytest.approx(exemplar.chance()[name], abs=0.1)


def with_embeddings(z: torch.Tensor, **settings: object) -> dict[str, torch.Tensor]:
    """Terms of a batch whose views are embedded as z (3, 2, 8)."""
    exemplar = model(**settings)
    exemplar.embed = lambda views: z  # type: ignore[method-assign]
    return exemplar.loss({"views": z, "case": torch.arange(3)}, STEP)


PAIRS = torch.eye(8)[:3, None].expand(3, 2, 8)
"""Both views of a scan alike, and unlike those of others."""


def test_the_partner_is_the_other_view_of_the_scan() -> None:
    terms = with_embeddings(PAIRS)
    assert {name: float(terms[name]) for name in ("loss", "active", "acc", "told_apart", "shown")} == {
        "loss": 0,
        "active": 0,
        "acc": 1,
        "told_apart": 1,
        "shown": 1,
    }
    crossed = torch.stack([PAIRS[:, 0], PAIRS[[1, 2, 0], 1]], 1)
    terms = with_embeddings(crossed)
    assert {name: float(terms[name]) for name in ("loss", "active", "acc")} == {"loss": 3, "active": 1, "acc": 0}


def test_the_loss_is_the_one_that_was_chosen() -> None:
    assert float(with_embeddings(PAIRS, loss="triplet", margin=2.5)["loss"]) == pytest.approx(0.5)
    infonce = float(with_embeddings(PAIRS, loss="infonce", temperature=0.5)["loss"])
    assert infonce == pytest.approx(math.log(1 + 4 * math.exp(-2)), rel=1e-5)


def test_views_are_described_by_unit_vectors() -> None:
    views = batch("abc")["views"]
    embedded = model().embed(views)
    assert embedded.shape == (3, 2, 8)
    assert torch.allclose(embedded.norm(dim=-1), torch.ones(3, 2), atol=1e-5)


def test_negatives_come_from_all_processes() -> None:
    """With views gathered, the loss is that of the joint batch."""
    exemplar = model().eval()
    joint, first = batch("abcd"), batch("ab")
    expected = float(exemplar.loss(joint, STEP)["loss"])
    rest = exemplar.embed(joint["views"][2:])
    exemplar.gather = lambda t: torch.cat([t, joint["case"][2:] if t.ndim == 1 else rest])
    first = {key: value[:2] for key, value in joint.items()}
    assert float(exemplar.loss(first, STEP)["loss"]) == pytest.approx(expected, abs=1e-5)
    assert len(exemplar.loss(first, STEP)["cases"]) == 4


def test_scans_with_nothing_to_see_are_nobody() -> None:
    one = Exemplar.sample(SPEC, Array(np.ones((1, 13, 27, 22))), 5, np.random.default_rng(0))  # type: ignore[arg-type]
    assert int(one["case"]) == -1
    thin = Exemplar.sample(SPEC, noise(1, 1, 27, 22), 5, np.random.default_rng(0))  # type: ignore[arg-type]
    assert int(thin["case"]) == -1
    assert int(Exemplar.sample(SPEC, noise(1, 13, 27, 22), 5, np.random.default_rng(0))["case"]) == 5  # type: ignore[arg-type]


def test_a_batch_holds_different_cases() -> None:
    pool = [noise(1, 4, 4, 4, name=name).info for name in "abcd"]
    for seed in range(50):
        drawn = Exemplar.draw(SPEC, pool, np.random.default_rng(seed), STEP)
        assert len({case for case, _ in drawn}) == len({number for _, number in drawn}) == 3
    assert len(Exemplar.draw(SPEC, pool[:1], np.random.default_rng(0), STEP)) == 1


def test_one_scan_is_refused_and_a_small_batch_made_up_for() -> None:
    target = Target(tiny_plan(), "3d_fullres", encoder_info(tiny_plan(), "3d_fullres", dataset_json()))
    pool = [noise(1, 13, 27, 22, name=name).info for name in "abcde"]
    with pytest.raises(PlanError, match="only one") as error:
        Exemplar.plan(target, pool[:1], ExemplarConfig())
    assert "--images" in str(error.value)
    assert "three in all" in str(error.value)
    spec = Exemplar.plan(target, pool, ExemplarConfig())
    assert (spec.volumes, spec.accumulate) == (2, 2)
    assert Exemplar.plan(target, pool, ExemplarConfig(volumes=8)).volumes == 5


def test_embeddings_that_are_all_alike_are_reported() -> None:
    exemplar, late = model(), Step("main", 100, 200, 100)
    assert "all views alike" in str(exemplar.diagnose({"spread": 0.001}, late))
    assert exemplar.diagnose({"spread": 0.1}, late) is None
    assert exemplar.diagnose({"spread": 0.001}, Step("main", 5, 200, 5)) is None


def matrix_title(usable: str) -> str:
    """Title of the matrix for scans of which `usable` (`+` or `-`) say whether they show something; only the first is found."""
    cases = torch.tensor([i if sign == "+" else -1 for i, sign in enumerate(usable)])
    first, rest = torch.eye(8)[:1], torch.eye(8)[[7]].expand(len(usable) - 1, 8)
    z = torch.stack([torch.cat([first, first.expand(len(usable) - 1, 8)]), torch.cat([first, rest])], 1)
    figure = draw_task(SPEC, {"views": torch.rand(len(usable), 2, 1, 4, 8, 8), "case": cases}, z)
    return next(text for axis in figure.axes if (text := axis.get_title()).startswith("likeness"))


def test_the_picture_counts_what_shows_something() -> None:
    assert "50% on the diagonal" in matrix_title("++")
    assert "50% on the diagonal" in matrix_title("++--")
    assert "nothing to compare" in matrix_title("+-")
    assert "nothing to compare" in matrix_title("--")


# Views ----------------------------------------------------------------------------------------------------------------


def test_a_plain_view_is_the_crop_itself() -> None:
    volume = Array(np.indices((9, 15, 13)).astype(float))
    views, usable = draw_views(CROP, PLAIN, volume, 2, np.random.default_rng(0))  # type: ignore[arg-type]
    start = views[0, :, 0, 0, 0].round().astype(int)
    box = (slice(None), *(slice(s, s + c) for s, c in zip(start, CROP.cut, strict=True)))
    assert usable
    assert np.allclose(views[0], volume.voxels[box], atol=1e-5)
    assert np.array_equal(views[0], views[1])


FLAT = TurnableCrop(turns_of(2, (0, 1)), (0, 1), (8, 8), (8, 8))
ENLARGED = TurnableCrop(turns_of(3, (1, 2)), (1, 2), (3, 5, 5), (4, 8, 8))
ANISOTROPIC = TurnableCrop(turns_of(3, (1, 2)), (1, 2), (2, 12, 12), (2, 12, 12))
KINDS = [
    *[pytest.param(CROP, shape, (1.0, 1.0, 1.0), id=f"scan {shape}") for shape in
      [(9, 15, 13), (4, 8, 8), (3, 20, 6), (40, 40, 40)]],
    pytest.param(FLAT, (20, 17), (1.0, 1.0), id="2D"),
    pytest.param(ENLARGED, (6, 11, 9), (1.0, 1.0, 1.0), id="enlarged"),
    pytest.param(ANISOTROPIC, (7, 24, 30), (5.0, 0.8, 1.0), id="anisotropic"),
]  # fmt: skip
every_kind = pytest.mark.parametrize(("crop", "shape", "spacing"), KINDS)


def coordinate_views(
    crop: TurnableCrop, shape: tuple[int, ...], spacing: tuple[float, ...], seed: int, changes: Changes = ALL
) -> np.ndarray:
    """Two views (2, axes, *size) of a scan whose channels are the coordinates of its voxels; contrast as it is."""
    volume = Array(np.indices(shape).astype(float), spacing=spacing)
    changes = dataclasses.replace(changes, contrast=0)
    return draw_views(crop, changes, volume, 2, np.random.default_rng(seed))[0]  # type: ignore[arg-type]


@every_kind
def test_no_view_has_an_empty_corner(crop: TurnableCrop, shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    """On a volume whose value is its coordinate, a view that left the scan would have a kink."""
    for seed in range(40):
        views = coordinate_views(crop, shape, spacing, seed)
        for axis in range(2, views.ndim):
            assert np.abs(np.diff(views, n=2, axis=axis)).max(initial=0) < 1e-3
        assert views.min() > -1e-4
        assert all(views[:, a].max() < n - 1 + 1e-4 for a, n in enumerate(shape))


@every_kind
def test_both_views_are_of_the_same_place(
    crop: TurnableCrop, shape: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    """No change moves the middle of a view."""
    middles = []
    for seed in range(20):
        views = coordinate_views(crop, shape, spacing, seed)
        first, second = views.mean(tuple(range(2, views.ndim)))
        assert np.allclose(first, second, atol=1e-3)
        middles.append(first)
    if shape == (40, 40, 40):
        assert np.ptp(middles, axis=0).min() > 10


@every_kind
def test_views_have_the_size_the_network_sees(
    crop: TurnableCrop, shape: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    for seed in range(10):
        views, usable = draw_views(crop, ALL, noise(2, *shape), 2, np.random.default_rng(seed))  # type: ignore[arg-type]
        assert views.shape == (2, 2, *crop.size)
        assert np.isfinite(views).all()
        assert usable


def test_an_enlarged_view_shows_as_much_as_was_cut() -> None:
    views = coordinate_views(ENLARGED, (9, 15, 15), (1.0, 1.0, 1.0), 0, PLAIN)
    steps = [np.diff(views[0, axis], axis=axis) for axis in range(3)]
    for step, cut, size in zip(steps, ENLARGED.cut, ENLARGED.size, strict=True):
        assert np.allclose(step, cut / size, atol=1e-5)


def test_in_2d_a_slice_of_a_scan_is_viewed() -> None:
    spec = dataclasses.replace(SPEC, crop=FLAT, spacing=(1.0, 1.0))
    one = Exemplar.sample(spec, noise(2, 5, 20, 17), 7, np.random.default_rng(0))  # type: ignore[arg-type]
    assert one["views"].shape == (2, 2, 8, 8)
    assert int(one["case"]) == 7


def test_views_are_mirrored_on_each_axis() -> None:
    plain, changed = (
        coordinate_views(CROP, (9, 15, 13), (1.0, 1.0, 1.0), 0, dataclasses.replace(PLAIN, mirror=mirror))
        for mirror in (0, 1)
    )
    assert np.allclose(changed, np.flip(plain, (2, 3, 4)), atol=1e-5)
    assert not np.allclose(changed, plain)


def test_views_are_turned_by_quarters() -> None:
    plain, changed = (
        coordinate_views(
            dataclasses.replace(CROP, turns=(Turn((1, 2), quarters),)),
            (9, 15, 13),
            (1.0, 1.0, 1.0),
            0,
            dataclasses.replace(PLAIN, turn=1),
        )
        for quarters in (0, 1)
    )
    assert np.allclose(changed, np.rot90(plain, 1, (3, 4)), atol=1e-5)
    assert not np.allclose(changed, plain)


def test_both_views_of_a_place_get_any_turn() -> None:
    pairs = set()
    for seed in range(200):
        views = coordinate_views(CROP, (9, 15, 15), (1.0, 1.0, 1.0), seed, dataclasses.replace(PLAIN, turn=1))
        # How the coordinates rise along the axes of a view tells the turn; a tilt of 15 degrees is rounded away.
        rises = np.stack([np.diff(views, axis=axis).mean((2, 3, 4)) for axis in (2, 3, 4)], -1).round()
        pairs.add(tuple((rise + 0.0).tobytes() for rise in rises))
    assert len(pairs) == len(CROP.turns) ** 2


@pytest.mark.parametrize(
    ("change", "turns"),
    [
        ("mirror", CROP.turns),
        ("turn", CROP.turns[:1]),  # only tilted
        ("turn", CROP.turns),
        ("zoom", CROP.turns),
        ("contrast", CROP.turns),
    ],
)
def test_each_view_is_changed_in_its_own_way(change: str, turns: tuple[Turn, ...]) -> None:
    crop = dataclasses.replace(CROP, turns=turns)
    changes = dataclasses.replace(PLAIN, **{change: 0.5 if change == "mirror" else 1.0})
    different = [
        not np.allclose(*draw_views(crop, changes, noise(1, 9, 17, 17), 2, np.random.default_rng(seed))[0])  # type: ignore[arg-type]
        for seed in range(20)
    ]
    assert sum(different) > 10


def test_a_scan_with_room_is_not_zoomed_for_it() -> None:
    room = [math.ceil(c * r) + 1 for c, r in zip(CROP.cut, room_of_views(3), strict=True)]
    rng = np.random.default_rng(0)
    for _ in range(200):
        matrix = draw_matrix((2.0, 1.0, 1.0), ALL, True, rng)
        (fitted,), window = fit_window([matrix], CROP, room)
        assert np.allclose(fitted, matrix)
        assert all(w <= r for w, r in zip(window, room, strict=True))
    assert room_of_views(2) == pytest.approx((1.531, 1.531), abs=1e-3)


def test_views_tilt_in_mm_and_zoom_within_bounds() -> None:
    rng = np.random.default_rng(0)
    mm = np.diag([3.0, 0.5, 1.0])
    angles, zooms = [], []
    for _ in range(500):
        matrix = mm @ draw_matrix((3.0, 0.5, 1.0), ALL, True, rng) @ np.linalg.inv(mm)
        zoom = 1 / matrix[0, 0]
        turn = matrix[1:, 1:] * zoom
        assert np.allclose(turn @ turn.T, np.eye(2), atol=1e-9)
        angles.append(math.degrees(math.asin(turn[1, 0])))
        zooms.append(zoom)
    assert (min(angles), max(angles)) == (pytest.approx(-15, abs=0.3), pytest.approx(15, abs=0.3))
    assert (min(zooms), max(zooms)) == (pytest.approx(0.8, abs=0.01), pytest.approx(1.2, abs=0.01))


def test_looking_follows_the_matrix() -> None:
    window = np.indices((5, 7)).astype(float)
    view = look(window, np.eye(2) / 2, (4, 6))
    assert np.allclose(view[1, 0], 3 + (np.arange(6) - 2.5) / 2)
    assert np.allclose(view[0, :, 0], 2 + (np.arange(4) - 1.5) / 2)


def test_contrast_and_brightness_change_within_bounds() -> None:
    volume = noise(2, 4, 8, 8)
    factors, shifts = [], []
    for seed in range(200):
        view = draw_views(CROP, dataclasses.replace(PLAIN, contrast=1), volume, 1, np.random.default_rng(seed))[0][0]  # type: ignore[arg-type]
        for changed, plain in zip(view, volume.voxels, strict=True):
            factors.append(changed.std() / plain.std())
            shifts.append((changed.mean() - plain.mean()) / np.ptp(plain))
    assert 0.49 < min(factors) < 0.55 < 1.45 < max(factors) < 1.51
    assert -0.126 < min(shifts) < -0.1 < 0.1 < max(shifts) < 0.126
