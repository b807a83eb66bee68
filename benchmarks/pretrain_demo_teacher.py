"""Pretrain the demo teacher: a small MOIRAI that has seen nothing but synthetic series.

    python benchmarks/pretrain_demo_teacher.py --compile  # 34,000 steps: 11 minutes on one H100
    python benchmarks/pretrain_demo_teacher.py --minutes 90  # on two CPU cores, as far as they go
    python benchmarks/pretrain_demo_teacher.py --resume  # continue a stopped run, same flags
    python benchmarks/pretrain_demo_teacher.py --validate_only  # the table of the saved teacher

It leaves a `MoiraiModule` of uni2ts in --save_dir (config.json, model.safetensors, training.png)
and the log and the resumable state in --run_dir. No real series is read, except by --zero_shot_csv,
whose figures go into the picture only.

Sections: command line, the synthetic family, the held-out family, windows, the network, validation,
files, training. Shapes: B series, T points of a series (context and horizon), N tokens, P points of
a patch, D width, K harmonics.
"""

import argparse
import contextlib
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
    compile_help = "fuse the encoder's kernels (GPU): costs a minute at start"
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


# -- Windows ---------------------------------------------------------------------------------------


def last_index(mask: Tensor) -> Tensor:
    """For each position the index of the latest True at or before it, 0 without one, (B, T)."""
    t = torch.arange(mask.shape[-1], device=mask.device)
    return torch.where(mask, t, 0).cummax(-1).values


def cut_windows(y: Tensor, d: Draw, vary: bool) -> dict[str, Tensor]:
    """One window of each series: values (B, T) scaled by the context, and what of them is seen.

    `vary`: half the contexts lose their left part, a quarter have gaps, and horizons of 32 to 192
    stand beside 96. A gap reads as MOIRAI sees it (0 in the caller's units, marked unobserved), or
    bridged linearly and unmarked, as data pipelines do. Context values are standardised, which is
    how a labelling program hands them over.
    """
    length = y.shape[-1]
    t = torch.arange(length, device=y.device)
    horizon = torch.full((len(y), 1), HORIZON, device=y.device)
    start = torch.zeros_like(d.normal())
    seen = True
    if vary:
        horizons = torch.tensor([32, 64, 96, 128, 192], device=y.device)
        horizon = horizons[d.pick(0.08, 0.08, 0.64, 0.1, 0.1)]
        start = (length - horizon - d.log_uniform(48, CONTEXT)).clamp_min(0) * d.coin(0.5)
        centre = d.uniform(0, 1, 3) * length
        width = d.log_uniform(2, 100, 3) * d.coin(0.6, 3)
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
        z = torch.where(seen, z, torch.where(bridged, bridge, blank))
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
    module: MoiraiModule, tokens: dict[str, Tensor], patch: int, encoder=None
) -> Tensor:
    """Mean negative log-likelihood of the horizons, every usable series with the same weight."""
    last = MAX_HORIZON // patch
    parameters = predict_tokens(module, tokens, patch, last, encoder)
    weight = tokens["future"][:, -last:, None].expand(-1, -1, patch).float()
    weighted = mixture_log_prob(parameters, tokens["value"][:, -last:]) * weight
    each = -weighted.sum((1, 2)) / weight.sum((1, 2))  # (B,)
    return (each * tokens["usable"]).sum() / tokens["usable"].sum().clamp_min(1)


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
        w = cut_windows(y, Draw(series, generator), vary)
        if vary:  # figures are for one horizon: keep the windows that were drawn with it
            keep = w["future"].sum(1) == HORIZON
            w = {key: value[keep] for key, value in w.items()}
            season = season[keep]
        sets[name] = (w, season)
    return sets


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


