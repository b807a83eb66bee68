"""predict: the next steps of a user's own file, in its units and on its own calendar."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SCRIPT, hourly
from hypothesis import given, settings
from hypothesis import strategies as st

import moirai_distill as m

L, H = 64, 16


def predict(checkpoint, file, *words):
    output = file.with_name("out.csv")
    words = ["--checkpoint", checkpoint, "--input", file, "--output", output, "--lang", "en", *words]
    code = m.main(["predict", *map(str, words)])
    return pd.read_csv(output, index_col=0) if code == 0 else code


def save(path, times, values=None, name="date", **columns):
    """A CSV of these times and values; returns its path."""
    values = np.sin(np.arange(len(times))) if values is None else values
    pd.DataFrame({name: times, "value": values, **columns}).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def run(trained):
    return trained / "distilled"


def test_the_forecast_is_the_students_in_the_files_own_units(run, tmp_path):
    frame = hourly(200, seed=3)
    frame["value"] = 1e4 + 250 * frame["value"]
    frame.to_csv(tmp_path / "a.csv", index=False)
    table = predict(run, tmp_path / "a.csv")
    with torch.inference_mode():
        expected = m.PatchStudent.from_pretrained(run)(torch.from_numpy(frame["value"].to_numpy()[None, -L:]))[0]
    assert table.index.name == "date" and [*table.columns] == ["value"] and len(table) == H
    assert table["value"].to_numpy() == pytest.approx(expected.numpy(), rel=1e-9)
    assert table.index[0] == "2024-01-09 08:00:00" and table.index[-1] == "2024-01-09 23:00:00"


def test_an_output_can_be_put_after_its_input(run, tmp_path):
    path = save(tmp_path / "a.csv", pd.date_range("2024-01-01", periods=100, freq="h"), name="Time")
    predict(run, path)
    (tmp_path / "b.csv").write_text(path.read_text() + (tmp_path / "out.csv").read_text().partition("\n")[2])
    (series,), _ = m.read_series(tmp_path / "b.csv", "b.csv", ["first"])
    assert series.freq == "h" and len(series.values) == 100 + H and np.isfinite(series.values).all()


CALENDARS = {  # frequency, number of rows, first date
    "h": ("2024-03-30", 90),
    "15min": ("2024-01-01", 90),
    "D": ("2024-01-20", 90),
    "B": ("2024-01-03", 90),
    "W-WED": ("2022-01-05", 90),
    "MS": ("2010-01-01", 90),
    "ME": ("2011-01-31", 90),
    "BME": ("2011-01-31", 90),
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
    path = save(tmp_path / "a.csv", times[:rows])
    table = predict(run, path)
    expected = pd.DataFrame(index=times[rows:]).to_csv(header=False).replace(',""', "").split("\n")[:-1]
    assert [*table.index] == [line.rstrip(",") for line in expected]


@pytest.mark.parametrize("day", [15, 28, 30, 31])
def test_months_on_any_day_keep_that_day(run, tmp_path, day):
    months = pd.period_range("2012-07", periods=80 + H, freq="M")  # the 80th is a February
    times = months.to_timestamp() + pd.to_timedelta(np.minimum(day, months.days_in_month) - 1, "D")
    table = predict(run, save(tmp_path / "a.csv", times[:80]))
    assert [*pd.to_datetime(table.index)] == [*times[80:]]


@settings(max_examples=40, deadline=None)
@given(
    freq=st.sampled_from([*CALENDARS, "7min", "6h", "W-SUN", "BMS", "BQE-NOV", "BYS-APR"]),
    back=st.integers(0, 40),
    horizon=st.integers(1, 40),
    start=st.dates(pd.Timestamp("1950-01-01").date(), pd.Timestamp("2030-01-01").date()),
)
def test_stamps_behind_and_ahead_are_those_of_the_calendar(freq, back, horizon, start):
    times = pd.date_range(start, periods=120, freq=freq)
    series = m.Series("a", np.zeros(80), freq, times[68:80].rename("date"), "a")
    index = m.continued(series, horizon, back)
    assert [*index] == [*times[80 - back : 80 - back + horizon]] and index.name == "date"


@pytest.mark.parametrize(
    ("stamps", "first"),
    [
        ([f"2024-01-{d:02d}T{h:02d}:00:00+08:00" for d in range(1, 5) for h in range(24)], "2024-01-05 00:00:00+08:00"),
        ([f"2024-01-{d:02d}T{h:02d}:00:00Z" for d in range(1, 5) for h in range(24)], "2024-01-05 00:00:00+00:00"),
        ([f"2024-01-{d:02d} {h:02d}:00:00 -0530" for d in range(1, 5) for h in range(24)], "2024-01-05 00:00:00-05:30"),
        (
            [f"2024年01月{d:02d}日" for d in range(1, 32)] * 1
            + [f"2024年{k:02d}月{d:02d}日" for k in (2, 3) for d in range(1, 30)],
            "2024-03-30",
        ),
        ([1704067200 + 3600 * i for i in range(96)], "2024-01-05 00:00:00"),
        (
            [20240101 + d for d in range(31)] + [20240201 + d for d in range(29)] + [20240301 + d for d in range(31)],
            "2024-04-01",
        ),
    ],
)
def test_stamps_of_other_forms_go_on_in_pandas_form_on_their_own_clock(run, tmp_path, stamps, first):
    table = predict(run, save(tmp_path / "a.csv", stamps))
    assert table.index[0] == first


def test_daylight_saving_goes_on_in_utc(run, tmp_path):
    times = pd.date_range("2024-03-29", periods=90, freq="h", tz="Europe/Berlin")
    table = predict(run, save(tmp_path / "a.csv", times))
    expected = pd.date_range(times[-1] + pd.Timedelta("1h"), periods=H, freq="h")
    assert [*table.index] == [*expected.tz_convert("UTC").astype(str)]


def test_business_days_on_a_clock_east_of_greenwich_are_business_days(tmp_path):
    times = pd.date_range("2024-01-01", periods=60, freq="B", tz="Asia/Shanghai")
    (series,), _ = m.read_series(save(tmp_path / "a.csv", times), "a.csv", ["first"])
    assert series.freq == "B"


def test_a_file_without_timestamps_counts_steps(run, tmp_path):
    pd.DataFrame({"value": np.sin(np.arange(90))}).to_csv(tmp_path / "a.csv", index=False)
    table = predict(run, tmp_path / "a.csv")
    assert table.index.name == "step" and [*table.index] == [*range(1, H + 1)]


def test_every_column_is_a_series_and_columns_choose(run, tmp_path):
    times = pd.date_range("2024-01-01", periods=90, freq="h")
    path = save(tmp_path / "a.csv", times, a=np.cos(np.arange(90)), b=100 + np.arange(90) % 7.0)
    assert [*predict(run, path).columns] == ["value"]  # the student was trained on `first`
    assert [*predict(run, path, "--columns", "all").columns] == ["value", "a", "b"]
    both = predict(run, path, "--columns", "b", "a")
    assert [*both.columns] == ["b", "a"]
    assert both["b"].to_numpy() == pytest.approx(predict(run, path, "--columns", "b")["b"].to_numpy())


def test_a_long_file_gives_a_column_per_series_at_its_own_times(run, tmp_path):
    one, other = (pd.date_range(start, periods=90, freq="h") for start in ("2024-01-01", "2024-01-01 05:00"))
    frames = [
        pd.DataFrame({"unique_id": k, "ds": t, "y": np.sin(np.arange(90) + i)})
        for i, (k, t) in enumerate({"x": one, "y": other}.items())
    ]
    pd.concat(frames).to_csv(tmp_path / "a.csv", index=False)
    table = predict(run, tmp_path / "a.csv")
    assert [*table.columns] == ["x", "y"] and table.index.name == "ds" and len(table) == H + 5
    assert table["x"].notna().to_numpy().tolist() == [True] * H + [False] * 5
    assert table["y"].notna().to_numpy().tolist() == [False] * 5 + [True] * H


@settings(max_examples=15, deadline=None)
@given(st.integers(-9, 9), st.sampled_from([0.0, 1.0, -3e6, 1e9]), st.integers(0, 99))
def test_the_forecast_moves_with_the_unit(run, scale, offset, seed):
    rng = np.random.default_rng(seed)
    context = rng.standard_normal(L).cumsum()
    student = m.PatchStudent.from_pretrained(run)
    with torch.inference_mode():
        plain, moved = (student(torch.from_numpy(x[None]))[0] for x in (context, context * 10.0**scale + offset))
    tolerance = 1e-4 * 10.0**scale + 1e-10 * abs(offset)
    assert moved.dtype == torch.float64
    assert (moved - (plain * 10.0**scale + offset)).abs().max() < tolerance * max(1, float(plain.abs().max()))


def test_too_short_a_history_is_an_error_that_says_how_long(run, tmp_path, capsys):
    path = save(tmp_path / "a.csv", pd.date_range("2024-01-01", periods=L - 1, freq="h"))
    assert predict(run, path) == 2
    error = capsys.readouterr().err
    assert f"{L - 1} rows" in error and f"takes {L}" in error and not (tmp_path / "out.csv").exists()
    assert "Traceback" not in error
    assert len(predict(run, save(path, pd.date_range("2024-01-01", periods=L, freq="h")))) == H


def test_another_frequency_is_a_warning(run, tmp_path, capsys):
    predict(run, save(tmp_path / "a.csv", pd.date_range("2024-01-01", periods=90, freq="h")))
    assert "WARNING" not in capsys.readouterr().err
    predict(run, save(tmp_path / "a.csv", pd.date_range("2024-01-01", periods=90, freq="D")))
    assert "WARNING: a.csv: its step is D, the student was trained on h" in capsys.readouterr().err


def test_missing_values_in_the_context_are_interpolated_and_counted(run, tmp_path, capsys):
    times, values = pd.date_range("2024-01-01", periods=90, freq="h"), np.sin(np.arange(90.0))
    filled = values.copy()
    values[[40, 41, 42, 60]] = np.nan
    filled[39:44], filled[60] = np.linspace(filled[39], filled[43], 5), (filled[59] + filled[61]) / 2
    table = predict(run, save(tmp_path / "a.csv", times, values))
    assert "4 missing values in the context are interpolated" in capsys.readouterr().err
    whole = predict(run, save(tmp_path / "b.csv", times, filled))
    assert table["value"].to_numpy() == pytest.approx(whole["value"].to_numpy(), rel=1e-9)


def test_missing_values_at_the_end_carry_the_last_one_with_a_warning(run, tmp_path, capsys):
    times, values = pd.date_range("2024-01-01", periods=90, freq="h"), np.sin(np.arange(90.0))
    carried = values.copy()
    values[-3:], carried[-3:] = [np.nan, np.inf, np.nan], values[-4]
    table = predict(run, save(tmp_path / "a.csv", times, values))
    error = capsys.readouterr().err
    assert "WARNING: a.csv: its last 3 values are missing" in error and "are interpolated" not in error
    whole = predict(run, save(tmp_path / "b.csv", times, carried))
    assert table["value"].to_numpy() == pytest.approx(whole["value"].to_numpy(), rel=1e-9)
    assert table.index[0] == "2024-01-04 18:00:00"  # after the last row, missing or not


def test_a_series_without_a_value_in_its_context_is_skipped_with_that_reason(run, tmp_path, capsys):
    times, values = pd.date_range("2024-01-01", periods=150, freq="h"), np.sin(np.arange(150.0))
    gone = np.where(np.arange(150) < 150 - L, values, np.nan)
    path = save(tmp_path / "a.csv", times, gone, other=values)
    assert [*predict(run, path, "--columns", "all").columns] == ["other"]
    assert f"a.csv / value: nothing but missing values in its last {L} rows" in capsys.readouterr().err
    assert predict(run, path) == 2
    assert "nothing but missing values" in capsys.readouterr().err


def test_backtest_holds_the_last_steps_out_and_shows_the_error(run, tmp_path, capsys):
    frame = hourly(200, seed=4)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame[:-H].to_csv(tmp_path / "b.csv", index=False)
    table, ahead = predict(run, tmp_path / "a.csv", "--backtest"), predict(run, tmp_path / "b.csv")
    assert [*table.index] == [*frame["date"][-H:].astype(str)]
    pd.testing.assert_frame_equal(table, ahead)  # nothing of the last H steps is seen
    error = np.abs(table["value"].to_numpy() - frame["value"][-H:].to_numpy())
    naive = np.abs(frame["value"].to_numpy()[-H - 24 : -24] - frame["value"][-H:].to_numpy())
    context = frame["value"].to_numpy()[-H - L : -H]
    unit = np.abs(context[24:] - context[:-24]).mean()
    out = capsys.readouterr().out
    for name, e in (("student", error), ("seasonal-naive", naive)):
        line = f"{name:<15} MAE {e.mean():.6g}  RMSE {np.sqrt((e**2).mean()):.6g}  MASE {e.mean() / unit:.4f}"
        assert line in out


def test_a_backtest_without_a_known_value_says_so_and_compares_the_other_columns(run, tmp_path, capsys):
    frame = hourly(200, seed=4)
    frame["gone"] = frame["value"].where(np.arange(200) < 200 - H)
    frame.to_csv(tmp_path / "a.csv", index=False)
    table = predict(run, tmp_path / "a.csv", "--backtest", "--columns", "all")
    assert [*table.columns] == ["value", "gone"] and table.notna().all(axis=None)
    out, err = capsys.readouterr()
    assert f"gone: its last {H} values are missing, the forecast cannot be compared" in err
    assert out.count("MASE") == 2 and "nan" not in out


def test_plot_draws_a_picture_beside_the_output(run, tmp_path):
    for words in ([], ["--backtest"]):
        path = save(tmp_path / "a.csv", pd.date_range("2024-01-01", periods=90, freq="h"))
        predict(run, path, "--plot", *words)
        assert (tmp_path / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        (tmp_path / "out.png").unlink()


def test_the_input_is_never_overwritten(run, tmp_path, capsys):
    path = save(tmp_path / "a.csv", pd.date_range("2024-01-01", periods=90, freq="h"))
    before = path.read_bytes()
    assert m.main(["predict", "--checkpoint", str(run), "--input", str(path), "--output", str(path)]) == 2
    (tmp_path / "link.csv").symlink_to(path)
    for source, output in (("a.csv", "sub/../a.csv"), ("link.csv", "a.csv"), ("a.csv", "link.csv")):
        (tmp_path / "sub").mkdir(exist_ok=True)
        words = ["--input", str(tmp_path / source), "--output", str(tmp_path / output)]
        assert m.main(["predict", "--checkpoint", str(run), *words]) == 2
    words = ["--input", str(path), "--output", str(tmp_path / "p.png"), "--plot"]
    assert m.main(["predict", "--checkpoint", str(run), *words]) == 2
    assert capsys.readouterr().err.count("or the input") == 5 and path.read_bytes() == before


def test_small_changes_beside_a_large_offset_reach_the_file(run, tmp_path):
    values = 1e9 + 1e-3 * np.random.default_rng(0).standard_normal(90).cumsum()
    path = save(
        tmp_path / "a.csv", pd.date_range("2024-01-01", periods=90, freq="h"), [repr(v) for v in values.tolist()]
    )
    with torch.inference_mode():
        expected = m.PatchStudent.from_pretrained(run)(torch.from_numpy(values[None, -L:]))[0].numpy()
    assert predict(run, path)["value"].to_numpy() == pytest.approx(expected, rel=0, abs=5e-7)  # a few ulp


@pytest.mark.parametrize("where", [-1, -20])
def test_a_glitch_in_the_context_counts_as_missing(run, tmp_path, capsys, where):
    times, values = pd.date_range("2024-01-01", periods=90, freq="h"), np.sin(np.arange(90.0))
    broken, gone = values.copy(), values.copy()
    broken[where], gone[where] = 1e12, np.nan
    table, expected = (
        predict(run, save(tmp_path / "a.csv", times, broken)),
        predict(run, save(tmp_path / "b.csv", times, gone)),
    )
    pd.testing.assert_frame_equal(table, expected)
    assert capsys.readouterr().err.count("missing") == 2


def test_a_backtest_uses_the_seasonal_period_of_the_run(trained, tmp_path, capsys):
    content = torch.load(next((trained / "twin").glob("best*.pt")), weights_only=True)
    hourly(200).to_csv(tmp_path / "a.csv", index=False)
    lines = []
    for season in ("auto", 12):
        content["run_config"]["season"] = season
        torch.save(content, tmp_path / "a.pt")
        predict(tmp_path / "a.pt", tmp_path / "a.csv", "--backtest")
        lines.append([line for line in capsys.readouterr().out.splitlines() if "seasonal-naive" in line])
    assert lines[0] != lines[1]


def test_a_file_that_cannot_be_used_is_one_line(run, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("date,words\n2024-01-01,a\n2024-01-02,b\n")
    assert predict(run, tmp_path / "a.csv") == 2
    error = capsys.readouterr().err
    assert "no numeric column" in error and len(error.strip().splitlines()) == 1


def test_predict_runs_where_only_torch_numpy_pandas_and_huggingface_hub_are(run, tmp_path):
    (tmp_path / "blocked").mkdir()
    for name in ("uni2ts", "lightning", "sklearn", "matplotlib", "tensorboard", "safetensors", "scipy", "gluonts"):
        (tmp_path / "blocked" / f"{name}.py").write_text(f"raise ImportError('{name} is blocked')")
    path = save(tmp_path / "a.csv", pd.date_range("2024-01-01", periods=90, freq="h"))
    words = [sys.executable, SCRIPT, "predict", "--checkpoint", run, "--input", path, "--output", tmp_path / "out.csv"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "blocked")}
    done = subprocess.run([*map(str, words), "--backtest"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(pd.read_csv(tmp_path / "out.csv")) == H
    for name in ("matplotlib", "safetensors"):
        (tmp_path / "blocked" / f"{name}.py").write_text(f"raise ModuleNotFoundError('blocked', name='{name}')")
    (tmp_path / "exported").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "exported" / name).write_text("{}")
    for more, name in ((["--plot"], "matplotlib"), (["--checkpoint", tmp_path / "exported"], "safetensors")):
        done = subprocess.run([*map(str, words + more)], env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and f"pip install {name}" in done.stderr and "Traceback" not in done.stderr
