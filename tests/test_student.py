"""The student: its size, its independence of units, its files."""

import dataclasses
import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moirai_distill as md
from moirai_distill import FORMAT, PatchStudent, UserError

CONFIG = {
    "context_length": 64,
    "prediction_length": 16,
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 2,
    "patch_size": 8,
    "dropout": 0.1,
    "season": 24,
}


def student_of(seed=0, **changes):
    """A student with random weights, in eval mode."""
    torch.manual_seed(seed)
    student = PatchStudent(**CONFIG | changes).eval()
    if student.season:
        for sums in (student.periods, student.levels, student.fade):
            torch.nn.init.normal_(sums, 0, 0.2)  # they begin alike in all periods ahead
        student.share.fill_(0.7)
    return student


def contexts(count=5, length=64, seed=0):
    """Random walks (count, length) of deviation 1, mean 0."""
    x = np.random.default_rng(seed).standard_normal((count, length)).cumsum(1)
    return torch.from_numpy((x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)).float()


@torch.inference_mode()
def forecast(student, context):
    return student(context)


def write_pt(path, student, config=None, weights=None):
    """Save a student as a checkpoint of this program."""
    content = {
        "format": FORMAT,
        "student_config": CONFIG if config is None else config,
        "model_state_dict": student.state_dict() if weights is None else weights,
    }
    torch.save(content, path)
    return path


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize(
    ("context_length", "patch_size"), [(64, 8), (50, 16), (17, 16), (16, 16), (2, 2)]
)
def test_a_context_gives_a_forecast_of_the_horizon(batch, context_length, patch_size):
    student = student_of(context_length=context_length, patch_size=patch_size)
    result = forecast(student, contexts(batch, context_length))
    assert result.shape == (batch, 16)
    assert result.dtype == torch.float32
    assert result.isfinite().all()


def test_the_attention_of_a_gpu_gives_the_forecast_of_the_cpus(monkeypatch):
    expected = forecast(student_of(), contexts())
    monkeypatch.setattr(md, "attend", torch.nn.functional.scaled_dot_product_attention)
    torch.testing.assert_close(forecast(student_of(), contexts()), expected)


def test_a_student_of_720_points_has_1_354_672_parameters():
    """The sizes of the table in docs/guide.md, and its number of weights."""
    sizes = {"d_model": 128, "num_layers": 4, "num_heads": 8, "patch_size": 16, "dropout": 0.1}
    student = PatchStudent(context_length=720, prediction_length=96, season=24, **sizes)
    assert student.periods.shape == (4, 30)
    assert sum(parameter.numel() for parameter in student.parameters()) == 1_354_672


def test_the_default_flags_make_a_student_that_forecasts():
    args = md.build_parser(demo=False).parse_args(["train"])
    config = md.pick(md.StudentConfig, args)
    length, horizon = args.context_length, args.prediction_length
    student = PatchStudent(**dataclasses.asdict(config), season=24).eval()
    if student.season:
        assert student.periods.shape == (math.ceil(horizon / 24), math.ceil(length / 24))
    result = forecast(student, contexts(2, length))
    assert result.shape == (2, horizon)
    assert result.isfinite().all()


