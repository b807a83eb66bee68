"""The loss and the ruler: values against plain PyTorch and plain numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moirai_distill import Windows, blend, last_value, score, seasonal_naive

CONTEXT, HORIZON = 12, 4


@pytest.fixture(scope="module")
def fabric():
    from lightning.fabric import Fabric

    return Fabric(accelerator="cpu", devices=1)


def draws(seed, batch=6, horizon=HORIZON):
    """forecast, truth, label (B, H), a mask with some point of each row, and labelled (B, 1) with both kinds."""
    rng = np.random.default_rng(seed)
    forecast, truth, label = torch.from_numpy(rng.normal(0, 2, (3, batch, horizon)).astype(np.float32))
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
        length=CONTEXT + HORIZON,
        horizon=HORIZON,
        digest="",
    )


def by_numpy(windows, forecasts):
    """All that `score` tells of `forecasts` (W, H), window by window and point by point."""
    squared, absolute, scaled, places, left_out = [], [], [], [], 0
    for start, series, forecast in zip(windows.starts, windows.series, forecasts, strict=True):
        season = windows.seasons[series]
        past = windows.values[start : start + CONTEXT].astype(np.float64)
        scale = np.mean([abs(past[t] - past[t - season]) for t in range(season, CONTEXT)]) if season < CONTEXT else 0
        left_out += scale == 0
        for step in range(HORIZON):
            row = start + CONTEXT + step
            if windows.observed[row]:
                error = abs(float(windows.values[row]) - float(forecast[step]))
                squared.append(error**2)
                places.append((step, series))
                absolute.append(error)
                scaled += [error / scale] if scale > 0 else []
    squared, absolute, (step, series) = np.array(squared), np.array(absolute), np.array(places).T
    result = {"mse": squared.mean(), "mae": absolute.mean(), "mase": np.mean(scaled), "mase_left_out": left_out}
    result["mse_by_step"] = [squared[step == h].mean() for h in range(HORIZON)]
    result["mae_by_step"] = [absolute[step == h].mean() for h in range(HORIZON)]
    return result | {"mse_by_series": [squared[series == s].mean() for s in range(len(windows.seasons))]}


def same(result, expected, rel):
    """Whether two results of `score` are equal within `rel`."""
    assert result.keys() == expected.keys() and len(result) == 7
    return all(result[name] == pytest.approx(expected[name], rel=rel) for name in expected)


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.integers(0, 999))
def test_the_blend_is_alpha_of_the_error_to_the_teacher_and_the_rest_of_the_error_to_the_truth(alpha, seed):
    forecast, truth, label, _, _ = draws(seed)
    ones = torch.ones_like(forecast)
    sums = blend(forecast, truth, ones, label, torch.full((6, 1), alpha))
    expected = alpha * F.mse_loss(forecast, label) + (1 - alpha) * F.mse_loss(forecast, truth)
    torch.testing.assert_close(sums[0] / ones.sum(), expected)
    torch.testing.assert_close(sums[1] / ones.sum(), F.mse_loss(forecast, truth))
    if alpha > 1e-9:
        torch.testing.assert_close(sums[2] / sums[3], F.mse_loss(forecast, label))


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 1), st.integers(0, 999))
def test_filled_points_stay_out_and_unlabelled_windows_weigh_on_truth_alone(alpha, seed):
    forecast, truth, label, observed, labelled = draws(seed)
    wild = torch.where(observed > 0, truth, 1e6)  # neither the filled truth nor the label there may matter
    label = torch.where((observed > 0) & (labelled > 0), label, -1e6)
    sums = blend(forecast, wild, observed, label, alpha * labelled)
    seen, taught = observed > 0, (observed * labelled) > 0
    to_truth = F.mse_loss(forecast[seen], truth[seen], reduction="sum")
    to_label = F.mse_loss(forecast[taught], label[taught], reduction="sum")
    untaught = F.mse_loss(forecast[seen & ~taught], truth[seen & ~taught], reduction="sum")
    taught_truth = F.mse_loss(forecast[taught], truth[taught], reduction="sum")
    expected = torch.stack([alpha * to_label + (1 - alpha) * taught_truth + untaught, to_truth, to_label, taught.sum()])
    torch.testing.assert_close(sums, expected)


def test_the_gradient_of_the_blend_is_that_of_the_two_errors():
    forecast, truth, label, observed, labelled = draws(3)
    forecast.requires_grad_()
    blend(forecast, truth, observed, label, 0.3 * labelled)[0].backward()
    weight = 0.3 * labelled
    expected = 2 * observed * (weight * (forecast - label) + (1 - weight) * (forecast - truth))
    torch.testing.assert_close(forecast.grad, expected.detach())


def test_a_non_finite_forecast_is_not_hidden_by_the_loss():
    forecast, truth, label, observed, labelled = draws(0)
    forecast[2, 0] = float("nan")
    assert blend(forecast, truth, observed, label, 0.5 * labelled)[:2].isnan().all()


def test_naive_forecasts_repeat_the_end_of_a_known_series():
    context = torch.arange(20.0).view(2, 10)  # 0..9 and 10..19
    assert last_value(context, None, 4).tolist() == [[9] * 4, [19] * 4]
    seven, three = seasonal_naive(context, torch.tensor([7, 3]), 8).tolist()  # a season of its own for each window
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
def test_the_score_is_the_mean_over_every_point_of_every_window(fabric, seed, batch_size, filled):
    windows = make_windows(30, [3, 11, 24], seed, filled)  # 45 windows; 24 is longer than the context
    guess = torch.from_numpy(np.random.default_rng(seed + 1).normal(0, 1, (len(windows), HORIZON)).astype(np.float32))
    result = score(lambda index, context: context[:, -1:] + guess[index], windows, batch_size, fabric, False)
    last = windows.values[windows.starts + CONTEXT - 1][:, None]
    assert same(result, by_numpy(windows, last + guess.numpy()), 1e-6)


def test_the_score_does_not_depend_on_the_batch_size(fabric):
    windows = make_windows(400, [3, 7], filled=0.1)
    windows.values *= 1e3  # large sums
    forecast = lambda index, context: seasonal_naive(context, windows.season(index), HORIZON)  # noqa: E731
    results = [score(forecast, windows, size, fabric, False) for size in (1, 7, 512, 10**6)]
    assert results[0]["mse"] > 1e5
    for result in results[1:]:
        assert same(result, results[0], 1e-10)  # float32 sums would not give that


def test_windows_whose_context_has_no_seasonal_change_are_left_out_of_mase_alone(fabric):
    windows = make_windows(40, [3, 3])
    windows.values[:40] = np.tile(np.float32([1, 5, 2]), 14)[:40]  # repeats itself: MASE's unit is 0
    guess = lambda _index, context: context[:, -1:] + torch.zeros(HORIZON)  # noqa: E731
    result = score(guess, windows, 16, fabric, False)
    last = np.repeat(windows.values[windows.starts + CONTEXT - 1][:, None], HORIZON, 1)
    assert same(result, by_numpy(windows, last), 1e-6) and result["mase_left_out"] == np.sum(windows.series == 0) > 0
    second = windows.series == 1
    windows.starts, windows.series = windows.starts[second], windows.series[second]
    alone = score(guess, windows, 16, fabric, False)
    assert alone["mase"] == pytest.approx(result["mase"], rel=1e-6)
    assert alone["mse"] != pytest.approx(result["mse"], rel=1e-2)


def test_mase_is_no_number_where_no_window_has_a_unit(fabric):
    windows = make_windows(40, [CONTEXT])
    result = score(lambda _index, context: context[:, :HORIZON], windows, 16, fabric, False)
    assert np.isnan(result["mase"]) and result["mse"] > 0 and result["mae"] > 0


def test_a_perfect_forecast_scores_0_and_seasonal_naive_about_1(fabric):
    windows = make_windows(2000, [4], seed=5)
    windows.values[:] = np.random.default_rng(0).normal(0, 1, 2000)  # noise: past and future differ alike
    truth = lambda index, _context: windows.batch(index)[1]  # noqa: E731
    perfect = score(truth, windows, 64, fabric, False)
    assert [perfect[name] for name in ("mse", "mae", "mase", "mse_by_series")] == [0, 0, 0, [0]]
    assert perfect["mse_by_step"] == perfect["mae_by_step"] == [0] * HORIZON
    naive = lambda index, context: seasonal_naive(context, windows.season(index), HORIZON)  # noqa: E731
    assert score(naive, windows, 64, fabric, False)["mase"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_non_finite_forecast_shows_in_the_score(fabric, value):
    windows = make_windows(30, [3])

    def forecast(index, context):
        result = last_value(context, None, HORIZON).clone()
        result[index == 4, 1] = value
        return result

    result = score(forecast, windows, 8, fabric, False)
    assert not np.isfinite([result["mse"], result["mae"], result["mase"], *result["mse_by_series"]]).any()
    assert np.isfinite(result["mse_by_step"]).tolist() == [step != 1 for step in range(HORIZON)]


def test_filled_points_stay_out_of_the_score(fabric):
    windows = make_windows(60, [3], filled=0.2)
    forecast = lambda _index, context: torch.zeros(len(context), HORIZON)  # noqa: E731
    before = score(forecast, windows, 16, fabric, False)
    windows.values = np.where(windows.observed, windows.values, 50).astype(np.float32)
    after = score(forecast, windows, 16, fabric, False)
    assert (after["mse"], after["mae"]) == (before["mse"], before["mae"])  # in MASE's unit they count as context
