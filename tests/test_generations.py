"""MOIRAI-MoE and 2.0 as teachers: told apart, equal to uni2ts's own forecast, aligned, cached."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    SMALL,
    SMALL_RUN,
    load_teacher,
    save_generation,
    save_module,
    teacher_request,
)
from test_teacher import (
    LENGTHS,
    Small,
    assert_aligned,
    cycle,
    cycle_labels,
    label,
    standardised,
    walks,
)
from uni2ts.distribution import NormalFixedScaleOutput
from uni2ts.model.moirai2 import Moirai2Forecast, Moirai2Module
from uni2ts.model.moirai_moe import MoiraiMoEForecast, MoiraiMoEModule

import moirai_distill as md

KINDS = ["moe", "2.0"]
MODULES = {"moe": MoiraiMoEModule, "2.0": Moirai2Module}
# One token ahead; left padding; more tokens than are predicted at once.
SHAPES = [(64, 16), (53, 21), (80, 70)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> folder of a random teacher of each generation."""
    root = tmp_path_factory.mktemp("generations")
    folders = {"1.x": save_module(root / "one")}
    for kind in KINDS:
        folders[kind] = save_generation(root / kind, kind)
    return folders


def own_forecast(kind, module, context, horizon, samples):
    """What uni2ts's own forecast class gives for contexts (B, L).

    Samples (B, samples, H) of a MoE, quantiles (B, 9, H) of a 2.0.
    """
    settings = {
        "prediction_length": horizon,
        "context_length": context.shape[1],
        "target_dim": 1,
        "module": module,
        "feat_dynamic_real_dim": 0,
        "past_feat_dynamic_real_dim": 0,
    }
    if kind == "moe":
        own = MoiraiMoEForecast(**settings, num_samples=samples)
    else:
        own = Moirai2Forecast(**settings)
    values = context[..., None]
    is_seen = torch.ones_like(values).bool()
    is_padding = torch.zeros_like(context).bool()
    with torch.inference_mode():
        return own.eval()(values, is_seen, is_padding)


