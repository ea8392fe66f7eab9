"""The loop that trains any task: from parameters and batches to weights that can be saved."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import ArgumentError, NonFinite
from ldm.train.data.batch import Batch
from ldm.train.draws import Draws
from ldm.train.optim import ema_decay, factor, load_state_tensors, optimizer, state_tensors
from ldm.train.ranks import Ranks, mean, put, sharded, share, whole
from ldm.train.recipe import Optimizer, Recipe, Run, wrong_key
from ldm.train.state import State, save_state
from ldm.train.tasks import Loss, places
from ldm.train.watch.log import BANDS, Record

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PATIENCE = 10  # updates in a row that may be skipped for NaN or infinity


@dataclass(frozen=True)
class Watchers:
    """The callbacks of the loop; every rank calls them, since they may need the whole model."""

    log: Callable[[Record], None] = lambda record: None  # every `log_every` updates and at the end
    event: Callable[[Record], None] = lambda event: None  # an update that was skipped, a state that was saved
    # after update `step`, every `watch.every`, with the weights to save
    validate: Callable[[int, Mapping[str, Tensor]], None] = lambda step, averaged: None
    stop: Callable[[], bool] = lambda: False  # whether the run shall end: the state is saved first
    tick: Callable[[int], None] = lambda step: None  # after every update, with how many are done


SILENT, ALONE = Watchers(), Ranks()


@dataclass
class Fitted:
    """The outcome of a run."""

    step: int  # updates done
    averaged: dict[str, Tensor]  # the weights to save, whole and on the CPU: averaged, or the last ones without EMA
    skipped: int  # updates left out for NaN or infinity
    stopped: bool = False  # whether `Watchers.stop` ended it before its last update


@dataclass
class _Sums:
    """The sums between two lines of the log."""

    updates: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    since: float = field(default_factory=time.perf_counter)
    bands: Tensor = field(default_factory=lambda: torch.zeros(2, BANDS, dtype=torch.float64))  # sums and counts


def accumulation(run: Run, world: int) -> int:
    """Micro-batches of one update on one rank. Raises ArgumentError unless batch is a multiple of micro times ranks."""
    at_once = run.micro * world
    if run.batch % at_once:
        what = f"{run.batch} examples cannot be shared evenly by {world} ranks with {run.micro} at once"
        raise wrong_key("run.batch", f"{what}; give a multiple of {at_once}")
    return run.batch // at_once


def fit(
    task: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    micro: Callable[[int], Batch],
    recipe: Recipe,
    out: Path,
    *,
    identity: Mapping[str, Any] = MappingProxyType({}),
    state: State | None = None,
    ranks: Ranks = ALONE,
    watchers: Watchers = SILENT,
) -> Fitted:
    """Minimise the task's loss over `parameters` with AdamW, for `recipe.run.steps` updates.

    task        (batch, draws) -> Loss
    parameters  by name, all of the task's that require gradients; updated in place
    micro       number of a micro-batch -> that batch, the same for the same number
    out         directory of the run; states are written to `out`/states
    identity    what must be the same for a state to go on: JSON, such as the data's and the start's hashes
    state       the state to go on from, of `latest_state`; None: the beginning
    Update s sees micro-batches s A to s A + A - 1 with A = batch / micro, shared among the ranks, so that their number
    changes nothing beyond rounding. Updates whose loss or gradient is not finite are left out and counted.
    Raises ArgumentError when the state is of another run, NonFinite after PATIENCE such updates in a row, with the last
    good state kept.
    """
    run, settings, device = recipe.run, recipe.optimizer, torch.device(ranks.device)
    places_in_task = places(task, parameters)
    network = share(task, run.parallel, ranks)
    parameters = {name: task.get_parameter(place) for name, place in places_in_task.items()}
    averaged = {name: p.detach().clone() for name, p in parameters.items()} if run.ema else {}
    adam = optimizer(parameters, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=run.dtype == "float16")
    kept = _Kept()
    if state is not None:
        require_same(state.facts["identity"], identity, out)
        _restore(state.open(), parameters, averaged, adam)
        if scaler.is_enabled():
            scaler.load_state_dict(state.facts["scaler"])
        kept = _Kept(state.step, state.facts["skipped"], state.step)

    def save() -> None:
        tensors = {f"raw/{name}": whole(p) for name, p in parameters.items()}
        tensors |= {f"ema/{name}": whole(a) for name, a in averaged.items()}
        tensors |= {f"adam/{key}": tensor for key, tensor in state_tensors(adam, parameters).items()}
        if ranks.rank == 0:
            facts = {"identity": dict(identity), "skipped": kept.skipped, "scaler": scaler.state_dict()}
            save_state(out / "states", kept.step, tensors, facts, run.keep)
        kept.saved = kept.step
        watchers.event({"event": "saved", "step": kept.step})

    sums, in_a_row, stopped = _Sums(), 0, False
    while kept.step < run.steps and not stopped:
        for group in adam.param_groups:
            group["lr"] = group["initial_lr"] * factor(settings, run.steps, kept.step)
        adam.zero_grad(set_to_none=True)
        total = _backward(network, micro, run, ranks, kept.step, scaler, sums)
        scaler.unscale_(adam)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        seen = mean(torch.stack([total, norm.to(total), torch.tensor(float(watchers.stop()), device=device)]), ranks)
        value, norm_now, wants_stop = seen.tolist()
        # a scaler that looks for its scale makes gradients infinite: that is no fault of the run
        scaling = scaler.is_enabled() and math.isfinite(value) and scaler.get_scale() > 1
        if math.isfinite(value) and math.isfinite(norm_now):
            scaler.step(adam)
            if averaged:
                share_of_new = 1 - ema_decay(run.ema, kept.step + 1)
                torch._foreach_lerp_([*averaged.values()], [p.detach() for p in parameters.values()], share_of_new)
            in_a_row = 0
            sums.updates, sums.loss, sums.grad_norm = sums.updates + 1, sums.loss + value, sums.grad_norm + norm_now
        elif not scaling:
            kept.skipped, in_a_row = kept.skipped + 1, in_a_row + 1
            watchers.event({"event": "skipped", "step": kept.step + 1, "loss": value, "grad_norm": norm_now})
            if in_a_row == PATIENCE:
                what = f"training: the loss or its gradient was NaN or infinite {PATIENCE} times in a row"
                remedy = f"the state of step {kept.saved} is kept: lower optimizer.lr"
                raise NonFinite(f"{what}, at step {kept.step} last; {remedy}")
        scaler.update()
        kept.step += 1
        stopped = wants_stop > 0
        watchers.tick(kept.step)
        if kept.step % recipe.watch.log_every == 0 or kept.step == run.steps or stopped:
            watchers.log(_record(kept, sums, settings, run, ranks))
            sums = _Sums()
        if (kept.step % run.save_every == 0 or kept.step == run.steps or stopped) and (stopped or not in_a_row):
            save()
        if recipe.watch.every and kept.step % recipe.watch.every == 0 and kept.step < run.steps:
            watchers.validate(kept.step, averaged or {name: p.detach() for name, p in parameters.items()})
    ended = {name: whole(value) for name, value in (averaged or parameters).items()}
    return Fitted(kept.step, ended, kept.skipped, stopped and kept.step < run.steps)


def _backward(
    network: nn.Module,
    micro: Callable[[int], Batch],
    run: Run,
    ranks: Ranks,
    step: int,
    scaler: torch.amp.GradScaler,
    sums: _Sums,
) -> Tensor:
    """Add up the gradients of this rank's micro-batches of update `step`; return their mean loss, without gradient."""
    device, parts = torch.device(ranks.device), accumulation(run, ranks.world)
    total = torch.zeros((), device=device)
    for k in range(parts):
        batch = micro((step * parts + k) * ranks.world + ranks.rank)
        with _synchronised(network, last=k + 1 == parts):
            with torch.autocast(device.type, DTYPES[run.dtype], enabled=run.dtype != "float32"):
                loss: Loss = network(batch, Draws(run.seed, batch.index))
            value = loss.each.mean() / parts
            scaler.scale(value).backward()
        total += value.detach()
        _add_bands(sums.bands, loss)
    return total


