"""export: a model to ship, which forecasts as the student does and says where it comes from."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import SCRIPT, hourly

import moirai_distill as md

GUIDE = SCRIPT.parent / "docs" / "guide.md"


def export(checkpoint, form, *words):
    """Exit code of export."""
    fixed = ["export", "--checkpoint", checkpoint, "--format", form, "--lang", "en"]
    return md.main([*map(str, fixed), *map(str, words)])


def best_of(run):
    """Path of the best checkpoint of a run."""
    (path,) = run.glob("best_model_epoch_*.pt")
    return path


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def walks(count, scale=1.0, offset=0.0):
    """Random walks (count, 64), float64."""
    steps = np.random.default_rng(count).standard_normal((count, 64))
    return steps.cumsum(1) * scale + offset


def small_student(info=()):
    """A student with random weights."""
    sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "patch_size": 8, "dropout": 0.1}
    return md.PatchStudent(context_length=64, prediction_length=16, info=info, **sizes)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """(ONNX file of the distilled run; what its export printed)."""
    path = tmp_path_factory.mktemp("onnx") / "some folder" / "student.onnx"
    printed = []

    def keep(*words, **_settings):
        printed.append(" ".join(map(str, words)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", keep)
        assert export(trained / "distilled", "onnx", "--output", path) == 0
    return path, "\n".join(printed)


@pytest.fixture(scope="module")
def onnx_file(exported):
    path, _ = exported
    return path


@pytest.fixture(scope="module")
def hub_folder(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "student"
    assert export(trained / "distilled", "hub", "--output", folder) == 0
    return folder


@pytest.fixture
def ready_made(onnx_file, monkeypatch):
    """torch.onnx.export takes seconds; here it gives what it gave for the distilled run."""

    class Program:
        def __init__(self):
            self.model_proto = self

        def SerializeToString(self, deterministic):
            assert deterministic
            return onnx_file.read_bytes()

    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Program())


# -- ONNX ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 33])
@pytest.mark.parametrize(
    ("scale", "offset"),
    [(1, 0), (1e-4, 0), (1e5, 0), (1, 100), (1e-25, 0), (1e25, 0), (0.02, 5812345), (1e-3, 1e6)],
)
def test_onnx_forecasts_as_the_student_in_raw_units_at_any_batch_size(
    trained, onnx_file, count, scale, offset
):
    session = session_of(onnx_file)
    (given,) = session.get_inputs()
    result, quantiles = session.get_outputs()
    assert [result.name, quantiles.name] == ["forecast", "quantiles"]
    assert given.shape[1:] == [64]
    assert result.shape[1:] == [16]
    assert not isinstance(given.shape[0], int)

    context = walks(count, scale, offset)
    forecast, quantiles = session.run(None, {given.name: context})
    student = md.PatchStudent.from_pretrained(trained / "distilled")
    expected = student.forecast(context)
    assert forecast.shape == (count, 16)
    assert forecast.dtype == expected.dtype == np.float64
    deviation = context.std(1).max()
    assert np.abs(forecast - expected).max() < 1e-4 * deviation
    assert np.abs(quantiles - student.quantiles(context)).max() < 1e-4 * deviation
    assert (np.diff(quantiles, axis=1) >= 0).all()


def test_onnx_forecasts_small_movements_of_a_large_value(onnx_file):
    """A meter that counts up moves by a hundred-millionth of its value; float32 sees none of it."""
    session = session_of(onnx_file)
    movement = walks(4)
    expected, _ = session.run(None, {"context": movement})
    forecast, _ = session.run(None, {"context": movement + 1e8})
    assert np.abs(forecast - 1e8 - expected).max() < 1e-4 * movement.std(1).min()
    assert expected.std(1).min() > 1e-3 * movement.std(1).min()


def test_onnx_refuses_float32_with_what_it_expects(onnx_file):
    with pytest.raises(Exception, match=r"expected: \(tensor\(double\)\)"):
        session_of(onnx_file).run(None, {"context": walks(2).astype(np.float32)})


def test_a_constant_context_gives_that_constant_under_onnx(onnx_file):
    forecast, _ = session_of(onnx_file).run(None, {"context": np.full((2, 64), 7.0)})
    assert (forecast == 7).all()


def test_onnx_is_one_file_with_its_facts(trained, onnx_file, teacher_folder):
    assert os.listdir(onnx_file.parent) == ["student.onnx"]
    facts = session_of(onnx_file).get_modelmeta().custom_metadata_map
    assert facts["context_length"] == "64"
    assert facts["prediction_length"] == "16"
    assert facts["sampling_frequency"] == "h"
    assert facts["teacher"] == teacher_folder.name
    assert facts["licence"]
    assert str(teacher_folder) not in str(facts)
    assert b"moirai_distill.py" not in onnx_file.read_bytes()  # as in PyTorch's own remarks
    twin = md.onnx_facts(md.PatchStudent.from_pretrained(trained / "twin"))
    assert twin["teacher"] == "none"


def test_export_says_the_difference_from_pytorch(exported):
    _, out = exported
    count = len(md.random_contexts(64))
    found = re.search(rf"on {count} contexts: (\S+) of their deviation", out)
    assert float(found[1]) < md.ONNX_TOLERANCE


@pytest.mark.parametrize("length", [2, 64, 720])
def test_onnx_is_checked_on_random_walks_in_several_units_and_on_a_constant(length):
    contexts = md.random_contexts(length)
    assert contexts.dtype == torch.float64
    assert contexts.shape[1] == length
    assert torch.equal(contexts, md.random_contexts(length))
    assert contexts.isfinite().all()
    constant, walking = contexts[:1], contexts[1:]
    assert (constant == constant[0, 0]).all()
    assert (walking.std(1) > 0).all()

    offset = walking.mean(1) / walking.std(1, unbiased=False)  # in deviations
    counts = [int(((offset / size - 1).abs() < 1e-4).sum()) for size in (1e6, 1e8)]
    assert counts == [len(walking) // 4] * 2
    assert int((walking[:, -1] == 0).sum()) == len(walking) // 4
    for kind in walking.split(len(walking) // 4):
        thousandths, ones, thousands = kind.split(len(kind) // 3)
        torch.testing.assert_close(ones, 1e3 * thousandths)
        torch.testing.assert_close(thousands, 1e3 * ones)
        assert 0.3 < ones.diff(dim=1).std() < 3


@pytest.mark.parametrize(
    ("place", "value"),
    [("data_dir", "gone"), ("data_dir", "~nobody-of-this-name/x"), ("teacher_model", "gone/t")],
)
def test_a_run_whose_data_and_teacher_have_gone_can_be_exported(
    trained, ready_made, tmp_path, capsys, place, value
):
    run = shutil.copytree(trained / "distilled", tmp_path / "run")
    for path in (run / "last.pt", best_of(run)):
        content = torch.load(path, weights_only=True)
        content["run_config"][place] = value
        content["teacher"]["teacher"] = "gone/t"
        torch.save(content, path)
    for form, name in (("onnx", "student.onnx"), ("hub", "hub/model.safetensors")):
        assert export(run, form) == 0
        assert capsys.readouterr().err == ""
        assert (run / name).is_file()
    assert "| `student` |" in (run / "hub" / "README.md").read_text()


@pytest.mark.parametrize(("times", "is_kept"), [(0.5, True), (2, False)])
def test_an_export_that_differs_by_more_than_the_tolerance_is_not_kept(
    trained, ready_made, onnx_file, tmp_path, capsys, times, is_kept
):
    """The student forecasts so many deviations more than the file, as after a faulty export."""
    content = torch.load(best_of(trained / "distilled"), weights_only=True)
    weights = content["model_state_dict"]
    share = weights[
        "share"
    ].item()  # it may be 0 here: a 1 takes its place, with the same forecasts
    weights["head.weight"] *= share
    weights["head.bias"] *= share
    weights["head.bias"] += times * md.ONNX_TOLERANCE
    weights["share"].fill_(1.0)
    torch.save(content, tmp_path / "a.pt")
    output = tmp_path / "a.onnx"
    output.write_bytes(b"an earlier one")
    code = export(tmp_path / "a.pt", "onnx", "--output", output)
    if is_kept:
        assert code == 0
        assert output.read_bytes() == onnx_file.read_bytes()
    else:
        assert code == 2
        assert "not kept" in capsys.readouterr().err
        assert output.read_bytes() == b"an earlier one"
    assert {*os.listdir(tmp_path)} == {"a.pt", "a.onnx"}


def test_without_the_onnx_packages_it_says_what_to_install(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export(trained / "twin", "onnx", "--output", tmp_path / "a.onnx") == 2
    assert "onnxscript is not installed: " in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_the_guides_forecaster_needs_onnxruntime_alone(onnx_file, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.S)
    (code,) = [block for block in blocks if "import onnxruntime" in block]
    assert len(code.strip().splitlines()) <= 10
    assert "torch" not in code
    assert "moirai" not in code

    hourly(900).to_csv(tmp_path / "series.csv", index=False)
    for pattern, ours in (
        (r'"[^"]*\.onnx"', repr(str(onnx_file))),
        (r'"[^"]*\.csv"', '"series.csv"'),
        (r"-\d+:", "-64:"),  # the context length
    ):
        code, count = re.subn(pattern, lambda _, ours=ours: ours, code)
        assert count == 1
    code += "\nimport sys\nassert 'torch' not in sys.modules\n"
    code += "assert forecast.shape == (1, 16) and np.isfinite(forecast).all()\n"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- int8 ------------------------------------------------------------------------------------------


def test_int8_is_small_as_good_and_says_so(trained, ready_made, onnx_file, tmp_path, capsys):
    run = shutil.copytree(trained / "distilled", tmp_path / "run")
    assert export(run, "onnx", "--int8") == 0
    out = capsys.readouterr().out
    path = run / "student_int8.onnx"
    evaluation = json.loads((run / "evaluation.json").read_text())
    windows, mse, rounded_mse = re.search(
        r"MSE on (\S+) windows: (\S+) in float32, (\S+) in int8", out
    ).groups()
    assert int(windows.replace(",", "")) == evaluation["windows"]
    assert mse == f"{evaluation['rows']['student']['mse']:.4f}"
    assert float(rounded_mse) <= 1.01 * float(mse)
    assert f"Size: {1e-6 * path.stat().st_size:.2f} MB" in out

    weights = md.PatchStudent.from_pretrained(run).parameters()
    of_matrices = sum(weight.numel() for weight in weights if weight.ndim == 2)
    saved = onnx_file.stat().st_size - path.stat().st_size
    assert saved > 2 * of_matrices  # three bytes of four, but for scales and operations

    session = session_of(path)
    contexts = np.concatenate([walks(20), walks(20, 1e5, 1e9), np.full((1, 64), 7.0)])
    points, quantiles = session.run(None, {"context": contexts})
    assert (np.diff(quantiles, axis=1) >= 0).all()
    assert (points[-1] == 7).all()
    for row, context in enumerate(contexts[:3]):  # whatever else is in the batch
        alone, _ = session.run(None, {"context": context[None]})
        np.testing.assert_allclose(alone[0], points[row], atol=1e-5)
    exact, exact_quantiles = session_of(onnx_file).run(None, {"context": walks(20)})
    np.testing.assert_allclose(points[:20], exact, atol=0.1 * walks(20).std(1).max())
    difference = np.abs(quantiles[:20] - exact_quantiles).max()
    assert 0 < difference < 0.1 * walks(20).std(1).max()


def test_the_scales_of_int8_are_of_rows_or_columns_whichever_are_fewer():
    values = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    values[:, 0] = 0
    for weights, shape in ((values, (1, 4)), (values.T, (4, 1)), (values[:, 1], (1,))):
        kept, _ = md.rounded_weights("w", weights)
        assert kept["w.int8"].dtype == np.int8
        assert kept["w.scale"].shape == shape
        difference = np.abs(kept["w.int8"] * kept["w.scale"] - weights)
        assert (difference <= 0.501 * kept["w.scale"]).all()


def test_int8_that_costs_more_than_it_may_is_not_kept(
    trained, ready_made, tmp_path, capsys, monkeypatch
):
    run = shutil.copytree(trained / "distilled", tmp_path / "run")
    before = {*os.listdir(run)}
    round_well = md.rounded_weights

    def round_badly(name, values):
        kept, steps = round_well(name, values)
        return {name: array // 32 * 32 for name, array in kept.items()}, steps

    monkeypatch.setattr(md, "rounded_weights", round_badly)
    assert export(run, "onnx", "--int8") == 2
    error = capsys.readouterr().err.strip()
    assert re.search(r"student_int8\.onnx: not kept: the (MSE|WQL) of int8 is ", error)
    assert len(error.splitlines()) == 1
    assert {*os.listdir(run)} == before


@pytest.mark.parametrize("data", ["gone", "other"])
def test_int8_is_judged_on_random_walks_where_the_data_is_not_at_hand(
    trained, ready_made, tmp_path, capsys, data
):
    content = torch.load(best_of(trained / "distilled"), weights_only=True)
    content["run_config"]["data_dir"] = str(tmp_path / data)
    torch.save(content, tmp_path / "a.pt")
    if data == "other":
        (tmp_path / data).mkdir()
        for number in range(3):
            hourly(300, seed=number).to_csv(tmp_path / data / f"{number}.csv", index=False)
    assert export(tmp_path / "a.pt", "onnx", "--int8") == 0
    printed = capsys.readouterr()
    assert f"MSE on {md.INT8_WALKS} windows: " in printed.out
    assert "random walks are taken: " in printed.err and str(tmp_path / data) in printed.err


# -- An ONNX file as a checkpoint ------------------------------------------------------------------


def test_an_onnx_file_is_scored_as_its_run_is(
    trained, onnx_file, ready_made, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(md, "draw", lambda path, panels: None)
    monkeypatch.setattr(md, "milliseconds", lambda call: 1.0)
    small = tmp_path / "small.onnx"
    assert export(trained / "distilled", "onnx", "--int8", "--output", small) == 0
    words = ["evaluate", "--lang", "en", "--device", "cpu", "--output_dir", tmp_path]
    words += ["--data_dir", trained / "data", "--checkpoint", onnx_file, small]
    capsys.readouterr()
    assert md.main([*map(str, words)]) == 0
    printed = capsys.readouterr()
    assert "these are not the test windows" not in printed.err
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    truth = json.loads((trained / "distilled" / "evaluation.json").read_text())["rows"]["student"]
    for metric in ("mse", "mae", "mase", "wql", "coverage_80"):
        assert rows[str(onnx_file)][metric] == pytest.approx(truth[metric], rel=1e-4)
        assert rows[str(small)][metric] == pytest.approx(truth[metric], rel=0.02)
    assert rows[str(small)]["wql"] != rows[str(onnx_file)]["wql"]
    assert rows[str(small)]["parameters"] == truth["parameters"]
    assert rows[str(small)]["bytes"] == small.stat().st_size

    words += ["--horizon", "40"]  # of the median alone, which goes on from itself
    assert md.main([*map(str, words)]) == 0
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert 0 < rows[str(onnx_file)]["coverage_80"] < 1


def changed_onnx(source, path, change):
    """A copy of an ONNX file after `change(model)`."""
    model = onnx.load_model_from_string(source.read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def test_an_onnx_file_without_facts_is_scored_by_the_flags(trained, onnx_file, tmp_path, capsys):
    def forget(model):
        del model.metadata_props[:]

    path = changed_onnx(onnx_file, tmp_path / "old.onnx", forget)
    opened = md.open_onnx(path)
    assert opened.content == {"student_config": {}}
    words = ["evaluate", "--lang", "en", "--checkpoint", str(path), "--device", "cpu"]
    assert md.main(words) == 2
    assert "(it does not say where) is not here; give --data_dir" in capsys.readouterr().err
    words += ["--split_ratio", "1:1:1", "--season", "5"]
    inherited = md.inherit_arguments(md.parse_arguments(words), opened, opened)
    assert (inherited.context_length, inherited.prediction_length) == (64, 16)
    assert (inherited.split_ratio, inherited.season) == ((1, 1, 1), 5)


def test_other_commands_say_that_evaluate_alone_takes_an_onnx_file(trained, onnx_file, capsys):
    series = str(trained / "data" / "s00.csv")
    for words in (["predict", "--input", series], ["export", "--format", "hub"]):
        assert md.main([*words, "--checkpoint", str(onnx_file), "--lang", "en"]) == 2
        error = capsys.readouterr().err
        assert f"{onnx_file}: an ONNX file, which evaluate alone takes" in error


def add_node(kind, **attributes):
    """A change of a model: an operation on the context, whose result nobody takes."""

    def change(model):
        inputs = [] if kind == "Constant" else ["context"]
        node = onnx.helper.make_node(kind, inputs, ["spare"], **attributes)
        model.graph.node.insert(0, node)

    return change


def read_from_elsewhere(model):
    tensor = next(one for one in model.graph.initializer if one.dims == [1])  # tiny: no lie
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def call_a_function(model):
    node = onnx.helper.make_node("Identity", ["a"], ["b"])
    imports = [onnx.helper.make_opsetid("", 20)]
    model.functions.append(onnx.helper.make_function("own", "f", ["a"], ["b"], [node], imports))


def claim_a_large_tensor(model):
    model.graph.initializer[0].dims[:] = [10**6, 10**6]


def double(times):
    """A change of a model: a tensor is put beside itself, so many times."""

    def change(model):
        before = "context"
        for number in range(times):
            node = onnx.helper.make_node("Concat", [before, before], [f"twice{number}"], axis=1)
            model.graph.node.append(node)
            before = f"twice{number}"

    return change


def expand(count):
    """A change of a model: one number is repeated, so many times."""

    def change(model):
        shape = onnx.numpy_helper.from_array(np.array([count]), "count")
        model.graph.initializer.append(shape)
        one = onnx.numpy_helper.from_array(np.ones(1, np.float32), "one")
        model.graph.initializer.append(one)
        model.graph.node.append(onnx.helper.make_node("Expand", ["one", "count"], ["many"]))

    return change


def square_the_batch(model):
    column = onnx.helper.make_node("ReduceMax", ["context", "last"], ["column"], keepdims=1)
    row = onnx.helper.make_node("Transpose", ["column"], ["row"], perm=[1, 0])
    table = onnx.helper.make_node("MatMul", ["column", "row"], ["table"])
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "last"))
    model.graph.node.extend([column, row, table])


def say(**facts):
    """A change of a model: facts that are other ones."""

    def change(model):
        (entry,) = [entry for entry in model.metadata_props if entry.key == md.ONNX_FACTS]
        content = json.loads(entry.value)
        for name, value in facts.items():
            (content if name in content else content["info"])[name] = value
        entry.value = json.dumps(content)

    return change


def say_text(text):
    """A change of a model: a text in the place of the facts."""

    def change(model):
        (entry,) = [entry for entry in model.metadata_props if entry.key == md.ONNX_FACTS]
        entry.value = text

    return change


def give_other_shape(model):
    model.graph.output[0].name = model.graph.node[0].output[0]


HOSTILE = {
    "another file": read_from_elsewhere,
    "a function": call_a_function,
    "a loop": add_node("Loop"),
    "another's operation": add_node("Add", domain="com.stranger"),
    "a large tensor": claim_a_large_tensor,
    "a large constant": add_node(
        "Constant", value=onnx.TensorProto(dims=[10**12], data_type=onnx.TensorProto.FLOAT)
    ),
    "doubled": double(40),
    "expanded": expand(10**12),
    "squared": square_the_batch,
    "another output": give_other_shape,
    "a number": say(freqs=5),
    "a list": say(run_config=[]),
    "a negative width": say(d_model=-1),
    "other lengths": say(context_length=65),
    "a text that is none": say(freqs=["a\0b"]),
    "nested": say_text("[" * 100_000),
    "no facts": say_text("7"),
    "long": say_text('"' + "x" * md.MOST_JSON + '"'),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_an_onnx_file_of_a_stranger_is_refused_in_one_line(
    trained, onnx_file, tmp_path, capsys, change
):
    path = changed_onnx(onnx_file, tmp_path / "lie.onnx", change)
    words = ["evaluate", "--lang", "en", "--device", "cpu", "--data_dir", trained / "data"]
    capsys.readouterr()
    assert md.main([*map(str, words), "--checkpoint", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {path}: not an ONNX file of a student, or damaged (")
    assert ("it names another file" in error) == (change is read_from_elsewhere)
    assert len(error.splitlines()) == 1


def test_an_onnx_file_that_fails_at_a_context_is_one_line(onnx_file, tmp_path):
    def take_far_out(model):
        """The place of a value that depends on the context: it is out of reach."""
        node = onnx.helper.make_node
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axis_one"))
        model.graph.node.extend(
            [
                node("ReduceMax", ["context", "axis_one"], ["largest"], keepdims=1),
                node("Cast", ["largest"], ["place"], to=onnx.TensorProto.INT64),
                node("Gather", ["axis_one", "place"], ["taken"]),
                node("Cast", ["taken"], ["as_float"], to=onnx.TensorProto.DOUBLE),
                node("Add", ["forecast", "as_float"], ["other"]),
            ]
        )
        model.graph.output[0].name = "other"

    student = md.open_onnx(changed_onnx(onnx_file, tmp_path / "a.onnx", take_far_out)).student
    assert torch.equal(student(torch.zeros(1, 64)), torch.ones(1, 16))
    with pytest.raises(md.UserError, match="a.onnx: onnxruntime cannot run it: ") as caught:
        student(torch.full((1, 64), 7.0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"x" * 99, b"PK\3\4", "cut"])
def test_what_is_no_onnx_file_is_refused_in_one_line(onnx_file, tmp_path, content):
    path = tmp_path / "a.onnx"
    path.write_bytes(onnx_file.read_bytes()[:9000] if content == "cut" else content)
    with pytest.raises(md.UserError, match="not an ONNX file of a student") as caught:
        md.open_onnx(path)
    assert "\n" not in str(caught.value)


# -- The hub folder --------------------------------------------------------------------------------


def test_a_hub_folder_gives_the_same_student(trained, hub_folder):
    assert sorted(os.listdir(hub_folder)) == ["README.md", "config.json", "model.safetensors"]
    context = torch.from_numpy(walks(5))
    with torch.inference_mode():
        one = md.PatchStudent.from_pretrained(hub_folder)(context)
        other = md.PatchStudent.from_pretrained(trained / "distilled")(context)
    assert torch.equal(one, other)


def test_the_model_card_holds_scores_data_teacher_and_licence(trained, hub_folder, teacher_folder):
    card = (hub_folder / "README.md").read_text()
    rows = json.loads((trained / "distilled" / "evaluation.json").read_text())["rows"]
    for name in ("student", "seasonal-naive", "last value"):
        numbers = [f"{rows[name][metric]:.4f}" for metric in ("mse", "mae", "mase")]
        assert f"| `{name}` | {' | '.join(numbers)} |" in card
    for part, (series, windows) in md.read_student(trained / "distilled")[0]["counts"].items():
        assert f"{series:,} {part} series ({windows:,} windows)" in card
    assert "sampling frequency `h`" in card
    assert f"`{teacher_folder.name}`" in card
    assert "0.5 * MSE to its forecasts" in card
    assert "The teacher's licence binds its student" in card
    assert "64 points in, 16 out" in card
    assert card.startswith("---\n")
    assert "license: other" in card
    assert "{" not in card  # no field of the template is left
    student = md.PatchStudent.from_pretrained(hub_folder)
    assert card == md.model_card(student)


@pytest.mark.parametrize(
    ("name", "licence", "identity"),
    [
        (
            "Salesforce/moirai-1.1-R-base",
            "CC-BY-NC-4.0, for non-commercial use only",
            "cc-by-nc-4.0",
        ),
        ("me/other", "see me/other", "other"),
    ],
)
def test_the_cards_licence_is_the_teachers(name, licence, identity):
    teacher = {"teacher": name, "commit": "abc123", "revision": None, "licence": licence}
    info = {"teacher": teacher, "run_config": {"alpha": 0.5}, "freqs": ["h"]}
    card = md.model_card(small_student(info))
    assert f"license: {identity}" in card
    assert f"`{name}` (`abc123`)" in card
    assert licence in card
    alone = md.model_card(small_student())
    assert "without a teacher" in alone
    assert "Not evaluated yet" in alone


def test_nothing_that_is_shipped_names_a_folder_of_this_machine(
    trained, hub_folder, onnx_file, teacher_folder
):
    text = (hub_folder / "README.md").read_text() + (hub_folder / "config.json").read_text()
    text += str(session_of(onnx_file).get_modelmeta().custom_metadata_map)
    for folder in (trained, teacher_folder, Path.home(), trained.parent):
        assert str(folder) not in text
    info = json.loads((hub_folder / "config.json").read_text())["info"]
    assert info["run_config"]["alpha"] == 0.5
    assert info["freqs"] == ["h"]


def test_a_student_loaded_from_its_folder_saves_the_same_folder_again(hub_folder, tmp_path):
    md.PatchStudent.from_pretrained(hub_folder).save_pretrained(tmp_path)
    for name in ("README.md", "config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (hub_folder / name).read_bytes()


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_what_is_exported_has_the_mode_of_any_new_file(trained, tmp_path, umask):
    before = os.umask(umask)
    try:
        assert export(trained / "twin", "hub", "--output", tmp_path / "hub") == 0
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "hub").iterdir()}
    assert modes == dict.fromkeys(("README.md", "config.json", "model.safetensors"), 0o666 & ~umask)


def test_push_to_hub_uploads_model_and_card(hub_folder, monkeypatch):
    sent = {}

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, **_):
            for path in Path(folder_path).iterdir():
                sent[path.name] = path.read_bytes()

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    md.PatchStudent.from_pretrained(hub_folder).push_to_hub("me/student")
    assert sent == {path.name: path.read_bytes() for path in hub_folder.iterdir()}


def test_scores_of_other_weights_stay_out_of_the_card(trained, tmp_path):
    best = best_of(trained / "distilled")
    content = torch.load(best, weights_only=True)
    content["model_state_dict"]["norm.bias"] += 1
    torch.save(content, tmp_path / best.name)
    shutil.copy(trained / "distilled" / "evaluation.json", tmp_path)
    assert export(tmp_path / best.name, "hub") == 0
    assert "Not evaluated yet" in (tmp_path / "hub" / "README.md").read_text()


def test_scores_on_windows_of_another_split_stay_out_of_the_card(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(md, "draw", lambda path, panels: None)
    checkpoint = shutil.copy(best_of(trained / "twin"), tmp_path)
    words = ["evaluate", "--device", "cpu", "--checkpoint", str(checkpoint)]
    words += ["--output_dir", str(tmp_path)]
    assert md.main([*words, "--split_ratio", "1:1:1"]) == 0
    assert export(checkpoint, "hub") == 0
    assert "Not evaluated yet" in (tmp_path / "hub" / "README.md").read_text()
    assert md.main(words) == 0
    assert export(checkpoint, "hub") == 0
    assert "| `student` |" in (tmp_path / "hub" / "README.md").read_text()


# -- The place -------------------------------------------------------------------------------------


def test_an_output_in_the_way_is_found_before_the_export(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(md, "open_student", None)
    (tmp_path / "file").write_text("mine")
    assert export(trained / "twin", "onnx", "--output", tmp_path) == 2
    assert f"--output {tmp_path}: is a folder" in capsys.readouterr().err
    assert export(trained / "twin", "hub", "--output", tmp_path / "file") == 2
    assert f"--output {tmp_path / 'file'}: is a file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_an_export_goes_beside_the_checkpoint_and_replaces_an_earlier_one(
    trained, ready_made, onnx_file, tmp_path
):
    checkpoint = Path(shutil.copy(best_of(trained / "distilled"), tmp_path))
    for _ in range(2):
        assert export(checkpoint, "onnx") == 0
        assert export(checkpoint, "hub") == 0
        assert {*os.listdir(tmp_path)} == {checkpoint.name, "student.onnx", "hub"}
        assert (tmp_path / "student.onnx").read_bytes() == onnx_file.read_bytes()
        assert (tmp_path / "hub" / "config.json").read_text().startswith("{")
        (tmp_path / "student.onnx").write_text("earlier")
        (tmp_path / "hub" / "config.json").write_text("earlier")


def test_a_folder_with_other_files_is_left_alone(trained, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    assert export(trained / "twin", "hub", "--output", tmp_path) == 2
    assert "holds other files" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_a_damaged_table_is_one_line(trained, tmp_path, capsys):
    checkpoint = shutil.copy(best_of(trained / "twin"), tmp_path)
    (tmp_path / "evaluation.json").write_text('{"rows": [')
    assert export(checkpoint, "hub") == 2
    error = capsys.readouterr().err
    assert "evaluate writes it anew" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("renames", [1, 2])
def test_a_folder_whose_export_was_killed_is_not_two_models(
    trained, tmp_path, monkeypatch, renames
):
    """Neither over a folder of this version nor over one that knows no digest of its weights."""
    for name in ("new", "old"):
        hub = tmp_path / name
        words = ["export", "--format", "hub", "--output", str(hub), "--checkpoint"]
        assert md.main([*words, str(trained / "twin")]) == 0
        if name == "old":
            config = json.loads((hub / "config.json").read_text())
            del config["info"]["weights"]
            (hub / "config.json").write_text(json.dumps(config))
            md.open_student(hub)
        replace, count = os.replace, []

        def dying(source, target, replace=replace, count=count):
            if len(count) == renames:
                raise KeyboardInterrupt
            count.append(target)
            replace(source, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", dying)
            md.main([*words, str(trained / "distilled")])
        if renames == 1:
            with pytest.raises(md.UserError, match="of two models"):
                md.open_student(hub)
        else:  # the card alone is the older one's
            assert md.open_student(hub).weights_id == md.open_student(hub).content["weights"]
        assert md.main([*words, str(trained / "distilled")]) == 0
        md.open_student(hub)
        assert not list(tmp_path.glob(".*.tmp"))


def test_a_full_disk_is_told_whatever_the_package_that_writes_makes_of_it(
    trained, tmp_path, monkeypatch, capsys
):
    def fail(*_, **_settings):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(md.PatchStudent, "save_pretrained", fail)
    words = ["export", "--format", "hub", "--output", str(tmp_path / "hub"), "--lang", "en"]
    assert md.main([*words, "--checkpoint", str(trained / "twin")]) == 2
    assert "hub: cannot be written (No space left on device)" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["hub", "onnx"])
def test_a_failed_export_leaves_no_empty_folder(trained, tmp_path, monkeypatch, form):
    def fail(*_, **_settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(md.PatchStudent, "save_pretrained", fail)
    monkeypatch.setattr(os, "fsync", fail)

    def write_nothing(_opened, path, *_):
        with md.output_file(path):
            pass

    monkeypatch.setattr(md, "export_onnx", write_nothing)

    assert export(trained / "twin", form, "--output", tmp_path / "new" / "below" / "it") == 2
    assert os.listdir(tmp_path) == []
    (tmp_path / "there").mkdir()
    assert export(trained / "twin", form, "--output", tmp_path / "there" / "it") == 2
    assert os.listdir(tmp_path) == ["there"]


def test_an_onnx_file_goes_through_a_link_and_into_what_is_no_file(trained, ready_made, tmp_path):
    (tmp_path / "link.onnx").symlink_to(tmp_path / "target.onnx")
    assert export(trained / "distilled", "onnx", "--output", tmp_path / "link.onnx") == 0
    assert (tmp_path / "link.onnx").is_symlink()
    content = (tmp_path / "target.onnx").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(
        target=lambda: read.append((tmp_path / "pipe").read_bytes()), daemon=True
    )
    reader.start()
    assert export(trained / "distilled", "onnx", "--output", tmp_path / "pipe") == 0
    reader.join(10)
    assert read == [content]
    assert {*os.listdir(tmp_path)} == {"link.onnx", "target.onnx", "pipe"}


@pytest.mark.parametrize(
    ("commit", "shown"), [(None, "demo_teacher"), ("abc123", "checkpoints/demo_teacher")]
)
def test_a_folder_of_two_parts_is_no_hub_id_in_a_card(commit, shown):
    name = "checkpoints/demo_teacher"
    teacher = {"teacher": name, "commit": commit, "revision": None, "licence": f"see {name}"}
    content = {"teacher": teacher, "run_config": {"teacher_model": name, "alpha": 0.5}}
    facts = md.shareable(content)
    assert facts["teacher"]["teacher"] == facts["run_config"]["teacher_model"] == shown
    assert facts["teacher"]["licence"] == f"see {shown}"


def test_a_folder_that_taught_nothing_is_no_hub_id_where_it_is_there(tmp_path, monkeypatch):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    facts = md.shareable({"run_config": {"teacher_model": "models/tiny", "alpha": 0}})
    assert facts["run_config"]["teacher_model"] == "tiny"
    facts = md.shareable({"run_config": {"teacher_model": "models/other", "alpha": 0}})
    assert facts["run_config"]["teacher_model"] == "models/other"
