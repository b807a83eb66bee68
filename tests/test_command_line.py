"""The command line: flags and defaults, problems told all at once, devices, languages, help."""

import argparse
import os
import subprocess
import sys

import pytest
import torch
from conftest import DEMO_TEACHER, SCRIPT, hourly

import moirai_distill as m

SHARED = {
    "data_dir": "data/datasets/Pretrain_Data",
    "max_files": 100,
    "columns": ["first"],
    "context_length": 720,
    "prediction_length": 96,
    "split_by": "auto",
    "split_ratio": (8, 1, 1),
    "split_seed": 0,
    "max_gap": 16,
    "season": "auto",
    "stride": 1,
    "max_windows": 1000,
    "teacher_model": "Salesforce/moirai-1.1-R-base",
    "teacher_revision": None,
    "teacher_patch_size": "auto",
    "teacher_point": "median",
    "num_samples": 100,
    "teacher_batch_size": 256,
    "teacher_precision": "32",
    "label_cache": "~/.cache/moirai_distill",
    "device": "auto",
    "devices": 1,
    "num_nodes": 1,
    "lang": "en",
}
TRAIN = SHARED | {
    "d_model": 128,
    "num_layers": 4,
    "num_heads": 8,
    "patch_size": 16,
    "dropout": 0.1,
    "alpha": 0.5,
    "batch_size": 32,
    "num_epochs": 10,
    "learning_rate": 1e-4,
    "weight_decay": 1e-5,
    "max_grad_norm": 1.0,
    "augment": "on",
    "patience": 0,
    "precision": "32-true",
    "seed": 0,
    "save_dir": "./checkpoints/moirai_distill",
    "resume": False,
    "demo": False,
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty current folder but for data/series.csv and the default data folder; English; no GPU."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "datasets" / "Pretrain_Data").mkdir(parents=True)
    hourly(300).to_csv(tmp_path / "data" / "series.csv", index=False)
    for name in ("LC_ALL", "LC_MESSAGES", "LANGUAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "en_US.UTF-8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return tmp_path


def run(capsys, *argv):
    """(exit code, stdout, stderr) of main."""
    try:
        code = m.main([*argv])
    except SystemExit as leave:  # argparse leaves this way after --help
        code = leave.code
    return code, *capsys.readouterr()


def problems(capsys, *argv):
    """Lines of the problems with the arguments, after the checks that hold for every refusal."""
    before = sorted(os.listdir())
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "") and err.startswith("error: ") and "Traceback" not in err
    assert sorted(os.listdir()) == before
    count, *lines = err.splitlines()
    assert int(count.removeprefix("error: ").split()[0]) == len(lines)
    return [line.strip() for line in lines]


@pytest.mark.parametrize(("command", "defaults"), [("train", TRAIN), ("label", SHARED)])
def test_every_flag_has_its_documented_default(command, defaults):
    found = vars(m.parse_arguments([command]))
    assert {name: found.get(name, "absent") for name in defaults} == defaults


def test_train_may_be_left_out():
    assert m.parse_arguments(["--seed", "3"]) == m.parse_arguments(["train", "--seed", "3"])
    assert m.parse_arguments(["--seed", "3"]).command == "train"


def test_given_values_replace_the_defaults():
    text = (
        "--alpha 0.25 --split_ratio 7:1.5:1.5 --columns a b --season 12 --teacher_patch_size 32 --max_files 0 --resume"
    )
    (m.Path("checkpoints/moirai_distill")).mkdir(parents=True)
    m.Path("checkpoints/moirai_distill/last.pt").touch()
    expected = {"alpha": 0.25, "split_ratio": (7, 1.5, 1.5), "columns": ["a", "b"], "season": 12}
    expected |= {"teacher_patch_size": 32, "max_files": 0, "resume": True}
    assert vars(m.parse_arguments(text.split())) == TRAIN | {"command": "train"} | expected


@pytest.mark.parametrize("command", ["train", "label"])
def test_help_shows_every_flag_with_its_default(command, capsys):
    code, out, err = run(capsys, *([] if command == "train" else [command]), "--help")
    assert (code, err) == (0, "")
    for name, value in (TRAIN if command == "train" else SHARED).items():
        entry = " ".join(out.partition(f"\n  --{name} ")[2].partition("\n  --")[0].split())
        shown = "first" if name == "columns" else "8:1:1" if name == "split_ratio" else str(value)
        assert shown in entry.partition("(default: ")[2], name


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[(f"--{name}", "many") for name, value in TRAIN.items() if type(value) in (int, float)],
        *[("--alpha", value) for value in ("-0.01", "1.01", "nan", "inf")],
        *[("--dropout", value) for value in ("-0.1", "1")],
        *[(flag, "0") for flag in ("--learning_rate", "--max_grad_norm", "--batch_size", "--num_epochs", "--stride")],
        *[(flag, "0") for flag in ("--d_model", "--num_layers", "--num_heads", "--patch_size", "--devices")],
        *[(flag, "0") for flag in ("--context_length", "--prediction_length", "--num_samples", "--teacher_batch_size")],
        *[(flag, "0") for flag in ("--season", "--teacher_patch_size", "--num_nodes")],
        *[(flag, "-1") for flag in ("--max_files", "--max_gap", "--max_windows", "--split_seed", "--patience")],
        *[(flag, "-1") for flag in ("--weight_decay", "--seed")],
        *[(flag, "2.5") for flag in ("--num_epochs", "--season", "--seed", "--context_length")],
        *[("--split_ratio", value) for value in ("8:1", "8:1:1:1", "8:0:1", "8:-1:1", "a:b:c", "8:1:inf", "")],
        ("--seed", str(2**64)),  # PyTorch takes no more than 64 bits
        ("--season", "monthly"),
        ("--teacher_patch_size", "big"),
        ("--teacher_point", "mode"),
        ("--teacher_precision", "16"),
        ("--precision", "64"),
        ("--split_by", "rows"),
        ("--lang", "fr"),
        *[("--device", value) for value in ("tpu", "cuda:x", "cuda:-1", "CPU")],
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_named_with_what_is_allowed(flag, value, capsys):
    (line,) = problems(capsys, flag, value)
    assert line.startswith(f"{flag}: {value!r} is not ") and len(line) > len(f"{flag}: {value!r} is not ")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--data_dir nowhere", ["--data_dir nowhere"]),
        ("--teacher_model ./nowhere --label_cache no_cache_yet", ["--teacher_model ./nowhere"]),
        ("--d_model 30", ["--num_heads 8", "--d_model 30"]),
        ("--context_length 8 --patch_size 9", ["--patch_size 9", "--context_length 8"]),
        ("--device cpu --teacher_precision bf16", ["--teacher_precision bf16", "32"]),
        ("--resume", ["--resume", "checkpoints/moirai_distill/last.pt"]),
        ("--resume --save_dir elsewhere", ["--resume", "elsewhere/last.pt"]),
        ("--save_dir data/series.csv", ["--save_dir data/series.csv"]),
        ("--save_dir data/series.csv/run", ["--save_dir data/series.csv/run"]),
        ("--label_cache data/series.csv/deep/er", ["--label_cache data/series.csv/deep/er"]),
        ("label --label_cache data/series.csv", ["--label_cache data/series.csv"]),
    ],
)
def test_arguments_that_contradict_each_other_or_the_disk_are_one_clear_line(argv, words, capsys):
    (line,) = problems(capsys, *argv.split())
    assert all(word in line for word in words), line


