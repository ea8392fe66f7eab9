"""Training on several ranks: PyTorch's own process groups, DDP and FSDP2, and an end in bounded time when a rank fails."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.errors import ArgumentError, DeviceError, LdmError, MemoryLimit, printable
from ldm.train.checkpointing import BLOCKS

BEATS = 30  # signs of life in the time after which a rank counts as dead ...
QUICK = 6  # ... and its part after which one does when an operation among the ranks has failed already
ALONE = timedelta(hours=2)  # what one rank may take for itself (pictures, saving) while the others wait


@dataclass(frozen=True)
class Ranks:
    """Which of the processes that train together this is."""

    rank: int = 0  # of all
    world: int = 1  # how many there are
    local: int = 0  # of its machine's
    device: str = "cpu"  # its own


# --- begin and end --------------------------------------------------------------------------------------------------


@contextmanager
def ranks(device: str, *, timeout: float = 30.0, join: float = 600.0) -> Iterator[Ranks]:
    """This process among those that torchrun started, with a process group of gloo (CPU) or NCCL (CUDA) while it is open; alone without torchrun.

    device   "cpu" or "cuda": each rank takes the device that has its number on its machine
    timeout  seconds without a sign of life after which a rank counts as dead, and the others end
    join     seconds that the ranks may take to find each other

    When a rank fails here, or dies, all end: one of them says `rank 1 of 2: CAUSE`, by the error raised or on stderr where its main thread
    hangs in an operation that never comes back; the others end without a word. Each has a non-zero exit code.
    Raises ArgumentError for an environment that is not torchrun's, DeviceError for too few devices, LdmError for ranks that do not come.
    """
    rank, world, local = _environment()
    if world == 1:
        yield Ranks(device=device)
        return
    if device.startswith("cuda"):
        if local >= torch.cuda.device_count():
            raise DeviceError(
                f"rank {rank} of {world}: there is no CUDA device {local}, {torch.cuda.device_count()} were found; start as many ranks as there are devices"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    store = _meet(rank, world, join)
    pulse = _Pulse(dist.PrefixStore("ldm", store.clone()), rank, world, timeout)
    pulse.start(join)
    try:
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=ALONE)
        yield Ranks(rank, world, local, device)
        pulse.leave()
    except BaseException as error:
        pulse.fail(error)  # the group is left as it is: to take it down would wait for operations that never end
    dist.destroy_process_group()


def _environment() -> tuple[int, int, int]:
    """Rank, world and local rank, as torchrun tells them; alone where it did not."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, 0
    try:
        rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if world > 1:
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise ArgumentError(
            f"the environment has WORLD_SIZE, but not what else torchrun sets ({error}); start with torchrun, or unset WORLD_SIZE"
        ) from None
    if not 0 <= rank < world:
        raise ArgumentError(
            f"the environment says rank {rank} of {world} (RANK, WORLD_SIZE); start with torchrun, or unset WORLD_SIZE"
        )
    return rank, world, local


def _meet(rank: int, world: int, join: float) -> dist.Store:
    """The store that all ranks reach."""
    try:
        return next(iter(dist.rendezvous("env://", rank, world, timeout=timedelta(seconds=join))))[0]
    except dist.DistError:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LdmError(
            f"rank {rank} of {world}: not all ranks came to {place} within {join:.0f} s; start all of them, with the same address"
        ) from None


