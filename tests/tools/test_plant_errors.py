"""The errors that plant_errors plants still have their place, and it tells red from green."""

import subprocess

import pytest


@pytest.fixture
def planter(load_tool):
    return load_tool("plant_errors")


def test_every_error_has_its_place(planter):
    for error in planter.ERRORS:
        planter.where(error)
        assert error.right != error.wrong
    names = [error.name for error in planter.ERRORS]
    assert len(names) == len(set(names)) >= 16


def test_an_error_without_a_place_is_named(planter):
    with pytest.raises(SystemExit, match="a name: src/cpu/chunk.hpp holds these lines 0 times"):
        planter.where(planter.Planted("a name", "src/cpu/chunk.hpp", "never there", ""))


@pytest.mark.parametrize("noticed", [True, False])
def test_an_error_that_no_test_notices_fails(planter, monkeypatch, tmp_path, capsys, noticed):
    """With builds that are not made: green with nothing planted, then as told."""
    answers = iter([("", ""), ("A.Test", "said so"), ("A.Test", "so") if noticed else ("", "")])
    monkeypatch.setattr(planter, "prepare", lambda: None)
    monkeypatch.setattr(planter, "build_and_test", lambda program: next(answers))
    monkeypatch.setattr(planter, "COPY", tmp_path)
    (tmp_path / "f").write_text("int a = 1;\nint b = 2;\n")
    monkeypatch.setattr(planter, "ROOT", tmp_path)
    errors = [planter.Planted(n, "f", f"{n} = {v}", f"{n} = 0") for n, v in (("a", 1), ("b", 2))]
    monkeypatch.setattr(planter, "ERRORS", errors)
    monkeypatch.setattr(planter.sys, "argv", ["plant_errors"])
    assert planter.main() == (0 if noticed else 1)
    said = capsys.readouterr().out
    assert ("NO TEST" in said) != noticed
    assert f"{1 + noticed} of 2 planted errors" in said
    assert (tmp_path / "f").read_text() == "int a = 1;\nint b = 2;\n"


def test_the_first_failing_test_is_named(planter, monkeypatch):
    shown = "[  FAILED  ] Gka.A, where x\n  Actual: false (o: 2e-3)\n[  FAILED  ] Gka.B\n"
    results = iter([(0, ""), (1, shown)])

    def run(*command):
        code, out = next(results)
        return subprocess.CompletedProcess(command, code, out, "")

    monkeypatch.setattr(planter, "run", run)
    assert planter.build_and_test("cpu_gka_test") == ("Gka.A", "false (o: 2e-3)")
