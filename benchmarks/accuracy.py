"""How accurate is the student? ETTh1 on the field's standard rows, through the script's own windows, loop and ruler.

    python benchmarks/accuracy.py --data ETTh1.csv --columns OT                    # one series, truth alone
    python benchmarks/accuracy.py --data ETTh1.csv --columns all                   # its 7 columns in one student
    python benchmarks/accuracy.py --data ETTh1.csv --columns all --alphas 0 0.5 1  # and with a teacher

Train rows 0 to 8,640, validation to 11,520, test to 14,400; z-scored with the train rows; 720 points in, 96 out; every
validation and test window counts. The epoch is chosen on validation alone; the test rows are scored once, at the end.
NLinear (one linear map of the context less its last value) is fitted on the same windows by the same loop, with its own
learning rate, as the control.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import moirai_distill as md

ROOT = Path(__file__).resolve().parent.parent
ROWS = (8640, 2880, 2880)  # of train, validation and test; the rest is unused


class NLinear(nn.Module):
    """The control: (B, L) -> (B, H), linear in the context's differences from its last value."""

    def __init__(self, context_length, horizon):
        super().__init__()
        self.map = nn.Linear(context_length, horizon)

    def forward(self, context):
        return self.map(context - context[:, -1:]) + context[:, -1:]


def build_parser():
    defaults = vars(md.build_parser(demo=False).parse_args(["train"]))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", default="ETTh1.csv", help="the CSV; at least 14,400 rows")
    parser.add_argument("--columns", nargs="+", default=["all"], help="`all`, or names: one student for all of them")
    parser.add_argument("--max_windows", type=int, default=defaults["max_windows"], help="as moirai_distill.py")
    parser.add_argument("--seeds", type=int, default=3, help="students per row")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.0], help="a row each; above 0 with the teacher")
    parser.add_argument("--teacher", default=str(ROOT / "checkpoints" / "demo_teacher"), help="folder or hub id")
    parser.add_argument("--label_cache", default=defaults["label_cache"], help="as moirai_distill.py")
    for name in ("learning_rate", "dropout", "weight_decay"):
        parser.add_argument(f"--{name}", type=float, default=defaults[name], help="as moirai_distill.py")
    for name in ("batch_size", "num_epochs"):
        parser.add_argument(f"--{name}", type=int, default=defaults[name], help="as moirai_distill.py")
    parser.add_argument("--device", default="auto", help="as moirai_distill.py")
    parser.add_argument("--control_rate", type=float, default=1e-3, help="learning rate of NLinear")
    return parser


def read_parts(path, columns, max_windows, length=816, horizon=96):
    """part -> Windows of the columns of a CSV, by the standard rows."""
    path, rows = Path(path), sum(ROWS)
    try:
        series, _ = md.read_series(path, path.name, columns)
    except md.Unusable as reason:
        raise SystemExit(f"{path}: {reason}") from reason
    if short := [item.name for item in series if len(item.values) < rows]:
        raise SystemExit(f"{', '.join(short)}: fewer than {rows} rows")
    for item in series:
        item.values = item.values[:rows]
    limits = {"length": length, "horizon": horizon, "max_gap": 16}
    return md.split_data({path.name: series}, {path.name: []}, "time", ROWS, 0, 1, max_windows, "auto", limits)[0]


def train_one(kind, parts, labels, run, fabric, say):
    """(validation MSE, best epoch, result of `score` on the test windows) of one student or NLinear."""
    sizes = {name: run[name] for name in ("d_model", "num_layers", "num_heads", "patch_size", "dropout")}
    config = {"context_length": 720, "prediction_length": 96, "season": 24} | sizes
    torch.manual_seed(run["seed"])
    model = md.PatchStudent(**config) if kind == "student" else NLinear(720, 96)
    with tempfile.TemporaryDirectory() as scratch:
        run = run | {"save_dir": scratch}
        facts = {"format": md.FORMAT, "student_config": config, "run_config": run}
        parts_of_fit = (parts["train"], parts["validation"], labels)
        loop = md.fit(fabric, model, *parts_of_fit, run, None, facts, Path(scratch), md.Stop(), say)
        model.load_state_dict(md.read_checkpoint(Path(scratch, loop["best_file"]))["model_state_dict"])
    test = md.score(md.forecaster(model, fabric), parts["test"], md.EVAL_BATCH, fabric, True)
    return loop["best_loss"], loop["best_epoch"], test


def print_row(name, results, windows, seconds):
    """One line of the table: mean and deviation over the seeds, of all columns and of OT."""
    validation, epochs, tests = zip(*results, strict=True)
    spread = lambda values: f"{np.mean(values):.4f} ± {np.std(values):.4f}"  # noqa: E731
    own = next((i for i, label in enumerate(windows.names) if label.endswith("OT")), 0)
    cells = [spread(validation), spread([test["mse"] for test in tests]), spread([test["mae"] for test in tests])]
    cells.append(spread([test["mse_by_series"][own] for test in tests]) if len(windows.names) > 1 else "-")
    cells += [", ".join(map(str, epochs)), f"{seconds / 60:.1f}"]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main():
    args = build_parser().parse_args()
    if not Path(args.data).is_file():
        print(f"{args.data}: no such file; give ETTh1.csv (of the ETDataset) with --data. Nothing was measured.")
        return
    launch = argparse.Namespace(device=args.device, devices=1, num_nodes=1)
    say = md.Say("en")
    fabric = md.start_fabric(launch, "32-true", say)
    parts = read_parts(args.data, args.columns, args.max_windows)
    run = vars(md.build_parser(demo=False).parse_args(["train"])) | vars(args)
    labels = None
    if any(args.alphas):
        request = md.Request(args.teacher, None, "auto", "median", 100)
        load = lambda: md.load_teacher(args.teacher, None, fabric.device, "32", say.note)  # noqa: E731
        asked = (request, load, args.label_cache, 256, md.BASELINES, fabric, say, md.Stop())
        labels = md.get_labels(parts["train"], *asked)
    counts = ", ".join(f"{len(windows):,} {part}" for part, windows in parts.items())
    print(f"{len(parts['test'].names)} columns; windows: {counts}; seeds: {args.seeds}\n")
    print("| model | validation MSE | test MSE | test MAE | test MSE of OT | best epochs | minutes |")
    print("|---|---|---|---|---|---|---|", flush=True)
    rows = [("NLinear", {"alpha": 0.0, "learning_rate": args.control_rate, "weight_decay": 0.0})]
    rows += [(f"student, alpha {alpha:g}", {"alpha": alpha}) for alpha in args.alphas]
    say.on, bar = False, tqdm(total=len(rows) * args.seeds, desc="students")
    for name, changes in rows:
        begin, results, kind = time.perf_counter(), [], name.partition(",")[0]
        for seed in range(args.seeds):
            results.append(train_one(kind, parts, labels, run | changes | {"seed": seed}, fabric, say))
            bar.update()
        print_row(name, results, parts["test"], time.perf_counter() - begin)


if __name__ == "__main__":
    main()
