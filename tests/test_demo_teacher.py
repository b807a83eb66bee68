"""The teacher that is shipped: small, with all its patch sizes trained, better than naive on series it never saw."""

import json

import numpy as np
import pytest
import torch
from conftest import DEMO_TEACHER

import moirai_distill as md


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """Windows of eight series of the demo family, every 40th."""
    folder = tmp_path_factory.mktemp("demo")
    md.write_demo_csvs(folder, files=8, rows=1200)
    chosen = []
    for path in sorted(folder.iterdir()):
        ((series,), _) = md.read_series(path, path.name, ["first"])
        item = md.prepare(series, {"whole": (0, 1200)}, 816, 96, 16)
        chosen.append((item, item.starts["whole"][::40]))
    return md.pack(chosen, "auto", 816, 96)


def test_it_is_a_moirai_of_at_most_4_mb_with_its_card():
    config = json.loads((DEMO_TEACHER / "config.json").read_text())
    assert config.keys() >= md.GENERATIONS["moirai"][1] and {8, 16, 32} <= {*config["patch_sizes"]}
    assert (DEMO_TEACHER / "model.safetensors").stat().st_size <= 4_000_000
    assert "license: mit" in (DEMO_TEACHER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("patch", [8, 16, 32])
@pytest.mark.parametrize("point", ["mean", "median"])
def test_every_patch_size_halves_the_error_of_seasonal_naive(windows, patch, point):
    index = np.arange(len(windows))
    context, target, _ = windows.batch(index)
    teacher = md.load_teacher(str(DEMO_TEACHER), None, "cpu", "32", print)
    torch.manual_seed(0)
    error = (teacher.forecast(context, 96, patch, point, 50) - target).square().mean()
    naive = (md.seasonal_naive(context, windows.season(index), 96) - target).square().mean()
    assert error < 0.5 * naive
