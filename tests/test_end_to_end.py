"""Whole runs as a user sees them: the lines they print, the files they leave, the demo."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SCRIPT, SMALL, hourly, split_folder

import moirai_distill as md
from moirai_distill import PatchStudent, main

# Nothing that is printed or written depends on a default of the script. The season is not that of
# the series, so that the second epoch adds to the first.
QUICK = f"{SMALL} --num_epochs 2 --learning_rate 1e-3 --batch_size 32 --patience 0 --stride 1"
QUICK += " --split_by auto --split_ratio 8:1:1 --max_files 0 --columns first --season 23"
QUICK += " --teacher_precision 32"
NUMBER = r"(\d+\.\d{4})"
LINES = {  # in this order; {} are the values that the test knows
    "zh": r"""数据目录: {data}
上下文长度: 64
预测长度: 16

创建数据集...
找到 12 个 CSV 文件
使用 10 个文件用于 train 集
数据集加载完成: 100 个样本

加载教师模型...
加载教师模型: {teacher}
教师模型加载成功

创建学生模型...
学生模型参数量: {parameters}

开始训练，共 2 个 epoch
模型保存目录: {folder}

Epoch 1/2
训练损失: {train_loss} (MSE: {train_mse}, Distill: {train_distill})
验证损失: {validation_mse}
保存最佳模型: {folder}/best_model_epoch_1.pt""",
    "en": r"""Data directory: {data}
Context length: 64
Prediction length: 16

Creating datasets...
Found 12 CSV files
Using 10 files for the train set
Datasets loaded: 100 samples

Loading teacher...
Loading teacher: {teacher}
Teacher loaded

Creating student...
Student parameters: {parameters}

Training for 2 epochs
Checkpoints: {folder}

Epoch 1/2
Training loss: {train_loss} (MSE: {train_mse}, Distill: {train_distill})
Validation loss: {validation_mse}
Saved best model: {folder}/best_model_epoch_1.pt""",
}


def run_script(words, cwd, **environment):
    """The finished child process of the script with these words."""
    words = [sys.executable, str(SCRIPT), *map(str, words)]
    environment = os.environ | {name: str(value) for name, value in environment.items()}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, timeout=200)


def history(folder):
    """The metrics of each epoch."""
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs of this process draw nothing."""
    monkeypatch.setattr(md, "draw", lambda _path, _panels: None)


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_a_run_prints_the_known_lines_in_order_with_the_numbers_of_its_files(
    csv_folder, teacher_folder, tmp_path, no_pictures, capsys, lang
):
    folder = tmp_path / "保存 目录" / "run 1"
    flags = f"{QUICK} --max_windows 10 --teacher_patch_size 16 --teacher_point mean --alpha 0.5"
    paths = ["--data_dir", csv_folder, "--save_dir", folder, "--teacher_model", teacher_folder]
    paths += ["--label_cache", tmp_path / "labels"]
    assert main(["train", *map(str, paths), *flags.split(), "--lang", lang]) == 0
    out, progress = capsys.readouterr()

    first, second = history(folder)
    values = {name: f"{value:.4f}" for name, value in first.items() if isinstance(value, float)}
    values |= {"data": csv_folder, "teacher": teacher_folder, "folder": folder}
    student = PatchStudent.from_pretrained(folder)
    values["parameters"] = f"{sum(weight.numel() for weight in student.parameters()):,}"
    printed = out.splitlines()
    at = -1
    for line in LINES[lang].format(**values).splitlines():
        assert line in printed[at + 1 :], f"{line!r} is not after {printed[at]!r} in\n{out}"
        at = printed.index(line, at + 1)

    rest = out[out.index("Epoch 2/2") :]
    assert f"{second['validation_mse']:.4f}" in rest
    assert f"{folder}/best_model_epoch_2.pt" in rest
    assert Path(folder, "best_model_epoch_2.pt").is_file()
    for name in ("student", "seasonal-naive"):
        assert re.search(rf"^ *{name} +MSE {NUMBER}", rest, re.M)

    assert "\r" not in out
    assert "it/s" not in out
    assert "epoch 1:" not in progress  # nor has stderr a bar where it is no terminal
    for result in ("MSE: ", "Distill: ", printed[-3]):
        assert result not in progress


