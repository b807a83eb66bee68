"""The label cache: its hits and misses, interruption and damage, and where it can be carried."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    SCRIPT,
    SMALL,
    answering,
    data_config,
    hourly,
    label_task,
    make_job,
    quiet_voice,
    save_module,
    split_folder,
    teacher_request,
)

import moirai_distill as md

# Flags by which nothing depends on the script's defaults.
DATA = "--columns first --max_files 0 --split_by files --split_ratio 8:1:1 --split_seed 0"
DATA += " --max_gap 16 --season auto --stride 1 --max_windows 10"
TEACHER = "--teacher_patch_size 16 --teacher_point median --num_samples 5"
TEACHER += " --teacher_batch_size 8 --teacher_precision 32"
LENGTHS = "--context_length 64 --prediction_length 16 --device cpu --devices 1"
LABEL = f"label {LENGTHS} --lang en {DATA} {TEACHER} --quantiles on".split()
RUN = "--num_epochs 1 --alpha 0.5 --quantiles on"
TRAIN = f"train {SMALL} --devices 1 --lang en {DATA} {TEACHER} {RUN}".split()
WINDOWS, BLOCKS = 40, 5  # the four training files, 10 windows each; a block is 8 windows


class Lab:
    """A folder with data, teacher and cache, and the program run in it.

    It counts the windows that the teacher forecasts, and how often the teacher is loaded.
    """

    def __init__(self, root, data, teacher, monkeypatch):
        self.root = root
        self.data = data
        self.teacher = teacher
        self.cache = root / "cache"
        self.forecasts = []
        self.loads = 0
        answer = md.Teacher.answer
        load = md.load_teacher

        def counted_answer(teacher, context, asked):
            self.forecasts.append(len(context))
            return answer(teacher, context, asked)

        def counted_load(*arguments):
            self.loads += 1
            return load(*arguments)

        monkeypatch.setattr(md.Teacher, "answer", counted_answer)
        monkeypatch.setattr(md, "load_teacher", counted_load)
        monkeypatch.setattr(md, "draw", lambda *_: None)  # pictures take time

    def words(self, command, *more):
        """The command line `command` with the flags of this lab; of two equal flags the last."""
        places = ["--data_dir", self.data, "--teacher_model", self.teacher]
        places += ["--label_cache", self.cache]
        if command[0] == "train":
            places += ["--save_dir", self.root / "run"]
        return [str(word) for word in (*command, *places, *more)]

    def run(self, command, *more):
        """(exit code, windows that the teacher forecast) of `command`."""
        self.forecasts.clear()
        return md.main(self.words(command, *more)), sum(self.forecasts)

    def folders(self):
        return sorted(self.cache.iterdir()) if self.cache.is_dir() else []

    def folder(self):
        """The only label folder."""
        (folder,) = self.folders()
        return folder

    def bytes(self):
        return (self.folder() / "labels.bin").read_bytes()


@pytest.fixture
def lab(tmp_path, few_csvs, teacher_folder, monkeypatch):
    return Lab(tmp_path, few_csvs, teacher_folder, monkeypatch)


class Fork:
    """The program in a process of its own, which finds all modules of this one imported."""

    def __init__(self, words, folder, **environment):
        folder.mkdir()
        self.out = folder / "out"
        self.err = folder / "err"
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=self.run, args=(words, environment))
        self.process.start()

    def run(self, words, environment):
        os.environ.update(environment)
        with (
            open(self.out, "w") as out,
            open(self.err, "w") as err,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = md.main(words)
        sys.exit(code)

    def end(self):
        """(exit code, stdout, stderr) at its end; the code is None where it does not end."""
        self.process.join(timeout=100)
        return self.process.exitcode, self.out.read_text(), self.err.read_text()


@pytest.fixture
def start_fork(tmp_path):
    """Starts Forks, in folders that are named, of which none outlives the test."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    forks = []

    def start(words, name, **environment):
        forks.append(Fork(words, tmp_path / name, **environment))
        return forks[-1]

    yield start
    for fork in forks:
        fork.process.kill()
        fork.process.join()


def edit(csv, row, value):
    """Set one value of a CSV."""
    frame = pd.read_csv(csv)
    frame.loc[row, "value"] = value
    frame.to_csv(csv, index=False)


def files_of(data, part):
    """Paths of the CSVs that the split of the lab puts into a part."""
    names = [path.name for path in data.iterdir()]
    part_of = md.split_files(names, data_config(), {})
    return [data / name for name in names if part_of[name] == part]


def windows_of(data):
    """Training Windows of a folder of CSVs as the flags of the lab make them."""
    return split_folder(data, split_by="files", max_windows=10).windows["train"]


def all_labels(folder):
    """(labels (W, H), finite (W, 1)) in a folder."""
    file = md.LabelFile(folder, md.read_manifest(folder)).open()
    return file.batch(np.arange(file.windows))


