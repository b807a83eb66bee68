#!/usr/bin/env python3
"""Distil MOIRAI, a large frozen time-series forecaster, into a small fast patch Transformer for your own CSVs.

    python moirai_distill.py --demo                              # everything once, offline, minutes on a laptop
    python moirai_distill.py --data_dir FOLDER --alpha 0.5       # train; `train` itself may be left out
    python moirai_distill.py evaluate --checkpoint RUN [RUN …]   # one ruler for students, teacher, naive forecasts
    python moirai_distill.py predict --checkpoint RUN --input FILE.csv      # the next steps of your own series
    python moirai_distill.py export --checkpoint RUN --format onnx          # or hub: a model to ship
    python moirai_distill.py label --data_dir FOLDER             # only make the labels; --list shows what there is

The teacher is frozen and the windows are fixed, so its forecast is a function of the window: every training window is
labelled once, into a cache on disk, and no epoch, alpha, seed or student size after that costs teacher time.

Parts stand above, programs below; a name is used only below the section that defines it:
    1 command line  flags, defaults, checks          2 data              CSV -> regular series -> split -> windows
    3 files         atomic writes, safe reads        4 student           PatchStudent: (B, L) -> (B, H)
    5 teacher       a frozen MOIRAI, its labels      6 loss and metrics  the blend, one ruler for every forecaster
    7 training      the loop                         8 commands          the only functions that see `args`
    9 entry         main

Shapes: B batch, L context length, H horizon, N patches, P patch size, D width, T rows of a series, W windows.
"""

import argparse
import contextlib
import copy
import dataclasses
import difflib
import gzip
import hashlib
import importlib
import io
import itertools
import json
import locale
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path, PureWindowsPath

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, PyTorchModelHubMixin, errors, hf_hub_download, try_to_load_from_cache
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

# == 1  Command line: one line per knob, the only place where a default stands =========================================

COMMANDS = ("train", "evaluate", "predict", "export", "label")

# What --demo changes among the defaults below; a flag given beside --demo still wins.
DEMO = {"data_dir": "checkpoints/demo/data", "label_cache": "checkpoints/demo/labels", "max_windows": 100}
DEMO |= {"save_dir": "checkpoints/demo/run", "num_epochs": 8, "learning_rate": 1e-3}
DEMO |= {"teacher_model": str(Path(__file__).resolve().parent / "checkpoints" / "demo_teacher")}


class UserError(Exception):
    """A problem that the user can mend: what, where, what to do. Shown without a traceback, exit code 2."""


def require(good, problem, kind=UserError):
    """Raise `problem` as a UserError, or another kind, unless all is `good`."""
    if not good:
        raise kind(problem)


class Wrong(str):
    """What is wrong with an argument. A type returns it instead of raising, so that all problems are told at once."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a UserError where argparse would print its usage and exit."""

    def error(self, message):
        raise UserError(f"{message} (python moirai_distill.py --help lists the flags)")


def number(kind, low=-math.inf, high=math.inf, above=-math.inf, words=()):
    """Type of a number of `kind` in [low, high] and greater than `above`, or of one of `words`."""
    limits = [f"at least {low}"] * (low > -math.inf) + [f"greater than {above}"] * (above > -math.inf)
    what = " and ".join(limits + [f"at most {high}"] * (high < math.inf))
    what = f"{'a whole number' if kind is int else 'a number'} {what}".strip()

    def parse(text):
        with contextlib.suppress(ValueError):
            value = text if text in words else kind(text)
            if text in words or math.isfinite(value) and low <= value <= high and value > above:
                return value
        return Wrong(f"{text!r} is not {' or '.join([*words, what])}")

    return parse


def one_of(*names):
    """Type of one of `names`."""
    return lambda text: text if text in names else Wrong(f"{text!r} is not one of {', '.join(names)}")


def ratio(text):
    """Type of `train:validation:test`, three numbers greater than 0."""
    parts = tuple(map(number(float, above=0), text.split(":")))
    good = len(parts) == 3 and not any(isinstance(part, Wrong) for part in parts)
    return parts if good else Wrong(f"{text!r} is not three numbers greater than 0, such as 8:1:1")


def device_name(text):
    """Type of a device that is there: auto, cpu, mps, cuda or cuda:INDEX."""
    form, gpus = re.fullmatch(r"auto|cpu|mps|(cuda)(?::(\d+))?", text), torch.cuda.device_count()
    if not form:
        return Wrong(f"{text!r} is not auto, cpu, cuda, cuda:1 or mps")
    there = torch.backends.mps.is_available() if text == "mps" else not form[1] or int(form[2] or 0) < gpus
    return text if there else Wrong(f"{text!r} is not here (PyTorch finds {gpus} CUDA GPUs); use --device cpu")


def add_shared_flags(parser):
    """The flags that train, label and evaluate have in common: data, teacher, machine."""
    add, auto = parser.add_argument_group("data").add_argument, ("auto",)
    add("--data_dir", default="data/datasets/Pretrain_Data", help="folder of CSVs, searched recursively, or one CSV")
    add("--max_files", type=number(int, 0), default=100, help="use at most this many files, the first by name; 0 = all")
    add("--columns", nargs="+", default=["first"], help="`first` numeric column of each file, `all`, or column names")
    add("--context_length", type=number(int, 2), default=720, help="points that the student sees, L")
    add("--prediction_length", type=number(int, 1), default=96, help="points that it forecasts, H")
    add("--split_by", type=one_of("auto", "files", "time"), default="auto", help="auto = files from 10 usable files on")
    add("--split_ratio", type=ratio, default="8:1:1", help="train:validation:test")
    add("--split_seed", type=number(int, 0), default=0, help="shuffle of the files, sample of their windows")
    add("--max_gap", type=number(int, 0), default=16, help="longest run of missing values that is filled linearly")
    add("--season", type=number(int, 1, words=auto), default="auto", help="steps of a usual cycle; auto = by step")
    add("--stride", type=number(int, 1), default=1, help="step between training windows")
    add("--max_windows", type=number(int, 0), default=1000, help="training windows per series, drawn evenly; 0 = all")
    add = parser.add_argument_group("teacher").add_argument
    add("--teacher_model", default="Salesforce/moirai-1.1-R-base", help="hub id or local folder of a MOIRAI")
    add("--teacher_revision", default=None, help="branch, tag or commit of the hub id")
    add("--teacher_patch_size", type=number(int, 1, words=auto), default="auto", help="auto = best on sampled windows")
    add("--teacher_point", type=one_of("median", "mean"), default="median", help="of samples, or the exact mean")
    add("--num_samples", type=number(int, 1), default=100, help="samples under the median")
    add("--teacher_batch_size", type=number(int, 1), default=256, help="windows per teacher call")
    add("--teacher_precision", type=one_of("32", "bf16"), default="32", help="bf16 saves time on a GPU")
    add("--label_cache", default="~/.cache/moirai_distill", help="folder of the label files; may be shared and carried")
    add = parser.add_argument_group("machine").add_argument
    add("--device", type=device_name, default="auto", help="auto (cuda if there is one), cpu, cuda, cuda:1, mps")
    add("--devices", type=number(int, 1), default=1, help="processes, one GPU each (or CPU processes)")
    add("--num_nodes", type=number(int, 1), default=1, help="machines that run this command together")


def add_train_flags(parser):
    """The flags of train alone: student, optimisation, run."""
    add, auto = parser.add_argument_group("student").add_argument, ("auto",)
    add("--d_model", type=number(int, 1), default=128, help="width D")
    add("--num_layers", type=number(int, 1), default=4, help="Transformer layers")
    add("--num_heads", type=number(int, 1), default=8, help="attention heads; must divide d_model")
    add("--patch_size", type=number(int, 1), default=16, help="points per token")
    add("--dropout", type=number(float, 0, 0.99), default=0.1, help="on the residual branches; more for few series")
    add = parser.add_argument_group("training").add_argument
    what = "1 = teacher's labels only, 0 = truth only (no teacher), auto = tried on validation"
    add("--alpha", type=number(float, 0, 1, words=auto), default=0.5, help=what)
    add("--batch_size", type=number(int, 1), default=32, help="windows per step, over all devices together")
    add("--num_epochs", type=number(int, 1), default=10, help="passes over the training windows")
    add("--learning_rate", type=number(float, above=0), default=1e-4, help="of AdamW; halved when validation stalls")
    add("--weight_decay", type=number(float, 0), default=1e-5, help="of AdamW")
    add("--max_grad_norm", type=number(float, above=0), default=1.0, help="gradients are clipped to this norm")
    add("--augment", type=one_of("on", "off"), default="on", help="train on sums and mirror images of windows, too")
    add("--patience", type=number(int, 0), default=0, help="stop after this many epochs without a new best; 0 = never")
    add("--precision", type=one_of("32-true", "bf16-mixed"), default="32-true", help="bf16-mixed is faster on new GPUs")
    add("--seed", type=number(int, 0, 2**64 - 1), default=0, help="of weights, order, dropout; not of split and labels")
    add = parser.add_argument_group("run").add_argument
    add("--save_dir", default="./checkpoints/moirai_distill", help="checkpoints, metrics and pictures go here")
    add("--resume", action="store_true", help="go on from save_dir/last.pt, with the same flags")
    add("--demo", action="store_true", help="write small synthetic CSVs, distil the demo teacher, compare; offline")