@dataclass
class _Kept:
    """The progress of the run."""

    step: int = 0  # updates done
    skipped: int = 0
    saved: int = 0  # updates of the newest state


def require_same(then: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Raise ArgumentError, naming the first key that differs, where the state in `out` is of another run."""
    old, new = _flat(then), _flat(json.loads(json.dumps(dict(now))))
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            what = f"another {key} ({str(old.get(key))[:30]}, not {str(new.get(key))[:30]})"
            raise ArgumentError(f"{str(out)[-60:]}: holds a run with {what}; use another run.out", key=key)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


@contextmanager
def _synchronised(network: nn.Module, last: bool) -> Iterator[None]:
    """Gradients go to the other ranks with the last micro-batch of an update only."""
    for whole_network in sharded(network)[:1]:
        whole_network.set_requires_gradient_sync(last)
    if isinstance(network, nn.parallel.DistributedDataParallel) and not last:
        with network.no_sync():
            yield
    else:
        yield


@torch.no_grad()
def _restore(
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    averaged: Mapping[str, Tensor],
    adam: torch.optim.Optimizer,
) -> None:
    for prefix, values in (("raw/", parameters), ("ema/", averaged)):
        for name, value in values.items():
            put(value, tensors[prefix + name])
    remembered = {key.removeprefix("adam/"): tensors[key] for key in tensors if key.startswith("adam/")}
    load_state_tensors(adam, parameters, remembered)


def _add_bands(bands: Tensor, loss: Loss) -> None:
    if loss.t is not None:
        band = (loss.t * BANDS // loss.steps).cpu()
        bands[0].index_add_(0, band, loss.each.detach().double().cpu())
        bands[1].index_add_(0, band, torch.ones_like(band, dtype=torch.float64))


def _record(kept: _Kept, sums: _Sums, settings: Optimizer, run: Run, ranks: Ranks) -> Record:
    """A line of the log: means since the last line, also of each band; lr is that of the parameters in no group."""
    seconds, n = time.perf_counter() - sums.since, sums.updates
    totals, counts = (mean(sums.bands, ranks) * ranks.world).tolist()
    return {
        "step": kept.step,
        "loss": sums.loss / n if n else None,
        "lr": settings.lr * factor(settings, run.steps, kept.step - 1),
        "grad_norm": sums.grad_norm / n if n else None,
        "examples_per_second": n * run.batch / seconds,
        "skipped": kept.skipped,
        "seconds": seconds,
        "bands": [total / count if count else None for total, count in zip(totals, counts, strict=True)],
        "band_counts": [int(count) for count in counts],
    }
