"""What `--methods` means, and what the runs of an arm are called."""

import pytest

from autoseg.comparison.arms import encoder_run, parse_arms, scratch_of, training_run
from planners.errors import SettingsError


def names(text: str, usual: str = "3d_fullres") -> list[str]:
    return [arm.name for arm in parse_arms(text, usual)]


def test_arms_are_kept_in_order_and_once():
    assert names("voco, scratch,voco") == ["voco", "scratch"]


def test_scratch_is_an_arm_of_every_configuration_that_is_named():
    arms = parse_arms("voco,voco@2d", "3d_fullres")
    assert [arm.name for arm in arms] == ["scratch", "voco", "scratch@2d", "voco@2d"]
    assert [scratch_of(arm, arms).name for arm in arms] == ["scratch", "scratch", "scratch@2d", "scratch@2d"]


def test_a_method_with_a_network_of_its_own_brings_its_configuration_and_scratch():
    assert names("voco,pumit,pumit[size=b]") == [
        "scratch", "voco", "scratch@3d_fullres_sac", "pumit@3d_fullres_sac",
        "scratch@3d_fullres_sac_b", "pumit[size=b]@3d_fullres_sac_b",
    ]  # fmt: skip
    assert names("pumit", "3d_fullres_sac") == ["scratch", "pumit"]


def test_the_usual_configuration_needs_no_name():
    assert names("voco@2d,scratch@2d", "2d") == ["voco", "scratch"]


def test_options_may_hold_commas():
    arm = parse_arms("voco[grid=1,3,3,steps=20]@2d", "3d_fullres")[-1]
    assert (arm.method, arm.configuration) == ("voco", "2d")
    assert arm.options == (("grid", "1,3,3"), ("steps", "20"))
    assert arm.name == "voco[grid=1,3,3,steps=20]@2d"


def test_options_are_an_arm_of_their_own():
    plain, full = parse_arms("voco,voco[region=full]", "3d_fullres")[1:]
    assert plain != full and plain.slug == "voco" and full.slug == "voco.region.full"


def test_runs_have_names_that_say_what_they_are_and_never_meet():
    arms = parse_arms("voco,voco[region=full]", "3d_fullres")
    assert training_run(None, arms[1], 2, 0.1, 0) == "cmp-voco-f10-s0-x2"
    assert training_run("first", arms[1], 2, 0.025, 3) == "cmp-first-voco-f2.5-s3-x2"
    assert encoder_run(None, arms[2], 1) == "cmp-voco.region.full-x1"
    made = {
        training_run(comparison, arm, fold, fraction, seed)
        for comparison in (None, "voco", "f10", "voco.region.full")
        for arm in arms
        for fold in (0, 1)
        for fraction in (0.01, 0.1, 1.0)
        for seed in (0, 10)
    }
    assert len(made) == 4 * 3 * 2 * 3 * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vocco", "Did you mean 'voco'"),
        ("scrath", "Did you mean 'scratch'"),
        ("voco,,scratch", "empty place"),
        ("voco[region]", "KEY=VALUE"),
        ("voco[region=full", "Not a method"),
        ("voco[region=full][grid=1]", "Not a method"),
        ("voco@", "Not a method"),
        ("voco[steps=1,steps=2]", "twice"),
        ("scratch[lr=1]", "no options"),
        ("voco[lr=1e-3],voco[lr=1e.3]", "same folders"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(SettingsError, match=message.replace("[", r"\[")):
        parse_arms(text, "3d_fullres")