# --- hits and misses ---


def test_second_runs_with_other_alpha_seed_and_student_make_no_teacher_call(lab, capsys):
    assert lab.run(TRAIN)[0] == 0
    assert lab.loads == 1 and sum(lab.forecasts) >= WINDOWS
    assert "cache hit" not in capsys.readouterr().out
    other_student = ["--d_model", 8, "--num_layers", 2, "--batch_size", 16]
    for change in (["--alpha", 0.9, "--seed", 7], other_student):
        assert lab.run(TRAIN, *change) == (0, 0)
        assert "Label cache hit, no teacher call" in capsys.readouterr().out
    assert lab.loads == 1


def test_a_teacher_worse_than_naive_is_warned_of_on_a_cache_hit_too(lab, capsys):
    """Random weights forecast nothing."""
    assert lab.run(LABEL)[0] == 0
    out, err = capsys.readouterr()
    assert "the teacher is worse than a naive forecast" in err
    made = re.search(r"MSE on \d+ windows of step h: (.*?), patch", out)[1]  # of the naive ones
    assert lab.run(LABEL) == (0, 0)
    out, err = capsys.readouterr()
    assert "WARNING: at step h the teacher is worse than a naive forecast" in err
    assert f"windows of step h: {made}, teacher " in out


def test_a_good_teacher_is_not_warned_of_on_a_cache_hit(lab, capsys, monkeypatch):
    assert lab.run(LABEL)[0] == 0
    capsys.readouterr()
    monkeypatch.setattr(md, "naive_errors", lambda *_: {"seasonal-naive": 1e9})
    assert lab.run(LABEL) == (0, 0)
    assert "worse than" not in capsys.readouterr().err


def test_labels_of_the_label_command_are_those_that_train_uses(lab, capsys):
    assert lab.run(LABEL)[0] == 0
    assert f"Labels of {WINDOWS} windows: {lab.folder()}" in capsys.readouterr().out
    assert lab.run(TRAIN) == (0, 0) and lab.loads == 1


def test_how_labels_are_made_does_not_change_the_key(lab):
    assert lab.run(LABEL)[0] == 0
    before = lab.bytes()
    elsewhere = shutil.copytree(lab.data, lab.root / "elsewhere")
    renamed = shutil.copytree(lab.teacher, lab.root / "renamed")
    changes = [
        ["--teacher_batch_size", 3],
        ["--device", "auto"],
        ["--max_files", 99],
        ["--data_dir", elsewhere],
        ["--teacher_model", renamed],
        ["--lang", "zh"],
    ]
    for change in changes:
        assert lab.run(LABEL, *change) == (0, 0), change
    assert lab.bytes() == before and lab.loads == 1


def test_values_that_label_no_window_do_not_change_the_key(lab):
    assert lab.run(LABEL)[0] == 0
    for path in files_of(lab.data, "test") + files_of(lab.data, "validation"):
        edit(path, 150, 99.0)
    assert lab.run(LABEL) == (0, 0)


MISSES = {
    "horizon": ["--prediction_length", 15],
    "context": ["--context_length", 63],
    "patch size": ["--teacher_patch_size", 32],
    "automatic patch size": ["--teacher_patch_size", "auto"],
    "point": ["--teacher_point", "mean"],
    "samples": ["--num_samples", 6],
    "windows": ["--max_windows", 5],
    "stride": ["--stride", 2],
    "split": ["--split_seed", 1],
}


@pytest.mark.parametrize("case", MISSES)
def test_another_request_misses_the_cache(lab, case):
    assert lab.run(LABEL)[0] == 0
    code, calls = lab.run(LABEL, *MISSES[case])
    assert code == 0 and calls >= WINDOWS and len(lab.folders()) == 2 and lab.loads == 2


def test_samples_do_not_matter_to_the_mean(lab):
    assert lab.run(LABEL, "--teacher_point", "mean")[0] == 0
    assert lab.run(LABEL, "--teacher_point", "mean", "--num_samples", 7) == (0, 0)


def with_point(folder, point):
    """Rename a label folder as if its labels were of another point; returns the folder."""
    manifest = md.read_manifest(folder)
    manifest["key"]["point"] = point
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder.rename(md.key_folder(folder.parent, manifest["key"]))


@pytest.mark.parametrize(
    ("point", "samples", "is_hit"),
    [("median", 6, False), ("median", 5, True), ("mean", 6, True), ("mean", 5, True)],
)
def test_labels_of_earlier_versions_are_used_unless_they_are_the_lower_of_two_middle_samples(
    lab, point, samples, is_hit
):
    """In their key the point was as typed, whatever the number of samples."""
    flags = ["--teacher_point", point, "--num_samples", samples]
    assert lab.run(LABEL, *flags)[0] == 0
    with_point(lab.folder(), point)
    code, calls = lab.run(LABEL, *flags)
    assert code == 0
    assert (calls == 0) == is_hit
    assert len(lab.folders()) == (1 if is_hit else 2)
    assert lab.run(LABEL, *flags) == (0, 0)


