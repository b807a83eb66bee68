"""--alpha auto: every alpha is tried on validation, the best is kept, and what was found is said plainly."""

import re

import pytest
import torch
from conftest import SMALL, hourly

import moirai_distill as md

ALPHAS = [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto") / "data"
    folder.mkdir()
    for number in range(3):
        hourly(200, seed=number).to_csv(folder / f"s{number}.csv", index=False)
    return folder


def command(data, save_dir, teacher, *more):
    flags = f"{SMALL} --max_windows 16 --batch_size 8 --num_epochs 4 --learning_rate 1e-3 --lang en --alpha auto"
    flags += f" --teacher_patch_size 16 --teacher_point mean --teacher_model {teacher}"
    cache = ["--label_cache", str(data.parent / "labels")]
    return ["--data_dir", str(data), "--save_dir", str(save_dir), *flags.split(), *cache, *map(str, more)]


def oracle(monkeypatch, sign):
    """Labels become the truth (sign 1: a perfect teacher) or its mirror image (sign -1: one that misleads)."""

    def label_windows(_teacher, windows, index, *_):
        return sign * windows.batch(index)[1].numpy()

    monkeypatch.setattr(md, "label_windows", label_windows)


def tried(out):
    """alpha -> validation loss, as printed."""
    return {float(a): float(loss) for a, loss in re.findall(r"^  alpha ([\d.]+): validation loss ([\d.]+)$", out, re.M)}


def test_the_best_of_five_alphas_is_trained_and_said(data, teacher_folder, tmp_path, capsys):
    assert md.main(command(data, tmp_path / "run", teacher_folder)) == 0
    out = capsys.readouterr().out
    losses = tried(out)
    assert list(losses) == ALPHAS and len({*losses.values()}) == 5
    best = min(losses, key=losses.get)
    content = md.read_checkpoint(md.best_in(tmp_path / "run"))
    assert content["run_config"]["alpha"] == best
    assert {alpha: round(loss, 4) for alpha, loss in content["alpha_tried"].items()} == losses
    rival = 0.0 if best else sorted(losses, key=losses.get)[1]
    change = re.search(rf"^Best: alpha {best:g}, ([+-][\d.]+) % of validation loss beside alpha {rival:g}$", out, re.M)
    assert float(change[1]) == pytest.approx(100 * (losses[best] / losses[rival] - 1), abs=0.06)
    assert out.count("Epoch 1/") == 1 and "Epoch 4/4" in out  # the trials print one line each
    assert not (tmp_path / "run" / "trials").exists()


def test_a_trial_is_the_run_that_its_alpha_would_have_been(data, teacher_folder, tmp_path, capsys):
    """The loss beside 0.25 is that of a run of 3 epochs with --alpha 0.25, and the student is that of a plain run."""
    assert md.main(command(data, tmp_path / "run", teacher_folder)) == 0
    losses = tried(capsys.readouterr().out)
    assert md.main(command(data, tmp_path / "quarter", teacher_folder, "--alpha", 0.25, "--num_epochs", 3)) == 0
    loss = md.read_checkpoint(tmp_path / "quarter" / "last.pt")["loop"]["best_loss"]
    assert losses[0.25] == round(loss, 4)
    best = min(losses, key=losses.get)
    assert md.main(command(data, tmp_path / "plain", teacher_folder, "--alpha", best)) == 0
    contents = [md.read_checkpoint(md.best_in(tmp_path / name)) for name in ("run", "plain")]
    first, second = (content["model_state_dict"] for content in contents)
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_a_teacher_that_knows_the_truth_helps_and_one_that_misleads_is_told_plainly(
    data, teacher_folder, tmp_path, monkeypatch, capsys
):
    oracle(monkeypatch, -1)
    cache = ["--label_cache", tmp_path / "false"]
    assert md.main(command(data, tmp_path / "run", teacher_folder, *cache)) == 0
    out = capsys.readouterr().out
    losses = tried(out)
    assert losses[0.0] < losses[0.5] < losses[1.0]
    assert "The teacher does not help here: this trains on truth alone" in out
    assert "Best: alpha 0, -" in out and "beside alpha 0.25" in out
    content = md.read_checkpoint(md.best_in(tmp_path / "run"))
    assert content["run_config"]["alpha"] == 0 and content["teacher"] is None  # its licence does not bind this student
    assert md.PatchStudent.from_pretrained(tmp_path / "run").generate_model_card().content.count("without a teacher")


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("epochs_before", [1, 4, 7, 14, 16])
def test_a_run_stopped_in_a_trial_or_after_goes_on_as_if_it_had_never_stopped(
    data, teacher_folder, tmp_path, monkeypatch, capsys, epochs_before
):
    whole = data.parent / "whole"
    if not whole.exists():
        assert md.main(command(data, whole, teacher_folder)) == 0
    real, done = md.end_epoch, []

    def end_epoch(*more):
        if len(done) == epochs_before:
            raise Stopped
        done.append(1)
        return real(*more)

    monkeypatch.setattr(md, "end_epoch", end_epoch)
    with pytest.raises(Stopped):
        md.main(command(data, tmp_path / "run", teacher_folder))
    done.clear()
    monkeypatch.setattr(md, "end_epoch", lambda *more: done.append(1) or real(*more))
    assert md.main(command(data, tmp_path / "run", teacher_folder, "--resume")) == 0
    assert len(done) == 19 - epochs_before  # nothing is done twice
    first, second = (md.read_checkpoint(folder / "last.pt") for folder in (whole, tmp_path / "run"))
    assert first["alpha_tried"] == second["alpha_tried"] and first["loop"] == second["loop"]
    for name, weight in first["model_state_dict"].items():
        assert torch.equal(weight, second["model_state_dict"][name])


def test_resume_of_a_fixed_alpha_with_auto_and_of_other_flags_in_a_trial_is_refused(
    data, teacher_folder, tmp_path, monkeypatch, capsys
):
    assert md.main(command(data, tmp_path / "fixed", teacher_folder, "--alpha", 0.5)) == 0
    assert md.main(command(data, tmp_path / "fixed", teacher_folder, "--resume")) == 2
    assert "--alpha was 0.5, is auto" in capsys.readouterr().err
    assert md.main(command(data, tmp_path / "nothing", teacher_folder, "--resume")) == 2
    assert "to go on from; start without --resume" in capsys.readouterr().err
    monkeypatch.setattr(md, "end_epoch", lambda *_: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        md.main(command(data, tmp_path / "run", teacher_folder))
    assert (tmp_path / "run" / "trials" / "0" / "last.pt").is_file()
    assert md.main(command(data, tmp_path / "run", teacher_folder, "--resume", "--learning_rate", "1e-2")) == 2
    assert "--learning_rate was 0.001, is 0.01" in capsys.readouterr().err


def test_a_run_of_trials_is_moved_away_whole_by_the_next_and_other_runs_are_left_alone(data, teacher_folder, tmp_path):
    run = tmp_path / "run"
    for folder in (run / "trials" / "0.5", run / "alpha_0"):  # the second is a run of its own, or notes
        folder.mkdir(parents=True)
        (folder / "last.pt").write_bytes(b"old")
    assert md.main(command(data, run, teacher_folder, "--alpha", 0, "--num_epochs", 1)) == 0
    (old,) = run.glob("old-*")
    assert (old / "trials" / "0.5" / "last.pt").read_bytes() == b"old"
    assert md.main(command(data, run, teacher_folder, "--alpha", 0, "--num_epochs", 2, "--resume")) == 0
    assert md.main(command(data, run, teacher_folder, "--num_epochs", 1)) == 0
    assert (run / "alpha_0" / "last.pt").read_bytes() == b"old"


def test_trials_without_a_finite_loss_and_with_one_of_zero(data, teacher_folder, tmp_path, capsys):
    assert md.main(command(data, tmp_path / "wild", teacher_folder, "--learning_rate", "1e30", "--num_epochs", 1)) == 2
    captured = capsys.readouterr()
    assert "Best: " not in captured.out and "does not help" not in captured.out
    assert re.search(r"error: (no alpha gave a finite validation loss|10 steps in a row)", captured.err)
    (tmp_path / "stuck").mkdir()
    frame = hourly(400)
    frame.loc[200:, "value"] = 1.0  # a sensor that died: its constant is forecast exactly
    frame.to_csv(tmp_path / "stuck" / "s.csv", index=False)
    assert md.main(command(tmp_path / "stuck", tmp_path / "zero", teacher_folder, "--num_epochs", 1)) == 0
    assert "Best: alpha 0, +nan % of validation loss" in capsys.readouterr().out


def test_the_trials_are_known_after_a_resume_with_the_chosen_alpha(data, teacher_folder, tmp_path):
    assert md.main(command(data, tmp_path / "run", teacher_folder, "--num_epochs", 1)) == 0
    first = md.read_checkpoint(tmp_path / "run" / "last.pt")
    for epochs, alpha in ((2, first["run_config"]["alpha"]), (3, "auto")):
        flags = ("--resume", "--alpha", alpha, "--num_epochs", epochs)
        assert md.main(command(data, tmp_path / "run", teacher_folder, *flags)) == 0
    last = md.read_checkpoint(tmp_path / "run" / "last.pt")
    assert last["epoch"] == 3 and last["alpha_tried"] == first["alpha_tried"]


def test_no_teacher_no_auto(data, tmp_path, capsys):
    assert md.main(command(data, tmp_path / "run", "./absent", "--label_cache", tmp_path / "none")) == 2
    assert "--teacher_model ./absent: no such folder" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.name == "trials"]