@pytest.mark.parametrize(("length", "horizon"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_forecast_equals_the_one_of_uni2ts_to_the_bit(folders, kind, length, horizon):
    module = MODULES[kind].from_pretrained(folders[kind]).eval()
    for part in module.modules():
        if hasattr(part, "attn_dropout_p"):
            part.attn_dropout_p = 0.0
    context, mean, deviation = standardised(walks(5, length))
    torch.manual_seed(3)
    own = own_forecast(kind, module, context, horizon, samples=100)
    # Of 100 samples, the middle two are the 50th and the 51st.
    own = own.sort(1).values[:, 49:51].mean(1) if kind == "moe" else own[:, 4]
    assert own.shape == (5, horizon) and own.std() > 0.01
    teacher = load_teacher(folders[kind])
    torch.manual_seed(3)
    mine = teacher.forecast(walks(5, length), horizon, 16, "median", 100)
    assert torch.equal(mine, (own.double() * deviation + mean).float())


def new_module(kind):
    """A random module of `kind` that can learn the CYCLE."""
    torch.manual_seed(0)
    sizes = {
        "d_model": 64,
        "d_ff": 128,
        "num_layers": 1,
        "max_seq_len": 16,
        "attn_dropout_p": 0.0,
        "dropout_p": 0.0,
    }
    if kind == "2.0":
        return Moirai2Module(**sizes, patch_size=16)
    module = MoiraiMoEModule(
        **sizes, distr_output=NormalFixedScaleOutput(scale=0.3), patch_sizes=(16,)
    )
    module.encoder.centroid.normal_()  # uni2ts leaves it uninitialised
    return module


def loss_of_next_tokens(kind, module, values, observed):
    """Loss of a module that tells from each token (B, N, 16) the one after it."""
    ones = torch.ones(values.shape[:2]).long()
    time_id = torch.arange(values.shape[1]).expand(len(values), -1)
    nothing_hidden = torch.zeros(values.shape[:2]).bool()
    inputs = (values, observed, ones, time_id, 0 * ones, nothing_hidden)
    if kind == "moe":
        return -module(*inputs, 16 * ones).log_prob(values.roll(-1, 1))[:, :-1].mean()
    ahead, scaled = module(*inputs)
    ahead = ahead.unflatten(-1, (1, 9, 16))[:, :-1, 0]
    # All quantiles at the point: there is no noise.
    return ((ahead - scaled[:, 1:, None]) ** 2).mean()


def trained_on_the_cycle(kind, folder):
    """Save a teacher of `kind` that knows the noiseless CYCLE; returns the folder."""
    module = new_module(kind)
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=100)
    for step in range(100):
        values = torch.from_numpy(cycle(24, 96)).float().unflatten(1, (6, 16))
        observed = torch.ones_like(values).bool()
        if step % 2:  # the first token begins with padding, as where 16 does not divide the context
            values[:, 0, :11] = 0.0
            observed[:, 0, :11] = False
        loss = loss_of_next_tokens(kind, module, values, observed)
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
    teacher = load_teacher(folder)
    for length, horizon in LENGTHS:
        series = 1000 + 50 * cycle(24, length + horizon)
        context = torch.from_numpy(series[:, :length])
        forecast = teacher.forecast(context, horizon, 16, "median", 50).numpy()
        assert_aligned((forecast - 1000) / 50, (series[:, length:] - 1000) / 50)
    labels, truth = cycle_labels(folder, tmp_path, *LENGTHS[1], "auto", md.Windows, "median")
    assert_aligned(labels, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_forecast_moves_with_scale_and_shift_and_of_a_constant_is_the_constant(folders, kind):
    teacher = load_teacher(folders[kind])
    context = walks(4, 60)
    constant = torch.full((1, 60), 3.3).double()
    results = []
    for moving in (context, 1e-4 * (context + 1e3)):
        torch.manual_seed(0)
        both = torch.cat([moving, constant])
        results.append(teacher.forecast(both, 40, 16, "median", 20).double())
    plain, moved = results
    for forecast in results:
        assert torch.equal(forecast[4:], torch.full((1, 40), 3.3).double())
    assert plain[:4].std(1).min() > 0
    difference = moved[:4] / 1e-4 - 1e3 - plain[:4]
    assert (difference / context.std(1, keepdim=True)).abs().max() < 1e-2


def test_2_0_forecasts_without_chance_and_one_window_as_many(folders):
    teacher = load_teacher(folders["2.0"])
    context = walks(6, 64)
    whole = teacher.forecast(context, 40, 16, "median", 1)
    parts = [teacher.forecast(part, 40, 16, "median", 100) for part in context.split(2)]
    assert torch.allclose(whole, torch.cat(parts), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_out_of_memory_halves_the_call(folders, kind):
    teacher = load_teacher(folders[kind])
    notes = []

    def note(sentence, *values):
        notes.append(sentence.format(*values))

    small = Small(teacher.module, "cpu", "32", note, teacher.forecast_class)
    context = walks(11, 64)
    forecast = small.forecast(context, 16, 16, "median", 20)
    assert forecast.shape == (11, 16) and forecast.isfinite().all()
    assert notes[0] == "out of GPU memory: the teacher goes on with 5 windows a call"
    if kind == "2.0":
        whole = teacher.forecast(context, 16, 16, "median", 20)
        assert torch.allclose(forecast, whole, rtol=1e-4)


def test_moe_takes_so_few_windows_a_call_that_its_samples_fit(folders, monkeypatch):
    seen = []
    forecast_whole = md.Teacher.forecast_whole

    def watched(teacher, context, *more):
        seen.append(len(context))
        return forecast_whole(teacher, context, *more)

    monkeypatch.setattr(md.Teacher, "forecast_whole", watched)
    monkeypatch.setattr(md, "MOE_SEQUENCES", 205)
    load_teacher(folders["moe"]).forecast(walks(9, 64), 16, 16, "median", 50)
    assert seen == [4, 4, 1]


def test_each_generation_has_its_own_labels_in_one_cache(folders, few_csvs, tmp_path, capsys):
    asked = ["--teacher_point", "median", "--num_samples", "10"]
    labels = {}
    for kind, folder in folders.items():
        assert label(folder, few_csvs, tmp_path, *asked) == 0
        out = capsys.readouterr().out
        assert "Label cache hit" not in out
        place = out.rsplit("windows: ", 1)[1].strip()
        labels[kind] = np.fromfile(f"{place}/labels.bin", "<f4")[: 10 * 2 * 16]
        assert label(folder, few_csvs, tmp_path, *asked) == 0
        assert f"Label cache hit, no teacher call: {place}" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert all(np.isfinite(values).all() for values in labels.values())
    assert not np.array_equal(labels["moe"], labels["2.0"])
    assert not np.array_equal(labels["1.x"], labels["2.0"])


def test_labels_of_2_0_are_used_whatever_num_samples_is(folders, few_csvs, tmp_path, capsys):
    """It gives its quantiles; the others' median is one of samples."""
    asked = ["--teacher_point", "median", "--num_samples"]
    for kind, is_hit in (("2.0", True), ("1.x", False)):
        assert label(folders[kind], few_csvs, tmp_path, *asked, "10") == 0
        capsys.readouterr()
        assert label(folders[kind], few_csvs, tmp_path, *asked, "7") == 0
        assert ("Label cache hit" in capsys.readouterr().out) == is_hit


def test_a_run_on_labels_of_2_0_with_other_num_samples_is_resumed(folders, few_csvs, tmp_path):
    asked = ["--teacher_point", "median", "--num_samples"]
    assert label(folders["2.0"], few_csvs, tmp_path, *asked, "7") == 0
    words = ["train", *SMALL.split(), *SMALL_RUN.split(), "--alpha", "0.5", *asked, "10"]
    words += ["--data_dir", str(few_csvs), "--label_cache", str(tmp_path / "cache")]
    words += ["--teacher_model", str(folders["2.0"]), "--save_dir", str(tmp_path / "run")]
    words += ["--num_epochs"]
    assert md.main([*words, "1"]) == 0
    assert md.main([*words, "2", "--resume"]) == 0
    assert md.read_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_generation_cannot_do_is_one_clear_line(folders, few_csvs, tmp_path, capsys, kind):
    def refusal(folder, *more):
        """Last line that a refused labelling prints."""
        assert label(folder, few_csvs, tmp_path, *more) == 2
        return capsys.readouterr().err.splitlines()[-1]

    folder = folders[kind]
    median = ["--teacher_point", "median"]
    line = refusal(folder, "--teacher_point", "mean")
    assert line == "error: --teacher_point mean: only for a MOIRAI 1.0 or 1.1; use median"
    line = refusal(folder, *median, "--teacher_patch_size", "32")
    assert line == "error: --teacher_patch_size 32: with these lengths the teacher takes [16]"

    teacher = load_teacher(folder)
    assert teacher.patch_sizes(1000, 16) == [16]  # 63 + 1 tokens are as many as it takes
    assert teacher.patch_sizes(1009, 16) == []
    short = save_generation(tmp_path / "short", kind, max_seq_len=4)
    line = refusal(short, *median)  # 4 + 1
    assert line == "error: --teacher_patch_size auto: with these lengths the teacher takes none"


def test_bf16_is_refused_for_moe_before_anything_is_labelled(folders, monkeypatch):
    """On a GPU; it need not be there, as nothing is put on it here."""
    monkeypatch.setattr(md, "Teacher", lambda _module, _device, precision, *_more: precision)
    request = {}
    for kind, folder in folders.items():
        request[kind] = teacher_request(folder, "unused", teacher_precision="bf16")
    gpu = torch.device("cuda")
    with pytest.raises(md.UserError, match="--teacher_precision bf16: not for a MOIRAI-MoE"):
        md.load_teacher(request["moe"], gpu, print)
    assert md.load_teacher(request["2.0"], gpu, print) == "bf16"
    assert md.load_teacher(request["1.x"], gpu, print) == "bf16"


def test_without_a_gpu_every_generation_runs_in_float32(folders):
    for folder in folders.values():
        request = teacher_request(folder, "unused", teacher_precision="bf16")
        assert md.load_teacher(request, torch.device("cpu"), print).precision == "32"


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_read_from_the_config_not_from_the_name(kind, tmp_path):
    folder = save_generation(tmp_path / "moirai-1.1-R-base", kind)
    assert type(load_teacher(folder).module) is MODULES[kind]
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["max_seq_len"]
    path.write_text(json.dumps(config))
    with pytest.raises(md.UserError, match="another kind of model, not a MOIRAI"):
        load_teacher(folder)


def test_2_0_without_a_middle_quantile_is_refused(tmp_path):
    folder = save_generation(tmp_path / "odd", "2.0", quantile_levels=(0.1, 0.9))
    with pytest.raises(md.UserError, match="quantile_levels without 0.5"):
        load_teacher(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["1.x", *KINDS])
def test_weights_that_are_not_finite_are_refused_in_one_line(folders, tmp_path, kind, value):
    """A MOIRAI-MoE would fail deep inside the choice of its experts."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders[kind], tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[len(weights) // 2]
    weights[name].view(-1)[-1] = value
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(md.UserError) as caught:
        load_teacher(folder)
    assert str(folder) in str(caught.value)
    assert "its weights are not finite" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
