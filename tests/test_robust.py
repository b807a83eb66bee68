"""Nothing lost, nothing silent: full disks, two runs at once, extreme numbers, untrusted files, a moved checkpoint."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPT, SMALL, hourly
from hypothesis import given, settings
from hypothesis import strategies as st

import moirai_distill as m

sys.path.insert(0, str(SCRIPT.parent / "benchmarks"))
QUICK = (
    f"{SMALL} --num_epochs 2 --max_windows 20 --learning_rate 1e-3 --lang en --num_samples 5 --teacher_batch_size 16"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robust") / "data"
    folder.mkdir()
    for number in range(4):
        hourly(200, seed=number).to_csv(folder / f"s{number}.csv", index=False)
    return folder


def words(data, root, teacher, *more):
    """Words of a run below `root`."""
    flags = [*QUICK.split(), "--data_dir", data, "--save_dir", root / "run", "--label_cache", root / "labels"]
    return ["train", *map(str, [*flags, "--teacher_model", teacher, "--teacher_patch_size", 16, *more])]


def child(argv, limit=None, **settings):
    """A started child process of the script, which may write no file of more than `limit` bytes."""

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    settings |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(SCRIPT), *argv], preexec_fn=small_files if limit else None, **settings)


def one_line(errors):
    """The one line of an error, without progress bars and notes."""
    (line,) = [line for line in errors.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert "Traceback" not in errors
    return line


def digest(folder):
    """name -> bytes of all files of a folder, but for the pictures."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".png"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# -- a kill, a full disk, two at once ----------------------------------------------------------------------------------


def test_killed_at_random_moments_a_run_comes_to_the_same_end(tmp_path):
    from kill_and_resume import torture

    assert torture(tmp_path, kills=3, seed=3, epochs=6, windows=40, tell=print) == []


def test_a_disk_that_is_full_while_saving_leaves_the_earlier_checkpoint(data, teacher_folder, tmp_path):
    assert m.main(words(data, tmp_path, teacher_folder)) == 0
    before = digest(tmp_path / "run")
    done = child(words(data, tmp_path, teacher_folder, "--resume", "--num_epochs", 4), limit=20_000)
    _, errors = done.communicate(timeout=100)
    assert done.returncode == 2 and "last.pt: cannot be written (File too large)" in one_line(errors)
    after = digest(tmp_path / "run")
    assert after == before and m.read_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 2
    assert m.main(words(data, tmp_path, teacher_folder, "--resume", "--num_epochs", 4)) == 0


def test_a_disk_that_is_full_while_labelling_loses_no_block(data, teacher_folder, tmp_path):
    done = child(words(data, tmp_path, teacher_folder), limit=2000)  # the manifest and a block fit, all blocks do not
    _, errors = done.communicate(timeout=100)
    assert done.returncode == 2 and "labels.bin" in one_line(errors) and not (tmp_path / "run").exists()
    (folder,) = (tmp_path / "labels").iterdir()
    file = m.LabelFile(folder, m.read_manifest(folder))
    assert file.missing() == [] and not file.path.exists() and not list(folder.glob(".*"))
    assert m.main(words(data, tmp_path, teacher_folder)) == 0
    done = child(words(data, tmp_path / "b", teacher_folder), limit=300)  # not even the manifest
    _, errors = done.communicate(timeout=100)
    assert done.returncode == 2 and "manifest.json: cannot be written" in one_line(errors)


def test_two_runs_share_a_cache_at_the_same_time(data, teacher_folder, tmp_path):
    runs = []
    for name in "ab":
        argv = words(data, tmp_path, teacher_folder, "--max_windows", 60)
        argv[argv.index("--save_dir") + 1] = str(tmp_path / name)
        runs.append(child(argv, env=os.environ | {"OMP_NUM_THREADS": "1"}))
    for run in runs:
        _, errors = run.communicate(timeout=150)
        assert run.returncode == 0, errors
    (shared,) = (tmp_path / "labels").iterdir()
    assert m.main(words(data, tmp_path / "alone", teacher_folder, "--max_windows", 60)) == 0
    (alone,) = (tmp_path / "alone" / "labels").iterdir()
    assert shared.name == alone.name
    assert (shared / "labels.bin").read_bytes() == (alone / "labels.bin").read_bytes()
    weights = [
        m.open_student(folder)[1]["weights"] for folder in (tmp_path / "a", tmp_path / "b", tmp_path / "alone" / "run")
    ]
    assert len({*weights}) == 1


