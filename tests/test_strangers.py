"""Files that come from strangers: nothing in them runs, decides where files go, or takes memory."""

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    SCRIPT,
    hourly,
    load_teacher,
    quiet_voice,
    read_config,
    save_generation,
    save_module,
)

import moirai_distill as md

# -- A teacher's config.json -----------------------------------------------------------------------


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def write_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def teacher(teacher_folder, tmp_path):
    """A copy of the random teacher, to be changed."""
    return shutil.copytree(teacher_folder, tmp_path / "teacher")


def refusal(folder):
    """The one line with which a teacher is refused."""
    with pytest.raises(md.UserError) as caught:
        load_teacher(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_built_distribution_is_the_one_that_uni2ts_itself_decodes(teacher_folder, tmp_path):
    from uni2ts.distribution import NormalFixedScaleOutput
    from uni2ts.model.moirai.module import decode_distr_output

    own = save_module(tmp_path / "own", distr_output=NormalFixedScaleOutput(scale=0.25))
    for folder in (teacher_folder, own, save_generation(tmp_path / "moe", "moe")):
        config = config_of(folder)["distr_output"]
        built = md.build_distribution("name", config)
        theirs = decode_distr_output(config)
        assert type(built) is type(theirs)
        parts = getattr(built, "components", [built])
        their_parts = getattr(theirs, "components", [theirs])
        assert [type(part) for part in parts] == [type(part) for part in their_parts]
        assert [vars(part) for part in parts] == [vars(part) for part in their_parts]


# The second builds the word `_target_` after every check of the text, and unpickles what follows.
STRINGS = (
    "${oc.env:HOME}",
    '${oc.create:${oc.decode:\'{"_targ" "et_": "os.system", "_args_": ["MARK"]}\'}}',
    "x",
)
NORMAL = "uni2ts.distribution.normal.NormalFixedScaleOutput"


@pytest.mark.parametrize("text", STRINGS)
@pytest.mark.parametrize("place", ["value", "key", "component", "target", "number", "setting"])
def test_no_string_of_a_config_reaches_a_decoder(teacher, tmp_path, monkeypatch, text, place):
    import hydra.utils

    def fail(*_args, **_settings):
        pytest.fail("a stranger's text was instantiated")  # no Exception: nothing catches it

    monkeypatch.setattr(hydra.utils, "instantiate", fail)
    monkeypatch.setattr("uni2ts.model.moirai.module.instantiate", fail)
    text = text.replace("MARK", f"touch {tmp_path / 'executed'}")
    config = config_of(teacher)
    if place == "value":
        config["distr_output"]["components"] = text
    elif place == "key":
        config["distr_output"][text] = 1
    elif place == "component":
        config["distr_output"]["components"].append(text)
    elif place == "target":
        config["distr_output"]["components"].append({"_target_": text})
    elif place == "number":
        config["distr_output"]["components"].append({"_target_": NORMAL, "scale": text})
    else:
        config["d_model"] = text
    write_config(teacher, config)
    refusal(teacher)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("key", ["_convert_", "_partial_", "_args_", "_recursive_", "spare"])
def test_other_keys_of_a_distribution_are_refused(teacher, key):
    config = config_of(teacher)
    config["distr_output"]["components"][0][key] = True
    write_config(teacher, config)
    assert "distr_output" in refusal(teacher)


def test_a_mixture_in_a_mixture_is_refused(teacher):
    config = config_of(teacher)
    inner = json.loads(json.dumps(config["distr_output"]))
    config["distr_output"]["components"].append(inner)
    write_config(teacher, config)
    assert "distr_output" in refusal(teacher)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("d_model", 40_000),
        ("d_model", 64.0),
        ("d_model", True),
        ("d_model", {"a": 1}),
        ("num_layers", 10**9),
        ("num_layers", -1),
        ("num_layers", "2"),
        ("max_seq_len", 10**12),
        ("patch_sizes", 16),
        ("patch_sizes", [16] * 1000),
        ("patch_sizes", [[16]]),
        ("attn_dropout_p", float("nan")),
        ("dropout_p", 2),
        ("scaling", "yes"),
        ("d_other", 3),
    ],
)
def test_a_setting_that_lies_is_one_line_before_anything_is_built(teacher, monkeypatch, key, value):
    from uni2ts.model.moirai import MoiraiModule

    def fail(*_args, **_settings):
        pytest.fail("a module was built")

    monkeypatch.setattr(MoiraiModule, "__init__", fail)
    write_config(teacher, config_of(teacher) | {key: value})
    assert key in refusal(teacher)


