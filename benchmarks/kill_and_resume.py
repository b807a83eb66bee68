"""Kill a run at random moments, resume it, and compare it with one that was never stopped.

    python benchmarks/kill_and_resume.py    # 50 times, within 20 minutes; exit code 1 if it differs
    python benchmarks/kill_and_resume.py --kills 10 --seed 7

A small run (the demo teacher labels 12 series, a small student trains) is started again and again
and killed with SIGKILL, every fifth time with SIGTERM or SIGINT, which must save and exit 143 or
130. After every kill all checkpoints must load, and every block of labels must be whole and hold
the bytes of the uninterrupted run. When a run has come to its end, its weights, metrics and best
epoch must be those of the uninterrupted run, bit for bit.
"""

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from common import DEMO_TEACHER, ROOT, md

EACH = 5  # kills of one run, which is then let to its end
SIZES = {
    "context_length": 64,
    "prediction_length": 16,
    "d_model": 32,
    "num_layers": 2,
    "num_heads": 4,
    "patch_size": 8,
}
EXIT_CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}


@dataclass
class Run:
    """A run of the script that is killed, or the plain one that is not."""

    root: Path  # of all runs: their data is there
    name: str
    epochs: int
    windows: int  # training windows of each series

    @property
    def folder(self):
        return self.root / self.name

    @property
    def last(self):
        return self.folder / "run" / "last.pt"

    def command(self, resume):
        """Words of its command line."""
        flags = SIZES | {
            "num_epochs": self.epochs,
            "max_windows": self.windows,
            "teacher_batch_size": 32,
            "num_samples": 20,
            "learning_rate": 1e-3,
            "device": "cpu",
            "lang": "en",
            "teacher_model": DEMO_TEACHER,
            "data_dir": self.root / "data",
            "label_cache": self.folder / "labels",
            "save_dir": self.folder / "run",
        }
        words = [sys.executable, str(ROOT / "moirai_distill.py")]
        for name, value in flags.items():
            words += [f"--{name}", str(value)]
        if resume:
            words.append("--resume")
        return words

    def start(self):
        """A child process of it, which goes on where there is something to go on from."""
        return subprocess.Popen(
            self.command(resume=self.last.is_file()),
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def labels(self):
        """Its one label file, or None where none was begun."""
        found = []
        for folder in sorted((self.folder / "labels").glob("*/")):
            manifest = md.read_manifest(folder)
            if manifest:
                found.append(md.LabelFile(folder, manifest, md.has_quantiles(manifest)))
        assert len(found) <= 1, f"{len(found)} label files"
        return found[0] if found else None

    def blocks(self):
        """(part, number, bytes) of each block of its labels, None for bytes that are not there."""
        file = self.labels()
        if file is None:
            return []
        found = []
        for part in file.parts:
            for number in range(part.count):
                found.append((part, number, part.read(number)))
        return found

    def phase(self):
        """What it was doing when it was stopped."""
        if self.last.is_file():
            return "training"
        return "labelling" if self.labels() else "loading"

    def result(self):
        """name -> what it has come to, once it is finished: plain values and weights."""
        last = md.read_checkpoint(self.last)
        best = md.read_checkpoint(md.best_in(self.last.parent))
        result = {
            "metrics": (self.last.parent / "metrics.jsonl").read_text(),
            "best epoch": last["loop"]["best_epoch"],
        }
        for name, weight in best["model_state_dict"].items():
            result[f"best weights: {name}"] = weight
        for name, weight in last["model_state_dict"].items():
            result[f"last weights: {name}"] = weight
        return result


def problems(run, plain_blocks):
    """What is wrong after a kill: a checkpoint that does not load, a label lost or another one."""
    wrong = []
    for path in sorted(run.last.parent.glob("*.pt")):
        try:
            md.read_checkpoint(path)
        except md.UserError as error:
            wrong.append(str(error))
    metrics = run.last.parent / "metrics.jsonl"
    if metrics.is_file():
        for line in metrics.read_text().splitlines():
            json.loads(line)
    for block, plain_block in zip(run.blocks(), plain_blocks, strict=False):
        part, number, content = block
        was_written = part.block_path(number).exists() or part.path.exists()
        if content is None and was_written:
            wrong.append(f"block {number} of {part.path.name} is damaged")
        if content is not None and content != plain_block[2]:
            wrong.append(f"block {number} of {part.path.name} is another one")
    return wrong


def differences(one, other):
    """The names in which two results differ."""
    names = sorted(one.keys() | other.keys())
    return [name for name in names if not is_same(one.get(name), other.get(name))]


def is_same(one, other):
    """Whether two values, or tensors, are the same."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and one == other


def kill_once(run, signum, limit):
    """(whether it had come to its end before, its exit code, its stderr) of a run that is killed.

    It is killed after `limit` seconds.
    """
    child = run.start()
    if signum != signal.SIGKILL:
        child.stdout.readline()  # it handles signals from here on
    try:
        child.wait(limit)
        is_finished = True
    except subprocess.TimeoutExpired:
        child.send_signal(signum)
        is_finished = False
    _, errors = child.communicate()
    return is_finished or child.returncode == 0, child.returncode, errors


class Torture:
    """Kills runs, and keeps account of what was wrong."""

    def __init__(self, plain, seconds, seed, tell):
        self.plain = plain  # the Run that was not killed
        self.plain_blocks = plain.blocks()
        self.seconds = seconds  # that it took
        self.random = random.Random(seed)
        self.tell = tell
        self.kills = 0
        self.wrong = []
        self.phases = collections.Counter()

    def kill_and_resume(self, run, last):
        """Kill a run until it is at its end, or until `last` kills are done; then let it end.

        Returns whether it came to its end.
        """
        is_finished = False
        made = 0  # blocks of labels
        while self.kills < last and not is_finished:
            signum = signal.SIGKILL
            if self.kills % 5 == 4:
                signum = self.random.choice([signal.SIGTERM, signal.SIGINT])
            share = 0.8 if signum == signal.SIGKILL else 0.5
            limit = self.random.uniform(0, share * self.seconds)
            is_finished, code, errors = kill_once(run, signum, limit)
            if not is_finished:
                self.count_kill(run, signum, code, errors)
            made = self.look_at_files(run, signum, made)
        if not is_finished:
            child = run.start()
            _, errors = child.communicate()
            code = child.returncode
        if code != 0:
            self.wrong.append(f"{run.name} came to no end: exit code {code}\n{errors[-500:]}")
            return False
        for name in differences(self.plain.result(), run.result()):
            self.wrong.append(f"{run.name} differs: {name}")
        return True

    def count_kill(self, run, signum, code, errors):
        """Count a kill, and look at how the process ended."""
        self.kills += 1
        self.phases[run.phase()] += 1
        expected = EXIT_CODES[signum]
        if code != expected or "Traceback" in errors:
            self.wrong.append(
                f"kill {self.kills}: exit code {code}, not {expected}\n{errors[-500:]}"
            )

    def look_at_files(self, run, signum, made_before):
        """How many blocks of labels a run has made; what is wrong with its files is kept."""
        for problem in problems(run, self.plain_blocks):
            self.wrong.append(f"kill {self.kills}: {problem}")
        made = sum(block is not None for block in run.blocks())
        if made < made_before:
            lost = made_before - made
            self.wrong.append(f"kill {self.kills}: {lost} blocks of labels are lost")
        self.tell(
            f"kill {self.kills} by {signum.name}: {run.phase()},"
            f" {made} of {len(self.plain_blocks)} blocks, {len(self.wrong)} wrong"
        )
        return made


def torture(root, kills, seed, epochs, windows, tell):
    """Kill and resume; returns the list of all that was wrong."""
    md.write_demo_csvs(root / "data", files=12, rows=400)
    plain = Run(root, "plain", epochs, windows)
    began = time.perf_counter()
    child = plain.start()
    _, errors = child.communicate()
    assert child.returncode == 0, errors
    seconds = time.perf_counter() - began
    file = plain.labels()
    tell(
        f"uninterrupted: {seconds:.1f} s, {file.windows} labels in {file.points.count} blocks,"
        f" best epoch {plain.result()['best epoch']}"
    )

    account = Torture(plain, seconds, seed, tell)
    runs = 0
    comes_to_its_end = True
    while account.kills < kills and comes_to_its_end:
        run = Run(root, f"killed{runs}", epochs, windows)
        last = min(kills, account.kills + EACH)
        comes_to_its_end = account.kill_and_resume(run, last)
        runs += 1
    phases = dict(account.phases)
    tell(f"{account.kills} kills in {runs} run(s), while {phases}; {len(account.wrong)} problems")
    return account.wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="how often")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--epochs", type=int, default=20, help="of the run")
    parser.add_argument("--windows", type=int, default=160, help="training windows of each series")
    args = parser.parse_args()

    def tell(text):
        print(text, flush=True)

    with tempfile.TemporaryDirectory() as root:
        wrong = torture(Path(root), args.kills, args.seed, args.epochs, args.windows, tell)
    if wrong:
        print("\n".join(wrong))
        return 1
    print("every file loaded, no label was lost or wrong, and every end was that of the plain run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
