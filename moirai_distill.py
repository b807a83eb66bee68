#!/usr/bin/env python3
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
import concurrent.futures
import contextlib
import copy
import dataclasses
import difflib
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
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PureWindowsPath

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from huggingface_hub import (
    ModelCard,
    PyTorchModelHubMixin,
    errors,
    hf_hub_download,
    try_to_load_from_cache,
)
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
    "num_epochs": 8,
    "learning_rate": 1e-3,
}


def add_data_flags(parser):
    """What is read, and how it is split and cut into windows."""
    add = parser.add_argument_group("data").add_argument
    add("--data_dir", default="data/datasets/Pretrain_Data", help="folder of CSVs, or one CSV")
    add("--max_files", type=int, default=100, help="read at most this many, by name; 0 = all")
    add("--columns", nargs="+", default=["first"], help="`first` numeric column, `all`, or names")
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


def add_teacher_flags(parser):
    """Who labels the windows, and how."""
    add = parser.add_argument_group("teacher").add_argument
    add("--teacher_model", default="Salesforce/moirai-1.1-R-base", help="hub id or local folder")
    add("--teacher_revision", default=None, help="branch, tag or commit of the hub id")
    add("--teacher_patch_size", type=int_or_auto, default="auto", help="auto = best on a sample")
    add("--teacher_point", choices=["median", "mean"], default="median", help=POINT_HELP)
    add("--num_samples", type=int, default=100, help="samples under the median")
    add("--teacher_batch_size", type=int, default=256, help="windows per teacher call")
    add("--teacher_precision", choices=["32", "bf16"], default="32", help="bf16: faster on a GPU")
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


def add_run_flags(parser):
    """Where the run is kept."""
    add = parser.add_argument_group("run").add_argument
    add("--save_dir", default="./checkpoints/moirai_distill", help="checkpoints, metrics, pictures")
    add("--resume", action="store_true", help="go on from save_dir/last.pt, with the same flags")
    add("--demo", action="store_true", help="distil the demo teacher on synthetic CSVs; offline")


def add_evaluate_flags(parser):
    """What evaluate has beside the flags of data, teacher and machine."""
    add = parser.add_argument
    add("--checkpoint", nargs="+", required=True, help=f"one or more of: {CHECKPOINT_HELP}")
    add(
        "--with_teacher", action="store_true", help="score the teacher, too, from the cache or anew"
    )
    add(
        "--output_dir", default=None, help="for table and pictures; default: the first one's folder"
    )


def add_predict_flags(parser):
    """All that predict takes."""
    add = parser.add_argument
    add("--checkpoint", required=True, help=CHECKPOINT_HELP)
    add("--input", required=True, help="CSV whose series go on after its end")
    add("--columns", nargs="+", default=None, help="as in train; default: as in its training")
    add("--output", default="forecast.csv", help="CSV of the forecast")
    add("--plot", action="store_true", help="draw the forecast, beside --output")
    add("--backtest", action="store_true", help="hold the last steps out; show the error on them")


def add_export_flags(parser):
    """All that export takes."""
    add = parser.add_argument
    add("--checkpoint", required=True, help=CHECKPOINT_HELP)
    add("--format", choices=["onnx", "hub"], required=True, help="onnx file, or hub folder")
    add("--output", default=None, help="default: student.onnx or hub in the checkpoint's folder")


POINT_HELP = "of samples, or the exact mean of the distribution"
ALPHA_HELP = "1 = teacher's labels only, 0 = truth only (no teacher), auto = tried on validation"
PRECISION_HELP = "bf16-mixed is faster on new GPUs"
CHECKPOINT_HELP = "a run's folder (its best), a .pt, an exported folder or a hub id"


# What a newcomer types: shown by --help, and where the script is started without arguments.
FIRST_COMMANDS = f"""\
  python moirai_distill.py --demo
      everything once, offline, in minutes, under {DEMO["save_dir"]}
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
        epilog=f"To begin:\n{FIRST_COMMANDS}\n\n`COMMAND --help` lists the flags of a command.",
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
    add_teacher_flags(train)
    add_machine_flags(train)
    add_student_flags(train)
    add_training_flags(train)
    add_run_flags(train)
    if demo:
        train.set_defaults(**DEMO)

    label = command("label", "only label the training windows, into the cache", **shown)
    add_data_flags(label)
    add_teacher_flags(label)
    add_machine_flags(label)
    label.add_argument("--list", action="store_true", help="list the label files in the cache")

    epilog = "Of the flags of data and teacher, those not given are as in the first one's run."
    evaluate = command("evaluate", "score checkpoints", epilog=epilog)
    add_data_flags(evaluate)
    add_teacher_flags(evaluate)
    # None: as in the checkpoint's run. Asked before other flags are added: for these alone.
    inherited = vars(evaluate.parse_args([]))
    evaluate.set_defaults(**dict.fromkeys(inherited))
    add_machine_flags(evaluate)
    add_evaluate_flags(evaluate)

    predict = command("predict", "forecast the next steps of a CSV", **shown)
    add_predict_flags(predict)

    export = command("export", "write a model to ship")
    add_export_flags(export)

    for parser in (train, label, evaluate, predict, export):
        parser.add_argument(
            "--lang",
            choices=["en", "zh"],
            default=language_of_locale(),
            help="of results; default: the locale's",
        )
    return program


@dataclasses.dataclass
class Message:
    """An English sentence with places for values, and the values that stand in them.

    It is kept in parts, so that `Voice` can say it in the user's language. A value may be a Message
    itself. A sentence without values is taken as it is.
    """

    sentence: str
    values: tuple = ()

    def __str__(self):
        return self.sentence.format(*self.values) if self.values else self.sentence


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


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a UserError where argparse would print its usage and exit."""

    def error(self, message):
        raise UserError(f"{message} (python {self.prog} --help lists the flags)")


def int_or_auto(text):
    """Type of a flag that is a whole number or `auto`."""
    try:
        return text if text == "auto" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number or auto") from error


def float_or_auto(text):
    """Type of a flag that is a number or `auto`."""
    try:
        return text if text == "auto" else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number or auto") from error


def ratio(text):
    """Type of `train:validation:test`, three numbers greater than 0."""
    try:
        shares = tuple(float(share) for share in text.split(":"))
    except ValueError:
        shares = ()
    if len(shares) != 3 or not all(0 < share < math.inf for share in shares):
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers above 0, such as 8:1:1")
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
    return (lambda value: value >= low), f"at least {low}"


def above(low):
    """(test, words) of a range in RANGES."""
    return (lambda value: value > low), f"greater than {low}"


def between(low, high):
    """(test, words) of a range in RANGES."""
    return (lambda value: low <= value <= high), f"at least {low} and at most {high}"


# What the value of a flag must be; `auto`, where the flag knows it, is always right.
RANGES = {
    "max_files": at_least(0),
    "context_length": at_least(2),
    "prediction_length": at_least(1),
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
AVERAGE_DECAY = 9  # the averaged weights reach back over about 1/9 of all steps; larger = shorter
MAX_FAILED = 10  # steps in a row with a non-finite loss or gradient that end the run
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)  # what --alpha auto tries (0 and at least one more) ...
TRIAL_EPOCHS = 3  # ... for so many epochs each
FEW_STEPS = 200  # a whole run of fewer steps than this is told, with ...
ADVISED_STEPS = 300  # ... a command whose run takes about so many ...
ADVISED_RATE = 1e-3  # ... at a learning rate of at least this

# Time and memory. Results stay as they are, up to rounding.
EVAL_BATCH = 512  # windows per forward pass where nothing is trained
FILES_FOR_PROCESSES = 50  # from so many files on, one process per core reads them
MOE_SEQUENCES = 2048  # windows times samples that a MOIRAI-MoE takes in one call

# What is read, and what becomes of it. Where a file is read in another way than before, its labels
# are made anew.
TIME_NAMES = ("date", "timestamp", "time", "datetime", "ds")  # of time columns, in any case
ID_NAMES = ("unique_id", "item_id", "id", "series", "series_id")  # of the id of a long format
INDEX_NAMES = ("id", "index", "time_idx")  # of columns that are no values
DATES = (  # beside ISO 8601
    "%m/%d/%Y",
    "%d/%m/%Y",
    "%d.%m.%Y",
    "%d-%m-%Y",
    "%Y/%m/%d",
    "%Y年%m月%d日",
    "%d-%b-%Y",
    "%d-%b-%y",
    "%b %Y",
)
CLOCKS = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p")  # what may follow a date
FEW_UNREAD = 0.1  # share of the stamps that may be unread in a column found by its content ...
MANY_UNREAD = 0.5  # ... and in one that is called a time column
FEW_DUPLICATES = 0.01  # share of exact duplicates among the stamps, without an id column
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
MANY_FILES = 10  # from so many usable files on, --split_by auto holds out whole files
JUDGED_WINDOWS = 64  # training windows per sampling frequency that choose the teacher's patch size

# What is told, and what is kept.
MOST_PANELS = 4  # series that --plot draws
MOST_NOTES = 20  # notes that are shown, or listed under an error
ONNX_TOLERANCE = 1e-4  # deviations of a context by which an ONNX file may differ from PyTorch

# -- What you must not touch -----------------------------------------------------------------------

OLDEST_PYTHON = (3, 11)
COMMANDS = ("train", "evaluate", "predict", "export", "label")
TEXTS_NEEDED = ("data_dir", "teacher_model", "label_cache", "device", "save_dir")
PARTS = ("train", "validation", "test")  # in the order of --split_ratio; named in checkpoints
FEWEST_FILES = len(PARTS)  # a file for each part
METRICS = ("mse", "mae", "mase")  # named in evaluations and checkpoints

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
    "point",
    "samples",
    "weights",  # sha256 of the teacher's two files
    "format",
)

# Flags that may differ on --resume. (Another number of devices changes dropout and rounding, which
# is accepted.) A run that went on with another value of any other flag would not be the run that it
# says it is.
MAY_CHANGE = {"resume", "num_epochs", "device", "devices", "num_nodes", "label_cache", "lang"}

# Values and tensors in a checkpoint, beyond which it is refused: a real one has some hundreds, and
# a few for each epoch.
MOST_PARTS = 1_000_000

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
    "Validation loss of seasonal-naive: {:.4f}": "季节性朴素预测的验证损失: {:.4f}",
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
    "Exported: {}": "已导出: {}",
    # notes, warnings and errors
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
    "{} usable files, it takes {}; or use --split_by time{}": (
        "可用文件 {} 个，需要 {} 个；或使用 --split_by time{}"
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
    "note: {}": "注意: {}",
    "WARNING: {}": "警告: {}",
    "error: {}": "错误: {}",
    "stopped by {}": "因 {} 而停止",
    "{} is not installed: pip install -r requirements.txt, or pip install {}": (
        "未安装 {}: pip install -r requirements.txt，或 pip install {}"
    ),
    "out of GPU memory ({}); lower --batch_size or --teacher_batch_size": (
        "显存不足 ({})；请调小 --batch_size 或 --teacher_batch_size"
    ),
}


def in_language(message, language):
    """Text of a Message (or Told, or anything else that has one) in a language, "en" or "zh"."""
    if isinstance(message, Told):
        message = message.message
    if not isinstance(message, Message):
        return message
    template = message.sentence
    if language == "zh":
        template = CHINESE.get(template, template)
    values = [in_language(value, language) for value in message.values]
    return str(Message(template, tuple(values)))


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
        told = sentence if isinstance(sentence, Message | Told) else Message(sentence, values)
        if self.is_on:
            line = in_language(Message(heading, (told,)), self.language)
            print(line, file=sys.stderr, flush=True)

    def bar(self, description, **settings):
        """A progress bar (tqdm) that vanishes at its end."""
        return tqdm(desc=description, leave=False, disable=not self.is_on, **settings)


# == Files and signals =============================================================================

