"""The loop: a stopped run goes on as if nothing had happened, the best is kept, nothing is lost, logs are true."""

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SCRIPT, SMALL, hourly, save_module

import moirai_distill
from moirai_distill import PatchStudent, Teacher, main, read_files, split_data

STEPS = 6  # of an epoch: 3 files, 16 windows of each, batches of 8
BASE = f"{SMALL} --alpha 0 --max_windows 16 --batch_size 8 --num_epochs 3 --learning_rate 1e-3 --lang en".split()
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
    return ["train", "--data_dir", str(data), "--save_dir", str(save_dir), *BASE, *map(str, more)]


def run(data, save_dir, *more):
    return main(command(data, save_dir, *more))


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """Folder of an uninterrupted run; what it printed is in its stdout.txt."""
    folder, printed = tmp_path_factory.mktemp("plain") / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run(data, folder) == 0
    Path(folder.parent, "stdout.txt").write_text(printed.getvalue())
    return folder


@pytest.fixture(scope="module")
def teaching(teacher_folder, tmp_path_factory):
    """Flags of a teacher that labels quickly."""
    cache = tmp_path_factory.mktemp("labels")
    return [
        "--teacher_model",
        teacher_folder,
        "--label_cache",
        cache,
        *["--teacher_patch_size", "16", "--teacher_point", "mean"],
    ]


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """Pictures take most of the time of a run this small: after the run of `plain`, an empty file stands for each."""
    monkeypatch.setattr(moirai_distill, "draw_forecasts", lambda path, _panels: Path(path).write_bytes(b""))


def load(folder, name="last.pt"):
    return torch.load(Path(folder, name), weights_only=True)


def best(folder):
    """The only best checkpoint of a run."""
    (path,) = Path(folder).glob("best_model_epoch_*.pt")
    return load(folder, path.name)


