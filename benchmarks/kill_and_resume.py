"""Kill a run at random moments, resume it, and compare it with one that was never stopped.

    python benchmarks/kill_and_resume.py              # 50 times, within 20 minutes; exit code 1 where anything differs
    python benchmarks/kill_and_resume.py --kills 10 --seed 7

A small run (the demo teacher labels 12 series, a small student trains) is started again and again and killed with
SIGKILL, every fifth time with SIGTERM or SIGINT, which must save and exit 143 or 130. After every kill all checkpoints
must load, and every block of labels must be whole and hold the bytes of the uninterrupted run. When a run has come to
its end, its weights, metrics and best epoch must be those of the uninterrupted run, bit for bit.
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
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import moirai_distill as md  # noqa: E402

EACH = 5  # kills of one run, which is then let to its end
SIZES = "--context_length 64 --prediction_length 16 --d_model 32 --num_layers 2 --num_heads 4 --patch_size 8"


def command(root, name, epochs, windows, resume):
    """Words of the run `name` below `root`."""
    flags = f"{SIZES} --num_epochs {epochs} --max_windows {windows} --teacher_batch_size 32 --num_samples 20"
    flags += f" --learning_rate 1e-3 --device cpu --lang en --teacher_model {ROOT / 'checkpoints' / 'demo_teacher'}"
    flags += f" --data_dir {root / 'data'} --label_cache {root / name / 'labels'} --save_dir {root / name / 'run'}"
    return [sys.executable, str(ROOT / "moirai_distill.py"), *flags.split(), *["--resume"] * resume]


def start(root, name, epochs, windows):
    """The child process of the run `name`; it goes on where there is something to go on from."""
    resume = (root / name / "run" / "last.pt").is_file()
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command(root, name, epochs, windows, resume), env=environment, **settings)


def label_file(folder):
    """The one label file in a cache, or None where none was begun."""
    manifests = [(path, md.read_manifest(path)) for path in sorted(folder.glob("*/"))]
    found = [md.LabelFile(path, manifest) for path, manifest in manifests if manifest]
    assert len(found) <= 1, f"{len(found)} label files"
    return found[0] if found else None


def phase(folder):
    """What a run was doing when it was stopped."""
    if (folder / "run" / "last.pt").is_file():
        return "training"
    return "labelling" if label_file(folder / "labels") else "loading"


def problems(root, name, labels):
    """What is wrong after a kill: a checkpoint that does not load, a label lost or other than that of the plain run."""
    wrong, file = [], label_file(root / name / "labels")
    for path in sorted((root / name / "run").glob("*.pt")):
        try:
            md.read_checkpoint(path)
        except md.UserError as error:
            wrong.append(str(error))
    metrics = root / name / "run" / "metrics.jsonl"
    for line in metrics.read_text().splitlines() if metrics.is_file() else []:
        json.loads(line)
    for number in range(file.count if file else 0):
        content = file.read(number)
        begun = (file.folder / "blocks" / f"{number:08d}.bin").exists() or file.path.exists()
        if content is None and begun:
            wrong.append(f"block {number} of the labels is damaged")
        if content is not None and content != labels[number]:
            wrong.append(f"block {number} holds other labels")
    return wrong, sum(file.read(number) is not None for number in range(file.count)) if file else 0


def result(folder):
    """(metrics, best epoch, best weights, last weights) of a finished run."""
    last = md.read_checkpoint(folder / "run" / "last.pt")
    best = md.read_checkpoint(md.best_in(folder / "run"))
    lines = (folder / "run" / "metrics.jsonl").read_text()
    return lines, last["loop"]["best_epoch"], best["model_state_dict"], last["model_state_dict"]


def differences(one, other):
    """In what two results differ."""
    names = ["metrics", "best epoch"]
    found = [name for name, a, b in zip(names, one, other, strict=False) if a != b]
    for name, a, b in zip(("best weights", "last weights"), one[2:], other[2:], strict=True):
        found += [f"{name}: {key}" for key in a if not torch.equal(a[key], b[key])]
    return found


def torture(root, kills, seed, epochs, windows, tell):
    """Kill and resume; returns the list of all that was wrong."""
    md.write_demo_csvs(root / "data", files=12, rows=400)
    begin = time.perf_counter()
    done = start(root, "plain", epochs, windows)
    out, errors = done.communicate()
    assert done.returncode == 0, errors
    length = time.perf_counter() - begin
    plain, file = result(root / "plain"), label_file(root / "plain" / "labels")
    labels = [file.read(number) for number in range(file.count)]
    tell(f"uninterrupted: {length:.1f} s, {file.windows} labels in {file.count} blocks, best epoch {plain[1]}")
    rng, wrong, made, phases = random.Random(seed), [], 0, collections.Counter()
    number = rounds = 0
    while number < kills:
        made = 0
        name, finished, last = f"killed{rounds}", False, min(kills, number + EACH)
        while number < last and not finished:
            child = start(root, name, epochs, windows)
            signum = rng.choice([signal.SIGTERM, signal.SIGINT]) if number % 5 == 4 else signal.SIGKILL
            if signum != signal.SIGKILL:
                child.stdout.readline()  # it handles signals from here on
            limit = rng.uniform(0, 0.8 * length) if signum == signal.SIGKILL else rng.uniform(0, 0.5 * length)
            try:
                child.wait(limit)
                finished = True
            except subprocess.TimeoutExpired:
                child.send_signal(signum)
            out, errors = child.communicate()
            expected = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[signum]
            finished = finished or child.returncode == 0
            if not finished:
                number += 1
                phases[phase(root / name)] += 1
                if child.returncode != expected or "Traceback" in errors:
                    wrong.append(f"kill {number}: exit code {child.returncode}, not {expected}\n{errors[-500:]}")
            bad, now = problems(root, name, labels)
            wrong += [f"kill {number}: {problem}" for problem in bad]
            if now < made:
                wrong.append(f"kill {number}: {made - now} blocks of labels are lost")
            made = 0 if finished else now
            where = f"{phase(root / name)}, {now} of {file.count} blocks"
            tell(f"kill {number} by {signum.name}: {where}, {len(wrong)} wrong")
            if finished and child.returncode != 0:
                wrong.append(f"exit code {child.returncode}: {errors[-500:]}")
        if not finished:
            child = start(root, name, epochs, windows)
            out, errors = child.communicate()
            if child.returncode != 0:
                wrong.append(f"the last resume: exit code {child.returncode}\n{errors[-500:]}")
                return wrong
        wrong += [f"{name} differs: {what}" for what in differences(plain, result(root / name))]
        rounds += 1
    tell(f"{number} kills in {rounds} run(s), while {dict(phases)}; {len(wrong)} problems")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="how often")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--epochs", type=int, default=20, help="of the run")
    parser.add_argument("--windows", type=int, default=160, help="training windows of each series")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        wrong = torture(
            Path(root), args.kills, args.seed, args.epochs, args.windows, lambda text: print(text, flush=True)
        )
    print("\n".join(wrong) or "every file loaded, no label was lost or wrong, and every end was that of the plain run")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
