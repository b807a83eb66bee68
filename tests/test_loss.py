"""The loss and the ruler: values against plain PyTorch and plain numpy."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_job
from hypothesis import given, settings
from hypothesis import strategies as st

from moirai_distill import (
    Windows,
    distillation_loss,
    last_value,
    naive_forecaster,
    score,
    seasonal_naive,
)

CONTEXT, HORIZON = 12, 4


@pytest.fixture(scope="module")
def job():
    return make_job()


def draws(seed, batch=6, horizon=HORIZON):
    """(forecast, truth, label, observed (B, H), labelled (B, 1)).

    Some point of each row is observed; some rows are labelled and some are not.
    """
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 2, (3, batch, horizon)).astype(np.float32)
    forecast, truth, label = torch.from_numpy(values)
    observed = torch.from_numpy((rng.random((batch, horizon)) < 0.7).astype(np.float32))
    observed[:, 0] = 1
    labelled = torch.from_numpy((np.arange(batch)[:, None] % 3 > 0).astype(np.float32))
    return forecast, truth, label, observed, labelled


def make_windows(rows, seasons, seed=0, filled=0.0):
    """All windows of one random series per season, `filled` of their points not observed."""
    rng = np.random.default_rng(seed)
    count = rows - CONTEXT - HORIZON + 1
    return Windows(
        values=rng.normal(0, 1, rows * len(seasons)).cumsum().astype(np.float32),
        observed=rng.random(rows * len(seasons)) >= filled,
        starts=np.concatenate([np.arange(count) + i * rows for i in range(len(seasons))]),
        series=np.repeat(np.arange(len(seasons)), count),
        freqs=["h"] * len(seasons),
        seasons=np.array(seasons),
        names=[f"s{number}" for number in range(len(seasons))],
        context_length=CONTEXT,
        horizon=HORIZON,
        digest="",
    )


def mase_unit(past, season):
    """Mean absolute seasonal difference of one context, 0 where there is none."""
    if season >= CONTEXT:
        return 0
    return np.mean([abs(past[t] - past[t - season]) for t in range(season, CONTEXT)])


def by_numpy(windows, forecasts):
    """The scores of `forecasts` (W, H) as a dict, window by window and point by point."""
    errors = []  # of all observed points
    steps = []  # the step of each of them
    members = []  # the series of each of them
    scaled = []
    left_out = 0
    for start, series, forecast in zip(windows.starts, windows.series, forecasts, strict=True):
        past = windows.values[start : start + CONTEXT].astype(np.float64)
        unit = mase_unit(past, windows.seasons[series])
        left_out += unit == 0
        for step in range(HORIZON):
            row = start + CONTEXT + step
            if not windows.observed[row]:
                continue
            error = abs(float(windows.values[row]) - float(forecast[step]))
            errors.append(error)
            steps.append(step)
            members.append(series)
            if unit > 0:
                scaled.append(error / unit)
    errors = np.array(errors)
    steps = np.array(steps)
    members = np.array(members)
    squared = errors**2
    return {
        "mse": squared.mean(),
        "mae": errors.mean(),
        "mase": np.mean(scaled),
        "mase_left_out": left_out,
        "mse_by_step": [squared[steps == step].mean() for step in range(HORIZON)],
        "mae_by_step": [errors[steps == step].mean() for step in range(HORIZON)],
        "mse_by_series": [squared[members == s].mean() for s in range(len(windows.seasons))],
        "mae_by_series": [errors[members == s].mean() for s in range(len(windows.seasons))],
    }


def assert_scores(scores, expected, rel):
    """Scores are `expected` (a dict) within `rel`."""
    scores = dataclasses.asdict(scores)
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, rel=rel), name


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.integers(0, 999))
def test_the_loss_is_alpha_of_the_error_to_the_teacher_and_the_rest_of_the_error_to_the_truth(
    alpha, seed
):
    forecast, truth, label, _, _ = draws(seed)
    ones = torch.ones_like(forecast)
    sums = distillation_loss(forecast, truth, ones, label, torch.full((6, 1), alpha))
    expected = alpha * F.mse_loss(forecast, label) + (1 - alpha) * F.mse_loss(forecast, truth)
    torch.testing.assert_close(sums[0] / ones.sum(), expected)
    torch.testing.assert_close(sums[1] / ones.sum(), F.mse_loss(forecast, truth))
    if alpha > 1e-9:
        torch.testing.assert_close(sums[2] / sums[3], F.mse_loss(forecast, label))


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 1), st.integers(0, 999))
def test_filled_points_stay_out_and_unlabelled_windows_weigh_on_truth_alone(alpha, seed):
    forecast, truth, label, observed, labelled = draws(seed)
    seen = observed > 0
    taught = seen & (labelled > 0)
    # Neither the filled truth nor the label there may matter.
    wild_truth = torch.where(seen, truth, 1e6)
    wild_label = torch.where(taught, label, -1e6)
    sums = distillation_loss(forecast, wild_truth, observed, wild_label, alpha * labelled)

    def squared_error(target, points):
        return F.mse_loss(forecast[points], target[points], reduction="sum")

    to_truth = squared_error(truth, seen)
    to_label = squared_error(label, taught)
    blended = alpha * to_label + (1 - alpha) * squared_error(truth, taught)
    blended += squared_error(truth, seen & ~taught)
    expected = torch.stack([blended, to_truth, to_label, taught.sum()])
    torch.testing.assert_close(sums, expected)


def test_the_gradient_of_the_loss_is_that_of_the_two_errors():
    forecast, truth, label, observed, labelled = draws(3)
    forecast.requires_grad_()
    distillation_loss(forecast, truth, observed, label, 0.3 * labelled)[0].backward()
    weight = 0.3 * labelled
    expected = 2 * observed * (weight * (forecast - label) + (1 - weight) * (forecast - truth))
    torch.testing.assert_close(forecast.grad, expected.detach())


def test_a_non_finite_forecast_is_not_hidden_by_the_loss():
    forecast, truth, label, observed, labelled = draws(0)
    forecast[2, 0] = float("nan")
    assert distillation_loss(forecast, truth, observed, label, 0.5 * labelled)[:2].isnan().all()


def test_naive_forecasts_repeat_the_end_of_a_known_series():
    context = torch.arange(20.0).view(2, 10)  # 0..9 and 10..19
    assert last_value(context, None, 4).tolist() == [[9] * 4, [19] * 4]
    season_of_each = torch.tensor([7, 3])
    seven, three = seasonal_naive(context, season_of_each, 8).tolist()
    assert seven == [3, 4, 5, 6, 7, 8, 9, 3]
    assert three == [17, 18, 19, 17, 18, 19, 17, 18]
    assert seasonal_naive(context, torch.tensor([10, 1]), 3).tolist() == [[0, 1, 2], [19, 19, 19]]


def test_a_season_longer_than_the_context_gives_the_last_value():
    context = torch.arange(20.0).view(2, 10)
    assert seasonal_naive(context, torch.tensor([11, 4]), 3).tolist() == [[9, 9, 9], [16, 17, 18]]


def test_the_seasonal_forecast_of_a_cycle_is_its_continuation():
    wave = torch.sin(2 * torch.pi * torch.arange(100) / 24)
    forecast = seasonal_naive(wave[None, :60], torch.tensor([24]), 40)
    torch.testing.assert_close(forecast, wave[None, 60:], atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), batch_size=st.integers(1, 60), filled=st.sampled_from([0.0, 0.3]))
def test_the_score_is_the_mean_over_every_point_of_every_window(job, seed, batch_size, filled):
    seasons = [3, 11, 24]  # the last is longer than the context
    windows = make_windows(30, seasons, seed, filled)
    assert len(windows) == 45
    drawn = np.random.default_rng(seed + 1).normal(0, 1, (len(windows), HORIZON))
    guess = torch.from_numpy(drawn.astype(np.float32))

    def forecast(index, context):
        return context[:, -1:] + guess[index]

    scores = score(forecast, windows, batch_size, job)
    last = windows.values[windows.starts + CONTEXT - 1][:, None]
    assert_scores(scores, by_numpy(windows, last + guess.numpy()), rel=1e-6)


def test_the_score_does_not_depend_on_the_batch_size(job):
    windows = make_windows(400, [3, 7], filled=0.1)
    windows.values *= 1e3  # large sums
    forecast = naive_forecaster(seasonal_naive, windows)
    first, *others = [score(forecast, windows, size, job) for size in (1, 7, 512, 10**6)]
    assert first.mse > 1e5
    for scores in others:  # float32 sums would not be so close
        assert_scores(scores, dataclasses.asdict(first), rel=1e-10)


def test_windows_whose_context_has_no_seasonal_change_are_left_out_of_mase_alone(job):
    windows = make_windows(40, [3, 3])
    windows.values[:40] = np.resize([1, 5, 2], 40)  # repeats itself: MASE's unit is 0
    forecast = naive_forecaster(last_value, windows)
    both = score(forecast, windows, 16, job)
    last = windows.values[windows.starts + CONTEXT - 1][:, None]
    assert_scores(both, by_numpy(windows, np.repeat(last, HORIZON, 1)), rel=1e-6)
    assert both.mase_left_out == np.sum(windows.series == 0) > 0
    is_second = windows.series == 1
    windows.starts = windows.starts[is_second]
    windows.series = windows.series[is_second]
    alone = score(forecast, windows, 16, job)
    assert alone.mase == pytest.approx(both.mase, rel=1e-6)
    assert alone.mse != pytest.approx(both.mse, rel=1e-2)


def test_mase_is_no_number_where_no_window_has_a_unit(job):
    windows = make_windows(40, [CONTEXT])
    scores = score(lambda _index, context: context[:, :HORIZON], windows, 16, job)
    assert np.isnan(scores.mase)
    assert scores.mse > 0
    assert scores.mae > 0


def test_a_perfect_forecast_scores_0_and_seasonal_naive_about_1(job):
    windows = make_windows(2000, [4])
    noise = np.random.default_rng(0).normal(0, 1, 2000)  # past and future differ alike
    windows.values[:] = noise
    perfect = score(lambda index, _context: windows.batch(index)[1], windows, 64, job)
    assert (perfect.mse, perfect.mae, perfect.mase) == (0, 0, 0)
    assert perfect.mse_by_series == [0]
    assert perfect.mse_by_step == perfect.mae_by_step == [0] * HORIZON
    naive = score(naive_forecaster(seasonal_naive, windows), windows, 64, job)
    assert naive.mase == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_non_finite_forecast_shows_in_the_score(job, value):
    windows = make_windows(30, [3])

    def forecast(index, context):
        result = last_value(context, None, HORIZON).clone()
        result[index == 4, 1] = value
        return result

    scores = score(forecast, windows, 8, job)
    totals = [scores.mse, scores.mae, scores.mase, *scores.mse_by_series]
    assert not np.isfinite(totals).any()
    assert np.isfinite(scores.mse_by_step).tolist() == [step != 1 for step in range(HORIZON)]


def test_filled_points_stay_out_of_the_score(job):
    windows = make_windows(60, [3], filled=0.2)

    def forecast(_index, context):
        return torch.zeros(len(context), HORIZON)

    before = score(forecast, windows, 16, job)
    windows.values = np.where(windows.observed, windows.values, 50).astype(np.float32)
    after = score(forecast, windows, 16, job)
    # In MASE's unit they count, as context.
    assert (after.mse, after.mae) == (before.mse, before.mae)
