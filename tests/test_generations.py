"""MOIRAI-MoE and 2.0 as teachers: told apart by their config, equal to uni2ts's own forecast, aligned, cached."""

import json

import numpy as np
import pytest
import torch
from conftest import save_generation, save_module
from test_teacher import LENGTHS, Small, assert_aligned, cycle, cycle_labels, label, load, standardised, walks
from uni2ts.distribution import NormalFixedScaleOutput
from uni2ts.model.moirai2 import Moirai2Forecast, Moirai2Module
from uni2ts.model.moirai_moe import MoiraiMoEForecast, MoiraiMoEModule

import moirai_distill as md

KINDS = ["moe", "2.0"]
MODULES = {"moe": MoiraiMoEModule, "2.0": Moirai2Module}
SHAPES = [(64, 16), (53, 21), (80, 70)]  # one token ahead, left padding, more tokens than are predicted at once


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> folder of a random teacher of each generation."""
    root = tmp_path_factory.mktemp("generations")
    return {"1.x": save_module(root / "one")} | {kind: save_generation(root / kind, kind) for kind in KINDS}


def own_forecast(kind, module, context, horizon, samples=100):
    """What uni2ts's own forecast class gives for contexts (B, L): samples (B, samples, H), or quantiles (B, 9, H)."""
    settings = {"prediction_length": horizon, "context_length": context.shape[1], "target_dim": 1, "module": module}
    settings |= {"feat_dynamic_real_dim": 0, "past_feat_dynamic_real_dim": 0}
    own = MoiraiMoEForecast(**settings, num_samples=samples) if kind == "moe" else Moirai2Forecast(**settings)
    with torch.inference_mode():
        return own.eval()(
            context[..., None], torch.ones_like(context)[..., None].bool(), torch.zeros_like(context).bool()
        )


