"""How fast the script labels, trains, loads and forecasts: every figure a ratio of two things timed in this one run.

    python benchmarks/speed.py                            # all rows, within 12 minutes on two cores
    python benchmarks/speed.py --rows labelling training  # some of them
    python benchmarks/speed.py --device cuda              # the rows that a GPU has, on it
    python benchmarks/speed.py --check                    # exit code 1 where a figure falls short
    python benchmarks/speed.py --growth docs/growth.png   # time against windows and files, four sizes each

Two things are timed in turn, several times; a ratio is the median of the ratios of neighbours, its spread the lowest
and the highest. Beside a time stand its two floors: operations over the matmul rate, and bytes over the copying rate,
both measured here (bytes: each weight, and each result of a linear map, as often as it must be written and read).
Teachers have random weights in the shapes of MOIRAI small and base, which changes no time.
"""

import argparse
import contextlib
import copy
import io
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import moirai_distill as md  # noqa: E402

LENGTH, HORIZON, PATCH = 720, 96, 32
SHAPES = {"small": (384, 6), "base": (768, 12)}
STUDENT = {"d_model": 128, "num_layers": 4, "num_heads": 8, "patch_size": 16, "dropout": 0.1, "season": 24}


@dataclass
class Figure:
    """One line of the table."""

    what: str
    ratio: float
    spread: tuple  # lowest and highest ratio
    limit: float
    most: bool  # whether `limit` is the most, not the least, that is good
    times: str  # what was timed, with floors

    def good(self):
        return self.ratio <= self.limit if self.most else self.ratio >= self.limit


RATES = {"matmul": math.nan, "copy": math.nan}  # operations and bytes per second, as measured at the start


def floors(macs, width, layers, tokens, weights, batch, passes):
    """Text of the two floors of a window in ms; `passes`: 1 forward alone, 3 forward and backward."""
    results = 4 * layers * tokens * 14 * width * 2 * (passes if passes == 1 else 2)  # qkv, out, 4 D twice, norms
    moved = results + 4 * weights * (1 if passes == 1 else 9) / batch  # AdamW: gradient and two moments, both ways
    return (
        f"floors {2e3 * passes * macs / RATES['matmul']:.2f} by operations, {1e3 * moved / RATES['copy']:.2f} by bytes"
    )


def race(calls, repeats, device):
    """name -> seconds of each repeat; the calls take turns, after one round that is not counted."""
    took = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            took[name] += [time.perf_counter() - begin] * (number > 0)
    return took


def figure(what, took, above, below, limit, most, times, scale=1.0):
    """Figure of the ratio `scale` * above / below of two names of a race."""
    ratios = [scale * a / b for a, b in zip(took[above], took[below], strict=True)]
    return Figure(what, statistics.median(ratios), (min(ratios), max(ratios)), limit, most, times)


def rates(device):
    """(matmul operations per second, bytes copied per second), float32, the best of several runs."""
    a, b = (torch.randn(1536, 1536, device=device) for _ in range(2))
    big = torch.empty(2**26, device=device)
    took = race({"matmul": lambda: a @ b, "copy": lambda: big.clone()}, 5, device)
    return 2 * 1536**3 / min(took["matmul"]), 2 * 4 * 2**26 / min(took["copy"])


# ------------------------------------------------------------------------------------------------ what is measured on


def series_windows(count, seed=0):
    """Windows: `count` of one random walk with a daily cycle."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(count + LENGTH + HORIZON - 1).cumsum() * 0.1
    values += np.sin(2 * np.pi * np.arange(len(values)) / 24)
    item = md.prepare(md.Series("walk", values, "h"), {"whole": (0, len(values))}, LENGTH + HORIZON, HORIZON, 0)
    return md.pack([(item, item.starts["whole"])], "auto", LENGTH + HORIZON, HORIZON)


def moirai(shape, device):
    """A MoiraiModule with random weights and the four mixture components of Salesforce's."""
    from uni2ts.distribution import (
        LogNormalOutput,
        MixtureOutput,
        NegativeBinomialOutput,
        NormalFixedScaleOutput,
        StudentTOutput,
    )
    from uni2ts.model.moirai.module import MoiraiModule

    width, layers = SHAPES[shape]
    outputs = MixtureOutput([StudentTOutput(), NormalFixedScaleOutput(), NegativeBinomialOutput(), LogNormalOutput()])
    settings = {"patch_sizes": (8, 16, 32, 64, 128), "max_seq_len": 512, "attn_dropout_p": 0.0, "dropout_p": 0.0}
    torch.manual_seed(0)
    return MoiraiModule(outputs, d_model=width, num_layers=layers, **settings).to(device)


