"""CSV -> regular series -> split -> windows: the values that come out."""

import itertools
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL, hourly
from hypothesis import given, settings
from hypothesis import strategies as st

import moirai_distill as m

ROWS, LENGTH, HORIZON = 200, 24, 8  # of most series here, of their windows, of the targets
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


def passed_over(remarks):
    """The columns that a file's remarks say were passed over."""
    return [name for remark in remarks for name in remark.removeprefix("passed over: ").split(", ")]


def read_one(path, *columns):
    """The only Series of a CSV, and the columns passed over."""
    (series,), remarks = m.read_series(path, path.name, [*columns] or ["first"])
    return series, passed_over(remarks)


def split(series, remarks=None, by="time", ratio=(8, 1, 1), seed=0, stride=1, windows=0, season="auto", gap=4):
    """split_data with the lengths of this file: (part -> Windows, part -> number of files, how, file -> remark)."""
    limits = {"length": LENGTH, "horizon": HORIZON, "max_gap": gap}
    remarks = dict.fromkeys(series, "") if remarks is None else remarks
    return m.split_data(series, remarks, by, ratio, seed, stride, windows, season, limits)


def files_of(count, rows=40):
    """`count` files of one series each, every one with values of its own."""
    return {f"f{i:02d}.csv": [m.Series(f"f{i:02d}.csv", RNG.normal(i, 1 + i, rows), "h")] for i in range(count)}


def members(windows, series):
    """Names of the files in a part, by their standardised values; all files have the same number of rows."""
    raw = {name: items[0].values for name, items in series.items()}
    names = {((x - x.mean()) / x.std()).astype(np.float32).round(4).tobytes(): name for name, x in raw.items()}
    rows = len(next(iter(raw.values())))
    return {names[chunk.round(4).tobytes()] for chunk in windows.values.reshape(-1, rows)}


# -- one file: values on a regular grid --------------------------------------------------------------------------------


def test_missing_rows_nan_and_infinities_are_missing_values(tmp_path):
    frame = hours(60)
    expected = frame["value"].to_numpy(copy=True)
    frame.loc[3, "value"], frame.loc[4, "value"], frame.loc[50, "value"] = np.nan, np.inf, -np.inf
    expected[[3, 4, 20, 21, 22, 50]] = np.nan
    series, _ = read_one(write(tmp_path / "a.csv", frame.drop([20, 21, 22])))
    np.testing.assert_array_equal(series.values, expected)
    assert series.freq == "h" and series.values.dtype == np.float64


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_order_of_rows_with_some_missing_gives_the_same_grid(tmp_path_factory, data):
    dropped = data.draw(st.sets(st.integers(1, 78), max_size=8))
    kept = data.draw(st.permutations([row for row in range(80) if row not in dropped]))
    path = write(tmp_path_factory.getbasetemp() / "order.csv", hours(80).loc[kept])
    expected = hours(80)["value"].to_numpy(copy=True)
    expected[[*dropped]] = np.nan
    np.testing.assert_array_equal(read_one(path)[0].values, expected)


def test_of_duplicate_stamps_the_last_row_of_the_file_wins(tmp_path):
    frame = hours(200)
    late = pd.DataFrame({"date": frame["date"][[7, 3]], "value": [-7.0, -3.0]})
    mixed = pd.concat([frame[:100], late, frame[100:]]).iloc[::-1]  # newest first: now the old row 3 is the last
    for order, third in ((slice(None), 3), (slice(None, None, -1), -3.0)):
        expected = frame["value"].to_numpy(copy=True)
        if third == -3.0:
            expected[[3, 7]] = -3.0, -7.0
        series, _ = read_one(write(tmp_path / "a.csv", mixed[order]))
        np.testing.assert_array_equal(series.values, expected)


def test_more_than_one_percent_of_duplicates_skips_the_file_with_that_reason(tmp_path):
    frame = hours(197)
    for copies in (2, 1):  # 2 of 199 are more than 1 %, 1 of 198 is less
        path = write(tmp_path / f"{copies}.csv", pd.concat([frame, frame[:copies]]))
        if copies == 2:
            with pytest.raises(m.Unusable, match="2 of 199 .*duplicate"):
                read_one(path)
        else:
            np.testing.assert_array_equal(read_one(path)[0].values, frame["value"])


