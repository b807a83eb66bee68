"""What one forecast costs, 720 points in and 96 out, beside other small forecasters.

    pip install -r requirements.txt onnx onnxscript onnxruntime \\
        chronos-forecasting granite-tsfm neuralforecast
    python benchmarks/peers.py

None of the further packages is needed for anything else here. All models have random weights,
which changes no time: the student at the script's sizes (torch, ONNX, ONNX with int8 weights),
Chronos-Bolt (tiny), TTM (context 512, as published), PatchTST of transformers (the student's sizes)
and MOIRAI 1 (small, 100 samples). A step of training is that of the student and of neuralforecast's
PatchTST of the same sizes, batch 32. All models take turns of half a second in one process; a time
is the median of their calls, in milliseconds a window. A row whose package is not there says so.
"""

import argparse
import contextlib
import io
import logging
import math
import os
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from common import HORIZON, LENGTH, STUDENT, md
from speed import BATCH, label_call, moirai, optimizer_of, series_windows, student_model
from torch import nn

BATCHES = (1, 64)
PATCH = 32  # of MOIRAI
TURN = 0.5  # s of a model in each turn ...
UNCOUNTED = 5  # ... after so many calls


# -- Forecasters -----------------------------------------------------------------------------------
# Each function returns (number of weights, {batch: call}).


def calls_of(model, ask):
    """(weights, batch -> call) of `ask(contexts (B, L, float32))` without gradients."""

    def call_of(batch):
        contexts = random_walks(batch)

        def call():
            with torch.inference_mode():
                return ask(contexts)

        return call

    return count_weights(model), {batch: call_of(batch) for batch in BATCHES}


