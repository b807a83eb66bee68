"""Score a MOIRAI teacher zero-shot on a real CSV: every test window, every column, each patch size.

    python benchmarks/zero_shot.py --data ETTh1.csv
    python benchmarks/zero_shot.py --data ETTh1.csv --teacher Salesforce/moirai-1.1-R-small --patch_sizes 16 32

Rows are split as the field does for ETTh (train 0-8,640, validation to 11,520, test to 14,400), values are z-scored
with the train rows, a test window's target lies in the test rows and its context may reach back. Shapes: B windows,
L context, H horizon, N tokens, P points of a patch.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import moirai_distill as md

# ------------------------------------------------------------------------- the teacher, asked as the script asks it


def forecast(teacher, context: Tensor, horizon: int, patch: int, samples: int = 100) -> dict[str, Tensor]:
    """(B, L) -> {"mean", "median"} of the predictive mixture, (B, H), through the code that makes the labels."""
    guess = {"mean": teacher.forecast(context, horizon, patch, "mean", 1)}
    if samples:
        guess["median"] = teacher.forecast(context, horizon, patch, "median", samples)
    return guess


# ------------------------------------------------------------------------------------------------ the data and table


def read_windows(path: str, borders: tuple[int, int, int], length: int) -> tuple[list[str], Tensor]:
    """Column names, and the z-scored rows that test windows touch, (C, rows): `length` context rows, then the test."""
    frame = pd.read_csv(path).select_dtypes("number")
    values = frame.to_numpy(np.float64)[: borders[2]]
    if len(values) < borders[2]:
        raise SystemExit(f"{path}: {len(values)} rows, but --borders ends at {borders[2]}")
    train = values[: borders[0]]
    z = (values - train.mean(0)) / train.std(0)
    return list(frame.columns), torch.from_numpy(z[borders[1] - length :].T.astype(np.float32))


def score(ask, rows: Tensor, length: int, horizon: int, stride: int = 1, batch: int = 256, progress=None) -> dict:
    """{forecast name: (C, 2) MSE and MAE} over all windows of all columns; `ask` maps (B, L) to {name: (B, H)}."""
    sums = {}
    windows = rows.unfold(1, length + horizon, 1)[:, ::stride]  # (C, W, L + H), a view
    for column, series in enumerate(windows):
        for part in series.split(batch):
            context, target = part[:, :length], part[:, length:]
            for name, guess in ask(context).items():
                error = (guess.to(target.device) - target).double()
                total = sums.setdefault(name, torch.zeros(len(windows), 2, dtype=torch.float64, device=target.device))
                total[column] += torch.stack([error.pow(2).sum(), error.abs().sum()])
            if progress is not None:
                progress.update(len(part))
    return {name: (total / (windows.shape[1] * horizon)).cpu() for name, total in sums.items()}


def print_table(results: dict, columns: list[str]) -> None:
    print(f"{'MSE / MAE':<22}" + "".join(f"{name:>15}" for name in ["all columns", *columns]))
    for name, errors in results.items():
        cells = [errors.mean(0), *errors]
        print(f"{name:<22}" + "".join(f"{mse:>7.3f} / {mae:.3f}" for mse, mae in cells))


def naive(context: Tensor, horizon: int, season: int) -> dict[str, Tensor]:
    repeat = context[:, -season:].repeat(1, -(-horizon // season))[:, :horizon]
    return {f"seasonal-naive {season}": repeat, "last value": context[:, -1:].expand(-1, horizon)}


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--data", default="ETTh1.csv", help="a CSV; all its numeric columns are scored")
    p.add_argument("--teacher", default="checkpoints/demo_teacher", help="folder or hub id of a MOIRAI 1.x")
    p.add_argument("--patch_sizes", type=int, nargs="+", help="default: all that the teacher has")
    p.add_argument("--context_length", type=int, default=720, help="steps that the teacher sees")
    p.add_argument("--prediction_length", type=int, default=96, help="steps that it forecasts")
    p.add_argument("--borders", type=int, nargs=3, default=[8640, 11520, 14400], help="end of train, validation, test")
    p.add_argument("--season", type=int, default=24, help="period of the seasonal-naive forecast")
    p.add_argument("--stride", type=int, default=1, help="score every so many windows; 1 is the field's rule")
    p.add_argument("--num_samples", type=int, default=100, help="draws behind the median; 0 leaves the median out")
    p.add_argument("--batch_size", type=int, default=256, help="windows per call")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the teacher runs")
    p.add_argument("--seed", type=int, default=0, help="of the draws")
    return p


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not Path(args.data).is_file():
        print(f"skipped: {args.data} is not there; pass a CSV with --data (ETTh1.csv of the ETDataset repository)")
        return 0
    length, horizon = args.context_length, args.prediction_length
    columns, rows = read_windows(args.data, tuple(args.borders), length)
    teacher = md.load_teacher(args.teacher, None, args.device, "32", md.Say("en").note)
    torch.manual_seed(args.seed)
    windows = len(range(0, rows.shape[1] - length - horizon + 1, args.stride))
    shape = f"{length} -> {horizon}, {windows:,} windows of {len(columns)} columns"
    print(f"{args.teacher} on {Path(args.data).name}, {shape}")
    sizes = args.patch_sizes or teacher.patch_sizes(length, horizon)
    results = {}
    with tqdm(total=windows * len(columns) * len(sizes), unit="window", file=sys.stderr) as bar:
        for patch in sizes:

            def ask(context: Tensor, patch: int = patch) -> dict[str, Tensor]:
                guess = forecast(teacher, context, horizon, patch, args.num_samples)
                return {f"patch {patch}, {point}": value for point, value in guess.items()}

            results |= score(ask, rows, length, horizon, args.stride, args.batch_size, bar)
    results |= score(lambda context: naive(context, horizon, args.season), rows, length, horizon, args.stride)
    print_table(results, columns)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
