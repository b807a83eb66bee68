"""Teachers from the hub: a download from a loopback server, the local copy, and what can fail."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPT, SMALL, hourly, write_hourly

import moirai_distill as md

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GOOD = "Salesforce/tiny"  # the server's one model that is whole
STUDENT = "me/student"  # an exported student
FLAWS = {  # model -> status and error code of the server's answer
    "nobody/missing": (404, "RepoNotFound"),
    "someone/private": (401, "RepoNotFound"),
    "someone/gated": (403, "GatedRepo"),
    "someone/login": (401, "GatedRepo"),
    "someone/empty": (404, "EntryNotFound"),
    "someone/broken": (500, "InternalError"),
}
FAILURES = {  # case -> (teacher and further words of the command, what the one line must say)
    "unknown": (["nobody/missing"], ["nobody/missing", "no such model", "check the id"]),
    "private": (["someone/private"], ["someone/private", "private", "hf auth login"]),
    "gated": (["someone/gated"], ["someone/gated", "access is not granted", "hf auth login"]),
    "not logged in": (
        ["someone/login"],
        ["someone/login", "access is not granted", "hf auth login"],
    ),
    "unknown revision": (
        [GOOD, "--teacher_revision", "v9"],
        [GOOD, "no such revision", "--teacher_revision"],
    ),
    "no config": (["someone/empty"], ["someone/empty", "config.json", "no such file"]),
    "no weights": (["someone/half"], ["someone/half", "model.safetensors", "no such file"]),
    "truncated": (
        ["someone/truncated"],
        ["someone/truncated", "model.safetensors", "download failed", "local folder"],
    ),
    "server error": (["someone/broken"], ["someone/broken", "out of reach", "local folder"]),
    "stalled": (["someone/stalled"], ["someone/stalled", "model.safetensors", "local folder"]),
    "altered": (
        ["someone/altered"],
        ["someone/altered", "model.safetensors", "does not fit its checksum: delete /"],
    ),
    "no id": (["not a valid id"], ["not a valid id", "local folder"]),
}

# Runs groups of commands, each group in an environment of its own. The hub client reads its
# environment once, when it is imported; so it is imported anew for each group, with all that holds
# a part of it. That is a process for each group, but for the seconds that torch takes to import.
# The waits between the client's retries are left out. Prints a line of JSON: for each group what
# its commands gave, and which variables they changed.
CHILD = """
import contextlib, io, json, os, sys, time, traceback
from unittest import mock

TIMEOUT = "huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT"
time.sleep = lambda seconds: None


def run(words):
    import moirai_distill

    out = io.StringIO()
    err = io.StringIO()
    seconds = 0.2 if "someone/stalled" in words else 60  # which are waited for again and again
    with (
        mock.patch(TIMEOUT, seconds),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = moirai_distill.main(words)
        except BaseException:
            code = traceback.format_exc()
    return code, out.getvalue(), err.getvalue()


outer = dict(os.environ)
answers = {}
for group, (environment, commands) in json.loads(sys.argv[1]).items():
    os.environ.clear()
    os.environ.update(outer | environment)
    for name in list(sys.modules):
        if name.partition(".")[0] in ("huggingface_hub", "uni2ts", "moirai_distill"):
            del sys.modules[name]
    before = dict(os.environ)
    results = {case: run(words) for case, words in commands.items()}
    names = sorted({*before, *os.environ})
    changed = [name for name in names if before.get(name) != os.environ.get(name)]
    answers[group] = results, changed
print(json.dumps(answers))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub that downloads ask: /GROUP/ID/resolve/REVISION/FILE."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, with_body):
        group, _, rest = self.path.strip("/").partition("/")
        name, _, rest = rest.partition("/resolve/")
        revision, _, filename = rest.partition("/")
        self.server.requests.append((group, self.command, name, revision, filename))
        path = (self.server.student if name == STUDENT else self.server.folder) / filename
        is_weights = filename == "model.safetensors"

        flaw = FLAWS.get(name)
        if not flaw and revision not in ("main", COMMIT):
            flaw = (404, "RevisionNotFound")
        if not flaw and (not path.is_file() or (name == "someone/half" and is_weights)):
            flaw = (404, "EntryNotFound")
        body = b"" if flaw else path.read_bytes()
        if flaw:
            status, code = flaw
            self.send_response(status)
            self.send_header("X-Error-Code", code)
        else:
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        if name == "someone/altered" and is_weights:
            body = body[:-1] + bytes([body[-1] ^ 1])  # after its checksum was told
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()

        if not with_body:
            return
        if name == "someone/stalled" and is_weights:
            self.wfile.write(body[:100])
            self.server.stop.wait(60)
            self.close_connection = True
            return
        if name == "someone/truncated" and is_weights:
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)

    def do_GET(self):
        self.answer(True)

    def do_HEAD(self):
        self.answer(False)


