"""Forecasters of the user's: a Python file as the teacher, and as a row of the ruler."""

import json

import numpy as np
import pytest
import torch
from conftest import (
    SMALL,
    SMALL_RUN,
    hourly,
    label_task,
    load_teacher,
    make_job,
    split_folder,
    teacher_request,
)

import moirai_distill as md

LAST_VALUE = """
import numpy as np

LICENCE = "Apache-2.0"

def forecast(context, horizon):
    return np.repeat(context[:, -1:], horizon, axis=1)
"""


def write(folder, text, name="mine.py"):
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def fresh():
    """Each test runs its files anew."""
    md.own_forecaster.cache_clear()


def labels_of(windows, file, cache, **changes):
    task = label_task(windows, teacher_request(file, cache, teacher_patch_size="auto", **changes))
    return md.get_labels(task, make_job())


def test_it_gets_contexts_in_the_units_of_the_series(few_csvs, tmp_path):
    """The labels of the last value, by a file of the user's, are the last values."""
    windows = split_folder(few_csvs).windows["train"]
    labels = labels_of(windows, write(tmp_path, LAST_VALUE), tmp_path / "cache")
    context, _, _ = windows.batch(np.arange(len(windows)))
    expected = context[:, -1:].expand(-1, windows.horizon)
    torch.testing.assert_close(torch.from_numpy(np.array(labels.array)), expected)

    keeping = """
import numpy as np
seen = []
def forecast(context, horizon):
    assert context.dtype == np.float32
    seen.append(context)
    return context[:, :horizon]
"""
    forecaster = md.own_forecaster(str(write(tmp_path, keeping, "keeping.py")))
    forecaster.answer_windows(windows, np.arange(3))
    (seen,) = forecaster.function.__globals__["seen"]
    origin = windows.origins[windows.series[0]]
    np.testing.assert_allclose(seen[0], origin.in_units(context[0]), rtol=1e-5)


def test_of_quantiles_the_middle_one_is_the_point(tmp_path):
    fan = """
import numpy as np
def forecast(context, horizon):
    levels = np.arange(1, 10)[::-1, None]  # in the wrong order
    return np.broadcast_to(10.0 * levels, (len(context), 9, horizon))
"""
    forecaster = md.own_forecaster(str(write(tmp_path, fan)))
    values = forecaster.forecast(np.zeros((2, 5), np.float32), 3)
    assert values.shape == (2, 9, 3)
    assert values[0, :, 0].tolist() == [10, 20, 30, 40, 50, 60, 70, 80, 90]


def test_the_file_and_its_version_make_the_key(tmp_path):
    file = write(tmp_path, LAST_VALUE)
    first = md.fingerprint(str(file), None)
    md.own_forecaster.cache_clear()
    write(tmp_path, LAST_VALUE + "\nimport os\nVERSION = os.environ.get('OWN_VERSION', 'a')\n")
    second = md.fingerprint(str(file), None)
    md.own_forecaster.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OWN_VERSION", "b")
        third = md.fingerprint(str(file), None)
    assert len({first, second, third}) == 3


def test_its_labels_are_a_cache_hit_whatever_the_flags_of_moirai_are(few_csvs, tmp_path):
    windows = split_folder(few_csvs).windows["train"]
    file = write(tmp_path, LAST_VALUE)
    labels = labels_of(windows, file, tmp_path / "cache")
    assert labels.manifest["licence"] == "Apache-2.0"
    assert labels.manifest["teacher"] == str(file)
    assert labels.manifest["commit"] is None

    def fail():
        raise AssertionError("labelled again")

    request = teacher_request(file, tmp_path / "cache", teacher_point="mean", num_samples=7)
    again = md.get_labels(label_task(windows, request, fail), make_job())
    assert again.folder == labels.folder


FAN = """
import numpy as np
def forecast(context, horizon):
    steps = np.arange(-4, 5)[:, None] * np.ones(horizon)
    return context[:, -1:, None] + steps
"""


