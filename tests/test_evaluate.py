"""evaluate: one ruler for students, teacher and naive forecasts, on the test windows of the run's own split."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import hourly

import moirai_distill as m

METRIC = r"MSE (\S+)  MAE (\S+)  MASE (\S+)"


def evaluate(*words):
    return m.main(["evaluate", "--device", "cpu", "--lang", "en", "--checkpoint", *map(str, words)])


def table(folder):
    return json.loads((folder / "evaluation.json").read_text())


def lines(out):
    """name -> (mse, mae, mase) of the printed table."""
    found = re.findall(rf"^  (\S[^\n]*?) +{METRIC}(.*)$", out, re.M)
    return {name: tuple(map(float, numbers)) for name, *numbers, _ in found}


def windows_of(root, **changes):
    """Test windows of the fixture's runs, by the script's own loading."""
    count, series, remarks = m.read_files(root / "data", 100, ["first"], False)
    limits = {"length": 80, "horizon": 16, "max_gap": 16}
    split = {"split_by": "auto", "split_ratio": (8.0, 1.0, 1.0), "split_seed": 0, "stride": 1, "max_windows": 10}
    return m.split_data(series, remarks, *(split | changes).values(), "auto", limits)[0]


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory, request):
    """(folder with the files of an evaluation of run, twin and teacher; what it printed)."""
    folder = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert evaluate(trained / "distilled", trained / "twin", "--with_teacher", "--output_dir", folder) == 0
    return folder, "\n".join(printed)


def test_every_forecaster_is_scored_over_every_window_of_the_runs_own_split(trained, evaluated):
    folder, out = evaluated
    rows, test = table(folder)["rows"], windows_of(trained)["test"]
    assert [*rows] == [str(trained / "distilled"), str(trained / "twin"), "teacher", "seasonal-naive", "last value"]
    assert table(folder)["windows"] == len(test) == 300 - 80 + 1
    context, truth, _ = test.batch(np.arange(len(test)))
    with torch.inference_mode():
        guesses = {
            str(trained / n): m.PatchStudent.from_pretrained(trained / n)(context) for n in ("distilled", "twin")
        }
    guesses |= {"seasonal-naive": context[:, -24:-8], "last value": context[:, -1:].expand(-1, 16)}
    unit = (context[:, 24:] - context[:, :-24]).double().abs().mean(1, keepdim=True)
    for name, guess in guesses.items():
        error = (guess - truth).double().abs()
        expected = {"mse": (error**2).mean(), "mae": error.mean(), "mase": (error / unit).mean()}
        expected |= {"mse_by_step": (error**2).mean(0), "mae_by_step": error.mean(0)}
        for metric, value in expected.items():
            assert rows[name][metric] == pytest.approx(value.tolist(), rel=1e-6)
        assert rows[name]["mse_by_series"] == pytest.approx([rows[name]["mse"]])  # one file is held out for the test
    printed = lines(out)
    for name, row in rows.items():
        assert printed[name] == pytest.approx([row["mse"], row["mae"], row["mase"]], abs=6e-5)


def test_the_teachers_row_is_the_error_of_its_labels(trained, evaluated, teacher_folder):
    rows, parts = table(evaluated[0])["rows"], windows_of(trained)
    content = m.read_student(trained / "distilled")
    teacher = m.load_teacher(str(teacher_folder), None, "cpu", "32", print)
    request = m.Request(str(teacher_folder), None, content["teacher"]["patch_sizes"], "median", 5)
    labels = []
    for number in range(0, len(parts["test"]), 256):
        index = np.arange(number, min(len(parts["test"]), number + 256))
        labels.append(m.label_windows(teacher, parts["test"], index, request.patch, request, number // 256))
    truth = parts["test"].batch(np.arange(len(parts["test"])))[1]
    error = torch.from_numpy(np.concatenate(labels)) - truth
    assert rows["teacher"]["mse"] == pytest.approx(float((error.double() ** 2).mean()), rel=1e-6)
    made = [json.loads(path.read_text())["key"] for path in (trained / "labels").glob("*/manifest.json")]
    assert request.patch in [key["patch"] for key in made if key["windows"] == len(parts["test"])]  # not chosen anew


def test_size_and_speed_stand_beside_the_errors(trained, evaluated):
    folder, out = evaluated
    rows = table(folder)["rows"]
    for name in ("distilled", "twin"):
        row, student = rows[str(trained / name)], m.PatchStudent.from_pretrained(trained / name)
        assert row["parameters"] == sum(weight.numel() for weight in student.parameters())
        student.save_pretrained(folder / name)
        assert row["bytes"] == pytest.approx((folder / name / "model.safetensors").stat().st_size, abs=64)
        assert 0 < row["cpu_ms"] < 1000
    assert rows["teacher"]["parameters"] > rows[str(trained / "twin")]["parameters"] > 1000
    assert "cpu_ms" in rows["teacher"] and "cpu_ms" not in rows["last value"]
    assert f"{rows['teacher']['parameters']:,} parameters" in out


def test_it_says_in_words_whether_the_teacher_helped(trained, evaluated):
    folder, out = evaluated
    mse = {name: row["mse"] for name, row in table(folder)["rows"].items()}
    change = 100 * (mse[str(trained / "distilled")] / mse[str(trained / "twin")] - 1)
    word = "made no difference" if abs(change) < 1 else "did harm" if change > 0 else "helped"
    assert f"The teacher {word}: {trained / 'distilled'} has {change:+.1f} % of MSE beside {trained / 'twin'}" in out
    assert re.search(r"a lower one on [01] of 1 series", out)


@pytest.mark.parametrize(
    ("student", "twin", "words"),
    [(0.8, 1.0, "The teacher helped"), (1.2, 1.0, "The teacher did harm"), (1.005, 1.0, "made no difference")],
)
def test_the_verdict_follows_the_errors(student, twin, words, capsys):
    row = {"mse_by_series": [1.0, 2.0]}
    rows = {"a": row | {"mse": student, "alpha": 0.5}, "b": row | {"mse": twin, "alpha": 0.0}}
    rows |= {"teacher": {"mse": 0.6}, "seasonal-naive": {"mse": 1.6}}
    m.verdict(rows, m.Say("en"))
    out = capsys.readouterr().out
    assert words in out and f"a keeps {100 * (1.6 - student):.0f} % of what the teacher gains" in out
    del rows["b"]
    m.verdict(rows, m.Say("zh"))
    assert "--alpha 0" in capsys.readouterr().out
    m.verdict(rows | {"teacher": {"mse": 2.0}}, m.Say("en"))
    assert "keeps" not in capsys.readouterr().out  # a teacher that is no better than naive gives nothing to keep


def test_pictures_are_drawn(evaluated):
    for name in ("forecast.png", "error_by_horizon.png"):
        assert (evaluated[0] / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_training_ends_with_the_table_that_evaluate_prints_again(trained, tmp_path):
    at_end = table(trained / "distilled")["rows"]
    assert evaluate(trained / "distilled", "--output_dir", tmp_path) == 0
    again = table(tmp_path)["rows"]
    assert again[str(trained / "distilled")]["weights"] == at_end["student"]["weights"]
    for metric in ("mse", "mae", "mase", "mse_by_step"):
        assert again[str(trained / "distilled")][metric] == pytest.approx(at_end["student"][metric], rel=1e-6)


def test_labels_of_the_test_windows_come_from_the_cache_where_they_are(trained, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise AssertionError("the teacher was asked again")

    assert evaluate(trained / "distilled", "--with_teacher", "--output_dir", tmp_path / "a") == 0
    monkeypatch.setattr(m.Teacher, "forecast", fail)
    monkeypatch.setattr(m, "fingerprint", lambda *_: None)  # as on a machine that has no weights
    assert evaluate(trained / "distilled", "--with_teacher", "--output_dir", tmp_path / "b") == 0
    assert "Label cache hit" in capsys.readouterr().out
    one, other = (table(tmp_path / name)["rows"]["teacher"] for name in "ab")
    assert one["mse"] == other["mse"] and "cpu_ms" in one and "cpu_ms" not in other


def test_a_run_without_teacher_can_be_set_beside_one_chosen_on_training_windows(trained, tmp_path, monkeypatch):
    judged, judge = [], m.judge
    monkeypatch.setattr(m, "judge", lambda t, windows, *more: judged.append(windows.digest) or judge(t, windows, *more))
    words = ["--with_teacher", "--output_dir", tmp_path, "--label_cache", tmp_path / "labels"]
    assert evaluate(trained / "twin", *words) == 0
    assert judged == [windows_of(trained)["train"].digest]
    assert table(tmp_path)["rows"]["teacher"]["mse"] > 0


@pytest.fixture
def hub_folder(trained, tmp_path):
    assert m.main(f"export --checkpoint {trained / 'distilled'} --format hub --output {tmp_path / 'hub'}".split()) == 0
    return tmp_path / "hub"


def test_the_forms_of_a_checkpoint_score_alike(trained, hub_folder, tmp_path):
    (file,) = (trained / "distilled").glob("best_model_epoch_*.pt")
    words = [hub_folder, file, trained / "distilled", "--data_dir", trained / "data", "--output_dir", tmp_path / "out"]
    assert evaluate(*words) == 0
    rows = table(tmp_path / "out")["rows"]
    assert len({rows[str(name)]["mse"] for name in (hub_folder, file, trained / "distilled")}) == 1
    assert len({rows[str(name)]["weights"] for name in (hub_folder, file, trained / "distilled")}) == 1


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
    before = (trained / "distilled" / "evaluation.json").read_bytes()
    assert evaluate(trained / "distilled", "--data_dir", "other", "--split_by", "time") == 0
    assert table(tmp_path / "evaluation")["series"] == ["o0.csv", "o1.csv", "o2.csv"]
    assert table(tmp_path / "evaluation")["windows"] == 3 * (30 - 16 + 1)
    assert (trained / "distilled" / "evaluation.json").read_bytes() == before
    assert "may have been trained" in capsys.readouterr().err
    moved = ["--data_dir", trained / "data", "--output_dir", tmp_path / "moved"]
    assert evaluate(trained / "distilled", *moved) == 0  # the run's own windows under another path
    assert "may have been trained" not in capsys.readouterr().err
    assert evaluate(trained / "distilled", "--split_seed", "5") == 0
    assert (trained / "distilled" / "evaluation.json").read_bytes() == before


def test_a_checkpoint_of_another_split_is_marked(trained, tmp_path, capsys):
    words = [trained / "distilled", "--split_seed", "5", "--output_dir", tmp_path]
    assert evaluate(*words) == 0
    assert "may have been trained on them" in capsys.readouterr().err
    assert evaluate(trained / "distilled", "--output_dir", tmp_path) == 0
    assert "may have been trained" not in capsys.readouterr().err


def test_checkpoints_of_different_lengths_are_not_compared(trained, tmp_path, capsys):
    student = m.PatchStudent(48, 16, 16, 1, 2, 8, 0.1)
    student.save_pretrained(tmp_path / "short")
    assert evaluate(trained / "distilled", tmp_path / "short") == 2
    assert "48 -> 16" in capsys.readouterr().err
    assert evaluate(trained / "distilled", "--context_length", "48") == 2
    assert "the flags 48 -> 16" in capsys.readouterr().err


def test_data_that_has_gone_is_named(trained, tmp_path, capsys):
    (file,) = (trained / "twin").glob("best_model_epoch_*.pt")
    content = torch.load(file, weights_only=True)
    content["run_config"]["data_dir"] = str(tmp_path / "gone")
    torch.save(content, tmp_path / "moved.pt")
    assert evaluate(tmp_path / "moved.pt") == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "gone") in error and "--data_dir" in error and len(error.strip().splitlines()) == 1


def test_all_problems_are_told_before_anything_slow(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(m, "open_student", None)
    (tmp_path / "file").write_text("")
    words = ["./nothing", "gone.pt", "--output_dir", tmp_path / "file", "--data_dir", tmp_path / "no", "--max_gap", "x"]
    assert evaluate(*words) == 2
    error = capsys.readouterr().err
    for part in ("5 problem(s)", "./nothing", "gone.pt", "--output_dir", "--data_dir", "--max_gap"):
        assert part in error


def test_a_checkpoint_with_a_pickle_is_refused_and_nothing_is_executed(tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return (shutil.rmtree, (str(tmp_path / "precious"),))

    (tmp_path / "precious").mkdir()
    torch.save({"format": 1, "student_config": Payload(), "model_state_dict": {}}, tmp_path / "a.pt")
    for words in (["evaluate"], ["predict", "--input", __file__], ["export", "--format", "onnx"]):
        assert m.main([*words, "--checkpoint", str(tmp_path / "a.pt")]) == 2
        error = capsys.readouterr().err
        assert "refused" in error and "Traceback" not in error and len(error.strip().splitlines()) == 1
    assert (tmp_path / "precious").is_dir()


def changed(trained, folder, run="twin", **flags):
    """A copy of a run's checkpoint with other flags in its run_config."""
    content = torch.load(next((trained / run).glob("best_model_epoch_*.pt")), weights_only=True)
    content["run_config"] |= flags
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "best_model_epoch_1.pt")
    return folder