class _Pulse:
    """Signs of life through the store. Times are this machine's own: a rank is heard of when its sign has changed.

    One thread talks to the store, another only looks at the clock, since a store whose machine is gone may never answer.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: float):
        self.store, self.rank, self.world, self.timeout = store, rank, world, timeout
        self.signs = [""] * world  # last one of each
        self.heard = [time.monotonic()] * world  # when that was
        self.phase = "runs"  # then "ends", "left": as the others see it
        self.failure: dict[str, Any] | None = None  # what the store says of one
        self.lost = False  # the store cannot be reached any more
        self.quiet = threading.Event()  # nothing more to tell
        self.acts = (
            True  # a failure ends the process; once the main thread has one of its own to explain it does that itself
        )
        self.acting = threading.Lock()

    def start(self, join: float) -> None:
        """Wait for the others' first signs, and begin."""
        self.store.set(f"sign/{self.rank}", "0 runs")
        try:
            self.store.wait([f"sign/{r}" for r in range(self.world)], timedelta(seconds=join))
        except dist.DistError:
            raise LdmError(
                f"rank {self.rank} of {self.world}: not all ranks came within {join:.0f} s; start all of them"
            ) from None
        self.heard = [time.monotonic()] * self.world
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self._talk, self._look)]
        for thread in self.threads:
            thread.start()

    def _talk(self) -> None:
        number = 0
        while not self.quiet.is_set():
            number += 1
            try:
                self.store.set(f"sign/{self.rank}", f"{number} {self.phase}")
                if (
                    self.phase == "left" and self.rank
                ):  # rank 0, whose process may be the store, stays until it has heard that of all
                    return self.quiet.set()
                signs = [sign.decode() for sign in self.store.multi_get([f"sign/{r}" for r in range(self.world)])]
                failure = json.loads(self.store.get("failure")) if self.store.check(["failure"]) else None
            except dist.DistError:
                self.lost = True
                return
            now = time.monotonic()
            self.heard = [
                now if new != old else then for new, old, then in zip(signs, self.signs, self.heard, strict=True)
            ]
            self.signs, self.failure = signs, failure
            if self.phase == "ends" and all(sign.endswith(("ends", "left")) for sign in signs):
                self.phase = "left"  # told in the next round
            elif self.phase == "left" and all(sign.endswith("left") for sign in signs):
                self.quiet.set()
            else:
                self.quiet.wait(self.timeout / BEATS)

    def _look(self) -> None:
        looked = time.monotonic()
        while not self.quiet.wait(self.timeout / BEATS):
            now = time.monotonic()
            if (
                now - looked > self.timeout / 2
            ):  # it was this process that slept: suspended with all the others, perhaps
                self.heard = [now] * self.world
            looked = now
            found = self.failure or self._dead(self.timeout)
            with self.acting:
                if found and self.acts:
                    self._end(found)

    def _dead(self, silence: float) -> dict[str, Any] | None:
        """The failure to report where a rank has been silent for so many seconds."""
        now = time.monotonic()
        if self.lost or now - self.heard[self.rank] > silence:  # not even this rank's own signs arrive
            return self._failure(
                0,
                "cannot be reached any more: killed, or its machine is gone; start again to go on from the last state",
            )
        for r, sign in enumerate(self.signs):
            if now - self.heard[r] > silence and not sign.endswith("left"):
                return self._failure(
                    r,
                    f"no sign of life for {now - self.heard[r]:.0f} s: killed, or its machine is gone; start again to go on from the last state",
                )
        return None

    def _failure(self, rank: int, what: str, code: int = 1) -> dict[str, Any]:
        return {"text": f"rank {rank} of {self.world}: {what}", "code": code, "by": self.rank}

    def _claim(self, failure: dict[str, Any]) -> dict[str, Any]:
        """The failure that the run ends with: the first one told. Where nobody can be told it is this one."""
        if self.lost or time.monotonic() - self.heard[self.rank] > self.timeout / QUICK:
            return failure
        try:
            return json.loads(self.store.compare_set("failure", "", json.dumps(failure)))
        except dist.DistError:
            return failure

    def _end(self, failure: dict[str, Any]) -> NoReturn:
        """End this process, whatever its main thread is in."""
        failure = self._claim(failure)
        if failure["by"] == self.rank and sys.stderr is not None:
            print(f"ldm: error: {LdmError(failure['text'])}", file=sys.stderr, flush=True)
        self._part()
        os._exit(failure["code"])

    def _part(self) -> None:
        """Let the others read what has happened, if the store is in this process, and tell that this one has read it."""
        self.phase = "left"
        if self.rank == 0:
            self.quiet.wait(self.timeout / QUICK)
        else:
            time.sleep(2 * self.timeout / BEATS)

    def leave(self) -> None:
        """Wait for the others' end."""
        self.phase = "ends"
        self.quiet.wait()
        for thread in self.threads:
            thread.join()

    def fail(self, error: BaseException) -> NoReturn:
        """Tell the others; raise the error with this rank's name, or SystemExit where another rank says what has happened."""
        with self.acting:
            self.acts = False
        failure = self._cause(error)
        if failure is None:  # it was stopped, as all the others were
            raise error
        failure = self._claim(failure)
        self._part()
        if failure["by"] != self.rank:
            raise SystemExit(failure["code"]) from None
        if isinstance(error, LdmError):
            named = type(error)(failure["text"], key=error.key)
            named.path = error.path
            raise named from error
        raise (MemoryLimit if failure["code"] == MemoryLimit.exit_code else LdmError)(failure["text"]) from error

    def _cause(self, error: BaseException) -> dict[str, Any] | None:
        """What the run ends for: an error of this rank; or where a signal stopped it, or an operation among the ranks failed, the death of another."""
        if isinstance(error, LdmError):
            return self._failure(self.rank, str(error), error.exit_code)
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return self._failure(
                self.rank, "out of memory; use a smaller run.micro, or run.checkpointing", MemoryLimit.exit_code
            )
        if "Expected to have finished reduction in the prior iteration" in str(error):
            return self._failure(
                self.rank,
                "a trained parameter takes no part in the loss, which DDP cannot do; narrow method.targets, or set run.parallel to fsdp",
            )
        stopped = not isinstance(error, Exception)
        if stopped or isinstance(error, RuntimeError):
            with _deaf():  # torchrun stops the others as soon as one has died
                until = time.monotonic() + 2 * self.timeout / QUICK
                if stopped:
                    self.phase = "ends"
                while time.monotonic() < until and not self.quiet.is_set():  # quiet: all were stopped
                    found = self.failure or self._dead(self.timeout / QUICK)
                    if found:
                        return found
                    time.sleep(self.timeout / BEATS / 2)
        return (
            None
            if stopped
            else self._failure(
                self.rank, f"{type(error).__name__}: {printable(' '.join(str(error).split()))}; --debug shows where"
            )
        )


