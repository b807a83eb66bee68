"""Several processes: the figures of one, labels to the bit, --resume across their number, torchrun, a dead rank."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SCRIPT, SMALL
from test_training import write_csvs

import moirai_distill as md

FLAGS = f"{SMALL} --max_windows 16 --batch_size 47 --num_epochs 2 --learning_rate 1e-3 --dropout 0 --lang en".split()
RELATIVE = 1e-6  # of losses and errors of two processes against one


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """3 hourly CSVs with missing values: 48 training windows, so that the last batch has 1 for 2 processes."""
    return write_csvs(tmp_path_factory.mktemp("devices") / "data")


def command(data, save_dir, teacher, *more):
    teach = [
        "--teacher_model",
        teacher,
        "--teacher_patch_size",
        "16",
        "--num_samples",
        "5",
        "--teacher_batch_size",
        "7",
    ]
    return [*map(str, ["--data_dir", data, "--save_dir", save_dir, *FLAGS, *teach, *more])]


def run(launcher, words, code=0):
    """Output of the script as a child of `launcher`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(SCRIPT), *words], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout


def figures(folder):
    """Every loss and error of a run: by epoch, and on the test windows."""
    history = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    student = json.loads(Path(folder, "evaluation.json").read_text())["rows"]["student"]
    errors = {name: student[name] for name in ("mse", "mae", "mase", "mse_by_step", "mae_by_step", "mse_by_series")}
    return history, errors


def assert_same(one, two):
    assert len(one[0]) == len(two[0]) == 2
    for first, second in zip(one[0], two[0], strict=True):
        assert second == pytest.approx(first, rel=RELATIVE, abs=1e-12)
    for name, value in one[1].items():
        assert two[1][name] == pytest.approx(value, rel=RELATIVE, abs=1e-12)


@pytest.fixture(scope="module")
def single(data, teacher_folder, tmp_path_factory):
    """(folder of a run of one process, its label cache)."""
    root = tmp_path_factory.mktemp("single")
    assert md.main(command(data, root / "run", teacher_folder, "--label_cache", root / "labels")) == 0
    return root / "run", root / "labels"


def test_two_processes_give_the_labels_of_one_to_the_bit_and_its_figures(data, single, teacher_folder, tmp_path):
    words = command(data, tmp_path / "run", teacher_folder, "--label_cache", tmp_path / "labels", "--devices", 2)
    out = run([sys.executable], words)
    assert out.count("Epoch 1/2") == 1 and "Label cache hit" not in out  # one process prints; both label
    one, two = (next(cache.glob("*/labels.bin")) for cache in (single[1], tmp_path / "labels"))
    assert one.read_bytes() == two.read_bytes() and one.parent.name == two.parent.name
    assert_same(figures(single[0]), figures(tmp_path / "run"))


def test_torchrun_starts_the_same_run(data, single, teacher_folder, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    out = run(launcher, command(data, tmp_path / "run", teacher_folder, "--label_cache", single[1], "--devices", 2))
    assert out.count("Epoch 1/2") == 1 and "Label cache hit" in out
    assert_same(figures(single[0]), figures(tmp_path / "run"))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(data, single, teacher_folder, tmp_path, before, after):
    words = command(data, tmp_path / "run", teacher_folder, "--label_cache", single[1])
    run([sys.executable], [*words, "--num_epochs", "1", "--devices", str(before)])
    out = run([sys.executable], [*words, "--resume", "--devices", str(after)])
    assert "Epoch 2/2" in out and "Epoch 1/2" not in out
    assert_same(figures(single[0]), figures(tmp_path / "run"))


def children(pid):
    """Process numbers of the children of a process."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the second process in /proc")
@pytest.mark.parametrize("victim", ["first", "second"])
def test_a_process_that_dies_ends_the_run_with_its_error(data, tmp_path, victim):
    words = command(data, tmp_path / "run", "none", "--alpha", "0", "--num_epochs", "100000", "--devices", "2")
    with open(tmp_path / "err", "w") as errors:
        child = subprocess.Popen(
            [sys.executable, str(SCRIPT), *words], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    for line in child.stdout:
        if line.startswith("Epoch 3/"):
            break
    (second,) = [pid for pid in children(child.pid) if "moirai_distill" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(child.pid if victim == "first" else second, signal.SIGKILL)
    begin = time.monotonic()
    child.stdout.read()
    assert child.wait(timeout=60) != 0
    while Path(f"/proc/{second}/stat").exists() and " Z " not in Path(f"/proc/{second}/stat").read_text():
        assert time.monotonic() - begin < 60, "the other process hangs"
        time.sleep(0.2)
    err = (tmp_path / "err").read_text()
    assert re.search(r"terminated with code -9|Connection (reset|closed)", err), err[-2000:]
    assert (tmp_path / "run" / "last.pt").is_file()  # what was reached is kept
