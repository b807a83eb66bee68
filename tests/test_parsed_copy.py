"""A second start on the same files reads what the first one parsed, and nothing else ever does."""

import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL, hourly

import moirai_distill as m


@pytest.fixture
def folder(csv_folder):
    """12 usable files; beside them one in long format, one with zones and gaps, one without a number, one damaged."""
    parts = [hourly(300, seed=20 + i).assign(unique_id=f"é{i}") for i in range(3)]
    pd.concat(parts).to_csv(csv_folder / "long.csv", index=False)
    gaps = hourly(300, seed=9)
    gaps.loc[[5, 6, 100], "value"] = np.nan
    gaps.assign(date=gaps["date"].dt.tz_localize("Asia/Shanghai")).to_csv(csv_folder / "zone.csv", index=False)
    (csv_folder / "words.csv").write_text("words\na\nb\n")
    (csv_folder / "nul.csv").write_bytes(b"a,b\n1,\x00\n")
    return csv_folder


@pytest.fixture
def load(folder, tmp_path, monkeypatch):
    """`load(**flags)`: the parts of the folder, and whether its files were parsed for them."""
    monkeypatch.setattr(m, "KEPT_FROM", 1)
    asked, read = [], m.read_series
    monkeypatch.setattr(m, "read_series", lambda *words: (asked.append(words[1]), read(*words))[1])

    def load(**flags):
        words = ["--data_dir", folder, "--label_cache", tmp_path / "cache", *SMALL.split()]
        args = m.parse_arguments([*map(str, words), *[str(w) for k, v in flags.items() for w in (f"--{k}", v)]])
        asked.clear()
        return m.load_data(args, m.Say("en")), bool(asked)

    return load


def copies(tmp_path):
    return sorted((tmp_path / "cache").glob("parsed-*.pt"))


def test_the_second_start_parses_no_file_and_gives_the_same_windows_and_table(load, tmp_path, capsys):
    first, parsed = load()
    table = capsys.readouterr()
    second, again = load()
    assert (parsed, again) == (True, False) and len(copies(tmp_path)) == 1
    assert capsys.readouterr().out == table.out and "nul.csv: skipped: unreadable" in table.out
    for part in m.PARTS:
        for field in m.dataclasses.fields(m.Windows):
            before, after = getattr(first[part], field.name), getattr(second[part], field.name)
            np.testing.assert_array_equal(before, after, err_msg=field.name)
    assert any(name.startswith("long.csv / é") for part in m.PARTS for name in first[part].names)


