"""predict: the next steps of a user's own file, in its units and on its own calendar."""

import json
import shlex
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SCRIPT, hourly, modules_after, quiet_voice, raw_series, read_config
from hypothesis import given, settings
from hypothesis import strategies as st

import moirai_distill as md

L, H = 64, 16


def predict(checkpoint, file, *words):
    """The table of points that predict writes, or its exit code where that is not 0."""
    output = file.with_name("out.csv")
    places = ["--checkpoint", checkpoint, "--input", file, "--output", output, "--levels", "none"]
    code = md.main(["predict", "--lang", "en", *map(str, [*places, *words])])
    return pd.read_csv(output, index_col=0) if code == 0 else code


def save(path, times, values=None, name="date", **columns):
    """A CSV of these times and values; returns its path."""
    values = np.sin(np.arange(len(times))) if values is None else values
    pd.DataFrame({name: times, "value": values, **columns}).to_csv(path, index=False)
    return path


def hours(rows):
    """Timestamps of so many hours."""
    return pd.date_range("2024-01-01", periods=rows, freq="h")


def forecast_of(student, context):
    """What a student says to one context (L,)."""
    with torch.inference_mode():
        return student(torch.from_numpy(context[None]))[0].numpy()


def changed(run, path, **flags):
    """A copy of a run's checkpoint with other flags in its run_config; returns its path."""
    (best,) = run.glob("best_model_epoch_*.pt")
    content = torch.load(best, weights_only=True)
    content["run_config"] |= flags
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def run(trained):
    return trained / "distilled"


@pytest.fixture(scope="module")
def student(run):
    return md.PatchStudent.from_pretrained(run)


def test_the_forecast_is_the_students_in_the_files_own_units(run, student, tmp_path):
    frame = hourly(200, seed=3)
    frame["value"] = 1e4 + 250 * frame["value"]
    frame.to_csv(tmp_path / "a.csv", index=False)
    table = predict(run, tmp_path / "a.csv")
    expected = forecast_of(student, frame["value"].to_numpy()[-L:])
    assert table.index.name == "date"
    assert [*table.columns] == ["value"]
    assert len(table) == H
    assert table["value"].to_numpy() == pytest.approx(expected, rel=1e-9)
    assert table.index[0] == "2024-01-09 08:00:00"
    assert table.index[-1] == "2024-01-09 23:00:00"


@pytest.mark.parametrize("freq", ["h", "B", "ME", "QS-FEB"])
def test_an_output_can_be_put_after_its_input(run, tmp_path, freq):
    times = pd.date_range("2001-02-01", periods=100, freq=freq)
    path = save(tmp_path / "a.csv", times, name="Time")
    predict(run, path)
    _, _, rows = (tmp_path / "out.csv").read_text().partition("\n")
    (tmp_path / "b.csv").write_text(path.read_text() + rows)
    (series,) = md.read_series(tmp_path / "b.csv", "b.csv", read_config()).series
    assert series.freq == freq
    assert len(series.values) == 100 + H
    assert np.isfinite(series.values).all()


CALENDARS = {  # frequency, number of rows, first date
    "h": ("2024-03-30", 90),
    "15min": ("2024-01-01", 90),
    "D": ("2024-01-20", 90),
    "B": ("2024-01-03", 90),
    "W-WED": ("2022-01-05", 90),
    "MS": ("2010-01-01", 90),
    "ME": ("2011-01-31", 90),
    "QS-FEB": ("2000-02-01", 70),
    "QE-DEC": ("2000-03-31", 70),
    "YS-JAN": ("1900-01-01", 70),
    "YE-DEC": ("1900-12-31", 70),
}


@pytest.mark.parametrize("freq", CALENDARS)
@pytest.mark.parametrize("clock", ["0h", "16h"])
def test_timestamps_go_on_at_the_files_own_frequency(run, tmp_path, freq, clock):
    start, rows = CALENDARS[freq]
    clock = "0h" if freq in ("h", "15min") else clock
    times = pd.date_range(start, periods=rows + H, freq=freq) + pd.Timedelta(clock)
    table = predict(run, save(tmp_path / "a.csv", times[:rows]))
    lines = pd.DataFrame(index=times[rows:]).to_csv(header=False).splitlines()
    assert [*table.index] == [line.split(",")[0] for line in lines]


