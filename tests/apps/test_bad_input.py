"""Bad input: each case ends with its exit code and a message that says what to do, not a crash."""

import json
import os
import shutil
import struct

import pytest

FAILED, USAGE = 1, 2


@pytest.fixture(scope="module")
def world(run, text, tmp_path_factory):
    """Names for the cases below: good things, and broken copies of them."""
    folder = tmp_path_factory.mktemp("world")
    places = {"run": run, "text": text, "new": folder / "new", "missing": folder / "missing"}

    def broken(name, change):
        path = folder / name
        shutil.copytree((run / "latest").resolve(), path)
        change(path)
        places[name] = path

    def header(path, length, content=b""):
        (path / "model.safetensors").write_bytes(struct.pack("<Q", length) + content)

    def tensors(path, entries):
        content = json.dumps(entries).encode()
        header(path, len(content), content + b"\0" * 64)

    def config(**changes):
        def change(path):
            read = json.loads((path / "config.json").read_text())
            for key, value in changes.items():
                target = read["gka_config"] if key.startswith("gka_") else read
                target[key.removeprefix("gka_")] = value
            (path / "config.json").write_text(json.dumps(read))

        return change

    broken("truncated", lambda p: os.truncate(p / "model.safetensors", 5000))
    broken("empty_weights", lambda p: (p / "model.safetensors").write_bytes(b""))
    broken("no_weights", lambda p: (p / "model.safetensors").unlink())
    broken("huge_header", lambda p: header(p, 2**63))
    broken("long_header", lambda p: header(p, 10**6, b'{"a":'))
    broken("not_json", lambda p: header(p, 10, b"{not json}"))
    broken(
        "overlap",
        lambda p: tensors(
            p,
            {
                "a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]},
                "b": {"dtype": "F32", "shape": [8], "data_offsets": [16, 48]},
            },
        ),
    )
    broken(
        "huge_offset",
        lambda p: tensors(p, {"a": {"dtype": "F32", "shape": [2**61], "data_offsets": [0, 2**63]}}),
    )
    broken(
        "negative_shape",
        lambda p: tensors(p, {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
    )
    broken("broken_config", lambda p: (p / "config.json").write_text('{"vocab_size": '))
    broken("other_width", config(hidden_size=32))
    broken("unknown_layer", config(hybrid_override_pattern="GKA-GDN"))
    broken("negative_iter", config(gka_num_iter=-3))
    broken("text_for_number", config(num_hidden_layers="two"))

    places["empty"] = folder / "empty.txt"
    places["empty"].write_bytes(b"")
    places["binary"] = folder / "binary.bin"
    places["binary"].write_bytes(b"\x7fELF\0\0\0")
    places["short"] = folder / "short.txt"
    places["short"].write_text("short")
    places["hollow"] = folder / "hollow"
    places["hollow"].mkdir()
    places["file"] = folder / "file"
    places["file"].write_text("a file")
    return places


TRAIN = "train --text {text} --out {new}"
GENERATE = "generate --model {run} --prompt x"
EVAL = "eval --model {run}"

CASES = [
    # command line
    ("frobnicate", USAGE, "frobnicate"),
    ("train --text {text}", USAGE, "--out"),
    ("train --out {new}", USAGE, "--text is required"),
    (TRAIN + " --colour", USAGE, "--colour"),
    (TRAIN + " --steps many", USAGE, "--steps"),
    (TRAIN + " --preset huge", USAGE, "--preset"),
    (TRAIN + " --mixer softmax", USAGE, "--mixer"),
    (TRAIN + " --mixer gka --pattern GKA-*", USAGE, "exclude each other"),
    (TRAIN + " --pattern GKA-* --layers 3", USAGE, "--layers says 3"),
    (TRAIN + " --config {run}/latest/config.json --width 8", USAGE, "exclude each other"),
    (TRAIN + " --width 10 --heads 4", USAGE, "not a multiple"),
    (TRAIN + " --solver qr", USAGE, "--solver"),
    (TRAIN + " --learned-ridge --ridge 0.1", USAGE, "--ridge has no effect"),
    (TRAIN + " --learned-ridge --num-iter 9", USAGE, "--num-iter has no effect"),
    (TRAIN + " --learned-ridge --mixer linear", USAGE, "exclude each other"),
    (TRAIN + " --config {run}/latest/config.json --solver direct", USAGE, "exclude each other"),
    ("generate --model {run} --prompt x --prompt-file y", USAGE, "--prompt"),
    ("generate --prompt x", USAGE, "--model"),
    (EVAL + " --text {text} --window 0", USAGE, "--window"),
    ("info", USAGE, "path"),
    ("experiment", USAGE, "subcommand"),
    ("experiment recall --variants gka,softmax", USAGE, "softmax"),
    # training
    (TRAIN + " --steps 0", FAILED, "steps"),
    (TRAIN + " --lr -1", FAILED, "lr"),
    (TRAIN + " --lr nan", FAILED, "lr"),
    (TRAIN + " --batch -2", FAILED, "batch"),
    (TRAIN + " --dtype float8", FAILED, "dtype"),
    (TRAIN + " --device gpu", FAILED, "allowed are cpu, cuda and cuda:N"),
    (TRAIN + " --device cuda:99", FAILED, "cuda:99"),  # in any build, on any machine
    (GENERATE + " --device cuda:99", FAILED, "cuda:99"),
    (EVAL + " --text {text} --device cuda:99", FAILED, "cuda:99"),
    (TRAIN + " --schedule linear", FAILED, "schedule"),
    (TRAIN + " --held-out 1", FAILED, "held_out"),
    (TRAIN + " --num-iter -1", FAILED, "num_iter"),
    (TRAIN + " --ridge 0", FAILED, "ridge"),
    (TRAIN + " --pattern GKA-GDN", FAILED, "GDN"),
    (TRAIN + " --context 100000", FAILED, "too short"),
    (TRAIN + " --mixer attention --max-positions 8", FAILED, "max_position_embeddings"),
    (TRAIN + " --config {missing}", FAILED, "missing"),
    ("train --text {missing} --out {new}", FAILED, "no such file or folder"),
    ("train --text {empty} --out {new}", FAILED, "is empty"),
    ("train --text {binary} --out {new}", FAILED, "looks binary"),
    ("train --text {short} --out {new}", FAILED, "too short"),
    ("train --text {hollow} --out {new}", FAILED, "holds no text file"),
    ("train --text {text} --out {file}/run", FAILED, "cannot create the folder"),
    ("train --text {text} --out /proc/kalmanet", FAILED, "cannot create the folder"),
    ("train --text {text} --out {run}", FAILED, "already holds a run"),
    ("train --out {missing} --resume", FAILED, "no run to resume"),
    ("train --out {hollow} --resume", FAILED, "no checkpoint"),
    ("train --out {run} --resume --lr 0.5", FAILED, "differing: lr"),
    # models
    ("generate --model {missing} --prompt x", FAILED, "no such folder"),
    ("generate --model {hollow} --prompt x", FAILED, "no config.json"),
    ("generate --model {truncated} --prompt x", FAILED, "model.safetensors"),
    ("generate --model {empty_weights} --prompt x", FAILED, "model.safetensors"),
    ("generate --model {no_weights} --prompt x", FAILED, "model.safetensors"),
    ("generate --model {huge_header} --prompt x", FAILED, "header"),
    ("generate --model {long_header} --prompt x", FAILED, "cut short"),
    ("info {not_json}", FAILED, "model.safetensors"),
    ("info {overlap}", FAILED, "model.safetensors"),
    ("info {huge_offset}/model.safetensors", FAILED, "model.safetensors"),
    ("info {negative_shape}/model.safetensors", FAILED, "shape"),
    ("info {broken_config}", FAILED, "config.json"),
    ("info {other_width}", FAILED, "contradicts"),
    ("generate --model {other_width} --prompt x", FAILED, "embed_tokens"),
    ("generate --model {unknown_layer} --prompt x", FAILED, "GDN"),
    ("info {negative_iter}", FAILED, "num_iter"),
    ("info {text_for_number}", FAILED, "num_hidden_layers"),
    ("info {missing}", FAILED, "no such file"),
    ("info {text}", FAILED, "text.txt"),
    # generation and evaluation
    (GENERATE + " --temperature -1", FAILED, "temperature"),
    (GENERATE + " --top-p 0", FAILED, "top_p"),
    (GENERATE + " --top-k -5", FAILED, "top_k"),
    (GENERATE + " --max-new-tokens -1", FAILED, "max_new_tokens"),
    ("generate --model {run} --prompt-file {missing}", FAILED, "missing"),
    (EVAL + " --text {missing}", FAILED, "missing"),
    (EVAL + " --text {empty}", FAILED, "at least 2"),
    ("experiment recall --pairs 900", FAILED, "pairs"),
    ("experiment recall --out {file}", FAILED, "cannot create the folder"),
]


@pytest.mark.parametrize("line, code, words", CASES, ids=[case[0] for case in CASES])
def test_bad_input(kalmanet, world, line, code, words):
    arguments = [word.format(**world) for word in line.split(" ")]
    done = kalmanet(*arguments, code=code, cwd=world["hollow"].parent)
    errors = done.stderr.splitlines()
    said = [e for e in errors if e.startswith("error: ")]
    assert len(said) == 1, done.stderr
    assert words in done.stderr[done.stderr.index("error: ") :], done.stderr
    if code == USAGE:
        assert "--help" in said[0]
    # Nothing that only a developer reads.
    assert "Exception raised from" not in done.stderr and ".cpp" not in done.stderr
    assert not (world["new"] / "checkpoints").exists()


def test_there_are_enough_cases():
    assert len(CASES) >= 25


def test_generation_past_the_positions_of_attention_layers(kalmanet, text, tmp_path):
    out = tmp_path / "run"
    kalmanet.train(text, out, "--steps", 2, "--mixer", "attention", "--max-positions", 40)
    done = kalmanet("generate", "--model", out, "--prompt", "abc", "--max-new-tokens", 100, code=1)
    assert "error: " in done.stderr and "max_position_embeddings" in done.stderr
    # Evaluation starts afresh instead.
    shown = json.loads(
        kalmanet(
            "eval", "--model", out, "--text", text, "--max-bytes", 200, "--json", "--window", 20
        ).stdout
    )
    assert shown["state_resets"] == 4


def test_output_that_cannot_be_written(kalmanet, run):
    with open("/dev/full", "w") as full:
        import subprocess

        done = subprocess.run(
            [kalmanet.path, "generate", "--model", run, "--prompt", "x", "--max-new-tokens", "5"],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert "error: cannot write to standard output" in done.stderr
