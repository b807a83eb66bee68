"""What the tests share: small synthetic CSVs, and real MoiraiModules with few random weights."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch, and for child processes, which must give the same bits as this one

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

torch.set_num_threads(1)

SCRIPT = Path(__file__).resolve().parent.parent / "moirai_distill.py"
DEMO_TEACHER = SCRIPT.parent / "checkpoints" / "demo_teacher"
# A run of seconds: context 64, horizon 16, a student of a few thousand weights.
SMALL = "--context_length 64 --prediction_length 16 --d_model 16 --num_layers 1 --num_heads 2 --patch_size 8"
SMALL += " --device cpu"


def hourly(rows, seed=0, start="2024-01-01"):
    """A frame (date, value) of a noisy daily cycle."""
    rng = np.random.default_rng(seed)
    value = np.sin(2 * np.pi * np.arange(rows) / 24 + seed) + 0.1 * rng.standard_normal(rows) + 5
    return pd.DataFrame({"date": pd.date_range(start, periods=rows, freq="h"), "value": value})


def save_module(folder, seed=0, **changes):
    """Save a MoiraiModule with random weights, all four mixture components and five patch sizes; returns the folder."""
    from uni2ts.distribution import (
        LogNormalOutput,
        MixtureOutput,
        NegativeBinomialOutput,
        NormalFixedScaleOutput,
        StudentTOutput,
    )
    from uni2ts.model.moirai.module import MoiraiModule

    components = [StudentTOutput(), NormalFixedScaleOutput(), NegativeBinomialOutput(), LogNormalOutput()]
    settings = {"d_model": 64, "num_layers": 1, "patch_sizes": (8, 16, 32, 64, 128), "max_seq_len": 512}
    settings |= {"distr_output": MixtureOutput(components), "attn_dropout_p": 0.0, "dropout_p": 0.0} | changes
    torch.manual_seed(seed)
    MoiraiModule(**settings).save_pretrained(folder)
    return Path(folder)


def save_generation(folder, kind, seed=0, **changes):
    """Save a MOIRAI-MoE ("moe") or a MOIRAI 2.0 ("2.0") with few random weights; returns the folder."""
    from uni2ts.distribution import MixtureOutput, NormalOutput, StudentTOutput
    from uni2ts.model.moirai2 import Moirai2Module
    from uni2ts.model.moirai_moe import MoiraiMoEModule

    settings = {"d_model": 64, "d_ff": 128, "num_layers": 1, "max_seq_len": 64, "attn_dropout_p": 0.3, "dropout_p": 0.1}
    settings |= {"moe": {"patch_sizes": (16,)}, "2.0": {"patch_size": 16, "num_predict_token": 2}}[kind]
    settings |= {"distr_output": MixtureOutput([StudentTOutput(), NormalOutput()])} if kind == "moe" else {}
    torch.manual_seed(seed)
    module = {"moe": MoiraiMoEModule, "2.0": Moirai2Module}[kind](**(settings | changes))
    if kind == "moe":
        module.encoder.centroid.normal_()  # uni2ts leaves what routes tokens to experts uninitialised
    module.save_pretrained(folder)
    return Path(folder)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """Folder of a random MOIRAI of 0.2M weights."""
    return save_module(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture
def csv_folder(tmp_path):
    """Folder of 12 hourly CSVs of 300 rows."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(12):
        hourly(300, seed=number).to_csv(folder / f"s{number:02d}.csv", index=False)
    return folder


@pytest.fixture(scope="session")
def trained(teacher_folder, tmp_path_factory):
    """Folder with data (12 hourly CSVs), a distilled run, its alpha-0 twin, and the label cache."""
    from moirai_distill import main

    root = tmp_path_factory.mktemp("trained")
    (root / "data").mkdir()
    for number in range(12):
        hourly(300, seed=number).to_csv(root / "data" / f"s{number:02d}.csv", index=False)
    teacher = (
        f"--teacher_patch_size auto --num_samples 5 --teacher_model {teacher_folder} --label_cache {root / 'labels'}"
    )
    for name, alpha in (("distilled", 0.5), ("twin", 0)):
        flags = f"{SMALL} --num_epochs 2 --max_windows 10 --learning_rate 1e-3 --lang en --alpha {alpha} {teacher}"
        assert main(["--data_dir", str(root / "data"), "--save_dir", str(root / name), *flags.split()]) == 0
    return root
