"""What the tests share: small synthetic CSVs, and real MoiraiModules with few random weights."""

import json
import os

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch, and for child processes, which must give the same bits as this one
)

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import moirai_distill as md

torch.set_num_threads(1)

SCRIPT = Path(__file__).resolve().parent.parent / "moirai_distill.py"
DEMO_TEACHER = SCRIPT.parent / "checkpoints" / "demo_teacher"
# A run of seconds: context 64, horizon 16, a student of a few thousand weights.
SMALL = "--context_length 64 --prediction_length 16 --d_model 16 --num_layers 1 --num_heads 2"
SMALL += " --patch_size 8 --device cpu --devices 1 --teacher_precision 32"
# What else decides such a run, whatever the script's defaults are.
SMALL_RUN = "--num_epochs 2 --max_windows 10 --learning_rate 1e-3 --lang en --columns first"
SMALL_RUN += " --max_files 0 --split_by auto --split_ratio 8:1:1 --split_seed 0 --season auto"
SMALL_RUN += " --max_gap 16 --stride 1 --teacher_patch_size auto --num_samples 5 --quantiles on"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Let two processes share the whole suite, file by file, where pytest-xdist is installed.

    `pytest -n 0`, and the names of files or tests, run in this process alone.
    """
    is_whole = config.args_source == config.ArgsSource.TESTPATHS
    is_worker = hasattr(config, "workerinput")
    if not config.pluginmanager.hasplugin("xdist") or is_worker or not is_whole:
        return
    if config.option.numprocesses is None and not config.option.usepdb:
        config.option.numprocesses = 2
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False  # the files with the most tests are not the slowest


STARTS_PROCESSES = {"test_devices", "test_hub", "test_end_to_end", "test_robust"}


def pytest_collection_modifyitems(items):
    """Begin with the files whose tests take longest, so that both processes end together."""
    items.sort(key=lambda item: item.path.stem not in STARTS_PROCESSES)


def hourly(rows, seed=0, start="2024-01-01"):
    """A frame (date, value) of a noisy daily cycle."""
    rng = np.random.default_rng(seed)
    value = np.sin(2 * np.pi * np.arange(rows) / 24 + seed) + 0.1 * rng.standard_normal(rows) + 5
    return pd.DataFrame({"date": pd.date_range(start, periods=rows, freq="h"), "value": value})


def quiet_voice():
    """A Voice that says nothing."""
    voice = md.Voice("en")
    voice.is_on = False
    return voice


def make_job(voice=None):
    """A Job of one process on the CPU; it says nothing unless a Voice is given."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    return md.Job(fabric, voice or quiet_voice(), md.Stop())


def data_config(**changes):
    """DataConfig with the lengths of SMALL and all windows, whatever the script's defaults are."""
    settings = {
        "data_dir": "",
        "max_files": 0,
        "context_length": 64,
        "prediction_length": 16,
        "split_by": "auto",
        "split_ratio": (8.0, 1.0, 1.0),
        "split_seed": 0,
        "max_gap": 16,
        "season": "auto",
        "stride": 1,
        "max_windows": 0,
    }
    assert not changes.keys() - settings.keys()
    return md.DataConfig(**(settings | changes))


def read_config(*columns, **changes):
    """ReadConfig of these columns (default: the first), whatever the script's defaults are."""
    settings = {
        "columns": [*columns] or ["first"],
        "time_column": ["auto"],
        "time_format": "auto",
        "id_columns": ["auto"],
        "encoding": "auto",
        "skip_rows": "auto",
        "decimal": "auto",
        "thousands": "auto",
        "na_values": [],
        "max_file_mb": 2000,
    }
    assert not changes.keys() - settings.keys()
    return md.ReadConfig(**(settings | changes))


def split_folder(folder, **changes):
    """SplitData of a folder of CSVs; `changes` as for `data_config`."""
    config = data_config(data_dir=str(folder), **changes)
    files = md.read_files(config.data_dir, config.max_files, read_config(), quiet_voice())
    return md.split_data(files, config)


def files_read(series):
    """FolderRead of file -> list of RawSeries, without notes."""
    reports = {name: md.Report(facts=[], warnings=[], skipped=[]) for name in series}
    return md.FolderRead(len(series), series, reports)


def raw_series(name, values, freq="h", **more):
    """RawSeries without timestamps at hand."""
    return md.RawSeries(name, values, freq, **({"stamps": None, "column": name} | more))


def teacher_request(folder, cache, **changes):
    """TeacherRequest of a local teacher: the median of 5 samples at patch size 16, blocks of 8."""
    settings = {
        "teacher_model": str(folder),
        "teacher_revision": None,
        "teacher_patch_size": 16,
        "teacher_point": "median",
        "num_samples": 5,
        "teacher_batch_size": 8,
        "teacher_precision": "32",
        "quantiles": "off",
        "label_cache": str(cache),
    }
    assert not changes.keys() - settings.keys()
    return md.TeacherRequest(**(settings | changes))


