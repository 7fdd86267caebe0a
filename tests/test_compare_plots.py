"""Plots of a comparison: what is written in them lies inside."""

import pytest
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg

from autoseg.comparison.arms import parse_arms
from autoseg.comparison.plots import draw_dice_over_labels, draw_learning_curves
from autoseg.comparison.statistics import compare_arms
from tests.test_compare_statistics import outcome

LONG = "scratch,voco[region=full,random_crops=8],rotation[steps=20],jigsaw,cpc[preset=cpu]"


@pytest.mark.parametrize("drawn", ["curves", "labels"])
def test_the_legend_of_arms_with_long_names_fits(drawn):
    arms = parse_arms(LONG, "3d_fullres")
    cases = {f"c{n}": (0.5 + n / 20,) for n in range(6)}
    outcomes = [outcome(arm, cases, curve=(0.1, 0.5)) for arm in arms]
    # nnU-Net's own trainers, in tests before this one, leave letters two and a half times as large.
    with style.context("default", after_reset=True):
        lines = compare_arms(outcomes, arms)
        figure = draw_learning_curves(outcomes, arms) if drawn == "curves" else draw_dice_over_labels(lines)
        FigureCanvasAgg(figure).draw()
        box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert len(figure.legends[0].get_texts()) == len(arms)
