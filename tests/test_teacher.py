"""The teacher: alignment, uni2ts's own forecast, scales, memory, and what is refused."""

import copy
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import label_task, load_teacher, make_job, save_module, split_folder, teacher_request
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves, tree_map

import moirai_distill as md

SIZES = (8, 16, 32, 64, 128)
LENGTHS = [(48, 16), (53, 21)]  # the second is a multiple of no patch size
SHAPES = [(128, 32), (100, 21), (53, 128)]  # for SIZES up to 128

# One day without any smoothness: a shift by one step is far off.
CYCLE = np.random.default_rng(3).standard_normal(24)
CYCLE = (CYCLE - CYCLE.mean()) / CYCLE.std()

# Flags by which nothing depends on the script's defaults.
DATA_FLAGS = "--columns first --max_files 0 --split_by files --split_ratio 8:1:1 --split_seed 0"
DATA_FLAGS += " --max_gap 16 --season auto --stride 1"
LABEL_FLAGS = f"{DATA_FLAGS} --context_length 64 --prediction_length 16 --max_windows 2"
LABEL_FLAGS += " --teacher_patch_size auto --teacher_point mean --teacher_precision 32"
LABEL_FLAGS += " --device cpu --lang en"


def uni2ts_forecast(module, context_length, horizon, patch):
    """uni2ts's own forecaster of one variate."""
    from uni2ts.model.moirai.forecast import MoiraiForecast

    return MoiraiForecast(
        module=module,
        context_length=context_length,
        prediction_length=horizon,
        patch_size=patch,
        target_dim=1,
        feat_dynamic_real_dim=0,
        past_feat_dynamic_real_dim=0,
    ).eval()


def uni2ts_inputs(context):
    """What uni2ts's forecaster takes for contexts (B, L): values, observed, padded."""
    values = context[..., None]
    return values, torch.ones_like(values).bool(), torch.zeros_like(context).bool()


def uni2ts_mean(module, context, horizon, patch):
    """Mean (B, H) of the distribution that uni2ts's own forecaster predicts for contexts (B, L)."""
    own = uni2ts_forecast(module, context.shape[1], horizon, patch)
    with torch.inference_mode():
        mean = own._get_distr(patch, *uni2ts_inputs(context)).mean
        return own._format_preds(patch, mean[None], 1)[:, 0]


def standardised(context):
    """Contexts (B, L) float64 in their own deviations as float32, their means and deviations."""
    mean = context.mean(1, keepdim=True)
    deviation = context.std(1, keepdim=True, unbiased=False)
    return ((context - mean) / deviation).float(), mean, deviation


