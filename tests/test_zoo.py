"""A zoo of CSVs from anywhere: each is used with the right values, or skipped with its reason; never a traceback."""

import codecs
import gzip
import math
import os

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL, hourly
from hypothesis import given, settings
from hypothesis import strategies as st

import moirai_distill as m

ROWS = 120
VALUES = np.round(np.random.default_rng(5).standard_normal(ROWS).cumsum() + 20, 3)
TIMES = pd.date_range("2024-01-30", periods=ROWS, freq="h")
NAN = math.nan


def csv(stamps=TIMES, values=VALUES, sep=",", name="value", header="date"):
    """Text of a CSV of two columns."""
    lines = [f"{header}{sep}{name}"] + [f"{stamp}{sep}{value}" for stamp, value in zip(stamps, values, strict=True)]
    return "\n".join(lines) + "\n"


def with_values(**changes):
    """CSV text, and its values as numbers, where `changes` (row as rNUMBER) replace the text of some values."""
    text, numbers = [str(value) for value in VALUES], VALUES.copy()
    for row, (word, number) in changes.items():
        text[int(row[1:])], numbers[int(row[1:])] = word, number
    return csv(values=text), numbers


def shuffled():
    order = np.random.default_rng(2).permutation(ROWS)
    return csv(TIMES[order], VALUES[order])


def outlier():
    return with_values(r50=("9e15", 9e15))


def comma(value):
    return str(value).replace(".", ",")


