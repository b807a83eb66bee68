"""The teacher that is shipped: small, all patch sizes trained, better than naive on new series."""

import json

import numpy as np
import pytest
import torch
from conftest import DEMO_TEACHER, data_config, load_teacher, read_config

import moirai_distill as md


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """Windows of eight series of the demo family, every 40th."""
    folder = tmp_path_factory.mktemp("demo")
    md.write_demo_csvs(folder, files=8, rows=1200)
    config = data_config(context_length=720, prediction_length=96)
    chosen = []
    for path in sorted(folder.iterdir()):
        (series,) = md.read_series(path, path.name, read_config()).series
        prepared = md.prepare_series(series, {"whole": (0, 1200)}, config)
        chosen.append((prepared, prepared.starts["whole"][::40]))
    return md.make_windows(chosen, config)


def test_it_is_a_moirai_of_at_most_4_mb_with_its_card():
    config = json.loads((DEMO_TEACHER / "config.json").read_text())
    assert md.find_generation("the demo teacher", config).package == "moirai"
    assert {8, 16, 32} <= set(config["patch_sizes"])
    assert (DEMO_TEACHER / "model.safetensors").stat().st_size <= 4_000_000
    assert "license: mit" in (DEMO_TEACHER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("patch", [8, 16, 32])
@pytest.mark.parametrize("point", ["mean", "median"])
def test_every_patch_size_halves_the_error_of_seasonal_naive(windows, patch, point):
    index = np.arange(len(windows))
    context, truth, _ = windows.batch(index)
    teacher = load_teacher(DEMO_TEACHER)
    torch.manual_seed(0)
    forecast = teacher.forecast(context, 96, patch, point, 50)
    naive = md.seasonal_naive(context, windows.season(index), 96)
    error = (forecast - truth).square().mean()
    assert error < 0.5 * (naive - truth).square().mean()
