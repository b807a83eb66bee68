"""Nothing lost, nothing silent: full disks, two runs at once, extreme numbers, untrusted files."""

import contextlib
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import SCRIPT, SMALL, hourly, load_teacher
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

import moirai_distill as md

sys.path.insert(0, str(SCRIPT.parent / "benchmarks"))
QUICK = f"{SMALL} --num_epochs 2 --max_windows 20 --learning_rate 1e-3 --lang en"
QUICK += " --num_samples 5 --teacher_batch_size 16 --teacher_patch_size 16 --alpha 0.5"
QUICK += " --batch_size 32 --dropout 0.1 --split_by time --columns first --max_files 0 --patience 0"
QUICK += " --split_ratio 8:1:1 --teacher_precision 32 --stride 1 --teacher_point median"

# Processes are forked from one that has imported what takes long: so they start at once.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["lightning.fabric", "tensorboard.summary", "uni2ts.model.moirai", "sklearn", "hypothesis"]
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder of 4 hourly CSVs of 200 rows."""
    folder = tmp_path_factory.mktemp("robust") / "data"
    folder.mkdir()
    for number in range(4):
        hourly(200, seed=number).to_csv(folder / f"s{number}.csv", index=False)
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Runs of this process draw nothing; those of child processes do."""
    monkeypatch.setattr(md, "draw", lambda _path, _panels: None)


@pytest.fixture(scope="module")
def forks():
    """The process that all others are forked from is ready."""
    first = FORKS.Process(target=os.getpid)
    first.start()
    first.join(120)
    assert first.exitcode == 0


def words(data, root, teacher, *more):
    """Words of a run below `root`."""
    folders = ["--save_dir", root / "run", "--label_cache", root / "labels"]
    inputs = ["--data_dir", data, "--teacher_model", teacher]
    return ["train", *QUICK.split(), *map(str, [*folders, *inputs, *more])]


def run_script(argv, out, errors):
    """Run the script in this process, with its output in two files, and leave."""
    for number, path in ((1, out), (2, errors)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), number)
    tqdm.set_lock(threading.RLock())  # its own lock would outlive a process that is killed
    sys.exit(md.main(argv))


class Forked:
    """The script in a process of its own, with what `subprocess.Popen` has."""

    def __init__(self, argv, folder):
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.iterdir()))
        self.argv = argv
        self.files = [folder / f"{number} {name}" for name in ("out", "errors")]
        self.process = FORKS.Process(target=run_script, args=(argv, *map(str, self.files)))
        self.process.start()

    @property
    def returncode(self):
        return self.process.exitcode

    def wait(self, timeout):
        self.process.join(timeout)
        if self.process.is_alive():
            raise subprocess.TimeoutExpired(self.argv, timeout)

    def send_signal(self, signum):
        if self.process.is_alive():
            os.kill(self.process.pid, signum)

    def communicate(self, timeout=100):
        self.wait(timeout)
        return [path.read_text() if path.exists() else "" for path in self.files]


@contextlib.contextmanager
def full_disk(limit):
    """Inside, this process can write no file of more than `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def one_line(errors):
    """The one line of an error, without progress bars and notes."""
    (line,) = [
        line for line in errors.replace("\r", "\n").splitlines() if line.startswith("error: ")
    ]
    assert "Traceback" not in errors
    return line


def digest(folder):
    """name -> bytes of all files of a folder, but for the pictures."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".png"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# -- a kill, a full disk, two at once --------------------------------------------------------------


def test_killed_at_random_moments_a_run_comes_to_the_same_end(forks, tmp_path, monkeypatch):
    import kill_and_resume

    def start(run):
        _python, _script, *argv = run.command(resume=run.last.is_file())
        return Forked(argv, run.root / "output")

    monkeypatch.setattr(kill_and_resume.Run, "start", start)
    wrong = kill_and_resume.torture(tmp_path, kills=3, seed=3, epochs=6, windows=40, tell=print)
    assert wrong == []


def test_a_disk_that_is_full_while_saving_leaves_the_earlier_checkpoint(
    data, teacher_folder, tmp_path, capsys
):
    assert md.main(words(data, tmp_path, teacher_folder)) == 0
    before = digest(tmp_path / "run")
    longer = words(data, tmp_path, teacher_folder, "--resume", "--num_epochs", 4)
    capsys.readouterr()
    with full_disk(limit=20_000):
        assert md.main(longer) == 2
    assert "last.pt: cannot be written (File too large)" in one_line(capsys.readouterr().err)
    assert digest(tmp_path / "run") == before
    assert md.read_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 2
    assert md.main(longer) == 0
    assert md.read_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 4


