"""The teacher: alignment, equality with uni2ts's own forecast, scales, memory, and what is refused."""

import copy
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import save_module
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric import Fabric
from safetensors.torch import load_file, save_file

import moirai_distill as md

SIZES = (8, 16, 32, 64, 128)
CYCLE = np.random.default_rng(3).standard_normal(24)  # one day without any smoothness: a shift by one step is far off
CYCLE = (CYCLE - CYCLE.mean()) / CYCLE.std()
LENGTHS = [(48, 16), (53, 21)]  # the second is a multiple of no patch size


def uni2ts_forecast(module, context_length, horizon, patch):
    """uni2ts's own forecaster of one variate."""
    from uni2ts.model.moirai.forecast import MoiraiForecast

    lengths = {"context_length": context_length, "prediction_length": horizon, "patch_size": patch}
    return MoiraiForecast(
        module=module, target_dim=1, feat_dynamic_real_dim=0, past_feat_dynamic_real_dim=0, **lengths
    ).eval()


def uni2ts_inputs(context):
    """What uni2ts's forecaster takes for contexts (B, L): values, observed, padded."""
    return context[..., None], torch.ones_like(context)[..., None].bool(), torch.zeros_like(context).bool()


def uni2ts_mean(module, context, horizon, patch):
    """Mean (B, H) of the distribution that uni2ts's own forecaster predicts for contexts (B, L)."""
    own = uni2ts_forecast(module, context.shape[1], horizon, patch)
    with torch.inference_mode():
        return own._format_preds(patch, own._get_distr(patch, *uni2ts_inputs(context)).mean[None], 1)[:, 0]


def standardised(context):
    """Contexts (B, L) float64 in their own deviations as float32, with their means and deviations (B, 1)."""
    mean, deviation = context.mean(1, keepdim=True), context.std(1, keepdim=True, unbiased=False)
    return ((context - mean) / deviation).float(), mean, deviation


def walks(count, length, seed=0):
    """Random walks (count, length) float64 far from mean 0 and deviation 1."""
    return 40 + 7 * torch.randn(count, length, generator=torch.Generator().manual_seed(seed)).double().cumsum(1)


def load(folder, note=print):
    return md.load_teacher(str(folder), None, "cpu", "32", note)


def label(folder, data, tmp_path, *more):
    """Exit code of the command label with the teacher in `folder`."""
    flags = ["--teacher_model", str(folder), "--data_dir", str(data), "--label_cache", str(tmp_path / "cache")]
    lengths = ["--context_length", "64", "--prediction_length", "16", "--device", "cpu", "--lang", "en"]
    return md.main(["label", *flags, *lengths, "--teacher_point", "mean", "--max_windows", "2", *more])


@pytest.fixture(scope="module")
def random_teacher(teacher_folder):
    return load(teacher_folder)