@pytest.mark.parametrize(
    "changes",
    [
        {"d_model": 8192, "num_layers": 2},
        {"patch_sizes": [1024] * 99},
        {"num_layers": 128},
    ],
)
def test_sizes_that_the_file_does_not_hold_take_no_memory(teacher, changes):
    write_config(teacher, config_of(teacher) | changes)
    before = resident()
    assert "other names or shapes of weights" in refusal(teacher)
    assert resident() - before < 300e6


def resident():
    """Bytes of memory that this process holds at its peak."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("scale", [0, 1e-300, -1, 10**400])
def test_a_scale_that_no_distribution_can_have_is_refused(teacher, scale):
    config = config_of(teacher)
    config["distr_output"]["components"].append({"_target_": NORMAL, "scale": scale})
    write_config(teacher, config)
    assert "distr_output" in refusal(teacher)


@pytest.mark.parametrize("kind", ["NegativeBinomialOutput", "ParetoOutput", "NormalOutput"])
def test_a_single_distribution_of_any_kind_can_be_sampled(tmp_path, kind):
    import uni2ts.distribution

    output = getattr(uni2ts.distribution, kind)()
    teacher = load_teacher(save_module(tmp_path / "one", distr_output=output))
    context = torch.randn(2, 64).cumsum(1)
    assert teacher.forecast(context, 16, 16, "median", 5).isfinite().all()


# -- Checkpoints -----------------------------------------------------------------------------------


def best_of(run):
    """Path of the best checkpoint of a run."""
    (path,) = run.glob("best_model_epoch_*.pt")
    return path


def checkpoint_refusal(path):
    with pytest.raises(md.UserError) as caught:
        md.open_student(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_packed_checkpoint_is_refused_before_it_is_unpacked(trained, tmp_path, monkeypatch):
    path = tmp_path / "packed.pt"
    with (
        zipfile.ZipFile(best_of(trained / "distilled")) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for part in source.infolist():
            target.writestr(part.filename, source.read(part))
        target.writestr("archive/data/bomb", bytes(10_000_000))
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", None)
    assert "it is packed" in checkpoint_refusal(path)


def test_parts_that_lie_on_top_of_each_other_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "overlap.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(10_000))
        archive.filelist *= 50  # the directory lists one part again and again
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", None)
    assert "it would unpack to more than it is" in checkpoint_refusal(path)


def test_lists_of_lists_of_one_list_end(trained, tmp_path):
    path = tmp_path / "lists.pt"
    content = torch.load(best_of(trained / "distilled"), weights_only=True)
    nested = [0]
    for _ in range(60):
        nested = [nested, nested]
    torch.save(content | {"spare": nested}, path)
    assert "parts" in checkpoint_refusal(path)


@pytest.mark.parametrize(
    "lie",
    [
        {"student_config": {"num_heads": -2}},
        {"student_config": {"num_heads": 2.0}},
        {"student_config": {"context_length": 64.0}},
        {"student_config": {"season": "x"}},
        {"freqs": 5},
        {"freqs": [1]},
        {"run_config": []},
        {"counts": 5},
        {"data": 5},
        {"teacher": 5},
    ],
)
def test_facts_of_a_wrong_type_are_one_line(trained, tmp_path, lie):
    path = tmp_path / "lie.pt"
    content = torch.load(best_of(trained / "distilled"), weights_only=True)
    for name, value in lie.items():
        content[name] = content[name] | value if isinstance(value, dict) else value
    torch.save(content, path)
    checkpoint_refusal(path)


def test_a_tensor_that_is_larger_than_its_memory_is_refused(trained, tmp_path):
    path = tmp_path / "huge.pt"
    content = torch.load(best_of(trained / "distilled"), weights_only=True)
    content["model_state_dict"]["head.bias"] = torch.zeros(1).expand(10**12)
    torch.save(content, path)
    assert path.stat().st_size < 10_000_000
    assert "larger than what it holds" in checkpoint_refusal(path)


def test_a_folder_that_names_a_path_does_not_decide_where_files_go(trained, tmp_path, monkeypatch):
    hub = tmp_path / "hub"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    words = ["--checkpoint", str(trained / "distilled"), "--format", "hub"]
    assert md.main(["export", *words, "--output", str(hub)]) == 0
    config = json.loads((hub / "config.json").read_text())
    config["info"]["path"] = str(elsewhere / "student.pt")
    (hub / "config.json").write_text(json.dumps(config))
    assert md.main(["export", "--checkpoint", str(hub), "--format", "hub"]) == 0
    assert [path.name for path in here.iterdir()] == ["hub"]
    assert not list(elsewhere.iterdir())


def test_places_that_a_folder_names_are_not_looked_at(trained, tmp_path):
    hub = tmp_path / "hub"
    words = ["--checkpoint", str(trained / "distilled"), "--format", "hub"]
    assert md.main(["export", *words, "--output", str(hub)]) == 0
    config = json.loads((hub / "config.json").read_text())
    config["info"]["run_config"]["label_cache"] = str(tmp_path / "cache")
    config["info"]["run_config"]["data_dir"] = str(trained / "data")
    (hub / "config.json").write_text(json.dumps(config))
    first = md.open_student(hub)
    args = md.parse_arguments(["evaluate", "--checkpoint", str(hub)])
    inherited = md.inherit_arguments(args, first, first)
    assert inherited.data_dir == "" and inherited.label_cache != str(tmp_path / "cache")


def test_the_teacher_that_a_folder_names_is_not_loaded_unasked(
    trained, tmp_path, capsys, monkeypatch
):
    hub = tmp_path / "hub"
    words = ["--checkpoint", str(trained / "distilled"), "--format", "hub"]
    assert md.main(["export", *words, "--output", str(hub)]) == 0
    monkeypatch.setattr(md, "load_teacher", None)
    words = ["--checkpoint", str(hub), "--with_teacher", "--data_dir", str(trained / "data")]
    capsys.readouterr()
    assert md.main(["evaluate", *words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: --with_teacher") and "--teacher_model" in error


# -- Outputs ---------------------------------------------------------------------------------------


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o600)
    with md.atomic(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_mode_that_cannot_be_kept_fails_no_write(tmp_path, monkeypatch):
    def refuse(*_args, **_settings):
        raise OSError(22, "Invalid argument")

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(os, "chown", refuse)
    with md.atomic(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_link_that_the_user_names_stays_and_its_target_is_written(tmp_path):
    target = tmp_path / "folder" / "target"
    target.parent.mkdir()
    target.write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to(target)
    with md.output_file(link) as file:
        file.write(b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"
    assert os.listdir(target.parent) == ["target"]


def test_a_link_in_a_strangers_run_does_not_reach_its_target(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / "evaluation.json").symlink_to(victim)
    with md.atomic(tmp_path / "evaluation.json") as file:
        file.write(b"new")
    assert victim.read_bytes() == b"mine"
    assert (tmp_path / "evaluation.json").read_bytes() == b"new"


def test_what_is_no_regular_file_is_written_to_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    with md.output_file(pipe) as file:
        file.write(b"new")
    reader.join(10)
    assert read == [b"new"]
    assert stat.S_ISFIFO(pipe.stat().st_mode) and os.listdir(tmp_path) == ["pipe"]


def test_a_forecast_goes_down_a_pipe(trained, tmp_path):
    words = ["--checkpoint", str(trained / "distilled"), "--input", str(trained / "data/s00.csv")]
    command = [sys.executable, str(SCRIPT), "predict", *words, "--output", "/dev/stdout"]
    child = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith("date,value,value_q0.1,value_q0.9\n")
    assert child.stdout.count("\n") >= 17


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    below = tmp_path / "file" / "below"
    with pytest.raises(md.UserError, match="cannot be written"), md.atomic(below) as file:
        file.write(b"new")


def test_a_pipe_in_a_label_cache_is_replaced(tmp_path):
    for replace in (True, False):
        os.mkfifo(tmp_path / "pipe")
        with md.atomic(tmp_path / "pipe", replace) as file:
            file.write(b"new")
        assert (tmp_path / "pipe").read_bytes() == b"new"
        (tmp_path / "pipe").unlink()


def test_two_writers_with_one_process_number_do_not_share_a_temporary_file(tmp_path):
    with md.atomic(tmp_path / "file") as first, md.atomic(tmp_path / "file") as second:
        first.write(b"first")
        second.write(b"second")
    assert (tmp_path / "file").read_bytes() == b"first"  # it ended last


# -- Files that are read ---------------------------------------------------------------------------


def test_a_pipe_and_a_link_to_a_device_are_skipped_with_the_reason(csv_folder):
    os.mkfifo(csv_folder / "pipe.csv")
    (csv_folder / "endless.csv").symlink_to("/dev/zero")
    files = md.read_files(csv_folder, 0, read_config(), quiet_voice())
    assert len(files.series) == 12
    for name in ("pipe.csv", "endless.csv"):
        assert [*map(str, files.reports[name].skipped)] == ["is no regular file"]


def test_pipes_in_a_label_cache_are_no_labels(tmp_path):
    folder = tmp_path / "0" / "blocks"
    folder.mkdir(parents=True)
    os.mkfifo(tmp_path / "0" / "manifest.json")
    os.mkfifo(tmp_path / "0" / "labels.bin")
    os.mkfifo(folder / "00000000.bin")
    assert md.read_manifest(tmp_path / "0") is None
    manifest = {"key": {"windows": 4, "horizon": 2}, "block": 4}
    assert md.LabelFile(tmp_path / "0", manifest).missing() == [0]


def test_dollars_in_a_name_are_no_mathematics_in_a_picture(tmp_path):
    panel = md.Panel("$x_$ and $\\frac{$", [0, 1], [1.0, 2.0], [2, 3], {"$y_$": [1.0, 2.0]})
    md.draw(tmp_path / "a.png", [panel])
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_series_that_varies_by_rounding_alone_is_skipped(tmp_path):
    frame = hourly(300)
    frame["value"] = 1e12 + 1e-4 * np.arange(300)
    frame.to_csv(tmp_path / "flat.csv", index=False, float_format="%.4f")
    values = pd.read_csv(tmp_path / "flat.csv")["value"].to_numpy()
    assert values.std() > 0
    with pytest.raises(md.Unusable, match="nearly constant"):
        md.fit_scaler(md.PlainScaler(), values)


# -- Pickles, sizes and replaced files -------------------------------------------------------------


class Call:
    """Pickled, it becomes a call of a function."""

    def __init__(self, function, *values):
        self.function = function
        self.values = values

    def __reduce__(self):
        return self.function, self.values


def with_spare(trained, path, spare):
    content = torch.load(best_of(trained / "distilled"), weights_only=True)
    torch.save(content | {"spare": spare}, path)
    return path


@pytest.mark.parametrize(
    ("spare", "reason"),
    [
        (Call(bytearray, 10**12), "bytearray"),
        (b"bytes", "encode"),
        ({1, 2}, "set"),
        (torch.float32, "names torch float32"),
        (torch.zeros(1000, 1000), "four times"),
        ((shared := (1, 2), shared), "a tuple twice"),
        (2**3000, "LONG4"),
    ],
)
def test_what_a_run_never_saves_is_refused_before_it_is_loaded(
    trained, tmp_path, monkeypatch, spare, reason
):
    path = with_spare(trained, tmp_path / "a.pt", spare)
    if reason != "four times":
        monkeypatch.setattr(torch, "load", None)
    assert reason in checkpoint_refusal(path)


def test_parts_that_no_tensor_uses_are_refused(trained, tmp_path):
    path = shutil.copy(best_of(trained / "distilled"), tmp_path / "a.pt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/999999", bytes(2_000_000))
    assert "more than its tensors" in checkpoint_refusal(path)


def test_sizes_that_the_weights_do_not_have_are_refused_before_these_are_read(
    trained, tmp_path, monkeypatch
):
    path = tmp_path / "a.pt"
    content = torch.load(best_of(trained / "distilled"), weights_only=True)
    content["student_config"]["d_model"] = 2**20
    torch.save(content, path)
    load = torch.load

    def outline(file, place, **settings):
        assert place == "meta"
        return load(file, place, **settings)

    monkeypatch.setattr(torch, "load", outline)
    assert "shapes" in checkpoint_refusal(path)


def test_a_list_of_a_million_weights_is_refused_unread(trained, tmp_path):
    hub = tmp_path / "hub"
    words = ["--checkpoint", str(trained / "distilled"), "--format", "hub"]
    assert md.main(["export", *words, "--output", str(hub)]) == 0
    header = b"{" + b" " * md.MOST_HEADER + b"}"
    (hub / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "list of weights" in checkpoint_refusal(hub)


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_the_old_one(
    trained, tmp_path, monkeypatch
):
    path = shutil.copy(best_of(trained / "distilled"), tmp_path / "a.pt")
    newer = shutil.copy(best_of(trained / "twin"), tmp_path / "b.pt")
    before = md.open_student(path).weights_id
    check = md.check_archive

    def replaced(file):
        os.replace(newer, path)
        return check(file)

    monkeypatch.setattr(md, "check_archive", replaced)
    assert md.open_student(path).weights_id == before
    monkeypatch.undo()
    assert md.open_student(path).weights_id != before


def test_a_best_that_goes_while_it_is_looked_for_is_looked_for_again(
    trained, tmp_path, monkeypatch
):
    run = shutil.copytree(trained / "distilled", tmp_path / "run")
    best, best_in = best_of(run), md.best_in

    def outdated(folder):
        monkeypatch.setattr(md, "best_in", best_in)
        return best.with_name("best_model_epoch_0.pt")

    monkeypatch.setattr(md, "best_in", outdated)
    assert md.open_student(run).path == best


@pytest.mark.parametrize("is_named", [False, True])
def test_a_teacher_that_a_strangers_checkpoint_names_is_not_loaded_unasked(
    trained, tmp_path, capsys, monkeypatch, is_named
):
    path = shutil.copy(best_of(trained / "distilled"), tmp_path / "a.pt")
    words = ["--checkpoint", str(path), "--with_teacher", "--device", "cpu", "--lang", "en"]
    monkeypatch.setattr(md, "compare", lambda *_: None)
    if is_named:
        content = torch.load(path, weights_only=True)
        words += ["--teacher_model", content["run_config"]["teacher_model"]]
    assert md.main(["evaluate", *words, "--output_dir", str(tmp_path)]) == (0 if is_named else 2)
    assert ("--teacher_model" in capsys.readouterr().err) != is_named


def test_the_teacher_of_a_run_in_its_own_folder_is_told_and_loaded(trained, capsys, monkeypatch):
    words = ["--checkpoint", str(trained / "distilled"), "--with_teacher", "--device", "cpu"]
    monkeypatch.setattr(md, "compare", lambda *_: None)
    assert md.main(["evaluate", *words, "--lang", "en"]) == 0
    assert "note: the teacher is the one that" in capsys.readouterr().err


# -- A model card ----------------------------------------------------------------------------------

MARKUP = "</code>`\n---\nlicense: mit\n# h | a | <script> [x](http://y) \x1b[2J ${x} {y} `"


def test_nothing_that_a_checkpoint_says_is_markup_in_its_card():
    import yaml

    info = {
        "teacher": {"teacher": MARKUP, "commit": MARKUP, "licence": MARKUP},
        "run_config": {"alpha": 0.5},
        "evaluation": {"windows": 3, "rows": {MARKUP: {"mse": 1.0, "mae": None}}},
        "freqs": [MARKUP],
        "counts": {"train": [1, 2]},
    }
    student = md.PatchStudent(64, 16, 16, 1, 2, 8, 0.1, info=info)
    card = md.model_card(student)
    plain = md.model_card(md.PatchStudent(64, 16, 16, 1, 2, 8, 0.1))
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == yaml.safe_load(plain.split("---\n")[1])
    assert body.count("\n") == plain.count("\n") - 5 + 2  # a table of three lines for one line
    (row,) = [line for line in body.splitlines() if line.startswith("| `")]
    assert row.count("|") == 5
    outside = "".join(body.split("`")[0::2])  # of all code
    for mark in ("<", "license: mit", "[x]", "\x1b", "${"):
        assert mark not in outside
    facts = md.onnx_facts(student)
    assert all(text.isprintable() for text in facts.values())