CHANGES = {
    "a value, of the same length": lambda folder: (folder / "s01.csv").write_text(
        (folder / "s01.csv").read_text()[:-3] + "9\n\n"
    ),
    "a new file": lambda folder: hourly(300, seed=33).to_csv(folder / "new.csv", index=False),
    "a file less": lambda folder: (folder / "s05.csv").unlink(),
    "another name": lambda folder: (folder / "s05.csv").rename(folder / "t05.csv"),
    "rights": lambda folder: (folder / "s05.csv").chmod(0o600),
    "a file for another": lambda folder: shutil.copy(folder / "s06.csv", folder / "s05.csv"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changed_is_parsed_anew_and_replaces_the_copy(change, load, folder, tmp_path):
    load()
    CHANGES[change](folder)
    assert load()[1] is True and load()[1] is False
    assert len(copies(tmp_path)) == 1


def test_a_change_that_keeps_size_and_times_of_modification_is_seen(load, folder):
    before = load()[0]["train"].digest
    path = folder / "s01.csv"
    stat, text = path.stat(), path.read_text()
    path.write_text(text.replace("5.", "6."))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size and path.stat().st_mtime_ns == stat.st_mtime_ns
    parts, parsed = load()
    assert parsed and parts["train"].digest != before


def test_without_times_of_change_as_on_windows_size_and_modification_tell(load, folder, monkeypatch):
    class Stat:
        def __init__(self, path):
            self.st_size, self.st_mtime_ns, self.st_ctime_ns = true(path).st_size, true(path).st_mtime_ns, 7

    true = os.stat
    monkeypatch.setattr(
        m.os, "stat", lambda path, **more: Stat(path) if str(path).endswith(".csv") else true(path, **more)
    )
    monkeypatch.setattr(m.os.path, "isfile", lambda _path: True)  # it asks os.stat, too
    load()
    path = folder / "s01.csv"
    before = true(path)
    path.write_text(path.read_text()[:-3] + "9\n\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert load()[1] is True and load()[1] is False
    path.write_text(path.read_text() + "2024-02-01,5\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert load()[1] is True and load()[1] is False


def test_a_full_disk_and_a_name_that_is_no_utf8_are_no_obstacle(folder, load, tmp_path, monkeypatch):
    os.replace(folder / "s11.csv", os.fsencode(folder) + b"/caf\xe9.csv")
    saved = torch.save

    def full(content, file):
        saved(content, file)
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")  # as PyTorch tells it

    monkeypatch.setattr(m.torch, "save", full)
    assert load()[1] and load()[1] and not copies(tmp_path) and not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(m.torch, "save", saved)
    assert load()[1] is True and load()[1] is False


def test_another_folder_has_another_copy_and_the_same_one_by_another_path_has_not(load, folder, tmp_path, monkeypatch):
    before, _ = load()
    shutil.copytree(folder, tmp_path / "other")
    for path in (tmp_path / "other").iterdir():
        os.utime(path, ns=(0, 0))
    assert load(data_dir=tmp_path / "other")[1] is True and len(copies(tmp_path)) == 2
    monkeypatch.chdir(folder.parent)
    after, parsed = load(data_dir=folder.name)
    assert parsed is False and before["train"].digest == after["train"].digest


@pytest.mark.parametrize("flags", [{"columns": "all"}, {"max_files": 13}])
def test_other_flags_of_reading_parse_anew(flags, load):
    load()
    assert load(**flags)[1] is True and load(**flags)[1] is False


def test_flags_of_what_comes_after_reading_do_not(load):
    load()
    assert load(split_by="time", stride=3, max_gap=0, max_windows=7)[1] is False


def test_another_version_of_the_script_or_of_pandas_parses_anew(load, tmp_path, monkeypatch):
    load()
    script = tmp_path / "moirai_distill.py"
    script.write_text("# another one\n")
    monkeypatch.setattr(m, "SOURCE", script.read_bytes())
    assert load()[1] is True and load()[1] is False
    monkeypatch.setattr(pd, "__version__", "9.9")
    assert load()[1] is True


class Evil:
    def __reduce__(self):
        return os.mkdir, ("it_ran",)


@pytest.mark.parametrize("kind", ["empty", "cut", "text", "code", "other content", "a flipped bit", "no series"])
def test_a_damaged_copy_is_told_and_replaced_and_nothing_in_it_runs(kind, load, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = load()[0]["train"].digest
    (copy,) = copies(tmp_path)
    whole = copy.read_bytes()
    content = torch.load(copy, weights_only=True)
    if kind == "other content":
        torch.save({"state": content["state"], "series": {}}, copy)
    elif kind == "no series":
        torch.save(content | {"series": {"s00.csv": 5}}, copy)
    elif kind == "a flipped bit":
        place = whole.index(content["series"]["s03.csv"][0][1].numpy().tobytes()) + 807
        copy.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
    elif kind == "code":
        torch.save({"state": Evil(), "series": {}, "remarks": {}}, copy)
    else:
        copy.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"date,value\n" * 99}[kind])
    capsys.readouterr()
    parts, parsed = load()
    assert parsed and parts["train"].digest == before and "the files are read anew" in capsys.readouterr().err
    assert not (tmp_path / "it_ran").exists()
    assert load()[1] is False


def test_what_could_not_be_read_this_time_is_not_remembered(load, folder, tmp_path, monkeypatch):
    read = m.read_csv

    def fail(path):
        if path.name == "s03.csv":
            raise m.Unusable(f"unreadable: {OSError(5, 'Input/output error')}")  # as read_csv tells it
        return read(path)

    monkeypatch.setattr(m, "read_csv", fail)
    assert load()[1] and not copies(tmp_path)
    monkeypatch.setattr(m, "read_csv", read)
    (folder / "gone.csv").symlink_to(folder / "nothing.csv")
    assert load()[1] and not copies(tmp_path)
    (folder / "gone.csv").unlink()
    memory = ValueError("Error tokenizing data. C error: out of memory")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(m.UserError, match="out of memory"):
        patch.setattr(m.pd, "read_csv", lambda *_words, **_more: (_ for _ in ()).throw(memory))
        load()
    assert not copies(tmp_path)
    assert load()[1] and len(copies(tmp_path)) == 1


def test_little_is_not_kept_and_a_cache_that_cannot_be_written_is_no_obstacle(load, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(m, "KEPT_FROM", sum(path.stat().st_size for path in folder.iterdir()) + 1)
    assert load()[1] and not (tmp_path / "cache").exists()
    monkeypatch.setattr(m, "KEPT_FROM", 1)
    monkeypatch.setattr(m, "unwritable", lambda path: "no" if str(path).endswith("cache") else "")
    monkeypatch.setattr(m, "contradictions", lambda _args: [])
    assert load()[1] and load()[1] and not (tmp_path / "cache").exists()


def test_training_twice_gives_the_same_weights(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(m, "KEPT_FROM", 1)
    words = ["--data_dir", folder, "--label_cache", tmp_path / "cache", "--alpha", 0, "--num_epochs", 1]
    for name in ("one", "two"):
        assert m.main([*map(str, [*words, "--save_dir", tmp_path / name, "--max_windows", 20]), *SMALL.split()]) == 0
        monkeypatch.setattr(m, "read_series", None)  # not to be called again
    one, two = (m.open_student(tmp_path / name)[1]["weights"] for name in ("one", "two"))
    assert one == two
