"""Horizons other than the student's own: a cut, or its own forecast gone on with."""

import json
from statistics import NormalDist

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


class Walk(md.GoesOn):
    """What forecasts each step of a random walk, or of noise that does not walk."""

    context_length = 24
    prediction_length = 8
    has_quantiles = True

    def __init__(self, walks):
        self.walks = walks

    def __call__(self, context, with_quantiles=False):
        steps = torch.arange(1, 9) if self.walks else torch.ones(8)
        centre = context[:, -1:] if self.walks else torch.zeros(len(context), 1)
        scores = torch.tensor([NormalDist().inv_cdf(level) for level in md.LEVELS])
        quantiles = centre[:, None] + scores[:, None] * steps.sqrt()
        points = centre.expand(-1, 8)
        return (points, quantiles) if with_quantiles else points


def test_beyond_it_the_band_is_as_wide_as_it_should_be():
    """The truth is known: that of noise stays, that of a walk grows with the root of the steps.

    The latter is not reached, as the nine that go on leave out what lies beyond them.
    """
    context = torch.zeros(2, 24)
    quantiles = Walk(walks=False).quantiles_ahead(context, 24)
    torch.testing.assert_close(
        quantiles[..., 8:], quantiles[..., :8].repeat(1, 1, 2), atol=0.02, rtol=0
    )

    quantiles = Walk(walks=True).quantiles_ahead(context, 24)
    expected = NormalDist().inv_cdf(0.9) * torch.arange(1, 25).sqrt()
    share = quantiles[0, -1] / expected
    assert (share[:8] - 1).abs().max() < 1e-5
    assert share[8:16].min() > 0.8 and share[16:].min() > 0.7  # 0.75 and 0.6 of the 81 alone
    assert share[8:].max() < 1.05
    torch.testing.assert_close(quantiles[:, 0], -quantiles[:, -1])


def test_beyond_it_each_quantile_goes_on(student):
    quantiles = student.quantiles(contexts(), 16)
    assert quantiles.shape == (3, LEVELS, 16)
    first = student.quantiles(contexts())
    after = []
    for level in range(LEVELS):
        known = np.concatenate([contexts(), first[:, level]], 1)
        after.append(student.quantiles(known))
    after = np.stack(after, 1)  # (3, 9, 9, 8)
    expected = md.quantiles_of_mixture(torch.from_numpy(after)).numpy()
    np.testing.assert_allclose(quantiles[:, :, 8:], expected)
    assert (quantiles[:, 0, 8:] > after[:, :, 0].min(1) - 1).all()


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