def walks(count, length, seed=0):
    """Random walks (count, length) float64 far from mean 0 and deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    steps = 7 * torch.randn(count, length, generator=generator).double()
    return 40 + steps.cumsum(1)


def label(folder, data, tmp_path, *more):
    """Exit code of the command label with the teacher in `folder`; of two equal flags the last."""
    places = ["--teacher_model", folder, "--data_dir", data, "--label_cache", tmp_path / "cache"]
    words = ["label", *places, *LABEL_FLAGS.split(), *more]
    return md.main([str(word) for word in words])


@pytest.fixture(scope="module")
def random_teacher(teacher_folder):
    return load_teacher(teacher_folder)


def cycle(count, length):
    """CYCLE from each of `count` hours on, (count, length)."""
    hours = np.arange(count)[:, None] + np.arange(length)
    return CYCLE[hours % 24]


@pytest.fixture(scope="module")
def cycle_folder(tmp_path_factory):
    """Folder of a MOIRAI that knows the CYCLE, trained by uni2ts's own loss and layout."""
    from uni2ts.distribution import NormalFixedScaleOutput
    from uni2ts.model.moirai.module import MoiraiModule

    torch.manual_seed(0)
    module = MoiraiModule(
        NormalFixedScaleOutput(scale=0.3),
        d_model=64,
        num_layers=1,
        patch_sizes=(8, 16, 32),
        max_seq_len=64,
        attn_dropout_p=0.0,
        dropout_p=0.0,
    )
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=360)
    for step in range(360):
        length, horizon = LENGTHS[step % 2]
        patch = (8, 16, 32)[step // 2 % 3]
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


# --- alignment ---


def assert_aligned(labels, truth):
    """Labels fit the truth step by step, and badly one step earlier or later.

    Both are (W, H), of deviation 1.
    """
    error = {}
    for shift in (-1, 0, 1):
        shifted = np.roll(truth, shift, 1)
        error[shift] = np.mean((labels[:, 1:-1] - shifted[:, 1:-1]) ** 2)
    assert error[0] < 0.5 and min(error[-1], error[1]) > 1.5, error


@pytest.mark.parametrize("patch", [8, 16, 32])
@pytest.mark.parametrize(("length", "horizon"), LENGTHS)
def test_forecast_step_1_is_the_step_after_the_context(cycle_folder, length, horizon, patch):
    series = 1000 + 50 * cycle(24, length + horizon)
    context = torch.from_numpy(series[:, :length])
    teacher = load_teacher(cycle_folder)
    for point in ("mean", "median"):
        forecast = teacher.forecast(context, horizon, patch, point, 50).numpy()
        assert_aligned((forecast - 1000) / 50, (series[:, length:] - 1000) / 50)


def cycle_labels(folder, tmp_path, length, horizon, patch, kind, point="mean"):
    """(labels, truth), both (W, H) numpy, of training windows of `kind`, from CSVs to labels."""
    data = tmp_path / "csv"
    data.mkdir()
    for number in range(3):
        dates = pd.date_range("2024-01-01", periods=200, freq="h")
        values = 9 + 2 * cycle(24, 200)[7 * number]
        frame = pd.DataFrame({"date": dates, "v": values})
        frame.to_csv(data / f"{number}.csv", index=False)
    split = split_folder(
        data,
        context_length=length,
        prediction_length=horizon,
        split_by="files",
        max_gap=0,
        max_windows=40,
    )
    windows = kind(**vars(split.windows["train"]))
    request = teacher_request(
        folder,
        tmp_path / "cache",
        teacher_patch_size=patch,
        teacher_point=point,
        num_samples=20,
        teacher_batch_size=16,
    )
    labels = md.get_labels(label_task(windows, request), make_job())
    index = np.arange(len(windows))
    values, _ = labels.batch(index)
    _, truth, _ = md.Windows.batch(windows, index)
    return values.numpy(), truth.numpy()


class Shifted(md.Windows):
    """Windows whose contexts end one step too early, as an off-by-one would make them."""

    def batch(self, index):
        context, truth, observed = super().batch(index)
        return context.roll(1, 1), truth, observed


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


# --- the same as uni2ts's own ---


# Our forecast projects the tokens of the context alone into the network, and those of the horizon
# alone out of it; uni2ts projects all tokens both times. A matrix product may round otherwise when
# it has more rows (which, depends on the CPU). Of the kernels tried (AVX-512, AVX2, SSE and MKL's
# compatible one) none differed by more than 9 units in the last place of 1 + the forecast, in
# deviations of the context; a mistake in the layout of tokens is off by thousands of times that.
ROUNDING = 32 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("patch", SIZES)
@pytest.mark.parametrize(("length", "horizon"), SHAPES)
def test_mean_equals_the_one_of_uni2ts_but_for_rounding(random_teacher, length, horizon, patch):
    context, mean, deviation = standardised(walks(5, length))
    own = uni2ts_mean(random_teacher.module, context, horizon, patch)
    assert own.std() > 0.01 and own.shape == (5, horizon)
    mine = random_teacher.forecast(walks(5, length), horizon, patch, "mean", 1)
    mine = (mine.double() - mean) / deviation
    torch.testing.assert_close(mine, own.double(), rtol=ROUNDING, atol=ROUNDING)


def only_these(layer, tokens):
    """The method forward of `layer`, run on a slice of its tokens; it gives ones for the others."""
    forward = layer.forward

    def forward_of_some(values, sizes):
        def at_its_place(leaf):
            whole = leaf.new_ones(len(leaf), values.shape[1], *leaf.shape[2:])
            whole[:, tokens] = leaf
            return whole

        return tree_map(at_its_place, forward(values[:, tokens], sizes[:, tokens]))

    return forward_of_some


@pytest.mark.parametrize("patch", SIZES)
@pytest.mark.parametrize(("length", "horizon"), SHAPES)
def test_network_equals_the_one_of_uni2ts_to_the_bit_where_shapes_are_the_same(
    random_teacher, monkeypatch, length, horizon, patch
):
    """As above, but uni2ts's projections are run on the tokens that ours are run on."""
    module = random_teacher.module
    context, _, _ = standardised(walks(5, length))
    with torch.inference_mode():
        mine, my_loc, my_scale = random_teacher.predict_distribution(context, horizon, patch)

    seen = []
    distribution = module.distr_output.distribution

    def watched(parameters, loc, scale):
        seen.append((copy.deepcopy(parameters), loc, scale))  # uni2ts changes what it is given
        return distribution(parameters, loc=loc, scale=scale)

    past = math.ceil(length / patch)
    to_width = only_these(module.in_proj, slice(None, past))
    to_parameters = only_these(module.param_proj, slice(past, None))
    monkeypatch.setattr(module.in_proj, "forward", to_width)
    monkeypatch.setattr(module.param_proj, "forward", to_parameters)
    monkeypatch.setattr(module.distr_output, "distribution", watched)
    uni2ts_mean(module, context, horizon, patch)

    ((own, loc, scale),) = seen
    assert torch.equal(my_loc.expand_as(loc), loc)
    assert torch.equal(my_scale.expand_as(scale), scale)
    for leaf, own_leaf in zip(tree_leaves(mine), tree_leaves(own), strict=True):
        assert torch.equal(leaf, own_leaf[:, past:, :patch])
        assert leaf.std() > 0


@pytest.mark.parametrize(("length", "horizon", "patch"), [(64, 16, 16), (50, 21, 8), (50, 21, 64)])
def test_median_is_a_median_of_the_samples_of_uni2ts(random_teacher, length, horizon, patch):
    context, mean, deviation = standardised(walks(2, length))
    own = uni2ts_forecast(random_teacher.module, length, horizon, patch)
    torch.manual_seed(1)
    with torch.inference_mode():
        samples = own(*uni2ts_inputs(context), num_samples=2000)  # (B, samples, H)
    torch.manual_seed(2)
    median = random_teacher.forecast(walks(2, length), horizon, patch, "median", 2000)
    mine = ((median - mean) / deviation)[:, None]

    slack = 1e-5 * (1 + mine.abs())  # of the way there and back; the count component has steps
    below = (samples < mine - slack).double().mean(1)
    up_to = (samples <= mine + slack).double().mean(1)
    # Five deviations of the rank that the median of some samples has among as many others.
    tolerance = 5 * math.sqrt(2 * 0.25 / 2000)
    assert below.max() < 0.5 + tolerance and up_to.min() > 0.5 - tolerance


def test_attention_dropout_of_a_checkpoint_is_switched_off(tmp_path):
    from uni2ts.model.moirai.module import MoiraiModule

    folder = save_module(tmp_path / "dropout", attn_dropout_p=0.5)
    teacher = load_teacher(folder)
    context = walks(3, 64)
    first = teacher.forecast(context, 16, 8, "mean", 1)
    second = teacher.forecast(context, 16, 8, "mean", 1)
    assert torch.equal(first, second)

    module = MoiraiModule.from_pretrained(folder).eval()  # without our care it stays on
    first = uni2ts_mean(module, context.float(), 16, 8)
    second = uni2ts_mean(module, context.float(), 16, 8)
    assert not torch.equal(first, second)


# --- scales and lengths ---


@pytest.mark.parametrize("point", ["mean", "median"])
def test_constant_contexts_are_forecast_as_their_constant(random_teacher, point):
    constants = torch.tensor([0.0, 0.1, -3.3, 1e-30, 1e12, 16777217.0], dtype=torch.float64)
    constants = constants[:, None]
    moving = walks(1, 50)
    contexts = torch.cat([constants.expand(-1, 50), moving])
    forecast = random_teacher.forecast(contexts, 20, 16, point, 20)
    assert torch.equal(forecast[:6], constants.float().expand(-1, 20))
    assert forecast[6].std() > 0
    if point == "mean":
        alone = random_teacher.forecast(moving, 20, 16, point, 20)
        assert torch.allclose(forecast[6:], alone)


@settings(deadline=None, max_examples=30)
@given(st.floats(-6, 6), st.floats(-10, 10), st.sampled_from([8, 32]), st.booleans())
def test_forecast_is_equivariant_to_scale_and_shift(
    random_teacher, exponent, offset, patch, other_walks
):
    context = walks(3, 60, seed=int(other_walks))
    scale = 10.0**exponent
    deviation = context.std(1, keepdim=True)
    plain = random_teacher.forecast(context, 20, patch, "mean", 1).double()
    moved = random_teacher.forecast(scale * (context + offset), 20, patch, "mean", 1).double()
    assert ((moved / scale - offset - plain).abs() / deviation).max() < 1e-3
    assert (plain - context.mean(1, keepdim=True)).abs().max() > 0.1  # not merely the mean


def test_patch_sizes_are_those_whose_tokens_fit(tmp_path):
    teacher = load_teacher(save_module(tmp_path / "short", max_seq_len=8))
    assert teacher.patch_sizes(64, 16) == [16, 32, 64, 128]  # 10, 5, 3, 2 and 2 tokens
    assert teacher.patch_sizes(96, 17) == [16, 32, 64, 128]  # 16 fits exactly: 6 + 2
    assert teacher.patch_sizes(97, 17) == [32, 64, 128]
    assert teacher.patch_sizes(897, 1) == []


def test_too_many_tokens_are_a_clear_error(tmp_path, csv_folder, capsys):
    folder = save_module(tmp_path / "short", max_seq_len=3)
    assert label(folder, csv_folder, tmp_path, "--teacher_patch_size", "8") == 2
    expected = "--teacher_patch_size 8: with these lengths the teacher takes [32, 64, 128]"
    assert expected in capsys.readouterr().err

    assert label(folder, csv_folder, tmp_path) == 0
    judged = capsys.readouterr().out.partition("MSE on ")[2].splitlines()[0]
    assert "patch 32 " in judged and "patch 128 " in judged
    assert "patch 8 " not in judged and "patch 16 " not in judged

    folder = save_module(tmp_path / "shorter", max_seq_len=1)
    assert label(folder, csv_folder, tmp_path) == 2
    expected = "--teacher_patch_size auto: with these lengths the teacher takes none"
    assert expected in capsys.readouterr().err


# --- what is refused ---


def change_config(**changes):
    """A damage: keys of config.json changed; None removes one."""

    def damage(folder):
        path = folder / "config.json"
        config = json.loads(path.read_text()) | changes
        kept = {key: value for key, value in config.items() if value is not None}
        path.write_text(json.dumps(kept))

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
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "no config.json in this folder",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "no model.safetensors in this folder",
    ),
    "truncated": (truncate, "model.safetensors is damaged or of another model"),
    "empty": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        "model.safetensors is damaged",
    ),
    "missing tensor": (
        change_tensors(lambda t: t.pop("mask_encoding.weight")),
        "mask_encoding.weight",
    ),
    "extra tensor": (change_tensors(lambda t: t.update(spare=torch.ones(2))), "spare"),
    "wrong shape": (
        change_tensors(lambda t: t.update({"mask_encoding.weight": torch.ones(1, 3)})),
        "mask_encoding",
    ),
    "unknown key": (change_config(d_other=3), "d_other"),
    "tiny width": (change_config(d_model=32), "damaged or of another model"),
    "no such class": (
        change_config(distr_output={"_target_": "uni2ts.distribution.normal.NoOutput"}),
        "distr_output in config.json is no output distribution",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_model_that_is_none_or_damaged_is_one_clear_line(
    teacher_folder, csv_folder, tmp_path, capsys, case
):
    damage, expected = WRONG[case]
    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")
    damage(folder)
    assert label(folder, csv_folder, tmp_path) == 2
    problems = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(problems) == 1 and str(folder) in problems[0] and expected in problems[0]


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "uni2ts.distribution.mixture.torch.os.system",
        "uni2ts.distributionx.NormalOutput",
    ],
)
@pytest.mark.parametrize("place", ["top", "nested", "elsewhere"])
def test_nothing_that_a_config_names_outside_the_distributions_is_executed(
    teacher_folder, csv_folder, tmp_path, capsys, target, place
):
    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")
    marker = tmp_path / "executed"
    config = json.loads((folder / "config.json").read_text())
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
    expected = (
        "num_layers in config.json" if place == "elsewhere" else "distr_output in config.json"
    )
    assert expected in capsys.readouterr().err


