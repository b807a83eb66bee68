"""Files and signals: a write is whole or absent, no file runs, a signal waits where it must."""

import dataclasses
import json
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPT, make_job

import moirai_distill as md
from moirai_distill import FORMAT, Interrupted, Stop, UserError, atomic, best_in, read_checkpoint

CONTENT = {
    "format": FORMAT,
    "model_state_dict": {"w": torch.arange(3.0)},
    "student_config": {"d_model": 16},
}


def refusal(path):
    """The message with which `read_checkpoint` refuses `path`: one line that names it."""
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_write_replaces_the_old_file_and_makes_its_folder(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    for content in (b"old", b"new"):
        with atomic(path) as file:
            file.write(content)
            assert path.exists() == (content == b"new")  # the name is taken at the end only
        assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_writer_that_raises_leaves_the_old_file_and_no_temporary(tmp_path, error):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(error), atomic(tmp_path / "file") as file:
        file.write(b"half of the ne")
        file.flush()
        raise error
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(number):
        events.append(os.fstat(number).st_size)
        fsync(number)

    def watched_replace(old, new):
        events.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    with atomic(tmp_path / "file") as file:
        file.write(b"12345")
    assert events == [5, "file"]


def test_a_file_that_is_there_first_stays_where_that_is_asked_for(tmp_path):
    for content in (b"first", b"second"):
        with atomic(tmp_path / "file", replace=False) as file:
            file.write(content)
        assert (tmp_path / "file").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_may_not_replace_is_written_where_there_are_no_links(tmp_path, monkeypatch):
    def no_links(_old, _new):
        raise PermissionError("no hard links on this disk")

    monkeypatch.setattr(os, "link", no_links)
    with atomic(tmp_path / "file", replace=False) as file:
        file.write(b"first")
    assert (tmp_path / "file").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_a_number_that_is_not_finite_is_null_in_json():
    """JSON has no nan, and other programs refuse one."""
    text = md.json_text({"a": [1.5, math.nan], "b": math.inf, "c": "NaN"})
    assert json.loads(text) == {"a": [1.5, None], "b": None, "c": "NaN"}


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    torch.save(CONTENT, tmp_path / "a.pt")
    content = read_checkpoint(tmp_path / "a.pt")
    assert content["student_config"] == {"d_model": 16}
    assert content["model_state_dict"]["w"].tolist() == [0, 1, 2]


class Payload:
    """Unpickled, it would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path, zipped):
    torch.save(
        CONTENT | {"x": Payload(str(tmp_path / "made"))},
        tmp_path / "a.pt",
        _use_new_zipfile_serialization=zipped,
    )
    assert "refused" in refusal(tmp_path / "a.pt")
    assert os.listdir(tmp_path) == ["a.pt"]
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "made").is_dir()  # the payload works


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_cut_checkpoint_is_refused(tmp_path, share):
    torch.save(CONTENT, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: int(share * len(whole))])
    assert "damaged" in refusal(tmp_path / "a.pt")


def test_a_checkpoint_with_a_changed_weight_is_refused(tmp_path):
    """It would load: what tells it from the true one is the checksum in the file."""
    torch.save(CONTENT, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    weights = CONTENT["model_state_dict"]["w"].numpy().tobytes()
    assert whole.count(weights) == 1
    changed = weights[:-1] + bytes([weights[-1] ^ 1])
    (tmp_path / "a.pt").write_bytes(whole.replace(weights, changed))
    assert torch.load(tmp_path / "a.pt", weights_only=True)["model_state_dict"]["w"][2] != 2
    assert "damaged" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_refused(tmp_path, seed):
    (tmp_path / "a.pt").write_bytes(np.random.default_rng(seed).bytes(500))
    assert "damaged" in refusal(tmp_path / "a.pt")


FOREIGN = {
    "a tensor": torch.zeros(2),
    "bare weights": {"w": torch.zeros(2)},
    "no format": {"model_state_dict": {}, "student_config": {}},
    "no weights": {"format": FORMAT, "student_config": {}},
    "no config": {"format": FORMAT, "model_state_dict": {}},
    "another program's format": CONTENT | {"format": "safetensors"},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_checkpoint_of_another_program_is_refused(tmp_path, what):
    torch.save(FOREIGN[what], tmp_path / "a.pt")
    assert "not a checkpoint of this program" in refusal(tmp_path / "a.pt")


def test_a_checkpoint_of_a_newer_format_is_refused_with_what_to_do(tmp_path):
    torch.save(CONTENT | {"format": FORMAT + 1}, tmp_path / "a.pt")
    message = refusal(tmp_path / "a.pt")
    assert "newer format" in message and "update" in message


def test_a_missing_checkpoint_is_one_line(tmp_path):
    assert "no such checkpoint" in refusal(tmp_path / "none.pt")
    assert "no such checkpoint" in refusal(tmp_path)  # a folder is none either


def test_the_best_of_a_folder_is_what_last_names(tmp_path):
    assert best_in(tmp_path) is None
    for epoch in (2, 7):
        torch.save(CONTENT, tmp_path / f"best_model_epoch_{epoch}.pt")
    assert best_in(tmp_path) is None  # two, and nothing says which
    for epoch in (7, 2):
        torch.save(
            CONTENT | {"loop": {"best_file": f"best_model_epoch_{epoch}.pt"}}, tmp_path / "last.pt"
        )
        assert best_in(tmp_path) == tmp_path / f"best_model_epoch_{epoch}.pt"


def test_the_only_best_file_is_the_best_where_last_is_lost(tmp_path):
    torch.save(CONTENT, tmp_path / "best_model_epoch_3.pt")
    assert best_in(tmp_path) == tmp_path / "best_model_epoch_3.pt"


def test_a_signal_interrupts_at_once_where_nothing_is_held():
    with pytest.raises(Interrupted) as caught:
        Stop()(signal.SIGTERM, None)
    assert caught.value.args == (signal.SIGTERM,)


def test_a_held_signal_waits_for_the_end_of_the_hold():
    stop, reached = Stop(), False
    with pytest.raises(Interrupted) as caught, stop.hold():
        stop(signal.SIGINT, None)
        reached = stop.signum == signal.SIGINT
    assert reached and caught.value.args == (signal.SIGINT,)


def test_a_second_signal_is_not_held():
    stop, reached = Stop(), False
    with pytest.raises(Interrupted) as caught, stop.hold():
        stop(signal.SIGINT, None)
        stop(signal.SIGTERM, None)
        reached = True
    assert not reached and caught.value.args == (signal.SIGTERM,)


def test_the_hold_ends_with_its_block_even_by_an_error():
    stop = Stop()
    with pytest.raises(ZeroDivisionError), stop.hold():
        raise ZeroDivisionError
    with pytest.raises(Interrupted):
        stop(signal.SIGTERM, None)


def test_a_disk_that_is_full_while_pytorch_writes_is_one_line_and_the_old_file_stays(tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(b"an earlier one")
    words = r"last.pt: cannot be written \(.*unexpected pos"
    with pytest.raises(UserError, match=words), atomic(path) as file:
        file.write(b"some")
        raise RuntimeError(  # as torch.save tells it
            "[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"
        )
    assert path.read_bytes() == b"an earlier one"
    assert [*tmp_path.iterdir()] == [path]


def test_what_the_first_process_finds_reaches_all():
    assert make_job().on_rank_zero(lambda: {"a": 1}) == {"a": 1}


@pytest.mark.parametrize("kind", [UserError, OSError, ModuleNotFoundError])
def test_a_problem_of_the_first_process_that_can_be_mended_is_raised_on_all(kind, monkeypatch):
    """The others must not wait for ever: what is broadcast is the problem."""
    job = make_job()
    sent = []

    def broadcast(message):
        sent.append(message)
        return message

    def refuse():
        raise kind("no such thing")

    monkeypatch.setattr(job.fabric, "broadcast", broadcast)
    with pytest.raises(kind, match="no such thing"):
        job.on_rank_zero(refuse)
    ((result, problem),) = sent
    assert result is None
    assert isinstance(problem, kind)


def test_one_process_sums_alone_and_tells_its_own_signal():
    job = make_job()
    assert job.sum(torch.tensor([1.0, 2.0])).tolist() == [1, 2]
    assert job.largest(3) == 3
    assert job.largest(value=True) == 1
    assert job.signal() == 0
    with pytest.raises(Interrupted), job.stop.hold():
        job.stop(signal.SIGTERM, None)
        assert job.signal() == signal.SIGTERM


# -- Homes -----------------------------------------------------------------------------------------


def test_a_path_may_begin_with_a_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert md.user_path("~/x") == Path("/somewhere/x")
    assert md.user_path("x/~/y") == Path("x/~/y")


def test_the_home_of_nobody_is_one_line():
    with pytest.raises(md.UserError) as caught:
        md.user_path("~nobody-of-this-name/x/y")
    assert str(caught.value) == (
        "~nobody-of-this-name/x/y: no home folder is known for ~nobody-of-this-name;"
        " give the path without ~"
    )


def test_only_one_function_looks_for_a_home():
    """Each other place would have to know what to do without one."""
    source = SCRIPT.read_text(encoding="utf-8")
    assert source.count("expanduser") == 1


# -- Whose folder it is ----------------------------------------------------------------------------


def owner_of(folder, **changes):
    """Write an owner file into a folder; as it stands, it is of this process."""
    own = {
        "process": os.getpid(),
        "started": md.process_start(os.getpid()),
        "machine": md.machine_id(),
        "host": "here",
        "run": "another",
    } | changes
    (folder / md.OWNER_FILE).write_text(json.dumps(own))
    return folder / md.OWNER_FILE


def test_a_folder_has_one_owner_until_it_is_done(tmp_path):
    run = tmp_path / "run"
    with md.owned(run):
        for _ in range(2):
            with pytest.raises(UserError, match="another run writes here") as caught:
                md.owned(run).__enter__()
            assert str(run / md.OWNER_FILE) in str(caught.value)
            assert "\n" not in str(caught.value)
        assert os.listdir(run) == [md.OWNER_FILE]
    assert not run.exists()  # it was made for the owner file alone
    with md.owned(run):
        (run / "last.pt").write_bytes(b"mine")
    assert os.listdir(run) == ["last.pt"]


@pytest.mark.parametrize("changes", [{"process": 2**22 + 1}, {"started": "1"}])
def test_an_owner_that_is_gone_is_followed(tmp_path, changes):
    owner_of(tmp_path, **changes)
    with md.owned(tmp_path):
        assert json.loads((tmp_path / md.OWNER_FILE).read_text())["process"] == os.getpid()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("junk", ["", "{}", "[", "[1]", '{"process": "x"}'])
def test_what_is_no_owner_file_keeps_nobody_out(tmp_path, junk):
    (tmp_path / md.OWNER_FILE).write_text(junk)
    with md.owned(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("age", [0, md.FRESH + 60])
def test_of_another_machine_the_age_of_the_file_decides(tmp_path, age):
    path = owner_of(tmp_path, machine="another", process=1)
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))
    if age:
        with md.owned(tmp_path):
            pass
    else:
        with pytest.raises(UserError, match="process 1 on here"):
            md.owned(tmp_path).__enter__()


def test_an_owner_file_is_kept_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(md, "HEARTBEAT", 0.01)
    with md.owned(tmp_path):
        path = tmp_path / md.OWNER_FILE
        os.utime(path, (1, 1))
        began = time.monotonic()
        while path.stat().st_mtime == 1:
            assert time.monotonic() - began < 20
            time.sleep(0.01)


def test_an_owner_whose_file_was_taken_over_does_not_take_it_back(tmp_path):
    with pytest.raises(md.UserError, match="removed or replaced"), md.owned(tmp_path):
        path = owner_of(tmp_path)
    assert json.loads(path.read_text())["run"] == "another"


def test_leftovers_of_processes_that_are_gone_are_removed_and_no_others(tmp_path):
    own = md.temporary_name()
    _, pid, began, machine = own.removesuffix(".tmp").split("-")
    assert (int(pid), machine) == (os.getpid(), md.machine_id())
    start = own.partition("-")[0]
    old = f".{'0' * 32}.tmp"  # as an earlier version named it
    names = {
        own: False,
        f"{start}-{pid}-{began}1-{machine}.tmp": True,  # an earlier process of that number
        f"{start}-{2**22 + 1}-7-{machine}.tmp": True,
        f"{start}-{2**22 + 1}-7-00000000.tmp": False,  # of another machine
        old: False,
        ".mine.tmp": False,
        "a.csv": False,
    }
    for name in names:
        (tmp_path / name).write_bytes(b"")
    folder = tmp_path / f"{start}-{2**22 + 2}-7-{machine}.tmp"
    folder.mkdir()
    (folder / "inner").write_bytes(b"")
    md.remove_leftovers(tmp_path)
    assert set(os.listdir(tmp_path)) == {name for name, is_left in names.items() if not is_left}
    for name in names:
        if (tmp_path / name).exists():
            os.utime(tmp_path / name, (1, 1))
    md.remove_leftovers(tmp_path)
    assert set(os.listdir(tmp_path)) == {own, ".mine.tmp", "a.csv"}
    md.remove_leftovers(tmp_path / "none")


# -- Who speaks, and who is started by whom --------------------------------------------------------

FABRIC = {"MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}
BATCH = {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"LOCAL_RANK": "1"}, None),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, None),
        ({"RANK": "x", "WORLD_SIZE": "2"}, None),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ("torchrun", 2, 1)),
        (FABRIC | {"LOCAL_RANK": "1"}, ("Fabric", 2, 1)),
        (FABRIC | {"LOCAL_RANK": "0"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, None),
        (BATCH, None),
        (BATCH | {"SLURM_STEP_ID": "0"}, ("srun", 4, 0)),
        (BATCH | {"SLURM_PROCID": "3"}, ("srun", 4, 3)),
        (BATCH | {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}, None),
    ],
)
def test_what_started_a_process_is_told_by_a_launchers_own_variables(
    monkeypatch, variables, expected
):
    for name in (*FABRIC, *BATCH, "RANK", "LOCAL_RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = md.launcher()
    assert found == (md.Launcher(*expected) if expected else None)
    assert md.speaks_for_all() == (expected is None or expected[2] == 0)


# -- What a file may say ---------------------------------------------------------------------------


def test_the_shape_of_a_checkpoint_knows_all_that_a_run_keeps():
    progress = {field.name for field in dataclasses.fields(md.Progress)}
    assert md.CHECKPOINT["loop"].keys() == progress
    flags = vars(md.build_parser(demo=False).parse_args(["train"]))
    assert md.run_config_shape().keys() == flags.keys() - {"command", "lang"}
    assert md.misfit(flags, md.run_config_shape()) == ""
    assert set(md.LABEL_KEY) - {"patch"} == md.MANIFEST["key"].keys()


@pytest.mark.parametrize(
    ("value", "shape", "found"),
    [
        (3, md.is_count, ""),
        (True, md.is_count, " is True"),
        ({"a": None}, {"a": md.Maybe(md.is_text)}, ""),
        ({"a": None}, {"a": md.is_text}, "a is None"),
        ({"b": None}, {"a": md.is_text}, ""),
        ({"b": None}, {"a": md.is_text, "*": md.is_real}, "b is None"),
        ({"a": [1, "x"]}, {"a": [md.is_real]}, "a.1 is 'x'"),
        ({"a": {"b": [{"c": 1}, {"c": ()}]}}, {"a": {"b": [{"c": md.is_real}]}}, "a.b.1.c is ()"),
        ({3: 1}, {"*": md.is_real}, "a name in it is 3"),
        ({"a": 5}, {"a": {"*": md.is_real}}, "a is 5"),
    ],
)
def test_a_misfit_is_named_with_its_place(value, shape, found):
    assert md.misfit(value, shape) == found


def test_a_value_of_any_size_is_told_in_short():
    nested = ["x" * 1_000_000] * 1_000
    found = md.misfit({"a": {"b": nested}}, {"a": {"b": md.is_text}})
    assert found.startswith("a.b is ['xxx") and len(found) < 500