def test_its_quantiles_are_labels(few_csvs, tmp_path):
    windows = split_folder(few_csvs).windows["train"]
    labels = labels_of(windows, write(tmp_path, FAN), tmp_path / "cache", quantiles="on")
    index = np.arange(len(windows))
    context, _, _ = windows.batch(index)
    quantiles, is_finite = labels.quantile_batch(index, context)
    assert is_finite.all()
    _, deviation = windows.units_of(index)
    expected = (
        np.arange(-4, 5)[None, :, None] / deviation[..., None] + context[:, -1:, None].numpy()
    )
    np.testing.assert_allclose(quantiles, np.broadcast_to(expected, quantiles.shape), atol=0.01)


COUNTING = """
import numpy as np
asked = []
def forecast(context, horizon):
    asked.extend(context[:, -1])
    steps = np.arange(-4, 5)[:, None] * np.ones(horizon)
    return context[:, -1:, None] + steps
"""


def test_it_is_asked_once_about_each_window_for_points_and_quantiles(few_csvs, tmp_path):
    windows = split_folder(few_csvs).windows["test"]
    other = md.own_forecaster(str(write(tmp_path, COUNTING)))
    answer = md.other_answers(other, windows)
    scores, quantiles = md.score_answers(answer, windows, 64, make_job())
    assert len(other.function.__globals__["asked"]) == len(windows)
    naive = md.score(md.naive_forecaster(md.last_value, windows), windows, 64, make_job())
    assert scores.mse == pytest.approx(naive.mse, rel=1e-4)
    assert 0.9 < quantiles.coverage_80 <= 1  # steps of a whole unit


def test_one_that_gives_quantiles_now_and_then_is_one_line(few_csvs, tmp_path):
    text = FAN + "    quantiles = context[:, -1:, None] + steps\n"
    text += "    return quantiles if len(context) > 1 else quantiles[:, 4]\n"
    text = text.replace("    return context[:, -1:, None] + steps\n", "")
    windows = split_folder(few_csvs).windows["test"]
    other = md.own_forecaster(str(write(tmp_path, text)))
    other.answer_windows(windows, np.arange(2))
    with pytest.raises(md.UserError, match="quantiles for some contexts, and points for others"):
        other.answer_windows(windows, np.arange(1))


def test_a_file_without_quantiles_is_not_asked_for_them_again(few_csvs, tmp_path):
    windows = split_folder(few_csvs).windows["train"]
    file = write(tmp_path, LAST_VALUE)
    for quantiles in ("off", "on"):
        labels = labels_of(windows, file, tmp_path / "cache", quantiles=quantiles)
        assert labels.offsets is None
    assert labels.manifest["quantiles"] == []

    def fail():
        raise AssertionError("labelled again")

    request = teacher_request(file, tmp_path / "cache", quantiles="on")
    assert md.get_labels(label_task(windows, request, fail), make_job()).offsets is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1", "it defines no function forecast(context, horizon)"),
        ("forecast = 3", "it defines no function forecast(context, horizon)"),
        ("def forecast(:\n", ", line 1: SyntaxError: "),
        ("\nimport nothing_like_it", ", line 2: ModuleNotFoundError: No module named 'nothing"),
        ("import sys\nsys.exit(3)", ", line 2: SystemExit: 3"),
        (
            "def helper(c):\n    return c['a']\ndef forecast(c, h):\n    return helper(c)",
            ", line 2: IndexError: ",
        ),
        ("def forecast(c, h):\n    return c", "forecast gave the shape (2, 5) for contexts (2, 5)"),
        ("def forecast(c, h):\n    return c[:, :h] / 0 * 0", "not finite, for 2 of 2 contexts"),
        ("def forecast(c, h):\n    c[1, 0] /= 0\n    return c[:, :h]", "for 1 of 2 contexts"),
        ("def forecast(c, h):\n    pass", "forecast gave the shape () for"),
        ("def forecast(c, h):\n    return 'much'", "forecast gave a str, which is no array"),
    ],
)
def test_what_is_wrong_with_it_is_one_line(text, reason, tmp_path):
    file = write(tmp_path, text)
    with pytest.raises(md.UserError) as caught, np.errstate(all="ignore"):
        forecaster = md.own_forecaster(str(file))
        forecaster.forecast(np.ones((2, 5), np.float32), 3)
    assert str(file) in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_it_may_import_what_lies_beside_it_and_leaves_nothing_there(tmp_path):
    write(
        tmp_path, "def last(context, horizon):\n    return context[:, -horizon:]\n", "beside_it.py"
    )
    file = write(tmp_path, "from beside_it import last as forecast\n")
    forecaster = load_teacher(file)
    assert forecaster.forecast(np.ones((1, 5), np.float32), 3).tolist() == [[1, 1, 1]]
    assert not list(tmp_path.glob("__pycache__/mine*"))