HUB_REMEDIES = (  # the first that fits an error of hf_hub_download
    (
        errors.HFValidationError,
        "no such folder, and not a hub id such as Salesforce/moirai-1.1-R-base",
    ),
    (
        errors.GatedRepoError,
        "access is not granted: ask for it on its hub page, then run `hf auth login`",
    ),
    (
        errors.RepositoryNotFoundError,
        "no such model, or a private one: check the id, or run `hf auth login`",
    ),
    (
        errors.RevisionNotFoundError,
        "no such revision: check --teacher_revision",
    ),
    (
        errors.LocalEntryNotFoundError,
        "not in the local cache, and the hub is out of reach or switched off",
    ),
    (
        errors.EntryNotFoundError,
        "the model has no such file: is it a MOIRAI?",
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
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
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
            f"{path}: cannot be written ({reason}); what was there before is as it was"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # most often it has its name already
            temporary.unlink()


def keep_mode(old, new):
    """Give a file the mode and owner of the one that it will replace, as far as that is allowed."""
    if not old.is_file():
        return
    with contextlib.suppress(OSError):
        shutil.copymode(old, new)
    with contextlib.suppress(OSError, AttributeError):  # Windows has no owners
        os.chown(new, old.stat().st_uid, old.stat().st_gid)


@contextlib.contextmanager
def output_file(path):
    """As `atomic`, for a path that the user typed: its links are followed.

    What is no regular file, such as /dev/stdout or a pipe, is written to as it is.
    """
    if is_special(path):
        with open(path, "ab") as file:
            yield file
    else:
        with atomic(os.path.realpath(path)) as file:
            yield file


def is_special(path):
    """Whether a path is that of a device, a pipe or the like, and no name for a file."""
    is_device = str(path).startswith(("/dev/", "/proc/"))  # these may lead to a file, by > or >>
    path = Path(path)
    return is_device or (path.exists() and not path.is_file() and not path.is_dir())


def unwritable(folder):
    """Why a folder cannot be written to or made; empty if it can."""
    wanted = Path(folder).expanduser().absolute()
    there = next((path for path in (wanted, *wanted.parents) if path.exists()), wanted)
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return ""
    return f"{there} is not a folder to write to"


def file_sha256(path):
    """sha256 of a file in hexadecimal digits, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_text(value, **settings):
    """JSON of a nest of plain values, null where a number is not finite (JSON has no nan)."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _name: None)
    return json.dumps(finite, **settings)


# -- Checkpoints -----------------------------------------------------------------------------------


def read_checkpoint(path):
    """Dict of a checkpoint of this program, on the CPU. Nothing in the file is executed.

    Raises UserError where the file is not there, damaged, foreign or of a newer format.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        check_archive(path)
        content = torch.load(path, "cpu", weights_only=True)
        check_tensors(content)
    except Exception as error:  # torch.load raises a dozen types for a damaged or foreign file
        raise UserError(
            f"{path}: refused: damaged, or not plain data ({repr(error)[:99]})"
        ) from error

    needed = {"format", "model_state_dict", "student_config"}
    is_ours = isinstance(content, dict) and needed <= content.keys()
    if not is_ours or not isinstance(content["format"], int):
        raise UserError(f"{path}: not a checkpoint of this program")
    if content["format"] > FORMAT:
        raise UserError(
            f"{path}: of a newer format ({content['format']}); update moirai_distill.py"
        )
    return content


def check_archive(path):
    """Raise ValueError where a file of torch.save is damaged, or would unpack to more than it is.

    torch.save packs nothing, so the parts together are no larger than the file.
    """
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("it is packed, which torch.save does not do")
        if sum(part.file_size for part in parts) > Path(path).stat().st_size:
            raise ValueError("it would unpack to more than it is")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} does not fit")


def check_tensors(content):
    """Raise ValueError where a tensor is larger than the memory that it is a view of.

    Lists that hold one list again and again are not followed for ever.
    """
    waiting = [content]
    for _ in range(MOST_PARTS):
        if not waiting:
            return
        part = waiting.pop()
        if isinstance(part, dict):
            waiting.extend(part.values())
        elif isinstance(part, list | tuple):
            waiting.extend(part)
        elif isinstance(part, torch.Tensor):
            held = part.untyped_storage().nbytes()
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
        named = Path(folder, read_checkpoint(last).get("loop", {}).get("best_file", ""))
        if named in found:
            return named
    return found[0] if len(found) == 1 else None


def read_student(source, revision=None):
    """(content, path or None) of the checkpoint that a user calls `source`. Raises UserError.

    A `.pt`, a run's folder (its best), an exported folder or a hub id; the path is that of a `.pt`.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = best_in(path) or path
    if path.is_file() or path.suffix == ".pt":
        return read_checkpoint(path), path

    from safetensors.torch import load_file  # not at the top: a .pt does not need it

    config_file = model_file(source, revision, "config.json")
    weights_file = model_file(source, revision, "model.safetensors")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    content = config.pop("info", None) or {}
    content["student_config"] = config
    content["model_state_dict"] = load_file(weights_file)
    return content, None


def shareable(content):
    """The facts of a checkpoint that go wherever its student goes, as plain JSON values.

    No path of the machine that trained it is among them: of a local teacher the name stays.
    """
    kept = ("epoch", "validation_metrics", "freqs", "counts", "versions", "data", "evaluation")
    facts = {name: content[name] for name in kept if name in content}

    run = {}
    for name, value in content.get("run_config", {}).items():
        if not name.endswith(("_dir", "_cache")):
            run[name] = value
    if not is_hub_id(run.get("teacher_model", "")):
        run["teacher_model"] = last_part(run.get("teacher_model", ""))
    facts["run_config"] = run

    facts["teacher"] = None
    if content.get("teacher"):
        teacher = dict(content["teacher"])
        path = teacher.get("teacher", "")
        if not is_hub_id(path):
            teacher["teacher"] = last_part(path)
            if "licence" in teacher:
                teacher["licence"] = teacher["licence"].replace(path, teacher["teacher"])
        facts["teacher"] = teacher
    return json.loads(json_text(facts))


def is_hub_id(name):
    """Whether a name has the form OWNER/MODEL."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def last_part(path):
    """Name of the folder or file that a path of any system ends with."""
    return PureWindowsPath(path).name


# -- The hub ---------------------------------------------------------------------------------------


def model_file(name, revision, filename):
    """Local path of one file of a model; `name` is a folder or a hub id.

    Raises UserError with the remedy where the file cannot be had, or is not what the hub has.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / filename).is_file():
        raise UserError(
            f"{name}: no {filename} in this folder: neither a model's nor a run's with a best epoch"
        )
    try:
        if folder.is_dir():
            path = folder / filename
        else:
            path = Path(hf_hub_download(name, filename, revision=revision))
        # Where the hub knows the sha256 of a file, its copy here has that name.
        blob = path.resolve().name
        if re.fullmatch("[0-9a-f]{64}", blob) and file_sha256(path) != blob:
            raise ValueError(f"the file does not fit its checksum: delete {path}")
        return path
    except Exception as error:
        # Of the hub, of HTTP, of the disk: all of them end here, with the remedy that fits.
        fitting = (text for kind, text in HUB_REMEDIES if isinstance(error, kind))
        remedy = next(fitting, "the download failed")
        advice = (
            "or check the network and HF_HUB_OFFLINE, set HF_ENDPOINT to a mirror,"
            " or give a local folder"
        )
        reason = " ".join(str(error).split())[:250]
        raise UserError(f"{name} ({filename}): {remedy}; {advice} [{reason}]") from error


# -- Signals and processes -------------------------------------------------------------------------


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived; its number is the argument."""


class Stop:
    """Handler that turns a signal into Interrupted.

    While it is held, a signal is only kept in `signum`: the work in hand goes on, and looks at it
    (for all processes, by `Job.signal`) where it can be stopped. A second signal is not held.
    """

    def __init__(self):
        self.signum = 0  # of the signal that came
        self.is_held = False

    def __call__(self, signum, _frame):
        came_again = self.signum != 0
        self.signum = signum
        if came_again or not self.is_held:
            raise Interrupted(signum)
        message = "\nstopping as soon as the work in hand is saved; once more stops at once"
        print(message, file=sys.stderr)

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
class Job:
    """What a command works with: its processes and device, its voice, and the wish to stop."""

    fabric: object  # a launched lightning.fabric.Fabric
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
        return float(self._reduce(torch.tensor(float(value)), "max"))

    def signal(self):
        """Number of the signal that came, on whichever process; 0 without one."""
        return int(self.largest(self.stop.signum))

    def _reduce(self, values, operation):
        if self.world_size == 1:
            return values
        return self.fabric.all_reduce(values, reduce_op=operation).cpu()


# == Reading =======================================================================================

DATE_FORMATS = ("ISO8601", *(date + clock for date in DATES for clock in CLOCKS))
MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")


class Unusable(Told):
    """Why a file or a series is skipped."""


@dataclasses.dataclass
class RawSeries:
    """One univariate series of a file, on a regular grid."""

    name: str  # file, and id or column where the file holds several
    values: np.ndarray  # (T,) float64 in the file's units, NaN where missing
    freq: str  # pandas frequency of the grid, "" without timestamps
    stamps: pd.DatetimeIndex | None  # the last 12 at most (`months_after` takes the day of the
    # month from them), named as their column; None without timestamps
    column: str  # its heading in a table of all series of the file


# -- A file as a table -----------------------------------------------------------------------------


def read_csv(path):
    """DataFrame of a CSV: UTF-8, UTF-16 with a mark, GB18030 or Latin-1; by comma, ; or tab.

    Its attrs hold the `decimal` sign. Raises Unusable.
    """
    try:
        raw = read_bytes(path)
        encoding, text = decode(raw)
        if encoding != "utf-16" and b"\0" in raw:  # pandas would cut a number there
            raise ValueError("it holds NUL bytes: damaged, or UTF-16 without its mark")
        separator = find_separator(text)
        decimal = "," if separator == ";" else "."
        frame = pd.read_csv(
            io.BytesIO(raw), encoding=encoding, sep=separator, decimal=decimal, low_memory=False
        )
    except (OSError, EOFError, ValueError, zlib.error) as error:  # pandas' errors are ValueErrors
        raise Unusable(f"unreadable: {' '.join(str(error).split())}") from error
    if frame.empty:
        raise Unusable("no rows")
    if not isinstance(frame.index, pd.RangeIndex):
        raise Unusable("its rows hold more fields than its header")

    frame.attrs["decimal"] = decimal
    names = [str(name).strip() for name in frame.columns]
    if len(set(names)) == len(names):
        frame.columns = names
    return frame


def read_bytes(path):
    """What a file holds, unpacked where its name ends with .gz. Raises Unusable."""
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device never ends
        raise Unusable("is no regular file")
    is_packed = path.name.lower().endswith(".gz")
    with (gzip.open if is_packed else open)(path, "rb") as file:
        return file.read()


def decode(raw):
    """(encoding, text) of the bytes of a text file."""
    has_mark = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
    for encoding in ("utf-16" if has_mark else "utf-8-sig", "gb18030"):
        with contextlib.suppress(UnicodeDecodeError):
            return encoding, raw.decode(encoding)
    return "latin-1", raw.decode("latin-1")  # which knows every byte


def find_separator(text):
    """Comma, semicolon or tab: as often in the header as in the first row, or most often there."""
    header, first_row = [*text.lstrip().split("\n", 2), "", ""][:2]

    def fits(mark):
        count = header.count(mark)
        return count > 0 and count == first_row.count(mark), count

    return max(",;\t", key=fits)


# -- Timestamps ------------------------------------------------------------------------------------


def parse_times(column, most_unread):
    """Timestamps (T,) of a column, NaT where unread; None where more than `most_unread` are.

    They keep the offset from UTC that all of them have; with several offsets they are in UTC.
    """
    if pd.api.types.is_numeric_dtype(column):
        epochs = parse_epochs(column)
        if epochs is not None:
            return epochs
        if not looks_like_dates(column):
            return None
        column = column.astype("Int64")  # 20240131.0, beside missing ones, is 20240131

    text = column
    if pd.api.types.infer_dtype(column) != "string":
        text = column.astype(str)
    every = max(1, len(column) // 100)
    sample = text[column.iloc[::every].dropna().index]
    if any(stamp != stamp.strip() for stamp in sample):
        text = text.str.strip()
        sample = sample.str.strip()
    with_digits = sum(re.search(r"\d\d", stamp) is not None for stamp in sample)
    if with_digits <= (1 - most_unread) * len(sample):
        return None

    readings = [read_as(text, form) for form in best_formats(sample)]
    times = min(readings, key=unevenness) if len(readings) > 1 else readings[0]
    if times.isna().mean() > most_unread:
        return None
    return pd.DatetimeIndex(times).tz_convert(zone_of(sample)).as_unit("ns")


def parse_epochs(column):
    """Timestamps of numbers that are seconds to nanoseconds since 1970, or None."""
    smallest = column.min()
    largest = column.max()
    for unit, size in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
        if 3e8 * size <= smallest and largest < 4.2e9 * size:  # from 1979 to 2103
            return pd.DatetimeIndex(pd.to_datetime(column, unit=unit)).as_unit("ns")
    return None


def looks_like_dates(column):
    """Whether numbers can be dates such as 20240131."""
    is_whole = (column.dropna() % 1 == 0).all()
    return is_whole and column.min() >= 19000101 and column.max() <= 21001231


def read_as(text, form):
    """Timestamps (T,) in UTC of strings in a format, NaT where they do not have it."""
    return pd.to_datetime(text, format=form, errors="coerce", utc=True)


def best_formats(sample):
    """The formats that read most of a sample of stamps; several where these do not tell."""
    unread = {}
    for form in DATE_FORMATS:
        unread[form] = read_as(sample, form).isna().mean()
        if form == "ISO8601" and unread[form] == 0:
            return [form]
    return [form for form in unread if unread[form] == min(unread.values())]


def unevenness(times):
    """The longest distance of neighbouring stamps over the typical one.

    It tells whether 1/2/2024 is in January or in February: the right reading is the even one.
    """
    gaps = np.diff(np.unique(times.dropna().astype("int64")))
    if not len(gaps):
        return math.inf
    return gaps.max() / np.median(gaps)


def zone_of(sample):
    """Zone of stamps as pandas wants it: None, "UTC", or their one offset such as "+08:00"."""
    offsets = sample.str.extract(r":\d\d(?:\.\d+)? ?(Z|[+-]\d\d(?::?\d\d)?)$")[0]
    found = set(offsets.fillna("").str.replace(":", ""))
    if found <= {""}:
        return None
    if len(found) > 1 or found == {"Z"}:
        return "UTC"
    (offset,) = found
    hours = offset[:3]
    minutes = offset[3:] or "00"
    return f"{hours}:{minutes}"


# -- The regular grid ------------------------------------------------------------------------------


@dataclasses.dataclass
class Grid:
    """Where each timestamp lies on a regular grid."""

    positions: np.ndarray  # (T,) int64, -1 for a timestamp off the grid
    freq: str  # pandas frequency


def regular_grid(times):
    """Grid of sorted timestamps: by the calendar where that fits, else the most common step."""
    step = common_step(times)
    return month_grid(times, step) or business_grid(times, step) or fixed_step_grid(times, step)


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


def month_grid(times, step):
    """Grid of every n months on one day of the month, or None.

    The day may vary by some days, as that of the last business day does.
    """
    months = round(step / DAY / 30.4375)
    if months < 1 or abs(step / DAY - 30.4375 * months) > 3:
        return None
    gaps = np.diff(times.asi8)
    if len(gaps) > 3 and (gaps % gaps.min() == 0).all():  # months are not equally long
        return None

    # Without the frequency that pandas may see in it: a month's end would be that of business days.
    dates = pd.DatetimeIndex(times.normalize(), freq=None)
    is_at_end = dates.is_month_end.mean() >= MOST_ON_RULE
    usual_day = 31 if is_at_end else int(np.median(dates.day))
    numbers = month_numbers(dates, usual_day)
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


def months_of(freq):
    """How many months a pandas frequency steps by; 0 where it steps by something else."""
    found = re.fullmatch(r"(\d*)B?([MQY])[SE](-\w+)?", freq)
    if not found:
        return 0
    count = int(found[1] or 1)
    return count * {"M": 1, "Q": 3, "Y": 12}[found[2]]


def business_grid(times, step):
    """Grid of business days, or None."""
    if step != DAY:
        return None
    days = times.normalize()
    on_rule = days + 0 * to_offset("B") == days  # to add 0 business days moves a weekend to Monday
    if on_rule.mean() < MOST_ON_RULE or len(days.unique()) < MOST_ON_RULE * len(days):
        return None
    margin = 2 * to_offset("B")
    all_days = pd.date_range(days[0] - margin, days[-1] + margin, freq="B")
    half_a_day = pd.Timedelta(step // 2, "ns")
    positions = all_days.get_indexer(days, method="nearest", tolerance=half_a_day)
    return Grid(positions, "B")


def fixed_step_grid(times, step):
    """Grid of equal steps, laid so that the timestamps lie around it evenly."""
    stamps = times.asi8
    # As angles of a circle of one step, so that 59 and 1 of 60 average to 0 and not to 30.
    angles = np.exp(2j * np.pi * (stamps % step) / step)
    first_is_late_by = np.angle(angles[0] / angles.mean()) / (2 * np.pi)
    steps_after_first = (stamps - stamps[0]) / step + first_is_late_by
    positions = np.rint(steps_after_first).astype(np.int64) + 1  # never the -1 of "off the grid"
    return Grid(positions, to_offset(pd.Timedelta(step)).freqstr)


def season_of(freq):
    """Seasonal period in steps of a pandas frequency; 24 without one, 1 where no cycle is usual."""
    if freq == "B":
        return 5
    if months := months_of(freq):
        return max(1, 12 // months)
    step = pd.Timedelta(to_offset(freq or "h")).value
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


def on_grid(times, values, has_ids):
    """(values (T,) on the regular grid of their timestamps, frequency, the last stamps).

    Raises Unusable where there is no such grid.
    """
    rows = len(times)
    clock = times.tz_localize(None)  # the grid is that of the clock they show
    table = pd.Series(values, clock)[clock.notna()].sort_index(kind="stable")
    is_repeated = table.index.duplicated(keep="last")  # of exact duplicates the last one stays
    duplicates = int(is_repeated.sum())
    if duplicates > FEW_DUPLICATES * rows and not has_ids:
        raise Unusable(
            f"{duplicates} of {rows} timestamps are duplicates; is an id column missing?"
        )
    table = table[~is_repeated]
    if len(table) < 3:
        raise Unusable(f"too short: {len(table)} timestamps")

    grid = regular_grid(table.index)
    is_on = grid.positions >= 0
    table = table[is_on]
    positions = grid.positions[is_on]
    placed = 0
    if len(positions):
        placed = 1 + int((np.diff(positions) > 0).sum())  # they are sorted
    if placed < MOST_PLACED * (rows - duplicates):
        raise Unusable(
            f"irregular timestamps: only {placed} of {rows - duplicates} fit one step ({grid.freq})"
        )
    length = int(positions.max() - positions.min()) + 1
    if length > 10 * placed + 1000:
        raise Unusable(f"sparse timestamps: {placed} rows over {length} steps of {grid.freq}")

    regular = np.full(length, np.nan)
    regular[positions - positions.min()] = table.to_numpy()  # of two in one place the later stays
    return regular, grid.freq, table.index[-12:].tz_localize(times.tz)


# -- Columns ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Columns:
    """What the columns of a file are taken for."""

    times: pd.DatetimeIndex | None  # (rows,), named as their column
    id_name: str | None  # of the column that tells the series of a long format apart
    values: dict  # column -> (rows,) float64, NaN where missing
    passed_over: list  # names of those that are no numbers, or that number the rows


def pick_columns(frame, wanted):
    """Columns of a table; `wanted` is ["first"], ["all"], or names. Raises Unusable."""
    id_name = find_id(frame)
    steps = steps_of_integers(frame, id_name)
    times = find_times(frame, steps)
    time_name = None if times is None else times.name

    named = [] if wanted in (["first"], ["all"]) else wanted
    missing = [name for name in named if name not in frame.columns]
    if missing:
        has = ", ".join(frame.columns[:20])
        raise Unusable(f"no column {', '.join(missing)}; it has {has}")

    columns = Columns(times, id_name, values={}, passed_over=[])
    for name in named or frame.columns:
        if name in (time_name, id_name):
            continue
        numbers = as_numbers(frame[name], frame.attrs["decimal"])
        if numbers is None or (not named and is_index(name, steps.get(name))):
            columns.passed_over.append(name)
        elif not columns.values or wanted != ["first"]:
            columns.values[name] = numbers
    if not columns.values:
        raise Unusable(f"no numeric column among {', '.join(frame.columns[:20])}")
    return columns


def find_id(frame):
    """Name of the column that makes a table the long format of several series, or None."""
    for name in frame.columns:
        if name.lower() not in ID_NAMES or pd.api.types.is_float_dtype(frame[name]):
            continue
        if frame[name].duplicated().any():
            return name
    return None


def steps_of_integers(frame, id_name):
    """Column -> its differences from row to row (within each id), of all integer columns."""
    groups = frame if id_name is None else frame.groupby(id_name)
    steps = {}
    for name in frame.columns:
        if pd.api.types.is_integer_dtype(frame[name]) and name != id_name:
            steps[name] = groups[name].diff().dropna()
    return steps


def find_times(frame, steps):
    """Timestamps (rows,) of the first column that has them, by name or by content; or None.

    Columns that are named in TIME_NAMES come first, integers last. An integer column counts only
    if it rises evenly, or by its name; a float one by its name alone.
    """

    def sort_key(name):
        return name.lower() not in TIME_NAMES, name in steps

    for name in sorted(frame.columns, key=sort_key):
        is_called_so = name.lower() in TIME_NAMES
        is_number = pd.api.types.is_numeric_dtype(frame[name])
        if is_called_so or not is_number or (name in steps and rises_evenly(steps[name])):
            times = parse_times(frame[name], MANY_UNREAD if is_called_so else FEW_UNREAD)
            if times is not None:
                return times
    return None


def rises_evenly(steps):
    """Whether a column always rises, and mostly by the same."""
    return (steps > 0).all() and (steps == steps.median()).mean() > 0.5


def is_index(name, steps):
    """Whether a column numbers the rows instead of measuring something."""
    is_called_so = name.lower() in TIME_NAMES + INDEX_NAMES or name.lower().startswith("unnamed:")
    return is_called_so or (steps is not None and (steps == 1).all())


def as_numbers(column, decimal):
    """Values (T,) float64 of a column, NaN where not finite; None where most are no numbers."""
    if column.dtype == object and decimal == ",":
        column = column.str.replace(",", ".")
    values = pd.to_numeric(column, errors="coerce")
    values = values.to_numpy(dtype=np.float64, na_value=np.nan)
    read = (~np.isnan(values)).sum()
    is_finite = np.isfinite(values)
    if read < MOST_NUMBERS * column.notna().sum() or not is_finite.any():
        return None
    if pd.api.types.is_bool_dtype(column):
        return None
    return np.where(is_finite, values, np.nan)


# -- Files -----------------------------------------------------------------------------------------


def read_series(path, name, wanted):
    """(list of RawSeries, notes) of one CSV; `wanted` as for `pick_columns`.

    Raises Unusable with the reason where there is no series.
    """
    frame = read_csv(path)
    columns = pick_columns(frame, wanted)
    notes = []
    if columns.passed_over:
        notes.append(f"passed over: {', '.join(columns.passed_over[:20])}")

    rows_of = {"": np.arange(len(frame))}
    if columns.id_name is not None:
        rows_of = frame.groupby(columns.id_name).indices
    is_single = len(rows_of) * len(columns.values) == 1

    series = []
    for key, rows in rows_of.items():
        for column, values in columns.values.items():
            within = []  # what tells the series apart within the file
            if columns.id_name is not None:
                within.append(str(key))
            if len(columns.values) > 1:
                within.append(column)
            full_name = " / ".join([name, *within])
            heading = " / ".join(within) or column
            try:
                regular = (values[rows], "", None)
                if columns.times is not None:
                    has_ids = columns.id_name is not None
                    regular = on_grid(columns.times[rows], values[rows], has_ids)
                series.append(RawSeries(full_name, *regular, heading))
            except Unusable as reason:
                if is_single:
                    raise
                notes.append(f"skipped: {full_name}: {reason}")
    return series, notes


def find_files(data_dir, max_files):
    """(number of CSVs found, name below `data_dir` -> Path of the first ones by name).

    Raises UserError where there is none.
    """
    root = Path(data_dir).expanduser()
    if root.is_dir():
        found = [
            path for path in root.rglob("*") if path.name.lower().endswith((".csv", ".csv.gz"))
        ]
        paths = {path.relative_to(root).as_posix(): path for path in found}
    else:
        paths = {root.name: root}
    if not paths:
        raise UserError(f"--data_dir {data_dir}: no .csv file in this folder or below")
    names = sorted(paths)
    if max_files:
        names = names[:max_files]
    return len(paths), {name: paths[name] for name in names}


def read_or_reason(wanted, item):
    """As `read_series` of one (name, path); (None, [the reason]) where it cannot be used."""
    name, path = item
    try:
        return read_series(path, name, wanted)
    except Unusable as reason:
        return None, [f"skipped: {reason}"]


@dataclasses.dataclass
class FilesRead:
    """The series of a folder."""

    found: int  # CSVs in the folder, whether read or not
    series: dict  # file -> list of RawSeries, of the files that can be used
    notes: dict  # file -> list of str: what was skipped or passed over, of all files that were read


def read_files(data_dir, max_files, wanted, voice):
    """FilesRead of a folder, read by one process per core where there are many files."""
    found, paths = find_files(data_dir, max_files)
    read = functools.partial(read_or_reason, wanted)
    files = FilesRead(found, series={}, notes={})
    with contextlib.ExitStack() as stack:
        results = map(read, paths.items())
        if len(paths) >= FILES_FOR_PROCESSES and cores() > 1:
            results = stack.enter_context(reading_processes()).map(read, paths.items(), chunksize=8)
        bar = stack.enter_context(voice.bar("reading", total=len(paths), unit="file"))
        for name, (series, notes) in zip(paths, results, strict=True):
            if series is not None:
                files.series[name] = series
            files.notes[name] = notes
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
    columns: list
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
    mean, deviation, scaler = fit_scaler(series.values[low:high])
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
    scaled = scaler.transform(filled[:, None])[:, 0].astype(np.float32)
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


def fit_scaler(rows):
    """(mean, deviation, StandardScaler) of the rows of a series. Raises Unusable."""
    from sklearn.preprocessing import StandardScaler  # not at the top: forecasting needs none of it

    # `not a < b` instead of `a >= b`, here and elsewhere, so that nan is among the bad ones.
    if not pd.Series(rows).min() < pd.Series(rows).max():
        raise Unusable("constant, or nothing but missing values")
    scaler = StandardScaler().fit(rows[:, None])
    mean = float(scaler.mean_[0])
    deviation = float(scaler.scale_[0])
    if not math.isfinite(deviation) or not scaler.var_[0] > 0:
        raise Unusable("values too large or too close for float64")
    own_deviation = math.sqrt(scaler.var_[0])
    if deviation != own_deviation:  # scikit-learn takes 1 where all of it may be rounding
        raise Unusable(f"nearly constant: its values differ from {mean:g} by rounding errors")
    return mean, deviation, scaler


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
    notes: dict  # file -> why all or some of it is not used, "" where all is


def split_data(files, config):
    """SplitData of FilesRead. Raises NoWindow where a part has no window."""
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
            *(" and no ".join(empty), listing(notes)),
        )
    windows = {part: make_windows(chosen[part], config) for part in PARTS}
    counts = {part: len(names[part]) for part in PARTS}
    return SplitData(windows, counts, split_by, notes)


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
    notes = {name: list(lines) for name, lines in files.notes.items()}
    for name, all_series in files.series.items():
        for series in all_series:
            bounds = part_bounds(len(series.values), shares)
            try:
                ready = prepare_series(series, bounds, config)
            except Unusable as reason:
                which = "" if series.name == name else f"{series.name}: "
                notes[name].append(f"skipped: {which}{reason}")
                continue
            prepared.setdefault(name, []).append(ready)
            for part, starts in ready.starts.items():
                if not len(starts):
                    which = "" if series.name == name else f"{series.name}: "
                    reason = why_no_window(len(series.values), bounds[part], config)
                    notes[name].append(f"{which}no {part} window: {reason}")
    return prepared, {name: shortened(lines) for name, lines in notes.items()}


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
            f"--split_ratio leaves none of {count} usable files for training; use --split_by time"
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


def shortened(notes, most=4):
    """The first notes about a file, in one line."""
    if len(notes) > most:
        notes = [*notes[:most], "…"]
    return "; ".join(notes)


def listing(notes):
    """The first notes about files, a line each, to stand under an error."""
    lines = [f"\n  {name}: {note}" for name, note in notes.items() if note]
    return "".join(lines[:MOST_NOTES])


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
        """Every token looks at every other one. With so few, this is faster than a fused kernel."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, D / heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).contiguous()  # (B, heads, N, D / heads) each
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


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
    from_median = (pd.Series(values) - pd.Series(values).median()).abs()
    usual = from_median.median()
    if usual > 0:
        values = np.where(from_median > ABSURD * usual, np.nan, values)  # a glitch is no value
    known = np.flatnonzero(~np.isnan(values))
    if not (known >= first).any():
        return None
    carried = len(values) - 1 - int(known[-1])
    filled = int(np.isnan(values[first:]).sum()) - carried
    context = np.interp(np.arange(first, len(values)), known, values[known])
    return LastContext(context, filled, carried)


class PatchStudent(nn.Module, PyTorchModelHubMixin):
    """Univariate patch Transformer: context (B, L) -> forecast (B, H), both in the series' units.

    A weighted sum of the context's earlier periods of `season` steps is added to what the
    Transformer says (0 = none; with 1 it is a linear map of the whole context). `info` are plain
    facts of its making; with the sizes they go into the config.json of a hub folder.
    """

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
    ):
        super().__init__()
        self.context_length = context_length
        self.prediction_length = prediction_length
        self.patch_size = patch_size
        self.info = info or {}
        self.season = season if 0 < season <= context_length else 0

        patches = math.ceil(context_length / patch_size)
        if self.season:
            ahead = math.ceil(prediction_length / season)
            earlier = math.ceil(context_length / season)
            self.periods = nn.Parameter(torch.zeros(ahead, earlier))
        self.embed = nn.Linear(patch_size, d_model)
        self.position = nn.Parameter(torch.randn(patches, d_model) * 0.02)
        self.blocks = nn.Sequential(
            *[Block(d_model, num_heads, dropout) for _ in range(num_layers)]
        )
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(patches * d_model, prediction_length)

    def forward(self, context):
        if context.ndim != 2 or context.shape[1] != self.context_length:
            raise ValueError(
                f"context has shape {tuple(context.shape)}, expected (B, {self.context_length})"
            )
        if not context.is_floating_point():  # small integers would overflow
            context = context.double()
        centre, deviation = instance_scale(context)
        scaled = ((context - centre) / deviation).float()

        tokens = self.embed(in_chunks(scaled, self.patch_size)) + self.position  # (B, N, D)
        tokens = self.norm(self.blocks(tokens))
        forecast = self.head(tokens.flatten(1)).float()  # (B, H)
        if self.season:
            forecast = forecast + self.seasonal_part(scaled)

        is_constant = (context == centre).all(1, keepdim=True)
        return torch.where(is_constant, centre, forecast * deviation + centre)

    def seasonal_part(self, scaled):
        """Weighted sums (B, H) of earlier periods; each of their steps has the same weights."""
        earlier = in_chunks(scaled, self.season)  # (B, periods in L, season)
        ahead = (self.periods @ earlier).float()  # (B, periods in H, season)
        return ahead.flatten(1)[:, : self.prediction_length]

    def forecast(self, context):
        """Forecasts (H,) or (B, H) of contexts (L,) or (B, L), an array for an array, no gradients.

        A tensor gives a tensor on its device. Contexts that are longer are cut to their last L
        points, and missing values (nan, inf) are filled as `predict` fills them. Raises ValueError
        for a shorter context, and for one that holds nothing but missing values.
        """
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

        forecasts = self.without_gradients(torch.from_numpy(completed))
        if values.ndim == 1:
            forecasts = forecasts[0]
        if is_tensor:
            kind = context.dtype if context.is_floating_point() else torch.float64
            return forecasts.to(context.device, kind)
        kind = getattr(context, "dtype", None)
        return forecasts.numpy().astype(kind if kind == np.float32 else np.float64)

    @torch.no_grad()
    def without_gradients(self, contexts):
        """Forecasts (B, H) on the CPU of contexts (B, L), in eval mode; the mode is put back."""
        if not len(contexts):
            return torch.empty(0, self.prediction_length, dtype=torch.float64)
        place = self.position.device
        kind = torch.float32 if place.type == "mps" else torch.float64  # which MPS has not
        was_training = self.training
        self.eval()
        try:
            parts = contexts.split(EVAL_BATCH)
            return torch.cat([self(part.to(place, kind)).cpu() for part in parts])
        finally:
            self.train(was_training)

    @classmethod
    def from_pretrained(cls, source, revision=None):
        """Student, in eval mode, of a `.pt`, a run's folder, an exported folder or a hub id.

        Raises UserError.
        """
        return open_student(source, revision).student

    def generate_model_card(self, *_args, **_kwargs):
        """The card that huggingface_hub's save_pretrained and push_to_hub write."""
        return ModelCard(model_card(self))


