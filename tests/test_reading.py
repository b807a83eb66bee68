"""Reading: kinds of files that people have; each gives the right values, or a reason that helps."""

import gzip
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import data_config, read_config
from hypothesis import given, settings
from hypothesis import strategies as st

import moirai_distill as md

ROWS = 240
# A daily wave around 50, with noise: no counter, no two values are equal.
WAVE = 50 + 10 * np.sin(2 * np.pi * np.arange(ROWS) / 24)
WAVE = (WAVE + np.random.default_rng(0).normal(0, 1, ROWS)).round(2)
HOURS = pd.date_range("2024-01-01", periods=ROWS, freq="h")
DAYS = pd.date_range("2023-11-20", periods=ROWS, freq="D")
MONTHS = pd.date_range("2001-01-01", periods=ROWS, freq="MS")


def write(path, columns, separator=",", line_end="\n"):
    """Write a CSV of name -> cells as they are; returns the path."""
    lines = [separator.join(columns)]
    lines += [separator.join(map(str, row)) for row in zip(*columns.values(), strict=True)]
    path.write_text(line_end.join(lines) + line_end, encoding="utf-8")
    return path


def read(path, *columns, **flags):
    """FileRead of a CSV."""
    return md.read_series(path, path.name, read_config(*columns, **flags))


def one(path, *columns, **flags):
    """The only RawSeries of a CSV."""
    (series,) = read(path, *columns, **flags).series
    return series


def reason(path, *columns, **flags):
    """Why a CSV cannot be used."""
    with pytest.raises(md.Unusable) as problem:
        read(path, *columns, **flags)
    return str(problem.value)


def warnings_of(file):
    """The warnings about a FileRead, as one text."""
    return "\n".join(map(str, file.report.warnings))


def facts_of(file):
    """The facts about a FileRead, as one text."""
    return "; ".join(map(str, file.report.facts))


# -- What a user always sees -----------------------------------------------------------------------


def test_all_that_was_understood_is_told(tmp_path):
    names = ["x"] * ROWS
    columns = {"row": range(ROWS), "name": names, "time": HOURS, "load": WAVE, "b": WAVE, "c": WAVE}
    told = facts_of(read(write(tmp_path / "a.csv", columns)))
    assert "time time by step h, 2024-01-01 00:00:00 to 2024-01-10 23:00:00" in told
    assert "240 of 240 rows" in told
    assert "forecast: load" in told
    assert "2 columns behind it" in told
    assert "passed over: row only rises" in told
    assert "name is no number" in told


def test_rows_that_are_not_used_are_not_counted(tmp_path):
    stamps = [*HOURS[:100], HOURS[99], *HOURS[101:]]
    told = facts_of(read(write(tmp_path / "a.csv", {"time": stamps, "v": WAVE})))
    assert "239 of 240 rows" in told


def test_of_many_files_the_first_are_told_and_the_rest_counted(tmp_path, capsys):
    for number in range(md.MOST_NOTES + 3):
        write(tmp_path / f"s{number:02d}.csv", {"time": HOURS, "v": WAVE})
    (tmp_path / "s99.csv").write_text("a\nb\n")
    md.load_data(data_config(data_dir=str(tmp_path)), read_config(), md.Voice("en"))
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "forecast: v" in line]
    assert len(lines) == md.MOST_NOTES
    assert "  ... and 3 more files\n" in out
    assert "  s99.csv: skipped: no numeric column" in out


# -- A clock, a counter, an id or a constant is no value -------------------------------------------

EPOCH = HOURS.as_unit("s").asi8
DOUBLED = np.insert(EPOCH, 50, EPOCH[50])[:ROWS]
NO_VALUES = {  # name -> (columns, the column that is forecast, frequency)
    "epoch with fractions": ({"ts": [f"{x}.25" for x in EPOCH], "value": WAVE}, "h"),
    "epoch with a doubled row": ({"ts": DOUBLED, "value": WAVE}, "h"),
    "dates that fall": (
        {"trade_date": DAYS[::-1].strftime("%Y%m%d"), "close": WAVE[::-1]},
        "D",
    ),
    "decimal dates": (
        {"decimal_date": [f"{1950 + row / 12:.3f}" for row in range(ROWS)], "value": WAVE},
        "",
    ),
    "year and month": ({"year": MONTHS.year, "month": MONTHS.month, "value": WAVE}, "MS"),
    "year, month and day": (
        {"yr": DAYS.year, "mon": DAYS.month, "day": DAYS.day, "value": WAVE},
        "D",
    ),
    "year and name of the month": (
        {"Year": MONTHS.year, "Month": MONTHS.strftime("%b"), "value": WAVE},
        "MS",
    ),
    "year and quarter": (
        {
            "year": 1960 + np.arange(ROWS) // 4,
            "quarter": [f"Q{1 + row % 4}" for row in range(ROWS)],
            "value": WAVE,
        },
        "QS-JAN",
    ),
    "year and number of the quarter": (
        {
            "year": 1960 + np.arange(ROWS) // 4,
            "quarter": 1 + np.arange(ROWS) % 4,
            "value": WAVE,
        },
        "QS-JAN",
    ),
    "Jahr und Monat": ({"Jahr": MONTHS.year, "Monat": MONTHS.month, "value": WAVE}, "MS"),
    "epoch with a zero": ({"ts": [*EPOCH[:9], 0, *EPOCH[10:]], "value": WAVE}, ""),
    "years": ({"year": 1750 + np.arange(ROWS), "value": WAVE}, "YS-JAN"),
    "a row number with a gap": (
        {"n": [*range(100), *range(105, 245)], "date": HOURS, "value": WAVE},
        "h",
    ),
    "a row number that falls": ({"n": range(ROWS, 0, -1), "date": HOURS, "value": WAVE}, "h"),
    "a constant": ({"Store": [7] * ROWS, "date": HOURS, "value": WAVE}, "h"),
    "a place": ({"lat": [52.5] * ROWS, "lon": [13.4] * ROWS, "date": HOURS, "value": WAVE}, "h"),
    "an hour of the day": ({"hour": HOURS.hour, "date": HOURS, "value": WAVE}, "h"),
    "an hour by another name": ({"HR_END": HOURS.hour + 1, "date": HOURS, "value": WAVE}, "h"),
    "half hours of the day": ({"SP": 1 + 2 * HOURS.hour, "date": HOURS, "value": WAVE}, "h"),
    "a week from Sunday on": (
        {"wd": (DAYS.day_of_week + 1) % 7, "date": DAYS, "value": WAVE},
        "D",
    ),
    "a week of the year": ({"KW": DAYS.isocalendar().week, "date": DAYS, "value": WAVE}, "D"),
    "a day of the week": ({"wd": HOURS.day_of_week, "date": HOURS, "value": WAVE}, "h"),
}


@pytest.mark.parametrize("name", NO_VALUES)
@pytest.mark.parametrize("wanted", ["first", "all"])
def test_what_only_tells_the_time_or_counts_is_no_value(name, wanted, tmp_path):
    columns, freq = NO_VALUES[name]
    series = one(write(tmp_path / "a.csv", columns), wanted)
    assert series.column in ("value", "close")
    assert series.freq == freq
    if name != "epoch with a doubled row":  # 1 of 240 has the stamp of another one
        np.testing.assert_array_equal(series.values, WAVE)


def test_a_column_that_is_nearly_empty_is_no_value_by_default(tmp_path):
    few = [""] * ROWS
    for row in range(int(md.FEWEST_KNOWN * ROWS)):
        few[10 * row] = WAVE[row]
    path = write(tmp_path / "a.csv", {"date": HOURS, "few": few, "value": WAVE})
    file = read(path)
    assert file.series[0].column == "value"
    assert "few is nearly empty" in facts_of(file)
    assert np.isfinite(one(path, "few").values).any()


