"""AdamW over named parameters: its learning rates by update and by group, and its state as named tensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.errors import FileError
from ldm.train.ranks import like, whole
from ldm.train.recipe import Optimizer, wrong_key


def factor(settings: Optimizer, steps: int, step: int) -> float:
    """The factor, 0 to 1, of every group's learning rate at update `step` of `steps`, counted from 0.

    The warm-up rises in equal parts: update number `warmup` (index warmup - 1) is the first with the whole rate, and no
    update has a rate of 0. Cosine and restarts: Loshchilov & Hutter 2017, eq. 5 with cycles of one length, over the
    updates after the warm-up.
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
    path = directory / "log.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        what = f"cannot be read ({error.strerror}); optimizer.lr_from is the directory of an earlier run"
        raise FileError(what, path=path) from None
    for line in reversed(lines):
        try:
            rate = json.loads(line)["lr"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # an event, a validation, or cut short
        if isinstance(rate, float) and 0 < rate <= 1:
            return rate
    raise FileError("names no learning rate above 0; give optimizer.lr instead of optimizer.lr_from", path=path)


def ema_decay(ema: float, step: int) -> float:
    """The decay of the averages at update `step`, from 1: less at first (LitEma in CompVis ldm/modules/ema.py)."""
    return min(ema, (1 + step) / (10 + step))


def optimizer(parameters: Mapping[str, nn.Parameter], settings: Optimizer) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2), or its 8-bit form (Dettmers et al. 2021) from bitsandbytes.

    Each parameter belongs to the first of `settings.groups` whose expression its name contains, or to the rest, which
    learns at `settings.lr`; `group["initial_lr"]` of a param group stays as in the recipe. Raises ArgumentError for an
    expression that is no regular expression or that no parameter is left for, and where bitsandbytes is not installed.
    """
    parts: list[list[nn.Parameter]] = [[] for _ in (*settings.groups, None)]
    patterns = [_pattern(group.match) for group in settings.groups]
    for name, parameter in parameters.items():
        parts[next((i for i, pattern in enumerate(patterns) if pattern.search(name)), -1)].append(parameter)
    for group, part in zip(settings.groups, parts[:-1], strict=True):
        if not part:
            example = next(iter(parameters))
            what = f"'{group.match}' is in the name of no parameter left for it; names look like {example}"
            raise wrong_key("optimizer.groups", what)
    rates = [*(group.lr for group in settings.groups), settings.lr]
    groups = [{"params": part, "lr": rate, "initial_lr": rate} for part, rate in zip(parts, rates, strict=True) if part]
    options = {"betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}
    return kind_of(settings.kind)(groups, lr=settings.lr, **options)


def _pattern(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise wrong_key("optimizer.groups", f"'{expression}' is no regular expression ({error})") from None


def kind_of(kind: str) -> Callable[..., torch.optim.Optimizer]:
    """The optimiser that `optimizer.kind` names. Raises ArgumentError where its package is not installed."""
    if kind == "adamw":
        return torch.optim.AdamW
    try:
        import bitsandbytes
    except ImportError:
        what = "adamw8bit needs bitsandbytes, which is not installed; pip install bitsandbytes, or take adamw"
        raise wrong_key("optimizer.kind", what) from None
    return bitsandbytes.optim.AdamW8bit


def state_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimiser's state, whole and on the CPU: {"exp_avg/NAME": ...}, for updated parameters. All ranks call it."""
    return {
        f"{key}/{name}": whole(torch.as_tensor(value))
        for name, p in parameters.items()
        for key, value in optimizer.state.get(p, {}).items()
        if value is not None
    }


@torch.no_grad()
def load_state_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Restore what `state_tensors` gave, without a copy. Raises FileError for a parameter that is not trained."""
    states: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for entry in tensors:
        key, _, name = entry.partition("/")
        if name not in states:
            raise FileError(f"the state remembers {name}, which is not trained; use another directory", key=name)
        states[name][key] = tensors[entry]
    for name, p in parameters.items():
        if states[name]:
            optimizer.state[p] = {key: _placed(key, value, p) for key, value in states[name].items()}


def _placed(key: str, value: Tensor, p: nn.Parameter) -> Tensor | int:
    """A value as the optimiser holds it: a count of updates on the CPU, a tensor of the parameter's shape beside it."""
    if value.ndim == 0:  # bitsandbytes counts in Python, AdamW in a float32
        return int(value) if value.dtype == torch.int64 else value.clone()
    return like(p, value) if value.shape == p.shape else value.to(p.device)