@pytest.mark.parametrize("day", [15, 28, 30, 31])
def test_months_on_any_day_keep_that_day(run, tmp_path, day):
    months = pd.period_range("2012-07", periods=80 + H, freq="M")  # the 80th is a February
    times = months.to_timestamp() + pd.to_timedelta(np.minimum(day, months.days_in_month) - 1, "D")
    table = predict(run, save(tmp_path / "a.csv", times[:80]))
    assert [*pd.to_datetime(table.index)] == [*times[80:]]


@pytest.mark.parametrize(
    ("freq", "start"),
    [
        ("BME", "2011-01-31"),
        ("BMS", "2011-02-01"),
        ("BQE-NOV", "1990-01-31"),
        ("BQS-JAN", "1990-01-31"),
        ("BYE-APR", "1900-01-01"),
        ("BYS-APR", "1900-01-01"),
    ],
)
def test_business_months_go_on_in_the_right_month_on_the_day_that_was_seen_most(
    run, tmp_path, freq, start
):
    """The last business day becomes the last day, and the first one the day that most have."""
    times = pd.date_range(start, periods=80 + H, freq=freq)
    table = predict(run, save(tmp_path / "a.csv", times[:80]))
    ahead = pd.to_datetime(table.index)
    assert [*ahead.to_period("M")] == [*times[80:].to_period("M")]
    if "E" in freq.partition("-")[0]:
        assert (ahead.day == ahead.days_in_month).all()
    else:
        counts = pd.Series(times[68:80].day).value_counts()
        assert ahead.day.nunique() == 1
        assert counts[ahead.day[0]] == counts.max()


@settings(max_examples=40, deadline=None)
@given(
    freq=st.sampled_from([*CALENDARS, "7min", "6h", "W-SUN", "2MS", "6ME", "QE-FEB", "YS-APR"]),
    back=st.integers(0, 40),
    horizon=st.integers(1, 40),
    start=st.dates(pd.Timestamp("1950-01-01").date(), pd.Timestamp("2030-01-01").date()),
)
def test_stamps_behind_and_ahead_are_those_of_the_calendar(freq, back, horizon, start):
    times = pd.date_range(start, periods=120, freq=freq)
    series = raw_series("a", np.zeros(80), freq, stamps=times[68:80].rename("date"))
    index = md.steps_after(series, horizon, back)
    assert [*index] == [*times[80 - back : 80 - back + horizon]]
    assert index.name == "date"


def stamps_like(form, start, rows, freq):
    """Texts of timestamps."""
    return pd.date_range(start, periods=rows, freq=freq).strftime(form)


SECONDS = range(1704067200, 1704067200 + 96 * 3600, 3600)  # since 1970, of 96 hours


@pytest.mark.parametrize(
    ("stamps", "first"),
    [
        (
            stamps_like("%Y-%m-%dT%H:%M:%S+08:00", "2024-01-01", 96, "h"),
            "2024-01-05T00:00:00+08:00",
        ),
        (stamps_like("%Y-%m-%dT%H:%M:%SZ", "2024-01-01", 96, "h"), "2024-01-05T00:00:00Z"),
        (
            stamps_like("%Y-%m-%d %H:%M:%S -0530", "2024-01-01", 96, "h"),
            "2024-01-05 00:00:00 -0530",
        ),
        (stamps_like("%Y年%m月%d日", "2024-01-01", 89, "D"), "2024年03月30日"),
        (stamps_like("%Y%m%d", "2024-01-01", 91, "D"), 20240401),
        (SECONDS, 1704412800),
    ],
    ids=["offset", "UTC", "offset after a space", "Chinese", "digits", "seconds since 1970"],
)
def test_stamps_go_on_in_their_own_form_on_their_own_clock(run, tmp_path, stamps, first):
    table = predict(run, save(tmp_path / "a.csv", stamps))
    assert table.index[0] == first


def test_daylight_saving_goes_on_in_utc(run, tmp_path):
    times = pd.date_range("2024-03-29", periods=90, freq="h", tz="Europe/Berlin")
    table = predict(run, save(tmp_path / "a.csv", times))
    expected = pd.date_range(times[-1] + pd.Timedelta("1h"), periods=H, freq="h")
    assert [*table.index] == [*expected.tz_convert("UTC").astype(str)]


