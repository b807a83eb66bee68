"""How large may it be? Memory, disk and time per row and per window, measured here, and what they come to for more.

    python benchmarks/how_large.py                     # on the CPU, minutes
    python benchmarks/how_large.py --device cuda       # labelling and training on the GPU

Loading is measured in child processes at two numbers of CSVs, so that what the libraries take by themselves drops out.
Labelling is measured with random weights in the shapes of MOIRAI small and base, 100 samples, patch 32, training at
batch 32; all with 720 points in and 96 out. The table below multiplies; nothing in it is measured at its own size.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import speed

md = speed.md
ROWS, FILES = 10_000, (100, 400)
CHILD = """
import argparse, json, resource, sys, time
sys.path.insert(0, sys.argv[1])
import moirai_distill as md
asked = {"data_dir": sys.argv[2], "max_files": int(sys.argv[3]), "columns": ["first"], "label_cache": sys.argv[4]}
begin = time.perf_counter()
found, series, remarks = md.read_once(argparse.Namespace(**asked), md.Say("en"))
read = time.perf_counter() - begin
limits = {"length": 816, "horizon": 96, "max_gap": 16}
parts, *_ = md.split_data(series, remarks, "files", (8, 1, 1), 0, 1, 0, "auto", limits)
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
windows = sum(map(len, parts.values()))
print(json.dumps([read, time.perf_counter() - begin - read, peak, windows]))
"""


def loading(folder):
    """((first and second start) x (seconds to read a row, to prepare a row, bytes a row at the peak), each from the
    difference of two numbers of files; bytes of the parsed copy a row)."""
    results = np.zeros((2, len(FILES), 3))  # starts, sizes, figures
    for number, count in enumerate(FILES):
        with tempfile.TemporaryDirectory() as cache:
            for start in (0, 1):
                words = [sys.executable, "-c", CHILD, str(Path(md.__file__).parent), str(folder), str(count), cache]
                done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
                results[start, number] = json.loads(done.stdout)[:3]
            size = sum(path.stat().st_size for path in Path(cache).iterdir())
    return (results[:, 1] - results[:, 0]) / ((FILES[1] - FILES[0]) * ROWS), size / (FILES[1] * ROWS)


def labelling(shape, device):
    """Seconds a window."""
    teacher = md.Teacher(speed.moirai(shape, device), device, "32", print)
    windows = speed.series_windows(256)
    request = md.Request(shape, None, speed.PATCH, "median", 100)
    call = lambda: md.label_windows(teacher, windows, np.arange(256), {"h": speed.PATCH}, request, 0)  # noqa: E731
    return min(speed.race({"labels": call}, 2, device)["labels"]) / 256


def training(device):
    """Seconds a window."""
    batch = [part.to(device) for part in speed.series_windows(32).batch(np.arange(32))[:2]]
    return min(speed.race({"step": speed.step_of("student", batch, device)}, 20, device)["step"]) / 32


def span(seconds):
    """Text of a time."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as root:
        frame = {"date": pd.date_range("2020-01-01", periods=ROWS, freq="h")}
        for number in range(FILES[1]):
            values = np.random.default_rng(number).standard_normal(ROWS).cumsum().round(4)
            pd.DataFrame(frame | {"value": values}).to_csv(Path(root, f"{number:04d}.csv"), index=False)
        ((read, prepare, memory), (again, anew, mapped)), kept = loading(root)
    small, base, train = labelling("small", device), labelling("base", device), training(device)
    print(f"{device}, {torch.get_num_threads()} threads. A row: reading {1e6 * read:.3f} µs, again {1e6 * again:.4f};")
    print(
        f"preparing {1e6 * prepare:.3f} µs, again {1e6 * anew:.3f}; at the peak, with its window, {memory:.0f} bytes,"
    )
    print(
        f"again {mapped:.0f}; {kept:.1f} bytes of parsed copy on disk. A window: labelling {1e3 * small:.3g} ms (small)"
    )
    print(f"and {1e3 * base:.3g} ms (base), training {1e3 * train:.3g} ms an epoch\n")
    head = ("CSVs of 10,000 rows", "windows", "read and prepare, again", "memory", "labels", "labelling, small", "base")
    print(f"| {' | '.join(head)} | an epoch |")
    print("|---|---|---|---|---|---|---|---|")
    for files, limit in ((100, 1000), (100, 0), (1_000, 1000), (10_000, 1000), (10_000, 0)):
        rows, windows = files * ROWS, files * 0.8 * (limit or ROWS - 815)
        cells = [f"{files:,}", f"{windows:,.0f}" + (" (`--max_windows 1000`)" if limit else " (all)")]
        starts = ", ".join(span(rows * cost) for cost in (read + prepare, again + anew))
        cells += [starts, f"{1e-9 * rows * memory:.2g} GB"]
        cells += [f"{4e-9 * 96 * windows:.2g} GB", *(span(windows * cost) for cost in (small, base, train))]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    begin = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - begin:.0f} s")
