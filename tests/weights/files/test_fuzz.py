"""The fuzzer itself: it starts from sound files, repeats itself, notices faults, and finds none in a few thousand
mutants."""

from __future__ import annotations

import pytest

from ldm.errors import FileError
from tests.made import fuzz
from weights import open_file
from weights.files.pickles import Machine


def test_the_files_that_are_damaged_are_sound(tmp_path):
    for kind, files in fuzz.seeds().items():
        for data in files:
            if kind != "index":
                (tmp_path / "x").write_bytes(data)
                with open_file(tmp_path / "x") as file:
                    assert all(file[key].shape == file.shape(key) for key in file)
    assert fuzz.run(0, range(0)).faults == []


def test_a_mutant_depends_on_the_seed_and_its_number_alone():
    first = [fuzz.mutant(7, number) for number in range(50)]
    assert [fuzz.mutant(7, number) for number in reversed(range(50))][::-1] == first
    assert [fuzz.mutant(8, number) for number in range(50)] != first
    assert {kind for kind, _ in first} == set(fuzz.KINDS)


def test_a_few_thousand_mutants_are_loaded_or_refused():
    report = fuzz.run(1, range(4000))
    assert not report.faults, report.faults[0]
    assert report.loaded.total() + report.refused.total() == 4000
    assert all(report.loaded[kind] and report.refused[kind] for kind in fuzz.KINDS)  # neither all sound nor all dead
    assert report.slowest[0] < 1
    assert report.memory < 256 * 1024


def test_a_mutated_pickle_reaches_the_machine_behind_the_checksum(tmp_path):
    """Without the checksum put right, hardly one mutant would."""
    messages = []
    for number in range(2, 1500, len(fuzz.KINDS)):
        kind, data = fuzz.mutant(0, number)
        assert kind == "pickle"
        try:
            fuzz.read_all(kind, data, tmp_path)
        except FileError as error:
            messages.append(str(error))
    assert not [message for message in messages if "checksum" in message]
    assert len({message.split("; ")[0] for message in messages}) > 50  # it is refused for many reasons


@pytest.mark.parametrize("fault", [ValueError, MemoryError, RecursionError, AssertionError])
def test_any_other_error_is_a_fault_with_its_number(fault, monkeypatch):
    def broken(self: Machine) -> None:
        raise fault("out of the machine")

    monkeypatch.setattr(Machine, "run", broken)
    report = fuzz.run(0, range(20))
    assert {number for number, _ in report.faults} >= {2, 7, 12, 17}
    assert all("out of the machine" in what for _, what in report.faults)


def test_the_command_reports_its_figures(capsys):
    assert fuzz.main(["--mutants", "100", "--seed", "3"]) == 0
    output = capsys.readouterr().out
    assert "100 mutants in" in output
    assert "0 faults" in output
    assert "slowest" in output


def test_the_command_prints_how_to_repeat_a_fault(capsys, monkeypatch):
    def broken(self: Machine) -> None:
        raise ValueError("out of the machine")

    monkeypatch.setattr(Machine, "run", broken)
    assert fuzz.main(["--mutants", "1", "--first", "7", "--seed", "3"]) == 1
    assert "FAULT: python -m tests.made.fuzz --seed 3 --first 7 --mutants 1\n" in capsys.readouterr().out