MONTHS = pd.date_range("2015-01-01", periods=100, freq="MS")
HOURS = pd.date_range("2024-02-28", periods=100, freq="h")
SHIFT = pd.to_timedelta(np.random.default_rng(1).integers(-5, 6, 100), unit="s")
GRIDS = {
    "hour": HOURS,
    "15 minutes": pd.date_range("2024-02-28 00:07", periods=100, freq="15min"),
    "10 seconds": pd.date_range("2024-02-28", periods=100, freq="10s"),
    "day": pd.date_range("2024-02-20", periods=100, freq="D"),
    "business day": pd.date_range("2024-02-20", periods=100, freq="B"),
    "business day at 16:00": pd.date_range("2024-02-20", periods=100, freq="B") + pd.Timedelta("16h"),
    "week": pd.date_range("2024-02-21", periods=100, freq="W-WED"),
    "month start": MONTHS,
    "month end": pd.date_range("2015-01-31", periods=100, freq="ME"),
    "business month start": pd.date_range("2015-01-01", periods=100, freq="BMS"),
    "business month end": pd.date_range("2015-01-01", periods=100, freq="BME"),
    "quarter start": pd.date_range("1990-01-01", periods=100, freq="QS"),
    "quarter end": pd.date_range("1990-01-01", periods=100, freq="QE"),
    "quarter end in February": pd.date_range("1990-01-01", periods=100, freq="QE-FEB"),
    "year end": pd.date_range("1900-01-01", periods=100, freq="YE"),
    "the 5th of each month": MONTHS + pd.Timedelta("4D"),
    "the 15th of each month": MONTHS + pd.Timedelta("14D"),
    "the 28th of each month": MONTHS + pd.Timedelta("27D"),
    "the 30th, or the last day": [pd.Timestamp("2015-01-30") + pd.DateOffset(months=i) for i in range(100)],
    "the 15th of each third month": pd.date_range("1990-02-01", periods=100, freq="QS-FEB") + pd.Timedelta("14D"),
    "hours that jitter": HOURS + SHIFT,
    "days that jitter": pd.date_range("2024-02-20 09:30", periods=100, freq="D") + SHIFT,
    "hours with a zone": HOURS.tz_localize("UTC").tz_convert("Asia/Tokyo"),
    "hours across the end of summer time": pd.date_range("2024-10-25", periods=100, freq="h", tz="Europe/Berlin"),
    "Z": HOURS.strftime("%Y-%m-%dT%H:%M:%SZ"),
    "epoch seconds": HOURS.as_unit("s").asi8,
    "epoch seconds as decimals": HOURS.as_unit("s").asi8.astype(float),
    "epoch milliseconds": HOURS.as_unit("ms").asi8,
    "yyyymmdd": pd.date_range("2024-02-20", periods=100, freq="D").strftime("%Y%m%d").astype(int),
    "month, no day": MONTHS.strftime("%Y-%m"),
    "day first": pd.date_range("2024-02-20", periods=100, freq="D").strftime("%d/%m/%Y"),
    "day first from the 1st on": pd.date_range("2024-03-01", periods=100, freq="D").strftime("%d/%m/%Y"),
    "day first with dots and hours": HOURS.strftime("%d.%m.%Y %H:%M"),
    "month first from the 1st on": pd.date_range("2024-03-01", periods=100, freq="D").strftime("%m/%d/%Y"),
    "month first": pd.date_range("2024-02-20", periods=100, freq="D").strftime("%m/%d/%Y"),
}  # fmt: skip


@pytest.mark.parametrize("missing", [[], [5, 6, 41]])
@pytest.mark.parametrize("stamps", GRIDS.values(), ids=GRIDS.keys())
def test_each_stamp_finds_its_place_on_the_grid_and_missing_rows_are_missing(stamps, missing, tmp_path):
    expected = NOISE[:100].copy()
    expected[missing] = np.nan
    series, passed = read_one(write(tmp_path / "a.csv", values_at(stamps).drop(missing)))
    np.testing.assert_array_equal(series.values, expected)
    assert series.freq and not passed


def test_jitter_adds_up_to_nothing_over_a_long_series(tmp_path):
    seconds = np.array([0, 1, 3])[np.arange(1000) % 3]  # 3601, 3602 and 3597 seconds between two stamps, never 3600
    seconds[[0, 500]] = 1500, -1200  # still within half a step of their places
    gone = [*range(1, 1000, 7)]
    expected = NOISE.copy()
    expected[gone] = np.nan
    stamps = pd.date_range("2024-01-01", periods=1000, freq="h") + pd.to_timedelta(seconds, unit="s")
    series, _ = read_one(write(tmp_path / "a.csv", values_at(stamps).drop(gone)))
    np.testing.assert_array_equal(series.values, expected)
    assert series.freq == "h"


def test_stamps_off_a_calendar_rule_are_left_out_where_95_percent_lie_on_it(tmp_path):
    days = pd.date_range("2024-01-01", periods=100, freq="B")
    frame = pd.concat([values_at(days), pd.DataFrame({"date": [pd.Timestamp("2024-01-06")], "value": [-9.0]})])
    series, _ = read_one(write(tmp_path / "a.csv", frame))
    np.testing.assert_array_equal(series.values, NOISE[:100])


def test_irregular_stamps_are_skipped_with_that_reason(tmp_path):
    seconds = np.random.default_rng(2).integers(60, 100_000, 100).cumsum()
    with pytest.raises(m.Unusable, match="irregular"):
        read_one(write(tmp_path / "a.csv", values_at(pd.Timestamp("2024-01-01") + pd.to_timedelta(seconds, unit="s"))))


def test_a_named_time_column_with_too_many_unreadable_stamps_is_a_reason_to_skip(tmp_path):
    stamps = HOURS.astype(str).to_series(index=range(100))
    stamps[:20] = "unknown"
    with pytest.raises(m.Unusable, match="stamps"):  # as rows without time they would be spliced together
        read_one(write(tmp_path / "a.csv", values_at(stamps)))


def test_rows_with_an_unreadable_stamp_are_left_out_where_they_are_few(tmp_path):
    stamps = HOURS.astype(str).to_series(index=range(100))
    stamps[[0, 30, 31]] = "unknown"
    expected = NOISE[:100].copy()
    expected[[30, 31]] = np.nan
    np.testing.assert_array_equal(read_one(write(tmp_path / "a.csv", values_at(stamps)))[0].values, expected[1:])