def test_what_a_dead_run_left_half_written_blocks_nobody(data, teacher_folder, tmp_path):
    assert m.main(words(data, tmp_path, teacher_folder)) == 0
    (folder,) = (tmp_path / "labels").iterdir()
    content = (folder / "labels.bin").read_bytes()
    (folder / "labels.bin").unlink()
    (folder / "blocks").mkdir()
    (folder / "blocks" / ".00000000.bin.4711.tmp").write_bytes(content[:100])
    (folder / "blocks" / "00000001.bin").write_bytes(content[:50])  # as after a power cut
    assert m.main(words(data, tmp_path, teacher_folder)) == 0
    assert (folder / "labels.bin").read_bytes() == content


def test_out_of_memory_while_training_is_one_line_and_the_last_epoch_stays(
    data, teacher_folder, tmp_path, capsys, monkeypatch
):
    assert m.main(words(data, tmp_path, teacher_folder)) == 0
    before, blend, calls = m.read_checkpoint(tmp_path / "run" / "last.pt"), m.blend, []

    def full(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore")
        return blend(*arguments)

    monkeypatch.setattr(m, "blend", full)
    capsys.readouterr()
    assert m.main(words(data, tmp_path, teacher_folder, "--resume", "--num_epochs", 4)) == 2
    assert "--batch_size" in one_line(capsys.readouterr().err)
    saved = m.read_checkpoint(tmp_path / "run" / "last.pt")
    assert saved["epoch"] == 2 and saved["loop"]["history"] == before["loop"]["history"]
    monkeypatch.undo()
    assert m.main(words(data, tmp_path, teacher_folder, "--resume", "--num_epochs", 3)) == 0


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(trained):
    return m.PatchStudent.from_pretrained(trained / "distilled").requires_grad_(False)


@settings(max_examples=60, deadline=None)
@given(
    scale=st.integers(-12, 12),
    offset=st.sampled_from([0.0, 1.0, -1e3, 1e9]),
    shape=st.sampled_from(["walk", "sine", "constant", "step", "spike"]),
    seed=st.integers(0, 99),
)
def test_forecasts_are_finite_and_move_with_scale_and_shift(student, scale, offset, shape, seed):
    rng = np.random.default_rng(seed)
    context = {
        "walk": rng.standard_normal(64).cumsum(),
        "sine": np.sin(np.arange(64) / 3 + seed),
        "constant": np.full(64, 3.0),
        "step": np.where(np.arange(64) == 63, 5.0, 1.0),
        "spike": np.where(np.arange(64) == 31, 1e4, 1.0),
    }[shape]
    plain = student(torch.from_numpy(context[None]))
    for kind in (torch.float32, torch.float64):
        moved = torch.from_numpy((context * 10.0**scale + offset)[None]).to(kind)
        result = student(moved)
        assert result.isfinite().all()
        deviation = float(m.instance_scale(moved.double())[1])
        if kind == torch.float32 and abs(offset) / deviation > 1e5 or 10.0**scale * context.std() < 1e-14 * abs(offset):
            continue  # the numbers themselves no longer hold the series
        expected = plain * 10.0**scale + offset
        error = float((result.double() - expected).abs().max())
        unit = 10.0**scale * max(1.0, float(plain.abs().max())) + 1e-7 * abs(offset) * (kind == torch.float32)
        unit += 1e-14 * abs(offset) * 1e3
        assert error < (2e-3 if kind == torch.float32 else 1e-4) * unit + 1e-6 * abs(offset) * (kind == torch.float32)


@settings(max_examples=20, deadline=None)
@given(st.integers(-12, 12), st.sampled_from(["walk", "constant", "step"]))
def test_loss_and_gradients_are_finite_at_every_scale(scale, shape):
    torch.manual_seed(0)
    model = m.PatchStudent(64, 16, 16, 1, 2, 8, 0.1)
    walk = torch.randn(3, 80).cumsum(1)
    rows = {"walk": walk, "constant": torch.full((3, 80), 2.0), "step": (torch.arange(80) == 63).float().expand(3, -1)}
    rows = rows[shape] * 10.0**scale
    loss = m.blend(model(rows[:, :64]), rows[:, 64:], torch.ones(3, 16), rows[:, 64:], torch.full((3, 1), 0.5))[0]
    loss.backward()
    assert loss.isfinite() and all(weight.grad.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1, 1e6, 1e12])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_labels_move_with_the_unit(teacher_folder, scale, offset):
    teacher = m.load_teacher(str(teacher_folder), None, "cpu", "32", print)
    context = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).double().cumsum(1)
    plain = teacher.forecast(context, 16, 16, "mean", 1).double()
    moved = teacher.forecast((context + offset) * scale, 16, 16, "mean", 1).double()
    assert ((moved / scale - offset) - plain).abs().max() < 1e-3 * plain.abs().max() + 1e-6 * offset