@dataclasses.dataclass
class OpenedStudent:
    """A student, and what its checkpoint says."""

    student: PatchStudent  # in eval mode, on the CPU
    content: dict  # of its checkpoint
    weights_id: str  # short sha256 of its weights
    path: Path | None  # of its `.pt`, None where it is no such file


def open_student(source, revision=None):
    """OpenedStudent of what a user calls a checkpoint. Raises UserError."""
    try:
        content, path = read_student(source, revision)
        config = content["student_config"]
        weights = content["model_state_dict"]
        check_facts(content)
        if config["d_model"] % config["num_heads"] or config["num_layers"] > len(weights):
            raise ValueError("its sizes do not fit each other")
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise ValueError("its weights are not finite")
        with torch.device("meta"):  # nothing is allocated before the shapes are known to fit
            student = PatchStudent(**config, info=shareable(content))
        student.load_state_dict(weights, assign=True)
        digest = hashlib.sha256()
        for weight in student.state_dict().values():
            digest.update(weight.numpy().tobytes())
        return OpenedStudent(student.float().eval(), content, digest.hexdigest()[:16], path)
    except (UserError, ModuleNotFoundError):
        raise
    except Exception as error:  # damaged files, or another model's
        raise UserError(
            f"{source}: not a student of this program, or damaged ({repr(error)[:199]})"
        ) from error