def test_the_teacher_is_that_of_the_run_that_had_one_wherever_it_stands(trained, tmp_path):
    other = changed(trained, tmp_path / "plain", teacher_model="Salesforce/moirai-1.1-R-base", num_samples=100)
    words = ["--with_teacher", "--output_dir", tmp_path]
    assert evaluate(other, trained / "distilled", *words) == 0
    first = table(tmp_path)["rows"]["teacher"]["mse"]
    assert evaluate(trained / "distilled", other, *words) == 0
    assert table(tmp_path)["rows"]["teacher"]["mse"] == first


def test_a_run_from_a_gpu_is_labelled_in_float32_on_the_cpu(trained, tmp_path):
    gpu = changed(
        trained, tmp_path / "gpu", "distilled", teacher_precision="bf16", device="cuda", precision="bf16-mixed"
    )
    words = ["--with_teacher", "--output_dir", tmp_path, "--label_cache", tmp_path / "labels"]
    assert evaluate(gpu, *words) == 0
    (manifest,) = (tmp_path / "labels").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["precision"] == "32"


def test_a_checkpoint_that_is_called_teacher_is_no_teacher(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    changed(trained, tmp_path / "teacher", "distilled")
    assert evaluate("teacher", "--output_dir", tmp_path / "out") == 0
    rows = table(tmp_path / "out")["rows"]
    assert [*rows] == ["./teacher", "seasonal-naive", "last value"] and "keeps" not in capsys.readouterr().out
