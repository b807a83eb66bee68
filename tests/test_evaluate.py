"""evaluate: one ruler for students, teacher and naive forecasts, on the run's own test windows."""

import argparse
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import hourly, load_teacher, modules_after, quiet_voice, save_module

import moirai_distill as md

METRIC = r"MSE (\S+)  MAE (\S+)  MASE (\S+)"
OTHER_SPLIT = ("--split_ratio", "1:1:1")  # it holds more files out than the runs


def evaluate(*words):
    """Exit code of evaluate for checkpoints and further words."""
    fixed = ["evaluate", "--device", "cpu", "--lang", "en", "--checkpoint"]
    return md.main([*fixed, *map(str, words)])


def table(folder):
    return json.loads((folder / "evaluation.json").read_text())


def rows_of(folder):
    return table(folder)["rows"]


def printed_errors(out):
    """name -> [mse, mae, mase] of the printed table."""
    found = re.findall(rf"^  (\S[^\n]*?) +{METRIC}.*$", out, re.M)
    return {name: [float(number) for number in numbers] for name, *numbers in found}


def flags_of(run):
    """The flags of a run, whatever the script's defaults are."""
    return argparse.Namespace(**md.read_student(run)[0]["run_config"])


def windows_of(run):
    """part -> Windows of a run, by the script's own loading."""
    flags = flags_of(run)
    config = md.pick(md.DataConfig, flags)
    return md.load_data(config, md.pick(md.ReadConfig, flags), quiet_voice()).windows


def season_of(run):
    """Seasonal period of the hourly series of a run."""
    season = flags_of(run).season
    return 24 if season == "auto" else season


def best_of(run):
    """Path of the best checkpoint of a run."""
    (path,) = run.glob("best_model_epoch_*.pt")
    return path


def changed(run, folder, **flags):
    """A copy of a run's checkpoint with other flags in its run_config; returns its folder."""
    content = torch.load(best_of(run), weights_only=True)
    content["run_config"] |= flags
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "best_model_epoch_1.pt")
    return folder


