"""Several processes: the figures of one, labels to the bit, torchrun, --resume, a dead rank."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT
from test_training import FIXED, WINDOWS, history, load, write_csvs

import moirai_distill as md

RELATIVE = 1e-6  # of losses and errors of two processes against one
BATCH = WINDOWS - 1  # so that the last batch has 1 window for 2 processes
CHANGED = f"""
--alpha 0.5 --teacher_point median --teacher_batch_size 7
--batch_size {BATCH} --num_epochs 3 --dropout 0
""".split()
PYTHON = [sys.executable]
TORCHRUN = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """3 hourly CSVs with missing values, of which FIXED makes 48 training windows."""
    return write_csvs(tmp_path_factory.mktemp("devices") / "data")


def command(data, save_dir, teacher, *more):
    words = ["train", "--data_dir", data, "--save_dir", save_dir, *FIXED, *CHANGED]
    words += ["--teacher_model", teacher, *more]
    return [str(word) for word in words]


def run(launcher, words):
    """Output of the script as a child of `launcher`."""
    done = subprocess.run(
        [*launcher, str(SCRIPT), *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def figures(folder):
    """Every loss and error of a run: by epoch, and on the test windows."""
    table = json.loads(Path(folder, "evaluation.json").read_text())
    names = ("mse", "mae", "mase", "mse_by_step", "mae_by_step", "mse_by_series")
    errors = {name: table["rows"]["student"][name] for name in names}
    return history(folder), errors


def assert_same_figures(folder, reference):
    """Two runs of three epochs have the same losses and errors."""
    lines, errors = figures(folder)
    expected_lines, expected_errors = figures(reference)
    assert len(lines) == len(expected_lines) == 3
    for line, expected in zip(lines, expected_lines, strict=True):
        assert line == pytest.approx(expected, rel=RELATIVE, abs=1e-12)
    for name, expected in expected_errors.items():
        assert errors[name] == pytest.approx(expected, rel=RELATIVE, abs=1e-12)


@pytest.fixture(scope="module")
def single(data, teacher_folder, tmp_path_factory):
    """(folder of a run of one process, its label cache)."""
    root = tmp_path_factory.mktemp("single")
    words = command(data, root / "run", teacher_folder, "--label_cache", root / "labels")
    assert md.main(words) == 0
    return root / "run", root / "labels"


def test_two_processes_give_the_labels_of_one_to_the_bit_and_its_figures(
    data, single, teacher_folder, tmp_path
):
    """Nothing is clipped here, so that a wrong scale of the gradients would show."""
    _, single_cache = single
    two_cache = tmp_path / "labels"
    free = ["--max_grad_norm", 1e9, "--label_cache"]
    words = command(data, tmp_path / "two", teacher_folder, *free, two_cache, "--devices", 2)
    out = run(PYTHON, words)
    assert out.count("Epoch 1/3") == 1  # one process prints
    assert "Label cache hit" not in out  # both label
    (labels_of_one,) = single_cache.glob("*/labels.bin")
    (labels_of_two,) = two_cache.glob("*/labels.bin")
    assert labels_of_one.read_bytes() == labels_of_two.read_bytes()
    assert labels_of_one.parent.name == labels_of_two.parent.name

    assert md.main(command(data, tmp_path / "one", teacher_folder, *free, single_cache)) == 0
    assert_same_figures(tmp_path / "two", tmp_path / "one")
    # AdamW hides a wrong scale of the gradients in its steps, not in its state.
    state_of_two = load(tmp_path / "two")["optimizer_state_dict"]["state"]
    for number, state in load(tmp_path / "one")["optimizer_state_dict"]["state"].items():
        mean = state_of_two[number]["exp_avg"]
        torch.testing.assert_close(mean, state["exp_avg"], rtol=1e-3, atol=1e-6)


def test_torchrun_goes_on_with_the_run_of_one_process_and_one_with_theirs(
    data, single, teacher_folder, tmp_path, capsys
):
    single_run, cache = single
    words = command(data, tmp_path, teacher_folder, "--label_cache", cache)
    assert md.main([*words, "--num_epochs", "1"]) == 0
    out = run(TORCHRUN, [*words, "--num_epochs", "2", "--resume", "--devices", "2"])
    assert out.count("Epoch 2/2") == 1  # one process prints
    assert "Epoch 1/2" not in out
    assert "Label cache hit" in out
    lines = history(tmp_path)
    assert len(lines) == 2
    for line, expected in zip(lines, history(single_run)[:2], strict=True):
        assert line == pytest.approx(expected, rel=RELATIVE, abs=1e-12)
    capsys.readouterr()
    assert md.main([*words, "--resume"]) == 0
    out = capsys.readouterr().out
    assert out.count("Epoch 3/3") == 1
    assert "Epoch 2/3" not in out
    assert_same_figures(tmp_path, single_run)


def other_process(pid):
    """Number of the second process, which is a child of the first one, `pid`."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = []
    for child in children:
        if "moirai_distill" in Path(f"/proc/{child}/cmdline").read_text():
            found.append(int(child))
    (second,) = found
    return second


