"""Score a MOIRAI teacher zero-shot on a real CSV: every test window, every column, each patch size.

    python benchmarks/zero_shot.py --data ETTh1.csv
    python benchmarks/zero_shot.py --data ETTh1.csv --teacher Salesforce/moirai-1.1-R-small

Rows are split as the field does for ETTh (train 0-8,640, validation to 11,520, test to 14,400),
values are z-scored with the train rows, a test window's target lies in the test rows and its
context may reach back. Shapes: B windows, L context, H horizon, C columns.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import HORIZON, LENGTH, md, teacher_request
from torch import Tensor
from tqdm import tqdm

# -- The teacher, asked as the script asks it ------------------------------------------------------


def forecast(
    context: Tensor, teacher, horizon: int, patch: int, samples: int = 100
) -> dict[str, Tensor]:
    """(B, L) -> {"mean", "median"} of the predictive mixture, (B, H), by the code of the labels."""
    forecasts = {"mean": teacher.forecast(context, horizon, patch, "mean", 1)}
    if samples:
        forecasts["median"] = teacher.forecast(context, horizon, patch, "median", samples)
    return forecasts


# -- The data and the table ------------------------------------------------------------------------


def read_windows(path: str, borders: tuple[int, int, int], length: int) -> tuple[list[str], Tensor]:
    """Column names, and the z-scored rows that test windows touch, (C, rows).

    These are `length` rows of context, then the test rows.
    """
    train_end, validation_end, test_end = borders
    frame = pd.read_csv(path).select_dtypes("number")
    values = frame.to_numpy(np.float64)[:test_end]
    if len(values) < test_end:
        raise SystemExit(f"{path}: {len(values)} rows, but --borders ends at {test_end}")
    train = values[:train_end]
    scaled = (values - train.mean(0)) / train.std(0)
    rows = scaled[validation_end - length :].T.astype(np.float32)
    return list(frame.columns), torch.from_numpy(rows)


def score(
    ask, rows: Tensor, length: int, horizon: int, stride: int = 1, batch: int = 256, progress=None
) -> dict:
    """{forecast name: (C, 2) MSE and MAE} over all windows of all columns.

    `ask` maps contexts (B, L) to {name: forecast (B, H)}.
    """
    sums = {}
    windows = rows.unfold(1, length + horizon, 1)[:, ::stride]  # (C, W, L + H), a view
    for column, series in enumerate(windows):
        for part in series.split(batch):
            context = part[:, :length]
            target = part[:, length:]
            for name, values in ask(context).items():
                error = (values.to(target.device) - target).double()
                if name not in sums:
                    sums[name] = error.new_zeros(len(windows), 2)
                sums[name][column] += torch.stack([error.pow(2).sum(), error.abs().sum()])
            if progress is not None:
                progress.update(len(part))
    points = windows.shape[1] * horizon  # of a column
    return {name: (total / points).cpu() for name, total in sums.items()}


def print_table(results: dict, columns: list[str]) -> None:
    """A line for each forecast: MSE / MAE of all columns, and of each."""
    head = "".join(f"{name:>15}" for name in ["all columns", *columns])
    print(f"{'MSE / MAE':<22}{head}")
    for name, errors in results.items():
        cells = "".join(f"{mse:>7.3f} / {mae:.3f}" for mse, mae in [errors.mean(0), *errors])
        print(f"{name:<22}{cells}")


def naive(context: Tensor, horizon: int, season: int) -> dict[str, Tensor]:
    """(B, L) -> the last season again, and the last value, (B, H)."""
    periods = -(-horizon // season)
    return {
        f"seasonal-naive {season}": context[:, -season:].repeat(1, periods)[:, :horizon],
        "last value": context[:, -1:].expand(-1, horizon),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", default="ETTh1.csv", help="a CSV; all its numeric columns are scored")
    demo_teacher = "checkpoints/demo_teacher"
    add("--teacher", default=demo_teacher, help="folder or hub id of a MOIRAI 1.x")
    add("--patch_sizes", type=int, nargs="+", help="default: all that the teacher has")
    add("--context_length", type=int, default=LENGTH, help="steps that the teacher sees")
    add("--prediction_length", type=int, default=HORIZON, help="steps that it forecasts")
    borders = [8640, 11520, 14400]
    add("--borders", type=int, nargs=3, default=borders, help="end of train, validation, test")
    add("--season", type=int, default=24, help="period of the seasonal-naive forecast")
    add("--stride", type=int, default=1, help="score every so many windows; 1 is the field's rule")
    samples_help = "draws behind the median; 0 leaves the median out"
    add("--num_samples", type=int, default=100, help=samples_help)
    add("--batch_size", type=int, default=256, help="windows per call")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="where the teacher runs")
    add("--seed", type=int, default=0, help="of the draws")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not Path(args.data).is_file():
        print(
            f"skipped: {args.data} is not there; pass a CSV with --data"
            " (ETTh1.csv of the ETDataset repository)"
        )
        return 0
    length = args.context_length
    horizon = args.prediction_length
    columns, rows = read_windows(args.data, tuple(args.borders), length)
    request = teacher_request(args.teacher)
    teacher = md.load_teacher(request, torch.device(args.device), md.Voice("en").note)
    torch.manual_seed(args.seed)
    windows = len(range(0, rows.shape[1] - length - horizon + 1, args.stride))
    shape = f"{length} -> {horizon}, {windows:,} windows of {len(columns)} columns"
    print(f"{args.teacher} on {Path(args.data).name}, {shape}")

    sizes = args.patch_sizes or teacher.patch_sizes(length, horizon)
    results = {}
    total = windows * len(columns) * len(sizes)
    with tqdm(total=total, unit="window", file=sys.stderr) as bar:
        for patch in sizes:
            ask = partial(
                forecast, teacher=teacher, horizon=horizon, patch=patch, samples=args.num_samples
            )
            scores = score(ask, rows, length, horizon, args.stride, args.batch_size, bar)
            for point, errors in scores.items():
                results[f"patch {patch}, {point}"] = errors
    ask = partial(naive, horizon=horizon, season=args.season)
    results |= score(ask, rows, length, horizon, args.stride)
    print_table(results, columns)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