def test_business_days_on_a_clock_east_of_greenwich_are_business_days(tmp_path):
    times = pd.date_range("2024-01-01", periods=60, freq="B", tz="Asia/Shanghai")
    (series,) = md.read_series(save(tmp_path / "a.csv", times), "a.csv", read_config()).series
    assert series.freq == "B"


def test_a_file_without_timestamps_counts_steps(run, tmp_path):
    pd.DataFrame({"value": np.sin(np.arange(90))}).to_csv(tmp_path / "a.csv", index=False)
    table = predict(run, tmp_path / "a.csv")
    assert table.index.name == "step"
    assert [*table.index] == [*range(1, H + 1)]


def test_every_column_is_a_series_and_columns_choose(run, tmp_path):
    b = 100 + np.arange(90) ** 2 % 7.0
    path = save(tmp_path / "a.csv", hours(90), a=np.cos(np.arange(90)), b=b)
    first = changed(run, tmp_path / "first.pt", columns=["first"])
    every = changed(run, tmp_path / "every.pt", columns=["all"])
    assert [*predict(first, path).columns] == ["value"]  # as it was trained
    assert [*predict(every, path).columns] == ["value", "a", "b"]
    assert [*predict(first, path, "--columns", "all").columns] == ["value", "a", "b"]
    both = predict(run, path, "--columns", "b", "a")
    assert [*both.columns] == ["b", "a"]
    alone = predict(run, path, "--columns", "b")
    assert both["b"].to_numpy() == pytest.approx(alone["b"].to_numpy())


def test_a_long_file_gives_a_column_per_series_at_its_own_times(run, tmp_path):
    frames = []
    for number, (key, start) in enumerate({"x": "2024-01-01", "y": "2024-01-01 05:00"}.items()):
        times = pd.date_range(start, periods=90, freq="h")
        values = np.sin(np.arange(90) + number)
        frames.append(pd.DataFrame({"unique_id": key, "ds": times, "y": values}))
    pd.concat(frames).to_csv(tmp_path / "a.csv", index=False)
    table = predict(run, tmp_path / "a.csv")
    assert [*table.columns] == ["x", "y"]
    assert table.index.name == "ds"
    assert len(table) == H + 5
    assert table["x"].notna().to_numpy().tolist() == [True] * H + [False] * 5
    assert table["y"].notna().to_numpy().tolist() == [False] * 5 + [True] * H


@settings(max_examples=15, deadline=None)
@given(st.integers(-9, 9), st.sampled_from([0.0, 1.0, -3e6, 1e9]), st.integers(0, 99))
def test_the_forecast_moves_with_the_unit(student, scale, offset, seed):
    context = np.random.default_rng(seed).standard_normal(L).cumsum()
    plain = forecast_of(student, context)
    moved = forecast_of(student, context * 10.0**scale + offset)
    tolerance = 1e-4 * 10.0**scale + 1e-10 * abs(offset)
    assert moved.dtype == np.float64
    error = np.abs(moved - (plain * 10.0**scale + offset)).max()
    assert error < tolerance * max(1, np.abs(plain).max())


def test_too_short_a_history_is_an_error_that_says_how_long(run, tmp_path, capsys):
    path = save(tmp_path / "a.csv", hours(L - 1))
    assert predict(run, path) == 2
    error = capsys.readouterr().err
    assert f"{L - 1} rows" in error
    assert f"takes {L}" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out.csv").exists()
    assert len(predict(run, save(path, hours(L)))) == H


def test_too_short_a_history_is_an_offer_of_a_student_that_fits(run, tmp_path, capsys):
    assert predict(run, save(tmp_path / "a.csv", hours(50))) == 2
    command = capsys.readouterr().err.strip().splitlines()[-1]
    words = shlex.split(command)
    assert words[:2] == ["python", "moirai_distill.py"]
    args = md.parse_arguments([*words[2:], "--alpha", "0"])
    assert args.data_dir == str(tmp_path / "a.csv")
    assert args.context_length + args.prediction_length < 50
    md.load_data(md.pick(md.DataConfig, args), md.pick(md.ReadConfig, args), quiet_voice())
    assert predict(run, save(tmp_path / "b.csv", hours(5))) == 2
    assert "moirai_distill.py" not in capsys.readouterr().err  # no length does


def test_another_frequency_is_a_warning(run, tmp_path, capsys):
    predict(run, save(tmp_path / "a.csv", hours(90)))
    assert "WARNING" not in capsys.readouterr().err
    predict(run, save(tmp_path / "a.csv", pd.date_range("2024-01-01", periods=90, freq="D")))
    assert "WARNING: a.csv: its step is D, the student was trained on h" in capsys.readouterr().err


