"""What does int8 do to the size, the errors and the times of an exported student?

    python moirai_distill.py --demo
    python benchmarks/int8.py --checkpoint checkpoints/demo/run

Four forms of one student: the checkpoint in PyTorch, and as ONNX files what `export` writes in
float32 and with `--int8`, and what onnxruntime's dynamic quantisation makes of the former, whose
products are of 8 bits, too. Errors are those of `evaluate` on the run's own test windows. Times are
CPU time of one thread; the forms take turns, and each round gives a ratio to ONNX in float32. The
last column says how far the forecast of a window moves with the others in its batch.
"""

import argparse
import contextlib
import io
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import md

WHOLE = "ONNX, float32"  # the times of the others are told beside its
BATCHES = {1: 20, 64: 1}  # windows -> calls of each form in a round


def run(*words):
    """Run a command of the script; what it says is shown only where it fails."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = md.main([str(word) for word in words])
    if code:
        raise SystemExit(f"{words}: exit code {code}\n{told.getvalue()[-3000:]}")


def write_forms(checkpoint, folder):
    """Name of a form -> its file, or the checkpoint itself."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    export = ["export", "--format", "onnx", "--checkpoint", checkpoint]
    run(*export, "--output", folder / "whole.onnx")
    run(*export, "--output", folder / "int8.onnx", "--int8")
    logging.disable(logging.WARNING)  # it recommends a step of its own, which changes nothing here
    quantize_dynamic(
        folder / "whole.onnx",
        folder / "dynamic.onnx",
        per_channel=True,
        weight_type=QuantType.QInt8,
    )
    return {
        "PyTorch, float32": checkpoint,
        WHOLE: folder / "whole.onnx",
        "ONNX, `--int8`": folder / "int8.onnx",
        "ONNX, dynamic quantisation": folder / "dynamic.onnx",
    }


def scores_of(forms, folder):
    """Name of a form -> its row of evaluation.json."""
    run("evaluate", "--device", "cpu", "--output_dir", folder, "--checkpoint", *forms.values())
    rows = json.loads((folder / "evaluation.json").read_text())["rows"]
    return {name: rows[str(path)] for name, path in forms.items()}


def seconds_of(students, context, calls, rounds):
    """Name of a form -> CPU seconds of one call in each round; the first round is not counted."""
    took = {name: [] for name in students}
    for number in range(rounds + 1):
        for name, student in students.items():
            began = time.process_time()
            for _ in range(calls):
                student(context, with_quantiles=student.has_quantiles)
            if number > 0:
                took[name].append((time.process_time() - began) / calls)
    return took


def shown_times(took, name):
    """Milliseconds of a form, and its ratio to ONNX in float32 with the quartiles of the rounds."""
    ratios = [own / whole for own, whole in zip(took[name], took[WHOLE], strict=True)]
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    milliseconds = 1e3 * statistics.median(took[name])
    return f"{milliseconds:.2f} ms, {middle:.2f} ({low:.2f}–{high:.2f})"


def change_by_batch(student, contexts):
    """Largest change of a forecast (in deviations of its context) in a batch with other windows."""
    alone = torch.cat([student(context[None]) for context in contexts])
    change = (student(contexts) - alone).abs().amax(1) / contexts.std(1)
    return float(change.max())


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", default="checkpoints/demo/run")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root, torch.inference_mode():
        forms = write_forms(args.checkpoint, Path(root))
        scores = scores_of(forms, Path(root))
        students = {}
        for name, path in forms.items():
            opened = md.open_onnx(path) if md.is_onnx(path) else md.open_student(path)
            students[name] = opened.student
        length = students[WHOLE].context_length
        walks = np.random.default_rng(0).standard_normal((max(BATCHES), length)).cumsum(1)
        contexts = torch.from_numpy(walks)
        took = {}
        for windows, calls in BATCHES.items():
            took[windows] = seconds_of(students, contexts[:windows], calls, args.rounds)
        moved = {name: change_by_batch(student, contexts) for name, student in students.items()}

    heads = ["", "MB", "MSE", "MAE", "WQL", "in the band", "batch 1", "batch 64", "moves by"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name, row in scores.items():
        cells = [name, f"{1e-6 * row['bytes']:.3f}", f"{row['mse']:.4f}", f"{row['mae']:.4f}"]
        cells += [f"{row['wql']:.4f}", f"{100 * row['coverage_80']:.1f} %"]
        cells += [shown_times(took[windows], name) for windows in BATCHES]
        print(f"| {' | '.join(cells)} | {moved[name]:.1e} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