def random_walks(count):
    """Contexts (count, L)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, LENGTH, generator=generator).cumsum(1)


def count_weights(model):
    return sum(weight.numel() for weight in model.parameters())


def whole_student():
    """A student with its quantiles."""
    torch.manual_seed(0)
    return md.PatchStudent(**STUDENT, quantile_width=md.QUANTILE_WIDTH).eval()


def student():
    model = whole_student()
    return calls_of(model, lambda contexts: model(contexts, True))


def student_points():
    model = whole_student()
    return calls_of(model, model)


def onnx_student(*flags):
    """The student as `export --format onnx` writes it, under onnxruntime."""
    import onnxruntime

    model = whole_student()
    with tempfile.TemporaryDirectory() as root:
        checkpoint = Path(root, "student")
        file = Path(root, "student.onnx")
        model.save_pretrained(checkpoint)
        words = ["export", "--checkpoint", checkpoint, "--format", "onnx", "--output", file, *flags]
        with contextlib.redirect_stdout(io.StringIO()):
            code = md.main([*map(str, words)])
        if code:
            raise SystemExit("the export of the student failed")
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        size = file.stat().st_size
    (name,) = [one.name for one in session.get_inputs()]
    kind = np.float64 if "double" in session.get_inputs()[0].type else np.float32
    calls = {}
    for batch in BATCHES:
        contexts = random_walks(batch).numpy().astype(kind)
        calls[batch] = lambda contexts=contexts: session.run(None, {name: contexts})
    return f"{count_weights(model):,} in {size / 1e6:.2f} MB", calls


def int8_student():
    return onnx_student("--int8")


def chronos_bolt():
    from chronos.chronos_bolt import ChronosBoltModelForForecasting
    from transformers import T5Config

    config = T5Config(
        vocab_size=2,
        d_model=256,
        d_kv=64,
        d_ff=1024,
        num_layers=4,
        num_decoder_layers=4,
        num_heads=4,
        dropout_rate=0.1,
        feed_forward_proj="relu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    config.chronos_config = {
        "context_length": 2048,
        "prediction_length": 64,
        "input_patch_size": 16,
        "input_patch_stride": 16,
        "quantiles": [level / 10 for level in range(1, 10)],
        "use_reg_token": True,
    }
    model = ChronosBoltModelForForecasting(config).eval()

    def ask(contexts):
        """Two blocks of 64 steps; the second from the median of the first, as its pipeline does."""
        first = model(contexts).quantile_preds
        again = torch.cat([contexts, first[:, 4]], 1)
        return torch.cat([first, model(again).quantile_preds], 2)[..., :HORIZON]

    return calls_of(model, ask)


def ttm():
    from tsfm_public.models.tinytimemixer import (
        TinyTimeMixerConfig,
        TinyTimeMixerForPrediction,
    )

    config = TinyTimeMixerConfig(
        context_length=512,
        prediction_length=HORIZON,
        patch_length=64,
        patch_stride=64,
        num_input_channels=1,
        d_model=192,
        expansion_factor=2,
        num_layers=2,
        adaptive_patching_levels=3,
        mode="common_channel",
        gated_attn=True,
        self_attn=False,
        scaling="std",
        dropout=0.2,
        head_dropout=0.2,
        use_decoder=True,
        decoder_num_layers=2,
        decoder_d_model=128,
        decoder_adaptive_patching_levels=0,
        decoder_raw_residual=False,
        decoder_mode="common_channel",
    )
    model = TinyTimeMixerForPrediction(config).eval()
    return calls_of(model, lambda contexts: model(contexts[:, -512:, None]).prediction_outputs)


def patch_tst():
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    config = PatchTSTConfig(
        num_input_channels=1,
        context_length=LENGTH,
        prediction_length=HORIZON,
        patch_length=STUDENT["patch_size"],
        patch_stride=STUDENT["patch_size"],
        d_model=STUDENT["d_model"],
        num_hidden_layers=STUDENT["num_layers"],
        num_attention_heads=STUDENT["num_heads"],
        ffn_dim=4 * STUDENT["d_model"],
        pooling_type=None,  # a linear map of all tokens, as in PatchTST's paper
        loss="mse",
    )
    model = PatchTSTForPrediction(config).eval()
    return calls_of(model, lambda contexts: model(contexts[..., None]).prediction_outputs)


def moirai_small():
    device = torch.device("cpu")
    module = moirai("small", device)
    teacher = md.Teacher(module, device, "32", print)
    calls = {}
    for batch in BATCHES:
        calls[batch] = label_call(teacher, series_windows(batch), batch, PATCH)
    return count_weights(module), calls


FORECASTERS = {
    "student, torch, points": (student_points, None),
    "student, torch, with quantiles": (student, None),
    "student, ONNX, with quantiles": (onnx_student, "onnx onnxscript onnxruntime"),
    "student, ONNX int8, with quantiles": (int8_student, "onnx onnxscript onnxruntime"),
    "TTM": (ttm, "granite-tsfm"),
    "PatchTST of transformers, points": (patch_tst, "transformers"),
    "Chronos-Bolt tiny, quantiles": (chronos_bolt, "chronos-forecasting"),
    "MOIRAI 1 small, median of 100": (moirai_small, "timecopilot-uni2ts"),
}


# -- Training --------------------------------------------------------------------------------------


def step_of(model, ask):
    """(weights, call of a step) of a model; `ask(contexts (B, L))` gives its forecasts (B, H)."""
    model.train()
    optimizer = optimizer_of(model)
    context, truth, _ = series_windows(BATCH).batch(np.arange(BATCH))

    def step():
        optimizer.zero_grad()
        nn.functional.mse_loss(ask(context), truth).backward()
        optimizer.step()

    return count_weights(model), step


def student_step():
    """The student, points alone."""
    model = student_model()
    return step_of(model, model)


def neural_step():
    """neuralforecast's PatchTST of the student's sizes."""
    from neuralforecast.losses.pytorch import MSE
    from neuralforecast.models import PatchTST

    model = PatchTST(
        h=HORIZON,
        input_size=LENGTH,
        patch_len=STUDENT["patch_size"],
        stride=STUDENT["patch_size"],
        hidden_size=STUDENT["d_model"],
        linear_hidden_size=4 * STUDENT["d_model"],
        encoder_layers=STUDENT["num_layers"],
        n_heads=STUDENT["num_heads"],
        loss=MSE(),
        max_steps=1,
    )
    return step_of(model, lambda contexts: model({"insample_y": contexts[..., None]})[..., 0])


STEPS = {
    "student": (student_step, None),
    "PatchTST of neuralforecast": (neural_step, "neuralforecast"),
}


# -- The table -------------------------------------------------------------------------------------


def built(table):
    """name -> (weights, what to call) of those whose packages are there; the others are told."""
    found = {}
    for name, (build, packages) in table.items():
        try:
            found[name] = build()
        except ImportError as error:
            print(f"{name}: left out ({error}); pip install {packages}", flush=True)
    return found


def take_turns(calls, seconds):
    """key -> median seconds of a call; each is called for about `seconds` in all, by turns.

    A turn begins with calls that do not count: the models before it took caches and memory.
    """
    took = {key: [] for key in calls}
    for _ in range(math.ceil(seconds / TURN)):
        for key, call in calls.items():
            for _ in range(UNCOUNTED):
                call()
            ends = time.perf_counter() + TURN
            while time.perf_counter() < ends:
                began = time.perf_counter()
                call()
                took[key].append(time.perf_counter() - began)
    return {key: statistics.median(times) for key, times in took.items()}


def written(weights):
    """How the number of weights stands in the table."""
    return weights if isinstance(weights, str) else f"{weights:,}"


def print_forecasts(seconds):
    """A line for each forecaster: its weights, and ms a window at each batch."""
    models = built(FORECASTERS)
    took = {}
    for batch in BATCHES:
        calls = {name: calls[batch] for name, (_, calls) in models.items()}
        took[batch] = take_turns(calls, seconds)
    heads = " | ".join(f"ms, batch {batch}" for batch in BATCHES)
    print(f"| forecast, 720 → 96 | weights | {heads} |\n|---|---|{'---|' * len(BATCHES)}")
    for name, (weights, _) in models.items():
        cells = [f"{1e3 * took[batch][name] / batch:.2f}" for batch in BATCHES]
        print(f"| {name} | {written(weights)} | {' | '.join(cells)} |")


def print_steps(seconds):
    """A line for each model's step of training."""
    models = built(STEPS)
    took = take_turns({name: step for name, (_, step) in models.items()}, seconds)
    print(f"| step of training, batch {BATCH} | weights | ms a window |\n|---|---|---|")
    for name, (weights, _) in models.items():
        print(f"| {name} | {written(weights)} | {1e3 * took[name] / BATCH:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20, help="for each figure")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    name = platform.processor() or platform.machine()
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    print(f"{name}, {threads}, torch {torch.__version__}")
    print_forecasts(args.seconds)
    print_steps(args.seconds)


if __name__ == "__main__":
    main()
