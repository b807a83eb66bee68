"""Score a MOIRAI teacher zero-shot on real series of all calendars that Python packages ship.

    pip install statsmodels pmdarima sktime vega_datasets
    python benchmarks/real_series.py
    python benchmarks/real_series.py --teacher Salesforce/moirai-1.1-R-small

Nothing is downloaded; a series whose package is not installed is left out, and said. Of each series
the windows (at most --max_windows, evenly) are split in time: on the first half the patch size is
chosen by MSE, as `--teacher_patch_size auto` does, and figures are of the second half. An error is
the MASE of the tool: of the median of samples, in the error that seasonal-naive makes inside the
context. Shapes: W windows, L context, H horizon.
"""

import argparse
import dataclasses
import importlib
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import md, teacher_request
from tqdm import tqdm

# -- The series ------------------------------------------------------------------------------------

# Season, context L and horizon H of each calendar.
LENGTHS = {
    "years": (1, 40, 6),
    "quarters": (4, 40, 8),
    "months": (12, 72, 12),
    "months, short": (12, 24, 6),
    "weeks": (52, 156, 26),
    "working days": (5, 250, 20),
    "days": (7, 364, 28),
    "half hours": (48, 336, 96),
    "hours": (24, 336, 48),
}


@dataclasses.dataclass
class Source:
    """A series, and where it is: `load(module)` gives its values, the package imported."""

    name: str
    calendar: str
    package: str
    load: Callable


def of_statsmodels(column: str) -> Callable:
    return lambda module: module.load_pandas().data[column]


def of_table(path: str, column: str) -> Callable:
    """From a CSV in the folder of the package, as its loader may want the network for others."""
    return lambda module: pd.read_csv(Path(module.__file__).parent / path)[column]


def weekly_co2(module) -> pd.Series:
    return module.load_pandas().data["co2"].interpolate()


def monthly_co2(module) -> pd.Series:
    return weekly_co2(module).resample("MS").mean().interpolate()


def el_nino(module) -> np.ndarray:
    return module.load_pandas().data.iloc[:, 1:].to_numpy().ravel()


def microsoft(module) -> pd.Series:
    return module.load_msft()["Close"].tail(1500)


def taylor(module) -> pd.Series:
    return module.load_taylor()


DATA = "statsmodels.datasets."
PMDARIMA = "pmdarima.datasets"
SKTIME = "sktime.datasets"
VEGA = "vega_datasets"
SOURCES = (
    Source("sunspots", "years", DATA + "sunspots", of_statsmodels("SUNACTIVITY")),
    Source("Nile", "years", DATA + "nile", of_statsmodels("volume")),
    Source("lynx", "years", PMDARIMA, lambda module: module.load_lynx()),
    Source("real GDP, US", "quarters", DATA + "macrodata", of_statsmodels("realgdp")),
    Source("investment, US", "quarters", DATA + "macrodata", of_statsmodels("realinv")),
    Source("consumer prices, US", "quarters", DATA + "macrodata", of_statsmodels("cpi")),
    Source("unemployment, US", "quarters", DATA + "macrodata", of_statsmodels("unemp")),
    Source("treasury bills, US", "quarters", DATA + "macrodata", of_statsmodels("tbilrate")),
    Source("inflation, DE", "quarters", DATA + "interest_inflation", of_statsmodels("Dp")),
    Source("beer, AU", "quarters", PMDARIMA, lambda module: module.load_ausbeer()),
    Source("residents, AU", "quarters", PMDARIMA, lambda module: module.load_austres()),
    Source("woollen yarn, AU", "quarters", PMDARIMA, lambda module: module.load_woolyrnq()),
    Source("airline passengers", "months", PMDARIMA, lambda module: module.load_airpassengers()),
    Source("wine sales, AU", "months", PMDARIMA, lambda module: module.load_wineind()),
    Source("sunspots, monthly", "months", PMDARIMA, lambda module: module.load_sunspots()),
    Source("El Niño, sea surface", "months", DATA + "elnino", el_nino),
    Source("CO2, monthly", "months", DATA + "co2", monthly_co2),
    Source(
        "electrical equipment",
        "months",
        DATA + "elec_equip",
        lambda module: module.load().data.iloc[:, -1],
    ),
    Source("scripts sold (PBS), AU", "months", SKTIME, lambda module: module.load_PBS_dataset()),
    Source(
        "road casualties, UK", "months", SKTIME, of_table("data/seatbelts/seatbelts.csv", "KSI")
    ),
    Source("employment, US", "months", VEGA, lambda module: module.data.us_employment()["nonfarm"]),
    Source(
        "builders, US", "months", VEGA, lambda module: module.data.us_employment()["construction"]
    ),
    Source("shampoo sales", "months, short", SKTIME, lambda module: module.load_shampoo_sales()),
    Source("CO2, weekly", "weeks", DATA + "co2", weekly_co2),
    Source("Microsoft, close", "working days", PMDARIMA, microsoft),
    Source(
        "Seattle, warmest", "days", VEGA, lambda module: module.data.seattle_weather()["temp_max"]
    ),
    Source("Seattle, wind", "days", VEGA, lambda module: module.data.seattle_weather()["wind"]),
    Source("electricity (Taylor), UK", "half hours", PMDARIMA, taylor),
    Source("Seattle, hourly", "hours", VEGA, lambda module: module.data.seattle_temps()["temp"]),
    Source("San Francisco, hourly", "hours", VEGA, lambda module: module.data.sf_temps()["temp"]),
)


