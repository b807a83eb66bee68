"""What the benchmarks share: the script as `md`, and settings that its defaults do not change."""

import resource
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import moirai_distill as md  # noqa: E402

DEMO_TEACHER = ROOT / "checkpoints" / "demo_teacher"
LENGTH = 720  # points in
HORIZON = 96  # points out
STUDENT = {  # the student's sizes
    "context_length": LENGTH,
    "prediction_length": HORIZON,
    "d_model": 128,
    "num_layers": 4,
    "num_heads": 8,
    "patch_size": 16,
    "dropout": 0.1,
    "season": 24,
}


def train_flags(**changes):
    """The flags of `train` (a Namespace) at the script's defaults, but for `changes`."""
    flags = md.build_parser(demo=False).parse_args(["train"])
    assert not changes.keys() - vars(flags).keys()
    vars(flags).update(changes)
    return flags


def quiet_voice():
    """A Voice that says nothing and shows no progress."""
    voice = md.Voice("en")
    voice.is_on = False
    return voice


def make_job(device):
    """Job of one process on a device, named as by --device. Its voice speaks English."""
    flags = train_flags(device=str(device), devices=1, num_nodes=1)
    return md.start_job(flags, "32-true", md.Voice("en"), md.Stop())


def peak_memory():
    """Bytes of memory that this process took at its peak.

    What getrusage says is no less than the peak of the process that started this one, so it is
    asked only where the system has nothing better.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def read_config(*columns):
    """ReadConfig of these columns (default: the first), everything else as the script has it."""
    words = ["train", "--columns", *columns] if columns else ["train"]
    return md.pick(md.ReadConfig, md.build_parser(demo=False).parse_args(words))


def data_config(**changes):
    """DataConfig of 720 points in and 96 out, with all windows, but for `changes`."""
    settings = {
        "data_dir": "",
        "max_files": 0,
        "context_length": LENGTH,
        "prediction_length": HORIZON,
        "split_by": "auto",
        "split_ratio": (8.0, 1.0, 1.0),
        "split_seed": 0,
        "max_gap": 16,
        "season": "auto",
        "stride": 1,
        "max_windows": 0,
    }
    assert not changes.keys() - settings.keys()
    return md.DataConfig(**(settings | changes))


def whole_windows(series, config):
    """Windows of a list of RawSeries, each taken as a whole; every config.stride-th of them."""
    chosen = []
    for one in series:
        prepared = md.prepare_series(one, {"whole": (0, len(one.values))}, config)
        chosen.append((prepared, prepared.starts["whole"][:: config.stride]))
    return md.make_windows(chosen, config)


def teacher_request(name, **changes):
    """TeacherRequest of the median of 100 samples, in blocks of 256 windows, but for `changes`."""
    settings = {
        "teacher_model": str(name),
        "teacher_revision": None,
        "teacher_patch_size": "auto",
        "teacher_point": "median",
        "num_samples": 100,
        "teacher_batch_size": 256,
        "teacher_precision": "32",
        "quantiles": "off",
        "label_cache": "",
    }
    assert not changes.keys() - settings.keys()
    return md.TeacherRequest(**(settings | changes))


def fit(model, student_config, windows, validation, labels, flags, job):
    """Train a model by the script's loop, into the folder flags.save_dir. Returns its Progress."""
    training = md.Training(
        windows=windows,
        validation=validation,
        labels=labels,
        config=md.pick(md.TrainConfig, flags),
        facts={
            "format": md.FORMAT,
            "student_config": student_config,
            "run_config": dict(vars(flags)),
        },
        folder=Path(flags.save_dir),
    )
    return md.fit(model, training, job)
