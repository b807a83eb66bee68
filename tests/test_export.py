"""export: a model to ship, which forecasts as the student does and says where it comes from."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import SCRIPT, hourly

import moirai_distill as m

README = SCRIPT.with_name("README.md").read_text(encoding="utf-8")


def export(checkpoint, form, *words):
    return m.main(["export", "--checkpoint", str(checkpoint), "--format", form, "--lang", "en", *map(str, words)])


@pytest.fixture(scope="module")
def onnx_file(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "some folder" / "student.onnx"
    assert export(trained / "distilled", "onnx", "--output", path) == 0
    return path


@pytest.fixture(scope="module")
def hub_folder(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "student"
    assert export(trained / "distilled", "hub", "--output", folder) == 0
    return folder


def walks(count, scale=1.0, offset=0.0):
    return (np.random.default_rng(count).standard_normal((count, 64)).cumsum(1) * scale + offset).astype(np.float32)


@pytest.mark.parametrize("count", [1, 2, 33])
@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1e-4, 0), (1e5, 0), (1, 100)])
def test_onnx_forecasts_as_the_student_in_raw_units_at_any_batch_size(trained, onnx_file, count, scale, offset):
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert given.shape[1:] == [64] and result.shape[1:] == [16] and not isinstance(given.shape[0], int)
    context = walks(count, scale, offset)
    (forecast,) = session.run(None, {given.name: context})
    with torch.inference_mode():
        expected = m.PatchStudent.from_pretrained(trained / "distilled")(torch.from_numpy(context)).numpy()
    assert forecast.shape == (count, 16) and forecast.dtype == np.float32
    assert np.abs(forecast - expected).max() < 1e-4 * context.std(1).max()


def test_a_constant_context_gives_that_constant_under_onnx(onnx_file):
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    assert (session.run(None, {"context": np.full((2, 64), 7, np.float32)})[0] == 7).all()


def test_onnx_is_one_file_with_its_facts(trained, onnx_file, teacher_folder):
    assert os.listdir(onnx_file.parent) == ["student.onnx"]
    facts = onnxruntime.InferenceSession(onnx_file).get_modelmeta().custom_metadata_map
    assert (facts["context_length"], facts["prediction_length"], facts["sampling_frequency"]) == ("64", "16", "h")
    assert facts["teacher"] == teacher_folder.name and facts["licence"]
    assert str(teacher_folder) not in str(facts)


def test_export_says_the_difference_and_checks_on_real_windows_of_several_scales(trained, tmp_path, capsys):
    assert export(trained / "twin", "onnx", "--output", tmp_path / "a.onnx") == 0
    out, error = capsys.readouterr()
    assert float(re.search(r"on 49 contexts: (\S+) of their deviation", out)[1]) < 1e-4 and "random walks" not in error
    contexts = m.example_contexts(m.read_student(trained / "twin"), 64)
    real = hourly(300, seed=0)["value"].to_numpy()[-64:]
    for scale in (1e-3, 1, 1e3):
        assert (np.abs(contexts.numpy() - real * scale).max(1) < 1e-5 * scale).sum() == 1


def test_an_export_that_differs_is_not_kept(trained, tmp_path, capsys, monkeypatch):
    before, scale = (tmp_path / "a.onnx"), m.instance_scale
    before.write_bytes(b"an earlier one")
    exporting = torch.onnx.export

    def other(student, *words, **settings):  # as a faulty exporter would
        monkeypatch.setattr(m, "instance_scale", lambda x: (scale(x)[0] + 0.01 * scale(x)[1], scale(x)[1]))
        try:
            return exporting(student, *words, **settings)
        finally:
            monkeypatch.setattr(m, "instance_scale", scale)

    monkeypatch.setattr(torch.onnx, "export", other)
    assert export(trained / "twin", "onnx", "--output", before) == 2
    assert "not kept" in capsys.readouterr().err
    assert before.read_bytes() == b"an earlier one" and os.listdir(tmp_path) == ["a.onnx"]


def test_without_the_onnx_packages_it_says_what_to_install(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export(trained / "twin", "onnx", "--output", tmp_path / "a.onnx") == 2
    assert "onnxscript is not installed: " in capsys.readouterr().err and os.listdir(tmp_path) == []


def test_the_readmes_forecaster_needs_onnxruntime_alone(onnx_file, tmp_path):
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "import onnxruntime" in block]
    assert len(code.strip().splitlines()) <= 10 and "torch" not in code and "moirai" not in code
    hourly(900).to_csv(tmp_path / "series.csv", index=False)
    code = re.sub(r'"[^"]*\.onnx"', f'"{onnx_file}"', re.sub(r'"[^"]*\.csv"', '"series.csv"', code)).replace(
        "720", "64"
    )
    code += "\nimport sys\nassert 'torch' not in sys.modules\n"
    code += "import numpy\nassert forecast.shape == (1, 16) and numpy.isfinite(forecast).all()\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_hub_folder_gives_the_same_student(trained, hub_folder):
    assert sorted(os.listdir(hub_folder)) == ["README.md", "config.json", "model.safetensors"]
    context = torch.from_numpy(walks(5))
    with torch.inference_mode():
        one, other = (m.PatchStudent.from_pretrained(path)(context) for path in (hub_folder, trained / "distilled"))
    assert torch.equal(one, other)


def test_the_model_card_holds_scores_data_teacher_and_licence(trained, hub_folder, teacher_folder):
    card = (hub_folder / "README.md").read_text()
    rows = json.loads((trained / "distilled" / "evaluation.json").read_text())["rows"]
    for name in ("student", "seasonal-naive", "last value"):
        numbers = [f"{rows[name][metric]:.4f}" for metric in ("mse", "mae", "mase")]
        assert f"| {name} | {' | '.join(numbers)} |" in card
    assert "10 train series (100 windows)" in card and "sampling frequency h" in card
    assert f"`{teacher_folder.name}`" in card and "The teacher's licence binds its student" in card
    assert card.startswith("---\n") and "license: other" in card


@pytest.mark.parametrize(
    ("name", "identity"), [("Salesforce/moirai-1.1-R-base", "cc-by-nc-4.0"), ("me/other", "other")]
)
def test_the_cards_licence_is_the_teachers(name, identity):
    licence = "CC-BY-NC-4.0, for non-commercial use only" if "Salesforce" in name else f"see {name}"
    teacher = {"teacher": name, "commit": "abc123", "revision": None, "licence": licence}
    info = {"teacher": teacher, "run_config": {"alpha": 0.5}, "freqs": ["h"]}
    card = str(m.PatchStudent(64, 16, 16, 1, 2, 8, 0.1, info).generate_model_card())
    assert f"license: {identity}" in card and f"`{name}` (abc123)" in card and licence in card
    alone = str(m.PatchStudent(64, 16, 16, 1, 2, 8, 0.1).generate_model_card())
    assert "without a teacher" in alone and "Not evaluated yet" in alone


def test_nothing_that_is_shipped_names_a_folder_of_this_machine(trained, hub_folder, onnx_file, teacher_folder):
    text = (hub_folder / "README.md").read_text() + (hub_folder / "config.json").read_text()
    text += str(onnxruntime.InferenceSession(onnx_file).get_modelmeta().custom_metadata_map)
    for folder in (trained, teacher_folder, Path.home(), trained.parent):
        assert str(folder) not in text
    config = json.loads((hub_folder / "config.json").read_text())
    assert config["info"]["run_config"]["alpha"] == 0.5 and config["info"]["freqs"] == ["h"]


def test_a_student_loaded_from_its_folder_saves_the_same_folder_again(hub_folder, tmp_path):
    m.PatchStudent.from_pretrained(hub_folder).save_pretrained(tmp_path)  # what push_to_hub uploads
    for name in ("README.md", "config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (hub_folder / name).read_bytes()


def test_push_to_hub_uploads_model_and_card(hub_folder, monkeypatch):
    import huggingface_hub.hub_mixin as mixin

    sent = {}

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, **_):
            sent.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})

    monkeypatch.setattr(mixin, "HfApi", Api)
    m.PatchStudent.from_pretrained(hub_folder).push_to_hub("me/student")
    assert sent == {path.name: path.read_bytes() for path in hub_folder.iterdir()}


def test_scores_of_other_weights_stay_out_of_the_card(trained, tmp_path):
    (file,) = (trained / "distilled").glob("best_model_epoch_*.pt")
    content = torch.load(file, weights_only=True)
    content["model_state_dict"]["norm.bias"] += 1
    torch.save(content, tmp_path / file.name)
    (tmp_path / "evaluation.json").write_bytes((trained / "distilled" / "evaluation.json").read_bytes())
    assert export(tmp_path / file.name, "hub") == 0
    assert "Not evaluated yet" in (tmp_path / "hub" / "README.md").read_text()


def test_scores_on_windows_of_another_split_stay_out_of_the_card(trained, tmp_path):
    (file,) = (trained / "twin").glob("best_model_epoch_*.pt")
    (tmp_path / file.name).write_bytes(file.read_bytes())
    words = ["evaluate", "--device", "cpu", "--checkpoint", str(tmp_path / file.name), "--output_dir", str(tmp_path)]
    assert m.main([*words, "--split_seed", "5"]) == 0
    assert export(tmp_path / file.name, "hub") == 0
    assert "Not evaluated yet" in (tmp_path / "hub" / "README.md").read_text()
    assert m.main(words) == 0 and export(tmp_path / file.name, "hub") == 0
    assert "| student |" in (tmp_path / "hub" / "README.md").read_text()


def test_an_output_in_the_way_is_found_before_the_export(trained, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert export(trained / "twin", "onnx", "--output", tmp_path) == 2
    assert export(trained / "twin", "hub", "--output", tmp_path / "file") == 2
    assert capsys.readouterr().err.count("1 problem(s) with the arguments") == 2
    assert (tmp_path / "file").read_text() == "mine"


def test_an_export_goes_beside_the_checkpoint_and_replaces_an_earlier_one(trained, tmp_path):
    (file,) = (trained / "twin").glob("best_model_epoch_*.pt")
    (tmp_path / file.name).write_bytes(file.read_bytes())
    for _ in range(2):
        assert export(tmp_path / file.name, "onnx") == export(tmp_path / file.name, "hub") == 0
    assert {*os.listdir(tmp_path)} == {file.name, "student.onnx", "hub"}


def test_a_folder_with_other_files_is_left_alone(trained, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    assert export(trained / "twin", "hub", "--output", tmp_path) == 2
    assert "holds other files" in capsys.readouterr().err and os.listdir(tmp_path) == ["mine.txt"]


def test_a_damaged_table_is_one_line(trained, tmp_path, capsys):
    (file,) = (trained / "twin").glob("best_model_epoch_*.pt")
    (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "evaluation.json").write_text('{"rows": [')
    assert export(tmp_path / file.name, "hub") == 2
    error = capsys.readouterr().err
    assert "evaluate writes it anew" in error and len(error.strip().splitlines()) == 1