@pytest.mark.parametrize("stamps", [HOURS, HOURS.as_unit("s").asi8], ids=["text", "epoch"])
@pytest.mark.parametrize("name", ["date", "Timestamp", "TIME", "datetime", "ds"])
def test_the_time_column_is_found_by_name_in_any_case_wherever_it_stands(name, stamps, tmp_path):
    frame = pd.DataFrame({"value": NOISE[:100], "note": HOURS.astype(str), name: stamps[::-1]})
    series, passed = read_one(write(tmp_path / "a.csv", frame))
    np.testing.assert_array_equal(series.values, NOISE[:100][::-1])
    assert series.freq == "h" and passed == ["note"]


@pytest.mark.parametrize("name", ["when", "测量时间"])
def test_the_time_column_is_found_by_content_wherever_it_stands(name, tmp_path):
    frame = pd.DataFrame({"value": NOISE[:100], "words": "sunny", name: HOURS[::-1]})
    series, passed = read_one(write(tmp_path / "a.csv", frame))
    np.testing.assert_array_equal(series.values, NOISE[:100][::-1])
    assert series.freq == "h" and passed == ["words"]


@pytest.mark.parametrize(
    "stamps", [np.arange(100) * 0.5, MONTHS.strftime("%Y%m").astype(int)], ids=["seconds", "yyyymm"]
)
def test_a_column_named_as_time_is_never_used_as_a_value(stamps, tmp_path):
    series, _ = read_one(write(tmp_path / "a.csv", values_at(stamps)))
    np.testing.assert_array_equal(series.values, NOISE[:100])


def test_without_timestamps_the_rows_are_taken_as_they_stand(tmp_path):
    series, passed = read_one(write(tmp_path / "a.csv", pd.DataFrame({"value": NOISE})))
    np.testing.assert_array_equal(series.values, NOISE)
    assert series.freq == "" and passed == []