def test_a_disk_that_is_full_while_labelling_loses_no_block(data, teacher_folder, tmp_path, capsys):
    argv = words(data, tmp_path, teacher_folder, "--quantiles", "off")
    with full_disk(limit=2000):  # the manifest and a block fit, all blocks do not
        assert md.main(argv) == 2
    assert "labels.bin: cannot be written" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
    (folder,) = (tmp_path / "labels").iterdir()
    file = md.LabelFile(folder, md.read_manifest(folder))
    assert file.points.count > 1
    assert file.missing() == []
    assert not file.points.path.exists()
    assert not list(folder.glob(".*"))
    assert md.main(argv) == 0

    capsys.readouterr()
    with full_disk(limit=300):  # not even the manifest
        assert md.main(words(data, tmp_path / "b", teacher_folder)) == 2
    assert "manifest.json: cannot be written" in one_line(capsys.readouterr().err)


def test_a_label_cache_that_is_removed_while_it_is_made_is_one_line(
    data, teacher_folder, tmp_path, monkeypatch, capsys
):
    label_windows = md.label_windows
    blocks = []

    def removed_meanwhile(*arguments):
        blocks.append(tmp_path / "labels")
        if len(blocks) == 3:
            shutil.rmtree(tmp_path / "labels")
        return label_windows(*arguments)

    monkeypatch.setattr(md, "choose_patch_sizes", lambda *_: ({"h": 16}, 0.0))
    monkeypatch.setattr(md, "label_windows", removed_meanwhile)
    argv = words(data, tmp_path, teacher_folder)
    assert md.main(argv) == 2
    line = one_line(capsys.readouterr().err)
    assert str(tmp_path / "labels") in line
    assert "was removed or replaced" in line
    assert not (tmp_path / "labels").exists()
    assert not (tmp_path / "run").exists()
    assert md.main(argv) == 0


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_save_dir_that_is_removed_during_an_epoch_is_one_line(
    data, teacher_folder, tmp_path, monkeypatch, capsys, epoch
):
    train_epoch = md.train_epoch
    epochs = []

    def removed_meanwhile(*arguments):
        train_epoch(*arguments)
        epochs.append("done")
        if len(epochs) == epoch:
            shutil.rmtree(tmp_path / "run")

    monkeypatch.setattr(md, "train_epoch", removed_meanwhile)
    assert md.main(words(data, tmp_path, teacher_folder, "--alpha", 0)) == 2
    line = one_line(capsys.readouterr().err)
    assert f"{tmp_path / 'run'}: was removed or replaced" in line
    assert not (tmp_path / "run").exists()


def test_a_save_dir_that_is_replaced_during_an_epoch_is_one_line(
    data, teacher_folder, tmp_path, monkeypatch, capsys
):
    """The other folder is there when the epoch is saved; its files stay."""
    train_epoch = md.train_epoch

    def replaced_meanwhile(*arguments):
        train_epoch(*arguments)
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "mine").write_text("precious")

    monkeypatch.setattr(md, "train_epoch", replaced_meanwhile)
    argv = words(data, tmp_path, teacher_folder, "--alpha", 0, "--num_epochs", 1)
    assert md.main(argv) == 2
    assert "was removed or replaced" in one_line(capsys.readouterr().err)
    assert (tmp_path / "run" / "mine").read_text() == "precious"


