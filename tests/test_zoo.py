"""A zoo of CSVs from anywhere: each is used with the right values, or skipped with its reason.

None ends in a traceback.
"""

import codecs
import gzip
import math
import os

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL, data_config, hourly, read_config, split_folder
from hypothesis import given, settings
from hypothesis import strategies as st

import moirai_distill as md

ROWS = 120
VALUES = np.round(np.random.default_rng(5).standard_normal(ROWS).cumsum() + 20, 3)
TIMES = pd.date_range("2024-01-30", periods=ROWS, freq="h")
DST = pd.date_range("2024-03-29", periods=ROWS, freq="h", tz="Europe/Berlin")
MONTHS = pd.date_range("2010-01-01", periods=ROWS, freq="MS")
DAYS = pd.date_range("2024-01-01", periods=ROWS, freq="D")
NAN = math.nan


def csv(stamps=TIMES, values=VALUES, sep=",", name="value", header="date"):
    """Text of a CSV of two columns."""
    lines = [f"{header}{sep}{name}"]
    lines += [f"{stamp}{sep}{value}" for stamp, value in zip(stamps, values, strict=True)]
    return "\n".join(lines) + "\n"


def spelt(header, row):
    """Text of a CSV whose rows are written by a template of {number}, {time} and {value}."""
    lines = [header]
    for number, (time, value) in enumerate(zip(TIMES, VALUES, strict=True)):
        lines.append(row.format(number=number, time=time, value=value, minus=-value))
    return "\n".join(lines) + "\n"


def with_values(changes):
    """CSV text, and its values as numbers; `changes` are row -> (text, what it stands for)."""
    texts = [str(value) for value in VALUES]
    numbers = VALUES.copy()
    for row, (text, number) in changes.items():
        texts[row] = text
        numbers[row] = number
    return csv(values=texts), numbers


def shuffled():
    """CSV text whose rows are in no order."""
    order = np.random.default_rng(2).permutation(ROWS)
    return csv(TIMES[order], VALUES[order])


def quoted():
    """CSV text with quotes around each field."""
    lines = []
    for line in csv().splitlines():
        fields = [f'"{field}"' for field in line.split(",")]
        lines.append(",".join(fields))
    return "\n".join(lines)


def in_two_zones():
    """Texts of the stamps, by turns with the offsets +01:00 and +02:00."""
    clocks = TIMES + pd.to_timedelta(np.arange(ROWS) % 2, "h")
    return [f"{clock}+0{1 + row % 2}:00" for row, clock in enumerate(clocks)]


def at_random():
    """Stamps without any step."""
    gaps = np.random.default_rng(0).exponential(1e5, ROWS)
    return TIMES[0] + pd.to_timedelta(gaps.cumsum(), "s")


HALF_WORDS = [value if row % 2 else "word" for row, value in enumerate(VALUES)]
FLAGS = [row % 2 == 0 for row in range(ROWS)]
WITH_COMMAS = [str(value).replace(".", ",") for value in VALUES]
THOUSANDTHS = (1000 * VALUES).astype(int)
THOUSANDS = [f'"{value:,}"' for value in 100 * THOUSANDTHS]
BIG = (2**53 + 2 * np.arange(ROWS)) * 3 // 2 * (1 + np.arange(ROWS) % 3)
YEAR_1 = [f"0001-01-{1 + row // 24:02d} {row % 24:02d}:00" for row in range(ROWS)]
YEAR_ENDS = [f"{1700 + row}-12-31" for row in range(ROWS)]
FALL_BACK = pd.date_range("2024-10-20", periods=ROWS, freq="3min").floor("h")