@pytest.mark.parametrize("values", ["tiny", "large", "offset"])
def test_a_whole_run_on_extreme_units_scores_as_on_plain_ones(values, tmp_path):
    scale, offset = {"tiny": (1e-12, 0), "large": (1e12, 0), "offset": (1, 1e6)}[values]
    results = []
    for name, s, o in (("plain", 1, 0), ("moved", scale, offset)):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(3):
            frame = hourly(200, seed=number)
            frame["value"] = frame["value"] * s + o
            frame.to_csv(folder / f"s{number}.csv", index=False)
        argv = [
            *QUICK.split(),
            "--alpha",
            "0",
            "--num_epochs",
            "1",
            "--data_dir",
            folder,
            "--save_dir",
            tmp_path / f"run {name}",
        ]
        assert m.main([*map(str, argv)]) == 0
        results.append(json.loads((tmp_path / f"run {name}" / "evaluation.json").read_text())["rows"]["student"]["mse"])
    assert results[1] == pytest.approx(results[0], rel=2e-3)


# -- untrusted files ---------------------------------------------------------------------------------------------------


def checkpoint_of(trained):
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
        assert m.main([*map(str, argv), "--checkpoint", str(tmp_path / "a.pt")]) == 2
        assert str(tmp_path / "a.pt") in one_line(capsys.readouterr().err)
    assert not (tmp_path / "out.csv").exists() and not (tmp_path / "hub").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_half_precision_weights_are_used_as_float32(trained, tmp_path):
    content = checkpoint_of(trained)
    content["model_state_dict"] = {name: weight.half() for name, weight in content["model_state_dict"].items()}
    torch.save(content, tmp_path / "a.pt")
    student = m.PatchStudent.from_pretrained(tmp_path / "a.pt")
    assert {weight.dtype for weight in student.parameters()} == {torch.float32}
    assert student(torch.randn(2, 64)).dtype == torch.float32


def test_a_checkpoint_works_in_another_folder_and_without_its_data(trained, tmp_path, capsys):
    (file,) = (trained / "twin").glob("best_model_epoch_*.pt")
    moved = tmp_path / "搬走 了" / "学生 1.pt"
    moved.parent.mkdir()
    shutil.copy(file, moved)
    hourly(100).to_csv(tmp_path / "a.csv", index=False)
    argv = ["predict", "--checkpoint", moved, "--input", tmp_path / "a.csv", "--output", moved.parent / "预测.csv"]
    assert m.main([*map(str, argv)]) == 0
    assert len((moved.parent / "预测.csv").read_text().splitlines()) == 17
    assert m.main(["export", "--checkpoint", str(moved), "--format", "hub"]) == 0
    assert (moved.parent / "hub" / "config.json").is_file()


@pytest.mark.parametrize("years", [-30, 30])
def test_a_clock_that_was_set_changes_nothing(data, teacher_folder, tmp_path, monkeypatch, years):
    assert m.main(words(data, tmp_path, teacher_folder)) == 0
    own, now = m.time.strftime, m.time.time() + years * 3e7
    monkeypatch.setattr(m.time, "strftime", lambda form, *_: own(form, m.time.localtime(now)))
    monkeypatch.setattr(m.time, "time", lambda: now)
    assert m.main(words(data, tmp_path, teacher_folder, "--resume", "--num_epochs", 3)) == 0
    for count in (1, 2):  # the same second twice
        assert m.main(words(data, tmp_path, teacher_folder)) == 0
        assert len(list((tmp_path / "run").glob("old-*"))) == count
    assert m.read_checkpoint(Path(next((tmp_path / "run").glob("old-*-1")), "last.pt"))["epoch"] == 2