@pytest.mark.parametrize("flag", ["--save_dir", "--label_cache"])
def test_a_folder_without_write_permission_is_refused(flag, place, monkeypatch, capsys):
    (place / "locked").mkdir()
    (place / "locked").chmod(0o555)
    monkeypatch.setattr(os, "access", lambda path, mode: bool(os.stat(path).st_mode & 0o222))  # root may write anywhere
    (line,) = problems(capsys, flag, "locked/below")
    assert line.startswith(f"{flag} locked/below: ") and str(place / "locked") in line


def test_two_gpus_asked_for_where_there_is_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (line,) = problems(capsys, "--device", "cuda", "--devices", "2")
    assert line.startswith("--devices 2: ") and "1" in line.partition(": ")[2]
    (line,) = problems(capsys, "--device", "cuda:1")
    assert line.startswith("--device: 'cuda:1'")
    assert m.parse_arguments(["--device", "cuda:0"]).device == "cuda:0"


def test_one_gpu_by_number_and_two_devices_contradict_each_other(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (line,) = problems(capsys, "--device", "cuda:1", "--devices", "2")
    assert line.startswith("--devices 2: ") and "cuda:1" in line
    assert m.parse_arguments(["--device", "cuda", "--devices", "2"]).devices == 2


def test_all_problems_are_told_at_once_a_line_each(capsys):
    argv = (
        "--alpha 2 --num_epochs few --num_heads 7 --patch_size 999 --data_dir nowhere --split_by rows --resume --alfa=1"
    )
    lines = problems(capsys, *argv.split())
    starts = ["--alpha:", "--num_epochs:", "--split_by:", "--alfa=1:"]
    starts += ["--data_dir nowhere:", "--num_heads 7:", "--patch_size 999:", "--resume:"]
    assert len(lines) == len(starts) and all(any(line.startswith(start) for line in lines) for start in starts), lines


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--data-dir=data"], "--data_dir"),
        (["--alph=0.2"], "--alpha"),  # no abbreviations
        (["--epochs=5"], "--num_epochs"),
        (["label", "--learning-rate=1"], None),  # label does not learn
        (["--zzz"], None),
    ],
)
def test_an_unknown_flag_is_refused_with_the_nearest_known_one(argv, hint, capsys):
    (line,) = problems(capsys, *argv)
    assert line.startswith(f"{argv[-1]}: ")
    assert line.endswith(f"did you mean {hint}?") if hint else "did you mean" not in line