def test_a_run_on_labels_of_an_older_median_is_not_resumed(lab, capsys):
    flags = ["--num_samples", 6]
    assert lab.run(TRAIN, *flags)[0] == 0
    last = lab.root / "run" / "last.pt"
    content = torch.load(last, weights_only=True)
    content["teacher"]["key"]["point"] = "median"
    torch.save(content, last)
    capsys.readouterr()
    assert lab.run(TRAIN, *flags, "--resume") == (2, 0)
    assert "its labels are of an earlier version" in capsys.readouterr().err


@pytest.mark.parametrize("change", [1e-6, np.nan])
def test_one_changed_value_in_a_training_file_misses_the_cache(lab, change):
    assert lab.run(LABEL)[0] == 0
    path = files_of(lab.data, "train")[3]
    edit(path, 100, pd.read_csv(path).value[100] + change)
    code, calls = lab.run(LABEL)
    assert code == 0 and calls >= WINDOWS and len(lab.folders()) == 2


def test_one_changed_weight_of_the_teacher_misses_the_cache(lab):
    assert lab.run(LABEL)[0] == 0
    lab.teacher = shutil.copytree(lab.teacher, lab.root / "tiny")
    path = lab.teacher / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, calls = lab.run(LABEL)
    assert code == 0 and calls >= WINDOWS and len(lab.folders()) == 2


# --- what is said ---


