"""CSV -> regular series -> split -> windows: the values that come out."""

import dataclasses
import itertools
import os
import shlex
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    SMALL,
    data_config,
    files_read,
    hourly,
    quiet_voice,
    raw_series,
    read_config,
    split_folder,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

import moirai_distill as md

ROWS = 200  # of most series here
CONTEXT, HORIZON = 16, 8  # of most windows here
LENGTH = CONTEXT + HORIZON
# Most splits here: short windows, by time.
SHORT = {
    "context_length": CONTEXT,
    "prediction_length": HORIZON,
    "split_by": "time",
    "max_gap": 4,
}
RNG = np.random.default_rng(0)
NOISE = RNG.normal(5, 1, 1000).round(6)  # no column of it is a counter, no two values are equal
bounded = settings(max_examples=150, deadline=None)


def write(path, frame, **options):
    """Write a frame as a CSV; returns the path."""
    frame.to_csv(path, index=False, **options)
    return path


def values_at(stamps, values=NOISE):
    """Frame (date, value) with values in the order of the stamps."""
    return pd.DataFrame({"date": stamps, "value": values[: len(stamps)]})


def hours(rows, start="2024-01-01"):
    """Frame (date, value) of hourly rows."""
    return values_at(pd.date_range(start, periods=rows, freq="h"))


def passed_over(report):
    """The columns that the Report of a file says were passed over."""
    for fact in report.facts:
        if fact.sentence.startswith("passed over"):
            return [reason.values[0] for reason in fact.values[0]]
    return []


def read_one(path, *columns):
    """The only RawSeries of a CSV, and the columns passed over."""
    file = md.read_series(path, path.name, read_config(*columns))
    (series,) = file.series
    return series, passed_over(file.report)


def read_folder(folder, max_files=0):
    """FolderRead of a folder, of the first numeric column of each file."""
    return md.read_files(str(folder), max_files, read_config(), quiet_voice())


def split(series, **changes):
    """SplitData of file -> list of RawSeries; `changes` as for `data_config`."""
    return md.split_data(files_read(series), data_config(**(SHORT | changes)))


def one_file(values, freq="h"):
    """File -> list of RawSeries, of one file with one series."""
    return {"a.csv": [raw_series("a", values, freq)]}


def files_of(count, rows=40):
    """`count` files of one series each, every one with values of its own."""
    files = {}
    for number in range(count):
        name = f"f{number:02d}.csv"
        values = np.random.default_rng(number).normal(number, 1 + number, rows)
        files[name] = [raw_series(name, values)]
    return files


def members(windows, series):
    """Names of the files in a part, by their standardised values; all files have as many rows."""
    names = {}
    for name, items in series.items():
        values = items[0].values
        scaled = (values - values.mean()) / values.std()
        names[scaled.astype(np.float32).round(4).tobytes()] = name
    rows = len(values)
    return {names[chunk.round(4).tobytes()] for chunk in windows.values.reshape(-1, rows)}


# -- one file: values on a regular grid ------------------------------------------------------------


def test_missing_rows_nan_and_infinities_are_missing_values(tmp_path):
    frame = hours(60)
    expected = frame["value"].to_numpy(copy=True)
    frame.loc[3, "value"] = np.nan
    frame.loc[4, "value"] = np.inf
    frame.loc[50, "value"] = -np.inf
    expected[[3, 4, 20, 21, 22, 50]] = np.nan
    series, _ = read_one(write(tmp_path / "a.csv", frame.drop([20, 21, 22])))
    np.testing.assert_array_equal(series.values, expected)
    assert series.freq == "h"
    assert series.values.dtype == np.float64


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_order_of_rows_with_some_missing_gives_the_same_grid(tmp_path_factory, data):
    dropped = data.draw(st.sets(st.integers(1, 78), max_size=8))
    kept = data.draw(st.permutations([row for row in range(80) if row not in dropped]))
    path = write(tmp_path_factory.getbasetemp() / "order.csv", hours(80).loc[kept])
    expected = hours(80)["value"].to_numpy(copy=True)
    expected[[*dropped]] = np.nan
    np.testing.assert_array_equal(read_one(path)[0].values, expected)


@pytest.mark.parametrize("is_reversed", [False, True])
def test_of_duplicate_stamps_the_last_row_of_the_file_wins(is_reversed, tmp_path):
    frame = hours(200)
    late = pd.DataFrame({"date": frame["date"][[7, 3]], "value": [-7.0, -3.0]})
    mixed = pd.concat([frame[:100], late, frame[100:]])
    expected = frame["value"].to_numpy(copy=True)
    if is_reversed:  # newest first: now the first of the two is the last
        mixed = mixed[::-1]
    else:
        expected[[3, 7]] = -3.0, -7.0
    series, _ = read_one(write(tmp_path / "a.csv", mixed))
    np.testing.assert_array_equal(series.values, expected)


def test_more_than_one_percent_of_duplicates_skips_the_file_with_that_reason(tmp_path):
    frame = hours(197)
    other = frame.assign(value=-frame["value"])
    path = write(tmp_path / "more.csv", pd.concat([other[:2], frame]))  # 2 of 199
    with pytest.raises(md.Unusable, match="2 of 199 .*duplicate"):
        read_one(path)
    path = write(tmp_path / "less.csv", pd.concat([other[:1], frame]))  # 1 of 198
    np.testing.assert_array_equal(read_one(path)[0].values, frame["value"])


def every_months(start, months, day, count):
    """Stamps (count,) of every so many months on a day of the month, or on the last of a short one.

    `start` is the month of the first one.
    """
    stamps = []
    for number in range(count):
        month = pd.Period(start, "M") + months * number
        stamps.append(pd.Timestamp(month.year, month.month, min(day, month.days_in_month)))
    return pd.DatetimeIndex(stamps)


def calendar(start, freq):
    """100 stamps by a rule of pandas."""
    return pd.date_range(start, periods=100, freq=freq)


MONTHS = calendar("2015-01-01", "MS")
HOURS = calendar("2024-02-28", "h")
DAYS = calendar("2024-02-20", "D")
DAYS_FROM_THE_FIRST = calendar("2024-03-01", "D")
BUSINESS_DAYS = calendar("2024-02-20", "B")
SHIFT = pd.to_timedelta(np.random.default_rng(1).integers(-5, 6, 100), unit="s")
GRIDS = {
    "hour": HOURS,
    "15 minutes": calendar("2024-02-28 00:07", "15min"),
    "10 seconds": calendar("2024-02-28", "10s"),
    "day": DAYS,
    "business day": BUSINESS_DAYS,
    "business day at 16:00": BUSINESS_DAYS + pd.Timedelta("16h"),
    "week": calendar("2024-02-21", "W-WED"),
    "month start": MONTHS,
    "month end": calendar("2015-01-31", "ME"),
    "business month start": calendar("2015-01-01", "BMS"),
    "business month end": calendar("2015-01-01", "BME"),
    "quarter start": calendar("1990-01-01", "QS"),
    "quarter end": calendar("1990-01-01", "QE"),
    "quarter end in February": calendar("1990-01-01", "QE-FEB"),
    "year end": calendar("1900-01-01", "YE"),
    "the 5th of each month": every_months("2015-01", 1, 5, 100),
    "the 15th of each month": every_months("2015-01", 1, 15, 100),
    "the 28th of each month": every_months("2015-01", 1, 28, 100),
    "the 30th, or the last day": every_months("2015-01", 1, 30, 100),
    "the 15th of each third month": every_months("1990-02", 3, 15, 100),
    "hours that jitter": HOURS + SHIFT,
    "days that jitter": calendar("2024-02-20 09:30", "D") + SHIFT,
    "hours with a zone": HOURS.tz_localize("UTC").tz_convert("Asia/Tokyo"),
    "hours across the end of summer time": pd.date_range(
        "2024-10-25", periods=100, freq="h", tz="Europe/Berlin"
    ),
    "Z": HOURS.strftime("%Y-%m-%dT%H:%M:%SZ"),
    "epoch seconds": HOURS.as_unit("s").asi8,
    "epoch seconds as decimals": HOURS.as_unit("s").asi8.astype(float),
    "epoch milliseconds": HOURS.as_unit("ms").asi8,
    "yyyymmdd": DAYS.strftime("%Y%m%d").astype(int),
    "month, no day": MONTHS.strftime("%Y-%m"),
    "day first": DAYS.strftime("%d/%m/%Y"),
    "day first from the 1st on": DAYS_FROM_THE_FIRST.strftime("%d/%m/%Y"),
    "day first with dots and hours": HOURS.strftime("%d.%m.%Y %H:%M"),
    "month first from the 1st on": DAYS_FROM_THE_FIRST.strftime("%m/%d/%Y"),
    "month first": DAYS.strftime("%m/%d/%Y"),
}