def check_facts(content):
    """Raise ValueError where what a checkpoint says of its student is of the wrong type."""
    for name, size in content["student_config"].items():
        if name != "dropout" and not is_size(size):
            raise ValueError(f"{name} is {str(size)[:60]!r}, which is no size")
    if content["student_config"]["num_heads"] < 1:
        raise ValueError("it has no attention heads")
    if not all(weight.is_floating_point() for weight in content["model_state_dict"].values()):
        raise ValueError("its weights are no real numbers")
    kinds = {"run_config": dict, "counts": dict, "data": dict, "freqs": list}
    for name, kind in kinds.items():
        if not isinstance(content.get(name, kind()), kind):
            raise ValueError(f"{name} is no {kind.__name__}")
    if not all(isinstance(freq, str) for freq in content.get("freqs", [])):
        raise ValueError("freqs are no names")
    if not isinstance(content.get("teacher") or {}, dict):
        raise ValueError("teacher is no dict")


def is_size(value):
    """Whether a value is a whole number that can be a size of a network."""
    return type(value) is int and 0 <= value < 2**31


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

{making}

{scores}

Data: {data}.
"""


def model_card(student):
    """The text of a student's model card, of its sizes and its `info`."""
    info = student.info
    licence = (info.get("teacher") or {}).get("licence", "")
    return MODEL_CARD.format(
        licence_id="cc-by-nc-4.0" if "CC-BY-NC-4.0" in licence else "other",
        parameters=sum(weight.numel() for weight in student.parameters()),
        length=student.context_length,
        horizon=student.prediction_length,
        making=card_making(info),
        scores=card_scores(info.get("evaluation")),
        data=card_data(info),
    )


def card_making(info):
    """How it was trained, by which teacher, under which licence."""
    teacher = info.get("teacher")
    if not teacher:
        return "Trained on truth alone, without a teacher."
    alpha = info["run_config"]["alpha"]
    return (
        f"Distilled from `{teacher['teacher']}` ({teacher['commit'] or 'local'}):"
        f" {alpha} * MSE to its forecasts + the rest * MSE to truth."
        f" The teacher's licence binds its student: {teacher['licence']}."
    )


def card_scores(evaluation):
    """The table of test errors, the best first."""
    if not evaluation:
        return "Not evaluated yet: `python moirai_distill.py evaluate` does it."

    def error(item):
        return item[1]["mse"] or math.inf

    lines = [f"| {evaluation['windows']:,} test windows | MSE | MAE | MASE |", "|---|---|---|---|"]
    for name, row in sorted(evaluation["rows"].items(), key=error):
        cells = [name]
        for metric in METRICS:
            cells.append("-" if row[metric] is None else f"{row[metric]:.4f}")
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
    facts.append(f"sampling frequency {', '.join(freqs)}")
    return ", ".join(facts)


# == Loss and metrics ==============================================================================


def distillation_loss(forecast, truth, observed, label, weight):
    """Sums (4,) over the observed points of a batch; all are (B, H), but weight is (B, 1).

    weight * squared error to the label + (1 - weight) * squared error to the truth; squared error
    to the truth; squared error to the label, where there is one; how many points have a label.
    `weight` is alpha, or 0 for a window that has no label.
    """
    to_truth = (forecast - truth) ** 2
    to_label = (forecast - label) ** 2
    blended = weight * to_label + (1 - weight) * to_truth
    labelled = observed * (weight > 0)
    return torch.stack(
        [
            (blended * observed).sum(),
            (to_truth * observed).sum(),
            (to_label * labelled).sum(),
            labelled.sum(),
        ]
    )


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


