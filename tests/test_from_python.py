"""From Python: arrays, tensors and DataFrames in, the same out; the guide's snippet runs."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SCRIPT, hourly

import moirai_distill as md

L, H = 64, 16
GUIDE = SCRIPT.parent / "docs" / "guide.md"


@pytest.fixture(scope="module")
def student(trained):
    return md.PatchStudent.from_pretrained(trained / "distilled")


@pytest.fixture
def values():
    """Contexts (3, L) in large units."""
    return 1e4 + 300 * np.random.default_rng(0).standard_normal((3, L)).cumsum(1)


def plain(student, context):
    """What the module says to contexts (B, L)."""
    with torch.inference_mode():
        return student(torch.from_numpy(np.array(context))).numpy()


# -- Arrays and tensors ----------------------------------------------------------------------------


def test_arrays_give_arrays_and_tensors_tensors_of_the_same_numbers(student, values):
    expected = plain(student, values)
    found = student.forecast(values)
    assert isinstance(found, np.ndarray) and found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(student.forecast(values[1]), found[1], rtol=1e-6)
    tensor = student.forecast(torch.from_numpy(values))
    assert tensor.dtype == torch.float64
    np.testing.assert_array_equal(tensor.numpy(), found)
    assert student.forecast(values.astype(np.float32)).dtype == np.float32
    assert student.forecast(torch.from_numpy(values).float()).dtype == torch.float32
    whole = student.forecast(np.arange(L) % 7)
    assert whole.dtype == np.float64 and whole.shape == (H,)
    assert student.forecast(values.tolist()).tolist() == found.tolist()
    assert student.forecast(np.empty((0, L))).shape == (0, H)


def test_no_gradients_are_left_on_and_the_mode_stays(student, values):
    weight = student.head.weight
    context = torch.from_numpy(values).requires_grad_()
    for mode in (True, False):
        student.train(mode)
        found = student.forecast(context)
        assert student.training == mode
        assert not found.requires_grad and not found.is_inference()
        np.testing.assert_array_equal(found.numpy(), student.forecast(values))  # without dropout
    assert weight.requires_grad
    student(context).sum().backward()  # to train through the module is possible as before
    assert context.grad is not None
    student.zero_grad()


def test_of_longer_contexts_the_last_points_are_taken(student, values):
    longer = np.concatenate([values[:, :10] + 5, values], axis=1)
    np.testing.assert_array_equal(student.forecast(longer), student.forecast(values))
    np.testing.assert_array_equal(student.forecast(longer[0]), student.forecast(values[0]))


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf, 1e300])
def test_missing_values_are_filled_as_predict_fills_them(missing, student, values):
    holes = values.copy()
    holes[0, [5, 6, 30]] = missing
    holes[1, -2:] = missing
    found = student.forecast(holes)
    rows = []
    for row in np.where(np.isfinite(holes) & (holes < 1e200), holes, np.nan):
        rows.append(md.last_context(row, L).values)
    assert rows[1][-1] == values[1, -3]
    np.testing.assert_allclose(found, plain(student, rows), rtol=1e-12)
    np.testing.assert_allclose(found[2], student.forecast(values)[2], rtol=1e-6)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("shape", [(L - 1,), (2, L - 1), (1, 1, L), ()])
def test_other_shapes_are_refused_with_those_that_fit(shape, student):
    with pytest.raises(ValueError, match=rf"expected \({L},\) or \(B, {L}\)"):
        student.forecast(np.zeros(shape))


def test_a_context_of_nothing_is_refused_by_its_number(student, values):
    values[1] = np.nan
    with pytest.raises(ValueError, match="of context 1 are all missing"):
        student.forecast(values)


# -- DataFrames ------------------------------------------------------------------------------------


def predicted(run, path):
    """The table that predict writes of a CSV."""
    output = path.with_name("out.csv")
    words = ["predict", "--checkpoint", run, "--input", path, "--output", output]
    assert md.main([*map(str, words)]) == 0
    return pd.read_csv(output, index_col=0, parse_dates=True)


@pytest.mark.parametrize("form", ["index", "column", "unnamed index"])
def test_a_frame_gives_the_frame_that_predict_writes(form, student, trained, tmp_path):
    frame = hourly(100, seed=3)
    frame.loc[[50, 97], "value"] = np.nan
    frame.to_csv(tmp_path / "a.csv", index=False)
    expected = predicted(trained / "distilled", tmp_path / "a.csv")
    before = frame.copy()
    given = frame if form == "column" else frame.set_index("date")
    if form == "unnamed index":
        given.index.name = None
    table = md.forecast_frame(student, given)
    assert isinstance(table.index, pd.DatetimeIndex)
    assert table.index.name == "date"
    assert [*table.index] == [*expected.index]
    assert [*table.columns] == [*expected.columns] == ["value", "value_q0.1", "value_q0.9"]
    np.testing.assert_allclose(table, expected, rtol=1e-12)
    pd.testing.assert_frame_equal(frame, before)


def test_columns_and_long_frames_give_a_column_for_each_series(student):
    frame = hourly(90).rename(columns={"value": "a"})
    frame["b"] = 10 * frame["a"]
    table = md.forecast_frame(student, frame, columns=["a", "b"])
    np.testing.assert_allclose(table["b"], 10 * table["a"], rtol=1e-4)
    long = pd.concat([hourly(90, seed=number).assign(id=f"s{number}") for number in range(3)])
    assert [*md.forecast_frame(student, long, levels=()).columns] == ["s0", "s1", "s2"]
    without = md.forecast_frame(student, frame[["b"]])
    assert without.index.tolist() == [*range(1, H + 1)]


def test_a_frame_that_cannot_be_forecast_is_one_line(student):
    with pytest.raises(md.UserError, match="too short: 20 rows; the student takes 64"):
        md.forecast_frame(student, hourly(20))
    ids = np.repeat(["a", "b"], [88, 2])
    with pytest.raises(md.UserError, match="frame / b: too short"):
        md.forecast_frame(student, hourly(90).assign(id=ids))
    with pytest.raises(md.UserError, match="nosuch"):
        md.forecast_frame(student, hourly(90), columns=["nosuch"])


def test_the_guides_snippet_runs(trained, tmp_path, monkeypatch, capsys):
    text = GUIDE.read_text(encoding="utf-8").partition("### From Python\n")[2]
    code = re.search(r"^```python\n(.*?)^```$", text, re.M | re.S)[1]
    shutil.copytree(trained / "distilled", tmp_path / "checkpoints" / "demo" / "run")
    (tmp_path / "checkpoints" / "demo" / "data").mkdir()
    hourly(200).to_csv(tmp_path / "checkpoints/demo/data/series_15.csv", index=False)
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(compile(code, str(Path(GUIDE.name)), "exec"), space)
    assert space["ahead"].shape == (H,)
    assert np.isfinite(space["ahead"]).all()
    assert space["table"].shape == (H, 3)
    assert space["fan"].shape == (9, H)
    assert space["table"].index[0] == pd.Timestamp("2024-01-09 08:00")
    assert "2024-01-09" in capsys.readouterr().out