def test_two_runs_share_a_cache_at_the_same_time(
    forks, data, teacher_folder, tmp_path, monkeypatch
):
    """The other one begins as this one is about to write its manifest; then both make blocks.

    The first manifest decides how many windows a block has.
    """

    def argv_of(name, block, root=tmp_path):
        sizes = ["--max_windows", 60, "--teacher_batch_size", block, "--num_epochs", 1]
        argv = words(data, root, teacher_folder, *sizes)
        return [*argv, "--save_dir", str(tmp_path / name)]

    choose = md.choose_patch_sizes
    write = md.LabelFile.write
    others = []
    written = []

    def choose_meanwhile(*arguments):
        """No manifest was found, and none is written yet."""
        others.append(Forked(argv_of("b", block=3), tmp_path / "output"))
        deadline = time.monotonic() + 60
        while not list((tmp_path / "labels").glob("*/quantile_blocks/*.bin")):  # its second part
            assert time.monotonic() < deadline
            time.sleep(0.001)
        others[0].send_signal(signal.SIGSTOP)
        return choose(*arguments)

    def write_then_wake(file, number, labels):
        write(file, number, labels)
        written.append(number)
        if len(written) == 2:
            others[0].send_signal(signal.SIGCONT)

    monkeypatch.setattr(md, "choose_patch_sizes", choose_meanwhile)
    monkeypatch.setattr(md.LabelFile, "write", write_then_wake)
    try:
        assert md.main(argv_of("a", block=2)) == 0
        _, errors = others[0].communicate()
    finally:
        others[0].send_signal(signal.SIGKILL)
    assert others[0].returncode == 0, errors
    monkeypatch.undo()
    (shared,) = (tmp_path / "labels").iterdir()
    count = md.LabelFile(shared, md.read_manifest(shared)).points.count
    assert 2 <= len(written) < count  # both have made some

    assert md.main(argv_of("alone", 3, tmp_path / "alone")) == 0
    (alone,) = (tmp_path / "alone" / "labels").iterdir()
    assert shared.name == alone.name
    assert (shared / "labels.bin").read_bytes() == (alone / "labels.bin").read_bytes()
    weights = {md.open_student(tmp_path / name).weights_id for name in ("a", "b", "alone")}
    assert len(weights) == 1


