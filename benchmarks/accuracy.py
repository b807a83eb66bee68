"""How accurate is the student? ETTh1 on the field's standard rows, by the script's own ruler.

    python benchmarks/accuracy.py --data ETTh1.csv --columns OT   # one series, truth alone
    python benchmarks/accuracy.py --data ETTh1.csv --columns all  # its 7 columns in one student
    python benchmarks/accuracy.py --data ETTh1.csv --columns all --alphas 0 0.5 1  # and a teacher

Train rows 0 to 8,640, validation to 11,520, test to 14,400; z-scored with the train rows; 720
points in, 96 out; every validation and test window counts. The epoch is chosen on validation alone;
the test rows are scored once, at the end. NLinear (one linear map of the context less its last
value) is fitted on the same windows by the same loop, with its own learning rate, as the control.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import (
    DEMO_TEACHER,
    HORIZON,
    LENGTH,
    data_config,
    fit,
    make_job,
    md,
    read_config,
    teacher_request,
    train_flags,
)
from torch import nn
from tqdm import tqdm

ROWS = (8640, 2880, 2880)  # of train, validation and test; the rest is unused
RATES = ("learning_rate", "dropout", "weight_decay")  # flags that are taken from the script
COUNTS = ("batch_size", "num_epochs")  # likewise


class NLinear(md.GoesOn, nn.Module):
    """The control: (B, L) -> (B, H), linear in the context's differences from its last value."""

    def __init__(self, context_length, horizon):
        super().__init__()
        self.context_length = context_length
        self.map = nn.Linear(context_length, horizon)

    def forward(self, context):
        return self.map(context - context[:, -1:]) + context[:, -1:]

    def points_ahead(self, context, _horizon):
        """The forecast, as the script's loop asks a student for it."""
        return self(context)


def build_parser():
    defaults = vars(train_flags())
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", default="ETTh1.csv", help="the CSV; at least 14,400 rows")
    add("--columns", nargs="+", default=["all"], help="`all`, or names: one student for all")
    as_script = "as moirai_distill.py"
    add("--max_windows", type=int, default=defaults["max_windows"], help=as_script)
    add("--seeds", type=int, default=3, help="students per row")
    alphas_help = "a row each; above 0 with the teacher"
    add("--alphas", type=float, nargs="+", default=[0.0], help=alphas_help)
    add("--teacher", default=str(DEMO_TEACHER), help="folder or hub id")
    add("--label_cache", default=defaults["label_cache"], help=as_script)
    for name in RATES:
        add(f"--{name}", type=float, default=defaults[name], help=as_script)
    for name in COUNTS:
        add(f"--{name}", type=int, default=defaults[name], help=as_script)
    add("--device", default="auto", help=as_script)
    add("--control_rate", type=float, default=1e-3, help="learning rate of NLinear")
    return parser


def read_parts(path, columns, max_windows):
    """part -> Windows of the columns of a CSV, by the standard rows."""
    path = Path(path)
    rows = sum(ROWS)
    try:
        series = md.read_series(path, path.name, read_config(*columns)).series
    except md.Unusable as reason:
        raise SystemExit(f"{path}: {reason}") from reason
    short = [one.name for one in series if len(one.values) < rows]
    if short:
        raise SystemExit(f"{', '.join(short)}: fewer than {rows} rows")
    for one in series:
        one.values = one.values[:rows]
    report = md.Report(facts=[], warnings=[], skipped=[])
    files = md.FolderRead(found=1, series={path.name: series}, reports={path.name: report})
    config = data_config(split_by="time", split_ratio=ROWS, max_windows=max_windows)
    return md.split_data(files, config).windows


@dataclass
class Result:
    """How well one model came out."""

    validation: float  # lowest validation MSE
    validation_mae: float  # at that epoch
    best_epoch: int
    test: object  # Scores at that epoch


def train_one(is_control, parts, labels, flags, job):
    """Result of one student, or of NLinear."""
    sizes = {
        "context_length": LENGTH,
        "prediction_length": HORIZON,
        "d_model": flags.d_model,
        "num_layers": flags.num_layers,
        "num_heads": flags.num_heads,
        "patch_size": flags.patch_size,
        "dropout": flags.dropout,
        "season": 24,
    }
    torch.manual_seed(flags.seed)
    model = NLinear(LENGTH, HORIZON) if is_control else md.PatchStudent(**sizes)
    with tempfile.TemporaryDirectory() as folder:
        flags.save_dir = folder
        progress = fit(model, sizes, parts["train"], parts["validation"], labels, flags, job)
        best = md.read_checkpoint(Path(folder, progress.best_file))
    model.load_state_dict(best["model_state_dict"])
    test = md.score(md.forecaster(model, HORIZON, job), parts["test"], md.EVAL_BATCH, job)
    mae = progress.history[progress.best_epoch - 1]["validation_mae"]
    return Result(progress.best_loss, mae, progress.best_epoch, test)


def spread(values):
    """Mean and deviation over the seeds."""
    return f"{np.mean(values):.4f} ± {np.std(values):.4f}"


def print_row(name, results, columns, seconds):
    """One line of the table: over the seeds, the errors of all columns and of OT."""
    of_column, mae_of_column = "-", "-"
    if len(columns) > 1:
        shown = [number for number, column in enumerate(columns) if column.endswith("OT")]
        number = shown[0] if shown else 0
        of_column = spread([result.test.mse_by_series[number] for result in results])
        mae_of_column = spread([result.test.mae_by_series[number] for result in results])
    cells = [
        name,
        spread([result.validation for result in results]),
        spread([result.validation_mae for result in results]),
        spread([result.test.mse for result in results]),
        spread([result.test.mae for result in results]),
        of_column,
        mae_of_column,
        ", ".join(str(result.best_epoch) for result in results),
        f"{seconds / 60:.1f}",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def main():
    args = build_parser().parse_args()
    if not Path(args.data).is_file():
        print(
            f"{args.data}: no such file; give ETTh1.csv (of the ETDataset) with --data."
            " Nothing was measured."
        )
        return
    job = make_job(args.device)
    parts = read_parts(args.data, args.columns, args.max_windows)
    labels = None
    if any(args.alphas):
        request = teacher_request(args.teacher, label_cache=args.label_cache)
        labels = md.labels_of(parts["train"], parts["train"], request, job)

    columns = parts["test"].names
    counts = ", ".join(f"{len(windows):,} {part}" for part, windows in parts.items())
    print(f"{len(columns)} columns; windows: {counts}; seeds: {args.seeds}\n")
    head = ["model", "validation MSE", "validation MAE", "test MSE", "test MAE"]
    head += ["test MSE of OT", "test MAE of OT", "best epochs", "minutes"]
    print(f"| {' | '.join(head)} |")
    print("|---" * len(head) + "|", flush=True)

    asked = {name: getattr(args, name) for name in RATES + COUNTS}
    control = {"alpha": 0.0, "learning_rate": args.control_rate, "weight_decay": 0.0}
    rows = {"NLinear": asked | control}
    for alpha in args.alphas:
        rows[f"student, alpha {alpha:g}"] = asked | {"alpha": alpha}
    job.voice.is_on = False
    bar = tqdm(total=len(rows) * args.seeds, desc="students")
    for name, changes in rows.items():
        began = time.perf_counter()
        own_labels = labels if changes["alpha"] > 0 else None
        results = []
        for seed in range(args.seeds):
            flags = train_flags(**changes, seed=seed)
            results.append(train_one(name == "NLinear", parts, own_labels, flags, job))
            bar.update()
        print_row(name, results, columns, time.perf_counter() - began)


if __name__ == "__main__":
    main()
