"""Pictures for people: dates, units and names, one colour for each forecaster, nothing collides."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from conftest import data_config, files_read, raw_series
from matplotlib.backends.backend_agg import FigureCanvasAgg

import moirai_distill as md

NOISE = np.random.default_rng(0).normal(50, 5, 400).round(3)


@pytest.fixture
def figures(monkeypatch):
    """The Figures that are drawn, laid out, in place of their files."""
    drawn = []

    def keep(canvas, file):
        canvas.draw()  # which lays it out
        drawn.append(canvas.figure)
        file.write(b"picture")

    monkeypatch.setattr(FigureCanvasAgg, "print_png", keep)
    return drawn


def panel(**changes):
    """A Panel of monthly values, of which the last 12 are forecast by three."""
    dates = pd.date_range("2020-01-01", periods=48, freq="MS", name="Month")
    curves = {"runs/a": NOISE[:12], "teacher": NOISE[1:13], "seasonal-naive": NOISE[2:14]}
    one = md.Panel("a.csv", dates, NOISE[:48], dates[36:], curves, dates[35], "Month", "sales")
    return dataclasses.replace(one, **changes)


def of_legend(figure):
    """Name -> colour of the lines in the legend of a figure."""
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    return dict(zip(texts, [line.get_color() for line in legend.get_lines()], strict=True))


def test_axes_are_labelled_and_dates_are_dates_that_do_not_collide(figures, tmp_path):
    md.draw(tmp_path / "a.png", [panel(), panel(heading="x")])
    (figure,) = figures
    assert figure.get_suptitle() == ""  # of the first panel alone
    for axis in figure.axes:
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("Month", "sales")
        shown = [label for label in axis.get_xticklabels() if label.get_text()]
        assert any(label.get_text() in ("2021", "2022", "2023") for label in shown)
        boxes = sorted((label.get_window_extent() for label in shown), key=lambda box: box.x0)
        assert len(boxes) > 2
        assert all(one.x1 < other.x0 for one, other in zip(boxes, boxes[1:], strict=False))


def test_the_legend_stands_beside_the_plots_once_and_a_line_where_the_forecast_begins(
    figures, tmp_path
):
    md.draw(tmp_path / "a.png", [panel(), panel()])
    (figure,) = figures
    (legend,) = figure.legends
    assert [*of_legend(figure)] == ["truth", "runs/a", "teacher", "seasonal-naive"]
    box = legend.get_window_extent()
    for axis in figure.axes:
        assert axis.get_legend() is None
        assert axis.get_window_extent().x1 < box.x0
        (line,) = [line for line in axis.lines if line.get_linestyle() == "--"]
        assert pd.Timestamp(line.get_xdata()[0]) == pd.Timestamp("2022-12-01")


def test_a_forecaster_has_one_colour_in_all_pictures(figures, tmp_path):
    md.draw(tmp_path / "a.png", [panel()])
    curves = {"seasonal-naive": NOISE[:12], "forecast": NOISE[:12]}
    md.draw(tmp_path / "b.png", [panel(curves=curves)])
    curves = {"runs/a": NOISE[:12], "runs/b": NOISE[:12], "last value": NOISE[:12]}
    md.draw(tmp_path / "c.png", [panel(curves=curves | {"teacher": NOISE[:12]})])
    one, two, three = (of_legend(figure) for figure in figures)
    assert one["seasonal-naive"] == two["seasonal-naive"]
    assert one["runs/a"] == two["forecast"] == three["runs/a"]  # the first student
    assert one["teacher"] == three["teacher"]
    assert one["truth"] == two["truth"] == "0.55"
    assert len({*three.values()}) == len(three)


def test_stamps_with_a_zone_are_shown_as_their_clock_shows_them(figures, tmp_path):
    zoned = pd.date_range("2024-01-01", periods=12, freq="h", tz="Asia/Tokyo")
    md.draw(tmp_path / "a.png", [panel(known=[], steps=[], ahead=zoned, begins=zoned[0])])
    lines = figures[0].axes[0].lines
    assert pd.Timestamp(lines[0].get_xdata()[0]) == pd.Timestamp("2024-01-01 00:00")


@pytest.mark.parametrize(("naive", "is_log"), [(1.5, False), (80.0, True)])
def test_errors_far_apart_stand_on_a_logarithmic_axis(naive, is_log, figures, tmp_path):
    curves = {"student": [1.0, 1.1, 1.2], "seasonal-naive": [naive] * 3}
    md.draw(tmp_path / "a.png", [md.error_panel(curves, 3)])
    (axis,) = figures[0].axes
    assert axis.get_yscale() == ("log" if is_log else "linear")
    assert axis.get_ylabel() == "squared deviations"
    assert not md.error_panel(curves | {"perfect": [0.0] * 3}, 3).is_log
    labels = [label.get_text() for label in axis.get_yticklabels() if label.get_text()]
    assert len(labels) > 1


def test_long_names_keep_their_end(figures, tmp_path):
    long = "/a/very/long/way/to/the/checkpoints/of/a/run"
    md.draw(tmp_path / "a.png", [panel(curves={long: NOISE[:12]})])
    (_, name) = of_legend(figures[0])
    assert name.startswith("…") and long.endswith(name[1:])
    assert len(name) == 28


@pytest.mark.parametrize("freq", ["MS", "h", "7D", "B", ""])
def test_a_test_window_is_drawn_in_the_units_and_at_the_stamps_of_its_file(freq):
    dates = None
    if freq:
        dates = pd.date_range("2001-01-01", periods=200, freq=freq, name="when")
    series = {}
    for number, scale in enumerate((1.0, 1000.0)):
        values = scale * NOISE[number : number + 200]
        one = raw_series(f"{number}", values, freq, stamps=dates[-12:] if freq else None)
        series[f"{number}"] = [one]
    data = md.split_data(files_read(series), data_config(context_length=30, prediction_length=8))
    test = data.windows["test"]
    window = len(test) - 3  # of the second series
    context, truth, _ = test.batch(np.array([window]))
    drawn = md.window_panel(test, window, (context[0], truth[0]), {"student": truth[0]})
    first = 200 - 8 - 2 - 16  # the third window from the end, of which 2 horizons are shown before
    expected = 1000 * NOISE[1 + first : 1 + first + 24]
    np.testing.assert_allclose(drawn.known, expected, rtol=1e-5)
    np.testing.assert_allclose(drawn.curves["student"], expected[16:], rtol=1e-5)
    assert drawn.y_label == "1"
    if freq:
        assert [*drawn.steps] == [*dates[first : first + 24]]
        assert [*drawn.ahead] == [*dates[first + 16 : first + 24]]
        assert drawn.begins == dates[first + 15]
        assert drawn.x_label == "when"
    else:
        assert drawn.ahead[-1] == -2  # steps before the end of the file


def test_control_characters_in_names_are_escaped_in_pictures(figures, tmp_path):
    bad = "a\x1b[2J\nb"
    curves = {bad: NOISE[:12]}
    md.draw(tmp_path / "a.png", [panel(title=bad, x_label=bad, y_label=bad, curves=curves)])
    (figure,) = figures
    (axis,) = figure.axes
    escaped = "a\\x1b[2J\\nb"
    assert [axis.get_title(), axis.get_xlabel(), axis.get_ylabel()] == [escaped] * 3
    assert escaped in of_legend(figure)
