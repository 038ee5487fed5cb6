"""Files of the C++ writer read by an independent parser of the format, and the other way round."""

import json
import os
import random
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def tool() -> Path:
    given = os.environ.get("KALMANET_SAFETENSORS_TOOL")
    found = sorted(
        ROOT.glob("build/*/tests/models/safetensors_tool"), key=lambda p: p.stat().st_mtime
    )
    if not given and not found:
        pytest.fail("no safetensors_tool; build the target safetensors_tool first (make build)")
    return Path(given) if given else found[-1]


def read(path: Path) -> tuple[dict, dict]:
    """The format's description in a dozen lines: (metadata, {name: (dtype, shape, bytes)})."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length].decode("utf-8"))
    assert raw[8:9] == b"{" and length % 8 == 0
    metadata = header.pop("__metadata__", {})
    data = raw[8 + length :]
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        assert set(entry) == {"dtype", "shape", "data_offsets"}
        begin, stop = entry["data_offsets"]
        count = int(np.prod(entry["shape"], dtype=np.int64))
        assert begin == end and stop - begin == count * SIZES[entry["dtype"]], name
        assert begin % SIZES[entry["dtype"]] == 0, f"{name} is not aligned"
        tensors[name] = (entry["dtype"], entry["shape"], data[begin:stop])
        end = stop
    assert end == len(data)
    return metadata, tensors


def write(path: Path, tensors: dict, metadata: dict, padding: int) -> None:
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode() + b" " * padding
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_python_reads_what_cpp_writes(tool: Path, tmp_path: Path) -> None:
    path = tmp_path / "written.safetensors"
    subprocess.run([tool, "write", path], check=True)
    metadata, tensors = read(path)
    assert metadata == {"format": "pt", 'quoted "key"': "é\n"}
    shapes = [[], [5], [2, 3, 4], [0, 7]]
    assert len(tensors) == len(SIZES) * len(shapes)
    for number, (dtype, size) in enumerate(SIZES.items()):
        for i, shape in enumerate(shapes):
            count = int(np.prod(shape, dtype=np.int64)) * size
            content = bytes((number + b) % 256 for b in range(count))
            assert tensors[f"{dtype}.{i}"] == (dtype, shape, content)
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "something was left aside"


@pytest.mark.parametrize("seed", range(5))
def test_cpp_reads_what_python_writes(tool: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    tensors = {}
    for i in range(rng.randint(0, 20)):
        dtype = rng.choice(list(SIZES))
        shape = [rng.randint(0, 4) for _ in range(rng.randint(0, 4))]
        content = rng.randbytes(int(np.prod(shape, dtype=np.int64)) * SIZES[dtype])
        tensors[f"t{i}"] = (dtype, shape, content)
    path = tmp_path / "python.safetensors"
    # Any padding: the reader must not count on alignment.
    write(path, tensors, {"seed": str(seed)} if seed % 2 else {}, padding=rng.randint(0, 9))
    lines = subprocess.run([tool, "list", path], check=True, capture_output=True, text=True).stdout
    found = {}
    for line in lines.splitlines():
        entry = json.loads(line)
        found[entry["name"]] = (entry["dtype"], entry["shape"], bytes.fromhex(entry["data"]))
    assert found == tensors


def test_broken_files_are_refused(tool: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, {"a": ("F32", [2], bytes(8)), "b": ("U8", [3], bytes(3))}, {}, padding=0)
    good = path.read_bytes()
    for damaged in (good[:-1], good + b"\0", good.replace(b"[2]", b"[3]"), good[4:]):
        path.write_bytes(damaged)
        result = subprocess.run([tool, "list", path], capture_output=True, text=True)
        assert result.returncode == 1 and str(path) in result.stderr, result
