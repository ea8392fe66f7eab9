"""The C++ that is compiled at first use: kept, compiled anew when anything differs, and explained when it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.fast import compiler
from ldm.fast.compiler import CannotCompile
from tests.made.kernels import compiled_only

pytestmark = compiled_only


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and nothing remembered."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "_made", compiler._made.__wrapped__)
    return tmp_path / "cache"


def test_what_was_compiled_is_kept_and_not_compiled_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.compiled("cpu.cpp")
    (kept,) = cache.iterdir()
    assert kept.suffix == ".so"
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled again"))
    assert compiler.compiled("cpu.cpp").ldm_lanes() in (4, 8, 16)


def test_other_flags_are_another_library(cache: Path) -> None:
    assert [compiler.compiled("cpu.cpp", f"-DLANES={n}").ldm_lanes() for n in (4, 8)] == [4, 8]
    assert len([*cache.iterdir()]) == 2


def test_no_compiler_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(CannotCompile, match=r"^no C\+\+ compiler: g\+\+, c\+\+ not found, \$CXX not set$"):
        compiler.compiled("cpu.cpp")


def test_a_compiler_that_fails_is_quoted_in_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CannotCompile, match=r"^\S+ failed: .*error: .+$"):
        compiler.compiled("cpu.cpp", "-DLANES=nonsense+")
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(CannotCompile, match=r"^/nowhere/g"):
        compiler.compiled("cpu.cpp")


def test_a_cache_that_cannot_be_written_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file")
    with pytest.raises(CannotCompile, match=r"^no folder for what is compiled: .*cache.*; set LDM_CACHE to one$"):
        compiler.compiled("cpu.cpp")


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("home", RuntimeError("Could not determine home directory.")),
        ("exists", PermissionError(13, "Permission denied")),
    ],
)
def test_a_home_that_is_missing_or_closed_is_said(
    where: str, error: Exception, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.delenv("LDM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(compiler.Path, where, fail)
    with pytest.raises(CannotCompile, match=r"^no folder for what is compiled: .*; set LDM_CACHE to one$"):
        compiler.compiled("cpu.cpp")


def test_the_compiler_may_be_given_with_options(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ -DLANES=4")
    assert compiler.compiled("cpu.cpp").ldm_lanes() == 4


def test_what_failed_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    monkeypatch.setattr(
        compiler, "_compile", lambda *_: (tried.append(1), (_ for _ in ()).throw(CannotCompile("no")))[1]
    )
    for _ in range(2):
        with pytest.raises(CannotCompile, match=r"^no$"):
            compiler.compiled("cpu.cpp", "-DNEVER")
    assert tried == [1]


def test_a_library_that_does_not_load_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(command: list[str], kept: Path) -> None:
        kept.parent.mkdir()
        kept.write_bytes(b"not a library")

    monkeypatch.setattr(compiler, "_compile", damaged)
    with pytest.raises(CannotCompile, match="does not load, remove it"):
        compiler.compiled("cpu.cpp")