USED = {  # name -> (content, values that must come out, frequency)
    "plain": (csv(), VALUES, "h"),
    "byte order mark": (codecs.BOM_UTF8 + csv().encode(), VALUES, "h"),
    "utf-16": (csv().encode("utf-16"), VALUES, "h"),
    "utf-16 big endian": (codecs.BOM_UTF16_BE + csv().encode("utf-16-be"), VALUES, "h"),
    "latin-1": (csv(name="Température").encode("latin-1"), VALUES, "h"),
    "gb18030": (csv(name="温度", header="日期").encode("gb18030"), VALUES, "h"),
    "semicolons": (csv(sep=";"), VALUES, "h"),
    "semicolons and decimal commas": (csv(values=WITH_COMMAS, sep=";"), VALUES, "h"),
    "decimal commas and a word": (
        csv(values=["?", *WITH_COMMAS[1:]], sep=";"),
        [NAN, *VALUES[1:]],
        "h",
    ),
    "tabs": (csv(sep="\t"), VALUES, "h"),
    "carriage returns": (csv().replace("\n", "\r\n"), VALUES, "h"),
    "old mac line ends": (csv().replace("\n", "\r"), VALUES, "h"),
    "no last line end": (csv().rstrip("\n"), VALUES, "h"),
    "a semicolon in a name of a tab file": (csv(sep="\t", name="a;b"), VALUES, "h"),
    "blank lines": (csv().replace("\n", "\n\n"), VALUES, "h"),
    "quoted": (quoted(), VALUES, "h"),
    "quoted line ends in a note": (
        spelt("date,value,note", '{time},{value},"two\nlines"'),
        VALUES,
        "h",
    ),
    "trailing comma": (spelt("date,value,", "{time},{value},"), VALUES, "h"),
    "spaces": (csv().replace(",", " , "), VALUES, "h"),
    "one column": (spelt("value", "{value}"), VALUES, ""),
    "duplicate names": (spelt("date,value,value", "{time},{value},{minus}"), VALUES, "h"),
    "mixed types, few words": (*with_values({9: ("n/a", NAN), 30: ("broken", NAN)}), "h"),
    "empty fields": (*with_values({5: ("", NAN), 9: ("", NAN), 10: ("", NAN)}), "h"),
    "infinities": (*with_values({9: ("inf", NAN), 30: ("-Infinity", NAN)}), "h"),
    "exponents": (csv(values=[f"{value:.10e}" for value in VALUES]), VALUES, "h"),
    "1e38": (csv(values=VALUES * 1e38), VALUES * 1e38, "h"),
    "1e-100": (csv(values=VALUES * 1e-100), VALUES * 1e-100, "h"),
    "one huge outlier": (*with_values({50: ("9e15", 9e15)}), "h"),
    "integers": (csv(values=THOUSANDTHS), THOUSANDTHS, "h"),
    "integers beyond 2^53": (csv(values=BIG), BIG.astype(float), "h"),
    "thousands separators": (csv(values=THOUSANDS), THOUSANDTHS * 100.0, "h"),
    "negative": (csv(values=-VALUES), -VALUES, "h"),
    "out of order": (shuffled(), VALUES, "h"),
    "newest first": (csv(TIMES[::-1], VALUES[::-1]), VALUES, "h"),
    "one duplicate row": (csv() + f"{TIMES[-1]},{VALUES[-1]}\n", VALUES, "h"),
    "ISO with T and Z": (csv(TIMES.strftime("%Y-%m-%dT%H:%M:%SZ")), VALUES, "h"),
    "zone +08:00": (csv(TIMES.strftime("%Y-%m-%dT%H:%M:%S+08:00")), VALUES, "h"),
    "zone -0530": (csv(TIMES.strftime("%Y-%m-%d %H:%M:%S -0530")), VALUES, "h"),
    "mixed zones": (csv(in_two_zones()), VALUES, "h"),
    "daylight saving with offsets": (csv(DST), VALUES, "h"),
    "day first": (csv(DAYS.strftime("%d/%m/%Y")), VALUES, "D"),
    "month first": (csv(DAYS.strftime("%m/%d/%Y")), VALUES, "D"),
    "dots": (csv(DAYS.strftime("%d.%m.%Y")), VALUES, "D"),
    "slashes, year first": (csv(DAYS.strftime("%Y/%m/%d")), VALUES, "D"),
    "Chinese dates": (csv(DAYS.strftime("%Y年%m月%d日"), header="日期"), VALUES, "D"),
    "compact dates": (csv(DAYS.strftime("%Y%m%d")), VALUES, "D"),
    "names of months": (csv(DAYS.strftime("%d-%b-%Y")), VALUES, "D"),
    "12-hour clock": (csv(TIMES.strftime("%m/%d/%Y %I:%M:%S %p")), VALUES, "h"),
    "month and year": (csv(MONTHS.strftime("%b %Y")), VALUES, "MS"),
    "ISO months": (csv(MONTHS.strftime("%Y-%m")), VALUES, "MS"),
    "epoch seconds": (csv(TIMES.as_unit("s").asi8), VALUES, "h"),
    "epoch milliseconds": (csv(TIMES.as_unit("ms").asi8), VALUES, "h"),
    "fractions of seconds": (csv([f"{time}.000" for time in TIMES]), VALUES, "h"),
    "years 1700 to 1819": (csv(YEAR_ENDS), VALUES, "YE-DEC"),
    "unnamed index": ("," + csv().replace("\n", "\n1,", ROWS), VALUES, "h"),
    "running index": (spelt("index,date,value", "{number},{time},{value}"), VALUES, "h"),
    "booleans beside values": (
        pd.DataFrame({"date": TIMES, "flag": FLAGS, "value": VALUES}).to_csv(index=False),
        VALUES,
        "h",
    ),
    "packed": (gzip.compress(csv().encode()), VALUES, "h"),
}
SKIPPED = {  # name -> (content, word of its reason)
    "empty": ("", "no rows"),
    "year 0001, which no timestamp holds": (csv(YEAR_1), "stamps of date cannot be read"),
    "only spaces": (" \n \n", "no rows"),
    "header only": ("date,value\n", "no rows"),
    "only text": (csv(values=["word"] * ROWS), "no numeric column"),
    "half words": (csv(values=HALF_WORDS), "value is only 50 % numbers"),
    "only dates": (spelt("date", "{time}"), "no numeric column"),
    "all missing": (csv(values=[""] * ROWS), "no numeric column"),
    "all infinite": (csv(values=["inf"] * ROWS), "no numeric column"),
    "booleans": (csv(values=FLAGS), "no numeric column"),
    "1e-300": (csv(values=VALUES * 1e-300), "too close"),
    "constant": (csv(values=[7] * ROWS), "constant"),
    "denormals": (csv(values=5e-324 * (np.arange(ROWS) % 3)), "too close|constant"),
    "larger than squares can be": (csv(values=VALUES * 1e200), "too large"),
    "beyond float64": (csv(values=["1e999"] * ROWS), "no numeric column"),
    "a few rows too few": (csv(TIMES[:79], VALUES[:79]), "too short"),
    "two rows": (csv(TIMES[:2], VALUES[:2]), "too short"),
    "all stamps the same": (csv([TIMES[0]] * ROWS), "duplicates"),
    "half duplicates": (csv(TIMES.repeat(2)[:ROWS]), "duplicates"),
    "daylight saving without offsets": (csv(FALL_BACK), "duplicates"),
    "irregular stamps": (csv(at_random()), "irregular|sparse"),
    "a stamp in the year 2199": (csv([*TIMES[:-1], "2199-01-01"]), "sparse|irregular"),
    "more fields than the header": (
        csv().replace("date,value", "value"),
        "more fields|unreadable|too short",
    ),
    "a cut quote": (csv() + '"2024-02-05,1\n' * 3, "unreadable|no numeric"),
    "truncated gzip": (gzip.compress(csv().encode())[:-30], "unreadable"),
    "no gzip at all": (csv().encode(), "unreadable"),
    "noise": (
        np.random.default_rng(0).integers(128, 256, 5000, dtype=np.uint8).tobytes(),
        "unreadable|no rows|no numeric|more fields",
    ),
    "a picture": (
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20,
        "a picture",
    ),
    "a pickle": (b"\x80\x04\x95" + bytes(200), "unreadable|no rows|no numeric|more fields"),
    "NUL bytes in numbers": (csv().replace("20.", "2\0 0."), "NUL bytes"),  # pandas alone reads 2.0
    "utf-16 without a mark": (csv().encode("utf-16-le"), "NUL bytes"),
    "html": ("<!DOCTYPE html><html><body>404, not found</body></html>\n", "a web page"),
    "json": (
        '{"date": "2024-01-01", "value": 3}\n{"date": "2024-01-02", "value": 4}\n',
        "no CSV but JSON",
    ),
    "lfs pointer": (
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "a pointer of Git LFS",
    ),
}
PACKED = {"packed", "truncated gzip", "no gzip at all"}  # by their names
SPECIAL = {"a folder", "a link to nowhere", "a link to itself", "no read permission"}


