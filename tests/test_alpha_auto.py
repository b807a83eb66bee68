"""--alpha auto: every alpha is tried on validation, and what was found is said plainly."""

import contextlib
import io
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import hourly
from test_training import FIXED, differences, each_call, signal_at

import moirai_distill as md

ALPHAS = list(md.ALPHAS)
EPOCHS = md.TRIAL_EPOCHS + 1  # of the training after the trials
TRIAL_EPOCHS = len(ALPHAS) * md.TRIAL_EPOCHS  # of all trials together


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto") / "data"
    folder.mkdir()
    for number in range(3):
        hourly(200, seed=number).to_csv(folder / f"s{number}.csv", index=False)
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick_pictures():
    """An empty file stands for each picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(md, "draw", lambda path, _panels: Path(path).write_bytes(b""))
        yield


def run(data, save_dir, teacher, *more):
    words = ["train", "--data_dir", data, "--save_dir", save_dir, *FIXED]
    words += ["--teacher_model", teacher, "--label_cache", data.parent / "labels"]
    words += ["--alpha", "auto", "--num_epochs", EPOCHS, *more]
    return md.main([str(word) for word in words])


@pytest.fixture(scope="module")
def whole(data, teacher_folder, tmp_path_factory):
    """(folder of an uninterrupted run, what it printed)."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run(data, folder, teacher_folder) == 0
    return folder, printed.getvalue()


def tried_in(out):
    """alpha -> validation loss, as printed."""
    lines = re.findall(r"^  alpha ([\d.]+): validation loss ([\d.]+)$", out, re.M)
    return {float(alpha): float(loss) for alpha, loss in lines}


def best_of(folder):
    """Content of the best checkpoint of a run."""
    return md.read_checkpoint(md.best_in(folder))


def assert_same_last(folder, reference):
    """Two runs ended alike, to the bit."""
    mine = md.read_checkpoint(folder / "last.pt")
    other = md.read_checkpoint(reference / "last.pt")
    for part in ("model_state_dict", "optimizer_state_dict", "loop", "alpha_tried"):
        assert differences(mine[part], other[part], part) == []


def test_the_best_of_all_alphas_is_trained_and_said(whole):
    folder, out = whole
    losses = tried_in(out)
    assert list(losses) == ALPHAS
    assert len(set(losses.values())) == len(ALPHAS)
    best = min(losses, key=losses.get)
    content = best_of(folder)
    assert content["run_config"]["alpha"] == best
    assert {alpha: round(loss, 4) for alpha, loss in content["alpha_tried"].items()} == losses
    rival = 0.0 if best != 0 else sorted(losses, key=losses.get)[1]
    line = rf"^Best: alpha {best:g}, (.*) % of validation loss beside alpha {rival:g}$"
    change = re.search(line, out, re.M)[1]
    assert re.fullmatch(r"[+-]\d+\.\d", change)
    assert float(change) == pytest.approx(100 * (losses[best] / losses[rival] - 1), abs=0.06)
    assert out.count("Epoch 1/") == 1  # the trials print one line each
    assert f"Epoch {EPOCHS}/{EPOCHS}" in out
    assert not (folder / "trials").exists()


def test_a_trial_is_the_run_that_its_alpha_would_have_been(data, whole, teacher_folder, tmp_path):
    """The loss beside an alpha is that of a short run with it, the student that of a plain run."""
    folder, out = whole
    losses = tried_in(out)
    alpha = ALPHAS[1]
    flags = ["--alpha", alpha, "--num_epochs", md.TRIAL_EPOCHS]
    assert run(data, tmp_path / "short", teacher_folder, *flags) == 0
    short = md.read_checkpoint(tmp_path / "short" / "last.pt")
    assert losses[alpha] == round(short["loop"]["best_loss"], 4)
    best = min(losses, key=losses.get)
    assert run(data, tmp_path / "plain", teacher_folder, "--alpha", best) == 0
    one = best_of(folder)["model_state_dict"]
    other = best_of(tmp_path / "plain")["model_state_dict"]
    assert differences(one, other) == []