def score(forecast, windows, batch_size, job):
    """Scores of `forecast(index, context (B, L)) -> (B, H)` over all windows.

    Sums are float64, so that the result does not depend on batch size or number of processes.
    """
    by_step = torch.zeros(5, windows.horizon).double()
    by_series = torch.zeros(2, len(windows.seasons)).double()
    left_out = torch.zeros(1).double()
    own = np.arange(job.rank, len(windows), job.world_size)
    bar = job.voice.bar("scoring", total=len(own), unit="window")
    for first in range(0, len(own), batch_size):
        index = own[first : first + batch_size]
        context, truth, observed = windows.batch(index)
        error = (forecast(index, context) - truth).double().abs() * observed
        unit = seasonal_scale(context, windows.season(index))
        has_unit = unit > 0
        scaled = torch.where(has_unit, error / unit, 0.0)
        counted = (error**2, error, scaled, observed, observed * has_unit)
        by_step += torch.stack([values.sum(0) for values in counted])
        sums = torch.stack([(error**2).sum(1), observed.double().sum(1)])
        by_series.index_add_(1, torch.from_numpy(windows.series[index]), sums)
        left_out += (~has_unit).sum()
        bar.update(len(index))
    bar.close()

    by_step = job.sum(by_step)
    by_series = job.sum(by_series)
    squared, absolute, scaled, points, points_with_unit = by_step.sum(1).tolist()
    return Scores(
        mse=squared / points,
        mae=absolute / points,
        mase=scaled / points_with_unit if points_with_unit else math.nan,
        mase_left_out=int(job.sum(left_out)),
        mse_by_step=(by_step[0] / by_step[3]).tolist(),
        mae_by_step=(by_step[1] / by_step[3]).tolist(),
        mse_by_series=(by_series[0] / by_series[1]).tolist(),
    )


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
    label_cache: str


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

    @torch.inference_mode()
    def forecast(self, context, horizon, patch_size, point, samples):
        """Point forecast (B, H) float32, on the CPU, in the units of the contexts (B, L).

        Contexts reach MOIRAI in their own deviations, as its scaler adds 1e-5 to the variance,
        which changes small values. The forecast of a constant is that constant.
        """
        if point == "mean" and self.forecast_class:
            raise UserError("--teacher_point mean: only for a MOIRAI 1.0 or 1.1; use median")
        context = context.double()
        is_constant = context.amin(1, keepdim=True) == context.amax(1, keepdim=True)
        mean = context.mean(1, keepdim=True)
        mean = torch.where(is_constant, context[:, -1:], mean)
        deviation = context.std(1, keepdim=True, unbiased=False)
        deviation = torch.where(is_constant, 1.0, deviation)
        scaled = ((context - mean) / deviation).float()

        if self.forecast_class:
            if self.is_moe:  # each window is `samples` sequences
                self.most_windows = min(self.most_windows, max(1, MOE_SEQUENCES // samples))
            values = self.in_calls(self.forecast_whole, scaled, horizon, samples)
        else:
            distribution = self.in_calls(self.predict_distribution, scaled, horizon, patch_size)
            points = self.points_of(*distribution, point, samples)  # (B, patches of horizon, P)
            values = points.flatten(1)[:, :horizon]
        assert values.shape == (len(context), horizon), values.shape
        return torch.where(is_constant, mean, values.cpu() * deviation + mean).float()

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
                f"out of GPU memory: the teacher goes on with {self.most_windows} windows a call"
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

    def points_of(self, parameters, loc, scale, point, samples):
        """Mean, or median of samples, (B, patches of the horizon, P) of distributions.

        nan where a parameter is not finite.
        """
        leaves = tree_leaves(parameters)
        shape = (len(loc), *leaves[0].shape[1:3])
        finite = [leaf.isfinite().reshape(*shape, -1).all(-1) for leaf in leaves]
        is_finite = torch.stack(finite).all(0)

        def harmless(leaf):
            mask = is_finite[..., None] if leaf.ndim > 3 else is_finite
            return torch.where(mask, leaf, 1.0)

        parameters = tree_map(harmless, parameters)
        if point == "mean":
            output = self.module.distr_output
            points = output.distribution(parameters, loc, scale).mean
        else:
            values = self.draw(parameters, loc, scale, shape, samples)
            points = values.median(1).values.view(shape)
        return points.masked_fill(~is_finite, math.nan)

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
        """Median of samples (MoE), or the 0.5 quantile (2.0), (B, H), by uni2ts's own forecast."""
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
        values = self.forecast_class(**settings)(
            past_target=past, past_observed_target=is_seen, past_is_pad=~is_seen[..., 0]
        )
        if self.is_moe:
            return values.float().median(1).values
        middle = list(self.module.quantile_levels).index(0.5)
        return values[:, middle].float()


def fingerprint(name, revision):
    """sha256 of a teacher's two files where they are at hand without the network, else None."""
    folder = Path(name).expanduser()
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
        digest.update(bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()


def load_teacher(request, device, note):
    """Teacher of a hub id or a local folder, its weights loaded strictly. Raises UserError."""
    name = request.teacher_model
    config_file = model_file(name, request.teacher_revision, "config.json")
    weights_file = model_file(name, request.teacher_revision, "model.safetensors")
    try:
        settings = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: config.json is not JSON ({error}); download it again") from error
    generation = find_generation(name, settings)
    check_settings(name, settings)
    precision = request.teacher_precision if device.type == "cuda" else "32"
    if generation.package == "moirai_moe" and precision != "32":
        raise UserError("--teacher_precision bf16: not for a MOIRAI-MoE; use 32")

    try:
        from safetensors.torch import load_file

        package = importlib.import_module(f"uni2ts.model.{generation.package}")
    except ImportError as error:
        raise UserError(
            f"uni2ts cannot be imported ({error}); pip install -r requirements.txt"
        ) from error
    if "distr_output" in settings:
        settings["distr_output"] = build_distribution(name, settings["distr_output"])
    try:
        if 0.5 not in settings.get("quantile_levels", [0.5]):
            raise ValueError("quantile_levels without 0.5")
        if generation.package == "moirai_moe" and 16 not in settings["patch_sizes"]:
            raise ValueError("patch_sizes without 16")
        if generation.package == "moirai2" and not settings.get("scaling", True):
            raise ValueError("scaling is off")
        kind = getattr(package, f"{generation.prefix}Module")
        check_shapes(kind, settings, weights_file)
        module = kind(**settings)
        module.load_state_dict(load_file(weights_file), strict=True)
    except Exception as error:  # damaged weights, or a config that uni2ts or torch refuses
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name}: config.json or model.safetensors is damaged or of another model"
            f" ({type(error).__name__}: {reason})"
        ) from error

    forecast_class = None
    if generation.package != "moirai":
        forecast_class = getattr(package, f"{generation.prefix}Forecast")
    return Teacher(module, device, precision, note, forecast_class)


def find_generation(name, settings):
    """Generation of a config.json. Raises UserError where it is another kind of model."""
    keys = set(settings) if isinstance(settings, dict) else set()
    fitting = [generation for generation in GENERATIONS if generation.config_keys <= keys]
    if not fitting:
        raise UserError(
            f"{name}: another kind of model, not a MOIRAI such as Salesforce/moirai-1.1-R-base"
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
            raise UserError(f"{name}: config.json has {key[:60]!r}, which no MOIRAI has")
        if not all(is_between(item, kind, low, high) for item in items):
            raise UserError(
                f"{name}: {key} in config.json is {str(value)[:60]!r};"
                f" it must be {kind.__name__} from {low} to {high}"
            )


def check_shapes(kind, settings, weights_file):
    """Raise ValueError unless a weights file holds the tensors of a module of these settings.

    On the "meta" device a module takes no memory, whatever its sizes are.
    """
    from safetensors import safe_open

    with torch.device("meta"):
        wanted = {key: list(part.shape) for key, part in kind(**settings).state_dict().items()}
    with safe_open(weights_file, "pt") as file:
        found = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    wrong = [key for key in sorted({*wanted, *found}) if wanted.get(key) != found.get(key)]
    if wrong:
        raise ValueError(f"other names or shapes of weights: {', '.join(wrong[:3])}")


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
        f"{name}: distr_output in config.json is no output distribution of uni2ts; refused"
        f" ({json.dumps(config)[:99]})"
    )


def is_class(target, kind):
    """Whether a name in a config.json is that of a class."""
    return target in (f"{kind.__module__}.{kind.__name__}", f"uni2ts.distribution.{kind.__name__}")


# == Labels ========================================================================================
#
# A label is the teacher's forecast of a window. A label file is a folder in the cache, named by a
# hash of all that its labels depend on; it holds manifest.json (what, by whom, how) and labels.bin.


@dataclasses.dataclass
class LabelTask:
    """Which labels are asked for, and what it takes to make them."""

    windows: Windows  # to be labelled
    judged_on: Windows  # training windows that choose the teacher's patch size
    request: TeacherRequest
    load: Callable[[], Teacher]  # called only where labels have to be made
    baselines: dict  # name -> naive forecast, which stand beside the teacher


class LabelFile:
    """Labels of W windows, (W, H) float32 in the windows' units.

    labels.bin holds all blocks of `block` windows, then a sha256 of each; until it is made, each
    block lies in a file blocks/NUMBER.bin, followed by its sha256. Two runs write the same bytes
    into a block, so no lock is needed.
    """

    def __init__(self, folder, manifest):
        self.folder = Path(folder)
        self.path = self.folder / "labels.bin"
        self.manifest = manifest
        self.windows = manifest["key"]["windows"]
        self.horizon = manifest["key"]["horizon"]
        self.block = manifest["block"]  # windows in a block
        self.count = math.ceil(self.windows / self.block)  # of blocks
        self.array = None  # (W, H), once the file is opened
        self.damaged = 0  # windows with a label that is not finite

    def index(self, number):
        """The windows of a block."""
        first = number * self.block
        return np.arange(first, min(self.windows, first + self.block))

    def block_path(self, number):
        """Where a block lies before labels.bin is made."""
        return self.folder / "blocks" / f"{number:08d}.bin"

    def read(self, number):
        """Bytes of a block, from its own file or from labels.bin, if they fit their sha256.

        None where there are none.
        """
        row = 4 * self.horizon  # bytes
        size = row * len(self.index(number))
        places = (  # (file, where the block is, where its sha256 is)
            (self.block_path(number), 0, size),
            (self.path, row * self.block * number, row * self.windows + 32 * number),
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

    def write(self, number, labels):
        """Keep the labels (b, H) of a block."""
        content = np.ascontiguousarray(labels, "<f4").tobytes()
        with atomic(self.block_path(number)) as file:
            file.write(content)
            file.write(hashlib.sha256(content).digest())

    def missing(self):
        """Numbers of the blocks that are yet to be made."""
        return [number for number in range(self.count) if self.read(number) is None]

    def join(self):
        """Make labels.bin of the blocks, where there are any."""
        blocks = self.folder / "blocks"
        if not blocks.is_dir():
            return
        checksums = []
        with atomic(self.path) as file:
            for number in range(self.count):
                content = self.read(number)
                file.write(content)
                checksums.append(hashlib.sha256(content).digest())
            file.write(b"".join(checksums))
        shutil.rmtree(blocks, ignore_errors=True)

    def open(self):
        """Map labels.bin into memory and count the damaged windows. Returns self."""
        self.array = np.memmap(self.path, "<f4", "r", shape=(self.windows, self.horizon))
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
        "point": request.teacher_point,
        "samples": request.num_samples if request.teacher_point == "median" else None,
        "weights": weights,
        "format": FORMAT,
    }
    return {name: facts[name] for name in LABEL_KEY}


def key_folder(cache, key):
    """Folder of the labels with this key."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return Path(cache, name)


def read_manifest(folder):
    """The manifest (dict) of a label folder, or None where there is none that can be used."""
    path = Path(folder, "manifest.json")
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        is_its_own = key_folder(folder.parent, manifest["key"]) == folder
        can_be_used = manifest["block"] > 0 and isinstance(manifest["patch_sizes"], dict)
        return manifest if is_its_own and can_be_used else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_labels(task):
    """A whole LabelFile of a task in the cache, or None.

    Where the teacher's weights are not at hand, its name decides: labels may be carried.
    """
    request = task.request
    cache = Path(request.label_cache).expanduser()
    weights = fingerprint(request.teacher_model, request.teacher_revision)
    key = label_key(task, weights)
    folders = [key_folder(cache, key)] if weights else sorted(cache.glob("*"))
    found = []
    for folder in folders:
        manifest = read_manifest(folder)
        if not manifest or manifest["key"] | {"weights": None} != key | {"weights": None}:
            continue
        if weights or is_of_teacher(manifest, request):
            file = LabelFile(folder, manifest)
            if not file.missing():
                found.append(file)
    if len({file.manifest["key"]["weights"] for file in found}) > 1:
        raise UserError(
            f"{cache} holds labels of several teachers named {request.teacher_model};"
            " put its weights at hand"
        )
    return found[0] if found else None


def is_of_teacher(manifest, request):
    """Whether labels were made by a teacher of the name that is asked for, in that revision."""
    is_named_so = last_part(manifest["teacher"]) == last_part(request.teacher_model)
    revisions = (None, manifest["revision"], manifest["commit"])
    return is_named_so and request.teacher_revision in revisions


# -- Making labels ---------------------------------------------------------------------------------


def label_windows(teacher, windows, index, request, seed):
    """Labels (b, H) float32 of windows, a function of the arguments alone.

    The random numbers are those of `seed`, whatever was drawn before, and others are not disturbed.
    """
    context, _, _ = windows.batch(index)
    freqs = windows.freq_of(index)
    sizes = torch.tensor([request.teacher_patch_size[freq] for freq in freqs])
    labels = torch.empty(len(index), windows.horizon)
    gpus = [teacher.device] if teacher.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        for size in sizes.unique().tolist():
            rows = sizes == size
            labels[rows] = teacher.forecast(
                context[rows], windows.horizon, size, request.teacher_point, request.num_samples
            )
    return labels.numpy()


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
            request = dataclasses.replace(task.request, teacher_patch_size={freq: size})
            began = time.perf_counter()
            labels = label_windows(teacher, windows, index, request, seed=0)
            took[size] = (time.perf_counter() - began) / len(index)
            errors_of[size] = observed_mse(torch.from_numpy(labels), truth, observed)

        chosen[freq] = best_size(errors_of)
        seconds += took[chosen[freq]] * len(member) / len(windows)
        named = {f"patch {size}": error for size, error in errors_of.items()}
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
                f"--teacher_patch_size {asked}:"
                f" with these lengths the teacher takes {sizes or 'none'}"
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
    facts = [f"{name} {error:.4f}" for name, error in errors_of.items()]
    voice.say("MSE on {} windows of step {}: {}", count, freq or "?", ", ".join(facts))


def begin_labels(folder, task, teacher, weights, job):
    """Write the manifest of a new label file, unless one is begun."""
    windows = task.windows
    old = read_manifest(folder)
    if old and set(windows.freqs) <= old["patch_sizes"].keys():
        job.voice.note(f"going on with the unfinished labels in {folder}")
        return
    if (folder / "manifest.json").exists():  # a damaged one
        shutil.rmtree(folder, ignore_errors=True)
    patch_sizes, seconds = choose_patch_sizes(teacher, task, job.voice)

    request = task.request
    name = request.teacher_model
    snapshot = model_file(name, request.teacher_revision, "config.json").parent
    is_salesforce = name.lower().startswith("salesforce/")
    manifest = {
        "key": label_key(task, weights),
        "block": request.teacher_batch_size,
        "patch_sizes": patch_sizes,
        "teacher": name,
        "revision": request.teacher_revision,
        "commit": snapshot.name if snapshot.parent.name == "snapshots" else None,
        "licence": (
            "CC-BY-NC-4.0, for non-commercial use only" if is_salesforce else f"see {name}"
        ),
        "device": str(teacher.device),
        "precision": teacher.precision,
        "torch": str(torch.__version__),
        "made": time.strftime("%F %T"),
    }
    # Where two runs begin at once, the first decides.
    with atomic(folder / "manifest.json", replace=False) as file:
        file.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode())

    sizes = ", ".join(f"{freq or '?'}: {size}" for freq, size in patch_sizes.items())
    job.voice.say("Patch size: {}", sizes)
    blocks = math.ceil(len(windows) / request.teacher_batch_size)
    minutes = seconds * len(windows) / min(job.world_size, blocks) / 60  # whole blocks each
    job.voice.say(
        "Labelling {:,} windows, {:.1f} MB, about {:.1f} min",
        len(windows),
        4e-6 * len(windows) * windows.horizon,
        minutes,
    )


def get_labels(task, job):
    """LabelFile of a task: from the cache, or made by its teacher, shared by all processes.

    Raises Interrupted between two blocks; the whole ones stay.
    """
    cached = job.on_rank_zero(lambda: find_labels(task))
    if cached:
        job.voice.say("Label cache hit, no teacher call: {}", cached.folder)
    file = cached or make_labels(task, job)
    job.on_rank_zero(file.join)
    labels = file.open()
    if cached:
        tell_cached_errors(labels, task, job.voice)
    return labels


def make_labels(task, job):
    """LabelFile whose blocks are all made, by this run or another one."""
    request = task.request
    cache = Path(request.label_cache).expanduser()
    if problem := unwritable(cache):
        raise UserError(f"--label_cache: {problem}, and the labels are not in it")
    loaded = []
    job.on_rank_zero(lambda: loaded.append(task.load()))  # it may have to fetch it for all
    teacher = loaded[0] if loaded else task.load()
    weights = fingerprint(request.teacher_model, request.teacher_revision)
    folder = key_folder(cache, label_key(task, weights))
    job.on_rank_zero(lambda: begin_labels(folder, task, teacher, weights, job))

    file = LabelFile(folder, read_manifest(folder))
    request = dataclasses.replace(request, teacher_patch_size=file.manifest["patch_sizes"])
    missing = job.on_rank_zero(file.missing)
    total = sum(len(file.index(number)) for number in missing)
    with job.stop.hold(), job.voice.bar("labelling", total=total, unit="window") as bar:
        for first in range(0, len(missing), job.world_size):
            numbers = missing[first : first + job.world_size]  # of blocks, one for each process
            if job.rank < len(numbers):
                number = numbers[job.rank]
                index = file.index(number)
                file.write(number, label_windows(teacher, task.windows, index, request, number))
            bar.update(sum(len(file.index(number)) for number in numbers))
            if signum := job.signal():
                job.voice.note(f"the labels made so far are kept in {file.folder}")
                raise Interrupted(signum)
    return file


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
    when_stopped: str = "the same command with --resume goes on from here"


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
    label: torch.Tensor  # (B, H), the teacher's forecast
    weight: torch.Tensor  # (B, 1), alpha; 0 for a window without a label

    def map(self, change):
        """A batch of `change` of each tensor."""
        changed = {}
        for field in dataclasses.fields(self):
            changed[field.name] = change(getattr(self, field.name))
        return Batch(**changed)


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

    def count(self, sums, points):
        """Add a step; `sums` is None where it failed."""
        self.step += 1
        if sums is None:
            self.skipped += 1
            self.failed += 1
            return
        self.failed = 0
        for i, value in enumerate([*sums.tolist(), points]):
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
            if config.augment == "on":
                batch = augment(batch, seed_from(*moment))
            points = float(batch.observed.sum()) or 1.0  # of all processes

            torch.manual_seed(seed_from(*moment, job.rank))  # dropout
            sums = take_step(own_share(batch, job), points, config, learner, job)
            progress.stopping = job.signal()
            progress.count(sums, points)
            if sums is not None:
                update_average(learner, steps_done=progress.epoch * steps + progress.step)
            elif progress.failed >= MAX_FAILED:
                raise UserError(
                    f"{MAX_FAILED} steps in a row with a non-finite loss or gradient"
                    f" in epoch {progress.epoch + 1}; try a lower --learning_rate;"
                    " the best checkpoint so far is kept"
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
    generator = torch.Generator().manual_seed(seed)
    other = torch.randperm(rows, generator=generator)
    share = torch.rand(rows, 1, generator=generator)
    sign = 1 - 2 * torch.randint(2, (rows, 1), generator=generator)
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
    """This process's share of a batch, on its device."""
    is_left_out = len(batch.context) <= job.rank
    rows = slice(job.rank, None, job.world_size)
    if is_left_out:  # all processes must be in every step: it joins with a window that counts 0
        rows = slice(0, 1)
    share = batch.map(lambda values: job.fabric.to_device(values[rows]))
    if is_left_out:
        share.observed = torch.zeros_like(share.observed)
    return share


def take_step(batch, points, config, learner, job):
    """Update the student by one batch. Returns the sums of the loss over all processes.

    Returns None, and updates nothing, where loss or gradient is not finite on any process.
    """
    forecast = learner.model(batch.context)
    sums = distillation_loss(forecast, batch.truth, batch.observed, batch.label, batch.weight)
    learner.optimizer.zero_grad()
    # The mean over the whole batch: each process has the sum of its share, and the gradients are
    # averaged over the processes.
    job.fabric.backward(sums[0] * (job.world_size / points))
    norm = job.fabric.clip_gradients(
        learner.model,
        learner.optimizer,
        max_norm=config.max_grad_norm,
        error_if_nonfinite=False,
    )
    # The only wait for the device in a step; several processes then wait for each other.
    seen = torch.cat([sums.detach(), norm[None]]).cpu().double()
    if job.largest(not seen.isfinite().all()):
        return None
    learner.optimizer.step()
    return job.sum(seen[:4])


def update_average(learner, steps_done):
    """Move the averaged weights towards the present ones (polynomial-decay averaging)."""
    share = AVERAGE_DECAY / (AVERAGE_DECAY + 1 + steps_done)
    pairs = zip(learner.average.parameters(), learner.student.parameters(), strict=True)
    for mean, weight in pairs:
        mean.lerp_(weight.detach(), share)


# -- All epochs ------------------------------------------------------------------------------------


def fit(student, training, job, content=None):
    """Train a student. Returns the Progress at the end.

    The best checkpoint (by validation MSE against truth), last.pt and the metrics are left in
    training.folder. `content` is the last.pt to go on from.
    """
    learner = make_learner(student, training.config, job)
    progress = Progress()
    if content:
        progress = Progress(**content["loop"])
        progress.stopping = 0
        for name, part in learner.parts().items():
            part.load_state_dict(content[name])

    config = training.config
    save = functools.partial(save_run, training, learner, progress, job.voice)
    with job.stop.hold():
        job.on_rank_zero(save)
        while progress.epoch < config.num_epochs and not is_out_of_patience(progress, config):
            began = time.perf_counter()
            job.voice.say("\nEpoch {}/{}", progress.epoch + 1, config.num_epochs)
            train_epoch(training, learner, progress, job)
            is_best = False
            if not progress.stopping:
                forecast = forecaster(learner.average, job)
                scores = score(forecast, training.validation, EVAL_BATCH, job)
                rate = learner.scheduler.get_last_lr()[0]
                is_best = end_epoch(progress, scores, rate)
                tell_epoch(progress, config, time.perf_counter() - began, job.voice)
                learner.scheduler.step(scores.mse)
            job.on_rank_zero(functools.partial(save, is_best=is_best))
            if signum := job.signal():
                last = training.folder / "last.pt"
                job.voice.note(f"saved {last}; {training.when_stopped}")
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


def is_out_of_patience(progress, config):
    """Whether --patience ends the run."""
    return 0 < config.patience <= progress.since_best


def forecaster(student, job):
    """`forecast(index, context)` of a student, as `score` takes it."""

    @torch.inference_mode()
    def forecast(_index, context):
        return student.eval()(job.fabric.to_device(context)).cpu()

    return forecast


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
    minutes = seconds * (config.num_epochs - line["epoch"]) / 60
    voice.say(
        "Learning rate: {:.1e}, {:.0f} s, {:.1f} min to go",
        line["learning_rate"],
        seconds,
        minutes,
    )
    if line["skipped_steps"]:
        voice.note(f"{line['skipped_steps']} steps with a non-finite loss or gradient were skipped")


# -- What is kept ----------------------------------------------------------------------------------


def save_run(training, learner, progress, voice, is_best=False):
    """Write the checkpoints and metrics of a run.

    In this order, so that a run that is killed in between can go on: the new best, last.pt (which
    names the best), the metrics; then the older best goes.
    """
    folder = training.folder
    content = checkpoint(training.facts, learner, progress)
    names = [progress.best_file, "last.pt"] if is_best else ["last.pt"]
    for name in names:
        with atomic(folder / name) as file:
            torch.save(content, file)
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
    """A line for each epoch in metrics.jsonl, and the same numbers as TensorBoard events."""
    from torch.utils.tensorboard import SummaryWriter  # not at the top: only training needs it

    with atomic(folder / "metrics.jsonl") as file:
        for line in history:
            file.write((json_text(line) + "\n").encode())
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    with SummaryWriter(folder / "tensorboard") as writer:
        for line in history:
            for name, value in line.items():
                if value is not None:
                    writer.add_scalar(name, value, line["epoch"])


# == Commands ======================================================================================


def pick(kind, args):
    """A dataclass of which every field is a flag of the same name."""
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})


