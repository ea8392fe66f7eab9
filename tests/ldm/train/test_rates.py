"""The learning rate over a run, what the next run takes from it, and the decay of the averaged weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ldm.errors import FileError
from ldm.train.optim import ema_decay, factor, last_rate
from ldm.train.recipe import Optimizer


def curve(settings: Optimizer, steps: int) -> list[float]:
    return [factor(settings, steps, step) for step in range(steps)]


def test_without_a_warm_up_a_constant_rate_is_whole_from_the_first_update() -> None:
    assert curve(Optimizer(), 5) == [1.0] * 5


def test_the_warm_up_rises_in_equal_parts_and_wastes_no_update_on_nothing() -> None:
    assert curve(Optimizer(warmup=4), 6) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_a_run_shorter_than_its_warm_up_ends_on_the_way_up() -> None:
    assert curve(Optimizer(warmup=4, schedule="cosine"), 2) == [0.25, 0.5]


def test_a_linear_rate_falls_from_the_warm_up_to_one_part_before_nothing() -> None:
    assert curve(Optimizer(schedule="linear", warmup=2), 6) == [0.5, 1, 1, 0.75, 0.5, 0.25]


def test_a_linear_rate_falls_over_the_last_part_only_where_that_is_asked_for() -> None:
    assert curve(Optimizer(schedule="linear", decay=0.4), 10) == [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_a_cosine_passes_its_middle_halfway_between_warm_up_and_end() -> None:
    rates = curve(Optimizer(schedule="cosine", warmup=10), 110)
    assert rates[9] == rates[10] == 1
    assert rates[60] == pytest.approx(0.5)
    assert rates[109] == pytest.approx(0.5 * (1 + math.cos(0.99 * math.pi)))
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_restarts_begin_each_cycle_with_the_whole_rate() -> None:
    rates = curve(Optimizer(schedule="cosine-restarts", cycles=4, warmup=20), 120)
    assert [step for step in range(20, 120) if rates[step] == 1] == [20, 45, 70, 95]
    assert rates[44] < 0.01
    assert rates[20:45] == rates[95:120]


def test_one_cycle_of_restarts_is_a_cosine() -> None:
    assert curve(Optimizer(schedule="cosine-restarts", warmup=3), 17) == curve(
        Optimizer(schedule="cosine", warmup=3), 17
    )


def test_more_cycles_than_updates_stay_between_nothing_and_the_whole() -> None:
    assert all(0 <= rate <= 1 for rate in curve(Optimizer(schedule="cosine-restarts", cycles=100, warmup=1), 7))


def test_the_next_run_takes_the_last_rate_that_was_logged(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "lr": 1e-05}',
        '{"step": 2, "lr": 2.5e-06}',
        '{"step": 2, "event": "saved"}',
        '{"step": 3, "validation_loss": 1, "lr": null}',
        "[1]",
        '{"step": 4, "lr": 9e-0',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert last_rate(tmp_path) == 2.5e-06


@pytest.mark.parametrize("text", ["", '{"step": 1, "lr": 0.0}\n', '{"step": 1}\n', "\x00\xff"])
def test_a_log_without_a_rate_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(FileError, match="names no learning rate above 0; give optimizer"):
        last_rate(tmp_path)


def test_a_directory_without_a_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"log\.jsonl: cannot be read .*lr_from is the directory of an earlier run"):
        last_rate(tmp_path)


def test_averaged_weights_keep_little_of_themselves_at_first_and_their_decay_in_the_end() -> None:
    assert [ema_decay(0.9999, step) for step in (1, 8, 89_990)] == [2 / 11, 0.5, 0.9999]
    assert ema_decay(0.3, 8) == 0.3