def build_parser(demo):
    """The parser of all commands; with `demo`, train has the demo's defaults."""
    program = Parser(prog="moirai_distill.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = program.add_subparsers(dest="command", required=True)
    style = {"allow_abbrev": False, "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    other = f"Other commands: {', '.join(COMMANDS[1:])} (python moirai_distill.py COMMAND --help)."
    train = commands.add_parser("train", help="label, train, test (the default command)", epilog=other, **style)
    inherited = "Of the flags of data and teacher, those not given are as in the first checkpoint's run."
    evaluate = commands.add_parser("evaluate", help="score checkpoints", epilog=inherited, allow_abbrev=False)
    predict = commands.add_parser("predict", help="forecast the next steps of a CSV", **style)
    export = commands.add_parser("export", help="write a model to ship", allow_abbrev=False)
    label = commands.add_parser("label", help="only label the training windows, into the cache", **style)
    label.add_argument("--list", action="store_true", help="list the label files in the cache instead")
    for parser in (train, label, evaluate):
        add_shared_flags(parser)
    evaluate.set_defaults(**dict.fromkeys(vars(evaluate.parse_args([])).keys() - {"device", "devices", "num_nodes"}))
    add_train_flags(train)
    what = "a run's folder (its best), a .pt, an exported folder or a hub id"
    evaluate.add_argument("--checkpoint", nargs="+", required=True, help=f"one or more of: {what}")
    evaluate.add_argument("--with_teacher", action="store_true", help="score the teacher, too, from the cache or anew")
    evaluate.add_argument("--output_dir", default=None, help="for table and pictures; default: the first one's folder")
    for parser in (predict, export):
        parser.add_argument("--checkpoint", required=True, help=what)
    predict.add_argument("--input", required=True, help="CSV whose series go on after its end")
    predict.add_argument("--columns", nargs="+", default=None, help="as in train; default: as the student was trained")
    predict.add_argument("--output", default="forecast.csv", help="CSV of the forecast")
    predict.add_argument("--plot", action="store_true", help="draw the forecast, beside --output")
    predict.add_argument("--backtest", action="store_true", help="hold the last steps out, and show the error on them")
    export.add_argument("--format", type=one_of("onnx", "hub"), required=True, help="onnx file, or hub folder")
    export.add_argument("--output", default=None, help="default: student.onnx or hub in the checkpoint's folder")
    names = [*map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG")), locale.getlocale()[0]]
    lang = "zh" if next(filter(None, names), "").lower().startswith(("zh", "chinese")) else "en"
    for parser in (train, evaluate, predict, export, label):
        parser.add_argument("--lang", type=one_of("en", "zh"), default=lang, help="of results; default: the locale's")
    train.set_defaults(**(DEMO if demo else {}))
    return program


def unwritable(folder):
    """Why `folder` cannot be written to or made; empty if it can."""
    path = Path(folder).expanduser().absolute()
    path = next((place for place in (path, *path.parents) if place.exists()), path)
    return "" if path.is_dir() and os.access(path, os.W_OK | os.X_OK) else f"{path} is not a folder to write to"


def contradictions(args):
    """Problems (list of str) of arguments that are right one by one; None is as in the run, or decided later."""
    has = {name: value for name, value in vars(args).items() if value is not None and not getattr(args, "list", False)}
    training, gpus = args.command == "train", torch.cuda.device_count()
    cache = has.get("label_cache")  # one that is there may be carried, without the teacher, and need not be written to
    needed = not (training and args.alpha == 0) and bool(cache) and not Path(cache).expanduser().is_dir()
    made = training and args.demo and args.data_dir == DEMO["data_dir"]
    absent = lambda name: re.match(r"[./~]|.*\.pt$", name) and not Path(name).expanduser().exists()  # noqa: E731
    named = [has["checkpoint"]] if isinstance(has.get("checkpoint"), str) else has.get("checkpoint", [])
    tests = [(not absent(name), f"--checkpoint {name}: no such file or folder") for name in named]
    for flag in has.keys() & {"data_dir", "input"}:
        tests.append((made or Path(has[flag]).expanduser().exists(), f"--{flag} {has[flag]}: no such folder or file"))
    for flag in [name for name in ("save_dir", "output_dir", "output", *["label_cache"] * needed) if name in has]:
        why = unwritable(Path(has[flag]).parent if flag == "output" else has[flag])
        tests.append((not why, f"--{flag} {has[flag]}: {why}"))
    if "output" in has:
        output, hub = Path(args.output).expanduser().resolve(), has.get("format") == "hub"
        taken = output.is_file() if hub else output.is_dir() or has.get("plot") and output.suffix == ".png"
        taken = taken or args.command == "predict" and output == Path(args.input).expanduser().resolve()
        tests.append((not taken, f"--output {args.output}: is a file, a folder, the picture, or the input"))
    if "device" in has:
        cpu, teacher = args.device == "cpu" or args.device == "auto" and not gpus, has.get("teacher_model", "")
        tests += [
            (not (needed and absent(teacher)), f"--teacher_model {teacher}: no such folder"),
            (not cpu or args.teacher_precision != "bf16", "--teacher_precision bf16: needs a GPU; use 32"),
            (args.devices == 1 or ":" not in args.device, f"--devices {args.devices}: not with --device {args.device}"),
            (cpu or args.devices <= max(1, gpus), f"--devices {args.devices}: PyTorch finds {gpus} GPUs"),
        ]
    if training:
        tried = args.alpha == "auto" and any(Path(args.save_dir).expanduser().glob("trials/*/last.pt"))
        last, heads, patch = Path(args.save_dir).expanduser() / "last.pt", args.num_heads, args.patch_size
        tests += [
            (args.d_model % heads == 0, f"--num_heads {heads}: does not divide --d_model {args.d_model}"),
            (patch <= args.context_length, f"--patch_size {patch}: longer than --context_length {args.context_length}"),
            (not args.resume or last.is_file() or tried, f"--resume: no {last} to go on from; start without --resume"),
        ]
    return [problem for good, problem in tests if not good]


def parse_arguments(argv):
    """Namespace of the checked arguments `argv`. Raises UserError with every problem found."""
    words = list(argv) if argv and argv[0] in COMMANDS else ["train", *argv]
    parser = build_parser(demo="--demo" in words)
    args, unknown = parser.parse_known_args(words)
    wrong = {name: value for name, value in vars(args).items() if isinstance(value, Wrong)}
    problems = [f"--{name}: {value}" for name, value in wrong.items()]
    for word in unknown:
        close = difflib.get_close_matches(word.partition("=")[0], [f"--{name}" for name in vars(args)], n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        hint = "; the command comes first, before all flags" if word in COMMANDS else hint
        problems.append(f"{word}: not an argument of {args.command}{hint}")
    defaults = vars(parser.parse_args(["train"]))  # where --format is wrong there is none, and it does not matter
    problems += contradictions(argparse.Namespace(**(vars(args) | {name: defaults.get(name) for name in wrong})))
    require(not problems, "\n  ".join([f"{len(problems)} problem(s) with the arguments", *problems]))
    return args


class Say:
    """Prints results (unless `muted`) on stdout in English or Chinese, notes on stderr in English; only where `on`."""

    def __init__(self, lang):
        self.lang, self.on, self.muted = lang, True, False

    def __call__(self, english, chinese, *values):
        if self.on and not self.muted:
            print((chinese if self.lang == "zh" else english).format(*values), flush=True)

    def note(self, text):
        if self.on:
            print(f"note: {text}", file=sys.stderr, flush=True)


# == 2  Data: CSV -> clean regular series -> split -> windows ==========================================================

TIME_NAMES = ("date", "timestamp", "time", "datetime", "ds")
ID_NAMES = ("unique_id", "item_id", "id", "series", "series_id")
INDEX_NAMES = ("id", "index", "time_idx")
DATES = ("%m/%d/%Y", "%d/%m/%Y", "%d.%m.%Y", "%d-%m-%Y", "%Y/%m/%d", "%Y年%m月%d日", "%d-%b-%Y", "%d-%b-%y", "%b %Y")
CLOCKS = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p")
DATE_FORMATS = ["ISO8601", *(date + clock for date in DATES for clock in CLOCKS)]
ABSURD = 1e6  # deviations from the train rows' mean beyond which a value counts as missing
PARTS = ("train", "validation", "test")
DAY = 86_400 * 10**9  # nanoseconds, as all steps here
ROUND_STEPS = np.array([1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 900, 1200, 1800]) * 10**9
ROUND_STEPS = np.append(ROUND_STEPS, np.array([1, 2, 3, 4, 6, 8, 12, 24, 168]) * DAY // 24)
MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
CALENDAR = (  # rules by the typical distance of two stamps: shortest and longest in days, pandas offsets, season
    (1, 1, ["B"], 5),
    (27, 32, ["MS", "ME", "BMS", "BME"], 12),
    (88, 94, [f"{kind}-{month}" for kind in ("QS", "QE", "BQS", "BQE") for month in MONTHS[:3]], 4),
    (363, 369, [f"{kind}-{month}" for kind in ("YS", "YE", "BYS", "BYE") for month in MONTHS], 1),
)


class Unusable(Exception):
    """Why a file or a series is skipped."""


@dataclasses.dataclass
class Series:
    """One univariate series on a regular grid."""

    name: str  # file, and id or column where the file holds several
    values: np.ndarray  # (T,) float64 in the file's units, NaN where missing; filled by `prepare`
    freq: str  # pandas frequency of the grid, "" without timestamps
    stamps: pd.DatetimeIndex = None  # the last 12 at most, named as their column; None without timestamps
    column: str = ""  # its heading in a table of all series of the file
    scaled: np.ndarray = None  # (T,) float32, in deviations of the train rows
    observed: np.ndarray = None  # (T,) bool, False where missing or filled
    scaler: tuple = None  # (mean, deviation) of the train rows
    starts: dict = None  # part -> starts (w,) int64 of its windows


def read_csv(path):
    """DataFrame of a CSV in UTF-8, UTF-16 with a mark, GB18030 or Latin-1, separated by comma, ; or tab."""
    try:
        with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as file:
            raw = file.read()
        for encoding in ("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "gb18030", "latin-1"):
            with contextlib.suppress(UnicodeDecodeError):
                lines = [*raw.decode(encoding).lstrip().split("\n", 2), ""]
                break
        nul = encoding != "utf-16" and b"\0" in raw  # pandas would cut a number there
        require(not nul, "it holds NUL bytes: damaged, or UTF-16 without its mark", ValueError)
        counts = {mark: [line.count(mark) for line in lines[:2]] for mark in ",;\t"}  # in header and first row
        separator = max(counts, key=lambda mark: (counts[mark][0] == counts[mark][1] > 0, counts[mark][0]))
        settings = {"encoding": encoding, "sep": separator, "decimal": "," if separator == ";" else "."}
        frame = pd.read_csv(io.BytesIO(raw), low_memory=False, **settings)
    except (OSError, EOFError, ValueError, zlib.error) as error:  # pandas' own errors are ValueErrors
        raise Unusable(f"unreadable: {' '.join(str(error).split())}") from error
    if frame.empty or not isinstance(frame.index, pd.RangeIndex):
        raise Unusable("no rows" if frame.empty else "its rows hold more fields than its header")
    frame.attrs["decimal"], names = settings["decimal"], [str(name).strip() for name in frame.columns]
    return frame if names == [*frame.columns] or len({*names}) < len(names) else frame.set_axis(names, axis=1)


def parse_times(column, most_unread):
    """Timestamps (T,) of a column, NaT where unread, in their one offset, else UTC; None where more is unread."""
    if pd.api.types.is_numeric_dtype(column):
        low, high = column.min(), column.max()
        for unit, size in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
            if 3e8 * size <= low and high < 4.2e9 * size:  # 1979 to 2103 as epoch time
                return pd.DatetimeIndex(pd.to_datetime(column, unit=unit)).as_unit("ns")
        if not (low >= 19000101 and high <= 21001231 and (column.dropna() % 1 == 0).all()):
            return None
        column = column.astype("Int64")
    text = column if pd.api.types.infer_dtype(column) == "string" else column.astype(str)
    sample = text[column.iloc[:: max(1, len(column) // 100)].dropna().index]
    if any(stamp != stamp.strip() for stamp in sample):
        text, sample = text.str.strip(), sample.str.strip()
    if not sum(bool(re.search(r"\d\d", stamp)) for stamp in sample) > (1 - most_unread) * len(sample):
        return None
    unread = {}
    for form in DATE_FORMATS:
        unread[form] = pd.to_datetime(sample, format=form, errors="coerce", utc=True).isna().mean()
        if form == "ISO8601" and unread[form] == 0:
            break
    forms = [form for form in unread if unread[form] == min(unread.values())]
    readings, uneven = [pd.to_datetime(text, format=form, errors="coerce", utc=True) for form in forms], [1.0]
    if len(readings) > 1:  # is it day or month first? The longest distance of neighbours over the typical one tells
        gaps = [np.diff(np.unique(reading.dropna().astype("int64"))) for reading in readings]
        uneven = [gap.max() / np.median(gap) if len(gap) else math.inf for gap in gaps]
    times = readings[np.argmin(uneven)]
    zones = {*sample.str.extract(r":\d\d(?:\.\d+)? ?(Z|[+-]\d\d(?::?\d\d)?)$")[0].fillna("").str.replace(":", "")}
    one = min(zones, default="")  # as pandas wants it: +08:00
    zone = None if zones <= {""} else "UTC" if len(zones) > 1 or one == "Z" else f"{one[:3]}:{one[3:] or '00'}"
    return None if times.isna().mean() > most_unread else pd.DatetimeIndex(times).tz_convert(zone).as_unit("ns")


def regular_grid(times):
    """(positions (T,) int64, -1 off the grid; frequency) of sorted `times`: a calendar rule or the most common step."""
    stamps, gaps = times.asi8, np.diff(times.asi8)
    steps, counts = np.unique(gaps[: 1 if (gaps == gaps[0]).all() else None], return_counts=True)
    if len(steps) > 1 and counts.max() * 2 < len(gaps):  # they jitter: of rounded ones
        near = ROUND_STEPS[np.abs(np.log(gaps[:, None] / ROUND_STEPS)).argmin(1)]
        steps, counts = np.unique(np.where(np.abs(gaps - near) <= near // 10, near, gaps), return_counts=True)
    step = int(steps[counts.argmax()])  # in ns
    rules = next((rules for low, high, rules, _ in CALENDAR if low * DAY <= step <= high * DAY), [])
    days = times.normalize() if rules else times
    months = days.to_period("M").to_timestamp() if rules else days  # once a month on any day, as the 30th
    for dates, names in ((days, rules), (months, [rule for rule in rules if rule[:2] in ("MS", "QS", "YS")])):
        for rule in names:
            offset = pd.tseries.frequencies.to_offset(rule)
            if (dates + 0 * offset == dates).mean() >= 0.95 and len(dates.unique()) >= 0.95 * len(dates):
                grid = pd.date_range(dates[0] - 2 * offset, dates[-1] + 2 * offset, freq=rule)
                return grid.get_indexer(dates, method="nearest", tolerance=pd.Timedelta(step // 2, "ns")), rule
    turns = np.exp(2j * np.pi * (stamps % step) / step)  # phase of each stamp; their mean is the phase of the grid
    steps = (stamps - stamps[0]) / step + np.angle(turns[0] / turns.mean()) / (2 * np.pi)
    return np.rint(steps).astype(np.int64) + 1, pd.tseries.frequencies.to_offset(pd.Timedelta(step)).freqstr


def on_grid(times, values, has_ids):
    """(values (T,) on the regular grid of `times`, frequency, last stamps). Raises Unusable where there is no grid."""
    rows, zone, clock = len(times), times.tz, times.tz_localize(None)  # the grid is that of the clock they show
    column = pd.Series(values, clock)[clock.notna()].sort_index(kind="stable")
    last = ~column.index.duplicated(keep="last")  # of exact duplicates the last one stays
    times, values, duplicates = column.index[last], column.to_numpy()[last], int((~last).sum())
    if duplicates > 0.01 * rows and not has_ids:
        raise Unusable(f"{duplicates} of {rows} timestamps are duplicates; is an id column missing?")
    require(len(times) >= 3, f"too short: {len(times)} timestamps", Unusable)
    positions, freq = regular_grid(times)
    times, positions, values = times[positions >= 0], positions[positions >= 0], values[positions >= 0]
    placed = len(positions[:1]) + int((np.diff(positions) > 0).sum())  # they are sorted
    if placed < 0.9 * (rows - duplicates):
        raise Unusable(f"irregular timestamps: only {placed} of {rows - duplicates} fit one step ({freq})")
    length = int(positions.max() - positions.min()) + 1
    require(length <= 10 * placed + 1000, f"sparse timestamps: {placed} rows over {length} steps of {freq}", Unusable)
    grid = np.full(length, np.nan)
    grid[positions - positions.min()] = values  # where two snap to one position, the later stays
    return grid, freq, times[-12:].tz_localize(zone)


def continued(series, horizon, back=0):
    """Index (H,) of the steps from `back` before the end of `series` on: timestamps, or steps 1 to H without them."""
    if series.stamps is None:
        return pd.RangeIndex(1, horizon + 1, name="step") - back
    last, offset = series.stamps[-1], pd.tseries.frequencies.to_offset(series.freq)
    day = last if isinstance(offset, pd.tseries.offsets.Tick) else last.normalize()
    monthly = series.freq[:2] in ("MS", "QS", "YS") and not offset.is_on_offset(day)  # on any day, as the 30th
    nearest = min((offset.rollback(day), offset.rollforward(day)), key=lambda other: abs(other - day))
    anchor = day.replace(day=1) if monthly else nearest
    index = pd.date_range(anchor - back * offset, periods=horizon + 1, freq=offset)[1:]
    if monthly:
        index += pd.to_timedelta(np.minimum(series.stamps.day.max(), index.days_in_month) - 1, "D")
    return (index + (last - day)).rename(series.stamps.name)


def as_numbers(column, decimal):
    """Values (T,) float64 of a column of which 9 in 10 values are numbers, NaN where not finite; else None."""
    column = column.str.replace(",", ".") if column.dtype == object and decimal == "," else column
    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    few = (~np.isnan(values)).sum() < 0.9 * column.notna().sum() or not np.isfinite(values).any()
    return None if few or pd.api.types.is_bool_dtype(column) else np.where(np.isfinite(values), values, np.nan)


def pick_columns(frame, columns):
    """(times named as their column, id column, or None each; column -> values, those passed over). Raises Unusable."""
    lower = {name: name.lower() for name in frame.columns}
    ids = [name for name in frame.columns if lower[name] in ID_NAMES and frame[name].duplicated().any()]
    id_name = next((name for name in ids if not pd.api.types.is_float_dtype(frame[name])), None)
    whole = [name for name in frame.columns if pd.api.types.is_integer_dtype(frame[name]) and name != id_name]
    groups = frame.groupby(id_name) if id_name else frame
    steps = {name: groups[name].diff().dropna() for name in whole}
    clocks = [name for name in whole if (steps[name] > 0).all() and (steps[name] == steps[name].median()).mean() > 0.5]
    times = None
    for name in sorted(frame.columns, key=lambda n: (lower[n] not in TIME_NAMES, n in whole)):  # by name, by content
        called_so = lower[name] in TIME_NAMES
        if times is None and (called_so or name in clocks or not pd.api.types.is_numeric_dtype(frame[name])):
            times = parse_times(frame[name], 0.5 if called_so else 0.1)
    named = [] if columns in (["first"], ["all"]) else columns
    if missing := [name for name in named if name not in frame.columns]:
        raise Unusable(f"no column {', '.join(missing)}; it has {', '.join(frame.columns[:20])}")
    values, passed = {}, []
    for name in [name for name in named or frame.columns if name not in (getattr(times, "name", None), id_name)]:
        numbers, counter = as_numbers(frame[name], frame.attrs["decimal"]), name in steps and (steps[name] == 1).all()
        index = lower[name] in TIME_NAMES + INDEX_NAMES or lower[name].startswith("unnamed:") or counter
        if numbers is None or index and not named:
            passed.append(name)
        elif not values or columns != ["first"]:
            values[name] = numbers
    require(values, f"no numeric column among {', '.join(frame.columns[:20])}", Unusable)
    return times, id_name, values, passed


def read_series(path, name, columns):
    """(list of Series, remarks) of one CSV. Raises Unusable with the reason where there is no series."""
    frame = read_csv(path)
    times, id_name, columns_values, passed = pick_columns(frame, columns)
    groups = frame.groupby(id_name).indices if id_name else {"": np.arange(len(frame))}
    series, remarks = [], [f"passed over: {', '.join(passed[:20])}"] * bool(passed)
    for (key, rows), (column, values) in itertools.product(groups.items(), columns_values.items()):
        label = " / ".join([name] + [str(key)] * bool(id_name) + [column] * (len(columns_values) > 1))
        try:
            grid = (values[rows], "", None) if times is None else on_grid(times[rows], values[rows], bool(id_name))
            series.append(Series(label, *grid, label[len(name) + 3 :] or column))
        except Unusable as reason:
            remarks.append(f"skipped: {label}: {reason}")
            if len(groups) * len(columns_values) == 1:
                raise
    return series, remarks


def last_context(values, length):
    """(context (length,), gaps filled in it, missing values at its end) of the end of a series. Raises Unusable."""
    rows, first, far = len(values), len(values) - length, (pd.Series(values) - pd.Series(values).median()).abs()
    values = np.where(far > ABSURD * (far.median() or math.inf), np.nan, values)  # a glitch is no value
    known = np.flatnonzero(~np.isnan(values))
    what = f"too short: {rows} rows" if first < 0 else f"nothing but missing values in its last {length} rows"
    require(first >= 0 and (known >= first).any(), f"{what}; the student takes {length}", Unusable)
    end = rows - 1 - int(known[-1])
    context = np.interp(np.arange(first, rows), known, values[known])  # beyond the last known value: that one
    return context, int(np.isnan(values[first:]).sum()) - end, end


def season_of(freq):
    """Seasonal period in steps of a pandas frequency; 24 without one, 1 where no cycle is usual."""
    if seasons := [season for *_, rules, season in CALENDAR if freq in rules]:
        return seasons[0]
    step = pd.Timedelta(pd.tseries.frequencies.to_offset(freq or "h")).value
    return round(DAY / step) if step < DAY else {1: 7, 7: 52}.get(step // DAY, 1)


def prepare(series, bounds, length, horizon, max_gap):
    """Copy of `series`, standardised by its train rows (or all, of one part), gaps up to `max_gap` inside a part filled
    linearly, with starts[part] (w,) of windows whose target lies in bounds[part] = (low, high). Raises Unusable."""
    from sklearn.preprocessing import StandardScaler  # not at the top: forecasting needs no scikit-learn

    rows = series.values[slice(*bounds.get("train", (0, None)))]
    require(pd.Series(rows).min() < pd.Series(rows).max(), "constant, or nothing but missing values", Unusable)
    scaler = StandardScaler().fit(rows[:, None])
    mean, deviation = float(scaler.mean_[0]), float(scaler.scale_[0])
    require(math.isfinite(deviation) and scaler.var_[0] > 0, "values too large or too close for float64", Unusable)
    filled = np.where(np.abs((series.values - mean) / deviation) > ABSURD, np.nan, series.values)
    observed, starts = ~np.isnan(filled), {}
    for part, (low, high) in bounds.items():
        values = pd.Series(filled[low:high])
        if values.hasnans:
            run = values.isna().groupby(values.notna().cumsum()).transform("sum")  # length of each run of missing ones
            filled[low:high] = values.interpolate(limit_area="inside").where(values.notna() | (run <= max_gap))
        begin = np.arange(max(0, low + horizon - length), high - length + 1)  # contexts may begin in the part before
        missing, seen = (np.append(0, np.cumsum(flags)) for flags in (np.isnan(filled), observed))
        whole = missing[begin + length] == missing[begin]
        starts[part] = begin[whole & (seen[begin + length] > seen[begin + length - horizon])]
    if not len(next(iter(starts.values()))):
        raise Unusable(f"too short: {len(rows)} rows; a window takes {length} without a gap longer than {max_gap}")
    scaled = scaler.transform(filled[:, None])[:, 0].astype(np.float32)
    changed = {"values": filled, "scaled": scaled, "observed": observed, "scaler": (mean, deviation), "starts": starts}
    return dataclasses.replace(series, **changed)


@dataclasses.dataclass
class Windows:
    """The windows of one part: starts in one flat array of all series. Nothing is materialised; a batch is a gather."""

    values: np.ndarray  # (T of all series,) float32, in deviations of each series' train rows; NaN where no window goes
    observed: np.ndarray  # (T of all series,) bool, False where missing or filled
    starts: np.ndarray  # (W,) int64, of the context
    series: np.ndarray  # (W,) int64, index of the series
    freqs: list  # of each series, pandas frequency or ""
    seasons: np.ndarray  # of each series, int64
    names: list  # of each series
    length: int  # L + H
    horizon: int  # H
    digest: str  # of all that a label depends on, but for the teacher

    def __len__(self):
        return len(self.starts)

    def batch(self, index):
        """(context (B, L), target (B, H), observed (B, H) float32) of the windows `index`, on the CPU."""
        starts, context_length = self.starts[index], self.length - self.horizon
        rows = torch.from_numpy(np.lib.stride_tricks.sliding_window_view(self.values, self.length)[starts])
        seen = np.lib.stride_tricks.sliding_window_view(self.observed, self.horizon)[starts + context_length]
        return rows[:, :context_length], rows[:, context_length:], torch.from_numpy(seen.astype(np.float32))

    def season(self, index):
        """Seasonal periods (B,) int64 of the windows `index`."""
        return torch.from_numpy(self.seasons[self.series[index]])


def label_digest(series, starts, length):
    """Bytes that identify what the labels of one series depend on; to 1e-6 deviations, as CPUs differ in last bits."""
    rows, (mean, deviation) = len(series.values) + 1, series.scaler
    edges = np.bincount(starts, minlength=rows) - np.bincount(starts + length, minlength=rows)
    covered = np.rint((series.values[np.cumsum(edges[:-1]) > 0] - mean) / deviation * 1e6).astype("<i8")
    header = f"{series.freq} {len(starts)} {round(mean / deviation, 6) + 0.0} {deviation:.6e}".encode()
    return hashlib.sha256(header + starts.astype("<i8").tobytes() + covered.tobytes()).digest()


def pack(chosen, season, length, horizon):
    """Windows of one part, of which `chosen` holds the (series, starts)."""
    items, starts = zip(*chosen, strict=True)
    values, observed = (np.concatenate([getattr(item, name) for item in items]) for name in ("scaled", "observed"))
    series = np.repeat(np.arange(len(items)), [len(begin) for begin in starts])
    freqs, names = [item.freq for item in items], [item.name for item in items]
    seasons = np.array([season_of(freq) if season == "auto" else season for freq in freqs])
    digest = hashlib.sha256(b"".join(label_digest(item, begin, length) for item, begin in chosen)).hexdigest()
    starts = np.concatenate(starts) + np.cumsum([0] + [len(item.scaled) for item in items])[series]
    return Windows(values, observed, starts, series, freqs, seasons, names, length, horizon, digest)


def split_files(names, split_ratio, seed):
    """Part of each file: a seeded shuffle of the sorted names; validation and test get max(1, round(n * share))."""
    shuffled = [sorted(names)[i] for i in np.random.default_rng(seed).permutation(len(names))]
    held = [max(1, round(len(names) * share / sum(split_ratio))) for share in split_ratio[1:]]
    if sum(held) >= len(names):
        raise UserError(f"--split_ratio leaves none of {len(names)} usable files for training; use --split_by time")
    return dict(zip(shuffled, np.repeat(PARTS, [len(names) - sum(held), *held]).tolist(), strict=True))


def find_files(data_dir, max_files):
    """(number of CSVs found, path below `data_dir` -> Path of the first by name). Raises UserError where none is."""
    root = Path(data_dir).expanduser()
    found = [p for p in root.rglob("*") if p.name.lower().endswith((".csv", ".csv.gz"))] if root.is_dir() else [root]
    require(found, f"--data_dir {data_dir}: no .csv file in this folder or below")
    paths = {path.name if path == root else path.relative_to(root).as_posix(): path for path in found}
    return len(found), {name: paths[name] for name in sorted(paths)[: max_files or None]}


def read_files(data_dir, max_files, columns, progress, listed=None):
    """(number of CSVs found, file -> list of Series, file -> remarks), by path below `data_dir`. Raises UserError."""
    (found, paths), series, remarks = listed or find_files(data_dir, max_files), {}, {}

    def read(name):
        try:
            return name, *read_series(paths[name], name, columns)
        except Unusable as reason:
            return name, None, [f"skipped: {reason}"]

    def calm(_worker):  # Ctrl-C and SIGTERM are for the process that started it
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1  # where forking is quick and sound
    workers = cores if cores > 1 and len(paths) >= 50 else 0
    settings = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None, "worker_init_fn": calm}
    loader = torch.utils.data.DataLoader([*paths], batch_size=None, collate_fn=read, **settings)
    for name, items, notes in tqdm(loader, "reading", unit="file", leave=False, disable=not progress):
        series |= {} if items is None else {name: items}
        remarks[name] = notes
    return found, series, remarks


def prepare_files(series, remarks, split_ratio, limits):
    """(file -> list of prepared Series, file -> remarks) of the files' series, split by time; whole without ratio."""
    ready, told = {}, {name: list(notes) for name, notes in remarks.items()}
    for name, item in [(name, item) for name, items in series.items() for item in items]:
        ratio, names = (split_ratio, PARTS) if split_ratio else ((1,), ("whole",))
        edges = np.floor(len(item.values) * np.cumsum([0, *ratio]) / sum(ratio) + 1e-9).astype(int).tolist()
        bounds = dict(zip(names, itertools.pairwise(edges), strict=True))  # rows (low, high) of each part
        try:
            ready[name] = [*ready.get(name, []), prepare(item, bounds, **limits)]
        except Unusable as reason:
            told[name].append(f"skipped: {item.name + ': ' if item.name != name else ''}{reason}")
    return ready, {name: "; ".join(notes[:4] + ["…"] * (len(notes) > 4)) for name, notes in told.items()}


def split_data(series, remarks, by, split_ratio, seed, stride, max_windows, season, limits):
    """(part -> Windows, part -> files, "files" or "time", file -> remark). Raises UserError if a part has no window."""
    ready, notes = prepare_files(series, remarks, split_ratio if by == "time" else None, limits)
    by_files = by == "files" or by == "auto" and len(ready) >= 10
    ready, notes = (ready, notes) if by_files or by == "time" else prepare_files(series, remarks, split_ratio, limits)
    told = "".join([f"\n  {name}: {note}" for name, note in notes.items() if note][:20])  # under an error
    require(not by_files or len(ready) >= 3, f"{len(ready)} usable files, it takes 3; or use --split_by time{told}")
    part_of = split_files(ready, split_ratio, seed) if by_files else {}
    chosen, files = {part: [] for part in PARTS}, {part: set() for part in PARTS}
    for name, item in [(name, item) for name, items in sorted(ready.items()) for item in items]:
        for part, starts in ({part_of[name]: item.starts["whole"]} if by_files else item.starts).items():
            if part == "train":
                starts = starts[::stride]  # and of these one from each stretch, lest all lie at one hour of the day
                edges = np.linspace(0, len(starts), min(len(starts), max_windows or len(starts)) + 1).astype(np.int64)
                starts = starts[np.random.default_rng((seed, *os.fsencode(item.name))).integers(edges[:-1], edges[1:])]
            if len(starts):
                chosen[part].append((item, starts))
                files[part].add(name)
    empty = " and no ".join(part for part in PARTS if not chosen[part])
    require(not empty, f"the data gives no {empty} window; use more or longer series, or shorter lengths{told}")
    parts = {part: pack(chosen[part], season, limits["length"], limits["horizon"]) for part in PARTS}
    return parts, {part: len(names) for part, names in files.items()}, "files" if by_files else "time", notes


# == 3  Files: atomic writes, safe reads, the hub, a clean stop ========================================================

FORMAT = 1  # of checkpoints and label files; a higher one is refused
HUB_REMEDIES = (  # the first that fits an error of hf_hub_download
    (errors.HFValidationError, "no such folder, and not a hub id such as Salesforce/moirai-1.1-R-base"),
    (errors.GatedRepoError, "access is not granted: ask for it on its hub page, then run `hf auth login`"),
    (errors.RepositoryNotFoundError, "no such model, or a private one: check the id, or run `hf auth login`"),
    (errors.RevisionNotFoundError, "no such revision: check --teacher_revision"),
    (errors.LocalEntryNotFoundError, "not in the local cache, and the hub is out of reach or switched off"),
    (errors.EntryNotFoundError, "the model has no such file: is it a MOIRAI?"),
)


@contextlib.contextmanager
def atomic(path, replace=True):
    """A file to write bytes to, named `path` once it is whole and on disk; without `replace`, the first one wins."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not replace:
            with contextlib.suppress(OSError):  # the first writer has won, or this is a file system without links
                os.link(temporary, path)
        if replace or not path.exists():
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk, say; torch.save makes it a RuntimeError
        raise UserError(f"{path}: cannot be written ({error.args[-1]}); what was there before is as it was") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_plain(path, keys, mapped=False):
    """Dict with `keys` of a file of torch.save, on the CPU. Nothing in the file is executed. Raises UserError."""
    try:
        require(zipfile.ZipFile(path).testzip() is None, "a checksum does not fit", ValueError)
        content = torch.load(path, "cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # torch.load raises a dozen types for a damaged or foreign file
        raise UserError(f"{path}: refused: damaged, or not plain data ({repr(error)[:99]})") from error
    require(isinstance(content, dict) and keys <= content.keys(), f"{path}: not a checkpoint of this program")
    return content


def read_checkpoint(path):
    """Dict of a checkpoint of this program. Raises UserError."""
    require(Path(path).is_file(), f"{path}: no such checkpoint")
    content = read_plain(path, {"format", "model_state_dict", "student_config"})
    require(isinstance(content["format"], int), f"{path}: not a checkpoint of this program")
    require(content["format"] <= FORMAT, f"{path}: of a newer format ({content['format']}); update moirai_distill.py")
    return content


def best_in(folder):
    """Path of the best checkpoint in a run's folder: the one that last.pt names, or the only one; else None."""
    last, found = Path(folder, "last.pt"), sorted(Path(folder).glob("best_model_epoch_*.pt"))
    named = Path(folder, read_checkpoint(last).get("loop", {}).get("best_file", "")) if last.is_file() else None
    return named if named in found else found[0] if len(found) == 1 else None


def read_student(source, revision=None):
    """Dict, with its `path` where it is a `.pt`, of a checkpoint: a `.pt`, a run's or exported folder, or a hub id."""
    path = Path(source).expanduser()
    path = path.is_dir() and best_in(path) or path
    if path.is_file() or path.suffix == ".pt":
        return read_checkpoint(path) | {"path": str(path)}
    from safetensors.torch import load_file  # not at the top: a .pt does not need it

    files = [model_file(source, revision, name) for name in ("config.json", "model.safetensors")]
    config = json.loads(files[0].read_text(encoding="utf-8"))
    return (config.pop("info", None) or {}) | {"student_config": config, "model_state_dict": load_file(files[1])}


def shareable(content):
    """The facts of a checkpoint that go wherever its student goes: no path of the machine that trained it."""
    kept = ("epoch", "validation_metrics", "freqs", "counts", "versions", "data", "evaluation")
    run = {k: v for k, v in content.get("run_config", {}).items() if not k.endswith(("_dir", "_cache"))}
    facts = {name: content[name] for name in kept if name in content} | {"run_config": run}
    facts["teacher"] = dict(content["teacher"]) if content.get("teacher") else None
    for part, name in ((run, "teacher_model"), (facts["teacher"] or {}, "teacher")):
        path = part.get(name, "")
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):  # not a hub id
            part[name] = PureWindowsPath(path).name
            part |= {"licence": part["licence"].replace(path, part[name])} if "licence" in part else {}
    return json.loads(json.dumps(facts), parse_constant=lambda _: None)  # JSON has no nan


def model_file(name, revision, filename):
    """Local path of one file of a model; `name` is a folder or a hub id. Raises UserError with the remedy."""
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / filename).is_file():
        raise UserError(f"{name}: no {filename} in this folder: neither a model's nor a run's with a best epoch")
    try:
        path = folder / filename if folder.is_dir() else Path(hf_hub_download(name, filename, revision=revision))
        blob = path.resolve().name  # where the hub knows the sha256 of a file, its copy here is named so
        if re.fullmatch("[0-9a-f]{64}", blob) and hashlib.sha256(path.read_bytes()).hexdigest() != blob:
            raise ValueError(f"the file does not fit its checksum: delete {path}")
        return path
    except Exception as error:  # of the hub, of HTTP, of the disk: all of them end here, with the remedy that fits
        remedy = next((text for kind, text in HUB_REMEDIES if isinstance(error, kind)), "the download failed")
        advice = "or check the network and HF_HUB_OFFLINE, set HF_ENDPOINT to a mirror, or give a local folder"
        raise UserError(f"{name} ({filename}): {remedy}; {advice} [{' '.join(str(error).split())[:250]}]") from error


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; its number is the argument."""


class Stop:
    """Handler that turns a signal into Interrupted; while `held`, the loop looks at `signum`. A second is not held."""

    signum, held = 0, False

    def __call__(self, signum, _frame):
        again, self.signum = self.signum, signum
        if again or not self.held:
            raise Interrupted(signum)
        print("\nstopping as soon as the work in hand is saved; once more stops at once", file=sys.stderr)

    @contextlib.contextmanager
    def hold(self):
        self.held = True
        try:
            yield
        finally:
            self.held = False
        if self.signum:  # it came after the loop's last look
            raise Interrupted(self.signum)


def on_first(fabric, act):
    """What `act()` gives on the first process, on all of them; its UserError or OSError is raised on all, too."""
    result = problem = None
    try:
        result = act() if fabric.is_global_zero else None
    except (UserError, OSError) as error:
        problem = error
    result, problem = fabric.broadcast((result, problem))
    if problem:
        raise problem
    return result


# == 4  Student: raw context (B, L) -> raw forecast (B, H) =============================================================


class Block(nn.Module):
    """Pre-norm Transformer layer, (B, N, D) -> (B, N, D), with dropout on its two residual branches."""

    def __init__(self, d_model, num_heads, dropout):
        super().__init__()
        self.num_heads, self.dropout = num_heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).contiguous()
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)  # so few tokens: faster than fused
        x = x + self.dropout(self.out((weights @ v).transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm2(x)))


def instance_scale(context):
    """(last value, deviation or 1 where it is 0), each (B, 1), of contexts (B, L); equivariant to shift and scale."""
    centre = context[:, -1:]
    reach = (context - centre).abs().amax(1, keepdim=True)
    reach = torch.where(reach == 0, 1.0, reach)  # keeps the squares in float32's range whatever the unit
    deviation = ((context - centre) / reach).std(1, keepdim=True, unbiased=False) * reach
    return centre, torch.where(deviation == 0, 1.0, deviation)


class PatchStudent(nn.Module, PyTorchModelHubMixin):
    """Univariate patch Transformer, plus a weighted sum of the earlier periods of `season` steps: context (B, L) ->
    forecast (B, H), both in the series' own units. Where a size does not divide L, the first value is repeated."""

    def __init__(
        self, context_length, prediction_length, d_model, num_layers, num_heads, patch_size, dropout, info=(), season=0
    ):
        super().__init__()
        self.context_length, self.prediction_length, self.patch_size = context_length, prediction_length, patch_size
        self.info = info or {}  # plain facts of its making; they go into config.json and the model card
        patches, self.season = math.ceil(context_length / patch_size), season if 0 < season <= context_length else 0
        if self.season:
            self.periods = nn.Parameter(torch.zeros(-(-prediction_length // season), -(-context_length // season)))
        self.embed = nn.Linear(patch_size, d_model)
        self.position = nn.Parameter(torch.randn(patches, d_model) * 0.02)
        self.blocks = nn.Sequential(*[Block(d_model, num_heads, dropout) for _ in range(num_layers)])
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(patches * d_model, prediction_length)

    def forward(self, context):
        if context.ndim != 2 or context.shape[1] != self.context_length:
            raise ValueError(f"context has shape {tuple(context.shape)}, expected (B, {self.context_length})")
        centre, deviation = instance_scale(context)
        scaled, sizes = ((context - centre) / deviation).float(), (self.patch_size, self.season or 1)
        x, past = (F.pad(scaled, (-self.context_length % n, 0), mode="replicate").unflatten(1, (-1, n)) for n in sizes)
        x = self.norm(self.blocks(self.embed(x) + self.position))  # (B, N, D)
        forecast = self.head(x.flatten(1)).float()  # (B, H)
        if self.season:  # the same weights for each step of a period
            forecast = forecast + (self.periods @ past).float().flatten(1)[:, : self.prediction_length]
        return torch.where((context == centre).all(1, keepdim=True), centre, forecast * deviation + centre)  # constants

    @classmethod
    def from_pretrained(cls, source, revision=None):
        """Student, in eval mode, of a `.pt`, a run's folder, an exported folder or a hub id. Raises UserError."""
        return open_student(source, revision)[0]

    def generate_model_card(self, *_args, **_kwargs):
        """The card that huggingface_hub's save_pretrained and push_to_hub write."""
        info, made = self.info, "Trained on truth alone, without a teacher."
        if teacher := info.get("teacher"):
            made = f"Distilled from `{teacher['teacher']}` ({teacher['commit'] or 'local'})"
            made += f": {info['run_config']['alpha']} * MSE to its forecasts + the rest * MSE to truth."
        licence = f"The teacher's licence binds its student: {teacher['licence']}." if teacher else ""
        data = [f"{n:,} {part} series ({w:,} windows)" for part, (n, w) in sorted(info.get("counts", {}).items())[::-1]]
        data += [f"sampling frequency {', '.join(freq or 'unknown' for freq in info.get('freqs', ['']))}"]
        scores, table = ["Not evaluated yet: `python moirai_distill.py evaluate` does it."], info.get("evaluation")
        if table:
            scores = [f"| {table['windows']:,} test windows | MSE | MAE | MASE |", "|---|---|---|---|"]
            for name, row in sorted(table["rows"].items(), key=lambda item: item[1]["mse"] or math.inf):
                numbers = ["-" if row[key] is None else f"{row[key]:.4f}" for key in ("mse", "mae", "mase")]
                scores.append(f"| {name} | {' | '.join(numbers)} |")
        kind = "cc-by-nc-4.0" if "CC-BY-NC-4.0" in licence else "other"
        size, length, horizon = sum(map(torch.numel, self.parameters())), self.context_length, self.prediction_length
        head = f"---\nlibrary_name: pytorch\npipeline_tag: time-series-forecasting\nlicense: {kind}\n---\n"
        what = f"A univariate patch Transformer of {size:,} parameters: {length} points in, {horizon} out, unscaled."
        code = "    from moirai_distill import PatchStudent\n    forecast = PatchStudent.from_pretrained("
        code += f'"FOLDER OR HUB ID")(context)  # (B, {length}) -> (B, {horizon})'
        paragraphs = [head + "# A small forecaster made by moirai_distill.py", what, code, f"{made} {licence}"]
        return ModelCard("\n\n".join([*paragraphs, "\n".join(scores), f"Data: {', '.join(data)}.\n"]))


def open_student(source, revision=None):
    """(student in eval mode, dict of its checkpoint and `weights`, a short sha256). Raises UserError without one."""
    try:
        content = read_student(source, revision)
        config, weights = content["student_config"], content["model_state_dict"]
        fits = config["d_model"] % config["num_heads"] == 0 and config["num_layers"] <= len(weights)
        require(fits and all(w.isfinite().all() for w in weights.values()), "misfits or not finite", ValueError)
        with torch.device("meta"):  # nothing is allocated before the shapes are known to fit
            student = PatchStudent(**config, info=shareable(content))
        student.load_state_dict(weights, assign=True)
        weights = b"".join(weight.numpy().tobytes() for weight in student.state_dict().values())
        content["weights"] = hashlib.sha256(weights).hexdigest()[:16]
    except (UserError, ModuleNotFoundError):
        raise
    except Exception as error:  # damaged files, or another model's
        raise UserError(f"{source}: not a student of this program, or damaged ({repr(error)[:199]})") from error
    return student.float().eval(), content


# == 5  Teacher: a frozen MOIRAI, and the cache of its labels ==========================================================

SAMPLED = 64  # training windows per sampling frequency on which the teacher is judged before it labels
GENERATIONS = {  # package in uni2ts.model: prefix of its classes, and keys of its config.json; the longest that fits
    "moirai": ("Moirai", {"max_seq_len", "attn_dropout_p", "dropout_p", "distr_output", "patch_sizes"}),  # 1.0 and 1.1
    "moirai_moe": ("MoiraiMoE", {"max_seq_len", "attn_dropout_p", "dropout_p", "distr_output", "patch_sizes", "d_ff"}),
    "moirai2": ("Moirai2", {"max_seq_len", "attn_dropout_p", "dropout_p", "patch_size", "quantile_levels", "d_ff"}),
}

# What labels are asked for; but for the names, all of it goes into their key. patch: a size, "auto" or freq -> size.
Request = dataclasses.make_dataclass("Request", ("teacher", "revision", "patch", "point", "samples"))


class Teacher:
    """A frozen MOIRAI (uni2ts's module) that forecasts one variate from exactly its last L points: 1.0 and 1.1 here,
    MoE (sampled patch by patch) and 2.0 (quantiles) by `whole`, uni2ts's own forecast class."""

    def __init__(self, module, device, precision, note, whole=None):
        self.module = module.requires_grad_(False).eval().to(device)
        for part in [part for part in module.modules() if hasattr(part, "attn_dropout_p")]:
            part.attn_dropout_p = 0.0  # uni2ts passes this to the attention in eval mode, too
        self.whole, self.device, self.precision, self.note = whole, torch.device(device), precision, note
        self.most = 2**31  # windows a call
        self.samples_itself = hasattr(module, "distr_output") and whole is not None  # MoE

    def patch_sizes(self, context_length, horizon):
        """The patch sizes with which context and horizon fit into the module's `max_seq_len` tokens."""
        sizes = [16] if self.samples_itself else getattr(self.module, "patch_sizes", None) or [self.module.patch_size]
        return [p for p in sizes if -(-context_length // p) - (-horizon // p) <= self.module.max_seq_len]

    def parameters_of(self, context, horizon, patch):
        """(distribution parameters, loc, scale) of the horizon for contexts (B, L): MoiraiModule.forward, unpadded."""
        module, (batch, length), width = self.module, context.shape, max(self.module.patch_sizes)
        past, future = -(-length // patch), -(-horizon // patch)
        pad = (past * patch - length, 0)  # on the left, so that the horizon follows the last point
        values, observed = (F.pad(x, pad).unflatten(1, (past, patch)) for x in (context, torch.ones_like(context)))
        values, observed = F.pad(values, (0, width - patch)), F.pad(observed, (0, width - patch)).bool()
        time_id = torch.arange(past + future, device=context.device).expand(batch, -1)
        one = torch.ones_like(time_id)
        loc, scale = module.scaler(values, observed, one[:, :past], 0 * one[:, :past])  # (B, N, 1), one per window
        tokens = module.in_proj((values - loc) / scale, patch * one[:, :past])  # (B, N, D)
        tokens = torch.cat([tokens, module.mask_encoding.weight.to(tokens.dtype).expand(batch, future, -1)], 1)
        tokens = module.encoder(tokens, None, time_id=time_id, var_id=0 * one)
        parameters = module.param_proj(tokens[:, past:], patch * one[:, past:])  # leaves (B, future, width, ...)
        return tree_map(lambda leaf: leaf[:, :, :patch].float(), parameters), loc[:, :1], scale[:, :1]

    def points_of(self, parameters, loc, scale, point, samples):
        """Mean, or median of samples, (B, future, P), of the mixtures; nan where a parameter is not finite."""
        output, shape = self.module.distr_output, (*loc.shape[:1], *tree_leaves(parameters)[0].shape[1:3])
        finite = torch.stack([x.isfinite().reshape(*shape, -1).all(-1) for x in tree_leaves(parameters)]).all(0)
        safe = tree_map(lambda x: torch.where(finite[..., None] if x.ndim > 3 else finite, x, 1.0), parameters)
        if point == "mean":
            return output.distribution(safe, loc, scale).mean.masked_fill(~finite, math.nan)
        parts = safe.get("components", [safe])  # of a mixture, or of the one distribution
        logits = safe["weights_logits"] if "components" in safe else torch.zeros_like(safe["loc"])[..., None]
        drawn = torch.multinomial(logits.softmax(-1).flatten(0, 2), samples, True)  # (B * future * P, samples)
        values = torch.empty(drawn.shape, device=drawn.device)
        for number, (component, own) in enumerate(zip(getattr(output, "components", [output]), parts, strict=True)):
            row, column = (drawn == number).nonzero(as_tuple=True)
            own, *affine = tree_map(lambda x: x.expand(shape).flatten()[row], [own, loc, scale])  # noqa: B023
            values[row, column] = component.distribution(own, *affine).sample()
        return values.median(1).values.view(shape).masked_fill(~finite, math.nan)

    def whole_forecast(self, context, horizon, samples):
        """Median of samples (MoE), or the 0.5 quantile (2.0), (B, H), of contexts (B, L), by uni2ts's own forecast."""
        settings = dict.fromkeys(("feat_dynamic_real_dim", "past_feat_dynamic_real_dim"), 0) | {"target_dim": 1}
        settings |= {"context_length": context.shape[1], "prediction_length": horizon, "module": self.module}
        settings |= {"patch_size": 16, "num_samples": samples} if self.samples_itself else {}
        past, seen = context[..., None], torch.ones_like(context[..., None]).bool()
        values = self.whole(**settings)(past_target=past, past_observed_target=seen, past_is_pad=~seen[..., 0])
        if self.samples_itself:
            return values.float().median(1).values
        return values[:, list(self.module.quantile_levels).index(0.5)].float()

    @torch.inference_mode()
    def forecast(self, context, horizon, patch, point, samples):
        """Point forecast (B, H) float32 on the CPU, in the units of the contexts (B, L); of a constant its constant.
        Contexts reach MOIRAI in their own deviations, as its scaler adds 1e-5 to the variance: small values change."""
        require(point != "mean" or not self.whole, "--teacher_point mean: only for a MOIRAI 1.0 or 1.1; use median")
        context = context.double()
        constant = context.amin(1, keepdim=True) == context.amax(1, keepdim=True)
        mean = torch.where(constant, context[:, -1:], context.mean(1, keepdim=True))
        deviation = torch.where(constant, 1.0, context.std(1, keepdim=True, unbiased=False))
        scaled, asked = ((context - mean) / deviation).float(), (horizon, samples if self.whole else patch)
        network = self.whole_forecast if self.whole else self.parameters_of
        if self.samples_itself:  # each window is `samples` sequences
            self.most = min(self.most, max(1, 2048 // samples))
        while True:
            try:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                    parts = [network(x.to(self.device), *asked) for x in scaled.split(self.most)]
                break
            except torch.OutOfMemoryError:
                if self.most == 1:
                    raise
            self.most = max(1, min(self.most, len(context)) // 2)
            torch.cuda.empty_cache()
            self.note(f"out of GPU memory: the teacher goes on with {self.most} windows a call")
        values = tree_map(lambda *leaves: torch.cat(leaves), *parts)
        values = values if self.whole else self.points_of(*values, point, samples).flatten(1)[:, :horizon]
        assert values.shape == (len(context), horizon), values.shape
        return torch.where(constant, mean, values.cpu() * deviation + mean).float()


def fingerprint(name, revision):
    """sha256 of a teacher's config.json and model.safetensors where they are at hand without the network, else None."""
    folder, digest = Path(name).expanduser(), hashlib.sha256()
    for filename in ("config.json", "model.safetensors"):
        path = folder / filename
        with contextlib.suppress(errors.HFValidationError):  # not a hub id: the folder that is not there
            path = path if folder.is_dir() else try_to_load_from_cache(name, filename, revision=revision)
        if not isinstance(path, str | Path) or not Path(path).is_file():
            return None
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_teacher(name, revision, device, precision, note):
    """Teacher of a hub id or a local folder, its weights loaded strictly. Raises UserError."""
    config, weights = (model_file(name, revision, filename) for filename in ("config.json", "model.safetensors"))
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{name}: config.json is not JSON ({error}); download it again") from error
    keys = set(settings) if isinstance(settings, dict) else set()
    fits = {kind: needs for kind, (_, needs) in GENERATIONS.items() if needs <= keys}
    require(fits, f"{name}: another kind of model, not a MOIRAI such as Salesforce/moirai-1.1-R-base")
    kind = max(fits, key=lambda kind: len(fits[kind]))
    require(kind != "moirai_moe" or precision == "32", "--teacher_precision bf16: not for a MOIRAI-MoE; use 32")
    if "_target_" in re.sub(r'"_target_": "uni2ts\.distribution\.(\w+\.)?\w+Output"', "", json.dumps(settings)):
        raise UserError(f"{name}: config.json names a class outside uni2ts.distribution; refused")
    try:
        from safetensors.torch import load_file
        from uni2ts.model.moirai.module import decode_distr_output

        package = importlib.import_module(f"uni2ts.model.{kind}")
    except ImportError as error:
        raise UserError(f"uni2ts cannot be imported ({error}); pip install -r requirements.txt") from error
    try:
        if "distr_output" in settings:
            settings["distr_output"] = decode_distr_output(settings["distr_output"])
        module = getattr(package, f"{GENERATIONS[kind][0]}Module")(**settings)
        module.load_state_dict(load_file(weights), strict=True)
        require(0.5 in settings.get("quantile_levels", [0.5]), "quantile_levels without 0.5", ValueError)
    except Exception as error:  # damaged weights, or a config that uni2ts, hydra or torch refuses in their own ways
        what = f"is damaged or of another model ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise UserError(f"{name}: config.json or model.safetensors {what}") from error
    whole = None if kind == "moirai" else getattr(package, f"{GENERATIONS[kind][0]}Forecast")
    return Teacher(module, device, precision, note, whole)


class LabelFile:
    """Labels of W windows, (W, H) float32 in the windows' units. labels.bin holds all blocks of `block` windows, then a
    sha256 of each; until then blocks/NUMBER.bin hold one each. Two runs write the same bytes, so no lock is needed."""

    def __init__(self, folder, manifest):
        self.folder, self.path, self.manifest = Path(folder), Path(folder, "labels.bin"), manifest
        self.windows, self.horizon = manifest["key"]["windows"], manifest["key"]["horizon"]
        self.block, self.array, self.damaged = manifest["block"], None, 0
        self.count = math.ceil(self.windows / self.block)

    def index(self, number):
        """The windows of a block."""
        return np.arange(number * self.block, min(self.windows, (number + 1) * self.block))

    def read(self, number):
        """Bytes of a block from its own file or from labels.bin, if they fit their sha256; else None."""
        row, size = 4 * self.horizon, 4 * self.horizon * len(self.index(number))
        joined = (self.path, row * self.block * number, row * self.windows + 32 * number)
        for path, start, sha in ((self.folder / "blocks" / f"{number:08d}.bin", 0, size), joined):
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                file.seek(start)
                content = file.read(size)
                file.seek(sha)
                if len(content) == size and hashlib.sha256(content).digest() == file.read(32):
                    return content
        return None

    def write(self, number, labels):
        """Keep the labels (b, H) of a block."""
        content = np.ascontiguousarray(labels, "<f4").tobytes()
        with atomic(self.folder / "blocks" / f"{number:08d}.bin") as file:
            file.write(content + hashlib.sha256(content).digest())

    def missing(self):
        """Numbers of the blocks that are yet to be made."""
        return [number for number in range(self.count) if self.read(number) is None]

    def join(self):
        """Make labels.bin of the blocks, where there are any."""
        if (self.folder / "blocks").is_dir():
            with atomic(self.path) as file:
                contents = map(self.read, range(self.count))
                file.write(b"".join([hashlib.sha256(c).digest() for c in contents if file.write(c)]))
            shutil.rmtree(self.folder / "blocks", ignore_errors=True)

    def open(self):
        """Map labels.bin into memory and count the windows with a non-finite label. Returns self."""
        self.array = np.memmap(self.path, "<f4", "r", shape=(self.windows, self.horizon))
        self.damaged = sum((~np.isfinite(self.array[i : i + 8192])).any(1).sum() for i in range(0, self.windows, 8192))
        return self

    def batch(self, index):
        """(labels (B, H) float32, finite (B, 1) float32) of the windows `index`; 0 where a label is not finite."""
        labels = torch.from_numpy(np.array(self.array[index]))
        finite = labels.isfinite().all(1, keepdim=True)
        return torch.where(finite, labels, 0.0), finite.float()


def key_folder(cache, key):
    """Folder of the labels with this key."""
    return Path(cache, hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32])


def read_manifest(folder):
    """The manifest (dict) of a label folder, or None where there is none that can be used."""
    try:
        manifest = json.loads(Path(folder, "manifest.json").read_text(encoding="utf-8"))
        true = key_folder(folder.parent, manifest["key"]) == folder
        return manifest if true and manifest["block"] > 0 and isinstance(manifest["patch_sizes"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def label_windows(teacher, windows, index, patches, request, seed):
    """Labels (b, H) float32 of the windows `index`, a function of the arguments: the generator is forked and seeded."""
    context = windows.batch(index)[0]
    sizes = torch.tensor([patches[windows.freqs[series]] for series in windows.series[index]])
    labels = torch.empty(len(index), windows.horizon)
    with torch.random.fork_rng(devices=[teacher.device] if teacher.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for patch in sizes.unique().tolist():
            rows = sizes == patch
            labels[rows] = teacher.forecast(context[rows], windows.horizon, patch, request.point, request.samples)
    return labels.numpy()


def judge(teacher, windows, request, baselines, say):
    """(frequency -> patch size, seconds per window): the teacher's error on sampled windows, beside naive forecasts."""
    sizes = teacher.patch_sizes(windows.length - windows.horizon, windows.horizon)
    asked = request.patch if isinstance(request.patch, dict) else dict.fromkeys(windows.freqs, request.patch)
    if not sizes or not {*asked.values()} <= {"auto", *sizes}:
        raise UserError(f"--teacher_patch_size {request.patch}: with these lengths the teacher takes {sizes or 'none'}")
    patches, seconds = {}, 0.0
    for freq in sorted(set(windows.freqs)):
        member = np.flatnonzero(np.array(windows.freqs, object)[windows.series] == freq)
        index = member[np.linspace(0, len(member) - 1, min(SAMPLED, len(member))).astype(np.int64)]
        context, target, observed = windows.batch(index)
        forecasts, took = {n: f(context, windows.season(index), windows.horizon) for n, f in baselines.items()}, {}
        for size in sizes if asked.get(freq, "auto") == "auto" else [asked[freq]]:
            begin = time.perf_counter()
            forecasts[size] = torch.from_numpy(label_windows(teacher, windows, index, {freq: size}, request, 0))
            took[size] = (time.perf_counter() - begin) / len(index)
        mse = {name: float(((f - target) ** 2 * observed).sum() / observed.sum()) for name, f in forecasts.items()}
        patches[freq] = min(took, key=lambda size: mse[size] if math.isfinite(mse[size]) else math.inf)  # noqa: B023
        seconds += took[patches[freq]] * len(member) / len(windows)
        listing = ", ".join(f"{f'patch {n}' if n in took else n} {value:.4f}" for n, value in mse.items())
        say("MSE on {} windows of step {}: {}", "{} 个步长为 {} 的窗口上的 MSE: {}", len(index), freq or "?", listing)
        if not mse[patches[freq]] <= min(mse[name] for name in baselines):
            say.note(f"WARNING: at step {freq or '?'} the teacher is worse than a naive forecast; labels may do harm")
    return patches, seconds


def find_labels(cache, key, request):
    """A whole LabelFile for `key`, or None. Where the weights are not at hand, the teacher's name decides."""
    weights, found = fingerprint(request.teacher, request.revision), []
    for folder in [key_folder(cache, key | {"weights": weights})] if weights else sorted(cache.glob("*")):
        manifest = read_manifest(folder)
        if manifest and manifest["key"] | {"weights": None} == key | {"weights": None}:
            same = PureWindowsPath(manifest["teacher"]).name == PureWindowsPath(request.teacher).name
            same = same and request.revision in (None, manifest["revision"], manifest["commit"])
            if (weights or same) and not LabelFile(folder, manifest).missing():
                found.append(LabelFile(folder, manifest))
    if len({file.manifest["key"]["weights"] for file in found}) > 1:
        raise UserError(f"{cache} holds labels of several teachers named {request.teacher}; put its weights at hand")
    return found[0] if found else None


def begin_labels(folder, key, teacher, windows, judged, request, block, baselines, say, processes):
    """Write the manifest of a new label file, unless one is begun. The teacher's patch size is chosen on `judged`."""
    old = read_manifest(folder)
    if old and set(windows.freqs) <= old["patch_sizes"].keys():
        say.note(f"going on with the unfinished labels in {folder}")
        return
    shutil.rmtree(folder, ignore_errors=True)  # what a damaged manifest left
    judged = judged if {*windows.freqs} <= {*judged.freqs} else windows
    patches, seconds = judge(teacher, judged, request, baselines, say)
    commit = model_file(request.teacher, request.revision, "config.json").parent
    free = not request.teacher.lower().startswith("salesforce/")
    manifest = {"key": key, "block": block, "patch_sizes": patches, "teacher": request.teacher}
    manifest |= {"revision": request.revision, "commit": commit.name if commit.parent.name == "snapshots" else None}
    manifest |= {"licence": f"see {request.teacher}" if free else "CC-BY-NC-4.0, for non-commercial use only"}
    manifest |= {"device": str(teacher.device), "precision": teacher.precision, "torch": str(torch.__version__)}
    with atomic(folder / "manifest.json", replace=False) as file:  # where two runs begin at once, the first decides
        file.write(json.dumps(manifest | {"made": time.strftime("%F %T")}, indent=1, ensure_ascii=False).encode())
    say("Patch size: {}", "教师 patch 大小: {}", ", ".join(f"{freq or '?'}: {n}" for freq, n in patches.items()))
    text = "Labelling {:,} windows, {:.1f} MB, about {:.1f} min", "标注 {:,} 个窗口，{:.1f} MB，约 {:.1f} 分钟"
    seconds *= len(windows) / min(processes, math.ceil(len(windows) / block))  # each process labels whole blocks
    say(*text, len(windows), 4e-6 * len(windows) * windows.horizon, seconds / 60)


def get_labels(windows, request, load, cache, block, baselines, fabric, say, stop, judged=None):
    """LabelFile of `windows`: from the cache, or made by the Teacher that `load()` gives, shared by all processes.
    `judged` are the training windows where `windows` are not. Raises Interrupted between two blocks, which stay."""
    cache = Path(cache).expanduser()
    key = {"data": windows.digest, "windows": len(windows), "horizon": windows.horizon, "format": FORMAT}
    key |= {"context": windows.length - windows.horizon, "patch": request.patch, "point": request.point}
    key["samples"] = request.samples if request.point == "median" else None
    file = on_first(fabric, lambda: find_labels(cache, key, request))
    if file:
        say("Label cache hit, no teacher call: {}", "标签缓存命中，无需调用教师: {}", file.folder)
    else:
        require(not unwritable(cache), f"--label_cache: {unwritable(cache)}, and the labels are not in it")
        loaded = []  # the first process may have to fetch the teacher for all
        on_first(fabric, lambda: loaded.append(load()))
        teacher = loaded[0] if loaded else load()
        key["weights"] = fingerprint(request.teacher, request.revision)
        folder, asked = key_folder(cache, key), (request, block, baselines, say, fabric.world_size)
        on_first(fabric, lambda: begin_labels(folder, key, teacher, windows, judged or windows, *asked))
        file = LabelFile(folder, read_manifest(folder))
        missing, patches = on_first(fabric, file.missing), file.manifest["patch_sizes"]
        total = sum(len(file.index(number)) for number in missing)
        with stop.hold(), tqdm(total=total, desc="labelling", unit="window", disable=not say.on) as bar:
            for first in range(0, len(missing), fabric.world_size):  # each process labels one block of them
                blocks = missing[first : first + fabric.world_size]
                for number in blocks[fabric.global_rank : fabric.global_rank + 1]:
                    file.write(number, label_windows(teacher, windows, file.index(number), patches, request, number))
                bar.update(sum(len(file.index(number)) for number in blocks))
                if signum := int(fabric.all_reduce(torch.tensor(float(stop.signum)), reduce_op="max")):
                    say.note(f"the labels made so far are kept in {file.folder}")
                    raise Interrupted(signum)
    on_first(fabric, file.join)
    return file.open()


# == 6  Loss and metrics: the blend, naive forecasts, one ruler for every forecaster ===================================


def blend(forecast, truth, observed, label, weight):
    """Sums (4,) over observed points: weight * squared error to label + (1 - weight) * that to truth; squared error to
    truth; to label; points labelled. All are (B, H), but weight (B, 1): alpha, or 0 where a window has no label."""
    labelled, to_truth, to_label = observed * (weight > 0), (forecast - truth) ** 2, (forecast - label) ** 2
    blended = ((weight * to_label + (1 - weight) * to_truth) * observed).sum()
    return torch.stack([blended, (to_truth * observed).sum(), (to_label * labelled).sum(), labelled.sum()])


def last_value(context, _season, horizon):
    """Forecast (B, H): the last point of each context (B, L), repeated."""
    return context[:, -1:].expand(-1, horizon)


def seasonal_naive(context, season, horizon):
    """Forecast (B, H): the last `season` (B,) points of each context (B, L), repeated; the last one if L is less."""
    length = context.shape[1]
    period = torch.where(season <= length, season, 1)[:, None]
    return context.gather(1, length - period + torch.arange(horizon) % period)


def seasonal_scale(context, season):
    """MASE's unit (B, 1) float64: mean absolute seasonal difference in each context (B, L); 0 where there is none."""
    context, earlier = context.double(), torch.arange(context.shape[1]) - season[:, None]  # (B, L) each
    difference = (context - context.gather(1, earlier.clamp(min=0))).abs() * (earlier >= 0)
    return difference.sum(1, keepdim=True) / (earlier >= 0).sum(1, keepdim=True).clamp(min=1)


def reduced(fabric, values, operation="sum"):
    """`values` reduced over all processes, on the CPU."""
    return values if fabric.world_size == 1 else fabric.all_reduce(values, reduce_op=operation).cpu()


def score(forecast, windows, batch_size, fabric, progress):
    """Errors of `forecast(index, context (B, L)) -> (B, H)` over all windows and observed points, nan without any: mse,
    mae in deviations of the train rows; mase, by seasonal-naive's MAE in the context, 0 left out. Sums are float64."""
    steps, series = torch.zeros(5, windows.horizon).double(), torch.zeros(2, len(windows.seasons)).double()
    mine, left_out = np.arange(fabric.global_rank, len(windows), fabric.world_size), torch.zeros(1).double()
    for start in tqdm(range(0, len(mine), batch_size), "scoring", leave=False, disable=not progress):
        index = mine[start : start + batch_size]
        context, target, observed = windows.batch(index)
        error = (forecast(index, context) - target).double().abs() * observed
        scale = seasonal_scale(context, windows.season(index))
        scaled, known = torch.where(scale > 0, error / scale, 0.0), observed * (scale > 0)
        steps += torch.stack([part.sum(0) for part in (error**2, error, scaled, observed, known)])
        sums = torch.stack([(error**2).sum(1), observed.double().sum(1)])
        series.index_add_(1, torch.from_numpy(windows.series[index]), sums)
        left_out += (scale == 0).sum()
    steps, series, left_out = (reduced(fabric, part) for part in (steps, series, left_out))
    squared, absolute, scaled, count, known = steps.sum(1).tolist()
    result = {"mse": squared / count, "mae": absolute / count, "mase": scaled / known if known else math.nan}
    result |= {"mase_left_out": int(left_out), "mse_by_step": (steps[0] / steps[3]).tolist()}
    return result | {"mae_by_step": (steps[1] / steps[3]).tolist(), "mse_by_series": (series[0] / series[1]).tolist()}


# == 7  Training: the loop =============================================================================================

EVAL_BATCH = 512
MAX_FAILED = 10  # steps in a row with a non-finite loss or gradient that end the run
RUN_FILES = ("last.pt", "best_model_epoch_*.pt", "metrics.jsonl", "*.png", "tensorboard", "evaluation.json")
RUN_FILES += ("student.onnx", "hub", "trials")


def stream(*facts):
    """A number, a function of `facts`, to seed by: no random state is kept, and a run goes on as if never stopped."""
    return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:7])


def forecaster(model, fabric):
    """`forecast(index, context)` of a student, for `score`."""
    return torch.inference_mode()(lambda _index, context: model.eval()(fabric.to_device(context)).cpu())


def augmented(batch, seed):
    """Windows (context (B, L), and as for `blend`) plus a random share of others, half mirrored; labels move along."""
    drawn, rows = torch.Generator().manual_seed(seed), len(batch[0])
    order, share = torch.randperm(rows, generator=drawn), torch.rand(rows, 1, generator=drawn)
    factor = (1 - 2 * torch.randint(2, (rows, 1), generator=drawn)) / (1 + share**2).sqrt()  # no larger than the parts
    context, truth, label = (factor * (part + share * part[order]) for part in (batch[0], batch[1], batch[3]))
    return context, truth, batch[2] * batch[2][order], label, torch.minimum(batch[4], batch[4][order])


def train_epoch(fabric, model, average, optimizer, windows, labels, run, loop, stop, progress):
    """The steps of one epoch from loop["step"] on; adds to loop["sums"]. Returns early when a signal came. Each process
    takes its share of every batch. `average` becomes the weights' mean over about the last ninth of all steps."""
    rank, world, epoch = fabric.global_rank, fabric.world_size, loop["epoch"]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(stream(run["seed"], epoch))).numpy()
    steps = math.ceil(len(windows) / run["batch_size"])
    bar = tqdm(total=steps, initial=loop["step"], desc=f"epoch {epoch + 1}", leave=False, disable=not progress)
    model.train()
    while loop["step"] < steps and not loop["stopping"]:
        index = order[loop["step"] * run["batch_size"] :][: run["batch_size"]]
        label, finite = labels.batch(index) if labels else torch.zeros(2, len(index), 1)  # of weight 0
        batch = (*windows.batch(index), label, run["alpha"] * finite)
        batch = augmented(batch, stream(run["seed"], epoch, loop["step"])) if run["augment"] == "on" else batch
        points = float(batch[2].sum()) or 1.0  # over all processes
        own = slice(rank, None, world) if len(index) > rank else slice(1)  # one without a window joins the step
        batch = [fabric.to_device(part[own]) for part in batch]
        batch[2] = batch[2] * (len(index) > rank)
        torch.manual_seed(stream(run["seed"], epoch, loop["step"], rank))  # dropout
        sums = blend(model(batch[0]), *batch[1:])
        optimizer.zero_grad()
        fabric.backward(sums[0] * (world / points))  # gradients are averaged over the processes
        norm = fabric.clip_gradients(model, optimizer, max_norm=run["max_grad_norm"], error_if_nonfinite=False)
        seen = torch.cat([sums.detach(), norm[None]]).cpu().double()  # the only sync point of a step
        failed = bool(reduced(fabric, (~seen.isfinite()).any().double(), "max"))
        loop["stopping"] = int(reduced(fabric, torch.tensor(float(stop.signum)), "max"))
        loop["step"] += 1
        loop["failed"], loop["skipped"] = (loop["failed"] + 1) * failed, loop["skipped"] + failed
        if not failed:
            optimizer.step()
            for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(weight.detach(), 9 / (10 + epoch * steps + loop["step"]))
            loop["sums"] = [*map(sum, zip(loop["sums"], (*reduced(fabric, seen[:4]).tolist(), points), strict=True))]
        if loop["failed"] >= MAX_FAILED:
            what = f"{MAX_FAILED} steps in a row with a non-finite loss or gradient in epoch {epoch + 1}"
            raise UserError(f"{what}; try a lower --learning_rate; the best checkpoint so far is kept")
        bar.update()
    bar.close()


def end_epoch(loop, validation, rate, seconds, epochs, say):
    """Close an epoch: print its metrics, add them to the history, and whether it is the best so far to the state."""
    blended, truth, label, labelled, points = loop["sums"]
    line = {"epoch": loop["epoch"] + 1, "train_loss": blended / (points or math.nan)}
    line |= {"train_mse": truth / (points or math.nan), "train_distill": label / labelled if labelled else None}
    line |= {f"validation_{name}": validation[name] for name in ("mse", "mae", "mase")}
    loop["history"].append(line | {"learning_rate": rate, "skipped_steps": loop["skipped"]})
    distill = "-" if line["train_distill"] is None else f"{line['train_distill']:.4f}"
    english = "Training loss: {:.4f} (MSE: {:.4f}, Distill: {})\nValidation loss: {:.4f}"
    chinese = "训练损失: {:.4f} (MSE: {:.4f}, Distill: {})\n验证损失: {:.4f}"
    say(english, chinese, line["train_loss"], line["train_mse"], distill, validation["mse"])
    text = "Learning rate: {:.1e}, {:.0f} s, {:.1f} min to go", "学习率: {:.1e}，{:.0f} 秒，剩 {:.1f} 分钟"
    say(*text, rate, seconds, seconds * (epochs - line["epoch"]) / 60)
    if loop["skipped"]:
        say.note(f"{loop['skipped']} steps with a non-finite loss or gradient were skipped")
    loop.update(epoch=line["epoch"], step=0, sums=[0.0] * 5, skipped=0, since_best=loop["since_best"] + 1)
    if validation["mse"] < loop["best_loss"]:
        name = f"best_model_epoch_{line['epoch']}.pt"
        loop.update(best_epoch=line["epoch"], best_loss=validation["mse"], best_file=name, since_best=0)


def fit(fabric, student, train, validation, labels, run, content, facts, folder, stop, say):
    """Train `student` in place; leave the best checkpoint (by validation MSE against truth), last.pt and metrics in
    `folder`. Returns the loop's state. `content`: the last.pt to go on from or None; `facts`: for every checkpoint."""
    from torch.utils.tensorboard import SummaryWriter  # not at the top: only training needs it

    settings = {"lr": run["learning_rate"], "weight_decay": run["weight_decay"]}
    optimizer = torch.optim.AdamW(student.parameters(), **settings, fused=fabric.device.type in ("cpu", "cuda"))
    model, wrapped = fabric.setup(student, optimizer)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    loop = {"epoch": 0, "step": 0, "sums": [0.0] * 5, "failed": 0, "skipped": 0, "history": []}
    loop |= {"best_epoch": 0, "best_loss": math.inf, "best_file": "", "since_best": 0, "stopping": 0}
    average = copy.deepcopy(student).requires_grad_(False)  # this is what forecasts
    parts = {"model_state_dict": average, "training_state_dict": student}
    parts |= {"optimizer_state_dict": optimizer, "scheduler_state_dict": scheduler}
    if content:
        loop = content["loop"] | {"stopping": 0}
        for name, part in parts.items():
            part.load_state_dict(content[name])

    def save(best):
        line = loop["history"][-1] if loop["history"] else {}
        metrics = {f"{p}_metrics": {k: v for k, v in line.items() if k.startswith(p)} for p in ("train", "validation")}
        made = facts | {name: part.state_dict() for name, part in parts.items()} | metrics
        for name in [loop["best_file"]] * best + ["last.pt"]:
            with atomic(folder / name) as file:
                torch.save(made | {"epoch": loop["epoch"], "loop": loop}, file)
        if best:
            say("Saved best model: {}", "保存最佳模型: {}", f"{run['save_dir']}/{loop['best_file']}")
        if line:  # a line per epoch, and the same numbers as TensorBoard events, both from the whole history
            with atomic(folder / "metrics.jsonl") as file:
                file.write("".join(json.dumps(row) + "\n" for row in loop["history"]).encode())
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            with SummaryWriter(folder / "tensorboard") as writer:
                for row, name in [(row, name) for row in loop["history"] for name in line if row[name] is not None]:
                    writer.add_scalar(name, row[name], row["epoch"])
        for path in folder.glob("best_model_epoch_*.pt"):
            path.unlink() if path.name != loop["best_file"] else None

    with stop.hold():
        on_first(fabric, lambda: save(best=False))
        while loop["epoch"] < run["num_epochs"] and not 0 < run["patience"] <= loop["since_best"]:
            begin = time.perf_counter()
            say("\nEpoch {}/{}", "\nEpoch {}/{}", loop["epoch"] + 1, run["num_epochs"])
            train_epoch(fabric, model, average, wrapped, train, labels, run, loop, stop, say.on)
            if not loop["stopping"]:
                result = score(forecaster(average, fabric), validation, EVAL_BATCH, fabric, say.on)
                rate, seconds = optimizer.param_groups[0]["lr"], time.perf_counter() - begin
                end_epoch(loop, result, rate, seconds, run["num_epochs"], say)
                scheduler.step(result["mse"])
            on_first(fabric, lambda: save(best=not loop["stopping"] and loop["since_best"] == 0))
            if signum := int(reduced(fabric, torch.tensor(float(stop.signum)), "max")):
                say.note(f"saved {folder / 'last.pt'}; the same command with --resume goes on from here")
                raise Interrupted(signum)
    return loop


# == 8  Commands: the only functions that see `args` ===================================================================

MAY_CHANGE = {"resume", "num_epochs", "device", "devices", "num_nodes", "label_cache", "lang"}  # on --resume
KEPT_FROM, SOURCE = 2**24, Path(__file__).read_bytes()  # bytes of CSVs that are worth a parsed copy; what parsed them
ALPHAS, TRIAL_EPOCHS = (0.0, 0.25, 0.5, 0.75, 1.0), 3  # of --alpha auto
BASELINES = {"seasonal-naive": seasonal_naive, "last value": last_value}


def write_demo_csvs(folder, files=20, rows=1500):
    """Write synthetic hourly CSVs: daily and weekly cycles of random shape, a slow drift, autoregressive noise."""
    for number in range(files):
        rng = np.random.default_rng(1000 + number)
        value, noise = rng.normal(0, 0.015, rows).cumsum() + rng.uniform(-5, 5), rng.normal(0, 0.25, rows)
        for t in range(1, rows):
            noise[t] += 0.7 * noise[t - 1]
        for period, harmonic in itertools.product((24, 168), range(1, 5)):
            angle = 2 * np.pi * (harmonic * np.arange(rows) / period + rng.random())
            value += rng.normal(0, (1.0 if period == 24 else 0.6) / harmonic) * np.sin(angle)
        values = (10 ** rng.uniform(-1, 3) * (value + noise)).round(6)
        frame = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=rows, freq="h"), "value": values})
        with atomic(Path(folder, f"series_{number:02d}.csv")) as file:
            file.write(frame.to_csv(index=False).encode())


def start_fabric(args, precision, say):
    """Launched Fabric of the arguments. With several processes this starts the others, so it comes first."""
    from lightning.fabric import Fabric  # not at the top: it takes seconds, and forecasting does not need it

    kind, _, index = args.device.partition(":")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if kind == "auto" else kind
    settings = {"devices": [int(index)] if index else args.devices, "num_nodes": args.num_nodes, "precision": precision}
    fabric = Fabric(accelerator=kind, strategy="ddp" if args.devices * args.num_nodes > 1 else "auto", **settings)
    fabric.launch()
    say.on = fabric.is_global_zero
    if args.device == "auto" and kind == "cpu":
        say.note("no CUDA GPU found: this runs on the CPU")
    return fabric


def read_once(args, say):
    """As `read_files`. What is parsed of KEPT_FROM bytes and more is kept beside the labels, as plain data, and comes
    from there as long as neither files nor flags nor pandas nor this script have changed."""
    listed, cache = find_files(args.data_dir, args.max_files), Path(args.label_cache).expanduser()
    files = [(name, os.stat(path)) for name, path in listed[1].items() if os.path.isfile(path)]
    stats = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in files]
    state = stream([*listed[1]], stats, pd.__version__, SOURCE)
    place = cache / f"parsed-{stream(Path(args.data_dir).expanduser().absolute(), args.columns):x}.pt"
    large = sum(size for _, size, *_ in stats) >= KEPT_FROM and not unwritable(cache)
    try:
        kept = read_plain(place, {"state", "series", "remarks"}, True) if large and place.is_file() else {"state": None}
        if kept["state"] == state:
            series = {n: [Series(i[0], i[1].numpy(), *i[2:]) for i in v] for n, v in kept["series"].items()}
            return listed[0], series, dict(kept["remarks"])
    except (UserError, TypeError, ValueError, AttributeError) as error:
        say.note(f"{error}: the files are read anew")
    kept, (found, series, remarks) = None, read_files(args.data_dir, args.max_files, args.columns, say.on, listed)
    if large and say.on and not re.search(r"\[Errno|out of memory", repr(remarks)):
        data = {n: [(i.name, torch.as_tensor(i.values), i.freq, None, i.column) for i in v] for n, v in series.items()}
        with contextlib.suppress(UserError), atomic(place) as file:  # a full disk: it does without
            torch.save({"state": state, "series": data, "remarks": remarks}, file)
    return found, series, remarks


def load_data(args, say):
    """part -> Windows of the arguments; prints what was found, used and skipped."""
    english = "Data directory: {}\nContext length: {}\nPrediction length: {}\n\nCreating datasets..."
    chinese = "数据目录: {}\n上下文长度: {}\n预测长度: {}\n\n创建数据集..."
    say(english, chinese, args.data_dir, args.context_length, args.prediction_length)
    found, series, remarks = read_once(args, say)
    say("Found {} CSV files", "找到 {} 个 CSV 文件", found)
    if len(remarks) < found:
        say.note(f"only the first {len(remarks)} by name are read (--max_files {args.max_files}; 0 = all)")
    length = args.context_length + args.prediction_length
    limits = {"length": length, "horizon": args.prediction_length, "max_gap": args.max_gap}
    split = (args.split_by, args.split_ratio, args.split_seed, args.stride, args.max_windows, args.season)
    parts, files, by, remarks = split_data(series, remarks, *split, limits)
    for part, count in files.items():
        say("Using {} files for the {} set", "使用 {} 个文件用于 {} 集", count, part)
    say("Split by {}", "划分方式: {}", by)
    for name in [name for name, remark in remarks.items() if remark]:
        say("  {}: {}", "  {}: {}", name, remarks[name])
    if args.max_windows and args.max_windows in np.bincount(parts["train"].series):
        say.note(f"at most {args.max_windows} training windows of each series, spread over it (--max_windows; 0 = all)")
    english = "Datasets loaded: {:,} samples\n  validation {:,}, test {:,}"
    say(english, "数据集加载完成: {:,} 个样本\n  验证 {:,}，测试 {:,}", *map(len, parts.values()))
    if args.season == "auto" and "" in parts["train"].freqs:
        say.note("files without timestamps are taken as hourly: season 24 (--season changes it)")
    return parts


def labels_of(windows, args, patch, fabric, say, stop, judged=None):
    """LabelFile of `windows` by the teacher of the arguments, with `patch` as its patch size or sizes."""
    device = torch.device("cpu") if fabric.device.type == "mps" else fabric.device  # the scaler needs float64
    names = (args.teacher_model, args.teacher_revision)
    request = Request(*names, patch, args.teacher_point, args.num_samples)
    say("\nLoading teacher...", "\n加载教师模型...")

    def load():
        say("Loading teacher: {}", "加载教师模型: {}", args.teacher_model)
        teacher = load_teacher(*names, device, args.teacher_precision if device.type == "cuda" else "32", say.note)
        say("Teacher loaded", "教师模型加载成功")
        return teacher

    block = args.teacher_batch_size
    labels = get_labels(windows, request, load, args.label_cache, block, BASELINES, fabric, say, stop, judged)
    if labels.damaged:
        say.note(f"{labels.damaged} windows have a non-finite label; where they train, they train on truth alone")
    return labels


def resumed(folder, args, facts):
    """The last.pt in `folder` to go on from. Raises UserError with all that does not fit."""
    path = folder / "last.pt"
    content, now = read_checkpoint(path), facts["run_config"]
    before, names = content["run_config"], sorted(now.keys() - MAY_CHANGE)
    differ = [f"--{name} was {before.get(name)}, is {now[name]}" for name in names if before.get(name) != now[name]]
    differ += ["the data is not the same"] * (content["data"] != facts["data"])
    weights = fingerprint(args.teacher_model, args.teacher_revision) if now["alpha"] != 0 else None
    if weights and content["teacher"] and weights != content["teacher"]["key"]["weights"]:
        differ.append("the teacher's weights are not the same")
    require(not differ, "\n  ".join([f"--resume: {path} does not fit this command", *differ]))
    return content


def move_old_run(folder, say):
    """Move an earlier run's files in `folder` to folder/old-TIME: a run never destroys another."""
    if old := [path for pattern in RUN_FILES for path in folder.glob(pattern)]:
        stamp = time.strftime("old-%Y%m%d-%H%M%S")
        target = next(n for i in itertools.count() if not (n := folder / (stamp + f"-{i}" * (i > 0))).exists())
        target.mkdir()
        for path in old:
            path.rename(target / path.name)
        say.note(f"an earlier run lay in {folder}; its files are now in {target}")


def draw_forecasts(path, panels):
    """Picture of panels: (title, steps (T,), known values (T,) or none, steps (H,), {name: forecast or curve (H,)})."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.5 + 2.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (title, steps, known, ahead, forecasts) in zip(axes, panels, strict=True):
        axis.plot(steps, known, color="0.6", label="known" if len(known) else "")
        for name, forecast in forecasts.items():
            axis.plot(ahead, forecast, label=name[-40:], linewidth=1.2)
        axis.set_title(title, fontsize="small")
    axes[0].legend(ncols=3, loc="upper left", fontsize="small")
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)


def burden(weights, call, *asked):
    """Parameters, bytes as a weights file, and median CPU milliseconds of `call(*asked)`, one forecast, warmed up."""
    from safetensors.torch import save
    from torch.utils.benchmark import Timer

    timer = Timer("call(*asked)", globals={"call": call, "asked": asked}, num_threads=torch.get_num_threads())
    sizes = {"parameters": sum(map(torch.numel, weights.values())), "bytes": len(save(weights))}
    return sizes | {"cpu_ms": 1e3 * timer.blocked_autorange().median}


def verdict(rows, say):
    """Say what each distilled student keeps of its teacher, and whether the teacher helped it."""
    naive, teacher = rows["seasonal-naive"]["mse"], rows.get("teacher", {"mse": math.nan})["mse"]
    twin = min((n for n, row in rows.items() if row.get("alpha") == 0), key=lambda n: rows[n]["mse"], default=None)
    for name, row in [(name, row) for name, row in rows.items() if row.get("alpha")]:
        if max(teacher, row["mse"]) < naive:
            english, kept = "{} keeps {:.0f} % of what the teacher gains over seasonal-naive", naive - row["mse"]
            say(english, "{} 保留了教师相对季节性朴素预测的 {:.0f} % 优势", name, 100 * kept / (naive - teacher))
        if not twin:
            english = "Whether the teacher helped {} shows beside a twin: train one with --alpha 0, and evaluate both"
            say(english, "要知道教师是否帮助了 {}: 用 --alpha 0 再训练一个学生，一起 evaluate", name)
            continue
        change = 100 * (row["mse"] / (rows[twin]["mse"] or math.nan) - 1)
        lower = sum(m < t for m, t in zip(row["mse_by_series"], rows[twin]["mse_by_series"], strict=True))
        words = ("The teacher helped", "教师有帮助") if change < -1 else ("The teacher did harm", "教师有害")
        words = words if abs(change) >= 1 else ("The teacher made no difference", "教师没有明显作用")
        english = words[0] + ": {} has {:+.1f} % of MSE beside {} (alpha 0), and a lower one on {} of {} series"
        chinese = words[1] + ": {} 的 MSE 变化 {:+.1f} % (相对 alpha 0 的 {})，更低的序列有 {} / {} 个"
        say(english, chinese, name, change, twin, lower, len(row["mse_by_series"]))


def compare(students, args, parts, patch, folder, fabric, say, stop):
    """Score name -> (student, its checkpoint), naive forecasts and, given `patch`, the teacher on all test windows."""
    test, copies = parts["test"], {name: copy.deepcopy(student) for name, (student, _) in students.items()}
    forecasts = {name: forecaster(student.to(fabric.device), fabric) for name, student in copies.items()}
    if patch:
        labels = labels_of(test, args, patch, fabric, say, stop, parts["train"])
        forecasts["teacher"] = lambda index, _context: torch.from_numpy(np.array(labels.array[index]))
    for name, naive in BASELINES.items():
        forecasts[name] = lambda index, context, naive=naive: naive(context, test.season(index), test.horizon)
    rows = {name: score(forecast, test, EVAL_BATCH, fabric, say.on) for name, forecast in forecasts.items()}
    if not fabric.is_global_zero:
        return
    context = test.batch(np.arange(1))[0]
    for name, (student, content) in students.items():
        rows[name] |= burden(content["model_state_dict"], torch.inference_mode()(student), context)
        rows[name] |= {"alpha": content.get("run_config", {}).get("alpha"), "weights": content["weights"]}
    if patch and fingerprint(args.teacher_model, args.teacher_revision):  # else the labels were carried here
        teacher = load_teacher(args.teacher_model, args.teacher_revision, "cpu", "32", say.note)
        size = labels.manifest["patch_sizes"][test.freqs[test.series[0]]]
        asked = (test.horizon, size, args.teacher_point, args.num_samples)
        rows["teacher"] |= burden(teacher.module.state_dict(), teacher.forecast, context, *asked)
    say("\nTest error on {:,} windows:", "\n{:,} 个测试窗口上的误差:", len(test))
    for name, row in rows.items():
        line = f"  {name:<{max(map(len, rows))}}  MSE {row['mse']:.4f}  MAE {row['mae']:.4f}  MASE {row['mase']:.4f}"
        if "bytes" in row:
            line += f"{row['parameters']:>12,} parameters {1e-6 * row['bytes']:>6.1f} MB {row['cpu_ms']:>6.1f} ms (CPU)"
        say("{}", "{}", line)
    verdict(rows, say)
    table = {"windows": len(test), "test": test.digest, "series": test.names, "cpu_threads": torch.get_num_threads()}
    table |= {"context_length": test.length - test.horizon, "prediction_length": test.horizon, "rows": rows}
    with atomic(folder / "evaluation.json") as file:
        file.write(json.dumps(json.loads(json.dumps(table), parse_constant=lambda _: None), indent=1).encode())
    steps, shown = np.arange(1, test.horizon + 1), 2 * test.horizon
    curves = {name: row["mse_by_step"] for name, row in rows.items() if name != "last value"}
    draw_forecasts(folder / "error_by_horizon.png", [("MSE by step of the horizon", [], [], steps, curves)])
    index, panels = np.linspace(0, len(test) - 1, 5).astype(np.int64)[1:-1], []
    context, truth, _ = test.batch(index)
    drawings = {name: forecasts[name](index, context) for name in curves}
    for row, series in enumerate(test.series[index]):
        known, guesses = torch.cat([context[row, -shown:], truth[row]]), {name: v[row] for name, v in drawings.items()}
        panels.append((test.names[series], test.horizon + 1 + np.arange(-len(known), 0), known, steps, guesses))
    draw_forecasts(folder / "forecast.png", panels)
    say("Table and pictures: {}", "表格与图片: {}", folder)


def choose_alpha(distil, epochs, folder, say):
    """(alpha with the lowest validation loss, alpha -> that loss) of students that `distil(folder, alpha)` trains."""
    epochs, tried = min(TRIAL_EPOCHS, epochs), {}
    say("\nTrying each alpha for {} epochs:", "\n每个 alpha 试训 {} 个 epoch:", epochs)
    for alpha in ALPHAS:
        say.muted = True  # but for the progress
        tried[alpha] = distil(folder / "trials" / f"{alpha:g}", alpha, num_epochs=epochs, patience=0)["best_loss"]
        say.muted = False
        say("  alpha {:g}: validation loss {:.4f}", "  alpha {:g}: 验证损失 {:.4f}", alpha, tried[alpha])
    require(math.isfinite(min(tried.values())), "no alpha gave a finite validation loss; try a lower --learning_rate")
    best, second = sorted(tried, key=tried.get)[:2]
    rival = 0.0 if best else second
    english = "Best: alpha {:g}, {:+.1f} % of validation loss beside alpha {:g}"
    chinese = "最好: alpha {:g}，验证损失 {:+.1f} % (相对 alpha {:g})"
    say(english, chinese, best, 100 * (tried[best] / (tried[rival] or math.nan) - 1), rival)
    if not best:
        say("The teacher does not help here: this trains on truth alone", "教师在这里没有帮助: 只用真值训练")
    return best, tried


def train(args, say, stop):
    """Label the training windows (unless alpha is 0), train the student, score it on the test windows."""
    fabric = start_fabric(args, args.precision, say)
    if args.demo and args.data_dir == DEMO["data_dir"]:
        on_first(fabric, lambda: write_demo_csvs(args.data_dir))
    parts = load_data(args, say)
    sizes = ("context_length", "prediction_length", "d_model", "num_layers", "num_heads", "patch_size", "dropout")
    facts = {"format": FORMAT, "student_config": {n: vars(args)[n] for n in sizes}, "run_config": dict(vars(args))}
    facts["student_config"]["season"] = int(np.bincount(parts["train"].seasons).argmax())  # of most series
    facts["versions"] = {"python": sys.version.split()[0], "torch": str(torch.__version__), "numpy": np.__version__}
    facts |= {"data": {part: w.digest for part, w in parts.items()}, "freqs": sorted({*parts["train"].freqs})}
    facts["counts"] = {part: [len(windows.names), len(windows)] for part, windows in parts.items()}
    folder, validation = Path(args.save_dir).expanduser(), parts["validation"]
    alpha, ahead = args.alpha, args.resume and (folder / "last.pt").is_file()  # beyond the trials of --alpha auto
    tried = read_checkpoint(folder / "last.pt").get("alpha_tried") if ahead else None
    alpha = min(tried, key=tried.get) if tried and alpha == "auto" else alpha
    facts |= {"run_config": facts["run_config"] | {"alpha": alpha}, "alpha_tried": tried}
    _ = resumed(folder, args, facts) if ahead else None  # what does not fit is refused before anything slow
    labels = labels_of(parts["train"], args, args.teacher_patch_size, fabric, say, stop) if alpha != 0 else None
    say("\nCreating student...", "\n创建学生模型...")

    def distil(folder, alpha, **changes):
        """The loop's state of a student trained in `folder`; with --resume it goes on from the last.pt there."""
        run = facts["run_config"] | {"alpha": alpha} | changes
        own = facts | {"run_config": run, "teacher": labels.manifest if labels and alpha else None}
        content = resumed(folder, args, own) if args.resume and (folder / "last.pt").is_file() else None
        if content and content["teacher"] and content["teacher"]["key"] != own["teacher"]["key"]:
            raise UserError(f"--resume: {folder} was trained on labels of other weights of this teacher")
        torch.manual_seed(args.seed)
        student, used = PatchStudent(**facts["student_config"]), labels if alpha else None
        return fit(fabric, student, parts["train"], validation, used, run, content, own, folder, stop, say)

    size = sum(weight.numel() for weight in PatchStudent(**facts["student_config"]).parameters())
    say("Student parameters: {:,}", "学生模型参数量: {:,}", size)
    on_first(fabric, lambda: None if args.resume else move_old_run(folder, say))
    naive = lambda index, context: seasonal_naive(context, validation.season(index), validation.horizon)  # noqa: E731
    floor = score(naive, validation, EVAL_BATCH, fabric, say.on)["mse"]
    say("Validation loss of seasonal-naive: {:.4f}", "季节性朴素预测的验证损失: {:.4f}", floor)
    if alpha == "auto":
        alpha, facts["alpha_tried"] = choose_alpha(distil, args.num_epochs, folder, say)
    text = "\nTraining for {} epochs\nCheckpoints: {}", "\n开始训练，共 {} 个 epoch\n模型保存目录: {}"
    say(*text, args.num_epochs, args.save_dir)
    loop = distil(folder, alpha)
    on_first(fabric, lambda: args.alpha == "auto" and shutil.rmtree(folder / "trials", ignore_errors=True))
    require(loop["best_file"], "no epoch gave a finite validation loss; try a lower --learning_rate")
    if fabric.is_global_zero:
        history, title = pd.DataFrame(loop["history"]), "losses by epoch, in squared deviations of each series"
        curves = history[["train_loss", "train_mse", "train_distill", "validation_mse"]].astype(float)
        draw_forecasts(folder / "training.png", [(title, [], [], history["epoch"], curves)])
    say("\nBest epoch: {}, {}", "\n最佳 epoch: {}，{}", loop["best_epoch"], folder / loop["best_file"])
    patch = labels.manifest["patch_sizes"] if args.demo and labels else None  # as chosen on training windows
    compare({"student": open_student(folder / loop["best_file"])}, args, parts, patch, folder, fabric, say, stop)
    command = "python moirai_distill.py evaluate --with_teacher --checkpoint"
    say("\nNext: {} {}", "\n下一步: {} {}", command, shlex.quote(args.save_dir))


def evaluate(args, say, stop):
    """Score checkpoints on the test windows of the first one's run, or of other data that is split likewise."""
    students = {f"./{n}" if n in {"teacher", *BASELINES} else n: open_student(n) for n in args.checkpoint}
    lengths = {name: (student.context_length, student.prediction_length) for name, (student, _) in students.items()}
    name, (_, first) = next(iter(students.items()))
    lengths["the flags"] = (args.context_length or lengths[name][0], args.prediction_length or lengths[name][1])
    text = ", ".join(f"{name} {length} -> {horizon}" for name, (length, horizon) in lengths.items())
    require(len({*lengths.values()}) == 1, f"--checkpoint: these have no windows in common ({text}); give one of them")
    given = {flag: value for flag, value in vars(args).items() if value is not None}
    given |= dict(zip(("context_length", "prediction_length"), lengths[name], strict=True))
    defaults = vars(build_parser(demo=False).parse_args(["train"])) | {"data_dir": ""}
    owner = next((content for _, content in students.values() if content.get("teacher")), first)  # of the teacher
    asked = {k: v for k, v in owner.get("run_config", {}).items() if k.startswith("teacher_") or k == "num_samples"}
    run = argparse.Namespace(**defaults | first.get("run_config", {}) | asked | given)
    if not run.data_dir or not Path(run.data_dir).expanduser().exists():
        raise UserError(f"the data of {name} ({run.data_dir or 'it does not say where'}) is not here; give --data_dir")
    changed = {"data_dir", "columns", "max_files", "split_by", "split_ratio", "split_seed", "max_gap", "season"}
    own = "path" in first and not changed & given.keys()
    folder = Path(args.output_dir or (Path(first["path"]).parent if own else "evaluation")).expanduser()
    require(not unwritable(folder), f"{unwritable(folder)}; give --output_dir")
    fabric = start_fabric(args, "32-true", say)
    parts = load_data(run, say)
    for name, (_, content) in students.items():
        if content.get("data", {}).get("test") != parts["test"].digest:
            say.note(f"WARNING: these are not the test windows of {name}'s own run: it may have been trained on them")
    known = owner.get("teacher") and not args.teacher_patch_size
    patch = (owner["teacher"]["patch_sizes"] if known else run.teacher_patch_size) if args.with_teacher else None
    compare(students, run, parts, patch, folder, fabric, say, stop)


def tell_backtest(series, context, forecast, season, say):
    """Print the errors of a forecast (H,) of the last rows of `series` and of seasonal-naive, in its own units."""
    context, truth = torch.from_numpy(context)[None], series.values[-len(forecast) :]
    if not (known := np.isfinite(truth).any()):
        say.note(f"{series.name}: its last {len(truth)} values are missing, the forecast cannot be compared")
    season = torch.tensor([season_of(series.freq) if season == "auto" else season])
    scale = float(seasonal_scale(context, season)) or math.nan
    guesses = {"student": forecast, "seasonal-naive": seasonal_naive(context, season, len(forecast))[0].numpy()}
    for name, guess in guesses.items() if known else ():
        error = pd.Series(guess - truth).abs()  # its means leave out what is missing
        mae, rmse = error.mean(), (error**2).mean() ** 0.5
        say(*["  {}: {:<15} MAE {:.6g}  RMSE {:.6g}  MASE {:.4f}"] * 2, series.column, name, mae, rmse, mae / scale)


def predict(args, say, _stop):
    """Forecast the H steps after the end of each series of a CSV; with --backtest its last H steps, held out."""
    student, content = open_student(args.checkpoint)
    path, horizon, freqs = Path(args.input).expanduser(), student.prediction_length, content.get("freqs", [])
    run, held = content.get("run_config", {}), horizon if args.backtest else 0
    try:
        series, remarks = read_series(path, path.name, args.columns or run.get("columns", ["first"]))
    except Unusable as reason:
        raise UserError(f"--input {args.input}: {reason}") from reason
    rows = []
    for item in series:
        try:
            context, gaps, end = last_context(item.values[: len(item.values) - held], student.context_length)
        except Unusable as reason:
            remarks.append(f"skipped: {item.name}: {reason}")
            continue
        rows.append((item, context, continued(item, horizon, held)))
        step = f"its step is {item.freq or 'unknown'}, the student was trained on {', '.join(freqs) or 'unknown ones'}"
        carried = f"WARNING: {item.name}: its last {end} values are missing: the last known one is carried forward"
        remarks += [f"{item.name}: {gaps} missing values in the context are interpolated"] * (gaps > 0)
        remarks += [carried] * (end > 0) + [f"WARNING: {item.name}: {step}"] * (item.freq not in freqs)
    require(rows, f"--input {args.input}: no series to forecast\n  " + "\n  ".join(remarks[:20]))
    for remark in remarks[:20] + [f"… and {len(remarks) - 20} more such notes"] * (len(remarks) > 20):
        say.note(remark)
    contexts = torch.from_numpy(np.stack([context for _, context, _ in rows])).split(EVAL_BATCH)
    forecasts = torch.cat([torch.inference_mode()(student)(part) for part in contexts]).numpy()  # (series, H) float64
    rows = [(*row, forecast, held) for row, forecast in zip(rows, forecasts, strict=True)]
    if held:
        say("Error on the last {} steps, which were held out:", "在留出的最后 {} 步上的误差:", held)
        for item, context, _, forecast, _ in rows:
            tell_backtest(item, context, forecast, run.get("season", "auto"), say)
    columns = {item.column: pd.Series(forecast, index) for item, _, index, forecast, _ in rows}
    output = Path(args.output).expanduser()
    with atomic(output) as file:
        file.write(pd.concat(columns, axis=1, sort=True).rename_axis(rows[0][2].name).to_csv().encode())
    if args.plot:
        panels = []
        for item, _, index, forecast, _ in rows[:4]:
            known = item.values[-held - min(student.context_length, 2 * horizon) :]
            panels.append((item.column, continued(item, len(known), len(known)), known, index, {"forecast": forecast}))
        draw_forecasts(output.with_suffix(".png"), panels)
    say("Forecast: {}{}", "预测结果: {}{}", output, f", {output.with_suffix('.png')}" * args.plot)


def example_contexts(content, length):
    """Raw contexts (S, L) float32 at several scales, of the run's own data where it is at hand, else random walks."""
    run, contexts = content.get("run_config", {}), []
    if Path(run.get("data_dir", "/nowhere")).expanduser().exists():
        for item in itertools.chain(*read_files(run["data_dir"], 8, run["columns"], False)[1].values()):
            with contextlib.suppress(Unusable):  # too short, say: another one serves
                contexts.append(last_context(item.values, length)[0])
    contexts = contexts or list(np.random.default_rng(0).standard_normal((8, length)).cumsum(1))  # not at hand
    contexts = contexts[:32] + [context - context[-1] for context in contexts[:32]]  # offsets hide much in float32
    scaled = [context * scale for context, scale in itertools.product(contexts, (1e-3, 1, 1e3))]
    return torch.from_numpy(np.stack([*scaled, np.ones(length)])).float()


def export_onnx(student, path, contexts):
    """Write the student as ONNX if it forecasts `contexts` as PyTorch does; returns the largest difference."""
    import onnxruntime
    import onnxscript  # noqa: F401  torch.onnx needs it

    teacher = student.info.get("teacher") or {"teacher": "none", "licence": "no teacher was used"}
    facts = {"context_length": student.context_length, "prediction_length": student.prediction_length}
    facts |= {"sampling_frequency": ", ".join(student.info.get("freqs", [])), "teacher": teacher["teacher"]}
    settings = {"dynamic_shapes": {"context": {0: torch.export.Dim("batch")}}, "dynamo": True, "verbose": False}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that the student has no use for
    with torch.inference_mode():
        truth, names = student(contexts), {"input_names": ["context"], "output_names": ["forecast"]}
        program = torch.onnx.export(student, (contexts[:2],), **names, **settings)
    program.model.metadata_props.update({k: str(v) for k, v in (facts | {"licence": teacher["licence"]}).items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder, path.name)
        program.save(file, external_data=False)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        given = [session.run(None, {"context": part.numpy()})[0] for part in contexts.split([len(contexts) - 1, 1])]
        difference = (torch.from_numpy(np.concatenate(given)) - truth) / instance_scale(contexts)[1]
        difference = float(difference.abs().max())
        require(difference < 1e-4, f"{path}: not kept: it differs from PyTorch by {difference:.1e} deviations")
        os.replace(file, path)
    return difference


def read_scores(path, content):
    """Windows and rows of evaluation.json on a checkpoint's own test windows; None where it has none of its weights."""
    try:
        table, own = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}, {None, content["weights"]}
        rows = {name: row for name, row in table.get("rows", {}).items() if row.get("weights") in own}
        rows = {"student" if "weights" in row else name: row for name, row in rows.items()}
        rows = {name: {key: row[key] for key in ("mse", "mae", "mase")} for name, row in rows.items()}
        fits = "student" in rows and table["test"] == content["data"]["test"]
        return {"windows": table["windows"], "rows": rows} if fits else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); evaluate writes it anew") from error


def export(args, say, _stop):
    """Write a student as an ONNX file or as a folder for the hub."""
    student, content = open_student(args.checkpoint)
    base = Path(content["path"]).parent if "path" in content else Path(".")
    output = Path(args.output or base / {"onnx": "student.onnx", "hub": "hub"}[args.format]).expanduser()
    if args.format == "onnx":
        contexts = example_contexts(content, student.context_length)
        difference = export_onnx(student, output, contexts)
        english = "Largest difference from PyTorch on {} contexts: {:.1e} of their deviation"
        say(english, "与 PyTorch 在 {} 个上下文上的最大差异: {:.1e} 个标准差", len(contexts), difference)
    else:
        scores = read_scores(base / "evaluation.json", content)
        student.info.update({"evaluation": scores} if scores else {})
        names = {"config.json", "model.safetensors", "README.md"}
        if output.exists() and {path.name for path in output.iterdir() if path.name[0] != "."} - names:
            raise UserError(f"--output {output}: holds other files; choose another folder")
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
            student.save_pretrained(temporary)
            for name in names:
                os.replace(Path(temporary, name), output / name)
    say("Exported: {}", "已导出: {}", output)


def label(args, say, stop):
    """Label the training windows into the cache, or list what it holds."""
    if not args.list:
        fabric = start_fabric(args, "32-true", say)
        labels = labels_of(load_data(args, say)["train"], args, args.teacher_patch_size, fabric, say, stop)
        say("Labels of {:,} windows: {}", "{:,} 个窗口的标签: {}", labels.windows, labels.folder)
        return
    folders = sorted(Path(args.label_cache).expanduser().glob("*/"))
    if not folders:
        say("No label files in {}", "{} 中没有标签文件", args.label_cache)
    for folder in folders:
        manifest, line = read_manifest(folder), "its manifest is damaged"
        if manifest:
            file, facts = LabelFile(folder, manifest), manifest | manifest["key"]
            facts |= {"MB": 4e-6 * file.windows * file.horizon, "done": 100 - 100 * len(file.missing()) / file.count}
            line = "{teacher}, {windows:,} windows, {context} -> {horizon}, {point}, patch {patch_sizes}, {MB:.1f} MB"
            line = (line + ", {done:.0f} % made, {made}").format(**facts)
        say("{}: {}", "{}: {}", folder.name, line)


# == 9  Entry ==========================================================================================================


def main(argv=None):
    """Run the command line `argv` (default: sys.argv[1:]). Returns the exit code: 0, 2 on bad input, 128 + signal."""
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):  # a console that cannot print Chinese shows escapes
            output.reconfigure(errors="backslashreplace")
    stop, code = Stop(), 2
    handlers = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        commands = {"train": train, "evaluate": evaluate, "predict": predict, "export": export, "label": label}
        commands[args.command](args, Say(args.lang), stop)
        return 0
    except Interrupted as interruption:
        code, problem = 128 + interruption.args[0], f"stopped by {signal.Signals(interruption.args[0]).name}"
    except torch.OutOfMemoryError as error:
        problem = f"out of GPU memory ({str(error).splitlines()[0][:99]}); lower --batch_size or --teacher_batch_size"
    except ModuleNotFoundError as error:  # predicting takes few packages, pictures and exports take more
        problem = f"{error.name} is not installed: pip install -r requirements.txt, or pip install {error.name}"
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or 'input or output'}: {error.strerror or error}"
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one of several processes speaks for all
        print(problem if code > 2 else f"error: {problem}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