class Net:
    """A loopback hub, data, and a child process that knows this hub alone."""

    def __init__(self, root, teacher):
        self.root = root
        self.data = write_hourly(root / "data", 4)
        sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "patch_size": 8, "dropout": 0.1}
        student = md.PatchStudent(64, 16, **sizes, info={"freqs": ["h"]})
        student.save_pretrained(root / "exported")

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        self.server.daemon_threads = True
        self.server.requests = []  # (group, method, model, revision, file)
        self.server.folder = teacher
        self.server.student = root / "exported"
        self.server.stop = threading.Event()
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def words(self, command, teacher, cache, *more):
        """Command line with the teacher of a hub id."""
        words = [command, "--data_dir", self.data, "--teacher_model", teacher]
        words += ["--label_cache", self.root / cache]
        lengths = "--context_length 64 --prediction_length 16 --device cpu"
        words += (lengths if command == "label" else SMALL).split()
        words += ["--lang", "en", "--max_windows", "4"]
        words += ["--teacher_patch_size", "16", "--teacher_point", "mean"]
        return [*map(str, words), *more]

    def run(self, groups):
        """group -> case -> [exit code or traceback, stdout, stderr].

        `groups` are group -> (environment, case -> command line).
        """
        asked = {}
        for group, (environment, commands) in groups.items():
            own = f"http://127.0.0.1:{self.server.server_port}/{group}"
            asked[group] = ({"HF_ENDPOINT": own} | environment, commands)
        outer = {}
        for name, value in os.environ.items():
            if not name.startswith(("HF_", "HUGGING")):
                outer[name] = value
        outer["HF_HOME"] = str(self.root / "home")
        outer["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parent), *sys.path])
        outer["no_proxy"] = "127.0.0.1"
        child = subprocess.run(
            [sys.executable, "-c", CHILD, json.dumps(asked)],
            env=outer,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert child.returncode == 0, child.stderr
        answers = json.loads(child.stdout.splitlines()[-1])
        for _, changed in answers.values():
            assert [name for name in changed if name.startswith("HF_")] == []
        return {group: results for group, (results, _) in answers.items()}

    def requests(self, group):
        """(method, model, revision, file) of the files that a group asked for."""
        found = []
        for by, *request in self.server.requests:
            if by == group and request[-1]:
                found.append(tuple(request))
        return found


@pytest.fixture(scope="module")
def net(tmp_path_factory, teacher_folder):
    net = Net(tmp_path_factory.mktemp("hub"), teacher_folder)
    yield net
    net.server.stop.set()
    net.server.shutdown()
    net.server.server_close()


@pytest.fixture(scope="module")
def results(net):
    """group -> case -> [exit code or traceback, stdout, stderr]; the groups run in this order.

    online: training with the good model, then every failure. offline: told to stay offline, after
    that. dead: with a hub that does not answer. student: the commands that take a student.
    """
    train = ["--alpha", "0.5", "--num_epochs", "1", "--save_dir", str(net.root / "run")]
    online = {"good": net.words("train", GOOD, "labels", *train)}
    for case, ((teacher, *more), _) in FAILURES.items():
        online[case] = net.words("label", teacher, "none", *more)
    offline = {
        "hit": net.words("label", GOOD, "labels"),
        "copy": net.words("label", GOOD, "labels2"),
        "commit": net.words("label", GOOD, "labels3", "--teacher_revision", COMMIT),
        "no copy": net.words("label", "someone/other", "none"),
    }
    dead = {
        "copy": net.words("label", GOOD, "labels4"),
        "no copy": net.words("label", "someone/other", "none"),
    }
    student = {
        "predict": ["--input", net.data / "s00.csv", "--output", net.root / "forecast.csv"],
        "export": ["--format", "hub", "--output", net.root / "again"],
        "evaluate": [
            "--data_dir",
            net.data,
            "--device",
            "cpu",
            "--output_dir",
            net.root / "scores",
        ],
    }
    for command, words in student.items():
        student[command] = [command, "--checkpoint", STUDENT, "--lang", "en", *map(str, words)]
    groups = {
        "online": ({}, online),
        "offline": ({"HF_HUB_OFFLINE": "1"}, offline),
        "dead": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, dead),
        "student": ({}, student),
    }
    return net.run(groups)


def labels_in(cache):
    """(manifest, labels) of the one label file in a cache."""
    (folder,) = cache.iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest, np.array(md.LabelFile(folder, manifest).open().array)


def assert_one_line(result, parts):
    """The command ended with exit code 2 and one line with all of `parts`, no traceback."""
    code, _, err = result
    assert code == 2, code
    assert "Traceback" not in err
    problems = [line for line in err.splitlines() if line.startswith("error: ")]
    assert problems == err.splitlines()[-1:]
    assert [part for part in parts if part not in problems[0]] == []


def test_a_teacher_from_the_hub_labels_and_trains(net, results):
    code, out, err = results["online"]["good"]
    assert code == 0, err
    assert "Teacher loaded" in out
    assert (net.root / "run" / "best_model_epoch_1.pt").is_file()
    downloaded = []
    for method, name, revision, filename in net.requests("online"):
        if (method, name, revision) == ("GET", GOOD, "main"):
            downloaded.append(filename)
    assert downloaded == ["config.json", "model.safetensors"]

    manifest, labels = labels_in(net.root / "labels")
    assert manifest["teacher"] == GOOD
    assert manifest["revision"] is None
    assert manifest["commit"] == COMMIT
    assert "CC-BY-NC-4.0" in manifest["licence"]
    assert manifest["key"]["weights"]
    assert labels.std() > 0.1


def test_labels_of_a_downloaded_teacher_are_those_of_the_local_folder(net, results, teacher_folder):
    assert md.main(net.words("label", str(teacher_folder), "local")) == 0
    downloaded, labels = labels_in(net.root / "labels")
    local, expected = labels_in(net.root / "local")
    assert downloaded["key"] == local["key"]
    assert np.array_equal(labels, expected)


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_download_is_one_clear_line(results, case):
    _, parts = FAILURES[case]
    assert_one_line(results["online"][case], parts)


def test_a_failed_download_leaves_no_labels(net, results):
    assert not (net.root / "none").exists()
    assert not Path("none").exists()


def test_offline_the_local_copy_and_the_label_cache_need_no_request(net, results):
    assert net.requests("offline") == []
    for case in ("hit", "copy", "commit"):
        code, out, err = results["offline"][case]
        assert code == 0, err
        assert ("cache hit" in out) == (case == "hit")
    manifest, labels = labels_in(net.root / "labels2")
    assert manifest["commit"] == COMMIT
    assert np.array_equal(labels, labels_in(net.root / "labels")[1])
    assert labels_in(net.root / "labels3")[0]["revision"] == COMMIT


def test_offline_without_a_local_copy_is_one_clear_line(results):
    parts = ["someone/other", "not in the local cache", "HF_HUB_OFFLINE"]
    assert_one_line(results["offline"]["no copy"], parts)


def test_without_a_server_the_local_copy_is_used(net, results):
    code, _, err = results["dead"]["copy"]
    assert code == 0, err
    assert np.array_equal(labels_in(net.root / "labels4")[1], labels_in(net.root / "labels")[1])


def test_without_a_server_and_a_local_copy_is_one_clear_line(results):
    parts = ["someone/other", "out of reach", "HF_ENDPOINT", "mirror", "local folder"]
    assert_one_line(results["dead"]["no copy"], parts)


@pytest.mark.parametrize("command", ["predict", "export", "evaluate"])
def test_every_command_takes_a_student_from_the_hub(results, command):
    code, _, err = results["student"][command]
    assert code == 0, err


def test_a_student_from_the_hub_is_the_one_that_was_exported(net, results):
    asked = {(name, filename) for _, name, _, filename in net.requests("student")}
    assert asked == {(STUDENT, "config.json"), (STUDENT, "model.safetensors")}
    context = hourly(300)["value"].to_numpy()[None, -64:]
    with torch.inference_mode():
        (expected,) = md.PatchStudent.from_pretrained(net.root / "exported")(
            torch.from_numpy(context)
        )
    forecast = np.genfromtxt(net.root / "forecast.csv", delimiter=",", skip_header=1, usecols=1)
    np.testing.assert_allclose(forecast, expected, rtol=1e-9)

    again = (net.root / "again" / "model.safetensors").read_bytes()
    assert again == (net.root / "exported" / "model.safetensors").read_bytes()
    scores = json.loads((net.root / "scores" / "evaluation.json").read_text())
    assert STUDENT in scores["rows"]
