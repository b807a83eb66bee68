"""How many epochs does a warm start save on new rows of the same series?

    python benchmarks/warm_start.py

The series are those of the demo. A first student is trained on their older rows alone; then one
from the seed (cold) and one from the first student's weights (`--init_from`, warm) are trained on
the newer rows with the same flags. All train on truth alone. Printed are the validation losses,
which are of the newer rows, and the epoch in which each of the two comes to the lowest one of the
cold run.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import pandas as pd
from common import md

ROWS = 1500  # of each series
NEWER = 750  # rows that the first student has not seen


def write_parts(root):
    """Folders `older` and `newer` below root, each with the CSVs of the demo, cut by row."""
    md.write_demo_csvs(root / "whole", rows=ROWS)
    for name in ("older", "newer"):
        (root / name).mkdir()
    for path in sorted((root / "whole").glob("*.csv")):
        frame = pd.read_csv(path)
        frame[:-NEWER].to_csv(root / "older" / path.name, index=False)
        frame[-NEWER:].to_csv(root / "newer" / path.name, index=False)


def losses_of(data, folder, args, *more):
    """Validation losses of the epochs of a run of the script."""
    words = ["train", "--data_dir", data, "--save_dir", folder, "--split_by", "time"]
    words += ["--context_length", "192", "--prediction_length", "24", "--alpha", "0"]
    words += ["--max_windows", "100", "--learning_rate", "1e-3", "--device", args.device]
    words += ["--num_epochs", args.epochs, "--seed", args.seed, "--lang", "en", *more]
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = md.main([str(word) for word in words])
    assert code == 0, told.getvalue()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["validation_mse"] for line in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        write_parts(root)
        losses_of(root / "older", root / "first", args)
        cold = losses_of(root / "newer", root / "cold", args)
        warm = losses_of(root / "newer", root / "warm", args, "--init_from", root / "first")
    best = min(cold)
    for name, losses in (("cold", cold), ("warm", warm)):
        reached = [number for number, loss in enumerate(losses, 1) if loss <= best]
        when = f"in epoch {reached[0]}" if reached else "never"
        shown = " ".join(f"{loss:.4f}" for loss in losses)
        print(f"{name}: comes to {best:.4f} {when} of {len(losses)}; validation: {shown}")


if __name__ == "__main__":
    sys.exit(main())
