"""What the quantiles are worth: coverage, weighted quantile loss, cost, and that points stay.

    python benchmarks/quantiles.py --data ETTh1.csv               # all rows
    python benchmarks/quantiles.py --rows demo few --seeds 1      # some of them

Every student is trained and scored by the script's own commands, with the demo teacher; nothing is
chosen by test windows. The demo family is that of `--demo`; ETTh1 is split by time 6:2:2 over its
first 14,400 rows, as the field does. Each row tells the mean over the seeds, and the lowest and
highest one.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import DEMO_TEACHER, STUDENT, md
from torch import nn

ROWS = ("bits", "forecast", "demo", "ot", "all", "few")
ROWS_OF_ETTH1 = 14_400
FEW = (1, 2, 4, 8)  # of series that train, in the row "few"


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--rows", nargs="+", choices=ROWS, default=[*ROWS], help="what to measure")
    add("--data", default=None, help="ETTh1.csv, for the rows `ot` and `all`")
    add("--seeds", type=int, default=3, help="students per row")
    add("--epochs", type=int, default=8, help="of each student")
    add("--labels", default=None, help="label cache to use and keep; default: a new one")
    add("--max_windows", type=int, default=None, help="of a series; default: as in the script")
    return parser


class Lab:
    """A folder in which the script's commands are run, quietly."""

    def __init__(self, root, args):
        self.root = Path(root)
        self.args = args
        self.labels = Path(args.labels) if args.labels else self.root / "labels"

    def run(self, *words):
        """Run a command of the script; what it says is shown only where it fails."""
        told = io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            code = md.main([str(word) for word in words])
        if code:
            raise SystemExit(f"{words}: exit code {code}\n{told.getvalue()[-3000:]}")

    def train(self, name, *words):
        """Train a student; returns its folder. Of two equal flags the last one counts."""
        folder = self.root / name
        flags = ["--teacher_model", DEMO_TEACHER, "--label_cache", self.labels]
        flags += ["--num_epochs", self.args.epochs, "--learning_rate", 1e-3, "--device", "cpu"]
        if self.args.max_windows:
            flags += ["--max_windows", self.args.max_windows]
        self.run("train", "--save_dir", folder, *flags, *words)
        return folder

    def fresh_series(self):
        """Folder of 16 more series of the demo family, which no student trains on."""
        folder = self.root / "fresh"
        md.write_demo_csvs(folder, files=36, rows=1000)
        for number in range(20):  # those that students train on, choose by or are tested on
            (folder / f"series_{number:02d}.csv").unlink()
        return folder

    def rows(self, folder, *words):
        """The rows of an evaluation of a student beside its teacher: (student, teacher)."""
        output = folder / "scores"
        flags = ["--with_teacher", "--teacher_model", DEMO_TEACHER, "--output_dir", output]
        flags += ["--label_cache", self.labels, "--device", "cpu"]
        self.run("evaluate", "--checkpoint", folder, *flags, *words)
        rows = json.loads((output / "evaluation.json").read_text())["rows"]
        return rows[str(folder)], rows["teacher"]


def tell(what, values, wanted, digits=3):
    """Print a row of the table."""
    values = [float(value) for value in values]
    mean = statistics.mean(values)
    span = f"{min(values):.{digits}f}–{max(values):.{digits}f}"
    print(f"| {what} | {mean:.{digits}f} | {span} | {wanted} |", flush=True)


def note(what, row):
    """Show on stderr what one student has come to, as it comes."""
    print(
        f"{what}: WQL {row['wql']:.4f}, share {row['coverage_80']:.3f}", file=sys.stderr, flush=True
    )


def tell_coverage(what, rows):
    """Print the coverage of the 80 % band over all steps, and of each third of the horizon."""
    tell(
        f"{what}: share in the 80 % band, %", [100 * row["coverage_80"] for row in rows], "75–85", 1
    )
    for third in range(3):
        shares = [100 * row["coverage_80_by_third"][third] for row in rows]
        tell(f"{what}: the same, third {third + 1} of 3, %", shares, "72–88", 1)


# -- The rows --------------------------------------------------------------------------------------


def bits(lab):
    """The point's weights and forecasts with and without quantiles."""
    data = lab.root / "bits_data"
    md.write_demo_csvs(data, files=12, rows=300)
    small = ["--context_length", 96, "--prediction_length", 24, "--d_model", 32]
    small += ["--num_layers", 2, "--num_heads", 4, "--num_epochs", 2, "--max_windows", 20]
    small += ["--data_dir", data, "--num_samples", 20]
    students = {}
    for choice in ("on", "off"):
        folder = lab.train(f"bits_{choice}", *small, "--quantiles", choice)
        students[choice] = md.PatchStudent.from_pretrained(folder)
    context = torch.from_numpy(np.random.default_rng(0).standard_normal((256, 96)).cumsum(1))
    forecasts = {choice: student.forecast(context) for choice, student in students.items()}
    differing = int((forecasts["on"] != forecasts["off"]).sum())
    with_head = students["on"].state_dict()
    for name, weight in students["off"].state_dict().items():
        differing += int((with_head[name] != weight).sum())
    tell("point weights and forecasts that differ with and without quantiles", [differing], "0", 0)