def test_a_teacher_that_misleads_is_told_plainly(
    data, teacher_folder, tmp_path, monkeypatch, capsys
):
    def label_windows(_teacher, windows, index, _request, seed):
        """The mirror image of the truth."""
        points = -windows.batch(index)[1].numpy()
        quantiles = points[:, None].repeat(len(md.LEVELS), 1)
        return md.WindowLabels(points, quantiles, np.ones((len(index), 1)))

    monkeypatch.setattr(md, "label_windows", label_windows)
    folder = tmp_path / "run"
    assert run(data, folder, teacher_folder, "--label_cache", tmp_path / "false") == 0
    out = capsys.readouterr().out
    losses = tried_in(out)
    none, half, full = (losses[alpha] for alpha in (0.0, ALPHAS[len(ALPHAS) // 2], ALPHAS[-1]))
    assert none < half < full
    assert "The teacher does not help here: this trains on truth alone" in out
    assert re.search(rf"Best: alpha 0, -.* beside alpha {ALPHAS[1]:g}$", out, re.M)
    content = best_of(folder)
    assert content["run_config"]["alpha"] == 0
    assert content["teacher"] is None  # its licence does not bind this student
    card = md.model_card(md.PatchStudent.from_pretrained(folder))
    assert "without a teacher" in card


class Killed(BaseException):
    pass


def kill_at(monkeypatch, epoch):
    """Let the script end at once at the end of its `epoch`-th epoch, which is not saved."""

    def act(number, _is_best):
        if number == epoch:
            raise Killed

    each_call(monkeypatch, "end_epoch", act)


@pytest.mark.parametrize(
    ("epoch", "left"),
    [
        (2, TRIAL_EPOCHS + EPOCHS),  # in the first trial
        (TRIAL_EPOCHS, TRIAL_EPOCHS + EPOCHS),  # at the end of the last one
        (TRIAL_EPOCHS + 1, EPOCHS),  # in the first epoch of the training after them
        (TRIAL_EPOCHS + 2, EPOCHS - 1),
    ],
)
def test_a_run_killed_in_a_trial_or_after_goes_on_as_if_it_had_never_stopped(
    data, whole, teacher_folder, tmp_path, monkeypatch, epoch, left
):
    """The trials are repeated, the training after them is not."""
    with monkeypatch.context() as patch:
        kill_at(patch, epoch)
        with pytest.raises(Killed):
            run(data, tmp_path, teacher_folder)
    assert (tmp_path / "trials").is_dir()
    done = []
    each_call(monkeypatch, "end_epoch", lambda number, _is_best: done.append(number))
    assert run(data, tmp_path, teacher_folder, "--resume") == 0
    assert len(done) == left
    assert_same_last(tmp_path, whole[0])
    assert not (tmp_path / "trials").exists()


def test_a_run_stopped_by_a_signal_in_a_trial_ends_at_once_and_can_be_resumed(
    data, whole, teacher_folder, tmp_path, monkeypatch, capsys
):
    in_the_second = md.TRIAL_EPOCHS + 1
    done = []
    with monkeypatch.context() as patch:
        each_call(patch, "end_epoch", lambda number, _is_best: done.append(number))
        signal_at(patch, "end_epoch", in_the_second, signal.SIGTERM)
        assert run(data, tmp_path, teacher_folder) == 143
    assert len(done) == in_the_second
    assert "the same command with --resume repeats the trials" in capsys.readouterr().err
    assert not (tmp_path / "last.pt").exists()
    assert run(data, tmp_path, teacher_folder, "--resume") == 0
    assert tried_in(capsys.readouterr().out) == tried_in(whole[1])
    assert_same_last(tmp_path, whole[0])


def test_trials_that_are_repeated_take_the_flags_of_the_command_that_resumes(
    data, teacher_folder, tmp_path, monkeypatch
):
    other = ["--num_epochs", 1, "--learning_rate", 5e-3]
    assert run(data, tmp_path / "other", teacher_folder, *other) == 0
    with monkeypatch.context() as patch:
        kill_at(patch, 3)  # two trials are done
        with pytest.raises(Killed):
            run(data, tmp_path / "run", teacher_folder, "--num_epochs", 1)
    assert run(data, tmp_path / "run", teacher_folder, *other, "--resume") == 0
    assert_same_last(tmp_path / "run", tmp_path / "other")


def test_resume_of_a_fixed_alpha_with_auto_and_of_nothing_is_refused(
    data, teacher_folder, tmp_path, capsys
):
    one = ["--num_epochs", 1]
    assert run(data, tmp_path / "fixed", teacher_folder, *one, "--alpha", 0.5) == 0
    assert run(data, tmp_path / "fixed", teacher_folder, *one, "--resume") == 2
    assert "--alpha was 0.5, is auto" in capsys.readouterr().err
    assert run(data, tmp_path / "nothing", teacher_folder, *one, "--resume") == 2
    assert "to go on from; start without --resume" in capsys.readouterr().err


def test_resume_of_a_fixed_alpha_does_not_take_trials_for_a_run(
    data, teacher_folder, tmp_path, monkeypatch, capsys
):
    kill_at(monkeypatch, 1)
    with pytest.raises(Killed):
        run(data, tmp_path, teacher_folder)
    assert (tmp_path / "trials" / f"{ALPHAS[0]:g}" / "last.pt").is_file()
    assert run(data, tmp_path, teacher_folder, "--resume", "--alpha", 0.5) == 2
    assert "to go on from; start without --resume" in capsys.readouterr().err


def test_resume_of_the_training_after_the_trials_refuses_other_flags(
    data, whole, teacher_folder, capsys
):
    folder, _ = whole
    assert run(data, folder, teacher_folder, "--resume", "--learning_rate", 1e-2) == 2
    assert "--learning_rate was 0.001, is 0.01" in capsys.readouterr().err


def test_a_run_of_trials_is_moved_away_whole_by_the_next_and_other_runs_are_left_alone(
    data, teacher_folder, tmp_path
):
    for name in ("trials/0.5", "alpha_0"):  # the second is a run of its own, or notes
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "last.pt").write_bytes(b"old")
    flags = ["--alpha", 0, "--num_epochs"]
    assert run(data, tmp_path, teacher_folder, *flags, 1) == 0
    (old,) = tmp_path.glob("old-*")
    assert (old / "trials" / "0.5" / "last.pt").read_bytes() == b"old"
    assert run(data, tmp_path, teacher_folder, *flags, 2, "--resume") == 0
    assert run(data, tmp_path, teacher_folder, "--num_epochs", 1) == 0
    assert (tmp_path / "alpha_0" / "last.pt").read_bytes() == b"old"


def test_trials_without_a_finite_loss_end_with_an_error(
    data, teacher_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(md, "MAX_FAILED", 10)  # more than the steps of a trial here
    flags = ["--learning_rate", "1e30", "--num_epochs", 1]
    assert run(data, tmp_path, teacher_folder, *flags) == 2
    captured = capsys.readouterr()
    assert "Best: " not in captured.out
    assert "does not help" not in captured.out
    assert "error: no alpha gave a finite validation loss" in captured.err


def test_trials_with_a_loss_of_zero_tell_no_percentage(teacher_folder, tmp_path, capsys):
    stuck = tmp_path / "stuck"
    stuck.mkdir()
    frame = hourly(400)
    frame.loc[200:, "value"] = 1.0  # a sensor that died: its constant is forecast exactly
    frame.to_csv(stuck / "s.csv", index=False)
    assert run(stuck, tmp_path / "zero", teacher_folder, "--num_epochs", 1) == 0
    assert "Best: alpha 0, +nan % of validation loss" in capsys.readouterr().out


def test_the_trials_are_known_after_a_resume_with_the_chosen_alpha(data, teacher_folder, tmp_path):
    assert run(data, tmp_path, teacher_folder, "--num_epochs", 1) == 0
    first = md.read_checkpoint(tmp_path / "last.pt")
    for epochs, alpha in ((2, first["run_config"]["alpha"]), (3, "auto")):
        flags = ["--alpha", alpha, "--num_epochs", epochs, "--resume"]
        assert run(data, tmp_path, teacher_folder, *flags) == 0
    last = md.read_checkpoint(tmp_path / "last.pt")
    assert last["epoch"] == 3
    assert last["alpha_tried"] == first["alpha_tried"]


def test_no_teacher_no_auto(data, tmp_path, capsys):
    assert run(data, tmp_path / "run", "./absent", "--label_cache", tmp_path / "none") == 2
    assert "--teacher_model ./absent: no such folder" in capsys.readouterr().err
    assert not list(tmp_path.rglob("trials"))