# --- memory ---


class Small(md.Teacher):
    """A teacher on a device that holds at most `room` windows."""

    room = 3

    def predict_distribution(self, context, horizon, patch_size):
        self.refuse_many(context)
        return super().predict_distribution(context, horizon, patch_size)

    def forecast_whole(self, context, horizon, samples):
        self.refuse_many(context)
        return super().forecast_whole(context, horizon, samples)

    def refuse_many(self, context):
        if len(context) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


@pytest.mark.parametrize("point", ["mean", "median"])
def test_out_of_memory_halves_the_call_and_changes_nothing(random_teacher, point):
    notes = []
    small = Small(random_teacher.module, "cpu", "32", lambda *note: notes.append(note))
    forecasts = []
    for teacher in (random_teacher, small):
        torch.manual_seed(5)
        forecasts.append(teacher.forecast(walks(11, 64), 16, 16, point, 20))
    assert torch.allclose(*forecasts, rtol=1e-4)
    sentences, windows = zip(*notes, strict=True)
    assert set(sentences) == {"out of GPU memory: the teacher goes on with {} windows a call"}
    assert windows[0] == 5


def test_not_even_one_window_in_memory_is_an_error(
    random_teacher, csv_folder, tmp_path, monkeypatch, capsys
):
    small = Small(random_teacher.module, "cpu", "32", print)
    monkeypatch.setattr(Small, "room", 0)
    monkeypatch.setattr(md, "load_teacher", lambda *_: small)
    assert label("a/teacher", csv_folder, tmp_path) == 2
    assert "error: out of GPU memory" in capsys.readouterr().err