def forecast(_lab):
    """One forecast, batch 1, on one thread, with quantiles over without: CPU time, in turn."""
    torch.manual_seed(0)
    student = md.PatchStudent(**STUDENT, quantile_width=md.QUANTILE_WIDTH).eval()
    context = torch.randn(1, STUDENT["context_length"]).cumsum(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ratios = []
    with torch.inference_mode():
        for _ in range(100):
            took = []
            for choice in (False, True):
                began = time.process_time()
                for _ in range(10):
                    student(context, choice)
                took.append(time.process_time() - began)
            ratios.append(took[1] / took[0])
    torch.set_num_threads(threads)
    quartiles = statistics.quantiles(ratios, n=4)
    print(
        f"| one forecast, batch 1, with quantiles / without | {quartiles[1]:.3f} |"
        f" {quartiles[0]:.3f}–{quartiles[2]:.3f} (quartiles of 100 pairs) | <= 1.15 |",
        flush=True,
    )


def crossings(folder, seed):
    """Quantiles below the one before, of random walks, as float32 and with int8 weights."""
    student = md.PatchStudent.from_pretrained(folder)
    walks = np.random.default_rng(seed).standard_normal((200, student.context_length)).cumsum(1)
    int8 = torch.ao.quantization.quantize_dynamic(student, {nn.Linear}, torch.qint8)
    count = 0
    for one in (student, int8):
        with torch.inference_mode():
            _, quantiles = one(torch.from_numpy(walks).float(), with_quantiles=True)
        count += int((quantiles.diff(dim=1) < 0).sum())
    return count


def demo(lab):
    """The demo family: coverage, and the weighted quantile loss over the teacher's."""
    data = lab.root / "demo_data"
    md.write_demo_csvs(data)
    fresh = lab.fresh_series()
    rows = []
    fresh_rows = []
    ratios = []
    fresh_ratios = []
    crossed = []
    for seed in range(lab.args.seeds):
        flags = ["--data_dir", data, "--max_windows", 100, "--seed", seed]
        folder = lab.train(f"demo_{seed}", *flags)
        row, teacher = lab.rows(folder)
        rows.append(row)
        ratios.append(row["wql"] / teacher["wql"])
        note(f"demo family, seed {seed}", row)
        row, fresh_teacher = lab.rows(folder, "--data_dir", fresh, "--split_ratio", "1:1:14")
        fresh_rows.append(row)
        note(f"demo family, 14 fresh series, seed {seed}", row)
        fresh_ratios.append(row["wql"] / fresh_teacher["wql"])
        crossed.append(crossings(folder, seed))
    tell_coverage("demo family", rows)
    tell_coverage("demo family, the teacher", [teacher])
    tell_coverage("demo family, 14 fresh series", fresh_rows)
    tell_coverage("demo family, 14 fresh series, the teacher", [fresh_teacher])
    tell("demo family: WQL / the teacher's", ratios, "<= 1.05")
    tell("demo family, 14 fresh series: WQL / the teacher's", fresh_ratios, "<= 1.05")
    tell("crossings, float32 and int8", crossed, "0", 0)


def ot(lab):
    """ETTh1, the column OT."""
    etth1(lab, "ETTh1 OT", "OT")


def every_column(lab):
    """ETTh1, its seven columns."""
    etth1(lab, "ETTh1, 7 columns", "all")


def etth1(lab, what, columns):
    if not lab.args.data:
        print(f"{what}: skipped; --data ETTh1.csv", flush=True)
        return
    data = lab.root / "etth1"
    data.mkdir(exist_ok=True)
    frame = pd.read_csv(lab.args.data).head(ROWS_OF_ETTH1)
    frame.to_csv(data / "ETTh1.csv", index=False)
    rows = []
    for seed in range(lab.args.seeds):
        flags = ["--data_dir", data, "--columns", columns, "--seed", seed]
        flags += ["--split_by", "time", "--split_ratio", "6:2:2"]
        folder = lab.train(f"{columns}_{seed}", *flags)
        rows.append(json.loads((folder / "evaluation.json").read_text())["rows"]["student"])
        note(f"{what}, seed {seed}", rows[-1])
    tell_coverage(what, rows)


def few(lab):
    """Few series of the demo family: WQL with labels over that of the twin on truth alone.

    Each student takes as many steps as with one series.
    """
    for count in FEW:
        data = lab.root / f"few_{count}"
        md.write_demo_csvs(data, files=count, rows=2000)
        ratios = []
        for seed in range(lab.args.seeds):
            row = {}
            for alpha in (0.5, 0):
                name = f"few_{count}_{seed}_{alpha}"
                flags = ["--data_dir", data, "--split_by", "time", "--seed", seed]
                flags += ["--num_epochs", max(1, lab.args.epochs // count)]
                folder = lab.train(name, *flags, "--alpha", alpha)
                rows = json.loads((folder / "evaluation.json").read_text())["rows"]
                row[alpha] = rows["student"]["wql"]
                note(f"{count} series, seed {seed}, alpha {alpha}", rows["student"])
            ratios.append(row[0.5] / row[0])
        tell(f"{count} series: WQL with labels / alpha 0", ratios, "< 1 in 3 of 4")


MEASURES = {
    "bits": bits,
    "forecast": forecast,
    "demo": demo,
    "ot": ot,
    "all": every_column,
    "few": few,
}


def main():
    args = build_parser().parse_args()
    print("| figure | measured | seeds | wanted |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as root:
        for name in args.rows:
            MEASURES[name](Lab(root, args))


if __name__ == "__main__":
    main()
