"""How large may it be? Memory, disk and time per row and window, and what they come to for more.

    python benchmarks/how_large.py                     # on the CPU, minutes
    python benchmarks/how_large.py --device cuda       # labelling and training on the GPU

Loading is measured in child processes at two numbers of CSVs, so that what the libraries take by
themselves drops out. Labelling is measured with random weights in the shapes of MOIRAI small and
base, 100 samples, patch 32, training at batch 32; all with 720 points in and 96 out. The table
multiplies; nothing in it is measured at its own size.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import speed
import torch
from common import HORIZON, LENGTH, md

ROWS = 10_000  # of a CSV
FILES = (100, 400)  # CSVs
LABELLED = 256  # windows of a call
SIZES = (  # CSVs, training windows of each (0 = all): the lines of the table
    (100, 1000),
    (100, 0),
    (1_000, 1000),
    (10_000, 1000),
    (10_000, 0),
)
CHILD = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from common import data_config, read_config, md, peak_memory, quiet_voice
config = data_config(data_dir=sys.argv[2], max_files=int(sys.argv[3]), split_by="files")
began = time.perf_counter()
files = md.read_files(config.data_dir, config.max_files, read_config(), quiet_voice())
read = time.perf_counter() - began
data = md.split_data(files, config)
prepared = time.perf_counter() - began - read
print(json.dumps([read, prepared, peak_memory()]))
"""


@dataclass
class Loading:
    """What a row takes."""

    read: float  # seconds
    prepare: float  # seconds
    memory: float  # bytes at the peak, with its window


def loading(folder):
    """Loading, from the difference of two numbers of files."""
    figures = []  # [seconds to read, seconds to prepare, bytes at the peak] of each number
    for count in FILES:
        benchmarks = str(Path(__file__).resolve().parent)
        words = [sys.executable, "-c", CHILD, benchmarks, str(folder), str(count)]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        figures.append(json.loads(done.stdout))
    few, many = np.array(figures)
    rows = (FILES[1] - FILES[0]) * ROWS
    read, prepare, memory = (many - few) / rows
    return Loading(read, prepare, memory)


def labelling(shape, device):
    """Seconds a window."""
    teacher = md.Teacher(speed.moirai(shape, device), device, "32", print)
    windows = speed.series_windows(LABELLED)
    call = speed.label_call(teacher, windows, LABELLED, speed.PATCH)
    return min(speed.race({"labels": call}, 2, device)["labels"]) / LABELLED


def training(device):
    """Seconds a window."""
    batch = speed.training_batch(speed.series_windows(speed.BATCH), device)
    step = speed.step_of(speed.student_model(), batch, device)
    return min(speed.race({"step": step}, 20, device)["step"]) / speed.BATCH


def span(seconds):
    """Text of a time."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"


def table_row(files, max_windows, row, seconds_of):
    """A line of the table: what a row and a window take, times their number."""
    rows = files * ROWS
    of_a_file = max_windows or ROWS - LENGTH - HORIZON + 1
    windows = files * 0.8 * of_a_file
    which = f"`--max_windows {max_windows}`" if max_windows else "all"
    return [
        f"{files:,}",
        f"{windows:,.0f} ({which})",
        span(rows * (row.read + row.prepare)),
        f"{1e-9 * rows * row.memory:.2g} GB",
        f"{4e-9 * HORIZON * windows:.2g} GB",
        *(span(windows * seconds) for seconds in seconds_of.values()),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as root:
        row = loading(speed.write_csvs(Path(root, "data"), FILES[1], ROWS))
    seconds_of = {  # a window
        "labelling, small": labelling("small", device),
        "base": labelling("base", device),
        "an epoch": training(device),
    }

    print(f"{device}, {torch.get_num_threads()} threads.")
    print(f"A row: reading {1e6 * row.read:.3f} µs, preparing {1e6 * row.prepare:.3f} µs;")
    print(f"at the peak, with its window, {row.memory:.0f} bytes.")
    windows = [f"{1e3 * seconds:.3g} ms ({name})" for name, seconds in seconds_of.items()]
    print(f"A window: {', '.join(windows)}\n")
    head = [f"CSVs of {ROWS:,} rows", "windows", "read and prepare", "memory", "labels"]
    head += seconds_of
    print(f"| {' | '.join(head)} |")
    print("|---" * len(head) + "|")
    for files, max_windows in SIZES:
        print(f"| {' | '.join(table_row(files, max_windows, row, seconds_of))} |")


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - began:.0f} s")