def test_missing_values_in_the_context_are_interpolated_and_counted(run, tmp_path, capsys):
    values = np.sin(np.arange(90.0))
    filled = values.copy()
    values[[40, 41, 42, 60]] = np.nan
    filled[39:44] = np.linspace(filled[39], filled[43], 5)
    filled[60] = (filled[59] + filled[61]) / 2
    table = predict(run, save(tmp_path / "a.csv", hours(90), values))
    assert "4 missing values in the context are filled in" in capsys.readouterr().err
    whole = predict(run, save(tmp_path / "b.csv", hours(90), filled))
    assert table["value"].to_numpy() == pytest.approx(whole["value"].to_numpy(), rel=1e-9)


def test_missing_values_at_the_end_carry_the_last_one_with_a_warning(run, tmp_path, capsys):
    values = np.sin(np.arange(90.0))
    carried = values.copy()
    carried[-3:] = values[-4]
    values[-3:] = [np.nan, np.inf, np.nan]
    table = predict(run, save(tmp_path / "a.csv", hours(90), values))
    error = capsys.readouterr().err
    assert "WARNING: a.csv: its last 3 values are missing" in error
    assert "are filled in" not in error
    whole = predict(run, save(tmp_path / "b.csv", hours(90), carried))
    assert table["value"].to_numpy() == pytest.approx(whole["value"].to_numpy(), rel=1e-9)
    assert table.index[0] == "2024-01-04 18:00:00"  # after the last row, missing or not


def test_a_series_without_a_value_in_its_context_is_skipped_with_that_reason(run, tmp_path, capsys):
    values = np.sin(np.arange(150.0))
    gone = np.where(np.arange(150) < 150 - L, values, np.nan)
    path = save(tmp_path / "a.csv", hours(150), gone, other=values)
    assert [*predict(run, path, "--columns", "all").columns] == ["other"]
    reason = f"a.csv / value: nothing but missing values in its last {L} rows"
    assert reason in capsys.readouterr().err
    assert predict(run, path, "--columns", "value") == 2
    assert "nothing but missing values" in capsys.readouterr().err


def test_backtest_holds_the_last_steps_out_and_shows_the_error(run, tmp_path, capsys):
    frame = hourly(200, seed=4)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame[:-H].to_csv(tmp_path / "b.csv", index=False)
    checkpoint = changed(run, tmp_path / "run.pt", season="auto")
    table = predict(checkpoint, tmp_path / "a.csv", "--backtest")
    ahead = predict(checkpoint, tmp_path / "b.csv")
    assert [*table.index] == [*frame["date"][-H:].astype(str)]
    pd.testing.assert_frame_equal(table, ahead)  # nothing of the last H steps is seen

    values = frame["value"].to_numpy()
    truth = values[-H:]
    context = values[-H - L : -H]
    unit = np.abs(context[24:] - context[:-24]).mean()
    forecasts = {"student": table["value"].to_numpy(), "seasonal-naive": context[-24 : -24 + H]}
    out = capsys.readouterr().out
    for name, forecast in forecasts.items():
        error = np.abs(forecast - truth)
        mae = error.mean()
        rmse = np.sqrt((error**2).mean())
        assert f"{name:<15} MAE {mae:.6g}  RMSE {rmse:.6g}  MASE {mae / unit:.4f}" in out


def test_a_backtest_on_data_of_the_training_says_so(run, trained, tmp_path, capsys):
    own = trained / "data" / "s00.csv"
    words = ["predict", "--lang", "en", "--checkpoint", str(run), "--output", str(tmp_path / "o")]
    assert md.main([*words, "--input", str(own), "--backtest"]) == 0
    assert "is among the data that the student was trained on" in capsys.readouterr().err
    assert md.main([*words, "--input", str(own)]) == 0
    assert "among the data" not in capsys.readouterr().err
    copy = save(tmp_path / "a.csv", hours(90))
    assert md.main([*words, "--input", str(copy), "--backtest"]) == 0
    assert "among the data" not in capsys.readouterr().err