def is_running(pid):
    """Whether a process is there, and not a zombie."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # it is gone, or went while it was read
        return False


def wait_until(is_so, what):
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < 120, what
        time.sleep(0.1)


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds the second process in /proc"
)
def test_a_process_that_dies_ends_the_run_with_its_error(data, tmp_path):
    flags = ["--alpha", 0, "--num_epochs", 100_000, "--devices", 2]
    words = [*PYTHON, str(SCRIPT), *command(data, tmp_path / "run", "none", *flags)]
    out = tmp_path / "out"
    err = tmp_path / "err"
    with open(out, "w") as out_file, open(err, "w") as err_file:
        process = subprocess.Popen(words, stdout=out_file, stderr=err_file)
    pids = [process.pid]
    try:
        wait_until(lambda: "Epoch 3/" in out.read_text(), "the run does not begin")
        pids.append(other_process(process.pid))
        os.kill(pids[1], signal.SIGKILL)
        assert process.wait(timeout=60) != 0
        wait_until(lambda: not is_running(pids[1]), "the other process hangs")
    finally:
        for pid in pids:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
    told = r"terminated with code -9|Connection (reset|closed)"
    assert re.search(told, err.read_text()), err.read_text()[-2000:]
    assert (tmp_path / "run" / "last.pt").is_file()  # what was reached is kept


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds the second process in /proc"
)
def test_a_process_ends_with_the_one_that_started_it_while_it_begins(data, tmp_path):
    """No signal reaches it while it imports."""
    words = command(data, tmp_path / "run", "none", "--alpha", 0, "--devices", 2)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*PYTHON, str(SCRIPT), *words], **quiet)
    found = []

    def has_begun():
        with contextlib.suppress(OSError, ValueError):
            found.append(other_process(process.pid))
        return found

    wait_until(has_begun, "the second process does not begin")
    time.sleep(0.3)
    assert is_running(found[0])
    process.kill()
    process.wait()
    try:
        wait_until(lambda: not is_running(found[0]), "the second process goes on")
    finally:
        if is_running(found[0]):
            os.kill(found[0], signal.SIGKILL)


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds the second process in /proc"
)
def test_a_process_whose_parent_is_gone_before_it_looks_ends(tmp_path):
    """Its parent has other words than it has itself."""
    path = Path(SCRIPT).parent
    code = f"import sys; sys.path.insert(0, {str(path)!r}); import moirai_distill as md; "
    code += "md.end_with_parent()"
    child = subprocess.run([*PYTHON, "-c", code, "--devices", "2"], timeout=100, check=False)
    assert child.returncode == 1


def test_a_local_rank_alone_leaves_a_run_alone_and_loud(data, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    words = command(data, tmp_path / "run", "none", "--alpha", 0, "--num_epochs", 1)
    assert "Epoch 1/1" in run(PYTHON, words)


def test_an_allocation_without_srun_leaves_a_run_alone_and_loud(
    data, tmp_path, monkeypatch, capsys
):
    for name, value in {"NTASKS": "4", "PROCID": "0", "JOB_ID": "7"}.items():  # of a batch script
        monkeypatch.setenv(f"SLURM_{name}", value)
    words = command(data, tmp_path / "run", "none", "--alpha", 0, "--num_epochs", 1)
    assert md.main(words) == 0
    assert "Epoch 1/1" in capsys.readouterr().out


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_launcher_of_more_processes_than_are_asked_for_is_refused_once(
    data, tmp_path, monkeypatch, capsys, rank
):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert md.main(command(data, tmp_path / "run", "none", "--alpha", 0)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == (rank == "0") and not (tmp_path / "run").exists()
    assert rank == "1" or ("torchrun" in error and "--devices" in error and "--num_nodes" in error)
