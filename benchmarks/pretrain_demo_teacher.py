"""Pretrain the demo teacher: a small MOIRAI that has seen nothing but synthetic series.

Two stages. The first learns hourly series at 720 + 96 points and takes a GPU; the second starts
from its weights, adds a patch size for short series, and learns all calendars and lengths:

    python benchmarks/pretrain_demo_teacher.py --compile --save_dir checkpoints/hourly_teacher
    python benchmarks/pretrain_demo_teacher.py --calendars --patch_sizes 4 8 16 32 --compile \\
        --start_from checkpoints/hourly_teacher --minutes 100 --learning_rate 1e-3 \\
        --warmup_steps 200 --keep_start 0.25

    python benchmarks/pretrain_demo_teacher.py --resume  # and the flags of the stopped run
    python benchmarks/pretrain_demo_teacher.py --validate_only  # the tables of the saved teacher

The first took 11 minutes (34,000 steps) on one H100, the second runs on one CPU core. Both leave a
`MoiraiModule` of uni2ts in --save_dir (config.json, model.safetensors, training.png) and the log
and the resumable state in --run_dir. No real series is read, except by --zero_shot_csv, whose
figures go into the picture only.

Sections: command line, the synthetic family, the family of all calendars, the held-out family,
windows, the network, forecasts, validation, files, training. Shapes: B series, T points of a series
(context and horizon), N tokens, P points of a patch, D width, K harmonics.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from uni2ts.common.torch_util import packed_attention_mask
from uni2ts.distribution import MixtureOutput, NormalOutput, StudentTOutput
from uni2ts.model.moirai.module import MoiraiModule
from uni2ts.module.position import QueryKeyProjection, RotaryProjection

CONTEXT = 720  # what the figures are measured at; training varies it ...
HORIZON = 96  # ... and this one
LENGTH = CONTEXT + HORIZON
MAX_HORIZON = 192
FFT_LENGTH = 2048  # of coloured noise: a circle so long that a window is no whole cycle of it
GRID = 240  # points of a daily profile: ten an hour where the period is 24


# -- Command line ----------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--save_dir", default="checkpoints/demo_teacher", help="for the weights and the picture")
    run_dir = "checkpoints/demo_teacher_run"
    add("--run_dir", default=run_dir, help="for the log and the resumable state")
    add("--resume", action="store_true", help="go on from run_dir/state.pt, with the same flags")
    steps_help = "optimiser steps; the learning rate ends at 0 with them"
    add("--steps", type=int, default=34_000, help=steps_help)
    start_help = "a teacher's folder; a patch size that it lacks comes from the double one"
    add("--start_from", help=start_help)
    keep_help = "share of --start_from's weights in the finished teacher's"
    add("--keep_start", type=float, default=0.0, help=keep_help)
    calendars_help = "the second stage: series of all calendars and lengths beside the hourly ones"
    add("--calendars", action="store_true", help=calendars_help)
    minutes_help = "training minutes over all resumes; the rate then follows the clock"
    add("--minutes", type=float, help=minutes_help)
    stop_help = "leave after so many minutes, state saved, to --resume later"
    add("--stop_minutes", type=float, help=stop_help)
    batch_help = "series per patch size and step (default: 512 on a GPU, 32 on a CPU)"
    add("--batch_size", type=int, help=batch_help)
    add("--learning_rate", type=float, default=4e-3, help="peak, after the warm-up; cosine to 0")
    add("--warmup_steps", type=int, default=500, help="linear warm-up of the learning rate")
    add("--weight_decay", type=float, default=0.01, help="AdamW, on the matrices only")
    add("--d_model", type=int, default=128, help="width; uni2ts makes d_model // 64 heads of it")
    add("--num_layers", type=int, default=4, help="4 layers of width 128 stay under 4 MB")
    sizes = [8, 16, 32]
    add("--patch_sizes", type=int, nargs="+", default=sizes, help="all are trained at every step")
    add("--seed", type=int, default=0, help="of the weights and of the training series")
    every_help = "steps between two validations (and saved states)"
    add("--eval_every", type=int, default=2_000, help=every_help)
    add("--eval_series", type=int, default=1_024, help="held-out series of each kind")
    add("--device", help="default: cuda if there is one, else cpu")
    compile_help = "fuse the encoder's kernels: costs a minute or two at start"
    add("--compile", action="store_true", help=compile_help)
    zero_shot_help = "a real CSV, scored at each validation, for the picture alone"
    add("--zero_shot_csv", help=zero_shot_help)
    validate_help = "print the validation table of save_dir and leave"
    add("--validate_only", action="store_true", help=validate_help)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """All that is wrong with the arguments, in one message."""
    wrong = []
    if args.d_model < 64 or args.d_model % (args.d_model // 64 or 1):
        wrong.append("--d_model must be at least 64 and divisible by d_model // 64")
    if any(size < 1 or 32 % size for size in args.patch_sizes):
        wrong.append("--patch_sizes must divide 32")
    if args.zero_shot_csv and not Path(args.zero_shot_csv).is_file():
        wrong.append(f"--zero_shot_csv: no such file: {args.zero_shot_csv}")
    if args.start_from and not (Path(args.start_from) / "config.json").is_file():
        wrong.append(f"--start_from: no teacher in {args.start_from}")
    if not 0 <= args.keep_start < 1 or (args.keep_start and not args.start_from):
        wrong.append("--keep_start must be at least 0 and below 1, and takes --start_from")
    if args.resume and not (Path(args.run_dir) / "state.pt").is_file():
        wrong.append(f"--resume: no state.pt in {args.run_dir}")
    if wrong:
        raise SystemExit("\n".join(wrong))


# -- The synthetic family --------------------------------------------------------------------------


class Draw:
    """Random parameters, one row per series, from one seeded generator on the device."""

    def __init__(self, batch: int, generator: torch.Generator):
        self.batch = batch
        self.generator = generator
        self.device = generator.device

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        shape = (self.batch, *(shape or (1,)))
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.device)

    def log_uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return self.uniform(math.log(low), math.log(high), *shape).exp()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(
            (self.batch, *(shape or (1,))), generator=self.generator, device=self.device
        )

    def coin(self, p: float, *shape: int) -> Tensor:
        """1.0 with probability p, else 0.0."""
        return (self.uniform(0, 1, *shape) < p).float()

    def pick(self, *weights: float) -> Tensor:
        """An index, (B, 1), drawn with these weights."""
        edges = torch.tensor(weights, device=self.device).cumsum(0) / sum(weights)
        return torch.bucketize(self.uniform(0, 1), edges[:-1])

    def permutation(self) -> Tensor:
        return torch.randperm(self.batch, generator=self.generator, device=self.device)


def standardise(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True).clamp_min(1e-6)


def draw_periods(d: Draw) -> Tensor:
    """The main cycle in steps, (B, 1): mostly a day of hours, some other rates, some free."""
    table = torch.tensor([24.0, 12.0, 48.0, 96.0, 144.0, 7.0, 0.0], device=d.device)
    period = table[d.pick(0.78, 0.02, 0.04, 0.03, 0.01, 0.02, 0.10)]
    return torch.where(period == 0, d.log_uniform(4, 300), period)


def draw_profiles(d: Draw, count: int) -> Tensor:
    """Shapes of one cycle, (B, count, GRID), mean 0 and deviation 1.

    They are of harmonics, bumps, on-off, or rectified.
    """
    angle = torch.arange(GRID, device=d.device) * (2 * math.pi / GRID)
    k = torch.arange(1, 13, device=d.device)
    size = d.normal(count, 24) * d.coin(0.75, count, 24) * k.repeat(2) ** -d.uniform(0.2, 2.4, 1, 1)
    turns = k[:, None] * angle
    waves = size @ torch.cat([torch.cos(turns), torch.sin(turns)])  # (B, count, GRID)
    centre = d.uniform(0, 2 * math.pi, count, 3, 1)
    bumps = (d.log_uniform(2, 200, count, 3, 1) * (torch.cos(angle - centre) - 1)).exp()
    bumps = (d.normal(count, 3, 1) * bumps).sum(2)
    centre = d.uniform(0, 2 * math.pi, count, 1)
    box = (
        d.log_uniform(3, 80, count, 1)
        * (torch.cos(angle - centre) - d.uniform(-0.9, 0.9, count, 1))
    ).sigmoid()
    waves, bumps, box = (standardise(part) for part in (waves, bumps, box))
    mix = waves * d.coin(0.75, 1, 1) + bumps * (d.coin(0.35, 1, 1) * d.uniform(0.3, 2, 1, 1))
    mix = mix + box * (d.coin(0.2, 1, 1) * d.uniform(0.3, 2, 1, 1)) + 0.05 * waves
    rectified = (standardise(mix) - d.uniform(-1, 0.8, 1, 1)).relu()
    return standardise(torch.where(d.coin(0.15, 1, 1) > 0, rectified, mix))


def draw_coloured(d: Draw, length: int, period: Tensor) -> list[Tensor]:
    """Stationary Gaussian processes by their spectra, each (B, T).

    These are [level, noise, amplitude, volatility, cycle]. Level and noise revert to their mean at
    any speed from minutes to months; `cycle` is a seasonal pattern that forgets itself (spectral
    lines of finite width at the harmonics of the period).
    """
    f = torch.arange(1, FFT_LENGTH // 2 + 1, device=d.device) / FFT_LENGTH  # (F,), no constant

    def matern(tau: Tensor, power: Tensor) -> Tensor:
        s = (1 + (2 * math.pi * tau * f) ** 2) ** (-power / 2)
        return s / s.sum(-1, keepdim=True)

    share = d.uniform(0, 1) * d.coin(0.5)
    level = (1 - share) * matern(d.log_uniform(8, 4000), d.uniform(1.5, 4))
    level = level + share * matern(d.log_uniform(3, 200), d.uniform(1.5, 3))
    noise = matern(d.log_uniform(0.05, 12), d.uniform(1, 3))
    amplitude = matern(d.log_uniform(40, 1500), d.uniform(2, 4))
    volatility = matern(d.log_uniform(6, 1000), d.uniform(2, 4))
    bins = d.log_uniform(0.3, 20)  # 20: forgotten after some days
    width = bins / FFT_LENGTH * (24 / period)
    decay = d.uniform(0.3, 2)
    cycle = torch.zeros_like(level)
    for k in range(1, 7):
        line = (1 + ((f - k / period) / width) ** 2) ** -2
        cycle = cycle + d.uniform(0, 1) ** 2 * k**-decay * line
    cycle = cycle / cycle.sum(-1, keepdim=True).clamp_min(1e-9)
    power = torch.stack([level, noise, amplitude, volatility, cycle], 1)  # (B, 5, F)
    waves = torch.complex(d.normal(*power.shape[1:]), d.normal(*power.shape[1:])) * power.sqrt()
    series = torch.fft.irfft(F.pad(waves, (1, 0)), n=FFT_LENGTH, norm="forward")[..., :length]
    return list(series.unbind(1))


def draw_seasonality(d: Draw, t: Tensor, period: Tensor, slow: Tensor) -> Tensor:
    """Daily profiles of two day types in a weekly rhythm, slowly blending into a third, (B, T)."""
    profiles = draw_profiles(d, 3)
    # Rest days mostly resemble working days.
    similar = d.uniform(0, 1, 1, 1) ** 0.5 * d.coin(0.9, 1, 1)
    profiles[:, 1:] = similar * profiles[:, :1] + (1 - similar) * profiles[:, 1:]
    drift = d.coin(0.12) * d.log_uniform(0.02, 0.5) * slow  # the phase wanders, in cycles
    clock = (t + d.uniform(0, 1) * 7 * period).floor() / period + drift  # in cycles
    cell = ((clock - clock.floor()) * GRID).long().clamp(0, GRID - 1)  # (B, T)
    day = clock.floor().long().remainder(7)

    weekday = torch.arange(7, device=d.device)
    rest = ((weekday + 1) < 2 + (d.uniform(0, 1) < 0.3)).float() * (d.uniform(0, 1) < 0.4)  # (B, 7)
    free = d.coin(0.2)
    amplitude = 1 + rest * (d.uniform(0.1, 1.3) - 1) + free * 0.4 * d.normal(7)
    offset = rest * d.normal() * 0.9 + free * d.uniform(0, 1) * d.normal(7)
    amplitude, offset, rest = (x.gather(1, day) for x in (amplitude, offset, rest))  # (B, T)

    flat = profiles.flatten(1)
    season = flat.gather(1, cell + GRID * (rest > 0).long())
    blend = d.coin(0.3) * (2 * slow + d.normal()).sigmoid()
    season = season + blend * (flat.gather(1, cell + 2 * GRID) - season)
    days = clock.floor().long().clamp(0, 255).remainder(64)
    share = d.coin(0.3) * d.log_uniform(0.05, 0.6)
    daily = 1 + share * d.normal(64).gather(1, days)  # every day has its own size
    return season * amplitude * daily + offset


def draw_events(d: Draw, t: Tensor) -> Tensor:
    """Level shifts, temporary ones too, bends of the trend, and shots that decay, (B, T)."""
    length = t.shape[-1]
    x = torch.zeros(d.batch, length, device=d.device)
    shifting = d.coin(0.16)
    bending = d.coin(0.35)
    for _ in range(3):
        start = d.uniform(-0.2, 1) * length
        end = start + torch.where(d.coin(0.5) > 0, d.log_uniform(3, 400), 2.0 * length)
        x = x + shifting * d.coin(0.5) * d.normal() * ((t >= start) & (t < end))
    for _ in range(2):
        start = d.uniform(-1, 0.9) * length
        ramp = torch.where(
            d.coin(0.6) > 0,
            (t - start).relu() / length,
            ((t - start) / d.log_uniform(20, 600)).tanh(),
        )
        x = x + bending * d.log_uniform(0.1, 2) * d.normal() * ramp
    rate = d.log_uniform(1e-3, 4e-2)
    hit = d.uniform(0, 1, length) < rate
    last = torch.where(hit, t.long(), -1).cummax(-1).values
    sizes = d.normal(length).abs() + d.coin(0.3) * d.normal(length).abs() ** 2
    sizes = sizes * torch.where(d.coin(0.7) > 0, torch.ones_like(sizes), d.normal(length).sign())
    shot = (
        sizes.gather(1, last.clamp_min(0))
        * (-(t - last) / d.log_uniform(0.2, 30)).exp()
        * (last >= 0)
    )
    return x + d.coin(0.12) * d.log_uniform(0.5, 5) * d.normal().sign() * shot


def observe(d: Draw, x: Tensor) -> Tensor:
    """How a smooth real value is seen.

    As it is, positive, clipped, counted, intermittent, rounded, saturated, or held.
    """
    z = standardise(x)
    t = torch.arange(x.shape[-1], device=d.device)
    positive = (d.uniform(0.2, 0.8) * z.clamp(-4, 4)).exp()
    floor = d.uniform(-1.5, 0.4)
    clipped = torch.maximum(z, floor).minimum(
        floor + torch.where(d.coin(0.4) > 0, d.uniform(0.5, 3), 99.0)
    )
    counts = torch.poisson(
        (positive * d.log_uniform(0.2, 100)).clamp(max=1e4), generator=d.generator
    )
    there = d.uniform(0, 1, x.shape[-1]) < (d.uniform(0, 3) * z + d.uniform(-2, 2)).sigmoid()
    step = d.log_uniform(0.05, 0.7)
    held = z.gather(
        1, torch.where(d.uniform(0, 1, x.shape[-1]) < d.uniform(0.15, 0.9), t, 0).cummax(-1).values
    )
    kinds = [
        z,
        positive,
        clipped,
        counts,
        positive * there,
        (z / step).round() * step,
        (z * d.uniform(0.7, 2)).tanh(),
        held,
    ]
    kind = d.pick(0.72, 0.08, 0.05, 0.04, 0.02, 0.04, 0.03, 0.02)
    y = torch.stack(kinds, 1).gather(1, kind[..., None].expand(-1, 1, x.shape[-1])).squeeze(1)
    distance = (t - d.uniform(0, 1) * len(t)).abs()
    outage = distance < d.log_uniform(1, 60) * d.coin(0.03)  # the sensor reads its lowest
    return torch.where(outage, y.amin(-1, keepdim=True), y)


def training_family(
    batch: int, generator: torch.Generator, length: int = LENGTH
) -> tuple[Tensor, Tensor]:
    """Series (B, T) of the family that is trained on, and the season (B,) of each.

    The season is what a seasonal-naive forecast should use.
    """
    d = Draw(batch, generator)
    t = torch.arange(length, device=d.device, dtype=torch.float32)[None]  # (1, T)
    period = draw_periods(d)
    level, noise, slow, volatility, cycle = draw_coloured(d, length, period)
    season = draw_seasonality(d, t, period, slow)

    regime = 1 + (t >= d.uniform(0, 1) * length) * d.coin(0.1) * (d.uniform(0.1, 2.5) - 1)
    amplitude = (d.coin(0.45) * d.uniform(0.05, 0.5) * slow).exp() * regime
    amplitude = amplitude * (1 + d.coin(0.2) * d.uniform(0.1, 0.8) * level).relu()
    size = d.log_uniform(0.3, 4) * d.coin(0.9)
    spread = (d.coin(0.25) * d.uniform(0.2, 0.7) * volatility).exp() * regime
    spread = spread * (d.coin(0.3) * d.uniform(-0.2, 0.6) * season).clamp(-2, 2).exp()
    spread = spread * (d.coin(0.2) * d.uniform(0.2, 0.8) * d.normal(length)).exp()  # heavy tails

    own = torch.where(
        d.coin(0.3) > 0, period / d.pick(0, 1, 1, 1).clamp_min(1), d.log_uniform(3, 700)
    )
    own = torch.where(d.coin(0.2) > 0, 7 * period, own)
    turn = 2 * math.pi * (t / own + d.uniform(0, 1))
    free = (
        d.coin(0.25)
        * d.log_uniform(0.1, 2)
        * (turn.sin() + d.uniform(0, 0.7) * (2 * turn + 6.3 * d.uniform(0, 1)).sin())
    )

    x = (
        size * amplitude * season
        + d.coin(0.45) * d.log_uniform(0.15, 1.5) * amplitude * cycle
        + free
    )
    x = x + d.coin(0.85) * d.log_uniform(0.1, 2.5) * level + draw_events(d, t)
    x = (
        x
        + d.log_uniform(0.03, 1.2) * spread * noise
        + d.coin(0.3) * d.log_uniform(0.02, 0.5) * d.normal(length)
    )
    x = standardise(x)
    share = d.uniform(0, 0.5) * d.coin(0.15)
    x = (1 - share) * x + share * x[d.permutation()]  # sums of two series
    y = observe(d, x) * (1 - 2 * d.coin(0.25))
    return y, period.round().long().squeeze(1)


# -- The family of all calendars -------------------------------------------------------------------

# Steps of a usual cycle, how often it is drawn, steps of the longer cycle beside it (0: none).
CALENDARS = (
    (1, 0.16, 0),  # years, and whatever has no season
    (4, 0.12, 0),  # quarters
    (12, 0.22, 0),  # months, five minutes of an hour, two hours of a day
    (52.18, 0.12, 0),  # weeks
    (7, 0.12, 365.25),  # days
    (5, 0.05, 21),  # working days
    (24, 0.04, 168),  # hours
    (48, 0.02, 336),
    (96, 0.02, 672),
    (144, 0.01, 1008),
    (288, 0.01, 2016),
    (0, 0.11, 0),  # any other period
)
PHASES = 365  # of the table that holds one season


def draw_calendar(d: Draw, length: int) -> tuple[Tensor, Tensor]:
    """The season in steps and the longer one beside it (0: none), (B, 1).

    Most seasons are drawn so that a window of `length` points holds two of them or more.
    """
    seasons = torch.tensor([row[0] for row in CALENDARS], device=d.device)
    weights = torch.tensor([row[1] for row in CALENDARS], device=d.device)
    longer = torch.tensor([row[2] for row in CALENDARS], device=d.device)
    weights = weights * torch.where(seasons * 2.5 <= length, 1.0, 0.15)
    row = d.pick(*weights.tolist())
    free = d.log_uniform(2, min(400, length / 1.5))
    season = torch.where(seasons[row] == 0, free, seasons[row])
    has_longer = (longer[row] > 0) & (longer[row] < 2 * length)
    return season, torch.where(has_longer, longer[row], 0.0)


def draw_tables(d: Draw, season: Tensor, count: int) -> Tensor:
    """Shapes of one season, (B, count, PHASES), mean 0 and deviation 1 over its phases.

    They are smooth (harmonics), one weight for each step (as of weekdays and months), and peaks.
    """
    phase = torch.arange(PHASES, device=d.device)
    steps = season.round().clamp(1, PHASES)[:, None]  # (B, 1, 1)
    is_used = phase < steps
    k = torch.arange(1, 7, device=d.device)
    turns = 2 * math.pi * k[:, None] * phase / steps[..., None]  # (B, 1, 6, PHASES)
    size = d.normal(count, 2, 6) * k ** -d.uniform(0.3, 2.5, 1, 1, 1)
    size = size * (k <= (steps[..., None] / 2).clamp_min(1))
    turns = turns.squeeze(1)
    smooth = size[:, :, 0] @ turns.cos() + size[:, :, 1] @ turns.sin()  # (B, count, PHASES)
    rough = d.normal(count, PHASES)
    peaks = rough * (d.uniform(0, 1, count, PHASES) < d.log_uniform(1, 4, 1, 1) / steps)

    def unit(x: Tensor) -> Tensor:
        x = torch.where(is_used, x, 0.0)
        x = torch.where(is_used, x - x.sum(-1, keepdim=True) / steps, 0.0)
        return x / (x.square().sum(-1, keepdim=True) / steps).sqrt().clamp_min(1e-3)

    is_short = torch.where(steps <= 12, 0.7, 0.15)
    mix = unit(smooth) * d.coin(0.8, 1, 1) + 0.05 * unit(smooth)
    mix = mix + unit(rough) * (d.uniform(0, 1, 1, 1) < is_short) * d.uniform(0.1, 1.5, 1, 1)
    return unit(mix + 0.7 * unit(peaks) * d.coin(0.25, 1, 1) * d.uniform(0.3, 2, 1, 1))


def draw_season(d: Draw, t: Tensor, season: Tensor) -> Tensor:
    """A season of deviation about 1 that mostly stays, or slowly becomes another one, (B, T)."""
    tables = draw_tables(d, season, 2)
    length = t.shape[-1]
    clock = (t + d.uniform(0, 1) * season) / season  # in seasons
    steps = season.round().clamp(1, PHASES)
    phase = ((clock - clock.floor()) * steps).long().clamp(0, PHASES - 1)
    first = tables[:, 0].gather(1, phase)
    second = tables[:, 1].gather(1, phase)
    middle = d.uniform(0, 1) * length
    change = d.uniform(0.1, 1) * d.coin(0.3) * ((t - middle) / d.log_uniform(0.05, 1) / length)
    weight = change.sigmoid() * d.uniform(0, 0.8) * (change != 0)
    growth = 1 + d.coin(0.3) * d.uniform(-0.8, 1.5) * t / length
    own_size = 1 + d.coin(0.3) * d.log_uniform(0.03, 0.5) * d.normal(64).gather(
        1, clock.floor().long().remainder(64)
    )
    return ((1 - weight) * first + weight * second) * growth * own_size


def draw_arma(d: Draw, length: int) -> list[Tensor]:
    """Stationary processes (B, T) of deviation about 1: an AR(1) each for level, momentum, noise,
    and a cycle that turns irregularly, an AR(2).
    """
    n = 2 * length  # a circle twice as long as the window
    turn = torch.fft.rfftfreq(n, device=d.device) * (2 * math.pi)
    z = torch.polar(torch.ones_like(turn), -turn)  # one step back, (F,)
    memory = torch.stack(
        [
            1 - d.log_uniform(0.003, 0.5).squeeze(1),  # level
            (d.uniform(0, 0.98) * d.coin(0.7)).squeeze(1),  # momentum
            (d.uniform(-0.5, 0.9) * d.coin(0.6)).squeeze(1),  # noise
        ],
        1,
    )[..., None]  # (B, 3, 1)
    first_order = (1 - memory**2).sqrt() / (1 - memory * z)
    damp = 1 - d.log_uniform(0.002, 0.15)[..., None]
    period = d.log_uniform(3, max(12, length / 3))[..., None]
    second_order = 1 / (1 - 2 * damp * (2 * math.pi / period).cos() * z + damp**2 * z**2)
    gain = torch.cat([first_order, second_order], 1)  # (B, 4, F)
    gain[..., 0] = torch.where(torch.arange(4, device=d.device) == 3, 0, gain[..., 0])
    white = d.normal(4, n)
    heavy = (d.coin(0.3, 4, 1) * d.uniform(0.2, 0.9, 4, 1) * d.normal(4, n)).exp()
    series = torch.fft.irfft(torch.fft.rfft(white * heavy) * gain, n=n)
    series = series / series.std(-1, keepdim=True).clamp_min(1e-6)
    return list(series[..., length:].unbind(1))


def draw_trend(d: Draw, t: Tensor, momentum: Tensor) -> Tensor:
    """Where a series goes: straight, bent, saturating, or a random walk, (B, T), range about 1."""
    length = t.shape[-1]
    walk = (momentum + d.normal() * d.coin(0.7) * d.log_uniform(0.05, 1.5)).cumsum(-1)
    walk = walk / walk.std(-1, keepdim=True).clamp_min(1e-6)
    u = t / length
    bends = torch.zeros_like(walk)
    for _ in range(2):
        start = d.uniform(0, 1)
        bends = bends + d.coin(0.6) * d.normal() * (u - start).relu()
    straight = d.normal() * u + d.coin(0.4) * bends
    saturating = d.normal() * ((u - d.uniform(-0.2, 1)) / d.log_uniform(0.05, 0.5)).tanh()
    kinds = torch.stack([walk, straight, saturating, torch.zeros_like(walk)], 1)
    kind = d.pick(0.45, 0.3, 0.07, 0.18)
    return kinds.gather(1, kind[..., None].expand(-1, 1, length)).squeeze(1)


def draw_shifts(d: Draw, t: Tensor) -> Tensor:
    """Lasting and passing shifts of the level and single outliers, mostly none, (B, T)."""
    length = t.shape[-1]
    shifts = torch.zeros(d.batch, length, device=d.device)
    is_shifting = d.coin(0.15)
    for _ in range(2):
        start = d.uniform(-0.1, 1) * length
        end = start + torch.where(d.coin(0.6) > 0, 2.0 * length, d.log_uniform(1, length / 4))
        shifts = shifts + is_shifting * d.coin(0.7) * d.normal() * ((t >= start) & (t < end))
    is_outlier = d.uniform(0, 1, length) < d.log_uniform(0.003, 0.04) * d.coin(0.12)
    return 2 * shifts + is_outlier * 4 * d.normal(length)


def see_calendar(d: Draw, x: Tensor, is_positive: Tensor) -> Tensor:
    """How values (B, T) are seen: as they are, counted, rarely, rounded, saturated, held."""
    length = x.shape[-1]
    t = torch.arange(length, device=d.device)
    z = standardise(x)
    rate = torch.where(is_positive, x / x.mean(-1, keepdim=True).clamp_min(1e-6), (0.5 * z).exp())
    rate = rate.clamp(0, 50) * d.log_uniform(0.1, 200)
    rate = rate * (d.coin(0.4) * d.uniform(0.1, 0.7) * d.normal(length)).exp()  # overdispersed
    counts = torch.poisson(rate.clamp(max=1e4), generator=d.generator)
    there = d.uniform(0, 1, length) < (d.uniform(0, 1.5) * z + d.uniform(-2.5, 0.5)).sigmoid()
    sizes = there * (rate + 0.1) * (d.uniform(0, 0.8) * d.normal(length)).exp()
    step = d.log_uniform(0.03, 0.5)
    low = d.uniform(-2, -0.3)
    high = d.uniform(0.3, 2.5)
    held_at = torch.where(d.uniform(0, 1, length) < d.uniform(0.1, 0.8), t, 0).cummax(-1).values
    kinds = [
        x,
        counts,
        sizes,
        (z / step).round() * step,
        z.clamp_min(low).minimum(torch.where(d.coin(0.5) > 0, high, 99.0)),
        (d.uniform(0.7, 2.5) * z + d.normal()).sigmoid(),  # a share
        z.gather(1, held_at),
    ]
    kind = d.pick(0.74, 0.08, 0.04, 0.05, 0.04, 0.04, 0.01)
    return torch.stack(kinds, 1).gather(1, kind[..., None].expand(-1, 1, length)).squeeze(1)


def calendar_family(batch: int, generator: torch.Generator, length: int) -> tuple[Tensor, Tensor]:
    """Series (B, T) of every usual calendar, and the season (B,) of each.

    Trend, season, cycle and noise are added, or they multiply each other (growth in per cent).
    """
    d = Draw(batch, generator)
    t = torch.arange(length, device=d.device, dtype=torch.float32)[None]  # (1, T)
    season, longer = draw_calendar(d, length)
    level, momentum, noise, cycle = draw_arma(d, length)

    seasonal = draw_season(d, t, season) * (season > 1.5)
    year = draw_season(d, t, longer.clamp_min(2)) * (longer > 0)
    x = d.coin(0.85) * d.log_uniform(0.05, 3) * seasonal
    x = x + d.coin(0.7) * d.log_uniform(0.05, 3) * year
    x = x + d.log_uniform(0.1, 6) * draw_trend(d, t, momentum)
    x = x + d.coin(0.5) * d.log_uniform(0.1, 2) * level
    has_cycle = torch.where(season > 1.5, 0.15, 0.35)
    x = x + (d.uniform(0, 1) < has_cycle) * d.log_uniform(0.2, 3) * cycle
    spread = (d.coin(0.2) * d.uniform(0.2, 0.8) * level).exp()
    x = x + d.log_uniform(0.02, 1.2) * spread * noise + 0.5 * draw_shifts(d, t) * d.uniform(0, 1)

    z = standardise(x)
    grown = (d.log_uniform(0.03, 1.2) * z).clamp(-8, 8).exp()
    is_grown = d.coin(0.45) > 0
    x = torch.where(is_grown, grown, z)
    sign = 1 - 2 * torch.where(is_grown, d.coin(0.1), d.coin(0.4))
    y = see_calendar(d, x, is_grown) * sign
    return y, season.round().long().clamp_min(1).squeeze(1)


# -- The held-out family ---------------------------------------------------------------------------


def held_out_family(
    batch: int, generator: torch.Generator, length: int = LENGTH
) -> tuple[Tensor, Tensor]:
    """Series (B, T) of a family that is not trained on, to choose recipes on, and their season.

    They are from recursions that the training family does not contain, by thirds: a structural
    model (level, slope and 24 seasonal states, all of them wandering, GARCH noise), a heated and
    occupied building in random weather, and a queue with limited service.
    """
    d = Draw(batch, generator)
    n = batch
    warm = 14 * 24
    row = torch.arange(n, device=d.device)
    states = d.normal(24)
    level = d.normal()[:, 0] * 0
    slope = d.normal()[:, 0] * 0
    variance, shock, weather, inside, queue = (torch.zeros(n, device=d.device) for _ in range(5))
    wander = d.log_uniform(0.005, 0.1)[:, 0]
    drift = d.log_uniform(0.005, 0.2)[:, 0]
    damp = d.log_uniform(0.8, 0.999)[:, 0]
    noise = d.log_uniform(0.05, 1)[:, 0]
    keep = d.uniform(0.9, 0.995)[:, 0]
    gain = d.log_uniform(0.3, 3)[:, 0]
    inertia = d.uniform(0.5, 0.97)[:, 0]
    swing = d.uniform(0.5, 4)[:, 0]
    opening = d.uniform(5, 11)[:, 0]
    hours = d.uniform(6, 13)[:, 0]
    weekend = d.uniform(0, 1)[:, 0]
    base = d.log_uniform(1, 30)[:, 0]
    capacity = base * d.uniform(0.9, 2.5)[:, 0]
    out = []
    for step in range(warm + length):
        hour = step % 24
        weekday = step // 24 % 7
        e = torch.randn(n, 5, generator=generator, device=d.device)
        variance = 0.1 + 0.2 * shock**2 + 0.65 * variance
        shock = variance.sqrt() * e[:, 0]
        slope = damp * slope + 0.05 * drift * e[:, 1]
        level = 0.999 * level + slope + drift * e[:, 2]
        states[:, hour] += wander * e[:, 3]
        structural = level + states[:, hour] + noise * shock

        weather = keep * weather + (1 - keep**2).sqrt() * 4 * e[:, 4]
        outside = weather + swing * math.cos((hour - 15) * math.pi / 12)
        is_open = (hour >= opening) & (hour < opening + hours)
        busy = is_open.float() * (weekend if weekday >= 5 else 1.0)
        need = (2 + 4 * busy - outside - inside).relu()
        inside = inertia * inside + (1 - inertia) * (need + outside * 0.2)
        load = gain * need.clamp(max=9) + 3 * busy + 0.3 * shock

        arrivals = torch.poisson(
            base * (0.15 + busy + 0.5 * states[:, hour].sigmoid()), generator=generator
        )
        served = torch.minimum(queue + arrivals, capacity.round())
        queue = (queue + arrivals - served) * 0.9
        out.append(torch.stack([structural, load, served + (row % 2) * queue], 1)[row, row % 3])
    return torch.stack(out[warm:], 1), torch.full((n,), 24, device=d.device)


# Season, context and horizon of the held-out series of each calendar.
HELD_OUT_CALENDARS = {
    "years": (1, 40, 6),
    "quarters": (4, 48, 8),
    "working days": (5, 250, 20),
    "days": (7, 364, 28),
    "months, short": (12, 36, 12),
    "months": (12, 120, 18),
    "hours": (24, 336, 48),
    "half hours": (48, 336, 96),
    "weeks": (52, 208, 26),
    "quarter hours": (96, 672, 96),
    "ten minutes": (144, 720, 96),
    "weeks of hours": (168, 720, 96),
    "five minutes": (288, 720, 96),
    "years of days": (365, 1095, 90),
}


def held_out_calendar(batch: int, generator: torch.Generator, season: int, length: int) -> Tensor:
    """Series (B, T) of one calendar by textbook recursions that no training family contains.

    By quarters of the batch: exponential smoothing with additive and with multiplicative errors
    (level, damped slope and seasonal states, all of them wandering), the airline model
    ARIMA(0,1,1)(0,1,1), and counts whose rate follows the last counts (INGARCH).
    """
    d = Draw(batch, generator)
    kind = torch.arange(batch, device=d.device) % 4
    k = torch.arange(1, 4, device=d.device)
    turns = k[:, None] * torch.arange(season, device=d.device) * (2 * math.pi / season)
    smooth = (d.normal(3) / k) @ turns.cos() + (d.normal(3) / k) @ turns.sin()  # (B, season)
    states = smooth + d.uniform(0, 1) * d.coin(0.5) * d.normal(season)
    states = states - states.mean(1, keepdim=True)
    states = states * d.log_uniform(0.2, 2) * (season > 1)
    alpha, beta, gamma = (d.log_uniform(0.02, 0.9) * part for part in (1.0, 0.15, 0.2))
    damp = d.uniform(0.8, 1)
    noise = d.log_uniform(0.1, 1)
    slope = 0.1 * d.normal() * noise
    level = d.normal()
    per_cent = d.log_uniform(0.02, 0.15)  # what one unit is in the multiplicative model
    theta = d.uniform(0.1, 0.9)
    big_theta = d.uniform(0.3, 0.95)
    rate = d.log_uniform(0.3, 30)
    again = d.uniform(0, 0.5)
    remember = d.uniform(0, 0.4)
    lag = season if season > 1 else 0
    first = states[:, torch.arange(max(lag + 1, 2), device=d.device) % season] + level
    airline = list(first.split(1, 1))
    shocks = [torch.zeros_like(level) for _ in airline]
    states = list(states.split(1, 1))
    count, mean_count = rate, rate
    log_level, log_slope = level * 0, 0.1 * slope
    log_states = [per_cent * state for state in states]
    seen = []
    for step in range(length):
        now = step % season
        e = noise * d.normal()
        additive = level + damp * slope + states[now] + e
        level = level + damp * slope + alpha * e
        slope = damp * slope + beta * e
        states[now] = states[now] + gamma * e * (season > 1)

        error = per_cent * e
        product = (log_level + damp * log_slope + log_states[now] + error).clamp(-9, 9).exp()
        log_level = log_level + damp * log_slope + alpha * error
        log_slope = damp * log_slope + beta * error
        log_states[now] = log_states[now] + gamma * error * (season > 1)

        value = airline[-1] + e - theta * shocks[-1]
        if lag:
            value = value + airline[-lag] - airline[-lag - 1]
            value = value - big_theta * (shocks[-lag] - theta * shocks[-lag - 1])
        airline = [*airline[1:], value]
        shocks = [*shocks[1:], e]

        base = rate * (0.5 * states[now]).clamp(-3, 3).exp()
        mean_count = (1 - again - remember) * base + again * count + remember * mean_count
        count = torch.poisson(mean_count.clamp(max=1e4), generator=generator)
        seen.append(torch.cat([additive, product, value, count], 1).gather(1, kind[:, None]))
    return torch.cat(seen, 1)


# -- Windows ---------------------------------------------------------------------------------------


def last_index(mask: Tensor) -> Tensor:
    """For each position the index of the latest True at or before it, 0 without one, (B, T)."""
    t = torch.arange(mask.shape[-1], device=mask.device)
    return torch.where(mask, t, 0).cummax(-1).values


@dataclasses.dataclass
class Shape:
    """What a step of the second stage draws."""

    length: int  # points of a window
    horizon: int  # points that are forecast, at most
    patch_sizes: tuple[int, ...]
    family: str  # "hourly" or "calendars"
    weight: float  # how often


SHAPES = (
    Shape(LENGTH, MAX_HORIZON, (8, 16, 32), "hourly", 0.32),
    Shape(2 * LENGTH, HORIZON, (8, 16, 32), "hourly", 0.03),
    Shape(2 * LENGTH, HORIZON, (8, 16, 32), "calendars", 0.05),
    Shape(LENGTH, HORIZON, (8, 16, 32), "calendars", 0.12),
    Shape(480, 96, (4, 8, 16, 32), "calendars", 0.12),
    Shape(288, 96, (4, 8, 16, 32), "calendars", 0.12),
    Shape(160, 64, (4, 8, 16, 32), "calendars", 0.12),
    Shape(96, 32, (4, 8, 16, 32), "calendars", 0.12),
)


def draw_cuts(d: Draw, length: int, vary: bool) -> tuple[Tensor, Tensor]:
    """Horizon and start of hourly windows, (B, 1).

    `vary`: half the contexts lose their left part, and horizons of 32 to 192 stand beside 96.
    """
    horizon = torch.full((d.batch, 1), HORIZON, device=d.device)
    start = torch.zeros_like(d.normal())
    if vary:
        horizons = torch.tensor([32, 64, 96, 128, 192], device=d.device)
        horizon = horizons[d.pick(0.08, 0.08, 0.64, 0.1, 0.1)]
        start = (length - horizon - d.log_uniform(48, CONTEXT)).clamp_min(0) * d.coin(0.5)
    return horizon, start


def draw_calendar_cuts(d: Draw, shape: "Shape", patch: int) -> tuple[Tensor, Tensor]:
    """Horizon, a number of whole patches, and start of windows of a shape, (B, 1).

    Half the contexts lose their left part; 20 points or more remain.
    """
    patches = (d.uniform(0, 1) * (shape.horizon // patch)).ceil().clamp_min(1)
    horizon = (patches * patch).long()
    context = shape.length - horizon
    length = 20 * (context / 20) ** d.uniform(0, 1)
    return horizon, (context - length).clamp_min(0).floor() * d.coin(0.5)


def cut_windows(
    y: Tensor, d: Draw, horizon: Tensor, start: Tensor, vary: bool
) -> dict[str, Tensor]:
    """One window of each series: values (B, T) scaled by the context, and what of them is seen.

    `vary`: a quarter have gaps. A gap reads as MOIRAI sees it (0 in the caller's units, marked
    unobserved), or bridged linearly and unmarked, as data pipelines do. Context values are
    standardised, which is how a labelling program hands them over; there is 0 before the start.
    """
    length = y.shape[-1]
    t = torch.arange(length, device=y.device)
    seen = True
    if vary:
        centre = d.uniform(0, 1, 3) * length
        width = d.log_uniform(2, 100, 3) * d.coin(0.6, 3) * min(1, length / LENGTH)
        hole = ((t - centre[..., None]).abs() < width[..., None] / 2).any(1)  # (B, T)
        hole = hole | (d.uniform(0, 1, length) < d.uniform(0, 0.3) ** 2)
        seen = ~(hole & (d.uniform(0, 1) < 0.25))
    future = t >= length - horizon
    past_end = t < length - horizon
    inside = t >= start.floor()  # (B, T)
    seen = (inside & seen) | future
    context = seen & past_end
    count = context.sum(-1, keepdim=True).clamp_min(2)
    mean = (y * context).sum(-1, keepdim=True) / count
    deviation = (((y - mean) ** 2 * context).sum(-1, keepdim=True) / (count - 1)).sqrt()
    usable = (
        (deviation > 0.03 * y.std(-1, keepdim=True))
        & (deviation > 1e-6)
        & (context.sum(-1, keepdim=True) >= 16)
    )
    z = ((y - mean) / deviation.clamp_min(1e-6)).clamp(-50, 50)
    z = z + 0.01 * d.normal(length)  # bounds the likelihood of counts, clipped and held values
    if vary:
        before = last_index(context)
        after = length - 1 - last_index(context.flip(-1)).flip(-1)
        share = (t - before) / (after - before).clamp_min(1)
        bridge = z.gather(1, before) * (1 - share) + z.gather(1, after) * share
        bridged = (
            inside
            & past_end
            & (d.uniform(0, 1) < 0.4)
            & (after > before)
            & context.gather(1, after)
        )
        blank = -(d.coin(0.3) * d.log_uniform(0.5, 5))  # 0 in raw units of a positive series
        z = torch.where(seen, z, torch.where(bridged, bridge, blank * inside))
        seen = seen | bridged
    return {
        "value": z,
        "seen": seen,
        "inside": inside.expand_as(z),
        "future": future.expand_as(z),
        "usable": usable[:, 0],
    }


# -- The network -----------------------------------------------------------------------------------


def build_module(d_model: int, num_layers: int, patch_sizes: list[int]) -> MoiraiModule:
    return MoiraiModule(
        distr_output=MixtureOutput(components=[StudentTOutput(), NormalOutput()]),
        d_model=d_model,
        num_layers=num_layers,
        patch_sizes=tuple(patch_sizes),
        max_seq_len=512,
        attn_dropout_p=0.0,
        dropout_p=0.0,
    )


def fix_rotary_tables(module: MoiraiModule) -> None:
    """Leave out the check whether the rotary tables hold all positions, as they do.

    It would synchronise the GPU at each layer.
    """
    for part in module.modules():
        if isinstance(part, RotaryProjection):
            part._init_freq = lambda max_len: None
        if isinstance(part, QueryKeyProjection):
            _ = part.split_sizes  # cached now: torch.compile cannot trace the first access


def add_patch_sizes(old: dict, old_sizes: list[int], module: MoiraiModule) -> None:
    """Give `module` the weights `old` of a teacher of fewer patch sizes.

    A size that it lacks reads and writes as the double size does whose points come in equal pairs:
    a cycle of 12 in patches of 4 is, at first, what a cycle of 24 is in patches of 8.
    """
    widest = max(module.patch_sizes)
    rows = {}  # patch size -> index in `old`
    for index, size in enumerate(old_sizes):
        rows[size] = index
    new = module.state_dict()
    for name, value in new.items():
        if not name.startswith(("in_proj.", "param_proj.")):
            value.copy_(old[name])
            continue
        for index, size in enumerate(module.patch_sizes):
            if size in rows:
                value[index] = old[name][rows[size]]
                continue
            double = old[name][rows[2 * size]]
            value[index] = 0
            if name == "in_proj.weight":  # (D, widest)
                value[index, :, :size] = double[:, : 2 * size].unflatten(1, (-1, 2)).sum(-1)
            elif name == "in_proj.bias":
                value[index] = double
            else:  # (dim * widest, ...)
                pairs = double.unflatten(0, (-1, widest))[:, : 2 * size].unflatten(1, (-1, 2))
                value[index].unflatten(0, (-1, widest))[:, :size] = pairs.mean(2)


@torch.no_grad()
def blend_with_start(module: MoiraiModule, start: MoiraiModule, share: float) -> None:
    """Move the weights of `module` back by `share` of the way to those that it started from."""
    own = {name: p.clone() for name, p in module.named_parameters()}
    add_patch_sizes(start.state_dict(), list(start.patch_sizes), module)
    for name, p in module.named_parameters():
        p.lerp_(own[name], 1 - share)


def lean_encoder(module: MoiraiModule):
    """`module.encoder` for tokens of one variate, as a function that compiles well.

    Without what is the same for all tokens then (the bias of the variate), and with attention over
    (B, heads, N, D / heads), for which a CPU has a kernel.
    """
    encoder = module.encoder
    rotary = next(part for part in module.modules() if isinstance(part, RotaryProjection))
    cosines = rotary.cos[:, ::2].contiguous()
    sines = rotary.sin[:, ::2].contiguous()
    width = rotary.proj_width  # of a head's dimensions, those that turn with time

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = x[..., :width].unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([cos * even - sin * odd, cos * odd + sin * even], -1).flatten(-2)
        return torch.cat([turned, x[..., width:]], -1)

    def encode(x: Tensor, mask: Tensor, time_id: Tensor, var_id: Tensor) -> Tensor:
        cos = cosines[time_id][:, None]  # (B, 1, N, width / 2)
        sin = sines[time_id][:, None]
        for layer in encoder.layers:
            attention = layer.self_attn

            def heads(values: Tensor, count: int = attention.num_heads) -> Tensor:
                return values.unflatten(-1, (count, -1))

            h = layer.norm1(x)
            q = attention.q_norm(heads(attention.q_proj(h))).transpose(1, 2)
            k = attention.k_norm(heads(attention.k_proj(h))).transpose(1, 2)
            v = heads(attention.v_proj(h)).transpose(1, 2)
            out = F.scaled_dot_product_attention(
                turn(q, cos, sin),
                turn(k, cos, sin),
                v,
                attn_mask=mask[:, None],
                scale=attention.softmax_scale,
            )
            x = x + attention.out_proj(out.transpose(1, 2).flatten(-2))
            x = x + layer.ffn(layer.norm2(x))
        return encoder.norm(x)

    return encode


def tokenise(module: MoiraiModule, w: dict[str, Tensor], patch: int) -> dict[str, Tensor]:
    """A window as tokens of one patch size, scaled by the module.

    It is MoiraiForecast's layout, P instead of max(P) wide.
    """
    pad = -w["value"].shape[-1] % patch  # on the left: the horizon stays aligned

    def split(x: Tensor) -> Tensor:
        return F.pad(x, (pad, 0)).unflatten(-1, (-1, patch))  # (B, N, P)

    value, seen, future = split(w["value"]), split(w["seen"]), split(w["future"])
    sample_id = split(w["inside"]).any(-1).long()  # (B, N): 0 for padding
    loc, scale = module.scaler(value, seen & ~future, sample_id, torch.zeros_like(sample_id))
    return {
        "value": (value - loc) / scale,
        "loc": loc[:, -1:],
        "scale": scale[:, -1:],
        "future": future.any(-1),  # a horizon is whole patches
        "sample_id": sample_id,
        "time_id": (seen.any(-1).long().cummax(-1).values.cumsum(-1) - 1).clamp_min(0),
    }


def native_parameters(module: MoiraiModule, reprs: Tensor, patch: int) -> dict:
    """`module.param_proj` for tokens of one patch size, (B, N, D) -> a tree of (B, N, P).

    The same rows, no padding.
    """
    index = module.patch_sizes.index(patch)
    widest = max(module.patch_sizes)

    def project(layer: nn.Module, to_domain) -> Tensor | dict | list:
        if isinstance(layer, nn.ModuleDict):
            return {key: project(layer[key], to_domain[key]) for key in layer}
        if isinstance(layer, nn.ModuleList):
            return [project(child, fn) for child, fn in zip(layer, to_domain, strict=True)]
        weight = layer.weight[index] * layer.mask[index]
        weight = weight.unflatten(0, (-1, widest))[:, :patch]  # (dim, P, D)
        bias = layer.bias[index].unflatten(0, (-1, widest))[:, :patch]
        out = F.linear(reprs, weight.flatten(0, 1), bias.flatten())
        return to_domain(out.unflatten(-1, (-1, patch)).transpose(-1, -2))  # (B, N, P, dim)

    return project(module.param_proj.proj, module.param_proj.domain_map)


def predict_tokens(
    module: MoiraiModule, tokens: dict[str, Tensor], patch: int, last: int, encoder=None
):
    """Parameters of the predictive mixture of the `last` tokens, in scaled units.

    They are for `distr_output.distribution`. This is `MoiraiModule.forward` by its public parts,
    computed on the native patch width and, after the encoder, on the horizon's tokens only.
    """
    x = tokens["value"]
    future = tokens["future"]
    sample_id = tokens["sample_id"]
    index = module.patch_sizes.index(patch)
    encoder = module.encoder if encoder is None else encoder
    halved = x.is_cuda and torch.is_grad_enabled()  # bfloat16 to train in; forecasts are float32
    with torch.autocast(x.device.type, torch.bfloat16, enabled=halved):
        reprs = F.linear(x, module.in_proj.weight[index, :, :patch], module.in_proj.bias[index])
        reprs = torch.where(future[..., None], module.mask_encoding.weight, reprs.float())
        mask = packed_attention_mask(sample_id)
        reprs = encoder(reprs, mask, time_id=tokens["time_id"], var_id=torch.zeros_like(sample_id))
    return native_parameters(module, reprs[:, -last:].float(), patch)


def mixture_log_prob(parameters: dict, x: Tensor) -> Tensor:
    """Log-density of build_module's mixture at x, as torch.distributions has it.

    But without its copies and draws. (A StudentT builds a Chi2 from a number on the host, which a
    CUDA graph cannot capture; Mixture.log_prob samples.)
    """
    student, normal = parameters["components"]
    df = student["df"]
    z = (x - student["loc"]) / student["scale"]
    log_t = (
        torch.lgamma((df + 1) / 2)
        - torch.lgamma(df / 2)
        - 0.5 * (math.pi * df).log()
        - student["scale"].log()
    )
    log_t = log_t - 0.5 * (df + 1) * torch.log1p(z**2 / df)
    z = (x - normal["loc"]) / normal["scale"]
    log_n = -0.5 * z**2 - normal["scale"].log() - 0.5 * math.log(2 * math.pi)
    log_weights = parameters["weights_logits"].log_softmax(-1)
    return (log_weights + torch.stack([log_t, log_n], -1)).logsumexp(-1)


def horizon_loss(
    module: MoiraiModule, tokens: dict[str, Tensor], patch: int, last: int, encoder=None
) -> Tensor:
    """Mean negative log-likelihood of the horizons, every usable series with the same weight.

    The horizons are among the `last` tokens.
    """
    parameters = predict_tokens(module, tokens, patch, last, encoder)
    weight = tokens["future"][:, -last:, None].expand(-1, -1, patch).float()
    weighted = mixture_log_prob(parameters, tokens["value"][:, -last:]) * weight
    each = -weighted.sum((1, 2)) / weight.sum((1, 2))  # (B,)
    return (each * tokens["usable"]).sum() / tokens["usable"].sum().clamp_min(1)


# -- Forecasts -------------------------------------------------------------------------------------


@torch.inference_mode()
def forecast(
    module, context: Tensor, horizon: int, patch: int, samples: int = 100
) -> dict[str, Tensor]:
    """(B, L) -> {"mean", "median", "low", "high"} of the predictive mixture, (B, H).

    Low and high bound the central 80 %. Only the horizon's positions are sampled.
    """
    mean = context.mean(1, keepdim=True)
    deviation = context.std(1, keepdim=True).clamp_min(1e-6)
    last = -(-horizon // patch)
    value = F.pad((context - mean) / deviation, (0, last * patch))  # (B, L + n P)
    future = torch.arange(value.shape[1], device=value.device) >= context.shape[1]
    everywhere = torch.ones_like(value, dtype=torch.bool)
    window = {
        "value": value,
        "seen": everywhere,
        "inside": everywhere,
        "future": future.expand_as(value),
    }
    tokens = tokenise(module, window, patch)
    parameters = predict_tokens(module, tokens, patch, last)
    mixture = module.distr_output.distribution(parameters, validate_args=False)

    def in_units(x: Tensor) -> Tensor:  # (..., B, n, P) in the module's scale
        return (x * tokens["scale"] + tokens["loc"]).flatten(-2)[..., :horizon] * deviation + mean

    guess = {"mean": in_units(mixture.mean)}
    if samples:
        draws = mixture.sample((samples,))
        guess["median"] = in_units(draws.median(0).values)
        guess["low"] = in_units(draws.kthvalue(max(1, samples // 10), 0).values)
        guess["high"] = in_units(draws.kthvalue(samples - samples // 10 + 1, 0).values)
    return guess


# -- Validation ------------------------------------------------------------------------------------


def naive_forecast(w: dict[str, Tensor], season: Tensor, horizon: int) -> Tensor:
    """The last season again, (B, H); the last value where the context holds no whole season."""
    context = w["value"][:, :-horizon]
    step = torch.arange(horizon, device=season.device) % season[:, None]
    have = w["inside"][:, :-horizon].sum(1, keepdim=True) >= season[:, None]
    length = context.shape[1]
    return context.gather(1, torch.where(have, length - season[:, None] + step, length - 1))


@torch.no_grad()
def validate(module: MoiraiModule, sets: dict, seed: int = 0) -> list[dict]:
    """One row for each set of held-out windows and patch size.

    MSE of the mean forecast, in units of the contexts' deviation. A series counts with at most 100
    times the mean naive error of its set, so that no single level shift decides.
    """
    rows = []
    device = next(module.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for name, (w, season) in sets.items():
            ok = w["usable"]
            target = w["value"][:, -HORIZON:]
            naive = ((naive_forecast(w, season, HORIZON) - target) ** 2).mean(1)[ok]
            for patch in module.patch_sizes:
                parts = []
                for i in range(0, len(target), 256):
                    part = {key: value[i : i + 256] for key, value in w.items()}
                    parts.append(validate_part(part, module, patch))
                nll, error, covered = (torch.cat(x)[ok] for x in zip(*parts, strict=True))
                cap = 100 * naive.mean()
                figures = {
                    "nll": nll,
                    "mse": error.clamp(max=cap),
                    "naive_mse": naive.clamp(max=cap),
                    "better": (error < naive).float(),
                    "coverage": covered,
                }
                means = {key: value.mean().item() for key, value in figures.items()}
                rows.append({"set": name, "patch": patch} | means)
    return rows


def validate_part(
    w: dict[str, Tensor], module: MoiraiModule, patch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """NLL, squared error of the mean and coverage of the central 80 % interval, (B,).

    The interval is of 200 draws.
    """
    last = HORIZON // patch
    tokens = tokenise(module, w, patch)
    parameters = predict_tokens(module, tokens, patch, last)
    mixture = module.distr_output.distribution(parameters, validate_args=False)
    x = tokens["value"][:, -last:]
    error = ((mixture.mean - x) * tokens["scale"]) ** 2
    draws = mixture.sample((200,))
    low = draws.kthvalue(20, 0).values
    high = draws.kthvalue(181, 0).values
    covered = ((x >= low) & (x <= high)).float()
    return tuple(v.mean((1, 2)) for v in (-mixture_log_prob(parameters, x), error, covered))


def validation_sets(series: int, device: torch.device) -> dict:
    """Held-out windows of fixed seeds: the training family, whole and gappy, and the other one."""
    sets = {}
    for name, family, vary, seed in (
        ("trained family", training_family, False, 10**9 + 1),
        ("trained family, short or gappy", training_family, True, 10**9 + 2),
        ("held-out family", held_out_family, False, 10**9 + 3),
    ):
        generator = torch.Generator(device).manual_seed(seed)
        y, season = family(series, generator)
        d = Draw(series, generator)
        horizon, start = draw_cuts(d, LENGTH, vary)
        w = cut_windows(y, d, horizon, start, vary)
        if vary:  # figures are for one horizon: keep the windows that were drawn with it
            keep = w["future"].sum(1) == HORIZON
            w = {key: value[keep] for key, value in w.items()}
            season = season[keep]
        sets[name] = (w, season)
    return sets


def score_calendars(module: MoiraiModule, series: int, seed: int = 10**9 + 4) -> list[dict]:
    """One row for each calendar: the errors on its held-out series, in seasonal-naive's.

    The patch size is the best on half the series, as a labelling program chooses it; the figures
    are of the other half. `mase` is the median forecast's, over the naive one's.
    """
    device = next(module.parameters()).device
    rows = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for name, (season, length, horizon) in HELD_OUT_CALENDARS.items():
            generator = torch.Generator(device).manual_seed(seed)
            y = held_out_calendar(series, generator, season, length + horizon)
            is_usable = y[:, :length].std(1) > 0
            context = y[is_usable, :length]
            target = y[is_usable, length:]
            step = torch.arange(horizon, device=device) % season
            naive = (context[:, length - season + step] - target).abs().mean(1)
            difference = context[:, season:] - context[:, : length - season]
            unit = difference.abs().mean(1).clamp_min(1e-6)
            half = len(context) // 2
            found = {}
            for patch in module.patch_sizes:
                guess = forecast(module, context, horizon, patch)
                deviation = context.std(1)
                squared = ((guess["mean"] - target).square().mean(1) / deviation**2)[:half].mean()
                error = (guess["median"] - target).abs().mean(1)
                inside = (target >= guess["low"]) & (target <= guess["high"])
                found[patch] = {
                    "calendar": name,
                    "patch": patch,
                    "squared": squared.item(),
                    "mase": ((error / unit)[half:].mean() / (naive / unit)[half:].mean()).item(),
                    "better": (error < naive)[half:].float().mean().item(),
                    "coverage": inside[half:].float().mean().item(),
                }
            rows.append(min(found.values(), key=lambda row: row["squared"]))
    return rows


def calendar_table(rows: list[dict]) -> str:
    lines = ["held-out calendar   patch  MASE / naive's  better than naive  in 80 % interval"]
    for row in rows:
        figures = f"{row['mase']:14.3f}  {row['better']:17.1%}  {row['coverage']:16.1%}"
        lines.append(f"{row['calendar']:<18}  {row['patch']:5d}  {figures}")
    ratios = torch.tensor([row["mase"] for row in rows])
    lines.append(f"{'geometric mean':<25}  {ratios.log().mean().exp().item():14.3f}")
    return "\n".join(lines)


def validation_table(rows: list[dict]) -> str:
    head = f"{'held-out series':<32} patch     NLL     MSE  naive MSE  better than naive"
    lines = [f"{head}  in 80 % interval"]
    for row in rows:
        figures = f"{row['nll']:7.3f} {row['mse']:7.3f}  {row['naive_mse']:9.3f}"
        figures += f"  {row['better']:17.1%}  {row['coverage']:16.1%}"
        lines.append(f"{row['set']:<32} {row['patch']:5d} {figures}")
    return "\n".join(lines)


# -- Files -----------------------------------------------------------------------------------------


def save_atomically(value: dict, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)


def save_teacher(module: MoiraiModule, folder: Path) -> None:
    """`save_pretrained` into a temporary folder, then each file renamed.

    So a reader never meets half a teacher.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        module.save_pretrained(temporary)
        for name in ("model.safetensors", "config.json"):
            (Path(temporary) / name).chmod(0o644)
            os.replace(Path(temporary) / name, folder / name)


