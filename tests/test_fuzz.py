"""Files that lie somewhere: whatever stands in them, a command ends with 0 or with one line and 2.

MOIRAI_DISTILL_FUZZ=100 pytest tests/test_fuzz.py    # tries a hundred times as many
"""

import copy
import json
import math
import os
import shutil

import onnx
import pytest
import torch
from conftest import SMALL, SMALL_RUN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moirai_distill as md

TIMES = int(os.environ.get("MOIRAI_DISTILL_FUZZ", "1"))
SETTINGS = {
    "deadline": None,
    "database": None,
    "derandomize": TIMES == 1,  # the suite tries the same ones each time
    "suppress_health_check": list(HealthCheck),
}
few = settings(max_examples=3 * TIMES, **SETTINGS)
some = settings(max_examples=12 * TIMES, **SETTINGS)

JUNK = [
    *(None, True, 0, 1, -1, 7, 2**31, 2**63, -(2**70), 10**30),
    *(0.5, -0.0, 1e-320, 1e300, math.nan, math.inf, -math.inf),
    *("", "auto", "x", "0.5", "h", "\x1b[2J\n---\n", "<b>|`$x_$", "a\0b", "\ud800", "~nobody/x"),
    *("/dev/zero", "../..", "x" * 20_000),
    *([], [0], ["x"], [[]], {}, {"x": 1}, {"h": 7}, {"h": "x"}, {"test": 5}),
]


def places(value, found=(), most=400):
    """The paths (tuples of names and numbers) to all that lies in a nest of dicts and lists."""
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list | tuple):
        inner = list(enumerate(value))
    else:
        return [found]
    paths = [found] if found else []
    for name, part in inner[:most]:
        paths += places(part, (*found, name))
    return paths


def changed(value, path, junk):
    """A copy of a nest with something else at a path; "gone" takes it away."""
    if not path:
        return junk
    name, *rest = path
    value = list(value) if isinstance(value, tuple) else copy.copy(value)
    if junk == "gone" and not rest:
        del value[name]
    else:
        value[name] = changed(value[name], rest, junk)
    return value


@st.composite
def lies(draw, truth, junk=JUNK):
    """A nest of values like a true one, with one to three lies in it."""
    lie = truth
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(lie)))
        lie = changed(lie, path, draw(st.sampled_from([*junk, "gone"])))
        if not isinstance(lie, dict) or not places(lie):
            return truth
    return lie


def run(*words):
    """Exit code of a command, which must be 0 or 2."""
    code = md.main([*map(str, words), "--lang", "en"])
    assert code in (0, 2)
    return code


def best_of(folder):
    (path,) = folder.glob("best_model_epoch_*.pt")
    return path


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(md, "draw", lambda _path, _panels: None)


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory):
    """A folder with copies of the run, its hub folder, its labels: `trained` stays as it is."""
    root = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(trained / "distilled", root / "run")
    shutil.copytree(trained / "labels", root / "labels")
    for form in ("hub", "onnx"):
        assert run("export", "--checkpoint", root / "run", "--format", form) == 0
    return root


# Tensors among the junk: a checkpoint may hold them anywhere.
TENSORS = [*JUNK, torch.zeros(2), torch.tensor(1), torch.zeros(0, dtype=torch.complex64)]


def torch_save(content, path):
    """Save a checkpoint; False where it is one that torch.save itself refuses."""
    try:
        torch.save(content, path)
    except UnicodeEncodeError:
        return False
    return True


@some
@given(data=st.data())
def test_a_checkpoint_that_lies_is_used_or_refused(trained, tmp_path, data):
    truth = torch.load(best_of(trained / "distilled"), weights_only=True)
    content = data.draw(lies(truth, TENSORS))
    if torch_save(content, tmp_path / "lie.pt"):
        source = trained / "data" / "s00.csv"
        words = ["--checkpoint", tmp_path / "lie.pt", "--output"]
        run("predict", *words, tmp_path / "a.csv", "--input", source, "--backtest")
        run("export", *words, tmp_path / "hub", "--format", "hub")


@few
@given(data=st.data())
def test_a_checkpoint_that_lies_is_evaluated_or_refused(trained, files, tmp_path, data):
    truth = torch.load(best_of(trained / "distilled"), weights_only=True)
    truth = {name: value for name, value in truth.items() if not name.endswith("state_dict")}
    content = data.draw(lies(truth, TENSORS))
    for name in ("model_state_dict", "training_state_dict"):
        content[name] = torch.load(best_of(trained / "distilled"), weights_only=True)[name]
    if torch_save(content, tmp_path / "lie.pt"):
        words = ["--checkpoint", tmp_path / "lie.pt", "--device", "cpu", "--with_teacher"]
        words += ["--label_cache", files / "labels", "--output_dir", tmp_path]
        run("evaluate", *words)


