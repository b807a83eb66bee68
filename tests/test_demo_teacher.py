"""The teacher that is shipped: small, all patch sizes trained, better than naive on new series."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import DEMO_TEACHER, SCRIPT, data_config, load_teacher, read_config

import moirai_distill as md

sys.path.insert(0, str(SCRIPT.parent / "benchmarks"))
import pretrain_demo_teacher as pretrain  # noqa: E402
import real_series  # noqa: E402


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
    assert config["patch_sizes"] == [4, 8, 16, 32]
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


def test_it_knows_calendars_other_than_hours(monkeypatch):
    chosen = {}
    for name in ("quarters", "months, short", "weeks", "working days"):
        chosen[name] = pretrain.HELD_OUT_CALENDARS[name]
    monkeypatch.setattr(pretrain, "HELD_OUT_CALENDARS", chosen)
    rows = pretrain.score_calendars(load_teacher(DEMO_TEACHER).module, 128)
    assert [row["calendar"] for row in rows] == list(chosen)
    ratios = np.array([row["mase"] for row in rows])  # over seasonal-naive's
    assert np.exp(np.log(ratios).mean()) < 0.95
    assert 0.75 < np.mean([row["coverage"] for row in rows]) < 0.85


# -- How it is trained -----------------------------------------------------------------------------


def small_module(patch_sizes, seed=0):
    torch.manual_seed(seed)
    module = pretrain.build_module(64, 2, patch_sizes)
    pretrain.fix_rotary_tables(module)
    return module.eval()


def test_a_new_patch_size_reads_and_writes_as_the_double_one():
    old = small_module([8, 16])
    new = small_module([4, 8, 16])
    torch.nn.init.normal_(new.in_proj.weight)  # what is not copied shows
    pretrain.add_patch_sizes(old.state_dict(), [8, 16], new)
    values = torch.randn(3, 5, 4)
    twice = values.repeat_interleave(2, -1)
    with torch.no_grad():
        for patch in (8, 16):
            context = torch.randn(3, 80)
            before = pretrain.forecast(old, context, 32, patch, 0)["mean"]
            after = pretrain.forecast(new, context, 32, patch, 0)["mean"]
            assert torch.equal(before, after)
        of_four = values @ new.in_proj.weight[0, :, :4].T + new.in_proj.bias[0]
        of_eight = twice @ old.in_proj.weight[0, :, :8].T + old.in_proj.bias[0]
        torch.testing.assert_close(of_four, of_eight)

        reprs = torch.randn(3, 5, 64)
        means = pretrain.native_parameters(new, reprs, 4)["components"][0]["loc"]
        pairs = pretrain.native_parameters(old, reprs, 8)["components"][0]["loc"]
        torch.testing.assert_close(means, pairs.unflatten(-1, (-1, 2)).mean(-1))


def test_the_finished_teacher_keeps_a_share_of_what_it_started_from():
    start = small_module([8, 16])
    module = small_module([4, 8, 16], seed=1)
    trained = {name: p.clone() for name, p in module.named_parameters()}
    pretrain.blend_with_start(module, start, 0.25)
    expected = 0.75 * trained["mask_encoding.weight"] + 0.25 * start.mask_encoding.weight
    torch.testing.assert_close(module.mask_encoding.weight, expected)
    eights = 0.75 * trained["in_proj.bias"][1] + 0.25 * start.in_proj.bias[0]
    torch.testing.assert_close(module.in_proj.bias[1], eights)


def test_the_lean_encoder_is_the_encoder():
    module = small_module([8, 16])
    window = {"value": torch.randn(3, 96), "seen": torch.rand(3, 96) < 0.9}
    window["future"] = (torch.arange(96) >= 64).expand(3, -1)
    window["seen"] |= window["future"]
    window["inside"] = torch.arange(96) >= torch.tensor([[0], [17], [40]])  # padded on the left
    window["seen"] &= window["inside"]
    tokens = pretrain.tokenise(module, window, 8)
    lean = pretrain.lean_encoder(module)
    with torch.no_grad():
        expected = pretrain.predict_tokens(module, tokens, 8, 4)
        found = pretrain.predict_tokens(module, tokens, 8, 4, lean)
    for one, other in zip(expected["components"], found["components"], strict=True):
        torch.testing.assert_close(one["loc"], other["loc"])


@pytest.mark.parametrize("length", [96, 480])
def test_the_family_of_calendars_is_finite_seeded_and_seasonal(length):
    def draw(seed):
        return pretrain.calendar_family(400, torch.Generator().manual_seed(seed), length)

    values, season = draw(3)
    assert values.shape == (400, length)
    assert values.isfinite().all()
    assert {1, 4, 5, 7, 12, 52} <= set(season.tolist())
    assert torch.equal(values, draw(3)[0])
    assert not torch.equal(values, draw(4)[0])
    monthly = pretrain.standardise(values[season == 12])
    after_a_year = (monthly[:, 12:] - monthly[:, :-12]).square().mean()
    after_half_a_year = (monthly[:, 6:] - monthly[:, :-6]).square().mean()
    assert after_a_year < 0.7 * after_half_a_year


@pytest.mark.parametrize("patch", [4, 32])
def test_windows_of_calendars_have_horizons_of_whole_patches_and_contexts_of_any_length(patch):
    shape = pretrain.Shape(160, 64, (4, 8, 16, 32), "calendars", 1)
    generator = torch.Generator().manual_seed(0)
    values, _ = pretrain.calendar_family(300, generator, 160)
    d = pretrain.Draw(300, generator)
    horizon, start = pretrain.draw_calendar_cuts(d, shape, patch)
    window = pretrain.cut_windows(values, d, horizon, start, vary=True)
    horizons = window["future"].sum(1)
    contexts = (window["inside"] & ~window["future"]).sum(1)
    assert (horizons % patch == 0).all()
    assert horizons.min() > 0
    assert horizons.max() == 64
    assert contexts.min() in range(16, 30)
    assert contexts.max() == 160 - patch
    assert (window["value"][~window["inside"]] == 0).all()  # as a teacher's calls are padded


def test_a_stopped_second_stage_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch, capsys):
    class StopAfterTwo:
        """Asks to leave when the loop looks for the third time: before its third step."""

        looks = 0

        @property
        def signal(self):
            self.looks += 1
            return 15 if self.looks == 3 else 0

    class StopNever:
        signal = 0

    monkeypatch.setattr(pretrain, "score_calendars", lambda *_: [])
    monkeypatch.setattr(pretrain, "calendar_table", lambda _: "")
    monkeypatch.setattr(pretrain, "draw_picture", lambda *_: None)
    monkeypatch.setattr(pretrain, "validation_sets", lambda *_: {})

    def run(name, *more):
        argv = f"--calendars --patch_sizes 8 16 --d_model 64 --num_layers 1 --steps 4 {more[0]}"
        argv += f" --batch_size 2 --device cpu --save_dir {tmp_path / name}"
        pretrain.main([*argv.split(), "--run_dir", str(tmp_path / f"{name}_run")])
        return (tmp_path / name / "model.safetensors").read_bytes()

    monkeypatch.setattr(pretrain, "Stop", StopNever)
    whole = run("whole", "")
    monkeypatch.setattr(pretrain, "Stop", StopAfterTwo)
    half = run("halves", "")
    assert "stopped at step 2" in capsys.readouterr().out
    monkeypatch.setattr(pretrain, "Stop", StopNever)
    assert run("halves", "--resume") == whole
    assert half != whole


# -- The ruler of real series ----------------------------------------------------------------------


def test_a_real_series_is_scored_as_the_tool_scores(monkeypatch):
    values = np.random.default_rng(0).normal(size=120).cumsum()
    monkeypatch.setitem(real_series.LENGTHS, "weeks", (7, 40, 8))
    args = real_series.build_parser().parse_args(["--num_samples", "5", "--max_windows", "1000"])

    class LastSeason:
        """A teacher that is seasonal-naive with patches of 8, and far off with those of 16."""

        def patch_sizes(self, length, horizon):
            return [16, 8]

        def forecast(self, context, horizon, patch, point, samples):
            assert (point, samples) == ("median", 5)
            naive = md.seasonal_naive(context, torch.full((len(context),), 7), horizon)
            return naive + (100 if patch == 16 else 0)

    row = real_series.score_series(values, "weeks", LastSeason(), args)
    assert row["patch"] == 8
    assert row["mase"] == row["naive"]
    ratios = []
    for start in range(36, 73):  # the later half of 73 windows
        context = values[start : start + 40]
        truth = values[start + 40 : start + 48]
        error = np.abs(context[33 + np.arange(8) % 7] - truth).mean()
        ratios.append(error / np.abs(context[7:] - context[:-7]).mean())
    assert row["windows"] == 37
    assert row["mase"] == pytest.approx(np.mean(ratios))


def test_a_series_whose_package_is_missing_is_left_out():
    source = real_series.Source("none", "weeks", "no_such_package.datasets", lambda module: [1.0])
    assert real_series.read(source) is None
    here = real_series.Source("here", "weeks", "json", lambda module: [1, np.nan, 2])
    assert real_series.read(here).tolist() == [1, 2]
