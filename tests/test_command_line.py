"""The command line: flags, problems told all at once, devices, languages, help.

No test knows a default: what it does not ask about is given, and what it compares with is what the
parser says. That the defaults are those of the guide is checked by .ci/check_docs.py.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import DEMO_TEACHER, SCRIPT, hourly

import moirai_distill as md

DATA = "data_dir max_files context_length prediction_length split_by split_ratio split_seed"
DATA += " max_gap season stride max_windows"
TEACHER = "teacher_model teacher_revision teacher_patch_size teacher_point num_samples"
TEACHER += " teacher_batch_size teacher_precision quantiles label_cache"
MACHINE = "device devices num_nodes lang"
STUDENT = "d_model num_layers num_heads patch_size dropout"
TRAINING = "alpha batch_size num_epochs learning_rate weight_decay max_grad_norm augment patience"
TRAINING += " precision seed save_dir resume init_from demo"
READING = "columns time_column time_format id_columns encoding skip_rows decimal thousands"
READING += " na_values max_file_mb"
FLAGS = {
    "train": f"{DATA} {READING} {TEACHER} {MACHINE} {STUDENT} {TRAINING}",
    "label": f"{DATA} {READING} {TEACHER} {MACHINE} list",
    "evaluate": (
        f"{DATA} {READING} {TEACHER} {MACHINE}"
        " checkpoint with_teacher with_forecaster horizon output_dir"
    ),
    "predict": f"{READING} checkpoint input output horizon levels plot backtest lang",
    "export": "checkpoint format int8 output lang",
}
REQUIRED = {
    "train": "",
    "label": "",
    "evaluate": "--checkpoint a/b",
    "predict": "--checkpoint a/b --input data/series.csv",
    "export": "--checkpoint a/b --format hub",
}

# What is given in each command line, before what a test gives: the last one of a flag counts.
GIVEN = "--data_dir data --label_cache labels --teacher_model some/model"
GIVEN += " --context_length 64 --prediction_length 16"
MACHINE_GIVEN = "--device auto --devices 1 --num_nodes 1 --teacher_precision 32"
GIVEN_TO_TRAIN = "--save_dir run --d_model 16 --num_heads 2 --patch_size 8 --alpha 0.5"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty current folder, but for data/series.csv; English; no GPU; a home of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    hourly(300).to_csv(tmp_path / "data" / "series.csv", index=False)
    for name in ("LC_ALL", "LC_MESSAGES", "LANGUAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "en_US.UTF-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return tmp_path


def words(*argv):
    """The words of a command line that begins with what is given; `train` may be left out."""
    command = [word for word in argv[:1] if word in md.COMMANDS]
    given = []
    if command in ([], ["train"], ["label"]):
        given += GIVEN.split()
    if command in ([], ["train"], ["label"], ["evaluate"]):
        given += MACHINE_GIVEN.split()
    if command in ([], ["train"]):
        given += GIVEN_TO_TRAIN.split()
    return [*command, *given, *argv[len(command) :]]


def parse(*argv):
    """The arguments (a dict) of a command line that begins with what is given."""
    return vars(md.parse_arguments(words(*argv)))


def defaults(command):
    """The defaults (a dict) of a command, as the parser has them."""
    return vars(md.build_parser(demo=False).parse_args([command, *REQUIRED[command].split()]))


def run(capsys, *argv):
    """(exit code, stdout, stderr) of main."""
    try:
        code = md.main([*argv])
    except SystemExit as leave:  # argparse leaves this way after --help
        code = leave.code
    return code, *capsys.readouterr()


def refusal(capsys, *argv):
    """What stderr holds, after the checks that are the same for every refusal."""
    before = sorted(os.listdir())
    code, out, err = run(capsys, *words(*argv))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert sorted(os.listdir()) == before
    return err


def problems(capsys, *argv):
    """Lines of the problems with the arguments, which are counted above them."""
    count, *lines = refusal(capsys, *argv).splitlines()
    assert count == f"error: {len(lines)} problem(s) with the arguments"
    return [line.strip() for line in lines]


# -- Flags and their values ------------------------------------------------------------------------


@pytest.mark.parametrize("command", md.COMMANDS)
def test_every_command_has_its_flags(command):
    assert defaults(command).keys() - {"command"} == {*FLAGS[command].split()}


@pytest.mark.parametrize("command", ["train", "label"])
def test_what_is_not_given_is_the_default(command):
    not_given = {f"--{name}" for name in defaults(command)} - {*words(command)}
    assert len(not_given) > 10
    found = parse(command)
    for flag in not_given:
        name = flag.removeprefix("--")
        assert found[name] == defaults(command)[name]


def test_train_may_be_left_out():
    assert parse("--seed", "3") == parse("train", "--seed", "3")
    assert parse("--seed", "3")["command"] == "train"


def test_given_values_replace_the_defaults():
    Path("run").mkdir()
    Path("run/last.pt").touch()
    text = "--alpha 0.25 --split_ratio 7:1.5:1.5 --columns a b --season 12 --teacher_patch_size 32"
    text += " --max_files 0 --learning_rate 2e-3 --teacher_point mean --resume"
    expected = {
        "alpha": 0.25,
        "split_ratio": (7, 1.5, 1.5),
        "columns": ["a", "b"],
        "season": 12,
        "teacher_patch_size": 32,
        "max_files": 0,
        "learning_rate": 0.002,
        "teacher_point": "mean",
        "resume": True,
    }
    assert parse(*text.split()) == parse() | expected


def test_patches_follow_a_short_context_unless_they_are_given():
    usual = defaults("train")["patch_size"]
    flags = ["train", *MACHINE_GIVEN.split(), "--data_dir", "data", "--label_cache", "labels"]
    flags += ["--alpha", "0"]

    def patch_of(*more):
        return md.parse_arguments([*flags, *more]).patch_size

    assert patch_of("--context_length", str(usual)) == usual
    assert patch_of("--context_length", str(usual + 1)) == usual
    short = max(2, usual - 1)
    if short < usual:
        assert patch_of("--context_length", str(short)) == short // 2
    for given in (["--patch_size", "9"], ["--patch_size=9"]):
        with pytest.raises(md.UserError, match="--patch_size 9: longer than"):
            patch_of("--context_length", "8", *given)
        assert patch_of("--context_length", "9", *given) == 9


def test_a_number_that_may_be_auto_may_be_auto():
    flags = ("season", "teacher_patch_size", "alpha")
    for name in flags:
        assert parse(f"--{name}", "auto")[name] == "auto"


@pytest.mark.parametrize("command", ["train", "label"])
def test_help_shows_every_flag_with_its_default(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "500")  # no flag or value is broken
    code, out, err = run(capsys, command, "--help")
    assert (code, err) == (0, "")
    given = {word for word in REQUIRED[command].split() if word.startswith("--")}
    for name, value in defaults(command).items():
        if name == "command" or f"--{name}" in given:
            continue
        if name == "split_ratio":
            value = ":".join(f"{share:g}" for share in value)
        rest = out.partition(f"\n  --{name} ")[2]
        entry, *_ = re.split(r"\n  --|\n\n|\n$", rest)
        assert entry.endswith(f"(default: {value})"), entry


@pytest.mark.parametrize("command", md.COMMANDS)
def test_every_command_has_a_help_that_names_its_flags(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "500")
    code, out, err = run(capsys, command, "--help")
    assert (code, err) == (0, "")
    for name in FLAGS[command].split():
        assert f"\n  --{name} " in out, name


def test_the_first_help_says_what_it_is_which_commands_there_are_and_what_to_type(capsys):
    for word in ("--help", "-h"):
        code, out, err = run(capsys, word)
        assert (code, err) == (0, "")
        assert md.__doc__.partition("\n")[0] in out
        for command in md.COMMANDS:
            assert re.search(rf"^    {command} +\S", out, re.M)
        assert "--d_model" not in out  # the flags are in the helps of the commands
        assert out.count("python moirai_distill.py --demo") == 1
        assert all(len(line) <= 100 for line in out.splitlines())
    joined = out.replace("\\\n", " ")
    shown = re.findall(r"^  python moirai_distill\.py (.*)$", joined, re.M)
    assert len(shown) == 3
    Path("my.csv").write_text("a")
    Path("checkpoints/mine").mkdir(parents=True)
    flags = md.build_parser(demo=False)
    for line in shown:
        typed = shlex.split(line)
        full = typed if typed[0] in md.COMMANDS else ["train", *typed]
        assert flags.parse_known_args(full)[1] == []


def test_without_arguments_and_without_data_it_says_what_to_type_the_demo_first(capsys):
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    commands = re.findall(r"^  python moirai_distill\.py (.*)$", err, re.M)
    assert commands[0] == "--demo"
    assert len(commands) == 3
    assert "problem(s)" not in err


def test_without_arguments_the_usual_data_is_trained_on_where_it_is(monkeypatch, capsys):
    folder = Path(defaults("train")["data_dir"])
    folder.mkdir(parents=True)
    seen = []
    monkeypatch.setattr(md, "train", lambda args, *_: seen.append(args.data_dir))
    assert run(capsys)[0] == 0
    assert seen == [str(folder)]


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("trian", "train"),
        ("evalute", "evaluate"),
        ("data", "--data_dir data"),
        ("xyzzy", None),
    ],
)
def test_a_first_word_that_is_no_command_is_one_line_with_the_nearest_one(word, hint, capsys):
    code, out, err = run(capsys, word, "--checkpoint", "x")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith(f"error: {word}: not a command; these are {', '.join(md.COMMANDS)}")
    assert ("did you mean" in err) == (hint is not None)
    if hint:
        assert err.endswith(f"did you mean {hint}?\n")


@pytest.mark.parametrize("name", ["data/nope", "a/b/c", "a\\b", "C:\\runs", "nope", "./x", "x.pt"])
def test_a_checkpoint_that_looks_like_a_path_is_answered_at_once(name, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)  # the hub is not asked
    (line,) = problems(capsys, "export", "--checkpoint", name, "--format", "onnx")
    assert line == f"--checkpoint {name}: no such file or folder"


def test_a_checkpoint_of_the_form_of_a_hub_id_may_be_one():
    args = md.parse_arguments(["export", "--checkpoint", "me/my-student_v1.0", "--format", "hub"])
    assert args.checkpoint == "me/my-student_v1.0"


# -- Defaults that were edited in the script -------------------------------------------------------


def edited(monkeypatch, **changes):
    """Make build_parser that of a script whose defaults were edited."""
    build = md.build_parser

    def build_edited(demo):
        parser = build(demo)
        (commands,) = [action for action in parser._actions if action.dest == "command"]
        for command in ("train", "label"):
            known = {action.dest for action in commands.choices[command]._actions}
            own = {name: value for name, value in changes.items() if name in known}
            commands.choices[command].set_defaults(**own)
        return parser

    monkeypatch.setattr(md, "build_parser", build_edited)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("batch_size", 2.5, "a whole number"),
        ("num_epochs", True, "a whole number"),
        ("num_epochs", None, "a whole number"),
        ("learning_rate", [1e-3], "a number"),
        ("season", 12.0, "a whole number or 'auto'"),
        ("alpha", None, "a number or 'auto'"),
        ("columns", "value", "a list of texts"),
        ("columns", [1], "a list of texts"),
        ("split_by", "rows", "one of auto, files, time"),
        ("augment", True, "one of on, off"),
        ("teacher_precision", 32, "one of 32, bf16"),
        ("split_ratio", (8, 1, 1), "a text in quotes"),
        ("label_cache", 5, "a text in quotes"),
        ("save_dir", None, "a text in quotes"),
        ("resume", "yes", "True or False"),
    ],
)
def test_an_edited_default_of_a_wrong_kind_is_one_line(name, value, allowed, monkeypatch, capsys):
    edited(monkeypatch, **{name: value})
    code, out, err = run(capsys, "train")
    assert (code, out) == (2, "")
    count, line = err.splitlines()
    assert count == "error: 1 problem(s) with the defaults in the script"
    assert line.strip().startswith(f"--{name} {value!r}: must be {allowed}")


@pytest.mark.parametrize(
    ("name", "value"), [("alpha", 2), ("batch_size", 0), ("dropout", -1), ("learning_rate", 0)]
)
def test_an_edited_default_out_of_range_is_the_line_of_the_flag(name, value, monkeypatch, capsys):
    (of_flag,) = problems(capsys, f"--{name}", str(value))
    edited(monkeypatch, **{name: value})
    given = iter(words())
    argv = [w for w in given if w != f"--{name}" or next(given) is None]
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert of_flag.partition(": ")[2] in err and f"--{name} {value}" in err


@pytest.mark.parametrize(
    ("name", "value"), [("seed", "many"), ("split_ratio", "8:1"), ("alpha", "x")]
)
def test_an_edited_default_that_is_a_wrong_text_is_argparses_line(name, value, monkeypatch, capsys):
    edited(monkeypatch, **{name: value})
    given = iter(words())
    argv = [w for w in given if w != f"--{name}" or next(given) is None]
    code, _, err = run(capsys, *argv)
    assert code == 2 and err.count("\n") == 1
    assert err.startswith(f"error: argument --{name}: ")


def test_defaults_may_be_edited_in_any_way_that_a_flag_can_be_typed(monkeypatch):
    edits = {"alpha": 1, "batch_size": "64", "season": 7, "learning_rate": "2e-3", "seed": 9}
    edits |= {"split_ratio": "6:2:2", "columns": ["a", "b"], "teacher_revision": "main"}
    edited(monkeypatch, **edits)
    parser = md.build_parser(demo=False)
    for command in md.COMMANDS:
        assert md.check_defaults(parser, command) == []


# -- Values that cannot be taken -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[(f"--{name}", "many") for name in md.RANGES if name != "horizon"],
        *[(flag, "2.5") for flag in ("--num_epochs", "--season", "--seed", "--context_length")],
        *[("--split_ratio", value) for value in ("8:1", "8:1:1:1", "8:0:1", "8:-1:1")],
        *[("--split_ratio", value) for value in ("a:b:c", "8:1:inf", "8:1:nan", "")],
        ("--season", "monthly"),
        ("--teacher_patch_size", "big"),
        ("--teacher_point", "mode"),
        ("--teacher_precision", "16"),
        ("--precision", "64"),
        ("--split_by", "rows"),
        ("--augment", "yes"),
        ("--lang", "fr"),
    ],
)
def test_a_value_of_the_wrong_type_is_one_line_that_names_flag_and_value(flag, value, capsys):
    err = refusal(capsys, flag, value)
    assert err.startswith(f"error: argument {flag}: ")
    assert repr(value) in err
    assert "--help" in err
    assert err.count("\n") == 1


TOO_SMALL_OR_LARGE = [
    *[("--alpha", value) for value in ("-0.01", "1.01", "nan", "inf")],
    *[("--dropout", value) for value in ("-0.1", "1", "nan")],
    *[("--learning_rate", value) for value in ("0", "-0.001", "inf", "nan")],
    *[("--max_grad_norm", value) for value in ("0", "inf")],
    *[("--weight_decay", value) for value in ("-1", "inf")],
    *[("--seed", value) for value in ("-1", str(2**64))],  # PyTorch takes no more than 64 bits
    ("--split_seed", f"-{10**400}"),  # no float holds it
    *[("--context_length", value) for value in ("-1", "0", "1")],
    ("--prediction_length", "0"),
    ("--batch_size", "0"),
    ("--num_epochs", "0"),
    ("--stride", "0"),
    ("--d_model", "0"),
    ("--num_layers", "0"),
    ("--num_heads", "0"),
    ("--num_heads", "-1"),
    ("--patch_size", "0"),
    ("--devices", "0"),
    ("--num_nodes", "0"),
    ("--num_samples", "0"),
    ("--teacher_batch_size", "0"),
    ("--teacher_patch_size", "0"),
    ("--season", "0"),
    ("--max_files", "-1"),
    ("--max_gap", "-1"),
    ("--max_windows", "-1"),
    ("--split_seed", "-1"),
    ("--skip_rows", "-1"),
    ("--max_file_mb", "-1"),
    ("--patience", "-1"),
]


@pytest.mark.parametrize(("flag", "value"), TOO_SMALL_OR_LARGE)
def test_a_value_out_of_range_is_named_with_what_is_allowed(flag, value, capsys):
    lines = problems(capsys, flag, value)
    taken = md.build_parser(demo=False).parse_args(["train", flag, value])
    shown = getattr(taken, flag.removeprefix("--"))  # 1.0 for 1
    (line,) = [line for line in lines if line.startswith(f"{flag} {shown}: must be ")]
    allowed = line.partition(": must be ")[2]
    assert allowed == str(md.RANGES[flag.removeprefix("--")][1])
    assert any(character.isdigit() for character in allowed)
    assert all(flag in line for line in lines)  # none but what follows from it


def test_every_range_is_tried():
    tried = {flag.removeprefix("--") for flag, _ in TOO_SMALL_OR_LARGE}
    assert tried == md.RANGES.keys() - {"horizon"}  # of predict and evaluate: test_horizon.py


@pytest.mark.parametrize("value", ["tpu", "cuda:x", "cuda:-1", "CPU"])
def test_a_device_of_no_kind_is_named_with_those_that_there_are(value, capsys):
    (line,) = problems(capsys, "--device", value)
    assert line.startswith(f"--device {value}: ")
    assert all(kind in line for kind in ("auto", "cpu", "cuda", "cuda:1", "mps"))


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--data_dir nowhere", ["--data_dir nowhere: "]),
        ("--teacher_model ./nowhere --label_cache none_yet", ["--teacher_model ./nowhere: "]),
        ("--d_model 30 --num_heads 8", ["--num_heads 8: ", "--d_model 30"]),
        ("--context_length 8 --patch_size 9", ["--patch_size 9: ", "--context_length 8"]),
        ("--device cpu --teacher_precision bf16", ["--teacher_precision bf16: ", "32"]),
        ("--resume", ["--resume: ", "run/last.pt"]),
        ("--resume --save_dir elsewhere", ["--resume: ", "elsewhere/last.pt"]),
        ("--save_dir data/series.csv", ["--save_dir data/series.csv: "]),
        ("--save_dir data/series.csv/run", ["--save_dir data/series.csv/run: "]),
        ("--label_cache data/series.csv/deep/er", ["--label_cache data/series.csv/deep/er: "]),
        ("label --label_cache data/series.csv", ["--label_cache data/series.csv: "]),
        ("label --data_dir nowhere", ["--data_dir nowhere: "]),
        ("evaluate --checkpoint a/b ./nowhere", ["--checkpoint ./nowhere: "]),
        ("evaluate --checkpoint a/b --output_dir data/series.csv", ["--output_dir data/series"]),
        ("predict --checkpoint nowhere.pt --input data", ["--checkpoint nowhere.pt: "]),
        ("predict --checkpoint a/b --input nowhere", ["--input nowhere: "]),
        ("predict --checkpoint a/b --input data/series.csv --output data", ["--output data: "]),
        (
            "predict --checkpoint a/b --input data/series.csv --output data/../data/series.csv",
            ["--output data/../data/series.csv: ", "is the input"],
        ),
        (
            "predict --checkpoint a/b --input data --output out.png --plot",
            ["--output out.png: ", "picture"],
        ),
        ("export --checkpoint ./nowhere --format hub", ["--checkpoint ./nowhere: "]),
        ("export --checkpoint a/b --format hub --int8", ["--int8: a hub folder has float32"]),
        ("evaluate --checkpoint a/b.onnx", ["--checkpoint a/b.onnx: "]),
        ("export --checkpoint a/b --format onnx --output data", ["--output data: "]),
        ("export --checkpoint a/b --format hub --output data/series.csv", ["--output data/series"]),
    ],
)
def test_arguments_that_contradict_each_other_or_the_disk_are_one_clear_line(argv, parts, capsys):
    (line,) = problems(capsys, *argv.split())
    assert line.startswith(parts[0])
    assert all(part in line for part in parts[1:]), line


@pytest.mark.parametrize("flag", ["--save_dir", "--label_cache"])
def test_a_folder_without_write_permission_is_refused(flag, place, monkeypatch, capsys):
    def permitted(path, _mode):  # root may write anywhere
        return bool(os.stat(path).st_mode & 0o222)

    (place / "locked").mkdir()
    (place / "locked").chmod(0o555)
    monkeypatch.setattr(os, "access", permitted)
    (line,) = problems(capsys, flag, "locked/below")
    assert line.startswith(f"{flag} locked/below: ")
    assert str(place / "locked") in line


def test_all_problems_are_told_at_once_a_line_each(capsys):
    argv = "--alpha 2 --num_epochs 0 --d_model 30 --num_heads 7 --context_length 500"
    argv += " --patch_size 999 --data_dir nowhere --device tpu --resume --alfa=1"
    expected = [
        "--alfa=1: ",
        "--alpha 2.0: ",
        "--num_epochs 0: ",
        "--data_dir nowhere: ",
        "--device tpu: ",
        "--num_heads 7: ",
        "--patch_size 999: ",
        "--resume: ",
    ]
    lines = problems(capsys, *argv.split())
    assert len(lines) == len(expected), lines
    for start in expected:
        assert len([line for line in lines if line.startswith(start)]) == 1, start


# -- Words that are no arguments -------------------------------------------------------------------


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
    if hint:
        assert line.endswith(f"did you mean {hint}?")
    else:
        assert "did you mean" not in line


@pytest.mark.parametrize(
    "argv",
    [["--seed", "1", "label"], ["--seed", "1", "train"], ["label", "--stride", "1", "train"]],
)
def test_a_command_word_after_flags_is_an_error_that_says_where_it_goes(argv, capsys):
    (line,) = problems(capsys, *argv)
    assert line.startswith(f"{argv[-1]}: ")
    assert "before all flags" in line


@pytest.mark.parametrize(
    "argv",
    [
        ["--alpha"],
        ["--columns"],
        ["--resume=yes"],
        ["evaluate"],
        ["predict", "--checkpoint", "a/b"],
        ["export", "--checkpoint", "a/b"],
    ],
)
def test_a_flag_with_too_few_or_too_many_values_or_none_at_all_is_one_line(argv, capsys):
    missing = {"evaluate": "--checkpoint", "predict": "--input", "export": "--format"}
    err = refusal(capsys, *argv)
    assert err.count("\n") == 1
    assert missing.get(argv[0], argv[0].partition("=")[0]) in err


# -- Devices ---------------------------------------------------------------------------------------


def test_two_gpus_asked_for_where_there_is_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (line,) = problems(capsys, "--device", "cuda", "--devices", "2")
    assert line.startswith("--devices 2: ")
    assert "1" in line.partition(": ")[2]
    (line,) = problems(capsys, "--device", "cuda:1")
    assert line.startswith("--device cuda:1: ")
    assert parse("--device", "cuda:0")["device"] == "cuda:0"


def test_one_gpu_by_number_and_two_devices_contradict_each_other(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (line,) = problems(capsys, "--device", "cuda:1", "--devices", "2")
    assert line.startswith("--devices 2: ")
    assert "cuda:1" in line
    assert parse("--device", "cuda", "--devices", "2")["devices"] == 2


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_an_explicit_device_that_is_not_here_is_an_error_that_names_the_cpu(device, capsys):
    (line,) = problems(capsys, "--device", device)
    assert line.startswith(f"--device {device}: ")
    assert "--device cpu" in line


@pytest.mark.parametrize("command", ["train", "label"])
def test_without_a_gpu_the_device_that_is_chosen_is_the_cpu_and_says_so(command, capsys):
    (Path("data") / "series.csv").write_text("words\nonly\n")
    code, _, err = run(capsys, *words(command, "--device", "auto"))
    assert code == 2
    assert "no numeric column" in err  # it came as far as the data
    assert any("CPU" in line for line in err.splitlines() if line.startswith("note:"))


# -- The demo --------------------------------------------------------------------------------------


def demo(*argv):
    """The arguments (a dict) of the demo."""
    return vars(md.parse_arguments([*MACHINE_GIVEN.split(), "--demo", *argv]))


def test_demo_changes_its_own_folders_and_sizes_alone():
    usual = vars(md.build_parser(demo=False).parse_args(["train", *MACHINE_GIVEN.split()]))
    args = demo()
    changed = {name for name, value in args.items() if value != usual[name]}
    own = {"data_dir", "label_cache", "save_dir"}
    assert all(args[name].startswith("checkpoints/demo/") for name in own)  # all that it writes
    assert len({args[name] for name in own}) == 3
    assert args["teacher_model"] == str(DEMO_TEACHER)
    assert args["demo"]
    sizes = {"max_windows", "num_epochs", "learning_rate"}
    assert changed - own - sizes <= {"teacher_model", "demo"}
    assert {name: args[name] for name in md.DEMO} == md.DEMO


@pytest.mark.parametrize("is_before", [True, False])
def test_a_flag_given_beside_demo_wins(is_before):
    """Also where it is the usual default."""
    usual = defaults("train")
    given = {
        "num_epochs": usual["num_epochs"],
        "max_windows": usual["max_windows"],
        "save_dir": "mine",
    }
    flags = []
    for name, value in given.items():
        flags += [f"--{name}", str(value)]
    argv = [*flags, "--demo"] if is_before else ["--demo", *flags]
    assert vars(md.parse_arguments([*MACHINE_GIVEN.split(), *argv])) == demo() | given


def test_demo_never_overwrites_files_of_the_user(place, capsys):
    mine = place / "data" / "series_00.csv"  # a name that the demo uses
    hourly(300).to_csv(mine, index=False)
    before = mine.read_bytes()
    argv = f"--demo {MACHINE_GIVEN} --data_dir data --columns nosuch"
    code, _, err = run(capsys, *argv.split())
    assert code == 2
    assert "nosuch" in err  # it came as far as the data
    assert mine.read_bytes() == before


def test_alpha_0_asks_for_no_teacher(capsys):
    no_teacher = ("--label_cache", "none_yet", "--teacher_model", "./nowhere")
    assert parse("--alpha", "0", *no_teacher)["alpha"] == 0
    (line,) = problems(capsys, "--alpha", "0.1", *no_teacher)
    assert line.startswith("--teacher_model ./nowhere: ")


# -- Languages -------------------------------------------------------------------------------------


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
    assert parse()["lang"] == language
    for other in ("en", "zh"):
        assert parse("--lang", other)["lang"] == other


def test_results_and_errors_are_chinese_in_a_chinese_locale(monkeypatch, capsys):
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    argv = words("--columns", "nosuch", "--device", "cpu")
    code, out, err = run(capsys, *argv)
    assert out.splitlines()[:3] == ["数据目录: data", "上下文长度: 64", "预测长度: 16"]
    assert code == 2
    assert err.startswith("错误: ")
    assert "nosuch" in err
    assert "没有列 nosuch" in err
    _, out, _ = run(capsys, *argv, "--lang", "en")
    english = ["Data directory: data", "Context length: 64", "Prediction length: 16"]
    assert out.splitlines()[:3] == english


# -- The end ---------------------------------------------------------------------------------------


def test_the_script_itself_ends_with_code_2_and_no_traceback(place):
    command = [sys.executable, str(SCRIPT), *words("--alpha", "2", "--device", "tpu")]
    child = subprocess.run(
        command, capture_output=True, text=True, cwd=place, env=dict(os.environ), check=False
    )
    assert (child.returncode, child.stdout) == (2, "")
    assert "Traceback" not in child.stderr
    starts = {line.split(":")[0].strip() for line in child.stderr.splitlines()[1:]}
    assert starts == {"--alpha 2.0", "--device tpu"}


def test_a_successful_command_returns_0(capsys):
    listing = ("label", "--list", "--label_cache", "empty", "--lang", "en")
    assert run(capsys, *listing) == (0, "No label files in empty\n", "")


def test_parsing_returns_a_plain_namespace():
    assert type(md.parse_arguments(words())) is argparse.Namespace


def test_main_runs_in_a_thread_where_no_signal_can_be_caught(tmp_path, capsys):
    codes = []
    words = ["label", "--list", "--label_cache", str(tmp_path / "none"), "--lang", "en"]
    thread = threading.Thread(target=lambda: codes.append(md.main(words)))
    thread.start()
    thread.join()
    assert codes == [0]
    assert "No label files" in capsys.readouterr().out


def test_an_old_python_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(md, "OLDEST_PYTHON", (99, 0))
    assert md.main(["label", "--list"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: this is Python ") and "99.0 or newer" in error
    assert error.count("\n") == 1


@pytest.fixture
def hangup():
    """Set what SIGHUP does; the tests themselves may run under nohup."""
    if not hasattr(signal, "SIGHUP"):
        pytest.skip("this system has no SIGHUP")
    before = signal.getsignal(signal.SIGHUP)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, before)


def close_terminal(*_):
    os.kill(os.getpid(), signal.SIGHUP)


def test_a_terminal_that_is_closed_stops_as_a_signal_does(hangup, monkeypatch, capsys):
    hangup(signal.SIG_DFL)
    monkeypatch.setattr(md, "list_labels", close_terminal)
    assert md.main(["label", "--list"]) == 128 + signal.SIGHUP
    assert "stopped by SIGHUP" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_under_nohup_a_terminal_that_is_closed_stops_nothing(hangup, monkeypatch):
    hangup(signal.SIG_IGN)
    monkeypatch.setattr(md, "list_labels", close_terminal)
    assert md.main(["label", "--list"]) == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_device_can_be_an_output_where_its_folder_is_locked(monkeypatch, tmp_path):
    monkeypatch.setattr(md, "unwritable", lambda _folder: "is locked")
    for output, count in (("/dev/stdout", 0), (str(tmp_path / "a.csv"), 1)):
        args = argparse.Namespace(command="predict", output=output, input="b.csv", plot=False)
        assert len(md.check_outputs(args)) == count


@pytest.mark.parametrize(
    "words",
    [
        "train --data_dir ~nobody-of-this-name/x",
        "train --data_dir . --alpha 0 --save_dir ~nobody-of-this-name/x",
        "train --data_dir . --alpha 0.5 --teacher_model ~nobody-of-this-name/x",
        "train --data_dir . --alpha 0.5 --label_cache ~nobody-of-this-name/x",
        "label --list --label_cache ~nobody-of-this-name/x",
        "evaluate --checkpoint ~nobody-of-this-name/x",
        "predict --checkpoint a.pt --input ~nobody-of-this-name/x",
        "export --checkpoint ~nobody-of-this-name/x --format hub",
        "export --checkpoint owner/model --format hub --output ~nobody-of-this-name/x",
    ],
)
def test_a_path_below_the_home_of_nobody_is_one_line(words, capsys):
    assert md.main(words.split() + ["--lang", "en"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ~nobody-of-this-name")
    assert line.endswith("give the path without ~")


def test_a_machine_that_knows_no_home_needs_a_label_cache_by_its_path(monkeypatch, capsys):
    def unknown(_number):
        raise KeyError("no such user")

    pwd = pytest.importorskip("pwd")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    words = ["label", "--lang", "en", "--list", "--label_cache"]
    assert md.main([*words, "~/labels"]) == 2
    assert capsys.readouterr().err.startswith("error: ~/labels: no home folder is known for ~;")
    assert md.main([*words, "labels"]) == 0


@pytest.mark.parametrize("command", ["train", "label"])
def test_a_teacher_that_is_a_file_is_refused(command, tmp_path, capsys):
    file = tmp_path / "teacher.safetensors"
    file.write_text("")
    words = [command, "--lang", "en", "--data_dir", str(tmp_path), "--device", "cpu"]
    words += ["--teacher_model", str(file), "--label_cache", str(tmp_path)]
    assert md.main(words) == 2
    expected = f"--teacher_model {file}: is a file; a folder, a hub id or a .py file is expected"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--save_dir", "--label_cache"])
def test_a_name_that_is_not_utf_8_is_one_line_at_the_start(flag, tmp_path, capsys):
    """Linux allows any bytes; Python hands them on as surrogates."""
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xe9")
    assert md.main(["train", "--lang", "en", "--data_dir", str(tmp_path), flag, name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and r"\udcff\udce9" in line
    assert "is not UTF-8" in line
    assert not os.path.exists(name)