@contextmanager
def _deaf() -> Iterator[None]:
    """SIGTERM is not heard."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- share the work -------------------------------------------------------------------------------------------------


def share(task: nn.Module, how: Literal["ddp", "fsdp"], ranks: Ranks) -> nn.Module:
    """The module to call, whose gradients are means over the ranks; alone the task itself.

    ddp   DistributedDataParallel: every rank has the whole task, which takes over rank 0's parameters. All that require a gradient must
          take part in the loss
    fsdp  FSDP2 (`fully_shard`): every rank keeps its share of each parameter, and gathers one block at a time, those of `BLOCKS`. This
          happens in place, and puts other parameters (DTensor) under the same names into the task
    """
    if ranks.world == 1:
        return task
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(task)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(ranks.device).type, (ranks.world,))
    for module in [module for module in task.modules() if isinstance(module, BLOCKS)]:
        fully_shard(module, mesh=mesh)
    return fully_shard(task, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, without gradient, that may be shared among the ranks; all of them call it. It may share memory with `tensor`."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu()


def like(place: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, the same on all ranks, as `place` is laid out: on its device, and this rank's share of it where it is shared. Keeps its type."""
    tensor = tensor.to(place.device)
    if not hasattr(place, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, place.device_mesh, place.placements, src_data_rank=None)


@torch.no_grad()
def put(place: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor, the same on all ranks, into a parameter that may be shared among them."""
    place.copy_(like(place, tensor))


@contextmanager
def gathered(task: nn.Module) -> Iterator[None]:
    """While this is open every rank has all parameters of a task shared by FSDP, and may use the networks in it alone, without gradients.

    Not their `state_dict`, which FSDP answers with shares, after taking the whole parameters away.
    """
    parts = [module for module in task.modules() if hasattr(module, "unshard")]
    for module in parts:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in parts:
            module.set_reshard_after_forward(module is not task, recurse=False)
            module.reshard()


def mean(value: Tensor, ranks: Ranks) -> Tensor:
    """The mean over the ranks, the same bits on all."""
    if ranks.world == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / ranks.world


def all_agree(value: Any, ranks: Ranks) -> bool:
    """Whether JSON is the same on all ranks."""
    if ranks.world == 1:
        return True
    digest = int.from_bytes(blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=7).digest(), "little")
    extremes = torch.tensor([digest, -digest], device=ranks.device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return int(extremes[0]) == -int(extremes[1])