@pytest.mark.parametrize(
    "argv", [["--seed", "1", "label"], ["--seed", "1", "train"], ["label", "--stride", "1", "train"]]
)
def test_a_command_word_after_flags_is_an_error_that_says_where_it_goes(argv, capsys):
    (line,) = problems(capsys, *argv)
    assert line.startswith(f"{argv[-1]}: ") and "before" in line


@pytest.mark.parametrize("argv", [["--alpha"], ["--columns"], ["--resume=yes"]])
def test_a_flag_with_too_few_or_too_many_values_is_one_line(argv, capsys):
    code, out, err = run(capsys, *argv)
    assert (code, out, err.count("\n")) == (2, "", 1) and argv[0].partition("=")[0] in err and "Traceback" not in err


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_an_explicit_device_that_is_not_here_is_an_error_that_names_the_cpu(device, capsys):
    (line,) = problems(capsys, "--device", device)
    assert line.startswith(f"--device: {device!r}") and "--device cpu" in line


@pytest.mark.parametrize("command", ["train", "label"])
def test_without_a_gpu_the_default_device_is_the_cpu_and_says_so(command, capsys):
    (m.Path("data") / "series.csv").write_text("words\nonly\n")
    code, _, err = run(capsys, command, "--data_dir", "data")
    assert code == 2 and "no numeric column" in err  # it came as far as the data
    assert any("CPU" in line for line in err.splitlines() if line.startswith("note:"))


def test_demo_keeps_the_documented_defaults_but_for_its_own_folders_and_sizes():
    args, defaults = vars(m.parse_arguments(["--demo"])), TRAIN | {"demo": True, "command": "train"}
    changed = {name for name, value in args.items() if value != defaults.get(name, "absent")}
    own = {"data_dir", "label_cache", "save_dir"}
    assert all(args[name].startswith("checkpoints/demo/") for name in own)  # all that it writes
    assert len({args[name] for name in own}) == 3
    assert args["teacher_model"] == str(DEMO_TEACHER)
    assert changed == own | {"teacher_model", "max_windows", "num_epochs", "learning_rate"}


@pytest.mark.parametrize("before", [True, False])
def test_a_flag_given_beside_demo_wins(before):
    flags = ["--num_epochs", "10", "--save_dir", "mine", "--max_windows", "1000"]  # two of them the usual defaults
    argv = [*flags, "--demo"] if before else ["--demo", *flags]
    args, demo = vars(m.parse_arguments(argv)), vars(m.parse_arguments(["--demo"]))
    assert args == demo | {"num_epochs": 10, "save_dir": "mine", "max_windows": 1000}


def test_demo_never_overwrites_files_of_the_user(place, capsys):
    mine = place / "data" / "series_00.csv"  # a name that the demo uses
    hourly(300).to_csv(mine, index=False)
    before = mine.read_bytes()
    run(capsys, "--demo", "--data_dir", "data", "--columns", "nosuch", "--device", "cpu")
    assert mine.read_bytes() == before


def test_alpha_0_asks_for_no_teacher(place):
    args = m.parse_arguments(["--alpha", "0", "--teacher_model", str(place / "nowhere")])
    assert args.alpha == 0


@pytest.mark.parametrize(
    ("variables", "language"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_TW.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "", "LC_ALL": "zh_CN"}, "zh"),
    ],
)
def test_the_language_follows_the_locale_and_lang_beats_it(variables, language, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert m.parse_arguments([]).lang == language
    assert [m.parse_arguments(["--lang", lang]).lang for lang in ("en", "zh")] == ["en", "zh"]


def test_results_are_chinese_in_a_chinese_locale_and_errors_english(monkeypatch, capsys):
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    argv = ["--data_dir", "data", "--columns", "nosuch", "--device", "cpu"]
    code, out, err = run(capsys, *argv)
    assert out.splitlines()[:3] == ["数据目录: data", "上下文长度: 720", "预测长度: 96"]
    assert code == 2 and err.isascii() and "error: " in err and "no column nosuch" in err
    english = run(capsys, *argv, "--lang", "en")[1]
    assert english.splitlines()[:3] == ["Data directory: data", "Context length: 720", "Prediction length: 96"]


def test_the_script_itself_ends_with_code_2_and_no_traceback(place):
    command = [sys.executable, str(SCRIPT), "--alpha", "2", "--device", "tpu"]
    child = subprocess.run(command, capture_output=True, text=True, cwd=place, env=dict(os.environ), check=False)
    assert (child.returncode, child.stdout) == (2, "") and "Traceback" not in child.stderr
    assert {line.split(":")[0].strip() for line in child.stderr.splitlines()[1:]} == {"--alpha", "--device"}


def test_a_successful_command_returns_0(capsys):
    run_list = ("label", "--list", "--label_cache", "empty", "--lang", "en")
    assert run(capsys, *run_list) == (0, "No label files in empty\n", "")


def test_parsing_returns_a_plain_namespace():
    assert type(m.parse_arguments([])) is argparse.Namespace