def load_teacher(folder):
    """Teacher of a local folder, on the CPU."""
    return md.load_teacher(teacher_request(folder, "unused"), torch.device("cpu"), print)


def answering(forecast):
    """`forecast(teacher, context, horizon, patch_size)` as Teacher.answer; its quantiles are it."""

    def answer(teacher, context, asked):
        points = forecast(teacher, context, asked.horizon, asked.patch_size)
        quantiles = points[:, None].repeat(1, len(md.LEVELS), 1)
        return md.Answer(points, quantiles if asked.with_quantiles else None)

    return answer


def label_task(windows, request, load=None):
    """LabelTask of windows, judged on themselves beside the last value."""
    load = load or (lambda: load_teacher(request.teacher_model))
    return md.LabelTask(windows, windows, request, load, {"last value": md.last_value})


def save_module(folder, seed=0, **changes):
    """Save a MoiraiModule of random weights; returns the folder.

    It has all four mixture components of MOIRAI 1.1, and five patch sizes.
    """
    from uni2ts.distribution import (
        LogNormalOutput,
        MixtureOutput,
        NegativeBinomialOutput,
        NormalFixedScaleOutput,
        StudentTOutput,
    )
    from uni2ts.model.moirai.module import MoiraiModule

    components = [
        StudentTOutput(),
        NormalFixedScaleOutput(),
        NegativeBinomialOutput(),
        LogNormalOutput(),
    ]
    settings = {
        "d_model": 64,
        "num_layers": 1,
        "patch_sizes": (8, 16, 32, 64, 128),
        "max_seq_len": 512,
    }
    settings |= {
        "distr_output": MixtureOutput(components),
        "attn_dropout_p": 0.0,
        "dropout_p": 0.0,
    } | changes
    torch.manual_seed(seed)
    MoiraiModule(**settings).save_pretrained(folder)
    return Path(folder)


def save_generation(folder, kind, seed=0, **changes):
    """Save a MOIRAI-MoE ("moe") or a MOIRAI 2.0 ("2.0") of random weights; returns the folder."""
    from uni2ts.distribution import MixtureOutput, NormalOutput, StudentTOutput
    from uni2ts.model.moirai2 import Moirai2Module
    from uni2ts.model.moirai_moe import MoiraiMoEModule

    settings = {
        "d_model": 64,
        "d_ff": 128,
        "num_layers": 1,
        "max_seq_len": 64,
        "attn_dropout_p": 0.3,
        "dropout_p": 0.1,
    }
    settings |= {"moe": {"patch_sizes": (16,)}, "2.0": {"patch_size": 16, "num_predict_token": 2}}[
        kind
    ]
    settings |= (
        {"distr_output": MixtureOutput([StudentTOutput(), NormalOutput()])} if kind == "moe" else {}
    )
    torch.manual_seed(seed)
    module = {"moe": MoiraiMoEModule, "2.0": Moirai2Module}[kind](**(settings | changes))
    if kind == "moe":
        module.encoder.centroid.normal_()  # uni2ts leaves the router of experts uninitialised
    module.save_pretrained(folder)
    return Path(folder)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """Folder of a random MOIRAI of 0.2M weights."""
    return save_module(tmp_path_factory.mktemp("teacher") / "tiny")


def write_hourly(folder, count):
    """A new folder of `count` hourly CSVs of 300 rows."""
    folder.mkdir()
    for number in range(count):
        hourly(300, seed=number).to_csv(folder / f"s{number:02d}.csv", index=False)
    return folder


@pytest.fixture
def csv_folder(tmp_path):
    """Folder of 12 hourly CSVs of 300 rows."""
    return write_hourly(tmp_path / "data", 12)


@pytest.fixture
def few_csvs(tmp_path):
    """Folder of 6 hourly CSVs of 300 rows: the fewer files a run reads, the sooner it is over."""
    return write_hourly(tmp_path / "data", 6)


@pytest.fixture(scope="session")
def trained(teacher_folder, tmp_path_factory):
    """Folder with data (12 hourly CSVs), a distilled run, its alpha-0 twin, and the label cache."""
    root = tmp_path_factory.mktemp("trained")
    write_hourly(root / "data", 12)
    flags = [*SMALL.split(), *SMALL_RUN.split()]
    flags += ["--data_dir", str(root / "data"), "--label_cache", str(root / "labels")]
    flags += ["--teacher_model", str(teacher_folder)]
    for name, alpha in (("distilled", "0.5"), ("twin", "0")):
        own = ["--save_dir", str(root / name), "--alpha", alpha]
        assert md.main(flags + own) == 0
    return root


MODULES = """
import contextlib, json, sys
import moirai_distill

with contextlib.suppress(SystemExit):  # --help ends like this
    moirai_distill.main(json.loads(sys.argv[1]))
print(json.dumps(sorted(sys.modules)))
"""


def modules_after(*words):
    """Names of all modules that a process has after a command."""
    done = subprocess.run(
        [sys.executable, "-c", MODULES, json.dumps(list(map(str, words)))],
        cwd=SCRIPT.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))