def draw_picture(log: Path, path: Path) -> None:
    """The card's picture: the training loss, and the validation errors beside seasonal-naive's."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    train = [row for row in rows if "loss" in row]
    checks = [row for row in rows if "validation" in row]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
    left.plot([r["step"] / 1000 for r in train], [r["loss"] for r in train], lw=0.8)
    if train:
        losses = sorted(r["loss"] for r in train)
        left.set_ylim(losses[0] - 0.05, losses[int(0.98 * (len(losses) - 1))] + 0.1)
    left.set(
        xlabel="thousand steps",
        ylabel="negative log-likelihood",
        title="training loss (horizon, scaled units)",
    )
    steps = [r["step"] / 1000 for r in checks]
    if all("calendars" in r for r in checks):
        draw_calendars(right, steps, checks)
        figure.savefig(path, dpi=110)
        return
    for i, patch in enumerate(sorted({v["patch"] for v in checks[0]["validation"]})):
        for name, style in (("trained family", "-"), ("held-out family", "--")):
            found = []
            for check in checks:
                for row in check["validation"]:
                    if (row["set"], row["patch"]) == (name, patch):
                        found.append(row)
            ratio = [row["mse"] / row["naive_mse"] for row in found]
            right.plot(steps, ratio, style, color=f"C{i}", lw=1, label=f"{name}, patch {patch}")
        if all("zero_shot" in r for r in checks):
            ratio = [r["zero_shot"][str(patch)] / r["zero_shot"]["naive"] for r in checks]
            label = f"{checks[-1]['csv']} zero-shot, patch {patch}"
            right.plot(steps, ratio, ":", color=f"C{i}", lw=1.8, label=label)
    right.set(xlabel="thousand steps", title="MSE / MSE of seasonal-naive", ylim=(0.5, 1.05))
    right.axhline(1, color="grey", lw=0.6)
    right.legend(
        fontsize=6.5, ncols=3, loc=(0.01, 0.64), columnspacing=0.8, handlelength=1.4, frameon=False
    )
    figure.savefig(path, dpi=110)


def draw_calendars(axes, steps: list[float], checks: list[dict]) -> None:
    """The errors on held-out series of each calendar, and their geometric mean, over training."""
    table = torch.tensor([[row["mase"] for row in check["calendars"]] for check in checks])
    for i, row in enumerate(checks[0]["calendars"]):
        axes.plot(steps, table[:, i], "-" if i < 7 else "--", lw=0.8, label=row["calendar"])
    axes.plot(steps, table.log().mean(1).exp(), "k", lw=2, label="geometric mean")
    axes.axhline(1, color="grey", lw=0.6)
    axes.set(xlabel="thousand steps", title="MASE / MASE of seasonal-naive, held-out calendars")
    axes.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


# -- Training --------------------------------------------------------------------------------------


def learning_rate(progress: float, step: int, args: argparse.Namespace) -> float:
    warm = min(1.0, (step + 1) / args.warmup_steps)
    return args.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimiser(module: MoiraiModule, args: argparse.Namespace) -> torch.optim.Optimizer:
    parameters = list(module.parameters())
    device = parameters[0].device
    is_cuda = device.type == "cuda"
    rate = torch.tensor(args.learning_rate, device=device)  # a tensor: a captured step reads it
    matrices = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay, "lr": rate.clone()},
        {"params": others, "weight_decay": 0.0, "lr": rate.clone()},
    ]
    return torch.optim.AdamW(
        groups, lr=rate, betas=(0.9, 0.98), fused=is_cuda, capturable=is_cuda, foreach=False
    )


@dataclasses.dataclass
class Batch:
    """Tokens of one patch size; the horizons are among the `last` ones."""

    tokens: dict[str, Tensor]
    patch: int
    last: int


@torch.no_grad()
def series_stream(
    module: MoiraiModule, args: argparse.Namespace, generator: torch.Generator, chunk: int
):
    """Endless steps of the first stage: one Batch of each patch size.

    They are drawn for `chunk` steps at once, which a GPU likes.
    """
    sizes = args.patch_sizes
    share = args.batch_size * chunk
    while True:
        y, _ = training_family(share * len(sizes), generator)
        d = Draw(len(y), generator)
        horizon, start = draw_cuts(d, LENGTH, True)
        w = cut_windows(y, d, horizon, start, vary=True)
        steps = [[] for _ in range(chunk)]
        for i, patch in enumerate(sizes):
            part = {key: value[i * share : (i + 1) * share] for key, value in w.items()}
            tokens = tokenise(module, part, patch) | {"usable": part["usable"]}
            split = {key: value.split(args.batch_size) for key, value in tokens.items()}
            for number, step in enumerate(steps):
                own = {key: value[number] for key, value in split.items()}
                step.append(Batch(own, patch, MAX_HORIZON // patch))
        yield from steps


@torch.no_grad()
def calendar_stream(module: MoiraiModule, args: argparse.Namespace, generator: torch.Generator):
    """Endless steps of the second stage: a Shape, and a Batch of each of its patch sizes.

    The shorter the windows, the more of them: a step costs about as much with every shape.
    """
    while True:
        row = Draw(1, generator).pick(*[shape.weight for shape in SHAPES])
        shape = SHAPES[int(row)]
        sizes = [size for size in shape.patch_sizes if size in args.patch_sizes]
        share = args.batch_size * LENGTH // shape.length
        if 4 in sizes:  # twice the tokens of patches of 8
            share //= 2
        if shape.family == "hourly":
            y, _ = training_family(share * len(sizes), generator, shape.length)
        else:
            y, _ = calendar_family(share * len(sizes), generator, shape.length)
        step = []
        for part, patch in zip(y.split(share), sizes, strict=True):
            d = Draw(share, generator)
            if shape.family == "hourly" and shape.length == LENGTH:
                horizon, start = draw_cuts(d, shape.length, True)
            else:
                horizon, start = draw_calendar_cuts(d, shape, patch)
            w = cut_windows(part, d, horizon, start, vary=True)
            tokens = tokenise(module, w, patch) | {"usable": w["usable"]}
            step.append(Batch(tokens, patch, shape.horizon // patch))
        yield step


def make_step(module: MoiraiModule, optimiser: torch.optim.Optimizer, encoder):
    """Two functions of a step's batches that return the losses per patch size.

    They take the gradients only, and the whole step.
    """

    def backward(batches: list[Batch]) -> Tensor:
        losses = []
        for batch in batches:
            losses.append(horizon_loss(module, batch.tokens, batch.patch, batch.last, encoder))
        torch.stack(losses).mean().backward()
        return torch.stack(losses).detach()

    def step(batches: list[Batch]) -> Tensor:
        losses = backward(batches)
        norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        # A non-finite gradient must not reach the weights; by value, without a sync.
        for p in module.parameters():
            if p.grad is not None:
                p.grad = torch.where(norm.isfinite(), p.grad, 0.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return losses

    return backward, step


def capture_step(backward, step, optimiser: torch.optim.Optimizer, example: list[Batch]):
    """`step` as one CUDA graph.

    Its many small kernels start by one call, which is three times as fast. The warm-up compiles and
    allocates without changing a weight; optimiser states are made before the capture.
    """
    slots = []
    for batch in example:
        tokens = {key: value.clone() for key, value in batch.tokens.items()}
        slots.append(dataclasses.replace(batch, tokens=tokens))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            backward(slots)
            optimiser.zero_grad(set_to_none=True)
        if not optimiser.state:
            rates = [group["lr"].clone() for group in optimiser.param_groups]
            for group in optimiser.param_groups:
                group["lr"].zero_()
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"].copy_(rate)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = step(slots)

    def replay(batches: list[Batch]) -> Tensor:
        for slot, batch in zip(slots, batches, strict=True):
            for key, value in batch.tokens.items():
                slot.tokens[key].copy_(value)
        graph.replay()
        return losses.clone()

    return replay


class Stop:
    """Turns SIGTERM and Ctrl-C into a flag: the step in hand ends and the state is saved."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.catch)

    def catch(self, number: int, _frame) -> None:
        self.signal = number


