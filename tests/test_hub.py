"""Teachers from the hub: a download from a loopback server, the local copy, and every way in which it can fail."""

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
from conftest import SCRIPT, SMALL, hourly

import moirai_distill as md

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GOOD = "Salesforce/tiny"  # the server's one model that is whole
STUDENT = "me/student"  # an exported student
FLAWS = {"nobody/missing": (404, "RepoNotFound"), "someone/private": (401, "RepoNotFound")}
FLAWS |= {
    "someone/gated": (403, "GatedRepo"),
    "someone/login": (401, "GatedRepo"),
    "someone/empty": (404, "EntryNotFound"),
    "someone/broken": (500, "InternalError"),
}

# Runs several commands in one process, as importing takes longer than the commands. The waits between the hub client's
# retries are left out. Prints a line of JSON for each command, and at last whether the environment is as it was.
CHILD = """
import contextlib, io, json, os, sys, time, traceback
time.sleep = lambda seconds: None
before = dict(os.environ)
import moirai_distill
lines = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = moirai_distill.main(words)
        except BaseException:
            code = traceback.format_exc()
    lines.append([code, out.getvalue(), err.getvalue()])
changed = sorted(name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name))
print(json.dumps([lines, changed]))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub that downloads ask: /ID/resolve/REVISION/FILE."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, with_body):
        name, _, rest = self.path.strip("/").partition("/resolve/")
        revision, _, filename = rest.partition("/")
        self.server.requests.append((self.command, name, revision, filename))
        path = (self.server.student if name == STUDENT else self.server.folder) / filename
        flaw = FLAWS.get(name)
        if not flaw and revision not in ("main", COMMIT):
            flaw = (404, "RevisionNotFound")
        if not flaw and (not path.is_file() or name == "someone/half" and filename == "model.safetensors"):
            flaw = (404, "EntryNotFound")
        body = b"" if flaw else path.read_bytes()
        self.send_response(flaw[0] if flaw else 200)
        self.send_header(
            "X-Error-Code" if flaw else "ETag", flaw[1] if flaw else f'"{hashlib.sha256(body).hexdigest()}"'
        )
        if name == "someone/altered" and filename == "model.safetensors":
            body = body[:-1] + bytes([body[-1] ^ 1])  # after its checksum was told
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body and name == "someone/stalled" and filename == "model.safetensors":
            self.wfile.write(body[:100])
            self.server.stop.wait(60)
        if with_body and name == "someone/truncated" and filename == "model.safetensors":
            body, self.close_connection = body[: len(body) // 2], True
        self.wfile.write(body if with_body else b"")

    def do_GET(self):
        self.answer(True)

    def do_HEAD(self):
        self.answer(False)


class Net:
    """A loopback hub, data, and child processes that know this hub alone."""

    def __init__(self, root, teacher):
        self.root, self.data, self.home = root, root / "data", root / "home"
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        self.server.stop, self.server.student = threading.Event(), root / "exported"
        md.PatchStudent(64, 16, 16, 1, 2, 8, 0.1, {"freqs": ["h"]}).save_pretrained(root / "exported")
        self.server.daemon_threads, self.server.requests, self.server.folder = True, [], teacher
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.data.mkdir()
        for number in range(12):
            hourly(300, seed=number).to_csv(self.data / f"s{number:02d}.csv", index=False)

    def words(self, command, teacher, cache, *more):
        """Command line with the teacher of a hub id."""
        places = ["--data_dir", self.data, "--teacher_model", teacher, "--label_cache", self.root / cache]
        lengths = "--context_length 64 --prediction_length 16 --device cpu" if command == "label" else SMALL
        fixed = f"{lengths} --lang en --teacher_patch_size 16 --teacher_point mean --max_windows 4".split()
        return [command, *map(str, places), *fixed, *more]

    def run(self, commands, **environment):
        """[(exit code or traceback, stdout, stderr)] of the commands in one child, and the requests that it made."""
        here = {"HF_HOME": str(self.home), "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}"}
        here |= {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path]), "no_proxy": "127.0.0.1"}
        outer = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        self.server.requests.clear()
        start = [sys.executable, "-c", CHILD, json.dumps(commands)]
        child = subprocess.run(start, env=outer | here | environment, capture_output=True, text=True, timeout=300)
        assert child.returncode == 0, child.stderr
        results, changed = json.loads(child.stdout.splitlines()[-1])
        assert [name for name in changed if name.startswith("HF_")] == []
        return results, [request for request in self.server.requests if request[3]]


@pytest.fixture(scope="module")
def net(tmp_path_factory, teacher_folder):
    net = Net(tmp_path_factory.mktemp("hub"), teacher_folder)
    yield net
    net.server.stop.set()
    net.server.shutdown()
    net.server.server_close()


FAILURES = {  # command's further words, what the one line must say
    "unknown": (["nobody/missing"], ["nobody/missing", "no such model", "check the id"]),
    "private": (["someone/private"], ["someone/private", "private", "hf auth login"]),
    "gated": (["someone/gated"], ["someone/gated", "access is not granted", "hf auth login"]),
    "not logged in": (["someone/login"], ["someone/login", "access is not granted", "hf auth login"]),
    "unknown revision": ([GOOD, "--teacher_revision", "v9"], [GOOD, "no such revision", "--teacher_revision"]),
    "no config": (["someone/empty"], ["someone/empty", "config.json", "no such file"]),
    "no weights": (["someone/half"], ["someone/half", "model.safetensors", "no such file"]),
    "truncated": (["someone/truncated"], ["someone/truncated", "model.safetensors", "download failed", "local folder"]),
    "server error": (["someone/broken"], ["someone/broken", "out of reach", "local folder"]),
    "stalled": (["someone/stalled"], ["someone/stalled", "model.safetensors", "local folder"]),
    "altered": (["someone/altered"], ["someone/altered", "model.safetensors", "does not fit its checksum: delete /"]),
    "no id": (["not a valid id"], ["not a valid id", "local folder"]),
}


@pytest.fixture(scope="module")
def online(net):
    """Case -> result of a child with the hub at hand: training with the good model, then every failure; requests."""
    commands = [net.words("train", GOOD, "labels", "--num_epochs", "1", "--save_dir", str(net.root / "run"))]
    commands += [net.words("label", teacher, "none", *more) for (teacher, *more), _ in FAILURES.values()]
    results, requests = net.run(commands, HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1")
    return dict(zip(["good", *FAILURES], results, strict=True)), requests


@pytest.fixture(scope="module")
def offline(net, online):
    """Case -> result of a child that is told to stay offline, after `online`; requests."""
    commands = {"hit": net.words("label", GOOD, "labels"), "copy": net.words("label", GOOD, "labels2")}
    commands["commit"] = net.words("label", GOOD, "labels3", "--teacher_revision", COMMIT)
    commands["no copy"] = net.words("label", "someone/other", "none")
    results, requests = net.run(list(commands.values()), HF_HUB_OFFLINE="1")
    return dict(zip(commands, results, strict=True)), requests


@pytest.fixture(scope="module")
def dead(net, online):
    """Case -> result of a child whose hub does not answer, after `online`."""
    commands = {"copy": net.words("label", GOOD, "labels4"), "no copy": net.words("label", "someone/other", "none")}
    results, _ = net.run(list(commands.values()), HF_ENDPOINT="http://127.0.0.1:9")
    return dict(zip(commands, results, strict=True))


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


def test_a_teacher_from_the_hub_labels_and_trains(net, online):
    (code, out, err), requests = online[0]["good"], online[1]
    assert code == 0, err
    assert "Teacher loaded" in out and list((net.root / "run").glob("best_model_epoch_1.pt"))
    asked = [request for request in requests if request[1] == GOOD and request[2] == "main"]
    assert [request[3] for request in asked if request[0] == "GET"] == ["config.json", "model.safetensors"]
    manifest, labels = labels_in(net.root / "labels")
    expected = {"teacher": GOOD, "revision": None, "commit": COMMIT}
    assert {name: manifest[name] for name in expected} == expected
    assert "CC-BY-NC-4.0" in manifest["licence"] and manifest["key"]["weights"] and labels.std() > 0.1


def test_labels_of_a_downloaded_teacher_are_those_of_the_local_folder(net, online, teacher_folder):
    assert md.main(net.words("label", str(teacher_folder), "local")) == 0
    (manifest, labels), (other, expected) = labels_in(net.root / "labels"), labels_in(net.root / "local")
    assert manifest["key"] == other["key"] and np.array_equal(labels, expected)


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_download_is_one_clear_line(online, case):
    assert_one_line(online[0][case], FAILURES[case][1])


def test_a_failed_download_leaves_no_labels(net, online):
    assert not (net.root / "none").exists() and not Path("none").exists()


def test_offline_the_local_copy_and_the_label_cache_need_no_request(net, offline):
    results, requests = offline
    assert requests == []
    for case in ("hit", "copy", "commit"):
        assert results[case][0] == 0, results[case][2]
    assert "cache hit" in results["hit"][1] and "cache hit" not in results["copy"][1]
    manifest, labels = labels_in(net.root / "labels2")
    assert manifest["commit"] == COMMIT and np.array_equal(labels, labels_in(net.root / "labels")[1])
    assert labels_in(net.root / "labels3")[0]["revision"] == COMMIT


def test_offline_without_a_local_copy_is_one_clear_line(offline):
    assert_one_line(offline[0]["no copy"], ["someone/other", "not in the local cache", "HF_HUB_OFFLINE"])


def test_without_a_server_the_local_copy_is_used(net, dead):
    assert dead["copy"][0] == 0, dead["copy"][2]
    assert np.array_equal(labels_in(net.root / "labels4")[1], labels_in(net.root / "labels")[1])


def test_without_a_server_and_a_local_copy_is_one_clear_line(dead):
    assert_one_line(dead["no copy"], ["someone/other", "out of reach", "HF_ENDPOINT", "mirror", "local folder"])


def test_every_command_takes_a_student_from_the_hub(net):
    output, data = net.root / "forecast.csv", ["--data_dir", str(net.data), "--lang", "en", "--device", "cpu"]
    commands = [["predict", "--checkpoint", STUDENT, "--input", str(net.data / "s00.csv"), "--output", str(output)]]
    commands += [["export", "--checkpoint", STUDENT, "--format", "hub", "--output", str(net.root / "again")]]
    commands += [["evaluate", "--checkpoint", STUDENT, *data, "--output_dir", str(net.root / "scores")]]
    results, requests = net.run(commands)
    assert [code for code, *_ in results] == [0, 0, 0], results
    assert {(name, filename) for _, name, _, filename in requests} == {
        (STUDENT, "config.json"),
        (STUDENT, "model.safetensors"),
    }
    with torch.inference_mode():
        student = md.PatchStudent.from_pretrained(net.root / "exported")
        expected = student(torch.from_numpy(hourly(300)["value"].to_numpy()[None, -64:]))[0]
    np.testing.assert_allclose(np.genfromtxt(output, delimiter=",", skip_header=1, usecols=1), expected, rtol=1e-9)
    weights = [(net.root / folder / "model.safetensors").read_bytes() for folder in ("again", "exported")]
    assert weights[0] == weights[1]
    assert STUDENT in json.loads((net.root / "scores" / "evaluation.json").read_text())["rows"]
