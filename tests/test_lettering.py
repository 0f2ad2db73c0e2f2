"""Names of users in pictures."""

import warnings
from unicodedata import category

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import FontProperties, findfont, get_font

from openreml_nn import lmm
from openreml_nn.report import caterpillar
from openreml_nn.report.lettering import abridged, lettered


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("station of the university, plot {}", "end"),
        ("{} is the plot of the station of the university", "start"),
        ("the station, plot {} in the northern block of fields", "middle"),
        ("北京市海淀区第一农业试验站{}", "end"),
    ],
)
def test_names_that_are_shortened_stay_different_and_fit(name, where):
    names = [name.format(i) for i in range(10, 60)]
    short = abridged(names, 16)
    assert len(set(short)) == 50
    # Letters of East Asia are two wide.
    assert all(sum(1 + (letter > "\u2e7f") for letter in text) <= 16 for text in short)
    assert abridged(names, 80) == names


def test_names_are_shortened_alone_and_together():
    assert abridged(["abcdefghij"], 5) == ["abcd…"]
    assert abridged([], 5) == []
    assert abridged(["", "abc"], 2) == ["", "a…"]
    assert abridged(["a\tb", "", 3], 9) == ["a\\tb", "", "3"]
    assert abridged(["same name"] * 2, 5) == ["same…"] * 2
    with pytest.raises(ValueError, match="`most` is 1"):
        abridged(["a"], 1)


def test_names_on_a_plot_are_no_formulas_and_stay_different():
    g = np.arange(24) % 4
    levels = [
        f"$\\frac{{1}} of the plots of the northern experimental station $x^2$ {i}"
        for i in range(4)
    ]
    table = pd.DataFrame({"y": np.random.default_rng(1).standard_normal(24) + g})
    long = "identifier of the experimental station of the university"
    table[long] = np.array(levels, dtype=object)[g]
    figure = caterpillar(lmm(f"y ~ 1 + (1 | `{long}`)", table), long)
    FigureCanvasAgg(figure).draw()  # a formula without its end would raise
    (axis,) = figure.axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert len(set(names)) == 4
    assert all(name.startswith(r"\$\frac{1} of") for name in names)
    # The name of the factor has room beside so few levels.
    box = axis.yaxis.label.get_window_extent()
    assert 0 <= box.y0 < box.y1 <= figure.bbox.height


def test_letters_that_the_font_has_not_come_from_another():
    own = set(get_font(findfont(FontProperties())).get_charmap())
    other = set(get_font(findfont("STIXGeneral")).get_charmap())
    offered = map(chr, sorted(other - own))
    letter = next(each for each in offered if each > "\u024f" and category(each) == "Sm")
    before = plt.rcParams["font.family"]
    with lettered(["Ærø"]):
        assert plt.rcParams["font.family"] == before
    with lettered([letter]):
        first, further = plt.rcParams["font.family"]
    assert [first] == before
    assert ord(letter) in get_font(findfont(further)).get_charmap()
    assert plt.rcParams["font.family"] == before


def test_letters_that_no_font_has_are_told_of():
    told = pytest.warns(RuntimeWarning, match="no font on this machine has the letters \U0010fffd,")
    with told, lettered(["\U0010fffd"]):
        pass
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        with lettered(["\U0010fffd once more"]):
            pass