def test_a_disk_that_is_full_while_events_are_written_is_one_line_and_the_run_goes_on_later(
    data, teacher_folder, tmp_path, capsys, monkeypatch
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    add = md.EventFile.add

    def full(events, line):
        size = events.path.stat().st_size if events.path.exists() else 0
        with full_disk(size + (1000 if line["epoch"] == 1 else 100)):  # epoch 2 is cut in half
            add(events, line)

    monkeypatch.setattr(md.EventFile, "add", full)
    assert md.main(words(data, tmp_path, teacher_folder)) == 2
    error = one_line(capsys.readouterr().err)
    assert "tensorboard" in error and "cannot be written (File too large)" in error
    monkeypatch.undo()
    assert md.main(words(data, tmp_path, teacher_folder, "--resume")) == 0
    reader = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    reader.Reload()
    assert [point.step for point in reader.Scalars("train_loss")] == [1, 2]


def test_what_a_dead_run_left_half_written_blocks_nobody(data, teacher_folder, tmp_path):
    assert md.main(words(data, tmp_path, teacher_folder)) == 0
    (folder,) = (tmp_path / "labels").iterdir()
    content = (folder / "labels.bin").read_bytes()
    (folder / "labels.bin").unlink()
    (folder / "blocks").mkdir()
    (folder / "blocks" / ".00000000.bin.4711.tmp").write_bytes(content[:100])
    (folder / "blocks" / "00000001.bin").write_bytes(content[:50])  # as after a power cut
    assert md.main(words(data, tmp_path, teacher_folder)) == 0
    assert (folder / "labels.bin").read_bytes() == content


def test_out_of_memory_while_training_is_one_line_and_the_last_epoch_stays(
    data, teacher_folder, tmp_path, capsys, monkeypatch
):
    assert md.main(words(data, tmp_path, teacher_folder)) == 0
    before = md.read_checkpoint(tmp_path / "run" / "last.pt")
    loss = md.distillation_loss
    calls = []

    def full(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore")
        return loss(*arguments)

    monkeypatch.setattr(md, "distillation_loss", full)
    capsys.readouterr()
    assert md.main(words(data, tmp_path, teacher_folder, "--resume", "--num_epochs", 4)) == 2
    assert "--batch_size" in one_line(capsys.readouterr().err)
    saved = md.read_checkpoint(tmp_path / "run" / "last.pt")
    assert saved["epoch"] == 2
    assert saved["loop"]["history"] == before["loop"]["history"]
    monkeypatch.undo()
    assert md.main(words(data, tmp_path, teacher_folder, "--resume", "--num_epochs", 3)) == 0


# -- numbers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(trained):
    """The distilled student, whose weights stay."""
    return md.PatchStudent.from_pretrained(trained / "distilled").requires_grad_(False)


def context_of(shape, seed):
    """A context (64,) of a shape."""
    steps = np.arange(64)
    if shape == "walk":
        return np.random.default_rng(seed).standard_normal(64).cumsum()
    if shape == "sine":
        return np.sin(steps / 3 + seed)
    if shape == "constant":
        return np.full(64, 3.0)
    if shape == "step":
        return np.where(steps == 63, 5.0, 1.0)
    assert shape == "spike"
    return np.where(steps == 31, 1e4, 1.0)


@settings(max_examples=60, deadline=None)
@given(
    power=st.integers(-12, 12),
    offset=st.sampled_from([0.0, 1.0, -1e3, 1e9]),
    shape=st.sampled_from(["walk", "sine", "constant", "step", "spike"]),
    seed=st.integers(0, 99),
)
def test_forecasts_are_finite_and_move_with_scale_and_shift(student, power, offset, shape, seed):
    scale = 10.0**power
    context = context_of(shape, seed)
    plain = student(torch.from_numpy(context[None]))
    expected = plain * scale + offset
    largest = scale * max(1.0, float(plain.abs().max()))
    for kind in (torch.float32, torch.float64):
        moved = torch.from_numpy((context * scale + offset)[None]).to(kind)
        result = student(moved)
        assert result.isfinite().all()

        deviation = float(md.instance_scale(moved.double())[1])
        is_lost = scale * context.std() < 1e-14 * abs(offset)
        is_lost_in_float32 = kind == torch.float32 and abs(offset) / deviation > 1e5
        if is_lost or is_lost_in_float32:
            continue  # the numbers themselves no longer hold the series
        error = float((result.double() - expected).abs().max())
        if kind == torch.float32:
            assert error < 2e-3 * (largest + (1e-7 + 1e-11) * abs(offset)) + 1e-6 * abs(offset)
        else:
            assert error < 1e-4 * (largest + 1e-11 * abs(offset))


@settings(max_examples=20, deadline=None)
@given(power=st.integers(-12, 12), shape=st.sampled_from(["walk", "constant", "step"]))
def test_loss_and_gradients_are_finite_at_every_scale(power, shape):
    torch.manual_seed(0)
    model = md.PatchStudent(64, 16, 16, 1, 2, 8, 0.1)
    rows = {
        "walk": torch.randn(3, 80).cumsum(1),
        "constant": torch.full((3, 80), 2.0),
        "step": (torch.arange(80) == 63).float().expand(3, -1),
    }
    moved = rows[shape] * 10.0**power
    truth = moved[:, 64:]
    observed = torch.ones(3, 16)
    weight = torch.full((3, 1), 0.5)
    forecast = model(moved[:, :64])
    loss = md.distillation_loss(forecast, truth, observed, truth, weight)[0]
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1, 1e6, 1e12])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_labels_move_with_the_unit(teacher_folder, scale, offset):
    teacher = load_teacher(teacher_folder)
    context = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).double().cumsum(1)
    plain = teacher.forecast(context, 16, 16, "mean", 1).double()
    moved = teacher.forecast((context + offset) * scale, 16, 16, "mean", 1).double()
    error = (moved / scale - offset - plain).abs().max()
    assert error < 1e-3 * plain.abs().max() + 1e-6 * offset


UNITS = {"tiny": (1e-12, 0), "large": (1e12, 0), "offset": (1, 1e6)}  # (scale, offset)


@pytest.mark.parametrize("unit", UNITS)
def test_a_whole_run_on_extreme_units_scores_as_on_plain_ones(unit, tmp_path):
    errors = []
    for name, (scale, offset) in (("plain", (1, 0)), ("moved", UNITS[unit])):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(3):
            frame = hourly(200, seed=number)
            frame["value"] = frame["value"] * scale + offset
            frame.to_csv(folder / f"s{number}.csv", index=False)
        run = tmp_path / f"run {name}"
        flags = ["--alpha", 0, "--num_epochs", 1, "--data_dir", folder, "--save_dir", run]
        assert md.main([*QUICK.split(), *map(str, flags)]) == 0
        table = json.loads((run / "evaluation.json").read_text())
        errors.append(table["rows"]["student"]["mse"])
    assert errors[1] == pytest.approx(errors[0], rel=2e-3)


# -- untrusted files -------------------------------------------------------------------------------


def checkpoint_of(trained):
    """Content of the twin's checkpoint."""
    (file,) = (trained / "twin").glob("best_model_epoch_*.pt")
    return torch.load(file, weights_only=True)


def drop(content):
    del content["model_state_dict"]["head.weight"]