def score_zero_shot(module: MoiraiModule, path: str) -> dict[str, float]:
    """MSE of the mean per patch size and of seasonal-naive on every fifth window of a real CSV."""
    from zero_shot import naive, read_windows, score

    device = next(module.parameters()).device
    _, rows = read_windows(path, (8640, 11520, 14400), CONTEXT)
    rows = rows.to(device)
    ask = partial(naive, horizon=HORIZON, season=24)
    result = {"naive": score(ask, rows, CONTEXT, HORIZON, stride=5)["seasonal-naive 24"]}
    for patch in module.patch_sizes:
        ask = partial(forecast, module, horizon=HORIZON, patch=patch, samples=0)
        result[str(patch)] = score(ask, rows, CONTEXT, HORIZON, stride=5, batch=2048)["mean"]
    return {name: errors[:, 0].mean().item() for name, errors in result.items()}


def check_and_log(module: MoiraiModule, sets: dict, state: dict, args: argparse.Namespace) -> None:
    rows = validate(module, sets)
    line = {"step": state["step"], "minutes": state["seconds"] / 60, "validation": rows}
    if args.calendars:
        line["calendars"] = score_calendars(module, args.eval_series // 4)
    if args.zero_shot_csv:
        line |= {
            "csv": Path(args.zero_shot_csv).stem,
            "zero_shot": score_zero_shot(module, args.zero_shot_csv),
        }
    append_line(Path(args.run_dir) / "log.jsonl", line)
    zero_shot = " ".join(f"{k} {v:.3f}" for k, v in line.get("zero_shot", {}).items())
    tqdm.write(
        f"step {state['step']:,}, {state['seconds'] / 60:.1f} minutes {zero_shot}\n"
        + validation_table(rows)
    )
    if args.calendars:
        tqdm.write(calendar_table(line["calendars"]))


def append_line(path: Path, line: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def save_state(path: Path, module, optimiser, generator: torch.Generator, state: dict) -> None:
    parts = {
        "module": module.state_dict(),
        "optimiser": optimiser.state_dict(),
        "generator": generator.get_state(),
    }
    save_atomically(parts | state, path)


def start(args: argparse.Namespace, device: torch.device) -> tuple:
    """Module, optimiser, generator of series and counters: fresh, or as a stopped run left them."""
    torch.manual_seed(args.seed)
    module = build_module(args.d_model, args.num_layers, args.patch_sizes).to(device)
    fix_rotary_tables(module)
    if args.start_from:
        old = open_teacher(args.start_from)
        add_patch_sizes(old.state_dict(), list(old.patch_sizes), module)
    optimiser = make_optimiser(module, args)
    generator = torch.Generator(device).manual_seed(args.seed)
    state = {"step": 0, "seconds": 0.0}
    run_dir = Path(args.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if args.resume:
        saved = torch.load(run_dir / "state.pt", map_location="cpu", weights_only=True)
        module.load_state_dict(saved["module"])
        optimiser.load_state_dict(saved["optimiser"])
        for group in optimiser.param_groups:
            group["lr"] = group["lr"].to(device)
        generator.set_state(saved["generator"])
        state = {key: saved[key] for key in state}
        lines = (run_dir / "log.jsonl").read_text().splitlines()
        kept = [line for line in lines if json.loads(line)["step"] <= state["step"]]
        (run_dir / "log.jsonl").write_text("".join(line + "\n" for line in kept))
    elif (run_dir / "log.jsonl").exists():
        os.replace(run_dir / "log.jsonl", run_dir / f"log-{time.time():.0f}.jsonl")
    return module, optimiser, generator, state


def open_teacher(folder: str) -> MoiraiModule:
    with contextlib.redirect_stdout(sys.stderr):  # the hub's mixin announces itself
        return MoiraiModule.from_pretrained(folder)


def pick_encoder(module: MoiraiModule, args: argparse.Namespace, device: torch.device):
    """The encoder to train with; None: the module's own, as it is."""
    if not args.compile:
        return None
    if device.type == "cuda" and not args.calendars:
        return torch.compile(module.encoder, dynamic=False)
    return torch.compile(lean_encoder(module), dynamic=True)  # one kernel for all lengths


def train(args: argparse.Namespace, device: torch.device) -> int:
    module, optimiser, generator, state = start(args, device)
    run_dir = Path(args.run_dir)
    save_dir = Path(args.save_dir)
    stop = Stop()
    # The checks of distributions synchronise the GPU.
    torch.distributions.Distribution.set_default_validate_args(False)
    torch.set_float32_matmul_precision("high")
    sets = validation_sets(args.eval_series, device)
    is_captured = device.type == "cuda" and not args.calendars  # all steps are alike
    chunk = 8 if is_captured else 1
    args.eval_every = -(-args.eval_every // chunk) * chunk
    if args.calendars:
        stream = calendar_stream(module, args, generator)
    else:
        stream = series_stream(module, args, generator, chunk)
    entered = state["seconds"]
    began = time.perf_counter()
    backward, step = make_step(module, optimiser, pick_encoder(module, args, device))
    if is_captured:
        first = next(series_stream(module, args, torch.Generator(device).manual_seed(1), 1))
        step = capture_step(backward, step, optimiser, first)
    size = sum(p.numel() for p in module.parameters())
    print(
        f"{size:,} parameters, patch sizes {args.patch_sizes},"
        f" {args.batch_size} series each per step, on {device}"
    )
    total = args.steps if args.minutes is None else None
    bar = tqdm(total=total, initial=state["step"], unit="step", file=sys.stderr, mininterval=2)
    recent: list[Tensor] = []
    while True:
        minutes = state["seconds"] / 60
        progress = state["step"] / args.steps if args.minutes is None else minutes / args.minutes
        is_late = minutes - entered / 60 >= (args.stop_minutes or math.inf)
        leaving = progress >= 1 or stop.signal or is_late
        due = leaving or (state["step"] % args.eval_every == 0 and recent)
        is_resumable = state["step"] % chunk == 0  # between two chunks of series
        if due and is_resumable:
            save_state(run_dir / "state.pt", module, optimiser, generator, state)
            if progress >= 1 and args.keep_start:
                blend_with_start(module, open_teacher(args.start_from), args.keep_start)
            save_teacher(module, save_dir)
            check_and_log(module, sets, state, args)
            draw_picture(run_dir / "log.jsonl", save_dir / "training.png")
            if leaving:
                break
        for group in optimiser.param_groups:
            group["lr"].fill_(learning_rate(progress, state["step"], args))
        recent = recent[-49:] + [step(next(stream)).mean()]
        state["step"] += 1
        state["seconds"] = entered + time.perf_counter() - began
        bar.update()
        if state["step"] % 50 == 0:
            loss = torch.stack(recent).mean().item()  # the only sync point of 50 steps
            append_line(run_dir / "log.jsonl", {"step": state["step"], "loss": loss})
            bar.set_postfix_str(f"nll {loss:.3f}", refresh=False)
    bar.close()
    how = "finished" if progress >= 1 else "stopped"
    print(
        f"{how} at step {state['step']:,} after {state['seconds'] / 60:.1f} minutes;"
        f" the teacher is in {save_dir}"
    )
    return 128 + stop.signal if stop.signal else 0


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_args(args)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.batch_size = args.batch_size or (512 if device.type == "cuda" else 32)
    if args.validate_only:
        module = open_teacher(args.save_dir).to(device).eval()
        print(validation_table(validate(module, validation_sets(args.eval_series, device))))
        print(calendar_table(score_calendars(module, args.eval_series)))
        return 0
    return train(args, device)


if __name__ == "__main__":
    raise SystemExit(main())