@pytest.mark.parametrize("missing", [[], [5, 6, 41]])
@pytest.mark.parametrize("stamps", GRIDS.values(), ids=GRIDS.keys())
def test_each_stamp_finds_its_place_on_the_grid_and_missing_rows_are_missing(
    stamps, missing, tmp_path
):
    expected = NOISE[:100].copy()
    expected[missing] = np.nan
    series, passed = read_one(write(tmp_path / "a.csv", values_at(stamps).drop(missing)))
    np.testing.assert_array_equal(series.values, expected)
    assert series.freq
    assert not passed


def test_jitter_adds_up_to_nothing_over_a_long_series(tmp_path):
    # 3601, 3602 and 3597 seconds between two stamps, never 3600
    seconds = np.array([0, 1, 3])[np.arange(1000) % 3]
    seconds[[0, 500]] = 1500, -1200  # still within half a step of their places
    gone = [*range(1, 1000, 7)]
    expected = NOISE.copy()
    expected[gone] = np.nan
    hourly_stamps = pd.date_range("2024-01-01", periods=1000, freq="h")
    stamps = hourly_stamps + pd.to_timedelta(seconds, unit="s")
    series, _ = read_one(write(tmp_path / "a.csv", values_at(stamps).drop(gone)))
    np.testing.assert_array_equal(series.values, expected)
    assert series.freq == "h"


def test_stamps_off_a_calendar_rule_are_left_out_where_95_percent_lie_on_it(tmp_path):
    days = pd.date_range("2024-01-01", periods=100, freq="B")
    saturday = pd.DataFrame({"date": [pd.Timestamp("2024-01-06")], "value": [-9.0]})
    frame = pd.concat([values_at(days), saturday])
    series, _ = read_one(write(tmp_path / "a.csv", frame))
    np.testing.assert_array_equal(series.values, NOISE[:100])
    assert series.freq == "B"


def test_irregular_stamps_are_skipped_with_that_reason(tmp_path):
    seconds = np.random.default_rng(2).integers(60, 100_000, 100).cumsum()
    stamps = pd.Timestamp("2024-01-01") + pd.to_timedelta(seconds, unit="s")
    path = write(tmp_path / "a.csv", values_at(stamps))
    with pytest.raises(md.Unusable, match="irregular"):
        read_one(path)


def test_a_named_time_column_with_too_many_unreadable_stamps_is_a_reason_to_skip(tmp_path):
    stamps = HOURS.astype(str).to_series(index=range(100))
    stamps[:20] = "unknown"
    path = write(tmp_path / "a.csv", values_at(stamps))
    with pytest.raises(md.Unusable, match="stamps"):  # else they would be spliced together
        read_one(path)


def test_rows_with_an_unreadable_stamp_are_left_out_and_told_where_they_are_few(tmp_path):
    stamps = HOURS.astype(str).to_series(index=range(100))
    stamps[30] = "unknown"
    expected = NOISE[:100].copy()
    expected[30] = np.nan
    path = write(tmp_path / "a.csv", values_at(stamps))
    file = md.read_series(path, "a.csv", read_config())
    np.testing.assert_array_equal(file.series[0].values, expected)
    (warning,) = file.report.warnings
    assert "1 of 100 stamps of date cannot be read, such as 'unknown'" in str(warning)

    stamps[31] = "unknown"  # 2 %
    with pytest.raises(md.Unusable, match="2 of 100 stamps .*'unknown' in row 31"):
        read_one(write(path, values_at(stamps)))


@pytest.mark.parametrize("place", [-1, -10])
def test_an_unreadable_stamp_near_the_end_is_a_reason_to_skip(place, tmp_path):
    stamps = HOURS.astype(str).to_series(index=range(100))
    stamps.iloc[place] = "unknown"
    with pytest.raises(md.Unusable, match="1 of 100 stamps .*'unknown' in row"):
        read_one(write(tmp_path / "a.csv", values_at(stamps)))


@pytest.mark.parametrize("stamps", [HOURS, HOURS.as_unit("s").asi8], ids=["text", "epoch"])
@pytest.mark.parametrize("name", ["date", "Timestamp", "TIME", "datetime", "ds"])
def test_the_time_column_is_found_by_name_in_any_case_wherever_it_stands(name, stamps, tmp_path):
    frame = pd.DataFrame({"note": HOURS.astype(str), "value": NOISE[:100], name: stamps[::-1]})
    series, passed = read_one(write(tmp_path / "a.csv", frame))
    np.testing.assert_array_equal(series.values, NOISE[:100][::-1])
    assert series.freq == "h"
    assert passed == ["note"]


@pytest.mark.parametrize("name", ["when", "测量时间"])
def test_the_time_column_is_found_by_content_wherever_it_stands(name, tmp_path):
    frame = pd.DataFrame({"words": "sunny", "value": NOISE[:100], name: HOURS[::-1]})
    series, passed = read_one(write(tmp_path / "a.csv", frame))
    np.testing.assert_array_equal(series.values, NOISE[:100][::-1])
    assert series.freq == "h"
    assert passed == ["words"]


@pytest.mark.parametrize(
    "stamps", [np.arange(100) * 0.5, MONTHS.strftime("%Y%m").astype(int)], ids=["seconds", "yyyymm"]
)
def test_a_column_named_as_time_is_never_used_as_a_value(stamps, tmp_path):
    series, _ = read_one(write(tmp_path / "a.csv", values_at(stamps)))
    np.testing.assert_array_equal(series.values, NOISE[:100])


def test_without_timestamps_the_rows_are_taken_as_they_stand(tmp_path):
    series, passed = read_one(write(tmp_path / "a.csv", pd.DataFrame({"value": NOISE})))
    np.testing.assert_array_equal(series.values, NOISE)
    assert series.freq == ""
    assert passed == []