@few
@given(data=st.data())
def test_a_run_that_lies_goes_on_or_is_refused(trained, files, tmp_path, data):
    truth = torch.load(trained / "distilled" / "last.pt", weights_only=True)
    part = data.draw(st.sampled_from(sorted(truth)))
    path = data.draw(st.sampled_from([(part, *path) for path in places(truth[part])]))
    content = changed(truth, path, data.draw(st.sampled_from([*TENSORS, "gone"])))
    run_folder = tmp_path / "run"
    shutil.rmtree(run_folder, ignore_errors=True)
    shutil.copytree(trained / "distilled", run_folder)
    if torch_save(content, run_folder / "last.pt"):
        words = [*SMALL.split(), *SMALL_RUN.split(), "--alpha", "0.5", "--resume"]
        words += ["--teacher_model", truth["run_config"]["teacher_model"]]
        words += ["--data_dir", trained / "data", "--label_cache", files / "labels"]
        run("train", *words, "--save_dir", run_folder, "--num_epochs", 3)


@some
@given(data=st.data())
def test_an_exported_folder_that_lies_is_used_or_refused(trained, files, tmp_path, data):
    truth = json.loads((files / "run" / "hub" / "config.json").read_text())
    hub = shutil.copytree(files / "run" / "hub", tmp_path / "hub", dirs_exist_ok=True)
    (hub / "config.json").write_text(json.dumps(data.draw(lies(truth))))
    source = trained / "data" / "s00.csv"
    words = ["--checkpoint", hub, "--output"]
    run("predict", *words, tmp_path / "a.csv", "--input", source)
    run("export", *words, tmp_path / "again", "--format", "hub")


@few
@given(data=st.data())
def test_an_onnx_file_that_lies_is_evaluated_or_refused(trained, files, tmp_path, data):
    model = onnx.load_model(files / "run" / "student.onnx")
    (entry,) = [entry for entry in model.metadata_props if entry.key == md.ONNX_FACTS]
    entry.value = json.dumps(data.draw(lies(json.loads(entry.value))))
    onnx.save_model(model, tmp_path / "lie.onnx")
    words = ["--checkpoint", tmp_path / "lie.onnx", "--data_dir", trained / "data"]
    words += ["--device", "cpu", "--output_dir", tmp_path, "--with_teacher"]
    run("evaluate", *words, "--label_cache", files / "labels")


@some
@given(data=st.data())
def test_an_evaluation_that_lies_is_used_or_refused(files, tmp_path, data):
    run_folder = shutil.copytree(files / "run", tmp_path / "run", dirs_exist_ok=True)
    truth = json.loads((files / "run" / "evaluation.json").read_text())
    (run_folder / "evaluation.json").write_text(json.dumps(data.draw(lies(truth))))
    run("export", "--checkpoint", run_folder, "--format", "hub", "--output", tmp_path / "hub")


def copy_labels(files, cache):
    """A new cache with the labels of the run's training windows; returns their folder."""
    key = torch.load(files / "run" / "last.pt", weights_only=True)["teacher"]["key"]
    shutil.rmtree(cache, ignore_errors=True)
    folder = md.key_folder(files / "labels", key)
    return shutil.copytree(folder, cache / folder.name)


def write_manifest(folder, manifest):
    """Write a manifest, and name its folder as its key asks for. Returns the folder."""
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if not isinstance(manifest.get("key"), dict):
        return folder
    named = md.key_folder(folder.parent, manifest["key"])
    return folder.rename(named)


@some
@given(data=st.data())
def test_a_manifest_that_lies_is_listed(files, tmp_path, data):
    folder = copy_labels(files, tmp_path / "labels")
    truth = json.loads((folder / "manifest.json").read_text())
    write_manifest(folder, data.draw(lies(truth)))
    assert run("label", "--list", "--label_cache", tmp_path / "labels") == 0


@few
@given(data=st.data())
def test_labels_whose_manifest_lies_train_or_are_made_anew(trained, files, tmp_path, data):
    folder = copy_labels(files, tmp_path / "labels")
    truth = json.loads((folder / "manifest.json").read_text())
    told = {name: value for name, value in truth.items() if name != "key"}
    lie = data.draw(lies(told)) | {"key": truth["key"]}
    (folder / "manifest.json").write_text(json.dumps(lie))
    words = ["--checkpoint", best_of(trained / "distilled"), "--device", "cpu", "--with_teacher"]
    run("evaluate", *words, "--label_cache", tmp_path / "labels", "--output_dir", tmp_path)
    words = [*SMALL.split(), *SMALL_RUN.split(), "--label_cache", tmp_path / "labels"]
    teacher = truth["teacher"]
    words += ["--data_dir", trained / "data", "--teacher_model", teacher, "--alpha", 1]
    run("train", *words, "--save_dir", tmp_path / "run")
