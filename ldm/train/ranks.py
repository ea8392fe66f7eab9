"""Training on several ranks: PyTorch's process groups, DDP and FSDP2, and an end in bounded time when a rank fails."""

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
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.errors import ArgumentError, DeviceError, LdmError, MemoryLimit, printable
from ldm.train.checkpointing import BLOCKS

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

BEATS = 30  # signs of life in the time after which a rank counts as dead ...
QUICK = 6  # ... and its part after which one does when an operation among the ranks has failed already
ALONE = timedelta(hours=2)  # what one rank may take for itself (pictures, saving) while the others wait


@dataclass(frozen=True)
class Ranks:
    """Which of the processes that train together this is."""

    rank: int = 0  # of all
    world: int = 1  # number of processes
    local: int = 0  # of its machine's
    device: str = "cpu"  # its own


@contextmanager
def ranks(device: str, *, timeout: float = 30.0, join: float = 600.0) -> Iterator[Ranks]:
    """This process among those that torchrun started, with a process group while open; alone without torchrun.

    device   "cpu" (gloo) or "cuda" (NCCL): each rank takes the device that has its number on its machine
    timeout  seconds without a sign of life after which a rank counts as dead, and the others end
    join     seconds that the ranks may take to find each other

    When a rank fails here, or dies, all end: one of them says `rank 1 of 2: CAUSE`, by the error raised, or on stderr
    where its main thread hangs in an operation that never comes back; the others end without a word. All exit codes are
    above 0. Raises ArgumentError for an environment that is not torchrun's, DeviceError for too few devices, LdmError
    for ranks that do not come.
    """
    rank, world, local = _environment()
    if world == 1:
        yield Ranks(device=device)
        return
    if device.startswith("cuda"):
        if local >= torch.cuda.device_count():
            found = f"there is no CUDA device {local}, {torch.cuda.device_count()} were found"
            raise DeviceError(f"rank {rank} of {world}: {found}; start as many ranks as there are devices")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    try:
        store = next(iter(dist.rendezvous("env://", rank, world, timeout=timedelta(seconds=join))))[0]
    except dist.DistError:
        late = f"to {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {join:.0f} s"
        remedy = "start all of them, with the same address"
        raise LdmError(f"rank {rank} of {world}: not all ranks came {late}; {remedy}") from None
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
    """Rank, world and local rank, as torchrun gives them; alone where it did not start this process."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, 0
    try:
        rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if world > 1:
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        what = f"has WORLD_SIZE, but not what else torchrun sets ({error})"
        raise ArgumentError(f"the environment {what}; start with torchrun, or unset WORLD_SIZE") from None
    if not 0 <= rank < world:
        what = f"says rank {rank} of {world} (RANK, WORLD_SIZE)"
        raise ArgumentError(f"the environment {what}; start with torchrun, or unset WORLD_SIZE")
    return rank, world, local


class _Pulse:
    """Signs of life through the store. Times are this machine's own: a rank is alive when its sign changes.

    One thread talks to the store, another only looks at the clock: a store whose machine is gone may never answer.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: float):
        self.store, self.rank, self.world, self.timeout = store, rank, world, timeout
        self.signs = [""] * world  # the last sign of each rank
        self.heard = [time.monotonic()] * world  # when it changed
        self.phase = "runs"  # then "ends", "left": as the others see it
        self.failure: dict[str, Any] | None = None  # the failure in the store, if there is one
        self.lost = False  # the store cannot be reached any more
        self.quiet = threading.Event()  # no more signs are needed
        self.acts = True  # a failure ends the process here; False: the main thread has an error to raise itself
        self.acting = threading.Lock()

    def start(self, join: float) -> None:
        """Wait for the others' first signs, and begin."""
        self.store.set(f"sign/{self.rank}", "0 runs")
        try:
            self.store.wait([f"sign/{r}" for r in range(self.world)], timedelta(seconds=join))
        except dist.DistError:
            late = f"not all ranks came within {join:.0f} s"
            raise LdmError(f"rank {self.rank} of {self.world}: {late}; start all of them") from None
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
                if self.phase == "left" and self.rank:  # rank 0, which may hold the store, stays until all have left
                    return self.quiet.set()
                signs = [sign.decode() for sign in self.store.multi_get([f"sign/{r}" for r in range(self.world)])]
                failure = json.loads(self.store.get("failure")) if self.store.check(["failure"]) else None
            except dist.DistError:
                self.lost = True
                return
            now = time.monotonic()
            changed = [new != old for new, old in zip(signs, self.signs, strict=True)]
            self.heard = [now if new else then for new, then in zip(changed, self.heard, strict=True)]
            self.signs, self.failure = signs, failure
            if self.phase == "ends" and all(sign.endswith(("ends", "left")) for sign in signs):
                self.phase = "left"  # the next sign says so
            elif self.phase == "left" and all(sign.endswith("left") for sign in signs):
                self.quiet.set()
            else:
                self.quiet.wait(self.timeout / BEATS)

    def _look(self) -> None:
        looked = time.monotonic()
        while not self.quiet.wait(self.timeout / BEATS):
            now = time.monotonic()
            if now - looked > self.timeout / 2:  # this process itself slept, perhaps suspended with all the others
                self.heard = [now] * self.world
            looked = now
            found = self.failure or self._dead(self.timeout)
            with self.acting:
                if found and self.acts:
                    self._end(found)

    def _dead(self, silence: float) -> dict[str, Any] | None:
        """The failure to report where a rank has been silent for so many seconds."""
        now, end = time.monotonic(), "killed, or its machine is gone; start again to go on from the last state"
        if self.lost or now - self.heard[self.rank] > silence:  # not even this rank's own signs arrive
            return self._failure(0, f"cannot be reached any more: {end}")
        for r, sign in enumerate(self.signs):
            if now - self.heard[r] > silence and not sign.endswith("left"):
                return self._failure(r, f"no sign of life for {now - self.heard[r]:.0f} s: {end}")
        return None

    def _failure(self, rank: int, what: str, code: int = 1) -> dict[str, Any]:
        return {"text": f"rank {rank} of {self.world}: {what}", "code": code, "by": self.rank}

    def _claim(self, failure: dict[str, Any]) -> dict[str, Any]:
        """The failure that ends the run: the first one in the store; this one where the store cannot be reached."""
        if self.lost or time.monotonic() - self.heard[self.rank] > self.timeout / QUICK:
            return failure
        try:
            return json.loads(self.store.compare_set("failure", "", json.dumps(failure)))
        except dist.DistError:
            return failure

    def _end(self, failure: dict[str, Any]) -> NoReturn:
        """End this process, also where its main thread hangs in an operation."""
        failure = self._claim(failure)
        if failure["by"] == self.rank and sys.stderr is not None:
            print(f"ldm: error: {LdmError(failure['text'])}", file=sys.stderr, flush=True)
        self._part()
        os._exit(failure["code"])

    def _part(self) -> None:
        """Give the others time to read what has happened, which they cannot once the store's process has ended."""
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
        """End all. Raises the error with this rank's name, or SystemExit where another rank reports the cause."""
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
            raise type(error)(failure["text"]) from error
        raise (MemoryLimit if failure["code"] == MemoryLimit.exit_code else LdmError)(failure["text"]) from error

    def _cause(self, error: BaseException) -> dict[str, Any] | None:
        """The failure that ends the run: this rank's error, or another rank's death.

        Another's, where a signal stopped this one or an operation among the ranks failed. None: a signal stopped all.
        """
        if isinstance(error, LdmError):
            return self._failure(self.rank, str(error), error.exit_code)
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            remedy = "use a smaller run.micro, or run.checkpointing"
            return self._failure(self.rank, f"out of memory; {remedy}", MemoryLimit.exit_code)
        if "Expected to have finished reduction in the prior iteration" in str(error):
            what = "a trained parameter takes no part in the loss, which DDP cannot do"
            return self._failure(self.rank, f"{what}; narrow method.targets, or set run.parallel to fsdp")
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
        if stopped:
            return None
        text = printable(" ".join(str(error).split()))
        return self._failure(self.rank, f"{type(error).__name__}: {text}; --debug shows where")