@pytest.mark.parametrize("stamps", ["hour", "day", "month end", "day first", "month first"])
def test_reading_ordinary_stamps_gives_no_warning(stamps, tmp_path):
    path = write(tmp_path / "a.csv", values_at(GRIDS[stamps]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        np.testing.assert_array_equal(read_one(path)[0].values, NOISE[:100])
    assert [str(warning.message) for warning in caught] == []


# -- one file: columns and encodings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unique_id", "item_id", "id", "series", "series_id", "ID"])
@pytest.mark.parametrize("ids", [("a", "b"), (7, 12)])
def test_a_long_file_gives_a_series_per_id(name, ids, tmp_path):
    frames = [
        values_at(HOURS, NOISE[i:] * (1 + i)).assign(**{name: key})[[name, "date", "value"]]
        for i, key in enumerate(ids)
    ]
    frame = pd.concat([frames[0].drop(9), frames[1]]).sample(frac=1, random_state=0)
    series, _ = m.read_series(write(tmp_path / "a.csv", frame), "a.csv", ["first"])
    assert [item.name for item in series] == [f"a.csv / {key}" for key in ids]
    expected = NOISE[:100].copy()
    expected[9] = np.nan
    np.testing.assert_array_equal(series[0].values, expected)
    np.testing.assert_array_equal(series[1].values, NOISE[1:101] * 2)


def test_in_a_long_file_duplicates_of_one_id_keep_the_last(tmp_path):
    frame = pd.concat([values_at(HOURS), values_at(HOURS[:5], -NOISE)]).assign(item_id="a")
    expected = np.append(-NOISE[:5], NOISE[5:100])
    np.testing.assert_array_equal(read_one(write(tmp_path / "a.csv", frame))[0].values, expected)


def test_a_long_file_without_its_id_column_is_skipped_as_duplicates(tmp_path):
    with pytest.raises(m.Unusable, match="100 of 200 .*id column"):
        read_one(write(tmp_path / "a.csv", pd.concat([values_at(HOURS), values_at(HOURS)])))


def test_an_id_column_whose_values_do_not_repeat_is_no_id(tmp_path):
    frame = values_at(HOURS).assign(series=[f"row {i}" for i in range(100)])[["series", "date", "value"]]
    series, passed = read_one(write(tmp_path / "a.csv", frame))
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
def test_an_index_column_is_passed_over_named_in_the_remark_and_can_be_asked_for(name, index, tmp_path):
    frame = values_at(HOURS).assign(**{name: index})[[name, "date", "value"]]
    path = write(tmp_path / "a.csv", frame)
    shown = name or "Unnamed: 0"
    assert read_one(path)[1] == [shown]
    found, series, remarks = m.read_files(tmp_path, 0, ["first"], False)
    np.testing.assert_array_equal(series["a.csv"][0].values, NOISE[:100])
    assert found == 1 and remarks["a.csv"] == [f"passed over: {shown}"]
    np.testing.assert_array_equal(read_one(path, shown)[0].values, np.array(index, float))


def test_a_counter_that_starts_again_for_each_id_is_passed_over(tmp_path):
    frame = pd.concat([values_at(HOURS).assign(unique_id=key, step=range(100)) for key in "ab"])
    path = write(tmp_path / "a.csv", frame[["unique_id", "step", "date", "value"]])
    series, remarks = m.read_series(path, "a.csv", ["first"])
    assert passed_over(remarks) == ["step"] and len(series) == 2
    np.testing.assert_array_equal(series[1].values, NOISE[:100])


def test_columns_first_all_and_by_name(tmp_path):
    frame = values_at(HOURS).assign(words="x", b=NOISE[100:200], c=NOISE[200:300])
    path = write(tmp_path / "a.csv", frame)
    for columns, expected in ((["first"], [0]), (["all"], [0, 100, 200]), (["c", "b"], [200, 100])):
        series, remarks = m.read_series(path, "a.csv", columns)
        for item, start in zip(series, expected, strict=True):
            np.testing.assert_array_equal(item.values, NOISE[start : start + 100])
        names = {0: "value", 100: "b", 200: "c"}
        assert [item.name for item in series] == [f"a.csv / {names[start]}" for start in expected] or len(series) == 1
        assert passed_over(remarks) == ([] if "b" in columns else ["words"])
    with pytest.raises(m.Unusable, match="no column absent"):
        m.read_series(path, "a.csv", ["value", "absent"])


def test_a_few_words_in_a_numeric_column_are_missing_values_and_many_make_it_text(tmp_path):
    words = pd.Series(NOISE[:100]).astype(object).where(np.arange(100) % 5 > 0, "n. a.?")
    value = pd.Series(NOISE[100:200]).astype(object).where(np.arange(100) % 25 > 0, "broken")
    frame = pd.DataFrame({"date": HOURS, "words": words, "value": value})
    expected = NOISE[100:200].copy()
    expected[::25] = np.nan
    series, passed = read_one(write(tmp_path / "a.csv", frame))
    np.testing.assert_array_equal(series.values, expected)
    assert passed == ["words"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16", "latin-1"])
@pytest.mark.parametrize(("separator", "decimal"), [(",", "."), (";", ","), (";", "."), ("\t", ".")])
def test_encodings_and_separators(encoding, separator, decimal, tmp_path):
    columns = ["date", "größe"] if encoding == "latin-1" else ["日期", "温度"]
    frame = values_at(HOURS).set_axis(columns, axis=1).assign(words="é" if encoding == "latin-1" else "晴")
    path = write(tmp_path / "a.csv", frame, encoding=encoding, sep=separator, decimal=decimal)
    for ask in ([], columns[1:]):  # the name survives the encoding, too
        np.testing.assert_array_equal(read_one(path, *ask)[0].values, NOISE[:100])


def csv_text(header, row):
    """A CSV of hourly rows, spelt out."""
    return "".join([header, *(row.format(*pair) for pair in zip(HOURS, NOISE, strict=False))])


def test_spaces_around_names_and_values_are_ignored(tmp_path):
    (tmp_path / "a.csv").write_text(csv_text("date , value\n", "{} , {}\n"))
    series, _ = read_one(tmp_path / "a.csv", "value")
    np.testing.assert_array_equal(series.values, NOISE[:100])
    assert series.freq == "h"


def test_names_that_differ_in_spaces_only_do_no_harm(tmp_path):
    (tmp_path / "a.csv").write_text(csv_text("date,x, x\n", "{},{},0\n"))
    np.testing.assert_array_equal(read_one(tmp_path / "a.csv")[0].values, NOISE[:100])


# -- a folder ----------------------------------------------------------------------------------------------------------


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
    found, series, remarks = m.read_files(tmp_path, 0, ["first"], False)
    parts, files, by, notes = split(series, remarks)
    reasons = {"flat": "constant", "short": "too short", "text": "no numeric column", "void": "no numeric column"}
    reasons |= {"header": "no rows", "empty": "unreadable", "noise": "NUL bytes", "folder": "unreadable"}
    assert found == 9 and by == "time" and files == {"train": 1, "validation": 1, "test": 1}
    assert len(parts["train"]) == 160 - LENGTH + 1 and notes.pop("good.csv") == ""
    assert sorted(notes) == sorted(f"{name}.csv" for name in reasons)
    assert all(text.startswith("skipped: ") and reasons[name[:-4]] in text for name, text in notes.items()), notes


def test_each_skipped_series_of_a_file_is_told_and_what_was_passed_over_too(tmp_path):
    lengths = {"a": 200, "short": 20, "tiny": 2, "flat": 200}
    frames = [hours(n).assign(item_id=key) for key, n in lengths.items()]
    frame = pd.concat(frames)
    frame.loc[frame["item_id"] == "flat", "value"] = 4.5
    write(tmp_path / "long.csv", frame.assign(index=range(len(frame))))
    _, series, remarks = m.read_files(tmp_path, 0, ["first"], False)
    parts, _, _, notes = split(series, remarks)
    assert len(parts["train"].freqs) == 1
    assert all(word in notes["long.csv"] for word in ("short", "tiny", "flat", "passed over: index")), notes


def test_a_folder_is_searched_below_in_sorted_order_and_cut_at_max_files(csv_folder, monkeypatch):
    (csv_folder / "deep" / "er").mkdir(parents=True)
    (csv_folder / "s03.csv").rename(csv_folder / "deep" / "er" / "s03.CSV")
    (csv_folder / "notes.txt").write_text("not a CSV")
    names = sorted(path.relative_to(csv_folder).as_posix() for path in csv_folder.rglob("*.[cC][sS][vV]"))
    whole = m.read_files(csv_folder, 0, ["first"], False)
    assert (whole[0], list(whole[1]), names[0]) == (12, names, "deep/er/s03.CSV")
    listing = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: reversed(list(listing(path, pattern))))
    found, series, remarks = m.read_files(str(csv_folder), 5, ["first"], False)
    assert found == 12 and list(series) == list(remarks) == names[:5]
    for name in names[:5]:
        np.testing.assert_array_equal(series[name][0].values, whole[1][name][0].values)


def test_many_files_are_read_by_several_processes_in_the_same_order(tmp_path, monkeypatch):
    for number in range(55):
        hours(100 + number).to_csv(tmp_path / f"s{number:02d}.csv", index=False)
    (tmp_path / "s10.csv").write_text("words\na\n")
    results, processes, read = [], [], m.read_series
    for cores in (1, 2):
        monkeypatch.setattr(m.os, "sched_getaffinity", lambda _pid, cores=cores: set(range(cores)))
        monkeypatch.setattr(m, "read_series", lambda *words: (lambda s, r: (s, [*r, m.os.getpid()]))(*read(*words)))
        found, series, remarks = m.read_files(str(tmp_path), 0, ["first"], False)
        monkeypatch.undo()
        processes.append({note[-1] for name, note in remarks.items() if name != "s10.csv"})
        assert found == 55 and [*remarks] == sorted(remarks) and [*series] == sorted(series) and len(series) == 54
        assert remarks["s10.csv"][0].startswith("skipped: no numeric column")
        results.append(series)
    assert len(processes[0]) == 1 and len(processes[1]) == 2 and not processes[0] & processes[1]
    for name, (one,) in results[0].items():
        np.testing.assert_array_equal(one.values, results[1][name][0].values)
        assert one.freq == results[1][name][0].freq and (one.stamps == results[1][name][0].stamps).all()


def test_a_single_csv_file_works(csv_folder):
    found, series, _ = m.read_files(csv_folder / "s04.csv", 100, ["first"], False)
    np.testing.assert_allclose(series["s04.csv"][0].values, hourly(300, seed=4)["value"], rtol=1e-14)
    assert found == 1


def test_nothing_usable_is_an_error_that_lists_the_reasons(tmp_path, capsys):
    with pytest.raises(m.UserError, match="no .csv"):
        m.read_files(tmp_path, 0, ["first"], False)
    write(tmp_path / "constant.csv", values_at(HOURS, np.ones(100)))
    write(tmp_path / "text.csv", pd.DataFrame({"a": ["x"] * 50}))
    code = m.main(["--data_dir", str(tmp_path), *SMALL.split()])
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error
    assert "constant.csv: skipped: " in error and "text.csv: skipped: " in error


def test_loading_prints_the_known_lines_and_a_table_of_what_was_not_used(csv_folder, capsys):
    write(csv_folder / "text.csv", pd.DataFrame({"a": ["x"] * 50}))
    arguments = ["--data_dir", str(csv_folder), *SMALL.split(), "--max_windows", "50"]
    parts = m.load_data(m.parse_arguments(arguments), m.Say("zh"))
    lines = capsys.readouterr().out.splitlines()
    known = [f"数据目录: {csv_folder}", "上下文长度: 64", "预测长度: 16", "创建数据集...", "找到 13 个 CSV 文件"]
    known += ["使用 10 个文件用于 train 集", "数据集加载完成: 500 个样本"]
    assert [line for line in lines if line in known] == known
    assert any("text.csv" in line and "no numeric column" in line for line in lines)
    assert {part: len(windows) for part, windows in parts.items()} == {"train": 500, "validation": 221, "test": 221}


# -- gaps --------------------------------------------------------------------------------------------------------------


def prepared(values, bounds, max_gap=3, length=9, horizon=3):
    return m.prepare(m.Series("s", values, "h"), bounds, length, horizon, max_gap)


def test_short_gaps_are_filled_linearly_and_masked_and_long_ones_cut():
    values = np.arange(60) ** 2 / 10.0
    values[[5, 20, 21, 22, 40, 41, 42, 43]] = np.nan
    series = prepared(values, {"whole": (0, 60)})
    assert series.values[5] == (1.6 + 3.6) / 2
    np.testing.assert_allclose(series.values[20:23], 36.1 + (52.9 - 36.1) * np.array([1, 2, 3]) / 4, rtol=1e-12)
    assert np.isnan(series.values[40:44]).all()
    np.testing.assert_array_equal(np.flatnonzero(~series.observed), [5, 20, 21, 22, 40, 41, 42, 43])
    # the window that starts at 14 has no measured target
    np.testing.assert_array_equal(series.starts["whole"], [*range(14), *range(15, 32), *range(44, 52)])


def test_a_gap_across_a_split_border_is_filled_on_neither_side():
    values = NOISE[:60].copy()
    values[[38, 39, 40]] = np.nan  # on its own short enough
    series = prepared(values, {"train": (0, 40), "validation": (40, 50), "test": (50, 60)})
    assert np.isnan(series.values[38:41]).all()
    assert series.starts["train"].max() == 38 - 9 and series.starts["validation"].tolist() == [41]


RUNS = st.lists(st.tuples(st.integers(0, 59), st.integers(1, 7)), max_size=8)
PARTS = {"train": (0, 34), "validation": (34, 47), "test": (47, 60)}


@bounded
@given(runs=RUNS, max_gap=st.integers(0, 5), bounds=st.sampled_from([PARTS, {"whole": (0, 60)}]))
def test_exactly_the_windows_without_a_missing_value_and_with_a_target_in_one_part_are_used(runs, max_gap, bounds):
    values = NOISE[:60].copy()
    for start, count in runs:
        values[start : start + count] = np.nan
    missing, expected = np.isnan(values), values.copy()
    for low, high in bounds.values():
        for empty, group in itertools.groupby(range(low, high), key=lambda row: missing[row]):
            rows = list(group)
            if empty and len(rows) <= max_gap and rows[0] > low and rows[-1] < high - 1:
                before, after = values[rows[0] - 1], values[rows[-1] + 1]
                expected[rows] = before + (after - before) * np.arange(1, len(rows) + 1) / (len(rows) + 1)
    whole = [start for start in range(60 - 9 + 1) if not np.isnan(expected[start : start + 9]).any()]
    seen = [start for start in whole if not missing[start + 6 : start + 9].all()]  # else it would teach nothing
    windows = {part: [s for s in seen if low <= s + 6 and s + 9 <= high] for part, (low, high) in bounds.items()}
    if not windows[next(iter(bounds))]:
        with pytest.raises(m.Unusable):
            prepared(values, bounds, max_gap)
        return
    series = prepared(values, bounds, max_gap)
    np.testing.assert_allclose(series.values, expected, rtol=1e-12)
    np.testing.assert_array_equal(series.observed, ~missing)
    assert {part: starts.tolist() for part, starts in series.starts.items()} == windows


# -- split and windows -------------------------------------------------------------------------------------------------


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
    parts, files, by, _ = split(series, by="files", ratio=ratio)
    assert by == "files" and tuple(files.values()) == sizes
    names = [members(windows, series) for windows in parts.values()]
    assert [len(part) for part in names] == list(sizes) and set.union(*names) == set(series)
    assert [len(windows) for windows in parts.values()] == [(40 - LENGTH + 1) * size for size in sizes]


def test_which_file_goes_where_depends_on_names_and_seed_alone():
    series = files_of(12)
    shuffled = {name: series[name] for name in RNG.permutation(list(series))}
    one, two, three = (
        split(data, by="files", seed=seed)[0] for data, seed in ((series, 0), (shuffled, 0), (series, 1))
    )
    for part in m.PARTS:
        assert members(one[part], series) == members(two[part], series)
        assert one[part].digest == two[part].digest
        np.testing.assert_array_equal(one[part].values, two[part].values)
    assert any(members(one[part], series) != members(three[part], series) for part in m.PARTS)


@pytest.mark.parametrize(("usable", "by"), [(9, "time"), (10, "files")])
def test_auto_splits_by_files_from_10_usable_ones_on(usable, by):
    flat = {f"flat{i}.csv": [m.Series("flat", np.ones(100), "h")] for i in range(5)}
    assert split(files_of(usable, rows=ROWS) | flat, by="auto")[2] == by


@pytest.mark.parametrize("ratio", [(1, 1, 20), (0.01, 0.01, 1)])
def test_a_ratio_that_leaves_no_file_for_training_is_a_clear_error(ratio):
    with pytest.raises(m.UserError):
        split(files_of(5), by="files", ratio=ratio)


def test_a_split_by_files_of_two_files_is_a_clear_error():
    with pytest.raises(m.UserError, match="2 usable files, it takes 3; or use --split_by time"):
        split(files_of(2), by="files")


@pytest.mark.parametrize("text", ["8:1:1", "7:1:2", "0.7:0.1:0.2", "0.6:0.2:0.2"])
def test_rows_are_split_by_time_at_the_floor_of_their_shares(text):
    first, second, third = (round(10 * float(part)) for part in text.split(":"))
    ratio, total = m.parse_arguments(["label", "--list", "--split_ratio", text]).split_ratio, first + second + third
    for rows in (150, 155, 200, 203):
        parts = split({"a.csv": [m.Series("a", NOISE[:rows], "h")]}, ratio=ratio, gap=0)[0]
        train, validation = rows * first // total, rows * (first + second) // total
        expected = [train - LENGTH, validation - train - HORIZON, rows - validation - HORIZON]
        assert [len(windows) - 1 for windows in parts.values()] == expected


def test_windows_of_a_split_by_time_reach_back_but_their_targets_lie_in_one_part():
    parts = split({"a.csv": [m.Series("a", NOISE[:ROWS], "h")]})[0]
    ends = {"train": (24, 160), "validation": (168, 180), "test": (188, 200)}  # of the targets, first and last
    for part, (first, last) in ends.items():
        np.testing.assert_array_equal(parts[part].starts, np.arange(first, last + 1) - LENGTH)


@pytest.mark.parametrize(("stride", "windows"), [(1, 0), (3, 0), (1, 10), (3, 10), (500, 0), (1, 1000), (1, 136)])
def test_stride_and_max_windows_thin_the_training_windows_evenly_and_no_others(stride, windows):
    series = {"a.csv": [m.Series("a", NOISE[:ROWS], "h"), m.Series("b", NOISE[200 : 200 + ROWS], "h")]}
    parts = split(series, stride=stride, windows=windows)[0]
    strided = np.arange(0, 160 - LENGTH + 1, stride)
    count = min(len(strided), windows or len(strided))
    for number in range(2):
        starts = parts["train"].starts[parts["train"].series == number] - number * ROWS
        assert len(starts) == count and set(starts) <= set(strided) and (np.diff(starts) > 0).all()
        stretches = np.searchsorted(strided, starts) * count // len(strided)  # one window of each equal stretch
        assert np.abs(stretches - np.arange(count)).max() <= (count < len(strided) and len(strided) % count > 0)
    assert len(parts["validation"]) == len(parts["test"]) == 2 * (20 - HORIZON + 1)


def sampled(names, rows, windows, seed=0):
    """Starts of the training windows of each named series of `rows` rows, in its own rows."""
    series = {f"{name}.csv": [m.Series(name, np.resize(NOISE, rows), "h")] for name in names}
    train = split(series, windows=windows, seed=seed)[0]["train"]
    return {name: train.starts[train.series == i] - i * rows for i, name in enumerate(train.names)}


@bounded
@given(st.integers(150, 900), st.integers(1, 900), st.integers(0, 2**32))
def test_a_sample_of_windows_is_a_function_of_its_own_series_and_of_split_seed(rows, windows, seed):
    alone = sampled("b", rows, windows, seed)["b"]
    assert len(alone) == min(windows, rows * 8 // 10 - LENGTH + 1) and (np.diff(alone) > 0).all()
    np.testing.assert_array_equal(sampled("abc", rows, windows, seed)["b"], alone)


def test_a_sample_of_windows_lies_at_all_hours_even_with_one_window_a_day():
    rows, days = 3029, 100  # 2,400 training windows: an even grid of 100 would show one hour of the day alone
    for seed in range(3):
        starts = sampled("ab", rows, days, seed)
        assert all(len(starts[name]) == days and len(set(starts[name] % 24)) >= 20 for name in "ab")
        np.testing.assert_array_equal(starts["a"] // 24, np.arange(days))
        assert (starts["a"] != starts["b"]).any() and (starts["a"] != sampled("a", rows, days, seed + 1)["a"]).any()


def test_batch_gathers_exactly_the_rows_of_its_windows():
    raw = [NOISE[:ROWS].copy(), NOISE[300 : 300 + ROWS] * 1e4]
    raw[0][[50, 51, 172]] = np.nan
    parts = split({"a.csv": [m.Series("a", raw[0], "h")], "b.csv": [m.Series("b", raw[1], "h")]})[0]
    for windows in parts.values():
        index = np.random.default_rng(3).permutation(len(windows))
        context, target, observed = windows.batch(index)
        assert context.shape == (len(index), 16) and target.shape == observed.shape == (len(index), HORIZON)
        assert {context.dtype, target.dtype, observed.dtype} == {torch.float32}
        for row, window in enumerate(index):
            series = windows.series[window]
            start = windows.starts[window] - series * ROWS
            assert 0 <= start <= ROWS - LENGTH
            values = pd.Series(raw[series]).interpolate().to_numpy()
            train = raw[series][:160]
            values = (values - np.nanmean(train)) / np.nanstd(train)
            got = torch.cat([context[row], target[row]]).numpy()
            np.testing.assert_allclose(got, values[start : start + LENGTH], rtol=1e-5, atol=1e-6)
            expected = ~np.isnan(raw[series][start + 16 : start + LENGTH])
            np.testing.assert_array_equal(observed[row].numpy(), expected.astype(np.float32))
        assert set(windows.series) == {0, 1}


def test_the_scaler_is_fitted_on_the_train_rows_alone():
    values = NOISE[:100] * 3
    values[80:] += 1e6
    series = prepared(values, {"train": (0, 80), "validation": (80, 90), "test": (90, 100)})
    np.testing.assert_allclose(series.scaler, (values[:80].mean(), values[:80].std()), rtol=1e-12)
    np.testing.assert_allclose(series.scaled, (values - values[:80].mean()) / values[:80].std(), rtol=1e-6)
    assert series.scaled.dtype == np.float32
    held_out = prepared(values, {"whole": (0, 100)})
    np.testing.assert_allclose(held_out.scaler, (values.mean(), values.std()), rtol=1e-12)


def test_scaling_is_done_in_float64():
    values = 1e9 + NOISE[:100]  # in float32 these would all be equal
    scaled = prepared(values, {"train": (0, 80), "validation": (80, 90), "test": (90, 100)}).scaled
    np.testing.assert_allclose(scaled, (NOISE[:100] - NOISE[:80].mean()) / NOISE[:80].std(), atol=1e-5)


def load(folder, **options):
    """split of a folder's files."""
    _, series, remarks = m.read_files(folder, 0, ["first"], False)
    return split(series, remarks, **options)


@pytest.mark.parametrize("value", [1e9, -3.5, 0.0, np.nan, np.inf])
@pytest.mark.parametrize("row", [181, 190, 199])
def test_editing_a_test_value_changes_neither_scaler_nor_training_windows_nor_their_digest(row, value, tmp_path):
    frame = hours(ROWS)
    write(tmp_path / "a.csv", frame)
    before, _, _, _ = load(tmp_path)
    frame.loc[row, "value"] = value
    write(tmp_path / "a.csv", frame)
    after, _, _, _ = load(tmp_path)
    for part in ("train", "validation"):
        assert before[part].digest == after[part].digest
        for one, two in zip(
            *(windows[part].batch(np.arange(len(windows[part]))) for windows in (before, after)), strict=True
        ):
            assert torch.equal(one, two)
    assert before["test"].digest != after["test"].digest
    np.testing.assert_array_equal(before["test"].values[:160], after["test"].values[:160])  # the same scale


@pytest.mark.parametrize("row", [0, 80, 159])
def test_editing_a_train_value_changes_the_digest_of_the_training_windows(row):
    values = NOISE[:ROWS].copy()
    before = split({"a.csv": [m.Series("a", values, "h")]})[0]["train"].digest
    assert split({"a.csv": [m.Series("a", values.copy(), "h")]})[0]["train"].digest == before
    changed = values.copy()
    changed[row] = np.nextafter(changed[row], 9)  # the last bit may be another CPU's
    assert split({"a.csv": [m.Series("a", changed, "h")]})[0]["train"].digest == before
    changed[row] += 1e-4
    assert split({"a.csv": [m.Series("a", changed, "h")]})[0]["train"].digest != before


def test_the_digest_tells_window_choices_and_frequencies_apart():
    series = {"a.csv": [m.Series("a", NOISE[:ROWS], "h")]}
    daily = {"a.csv": [m.Series("a", NOISE[:ROWS], "D")]}
    choices = [{}, {"stride": 2}, {"windows": 50}, {"windows": 50, "stride": 2}, {"ratio": (7, 1, 2)}]
    digests = [split(series, **choice)[0]["train"].digest for choice in choices]
    assert len({*digests, split(daily)[0]["train"].digest}) == 6


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
    windows = load(tmp_path, ratio=(6, 2, 2))[0]["test"]
    assert windows.seasons.tolist() == [season]
    assert windows.season(np.array([2, 0])).tolist() == [season, season]
    assert load(tmp_path, ratio=(6, 2, 2), season=10)[0]["test"].seasons.tolist() == [10]


def test_without_timestamps_the_season_is_24_and_the_run_says_so(tmp_path, capsys):
    write(tmp_path / "a.csv", pd.DataFrame({"value": NOISE}))
    parts = m.load_data(m.parse_arguments(["--data_dir", str(tmp_path), *SMALL.split()]), m.Say("en"))
    assert parts["train"].seasons.tolist() == [24]
    assert any("24" in line and "--season" in line for line in capsys.readouterr().err.splitlines())


def test_each_window_knows_the_season_of_its_own_series():
    series = {f"{freq}.csv": [m.Series(freq, NOISE[i * 10 : i * 10 + ROWS], freq)] for i, freq in enumerate(["h", "D"])}
    windows = split(series)[0]["validation"]  # sorted by name: D before h
    assert windows.season(np.arange(len(windows))).tolist() == [7] * 13 + [24] * 13


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
    assert series.freq == freq and passed == []


def test_a_rising_meter_is_a_value_and_no_clock(tmp_path):
    meter = 500_000_000 + np.cumsum(np.arange(60) % 7 + 1)
    series, _ = read_one(write(tmp_path / "a.csv", pd.DataFrame({"energy": meter})))
    np.testing.assert_array_equal(series.values, meter)


def test_rows_with_more_fields_than_the_header_are_skipped_not_shifted(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("date,a,b\n" + "".join(f"2024-01-{i + 1:02d},{i},{2 * i},\n" for i in range(28)))
    with pytest.raises(m.Unusable, match="more fields than its header"):
        m.read_series(path, "a.csv", ["a"])


def test_monthly_stamps_with_the_day_first_are_no_daily_stamps(tmp_path):
    months = pd.date_range("2020-01-01", periods=60, freq="MS")
    frame = pd.DataFrame({"date": months.strftime("%d/%m/%Y"), "value": NOISE[:60]})
    series, _ = read_one(write(tmp_path / "a.csv", frame))
    np.testing.assert_array_equal(series.values, NOISE[:60])
    assert series.freq == "MS"


@pytest.mark.parametrize("cut", [60, None])
def test_a_packed_csv_is_read_and_a_damaged_one_skipped(cut, tmp_path):
    path = tmp_path / "a.csv.gz"
    hours(100).to_csv(path, index=False)
    path.write_bytes(path.read_bytes()[:cut])
    if cut:
        with pytest.raises(m.Unusable, match="unreadable"):
            m.read_series(path, "a.csv.gz", ["first"])
    else:
        np.testing.assert_allclose(read_one(path)[0].values, NOISE[:100], rtol=1e-12)


def test_a_series_shorter_than_the_horizon_is_skipped_and_ends_no_run():
    files = files_of(1, 160) | {"tiny.csv": [m.Series("tiny.csv", NOISE[:5].copy(), "h")]}
    parts, counts, _, notes = split(files)
    assert counts["train"] == 1 and "too short" in notes["tiny.csv"] and len(parts["test"].freqs) == 1


def test_one_absurd_value_in_a_held_out_part_counts_as_missing():
    values = NOISE[:160].copy()
    values[150] = 1e300
    parts, *_ = split({"a.csv": [m.Series("a.csv", values, "h")]})
    context, target, observed = parts["test"].batch(np.arange(len(parts["test"])))
    assert np.isfinite(target.numpy()).all() and target.abs().max() < 10 and (observed == 0).any()
