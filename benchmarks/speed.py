"""How fast the script labels, trains, loads and forecasts, as ratios of two things timed in turn.

    python benchmarks/speed.py                            # all rows, within 12 minutes on two cores
    python benchmarks/speed.py --rows labelling training  # some of them
    python benchmarks/speed.py --device cuda              # the rows that a GPU has, on it
    python benchmarks/speed.py --check                    # exit code 1 where a figure falls short
    python benchmarks/speed.py --growth docs/growth.png   # time by windows and files, four sizes

Two things are timed in turn, several times; a ratio is the median of the ratios of neighbours, its
spread the lowest and the highest. Beside a time stand its two floors: operations over the matmul
rate, and bytes over the copying rate, both measured here (bytes: each weight, and each result of a
linear map, as often as it must be written and read). Teachers have random weights in the shapes of
MOIRAI small and base, which changes no time.
"""

import argparse
import collections
import contextlib
import io
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import (
    DEMO_TEACHER,
    HORIZON,
    LENGTH,
    ROOT,
    STUDENT,
    data_config,
    fit,
    make_job,
    md,
    peak_memory,
    quiet_voice,
    read_config,
    teacher_request,
    train_flags,
    whole_windows,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

PATCH = 32  # of the teacher
SAMPLES = 100  # of the teacher
SHAPES = {"small": (384, 6), "base": (768, 12)}  # width and layers of MOIRAI
LABELLED = 256  # windows of a call of the teacher: a block of labels
BATCH = 32  # windows of a step of the student
SIDE = 1536  # of the matrices by which the matmul rate is measured
RATES = {"matmul": math.nan, "copy": math.nan}  # operations and bytes a second, measured in main


# -- Timing ----------------------------------------------------------------------------------------


@dataclass
class Figure:
    """One line of the table."""

    what: str
    ratio: float
    spread: tuple  # lowest and highest ratio
    times: str  # what was timed, with floors
    at_least: float | None = None  # what is good ...
    at_most: float | None = None  # ... either of them

    def is_good(self):
        if self.at_most is not None:
            return self.ratio <= self.at_most
        return self.ratio >= self.at_least

    def line(self):
        wanted = f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"
        measured = f"{self.ratio:.3g}" if self.is_good() else f"{self.ratio:.3g} **short**"
        spread = f"{self.spread[0]:.3g}–{self.spread[1]:.3g}"
        return f"| {self.what} | {measured} | {spread} | {wanted} | {self.times} |"


def figure(what, ratios, times, **limit):
    """Figure of the median of ratios."""
    return Figure(what, statistics.median(ratios), (min(ratios), max(ratios)), times, **limit)


def race(calls, repeats, device):
    """name -> seconds of each repeat; the calls take turns, after one round that is not counted."""
    took = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number > 0:
                took[name].append(time.perf_counter() - began)
    return took


def ratios_of(took, above, below, scale=1.0):
    """`scale` * above / below of two names of a race, of each repeat."""
    return [scale * a / b for a, b in zip(took[above], took[below], strict=True)]


def median_ms(seconds, windows):
    """Milliseconds a window."""
    return 1e3 * statistics.median(seconds) / windows


def repeated(call, times):
    """Call of several calls."""
    return lambda: [call() for _ in range(times)]


def matmul_call(device):
    """Call of one product of SIDE x SIDE."""
    a = torch.randn(SIDE, SIDE, device=device)
    b = torch.randn(SIDE, SIDE, device=device)
    return lambda: a @ b


def measure_rates(device):
    """matmul operations and bytes copied a second, float32, the best of several runs."""
    big = torch.empty(2**26, device=device)
    took = race({"matmul": matmul_call(device), "copy": big.clone}, 5, device)
    return {
        "matmul": 2 * SIDE**3 / min(took["matmul"]),
        "copy": 2 * 4 * 2**26 / min(took["copy"]),
    }


@dataclass
class Network:
    """What a window takes in a Transformer."""

    multiplications: float  # and as many additions
    width: int
    layers: int
    tokens: int
    weights: int

    def floors(self, batch, is_training):
        """Text of the two floors of a window in ms."""
        passes = 3 if is_training else 1  # backward is twice as much as forward
        results = 4 * self.layers * self.tokens * 14 * self.width  # qkv, out, 4 D twice, norms
        moved = 2 * results * (2 if is_training else 1)  # written and read
        moved += 4 * self.weights * (9 if is_training else 1) / batch  # AdamW: gradient, moments
        by_operations = 2e3 * passes * self.multiplications / RATES["matmul"]
        by_bytes = 1e3 * moved / RATES["copy"]
        return f"floors {by_operations:.2f} by operations, {by_bytes:.2f} by bytes"


# -- What is measured on ---------------------------------------------------------------------------


def series_windows(count, seed=0):
    """Windows: `count` of one random walk with a daily cycle."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(count + LENGTH + HORIZON - 1).cumsum() * 0.1
    values += np.sin(2 * np.pi * np.arange(len(values)) / 24)
    walk = md.RawSeries("walk", values, freq="h", stamps=None, column="walk")
    return whole_windows([walk], data_config(max_gap=0))


def contexts_of(windows, count, device):
    """Contexts (count, L) of the first windows."""
    context, _, _ = windows.batch(np.arange(count))
    return context.to(device)


def training_batch(windows, device):
    """(contexts (B, L), truth (B, H)) of the first windows."""
    context, truth, _ = windows.batch(np.arange(BATCH))
    return context.to(device), truth.to(device)


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
    components = [
        StudentTOutput(),
        NormalFixedScaleOutput(),
        NegativeBinomialOutput(),
        LogNormalOutput(),
    ]
    torch.manual_seed(0)
    module = MoiraiModule(
        MixtureOutput(components),
        d_model=width,
        num_layers=layers,
        patch_sizes=(8, 16, 32, 64, 128),
        max_seq_len=512,
        attn_dropout_p=0.0,
        dropout_p=0.0,
    )
    return module.to(device)


def network_of(module):
    """Network of a MOIRAI: its encoder, and the parameters of the horizon's points alone."""
    width = module.d_model
    layers = module.num_layers
    horizon_tokens = HORIZON // PATCH
    tokens = -(-LENGTH // PATCH) + horizon_tokens
    in_matrices = 0
    for name, weight in module.encoder.named_parameters():
        if name.endswith("weight") and weight.ndim == 2:
            in_matrices += weight.numel()
    multiplications = in_matrices * tokens + 2 * layers * tokens**2 * width
    multiplications += 32 * width * tokens  # embedding
    outputs = 4 + (3 + 1 + 2 + 2)  # of a point: logits, parameters of the four components
    multiplications += 32 * outputs * width * horizon_tokens
    weights = sum(weight.numel() for weight in module.encoder.parameters())
    return Network(multiplications, width, layers, tokens, weights)


def own_forecaster(module, patch):
    """uni2ts's forecaster of one variate."""
    from uni2ts.model.moirai.forecast import MoiraiForecast

    forecaster = MoiraiForecast(
        module=module,
        context_length=LENGTH,
        prediction_length=HORIZON,
        patch_size=patch,
        target_dim=1,
        feat_dynamic_real_dim=0,
        past_feat_dynamic_real_dim=0,
    )
    return forecaster.eval()


def own_inputs(context):
    """What uni2ts's forecaster takes for contexts (B, L): values, observed, padded."""
    values = context[..., None]
    return values, torch.ones_like(values).bool(), torch.zeros_like(context).bool()


def own_call(module, patch, context):
    """Call of uni2ts's forecaster on contexts (B, L)."""
    own = own_forecaster(module, patch)
    inputs = own_inputs(context)
    if patch == "auto":  # it wants the horizon's points, too, and forecasts after them
        inputs = own_inputs(torch.cat([context, context[:, -HORIZON:]], 1))
    return lambda: own(*inputs, num_samples=SAMPLES)


def bare_call(module, context):
    """Call of the module's own forward on contexts (B, L), its inputs laid out beforehand."""
    kept = []

    def keep(_module, args, kwargs):
        kept.append((args, kwargs))

    hook = module.register_forward_pre_hook(keep, with_kwargs=True)
    own_forecaster(module, PATCH)._get_distr(PATCH, *own_inputs(context))
    hook.remove()
    args, kwargs = kept[0]
    return lambda: module(*args, **kwargs)


def label_call(teacher, windows, count, patch, samples=SAMPLES, quantiles="off"):
    """Call that labels the first windows, with or without quantiles."""
    request = teacher_request(
        "", teacher_patch_size={"h": patch}, num_samples=samples, quantiles=quantiles
    )
    index = np.arange(count)
    return lambda: md.label_windows(teacher, windows, index, request, seed=0)


class PlainStudent(md.GoesOn, nn.Module):
    """The student's shape with torch.nn.TransformerEncoder as its body."""

    def __init__(self):
        super().__init__()
        self.context_length = LENGTH
        patches = math.ceil(LENGTH / 16)
        self.embed = nn.Linear(16, 128)
        self.position = nn.Parameter(torch.randn(patches, 128) * 0.02)
        layer = nn.TransformerEncoderLayer(
            d_model=128,
            nhead=8,
            dim_feedforward=512,
            dropout=0.1,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(
            layer, num_layers=4, norm=nn.LayerNorm(128), enable_nested_tensor=False
        )
        self.head = nn.Linear(patches * 128, HORIZON)

    def forward(self, context):
        centre, deviation = md.instance_scale(context)
        scaled = (context - centre) / deviation
        tokens = self.embed(scaled.unflatten(1, (-1, 16))) + self.position
        return self.head(self.encoder(tokens).flatten(1)) * deviation + centre


def student_model(seed=0):
    torch.manual_seed(seed)
    return md.PatchStudent(**STUDENT)


def plain_model(seed=0):
    torch.manual_seed(seed)
    return PlainStudent()


MODELS = {"plain": plain_model, "student": student_model}


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def take_step(model, optimizer, context, truth):
    """Forward, backward, clip, step."""
    loss = nn.functional.mse_loss(model(context), truth)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def step_of(model, batch, device):
    """Call of one training step on a batch in memory."""
    model = model.to(device).train()
    optimizer = optimizer_of(model)
    return lambda: take_step(model, optimizer, *batch)


def write_csvs(folder, count, rows):
    """Write hourly CSVs (date, value). Returns their folder."""
    folder.mkdir()
    dates = pd.date_range("2020-01-01", periods=rows, freq="h")
    for number in range(count):
        values = np.random.default_rng(number).standard_normal(rows).cumsum().round(4)
        frame = pd.DataFrame({"date": dates, "value": values})
        frame.to_csv(folder / f"s{number:05d}.csv", index=False)
    return folder


def load(folder, max_windows=1000):
    """part -> Windows of a folder, as the script loads them."""
    config = data_config(data_dir=str(folder), split_by="files", max_windows=max_windows)
    files = md.read_files(config.data_dir, config.max_files, read_config(), quiet_voice())
    return md.split_data(files, config).windows


# -- The rows --------------------------------------------------------------------------------------


@torch.inference_mode()
def labelling(device):
    """Labels against the bare network, uni2ts's forecaster, and its patch_size="auto"."""
    figures = []
    for shape, repeats, bare_most, own_least, auto_least in (
        ("small", 5, 1.35, 13, 110),
        ("base", 3, 1.05, 4, 40),
    ):
        module = moirai(shape, device)
        teacher = md.Teacher(module, device, "32", print)
        windows = series_windows(LABELLED)
        context = contexts_of(windows, LABELLED, device)
        labels = label_call(teacher, windows, LABELLED, PATCH)

        took = race({"bare": bare_call(module, context), "labels": labels}, repeats, device)
        text = f"{median_ms(took['labels'], LABELLED):.2f} ms a window"
        text += f", network {median_ms(took['bare'], LABELLED):.2f}"
        text += f", {network_of(module).floors(LABELLED, is_training=False)}"
        ratios = ratios_of(took, "labels", "bare")
        figures.append(figure(f"labels / bare forward, {shape}", ratios, text, at_most=bare_most))

        fan = label_call(teacher, windows, LABELLED, PATCH, quantiles="on")
        took = race({"points": labels, "quantiles": fan}, repeats, device)
        text = f"{median_ms(took['quantiles'], LABELLED):.2f} ms a window"
        text += f", points alone {median_ms(took['points'], LABELLED):.2f}"
        ratios = ratios_of(took, "quantiles", "points")
        what = f"labels with quantiles / points alone, {shape}"
        figures.append(figure(what, ratios, text, at_most=1.1))

        for patch, count, least in (
            (PATCH, LABELLED, own_least),
            ("auto", 8, auto_least),  # of more one cannot wait for the end
        ):
            own = own_call(module, patch, context[:count])
            took = race({"own": own, "labels": labels}, 1, device)
            text = f"{median_ms(took['own'], count):.0f} ms a window"
            ratios = ratios_of(took, "own", "labels", LABELLED / count)
            what = f"uni2ts, patch {patch} / labels, {shape}"
            figures.append(figure(what, ratios, text, at_least=least))
    return figures


@torch.inference_mode()
def generations(device):
    """Labels of the other MOIRAI generations, small, against uni2ts's own forecast class."""
    from uni2ts.distribution import (
        LogNormalOutput,
        MixtureOutput,
        NormalFixedScaleOutput,
        StudentTOutput,
    )
    from uni2ts.model.moirai2 import Moirai2Forecast, Moirai2Module
    from uni2ts.model.moirai_moe import MoiraiMoEForecast, MoiraiMoEModule

    sizes = {
        "d_model": 384,
        "num_layers": 6,
        "max_seq_len": 512,
        "attn_dropout_p": 0.0,
        "dropout_p": 0.0,
    }
    outputs = MixtureOutput([StudentTOutput(), NormalFixedScaleOutput(), LogNormalOutput()])
    experts = MoiraiMoEModule(outputs, patch_sizes=(16,), d_ff=512, **sizes).to(device)
    experts.encoder.centroid.normal_()  # uni2ts leaves what routes tokens to experts uninitialised
    second = Moirai2Module(patch_size=16, d_ff=1024, num_predict_token=4, **sizes).to(device)
    is_gpu = device.type == "cuda"
    samples = 100 if is_gpu else 5

    moe = ("MOIRAI-MoE", experts, MoiraiMoEForecast, 64 if is_gpu else 1, {"num_samples": samples})
    without_samples = ("MOIRAI 2.0", second, Moirai2Forecast, 256 if is_gpu else 32, {})
    figures = []
    for name, module, forecast_class, count, more in (moe, without_samples):
        teacher = md.Teacher(module, device, "32", print, forecast_class)
        windows = series_windows(256)
        context = contexts_of(windows, count, torch.device("cpu"))
        own = forecast_class(
            module=module,
            context_length=LENGTH,
            prediction_length=HORIZON,
            target_dim=1,
            feat_dynamic_real_dim=0,
            past_feat_dynamic_real_dim=0,
            **more,
        )
        calls = {
            "own": bound(own.eval(), *own_inputs(context.to(device))),
            "labels": label_call(teacher, windows, count, 16, samples),
        }
        took = race(calls, 2, device)
        near = {"64 steps": bound(teacher.forecast, context, 64, 16, "median", samples)}
        took_near = race(near, 2, device)["64 steps"]

        text = f"{median_ms(took['labels'], count):.4g} ms a window"
        if more:
            text += f" of {samples} samples"
        text += f", {1e3 * min(took_near) / count:.4g} at 64 steps"
        ratios = ratios_of(took, "own", "labels")
        what = f"{name}, its own forward / labels, small"
        figures.append(figure(what, ratios, text, at_least=0.9))
    return figures


def student(device):
    """The student's step and forecast against nn.TransformerEncoder's, and the matmul rate."""
    batch = training_batch(series_windows(2 * BATCH), device)
    width = STUDENT["d_model"]
    layers = STUDENT["num_layers"]
    patch = STUDENT["patch_size"]
    tokens = LENGTH // patch
    multiplications = layers * (tokens * 12 * width**2 + 2 * tokens**2 * width)
    multiplications += tokens * patch * width + tokens * width * HORIZON
    weights = sum(weight.numel() for weight in student_model().parameters())
    network = Network(multiplications, width, layers, tokens, weights)
    at_once = 10  # steps, forecasts or products that are timed together
    windows = at_once * BATCH

    calls = {}
    for kind, make in MODELS.items():
        calls[kind] = repeated(step_of(make(), batch, device), at_once)
    calls["matmul"] = repeated(matmul_call(device), at_once)
    took = race(calls, 9, device)
    text = f"{median_ms(took['student'], windows):.2f} ms a window"
    text += f", plain {median_ms(took['plain'], windows):.2f}"
    text += f", {network.floors(BATCH, is_training=True)}"
    ratios = ratios_of(took, "plain", "student")
    what = "training step, nn.TransformerEncoder / student"
    step = figure(what, ratios, text, at_least=1.4)

    step_operations = BATCH * 3 * 2 * multiplications  # forward, and backward twice as much
    rate = windows * 6e-9 * multiplications / statistics.median(took["student"])
    text = f"{rate:.0f} GFLOP/s; products of {SIDE} x {SIDE} in turn with the steps"
    ratios = ratios_of(took, "matmul", "student", step_operations / (2 * SIDE**3))
    share = figure("training step, share of the matmul rate", ratios, text, at_least=0.45)

    calls = {}
    for kind, make in MODELS.items():
        model = make().to(device).eval()
        calls[kind] = repeated(bound(model, batch[0]), at_once)
    with torch.inference_mode():
        took = race(calls, 9, device)
    text = f"{median_ms(took['student'], windows):.2f} ms a window"
    text += f", {network.floors(BATCH, is_training=False)}"
    ratios = ratios_of(took, "plain", "student")
    forecast = figure("forecast, nn.TransformerEncoder / student", ratios, text, at_least=0.9)
    return [step, share, forecast, curve(device)]


def bound(call, *values):
    """Call without arguments."""
    return lambda: call(*values)


def curve(device, epochs=5, seeds=3):
    """Best validation MSE of the plain twin over the student's: same windows, order, optimiser."""
    with tempfile.TemporaryDirectory() as folder:  # of the demo family: whole series are held out
        md.write_demo_csvs(folder)
        parts = load(Path(folder), max_windows=48)
    best = {}
    for kind, make in MODELS.items():
        best[kind] = [best_error(make(seed), parts, epochs, seed, device) for seed in range(seeds)]
    ratios = [plain / own for plain, own in zip(best["plain"], best["student"], strict=True)]
    text = f"best of {epochs} epochs, {seeds} seeds: plain {np.mean(best['plain']):.4f}"
    text += f", student {np.mean(best['student']):.4f}"
    what = "validation MSE, nn.TransformerEncoder / student"
    spread = (min(ratios), max(ratios))
    return Figure(what, float(np.mean(ratios)), spread, text, at_least=0.98)


def best_error(model, parts, epochs, seed, device):
    """Lowest validation MSE of a model over its epochs."""
    windows = parts["train"]
    every_fourth = np.arange(0, len(parts["validation"]), 4)
    held_context, held_truth, _ = parts["validation"].batch(every_fourth)
    held_context = held_context.to(device)
    held_truth = held_truth.to(device)
    model = model.to(device)
    optimizer = optimizer_of(model)
    errors = []
    for epoch in range(epochs):
        model.train()
        order = np.random.default_rng((seed, epoch)).permutation(len(windows))
        for index in np.split(order, len(windows) // BATCH):
            context, truth, _ = windows.batch(index)
            take_step(model, optimizer, context.to(device), truth.to(device))
        model.eval()
        with torch.inference_mode():
            error = nn.functional.mse_loss(model(held_context), held_truth)
        errors.append(float(error))
    return min(errors)


class Labels:
    """Labels in memory, for the loop."""

    def __init__(self, array):
        self.array = array

    batch = md.LabelFile.batch


def epoch_call(windows, job):
    """Call of the loop's first epoch over windows with labels, as the user gets it."""
    _, truth, _ = windows.batch(np.arange(len(windows)))
    flags = train_flags(
        alpha=0.5, batch_size=BATCH, learning_rate=1e-3, max_grad_norm=1.0, augment="on", seed=0
    )
    training = md.Training(
        windows=windows,
        validation=None,
        labels=Labels(truth.numpy() + 0.1),
        config=md.pick(md.TrainConfig, flags),
        facts={},
        folder=None,
    )
    learner = md.make_learner(student_model(), training.config, job)

    def epoch():
        with contextlib.redirect_stderr(io.StringIO()):  # the progress bar's
            md.train_epoch(training, learner, md.Progress(), job)

    return epoch


def training(device):
    """Windows a second of the loop against the step on one fixed batch in memory."""
    steps = 25
    windows = series_windows(BATCH * steps)
    step = step_of(student_model(), training_batch(windows, device), device)
    calls = {"epoch": epoch_call(windows, make_job(device)), "fixed": repeated(step, steps)}
    took = race(calls, 11, device)
    per_second = 1e3 / median_ms(took["epoch"], len(windows))
    fixed_per_second = 1e3 / median_ms(took["fixed"], len(windows))
    text = f"{per_second:.0f} windows a second, fixed batch {fixed_per_second:.0f}"
    ratios = ratios_of(took, "fixed", "epoch")
    return [figure("training loop / fixed batch in memory", ratios, text, at_least=0.95)]


class Launches(TorchDispatchMode):
    """Counts the operations that PyTorch hands to a device: on a GPU, each starts a kernel.

    Left out is what computes nothing: views, and room for a tensor. What a GPU does in one kernel
    (a list of tensors at once, AdamW) counts as one.
    """

    without_kernel = ("aten._unsafe_view", "aten.detach", "aten.empty", "profiler.")

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        aliases = [result.alias_info for result in operation._schema.returns]
        is_view = any(alias and not alias.is_write for alias in aliases)
        if not is_view and not str(operation).startswith(self.without_kernel):
            self.counts[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def count_launches(steps=4):
    """Operation -> how often it is in a training step, on the CPU."""
    call = epoch_call(series_windows(BATCH * steps), make_job(torch.device("cpu")))
    call()  # after it the optimizer has its moments
    with Launches() as counted:
        call()
    return {name: count / steps for name, count in counted.counts.items()}


def launches(_device):
    """Operations of a training step, as the CPU gets them, and with the attention of a GPU."""
    counts = {"on the CPU": count_launches()}
    attend = md.attend
    md.attend = nn.functional.scaled_dot_product_attention
    counts["with the attention of a GPU"] = count_launches()
    md.attend = attend
    for kind in ("bernoulli_.float", "div_.Scalar"):  # a GPU drops out in one kernel
        counts["with the attention of a GPU"].pop(f"aten.{kind}")

    figures = []
    for where, of_kind in counts.items():
        most = sorted(of_kind, key=of_kind.get, reverse=True)[:5]
        text = ", ".join(f"{of_kind[name]:.0f} {name.split('.')[1]}" for name in most)
        what = f"operations of a training step, {where}"
        figures.append(figure(what, [sum(of_kind.values())], text, at_most=150))
    return figures


class CountedTeacher(md.Teacher):
    """A teacher that notes how many windows it is asked for."""

    def __init__(self, teacher, asked):
        super().__init__(teacher.module, teacher.device, teacher.precision, teacher.note)
        self.asked = asked  # a list that each call adds to

    def answer(self, context, asked):
        self.asked.append(len(context))
        return super().answer(context, asked)


@dataclass
class WholeRun:
    """Labelling, training and validation, as often as it is started."""

    windows: object
    validation: object
    epochs: int
    request: object  # TeacherRequest of a folder
    job: object
    asked: list  # windows of each call of the teacher

    def load(self):
        teacher = md.load_teacher(self.request, self.job.device, print)
        return CountedTeacher(teacher, self.asked)

    def start(self, alpha, folder):
        """Seconds that it takes, the teacher loaded from disk."""
        began = time.perf_counter()
        task = md.LabelTask(self.windows, self.windows, self.request, self.load, md.BASELINES)
        labels = md.get_labels(task, self.job)
        flags = train_flags(
            alpha=alpha, batch_size=BATCH, num_epochs=self.epochs, save_dir=str(folder)
        )
        fit(student_model(), STUDENT, self.windows, self.validation, labels, flags, self.job)
        return time.perf_counter() - began


def whole(device):
    """Label + 10 epochs + validation against a teacher in the loop; a run with another alpha."""
    windows = series_windows(320)
    module = moirai("small", device)
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        module.save_pretrained(root / "teacher")
        request = teacher_request(
            root / "teacher", teacher_patch_size=PATCH, label_cache=str(root / "labels")
        )
        job = make_job(device)
        job.voice.is_on = False
        run = WholeRun(windows, series_windows(64, seed=3), 10, request, job, asked=[])
        first = run.start(0.5, root / "first")
        asked = sum(run.asked)
        calls = len(run.asked)
        second = run.start(0.9, root / "second")
        more_calls = len(run.asked) - calls

    batch = training_batch(windows, device)
    step = step_of(student_model(), batch, device)
    forecast = own_call(module, PATCH, batch[0])

    def ask_and_step():
        with torch.no_grad():
            forecast().median(1)
        step()

    took = race({"in the loop": ask_and_step}, 2, device)["in the loop"]
    steps = run.epochs * len(windows) / BATCH
    loops = [seconds * steps for seconds in took]
    text = f"{first:.1f} s for {len(windows)} windows and {run.epochs} epochs; in the loop"
    text += f" {statistics.median(loops):.0f} s (reckoned from {2 * BATCH} windows)"
    ratios = [seconds / first for seconds in loops]
    in_the_loop = figure("teacher in the loop / whole run, small", ratios, text, at_least=15)
    text = f"{second:.1f} s; the first run asked the teacher for {asked} windows"
    what = "second run, another alpha: teacher calls"
    return [in_the_loop, figure(what, [more_calls], text, at_most=0)]


def loading(device):
    """Loading 100 CSVs of 20,000 rows against pandas.read_csv of the same files."""
    with tempfile.TemporaryDirectory() as root:
        folder = write_csvs(Path(root, "data"), 100, 20_000)
        paths = sorted(folder.iterdir())
        megabytes = sum(path.stat().st_size for path in paths) / 1e6

        def read_all():
            return [pd.read_csv(path) for path in paths]

        took = race({"load": bound(load, folder), "pandas": read_all}, 5, device)
    text = f"{statistics.median(took['load']):.2f} s for {megabytes:.0f} MB"
    text += f", pandas.read_csv {statistics.median(took['pandas']):.2f}"
    ratios = ratios_of(took, "load", "pandas")
    return [figure("loading / pandas.read_csv", ratios, text, at_most=1.3)]


def peak_of(folder, stride, queue):
    """Label and train on a folder in this process; puts (windows, bytes at the peak)."""
    torch.set_num_threads(1)
    flags = {
        "data_dir": folder / "data",
        "context_length": 64,
        "prediction_length": 16,
        "split_by": "time",
        "max_windows": 0,
        "stride": stride,
        "teacher_model": DEMO_TEACHER,
        "teacher_point": "mean",
        "teacher_patch_size": 32,
        "label_cache": folder / f"labels{stride}",
        "d_model": 16,
        "num_layers": 1,
        "num_heads": 2,
        "alpha": 0.5,
        "batch_size": 512,
        "num_epochs": 1,
        "save_dir": folder / f"run{stride}",
        "device": "cpu",
        "lang": "en",
    }
    words = []
    for name, value in flags.items():
        words += [f"--{name}", str(value)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = md.main(words)
    assert code == 0, code
    _, _, after = out.getvalue().partition("Datasets loaded: ")
    windows = int(after.split()[0].replace(",", ""))
    queue.put((windows, peak_memory()))


def memory(device):
    """Peak memory of labelling and training with ten times the windows of the same series."""
    start_method = multiprocessing.get_context("spawn")
    found = []
    with tempfile.TemporaryDirectory() as root:
        write_csvs(Path(root, "data"), 4, 13_000)
        for stride in (10, 1):
            queue = start_method.Queue()
            process = start_method.Process(target=peak_of, args=(Path(root), stride, queue))
            process.start()
            found.append(queue.get())
            process.join()
    (few, less), (many, more) = found
    text = f"{less / 1e6:.0f} MB with {few:,} windows, {more / 1e6:.0f} MB with {many:,}"
    text += f"; labels {many * 64 / 1e6:.0f} MB"
    return [figure("peak memory, windows x 10", [more / less], text, at_most=1.05)]


def shipped(device):
    """One forecast on the CPU: the exported student against the base-shaped teacher, batch 1."""
    import onnxruntime

    cpu = torch.device("cpu")
    module = moirai("base", cpu)
    teacher = md.Teacher(module, cpu, "32", print)
    context = contexts_of(series_windows(1), 1, cpu)
    with contextlib.redirect_stderr(io.StringIO()):
        model = md.onnx_model(student_model().eval(), torch.randn(4, LENGTH))
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
    at_once = 50
    calls = {
        "teacher": torch.inference_mode()(own_call(module, PATCH, context)),
        "ours": bound(teacher.forecast, context, HORIZON, PATCH, "median", SAMPLES),
        "student": repeated(bound(session.run, None, {"context": context.numpy()}), at_once),
    }
    took = race(calls, 7, cpu)
    text = f"{median_ms(took['student'], at_once):.2f} ms"
    text += f"; teacher through uni2ts {median_ms(took['teacher'], 1):.0f} ms"
    text += f", as labelled {median_ms(took['ours'], 1):.0f}"
    ratios = ratios_of(took, "teacher", "student", at_once)
    return [figure("base teacher / exported student, batch 1", ratios, text, at_least=100)]


SERIES = 1000  # that `predict` is given at once


def write_series(folder):
    """Write SERIES walks of LENGTH hours as columns and one below the other. Returns the paths."""
    walks = np.random.default_rng(0).standard_normal((LENGTH, SERIES)).cumsum(0).round(4)
    dates = pd.date_range("2024-01-01", periods=LENGTH, freq="h", name="date")
    wide = pd.DataFrame(walks, dates, [f"s{number:03d}" for number in range(SERIES)])
    long = wide.unstack().rename_axis(["unique_id", "date"]).rename("value")
    paths = {"wide": folder / "wide.csv", "long": folder / "long.csv"}
    wide.to_csv(paths["wide"])
    long.to_csv(paths["long"])
    return paths


def many(_device):
    """`predict` of many series in one file against the student's arithmetic and reading it."""
    sizes = STUDENT | {"quantile_width": md.QUANTILE_WIDTH}
    model = md.PatchStudent(**sizes).eval()
    contexts = torch.randn(SERIES, LENGTH).double().cumsum(1)
    figures = []
    with tempfile.TemporaryDirectory() as root:
        checkpoint = Path(root, "student.pt")
        weights = model.state_dict()
        content = {"format": md.FORMAT, "student_config": sizes, "model_state_dict": weights}
        torch.save(content, checkpoint)
        words = ["predict", "--checkpoint", str(checkpoint), "--columns", "all"]
        words += ["--output", str(Path(root, "forecast.csv"))]
        for kind, path in write_series(Path(root)).items():
            calls = {
                "predict": bound(quiet_main, [*words, "--input", str(path)]),
                "student": bound(model.without_gradients, contexts),
                "reading": bound(pd.read_csv, path),
            }
            took = race(calls, 3, torch.device("cpu"))
            seconds = {name: statistics.median(times) for name, times in took.items()}
            text = ", ".join(f"{name} {second:.2f} s" for name, second in seconds.items())
            floors = zip(took["student"], took["reading"], strict=True)
            took["floor"] = [sum(pair) for pair in floors]
            ratios = ratios_of(took, "predict", "floor")
            what = f"predict of {SERIES:,} series, {kind} / student and pandas.read_csv"
            figures.append(figure(what, ratios, text, at_most=1.3))
    return figures


def quiet_main(words):
    """Run a command of the script in this process, and show nothing of what it prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert md.main(words) == 0, words


STARTED = 7  # times that each command of `start` is started


def cost_of(words, folder, code=0):
    """(seconds by the clock, seconds of CPU time) of a Python process that ends with this code.

    It has one thread, as two would wait for each other where another program has a core.

    The CPU time is user's and system's; a machine that is busy with other work changes it less.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    before = os.times()
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, check=False
    )
    took = time.perf_counter() - began
    after = os.times()
    assert done.returncode == code, done.stderr.decode()
    user = after.children_user - before.children_user
    return took, user + after.children_system - before.children_system


def start(_device):
    """Commands that do little, against `import torch, pandas`, each in a process of its own."""
    script = str(ROOT / "moirai_distill.py")
    lengths = ["--context_length", "96", "--prediction_length", "24"]
    little = ["--alpha", "0", "--num_epochs", "1", "--max_windows", "50", "--device", "cpu"]
    commands = {
        "import": ["-c", "import torch, pandas"],
        "predict": [script, "predict", "--checkpoint", "run", "--input", "data/s00000.csv"],
        "evaluate": [script, "evaluate", "--checkpoint", "run", "--device", "cpu"],
        "--help": [script, "--help"],
        "an argument error": [script, "--data_dir", "data", "--alpha", "5"],
    }
    walls = {name: [] for name in commands}
    cpus = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as root:
        write_csvs(Path(root, "data"), 1, 1500)
        cost_of([script, "--data_dir", "data", *lengths, *little, "--save_dir", "run"], root)
        for _ in range(STARTED):
            for name, words in commands.items():
                wall, cpu = cost_of(words, root, code=2 if "error" in name else 0)
                walls[name].append(wall)
                cpus[name].append(cpu)

    base = statistics.median(cpus["import"])
    figures = []
    for name in list(commands)[1:]:
        by_clock = statistics.median(ratios_of(walls, name, "import"))
        text = f"{statistics.median(cpus[name]):.2f} s of CPU time, import {base:.2f}"
        text += f"; by the clock {by_clock:.2f}"
        what = f"{name} / import torch, pandas"
        figures.append(figure(what, ratios_of(cpus, name, "import"), text, at_most=1.25))
    return figures


ROWS = {
    "labelling": labelling,
    "generations": generations,
    "student": student,
    "training": training,
    "launches": launches,
    "whole": whole,
    "loading": loading,
    "memory": memory,
    "shipped": shipped,
    "many": many,
    "start": start,
}
ON_GPU = ("labelling", "generations", "student", "training", "whole")


# -- Growth ----------------------------------------------------------------------------------------


def seconds_of(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def growth(path, device):
    """Picture of time by number of windows (labelling, training) and of files (loading)."""
    from matplotlib.figure import Figure as Picture

    teacher = md.Teacher(moirai("small", device), device, "32", print)
    request = teacher_request("", teacher_patch_size={"h": PATCH})
    job = make_job(device)

    def label_blocks(windows):
        for first in range(0, len(windows), LABELLED):
            index = np.arange(first, min(first + LABELLED, len(windows)))
            md.label_windows(teacher, windows, index, request, seed=first)

    lines = {"labelling": {}, "training, one epoch": {}, "loading, files": {}}
    for count in (256, 512, 1024, 2048):
        windows = series_windows(count)
        lines["labelling"][count] = seconds_of(bound(label_blocks, windows))
        lines["training, one epoch"][count] = seconds_of(epoch_call(windows, job))
    for count in (50, 100, 200, 400):
        with tempfile.TemporaryDirectory() as root:
            folder = write_csvs(Path(root, "data"), count, 5_000)
            lines["loading, files"][count] = seconds_of(bound(load, folder))

    picture = Picture(figsize=(10, 3.4), layout="constrained")
    for axis, (name, seconds) in zip(picture.subplots(1, 3), lines.items(), strict=True):
        axis.plot(seconds.keys(), seconds.values(), "o-")
        axis.set(title=name, xlabel="files" if "files" in name else "windows", ylabel="s")
        axis.set(xlim=(0, None), ylim=(0, None))
        told = ", ".join(f"{count} {value:.2f} s" for count, value in seconds.items())
        print(f"{name}: {told}")
    picture.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--rows", nargs="+", choices=ROWS, default=None, help="rows to measure; default: all")
    add("--device", default="cpu", help="cpu or cuda")
    add("--check", action="store_true", help="exit code 1 where a figure falls short")
    add("--growth", default=None, help="only draw time against size into this picture")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.growth:
        growth(args.growth, device)
        return 0

    began = time.perf_counter()
    RATES.update(measure_rates(device))
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    print(f"{name}, {threads}, torch {torch.__version__}")
    print(f"matmul {RATES['matmul'] / 1e9:.0f} GFLOP/s, copy {RATES['copy'] / 1e9:.1f} GB/s")
    print("| figure | measured | spread | wanted | times |\n|---|---|---|---|---|")
    short = 0
    rows = args.rows or (ROWS if device.type == "cpu" else ON_GPU)
    for row in rows:
        for item in ROWS[row](device):
            print(item.line(), flush=True)
            short += not item.is_good()
    print(f"{time.perf_counter() - began:.0f} s; {short} short of what is wanted")
    return 1 if short and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