def file_name(name):
    """Name of the file of one animal of the zoo."""
    ending = ".csv.gz" if name in PACKED else ".csv"
    return name.replace("/", "_") + ending


def put(folder, name, content):
    """Write one animal of the zoo; returns its path."""
    path = folder / file_name(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, context_length=32, prediction_length=8):
    """RawSeries of a file, of which each can be prepared; raises Unusable as a run would."""
    config = data_config(context_length=context_length, prediction_length=prediction_length)
    all_series = md.read_series(path, path.name, read_config()).series
    for series in all_series:
        md.prepare_series(series, {"whole": (0, len(series.values))}, config)
    return all_series


def test_the_zoo_has_at_least_60_animals():
    assert len(USED) + len(SKIPPED) + len(SPECIAL) >= 60
    assert not USED.keys() & SKIPPED.keys()


@pytest.mark.parametrize("name", USED)
def test_a_file_that_can_be_used_gives_exactly_its_values(name, tmp_path):
    content, expected, freq = USED[name]
    (series,) = read(put(tmp_path, name, content))
    np.testing.assert_allclose(series.values, expected, rtol=1e-12)
    assert series.freq == freq


@pytest.mark.parametrize("name", SKIPPED)
def test_a_file_that_cannot_be_used_is_skipped_with_its_reason(name, tmp_path):
    content, reason = SKIPPED[name]
    path = put(tmp_path, name, content)
    with pytest.raises(md.Unusable, match=reason):
        read(path, context_length=64, prediction_length=16)