def test_contexts_beyond_one_call_do_not_change_a_mean_forecast(random_teacher):
    context = walks(9, 64)
    whole = random_teacher.forecast(context, 16, 8, "mean", 1)
    parts = [random_teacher.forecast(part, 16, 8, "mean", 1) for part in context.split(2)]
    assert torch.allclose(whole, torch.cat(parts), rtol=1e-5)


def test_the_teacher_is_frozen_and_in_eval_mode(random_teacher):
    assert not any(weight.requires_grad for weight in random_teacher.module.parameters())
    assert not any(part.training for part in random_teacher.module.modules())
    assert {weight.dtype for weight in random_teacher.module.parameters()} == {torch.float32}


# --- points of the distribution ---


def test_samples_are_those_of_the_predicted_mixture(random_teacher):
    """How many samples a component gives is drawn first: their quantiles are uni2ts's own."""
    context = walks(3, 64).float()
    parameters, loc, scale = random_teacher.predict_distribution(context, 16, 16)
    count = 20_000
    torch.manual_seed(1)
    median = random_teacher.points_of(copy.deepcopy(parameters), loc, scale, "median", count)
    output = random_teacher.module.distr_output
    mixture = output.distribution(copy.deepcopy(parameters), loc=loc, scale=scale)
    own = mixture.sample((count,)).sort(0).values  # (samples, B, 1, P)
    low = own[int(0.485 * count)]  # 4 standard errors of a median's rank to each side
    high = own[int(0.515 * count)]
    assert ((low <= median) & (median <= high)).all()
    mean = random_teacher.points_of(copy.deepcopy(parameters), loc, scale, "mean", 1)
    torch.testing.assert_close(mean, mixture.mean)