def test_error_and_estimate_are_said_before_the_first_block(lab, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(md.LabelFile, "write", full)
    assert lab.run(LABEL, "--teacher_patch_size", "auto")[0] == 2
    out, err = capsys.readouterr()
    judged = min(WINDOWS, md.JUDGED_WINDOWS)
    assert f"MSE on {judged} windows of step h: seasonal-naive " in out
    assert ", last value " in out and ", patch 8 " in out
    order = ["MSE on", "Patch size: h: ", "Labelling 40 windows, 0.0 MB, about 0.0 min"]
    places = [out.index(text) for text in order]
    assert places == sorted(places)
    assert err.splitlines()[-1] == "error: input or output: No space left on device"


@pytest.mark.parametrize(("processes", "minutes"), [(1, 40), (2, 20), (5, 8), (9, 8)])
def test_the_estimate_is_shared_by_the_processes_that_get_a_block(
    lab, monkeypatch, capsys, processes, minutes
):
    """40 windows of a minute each in 5 blocks."""
    monkeypatch.setattr(md, "choose_patch_sizes", lambda *_: ({"h": 16}, 60.0))
    task = label_task(windows_of(lab.data), teacher_request(lab.teacher, lab.cache))
    job = md.Job(SimpleNamespace(world_size=processes), md.Voice("en"), md.Stop())
    md.begin_labels(lab.cache / "new", task, task.load(), "the weights", job)
    assert f"Labelling 40 windows, 0.0 MB, about {minutes:.1f} min" in capsys.readouterr().out


def test_manifest_says_what_the_labels_are_and_how_they_were_made(lab):
    assert lab.run(LABEL)[0] == 0
    manifest = json.loads((lab.folder() / "manifest.json").read_text())
    expected = {
        "block": 8,
        "teacher": str(lab.teacher),
        "torch": str(torch.__version__),
        "patch_sizes": {"h": 16},
        "device": "cpu",
        "precision": "32",
        "commit": None,
        "revision": md.build_parser(demo=False).parse_args(["label"]).teacher_revision,
    }
    assert {name: manifest[name] for name in expected} == expected
    assert manifest["licence"].startswith("see ") and manifest["made"].startswith("20")
    assert manifest["key"] == {
        "format": md.FORMAT,
        "data": windows_of(lab.data).digest,
        "windows": WINDOWS,
        "context": 64,
        "horizon": 16,
        "patch": 16,
        "point": "median",
        "samples": 5,
        "weights": md.fingerprint(str(lab.teacher), None),
    }
    assert tuple(manifest["key"]) == md.LABEL_KEY


def test_list_shows_what_the_cache_holds(lab, capsys):
    assert lab.run(LABEL)[0] == 0
    (lab.cache / "broken").mkdir()
    (lab.cache / "broken" / "manifest.json").write_text("{")
    capsys.readouterr()
    assert md.main(["label", "--list", "--lang", "en", "--label_cache", str(lab.cache)]) == 0
    lines = capsys.readouterr().out.splitlines()
    good, broken = sorted(lines, key=lambda line: "broken" in line)
    assert good.partition(": ")[0] in os.listdir(lab.cache)
    assert broken.startswith("broken: ") and "damaged" in broken
    facts = [str(lab.teacher), "40 windows", "64 -> 16", "median"]
    facts += ["{'h': 16}", "0.0 MB", "100 % made"]
    assert [fact for fact in facts if fact not in good] == []


def repeat(context, period, horizon):
    """The last `period` points of contexts (B, L), repeated."""
    times = -(-horizon // period)
    return context[:, -period:].repeat(1, times)[:, :horizon].float()


@pytest.mark.parametrize("good", [True, False])
def test_a_teacher_worse_than_naive_is_a_loud_warning(lab, monkeypatch, capsys, good):
    def daily(_teacher, context, horizon, *_):
        return repeat(context, 24, horizon)

    if good:
        monkeypatch.setattr(md.Teacher, "answer", answering(daily))
    assert lab.run(LABEL)[0] == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    if good:
        assert warnings == []
    else:
        (warning,) = warnings
        assert "the teacher is worse than a naive forecast" in warning and "step h" in warning


def add_daily_files(data):
    """Write four CSVs of a daily step and a weekly cycle."""
    for number in range(4):
        dates = pd.date_range("2020-01-01", periods=300, freq="D")
        week = np.random.default_rng(number).standard_normal(7)
        frame = pd.DataFrame({"date": dates, "value": np.tile(week, 43)[:300]})
        frame.to_csv(data / f"daily{number}.csv", index=False)


def knows_the_week_with_8_and_the_day_with_32(_teacher, context, horizon, patch, *_):
    """A forecast that only one patch size makes well at each frequency."""
    return repeat(context, {8: 7, 32: 24}.get(patch, 5), horizon)


def test_auto_takes_the_best_patch_size_of_each_frequency(lab, monkeypatch):
    add_daily_files(lab.data)
    monkeypatch.setattr(md.Teacher, "answer", answering(knows_the_week_with_8_and_the_day_with_32))
    assert lab.run(LABEL, "--teacher_patch_size", "auto")[0] == 0
    assert md.read_manifest(lab.folder())["patch_sizes"] == {"D": 8, "h": 32}

    windows = windows_of(lab.data)
    index = np.arange(len(windows))
    context, _, _ = windows.batch(index)
    labels, _ = all_labels(lab.folder())
    is_hourly = torch.from_numpy(windows.freq_of(index) == "h")
    assert torch.equal(labels[is_hourly], repeat(context[is_hourly], 24, 16))
    assert torch.equal(labels[~is_hourly], repeat(context[~is_hourly], 7, 16))
    assert 0 < is_hourly.sum() < len(index)


def test_patch_sizes_that_are_known_are_taken_and_others_chosen(lab, monkeypatch):
    """Those of a student's own labels, where evaluate finds one more frequency."""
    add_daily_files(lab.data)
    monkeypatch.setattr(md.Teacher, "answer", answering(knows_the_week_with_8_and_the_day_with_32))
    known = teacher_request(lab.teacher, lab.cache, teacher_patch_size={"h": 16, "MS": 64})
    task = label_task(windows_of(lab.data), known)
    sizes, _seconds = md.choose_patch_sizes(task.load(), task, quiet_voice())
    assert sizes == {"D": 8, "h": 16}


def test_a_patch_size_whose_error_is_not_finite_is_not_chosen():
    assert md.best_size({8: np.nan, 16: 0.5, 32: 0.4, 64: -np.inf}) == 32
    assert md.best_size({8: np.nan, 16: np.inf}) == 8  # there is none better


# --- values ---


def test_label_of_a_constant_window_is_its_constant(lab):
    for number in range(3):
        frame = hourly(300, seed=number)
        frame.loc[:150, "value"] = 7.0 + number
        frame.to_csv(lab.data / f"s{number:02d}.csv", index=False)
    assert lab.run(LABEL)[0] == 0
    context, truth, _ = windows_of(lab.data).batch(np.arange(WINDOWS))
    is_constant = (context == context[:, :1]).all(1)
    labels, _ = all_labels(lab.folder())
    assert is_constant.sum() >= 1
    constants = context[is_constant][:, :1].expand_as(labels[is_constant])
    assert torch.equal(labels[is_constant], constants)
    assert not torch.isclose(labels[~is_constant], truth[~is_constant]).all(1).any()


def break_labels(monkeypatch, rows, value):
    """From now on the teacher's forecast is `value` at one step of these rows of each block."""
    original = md.Teacher.answer

    def broken(*arguments):
        answer = original(*arguments)
        points = answer.points.clone()
        points[rows, 3] = value
        return dataclasses.replace(answer, points=points)

    monkeypatch.setattr(md.Teacher, "answer", broken)


def best_weights(lab):
    """The student's weights of the lab's run."""
    (best,) = (lab.root / "run").glob("best_model_epoch_*.pt")
    return md.read_checkpoint(best)["model_state_dict"]


def test_windows_without_a_finite_label_train_on_truth_alone(lab, monkeypatch, capsys):
    assert lab.run(TRAIN, "--alpha", 0)[0] == 0
    truth_alone = best_weights(lab)
    assert lab.run(TRAIN, "--alpha", 1)[0] == 0
    assert not torch.equal(best_weights(lab)["head.weight"], truth_alone["head.weight"])

    break_labels(monkeypatch, slice(None), np.inf)
    assert lab.run(TRAIN, "--alpha", 1, "--teacher_patch_size", 32)[0] == 0
    expected = "40 windows have a non-finite label; where they train, they train on truth alone"
    assert expected in capsys.readouterr().err
    weights = best_weights(lab)
    assert len(weights) > 5 and weights.keys() == truth_alone.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, truth_alone[name]), name


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_only_the_windows_that_are_not_finite_are_counted_and_lose_their_label(
    lab, monkeypatch, capsys, value
):
    break_labels(monkeypatch, 5, value)
    assert lab.run(LABEL)[0] == 0
    assert "note: 5 windows have a non-finite label" in capsys.readouterr().err
    labels, finite = all_labels(lab.folder())
    assert torch.equal(finite[:, 0], (torch.arange(WINDOWS) % 8 != 5).float())
    assert labels.isfinite().all() and labels[finite[:, 0] == 1].std() > 0.1


# --- the same bytes ---


@pytest.fixture(scope="module")
def made_once():
    return []


@pytest.fixture
def whole(lab, made_once):
    """Bytes of labels that were made in one go, in another cache than the lab's."""
    if not made_once:
        assert lab.run(LABEL, "--label_cache", lab.root / "once")[0] == 0
        made_once.append(next((lab.root / "once").glob("*/labels.bin")).read_bytes())
    assert len(made_once[0]) == 4 * 16 * WINDOWS + 32 * BLOCKS
    assert len(np.unique(np.frombuffer(made_once[0][: 4 * 16 * WINDOWS], "<f4"))) > 500
    return made_once[0]


def interrupt_after(lab, blocks, monkeypatch, signum):
    """Exit code of a labelling that a signal meets while block number `blocks` is being made."""
    write = md.LabelFile.write

    def watched(file, number, labels):
        write(file, number, labels)
        if number == blocks - 1:
            os.kill(os.getpid(), signum)

    with monkeypatch.context() as patch:
        patch.setattr(md.LabelFile, "write", watched)
        return lab.run(LABEL)[0]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_labelling_goes_on_to_the_same_bytes(
    lab, whole, monkeypatch, capsys, signum, code
):
    assert interrupt_after(lab, 2, monkeypatch, signum) == code
    assert "the labels made so far are kept in" in capsys.readouterr().err
    blocks = sorted(path.name for path in (lab.folder() / "blocks").iterdir())
    assert blocks == ["00000000.bin", "00000001.bin"]
    assert not (lab.folder() / "labels.bin").exists()
    # The block size that it was begun with stays.
    assert lab.run(LABEL, "--teacher_batch_size", 5) == (0, WINDOWS - 16)
    err = capsys.readouterr().err
    assert "going on with" in err and "unfinished" in err
    assert lab.bytes() == whole
    assert lab.run(LABEL) == (0, 0)


def test_sigterm_to_a_process_that_labels_keeps_its_blocks(lab, whole, start_fork, monkeypatch):
    answer = md.Teacher.answer

    def slow(teacher, context, asked):
        time.sleep(0.3 if len(context) == 8 else 0)
        return answer(teacher, context, asked)

    with monkeypatch.context() as patch:
        patch.setattr(md.Teacher, "answer", slow)
        fork = start_fork(lab.words(LABEL), "fork")
    limit = time.monotonic() + 60
    while not list(lab.cache.glob("*/blocks/00000001.bin")):
        assert fork.process.is_alive() and time.monotonic() < limit
        time.sleep(0.02)
    fork.process.terminate()  # by SIGTERM
    code, _out, err = fork.end()
    assert code == 143 and "stopped by SIGTERM" in err and "Traceback" not in err
    made = len(list(lab.folder().glob("blocks/*.bin")))
    assert 2 <= made < BLOCKS
    assert lab.run(LABEL) == (0, WINDOWS - 8 * made)
    assert lab.bytes() == whole


def test_two_processes_make_the_bytes_of_one(lab, whole, start_fork):
    """They are told of each other as torchrun tells them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])  # which is free
    words = lab.words(LABEL, "--devices", 2)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    first = start_fork(words, "first", RANK="0", LOCAL_RANK="0", **place)
    second = start_fork(words, "second", RANK="1", LOCAL_RANK="1", **place)
    code, out, err = first.end()
    assert code == 0, err
    assert out.count("Labelling 40 windows") == 1 and out.count("Labels of 40 windows") == 1
    assert "Label cache hit" not in out
    code, out, err = second.end()
    assert code == 0 and out == "", err
    assert lab.bytes() == whole and not (lab.folder() / "blocks").exists()


def test_another_run_that_finishes_the_same_labels_meanwhile_does_no_harm(lab, whole, monkeypatch):
    write = md.LabelFile.write
    inner = []

    def watched(file, number, labels):
        if number == 2 and not inner:
            inner.append("begun")
            inner.append(md.main(lab.words(LABEL, "--teacher_batch_size", 3)))
        write(file, number, labels)

    monkeypatch.setattr(md.LabelFile, "write", watched)
    assert lab.run(LABEL)[0] == 0 and inner == ["begun", 0]
    assert lab.bytes() == whole
    names = sorted(path.name for path in lab.folder().iterdir())
    assert names == ["labels.bin", "manifest.json", "quantiles.bin"]


def test_of_two_runs_that_begin_at_once_the_first_decides(lab, monkeypatch):
    choose = md.choose_patch_sizes
    inner = []

    def overtaken(*arguments):
        if not inner:
            inner.append("begun")
            inner.append(md.main(lab.words(LABEL, "--teacher_batch_size", 5)))
        return choose(*arguments)

    monkeypatch.setattr(md, "choose_patch_sizes", overtaken)
    assert lab.run(LABEL)[0] == 0 and inner == ["begun", 0]
    assert md.read_manifest(lab.folder())["block"] == 5
    assert lab.run(LABEL) == (0, 0)


# --- damage ---


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x40
    path.write_bytes(content)


def cut(path, size):
    os.truncate(path, size)


SIZE = 4 * 16 * 8  # bytes of a block


def flip_two(path):
    flip(path, SIZE)
    flip(path, 5 * SIZE - 1)


# case -> (damage to labels.bin, windows that have to be labelled again).
JOINED = {
    "flipped first byte": (lambda path: flip(path, 0), 8),
    "flipped in block 3": (lambda path: flip(path, 3 * SIZE + 17), 8),
    "flipped in two blocks": (flip_two, 16),
    "flipped checksum": (lambda path: flip(path, BLOCKS * SIZE + 32), 8),
    "last byte lost": (lambda path: cut(path, BLOCKS * SIZE + 32 * BLOCKS - 1), 8),
    "half lost": (lambda path: cut(path, BLOCKS * SIZE // 2), WINDOWS),
    "empty": (lambda path: cut(path, 0), WINDOWS),
    "gone": (lambda path: path.unlink(), WINDOWS),
}


@pytest.mark.parametrize("case", JOINED)
def test_damaged_labels_are_detected_and_only_these_are_redone(lab, whole, case):
    damage, redone = JOINED[case]
    assert lab.run(LABEL)[0] == 0
    damage(lab.folder() / "labels.bin")
    assert lab.run(LABEL) == (0, redone)
    assert lab.bytes() == whole


@pytest.mark.parametrize(
    "damage", [lambda path: flip(path, 9), lambda path: cut(path, SIZE), lambda path: cut(path, 7)]
)
def test_a_damaged_block_of_unfinished_labels_is_redone(lab, whole, monkeypatch, damage):
    assert interrupt_after(lab, 3, monkeypatch, signal.SIGTERM) == 143
    damage(lab.folder() / "blocks" / "00000001.bin")
    assert lab.run(LABEL) == (0, WINDOWS - 16)
    assert lab.bytes() == whole


def change_manifest(**changes):
    """A damage: some values of the manifest changed."""

    def damage(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def change_key(**changes):
    """A damage: some values of the manifest's key changed."""

    def damage(path):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(manifest | {"key": manifest["key"] | changes}))

    return damage


