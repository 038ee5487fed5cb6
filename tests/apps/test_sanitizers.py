"""In a sanitizer build: the command is built under them, and what they find fails a test."""

import os

import pytest
from command import REPORTED, Command, take_reports

sanitized = pytest.mark.skipif(
    "KALMANET_CANARY" not in os.environ, reason="no sanitizer build; its ctest runs this"
)


@pytest.fixture
def canary():
    command = Command()
    command.path = os.environ["KALMANET_CANARY"]
    return command


@sanitized
def test_the_command_is_a_sanitizer_build(kalmanet):
    assert "under AddressSanitizer" in kalmanet("version").stdout


@sanitized
@pytest.mark.parametrize(
    "error, words",
    [
        ("heap", "heap-buffer-overflow"),
        ("freed", "heap-use-after-free"),
        ("undefined", "runtime error: signed integer overflow"),
    ],
)
def test_an_error_ends_the_command_and_is_reported(canary, error, words):
    with pytest.raises(AssertionError) as failure:
        canary(error, code=1)
    reports = take_reports()  # left there, they fail the test (conftest.py)
    assert words in reports + str(failure.value)
    assert bool(reports) == (error != "undefined")
    assert f"exit code {REPORTED} instead of 1" in str(failure.value)


@sanitized
def test_without_errors_nothing_is_reported(canary):
    canary("none")
    assert take_reports() == ""


@pytest.mark.parametrize("said", ["a.cpp:1:2: runtime error: x", "==1==ERROR: AddressSanitizer: x"])
def test_a_report_that_did_not_end_the_command_is_seen_too(said):
    command = Command()
    command.path = "/bin/sh"
    with pytest.raises(AssertionError, match="a sanitizer says"):
        command("-c", f"echo '{said}' >&2; exit 1", code=1)
