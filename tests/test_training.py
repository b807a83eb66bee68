"""The loop: a stopped run goes on as if nothing had happened, the best is kept, logs are true."""

import collections
import contextlib
import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SCRIPT, SMALL, answering, hourly, quiet_voice, save_module, split_folder

import moirai_distill as md

# Every flag that the numbers depend on, so that the script's defaults may be edited. The season is
# not that of the series: with 24 a student knows so much at first that no epoch adds to it.
FIXED = f"""
{SMALL} --dropout 0.1
--max_files 100 --columns first --split_by time --split_ratio 8:1:1 --split_seed 0
--max_gap 16 --season 23 --stride 1 --max_windows 16
--teacher_patch_size 16 --teacher_point mean --num_samples 5
--teacher_batch_size 8 --teacher_precision 32 --quantiles off
--alpha 0 --batch_size 8 --num_epochs 3 --learning_rate 1e-3 --weight_decay 1e-5
--max_grad_norm 1 --augment on --patience 0 --precision 32-true --seed 0
--devices 1 --num_nodes 1 --lang en
""".split()
WINDOWS = 48  # for training: 3 files, 16 windows of each
STEPS = 6  # of an epoch: batches of 8
RUN_FILES = {
    "last.pt",
    "metrics.jsonl",
    "tensorboard",
    "training.png",
    "forecast.png",
    "error_by_horizon.png",
    "evaluation.json",
}