def start_job(args, precision, voice, stop):
    """Job of the arguments. With several processes this starts the others, so it comes first."""
    from lightning.fabric import Fabric  # not at the top: it takes seconds, forecasting needs none

    kind, _, index = args.device.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    fabric = Fabric(
        accelerator=kind,
        devices=[int(index)] if index else args.devices,
        num_nodes=args.num_nodes,
        precision=precision,
        strategy="ddp" if args.devices * args.num_nodes > 1 else "auto",
    )
    fabric.launch()
    voice.is_on = fabric.is_global_zero
    if args.device == "auto" and kind == "cpu":
        voice.note("no CUDA GPU found: this runs on the CPU")
    return Job(fabric, voice, stop)


def load_data(config, voice):
    """SplitData of the flags; prints what was found, used and skipped."""
    voice.say("Data directory: {}", config.data_dir)
    voice.say("Context length: {}", config.context_length)
    voice.say("Prediction length: {}", config.prediction_length)
    voice.say("\nCreating datasets...")
    files = read_files(config.data_dir, config.max_files, config.columns, voice)
    voice.say("Found {} CSV files", files.found)
    if len(files.notes) < files.found:
        voice.note(
            f"only the first {len(files.notes)} by name are read"
            f" (--max_files {config.max_files}; 0 = all)"
        )

    data = split_data(files, config)
    for part in PARTS:
        voice.say("Using {} files for the {} set", data.files[part], part)
    voice.say("Split by {}", data.split_by)
    for name, note in data.notes.items():
        if note:
            voice.say("  {}: {}", name, note)
    windows = data.windows["train"]
    if config.max_windows and config.max_windows in np.bincount(windows.series):
        voice.note(
            f"at most {config.max_windows} training windows of each series, spread over it"
            " (--max_windows; 0 = all)"
        )
    voice.say("Datasets loaded: {:,} samples", len(windows))
    voice.say(
        "  validation {:,}, test {:,}", len(data.windows["validation"]), len(data.windows["test"])
    )
    if config.season == "auto" and "" in windows.freqs:
        voice.note("files without timestamps are taken as hourly: season 24 (--season changes it)")
    return data


def load_data_or_offer(args, voice):
    """As `load_data`, of arguments; where their lengths are too long, shorter ones are offered."""
    try:
        return load_data(pick(DataConfig, args), voice)
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

    has_all_freqs = set(windows.freqs) <= set(training_windows.freqs)
    judged_on = training_windows if has_all_freqs else windows
    labels = get_labels(LabelTask(windows, judged_on, request, load, BASELINES), job)
    if labels.damaged:
        voice.note(
            f"{labels.damaged} windows have a non-finite label;"
            " where they train, they train on truth alone"
        )
    return labels


# -- train -----------------------------------------------------------------------------------------


def train(args, voice, stop):
    """Label the training windows (unless alpha is 0), train a student, score it on the test set."""
    job = start_job(args, args.precision, voice, stop)
    if args.demo and args.data_dir == DEMO["data_dir"]:
        job.on_rank_zero(lambda: write_demo_csvs(args.data_dir))
    data = load_data_or_offer(args, voice)
    facts = run_facts(args, data)
    folder = Path(args.save_dir).expanduser()
    content = None  # of the last.pt to go on from
    if args.resume and (folder / "last.pt").is_file():  # else --alpha auto was still trying
        content = read_last(folder, facts)

    request = pick(TeacherRequest, args)
    labels = None
    if facts["run_config"]["alpha"] != 0:
        labels = labels_of(data.windows["train"], data.windows["train"], request, job)
        if content and content["teacher"] and content["teacher"]["key"] != labels.manifest["key"]:
            raise UserError(f"--resume: {folder} was trained on labels of other teacher weights")

    windows = data.windows["train"]
    pairs = sorted(set(zip(windows.freqs, windows.seasons.tolist(), strict=True)))
    seasons = ", ".join(f"{season} (step {freq or '?'})" for freq, season in pairs)
    voice.say("\nSeason in steps: {}", seasons)
    voice.say("\nCreating student...")
    size = sum(weight.numel() for weight in new_student(facts).parameters())
    voice.say("Student parameters: {:,}", size)
    patches = math.ceil(args.context_length / args.patch_size)
    voice.say("Student patches: {} of {} points", patches, args.patch_size)
    if not args.resume:
        job.on_rank_zero(lambda: move_old_run(folder, voice))
    progress = train_student(args, data, labels, facts, content, job)

    best = folder / progress.best_file
    job.on_rank_zero(lambda: draw_history(folder / "training.png", progress.history))
    voice.say("\nBest epoch: {}, {}", progress.best_epoch, best)
    teacher_beside = None  # in the demo alone, as its forecasts of the test windows take time
    if args.demo and labels:
        sizes = labels.manifest["patch_sizes"]
        teacher_beside = dataclasses.replace(request, teacher_patch_size=sizes)
    rows = compare({"student": open_student(best)}, data, teacher_beside, folder, job)
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
    is_slow = args.learning_rate < ADVISED_RATE
    is_bad = is_worse_than_naive(rows["student"], rows)
    if is_at_its_end or (is_bad and is_slow):
        steps = math.ceil(windows / args.batch_size)
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


def train_student(args, data, labels, facts, content, job):
    """Train a student with the alpha of the run, or the best one. Returns its Progress.

    `content` is the last.pt to go on from, or None. Raises UserError where no epoch was any good.
    """
    validation = data.windows["validation"]
    floor = score(naive_forecaster(seasonal_naive, validation), validation, EVAL_BATCH, job)
    job.voice.say("Validation loss of seasonal-naive: {:.4f}", floor.mse)

    training = Training(
        windows=data.windows["train"],
        validation=validation,
        labels=labels,
        config=pick(TrainConfig, args),
        facts=facts,
        folder=Path(args.save_dir).expanduser(),
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
    progress = fit(new_student(facts), with_alpha(training, alpha), job, content)
    if args.alpha == "auto":
        job.on_rank_zero(lambda: shutil.rmtree(training.folder / "trials", ignore_errors=True))
    if not progress.best_file:
        raise UserError("no epoch gave a finite validation loss; try a lower --learning_rate")
    return progress


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
    }


def new_student(facts):
    """A student with the weights that the run's seed gives."""
    torch.manual_seed(facts["run_config"]["seed"])
    return PatchStudent(**facts["student_config"])


def read_last(folder, facts):
    """Content of the last.pt to go on from.

    Where --alpha auto has chosen already, facts get that alpha. Raises UserError where the run in
    `folder` is not the one that facts describe.
    """
    content = read_checkpoint(folder / "last.pt")
    facts["alpha_tried"] = content.get("alpha_tried")
    if facts["run_config"]["alpha"] == "auto" and facts["alpha_tried"]:
        tried = facts["alpha_tried"]
        facts["run_config"]["alpha"] = min(tried, key=tried.get)
    refuse_misfit(content, facts, folder)
    return content


