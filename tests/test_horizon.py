"""Horizons other than the student's own: a cut, or its own forecast gone on with."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import hourly

import moirai_distill as md

LEVELS = len(md.LEVELS)


@pytest.fixture
def student():
    """A student of random weights, 24 -> 8, with quantiles."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "patch_size": 8, "dropout": 0.0}
    return md.PatchStudent(24, 8, **sizes, quantile_width=4).eval()


def contexts(count=3):
    return np.random.default_rng(0).normal(size=(count, 24)).cumsum(1)


@pytest.mark.parametrize("horizon", [1, 5, 8])
def test_up_to_its_own_horizon_it_is_a_cut(student, horizon):
    whole = student.forecast(contexts())
    np.testing.assert_array_equal(student.forecast(contexts(), horizon), whole[:, :horizon])
    whole = student.quantiles(contexts())
    np.testing.assert_array_equal(student.quantiles(contexts(), horizon), whole[:, :, :horizon])


def test_beyond_it_the_point_goes_on_from_the_point(student):
    points = student.forecast(contexts(), 20)
    assert points.shape == (3, 20)
    known = np.concatenate([contexts(), points], 1)
    np.testing.assert_allclose(points[:, :8], student.forecast(contexts()))
    np.testing.assert_allclose(points[:, 8:16], student.forecast(known[:, :32]))
    np.testing.assert_allclose(points[:, 16:], student.forecast(known[:, :40])[:, :4])


def test_beyond_it_each_quantile_goes_on_and_of_81_nine_are_taken(student):
    quantiles = student.quantiles(contexts(), 16)
    assert quantiles.shape == (3, LEVELS, 16)
    first = student.quantiles(contexts())
    of_all = []
    for level in range(LEVELS):
        known = np.concatenate([contexts(), first[:, level]], 1)
        of_all.append(student.quantiles(known))
    of_all = np.concatenate(of_all, 1)
    assert of_all.shape == (3, 81, 8)
    expected = np.quantile(of_all, md.LEVELS, axis=1).transpose(1, 0, 2)
    np.testing.assert_allclose(quantiles[:, :, 8:], expected)


def test_quantiles_do_not_cross_and_the_band_does_not_collapse(student):
    quantiles = student.quantiles(contexts(20), 32)
    assert (np.diff(quantiles, axis=1) >= 0).all()
    width = quantiles[:, -1] - quantiles[:, 0]
    assert width[:, 24:].mean() > 0.5 * width[:, :8].mean()


def test_a_student_without_quantiles_goes_on_too():
    sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "patch_size": 8, "dropout": 0.0}
    student = md.PatchStudent(24, 8, **sizes)
    assert student.forecast(contexts(), 20).shape == (3, 20)


def test_of_a_frame_more_steps_are_forecast(student):
    frame = hourly(60)
    table = md.forecast_frame(student, frame, ["value"], horizon=20)
    assert len(table) == 20
    assert table.index[0] == frame["date"].iloc[-1] + pd.Timedelta("1h")


@pytest.mark.parametrize("horizon", [4, 16, 40])
def test_predict_and_evaluate_take_a_horizon(horizon, trained, tmp_path, capsys, monkeypatch):
    output = tmp_path / "ahead.csv"
    checkpoint = ["--checkpoint", str(trained / "distilled"), "--lang", "en"]
    words = ["predict", *checkpoint, "--input", str(trained / "data" / "s00.csv")]
    words += ["--output", str(output), "--horizon", str(horizon), "--plot"]
    assert md.main(words) == 0
    frame = pd.read_csv(output, parse_dates=["date"])
    assert len(frame) == horizon
    assert frame["date"].iloc[0] == pd.Timestamp("2024-01-01") + pd.Timedelta("300h")
    goes_on = "beyond 16 steps the student goes on from its own forecast"
    printed = capsys.readouterr()
    assert (goes_on in printed.out + printed.err) == (horizon > 16)
    assert md.main([*words, "--backtest"]) == 0
    assert f"Error on the last {horizon} steps" in capsys.readouterr().out

    own = (trained / "distilled" / "evaluation.json").read_bytes()
    words = ["evaluate", *checkpoint, "--device", "cpu", "--horizon", str(horizon)]
    read = []
    read_series = md.read_series
    monkeypatch.setattr(md, "read_series", lambda *which: read.append(1) or read_series(*which))
    assert md.main(words) == 0
    assert len(read) == len([*(trained / "data").iterdir()])  # once
    assert (trained / "distilled" / "evaluation.json").read_bytes() == own
    folder = trained / "distilled" / f"horizon_{horizon}"
    table = json.loads((folder / "evaluation.json").read_text())
    assert table["prediction_length"] == horizon
    assert len(json.loads((folder / "evaluation.json").read_text())["rows"]) == 3
    assert "not the test windows" not in capsys.readouterr().err


def test_a_horizon_of_nothing_is_refused(trained, capsys):
    words = ["evaluate", "--checkpoint", str(trained / "distilled"), "--horizon", "0"]
    assert md.main([*words, "--lang", "en"]) == 2
    assert "--horizon 0: must be at least 1" in capsys.readouterr().err