WIDE = pd.DataFrame({f"c{i}": VALUES[:40] + i for i in range(10_000)})
DST = pd.date_range("2024-03-29", periods=ROWS, freq="h", tz="Europe/Berlin")
ZONES = [f"{t}+0{1 + i % 2}:00" for i, t in enumerate(TIMES + pd.to_timedelta(np.arange(ROWS) % 2, "h"))]
MONTHS = pd.date_range("2010-01-01", periods=ROWS, freq="MS")
DAYS = pd.date_range("2024-01-01", periods=ROWS, freq="D")
BIG = 2**53 + 2 * np.arange(ROWS)
USED = {  # name -> (content, values that must come out, frequency)
    "plain": (csv(), VALUES, "h"),
    "byte order mark": (codecs.BOM_UTF8 + csv().encode(), VALUES, "h"),
    "utf-16": (csv().encode("utf-16"), VALUES, "h"),
    "utf-16 big endian": (codecs.BOM_UTF16_BE + csv().encode("utf-16-be"), VALUES, "h"),
    "latin-1": (csv(name="Température").encode("latin-1"), VALUES, "h"),
    "gb18030": (csv(name="温度", header="日期").encode("gb18030"), VALUES, "h"),
    "semicolons": (csv(sep=";"), VALUES, "h"),
    "semicolons and decimal commas": (csv(values=map(comma, VALUES), sep=";"), VALUES, "h"),
    "decimal commas and a word": (csv(values=["?", *map(comma, VALUES[1:])], sep=";"), [NAN, *VALUES[1:]], "h"),
    "tabs": (csv(sep="\t"), VALUES, "h"),
    "carriage returns": (csv().replace("\n", "\r\n"), VALUES, "h"),
    "old mac line ends": (csv().replace("\n", "\r"), VALUES, "h"),
    "no last line end": (csv().rstrip("\n"), VALUES, "h"),
    "a semicolon in a name of a tab file": (csv(sep="\t", name="a;b"), VALUES, "h"),
    "blank lines": (csv().replace("\n", "\n\n"), VALUES, "h"),
    "quoted": ("\n".join(",".join(f'"{f}"' for f in line.split(",")) for line in csv().splitlines()), VALUES, "h"),
    "quoted line ends in a note": (
        "date,value,note\n" + "".join(f'{t},{v},"two\nlines"\n' for t, v in zip(TIMES, VALUES, strict=True)),
        VALUES,
        "h",
    ),
    "trailing comma": (
        "date,value,\n" + "".join(f"{t},{v},\n" for t, v in zip(TIMES, VALUES, strict=True)),
        VALUES,
        "h",
    ),
    "spaces": (csv().replace(",", " , "), VALUES, "h"),
    "one column": ("value\n" + "\n".join(map(str, VALUES)) + "\n", VALUES, ""),
    "10,000 columns": (WIDE.to_csv(index=False), VALUES[:40], ""),
    "duplicate names": (
        "date,value,value\n" + "".join(f"{t},{v},{-v}\n" for t, v in zip(TIMES, VALUES, strict=True)),
        VALUES,
        "h",
    ),
    "mixed types, few words": (*with_values(r9=("n/a", NAN), r30=("broken", NAN)), "h"),
    "empty fields": (*with_values(r0=("", 0), r9=("", NAN), r10=("", NAN))[:1], None, "h"),
    "infinities": (*with_values(r9=("inf", NAN), r30=("-Infinity", NAN)), "h"),
    "exponents": (csv(values=[f"{value:.10e}" for value in VALUES]), VALUES, "h"),
    "1e38": (csv(values=VALUES * 1e38), VALUES * 1e38, "h"),
    "1e-100": (csv(values=VALUES * 1e-100), VALUES * 1e-100, "h"),
    "one huge outlier": (*outlier(), "h"),
    "integers": (csv(values=(1000 * VALUES).astype(int)), (1000 * VALUES).astype(int), "h"),
    "integers beyond 2^53": (
        csv(values=BIG * 3 // 2 * (1 + np.arange(ROWS) % 3)),
        (BIG * 3 // 2 * (1 + np.arange(ROWS) % 3)).astype(float),
        "h",
    ),
    "negative": (csv(values=-VALUES), -VALUES, "h"),
    "out of order": (shuffled(), VALUES, "h"),
    "newest first": (csv(TIMES[::-1], VALUES[::-1]), VALUES, "h"),
    "one duplicate row": (csv() + f"{TIMES[-1]},{VALUES[-1]}\n", VALUES, "h"),
    "ISO with T and Z": (csv([t.isoformat() + "Z" for t in TIMES]), VALUES, "h"),
    "zone +08:00": (csv([t.isoformat() + "+08:00" for t in TIMES]), VALUES, "h"),
    "zone -0530": (csv([f"{t} -0530" for t in TIMES]), VALUES, "h"),
    "mixed zones": (csv(ZONES), VALUES, "h"),
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
    "fractions of seconds": (csv([f"{t}.000" for t in TIMES]), VALUES, "h"),
    "year 0001, which no timestamp holds": (
        csv([f"0001-01-{1 + d // 24:02d} {d % 24:02d}:00" for d in range(ROWS)]),
        VALUES,
        "",
    ),
    "years 1700 to 1819": (csv([f"{1700 + y}-12-31" for y in range(ROWS)]), VALUES, "YE-DEC"),
    "unnamed index": ("," + csv().replace("\n", "\n1,", ROWS), VALUES, "h"),
    "running index": (
        "index,date,value\n" + "".join(f"{i},{t},{v}\n" for i, (t, v) in enumerate(zip(TIMES, VALUES, strict=True))),
        VALUES,
        "h",
    ),
    "booleans beside values": (
        "date,flag,value\n"
        + "".join(f"{t},{i % 2 == 0},{v}\n" for i, (t, v) in enumerate(zip(TIMES, VALUES, strict=True))),
        VALUES,
        "h",
    ),
    "packed": (gzip.compress(csv().encode()), VALUES, "h"),
}
USED["empty fields"] = (
    with_values(r5=("", NAN), r9=("", NAN), r10=("", NAN))[0],
    with_values(r5=("", NAN), r9=("", NAN), r10=("", NAN))[1],
    "h",
)
SKIPPED = {  # name -> (content, word of its reason)
    "empty": ("", "unreadable"),
    "only spaces": (" \n \n", "no rows|unreadable|no numeric"),
    "header only": ("date,value\n", "no rows"),
    "only text": (csv(values=["word"] * ROWS), "no numeric column"),
    "half words": (csv(values=[v if i % 2 else "word" for i, v in enumerate(VALUES)]), "no numeric column"),
    "only dates": ("date\n" + "\n".join(map(str, TIMES)), "no numeric column"),
    "all missing": (csv(values=[""] * ROWS), "no numeric column"),
    "all infinite": (csv(values=["inf"] * ROWS), "no numeric column"),
    "booleans": (csv(values=[i % 2 == 0 for i in range(ROWS)]), "no numeric column"),
    "1e-300": (csv(values=VALUES * 1e-300), "too close"),
    "constant": (csv(values=[7] * ROWS), "constant"),
    "denormals": (csv(values=[f"{5e-324 * (i % 3)}" for i in range(ROWS)]), "too close|constant"),
    "larger than squares can be": (csv(values=VALUES * 1e200), "too large"),
    "beyond float64": (csv(values=["1e999"] * ROWS), "no numeric column"),
    "a few rows too few": (csv(TIMES[:79], VALUES[:79]), "too short"),
    "two rows": (csv(TIMES[:2], VALUES[:2]), "too short"),
    "all stamps the same": (csv([TIMES[0]] * ROWS), "duplicates"),
    "half duplicates": (csv(TIMES.repeat(2)[:ROWS]), "duplicates"),
    "daylight saving without offsets": (
        csv(pd.date_range("2024-10-20", periods=ROWS, freq="3min").floor("h")),
        "duplicates",
    ),
    "irregular stamps": (
        csv(TIMES[0] + pd.to_timedelta(np.random.default_rng(0).exponential(1e5, ROWS).cumsum(), "s")),
        "irregular|sparse",
    ),
    "a stamp in the year 3000": (csv([*TIMES[:-1], "2199-01-01"]), "sparse|irregular"),
    "more fields than the header": (csv().replace("date,value", "value"), "more fields|unreadable|too short"),
    "a cut quote": (csv() + '"2024-02-05,1\n' * 3, "unreadable|no numeric"),
    "truncated gzip": (gzip.compress(csv().encode())[:-30], "unreadable"),
    "no gzip at all": (csv().encode(), "unreadable"),
    "noise": (
        np.random.default_rng(0).integers(128, 256, 5000, dtype=np.uint8).tobytes(),
        "unreadable|no rows|no numeric|more fields",
    ),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20, "unreadable|no rows|no numeric|more fields"),
    "a pickle": (b"\x80\x04\x95" + bytes(200), "unreadable|no rows|no numeric|more fields"),
    "NUL bytes in numbers": (csv().replace("20.", "2\0 0."), "NUL bytes"),  # pandas alone reads 2.0
    "utf-16 without a mark": (csv().encode("utf-16-le"), "NUL bytes"),
    "thousands separators": (csv(values=[f'"{v:,.2f}"' for v in 1e5 * VALUES]), "no numeric"),
    "html": ("<!DOCTYPE html><html><body>404, not found</body></html>\n", "no rows|no numeric"),
    "json": ('{"date": "2024-01-01", "value": 3}\n{"date": "2024-01-02", "value": 4}\n', "no numeric|unreadable"),
    "lfs pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "no numeric"),
}
SPECIAL = ("a folder", "a link to nowhere", "a link to itself", "no read permission")


def put(folder, name, content):
    """Write one animal of the zoo; returns its path."""
    packed = name in ("packed", "truncated gzip", "no gzip at all")
    path = folder / f"{name.replace('/', '_')}.csv{'.gz' * packed}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path):
    """Values and frequency of the first series of a file, as it would be prepared."""
    series, _ = m.read_series(path, path.name, ["first"])
    m.prepare(series[0], {"whole": (0, len(series[0].values))}, 40, 8, 16)
    return series[0].values, series[0].freq


def test_the_zoo_has_at_least_60_animals():
    assert len(USED) + len(SKIPPED) + len(SPECIAL) >= 60 and not {*USED} & {*SKIPPED}


@pytest.mark.parametrize("name", USED)
def test_a_file_that_can_be_used_gives_exactly_its_values(name, tmp_path):
    content, expected, freq = USED[name]
    values, found = read(put(tmp_path, name, content))
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    assert found == freq


@pytest.mark.parametrize("name", SKIPPED)
def test_a_file_that_cannot_be_used_is_skipped_with_its_reason(name, tmp_path):
    content, reason = SKIPPED[name]
    path = put(tmp_path, name, content)
    with pytest.raises(m.Unusable, match=reason):
        series, _ = m.read_series(path, path.name, ["first"])
        for item in series:
            m.prepare(item, {"whole": (0, len(item.values))}, 80, 16, 16)


def test_a_file_without_a_header_loses_no_more_than_its_first_row(tmp_path):
    values, _ = read(put(tmp_path, "bare", csv().partition("\n")[2]))
    np.testing.assert_array_equal(values, VALUES[1:])


def test_ten_million_rows_are_read(tmp_path):
    rows = 10_000_000
    path = tmp_path / "long.csv"
    path.write_bytes(b"value\n" + b"1.5\n-2.5\n" * (rows // 2))
    (series,), _ = m.read_series(path, path.name, ["first"])
    assert len(series.values) == rows and series.values[[0, 1, -1]].tolist() == [1.5, -2.5, -2.5]


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


def test_a_run_over_the_whole_zoo_uses_the_good_and_names_every_other_file(zoo, tmp_path, capsys, monkeypatch):
    opened = open

    def careful(path, *mode, **more):  # as for a user who is not root
        if str(path).endswith("no read permission.csv"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *mode, **more)

    monkeypatch.setattr("builtins.open", careful)
    flags = f"{SMALL} --context_length 32 --prediction_length 4 --alpha 0 --num_epochs 1 --max_windows 2 --lang en"
    words = ["--data_dir", str(zoo), "--save_dir", str(tmp_path / "run"), "--max_files", "0", *flags.split()]
    assert m.main(words) == 0
    out = capsys.readouterr().out
    assert f"Found {len(USED) + len(SKIPPED) + len(SPECIAL)} CSV files" in out
    remarks = dict(line.strip().split(": ", 1) for line in out.splitlines() if line.startswith("  ") and ".csv" in line)
    for name in [*USED]:
        assert "skipped" not in remarks.get(f"{name}.csv", ""), name
    short = {"a few rows too few"}  # 79 rows are enough for windows of 36
    for name in {*SKIPPED} - short - {"truncated gzip", "no gzip at all"} | {*SPECIAL}:
        assert "skipped" in remarks[f"{name}.csv"], name
    for name in ("truncated gzip", "no gzip at all"):
        assert "skipped: unreadable" in remarks[f"{name}.csv.gz"]
    trained = sum(int(line.split()[1]) for line in out.splitlines() if line.startswith("Using "))
    assert trained >= len(USED)


# -- CSVs from the format's grammar ------------------------------------------------------------------------------------

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 4))
WORDS = st.sampled_from(["", "nan", "NaN", "NA", "null", "inf", "-inf", "N/A", "x", "1.2.3", "--"])
NAMES = st.sampled_from(["value", "v w", "温度", "a;b", "OT", "x.1", "1", "valeur é"])
GRIDS = ("h", "15min", "D", "B", "MS", "W-MON", "10s")


@st.composite
def files(draw):
    """(bytes of a CSV, values on its grid, frequency): rows in any order, gaps, words, encodings, separators, ends."""
    rows, freq = draw(st.integers(20, 60)), draw(st.sampled_from(GRIDS))
    times = pd.date_range("2021-03-01", periods=rows, freq=freq)
    values = np.array(draw(st.lists(NUMBERS, min_size=rows, max_size=rows)))
    separator = draw(st.sampled_from([",", ";", "\t"]))
    decimal = "," if separator == ";" and draw(st.booleans()) else "."
    text = [repr(value).replace(".", decimal) for value in values.tolist()]
    for row in draw(st.sets(st.integers(0, rows - 1), max_size=max(0, rows // 12))):
        text[row], values[row] = draw(WORDS), NAN
    dropped = draw(st.sets(st.integers(1, rows - 2), max_size=rows // 12))
    values[[*dropped]] = NAN
    kept = [row for row in range(rows) if row not in dropped]
    kept = draw(st.permutations(kept)) if draw(st.booleans()) else kept
    quote = '"' if draw(st.booleans()) else ""
    end = draw(st.sampled_from(["\n", "\r\n"]))
    name = draw(NAMES)
    name = f'"{name}"' if separator in name else name
    lines = [separator.join(["date", name]), *(separator.join([f"{quote}{times[r]}{quote}", text[r]]) for r in kept)]
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
    return (end.join(lines) + end * draw(st.booleans())).encode(encoding), values, freq


def check_generated(case):
    """The values of a generated file come out as they went in, or the file is skipped with a reason."""
    content, expected, freq = case
    folder = check_generated.folder
    path = folder / "a.csv"
    path.write_bytes(content)
    try:
        (series,), _ = m.read_series(path, "a.csv", ["first"])
    except m.Unusable as reason:
        numbers = np.isfinite(expected).sum()
        assert str(reason) and (numbers < 0.95 * len(expected)), reason
        return
    np.testing.assert_array_equal(series.values, expected)
    assert series.freq == {"W-MON": "7D"}.get(freq, freq)


@settings(max_examples=int(os.environ.get("CSV_EXAMPLES", 60)), deadline=None)  # the long run: CSV_EXAMPLES=2000
@given(files())
def test_generated_files_give_their_values(tmp_path_factory, case):
    check_generated.folder = tmp_path_factory.getbasetemp()
    check_generated(case)


def test_good_files_beside_bad_ones_are_used(tmp_path):
    for number in range(3):
        hourly(200, seed=number).to_csv(tmp_path / f"good{number}.csv", index=False)
    for name in ("empty", "noise", "constant"):
        put(tmp_path, name, SKIPPED[name][0])
    _, series, remarks = m.read_files(str(tmp_path), 0, ["first"], False)
    limits = {"length": 80, "horizon": 16, "max_gap": 16}
    parts, *_ = m.split_data(series, remarks, "time", (8.0, 1.0, 1.0), 0, 1, 0, "auto", limits)
    assert parts["train"].names == [f"good{number}.csv" for number in range(3)]