def read(source: Source) -> np.ndarray | None:
    """Values (T,) of a series, or None where its package is not installed."""
    try:
        module = importlib.import_module(source.package)
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] != source.package.split(".")[0]:
            raise
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages, about their own loaders
        values = source.load(module)
    values = np.asarray(values, np.float64)
    return values[~np.isnan(values)]


# -- The ruler -------------------------------------------------------------------------------------


def windows_of(values: np.ndarray, length: int, most: int) -> torch.Tensor:
    """(W, length) windows, at most `most` of each half, evenly in time."""
    windows = np.lib.stride_tricks.sliding_window_view(values, length)
    count = min(2 * most, len(windows))
    index = np.linspace(0, len(windows) - 1, count).astype(np.int64)
    return torch.from_numpy(windows[index].copy())


def score_series(values: np.ndarray, calendar: str, teacher, args: argparse.Namespace) -> dict:
    """MASE of the teacher and of seasonal-naive on the later windows of a series."""
    season, length, horizon = LENGTHS[calendar]
    windows = windows_of(values, length + horizon, args.max_windows)
    context = windows[:, :length]
    truth = windows[:, length:]
    half = len(windows) // 2
    torch.manual_seed(args.seed)
    chosen = {}
    for patch in args.patch_sizes or teacher.patch_sizes(length, horizon):
        guess = teacher.forecast(context[:half], horizon, patch, "median", args.num_samples)
        chosen[patch] = float((guess - truth[:half]).square().mean())
    patch = min(chosen, key=chosen.get)

    context = context[half:]
    truth = truth[half:]
    seasons = torch.full((len(context),), season)
    unit = md.seasonal_scale(context, seasons)
    guess = teacher.forecast(context, horizon, patch, "median", args.num_samples)
    naive = md.seasonal_naive(context, seasons, horizon)
    return {
        "windows": len(context),
        "patch": patch,
        "mase": float(((guess - truth).abs() / unit).mean()),
        "naive": float(((naive - truth).abs() / unit).mean()),
    }


def print_table(rows: list[dict]) -> None:
    print(f"{'series':<26}{'calendar':<15}windows  patch   MASE  naive's  ratio")
    for row in rows:
        figures = f"{row['windows']:7d}  {row['patch']:5d}  {row['mase']:5.2f}  {row['naive']:7.2f}"
        ratio = row["mase"] / row["naive"]
        print(f"{row['name']:<26}{row['calendar']:<15}{figures}  {ratio:5.2f}")
    ratios = [row["mase"] / row["naive"] for row in rows]
    mean = math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
    better = sum(ratio < 1 for ratio in ratios)
    print(
        f"better than seasonal-naive on {better} of {len(rows)} series ({better / len(rows):.0%})"
    )
    print(f"geometric mean of the ratios {mean:.3f}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    demo_teacher = "checkpoints/demo_teacher"
    add("--teacher", default=demo_teacher, help="folder or hub id of a MOIRAI 1.x")
    add("--patch_sizes", type=int, nargs="+", help="default: all that the teacher has")
    add("--max_windows", type=int, default=64, help="windows of each half of a series")
    add("--num_samples", type=int, default=100, help="draws behind the median")
    add("--seed", type=int, default=0, help="of the draws")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    teacher = md.load_teacher(
        teacher_request(args.teacher), torch.device("cpu"), md.Voice("en").note
    )
    rows = []
    for source in tqdm(SOURCES, unit="series", file=sys.stderr):
        values = read(source)
        if values is None:
            print(f"left out: {source.name}; pip install {source.package.split('.')[0]}")
            continue
        row = {"name": source.name, "calendar": source.calendar}
        rows.append(row | score_series(values, source.calendar, teacher, args))
    if rows:
        print_table(rows)
    else:
        print("skipped: none of the packages is installed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
