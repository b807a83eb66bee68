"""Where distillation pays: test error of students trained on few short series, for several alphas, beside the teacher.

    python benchmarks/few_series.py                      # the table, and docs/few_series.png
    python benchmarks/few_series.py --noise 1.0          # noisier training targets

Series of the demo family, 1,000 hourly rows each: the first 1, 2, 4, 8, 16 train, the next four validate, the last four
test, always the same. Every student gets about --steps steps, or --epochs passes over its windows where that is more (8
series: 470 at the defaults, 16: 930), and is taken at its best validation; the test error is its MSE over all test
windows, in deviations of each series.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import moirai_distill as md

ROOT = Path(__file__).resolve().parent.parent
COUNTS, ALPHAS, ROWS = (1, 2, 4, 8, 16), (0.0, 0.5, 1.0), 1000
LENGTH, HORIZON = 816, 96


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="students per row")
    parser.add_argument(
        "--steps", type=int, default=400, help="optimiser steps of a student, at least one pass an epoch"
    )
    parser.add_argument("--epochs", type=int, default=10, help="validations among these steps")
    parser.add_argument(
        "--noise", type=float, default=0.0, help="white noise added to the training series, in deviations"
    )
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of every student")
    parser.add_argument("--device", default="auto", help="as moirai_distill.py")
    parser.add_argument("--picture", default=str(ROOT / "docs" / "few_series.png"), help="where the picture goes")
    return parser


def windows_of(files, folder, noise, stride):
    """Windows of these files of the demo family, every `stride`-th."""
    chosen = []
    for name in files:
        (series,), _ = md.read_series(folder / name, name, ["first"])
        rng = np.random.default_rng(int(name[7:9]))
        series.values += noise * np.nanstd(series.values) * rng.standard_normal(len(series.values))
        item = md.prepare(series, {"whole": (0, len(series.values))}, LENGTH, HORIZON, 16)
        chosen.append((item, item.starts["whole"][::stride]))
    return md.pack(chosen, "auto", LENGTH, HORIZON)


def repeated(windows, labels, times):
    """The same windows several times, so that few of them fill an epoch; their labels, likewise."""
    index = np.tile(np.arange(len(windows)), times)
    copy = md.Windows(**(vars(windows) | {"starts": windows.starts[index], "series": windows.series[index]}))
    if labels:
        labels.array = labels.array[index]
    return copy


def train_student(fabric, parts, labels, alpha, seed, args, folder):
    """Test MSE of one student at its best validation epoch."""
    train, validation, test = parts
    batch = 32
    times = max(1, round(args.steps * batch / args.epochs / len(train)))
    run = {"seed": seed, "alpha": alpha, "batch_size": batch, "num_epochs": args.epochs, "save_dir": str(folder)}
    run |= {"learning_rate": args.learning_rate, "weight_decay": 1e-5, "max_grad_norm": 1.0, "patience": 0}
    run["augment"] = "on"
    sizes = {"d_model": 128, "num_layers": 4, "num_heads": 8, "patch_size": 16, "dropout": 0.1, "season": 24}
    config = {"context_length": LENGTH - HORIZON, "prediction_length": HORIZON} | sizes
    md.torch.manual_seed(seed)
    student = md.PatchStudent(**config)
    say = md.Say("en")
    say.on = False
    facts = {"format": md.FORMAT, "student_config": config, "run_config": run}
    data = repeated(train, labels, times)
    md.fit(fabric, student, data, validation, labels, run, None, facts, folder, md.Stop(), say)
    best = fabric.setup_module(md.PatchStudent.from_pretrained(folder))
    return md.score(md.forecaster(best, fabric), test, md.EVAL_BATCH, fabric, False)["mse"]


def draw(path, table, teacher, naive):
    """Picture of the table: error over the number of series, a line per alpha with the spread of the seeds."""
    figure = Figure(figsize=(9, 3.7), layout="constrained")
    axis = figure.subplots()
    for alpha in ALPHAS:
        rows = np.array([table[count, alpha] for count in COUNTS])
        axis.errorbar(COUNTS, rows.mean(1), rows.std(1), marker="o", capsize=3, label=f"student, alpha {alpha:g}")
    axis.axhline(teacher, color="0.3", linestyle="--", label="teacher")
    axis.axhline(naive, color="0.7", linestyle=":", label="seasonal-naive")
    axis.set(xscale="log", xlabel="training series", ylabel="test MSE", xticks=COUNTS, xticklabels=COUNTS)
    axis.legend()
    with md.atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)


def main():
    args = build_parser().parse_args()
    launch = argparse.Namespace(device=args.device, devices=1, num_nodes=1)
    say = md.Say("en")
    fabric = md.start_fabric(launch, "32-true", say)
    say.on = False
    device = fabric.device
    teacher_folder = str(ROOT / "checkpoints" / "demo_teacher")
    load = lambda: md.load_teacher(teacher_folder, None, device, "32", say.note)  # noqa: E731
    table = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, cache = Path(scratch, "data"), Path(scratch, "labels")
        md.write_demo_csvs(folder, files=24, rows=ROWS)
        names = [f"series_{number:02d}.csv" for number in range(24)]
        validation, test = windows_of(names[16:20], folder, 0.0, 5), windows_of(names[20:], folder, 0.0, 1)

        def labels_of(windows, patch):
            asked = md.Request(teacher_folder, None, patch, "median", 100)
            return md.get_labels(windows, asked, load, cache, 256, md.BASELINES, fabric, say, md.Stop())

        for count in COUNTS:
            train = windows_of(names[:count], folder, args.noise, 1)
            for alpha in ALPHAS:
                errors = []
                for seed in range(args.seeds):
                    labels = labels_of(train, "auto") if alpha else None
                    run = (fabric, (train, validation, test), labels, alpha, seed, args, Path(scratch, "run"))
                    errors.append(train_student(*run))
                table[count, alpha] = errors
                print(f"{count:2d} series, alpha {alpha:g}: {np.mean(errors):.4f} ± {np.std(errors):.4f}", flush=True)
        patches = labels_of(windows_of(names[:16], folder, args.noise, 1), "auto").manifest["patch_sizes"]
        of_test = labels_of(test, patches)
        teacher = md.score(lambda index, _: of_test.batch(index)[0], test, md.EVAL_BATCH, fabric, False)["mse"]
        seasonal = lambda index, context: md.seasonal_naive(context, test.season(index), HORIZON)  # noqa: E731
        naive = md.score(seasonal, test, md.EVAL_BATCH, fabric, False)["mse"]
    print(f"\nTest MSE, {args.seeds} seeds, {args.steps} steps, noise {args.noise:g}\n")
    print(
        "| training series | " + " | ".join(f"alpha {alpha:g}" for alpha in ALPHAS) + " |\n|---|" + "---|" * len(ALPHAS)
    )
    for count in COUNTS:
        cells = [f"{np.mean(table[count, alpha]):.3f} ± {np.std(table[count, alpha]):.3f}" for alpha in ALPHAS]
        print(f"| {count} | " + " | ".join(cells) + " |")
    print(f"\nteacher {teacher:.3f}, seasonal-naive {naive:.3f}")
    draw(args.picture, table, teacher, naive)


if __name__ == "__main__":
    main()
