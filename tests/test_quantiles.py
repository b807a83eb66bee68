"""Quantiles: in the labels, in a head beside the point, in predict, evaluate and export."""

import copy
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    SMALL,
    SMALL_RUN,
    label_task,
    load_teacher,
    make_job,
    save_generation,
    split_folder,
    teacher_request,
)
from torch import nn

import moirai_distill as md

L, H = 64, 16
CONFIG = {
    "context_length": L,
    "prediction_length": H,
    "d_model": 16,
    "num_layers": 1,
    "num_heads": 2,
    "patch_size": 8,
    "dropout": 0.1,
    "season": 24,
}


def walks(count, seed=0):
    """Random walks (count, L) float64."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, L)).cumsum(1))


def student_of(seed=0, **changes):
    """A student with quantiles and random weights, in eval mode."""
    torch.manual_seed(seed)
    return md.PatchStudent(**(CONFIG | {"quantile_width": 8} | changes)).eval()


def wild_student(seed=0):
    """A student whose quantile head has large random weights."""
    student = student_of(seed)
    for weight in student.quantile_head.parameters():
        weight.data.normal_(0, 3)
    return student


# -- Labels ----------------------------------------------------------------------------------------


@pytest.fixture
def windows(few_csvs):
    """40 training windows."""
    return split_folder(few_csvs, max_windows=4).windows["train"]


def labels_of(windows, teacher_folder, cache, **changes):
    """LabelFile of windows, made or found."""
    request = teacher_request(teacher_folder, cache, **({"quantiles": "on"} | changes))
    return md.get_labels(label_task(windows, request), make_job())


def test_quantiles_of_samples_lie_at_their_levels():
    """Of numbers spread evenly over 0 to 1, each quantile is its level, not one beside it."""
    samples = torch.arange(1, 100).double()[None, torch.randperm(99)] / 100
    found = md.quantiles_of(samples[..., None])
    assert found[0, :, 0].tolist() == pytest.approx(list(md.LEVELS))
    drawn = torch.rand(4, 5000, generator=torch.Generator().manual_seed(0))
    assert (md.quantiles_of(drawn) - torch.tensor(md.LEVELS)).abs().max() < 0.03
    few = md.quantiles_of(torch.tensor([[3.0, 1.0, 2.0]]))[0]
    assert few[0] == 1 and few[md.MIDDLE] == 2 and few[-1] == 3


def test_points_are_the_same_bytes_with_and_without_quantiles(windows, teacher_folder, tmp_path):
    plain = labels_of(windows, teacher_folder, tmp_path / "off", quantiles="off")
    labels = labels_of(windows, teacher_folder, tmp_path / "on")
    assert plain.points.path.read_bytes() == labels.points.path.read_bytes()
    assert plain.folder.name == labels.folder.name  # the key is the same
    assert not (plain.folder / "quantiles.bin").exists() and plain.offsets is None
    assert md.read_manifest(plain.folder)["quantiles"] is None
    assert md.read_manifest(labels.folder)["quantiles"] == list(md.LEVELS)


def test_quantiles_are_those_of_the_samples_of_which_the_point_is_the_median(
    windows, teacher_folder, tmp_path
):
    labels = labels_of(windows, teacher_folder, tmp_path, num_samples=21)
    index = np.arange(len(windows))
    context, _, _ = windows.batch(index)
    quantiles, is_finite = labels.quantile_batch(index, context)
    assert quantiles.shape == (len(windows), 9, H) and is_finite.all()
    assert (quantiles.diff(dim=1) >= 0).all() and (quantiles.diff(dim=1) > 0).any()
    points = torch.from_numpy(np.array(labels.array))
    assert torch.equal(quantiles[:, md.MIDDLE], points)

    request = teacher_request(teacher_folder, tmp_path, num_samples=21, quantiles="on")
    request.teacher_patch_size = {"h": 16}
    first = np.arange(8)  # a block, whose seed is its number
    fresh = md.label_windows(load_teacher(teacher_folder), windows, first, request, seed=0)
    assert (
        np.abs(fresh.quantiles - quantiles[:8].numpy()).max()
        < 2e-3 * np.abs(fresh.quantiles - fresh.points[:, None]).max()
    )


def test_rounding_is_far_below_the_error_of_the_samples(windows, teacher_folder, tmp_path):
    labels = labels_of(windows, teacher_folder, tmp_path, num_samples=100)
    request = teacher_request(teacher_folder, tmp_path, num_samples=100, quantiles="on")
    request.teacher_patch_size = {"h": 16}
    teacher = load_teacher(teacher_folder)
    index = np.arange(8)
    context, _, _ = windows.batch(index)
    kept, _ = labels.quantile_batch(index, context)
    made = torch.from_numpy(md.label_windows(teacher, windows, index, request, 0).quantiles)
    others = torch.from_numpy(md.label_windows(teacher, windows, index, request, 1).quantiles)
    sides = [place for place in range(9) if place != md.MIDDLE]
    rounding = (kept - made)[:, sides].abs().median()
    sampling = (others - made)[:, sides].abs().median()
    assert 0 < rounding < sampling / 100


def test_a_thousand_windows_take_at_most_two_and_a_half_megabytes():
    manifest = {"key": {"windows": 1000, "horizon": 96}, "block": 256}
    assert 0.3 < md.LabelFile("x", manifest).megabytes < 0.4
    assert md.LabelFile("x", manifest, True).megabytes < 2.4  # checksums take 32 bytes a block


def test_labels_of_an_earlier_version_get_quantiles_and_keep_their_points(
    windows, teacher_folder, tmp_path, capfd
):
    cache = tmp_path / "cache"
    plain = labels_of(windows, teacher_folder, cache, quantiles="off")
    content = plain.points.path.read_bytes()
    path = plain.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["quantiles"]
    path.write_text(json.dumps(manifest))
    job = make_job(md.Voice("en"))
    request = teacher_request(teacher_folder, cache, quantiles="on")
    labels = md.get_labels(label_task(windows, request), job)
    assert "hold no quantiles: the teacher is asked again" in capfd.readouterr().err
    assert labels.points.path.read_bytes() == content
    fresh = labels_of(windows, teacher_folder, tmp_path / "fresh")
    assert labels.quantiles.path.read_bytes() == fresh.quantiles.path.read_bytes()

    for choice in ("on", "off"):
        request = teacher_request(teacher_folder, cache, quantiles=choice)
        md.get_labels(label_task(windows, request, load=None), job)
        assert "Label cache hit" in capfd.readouterr().out


def test_carried_labels_without_quantiles_are_used_where_no_teacher_is(
    windows, teacher_folder, tmp_path, capfd
):
    cache = tmp_path / "cache"
    labels_of(windows, teacher_folder, cache, quantiles="off")
    elsewhere = tmp_path / "gone" / teacher_folder.name
    request = teacher_request(elsewhere, cache, quantiles="on")
    labels = md.get_labels(label_task(windows, request, load=None), make_job(md.Voice("en")))
    told = capfd.readouterr()
    assert "Label cache hit" in told.out and "learned from truth alone" in told.err
    assert labels.offsets is None and labels.array is not None


@pytest.mark.parametrize("part", ["labels", "quantiles"])
def test_a_damaged_block_of_either_part_is_made_again(windows, teacher_folder, tmp_path, part):
    labels = labels_of(windows, teacher_folder, tmp_path)
    before = [one.path.read_bytes() for one in labels.parts]
    path = labels.folder / f"{part}.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    again = labels_of(windows, teacher_folder, tmp_path)
    assert [one.path.read_bytes() for one in again.parts] == before


def test_a_mean_has_no_quantiles(windows, teacher_folder, tmp_path):
    labels = labels_of(windows, teacher_folder, tmp_path, teacher_point="mean")
    assert labels.offsets is None


@pytest.mark.parametrize("kind", ["moe", "2.0"])
def test_other_generations_have_quantiles(tmp_path, kind):
    teacher = load_teacher(save_generation(tmp_path / kind, kind))
    context = walks(3)
    asked = md.Question(H, 16, "median", 20, with_quantiles=True)
    torch.manual_seed(0)
    answer = teacher.answer(context, asked)
    assert answer.quantiles.shape == (3, 9, H)
    assert (answer.quantiles.diff(dim=1) >= 0).all()
    torch.manual_seed(0)
    assert torch.equal(teacher.forecast(context, H, 16, "median", 20), answer.points)
    if kind == "2.0":
        mean, deviation, _ = md.own_scale(context)
        scaled = ((context - mean) / deviation).float()
        own = teacher.forecast_whole(scaled, H, 1).sort(1).values
        expected = own * deviation[..., None] + mean[..., None]
        torch.testing.assert_close(answer.quantiles, expected.float())


def test_label_list_names_quantiles(windows, teacher_folder, tmp_path, capsys):
    labels_of(windows, teacher_folder, tmp_path)
    assert md.main(["label", "--list", "--label_cache", str(tmp_path), "--lang", "en"]) == 0
    assert "median and quantiles" in capsys.readouterr().out


# -- Student ---------------------------------------------------------------------------------------


def test_the_point_has_the_same_bits_with_and_without_quantiles():
    drawn = []
    students = []
    for width in (0, 8):
        students.append(student_of(quantile_width=width))
        drawn.append(torch.rand(3))
    plain, student = students
    assert torch.equal(*drawn)  # what is drawn later is the same
    weights = student.state_dict()
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, weights[name])
    context = walks(5)
    points, _ = student(context, with_quantiles=True)
    assert torch.equal(points, plain(context)) and torch.equal(student(context), points)


def test_no_gradient_of_the_quantiles_reaches_the_point():
    student = student_of()
    _, quantiles = student(walks(4).float(), with_quantiles=True)
    quantiles.sum().backward()
    for name, weight in student.named_parameters():
        assert (weight.grad is not None) == name.startswith("quantile_head."), name


@pytest.mark.parametrize("is_int8", [False, True], ids=["float32", "int8"])
def test_quantiles_never_cross_whatever_the_weights_are(is_int8):
    for seed in range(3):
        student = wild_student(seed)
        if is_int8:
            student = torch.ao.quantization.quantize_dynamic(student, {nn.Linear}, torch.qint8)
        context = torch.cat([walks(50, seed), 1e6 + walks(50, seed), 1e-6 * walks(50, seed)])
        _, quantiles = student(context.float(), with_quantiles=True)
        assert quantiles.isfinite().all() and (quantiles.diff(dim=1) >= 0).all()
        _, quantiles = student(context, with_quantiles=True)
        assert (quantiles.diff(dim=1) >= 0).all()


def test_quantiles_move_with_shift_and_scale():
    student = wild_student()
    context = walks(4)
    plain = student.quantiles(context)
    moved = student.quantiles(1000 * context + 5e5)
    torch.testing.assert_close(moved, 1000 * plain + 5e5, rtol=1e-5, atol=1e-2)
    assert (plain[:, -1] - plain[:, 0]).min() > 0


def test_a_constant_context_has_the_constant_at_all_levels():
    found = wild_student().quantiles(torch.full((2, L), 7.25))
    assert found.shape == (2, 9, H) and (found == 7.25).all()


def test_quantiles_are_arrays_or_tensors_as_their_context_is():
    student = student_of()
    values = walks(3).numpy()
    found = student.quantiles(values)
    assert isinstance(found, np.ndarray) and found.shape == (3, 9, H)
    np.testing.assert_allclose(student.quantiles(values[1]), found[1], rtol=1e-5)
    assert student.quantiles(torch.from_numpy(values).float()).dtype == torch.float32
    assert student.quantiles(np.empty((0, L))).shape == (0, 9, H)
    assert md.PatchStudent.LEVELS == md.LEVELS
    assert list(md.LEVELS) == sorted(md.LEVELS) and md.LEVELS[md.MIDDLE] == 0.5


def test_a_student_without_quantiles_says_so():
    with pytest.raises(md.UserError, match="no quantiles; train one with --quantiles on"):
        student_of(quantile_width=0).quantiles(walks(1))


def test_the_head_is_small():
    parser = md.build_parser(demo=False)
    config = md.pick(md.StudentConfig, parser.parse_args(["train"]))
    config = md.dataclasses.asdict(config) | {"quantile_width": md.QUANTILE_WIDTH}
    size = {"context_length": 720, "prediction_length": 96, "d_model": 128, "patch_size": 16}
    head = md.PatchStudent(**(config | size)).quantile_head
    assert sum(weight.numel() for weight in head.parameters()) <= 250_000


# -- Loss and scores -------------------------------------------------------------------------------


def test_the_loss_is_the_blend_that_is_promised():
    drawn = np.random.default_rng(0)
    quantiles, label = drawn.standard_normal((2, 5, 9, H)) * 2
    truth = drawn.standard_normal((5, H))
    observed = (drawn.random((5, H)) > 0.3).astype(float)
    weight = np.array([[0.0], [0.3], [0.3], [1.0], [0.3]])
    expected = 0.0
    for b in range(5):
        for h in range(H):
            for k, level in enumerate(md.LEVELS):
                gap = truth[b, h] - quantiles[b, k, h]
                loss = 2 * (level * gap if gap > 0 else (level - 1) * gap)
                far = abs(quantiles[b, k, h] - label[b, k, h])
                huber = far**2 / 2 if far <= 1 else far - 0.5
                blended = weight[b, 0] * huber + (1 - weight[b, 0]) * loss
                expected += observed[b, h] * blended / 9
    arrays = (quantiles, truth, observed, label, weight)
    assert float(md.quantile_loss(*map(torch.from_numpy, arrays))) == pytest.approx(expected)


def test_the_loss_is_lowest_at_the_quantiles_in_their_order():
    """With swapped levels, or with those of a level beside, it is higher."""
    truth = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    normal = torch.distributions.Normal(0.0, 1.0)
    right = normal.icdf(torch.tensor(md.LEVELS))
    beside = normal.icdf((torch.tensor(md.LEVELS) + 0.1).clamp(max=0.95))
    losses = []
    for levels in (right, right.flip(0), beside):
        quantiles = levels[None, :, None].expand(len(truth), -1, 1)
        ones = torch.ones_like(truth)
        losses.append(float(md.quantile_loss(quantiles, truth, ones, quantiles, 0 * ones)))
    assert losses[0] < 0.99 * losses[2] and losses[0] < 0.8 * losses[1]


def test_a_mirrored_window_has_its_levels_reversed():
    batch = md.Batch(
        context=walks(64),
        truth=torch.randn(64, H),
        observed=torch.rand(64, H).round(),
        label=torch.randn(64, 9, H).sort(1).values,
        weight=torch.rand(64, 1),
    )
    mirrored = md.mirror(batch, seed=3)
    changed = (mirrored.context != batch.context).any(1)
    assert 10 < changed.sum() < 54
    assert (mirrored.label.diff(dim=1) >= 0).all()
    for sign, rows in ((-1, changed), (1, ~changed)):
        assert torch.equal(mirrored.context[rows], sign * batch.context[rows])
        assert torch.equal(mirrored.truth[rows], sign * batch.truth[rows])
    assert torch.equal(mirrored.label[changed], -batch.label[changed].flip(1))
    assert torch.equal(mirrored.observed, batch.observed)


def test_wql_and_coverage_are_those_of_their_definitions(few_csvs):
    windows = split_folder(few_csvs).windows["test"]
    _, truth, observed = windows.batch(np.arange(len(windows)))
    spread = torch.linspace(-1, 1, 9)[:, None] * torch.linspace(0.1, 0.6, H)

    def forecast(index, _context):
        return (truth[index].mean(1)[:, None, None] + spread).float()

    found = md.score_quantiles(forecast, windows, 7, make_job())
    quantiles = forecast(np.arange(len(windows)), None).double().numpy()
    target = truth.double().numpy()
    level = np.array(md.LEVELS)[:, None]
    gap = target[:, None] - quantiles
    loss = 2 * np.maximum(level * gap, (level - 1) * gap)
    assert observed.all()
    by_level = loss.sum((0, 2)) / np.abs(target).sum()
    assert found.wql == pytest.approx(by_level.mean(), rel=1e-6)
    inside = (quantiles[:, 0] <= target) & (target <= quantiles[:, -1])
    assert found.coverage_80 == pytest.approx(inside.mean())
    steps = np.arange(H) * 3 // H
    for third in range(3):
        own = inside[:, steps == third].mean()
        assert found.coverage_80_by_third[third] == pytest.approx(own)
        part = loss[:, :, steps == third].mean(1).sum() / np.abs(target[:, steps == third]).sum()
        assert found.wql_by_third[third] == pytest.approx(part, rel=1e-6)


# -- Learning --------------------------------------------------------------------------------------


def training_of(data, tmp_path, **changes):
    """Training of a folder, on truth alone."""
    flags = md.build_parser(demo=False).parse_args(["train"])
    settings = {"alpha": 0.0, "batch_size": 16, "weight_decay": 0.0, "seed": 0}
    settings |= {"max_grad_norm": 1.0, "augment": "on"}
    vars(flags).update(settings | changes)
    config = md.pick(md.TrainConfig, flags)
    parts = split_folder(data, max_windows=20).windows
    return md.Training(parts["train"], parts["validation"], None, config, {}, tmp_path)


def test_learning_lowers_the_loss_and_leaves_the_point_as_it_is(few_csvs, tmp_path):
    training = training_of(few_csvs, tmp_path)
    student = student_of()
    plain = copy.deepcopy(student)
    job = make_job()
    fan = md.quantile_forecaster(plain, plain.prediction_length, job)
    before = md.score_quantiles(fan, training.validation, 64, job)
    after = md.learn_quantiles(student, training, 60, job)
    assert after.wql < 0.9 * before.wql
    weights = student.state_dict()
    for name, weight in plain.state_dict().items():
        if not name.startswith("quantile_head."):
            assert torch.equal(weight, weights[name])
    again = student_of()
    assert md.learn_quantiles(again, training, 60, job) == after  # a function of its arguments
    assert torch.equal(again.quantiles(walks(3)), student.quantiles(walks(3)))


def taught(training, job):
    """A student whose band is about as wide as it should be."""
    student = student_of()
    with torch.no_grad():
        student.quantile_head.widen.bias.add_(1.0)
    md.learn_quantiles(student, training, 150, job)
    return student


@pytest.mark.parametrize("width", [0.4, 2.0])
def test_calibration_mends_a_band_of_a_wrong_width(csv_folder, tmp_path, width, monkeypatch):
    training = training_of(csv_folder, tmp_path)
    job = make_job()
    student = taught(training, job)
    softplus = nn.functional.softplus

    def wrong(values):
        return width * softplus(values)

    monkeypatch.setattr(md.F, "softplus", wrong)
    fan = md.quantile_forecaster(student, H, job)
    before = md.score_quantiles(fan, training.validation, 64, job)
    after = md.calibrate(student, training.validation, job)
    factors = student.quantile_head.calibration
    assert (factors > 1).all() if width < 1 else (factors < 1).all()
    assert abs(after.coverage_80 - 0.8) < 0.5 * abs(before.coverage_80 - 0.8)
    assert after.wql < before.wql


def test_calibration_takes_what_all_quarters_of_validation_need(csv_folder, tmp_path, monkeypatch):
    training = training_of(csv_folder, tmp_path)
    job = make_job()
    asked = [[0.5, 0.5, 1.0], [0.5, 1.0, 1.0], [0.5, 1.0, 2.0], [0.5, 0.9, 2.0]]
    answers = iter(torch.tensor(asked))
    student = taught(training, job)
    monkeypatch.setattr(md, "covering_factors", lambda *_: next(answers))
    softplus = nn.functional.softplus

    def wide(values):  # far too much: narrower is better everywhere
        return 4 * softplus(values)

    monkeypatch.setattr(md.F, "softplus", wide)
    md.calibrate(student, training.validation, job)
    factors = student.quantile_head.calibration
    assert float(factors[0]) == pytest.approx(0.5, rel=1e-3)  # all agree
    assert factors[H // 2] == 1  # one alone asks for it
    assert factors[-1] == 1


def test_a_calibration_that_does_not_help_is_not_kept(csv_folder, tmp_path, monkeypatch):
    training = training_of(csv_folder, tmp_path)
    job = make_job()
    student = taught(training, job)
    monkeypatch.setattr(md, "covering_factors", lambda *_: torch.full((3,), 4.0))
    md.calibrate(student, training.validation, job)
    assert student.quantile_head.calibration.tolist() == [1] * H


def test_with_alpha_one_the_quantiles_are_the_teachers(few_csvs, teacher_folder, tmp_path):
    """And with other levels of the teacher they would be others."""
    training = training_of(few_csvs, tmp_path, alpha=1.0, augment="off")
    labels = labels_of(training.windows, teacher_folder, tmp_path, num_samples=20)
    training.labels = labels
    index = np.arange(len(training.windows))
    context, _, _ = training.windows.batch(index)
    teachers, _ = labels.quantile_batch(index, context)
    batch = md.read_quantiles(training, 0)
    place = [int((context == row).all(1).nonzero()[0]) for row in batch.context]
    assert torch.equal(batch.label, teachers[place]) and (batch.weight == 1).all()


# -- Commands --------------------------------------------------------------------------------------


def run_flags(root, folder, *more):
    """A train command on the data of the fixture `trained`."""
    words = [*SMALL.split(), *SMALL_RUN.split(), "--data_dir", root / "data"]
    words += ["--label_cache", root / "labels", "--save_dir", folder, "--alpha", 0, *more]
    return [str(word) for word in words]


def test_a_run_without_quantiles_has_the_same_points_and_can_get_them_later(
    trained, tmp_path, capsys
):
    assert md.main(run_flags(trained, tmp_path, "--quantiles", "off")) == 0
    twin = md.PatchStudent.from_pretrained(trained / "twin")
    plain = md.PatchStudent.from_pretrained(tmp_path)
    assert plain.quantile_head is None and twin.quantile_head is not None
    contexts = walks(6)
    assert torch.equal(plain.forecast(contexts), twin.forecast(contexts))
    content = md.read_checkpoint(md.best_in(tmp_path))
    assert content.get("quantiles") is None

    capsys.readouterr()
    assert md.main(run_flags(trained, tmp_path, "--resume")) == 0
    assert "Learning quantiles" in capsys.readouterr().out
    later = md.PatchStudent.from_pretrained(tmp_path)
    for name, weight in twin.state_dict().items():
        assert torch.equal(weight, later.state_dict()[name]), name

    assert md.main(run_flags(trained, tmp_path, "--resume")) == 0
    assert "Learning quantiles" not in capsys.readouterr().out  # it knows them


def test_a_run_that_is_stopped_while_it_learns_quantiles_goes_on(trained, tmp_path, monkeypatch):
    step = md.take_quantile_step
    steps = []

    def stopping(batch, model, optimizer, config, job):
        steps.append(1)
        if len(steps) == 3:
            job.stop.signum = 15
        step(batch, model, optimizer, config, job)

    with monkeypatch.context() as patch:
        patch.setattr(md, "take_quantile_step", stopping)
        assert md.main(run_flags(trained, tmp_path)) == 143
    assert md.PatchStudent.from_pretrained(tmp_path).quantile_head is None
    assert md.main(run_flags(trained, tmp_path, "--resume")) == 0
    resumed = md.PatchStudent.from_pretrained(tmp_path).state_dict()
    for name, weight in md.PatchStudent.from_pretrained(trained / "twin").state_dict().items():
        assert torch.equal(weight, resumed[name]), name


def forecast_of(trained, tmp_path, *more):
    """Table that predict writes."""
    output = tmp_path / "forecast.csv"
    words = ["predict", "--checkpoint", trained / "distilled", "--lang", "en"]
    words += ["--input", trained / "data" / "s03.csv", "--output", output, *more]
    assert md.main([str(word) for word in words]) == 0
    return pd.read_csv(output)


def test_predict_writes_the_band_after_each_point(trained, tmp_path):
    table = forecast_of(trained, tmp_path)
    assert list(table.columns) == ["date", "value", "value_q0.1", "value_q0.9"]
    assert (table["value_q0.1"] <= table["value_q0.9"]).all()
    student = md.PatchStudent.from_pretrained(trained / "distilled")
    values = pd.read_csv(trained / "data" / "s03.csv")["value"].to_numpy()
    fan = student.quantiles(values)
    np.testing.assert_allclose(table["value_q0.1"], fan[0], rtol=1e-9)
    np.testing.assert_allclose(table["value_q0.9"], fan[-1], rtol=1e-9)
    table = forecast_of(trained, tmp_path, "--levels", "0.5", "0.2")
    assert list(table.columns) == ["date", "value", "value_q0.5", "value_q0.2"]
    np.testing.assert_allclose(table["value_q0.2"], fan[1], rtol=1e-9)


def test_names_of_quantiles_do_not_cover_those_of_series(trained, tmp_path):
    frame = pd.read_csv(trained / "data" / "s03.csv")
    frame["value_q0.1"] = frame["value"] + 100
    frame.to_csv(tmp_path / "in.csv", index=False)
    output = tmp_path / "out.csv"
    words = ["predict", "--checkpoint", trained / "distilled", "--input", tmp_path / "in.csv"]
    words += ["--output", output, "--columns", "all", "--levels", "0.1"]
    assert md.main([str(word) for word in words]) == 0
    names = list(pd.read_csv(output).columns)
    assert names == ["date", "value", "value_q0.1_", "value_q0.1", "value_q0.1_q0.1"]


def test_the_picture_shades_the_band(trained, tmp_path, monkeypatch):
    panels = []
    monkeypatch.setattr(md, "draw", lambda _path, drawn: panels.extend(drawn))
    table = forecast_of(trained, tmp_path, "--plot")
    low, high = panels[0].bands["forecast"]
    np.testing.assert_allclose(low, table["value_q0.1"], rtol=1e-9)
    np.testing.assert_allclose(high, table["value_q0.9"], rtol=1e-9)


def test_forecast_frame_has_the_quantiles(trained):
    student = md.PatchStudent.from_pretrained(trained / "distilled")
    frame = pd.read_csv(trained / "data" / "s03.csv")
    table = md.forecast_frame(student, frame)
    assert list(table.columns) == ["value", "value_q0.1", "value_q0.9"]
    table = md.forecast_frame(student, frame, levels=())
    assert list(table.columns) == ["value"]


def test_evaluate_scores_quantiles_of_student_and_teacher(trained, tmp_path):
    words = ["evaluate", "--checkpoint", trained / "distilled", trained / "twin", "--with_teacher"]
    words += ["--output_dir", tmp_path, "--lang", "en", "--device", "cpu"]
    assert md.main([str(word) for word in words]) == 0
    table = json.loads((tmp_path / "evaluation.json").read_text())
    rows = table["rows"]
    for name in (str(trained / "distilled"), str(trained / "twin"), "teacher"):
        assert 0 <= rows[name]["coverage_80"] <= 1 and rows[name]["wql"] > 0
        assert len(rows[name]["coverage_80_by_third"]) == 3
    assert "wql" not in rows["seasonal-naive"]


def test_evaluate_prints_what_it_stores(trained, tmp_path, capsys):
    words = ["evaluate", "--checkpoint", trained / "distilled", "--output_dir", tmp_path]
    assert md.main([str(word) for word in (*words, "--lang", "en", "--device", "cpu")]) == 0
    row = json.loads((tmp_path / "evaluation.json").read_text())["rows"][str(words[2])]
    out = capsys.readouterr().out
    assert f"WQL {row['wql']:.4f}" in out
    assert f"in the 80 % band {100 * row['coverage_80']:.1f} %" in out


def test_a_hub_folder_keeps_the_quantiles_and_its_card_their_coverage(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "distilled", run)
    words = ["export", "--checkpoint", run, "--format", "hub", "--output", tmp_path / "hub"]
    assert md.main([str(word) for word in words]) == 0
    student = md.PatchStudent.from_pretrained(tmp_path / "hub")
    expected = md.PatchStudent.from_pretrained(run).quantiles(walks(2))
    assert torch.equal(student.quantiles(walks(2)), expected)
    card = (tmp_path / "hub" / "README.md").read_text()
    coverage = json.loads((run / "evaluation.json").read_text())["rows"]["student"]["coverage_80"]
    assert "share in the 80 % band" in card and f"{coverage:.4f}" in card
    assert "student.quantiles(context)" in card


def test_predict_says_that_an_earlier_student_has_no_quantiles(trained, tmp_path, capsys):
    content = md.read_checkpoint(md.best_in(trained / "distilled"))
    del content["quantiles"], content["student_config"]["quantile_width"]
    weights = content["model_state_dict"]
    kept = {name: weights[name] for name in weights if not name.startswith("quantile_head.")}
    content["model_state_dict"] = kept
    torch.save(content, tmp_path / "old.pt")
    words = ["predict", "--checkpoint", tmp_path / "old.pt", "--lang", "en"]
    words += ["--input", trained / "data" / "s03.csv", "--output", tmp_path / "out.csv"]
    assert md.main([str(word) for word in words]) == 0
    assert list(pd.read_csv(tmp_path / "out.csv").columns) == ["date", "value"]
    assert "this student has no quantiles" in capsys.readouterr().err