def test_a_file_without_a_header_loses_no_more_than_its_first_row(tmp_path):
    (series,) = read(put(tmp_path, "bare", csv().partition("\n")[2]))
    np.testing.assert_array_equal(series.values, VALUES[1:])


def test_ten_million_rows_are_read(tmp_path):
    rows = 10_000_000
    path = tmp_path / "long.csv"
    path.write_bytes(b"value\n" + b"1.5\n-2.5\n" * (rows // 2))
    (series,) = md.read_series(path, path.name, read_config()).series
    assert len(series.values) == rows
    assert series.values[[0, 1, -1]].tolist() == [1.5, -2.5, -2.5]


def test_ten_thousand_columns_are_read(tmp_path):
    columns = 10_000
    header = ",".join(f"c{number}" for number in range(columns))
    rows = [",".join([str(value)] * columns) for value in VALUES[:40]]
    (series,) = read(put(tmp_path, "wide", "\n".join([header, *rows])))
    np.testing.assert_array_equal(series.values, VALUES[:40])
    assert series.freq == ""


@pytest.fixture
def zoo(tmp_path):
    """A folder with all of the zoo, files and what is none."""
    folder = tmp_path / "动物园 zoo"
    folder.mkdir()
    for name, (content, *_) in (USED | SKIPPED).items():
        put(folder, name, content)
    (folder / "a folder.csv").mkdir()
    (folder / "a link to nowhere.csv").symlink_to(tmp_path / "nowhere")
    (folder / "a link to itself.csv").symlink_to(folder / "a link to itself.csv")
    locked = folder / "no read permission.csv"
    locked.write_text(csv())
    locked.chmod(0)
    yield folder
    locked.chmod(0o600)


def test_a_run_over_the_whole_zoo_uses_the_good_and_names_every_other_file(
    zoo, tmp_path, capsys, monkeypatch
):
    opened = open

    def careful(path, *mode, **more):  # as for a user who is not root
        if str(path).endswith("no read permission.csv"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *mode, **more)

    monkeypatch.setattr("builtins.open", careful)
    monkeypatch.setattr(md, "draw", lambda *_arguments: None)
    flags = f"{SMALL} --context_length 32 --prediction_length 4 --max_gap 16 --columns first"
    flags += " --max_files 0 --split_by files --split_ratio 8:1:1 --max_windows 2"
    flags += " --alpha 0 --num_epochs 1 --lang en"
    folders = ["--data_dir", str(zoo), "--save_dir", str(tmp_path / "run")]
    assert md.main([*folders, *flags.split()]) == 0
    out = capsys.readouterr().out
    assert f"Found {len(USED) + len(SKIPPED) + len(SPECIAL)} CSV files" in out

    notes = {}
    trained = 0
    for line in out.splitlines():
        if line.startswith("  ") and ".csv" in line:
            name, note = line.strip().split(": ", 1)
            notes[name] = note
        if line.startswith("Using "):
            trained += int(line.split()[1])
    for name in USED:
        assert "skipped" not in notes.get(file_name(name), ""), name
    long_enough = {"a few rows too few"}  # 79 rows are enough for windows of 36
    for name in (SKIPPED.keys() - long_enough) | SPECIAL:
        assert "skipped" in notes[file_name(name)], name
    for name in ("truncated gzip", "no gzip at all"):
        assert "skipped: unreadable" in notes[file_name(name)]
    assert trained == len(USED) + len(long_enough)


# -- CSVs from the format's grammar ----------------------------------------------------------------

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 4))
WORDS = st.sampled_from(["", "nan", "NaN", "NA", "null", "inf", "-inf", "N/A", "x", "1.2.3", "--"])
NAMES = st.sampled_from(["value", "v w", "温度", "a;b", "OT", "x.1", "1", "valeur é"])
GRIDS = ("h", "15min", "D", "B", "MS", "W-MON", "10s")