def refuse_misfit(content, facts, folder):
    """Raise UserError with all in which a run differs from the one in `folder` that it resumes."""
    before = content["run_config"]
    now = facts["run_config"]
    differences = []
    for name in sorted(now.keys() - MAY_CHANGE):
        if before.get(name) != now[name]:
            differences.append(f"--{name} was {before.get(name)}, is {now[name]}")
    if content["data"] != facts["data"]:
        differences.append("the data is not the same")
    if now["alpha"] != 0 and content["teacher"]:
        weights = fingerprint(now["teacher_model"], now["teacher_revision"])
        if weights and weights != content["teacher"]["key"]["weights"]:
            differences.append("the teacher's weights are not the same")
    if differences:
        path = folder / "last.pt"
        lines = [f"--resume: {path} does not fit this command", *differences]
        raise UserError("\n  ".join(lines))


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
        trial.when_stopped = "the same command with --resume repeats the trials"
        job.voice.is_muted = True  # but for the progress
        tried[alpha] = fit(new_student(trial.facts), trial, job).best_loss
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
    """Move an earlier run's files to folder/old-TIME: a run never destroys another."""
    found = [path for pattern in RUN_FILES for path in folder.glob(pattern)]
    if not found:
        return
    target = folder / time.strftime("old-%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        if not target.exists():
            break
        target = folder / time.strftime(f"old-%Y%m%d-%H%M%S-{number}")
    target.mkdir()
    for path in found:
        path.rename(target / path.name)
    voice.note(f"an earlier run lay in {folder}; its files are now in {target}")


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


def draw(path, panels):
    """Write a picture of panels, one below the other, with one legend beside them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1 + 2.4 * len(panels)), layout="constrained")
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
        if panel.begins is not None:
            axis.axvline(on_clock(panel.begins), color="0.8", linestyle="--", zorder=0)
        set_ticks(axis, panel)
        # Without mathematics, as $ in a name is a dollar.
        axis.set_title(shortened_name(panel.title, 90), fontsize="small", parse_math=False)
        axis.set_xlabel(panel.x_label, fontsize="small", parse_math=False)
        axis.set_ylabel(shortened_name(panel.y_label, 24), fontsize="small", parse_math=False)
    figure.suptitle(panels[0].heading, fontsize="medium", parse_math=False)
    names = [shortened_name(name, 28) for name in lines]
    legend = figure.legend(lines.values(), names, loc="outside right upper", fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)


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
        students[shown] = open_student(name)
    refuse_other_lengths(students, args)
    first_name, first = next(iter(students.items()))
    distilled = [opened for opened in students.values() if opened.content.get("teacher")]
    pupil = distilled[0] if distilled else first  # the teacher is that of this one's run
    if args.with_teacher and pupil.path is None and not args.teacher_model:
        teacher = (pupil.content.get("teacher") or {}).get("teacher", "none")
        raise UserError(
            f"--with_teacher: an exported student names its teacher itself ({teacher});"
            " name the one to load with --teacher_model"
        )

    inherited = inherit_arguments(args, first, pupil)
    data_dir = inherited.data_dir
    if not data_dir or not Path(data_dir).expanduser().exists():
        where = data_dir or "it does not say where"
        raise UserError(f"the data of {first_name} ({where}) is not here; give --data_dir")
    folder = evaluation_folder(args, first)

    job = start_job(args, "32-true", voice, stop)
    data = load_data(pick(DataConfig, inherited), voice)
    for name, opened in students.items():
        if opened.content.get("data", {}).get("test") != data.windows["test"].digest:
            voice.warn(
                f"these are not the test windows of {name}'s own run:"
                " it may have been trained on them"
            )
    request = None
    if args.with_teacher:
        request = pick(TeacherRequest, inherited)
        if pupil.content.get("teacher") and not args.teacher_patch_size:
            request.teacher_patch_size = pupil.content["teacher"]["patch_sizes"]
    compare(students, data, request, folder, job)


def refuse_other_lengths(students, args):
    """Raise UserError unless all students, and the flags where given, have the same lengths."""
    lengths = {}
    for name, opened in students.items():
        lengths[name] = (opened.student.context_length, opened.student.prediction_length)
    context_length, horizon = next(iter(lengths.values()))
    lengths["the flags"] = (
        args.context_length or context_length,
        args.prediction_length or horizon,
    )
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length} -> {h}" for name, (length, h) in lengths.items())
        raise UserError(
            f"--checkpoint: these have no windows in common ({listed}); give one of them"
        )


def inherit_arguments(args, first, pupil):
    """Arguments of evaluate: as given, else as in the first student's run, else the defaults.

    Those of the teacher are as in the run of `pupil`, another student.
    """
    values = vars(build_parser(demo=False).parse_args(["train"]))
    values["data_dir"] = ""
    for name, value in first.content.get("run_config", {}).items():
        is_place = name.endswith(("_dir", "_cache"))
        if first.path or not is_place:  # an exported student names no place of this machine
            values[name] = value
    for field in dataclasses.fields(TeacherRequest):
        of_pupil = pupil.content.get("run_config", {})
        if field.name != "label_cache" and field.name in of_pupil:
            values[field.name] = of_pupil[field.name]
    for name, value in vars(args).items():
        if value is not None:
            values[name] = value
    values["context_length"] = first.student.context_length
    values["prediction_length"] = first.student.prediction_length
    return argparse.Namespace(**values)


def evaluation_folder(args, first):
    """Where evaluate writes: beside the first checkpoint, if the windows are those of its run."""
    data_flags = (  # those that decide the test windows; others only thin out training
        args.data_dir,
        args.columns,
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
        folder = Path(args.output_dir)
    elif is_own_data and first.path:
        folder = first.path.parent
        if len(args.checkpoint) > 1:  # those of the run alone stay
            folder = folder / "comparison"
    folder = folder.expanduser()
    if problem := unwritable(folder):
        raise UserError(f"{problem}; give --output_dir")
    return folder


@dataclasses.dataclass
class Cost:
    """What a forecaster takes."""

    parameters: int
    bytes: int  # as a weights file
    cpu_ms: float  # median of one forecast, warmed up


@dataclasses.dataclass
class Row:
    """A forecaster in the table of an evaluation."""

    scores: Scores
    cost: Cost | None = None
    alpha: float | None = None  # of a student
    weights_id: str | None = None  # of a student
    making: dict | None = None  # of a student, see `making_of`

    def to_json(self):
        """The row of evaluation.json."""
        content = dataclasses.asdict(self.scores)
        if self.cost:
            content.update(dataclasses.asdict(self.cost))
        if self.weights_id:
            content["alpha"] = self.alpha
            content["weights"] = self.weights_id
        return content


def compare(students, data, request, folder, job):
    """Score students (name -> OpenedStudent) beside naive forecasts on all test windows.

    With a TeacherRequest the teacher, too. Prints a table, and leaves it in `folder` with pictures.
    Returns name -> Row on the first process, None on others.
    """
    test = data.windows["test"]
    forecasters = {}
    for name, opened in students.items():
        student = copy.deepcopy(opened.student).to(job.device)
        forecasters[name] = forecaster(student, job)
    labels = None
    if request:
        labels = labels_of(test, data.windows["train"], request, job)
        forecasters["teacher"] = label_forecaster(labels)
    for name, naive in BASELINES.items():
        forecasters[name] = naive_forecaster(naive, test)

    rows = {}
    for name, forecast in forecasters.items():
        rows[name] = Row(score(forecast, test, EVAL_BATCH, job))
    if job.rank != 0:
        return None
    for name, opened in students.items():
        rows[name].alpha = opened.content.get("run_config", {}).get("alpha")
        rows[name].weights_id = opened.weights_id
        rows[name].making = making_of(opened.content)
        rows[name].cost = student_cost(opened, test)
    if labels:
        rows["teacher"].cost = teacher_cost(request, labels, test, job.voice)

    tell_rows(rows, len(test), job.voice)
    tell_verdict(rows, job.voice)
    save_evaluation(folder / "evaluation.json", rows, test)
    draw_evaluation(folder, rows, forecasters, test)
    job.voice.say("Table and pictures: {}", folder)
    return rows


def naive_forecaster(naive, windows):
    """`forecast(index, context)` of a naive forecast, as `score` takes it."""
    return lambda index, context: naive(context, windows.season(index), windows.horizon)


def label_forecaster(labels):
    """`forecast(index, context)` that looks up labels; not finite where they are not."""
    return lambda index, _context: torch.from_numpy(np.array(labels.array[index]))


def measure_cost(weights, call, context):
    """Cost of a forecaster with a state dict of weights, and `call(context)` as one forecast."""
    from safetensors.torch import save
    from torch.utils.benchmark import Timer

    timer = Timer(
        "call(context)",
        globals={"call": call, "context": context},
        num_threads=torch.get_num_threads(),
    )
    return Cost(
        parameters=sum(weight.numel() for weight in weights.values()),
        bytes=len(save(weights)),
        cpu_ms=1e3 * timer.blocked_autorange().median,
    )


def student_cost(opened, test):
    """Cost of a student on the CPU."""
    context, _, _ = test.batch(np.arange(1))

    @torch.inference_mode()
    def forecast(context):
        return opened.student(context)

    return measure_cost(opened.content["model_state_dict"], forecast, context)


def teacher_cost(request, labels, test, voice):
    """Cost of the teacher on the CPU; None where the labels were carried here without it."""
    if not fingerprint(request.teacher_model, request.teacher_revision):
        return None
    teacher = load_teacher(request, torch.device("cpu"), voice.note)
    size = labels.manifest["patch_sizes"][test.freqs[test.series[0]]]
    asked = (test.horizon, size, request.teacher_point, request.num_samples)
    context, _, _ = test.batch(np.arange(1))
    return measure_cost(
        teacher.module.state_dict(), lambda context: teacher.forecast(context, *asked), context
    )


def tell_rows(rows, count, voice):
    """Print the table of an evaluation on `count` windows, in lines of at most 100 columns."""
    voice.say("\nTest error on {:,} windows (ms: one forecast on the CPU):", count)
    names = short_names(rows)
    width = max(len(name) for name in names.values())
    for name, row in rows.items():
        scores = row.scores
        line = f"  {names[name]:<{width}}  MSE {scores.mse:.4f}  MAE {scores.mae:.4f}"
        line += f"  MASE {scores.mase:.4f}"
        if row.cost:
            megabytes = 1e-6 * row.cost.bytes
            line += f"{row.cost.parameters:>12,} parameters {megabytes:>5.1f} MB"
            line += f" {row.cost.cpu_ms:>6.1f} ms"
        voice.say("{}", line)


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
            *(name, twin, ", ".join(differences[twin])),
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
    making["training data"] = data.get("train")
    making["validation data"] = data.get("validation")
    return making


def differences_of(making, other):
    """In what two students were made in another way, in words."""
    found = []
    for name in sorted({*making, *other}):
        own_value = making.get(name)
        other_value = other.get(name)
        if own_value == other_value:
            continue
        if name.startswith("--"):
            found.append(f"{name} {own_value} and {other_value}")
        else:
            found.append(f"other {name}")
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


def draw_evaluation(folder, rows, forecasters, test):
    """Draw the error by step of the horizon, and forecasts of three test windows."""
    names = [name for name in rows if name != "last value"]
    curves = {name: rows[name].scores.mse_by_step for name in names}
    draw(folder / "error_by_horizon.png", [error_panel(curves, test.horizon)])

    index = np.linspace(0, len(test) - 1, 5).astype(np.int64)[1:-1]
    context, truth, _ = test.batch(index)
    forecasts = {name: forecasters[name](index, context) for name in names}
    panels = []
    for row, window in enumerate(index):
        own = {name: forecast[row] for name, forecast in forecasts.items()}
        panels.append(window_panel(test, window, (context[row], truth[row]), own))
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


def predict(args, voice, _stop):
    """Forecast the H steps after the end of each series of a CSV; or its last H, held out."""
    opened = open_student(args.checkpoint)
    run_config = opened.content.get("run_config", {})
    horizon = opened.student.prediction_length
    held_out = horizon if args.backtest else 0
    path = Path(args.input).expanduser()
    try:
        columns = args.columns or run_config.get("columns", ["first"])
        series, notes = read_series(path, path.name, columns)
    except Unusable as reason:
        raise UserError(f"--input {args.input}: {reason}") from reason

    forecasts = []
    for one in series:
        try:
            before = one.values[: len(one.values) - held_out]
            context = last_context(before, opened.student.context_length)
        except Unusable as reason:
            notes.append(f"skipped: {one.name}: {reason}")
            continue
        forecasts.append(SeriesForecast(one, context, steps_after(one, horizon, held_out)))
        notes += context_notes(one, context, opened.content.get("freqs", []))
    if not forecasts:
        lines = [f"--input {args.input}: no series to forecast", *notes[:MOST_NOTES]]
        problem = UserError("\n  ".join(lines))
        command = command_for_short_series(args.input, columns, series, opened.student)
        if command:
            problem = UserError("{}\nA student of shorter lengths fits:\n  {}", problem, command)
        raise problem
    for note in notes[:MOST_NOTES]:
        voice.note(note)
    if len(notes) > MOST_NOTES:
        voice.note(f"… and {len(notes) - MOST_NOTES} more such notes")

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
    output = Path(args.output).expanduser()
    save_forecasts(output, forecasts)
    picture = output.with_suffix(".png")
    if args.plot:
        draw_forecasts(picture, forecasts, held_out, run_config.get("season", "auto"))
        voice.say("Forecast: {}, {}", output, picture)
    else:
        voice.say("Forecast: {}", output)


def forecast_frame(student, frame, columns=None):
    """DataFrame of the next H steps of the series in a DataFrame: a column each, by their dates.

    Dates are the index of the frame (a DatetimeIndex) or a column of it; it is read as `predict`
    reads a CSV, with the columns of the student's training unless `columns` (a list) names others.
    Without dates the steps are numbered 1, 2, ... Raises UserError.
    """
    if columns is None:
        columns = student.info["run_config"]["columns"] if student.info else ["first"]
    series = series_of_frame(frame, columns)
    ahead = {}
    for one in series:
        try:
            context = last_context(one.values, student.context_length)
        except Unusable as reason:
            raise UserError("{}: {}", one.name, reason) from reason
        index = steps_after(one, student.prediction_length)
        ahead[one.column] = pd.Series(student.forecast(context.values), index)
    return pd.concat(ahead, axis=1, sort=True).rename_axis(index.name)


def series_of_frame(frame, columns):
    """List of RawSeries of a DataFrame, read as the CSV that it would be. Raises UserError."""
    has_dates = isinstance(frame.index, pd.DatetimeIndex)
    if has_dates:
        frame = frame.rename_axis(frame.index.name or "date").reset_index()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "frame.csv")
        frame.to_csv(path, index=False)
        try:
            series, notes = read_series(path, "frame", columns)
        except Unusable as reason:
            raise UserError("the frame: {}", reason) from reason
    skipped = [note for note in notes if note.startswith("skipped: ")]
    if skipped:  # here is nobody to be told of it and to go on
        raise UserError("the frame: {}", "; ".join(skipped))
    return series


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
    place = Path(path).expanduser().resolve()
    root = Path(data_dir).expanduser().resolve()
    return root in (place, *place.parents)


def command_for_short_series(data_dir, columns, series, student):
    """The command that trains a student for series which are too short for this one, or None."""
    longest = max(series, key=lambda one: len(one.values))
    if len(longest.values) >= student.context_length + student.prediction_length:
        return None
    wanted = vars(build_parser(demo=False).parse_args(["train"]))
    wanted["data_dir"] = data_dir
    wanted["columns"] = columns
    wanted["context_length"] = student.context_length
    wanted["prediction_length"] = student.prediction_length
    args = argparse.Namespace(**wanted)
    lengths = propose_lengths(len(longest.values), longest.freq, pick(DataConfig, args))
    if lengths is None:
        return None
    return command_line(args, context_length=lengths[0], prediction_length=lengths[1])


def context_notes(series, context, trained_on):
    """What to know of a context; `trained_on` are the frequencies that the student knows."""
    notes = []
    if context.filled:
        notes.append(f"{series.name}: {context.filled} missing values in the context are filled in")
    if context.carried:
        notes.append(
            f"WARNING: {series.name}: its last {context.carried} values are missing:"
            " the last known one is carried forward"
        )
    if series.freq not in trained_on:
        known = ", ".join(trained_on) or "unknown ones"
        notes.append(
            f"WARNING: {series.name}: its step is {series.freq or 'unknown'},"
            f" the student was trained on {known}"
        )
    return notes


def fill_in(forecasts, student):
    """Compute the values of SeriesForecasts."""
    contexts = np.stack([forecast.context.values for forecast in forecasts])
    parts = torch.from_numpy(contexts).split(EVAL_BATCH)
    with torch.inference_mode():
        values = torch.cat([student(part) for part in parts]).numpy()  # (series, H) float64
    for forecast, own in zip(forecasts, values, strict=True):
        forecast.values = own


def tell_backtest(forecast, season, voice):
    """Print the errors on the last rows of a series, beside seasonal-naive's, in its own units."""
    series = forecast.series
    horizon = len(forecast.values)
    truth = series.values[-horizon:]
    if not np.isfinite(truth).any():
        voice.note(
            f"{series.name}: its last {horizon} values are missing, the forecast cannot be compared"
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


def save_forecasts(output, forecasts):
    """Write the CSV of the forecasts, a column for each series."""
    columns = {}
    for forecast in forecasts:
        columns[forecast.series.column] = pd.Series(forecast.values, forecast.index)
    table = pd.concat(columns, axis=1, sort=True).rename_axis(forecasts[0].index.name)
    with output_file(output) as file:
        file.write(table.to_csv().encode())


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
        panel.x_label = forecast.index.name or ""
        panel.y_label = series.column
        panels.append(panel)
    if len(forecasts) > len(panels):
        panels[0].heading = f"{len(panels)} of {len(forecasts):,} series"
    draw(picture, panels)


# -- export ----------------------------------------------------------------------------------------


def export(args, voice, _stop):
    """Write a student as an ONNX file, or as a folder for the hub."""
    opened = open_student(args.checkpoint)
    base = opened.path.parent if opened.path else Path(".")
    default = "student.onnx" if args.format == "onnx" else "hub"
    output = Path(args.output or base / default).expanduser()
    if args.format == "onnx":
        contexts = random_contexts(opened.student.context_length)
        difference = export_onnx(opened.student, output, contexts)
        voice.say(
            "Largest difference from PyTorch on {} contexts: {:.1e} of their deviation",
            len(contexts),
            difference,
        )
    else:
        export_hub(opened, output, base / "evaluation.json")
    voice.say("Exported: {}", output)


def random_contexts(length):
    """Raw contexts (S, L) float32: random walks with and without an offset, in three units."""
    walks = np.random.default_rng(0).standard_normal((8, length)).cumsum(1)
    without_offset = walks - walks[:, -1:]  # offsets hide much in float32
    contexts = [np.ones(length)]
    for unit in (1e-3, 1, 1e3):
        contexts += [*(unit * walks), *(unit * without_offset)]
    return torch.from_numpy(np.stack(contexts)).float()


def export_onnx(student, path, contexts):
    """Write a student as ONNX if it forecasts as PyTorch does; returns the largest difference.

    The difference is in deviations of each context. Raises UserError where it is too large.
    """
    import onnxruntime
    import onnxscript  # noqa: F401  torch.onnx needs it

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages we do not need
    with torch.inference_mode(), without_warning_of_torch():
        truth = student(contexts)
        program = torch.onnx.export(
            student,
            (contexts[:2],),
            input_names=["context"],
            output_names=["forecast"],
            dynamic_shapes={"context": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    program.model.metadata_props.update(onnx_facts(student))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder, path.name)
        program.save(file, external_data=False)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        forecasts = []
        for part in contexts.split([len(contexts) - 1, 1]):  # a batch, and a single one
            forecasts += session.run(None, {"context": part.numpy()})
        _, deviation = instance_scale(contexts)
        difference = (torch.from_numpy(np.concatenate(forecasts)) - truth) / deviation
        largest = float(difference.abs().max())
        if not largest < ONNX_TOLERANCE:
            raise UserError(
                f"{path}: not kept: it differs from PyTorch by {largest:.1e} deviations"
            )
        os.replace(file, path)
    return largest


@contextlib.contextmanager
def without_warning_of_torch():
    """While torch exports, it calls a thing of its own that it has deprecated: nobody can mend it.

    No other warning is silenced, here or elsewhere.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        yield


def onnx_facts(student):
    """Metadata (str -> str) of the ONNX file."""
    teacher = student.info.get("teacher") or {"teacher": "none", "licence": "no teacher was used"}
    return {
        "context_length": str(student.context_length),
        "prediction_length": str(student.prediction_length),
        "sampling_frequency": ", ".join(student.info.get("freqs", [])),
        "teacher": str(teacher["teacher"]),
        "licence": str(teacher["licence"]),
    }


def export_hub(opened, output, evaluation_file):
    """Write a student's weights, configuration and card, with its scores where there are any."""
    evaluation = read_evaluation(evaluation_file, opened)
    if evaluation:
        opened.student.info["evaluation"] = evaluation
    names = {"config.json", "model.safetensors", "README.md"}
    if output.exists():
        there = {path.name for path in output.iterdir() if not path.name.startswith(".")}
        if there - names:
            raise UserError(f"--output {output}: holds other files; choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        opened.student.save_pretrained(temporary)
        for name in names:
            os.replace(Path(temporary, name), output / name)


def read_evaluation(path, opened):
    """Windows and rows of an evaluation.json; None where it is of other weights or windows.

    The rows are those of the student (under that name) and of forecasters that are no student.
    """
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        rows = {}
        for name, row in table["rows"].items():
            if row.get("weights") not in (None, opened.weights_id):
                continue
            shown = "student" if "weights" in row else name
            rows[shown] = {metric: row[metric] for metric in METRICS}
        if "student" not in rows or table["test"] != opened.content["data"]["test"]:
            return None
        return {"windows": table["windows"], "rows": rows}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); evaluate writes it anew") from error


# -- label -----------------------------------------------------------------------------------------


def label(args, voice, stop):
    """Label the training windows into the cache, or list what it holds."""
    if args.list:
        list_labels(Path(args.label_cache).expanduser(), voice)
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
        file = LabelFile(folder, manifest)
        key = manifest["key"]
        done = 1 - len(file.missing()) / file.count
        megabytes = 4e-6 * file.windows * file.horizon
        facts = [
            manifest["teacher"],
            f"{file.windows:,} windows",
            f"{key['context']} -> {key['horizon']}",
            key["point"],
            f"patch {manifest['patch_sizes']}",
            f"{megabytes:.1f} MB",
            f"{100 * done:.0f} % made",
            manifest["made"],
        ]
        voice.say("{}: {}", folder.name, ", ".join(facts))


# == Entry =========================================================================================


def parse_arguments(argv):
    """Namespace of the checked arguments. Raises UserError with every problem that was found."""
    words = list(argv)
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
            *(len(problems), "\n  ".join(problems)),
        )
    args, unknown = parser.parse_known_args(words)
    if not argv and not is_there(args.data_dir):
        raise UserError(
            "no arguments, and no data in {} (--data_dir). To begin:\n{}",
            *(args.data_dir, FIRST_COMMANDS),
        )
    args = fit_patch_size(args, words)
    problems = [tell_unknown(word, args) for word in unknown]
    problems += check_ranges(args)
    if not getattr(args, "list", False):  # label --list reads the cache, and nothing else
        problems += check_inputs(args)
        problems += check_outputs(args)
    if not getattr(args, "list", False) and "device" in args:
        problems += check_machine(args)
    if args.command == "train":
        problems += check_training(args)
    if problems:
        count = f"{len(problems)} problem(s) with the arguments"
        raise UserError("\n  ".join([count, *problems]))
    return args


def no_command(word):
    """UserError of a first word that is neither a command nor a flag."""
    close = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = ""
    if close:
        hint = Message("; did you mean {}?", (close[0],))
    elif is_there(word):
        hint = Message("; did you mean {}?", (f"--data_dir {shlex.quote(word)}",))
    return UserError("{}: not a command; these are {}{}", word, ", ".join(COMMANDS), hint)


def check_defaults(parser, command):
    """Problems of the defaults of a command that argparse never looks at, as edits may leave them.

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
            problems.append(f"--{action.dest} {value!r}: must be {kind_of(action)}")
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
    """What a flag takes, in words."""
    if action.nargs == 0:
        return "True or False"
    if action.nargs == "+":
        return "a list of texts, such as ['first']"
    if action.choices:
        return f"one of {', '.join(action.choices)}"
    kinds = {
        int: "a whole number",
        float: "a number",
        int_or_auto: "a whole number or 'auto'",
        float_or_auto: "a number or 'auto'",
    }
    return kinds.get(action.type, "a text in quotes, as it is typed")


def fit_patch_size(args, words):
    """The arguments, with patches that fit a short context, unless --patch_size was typed."""
    is_typed = any(word.partition("=")[0] == "--patch_size" for word in words)
    if "patch_size" not in args or is_typed or args.patch_size <= args.context_length:
        return args
    lowered = {"patch_size": max(1, args.context_length // 2)}
    return argparse.Namespace(**(vars(args) | lowered))


def tell_unknown(word, args):
    """What to say of a word that is no argument."""
    problem = f"{word}: not an argument of {args.command}"
    if word in COMMANDS:
        return f"{problem}; the command comes first, before all flags"
    flags = [f"--{name}" for name in vars(args)]
    close = difflib.get_close_matches(word.partition("=")[0], flags, n=1)
    if close:
        return f"{problem}; did you mean {close[0]}?"
    return problem


def check_ranges(args):
    """Problems (list of str) of numbers that are too small, too large or not finite."""
    problems = []
    for name, (is_right, range_words) in RANGES.items():
        value = getattr(args, name, None)
        if value is None or value == "auto":
            continue
        is_finite = isinstance(value, int) or math.isfinite(value)
        if not is_finite or not is_right(value):
            problems.append(f"--{name} {value}: must be {range_words}")
    return problems


def is_local(name):
    """Whether a name looks like a path, which a hub id does not."""
    return re.match(r"[./~]|.*\.pt$", name) is not None


def looks_like_path(name):
    """Whether what a user calls a checkpoint cannot be a hub id, which is OWNER/MODEL."""
    first_part = name.partition("/")[0]
    return is_local(name) or not is_hub_id(name) or is_there(first_part)


def is_there(path):
    """Whether a path, which may begin with ~, is there."""
    return Path(path).expanduser().exists()


def check_inputs(args):
    """Problems of files and folders that are read."""
    problems = []
    checkpoints = getattr(args, "checkpoint", [])
    if isinstance(checkpoints, str):
        checkpoints = [checkpoints]
    for name in checkpoints:
        if looks_like_path(name) and not is_there(name):
            problems.append(f"--checkpoint {name}: no such file or folder")

    data_dir = getattr(args, "data_dir", None)
    is_made = getattr(args, "demo", False) and data_dir == DEMO["data_dir"]
    if data_dir is not None and not is_made and not is_there(data_dir):
        problems.append(f"--data_dir {data_dir}: no such folder or file")
    if "input" in args and not is_there(args.input):
        problems.append(f"--input {args.input}: no such folder or file")

    teacher = getattr(args, "teacher_model", None)
    if teacher is not None and needs_teacher(args) and is_local(teacher) and not is_there(teacher):
        problems.append(f"--teacher_model {teacher}: no such folder")
    return problems


def needs_teacher(args):
    """Whether labels have to be made for certain. A cache that is there may hold them, carried."""
    if args.command == "train" and args.alpha == 0:
        return False
    return bool(args.label_cache) and not Path(args.label_cache).expanduser().is_dir()


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
            problems.append(f"--{name} {getattr(args, name)}: {problem}")

    if getattr(args, "output", None):
        problems += check_output_file(args)
    return problems


def check_output_file(args):
    """Problems of an --output that would replace something else."""
    output = Path(args.output).expanduser().resolve()
    is_folder_wanted = args.command == "export" and args.format == "hub"
    if is_folder_wanted and output.is_file():
        return [f"--output {args.output}: is a file; a folder is to be written"]
    if not is_folder_wanted and output.is_dir():
        return [f"--output {args.output}: is a folder; a file is to be written"]
    if args.command != "predict":
        return []
    if output == Path(args.input).expanduser().resolve():
        return [f"--output {args.output}: is the input"]
    if args.plot and output.suffix == ".png":
        return [f"--output {args.output}: is where --plot puts the picture"]
    return []


def check_machine(args):
    """Problems of devices that are not there, or not enough."""
    gpus = torch.cuda.device_count()
    form = re.fullmatch(r"auto|cpu|mps|cuda(:(?P<index>\d+))?", args.device)
    if not form:
        return [f"--device {args.device}: is not auto, cpu, cuda, cuda:1 or mps"]
    is_here = True
    if args.device == "mps":
        is_here = torch.backends.mps.is_available()
    elif args.device.startswith("cuda"):
        is_here = int(form["index"] or 0) < gpus
    if not is_here:
        return [
            f"--device {args.device}: is not here (PyTorch finds {gpus} CUDA GPUs);"
            " use --device cpu"
        ]

    problems = []
    is_cpu = args.device == "cpu" or (args.device == "auto" and not gpus)
    if is_cpu and args.teacher_precision == "bf16":
        problems.append("--teacher_precision bf16: needs a GPU; use 32")
    if args.devices != 1 and ":" in args.device:
        problems.append(f"--devices {args.devices}: not with --device {args.device}")
    if not is_cpu and args.devices > max(1, gpus):
        problems.append(f"--devices {args.devices}: PyTorch finds {gpus} GPUs")
    return problems


def check_training(args):
    """Problems of sizes that do not fit each other, and of --resume."""
    problems = []
    if args.num_heads > 0 and args.d_model % args.num_heads != 0:
        problems.append(f"--num_heads {args.num_heads}: does not divide --d_model {args.d_model}")
    if args.patch_size > args.context_length:
        problems.append(
            f"--patch_size {args.patch_size}: longer than --context_length {args.context_length}"
        )
    if args.resume:
        folder = Path(args.save_dir).expanduser()
        was_trying = args.alpha == "auto" and (folder / "trials").is_dir()  # these are repeated
        if not (folder / "last.pt").is_file() and not was_trying:
            problems.append(
                f"--resume: no {folder / 'last.pt'} to go on from; start without --resume"
            )
    return problems


def main(argv=None):
    """Run the command line `argv` (default: sys.argv[1:]).

    Returns the exit code: 0, 2 on bad input, 128 + number of the signal.
    """
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):  # a console that cannot print Chinese shows escapes
            output.reconfigure(errors="backslashreplace")
    commands = {
        "train": train,
        "evaluate": evaluate,
        "predict": predict,
        "export": export,
        "label": label,
    }
    words = sys.argv[1:] if argv is None else argv
    language = language_of(words)  # of what ends the program, perhaps before all flags are read
    stop = Stop()
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # Python allows no other one
        for signum in stopping_signals():
            handlers[signum] = signal.signal(signum, stop)
    try:
        if sys.version_info < OLDEST_PYTHON:
            oldest = ".".join(map(str, OLDEST_PYTHON))
            raise UserError(f"this is Python {sys.version.split()[0]}; it takes {oldest} or newer")
        args = parse_arguments(words)
        commands[args.command](args, Voice(args.lang), stop)
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
        where = error.filename or "input or output"
        problem = Message("{}: {}", (where, error.strerror or error))
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    tell_end(Message("error: {}", (problem,)), language)
    return 2


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
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(in_language(message, language), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