@contextmanager
def _deaf() -> Iterator[None]:
    """SIGTERM is ignored while this is open."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def share(task: nn.Module, how: Literal["ddp", "fsdp"], ranks: Ranks) -> nn.Module:
    """The module to call, whose gradients are means over the ranks; alone the task itself.

    ddp   DistributedDataParallel: every rank has the whole task, with rank 0's parameters. All parameters that require
          a gradient must take part in the loss
    fsdp  FSDP2 (`fully_shard`): every rank keeps its share of each parameter, and gathers one block at a time, those of
          `BLOCKS`. This happens in place, and puts other parameters (DTensor) under the same names into the task
    """
    if ranks.world == 1:
        return task
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(task)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(ranks.device).type, (ranks.world,))
    for module in [*(module for module in task.modules() if isinstance(module, BLOCKS)), task]:
        fully_shard(module, mesh=mesh)
    return task


def sharded(task: nn.Module) -> list[FSDPModule]:
    """The parts of a task that `share` gave to FSDP; none where this process trains alone."""
    if not dist.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in task.modules() if isinstance(module, FSDPModule)]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that ranks may share, on the CPU, without gradient, perhaps not a copy; all ranks call it."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu()


def like(place: Tensor, tensor: Tensor) -> Tensor:
    """This rank's part, in its own type, of a tensor, whole or shared already, that is laid out as `place` is."""
    tensor = tensor.to(place.device)
    if not dist.is_initialized():
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(place, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor, place.device_mesh, place.placements, src_data_rank=None)


@torch.no_grad()
def put(place: Tensor, tensor: Tensor) -> None:
    """Copy a tensor, whole and the same on all ranks or shared already, into a parameter that they may share."""
    place.copy_(like(place, tensor))


@contextmanager
def gathered(task: nn.Module) -> Iterator[None]:
    """While this is open every rank holds all parameters of a task shared by FSDP, and may run its networks alone.

    Without gradients, and without their `state_dict`: FSDP answers it with shares, and takes the whole parameters away.
    """
    parts = sharded(task)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not task, recurse=False)
            part.reshard()


def mean(value: Tensor, ranks: Ranks) -> Tensor:
    """The mean over the ranks, the same bits on all."""
    if ranks.world == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / ranks.world


def broadcast(value: Any, ranks: Ranks) -> Any:
    """The first rank's value, JSON, on all ranks."""
    if ranks.world == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def barrier(ranks: Ranks) -> None:
    """Wait until all ranks have come here."""
    all_agree(None, ranks)


def all_agree(value: Any, ranks: Ranks) -> bool:
    """Whether JSON is the same on all ranks."""
    if ranks.world == 1:
        return True
    digest = int.from_bytes(blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=7).digest(), "little")
    extremes = torch.tensor([digest, -digest], device=ranks.device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return int(extremes[0]) == -int(extremes[1])