MANIFESTS = {
    "no JSON": lambda path: path.write_text("{" + path.read_text()[:40]),
    "empty": lambda path: path.write_bytes(b""),
    "a list": lambda path: path.write_text("[]"),
    "gone": lambda path: path.unlink(),
    "another key": change_manifest(key={}),
    "fewer windows": change_key(windows=WINDOWS // 2),
    "more windows": change_key(windows=2 * WINDOWS),
    "another horizon": change_key(horizon=8),
    "other weights": change_key(weights="0" * 64),
    "another block": change_manifest(block=16),
    "no patch sizes": change_manifest(patch_sizes={}, block=16),
    "newer format": change_manifest(format=99),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_wrong_manifest_never_gives_wrong_labels(lab, case):
    mean = ["--teacher_point", "mean"]  # no matter how windows are grouped into blocks
    assert lab.run(LABEL, *mean)[0] == 0
    expected, _ = all_labels(lab.folder())
    MANIFESTS[case](lab.folder() / "manifest.json")
    assert lab.run(LABEL, *mean)[0] == 0
    labels, _ = all_labels(lab.folder())
    assert torch.allclose(labels, expected, rtol=1e-4, atol=1e-5)
    assert lab.run(LABEL, *mean) == (0, 0)


# --- carried to another machine ---

# A process in which neither uni2ts nor what it takes can be imported runs some command lines.
BARE = """
import json, sys
class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("uni2ts", "gluonts", "jax", "jaxlib", "jaxtyping", "hydra"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import moirai_distill
moirai_distill.draw = lambda *_: None
print([moirai_distill.main(words) for words in json.loads(sys.argv[1])])
"""


def run_bare(*commands):
    """(stdout, stderr) of a child process of BARE."""
    places = os.pathsep.join([str(SCRIPT.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", BARE, json.dumps(commands)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": places},
    )
    return done.stdout, done.stderr


def carried(lab, seed=0):
    """Label with a teacher of its own folder, then take the folder away; returns its path."""
    teacher = save_module(lab.root / f"models{seed}" / "mine", seed=seed)
    assert lab.run(LABEL, "--teacher_model", teacher)[0] == 0
    shutil.rmtree(teacher.parent)
    return teacher


def test_a_carried_cache_trains_without_uni2ts_and_weights(lab):
    carried(lab)
    lab.cache = lab.cache.rename(lab.root / "carried")
    train = lab.words(TRAIN, "--teacher_model", "owner/mine", "--alpha", 1)
    out, err = run_bare(train, lab.words(LABEL, "--num_samples", 9))
    assert out.splitlines()[-1] == "[0, 2]" and "Traceback" not in err, err
    assert "Label cache hit, no teacher call" in out and len(best_weights(lab)) > 5
    last = err.splitlines()[-1]  # of the second command, which would have to label
    assert last.startswith("error: uni2ts cannot be imported")
    assert "pip install -r requirements.txt" in last


def test_the_same_command_goes_on_working_when_the_weights_folder_is_gone(lab, capsys):
    teacher = carried(lab)
    assert lab.run(TRAIN, "--teacher_model", teacher) == (0, 0), capsys.readouterr().err
    assert "Label cache hit, no teacher call" in capsys.readouterr().out


def test_labels_of_two_teachers_of_one_name_are_refused(lab, capsys):
    carried(lab, seed=1)
    carried(lab, seed=2)
    assert len(lab.folders()) == 2
    assert lab.run(LABEL, "--teacher_model", "owner/mine") == (2, 0)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "holds labels of several teachers named owner/mine" in last


def test_carried_labels_are_not_those_of_another_name_or_revision(lab, capsys):
    teacher = carried(lab)
    for change in (["--teacher_model", teacher.with_name("other")], ["--teacher_revision", "v2"]):
        assert lab.run(LABEL, "--teacher_model", teacher, *change) == (2, 0)
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_unfinished_labels_are_no_hit_where_the_weights_are_gone(lab, monkeypatch, capsys):
    teacher = save_module(lab.root / "models" / "mine")
    lab.teacher = teacher
    assert interrupt_after(lab, 2, monkeypatch, signal.SIGTERM) == 143
    shutil.rmtree(teacher)
    assert lab.run(LABEL) == (2, 0)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and str(teacher) in last


# --- get_labels itself ---


def test_get_labels_stops_between_blocks_where_the_stop_object_says_so(lab):
    windows = windows_of(lab.data)
    job = make_job()

    def ask(cache):
        request = teacher_request(lab.teacher, lab.root / cache)
        return md.get_labels(label_task(windows, request), job)

    job.stop.signum = signal.SIGTERM
    for _ in range(BLOCKS):  # one block for each attempt
        with pytest.raises(md.Interrupted):
            ask("slow")
    job.stop.signum = 0
    labels = ask("slow")
    assert lab.loads == BLOCKS and labels.array.shape == (WINDOWS, 16)
    assert np.array_equal(ask("other").array, labels.array)


def test_labels_do_not_depend_on_the_state_of_the_generator(lab):
    torch.manual_seed(123)
    assert lab.run(LABEL)[0] == 0
    first = lab.bytes()
    shutil.rmtree(lab.cache)
    torch.manual_seed(456)
    assert lab.run(LABEL)[0] == 0 and lab.bytes() == first


def test_the_cache_may_lie_below_the_home_directory(lab, monkeypatch):
    monkeypatch.setenv("HOME", str(lab.root / "home"))
    lab.cache = "~/cache"
    assert lab.run(LABEL)[0] == 0
    assert len(list(Path(lab.root, "home", "cache").glob("*/labels.bin"))) == 1


def test_a_block_that_another_run_has_cleared_is_looked_for_again(lab, whole, monkeypatch):
    """The other one joins all blocks and clears them while this one writes its last."""
    replace, inner = os.replace, []

    def overtaken(source, target):
        if not inner and str(target).endswith("00000004.bin"):
            inner.append("begun")
            inner.append(md.main(lab.words(LABEL)))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    assert lab.run(LABEL)[0] == 0 and inner == ["begun", 0]
    assert lab.bytes() == whole


def test_a_block_that_cannot_be_written_and_is_nowhere_is_an_error(lab, monkeypatch, capsys):
    def refuse(_source, _target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    assert lab.run(LABEL)[0] == 2
    assert "No space left" in capsys.readouterr().err


def test_a_manifest_of_a_billion_blocks_is_listed_at_once(lab, capsys):
    assert lab.run(LABEL)[0] == 0
    folder = lab.folder()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["key"]["windows"] = 10**9
    manifest["block"] = 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    folder.rename(md.key_folder(lab.cache, manifest["key"]))
    capsys.readouterr()
    began = time.monotonic()
    assert md.main(["label", "--list", "--label_cache", str(lab.cache), "--lang", "en"]) == 0
    assert time.monotonic() - began < 5
    assert "1,000,000,000 windows" in capsys.readouterr().out


def test_a_hole_as_long_as_the_labels_of_a_manifest_is_listed_unread(lab, capsys, monkeypatch):
    assert lab.run(LABEL)[0] == 0
    folder = lab.folder()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["key"]["windows"] = 10**9
    manifest["block"] = 1
    manifest["quantiles"] = None
    (folder / "manifest.json").write_text(json.dumps(manifest))
    folder = folder.rename(md.key_folder(lab.cache, manifest["key"]))
    with open(folder / "labels.bin", "wb") as file:
        file.truncate(10**9 * (4 * manifest["key"]["horizon"] + 32))
    capsys.readouterr()
    monkeypatch.setattr(md.BlockFile, "read", None)
    began = time.monotonic()
    assert md.main(["label", "--list", "--label_cache", str(lab.cache), "--lang", "en"]) == 0
    assert time.monotonic() - began < 5
    assert "100 % made" in capsys.readouterr().out


@pytest.mark.parametrize("blocks", [1, 3])
def test_list_tells_what_share_of_unfinished_labels_is_made(lab, capsys, blocks):
    assert lab.run(LABEL)[0] == 0
    file = md.LabelFile(lab.folder(), md.read_manifest(lab.folder()), with_quantiles=True)
    for part in file.parts:
        contents = [part.read(number) for number in range(blocks)]
        part.path.unlink()
        for number, content in enumerate(contents):
            part.write(number, np.frombuffer(content, part.kind))
    (lab.folder() / "blocks" / "mine.txt").write_text("no block")
    capsys.readouterr()
    assert md.main(["label", "--list", "--label_cache", str(lab.cache), "--lang", "en"]) == 0
    assert f" {100 * blocks / file.points.count:.0f} % made" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe", "linked folder"])
def test_a_manifest_that_is_no_file_of_ours_is_replaced_or_one_line(lab, tmp_path, capsys, kind):
    assert lab.run(LABEL)[0] == 0
    folder = lab.folder()
    manifest = folder / "manifest.json"
    victim = tmp_path / "victim"
    victim.write_text("mine")
    manifest.unlink()
    if kind == "folder":
        manifest.mkdir()
    elif kind == "pipe":
        os.mkfifo(manifest)
    elif kind == "linked folder":
        manifest.write_text("damaged")
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        manifest.symlink_to(victim if kind == "link" else tmp_path / "nowhere")
    capsys.readouterr()
    code, _ = lab.run(LABEL)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if kind == "linked folder":  # it is somebody else's, and stays as it is
        assert code == 2
        assert f"{folder}: its manifest cannot be used" in error
        assert (tmp_path / "elsewhere" / "manifest.json").read_text() == "damaged"
    else:
        assert code == 0
        assert md.read_manifest(folder) is not None
        assert not manifest.is_symlink()
    assert victim.read_text() == "mine"


def test_a_log_is_told_now_and_then_how_far_labelling_is(lab, monkeypatch, capsys):
    monkeypatch.setattr(md, "NEWS_EVERY", 0)
    assert lab.run(LABEL)[0] == 0
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "labelled" in line]
    assert len(lines) > 1  # at the end there is no need for one
    assert re.fullmatch(rf"note: labelled [\d,]+ of {WINDOWS} windows, about 0 min to go", lines[0])
    assert f"labelled {WINDOWS} of" not in error


def test_a_labelling_of_seconds_tells_a_log_nothing(lab, capsys):
    assert lab.run(LABEL)[0] == 0
    assert "labelled" not in capsys.readouterr().err