def test_a_counter_that_starts_anew_is_no_value_or_told(tmp_path):
    uptime = 60.5 * (np.arange(ROWS) % 100)
    path = write(tmp_path / "a.csv", {"date": HOURS, "uptime": uptime, "value": WAVE})
    file = read(path)
    assert file.series[0].column == "value"
    assert "uptime is passed over: it goes on by one and the same step" in warnings_of(file)
    np.testing.assert_array_equal(one(path, "uptime").values, uptime)
    path = write(tmp_path / "a.csv", {"DD": HOURS.day, "hh": HOURS.hour, "value": WAVE})
    assert one(path).column == "value"
    assert "--id_columns" not in warnings_of(read(path))
    rates = np.cumsum(np.where(np.arange(ROWS) % 40, 0, 0.25)) % 1.25  # up, and down by less
    path = write(tmp_path / "a.csv", {"date": DAYS, "rate": rates + WAVE // 60, "value": WAVE})
    assert one(path).column == "rate"
    deaths = np.cumsum(WAVE)
    deaths[200:] -= 200  # a correction
    path = write(tmp_path / "a.csv", {"date": DAYS, "deaths": deaths, "value": WAVE})
    assert "deaths falls in 1 steps only" in warnings_of(read(path))
    sums = np.cumsum(WAVE.reshape(10, 24), axis=1).ravel()  # since midnight
    path = write(tmp_path / "a.csv", {"date": HOURS, "today": sums, "value": WAVE})
    assert "today falls in 9 steps only" in warnings_of(read(path))
    assert warnings_of(read(path, "today")) == ""


def test_parts_of_a_calendar_by_their_names_are_no_values(tmp_path):
    days = pd.date_range("2011-01-01", periods=3 * ROWS, freq="D")
    columns = {
        "instant": range(1, 3 * ROWS + 1),
        "dteday": days.strftime("%Y-%m-%d"),
        "season": days.month % 12 // 3 + 1,
        "holiday": [int(row % 37 == 0) for row in range(3 * ROWS)],
        "weekday": (days.day_of_week + 1) % 7,
        "workingday": (days.day_of_week < 5).astype(int),
        "cnt": np.tile(WAVE, 3),
    }
    assert one(write(tmp_path / "a.csv", columns)).column == "cnt"


def test_a_flag_that_is_forecast_is_told(tmp_path):
    path = write(tmp_path / "a.csv", {"date": HOURS, "on": np.arange(ROWS) % 3 // 2, "v": WAVE})
    assert "on takes only the values 0, 1" in warnings_of(read(path))
    assert "takes only" not in warnings_of(read(path, "on"))


@pytest.mark.parametrize("values", [range(ROWS, 0, -1), np.cumsum(np.arange(ROWS)), [7] * ROWS])
def test_where_no_other_column_is_left_the_flag_is_named(values, tmp_path):
    path = write(tmp_path / "a.csv", {"date": HOURS, "meter": values})
    assert "--columns meter" in reason(path)
    np.testing.assert_array_equal(one(path, "meter").values, np.array(values, float))


def test_a_file_whose_rows_count_down_is_not_forecast_backwards(tmp_path):
    path = write(tmp_path / "a.csv", {"n": range(ROWS, 0, -1), "value": WAVE})
    assert "newest rows come first" in reason(path)
    np.testing.assert_array_equal(one(path, time_column=["none"]).values, WAVE)
    by_two = {"Nr": range(2 * ROWS, 0, -2), "value": WAVE}
    assert "Nr only falls" in reason(write(path, by_two))


@pytest.mark.parametrize("name", ["time", "decimal_date"])
def test_decimal_years_that_fall_are_not_forecast_backwards(name, tmp_path):
    years = [f"{2020 - row / 12:.3f}" for row in range(ROWS)]
    path = write(tmp_path / "a.csv", {name: years, "value": WAVE})
    assert "newest rows come first" in reason(path)
    days = [f"{2460310.5 - row / 24:.5f}" for row in range(ROWS)]  # of astronomers
    path = write(tmp_path / "a.csv", {"JD": days, "value": WAVE})
    assert "newest rows come first" in reason(path)


@pytest.mark.parametrize("form", ["{0}.{1:02}", "{0}.{1}"])
def test_months_as_decimals_are_refused_until_it_is_said(form, tmp_path):
    months = [form.format(day.year, day.month) for day in MONTHS]  # 2020.1 is October, too
    path = write(tmp_path / "a.csv", {"period": months[::-1], "value": WAVE[::-1]})
    assert "--time_column period --time_format %Y.%m" in reason(path)
    file = read(path, time_column=["period"], time_format="%Y.%m")
    np.testing.assert_array_equal(file.series[0].values, WAVE)
    assert file.series[0].freq == "MS"


def test_texts_of_their_own_in_front_may_be_stamps_and_are_refused(tmp_path):
    terms = [f"term {80 - row // 3}, part {3 - row % 3}" for row in range(ROWS)]
    path = write(tmp_path / "a.csv", {"x": [f'"{term}"' for term in terms], "value": WAVE})
    assert "the stamps of x cannot be read, such as 'term 80, part 3'" in reason(path)
    np.testing.assert_array_equal(one(path, time_column=["none"]).values, WAVE)
    marked = {"x": [f"{value}M" for value in np.arange(ROWS) + 0.5], "value": WAVE}
    assert one(write(path, marked)).column == "value"


@pytest.mark.parametrize(
    "form",
    [
        *("{0}年", "{0}年第{1}季度", "{0}年{1}季度", "{0}년 {1}월", "{0}年{1}季度末"),
        *("FY{0}", "{1}H{2}", "H{1} {0}", "T{1}{0}", "FY{2}", "{1}S'{2}", "{0}S{1}"),
    ],
)
def test_years_with_their_sign_that_are_unread_are_refused(form, tmp_path):
    stamps = [
        form.format(2079 - row // 4, 4 - row % 4, f"{79 - row // 4:02}") for row in range(ROWS)
    ]
    path = write(tmp_path / "a.csv", {"x": stamps, "value": WAVE})
    told = reason(path)
    assert "--time_format says how they are written" in told
    assert "in English only" not in told


def test_clocks_that_fall_are_not_forecast_backwards(tmp_path):
    clocks = pd.date_range("2024-01-01", periods=ROWS, freq="5min").strftime("%H:%M")
    path = write(tmp_path / "a.csv", {"x": clocks[::-1], "value": WAVE[::-1]})
    assert "x only falls" in reason(path)
    assert "no timestamps" in warnings_of(read(write(path, {"x": clocks, "value": WAVE})))
    values = ["-", *WAVE[1:]]  # as 16.30 is a clock, and 50.13 none
    assert one(write(path, {"n": range(ROWS), "v": values})).column == "v"


def test_years_that_never_go_back_are_no_value(tmp_path):
    columns = {"Date": DAYS, "made": 2000 + np.arange(ROWS) // 40, "value": WAVE}
    assert one(write(tmp_path / "a.csv", columns)).column == "value"


def test_the_time_of_an_export_is_not_the_time_of_its_rows(tmp_path):
    columns = {"last update": ["12/06/24 23:00:00"] * ROWS, "period": HOURS, "value": WAVE}
    series = one(write(tmp_path / "a.csv", columns))
    np.testing.assert_array_equal(series.values, WAVE)
    assert series.freq == "h"


def test_an_empty_column_beside_duplicates_is_no_time_of_the_day(tmp_path):
    columns = {"x": [""] * ROWS, "date": [HOURS[0]] * ROWS, "value": WAVE}
    path = write(tmp_path / "a.csv", columns)
    assert "timestamps are duplicates with other values" in reason(path)


def test_years_whose_months_are_not_understood_are_refused(tmp_path):
    columns = {"Year": MONTHS.year, "Period": MONTHS.strftime("M%m"), "Value": WAVE}
    path = write(tmp_path / "a.csv", columns)  # as the BLS has it
    assert "--time_column Year" in reason(path)
    series = one(path, time_column=["Year", "Period"], time_format="%Y M%m")
    np.testing.assert_array_equal(series.values, WAVE)
    assert series.freq == "MS"


# -- Stamps ----------------------------------------------------------------------------------------


def no_padding(form):
    """Stamps without the zeros in front."""
    return [stamp.replace("/0", "/").removeprefix("0") for stamp in DAYS.strftime(form)]


FORMS = {  # name -> (stamps, frequency)
    "m/d/yy": (no_padding("%m/%d/%y"), "D"),
    "d.m.yy": (DAYS.strftime("%d.%m.%y"), "D"),
    "Jan 5, 2020": (DAYS.strftime('"%b %d, %Y"'), "D"),
    "January 5, 2020": (DAYS.strftime('"%B %d, %Y"'), "D"),
    "5 January 2020": (DAYS.strftime("%d %B %Y"), "D"),
    "01-31-2020": (DAYS.strftime("%m-%d-%Y"), "D"),
    "31-01-2020": (DAYS.strftime("%d-%m-%Y"), "D"),
    "2020.01.31": (DAYS.strftime("%Y.%m.%d"), "D"),
    "2020-W05": (pd.date_range("2019-12-30", periods=ROWS, freq="7D").strftime("%G-W%V"), "7D"),
    "Jan-20": (MONTHS.strftime("%b-%y"), "MS"),
    "Jan-2020": (MONTHS.strftime("%b-%Y"), "MS"),
    "2020-Jan": (MONTHS.strftime("%Y-%b"), "MS"),
    "2020/01": (MONTHS.strftime("%Y/%m"), "MS"),
    "01/2020": (MONTHS.strftime("%m/%Y"), "MS"),
    "202001": (MONTHS.strftime("%Y%m"), "MS"),
    "2020年1月": (MONTHS.strftime("%Y年%m月").str.replace("年0", "年"), "MS"),
    "2020Q1": (pd.period_range("1950Q1", periods=ROWS, freq="Q").strftime("%YQ%q"), "QS-JAN"),
    "2020-Q1": (pd.period_range("1950Q1", periods=ROWS, freq="Q").strftime("%Y-Q%q"), "QS-JAN"),
    "Q1 2020": (pd.period_range("1950Q1", periods=ROWS, freq="Q").strftime("Q%q %Y"), "QS-JAN"),
    "2020年01月05日 08时": (HOURS.strftime("%Y年%m月%d日 %H时"), "h"),
    "2020年01月05日08:00": (HOURS.strftime("%Y年%m月%d日%H:%M"), "h"),
    "UTC behind": (HOURS.strftime("%Y-%m-%d %H:%M:%S UTC"), "h"),
    "UTC behind, day first": (HOURS.strftime("%d/%m/%Y %H:%M UTC"), "h"),
    "a comma before the clock": (HOURS.strftime('"%d/%m/%Y, %H:%M:%S"'), "h"),
    "fractions, day first": (HOURS.strftime("%d/%m/%Y %H:%M:%S.250"), "h"),
    "hours as a number": (HOURS.strftime("%Y%m%d%H"), "h"),
    "minutes as a number": (HOURS.strftime("%Y%m%d%H%M"), "h"),
    "epoch milliseconds": (HOURS.as_unit("ms").asi8, "h"),
    "epoch nanoseconds": (HOURS.as_unit("ns").asi8, "h"),
    "T and Z": (HOURS.strftime("%Y-%m-%dT%H:%M:%SZ"), "h"),
    "nanoseconds": (HOURS.strftime("%Y-%m-%dT%H:%M:%S.000000000"), "h"),
    "milliseconds, T and Z": (HOURS.strftime("%Y-%m-%dT%H:%M:%S.000Z"), "h"),
    "an offset": (HOURS.strftime("%Y-%m-%d %H:%M:%S+08:00"), "h"),
    "am and pm": (HOURS.strftime("%m/%d/%Y %I:%M %p"), "h"),
    "am and pm without a space": (HOURS.strftime("%m/%d/%Y %I:%M%p"), "h"),
    "01-2020": (MONTHS.strftime("%m-%Y"), "MS"),
    "Q1/2020": (pd.period_range("1950Q1", periods=ROWS, freq="Q").strftime("Q%q/%Y"), "QS-JAN"),
    "Sat, 20 May 2023": (DAYS.strftime('"%a, %d %b %Y"'), "D"),
    "large letters": (DAYS.strftime("%d-%b-%Y").str.upper(), "D"),
    "20 Nov 23": (DAYS.strftime("%d %b %y"), "D"),
    "ctime": (HOURS.strftime("%a %b %d %H:%M:%S %Y"), "h"),
    "Monday, November 20, 2023": (DAYS.strftime('"%A, %B %d, %Y"'), "D"),
    "a comma before the fraction": (HOURS.strftime('"%Y-%m-%d %H:%M:%S,500"'), "h"),
    "points and a fraction": (HOURS.strftime("%d.%m.%Y %H:%M:%S.250"), "h"),
    "Oracle": (HOURS.strftime("%d-%b-%y %I.%M.%S.000000 %p").str.upper(), "h"),
    "clock first": (HOURS.strftime("%H:%M %d/%m/%Y"), "h"),
    "a.m. and p.m.": (
        HOURS.strftime("%m/%d/%Y %I:%M %p")
        .str.replace("([AP])M", r"\1.M.", regex=True)
        .str.lower(),
        "h",
    ),
    "a zone by its name": (HOURS.strftime("%Y-%m-%d %H:%M CET"), "h"),
    "Uhr": (HOURS.strftime("%d.%m.%Y %H:%M Uhr"), "h"),
    "January-2001": (MONTHS.strftime("%B-%Y"), "MS"),
    "2001M01": (MONTHS.strftime("%YM%m"), "MS"),
    "2020q1": (pd.period_range("1950Q1", periods=ROWS, freq="Q").strftime("%Yq%q"), "QS-JAN"),
    "2020-W05-1": (DAYS.strftime("%G-W%V-%u"), "D"),
    "2024001": (DAYS.strftime("%Y%j"), "D"),
    "2024-001": (DAYS.strftime("%Y-%j"), "D"),
    "2024/1/1 0:00": ([f"{t.year}/{t.month}/{t.day} {t.hour}:00" for t in HOURS], "h"),
    "2024/1/1 00:00": ([f"{t.year}/{t.month}/{t.day} {t:%H:%M}" for t in HOURS], "h"),
    "2024/1/1": ([f"{t.year}/{t.month}/{t.day}" for t in DAYS], "D"),
    "01/02/03, the year first": (MONTHS.strftime("%y/%m/%d"), "MS"),
    "23-11-20": (DAYS.strftime("%y-%m-%d"), "D"),
    "20-11-23": (DAYS.strftime("%d-%m-%y"), "D"),
    "2020 W05": (pd.date_range("2019-12-30", periods=ROWS, freq="7D").strftime("%G W%V"), "7D"),
    "20240101:0010": (HOURS.strftime("%Y%m%d:%H10"), "h"),
    "seconds in Chinese": (HOURS.strftime("%Y年%m月%d日 %H时00分00秒"), "h"),
}


@pytest.mark.parametrize("name", FORMS)
def test_stamps_of_each_form_are_read_where_the_newest_come_first(name, tmp_path):
    stamps, freq = FORMS[name]
    columns = {"when": list(stamps)[::-1], "value": WAVE[::-1]}
    series = one(write(tmp_path / "a.csv", columns))
    np.testing.assert_array_equal(series.values, WAVE)
    assert series.freq == freq


@pytest.mark.parametrize("name", FORMS)
def test_stamps_ahead_are_written_in_the_form_of_the_file_and_go_on(name, tmp_path):
    """The file that ends earlier, with the stamps that are said to follow, is the whole file."""
    stamps, freq = FORMS[name]
    stamps = [str(stamp) for stamp in stamps]
    known = ROWS - 30
    file = read(write(tmp_path / "a.csv", {"when": stamps[:known], "value": WAVE[:known]}))
    ahead = md.write_stamps(md.steps_after(file.series[0], 30), file.times.form)
    quote = '"' if stamps[0].startswith('"') else ""
    ahead = [f"{quote}{stamp}{quote}" for stamp in ahead]
    assert ahead == stamps[known:]
    series = one(write(tmp_path / "b.csv", {"when": stamps[:known] + ahead, "value": WAVE}))
    np.testing.assert_array_equal(series.values, WAVE)
    assert series.freq == freq


def test_units_below_the_header_are_no_form_of_stamps(tmp_path):
    stamps = ["(UTC time)", *DAYS.strftime("%Y-%m-%d")]
    file = read(write(tmp_path / "a.csv", {"when": stamps, "value": ["°C", *WAVE]}))
    (ahead,) = md.write_stamps(md.steps_after(file.series[0], 1), file.times.form)
    assert ahead == "2024-07-17"


@pytest.mark.parametrize("order", [1, -1], ids=["oldest first", "newest first"])
def test_midnight_at_the_end_of_its_date_is_refused(order, tmp_path):
    stamps = HOURS[1:].strftime("%d.%m.%Y %H:%M").to_list()
    for row in range(23, ROWS - 1, 24):
        stamps[row] = stamps[row - 1].replace("23:00", "00:00")
    path = write(tmp_path / "a.csv", {"t": stamps[::order], "v": WAVE[1:][::order]}, ";")
    told = reason(path)
    assert "'01.01.2024 00:00' stands in row" in told
    assert "beside '01.01.2024 23:00'" in told
    assert "write 24:00" in told


def test_rows_out_of_order_are_sorted_and_told(tmp_path):
    order = [*range(100), 101, 100, *range(102, ROWS)]
    file = read(write(tmp_path / "a.csv", {"t": HOURS[order], "v": WAVE[order]}))
    np.testing.assert_array_equal(file.series[0].values, WAVE)
    told = "1 rows are out of order, such as '2024-01-05 04:00:00' behind '2024-01-05 05:00:00'"
    assert told in warnings_of(file)


@pytest.mark.parametrize("quarters", [12, 120])
def test_a_step_that_changes_is_refused_and_told(quarters, tmp_path):
    """As prices of power do, which are of quarters of an hour from one day on."""
    later = pd.date_range(HOURS[-1], periods=quarters + 1, freq="15min")[1:]
    columns = {"t": [*HOURS, *later], "v": np.resize(WAVE, ROWS + quarters)}
    told = reason(write(tmp_path / "a.csv", columns))
    assert "from 2024-01-10 23:00:00 on its step is 15min, and mostly h" in told
    earlier = pd.date_range(end=HOURS[0], periods=ROWS * 4, freq="15min")[:-1]
    columns = {"t": [*earlier, *HOURS[:12]], "v": np.resize(WAVE, 4 * ROWS + 11)}
    told = reason(write(tmp_path / "a.csv", columns))
    assert "from 2024-01-01 00:00:00 on its step is h, and mostly 15min" in told
    late = HOURS + pd.to_timedelta(np.maximum(0, np.arange(ROWS) - 180), "s")  # a clock that drifts
    np.testing.assert_array_equal(
        one(write(tmp_path / "a.csv", {"t": late, "v": WAVE})).values, WAVE
    )


@pytest.mark.parametrize("form", ["%Y-%m-%d %H:%M", "%d/%m/%Y %H:%M", "%d.%m.%Y %H:%M:%S"])
def test_24_o_clock_is_the_next_midnight(form, tmp_path):
    stamps = HOURS.strftime(form).to_list()
    for row in range(24, ROWS, 24):
        day = HOURS[row - 24].strftime(form.partition(" ")[0])
        stamps[row] = f"{day} 24:00" + (":00" if "%S" in form else "")
    np.testing.assert_array_equal(
        one(write(tmp_path / "a.csv", {"t": stamps, "v": WAVE})).values, WAVE
    )


@pytest.mark.parametrize(
    "form", ["%Y-%m-%d {}:00:00.000", "%Y-%m-%dT{}:00Z", "%Y%m%d{}", "%Y%m%d{}00", "%d.%m.%Y {}:00"]
)
def test_hour_24_is_the_next_midnight_in_whatever_form(form, tmp_path):
    stamps = []
    for hour in HOURS:
        day = hour - pd.Timedelta(1, "h")
        stamps.append(day.strftime(form).format(f"{hour.hour or 24:02d}"))
    series = one(write(tmp_path / "a.csv", {"t": stamps, "v": WAVE}))
    np.testing.assert_array_equal(series.values, WAVE)
    assert series.freq == "h"


def test_of_ranges_the_start_is_read_and_told(tmp_path):
    ends = HOURS + pd.Timedelta(1, "h")
    weeks = pd.date_range("2019-01-06", periods=ROWS, freq="7D")
    ranges = {
        "entsoe": HOURS.strftime("%d.%m.%Y %H:%M - ") + ends.strftime("%d.%m.%Y %H:%M"),
        "clocks": HOURS.strftime("%d.%m.%Y %H:%M - ") + ends.strftime("%H:%M"),
        "iso": HOURS.strftime("%Y-%m-%dT%H:%MZ/") + ends.strftime("%Y-%m-%dT%H:%MZ"),
        "weeks": weeks.strftime("%Y-%m-%d - ")
        + (weeks + pd.Timedelta(6, "D")).strftime("%Y-%m-%d"),
    }
    for name, stamps in ranges.items():
        file = read(write(tmp_path / "a.csv", {"when": stamps, "value": WAVE}))
        np.testing.assert_array_equal(file.series[0].values, WAVE, err_msg=name)
        assert f"of ranges such as {stamps[0]!r} the start" in facts_of(file)
        assert file.times.stamps[0] in (HOURS[0], HOURS[0].tz_localize("UTC"), weeks[0])


@pytest.mark.parametrize("form", ["%d%m%Y", "%m%d%Y", "%d%m%y", "%y%m%d"])
@pytest.mark.parametrize("name", ["date", "when"])
def test_dates_as_numbers_with_the_year_behind_are_refused_until_it_is_said(form, name, tmp_path):
    numbers = [int(text) for text in DAYS.strftime(form)]
    path = write(tmp_path / "a.csv", {name: numbers, "value": WAVE})
    told = reason(path)
    assert "seems to hold dates" in told
    assert form in told
    series = one(path, time_format=form)
    np.testing.assert_array_equal(series.values, WAVE)
    assert series.freq == "D"
    np.testing.assert_array_equal(one(path, "value", time_column=["none"]).values, WAVE)


def test_zeros_in_front_that_a_date_as_a_number_lost_are_put_back(tmp_path):
    days = pd.date_range("2024-01-01", periods=ROWS, freq="D")
    numbers = [int(text) for text in days.strftime("%d%m%Y")]  # 1012024 is January 1st, no 10th
    series = one(write(tmp_path / "a.csv", {"date": numbers, "v": WAVE}), time_format="%d%m%Y")
    np.testing.assert_array_equal(series.values, WAVE)


def test_numbers_that_only_count_or_mean_something_are_no_dates(tmp_path):
    meters = np.round(2000 * WAVE).astype(int)  # 6 digits, some of which look like dates
    series = one(write(tmp_path / "a.csv", {"meter": meters}))
    np.testing.assert_array_equal(series.values, meters)
    path = write(tmp_path / "b.csv", {"n": range(100_101, 100_101 + 60), "value": WAVE[:60]})
    assert one(path).column == "value"


@pytest.mark.parametrize(("first", "count"), [("1930", 60), ("1950", ROWS), ("1965", ROWS)])
@pytest.mark.parametrize("form", ["%b-%y", "01/%m/%y"])
def test_years_of_two_digits_that_would_lie_far_ahead_are_refused(first, count, form, tmp_path):
    months = pd.date_range(first, periods=count, freq="MS")
    values = WAVE[: len(months)]
    path = write(tmp_path / "a.csv", {"date": months.strftime(form), "value": values})
    assert "years have two digits" in reason(path)
    np.testing.assert_array_equal(one(path, time_column=["none"]).values, values)
    path = write(tmp_path / "b.csv", {"date": months.strftime("01/%m/%Y"), "value": values})
    np.testing.assert_array_equal(one(path).values, values)


def test_seconds_that_a_spreadsheet_rounded_are_told_or_refused(tmp_path):
    rounded = [f"{ticks:.6E}" for ticks in HOURS.as_unit("ms").asi8]
    file = read(write(tmp_path / "a.csv", {"when": rounded, "value": WAVE}))
    assert "23 rows lie at the same step (4000s) as another one" in warnings_of(file)
    assert "217 of 240 rows" in facts_of(file)
    rounded = [f"{ticks:.5E}" for ticks in EPOCH]
    assert "was it rounded" in reason(write(tmp_path / "b.csv", {"when": rounded, "value": WAVE}))


def test_a_total_at_the_end_is_no_row_of_data(tmp_path):
    for word in ("Total", "Source: the bank", ""):
        path = write(tmp_path / "a.csv", {"date": [*HOURS[:-1], word], "value": WAVE})
        assert "delete that row" in reason(path)
        assert "--time_format" not in reason(path)


def test_zones_by_several_names_are_refused(tmp_path):
    stamps = [*HOURS[:120].strftime("%Y-%m-%d %H:%M CET"), *HOURS[120:].strftime("%F %H:%M CEST")]
    told = reason(write(tmp_path / "a.csv", {"date": stamps, "value": WAVE}))
    assert "CET, CEST" in told
    assert "offsets from UTC" in told


def test_several_offsets_become_utc_and_that_is_told(tmp_path):
    local = pd.date_range("2024-03-27", periods=ROWS, freq="h", tz="Europe/Berlin")
    file = read(write(tmp_path / "a.csv", {"date": [t.isoformat() for t in local], "v": WAVE}))
    np.testing.assert_array_equal(file.series[0].values, WAVE)
    assert "several offsets (+0100, +0200): read and written in UTC" in facts_of(file)


def test_midnights_with_several_offsets_are_dates(tmp_path):
    """As those of a stock exchange, which would lie on Sundays in UTC."""
    days = pd.date_range("2024-01-02", periods=ROWS, freq="B", tz="Europe/Berlin")
    for stamps in (days.astype(str), [day.isoformat() for day in days]):
        file = read(write(tmp_path / "a.csv", {"Date": stamps, "v": WAVE}))
        np.testing.assert_array_equal(file.series[0].values, WAVE)
        assert file.series[0].freq == "B"
        assert "several offsets, but always at midnight: taken as dates" in facts_of(file)
        (ahead,) = md.write_stamps(md.steps_after(file.series[0], 1), file.times.form)
        assert ahead[:10] == "2024-12-03"


def test_names_of_months_that_pandas_knows_are_read_and_others_refused(tmp_path):
    dotted = [f"{day:%B} " if day.month in (3, 4, 5, 6, 7) else f"{day:%b}. " for day in MONTHS]
    dotted = [f"{name}{day.year}" for name, day in zip(dotted, MONTHS, strict=True)]
    dotted = [text.replace("Sep.", "Sept.") for text in dotted]
    series = one(write(tmp_path / "a.csv", {"date": dotted, "value": WAVE}))
    np.testing.assert_array_equal(series.values, WAVE)
    assert series.freq == "MS"
    german = "Januar Februar März April Mai Juni Juli August September Oktober November Dezember"
    french = "janv. févr. mars avr. mai juin juil. août sept. oct. nov. déc."
    for words in (german.split(), french.split()):
        days = [f"{day.day} {words[day.month - 1]} {day.year}" for day in DAYS]
        months = [f"{words[day.month - 1][:3]}-{day:%y}" for day in MONTHS]
        for stamps in (days, months):
            told = reason(write(tmp_path / "a.csv", {"when": stamps, "value": WAVE}))
            assert "in English only" in told


def test_numbers_with_a_unit_behind_are_no_years(tmp_path):
    units = [f"{1700 + row % 300} kWh" for row in range(ROWS)]
    path = write(tmp_path / "a.csv", {"load": units, "value": WAVE})
    assert read(path, time_column=["none"]).series[0].column == "value"
    with pytest.raises(md.Unusable, match="--time_column none"):
        read(path)


def test_texts_that_hold_a_year_beside_stamps_are_no_stamps(tmp_path):
    models = [f"model {2000 + row % 20}" for row in range(ROWS)]
    path = write(tmp_path / "a.csv", {"model": models, "date": HOURS, "value": WAVE})
    np.testing.assert_array_equal(one(path).values, WAVE)


def test_midnights_without_a_clock_are_midnights(tmp_path):
    stamps = [stamp.removesuffix(" 00:00:00") for stamp in HOURS.strftime("%d/%m/%Y %H:%M:%S")]
    np.testing.assert_array_equal(
        one(write(tmp_path / "a.csv", {"t": stamps, "v": WAVE})).values, WAVE
    )


def test_rows_at_the_end_with_another_clock_are_read(tmp_path):
    stamps = [*HOURS[:230].strftime("%d/%m/%Y %H:%M"), *HOURS[230:].strftime("%d/%m/%Y %H:%M:%S")]
    np.testing.assert_array_equal(
        one(write(tmp_path / "a.csv", {"t": stamps, "v": WAVE})).values, WAVE
    )


@pytest.mark.parametrize("name", ["date", "when"])
def test_stamps_of_a_form_that_is_not_known_are_refused_until_it_is_given(name, tmp_path):
    stamps = DAYS.strftime("day %d of %m in %Y, 12:30")
    path = write(tmp_path / "a.csv", {name: [f'"{s}"' for s in stamps], "value": WAVE})
    told = reason(path)
    assert "day 20 of 11 in 2023" in told
    assert "--time_format" in told
    series = one(path, time_format="day %d of %m in %Y, %H:%M")
    np.testing.assert_array_equal(series.values, WAVE)
    assert series.freq == "D"
    assert one(path, time_column=["none"]).freq == ""
    columns = {"place": ["house 7"] * ROWS, name: [f'"{s}"' for s in stamps], "value": WAVE}
    assert one(write(path, columns), time_format="day %d of %m in %Y, %H:%M").freq == "D"
    assert "--time_format says how they are written" in reason(path, time_format="%Y.%m")


def test_a_date_that_may_be_of_two_months_is_refused(tmp_path):
    days = pd.date_range("2024-01-01", periods=12, freq="D")
    path = write(tmp_path / "a.csv", {"date": days.strftime("%m/%d/%Y"), "value": WAVE[:12]})
    assert "--time_format decides" in reason(path)
    assert one(path, time_format="%m/%d/%Y").freq == "D"
    assert one(path, time_format="%d/%m/%Y").freq == "MS"
    for count in (4, 20):  # of years, or of days or months, which are about as even
        years = pd.date_range("2001-01-01", periods=count, freq="YS").strftime("%y/%m/%d")
        path = write(path, {"date": years, "value": WAVE[:count]})
        assert "--time_format decides" in reason(path, "value")
        assert one(path, "value", time_format="%y/%m/%d").freq == "YS-JAN"


@pytest.mark.parametrize(
    ("clocks", "separator"), [("%H:%M:%S", ","), ("%H.%M.%S", ";"), ("%H:%M", "\t")]
)
def test_date_and_clock_in_two_columns(clocks, separator, tmp_path):
    columns = {"Date": HOURS.strftime("%d/%m/%Y"), "Time": HOURS.strftime(clocks), "CO": WAVE}
    path = write(tmp_path / "a.csv", columns, separator)
    assert "--time_column Date Time" in reason(path)
    series = one(path, time_column=["Date", "Time"])
    np.testing.assert_array_equal(series.values, WAVE)
    assert series.freq == "h"


def test_a_time_column_that_is_named_is_taken_before_all_others(tmp_path):
    columns = {"date": HOURS, "measured": HOURS[::-1], "value": WAVE}
    path = write(tmp_path / "a.csv", columns)
    np.testing.assert_array_equal(one(path, time_column=["measured"]).values, WAVE[::-1])
    assert "no column absent" in reason(path, time_column=["absent"])
    assert "cannot be read" in reason(path, time_column=["value"])


def test_newest_rows_first_are_turned_round_and_told(tmp_path):
    file = read(write(tmp_path / "a.csv", {"date": HOURS[::-1], "value": WAVE[::-1]}))
    np.testing.assert_array_equal(file.series[0].values, WAVE)
    assert "newest rows first: turned round" in facts_of(file)
    assert "newest" not in facts_of(read(write(tmp_path / "b.csv", {"date": HOURS, "v": WAVE})))


def test_steps_without_a_row_are_told_and_many_are_refused(tmp_path):
    def file_without(count):
        is_kept = np.ones(ROWS, bool)
        is_kept[1:-1][np.random.default_rng(0).permutation(ROWS - 2)[:count]] = False
        return write(tmp_path / "a.csv", {"date": HOURS[is_kept], "value": WAVE[is_kept]})

    few = int(0.5 * md.MUCH_MISSING * ROWS)
    file = read(file_without(few))
    assert f"{few} of 240 steps have no row" in facts_of(file)
    assert "have no row" not in warnings_of(file)
    more = int(1 + 1.5 * md.MUCH_MISSING * ROWS)
    assert f"{100 * more / ROWS:.0f} % of the steps have no row" in warnings_of(
        read(file_without(more))
    )
    path = file_without(int(0.1 * ROWS + md.MOST_MISSING * ROWS))
    assert "of 240 steps (h) have no row" in reason(path)
    assert "--time_column none" in reason(path)
    assert one(path, time_column=["none"]).freq == ""


def test_hours_of_trade_are_refused_and_one_long_gap_is_not(tmp_path):
    sessions = pd.date_range("2024-01-01 09:30", "2024-01-05 16:00", freq="min")
    sessions = sessions[sessions.indexer_between_time("09:30", "16:00")]
    columns = {"date": sessions, "value": np.resize(WAVE, len(sessions))}
    assert "hours of trade" in reason(write(tmp_path / "a.csv", columns))
    apart = [*HOURS[:120], *(HOURS[120:] + pd.Timedelta(1000, "h"))]
    file = read(write(tmp_path / "a.csv", {"date": apart, "value": WAVE}))
    assert "1,000 of 1,240 steps have no row" in facts_of(file)
    assert "81 % of the steps have no row" in warnings_of(file)


def test_some_days_of_the_week_are_called_what_they_are(tmp_path):
    days = pd.date_range("2023-01-02", periods=700)
    days = days[days.day_of_week.isin([0, 2, 4])][:ROWS]
    told = reason(write(tmp_path / "a.csv", {"date": days, "value": WAVE}))
    assert "on some days of the week only (Mon, Wed, Fri)" in told


@pytest.mark.parametrize(
    ("stamps", "freq"),
    [
        (pd.date_range("2014-01-01", periods=ROWS, freq="SMS"), "SMS-15"),
        (pd.date_range("2014-01-15", periods=ROWS, freq="SME"), "SME-15"),
        (pd.date_range("1904-01-01", periods=ROWS, freq="6MS"), "6MS"),
        (pd.date_range("1904-06-30", periods=ROWS, freq="6ME"), "6ME"),
    ],
    ids=["1st and 15th", "15th and last", "half years", "ends of half years"],
)
def test_calendars_of_half_months_and_half_years(stamps, freq, tmp_path):
    columns = {"date": stamps.strftime("%Y-%m-%d"), "value": WAVE}
    series = one(write(tmp_path / "a.csv", columns))
    np.testing.assert_array_equal(series.values, WAVE)
    assert series.freq == freq
    known = stamps[:200].strftime("%Y-%m-%d")
    shorter = one(write(tmp_path / "b.csv", {"date": known, "value": WAVE[:200]}))
    assert [*md.steps_after(shorter, 40)] == [*stamps[200:]]
    assert md.season_of(freq) == {"S": 24, "6": 2}[freq[0]]


def test_calendars_that_start_anew_without_a_fixed_step_are_refused(tmp_path):
    thirds = [day for day in pd.date_range("2016-01-01", periods=2435) if day.day in (1, 11, 21)]
    eighths = [day for day in pd.date_range("2016-01-01", periods=2100) if day.day_of_year % 8 == 1]
    for stamps in (thirds, eighths):
        path = write(tmp_path / "a.csv", {"date": stamps[:ROWS], "value": WAVE})
        told = reason(path)
        assert "a calendar that starts anew" in told
        assert "--time_column none" in told
        np.testing.assert_array_equal(one(path, time_column=["none"]).values, WAVE)


# -- Numbers ---------------------------------------------------------------------------------------


def german(values):
    """Numbers with decimal commas and points between the thousands."""
    texts = [f"{value:,.2f}" for value in values]
    return [text.replace(",", "x").replace(".", ",").replace("x", ".") for text in texts]


def test_thousands_points_beside_decimal_commas(tmp_path):
    path = write(tmp_path / "a.csv", {"date": HOURS, "value": german(100 * WAVE)}, ";")
    np.testing.assert_allclose(one(path).values, 100 * WAVE, rtol=1e-12)


def test_numbers_that_may_have_points_of_thousands_are_refused_until_it_is_said(tmp_path):
    values = np.round(20 * WAVE).astype(int)
    points = [f"{value:,}".replace(",", ".") for value in values]  # 905, and 1.012
    path = write(tmp_path / "a.csv", {"date": HOURS, "value": points}, ";")
    told = reason(path)
    assert "--decimal ." in told
    assert "--thousands ." in told
    np.testing.assert_array_equal(one(path, thousands=".").values, values)
    shown = one(path, decimal=".", thousands="none").values
    np.testing.assert_array_equal(shown, [float(text) for text in points])


def test_commas_of_thousands_in_some_rows_far_down(tmp_path):
    values = np.where(np.arange(20 * ROWS) % 999 == 998, 1049.3, np.tile(WAVE, 20))
    texts = [f'"{value:,.2f}"' if value > 1000 else value for value in values]
    stamps = pd.date_range("2020-01-01", periods=len(values), freq="h")
    path = write(tmp_path / "a.csv", {"date": stamps, "value": texts})
    np.testing.assert_array_equal(one(path).values, values)


def test_exponents_behind_decimal_commas(tmp_path):
    texts = [f"{value:.4E}".replace(".", ",") for value in WAVE]
    path = write(tmp_path / "a.csv", {"date": HOURS, "value": texts}, ";")
    np.testing.assert_array_equal(one(path).values, WAVE)


def test_as_many_decimal_commas_as_semicolons(tmp_path):
    """Cut at the commas, the second number would be the decimals of the first."""
    commas = [f"{value:.2f}".replace(".", ",") for value in WAVE]
    path = write(tmp_path / "a.csv", {"date, local": HOURS, "value": commas}, ";")
    np.testing.assert_array_equal(one(path).values, WAVE)


@pytest.mark.parametrize("mark", [" ", "'", "\u202f", "\xa0"])
@pytest.mark.parametrize("decimal", [".", ","])
def test_other_marks_of_thousands_are_read_where_they_are_given(decimal, mark, tmp_path):
    values = np.floor(1000 * WAVE) + 0.25
    texts = [f"{value:,.2f}".replace(",", mark).replace(".", decimal) for value in values]
    path = write(tmp_path / "a.csv", {"date": HOURS, "value": texts}, ";")
    stated = "'" if mark == "'" else " "
    assert f"--thousands {stated!r}" in reason(path)
    path = write(path, {"date": HOURS, "value": [f"{text} €" for text in texts]}, ";")
    assert f"--thousands {stated!r}" in reason(path)
    np.testing.assert_array_equal(one(path, thousands=stated).values, values)
    np.testing.assert_array_equal(one(path, thousands=mark).values, values)


@pytest.mark.parametrize("stated", ["none", " "])
def test_a_mark_that_is_not_of_thousands_is_of_decimals(stated, tmp_path):
    texts = [f"{value:.3f}".replace(".", ",") for value in WAVE]
    path = write(tmp_path / "a.csv", {"date": HOURS, "value": texts}, ";")
    assert "--decimal ," in reason(path)
    np.testing.assert_array_equal(one(path, thousands=stated).values, WAVE)


@pytest.mark.parametrize("cell", ["41.46 p", "1 049", ":"])
def test_a_number_at_the_end_that_is_not_read_is_refused(cell, tmp_path):
    """As Eurostat marks numbers that are preliminary; a colon is none."""
    texts = [*map(str, WAVE)]
    texts[-3] = cell
    path = write(tmp_path / "a.csv", {"date": HOURS, "value": texts})
    if cell == ":":
        assert "1 cells of value are no numbers, such as ':'" in warnings_of(read(path))
        return
    assert f"value holds {cell!r} among its last rows" in reason(path)
    assert np.isnan(one(path, na_values=[cell]).values[-3])
    columns = {"date": HOURS[::-1], "other": WAVE, "value": texts[::-1]}
    file = read(write(path, columns), "all")  # newest rows first
    assert [series.column for series in file.series] == ["other"]
    assert f"a.csv / value: value holds {cell!r}" in str(file.report.skipped[0])


@pytest.mark.parametrize("cell", ["\u22124.0", "(4.0)", "4.0-", "1 049", "12 kWh", "?"])
def test_cells_that_are_no_numbers_are_counted_and_quoted(cell, tmp_path):
    texts = [*map(str, WAVE)]
    texts[7] = texts[70] = cell
    file = read(write(tmp_path / "a.csv", {"date": HOURS, "value": texts}))
    assert f"2 cells of value are no numbers, such as {cell!r}" in warnings_of(file)
    assert np.flatnonzero(np.isnan(file.series[0].values)).tolist() == [7, 70]


def test_a_column_of_mostly_numbers_is_named_before_another_takes_its_place(tmp_path):
    texts = [f"{value} kW" if row % 7 == 0 else value for row, value in enumerate(WAVE)]
    path = write(tmp_path / "a.csv", {"date": HOURS, "power": texts, "humidity": WAVE})
    file = read(path)
    assert "power is passed over: it is only 85 % numbers" in warnings_of(file)
    assert file.series[0].column == "humidity"


@pytest.mark.parametrize("value", [-9999, -200, 999.9])
def test_a_value_that_seems_to_mean_missing_is_told_and_can_be_said_to(value, tmp_path):
    values = WAVE.copy()
    values[[3, 50, 51, 120]] = value
    path = write(tmp_path / "a.csv", {"date": HOURS, "value": values})
    file = read(path)
    assert f"value is {value:g} in 4 rows" in warnings_of(file)
    assert f"--na_values {value:g}" in warnings_of(file)
    np.testing.assert_array_equal(file.series[0].values, values)
    known = one(path, na_values=[str(value)]).values
    assert np.flatnonzero(np.isnan(known)).tolist() == [3, 50, 51, 120]


@settings(max_examples=12, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6).map(lambda x: round(x, 2)), min_size=30, max_size=60))
def test_whatever_marks_are_used_the_numbers_come_out_or_the_file_is_refused(
    tmp_path_factory, values
):
    folder = tmp_path_factory.mktemp("marks")
    values = np.array(values)
    stamps = HOURS[: len(values)]
    plain = [f"{value:.2f}" for value in values]
    spelt = {
        ("plain", ","): plain,
        ("commas", ";"): [text.replace(".", ",") for text in plain],
        ("german", ";"): german(values),
        ("english", ","): [f'"{value:,.2f}"' for value in values],
    }
    for (name, separator), texts in spelt.items():
        path = write(folder / f"{name}.csv", {"date": stamps, "value": texts}, separator)
        try:
            np.testing.assert_array_equal(one(path, "value").values, values)
        except md.Unusable as problem:
            raise AssertionError(f"{name}: {problem}") from problem


def with_commas(values):
    """Numbers with decimal commas."""
    return [f"{value:.2f}".replace(".", ",") for value in values]


@pytest.mark.parametrize("header", ["time,value,", "time,,value", "time,value, "])
def test_a_spare_comma_in_the_header_does_not_hide_decimal_commas(header, tmp_path):
    path = tmp_path / "a.csv"
    rows = [f"{day:%Y-%m-%d},{text}" for day, text in zip(DAYS, with_commas(WAVE), strict=True)]
    path.write_text("\n".join([header, *rows]))
    assert "if 50,13 is one number with a decimal comma" in reason(path)
    notes = [f"{row.partition(',')[0]},{value},ok" for row, value in zip(rows, WAVE, strict=True)]
    path.write_text("\n".join(["time,value,", *notes]))  # a column without a name may be a note
    np.testing.assert_array_equal(one(path).values, WAVE)


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_points_before_three_digits_beside_decimal_commas_are_refused(separator, tmp_path):
    thousandths = [f"{value:.3f}" for value in WAVE]
    columns = {"date": HOURS, "a": thousandths, "b": with_commas(WAVE)}
    path = write(tmp_path / "a.csv", columns, separator)
    assert "--thousands ." in reason(path, "all")
    a, b = read(path, "all", thousands=".").series
    np.testing.assert_allclose(a.values, [float(text) * 1000 for text in thousandths])
    np.testing.assert_array_equal(b.values, WAVE)
    columns = {"date": HOURS, "a": [text.replace(".", ",") for text in thousandths], "b": WAVE}
    assert "--thousands ," in reason(write(path, columns, separator), "all")


def test_a_value_and_its_flag_in_one_cell_are_no_decimals(tmp_path):
    cells = [f'"{int(10 * value):+05d},1"' for value in WAVE]  # as NOAA has it
    path = write(tmp_path / "a.csv", {"DATE": HOURS, "TMP": cells})
    assert "or two values" in reason(path)
    assert "no numeric column" in reason(path, decimal=".")
    quoted = write(path, {"DATE": HOURS, "TMP": [f'"{text}"' for text in with_commas(WAVE)]})
    np.testing.assert_array_equal(one(quoted, decimal=",").values, WAVE)


def test_points_in_a_tab_file_are_decimals_where_a_number_shows_it(tmp_path):
    columns = {"date": HOURS, "a": [f"{value / 50:.3f}" for value in WAVE]}  # some are below 1
    path = write(tmp_path / "a.csv", columns, "\t")
    np.testing.assert_array_equal(one(path).values, [float(text) for text in columns["a"]])
    columns["a"] = [f"{int(20 * value):,}".replace(",", ".") for value in WAVE]  # 905, and 1.012
    assert "--thousands ." in reason(write(path, columns, "\t"))
    assert "beside 999" in reason(write(path, columns))  # between commas, too
    np.testing.assert_array_equal(one(path, thousands=".").values, (20 * WAVE).astype(int))
    shown = one(path, decimal=".").values
    np.testing.assert_array_equal(shown, [float(text) for text in columns["a"]])


@pytest.mark.parametrize(
    ("form", "unit"),
    [
        *(("${:,.2f}", "$"), ("-US${:,.2f}", "US$"), ("R$ {:,.2f}", "R$"), ("EUR {:.2f}", "EUR")),
        *(("{:.1f} %", "%"), ("{:.1f}%", "%"), ("{:.1f} kWh", "kWh"), ("{:,.2f}\xa0€", "€")),
    ],
)
def test_a_unit_that_all_numbers_have_is_left_out_and_told(form, unit, tmp_path):
    values = (30 * WAVE).round(1)
    whole = (30 * WAVE).astype(int)
    cells = [form.format(value) for value in values]
    path = write(tmp_path / "a.csv", {"date": HOURS, "price": cells, "volume": whole}, ";")
    file = read(path)
    np.testing.assert_array_equal(file.series[0].values, -values if "-" in form else values)
    assert f"of price the unit {unit!r} is left out" in facts_of(file)
    commas = [cell.replace(",", "x").replace(".", ",").replace("x", ".") for cell in cells]
    path = write(path, {"date": HOURS, "price": commas, "volume": whole}, ";")
    np.testing.assert_array_equal(one(path).values, file.series[0].values)
    cells[5] = "12 GWh"
    file = read(write(path, {"date": HOURS, "price": cells, "volume": whole}, ";"))
    assert "1 cells of price are no numbers, such as '12 GWh'" in warnings_of(file)


@pytest.mark.parametrize("form", ["{:.2f}M", "({:.1f})", "{:.0f}A"])
def test_numbers_with_signs_are_told_before_another_column_takes_their_place(form, tmp_path):
    cells = [f'"{form.format(30 * value)}"' for value in WAVE]
    path = write(tmp_path / "a.csv", {"date": HOURS, "price": cells, "volume": WAVE})
    file = read(path)
    assert file.series[0].column == "volume"
    told = f"price is passed over: it holds no plain numbers, but cells such as {cells[0][1:-1]!r}"
    assert told in warnings_of(file)
    assert "price holds no plain numbers" in reason(path, "price")


def test_texts_with_digits_are_no_numbers_with_signs(tmp_path):
    codes = [f"A{row % 7}" for row in range(ROWS)]
    days = HOURS.strftime("%d.%m.%Y")
    columns = {"date": HOURS, "code": codes, "day": days, "rate": ["5min"] * ROWS, "v": WAVE}
    assert warnings_of(read(write(tmp_path / "a.csv", columns))) == ""


def test_two_sentinels_side_by_side_and_a_rare_one_are_told(tmp_path):
    values = WAVE.copy()
    values[[3, 50, 51, 120]] = -9999
    values[[4, 60]] = -8888.25
    told = warnings_of(read(write(tmp_path / "a.csv", {"date": HOURS, "value": values})))
    assert "value is -9999 in 4 rows" in told
    assert "--na_values -8888.25" in told
    plain = warnings_of(read(write(tmp_path / "a.csv", {"date": HOURS, "value": WAVE})))
    assert "--na_values" not in plain


# -- Long format, ids and rows that are there twice ------------------------------------------------


def long(**ids):
    """Columns of a long file: each combination of ids has the wave, shifted by its number."""
    keys = [()]
    for values in ids.values():
        keys = [(*key, value) for key in keys for value in values]
    columns = {name: [] for name in (*ids, "date", "sales")}
    for number, key in enumerate(keys):
        for name, value in zip(ids, key, strict=True):
            columns[name] += [value] * ROWS
        columns["date"] += [*HOURS]
        columns["sales"] += [*(WAVE + 100 * number)]
    return columns


def test_a_second_key_by_a_known_name_makes_a_series_for_each_pair(tmp_path):
    path = write(tmp_path / "a.csv", long(item_id=["a", "b"], series_id=["x", "y"]))
    file = read(path)
    assert [series.column for series in file.series] == ["a / x", "a / y", "b / x", "b / y"]
    for number, series in enumerate(file.series):
        np.testing.assert_allclose(series.values, WAVE + 100 * number)
    assert "4 series by item_id, series_id" in facts_of(file)


def test_a_second_key_by_another_name_is_asked_for(tmp_path):
    path = write(tmp_path / "a.csv", long(item_id=["a", "b"], store=["x", "y"]))
    assert "--id_columns item_id store" in reason(path)
    names = [series.column for series in read(path, id_columns=["item_id", "store"]).series]
    assert names == ["a / x", "a / y", "b / x", "b / y"]


def test_a_key_by_another_name_is_asked_for(tmp_path):
    path = write(tmp_path / "a.csv", long(site=["a", "b"]))
    assert "--id_columns site" in reason(path)
    assert len(read(path, id_columns=["site"]).series) == 2


def test_ids_stay_as_they_are_written(tmp_path):
    path = write(tmp_path / "a.csv", long(id=["000001", "1", "null", "", "NA"]))
    names = [series.column for series in read(path).series]
    assert sorted(names) == sorted(["000001", "1", "null", "(blank)", "NA"])


def test_ids_that_are_numbers_are_in_order_of_their_size(tmp_path):
    path = write(tmp_path / "a.csv", long(id=[10, 9, 100]))
    assert [series.column for series in read(path).series] == ["9", "10", "100"]


def test_a_column_called_series_with_the_values_in_it_is_the_value(tmp_path):
    values = np.round(WAVE)
    series = one(write(tmp_path / "a.csv", {"date": HOURS, "series": values}))
    np.testing.assert_array_equal(series.values, values)


def test_rows_that_are_there_twice_are_used_once_and_told(tmp_path):
    path = write(tmp_path / "a.csv", {"date": [*HOURS, *HOURS], "value": [*WAVE, *WAVE]})
    file = read(path)
    np.testing.assert_array_equal(file.series[0].values, WAVE)
    assert "240 rows are there twice" in warnings_of(file)
    overlap = {"date": [*HOURS[:130], *HOURS[120:]], "value": [*WAVE[:130], *WAVE[120:]]}
    file = read(write(path, overlap))
    np.testing.assert_array_equal(file.series[0].values, WAVE)
    assert "10 rows are there twice" in warnings_of(file)


def test_series_that_lie_in_rows_are_refused_with_what_to_do(tmp_path):
    values = [[*map(str, WAVE[:40])]] * 3
    dates = DAYS[:40].strftime("%m/%d/%y").str.replace(r"\b0", "", regex=True)
    heads = {
        "JHU": ["Province/State", "Country/Region", "Lat", "Long", *dates],
        "M4": [f"V{number}" for number in range(1, 42)],
        "M5": ["id", "item_id", "store_id", *(f"d_{number}" for number in range(1, 41))],
        "web traffic": ["Page", *DAYS[:40].strftime("%Y-%m-%d")],
        "years": ["Country Name", "Country Code", *map(str, range(1960, 2000))],
    }
    for name, head in heads.items():
        texts = [f"a{number}" for number in range(len(head) - 40)]
        rows = [",".join([*texts, *row]) for row in values]
        path = tmp_path / "a.csv"
        path.write_text("\n".join([",".join(head), *rows]))
        told = reason(path)
        assert "series lie in rows" in told, name
        assert head[0] in told


@pytest.mark.parametrize(
    "names",
    [
        [f"{month:%b-%y}" for month in MONTHS[:40]],
        [f"{month:%YM%m}" for month in MONTHS[:40]],
        [f"{month:%Y%m}" for month in MONTHS[:40]],
        [f"{year} [YR{year}]" for year in range(1980, 2020)],
        [str(year) for year in range(1980, 2020)],
        [str(year) for year in range(1960, 2020, 5)],
        [str(year) for year in range(2015, 2021)],
        [str(year) for year in range(2019, 1990, -1)],
        [f"Y{year}" for year in range(1990, 2020)],
        [f"{day:%Y%m%d}" for day in DAYS[:40]],
        [f"{hour:%H:%M}" for hour in HOURS[:24]],
        [f"{1 + n % 4}Q{15 + n // 4}" for n in range(30)],
        [f"d_{n}" for n in range(60)],
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"],
    ],
    ids=[
        *("Jan-20", "2020M01", "202001", "YR", "years", "5 years", "few years", "falling years"),
        *("Y1990", "20200131", "clocks", "1Q15", "d_1", "months"),
    ],
)
@pytest.mark.parametrize("first", [["a", "b", "c"], [7, 3, 9]], ids=["texts", "numbers"])
def test_series_in_rows_by_other_names_are_refused(first, names, tmp_path):
    columns = {"place": first} | {name: [1.5, 2.5, 1.0] for name in names}
    assert "series lie in rows" in reason(write(tmp_path / "a.csv", columns))


@pytest.mark.parametrize(
    "names",
    [
        ["Q1", "Q2", "Q3", "Q4"],
        [*pd.date_range("2024-01-01", periods=12, freq="MS").strftime("%B"), "Annual", "Mean"],
        ["Jan", "Feb", "Mär", "Apr", "Mai", "Jun", "Jul", "Aug", "Sep", "Okt", "Nov", "Dez"],
        ["janv", "févr", "mars", "avr", "mai", "juin", "juil", "août", "sept", "oct", "nov", "déc"],
        ["Gen", "Feb", "Mar", "Apr", "Mag", "Giu", "Lug", "Ago", "Set", "Ott", "Nov", "Dic"],
        [f"{month}月" for month in range(1, 13)],
        [f"h{hour}" for hour in range(1, 25)],
        [f"Hour {hour}" for hour in range(24)],
        ["DJF", "JFM", "FMA", "MAM", "AMJ", "MJJ", "JJA", "JAS", "ASO", "SON", "OND", "NDJ"],
    ],
    ids=[
        *("quarters", "months and means", "German", "French", "Italian", "Chinese"),
        *("h1", "Hour 0", "DJF"),
    ],
)
def test_columns_that_fill_a_year_or_a_day_are_series_in_rows(names, tmp_path):
    columns = {"Year": range(1900, 1960)} | {name: WAVE[n : n + 60] for n, name in enumerate(names)}
    assert "series lie in rows" in reason(write(tmp_path / "a.csv", columns))


@pytest.mark.parametrize(
    ("stamps", "count", "form"),
    [
        *((DAYS[:30], 24, "{}"), (DAYS[:30], 24, "{:02d}h"), (DAYS[:30], 48, "SP{}")),
        *((DAYS[:30], 96, "{}"), (MONTHS[:30], 31, "{}"), (MONTHS[::12], 12, "{}")),
    ],
    ids=["hours", "01h", "half hours", "quarters of hours", "days", "months"],
)
@pytest.mark.parametrize("first", [0, 1])
def test_columns_that_number_the_steps_of_a_row_are_refused(first, stamps, count, form, tmp_path):
    columns = {"date": stamps.strftime("%Y-%m-%d")}
    if count == 31:
        columns = {"year": stamps.year, "month": stamps.month}
    for number in range(first, first + count):
        columns[form.format(number)] = WAVE[: len(stamps)] + number
    path = write(tmp_path / "a.csv", columns)
    names = [*columns][-count:]
    told = f"columns {names[0]}, {names[1]}, ..., {names[-1]} seem to be the steps between two rows"
    assert told in reason(path) or "series lie in rows" in reason(path)
    np.testing.assert_array_equal(one(path, names[3]).values, columns[names[3]])


def test_columns_with_numbers_beside_hours_are_series(tmp_path):
    columns = {"date": HOURS} | {str(number): WAVE + number for number in range(24)}
    assert len(read(write(tmp_path / "a.csv", columns), "all").series) == 24


def test_years_with_their_sign_are_series_in_rows(tmp_path):
    columns = {"地区": ["a", "b", "c"]} | {
        f"{year}年": [1.5, 2.5, 1.0] for year in range(2023, 1990, -1)
    }
    assert "series lie in rows" in reason(write(tmp_path / "a.csv", columns))


def test_columns_that_are_numbered_by_tens_are_series_in_rows(tmp_path):
    columns = {"place": ["a", "b", "c"]} | {f"x{10 * n}": [1.5, 2.5, 1.0] for n in range(40)}
    assert "series lie in rows" in reason(write(tmp_path / "a.csv", columns))


def test_a_separator_at_the_end_of_each_line_does_not_hide_series_in_rows(tmp_path):
    columns = {"place": ["a", "b", "c"]}
    for year in range(1960, 2024):
        columns[f"{year}"] = [1.5, 2.5, 1.0]
    columns[""] = [""] * 3
    assert "series lie in rows" in reason(write(tmp_path / "a.csv", columns))


def test_ids_of_so_many_kinds_as_rows_are_refused(tmp_path):
    path = write(tmp_path / "a.csv", {"Datum": HOURS, "value": WAVE})
    assert "--id_columns Datum: 240 different ids in 240 rows" in reason(path, id_columns=["Datum"])


@pytest.mark.parametrize("city", [["A"] * 120 + ["B"] * 120, ["A", "B"] * 120])
def test_texts_in_blocks_or_by_turns_may_tell_series_apart(city, tmp_path):
    path = write(tmp_path / "a.csv", {"date": HOURS, "value": WAVE, "city": city})
    assert "--id_columns city" in warnings_of(read(path))
    assert warnings_of(read(path, id_columns=["none"])) == ""
    stations = [101] * 120 + [102] * 120
    path = write(path, {"date": HOURS, "value": WAVE, "year": HOURS.year, "station": stations})
    assert warnings_of(read(path)) == "if station tells the series apart: --id_columns station"
    flags = ["ok"] * 100 + ["bad"] * 3 + ["ok"] * 137
    path = write(path, {"date": HOURS, "value": WAVE, "flag": flags, "day": DAYS.strftime("%a")})
    assert warnings_of(read(path)) == ""


def test_columns_with_running_names_beside_stamps_are_no_series_in_rows(tmp_path):
    columns = {"date": HOURS} | {f"V{number}": WAVE + number for number in range(1, 40)}
    assert len(read(write(tmp_path / "a.csv", columns), "all").series) == 39


# -- Files of other kinds, encodings, what stands above --------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04" + b"x" * 99, "zip"),
        (b"PAR1" + b"x" * 99, "Parquet"),
        (b"BZh9" + b"x" * 99, "bzip2"),
        (b"\xfd7zXZ\x00" + b"x" * 99, "xz"),
        (gzip.compress(b"date,value\n"), "must end with .csv.gz"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b'[\n {"date": "2024-01-01", "value": 3},\n', "JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "JSON"),
        (b"<?xml version='1.0'?>\n<a>1</a>\n", "XML"),
        (b"<data>\n<row>1</row>\n</data>\n", "XML"),
        (b"-- MySQL dump\nCREATE TABLE a (b int);\n", "SQL"),
        (b"% made by Weka\n@relation a\n@data\n1,2\n", "ARFF"),
    ],
    ids=[
        *("zip", "parquet", "bzip2", "xz", "gzip", "html", "lfs"),
        *("json", "json with a mark", "xml", "xml without a head", "sql", "arff"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(content, words, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    assert words in reason(path)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_names_between_angle_brackets_are_no_xml(separator, tmp_path):
    columns = {"<DATE>": DAYS.strftime("%Y%m%d"), "<CLOSE>": WAVE}
    np.testing.assert_array_equal(one(write(tmp_path / "a.csv", columns, separator)).values, WAVE)


@pytest.mark.parametrize("separator", [" ", "^", "~"])
def test_another_separator_is_named(separator, tmp_path):
    columns = {"date": DAYS.strftime("%Y-%m-%d"), "value": WAVE}
    path = write(tmp_path / "a.csv", columns, separator)
    assert f"no separator found (tab ; , or |): its lines are such as '2023-11-20{separator}50" in (
        reason(path)
    )


def test_names_of_rows_and_commas_at_their_ends_are_told(tmp_path):
    path = tmp_path / "a.csv"
    rows = [f"{stamp},{value}" for stamp, value in zip(HOURS, WAVE, strict=True)]
    path.write_text("\n".join(["date,value", *(f"{row}," for row in rows)]))
    assert "each row ends with a separator too many" in reason(path)
    named = [f'"{number}",{row}' for number, row in enumerate(rows, start=1)]  # write.table of R
    path.write_text("\n".join(["date,value", *named]))
    assert "each row begins with its number" in reason(path)
    path.write_text("\n".join(["date,value", *(f"{row},5" for row in rows)]))
    assert "the last such as '5'" in reason(path)


def test_a_file_that_gzip_did_not_pack_is_told(tmp_path):
    path = write(tmp_path / "a.csv.gz", {"date": HOURS, "value": WAVE})
    plain = path.read_bytes()
    assert "not packed by gzip" in reason(path)
    path.write_bytes(gzip.compress(plain) + b"more")
    assert "bytes that are no gzip follow" in reason(path)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_few_rows_are_too_short_and_not_constant(rows, tmp_path):
    path = write(tmp_path / "a.csv", {"date": HOURS[:rows], "value": sorted(WAVE[:rows])})
    assert "too short" in reason(path)


def test_the_header_of_a_second_table_is_refused(tmp_path):
    first = write(tmp_path / "a.csv", {"date": HOURS[:120], "value": WAVE[:120]}).read_text()
    second = write(tmp_path / "b.csv", {"time": HOURS[120:], "PM2.5": WAVE[120:]}).read_text()
    for between in ("", "\n"):
        path = tmp_path / "c.csv"
        path.write_text(first + between + second)
        assert "row 121 holds no values, but time, PM2.5" in reason(path)


@pytest.mark.parametrize("word", ["Total", "合计", ""])
def test_a_total_below_the_table_is_refused(word, tmp_path):
    path = write(tmp_path / "a.csv", {"date": HOURS, "value": WAVE})
    path.write_text(path.read_text() + f"{word},{WAVE.sum():.2f}\n")
    told = reason(path)
    assert "in row 241" in told
    assert "delete that row" in told


@pytest.mark.parametrize(
    "above",
    ["latitude,longitude,zone\n52.52,13.41,GMT\n\n", "station,height\nBerlin,38\n\n"],
    ids=["wider", "as wide"],
)
def test_a_table_above_the_table_is_refused_with_its_lines(above, tmp_path):
    path = write(tmp_path / "a.csv", {"time": HOURS, "temperature_2m": WAVE})
    path.write_text(above + path.read_text())
    assert "--skip_rows 3" in reason(path)
    np.testing.assert_array_equal(one(path, skip_rows=3).values, WAVE)


def test_a_preface_as_wide_as_the_table_is_told_from_a_row_to_delete(tmp_path):
    table = write(tmp_path / "a.csv", {"TIMESTAMP": HOURS, "Batt": WAVE}).read_text()
    prefaces = {
        "a logger": '"TOA5","CR1000"\n' + table.replace("Batt\n", "Batt\nTS,Volts\n,Avg\n"),
        "marked lines": "#group,false\n#datatype,double\n#default,\n" + table,
        "a short title, too": "Demand\nHourly Demand,,,\n"
        + table.replace("\n", ",5,6\n").replace("Batt,5,6", "Batt,b,c"),
        "a title and commas": "Hourly Demand,,,\nfor 2024,,,\n"
        + table.replace("\n", ",5,6\n").replace("Batt,5,6", "Batt,b,c"),
    }
    lines = {"a logger": 3, "marked lines": 3, "a title and commas": 2, "a short title, too": 2}
    for name, text in prefaces.items():
        path = tmp_path / "b.csv"
        path.write_text(text)
        told = reason(path)
        assert "delete that row" not in told, name
        assert "--skip_rows" in told, name
        assert str(lines[name]) in told.partition("--skip_rows")[2], name
        skip = 1 if name == "a logger" else lines[name]
        np.testing.assert_array_equal(one(path, skip_rows=skip).values, WAVE, err_msg=name)


def test_a_name_that_was_decoded_is_shown(tmp_path):
    path = write(tmp_path / "a.csv", {"date": HOURS, "Temp": WAVE})
    path.write_bytes(path.read_text().replace("Temp", "Température").encode("cp1252"))
    shown = one(path).column
    assert f"read as gb18030, such as {shown!r}" in warnings_of(read(path))
    assert one(path, encoding="cp1252").column == "Température"


def test_lines_above_that_pandas_stumbles_over_are_told(tmp_path):
    path = tmp_path / "a.csv"
    rows = [f"{row},{value}" for row, value in enumerate(WAVE)]
    path.write_text("\n".join(["LabVIEW,", "Separator,Comma", "X_Value,Untitled,Comment", *rows]))
    assert "if the table begins further down, --skip_rows" in reason(path)


def test_the_separator_that_a_spreadsheet_writes_above_is_heard(tmp_path):
    path = write(tmp_path / "a.csv", {"date": HOURS, "value": WAVE}, "|")
    path.write_text("sep=|\n" + path.read_text())
    np.testing.assert_array_equal(one(path).values, WAVE)


def test_lines_above_the_header_are_suspected_and_can_be_left_out(tmp_path):
    path = write(tmp_path / "a.csv", {"date": HOURS, "value": WAVE})
    path.write_text("Station 42\n\nmade by a logger\n" + path.read_text())
    assert "--skip_rows 3" in reason(path)
    file = read(path, skip_rows=3)
    np.testing.assert_array_equal(file.series[0].values, WAVE)
    assert "3 lines above the header left out" in facts_of(file)


@pytest.mark.parametrize(
    ("encoding", "name"),
    [("shift-jis", "気温"), ("big5", "溫度"), ("euc-kr", "온도"), ("cp1251", "температура")],
)
def test_names_in_an_encoding_that_is_given(encoding, name, tmp_path):
    path = tmp_path / "a.csv"
    lines = [f"date,{name}", *(f"{t},{v}" for t, v in zip(HOURS, WAVE, strict=True))]
    path.write_bytes("\n".join(lines).encode(encoding))
    series = one(path, name, encoding=encoding)
    np.testing.assert_array_equal(series.values, WAVE)
    assert "read as" in warnings_of(read(path))
    assert "no such encoding" in reason(path, encoding="nonsense")
    assert "not in --encoding utf-8" in reason(path, encoding="utf-8")


def test_a_file_without_names_says_so(tmp_path):
    path = write(tmp_path / "a.csv", {"2023-12-31 23:00": HOURS, "50.5": WAVE})
    assert "its first line" in warnings_of(read(path))


def test_the_rows_of_commas_at_the_end_of_a_spreadsheet_are_no_rows(tmp_path):
    path = write(tmp_path / "a.csv", {"id": ["a"] * ROWS, "date": HOURS, "value": WAVE})
    path.write_text(path.read_text() + ",,\n" * 20)
    file = read(path)
    np.testing.assert_array_equal(file.series[0].values, WAVE)
    assert "240 of 240 rows" in facts_of(file)


# -- Files that come from strangers ----------------------------------------------------------------


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path):
    path = tmp_path / "bomb.csv.gz"
    line = b"0" * 999 + b"\n"
    path.write_bytes(gzip.compress(line * 5000, 9))  # 5 MB
    assert path.stat().st_size < 20_000
    assert "larger than 3 MB" in reason(path, max_file_mb=3)
    assert "larger" not in reason(path, max_file_mb=0)


def test_a_line_that_is_too_long_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    for content in (b"1," * md.LONGEST_LINE, b"date,value\n" + b"1" * (2 * md.LONGEST_LINE)):
        path.write_bytes(content)
        assert "a line of more than" in reason(path)


def test_too_many_columns_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    header = ",".join(f"c{number}" for number in range(md.MOST_COLUMNS + 1))
    path.write_text(f"{header}\n{header}\n")
    assert "columns, more than" in reason(path)


# -- Hints that fit --------------------------------------------------------------------------------


def test_an_hour_in_a_column_of_its_own_is_named_where_stamps_repeat(tmp_path):
    columns = {"instant": range(ROWS), "dteday": HOURS.strftime("%Y-%m-%d"), "hr": HOURS.hour}
    path = write(tmp_path / "a.csv", columns | {"cnt": WAVE})
    assert "--time_column dteday hr" in reason(path)
    np.testing.assert_array_equal(one(path, time_column=["dteday", "hr"]).values, WAVE)


def test_hours_and_minutes_as_a_number_are_named_and_read(tmp_path):
    columns = {"date": HOURS.strftime("%Y-%m-%d"), "at": HOURS.hour * 100 + 30, "value": WAVE}
    columns["at"] = [0, *columns["at"][1:]]
    path = write(tmp_path / "a.csv", columns)
    assert "--time_column date at" in reason(path)
    columns["at"] = HOURS.hour * 100
    file = read(write(path, columns), time_column=["date", "at"])
    np.testing.assert_array_equal(file.series[0].values, WAVE)
    assert file.series[0].freq == "h"
    ahead = md.stamp_columns(md.steps_after(file.series[0], 2), file.times)
    assert [*ahead["at"]] == ["0000", "0100"]


@pytest.mark.parametrize("name", ["SETTLEMENT_PERIOD", "minute_of_day"])
def test_numbers_that_count_within_a_day_are_not_only_called_ids(name, tmp_path):
    halves = pd.date_range("2024-01-01", periods=ROWS, freq="30min")
    counts = {"SETTLEMENT_PERIOD": np.arange(ROWS) % 48 + 1, "minute_of_day": np.arange(ROWS) * 30}
    counts = {"date": halves.strftime("%Y-%m-%d"), name: counts[name] % 1440}
    told = reason(write(tmp_path / "a.csv", counts | {"value": WAVE}))
    assert f"--time_column date {name}" in told
    assert "such as 13:30" in told


def test_other_stamps_without_repetition_are_named_where_stamps_repeat(tmp_path):
    columns = {"date": HOURS.strftime("%Y-%m-%d"), "hour": HOURS.hour, "start (UTC)": HOURS}
    path = write(tmp_path / "a.csv", columns | {"value": WAVE})
    assert "start (UTC) holds stamps, too, each of them once: --time_column start (UTC)" in (
        reason(path)
    )
    np.testing.assert_array_equal(one(path, time_column=["start (UTC)"]).values, WAVE)


def test_numbers_in_blocks_are_called_ids_and_no_clocks(tmp_path):
    stores = np.repeat(np.arange(24), 10)
    columns = {"date": [*DAYS[:10]] * 24, "Store": stores, "sales": WAVE}
    told = reason(write(tmp_path / "a.csv", columns))
    assert "if Store tells the series apart: --id_columns Store" in told
    assert "time of the day" not in told
    assert "clock" not in told


def test_year_to_minute_in_columns_of_their_own(tmp_path):
    quarters = pd.date_range("2024-01-01", periods=ROWS, freq="15min")
    names = ("year", "month", "day", "hour", "minute")
    columns = {name: getattr(quarters, name) for name in names} | {"value": WAVE}
    file = read(write(tmp_path / "a.csv", columns))
    np.testing.assert_array_equal(file.series[0].values, WAVE)
    assert file.series[0].freq == "15min"


def test_rows_without_readable_stamps_are_taken_in_their_order_with_a_warning(tmp_path):
    serials = [f"{45292 + row / 24:.6f}" for row in range(ROWS)]
    file = read(write(tmp_path / "a.csv", {"date": serials, "value": WAVE}))
    assert "no timestamps were found" in warnings_of(file)
    assert "no timestamps" not in warnings_of(read(write(tmp_path / "b.csv", {"value": WAVE})))


def test_cells_of_a_file_without_numbers_are_quoted(tmp_path):
    path = write(tmp_path / "a.csv", {"date": HOURS, "share": [f"{value} M" for value in WAVE]})
    assert one(path).column == "share"
    path = write(tmp_path / "a.csv", {"date": HOURS, "share": [f"{value}M" for value in WAVE]})
    assert repr(f"{WAVE[0]}M") in reason(path)


def test_dates_as_numbers_that_repeat_are_no_value(tmp_path):
    dates = [f"{stamp:%Y%m%d}" for stamp in HOURS]
    columns = {"YYYYMMDD": dates, "HH": HOURS.hour + 1, "T": WAVE}
    assert one(write(tmp_path / "a.csv", columns)).column == "T"


def test_rows_of_one_stamp_are_the_same_only_if_all_of_them_is(tmp_path):
    days = HOURS.strftime("%Y-%m-%d")
    columns = {"dteday": days, "hr": HOURS.hour, "working": days.str[-1].astype(int) % 2}
    path = write(tmp_path / "a.csv", columns | {"cnt": WAVE})
    assert "--time_column dteday hr" in reason(path)


def test_a_year_that_is_missing_leaves_the_others_whole_numbers(tmp_path):
    years = [*MONTHS.year]
    years[100] = ""
    file = read(write(tmp_path / "a.csv", {"year": years, "month": MONTHS.month, "value": WAVE}))
    assert "1 of 240 stamps of year month cannot be read, such as (blank)" in warnings_of(file)
    assert file.series[0].freq == "MS"
    assert np.flatnonzero(np.isnan(file.series[0].values)).tolist() == [100]


def test_stamps_in_parts_of_no_known_pattern_are_written_in_one_column(tmp_path):
    columns = {"day": HOURS.strftime("%Y-%m-%d"), "at": HOURS.strftime("%H:%M:%S+01")}
    columns["value"] = WAVE
    file = read(write(tmp_path / "a.csv", columns), time_column=["day", "at"])
    np.testing.assert_array_equal(file.series[0].values, WAVE)
    ahead = md.stamp_columns(md.steps_after(file.series[0], 1), file.times)
    assert {name: [*texts] for name, texts in ahead.items()} == {"day": ["2024-01-11 00:00:00"]}


def test_stamps_that_pandas_reads_by_its_own_rules_are_written_in_iso(tmp_path):
    mixed = [f"{day:%b}. {day:%Y}" if day.month % 2 else f"{day:%B %Y}" for day in MONTHS]
    file = read(write(tmp_path / "a.csv", {"when": mixed, "value": WAVE}))
    ahead = md.write_stamps(md.steps_after(file.series[0], 1), file.times.form)
    assert [*ahead] == ["2021-01-01 00:00:00"]


@pytest.mark.parametrize(
    ("form", "ahead"),
    [
        ("%Y-%m-%d %H:%M:%S+01", "2024-01-11 00:00:00+01"),
        (" %Y-%m-%d %H:%M ", "2024-01-11 00:00"),
        ("%Y-%m-%d %H:%M:%S.000+0100", "2024-01-11 00:00:00.000+0100"),
    ],
)
def test_offsets_and_blanks_around_stamps_are_read(form, ahead, tmp_path):
    file = read(write(tmp_path / "a.csv", {"when": HOURS.strftime(form), "value": WAVE}))
    np.testing.assert_array_equal(file.series[0].values, WAVE)
    assert [*md.write_stamps(md.steps_after(file.series[0], 1), file.times.form)] == [ahead]


def test_a_date_that_does_not_exist_at_the_end_is_refused_with_the_flag(tmp_path):
    days = HOURS + pd.Timedelta(15, "D")
    stamps = [*days[:-1].strftime("%d/%m/%Y %H:%M"), "10/13/2024 23:00"]
    path = write(tmp_path / "a.csv", {"when": stamps, "value": WAVE})
    assert "such as '10/13/2024 23:00' in row 240; --time_format says" in reason(path)
    assert "--time_format %Q: " in reason(path, time_format="%Q")


def test_two_columns_that_tell_series_apart_are_named(tmp_path):
    columns = long(Store=[1, 2], Dept=[1, 2, 3])
    path = write(tmp_path / "a.csv", columns)
    assert "--id_columns Store Dept" in reason(path)
    assert len(read(path, id_columns=["Store", "Dept"]).series) == 6


def test_a_clock_that_midnights_lack_is_written(tmp_path):
    stamps = [f"{t.month}/{t.day}/{t.year} {t.hour}:00".removesuffix(" 0:00") for t in HOURS]
    file = read(write(tmp_path / "a.csv", {"t": stamps, "v": WAVE}))
    ahead = md.write_stamps(md.steps_after(file.series[0], 30), file.times.form)
    path = write(tmp_path / "b.csv", {"t": [*stamps, *ahead], "v": [*WAVE, *WAVE[:30]]})
    np.testing.assert_array_equal(one(path).values, [*WAVE, *WAVE[:30]])


@pytest.mark.parametrize(
    "columns",
    [
        {"year": MONTHS.year, "month": MONTHS.month},
        {"year": DAYS.year, "month": DAYS.month, "day": DAYS.day},
        {"Date": HOURS.strftime("%Y-%m-%d"), "Time": HOURS.strftime("%H:%M")},
    ],
    ids=["month", "day", "clock"],
)
def test_stamps_in_parts_are_written_in_parts_and_go_on(columns, tmp_path):
    flags = {"time_column": [*columns]} if "Time" in columns else {}
    file = read(write(tmp_path / "a.csv", columns | {"v": WAVE}), **flags)
    ahead = md.stamp_columns(md.steps_after(file.series[0], 30), file.times)
    assert [*ahead] == [*columns]
    longer = {name: [*map(str, columns[name]), *ahead[name]] for name in columns}
    path = write(tmp_path / "b.csv", longer | {"v": [*WAVE, *WAVE[:30]]})
    np.testing.assert_array_equal(one(path, **flags).values, [*WAVE, *WAVE[:30]])


# -- Parquet ---------------------------------------------------------------------------------------

BERLIN = pd.date_range("2024-03-30", periods=ROWS, freq="h", tz="Europe/Berlin")
HALF = ROWS // 2
LONG = {"unique_id": ["a"] * HALF + ["b"] * HALF, "ds": [*HOURS[:HALF]] * 2, "y": WAVE}
PARQUET_FRAMES = {  # -> step, last stamp, number of series
    "dates": (pd.DataFrame({"date": HOURS, "value": WAVE}), "h", HOURS[-1], 1),
    "index": (pd.DataFrame({"value": WAVE}, HOURS), "h", HOURS[-1], 1),
    "named index": (pd.DataFrame({"value": WAVE}, DAYS.rename("when")), "D", DAYS[-1], 1),
    "microseconds": (pd.DataFrame({"t": HOURS.as_unit("us"), "value": WAVE}), "h", HOURS[-1], 1),
    "zone": (pd.DataFrame({"ts": BERLIN, "value": WAVE}), "h", BERLIN[-1].tz_convert(None), 1),
    "days": (pd.DataFrame({"day": DAYS.date, "value": WAVE}), "D", DAYS[-1], 1),
    "long": (pd.DataFrame(LONG), "h", HOURS[HALF - 1], 2),
    "two indices": (pd.DataFrame(LONG).set_index(["unique_id", "ds"]), "h", HOURS[HALF - 1], 2),
    "three decimals": (pd.DataFrame({"date": HOURS, "value": WAVE + 0.001}), "h", HOURS[-1], 1),
}


@pytest.mark.parametrize("case", PARQUET_FRAMES)
def test_a_parquet_file_is_read_with_its_own_stamps_and_numbers(case, tmp_path):
    frame, freq, last, count = PARQUET_FRAMES[case]
    frame.to_parquet(tmp_path / "a.parquet")
    # The last two are of the CSVs beside it, and say nothing of numbers and stamps that are none.
    file = read(tmp_path / "a.parquet", decimal=",", time_format="%d.%m.%Y")
    assert len(file.series) == count
    values = np.concatenate([series.values for series in file.series])
    (column,) = frame.select_dtypes("float").columns
    np.testing.assert_allclose(values, frame[column], rtol=1e-15)
    for series in file.series:
        assert series.freq == freq
        assert pd.Timestamp(series.stamps[-1]).tz_localize(None) == last


def test_a_parquet_file_is_looked_at_as_a_csv_is(tmp_path):
    columns = {"date": HOURS, "row": np.arange(ROWS), "word": ["x"] * ROWS, "value": WAVE}
    pd.DataFrame(columns).to_parquet(tmp_path / "a.parquet")
    columns["date"] = HOURS.astype(str)
    write(tmp_path / "a.csv", columns)
    assert facts_of(read(tmp_path / "a.parquet")) == facts_of(read(tmp_path / "a.csv"))
    assert "no column nope" in reason(tmp_path / "a.parquet", "nope")


def test_parquet_files_of_a_folder_are_found_beside_csvs(tmp_path, capsys):
    pd.DataFrame({"date": HOURS, "value": WAVE}).to_parquet(tmp_path / "b.PARQUET")
    pd.DataFrame({"date": HOURS, "value": WAVE}).to_parquet(tmp_path / "c.pq")
    write(tmp_path / "a.csv", {"date": HOURS, "value": WAVE})
    assert list(md.find_files(tmp_path, 0)[1]) == ["a.csv", "b.PARQUET", "c.pq"]
    md.load_files(data_config(data_dir=str(tmp_path)), read_config(), md.Voice("en"))
    assert "Found 1 CSV files, 2 Parquet files\n" in capsys.readouterr().out


def test_a_parquet_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" + b"x" * 99)
    assert reason(path).startswith("unreadable: ")
    assert "\n" not in reason(path)
    zeros = pd.DataFrame({"date": range(300_000), "value": 0.0})
    zeros.to_parquet(path)
    assert "--max_file_mb" in reason(path, max_file_mb=4)
    zeros.drop(1).rename_axis(index="date").to_parquet(path)
    assert "already exists" in reason(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert reason(path) == "a Parquet file is read with pyarrow: pip install pyarrow"