def own_forecaster(module, patch):
    """uni2ts's forecaster of one variate."""
    from uni2ts.model.moirai.forecast import MoiraiForecast

    lengths = {"context_length": LENGTH, "prediction_length": HORIZON, "patch_size": patch}
    extra = {"target_dim": 1, "feat_dynamic_real_dim": 0, "past_feat_dynamic_real_dim": 0}
    return MoiraiForecast(module=module, **lengths, **extra).eval()


def own_inputs(context):
    """What uni2ts's forecaster takes for contexts (B, L): values, observed, padded."""
    return context[..., None], torch.ones_like(context)[..., None].bool(), torch.zeros_like(context).bool()


def bare_forward(module, context):
    """Call of the module's own forward on contexts (B, L), its inputs laid out beforehand as uni2ts does."""
    kept = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: kept.append((args, kwargs)), with_kwargs=True)
    own_forecaster(module, PATCH)._get_distr(PATCH, *own_inputs(context))
    hook.remove()
    (args, kwargs) = kept[0]
    return lambda: module(*args, **kwargs)


def multiplications(module, tokens, horizon_tokens):
    """Multiply-and-adds of one window in MOIRAI's linear maps and attention, parameters for the horizon only."""
    width, layers = module.d_model, module.num_layers
    weights = sum(p.numel() for n, p in module.encoder.named_parameters() if n.endswith("weight") and p.ndim == 2)
    outputs = 32 * (4 + sum((3, 1, 2, 2))) * width
    return weights * tokens + 2 * layers * tokens**2 * width + 32 * width * tokens + outputs * horizon_tokens


# ----------------------------------------------------------------------------------------------------------- the rows


