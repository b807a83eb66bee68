"""Where distillation pays: test error of students trained on few short series, by alpha.

    python benchmarks/few_series.py                      # the table, and docs/few_series.png
    python benchmarks/few_series.py --noise 1.0          # noisier training targets

Series of the demo family, 1,000 hourly rows each: the first 1, 2, 4, 8, 16 train, the next four
validate, the last four test, always the same. Every student gets about --steps steps, or --epochs
passes over its windows where that is more (8 series: 470 at the defaults, 16: 930), and is taken at
its best validation; the test error is its MSE over all test windows, in deviations of each series,
and stands beside the teacher's.
"""

import argparse
import copy
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import (
    DEMO_TEACHER,
    HORIZON,
    ROOT,
    STUDENT,
    data_config,
    fit,
    make_job,
    md,
    read_config,
    teacher_request,
    train_flags,
    whole_windows,
)
from matplotlib.figure import Figure

COUNTS = (1, 2, 4, 8, 16)  # of series that train
ALPHAS = (0.0, 0.5, 1.0)
ROWS = 1000  # of a series
BATCH = 32


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="students per row")
    steps_help = "optimiser steps of a student, at least one pass an epoch"
    add("--steps", type=int, default=400, help=steps_help)
    add("--epochs", type=int, default=10, help="validations among these steps")
    noise_help = "white noise added to the training series, in deviations"
    add("--noise", type=float, default=0.0, help=noise_help)
    add("--learning_rate", type=float, default=1e-3, help="of every student")
    add("--device", default="auto", help="as moirai_distill.py")
    picture = str(ROOT / "docs" / "few_series.png")
    add("--picture", default=picture, help="where the picture goes")
    return parser


def read_windows(folder, numbers, noise=0.0, stride=1):
    """Windows of some series of the demo family, every `stride`-th."""
    series = []
    for number in numbers:
        name = f"series_{number:02d}.csv"
        (one,) = md.read_series(folder / name, name, read_config()).series
        white = np.random.default_rng(number).standard_normal(len(one.values))
        one.values += noise * np.nanstd(one.values) * white
        series.append(one)
    return whole_windows(series, data_config(stride=stride))


def repeated(windows, labels, times):
    """The same windows several times, so that few of them fill an epoch; their labels, likewise."""
    index = np.tile(np.arange(len(windows)), times)
    more = dataclasses.replace(windows, starts=windows.starts[index], series=windows.series[index])
    if labels is None:
        return more, None
    more_labels = copy.copy(labels)
    more_labels.array = labels.array[index]
    return more, more_labels


def train_student(parts, labels, flags, steps, job):
    """Test MSE of one student at its best validation epoch."""
    steps_of_one_pass = len(parts["train"]) / BATCH
    times = max(1, round(steps / flags.num_epochs / steps_of_one_pass))
    windows, own_labels = repeated(parts["train"], labels, times)
    torch.manual_seed(flags.seed)
    student = md.PatchStudent(**STUDENT)
    fit(student, STUDENT, windows, parts["validation"], own_labels, flags, job)
    best = md.PatchStudent.from_pretrained(flags.save_dir).to(job.device)
    return test_mse(md.forecaster(best, HORIZON, job), parts["test"], job)


def test_mse(forecast, windows, job):
    """MSE of a forecaster over windows."""
    return md.score(forecast, windows, md.EVAL_BATCH, job).mse


@dataclasses.dataclass
class Table:
    """What is measured."""

    students: dict  # (number of series, alpha) -> test MSE of each seed
    teacher: float  # test MSE
    naive: float  # test MSE of seasonal-naive


def measure(args, folder, job):
    """Table of the arguments; prints each row as it comes."""
    md.write_demo_csvs(folder / "data", files=24, rows=ROWS)
    parts = {
        "validation": read_windows(folder / "data", range(16, 20), stride=5),
        "test": read_windows(folder / "data", range(20, 24)),
    }
    request = teacher_request(DEMO_TEACHER, label_cache=str(folder / "labels"))
    students = {}
    for count in COUNTS:
        train = parts["train"] = read_windows(folder / "data", range(count), args.noise)
        labels = md.labels_of(train, train, request, job)
        for alpha in ALPHAS:
            errors = []
            for seed in range(args.seeds):
                flags = student_flags(args, alpha, seed, folder / "run")
                own_labels = labels if alpha > 0 else None
                errors.append(train_student(parts, own_labels, flags, args.steps, job))
            students[count, alpha] = errors
            print(f"{count:2d} series, alpha {alpha:g}: {spread(errors, 4)}", flush=True)

    sizes = labels.manifest["patch_sizes"]  # as the most series chose them
    request = dataclasses.replace(request, teacher_patch_size=sizes)
    test = parts["test"]
    teacher = md.label_forecaster(md.labels_of(test, test, request, job))
    naive = md.naive_forecaster(md.seasonal_naive, test)
    return Table(students, test_mse(teacher, test, job), test_mse(naive, test, job))


def student_flags(args, alpha, seed, folder):
    """Flags of the training of one student."""
    return train_flags(
        alpha=alpha,
        batch_size=BATCH,
        num_epochs=args.epochs,
        learning_rate=args.learning_rate,
        weight_decay=1e-5,
        max_grad_norm=1.0,
        augment="on",
        patience=0,
        seed=seed,
        save_dir=str(folder),
    )


def spread(errors, digits):
    """Mean and deviation over the seeds."""
    return f"{np.mean(errors):.{digits}f} ± {np.std(errors):.{digits}f}"


def print_table(table):
    """The table as the README has it."""
    head = ["training series", *(f"alpha {alpha:g}" for alpha in ALPHAS)]
    print(f"| {' | '.join(head)} |")
    print("|---" * len(head) + "|")
    for count in COUNTS:
        cells = [str(count)]
        for alpha in ALPHAS:
            cells.append(spread(table.students[count, alpha], 3))
        print(f"| {' | '.join(cells)} |")
    print(f"\nteacher {table.teacher:.3f}, seasonal-naive {table.naive:.3f}")


def draw(path, table):
    """Picture of the table: error over the number of series, with the spread of the seeds."""
    figure = Figure(figsize=(9, 3.7), layout="constrained")
    axis = figure.subplots()
    for alpha in ALPHAS:
        rows = np.array([table.students[count, alpha] for count in COUNTS])
        axis.errorbar(
            COUNTS,
            rows.mean(1),
            rows.std(1),
            marker="o",
            capsize=3,
            label=f"student, alpha {alpha:g}",
        )
    axis.axhline(table.teacher, color="0.3", linestyle="--", label="teacher")
    axis.axhline(table.naive, color="0.7", linestyle=":", label="seasonal-naive")
    axis.set(xlabel="training series", ylabel="test MSE")
    axis.set(xscale="log", xticks=COUNTS, xticklabels=COUNTS)
    axis.legend()
    with md.atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)


def main():
    args = build_parser().parse_args()
    job = make_job(args.device)
    job.voice.is_on = False
    with tempfile.TemporaryDirectory() as folder:
        table = measure(args, Path(folder), job)
    print(f"\nTest MSE, {args.seeds} seeds, {args.steps} steps, noise {args.noise:g}\n")
    print_table(table)
    draw(args.picture, table)


if __name__ == "__main__":
    main()