@torch.no_grad()
def series_stream(
    module: MoiraiModule, args: argparse.Namespace, generator: torch.Generator, chunk: int
):
    """Endless tokens, one batch of each patch size.

    They are drawn for `chunk` steps at once, which a GPU likes.
    """
    sizes = args.patch_sizes
    share = args.batch_size * chunk
    while True:
        y, _ = training_family(share * len(sizes), generator)
        w = cut_windows(y, Draw(len(y), generator), vary=True)
        batches = []
        for i, patch in enumerate(sizes):
            part = {key: value[i * share : (i + 1) * share] for key, value in w.items()}
            tokens = tokenise(module, part, patch) | {"usable": part["usable"]}
            batches.append({key: value.split(args.batch_size) for key, value in tokens.items()})
        for i in range(chunk):
            yield [{key: value[i] for key, value in tokens.items()} for tokens in batches]


def make_step(
    module: MoiraiModule, optimiser: torch.optim.Optimizer, patch_sizes: list[int], encoder
):
    """Two functions of a step's batches that return the losses per patch size.

    They take the gradients only, and the whole step.
    """

    def backward(batches: list[dict]) -> Tensor:
        losses = []
        for batch, patch in zip(batches, patch_sizes, strict=True):
            losses.append(horizon_loss(module, batch, patch, encoder))
        torch.stack(losses).mean().backward()
        return torch.stack(losses).detach()

    def step(batches: list[dict]) -> Tensor:
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


def capture_step(backward, step, optimiser: torch.optim.Optimizer, example: list[dict]):
    """`step` as one CUDA graph.

    Its many small kernels start by one call, which is three times as fast. The warm-up compiles and
    allocates without changing a weight; optimiser states are made before the capture.
    """
    slots = [{key: value.clone() for key, value in tokens.items()} for tokens in example]
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

    def replay(batches: list[dict]) -> Tensor:
        for slot, tokens in zip(slots, batches, strict=True):
            for key, value in tokens.items():
                slot[key].copy_(value)
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


@torch.inference_mode()
def forecast(
    module, context: Tensor, horizon: int, patch: int, samples: int = 100
) -> dict[str, Tensor]:
    """(B, L) -> {"mean", "median"} of the predictive mixture, (B, H).

    Only the horizon's positions are sampled.
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
        guess["median"] = in_units(mixture.sample((samples,)).median(0).values)
    return guess


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


def train(args: argparse.Namespace, device: torch.device) -> int:
    module, optimiser, generator, state = start(args, device)
    run_dir = Path(args.run_dir)
    save_dir = Path(args.save_dir)
    stop = Stop()
    # The checks of distributions synchronise the GPU.
    torch.distributions.Distribution.set_default_validate_args(False)
    torch.set_float32_matmul_precision("high")
    sets = validation_sets(args.eval_series, device)
    chunk = 8 if device.type == "cuda" else 1
    args.eval_every = -(-args.eval_every // chunk) * chunk
    stream = series_stream(module, args, generator, chunk)
    entered = state["seconds"]
    began = time.perf_counter()
    encoder = torch.compile(module.encoder, dynamic=False) if args.compile else None
    backward, step = make_step(module, optimiser, args.patch_sizes, encoder)
    if device.type == "cuda":
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
            save_teacher(module, save_dir)
            check_and_log(module, sets, state, args)
            draw_picture(run_dir / "log.jsonl", save_dir / "training.png")
            if leaving:
                break
        for group in optimiser.param_groups:
            group["lr"].fill_(learning_rate(progress, state["step"], args))
        recent = recent[-49:] + [step(next(stream))]
        state["step"] += 1
        state["seconds"] = entered + time.perf_counter() - began
        bar.update()
        if state["step"] % 50 == 0:
            losses = torch.stack(recent).mean(0).tolist()  # the only sync point of 50 steps
            loss = sum(losses) / len(losses)
            append_line(run_dir / "log.jsonl", {"step": state["step"], "loss": loss})
            bar.set_postfix_str("nll " + " ".join(f"{v:.3f}" for v in losses), refresh=False)
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
        with contextlib.redirect_stdout(sys.stderr):  # the hub's mixin announces itself
            module = MoiraiModule.from_pretrained(args.save_dir).to(device).eval()
        print(validation_table(validate(module, validation_sets(args.eval_series, device))))
        return 0
    return train(args, device)


if __name__ == "__main__":
    raise SystemExit(main())