def test_a_backtest_without_a_known_value_says_so_and_compares_the_other_columns(
    run, tmp_path, capsys
):
    frame = hourly(200, seed=4)
    frame["gone"] = frame["value"].where(np.arange(200) < 200 - H)
    frame.to_csv(tmp_path / "a.csv", index=False)
    table = predict(run, tmp_path / "a.csv", "--backtest", "--columns", "all")
    assert [*table.columns] == ["value", "gone"]
    assert table.notna().all(axis=None)
    out, err = capsys.readouterr()
    assert f"gone: its last {H} values are missing, the forecast cannot be compared" in err
    assert out.count("MASE") == 2
    assert "nan" not in out


@pytest.mark.parametrize("words", [[], ["--backtest"]])
def test_plot_draws_a_picture_beside_the_output(run, tmp_path, words):
    predict(run, save(tmp_path / "a.csv", hours(90)), "--plot", *words)
    assert (tmp_path / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("words", [[], ["--backtest"]])
def test_the_picture_shows_the_forecast_at_its_own_times(run, tmp_path, monkeypatch, words):
    drawn = []
    monkeypatch.setattr(md, "draw", lambda path, panels: drawn.append((path, panels)))
    path = save(tmp_path / "a.csv", hours(90))
    table = predict(run, path, "--plot", *words)
    ((picture, (panel,)),) = drawn
    assert picture == tmp_path / "out.png"
    assert [*panel.ahead.astype(str)] == [*table.index]
    assert panel.curves["forecast"] == pytest.approx(table["value"].to_numpy(), rel=1e-9)
    assert [*panel.steps] == [*hours(90)[-len(panel.known) :]]
    assert panel.known == pytest.approx(np.sin(np.arange(90))[-len(panel.known) :])


def test_the_picture_of_a_backtest_shows_seasonal_naive_and_that_of_many_series_says_so(
    run, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(md, "draw", lambda _path, panels: drawn.append(panels))
    values = np.random.default_rng(0).normal(size=(90, 6)).cumsum(0)
    frame = pd.DataFrame(values, columns=[f"v{number}" for number in range(6)])
    frame.insert(0, "date", hours(90))
    frame.to_csv(tmp_path / "a.csv", index=False)
    predict(run, tmp_path / "a.csv", "--columns", "all", "--plot", "--backtest")
    predict(run, tmp_path / "a.csv", "--plot", "--columns", "v0")
    many, (one,) = drawn
    assert many[0].heading == f"{len(many)} of 6 series"
    assert [panel.y_label for panel in many] == [f"v{number}" for number in range(len(many))]
    for number, panel in enumerate(many):
        before = values[: 90 - H, number]
        naive = before[-24:][np.arange(H) % 24]
        assert panel.curves["seasonal-naive"] == pytest.approx(naive)
        assert panel.begins == hours(90)[-H - 1]
        assert panel.x_label == "date"
    assert one.heading == ""
    assert [*one.curves] == ["forecast"]
    assert one.begins == hours(90)[-1]


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("a.csv", "a.csv"),
        ("a.csv", "sub/../a.csv"),
        ("link.csv", "a.csv"),
        ("a.csv", "link.csv"),
    ],
)
def test_the_input_is_never_overwritten(run, tmp_path, capsys, source, output):
    path = save(tmp_path / "a.csv", hours(90))
    before = path.read_bytes()
    (tmp_path / "link.csv").symlink_to(path)
    (tmp_path / "sub").mkdir()
    places = ["--input", str(tmp_path / source), "--output", str(tmp_path / output)]
    assert md.main(["predict", "--checkpoint", str(run), *places]) == 2
    assert "is the input" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_the_picture_does_not_replace_the_forecast(run, tmp_path, capsys):
    path = save(tmp_path / "a.csv", hours(90))
    places = ["--input", str(path), "--output", str(tmp_path / "p.png")]
    assert md.main(["predict", "--checkpoint", str(run), *places, "--plot"]) == 2
    assert "the picture" in capsys.readouterr().err
    assert not (tmp_path / "p.png").exists()


def test_small_changes_beside_a_large_offset_reach_the_file(run, student, tmp_path):
    values = 1e9 + 1e-3 * np.random.default_rng(0).standard_normal(90).cumsum()
    path = save(tmp_path / "a.csv", hours(90), [repr(value) for value in values.tolist()])
    expected = forecast_of(student, values[-L:])
    table = predict(run, path)
    assert table["value"].to_numpy() == pytest.approx(expected, rel=0, abs=5e-7)  # a few ulp