@pytest.fixture(scope="module")
def cycle_folder(tmp_path_factory):
    """Folder of a MOIRAI that knows the noiseless CYCLE, trained by uni2ts's own loss on its own layout of windows."""
    from uni2ts.distribution import NormalFixedScaleOutput
    from uni2ts.model.moirai.module import MoiraiModule

    torch.manual_seed(0)
    sizes = {"d_model": 64, "num_layers": 1, "patch_sizes": (8, 16, 32), "max_seq_len": 64}
    module = MoiraiModule(NormalFixedScaleOutput(scale=0.3), **sizes, attn_dropout_p=0.0, dropout_p=0.0)
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=360)
    for step in range(360):
        (length, horizon), patch = LENGTHS[step % 2], (8, 16, 32)[step // 2 % 3]
        series = torch.from_numpy(cycle(24, length + horizon)).float()
        own = uni2ts_forecast(module, length, horizon, patch)
        loss = own._val_loss(patch, *uni2ts_inputs(series)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    folder = tmp_path_factory.mktemp("cycle") / "cycle"
    module.save_pretrained(folder)
    return folder


def cycle(count, length):
    """CYCLE from each of `count` hours on, (count, length)."""
    return CYCLE[(np.arange(count)[:, None] + np.arange(length)) % 24]


def assert_aligned(labels, truth):
    """The labels fit the truth step by step, and fit it badly one step earlier or later; both (W, H), deviation 1."""
    error = {shift: np.mean((labels[:, 1:-1] - np.roll(truth, shift, 1)[:, 1:-1]) ** 2) for shift in (-1, 0, 1)}
    assert error[0] < 0.5 and min(error[-1], error[1]) > 1.5, error


@pytest.mark.parametrize("patch", [8, 16, 32])
@pytest.mark.parametrize(("length", "horizon"), LENGTHS)
def test_forecast_step_1_is_the_step_after_the_context(cycle_folder, length, horizon, patch):
    series = 1000 + 50 * cycle(24, length + horizon)
    for point in ("mean", "median"):
        forecast = load(cycle_folder).forecast(torch.from_numpy(series[:, :length]), horizon, patch, point, 50)
        assert_aligned((forecast.numpy() - 1000) / 50, (series[:, length:] - 1000) / 50)


def cycle_labels(folder, tmp_path, length, horizon, patch, kind, point="mean"):
    """(labels, truth), both (W, H) numpy, of training windows of `kind` that the code which labels makes of CSVs."""
    (tmp_path / "csv").mkdir()
    for number in range(3):
        frame = {"date": pd.date_range("2024-01-01", periods=200, freq="h"), "v": 9 + 2 * cycle(24, 200)[7 * number]}
        pd.DataFrame(frame).to_csv(tmp_path / "csv" / f"{number}.csv", index=False)
    _, series, remarks = md.read_files(tmp_path / "csv", 0, ["first"], False)
    limits = {"length": length + horizon, "horizon": horizon, "max_gap": 0}
    windows = md.split_data(series, remarks, "files", (8, 1, 1), 0, 1, 40, "auto", limits)[0]["train"]
    windows = kind(**vars(windows))
    request = md.Request(str(folder), None, patch, point, 20)
    fabric, baselines = Fabric(accelerator="cpu", devices=1), {"last value": md.last_value}
    parts = (request, lambda: load(folder), tmp_path / "cache", 16, baselines, fabric, md.Say("en"), md.Stop())
    labels = md.get_labels(windows, *parts).batch(np.arange(len(windows)))[0]
    return labels.numpy(), md.Windows.batch(windows, np.arange(len(windows)))[1].numpy()


class Shifted(md.Windows):
    """Windows whose contexts end one step too early, as an off-by-one would make them."""

    def batch(self, index):
        context, target, observed = super().batch(index)
        return context.roll(1, 1), target, observed


@pytest.mark.parametrize("patch", [8, 32, "auto"])
@pytest.mark.parametrize(("length", "horizon"), LENGTHS)
def test_label_step_1_is_the_step_after_the_context(cycle_folder, tmp_path, length, horizon, patch):
    labels, truth = cycle_labels(cycle_folder, tmp_path, length, horizon, patch, md.Windows)
    assert len(labels) == 40
    assert_aligned(labels, truth)


def test_alignment_is_not_found_where_contexts_are_shifted_by_one_step(cycle_folder, tmp_path):
    labels, truth = cycle_labels(cycle_folder, tmp_path, *LENGTHS[0], 8, Shifted)
    with pytest.raises(AssertionError):
        assert_aligned(labels, truth)
    assert_aligned(labels[:, 1:], truth[:, :-1])


@pytest.mark.parametrize("patch", SIZES)
@pytest.mark.parametrize(("length", "horizon"), [(128, 32), (100, 21), (53, 128)])
def test_mean_equals_the_one_of_uni2ts_to_the_bit(random_teacher, length, horizon, patch):
    context, mean, deviation = standardised(walks(5, length))
    own = uni2ts_mean(random_teacher.module, context, horizon, patch)
    assert own.std() > 0.01 and own.shape == (5, horizon)
    mine = random_teacher.forecast(walks(5, length), horizon, patch, "mean", 1)
    assert torch.equal(mine, (own.double() * deviation + mean).float())


@pytest.mark.parametrize(("length", "horizon", "patch"), [(64, 16, 16), (50, 21, 8), (50, 21, 64)])
def test_median_is_a_median_of_the_samples_of_uni2ts(random_teacher, length, horizon, patch):
    context, mean, deviation = standardised(walks(2, length))
    torch.manual_seed(1)
    own = uni2ts_forecast(random_teacher.module, length, horizon, patch)
    with torch.inference_mode():
        samples = own(*uni2ts_inputs(context), num_samples=2000)  # (B, samples, H)
    torch.manual_seed(2)
    mine = (random_teacher.forecast(walks(2, length), horizon, patch, "median", 2000) - mean) / deviation
    slack = 1e-5 * (1 + mine.abs())[:, None]  # of the way there and back; the count component has steps
    below = (samples < mine[:, None] - slack).double().mean(1)
    up_to = (samples <= mine[:, None] + slack).double().mean(1)
    tolerance = 5 * math.sqrt(2 * 0.25 / 2000)  # five deviations of the rank of one sample's median in the other
    assert below.max() < 0.5 + tolerance and up_to.min() > 0.5 - tolerance


def test_attention_dropout_of_a_checkpoint_is_switched_off(tmp_path):
    folder = save_module(tmp_path / "dropout", attn_dropout_p=0.5)
    teacher, context = load(folder), walks(3, 64)
    first, second = (teacher.forecast(context, 16, 8, "mean", 1) for _ in range(2))
    assert torch.equal(first, second)
    from uni2ts.model.moirai.module import MoiraiModule

    module = MoiraiModule.from_pretrained(folder).eval()  # without our care it stays on
    assert not torch.equal(*(uni2ts_mean(module, context.float(), 16, 8) for _ in range(2)))


@pytest.mark.parametrize("point", ["mean", "median"])
def test_constant_contexts_are_forecast_as_their_constant(random_teacher, point):
    constants = torch.tensor([0.0, 0.1, -3.3, 1e-30, 1e12, 16777217.0], dtype=torch.float64)[:, None]
    moving = walks(1, 50)
    forecast = random_teacher.forecast(torch.cat([constants.expand(-1, 50), moving]), 20, 16, point, 20)
    assert torch.equal(forecast[:6], constants.float().expand(-1, 20))
    assert forecast[6].std() > 0
    if point == "mean":
        assert torch.allclose(forecast[6:], random_teacher.forecast(moving, 20, 16, point, 20))


@settings(deadline=None, max_examples=30)
@given(st.floats(-6, 6), st.floats(-10, 10), st.sampled_from([8, 32]), st.booleans())
def test_forecast_is_equivariant_to_scale_and_shift(random_teacher, exponent, offset, patch, negative_first):
    context, scale = walks(3, 60, seed=int(negative_first)), 10.0**exponent
    deviation = context.std(1, keepdim=True)
    plain = random_teacher.forecast(context, 20, patch, "mean", 1).double()
    moved = random_teacher.forecast(scale * (context + offset), 20, patch, "mean", 1).double()
    assert ((moved / scale - offset - plain).abs() / deviation).max() < 1e-3
    assert (plain - context.mean(1, keepdim=True)).abs().max() > 0.1  # not merely the mean


def test_patch_sizes_are_those_whose_tokens_fit(tmp_path):
    teacher = load(save_module(tmp_path / "short", max_seq_len=8))
    assert teacher.patch_sizes(64, 16) == [16, 32, 64, 128]  # 10, 5, 3, 2 and 2 tokens
    assert teacher.patch_sizes(96, 17) == [16, 32, 64, 128]  # 16 fits exactly: 6 + 2
    assert teacher.patch_sizes(97, 17) == [32, 64, 128]
    assert teacher.patch_sizes(897, 1) == []


def test_too_many_tokens_are_a_clear_error(tmp_path, csv_folder, capsys):
    folder = save_module(tmp_path / "short", max_seq_len=3)
    assert label(folder, csv_folder, tmp_path, "--teacher_patch_size", "8") == 2
    assert "--teacher_patch_size 8: with these lengths the teacher takes [32, 64, 128]" in capsys.readouterr().err
    assert label(folder, csv_folder, tmp_path) == 0
    judged = capsys.readouterr().out.partition("MSE on ")[2].splitlines()[0]
    assert "patch 32 " in judged and "patch 128 " in judged and "patch 8 " not in judged and "patch 16 " not in judged
    folder = save_module(tmp_path / "shorter", max_seq_len=1)
    assert label(folder, csv_folder, tmp_path) == 2
    assert "--teacher_patch_size auto: with these lengths the teacher takes none" in capsys.readouterr().err


def change_config(**changes):
    """A damage: keys of config.json changed; None removes one."""

    def damage(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return damage


def change_tensors(change):
    """A damage: the dict of tensors changed."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_config(content):
    return lambda folder: (folder / "config.json").write_bytes(content)


BERT = {"model_type": "bert", "hidden_size": 768, "architectures": ["BertModel"]}
WRONG = {
    "bert": (replace_config(json.dumps(BERT).encode()), "another kind of model, not a MOIRAI"),
    "list": (replace_config(b"[1, 2]"), "another kind of model"),
    "no json": (replace_config(b"<html>login</html>"), "config.json is not JSON"),
    "not utf-8": (replace_config(b"\xff\xfe{}"), "config.json is not JSON"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json in this folder"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors in this folder"),
    "truncated": (truncate, "model.safetensors is damaged or of another model"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
    "missing tensor": (change_tensors(lambda t: t.pop("mask_encoding.weight")), "mask_encoding.weight"),
    "extra tensor": (change_tensors(lambda t: t.update(spare=torch.ones(2))), "spare"),
    "wrong shape": (change_tensors(lambda t: t.update({"mask_encoding.weight": torch.ones(1, 3)})), "mask_encoding"),
    "unknown key": (change_config(d_other=3), "d_other"),
    "tiny width": (change_config(d_model=32), "damaged or of another model"),
    "no such class": (change_config(distr_output={"_target_": "uni2ts.distribution.normal.NoOutput"}), "another model"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_model_that_is_none_or_damaged_is_one_clear_line(teacher_folder, csv_folder, tmp_path, capsys, case):
    damage, expected = WRONG[case]
    folder = tmp_path / "teacher"
    folder.mkdir()
    for path in teacher_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    damage(folder)
    assert label(folder, csv_folder, tmp_path) == 2
    problems = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(problems) == 1 and str(folder) in problems[0] and expected in problems[0]


@pytest.mark.parametrize(
    "target", ["os.system", "uni2ts.distribution.mixture.torch.os.system", "uni2ts.distributionx.NormalOutput"]
)
@pytest.mark.parametrize("place", ["top", "nested", "elsewhere"])
def test_nothing_that_a_config_names_outside_the_distributions_is_executed(
    teacher_folder, csv_folder, tmp_path, capsys, target, place
):
    folder, marker = tmp_path / "teacher", tmp_path / "executed"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((teacher_folder / "model.safetensors").read_bytes())
    config = json.loads((teacher_folder / "config.json").read_text())
    call = {"_target_": target, "_args_": [f"touch {marker}"]}
    if place == "top":
        config["distr_output"] = call
    elif place == "nested":
        config["distr_output"]["components"].append(call)
    else:
        config["num_layers"] = call
    (folder / "config.json").write_text(json.dumps(config))
    assert label(folder, csv_folder, tmp_path) == 2
    assert not marker.exists()
    assert "config.json names a class outside uni2ts.distribution; refused" in capsys.readouterr().err


class Small(md.Teacher):
    """A teacher on a device that holds at most `room` windows."""

    room = 3

    def parameters_of(self, context, horizon, patch):
        if len(context) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return super().parameters_of(context, horizon, patch)

    def whole_forecast(self, context, horizon, samples):
        if len(context) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return super().whole_forecast(context, horizon, samples)


@pytest.mark.parametrize("point", ["mean", "median"])
def test_out_of_memory_halves_the_call_and_changes_nothing(random_teacher, point):
    notes, context = [], walks(11, 64)
    forecasts = []
    for teacher in (random_teacher, Small(random_teacher.module, "cpu", "32", notes.append)):
        torch.manual_seed(5)
        forecasts.append(teacher.forecast(context, 16, 16, point, 20))
    assert torch.allclose(*forecasts, rtol=1e-4)
    assert notes[0] == "out of GPU memory: the teacher goes on with 5 windows a call"
    assert all(note.startswith("out of GPU memory: ") for note in notes)


def test_not_even_one_window_in_memory_is_an_error(random_teacher, csv_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Small, "room", 0)
    monkeypatch.setattr(md, "load_teacher", lambda *_: Small(random_teacher.module, "cpu", "32", print))
    assert label("a/teacher", csv_folder, tmp_path) == 2
    assert "error: out of GPU memory" in capsys.readouterr().err


def test_the_teacher_is_frozen_and_in_eval_mode(random_teacher):
    assert not any(weight.requires_grad for weight in random_teacher.module.parameters())
    assert not any(part.training for part in random_teacher.module.modules())
    assert {weight.dtype for weight in random_teacher.module.parameters()} == {torch.float32}


def test_contexts_beyond_one_call_do_not_change_a_mean_forecast(random_teacher):
    context = walks(9, 64)
    whole = random_teacher.forecast(context, 16, 8, "mean", 1)
    parts = [random_teacher.forecast(part, 16, 8, "mean", 1) for part in context.split(2)]
    assert torch.allclose(whole, torch.cat(parts), rtol=1e-5)


def test_samples_are_those_of_the_predicted_mixture(random_teacher):
    """How many samples a component gives is drawn first: the quantiles are still those of uni2ts's own sampling."""
    parameters, loc, scale = random_teacher.parameters_of(walks(3, 64).float(), 16, 16)
    count = 20_000
    torch.manual_seed(1)
    median = random_teacher.points_of(copy.deepcopy(parameters), loc, scale, "median", count)
    mixture = random_teacher.module.distr_output.distribution(copy.deepcopy(parameters), loc=loc, scale=scale)
    own = mixture.sample((count,)).sort(0).values  # (samples, B, 1, P)
    low, high = own[int(0.485 * count)], own[int(0.515 * count)]  # 4 standard errors of a median's rank to each side
    assert ((low <= median) & (median <= high)).all()
    mean = random_teacher.points_of(copy.deepcopy(parameters), loc, scale, "mean", 1)
    torch.testing.assert_close(mean, mixture.mean)


@pytest.mark.parametrize("point", ["median", "mean"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_parameter_that_is_not_finite_makes_that_point_nan_and_no_other(random_teacher, point, value):
    parameters, loc, scale = random_teacher.parameters_of(walks(4, 64).float(), 16, 16)
    parameters["components"][2]["total_count"][1, 0, 5] = value  # of the negative binomial, whose sampling would fail
    parameters["weights_logits"][2, 0, 7, 0] = value
    result = random_teacher.points_of(parameters, loc, scale, point, 50)
    expected = torch.zeros(4, 1, 16, dtype=torch.bool)
    expected[1, 0, 5] = expected[2, 0, 7] = True
    assert torch.equal(result.isnan(), expected)


def test_a_window_that_the_network_cannot_forecast_has_no_label_and_harms_no_other(teacher_folder):
    teacher, context = load(teacher_folder), walks(5, 64)
    own = teacher.parameters_of

    def broken(context, horizon, patch):
        parameters, loc, scale = own(context, horizon, patch)
        parameters["weights_logits"][3] = math.nan
        return parameters, loc, scale

    teacher.parameters_of = broken
    labels = teacher.forecast(context, 16, 16, "median", 20)
    assert labels.isfinite().all(1).tolist() == [True, True, True, False, True]
