"""Several ranks compute what one does, and when one of them fails all end soon and say once why."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.errors import ArgumentError, DeviceError, FileError, LdmError
from ldm.networks.unet import ResBlock
from ldm.train.data.batch import Batch
from ldm.train.draws import Draws
from ldm.train.loop import fit
from ldm.train.optim import load_state_tensors, optimizer, state_tensors
from ldm.train.ranks import Ranks, all_agree, broadcast, gathered, like, mean, put, ranks, share, whole
from ldm.train.recipe import Group, Optimizer, Recipe, Run
from ldm.train.state import latest_state
from ldm.train.tasks import Loss
from tests.made.forked import succeed, together

# --- alone ----------------------------------------------------------------------------------------------------------


def test_without_torchrun_a_process_is_alone_and_nothing_is_shared(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    task = nn.Linear(2, 3)
    with ranks("cpu") as alone, gathered(task):
        assert alone == Ranks(rank=0, world=1, local=0, device="cpu")
        assert share(task, "ddp", alone) is share(task, "fsdp", alone) is task
        assert mean(task.weight, alone) is task.weight
        assert all_agree({"a": 1}, alone)
        assert broadcast(["a"], alone) == ["a"]
        put(task.weight, torch.ones(3, 2))
        assert whole(task.weight).equal(torch.ones(3, 2))
        assert not whole(task.weight).requires_grad
        assert like(task.weight, torch.zeros(3, 2, dtype=torch.uint8)).dtype == torch.uint8


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"WORLD_SIZE": "2"}, r"not what else torchrun sets \('RANK'\)"),
        ({"WORLD_SIZE": "2", "RANK": "x", "LOCAL_RANK": "0"}, "not what else torchrun sets"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, r"not what else torchrun sets \('MASTER_ADDR'\)"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "says rank 2 of 2",
        ),
    ],
)
def test_an_environment_that_is_not_torchruns_is_refused(environment, why, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ArgumentError, match=rf"{why}.*; start with torchrun, or unset WORLD_SIZE$"), ranks("cpu"):
        pass


def test_a_rank_without_a_device_and_one_whose_others_do_not_come_say_so(monkeypatch):
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "99",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(
            DeviceError,
            match=r"rank 0 of 2: there is no CUDA device 99, \d+ were found; start as many ranks as there are devices",
        ),
        ranks("cuda"),
    ):
        pass
    with (
        pytest.raises(
            LdmError,
            match=r"rank 0 of 2: not all ranks came to 127\.0\.0\.1:0 within 1 s; start all of them, with the same "
            "address",
        ),
        ranks("cpu", join=1.0),
    ):
        pass


# --- two compute what one does --------------------------------------------------------------------------------------


class Small(nn.Module):
    """A network with a block that FSDP shares by itself, a frozen part and one that nothing uses, to be trained or
    not."""

    def __init__(self, trains_unused: bool = False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.first, self.block, self.last, self.unused = (
                nn.Conv2d(2, 64, 3),
                ResBlock(64, 8, 64),
                nn.Conv2d(64, 1, 1),
                nn.Linear(2, 2),
            )
            for p in self.block.parameters():
                if (
                    not p.any()
                ):  # as a training starts, but then all of it would be what gradients added up to, with their rounding
                    nn.init.normal_(p, std=0.1)
        self.first.bias.requires_grad_(False)
        self.unused.requires_grad_(trains_unused)
        self.register_buffer("shift", torch.tensor([0.5]))

    def forward(self, batch: Batch, draws: Draws) -> Loss:
        x, emb = draws.normal("x", (2, 6, 6)), draws.normal("emb", (8,))
        out = self.last(self.block(self.first(x), emb)) + self.shift
        return Loss(out.square().mean(dim=(1, 2, 3)) * batch.weight)


def micro(number: int) -> Batch:
    index = (2 * number, 2 * number + 1)
    return Batch(index, ("", ""), (8, 8), (), torch.tensor([1.0, 2.0]))


def trained(task: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in task.named_parameters() if p.requires_grad}


def two_ranks_backward(how: str, out: Path) -> None:
    with ranks("cpu") as place:
        task = Small(trains_unused=how == "fsdp")
        network = share(task, how, place)
        batch = micro(place.rank)
        network(batch, Draws(0, batch.index)).each.mean().backward()
        gradients = {name: whole(p.grad).clone() for name, p in trained(task).items() if p.grad is not None}
        assert all_agree({name: float(g.double().sum()) for name, g in gradients.items()}, place)
        assert mean(torch.tensor([place.rank, 3.0]), place).tolist() == [0.5, 3.0]
        assert all_agree({"a": [1, "b"]}, place)
        assert not all_agree(place.rank, place)
        assert broadcast(["the first rank's", place.rank], place) == ["the first rank's", 0]
        parameters = trained(task)
        adam = optimizer(parameters, Optimizer(lr=0.1, groups=(Group("bias", 0.01),)))
        adam.step()
        kept = {key: tensor.clone() for key, tensor in state_tensors(adam, parameters).items()}
        then = {name: whole(p).clone() for name, p in parameters.items()}
        assert kept["exp_avg/block.in_layers.2.weight"].shape == (64, 64, 3, 3)
        adam.step()
        once_more = {name: whole(p).clone() for name, p in parameters.items()}
        again = optimizer(parameters, Optimizer(lr=0.1, groups=(Group("bias", 0.01),)))
        load_state_tensors(again, parameters, kept)
        for name, p in parameters.items():
            put(p, then[name])
        again.step()
        assert all(whole(p).equal(once_more[name]) for name, p in parameters.items())
        with gathered(task), torch.no_grad():
            if place.rank == 0:  # without the others
                alone = Small()
                for name, p in trained(alone).items():
                    p.copy_(once_more[name])
                here, there = task(batch, Draws(0, batch.index)).each, alone(batch, Draws(0, batch.index)).each
                assert here.equal(there)
                assert task.block(torch.ones(1, 64, 4, 4), torch.ones(1, 8)).equal(
                    alone.block(torch.ones(1, 64, 4, 4), torch.ones(1, 8))
                )
        network(batch, Draws(0, batch.index)).each.mean().backward()  # and all goes on as before
        if place.rank == 0:
            torch.save(gradients, out / "gradients")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_give_the_gradients_of_one_and_what_is_shared_goes_away_and_comes_back(how, tmp_path):
    with together(two_ranks_backward, how, tmp_path, world=2, said=tmp_path / "said") as processes:
        succeed(processes, tmp_path / "said")
    task = Small()
    loss = torch.stack([task(micro(number), Draws(0, micro(number).index)).each.mean() for number in range(2)]).mean()
    loss.backward()
    found = torch.load(tmp_path / "gradients", weights_only=True)
    wanted = {name: p.grad for name, p in trained(task).items() if p.grad is not None}
    assert set(found) == set(wanted)
    assert max(float((found[name] - g).norm() / g.norm()) for name, g in wanted.items()) < 1e-6


# --- the loop on one, two and again one -----------------------------------------------------------------------------

# eps is far above the clipped gradients: with Adam's own, a gradient near zero is divided by itself, and its rounding
# becomes a step of size lr
RECIPE = Recipe(
    "two",
    run=Run(steps=4, batch=8, micro=2, ema=0.9, save_every=2, keep=9),
    optimizer=Optimizer(lr=1e-2, eps=1e-2, clip=0.05),
)


def run_loop(out: Path, steps: int, how: str, place: Ranks) -> None:
    task = Small()
    recipe = replace(RECIPE, run=replace(RECIPE.run, steps=steps, parallel=how))
    fit(task, trained(task), micro, recipe, out, state=latest_state(out / "states"), ranks=place)


def two_ranks_loop(out: Path) -> None:
    with ranks("cpu") as place:
        for how in ("ddp", "fsdp"):
            run_loop(out / how, 4, how, place)
            run_loop(out / f"{how} first", 2, how, place)
            run_loop(out / "one first" / how, 4, how, place)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """What is kept after four updates, however many ranks made the first and the last two."""
    out = tmp_path_factory.mktemp("loops")
    run_loop(out / "one", 4, "ddp", Ranks())
    for how in ("ddp", "fsdp"):
        run_loop(out / "one first" / how, 2, how, Ranks())
    with together(two_ranks_loop, out, world=2, said=out / "said") as processes:
        succeed(processes, out / "said")
    for how in ("ddp", "fsdp"):
        run_loop(out / f"{how} first", 4, how, Ranks())
    states = {
        name: latest_state(out / name / "states")
        for name in ("one", "ddp", "fsdp", "ddp first", "fsdp first", "one first/ddp", "one first/fsdp")
    }
    assert {state.step for state in states.values()} == {4}
    return {name: dict(state.open()) for name, state in states.items()}


@pytest.mark.parametrize("name", ["ddp", "fsdp", "ddp first", "fsdp first", "one first/ddp", "one first/fsdp"])
def test_the_loop_on_two_ranks_or_on_another_number_halfway_gives_what_it_gives_on_one(runs, name):
    """Weights and averages to 1e-6 of their size; the moments, sums of gradients of both signs, to 1e-5."""
    one, other = runs["one"], runs[name]
    assert set(one) == set(other)
    for key, wanted in one.items():
        bound = 1e-6 if key.startswith(("raw/", "ema/")) else 1e-5
        assert float((other[key] - wanted).norm()) <= bound * float(wanted.norm()), key


# --- one fails ------------------------------------------------------------------------------------------------------

TIMEOUT = 6.0  # seconds: of silence after which a rank counts as dead


def rank_one_fails(how: str) -> None:
    with ranks("cpu", timeout=TIMEOUT) as place:
        for step in range(10**9):
            mean(torch.ones(1), place)
            if step == 5 and place.rank == 1:
                if how == "error":
                    raise FileError("is corrupt; delete it", path="photos/x.png", key="photos/x.png")
                if how == "fault":
                    raise ZeroDivisionError("what a pity")
                if how == "memory":
                    raise MemoryError
                if how == "exit":
                    os._exit(0)
                os.kill(os.getpid(), {"kill": signal.SIGKILL, "hang": signal.SIGSTOP}[how])


def all_fail() -> None:
    with ranks("cpu", timeout=TIMEOUT) as place:
        raise ArgumentError(f"run.batch: {place.world} is too much", key="run.batch")


def all_are_stopped() -> None:
    with ranks("cpu", timeout=TIMEOUT) as place:
        mean(torch.ones(1), place)
        raise KeyboardInterrupt


def one_part_is_not_used() -> None:
    with ranks("cpu", timeout=TIMEOUT) as place:
        network = share(Small(trains_unused=True), "ddp", place)
        for number in range(2):
            network(micro(number), Draws(0, (0, 1))).each.mean().backward()


def one_waits_for_the_other() -> None:
    with ranks("cpu", timeout=TIMEOUT) as place:
        time.sleep(1.5 * place.rank)


def all_sleep() -> None:
    with ranks("cpu", timeout=TIMEOUT) as place:
        mean(torch.ones(1), place)
        print(place.rank, file=sys.stderr, flush=True)
        for _ in range(100):
            time.sleep(0.01)
            mean(torch.ones(1), place)


GONE = (
    r"ldm: error: rank 1 of 2: no sign of life for \d+ s: killed, or its machine is gone; start again to go on "
    "from "
    "the last state"
)
FAILURES = {  # how, codes of both, what is on stderr
    "error": ([2, 2], r"ldm: error: rank 1 of 2: photos/x\.png: is corrupt; delete it"),
    "fault": ([1, 1], r"ldm: error: rank 1 of 2: ZeroDivisionError: what a pity; --debug shows where"),
    "memory": ([4, 4], r"ldm: error: rank 1 of 2: out of memory; use a smaller run\.micro, or run\.checkpointing"),
    "kill": ([1, -signal.SIGKILL], GONE),
    "exit": ([1, 0], GONE),
    "hang": ([1, None], GONE),
    "all": ([2, 2], r"ldm: error: rank [01] of 2: run\.batch: 2 is too much"),
    "unused": (
        [1, 1],
        r"ldm: error: rank [01] of 2: a trained parameter takes no part in the loss, which DDP cannot do; narrow "
        r"method\.targets, or set run\.parallel to fsdp",
    ),
    "stopped": ([1, 1], None),
    "waits": ([0, 0], ""),
}


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> Iterator[dict[str, tuple[list[BaseProcess], Path, float]]]:
    """All pairs at once, since they mostly wait."""
    out = tmp_path_factory.mktemp("failures")
    functions = {
        "all": (all_fail,),
        "unused": (one_part_is_not_used,),
        "stopped": (all_are_stopped,),
        "waits": (one_waits_for_the_other,),
    }
    with ExitStack() as stack:
        yield {
            how: (stack.enter_context(together(*functions.get(how, (rank_one_fails, how)), world=2, said=out / how)),
                out / how, time.monotonic())
            for how in FAILURES
        }  # fmt: skip


def test_a_run_that_was_suspended_goes_on(tmp_path):
    """As a cluster does that stops all processes of a job for a while."""
    with together(all_sleep, world=2, said=tmp_path) as processes:
        while not all((tmp_path / str(rank)).exists() and (tmp_path / str(rank)).read_text() for rank in range(2)):
            time.sleep(0.05)
        for signal_, seconds in ((signal.SIGSTOP, 1.5 * TIMEOUT), (signal.SIGCONT, 0.0)):
            for process in processes:
                os.kill(process.pid, signal_)
            time.sleep(seconds)
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]
        assert {(tmp_path / str(rank)).read_text() for rank in range(2)} == {"0\n", "1\n"}


@pytest.mark.parametrize("how", FAILURES)
def test_when_a_rank_fails_all_end_soon_and_say_once_why(how, failures):
    processes, errors, since = failures[how]
    codes, line = FAILURES[how]
    for process, code in zip(processes, codes, strict=True):
        process.join(0 if code is None else max(0.1, 60 - (time.monotonic() - since)))
    assert [process.exitcode for process in processes] == codes
    text = "".join((errors / str(rank)).read_text() for rank in range(2))
    if line is None:  # both raised what stopped them
        assert len(re.findall(r"^KeyboardInterrupt$", text, re.MULTILINE)) == 2
    else:
        assert re.fullmatch(line, text.strip()), text