@pytest.mark.parametrize("samples", [1, 2, 5, 100])
def test_the_median_of_an_even_number_of_samples_lies_between_the_middle_two(
    random_teacher, monkeypatch, samples
):
    drawn = []
    draw = md.Teacher.draw

    def watched(*arguments):
        drawn.append(draw(*arguments))
        return drawn[-1]

    monkeypatch.setattr(md.Teacher, "draw", watched)
    parameters, loc, scale = random_teacher.predict_distribution(walks(3, 64).float(), 16, 16)
    points = random_teacher.points_of(parameters, loc, scale, "median", samples)
    (values,) = drawn  # (positions, samples)
    expected = np.median(values.double().numpy(), axis=1)
    np.testing.assert_allclose(points.flatten().numpy(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("samples", [1, 3, 99])
def test_the_median_of_an_odd_number_of_samples_is_the_middle_one_to_the_bit(samples):
    """Else labels of earlier versions, which have the same key, would not be these."""
    values = torch.from_numpy(np.random.default_rng(samples).standard_normal((50, samples))).float()
    assert torch.equal(md.median(values), values.median(1).values)


@pytest.mark.parametrize("point", ["median", "mean"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_parameter_that_is_not_finite_makes_that_point_nan_and_no_other(
    random_teacher, point, value
):
    context = walks(4, 64).float()
    parameters, loc, scale = random_teacher.predict_distribution(context, 16, 16)
    negative_binomial = parameters["components"][2]  # whose sampling would fail
    negative_binomial["total_count"][1, 0, 5] = value
    parameters["weights_logits"][2, 0, 7, 0] = value
    points = random_teacher.points_of(parameters, loc, scale, point, 50)
    expected = torch.zeros(4, 1, 16, dtype=torch.bool)
    expected[1, 0, 5] = True
    expected[2, 0, 7] = True
    assert torch.equal(points.isnan(), expected)


def test_a_window_that_the_network_cannot_forecast_has_no_label_and_harms_no_other(
    random_teacher, monkeypatch
):
    original = md.Teacher.predict_distribution

    def broken(*arguments):
        parameters, loc, scale = original(*arguments)
        parameters["weights_logits"][3] = math.nan
        return parameters, loc, scale

    monkeypatch.setattr(md.Teacher, "predict_distribution", broken)
    labels = random_teacher.forecast(walks(5, 64), 16, 16, "median", 20)
    assert labels.isfinite().all(1).tolist() == [True, True, True, False, True]