@st.composite
def files(draw):
    """(bytes of a CSV, values on its grid, frequency).

    Its rows come in any order, with gaps, words, encodings, separators and line ends.
    """
    rows = draw(st.integers(20, 60))
    freq = draw(st.sampled_from(GRIDS))
    times = pd.date_range("2021-03-01", periods=rows, freq=freq)
    values = np.array(draw(st.lists(NUMBERS, min_size=rows, max_size=rows)))
    separator = draw(st.sampled_from([",", ";", "\t"]))
    decimal = "," if separator == ";" and draw(st.booleans()) else "."
    texts = [repr(value).replace(".", decimal) for value in values.tolist()]
    for row in draw(st.sets(st.integers(0, rows - 1), max_size=rows // 12)):
        texts[row] = draw(WORDS)
        values[row] = NAN
    dropped = draw(st.sets(st.integers(1, rows - 2), max_size=rows // 12))
    values[[*dropped]] = NAN
    kept = [row for row in range(rows) if row not in dropped]
    if draw(st.booleans()):
        kept = draw(st.permutations(kept))

    name = draw(NAMES)
    if separator in name:
        name = f'"{name}"'
    quote = draw(st.sampled_from(["", '"']))
    lines = [f"date{separator}{name}"]
    lines += [f"{quote}{times[row]}{quote}{separator}{texts[row]}" for row in kept]
    line_end = draw(st.sampled_from(["\n", "\r\n"]))
    text = line_end.join(lines)
    if draw(st.booleans()):
        text += line_end
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
    return text.encode(encoding), values, freq


# the long run: CSV_EXAMPLES=2000
@settings(max_examples=int(os.environ.get("CSV_EXAMPLES", 60)), deadline=None)
@given(files())
def test_generated_files_give_their_values_or_are_skipped_with_a_reason(tmp_path_factory, case):
    content, expected, freq = case
    path = tmp_path_factory.getbasetemp() / "a.csv"
    path.write_bytes(content)
    try:
        (series,) = md.read_series(path, "a.csv", read_config()).series
    except md.Unusable as reason:
        assert str(reason)
        is_constant = np.nanmin(expected) == np.nanmax(expected)
        assert is_constant or np.isfinite(expected).mean() < 0.95, reason
        return
    np.testing.assert_array_equal(series.values, expected)
    assert series.freq == {"W-MON": "7D"}.get(freq, freq)


def test_good_files_beside_bad_ones_are_used(tmp_path):
    for number in range(3):
        hourly(200, seed=number).to_csv(tmp_path / f"good{number}.csv", index=False)
    for name in ("empty", "noise", "constant"):
        put(tmp_path, name, SKIPPED[name][0])
    windows = split_folder(tmp_path, split_by="time").windows
    assert windows["train"].names == [f"good{number}.csv" for number in range(3)]
