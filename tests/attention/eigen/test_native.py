"""Building the compiled operators of the CPU: what switches it off, what prevents it, when it happens anew."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from approx_attn.attention.eigen.kernels import native

needs_compiler = pytest.mark.skipif(
    native.load() is None,
    reason="no C++ compiler was found (or the kernel is switched off), so the compiled kernel was not tested.",
)


def test_the_compiled_kernel_can_be_switched_off(monkeypatch, caplog):
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.load.__wrapped__() is None
    assert not caplog.messages


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.setenv("CXX", "no-such-compiler"), "no compiler 'no-such-compiler' was found"),
        (
            lambda m: m.setenv("CXX", "false"),
            "the compiler ended with status 1",
        ),  # a program that does nothing but fail
        (lambda m: m.setattr(native.sys, "platform", "darwin"), "it is built on Linux only"),
        (lambda m: m.setenv("TORCH_EXTENSIONS_DIR", __file__), "Not a directory"),  # where nothing can be written
        (lambda m: m.setattr(native, "SOURCE", Path("gone/operators.cpp")), "No such file"),
    ],
    ids=["no_compiler", "failing_compiler", "other_system", "no_folder", "no_source"],
)
@needs_compiler
def test_what_keeps_the_compiled_kernel_from_being_built_is_told_in_one_sentence(
    change, reason, monkeypatch, tmp_path, caplog
):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    change(monkeypatch)
    assert native.load.__wrapped__() is None
    assert "was not built" in caplog.messages[-1]
    assert reason in caplog.messages[-1]
    assert "\n" not in caplog.messages[-1]


def test_a_change_of_a_header_makes_another_library(monkeypatch, tmp_path):
    copy = shutil.copytree(native.SOURCE.parent, tmp_path / "source")
    monkeypatch.setattr(native, "SOURCE", copy / native.SOURCE.name)
    before = native._place("g++")
    with (copy / "vectors.h").open("a") as header:
        header.write("\n")
    assert native._place("g++") != before


def test_the_first_error_of_a_compiler_is_what_is_told():
    stderr = "In file included from a.h\noperators.cpp:1: error: no such header\ncompilation terminated."
    error = subprocess.CalledProcessError(1, "g++", stderr=stderr)
    assert native._first_error(error) == "operators.cpp:1: error: no such header"