def write_csvs(folder):
    """3 hourly CSVs of 200 rows with missing values, split by time at rows 160 and 180."""
    folder.mkdir()
    for number in range(3):
        frame = hourly(200, seed=number)
        frame.loc[[20 + number, 90, 91, 165, 190], "value"] = np.nan
        frame.to_csv(folder / f"s{number}.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_csvs(tmp_path_factory.mktemp("training") / "data")


def command(data, save_dir, *more):
    words = ["train", "--data_dir", data, "--save_dir", save_dir, *FIXED, *more]
    return [str(word) for word in words]


def run(data, save_dir, *more):
    return md.main(command(data, save_dir, *more))


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """Folder of an uninterrupted run; what it printed is in its parent's stdout.txt."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run(data, folder) == 0
    Path(folder.parent, "stdout.txt").write_text(printed.getvalue())
    return folder


@pytest.fixture(scope="module")
def teaching(teacher_folder, tmp_path_factory):
    """Flags of a teacher that labels quickly."""
    cache = tmp_path_factory.mktemp("labels")
    return ["--teacher_model", teacher_folder, "--label_cache", cache]


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """An empty file stands for each picture: they take most of the time of a run this small.

    Those of `plain`, which is made before, are real.
    """
    monkeypatch.setattr(md, "draw", lambda path, _panels: Path(path).write_bytes(b""))


def load(folder, name="last.pt"):
    return torch.load(Path(folder, name), weights_only=True)


def best(folder):
    """The only best checkpoint of a run."""
    (path,) = Path(folder).glob("best_model_epoch_*.pt")
    return load(folder, path.name)


def history(folder):
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def flat(state):
    """All weights of a state dict in one vector."""
    return torch.cat([weight.flatten() for weight in state.values()])


def weights(folder):
    """All weights of a run's best checkpoint in one vector."""
    return flat(best(folder)["model_state_dict"])


def files_of(folder):
    """relative path -> content of all files below a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def differences(a, b, where=""):
    """Places where two nests of plain values and tensors differ by as little as a bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        pairs = [(key, a[key], b[key]) for key in a]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = [(i, a[i], b[i]) for i in range(len(a))]
    elif isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    else:
        return [] if a == b else [where]
    found = []
    for key, one, other in pairs:
        found += differences(one, other, f"{where}/{key}")
    return found


def assert_same_run(folder, reference):
    """Weights, optimizer, scheduler, loop, metrics and best are equal to the bit."""
    parts = (
        "model_state_dict",
        "training_state_dict",
        "optimizer_state_dict",
        "scheduler_state_dict",
        "loop",
        "epoch",
        "data",
    )
    for read in (load, best):
        mine = read(folder)
        other = read(reference)
        for part in parts:
            assert differences(mine[part], other[part], part) == []
    own_metrics = Path(folder, "metrics.jsonl").read_bytes()
    assert own_metrics == Path(reference, "metrics.jsonl").read_bytes()
    assert set(os.listdir(folder)) == set(os.listdir(reference))


def each_call(monkeypatch, name, act):
    """Wrap the script's function `name`.

    `act(number of the call from 1, result)` replaces its result, unless it gives None.
    """
    real = getattr(md, name)
    numbers = itertools.count(1)

    def wrapped(*args, **settings):
        result = real(*args, **settings)
        other = act(next(numbers), result)
        return result if other is None else other

    monkeypatch.setattr(md, name, wrapped)


def signal_at(monkeypatch, name, call, signum):
    """Send this process `signum` when the function `name` is called the `call`-th time."""

    def act(number, _result):
        if number == call:
            os.kill(os.getpid(), signum)

    each_call(monkeypatch, name, act)


def script_validation(monkeypatch, losses):
    """Make `losses` the validation losses of the epochs.

    What is scored before (the naive forecast) and after them (the test set) stays as it is.
    """
    given = dict(enumerate(losses, 2))

    def act(number, scores):
        if number in given:
            return dataclasses.replace(scores, mse=given[number])
        return None

    each_call(monkeypatch, "score", act)


def record_truths(monkeypatch):
    """A list that grows by the truth (B, H) of each training step from now on."""
    real = md.distillation_loss
    truths = []

    def recording(forecast, truth, *more):
        truths.append(truth)
        return real(forecast, truth, *more)

    monkeypatch.setattr(md, "distillation_loss", recording)
    return truths


# Stopping and going on


@pytest.mark.parametrize(
    ("function", "call", "signum", "code", "epoch", "step"),
    [
        ("distillation_loss", 1, signal.SIGTERM, 143, 0, 1),
        # The last step of an epoch, not yet validated.
        ("distillation_loss", STEPS, signal.SIGTERM, 143, 0, STEPS),
        ("distillation_loss", STEPS + 3, signal.SIGINT, 130, 1, 3),
        # During the validation of epoch 2.
        ("score", 3, signal.SIGTERM, 143, 2, 0),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(
    data, plain, tmp_path, monkeypatch, capsys, function, call, signum, code, epoch, step
):
    with monkeypatch.context() as patch:
        signal_at(patch, function, call, signum)
        assert run(data, tmp_path) == code
    loop = load(tmp_path)["loop"]
    assert (loop["epoch"], loop["step"]) == (epoch, step)
    assert "the same command with --resume goes on from here" in capsys.readouterr().err
    assert run(data, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, plain)


def test_a_run_stopped_twice_with_a_teacher_and_dropout_goes_on_as_if_it_had_never_stopped(
    data, tmp_path, monkeypatch, teaching
):
    flags = ["--alpha", 0.5, "--dropout", 0.3, "--num_epochs", 2, *teaching]
    assert run(data, tmp_path / "whole", *flags) == 0
    for call, resume in ((4, []), (5, ["--resume"])):
        with monkeypatch.context() as patch:
            signal_at(patch, "distillation_loss", call, signal.SIGTERM)
            assert run(data, tmp_path / "stopped", *flags, *resume) == 143
    assert load(tmp_path / "stopped")["loop"]["step"] == 3
    assert run(data, tmp_path / "stopped", *flags, "--resume") == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def run_slowly(words, steps_file):
    """Run the script in this process, with a byte in a file for each step that has begun."""
    real = md.distillation_loss

    def slow_loss(*parts):
        with open(steps_file, "ab") as file:
            file.write(b".")
        time.sleep(0.15)
        return real(*parts)

    md.distillation_loss = slow_loss
    sys.exit(md.main(words))


@pytest.mark.parametrize(
    ("signum", "code", "epoch"), [(signal.SIGTERM, 143, 1), (signal.SIGKILL, -9, 2)]
)
def test_a_process_stopped_in_the_middle_of_an_epoch_goes_on_as_if_it_had_never_stopped(
    data, plain, tmp_path, signum, code, epoch
):
    run_folder = tmp_path / "run"
    steps_file = tmp_path / "steps"
    steps_file.touch()
    words = (command(data, run_folder), steps_file)
    process = multiprocessing.get_context("fork").Process(target=run_slowly, args=words)
    process.start()
    in_the_middle = (epoch - 1) * STEPS + 2  # steps
    while steps_file.stat().st_size < in_the_middle and process.is_alive():
        time.sleep(0.02)
    os.kill(process.pid, signum)
    process.join(100)
    assert process.exitcode == code
    loop = load(run_folder)["loop"]
    assert loop["epoch"] == epoch - 1
    if signum == signal.SIGTERM:
        assert 0 < loop["step"] < STEPS
    else:
        assert loop["step"] == 0
    assert run(data, run_folder, "--resume") == 0
    assert_same_run(run_folder, plain)


@pytest.mark.parametrize(
    ("name", "number", "done"),
    [("best_model_epoch_2.pt", 1, 1), ("last.pt", 3, 1), ("metrics.jsonl", 2, 2)],
)
def test_a_crash_before_any_write_of_an_epoch_leaves_a_run_that_goes_on(
    data, plain, tmp_path, monkeypatch, name, number, done
):
    """It crashes before `name` is written the `number`-th time, which is in epoch 2."""
    real = md.atomic
    begun = []

    def crashing(path, *args, **settings):
        begun.append(Path(path).name)
        if begun.count(name) == number:
            raise ZeroDivisionError
        return real(path, *args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(md, "atomic", crashing)
        with pytest.raises(ZeroDivisionError):
            run(data, tmp_path)
    assert begun.count("metrics.jsonl") == (2 if name == "metrics.jsonl" else 1)
    assert load(tmp_path)["loop"]["best_epoch"] == done
    named = load(tmp_path, f"best_model_epoch_{done}.pt")["model_state_dict"]
    found = md.PatchStudent.from_pretrained(tmp_path).state_dict()
    assert differences(dict(found), dict(named)) == []
    assert run(data, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, plain)


OLD_CONTENT = (  # what the first version of the script wrote into a checkpoint, beside "loop"
    "format",
    "student_config",
    "run_config",
    "versions",
    "data",
    "freqs",
    "counts",
    "alpha_tried",
    "teacher",
    "model_state_dict",
    "training_state_dict",
    "optimizer_state_dict",
    "scheduler_state_dict",
    "train_metrics",
    "validation_metrics",
    "epoch",
)


def test_a_run_of_the_first_version_of_the_script_goes_on_as_if_it_had_never_stopped(
    data, plain, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        signal_at(patch, "distillation_loss", STEPS + 3, signal.SIGTERM)
        assert run(data, tmp_path) == 143
    stopped = load(tmp_path)
    old = {name: stopped[name] for name in OLD_CONTENT}
    old["loop"] = {
        "epoch": 1,
        "step": 3,
        "sums": stopped["loop"]["sums"],
        "failed": 0,
        "skipped": 0,
        "history": history(tmp_path),
        "best_epoch": 1,
        "best_loss": best(tmp_path)["validation_metrics"]["validation_mse"],
        "best_file": "best_model_epoch_1.pt",
        "since_best": 0,
        "stopping": int(signal.SIGTERM),
    }
    torch.save(old, tmp_path / "last.pt")
    assert run(data, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, plain)


def test_a_resumed_run_may_have_more_epochs_and_another_language(data, plain, tmp_path):
    assert run(data, tmp_path, "--num_epochs", 1, "--lang", "zh") == 0
    assert run(data, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, plain)


def test_a_finished_run_resumed_trains_no_further(data, plain, tmp_path, monkeypatch):
    assert run(data, tmp_path) == 0
    steps = record_truths(monkeypatch)
    assert run(data, tmp_path, "--resume") == 0
    assert steps == []
    assert_same_run(tmp_path, plain)


def test_resume_refuses_other_flags_and_other_data_in_one_error_that_lists_them(
    data, tmp_path, capsys
):
    own = tmp_path / "data"
    folder = tmp_path / "run"
    shutil.copytree(data, own)
    assert run(own, folder, "--num_epochs", 1) == 0
    before = files_of(folder)
    frame = pd.read_csv(own / "s1.csv")

    def refused(*flags):
        capsys.readouterr()
        assert run(own, folder, "--resume", "--num_epochs", 1, *flags) == 2
        (message,) = capsys.readouterr().err.split("error: ")[1:]
        assert message.startswith("--resume")
        assert "Traceback" not in message
        return [line.strip() for line in message.splitlines()[1:]]

    assert refused("--learning_rate", 5e-3, "--seed", 4) == [
        "--learning_rate was 0.001, is 0.005",
        "--seed was 0, is 4",
    ]
    for row in (50, 195):  # a value that is trained on; one in the test range
        changed = frame.copy()
        changed.loc[row, "value"] = 9.0
        changed.to_csv(own / "s1.csv", index=False)
        assert refused() == ["the data is not the same"]
        assert refused("--dropout", 0.2) == [
            "--dropout was 0.1, is 0.2",
            "the data is not the same",
        ]
    frame.to_csv(own / "s1.csv", index=False)
    assert files_of(folder) == before
    assert run(own, folder, "--resume", "--num_epochs", 1) == 0


def test_resume_refuses_a_run_whose_student_had_another_seasonal_part(
    data, plain, tmp_path, capsys
):
    shutil.copytree(plain, tmp_path / "run")
    earlier = load(tmp_path / "run")
    for name in ("levels", "fade", "share"):
        del earlier["model_state_dict"][name]
    torch.save(earlier, tmp_path / "run" / "last.pt")
    assert run(data, tmp_path / "run", "--resume") == 2
    assert "its student is of an earlier version" in capsys.readouterr().err


def test_resume_refuses_other_teacher_weights_of_the_same_name(data, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    flags = ["--alpha", 0.5, "--teacher_model", teacher, "--label_cache", tmp_path / "cache"]
    save_module(teacher, seed=0)
    assert run(data, tmp_path / "run", *flags, "--num_epochs", 1) == 0
    save_module(teacher, seed=1)
    assert run(data, tmp_path / "run", *flags, "--num_epochs", 2, "--resume") == 2
    assert "the teacher's weights are not the same" in capsys.readouterr().err
    assert load(tmp_path / "run")["epoch"] == 1


def stop_in_epoch_2(data, folder, monkeypatch, *flags):
    with monkeypatch.context() as patch:
        signal_at(patch, "distillation_loss", STEPS + 2, signal.SIGTERM)
        assert run(data, folder, *flags) == 143


def test_a_run_that_was_moved_with_its_data_goes_on_as_if_it_had_never_stopped(
    data, plain, tmp_path, monkeypatch
):
    """Folders may be typed in another way, too: what they hold decides."""
    shutil.copytree(data, tmp_path / "here" / "data")
    monkeypatch.chdir(tmp_path / "here")
    stop_in_epoch_2("data", "run", monkeypatch)
    assert (tmp_path / "here" / "run" / "last.pt").is_file()
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    assert run("./there/data", "./there/../there/run", "--resume") == 0
    assert_same_run(tmp_path / "there" / "run", plain)
    assert load(tmp_path / "there" / "run")["run_config"]["data_dir"] == "./there/data"


def test_a_run_goes_on_where_its_teacher_was_moved_and_not_with_another(
    data, tmp_path, monkeypatch, capsys
):
    teacher = save_module(tmp_path / "models" / "mine", seed=0)
    flags = ["--alpha", 0.5, "--label_cache", tmp_path / "cache", "--num_epochs", 2]
    stop_in_epoch_2(data, tmp_path / "run", monkeypatch, *flags, "--teacher_model", teacher)
    renamed = teacher.rename(tmp_path / "renamed")
    assert not teacher.exists()

    def resume(name):
        code = run(data, tmp_path / "run", *flags, "--resume", "--teacher_model", name)
        return code, capsys.readouterr().err

    other = save_module(tmp_path / "other", seed=1)
    code, errors = resume(other)
    assert code == 2 and "the teacher's weights are not the same" in errors
    code, errors = resume("owner/other")  # whose weights are not at hand
    assert code == 2 and "--teacher_model was" in errors
    code, errors = resume(renamed)
    assert code == 0, errors


def test_a_run_whose_teachers_weights_have_gone_goes_on_with_its_name_alone(
    data, tmp_path, monkeypatch
):
    teacher = save_module(tmp_path / "models" / "mine", seed=0)
    flags = ["--alpha", 0.5, "--label_cache", tmp_path / "cache", "--num_epochs", 2]
    stop_in_epoch_2(data, tmp_path / "run", monkeypatch, *flags, "--teacher_model", teacher)
    shutil.rmtree(teacher)
    assert run(data, tmp_path / "run", *flags, "--resume", "--teacher_model", "owner/mine") == 0


def test_resume_without_a_run_is_an_error_and_makes_nothing(data, tmp_path, capsys):
    assert run(data, tmp_path / "none", "--resume") == 2
    assert "--resume" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


# What a run leaves


def test_a_second_run_in_the_same_folder_destroys_nothing_of_the_first(data, tmp_path, capsys):
    assert run(data, tmp_path, "--num_epochs", 1) == 0
    first = files_of(tmp_path)
    names = {name.partition("/")[0] for name in first}
    assert names == RUN_FILES | {"best_model_epoch_1.pt"}
    (tmp_path / "notes.txt").write_text("mine")
    for seed in (1, 2):
        earlier = {}
        for name, content in files_of(tmp_path).items():
            if not name.startswith(("old-", "notes")):
                earlier[name] = content
        known = set(tmp_path.glob("old-*"))
        assert len(known) == seed - 1
        capsys.readouterr()
        assert run(data, tmp_path, "--num_epochs", 1, "--seed", seed) == 0
        (new,) = set(tmp_path.glob("old-*")) - known
        assert files_of(new) == earlier
        assert str(new) in capsys.readouterr().err
    assert any(files_of(old) == first for old in tmp_path.glob("old-*"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_that_cannot_begin_leaves_an_earlier_run_in_its_place(data, plain, tmp_path):
    shutil.copytree(plain, tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", tmp_path / "run") == 2
    assert run(data, tmp_path / "run", "--context_length", 500) == 2
    assert set(os.listdir(tmp_path / "run")) == set(os.listdir(plain))


def test_a_run_leaves_its_files_and_no_temporary_one(plain):
    name = f"best_model_epoch_{load(plain)['loop']['best_epoch']}.pt"
    assert set(os.listdir(plain)) == RUN_FILES | {name}
    for picture in ("training.png", "forecast.png"):
        assert Path(plain, picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def assert_plain(value):
    """A nest has tensors and plain values alone, no type that has to be executed."""
    containers = (list, tuple, dict, collections.OrderedDict)
    assert type(value) in (str, int, float, bool, type(None), torch.Tensor, *containers)
    if isinstance(value, dict):
        assert_plain(list(value.keys()))
        assert_plain(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            assert_plain(part)


def test_the_checkpoint_tells_all_of_its_making_in_plain_values(data, plain, tmp_path, teaching):
    assert run(data, tmp_path, "--alpha", 0.5, "--num_epochs", 1, *teaching) == 0
    for folder, alpha in ((plain, 0), (tmp_path, 0.5)):
        content = best(folder)
        assert_plain(content)
        line = history(folder)[content["epoch"] - 1]
        assert content["epoch"] == line["epoch"]
        assert content["format"] == md.FORMAT
        assert content["train_metrics"]["train_loss"] == line["train_loss"]
        assert content["validation_metrics"]["validation_mse"] == line["validation_mse"]
        assert content["student_config"]["context_length"] == 64
        assert content["student_config"]["season"] == 23
        assert content["run_config"]["learning_rate"] == 1e-3
        assert content["run_config"]["alpha"] == alpha
        assert content["versions"]["torch"] == str(torch.__version__)
        assert content["scheduler_state_dict"]["factor"] == md.SCHEDULER_FACTOR
        assert {"optimizer_state_dict", "teacher"} <= content.keys()
    assert best(plain)["teacher"] is None
    assert best(tmp_path)["teacher"]["teacher"] == str(teaching[1])
    assert "licence" in best(tmp_path)["teacher"]


def test_the_optimizer_holds_exactly_the_models_parameters(plain):
    last = load(plain)
    student = md.PatchStudent(**last["student_config"])
    shapes = [tuple(parameter.shape) for parameter in student.parameters()]
    state = last["optimizer_state_dict"]["state"]
    held = []
    for group in last["optimizer_state_dict"]["param_groups"]:
        held += group["params"]
    assert sorted(held) == list(range(len(shapes)))
    assert [tuple(state[number]["exp_avg"].shape) for number in sorted(held)] == shapes
    assert {int(part["step"]) for part in state.values()} == {3 * STEPS}


# The numbers


def windows_of(data):
    """part -> Windows, as a run with the flags FIXED reads them."""
    return split_folder(data, split_by="time", max_windows=16).windows


def mse_of(source, windows):
    """MSE of a saved student over the observed points of all windows, one window at a time."""
    student = md.PatchStudent.from_pretrained(source)
    squared = []
    for number in range(len(windows)):
        context, truth, observed = windows.batch(np.array([number]))
        with torch.inference_mode():
            error = (student(context) - truth).double()[0].numpy()
        squared += (error[observed[0].numpy() > 0] ** 2).tolist()
    return np.mean(squared)


def test_the_saved_student_gives_the_logged_validation_loss_and_the_printed_test_error(data, plain):
    parts = windows_of(data)
    assert 0 < len(parts["validation"]) < 20
    assert 0 < len(parts["test"]) < 20
    line = history(plain)[load(plain)["loop"]["best_epoch"] - 1]
    stdout = Path(plain.parent, "stdout.txt").read_text()
    printed = float(re.search(r"student +MSE (\d+\.\d+)", stdout)[1])
    (path,) = plain.glob("best_model_epoch_*.pt")
    for source in (path, plain):
        validation_mse = mse_of(source, parts["validation"])
        assert validation_mse == pytest.approx(line["validation_mse"], rel=1e-5)
        assert mse_of(source, parts["test"]) == pytest.approx(printed, abs=6e-5)


def test_the_file_and_the_folder_give_the_same_forecasts(data, plain):
    (path,) = plain.glob("best_model_epoch_*.pt")
    context = windows_of(data)["test"].batch(np.arange(5))[0]
    with torch.inference_mode():
        of_file = md.PatchStudent.from_pretrained(path)(context)
        of_folder = md.PatchStudent.from_pretrained(plain)(context)
    assert torch.equal(of_file, of_folder)
    assert float(of_file.std()) > 0.1


def test_the_best_is_the_epoch_of_the_lowest_validation_loss_and_its_file_the_only_one(
    data, tmp_path, monkeypatch
):
    losses = [3.0, 2.0, 2.5, 1.5, 1.5, 9.0]
    script_validation(monkeypatch, losses)
    found = {}  # epoch -> the best files before those of that epoch are written

    def look(epoch, _is_best):
        found[epoch] = [path.name for path in tmp_path.glob("best*")]

    each_call(monkeypatch, "end_epoch", look)
    assert run(data, tmp_path, "--num_epochs", 6) == 0
    assert [line["validation_mse"] for line in history(tmp_path)] == losses
    assert load(tmp_path)["loop"]["best_epoch"] == 4
    assert best(tmp_path)["epoch"] == 4
    assert found[3] == ["best_model_epoch_2.pt"]
    assert found[6] == ["best_model_epoch_4.pt"]


def test_a_validation_loss_that_is_no_number_is_never_the_best(data, tmp_path, monkeypatch):
    script_validation(monkeypatch, [float("nan"), 2.0, float("nan")])
    assert run(data, tmp_path) == 0
    assert best(tmp_path)["epoch"] == 2
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and [line["validation_mse"] for line in history(tmp_path)] == [
        None,
        2,
        None,
    ]


def test_patience_stops_after_that_many_epochs_without_a_new_best(data, tmp_path, monkeypatch):
    script_validation(monkeypatch, [3.0, 2.0, 2.5, 2.0, 1.0])
    assert run(data, tmp_path, "--num_epochs", 5, "--patience", 2) == 0
    assert len(history(tmp_path)) == 4
    assert best(tmp_path)["epoch"] == 2


def test_the_learning_rate_halves_on_a_plateau_only(data, tmp_path, monkeypatch):
    monkeypatch.setattr(md, "SCHEDULER_FACTOR", 0.5)
    monkeypatch.setattr(md, "SCHEDULER_PATIENCE", 1)
    script_validation(monkeypatch, [4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert run(data, tmp_path, "--num_epochs", 8) == 0
    rates = [line["learning_rate"] for line in history(tmp_path)]
    assert rates[:5] == [1e-3] * 5
    assert rates[-1] < 1e-3
    assert {before / after for before, after in itertools.pairwise(rates)} == {1, 2}


def test_the_loss_that_is_logged_is_the_one_that_alpha_asks_for(data, plain, tmp_path, teaching):
    for alpha in (0.25, 1):
        folder = tmp_path / str(alpha)
        assert run(data, folder, "--alpha", alpha, "--num_epochs", 2, *teaching) == 0
        for line in history(folder):
            expected = alpha * line["train_distill"] + (1 - alpha) * line["train_mse"]
            assert line["train_loss"] == pytest.approx(expected, rel=1e-5)
            assert line["train_distill"] != pytest.approx(line["train_mse"], rel=1e-2)
    for line in history(plain):
        assert line["train_loss"] == line["train_mse"]
        assert line["train_distill"] is None


def test_alpha_0_and_alpha_1_give_different_students_and_both_validate_on_truth(
    data, tmp_path, teaching
):
    truth, taught = folders = (tmp_path / "0", tmp_path / "1")
    for alpha, folder in enumerate(folders):
        assert run(data, folder, "--alpha", alpha, "--num_epochs", 2, *teaching) == 0
    assert (weights(truth) - weights(taught)).abs().max() > 1e-4
    validation = windows_of(data)["validation"]
    for folder in folders:
        line = history(folder)[best(folder)["epoch"] - 1]
        assert mse_of(folder, validation) == pytest.approx(line["validation_mse"], rel=1e-5)


def test_windows_without_a_finite_label_train_on_truth_alone(
    data, plain, tmp_path, teaching, monkeypatch, capsys
):
    def forecast(_self, context, horizon, *_more):
        return torch.full((len(context), horizon), float("nan"))

    monkeypatch.setattr(md.Teacher, "answer", answering(forecast))
    flags = ["--alpha", 1, *teaching, "--label_cache", tmp_path / "labels"]
    assert run(data, tmp_path / "run", *flags) == 0
    assert f"{WINDOWS} windows have a non-finite label" in capsys.readouterr().err
    assert torch.equal(weights(tmp_path / "run"), weights(plain))


def test_the_seed_decides_the_student_and_neither_split_nor_windows(data, plain, tmp_path):
    assert run(data, tmp_path / "same") == 0
    assert_same_run(tmp_path / "same", plain)
    assert run(data, tmp_path / "other", "--seed", 1) == 0
    change = (weights(tmp_path / "other") - weights(plain)).abs().max()
    assert change > 0.1  # 18 steps of 1e-3 cannot do that
    assert load(tmp_path / "other")["data"] == load(plain)["data"]


def test_each_epoch_takes_every_window_once_in_an_order_of_its_own_and_of_the_seed(
    data, tmp_path, monkeypatch
):
    truths = record_truths(monkeypatch)
    orders = []  # of each epoch, the first value of the truth of its windows
    for seed in (0, 1):
        truths.clear()
        flags = ["--seed", seed, "--num_epochs", 2, "--augment", "off"]
        assert run(data, tmp_path / str(seed), *flags) == 0
        assert len(truths) == 2 * STEPS
        for steps in (truths[:STEPS], truths[STEPS:]):
            orders.append(torch.cat(steps)[:, 0].tolist())
    train = windows_of(data)["train"]
    assert len(train) == WINDOWS
    _, every_truth, _ = train.batch(np.arange(WINDOWS))
    for order in orders:
        assert sorted(order) == sorted(every_truth[:, 0].tolist())
    for one, other in itertools.combinations(orders, 2):
        assert one != other


def test_values_of_the_test_range_change_neither_windows_nor_scaler_nor_the_best_checkpoint(
    data, plain, tmp_path
):
    own = tmp_path / "data"
    shutil.copytree(data, own)
    for path in own.glob("*.csv"):
        frame = pd.read_csv(path)
        frame.loc[180:, "value"] = frame.loc[180:, "value"] * -50 + 7
        frame.to_csv(path, index=False)
    before = windows_of(data)
    after = windows_of(own)
    for part in ("train", "validation"):
        assert len(before[part]) == len(after[part]) > 0
        every = np.arange(len(before[part]))
        assert differences(before[part].batch(every), after[part].batch(every)) == []
    _, truth_before, _ = before["test"].batch(np.arange(5))
    _, truth_after, _ = after["test"].batch(np.arange(5))
    assert not torch.equal(truth_before, truth_after)
    assert run(own, tmp_path / "run") == 0
    assert torch.equal(weights(tmp_path / "run"), weights(plain))
    own_metrics = Path(tmp_path / "run", "metrics.jsonl").read_bytes()
    assert own_metrics == Path(plain, "metrics.jsonl").read_bytes()


def test_values_of_the_train_range_change_the_student(data, plain, tmp_path):
    own = tmp_path / "data"
    shutil.copytree(data, own)
    frame = pd.read_csv(own / "s0.csv")
    frame.loc[100, "value"] += 1
    frame.to_csv(own / "s0.csv", index=False)
    assert run(own, tmp_path / "run") == 0
    assert not torch.equal(weights(tmp_path / "run"), weights(plain))


def tensorboard_of(folder):
    """What TensorBoard knows of a run: its own reader, which can be asked to read on."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    return reader


def points_of(folder, name="validation_mse"):
    """(epoch, value) of a metric in TensorBoard."""
    return [(point.step, point.value) for point in tensorboard_of(folder).Scalars(name)]


def raw_epochs(folder):
    """Epochs of all points in all event files, as they were written."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    epochs = []
    for path in sorted(folder.glob("tensorboard/*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            if event.HasField("summary"):
                epochs.append(event.step)
    return epochs


def test_an_open_tensorboard_goes_on_and_knows_when_each_epoch_ended(data, tmp_path, monkeypatch):
    add = md.EventFile.add
    readers = []  # one, that is opened in epoch 1
    seen = []
    ended = []

    def watched(events, line):
        add(events, line)
        ended.append(time.time())
        time.sleep(0.02)
        if not readers:
            readers.append(tensorboard_of(tmp_path))
        readers[0].Reload()
        seen.append(len(readers[0].Scalars("train_loss")))

    monkeypatch.setattr(md.EventFile, "add", watched)
    assert run(data, tmp_path) == 0
    assert seen == [1, 2, 3]
    told = [point.wall_time for point in readers[0].Scalars("train_loss")]
    assert told == pytest.approx(ended, abs=0.015)


def test_a_resumed_run_writes_each_point_once_and_keeps_the_times_of_the_first(
    data, plain, tmp_path, monkeypatch
):
    stop_in_epoch_2(data, tmp_path, monkeypatch)
    (before,) = tensorboard_of(tmp_path).Scalars("train_loss")
    assert run(data, tmp_path, "--resume") == 0
    assert raw_epochs(tmp_path) == [1, 2, 3]
    assert tensorboard_of(tmp_path).Scalars("train_loss")[0].wall_time == before.wall_time
    assert points_of(tmp_path) == points_of(plain)
    assert run(data, tmp_path, "--resume") == 0  # there is nothing left to train
    assert raw_epochs(tmp_path) == [1, 2, 3]


def test_a_point_of_an_epoch_that_was_not_saved_is_taken_back(data, plain, tmp_path, monkeypatch):
    real = md.atomic
    begun = []

    def crashing(path, *args, **settings):
        begun.append(Path(path).name)
        if begun.count("last.pt") == 3:  # after the start and epoch 1
            raise ZeroDivisionError
        return real(path, *args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(md, "atomic", crashing)
        with pytest.raises(ZeroDivisionError):
            run(data, tmp_path)
    assert raw_epochs(tmp_path) == [1, 2]
    assert run(data, tmp_path, "--resume") == 0
    assert raw_epochs(tmp_path) == [1, 2, 2, 3]
    assert points_of(tmp_path) == points_of(plain)


def test_tensorboard_and_metrics_hold_the_same_numbers(plain):
    events = tensorboard_of(plain)
    lines = history(plain)
    names = {name for name, value in lines[0].items() if value is not None}
    assert set(events.Tags()["scalars"]) == names
    assert {"train_loss", "validation_mse", "learning_rate"} <= names
    for name in names:
        logged = events.Scalars(name)
        assert [event.step for event in logged] == [line["epoch"] for line in lines]
        values = [line[name] for line in lines]
        assert [event.value for event in logged] == pytest.approx(values, rel=1e-6)


# Steps that fail, and steps that are too long


def fail(monkeypatch, kind, does_fail):
    """Make steps fail for which `does_fail(number of the step from 1)`.

    Their loss is not a number, or (kind "gradient") its gradient alone.
    """

    def act(number, sums):
        if not does_fail(number):
            return None
        if kind == "loss":
            return sums * float("nan")
        zero = sums[0] * 0
        return sums + torch.sqrt(zero)  # of which the derivative is infinite

    each_call(monkeypatch, "distillation_loss", act)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_with_a_non_finite_loss_or_gradient_is_skipped_and_counted(
    data, tmp_path, monkeypatch, capsys, kind
):
    monkeypatch.setattr(md, "MAX_FAILED", 10)
    fail(monkeypatch, kind, lambda step: step in (2, 9, 10))
    assert run(data, tmp_path) == 0
    lines = history(tmp_path)
    assert [line["skipped_steps"] for line in lines] == [1, 2, 0]
    for line in lines:
        assert np.isfinite([line["train_loss"], line["validation_mse"]]).all()
    last = load(tmp_path)
    states = last["optimizer_state_dict"]["state"].values()
    assert {int(state["step"]) for state in states} == {3 * STEPS - 3}
    assert flat(last["model_state_dict"]).isfinite().all()
    assert "1 steps with a non-finite loss or gradient" in capsys.readouterr().err


def test_nine_failing_steps_in_a_row_are_survived_however_often(data, tmp_path, monkeypatch):
    monkeypatch.setattr(md, "MAX_FAILED", 10)
    fail(monkeypatch, "loss", lambda step: step % 10 != 0)
    assert run(data, tmp_path, "--num_epochs", 4) == 0
    skipped = [line["skipped_steps"] for line in history(tmp_path)]
    assert sum(skipped) == 4 * STEPS - 2


def test_ten_failing_steps_in_a_row_end_the_run_with_one_line_and_keep_the_best(
    data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(md, "MAX_FAILED", 10)
    fail(monkeypatch, "gradient", lambda step: step > STEPS + 2)
    assert run(data, tmp_path, "--num_epochs", 9) == 2
    (error,) = capsys.readouterr().err.split("error: ")[1:]
    assert "10 steps in a row" in error
    assert "--learning_rate" in error
    assert len(error.splitlines()) == 1
    student = md.PatchStudent.from_pretrained(tmp_path)
    assert flat(student.state_dict()).isfinite().all()
    assert load(tmp_path)["loop"]["best_epoch"] == best(tmp_path)["epoch"] >= 1


def test_gradients_are_clipped_to_max_grad_norm(data, tmp_path, monkeypatch):
    real = torch.optim.AdamW.step
    norms = []

    def step(self, *args, **settings):
        parameters = self.param_groups[0]["params"]
        gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])
        norms.append(float(gradient.norm()))
        return real(self, *args, **settings)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert run(data, tmp_path / "free", "--num_epochs", 1, "--max_grad_norm", 1e9) == 0
    free = norms.copy()
    norms.clear()
    limit = min(free) / 2
    assert run(data, tmp_path / "clipped", "--num_epochs", 1, "--max_grad_norm", limit) == 0
    assert len(free) == len(norms) == STEPS
    assert norms == pytest.approx([limit] * STEPS, rel=1e-3)


# Averaged weights, augmented windows


def test_what_forecasts_is_the_mean_of_the_weights_over_the_last_steps(data, tmp_path, monkeypatch):
    monkeypatch.setattr(md, "AVERAGE_DECAY", 9)
    real = torch.optim.AdamW.step
    steps = []  # the weights after each step

    def step(self, *args, **more):
        real(self, *args, **more)
        parameters = self.param_groups[0]["params"]
        steps.append(torch.cat([weight.detach().flatten() for weight in parameters]))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert run(data, tmp_path, "--num_epochs", 2) == 0
    assert len(steps) == 2 * STEPS
    last = load(tmp_path)
    torch.manual_seed(0)  # that of FIXED
    untrained = md.PatchStudent(**last["student_config"])
    mean = torch.cat([weight.detach().flatten() for weight in untrained.parameters()])
    for number, now in enumerate(steps):
        mean += (now - mean) * 9 / (11 + number)
    for name in ("model_state_dict", "training_state_dict"):
        del last[name]["share"]  # which no step moves
    averaged = flat(last["model_state_dict"])
    torch.testing.assert_close(averaged, mean, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(averaged, steps[-1], atol=1e-4)
    torch.testing.assert_close(flat(last["training_state_dict"]), steps[-1])


def partner_of(row, mixed, series):
    """The row of `series` (B, L + H) that augmentation added to the one of `row`, giving `mixed`.

    It is `row` itself where nothing but the window's own multiple is in the sum.
    """
    own = series[row]
    alone = torch.linalg.lstsq(own[:, None], mixed).solution
    if (alone * own - mixed).abs().max() < 1e-4:
        return row
    factors = []
    errors = []
    for other in series:
        a, b = torch.linalg.lstsq(torch.stack([own, other], 1), mixed).solution
        factors.append((float(a), float(b)))
        errors.append(float((a * own + b * other - mixed).abs().max()))
    found = int(np.argmin(errors))
    assert errors[found] < 1e-4
    a, b = factors[found]
    assert 0 <= b / a <= 1
    assert a**2 + b**2 == pytest.approx(1, abs=1e-3)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_labels_and_truth_move_with_augmented_contexts(data, seed):
    """With a forecaster that is linear in the context, each sum must have the sum of the labels."""
    windows = windows_of(data)["train"]
    index = np.random.default_rng(seed).permutation(len(windows))[:24]
    context, truth, observed = windows.batch(index)
    season = windows.season(index)
    label = md.seasonal_naive(context, season, windows.horizon)
    is_labelled = torch.from_numpy(index % 5 > 0)[:, None]
    plain = md.Batch(context, truth, observed, label, 0.5 * is_labelled)
    mixed = md.augment(plain, seed)

    expected = md.seasonal_naive(mixed.context, season, windows.horizon)
    torch.testing.assert_close(mixed.label, expected, rtol=1e-5, atol=1e-5)

    series = torch.cat([plain.context, plain.truth], 1)
    sums = torch.cat([mixed.context, mixed.truth], 1)
    partners = [partner_of(row, sums[row], series) for row in range(24)]
    assert sorted(partners) == list(range(24))
    both_observed = (plain.observed > 0) & (plain.observed[partners] > 0)
    assert torch.equal(mixed.observed, both_observed.float())
    both_labelled = (plain.weight > 0) & (plain.weight[partners] > 0)
    assert torch.equal(mixed.weight, 0.5 * both_labelled)
    assert set(mixed.weight.flatten().tolist()) == {0, 0.5}
    signs = (sums * series).sum(1).sign()
    assert set(signs.tolist()) == {-1.0, 1.0}


def test_augment_off_trains_on_the_windows_as_they_are(data, tmp_path, monkeypatch):
    truths = record_truths(monkeypatch)
    seen = {}
    for state in ("on", "off"):
        truths.clear()
        assert run(data, tmp_path / state, "--augment", state, "--num_epochs", 1) == 0
        assert len(truths) == STEPS
        seen[state] = {tuple(truth) for truth in torch.cat(truths).tolist()}
    _, every_truth, _ = windows_of(data)["train"].batch(np.arange(WINDOWS))
    every = {tuple(truth) for truth in every_truth.tolist()}
    assert seen["off"] == every
    assert not seen["on"] & every
    assert (weights(tmp_path / "on") - weights(tmp_path / "off")).abs().max() > 1e-3


# -- Whose folder it is ----------------------------------------------------------------------------


def test_a_second_run_is_refused_while_the_first_lives(data, tmp_path, monkeypatch, capsys):
    save = md.save_run
    seen = []

    def watched(*parts, **more):
        if not seen:
            seen.append("begun")
            seen.append(run(data, tmp_path, "--num_epochs", 1))
            (tmp_path / "last.pt").write_bytes(b"")  # so that there is one to go on from
            seen.append(run(data, tmp_path, "--num_epochs", 1, "--resume"))
        save(*parts, **more)

    monkeypatch.setattr(md, "save_run", watched)
    assert run(data, tmp_path, "--num_epochs", 1) == 0
    assert seen == ["begun", 2, 2]
    assert capsys.readouterr().err.count("another run writes here") == 2
    assert md.OWNER_FILE not in os.listdir(tmp_path)


def test_of_several_processes_the_first_alone_is_the_owner(data, tmp_path, monkeypatch):
    claimed = []
    monkeypatch.setattr(md, "claim", lambda path, own: claimed.append(path))
    monkeypatch.setattr(md.Job, "rank", 1)
    monkeypatch.setattr(md, "train_in", lambda *_: None)
    assert run(data, tmp_path / "run") == 0
    assert claimed == [] and not (tmp_path / "run").exists()


class Killed(BaseException):
    """As if the process had ended here."""


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("moment", range(12))
def test_a_kill_in_a_move_never_splits_an_earlier_run(plain, tmp_path, monkeypatch, moment, resume):
    folder = tmp_path / "run"
    shutil.copytree(plain, folder)
    before = files_of(folder)
    rename, moves = Path.rename, []

    def dying(path, target):
        if len(moves) == moment:
            raise Killed
        moves.append(path)
        return rename(path, target)

    voice = quiet_voice()
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Path, "rename", dying)
        md.move_old_run(folder, voice)
    was_killed = any(folder.glob("*.moving"))
    assert was_killed == (moment <= len(os.listdir(plain)))

    md.end_move(folder, resume, voice)
    assert not any(folder.glob("*.moving"))
    if resume and was_killed:
        assert files_of(folder) == before
    else:
        (old,) = folder.glob("old-*")
        assert files_of(old) == before and os.listdir(folder) == [old.name]


def test_a_run_whose_move_was_stopped_can_be_resumed(data, plain, tmp_path):
    assert run(data, tmp_path, "--num_epochs", 1) == 0
    moving = tmp_path / "old-20260101-000000.moving"
    moving.mkdir()
    for name in ("last.pt", "metrics.jsonl"):
        (tmp_path / name).rename(moving / name)
    assert run(data, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, plain)


def test_a_folder_that_is_removed_during_a_run_is_no_traceback(data, tmp_path, monkeypatch, capsys):
    def remove(number, _result):
        if number == 2:
            shutil.rmtree(tmp_path / "run")

    each_call(monkeypatch, "end_epoch", remove)
    assert run(data, tmp_path / "run") in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# What a run says of itself


def suggested(err):
    """The words of the command that a note suggests, or None."""
    found = re.findall(r"^  python moirai_distill\.py (.*)$", err, re.M)
    return shlex.split(found[-1]) if found else None


def test_a_run_of_few_steps_says_so_and_suggests_a_command_that_learns_more(
    data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(md, "FEW_STEPS", 19)  # this run takes 18
    monkeypatch.setattr(md, "ADVISED_STEPS", 100)
    argv = command(data, tmp_path / "run", "--learning_rate", "1e-5")
    assert md.main(argv) == 0
    out, err = capsys.readouterr()
    assert f"Steps: {STEPS} in an epoch ({WINDOWS} windows, 8 in a step), 18 in all" in out
    assert "takes only 18 steps" in err
    before = vars(md.parse_arguments(argv))
    after = vars(md.parse_arguments(suggested(err)))
    changed = {name: after[name] for name in after if after[name] != before[name]}
    assert changed == {"num_epochs": 17, "learning_rate": md.ADVISED_RATE}

    monkeypatch.setattr(md, "FEW_STEPS", 18)
    assert run(data, tmp_path / "run") == 0
    assert "takes only" not in capsys.readouterr().err


@pytest.mark.parametrize(("losses", "is_learning"), [([3, 2, 1], True), ([3, 1, 2], False)])
def test_a_run_whose_last_epoch_was_the_best_says_that_it_was_still_learning(
    losses, is_learning, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(md, "FEW_STEPS", 0)
    script_validation(monkeypatch, [float(loss) for loss in losses])
    assert run(data, tmp_path / "run") == 0
    err = capsys.readouterr().err
    assert ("the best epoch was the last one" in err) == is_learning
    if is_learning:
        assert "raise --num_epochs or --learning_rate" in err
        assert "--num_epochs" in suggested(err)


def test_what_a_bad_student_is_told_to_do(monkeypatch, capsys):
    def rows(mse):
        scores = md.Scores(mse, 0.0, 0.0, 0, [], [], [], [])
        naive = dataclasses.replace(scores, mse=1.0)
        return {name: md.Row(naive) for name in md.BASELINES} | {"student": md.Row(scores)}

    stopped = md.Progress(epoch=9, best_epoch=2)
    slow = md.parse_arguments(command(SCRIPT, "run", "--learning_rate", 1e-4))
    fast = md.parse_arguments(command(SCRIPT, "run", "--learning_rate", 1e-2))
    voice = md.Voice("en")
    monkeypatch.setattr(md, "FEW_STEPS", 0)
    md.advise(slow, stopped, rows(0.9), 48, voice)
    assert capsys.readouterr().err == ""
    md.advise(slow, stopped, rows(1.1), 48, voice)
    assert suggested(capsys.readouterr().err)
    md.advise(fast, stopped, rows(1.1), 48, voice)
    err = capsys.readouterr().err
    assert "more epochs would not help, the best one was 2 of 9" in err
    assert not suggested(err)

    monkeypatch.setattr(md, "FEW_STEPS", 10**6)  # any run is a short one
    md.advise(fast, stopped, rows(0.9), 48, voice)
    assert capsys.readouterr().err == ""
    md.advise(slow, stopped, rows(0.9), 48, voice)
    assert suggested(capsys.readouterr().err)


@pytest.mark.parametrize(
    "argv",
    [
        ["--demo", "--alpha", "0", "--resume"],
        ["--columns", "a b", "c", "--split_ratio", "7:1.5:1.5", "--alpha", "auto"],
        ["--data_dir", "it's here", "--teacher_patch_size", "32", "--season", "12"],
        ["label", "--stride", "3"],
    ],
)
def test_a_command_line_that_is_suggested_gives_the_same_arguments(argv):
    args = md.build_parser(demo="--demo" in argv).parse_args(
        argv if argv[0] in md.COMMANDS else ["train", *argv]
    )
    for changes in ({}, {"max_windows": 77}):
        words = shlex.split(md.command_line(args, **changes))
        assert words[:2] == ["python", "moirai_distill.py"]
        again = words[2:] if words[2:3] == ["label"] else ["train", *words[2:]]
        parsed = md.build_parser(demo="--demo" in again).parse_args(again)
        expected = vars(args) | changes
        if "resume" in expected:
            expected["resume"] = False
        assert vars(parsed) == expected


# -- The Transformer's share -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.0, 1.0, 20.0, -20.0])
def test_no_other_share_of_the_transformer_fits_validation_better(data, size):
    """The Transformer says `size` times what its random weights say: nothing, or nonsense."""
    args = md.build_parser(demo=False).parse_args(command(data, "unused"))
    job = md.start_job(args, "32-true", quiet_voice(), md.Stop())
    found = md.load_data(md.pick(md.DataConfig, args), md.pick(md.ReadConfig, args), job.voice)
    validation = found.windows["validation"]
    torch.manual_seed(0)
    sizes = dataclasses.asdict(md.pick(md.StudentConfig, args))
    student = md.PatchStudent(**sizes, season=24).requires_grad_(False)
    student.head.weight.mul_(size)
    student.head.bias.mul_(size)

    def error(share):
        student.share.fill_(share)
        forecast = md.forecaster(student, validation.horizon, job)
        return md.score(forecast, validation, md.EVAL_BATCH, job).mse

    md.fit_share(student, validation, job)
    fitted = float(student.share)
    assert 0 <= fitted <= 1
    lowest = error(fitted)
    others = [*np.linspace(0, 1, 21), fitted / 2, min(2 * fitted, 1)]
    assert lowest <= min(map(error, others)) + 1e-7
    assert (fitted == 1) == (size == 0)  # where it says nothing, all of that


# -- Begun with an earlier student -----------------------------------------------------------------


def test_a_run_begins_with_the_weights_of_an_earlier_student_and_names_it(data, plain, tmp_path):
    parent = md.open_student(plain)
    parent.student.save_pretrained(tmp_path / "hub")
    sources = {"run": plain, parent.path.name: parent.path, "hub": tmp_path / "hub"}
    context = torch.randn(4, parent.student.context_length)
    for name, source in sources.items():
        folder = tmp_path / f"from-{name}"
        rate = ["--learning_rate", "1e-30", "--num_epochs", "1"]  # weights stay as they began
        assert run(data, folder, "--init_from", source, "--seed", "5", *rate) == 0
        content = best(folder)
        expected = {"name": name, "weights": parent.weights_id, "licences": []}
        assert content["parent"] == expected
        own = md.open_student(folder).student
        torch.testing.assert_close(own(context), parent.student(context), atol=1e-4, rtol=1e-4)
    assert best(plain)["parent"] is None


def test_a_student_may_begin_with_one_that_has_quantiles():
    sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "patch_size": 8, "dropout": 0.0}
    sizes |= {"context_length": 24, "prediction_length": 8, "season": 0}
    parent = md.PatchStudent(**sizes, quantile_width=4)
    facts = {"run_config": {"seed": 5}, "student_config": sizes}
    student = md.new_student(facts, md.OpenedStudent(parent, {}, "", None))
    assert not student.has_quantiles
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, parent.state_dict()[name])


def test_a_run_begun_with_a_student_goes_on_as_if_it_had_never_stopped(data, plain, tmp_path):
    begun = ["--init_from", plain]
    assert run(data, tmp_path / "whole", *begun) == 0
    assert run(data, tmp_path / "twice", *begun, "--num_epochs", "1") == 0
    assert run(data, tmp_path / "twice", *begun, "--resume") == 0
    whole, twice = load(tmp_path / "whole"), load(tmp_path / "twice")
    assert twice["parent"] == whole["parent"]
    for name, weight in whole["model_state_dict"].items():
        assert torch.equal(twice["model_state_dict"][name], weight)


def test_resume_wants_the_same_parent(data, plain, tmp_path, capsys):
    shutil.copytree(plain, tmp_path / "run")
    before = load(tmp_path / "run")
    del before["run_config"]["init_from"]  # as a run of an earlier version
    torch.save(before, tmp_path / "run" / "last.pt")
    assert run(data, tmp_path / "run", "--resume", "--init_from", plain) == 2
    assert f"--init_from was None, is {plain}" in capsys.readouterr().err


def test_each_trial_of_an_alpha_begins_with_the_parent(
    data, plain, tmp_path, teaching, monkeypatch
):
    begun = []
    new_student = md.new_student

    def keep(facts, parent=None):
        student = new_student(facts, parent)
        begun.append(md.weights_digest(student))
        return student

    monkeypatch.setattr(md, "new_student", keep)
    more = ["--init_from", plain, "--alpha", "auto", "--num_epochs", "1", *teaching]
    assert run(data, tmp_path / "run", *more) == 0
    student = md.open_student(plain).student
    student.fold_share()
    parent = md.weights_digest(student)
    assert begun[1:] == [parent] * (len(md.ALPHAS) + 1)  # the first one is only counted


def test_a_parent_of_other_sizes_is_one_line_with_all_of_them(data, plain, tmp_path, capsys):
    own = load(plain)["student_config"]
    width, layers = own["d_model"], own["num_layers"]
    sizes = ["--d_model", 2 * width, "--num_layers", layers + 1, "--dropout", "0.3"]
    assert run(data, tmp_path / "run", "--init_from", plain, *sizes) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line == (
        f"error: --init_from {plain}: of other sizes: --d_model was {width}, is {2 * width};"
        f" --num_layers was {layers}, is {layers + 1}"
    )
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_parent_that_is_not_there_or_would_be_moved_away_is_one_line(
    data, plain, tmp_path, capsys
):
    assert run(data, tmp_path / "run", "--init_from", tmp_path / "gone") == 2
    assert f"--init_from {tmp_path / 'gone'}: no such file or folder" in capsys.readouterr().err
    before = sorted(plain.iterdir())
    assert run(data, plain, "--init_from", plain) == 2
    assert "name another --save_dir" in capsys.readouterr().err
    assert sorted(plain.iterdir()) == before


def test_the_licences_of_all_teachers_before_bind_a_student(plain):
    parent = md.open_student(plain)
    licence = "CC-BY-NC-4.0, for non-commercial use only"
    parent.content["teacher"] = {"teacher": "Salesforce/x", "commit": "abc", "licence": licence}
    child = md.open_student(plain)
    child.content["parent"] = md.parent_facts("me/parent", parent)
    grandchild = md.parent_facts("me/child", child)
    assert grandchild["licences"] == [licence]
    card = md.model_card(md.PatchStudent(**parent.student.sizes, info={"parent": grandchild}))
    assert "license: cc-by-nc-4.0" in card
    assert "began with the weights of `me/child`" in card
    assert licence in card