@pytest.mark.parametrize("stamps", ["hour", "day", "month end", "day first", "month first"])
def test_reading_ordinary_stamps_gives_no_warning(stamps, tmp_path):
    path = write(tmp_path / "a.csv", values_at(GRIDS[stamps]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        np.testing.assert_array_equal(read_one(path)[0].values, NOISE[:100])
    assert [str(warning.message) for warning in caught] == []


@pytest.mark.parametrize(
    ("name", "lines", "freq"),
    [
        ("open_time", [f"{1700000000000 + 3600000 * i}" for i in range(60)], "h"),
        ("day", [f"{day:%Y%m%d}" for day in pd.date_range("2024-01-30", periods=60)], "D"),
    ],
)
def test_a_numeric_time_column_is_found_by_content(name, lines, freq, tmp_path):
    frame = pd.DataFrame({name: lines, "value": NOISE[:60]})
    series, passed = read_one(write(tmp_path / "a.csv", frame))
    np.testing.assert_array_equal(series.values, NOISE[:60])
    assert series.freq == freq
    assert passed == []


def test_a_rising_meter_is_a_value_where_it_is_named_and_never_a_clock(tmp_path):
    meter = 500_000_000 + np.cumsum(np.arange(60) % 7 + 1)
    path = write(tmp_path / "a.csv", pd.DataFrame({"energy": meter}))
    with pytest.raises(md.Unusable, match="only rises.*--columns energy"):
        read_one(path)
    series, _ = read_one(path, "energy")
    np.testing.assert_array_equal(series.values, meter)
    assert series.freq == ""


# -- one file: every n months, and how its forecasts are stamped -----------------------------------

MONTH_NAMES = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")


def placed(stamps, dropped=()):
    """RawSeries of NOISE at stamps, without the dropped rows."""
    kept = np.setdiff1d(np.arange(len(stamps)), [*dropped])
    place = md.on_grid(stamps[kept])
    return raw_series("s", place.lay(NOISE[kept]), place.freq, stamps=place.stamps)


def name_of_rule(stamps, months):
    """Pandas' name of every so many months, as the series begins."""
    side = "E" if stamps.is_month_end.all() else "S"
    phase = stamps[0].month - 1
    if months == 3:
        return f"Q{side}-{MONTH_NAMES[phase % 3]}"
    if months == 12:
        return f"Y{side}-{MONTH_NAMES[phase]}"
    return f"M{side}" if months == 1 else f"{months}M{side}"


@pytest.mark.parametrize("day", [1, 15, 30, 31])
@pytest.mark.parametrize("months", [1, 2, 3, 4, 6, 12])
def test_every_n_months_in_each_phase_is_a_grid_that_goes_on(months, day, tmp_path):
    for month in range(1, 13):
        stamps = every_months(f"1990-{month}", months, day, 36)
        series, _ = read_one(write(tmp_path / "a.csv", values_at(stamps[:30])))
        np.testing.assert_array_equal(series.values, NOISE[:30])
        assert series.freq == name_of_rule(stamps, months)
        assert md.steps_after(series, 6).tolist() == stamps[30:].tolist()
        assert md.steps_after(series, 6, 4).tolist() == stamps[26:32].tolist()
        if day in (1, 31):  # pandas means by that name what the file has
            meant = pd.date_range(stamps[0], periods=36, freq=series.freq)
            assert meant.tolist() == stamps.tolist()


@bounded
@given(st.data())
def test_forecasts_of_every_n_months_go_on_by_the_rule_that_made_the_series(data):
    months = data.draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
    start = f"{data.draw(st.integers(1700, 2100))}-{data.draw(st.integers(1, 12))}"
    day = data.draw(st.integers(1, 31))
    count = data.draw(st.integers(10, 60))  # a few stamps may fit several rules
    ahead = data.draw(st.integers(1, 30))
    back = data.draw(st.integers(0, count))
    dropped = data.draw(st.sets(st.integers(1, count - 2), max_size=count // 8))
    clock = pd.Timedelta(data.draw(st.integers(0, 24 * 60 - 1)), "min")
    zone = data.draw(st.sampled_from([None, "UTC", "+08:00"]))

    rule = every_months(start, months, day, count + ahead) + clock
    rule = rule.tz_localize(zone).rename("when").as_unit("ns")  # pandas 3 makes microseconds
    series = placed(rule[:count], dropped)
    expected = NOISE[:count].copy()
    expected[[*dropped]] = np.nan
    np.testing.assert_array_equal(series.values, expected)
    assert md.months_of(series.freq) == months

    pd.testing.assert_index_equal(md.steps_after(series, ahead), rule[count:])
    first = count - back
    pd.testing.assert_index_equal(md.steps_after(series, ahead, back), rule[first : first + ahead])


@pytest.mark.parametrize("dropped", [[], [7, 31]])
@pytest.mark.parametrize("start", range(1980, 1990))
def test_the_last_business_day_of_each_month_is_placed_as_months(start, dropped, tmp_path):
    stamps = pd.date_range(f"{start}-01-01", periods=66, freq="BME")
    frame = values_at(stamps[:60]).drop(dropped)
    series, _ = read_one(write(tmp_path / "a.csv", frame))
    expected = NOISE[:60].copy()
    expected[dropped] = np.nan
    np.testing.assert_array_equal(series.values, expected)
    assert series.freq == "MS"  # with a row missing or not
    following = md.steps_after(series, 6).to_period("M")
    assert following.tolist() == stamps[60:].to_period("M").tolist()


def check_steps_of_days(days, dropped):
    """A series of so many days a step is no series of months, and goes on by these days."""
    stamps = pd.date_range("2001-01-05", periods=66, freq=f"{days}D")
    series = placed(stamps[:60], dropped)
    expected = NOISE[:60].copy()
    expected[dropped] = np.nan
    np.testing.assert_array_equal(series.values, expected)
    assert series.freq == f"{days}D"
    assert md.months_of(series.freq) == 0
    assert md.steps_after(series, 6).tolist() == stamps[60:].tolist()


@pytest.mark.parametrize("days", [28, 30, 61, 91, 365])
def test_steps_of_exactly_so_many_days_are_no_months(days):
    check_steps_of_days(days, dropped=[])


@pytest.mark.parametrize("days", [28, 30, 61, 91, 365])
def test_steps_of_exactly_so_many_days_are_no_months_where_a_row_is_missing(days):
    check_steps_of_days(days, dropped=[25])


def off_by(rule, row, days):
    """A case of the test below: which stamp of which rule is off by how many days."""
    return pytest.param(rule, row, days, id=f"{rule} {row} {days:+}")


@pytest.mark.parametrize(
    ("rule", "row", "days"),
    [
        off_by("1st", 0, -1),
        off_by("1st", 20, -1),
        off_by("1st", 20, 1),
        off_by("1st", 55, -1),
        off_by("1st", 55, 1),
        off_by("1st", 59, -1),
        off_by("1st", 59, 1),
        off_by("15th", 20, -1),
        off_by("15th", 20, 1),
        off_by("15th", 59, -1),
        off_by("15th", 59, 1),
        off_by("last", 20, -1),  # 2016-09-29, a Thursday
        off_by("last", 55, -1),  # 2019-08-30, a Friday: all are month ends or Fridays before
        off_by("last", 55, 1),
        off_by("last", 59, -1),
        off_by("last", 59, 1),
    ],
)
def test_one_stamp_a_day_off_the_rule_changes_nothing(rule, row, days):
    day = {"1st": 1, "15th": 15, "last": 31}[rule]
    right = every_months("2015-01", 1, day, 66)
    stamps = right[:60].to_series(index=range(60))
    stamps[row] += pd.Timedelta(days, "D")
    series = placed(pd.DatetimeIndex(stamps))
    np.testing.assert_array_equal(series.values, NOISE[:60])
    assert series.freq == ("ME" if rule == "last" else "MS")
    assert md.steps_after(series, 6).tolist() == right[60:].tolist()


@pytest.mark.parametrize(
    ("freq", "months", "season"),
    [
        ("MS", 1, 12),
        ("ME", 1, 12),
        ("QS-JAN", 3, 4),
        ("QE-FEB", 3, 4),
        ("YS-JAN", 12, 1),
        ("YE-DEC", 12, 1),
        ("BMS", 1, 12),
        ("BME", 1, 12),
        ("BQE-MAR", 3, 4),
        ("BYS-APR", 12, 1),
        ("2MS", 2, 6),
        ("4ME", 4, 3),
        ("6MS", 6, 2),
        ("24MS", 24, 1),
        ("B", 0, 5),
        ("D", 0, 7),
        ("7D", 0, 52),
        ("30D", 0, 1),
        ("h", 0, 24),
        ("15min", 0, 96),
        ("", 0, 24),
    ],
)
def test_the_names_of_frequencies_in_checkpoints_old_and_new_are_known(freq, months, season):
    assert md.months_of(freq) == months
    assert md.season_of(freq) == season


# -- one file: columns and encodings ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["unique_id", "item_id", "id", "series", "series_id", "ID"])
@pytest.mark.parametrize("ids", [("a", "b"), (7, 12)])
def test_a_long_file_gives_a_series_per_id(name, ids, tmp_path):
    one = values_at(HOURS).assign(**{name: ids[0]}).drop(9)
    two = values_at(HOURS, NOISE[1:] * 2).assign(**{name: ids[1]})
    frame = pd.concat([one, two])[[name, "date", "value"]].sample(frac=1, random_state=0)
    series = md.read_series(write(tmp_path / "a.csv", frame), "a.csv", read_config()).series
    assert [item.name for item in series] == [f"a.csv / {key}" for key in ids]
    expected = NOISE[:100].copy()
    expected[9] = np.nan
    np.testing.assert_array_equal(series[0].values, expected)
    np.testing.assert_array_equal(series[1].values, NOISE[1:101] * 2)


def test_in_a_long_file_conflicting_duplicates_of_one_id_are_a_reason_to_skip_it(tmp_path):
    frame = pd.concat([values_at(HOURS), values_at(HOURS[:5], -NOISE)]).assign(item_id="a")
    with pytest.raises(md.Unusable, match="5 of 105 .*duplicates"):
        read_one(write(tmp_path / "a.csv", frame))
    frame = pd.concat([values_at(HOURS), values_at(HOURS[:1], -NOISE)]).assign(item_id="a")
    expected = np.append(-NOISE[:1], NOISE[1:100])
    np.testing.assert_array_equal(read_one(write(tmp_path / "a.csv", frame))[0].values, expected)


def test_a_long_file_without_its_id_column_is_skipped_as_duplicates(tmp_path):
    path = write(tmp_path / "a.csv", pd.concat([values_at(HOURS), values_at(HOURS, -NOISE)]))
    with pytest.raises(md.Unusable, match="100 of 200 .*id column"):
        read_one(path)


def test_an_id_column_whose_values_do_not_repeat_is_no_id(tmp_path):
    frame = values_at(HOURS).assign(series=[f"row {i}" for i in range(100)])
    path = write(tmp_path / "a.csv", frame[["series", "date", "value"]])
    series, passed = read_one(path)
    np.testing.assert_array_equal(series.values, NOISE[:100])
    assert passed == ["series"]


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("id", RNG.permutation(100)),
        ("Index", np.arange(100) * 3),
        ("time_idx", np.arange(100) // 2),
        ("row", range(7, 107)),
        ("", RNG.permutation(100)),
    ],
    ids=["id", "index", "time_idx", "counter", "unnamed"],
)
def test_an_index_column_is_passed_over_named_in_the_note_and_can_be_asked_for(
    name, index, tmp_path
):
    frame = values_at(HOURS).assign(**{name: index})[[name, "date", "value"]]
    path = write(tmp_path / "a.csv", frame)
    shown = name or "Unnamed: 0"
    assert read_one(path)[1] == [shown]
    files = read_folder(tmp_path)
    np.testing.assert_array_equal(files.series["a.csv"][0].values, NOISE[:100])
    assert files.found == 1
    assert passed_over(files.reports["a.csv"]) == [shown]
    np.testing.assert_array_equal(read_one(path, shown)[0].values, np.array(index, float))


def test_a_counter_that_starts_again_for_each_id_is_passed_over(tmp_path):
    frame = pd.concat([values_at(HOURS).assign(unique_id=key, step=range(100)) for key in "ab"])
    path = write(tmp_path / "a.csv", frame[["unique_id", "step", "date", "value"]])
    file = md.read_series(path, "a.csv", read_config())
    series = file.series
    assert passed_over(file.report) == ["step"]
    assert len(series) == 2
    np.testing.assert_array_equal(series[1].values, NOISE[:100])


@pytest.mark.parametrize(
    ("wanted", "names", "starts", "passed"),
    [
        (["first"], ["a.csv"], [0], []),
        (["all"], ["a.csv / value", "a.csv / b", "a.csv / c"], [0, 100, 200], ["words"]),
        (["c", "b"], ["a.csv / c", "a.csv / b"], [200, 100], []),
    ],
    ids=["first", "all", "by name"],
)
def test_columns_first_all_and_by_name(wanted, names, starts, passed, tmp_path):
    frame = values_at(HOURS).assign(words="x", b=NOISE[100:200], c=NOISE[200:300])
    path = write(tmp_path / "a.csv", frame)
    file = md.read_series(path, "a.csv", read_config(*wanted))
    series = file.series
    assert [item.name for item in series] == names
    for item, start in zip(series, starts, strict=True):
        np.testing.assert_array_equal(item.values, NOISE[start : start + 100])
    assert passed_over(file.report) == passed
    with pytest.raises(md.Unusable, match="no column absent"):
        md.read_series(path, "a.csv", read_config("value", "absent"))


def test_a_few_words_in_a_numeric_column_are_missing_values_and_many_make_it_text(tmp_path):
    rows = np.arange(100)
    words = pd.Series(NOISE[:100]).astype(object).where(rows % 5 > 0, "n. a.?")
    value = pd.Series(NOISE[100:200]).astype(object).where(rows % 25 > 0, "broken")
    frame = pd.DataFrame({"date": HOURS, "words": words, "value": value})
    expected = NOISE[100:200].copy()
    expected[::25] = np.nan
    series, passed = read_one(write(tmp_path / "a.csv", frame))
    np.testing.assert_array_equal(series.values, expected)
    assert passed == ["words"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16", "latin-1"])
@pytest.mark.parametrize(
    ("separator", "decimal"), [(",", "."), (";", ","), (";", "."), ("\t", ".")]
)
def test_encodings_and_separators(encoding, separator, decimal, tmp_path):
    is_western = encoding == "latin-1"
    columns = ["date", "größe"] if is_western else ["日期", "温度"]
    frame = values_at(HOURS).set_axis(columns, axis=1).assign(words="é" if is_western else "晴")
    path = write(tmp_path / "a.csv", frame, encoding=encoding, sep=separator, decimal=decimal)
    for ask in ([], columns[1:]):  # the name survives the encoding, too
        np.testing.assert_array_equal(read_one(path, *ask)[0].values, NOISE[:100])


def csv_text(header, row):
    """A CSV of hourly rows, spelt out."""
    lines = [row.format(*pair) for pair in zip(HOURS, NOISE, strict=False)]
    return header + "".join(lines)


def test_spaces_around_names_and_values_are_ignored(tmp_path):
    (tmp_path / "a.csv").write_text(csv_text("date , value\n", "{} , {}\n"))
    series, _ = read_one(tmp_path / "a.csv", "value")
    np.testing.assert_array_equal(series.values, NOISE[:100])
    assert series.freq == "h"


def test_names_that_differ_in_spaces_only_do_no_harm(tmp_path):
    (tmp_path / "a.csv").write_text(csv_text("date,x, x\n", "{},{},0\n"))
    np.testing.assert_array_equal(read_one(tmp_path / "a.csv")[0].values, NOISE[:100])


def test_rows_with_more_fields_than_the_header_are_skipped_not_shifted(tmp_path):
    path = tmp_path / "a.csv"
    rows = [f"2024-01-{i + 1:02d},{i},{2 * i},\n" for i in range(28)]
    path.write_text("date,a,b\n" + "".join(rows))
    with pytest.raises(md.Unusable, match="more fields than its header"):
        md.read_series(path, "a.csv", read_config("a"))


def test_monthly_stamps_with_the_day_first_are_no_daily_stamps(tmp_path):
    months = pd.date_range("2020-01-01", periods=60, freq="MS")
    path = write(tmp_path / "a.csv", values_at(months.strftime("%d/%m/%Y")))
    series, _ = read_one(path)
    np.testing.assert_array_equal(series.values, NOISE[:60])
    assert series.freq == "MS"


def test_a_packed_csv_is_read_and_a_damaged_one_skipped(tmp_path):
    path = tmp_path / "a.csv.gz"
    hours(100).to_csv(path, index=False)
    np.testing.assert_allclose(read_one(path)[0].values, NOISE[:100], rtol=1e-12)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(md.Unusable, match="unreadable"):
        md.read_series(path, "a.csv.gz", read_config())


# -- a folder --------------------------------------------------------------------------------------


def test_files_that_cannot_be_used_are_skipped_with_the_reason_and_the_others_are_used(tmp_path):
    write(tmp_path / "good.csv", hours(ROWS))
    write(tmp_path / "flat.csv", values_at(HOURS, np.full(100, 3.25)))
    write(tmp_path / "short.csv", values_at(HOURS[:20]))
    write(tmp_path / "text.csv", pd.DataFrame({"a": ["x", "y"] * 50, "b": ["z", "w"] * 50}))
    write(tmp_path / "void.csv", values_at(HOURS, np.full(100, np.nan)))
    write(tmp_path / "header.csv", values_at(HOURS[:0]))
    (tmp_path / "empty.csv").touch()
    (tmp_path / "noise.csv").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "folder.csv").mkdir()
    reasons = {
        "flat.csv": "constant",
        "short.csv": "too short",
        "text.csv": "no numeric column",
        "void.csv": "no numeric column",
        "header.csv": "no rows",
        "empty.csv": "no rows",
        "noise.csv": "NUL bytes",
        "folder.csv": "no regular file",
    }
    files = read_folder(tmp_path)
    data = md.split_data(files, data_config(**SHORT))
    assert files.found == 9
    assert data.split_by == "time"
    assert data.files == {"train": 1, "validation": 1, "test": 1}
    assert len(data.windows["train"]) == 160 - LENGTH + 1
    assert data.notes.pop("good.csv") == []
    assert data.notes.keys() == reasons.keys()
    for name, notes in data.notes.items():
        assert reasons[name] in str(*notes), name


def test_each_skipped_series_of_a_file_is_told_and_what_was_passed_over_too(tmp_path):
    lengths = {"a": 200, "short": 20, "tiny": 2, "flat": 200}
    frame = pd.concat([hours(rows).assign(item_id=key) for key, rows in lengths.items()])
    frame.loc[frame["item_id"] == "flat", "value"] = 4.5
    frame.insert(0, "index", range(len(frame)))
    write(tmp_path / "long.csv", frame)
    data = split_folder(tmp_path, **SHORT)
    assert len(data.windows["train"].freqs) == 1
    for word in ("short", "tiny", "flat"):
        assert word in " ".join(map(str, data.notes["long.csv"]))
    assert passed_over(data.reports["long.csv"]) == ["index"]


def test_a_folder_is_searched_below_in_sorted_order_and_cut_at_max_files(csv_folder, monkeypatch):
    (csv_folder / "deep" / "er").mkdir(parents=True)
    (csv_folder / "s03.csv").rename(csv_folder / "deep" / "er" / "s03.CSV")
    (csv_folder / "notes.txt").write_text("not a CSV")
    others = [f"s{number:02d}.csv" for number in range(12) if number != 3]
    names = ["deep/er/s03.CSV", *others]
    whole = read_folder(csv_folder)
    assert whole.found == 12
    assert list(whole.series) == names

    listing = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: reversed(list(listing(path, pattern))))
    cut = read_folder(csv_folder, max_files=5)
    assert cut.found == 12
    assert list(cut.series) == list(cut.reports) == names[:5]
    for name in names[:5]:
        np.testing.assert_array_equal(cut.series[name][0].values, whole.series[name][0].values)


def test_many_files_are_read_by_several_processes_in_the_same_order(tmp_path, monkeypatch):
    count = md.FILES_FOR_PROCESSES + 5
    names = [f"s{number:02d}.csv" for number in range(count)]
    for number, name in enumerate(names):
        write(tmp_path / name, hours(100 + number))
    (tmp_path / "s10.csv").write_text("words\na\n")
    used = [name for name in names if name != "s10.csv"]
    read = md.read_series

    def read_and_tell_process(*arguments):
        file = read(*arguments)
        file.report.facts.append(os.getpid())
        return file

    monkeypatch.setattr(md, "read_series", read_and_tell_process)
    readings = []
    processes = []
    for cores in (1, 2):
        monkeypatch.setattr(md, "cores", lambda cores=cores: cores)
        files = read_folder(tmp_path)
        assert files.found == count
        assert [*files.reports] == names
        assert [*files.series] == used
        assert str(files.reports["s10.csv"].skipped[0]).startswith("no numeric column")
        readings.append(files.series)
        processes.append({files.reports[name].facts[-1] for name in used})

    assert processes[0] == {os.getpid()}
    assert len(processes[1]) == 2
    assert os.getpid() not in processes[1]
    for name in used:
        (one,) = readings[0][name]
        (two,) = readings[1][name]
        np.testing.assert_array_equal(one.values, two.values)
        assert one.freq == two.freq
        assert (one.stamps == two.stamps).all()


def test_a_single_csv_file_works(csv_folder):
    files = read_folder(csv_folder / "s04.csv")
    values = files.series["s04.csv"][0].values
    np.testing.assert_allclose(values, hourly(300, seed=4)["value"], rtol=1e-14)
    assert files.found == 1


def test_nothing_usable_is_an_error_that_lists_the_reasons(tmp_path, capsys):
    with pytest.raises(md.UserError, match="no .csv"):
        read_folder(tmp_path)
    write(tmp_path / "constant.csv", values_at(HOURS, np.ones(100)))
    write(tmp_path / "text.csv", pd.DataFrame({"a": ["x"] * 50}))
    flags = f"--data_dir {tmp_path} --save_dir {tmp_path / 'run'} --alpha 0 {SMALL}"
    code = md.main(flags.split())
    error = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in error
    assert "constant.csv: skipped: " in error
    assert "text.csv: skipped: " in error


def test_loading_prints_the_known_lines_and_a_table_of_what_was_not_used(csv_folder, capsys):
    write(csv_folder / "text.csv", pd.DataFrame({"a": ["x"] * 50}))
    config = data_config(data_dir=str(csv_folder), split_by="files", max_windows=50)
    data = md.load_data(config, read_config(), md.Voice("zh"))
    lines = capsys.readouterr().out.splitlines()
    known = [
        f"数据目录: {csv_folder}",
        "上下文长度: 64",
        "预测长度: 16",
        "创建数据集...",
        "找到 13 个 CSV 文件",
        "使用 10 个文件用于 train 集",
        "数据集加载完成: 500 个样本",
    ]
    assert [line for line in lines if line in known] == known
    assert any("text.csv" in line and "没有数字列" in line for line in lines)
    sizes = {part: len(windows) for part, windows in data.windows.items()}
    assert sizes == {"train": 500, "validation": 221, "test": 221}


# -- gaps ------------------------------------------------------------------------------------------


def prepared(values, bounds, max_gap=3):
    """PreparedSeries of an hourly series, with windows of 6 + 3 points."""
    config = data_config(context_length=6, prediction_length=3, max_gap=max_gap)
    return md.prepare_series(raw_series("s", values), bounds, config)


@bounded
@given(st.integers(0, 999), st.integers(-6, 9), st.integers(-9, 3), st.booleans())
def test_the_scaler_of_evaluate_finds_what_scikit_learns_finds_to_the_bit(
    seed, size, spread, has_gaps
):
    """Up to what that one takes for a constant."""
    rng = np.random.default_rng(seed)
    values = 10.0**size * (rng.normal() + 10.0**spread * rng.standard_normal(seed + 2))
    if has_gaps:
        values[rng.random(len(values)) < 0.2] = np.nan
        values[:2] = 10.0**size * np.array([1, 2])
    rows = values[:, None]
    expected = data_config().new_scaler().fit(rows)
    found = md.PlainScaler().fit(rows)
    for name in ("mean_", "var_", "scale_"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()


def test_short_gaps_are_filled_linearly_and_masked_and_long_ones_cut():
    values = np.arange(60) ** 2 / 10.0
    missing = [5, 20, 21, 22, 40, 41, 42, 43]
    values[missing] = np.nan
    series = prepared(values, {"whole": (0, 60)})
    assert series.values[5] == (1.6 + 3.6) / 2
    filled = 36.1 + (52.9 - 36.1) * np.array([1, 2, 3]) / 4
    np.testing.assert_allclose(series.values[20:23], filled, rtol=1e-12)
    assert np.isnan(series.values[40:44]).all()
    np.testing.assert_array_equal(np.flatnonzero(~series.observed), missing)
    # the window that starts at 14 has no measured target
    starts = [*range(14), *range(15, 32), *range(44, 52)]
    np.testing.assert_array_equal(series.starts["whole"], starts)


def test_a_short_gap_across_a_split_border_is_filled_by_each_side_from_its_own_values():
    values = NOISE[:60].copy()
    values[[38, 39, 40]] = np.nan
    parts = {"train": (0, 40), "validation": (40, 50), "test": (50, 60)}
    series = prepared(values, parts)
    assert series.values[38:41].tolist() == [NOISE[37], NOISE[37], NOISE[41]]
    assert not series.observed[38:41].any()
    assert series.starts["train"].max() == 40 - 9
    assert series.starts["validation"].tolist() == [*range(40 - 6, 50 - 9 + 1)]
    others = values.copy()
    others[41:] += 5
    seen = prepared(others, parts)
    np.testing.assert_array_equal(seen.values[:40], series.values[:40])
    np.testing.assert_array_equal(seen.starts["train"], series.starts["train"])


def test_a_longer_gap_across_a_split_border_is_filled_on_neither_side():
    values = NOISE[:60].copy()
    values[37:41] = np.nan  # 3 and 1
    series = prepared(values, {"train": (0, 40), "validation": (40, 50), "test": (50, 60)})
    assert np.isnan(series.values[37:41]).all()
    assert series.starts["train"].max() == 37 - 9
    assert series.starts["validation"].tolist() == [41]


def test_a_part_without_a_value_takes_none_from_the_part_behind_it():
    values = NOISE[:60].copy()
    values[40:42] = np.nan
    series = prepared(values, {"train": (0, 40), "validation": (40, 42), "test": (42, 60)})
    assert np.isnan(series.values[40:42]).all()


def test_one_missing_value_at_each_border_blocks_no_part(tmp_path):
    """As in daily temperatures of ten years, of which two values are missing."""
    rows = 400
    values = NOISE[:rows].copy()
    values[[319, 320, 360]] = np.nan
    data = split({"t.csv": [raw_series("t.csv", values, "D")]}, context_length=40)
    whole = split({"t.csv": [raw_series("t.csv", NOISE[:rows].copy(), "D")]}, context_length=40)
    for part in md.PARTS:
        assert len(data.windows[part]) == len(whole.windows[part]), part


RUNS = st.lists(st.tuples(st.integers(0, 59), st.integers(1, 7)), max_size=8)
IN_PARTS = {"train": (0, 34), "validation": (34, 47), "test": (47, 60)}
AS_A_WHOLE = {"whole": (0, 60)}


def fill_by_hand(values, bounds, max_gap):
    """Values whose short gaps inside a part are filled, found run by run."""
    missing = np.isnan(values)
    filled = values.copy()
    for low, high in bounds.values():
        for is_gap, group in itertools.groupby(range(low, high), key=lambda row: missing[row]):
            rows = list(group)
            is_inside = rows[0] > low and rows[-1] < high - 1
            if is_gap and is_inside and len(rows) <= max_gap:
                before = values[rows[0] - 1]
                after = values[rows[-1] + 1]
                share = np.arange(1, len(rows) + 1) / (len(rows) + 1)
                filled[rows] = before + (after - before) * share
    return fill_edges_by_hand(filled, bounds, max_gap)


def fill_edges_by_hand(values, bounds, max_gap):
    """Values whose short gaps at the border of two parts are filled from each one's own side."""
    filled = values.copy()
    parts = list(bounds.values())
    for (low, edge), (_, high) in zip(parts, parts[1:], strict=False):
        last = edge - 1
        while last >= low and np.isnan(values[last]):
            last -= 1
        first = edge
        while first < high and np.isnan(values[first]):
            first += 1
        if last >= low and first < high and first - last - 1 <= max_gap:
            filled[last:edge] = values[last]
            filled[edge:first] = values[first]
    return filled


@bounded
@example(runs=[(33, 2)], max_gap=5, bounds=IN_PARTS)  # across a border
@example(runs=[(30, 4)], max_gap=5, bounds=IN_PARTS)  # up to it
@given(runs=RUNS, max_gap=st.integers(0, 5), bounds=st.sampled_from([IN_PARTS, AS_A_WHOLE]))
def test_exactly_the_windows_without_a_missing_value_and_with_a_target_in_one_part_are_used(
    runs, max_gap, bounds
):
    values = NOISE[:60].copy()
    for start, count in runs:
        values[start : start + count] = np.nan
    missing = np.isnan(values)
    expected = fill_by_hand(values, bounds, max_gap)
    windows = {part: [] for part in bounds}
    for start in range(60 - 9 + 1):
        is_whole = not np.isnan(expected[start : start + 9]).any()
        target = slice(start + 6, start + 9)
        is_seen = not missing[target].all()  # else it would teach nothing
        for part, (low, high) in bounds.items():
            if is_whole and is_seen and low <= target.start and target.stop <= high:
                windows[part].append(start)

    if not windows[next(iter(bounds))]:
        with pytest.raises(md.Unusable):
            prepared(values, bounds, max_gap)
        return
    series = prepared(values, bounds, max_gap)
    np.testing.assert_allclose(series.values, expected, rtol=1e-12)
    np.testing.assert_array_equal(series.observed, ~missing)
    assert {part: starts.tolist() for part, starts in series.starts.items()} == windows


# -- split and windows -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "ratio", "sizes"),
    [
        (3, (8, 1, 1), (1, 1, 1)),
        (10, (8, 1, 1), (8, 1, 1)),
        (12, (8, 1, 1), (10, 1, 1)),
        (14, (8, 1, 1), (12, 1, 1)),
        (16, (8, 1, 1), (12, 2, 2)),
        (36, (8, 1, 1), (28, 4, 4)),
        (10, (6, 2, 2), (6, 2, 2)),
        (20, (70, 20, 10), (14, 4, 2)),
    ],
)
def test_files_are_split_by_formula(count, ratio, sizes):
    series = files_of(count)
    data = split(series, split_by="files", split_ratio=ratio)
    assert data.split_by == "files"
    assert tuple(data.files.values()) == sizes
    names = [members(windows, series) for windows in data.windows.values()]
    assert tuple(len(part) for part in names) == sizes
    assert set.union(*names) == set(series)
    windows_per_file = 40 - LENGTH + 1
    for windows, size in zip(data.windows.values(), sizes, strict=True):
        assert len(windows) == windows_per_file * size


def test_which_file_goes_where_depends_on_names_and_seed_alone():
    series = files_of(12)
    others = dict(reversed(series.items()))
    held_out = set()
    for seed in range(5):
        one = split(series, split_by="files", split_seed=seed).windows
        two = split(others, split_by="files", split_seed=seed).windows
        for part in md.PARTS:
            assert members(one[part], series) == members(two[part], series)
            assert one[part].digest == two[part].digest
            np.testing.assert_array_equal(one[part].values, two[part].values)
        held_out |= members(one["test"], series)
    assert len(held_out) > 1


@pytest.mark.parametrize(("missing", "split_by"), [(1, "time"), (0, "files")])
def test_auto_splits_by_files_from_so_many_usable_ones_on(missing, split_by):
    flat = {f"flat{i}.csv": [raw_series("flat", np.ones(100))] for i in range(5)}
    usable = files_of(md.MANY_FILES - missing, rows=ROWS)
    assert split(usable | flat, split_by="auto").split_by == split_by


@pytest.mark.parametrize("ratio", [(1, 1, 20), (0.01, 0.01, 1)])
def test_a_ratio_that_leaves_no_file_for_training_is_a_clear_error(ratio):
    with pytest.raises(md.UserError, match="leaves none of 5 usable files for training"):
        split(files_of(5), split_by="files", split_ratio=ratio)


def test_a_split_by_files_of_two_files_is_a_clear_error():
    message = "2 usable files, it takes 3; or use --split_by time"
    with pytest.raises(md.UserError, match=message):
        split(files_of(2), split_by="files")


@pytest.mark.parametrize("text", ["8:1:1", "7:1:2", "0.7:0.1:0.2", "0.6:0.2:0.2"])
def test_rows_are_split_by_time_at_the_floor_of_their_shares(text):
    first, second, third = (round(10 * float(share)) for share in text.split(":"))
    total = first + second + third
    args = md.build_parser(demo=False).parse_args(["train", "--split_ratio", text])
    for rows in (150, 155, 200, 203):
        data = split(one_file(NOISE[:rows]), split_ratio=args.split_ratio, max_gap=0)
        train_end = rows * first // total
        validation_end = rows * (first + second) // total
        windows = [
            train_end - LENGTH + 1,
            validation_end - train_end - HORIZON + 1,
            rows - validation_end - HORIZON + 1,
        ]
        assert [len(part) for part in data.windows.values()] == windows


def test_windows_of_a_split_by_time_reach_back_but_their_targets_lie_in_one_part():
    windows = split(one_file(NOISE[:ROWS])).windows
    # ends of the targets, first and last
    ends = {"train": (24, 160), "validation": (168, 180), "test": (188, 200)}
    for part, (first, last) in ends.items():
        np.testing.assert_array_equal(windows[part].starts, np.arange(first, last + 1) - LENGTH)


@pytest.mark.parametrize(
    ("stride", "most"), [(1, 0), (3, 0), (1, 10), (3, 10), (500, 0), (1, 1000), (1, 136)]
)
def test_stride_and_max_windows_thin_the_training_windows_evenly_and_no_others(stride, most):
    one = raw_series("a", NOISE[:ROWS])
    two = raw_series("b", NOISE[ROWS : 2 * ROWS])
    windows = split({"a.csv": [one, two]}, stride=stride, max_windows=most).windows
    train = windows["train"]
    strided = np.arange(0, 160 - LENGTH + 1, stride)
    count = min(len(strided), most or len(strided))
    # one window of each equal stretch, up to one where the stretches are not whole numbers
    off_by_most = 1 if count < len(strided) and len(strided) % count > 0 else 0
    for number in range(2):
        starts = train.starts[train.series == number] - number * ROWS
        assert len(starts) == count
        assert set(starts) <= set(strided)
        assert (np.diff(starts) > 0).all()
        stretches = np.searchsorted(strided, starts) * count // len(strided)
        assert np.abs(stretches - np.arange(count)).max() <= off_by_most
    assert len(windows["validation"]) == len(windows["test"]) == 2 * (20 - HORIZON + 1)


def sampled(names, rows, most, seed=0):
    """Starts of the training windows of each named series of `rows` rows, in its own rows."""
    series = {f"{name}.csv": [raw_series(name, np.resize(NOISE, rows))] for name in names}
    train = split(series, max_windows=most, split_seed=seed).windows["train"]
    return {name: train.starts[train.series == i] - i * rows for i, name in enumerate(train.names)}


@bounded
@given(st.integers(150, 900), st.integers(1, 900), st.integers(0, 2**32))
def test_a_sample_of_windows_is_a_function_of_its_own_series_and_of_split_seed(rows, most, seed):
    alone = sampled("b", rows, most, seed)["b"]
    assert len(alone) == min(most, rows * 8 // 10 - LENGTH + 1)
    assert (np.diff(alone) > 0).all()
    np.testing.assert_array_equal(sampled("abc", rows, most, seed)["b"], alone)


@pytest.mark.parametrize("seed", range(3))
def test_a_sample_of_windows_lies_at_all_hours_even_with_one_window_a_day(seed):
    # 2,400 training windows: an even grid of 100 would show one hour of the day alone
    rows = 3029
    days = 100
    starts = sampled("ab", rows, days, seed)
    for name in "ab":
        assert len(starts[name]) == days
        assert len(set(starts[name] % 24)) >= 20
    np.testing.assert_array_equal(starts["a"] // 24, np.arange(days))
    assert (starts["a"] != starts["b"]).any()
    assert (starts["a"] != sampled("a", rows, days, seed + 1)["a"]).any()


def test_batch_gathers_exactly_the_rows_of_its_windows():
    raw = [NOISE[:ROWS].copy(), NOISE[300 : 300 + ROWS] * 1e4]
    raw[0][[50, 51, 172]] = np.nan
    scaled = []
    for values in raw:
        train = values[:160]
        filled = pd.Series(values).interpolate().to_numpy()
        scaled.append((filled - np.nanmean(train)) / np.nanstd(train))

    files = {"a.csv": [raw_series("a", raw[0])], "b.csv": [raw_series("b", raw[1])]}
    for windows in split(files).windows.values():
        index = np.random.default_rng(3).permutation(len(windows))
        context, truth, observed = windows.batch(index)
        assert context.shape == (len(index), CONTEXT)
        assert truth.shape == observed.shape == (len(index), HORIZON)
        assert {context.dtype, truth.dtype, observed.dtype} == {torch.float32}
        for row, window in enumerate(index):
            series = windows.series[window]
            start = windows.starts[window] - series * ROWS
            assert 0 <= start <= ROWS - LENGTH
            got = torch.cat([context[row], truth[row]]).numpy()
            expected = scaled[series][start : start + LENGTH]
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
            is_there = ~np.isnan(raw[series][start + CONTEXT : start + LENGTH])
            np.testing.assert_array_equal(observed[row].numpy(), is_there.astype(np.float32))
        assert set(windows.series) == {0, 1}


LAST_TENTHS = {"train": (0, 80), "validation": (80, 90), "test": (90, 100)}


def test_the_scaler_is_fitted_on_the_train_rows_alone():
    values = NOISE[:100] * 3
    values[80:] += 1e6
    mean = values[:80].mean()
    deviation = values[:80].std()
    series = prepared(values, LAST_TENTHS)
    np.testing.assert_allclose((series.mean, series.deviation), (mean, deviation), rtol=1e-12)
    np.testing.assert_allclose(series.scaled, (values - mean) / deviation, rtol=1e-6)
    assert series.scaled.dtype == np.float32
    whole = prepared(values, {"whole": (0, 100)})
    expected = (values.mean(), values.std())
    np.testing.assert_allclose((whole.mean, whole.deviation), expected, rtol=1e-12)


def test_scaling_is_done_in_float64():
    values = 1e9 + NOISE[:100]  # in float32 these would all be equal
    scaled = prepared(values, LAST_TENTHS).scaled
    expected = (NOISE[:100] - NOISE[:80].mean()) / NOISE[:80].std()
    np.testing.assert_allclose(scaled, expected, atol=1e-5)


@pytest.mark.parametrize("value", [1e9, -3.5, 0.0, np.nan, np.inf])
@pytest.mark.parametrize("row", [181, 190, 199])
def test_editing_a_test_value_changes_neither_scaler_nor_training_windows_nor_their_digest(
    row, value, tmp_path
):
    frame = hours(ROWS)
    write(tmp_path / "a.csv", frame)
    before = split_folder(tmp_path, **SHORT).windows
    frame.loc[row, "value"] = value
    write(tmp_path / "a.csv", frame)
    after = split_folder(tmp_path, **SHORT).windows
    for part in ("train", "validation"):
        assert before[part].digest == after[part].digest
        index = np.arange(len(before[part]))
        batches = zip(before[part].batch(index), after[part].batch(index), strict=True)
        for one, two in batches:
            assert torch.equal(one, two)
    assert before["test"].digest != after["test"].digest
    one = before["test"].values[:160]  # the same scale
    two = after["test"].values[:160]
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("row", [0, 80, 159])
def test_editing_a_train_value_changes_the_digest_of_the_training_windows(row):
    def digest(values):
        return split(one_file(values)).windows["train"].digest

    values = NOISE[:ROWS].copy()
    before = digest(values)
    assert digest(values.copy()) == before
    changed = values.copy()
    changed[row] = np.nextafter(changed[row], 9)  # the last bit may be another CPU's
    assert digest(changed) == before
    changed[row] += 1e-4
    assert digest(changed) != before


def test_the_digest_tells_window_choices_and_frequencies_apart():
    choices = [
        {},
        {"stride": 2},
        {"max_windows": 50},
        {"max_windows": 50, "stride": 2},
        {"split_ratio": (7, 1, 2)},
    ]
    series = one_file(NOISE[:ROWS])
    digests = [split(series, **choice).windows["train"].digest for choice in choices]
    daily = one_file(NOISE[:ROWS], "D")
    digests.append(split(daily).windows["train"].digest)
    assert len(set(digests)) == 6


@pytest.mark.parametrize(
    ("stamps", "season"),
    [
        ("hour", 24),
        ("hours that jitter", 24),
        ("15 minutes", 96),
        ("day", 7),
        ("yyyymmdd", 7),
        ("week", 52),
        ("month start", 12),
        ("month end", 12),
        ("business month end", 12),
        ("the 15th of each month", 12),
        ("quarter end", 4),
        ("quarter end in February", 4),
        ("business day", 5),
    ],
)
def test_the_season_follows_the_step(stamps, season, tmp_path):
    write(tmp_path / "a.csv", values_at(GRIDS[stamps]))
    windows = split_folder(tmp_path, split_ratio=(6, 2, 2), **SHORT).windows["test"]
    assert windows.seasons.tolist() == [season]
    assert windows.season(np.array([2, 0])).tolist() == [season, season]
    typed = split_folder(tmp_path, split_ratio=(6, 2, 2), season=10, **SHORT)
    assert typed.windows["test"].seasons.tolist() == [10]


def test_without_timestamps_the_season_is_24_and_the_run_says_so(tmp_path, capsys):
    write(tmp_path / "a.csv", pd.DataFrame({"value": NOISE}))
    data = md.load_data(data_config(data_dir=str(tmp_path)), read_config(), md.Voice("en"))
    assert data.windows["train"].seasons.tolist() == [24]
    notes = capsys.readouterr().err.splitlines()
    assert any("24" in line and "--season" in line for line in notes)


def test_each_window_knows_the_season_and_the_frequency_of_its_own_series():
    series = {
        "h.csv": [raw_series("h", NOISE[:ROWS], "h")],
        "D.csv": [raw_series("D", NOISE[10 : 10 + ROWS], "D")],
    }
    windows = split(series).windows["validation"]  # sorted by name: D before h
    index = np.arange(len(windows))
    assert windows.season(index).tolist() == [7] * 13 + [24] * 13
    assert windows.freq_of(index).tolist() == ["D"] * 13 + ["h"] * 13


def test_a_series_shorter_than_the_horizon_is_skipped_and_ends_no_run():
    tiny = {"tiny.csv": [raw_series("tiny.csv", NOISE[:5].copy())]}
    data = split(files_of(1, 160) | tiny)
    assert data.files["train"] == 1
    assert "too short" in str(data.notes["tiny.csv"][0])
    assert len(data.windows["test"].freqs) == 1


def test_one_absurd_value_in_a_held_out_part_counts_as_missing():
    values = NOISE[:160].copy()
    values[150] = 1e300
    windows = split(one_file(values)).windows["test"]
    _, truth, observed = windows.batch(np.arange(len(windows)))
    assert np.isfinite(truth.numpy()).all()
    assert truth.abs().max() < 10
    assert (observed == 0).any()


# -- too short -------------------------------------------------------------------------------------

STEPS = {"MS": 12, "QS-JAN": 4, "YS-JAN": 1, "7D": 52, "B": 5, "D": 7, "h": 24, "15min": 96}


@bounded
@given(
    rows=st.integers(1, 5000),
    freq=st.sampled_from([*STEPS, "", "s"]),
    split_by=st.sampled_from(["auto", "time", "files"]),
    ratio=st.sampled_from([(8, 1, 1), (1, 1, 1), (90, 5, 5), (6, 3, 1)]),
    lengths=st.sampled_from([(720, 96), (40, 200), (5, 1)]),
)
def test_lengths_that_are_proposed_give_windows_in_all_parts(rows, freq, split_by, ratio, lengths):
    config = data_config(
        context_length=lengths[0],
        prediction_length=lengths[1],
        split_by=split_by,
        split_ratio=ratio,
    )
    proposed = md.propose_lengths(rows, freq, config)
    if proposed is None:
        assert rows < 40
        return
    assert proposed[0] <= lengths[0] and proposed[1] <= lengths[1]
    values = np.tile(NOISE, 1 + rows // len(NOISE))[:rows].copy()
    count = 3 if split_by == "files" else 1
    series = {f"{number}": [raw_series(f"{number}", values, freq)] for number in range(count)}
    shorter = {"context_length": proposed[0], "prediction_length": proposed[1]}
    data = md.split_data(files_read(series), dataclasses.replace(config, **shorter))
    assert all(len(data.windows[part]) > 0 for part in md.PARTS)


@pytest.mark.parametrize(
    ("rows", "freq", "lengths"),
    [
        (144, "MS", (48, 12)),
        (3652, "D", (364, 28)),
        (309, "YS-JAN", (24, 6)),
        (203, "QS-JAN", (24, 4)),
        (2284, "7D", (156, 13)),
        (400, "h", (192, 24)),
        (30, "MS", (12, 3)),
    ],
)
def test_what_is_proposed_suits_the_step(rows, freq, lengths):
    config = data_config(context_length=720, prediction_length=96)
    assert md.propose_lengths(rows, freq, config) == lengths


def test_each_part_without_a_window_has_its_reason():
    def notes(values, **changes):
        with pytest.raises(md.NoWindow) as problem:
            split({"a.csv": [raw_series("a.csv", values)]}, **changes)
        return str(problem.value), problem.value.lengths

    short = {"context_length": 64, "prediction_length": 16}
    text, lengths = notes(NOISE[:90].copy(), **short)
    assert "too short: 90 rows, of which the first 72 train; a window takes 80" in text
    assert "--context_length 64 + --prediction_length 16" in text
    assert lengths == (24, 9)  # of hourly data: a day

    text, _ = notes(NOISE[:155].copy(), **short)
    assert "no validation window: 15 of 155 rows, fewer than the 16 of --prediction_length" in text

    holes = NOISE[:200].copy()
    holes[165:175:2] = np.nan
    text, lengths = notes(holes, **short, max_gap=0)
    assert "no validation window: no 80 rows" in text
    assert "without a gap longer than 0 (--max_gap)" in text
    assert lengths is None  # whatever the lengths are, too little is left


def test_of_files_of_many_lengths_lengths_are_proposed_that_work():
    series = {}
    for number, rows in enumerate((20, 60, 100, 140, 150)):
        series[f"{number}"] = [raw_series(f"{number}", NOISE[:rows].copy(), "MS")]
    with pytest.raises(md.NoWindow) as problem:
        split(series, context_length=720, prediction_length=96)
    lengths = problem.value.lengths
    assert lengths == (36, 10)  # those of the middle one
    split(series, context_length=lengths[0], prediction_length=lengths[1])


def test_a_trial_of_nothing_at_all_proposes_nothing():
    with pytest.raises(md.NoWindow) as problem:
        split({}, split_by="files")
    assert problem.value.lengths is None


def test_the_error_of_data_that_is_too_short_ends_with_a_command_that_works(tmp_path, capsys):
    frame = pd.DataFrame(
        {"Month": pd.date_range("1949-01-01", periods=144, freq="MS"), "y": NOISE[:144]}
    )
    frame.to_csv(tmp_path / "air.csv", index=False)
    words = ["--data_dir", str(tmp_path / "air.csv"), "--device", "cpu", "--lang", "en"]
    words += ["--save_dir", str(tmp_path / "run"), "--alpha", "0", "--num_epochs", "1"]
    words += ["--d_model", "8", "--num_heads", "1", "--num_layers", "1", "--split_ratio", "8:1:1"]
    words += ["--context_length", "720", "--prediction_length", "96", "--patch_size", "64"]
    assert md.main(words) == 2
    err = capsys.readouterr().err
    assert "too short: 144 rows" in err
    command = err.strip().splitlines()[-1]
    assert "--context_length 48 --prediction_length 12" in command
    assert "--patch_size 48" in command  # it was given, and is too long now
    assert md.main(shlex.split(command)[2:]) == 0


# -- A season without timestamps -------------------------------------------------------------------


def season_found(values):
    """What `other_season` finds in a series without timestamps whose season is taken to be 24."""
    files = files_read({"a.csv": [raw_series("a", values, "")]})
    config = data_config(context_length=300, prediction_length=60, split_by="time")
    return md.other_season(md.split_data(files, config).windows["train"], usual=24)


@settings(deadline=None, max_examples=25)
@given(period=st.integers(5, 85), seed=st.integers(0, 2**32 - 1))
def test_the_cycle_of_rows_without_timestamps_is_found_unless_24_is_as_good(period, seed):
    random = np.random.default_rng(seed)
    cycle = np.eye(period)[random.integers(period)]  # a peak, which is unlike all other steps
    values = np.resize(cycle, 900) + random.normal(0, 0.03, 900) + 0.001 * np.arange(900)
    assert season_found(values) == (None if 24 % period == 0 else period)


@pytest.mark.parametrize("memory", [0, 0.9, 1])
def test_rows_without_a_cycle_have_no_season(memory):
    values = np.random.default_rng(5).normal(size=900)
    for row in range(1, 900):
        values[row] += memory * values[row - 1]
    assert season_found(values) is None


def test_a_trend_and_a_constant_have_no_season():
    assert season_found(np.exp(np.arange(900) / 300)) is None
    half = np.where(np.arange(900) < 450, 1.0, 2.0)  # constant in many windows
    assert season_found(half) is None


def test_a_run_says_which_season_its_rows_seem_to_have(tmp_path, capsys):
    wave = np.sin(2 * np.pi * np.arange(900) / 48) + NOISE[:900] / 1000
    pd.DataFrame({"value": wave}).to_csv(tmp_path / "a.csv", index=False)
    words = ["--data_dir", str(tmp_path / "a.csv"), "--device", "cpu", "--lang", "en"]
    words += ["--save_dir", str(tmp_path / "run"), "--alpha", "0", "--num_epochs", "1"]
    words += ["--d_model", "8", "--num_heads", "1", "--num_layers", "1", "--split_ratio", "8:1:1"]
    words += ["--context_length", "300", "--prediction_length", "60", "--max_windows", "20"]
    words += ["--split_by", "time", "--quantiles", "off", "--stride", "1", "--columns", "first"]
    for season, is_told in (("auto", True), ("48", False)):
        assert md.main([*words, "--season", season]) == 0
        err = capsys.readouterr().err
        assert ("repeat about every 48 steps: --season 48" in err) == is_told