def without_transformer(student):
    """The same student, of which only the seasonal part forecasts."""
    torch.nn.init.zeros_(student.head.weight)
    torch.nn.init.zeros_(student.head.bias)
    return student


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(1, 30), st.integers(1, 45), st.integers(0, 99))
def test_the_seasonal_part_weighs_shapes_and_levels_and_fades_from_the_last_value(
    length, horizon, season, seed
):
    """In deviations from the last value; what lies before the context is its first value."""
    student = without_transformer(
        student_of(
            seed, context_length=length, prediction_length=horizon, patch_size=1, season=season
        )
    )
    context = contexts(3, length, seed).double()
    result = forecast(student, context) - context[:, -1:]
    if season > length:
        assert student.season == 0
        assert not hasattr(student, "periods")
        assert not result.any()
        return
    periods, levels = student.periods.detach().double(), student.levels.detach().double()
    count = periods.shape[1]

    def said(step):
        """What the sums say of a step, before what they are off by is taken off."""
        total = torch.zeros(3, dtype=torch.float64)
        for period in range(count):
            first = length - (count - period) * season
            rows = [max(row, 0) for row in range(first, first + season)]
            values = context[:, rows] - context[:, -1:]
            level = values.mean(1)
            total += periods[step // season, period] * (values[:, step % season] - level)
            total += levels[step // season, period] * level
        return total

    for step in range(horizon):
        expected = said(step) - student.fade[step].double() * said(season - 1)
        torch.testing.assert_close(result[:, step], expected.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("length", "season"), [(48, 24), (60, 24), (30, 30), (10, 1)])
def test_a_new_seasonal_part_goes_on_with_a_cycle_and_from_a_new_level(length, season):
    """Of a cycle around a constant it says that cycle, of a level that has moved the new one."""
    torch.manual_seed(0)
    sizes = {"context_length": length, "patch_size": 1, "prediction_length": 20}
    student = without_transformer(PatchStudent(**CONFIG | sizes | {"season": season}))
    steps = torch.arange(length + 20)
    cycle = 5 + torch.sin(2 * math.pi * steps / season) + 0.5 * (steps % season == 0)
    if season == 1:
        cycle = torch.where(steps < length - 1, 5.0, 6.0)
    result = forecast(student.eval(), cycle[None, :length])[0]
    truth = cycle[length:]
    if season == 1:  # half of the step is left after one step
        assert 5 < result[-1] < 5.6 < result[0] < 6
        return
    torch.testing.assert_close(result, truth, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["pt", "hub"])
def test_a_student_of_one_sum_of_periods_loads_and_forecasts_as_it_did(tmp_path, kind):
    """Of an earlier version, whose seasonal part was periods @ the context's periods."""
    from safetensors.torch import save_file

    student = student_of()
    weights = dict(student.state_dict())
    for name in ("levels", "fade", "share"):
        del weights[name]
    path = write_pt(tmp_path / "a.pt", student, weights=weights)
    if kind == "hub":
        path = tmp_path / "hub"
        student.save_pretrained(path)
        save_file(weights, path / "model.safetensors")
        config = json.loads((path / "config.json").read_text())
        config["info"]["weights"] = md.weights_digest(student, weights)
        (path / "config.json").write_text(json.dumps(config))
    loaded = md.open_student(path)
    assert loaded.weights_id == md.weights_digest(student, weights)

    context = contexts()
    transformer = student_of(season=0)  # its season's weights draw nothing
    transformer.load_state_dict({name: weights[name] for name in transformer.state_dict()})
    centre, deviation = md.instance_scale(context)
    periods = md.in_chunks((context - centre) / deviation, 24)
    added = (weights["periods"] @ periods).flatten(1)[:, :16] * deviation
    expected = forecast(transformer, context) + added
    torch.testing.assert_close(forecast(loaded.student, context), expected, atol=1e-5, rtol=1e-5)


def test_a_folded_share_leaves_the_forecasts_as_they_are():
    student = student_of()
    context = contexts()
    before = forecast(student, context)
    student.fold_share()
    assert student.share == 1
    torch.testing.assert_close(forecast(student, context), before)
    student_of(season=0).fold_share()  # it has none


def test_a_student_of_before_there_was_a_season_loads_and_forecasts_as_it_did(tmp_path):
    old = {name: value for name, value in CONFIG.items() if name != "season"}
    student = student_of(season=0)
    assert "periods" not in student.state_dict()
    write_pt(tmp_path / "a.pt", student, config=old)
    loaded = PatchStudent.from_pretrained(tmp_path / "a.pt")
    context = contexts()
    assert torch.equal(forecast(loaded, context), forecast(student, context))


@pytest.mark.parametrize("shape", [(3, 63), (3, 65), (64,), (3, 1, 64), (64, 3)])
def test_a_context_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(B, 64\)"):
        student_of()(torch.zeros(shape))


def test_every_point_of_the_context_counts_where_the_patch_does_not_divide_it():
    student = student_of(context_length=50, patch_size=16)
    context = contexts(1, 50).requires_grad_()
    student(context).sum().backward()
    assert (context.grad != 0).all()


def test_windows_do_not_see_each_other():
    student = student_of()
    context = contexts()
    alone = torch.cat([forecast(student, row[None]) for row in context])
    torch.testing.assert_close(forecast(student, context), alone)


@settings(max_examples=60, deadline=None)
@given(st.floats(-30, 30), st.floats(-4.9, 4.9), st.booleans(), st.integers(0, 99))
def test_the_forecast_follows_the_unit_of_the_series(exponent, offset, positive, seed):
    student = student_of(seed)
    context = contexts(seed=seed)
    scale = 10.0**exponent
    ratio = 10.0**offset * (1 if positive else -1)  # of the offset to the deviation, up to 1e5
    moved = forecast(student, ((context.double() + ratio) * scale).float())
    error = (moved.double() / scale - ratio - forecast(student, context)).abs().max()
    assert error < 1e-4 + 1e-6 * abs(ratio)  # the input's own rounding


@pytest.mark.parametrize("constant", [0.0, 5.0, -3.5, 1000.0])
def test_a_constant_context_gives_a_forecast_that_moves_with_it(constant):
    student = student_of()
    zero = forecast(student, torch.zeros(1, 64))
    result = forecast(student, torch.full((1, 64), constant))
    assert result.isfinite().all()
    torch.testing.assert_close(result - constant, zero, atol=3e-4, rtol=0)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_constant_context_with_a_step_at_its_end_gives_a_forecast_of_the_steps_size(scale):
    student = student_of()
    context = torch.full((1, 64), 2.0)
    context[0, -1] = 3.0
    result = forecast(student, context * scale)
    assert ((result / scale).abs() < 100).all()
    torch.testing.assert_close(result / scale, forecast(student, context), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["walk", "constant", "step", "tiny", "huge"])
def test_gradients_are_finite_and_reach_every_weight(kind):
    context = contexts()
    if kind in ("constant", "step"):
        context = torch.full((5, 64), 2.0)
        context[:, -1] += kind == "step"
    context = context * {"tiny": 1e-12, "huge": 1e12}.get(kind, 1.0)
    student = student_of(dropout=0.0).train()
    unit = 1.0 if kind == "constant" else context.std(1, keepdim=True)
    ((student(context) - context[:, -1:]) / unit - 1).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    idle = [name for name, gradient in gradients.items() if not gradient.any()]
    if kind == "constant":  # a constant's forecast is that constant
        assert idle == [*gradients]
    else:
        assert idle == []


def test_dropout_acts_in_training_and_not_in_eval():
    plain = student_of(dropout=0.0)
    student = student_of(dropout=0.5)
    context = contexts()
    plain.load_state_dict(student.state_dict())
    assert torch.equal(forecast(student, context), forecast(plain, context))
    assert torch.equal(forecast(student, context), forecast(student, context))
    student.train()
    assert not torch.equal(forecast(student, context), forecast(student, context))


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("source", ["hub", "a.pt", "run"])
def test_a_student_comes_back_from_each_kind_of_file_with_equal_forecasts(tmp_path, source, kind):
    student = student_of()
    if source == "hub":
        student.save_pretrained(tmp_path / "hub")
    elif source == "a.pt":
        write_pt(tmp_path / "a.pt", student)
    else:
        run = tmp_path / "run"
        run.mkdir()
        write_pt(run / "best_model_epoch_2.pt", student)
        write_pt(run / "best_model_epoch_3.pt", student_of(seed=1))
        last = torch.load(write_pt(run / "last.pt", student_of(seed=2)))
        torch.save(last | {"loop": {"best_file": "best_model_epoch_2.pt"}}, run / "last.pt")
    loaded = PatchStudent.from_pretrained(kind(tmp_path / source))
    assert not loaded.training
    context = contexts()
    assert torch.equal(forecast(loaded, context), forecast(student, context))


@pytest.mark.parametrize("kind", ["pt", "hub"])
@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_are_refused(tmp_path, kind, change):
    from safetensors.torch import save_file

    student = student_of()
    path = tmp_path / "a.pt"
    weights = dict(student.state_dict())
    if change == "missing":
        del weights["head.bias"]
    elif change == "extra":
        weights["more"] = torch.zeros(2)
    else:
        weights["head.bias"] = torch.zeros(17)
    if kind == "hub":
        path = tmp_path / "hub"
        student.save_pretrained(path)
        save_file(weights, path / "model.safetensors")
    else:
        write_pt(path, student, weights=weights)
    with pytest.raises(UserError, match="not a student of this program") as caught:
        PatchStudent.from_pretrained(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [{}, CONFIG | {"colour": 3}, CONFIG | {"d_model": "wide"}])
def test_a_config_that_is_no_students_is_refused(tmp_path, config):
    write_pt(tmp_path / "a.pt", student_of(), config=config)
    with pytest.raises(UserError, match="not a student of this program"):
        PatchStudent.from_pretrained(tmp_path / "a.pt")


@pytest.mark.parametrize("filename", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_folder_is_one_line(tmp_path, filename, damage):
    student_of().save_pretrained(tmp_path / "hub")
    path = tmp_path / "hub" / filename
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:20])
    else:
        path.unlink()
    with pytest.raises(UserError) as caught:
        PatchStudent.from_pretrained(tmp_path / "hub")
    assert str(tmp_path / "hub") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_with_nothing_there_is_one_line(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(UserError) as caught:
            PatchStudent.from_pretrained(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_saved_config_is_all_that_rebuilds_the_student(tmp_path):
    student = student_of()
    student.save_pretrained(tmp_path)
    info = {"weights": md.weights_digest(student)}
    expected = CONFIG | {"info": info, "quantile_width": 0}
    assert json.loads((tmp_path / "config.json").read_text()) == expected


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int64])
def test_integers_forecast_as_the_same_numbers_in_floating_point(kind):
    student = student_of()
    context = (torch.arange(64) % 24 * 10 - (0 if kind == torch.uint8 else 120))[None]
    expected = forecast(student, context.double())
    assert torch.equal(forecast(student, context.to(kind)), expected)
    assert expected.isfinite().all()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_a_student_cast_to_another_precision_forecasts_nearly_the_same(kind):
    context = 40 * contexts() + 1000
    expected = forecast(student_of(), context)
    result = forecast(student_of().to(kind), context)
    error = 1e-5 if kind == torch.float64 else 0.1
    assert ((result - expected).abs() / context.std(1, keepdim=True)).max() < error
    assert result.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
    doubled = forecast(student_of().to(kind), context.double())
    assert doubled.dtype == torch.float64
    torch.testing.assert_close(doubled, result.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_context_in_half_precision_is_scaled_in_full(kind):
    context = (1e4 * contexts()).to(kind)  # of which the squares overflow float16
    result = forecast(student_of(), context)
    assert torch.equal(result, forecast(student_of(), context.float()))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.int16])
def test_an_empty_batch_gives_an_empty_forecast(kind):
    result = forecast(student_of(), torch.zeros(0, 64, dtype=kind))
    assert result.shape == (0, 16)
    assert result.dtype == forecast(student_of(), torch.ones(1, 64, dtype=kind)).dtype
    with pytest.raises(ValueError, match="expected"):
        student_of()(torch.zeros(0, 63))


def test_a_student_whose_sizes_are_only_looked_at_takes_no_memory():
    """A checkpoint may lie about them."""
    tracemalloc.start()
    with torch.device("meta"):
        student = PatchStudent(**CONFIG | {"prediction_length": 1_000_000, "season": 1})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert student.fade.shape == (1_000_000,)
    assert peak < 1_000_000  # bytes
