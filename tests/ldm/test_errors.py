"""An error is one short line, made of parts that the command line composes anew."""

from __future__ import annotations

from ldm.errors import LIMIT, ArgumentError, FileError, OutputError

SPELLED = {"rescale": "--cfg-rescale", "overwrite=True": "--overwrite"}


def test_the_parts_of_a_message_are_kept():
    error = ArgumentError("rescale: 2; give a number from 0 to 1", key="rescale")
    assert (str(error), error.what, error.key) == (
        "rescale: 2; give a number from 0 to 1",
        "2; give a number from 0 to 1",
        "rescale",
    )
    assert error.line(SPELLED) == "--cfg-rescale: 2; give a number from 0 to 1"
    error = FileError("holds no numbers", path="a.ckpt", key="a.weight")
    assert (str(error), error.what, error.path) == ("a.ckpt: holds no numbers", "holds no numbers", "a.ckpt")


def test_a_key_that_the_message_does_not_begin_with_is_not_shown():
    error = ArgumentError("this checkpoint holds no depth network: give a depth map", key="depth")
    assert str(error) == error.what == error.line({"depth": "--depth"})


def test_a_remedy_names_the_argument_in_python_and_the_option_on_the_command_line():
    error = OutputError("exists already", path="a.png", remedy="choose another name or {overwrite=True}")
    assert str(error) == "a.png: exists already; choose another name or overwrite=True"
    assert error.line(SPELLED) == "a.png: exists already; choose another name or --overwrite"
    assert error.line({}) == str(error)


def test_a_long_message_keeps_its_remedy():
    error = FileError(f"has no {'x' * 300}; use a complete checkpoint", path="/".join(["folder"] * 40))
    assert len(str(error)) == LIMIT
    assert str(error).startswith("...")
    assert str(error).endswith("x...; use a complete checkpoint")
    assert len(str(ArgumentError("x" * 300))) == LIMIT
    assert str(ArgumentError("a" * 300 + "; " + "b" * 300)).endswith("...")
