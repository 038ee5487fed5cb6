"""check_kernels reads what ptxas says, and catches a kernel that grew."""

import pytest


@pytest.fixture(scope="module")
def kernels(load_tool):
    return load_tool("check_kernels")


LOG = """
ptxas info    : Compiling entry function 'void kalmanet::cuda::(anonymous namespace)::\
gka_tokens<float, 128>(kalmanet::cuda::GkaJob)' for 'sm_90a'
ptxas info    : Function properties for it
    24 bytes stack frame, 36 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size
ptxas info    : Compiling entry function 'kalmanet::cuda::(anonymous namespace)::\
sums(kalmanet::cuda::GkaJob, int (*)(int))' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""
NUMBERS = {("gka_tokens<float, 128>", "sm_90a"): (255, 36, 24), ("sums", "sm_80"): (32, 0, 0)}


def test_reads_registers_and_spills(kernels):
    assert kernels.resources(LOG) == NUMBERS


def test_the_record_is_read_as_it_was_written(kernels):
    assert kernels.read(kernels.write(NUMBERS, "13.0")) == (NUMBERS, "13.0")
    recorded, nvcc = kernels.read(kernels.RECORD.read_text())
    assert len(recorded) > 10 and nvcc
    assert all(0 < registers <= 255 for registers, _, _ in recorded.values())


def test_any_difference_is_named(kernels):
    assert list(kernels.differences(NUMBERS, dict(NUMBERS))) == []
    grown = NUMBERS | {("sums", "sm_80"): (33, 4, 0)}
    assert list(kernels.differences(NUMBERS, grown)) == [
        "sums for sm_80: registers 32 -> 33, spill stores 0 -> 4"
    ]
    more = NUMBERS | {("new", "sm_80"): (8, 0, 0)}
    assert list(kernels.differences(NUMBERS, more)) == [
        "new for sm_80: is not on record (8 registers, spills (0, 0))"
    ]
    assert list(kernels.differences(more, NUMBERS)) == [
        "new for sm_80: is on record and no longer there"
    ]
