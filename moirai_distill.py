#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.5,<2.14",
#     "timecopilot-uni2ts==0.1.3",
#     "lightning>=2.4,<2.7",
#     "huggingface_hub>=0.30,<3",
#     "safetensors>=0.4.3,<0.9",
#     "numpy>=1.26,<2.5",
#     "pandas>=2.2.2,<3",
#     "scikit-learn>=1.5,<1.10",
#     "matplotlib>=3.8,<3.12",
#     "tensorboard>=2.17,<2.22",
#     "tqdm>=4.66,<5",
# ]
# ///
#
# The lines above are for `uv run moirai_distill.py`: they repeat requirements.txt, which says why.
"""Distil MOIRAI, a large frozen time-series forecaster, into a small fast one for your own CSVs.

    python moirai_distill.py --demo                          # everything once, offline, in minutes
    python moirai_distill.py --data_dir FOLDER --alpha 0.5   # train; `train` may be left out
    python moirai_distill.py evaluate --checkpoint RUN       # one ruler for every forecaster
    python moirai_distill.py predict --checkpoint RUN --input CSV     # the next steps of a series
    python moirai_distill.py export --checkpoint RUN --format onnx    # or hub: a model to ship
    python moirai_distill.py label --data_dir FOLDER         # only make the labels, into the cache

The teacher is frozen and the windows are fixed, so its forecast is a function of the window: every
training window is labelled once, into a cache on disk, and no epoch, alpha, seed or student size
after that costs teacher time.

A map of the rooms. Parts stand above, programs below: a name is used only below the room that
defines it. To follow a run, begin at `train` in the room "commands" and go up from there.

    settings            flags and their defaults; numbers you may tune; what you must not touch
    voice               what is said, in English or Chinese, and the progress bars
    files and signals   atomic writes, safe reads, checkpoints, the hub, a clean stop
    reading             one CSV -> raw series on a regular grid
    series and windows  gaps, split, scaling, windows
    student             PatchStudent: (B, L) -> (B, H)
    loss and metrics    the loss, naive forecasts, one ruler for every forecaster
    teacher             a frozen MOIRAI: (B, L) -> (B, H)
    labels              the teacher's forecasts of all windows, made once and cached on disk
    training            the loop
    commands            train, evaluate, predict, export, label
    entry               checks of the arguments, main

Only commands and entry see `args`; what is below a command gets plain values, or a dataclass that
`pick` fills from the flags of the same names.

Shapes: B batch, L context length, H horizon (prediction length), N patches, P patch size, D width,
T rows of a series, W windows.
"""

import argparse
import bisect
import collections
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import difflib
import errno
import functools
import gzip
import hashlib
import importlib
import io
import itertools
import json
import locale
import logging
import math
import multiprocessing
import os
import pickletools
import re
import reprlib
import shlex
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
import traceback
import types
import unicodedata
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PureWindowsPath

if __name__ == "__main__" and os.environ.get("LOCAL_RANK", "0") != "0" and "RANK" not in os.environ:
    # One of the further processes of --devices: it ends with the one that started it, whatever it
    # waits for. It comes before the imports, as these take seconds.
    with contextlib.suppress(OSError, AttributeError):  # only Linux knows how
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from pandas.tseries.frequencies import to_offset
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

# == Settings ======================================================================================
#
# -- Flags: one line per knob, the only place where a default stands. Edit them as you like. -------

# What --demo changes among the defaults below; a flag given beside --demo still wins.
DEMO = {
    "data_dir": "checkpoints/demo/data",
    "label_cache": "checkpoints/demo/labels",
    "save_dir": "checkpoints/demo/run",
    "teacher_model": str(Path(__file__).resolve().parent / "checkpoints" / "demo_teacher"),
    "max_windows": 100,
    "num_epochs": 6,
    "learning_rate": 1e-3,
}


def add_data_flags(parser):
    """What is read, and how it is split and cut into windows."""
    add = parser.add_argument_group("data").add_argument
    add("--data_dir", default="data/datasets/Pretrain_Data", help="folder of CSVs, or one CSV")
    add("--max_files", type=int, default=100, help="read at most this many, by name; 0 = all")
    add("--context_length", type=int, default=720, help="points that the student sees, L")
    add("--prediction_length", type=int, default=96, help="points that it forecasts, H")
    add(
        "--split_by",
        choices=["auto", "files", "time"],
        default="auto",
        help=f"auto = by files, if there are {MANY_FILES}",
    )
    add("--split_ratio", type=ratio, default="8:1:1", help="train:validation:test")
    add("--split_seed", type=int, default=0, help="shuffle of the files, sample of their windows")
    add("--max_gap", type=int, default=16, help="longest run of missing values that is filled")
    add("--season", type=int_or_auto, default="auto", help="steps of a usual cycle; auto = by step")
    add("--stride", type=int, default=1, help="step between training windows")
    add("--max_windows", type=int, default=1000, help="training windows per series; 0 = all")


def add_reading_flags(parser):
    """How a CSV is read. What is `auto` is taken as it looks, or refused where that is not sure."""
    add = parser.add_argument_group("reading").add_argument
    add("--columns", nargs="+", default=["first"], help="`first` numeric column, `all`, or names")
    add("--time_column", nargs="+", default=["auto"], help=TIME_HELP)
    add("--time_format", default="auto", help="of the stamps, such as %%d.%%m.%%y %%H:%%M")
    add("--id_columns", nargs="+", default=["auto"], help="columns that tell series apart; or none")
    add("--encoding", default="auto", help="such as utf-8, gb18030, big5, shift-jis, cp1251")
    add("--skip_rows", type=int_or_auto, default="auto", help="lines above the header")
    add("--decimal", choices=["auto", ".", ","], default="auto", help="mark before the decimals")
    add("--thousands", default="auto", help="mark between groups of three digits; or none")
    add("--na_values", nargs="+", default=[], help="cells that mean missing, such as -9999")
    add("--max_file_mb", type=int, default=2000, help="larger files are skipped; 0 = any size")


def add_teacher_flags(parser):
    """Who labels the windows, and how."""
    add = parser.add_argument_group("teacher").add_argument
    add("--teacher_model", default="Salesforce/moirai-1.1-R-base", help=TEACHER_HELP)
    add("--teacher_revision", default=None, help="branch, tag or commit of the hub id")
    add("--teacher_patch_size", type=int_or_auto, default="auto", help="auto = best on a sample")
    add("--teacher_point", choices=["median", "mean"], default="median", help=POINT_HELP)
    add("--num_samples", type=int, default=100, help="samples under the median")
    add("--teacher_batch_size", type=int, default=256, help="windows per teacher call")
    add("--teacher_precision", choices=["32", "bf16"], default="32", help="bf16: faster on a GPU")
    add("--quantiles", choices=["on", "off"], default="on", help=QUANTILES_HELP)
    add("--label_cache", default="~/.cache/moirai_distill", help="folder of the label files")


def add_machine_flags(parser):
    """Where it runs."""
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto (cuda if there is one), cpu, cuda, cuda:1, mps")
    add("--devices", type=int, default=1, help="processes, one GPU each (or CPU processes)")
    add("--num_nodes", type=int, default=1, help="machines that run this command together")


def add_student_flags(parser):
    """The student's sizes."""
    add = parser.add_argument_group("student").add_argument
    add("--d_model", type=int, default=128, help="width D")
    add("--num_layers", type=int, default=4, help="Transformer layers")
    add("--num_heads", type=int, default=8, help="attention heads; must divide d_model")
    add("--patch_size", type=int, default=16, help="points per token")
    add("--dropout", type=float, default=0.1, help="on residual branches; more for few series")


def add_training_flags(parser):
    """The loss, the optimizer and the loop."""
    add = parser.add_argument_group("training").add_argument
    add("--alpha", type=float_or_auto, default=0.5, help=ALPHA_HELP)
    add("--batch_size", type=int, default=32, help="windows per step, over all devices together")
    add("--num_epochs", type=int, default=10, help="passes over the training windows")
    add("--learning_rate", type=float, default=1e-4, help="halved when validation stalls")
    add("--weight_decay", type=float, default=1e-5, help="of AdamW")
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")
    add("--augment", choices=["on", "off"], default="on", help="train on sums of two windows each")
    add("--patience", type=int, default=0, help="stop after so many epochs without a best; 0 = off")
    add("--precision", choices=["32-true", "bf16-mixed"], default="32-true", help=PRECISION_HELP)
    add("--seed", type=int, default=0, help="of weights, order, dropout; not of split and labels")
    add("--init_from", default=None, help=f"begin with its weights: {CHECKPOINT_HELP}")


def add_run_flags(parser):
    """Where the run is kept."""
    add = parser.add_argument_group("run").add_argument
    add("--save_dir", default="./checkpoints/moirai_distill", help="checkpoints, metrics, pictures")
    add("--resume", action="store_true", help="go on from save_dir/last.pt, with the same flags")
    add("--demo", action="store_true", help="distil the demo teacher on synthetic CSVs; offline")


def add_evaluate_flags(parser):
    """What evaluate has beside the flags of data, teacher and machine."""
    add = parser.add_argument
    add("--checkpoint", nargs="+", required=True, help=f"one or more: {CHECKPOINT_HELP}, or .onnx")
    add(
        "--with_teacher", action="store_true", help="score the teacher, too, from the cache or anew"
    )
    add(
        "--with_forecaster",
        nargs="+",
        default=[],
        help="score others, too: Python files with forecast(context, horizon)",
    )
    add("--horizon", type=int, default=None, help=HORIZON_HELP)
    add(
        "--output_dir", default=None, help="for table and pictures; default: the first one's folder"
    )


def add_predict_flags(parser):
    """All that predict takes."""
    add = parser.add_argument
    add("--checkpoint", required=True, help=CHECKPOINT_HELP)
    add("--input", required=True, help="CSV whose series go on after its end")
    add("--output", default="forecast.csv", help="CSV of the forecast (default: forecast.csv)")
    add("--horizon", type=int, default=None, help=HORIZON_HELP)
    add("--levels", nargs="+", choices=LEVEL_CHOICES, default=["0.1", "0.9"], help=LEVELS_HELP)
    add("--plot", action="store_true", help="draw the forecast, beside --output")
    add("--backtest", action="store_true", help="hold the last steps out; show the error on them")


def add_export_flags(parser):
    """All that export takes."""
    add = parser.add_argument
    add("--checkpoint", required=True, help=CHECKPOINT_HELP)
    add("--format", choices=["onnx", "hub"], required=True, help="onnx file, or hub folder")
    add("--int8", action="store_true", help="onnx: weights in 8 bits, where it is as good")
    add("--output", default=None, help="default: student.onnx or hub in the checkpoint's folder")


TIME_HELP = "its name; two names where date and clock are apart; or none"
TEACHER_HELP = "hub id, local folder, or a Python file with forecast(context, horizon)"
HORIZON_HELP = "steps; more than the student's H go on from its own forecast (default: H)"
POINT_HELP = "of samples, or the exact mean of the distribution"
ALPHA_HELP = "1 = teacher's labels only, 0 = truth only (no teacher), auto = tried on validation"
LEVELS_HELP = "quantiles to write beside the point, or none (default: 0.1 0.9)"
QUANTILES_HELP = "forecast nine quantiles, too; the point forecast stays the same"
PRECISION_HELP = "bf16-mixed is faster on new GPUs"
CHECKPOINT_HELP = "a run's folder (its best), a .pt, an exported folder or a hub id"


# What a newcomer types: shown by --help, and where the script is started without arguments.
FIRST_COMMANDS = """\
  python moirai_distill.py --demo
      everything once, offline, in minutes, under {}
  python moirai_distill.py --data_dir my.csv --context_length 48 --prediction_length 12 \\
      --num_epochs 60 --learning_rate 1e-3 --save_dir checkpoints/mine
      train on a small CSV of your own; where the lengths do not fit, it says which ones do
  python moirai_distill.py predict --checkpoint checkpoints/mine --input my.csv --plot
      the next steps of it, as a CSV and a picture"""


def build_parser(demo):
    """The parser of all commands; with `demo`, train has the demo's defaults."""
    program = Parser(
        prog="moirai_distill.py",
        description=__doc__.partition("\n")[0],
        usage="python moirai_distill.py [COMMAND] [--FLAG VALUE ...]",
        epilog=(
            f"To begin:\n{FIRST_COMMANDS.format(DEMO['save_dir'])}"
            "\n\n`COMMAND --help` lists the flags of a command."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = program.add_subparsers(
        dest="command", required=True, title="commands", metavar="COMMAND", prog=program.prog
    )

    def command(name, says, **more):
        return commands.add_parser(name, help=says, allow_abbrev=False, **more)

    others = ", ".join(name for name in COMMANDS if name != "train")
    epilog = f"Other commands: {others} (python moirai_distill.py COMMAND --help)."
    shown = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}  # defaults in the help
    train = command("train", "label, train, test (the default command)", epilog=epilog, **shown)
    add_data_flags(train)
    add_reading_flags(train)
    add_teacher_flags(train)
    add_machine_flags(train)
    add_student_flags(train)
    add_training_flags(train)
    add_run_flags(train)
    if demo:
        train.set_defaults(**DEMO)

    label = command("label", "only label the training windows, into the cache", **shown)
    add_data_flags(label)
    add_reading_flags(label)
    add_teacher_flags(label)
    add_machine_flags(label)
    label.add_argument("--list", action="store_true", help="list the label files in the cache")

    epilog = "Of the flags of data and teacher, those not given are as in the first one's run."
    evaluate = command("evaluate", "score checkpoints", epilog=epilog)
    add_data_flags(evaluate)
    add_reading_flags(evaluate)
    add_teacher_flags(evaluate)
    # None: as in the checkpoint's run. Asked before other flags are added: for these alone.
    inherited = vars(evaluate.parse_args([]))
    evaluate.set_defaults(**dict.fromkeys(inherited))
    add_machine_flags(evaluate)
    add_evaluate_flags(evaluate)

    epilog = "Of the flags of reading, those not given are as in the checkpoint's run."
    predict = command("predict", "forecast the next steps of a CSV", epilog=epilog)
    add_reading_flags(predict)
    inherited = vars(predict.parse_args([]))
    predict.set_defaults(**dict.fromkeys(inherited))
    add_predict_flags(predict)

    export = command("export", "write a model to ship")
    add_export_flags(export)

    for parser in (train, label, evaluate, predict, export):
        parser.add_argument(
            "--lang",
            choices=["en", "zh"],
            default=language_of_locale(),
            help="of what is printed; default: the locale's",
        )
    return program


@dataclasses.dataclass(frozen=True)
class Message:
    """An English sentence with places for values, and the values that stand in them.

    It is kept in parts, so that `Voice` can say it in the user's language. A value may be a Message
    itself, or a list of them. A sentence without values is taken as it is.
    """

    sentence: str
    values: tuple = ()

    def __str__(self):
        if not self.values:
            return self.sentence
        texts = []
        for value in self.values:
            is_list = isinstance(value, list)
            texts.append("; ".join(map(str, value)) if is_list else value)
        return self.sentence.format(*texts)


def linked(messages, mark):
    """Message of several ones, or of texts, with a mark between each two of them."""
    return Message(mark.join(["{}"] * len(messages)), tuple(messages))


def lines_of(messages):
    """Message of several ones, which bring their own line ends."""
    return linked(messages, "")


class Told(Exception):
    """An exception whose arguments are a sentence and its values, as those of a Message."""

    @property
    def message(self):
        sentence, *values = self.args
        return Message(sentence, tuple(values))

    def __str__(self):
        return str(self.message)


class UserError(Told):
    """A problem that the user can mend: what, where, what to do.

    Shown without a traceback, exit code 2.
    """


class WrongText(Told, argparse.ArgumentTypeError):
    """A text that cannot be the value of a flag, for argparse."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a UserError where argparse would print its usage and exit."""

    def error(self, message):
        problem = sys.exception()  # the ArgumentError whose text is the message, or None
        if problem and isinstance(problem.__context__, WrongText):
            message = Message("argument {}: {}", (problem.argument_name, problem.__context__))
        raise UserError("{} (python {} --help lists the flags)", message, self.prog)


def int_or_auto(text):
    """Type of a flag that is a whole number or `auto`."""
    try:
        return text if text == "auto" else int(text)
    except ValueError as error:
        raise WrongText("{} is not a whole number or auto", repr(text)) from error


def float_or_auto(text):
    """Type of a flag that is a number or `auto`."""
    try:
        return text if text == "auto" else float(text)
    except ValueError as error:
        raise WrongText("{} is not a number or auto", repr(text)) from error


def ratio(text):
    """Type of `train:validation:test`, three numbers greater than 0."""
    try:
        shares = tuple(float(share) for share in text.split(":"))
    except ValueError:
        shares = ()
    if len(shares) != 3 or not all(0 < share < math.inf for share in shares):
        raise WrongText("{} is not three numbers above 0, such as 8:1:1", repr(text))
    return shares


def language_of_locale():
    """`zh` where the locale is Chinese, else `en`."""
    names = [os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG")]
    names.append(locale.getlocale()[0])
    for name in names:
        if name:
            is_chinese = name.lower().startswith(("zh", "chinese"))
            return "zh" if is_chinese else "en"
    return "en"


def at_least(low):
    """(test, words) of a range in RANGES."""
    return (lambda value: value >= low), Message("at least {}", (low,))


def above(low):
    """(test, words) of a range in RANGES."""
    return (lambda value: value > low), Message("greater than {}", (low,))


def between(low, high):
    """(test, words) of a range in RANGES."""
    return (lambda value: low <= value <= high), Message("at least {} and at most {}", (low, high))


# What the value of a flag must be; `auto`, where the flag knows it, is always right.
RANGES = {
    "max_files": at_least(0),
    "skip_rows": at_least(0),
    "max_file_mb": at_least(0),
    "context_length": at_least(2),
    "prediction_length": at_least(1),
    "horizon": at_least(1),
    "split_seed": at_least(0),
    "max_gap": at_least(0),
    "season": at_least(1),
    "stride": at_least(1),
    "max_windows": at_least(0),
    "teacher_patch_size": at_least(1),
    "num_samples": at_least(1),
    "teacher_batch_size": at_least(1),
    "devices": at_least(1),
    "num_nodes": at_least(1),
    "d_model": at_least(1),
    "num_layers": at_least(1),
    "num_heads": at_least(1),
    "patch_size": at_least(1),
    "dropout": between(0, 0.99),
    "alpha": between(0, 1),
    "batch_size": at_least(1),
    "num_epochs": at_least(1),
    "learning_rate": above(0),
    "weight_decay": at_least(0),
    "max_grad_norm": above(0),
    "patience": at_least(0),
    "seed": between(0, 2**64 - 1),
}

# -- Numbers you may tune -------------------------------------------------------------------------

# Training. Checkpoints and labels stay valid; a run that is resumed keeps its own scheduler's.
SCHEDULER_FACTOR = 0.5  # the learning rate is multiplied by this ...
SCHEDULER_PATIENCE = 1  # ... after more than so many epochs without a lower validation loss
SHAPE_DECAY = 0.9  # how much less each earlier period counts at first: its shape ...
LEVEL_DECAY = 0.8  # ... and its mean
HALF_LIFE = 1.0  # periods after which half of what the last value is off by is left, at first
SHARE_WINDOWS = 1024  # of validation, at most, by which the Transformer's share is set
AVERAGE_DECAY = 9  # the averaged weights reach back over about 1/9 of all steps; larger = shorter
MAX_FAILED = 10  # steps in a row with a non-finite loss or gradient that end the run
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)  # what --alpha auto tries (0 and at least one more) ...
TRIAL_EPOCHS = 3  # ... for so many epochs each
FEW_STEPS = 200  # a whole run of fewer steps than this is told, with ...
ADVISED_STEPS = 300  # ... a command whose run takes about so many ...
ADVISED_RATE = 1e-3  # ... at a learning rate of at least this

# Quantiles, which are learned when the point forecast is.
QUANTILE_WIDTH = 32  # of the layer between the tokens and the quantiles
QUANTILE_STEPS = 1000  # at most; no more than the point forecast took
QUANTILE_RATE = 1e-3  # learning rate at the beginning; it falls to 0
QUANTILE_CHECKS = 10  # times that a sample of validation windows is looked at: the best one counts
QUANTILE_WINDOWS = 512  # in that sample
CALIBRATION_WINDOWS = 4096  # of validation, at most, by which the width of the band is set ...
MIXED = 15  # values that stand for a distribution beyond H; 5, 15, 25, ... hold the levels
STUDENT_T = 3.18  # ... as far as is sure: 95 % two-sided, with 3 degrees of freedom

# Time and memory. Results stay as they are, up to rounding.
EVAL_BATCH = 512  # windows that are scored at once ...
FORWARD_BATCH = 128  # ... of which a pass of the student takes so many: more leave a CPU's cache
FEWEST_TIMED = 3  # forecasts by which the time of one is told ...
LONG_TIMED = 0.2  # ... which take so many seconds together, at least
FILES_FOR_PROCESSES = 50  # from so many files on, one process per core reads them
MOE_SEQUENCES = 2048  # windows times samples that a MOIRAI-MoE takes in one call

# What is read, and what becomes of it. Where a file is read in another way than before, its labels
# are made anew.
TIME_NAMES = ("date", "timestamp", "time", "datetime", "ds")  # of time columns, in any case
ID_NAMES = ("unique_id", "item_id", "id", "series", "series_id")  # of the id of a long format
INDEX_NAMES = ("id", "index", "time_idx")  # of columns that are no values
PARTS_OF_DATE = {  # names of columns that make a date together, the largest part first
    "year": ("year", "yr", "yyyy", "jahr", "annee", "année", "año", "ano", "anno", "年"),
    "quarter": ("quarter", "qtr", "季度"),
    "month": ("month", "mon", "mnth", "mo", "monat", "mois", "月"),
    "day": ("day", "dy", "tag", "jour", "日"),
    "hour": ("hour", "hr", "hh", "stunde", "heure", "时"),
    "minute": ("minute", "分"),
}
OTHER_PARTS_OF_TIME = (
    "second",
    "week",
    "weekday",
    "dayofweek",
    "dow",
    "dayofyear",
    "doy",
    "season",
    "holiday",
    "isholiday",
    "is_holiday",
    "workingday",
    "weekend",
    "is_weekend",
)
DATES = (  # with or without a clock behind them, beside ISO 8601
    "%Y-%m-%d",
    "%Y/%m/%d",
    "%Y.%m.%d",
    "%Y%m%d",
    "%Y %m %d",
    "%Y %b %d",
    "%m/%d/%Y",
    "%d/%m/%Y",
    "%d.%m.%Y",
    "%d-%m-%Y",
    "%m-%d-%Y",
    "%m/%d/%y",
    "%d/%m/%y",
    "%d.%m.%y",
    "%d-%m-%y",
    "%m-%d-%y",
    "%y/%m/%d",
    "%y-%m-%d",
    "%y.%m.%d",
    "%Y年%m月%d日",
    "%d-%b-%Y",
    "%d-%b-%y",
    "%d %b %Y",
    "%d %b %y",
    "%d %B %Y",
    "%b %d, %Y",
    "%B %d, %Y",
    "%b %d %Y",
    "%a, %d %b %Y",
    "%A, %B %d, %Y",
    "%a %b %d %H:%M:%S %Y",
    "%Y-%j",
    "%G-W%V-%u",
)
MONTH_DATES = (  # of months, quarters and weeks (%q: see DIRECTIVES)
    "%b %Y",
    "%B %Y",
    "%B-%Y",
    "%b-%Y",
    "%b-%y",
    "%b %y",
    "%Y-%b",
    "%Y %b",
    "%Y %B",
    "%Y %m",
    "%Y/%m",
    "%m/%Y",
    "%m.%Y",
    "%m-%Y",
    "%Y年%m月",
    "%YM%m",
    "%YQ%q",
    "%Yq%q",
    "%Y-Q%q",
    "%Y Q%q",
    "Q%q %Y",
    "Q%q-%Y",
    "Q%q/%Y",
    "%G-W%V",
    "%G W%V",
    "%GW%V",
)
CLOCKS = (
    "%H:%M",
    "%H:%M:%S",
    "%H:%M:%S.%f",
    "%H:%M:%S,%f",
    "%I:%M %p",
    "%I:%M:%S %p",
    "%I:%M%p",
    "%I:%M:%S%p",
    "%I %p",
    "%I%p",
    "%I.%M.%S.%f %p",
    "%H.%M",
    "%H.%M.%S",
    "%H%M",
    "%H",
    "%H时",
    "%H时%M分",
    "%H时%M分%S秒",
    "%H %M",
)
OLDEST_YEAR = 1700  # of dates that are whole numbers
YEARS_AHEAD = 1  # that years of two digits may lie; pandas takes them for those of 1969 to 2068
EQUALLY_EVEN = 1.2  # times as uneven as the most even one that another reading of stamps may be
MOST_STAMPS = 0.9  # share of readable stamps that makes a time column
FEW_UNREAD = 0.01  # share of its stamps that may be unread ...
LAST_ROWS = 10  # ... but none of so many at the end of a series, and none of its numbers there
SEPARATORS = ("\t", ";", ",", "|")  # where two fit as well, the earlier one is taken
SAMPLE_LENGTH = 50_000  # characters at the beginning of a file that show how it is written ...
SAMPLE_PIECES = 20  # ... and so many pieces from all over it, as long as that together
SAMPLE_CELLS = 1000  # different cells of a column that show what marks its numbers have
LONGEST_LINE = 2_000_000  # bytes
MOST_COLUMNS = 50_000
MOST_PREFACE = 30  # lines above the header in which another table is looked for
MOST_PACKED = 1032  # by gzip, which cannot pack better: times that a file may grow
FEWEST_ROWS = 3  # of a series of the long format, in the mean
SHORTEST_FILE = 5  # rows; with fewer no column is the value by default
FEWEST_KNOWN = 0.02  # share of the cells that holds a number in a column that is a value by default
FEW_VALUES = 5  # so many different ones, or fewer, seem to be of a flag or a class
FEWEST_SENTINELS = 2  # times that a value far from the rest seems to mean "missing"
MOST_IN_PHASE = 0.8  # length of the mean phase of stamps that keep to one step; 1 = exactly
MUCH_MISSING = 0.05  # share of the steps of a file without a row that is warned of
MOST_MISSING = 0.5  # share of the steps of a series that may be without a row, but for one gap
FEW_DUPLICATES = 0.01  # share of exact duplicates among the stamps, without an id column
FEWEST_GROUPED = 10  # different numbers such as 1.012 in a column, beside ...
FEWEST_WHOLE = 3  # ... so many such as 905, which make the point one of thousands, perhaps
MOST_IN_STEP = 0.8  # share of equal steps that makes a counter of numbers
MOST_RISES = 0.97  # share of steps up that seems to be of a counter or a sum ...
MOST_ONE_WAY = 0.9  # ... and where the others fall back to the start, as at midnight
MOST_NUMBERS = 0.9  # share of its values that makes a column numeric
MOST_ON_RULE = 0.95  # share of the stamps that must lie on a calendar rule
MOST_PLACED = 0.9  # share of the stamps that must find a place of their own on the grid
ABSURD = 1e6  # deviations from the mean beyond which a value counts as missing
# Lengths (context, horizon) that are proposed where those asked for are too long, by season. With
# another season it is 14 of them -> one of them, as far as the lengths asked for reach.
USUAL_LENGTHS = {
    1: (24, 6),  # a year
    4: (24, 4),  # a quarter
    12: (48, 12),  # a month
    52: (156, 13),  # a week
    5: (260, 20),  # a business day
    7: (364, 28),  # a day
}
CYCLE_WINDOWS = 256  # of training, at most, by which a cycle is looked for
CLEAR_CYCLE = 0.4  # mean similarity of windows to themselves later, from which on they repeat
MANY_FILES = 10  # from so many usable files on, --split_by auto holds out whole files
JUDGED_WINDOWS = 64  # training windows per sampling frequency that choose the teacher's patch size

# Two runs in one folder. The slower a network folder is, the longer both should be.
HEARTBEAT = 15  # s after which a run says again that it lives
FRESH = 120  # s without that, after which a run on another machine counts as gone

# What is told, and what is kept.
MOST_PANELS = 4  # series that --plot draws
MOST_NOTES = 20  # files whose lines are shown, and notes that are listed under an error
MOST_REASONS = 4  # series of a file that are skipped, and warnings about it
MOST_NAMES = 8  # columns of a file that are named
NEWS_EVERY = 180  # s between two lines on labelling, where stderr is no terminal
INT8_TOLERANCE = 0.01  # share of MSE and WQL by which an int8 file may be worse than float32 ...
INT8_WALKS = 512  # ... on as many random walks, where the run's own test windows are not at hand
FEWEST_ROUNDED = 64  # numbers of a tensor of an int8 file; smaller ones stay float32
ONNX_TOLERANCE = 1e-4  # deviations of a context by which an ONNX file may differ from PyTorch

# -- What you must not touch -----------------------------------------------------------------------

OLDEST_PYTHON = (3, 11)
COMMANDS = ("train", "evaluate", "predict", "export", "label")
TEXTS_NEEDED = ("data_dir", "teacher_model", "label_cache", "device", "save_dir")
PARTS = ("train", "validation", "test")  # in the order of --split_ratio; named in checkpoints
FEWEST_FILES = len(PARTS)  # a file for each part
METRICS = ("mse", "mae", "mase")  # named in evaluations and checkpoints
QUANTILE_METRICS = ("wql", "coverage_80")  # likewise, of those that have quantiles
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of labels and students: their order, too
LEVEL_NAMES = tuple(f"{level:g}" for level in LEVELS)
LEVEL_CHOICES = (*LEVEL_NAMES, "none")
MIDDLE = 4  # place of 0.5 among them; the 80 % band reaches from the first to the last

SECOND = 10**9  # in ns, as all steps in the reader
DAY = 86_400 * SECOND
USUAL_STEPS = np.array(  # what the steps of stamps that jitter are rounded to
    [SECOND * seconds for seconds in (1, 2, 5, 10, 15, 20, 30)]
    + [60 * SECOND * minutes for minutes in (1, 2, 5, 10, 15, 20, 30)]
    + [3600 * SECOND * hours for hours in (1, 2, 3, 4, 6, 8, 12, 24, 168)]
)

# Of checkpoints and label files. Raise it when older versions of this program must not read what
# this one writes: they refuse a higher number. Lower ones are still read, but all labels are made
# anew, as it is in their key.
FORMAT = 1

# What must agree for labels to be used again. The folder of a label file is named by a hash of
# these facts: another list makes every label in every cache be made anew. How labels were made
# (device, precision, batch size, versions) is not among them: the manifest tells.
LABEL_KEY = (
    "data",  # digest of the windows' values, starts and frequencies (`label_digest`)
    "windows",  # how many
    "context",
    "horizon",
    "patch",
    "point",  # "median" of an odd number of samples, "mean", or else see `point_in_key`
    "samples",
    "weights",  # sha256 of the teacher's two files
    "format",
)

# Flags that may differ on --resume. (Another number of devices changes dropout and rounding, which
# is accepted.) A run that went on with another value of any other flag would not be the run that it
# says it is.
MAY_CHANGE = {
    "resume",
    "num_epochs",
    "device",
    "devices",
    "num_nodes",
    "label_cache",
    "lang",
    # Folders may be moved, or typed in another way: what they hold is compared.
    "data_dir",
    "save_dir",
    "teacher_model",
    "teacher_revision",
    # They are learned at the end: what the run has done so far is the same with and without them.
    "quantiles",
}

# What a file may be, beyond which it is refused before it takes memory.
MOST_PARTS = 1_000_000  # values and tensors in a checkpoint: a real one has some hundreds, and a
# few for each epoch
MOST_PICKLE = 50_000_000  # bytes of what is no tensor in a checkpoint
MOST_TENSORS = 20_000  # in a checkpoint or another file of weights: a real one has some hundreds
MOST_JSON = 2_000_000  # bytes of a JSON file: a real one has some thousands ...
MOST_EVALUATION = 20_000_000  # ... but an evaluation has some for each series
MOST_HEADER = 4_000_000  # bytes that list the tensors of a safetensors file
MOST_TEACHER = 8_000_000_000  # bytes of a teacher's weights: the largest published ones have 1.2 GB
MOST_TEXT = 10_000  # signs of a name or a path
MOST_ONNX = 500_000_000  # bytes of an ONNX file
MOST_VALUES = 2**26  # of a tensor that an ONNX file computes in one call
MOST_OF_WINDOW = 2**26  # values that it computes for one window, beside eight for each byte of it

# Which entry of an ONNX file's metadata holds, as JSON, what the config.json of an exported folder
# says.
ONNX_FACTS = "moirai_distill"

# The operations of an ONNX file of a student, as PyTorch exports it. None of them reads a file, or
# repeats others.
ONNX_OPERATIONS = {
    *("Abs", "Add", "And", "Clip", "Div", "Equal", "Erf", "Exp", "Gelu", "Greater", "IsNaN"),
    *("GreaterOrEqual", "Less", "LessOrEqual", "Log", "Max", "Min", "Mul", "Neg", "Not", "Or"),
    *("Pow", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Tanh", "Where"),
    *("Gemm", "LayerNormalization", "MatMul", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"),
    *("Softmax", "Cast", "CastLike", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten"),
    *("Gather", "Identity", "Pad", "Range", "Reshape", "Shape", "Slice", "Split", "Squeeze"),
    *("Tile", "Transpose", "Unsqueeze", "DequantizeLinear", "DynamicQuantizeLinear"),
    *("MatMulInteger", "QuantizeLinear"),
}

# What the pickle in a checkpoint is made of: what torch.save writes of plain values and tensors.
PICKLE_STEPS = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID"),
    *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
}
PICKLE_NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Bool")),
    *(f"torch {kind}Storage" for kind in ("Long", "Int", "Short", "Char", "Byte")),
}

# In the folder of a run that lives: which process writes there. Older versions do not look at it.
OWNER_FILE = ".owner.json"

# Names of temporary files: chance, process, when that began, machine. The second form is of earlier
# versions.
TEMPORARY = re.compile(r"\.[0-9a-f]{32}-(\d+)-(\d*)-([0-9a-f]{8})\.tmp|\.[0-9a-f]{32}\.tmp")

# What a run leaves in its folder. Before a new run begins, an earlier one's files are moved away by
# these names: what is not listed here would be overwritten.
RUN_FILES = (
    "last.pt",
    "best_model_epoch_*.pt",
    "metrics.jsonl",
    "*.png",
    "tensorboard",
    "evaluation.json",
    "comparison",
    "student.onnx",
    "student_int8.onnx",
    "hub",
    "trials",
)

# == Voice =========================================================================================

# The Chinese of the sentences that are given to a Voice, or raised as UserError or Unusable, with
# the same placeholders in the same order. What has no entry is printed in English: change a
# sentence here and at its place of use together (tests/test_voice.py finds what does not fit).
CHINESE = {
    "Data directory: {}": "数据目录: {}",
    "Context length: {}": "上下文长度: {}",
    "Prediction length: {}": "预测长度: {}",
    "\nCreating datasets...": "\n创建数据集...",
    "Found {} CSV files": "找到 {} 个 CSV 文件",
    "Found {} CSV files, {} Parquet files": "找到 {} 个 CSV 文件，{} 个 Parquet 文件",
    "Using {} files for the {} set": "使用 {} 个文件用于 {} 集",
    "Split by {}": "划分方式: {}",
    "Datasets loaded: {:,} samples": "数据集加载完成: {:,} 个样本",
    "  validation {:,}, test {:,}": "  验证 {:,}，测试 {:,}",
    "\nLoading teacher...": "\n加载教师模型...",
    "Loading teacher: {}": "加载教师模型: {}",
    "Teacher loaded": "教师模型加载成功",
    "MSE on {} windows of step {}: {}": "{} 个步长为 {} 的窗口上的 MSE: {}",
    "Patch size: {}": "教师 patch 大小: {}",
    "Labelling {:,} windows, {:.1f} MB, about {:.1f} min": (
        "标注 {:,} 个窗口，{:.1f} MB，约 {:.1f} 分钟"
    ),
    "Label cache hit, no teacher call: {}": "标签缓存命中，无需调用教师: {}",
    "Labels of {:,} windows: {}": "{:,} 个窗口的标签: {}",
    "No label files in {}": "{} 中没有标签文件",
    "{}: its manifest is damaged": "{}: 清单文件已损坏",
    "\nSeason in steps: {}": "\n季节周期 (步数): {}",
    "\nCreating student...": "\n创建学生模型...",
    "Student parameters: {:,}": "学生模型参数量: {:,}",
    "Student patches: {} of {} points": "学生模型 patch: {} 个，每个 {} 点",
    "Validation loss of seasonal-naive: {:.4f} (MAE: {:.4f})": (
        "季节性朴素预测的验证损失: {:.4f} (MAE: {:.4f})"
    ),
    "\nTrying each alpha for {} epochs:": "\n每个 alpha 试训 {} 个 epoch:",
    "  alpha {:g}: validation loss {:.4f}": "  alpha {:g}: 验证损失 {:.4f}",
    "Best: alpha {:g}, {:+.1f} % of validation loss beside alpha {:g}": (
        "最好: alpha {:g}，验证损失 {:+.1f} % (相对 alpha {:g})"
    ),
    "The teacher does not help here: this trains on truth alone": (
        "教师在这里没有帮助: 只用真值训练"
    ),
    "\nTraining for {} epochs": "\n开始训练，共 {} 个 epoch",
    "Steps: {:,} in an epoch ({:,} windows, {} in a step), {:,} in all": (
        "步数: 每个 epoch {:,} 步 ({:,} 个窗口，每步 {} 个)，共 {:,} 步"
    ),
    "Checkpoints: {}": "模型保存目录: {}",
    "\nEpoch {}/{}": "\nEpoch {}/{}",
    "Training loss: {:.4f} (MSE: {:.4f}, Distill: {})": (
        "训练损失: {:.4f} (MSE: {:.4f}, Distill: {})"
    ),
    "Validation loss: {:.4f}": "验证损失: {:.4f}",
    "Validation MAE: {:.4f}": "验证 MAE: {:.4f}",
    "Learning rate: {:.1e}, {:.0f} s, {:.1f} min to go": (
        "学习率: {:.1e}，{:.0f} 秒，剩 {:.1f} 分钟"
    ),
    "Saved best model: {}": "保存最佳模型: {}",
    "\nBest epoch: {}, {}": "\n最佳 epoch: {}，{}",
    "\nNext: {} {}": "\n下一步: {} {}",
    "\nTest error on {:,} windows (ms: one forecast on the CPU):": (
        "\n{:,} 个测试窗口上的误差 (ms: CPU 上单次预测):"
    ),
    "{} keeps {:.0f} % of what the teacher gains over {}": (
        "{} 保留了 {:.0f} % 的教师优势 (相对 {})"
    ),
    "{} passes its teacher: its MSE is {:.1f} % lower than the teacher's": (
        "{} 超过了教师: 它的 MSE 比教师低 {:.1f} %"
    ),
    "The teacher does not beat {} here: it has no gain that {} could keep": (
        "教师在这里不优于 {}: 没有可供 {} 保留的优势"
    ),
    "the whole run takes only {:,} steps, in which a student learns little; try\n  {}": (
        "整个训练只有 {:,} 步，学生学不到多少；可以试试\n  {}"
    ),
    (
        "the best epoch was the last one: it was still learning; "
        "raise --num_epochs or --learning_rate"
    ): ("最佳 epoch 是最后一个: 模型仍在学习；请增大 --num_epochs 或 --learning_rate"),
    "to learn more, try\n  {}": "要学得更多，可以试试\n  {}",
    (
        "more epochs would not help, the best one was {} of {}: take more data, other lengths, "
        "or the naive forecast as it is"
    ): (
        "再多的 epoch 也没有帮助 (最佳是第 {} 个，共 {} 个): 请用更多数据或其他长度，"
        "或直接用朴素预测"
    ),
    "{} is not better than {} on the test windows": "{} 在测试窗口上不优于 {}",
    "Whether the teacher helped {} cannot be told beside {}, which is no twin: {}": (
        "无法判断教师是否帮助了 {}: {} 不是它的孪生模型 ({})"
    ),
    "at step {} the teacher is worse than a naive forecast; labels may do harm": (
        "步长 {} 上教师不如朴素预测；标签可能有害"
    ),
    (
        "Whether the teacher helped {} shows beside a twin: train one with --alpha 0, and "
        "evaluate both"
    ): ("要知道教师是否帮助了 {}: 用 --alpha 0 再训练一个学生，一起 evaluate"),
    (
        "The teacher helped: {} has {:+.1f} % of MSE beside {} (alpha 0), and a lower one on "
        "{} of {} series"
    ): ("教师有帮助: {} 的 MSE 变化 {:+.1f} % (相对 alpha 0 的 {})，更低的序列有 {} / {} 个"),
    (
        "The teacher did harm: {} has {:+.1f} % of MSE beside {} (alpha 0), and a lower one on "
        "{} of {} series"
    ): ("教师有害: {} 的 MSE 变化 {:+.1f} % (相对 alpha 0 的 {})，更低的序列有 {} / {} 个"),
    (
        "The teacher made no difference: {} has {:+.1f} % of MSE beside {} (alpha 0), and a "
        "lower one on {} of {} series"
    ): ("教师没有明显作用: {} 的 MSE 变化 {:+.1f} % (相对 alpha 0 的 {})，更低的序列有 {} / {} 个"),
    "Table and pictures: {}": "表格与图片: {}",
    "Error on the last {} steps, which were held out:": "在留出的最后 {} 步上的误差:",
    "  {}: {:<15} MAE {:.6g}  RMSE {:.6g}  MASE {:.4f}": (
        "  {}: {:<15} MAE {:.6g}  RMSE {:.6g}  MASE {:.4f}"
    ),
    "Forecast: {}": "预测结果: {}",
    "Forecast: {}, {}": "预测结果: {}, {}",
    "Largest difference from PyTorch on {} contexts: {:.1e} of their deviation": (
        "与 PyTorch 在 {} 个上下文上的最大差异: {:.1e} 个标准差"
    ),
    "{} on {:,} windows: {:.4f} in float32, {:.4f} in int8 ({:+.2f} %)": (
        "{} ({:,} 个窗口): float32 {:.4f}，int8 {:.4f} ({:+.2f} %)"
    ),
    "Size: {:.2f} MB": "大小: {:.2f} MB",
    "the run's own test windows are not at hand, random walks are taken: {}": (
        "没有该次训练的测试窗口，改用随机游走: {}"
    ),
    "it does not say where they are": "没有说明它们在哪里",
    "the data in {} is another": "{} 中的数据已不同",
    "Exported: {}": "已导出: {}",
    # reading
    "is no number": "不是数字",
    (
        "its first lines have fewer fields than the others; if they are no part of the table, "
        "--skip_rows {} leaves them out"
    ): ("开头几行的字段比其他行少；如果它们不属于表格，用 --skip_rows {} 跳过"),
    "no column to forecast: {}; --columns {} takes it anyway": (
        "没有可预测的列: {}；--columns {} 可强制使用"
    ),
    "is only {:.0f} % numbers, the rest such as {!r}": "只有 {:.0f} % 是数字，其余例如 {!r}",
    "is an id column missing (--id_columns)?": "是否缺少标识列 (--id_columns)？",
    "a zip archive (or an Excel .xlsx): unpack it, or save it as CSV": (
        "zip 压缩包 (或 Excel .xlsx): 请解压，或另存为 CSV"
    ),
    "an old Excel file (.xls): save it as CSV": "旧版 Excel 文件 (.xls): 请另存为 CSV",
    "a Parquet file: let its name end with .parquet": "Parquet 文件: 请让文件名以 .parquet 结尾",
    "a Parquet file is read with pyarrow: pip install pyarrow": (
        "读取 Parquet 文件需先安装 pyarrow 软件包"
    ),
    "--output {}: a CSV is written; let its name end with .csv": (
        "--output {}: 写出的是 CSV；请让文件名以 .csv 结尾"
    ),
    "an Arrow file: save it as CSV": "Arrow 文件: 请另存为 CSV",
    "an HDF5 file: save its table as CSV": "HDF5 文件: 请把其中的表另存为 CSV",
    "packed by gzip: its name must end with .csv.gz": "gzip 压缩文件: 文件名必须以 .csv.gz 结尾",
    "packed by bzip2: unpack it": "bzip2 压缩文件: 请解压",
    "packed by xz: unpack it": "xz 压缩文件: 请解压",
    "packed by zstd: unpack it": "zstd 压缩文件: 请解压",
    "a 7z archive: unpack it": "7z 压缩包: 请解压",
    "a PDF": "PDF 文件",
    "a picture": "图片",
    "a web page: was it downloaded from the wrong address?": "网页: 是否下载地址有误？",
    "JSON: save it as CSV (pandas.read_json)": "JSON: 请另存为 CSV (pandas.read_json)",
    "XML: save its table as CSV": "XML: 请将其中的表格另存为 CSV",
    "an ARFF file: save it as CSV": "ARFF 文件: 请另存为 CSV",
    "a dump of an SQL database: export the table as CSV": "SQL 数据库转储: 请将表格导出为 CSV",
    "unreadable: its name ends with .gz, but it is not packed by gzip": (
        "无法读取: 文件名以 .gz 结尾，但不是 gzip 压缩"
    ),
    "unreadable: damaged, or bytes that are no gzip follow its end": (
        "无法读取: 已损坏，或末尾之后有不属于 gzip 的字节"
    ),
    "a pointer of Git LFS: `git lfs pull` fetches the file itself": (
        "Git LFS 指针: 用 `git lfs pull` 取得文件本身"
    ),
    "no rows": "没有数据行",
    "is no regular file": "不是普通文件",
    "larger than {:,} MB when it is unpacked; --max_file_mb raises the limit": (
        "解压后大于 {:,} MB；用 --max_file_mb 提高上限"
    ),
    "{:,} columns, more than {:,}: it takes a table with a row for each time": (
        "有 {:,} 列，多于 {:,}: 需要每个时刻一行的表"
    ),
    "numbers such as {} and {}: which mark is the decimal one? --decimal . or --decimal ,": (
        "有 {} 和 {} 这样的数字: 哪个是小数点？--decimal . 或 --decimal ,"
    ),
    "its rows hold more fields than its header: {}": "数据行的字段比表头多: {}",
    "the last such as {!r}": "最后一个例如 {!r}",
    "each row ends with a separator too many; write one behind the header": (
        "每行末尾多一个分隔符；请在表头末尾也加一个"
    ),
    "each row begins with its number; write a name for it into the header": (
        "每行以行号开头；请在表头中为它加一个列名"
    ),
    (
        "line {} has names ({}) as its first one does: if the table begins there, --skip_rows {} "
        "leaves out what stands above"
    ): ("第 {} 行与第一行一样是列名 ({}): 如果表格从那里开始，用 --skip_rows {} 跳过上面的内容"),
    (
        "columns {} and {} hold whole numbers, and one has no name: if {},{} is one number with a "
        "decimal comma, write it with a point, or in quotes; else name the column"
    ): (
        "第 {} 列和第 {} 列是整数，其中一列没有列名: 如果 {},{} 是一个用逗号作小数点的数，"
        "请改用点号，或加引号；否则请为该列命名"
    ),
    (
        "no separator found (tab ; , or |): its lines are such as {!r}; if {!r} is it, write the "
        "file with commas"
    ): ("没有找到分隔符 (制表符 ; , 或 |): 行例如 {!r}；如果 {!r} 是分隔符，请改用逗号"),
    (
        "numbers such as {} and {}: if the mark of the first is of thousands, --thousands {}; else "
        "write all columns with one mark of decimals"
    ): (
        "数字例如 {} 和 {}: 如果前者的符号是千位分隔，用 --thousands {}；"
        "否则请让所有列使用同一种小数点"
    ),
    (
        "cells such as {!r} between commas: a number with a decimal comma (--decimal ,), or two "
        "values, which columns of their own should hold?"
    ): (
        "以逗号分隔的单元格例如 {!r}: 是用逗号作小数点的数 (--decimal ,)，"
        "还是应当分在两列的两个值？"
    ),
    "--id_columns {}: {:,} different ids in {:,} rows, too few of each for a series": (
        "--id_columns {}: {:,} 个不同的标识，共 {:,} 行，每个标识的行数太少，不成序列"
    ),
    "holds no plain numbers, but cells such as {!r}": "不是纯数字，单元格例如 {!r}",
    "{} (--thousands {!r} if that mark is of thousands)": "{} (若为千位分隔，用 --thousands {!r})",
    "goes on by one and the same step, and starts anew, as a counter does": (
        "以同一步长递变并重新开始，像计数器"
    ),
    (
        "{} falls in {:,} steps only and else rises, as a counter or a sum does: if it is one, "
        "--columns names another column"
    ): "{} 只在 {:,} 步下降，其余上升，像计数器或累计值: 如果是，用 --columns 指定另一列",
    (
        "columns {}, {}, ..., {} seem to be the steps between two rows, which lie {:g} days apart: "
        "reshape it to long format, a row for each time (pandas.melt); --columns names those that "
        "are series of their own"
    ): (
        "列 {}、{}、...、{} 似乎是相隔 {:g} 天的两行之间的各步: 请变为长格式，每个时刻一行 "
        "(pandas.melt)；若各列是独立的序列，用 --columns 指定"
    ),
    (
        "{} stands in row {}, beside {}: if it means the end of that day, write 24:00 for it; "
        "--time_column none takes the rows as they stand"
    ): (
        "{} 在第 {} 行，与 {} 相邻: 如果它表示当天结束，请写成 24:00；"
        "--time_column none 按行的顺序使用"
    ),
    "{:,} rows are out of order, such as {} behind {}: all are sorted by their stamps": (
        "{:,} 行次序不对，例如 {} 在 {} 之后: 全部按时间戳排序"
    ),
    (
        "its first {} rows hold no stamps, such as {}: if the names of the columns stand there, "
        "--skip_rows (up to {}) leaves out the lines above them; if not, delete these rows"
    ): (
        "前 {} 行没有时间戳，例如 {}: 如果列名在其中，用 --skip_rows (至多 {}) 跳过其上的行；"
        "否则请删除这些行"
    ),
    (
        "from {} on its step is {}, and mostly {}: make it one for all rows (pandas: resample), or "
        "a file of its own for each"
    ): "从 {} 起步长为 {}，多数为 {}: 请统一步长 (pandas: resample)，或分成不同的文件",
    "{} holds stamps, too, each of them once: --time_column {}": (
        "{} 也是时间戳，且不重复: --time_column {}"
    ),
    (
        "{} holds {!r} among its last rows, which is no number: --decimal and --thousands say how "
        "numbers are written, --na_values that it counts as missing"
    ): (
        "{} 的最后几行有 {!r}，它不是数字: --decimal 和 --thousands 说明数字的写法，"
        "--na_values 表示缺失"
    ),
    "of {} the unit {!r} is left out": "{} 的单位 {!r} 不使用",
    "several offsets, but always at midnight: taken as dates": "多种时区偏移，但都在零点: 视为日期",
    (
        "numbers such as {} beside {}: is the mark of decimals (--decimal .) or of thousands "
        "(--thousands .)?"
    ): "有 {} 和 {} 这样的数字: 是小数点 (--decimal .) 还是千分位 (--thousands .)？",
    "is nearly empty: {} of {:,} cells hold a number": "几乎为空: {} / {:,} 个单元格有数字",
    (
        "{} is a part of a date, but no other part was found: --time_column {} ... names them, "
        "--time_column none takes the rows as they stand"
    ): (
        "{} 是日期的一部分，但没有找到其他部分: 用 --time_column {} ... 指明各列，"
        "--time_column none 按行的顺序使用"
    ),
    "{} takes only the values {}: if it is a flag or a class, --columns names another one": (
        "{} 只取值 {}: 如果是标志或类别，用 --columns 指定另一列"
    ),
    (
        "row {} holds no values, but {}: if it is the header of a second table, delete it; what "
        "is below it may be of a file of its own"
    ): ("第 {} 行没有数值，而是 {}: 如果是第二个表格的表头，请删除；其下的内容可能属于另一个文件"),
    "too short: {} rows": "太短: {} 行",
    (
        "the stamps of {} cannot be read, such as {!r}: --time_format says how they are "
        "written, --time_column none takes the rows as they stand"
    ): (
        "{} 的时间戳无法读取，例如 {!r}: 用 --time_format 说明格式，或用 --time_column "
        "none 按行的顺序使用"
    ),
    (
        "the stamps of {} cannot be read, such as {!r} (names of months are read in English "
        "only): --time_format says how they are written, --time_column none takes the rows as "
        "they stand"
    ): (
        "{} 的时间戳无法读取，例如 {!r} (月份名称只识别英文): 用 --time_format 说明格式，或用 "
        "--time_column none 按行的顺序使用"
    ),
    (
        "{} seems to hold dates, such as {:.0f}: --time_format {} says so, --time_column none takes"
        " the rows as they stand"
    ): ("{} 似乎是日期，例如 {:.0f}: --time_format {} 可确认，--time_column none 则按行的顺序使用"),
    (
        "{} seems to count seconds since 1970, such as {:g}, but by no even step: was it "
        "rounded? --time_column none takes the rows as they stand"
    ): (
        "{} 似乎是 1970 年起的秒数，例如 {:g}，但步长不均匀: 是否被四舍五入？--time_column none "
        "按行的顺序使用"
    ),
    (
        "its years have two digits, and one would be {}: write them with four digits; "
        "--time_column none takes the rows as they stand"
    ): "年份只有两位，其中一个会是 {}: 请写成四位；--time_column none 按行的顺序使用",
    (
        "the stamps are of the zones {}: write them with offsets from UTC, such as "
        "2024-07-01 12:00+02:00"
    ): "时间戳属于时区 {}: 请写成相对 UTC 的偏移，例如 2024-07-01 12:00+02:00",
    "several offsets ({}): read and written in UTC": "多种时区偏移 ({}): 按 UTC 读写",
    "of ranges such as {!r} the start": "时间段例如 {!r}，取其开始",
    "{!r} behind the stamps is left out": "时间戳后的 {!r} 不使用",
    "newest rows first: turned round": "最新的行在前: 已倒过来",
    "{:,} of {:,} steps have no row": "{:,} / {:,} 个步长没有行",
    "{:.0f} % of the steps have no row: they are missing": "{:.0f} % 的步长没有行: 视为缺失",
    "{:,} rows lie at the same step ({}) as another one: the last one is used": (
        "{:,} 行与另一行落在同一步长 ({}) 上: 使用最后一行"
    ),
    "no column {}; it has {}": "没有列 {}；有 {}",
    "the stamps of {} cannot be read, such as {!r}: --time_format says how they are written": (
        "{} 的时间戳无法读取，例如 {!r}: 用 --time_format 说明格式"
    ),
    (
        "{} of {} stamps of {} cannot be read, such as {} in row {}; --time_format says how "
        "they are written"
    ): ("{} / {} 个 {} 的时间戳无法读取，例如 {} (第 {} 行)；用 --time_format 说明格式"),
    (
        "{} of {} stamps of {} cannot be read, such as {} in row {}: if that is a total, a note or "
        "the header of another table, delete that row"
    ): (
        "{} / {} 个 {} 的时间戳无法读取，例如 {} (第 {} 行): 如果是合计、备注或另一个表格的表头，"
        "请删除该行"
    ),
    (
        "on some days of the week only ({}), which are no even steps: --time_column none takes "
        "the rows as they stand"
    ): "只在一周的某些天 ({})，步长不均匀: --time_column none 按行的顺序使用",
    (
        "about every {:g} days, but by a calendar that starts anew each month or year: make "
        "the steps even (pandas: resample); --time_column none takes the rows as they stand"
    ): (
        "大约每 {:g} 天一行，但按每月或每年重新开始的日历: 请先变为等间隔 (pandas: "
        "resample)；--time_column none 按行的顺序使用"
    ),
    "{} of {} timestamps are duplicates with other values": "{} / {} 个时间戳重复而数值不同",
    "too short: {} timestamps": "太短: {} 个时间戳",
    "irregular timestamps: only {} of {} fit one step ({})": (
        "时间戳不规则: 只有 {} / {} 个符合同一步长 ({})"
    ),
    (
        "sparse timestamps: {:,} of {:,} steps ({}) have no row: add them (pandas: asfreq), with "
        "0 if that is meant; for hours of trade and the like, --time_column none takes the rows "
        "as they stand"
    ): (
        "时间戳稀疏: {:,} / {:,} 个步长 ({}) 没有行: 请补上 (pandas: asfreq)，若表示 0 则填 0；"
        "交易时段之类用 --time_column none 按行的顺序使用"
    ),
    "no numeric column among {}": "这些列中没有数字列: {}",
    "no numeric column among {}; {} holds cells such as {!r}": (
        "这些列中没有数字列: {}；{} 的单元格例如 {!r}"
    ),
    (
        "no timestamps were found (--time_column, --time_format): the rows are taken as they "
        "stand, as if the oldest came first"
    ): "没有找到时间戳 (--time_column, --time_format): 按行的顺序使用，视为最早的在前",
    (
        "{} seems to hold years and months, such as {:.2f}: --time_column {} --time_format %Y.%m "
        "reads them, --time_column none takes the rows as they stand"
    ): (
        "{} 似乎是年和月，例如 {:.2f}: 用 --time_column {} --time_format %Y.%m 读取，"
        "--time_column none 则按行的顺序使用"
    ),
    "no column to forecast: {}": "没有可预测的列: {}",
    "{} is passed over: it {}": "跳过 {}: 它{}",
    "is an index by its name": "按名称是索引",
    "is a part of a date by its name": "按名称是日期的一部分",
    "is constant": "是常数",
    "is a part of the date": "是日期的一部分",
    "only rises, or only falls, as a counter or a clock does": "只升或只降，像计数器或时钟",
    (
        "its series lie in rows ({}, ..., {}): reshape it to long format, a row for each time "
        "(pandas.melt)"
    ): ("序列按行排列 ({}, ..., {}): 请变为长格式，每个时刻一行 (pandas.melt)"),
    "{:,} of {:,} rows": "{:,} / {:,} 行",
    "forecast: {}": "预测: {}",
    "  ... and {} more files": "  ... 还有 {} 个文件",
    "skipped: {}": "跳过: {}",
    "unreadable: {}": "无法读取: {}",
    (
        "unreadable: {}; if the table begins further down, --skip_rows leaves out the lines above "
        "its header"
    ): "无法读取: {}；如果表格从更下面开始，用 --skip_rows 跳过表头之上的行",
    "it is no UTF-8; read as {}, such as {!r} (--encoding)": (
        "不是 UTF-8；按 {} 读取，例如 {!r} (--encoding)"
    ),
    "its first line ({}) is taken for the names of the columns": "第一行 ({}) 被当作列名",
    "no CSV: it has a line of more than {:,} bytes": "不是 CSV: 有一行超过 {:,} 字节",
    "no CSV but {}": "不是 CSV，而是 {}",
    (
        "numbers such as {}: is the mark of decimals (--decimal {}) or of thousands "
        "(--thousands {})?"
    ): ("有 {} 这样的数字: 是小数点 (--decimal {}) 还是千分位 (--thousands {})？"),
    "--time_format {}: {}": "--time_format {}: {}",
    "stamps such as {!r} are {} or {}: --time_format decides": (
        "时间戳例如 {!r} 可能是 {} 或 {}: 用 --time_format 决定"
    ),
    (
        "{} only falls and there are no timestamps: do the newest rows come first? Turn the "
        "file round; --time_column none takes the rows as they stand"
    ): (
        "{} 逐行递减且没有时间戳: 最新的行在前吗？请把文件倒过来；--time_column none 按行的顺序使用"
    ),
    "{} of {} stamps of {} cannot be read, such as {}: these rows are left out": (
        "{} / {} 个 {} 的时间戳无法读取，例如 {}: 这些行不使用"
    ),
    (
        "if {} tells the series apart: --id_columns {}; if it counts minutes or periods of the "
        "day, write it as a clock such as 13:30: --time_column {} {}"
    ): (
        "如果 {} 区分各序列: --id_columns {}；如果它是一天中的分钟数或时段号，"
        "请写成时刻，例如 13:30: --time_column {} {}"
    ),
    "if {} tells the series apart: --id_columns {}": "如果 {} 区分各序列: --id_columns {}",
    "time {} by step {}, {} to {}": "时间 {}，步长 {}，{} 至 {}",
    "no timestamps: the rows in their order": "没有时间戳: 按行的顺序",
    "{} columns behind it (--columns)": "其后还有 {} 列 (--columns)",
    "{:,} series by {}": "{:,} 个序列，按 {} 区分",
    "{} lines above the header left out": "表头之上跳过 {} 行",
    "decimal mark {!r}": "小数点 {!r}",
    "mark of thousands {!r}": "千分位 {!r}",
    "passed over: {}": "跳过的列: {}",
    (
        "{:,} cells of {} are no numbers, such as {!r}: they count as missing (--na_values "
        "says that they are, --thousands and --decimal how numbers are written)"
    ): (
        "{:,} 个 {} 的单元格不是数字，例如 {!r}: 视为缺失 (--na_values 可确认，--thousands "
        "和 --decimal 说明数字的写法)"
    ),
    "{} is {:g} in {:,} rows, far from the rest: if that means missing, --na_values {:g}": (
        "{} 的值 {:g} 出现在 {:,} 行中，远离其他值: 如果表示缺失，用 --na_values {:g}"
    ),
    "{:,} rows are there twice: used once": "{:,} 行重复: 只用一次",
    "{:,} rows have the stamp of another one and other values: the last one is used": (
        "{:,} 行的时间戳与另一行相同而数值不同: 使用最后一行"
    ),
    (
        "a process that read the CSVs was killed, perhaps for want of memory; use fewer files "
        "at once (--max_files)"
    ): ("读取 CSV 的进程被终止，可能是内存不足；请一次使用较少的文件 (--max_files)"),
    "  {}: skipped: {}": "  {}: 跳过: {}",
    "  {}: skipped: {} more series": "  {}: 跳过: 另外 {} 个序列",
    "if {} is the time of the day: --time_column {} {}": (
        "如果 {} 是一天中的时刻: --time_column {} {}"
    ),
    "{} more": "另外 {} 个",
    "\n  {}: skipped: {}": "\n  {}: 跳过: {}",
    "skipped: {}: {}": "跳过: {}: {}",
    "dates and clocks lie in two columns: --time_column {} {}": (
        "日期和时刻分在两列: --time_column {} {}"
    ),
    "and in {} more files": "另外 {} 个文件中也有",
    "{} usable files, it takes {}; or use --split_by time{}": (
        "{} 个可用文件，至少需要 {} 个；或用 --split_by time{}"
    ),
    "--input {}: no series to forecast{}": "--input {}: 没有可预测的序列{}",
    "... and {} more such notes": "... 还有 {} 条类似的提示",
    "{}: {} missing values in the context are filled in": "{}: 上下文中的 {} 个缺失值已填补",
    "{}: its last {} values are missing: the last known one is carried forward": (
        "{}: 最后 {} 个值缺失: 沿用最后一个已知值"
    ),
    "{}: its step is {}, the student was trained on {}": "{}: 步长为 {}，学生是在 {} 上训练的",
    "unknown ones": "未知步长",
    "unknown": "未知",
    # notes, warnings and errors
    "{}: no home folder is known for {}; give the path without ~": (
        "{}: 找不到 {} 的主目录；请给出不带 ~ 的路径"
    ),
    "{}: it defines no function forecast(context, horizon)": (
        "{}: 其中没有定义函数 forecast(context, horizon)"
    ),
    "beyond {} steps the student goes on from its own forecast": (
        "超过 {} 步后，学生模型以自己的预测为输入继续预测"
    ),
    "the teacher gives no quantiles: they are learned from truth alone": (
        "该教师不给出分位数：分位数只用真值学习"
    ),
    "{}, line {}: {}: {}": "{}, 第 {} 行: {}: {}",
    "{}: forecast gave a {}, which is no array of numbers": (
        "{}: forecast 返回了 {}, 不是数值数组"
    ),
    "{}: forecast gave the shape {} for contexts {}; {} or {} is expected": (
        "{}: forecast 返回的形状是 {} (上下文为 {}); 应为 {} 或 {}"
    ),
    "{}: forecast gave a value that is not finite, for {} of {} contexts": (
        "{}: forecast 返回了非有限值, 涉及 {} 个上下文 (共 {} 个)"
    ),
    "{}: forecast gave quantiles for some contexts, and points for others": (
        "{}: forecast 对一些上下文返回分位数, 对另一些返回点预测"
    ),
    "{}: no such file": "{}: 没有这个文件",
    "--with_teacher: the teacher that {} names is a Python file ({}), which is run only"
    " where you name it: --teacher_model {}": (
        "--with_teacher: {} 所写的教师是 Python 文件 ({}), 只有由您指定才会运行: --teacher_model {}"
    ),
    "{} has {:+.1f} % of MSE beside {}": "{} 的 MSE 相差 {:+.1f} % (与 {} 相比)",
    "{}: is a file; a folder or a hub id is expected": (
        "{}: 是一个文件；这里需要文件夹或 hub 上的模型名"
    ),
    "{}: cannot be written ({})": "{}: 无法写入 ({})",
    "{}: is not UTF-8, which a name must be; rename it": "{}: 名称必须是 UTF-8 编码；请改名",
    (
        "too short: {} rows, of which the first {} train; "
        "a window takes {} (--context_length {} + --prediction_length {})"
    ): (
        "太短: {} 行，其中前 {} 行用于训练；"
        "一个窗口需要 {} 行 (--context_length {} + --prediction_length {})"
    ),
    "too short: {} rows; a window takes {} (--context_length {} + --prediction_length {})": (
        "太短: {} 行；一个窗口需要 {} 行 (--context_length {} + --prediction_length {})"
    ),
    "{} of {} rows, fewer than the {} of --prediction_length": (
        "{} 行 (共 {} 行)，少于 --prediction_length 的 {} 行"
    ),
    (
        "no {} rows (--context_length {} + --prediction_length {}) "
        "without a gap longer than {} (--max_gap)"
    ): (
        "没有连续 {} 行 (--context_length {} + --prediction_length {}) "
        "不含长于 {} 的缺口 (--max_gap)"
    ),
    (
        "the data gives no {} window; use more or longer series, or shorter lengths "
        "(--context_length, --prediction_length){}"
    ): (
        "数据中没有 {} 窗口；请用更多或更长的序列，或更短的长度 "
        "(--context_length, --prediction_length){}"
    ),
    "{}\nA student of shorter lengths fits:\n  {}": "{}\n更短长度的学生适用:\n  {}",
    "{}: not a command; these are {}{}": "{}: 不是命令；命令有 {}{}",
    "; did you mean {}?": "；您是不是想用 {}?",
    "{} problem(s) with the defaults in the script\n  {}": "脚本中的默认值有 {} 个问题\n  {}",
    "no arguments, and no data in {} (--data_dir). To begin:\n{}": (
        "没有参数，{} 中也没有数据 (--data_dir)。可以这样开始:\n{}"
    ),
    (
        "{} is among the data that the student was trained on ({}): "
        "on data that it has not seen the error may be larger"
    ): "{} 属于学生的训练数据 ({}): 在未见过的数据上误差可能更大",
    "too short: {} rows; the student takes {}": "太短: {} 行；学生需要 {} 行",
    "nothing but missing values in its last {} rows; the student takes {}": (
        "最后 {} 行全是缺失值；学生需要 {} 行"
    ),
    "the frame: {}": "数据框: {}",
    "{}\nThese lengths work with this data:\n  {}": "{}\n以下长度适用于这些数据:\n  {}",
    "no {} window: {}": "没有 {} 窗口: {}",
    "note: {}": "注意: {}",
    "WARNING: {}": "警告: {}",
    "error: {}": "错误: {}",
    "stopped by {}": "因 {} 而停止",
    "{} is not installed: pip install -r requirements.txt, or pip install {}": (
        "未安装 {}: pip install -r requirements.txt，或 pip install {}"
    ),
    "{}: refused: not a student of this program, or damaged: {}": (
        "{}: 拒绝读取: 不是本程序的学生模型，或已损坏: {}"
    ),
    "--resume: {}: damaged, or of another student ({})": (
        "--resume: {}: 已损坏，或属于另一个学生 ({})"
    ),
    "{}: config.json and model.safetensors are of two models; export it again": (
        "{}: config.json 与 model.safetensors 不属于同一个模型；请重新导出"
    ),
    "{}: its manifest names a patch size of no use: {}": "{}: 清单中的 patch 大小不可用: {}",
    (
        "{}: another run writes here (process {} on {}); take another --save_dir, or wait for its"
        " end; if it is gone, delete {}"
    ): (
        "{}: 另一个运行正在写入 (进程 {}，主机 {})；请换一个 --save_dir，或等它结束；"
        "若它已不在，请删除 {}"
    ),
    (
        "{} started {} processes, but --devices {} on --num_nodes {} are {}; give the numbers"
        " of devices on a node and of nodes that it was told"
    ): (
        "{} 启动了 {} 个进程，而 --devices {}、--num_nodes {} 共 {} 个；请让这两个参数与启动器一致"
    ),
    "srun: {}": "srun: {}",
    "{}: was removed or replaced while this program wrote there; start again": (
        "{}: 在本程序写入期间被删除或替换；请重新开始"
    ),
    "{}: its manifest cannot be used, nor be replaced; remove this folder": (
        "{}: 清单无法使用，也无法替换；请删除该文件夹"
    ),
    "labelled {:,} of {:,} windows, about {:.0f} min to go": (
        "已标注 {:,} / {:,} 个窗口，约剩 {:.0f} 分钟"
    ),
    "the teacher is the one that {} names: {} (--teacher_model names another)": (
        "教师是 {} 中所写的: {} (可用 --teacher_model 指定另一个)"
    ),
    (
        "--with_teacher: {} names its teacher itself ({}), and no labels of it lie in the cache of"
        " that run; name the one to load with --teacher_model"
    ): (
        "--with_teacher: {} 自己写明了教师 ({})，而该运行的标签缓存中没有它的标签；"
        "请用 --teacher_model 指定要加载的教师"
    ),
    "{}: larger than any teacher ({:,} bytes)": "{}: 超过任何教师模型的大小 ({:,} 字节)",
    "{} (python {} --help lists the flags)": "参数有误: {} (python {} --help 列出所有参数)",
    "argument {}: {}": "参数 {}: {}",
    "{} is not a whole number or auto": "{} 不是整数，也不是 auto",
    "{} is not a number or auto": "{} 不是数字，也不是 auto",
    "{} is not three numbers above 0, such as 8:1:1": "{} 不是三个大于 0 的数字，例如 8:1:1",
    "at least {}": "至少为 {}",
    "greater than {}": "大于 {}",
    "at least {} and at most {}": "在 {} 和 {} 之间",
    "no such folder, and not a hub id, which is OWNER/MODEL": (
        "没有这个文件夹，也不是 hub 上的模型名 (形如 OWNER/MODEL)"
    ),
    "access is not granted: ask for it on its hub page, then run `hf auth login`": (
        "没有访问权限: 请在其 hub 页面上申请，然后运行 `hf auth login`"
    ),
    "no such model, or a private one: check the id, or run `hf auth login`": (
        "没有这个模型，或它是私有的: 请检查模型名，或运行 `hf auth login`"
    ),
    "no such revision of it (--teacher_revision names that of a teacher)": (
        "没有这个版本 (--teacher_revision 指定教师的版本)"
    ),
    "not in the local cache, and the hub is out of reach or switched off": (
        "不在本地缓存中，且无法连接 hub 或已设为离线"
    ),
    "the model has no such file: a teacher is a MOIRAI, a student is what `export` writes": (
        "模型中没有这个文件: 教师应为 MOIRAI，学生应为 `export` 的输出"
    ),
    "--output {}: is no file: --plot has no place beside it": (
        "--output {}: 不是普通文件，--plot 无处可放"
    ),
    "the download failed": "下载失败",
    (
        "{} ({}): {}; or check the network and HF_HUB_OFFLINE, set HF_ENDPOINT to a mirror, or "
        "give a local folder [{}]"
    ): ("{} ({}): {}；或检查网络和 HF_HUB_OFFLINE，把 HF_ENDPOINT 设为镜像，或改用本地文件夹 [{}]"),
    "{}: cannot be written ({}); what was there before is as it was": (
        "{}: 无法写入 ({})；原有内容未改动"
    ),
    "{} is not a folder to write to": "{} 不是可写的文件夹",
    "{}: an ONNX file, which evaluate alone takes; name the run or its .pt": (
        "{}: 是 ONNX 文件，只有 evaluate 接受；请给出训练目录或其 .pt"
    ),
    "{}: onnxruntime cannot run it: {}": "{}: onnxruntime 无法运行它: {}",
    "{}: not an ONNX file of a student, or damaged ({})": (
        "{}: 不是学生模型的 ONNX 文件，或已损坏 ({})"
    ),
    "{}: no such checkpoint": "{}: 没有这个检查点",
    "{}: refused: damaged, or not plain data ({})": "{}: 拒绝读取: 已损坏，或不是纯数据 ({})",
    "{}: not a checkpoint of this program": "{}: 不是本程序的检查点",
    "{}: of a newer format ({}); update moirai_distill.py": (
        "{}: 格式版本较新 ({})；请更新 moirai_distill.py"
    ),
    "{}: no {} in this folder: neither a model's nor a run's with a best epoch": (
        "{}: 该文件夹中没有 {}: 既不是模型的文件夹，也不是有最佳 epoch 的训练目录"
    ),
    "\nstopping as soon as the work in hand is saved; once more stops at once": (
        "\n保存手头的工作后停止；再按一次立即停止"
    ),
    "{} problem(s) with the arguments\n  {}": "参数有 {} 个问题\n  {}",
    FIRST_COMMANDS: """\
  python moirai_distill.py --demo
      离线演示全部流程，只需几分钟，结果在 {}
  python moirai_distill.py --data_dir my.csv --context_length 48 --prediction_length 12 \\
      --num_epochs 60 --learning_rate 1e-3 --save_dir checkpoints/mine
      用自己的小 CSV 训练；长度不合适时，会给出合适的长度
  python moirai_distill.py predict --checkpoint checkpoints/mine --input my.csv --plot
      预测其后的值，输出 CSV 和图片""",
    "--{} {}: must be {}": "--{} {}: 必须{}",
    "True or False": "是 True 或 False",
    "a list of texts, such as ['first']": "是文本列表，例如 ['first']",
    "one of {}": "是其中之一: {}",
    "a whole number": "是整数",
    "a number": "是数字",
    "a whole number or 'auto'": "是整数或 'auto'",
    "a number or 'auto'": "是数字或 'auto'",
    "a text in quotes, as it is typed": "是带引号的文本，与命令行写法相同",
    "{}: not an argument of {}": "{}: 不是 {} 的参数",
    "{}; the command comes first, before all flags": "{}；命令写在最前面，所有参数之前",
    "{}; did you mean {}?": "{}；您是不是想用 {}?",
    "--checkpoint {}: no such file or folder": "--checkpoint {}: 没有这个文件或文件夹",
    "--data_dir {}: no such folder or file": "--data_dir {}: 没有这个文件夹或文件",
    "--input {}: no such folder or file": "--input {}: 没有这个文件夹或文件",
    "--teacher_model {}: is a file; a folder, a hub id or a .py file is expected": (
        "--teacher_model {}：是文件；应为文件夹、hub 上的名称或 Python 文件 (.py)"
    ),
    "--teacher_model {}: no such file": "--teacher_model {}：没有这个文件",
    "--teacher_patch_size: the teacher {} has no patches": (
        "--teacher_patch_size：教师 {} 没有补丁"
    ),
    "--with_forecaster {}: no such Python file": "--with_forecaster {}：没有这个 Python 文件",
    "{:>41.1f} ms": "{:>41.1f} ms",
    "--teacher_model {}: no such folder": "--teacher_model {}: 没有这个文件夹",
    "--output {}: is a file; a folder is to be written": (
        "--output {}: 是一个文件；这里要写入文件夹"
    ),
    "--output {}: is a folder; a file is to be written": (
        "--output {}: 是一个文件夹；这里要写入文件"
    ),
    "--output {}: is the input": "--output {}: 与输入文件相同",
    "--output {}: is where --plot puts the picture": "--output {}: 与 --plot 的图片同名",
    "--thousands {}: must be one mark, such as , or none": (
        "--thousands {}: 必须是一个符号 (例如 ,) 或 none"
    ),
    "--thousands {}: is the --decimal mark, too": "--thousands {}: 与 --decimal 的小数点相同",
    "--device {}: is not auto, cpu, cuda, cuda:1 or mps": (
        "--device {}: 不是 auto、cpu、cuda、cuda:1 或 mps"
    ),
    "--device {}: is not here (PyTorch finds {} CUDA GPUs); use --device cpu": (
        "--device {}: 不可用 (PyTorch 找到 {} 个 CUDA GPU)；请用 --device cpu"
    ),
    "--teacher_precision bf16: needs a GPU; use 32": "--teacher_precision bf16: 需要 GPU；请用 32",
    "--devices {}: not with --device {}": "--devices {}: 不能与 --device {} 同用",
    "--devices {}: PyTorch finds {} GPUs": "--devices {}: PyTorch 找到 {} 个 GPU",
    "--num_heads {}: does not divide --d_model {}": "--num_heads {}: 不能整除 --d_model {}",
    "--patch_size {}: longer than --context_length {}": "--patch_size {}: 大于 --context_length {}",
    "--resume: no {} to go on from; start without --resume": (
        "--resume: 没有可供继续的 {}；请去掉 --resume 重新开始"
    ),
    "this is Python {}; it takes {} or newer": "当前是 Python {}；需要 {} 或更新版本",
    "input or output": "输入或输出",
    "unreadable: it holds NUL bytes: damaged, or UTF-16 without its mark (--encoding)": (
        "无法读取: 含有 NUL 字节: 已损坏，或是没有 BOM 的 UTF-16 (--encoding)"
    ),
    "unreadable: not in --encoding {} ({})": "无法读取: 不是 --encoding {} 的编码 ({})",
    "unreadable: --encoding {}: no such encoding": "无法读取: --encoding {}: 没有这种编码",
    "--data_dir {}: no .csv or .parquet file in this folder or below": (
        "--data_dir {}: 该文件夹及其子文件夹中没有 .csv 或 .parquet 文件"
    ),
    "constant, or nothing but missing values": "是常数，或全是缺失值",
    "values too large or too close for float64": "数值过大或彼此过近，超出 float64 的精度",
    "nearly constant: its values differ from {:g} by rounding errors": (
        "几乎是常数: 数值与 {:g} 只差舍入误差"
    ),
    "--split_ratio leaves none of {} usable files for training; use --split_by time": (
        "按 --split_ratio，{} 个可用文件中没有一个留给训练；请用 --split_by time"
    ),
    "{}: not a student of this program, or damaged ({})": "{}: 不是本程序的学生模型，或已损坏 ({})",
    "--teacher_point mean: only for a MOIRAI 1.0 or 1.1; use median": (
        "--teacher_point mean: 仅适用于 MOIRAI 1.0 或 1.1；请用 median"
    ),
    "out of GPU memory: the teacher goes on with {} windows a call": (
        "显存不足: 教师改为每次调用 {} 个窗口"
    ),
    "{}: config.json is not JSON ({}); download it again": (
        "{}: config.json 不是 JSON ({})；请重新下载"
    ),
    "--teacher_precision bf16: not for a MOIRAI-MoE; use 32": (
        "--teacher_precision bf16: 不适用于 MOIRAI-MoE；请用 32"
    ),
    "uni2ts cannot be imported ({}); pip install -r requirements.txt": (
        "无法导入 uni2ts ({})；请运行 pip install -r requirements.txt"
    ),
    "{}: config.json or model.safetensors is damaged or of another model ({}: {})": (
        "{}: config.json 或 model.safetensors 已损坏，或属于其他模型 ({}: {})"
    ),
    "{}: another kind of model, not a MOIRAI such as Salesforce/moirai-1.1-R-base": (
        "{}: 是另一类模型，不是 MOIRAI (例如 Salesforce/moirai-1.1-R-base)"
    ),
    "{}: config.json has {}, which no MOIRAI has": "{}: config.json 中有 {}，MOIRAI 没有这一项",
    "{}: {} in config.json is {}; it must be {} from {} to {}": (
        "{}: config.json 中 {} 的值是 {}；类型必须是 {}，范围从 {} 到 {}"
    ),
    "{}: distr_output in config.json is no output distribution of uni2ts; refused ({})": (
        "{}: config.json 中的 distr_output 不是 uni2ts 的输出分布；拒绝读取 ({})"
    ),
    "{} holds labels of several teachers named {}; put its weights at hand": (
        "{} 中有多个名为 {} 的教师的标签；请提供它的权重"
    ),
    "--teacher_patch_size {}: with these lengths the teacher takes {}": (
        "--teacher_patch_size {}: 在这些长度下教师可用的大小: {}"
    ),
    "none": "无",
    "going on with the unfinished labels in {}": "继续制作 {} 中未完成的标签",
    "--label_cache: {}, and the labels are not in it": "--label_cache: {}，其中也没有所需的标签",
    "the labels made so far are kept in {}": "已制作的标签保存在 {}",
    "the same command with --resume goes on from here": "用同一命令加 --resume 可从这里继续",
    "the same command with --resume repeats the trials": "用同一命令加 --resume 会重新试训",
    "saved {}; {}": "已保存 {}；{}",
    (
        "{} steps in a row with a non-finite loss or gradient in epoch {}; try a lower "
        "--learning_rate; the best checkpoint so far is kept"
    ): (
        "连续 {} 步的损失或梯度不是有限值 (epoch {})；请调小 --learning_rate；"
        "已有的最佳检查点仍然保留"
    ),
    "{} steps with a non-finite loss or gradient were skipped": (
        "跳过了 {} 步，其损失或梯度不是有限值"
    ),
    "only the first {} by name are read (--max_files {}; 0 = all)": (
        "只读取按名称排序的前 {} 个文件 (--max_files {}；0 = 全部)"
    ),
    "at most {} training windows of each series, spread over it (--max_windows; 0 = all)": (
        "每个序列最多 {} 个训练窗口，均匀分布 (--max_windows；0 = 全部)"
    ),
    "files without timestamps are taken as hourly: season 24 (--season changes it)": (
        "没有时间戳的文件视为每小时一行: 季节周期 24 (用 --season 更改)"
    ),
    "rows without timestamps seem to repeat about every {} steps: --season {} lets the student and"
    " seasonal-naive know it": (
        "没有时间戳的行似乎约每 {} 步重复一次: 用 --season {} 告诉学生模型和季节性朴素预测"
    ),
    "{} windows have a non-finite label; where they train, they train on truth alone": (
        "{} 个窗口的标签不是有限值；训练时这些窗口只用真值"
    ),
    "no CUDA GPU found: this runs on the CPU": "没有找到 CUDA GPU: 在 CPU 上运行",
    "--resume: {} was trained on labels of other teacher weights": (
        "--resume: {} 是用另一个教师权重的标签训练的"
    ),
    "{} (step {})": "{} (步长 {})",
    "no epoch gave a finite validation loss; try a lower --learning_rate": (
        "所有 epoch 的验证损失都不是有限值；请调小 --learning_rate"
    ),
    "no alpha gave a finite validation loss; try a lower --learning_rate": (
        "所有 alpha 的验证损失都不是有限值；请调小 --learning_rate"
    ),
    "--resume: {} does not fit this command\n  {}": "--resume: {} 与当前命令不符\n  {}",
    "--{} was {}, is {}": "--{} 原为 {}，现为 {}",
    "the data is not the same": "数据不同",
    (
        "its labels are of an earlier version (the lower of the two middle samples is not their "
        "median); start without --resume"
    ): ("其标签来自旧版本 (两个中间样本取较小者并非中位数)；请去掉 --resume 重新开始"),
    "its student is of an earlier version, with another seasonal part; start without --resume": (
        "其学生模型来自旧版本，季节部分不同；请去掉 --resume 重新开始"
    ),
    "the teacher's weights are not the same": "教师权重不同",
    "an earlier run lay in {}; its files are now in {}": (
        "{} 中原有一次训练的结果；其文件已移到 {}"
    ),
    "the data of {} ({}) is not here; give --data_dir": (
        "找不到 {} 的数据 ({})；请给出 --data_dir"
    ),
    "it does not say where": "其中没有记录位置",
    "these are not the test windows of {}'s own run: it may have been trained on them": (
        "这些不是 {} 训练时的测试窗口: 它可能用这些数据训练过"
    ),
    "--checkpoint: these have no windows in common ({}); give one of them": (
        "--checkpoint: 以下各项没有共同的窗口 ({})；请只给其中一个"
    ),
    "the flags": "命令行参数",
    "{}; give --output_dir": "{}；请给出 --output_dir",
    "{} {} and {}": "{} {} 与 {}",
    "other training data": "训练数据不同",
    "other weights to begin with": "初始权重不同",
    "Begins with the weights of {} ({})": "以 {} 的权重开始 ({})",
    "--init_from {}: of other sizes: {}": "--init_from {}: 尺寸不同: {}",
    "--init_from {}: no such file or folder": "--init_from {}: 没有这个文件或文件夹",
    "--init_from {}: lies in --save_dir, whose run is moved away; name another --save_dir": (
        "--init_from {}: 位于 --save_dir 之内，其中的训练会被移走；请换一个 --save_dir"
    ),
    "other validation data": "验证数据不同",
    "{}: its last {} values are missing, the forecast cannot be compared": (
        "{}: 最后 {} 个值缺失，无法比较预测"
    ),
    "{}: not kept: it differs from PyTorch by {:.1e} deviations": (
        "{}: 未保存: 与 PyTorch 相差 {:.1e} 个标准差"
    ),
    "{}: not kept: the {} of int8 is {:.2f} % above that of float32, more than {:g} %": (
        "{}: 未保存: int8 的 {} 比 float32 高 {:.2f} %，超过 {:g} %"
    ),
    "--int8: a hub folder has float32; give --format onnx": (
        "--int8: hub 文件夹为 float32；请用 --format onnx"
    ),
    "--output {}: holds other files; choose another folder": (
        "--output {}: 其中有其他文件；请换一个文件夹"
    ),
    "{}: damaged ({}); evaluate writes it anew": "{}: 已损坏 ({})；evaluate 会重新写入",
    "  {}  MSE {:.4f}  MAE {:.4f}  MASE {:.4f}{}": "  {}  MSE {:.4f}  MAE {:.4f}  MASE {:.4f}{}",
    "{:>12} parameters {:>5.1f} MB {:>6.1f} ms": "{:>12} 个参数 {:>5.1f} MB {:>6.1f} ms",
    "{:.1f} MB": "{:.1f} MB",
    "{:,} windows": "{:,} 个窗口",
    "{:.0f} % made": "已完成 {:.0f} %",
    "patch {}": "patch {}",
    "out of GPU memory ({}); lower --batch_size or --teacher_batch_size": (
        "显存不足 ({})；请调小 --batch_size 或 --teacher_batch_size"
    ),
    "the labels in {} hold no quantiles: the teacher is asked again for these"
    " (--quantiles off does without)": (
        "{} 中的标签没有分位数: 为此再次询问教师 (--quantiles off 则不需要)"
    ),
    "these labels hold no quantiles, and the teacher's weights are not at hand:"
    " quantiles are learned from truth alone": (
        "这些标签没有分位数，教师的权重也不在本机: 分位数只用真值学习"
    ),
    "--teacher_point mean draws no samples: quantiles are learned from truth alone": (
        "--teacher_point mean 不抽样: 分位数只用真值学习"
    ),
    "--quantiles on: the teacher has no levels {}; use --quantiles off": (
        "--quantiles on: 教师没有分位数 {}；请用 --quantiles off"
    ),
    "this student has no quantiles; train one with --quantiles on": (
        "该学生模型没有分位数；请用 --quantiles on 训练一个"
    ),
    "this student has no quantiles: it forecasts the point alone": (
        "该学生模型没有分位数: 只给出点预测"
    ),
    "\nLearning quantiles: {:,} steps": "\n学习分位数: {:,} 步",
    "quantiles are not learned yet; {}": "分位数尚未学完；{}",
    "{} and quantiles": "{} 和分位数",
    "the quantiles are not finite on validation: the student does without them": (
        "分位数在验证集上不是有限值: 学生模型不带分位数"
    ),
    "Quantiles: validation WQL {:.4f}, {:.1f} % of the points lie in the 80 % band": (
        "分位数: 验证 WQL {:.4f}，{:.1f} % 的点落在 80 % 区间内"
    ),
    "\nQuantiles 0.1 to 0.9, over the whole horizon (and by third of it):": (
        "\n分位数 0.1 到 0.9，整个预测区间 (及其各三分之一):"
    ),
    "  {}  WQL {:.4f} ({})  in the 80 % band {:.1f} % ({})": (
        "  {}  WQL {:.4f} ({})  落在 80 % 区间内 {:.1f} % ({})"
    ),
}


def printable(text, kept=""):
    """A text whose control characters, but for those that are kept, are shown as escapes.

    Names of files, columns and models come from strangers: none of them may move the cursor, clear
    the screen, or look like a line that this program printed.
    """
    if text.isprintable():  # the usual case
        return text
    signs = []
    for sign in text:
        is_plain = sign.isprintable() or sign in kept or unicodedata.category(sign) == "Zs"
        signs.append(sign if is_plain else ascii(sign)[1:-1])
    return "".join(signs)


def in_language(message, language):
    """Text of a Message (or Told, or anything else that has one) in a language, "en" or "zh"."""
    if isinstance(message, list):
        return "; ".join(in_language(part, language) for part in message)
    if isinstance(message, Told):
        message = message.message
    if not isinstance(message, Message):
        is_number = isinstance(message, int | float | np.number)
        return message if is_number else printable(str(message))
    template = message.sentence
    if language == "zh":
        template = CHINESE.get(template, template)
    values = [in_language(value, language) for value in message.values]
    return printable(str(Message(template, tuple(values))), kept="\n")


class Voice:
    """Prints in the user's language: results on stdout, notes and progress on stderr."""

    def __init__(self, language):
        self.language = language
        self.is_on = True  # off in all processes but the first
        self.is_muted = False  # no results, while --alpha auto tries

    def say(self, sentence, *values):
        """Print a result: an English sentence with placeholders, and what stands in them."""
        if self.is_on and not self.is_muted:
            print(in_language(Message(sentence, values), self.language), flush=True)

    def note(self, sentence, *values):
        """Print what is worth knowing: a sentence and its values, or a Message."""
        self._tell("note: {}", sentence, values)

    def warn(self, sentence, *values):
        """Print what may make the results wrong: a sentence and its values, or a Message."""
        self._tell("WARNING: {}", sentence, values)

    def _tell(self, heading, sentence, values):
        if isinstance(sentence, Message | Told):
            told = sentence
        elif values:
            told = Message(sentence, values)
        else:
            told = Message(printable(sentence))  # names may stand in it
        if self.is_on:
            line = in_language(Message(heading, (told,)), self.language)
            print(line, file=sys.stderr, flush=True)

    def bar(self, description, **settings):
        """A progress bar (tqdm) that vanishes at its end; none where stderr is no terminal."""
        is_disabled = None if self.is_on else True  # None: tqdm asks whether it is a terminal
        return tqdm(desc=printable(description), leave=False, disable=is_disabled, **settings)


# == Files and signals =============================================================================

HUB_REMEDIES = (  # (error of huggingface_hub, what to do): the first that fits is told
    (
        "HFValidationError",
        Message("no such folder, and not a hub id, which is OWNER/MODEL"),
    ),
    (
        "GatedRepoError",
        Message("access is not granted: ask for it on its hub page, then run `hf auth login`"),
    ),
    (
        "RepositoryNotFoundError",
        Message("no such model, or a private one: check the id, or run `hf auth login`"),
    ),
    (
        "RevisionNotFoundError",
        Message("no such revision of it (--teacher_revision names that of a teacher)"),
    ),
    (
        "LocalEntryNotFoundError",
        Message("not in the local cache, and the hub is out of reach or switched off"),
    ),
    (
        "EntryNotFoundError",
        Message(
            "the model has no such file: a teacher is a MOIRAI, a student is what `export` writes"
        ),
    ),
)


@contextlib.contextmanager
def atomic(path, replace=True):
    """A file to write bytes to, which gets the name `path` once it is whole and on disk.

    Without `replace`, a file that is there already stays. One that is replaced hands on its mode
    and owner. Raises UserError where the disk is full or the place cannot be written to; what was
    there before is then as it was.
    """
    path = Path(path)
    temporary = path.with_name(temporary_name())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not replace:
            # A link fails where there is a file already, which stays; or where the file system
            # knows no links, and then the file takes its name as always.
            with contextlib.suppress(OSError):
                os.link(temporary, path)
        if replace or not path.is_file():
            keep_mode(path, temporary)
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            "{}: cannot be written ({}); what was there before is as it was", path, reason
        ) from error
    finally:
        with contextlib.suppress(OSError):  # most often it has its name already
            temporary.unlink()


def temporary_name():
    """A new name for a temporary file, by which `remove_leftovers` knows whose it is."""
    pid = os.getpid()
    return f".{uuid.uuid4().hex}-{pid}-{process_start(pid)}-{machine_id()}.tmp"


@contextlib.contextmanager
def temporary_folder(parent):
    """Path of a new folder that is gone after the block."""
    path = Path(parent, temporary_name())
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def new_folders(folder):
    """Make a folder and those above it; what was made here, and is empty at the end, goes again."""
    folder = Path(folder).absolute()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in made:  # the innermost first
            with contextlib.suppress(OSError):  # it holds something, or is gone
                path.rmdir()


@contextlib.contextmanager
def telling_full_disk(path):
    """Raise UserError where other packages write below `path` and the disk is full.

    They make errors of their own kinds of it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = os.strerror(code)
            if getattr(error, "errno", None) == code or reason in str(error):
                raise UserError("{}: cannot be written ({})", path, reason) from error
        raise


def remove_leftovers(folder):
    """Remove the temporary files that killed programs left in a folder.

    Those of this machine whose process is gone; of other ones, which may share the folder, those
    that are a day old.
    """
    for name in listed(folder):
        form = TEMPORARY.fullmatch(name)
        if not form:
            continue
        path = Path(folder, name)
        pid, began, machine = form.groups()
        with contextlib.suppress(OSError):  # another program may be faster, or it is not ours
            if machine == machine_id():
                is_left = process_start(pid) != began
            else:
                is_left = time.time() - path.lstat().st_mtime > 86_400
            if is_left and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif is_left:
                path.unlink()


def listed(folder):
    """Names of what lies in a folder; none where it is not there, or goes at this moment."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


@functools.cache
def machine_id():
    """Short name of this machine since it started, and of the container that this runs in."""
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # only Linux tells
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        facts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:8]


def process_start(pid):
    """What tells a process of this machine from earlier ones of its number, None where it is gone.

    It is "" where the system does not tell.
    """
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]  # a zombie is gone
    if os.name == "posix":
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return ""
    return ""


def keep_mode(old, new):
    """Give a file the mode and owner of the one that it will replace, as far as that is allowed."""
    if not old.is_file():
        return
    with contextlib.suppress(OSError):
        shutil.copymode(old, new)
    with contextlib.suppress(OSError, AttributeError):  # Windows has no owners
        os.chown(new, old.stat().st_uid, old.stat().st_gid)


def follow_umask(path):
    """Give a file the mode that a new one gets here; safetensors writes its files for the owner."""
    fresh = path.with_name(f".{uuid.uuid4().hex}.tmp")
    fresh.touch()
    shutil.copymode(fresh, path)
    fresh.unlink()


@contextlib.contextmanager
def output_file(path):
    """As `atomic`, for a path that the user typed: its links are followed.

    What is no regular file, such as /dev/stdout or a pipe, is written to as it is.
    """
    if is_special(path):
        with open(path, "ab") as file:
            yield file
    else:
        path = Path(os.path.realpath(path))
        remove_leftovers(path.parent)
        with new_folders(path.parent), atomic(path) as file:
            yield file


def is_special(path):
    """Whether a path is that of a device, a pipe or the like, and no name for a file."""
    is_device = str(path).startswith(("/dev/", "/proc/"))  # these may lead to a file, by > or >>
    path = Path(path)
    return is_device or (path.exists() and not path.is_file() and not path.is_dir())


def user_path(text):
    """Path of what a user typed, where ~ is a home folder. Raises UserError without such a home."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(
            "{}: no home folder is known for {}; give the path without ~",
            text,
            Path(text).parts[0],
        ) from error


def unwritable(folder):
    """Message: why a folder cannot be written to or made; None if it can."""
    wanted = user_path(folder).absolute()
    there = next((path for path in (wanted, *wanted.parents) if path.exists()), wanted)
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return None
    return Message("{} is not a folder to write to", (there,))


def file_sha256(path):
    """sha256 of a file in hexadecimal digits, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_text(value, **settings):
    """JSON of a nest of plain values, null where a number is not finite (JSON has no nan)."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _name: None)
    return json.dumps(finite, **settings)


# -- What a file may say ---------------------------------------------------------------------------
#
# Files travel: what one of them says is looked at once, where it is read, so that everything below
# may rely on it. Names may be missing, as older versions wrote fewer, and others are left alone.


@dataclasses.dataclass
class Maybe:
    """A shape of values, or None in its place."""

    shape: object


def misfit(value, shape, place=""):
    """Where a nest of plain values has not a shape, and what stands there; "" where all of it fits.

    A shape is a test (value -> bool), a Maybe, a list of one shape (any number of values that have
    it), or a dict of name -> shape, in which "*" stands for each name that is not listed.
    """
    if isinstance(shape, Maybe):
        return "" if value is None else misfit(value, shape.shape, place)
    if callable(shape):
        return "" if shape(value) else f"{place} is {reprlib.repr(value)}"

    is_list = isinstance(shape, list)
    if not isinstance(value, list | tuple if is_list else dict):
        return f"{place} is {reprlib.repr(value)}"
    for name, part in enumerate(value) if is_list else value.items():
        part_shape = shape[0] if is_list else shape.get(name, shape.get("*"))
        part_place = f"{place}.{name}" if place else f"{name}"
        found = ""
        if not is_list and not is_text(name):
            found = f"a name in {place or 'it'} is {reprlib.repr(name)}"
        elif part_shape is not None:
            found = misfit(part, part_shape, part_place)
        if found:
            return found
    return ""


def is_text(value):
    """Whether a value is a text that can be a name or a path of a file."""
    if not isinstance(value, str) or "\0" in value or len(value) > MOST_TEXT:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def is_size(value):
    """Whether a value is a whole number that can be a size of a network."""
    return type(value) is int and 0 <= value < 2**31


def is_count(value):
    """Whether a value is a whole number that counts something."""
    return type(value) is int and 0 <= value < 2**63


def is_real(value):
    """Whether a value is a number; nan and infinity are numbers."""
    return type(value) is float or (type(value) is int and abs(value) < 2**64)


def is_counts(value):
    """Whether a value is (number of series, number of windows)."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(is_count, value))


def is_sums(value):
    """Whether a value is what `Progress` sums up in an epoch."""
    return isinstance(value, list) and len(value) == 5 and all(map(is_real, value))


def is_losses(value):
    """Whether a value is alpha -> validation loss."""
    if not isinstance(value, dict) or not value:
        return False
    are_alphas = all(is_real(alpha) and 0 <= alpha <= 1 for alpha in value)
    return are_alphas and all(map(is_real, value.values()))


def is_weights(value):
    """Whether a value is name -> tensor of real numbers."""
    if not isinstance(value, dict) or not all(map(is_text, value)):
        return False
    tensors = value.values()
    return all(isinstance(part, torch.Tensor) and part.is_floating_point() for part in tensors)


def flag_shape(action):
    """Shape of what a checkpoint keeps of a flag, from the argparse action that reads the flag."""
    if action.nargs == 0:  # a switch
        return lambda value: isinstance(value, bool)

    def is_right(value):
        if action.choices:
            return value in action.choices
        if action.type is ratio:
            is_triple = isinstance(value, list | tuple) and len(value) == 3
            return is_triple and all(is_real(share) and 0 < share < math.inf for share in value)
        if action.type in (int_or_auto, float_or_auto) and value == "auto":
            return True
        if action.type in (int, int_or_auto, float, float_or_auto):
            is_whole = action.type in (int, int_or_auto)
            is_kind = is_real(value) and not (is_whole and isinstance(value, float))
            is_in_range, _ = RANGES[action.dest]
            return is_kind and math.isfinite(value) and is_in_range(value)
        return is_text(value)

    shape = [is_right] if action.nargs in ("+", "*") else is_right
    return Maybe(shape) if action.default is None else shape


def run_config_shape():
    """Shape of the flags of train that a checkpoint keeps."""
    parser = Parser(add_help=False)
    for add_flags in (
        add_data_flags,
        add_reading_flags,
        add_teacher_flags,
        add_machine_flags,
        add_student_flags,
        add_training_flags,
        add_run_flags,
    ):
        add_flags(parser)
    return {action.dest: flag_shape(action) for action in parser._actions}


SCORES = {metric: Maybe(is_real) for metric in (*METRICS, *QUANTILE_METRICS)}

# manifest.json of a label file, which goes into the checkpoints that are trained on it.
MANIFEST = {
    "key": {
        "data": is_text,
        "windows": lambda value: is_count(value) and value > 0,
        "context": lambda value: is_size(value) and value > 0,
        "horizon": lambda value: is_size(value) and value > 0,
        # "patch" is what was asked for: a size, "auto", or one for each frequency
        "point": is_text,
        "samples": Maybe(is_size),
        "weights": Maybe(is_text),
        "format": is_count,
    },
    "block": lambda value: is_size(value) and value > 0,
    "patch_sizes": {"*": lambda value: is_size(value) and value > 0},
    "quantiles": Maybe([is_real]),  # their levels; labels of earlier versions have none
    "teacher": is_text,
    "revision": Maybe(is_text),
    "commit": Maybe(is_text),
    "licence": is_text,
    "device": is_text,
    "precision": is_text,
    "torch": is_text,
    "made": is_text,
}

# evaluation.json, as far as it is read.
EVALUATION = {
    "windows": is_count,
    "test": is_text,
    "rows": {"*": SCORES | {"weights": Maybe(is_text)}},
}

# A checkpoint, but for `run_config_shape`. In an exported folder most of it is the "info" of its
# config.json.
CHECKPOINT = {
    "format": is_count,
    "student_config": {"*": is_size, "dropout": is_real},
    "model_state_dict": is_weights,
    "training_state_dict": is_weights,
    "versions": {"*": is_text},
    "data": {"*": is_text},
    "freqs": [is_text],
    "counts": {"*": is_counts},
    "alpha_tried": Maybe(is_losses),
    "teacher": Maybe(MANIFEST),
    "quantiles": Maybe({"steps": is_count, "*": is_real}),
    "parameters": is_count,  # of a student in an ONNX file
    "evaluation": Maybe(EVALUATION),
    "parent": Maybe({"name": is_text, "weights": is_text, "licences": [is_text]}),
    "weights": is_text,
    "train_metrics": {"*": Maybe(is_real)},
    "validation_metrics": {"*": Maybe(is_real)},
    "epoch": is_count,
    "loop": {  # the fields of `Progress`
        "epoch": is_count,
        "step": is_count,
        "sums": is_sums,
        "failed": is_count,
        "skipped": is_count,
        "history": [{"epoch": is_count, "*": Maybe(is_real)}],
        "best_epoch": is_count,
        "best_loss": is_real,
        "best_file": is_text,
        "since_best": is_count,
        "stopping": is_count,
    },
}


def check_facts(content):
    """Raise ValueError where what a checkpoint says is of a wrong type or out of its range."""
    found = misfit(content, CHECKPOINT | {"run_config": run_config_shape()})
    if found:
        raise ValueError(f"{found}, which it cannot be")


def read_json(path, most=MOST_JSON):
    """The plain values of a JSON file of at most so many bytes.

    Raises OSError, or ValueError where it is no such file.
    """
    if not Path(path).is_file():  # a pipe would be waited for
        raise ValueError("is no regular file")
    with open(path, "rb") as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise ValueError(f"is longer than {most:,} bytes")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def weight_shapes(path):
    """name -> tensor without memory, for those in a safetensors file, none of which is read."""
    from safetensors import safe_open  # not at the top: a .pt does not need it

    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MOST_HEADER:
        raise ValueError(f"its list of weights is longer than {MOST_HEADER:,} bytes")
    found = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            found[name] = torch.empty(file.get_slice(name).get_shape(), device="meta")
    return found


def check_shapes(wanted, found):
    """Raise ValueError unless two state dicts have the same names and shapes."""

    def is_same(name):
        return name in wanted and name in found and wanted[name].shape == found[name].shape

    wrong = [name for name in sorted({*wanted, *found}) if not is_same(name)]
    if wrong:
        raise ValueError(f"other names or shapes of weights: {', '.join(wrong[:3])[:200]}")


# -- Checkpoints -----------------------------------------------------------------------------------


def read_checkpoint(path, check=check_facts):
    """Dict of a checkpoint of this program, on the CPU. Nothing in the file is executed.

    The file is opened once: where it is replaced meanwhile, all of the old one is read. Raises
    UserError where it is not there, damaged, foreign or of a newer format, or where `check` of its
    outline raises.
    """
    with open_checkpoint(path, check) as (file, _):
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} does not fit")
        file.seek(0)
        return torch.load(file, "cpu", weights_only=True)


def read_outline(path):
    """As `read_checkpoint`, but its tensors have shapes alone, and take no memory."""
    with open_checkpoint(path, check_facts) as (_, outline):
        return outline


@contextlib.contextmanager
def open_checkpoint(path, check):
    """(file, outline) of a checkpoint, as for `read_checkpoint`; no tensor of it is read yet.

    What is raised inside tells that the file is damaged.
    """
    if not Path(path).is_file():
        raise UserError("{}: no such checkpoint", path)
    try:
        with open(path, "rb") as file:
            size = check_archive(file)
            file.seek(0)
            outline = torch.load(file, "meta", weights_only=True)
            if size > check_tensors(outline) + 1_000_000:
                raise ValueError("it holds more than its tensors")
            check_outline(path, outline, check)
            file.seek(0)
            yield file, outline
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError("{}: no such checkpoint", path) from error
    except Exception as error:  # torch.load raises a dozen types for a damaged or foreign file
        raise UserError(
            "{}: refused: damaged, or not plain data ({})", path, repr(error)[:99]
        ) from error


def check_outline(path, content, check):
    """Raise UserError where a checkpoint is foreign, newer, or does not pass a check."""
    needed = {"format", "model_state_dict", "student_config"}
    is_ours = isinstance(content, dict) and needed <= content.keys()
    if not is_ours or not isinstance(content["format"], int):
        raise UserError("{}: not a checkpoint of this program", path)
    if content["format"] > FORMAT:
        raise UserError(
            "{}: of a newer format ({}); update moirai_distill.py", path, content["format"]
        )
    try:
        check(content)
    except Exception as error:  # of sizes that cannot be true, a network is not even laid out
        reason = " ".join(str(error).split())[:199]
        raise UserError(
            "{}: refused: not a student of this program, or damaged: {}", path, reason
        ) from error


def check_archive(file):
    """Bytes of all parts but the pickle of a file of torch.save.

    Raises ValueError where it is none, or would unpack to more than it is. torch.save packs
    nothing, so the parts together are no larger than the file.
    """
    if file.read(4) != b"PK\3\4":  # torch would take a file with something before it for another
        raise ValueError("it is no archive of torch.save")
    file.seek(-22, os.SEEK_END)
    end = file.read(22)  # the record that ends an archive without a comment
    if end[:4] != b"PK\5\6" or int.from_bytes(end[10:12], "little") > MOST_TENSORS:
        raise ValueError(f"it is cut off, or has more than {MOST_TENSORS:,} parts")
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("it is packed, which torch.save does not do")
        if sum(part.file_size for part in parts) > os.fstat(file.fileno()).st_size:
            raise ValueError("it would unpack to more than it is")
        pickles = [part for part in parts if part.filename.endswith("data.pkl")]
        if len(pickles) != 1 or len(parts) > len(set(archive.namelist())):
            raise ValueError("it is no archive of torch.save")
        if pickles[0].file_size > MOST_PICKLE:
            raise ValueError(f"its pickle is longer than {MOST_PICKLE:,} bytes")
        check_pickle(archive.read(pickles[0]))
    return sum(part.file_size for part in parts) - pickles[0].file_size


def check_pickle(raw):
    """Raise ValueError where a pickle holds what torch.save of plain values and tensors does not.

    What is left can take no more memory or time than its own length asks for. To hash tuples in
    tuples, of which each stands in the next one twice, would take for ever.
    """
    tuples = set()  # numbers under which the pickle keeps them for further use
    before = ""
    for number, (step, value, _) in enumerate(pickletools.genops(raw)):
        if step.name not in PICKLE_STEPS:
            raise ValueError(f"its pickle has a {step.name}")
        if step.name == "GLOBAL" and value not in PICKLE_NAMES:
            raise ValueError(f"its pickle names {value[:60]}")
        if before.startswith("TUPLE") and step.name.endswith("BINPUT"):
            tuples.add(value)
        if step.name.endswith("BINGET") and value in tuples:
            raise ValueError("its pickle uses a tuple twice")
        if number > 4 * MOST_PARTS:
            raise ValueError(f"it holds more than {MOST_PARTS:,} parts")
        before = step.name


def check_tensors(content):
    """Bytes of the tensors in a checkpoint.

    Raises ValueError where one is larger than the memory that it is a view of, or where all
    together are more than weights, the ones that train, and two moments of these. Lists that hold
    one list again and again are not followed for ever.
    """
    total = tensors_in(content)
    weights = tensors_in(content.get("model_state_dict") if isinstance(content, dict) else None)
    if total > 4 * weights + 1_000_000:
        raise ValueError("it holds more than the weights of a student, four times")
    return total


def tensors_in(content):
    """Bytes that the tensors in a nest hold. Raises ValueError as `check_tensors` does."""
    total = 0
    waiting = [content]
    for _ in range(MOST_PARTS):
        if not waiting:
            return total
        part = waiting.pop()
        if isinstance(part, dict):
            waiting.extend(part.values())
        elif isinstance(part, list | tuple):
            waiting.extend(part)
        elif isinstance(part, torch.Tensor):
            held = part.untyped_storage().nbytes()
            total += held
            if part.numel() * part.element_size() > held:
                raise ValueError("a tensor is larger than what it holds")
    raise ValueError(f"it holds more than {MOST_PARTS:,} parts")


def best_in(folder):
    """Path of the best checkpoint in a run's folder, or None.

    It is the one that last.pt names, else the only one.
    """
    last = Path(folder, "last.pt")
    found = sorted(Path(folder).glob("best_model_epoch_*.pt"))
    if last.is_file():
        named = Path(folder, read_outline(last).get("loop", {}).get("best_file", ""))
        if named in found:
            return named
    return found[0] if len(found) == 1 else None


def read_student(source, revision=None, check=check_facts):
    """(content, path of a `.pt` or None) of the checkpoint that a user calls `source`.

    A `.pt`, a run's folder (its best), an exported folder or a hub id. Of the last two, the weights
    are not read yet. Raises UserError or ValueError; `check` is as for `read_checkpoint`.
    """
    path = user_path(source)
    if path.is_dir():
        path = best_in(path) or path
        if path.suffix == ".pt" and not path.is_file():  # a run that lives has a newer best
            path = best_in(path.parent) or path
    if is_onnx(path):
        raise UserError(
            "{}: an ONNX file, which evaluate alone takes; name the run or its .pt", source
        )
    if path.is_file() or path.suffix == ".pt":
        return read_checkpoint(path, check), path

    return content_of_config(read_json(model_file(source, revision, "config.json"))), None


def content_of_config(config):
    """What an exported student says, as a checkpoint does: its sizes, and "info" beside them.

    Raises ValueError where it is of a wrong type or out of its range.
    """
    if not isinstance(config, dict):
        raise ValueError("its facts are no names and values")
    content = config.pop("info", None) or {}
    if not isinstance(content, dict):
        raise ValueError("its info is no names and values")
    content["student_config"] = config
    check_facts(content)
    return content


def shareable(content):
    """The facts of a checkpoint that go wherever its student goes, as plain JSON values.

    No path of the machine that trained it is among them: of a local teacher the name stays.
    """
    kept = (
        "epoch",
        "validation_metrics",
        "freqs",
        "counts",
        "versions",
        "data",
        "evaluation",
        "quantiles",
    )
    facts = {name: content[name] for name in kept if name in content}

    run = {}
    for name, value in content.get("run_config", {}).items():
        if not name.endswith(("_dir", "_cache")):
            run[name] = value
    made_with = content.get("teacher") or {}
    if is_local_teacher(run.get("teacher_model", ""), made_with):
        run["teacher_model"] = last_part(run.get("teacher_model", ""))
    facts["parent"] = content.get("parent")
    if facts["parent"]:
        run["init_from"] = facts["parent"]["name"]  # which is no path
    facts["run_config"] = run

    facts["teacher"] = None
    if made_with:
        teacher = dict(made_with)
        path = teacher.get("teacher", "")
        if is_local_teacher(path, made_with):
            teacher["teacher"] = last_part(path)
            if "licence" in teacher:
                teacher["licence"] = teacher["licence"].replace(path, teacher["teacher"])
        facts["teacher"] = teacher
    return json.loads(json_text(facts))


def is_local_teacher(name, made_with):
    """Whether a teacher's name is that of a folder, which may look like a hub id.

    `made_with` is the manifest of its labels: those of a teacher from the hub know its commit.
    """
    if not is_hub_id(name):
        return True
    if made_with and name == made_with.get("teacher"):
        return made_with.get("commit") is None and made_with.get("revision") is None
    return Path(name).is_dir()


def is_hub_id(name):
    """Whether a name has the form OWNER/MODEL."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def last_part(path):
    """Name of the folder or file that a path of any system ends with."""
    return PureWindowsPath(path).name


# -- ONNX files ------------------------------------------------------------------------------------


def is_onnx(path):
    """Whether a file is one of ONNX, by its name."""
    return Path(path).name.lower().endswith(".onnx")


def read_onnx(path):
    """(bytes, onnx.ModelProto) of an ONNX file, of which nothing is run.

    Raises ValueError where it is none of a student: see `check_onnx`.
    """
    import onnx  # not at the top: few users have such a file

    if not Path(path).is_file():  # a pipe would be waited for
        raise ValueError("is no regular file")
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > MOST_ONNX:
            raise ValueError(f"is longer than {MOST_ONNX:,} bytes")
        content = file.read(MOST_ONNX)
    model = onnx.ModelProto.FromString(content)
    check_onnx(model)
    return content, model


def check_onnx(model):
    """Raise ValueError where an ONNX model has what that of a student has not.

    So it names no other file, has no parts that repeat or call others, and no tensor that is larger
    than what it holds.
    """
    graph = model.graph
    if model.functions or model.training_info or graph.sparse_initializer:
        raise ValueError("it holds more than a graph")
    if len(graph.node) + len(graph.initializer) > MOST_TENSORS:
        raise ValueError(f"it has more than {MOST_TENSORS:,} parts")
    tensors = [*graph.initializer]
    for node in graph.node:
        if node.domain or node.op_type not in ONNX_OPERATIONS:
            raise ValueError(f"it has the operation {node.domain[:60]} {node.op_type[:60]}")
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs or attribute.HasField("sparse_tensor"):
                raise ValueError(f"its operation {node.op_type} holds other ones")
            tensors += attribute.tensors
            if attribute.HasField("t"):
                tensors.append(attribute.t)
    for tensor in tensors:
        if tensor.external_data or tensor.data_location:
            raise ValueError("it names another file")
        if min(tensor.dims, default=0) < 0 or math.prod(tensor.dims) > tensor.ByteSize():
            raise ValueError("a tensor is larger than what it holds")


def onnx_shapes(content, count):
    """name -> shape of all that an ONNX model computes of `count` contexts.

    Raises ValueError where that cannot be told before it runs.
    """
    import onnx

    model = onnx.ModelProto.FromString(content)
    del model.graph.value_info[:]  # what it says itself is not asked
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    (context,) = model.graph.input
    context.type.tensor_type.shape.dim[0].dim_value = count
    skip_idle_reshapes(model.graph)
    told = onnx.shape_inference.infer_shapes(
        model, check_type=True, strict_mode=True, data_prop=True
    )
    shapes = {}
    for value in [*told.graph.input, *told.graph.value_info, *told.graph.output]:
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
            shapes[value.name] = tuple(dim.dim_value for dim in kind.shape.dim)
    for node in model.graph.node:
        missing = [name for name in node.output if name and name not in shapes]
        if missing:
            raise ValueError(f"the shape of {missing[0][:60]} cannot be told")
    return shapes


def skip_idle_reshapes(graph):
    """Let what follows a Reshape of a tensor's shape to one dimension take the shape itself.

    It has one. PyTorch puts such ones in, and onnx does not follow the numbers through them.
    """
    from onnx import numpy_helper

    is_one_dimension = set()
    for tensor in graph.initializer:
        if tensor.dims == [1] and numpy_helper.to_array(tensor).tolist() == [-1]:
            is_one_dimension.add(tensor.name)
    is_shape = set()
    same_as = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = same_as.get(name, name)
        if node.op_type == "Shape":
            is_shape.update(node.output)
        elif node.op_type == "Reshape" and node.input[0] in is_shape:
            if node.input[1] not in is_one_dimension:
                continue
            same_as[node.output[0]] = node.input[0]


def windows_at_once(content):
    """How many windows an ONNX model may be given in one call.

    Raises ValueError where one takes more memory or time than the size of the file explains.
    """
    one, two = onnx_shapes(content, 1), onnx_shapes(content, 2)
    sizes = {name: math.prod(shape) for name, shape in one.items()}
    growth = {name: math.prod(two[name]) - sizes[name] for name in one}  # with each window
    if any(growth[name] > sizes[name] for name in one):
        raise ValueError("two windows take more than twice what one takes")
    if sum(sizes.values()) > MOST_OF_WINDOW + 8 * len(content):
        raise ValueError("one window takes more than its size explains")
    return max(1, MOST_VALUES // max(growth.values(), default=1))


# -- The hub ---------------------------------------------------------------------------------------


def hub_remedy(error):
    """Message: what to do about an error while a file was fetched."""
    from huggingface_hub import errors

    for kind, remedy in HUB_REMEDIES:
        if isinstance(error, getattr(errors, kind)):
            return remedy
    return Message("the download failed")


def model_file(name, revision, filename):
    """Local path of one file of a model; `name` is a folder or a hub id.

    Raises UserError with the remedy where the file cannot be had, or is not what the hub has.
    """
    folder = user_path(name)
    if folder.is_file():
        raise UserError("{}: is a file; a folder or a hub id is expected", name)
    if folder.is_dir() and not (folder / filename).is_file():
        raise UserError(
            "{}: no {} in this folder: neither a model's nor a run's with a best epoch",
            *(name, filename),
        )
    try:
        if folder.is_dir():
            path = folder / filename
        else:
            from huggingface_hub import hf_hub_download  # not at the top: a third of a second

            path = Path(hf_hub_download(name, filename, revision=revision))
        # Where the hub knows the sha256 of a file, its copy here has that name.
        blob = path.resolve().name
        if re.fullmatch("[0-9a-f]{64}", blob) and file_sha256(path) != blob:
            raise ValueError(f"the file does not fit its checksum: delete {path}")
        return path
    except Exception as error:
        # Of the hub, of HTTP, of the disk: all of them end here, with the remedy that fits.
        remedy = hub_remedy(error)
        reason = " ".join(str(error).split())[:250]
        raise UserError(
            "{} ({}): {}; or check the network and HF_HUB_OFFLINE, set HF_ENDPOINT to a mirror,"
            " or give a local folder [{}]",
            *(name, filename, remedy, reason),
        ) from error


# -- Signals and processes -------------------------------------------------------------------------


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived; its number is the argument."""


class Stop:
    """Handler that turns a signal into Interrupted.

    While it is held, a signal is only kept in `signum`: the work in hand goes on, and looks at it
    (for all processes, by `Job.signal`) where it can be stopped. A second signal is not held.
    """

    def __init__(self, language="en"):
        self.language = language  # in which it answers a signal that is held
        self.signum = 0  # of the signal that came
        self.is_held = False

    def __call__(self, signum, _frame):
        came_again = self.signum != 0
        self.signum = signum
        if came_again or not self.is_held:
            raise Interrupted(signum)
        message = Message(
            "\nstopping as soon as the work in hand is saved; once more stops at once"
        )
        print(in_language(message, self.language), file=sys.stderr)

    @contextlib.contextmanager
    def hold(self):
        """Signals that come inside are raised at the end, at the latest."""
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False
        if self.signum:  # it came after the last look
            raise Interrupted(self.signum)


@dataclasses.dataclass
class Launcher:
    """What started this process as one of several."""

    name: str
    world_size: int  # processes that it started
    rank: int  # this one's number


def launcher():
    """Launcher of this process, or None where a user started it.

    LOCAL_RANK alone tells nothing, nor does an allocation of SLURM in which srun was not used: its
    batch script has the number 0, too.
    """
    found = os.environ
    is_step = "SLURM_STEP_ID" in found or found.get("SLURM_PROCID", "0") != "0"
    if {"RANK", "WORLD_SIZE"} <= found.keys():
        names = ("torchrun", "WORLD_SIZE", "RANK")
    elif is_step and found.get("SLURM_NTASKS", "1") != "1":
        names = ("srun", "SLURM_NTASKS", "SLURM_PROCID")
    elif {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "WORLD_SIZE", "LOCAL_RANK"} <= found.keys():
        if found["LOCAL_RANK"] == "0":  # this process started the others, not long ago
            return None
        names = ("Fabric", "WORLD_SIZE", "LOCAL_RANK")
    else:
        return None
    name, world_size, rank = names
    numbers_given = found.get(world_size, ""), found.get(rank, "")
    if not all(number.isdecimal() for number in numbers_given):
        return None
    return Launcher(name, *map(int, numbers_given))


def speaks_for_all():
    """Whether this process is alone, or the first of several."""
    started_by = launcher()
    return started_by is None or started_by.rank == 0


def is_started_by_fabric():
    """Whether this is one of the further processes that `Fabric.launch` starts."""
    started_by = launcher()
    return started_by is not None and started_by.name == "Fabric"


def end_with_parent():
    """End this process, one of those that Fabric starts, when the one that started it is gone."""
    parent = os.getppid()
    words = b"\0".join(map(os.fsencode, sys.argv[1:]))
    with contextlib.suppress(OSError):  # only Linux tells
        if not Path(f"/proc/{parent}/cmdline").read_bytes().endswith(words + b"\0"):
            os._exit(1)  # it was gone before this one could look, and another one took its place
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


# -- Whose folder it is ----------------------------------------------------------------------------


OWNER = {"process": is_count, "started": is_text, "machine": is_text, "host": is_text}


@contextlib.contextmanager
def owned(folder):
    """Keep a run's folder for this process until the end of the block.

    A file in it tells who writes there; it is touched all the time. Raises UserError where another
    run that lives has it, and at the end where the folder was removed or taken meanwhile.
    """
    path = folder / OWNER_FILE
    own = {
        "process": os.getpid(),
        "started": process_start(os.getpid()),
        "machine": machine_id(),
        "host": socket.gethostname(),
        "run": uuid.uuid4().hex,
    }
    with new_folders(folder):
        claim(path, own)
        remove_leftovers(folder)
        ended = threading.Event()
        beat = threading.Thread(target=keep_fresh, args=(path, ended), daemon=True)
        beat.start()
        try:
            yield
            if read_owner(path) != own:
                raise removed(folder)
        finally:
            ended.set()
            beat.join()
            if read_owner(path) == own:
                path.unlink(missing_ok=True)


def removed(folder):
    """UserError of a folder that went away while this program wrote to it."""
    return UserError(
        "{}: was removed or replaced while this program wrote there; start again", folder
    )


def keep_fresh(path, ended):
    """Touch a file every HEARTBEAT seconds, until an event."""
    while not ended.wait(HEARTBEAT):
        with contextlib.suppress(OSError):  # the folder was removed, or its disk is away
            os.utime(path)


def claim(path, own):
    """Make an owner file say `own`, unless a run that lives has it. Raises UserError."""
    for _ in range(10):
        with atomic(path, replace=False) as file:
            file.write(json.dumps(own).encode())
        found = read_owner(path)
        if found == own:
            return
        if found and is_alive(found, path):
            break
        moved = path.with_name(temporary_name())
        with contextlib.suppress(FileNotFoundError):  # another run is as fast
            os.rename(path, moved)
            if read_owner(moved) == found:
                moved.unlink()
            else:  # another run was faster: give it back
                os.rename(moved, path)
    raise UserError(
        "{}: another run writes here (process {} on {}); take another --save_dir, or wait for its"
        " end; if it is gone, delete {}",
        *(path.parent, found.get("process", "?"), found.get("host", "?"), path),
    )


def read_owner(path):
    """What an owner file says (dict); empty where there is none, or another thing in its place."""
    try:
        owner = read_json(path)
    except (OSError, ValueError):
        return {}
    is_right = not misfit(owner, OWNER) and owner.keys() >= OWNER.keys()
    return owner if is_right else {}


def is_alive(owner, path):
    """Whether the run lives that an owner file is of.

    Of another machine this is seen by when its file was touched last.
    """
    is_here = owner["machine"] == machine_id()
    if is_here and process_start(owner["process"]) != owner["started"]:
        return False
    if is_here and owner["started"]:
        return True
    probe = path.with_name(temporary_name())  # tells the time of the disk, not of this machine
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime < FRESH
    except FileNotFoundError:
        return False
    finally:
        probe.unlink(missing_ok=True)


@dataclasses.dataclass
class OneProcess:
    """What a command that does not train asks of a Fabric, where there is one process.

    Lightning itself takes longer to import than torch and pandas together.
    """

    device: torch.device
    global_rank = 0
    world_size = 1

    def broadcast(self, value):
        return value

    def to_device(self, values):
        return values.to(self.device)


@dataclasses.dataclass
class Job:
    """What a command works with: its processes and device, its voice, and the wish to stop."""

    fabric: object  # a launched lightning.fabric.Fabric, or OneProcess
    voice: Voice
    stop: Stop

    @property
    def rank(self):
        return self.fabric.global_rank

    @property
    def world_size(self):
        return self.fabric.world_size

    @property
    def device(self):
        return self.fabric.device

    def on_rank_zero(self, act):
        """What `act()` gives on the first process (it is pickled), on all of them.

        An error that the user can mend is raised on all of them, too. With any other one the first
        process ends, and its launcher ends the others.
        """
        result = problem = None
        try:
            if self.rank == 0:
                result = act()
        except (UserError, OSError, ModuleNotFoundError) as error:
            problem = error
        result, problem = self.fabric.broadcast((result, problem))
        if problem:
            raise problem
        return result

    def sum(self, values):
        """The sum of a tensor over all processes, on the CPU."""
        return self._reduce(values, "sum")

    def largest(self, value):
        """The largest of a number (or bool) over all processes, as a float."""
        if self.world_size == 1:
            return float(value)
        return float(self._reduce(torch.tensor(float(value)), "max"))

    def signal(self):
        """Number of the signal that came, on whichever process; 0 without one."""
        return int(self.largest(self.stop.signum))

    def _reduce(self, values, operation):
        if self.world_size == 1:
            return values
        return self.fabric.all_reduce(values, reduce_op=operation).cpu()


# == Reading =======================================================================================
#
# Little is guessed, and all that was understood is told: what a file does not decide is refused
# with the name of the flag that decides it.
#
# The way of a file, from `read_files`, which stands last, and `read_series`:
#   read_table     its bytes, its text, how it is written (Layout), its cells as pandas reads them
#   find_roles     which columns are the ids, the stamps (`find_times`) and the values
#   place_all      each series of it on a regular grid (`on_grid`)
#   facts_of ...   what was understood, and what may be wrong
# A function `refuse_...` raises Unusable and returns nothing. In shapes, "rows" are those of the
# table, T the steps of one series. A table's "layout" is how it is written; the "marks" are the
# decimal point or comma, and what stands between thousands; "stamps" are timestamps.

MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")


class Unusable(Told):
    """Why a file or a series is skipped."""


@dataclasses.dataclass
class ReadConfig:
    """The flags that say how a CSV is read, as they were typed; "auto" = as it looks."""

    columns: list  # ["first"], ["all"], or names
    time_column: list  # ["auto"], ["none"], or the names of one or more that make the stamp
    time_format: str
    id_columns: list  # ["auto"], ["none"], or names
    encoding: str
    skip_rows: int | str  # lines above the header
    decimal: str
    thousands: str  # "none" = there is none
    na_values: list  # cells that count as missing, beside pandas' own
    max_file_mb: int  # of an unpacked file; 0 = any size

    @property
    def names_columns(self):
        return self.columns not in (["first"], ["all"])


@dataclasses.dataclass
class RawSeries:
    """One univariate series of a file, on a regular grid."""

    name: str  # file, and id or column where the file holds several
    values: np.ndarray  # (T,) float64 in the file's units, NaN where missing
    freq: str  # pandas frequency of the grid, "" without timestamps
    stamps: pd.DatetimeIndex | None  # the last 12 at most (`months_after` takes the day of the
    # month from them), named as their column; None without timestamps
    column: str  # its heading in a table of all series of the file


# -- Cells and columns -----------------------------------------------------------------------------


def is_number(column):
    """Whether a column (or its dtype) is of numbers for pandas; one of true and false is not."""
    return not holds_texts(column) and not pd.api.types.is_bool_dtype(column)


def holds_texts(column):
    """Whether a column (or its dtype) is of texts for pandas; one of true and false is not."""
    return not pd.api.types.is_numeric_dtype(column)


def cells_of(column, most=100):
    """Some cells of a column that are not missing, drawn from all over it, always the same."""
    known = column.dropna()
    if len(known) <= most:
        return known
    drawn = np.random.default_rng(0).integers(0, len(known), most)
    return known.iloc[np.unique(drawn)]  # every n-th would be one hour of the day


def refuse_absent(frame, names):
    """Raise Unusable where one of the columns that the user named is not there."""
    absent = [name for name in names if name not in frame.columns]
    if absent:
        raise Unusable("no column {}; it has {}", ", ".join(absent), first_names(frame))


def first_names(frame):
    """The names of the first columns, to be shown."""
    return ", ".join(str(name) for name in frame.columns[:20])


def most_common(items):
    """The most common one of some items; of equally common ones the first."""
    return collections.Counter(items).most_common(1)[0][0]


def looks_like_value(cell):
    """Whether a cell is a number or begins with one, as a stamp does; no name of a column does."""
    return re.match(r"\s*[+-]?\d", cell) is not None


# -- A file as a table -----------------------------------------------------------------------------

# How files begin that are no CSVs, and what they are.
PARQUET = (".parquet", ".pq")  # how names of Parquet files end
OTHER_KINDS = (
    (b"PK\x03\x04", Message("a zip archive (or an Excel .xlsx): unpack it, or save it as CSV")),
    (b"\xd0\xcf\x11\xe0", Message("an old Excel file (.xls): save it as CSV")),
    (b"PAR1", Message("a Parquet file: let its name end with .parquet")),
    (b"ARROW1", Message("an Arrow file: save it as CSV")),
    (b"\x89HDF", Message("an HDF5 file: save its table as CSV")),
    (b"\x1f\x8b", Message("packed by gzip: its name must end with .csv.gz")),
    (b"BZh", Message("packed by bzip2: unpack it")),
    (b"\xfd7zXZ", Message("packed by xz: unpack it")),
    (b"\x28\xb5\x2f\xfd", Message("packed by zstd: unpack it")),
    (b"7z\xbc\xaf", Message("a 7z archive: unpack it")),
    (b"%PDF", Message("a PDF")),
    (b"\x89PNG", Message("a picture")),
    (
        b"version https://git-lfs",
        Message("a pointer of Git LFS: `git lfs pull` fetches the file itself"),
    ),
)
# The same of texts, as regular expressions.
OTHER_TEXTS = (
    (rb"\{|\[\s*[\[{]", Message("JSON: save it as CSV (pandas.read_json)")),
    (rb"<!doctype|<html", Message("a web page: was it downloaded from the wrong address?")),
    (rb"<\?xml|<[a-z]+[\s>](?![,;\t]<)", Message("XML: save its table as CSV")),
    (rb"@relation\s|%.*\s@relation\s", Message("an ARFF file: save it as CSV")),
    (
        rb"(-- |/\*)|(create|drop|insert)\s+(table|into|database)\s",
        Message("a dump of an SQL database: export the table as CSV"),
    ),
)


@dataclasses.dataclass
class Layout:
    """How a CSV is written. A forecast of it is written likewise."""

    separator: str
    skip: int  # lines above the header
    names: list  # of the columns, as the header has them
    decimal: str = "."
    thousands: str = ""  # "" = there is none


@dataclasses.dataclass
class Table:
    """A CSV, read: its cells, how it is written, and what is worth telling of it."""

    frame: pd.DataFrame
    layout: Layout
    warnings: list  # of Message


def read_table(path, config):
    """Table of a CSV. Raises Unusable."""
    try:
        encoding, text = read_text(path, config)
        lines = sample_lines(text)
        layout = find_layout(lines, config)
        content = text.encode()
        warnings = warnings_of_text(encoding, text, layout)
        del text  # it may be large, and pandas reads `content`
        frame, layout = read_by_marks(content, lines, layout, config)
    except pd.errors.ParserError as error:
        raise Unusable(
            "unreadable: {}; if the table begins further down, --skip_rows leaves out the lines"
            " above its header",
            " ".join(str(error).split()),
        ) from error
    except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:
        # (pandas' other errors are ValueErrors)
        raise Unusable("unreadable: {}", " ".join(str(error).split())) from error
    frame = without_blank_end(frame)
    if frame.empty:
        raise Unusable("no rows")
    return Table(frame, layout, warnings)


def read_text(path, config):
    """(encoding, text) of a file. Raises Unusable, or what reading and unpacking raise."""
    raw = read_bytes(path, config.max_file_mb)
    refuse_other_kinds(raw)
    return decode(raw, config.encoding)


def warnings_of_text(encoding, text, layout):
    """List of Message: letters that may be wrong, and a header that may be none."""
    warnings = []
    if encoding not in ("utf-8-sig", "utf-16") and not text.isascii():
        example = re.search(r"\w*[^\x00-\x7f]+\w*", text)[0][:40]
        warnings.append(
            Message("it is no UTF-8; read as {}, such as {!r} (--encoding)", (encoding, example))
        )
    if all(looks_like_value(name) for name in layout.names):
        first = layout.separator.join(layout.names)
        warnings.append(
            Message("its first line ({}) is taken for the names of the columns", (first[:60],))
        )
    return warnings


def without_blank_end(frame):
    """A frame without the rows of nothing at its end, with which spreadsheets like to end."""
    if frame.empty or len(frame.columns) == 1:
        return frame
    for tail in (frame.tail(100), frame):  # most often the end tells
        is_filled = tail.notna() & (tail != "")
        filled = np.flatnonzero(is_filled.any(axis=1))
        if len(filled):
            blank = len(tail) - 1 - filled[-1]
            return frame.iloc[: len(frame) - blank]
    return frame[:0]


def read_bytes(path, max_mb):
    """What a file holds, unpacked where its name ends with .gz. Raises Unusable."""
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device never ends
        raise Unusable("is no regular file")
    size = path.stat().st_size
    is_packed = path.name.lower().endswith(".gz")
    if is_packed and not is_gzip(path):
        raise Unusable("unreadable: its name ends with .gz, but it is not packed by gzip")
    limit = max_mb * 10**6 if max_mb else math.inf
    if is_packed and size * MOST_PACKED > limit:  # else it cannot grow beyond it
        size = unpacked_size(path, limit)
    if size > limit:
        raise Unusable(
            "larger than {:,} MB when it is unpacked; --max_file_mb raises the limit", max_mb
        )
    open_file = gzip.open if is_packed else open
    try:
        with open_file(path, "rb") as file:
            raw = file.read()
    except gzip.BadGzipFile as error:
        raise Unusable("unreadable: damaged, or bytes that are no gzip follow its end") from error
    refuse_long_lines(raw)
    return raw


def is_gzip(path):
    """Whether a file begins as one that gzip packed."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def unpacked_size(path, limit):
    """Bytes of a .gz when it is unpacked; counting ends soon after the limit."""
    size = 0
    with gzip.open(path, "rb") as file:
        while size <= limit and (piece := file.read(10**6)):
            size += len(piece)
    return size


def refuse_long_lines(raw):
    """Raise Unusable where a line is too long for a CSV: pandas would take all memory for it."""
    is_utf_16 = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
    if len(raw) <= LONGEST_LINE or is_utf_16:
        return
    line_end = b"\n" if b"\n" in raw[:LONGEST_LINE] else b"\r"
    # Pieces of that length, each half over the one before: none of them is without a line's end.
    for start in range(0, len(raw) - LONGEST_LINE, LONGEST_LINE // 2):
        if raw.find(line_end, start, start + LONGEST_LINE) < 0:
            raise Unusable("no CSV: it has a line of more than {:,} bytes", LONGEST_LINE)


def refuse_other_kinds(raw):
    """Raise Unusable where the first bytes are those of a file of another kind."""
    first_bytes = raw[:1000].lstrip()
    for beginning, kind in OTHER_KINDS:
        if first_bytes.startswith(beginning):
            raise Unusable("no CSV but {}", kind)
    first_text = first_bytes.removeprefix("\ufeff".encode())
    for pattern, kind in OTHER_TEXTS:
        if re.match(pattern, first_text, re.IGNORECASE | re.DOTALL):
            raise Unusable("no CSV but {}", kind)


def decode(raw, encoding):
    """(encoding, text) of the bytes of a text file; "auto" tries the usual ones.

    Raises Unusable where the encoding that is asked for does not fit.
    """
    if encoding != "auto":
        return encoding, decode_as(raw, encoding)
    has_mark = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
    if not has_mark and b"\0" in raw:  # pandas would cut a number there
        raise Unusable(
            "unreadable: it holds NUL bytes: damaged, or UTF-16 without its mark (--encoding)"
        )
    for name in ("utf-16" if has_mark else "utf-8-sig", "gb18030"):
        try:
            return name, raw.decode(name)
        except UnicodeDecodeError:
            pass  # the next one
    return "latin-1", raw.decode("latin-1")  # which knows every byte


def decode_as(raw, encoding):
    """Text of bytes in the encoding that the user named. Raises Unusable where it does not fit."""
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise Unusable("unreadable: not in --encoding {} ({})", encoding, error.reason) from error
    except LookupError as error:
        raise Unusable("unreadable: --encoding {}: no such encoding", encoding) from error


# -- How it is written -----------------------------------------------------------------------------


def sample_lines(text):
    """The first lines of a file, and some from all over it.

    The header and the line below it are among them, however long they are.
    """
    second_line = text.find("\n") + 1
    head = text[: max(SAMPLE_LENGTH, text.find("\n", second_line) + 1)]
    lines = head.splitlines()
    if len(text) > len(head):
        lines = lines[:-1]  # it may be cut
        for start in np.linspace(len(head), len(text), SAMPLE_PIECES, endpoint=False, dtype=int):
            piece = text[start : start + SAMPLE_LENGTH // SAMPLE_PIECES]
            lines += piece.splitlines()[1:-1]
    return lines


def find_layout(lines, config):
    """Layout of a CSV that begins with these lines; its marks are found later. Raises Unusable."""
    is_auto = config.skip_rows == "auto"
    skip = 0 if is_auto else config.skip_rows
    told = re.fullmatch(r'"?sep=(.)"?', lines[0].strip("\ufeff")) if lines else None
    if told and is_auto:  # as Excel writes it
        layout = Layout(told[1], skip=1, names=[])
    else:
        filled = [line for line in lines[skip:] if line.strip()]
        layout = Layout(find_separator(filled), skip, names=[])

    rows = split_lines(lines, layout)
    if not rows:
        raise Unusable("no rows")
    layout.names = [name.strip() for name in rows[0]]
    if len(layout.names) > MOST_COLUMNS:
        raise Unusable(
            "{:,} columns, more than {:,}: it takes a table with a row for each time",
            *(len(layout.names), MOST_COLUMNS),
        )
    if is_auto:
        line_of_row = [number for number, line in enumerate(lines) if line.strip()][layout.skip :]
        refuse_preface(rows, line_of_row)
        refuse_table_above(rows, line_of_row)
    if layout.separator == ",":
        refuse_spare_comma(rows)
    return layout


def refuse_preface(rows, line_of_row):
    """Raise Unusable where the first lines have fewer fields than most: a title, or the like.

    `line_of_row` are the numbers of their lines in the file, from 0 on.
    """
    counts = [len(row) for row in rows]
    usual = most_common(counts)
    has_values_below = len(rows) > 1 and any(looks_like_value(cell) for cell in rows[1])
    is_short_header = counts.index(usual) <= 1 and has_values_below  # `refuse_surplus` judges it
    # A title may have as many fields, if commas stand behind it.
    are_wide = [len(row) == usual and 2 * count_filled(row) >= usual for row in rows]
    above = are_wide.index(True) if any(are_wide) else 0
    if above == 0 or counts[0] > usual or is_short_header:
        return
    raise Unusable(
        "its first lines have fewer fields than the others; if they are no part of the table,"
        " --skip_rows {} leaves them out",
        line_of_row[above],
    )


def count_filled(row):
    """How many fields of a row hold something."""
    return sum(cell.strip() != "" for cell in row)


def refuse_table_above(rows, line_of_row):
    """Raise Unusable where a small table stands above, as wide as the one below it or wider.

    What stands below is the names of another table: words after a blank line or in another
    number, with values both above and below. `line_of_row` is as in `refuse_preface`.
    """
    for number in range(2, min(len(rows) - 1, MOST_PREFACE)):
        row = rows[number]
        is_behind_blank = line_of_row[number] > line_of_row[number - 1] + 1
        is_apart = is_behind_blank or len(row) != len(rows[0])
        has_names = all(cell.strip() and not looks_like_value(cell) for cell in row)
        neighbours = (rows[number - 1], rows[number + 1])
        have_values = all(any(looks_like_value(cell) for cell in other) for other in neighbours)
        if is_apart and has_names and len(row) > 1 and have_values:
            raise Unusable(
                "line {} has names ({}) as its first one does: if the table begins there,"
                " --skip_rows {} leaves out what stands above",
                *(line_of_row[number] + 1, ", ".join(row)[:60], line_of_row[number]),
            )


def refuse_spare_comma(rows):
    """Raise Unusable where two columns, one without a name, may be the halves of one number.

    So a header `time,value,` has as many commas as a row 2024-01-01,50,13 has.
    """
    names = [name.strip() for name in rows[0]]
    for left in range(len(names) - 1):
        if names[0] == "" and left == 0:  # an index
            continue
        if names[left] and names[left + 1]:
            continue
        halves = [row[left : left + 2] for row in rows[1:] if len(row) > left + 1]
        halves = [(whole, decimals) for whole, decimals in halves if decimals.strip()]
        are_whole = all(re.fullmatch(r"[+-]?\d+,\d+", ",".join(pair)) for pair in halves)
        if halves and are_whole:
            raise Unusable(
                "columns {} and {} hold whole numbers, and one has no name: if {},{} is one number"
                " with a decimal comma, write it with a point, or in quotes; else name the column",
                *(left + 1, left + 2, *halves[0]),
            )


def find_separator(lines):
    """Tab, semicolon, comma or bar: the one that cuts most lines into equally many fields.

    A comma where there is one column only. Raises Unusable where the separator is another one.
    """
    shares = {mark: share_cut_alike(lines, mark) for mark in SEPARATORS}
    best = max(SEPARATORS, key=shares.get)
    if shares[best] > 0:
        return best
    refuse_other_separator(lines)
    return ","


def share_cut_alike(lines, mark):
    """Share of the lines that a separator cuts into the most common number of fields, from 2 on."""
    try:
        counts = [len(fields) for fields in csv.reader(lines, delimiter=mark)]
    except csv.Error:  # a field would be longer than 131,072 characters
        return 0
    several = [count for count in counts if count > 1]
    if not several:
        return 0
    return counts.count(most_common(several)) / len(counts)


def refuse_other_separator(lines):
    """Raise Unusable where spaces, or other marks, cut the header and most lines equally."""
    if len(lines) < 2:
        return
    for mark in (" ", "^", "~", ":", "#", "\x01"):
        counts = [len(row) for row in csv.reader(lines, delimiter=mark, skipinitialspace=True)]
        usual = most_common(counts[1:])
        # R writes the names of the rows, too, and none for their column.
        if counts[0] > 1 and usual in (counts[0], counts[0] + 1):
            raise Unusable(
                "no separator found (tab ; , or |): its lines are such as {!r}; if {!r} is it,"
                " write the file with commas",
                *(lines[1][:60], mark),
            )


def split_lines(lines, layout):
    """The fields of the lines from the header on, without blank lines."""
    filled = [line for line in lines[layout.skip :] if line.strip()]
    return [row for row in csv.reader(filled, delimiter=layout.separator) if row]


# -- Decimal and thousands marks -------------------------------------------------------------------


NUMBER = r"[+-]?[\d.,]*\d[\d.,]*(?:[eE][+-]?\d+)?"  # with whatever marks


def read_by_marks(content, lines, layout, config):
    """(DataFrame, Layout with its marks) of a CSV (bytes of UTF-8). Raises Unusable."""
    rows = split_lines(lines, layout)
    cells = marked_cells(cell for row in rows for cell in row)
    layout = find_marks(cells, layout, config)
    if config.thousands == config.decimal == "auto":
        refuse_groups(rows)
    frame = read_frame(content, layout, config)
    # What the sample of the lines did not show, a column that is no number for pandas may.
    odd_cells = marked_cells(unread_numbers(frame, config.thousands))
    if odd_cells:
        decimal = layout.decimal
        layout = find_marks(cells + odd_cells, layout, config)
        if layout.decimal != decimal:  # `floats_of_texts` takes the thousands out, not pandas
            frame = read_frame(content, layout, config)
    return frame, layout


def refuse_groups(rows):
    """Raise Unusable where a column holds points before three digits, and else whole numbers.

    So 1.012 beside 905 does, which is 1012. With decimals some would be 1.01, or 905.000.
    """
    for column in itertools.zip_longest(*rows[1:], fillvalue=""):
        cells = {cell.strip() for cell in column} - {""}
        grouped = sorted(cell for cell in cells if re.fullmatch(r"-?[1-9]\d{0,2}\.\d{3}", cell))
        whole = sorted(cell for cell in cells if re.fullmatch(r"-?\d{1,3}", cell))
        are_all = len(grouped) + len(whole) == len(cells)
        if are_all and len(grouped) >= FEWEST_GROUPED and len(whole) >= FEWEST_WHOLE:
            raise Unusable(
                "numbers such as {} beside {}: is the mark of decimals (--decimal .) or of"
                " thousands (--thousands .)?",
                *(grouped[0], whole[-1]),
            )


def marked_cells(cells):
    """Those of some cells that may be numbers with points or commas, without repetition."""
    stripped = {cell.strip() for cell in cells}
    return sorted(cell for cell in stripped if not cell.isdigit() and re.fullmatch(NUMBER, cell))


def unread_numbers(frame, thousands):
    """Some cells of each column that is no number for pandas but seems to hold numbers.

    They are without a unit, and without the mark of `thousands` that the user may state.
    """
    cells = []
    for name, kind in frame.dtypes.items():  # quick where there are thousands of columns
        if not holds_texts(kind):
            continue
        sample = cells_of(frame[name]).astype("string").str.strip()
        if sample.empty:
            continue
        unit = unit_of(sample)
        if bare_numbers(sample, unit, thousands).str.fullmatch(NUMBER).mean() > 0.5:
            known = frame[name].dropna().astype("string").str.strip()
            numbers = bare_numbers(known, unit, thousands).dropna()
            is_odd = pd.to_numeric(numbers, errors="coerce").isna()
            cells += numbers[is_odd].drop_duplicates().iloc[:SAMPLE_CELLS].tolist()
    return cells


def bare_numbers(text, unit, thousands):
    """Texts (rows,) of numbers without a unit ("" = none) and a mark of thousands, if it is known.

    Of point and comma `find_marks` judges.
    """
    if unit:
        text = without_unit(text, unit)
    if thousands not in ("auto", "none", ".", ","):
        text = text.str.replace(rf"(?<=\d){mark_form(thousands)}(?=\d{{3}})", "", regex=True)
    return text


BLANKS = " \u00a0\u2009\u202f"  # all of them look alike


def mark_form(thousands):
    """Regular expression of a mark of thousands; a blank is one of whatever kind."""
    return f"[{BLANKS}]" if thousands in BLANKS else re.escape(thousands)


# A unit: a sign of money in front, such as R$; such a sign or % behind, or a word behind a blank.
MONEY = r"[A-Z]{0,3}[$€£¥₹₩₽₺₫元円원]"
UNIT_AND_NUMBER = re.compile(
    rf"^[+-]?(?P<front>{MONEY}|[A-Z]{{3}}(?=\s))?\s?[+-]?\d[\d.,'’{BLANKS}]*"
    rf"(?P<behind>\s?(?:{MONEY}|[%‰°℃℉]\S{{0,3}})|\s[^\W\d_]\S{{0,5}})?$"
)


def unit_of(sample):
    """The unit that most of some texts have beside their numbers, such as € or kWh; "" = none."""
    found = sample.str.extract(UNIT_AND_NUMBER).fillna("")
    units = (found["front"] + found["behind"]).str.strip()
    if units.empty:
        return ""
    usual = most_common(units)
    return usual if (units == usual).mean() >= MOST_NUMBERS else ""


def without_unit(text, unit):
    """Texts (rows,) of numbers without their unit; missing where they have another one, or none."""
    sign = re.escape(unit)
    form = rf"^([+-]?)(?:{sign}\s?([+-]?\d.*)|(\d.*?)\s?{sign})$"
    return text.str.replace(form, r"\1\2\3", regex=True).where(text.str.match(form))


@dataclasses.dataclass
class Marks:
    """The marks in one number; "" = it has none, or does not tell."""

    decimal: str = ""
    thousands: str = ""
    either: str = ""  # it may be of decimals or of thousands


def marks_of(cell):
    """Marks of a number as it is written."""
    marks = re.findall("[.,]", cell)
    groups = re.split("[.,]", cell.lstrip("+-"))
    begins_well = 1 <= len(groups[0]) <= 3 and groups[0] != "0"
    is_last_of_three = begins_well and len(groups[-1]) == 3
    others_are_of_three = begins_well and all(len(group) == 3 for group in groups[1:-1])
    if not marks:
        return Marks()
    *before, last = marks
    if not before:  # 1.012 may be either, 1.01 and 0.123 have decimals
        return Marks(either=last) if is_last_of_three else Marks(decimal=last)
    if len(set(marks)) == 1:  # 1.234.567; else a date, or the like
        is_grouped = others_are_of_three and is_last_of_three
        return Marks(thousands=last) if is_grouped else Marks()
    # 1,234,567.8
    is_number = last not in before and others_are_of_three and groups[-1] != ""
    return Marks(decimal=last, thousands=before[0]) if is_number else Marks()


@dataclasses.dataclass
class Votes:
    """What the numbers in a file say of its marks."""

    decimals: dict  # decimal mark -> a number that has it for certain
    unsure: dict  # mark -> a number in which it may be of decimals or of thousands
    grouping: set  # marks that are of thousands for certain
    padded: str = ""  # such as +0501,1: a number with decimals does not begin with 0


def votes_of(cells, stated):
    """Votes of numbers that are texts; `stated` is --thousands: no other mark is of thousands."""
    votes = Votes({}, {}, grouping={stated} & {".", ","})
    for cell in cells:
        marks = marks_of(cell)
        if marks.decimal and marks.decimal != stated:
            votes.decimals.setdefault(marks.decimal, cell)
        if marks.decimal == "," and re.match(r"[+-]?0\d", cell):
            votes.padded = cell
        if marks.thousands:
            votes.grouping.add(marks.thousands)
        if marks.either and marks.either != stated:
            told_by = votes.unsure if stated == "auto" else votes.decimals
            told_by.setdefault(marks.either, cell)
    return votes


def find_marks(cells, layout, config):
    """The Layout of a file with its marks, by the numbers in it. Raises Unusable."""
    votes = votes_of(cells, config.thousands)
    decimal = config.decimal
    if decimal == "auto":
        decimal = find_decimal(votes, layout.separator)
    thousands = config.thousands
    if thousands == "auto":
        thousands = find_thousands(votes, decimal, layout.separator, config)
    elif thousands == "none":
        thousands = ""
    return dataclasses.replace(layout, decimal=decimal, thousands=thousands)


def find_thousands(votes, decimal, separator, config):
    """The mark of thousands of a file by the Votes of its cells; "" = none. Raises Unusable."""
    other = "," if decimal == "." else "."  # the only one that may be of thousands
    if other not in votes.grouping and other not in votes.unsure:
        return ""
    # 1.012 beside 50,13 in another column may be a thousand, or written with another mark. Between
    # commas a number such as "1,012" has quotes, which a thousand needs there.
    is_sure = other in votes.grouping or config.decimal != "auto" or separator == ","
    if not is_sure:
        raise Unusable(
            "numbers such as {} and {}: if the mark of the first is of thousands, --thousands {};"
            " else write all columns with one mark of decimals",
            *(votes.unsure[other], votes.decimals[decimal], other),
        )
    return other


def find_decimal(votes, separator):
    """The decimal mark of a file by the Votes of its cells. Raises Unusable."""
    if len(votes.decimals) == 2:
        raise Unusable(
            "numbers such as {} and {}: which mark is the decimal one? --decimal . or --decimal ,",
            *(votes.decimals["."], votes.decimals[","]),
        )
    if votes.padded and separator == ",":
        raise Unusable(
            "cells such as {!r} between commas: a number with a decimal comma (--decimal ,),"
            " or two values, which columns of their own should hold?",
            votes.padded,
        )
    if votes.decimals:
        return next(iter(votes.decimals))
    if len(votes.grouping) == 1:
        return "." if votes.grouping == {","} else ","
    for mark, cell in votes.unsure.items():
        if mark == "," or separator != ",":  # between commas a point is the decimal mark
            raise Unusable(
                "numbers such as {}: is the mark of decimals (--decimal {}) or of thousands"
                " (--thousands {})?",
                *(cell, mark, mark),
            )
    return "."


TEXT_MARK = "\x1f"  # stands in no CSV


def as_marked_text(cell):
    """A cell that stays as it is written: pandas 3 takes NA, null and blanks for missing cells,
    even of a column with a converter."""
    return TEXT_MARK + cell.strip()


def without_mark(cell):
    """A cell that `as_marked_text` made, as it is written."""
    return cell.removeprefix(TEXT_MARK) if isinstance(cell, str) else cell


def text_positions(layout, config):
    """Positions of the columns that stay as they are written: ids, and parts of a stamp.

    So does a stamp with marks, as 2024.10 is no 2024.1.
    """
    ids = [name for name in layout.names if name.lower() in ID_NAMES]
    if config.id_columns != ["auto"]:
        ids = config.id_columns
    has_marks = re.search(r"[^%A-Za-z]", config.time_format) is not None
    parts = config.time_column if len(config.time_column) > 1 or has_marks else []
    return [place for place, name in enumerate(layout.names) if name in ids or name in parts]


def read_frame(content, layout, config):
    """DataFrame of a CSV (bytes of UTF-8) by pandas. Raises Unusable, or pandas' ValueErrors."""
    positions = text_positions(layout, config)
    frame = pd.read_csv(
        io.BytesIO(content),
        sep=layout.separator,
        decimal=layout.decimal,
        skiprows=layout.skip,
        na_values=config.na_values or None,
        converters=dict.fromkeys(positions, as_marked_text),
        low_memory=False,  # else a column may be of numbers in one part and of texts in another
    )
    refuse_surplus(frame)
    for place in positions:
        cells = frame.iloc[:, place].astype(object)
        as_written = {cell: without_mark(cell) for cell in cells.unique()}  # ids repeat
        frame.isetitem(place, cells.map(as_written))
    names = [str(name).strip() for name in frame.columns]
    if len(set(names)) == len(names):
        frame.columns = names
    return frame


def refuse_surplus(frame):
    """Raise Unusable where pandas took the first fields for names of the rows."""
    if isinstance(frame.index, pd.RangeIndex) and frame.index.start == 0:
        return  # or names 0, 1, 2, ... for pandas 3, and then nothing is lost
    surplus = Message("the last such as {!r}", (str(frame.iloc[0, -1]),))
    if frame.iloc[:, -1].isna().all():
        surplus = Message("each row ends with a separator too many; write one behind the header")
    elif is_number(frame.index) and (np.diff(frame.index[:100]) == 1).all():
        surplus = Message("each row begins with its number; write a name for it into the header")
    raise Unusable("its rows hold more fields than its header: {}", surplus)


# -- Timestamps ------------------------------------------------------------------------------------


@dataclasses.dataclass
class StampForm:
    """How stamps are written, so that others can be written likewise."""

    pattern: str  # of strftime, with %q for a quarter; or "ISO8601", "epoch s", "epoch ms", ...
    example: str = ""  # one of the file's stamps
    suffix: str = ""  # " UTC" or " Uhr", where all stamps end with it
    has_dots: bool = False  # a.m. for AM
    notes: list = dataclasses.field(default_factory=list)  # of Message: what to tell of them


@dataclasses.dataclass
class Times:
    """The timestamps of a table."""

    stamps: pd.DatetimeIndex  # (rows,), NaT where unread, named as the first column
    names: list  # of the columns that they are read from
    form: StampForm
    text: pd.Series  # (rows,) as they are written

    @functools.cached_property
    def parts(self):
        """Year, month, ..., week, (rows,) float64 each, of those that vary."""
        names = ("year", "quarter", "month", "day", "hour", "minute", "day_of_week", "day_of_year")
        parts = [getattr(self.stamps, name).to_numpy(dtype=np.float64) for name in names]
        parts.append(self.stamps.isocalendar().week.to_numpy(dtype=np.float64, na_value=np.nan))
        return [part for part in parts if np.nanmax(part) > np.nanmin(part)]


def find_times(frame, ids, config):
    """Times of a table, or None where its rows are taken as they stand. Raises Unusable.

    Columns that are named in TIME_NAMES come first, then texts, then numbers. Last come texts that
    are the same in all rows, as the time of an export is.
    """
    if config.time_column == ["none"]:
        return None
    if config.time_column != ["auto"]:
        return times_by_name(frame, config.time_column, config.time_format)

    kinds = dict(frame.dtypes)

    def sort_key(name):
        has_texts = holds_texts(kinds[name])
        is_constant = has_texts and frame[name].nunique() == 1
        return is_constant, name.lower() not in TIME_NAMES, not has_texts

    refuse_clock_apart(frame)
    names = sorted((name for name in frame.columns if name not in ids), key=sort_key)
    for name in names:
        parsed = parse_column(frame, name, ids, config.time_format)
        if parsed:
            stamps, form = parsed
            return Times(stamps.rename(name), [name], form, frame[name])

    parts = date_in_parts(frame)
    if parts:
        return times_by_name(frame, parts, config.time_format)
    for name in names:
        is_first = name == frame.columns[0]
        is_likely = is_called_time(name) or (is_first and labels_rows(frame[name]))
        refuse_unread_column(frame[name], is_likely)
    return None


def is_called_time(name):
    """Whether a column is one of stamps by its name."""
    return name.lower() in (*TIME_NAMES, *PARTS_OF_DATE["year"])


def labels_rows(column):
    """Whether each cell is a text of its own with a digit, and no number: `Q1 FY21`, `week 3`."""
    if not holds_texts(column) or column.isna().any() or not column.is_unique:
        return False
    sample = cells_of(column).astype(str)
    has_digit = sample.str.contains(r"\d").mean() > MOST_STAMPS
    has_numbers = pd.to_numeric(sample, errors="coerce").notna().mean() > 0.1
    return bool(has_digit and not has_numbers and not number_with_signs(column))


def parse_column(frame, name, ids, time_format):
    """(timestamps (rows,), StampForm) of a column that the user did not name; None if it has none.

    Raises Unusable where two patterns fit equally well.
    """
    column = frame[name]
    if holds_texts(column):
        return parse_text(column, time_format)
    parsed = parse_numbers(column, time_format)
    if parsed and are_surely_stamps(frame, name, ids, *parsed):
        return parsed
    return None


def are_surely_stamps(frame, name, ids, stamps, form):
    """Whether numbers that can be read as stamps are some: by their name, or as they run evenly."""
    is_even = runs_evenly(frame[name], frame, ids)
    if form.pattern == "%Y":  # beside a month, years repeat
        return is_called_time(name) and is_even
    ticks = pd.Series(stamps.asi8, frame.index).where(stamps.notna())
    return is_called_time(name) or is_even or runs_evenly(ticks, frame, ids)


def runs_evenly(column, frame, ids):
    """Whether numbers go one way, and mostly by the same step, in each series of a table.

    2 % of the steps may be none (a row that is there twice) or go the other way.
    """
    groups = column.groupby([frame[name] for name in ids]) if ids else column
    steps = groups.diff().dropna()
    if steps.empty or (steps == 0).mean() > 0.02:
        return False
    steps = steps[steps != 0]
    goes_up = (steps > 0).mean()
    return max(goes_up, 1 - goes_up) >= 0.98 and (steps == steps.median()).mean() > 0.5


def times_by_name(frame, names, time_format):
    """Times of the columns with these names, joined by a space. Raises Unusable."""
    refuse_absent(frame, names)
    column = frame[names[0]] if len(names) == 1 else join_columns(frame, names)
    if not holds_texts(column):
        parsed = parse_numbers(column, time_format)
    else:
        parsed = parse_text(column, time_format)
    if not parsed:
        known = column.dropna()
        raise Unusable(
            "the stamps of {} cannot be read, such as {!r}: --time_format says how they are"
            " written",
            *(" ".join(names), str(known.iloc[0]) if len(known) else ""),
        )
    stamps, form = parsed
    if len(names) > 1 and form.pattern == "ISO8601":
        form.pattern = common_pattern(column.dropna().iloc[-100:], len(names))
    return Times(stamps.rename(names[0]), names, form, column)


def date_in_parts(frame):
    """Names of the columns that make a date together, as year and month do; [] without them."""
    found = {}
    for name in frame.columns:
        for part, names in PARTS_OF_DATE.items():
            if name.lower() in names:
                found.setdefault(part, name)
    if "year" not in found or len(found) == 1:
        return []
    order = [part for part in PARTS_OF_DATE if part in found]
    if order[1] == "quarter":
        order = order[:2]
    return [found[part] for part in order]


def join_columns(frame, names):
    """Texts (rows,) of several columns, with a space between; whole numbers without a point.

    Behind a date, 905 is 09:05.
    """
    texts = []
    for name in names:
        column = frame[name]
        if pd.api.types.is_float_dtype(column) and (column.dropna() % 1 == 0).all():
            column = column.astype("Int64")
        text = column.astype("string").str.strip()
        if name.lower() in PARTS_OF_DATE["quarter"]:  # else 1 to 4 would be months
            text = "Q" + text.str.lstrip("Qq")
        if name.lower() in PARTS_OF_DATE["minute"]:
            text = text.str.zfill(2)
        texts.append(text)
    is_date = texts[0].str.len().max() > len("2024")
    if is_date and are_clock_numbers(texts[-1]):
        texts[-1] = texts[-1].str.zfill(4)
    return texts[0].str.cat(texts[1:], sep=" ")


def are_clock_numbers(text):
    """Whether texts are hours and minutes without a mark between, such as 905 and 1330."""
    digits = cells_of(text).str.removesuffix(".0")
    if digits.empty:
        return False
    is_fitting = digits.str.fullmatch(r"\d{1,2}|(?:[01]?\d|2[0-4])[0-5]\d")
    return bool(is_fitting.all() and digits.str.len().max() > 2)


def common_pattern(texts, count):
    """The pattern of joined stamps that has `count` parts; "ISO8601" where none is known."""
    common = set.intersection(*(set(known_patterns(text)) for text in texts))
    for date, clock in known_patterns(texts.iloc[0]):
        if (date, clock) in common and (date + clock).count(" ") == count - 1:
            return date + clock
    return "ISO8601"


# -- Columns of stamps that are not read -----------------------------------------------------------

NAME_OF_MONTH = rf"(?i:\b(?:{'|'.join(MONTHS)}))"
CLOCK_ALONE = (  # a time of the day alone
    r"([01]?\d|2[0-4])[:.][0-5]\d([:.][0-5]\d([.,]\d+)?)?(\s?[AaPp][Mm])?"
)
LIKE_A_STAMP = (
    r"\d{1,4}[-/.年 ]\d{1,2}[-/.月 ]"
    r"|\d:\d\d"
    rf"|{NAME_OF_MONTH}"
    r"|\b(?:1[6-9]|20)\d\d(?:\b|[A-Za-z]{1,2}\d)"  # a year, as in 3 août 2024 or 2024M01
    r"|^[^\W\d]{3,9}\.?[-/ ]\d\d$"  # Okt-24
    r"|\b(?:1[6-9]|20)\d\d[年년]"  # 2024年第1季度
    r"|^[A-Za-z]{1,2}\d?[ '-]?(?:1[6-9]|20)\d\d(?!\d)"  # FY2020, T12020
    r"|^(?:FY|[HQST][1-4])[ '-]?\d\d(?!\d)"  # FY20, H2'20
    r"|^[1-4][HQST][ '-]?\d\d(?:\d\d)?$"  # 2H20
)


def refuse_clock_apart(frame):
    """Raise Unusable where a column holds the dates of the rows, and another one their clocks."""
    texts = [name for name, kind in frame.dtypes.items() if not is_number(kind)]
    clocks = [name for name in texts if is_clock(frame[name])]
    if not clocks:
        return
    dates = [name for name in texts if looks_like_stamps(frame[name])]
    for name in dates:
        if cells_of(frame[name]).astype(str).str.contains(":").any():
            return  # it has its clock in it
    if dates and frame[dates[0]].duplicated().any():
        raise Unusable(
            "dates and clocks lie in two columns: --time_column {} {}", *(dates[0], clocks[0])
        )


def refuse_unread_column(column, is_likely):
    """Raise Unusable where a column seems to hold stamps, though none were read from it.

    `is_likely` is true where something else than its cells says that it does, such as its name.
    """
    if holds_texts(column):
        refuse_unread_texts(column, is_likely)
        return
    if are_years_and_months(column):
        raise Unusable(
            "{} seems to hold years and months, such as {:.2f}: --time_column {} --time_format"
            " %Y.%m reads them, --time_column none takes the rows as they stand",
            *(column.name, column.dropna().iloc[0], column.name),
        )
    patterns = rarer_patterns(column, is_likely)
    if patterns:
        raise Unusable(
            "{} seems to hold dates, such as {:.0f}: --time_format {} says so, --time_column"
            " none takes the rows as they stand",
            *(column.name, column.dropna().iloc[0], " / ".join(patterns)),
        )
    refuse_rounded_epoch(column)


def are_years_and_months(column):
    """Whether numbers are years with months as decimals: 2024.11, and 2024.1 for October, too."""
    known = known_numbers(column)
    if len(known) < 3 or known.min() < OLDEST_YEAR or known.max() > 2200:
        return False
    have_months = pd.Series(known).astype(str).str.fullmatch(r"\d{4}\.(?:0?[1-9]|1[0-2])")
    return bool(have_months.all()) and goes_one_way(np.floor(known))


def refuse_unread_texts(column, is_likely):
    """As `refuse_unread_column`, of texts."""
    known = column.dropna()
    if known.empty or is_clock(known):
        return
    if not is_likely and not looks_like_stamps(known):
        return
    texts = known.astype(str)
    has_digit = texts.str.contains(r"\d")
    example = texts.iloc[int(has_digit.argmax())]
    if re.search(r"[^\W\d_\u3040-\ud7a3]{3,}", example):  # letters, but for those of East Asia
        raise Unusable(
            "the stamps of {} cannot be read, such as {!r} (names of months are read in English"
            " only): --time_format says how they are written, --time_column none takes the rows as"
            " they stand",
            *(column.name, example),
        )
    raise Unusable(
        "the stamps of {} cannot be read, such as {!r}: --time_format says how they are"
        " written, --time_column none takes the rows as they stand",
        *(column.name, example),
    )


def looks_like_stamps(text):
    """Whether most of some texts look like stamps; a clock alone does not."""
    sample = cells_of(text).astype(str).str.strip()
    if sample.empty or is_clock(sample):
        return False
    looks_so = sample.str.contains(LIKE_A_STAMP).mean() > MOST_STAMPS
    varies = len(sample) == 1 or sample.nunique() > 1
    return looks_so and varies and sample.str.contains(r"\d").mean() > MOST_STAMPS


def is_clock(text):
    """Whether most of some texts are a time of the day alone."""
    sample = cells_of(text).astype(str).str.strip()
    return len(sample) > 0 and sample.str.fullmatch(CLOCK_ALONE).mean() > 0.5


# -- Stamps that are numbers -----------------------------------------------------------------------

PATTERN_OF_LENGTH = {  # how many digits a whole number has -> which date it may be
    4: "%Y",
    6: "%Y%m",
    7: "%Y%j",
    8: "%Y%m%d",
    10: "%Y%m%d%H",
    12: "%Y%m%d%H%M",
    14: "%Y%m%d%H%M%S",
}
YEARS_IN_NS = (1678, 2261)  # the first and the last whole year that nanoseconds can count
UNITS_OF_EPOCH = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # unit -> how many are a second


def known_numbers(column):
    """Those of a column of numbers that are not missing, as an array.

    Of a table of ten thousand columns without a time column, each is asked whether it is one, and
    pandas takes many times as long for each question.
    """
    values = column.to_numpy()
    return values[~np.isnan(values)]


def parse_numbers(column, time_format="auto"):
    """(timestamps (rows,), StampForm) of numbers that are dates or seconds since 1970; or None."""
    known = known_numbers(column)
    if not len(known) or known.dtype == bool:
        return None
    lowest, highest = known.min(), known.max()
    if lowest > -(2**62) and highest < 2**62 and (known % 1 == 0).all():
        parsed = parse_digits(column, (int(lowest), int(highest)), time_format)
        if parsed:
            return parsed
    unit = epoch_unit(lowest, highest)
    if time_format != "auto" or not unit:
        return None
    stamps = in_nanoseconds(pd.DatetimeIndex(pd.to_datetime(column, unit=unit)))
    return stamps, StampForm(f"epoch {unit}", str(known[-1]))


def parse_digits(column, bounds, time_format):
    """(timestamps (rows,), StampForm) of whole numbers such as 20240131, or None.

    `bounds` are the lowest and the highest one.
    """
    pattern = time_format
    if time_format == "auto":
        lowest, highest = map(str, bounds)
        are_of_one_length = bounds[0] >= 0 and len(lowest) == len(highest)
        pattern = PATTERN_OF_LENGTH.get(len(lowest)) if are_of_one_length else None
    if not pattern:
        return None
    known = column.dropna()
    text, stamps = digits_as(column, pattern)
    is_read = stamps.notna().sum() >= MOST_STAMPS * len(known)
    if not is_read or stamps.min().year < OLDEST_YEAR:
        return None
    refuse_far_years(stamps, pattern)
    return stamps, StampForm(pattern, text[known.index[-1]])


def epoch_unit(lowest, highest):
    """The unit in which all numbers from one to the other count the time since 1970; "" if none.

    They must lie between 1979 and 2103.
    """
    for unit, size in UNITS_OF_EPOCH.items():
        if 3e8 * size <= lowest and highest < 4.2e9 * size:
            return unit
    return ""


def digits_as(column, pattern):
    """(texts (rows,), timestamps (rows,)) of whole numbers that are dates in a pattern.

    Zeros in front, which numbers lose, are put back.
    """
    text = column.astype("Int64").astype("string")
    text = text.str.zfill(len(pd.Timestamp(2000, 1, 1).strftime(pattern)))
    stamps = pd.DatetimeIndex(read_stamps(text, "", pattern)).tz_localize(None)
    return text, in_nanoseconds(stamps)


def in_nanoseconds(stamps):
    """A DatetimeIndex in nanoseconds; NaT where the year is none that they can count.

    pandas 3 reads stamps in microseconds, which reach further.
    """
    is_far = (stamps.year < YEARS_IN_NS[0]) | (stamps.year > YEARS_IN_NS[1])
    return stamps.where(~is_far).as_unit("ns")


def rarer_patterns(column, is_likely):
    """The patterns by which all numbers of a column are dates in another order, as 31122024 is."""
    numbers = known_numbers(column)
    if not len(numbers) or numbers.min() < 10_100 or numbers.max() > 31_129_999:
        return []  # before 01-01-00, or after 31-12-9999
    known = column.drop_duplicates().dropna()
    if len(known) < 3 or (known % 1 != 0).any():
        return []
    if not is_likely and known.diff().dropna().nunique() == 1:  # they count
        return []
    fitting = []
    for pattern in ("%d%m%Y", "%m%d%Y", "%d%m%y", "%m%d%y", "%y%m%d"):
        _, stamps = digits_as(known, pattern)
        years = stamps.year
        if stamps.notna().all() and years.min() >= OLDEST_YEAR and years.max() <= 2100:
            fitting.append(pattern)
    return fitting


def refuse_rounded_epoch(column):
    """Raise Unusable where numbers run as seconds since 1970 do, but by no even step.

    Only from 2001 to 2036, as nothing but the size of the numbers tells.
    """
    known = known_numbers(column)
    if not len(known):
        return
    lowest, highest = known.min(), known.max()
    is_epoch = any(
        1e9 * size <= lowest < highest < 2.1e9 * size for size in UNITS_OF_EPOCH.values()
    )
    if is_epoch and goes_one_way(known):
        raise Unusable(
            "{} seems to count seconds since 1970, such as {:g}, but by no even step: was it"
            " rounded? --time_column none takes the rows as they stand",
            *(column.name, known[0]),
        )


def refuse_far_years(stamps, pattern):
    """Raise Unusable where years of two digits are late, as those of the last century would be."""
    if lie_far_ahead(stamps, pattern):
        raise Unusable(
            "its years have two digits, and one would be {}: write them with four digits;"
            " --time_column none takes the rows as they stand",
            stamps.max().year,
        )


def lie_far_ahead(stamps, pattern):
    """Whether a year of two digits, as a pattern reads it, lies later than those of data do."""
    return "%y" in pattern and stamps.max().year > pd.Timestamp.now().year + YEARS_AHEAD


# -- Stamps that are text --------------------------------------------------------------------------

# How stamps are written is a pattern in two parts, (date, clock), such as ("%d.%m.%Y", " %H:%M"),
# so that a stamp without a clock, or with another one, is read by the same date. ("", pattern) has
# not been divided: a clock in front, "ISO8601" and "mixed", which pandas reads by rules of its own.

# Two dates, or a date with a clock and what follows: the first is group 1, 2 or 3.
RANGE_OF_STAMPS = (
    r"^(.*\d:\d\d\S*) +[-–] +\d.*$"
    r"|^(\d[\d./-]{5,}) +[-–] +\d[\d./-]{5,}$"
    r"|^(\d{4}-\S+)/\d{4}-\S+$"
)
OFFSET = r":\d\d(?:[.,]\d+)? ?(Z|[+-]\d\d(?::?\d\d)?)$"  # from UTC, behind a clock
MIDNIGHT = r"(?<=[ T]00:00)(:00(?:\.0+)?)? ?[+-]\d\d(?::?\d\d)?$"  # with an offset
DOTS_OF_AM_PM = r"(?<=\d [AaPp])\.\s?[Mm]\."
WORD_BEHIND = r"(?<=\d)(\s*[A-Za-z]+)$"


def parse_text(column, time_format="auto"):
    """(timestamps (rows,), StampForm) of texts, NaT where unread; None where they are no stamps.

    They keep the offset from UTC that all of them have; with several offsets they are in UTC.
    Raises Unusable where two patterns fit equally well.
    """
    text, sample, form = plain_stamps(column.astype("string"))
    if sample.empty or sample.str.contains(r"\d").mean() < MOST_STAMPS:
        return None
    patterns = fitting_patterns(sample, time_format)
    if not patterns:
        return None

    readings = {date + clock: read_stamps(text, date, clock) for date, clock in patterns}
    form.pattern = most_even_pattern(readings, sample)
    offsets = offsets_of(sample)
    if len(offsets) > 1:
        form.notes.append(
            Message("several offsets ({}): read and written in UTC", (", ".join(offsets),))
        )
    zone = zone_of(offsets)
    if form.suffix.strip() in ("UTC", "GMT"):
        zone = "UTC"
    stamps = in_nanoseconds(pd.DatetimeIndex(readings[form.pattern]).tz_convert(zone))
    refuse_far_years(stamps, form.pattern)
    form.example = example_of([*sample, *text.dropna().iloc[-12:]], form.pattern)
    return stamps, form


def fitting_patterns(sample, time_format):
    """The patterns (date, clock) that read a sample of stamps; [] without one."""
    if time_format == "auto":
        patterns = best_patterns(sample)
        least = MOST_STAMPS
    else:
        patterns = [("", time_format)]
        least = 1 / len(sample)  # else it is of another column
    shares = [read_stamps(sample, date, clock).notna().mean() for date, clock in patterns]
    return [pattern for pattern, share in zip(patterns, shares, strict=True) if share >= least]


def plain_stamps(text):
    """(texts (rows,), a sample of them, StampForm) without what pandas' patterns do not know.

    What is taken away is noted in the StampForm, so that it can be written again.
    """
    form = StampForm("")
    sample = cells_of(text)
    if sample.empty:
        return text, sample, form
    edits = []  # (regular expression, what is written for it), in this order
    if sample.str.contains(r"^\s|\s$").any():
        edits.append((r"^\s+|\s+$", ""))
    if edited(sample, edits).str.match(RANGE_OF_STAMPS).mean() > 0.5:
        form.notes.append(Message("of ranges such as {!r} the start", (sample.iloc[0].strip(),)))
        edits.append((RANGE_OF_STAMPS, r"\1\2\3"))
    form.has_dots = bool(sample.str.contains(DOTS_OF_AM_PM).any())
    if form.has_dots:
        edits.append((DOTS_OF_AM_PM, "m"))
    form.suffix = word_behind(edited(sample, edits))
    if form.suffix:
        edits.append((WORD_BEHIND, ""))
        if form.suffix.strip() not in ("UTC", "GMT"):
            form.notes.append(Message("{!r} behind the stamps is left out", (form.suffix.strip(),)))
    plain = edited(sample, edits)
    if len(offsets_of(plain)) > 1 and plain.str.match(f".*{MIDNIGHT}").all():
        edits.append((MIDNIGHT, r"\1"))
        form.notes.append(Message("several offsets, but always at midnight: taken as dates"))
    return edited(text, edits), edited(sample, edits), form


def edited(text, edits):
    """Texts after edits, a list of (regular expression, what is written for it)."""
    for pattern, replacement in edits:
        text = text.str.replace(pattern, replacement, regex=True)
    return text


def word_behind(sample):
    """The word that all of some stamps end with, such as " UTC" or " Uhr"; "" without one.

    Raises Unusable where they end with different zones.
    """
    words = sample.str.extract(WORD_BEHIND)[0].fillna("").unique()
    if len(words) == 1:
        belongs_to_stamps = words[0].strip().upper()[:3] in (*MONTHS, "AM", "PM", "Z")
        is_behind_stamps = sample.str.contains(r"\d:\d|\d[-/.]\d+[-/.]\d").all()  # not 2024 kWh
        return words[0] if is_behind_stamps and not belongs_to_stamps else ""
    zones = [word.strip() for word in words]
    if all(re.fullmatch("[A-Z]{1,3}S?T", zone) for zone in zones):
        raise Unusable(
            "the stamps are of the zones {}: write them with offsets from UTC, such as"
            " 2024-07-01 12:00+02:00",
            ", ".join(zones),
        )
    return ""


def most_even_pattern(readings, sample):
    """The pattern by which the stamps are most even; `readings` is pattern -> timestamps.

    So 1/2/2024 is in January or in February. One that puts them far ahead is taken if no other
    is left. Raises Unusable where the stamps do not tell.
    """
    near = {
        pattern: times for pattern, times in readings.items() if not lie_far_ahead(times, pattern)
    }
    readings = near or readings
    if len(readings) == 1:
        return next(iter(readings))
    distances = {pattern: unevenness(times) for pattern, times in readings.items()}
    first, *others = sorted(distances, key=distances.get)
    for other in others:
        is_the_same = readings[first].equals(readings[other])
        is_as_even = distances[other] <= EQUALLY_EVEN * distances[first]
        if is_as_even and not is_the_same:
            raise Unusable(
                "stamps such as {!r} are {} or {}: --time_format decides",
                *(sample.iloc[-1], first, other),
            )
    return first


def unevenness(times):
    """The longest distance of neighbouring stamps over the typical one."""
    gaps = np.diff(np.unique(times.dropna().astype("int64")))
    if not len(gaps):
        return math.inf
    return gaps.max() / np.median(gaps)


def offsets_of(sample):
    """The different offsets from UTC of stamps as they are written, sorted; "" where one has none.

    Z is one of its own.
    """
    offsets = sample.str.extract(OFFSET)[0]
    return sorted(set(offsets.fillna("").str.replace(":", "")))


def zone_of(offsets):
    """Zone of stamps with such offsets as pandas wants it: None, "UTC", or one such as "+08:00"."""
    if offsets == [""]:
        return None
    if len(offsets) > 1 or offsets == ["Z"]:
        return "UTC"
    hours = offsets[0][:3]
    minutes = offsets[0][3:] or "00"
    return f"{hours}:{minutes}"


def example_of(texts, pattern):
    """The text that shows most of how stamps are written: all of a clock, and no zeros in front."""
    if pattern == "ISO8601":
        texts = [text for text in texts if re.match(r"\d{4}", text)]  # no units below the header
        marks = [len(re.sub(r"\d", "", text)) for text in texts]  # as many as there are parts
        fitting = [text for text, count in zip(texts, marks, strict=True) if count == max(marks)]
    else:
        form = re.compile(regex_of(pattern))
        fitting = [text for text in texts if form.fullmatch(text)]
    return min(fitting, key=len) if fitting else texts[-1]


# -- Patterns of stamps ----------------------------------------------------------------------------

# What stands for the parts of a stamp in a pattern: pandas' directives, and %q for a quarter.
DIRECTIVES = {
    "%Y": r"(?P<Y>\d{4})",
    "%G": r"\d{4}",
    "%y": r"\d\d",
    "%m": r"\d{1,2}",
    "%d": r"\d{1,2}",
    "%V": r"\d\d",
    "%u": r"[1-7]",
    "%j": r"\d{3}",
    "%q": r"(?P<q>[1-4])",
    "%b": r"[A-Za-z]{3}",
    "%a": r"[A-Za-z]{3}",
    "%A": r"[A-Za-z]{6,9}",
    "%B": r"[A-Za-z]{4,9}",
    "%H": r"\d{1,2}",
    "%I": r"\d{1,2}",
    "%M": r"\d\d",
    "%S": r"\d\d",
    "%f": r"\d{1,9}",
    "%p": r"[AaPp][Mm]",
    " ": r"\s+",
}


def best_patterns(sample):
    """The patterns (date, clock) that read most of a sample of stamps; several where all do."""
    unread = {("", "ISO8601"): read_exactly(sample, "ISO8601").isna().mean()}  # pattern -> share
    if unread["", "ISO8601"] == 0:
        return [("", "ISO8601")]
    longest = sample[sample.str.len() == sample.str.len().max()]  # those with all of a clock
    looked_at = [*sample.iloc[:: max(1, len(sample) // 10)], *longest.iloc[:3]]
    found = [pattern for stamp in looked_at for pattern in known_patterns(stamp)]
    for date, clock in dict.fromkeys(found):
        unread[date, clock] = read_exactly(sample, date + clock).isna().mean()
    # With a month by its name and a year of four digits, a stamp means one date however it is
    # written: "mixed" leaves each one to pandas.
    is_named = sample.str.contains(NAME_OF_MONTH) & sample.str.contains(r"\d{4}")
    if min(unread.values()) > 1 - MOST_STAMPS and is_named.mean() >= MOST_STAMPS:
        unread["", "mixed"] = read_exactly(sample, "mixed").isna().mean()
    fewest = min(unread.values())
    if fewest == 1:  # no pattern reads any
        return []
    return [pattern for pattern, share in unread.items() if share == fewest]


def known_patterns(stamp):
    """List of the patterns (date, clock) that a stamp has; ("", both) with the clock in front."""
    found = []
    for clock in CLOCKS:
        front = compiled(clock + " ").match(stamp) if ":" in clock else None
        if front:
            dates = [date for date in DATES if compiled(date).fullmatch(stamp, front.end())]
            found += [("", f"{clock} {date}") for date in dates]
    for date in (*DATES, *MONTH_DATES):
        front = compiled(date).match(stamp)
        if front:
            rests = clocks_after(date)
            clocks = [clock for clock in rests if compiled(clock).fullmatch(stamp, front.end())]
            found += [(date, clock) for clock in clocks]
    return found


@functools.cache
def compiled(pattern):
    """The regular expression of a pattern."""
    return re.compile(regex_of(pattern))


def clocks_after(date):
    """What may follow a date, with what stands between: nothing, or a time of the day."""
    if date in MONTH_DATES:
        return [""]
    joiners = [" ", ", ", "T"]
    if date.endswith("日"):
        joiners.append("")
    if date == "%Y%m%d":
        joiners.append(":")
    return ["", *(joiner + clock for joiner in joiners for clock in CLOCKS)]


def regex_of(pattern):
    """Regular expression of the texts that have a pattern."""
    parts = re.findall(r"%[A-Za-z]|.", pattern)
    return "".join(DIRECTIVES.get(part, re.escape(part)) for part in parts)


HOUR_24 = r"^(\d{8}|.*\D)24((?::?00){0,2}(?:[.,]0+)?(?: ?Z| ?[+-]\d\d:?\d\d|时)?)$"


def read_stamps(text, date, clock):
    """Timestamps (rows,) in UTC of texts, NaT where unread; `date` + `clock` is their pattern.

    Those that have another clock, or none, are read by the same date; 24:00 is the next day's 0:00.
    """
    times = read_exactly(text, date + clock)
    unread = text[times.isna() & text.notna()]
    for other in other_clocks(unread, date):
        times[unread.index] = read_exactly(unread, date + other)
        unread = unread[times[unread.index].isna()]
    late = unread[unread.str.match(HOUR_24).to_numpy(dtype=bool)]
    if len(late):
        midnights = late.str.replace(HOUR_24, r"\g<1>00\g<2>", regex=True)
        times[late.index] = read_stamps(midnights, date, clock) + pd.Timedelta(1, "D")
    return times


def read_exactly(text, pattern):
    """Timestamps (rows,) in UTC of texts in a pattern, NaT where they do not have it.

    The pattern may be one that pandas does not know: with a quarter, or a week without its day.
    """
    if "%q" in pattern:
        parts = text.str.extract(f"^{regex_of(pattern)}$")
        months = (3 * parts["q"].astype("Int64") - 2).astype("string")
        text = parts["Y"].str.cat(months, sep="-")
        pattern = "%Y-%m"
    if "%V" in pattern and "%u" not in pattern:  # of a week the Monday
        text = text + " 1"
        pattern = pattern + " %u"
    try:
        return pd.to_datetime(text, format=pattern, errors="coerce", utc=True)
    except ValueError as error:  # of the user's own pattern
        raise Unusable("--time_format {}: {}", *(pattern, error)) from error


def other_clocks(texts, date):
    """List of what follows a date in some of the texts, as patterns of the clock."""
    found = []
    for text in cells_of(texts):
        found += [clock for its_date, clock in known_patterns(text) if its_date == date]
    return [*dict.fromkeys(found)]  # each once, in order


# -- Stamps are written ----------------------------------------------------------------------------


def write_stamps(index, form):
    """Texts (or numbers) of timestamps (H,) as a file has them."""
    kind, _, unit = form.pattern.partition(" ")
    if kind == "epoch":
        ticks = index.tz_localize(None).as_unit("ns").asi8
        size = 10**9 // UNITS_OF_EPOCH[unit]  # ns in a unit
        is_whole = "." not in form.example and (ticks % size == 0).all()
        return ticks // size if is_whole else ticks / size
    pattern = form.pattern
    if pattern == "ISO8601":
        pattern = iso_pattern(form.example)
    elif pattern == "mixed":
        pattern = iso_pattern("")
    if "%q" in pattern:
        return index.tz_localize(None).to_period("Q").strftime(pattern)
    texts = like_example(index.strftime(pattern), pattern, form.example)
    if form.has_dots:
        texts = texts.str.replace("AM", "a.m.").str.replace("PM", "p.m.")
    return pd.Index([text + form.suffix for text in texts])


ISO_STAMP = re.compile(
    r"(?P<date>\d{4}\d\d(\d\d)?|\d{4}(?P<dash>[-/.])\d\d?([-/.]\d\d?)?)"
    r"(?P<joiner>[T ])?"
    r"(?P<clock>\d\d|\d{4}|\d{6}|\d\d?(:\d\d)+)?"
    r"(?P<rest>[.,]\d+)?"  # of a second
    r"(?P<zone> ?(?:Z|[+-]\d\d(?::?\d\d)?))?"
)


def iso_pattern(example):
    """Pattern of strftime for stamps like an ISO one."""
    found = ISO_STAMP.fullmatch(example)
    if not found:
        return "%Y-%m-%d %H:%M:%S"
    dash = found["dash"] or ""
    parts = found["date"].count(dash) + 1 if dash else len(found["date"]) // 2 - 1
    pattern = dash.join(["%Y", "%m", "%d"][:parts])
    if clock := found["clock"]:
        colon = ":" if ":" in clock else ""
        parts = clock.count(":") + 1 if colon else len(clock) // 2
        pattern += (found["joiner"] or "") + colon.join(["%H", "%M", "%S"][:parts])
    if found["rest"]:
        pattern += f"{found['rest'][0]}%f"
    zone = found["zone"] or ""
    if zone == "" or zone.strip() == "Z":
        return pattern + zone
    space = " " if zone.startswith(" ") else ""
    return f"{pattern}{space}%z"


def like_example(texts, pattern, example):
    """Texts of stamps, with as many digits and as large letters as in an example.

    strftime always writes 01 for 1, six digits of a second, Jan for JAN and +0800 for +08:00.
    """
    if re.search(r"[+-]\d\d:\d\d$", example):
        texts = texts.str.replace(r"([+-]\d\d)(\d\d)$", r"\1:\2", regex=True)
    elif re.search(r"[+-]\d\d$", example) and pattern.endswith("%z"):
        texts = texts.str.replace(r"\d\d$", "", regex=True)
    if "%f" in pattern:
        digits = len(re.findall(r"[.,](\d+)", example)[-1])
        six = r"(?<=[.,])\d{6}(?!\d)"
        texts = texts.str.replace(
            six, lambda found: found[0][:digits].ljust(digits, "0"), regex=True
        )
    if re.search("%[bB]", pattern) and example.isupper():
        texts = texts.str.upper()
    date, clock = split_stamp(example)
    has_short_date = re.search(r"(?<!\d)\d(?!\d)", date) is not None  # a number of one digit
    has_short_clock = re.match(r"\d:", clock) is not None
    return pd.Index([without_zeros(text, has_short_date, has_short_clock) for text in texts])


def split_stamp(text):
    """(date, clock) of a stamp; the clock begins with the hour."""
    clock = re.search(r"\d{1,2}:", text)
    start = len(text) if clock is None else clock.start()
    return text[:start], text[start:]


def without_zeros(text, of_date, of_clock):
    """A stamp without the zeros in front of the numbers of its date, or of its hour."""
    date, clock = split_stamp(text)
    if of_date:
        date = re.sub(r"(?<!\d)0(\d)(?!\d)", r"\1", date)
    if of_clock:
        clock = re.sub(r"^0(\d)", r"\1", clock)
    return date + clock


# -- The regular grid ------------------------------------------------------------------------------


@dataclasses.dataclass
class Grid:
    """Where each timestamp lies on a regular grid."""

    positions: np.ndarray  # (T,) int64, -1 for a timestamp off the grid
    freq: str  # pandas frequency


def regular_grid(times):
    """Grid of sorted timestamps: by the calendar where that fits, else the most common step."""
    step = common_step(times)
    for grid_of in (month_grid, half_month_grid, business_grid):
        if grid := grid_of(times, step):
            return grid
    return fixed_step_grid(times, step)


def common_step(times):
    """The most common distance of two neighbouring timestamps, in ns."""
    gaps = np.diff(times.asi8)
    if (gaps == gaps[0]).all():  # the usual case, without sorting
        return int(gaps[0])
    steps, counts = np.unique(gaps, return_counts=True)
    if counts.max() < len(gaps) / 2:  # the stamps jitter
        steps, counts = np.unique(to_usual_steps(gaps), return_counts=True)
    return int(steps[counts.argmax()])


def to_usual_steps(gaps):
    """Each gap as the usual step (a minute, an hour, ...) within 10 % of it, or as it is."""
    distance = np.abs(np.log(gaps[:, None] / USUAL_STEPS))
    nearest = USUAL_STEPS[distance.argmin(axis=1)]
    is_close = np.abs(gaps - nearest) <= nearest // 10
    return np.where(is_close, nearest, gaps)


def midnights_of(times):
    """Timestamps of their dates.

    `normalize` looks for a frequency, which is slow; and is_month_end means the last business day
    where it finds that of business days.
    """
    return pd.DatetimeIndex(times.asi8 - times.asi8 % DAY)


DAYS_OF_MONTH = 365.25 / 12  # in the mean


def month_grid(times, step):
    """Grid of every n months on one day of the month, or None.

    The day may vary by some days, as that of the last business day does.
    """
    days = step / DAY
    months = round(days / DAYS_OF_MONTH)
    if months < 1 or abs(days - DAYS_OF_MONTH * months) > 3:
        return None
    gaps = np.diff(times.asi8)
    if len(gaps) > 3 and (gaps % gaps.min() == 0).all():  # months are not equally long
        return None

    dates = midnights_of(times)
    is_at_end = dates.is_month_end.mean() >= MOST_ON_RULE
    usual_day = 31 if is_at_end else int(np.median(dates.day))
    numbers = month_numbers(dates, usual_day)
    # With a step of three months, phase 0 is January, April, July and October.
    phases, counts = np.unique(numbers % months, return_counts=True)
    if counts.max() < MOST_ON_RULE * len(dates):
        return None
    phase = phases[counts.argmax()]
    positions = np.rint((numbers - phase) / months).astype(np.int64)
    if len(np.unique(positions)) < MOST_ON_RULE * len(dates):
        return None
    positions = positions - positions.min()
    return Grid(positions, month_freq(months, phase, is_at_end))


def month_numbers(dates, usual_day):
    """Months since the year 0 of the month in which `usual_day` is nearest to each date."""
    middle = dates + pd.Timedelta(15 - usual_day, "D")
    return (12 * middle.year + middle.month - 1).to_numpy()


def month_freq(months, phase, is_at_end):
    """Pandas' name of every n months: MS, ME, QS-JAN, QE-FEB, YS-APR, 2MS, ..."""
    side = "E" if is_at_end else "S"
    if months == 3:
        return f"Q{side}-{MONTHS[phase]}"
    if months == 12:
        return f"Y{side}-{MONTHS[phase]}"
    return f"M{side}" if months == 1 else f"{months}M{side}"


def half_month_grid(times, step):
    """Grid of the 1st and the 15th of each month, or of the 15th and the last day; or None."""
    if not 13 * DAY <= step <= 17 * DAY:
        return None
    days = midnights_of(times)
    half_months = 2 * (12 * days.year + days.month - 1).to_numpy()
    if days.day.isin([1, 15]).mean() >= MOST_ON_RULE:
        return Grid(half_months + (days.day >= 15), "SMS-15")
    if ((days.day == 15) | days.is_month_end).mean() >= MOST_ON_RULE:
        return Grid(half_months + (days.day > 15), "SME-15")
    return None


def business_grid(times, step):
    """Grid of business days, or None."""
    if step != DAY:
        return None
    days = midnights_of(times)
    on_rule = days + 0 * to_offset("B") == days  # to add 0 business days moves a weekend to Monday
    if on_rule.mean() < MOST_ON_RULE or len(days.unique()) < MOST_ON_RULE * len(days):
        return None
    margin = 2 * to_offset("B")
    all_days = pd.date_range(days[0] - margin, days[-1] + margin, freq="B")
    half_a_day = pd.Timedelta(step // 2, "ns")
    positions = all_days.get_indexer(days, method="nearest", tolerance=half_a_day)
    return Grid(positions, "B")


def refuse_uneven_days(times, step):
    """Raise Unusable, as timestamps lie some days apart but by no fixed step."""
    weekdays = times.day_of_week.unique().sort_values()
    if len(weekdays) < 7:
        raise Unusable(
            "on some days of the week only ({}), which are no even steps: --time_column none takes"
            " the rows as they stand",
            ", ".join(pd.Timestamp(1990, 1, day + 1).day_name()[:3] for day in weekdays),
        )
    raise Unusable(
        "about every {:g} days, but by a calendar that starts anew each month or year: make the"
        " steps even (pandas: resample); --time_column none takes the rows as they stand",
        step / DAY,
    )


def refuse_change_of_step(times, step):
    """Raise Unusable where a stretch of sorted timestamps has another step than most.

    It does where many of them lie closer together, or where the last ones lie closer or wider.
    """
    gaps = np.diff(times.asi8)
    starts = np.append(0, np.flatnonzero(np.diff(gaps)) + 1)  # of stretches of equal gaps
    lengths = np.diff(np.append(starts, len(gaps)))
    is_closer = gaps[starts] < step / 1.5  # else it jitters
    is_wider = gaps[starts] > step * 1.5
    is_last = starts == starts[-1]
    are_many = (lengths >= LAST_ROWS) & ((lengths > FEW_UNREAD * len(gaps)) | is_last)
    changes = starts[are_many & (is_closer | (is_wider & is_last))]
    if len(changes):
        first = changes[0]
        raise Unusable(
            "from {} on its step is {}, and mostly {}: make it one for all rows (pandas: resample),"
            " or a file of its own for each",
            *(times[first], name_of_step(gaps[first]), name_of_step(step)),
        )


def fixed_step_grid(times, step):
    """Grid of equal steps, laid so that the timestamps lie around it evenly."""
    refuse_change_of_step(times, step)
    stamps = times.asi8
    # As angles of a circle of one step, so that 59 and 1 of 60 average to 0 and not to 30.
    angles = np.exp(2j * np.pi * (stamps % step) / step)
    if step >= 2 * DAY and abs(angles.mean()) < MOST_IN_PHASE:
        refuse_uneven_days(times, step)
    first_is_late_by = np.angle(angles[0] / angles.mean()) / (2 * np.pi)
    steps_after_first = (stamps - stamps[0]) / step + first_is_late_by
    positions = np.rint(steps_after_first).astype(np.int64) + 1  # never the -1 of "off the grid"
    return Grid(positions, name_of_step(step))


def name_of_step(step):
    """The pandas frequency of a step in ns, such as 15min or 7D."""
    days = step // DAY
    if step % DAY == 0:  # which pandas 2 writes like this, and pandas 3 in hours
        return "D" if days == 1 else f"{days}D"
    return to_offset(pd.Timedelta(step)).freqstr


@dataclasses.dataclass
class Places:
    """Where the rows of a series lie, by step; the same for all columns of values."""

    rows: np.ndarray  # (n,) which rows are used, in the order of their stamps
    positions: np.ndarray  # (n,) the step at which each of them lies, from 0 on
    freq: str  # pandas frequency, "" without timestamps
    stamps: pd.DatetimeIndex | None  # the last 12 at most; None without timestamps
    filled: int  # steps that have a row
    conflicting: int  # rows left out, as a later one has the same stamp
    crowded: int  # rows left out, as another one lies at the same step, or as they lie at none

    @property
    def steps(self):
        """T, how many steps there are."""
        return int(self.positions.max()) + 1

    def lay(self, values):
        """The values (rows,) by step, (T,) float64, NaN where missing."""
        regular = np.full(self.steps, np.nan)
        regular[self.positions] = values[self.rows]  # of two at one step the later stays
        return regular


class Duplicated(Unusable):
    """Several rows of a series have the same stamp, and other values."""


def on_grid(times):
    """Places of timestamps (rows,). Raises Unusable where there is no regular grid."""
    clock = times.tz_localize(None).as_unit("ns")  # the grid is that of the clock they show
    rows = np.flatnonzero(clock.notna())
    rows = rows[np.argsort(clock.asi8[rows], kind="stable")]
    rows, conflicting = without_conflicts(rows, clock)
    if len(rows) < 3:
        raise Unusable("too short: {} timestamps", len(rows))

    grid = regular_grid(clock[rows])
    is_on = grid.positions >= 0
    positions = grid.positions[is_on]
    filled = 0
    if len(positions):
        filled = 1 + int((np.diff(positions) > 0).sum())  # they are sorted
    if filled < MOST_PLACED * len(rows):
        raise Unusable(
            "irregular timestamps: only {} of {} fit one step ({})", filled, len(rows), grid.freq
        )
    refuse_sparse(positions, filled, grid.freq)
    return Places(
        rows[is_on],
        positions - positions.min(),
        grid.freq,
        stamps=times[rows[-12:]],
        filled=filled,
        conflicting=conflicting,
        crowded=len(rows) - filled,
    )


def without_conflicts(rows, clock):
    """(rows, of those with the same stamp the last one, how many others there were).

    `rows` are in the order of their stamps in `clock`. Raises Duplicated where the others are more
    than a few.
    """
    is_repeated = np.append(np.diff(clock.asi8[rows]) == 0, False)
    conflicting = int(is_repeated.sum())
    if conflicting > FEW_DUPLICATES * len(rows):
        raise Duplicated(
            "{} of {} timestamps are duplicates with other values", conflicting, len(rows)
        )
    return rows[~is_repeated], conflicting


def refuse_sparse(positions, filled, freq):
    """Raise Unusable where most steps have no row. The longest gap does not count.

    `positions` are the steps of rows, `filled` is how many different ones they are.
    """
    gaps = np.diff(positions)
    longest = int(gaps.max(initial=1))
    steps = int(np.ptp(positions)) + 1
    missing = steps - filled
    missing_elsewhere = missing - (longest - 1)
    if missing_elsewhere > MOST_MISSING * (steps - longest) or steps > 10 * filled + 1000:
        raise Unusable(
            "sparse timestamps: {:,} of {:,} steps ({}) have no row: add them (pandas: asfreq),"
            " with 0 if that is meant; for hours of trade and the like, --time_column none takes"
            " the rows as they stand",
            *(missing, steps, freq),
        )


# -- The steps that follow -------------------------------------------------------------------------


def months_of(freq):
    """How many months a pandas frequency steps by; 0 where it steps by something else."""
    found = re.fullmatch(r"(\d*)B?([MQY])[SE](-\w+)?", freq)
    if not found:
        return 0
    count = int(found[1] or 1)
    return count * {"M": 1, "Q": 3, "Y": 12}[found[2]]


def season_of(freq):
    """Seasonal period in steps of a pandas frequency; 24 without one, 1 where no cycle is usual."""
    if freq == "B":
        return 5
    if freq.startswith("SM"):
        return 24
    if months := months_of(freq):
        return max(1, 12 // months)
    named = freq or "h"
    step = pd.Timedelta(named if named[0].isdigit() else f"1{named}").value
    if step < DAY:
        return round(DAY / step)
    return {1: 7, 7: 52}.get(step // DAY, 1)


def steps_after(series, count, back=0):
    """Index (count,) of the steps from `back` before the end of a series on.

    Timestamps on the clock of its last one, or the numbers 1, 2, ... where it has none.
    """
    if series.stamps is None:
        return pd.RangeIndex(1, count + 1, name="step") - back
    if months := months_of(series.freq):
        index = months_after(series, months, count, back)
    else:
        index = offsets_after(series, to_offset(series.freq), count, back)
    return index.rename(series.stamps.name)


def offsets_after(series, offset, count, back):
    """As `steps_after`, for business days and equal steps."""
    last = series.stamps[-1]
    day = last.normalize() if series.freq == "B" else last
    # A stamp off the rule, such as a Sunday, counts as the nearest one on it.
    sides = (offset.rollback(day), offset.rollforward(day))
    nearest = min(sides, key=lambda side: abs(side - day))
    index = pd.date_range(nearest - back * offset, periods=count + 1, freq=offset)[1:]
    return index + (last - day)  # the time of the day, and how far it was off


def months_after(series, months, count, back):
    """As `steps_after`, for every n months on the day of the month that is seen; 31 = the last."""
    stamps = series.stamps.tz_localize(None)
    usual_day = day_of_month(stamps)
    last = month_numbers(stamps[-1:].normalize(), usual_day)[0]
    numbers = last + months * (np.arange(1, count + 1) - back)
    first_days = pd.DatetimeIndex((numbers - 12 * 1970).astype("datetime64[M]")).as_unit("ns")
    days = np.minimum(usual_day, first_days.days_in_month)
    clock = stamps[-1] - stamps[-1].normalize()
    return (first_days + pd.to_timedelta(days - 1, "D") + clock).tz_localize(series.stamps.tz)


def day_of_month(stamps):
    """The day of the month, 1 to 31, that most stamps have; in a short month it is the last one."""
    days = np.arange(31, 0, -1)
    clipped = np.minimum(days[:, None], stamps.days_in_month.to_numpy())  # (31, stamps)
    hits = (clipped == stamps.day.to_numpy()).sum(axis=1)
    return int(days[hits.argmax()])  # of equally good ones the latest


# -- Columns ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class ColumnValues:
    """What a column holds, as numbers."""

    values: np.ndarray  # (rows,) float64, NaN where missing or not finite
    is_unread: np.ndarray  # (rows,) bool, cells with something in them that is no number
    example: str  # one of them
    share: float  # of the cells with something in them, those that are numbers
    unit: str  # such as € or kWh, where all numbers have it; "" = none


@dataclasses.dataclass
class Roles:
    """What each column of a file is taken for."""

    times: Times | None
    ids: list  # names of those that tell the series of a long format apart
    codes: np.ndarray  # (rows,) int64, which series a row belongs to
    keys: list  # of each code, the texts of its ids
    values: dict  # column -> ColumnValues
    passed_over: dict  # column -> Message, why
    warnings: list  # of Message
    behind: int = 0  # columns behind the first numeric one, which are not looked at


NO_NUMBER = Message("is no number")
COUNTER = Message("only rises, or only falls, as a counter or a clock does")
INDEX = Message("is an index by its name")
SAWTOOTH = Message("goes on by one and the same step, and starts anew, as a counter does")
NUMBERING = (COUNTER, INDEX)  # why a column is passed over that only numbers the rows


def find_roles(table, config):
    """Roles of the columns of a Table. Raises Unusable."""
    frame = table.frame
    if config.names_columns:
        refuse_absent(frame, config.columns)
    else:
        refuse_series_in_rows(frame)
    ids = find_ids(table, config)
    times = find_times(frame, ids, config)
    if times and not config.names_columns:
        refuse_steps_in_columns(frame, times.stamps)
    codes, keys = codes_of(frame, ids)
    roles = Roles(times, ids, codes, keys, values={}, passed_over={}, warnings=[])
    find_values(table, roles, config)
    if not roles.values:
        refuse_without_values(frame, roles)
    if times is None and config.time_column == ["auto"]:
        refuse_newest_first(frame, roles)
        refuse_clocks_that_fall(frame, roles)
        refuse_years_alone(frame)
    if not config.names_columns:
        roles.warnings += warnings_of_few_values(roles)
        roles.warnings += warnings_of_sums(roles)
    if config.id_columns == ["auto"] and not ids:
        roles.warnings += warnings_of_possible_ids(frame, roles)
    return roles


def find_values(table, roles, config):
    """Note in Roles which columns are the values, and why others are none."""
    frame = table.frame
    times = roles.times
    candidates = config.columns if config.names_columns else frame.columns
    for name in candidates:
        if name in roles.ids or (times and name in times.names):
            continue
        if config.columns == ["first"] and roles.values:
            roles.behind += 1
            continue
        numbers = values_of_column(frame[name], table.layout)
        if numbers is None or numbers.share < MOST_NUMBERS:
            pass_over_text(name, frame[name], numbers, roles)
            continue
        # A column that the user named is one in any case.
        why = None if config.names_columns else why_no_value(name, numbers.values, roles)
        if why:
            roles.passed_over[name] = why
        else:
            roles.values[name] = numbers
        if why == SAWTOOTH:
            roles.warnings.append(Message("{} is passed over: it {}", (name, why)))


def refuse_without_values(frame, roles):
    """Raise Unusable as no column is the value, with the reason of each that might be."""
    told = [name for name, why in roles.passed_over.items() if why != NO_NUMBER]
    if not told:
        refuse_texts_alone(frame, roles)
    if len(frame) < SHORTEST_FILE:
        raise Unusable("too short: {} rows", len(frame))
    reasons = [Message("{} {}", (name, roles.passed_over[name])) for name in told[:5]]
    numeric = [name for name in told if is_number(frame[name])]
    if not numeric:
        raise Unusable("no column to forecast: {}", reasons)
    raise Unusable("no column to forecast: {}; --columns {} takes it anyway", reasons, numeric[0])


def refuse_texts_alone(frame, roles):
    """Raise Unusable as no column is numeric; a cell that begins with a digit may show why."""
    for name in roles.passed_over:
        cells = frame[name].dropna().astype(str)
        if len(cells) and re.match(r"\W*\d", cells.iloc[0]):
            raise Unusable(
                "no numeric column among {}; {} holds cells such as {!r}",
                *(first_names(frame), name, cells.iloc[0][:40]),
            )
    raise Unusable("no numeric column among {}", first_names(frame))


def refuse_newest_first(frame, roles):
    """Raise Unusable where a column beside the values only falls: the end may come first.

    It may stay as it is in some rows if it holds whole numbers, or years such as 2024.25.
    """
    for name, kind in frame.dtypes.items():
        if name in roles.values or not is_number(kind):
            continue
        known = known_numbers(frame[name])
        is_whole = (known % 1 == 0).all()
        are_years = ((known >= OLDEST_YEAR) & (known <= 2200)).all()
        steps = np.diff(np.floor(known) if are_years else known)
        is_time = is_whole or are_years or is_called_time(name) or (steps < 0).all()
        if is_time and len(frame) > 2 and (steps <= 0).all() and (steps < 0).any():
            raise newest_first(name)


def refuse_clocks_that_fall(frame, roles):
    """Raise Unusable where clocks without dates mostly fall: the newest rows may come first."""
    for name, kind in frame.dtypes.items():
        if name in roles.values or not holds_texts(kind) or not is_clock(frame[name]):
            continue
        clocks = frame[name].dropna().astype(str).str.strip().str.zfill(len("00:00"))
        if (clocks.iloc[1:].to_numpy() < clocks.iloc[:-1].to_numpy()).mean() > 0.5:
            raise newest_first(name)


def newest_first(name):
    """Unusable: a column only falls."""
    return Unusable(
        "{} only falls and there are no timestamps: do the newest rows come first?"
        " Turn the file round; --time_column none takes the rows as they stand",
        name,
    )


def refuse_years_alone(frame):
    """Raise Unusable where years were found, but not what makes stamps of them."""
    for name in frame.columns:
        if name.lower() in PARTS_OF_DATE["year"] and frame[name].duplicated().any():
            raise Unusable(
                "{} is a part of a date, but no other part was found: --time_column {} ... names"
                " them, --time_column none takes the rows as they stand",
                *(name, name),
            )


def warnings_of_few_values(roles):
    """List of Message: values that may be a flag or a class."""
    warnings = []
    for name, numbers in roles.values.items():
        known = numbers.values[~np.isnan(numbers.values)]
        if len(np.unique(known[:1000])) > FEW_VALUES:  # the usual case
            continue
        distinct = pd.unique(known)
        if len(distinct) <= FEW_VALUES:
            shown = ", ".join(f"{value:g}" for value in np.sort(distinct))
            warnings.append(
                Message(
                    "{} takes only the values {}: if it is a flag or a class, --columns names"
                    " another one",
                    (name, shown),
                )
            )
    return warnings


def warnings_of_sums(roles):
    """List of Message: values that nearly always rise, or do and then fall back to the start."""
    warnings = []
    for name, numbers in roles.values.items():
        known = numbers.values[~np.isnan(numbers.values)]
        steps = steps_within(numbers.values, roles.codes)
        falls = steps[steps < 0]
        rises = np.count_nonzero(steps > 0)
        if not len(falls):
            continue
        share = rises / (rises + len(falls))
        falls_back = (falls <= -0.5 * (known.max() - known.min())).mean() > 0.5
        if share >= MOST_RISES or (share >= MOST_ONE_WAY and falls_back):
            warnings.append(
                Message(
                    "{} falls in {:,} steps only and else rises, as a counter or a sum does: if it"
                    " is one, --columns names another column",
                    (name, len(falls)),
                )
            )
    return warnings


def warnings_of_possible_ids(frame, roles):
    """List of Message: texts that come in blocks, or by turns, as the ids of several series do.

    Or whole numbers that come in blocks.
    """
    warnings = []
    taken = {*roles.values, *(roles.times.names if roles.times else [])}
    for name, kind in frame.dtypes.items():
        is_whole = pd.api.types.is_integer_dtype(kind) and name not in roles.passed_over
        if name in taken or not (holds_texts(kind) or is_whole):
            continue
        column = frame[name]
        codes = pd.factorize(column)[0]
        count = codes.max() + 1
        if not 2 <= count <= len(frame) / FEWEST_ROWS:
            continue
        is_in_blocks = 1 + np.count_nonzero(np.diff(codes)) == count
        is_by_turns = holds_texts(kind) and (codes == np.arange(len(frame)) % count).all()
        if (is_in_blocks or is_by_turns) and not is_calendar(name, column, count, roles.times):
            warnings.append(Message("if {} tells the series apart: --id_columns {}", (name, name)))
    return warnings


def is_calendar(name, column, count, times):
    """Whether the `count` different cells of a column may be weekdays, months or years."""
    if holds_texts(column):
        return count in (7, 12) or looks_like_stamps(column)
    values = column.to_numpy(dtype=np.float64)
    is_part = is_named_as_part(name) or is_part_of_date(values, times)
    return is_part or are_dates_or_years(values)


# -- Ids -------------------------------------------------------------------------------------------


def find_ids(table, config):
    """Names of the columns that make a Table the long format of several series."""
    frame = table.frame
    if config.id_columns == ["none"]:
        return []
    if config.id_columns != ["auto"]:
        refuse_absent(frame, config.id_columns)
        return config.id_columns
    found = []
    for name in frame.columns:
        if name.lower() in ID_NAMES and frame[name].nunique() <= len(frame) / FEWEST_ROWS:
            found.append(name)
    # A column called `series` may hold the values themselves.
    others = [
        name for name in frame.columns if name not in found and str(name).lower() not in INDEX_NAMES
    ]
    others = [name for name in others if name.lower() not in TIME_NAMES]
    if any(values_of_column(frame[name], table.layout) for name in others):
        return found
    return [name for name in found if values_of_column(frame[name], table.layout) is None]


def codes_of(frame, ids):
    """((rows,) which series a row belongs to, the texts of the ids of each), in order of the ids.

    Whole numbers are in order of their size. Raises Unusable where nearly each row has its own.
    """
    if not ids:
        return np.zeros(len(frame), np.int64), [()]
    texts = frame[ids].astype(str).fillna("nan")  # pandas 3 leaves missing ones as they are
    codes, unique = pd.MultiIndex.from_frame(texts).factorize()
    keys = [*unique]
    if len(keys) > max(1, len(frame) / FEWEST_ROWS):
        raise Unusable(
            "--id_columns {}: {:,} different ids in {:,} rows, too few of each for a series",
            *(" ".join(ids), len(keys), len(frame)),
        )

    order = sorted(range(len(keys)), key=lambda code: sort_key_of_ids(keys[code]))
    rank = np.empty(len(order), np.int64)  # code -> its place in that order
    rank[order] = np.arange(len(order))
    return rank[codes], [keys[code] for code in order]


def sort_key_of_ids(texts):
    """Key by which ids are sorted: whole numbers by their size, before all other texts."""
    key = []
    for text in texts:
        is_integer = text.isdecimal() and str(int(text)) == text
        key.append((0, int(text), "") if is_integer else (1, 0, text))
    return key


# -- Numbers ---------------------------------------------------------------------------------------


def values_of_column(column, layout):
    """ColumnValues of a column; None where hardly any cell is a number."""
    if pd.api.types.is_bool_dtype(column):
        return None
    unit = ""
    if holds_texts(column):
        sample = cells_of(column)
        unit = unit_of(sample.astype("string").str.strip())
        if floats_of_texts(sample, unit, layout).notna().mean() < 0.3:  # a text: look no further
            return None
        values = floats_of_texts(column, unit, layout).to_numpy(dtype=np.float64, na_value=np.nan)
        is_unread = np.isnan(values) & column.notna().to_numpy()
    else:
        values = column.to_numpy(dtype=np.float64, na_value=np.nan)
        is_unread = np.zeros(len(values), bool)
    is_finite = np.isfinite(values)
    if not is_finite.any():
        return None
    known = np.count_nonzero(~np.isnan(values))
    share = known / (known + np.count_nonzero(is_unread))
    example = str(column.iloc[is_unread.argmax()]) if is_unread.any() else ""
    return ColumnValues(np.where(is_finite, values, np.nan), is_unread, example, share, unit)


def floats_of_texts(column, unit, layout):
    """float64 (rows,) of texts with a unit and the marks of a layout, NaN where there is none."""
    text = column.astype("string").str.strip()
    if unit:
        text = without_unit(text, unit)
    decimal = re.escape(layout.decimal)
    if layout.thousands:
        mark = mark_form(layout.thousands)
        groups = rf"[+-]?\d{{1,3}}(?:{mark}\d{{3}})+(?:{decimal}\d*)?"
        is_grouped = text.str.fullmatch(groups).fillna(False)
        text = text.mask(is_grouped, text.str.replace(mark, "", regex=True))
    if layout.decimal == ",":
        has_point = text.str.contains(".", regex=False).fillna(False)
        text = text.mask(has_point).str.replace(",", ".", regex=False)
    return pd.to_numeric(text, errors="coerce")


# -- Columns that are no values --------------------------------------------------------------------


def pass_over_text(name, column, numbers, roles):
    """Note in Roles that a column is not numeric; loudly where much of it is, or nearly."""
    if numbers is not None and numbers.share >= 0.5:
        example = numbers.example
        why = Message(
            "is only {:.0f} % numbers, the rest such as {!r}", (100 * numbers.share, example)
        )
    elif example := number_with_signs(column):
        why = Message("holds no plain numbers, but cells such as {!r}", (example,))
    else:
        roles.passed_over[name] = NO_NUMBER
        return
    if mark := re.search(rf"\d([{BLANKS}'’])\d{{3}}(?!\d)", example):
        shown = " " if mark[1] in BLANKS else mark[1]
        why = Message("{} (--thousands {!r} if that mark is of thousands)", (why, shown))
    roles.passed_over[name] = why
    roles.warnings.append(Message("{} is passed over: it {}", (name, why)))


NUMBER_WITH_SIGNS = re.compile(
    r"-?(?:[A-Z]{0,3}[$€£¥₹]|[A-Z]{3} |[<>~(])\s?[+-]?\d[\d.,]*\s?[^\d\s]{0,3}"  # $12.50
    r"|[+-]?\d[\d.,]*\s?[^\d\s.,:]{1,4}"  # 3.2M, 12 %
    rf"|(?:{MONEY}\s?)?[+-]?\d{{1,3}}(?:[{BLANKS}'’]\d{{3}})+"  # 1 049
    r"(?:[.,]\d+)?(?:\s?[^\d\s]{1,4})?"  # ... and 1 049,50 €
)


def number_with_signs(column):
    """A cell of a column most of whose cells are as $12.50, 3.2M, 12 % or 1 049 is; else ""."""
    sample = cells_of(column).astype(str).str.strip()
    is_so = sample.str.fullmatch(NUMBER_WITH_SIGNS)
    if sample.nunique() < 2 or is_so.mean() <= 0.5:
        return ""
    return sample[is_so].iloc[0]


def why_no_value(name, values, roles):
    """Message: why a numeric column is not what is forecast, unless it is named; None if it is."""
    called = name.lower()
    if called in TIME_NAMES + INDEX_NAMES or called.startswith("unnamed:"):
        return INDEX
    if is_named_as_part(name):
        return Message("is a part of a date by its name")
    known = values[~np.isnan(values)]
    if len(known) < FEWEST_KNOWN * len(values):
        return Message("is nearly empty: {} of {:,} cells hold a number", (len(known), len(values)))
    if (known == known[0]).all():
        return Message("is constant")
    if is_part_of_date(values, roles.times) or are_dates_or_years(known):
        return Message("is a part of the date")
    steps = steps_within(values, roles.codes)
    if is_counter(values, steps):
        return COUNTER
    if starts_anew(values, steps):
        return SAWTOOTH
    return None


def is_named_as_part(name):
    """Whether a column is a part of a date by its name."""
    return any(name.lower() in names for names in (*PARTS_OF_DATE.values(), OTHER_PARTS_OF_TIME))


def steps_within(numbers, codes):
    """How far each of some numbers (rows,) is from the one before in its series, where both are."""
    if codes.any():
        order = np.argsort(codes, kind="stable")
        steps = np.diff(numbers[order])[np.diff(codes[order]) == 0]
    else:  # one series, the usual case
        steps = np.diff(numbers)
    return steps[~np.isnan(steps)]


def is_counter(values, steps):
    """Whether values always rise, or always fall, by `steps`; or run as a clock does."""
    if len(steps) < 2:
        return False
    one_way = max((steps > 0).mean(), (steps < 0).mean())  # share of the steps
    if one_way <= 0.9:
        return False
    usual = np.nanmedian(values)
    return bool(one_way == 1 or epoch_unit(usual, usual) != "")


def starts_anew(values, steps):
    """Whether numbers go on by one and the same step, and else fall back to where they began.

    A day of the month goes on by 1 after many steps of 0.
    """
    known = values[~np.isnan(values)]
    if (known % 1 == 0).all() and known.max() - known.min() >= FEW_VALUES:
        steps = steps[steps != 0]
    if len(steps) < 5 or max((steps > 0).mean(), (steps < 0).mean()) < MOST_IN_STEP:
        return False
    usual = np.median(steps)
    is_usual = np.abs(steps - usual) <= 1e-6 * abs(usual)
    span = known.max() - known.min()
    falls_back = steps * np.sign(usual) <= -0.5 * span
    return bool(usual != 0 and is_usual.mean() >= MOST_IN_STEP and (is_usual | falls_back).all())


def is_part_of_date(values, times):
    """Whether whole numbers are the year, month, day, weekday, hour, ... of the stamps."""
    known = values[~np.isnan(values)]
    if times is None or (known % 1 != 0).any() or known.min() < 0 or known.max() > 2200:
        return False
    for part in times.parts:
        if any((values == part + shift).mean() > 0.99 for shift in (0, 1)):
            return True
    # By other numbers: 1 to 48 half hours of a day, a week that begins on Sunday.
    minutes = 60 * times.stamps.hour + times.stamps.minute
    for cycle in (minutes, times.stamps.day_of_week):
        groups = pd.Series(values).groupby(cycle)
        is_numbered = (groups.nunique() == 1).all() and groups.ngroups == len(np.unique(known))
        if is_numbered and 1 < groups.ngroups <= len(values) / 3:
            return True
    return False


def goes_one_way(numbers):
    """Whether numbers never fall, or never rise."""
    steps = np.diff(numbers)
    return bool((steps >= 0).all() or (steps <= 0).all())


def are_dates_or_years(known):
    """Whether numbers are dates such as 20240131, or years that never go back (or never on).

    The years may have decimals, as 2024.11 has the month.
    """
    if known.min() >= OLDEST_YEAR and known.max() <= 2200:
        return goes_one_way(np.floor(known))
    if (known % 1 != 0).any() or known.min() < 1e7:
        return False
    parsed = parse_numbers(pd.Series(known))
    return parsed is not None and parsed[1].pattern.startswith("%Y%m%d")


# -- Series in rows --------------------------------------------------------------------------------


def refuse_series_in_rows(frame):
    """Raise Unusable where each series is a row: columns are dates, months, d_1, d_2, d_3, ..."""
    names = [str(name) for name in frame.columns]
    if names[-1].startswith("Unnamed:"):  # each line ends with a separator
        names.pop()
    if fill_a_calendar(names) or are_steps(names, frame):
        raise Unusable(
            "its series lie in rows ({}, ..., {}): reshape it to long format, a row for each time"
            " (pandas.melt)",
            *(", ".join(names[:4]), names[-1]),
        )


# How many days may lie between two rows -> how many columns may be the steps between them.
STEPS_IN_ROW = {
    (1, 1): (24, 25, 48, 50, 96, 100, 144, 288),  # the hours of a day, its quarters of an hour, ...
    (28, 31): (28, 29, 30, 31),
    (365, 366): (12, 52, 53),
}


def refuse_steps_in_columns(frame, stamps):
    """Raise Unusable where a row is a day, and columns 1 to 24 its hours; or a month and its days.

    `stamps` (rows,) are those of the rows.
    """
    gaps = np.diff(np.unique(stamps.dropna().asi8))
    days = np.median(gaps) / DAY if len(gaps) else 0
    counts = [count for (low, high), count in STEPS_IN_ROW.items() if low <= days <= high]
    numbered = {}  # what stands around the number -> number -> name of the column
    for name in frame.columns:
        found = re.fullmatch(r"(\D{0,6})(\d{1,3})(\D{0,3})", name)
        if found and counts:
            numbered.setdefault((found[1], found[3]), {})[int(found[2])] = name
    for name_of in numbered.values():
        count = len(name_of)
        are_in_turn = name_of.keys() in ({*range(count)}, {*range(1, count + 1)})
        if are_in_turn and count in counts[0]:
            names = [*name_of.values()]
            raise Unusable(
                "columns {}, {}, ..., {} seem to be the steps between two rows, which lie {:g} days"
                " apart: reshape it to long format, a row for each time (pandas.melt); --columns"
                " names those that are series of their own",
                *(names[0], names[1], names[-1], days),
            )


def are_steps(names, frame):
    """Whether the last names of a frame's columns are dates, or go on as steps of time do."""
    if len(names) < 6:
        return False
    tail = [name.removesuffix("年") for name in names[-max(5, len(names) // 2) :]]
    if are_dates(tail):
        return True
    if not count_on(tail):
        return False
    first = frame.iloc[:, 0]
    has_stamps = parse_numbers(first) if is_number(first) else parse_text(first)
    return not has_stamps and (are_years(tail) or holds_keys(first))


def fill_a_calendar(names):
    """Whether some names of columns are all quarters or months of a year, or hours of a day."""
    texts = {name.upper() for name in names}
    quarters = {f"Q{number}" for number in range(1, 5)}
    chinese = {f"{number}月" for number in range(1, 13)}
    seasons = {"DJFMAMJJASONDJ"[first : first + 3] for first in range(12)}  # DJF, JFM, ..., NDJ
    if are_months(names) or any(texts >= names for names in (quarters, chinese, seasons)):
        return True
    found = [re.fullmatch(r"(?:H|HE|HR|HOUR)[ _]?(\d{1,2})", text) for text in texts]
    hours = {int(hour[1]) for hour in found if hour}
    return hours in ({*range(24)}, {*range(1, 25)})


def are_months(names):
    """Whether 12 names in a row are the months of a year, in short or in full.

    It takes those that English shares with most languages of Europe: March, November, ...
    """
    starts = [name[:3].upper() for name in names]
    for first in range(len(names) - 11):
        pairs = zip(starts[first : first + 12], MONTHS, strict=True)
        if sum(start == month for start, month in pairs) >= 4:
            return True
    return False


def count_on(names):
    """Whether the names of columns are words with numbers of one step; or years, or parts of it."""
    numbers = [re.fullmatch(r"(?P<word>[A-Za-z_]*)(?P<number>\d+)", name) for name in names]
    if not all(numbers) or len({found["word"] for found in numbers}) > 1:
        return False
    steps = np.diff([int(found["number"]) for found in numbers])
    if steps.min() <= 0 <= steps.max():
        return False
    if are_years(names) and len(names[0]) > 4:  # 202012 is followed by 202101
        return True
    return (steps == steps[0]).all() and (are_years(names) or len(names) >= 10)


def are_years(names):
    """Whether the names of columns are years, or months and days such as 202001 and 20200131."""
    form = r"(?:1[789]|20)\d\d(?:(?:0[1-9]|1[0-2])(?:[0-3]\d)?)?"
    return all(re.fullmatch(form, name) for name in names)


def holds_keys(column):
    """Whether a column holds texts, or whole numbers in no order, without repetition."""
    if not is_number(column):
        return True
    is_whole = (column % 1 == 0).all()
    is_in_order = column.is_monotonic_increasing or column.is_monotonic_decreasing
    return is_whole and column.is_unique and not is_in_order


def are_dates(names):
    """Whether the names of columns are dates, such as 1/22/20, Jan-20, 2020M01, 1990 [YR1990].

    So are clocks, of which a row is a day.
    """
    if all(re.fullmatch(r"\d{1,2}:\d\d(?::\d\d)?|[1-4]Q\d\d(?:\d\d)?", name) for name in names):
        return True
    if not all(re.search(r"\d\D+\d|[A-Za-z]{3}\D*\d", name) for name in names):
        return False
    texts = pd.Series(names, dtype="string")
    texts = texts.str.replace(r"^(\d{4}) \[YR\d{4}\]$", r"\1-01", regex=True)
    texts = texts.str.replace(r"^(\d{4})M(\d\d)$", r"\1-\2", regex=True)
    patterns = best_patterns(texts)
    return bool(patterns) and read_stamps(texts, *patterns[0]).notna().mean() > 0.9


# -- One file --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Report:
    """What was understood of a file."""

    facts: list  # of Message: time, rows, columns, and what was passed over
    warnings: list  # of Message: what may make the numbers wrong
    skipped: list  # of Message: why a series, or all of the file, cannot be used


@dataclasses.dataclass
class FileRead:
    """A CSV, read."""

    series: list  # of RawSeries; none where it cannot be used
    report: Report
    layout: Layout | None = None
    times: Times | None = None


def read_series(path, name, config):
    """FileRead of one file. Raises Unusable with the reason where there is no series."""
    if is_parquet(path):
        return read_parquet(path, name, config)
    table = read_table(path, config)
    roles = find_roles(table, config)
    times = roles.times
    if times and config.skip_rows == "auto":
        refuse_start(times, table.layout.skip)
    refuse_second_table(table.frame)
    if times:
        refuse_unread(times, roles.codes)
        refuse_end_of_day(times, roles.codes)
    is_repeat = repeated_rows(table.frame, roles)
    series, places, skipped = place_all(name, table.frame, roles, is_repeat)

    facts = facts_of(table, roles, places)
    warnings = warnings_of_file(table, roles, places, is_repeat, config)
    return FileRead(series, Report(facts, warnings, skipped), table.layout, times)


def refuse_second_table(frame):
    """Raise Unusable where a row has words in all columns of values, as a header has."""
    if any(is_number(kind) for kind in frame.dtypes):
        return
    holds_words = []  # (rows,) bool each
    for name in frame.columns:
        has_number = frame[name].astype("string").str.contains(r"(?<![\w.])\d").fillna(True)
        if has_number.mean() >= 1 - FEW_UNREAD:
            holds_words.append(~has_number)
    if len(holds_words) < 2:
        return
    is_header = np.logical_and.reduce(holds_words)
    is_header[0] = False  # units; `warnings_of_column` tells of them
    if is_header.any():
        row = int(is_header.argmax())
        raise Unusable(
            "row {} holds no values, but {}: if it is the header of a second table, delete it;"
            " what is below it may be of a file of its own",
            *(row + 1, ", ".join(frame.iloc[row].astype(str))[:60]),
        )


def refuse_start(times, skip):
    """Raise Unusable where several rows above the first stamp have none: a preface, or units.

    `skip` lines were left out above the header.
    """
    is_unread = times.stamps.isna()
    at_start = int((~is_unread).argmax())
    if at_start > 1 and at_start == is_unread.sum():
        cells = times.text.iloc[:at_start].dropna()
        raise Unusable(
            "its first {} rows hold no stamps, such as {}: if the names of the columns stand there,"
            " --skip_rows (up to {}) leaves out the lines above them; if not, delete these rows",
            *(at_start, quoted(cells.iloc[0] if len(cells) else ""), skip + at_start),
        )


def refuse_unread(times, codes):
    """Raise Unusable where more than a few stamps are unread, or any at the end of a series.

    `codes` (rows,) tell the series of a table apart.
    """
    is_unread = times.stamps.isna()
    if not is_unread.any():
        return
    from_end = pd.Series(codes).groupby(codes).cumcount(ascending=False).to_numpy()
    at_end = is_unread & (from_end < LAST_ROWS)
    if is_unread.sum() <= FEW_UNREAD * len(is_unread) and not at_end.any():
        return
    raise why_unread(times, np.flatnonzero(at_end if at_end.any() else is_unread)[0])


def rows_in_time(times, codes):
    """((n,) rows with a stamp, as the file has them in each series; (m,) places in it).

    From the row at such a place to the one behind it the stamps fall. A file whose newest rows come
    first is turned round.
    """
    order = np.argsort(codes, kind="stable")
    order = order[times.stamps[order].notna()]
    if runs_backwards(times.stamps, codes):
        order = order[::-1]
    falls = (np.diff(times.stamps.asi8[order]) < 0) & (np.diff(codes[order]) == 0)
    return order, np.flatnonzero(falls)


def refuse_end_of_day(times, codes):
    """Raise Unusable where 0:00 stands behind the clocks of its own date, as 24:00 would."""
    order, falls = rows_in_time(times, codes)
    if not len(falls):
        return
    before, midnight = order[falls], order[falls + 1]
    behind = order[np.minimum(falls + 2, len(order) - 1)]
    stamps = times.stamps.tz_localize(None)
    is_of_same_date = stamps[midnight] == stamps[before].normalize()
    goes_on = (stamps[behind] > stamps[before]) | (behind == midnight)
    is_at_end = is_of_same_date & goes_on
    if is_at_end.mean() > 0.5:
        first = is_at_end.argmax()
        raise Unusable(
            "{} stands in row {}, beside {}: if it means the end of that day, write 24:00 for it;"
            " --time_column none takes the rows as they stand",
            *(quoted(times.text.iloc[midnight[first]]), midnight[first] + 1),
            quoted(times.text.iloc[before[first]]),
        )


def why_unread(times, row):
    """Unusable: how many stamps are unread, with the one in a row (from 0 on) as the example."""
    is_unread = times.stamps.isna()
    cell = times.text.iloc[row]
    count = int(is_unread.sum())
    values = (count, len(is_unread), " ".join(times.names), quoted(cell), row + 1)
    if pd.isna(cell) or not re.match(rf"\d|{LIKE_A_STAMP}", str(cell)):
        return Unusable(
            "{} of {} stamps of {} cannot be read, such as {} in row {}: if that is a total, a note"
            " or the header of another table, delete that row",
            *values,
        )
    return Unusable(
        "{} of {} stamps of {} cannot be read, such as {} in row {}; --time_format says how"
        " they are written",
        *values,
    )


def quoted(cell):
    """A cell as it is shown."""
    return "(blank)" if pd.isna(cell) or cell == "" else repr(str(cell))


def repeated_rows(frame, roles):
    """(rows,) bool: those that are the same as a later row, with their stamps.

    Columns that only number the rows do not count.
    """
    none = np.zeros(len(frame), bool)
    if roles.times is None:
        return none
    key = pd.DataFrame({"code": roles.codes, "stamp": roles.times.stamps})
    if not key.duplicated().any():
        return none
    numbering = [name for name, why in roles.passed_over.items() if why in NUMBERING]
    return frame.drop(columns=numbering).duplicated(keep="last").to_numpy()


def place_all(name, frame, roles, is_repeat):
    """Place all series of the file `name`.

    Returns a list of RawSeries, a list of Places, for each key of the Roles, and a list of Message,
    why others are left out. Raises Unusable where no series is left.
    """
    order = np.argsort(roles.codes, kind="stable")
    ends = np.cumsum(np.bincount(roles.codes, minlength=len(roles.keys)))[:-1]
    find_places = PlacesFinder(frame, roles)
    series = []
    places = []
    skipped = []
    for key, rows in zip(roles.keys, np.split(order, ends), strict=True):
        rows = rows[~is_repeat[rows]]
        ids = [text or "(blank)" for text in key]
        try:
            place = find_places(rows)
        except Unusable as problem:
            skipped.append(about(problem, name, ids))
            continue
        places.append(place)
        for column, numbers in roles.values.items():
            within = [*ids, column] if len(roles.values) > 1 else ids
            try:
                refuse_unread_end(frame[column], numbers, rows[place.rows])
            except Unusable as problem:
                skipped.append(about(problem, name, within))
                continue
            full_name = " / ".join([name, *within])
            heading = " / ".join(within) or column
            values = place.lay(numbers.values[rows])
            series.append(RawSeries(full_name, values, place.freq, place.stamps, heading))
    if not series:
        raise Unusable("{}", skipped[0])
    return series, places, skipped


class PlacesFinder:
    """Finds the Places of each series of a file, once for all series of the same stamps."""

    def __init__(self, frame, roles):
        self.frame = frame
        self.roles = roles
        self.known = {}  # stamps, as bytes -> Places

    def __call__(self, rows):
        """Places of the series that some rows hold; in their order, without timestamps.

        Raises Unusable.
        """
        if self.roles.times is None:
            own = np.arange(len(rows))
            return Places(own, own, freq="", stamps=None, filled=len(own), conflicting=0, crowded=0)
        stamps = self.roles.times.stamps[rows]
        key = stamps.asi8.tobytes()
        if key not in self.known:
            try:
                self.known[key] = on_grid(stamps)
            except Duplicated as problem:
                raise Unusable("{}; {}", problem, self.hint_of_duplicates) from None
        return self.known[key]

    @functools.cached_property
    def hint_of_duplicates(self):
        """Message: which flag may tell apart rows of the same stamp."""
        return hint_of_duplicates(self.frame, self.roles)


def about(problem, name, within):
    """Message: why a series of the file `name` is left out; `within` tells which one, if any."""
    if not within:
        return Message("{}", (problem,))
    return Message("{}: {}", (" / ".join([name, *within]), problem))


def refuse_unread_end(column, numbers, rows):
    """Raise Unusable where a cell at the end of a series holds a number that is not read.

    `rows` are those of the series, in the order of time. A cell without a digit means missing.
    """
    last = rows[-LAST_ROWS:]
    for row in last[numbers.is_unread[last]]:
        cell = str(column.iloc[row])
        if re.search(r"\d", cell):
            raise Unusable(
                "{} holds {!r} among its last rows, which is no number: --decimal and --thousands"
                " say how numbers are written, --na_values that it counts as missing",
                *(column.name, cell),
            )


def hint_of_duplicates(frame, roles):
    """Message: which flag may tell apart rows of the same stamp."""
    times = roles.times
    taken = [*roles.ids, *times.names]
    rest = [name for name in frame.columns if name not in taken]
    for name in rest:
        if holds_other_stamps(frame, name, roles):
            return Message(
                "{} holds stamps, too, each of them once: --time_column {}", (name, name)
            )
    for name in rest:
        if name.lower() in PARTS_OF_DATE["hour"] or is_time_of_day(frame[name]):
            return Message(
                "if {} is the time of the day: --time_column {} {}", (name, times.names[0], name)
            )
    names = ids_among(frame, rest, roles)
    if not names:
        return Message("is an id column missing (--id_columns)?")
    shown = " ".join(names)
    flag = " ".join([*roles.ids, *names])
    if len(names) == 1 and counts_within_days(frame[shown]):
        return Message(
            "if {} tells the series apart: --id_columns {}; if it counts minutes or periods"
            " of the day, write it as a clock such as 13:30: --time_column {} {}",
            (shown, flag, times.names[0], shown),
        )
    return Message("if {} tells the series apart: --id_columns {}", (shown, flag))


def holds_other_stamps(frame, name, roles):
    """Whether a column holds stamps, none of them twice in a series."""
    try:
        parsed = parse_column(frame, name, roles.ids, "auto")
    except Unusable:  # which is no reason to name it
        return False
    if not parsed:
        return False
    return not pd.DataFrame({"code": roles.codes, "stamp": parsed[0]}).duplicated().any()


def ids_among(frame, names, roles):
    """One or two of some columns with which no stamp is there twice in a series; [] if none."""
    key = pd.DataFrame({"code": roles.codes, "stamp": roles.times.stamps})
    possible = []
    for name in names:
        if not pd.api.types.is_float_dtype(frame[name]) and frame[name].duplicated().any():
            possible.append(name)
    pairs = itertools.combinations(possible[:MOST_NAMES], 2)
    for ids in [*([name] for name in possible), *map(list, pairs)]:
        if not pd.concat([key, frame[ids]], axis=1).duplicated().any():
            return ids
    return []


def counts_within_days(column):
    """Whether a column may count the minutes or the periods of a day, such as 1 to 48."""
    return is_number(column) and column.nunique() >= 24 and not comes_in_blocks(column)


def comes_in_blocks(column):
    """Whether most cells of a column are as the one above, as ids in blocks are and clocks not."""
    return bool((column.iloc[1:].to_numpy() == column.iloc[:-1].to_numpy()).mean() > 0.5)


def is_time_of_day(column):
    """Whether a column holds clocks, or all hours of the day as numbers (0 to 23, or 0 to 2300)."""
    if not is_number(column):
        return is_clock(column)
    if comes_in_blocks(column):
        return False
    hours = column.dropna().unique()
    if are_clock_numbers(pd.Series(hours).astype("string")):
        return 0 in hours or 2400 in hours
    return {*hours} in ({*range(24)}, {*range(1, 25)})


# -- What is told of it ----------------------------------------------------------------------------


def facts_of(table, roles, places):
    """List of Message: what was understood of a file."""
    if roles.times:
        facts = facts_of_times(roles, places)
        rows = sum(place.filled for place in places)
    else:
        facts = [Message("no timestamps: the rows in their order")]
        rows = len(table.frame)
    facts.append(Message("{:,} of {:,} rows", (rows, len(table.frame))))
    facts += facts_of_values(roles)
    facts += facts_of_layout(table.layout)
    if roles.passed_over:
        reasons = [
            Message("{} {}", (name, why)) for name, why in [*roles.passed_over.items()][:MOST_NAMES]
        ]
        if len(roles.passed_over) > MOST_NAMES:
            reasons.append(Message("{} more", (len(roles.passed_over) - MOST_NAMES,)))
        facts.append(Message("passed over: {}", (reasons,)))
    return facts


def facts_of_times(roles, places):
    """List of Message: the span and the steps of a file's stamps."""
    times = roles.times
    stamps = times.stamps
    freqs = ", ".join(dict.fromkeys(place.freq for place in places))
    facts = [
        Message(
            "time {} by step {}, {} to {}",
            (" ".join(times.names), freqs, stamps.min(), stamps.max()),
        )
    ]
    facts += times.form.notes
    if runs_backwards(stamps, roles.codes):
        facts.append(Message("newest rows first: turned round"))
    steps = sum(place.steps for place in places)
    missing = steps - sum(place.filled for place in places)
    if missing:
        facts.append(Message("{:,} of {:,} steps have no row", (missing, steps)))
    return facts


def facts_of_values(roles):
    """List of Message: which columns are the values, and what tells the series apart."""
    shown = ", ".join([*roles.values][:MOST_NAMES])
    if len(roles.values) > MOST_NAMES:
        shown += ", …"
    facts = [Message("forecast: {}", (shown,))]
    for name, numbers in [*roles.values.items()][:MOST_NAMES]:
        if numbers.unit:
            facts.append(Message("of {} the unit {!r} is left out", (name, numbers.unit)))
    if roles.behind:
        facts.append(Message("{} columns behind it (--columns)", (roles.behind,)))
    if roles.ids:
        ids = ", ".join(roles.ids)
        facts.append(Message("{:,} series by {}", (len(roles.keys), ids)))
    return facts


def facts_of_layout(layout):
    """List of Message: how the file is written, where that is not the usual way."""
    facts = []
    if layout.skip:
        facts.append(Message("{} lines above the header left out", (layout.skip,)))
    if layout.decimal != ".":
        facts.append(Message("decimal mark {!r}", (layout.decimal,)))
    if layout.thousands:
        facts.append(Message("mark of thousands {!r}", (layout.thousands,)))
    return facts


def runs_backwards(stamps, codes):
    """Whether most timestamps (rows,) are older than the one above, in the same series."""
    ticks = pd.Series(stamps.asi8).where(stamps.notna()).to_numpy(dtype=np.float64)
    steps = steps_within(ticks, codes)
    return bool(len(steps) and (steps < 0).mean() > 0.5)


def warnings_of_file(table, roles, places, is_repeat, config):
    """List of Message: what may make the numbers of a file wrong."""
    times = roles.times
    warnings = [*table.warnings]
    if times:
        warnings += warnings_of_unread(times)
        warnings += warnings_of_order(times, roles.codes)
    for column, numbers in roles.values.items():
        warnings += warnings_of_column(column, numbers)
    warnings += roles.warnings
    if times is None and roles.passed_over and config.time_column == ["auto"]:
        warnings.append(
            Message(
                "no timestamps were found (--time_column, --time_format): the rows are taken as"
                " they stand, as if the oldest came first"
            )
        )
    if is_repeat.any():
        count = int(is_repeat.sum())
        warnings.append(Message("{:,} rows are there twice: used once", (count,)))
    if times:
        warnings += warnings_of_places(places)
    return warnings


def warnings_of_unread(times):
    """List of Message: the few stamps that are unread."""
    is_unread = times.stamps.isna()
    if not is_unread.any():
        return []
    example = quoted(times.text.iloc[np.flatnonzero(is_unread)[0]])
    values = (int(is_unread.sum()), len(is_unread), " ".join(times.names), example)
    return [
        Message("{} of {} stamps of {} cannot be read, such as {}: these rows are left out", values)
    ]


def warnings_of_order(times, codes):
    """List of Message: stamps that are earlier than the one above."""
    order, falls = rows_in_time(times, codes)
    if not len(falls):
        return []
    before, behind = times.text.iloc[order[falls[0] : falls[0] + 2]]
    return [
        Message(
            "{:,} rows are out of order, such as {} behind {}: all are sorted by their stamps",
            (len(falls), quoted(behind), quoted(before)),
        )
    ]


def warnings_of_column(name, numbers):
    """List of Message: what of a column may be wrong."""
    warnings = []
    if unread := np.count_nonzero(numbers.is_unread):
        warnings.append(
            Message(
                "{:,} cells of {} are no numbers, such as {!r}: they count as missing"
                " (--na_values says that they are, --thousands and --decimal how numbers are"
                " written)",
                (unread, name, numbers.example),
            )
        )
    for sentinel in find_sentinels(numbers.values):
        count = np.count_nonzero(numbers.values == sentinel)
        warnings.append(
            Message(
                "{} is {:g} in {:,} rows, far from the rest: if that means missing,"
                " --na_values {:g}",
                (name, sentinel, count, sentinel),
            )
        )
    return warnings


def find_sentinels(values):
    """The values that seem to stand for missing ones: repeated, and far from the rest.

    They are among the two smallest and the two largest; 0 is never one.
    """
    known = values[~np.isnan(values)]
    if len(known) < 20 or len(np.unique(known[:1000])) < 10:
        return []
    edges = {known.min(), known.max()}
    inner = known[(known > min(edges)) & (known < max(edges))]
    if len(inner):
        edges |= {inner.min(), inner.max()}
    rest = known[~np.isin(known, [*edges])]
    if not len(rest):
        return []
    sentinels = []
    for value in sorted(edges - {0.0}):
        count = np.count_nonzero(known == value)
        distance = max(rest.min() - value, value - rest.max())
        if count < FEWEST_SENTINELS or distance <= abs(value) / 2:
            continue
        low, high = np.quantile(rest, [0.01, 0.99])
        if distance > (high - low) / 2:
            sentinels.append(float(value))
    return sentinels


def warnings_of_places(places):
    """List of Message: rows that were left out, and steps that have none."""
    warnings = []
    conflicting = sum(place.conflicting for place in places)
    if conflicting:
        warnings.append(
            Message(
                "{:,} rows have the stamp of another one and other values: the last one is used",
                (conflicting,),
            )
        )
    crowded = sum(place.crowded for place in places)
    if crowded:
        warnings.append(
            Message(
                "{:,} rows lie at the same step ({}) as another one: the last one is used",
                (crowded, ", ".join(sorted({place.freq for place in places if place.crowded}))),
            )
        )
    steps = sum(place.steps for place in places)
    missing = steps - sum(place.filled for place in places)
    if missing > MUCH_MISSING * steps:
        warnings.append(
            Message("{:.0f} % of the steps have no row: they are missing", (100 * missing / steps,))
        )
    return warnings


# -- Parquet ---------------------------------------------------------------------------------------


def is_parquet(path):
    """Whether a file is one of Parquet, by its name."""
    return Path(path).name.lower().endswith(PARQUET)


def read_parquet(path, name, config):
    """FileRead of a Parquet file, which is read as the CSV that it would be. Raises Unusable.

    So all that is looked at in a CSV is looked at here, too. What a Parquet file knows itself is
    not guessed: the marks in its numbers, and the form of stamps that are no texts.
    """
    frame = frame_of_parquet(path, config.max_file_mb)
    config = dataclasses.replace(
        config, encoding="utf-8", skip_rows=0, decimal=".", thousands="none"
    )
    if any(pd.api.types.is_datetime64_any_dtype(frame[column]) for column in frame.columns):
        config.time_format = "auto"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "table.csv")
        frame.to_csv(copy, index=False)
        return read_series(copy, name, config)


def frame_of_parquet(path, max_mb):
    """DataFrame of a Parquet file; an index with a meaning is a column of it. Raises Unusable."""
    try:
        from pyarrow import parquet  # few users need it
    except ModuleNotFoundError as error:
        raise Unusable("a Parquet file is read with pyarrow: pip install pyarrow") from error
    try:
        with open(path, "rb") as file:
            facts = parquet.read_metadata(file)
            cells = facts.num_rows * facts.num_columns  # each of 8 bytes, or of a text
            if max_mb and 8 * cells > max_mb * 10**6:
                raise Unusable(
                    "larger than {:,} MB when it is unpacked; --max_file_mb raises the limit",
                    max_mb,
                )
            frame = pd.read_parquet(file, engine="pyarrow")
        return as_plain_columns(frame)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise Unusable("unreadable: {}", " ".join(str(error).split())[:200]) from error


def as_plain_columns(frame):
    """A frame whose index, where it has a meaning, is a column, and whose days are timestamps."""
    if isinstance(frame.index, pd.DatetimeIndex):
        frame = frame.rename_axis(frame.index.name or "date")
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index()
    for column in frame.columns:
        if pd.api.types.infer_dtype(frame[column]) == "date":  # days, which pandas keeps apart
            frame[column] = pd.to_datetime(frame[column])
    return frame


# -- A folder --------------------------------------------------------------------------------------


def find_files(data_dir, max_files):
    """(names of all files found, name below `data_dir` -> Path of the first ones by name).

    Raises UserError where there is none.
    """
    root = user_path(data_dir)
    if root.is_dir():
        ends = (".csv", ".csv.gz", *PARQUET)
        found = [path for path in root.rglob("*") if path.name.lower().endswith(ends)]
        paths = {path.relative_to(root).as_posix(): path for path in found}
    else:
        paths = {root.name: root}
    if not paths:
        raise UserError("--data_dir {}: no .csv or .parquet file in this folder or below", data_dir)
    names = sorted(paths)
    first = names[:max_files] if max_files else names
    return names, {name: paths[name] for name in first}


def read_or_reason(config, item):
    """As `read_series` of one (name, path); without series where the file cannot be used.

    The arguments are in the order that `map` over files needs.
    """
    name, path = item
    try:
        return read_series(path, name, config)
    except Unusable as reason:
        return FileRead([], Report(facts=[], warnings=[], skipped=[reason.message]))


@dataclasses.dataclass
class FolderRead:
    """The series of a folder."""

    found: int  # files in the folder, whether read or not
    series: dict  # file -> list of RawSeries, of the files that can be used
    reports: dict  # file -> Report, of all files that were read
    parquet: int = 0  # of those found


def read_files(data_dir, max_files, config, voice):
    """FolderRead of a folder, read by one process per core where there are many files."""
    found, paths = find_files(data_dir, max_files)
    read = functools.partial(read_or_reason, config)
    files = FolderRead(len(found), series={}, reports={}, parquet=sum(map(is_parquet, found)))
    with contextlib.ExitStack() as stack:
        results = map(read, paths.items())
        if len(paths) >= FILES_FOR_PROCESSES and cores() > 1:
            results = stack.enter_context(reading_processes()).map(read, paths.items(), chunksize=8)
        bar = stack.enter_context(voice.bar("reading", total=len(paths), unit="file"))
        for name, file in zip(paths, results, strict=True):
            if file.series:
                files.series[name] = file.series
            files.reports[name] = file.report
            bar.update()
    return files


def cores():
    """Cores that this process may use; 1 where it cannot start others by a quick and sound fork."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


@contextlib.contextmanager
def reading_processes():
    """An executor of one process per core. Raises UserError where one of them is killed."""
    pool = concurrent.futures.ProcessPoolExecutor(
        cores(), multiprocessing.get_context("fork"), initializer=leave_signals_alone
    )
    try:
        yield pool
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            "a process that read the CSVs was killed, perhaps for want of memory;"
            " use fewer files at once (--max_files)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def leave_signals_alone():
    """Ctrl-C and SIGTERM are for the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# == Series and windows ============================================================================


@dataclasses.dataclass
class DataConfig:
    """The flags of the data group, as they were typed."""

    data_dir: str
    max_files: int
    context_length: int
    prediction_length: int
    split_by: str  # "files", "time" or "auto"
    split_ratio: tuple  # train : validation : test
    split_seed: int
    max_gap: int
    season: int | str
    stride: int
    max_windows: int

    @property
    def window_length(self):
        return self.context_length + self.prediction_length

    def new_scaler(self):
        """What standardises a series: scikit-learn's scaler."""
        from sklearn.preprocessing import StandardScaler  # not at the top: it takes a second

        return StandardScaler()


class EvaluationDataConfig(DataConfig):
    """The same where nothing is trained, which need not wait for scikit-learn."""

    def new_scaler(self):
        return PlainScaler()


class PlainScaler:
    """What a StandardScaler finds in the rows (T, 1) of one series, to the bit."""

    @np.errstate(over="ignore", invalid="ignore")  # `fit_scaler` refuses what is too large
    def fit(self, rows):
        count = np.count_nonzero(~np.isnan(rows))
        self.mean_ = np.nansum(rows, axis=0) / count
        from_mean = rows - self.mean_
        rounding = np.nansum(from_mean, axis=0) ** 2 / count
        self.var_ = (np.nansum(from_mean**2, axis=0) - rounding) / count
        epsilon = np.finfo(np.float64).eps
        most_by_rounding = count * epsilon * self.var_ + (count * self.mean_ * epsilon) ** 2
        self.scale_ = np.where(self.var_ <= most_by_rounding, 1.0, np.sqrt(self.var_))
        return self


# -- One series ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Origin:
    """What it takes to show the rows of a prepared series as its file has them."""

    series: RawSeries  # without its values
    rows: int  # T
    mean: float  # of the train rows
    deviation: float  # of the train rows
    offset: int = 0  # of its first row in the values of its Windows

    def index(self, row, count):
        """Index (count,) of the rows from `row` on: timestamps, or numbers of steps."""
        return steps_after(self.series, count, back=self.rows - row)

    def in_units(self, scaled):
        """Standardised values in the file's units."""
        return np.asarray(scaled, np.float64) * self.deviation + self.mean


@dataclasses.dataclass
class PreparedSeries:
    """A series whose gaps are filled, standardised, with the starts of its windows."""

    name: str
    freq: str
    values: np.ndarray  # (T,) float64 in the file's units, NaN in gaps that are too long
    scaled: np.ndarray  # (T,) float32, in deviations of the train rows
    observed: np.ndarray  # (T,) bool, False where missing or filled
    mean: float  # of the train rows
    deviation: float  # of the train rows
    starts: dict  # part -> (w,) int64, starts of the windows whose target lies in the part
    origin: Origin


def prepare_series(series, bounds, config):
    """PreparedSeries of a RawSeries; `bounds` are part -> (first row, row after the last).

    It is standardised by its train rows, or by all where it is one part as a whole. Gaps are
    filled inside each part, so that no part sees another one. Raises Unusable.
    """
    first_part = next(iter(bounds))  # "train", or "whole"
    low, high = bounds[first_part]
    mean, deviation = fit_scaler(config.new_scaler(), series.values[low:high])
    filled = series.values.copy()
    filled[np.abs((filled - mean) / deviation) > ABSURD] = np.nan
    observed = ~np.isnan(filled)
    for begin, end in bounds.values():
        filled[begin:end] = fill_gaps(filled[begin:end], config.max_gap)
    for earlier, later in itertools.pairwise(bounds.values()):
        fill_edge(filled, earlier, later, config.max_gap)

    known = ~np.isnan(filled)
    starts = {part: find_starts(known, observed, rows, config) for part, rows in bounds.items()}
    if not len(starts[first_part]):
        raise why_no_window(len(filled), bounds[first_part], config)
    scaled = ((filled - mean) / deviation).astype(np.float32)
    without_values = dataclasses.replace(series, values=series.values[:0].copy())
    return PreparedSeries(
        name=series.name,
        freq=series.freq,
        values=filled,
        scaled=scaled,
        observed=observed,
        mean=mean,
        deviation=deviation,
        starts=starts,
        origin=Origin(without_values, len(filled), mean, deviation),
    )


def fit_scaler(scaler, rows):
    """(mean, deviation) that a scaler finds in the rows of a series. Raises Unusable."""
    # `not a < b` instead of `a >= b`, here and elsewhere, so that nan is among the bad ones.
    if not pd.Series(rows).min() < pd.Series(rows).max():
        raise Unusable("constant, or nothing but missing values")
    scaler.fit(rows[:, None])
    mean = float(scaler.mean_[0])
    deviation = float(scaler.scale_[0])
    if not math.isfinite(deviation) or not scaler.var_[0] > 0:
        raise Unusable("values too large or too close for float64")
    own_deviation = math.sqrt(scaler.var_[0])
    if deviation != own_deviation:  # scikit-learn takes 1 where all of it may be rounding
        raise Unusable("nearly constant: its values differ from {:g} by rounding errors", mean)
    return mean, deviation


def fill_gaps(values, max_gap):
    """Series of values (T,): gaps of at most `max_gap` between two known ones filled linearly."""
    values = pd.Series(values)
    if not values.hasnans:
        return values
    gap_length = values.isna().groupby(values.notna().cumsum()).transform("sum")
    filled = values.interpolate(limit_area="inside")
    return filled.where(values.notna() | (gap_length <= max_gap))


def fill_edge(values, earlier, later, max_gap):
    """Fill, in place, a gap of at most `max_gap` where two parts (first row, row after) meet.

    The earlier one's last known value and the later one's first known value are carried to the
    edge, each inside its own part. Else one missing value there would be in the context of every
    window of a short part.
    """
    low, edge = earlier
    _, high = later
    known_before = np.flatnonzero(~np.isnan(values[low:edge]))
    known_after = np.flatnonzero(~np.isnan(values[edge:high]))
    if not len(known_before) or not len(known_after):
        return
    last = low + known_before[-1]
    first = edge + known_after[0]
    if first - last - 1 <= max_gap:
        values[last:edge] = values[last]
        values[edge:first] = values[first]


def why_no_window(rows, bounds, config):
    """Unusable that says why the part `bounds` of a series of so many rows has no window."""
    low, high = bounds
    lengths = (config.window_length, config.context_length, config.prediction_length)
    if high < config.window_length:
        if high < rows:
            return Unusable(
                "too short: {} rows, of which the first {} train;"
                " a window takes {} (--context_length {} + --prediction_length {})",
                *(rows, high, *lengths),
            )
        return Unusable(
            "too short: {} rows; a window takes {} (--context_length {} + --prediction_length {})",
            *(rows, *lengths),
        )
    if high - low < config.prediction_length:
        return Unusable(
            "{} of {} rows, fewer than the {} of --prediction_length",
            *(high - low, rows, config.prediction_length),
        )
    return Unusable(
        "no {} rows (--context_length {} + --prediction_length {})"
        " without a gap longer than {} (--max_gap)",
        *(*lengths, config.max_gap),
    )


def propose_lengths(rows, freq, config):
    """(context length, horizon) that give a series of so many rows windows in all parts, or None.

    They suit its step, and are no longer than those of the config.
    """
    season = season_of(freq) if config.season == "auto" else config.season
    context_length, horizon = USUAL_LENGTHS.get(season, (14 * season, season))
    context_length = min(context_length, config.context_length)
    horizon = min(horizon, config.prediction_length)
    if config.split_by == "files":
        for_training = rows
        horizon = min(horizon, rows // 5)
    else:
        shares = dict(zip(PARTS, config.split_ratio, strict=True))
        sizes = [high - low for low, high in part_bounds(rows, shares).values()]
        for_training = sizes[0]
        horizon = min(horizon, *sizes[1:])

    # A horizon is at most a quarter of the training rows, and a third of the rest is left for
    # windows to begin in.
    horizon = min(horizon, for_training // 4)
    context_length = min(context_length, 2 * (for_training - horizon) // 3)
    if context_length >= season:
        context_length -= context_length % season
    if horizon < 1 or context_length < 2:
        return None
    return context_length, horizon


def find_starts(known, observed, bounds, config):
    """Starts (w,) of the windows without a missing value, whose target lies in rows `bounds`.

    Their contexts may begin before these. At least one point of the target was observed.
    """
    low, high = bounds
    length = config.window_length
    horizon = config.prediction_length
    first = max(0, low - config.context_length)
    begin = np.arange(first, high - length + 1)
    missing_before = np.append(0, np.cumsum(~known))
    observed_before = np.append(0, np.cumsum(observed))
    end = begin + length
    is_whole = missing_before[end] == missing_before[begin]
    has_truth = observed_before[end] > observed_before[end - horizon]
    return begin[is_whole & has_truth]


# -- Windows ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Windows:
    """The windows of one part: one array of all series, and the starts in it.

    Nothing is materialised; a batch is a gather.
    """

    values: np.ndarray  # (T of all series,) float32, standardised; NaN where no window goes
    observed: np.ndarray  # (T of all series,) bool, False where missing or filled
    starts: np.ndarray  # (W,) int64, of the contexts
    series: np.ndarray  # (W,) int64, index of the series
    freqs: list  # of each series, pandas frequency or ""
    seasons: np.ndarray  # of each series, int64
    names: list  # of each series
    context_length: int  # L
    horizon: int  # H
    digest: str  # of all that a label depends on, but for the teacher
    origins: list | tuple = ()  # of each series, an Origin: for pictures

    def __len__(self):
        return len(self.starts)

    def batch(self, index):
        """(context (B, L), truth (B, H), observed (B, H) float32) of windows, on the CPU."""
        starts = self.starts[index]
        all_windows = np.lib.stride_tricks.sliding_window_view(
            self.values, self.context_length + self.horizon
        )
        all_targets = np.lib.stride_tricks.sliding_window_view(self.observed, self.horizon)
        rows = torch.from_numpy(all_windows[starts])
        observed = all_targets[starts + self.context_length].astype(np.float32)
        return (
            rows[:, : self.context_length],
            rows[:, self.context_length :],
            torch.from_numpy(observed),
        )

    def season(self, index):
        """Seasonal periods (B,) int64 of windows."""
        return torch.from_numpy(self.seasons[self.series[index]])

    def freq_of(self, index):
        """Frequencies (B,), an array of str, of windows."""
        return np.array(self.freqs, object)[self.series[index]]

    def units_of(self, index):
        """(mean, deviation) of the series of windows in their files' units, (B, 1) float64 each."""
        origins = [self.origins[number] for number in self.series[index]]
        mean = np.array([[origin.mean] for origin in origins])
        deviation = np.array([[origin.deviation] for origin in origins])
        return mean, deviation


def make_windows(chosen, config):
    """Windows of one part, of which `chosen` holds (PreparedSeries, starts)."""
    counts = [len(starts) for _, starts in chosen]
    lengths = [len(series.scaled) for series, _ in chosen]
    offsets = np.cumsum([0, *lengths[:-1]])
    digest = hashlib.sha256()
    seasons = []
    origins = []
    for (series, starts), offset in zip(chosen, offsets.tolist(), strict=True):
        origins.append(dataclasses.replace(series.origin, offset=offset))
        digest.update(label_digest(series, starts, config.window_length))
        seasons.append(season_of(series.freq) if config.season == "auto" else config.season)
    return Windows(
        values=np.concatenate([series.scaled for series, _ in chosen]),
        observed=np.concatenate([series.observed for series, _ in chosen]),
        starts=np.concatenate([starts for _, starts in chosen]) + np.repeat(offsets, counts),
        series=np.repeat(np.arange(len(chosen)), counts),
        freqs=[series.freq for series, _ in chosen],
        seasons=np.array(seasons),
        names=[series.name for series, _ in chosen],
        context_length=config.context_length,
        horizon=config.prediction_length,
        digest=digest.hexdigest(),
        origins=origins,
    )


def other_season(windows, usual):
    """About the number of steps after which windows without timestamps seem to repeat.

    None where none do, or where the `usual` number is nearly as good. It is the first peak of their
    mean similarity to themselves so many steps later that is about as high as the highest one, and
    stands clearly above what comes before it.
    """
    if windows.context_length + windows.horizon < 4 * (usual + 1):  # four cycles are to be seen
        return None
    index = np.flatnonzero(windows.freq_of(np.arange(len(windows))) == "")
    spread = np.linspace(0, len(index) - 1, min(len(index), CYCLE_WINDOWS))
    context, truth, _ = windows.batch(index[spread.astype(np.int64)])
    values = without_lines(torch.cat([context, truth], 1).double().numpy())  # (W, T)
    varies = values.std(1) > 0
    if not varies.any():
        return None

    similar = self_similarity(values[varies]).mean(0)  # (T // 4,)
    lowest_before = np.minimum.accumulate(similar)
    is_peak = np.zeros(len(similar), bool)
    is_peak[1:-1] = (similar[1:-1] > similar[:-2]) & (similar[1:-1] >= similar[2:])
    is_peak &= (similar >= CLEAR_CYCLE) & (similar - lowest_before >= CLEAR_CYCLE)
    if not is_peak.any():
        return None
    highest = similar[is_peak].max()
    if similar[usual] >= 0.5 * highest:  # a week of hours repeats better than a day
        return None
    return int(np.flatnonzero(is_peak & (similar >= 0.9 * highest))[0])


def without_lines(values):
    """Windows (W, T) less the straight line that fits each: a trend looks like a long cycle."""
    time = np.linspace(-1, 1, values.shape[1])
    values = values - values.mean(1, keepdims=True)
    slopes = values @ time / (time @ time)
    return values - np.outer(slopes, time)


def self_similarity(values):
    """How alike windows (W, T) are to themselves k steps later, (W, T // 4) for k = 0, 1, ...

    1 is the same, 0 unrelated, -1 mirrored: 2 * sum(a * b) / sum(a ** 2 + b ** 2).
    """
    length = values.shape[1]
    count = length // 4
    spectrum = np.abs(np.fft.rfft(values, 2 * length)) ** 2
    products = np.fft.irfft(spectrum)[:, :count]
    energy = np.cumsum(values**2, axis=1)
    until = energy[:, ::-1][:, :count]  # of all but the last k
    since = energy[:, -1:] - np.pad(energy, ((0, 0), (1, 0)))[:, :count]  # of all but the first k
    return 2 * products / np.maximum(until + since, np.finfo(np.float64).tiny)


def label_digest(series, starts, length):
    """Bytes that identify what the labels of the windows of one series depend on.

    Values are rounded to 1e-6 deviations, as the CPUs of two machines may differ in the last bits.
    Mean and deviation are in it as a label is rounded in their unit; the frequency is, as it
    chooses the teacher's patch size.
    """
    rows = len(series.values) + 1
    edges = np.bincount(starts, minlength=rows) - np.bincount(starts + length, minlength=rows)
    is_covered = np.cumsum(edges[:-1]) > 0
    covered = (series.values[is_covered] - series.mean) / series.deviation
    rounded = np.rint(covered * 1e6).astype("<i8")
    mean = round(series.mean / series.deviation, 6) + 0.0  # + 0.0 makes 0 of -0
    header = f"{series.freq} {len(starts)} {mean} {series.deviation:.6e}"
    content = header.encode() + starts.astype("<i8").tobytes() + rounded.tobytes()
    return hashlib.sha256(content).digest()


# -- The split -------------------------------------------------------------------------------------


class NoWindow(UserError):
    """The data gives no window for a part; `lengths` (L, H) would, if there are such lengths."""

    lengths = None


@dataclasses.dataclass
class SplitData:
    """The windows of all parts, and what is told about the files they come from."""

    windows: dict  # part -> Windows
    files: dict  # part -> number of files
    split_by: str  # "files" or "time"
    notes: dict  # file -> list of Message, why all or some of it is not used
    reports: dict  # file -> Report


def split_data(files, config):
    """SplitData of FolderRead. Raises NoWindow where a part has no window."""
    try:
        return split_windows(files, config)
    except NoWindow as error:
        error.lengths = lengths_that_work(files, config)
        raise


def lengths_that_work(files, config):
    """(L, H) that are proposed for one of the series, and give windows in all parts; or None."""
    series = [one for of_file in files.series.values() for one in of_file]
    series.sort(key=lambda one: len(one.values))
    for share in (0.5, 0.25, 0, 1):  # the middle one by its rows, shorter ones, the longest one
        if not series:
            return None
        one = series[round(share * (len(series) - 1))]
        lengths = propose_lengths(len(one.values), one.freq, config)
        if lengths is None:
            continue
        context_length, horizon = lengths
        shorter = dataclasses.replace(
            config, context_length=context_length, prediction_length=horizon
        )
        with contextlib.suppress(UserError):
            split_windows(files, shorter)
            return lengths
    return None


def split_windows(files, config):
    """As `split_data`, without lengths that would work."""
    prepared, split_by, notes = prepare_and_choose(files, config)
    part_of = {}
    if split_by == "files":
        part_of = split_files(prepared, config, notes)

    chosen = {part: [] for part in PARTS}  # (PreparedSeries, starts of its windows)
    names = {part: set() for part in PARTS}  # of the files
    for name in sorted(prepared):
        for series in prepared[name]:
            starts_of = series.starts
            if split_by == "files":
                starts_of = {part_of[name]: series.starts["whole"]}
            for part, starts in starts_of.items():
                if part == "train":
                    starts = sample_starts(starts, series.name, config)
                if len(starts):
                    chosen[part].append((series, starts))
                    names[part].add(name)

    empty = [part for part in PARTS if not chosen[part]]
    if empty:
        raise NoWindow(
            "the data gives no {} window; use more or longer series, or shorter lengths"
            " (--context_length, --prediction_length){}",
            *(", ".join(empty), listing(notes)),
        )
    windows = {part: make_windows(chosen[part], config) for part in PARTS}
    counts = {part: len(names[part]) for part in PARTS}
    return SplitData(windows, counts, split_by, notes, files.reports)


def prepare_and_choose(files, config):
    """(file -> list of PreparedSeries, "files" or "time", file -> note)."""
    if config.split_by != "time":
        prepared, notes = prepare_files(files, by_time=False, config=config)
        if config.split_by == "files" or len(prepared) >= MANY_FILES:
            return prepared, "files", notes
    prepared, notes = prepare_files(files, by_time=True, config=config)
    return prepared, "time", notes


def prepare_files(files, by_time, config):
    """(file -> list of PreparedSeries, file -> note), each series split by time or whole."""
    shares = {"whole": 1}
    if by_time:
        shares = dict(zip(PARTS, config.split_ratio, strict=True))
    prepared = {}
    notes = {name: [*report.skipped] for name, report in files.reports.items()}
    for name, all_series in files.series.items():
        for series in all_series:
            bounds = part_bounds(len(series.values), shares)
            try:
                ready = prepare_series(series, bounds, config)
            except Unusable as reason:
                notes[name].append(about_series(series, name, reason.message))
                continue
            prepared.setdefault(name, []).append(ready)
            for part, starts in ready.starts.items():
                if not len(starts):
                    reason = why_no_window(len(series.values), bounds[part], config)
                    problem = Message("no {} window: {}", (part, reason))
                    notes[name].append(about_series(series, name, problem))
    return prepared, notes


def about_series(series, file_name, problem):
    """Message: a problem, and the series that has it where its file holds several."""
    if series.name == file_name:
        return problem
    return Message("{}: {}", (series.name, problem))


def part_bounds(rows, shares):
    """part -> (first row, row after the last) of a series of `rows`; shares are part -> number."""
    so_far = np.cumsum([0, *shares.values()])
    edges = np.floor(rows * so_far / sum(shares.values()) + 1e-9).astype(int).tolist()
    return dict(zip(shares, itertools.pairwise(edges), strict=True))


def split_files(prepared, config, notes):
    """Part of each file: a seeded shuffle of their sorted names.

    Validation and test get max(1, round(n * share)) of n files. Raises UserError where there are
    too few.
    """
    count = len(prepared)
    if count < FEWEST_FILES:
        raise NoWindow(
            "{} usable files, it takes {}; or use --split_by time{}",
            *(count, FEWEST_FILES, listing(notes)),
        )
    total = sum(config.split_ratio)
    held_out = [max(1, round(count * share / total)) for share in config.split_ratio[1:]]
    for_training = count - sum(held_out)
    if for_training < 1:
        raise UserError(
            "--split_ratio leaves none of {} usable files for training; use --split_by time", count
        )
    names = sorted(prepared)
    order = np.random.default_rng(config.split_seed).permutation(count)
    parts = np.repeat(PARTS, [for_training, *held_out]).tolist()
    return {names[i]: part for i, part in zip(order, parts, strict=True)}


def sample_starts(starts, name, config):
    """Starts of the training windows of a series: every stride-th, of these at most max_windows.

    One is drawn from each of max_windows equal stretches. Taking every n-th instead would put all
    of them at one hour of the day wherever n is a multiple of 24.
    """
    starts = starts[:: config.stride]
    count = min(len(starts), config.max_windows or len(starts))
    edges = np.linspace(0, len(starts), count + 1).astype(np.int64)
    drawn = np.random.default_rng((config.split_seed, *os.fsencode(name)))
    return starts[drawn.integers(edges[:-1], edges[1:])]


def listing(notes):
    """Message: the first reasons why files are skipped, a line each, to stand under an error."""
    lines = []
    for name, reasons in notes.items():
        if reasons:
            lines.append(Message("\n  {}: skipped: {}", (name, reasons[:MOST_REASONS])))
    return lines_of(lines[:MOST_NOTES])


# == Student =======================================================================================


@dataclasses.dataclass
class StudentConfig:
    """The flags of the student group, and the two lengths; the season comes from the data."""

    context_length: int
    prediction_length: int
    d_model: int
    num_layers: int
    num_heads: int
    patch_size: int
    dropout: float


def attend(q, k, v):
    """Attention of queries to keys and values, (B, heads, N, D / heads) each, and of that shape."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v)  # one kernel each way
    # With so few tokens this is faster on a CPU.
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return weights @ v


class Block(nn.Module):
    """Pre-norm Transformer layer, (B, N, D) -> (B, N, D), with dropout on its two branches."""

    def __init__(self, d_model, num_heads, dropout):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, 4 * d_model),
            nn.GELU(),
            nn.Linear(4 * d_model, d_model),
        )

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))

    def attention(self, x):
        """Every token looks at every other one."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, D / heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).contiguous()  # (B, heads, N, D / heads) each
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


def instance_scale(context):
    """(last value, deviation), each (B, 1), of contexts (B, L); they move with shift and scale.

    The deviation is 1 where it is 0.
    """
    centre = context[:, -1:]
    reach = (context - centre).abs().amax(1, keepdim=True)
    reach = torch.where(reach == 0, 1.0, reach)  # keeps squares in float32's range in any unit
    deviation = ((context - centre) / reach).std(1, keepdim=True, unbiased=False) * reach
    return centre, torch.where(deviation == 0, 1.0, deviation)


def in_chunks(context, size):
    """Contexts (B, L) as (B, ceil(L / size), size): the first value is repeated where it takes."""
    missing = -context.shape[1] % size
    return F.pad(context, (missing, 0), mode="replicate").unflatten(1, (-1, size))


def fading(decay, count, is_cut):
    """Weights of periods (a list), the last one last: each `decay` times that of the next; sum 1.

    Where the first period is cut by the beginning of the context, it has none.
    """
    weights = [decay**age for age in reversed(range(count))]
    if is_cut:
        weights[0] = 0.0
    total = sum(weights)
    return [weight / total for weight in weights]


def completed_weights(weights):
    """Weights of a student; what an earlier version had not is added as it then was.

    The same sums were of shapes and of levels, nothing was taken off them, and all of the
    Transformer was added.
    """
    if "periods" not in weights or "levels" in weights:
        return weights
    added = {
        "levels": weights["periods"].clone(),
        "fade": torch.zeros_like(weights["head.bias"]),
        "share": torch.ones_like(weights["head.bias"][0]),
    }
    return weights | added


def weights_digest(student, names=None):
    """Short sha256 of a student's weights, as float32; of those with some names, if given."""
    digest = hashlib.sha256()
    for name, weight in student.state_dict().items():
        if names is None or name in names:
            digest.update(weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclasses.dataclass
class LastContext:
    """The end of a series, from which a forecast goes on."""

    values: np.ndarray  # (L,) float64, without a missing one
    filled: int  # missing values that were interpolated
    carried: int  # missing values at the end, where the last known one was carried forward


def complete_context(values, length):
    """LastContext of a series (T,) of at least `length` values, nan where missing.

    None where all of its last `length` values are missing.
    """
    first = len(values) - length
    if np.isnan(values[first:]).all():
        return None
    values = without_glitches(values)
    known = np.flatnonzero(~np.isnan(values))
    if not (known >= first).any():
        return None
    carried = len(values) - 1 - int(known[-1])
    filled = int(np.isnan(values[first:]).sum()) - carried
    context = np.interp(np.arange(first, len(values)), known, values[known])
    return LastContext(context, filled, carried)


def without_glitches(values):
    """Values (T,) with nan instead of those that lie too far from their median to be any."""
    known = values[~np.isnan(values)]
    with np.errstate(over="ignore"):  # what is too large for float64 is far away, too
        from_median = np.abs(values - np.median(known))
        usual = np.median(from_median[~np.isnan(values)])
        is_glitch = from_median > ABSURD * usual
    return np.where(is_glitch, np.nan, values) if usual > 0 else values


def like_context(values, context):
    """Forecasts (B, ...) as what they are of: without B, an array, or a tensor of its kind."""
    is_tensor = isinstance(context, torch.Tensor)
    if np.ndim(context) == 1:
        values = values[0]
    if is_tensor:
        kind = context.dtype if context.is_floating_point() else torch.float64
        return values.to(context.device, kind)
    kind = getattr(context, "dtype", None)
    return values.numpy().astype(kind if kind == np.float32 else np.float64)


class QuantileHead(nn.Module):
    """Quantiles of a forecast: tokens (B, N * D) and points (B, H) -> (B, 9, H), in one unit.

    Around the middle one, which lies near the point, each next quantile is a positive step further
    away: they cannot cross, whatever the weights are, as rounding keeps the order of sums.
    """

    def __init__(self, tokens, width, horizon):
        super().__init__()
        self.narrow = nn.Linear(tokens, width)
        self.widen = nn.Linear(width, len(LEVELS) * horizon)
        self.register_buffer("calibration", torch.ones(horizon))  # of the steps: see `calibrate`
        with torch.no_grad():
            self.widen.weight.mul_(0.1)
            self.widen.bias.fill_(-2.0)  # steps of about 1/8 deviation
            self.widen.bias.view(len(LEVELS), horizon)[MIDDLE] = 0.0

    def forward(self, tokens, points):
        raw = self.widen(F.gelu(self.narrow(tokens))).to(points.dtype)  # autocast changes it
        raw = raw.unflatten(1, (len(LEVELS), -1))  # (B, 9, H)
        steps = (F.softplus(raw) * self.calibration).unbind(1)
        quantiles = [points + raw[:, MIDDLE]]
        for step in steps[MIDDLE + 1 :]:
            quantiles.append(quantiles[-1] + step)
        for step in reversed(steps[:MIDDLE]):
            quantiles.insert(0, quantiles[0] - step)
        return torch.stack(quantiles, 1)


def quantiles_of_mixture(quantiles):
    """Quantiles (B, 9, H) of a mixture of equal parts, of which each has its own: (B, K, 9, H).

    Each part is taken as MIXED equally likely values. Its nine quantiles alone would leave out its
    tails, and the mixture would be too narrow.
    """
    weights = torch.tensor(weights_of_likely_values()).to(quantiles)
    values = (weights @ quantiles).flatten(1, 2).sort(1).values  # (B, K * MIXED, H)
    count = values.shape[1]
    places = count * np.arange(1, len(LEVELS) + 1) / 10 - 0.5  # of the levels among the values
    lower = values[:, np.floor(places)]
    upper = values[:, np.ceil(places)]
    return (lower + upper) / 2


@functools.cache
def weights_of_likely_values():
    """Weights (MIXED, 9) that give equally likely values of a distribution by its quantiles.

    The values are at the levels 1 / (2 * MIXED), 3 / (2 * MIXED), ... By the score that a normal
    distribution has at a level, they lie on straight lines through the nine, and on beyond these.
    """
    score = statistics.NormalDist().inv_cdf
    known = [score(level) for level in LEVELS]
    weights = np.zeros((MIXED, len(LEVELS)))
    for number in range(MIXED):
        wanted = score((number + 0.5) / MIXED)
        low = min(max(bisect.bisect(known, wanted) - 1, 0), len(known) - 2)
        share = (wanted - known[low]) / (known[low + 1] - known[low])
        weights[number, low : low + 2] = 1 - share, share
    return weights


class GoesOn:
    """What gives other horizons than its own, by forecasts of H steps: a student of any kind.

    It has a `context_length` L and a `prediction_length` H, `has_quantiles`, and is called as
    PatchStudent is.
    """

    def points_ahead(self, context, horizon):
        """Forecast (B, horizon) of contexts (B, L): beyond H steps it goes on from its own."""
        points = self(context)
        while points.shape[1] < horizon:
            known = torch.cat([context, points], 1)[:, -self.context_length :]
            points = torch.cat([points, self(known)], 1)
        return points[:, :horizon]

    def ahead(self, context, horizon):
        """(forecast (B, horizon), quantiles (B, 9, horizon) or None) of contexts (B, L)."""
        if not self.has_quantiles:
            return self.points_ahead(context, horizon), None
        if horizon > self.prediction_length:
            return self.points_ahead(context, horizon), self.quantiles_ahead(context, horizon)
        points, quantiles = self(context, with_quantiles=True)  # both in one pass
        return points[:, :horizon], quantiles[:, :, :horizon]

    def quantiles_ahead(self, context, horizon):
        """Quantiles (B, 9, horizon) of contexts (B, L): beyond H steps it goes on from its own.

        Each of the nine goes on by itself, as nine contexts: what the student says after them are
        nine distributions, whose mixture has the nine that are taken. After the median alone the
        band would collapse.
        """
        _, quantiles = self(context, with_quantiles=True)  # (B, 9, H)
        contexts = context[:, None].expand(-1, len(LEVELS), -1)  # (B, 9, L)
        while quantiles.shape[2] < horizon:
            known = torch.cat([contexts, quantiles], 2)[:, :, -self.context_length :]
            _, ahead = self(known.flatten(0, 1), with_quantiles=True)  # (B * 9, 9, H)
            nine = ahead.view(len(context), len(LEVELS), len(LEVELS), -1)  # (B, 9, 9, H)
            quantiles = torch.cat([quantiles, quantiles_of_mixture(nine)], 2)
        return quantiles[:, :, :horizon]


class PatchStudent(GoesOn, nn.Module):
    """Univariate patch Transformer: context (B, L) -> forecast (B, H), both in the series' units.

    With a `quantile_width` it forecasts quantiles at LEVELS, too, by a small head beside the one of
    the points: these do not depend on it, neither their weights nor their forecasts.

    A share of what the Transformer says is added to what the context's earlier periods of `season`
    steps say (0 = none, and all of the Transformer). The share is 1 while it learns, and what fits
    validation best after each epoch. `info` are plain facts of its making; with the sizes they go
    into the config.json of a hub folder.
    """

    LEVELS = LEVELS  # of the quantiles, in their order

    def __init__(
        self,
        context_length,
        prediction_length,
        d_model,
        num_layers,
        num_heads,
        patch_size,
        dropout,
        info=(),
        season=0,
        quantile_width=0,
    ):
        super().__init__()
        self.sizes = {  # all that builds the same student again, as config.json has it
            "context_length": context_length,
            "prediction_length": prediction_length,
            "d_model": d_model,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "patch_size": patch_size,
            "dropout": dropout,
            "season": season,
            "quantile_width": quantile_width,
        }
        self.context_length = context_length
        self.prediction_length = prediction_length
        self.patch_size = patch_size
        self.info = info or {}
        self.season = season if 0 < season <= context_length else 0

        patches = math.ceil(context_length / patch_size)
        if self.season:
            ahead = math.ceil(prediction_length / season)
            earlier = math.ceil(context_length / season)
            self.periods = nn.Parameter(torch.empty(ahead, earlier))
            self.levels = nn.Parameter(torch.empty(ahead, earlier))
            self.fade = nn.Parameter(torch.empty(prediction_length))
            self.register_buffer("share", torch.ones(()))  # see `fit_share`
        self.embed = nn.Linear(patch_size, d_model)
        self.position = nn.Parameter(torch.empty(patches, d_model))
        if not self.position.is_meta:  # nothing is drawn there, but torch's compiler is imported
            with torch.no_grad():
                self.begin_as_seasonal()
                self.position.normal_().mul_(0.02)
        self.blocks = nn.Sequential(
            *[Block(d_model, num_heads, dropout) for _ in range(num_layers)]
        )
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(patches * d_model, prediction_length)
        self.quantile_head = None
        if quantile_width:
            with torch.random.fork_rng(devices=[]):  # what is drawn later stays the same
                tokens = patches * d_model
                self.quantile_head = QuantileHead(tokens, quantile_width, prediction_length)

    @property
    def has_quantiles(self):
        """Whether it forecasts quantiles beside the points."""
        return self.quantile_head is not None

    def on(self, device):
        """A copy of it on a device."""
        return copy.deepcopy(self).to(device)

    def forward(self, context, with_quantiles=False):
        """Forecast (B, H); with quantiles (forecast (B, H), quantiles (B, 9, H))."""
        if context.ndim != 2 or context.shape[1] != self.context_length:
            raise ValueError(
                f"context has shape {tuple(context.shape)}, expected (B, {self.context_length})"
            )
        if not context.is_floating_point():  # small integers would overflow
            context = context.double()
        elif context.dtype != torch.float64:  # half precision would, too
            context = context.float()
        if context.shape[0] == 0:  # len would fix the batch size of an ONNX file
            points = context.new_zeros(0, self.prediction_length)
            quantiles = context.new_zeros(0, len(LEVELS), self.prediction_length)
            return (points, quantiles) if with_quantiles else points
        centre, deviation = instance_scale(context)
        scaled = ((context - centre) / deviation).to(self.position.dtype)

        tokens = self.embed(in_chunks(scaled, self.patch_size)) + self.position  # (B, N, D)
        tokens = self.norm(self.blocks(tokens))
        forecast = self.head(tokens.flatten(1)).to(scaled.dtype)  # (B, H), as autocast changes it
        if self.season:
            forecast = self.share * forecast + self.seasonal_part(scaled)

        is_constant = (context == centre).all(1, keepdim=True)
        points = torch.where(is_constant, centre, forecast * deviation + centre)
        if not with_quantiles:
            return points
        quantiles = self.quantile_head(tokens.flatten(1).detach(), forecast.detach())
        quantiles = quantiles * deviation[..., None] + centre[..., None]
        return points, torch.where(is_constant[..., None], centre[..., None], quantiles)

    def begin_as_seasonal(self):
        """Let the seasonal part begin as a forecast: earlier periods count less and less."""
        if not self.season:
            return
        earlier = self.periods.shape[1]
        is_cut = self.context_length % self.season > 0
        self.periods.copy_(torch.tensor(fading(SHAPE_DECAY, earlier, is_cut)))  # all rows alike
        self.levels.copy_(torch.tensor(fading(LEVEL_DECAY, earlier, is_cut)))
        steps = range(1, self.prediction_length + 1)
        self.fade.copy_(torch.tensor([0.5 ** (step / HALF_LIFE / self.season) for step in steps]))

    def seasonal_forecast(self, context):
        """Forecast (B, H) of contexts (B, L) of floats, in their units, without the Transformer."""
        centre, deviation = instance_scale(context)
        scaled = ((context - centre) / deviation).to(self.position.dtype)
        return self.seasonal_part(scaled) * deviation + centre

    def seasonal_part(self, scaled):
        """What earlier periods say (B, H) of contexts (B, L), whose last value is 0.

        Weighted sums of their shapes (what is left without their means) and of their means; each
        step of a period has the same weights. What they would have said of the last value is what
        they are off by: it is taken off again, less and less over the horizon.
        """
        earlier = in_chunks(scaled, self.season)  # (B, periods in L, season)
        level = earlier.mean(2, keepdim=True)  # (B, periods in L, 1)
        ahead = self.periods @ (earlier - level) + self.levels @ level
        ahead = ahead.to(scaled.dtype)  # (B, periods in H, season), as autocast changes it
        of_last = ahead[:, 0, -1:]  # (B, 1): the last value ends a period
        return ahead.flatten(1)[:, : self.prediction_length] - self.fade * of_last

    @torch.no_grad()
    def fold_share(self):
        """Make the share 1, and the head smaller by it: the forecasts stay, all of it learns on."""
        if self.season:
            self.head.weight.mul_(self.share)
            self.head.bias.mul_(self.share)
            self.share.fill_(1.0)

    def forecast(self, context, horizon=None):
        """Forecasts (H,) or (B, H) of contexts (L,) or (B, L), an array for an array, no gradients.

        A tensor gives a tensor on its device. Contexts that are longer are cut to their last L
        points, and missing values (nan, inf) are filled as `predict` fills them. Another `horizon`
        than H is a cut, or goes on from the student's own forecast. Raises ValueError for a shorter
        context, and for one that holds nothing but missing values.
        """
        points, _ = self.without_gradients(self.completed(context), horizon)
        return like_context(points, context)

    def quantiles(self, context, horizon=None):
        """Quantiles (9, H) or (B, 9, H), at the levels LEVELS; all else is as in `forecast`.

        Raises UserError where the student has none.
        """
        if not self.has_quantiles:
            raise UserError("this student has no quantiles; train one with --quantiles on")
        _, quantiles = self.without_gradients(self.completed(context), horizon)
        return like_context(quantiles, context)

    def completed(self, context):
        """Contexts (B, L) float64 on the CPU, without a missing value, of what a user has."""
        is_tensor = isinstance(context, torch.Tensor)
        values = context.detach().cpu().double().numpy() if is_tensor else context
        values = np.asarray(values, np.float64)
        length = self.context_length
        if values.ndim not in (1, 2) or values.shape[-1] < length:
            raise ValueError(
                f"context has shape {values.shape}, expected ({length},) or (B, {length}), or more"
            )
        rows = np.where(np.isfinite(values), values, np.nan).reshape(-1, values.shape[-1])
        completed = np.empty((len(rows), length))
        for number, row in enumerate(rows):
            whole = complete_context(row, length)
            if whole is None:
                raise ValueError(f"the last {length} values of context {number} are all missing")
            completed[number] = whole.values
        return torch.from_numpy(completed)

    @torch.no_grad()
    def without_gradients(self, contexts, horizon=None):
        """(forecasts (B, H), quantiles (B, 9, H) or None) on the CPU of contexts (B, L).

        In eval mode; the mode is put back. Another `horizon` than H takes its place.
        """
        horizon = horizon or self.prediction_length
        place = self.position.device
        kind = torch.float32 if place.type == "mps" else torch.float64  # which MPS has not
        was_training = self.training
        self.eval()
        points = []
        quantiles = []
        try:
            for part in contexts.split(FORWARD_BATCH):
                own_points, own_quantiles = self.ahead(part.to(place, kind), horizon)
                points.append(own_points.cpu())
                if self.has_quantiles:
                    quantiles.append(own_quantiles.cpu())
            return torch.cat(points), torch.cat(quantiles) if quantiles else None
        finally:
            self.train(was_training)

    @classmethod
    def from_pretrained(cls, source, revision=None):
        """Student, in eval mode, of a `.pt`, a run's folder, an exported folder or a hub id.

        Raises UserError.
        """
        return open_student(source, revision).student

    def save_pretrained(self, save_directory):
        """Write config.json, weights and card; the config tells by a digest which weights it is of.

        They are as PyTorchModelHubMixin writes them, which takes long to import.
        """
        from safetensors.torch import save_model

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.info["weights"] = weights_digest(self)
        save_model(self, str(folder / "model.safetensors"))
        config = self.sizes | {"info": self.info}
        (folder / "config.json").write_text(json.dumps(config, sort_keys=True, indent=2))
        (folder / "README.md").write_text(model_card(self), encoding="utf-8")

    def push_to_hub(self, repo_id, token=None, private=None, **settings):
        """Upload what `save_pretrained` writes to the hub. Returns the address of the commit.

        `token` and `private` are those of huggingface_hub's create_repo, `settings` those of its
        upload_folder, such as commit_message and revision.
        """
        from huggingface_hub import HfApi

        hub = HfApi(token=token)
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.upload_folder(repo_id=repo_id, folder_path=folder, **settings)


class OnnxStudent(GoesOn):
    """A student in an ONNX file, run by onnxruntime on the CPU, and called as PatchStudent is.

    Raises ValueError, or what onnxruntime raises, where the file is none of a student; UserError
    where it fails at a context.
    """

    def __init__(self, content, name):
        import onnxruntime  # not at the top: few users have such a file

        self.name = name  # for errors
        self.bytes = len(content)
        self.windows_at_once = windows_at_once(content)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # what it logs is raised as well
        self.session = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
        (self.given,) = self.session.get_inputs()
        shapes = onnx_shapes(content, 1)
        found = [shapes[output.name] for output in self.session.get_outputs()]
        self.has_quantiles = len(found) == 2
        self.context_length = shapes[self.given.name][1]
        self.prediction_length = found[0][-1]
        horizon = self.prediction_length
        if found not in ([(1, horizon)], [(1, horizon), (1, len(LEVELS), horizon)]):
            raise ValueError(f"it gives the shapes {found}")

    def __call__(self, context, with_quantiles=False):
        kind = np.float32 if self.given.type == "tensor(float)" else np.float64
        parts = []
        for part in context.split(self.windows_at_once):
            parts.append(self.run(part.cpu().numpy().astype(kind)))
        found = [torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True)]
        found = [values.to(context.device, context.dtype) for values in found]
        return found if with_quantiles else found[0]

    def run(self, values):
        """Arrays of the forecasts, and quantiles if there are any, of contexts (B, L)."""
        try:
            return self.session.run(None, {self.given.name: values})
        except Exception as error:  # onnxruntime has an exception of its own for each of a dozen
            reason = " ".join(str(error).split())[:199]
            raise UserError("{}: onnxruntime cannot run it: {}", self.name, reason) from error

    def on(self, _device):
        """Itself: it runs on the CPU alone."""
        return self


@dataclasses.dataclass
class OpenedStudent:
    """A student, and what its checkpoint says."""

    student: PatchStudent | OnnxStudent  # in eval mode, on the CPU
    content: dict  # of its checkpoint
    weights_id: str  # short sha256 of its weights
    path: Path | None  # of its `.pt`, None where it is no such file


def open_student(source, revision=None):
    """OpenedStudent of what a user calls a checkpoint. Raises UserError."""
    try:
        content, path = read_student(source, revision, build_student)
        if path is None:
            from safetensors.torch import load_file  # not at the top: a .pt does not need it

            weights_file = model_file(source, revision, "model.safetensors")
            shapes = weight_shapes(weights_file)
            build_student(content | {"model_state_dict": shapes})
            content["model_state_dict"] = load_file(weights_file)
            check_facts(content)
        weights = content["model_state_dict"]
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise ValueError("its weights are not finite")
        student = build_student(content)
        student.load_state_dict(completed_weights(weights), assign=True)
        student = student.float().eval()
        weights_id = weights_digest(student, weights)
        if content.get("weights", weights_id) != weights_id:
            raise UserError(
                "{}: config.json and model.safetensors are of two models; export it again", source
            )
        return OpenedStudent(student, content, weights_id, path)
    except (UserError, ModuleNotFoundError):
        raise
    except Exception as error:  # damaged files, or another model's
        raise UserError(
            "{}: not a student of this program, or damaged ({})", source, repr(error)[:199]
        ) from error


def open_onnx(name):
    """OpenedStudent of an ONNX file. Raises UserError."""
    try:
        raw, model = read_onnx(user_path(name))
        student = OnnxStudent(raw, name)
        content = content_of_onnx(model)
        config = content["student_config"]
        for size in ("context_length", "prediction_length"):
            if config.get(size, getattr(student, size)) != getattr(student, size):
                raise ValueError(f"its facts are of another {size}")
        return OpenedStudent(student, content, hashlib.sha256(raw).hexdigest()[:16], None)
    except (UserError, ModuleNotFoundError):
        raise
    except Exception as error:  # damaged files, or another model's
        raise UserError(
            "{}: not an ONNX file of a student, or damaged ({})", name, repr(error)[:199]
        ) from error


def content_of_onnx(model):
    """What an ONNX file says of its student, as a checkpoint does; those of others say nothing.

    Raises ValueError where it is of a wrong type or out of its range.
    """
    facts = {entry.key: entry.value for entry in model.metadata_props}
    text = facts.get(ONNX_FACTS, "{}")
    if len(text) > MOST_JSON:
        raise ValueError(f"its facts are longer than {MOST_JSON:,} signs")
    try:
        return content_of_config(json.loads(text))
    except RecursionError as error:
        raise ValueError("its facts are nested too deeply") from error


def build_student(content):
    """A student of what a checkpoint says, without memory for its weights.

    For these, shapes are enough. Raises ValueError, or what the network raises, where they do not
    fit each other.
    """
    check_facts(content)
    weights = completed_weights(content["model_state_dict"])
    config = content["student_config"]
    if config["num_heads"] < 1:
        raise ValueError("it has no attention heads")
    if config["d_model"] % config["num_heads"] or config["num_layers"] > len(weights):
        raise ValueError("its sizes do not fit each other")
    with torch.device("meta"):
        student = PatchStudent(**config, info=shareable(content))
    check_shapes(student.state_dict(), weights)
    return student


MODEL_CARD = """\
---
library_name: pytorch
pipeline_tag: time-series-forecasting
license: {licence_id}
---
# A small forecaster made by moirai_distill.py

A univariate patch Transformer of {parameters:,} parameters: {length} points in, {horizon} out, \
unscaled.

    from moirai_distill import PatchStudent
    student = PatchStudent.from_pretrained("FOLDER OR HUB ID")
    forecast = student(context)  # (B, {length}) -> (B, {horizon})
{quantiles}
{making}

{scores}

Data: {data}.
"""


def model_card(student):
    """The text of a student's model card, of its sizes and its `info`."""
    info = student.info
    licence = (info.get("teacher") or {}).get("licence", "")
    licences = " ".join([licence, *inherited_licences(info)])
    return MODEL_CARD.format(
        licence_id="cc-by-nc-4.0" if "CC-BY-NC-4.0" in licences else "other",
        parameters=sum(weight.numel() for weight in student.parameters()),
        length=student.context_length,
        horizon=student.prediction_length,
        quantiles=card_quantiles(student),
        making=card_making(info),
        scores=card_scores(info.get("evaluation")),
        data=card_data(info),
    )


def card_quantiles(student):
    """The line that asks for quantiles; empty where there are none."""
    if not student.has_quantiles:
        return ""
    horizon = student.prediction_length
    return f"    quantiles = student.quantiles(context)  # (B, 9, {horizon}), levels 0.1 to 0.9\n"


def as_code(value):
    """A value as code in Markdown, where nothing in it is markup."""
    text = printable(str(value))[:200]
    for mark in "`|":  # which would end the code, or the cell of a table
        text = text.replace(mark, "'")
    return f"`{text or ' '}`"


def inherited_licences(info):
    """Licences of the teachers of the students with whose weights this one's training began."""
    return (info.get("parent") or {}).get("licences", [])


def card_making(info):
    """How it was trained, by which teacher, under which licence."""
    teacher = info.get("teacher")
    begun = ""
    if info.get("parent"):
        begun = f" It began with the weights of {as_code(info['parent'].get('name', '?'))}."
    for licence in inherited_licences(info):
        begun += f" The licence of an earlier teacher binds it, too: {as_code(licence)}."
    if not teacher:
        return f"Trained on truth alone, without a teacher.{begun}"
    alpha = info.get("run_config", {}).get("alpha", "?")
    name = as_code(teacher.get("teacher", "?"))
    commit = as_code(teacher.get("commit") or "local")
    return (
        f"Distilled from {name} ({commit}):"
        f" {alpha} * MSE to its forecasts + the rest * MSE to truth."
        f" The teacher's licence binds its student: {as_code(teacher.get('licence', '?'))}."
        f"{begun}"
    )


CARD_HEADS = {"coverage_80": "share in the 80 % band"}  # of columns; others are in capitals


def card_scores(evaluation):
    """The table of test errors, the best first."""
    if not evaluation:
        return "Not evaluated yet: `python moirai_distill.py evaluate` does it."

    def error(item):
        return item[1].get("mse") or math.inf

    count = evaluation.get("windows", 0)
    rows = evaluation.get("rows", {})
    shown = list(METRICS)
    for metric in QUANTILE_METRICS:
        if any(row.get(metric) is not None for row in rows.values()):
            shown.append(metric)
    heads = [CARD_HEADS.get(metric, metric.upper()) for metric in shown]
    lines = [f"| {count:,} test windows | {' | '.join(heads)} |", "|---" * (1 + len(shown)) + "|"]
    for name, row in sorted(rows.items(), key=error):
        cells = [as_code(name)]
        for metric in shown:
            value = row.get(metric)
            cells.append("-" if value is None else f"{value:.4f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def card_data(info):
    """How much it was trained and tested on."""
    facts = []
    for part in PARTS:
        if part in info.get("counts", {}):
            series, windows = info["counts"][part]
            facts.append(f"{series:,} {part} series ({windows:,} windows)")
    freqs = [freq or "unknown" for freq in info.get("freqs", [""])]
    facts.append(f"sampling frequency {', '.join(map(as_code, freqs))}")
    return ", ".join(facts)


# == Loss and metrics ==============================================================================


def distillation_loss(forecast, truth, observed, label, weight):
    """Sums (4,) over the observed points of a batch; all are (B, H), but weight is (B, 1).

    weight * squared error to the label + (1 - weight) * squared error to the truth; squared error
    to the truth; squared error to the label, where there is one; how many points have a label.
    The first is what is learned, the others are only told. `weight` is alpha, or 0 for a window
    that has no label.
    """
    to_truth = F.mse_loss(forecast, truth, reduction="none")
    to_label = F.mse_loss(forecast, label, reduction="none")
    blended = weight * to_label + (1 - weight) * to_truth
    learned = (blended * observed).sum()
    with torch.no_grad():
        labelled = observed * (weight > 0)
        told = [(to_truth * observed).sum(), (to_label * labelled).sum(), labelled.sum()]
    return torch.stack([learned, *told])


def quantile_loss(quantiles, truth, observed, label, weight):
    """Sum over the observed points of a batch of the loss of quantiles, its mean over the levels.

    weight * Huber(quantile, the teacher's) + (1 - weight) * 2 * pinball(quantile, truth).
    `quantiles` and `label` are (B, 9, H), truth and observed (B, H), weight (B, 1): alpha, or 0 for
    a window that has no label.
    """
    to_label = F.huber_loss(quantiles, label, reduction="none").mean(1)
    to_truth = 2 * pinball(quantiles, truth).mean(1)
    blended = weight * to_label + (1 - weight) * to_truth
    return (blended * observed).sum()


def pinball(quantiles, truth):
    """Pinball losses (B, 9, H) of quantiles (B, 9, H) beside the truth (B, H).

    The levels of K quantiles are spread evenly: 1 / (K + 1), 2 / (K + 1), ...
    """
    count = quantiles.shape[1]
    level = torch.arange(1, count + 1, device=truth.device, dtype=truth.dtype) / (count + 1)
    level = level[:, None]
    above = truth[:, None] - quantiles
    return torch.maximum(level * above, (level - 1) * above)


# -- Naive forecasts -------------------------------------------------------------------------------


def last_value(context, _season, horizon):
    """Forecast (B, H): the last point of each context (B, L), repeated."""
    return context[:, -1:].expand(-1, horizon)


def seasonal_naive(context, season, horizon):
    """Forecast (B, H): the last `season` (B,) points of each context (B, L), repeated.

    The last point is, where L is less than a season.
    """
    length = context.shape[1]
    period = torch.where(season <= length, season, 1)[:, None]
    return context.gather(1, length - period + torch.arange(horizon) % period)


BASELINES = {"seasonal-naive": seasonal_naive, "last value": last_value}


# -- One ruler for every forecaster ----------------------------------------------------------------


@dataclasses.dataclass
class Scores:
    """Errors of a forecaster over all windows and observed points; nan where there is none.

    mse and mae are in deviations of each series' train rows, mase in the MAE that seasonal-naive
    has inside each context.
    """

    mse: float
    mae: float
    mase: float
    mase_left_out: int  # windows that have no MASE, as seasonal-naive makes no error in them
    mse_by_step: list  # (H,)
    mae_by_step: list  # (H,)
    mse_by_series: list
    mae_by_series: list


@dataclasses.dataclass
class QuantileScores:
    """How good quantiles are, over all windows and observed points."""

    wql: float  # mean over the levels of sum(2 * pinball) / sum(|truth|), as GIFT-Eval has it
    coverage_80: float  # share of the truth between the first and the last level
    wql_by_third: list  # of the horizon
    coverage_80_by_third: list


class PointSums:
    """What Scores are made of: float64 sums over the windows that this process has looked at."""

    def __init__(self, windows):
        self.windows = windows
        self.by_step = torch.zeros(5, windows.horizon).double()
        self.by_series = torch.zeros(3, len(windows.seasons)).double()
        self.left_out = torch.zeros(1).double()

    def add(self, index, batch, points):
        """Count forecasts (B, H) of the windows `index`, whose batch is as Windows gives it."""
        context, truth, observed = batch
        error = (points - truth).double().abs() * observed
        unit = seasonal_scale(context, self.windows.season(index))
        has_unit = unit > 0
        scaled = torch.where(has_unit, error / unit, 0.0)
        counted = (error**2, error, scaled, observed, observed * has_unit)
        self.by_step += torch.stack([values.sum(0) for values in counted])
        sums = torch.stack([(error**2).sum(1), error.sum(1), observed.double().sum(1)])
        self.by_series.index_add_(1, torch.from_numpy(self.windows.series[index]), sums)
        self.left_out += (~has_unit).sum()

    def scores(self, job):
        """Scores over the windows of all processes."""
        by_step = job.sum(self.by_step)
        by_series = job.sum(self.by_series)
        squared, absolute, scaled, points, points_with_unit = by_step.sum(1).tolist()
        return Scores(
            mse=squared / points,
            mae=absolute / points,
            mase=scaled / points_with_unit if points_with_unit else math.nan,
            mase_left_out=int(job.sum(self.left_out)),
            mse_by_step=(by_step[0] / by_step[3]).tolist(),
            mae_by_step=(by_step[1] / by_step[3]).tolist(),
            mse_by_series=(by_series[0] / by_series[2]).tolist(),
            mae_by_series=(by_series[1] / by_series[2]).tolist(),
        )


class QuantileSums:
    """What QuantileScores are made of: as PointSums."""

    def __init__(self, windows):
        self.by_step = torch.zeros(4, windows.horizon).double()

    def add(self, batch, quantiles):
        """Count quantiles (B, 9, H) of a batch of windows."""
        _, truth, observed = batch
        truth = truth.double()
        quantiles = quantiles.double()
        loss = 2 * pinball(quantiles, truth).mean(1) * observed
        is_inside = (quantiles[:, 0] <= truth) & (truth <= quantiles[:, -1])
        counted = (loss, truth.abs() * observed, is_inside * observed, observed)
        self.by_step += torch.stack([values.double().sum(0) for values in counted])

    def scores(self, job):
        """QuantileScores over the windows of all processes."""
        by_step = job.sum(self.by_step)
        by_third = sums_by_third(by_step)  # (4, 3)
        loss, size, inside, points = by_step.sum(1).tolist()
        return QuantileScores(
            wql=loss / size if size else math.nan,
            coverage_80=inside / points,
            wql_by_third=(by_third[0] / by_third[1]).tolist(),
            coverage_80_by_third=(by_third[2] / by_third[3]).tolist(),
        )


def own_batches(windows, batch_size, job, description):
    """(index, batch) of the windows of this process, which a bar counts."""
    own = np.arange(job.rank, len(windows), job.world_size)
    with job.voice.bar(description, total=len(own), unit="window") as bar:
        for first in range(0, len(own), batch_size):
            index = own[first : first + batch_size]
            yield index, windows.batch(index)
            bar.update(len(index))


def score_answers(answer, windows, batch_size, job):
    """(Scores, QuantileScores or None) of a forecaster over all windows; it is asked once of each.

    `answer(index, context (B, L))` gives (points (B, H), quantiles (B, 9, H) or None). Sums are
    float64, so that the result does not depend on batch size or number of processes.
    """
    point_sums = PointSums(windows)
    quantile_sums = QuantileSums(windows)
    has_quantiles = False
    for index, batch in own_batches(windows, batch_size, job, "scoring"):
        points, quantiles = answer(index, batch[0])
        point_sums.add(index, batch, points)
        if quantiles is not None:
            has_quantiles = True
            quantile_sums.add(batch, quantiles)
    if not job.largest(has_quantiles):  # of all processes
        return point_sums.scores(job), None
    return point_sums.scores(job), quantile_sums.scores(job)


def score(forecast, windows, batch_size, job):
    """Scores of `forecast(index, context (B, L)) -> (B, H)`, as for `score_answers`."""
    scores, _ = score_answers(points_alone(forecast), windows, batch_size, job)
    return scores


def points_alone(forecast):
    """`answer(index, context)` of a forecaster that has no quantiles."""
    return lambda index, context: (forecast(index, context), None)


def score_quantiles(forecast, windows, batch_size, job):
    """QuantileScores of `forecast(index, context (B, L)) -> (B, 9, H)`, as for `score_answers`."""
    sums = QuantileSums(windows)
    for index, batch in own_batches(windows, batch_size, job, "quantiles"):
        sums.add(batch, forecast(index, batch[0]))
    return sums.scores(job)


def thirds(horizon):
    """Which third of the horizon (0, 1, 2) each step (H,) is in; a short horizon has fewer."""
    return torch.arange(horizon) * 3 // horizon


def sums_by_third(by_step):
    """Sums (..., 3) over each third of the horizon of what is there by step (..., H)."""
    sums = torch.zeros(*by_step.shape[:-1], 3, dtype=by_step.dtype)
    return sums.index_add(-1, thirds(by_step.shape[-1]), by_step)


def seasonal_scale(context, season):
    """MASE's unit (B, 1) float64: mean absolute seasonal difference inside each context (B, L).

    It is 0 where there is none.
    """
    context = context.double()
    earlier = torch.arange(context.shape[1]) - season[:, None]  # (B, L)
    is_inside = earlier >= 0
    difference = (context - context.gather(1, earlier.clamp(min=0))).abs() * is_inside
    return difference.sum(1, keepdim=True) / is_inside.sum(1, keepdim=True).clamp(min=1)


# == Teacher =======================================================================================


@dataclasses.dataclass
class TeacherRequest:
    """The flags of the teacher group, as they were typed."""

    teacher_model: str
    teacher_revision: str | None
    teacher_patch_size: int | str | dict  # a size, "auto", or frequency -> size where it is known
    teacher_point: str  # "median" of samples, or exact "mean"
    num_samples: int
    teacher_batch_size: int  # windows of a block of labels
    teacher_precision: str  # "32" or "bf16"
    quantiles: str  # "on" or "off": whether they are asked for beside the point
    label_cache: str

    @property
    def with_quantiles(self):
        """Whether labels hold quantiles: those of the samples under the median."""
        has_samples = self.teacher_point == "median" or is_own_file(self.teacher_model)
        return self.quantiles == "on" and has_samples


@dataclasses.dataclass
class Generation:
    """A kind of MOIRAI."""

    package: str  # of uni2ts.model
    prefix: str  # of the names of its classes
    config_keys: set  # by which its config.json is told from those of others


# Of several that fit a config.json, it is the one with the most keys.
GENERATIONS = (
    Generation(  # 1.0 and 1.1
        "moirai",
        "Moirai",
        {"max_seq_len", "attn_dropout_p", "dropout_p", "distr_output", "patch_sizes"},
    ),
    Generation(
        "moirai_moe",
        "MoiraiMoE",
        {"max_seq_len", "attn_dropout_p", "dropout_p", "distr_output", "patch_sizes", "d_ff"},
    ),
    Generation(
        "moirai2",
        "Moirai2",
        {"max_seq_len", "attn_dropout_p", "dropout_p", "patch_size", "quantile_levels", "d_ff"},
    ),
)


# What stands in a config.json beside `distr_output`: (type, smallest, largest). No published MOIRAI
# comes near the largest; they bound what a file that lies can cost before it is refused.
SETTINGS = {
    "d_model": (int, 1, 8192),
    "d_ff": (int, 1, 65_536),
    "num_layers": (int, 1, 128),
    "patch_size": (int, 1, 1024),
    "max_seq_len": (int, 1, 100_000),
    "num_predict_token": (int, 1, 128),
    "attn_dropout_p": (float, 0, 1),
    "dropout_p": (float, 0, 1),
    "scaling": (bool, False, True),
}
LISTS = {"patch_sizes": (int, 1, 1024), "quantile_levels": (float, 0, 1)}  # of at most MOST_ITEMS
MOST_ITEMS = 99

# uni2ts's output distributions, and the one number that some of them take.
DISTRIBUTIONS = {
    "StudentTOutput": None,
    "NormalOutput": None,
    "NormalFixedScaleOutput": "scale",
    "NegativeBinomialOutput": None,
    "LogNormalOutput": None,
    "LaplaceOutput": None,
    "LaplaceFixedScaleOutput": "scale",
    "ParetoOutput": None,
    "ParetoFixedAlphaOutput": "alpha",
}


@dataclasses.dataclass
class Question:
    """What a teacher is asked for, beside the contexts."""

    horizon: int  # H
    patch_size: int
    point: str  # "median" or "mean"
    samples: int
    with_quantiles: bool = False


@dataclasses.dataclass
class Answer:
    """A teacher's forecast of contexts (B, L), on the CPU, in their units."""

    points: torch.Tensor  # (B, H) float32
    quantiles: torch.Tensor | None  # (B, 9, H) float32, where they were asked for


class Teacher:
    """A frozen MOIRAI (uni2ts's module) that forecasts one variate from exactly its last L points.

    MOIRAI 1.0 and 1.1 are run by our own code: uni2ts's samples at every position, context and
    padding included, which costs many times the network. MoE and 2.0 are run by uni2ts's own
    `forecast_class`.
    """

    def __init__(self, module, device, precision, note, forecast_class=None):
        self.module = module.requires_grad_(False).eval().to(device)
        for part in module.modules():
            if hasattr(part, "attn_dropout_p"):
                part.attn_dropout_p = 0.0  # uni2ts drops attention out in eval mode, too
        self.device = torch.device(device)
        self.precision = precision
        self.note = note  # tells the user a sentence
        self.forecast_class = forecast_class
        self.is_moe = hasattr(module, "distr_output") and forecast_class is not None
        self.most_windows = 2**31  # in one call; less where they do not fit into memory

    def patch_sizes(self, context_length, horizon):
        """The patch sizes with which both lengths fit into the module's `max_seq_len` tokens.

        uni2ts goes on without a word where they do not.
        """
        if self.is_moe:
            sizes = [16]  # the only one that its forecast knows
        else:
            sizes = getattr(self.module, "patch_sizes", None) or [self.module.patch_size]
        fitting = []
        for size in sizes:
            tokens = math.ceil(context_length / size) + math.ceil(horizon / size)
            if tokens <= self.module.max_seq_len:
                fitting.append(size)
        return fitting

    def forecast(self, context, horizon, patch_size, point, samples):
        """Point forecast (B, H) float32, on the CPU, in the units of the contexts (B, L)."""
        return self.answer(context, Question(horizon, patch_size, point, samples)).points

    @torch.inference_mode()
    def answer(self, context, asked):
        """Answer to a Question about contexts (B, L).

        Contexts reach MOIRAI in their own deviations, as its scaler adds 1e-5 to the variance,
        which changes small values. The forecast of a constant is that constant.
        """
        if asked.point == "mean" and self.forecast_class:
            raise UserError("--teacher_point mean: only for a MOIRAI 1.0 or 1.1; use median")
        context = context.double()
        mean, deviation, is_constant = own_scale(context)
        scaled = ((context - mean) / deviation).float()
        points, quantiles = self.answer_scaled(scaled, asked)
        assert points.shape == (len(context), asked.horizon), points.shape
        points = torch.where(is_constant, mean, points.cpu() * deviation + mean)
        if quantiles is not None:
            shape = (len(context), len(LEVELS), asked.horizon)
            assert quantiles.shape == shape, quantiles.shape
            quantiles = quantiles.cpu() * deviation[..., None] + mean[..., None]
            quantiles = torch.where(is_constant[..., None], mean[..., None], quantiles).float()
        return Answer(points.float(), quantiles)

    def answer_scaled(self, scaled, asked):
        """(points (B, H), quantiles (B, 9, H) or None) of contexts (B, L) in own deviations."""
        if not self.forecast_class:
            settings = (asked.horizon, asked.patch_size)
            distribution = self.in_calls(self.predict_distribution, scaled, *settings)
            points, quantiles = self.summarize(*distribution, asked)
            points = points.flatten(1)[:, : asked.horizon]
            if quantiles is not None:
                quantiles = quantiles.flatten(1, 2)[:, : asked.horizon].transpose(1, 2)
            return points, quantiles

        if self.is_moe:  # each window is `samples` sequences
            self.most_windows = min(self.most_windows, max(1, MOE_SEQUENCES // asked.samples))
        settings = (asked.horizon, asked.samples)
        values = self.in_calls(self.forecast_whole, scaled, *settings).float()
        if self.is_moe:
            quantiles = quantiles_of(values) if asked.with_quantiles else None
            return median(values), quantiles
        own_levels = list(self.module.quantile_levels)
        points = values[:, own_levels.index(0.5)]
        if not asked.with_quantiles:
            return points, None
        missing = [f"{level:g}" for level in LEVELS if level not in own_levels]
        if missing:
            raise UserError(
                "--quantiles on: the teacher has no levels {}; use --quantiles off",
                ", ".join(missing),
            )
        places = [own_levels.index(level) for level in LEVELS]
        return points, values[:, places].sort(1).values  # its own may cross

    def in_calls(self, network, scaled, *settings):
        """What `network` gives for contexts (B, L), in as many calls as GPU memory asks for."""
        while True:
            try:
                with torch.autocast(
                    self.device.type, torch.bfloat16, enabled=self.precision == "bf16"
                ):
                    results = [
                        network(part.to(self.device), *settings)
                        for part in scaled.split(self.most_windows)
                    ]
                return tree_map(lambda *leaves: torch.cat(leaves), *results)
            except torch.OutOfMemoryError:
                if self.most_windows == 1:
                    raise
            self.most_windows = max(1, min(self.most_windows, len(scaled)) // 2)
            torch.cuda.empty_cache()
            self.note(
                "out of GPU memory: the teacher goes on with {} windows a call", self.most_windows
            )

    def predict_distribution(self, context, horizon, patch_size):
        """(distribution parameters, location, scale) of the horizon, for contexts (B, L).

        It is MoiraiModule.forward without its padding. The leaves of the parameters are
        (B, patches of the horizon, P, ...), location and scale (B, 1, 1).
        """
        module = self.module
        batch, length = context.shape
        past = math.ceil(length / patch_size)
        future = math.ceil(horizon / patch_size)
        missing = past * patch_size - length
        filler = max(module.patch_sizes) - patch_size  # a token is as wide as the widest patch

        def in_tokens(values):
            # Padded on the left, so that the horizon follows the last point.
            values = F.pad(values, (missing, 0)).unflatten(1, (past, patch_size))
            return F.pad(values, (0, filler))  # (B, past, widest patch)

        values = in_tokens(context)
        observed = in_tokens(torch.ones_like(context)).bool()
        time_id = torch.arange(past + future, device=context.device).expand(batch, -1)
        ones = torch.ones_like(time_id)  # (B, past + future): one sample, one variate
        zeros = torch.zeros_like(time_id)
        sizes = patch_size * ones

        loc, scale = module.scaler(values, observed, ones[:, :past], zeros[:, :past])
        tokens = module.in_proj((values - loc) / scale, sizes[:, :past])  # (B, past, D)
        mask = module.mask_encoding.weight.to(tokens.dtype).expand(batch, future, -1)
        tokens = torch.cat([tokens, mask], 1)
        tokens = module.encoder(tokens, None, time_id=time_id, var_id=zeros)
        parameters = module.param_proj(tokens[:, past:], sizes[:, past:])
        parameters = tree_map(lambda leaf: leaf[:, :, :patch_size].float(), parameters)
        return parameters, loc[:, :1], scale[:, :1]  # equal for all tokens of a window

    def summarize(self, parameters, loc, scale, asked):
        """(points (B, patches of the horizon, P), quantiles (the same, 9) or None).

        Of distributions: the mean, or the median of samples, and quantiles of the same samples. nan
        where a parameter is not finite.
        """
        leaves = tree_leaves(parameters)
        shape = (len(loc), *leaves[0].shape[1:3])
        finite = [leaf.isfinite().reshape(*shape, -1).all(-1) for leaf in leaves]
        is_finite = torch.stack(finite).all(0)

        def harmless(leaf):
            mask = is_finite[..., None] if leaf.ndim > 3 else is_finite
            return torch.where(mask, leaf, 1.0)

        parameters = tree_map(harmless, parameters)
        if asked.point == "mean":
            output = self.module.distr_output
            points = output.distribution(parameters, loc, scale).mean
            return points.masked_fill(~is_finite, math.nan), None
        values = self.draw(parameters, loc, scale, shape, asked.samples)
        points = median(values).view(shape).masked_fill(~is_finite, math.nan)
        if not asked.with_quantiles:
            return points, None
        quantiles = quantiles_of(values).view(*shape, len(LEVELS))
        return points, quantiles.masked_fill(~is_finite[..., None], math.nan)

    def draw(self, parameters, loc, scale, shape, samples):
        """Samples (positions, samples) of a mixture, or of one distribution.

        A component is asked for as many values as are drawn of it; uni2ts draws all of each.
        """
        output = self.module.distr_output
        if "components" in parameters:
            logits = parameters["weights_logits"]
            components = list(zip(output.components, parameters["components"], strict=True))
        else:
            logits = torch.zeros(shape, device=loc.device)[..., None]
            components = [(output, parameters)]
        drawn = torch.multinomial(logits.softmax(-1).flatten(0, 2), samples, True)
        values = torch.empty(drawn.shape, device=drawn.device)
        for number, (component, own) in enumerate(components):
            row, column = (drawn == number).nonzero(as_tuple=True)

            def at_rows(leaf, row=row):
                return leaf.expand(shape).flatten()[row]

            own = tree_map(at_rows, own)
            distribution = component.distribution(own, at_rows(loc), at_rows(scale))
            values[row, column] = distribution.sample()
        return values

    def forecast_whole(self, context, horizon, samples):
        """Samples (MoE) or the module's quantiles (2.0), (B, S, H), by uni2ts's own forecast."""
        settings = {
            "module": self.module,
            "context_length": context.shape[1],
            "prediction_length": horizon,
            "target_dim": 1,
            "feat_dynamic_real_dim": 0,
            "past_feat_dynamic_real_dim": 0,
        }
        if self.is_moe:
            settings["patch_size"] = 16
            settings["num_samples"] = samples
        past = context[..., None]  # (B, L, 1)
        is_seen = torch.ones_like(past).bool()
        return self.forecast_class(**settings)(
            past_target=past, past_observed_target=is_seen, past_is_pad=~is_seen[..., 0]
        )


def own_scale(context):
    """(mean, deviation, whether it is constant), each (B, 1), of contexts (B, L) float64.

    Of a constant, the mean is its value and the deviation 1.
    """
    is_constant = context.amin(1, keepdim=True) == context.amax(1, keepdim=True)
    mean = context.mean(1, keepdim=True)
    mean = torch.where(is_constant, context[:, -1:], mean)
    deviation = context.std(1, keepdim=True, unbiased=False)
    return mean, torch.where(is_constant, 1.0, deviation), is_constant


def quantiles_of(samples):
    """Quantiles at LEVELS, (B, 9, ...), over dim 1 of samples (B, S, ...).

    In the mean, a share `level` of further samples lies below: the k-th of S samples is the
    quantile k / (S + 1). Between two of them it is interpolated.
    """
    count = samples.shape[1]
    ordered = samples.sort(1).values
    quantiles = []
    for level in LEVELS:
        place = min(max((count + 1) * level - 1, 0), count - 1)
        below = math.floor(place)
        above = math.ceil(place)
        quantiles.append(ordered[:, below].lerp(ordered[:, above], place - below))
    return torch.stack(quantiles, 1)


def median(samples):
    """Median over dim 1 of samples (B, S, ...); of an even number the mean of the two middle ones.

    torch.median gives the lower of these two, and the upper one where all signs are turned.
    """
    lower = samples.median(1).values
    upper = -(-samples).median(1).values
    return (lower + upper) / 2


def fingerprint(name, revision):
    """sha256 of a teacher's files where they are at hand without the network, else None."""
    from huggingface_hub import errors, try_to_load_from_cache

    folder = user_path(name)
    if is_own_file(name):
        return own_forecaster(name).fingerprint if folder.is_file() else None
    digest = hashlib.sha256()
    for filename in ("config.json", "model.safetensors"):
        path = folder / filename
        if not folder.is_dir():
            try:
                path = try_to_load_from_cache(name, filename, revision=revision)
            except errors.HFValidationError:  # no hub id: a folder that is not there
                return None
        if not isinstance(path, str | Path) or not Path(path).is_file():
            return None
        if Path(path).stat().st_size > MOST_TEACHER:
            raise UserError("{}: larger than any teacher ({:,} bytes)", path, MOST_TEACHER)
        digest.update(bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()


def load_teacher(request, device, note):
    """Teacher of a hub id or a local folder, its weights loaded strictly; or an OwnForecaster.

    Raises UserError.
    """
    name = request.teacher_model
    if is_own_file(name):
        if not user_path(name).is_file():
            raise UserError("{}: no such file", name)
        return own_forecaster(name)
    config_file = model_file(name, request.teacher_revision, "config.json")
    weights_file = model_file(name, request.teacher_revision, "model.safetensors")
    try:
        settings = read_json(config_file)
    except ValueError as error:
        raise UserError(
            "{}: config.json is not JSON ({}); download it again", name, error
        ) from error
    generation = find_generation(name, settings)
    check_settings(name, settings)
    precision = request.teacher_precision if device.type == "cuda" else "32"
    if generation.package == "moirai_moe" and precision != "32":
        raise UserError("--teacher_precision bf16: not for a MOIRAI-MoE; use 32")
    shapes = teacher_shapes(name, weights_file)

    try:
        package = importlib.import_module(f"uni2ts.model.{generation.package}")
    except ImportError as error:
        raise UserError(
            "uni2ts cannot be imported ({}); pip install -r requirements.txt", error
        ) from error
    if "distr_output" in settings:
        settings["distr_output"] = build_distribution(name, settings["distr_output"])
    module = open_module(package, generation, settings, (name, weights_file, shapes))
    forecast_class = None
    if generation.package != "moirai":
        forecast_class = getattr(package, f"{generation.prefix}Forecast")
    return Teacher(module, device, precision, note, forecast_class)


def damaged_teacher(name, error):
    """The UserError for damaged weights, or a config that uni2ts or torch refuses."""
    reason = " ".join(str(error).split())[:200]
    return UserError(
        "{}: config.json or model.safetensors is damaged or of another model ({}: {})",
        *(name, type(error).__name__, reason),
    )


def teacher_shapes(name, weights_file):
    """As `weight_shapes`. Raises UserError."""
    try:
        return weight_shapes(weights_file)
    except Exception as error:
        raise damaged_teacher(name, error) from error


def open_module(package, generation, settings, source):
    """The module of uni2ts that settings describe, with its weights.

    `source` is its name, the file of its weights, and their shapes. Raises UserError.
    """
    from safetensors.torch import load_file

    name, weights_file, shapes = source
    try:
        if 0.5 not in settings.get("quantile_levels", [0.5]):
            raise ValueError("quantile_levels without 0.5")
        if generation.package == "moirai_moe" and 16 not in settings["patch_sizes"]:
            raise ValueError("patch_sizes without 16")
        if generation.package == "moirai2" and not settings.get("scaling", True):
            raise ValueError("scaling is off")
        kind = getattr(package, f"{generation.prefix}Module")
        with torch.device("meta"):  # takes no memory, whatever the sizes are
            wanted = kind(**settings).state_dict()
        check_shapes(wanted, shapes)
        module = kind(**settings)
        weights = load_file(weights_file)
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise ValueError("its weights are not finite")
        module.load_state_dict(weights, strict=True)
    except Exception as error:
        raise damaged_teacher(name, error) from error
    return module


def find_generation(name, settings):
    """Generation of a config.json. Raises UserError where it is another kind of model."""
    keys = set(settings) if isinstance(settings, dict) else set()
    fitting = [generation for generation in GENERATIONS if generation.config_keys <= keys]
    if not fitting:
        raise UserError(
            "{}: another kind of model, not a MOIRAI such as Salesforce/moirai-1.1-R-base", name
        )
    return max(fitting, key=lambda generation: len(generation.config_keys))


def check_settings(name, settings):
    """Raise UserError unless a config.json holds plain numbers in their ranges."""
    for key, value in settings.items():
        if key == "distr_output":  # `build_distribution` looks at it
            continue
        if key in LISTS:
            kind, low, high = LISTS[key]
            items = value if isinstance(value, list) and len(value) <= MOST_ITEMS else [None]
        elif key in SETTINGS:
            kind, low, high = SETTINGS[key]
            items = [value]
        else:
            raise UserError("{}: config.json has {}, which no MOIRAI has", name, repr(key[:60]))
        if not all(is_between(item, kind, low, high) for item in items):
            raise UserError(
                "{}: {} in config.json is {}; it must be {} from {} to {}",
                *(name, key, repr(str(value)[:60]), kind.__name__, low, high),
            )


def is_between(value, kind, low, high):
    """Whether a value of a JSON file is of a kind, and in a range."""
    is_right = type(value) is kind or (kind is float and type(value) is int)
    return is_right and low <= value <= high


def build_distribution(name, config):
    """uni2ts's output distribution that a config.json asks for, by the exact name of its class.

    Nothing of the file reaches uni2ts's own decoder, which can be made to call any function.
    Raises UserError.
    """
    import uni2ts.distribution as package

    if isinstance(config, dict) and is_class(config.get("_target_"), package.MixtureOutput):
        components = config.get("components")
        is_list = isinstance(components, list) and 0 < len(components) <= MOST_ITEMS
        if is_list and set(config) == {"_target_", "components"}:
            return package.MixtureOutput([build_component(name, part) for part in components])
    return build_component(name, config)


def build_component(name, config):
    """A single output distribution, as for `build_distribution`."""
    import uni2ts.distribution as package

    if isinstance(config, dict):
        for kind, setting in DISTRIBUTIONS.items():
            if not is_class(config.get("_target_"), getattr(package, kind)):
                continue
            numbers = {key: value for key, value in config.items() if key != "_target_"}
            is_known = set(numbers) <= {setting}
            if is_known and all(is_between(value, float, 1e-6, 1e6) for value in numbers.values()):
                return getattr(package, kind)(**numbers)
    raise UserError(
        "{}: distr_output in config.json is no output distribution of uni2ts; refused ({})",
        *(name, json.dumps(config)[:99]),
    )


def is_class(target, kind):
    """Whether a name in a config.json is that of a class."""
    return target in (f"{kind.__module__}.{kind.__name__}", f"uni2ts.distribution.{kind.__name__}")


# -- A forecaster of the user's --------------------------------------------------------------------

# What stands in a manifest for a teacher that has no patches, and takes no flags.
NO_PATCHES = 1
OWN_POINT = "its own point"


class OwnForecaster:
    """A forecaster of the user's: a Python file that defines `forecast(context, horizon)`.

    Its function takes contexts (B, L), a float32 array in the units of the series, and the number
    of steps H. It gives (B, H), or (B, 9, H) at the quantile levels 0.1, 0.2 ... 0.9. The file may
    state its LICENCE and a VERSION, texts both; labels are made anew where its text or its VERSION
    is another. Raises UserError where the file cannot be run, or has no such function.
    """

    device = torch.device("cpu")  # of what it gives; it may use what it likes
    precision = "32"

    def __init__(self, name):
        self.path = user_path(name)
        source = self.path.read_bytes()
        names = self.run(source)
        if not callable(names.get("forecast")):
            raise UserError("{}: it defines no function forecast(context, horizon)", self.path)
        self.function = names["forecast"]
        self.dimensions = None  # of what it gave: 2 are points, 3 are quantiles
        self.licence = str(names.get("LICENCE", f"see {self.path.name}"))
        digest = hashlib.sha256(source)
        if "VERSION" in names:
            digest.update(str(names["VERSION"]).encode())
        self.fingerprint = digest.hexdigest()

    def run(self, source):
        """The names that the file defines when it is run."""
        module = types.ModuleType(f"forecaster_{self.path.stem}")
        module.__file__ = str(self.path)
        sys.modules[module.__name__] = module  # dataclasses and pickles look their module up
        folder = str(self.path.resolve().parent)
        if folder not in sys.path:
            sys.path.append(folder)  # for the modules beside it
        try:
            exec(compile(source, str(self.path), "exec"), vars(module))
        except (Exception, SystemExit) as error:
            raise self.failure(error) from error
        return vars(module)

    def failure(self, error):
        """UserError that says where in the file something was raised."""
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(self.path)
        ]
        if isinstance(error, SyntaxError) and error.filename == str(self.path):
            lines.append(error.lineno)
        text = " ".join(str(error).split())[:200]
        line = lines[-1] if lines else "?"
        return UserError("{}, line {}: {}: {}", self.path, line, type(error).__name__, text)

    def patch_sizes(self, context_length, horizon):
        """As a MOIRAI's."""
        return [NO_PATCHES]

    def forecast(self, context, horizon):
        """What the user's function gives for contexts (B, L): (B, H) or (B, 9, H), float64.

        Quantiles are put in order. Raises UserError where it is anything else, or not finite.
        """
        try:
            given = self.function(context, horizon)
        except (Exception, SystemExit) as error:
            raise self.failure(error) from error
        try:
            values = np.asarray(given, np.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(given).__name__
            raise UserError(
                "{}: forecast gave a {}, which is no array of numbers", self.path, kind
            ) from error
        shapes = [(len(context), horizon), (len(context), len(LEVELS), horizon)]
        if values.shape not in shapes:
            raise UserError(
                "{}: forecast gave the shape {} for contexts {}; {} or {} is expected",
                *(self.path, values.shape, context.shape, *shapes),
            )
        if self.dimensions not in (None, values.ndim):
            raise UserError(
                "{}: forecast gave quantiles for some contexts, and points for others", self.path
            )
        self.dimensions = values.ndim
        is_finite = np.isfinite(values).reshape(len(values), -1).all(1)
        if not is_finite.all():
            raise UserError(
                "{}: forecast gave a value that is not finite, for {} of {} contexts",
                *(self.path, int((~is_finite).sum()), len(values)),
            )
        return np.sort(values, axis=1) if values.ndim == 3 else values

    def answer_windows(self, windows, index):
        """Answer in the windows' units about b windows; without quantiles if the file has none."""
        context, _, _ = windows.batch(index)
        mean, deviation = windows.units_of(index)
        in_units = context.numpy() * deviation + mean
        values = self.forecast(in_units.astype(np.float32), windows.horizon)
        if values.ndim == 2:
            points = (values - mean) / deviation
            return Answer(torch.from_numpy(points).float(), None)
        scaled = (values - mean[..., None]) / deviation[..., None]
        quantiles = torch.from_numpy(scaled).float()  # (b, 9, H)
        return Answer(quantiles[:, MIDDLE], quantiles)

    def has_quantiles(self, windows):
        """Whether the file gives quantiles: it is asked about the first window."""
        return self.answer_windows(windows, np.arange(1)).quantiles is not None


@functools.cache
def own_forecaster(name):
    """The OwnForecaster of a file, which runs once."""
    return OwnForecaster(name)


def is_own_file(name):
    """Whether a teacher's name is that of a Python file of the user's.

    A hub id may end like one: what has the form of a hub id must be there.
    """
    return name.endswith(".py") and (user_path(name).is_file() or not is_hub_id(name))


# == Labels ========================================================================================
#
# A label is the teacher's forecast of a window. A label file is a folder in the cache, named by a
# hash of all that its labels depend on; it holds manifest.json (what, by whom, how), labels.bin
# (the points) and, where they are asked for, quantiles.bin. What one holds does not depend on
# whether the other is there.


@dataclasses.dataclass
class LabelTask:
    """Which labels are asked for, and what it takes to make them."""

    windows: Windows  # to be labelled
    judged_on: Windows  # training windows that choose the teacher's patch size
    request: TeacherRequest
    load: Callable[[], Teacher]  # called only where labels have to be made
    baselines: dict  # name -> naive forecast, which stand beside the teacher


@dataclasses.dataclass
class WindowLabels:
    """The labels of b windows, in the windows' units."""

    points: np.ndarray  # (b, H) float32
    quantiles: np.ndarray | None  # (b, 9, H) float32, where they were asked for
    deviation: np.ndarray  # (b, 1) float64, of the contexts: the unit in which quantiles are kept


@dataclasses.dataclass
class BlockFile:
    """An array of a row for each of W windows, in a file that is written block by block.

    FOLDER/NAME.bin holds all blocks, then a sha256 of each; until it is made, each block lies in a
    file of its own, FOLDER/BLOCKS/NUMBER.bin, followed by its sha256. Two runs write the same bytes
    into a block, so no lock is needed.
    """

    path: Path  # FOLDER/NAME.bin
    blocks: Path  # FOLDER/BLOCKS
    kind: str  # of its numbers, as numpy names it
    shape: tuple  # of a row
    windows: int  # W
    block: int  # windows in a block

    @property
    def count(self):
        """Number of blocks."""
        return math.ceil(self.windows / self.block)

    @property
    def row(self):
        """Bytes of a row."""
        return np.dtype(self.kind).itemsize * math.prod(self.shape)

    def index(self, number):
        """The windows of a block."""
        first = number * self.block
        return np.arange(first, min(self.windows, first + self.block))

    def block_path(self, number):
        """Where a block lies before all of them are joined."""
        return self.blocks / f"{number:08d}.bin"

    def read(self, number):
        """Bytes of a block, from its own file or from the joined one, if they fit their sha256.

        None where there are none.
        """
        size = self.row * len(self.index(number))
        places = (  # (file, where the block is, where its sha256 is)
            (self.block_path(number), 0, size),
            (self.path, self.row * self.block * number, self.row * self.windows + 32 * number),
        )
        for path, block_at, sha256_at in places:
            if not path.is_file():
                continue
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                file.seek(block_at)
                content = file.read(size)
                file.seek(sha256_at)
                sha256 = file.read(32)
                if len(content) == size and hashlib.sha256(content).digest() == sha256:
                    return content
        return None

    def write(self, number, rows):
        """Keep the rows of a block, unless another run has joined all blocks meanwhile."""
        content = np.ascontiguousarray(rows, self.kind).tobytes()
        try:
            with atomic(self.block_path(number)) as file:
                file.write(content)
                file.write(hashlib.sha256(content).digest())
        except UserError:  # it clears the blocks, perhaps while this one is written
            if self.read(number) is None:
                raise

    def made(self):
        """Numbers of the blocks that are made.

        Only those are looked at that can be there, as a manifest may say anything.
        """
        forms = [re.fullmatch(r"(\d{8,18})\.bin", name) for name in listed(self.blocks)]
        there = {int(form[1]) for form in forms if form}
        if self.path.is_file():
            checksums = self.path.stat().st_size - self.row * self.windows  # bytes
            there.update(range(min(self.count, checksums // 32)))
        return [n for n in sorted(there) if n < self.count and self.read(n) is not None]

    def share_there(self):
        """Share of the blocks that are there by their sizes; none is read, as they may be many."""
        if self.path.is_file():
            checksums = self.path.stat().st_size - self.row * self.windows  # bytes
            return min(self.count, max(0, checksums // 32)) / self.count
        largest = self.row * self.block + 32  # bytes
        there = 0
        for name in listed(self.blocks):
            path = self.blocks / name
            is_block = re.fullmatch(r"\d{8,18}\.bin", name) and path.is_file()
            if is_block and 32 < path.stat().st_size <= largest:
                there += 1
        return min(1.0, there / self.count)

    def join(self):
        """Make one file of the blocks, where there are any."""
        if not self.blocks.is_dir():
            return
        checksums = []
        with atomic(self.path) as file:
            for number in range(self.count):
                content = self.read(number)
                if content is None:
                    raise removed(self.path.parent)
                file.write(content)
                checksums.append(hashlib.sha256(content).digest())
            file.write(b"".join(checksums))
        shutil.rmtree(self.blocks, ignore_errors=True)

    def open(self):
        """The array (W, ...), mapped into memory."""
        return np.memmap(self.path, self.kind, "r", shape=(self.windows, *self.shape))


class LabelFile:
    """Labels of W windows: points (W, H) float32 in the windows' units, and perhaps quantiles.

    A quantile is kept as its distance from the point, in deviations of the window's context, a
    float16: its rounding is far below the error of a quantile of 100 samples.
    """

    def __init__(self, folder, manifest, with_quantiles=False):
        self.folder = Path(folder)
        self.manifest = manifest
        self.windows = manifest["key"]["windows"]
        self.horizon = manifest["key"]["horizon"]
        self.points = self._part("labels", "blocks", "<f4", (self.horizon,))
        self.quantiles = None
        if with_quantiles:
            shape = (len(LEVELS), self.horizon)
            self.quantiles = self._part("quantiles", "quantile_blocks", "<f2", shape)
        self.array = None  # points (W, H), once the file is opened
        self.offsets = None  # quantiles minus points (W, 9, H), in deviations of the contexts
        self.damaged = 0  # windows with a label that is not finite

    def _part(self, name, blocks, kind, shape):
        place = self.folder / f"{name}.bin"
        block = self.manifest["block"]
        return BlockFile(place, self.folder / blocks, kind, shape, self.windows, block)

    @property
    def parts(self):
        """The BlockFiles that are asked for."""
        return [self.points, self.quantiles] if self.quantiles else [self.points]

    @property
    def megabytes(self):
        """What all of it takes."""
        return 1e-6 * self.windows * sum(part.row for part in self.parts)

    def write(self, number, labels):
        """Keep the WindowLabels of a block. Points that are there stay as they are.

        Raises UserError where the folder was removed; that quantiles are added to it does no harm.
        """
        there = read_manifest(self.folder) or {}
        if there | {"quantiles": None} != self.manifest | {"quantiles": None}:
            raise removed(self.folder)
        known = self.points.read(number)
        if known is None:
            self.points.write(number, labels.points)
            known = self.points.read(number)
        if self.quantiles:
            points = np.frombuffer(known, self.points.kind).reshape(-1, self.horizon)
            distance = labels.quantiles - points[:, None].astype(np.float64)
            offsets = torch.from_numpy(distance / labels.deviation[..., None]).half()
            self.quantiles.write(number, offsets.numpy())

    def made(self):
        """Numbers of the blocks of which all parts are made."""
        made = set(self.points.made())
        if self.quantiles:
            made &= set(self.quantiles.made())
        return sorted(made)

    def missing(self):
        """Numbers of the blocks that are yet to be made."""
        made = set(self.made())
        return [number for number in range(self.points.count) if number not in made]

    @property
    def is_whole(self):
        return len(self.made()) == self.points.count

    def join(self):
        """Make one file of the blocks of each part, where there are any."""
        for part in self.parts:
            part.join()

    def share_there(self):
        """Share of the blocks that are there by their sizes, of the part that has fewest."""
        return min(part.share_there() for part in self.parts)

    def open(self):
        """Map the parts into memory and count the damaged windows. Returns self."""
        self.array = self.points.open()
        if self.quantiles:
            self.offsets = self.quantiles.open()
        self.damaged = 0
        for first in range(0, self.windows, 8192):
            is_finite = np.isfinite(self.array[first : first + 8192]).all(axis=1)
            self.damaged += int((~is_finite).sum())
        return self

    def batch(self, index):
        """(labels (B, H) float32, finite (B, 1) float32) of windows; 0 where one is not finite."""
        labels = torch.from_numpy(np.array(self.array[index]))
        is_finite = labels.isfinite().all(1, keepdim=True)
        return torch.where(is_finite, labels, 0.0), is_finite.float()

    def quantile_batch(self, index, context):
        """(quantiles (B, 9, H) float32, finite (B, 1) float32) of windows with these contexts.

        0 where one is not finite.
        """
        points = torch.from_numpy(np.array(self.array[index], np.float64))
        offsets = torch.from_numpy(np.array(self.offsets[index], np.float64))
        _, deviation, _ = own_scale(context.double())
        quantiles = points[:, None] + offsets * deviation[..., None]
        is_finite = quantiles.isfinite().all(2).all(1, keepdim=True)
        return torch.where(is_finite[..., None], quantiles, 0.0).float(), is_finite.float()


# -- The key ---------------------------------------------------------------------------------------


def label_key(task, weights):
    """All that the labels of a task depend on; `weights` is the teacher's fingerprint or None."""
    request = task.request
    facts = {
        "data": task.windows.digest,
        "windows": len(task.windows),
        "context": task.windows.context_length,
        "horizon": task.windows.horizon,
        "patch": request.teacher_patch_size,
        "point": point_in_key(request.teacher_point, request.num_samples),
        "samples": request.num_samples if request.teacher_point == "median" else None,
        "weights": weights,
        "format": FORMAT,
    }
    if is_own_file(request.teacher_model):  # which knows nothing of these flags
        facts |= {"patch": "auto", "point": OWN_POINT, "samples": None}
    return {name: facts[name] for name in LABEL_KEY}


def point_in_key(point, samples):
    """The fact "point" of a label key, of --teacher_point and --num_samples.

    The median of an even number of samples has a name of its own: earlier versions called the lower
    of the two middle ones "median", and such labels must not be used again.
    """
    if point == "median" and samples % 2 == 0:
        return "median (mean of the middle two)"
    return point


def key_folder(cache, key):
    """Folder of the labels with this key."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return Path(cache, name)


def read_manifest(folder):
    """The manifest (dict) of a label folder, or None where there is none that can be used."""
    try:
        manifest = read_json(folder / "manifest.json")
    except (OSError, ValueError):
        return None
    needed = MANIFEST.keys() - {"quantiles"}
    is_right = not misfit(manifest, MANIFEST) and manifest.keys() >= needed
    if not is_right or not set(manifest["key"]) >= set(LABEL_KEY):
        return None
    is_its_own = key_folder(folder.parent, manifest["key"]) == folder
    return manifest if is_its_own else None


def has_quantiles(manifest):
    """Whether a manifest says that its labels have the quantiles of this version."""
    return tuple(manifest.get("quantiles") or ()) == LEVELS


def is_label_cache(folder):
    """Whether a folder holds label files of this program."""
    try:
        return any(read_manifest(path) for path in user_path(folder).glob("*/"))
    except UserError:  # in the home folder of somebody who is not known here
        return False


def find_labels(task):
    """A whole LabelFile of a task in the cache, or None.

    Where the teacher's weights are not at hand, its name decides: labels may be carried. Then
    nobody could make quantiles that they do not have, and their points are taken.
    """
    request = task.request
    cache = user_path(request.label_cache)
    weights = fingerprint(request.teacher_model, request.teacher_revision)
    key = label_key(task, weights)
    loose = {}  # facts of the key that do not matter
    if not weights:
        loose = {"weights": None}
    elif request.teacher_point == "median" and not draws_samples(
        request.teacher_model, request.teacher_revision
    ):
        loose = {"point": None, "samples": None}
    folders = [key_folder(cache, key)]
    if loose:  # the exact one first
        folders += sorted(cache.glob("*"))
    found = []
    for folder in folders:
        manifest = read_manifest(folder)
        if not manifest or manifest["key"] | loose != key | loose:
            continue
        if not set(task.windows.freqs) <= manifest["patch_sizes"].keys():
            continue
        if not weights and not is_of_teacher(manifest, request):
            continue
        file = LabelFile(folder, manifest, request.with_quantiles and has_quantiles(manifest))
        if not weights and file.quantiles and not file.is_whole:
            file = LabelFile(folder, manifest)
        could_be_made = weights and lacks_quantiles(file, request)
        if file.is_whole and not could_be_made:
            found.append(file)
    if len({file.manifest["key"]["weights"] for file in found}) > 1:
        raise UserError(
            "{} holds labels of several teachers named {}; put its weights at hand",
            *(cache, request.teacher_model),
        )
    found.sort(key=lambda file: file.quantiles is None)
    return found[0] if found else None


def lacks_quantiles(file, request):
    """Whether a LabelFile has no quantiles that are asked for, though its teacher may give them."""
    may_give_them = file.manifest.get("quantiles") != []
    return request.with_quantiles and not file.quantiles and may_give_them


def draws_samples(name, revision):
    """Whether the median of a teacher that is at hand is one of samples.

    A MOIRAI 2.0 gives its quantiles: with other --num_samples its labels are the same. So are those
    of a forecaster of the user's.
    """
    if is_own_file(name):
        return False
    try:
        settings = read_json(model_file(name, revision, "config.json"))
    except ValueError:  # damaged: told where it is loaded
        return True
    return find_generation(name, settings).package != "moirai2"


def is_of_teacher(manifest, request):
    """Whether labels were made by a teacher of the name that is asked for, in that revision."""
    is_named_so = last_part(manifest["teacher"]) == last_part(request.teacher_model)
    revisions = (None, manifest["revision"], manifest["commit"])
    return is_named_so and request.teacher_revision in revisions


# -- Making labels ---------------------------------------------------------------------------------


def label_windows(teacher, windows, index, request, seed):
    """WindowLabels of windows, a function of the arguments alone.

    The random numbers are those of `seed`, whatever was drawn before, and others are not disturbed.
    """
    gpus = [teacher.device] if teacher.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        if isinstance(teacher, OwnForecaster):
            answer = teacher.answer_windows(windows, index)
        else:
            answer = answer_by_size(teacher, windows, index, request)
    context, _, _ = windows.batch(index)
    _, deviation, _ = own_scale(context.double())
    quantiles = answer.quantiles
    if quantiles is not None:
        quantiles = quantiles.numpy() if request.with_quantiles else None
    return WindowLabels(answer.points.numpy(), quantiles, deviation.numpy())


def answer_by_size(teacher, windows, index, request):
    """Answer of a Teacher about windows, by the patch size of each frequency."""
    context, _, _ = windows.batch(index)
    freqs = windows.freq_of(index)
    sizes = torch.tensor([request.teacher_patch_size[freq] for freq in freqs])
    asked = Question(
        horizon=windows.horizon,
        patch_size=0,  # of each frequency its own
        point=request.teacher_point,
        samples=request.num_samples,
        with_quantiles=request.with_quantiles,
    )
    points = torch.empty(len(index), windows.horizon)
    quantiles = torch.empty(len(index), len(LEVELS), windows.horizon)
    for size in sizes.unique().tolist():
        rows = sizes == size
        answer = teacher.answer(context[rows], dataclasses.replace(asked, patch_size=size))
        points[rows] = answer.points
        if asked.with_quantiles:
            quantiles[rows] = answer.quantiles
    return Answer(points, quantiles if asked.with_quantiles else None)


def choose_patch_sizes(teacher, task, voice):
    """(frequency -> patch size that is chosen, seconds that it takes per window).

    With `auto` it is the size with the lowest error on a sample of training windows. The errors of
    naive forecasts are printed beside the teacher's, and a teacher that is worse is warned of.
    """
    windows = task.judged_on
    asked = asked_patch_sizes(teacher, windows, task.request)
    chosen = {}
    seconds = 0.0
    for freq, sizes in asked.items():
        member, index = sample_of(windows, freq)
        _, truth, observed = windows.batch(index)
        naive = naive_errors(task.baselines, windows, index)
        errors_of = {}
        took = {}
        for size in sizes:
            request = dataclasses.replace(
                task.request, teacher_patch_size={freq: size}, quantiles="off"
            )
            began = time.perf_counter()
            labels = label_windows(teacher, windows, index, request, seed=0)
            took[size] = (time.perf_counter() - began) / len(index)
            errors_of[size] = observed_mse(torch.from_numpy(labels.points), truth, observed)

        chosen[freq] = best_size(errors_of)
        seconds += took[chosen[freq]] * len(member) / len(windows)
        named = {f"patch {size}": error for size, error in errors_of.items()}
        if isinstance(teacher, OwnForecaster):
            named = {"teacher": errors_of[NO_PATCHES]}
        tell_errors(freq, len(index), naive | named, voice)
        warn_of_bad_teacher(freq, naive, errors_of[chosen[freq]], voice)
    return chosen, seconds


def tell_cached_errors(labels, task, voice):
    """Say how good the labels of a cache hit are, as it was said when they were made."""
    windows = task.windows
    for freq in sorted(set(windows.freqs)):
        _, index = sample_of(windows, freq)
        _, truth, observed = windows.batch(index)
        naive = naive_errors(task.baselines, windows, index)
        label, is_finite = labels.batch(index)
        error = observed_mse(label, truth, observed * is_finite)
        tell_errors(freq, len(index), naive | {"teacher": error}, voice)
        warn_of_bad_teacher(freq, naive, error, voice)


def sample_of(windows, freq):
    """(all windows of a frequency, at most JUDGED_WINDOWS of them, spread evenly), as indices."""
    member = np.flatnonzero(windows.freq_of(np.arange(len(windows))) == freq)
    count = min(JUDGED_WINDOWS, len(member))
    return member, member[np.linspace(0, len(member) - 1, count).astype(np.int64)]


def naive_errors(baselines, windows, index):
    """Name -> mean squared error of each naive forecast of windows."""
    context, truth, observed = windows.batch(index)
    found = {}
    for name, naive_forecast in baselines.items():
        forecast = naive_forecast(context, windows.season(index), windows.horizon)
        found[name] = observed_mse(forecast, truth, observed)
    return found


def warn_of_bad_teacher(freq, naive, error, voice):
    """Warn where the teacher's error is not below those of all naive forecasts (name -> error)."""
    if not error <= min(naive.values()):
        voice.warn(
            "at step {} the teacher is worse than a naive forecast; labels may do harm", freq or "?"
        )


def asked_patch_sizes(teacher, windows, request):
    """frequency -> patch sizes that may be taken. Raises UserError where the teacher has none."""
    sizes = teacher.patch_sizes(windows.context_length, windows.horizon)
    asked = request.teacher_patch_size
    found = {}
    for freq in sorted(set(windows.freqs)):
        size = asked.get(freq, "auto") if isinstance(asked, dict) else asked
        found[freq] = sizes if size == "auto" else [size]
        if not sizes or not set(found[freq]) <= set(sizes):
            raise UserError(
                "--teacher_patch_size {}: with these lengths the teacher takes {}",
                *(str(asked), str(sizes) if sizes else Message("none")),
            )
    return found


def observed_mse(forecast, truth, observed):
    """Mean squared error of a forecast (B, H) over the observed points."""
    return float(((forecast - truth) ** 2 * observed).sum() / observed.sum())


def best_size(errors_of):
    """The patch size with the lowest error; one that is not finite is the highest."""

    def rank(size):
        return errors_of[size] if math.isfinite(errors_of[size]) else math.inf

    return min(errors_of, key=rank)


def tell_errors(freq, count, errors_of, voice):
    """Print the errors (name -> MSE) on a sample of windows of one frequency."""
    facts = [Message("{} {:.4f}", (name, error)) for name, error in errors_of.items()]
    voice.say("MSE on {} windows of step {}: {}", count, freq or "?", linked(facts, ", "))


def begin_labels(folder, task, teacher, weights, job):
    """Write the manifest of a new label file, unless one is begun."""
    windows = task.windows
    old = read_manifest(folder)
    fitting = teacher.patch_sizes(windows.context_length, windows.horizon)
    if old and all(old["patch_sizes"].get(freq) in fitting for freq in windows.freqs):
        add_quantiles_to(old, folder, task, teacher, job.voice)
        return
    if (folder / "manifest.json").exists():  # a damaged one
        shutil.rmtree(folder, ignore_errors=True)
    patch_sizes, seconds = choose_patch_sizes(teacher, task, job.voice)

    request = task.request
    commit, licence = commit_and_licence(teacher, request)
    manifest = {
        "key": label_key(task, weights),
        "block": request.teacher_batch_size,
        "patch_sizes": patch_sizes,
        "quantiles": levels_of(teacher, task),
        "teacher": request.teacher_model,
        "revision": request.teacher_revision,
        "commit": commit,
        "licence": licence,
        "device": str(teacher.device),
        "precision": teacher.precision,
        "torch": str(torch.__version__),
        "made": time.strftime("%F %T"),
    }
    write_manifest(folder, manifest, replace=False)  # where two runs begin at once: the first's

    if not isinstance(teacher, OwnForecaster):
        sizes = ", ".join(f"{freq or '?'}: {size}" for freq, size in patch_sizes.items())
        job.voice.say("Patch size: {}", sizes)
    blocks = math.ceil(len(windows) / request.teacher_batch_size)
    minutes = seconds * len(windows) / min(job.world_size, blocks) / 60  # whole blocks each
    job.voice.say(
        "Labelling {:,} windows, {:.1f} MB, about {:.1f} min",
        len(windows),
        LabelFile(folder, manifest, request.with_quantiles).megabytes,
        minutes,
    )


def commit_and_licence(teacher, request):
    """(commit on the hub or None, licence) of a teacher."""
    name = request.teacher_model
    if isinstance(teacher, OwnForecaster):
        return None, teacher.licence
    snapshot = model_file(name, request.teacher_revision, "config.json").parent
    commit = snapshot.name if snapshot.parent.name == "snapshots" else None
    if name.lower().startswith("salesforce/"):
        return commit, "CC-BY-NC-4.0, for non-commercial use only"
    return commit, f"see {name}"


def levels_of(teacher, task):
    """What a manifest says of quantiles: their levels, [] if the teacher has none, None unasked."""
    if not task.request.with_quantiles:
        return None
    if isinstance(teacher, OwnForecaster) and not teacher.has_quantiles(task.windows):
        return []
    return list(LEVELS)


def add_quantiles_to(manifest, folder, task, teacher, voice):
    """Say how labels that are begun are gone on with; they get quantiles where these are wanted."""
    is_whole = LabelFile(folder, manifest).is_whole
    if not task.request.with_quantiles or not is_whole:
        voice.note("going on with the unfinished labels in {}", folder)
    else:
        voice.note(
            "the labels in {} hold no quantiles: the teacher is asked again for these"
            " (--quantiles off does without)",
            folder,
        )
    if task.request.with_quantiles and not has_quantiles(manifest):
        manifest = manifest | {"quantiles": levels_of(teacher, task)}
        write_manifest(folder, manifest, replace=True)


def write_manifest(folder, manifest, replace):
    """Write manifest.json, unless one is there that is not to be replaced."""
    with atomic(folder / "manifest.json", replace=replace) as file:
        file.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode())


def get_labels(task, job):
    """LabelFile of a task: from the cache, or made by its teacher, shared by all processes.

    Raises Interrupted between two blocks; the whole ones stay.
    """
    cached = job.on_rank_zero(lambda: find_labels(task))
    if cached:
        job.voice.say("Label cache hit, no teacher call: {}", cached.folder)
        if lacks_quantiles(cached, task.request):
            job.voice.note(
                "these labels hold no quantiles, and the teacher's weights are not at hand:"
                " quantiles are learned from truth alone"
            )
    file = cached or make_labels(task, job)
    job.on_rank_zero(file.join)
    labels = file.open()
    if cached:
        tell_cached_errors(labels, task, job.voice)
    return labels


def make_labels(task, job):
    """LabelFile whose blocks are all made, by this run or another one."""
    request = task.request
    cache = user_path(request.label_cache)
    if problem := unwritable(cache):
        raise UserError("--label_cache: {}, and the labels are not in it", problem)
    loaded = []
    job.on_rank_zero(lambda: loaded.append(task.load()))  # it may have to fetch it for all
    teacher = loaded[0] if loaded else task.load()
    weights = fingerprint(request.teacher_model, request.teacher_revision)
    folder = key_folder(cache, label_key(task, weights))
    job.on_rank_zero(lambda: begin_labels(folder, task, teacher, weights, job))
    manifest = read_manifest(folder)
    if manifest is None:  # that of another program's folder, or a link, which stays
        raise UserError(
            "{}: its manifest cannot be used, nor be replaced; remove this folder", folder
        )
    file = LabelFile(folder, manifest, request.with_quantiles and has_quantiles(manifest))
    for place in (folder, *[part.blocks for part in file.parts]):
        job.on_rank_zero(functools.partial(remove_leftovers, place))
    request = dataclasses.replace(request, teacher_patch_size=file.manifest["patch_sizes"])
    missing = job.on_rank_zero(file.missing)
    total = sum(len(file.points.index(number)) for number in missing)
    news = News(total)
    with job.stop.hold(), job.voice.bar("labelling", total=total, unit="window") as bar:
        for first in range(0, len(missing), job.world_size):
            turn = missing[first : first + job.world_size]  # of blocks, one for each process
            if job.rank < len(turn):
                number = turn[job.rank]
                index = file.points.index(number)
                labels = label_windows(teacher, task.windows, index, request, number)
                file.write(number, labels)
            labelled = sum(len(file.points.index(number)) for number in turn)
            bar.update(labelled)
            if bar.disable:  # a log has no bar
                news.tell(labelled, job.voice)
            if signum := job.signal():
                job.voice.note("the labels made so far are kept in {}", file.folder)
                raise Interrupted(signum)
    return file


class News:
    """Says now and then how many windows are labelled."""

    def __init__(self, total):
        self.total = total
        self.done = 0
        self.began = self.told = time.monotonic()

    def tell(self, more, voice):
        """Take note of more windows; say where it stands, if that is long ago."""
        self.done += more
        now = time.monotonic()
        if now - self.told < NEWS_EVERY or self.done == self.total:
            return
        self.told = now
        minutes = (now - self.began) / self.done * (self.total - self.done) / 60
        voice.note(
            "labelled {:,} of {:,} windows, about {:.0f} min to go",
            *(self.done, self.total, minutes),
        )


# == Training ======================================================================================


@dataclasses.dataclass
class TrainConfig:
    """The flags of the training group that the loop reads."""

    alpha: float
    batch_size: int
    num_epochs: int
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    augment: str  # "on" or "off"
    patience: int
    seed: int
    save_dir: str  # as it was typed, to be told


@dataclasses.dataclass
class Training:
    """What the loop is given."""

    windows: Windows
    validation: Windows
    labels: object  # a label file of the windows; None where alpha is 0
    config: TrainConfig
    facts: dict  # go into every checkpoint as they are
    folder: Path  # where the run is kept
    parent: object = None  # OpenedStudent with whose weights it begins
    when_stopped: Message = Message("the same command with --resume goes on from here")


@dataclasses.dataclass
class Learner:
    """What learns, and what makes it learn."""

    student: nn.Module  # it is trained
    model: nn.Module  # the same student as Fabric runs it, on one or more processes
    average: nn.Module  # its weights' mean over the last steps: this one is validated and shipped
    optimizer: object  # AdamW as Fabric runs it
    scheduler: object

    def parts(self):
        """name in a checkpoint -> what is saved and restored under it."""
        return {
            "model_state_dict": self.average,  # what `open_student` reads
            "training_state_dict": self.student,
            "optimizer_state_dict": self.optimizer.optimizer,
            "scheduler_state_dict": self.scheduler,
        }


@dataclasses.dataclass
class Batch:
    """The windows of one step, a row each."""

    context: torch.Tensor  # (B, L)
    truth: torch.Tensor  # (B, H)
    observed: torch.Tensor  # (B, H), 0 where the truth is missing or filled
    label: torch.Tensor  # (B, H), the teacher's forecast; its quantiles (B, 9, H), for these
    weight: torch.Tensor  # (B, 1), alpha; 0 for a window without a label

    def map(self, change):
        """A batch of `change` of each tensor."""
        changed = {}
        for field in dataclasses.fields(self):
            changed[field.name] = change(getattr(self, field.name))
        return Batch(**changed)


# What each epoch of a run's history tells at least: it is drawn at the end.
HISTORY = {"epoch", "train_loss", "train_mse", "train_distill", "validation_mse"}


@dataclasses.dataclass
class Progress:
    """How far a run has come: all that --resume needs beside the weights.

    There is no random state: all chance is a function of (seed, epoch, step), see `seed_from`.
    """

    epoch: int = 0  # epochs that are done
    step: int = 0  # steps of the present epoch that are done
    sums: list = dataclasses.field(default_factory=lambda: [0.0] * 5)  # of the present epoch:
    # the four of `distillation_loss`, and observed points
    failed: int = 0  # steps in a row whose loss or gradient was not finite
    skipped: int = 0  # such steps of the present epoch
    history: list = dataclasses.field(default_factory=list)  # a dict of metrics for each epoch
    best_epoch: int = 0
    best_loss: float = math.inf
    best_file: str = ""
    since_best: int = 0  # epochs
    stopping: int = 0  # number of the signal that came

    def count(self, sums):
        """Add a step, with the five `sums` of it; they are None where it failed."""
        self.step += 1
        if sums is None:
            self.skipped += 1
            self.failed += 1
            return
        self.failed = 0
        for i, value in enumerate(sums):
            self.sums[i] += value


def seed_from(*facts):
    """A number, a function of `facts`, to seed by: a run goes on as if it had never stopped."""
    return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:7])


# -- One epoch -------------------------------------------------------------------------------------


def train_epoch(training, learner, progress, job):
    """Take the steps of one epoch from progress.step on; return early when a signal came."""
    config = training.config
    steps = math.ceil(len(training.windows) / config.batch_size)
    order = shuffled(len(training.windows), seed_from(config.seed, progress.epoch))
    description = f"epoch {progress.epoch + 1}"
    learner.model.train()
    with job.voice.bar(description, total=steps, initial=progress.step) as bar:
        while progress.step < steps and not progress.stopping:
            moment = (config.seed, progress.epoch, progress.step)
            first = progress.step * config.batch_size
            batch = read_batch(training, order[first : first + config.batch_size])
            batch = batch.map(job.fabric.to_device)
            if config.augment == "on":
                batch = augment(batch, seed_from(*moment))
            points = batch.observed.sum().clamp(min=1)  # of all processes

            torch.manual_seed(seed_from(*moment, job.rank))  # dropout
            sums = take_step(own_share(batch, job), points, config, learner, job)
            progress.stopping = job.signal()
            progress.count(sums)
            if sums is not None:
                update_average(learner, steps_done=progress.epoch * steps + progress.step)
            elif progress.failed >= MAX_FAILED:
                raise UserError(
                    "{} steps in a row with a non-finite loss or gradient in epoch {};"
                    " try a lower --learning_rate; the best checkpoint so far is kept",
                    *(MAX_FAILED, progress.epoch + 1),
                )
            bar.update()


def shuffled(count, seed):
    """The numbers 0 to count - 1 in a random order, a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator).numpy()


def read_batch(training, index):
    """Batch of windows, on the CPU."""
    context, truth, observed = training.windows.batch(index)
    if training.labels is None:
        label = torch.zeros_like(truth)
        weight = torch.zeros(len(index), 1)
    else:
        label, is_finite = training.labels.batch(index)
        weight = training.config.alpha * is_finite
    return Batch(context, truth, observed, label, weight)


def augment(batch, seed):
    """Each window plus a random share of another one, half of them mirrored; labels move along."""
    rows = len(batch.context)
    device = batch.context.device
    generator = torch.Generator().manual_seed(seed)  # of the CPU: the same on every device
    other = torch.randperm(rows, generator=generator).to(device)
    share = torch.rand(rows, 1, generator=generator).to(device)
    sign = 1 - 2 * torch.randint(2, (rows, 1), generator=generator).to(device)
    factor = sign / (1 + share**2).sqrt()  # keeps the deviation where the two are unrelated

    def mix(values):
        return factor * (values + share * values[other])

    return Batch(
        context=mix(batch.context),
        truth=mix(batch.truth),
        observed=batch.observed * batch.observed[other],
        label=mix(batch.label),
        weight=torch.minimum(batch.weight, batch.weight[other]),
    )


def own_share(batch, job):
    """This process's share of a batch."""
    is_left_out = len(batch.context) <= job.rank
    rows = slice(job.rank, None, job.world_size)
    if is_left_out:  # all processes must be in every step: it joins with a window that counts 0
        rows = slice(0, 1)
    share = batch.map(lambda values: values[rows])
    if is_left_out:
        share.observed = torch.zeros_like(share.observed)
    return share


def take_step(batch, points, config, learner, job):
    """Update the student by one share of a batch, of which `points` are observed in all.

    Returns what Progress counts: the sums of the loss over all processes, and the points. Returns
    None, and updates nothing, where loss or gradient is not finite on any process.
    """
    forecast = learner.model(batch.context)
    sums = distillation_loss(forecast, batch.truth, batch.observed, batch.label, batch.weight)
    learner.optimizer.zero_grad()
    # The mean over the whole batch: each process has the sum of its share, and the gradients are
    # averaged over the processes.
    job.fabric.backward(sums[0] * job.world_size / points)
    norm = job.fabric.clip_gradients(
        learner.model,
        learner.optimizer,
        max_norm=config.max_grad_norm,
        error_if_nonfinite=False,
    )
    # The only wait for the device in a step; several processes then wait for each other.
    *own_sums, norm, points = torch.cat([sums.detach(), torch.stack([norm, points])]).tolist()
    if job.largest(not all(map(math.isfinite, [*own_sums, norm]))):
        return None
    learner.optimizer.step()
    return [*job.sum(torch.tensor(own_sums, dtype=torch.float64)).tolist(), points]


def update_average(learner, steps_done):
    """Move the averaged weights towards the present ones (polynomial-decay averaging)."""
    share = AVERAGE_DECAY / (AVERAGE_DECAY + 1 + steps_done)
    means = list(learner.average.parameters())
    weights = [weight.detach() for weight in learner.student.parameters()]
    torch._foreach_lerp_(means, weights, share)  # all of them in one operation


# -- All epochs ------------------------------------------------------------------------------------


def fit(student, training, job, content=None):
    """Train a student. Returns the Progress at the end.

    The best checkpoint (by validation MSE against truth), last.pt and the metrics are left in
    training.folder. `content` is the last.pt to go on from.
    """
    learner = make_learner(student, training.config, job)
    progress = Progress()
    if content:
        try:
            progress = restore(learner, content)
        except Exception as error:  # whatever PyTorch raises for a state of something else
            last = training.folder / "last.pt"
            reason = " ".join(repr(error).split())[:199]
            raise UserError(
                "--resume: {}: damaged, or of another student ({})", last, reason
            ) from error

    config = training.config
    events = EventFile(training.folder / "tensorboard", progress.epoch + 1)
    save = functools.partial(save_run, training, learner, progress, job.voice)
    with job.stop.hold():
        job.on_rank_zero(lambda: training.folder.mkdir(parents=True, exist_ok=True))
        job.on_rank_zero(save)
        while progress.epoch < config.num_epochs and not is_out_of_patience(progress, config):
            began = time.perf_counter()
            job.voice.say("\nEpoch {}/{}", progress.epoch + 1, config.num_epochs)
            train_epoch(training, learner, progress, job)
            is_best = False
            if not progress.stopping:
                fit_share(learner.average, training.validation, job)
                forecast = forecaster(learner.average, training.validation.horizon, job)
                scores = score(forecast, training.validation, EVAL_BATCH, job)
                rate = learner.scheduler.get_last_lr()[0]
                is_best = end_epoch(progress, scores, rate)
                tell_epoch(progress, config, time.perf_counter() - began, job.voice)
                learner.scheduler.step(scores.mse)
                job.on_rank_zero(lambda: events.add(progress.history[-1]))
            job.on_rank_zero(functools.partial(save, is_best=is_best))
            if signum := job.signal():
                last = training.folder / "last.pt"
                job.voice.note("saved {}; {}", last, training.when_stopped)
                raise Interrupted(signum)
    return progress


def make_learner(student, config, job):
    """Learner of a student, on the job's device."""
    optimizer = torch.optim.AdamW(
        student.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=job.device.type in ("cpu", "cuda"),
    )
    model, set_up_optimizer = job.fabric.setup(student, optimizer)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=SCHEDULER_FACTOR, patience=SCHEDULER_PATIENCE
    )
    average = copy.deepcopy(student).requires_grad_(False)
    return Learner(student, model, average, set_up_optimizer, scheduler)


def restore(learner, content):
    """Progress of a checkpoint, from which what learns goes on.

    Of the optimizer and the scheduler, only numbers are taken. Raises ValueError, or what PyTorch
    raises, where something does not fit.
    """
    progress = Progress(**content["loop"])
    progress.stopping = 0
    lines = progress.history
    if len(lines) != progress.epoch or not all(line.keys() >= HISTORY for line in lines):
        raise ValueError("its history does not fit its epochs")

    learner.average.load_state_dict(content["model_state_dict"])
    learner.student.load_state_dict(content["training_state_dict"])
    optimizer = learner.optimizer.optimizer
    optimizer.load_state_dict(optimizer_state(optimizer, content["optimizer_state_dict"]))
    own = learner.scheduler.state_dict()
    saved = content["scheduler_state_dict"]
    for name, value in own.items():
        own[name] = like(saved.get(name, value), value)
    learner.scheduler.load_state_dict(own)
    return progress


def optimizer_state(optimizer, saved):
    """State dict of an AdamW that goes on with the moments and numbers of a saved one."""
    (own_group,) = optimizer.state_dict()["param_groups"]
    (saved_group,) = saved["param_groups"]
    for name in ("lr", "betas", "eps", "weight_decay"):
        own_group[name] = like(saved_group[name], own_group[name])

    weights = optimizer.param_groups[0]["params"]
    for number, moments in saved["state"].items():
        fits = moments["step"].ndim == 0 and all(
            moments[name].shape == weights[number].shape for name in ("exp_avg", "exp_avg_sq")
        )
        if not fits or not is_weights(moments):
            raise ValueError("its optimizer is of other weights")
    if saved["state"] and len(saved["state"]) != len(weights):
        raise ValueError("its optimizer is of other weights")
    return {"state": saved["state"], "param_groups": [own_group]}


def like(value, example):
    """A value, if it is of the kind of an example: a number, a text, or a list of numbers."""
    if isinstance(example, list | tuple):
        is_right = isinstance(value, list | tuple) and len(value) == len(example)
        is_right = is_right and all(map(is_real, value))
    elif isinstance(example, str):
        is_right = value == example
    else:
        is_right = value is None or is_real(value)
    if not is_right:
        raise ValueError(f"{reprlib.repr(value)} stands where {example!r} could")
    return value


@torch.inference_mode()
def fit_share(student, validation, job):
    """Set the share of the Transformer in a student's forecast to what fits validation best.

    Of 0 to 1, by least squares. A Transformer that has learnt by heart what training windows have
    alone has a small one; where all of it helps, it is 1.
    """
    if not getattr(student, "season", 0):  # the Transformer is all there is
        return
    sample = some_windows(validation, SHARE_WINDOWS)
    student.share.fill_(1.0)  # what is added is all of it
    forecast = forecaster(student, sample.horizon, job)
    sums = torch.zeros(2).double()  # of (Transformer * what the rest leaves, Transformer ** 2)
    own = np.arange(job.rank, len(sample), job.world_size)
    for first in range(0, len(own), EVAL_BATCH):
        index = own[first : first + EVAL_BATCH]
        context, truth, observed = sample.batch(index)
        without = student.seasonal_forecast(job.fabric.to_device(context)).cpu().double()
        added = (forecast(index, context).double() - without) * observed
        sums += torch.stack([(added * (truth - without)).sum(), (added**2).sum()])
    fitting, size = job.sum(sums).tolist()
    share = fitting / size if size else 1.0
    if math.isfinite(share):
        student.share.fill_(min(max(share, 0.0), 1.0))


def is_out_of_patience(progress, config):
    """Whether --patience ends the run."""
    return 0 < config.patience <= progress.since_best


def forecaster(student, horizon, job):
    """`forecast(index, context)` of a student, as `score` takes it."""

    @torch.inference_mode()
    def forecast(_index, context):
        student.eval()
        parts = job.fabric.to_device(context).split(FORWARD_BATCH)
        return torch.cat([student.points_ahead(part, horizon) for part in parts]).cpu()

    return forecast


def quantile_forecaster(student, horizon, job):
    """`forecast(index, context)` of a student's quantiles, as `score_quantiles` takes it."""

    @torch.inference_mode()
    def forecast(_index, context):
        student.eval()
        parts = job.fabric.to_device(context).split(FORWARD_BATCH)
        return torch.cat([student.quantiles_ahead(part, horizon) for part in parts]).cpu()

    return forecast


def student_answers(student, horizon, job):
    """`answer(index, context)` of a student, as `score_answers` takes it."""

    @torch.inference_mode()
    def answer(_index, context):
        parts = job.fabric.to_device(context).split(FORWARD_BATCH)
        answers = [student.ahead(part, horizon) for part in parts]
        points = torch.cat([points for points, _ in answers]).cpu()
        if not student.has_quantiles:
            return points, None
        return points, torch.cat([quantiles for _, quantiles in answers]).cpu()

    return answer


def end_epoch(progress, validation, learning_rate):
    """Close an epoch: add its metrics to the history. Returns whether it is the best so far."""
    blended, to_truth, to_label, labelled, points = progress.sums
    progress.epoch += 1
    progress.history.append(
        {
            "epoch": progress.epoch,
            "train_loss": blended / (points or math.nan),
            "train_mse": to_truth / (points or math.nan),
            "train_distill": to_label / labelled if labelled else None,
            "validation_mse": validation.mse,
            "validation_mae": validation.mae,
            "validation_mase": validation.mase,
            "learning_rate": learning_rate,
            "skipped_steps": progress.skipped,
        }
    )
    progress.step = 0
    progress.sums = [0.0] * 5
    progress.skipped = 0
    progress.since_best += 1
    if not validation.mse < progress.best_loss:
        return False
    progress.best_epoch = progress.epoch
    progress.best_loss = validation.mse
    progress.best_file = f"best_model_epoch_{progress.epoch}.pt"
    progress.since_best = 0
    return True


def tell_epoch(progress, config, seconds, voice):
    """Print the metrics of the epoch that has ended, and how long the rest will take."""
    line = progress.history[-1]
    distill = "-" if line["train_distill"] is None else f"{line['train_distill']:.4f}"
    voice.say(
        "Training loss: {:.4f} (MSE: {:.4f}, Distill: {})",
        line["train_loss"],
        line["train_mse"],
        distill,
    )
    voice.say("Validation loss: {:.4f}", line["validation_mse"])
    voice.say("Validation MAE: {:.4f}", line["validation_mae"])
    minutes = seconds * (config.num_epochs - line["epoch"]) / 60
    voice.say(
        "Learning rate: {:.1e}, {:.0f} s, {:.1f} min to go",
        line["learning_rate"],
        seconds,
        minutes,
    )
    if line["skipped_steps"]:
        voice.note(
            "{} steps with a non-finite loss or gradient were skipped", line["skipped_steps"]
        )


# -- Quantiles -------------------------------------------------------------------------------------
#
# They are learned when the point forecast is, beside the weights of the best epoch, which stay as
# they are. So nothing in the loop, no choice of a checkpoint and no point depends on them.


def learn_quantiles(student, training, steps, job):
    """Train the quantile head of a student, and nothing else, for some steps; then calibrate it.

    Returns its QuantileScores on validation windows. Raises Interrupted when a signal came.
    """
    head = student.quantile_head
    student.requires_grad_(False).eval()  # no dropout: it learns beside the forecasts as they are
    head.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=QUANTILE_RATE, weight_decay=training.config.weight_decay
    )
    model, set_up_optimizer = job.fabric.setup(student, optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    sample = some_windows(training.validation, QUANTILE_WINDOWS)
    best_loss = math.inf
    best_state = copy.deepcopy(head.state_dict())
    checks = {round(steps * (n + 1) / QUANTILE_CHECKS) for n in range(QUANTILE_CHECKS)}
    with job.stop.hold(), job.voice.bar("quantiles", total=steps) as bar:
        for step in range(steps):
            batch = own_share(read_quantiles(training, step), job)
            batch = batch.map(job.fabric.to_device)
            take_quantile_step(batch, model, set_up_optimizer, training.config, job)
            scheduler.step()
            if step + 1 in checks:
                forecast = quantile_forecaster(student, sample.horizon, job)
                scores = score_quantiles(forecast, sample, EVAL_BATCH, job)
                if scores.wql < best_loss:
                    best_loss = scores.wql
                    best_state = copy.deepcopy(head.state_dict())
            bar.update()
            if signum := job.signal():
                job.voice.note("quantiles are not learned yet; {}", training.when_stopped)
                raise Interrupted(signum)
    head.load_state_dict(best_state)
    return calibrate(student, training.validation, job)


def some_windows(windows, most):
    """Windows of at most `most` of them, spread evenly."""
    count = min(most, len(windows))
    return chosen_windows(windows, np.linspace(0, len(windows) - 1, count).astype(np.int64))


def chosen_windows(windows, index):
    """Windows of those at some places."""
    return dataclasses.replace(windows, starts=windows.starts[index], series=windows.series[index])


def read_quantiles(training, step):
    """Batch of windows for a step, with quantiles for labels; half of them are mirrored.

    They are never mixed, as quantiles of sums are not sums of quantiles.
    """
    config = training.config
    windows = training.windows
    epoch, place = divmod(step, math.ceil(len(windows) / config.batch_size))
    order = shuffled(len(windows), seed_from(config.seed, "quantiles", epoch))
    index = order[place * config.batch_size : (place + 1) * config.batch_size]
    context, truth, observed = windows.batch(index)
    label = torch.zeros(len(index), len(LEVELS), truth.shape[1])
    weight = torch.zeros(len(index), 1)
    if training.labels is not None and training.labels.offsets is not None:
        label, is_finite = training.labels.quantile_batch(index, context)
        weight = config.alpha * is_finite
    batch = Batch(context, truth, observed, label, weight)
    if config.augment == "on":
        batch = mirror(batch, seed_from(config.seed, "quantiles", epoch, place))
    return batch


def mirror(batch, seed):
    """A batch of quantiles of which half the windows are mirrored: the levels are reversed."""
    generator = torch.Generator().manual_seed(seed)
    is_mirrored = torch.randint(2, (len(batch.context), 1), generator=generator).bool()
    return Batch(
        context=torch.where(is_mirrored, -batch.context, batch.context),
        truth=torch.where(is_mirrored, -batch.truth, batch.truth),
        observed=batch.observed,
        label=torch.where(is_mirrored[..., None], -batch.label.flip(1), batch.label),
        weight=batch.weight,
    )


def take_quantile_step(batch, model, optimizer, config, job):
    """Update the quantile head by one batch, unless loss or gradient is not finite."""
    _, quantiles = model(batch.context, with_quantiles=True)
    loss = quantile_loss(quantiles, batch.truth, batch.observed, batch.label, batch.weight)
    points = float(job.sum(batch.observed.sum())) or 1.0  # of all processes
    optimizer.zero_grad()
    job.fabric.backward(loss * (job.world_size / points))
    norm = job.fabric.clip_gradients(
        model, optimizer, max_norm=config.max_grad_norm, error_if_nonfinite=False
    )
    if not job.largest(not torch.stack([loss, norm]).isfinite().all()):
        optimizer.step()


# What the steps between quantiles may be multiplied by.
FACTORS = torch.logspace(-2, 2, 401, base=2.0)  # a quarter to four times


def calibrate(student, validation, job):
    """Set the factors of a student's steps by validation; returns its QuantileScores there.

    In each third of the horizon, each quarter of the windows asks for the factor with which the
    80 % band holds 80 % of its points. What all of them need is taken: the end nearer to 1 of the
    confidence interval of their mean (of logarithms). It is kept where it lowers the third's
    weighted quantile loss. So a few series that are unlike the others do not decide it.
    """
    sample = some_windows(validation, CALIBRATION_WINDOWS)
    third = thirds(validation.horizon)
    factors = student.quantile_head.calibration
    factors.fill_(1.0)
    forecast = quantile_forecaster(student, sample.horizon, job)
    before = score_quantiles(forecast, sample, EVAL_BATCH, job)
    asked = []
    for index in np.array_split(np.arange(len(sample)), 4):  # series by series, there by time
        windows = chosen_windows(sample, index)
        asked.append(covering_factors(forecast, windows, job).log())
    asked = torch.stack(asked)  # (4, 3)
    reach = STUDENT_T * asked.std(0) / 2  # of the interval: the mean of four has half the deviation
    sure = (asked.mean(0).abs() - reach).clamp(min=0)
    fitted = (sure * asked.mean(0).sign()).exp()  # (3,)
    factors.copy_(fitted[third])
    after = score_quantiles(forecast, sample, EVAL_BATCH, job)
    helps = torch.tensor(after.wql_by_third) < torch.tensor(before.wql_by_third)
    factors.copy_(torch.where(helps, fitted, 1.0)[third])
    return score_quantiles(forecast, sample, EVAL_BATCH, job)


def covering_factors(forecast, windows, job):
    """Factors (3,) by which the 80 % band holds 80 % of each third's points; 1 without any."""
    by_step = torch.zeros(len(FACTORS) + 1, windows.horizon).double()
    own = np.arange(job.rank, len(windows), job.world_size)
    for first in range(0, len(own), EVAL_BATCH):
        index = own[first : first + EVAL_BATCH]
        context, truth, observed = windows.batch(index)
        low, middle, high = forecast(index, context)[:, [0, MIDDLE, -1]].unbind(1)
        reach = torch.where(truth > middle, high - middle, middle - low)
        needed = (truth - middle).abs() / reach  # the factor that takes the band there
        place = torch.bucketize(needed, FACTORS)  # the last one: out of reach
        by_step.scatter_add_(0, place, observed.double())
    by_third = sums_by_third(job.sum(by_step))  # (factors + 1, 3)
    points = by_third.sum(0)
    is_enough = by_third.cumsum(0) >= (LEVELS[-1] - LEVELS[0]) * points
    first = is_enough.int().argmax(0).clamp(max=len(FACTORS) - 1)
    return torch.where(points > 0, FACTORS[first], 1.0)


# -- What is kept ----------------------------------------------------------------------------------


def save_run(training, learner, progress, voice, is_best=False):
    """Write the checkpoints and metrics of a run.

    In this order, so that a run that is killed in between can go on: the new best, last.pt (which
    names the best), the metrics; then the older best goes. The TensorBoard events were before.
    """
    folder = training.folder
    if not folder.is_dir():
        raise removed(folder)
    content = io.BytesIO()  # into memory first: torch.save does not tell that a disk is full
    torch.save(checkpoint(training.facts, learner, progress), content)
    names = [progress.best_file, "last.pt"] if is_best else ["last.pt"]
    for name in names:
        with atomic(folder / name) as file:
            file.write(content.getbuffer())
    if is_best:
        path = f"{training.config.save_dir}/{progress.best_file}"
        voice.say("Saved best model: {}", path)
    if progress.history:
        save_metrics(folder, progress.history)
    for path in folder.glob("best_model_epoch_*.pt"):
        if path.name != progress.best_file:
            path.unlink()


def checkpoint(facts, learner, progress):
    """The content of a checkpoint: plain values and tensors, nothing that has to be executed."""
    content = dict(facts)
    for name, part in learner.parts().items():
        content[name] = part.state_dict()
    line = progress.history[-1] if progress.history else {}
    for part in ("train", "validation"):
        metrics = {name: value for name, value in line.items() if name.startswith(f"{part}_")}
        content[f"{part}_metrics"] = metrics
    content["epoch"] = progress.epoch
    content["loop"] = dataclasses.asdict(progress)
    return content


def save_metrics(folder, history):
    """A line for each epoch in metrics.jsonl."""
    with atomic(folder / "metrics.jsonl") as file:
        for line in history:
            file.write((json_text(line) + "\n").encode())


class EventFile:
    """The TensorBoard events of one process: a point of each metric, when an epoch ends.

    TensorBoard reads on where a file grows. A run that goes on begins a new file, which takes back
    what an earlier one says of `first_epoch` and later ones: such points are there where the run
    was killed before it had saved the epoch. (torch's SummaryWriter has a thread, which prints a
    traceback where the disk is full, and the run knows nothing of it.)
    """

    def __init__(self, folder, first_epoch):
        import tensorboard.summary  # noqa: F401  to miss it before an epoch is spent

        # TensorBoard reads the files of a folder in the order of their names.
        self.path = Path(folder, f"events.out.tfevents.{time.time():.6f}")
        self.first_epoch = first_epoch

    def add(self, line):
        """Append the metrics of an epoch. Raises UserError where they cannot be written."""
        folder = self.path.parent
        if not folder.parent.is_dir():
            raise removed(folder.parent)
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        events = []
        if not self.path.exists():
            start = SessionLog(status=SessionLog.START)
            events.append(Event(file_version="brain.Event:2"))
            events.append(Event(step=self.first_epoch, session_log=start))
        points = []
        for name, value in line.items():
            if value is not None:
                points.append(Summary.Value(tag=name, simple_value=value))
        events.append(Event(step=line["epoch"], summary=Summary(value=points)))
        try:
            folder.mkdir(exist_ok=True)
            with open(self.path, "ab") as file:
                writer = RecordWriter(file)
                for event in events:
                    event.wall_time = time.time()
                    writer.write(event.SerializeToString())
        except OSError as error:
            raise UserError("{}: cannot be written ({})", self.path, error.strerror) from error


# == Commands ======================================================================================


def pick(kind, args):
    """A dataclass of which every field is a flag of the same name."""
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})


def start_job(args, precision, voice, stop):
    """Job of the arguments. With several processes this starts the others, so it comes first.

    Raises UserError where torchrun or srun started another number of processes than is asked for.
    """
    wanted = args.devices * args.num_nodes
    started_by = launcher()
    if started_by and started_by.world_size != wanted:
        raise UserError(
            "{} started {} processes, but --devices {} on --num_nodes {} are {}; give the numbers"
            " of devices on a node and of nodes that it was told",
            *(started_by.name, started_by.world_size, args.devices, args.num_nodes, wanted),
        )
    kind = args.device.partition(":")[0]
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if args.command == "train" or wanted > 1 or started_by:
        fabric = launch_fabric(args, kind, precision, started_by)
    else:
        fabric = OneProcess(device_of_one_process(args, kind))
    voice.is_on = fabric.global_rank == 0
    if args.device == "auto" and kind == "cpu":
        voice.note("no CUDA GPU found: this runs on the CPU")
    return Job(fabric, voice, stop)


def device_of_one_process(args, kind):
    """torch.device of this kind; of several GPUs the one that --device names, else the first."""
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device(kind, int(args.device.partition(":")[2] or 0))
        torch.cuda.set_device(device)
    return device


def launch_fabric(args, kind, precision, started_by):
    """A Fabric on devices of this kind, launched: from here on each of its processes runs."""
    from lightning.fabric import Fabric  # not at the top: it takes seconds

    index = args.device.partition(":")[2]
    try:
        fabric = Fabric(
            accelerator=kind,
            devices=[int(index)] if index else args.devices,
            num_nodes=args.num_nodes,
            precision=precision,
            strategy="ddp" if args.devices * args.num_nodes > 1 else "auto",
            plugins=cluster(started_by, args.num_nodes),
        )
        fabric.launch()
    except (RuntimeError, ValueError) as error:
        if started_by and started_by.name == "srun":  # its numbers contradict each other
            raise UserError("srun: {}", error) from error
        raise
    return fabric


def cluster(started_by, num_nodes):
    """Plugins of Fabric that tell it who starts the processes; none where it finds out itself.

    It would take any LOCAL_RANK, and any allocation of SLURM, for a launcher.
    """
    from lightning.fabric.plugins.environments import LightningEnvironment

    if started_by and started_by.name != "Fabric":
        return []
    if started_by:
        return [LightningEnvironment()]

    class Alone(LightningEnvironment):
        """A user started this process, and it starts the others."""

        creates_processes_externally = False

        def local_rank(self):
            return 0

        def node_rank(self):
            return super().node_rank() if num_nodes > 1 else 0

    return [Alone()]


def load_data(config, reading, voice):
    """SplitData of the flags; prints what was found, used and skipped."""
    return split_and_tell(load_files(config, reading, voice), config, voice)


def load_files(config, reading, voice):
    """FolderRead of the flags; prints what was found."""
    voice.say("Data directory: {}", config.data_dir)
    voice.say("Context length: {}", config.context_length)
    voice.say("Prediction length: {}", config.prediction_length)
    voice.say("\nCreating datasets...")
    files = read_files(config.data_dir, config.max_files, reading, voice)
    if files.parquet:
        voice.say(
            "Found {} CSV files, {} Parquet files", files.found - files.parquet, files.parquet
        )
    else:
        voice.say("Found {} CSV files", files.found)
    if len(files.reports) < files.found:
        voice.note(
            "only the first {} by name are read (--max_files {}; 0 = all)",
            *(len(files.reports), config.max_files),
        )
    return files


def split_and_tell(files, config, voice):
    """SplitData of FolderRead; prints what was used and skipped."""
    data = split_data(files, config)
    for part in PARTS:
        voice.say("Using {} files for the {} set", data.files[part], part)
    voice.say("Split by {}", data.split_by)
    tell_files(data, voice)
    windows = data.windows["train"]
    if config.max_windows and config.max_windows in np.bincount(windows.series):
        voice.note(
            "at most {} training windows of each series, spread over it (--max_windows; 0 = all)",
            config.max_windows,
        )
    voice.say("Datasets loaded: {:,} samples", len(windows))
    voice.say(
        "  validation {:,}, test {:,}", len(data.windows["validation"]), len(data.windows["test"])
    )
    if config.season == "auto" and "" in windows.freqs:
        voice.note("files without timestamps are taken as hourly: season 24 (--season changes it)")
        warn_of_season(windows, voice)
    return data


def warn_of_season(windows, voice):
    """Say it where windows without timestamps seem to have another season than they are given."""
    season = other_season(windows, usual=season_of(""))
    if season:
        voice.warn(
            "rows without timestamps seem to repeat about every {} steps: --season {} lets the"
            " student and seasonal-naive know it",
            *(season, season),
        )


def tell_files(data, voice):
    """Print what was understood of each file, and what may be wrong."""
    used = [name for name, report in data.reports.items() if report.facts]
    for name in used[:MOST_NOTES]:
        voice.say("  {}: {}", name, data.reports[name].facts)
    if len(used) > MOST_NOTES:
        voice.say("  ... and {} more files", len(used) - MOST_NOTES)
    for name, reasons in data.notes.items():
        for reason in reasons[:MOST_REASONS]:
            voice.say("  {}: skipped: {}", name, reason)
        if len(reasons) > MOST_REASONS:
            voice.say("  {}: skipped: {} more series", name, len(reasons) - MOST_REASONS)

    doubtful = [name for name in used if data.reports[name].warnings]
    for name in doubtful[:MOST_NOTES]:
        for warning in data.reports[name].warnings[:MOST_REASONS]:
            voice.warn("{}: {}", name, warning)
    if len(doubtful) > MOST_NOTES:
        voice.warn("and in {} more files", len(doubtful) - MOST_NOTES)


def load_data_or_offer(args, voice):
    """As `load_data`, of arguments; where their lengths are too long, shorter ones are offered."""
    try:
        return load_data(pick(DataConfig, args), pick(ReadConfig, args), voice)
    except NoWindow as error:
        if not error.lengths:
            raise
        context_length, horizon = error.lengths
        changes = {"context_length": context_length, "prediction_length": horizon}
        if args.command == "train" and args.patch_size > context_length:
            changes["patch_size"] = context_length
        command = command_line(args, **changes)
        raise UserError("{}\nThese lengths work with this data:\n  {}", error, command) from error


def labels_of(windows, training_windows, request, job):
    """LabelFile of windows by the teacher that is asked for; it is judged on training windows."""
    device = job.device
    if device.type == "mps":  # it has no float64, which MOIRAI's scaler needs
        device = torch.device("cpu")
    voice = job.voice
    voice.say("\nLoading teacher...")

    def load():
        voice.say("Loading teacher: {}", request.teacher_model)
        teacher = load_teacher(request, device, voice.note)
        voice.say("Teacher loaded")
        return teacher

    if request.quantiles == "on" and not request.with_quantiles:
        voice.note("--teacher_point mean draws no samples: quantiles are learned from truth alone")
    has_all_freqs = set(windows.freqs) <= set(training_windows.freqs)
    judged_on = training_windows if has_all_freqs else windows
    labels = get_labels(LabelTask(windows, judged_on, request, load, BASELINES), job)
    if request.with_quantiles and labels.manifest.get("quantiles") == []:
        voice.note("the teacher gives no quantiles: they are learned from truth alone")
    if labels.damaged:
        voice.note(
            "{} windows have a non-finite label; where they train, they train on truth alone",
            labels.damaged,
        )
    return labels


# -- train -----------------------------------------------------------------------------------------


def train(args, voice, stop):
    """Label the training windows (unless alpha is 0), train a student, score it on the test set."""
    job = start_job(args, args.precision, voice, stop)
    folder = user_path(args.save_dir)
    with contextlib.ExitStack() as held:
        job.on_rank_zero(lambda: held.enter_context(owned(folder)))
        train_in(folder, args, job)


def train_in(folder, args, job):
    """What `train` does, in a folder that no other run writes to."""
    voice = job.voice
    job.on_rank_zero(lambda: end_move(folder, args.resume, voice))
    if args.demo and args.data_dir == DEMO["data_dir"]:
        job.on_rank_zero(lambda: write_demo_csvs(args.data_dir))
    data = load_data_or_offer(args, voice)
    facts = run_facts(args, data)
    beginning = begin_run(folder, facts, args, voice)

    request = pick(TeacherRequest, args)
    labels = None
    if facts["run_config"]["alpha"] != 0:
        labels = labels_of(data.windows["train"], data.windows["train"], request, job)
        teacher = beginning.content and beginning.content.get("teacher")
        if teacher and teacher.get("key") != labels.manifest["key"]:
            raise UserError("--resume: {} was trained on labels of other teacher weights", folder)

    windows = data.windows["train"]
    pairs = sorted(set(zip(windows.freqs, windows.seasons.tolist(), strict=True)))
    seasons = [Message("{} (step {})", (season, freq or "?")) for freq, season in pairs]
    voice.say("\nSeason in steps: {}", linked(seasons, ", "))
    voice.say("\nCreating student...")
    size = sum(weight.numel() for weight in new_student(facts).parameters())
    if args.quantiles == "on":
        whole = PatchStudent(**facts["student_config"], quantile_width=QUANTILE_WIDTH)
        size += sum(weight.numel() for weight in whole.quantile_head.parameters())
    voice.say("Student parameters: {:,}", size)
    patches = math.ceil(args.context_length / args.patch_size)
    voice.say("Student patches: {} of {} points", patches, args.patch_size)
    if not args.resume:
        job.on_rank_zero(lambda: move_old_run(folder, voice))
    progress = train_student(args, data, labels, facts, beginning, job)

    best = folder / progress.best_file
    if args.quantiles == "on":
        add_quantiles(best, args, data, labels, job)
    job.on_rank_zero(lambda: draw_history(folder / "training.png", progress.history))
    voice.say("\nBest epoch: {}, {}", progress.best_epoch, best)
    teacher_beside = None  # in the demo alone, as its forecasts of the test windows take time
    if args.demo and labels:
        sizes = labels.manifest["patch_sizes"]
        teacher_beside = dataclasses.replace(request, teacher_patch_size=sizes)
    entrants = Entrants({"student": open_student(best)}, teacher_beside)
    rows = compare(entrants, data, folder, job)
    if rows:
        advise(args, progress, rows, len(data.windows["train"]), voice)
    command = "python moirai_distill.py evaluate --checkpoint"
    if labels:
        command = "python moirai_distill.py evaluate --with_teacher --checkpoint"
    voice.say("\nNext: {} {}", command, shlex.quote(args.save_dir))


def advise(args, progress, rows, windows, voice):
    """Say in words where a run has not learnt enough, and which command would learn more."""
    is_at_its_end = 0 < progress.best_epoch == progress.epoch
    if is_at_its_end:
        voice.note(
            "the best epoch was the last one: it was still learning;"
            " raise --num_epochs or --learning_rate"
        )
    steps = math.ceil(windows / args.batch_size)  # of an epoch
    is_slow = args.learning_rate < ADVISED_RATE
    is_short = steps * progress.epoch < FEW_STEPS
    is_bad = is_worse_than_naive(rows["student"], rows)
    if is_at_its_end or (is_slow and (is_bad or is_short)):
        voice.note("to learn more, try\n  {}", command_to_learn_more(args, steps))
    elif is_bad:
        voice.note(
            "more epochs would not help, the best one was {} of {}: take more data, other lengths,"
            " or the naive forecast as it is",
            *(progress.best_epoch, progress.epoch),
        )


def command_to_learn_more(args, steps):
    """The command line of a run like this one that learns more; `steps` are those of an epoch."""
    epochs = max(2 * args.num_epochs, math.ceil(ADVISED_STEPS / steps))
    changes = {"num_epochs": epochs}
    if args.learning_rate < ADVISED_RATE:
        changes["learning_rate"] = ADVISED_RATE
    return command_line(args, **changes)


def command_line(args, **changes):
    """The command line that gives these arguments, with changes, to be copied.

    It names what is not the default. What is asked for once (--resume) is left out.
    """
    usual = vars(build_parser(demo=getattr(args, "demo", False)).parse_args([args.command]))
    words = ["python", "moirai_distill.py"]
    if args.command != "train":
        words.append(args.command)
    for name, value in (vars(args) | changes).items():
        if value == usual[name] or name == "resume":
            continue
        words.append(f"--{name}")
        if isinstance(value, list):
            words += value
        elif isinstance(value, tuple):  # --split_ratio
            words.append(":".join(f"{share:g}" for share in value))
        elif value is not True:
            words.append(str(value))
    return shlex.join(words)


def train_student(args, data, labels, facts, beginning, job):
    """Train a student with the alpha of the run, or the best one. Returns its Progress.

    Raises UserError where no epoch was any good.
    """
    validation = data.windows["validation"]
    floor = score(naive_forecaster(seasonal_naive, validation), validation, EVAL_BATCH, job)
    job.voice.say("Validation loss of seasonal-naive: {:.4f} (MAE: {:.4f})", floor.mse, floor.mae)

    training = Training(
        windows=data.windows["train"],
        validation=validation,
        labels=labels,
        config=pick(TrainConfig, args),
        facts=facts,
        folder=user_path(args.save_dir),
        parent=beginning.parent,
    )
    alpha = facts["run_config"]["alpha"]
    if alpha == "auto":
        alpha, facts["alpha_tried"] = choose_alpha(training, job)
    steps = math.ceil(len(training.windows) / args.batch_size)  # of an epoch
    job.voice.say("\nTraining for {} epochs", args.num_epochs)
    job.voice.say(
        "Steps: {:,} in an epoch ({:,} windows, {} in a step), {:,} in all",
        *(steps, len(training.windows), args.batch_size, steps * args.num_epochs),
    )
    if steps * args.num_epochs < FEW_STEPS:
        job.voice.note(
            "the whole run takes only {:,} steps, in which a student learns little; try\n  {}",
            steps * args.num_epochs,
            command_to_learn_more(args, steps),
        )
    job.voice.say("Checkpoints: {}", args.save_dir)
    student = new_student(facts, training.parent)
    progress = fit(student, with_alpha(training, alpha), job, beginning.content)
    if args.alpha == "auto":
        job.on_rank_zero(lambda: shutil.rmtree(training.folder / "trials", ignore_errors=True))
    if not progress.best_file:
        raise UserError("no epoch gave a finite validation loss; try a lower --learning_rate")
    return progress


def add_quantiles(path, args, data, labels, job):
    """Teach the best student of a run quantiles, in its checkpoint, unless it knows them."""
    content = read_checkpoint(path, build_student)
    windows = data.windows["train"]
    steps = min(QUANTILE_STEPS, args.num_epochs * math.ceil(len(windows) / args.batch_size))
    if (content.get("quantiles") or {}).get("steps") == steps:
        return
    voice = job.voice
    voice.say("\nLearning quantiles: {:,} steps", steps)
    alpha = content["run_config"]["alpha"]
    training = Training(
        windows=windows,
        validation=data.windows["validation"],
        labels=labels if alpha != 0 else None,
        config=dataclasses.replace(pick(TrainConfig, args), alpha=alpha),
        facts={},
        folder=path.parent,
    )
    student = student_to_teach(content, args.seed)
    scores = learn_quantiles(student, training, steps, job)
    if not math.isfinite(scores.wql):
        voice.warn("the quantiles are not finite on validation: the student does without them")
        return
    voice.say(
        "Quantiles: validation WQL {:.4f}, {:.1f} % of the points lie in the 80 % band",
        *(scores.wql, 100 * scores.coverage_80),
    )
    content["student_config"] = content["student_config"] | {"quantile_width": QUANTILE_WIDTH}
    content["model_state_dict"] = student.cpu().state_dict()
    content["quantiles"] = {"steps": steps, "wql": scores.wql, "coverage_80": scores.coverage_80}
    job.on_rank_zero(lambda: save_content(path, content))


def student_to_teach(content, seed):
    """The student of a checkpoint, with a quantile head that knows nothing."""
    torch.manual_seed(seed)
    config = content["student_config"] | {"quantile_width": QUANTILE_WIDTH}
    student = PatchStudent(**config)
    fresh = student.quantile_head.state_dict(prefix="quantile_head.")
    student.load_state_dict(content["model_state_dict"] | fresh)
    return student


def save_content(path, content):
    """Write a checkpoint in the place of another one."""
    raw = io.BytesIO()  # into memory first: torch.save does not tell that a disk is full
    torch.save(content, raw)
    with atomic(path) as file:
        file.write(raw.getbuffer())


def run_facts(args, data):
    """What every checkpoint of a run says of its making: plain values alone."""
    student_config = dataclasses.asdict(pick(StudentConfig, args))
    seasons = data.windows["train"].seasons
    student_config["season"] = int(np.bincount(seasons).argmax())  # that of most series
    return {
        "format": FORMAT,
        "student_config": student_config,
        "run_config": dict(vars(args)),
        "versions": {
            "python": sys.version.split()[0],
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
        "data": {part: windows.digest for part, windows in data.windows.items()},
        "freqs": sorted(set(data.windows["train"].freqs)),
        "counts": {
            part: [len(windows.names), len(windows)] for part, windows in data.windows.items()
        },
        "alpha_tried": None,
        "teacher": None,
        "parent": None,
    }


@dataclasses.dataclass
class Beginning:
    """What a run begins with: weights that the seed gives, where both are None."""

    content: dict | None = None  # of the last.pt to go on from (--resume)
    parent: OpenedStudent | None = None  # an earlier student (--init_from)


def begin_run(folder, facts, args, voice):
    """Beginning of a run; facts get what it says of the run's making. Raises UserError."""
    if args.resume and (folder / "last.pt").is_file():  # else --alpha auto was still trying
        content = read_last(folder, facts)
        facts["parent"] = content.get("parent")
        return Beginning(content)
    if not args.init_from:
        return Beginning()
    parent = open_student(args.init_from)
    refuse_other_sizes(args.init_from, parent.student.sizes, facts["student_config"])
    facts["parent"] = parent_facts(args.init_from, parent)
    voice.say("Begins with the weights of {} ({})", args.init_from, parent.weights_id)
    return Beginning(None, parent)


def refuse_other_sizes(name, before, now):
    """Raise UserError with all sizes in which a parent differs from the student of a run."""
    differences = []
    for size in sorted(now.keys() - {"dropout"}):  # no weight depends on it
        if before[size] != now[size]:
            differences.append(was_and_is(size, before, now))
    if differences:
        raise UserError("--init_from {}: of other sizes: {}", name, linked(differences, "; "))


def parent_facts(name, parent):
    """What a checkpoint says of the student that its run began with, and whose licences bind it."""
    content = shareable(parent.content)
    licences = list((content["parent"] or {}).get("licences", []))
    licence = (content["teacher"] or {}).get("licence")
    if licence and licence not in licences:
        licences.append(licence)
    is_here = user_path(name).exists()
    shown = last_part(name) if is_here else name  # a hub id is the same everywhere
    return {"name": shown, "weights": parent.weights_id, "licences": licences}


def new_student(facts, parent=None):
    """A student with the weights that the run's seed gives, or those of an OpenedStudent.

    It has no quantiles yet, whether the other one has them or not: they are learned at the end.
    """
    torch.manual_seed(facts["run_config"]["seed"])
    student = PatchStudent(**facts["student_config"])
    if parent:
        weights = parent.student.state_dict()
        student.load_state_dict({name: weights[name] for name in student.state_dict()})
        student.fold_share()
    return student


def read_last(folder, facts):
    """Content of the last.pt to go on from.

    Where --alpha auto has chosen already, facts get that alpha. Raises UserError where the run in
    `folder` is not the one that facts describe.
    """
    content = read_checkpoint(folder / "last.pt", build_student)
    facts["alpha_tried"] = content.get("alpha_tried")
    if facts["run_config"]["alpha"] == "auto" and facts["alpha_tried"]:
        tried = facts["alpha_tried"]
        facts["run_config"]["alpha"] = min(tried, key=tried.get)
    refuse_misfit(content, facts, folder)
    return content


def refuse_misfit(content, facts, folder):
    """Raise UserError with all in which a run differs from the one in `folder` that it resumes."""
    before = {"init_from": None} | content.get("run_config", {})  # older runs had no such flag
    now = facts["run_config"]
    differences = []
    for name in sorted((now.keys() & before.keys()) - MAY_CHANGE):  # older runs have fewer flags
        if before[name] != now[name]:
            differences.append(was_and_is(name, before, now))
    if content.get("data") != facts["data"]:
        differences.append(Message("the data is not the same"))
    learned = content["model_state_dict"]
    if completed_weights(learned) is not learned:
        differences.append(
            Message(
                "its student is of an earlier version, with another seasonal part; start without"
                " --resume"
            )
        )
    teacher = content.get("teacher")
    if now["alpha"] != 0 and teacher:
        name, revision = now["teacher_model"], now["teacher_revision"]
        weights = fingerprint(name, revision)
        point = point_in_key(now["teacher_point"], now["num_samples"])
        is_sampled = not weights or draws_samples(name, revision)
        if is_sampled and teacher.get("key", {}).get("point") != point:
            differences.append(
                Message(
                    "its labels are of an earlier version (the lower of the two middle samples is"
                    " not their median); start without --resume"
                )
            )
        if weights and weights != teacher.get("key", {}).get("weights"):
            differences.append(Message("the teacher's weights are not the same"))
        if not weights:  # then labels are looked for by the teacher's name
            differences += other_teacher(before, now)
    if differences:
        raise UserError(
            "--resume: {} does not fit this command\n  {}",
            *(folder / "last.pt", linked(differences, "\n  ")),
        )


def was_and_is(name, before, now):
    """Message: the values of a flag in the run_config of an earlier run, and of this one."""
    return Message("--{} was {}, is {}", (name, str(before[name]), str(now[name])))


def other_teacher(before, now):
    """Messages: how the names of two runs' teachers differ, wherever their folders are."""
    differences = []
    if last_part(before["teacher_model"]) != last_part(now["teacher_model"]):
        differences.append(was_and_is("teacher_model", before, now))
    if before["teacher_revision"] != now["teacher_revision"]:
        differences.append(was_and_is("teacher_revision", before, now))
    return differences


def with_alpha(training, alpha):
    """A Training with this alpha; with 0 it has no labels."""
    labels = training.labels if alpha != 0 else None
    facts = dict(training.facts)
    facts["run_config"] = training.facts["run_config"] | {"alpha": alpha}
    facts["teacher"] = labels.manifest if labels else None
    config = dataclasses.replace(training.config, alpha=alpha)
    return dataclasses.replace(training, labels=labels, facts=facts, config=config)


def choose_alpha(training, job):
    """(the alpha with the lowest validation loss, alpha -> that loss) after short trainings."""
    epochs = min(TRIAL_EPOCHS, training.config.num_epochs)
    trials = training.folder / "trials"
    job.on_rank_zero(lambda: shutil.rmtree(trials, ignore_errors=True))
    job.voice.say("\nTrying each alpha for {} epochs:", epochs)
    tried = {}
    for alpha in ALPHAS:
        trial = with_alpha(training, alpha)
        trial.folder = trials / f"{alpha:g}"
        trial.config = dataclasses.replace(trial.config, num_epochs=epochs, patience=0)
        trial.when_stopped = Message("the same command with --resume repeats the trials")
        job.voice.is_muted = True  # but for the progress
        tried[alpha] = fit(new_student(trial.facts, trial.parent), trial, job).best_loss
        job.voice.is_muted = False
        job.voice.say("  alpha {:g}: validation loss {:.4f}", alpha, tried[alpha])
    if not math.isfinite(min(tried.values())):
        raise UserError("no alpha gave a finite validation loss; try a lower --learning_rate")

    best, second = sorted(tried, key=tried.get)[:2]
    rival = 0.0 if best != 0 else second
    change = 100 * (tried[best] / (tried[rival] or math.nan) - 1)
    job.voice.say(
        "Best: alpha {:g}, {:+.1f} % of validation loss beside alpha {:g}", best, change, rival
    )
    if best == 0:
        job.voice.say("The teacher does not help here: this trains on truth alone")
    return best, tried


def move_old_run(folder, voice):
    """Move an earlier run's files to folder/old-TIME: a run never destroys another.

    They are gathered in a folder of another name first, by which the next start knows that it has
    to end the move.
    """
    if not run_files(folder):
        return
    target = folder / time.strftime("old-%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        if not target.exists() and not moving(target).exists():
            break
        target = folder / time.strftime(f"old-%Y%m%d-%H%M%S-{number}")
    moving(target).mkdir()
    gather(folder, moving(target), target, voice)


def moving(target):
    """The folder in which the files are that are being moved to another one."""
    return target.with_name(f"{target.name}.moving")


def run_files(folder):
    """Paths of what a run has left in a folder."""
    return [path for pattern in RUN_FILES for path in folder.glob(pattern)]


def gather(folder, gathered, target, voice):
    """Move the files of a run in `folder` to `gathered`, which is called `target` in the end."""
    for path in run_files(folder):
        path.rename(gathered / path.name)
    gathered.rename(target)
    voice.note("an earlier run lay in {}; its files are now in {}", folder, target)


def end_move(folder, is_resumed, voice):
    """End the move of an earlier run that was stopped in its middle; take it back for --resume."""
    for gathered in folder.glob("old-*.moving"):
        if not is_resumed:
            gather(folder, gathered, gathered.with_suffix(""), voice)
            continue
        for path in run_files(gathered):
            path.rename(folder / path.name)
        with contextlib.suppress(OSError):  # it holds what is no run's
            gathered.rmdir()


def write_demo_csvs(folder, files=20, rows=1500):
    """Write synthetic hourly CSVs: daily and weekly cycles, a slow drift, autoregressive noise."""
    hours = np.arange(rows)
    for number in range(files):
        drawn = np.random.default_rng(1000 + number)
        value = drawn.normal(0, 0.015, rows).cumsum() + drawn.uniform(-5, 5)
        noise = drawn.normal(0, 0.25, rows)
        for t in range(1, rows):
            noise[t] += 0.7 * noise[t - 1]
        for period, strength in ((24, 1.0), (168, 0.6)):
            for harmonic in range(1, 5):
                angle = 2 * np.pi * (harmonic * hours / period + drawn.random())
                value += drawn.normal(0, strength / harmonic) * np.sin(angle)
        unit = 10 ** drawn.uniform(-1, 3)
        values = (unit * (value + noise)).round(6)
        dates = pd.date_range("2024-01-01", periods=rows, freq="h")
        frame = pd.DataFrame({"date": dates, "value": values})
        with atomic(Path(folder, f"series_{number:02d}.csv")) as file:
            file.write(frame.to_csv(index=False).encode())


# -- Pictures --------------------------------------------------------------------------------------


# One colour for each forecaster in all pictures; the first student is "student" or "forecast".
COLOURS = {
    "student": "tab:blue",
    "forecast": "tab:blue",
    "teacher": "tab:orange",
    "seasonal-naive": "tab:green",
    "last value": "tab:brown",
}
OTHER_COLOURS = ("tab:purple", "tab:red", "tab:cyan", "tab:olive", "tab:pink")
LONGEST_NAME = 21  # characters of a forecaster in the table of an evaluation
FAR_APART = 5  # times the lowest error, from which on errors are drawn on a logarithmic axis


@dataclasses.dataclass
class Panel:
    """One plot of a picture."""

    title: str
    steps: object  # (T,) of the known values: timestamps or numbers
    known: object  # (T,) values, or none
    ahead: object  # (H,) steps of the curves
    curves: dict  # name -> (H,)
    begins: object = None  # the last step before the forecast, where a line is drawn
    x_label: str = ""
    y_label: str = ""
    is_log: bool = False
    heading: str = ""  # of the whole picture, from its first panel
    # Name of a curve -> (lower, upper) edge (H,) of what is shaded around it.
    bands: dict = dataclasses.field(default_factory=dict)


def draw(path, panels):
    """Write a picture of panels, one below the other, with one legend beside them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1 + 2.4 * len(panels)), dpi=110, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    colours = colours_of(panels)
    lines = {}  # name -> a line of it, for the legend
    for axis, panel in zip(axes, panels, strict=True):
        if len(panel.known):
            known = axis.plot(on_clock(panel.steps), panel.known, color="0.55")
            lines.setdefault("truth", known[0])
        for name, curve in panel.curves.items():
            style = {"color": colours[name], "linewidth": 1.3}
            (line,) = axis.plot(on_clock(panel.ahead), curve, **style)
            lines.setdefault(name, line)
        for name, (low, high) in panel.bands.items():
            shade = {"color": colours[name], "alpha": 0.15, "linewidth": 0}
            axis.fill_between(on_clock(panel.ahead), low, high, **shade)
        if panel.begins is not None:
            axis.axvline(on_clock(panel.begins), color="0.8", linestyle="--", zorder=0)
        set_ticks(axis, panel)
        # Without mathematics, as $ in a name is a dollar.
        axis.set_title(picture_text(panel.title, 90), fontsize="small", parse_math=False)
        axis.set_xlabel(picture_text(panel.x_label, 90), fontsize="small", parse_math=False)
        axis.set_ylabel(picture_text(panel.y_label, 24), fontsize="small", parse_math=False)
    figure.suptitle(panels[0].heading, fontsize="medium", parse_math=False)
    names = [picture_text(name, 28) for name in lines]
    legend = figure.legend(lines.values(), names, loc="outside right upper", fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)
    with atomic(path) as file:
        FigureCanvasAgg(figure).print_png(file)  # figure.savefig would draw it twice


def colours_of(panels):
    """Name -> colour of all curves; the first name that is no usual one is that of a student."""
    colours = dict(COLOURS)
    names = [name for panel in panels for name in panel.curves]
    unknown = [name for name in dict.fromkeys(names) if name not in colours]
    choice = itertools.chain([COLOURS["student"]], itertools.cycle(OTHER_COLOURS))
    colours.update(zip(unknown, choice, strict=False))
    return colours


def on_clock(steps):
    """Steps as matplotlib wants them: timestamps without their zone, as their clock shows them."""
    if getattr(steps, "tzinfo", None) is not None:
        return steps.tz_localize(None)
    return steps


def set_ticks(axis, panel):
    """Few enough ticks, dates where the steps are dates, and a logarithmic axis where it helps."""
    from matplotlib import dates, ticker

    if isinstance(panel.ahead, pd.DatetimeIndex):
        locator = dates.AutoDateLocator(minticks=3, maxticks=8)
        axis.xaxis.set_major_locator(locator)
        axis.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
    else:
        axis.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
    if panel.is_log:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _place: f"{value:g}"))
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    axis.tick_params(labelsize="small")


def picture_text(name, most):
    """A name as a picture shows it: control characters as escapes, the end of a long one."""
    return shortened_name(printable(str(name)), most)


def shortened_name(name, most):
    """The end of a name that is longer than `most` characters."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def draw_history(path, history):
    """Draw the losses of a run by epoch."""
    table = pd.DataFrame(history)
    curves = table[["train_loss", "train_mse", "train_distill", "validation_mse"]].astype(float)
    panel = Panel("losses by epoch", [], [], table["epoch"], curves)
    panel.x_label = "epoch"
    panel.y_label = "squared deviations"
    draw(path, [panel])


# -- evaluate --------------------------------------------------------------------------------------


def evaluate(args, voice, stop):
    """Score checkpoints on the test windows of the first one's run, or of other data."""
    students = {}
    for name in args.checkpoint:
        # A run that is called "teacher" must not take the teacher's row.
        shown = f"./{name}" if name in ("teacher", *BASELINES) else name
        students[shown] = open_onnx(name) if is_onnx(name) else open_student(name)
    refuse_other_lengths(students, args)
    first_name, first = next(iter(students.items()))
    distilled = [opened for opened in students.values() if opened.content.get("teacher")]
    pupil = distilled[0] if distilled else first  # the teacher is that of this one's run
    if args.with_teacher and not args.teacher_model:
        pupil_name = next(shown for shown, opened in students.items() if opened is pupil)
        tell_teacher(pupil_name, pupil, voice)

    inherited = inherit_arguments(args, first, pupil)
    data_dir = inherited.data_dir
    if not data_dir or not user_path(data_dir).exists():
        where = data_dir or Message("it does not say where")
        raise UserError("the data of {} ({}) is not here; give --data_dir", first_name, where)
    folder = evaluation_folder(args, first)

    job = start_job(args, "32-true", voice, stop)
    data = data_to_score(inherited, students, args.horizon, voice)
    request = None
    if args.with_teacher:
        request = pick(TeacherRequest, inherited)
    if args.horizon:
        tell_horizon(args.horizon, first.student, voice)
    others = {name: own_forecaster(name) for name in args.with_forecaster}
    compare(Entrants(students, request, others), data, folder, job)


def data_to_score(args, students, horizon, voice):
    """SplitData of evaluate: that of the students' own horizon, or another cut of the same rows.

    Warns where the windows of their own horizon are not the test windows of a student's run.
    """
    config = pick(EvaluationDataConfig, args)
    files = load_files(config, pick(ReadConfig, args), voice)
    data = split_and_tell(files, config, voice)
    for name, opened in students.items():
        if opened.content.get("data", {}).get("test") != data.windows["test"].digest:
            voice.warn(
                "these are not the test windows of {}'s own run: it may have been trained on them",
                name,
            )
    if horizon in (None, config.prediction_length):
        return data
    return split_data(files, dataclasses.replace(config, prediction_length=horizon))


def tell_teacher(pupil_name, pupil, voice):
    """Tell which teacher is taken, as the user names none.

    Raises UserError unless it is this program's own default, or the run of `pupil` is one of this
    machine.
    """
    default = build_parser(demo=False).parse_args(["train"]).teacher_model
    name = pupil.content.get("run_config", {}).get("teacher_model", default)
    if is_own_file(name):  # it would be run
        raise UserError(
            "--with_teacher: the teacher that {} names is a Python file ({}), which is run only"
            " where you name it: --teacher_model {}",
            *(pupil_name, name, name),
        )
    if name != default and not has_own_labels(pupil):
        raise UserError(
            "--with_teacher: {} names its teacher itself ({}), and no labels of it lie in the"
            " cache of that run; name the one to load with --teacher_model",
            *(pupil_name, name),
        )
    voice.note(
        "the teacher is the one that {} names: {} (--teacher_model names another)",
        *(pupil_name, name),
    )


def has_own_labels(pupil):
    """Whether a checkpoint lies in the folder that its run wrote to, with its labels in the cache.

    Both are places of this machine. That a stranger's file may say so by chance does no harm: a
    teacher's files are data, of which nothing runs.
    """
    run_config = pupil.content.get("run_config", {})
    made_with = pupil.content.get("teacher")
    places = (run_config.get("save_dir"), run_config.get("label_cache"))
    if not pupil.path or not made_with or not all(places):
        return False
    try:
        save_dir, cache = (user_path(place) for place in places)
    except UserError:  # in the home folder of somebody who is not known here
        return False
    if pupil.path.parent.resolve() != save_dir.resolve() or not made_with.get("key"):
        return False
    manifest = read_manifest(key_folder(cache, made_with["key"]))
    return manifest is not None and manifest["teacher"] == made_with.get("teacher")


def refuse_other_lengths(students, args):
    """Raise UserError unless all students, and the flags where given, have the same lengths."""
    named = [(name, opened.student) for name, opened in students.items()]
    lengths = [(name, one.context_length, one.prediction_length) for name, one in named]
    _, context_length, horizon = lengths[0]
    of_flags = (args.context_length or context_length, args.prediction_length or horizon)
    lengths.append((Message("the flags"), *of_flags))
    if len({(context, steps) for _, context, steps in lengths}) > 1:
        found = [Message("{} {} -> {}", one) for one in lengths]
        raise UserError(
            "--checkpoint: these have no windows in common ({}); give one of them",
            linked(found, ", "),
        )


def inherit_arguments(args, first, pupil):
    """Arguments of evaluate: as given, else as in the first student's run, else the defaults.

    Those of the teacher are as in the run of `pupil`, another student.
    """
    values = vars(build_parser(demo=False).parse_args(["train"]))
    values["data_dir"] = ""
    for name, value in first.content.get("run_config", {}).items():
        is_place = name.endswith(("_dir", "_cache"))
        if name == "label_cache" and not is_label_cache(value):  # a stranger's word is no place
            continue
        if first.path or not is_place:  # an exported student names no place of this machine
            values[name] = value
    values |= arguments_of_teacher(args, pupil)
    for name, value in vars(args).items():
        if value is not None:
            values[name] = value
    values["context_length"] = first.student.context_length
    values["prediction_length"] = first.student.prediction_length
    return argparse.Namespace(**values)


def arguments_of_teacher(args, pupil):
    """Arguments of the teacher group (name -> value) that are as in the run of a student.

    The revision and the patch sizes are so for the run's own teacher alone.
    """
    of_pupil = pupil.content.get("run_config", {})
    found = {}
    for field in dataclasses.fields(TeacherRequest):
        if field.name != "label_cache" and field.name in of_pupil:
            found[field.name] = of_pupil[field.name]
    if args.teacher_model and not is_teacher_of(pupil, args):
        return found | {"teacher_revision": None, "teacher_patch_size": "auto"}
    known_sizes = (pupil.content.get("teacher") or {}).get("patch_sizes")
    if known_sizes:
        found["teacher_patch_size"] = known_sizes
    return found


def is_teacher_of(pupil, args):
    """Whether a student was made by the teacher that is named to evaluate, wherever it lies."""
    run_config = pupil.content.get("run_config", {})
    made_with = pupil.content.get("teacher") or {}
    weights = fingerprint(args.teacher_model, args.teacher_revision)
    known = made_with.get("key", {}).get("weights")
    if weights and known:
        return weights == known
    name = made_with.get("teacher") or run_config.get("teacher_model", "")
    return last_part(name) == last_part(args.teacher_model)


def evaluation_folder(args, first):
    """Where evaluate writes: beside the first checkpoint, if the windows are those of its run."""
    reading = [getattr(args, field.name) for field in dataclasses.fields(ReadConfig)]
    data_flags = (  # those that decide the test windows; others only thin out training
        *reading,
        args.data_dir,
        args.max_files,
        args.split_by,
        args.split_ratio,
        args.split_seed,
        args.max_gap,
        args.season,
    )
    is_own_data = all(value is None for value in data_flags)
    folder = Path("evaluation")
    if args.output_dir:
        folder = user_path(args.output_dir)
    elif is_own_data and first.path:
        folder = first.path.parent
        if len(args.checkpoint) > 1:  # those of the run alone stay
            folder = folder / "comparison"
        if args.horizon:  # likewise
            folder = folder / f"horizon_{args.horizon}"
    if problem := unwritable(folder):
        raise UserError("{}; give --output_dir", problem)
    remove_leftovers(folder)
    return folder


@dataclasses.dataclass
class Cost:
    """What a forecaster takes."""

    cpu_ms: float  # median of one forecast, warmed up
    parameters: int | None = None  # None of a forecaster of the user's
    bytes: int | None = None  # as a weights file


@dataclasses.dataclass
class Row:
    """A forecaster in the table of an evaluation."""

    scores: Scores
    quantiles: QuantileScores | None = None  # where it has quantiles
    cost: Cost | None = None
    alpha: float | None = None  # of a student
    weights_id: str | None = None  # of a student
    making: dict | None = None  # of a student, see `making_of`
    is_other: bool = False  # one of --with_forecaster

    def to_json(self):
        """The row of evaluation.json."""
        content = dataclasses.asdict(self.scores)
        if self.quantiles:
            content.update(dataclasses.asdict(self.quantiles))
        if self.cost:
            content.update(dataclasses.asdict(self.cost))
        if self.weights_id:
            content["alpha"] = self.alpha
            content["weights"] = self.weights_id
        return content


@dataclasses.dataclass
class Entrants:
    """Who is compared on all test windows, beside naive forecasts."""

    students: dict  # name -> OpenedStudent
    teacher: TeacherRequest | None = None
    others: dict = dataclasses.field(default_factory=dict)  # name -> OwnForecaster


def compare(entrants, data, folder, job):
    """Score Entrants on all test windows.

    Prints a table, and leaves it in `folder` with pictures. Returns name -> Row on the first
    process, None on others.
    """
    test = data.windows["test"]
    labels = None
    request = entrants.teacher
    if request:
        having = [opened for opened in entrants.students.values() if opened.student.has_quantiles]
        if not having:  # nobody's quantiles would stand beside the teacher's
            request = dataclasses.replace(request, quantiles="off")
        labels = labels_of(test, data.windows["train"], request, job)
    answers = answers_of(entrants, labels, test, job)

    rows = {}
    for name, answer in answers.items():
        rows[name] = Row(*score_answers(answer, test, EVAL_BATCH, job))
    if job.rank != 0:
        return None
    add_facts(rows, entrants, labels, test, job.voice)

    tell_rows(rows, len(test), job.voice)
    tell_quantiles(rows, job.voice)
    tell_verdict(rows, job.voice)
    save_evaluation(folder / "evaluation.json", rows, test)
    draw_evaluation(folder, rows, answers, test)
    job.voice.say("Table and pictures: {}", folder)
    return rows


def add_facts(rows, entrants, labels, test, voice):
    """Add to the Rows of Entrants what they are, and what their forecasts cost."""
    for name, opened in entrants.students.items():
        row = rows[name]
        row.alpha = opened.content.get("run_config", {}).get("alpha")
        row.weights_id = opened.weights_id
        row.making = making_of(opened.content)
        row.cost = student_cost(opened, test)
    if labels:
        rows["teacher"].cost = teacher_cost(entrants.teacher, labels, test, voice)
    for name, other in entrants.others.items():
        rows[name].cost = other_cost(other, test)
        rows[name].is_other = True


def answers_of(entrants, labels, test, job):
    """name -> `answer(index, context)` of Entrants and naive forecasts, in the table's order."""
    answers = {}
    for name, opened in entrants.students.items():
        student = opened.student.on(job.device)
        answers[name] = student_answers(student, test.horizon, job)
    if labels:
        answers["teacher"] = label_answers(labels)
    for name, other in entrants.others.items():
        answers[name] = other_answers(other, test)
    for name, naive in BASELINES.items():
        answers[name] = points_alone(naive_forecaster(naive, test))
    return answers


def naive_forecaster(naive, windows):
    """`forecast(index, context)` of a naive forecast, as `score` takes it."""
    return lambda index, context: naive(context, windows.season(index), windows.horizon)


def label_forecaster(labels):
    """`forecast(index, context)` that looks up labels; not finite where they are not."""
    return lambda index, _context: torch.from_numpy(np.array(labels.array[index]))


def label_answers(labels):
    """`answer(index, context)` that looks up labels; quantiles are 0 where they are not finite."""
    points_of = label_forecaster(labels)

    def answer(index, context):
        points = points_of(index, context)
        if labels.offsets is None:
            return points, None
        quantiles, _ = labels.quantile_batch(index, context)
        return points, quantiles

    return answer


def other_answers(other, windows):
    """`answer(index, context)` of an OwnForecaster, which gets contexts in their files' units."""

    def answer(index, _context):
        found = other.answer_windows(windows, index)
        return found.points, found.quantiles

    return answer


def milliseconds(call):
    """Median time of a call on the CPU, warmed up."""
    call()
    took = []  # seconds
    while len(took) < FEWEST_TIMED or sum(took) < LONG_TIMED:
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return 1e3 * statistics.median(took)


def measure_cost(weights, call):
    """Cost of a forecaster with a state dict of weights, and `call()` as one forecast."""
    from safetensors.torch import save

    return Cost(
        cpu_ms=milliseconds(call),
        parameters=sum(weight.numel() for weight in weights.values()),
        bytes=len(save(weights)),
    )


def student_cost(opened, test):
    """Cost of a student on the CPU."""
    context, _, _ = test.batch(np.arange(1))

    @torch.inference_mode()
    def forecast():
        return opened.student(context)

    if isinstance(opened.student, OnnxStudent):
        parameters = opened.content.get("parameters")
        return Cost(milliseconds(forecast), parameters, opened.student.bytes)
    cost = measure_cost(opened.content["model_state_dict"], forecast)
    learnt = sum(weight.numel() for weight in opened.student.parameters())  # factors are not
    return dataclasses.replace(cost, parameters=learnt)


def other_cost(other, test):
    """Cost of an OwnForecaster."""
    return Cost(milliseconds(lambda: other.answer_windows(test, np.arange(1))))


def teacher_cost(request, labels, test, voice):
    """Cost of the teacher on the CPU; None where the labels were carried here without it."""
    if not fingerprint(request.teacher_model, request.teacher_revision):
        return None
    teacher = load_teacher(request, torch.device("cpu"), voice.note)
    if isinstance(teacher, OwnForecaster):
        return other_cost(teacher, test)
    size = labels.manifest["patch_sizes"][test.freqs[test.series[0]]]
    if size not in teacher.patch_sizes(test.context_length, test.horizon):
        raise UserError("{}: its manifest names a patch size of no use: {}", labels.folder, size)
    asked = (test.horizon, size, request.teacher_point, request.num_samples)
    context, _, _ = test.batch(np.arange(1))
    return measure_cost(teacher.module.state_dict(), lambda: teacher.forecast(context, *asked))


def tell_rows(rows, count, voice):
    """Print the table of an evaluation on `count` windows, in lines of at most 100 columns."""
    voice.say("\nTest error on {:,} windows (ms: one forecast on the CPU):", count)
    names = short_names(rows)
    width = max(len(name) for name in names.values())
    for name, row in rows.items():
        scores = row.scores
        cost = ""
        if row.cost and row.cost.bytes is not None:
            parameters = "?" if row.cost.parameters is None else f"{row.cost.parameters:,}"
            cost = Message(
                "{:>12} parameters {:>5.1f} MB {:>6.1f} ms",
                (parameters, 1e-6 * row.cost.bytes, row.cost.cpu_ms),
            )
        elif row.cost:
            cost = Message("{:>41.1f} ms", (row.cost.cpu_ms,))
        voice.say(
            "  {}  MSE {:.4f}  MAE {:.4f}  MASE {:.4f}{}",
            *(names[name].ljust(width), scores.mse, scores.mae, scores.mase, cost),
        )


def tell_quantiles(rows, voice):
    """Print how good quantiles are, where there are any."""
    names = short_names(rows)
    having = {name: row.quantiles for name, row in rows.items() if row.quantiles}
    if not having:
        return
    width = max(len(names[name]) for name in having)
    voice.say("\nQuantiles 0.1 to 0.9, over the whole horizon (and by third of it):")
    for name, scores in having.items():
        voice.say(
            "  {}  WQL {:.4f} ({})  in the 80 % band {:.1f} % ({})",
            *(names[name].ljust(width), scores.wql, as_list(scores.wql_by_third, 4)),
            100 * scores.coverage_80,
            as_list([100 * share for share in scores.coverage_80_by_third], 1),
        )


def as_list(values, digits):
    """Numbers as text; those that are not there are left out."""
    return ", ".join(f"{value:.{digits}f}" for value in values if math.isfinite(value))


def short_names(names):
    """Name -> the same, or its end where it is long; no two are alike."""
    short = {}
    for name in names:
        shown = shortened_name(name, LONGEST_NAME)
        for number in itertools.count(2):
            if shown not in short.values():
                break
            shown = f"{shortened_name(name, LONGEST_NAME - 4)} ({number})"
        short[name] = shown
    return short


def tell_verdict(rows, voice):
    """Say which student is worse than a naive forecast, and what the teacher gave each one."""
    for name, row in rows.items():
        if row.alpha is None:  # no student
            continue
        warn_of_bad_student(name, rows, voice)
        tell_beside_others(name, rows, voice)
        if row.alpha == 0:  # it had no teacher
            continue
        if "teacher" in rows:
            tell_beside_teacher(name, rows, voice)
        tell_beside_twin(name, rows, voice)


def better_naive(rows):
    """Name of the naive forecast with the lower MSE."""
    return min(BASELINES, key=lambda name: rows[name].scores.mse)


def is_worse_than_naive(row, rows):
    """Whether a forecaster does not beat every naive forecast; one that is not finite does not."""
    return not row.scores.mse < rows[better_naive(rows)].scores.mse


def warn_of_bad_student(name, rows, voice):
    """Warn of a student that does not beat every naive forecast."""
    row = rows[name]
    if not is_worse_than_naive(row, rows):
        return
    better = [naive for naive in BASELINES if not row.scores.mse < rows[naive].scores.mse]
    voice.warn("{} is not better than {} on the test windows", name, " and ".join(better))


def tell_beside_others(name, rows, voice):
    """Say how a student stands beside each forecaster of --with_forecaster."""
    mse = rows[name].scores.mse
    for other, row in rows.items():
        if row.is_other and row.scores.mse > 0:
            change = 100 * (mse / row.scores.mse - 1)
            voice.say("{} has {:+.1f} % of MSE beside {}", name, change, other)


def tell_beside_teacher(name, rows, voice):
    """Say how much of the teacher's gain over the better naive forecast a student keeps."""
    naive = better_naive(rows)
    teacher_mse = rows["teacher"].scores.mse
    mse = rows[name].scores.mse
    if is_worse_than_naive(rows["teacher"], rows):
        voice.say(
            "The teacher does not beat {} here: it has no gain that {} could keep", naive, name
        )
    elif mse < teacher_mse:
        less = 100 * (1 - mse / teacher_mse)
        voice.say("{} passes its teacher: its MSE is {:.1f} % lower than the teacher's", name, less)
    elif not is_worse_than_naive(rows[name], rows):
        naive_mse = rows[naive].scores.mse
        kept = 100 * (naive_mse - mse) / (naive_mse - teacher_mse)
        voice.say("{} keeps {:.0f} % of what the teacher gains over {}", name, kept, naive)


def tell_beside_twin(name, rows, voice):
    """Say whether the teacher helped a student: beside a true twin alone, else what differs."""
    row = rows[name]
    differences = {}  # name of a student that had no teacher -> in what it was made otherwise
    for other, other_row in rows.items():
        if other_row.alpha == 0:
            differences[other] = differences_of(row.making, other_row.making)
    if not differences:
        voice.say(
            "Whether the teacher helped {} shows beside a twin:"
            " train one with --alpha 0, and evaluate both",
            name,
        )
        return
    twin = min(differences, key=lambda other: len(differences[other]))
    if differences[twin]:
        voice.say(
            "Whether the teacher helped {} cannot be told beside {}, which is no twin: {}",
            *(name, twin, linked(differences[twin], ", ")),
        )
        return

    change = 100 * (row.scores.mse / (rows[twin].scores.mse or math.nan) - 1)
    pairs = zip(row.scores.mse_by_series, rows[twin].scores.mse_by_series, strict=True)
    lower = sum(own < other for own, other in pairs)
    series = len(row.scores.mse_by_series)
    if change <= -1:
        voice.say(
            "The teacher helped: {} has {:+.1f} % of MSE beside {} (alpha 0),"
            " and a lower one on {} of {} series",
            *(name, change, twin, lower, series),
        )
    elif change >= 1:
        voice.say(
            "The teacher did harm: {} has {:+.1f} % of MSE beside {} (alpha 0),"
            " and a lower one on {} of {} series",
            *(name, change, twin, lower, series),
        )
    else:
        voice.say(
            "The teacher made no difference: {} has {:+.1f} % of MSE beside {} (alpha 0),"
            " and a lower one on {} of {} series",
            *(name, change, twin, lower, series),
        )


def making_of(content):
    """How the student of a checkpoint was made, but for its teacher: name -> plain value.

    Two students that differ in alpha alone are twins: what they differ in is what the teacher gave.
    """
    making = {}
    run_config = content.get("run_config", {})
    for field in dataclasses.fields(TrainConfig):
        if field.name not in ("alpha", "save_dir"):
            making[f"--{field.name}"] = run_config.get(field.name)
    making["--precision"] = run_config.get("precision")
    for name, value in content.get("student_config", {}).items():
        making[f"--{name}"] = value
    data = content.get("data", {})
    making["parent"] = (content.get("parent") or {}).get("weights")
    making["training data"] = data.get("train")
    making["validation data"] = data.get("validation")
    return making


MADE_OF_OTHER = {  # names of `making_of` that are no flags -> how two students differ in them
    "parent": Message("other weights to begin with"),
    "training data": Message("other training data"),
    "validation data": Message("other validation data"),
}


def differences_of(making, other):
    """Messages: in what two students were made in another way."""
    found = []
    for name in sorted({*making, *other}):
        own_value = making.get(name)
        other_value = other.get(name)
        if own_value == other_value:
            continue
        if name.startswith("--"):
            found.append(Message("{} {} and {}", (name, str(own_value), str(other_value))))
        else:
            found.append(MADE_OF_OTHER[name])
    return found


def save_evaluation(path, rows, test):
    """Write evaluation.json, which identifies its windows by their digest."""
    table = {
        "windows": len(test),
        "test": test.digest,
        "series": test.names,
        "cpu_threads": torch.get_num_threads(),
        "context_length": test.context_length,
        "prediction_length": test.horizon,
        "rows": {name: row.to_json() for name, row in rows.items()},
    }
    with atomic(path) as file:
        file.write(json_text(table, indent=1).encode())


def draw_evaluation(folder, rows, answers, test):
    """Draw the error by step of the horizon, and forecasts of three test windows."""
    names = [name for name in rows if name != "last value"]
    curves = {name: rows[name].scores.mse_by_step for name in names}
    draw(folder / "error_by_horizon.png", [error_panel(curves, test.horizon)])

    index = np.linspace(0, len(test) - 1, 5).astype(np.int64)[1:-1]
    context, truth, _ = test.batch(index)
    found = {name: answers[name](index, context) for name in names}
    panels = []
    for row, window in enumerate(index):
        forecasts = {name: points[row] for name, (points, _) in found.items()}
        panel = window_panel(test, window, (context[row], truth[row]), forecasts)
        origin = test.origins[test.series[window]]
        for name, (_, quantiles) in found.items():
            if quantiles is not None:
                panel.bands[name] = [origin.in_units(edge) for edge in quantiles[row, [0, -1]]]
        panels.append(panel)
    panels[0].heading = f"{len(index)} of {len(test):,} test windows"
    draw(folder / "forecast.png", panels)


def error_panel(curves, horizon):
    """Panel of the MSE (H,) of each forecaster by step, on an axis on which all can be read."""
    steps = np.arange(1, horizon + 1)
    panel = Panel("MSE by step of the horizon", [], [], steps, curves)
    panel.x_label = "steps ahead"
    panel.y_label = "squared deviations"
    largest = np.max(list(curves.values()))
    smallest = np.min(list(curves.values()))
    panel.is_log = bool(smallest > 0 and largest > FAR_APART * smallest)
    return panel


def window_panel(test, window, points, forecasts):
    """Panel of a test window in its file's units; `points` are its scaled (context, truth)."""
    origin = test.origins[test.series[window]]
    context, truth = points
    shown = min(len(context), 2 * test.horizon)
    first = int(test.starts[window]) - origin.offset + len(context) - shown
    index = origin.index(first, shown + len(truth))
    known = origin.in_units(torch.cat([context[-shown:], truth]))
    curves = {name: origin.in_units(forecast) for name, forecast in forecasts.items()}
    title = test.names[test.series[window]]
    panel = Panel(title, index, known, index[shown:], curves, begins=index[shown - 1])
    panel.x_label = index.name or ""
    panel.y_label = origin.series.column
    return panel


# -- predict ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class SeriesForecast:
    """The forecast of one series of a file."""

    series: RawSeries
    context: LastContext
    index: pd.Index  # (H,), timestamps or step numbers
    values: np.ndarray | None = None  # (H,), in the file's units
    quantiles: np.ndarray | None = None  # (9, H), likewise, if the student has them


def predict(args, voice, _stop):
    """Forecast the next steps of each series of a CSV; or its last ones, held out."""
    opened = open_student(args.checkpoint)
    run_config = opened.content.get("run_config", {})
    horizon = args.horizon or opened.student.prediction_length
    tell_horizon(horizon, opened.student, voice)
    held_out = horizon if args.backtest else 0
    reading = reading_of(args, run_config)
    file = read_input(args.input, reading, voice)

    forecasts, skipped = forecasts_of(file, opened.student, horizon, held_out)
    if not forecasts:
        lines = [Message("\n  {}", (note,)) for note in skipped[:MOST_NOTES]]
        problem = UserError("--input {}: no series to forecast{}", args.input, lines_of(lines))
        command = command_for_short_series(args.input, reading, file.series, opened.student)
        if command:
            problem = UserError("{}\nA student of shorter lengths fits:\n  {}", problem, command)
        raise problem
    tell_contexts(forecasts, skipped, opened.content.get("freqs", []), voice)
    if not opened.student.has_quantiles:
        voice.note("this student has no quantiles: it forecasts the point alone")

    fill_in(forecasts, opened.student)
    if args.backtest:
        if is_inside(args.input, run_config.get("data_dir")):
            voice.note(
                "{} is among the data that the student was trained on ({}):"
                " on data that it has not seen the error may be larger",
                *(args.input, run_config["data_dir"]),
            )
        voice.say("Error on the last {} steps, which were held out:", held_out)
        for forecast in forecasts:
            tell_backtest(forecast, run_config.get("season", "auto"), voice)
    output = user_path(args.output)
    save_forecasts(output, forecasts, file, args.levels)
    picture = picture_beside(output)
    if args.plot:
        draw_forecasts(picture, forecasts, held_out, run_config.get("season", "auto"))
        voice.say("Forecast: {}, {}", output, picture)
    else:
        voice.say("Forecast: {}", output)


def picture_beside(output):
    """Path of the picture of a forecast: f.png beside f.csv and f.csv.gz."""
    is_packed = output.suffix.lower() == ".gz"
    return (output.with_suffix("") if is_packed else output).with_suffix(".png")


def tell_horizon(horizon, student, voice):
    """Say it where a student goes on from its own forecast."""
    own = student.prediction_length
    if horizon > own:
        voice.note("beyond {} steps the student goes on from its own forecast", own)


def forecasts_of(file, student, horizon, held_out):
    """(SeriesForecasts without their values, Messages of the series that cannot go on)."""
    forecasts = []
    find_steps = StepsFinder(horizon, held_out)
    skipped = [Message("skipped: {}", (reason,)) for reason in file.report.skipped]
    for series in file.series:
        try:
            before = series.values[: len(series.values) - held_out]
            context = last_context(before, student.context_length)
        except Unusable as reason:
            skipped.append(Message("skipped: {}: {}", (series.name, reason)))
            continue
        forecasts.append(SeriesForecast(series, context, find_steps(series)))
    return forecasts, skipped


class StepsFinder:
    """Finds the steps that are forecast, once for all series of a file that end alike."""

    def __init__(self, horizon, held_out):
        self.horizon = horizon
        self.held_out = held_out
        self.known = {}  # end of a series -> Index (H,)

    def __call__(self, series):
        """Index (H,) as `steps_after` has it."""
        last_stamps = None if series.stamps is None else series.stamps.asi8.tobytes()
        end = (series.freq, last_stamps)
        if end not in self.known:
            self.known[end] = steps_after(series, self.horizon, self.held_out)
        return self.known[end]


def tell_contexts(forecasts, skipped, trained_on, voice):
    """Print which series are skipped, and what to know of the contexts of the others."""
    notes = [*skipped]
    warnings = []
    for forecast in forecasts:
        notes += context_notes(forecast.series, forecast.context)
        warnings += context_warnings(forecast.series, forecast.context, trained_on)
    for note in notes[:MOST_NOTES]:
        voice.note(note)
    for warning in warnings[:MOST_NOTES]:
        voice.warn(warning)
    more = max(0, len(notes) - MOST_NOTES) + max(0, len(warnings) - MOST_NOTES)
    if more:
        voice.note("... and {} more such notes", more)


def read_input(name, reading, voice):
    """FileRead of the CSV that goes on; prints what was understood of it. Raises UserError."""
    path = user_path(name)
    try:
        file = read_series(path, path.name, reading)
    except Unusable as reason:
        raise UserError("--input {}: {}", name, reason) from reason
    voice.note("{}: {}", path.name, file.report.facts)
    for warning in file.report.warnings[:MOST_NOTES]:
        voice.warn("{}: {}", path.name, warning)
    return file


def reading_of(args, run_config):
    """ReadConfig of predict: as given, else as in the student's run, else the defaults."""
    values = vars(build_parser(demo=False).parse_args(["train"]))
    values.update(run_config)
    values.update({name: value for name, value in vars(args).items() if value is not None})
    return pick(ReadConfig, argparse.Namespace(**values))


def forecast_frame(student, frame, columns=None, levels=("0.1", "0.9"), horizon=None):
    """DataFrame of the next H steps of the series in a DataFrame: a column each, by their dates.

    After the column NAME of a series stand NAME_q0.1 and NAME_q0.9, if the student has quantiles;
    `levels` names others of the nine, as text. `horizon` is another number of steps than H.

    Dates are the index of the frame (a DatetimeIndex) or a column of it; it is read as `predict`
    reads a CSV, with the columns of the student's training unless `columns` (a list) names others.
    Without dates the steps are numbered 1, 2, ... Raises UserError.
    """
    given = argparse.Namespace(columns=columns)
    series = series_of_frame(frame, reading_of(given, dict(student.info).get("run_config", {})))
    forecasts = []
    find_steps = StepsFinder(horizon or student.prediction_length, held_out=0)
    for one in series:
        try:
            context = last_context(one.values, student.context_length)
        except Unusable as reason:
            raise UserError("{}: {}", one.name, reason) from reason
        forecasts.append(SeriesForecast(one, context, find_steps(one)))
    fill_in(forecasts, student)
    table = forecast_table(forecasts, {one.column: one.column for one in series}, levels)
    return table.rename_axis(forecasts[0].index.name)


def forecast_table(forecasts, names, levels):
    """DataFrame of SeriesForecasts by step: a column for each series, and after it its quantiles.

    `names` are those of the columns, by that of the series' own.
    """
    of_series = {*names.values()}
    columns = {}  # name -> (values (H,), index (H,))
    for forecast in forecasts:
        name = names[forecast.series.column]
        columns[name] = (forecast.values, forecast.index)
        if forecast.quantiles is None or "none" in levels:
            continue
        for level in levels:
            own_name = f"{name}_q{level}"
            while own_name in of_series or own_name in columns:  # of another one
                own_name += "_"
            values = forecast.quantiles[LEVEL_NAMES.index(level)]
            columns[own_name] = (values, forecast.index)

    first_index = forecasts[0].index
    if all(index is first_index for _, index in columns.values()):  # there is nothing to align
        return pd.DataFrame({name: values for name, (values, _) in columns.items()}, first_index)
    series = {name: pd.Series(values, index) for name, (values, index) in columns.items()}
    return pd.concat(series, axis=1, sort=True)


def series_of_frame(frame, reading):
    """List of RawSeries of a DataFrame, read as the CSV that it would be. Raises UserError."""
    has_dates = isinstance(frame.index, pd.DatetimeIndex)
    if has_dates:
        frame = frame.rename_axis(frame.index.name or "date").reset_index()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "frame.csv")
        frame.to_csv(path, index=False)
        try:
            file = read_series(path, "frame", reading)
        except Unusable as reason:
            raise UserError("the frame: {}", reason) from reason
    if file.report.skipped:  # here is nobody to be told of it and to go on
        raise UserError("the frame: {}", file.report.skipped)
    return file.series


def last_context(values, length):
    """LastContext of a series (T,). Raises Unusable where there is none."""
    if len(values) < length:
        raise Unusable("too short: {} rows; the student takes {}", len(values), length)
    context = complete_context(values, length)
    if context is None:
        raise Unusable(
            "nothing but missing values in its last {} rows; the student takes {}", length, length
        )
    return context


def is_inside(path, data_dir):
    """Whether a file is a data folder (or file), or lies in it; without one it does not."""
    if not data_dir:
        return False
    place = user_path(path).resolve()
    try:
        root = user_path(data_dir).resolve()
    except UserError:  # in the home folder of somebody who is not known here
        return False
    return root in (place, *place.parents)


def command_for_short_series(data_dir, reading, series, student):
    """The command that trains a student for series which are too short for this one, or None."""
    longest = max(series, key=lambda one: len(one.values))
    if len(longest.values) >= student.context_length + student.prediction_length:
        return None
    wanted = vars(build_parser(demo=False).parse_args(["train"]))
    wanted["data_dir"] = data_dir
    wanted.update(dataclasses.asdict(reading))
    wanted["context_length"] = student.context_length
    wanted["prediction_length"] = student.prediction_length
    args = argparse.Namespace(**wanted)
    lengths = propose_lengths(len(longest.values), longest.freq, pick(DataConfig, args))
    if lengths is None:
        return None
    return command_line(args, context_length=lengths[0], prediction_length=lengths[1])


def context_notes(series, context):
    """List of Message: what to know of a context."""
    if not context.filled:
        return []
    told = Message(
        "{}: {} missing values in the context are filled in", (series.name, context.filled)
    )
    return [told]


def context_warnings(series, context, trained_on):
    """List of Message: what may be wrong; `trained_on` are the frequencies of the training."""
    warnings = []
    if context.carried:
        warnings.append(
            Message(
                "{}: its last {} values are missing: the last known one is carried forward",
                (series.name, context.carried),
            )
        )
    if series.freq not in trained_on:
        known = ", ".join(trained_on) or Message("unknown ones")
        step = series.freq or Message("unknown")
        warnings.append(
            Message("{}: its step is {}, the student was trained on {}", (series.name, step, known))
        )
    return warnings


def fill_in(forecasts, student):
    """Compute the values of SeriesForecasts, and their quantiles where there are any."""
    contexts = np.stack([forecast.context.values for forecast in forecasts])
    horizon = len(forecasts[0].index)
    # (series, H) and (series, 9, H), float64
    values, quantiles = student.without_gradients(torch.from_numpy(contexts), horizon)
    for number, forecast in enumerate(forecasts):
        forecast.values = values[number].numpy()
        if quantiles is not None:
            forecast.quantiles = quantiles[number].numpy()


def tell_backtest(forecast, season, voice):
    """Print the errors on the last rows of a series, beside seasonal-naive's, in its own units."""
    series = forecast.series
    horizon = len(forecast.values)
    truth = series.values[-horizon:]
    if not np.isfinite(truth).any():
        voice.note(
            "{}: its last {} values are missing, the forecast cannot be compared",
            *(series.name, horizon),
        )
        return
    context = torch.from_numpy(forecast.context.values)[None]  # (1, L)
    period = torch.tensor([season_of(series.freq) if season == "auto" else season])
    unit = float(seasonal_scale(context, period)) or math.nan
    naive = naive_values(forecast, season)
    for name, values in (("student", forecast.values), ("seasonal-naive", naive)):
        error = np.abs(values - truth)
        mae = np.nanmean(error)  # over what is not missing
        rmse = np.nanmean(error**2) ** 0.5
        voice.say(
            "  {}: {:<15} MAE {:.6g}  RMSE {:.6g}  MASE {:.4f}",
            *(series.column, name, mae, rmse, mae / unit),
        )


def naive_values(forecast, season):
    """Values (H,) of seasonal-naive beside a SeriesForecast."""
    context = torch.from_numpy(forecast.context.values)[None]  # (1, L)
    period = torch.tensor([season_of(forecast.series.freq) if season == "auto" else season])
    return seasonal_naive(context, period, len(forecast.values))[0].numpy()


def save_forecasts(output, forecasts, file, levels):
    """Write the CSV of the forecasts, a column for each series, in the form of their FileRead.

    After each of them stand its quantiles of these levels, where there are any.
    The stamps, the separator and the decimal mark are as in the input; .gz is packed.
    """
    columns = [forecast.series.column for forecast in forecasts]
    table = forecast_table(forecasts, {name: as_text_cell(name) for name in columns}, levels)
    stamps = {forecasts[0].index.name: table.index}
    if file.times:
        stamps = stamp_columns(table.index, file.times)
    stamps = {as_text_cell(str(name)): texts for name, texts in stamps.items()}
    layout = file.layout
    frame = pd.concat([pd.DataFrame(stamps), table.reset_index(drop=True)], axis=1)
    if layout.decimal == ".":  # Python's own numbers are written in half of the time, all the same
        frame = frame.astype(object)
    content = frame.to_csv(index=False, sep=layout.separator, decimal=layout.decimal).encode()
    if str(output).lower().endswith(".gz"):
        content = gzip.compress(content)
    with output_file(output) as target:
        target.write(content)


def stamp_columns(index, times):
    """Column -> texts (H,) of timestamps, as the columns of Times have them."""
    if len(times.names) == 1:
        return {times.names[0]: write_stamps(index, times.form)}
    patterns = times.form.pattern.split(" ", len(times.names) - 1)
    examples = times.form.example.split(" ", len(times.names) - 1)
    if len(patterns) != len(times.names):  # not written part by part
        return {times.names[0]: write_stamps(index, StampForm("ISO8601"))}
    columns = {}
    for name, pattern, example in zip(times.names, patterns, examples, strict=True):
        columns[name] = write_stamps(index, StampForm(pattern, example))
    return columns


def as_text_cell(name):
    """A name as a cell that no spreadsheet takes for a formula."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name


def draw_forecasts(picture, forecasts, held_out, season):
    """Draw the first forecasts, each after the end of its series; seasonal-naive in a backtest."""
    panels = []
    for forecast in forecasts[:MOST_PANELS]:
        series = forecast.series
        shown = held_out + min(len(forecast.context.values), 2 * len(forecast.values))
        known = series.values[-shown:]
        steps = steps_after(series, len(known), len(known))
        curves = {"forecast": forecast.values}
        if held_out:
            curves["seasonal-naive"] = naive_values(forecast, season)
        begins = steps[len(steps) - held_out - 1]
        panel = Panel(series.name, steps, known, forecast.index, curves, begins)
        if forecast.quantiles is not None:
            panel.bands["forecast"] = forecast.quantiles[[0, -1]]
        panel.x_label = forecast.index.name or ""
        panel.y_label = series.column
        panels.append(panel)
    if len(forecasts) > len(panels):
        panels[0].heading = f"{len(panels)} of {len(forecasts):,} series"
    draw(Path(os.path.realpath(picture)), panels)  # as for the CSV, a link leads to its target


# -- export ----------------------------------------------------------------------------------------


def export(args, voice, stop):
    """Write a student as an ONNX file, or as a folder for the hub."""
    opened = open_student(args.checkpoint)
    base = opened.path.parent if opened.path else Path(".")
    default = "hub"
    if args.format == "onnx":
        default = "student_int8.onnx" if args.int8 else "student.onnx"
    output = user_path(args.output or base / default)
    remove_leftovers(output.parent)
    with telling_full_disk(output):
        if args.format == "onnx":
            job = Job(OneProcess(torch.device("cpu")), voice, stop)
            export_onnx(opened, output, args.int8, job)
        else:
            export_hub(opened, output, base / "evaluation.json")
    voice.say("Exported: {}", output)


def export_onnx(opened, path, is_int8, job):
    """Write a student as ONNX. Raises UserError, and writes nothing, where it is not as good."""
    student = opened.student
    contexts = random_contexts(student.context_length)
    model = onnx_model(student, contexts)
    difference = difference_from_pytorch(model, student, contexts)
    job.voice.say(
        "Largest difference from PyTorch on {} contexts: {:.1e} of their deviation",
        *(len(contexts), difference),
    )
    if not difference < ONNX_TOLERANCE:
        raise UserError(
            "{}: not kept: it differs from PyTorch by {:.1e} deviations", path, difference
        )
    if is_int8:
        use_int8(model)
    content = model.SerializeToString(deterministic=True)
    if is_int8:
        refuse_worse(content, opened, path, job)
    with output_file(path) as file:
        file.write(content)


def random_contexts(length):
    """Raw contexts (S, L) float64: random walks in three units, each at four offsets, a constant.

    The largest offsets are a million and a hundred million deviations, as of a meter that counts
    up: float32 could not tell such values apart.
    """
    walks = np.random.default_rng(0).standard_normal((8, length)).cumsum(1)
    deviation = walks.std(1, keepdims=True)
    contexts = [np.ones((1, length))]
    for offset in (-walks[:, -1:], 0, 1e6 * deviation, 1e8 * deviation):
        for unit in (1e-3, 1, 1e3):
            contexts.append(unit * (walks + offset))
    return torch.from_numpy(np.concatenate(contexts))


def onnx_model(student, contexts):
    """onnx.ModelProto of a student; `contexts` (B, L) float64 are an example of what it takes.

    It takes and gives float64, as the student does: contexts are scaled in float64, the network is
    float32.
    """
    import onnx
    import onnxscript  # noqa: F401  torch.onnx needs it

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages we do not need
    network = PointsAndQuantiles(student).eval() if student.has_quantiles else student
    with torch.inference_mode(), without_warning_of_torch():
        program = torch.onnx.export(
            network,
            (contexts[:2],),
            input_names=["context"],
            output_names=["forecast", "quantiles"][: 1 + student.has_quantiles],
            dynamic_shapes={"context": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    model = onnx.ModelProto.FromString(program.model_proto.SerializeToString(deterministic=True))
    forget_making(model)
    del model.metadata_props[:]
    for name, text in onnx_facts(student).items():
        model.metadata_props.add(key=name, value=text)
    return model


def forget_making(model):
    """Take out of an ONNX model what PyTorch tells of its making, folders of this machine too."""
    graph = model.graph
    del graph.value_info[:]
    for node in graph.node:
        node.ClearField("doc_string")
    for part in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]


def difference_from_pytorch(model, student, contexts):
    """Largest difference of an ONNX model's forecasts from a student's, in contexts' deviations."""
    import onnxruntime

    with torch.inference_mode():
        truths = [student(contexts)]
        if student.has_quantiles:
            truths = student(contexts, with_quantiles=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = []
    for part in contexts.split([len(contexts) - 1, 1]):  # a batch, and a single one
        found.append(session.run(None, {"context": part.numpy()}))
    differences = []
    for parts, truth in zip(zip(*found, strict=True), truths, strict=True):
        differences.append(largest_difference(parts, truth, contexts))
    return max(differences)


class PointsAndQuantiles(nn.Module):
    """All that a student forecasts, as a network of one input."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, context):
        return self.student(context, with_quantiles=True)


def largest_difference(parts, truth, contexts):
    """Largest difference of forecasts (in parts) from the true ones, in deviations of contexts."""
    _, deviation = instance_scale(contexts)
    difference = torch.from_numpy(np.concatenate(parts)) - truth  # (B, H), or (B, 9, H)
    return float((difference.flatten(1) / deviation).abs().max())


@contextlib.contextmanager
def without_warning_of_torch():
    """While torch exports, it calls a thing of its own that it has deprecated: nobody can mend it.

    No other warning is silenced, here or elsewhere.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        yield


def use_int8(model):
    """Keep the weights of an ONNX model in 8 bits each, from which float32 is made at its loading.

    Forecasts are computed in float32 as before: none depends on the others in its batch, as it
    would if what flows between the layers was rounded, too.
    """
    from onnx import TensorProto, numpy_helper

    graph = model.graph
    tensors = []
    nodes = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or math.prod(tensor.dims) < FEWEST_ROUNDED:
            tensors.append(tensor)
            continue
        kept, steps = rounded_weights(tensor.name, numpy_helper.to_array(tensor))
        tensors += [numpy_helper.from_array(values, name) for name, values in kept.items()]
        nodes += steps
    nodes += graph.node
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(tensors)
    graph.node.extend(nodes)
    shorten_names(graph)


def rounded_weights(name, values):
    """(name -> array to keep, nodes that make of these an array that is called `name` again).

    Whole numbers from -127 to 127 are kept, and a scale: of a matrix one for each row or column,
    whichever are fewer.
    """
    from onnx import TensorProto, helper

    axis = 0  # along which there is one scale
    if values.ndim == 2 and values.shape[0] < values.shape[1]:
        axis = 1
    scale = np.abs(values).max(axis, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1
    short, whole, factor = f"{name}.int8", f"{name}.whole", f"{name}.scale"
    steps = [
        helper.make_node("Cast", [short], [whole], to=TensorProto.FLOAT),
        helper.make_node("Mul", [whole, factor], [name]),
    ]
    return {short: np.rint(values / scale).astype(np.int8), factor: scale}, steps


def shorten_names(graph):
    """Give all that is computed in an ONNX graph names of few signs, as there are hundreds."""
    named = {value.name: value.name for value in (*graph.input, *graph.output)} | {"": ""}
    for tensor in graph.initializer:
        tensor.name = named.setdefault(tensor.name, f"{len(named):x}")
    for node in graph.node:
        node.ClearField("name")
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = named.setdefault(name, f"{len(named):x}")


def refuse_worse(content, opened, path, job):
    """Say what int8 does to MSE and WQL. Raises UserError where one is too much higher."""
    voice = job.voice
    windows = own_test_windows(opened, voice)
    if windows is None:
        windows = walking_windows(opened.student)
    found = []
    for student in (opened.student, OnnxStudent(content, path)):
        answer = student_answers(student, windows.horizon, job)
        found.append(score_answers(answer, windows, EVAL_BATCH, job))
    (scores, quantiles), (int8_scores, int8_quantiles) = found
    errors = {"MSE": (scores.mse, int8_scores.mse)}
    if quantiles:
        errors["WQL"] = (quantiles.wql, int8_quantiles.wql)
    for name, (exact, rounded) in errors.items():
        voice.say(
            "{} on {:,} windows: {:.4f} in float32, {:.4f} in int8 ({:+.2f} %)",
            *(name, len(windows), exact, rounded, per_cent_more(rounded, exact)),
        )
    for name, (exact, rounded) in errors.items():
        if not rounded <= (1 + INT8_TOLERANCE) * exact:
            raise UserError(
                "{}: not kept: the {} of int8 is {:.2f} % above that of float32, more than {:g} %",
                *(path, name, per_cent_more(rounded, exact), 100 * INT8_TOLERANCE),
            )
    voice.say("Size: {:.2f} MB", 1e-6 * len(content))


def per_cent_more(value, other):
    """How much larger a value is than another one, in per cent; nan beside 0."""
    return 100 * (value / other - 1) if other else math.nan


def own_test_windows(opened, voice):
    """Test Windows of a student's own run; None, with a note, where they are not at hand.

    An exported student names no place of this machine.
    """
    run_config = opened.content.get("run_config", {})
    values = vars(build_parser(demo=False).parse_args(["train"])) | run_config
    values["context_length"] = opened.student.context_length
    values["prediction_length"] = opened.student.prediction_length
    args = argparse.Namespace(**values)
    reason = Message("it does not say where they are")
    if opened.path and "data_dir" in run_config:
        try:
            files = read_files(args.data_dir, args.max_files, pick(ReadConfig, args), voice)
            windows = split_data(files, pick(DataConfig, args)).windows["test"]
        except UserError as error:
            reason = error
        else:
            if windows.digest == opened.content.get("data", {}).get("test"):
                return windows
            reason = Message("the data in {} is another", (args.data_dir,))
    voice.note("the run's own test windows are not at hand, random walks are taken: {}", reason)
    return None


def walking_windows(student):
    """Windows of random walks, of as many points as a student takes and gives."""
    length = student.context_length + student.prediction_length
    walks = np.random.default_rng(1).standard_normal((INT8_WALKS, length)).cumsum(1)
    walks /= walks.std(1, keepdims=True)
    return Windows(
        values=walks.astype(np.float32).ravel(),
        observed=np.ones(walks.size, bool),
        starts=length * np.arange(INT8_WALKS),
        series=np.zeros(INT8_WALKS, np.int64),
        freqs=[""],
        seasons=np.array([1]),
        names=[""],
        context_length=student.context_length,
        horizon=student.prediction_length,
        digest="",
    )


def onnx_facts(student):
    """Metadata (str -> str) of the ONNX file: to be read by people, and by `content_of_onnx`."""
    teacher = student.info.get("teacher") or {"teacher": "none", "licence": "no teacher was used"}
    licences = [teacher.get("licence", "unknown"), *inherited_licences(student.info)]
    facts = {
        "context_length": student.context_length,
        "prediction_length": student.prediction_length,
        "sampling_frequency": ", ".join(student.info.get("freqs", [])),
        "quantile_levels": ", ".join(LEVEL_NAMES) if student.has_quantiles else "none",
        "teacher": teacher.get("teacher", "unknown"),
        "licence": "; ".join(licences),
    }
    parameters = sum(weight.numel() for weight in student.parameters())
    content = student.sizes | {"info": dict(student.info) | {"parameters": parameters}}
    facts[ONNX_FACTS] = json_text(content, separators=(",", ":"))
    return {name: printable(str(value)) for name, value in facts.items()}


def export_hub(opened, output, evaluation_file):
    """Write a student's weights, configuration and card, with its scores where there are any."""
    evaluation = read_evaluation(evaluation_file, opened)
    if evaluation:
        opened.student.info["evaluation"] = evaluation
    # In this order: a config.json knows its weights, so that no kill leaves a pair that opens.
    names = ["config.json", "model.safetensors", "README.md"]
    if output.exists():
        there = {path.name for path in output.iterdir() if not path.name.startswith(".")}
        if there - set(names):
            raise UserError("--output {}: holds other files; choose another folder", output)
    with new_folders(output), temporary_folder(output.parent) as temporary:
        opened.student.save_pretrained(temporary)
        for name in names:
            follow_umask(Path(temporary, name))
            os.replace(Path(temporary, name), output / name)


def read_evaluation(path, opened):
    """Windows and rows of an evaluation.json; None where it is of other weights or windows.

    The rows are those of the student (under that name) and of forecasters that are no student.
    """
    if not path.is_file():
        return None
    try:
        table = read_json(path, MOST_EVALUATION)
        if found := misfit(table, EVALUATION):
            raise ValueError(found)
        rows = {}
        for name, row in table["rows"].items():
            if row.get("weights") not in (None, opened.weights_id):
                continue
            shown = "student" if "weights" in row else name
            rows[shown] = {metric: row[metric] for metric in METRICS}
            for metric in QUANTILE_METRICS:
                if row.get(metric) is not None:
                    rows[shown][metric] = row[metric]
        if "student" not in rows or table["test"] != opened.content.get("data", {}).get("test"):
            return None
        return {"windows": table["windows"], "rows": rows}
    except (ValueError, KeyError) as error:
        raise UserError("{}: damaged ({}); evaluate writes it anew", path, repr(error)) from error


# -- label -----------------------------------------------------------------------------------------


def label(args, voice, stop):
    """Label the training windows into the cache, or list what it holds."""
    if args.list:
        list_labels(user_path(args.label_cache), voice)
        return
    job = start_job(args, "32-true", voice, stop)
    windows = load_data_or_offer(args, voice).windows["train"]
    labels = labels_of(windows, windows, pick(TeacherRequest, args), job)
    voice.say("Labels of {:,} windows: {}", labels.windows, labels.folder)


def list_labels(cache, voice):
    """Print a line for each label file in the cache."""
    folders = sorted(cache.glob("*/"))
    if not folders:
        voice.say("No label files in {}", cache)
    for folder in folders:
        manifest = read_manifest(folder)
        if not manifest:
            voice.say("{}: its manifest is damaged", folder.name)
            continue
        file = LabelFile(folder, manifest, has_quantiles(manifest))
        key = manifest["key"]
        done = file.share_there()
        patches = []
        if key["point"] != OWN_POINT:
            patches = [Message("patch {}", (str(manifest["patch_sizes"]),))]
        facts = [
            manifest["teacher"],
            Message("{:,} windows", (file.windows,)),
            Message("{} -> {}", (key["context"], key["horizon"])),
            Message("{} and quantiles", (key["point"],)) if file.quantiles else key["point"],
            *patches,
            Message("{:.1f} MB", (file.megabytes,)),
            Message("{:.0f} % made", (100 * done,)),
            manifest["made"],
        ]
        voice.say("{}: {}", folder.name, linked(facts, ", "))


# == Entry =========================================================================================


def parse_arguments(argv):
    """Namespace of the checked arguments. Raises UserError with every problem that was found."""
    words = list(argv)
    for word in words:
        if not is_utf8(word):
            raise UserError("{}: is not UTF-8, which a name must be; rename it", ascii(word))
    is_flag = bool(words) and words[0].startswith("-")
    if words and words[0] not in COMMANDS and not is_flag:
        raise no_command(words[0])
    is_of_program = words[:1] in (["-h"], ["--help"])
    if not is_of_program and (not words or is_flag):
        words = ["train", *words]
    parser = build_parser(demo="--demo" in words)
    if not is_of_program and (problems := check_defaults(parser, words[0])):
        raise UserError(
            "{} problem(s) with the defaults in the script\n  {}",
            *(len(problems), linked(problems, "\n  ")),
        )
    args, unknown = parser.parse_known_args(words)
    if not argv and not is_there(args.data_dir):
        raise UserError(
            "no arguments, and no data in {} (--data_dir). To begin:\n{}",
            *(args.data_dir, Message(FIRST_COMMANDS, (DEMO["save_dir"],))),
        )
    args = fit_patch_size(args, words)
    problems = [tell_unknown(word, args) for word in unknown]
    problems += check_ranges(args)
    if not getattr(args, "list", False):  # label --list reads the cache, and nothing else
        problems += check_inputs(args)
        problems += check_outputs(args)
    if not getattr(args, "list", False) and "device" in args:
        problems += check_machine(args)
    if "decimal" in args:
        problems += check_reading(args)
    if args.command == "train":
        problems += check_training(args)
    if args.command == "export" and args.int8 and args.format != "onnx":
        problems.append(Message("--int8: a hub folder has float32; give --format onnx"))
    if problems:
        raise UserError(
            "{} problem(s) with the arguments\n  {}", len(problems), linked(problems, "\n  ")
        )
    return args


def is_utf8(word):
    """Whether a word of the command line is UTF-8. Pictures, JSON and ONNX know no other names."""
    try:
        word.encode()
        return True
    except UnicodeEncodeError:  # Python keeps such bytes as surrogates
        return False


def no_command(word):
    """UserError of a first word that is neither a command nor a flag."""
    close = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = ""
    if close:
        hint = Message("; did you mean {}?", (close[0],))
    elif is_there(word):
        flag = Message("--data_dir {}", (shlex.quote(word),))
        hint = Message("; did you mean {}?", (flag,))
    return UserError("{}: not a command; these are {}{}", word, ", ".join(COMMANDS), hint)


def check_defaults(parser, command):
    """Problems (list of Message, as those of all checks below) of the defaults of a command.

    Of those that argparse never looks at, as edits may leave them.

    It reads a default that is a text as if it were typed, but for its choices; others it takes.
    """
    (commands,) = [action for action in parser._actions if action.dest == "command"]
    problems = []
    for action in commands.choices[command]._actions:
        value = action.default
        if value == argparse.SUPPRESS:  # --help
            continue
        if value is None:
            is_wrong = command in ("train", "label") and is_needed(action)
        else:
            is_wrong = not is_of_kind(value, action)
        if is_wrong:
            shown = repr(value)
            problems.append(Message("--{} {}: must be {}", (action.dest, shown, kind_of(action))))
    return problems


def is_needed(action):
    """Whether None cannot be the value of a flag of train."""
    return action.dest in {*RANGES, *TEXTS_NEEDED} or bool(action.choices)


def is_of_kind(value, action):
    """Whether a default, which is not None, is one that a flag can take."""
    if action.nargs == 0:  # it takes no value
        return isinstance(value, bool)
    if action.nargs == "+":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if action.choices:
        return value in action.choices
    if isinstance(value, str):
        return True  # argparse reads it
    is_whole = type(value) is int
    if action.type in (int, int_or_auto):
        return is_whole
    return action.type in (float, float_or_auto) and (is_whole or isinstance(value, float))


def kind_of(action):
    """Message: what a flag takes."""
    if action.nargs == 0:
        return Message("True or False")
    if action.nargs == "+":
        return Message("a list of texts, such as ['first']")
    if action.choices:
        return Message("one of {}", (", ".join(action.choices),))
    kinds = {
        int: Message("a whole number"),
        float: Message("a number"),
        int_or_auto: Message("a whole number or 'auto'"),
        float_or_auto: Message("a number or 'auto'"),
    }
    return kinds.get(action.type, Message("a text in quotes, as it is typed"))


def fit_patch_size(args, words):
    """The arguments, with patches that fit a short context, unless --patch_size was typed."""
    is_typed = any(word.partition("=")[0] == "--patch_size" for word in words)
    if "patch_size" not in args or is_typed or args.patch_size <= args.context_length:
        return args
    lowered = {"patch_size": max(1, args.context_length // 2)}
    return argparse.Namespace(**(vars(args) | lowered))


def tell_unknown(word, args):
    """Message: what to say of a word that is no argument."""
    problem = Message("{}: not an argument of {}", (word, args.command))
    if word in COMMANDS:
        return Message("{}; the command comes first, before all flags", (problem,))
    flags = [f"--{name}" for name in vars(args)]
    close = difflib.get_close_matches(word.partition("=")[0], flags, n=1)
    if close:
        return Message("{}; did you mean {}?", (problem, close[0]))
    return problem


def check_ranges(args):
    """Problems of numbers that are too small, too large or not finite."""
    problems = []
    for name, (is_right, range_words) in RANGES.items():
        value = getattr(args, name, None)
        if value is None or value == "auto":
            continue
        is_finite = isinstance(value, int) or math.isfinite(value)
        if not is_finite or not is_right(value):
            problems.append(Message("--{} {}: must be {}", (name, value, range_words)))
    return problems


def is_local(name):
    """Whether a name looks like a path, which a hub id does not."""
    return re.match(r"[./~]|.*\.(pt|onnx)$", name) is not None


def looks_like_path(name):
    """Whether what a user calls a checkpoint cannot be a hub id, which is OWNER/MODEL."""
    first_part = name.partition("/")[0]
    return is_local(name) or not is_hub_id(name) or is_there(first_part)


def is_there(path):
    """Whether a path, which may begin with ~, is there."""
    return user_path(path).exists()


def check_inputs(args):
    """Problems of files and folders that are read."""
    problems = []
    checkpoints = getattr(args, "checkpoint", [])
    if isinstance(checkpoints, str):
        checkpoints = [checkpoints]
    for name in checkpoints:
        if looks_like_path(name) and not is_there(name):
            problems.append(Message("--checkpoint {}: no such file or folder", (name,)))

    parent = getattr(args, "init_from", None)
    if parent and looks_like_path(parent) and not is_there(parent):
        problems.append(Message("--init_from {}: no such file or folder", (parent,)))

    data_dir = getattr(args, "data_dir", None)
    is_made = getattr(args, "demo", False) and data_dir == DEMO["data_dir"]
    if data_dir is not None and not is_made and not is_there(data_dir):
        problems.append(Message("--data_dir {}: no such folder or file", (data_dir,)))
    if "input" in args and not is_there(args.input):
        problems.append(Message("--input {}: no such folder or file", (args.input,)))

    for name in getattr(args, "with_forecaster", []):
        if not name.endswith(".py") or not user_path(name).is_file():
            problems.append(Message("--with_forecaster {}: no such Python file", (name,)))
    return problems + check_teacher(args)


def check_teacher(args):
    """Problems of the teacher's name."""
    name = getattr(args, "teacher_model", None)
    if name is None or getattr(args, "alpha", None) == 0:
        return []
    if is_own_file(name):
        if args.teacher_patch_size not in (None, "auto"):
            return [Message("--teacher_patch_size: the teacher {} has no patches", (name,))]
        if needs_teacher(args) and not user_path(name).is_file():
            return [Message("--teacher_model {}: no such file", (name,))]
    elif user_path(name).is_file():
        return [
            Message(
                "--teacher_model {}: is a file; a folder, a hub id or a .py file is expected",
                (name,),
            )
        ]
    elif needs_teacher(args) and is_local(name) and not is_there(name):
        return [Message("--teacher_model {}: no such folder", (name,))]
    return []


def needs_teacher(args):
    """Whether labels have to be made for certain. A cache that is there may hold them, carried."""
    if args.command == "train" and args.alpha == 0:
        return False
    return bool(args.label_cache) and not user_path(args.label_cache).is_dir()


def check_outputs(args):
    """Problems of places that are written to."""
    folders = {name: getattr(args, name, None) for name in ("save_dir", "output_dir")}
    if "label_cache" in args and needs_teacher(args):
        folders["label_cache"] = args.label_cache
    if getattr(args, "output", None) and not is_special(args.output):  # /dev may be locked
        folders["output"] = Path(args.output).parent
    problems = []
    for name, folder in folders.items():
        if folder is not None and (problem := unwritable(folder)):
            problems.append(Message("--{} {}: {}", (name, getattr(args, name), problem)))

    if getattr(args, "output", None):
        problems += check_output_file(args)
    return problems


def check_output_file(args):
    """Problems of an --output that would replace something else."""
    output = user_path(args.output).resolve()
    is_folder_wanted = args.command == "export" and args.format == "hub"
    if is_folder_wanted and output.is_file():
        return [Message("--output {}: is a file; a folder is to be written", (args.output,))]
    if not is_folder_wanted and output.is_dir():
        return [Message("--output {}: is a folder; a file is to be written", (args.output,))]
    if args.command != "predict":
        return []
    if is_parquet(output):
        return [
            Message("--output {}: a CSV is written; let its name end with .csv", (args.output,))
        ]
    if output == user_path(args.input).resolve():
        return [Message("--output {}: is the input", (args.output,))]
    if args.plot and output.suffix == ".png":
        return [Message("--output {}: is where --plot puts the picture", (args.output,))]
    if args.plot and is_special(args.output):
        return [Message("--output {}: is no file: --plot has no place beside it", (args.output,))]
    return []


def check_reading(args):
    """Problems of the marks in numbers."""
    problems = []
    thousands = args.thousands
    if thousands not in (None, "auto", "none") and (len(thousands) != 1 or thousands.isalnum()):
        problems.append(
            Message("--thousands {}: must be one mark, such as , or none", (thousands,))
        )
    if args.decimal not in (None, "auto") and args.decimal == thousands:
        problems.append(Message("--thousands {}: is the --decimal mark, too", (thousands,)))
    return problems


def check_machine(args):
    """Problems of devices that are not there, or not enough."""
    gpus = torch.cuda.device_count()
    form = re.fullmatch(r"auto|cpu|mps|cuda(:(?P<index>\d+))?", args.device)
    if not form:
        return [Message("--device {}: is not auto, cpu, cuda, cuda:1 or mps", (args.device,))]
    is_here = True
    if args.device == "mps":
        is_here = torch.backends.mps.is_available()
    elif args.device.startswith("cuda"):
        is_here = int(form["index"] or 0) < gpus
    if not is_here:
        problem = Message(
            "--device {}: is not here (PyTorch finds {} CUDA GPUs); use --device cpu",
            (args.device, gpus),
        )
        return [problem]

    problems = []
    is_cpu = args.device == "cpu" or (args.device == "auto" and not gpus)
    if is_cpu and args.teacher_precision == "bf16":
        problems.append(Message("--teacher_precision bf16: needs a GPU; use 32"))
    if args.devices != 1 and ":" in args.device:
        problems.append(Message("--devices {}: not with --device {}", (args.devices, args.device)))
    if not is_cpu and args.devices > max(1, gpus):
        problems.append(Message("--devices {}: PyTorch finds {} GPUs", (args.devices, gpus)))
    return problems


def check_training(args):
    """Problems of sizes that do not fit each other, and of --resume."""
    problems = []
    if args.num_heads > 0 and args.d_model % args.num_heads != 0:
        problems.append(
            Message("--num_heads {}: does not divide --d_model {}", (args.num_heads, args.d_model))
        )
    if args.patch_size > args.context_length:
        problems.append(
            Message(
                "--patch_size {}: longer than --context_length {}",
                (args.patch_size, args.context_length),
            )
        )
    if args.init_from and is_inside(args.init_from, args.save_dir):
        problems.append(
            Message(
                "--init_from {}: lies in --save_dir, whose run is moved away;"
                " name another --save_dir",
                (args.init_from,),
            )
        )
    if args.resume:
        folder = user_path(args.save_dir)
        was_trying = args.alpha == "auto" and (folder / "trials").is_dir()  # these are repeated
        is_moving = any(folder.glob("old-*.moving/last.pt"))  # it is taken back
        if not (folder / "last.pt").is_file() and not was_trying and not is_moving:
            problems.append(
                Message(
                    "--resume: no {} to go on from; start without --resume", (folder / "last.pt",)
                )
            )
    return problems


def main(argv=None):
    """Run the command line `argv` (default: sys.argv[1:]).

    Returns the exit code: 0, 2 on bad input, 128 + number of the signal.
    """
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):  # a console that cannot print Chinese shows escapes
            output.reconfigure(errors="backslashreplace")
    if is_started_by_fabric():
        threading.Thread(target=end_with_parent, daemon=True).start()
    words = sys.argv[1:] if argv is None else argv
    language = language_of(words)  # of what ends the program, perhaps before all flags are read
    stop = Stop(language)
    with caught_signals(stop):
        return exit_code_of(words, stop, language)


def exit_code_of(words, stop, language):
    """Do what a command line says, and tell in one line what ends it early."""
    try:
        run_command(words, stop)
        return 0
    except Interrupted as interruption:
        signum = interruption.args[0]
        tell_end(Message("stopped by {}", (signal.Signals(signum).name,)), language)
        return 128 + signum
    except torch.OutOfMemoryError as error:
        problem = Message(
            "out of GPU memory ({}); lower --batch_size or --teacher_batch_size",
            (str(error).splitlines()[0][:99],),
        )
    except ModuleNotFoundError as error:  # predicting takes few packages, pictures take more
        problem = Message(
            "{} is not installed: pip install -r requirements.txt, or pip install {}",
            (error.name, error.name),
        )
    except UserError as error:
        problem = error
    except OSError as error:
        where = error.filename or Message("input or output")
        problem = Message("{}: {}", (where, error.strerror or error))
    tell_end(Message("error: {}", (problem,)), language)
    return 2


def run_command(words, stop):
    """Do what a command line says. Raises UserError and whatever the command raises."""
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        found = sys.version.split()[0]
        raise UserError("this is Python {}; it takes {} or newer", found, oldest)
    commands = {
        "train": train,
        "evaluate": evaluate,
        "predict": predict,
        "export": export,
        "label": label,
    }
    args = parse_arguments(words)
    commands[args.command](args, Voice(args.lang), stop)


@contextlib.contextmanager
def caught_signals(stop):
    """Inside, signals that stop a program are told to `stop`; in a thread, Python allows none."""
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for signum in stopping_signals():
            handlers[signum] = signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def stopping_signals():
    """The signals at which the work in hand is saved. SIGHUP is left to nohup, which ignores it."""
    found = [signal.SIGINT, signal.SIGTERM]
    has_hangup = hasattr(signal, "SIGHUP")  # Windows has none
    if has_hangup and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        found.append(signal.SIGHUP)
    return found


def language_of(words):
    """The language of the words of a command line, which may be wrong otherwise."""
    if "--lang" in words[:-1]:
        named = words[words.index("--lang") + 1]
    else:
        named = next((word[7:] for word in words if word.startswith("--lang=")), "")
    return named if named in ("en", "zh") else language_of_locale()


def tell_end(message, language):
    """Print why the program ends; one of several processes speaks for all."""
    if speaks_for_all():
        print(in_language(message, language), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