def history(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    """All weights of a run's best checkpoint in one vector."""
    return torch.cat([tensor.flatten() for tensor in best(folder)["model_state_dict"].values()])


def differences(a, b, where=""):
    """Places where two nests of plain values and tensors differ by as little as a bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [place for key in a for place in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = zip(a, b, strict=True)
        return [place for i, (x, y) in enumerate(pairs) for place in differences(x, y, f"{where}/{i}")]
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    return [] if a == b else [where]


def assert_same_run(folder, reference):
    """Weights, optimizer, scheduler, loop, metrics and best are equal to the bit."""
    parts = ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "loop", "epoch", "data")
    for read in (load, best):
        mine, other = ({part: read(path)[part] for part in parts} for path in (folder, reference))
        assert differences(mine, other) == []
    assert Path(folder, "metrics.jsonl").read_bytes() == Path(reference, "metrics.jsonl").read_bytes()
    assert set(os.listdir(folder)) == set(os.listdir(reference))


def each_call(monkeypatch, name, act):
    """Wrap the script's function `name`: `act(number of the call from 1, result)` replaces its result unless None."""
    real, numbers = getattr(moirai_distill, name), itertools.count(1)

    def wrapped(*args, **settings):
        result = real(*args, **settings)
        other = act(next(numbers), result)
        return result if other is None else other

    monkeypatch.setattr(moirai_distill, name, wrapped)


def signal_at(monkeypatch, name, call, signum):
    """Send this process `signum` when the function `name` is called the `call`-th time."""
    each_call(monkeypatch, name, lambda number, _: os.kill(os.getpid(), signum) if number == call else None)


def script_validation(monkeypatch, losses):
    """Make `losses` the validation losses of the epochs; naive before and test after them are scored as ever."""
    given = dict(enumerate(losses, 2))
    each_call(monkeypatch, "score", lambda n, result: result | {"mse": given[n]} if n in given else None)


# Stopping and going on


@pytest.mark.parametrize(
    ("function", "call", "signum", "code", "epoch", "step"),
    [
        ("blend", 1, signal.SIGTERM, 143, 0, 1),
        ("blend", STEPS, signal.SIGTERM, 143, 0, STEPS),  # the last step of an epoch, not yet validated
        ("blend", STEPS + 3, signal.SIGINT, 130, 1, 3),
        ("score", 3, signal.SIGTERM, 143, 2, 0),  # during the validation of epoch 2
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
    assert "--resume" in capsys.readouterr().err
    assert run(data, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, plain)


def test_a_run_stopped_twice_with_a_teacher_and_dropout_goes_on_as_if_it_had_never_stopped(
    data, tmp_path, monkeypatch, teaching
):
    flags = ["--alpha", 0.5, "--dropout", 0.3, "--num_epochs", 2, *teaching]
    assert run(data, tmp_path / "whole", *flags) == 0
    for call, resume in ((4, []), (5, ["--resume"])):
        with monkeypatch.context() as patch:
            signal_at(patch, "blend", call, signal.SIGTERM)
            assert run(data, tmp_path / "stopped", *flags, *resume) == 143
    assert load(tmp_path / "stopped")["loop"]["step"] == 3
    assert run(data, tmp_path / "stopped", *flags, "--resume") == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


SLOWLY = """
import sys, time, moirai_distill
blend = moirai_distill.blend
moirai_distill.blend = lambda *parts: time.sleep(0.2) or blend(*parts)
sys.exit(moirai_distill.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("signum", "code", "epoch"), [(signal.SIGTERM, 143, 1), (signal.SIGKILL, -9, 2)])
def test_a_process_stopped_in_the_middle_of_an_epoch_goes_on_as_if_it_had_never_stopped(
    data, plain, tmp_path, signum, code, epoch
):
    words, shown = [sys.executable, "-c", SLOWLY, *command(data, tmp_path)], b""
    with subprocess.Popen(words, cwd=SCRIPT.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        for chunk in iter(lambda: process.stderr.read1(4096), b""):
            shown += chunk
            if re.search(rb"epoch %d: [^\r]* [1-9]/%d" % (epoch, STEPS), shown):
                process.send_signal(signum)
                break
        process.stderr.read()
    assert process.returncode == code, shown.decode()
    loop = load(tmp_path)["loop"]
    assert loop["epoch"] == epoch - 1
    assert 0 < loop["step"] < STEPS if signum == signal.SIGTERM else loop["step"] == 0
    assert run(data, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, plain)


@pytest.mark.parametrize("write", ["best", "last", "metrics"])
def test_a_crash_before_any_write_of_an_epoch_leaves_a_run_that_goes_on(data, plain, tmp_path, monkeypatch, write):
    names = iter(["last.pt"] + ["best_model_epoch_1.pt", "last.pt", "metrics.jsonl"] + ["best", "last", "metrics"])
    real = moirai_distill.atomic

    def crashing(path, *args, **settings):
        if next(names) == write:
            raise ZeroDivisionError
        return real(path, *args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(moirai_distill, "atomic", crashing)
        with pytest.raises(ZeroDivisionError):
            run(data, tmp_path)
    done = load(tmp_path)["loop"]["best_epoch"]
    assert done == (1 if write in ("best", "last") else 2)
    named = load(tmp_path, f"best_model_epoch_{done}.pt")["model_state_dict"]
    assert differences(dict(PatchStudent.from_pretrained(tmp_path).state_dict()), dict(named)) == []
    assert run(data, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, plain)


def test_a_resumed_run_may_have_more_epochs_and_another_language(data, plain, tmp_path):
    assert run(data, tmp_path, "--num_epochs", 1, "--lang", "zh") == 0
    assert run(data, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, plain)


def test_a_finished_run_resumed_trains_no_further(data, plain, tmp_path, monkeypatch):
    assert run(data, tmp_path) == 0
    steps = []
    each_call(monkeypatch, "blend", lambda number, _: steps.append(number))
    assert run(data, tmp_path, "--resume") == 0
    assert steps == []
    assert_same_run(tmp_path, plain)


def test_resume_refuses_other_flags_and_other_data_in_one_error_that_lists_them(data, tmp_path, capsys):
    own, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, own)
    assert run(own, folder, "--num_epochs", 1) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    frame = pd.read_csv(own / "s1.csv")

    def refused(*flags):
        capsys.readouterr()
        assert run(own, folder, "--resume", "--num_epochs", 1, *flags) == 2
        (message,) = capsys.readouterr().err.split("error: ")[1:]
        assert message.startswith("--resume") and "Traceback" not in message
        return [line.strip() for line in message.splitlines()[1:]]

    assert refused("--learning_rate", 5e-3, "--seed", 4) == [
        "--learning_rate was 0.001, is 0.005",
        "--seed was 0, is 4",
    ]
    for row in (50, 195):  # a value that is trained on; one in the test range
        frame.assign(value=frame["value"].where(frame.index != row, 9.0)).to_csv(own / "s1.csv", index=False)
        assert refused() == ["the data is not the same"]
        assert refused("--dropout", 0.2) == ["--dropout was 0.1, is 0.2", "the data is not the same"]
    frame.to_csv(own / "s1.csv", index=False)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert run(own, folder, "--resume", "--num_epochs", 1) == 0


def test_resume_refuses_other_teacher_weights_of_the_same_name(data, tmp_path, capsys):
    for number, resume in enumerate(([], ["--resume"])):
        save_module(tmp_path / "teacher", seed=number)
        flags = ["--alpha", 0.5, "--num_epochs", 1 + number, "--teacher_patch_size", 16, "--teacher_point", "mean"]
        flags += ["--teacher_model", tmp_path / "teacher", "--label_cache", tmp_path / "cache", *resume]
        assert run(data, tmp_path / "run", *flags) == (2 if resume else 0)
    assert "the teacher's weights are not the same" in capsys.readouterr().err
    assert load(tmp_path / "run")["epoch"] == 1


def test_resume_without_a_run_is_an_error_and_makes_nothing(data, tmp_path, capsys):
    assert run(data, tmp_path / "none", "--resume") == 2
    assert "--resume" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


# What a run leaves


def test_a_second_run_in_the_same_folder_destroys_nothing_of_the_first(data, tmp_path, capsys):
    def content(folder):
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert run(data, tmp_path, "--num_epochs", 1) == 0
    first = content(tmp_path)
    assert {name.partition("/")[0] for name in first} == RUN_FILES | {"best_model_epoch_1.pt"}
    (tmp_path / "notes.txt").write_text("mine")
    for number, seed in ((1, 1), (2, 2)):
        earlier = {name: text for name, text in content(tmp_path).items() if not name.startswith(("old-", "notes"))}
        known = set(tmp_path.glob("old-*"))
        capsys.readouterr()
        assert run(data, tmp_path, "--num_epochs", 1, "--seed", seed) == 0
        (new,) = set(tmp_path.glob("old-*")) - known
        assert content(new) == earlier
        assert str(new) in capsys.readouterr().err
        assert len(known) == number - 1
    assert any(content(old) == first for old in tmp_path.glob("old-*"))
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


def test_the_checkpoint_tells_all_of_its_making_in_plain_values(data, plain, tmp_path, teaching):
    assert run(data, tmp_path, "--alpha", 0.5, "--num_epochs", 1, *teaching) == 0
    kinds = (dict, list, tuple, str, int, float, bool, type(None), torch.Tensor)

    def check(value):
        assert type(value) in (*kinds, type(model["model_state_dict"])), type(value)
        for part in (
            [*value, *value.values()] if isinstance(value, dict) else value if type(value) in (list, tuple) else []
        ):
            check(part)

    for folder, taught in ((plain, False), (tmp_path, True)):
        model = best(folder)
        check(model)
        last = history(folder)[model["epoch"] - 1]
        assert model["epoch"] == last["epoch"] and model["format"] == 1
        assert model["train_metrics"]["train_loss"] == last["train_loss"]
        assert model["validation_metrics"]["validation_mse"] == last["validation_mse"]
        assert model["student_config"]["context_length"] == 64 and model["student_config"]["season"] == 24
        assert model["run_config"]["learning_rate"] == 1e-3 and model["run_config"]["alpha"] == 0.5 * taught
        assert model["versions"]["torch"] == str(torch.__version__) and model["scheduler_state_dict"]["factor"] == 0.5
        assert {"optimizer_state_dict", "teacher"} <= model.keys()
    assert best(plain)["teacher"] is None
    assert best(tmp_path)["teacher"]["teacher"] == str(teaching[1])
    assert "licence" in best(tmp_path)["teacher"]


def test_the_optimizer_holds_exactly_the_models_parameters(plain):
    last = load(plain)
    student = PatchStudent(**last["student_config"])
    shapes = [tuple(parameter.shape) for parameter in student.parameters()]
    groups, state = last["optimizer_state_dict"]["param_groups"], last["optimizer_state_dict"]["state"]
    held = [number for group in groups for number in group["params"]]
    assert sorted(held) == list(range(len(shapes)))
    assert [tuple(state[number]["exp_avg"].shape) for number in sorted(held)] == shapes
    assert {int(part["step"]) for part in state.values()} == {3 * STEPS}


# The numbers


def windows_of(data):
    """part -> Windows, as a run with the flags BASE reads them."""
    _, series, remarks = read_files(data, 100, ["first"], False)
    limits = {"length": 80, "horizon": 16, "max_gap": 16}
    return split_data(series, remarks, "auto", (8.0, 1.0, 1.0), 0, 1, 16, "auto", limits)[0]


def mse_of(source, windows):
    """MSE of a saved student over the observed points of all windows, one window at a time."""
    student, squared = PatchStudent.from_pretrained(source), []
    for number in range(len(windows)):
        context, target, observed = windows.batch(np.array([number]))
        with torch.inference_mode():
            error = (student(context) - target).double()[0].numpy()
        squared += (error[observed[0].numpy() > 0] ** 2).tolist()
    return np.mean(squared)


def test_the_saved_student_gives_the_logged_validation_loss_and_the_printed_test_error(data, plain):
    parts, (path,) = windows_of(data), plain.glob("best_model_epoch_*.pt")
    assert 0 < len(parts["validation"]) < 20 and 0 < len(parts["test"]) < 20
    line = history(plain)[load(plain)["loop"]["best_epoch"] - 1]
    printed = re.search(r"student +MSE (\d+\.\d+)", Path(plain.parent, "stdout.txt").read_text())
    for source in (path, plain):
        assert mse_of(source, parts["validation"]) == pytest.approx(line["validation_mse"], rel=1e-5)
        assert mse_of(source, parts["test"]) == pytest.approx(float(printed[1]), abs=6e-5)


def test_the_file_and_the_folder_give_the_same_forecasts(data, plain):
    (path,) = plain.glob("best_model_epoch_*.pt")
    context = windows_of(data)["test"].batch(np.arange(5))[0]
    with torch.inference_mode():
        one, other = (PatchStudent.from_pretrained(source)(context) for source in (path, plain))
    assert torch.equal(one, other)
    assert float(one.std()) > 0.1


def test_the_best_is_the_epoch_of_the_lowest_validation_loss_and_its_file_the_only_one(data, tmp_path, monkeypatch):
    losses = [3.0, 2.0, 2.5, 1.5, 1.5, 9.0]
    script_validation(monkeypatch, losses)
    taken = {}
    each_call(  # before the files of that epoch are written
        monkeypatch, "end_epoch", lambda n, _: taken.update({n: sorted(p.name for p in tmp_path.glob("best*"))})
    )
    assert run(data, tmp_path, "--num_epochs", 6) == 0
    assert [line["validation_mse"] for line in history(tmp_path)] == losses
    assert load(tmp_path)["loop"]["best_epoch"] == 4 and best(tmp_path)["epoch"] == 4
    assert taken[3] == ["best_model_epoch_2.pt"] and taken[6] == ["best_model_epoch_4.pt"]


def test_a_validation_loss_that_is_no_number_is_never_the_best(data, tmp_path, monkeypatch):
    script_validation(monkeypatch, [float("nan"), 2.0, float("nan")])
    assert run(data, tmp_path) == 0
    assert best(tmp_path)["epoch"] == 2


def test_patience_stops_after_that_many_epochs_without_a_new_best(data, tmp_path, monkeypatch):
    script_validation(monkeypatch, [3.0, 2.0, 2.5, 2.0, 1.0])
    assert run(data, tmp_path, "--num_epochs", 5, "--patience", 2) == 0
    assert len(history(tmp_path)) == 4 and best(tmp_path)["epoch"] == 2


def test_the_learning_rate_halves_on_a_plateau_only(data, tmp_path, monkeypatch):
    script_validation(monkeypatch, [4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert run(data, tmp_path, "--num_epochs", 8) == 0
    rates = [line["learning_rate"] for line in history(tmp_path)]
    assert rates[:5] == [1e-3] * 5
    assert rates[-1] < 1e-3 and {a / b for a, b in itertools.pairwise(rates)} == {1, 2}


def test_the_blend_that_is_logged_is_the_one_that_alpha_asks_for(data, plain, tmp_path, teaching):
    for alpha in (0.25, 1):
        assert run(data, tmp_path / str(alpha), "--alpha", alpha, "--num_epochs", 2, *teaching) == 0
        for line in history(tmp_path / str(alpha)):
            expected = alpha * line["train_distill"] + (1 - alpha) * line["train_mse"]
            assert line["train_loss"] == pytest.approx(expected, rel=1e-5)
            assert line["train_distill"] != pytest.approx(line["train_mse"], rel=1e-2)
    for line in history(plain):
        assert line["train_loss"] == line["train_mse"] and line["train_distill"] is None


def test_alpha_0_and_alpha_1_give_different_students_and_both_validate_on_truth(data, tmp_path, teaching):
    for alpha in (0, 1):
        assert run(data, tmp_path / str(alpha), "--alpha", alpha, "--num_epochs", 2, *teaching) == 0
    assert (weights(tmp_path / "0") - weights(tmp_path / "1")).abs().max() > 1e-4
    validation = windows_of(data)["validation"]
    for folder in (tmp_path / "0", tmp_path / "1"):
        logged = history(folder)[best(folder)["epoch"] - 1]["validation_mse"]
        assert mse_of(folder, validation) == pytest.approx(logged, rel=1e-5)


def test_windows_without_a_finite_label_train_on_truth_alone(data, plain, tmp_path, teaching, monkeypatch, capsys):
    nothing = lambda _self, context, horizon, *_: torch.full((len(context), horizon), float("nan"))  # noqa: E731
    monkeypatch.setattr(Teacher, "forecast", nothing)
    assert run(data, tmp_path / "run", "--alpha", 1, *teaching, "--label_cache", tmp_path / "labels") == 0
    assert "48 windows have a non-finite label" in capsys.readouterr().err
    assert torch.equal(weights(tmp_path / "run"), weights(plain))


def test_the_seed_decides_the_student_and_neither_split_nor_windows(data, plain, tmp_path):
    assert run(data, tmp_path / "same") == 0
    assert_same_run(tmp_path / "same", plain)
    assert run(data, tmp_path / "other", "--seed", 1) == 0
    assert (weights(tmp_path / "other") - weights(plain)).abs().max() > 0.1  # 18 steps of 1e-3 cannot do that
    assert load(tmp_path / "other")["data"] == load(plain)["data"]


def test_each_epoch_takes_every_window_once_in_an_order_of_its_own_and_of_the_seed(data, tmp_path, monkeypatch):
    orders, real, steps = {}, moirai_distill.blend, []
    monkeypatch.setattr(
        moirai_distill, "blend", lambda forecast, truth, *more: steps.append(truth) or real(forecast, truth, *more)
    )
    for seed in (0, 1):
        steps.clear()
        assert run(data, tmp_path / str(seed), "--seed", seed, "--num_epochs", 2, "--augment", "off") == 0
        assert len(steps) == 2 * STEPS
        orders |= {(seed, epoch): torch.cat(steps[epoch * STEPS :][:STEPS])[:, 0].tolist() for epoch in (0, 1)}
    train = windows_of(data)["train"]
    every = sorted(train.batch(np.arange(48))[1][:, 0].tolist())
    assert len(train) == 48
    assert [sorted(order) for order in orders.values()] == [every] * 4
    assert len(set(map(tuple, orders.values()))) == 4


def test_values_of_the_test_range_change_neither_windows_nor_scaler_nor_the_best_checkpoint(data, plain, tmp_path):
    own = tmp_path / "data"
    shutil.copytree(data, own)
    for path in own.glob("*.csv"):
        frame = pd.read_csv(path)
        frame.loc[180:, "value"] = frame.loc[180:, "value"] * -50 + 7
        frame.to_csv(path, index=False)
    before, after = windows_of(data), windows_of(own)
    for part in ("train", "validation"):
        every = np.arange(len(before[part]))
        assert len(every) == len(after[part]) > 0
        assert differences(list(before[part].batch(every)), list(after[part].batch(every))) == []
    assert not torch.equal(before["test"].batch(np.arange(5))[1], after["test"].batch(np.arange(5))[1])
    assert run(own, tmp_path / "run") == 0
    assert torch.equal(weights(tmp_path / "run"), weights(plain))
    assert Path(tmp_path / "run", "metrics.jsonl").read_bytes() == Path(plain, "metrics.jsonl").read_bytes()


def test_values_of_the_train_range_change_the_student(data, plain, tmp_path):
    own = tmp_path / "data"
    shutil.copytree(data, own)
    frame = pd.read_csv(own / "s0.csv")
    frame.loc[100, "value"] += 1
    frame.to_csv(own / "s0.csv", index=False)
    assert run(own, tmp_path / "run") == 0
    assert not torch.equal(weights(tmp_path / "run"), weights(plain))


def test_tensorboard_and_metrics_hold_the_same_numbers(plain):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(plain / "tensorboard"))
    events.Reload()
    lines = history(plain)
    names = {name for name, value in lines[0].items() if value is not None}
    assert set(events.Tags()["scalars"]) == names
    assert {"train_loss", "validation_mse", "learning_rate"} <= names
    for name in names:
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(line["epoch"], pytest.approx(line[name], rel=1e-6)) for line in lines]


# Steps that fail, and steps that are too long


def failing(total, kind):
    """Sums of `blend` of which the loss, or only its gradient, is not a number."""
    zero = total[0] * 0
    return total * float("nan") if kind == "loss" else total + torch.sqrt(zero) * torch.eye(4)[0]


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_with_a_non_finite_loss_or_gradient_is_skipped_and_counted(data, tmp_path, monkeypatch, capsys, kind):
    each_call(monkeypatch, "blend", lambda number, sums: failing(sums, kind) if number in (2, 9, 10) else None)
    assert run(data, tmp_path) == 0
    lines = history(tmp_path)
    assert [line["skipped_steps"] for line in lines] == [1, 2, 0]
    assert np.isfinite([[line["train_loss"], line["validation_mse"]] for line in lines]).all()
    last = load(tmp_path)
    assert {int(part["step"]) for part in last["optimizer_state_dict"]["state"].values()} == {3 * STEPS - 3}
    assert all(tensor.isfinite().all() for tensor in last["model_state_dict"].values())
    assert "1 steps with a non-finite loss or gradient" in capsys.readouterr().err


def test_nine_failing_steps_in_a_row_are_survived_however_often(data, tmp_path, monkeypatch):
    each_call(monkeypatch, "blend", lambda number, sums: failing(sums, "loss") if number % 10 else None)
    assert run(data, tmp_path, "--num_epochs", 4) == 0
    assert sum(line["skipped_steps"] for line in history(tmp_path)) == 4 * STEPS - 2


def test_ten_failing_steps_in_a_row_end_the_run_with_one_line_and_keep_the_best(data, tmp_path, monkeypatch, capsys):
    each_call(monkeypatch, "blend", lambda number, sums: failing(sums, "gradient") if number > STEPS + 2 else None)
    assert run(data, tmp_path, "--num_epochs", 9) == 2
    (error,) = capsys.readouterr().err.split("error: ")[1:]
    assert "10 steps in a row" in error and "--learning_rate" in error and len(error.splitlines()) == 1
    student = PatchStudent.from_pretrained(tmp_path)
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())
    assert load(tmp_path)["loop"]["best_epoch"] == best(tmp_path)["epoch"] >= 1


def test_gradients_are_clipped_to_max_grad_norm(data, tmp_path, monkeypatch):
    norms, real = [], torch.optim.AdamW.step

    def step(self, *args, **settings):
        squares = [parameter.grad.square().sum() for group in self.param_groups for parameter in group["params"]]
        norms.append(float(torch.stack(squares).sum().sqrt()))
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
    real, steps = torch.optim.AdamW.step, []

    def step(self, *args, **more):
        real(self, *args, **more)
        steps.append(torch.cat([weight.detach().flatten() for weight in self.param_groups[0]["params"]]).clone())

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert run(data, tmp_path / "run", "--num_epochs", 2) == 0
    assert len(steps) == 2 * STEPS
    torch.manual_seed(0)  # the weights before the first step
    config = load(tmp_path / "run")["student_config"]
    mean = torch.cat([weight.detach().flatten() for weight in PatchStudent(**config).parameters()])
    for number, now in enumerate(steps):
        mean += (now - mean) * 9 / (11 + number)
    last = load(tmp_path / "run")
    saved = torch.cat([weight.flatten() for weight in last["model_state_dict"].values()])
    torch.testing.assert_close(saved, mean, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(saved, steps[-1], atol=1e-4)
    training = torch.cat([weight.flatten() for weight in last["training_state_dict"].values()])
    torch.testing.assert_close(training, steps[-1])


@pytest.mark.parametrize("seed", range(5))
def test_labels_and_truth_move_with_augmented_contexts(data, seed):
    """For a forecaster that is linear in the context, the label of the sum is the sum of the labels, exactly."""
    windows = windows_of(data)["train"]

    class Labels:
        def batch(self, index):
            context = windows.batch(index)[0]
            finite = torch.from_numpy((index % 5 > 0).astype(np.float32))[:, None]
            return moirai_distill.seasonal_naive(context, windows.season(index), windows.horizon), finite

    index = np.random.default_rng(seed).permutation(len(windows))[:24]
    label, finite = Labels().batch(index)
    plain = (*windows.batch(index), label, 0.5 * finite)
    context, truth, observed, label, weight = moirai_distill.augmented(plain, seed)
    season = torch.full((24,), 24)
    torch.testing.assert_close(label, moirai_distill.seasonal_naive(context, season, 16), rtol=1e-5, atol=1e-5)
    series, whole, partners = torch.cat(plain[:2], 1), torch.cat([context, truth], 1), []
    for row, mixed in enumerate(whole):  # which windows is it a sum of?
        fits = [torch.linalg.lstsq(torch.stack([series[row], other], 1), mixed).solution for other in series]
        errors = [(a * series[row] + b * other - mixed).abs().max() for (a, b), other in zip(fits, series, strict=True)]
        alone = torch.linalg.lstsq(series[row, :, None], mixed).solution
        if (alone * series[row] - mixed).abs().max() < 1e-4:  # of itself
            partners.append(row)
            continue
        partners.append(int(torch.stack(errors).argmin()))
        own, other = fits[partners[-1]].tolist()
        assert min(errors) < 1e-4 and 0 <= other / own <= 1 and own**2 + other**2 == pytest.approx(1, abs=1e-3)
    assert sorted(partners) == list(range(24))
    assert torch.equal(observed, ((plain[2] > 0) & (plain[2][partners] > 0)).float())
    assert torch.equal(weight > 0, (plain[4] > 0) & (plain[4][partners] > 0)) and {*weight.flatten().tolist()} == {
        0,
        0.5,
    }
    signs = [(part @ series[row]).sign().item() for row, part in enumerate(whole)]
    assert {*signs} == {-1.0, 1.0}


def test_augment_off_trains_on_the_windows_as_they_are(data, tmp_path, monkeypatch):
    real, seen = moirai_distill.blend, []
    monkeypatch.setattr(moirai_distill, "blend", lambda *batch: seen.append(batch[1:]) or real(*batch))
    for state in ("on", "off"):
        assert run(data, tmp_path / state, "--augment", state, "--num_epochs", 1) == 0
    every = {tuple(row) for row in windows_of(data)["train"].batch(np.arange(48))[1].tolist()}
    truths = [{tuple(row) for batch in part for row in batch[0].tolist()} for part in (seen[:STEPS], seen[STEPS:])]
    assert truths[1] == every and not truths[0] & every
    assert (weights(tmp_path / "on") - weights(tmp_path / "off")).abs().max() > 1e-3


# Several processes


def test_two_processes_give_the_losses_of_one(data, tmp_path):
    # The last batch has 1 window for 2 processes; nothing is clipped, so that the scale of the gradients shows.
    flags = ["--dropout", "0", "--num_epochs", "2", "--batch_size", "47", "--max_grad_norm", "1e9"]
    words = [sys.executable, SCRIPT, *command(data, tmp_path / "two", *flags, "--devices", 2)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Epoch 1/2") == 1  # one process prints
    assert run(data, tmp_path / "one", *flags) == 0
    assert len(history(tmp_path / "two")) == 2
    for two, one in zip(history(tmp_path / "two"), history(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, abs=1e-5)
    two, one = (load(tmp_path / name)["optimizer_state_dict"]["state"] for name in ("two", "one"))
    for number, state in one.items():  # AdamW hides a wrong scale of the gradients in its steps, not in its state
        torch.testing.assert_close(two[number]["exp_avg"], state["exp_avg"], rtol=1e-3, atol=1e-6)