@pytest.mark.parametrize(("length", "horizon"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_forecast_equals_the_one_of_uni2ts_to_the_bit(folders, kind, length, horizon):
    module = MODULES[kind].from_pretrained(folders[kind]).eval()
    for part in module.modules():
        if hasattr(part, "attn_dropout_p"):
            part.attn_dropout_p = 0.0
    context, mean, deviation = standardised(walks(5, length))
    torch.manual_seed(3)
    own = own_forecast(kind, module, context, horizon)
    own = own.median(1).values if kind == "moe" else own[:, 4]
    assert own.shape == (5, horizon) and own.std() > 0.01
    teacher = load(folders[kind])
    torch.manual_seed(3)
    mine = teacher.forecast(walks(5, length), horizon, 16, "median", 100)
    assert torch.equal(mine, (own.double() * deviation + mean).float())


def trained_on_the_cycle(kind, folder):
    """Save a teacher of `kind` that knows the noiseless CYCLE: each token was trained to tell those after it."""
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_ff": 128, "num_layers": 1, "max_seq_len": 16, "attn_dropout_p": 0.0, "dropout_p": 0.0}
    own = (
        {"distr_output": NormalFixedScaleOutput(scale=0.3), "patch_sizes": (16,)}
        if kind == "moe"
        else {"patch_size": 16}
    )
    module = MODULES[kind](**sizes, **own)
    if kind == "moe":
        module.encoder.centroid.normal_()
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=100)
    for step in range(100):
        target = torch.from_numpy(cycle(24, 96)).float().unflatten(1, (6, 16))
        seen, one = torch.ones_like(target).bool(), torch.ones(24, 6).long()
        if step % 2:  # the first token begins with padding, as where 16 does not divide the context
            target[:, 0, :11], seen[:, 0, :11] = 0.0, False
        inputs = (target, seen, one, torch.arange(6).expand(24, -1), 0 * one, torch.zeros(24, 6).bool())
        if kind == "moe":
            loss = -module(*inputs, 16 * one).log_prob(target.roll(-1, 1))[:, :-1].mean()
        else:
            ahead, scaled = module(*inputs)
            ahead = ahead.unflatten(-1, (1, 9, 16))[:, :-1, 0]
            loss = ((ahead - scaled[:, 1:, None]) ** 2).mean()  # all quantiles at the point: there is no noise
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    module.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_step_1_is_the_step_after_the_context(kind, tmp_path):
    folder = trained_on_the_cycle(kind, tmp_path / "cycle")
    for length, horizon in LENGTHS:
        series = 1000 + 50 * cycle(24, length + horizon)
        forecast = load(folder).forecast(torch.from_numpy(series[:, :length]), horizon, 16, "median", 50)
        assert_aligned((forecast.numpy() - 1000) / 50, (series[:, length:] - 1000) / 50)
    labels, truth = cycle_labels(folder, tmp_path, *LENGTHS[1], "auto", md.Windows, "median")
    assert_aligned(labels, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_forecast_moves_with_scale_and_shift_and_of_a_constant_is_the_constant(folders, kind):
    teacher, context = load(folders[kind]), walks(4, 60)
    moved, constant = 1e-4 * (context + 1e3), torch.full((1, 60), 3.3).double()
    results = []
    for part in (torch.cat([context, constant]), torch.cat([moved, constant])):
        torch.manual_seed(0)
        results.append(teacher.forecast(part, 40, 16, "median", 20).double())
    plain, moved = results
    assert torch.equal(plain[4:], torch.full((1, 40), 3.3).double().float().double()) and plain[:4].std(1).min() > 0
    assert ((moved[:4] / 1e-4 - 1e3 - plain[:4]) / context.std(1, keepdim=True)).abs().max() < 1e-2


def test_2_0_forecasts_without_chance_and_one_window_as_many(folders):
    teacher, context = load(folders["2.0"]), walks(6, 64)
    whole = teacher.forecast(context, 40, 16, "median", 1)
    parts = torch.cat([teacher.forecast(part, 40, 16, "median", 100) for part in context.split(2)])
    assert torch.allclose(whole, parts, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_out_of_memory_halves_the_call(folders, kind):
    teacher, notes, context = load(folders[kind]), [], walks(11, 64)
    small = Small(teacher.module, "cpu", "32", notes.append, teacher.whole)
    forecast = small.forecast(context, 16, 16, "median", 20)
    assert forecast.shape == (11, 16) and forecast.isfinite().all()
    assert notes[0] == "out of GPU memory: the teacher goes on with 5 windows a call"
    if kind == "2.0":
        assert torch.allclose(forecast, teacher.forecast(context, 16, 16, "median", 20), rtol=1e-4)


def test_moe_takes_so_few_windows_a_call_that_its_samples_fit(folders, monkeypatch):
    teacher, seen, own = load(folders["moe"]), [], md.Teacher.whole_forecast
    monkeypatch.setattr(md.Teacher, "whole_forecast", lambda self, x, *more: seen.append(len(x)) or own(self, x, *more))
    teacher.forecast(walks(9, 64), 16, 16, "median", 500)
    assert seen == [4, 4, 1]  # 2,048 sequences at most


def test_each_generation_has_its_own_labels_in_one_cache(folders, csv_folder, tmp_path, capsys):
    labels = {}
    for kind, folder in folders.items():
        assert label(folder, csv_folder, tmp_path, "--teacher_point", "median", "--num_samples", "10") == 0
        out = capsys.readouterr().out
        assert "Label cache hit" not in out
        place = out.rsplit("windows: ", 1)[1].strip()
        labels[kind] = np.fromfile(f"{place}/labels.bin", "<f4")
        assert label(folder, csv_folder, tmp_path, "--teacher_point", "median", "--num_samples", "10") == 0
        assert f"Label cache hit, no teacher call: {place}" in capsys.readouterr().out
    assert len([*(tmp_path / "cache").iterdir()]) == 3
    assert all(np.isfinite(array[: 10 * 2 * 16]).all() for array in labels.values())
    assert not np.array_equal(labels["moe"], labels["2.0"]) and not np.array_equal(labels["1.x"], labels["2.0"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_generation_cannot_do_is_one_clear_line(folders, csv_folder, tmp_path, capsys, kind):
    folder = folders[kind]
    assert label(folder, csv_folder, tmp_path) == 2  # the mean
    assert "error: --teacher_point mean: only for a MOIRAI 1.0 or 1.1; use median" in capsys.readouterr().err
    assert label(folder, csv_folder, tmp_path, "--teacher_point", "median", "--teacher_patch_size", "32") == 2
    assert "error: --teacher_patch_size 32: with these lengths the teacher takes [16]" in capsys.readouterr().err
    assert load(folder).patch_sizes(1000, 16) == [16]  # 63 + 1 tokens are as many as it takes
    assert load(folder).patch_sizes(1009, 16) == []
    short = save_generation(tmp_path / "short", kind, max_seq_len=4)
    assert label(short, csv_folder, tmp_path, "--teacher_point", "median") == 2  # 4 + 1
    assert "error: --teacher_patch_size auto: with these lengths the teacher takes none" in capsys.readouterr().err


def test_bf16_is_refused_for_moe_before_anything_is_labelled(folders):
    with pytest.raises(md.UserError, match="--teacher_precision bf16: not for a MOIRAI-MoE"):
        md.load_teacher(str(folders["moe"]), None, "cpu", "bf16", print)
    assert md.load_teacher(str(folders["2.0"]), None, "cpu", "bf16", print).precision == "bf16"


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_read_from_the_config_not_from_the_name(kind, tmp_path):
    folder = save_generation(tmp_path / "moirai-1.1-R-base", kind)
    assert type(load(folder).module).__name__ == {"moe": "MoiraiMoEModule", "2.0": "Moirai2Module"}[kind]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != "max_seq_len"})
    )
    with pytest.raises(md.UserError, match="another kind of model, not a MOIRAI"):
        load(folder)


def test_2_0_without_a_middle_quantile_is_refused(tmp_path):
    folder = save_generation(tmp_path / "odd", "2.0", quantile_levels=(0.1, 0.9))
    with pytest.raises(md.UserError, match="quantile_levels without 0.5"):
        load(folder)