def scores_of(mse, mse_by_series=()):
    """Scores of which only the MSE is known."""
    return md.Scores(
        mse=mse,
        mae=math.nan,
        mase=math.nan,
        mase_left_out=0,
        mse_by_step=[],
        mae_by_step=[],
        mse_by_series=list(mse_by_series),
        mae_by_series=[],
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No pictures and no timing: these are claims about the files of `evaluated` alone."""
    cost = md.Cost(cpu_ms=1.0, parameters=1, bytes=4)
    monkeypatch.setattr(md, "draw", lambda path, panels: None)
    monkeypatch.setattr(md, "measure_cost", lambda weights, call: cost)


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """(folder with the files of an evaluation of run, twin and teacher; what it printed)."""
    folder = tmp_path_factory.mktemp("evaluated")
    printed = []

    def keep(*words, **_settings):
        printed.append(" ".join(map(str, words)))

    runs = [trained / "distilled", trained / "twin"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", keep)
        assert evaluate(*runs, "--with_teacher", "--output_dir", folder) == 0
    return folder, "\n".join(printed)


@pytest.fixture(scope="module")
def hub_folder(trained, tmp_path_factory):
    """The distilled run, exported for the hub."""
    folder = tmp_path_factory.mktemp("exported") / "hub"
    words = ["export", "--format", "hub", "--checkpoint", trained / "distilled"]
    assert md.main([*map(str, words), "--output", str(folder)]) == 0
    return folder


# -- The table -------------------------------------------------------------------------------------


def test_every_forecaster_is_scored_over_every_window_of_the_runs_own_split(trained, evaluated):
    folder, out = evaluated
    distilled = str(trained / "distilled")
    twin = str(trained / "twin")
    rows = rows_of(folder)
    test = windows_of(trained / "distilled")["test"]
    assert [*rows] == [distilled, twin, "teacher", "seasonal-naive", "last value"]
    assert table(folder)["windows"] == len(test) == len(test.names) * (300 - 64 - 16 + 1)

    context, truth, _ = test.batch(np.arange(len(test)))
    season = season_of(trained / "distilled")
    last_period = context[:, -season:]
    with torch.inference_mode():
        guesses = {
            distilled: md.PatchStudent.from_pretrained(distilled)(context),
            twin: md.PatchStudent.from_pretrained(twin)(context),
            "seasonal-naive": last_period[:, np.arange(16) % season],
            "last value": context[:, -1:].expand(-1, 16),
        }
    unit = (context[:, season:] - context[:, :-season]).double().abs().mean(1, keepdim=True)
    for name, guess in guesses.items():
        error = (guess - truth).double().abs()
        of_series = [error[test.series == number] for number in range(len(test.names))]
        expected = {
            "mse": (error**2).mean(),
            "mae": error.mean(),
            "mase": (error / unit).mean(),
            "mse_by_step": (error**2).mean(0),
            "mae_by_step": error.mean(0),
            "mse_by_series": torch.stack([(own**2).mean() for own in of_series]),
            "mae_by_series": torch.stack([own.mean() for own in of_series]),
        }
        for metric, value in expected.items():
            assert rows[name][metric] == pytest.approx(value.tolist(), rel=1e-6)

    printed = printed_errors(out)
    short = md.short_names(rows)
    for name, row in rows.items():
        assert printed[short[name]] == pytest.approx(
            [row["mse"], row["mae"], row["mase"]], abs=6e-5
        )


def test_the_teachers_row_is_the_error_of_its_labels(trained, evaluated, teacher_folder):
    test = windows_of(trained / "distilled")["test"]
    request = md.pick(md.TeacherRequest, flags_of(trained / "distilled"))
    sizes = md.read_student(trained / "distilled")[0]["teacher"]["patch_sizes"]
    request.teacher_patch_size = sizes
    teacher = load_teacher(teacher_folder)
    block = request.teacher_batch_size
    labels = []
    for number, first in enumerate(range(0, len(test), block)):
        index = np.arange(first, min(len(test), first + block))
        labels.append(md.label_windows(teacher, test, index, request, seed=number).points)
    _, truth, _ = test.batch(np.arange(len(test)))
    error = torch.from_numpy(np.concatenate(labels)) - truth
    mse = rows_of(evaluated[0])["teacher"]["mse"]
    assert mse == pytest.approx(float((error.double() ** 2).mean()), rel=1e-6)

    sizes_of_test_labels = []
    for path in (trained / "labels").glob("*/manifest.json"):
        key = json.loads(path.read_text())["key"]
        if key["data"] == test.digest:
            sizes_of_test_labels.append(key["patch"])
    assert sizes in sizes_of_test_labels  # not chosen anew


def test_size_and_speed_stand_beside_the_errors(trained, evaluated, tmp_path):
    folder, out = evaluated
    rows = rows_of(folder)
    for name in ("distilled", "twin"):
        row = rows[str(trained / name)]
        student = md.PatchStudent.from_pretrained(trained / name)
        assert row["parameters"] == sum(weight.numel() for weight in student.parameters())
        student.save_pretrained(tmp_path / name)
        size = (tmp_path / name / "model.safetensors").stat().st_size
        assert row["bytes"] == pytest.approx(size, abs=64)
        assert 0 < row["cpu_ms"] < 1000
    assert rows["teacher"]["parameters"] > rows[str(trained / "twin")]["parameters"] > 1000
    assert "cpu_ms" in rows["teacher"]
    assert "cpu_ms" not in rows["last value"]
    assert f"{rows['teacher']['parameters']:,} parameters" in out


def test_pictures_are_drawn(evaluated):
    folder, _ = evaluated
    for name in ("forecast.png", "error_by_horizon.png"):
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_training_ends_with_the_table_that_evaluate_prints_again(trained, tmp_path):
    at_end = rows_of(trained / "distilled")["student"]
    assert evaluate(trained / "distilled", "--output_dir", tmp_path) == 0
    again = rows_of(tmp_path)[str(trained / "distilled")]
    assert again["weights"] == at_end["weights"]
    for metric in ("mse", "mae", "mase", "mse_by_step"):
        assert again[metric] == pytest.approx(at_end[metric], rel=1e-6)


def test_the_lines_of_the_table_fit_100_columns_and_keep_names_apart(capsys):
    scores = scores_of(12.3456)
    cost = md.Cost(parameters=123_456_789, bytes=493_000_000, cpu_ms=1234.5)
    names = ["/home/me/checkpoints/a_long_way_to/run", "/home/you/checkpoints/a_long_way_to/run"]
    names += ["other_home/checkpoints/a_long_way_to/run", "teacher", "seasonal-naive"]
    md.tell_rows({name: md.Row(scores, cost) for name in names}, 1_000_000, md.Voice("en"))
    lines = capsys.readouterr().out.strip().splitlines()
    assert max(len(line) for line in lines) <= 100
    assert len({re.split("  MSE", line)[0] for line in lines[1:]}) == len(names)
    assert lines[1].startswith("  …") and "a_long_way_to/run" in lines[1]
    assert lines[-2].split()[0] == "teacher"


# -- The verdict -----------------------------------------------------------------------------------


def test_it_says_in_words_whether_the_teacher_helped(trained, evaluated):
    folder, out = evaluated
    distilled = str(trained / "distilled")
    twin = str(trained / "twin")
    rows = rows_of(folder)
    change = 100 * (rows[distilled]["mse"] / rows[twin]["mse"] - 1)
    if change <= -1:
        word = "helped"
    elif change >= 1:
        word = "did harm"
    else:
        word = "made no difference"
    assert f"The teacher {word}: {distilled} has {change:+.1f} % of MSE beside {twin}" in out
    pairs = zip(rows[distilled]["mse_by_series"], rows[twin]["mse_by_series"], strict=True)
    lower = [own < other for own, other in pairs]
    assert f"a lower one on {sum(lower)} of {len(lower)} series" in out


@pytest.mark.parametrize(
    ("student", "twin", "words"),
    [
        (0.8, 1.0, "The teacher helped"),
        (1.2, 1.0, "The teacher did harm"),
        (1.005, 1.0, "The teacher made no difference"),
    ],
)
def test_the_verdict_follows_the_errors(student, twin, words, capsys):
    making = {"--num_epochs": 10, "--seed": 0}
    rows = {
        "a": md.Row(scores_of(student, [1.0, 2.0, 3.0]), alpha=0.5, making=making),
        "b": md.Row(scores_of(twin, [1.5, 2.0, 2.5]), alpha=0.0, making=making),
        "teacher": md.Row(scores_of(0.6)),
        "seasonal-naive": md.Row(scores_of(1.6)),
        "last value": md.Row(scores_of(1.7)),
    }
    md.tell_verdict(rows, md.Voice("en"))
    out = capsys.readouterr().out
    change = 100 * (student / twin - 1)
    assert f"{words}: a has {change:+.1f} % of MSE beside b" in out
    assert "a lower one on 1 of 3 series" in out
    assert f"a keeps {100 * (1.6 - student):.0f} % of what the teacher gains" in out

    del rows["b"]
    md.tell_verdict(rows, md.Voice("zh"))
    assert "--alpha 0" in capsys.readouterr().out
    rows["teacher"] = md.Row(scores_of(2.0))  # no better than naive: it gives nothing to keep
    md.tell_verdict(rows, md.Voice("en"))
    assert "keeps" not in capsys.readouterr().out


@pytest.fixture
def four_rows():
    """A student beside teacher and naive forecasts; last value is the better naive one."""
    return {
        "a": md.Row(scores_of(0.8), alpha=0.5, making={}),
        "teacher": md.Row(scores_of(0.5)),
        "seasonal-naive": md.Row(scores_of(2.0)),
        "last value": md.Row(scores_of(1.0)),
    }


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        (0.8, 0.5, "a keeps 40 % of what the teacher gains over last value"),
        (0.4, 0.5, "a passes its teacher: its MSE is 20.0 % lower than the teacher's"),
        # 305 % was said of a student whose teacher gained next to nothing.
        (0.4, 0.999, "a passes its teacher"),
        # It beats one naive forecast alone: there is nothing to keep.
        (0.8, 1.5, "The teacher does not beat last value here"),
        (0.8, math.nan, "The teacher does not beat last value here"),
    ],
)
def test_what_is_kept_of_a_teacher_is_said_in_words(student, teacher, words, four_rows, capsys):
    four_rows["a"].scores.mse = student
    four_rows["teacher"].scores.mse = teacher
    md.tell_verdict(four_rows, md.Voice("en"))
    out, err = capsys.readouterr()
    assert words in out
    assert ("keeps" in out) == ("keeps" in words)
    assert err == ""


@pytest.mark.parametrize(
    ("student", "words"),
    [
        (1.5, "a is not better than last value on"),
        (2.5, "a is not better than seasonal-naive and last value on"),
        (math.nan, "a is not better than seasonal-naive and last value on"),
    ],
)
def test_a_student_that_is_worse_than_a_naive_forecast_is_warned_of(
    student, words, four_rows, capsys
):
    for alpha in (0.5, 0):
        four_rows["a"].alpha = alpha
        four_rows["a"].scores.mse = student
        md.tell_verdict(four_rows, md.Voice("en"))
        out, err = capsys.readouterr()
        assert f"WARNING: {words}" in err
        assert "keeps" not in out


def test_nothing_is_said_of_a_teachers_help_beside_a_student_that_is_no_twin(
    trained, tmp_path, capsys
):
    other = changed(trained / "twin", tmp_path / "other", num_epochs=99, learning_rate=0.5)
    words = [trained / "distilled", other, "--output_dir", tmp_path / "out"]
    assert evaluate(*words) == 0
    out = capsys.readouterr().out
    run = flags_of(trained / "distilled")
    assert "The teacher helped" not in out and "did harm" not in out
    assert "made no difference" not in out
    assert f"--num_epochs {run.num_epochs} and 99" in out
    assert f"--learning_rate {run.learning_rate} and 0.5" in out

    # What makes no other student, such as a place or a device, makes no other twin.
    same = changed(trained / "twin", tmp_path / "same", save_dir="x", device="mps", lang="zh")
    assert evaluate(trained / "distilled", other, same, "--output_dir", tmp_path / "out") == 0
    assert f"beside {same} (alpha 0)" in capsys.readouterr().out


# -- The teacher -----------------------------------------------------------------------------------


def test_labels_of_the_test_windows_come_from_the_cache_where_they_are(
    trained, tmp_path, capsys, monkeypatch
):
    def fail(*_):
        raise AssertionError("the teacher was asked again")

    words = [trained / "distilled", "--with_teacher", "--output_dir"]
    assert evaluate(*words, tmp_path / "a") == 0
    capsys.readouterr()
    monkeypatch.setattr(md.Teacher, "answer", fail)
    monkeypatch.setattr(md, "fingerprint", lambda *_: None)  # as on a machine that has no weights
    assert evaluate(*words, tmp_path / "b") == 0
    assert "Label cache hit" in capsys.readouterr().out
    one = rows_of(tmp_path / "a")["teacher"]
    other = rows_of(tmp_path / "b")["teacher"]
    assert one["mse"] == other["mse"]
    assert "cpu_ms" in one
    assert "cpu_ms" not in other


def test_a_run_without_teacher_can_be_set_beside_one_chosen_on_training_windows(
    trained, tmp_path, monkeypatch
):
    judged = []
    choose = md.choose_patch_sizes

    def spy(teacher, task, voice):
        judged.append(task.judged_on.digest)
        return choose(teacher, task, voice)

    monkeypatch.setattr(md, "choose_patch_sizes", spy)
    words = ["--with_teacher", "--output_dir", tmp_path, "--label_cache", tmp_path / "labels"]
    twin = md.open_student(trained / "twin")
    words += ["--teacher_model", twin.content["run_config"]["teacher_model"]]
    assert evaluate(trained / "twin", *words) == 0
    assert judged == [windows_of(trained / "twin")["train"].digest]
    assert rows_of(tmp_path)["teacher"]["mse"] > 0


def test_the_teacher_is_that_of_the_run_that_had_one_wherever_it_stands(trained, tmp_path):
    other = changed(
        trained / "twin",
        tmp_path / "plain",
        teacher_model="Salesforce/moirai-1.1-R-base",
        num_samples=100,
    )
    words = ["--with_teacher", "--output_dir", tmp_path]
    assert evaluate(other, trained / "distilled", *words) == 0
    first = rows_of(tmp_path)["teacher"]["mse"]
    assert evaluate(trained / "distilled", other, *words) == 0
    assert rows_of(tmp_path)["teacher"]["mse"] == first


def test_a_run_from_a_gpu_is_labelled_in_float32_on_the_cpu(trained, tmp_path):
    flags = {"teacher_precision": "bf16", "device": "cuda", "precision": "bf16-mixed"}
    gpu = changed(trained / "distilled", tmp_path / "gpu", **flags)
    words = ["--with_teacher", "--output_dir", tmp_path, "--label_cache", tmp_path / "labels"]
    words += ["--teacher_model", md.open_student(gpu).content["run_config"]["teacher_model"]]
    assert evaluate(gpu, *words) == 0
    (manifest,) = (tmp_path / "labels").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["precision"] == "32"


def test_a_checkpoint_that_is_called_teacher_is_no_teacher(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    changed(trained / "distilled", tmp_path / "teacher")
    assert evaluate("teacher", "--output_dir", tmp_path / "out") == 0
    assert [*rows_of(tmp_path / "out")] == ["./teacher", "seasonal-naive", "last value"]
    assert "keeps" not in capsys.readouterr().out


# -- Checkpoints and data --------------------------------------------------------------------------


def test_the_forms_of_a_checkpoint_score_alike(trained, hub_folder, tmp_path):
    forms = [hub_folder, best_of(trained / "distilled"), trained / "distilled"]
    assert evaluate(*forms, "--data_dir", trained / "data", "--output_dir", tmp_path) == 0
    rows = rows_of(tmp_path)
    assert len({rows[str(form)]["mse"] for form in forms}) == 1
    assert len({rows[str(form)]["weights"] for form in forms}) == 1


def test_an_exported_folder_does_not_know_the_data_and_says_so(hub_folder, capsys):
    assert evaluate(hub_folder) == 2
    assert "give --data_dir" in capsys.readouterr().err


def test_other_data_is_scored_with_the_runs_own_settings_and_leaves_its_files_alone(
    trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    for number in range(3):
        hourly(300, seed=50 + number).to_csv(tmp_path / "other" / f"o{number}.csv", index=False)
    run = trained / "distilled"
    before = (run / "evaluation.json").read_bytes()
    split = ["--split_by", "time", "--split_ratio", "8:1:1"]
    assert evaluate(run, "--data_dir", "other", *split) == 0
    assert table(tmp_path / "evaluation")["series"] == ["o0.csv", "o1.csv", "o2.csv"]
    assert table(tmp_path / "evaluation")["windows"] == 3 * (30 - 16 + 1)
    assert (run / "evaluation.json").read_bytes() == before
    assert "may have been trained" in capsys.readouterr().err

    # The run's own windows under another path.
    words = ["--data_dir", trained / "data", "--output_dir", tmp_path / "moved"]
    assert evaluate(run, *words) == 0
    assert "may have been trained" not in capsys.readouterr().err
    assert evaluate(run, *OTHER_SPLIT) == 0
    assert (run / "evaluation.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("data_dir", "."),
        ("columns", "value"),
        ("max_files", "11"),
        ("split_by", "files"),
        ("split_ratio", "8:1:1"),
        ("split_seed", "0"),
        ("max_gap", "16"),
        ("season", "24"),
    ],
)
def test_files_go_beside_the_checkpoint_only_where_no_flag_chooses_the_windows(
    trained, tmp_path, monkeypatch, flag, value
):
    monkeypatch.chdir(tmp_path)
    opened = md.open_student(trained / "distilled")
    words = ["evaluate", "--device", "cpu", "--checkpoint", str(trained / "distilled")]
    plain = md.parse_arguments(words)
    assert md.evaluation_folder(plain, opened) == trained / "distilled"
    given = md.parse_arguments([*words, f"--{flag}", value])
    assert md.evaluation_folder(given, opened).resolve() == tmp_path / "evaluation"
    chosen = md.parse_arguments([*words, f"--{flag}", value, "--output_dir", str(tmp_path)])
    assert md.evaluation_folder(chosen, opened) == tmp_path


def test_a_comparison_never_overwrites_what_is_of_the_run_alone(trained, tmp_path):
    run = shutil.copytree(trained / "distilled", tmp_path / "run")
    for name in ("forecast.png", "error_by_horizon.png"):
        (run / name).write_bytes(b"of the run alone")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert evaluate(run, trained / "twin") == 0
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    assert [*rows_of(run / "comparison")][:2] == [str(run), str(trained / "twin")]
    assert "comparison" in md.RUN_FILES  # a new run takes it away with the old one


def test_a_checkpoint_of_another_split_is_marked(trained, tmp_path, capsys):
    run = trained / "distilled"
    assert evaluate(run, *OTHER_SPLIT, "--output_dir", tmp_path) == 0
    assert "may have been trained on them" in capsys.readouterr().err
    assert evaluate(run, "--output_dir", tmp_path) == 0
    assert "may have been trained" not in capsys.readouterr().err


def test_checkpoints_of_different_lengths_are_not_compared(trained, tmp_path, capsys):
    sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "patch_size": 8, "dropout": 0.1}
    student = md.PatchStudent(context_length=48, prediction_length=16, **sizes)
    student.save_pretrained(tmp_path / "short")
    assert evaluate(trained / "distilled", tmp_path / "short") == 2
    assert "48 -> 16" in capsys.readouterr().err
    assert evaluate(trained / "distilled", "--context_length", "48") == 2
    assert "the flags 48 -> 16" in capsys.readouterr().err


def test_data_that_has_gone_is_named(trained, tmp_path, capsys):
    moved = changed(trained / "twin", tmp_path / "moved", data_dir=str(tmp_path / "gone"))
    assert evaluate(moved) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "gone") in error
    assert "--data_dir" in error
    assert len(error.strip().splitlines()) == 1


def test_all_problems_are_told_before_anything_slow(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(md, "open_student", None)
    (tmp_path / "file").write_text("")
    words = ["./nothing", "gone.pt", "--output_dir", tmp_path / "file"]
    words += ["--data_dir", tmp_path / "no", "--max_gap", "-1"]
    assert evaluate(*words) == 2
    error = capsys.readouterr().err
    for part in ("5 problem(s)", "./nothing", "gone.pt", "--output_dir", "--data_dir", "--max_gap"):
        assert part in error


def test_a_checkpoint_with_a_pickle_is_refused_and_nothing_is_executed(tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return (shutil.rmtree, (str(tmp_path / "precious"),))

    (tmp_path / "precious").mkdir()
    content = {"format": 1, "student_config": Payload(), "model_state_dict": {}}
    torch.save(content, tmp_path / "a.pt")
    for words in (["evaluate"], ["predict", "--input", __file__], ["export", "--format", "onnx"]):
        assert md.main([*words, "--checkpoint", str(tmp_path / "a.pt")]) == 2
        error = capsys.readouterr().err
        assert "refused" in error
        assert "Traceback" not in error
        assert len(error.strip().splitlines()) == 1
    assert (tmp_path / "precious").is_dir()


def test_another_teacher_takes_neither_revision_nor_patch_sizes_of_the_runs_own(
    trained, tmp_path, teacher_folder
):
    pupil = md.open_student(trained / "distilled")
    pupil.content["run_config"] |= {"teacher_revision": "v1", "teacher_patch_size": 64}
    pupil.content["teacher"]["patch_sizes"] = {"h": 32}
    same = shutil.copytree(teacher_folder, tmp_path / "same")
    other = save_module(tmp_path / "other", seed=1)
    found = {}
    for name, more in {
        "own": [],
        "same": ["--teacher_model", str(same)],
        "other": ["--teacher_model", str(other)],
        "typed": ["--teacher_model", str(other), "--teacher_patch_size", "8"],
        "gone": ["--teacher_model", f"elsewhere/{teacher_folder.name}"],
    }.items():
        args = md.parse_arguments(["evaluate", "--checkpoint", str(trained / "distilled"), *more])
        taken = md.inherit_arguments(args, pupil, pupil)
        found[name] = (taken.teacher_revision, taken.teacher_patch_size)
    assert found == {
        "own": ("v1", {"h": 32}),
        "same": ("v1", {"h": 32}),
        "other": (None, "auto"),
        "typed": (None, 8),
        "gone": ("v1", {"h": 32}),
    }


def test_labels_go_to_no_place_that_a_checkpoint_names_unless_it_is_a_label_cache(
    trained, tmp_path
):
    (tmp_path / "mine").mkdir()
    first = md.open_student(trained / "distilled")
    args = md.parse_arguments(["evaluate", "--checkpoint", str(trained / "distilled")])
    assert md.inherit_arguments(args, first, first).label_cache == str(trained / "labels")
    for place in (tmp_path / "mine", tmp_path / "none", "~nobody-here/labels"):
        first.content["run_config"]["label_cache"] = str(place)
        assert md.inherit_arguments(args, first, first).label_cache != str(place)


def test_evaluate_imports_nothing_that_takes_longer_than_the_rest(trained, tmp_path):
    words = ["evaluate", "--checkpoint", trained / "twin", "--device", "cpu"]
    found = modules_after(*words, "--output_dir", tmp_path)
    slow = {"lightning", "torch._dynamo", "sympy", "huggingface_hub", "uni2ts", "sklearn", "scipy"}
    slow |= {"torch.utils.benchmark", "setuptools"}
    assert found & slow == set()
    assert (tmp_path / "evaluation.json").is_file()