def test_a_hub_id_that_ends_like_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not md.is_own_file("owner/model.py")
    (tmp_path / "owner").mkdir()
    write(tmp_path / "owner", LAST_VALUE, "model.py")
    assert md.is_own_file("owner/model.py")
    assert md.is_own_file("missing.py")  # which is said at once, not after a look at the hub


def test_a_missing_file_is_one_line(few_csvs, tmp_path, capsys):
    words = ["label", "--lang", "en", "--data_dir", str(few_csvs), "--device", "cpu"]
    words += ["--teacher_model", str(tmp_path / "mine.py")]
    for cache in (tmp_path / "new", tmp_path):  # carried labels may lie in one that is there
        assert md.main([*words, *SMALL.split()[:4], "--label_cache", str(cache)]) == 2
        assert f"{tmp_path / 'mine.py'}: no such file" in capsys.readouterr().err


def test_from_training_to_the_ruler(tmp_path, capsys):
    """A file of the user's is the teacher of a run, and another one stands in its table."""
    (tmp_path / "data").mkdir()
    hourly(400).to_csv(tmp_path / "data" / "one.csv", index=False)
    file = write(tmp_path, LAST_VALUE)
    run = str(tmp_path / "run")
    words = ["--data_dir", str(tmp_path / "data"), "--label_cache", str(tmp_path / "labels")]
    words += ["--teacher_model", str(file), "--save_dir", run, "--alpha", "0.5"]
    assert md.main(["train", *SMALL.split(), *SMALL_RUN.split(), *words]) == 0
    printed = capsys.readouterr()
    assert "Patch size" not in printed.out
    assert "the teacher gives no quantiles" in printed.out + printed.err
    more = ["--num_epochs", "3", "--resume"]
    assert md.main(["train", *SMALL.split(), *SMALL_RUN.split(), *words, *more]) == 0
    capsys.readouterr()

    yesterday = "def forecast(context, horizon):\n    return context[:, -24:][:, :horizon]\n"
    other = write(tmp_path, yesterday, "yesterday.py")
    words = ["evaluate", "--lang", "en", "--device", "cpu", "--checkpoint", run, "--with_teacher"]
    assert md.main(words) == 2  # a file runs only where the user names it
    assert f"--teacher_model {file}" in capsys.readouterr().err
    words += ["--teacher_model", str(file), "--with_forecaster", str(other)]
    assert md.main(words) == 0
    printed = capsys.readouterr().out
    assert "% of MSE beside " in printed
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"]
    assert rows["teacher"]["mse"] == pytest.approx(rows["last value"]["mse"], rel=1e-5)
    assert rows[str(other)]["mse"] == pytest.approx(rows["seasonal-naive"]["mse"], rel=1e-5)
    assert rows[str(other)]["cpu_ms"] > 0
    assert rows[str(other)]["parameters"] is None

    output = str(tmp_path / "hub")
    export = ["export", "--checkpoint", run, "--format", "hub", "--output", output, "--lang", "en"]
    assert md.main(export) == 0
    card = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    assert "mine.py" in card and "Apache-2.0" in card