def add(content):
    content["model_state_dict"]["more.weight"] = torch.zeros(3)


def reshape(content):
    content["model_state_dict"]["head.bias"] = torch.zeros(17)


def poison(content):
    content["model_state_dict"]["head.bias"][3] = math.nan


CHANGES = {
    "a missing tensor": drop,
    "a tensor too many": add,
    "a tensor of another shape": reshape,
    "weights that are not finite": poison,
    "lengths of 10^9": lambda c: c["student_config"].update(context_length=10**9),
    "a horizon of 10^9": lambda c: c["student_config"].update(prediction_length=10**9),
    "10^9 layers": lambda c: c["student_config"].update(num_layers=10**9),
    "a width of 10^9": lambda c: c["student_config"].update(d_model=10**9),
    "no heads": lambda c: c["student_config"].update(num_heads=0),
    "heads that do not divide": lambda c: c["student_config"].update(num_heads=3),
    "a patch of -8": lambda c: c["student_config"].update(patch_size=-8),
    "a length that is text": lambda c: c["student_config"].update(context_length="64"),
    "an unknown setting": lambda c: c["student_config"].update(surprise=1),
    "no configuration": lambda c: c.update(student_config=[1, 2]),
    "weights that are none": lambda c: c.update(model_state_dict={"head.weight": "text"}),
    "a newer format": lambda c: c.update(format=99),
    "a format that is text": lambda c: c.update(format="1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_that_lies_is_one_line_and_costs_no_memory(trained, tmp_path, capsys, change):
    content = checkpoint_of(trained)
    CHANGES[change](content)
    torch.save(content, tmp_path / "a.pt")
    hourly(100).to_csv(tmp_path / "a.csv", index=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for argv in (
        ["predict", "--input", tmp_path / "a.csv", "--output", tmp_path / "out.csv"],
        ["export", "--format", "hub"],
    ):
        assert md.main([*map(str, argv), "--checkpoint", str(tmp_path / "a.pt")]) == 2
        assert str(tmp_path / "a.pt") in one_line(capsys.readouterr().err)
    assert not (tmp_path / "out.csv").exists()
    assert not (tmp_path / "hub").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_half_precision_weights_are_used_as_float32(trained, tmp_path):
    content = checkpoint_of(trained)
    weights = content["model_state_dict"]
    content["model_state_dict"] = {name: weight.half() for name, weight in weights.items()}
    torch.save(content, tmp_path / "a.pt")
    student = md.PatchStudent.from_pretrained(tmp_path / "a.pt")
    assert {weight.dtype for weight in student.parameters()} == {torch.float32}
    assert student(torch.randn(2, 64)).dtype == torch.float32


def test_a_checkpoint_works_in_another_folder_and_without_its_data(trained, tmp_path):
    (file,) = (trained / "twin").glob("best_model_epoch_*.pt")
    moved = tmp_path / "搬走 了" / "学生 1.pt"
    output = moved.parent / "预测.csv"
    moved.parent.mkdir()
    shutil.copy(file, moved)
    hourly(100).to_csv(tmp_path / "a.csv", index=False)
    argv = ["predict", "--checkpoint", moved, "--input", tmp_path / "a.csv", "--output", output]
    assert md.main([*map(str, argv)]) == 0
    assert len(output.read_text().splitlines()) == 1 + 16
    assert md.main(["export", "--checkpoint", str(moved), "--format", "hub"]) == 0
    assert (moved.parent / "hub" / "config.json").is_file()


@pytest.mark.parametrize("years", [-30, 30])
def test_a_clock_that_was_set_changes_nothing(data, teacher_folder, tmp_path, monkeypatch, years):
    argv = words(data, tmp_path, teacher_folder)
    assert md.main(argv) == 0
    strftime = time.strftime
    now = time.time() + years * 3e7
    monkeypatch.setattr(md.time, "strftime", lambda form, *_: strftime(form, time.localtime(now)))
    monkeypatch.setattr(md.time, "time", lambda: now)
    assert md.main([*argv, "--resume", "--num_epochs", "3"]) == 0
    for count in (1, 2):  # the same second twice
        assert md.main(argv) == 0
        assert len(list((tmp_path / "run").glob("old-*"))) == count
    (second,) = (tmp_path / "run").glob("old-*-1")
    assert md.read_checkpoint(second / "last.pt")["epoch"] == 2