@torch.inference_mode()
def labelling(device):
    """Labels against the bare network, against uni2ts's forecaster, and against its patch_size="auto"."""
    figures = []
    windows = series_windows(512)
    for shape, bare_most, own_least, auto_least in (("small", 1.35, 13, 110), ("base", 1.05, 4, 40)):
        module = moirai(shape, device)
        teacher = md.Teacher(module, device, "32", print)
        request = md.Request(shape, None, PATCH, "median", 100)
        many, few = 256, 8  # windows a call: a block of labels, and what uni2ts's auto can be waited for
        context = windows.batch(np.arange(many))[0].to(device)
        calls = {"bare": bare_forward(module, context)}
        calls["labels"] = lambda n=many, t=teacher, r=request: md.label_windows(
            t, windows, np.arange(n), {"h": PATCH}, r, 0
        )
        took = race(calls, 5 if shape == "small" else 3, device)
        per = {name: 1e3 * statistics.median(seconds) / many for name, seconds in took.items()}
        tokens, weights = -(-LENGTH // PATCH) + HORIZON // PATCH, sum(p.numel() for p in module.encoder.parameters())
        macs = multiplications(module, tokens, HORIZON / PATCH)
        text = f"{per['labels']:.2f} ms a window, network {per['bare']:.2f}, "
        text += floors(macs, *SHAPES[shape], tokens, weights, many, 1)
        figures.append(figure(f"labels / bare forward, {shape}", took, "labels", "bare", bare_most, True, text))
        for patch, count, repeats, limit in ((PATCH, many, 1, own_least), ("auto", few, 1, auto_least)):
            own, inputs = own_forecaster(module, patch), own_inputs(context[:count])
            if patch == "auto":  # it wants the horizon's points, too, and forecasts after them
                inputs = own_inputs(torch.cat([context[:count], context[:count, -HORIZON:]], 1))
            calls = {"own": lambda own=own, inputs=inputs: own(*inputs, num_samples=100), "labels": calls["labels"]}
            took = race(calls, repeats, device)
            text = f"{1e3 * statistics.median(took['own']) / count:.0f} ms a window"
            name = f"uni2ts, patch {patch} / labels, {shape}"
            figures.append(figure(name, took, "own", "labels", limit, False, text, many / count))
    return figures


@torch.inference_mode()
def generations(device):
    """Labels of the other MOIRAI generations, small, against the forward of uni2ts's own forecast class."""
    from uni2ts.distribution import LogNormalOutput, MixtureOutput, NormalFixedScaleOutput, StudentTOutput
    from uni2ts.model.moirai2 import Moirai2Forecast, Moirai2Module
    from uni2ts.model.moirai_moe import MoiraiMoEForecast, MoiraiMoEModule

    figures, windows = [], series_windows(256)
    sizes = {"d_model": 384, "num_layers": 6, "max_seq_len": 512, "attn_dropout_p": 0.0, "dropout_p": 0.0}
    outputs = MixtureOutput([StudentTOutput(), NormalFixedScaleOutput(), LogNormalOutput()])
    experts = MoiraiMoEModule(outputs, patch_sizes=(16,), d_ff=512, **sizes).to(device)
    experts.encoder.centroid.normal_()  # uni2ts leaves what routes tokens to experts uninitialised
    second = Moirai2Module(patch_size=16, d_ff=1024, num_predict_token=4, **sizes).to(device)
    gpu = device.type == "cuda"
    for name, module, kind, count in (
        ("MOIRAI-MoE", experts, MoiraiMoEForecast, 64 if gpu else 1),
        ("MOIRAI 2.0", second, Moirai2Forecast, 256 if gpu else 32),
    ):
        teacher = md.Teacher(module, device, "32", print, kind)
        samples = 100 if gpu else 5
        request = md.Request(name, None, 16, "median", samples)
        context = windows.batch(np.arange(count))[0].to(device)
        settings = {"target_dim": 1, "feat_dynamic_real_dim": 0, "past_feat_dynamic_real_dim": 0, "module": module}
        settings |= {"num_samples": samples} if kind is MoiraiMoEForecast else {}
        own = kind(context_length=LENGTH, prediction_length=HORIZON, **settings).eval()
        inputs, index = own_inputs(context), np.arange(count)
        calls = {"own": lambda own=own, inputs=inputs: own(*inputs)}
        calls["labels"] = lambda t=teacher, r=request, i=index: md.label_windows(t, windows, i, {"h": 16}, r, 0)
        took = race(calls, 2, device)
        text = f"{1e3 * statistics.median(took['labels']) / count:.4g} ms a window"
        text += f" of {samples} samples" if kind is MoiraiMoEForecast else ""
        near = {"64": lambda t=teacher, c=context: t.forecast(c, 64, 16, "median", samples)}  # noqa: B023
        text += f", {1e3 * min(race(near, 2, device)['64']) / count:.4g} at 64 steps"
        figures.append(figure(f"{name}, its own forward / labels, small", took, "own", "labels", 0.9, False, text))
    return figures


class PlainStudent(nn.Module):
    """The student's shape with torch.nn.TransformerEncoder as its body."""

    def __init__(self):
        super().__init__()
        self.embed, patches = nn.Linear(16, 128), math.ceil(LENGTH / 16)
        self.position = nn.Parameter(torch.randn(patches, 128) * 0.02)
        settings = {"dropout": 0.1, "activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(128, 8, 512, **settings)
        self.encoder = nn.TransformerEncoder(layer, 4, nn.LayerNorm(128), enable_nested_tensor=False)
        self.head = nn.Linear(patches * 128, HORIZON)

    def forward(self, context):
        centre, deviation = md.instance_scale(context)
        tokens = self.embed(((context - centre) / deviation).unflatten(1, (-1, 16))) + self.position
        return self.head(self.encoder(tokens).flatten(1)) * deviation + centre


def student_of(kind, device, seed=0):
    """(student or its plain twin, fused AdamW)."""
    torch.manual_seed(seed)
    lengths = {"context_length": LENGTH, "prediction_length": HORIZON}
    model = (md.PatchStudent(**lengths, **STUDENT) if kind == "student" else PlainStudent()).to(device).train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def step_of(kind, batch, device):
    """Call of one training step: forward, backward, clip, step."""
    (context, truth), (model, optimizer) = batch, student_of(kind, device)

    def step():
        loss = nn.functional.mse_loss(model(context), truth)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def student(device):
    """The student's step and forecast against nn.TransformerEncoder's, and against the matmul rate."""
    windows = series_windows(64)
    batch = [part.to(device) for part in windows.batch(np.arange(32))[:2]]
    steps = {kind: step_of(kind, batch, device) for kind in ("plain", "student")}
    calls = {kind: lambda step=step: [step() for _ in range(10)] for kind, step in steps.items()}
    a, b = (torch.randn(1536, 1536, device=device) for _ in range(2))
    took = race(calls | {"matmul": lambda: [a @ b for _ in range(10)]}, 9, device)
    per = {name: 1e3 * statistics.median(seconds) / 320 for name, seconds in took.items()}
    tokens = LENGTH // 16
    macs = 4 * (tokens * 12 * 128**2 + 2 * tokens**2 * 128) + tokens * 16 * 128 + tokens * 128 * HORIZON
    operations = (
        320 * 6 * macs / (10 * 2 * 1536**3)
    )  # of ten steps, over ten products: two each, forward, twice backward
    size = sum(p.numel() for p in student_of("student", device)[0].parameters())
    text = f"{per['student']:.2f} ms a window, plain {per['plain']:.2f}, {floors(macs, 128, 4, tokens, size, 32, 3)}"
    figures = [figure("training step, nn.TransformerEncoder / student", took, "plain", "student", 1.4, False, text)]
    text = f"{6e-6 * macs / per['student']:.0f} GFLOP/s; products of 1536 x 1536 in turn with the steps"
    share = figure("training step, share of the matmul rate", took, "matmul", "student", 0.45, False, text, operations)
    models = {kind: student_of(kind, device)[0].eval() for kind in ("plain", "student")}
    with torch.inference_mode():
        took = race({kind: lambda m=m: [m(batch[0]) for _ in range(10)] for kind, m in models.items()}, 9, device)
    text = (
        f"{1e3 * statistics.median(took['student']) / 320:.2f} ms a window, {floors(macs, 128, 4, tokens, size, 32, 1)}"
    )
    forecast = figure("forecast, nn.TransformerEncoder / student", took, "plain", "student", 0.9, False, text)
    return [*figures, share, forecast, curve(device)]


def curve(device, epochs=5):
    """Best validation MSE of the plain twin over the student's, same windows, order and optimiser, three seeds each."""
    with tempfile.TemporaryDirectory() as folder:  # of the demo family: whole series are held out
        md.write_demo_csvs(folder)
        parts = load(Path(folder), max_windows=48)
    windows, validation = parts["train"], parts["validation"]
    held = [part.to(device) for part in validation.batch(np.arange(0, len(validation), 4))[:2]]
    best = {}
    for kind in ("plain", "student"):
        best[kind] = []
        for seed in range(3):
            model, optimizer = student_of(kind, device, seed)
            losses = []
            for epoch in range(epochs):
                model.train()
                order = np.random.default_rng((seed, epoch)).permutation(len(windows))
                for index in np.split(order, len(windows) // 32):
                    context, truth = (part.to(device) for part in windows.batch(index)[:2])
                    loss = nn.functional.mse_loss(model(context), truth)
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                with torch.inference_mode():
                    losses.append(float(nn.functional.mse_loss(model.eval()(held[0]), held[1])))
            best[kind].append(min(losses))
    ratios = [p / s for p, s in zip(best["plain"], best["student"], strict=True)]
    plain, own = (np.mean(best[kind]) for kind in ("plain", "student"))
    text = f"best of {epochs} epochs, three seeds: plain {plain:.4f}, student {own:.4f}"
    return Figure(
        "validation MSE, nn.TransformerEncoder / student",
        float(np.mean(ratios)),
        (min(ratios), max(ratios)),
        0.98,
        False,
        text,
    )


class Labels:
    """Labels in memory, for the loop."""

    def __init__(self, array):
        self.array = array

    batch = md.LabelFile.batch


def start_fabric(device):
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator=device.type, devices=1)
    fabric.launch()
    return fabric


def training(device):
    """Windows per second of the loop, an epoch as the user gets it, against the step on one fixed batch in memory."""
    windows, steps = series_windows(32 * 25), 25
    fabric, stop = start_fabric(device), md.Stop()
    labels = Labels(windows.batch(np.arange(len(windows)))[1].numpy() + 0.1)
    model, optimizer = student_of("student", device)
    average = copy.deepcopy(model).requires_grad_(False)
    model, optimizer = fabric.setup(model, optimizer)
    run = {"seed": 0, "batch_size": 32, "alpha": 0.5, "max_grad_norm": 1.0, "augment": "on"}

    def epoch():
        loop = {"epoch": 0, "step": 0, "sums": [0.0] * 5, "failed": 0, "skipped": 0, "stopping": 0}
        with contextlib.redirect_stderr(io.StringIO()):
            md.train_epoch(fabric, model, average, optimizer, windows, labels, run, loop, stop, True)

    step = step_of("student", [part.to(device) for part in windows.batch(np.arange(32))[:2]], device)
    took = race({"epoch": epoch, "fixed": lambda: [step() for _ in range(steps)]}, 11, device)
    per = {name: 1e3 * statistics.median(seconds) / len(windows) for name, seconds in took.items()}
    text = f"{1e3 / per['epoch']:.0f} windows a second, fixed batch {1e3 / per['fixed']:.0f}"
    return [figure("training loop / fixed batch in memory", took, "fixed", "epoch", 0.95, False, text)]


def whole(device):
    """Label + 10 epochs + validation against a teacher in the loop; and a second run with another alpha."""
    epochs, windows, validation = 10, series_windows(320), series_windows(64, seed=3)
    module, fabric = moirai("small", device), start_fabric(device)
    own, asked = own_forecaster(module, PATCH), []
    request = md.Request("small", None, PATCH, "median", 100)
    say = md.Say("en")
    say.on = False

    class Counted(md.Teacher):
        def forecast(self, context, *more):
            asked.append(len(context))
            return super().forecast(context, *more)

    def run(alpha, cache, folder):
        """Seconds of one whole run, teacher loaded from disk."""
        begin = time.perf_counter()
        load = lambda: Counted(md.load_teacher(request.teacher, None, device, "32", print).module, device, "32", print)  # noqa: E731
        labels = md.get_labels(windows, request, load, cache, 256, md.BASELINES, fabric, say, md.Stop())
        lengths = {"context_length": LENGTH, "prediction_length": HORIZON}
        torch.manual_seed(0)
        model = md.PatchStudent(**lengths, **STUDENT)
        flags = vars(md.build_parser(demo=False).parse_args(["train"])) | {"alpha": alpha, "save_dir": str(folder)}
        facts = {"format": md.FORMAT, "student_config": lengths | STUDENT, "run_config": flags}
        md.fit(fabric, model, windows, validation, labels, flags, None, facts, folder, md.Stop(), say)
        return time.perf_counter() - begin

    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        module.save_pretrained(root / "teacher")
        request = request._replace(teacher=str(root / "teacher"))
        first = run(0.5, root / "labels", root / "first")
        calls = len(asked)
        second = run(0.9, root / "labels", root / "second")
        again = len(asked) - calls
    batch = windows.batch(np.arange(32))[0].to(device)
    step = step_of("student", [part.to(device) for part in windows.batch(np.arange(32))[:2]], device)

    @torch.no_grad()
    def ask():
        return own(*own_inputs(batch), num_samples=100).median(1).values

    took = race({"in the loop": lambda: (ask(), step())}, 2, device)["in the loop"]
    loops = [seconds * len(windows) / 32 * epochs for seconds in took]
    text = f"{first:.1f} s for {len(windows)} windows and {epochs} epochs"
    text += f"; in the loop {statistics.median(loops):.0f} s (reckoned from 64 windows)"
    ratios = [seconds / first for seconds in loops]
    figures = [
        Figure(
            "teacher in the loop / whole run, small",
            statistics.median(ratios),
            (min(ratios), max(ratios)),
            15,
            False,
            text,
        )
    ]
    text = f"{second:.1f} s; the first run asked the teacher for {sum(asked[:calls])} windows"
    return [*figures, Figure("second run, another alpha: teacher calls", again, (again, again), 0, True, text)]


def write_csvs(folder, count, rows):
    """Hourly CSVs (date, value)."""
    folder.mkdir()
    for number in range(count):
        values = np.random.default_rng(number).standard_normal(rows).cumsum().round(4)
        dates = pd.date_range("2020-01-01", periods=rows, freq="h")
        pd.DataFrame({"date": dates, "value": values}).to_csv(folder / f"s{number:05d}.csv", index=False)
    return folder


def load(folder, max_windows=1000):
    """Windows of a folder as the script loads them."""
    _, series, remarks = md.read_files(str(folder), 0, ["first"], False)
    limits = {"length": LENGTH + HORIZON, "horizon": HORIZON, "max_gap": 16}
    return md.split_data(series, remarks, "files", (8.0, 1.0, 1.0), 0, 1, max_windows, "auto", limits)[0]


def loading(device):
    """Loading 100 CSVs of 20,000 rows against pandas.read_csv of the same files."""
    with tempfile.TemporaryDirectory() as root:
        folder = write_csvs(Path(root, "data"), 100, 20_000)
        files = sorted(folder.iterdir())
        size = sum(path.stat().st_size for path in files) / 1e6
        took = race({"load": lambda: load(folder), "pandas": lambda: [pd.read_csv(f) for f in files]}, 5, device)
    per = {name: statistics.median(seconds) for name, seconds in took.items()}
    text = f"{per['load']:.2f} s for {size:.0f} MB, pandas.read_csv {per['pandas']:.2f}"
    return [figure("loading / pandas.read_csv", took, "load", "pandas", 1.3, True, text)]


def peak_of(folder, stride, queue):
    """Label and train on a folder in this process; puts (windows, peak RSS in bytes)."""
    torch.set_num_threads(1)
    words = f"--data_dir {folder / 'data'} --context_length 64 --prediction_length 16 --max_windows 0 --stride {stride}"
    words += f" --teacher_model {ROOT / 'checkpoints' / 'demo_teacher'} --teacher_point mean --teacher_patch_size 32"
    words += f" --label_cache {folder / f'labels{stride}'} --d_model 16 --num_layers 1 --num_heads 2 --batch_size 512"
    words += f" --save_dir {folder / f'run{stride}'} --num_epochs 1 --split_by time --device cpu --lang en"
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert md.main(words.split()) == 0
    windows = int(out.getvalue().split("Datasets loaded: ")[1].split()[0].replace(",", ""))
    queue.put((windows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def memory(device):
    """Peak memory of labelling and training with ten times the windows of the same series."""
    context, found = multiprocessing.get_context("spawn"), []
    with tempfile.TemporaryDirectory() as root:
        write_csvs(Path(root, "data"), 4, 13_000)
        for stride in (10, 1):
            queue = context.Queue()
            process = context.Process(target=peak_of, args=(Path(root), stride, queue))
            process.start()
            found.append(queue.get())
            process.join()
    (few, less), (many, more) = found
    ratio = more / less
    text = (
        f"{less / 1e6:.0f} MB with {few:,} windows, {more / 1e6:.0f} MB with {many:,}; labels {many * 64 / 1e6:.0f} MB"
    )
    return [Figure("peak memory, windows x 10", ratio, (ratio, ratio), 1.05, True, text)]


def shipped(device):
    """One forecast at batch size 1 on the CPU: exported student under onnxruntime against the base-shaped teacher."""
    import onnxruntime

    module = moirai("base", "cpu")
    own, context = own_forecaster(module, PATCH), series_windows(1).batch(np.arange(1))[0]
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stderr(io.StringIO()):
        lengths = {"context_length": LENGTH, "prediction_length": HORIZON}
        md.export_onnx(md.PatchStudent(**lengths, **STUDENT).eval(), Path(root, "a.onnx"), torch.randn(4, LENGTH))
        session = onnxruntime.InferenceSession(Path(root, "a.onnx"), providers=["CPUExecutionProvider"])
    teacher = md.Teacher(module, "cpu", "32", print)
    calls = {
        "teacher": torch.inference_mode()(lambda: own(*own_inputs(context), num_samples=100)),
        "ours": lambda: teacher.forecast(context, HORIZON, PATCH, "median", 100),
        "student": lambda: [session.run(None, {"context": context.numpy()}) for _ in range(50)],
    }
    took = race(calls, 7, torch.device("cpu"))
    per = {name: 1e3 * statistics.median(seconds) for name, seconds in took.items()}
    text = (
        f"{per['student'] / 50:.2f} ms; teacher through uni2ts {per['teacher']:.0f} ms, as labelled {per['ours']:.0f}"
    )
    return [figure("base teacher / exported student, batch 1", took, "teacher", "student", 100, False, text, 50)]


ROWS = {row.__name__: row for row in (labelling, generations, student, training, whole, loading, memory, shipped)}
ON_GPU = ("labelling", "generations", "student", "training", "whole")


def growth(path, device):
    """Picture of time against number of windows (labelling, training) and of files (loading), four sizes each."""
    teacher = md.Teacher(moirai("small", device), device, "32", print)
    request = md.Request("small", None, PATCH, "median", 100)
    fabric, lines = start_fabric(device), {"labelling": [], "training, one epoch": [], "loading, files": []}
    model, optimizer = student_of("student", device)
    average = copy.deepcopy(model).requires_grad_(False)
    model, optimizer = fabric.setup(model, optimizer)
    run = {"seed": 0, "batch_size": 32, "alpha": 0.5, "max_grad_norm": 1.0, "augment": "on"}
    for count in (256, 512, 1024, 2048):
        windows = series_windows(count)
        begin = time.perf_counter()
        for first in range(0, count, 256):
            md.label_windows(teacher, windows, np.arange(first, min(first + 256, count)), {"h": PATCH}, request, first)
        lines["labelling"].append((count, time.perf_counter() - begin))
        labels = Labels(windows.batch(np.arange(count))[1].numpy())
        loop = {"epoch": 0, "step": 0, "sums": [0.0] * 5, "failed": 0, "skipped": 0, "stopping": 0}
        begin = time.perf_counter()
        md.train_epoch(fabric, model, average, optimizer, windows, labels, run, loop, md.Stop(), False)
        lines["training, one epoch"].append((count, time.perf_counter() - begin))
    for count in (50, 100, 200, 400):
        with tempfile.TemporaryDirectory() as root:
            folder = write_csvs(Path(root, "data"), count, 5_000)
            begin = time.perf_counter()
            load(folder)
            lines["loading, files"].append((count, time.perf_counter() - begin))
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(10, 3.4), layout="constrained")
    for axis, (name, points) in zip(picture.subplots(1, 3), lines.items(), strict=True):
        axis.plot(*zip(*points, strict=True), "o-")
        axis.set(
            title=name, xlabel="files" if "files" in name else "windows", ylabel="s", xlim=(0, None), ylim=(0, None)
        )
        print(f"{name}: " + ", ".join(f"{count} {seconds:.2f} s" for count, seconds in points))
    picture.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=None, help="rows to measure; default: all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a figure falls short")
    parser.add_argument("--growth", default=None, help="only draw time against size into this picture")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.growth:
        growth(args.growth, device)
        return 0
    begin = time.perf_counter()
    RATES["matmul"], RATES["copy"] = rates(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    print(f"{name}, {threads}, torch {torch.__version__}")
    print(f"matmul {RATES['matmul'] / 1e9:.0f} GFLOP/s, copy {RATES['copy'] / 1e9:.1f} GB/s")
    print("| figure | measured | spread | wanted | times |\n|---|---|---|---|---|")
    short = 0
    for row in args.rows or (ROWS if device.type == "cpu" else ON_GPU):
        for item in ROWS[row](device):
            wanted = f"{'<=' if item.most else '>='} {item.limit:g}"
            spread = f"{item.spread[0]:.3g}–{item.spread[1]:.3g}"
            mark = "" if item.good() else " **short**"
            print(f"| {item.what} | {item.ratio:.3g}{mark} | {spread} | {wanted} | {item.times} |", flush=True)
            short += not item.good()
    print(f"{time.perf_counter() - begin:.0f} s; {short} short of what is wanted")
    return 1 if short and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