def test_english_and_chinese_runs_say_nothing_of_the_other_language(
    csv_folder, tmp_path, no_pictures, capsys
):
    flags = f"{QUICK} --alpha 0 --max_windows 4 --num_epochs 1"
    paths = ["--data_dir", str(csv_folder), "--save_dir", str(tmp_path / "run")]
    for lang in ("en", "zh"):
        assert main([*paths, *flags.split(), "--lang", lang]) == 0
        has_chinese = re.search(r"[\u4e00-\u9fff]", capsys.readouterr().out) is not None
        assert has_chinese == (lang == "zh")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """(child process, its save_dir) of a run with alpha 0, from another folder, without uni2ts.

    Its console knows ASCII alone.
    """
    root = tmp_path_factory.mktemp("elsewhere")
    for name in ("data", "cwd", "blocked"):
        (root / name).mkdir()
    for number in range(3):
        hourly(200, seed=number).to_csv(root / "data" / f"s{number}.csv", index=False)
    for name in ("uni2ts", "gluonts", "jax"):
        (root / "blocked" / f"{name}.py").write_text("raise ImportError('blocked')")
    flags = f"--data_dir ../data --alpha 0 {QUICK} --max_windows 0 --lang zh"
    path = os.pathsep.join(filter(None, [str(root / "blocked"), os.environ.get("PYTHONPATH")]))
    done = run_script(
        ["--save_dir", "结果/run 1", *flags.split()],
        root / "cwd",
        PYTHONPATH=path,
        PYTHONIOENCODING="ascii",
    )
    return done, root / "cwd" / "结果" / "run 1"


def unescaped(output):
    """The text that an ASCII console shows with escapes."""
    return output.decode("ascii").encode().decode("unicode_escape")


def test_a_run_works_from_any_folder_with_paths_of_that_folder(elsewhere):
    done, folder = elsewhere
    assert done.returncode == 0, done.stderr.decode()
    assert os.listdir(folder.parent.parent) == ["结果"]
    assert len(history(folder)) == 2
    assert PatchStudent.from_pretrained(folder).context_length == 64


def test_an_ascii_console_shows_escapes_instead_of_a_crash(elsewhere):
    done, folder = elsewhere
    assert b"\\u6570" in done.stdout
    out = unescaped(done.stdout)
    assert "数据目录: ../data" in out
    assert "验证损失: " in out
    assert f"{history(folder)[-1]['validation_mse']:.4f}" in out
    assert "Traceback" not in done.stderr.decode("ascii")


def test_alpha_0_needs_no_uni2ts_and_loads_no_teacher(elsewhere):
    done, _ = elsewhere
    assert done.returncode == 0
    assert "教师" not in unescaped(done.stdout)


def test_the_demo_compares_student_teacher_and_naive_and_writes_in_its_folder_alone(
    tmp_path, monkeypatch, capsys
):
    home = tmp_path / "home"
    cwd = tmp_path / "cwd"
    home.mkdir()
    cwd.mkdir()
    flags = f"--demo {QUICK} --max_files 10 --num_epochs 1 --max_windows 4 --num_samples 3"
    flags += " --season auto"
    flags += " --teacher_patch_size auto --teacher_point median --alpha 0.5 --lang en"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(cwd)
    assert main(flags.split()) == 0
    out = capsys.readouterr().out
    assert "Found 20 CSV files" in out
    found = re.findall(rf"^ *(\S+) +MSE {NUMBER}", out[out.index("Epoch 1/1") :], re.M)
    mse = {name: float(value) for name, value in found}
    assert {"student", "teacher", "seasonal-naive"} <= mse.keys()

    assert os.listdir(cwd) == ["checkpoints"]
    assert os.listdir(cwd / "checkpoints") == ["demo"]
    assert not any(path.is_file() for path in home.rglob("*"))
    run = cwd / "checkpoints" / "demo" / "run"
    assert (run / "forecast.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(history(run)) == 1

    test = split_folder(run.parent / "data", max_files=10, max_windows=4).windows["test"]
    assert len(test) == 1500 - 80 + 1
    context, truth, _ = test.batch(np.arange(len(test)))
    student = PatchStudent.from_pretrained(run).requires_grad_(False)
    forecasts = {
        "student": student(context),
        "seasonal-naive": context[:, -24:-8],  # hourly: the same hours of the day before
    }
    for name, forecast in forecasts.items():
        error = (forecast - truth).double().square().mean()
        assert mse[name] == pytest.approx(float(error), abs=6e-5)
    assert mse["teacher"] not in (mse["student"], mse["seasonal-naive"])


def test_a_failing_run_is_one_line_on_stderr_and_exit_code_2(csv_folder, tmp_path, capsys):
    (tmp_path / "teacher").mkdir()  # which holds no model
    paths = ["--data_dir", csv_folder, "--teacher_model", tmp_path / "teacher"]
    paths += ["--save_dir", tmp_path / "run", "--label_cache", tmp_path / "labels"]
    assert main([*QUICK.split(), "--alpha", "0.5", *map(str, paths)]) == 2
    out, errors = capsys.readouterr()
    (error,) = errors.split("error: ")[1:]
    assert str(tmp_path / "teacher") in error
    assert len(error.splitlines()) == 1
    assert "Traceback" not in errors
    assert "error" not in out
    assert not (tmp_path / "run").exists()  # no training on labels that were never made