@pytest.mark.parametrize("where", [-1, -20])
def test_a_glitch_in_the_context_counts_as_missing(run, tmp_path, capsys, where):
    broken = np.sin(np.arange(90.0))
    gone = broken.copy()
    broken[where] = 1e12
    gone[where] = np.nan
    table = predict(run, save(tmp_path / "a.csv", hours(90), broken))
    expected = predict(run, save(tmp_path / "b.csv", hours(90), gone))
    pd.testing.assert_frame_equal(table, expected)
    assert capsys.readouterr().err.count("missing") == 2


def test_a_backtest_uses_the_seasonal_period_of_the_run(run, tmp_path, capsys):
    hourly(200).to_csv(tmp_path / "a.csv", index=False)
    naive = []
    for season in ("auto", 24, 12):
        checkpoint = changed(run, tmp_path / "a.pt", season=season)
        predict(checkpoint, tmp_path / "a.csv", "--backtest")
        lines = capsys.readouterr().out.splitlines()
        naive.append([line for line in lines if "seasonal-naive" in line])
    auto, daily, half_daily = naive
    assert auto == daily != half_daily


def test_a_file_that_cannot_be_used_is_one_line(run, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("date,words\n2024-01-01,a\n2024-01-02,b\n")
    assert predict(run, tmp_path / "a.csv") == 2
    error = capsys.readouterr().err
    assert "no numeric column" in error
    assert len(error.strip().splitlines()) == 1


# Runs commands where some packages cannot be imported; prints their exit codes.
CHILD = """
import json, sys

for name in json.loads(sys.argv[1]):
    sys.modules[name] = None  # to import it is a ModuleNotFoundError
import moirai_distill

print([moirai_distill.main(words) for words in json.loads(sys.argv[2])])
"""


SLOW = {"torch._dynamo", "torch._inductor", "sympy", "lightning", "sklearn", "scipy", "matplotlib"}
SLOW |= {"huggingface_hub", "httpx", "safetensors", "torch.utils.tensorboard", "uni2ts"}


def test_to_predict_imports_nothing_that_a_forecast_does_not_need(run, tmp_path):
    path = save(tmp_path / "a.csv", hours(90))
    output = tmp_path / "out.csv"
    words = ["predict", "--checkpoint", run, "--input", path, "--output", output]
    assert modules_after(*words) & SLOW == set()
    assert len(pd.read_csv(output)) == H


@pytest.mark.parametrize("words", [["predict", "--help"], ["--data_dir", "nope", "--alpha", "5"]])
def test_help_and_an_argument_error_import_nothing_slow(words):
    assert modules_after(*words) & SLOW == set()


def test_predict_runs_where_only_torch_numpy_pandas_and_tqdm_are(run, tmp_path):
    blocked = ["uni2ts", "lightning", "sklearn", "scipy", "gluonts"]
    blocked += ["matplotlib", "tensorboard", "safetensors", "huggingface_hub"]
    (tmp_path / "exported").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "exported" / name).write_text("{}")
    path = save(tmp_path / "a.csv", hours(90))
    output = tmp_path / "out.csv"
    words = ["predict", "--lang", "en", "--input", str(path), "--output", str(output)]
    commands = [
        [*words, "--checkpoint", str(run), "--backtest"],
        [*words, "--checkpoint", str(run), "--plot"],
        [*words, "--checkpoint", str(tmp_path / "exported")],
    ]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(blocked), json.dumps(commands)],
        cwd=SCRIPT.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[0, 2, 2]"
    assert len(pd.read_csv(output)) == H
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "pip install matplotlib" in errors[0]
    assert "pip install safetensors" in errors[1]


# -- How the input is read, and the output written -------------------------------------------------


def in_german(path, rows):
    """A CSV of hours with decimal commas; returns (path, values)."""
    values = np.round(50 + 10 * np.sin(np.arange(rows) * 2 * np.pi / 24), 2)
    lines = [
        f"{time:%d.%m.%Y %H:%M};{str(value).replace('.', ',')}"
        for time, value in zip(hours(rows), values, strict=True)
    ]
    path.write_text("\n".join(["Zeit;Wert", *lines]) + "\n")
    return path, values


