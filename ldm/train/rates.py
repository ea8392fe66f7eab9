"""What multiplies the learning rate at each update, and what the averaged weights keep of themselves."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ldm.errors import FileError
from ldm.recipe import Optimizer


def factor(settings: Optimizer, steps: int, step: int) -> float:
    """What every group's learning rate is multiplied by at update `step`, counted from 0, of `steps`: 0 to 1.

    Warm-up rises in equal parts, so that update number `warmup` (index warmup - 1) is the first with the whole rate and none is wasted on a rate of 0.
    Cosine and restarts: Loshchilov & Hutter 2017, eq. 5 with cycles of one length, over what the warm-up leaves.
    """
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return 1.0
    left = steps - settings.warmup  # updates after the warm-up
    if settings.schedule == "linear":
        return min(1.0, (steps - step) / min(left, settings.decay * steps))
    cycles = settings.cycles if settings.schedule == "cosine-restarts" else 1
    return 0.5 * (1 + math.cos(math.pi * ((step - settings.warmup) * cycles % left) / left))


def last_rate(directory: Path) -> float:
    """The learning rate of the last update that a run logged, for the next to go on with. Raises FileError.

    A last line that was cut short, as a run that was killed may leave, is passed over.
    """
    path = Path(directory) / "log.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise FileError(f"cannot be read ({error.strerror}); optimizer.lr_from is the directory of an earlier run", path=path) from None
    for line in reversed(lines):
        try:
            rate = json.loads(line)["lr"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # an event, a validation, or cut short
        if isinstance(rate, float) and 0 < rate <= 1:
            return rate
    raise FileError("names no learning rate above 0; give optimizer.lr instead of optimizer.lr_from", path=path)


def ema_decay(ema: float, step: int) -> float:
    """Share of themselves that the averaged weights keep after update `step`, counted from 1: less at first, so that they do not stay where they began.

    As LitEma in CompVis ldm/modules/ema.py.
    """
    return min(ema, (1 + step) / (10 + step))