def test_the_output_is_written_as_the_input_is_and_goes_on(run, tmp_path):
    path, values = in_german(tmp_path / "a.csv", 90)
    output = tmp_path / "out.csv"
    argv = ["predict", "--checkpoint", run, "--input", path, "--output", output, "--lang", "en"]
    argv += ["--levels", "none"]
    assert md.main([*map(str, argv)]) == 0
    header, *rows = output.read_text().splitlines()
    assert header == "Zeit;Wert"
    assert rows[0].startswith("04.01.2024 18:00;")
    assert "," in rows[0]
    path.write_text(path.read_text() + "\n".join(rows) + "\n")
    (series,) = md.read_series(path, path.name, read_config()).series
    assert len(series.values) == 90 + H
    np.testing.assert_array_equal(series.values[:90], values)


def test_an_output_that_ends_with_gz_is_packed(run, tmp_path):
    path = save(tmp_path / "a.csv", hours(90))
    output = tmp_path / "out.csv.gz"
    argv = ["predict", "--checkpoint", run, "--input", path, "--output", output, "--lang", "en"]
    assert md.main([*map(str, argv)]) == 0
    assert output.read_bytes()[:2] == b"\x1f\x8b"
    assert len(pd.read_csv(output)) == H


def test_what_the_run_says_of_reading_holds_and_a_flag_wins(run, tmp_path, capsys):
    path = save(tmp_path / "a.csv", hours(90), b=np.cos(np.arange(90)))
    named = changed(run, tmp_path / "named.pt", columns=["b"], time_column=["none"])
    assert [*predict(named, path).columns] == ["b"]
    assert "no timestamps" in capsys.readouterr().err
    table = predict(named, path, "--columns", "value", "--time_column", "date")
    assert [*table.columns] == ["value"]
    assert table.index[0] == "2024-01-04 18:00:00"


def test_a_name_in_the_header_is_never_a_formula(run, tmp_path):
    path = tmp_path / "a.csv"
    save(path, hours(90)).write_text(path.read_text().replace("value", "=1+2", 1))
    assert [*predict(run, path, "--columns", "=1+2").columns] == ["'=1+2"]


@pytest.mark.parametrize("name", ["f.csv", "f.csv.gz", "f.CSV.GZ", "f"])
def test_the_picture_of_any_output_is_called_as_it_is(run, tmp_path, capsys, name):
    path = save(tmp_path / "a.csv", hours(90))
    places = ["--checkpoint", run, "--input", path, "--output", tmp_path / name]
    assert md.main(["predict", "--lang", "en", *map(str, places), "--plot"]) == 0
    assert (tmp_path / "f.png").is_file()
    assert str(tmp_path / "f.png") in capsys.readouterr().out


def test_a_picture_goes_through_a_link_and_never_beside_a_device(run, tmp_path, capsys):
    path = save(tmp_path / "a.csv", hours(90))
    (tmp_path / "out.png").symlink_to(tmp_path / "target.png")
    predict(run, path, "--plot")
    assert (tmp_path / "out.png").is_symlink()
    assert (tmp_path / "target.png").read_bytes().startswith(b"\x89PNG")
    places = ["--checkpoint", run, "--input", path, "--output", "/dev/null"]
    assert md.main(["predict", "--lang", "en", *map(str, places), "--plot"]) == 2
    assert "--output /dev/null: is no file" in capsys.readouterr().err


def test_data_in_the_home_folder_of_somebody_unknown_stops_no_forecast(run, tmp_path):
    path = save(tmp_path / "a.csv", hours(90))
    away = changed(run, tmp_path / "away.pt", data_dir="~nobody-here/data", save_dir="~nobody-here")
    assert len(predict(away, path, "--backtest")) == H


def test_the_time_column_in_the_header_is_never_a_formula(run, tmp_path):
    path = save(tmp_path / "a.csv", hours(90), name="=1+2")
    assert predict(run, path).index.name == "'=1+2"


def test_a_parquet_file_goes_on_as_a_csv_does_and_the_forecast_is_a_csv(run, tmp_path, capsys):
    path = save(tmp_path / "a.csv", hours(90))
    expected = predict(run, path)
    pd.read_csv(path, parse_dates=["date"]).to_parquet(tmp_path / "a.parquet")
    found = predict(run, tmp_path / "a.parquet")
    pd.testing.assert_frame_equal(found, expected)
    assert predict(run, path, "--output", tmp_path / "b.parquet") == 2
    assert "b.parquet: a CSV is written; let its name end with .csv" in capsys.readouterr().err
