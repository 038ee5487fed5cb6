"""Each subcommand does its work on tiny settings."""

import json
import re

import pytest
from command import checkpoint_steps, metrics

SUBCOMMANDS = [
    ["train"],
    ["generate"],
    ["eval"],
    ["info"],
    ["experiment"],
    ["experiment", "recall"],
    ["experiment", "speed"],
    ["version"],
]


@pytest.mark.parametrize("words", SUBCOMMANDS, ids=" ".join)
def test_help_has_examples(kalmanet, words):
    text = kalmanet(*words, "--help").stdout
    assert "Example" in text
    assert "kalmanet " + " ".join(words) in text


def test_without_a_subcommand_it_says_what_there_is(kalmanet):
    text = kalmanet().stdout
    for words in SUBCOMMANDS:
        assert words[0] in text


def test_version(kalmanet):
    text = kalmanet("version").stdout
    assert re.search(r"^kalmanet \d+\.\d+\.\d+$", text, re.M)
    assert re.search(r"^instruction set +(baseline|avx2|avx512) ", text, re.M)
    assert re.search(r"^PyTorch +2\.", text, re.M)


def test_forced_instruction_set_is_the_one_that_runs(kalmanet):
    import os

    environment = dict(os.environ, KALMANET_ISA="baseline")
    text = kalmanet("version", env=environment).stdout
    assert re.search(r"^instruction set +baseline ", text, re.M)


def test_train_learns_and_reports(run):
    lines = metrics(run)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 30
    assert losses[0] == pytest.approx(5.55, abs=0.2)
    assert losses[-1] < 4.5
    valid = [line for line in lines if "valid_loss" in line]
    assert [line["step"] for line in valid] == [10, 20, 30]
    for line in valid:
        assert line["valid_bits_per_byte"] == pytest.approx(line["valid_loss"] / 0.693147, rel=1e-5)
    assert checkpoint_steps(run) == [30]
    names = {p.name for p in (run / "latest").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_progress_without_a_terminal_is_lines_without_escapes(kalmanet, text, tmp_path):
    done = kalmanet.train(text, tmp_path / "run", "--steps", 12)
    assert "\r" not in done.stderr and "\033" not in done.stderr
    assert re.search(r"^12/12  loss \d\.\d+  \S+ tokens/s  0:00 left$", done.stderr, re.M)
    assert len(done.stderr.splitlines()) < 12
    assert re.search(r"^validation loss \d\.\d+ nats, \d\.\d+ bits per byte", done.stdout, re.M)
    quiet = kalmanet.train(text, tmp_path / "quiet", "--steps", 2, "--quiet")
    assert quiet.stderr == ""


def test_progress_on_a_terminal_is_redrawn_in_place(kalmanet, text, tmp_path):
    import os
    import pty
    import subprocess

    def on_terminal(out, **more):
        environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
        environment.update({"TERM": "xterm"}, **more)
        leader, follower = pty.openpty()
        process = subprocess.Popen(
            [
                kalmanet.path,
                "train",
                "--text",
                text,
                "--out",
                out,
                "--steps",
                "10",
                "--width",
                "16",
                "--heads",
                "2",
                "--layers",
                "1",
                "--context",
                "16",
                "--threads",
                "1",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=follower,
            env=environment,
        )
        os.close(follower)
        shown = b""
        while True:
            try:
                block = os.read(leader, 65536)
            except OSError:
                break
            if not block:
                break
            shown += block
        os.close(leader)
        assert process.wait(60) == 0, shown
        return shown.decode()

    shown = on_terminal(tmp_path / "a")
    assert "\r\033[K[" in shown and "100% 10/10" in shown and "\033[1m" in shown
    assert "\033[1m" not in on_terminal(tmp_path / "b", NO_COLOR="1")


@pytest.mark.parametrize("mixer", ["attention", "linear"])
def test_other_mixers(kalmanet, text, tmp_path, mixer):
    kalmanet.train(text, tmp_path / "run", "--steps", 3, "--mixer", mixer)
    shown = json.loads(kalmanet("info", tmp_path / "run", "--json").stdout)
    expected = {"attention": "*-*", "linear": "GKA-GKA"}[mixer]
    assert shown["model"]["pattern"] == expected


def test_a_hybrid_with_learned_ridge_from_a_folder(kalmanet, text, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(text.read_text()[i * 3000 : i * 3000 + 3000])
    out = tmp_path / "run"
    done = kalmanet(
        "train",
        "--text",
        folder,
        "--out",
        out,
        "--pattern",
        "GKA-*-GKA",
        "--width",
        16,
        "--heads",
        2,
        "--learned-ridge",
        "--steps",
        3,
        "--batch",
        2,
        "--context",
        16,
        "--untied",
        "--dtype",
        "bf16",
        "--accumulate",
        2,
        "--gradient-checkpointing",
        "--sequential",
    )
    assert "packed 4 text files" in done.stderr
    shown = json.loads(kalmanet("info", out, "--json").stdout)
    assert shown["model"]["pattern"] == "GKA-*-GKA"
    assert shown["model"]["ridge_ratio"] == "learned"
    assert "lm_head.weight" in {t["name"] for t in shown["tensors"]}


def test_a_config_file_and_a_preset(kalmanet, text, run, tmp_path):
    out = tmp_path / "run"
    config = run / "latest" / "config.json"
    kalmanet(
        "train",
        "--text",
        text,
        "--out",
        out,
        "--config",
        config,
        "--preset",
        "shakespeare",
        "--steps",
        2,
        "--final-eval-tokens",
        100,
    )
    shown = json.loads(kalmanet("info", out, "--json").stdout)
    assert shown["model"]["hidden_size"] == 16
    options = json.loads((out / "latest" / "training.json").read_text())["options"]
    assert options["steps"] == 2 and options["batch"] == 12 and options["context"] == 64


LEARNED, FIXED = ("learned", "direct", "auto"), (0.02, "chebyshev", 30)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--preset shakespeare", LEARNED),
        ("--preset demo --minutes 0", LEARNED),
        ("--preset shakespeare --no-learned-ridge", FIXED),
        ("--preset shakespeare --ridge 0.1", (0.1, "chebyshev", 30)),
        ("--preset shakespeare --num-iter 9", (0.02, "chebyshev", 9)),
        ("--preset shakespeare --solver chebyshev", ("learned", "chebyshev", "auto")),
        ("--preset shakespeare --mixer linear", FIXED),
        ("--preset shakespeare --mixer attention", FIXED),
        ("--no-learned-ridge --solver direct", (0.02, "direct", 30)),
        ("--learned-ridge", LEARNED),
        ("", FIXED),
    ],
)
def test_presets_learn_the_ridge_ratio_and_flags_go_back(kalmanet, text, tmp_path, flags, expected):
    tiny = "--layers 1 --width 16 --heads 2 --steps 1 --batch 1 --context 16 --threads 1"
    tiny += " --final-eval-tokens 16 --held-out 0.2"
    kalmanet("train", "--text", text, "--out", tmp_path / "run", *tiny.split(), *flags.split())
    model = json.loads(kalmanet("info", tmp_path / "run", "--json").stdout)["model"]
    assert (model["ridge_ratio"], model["solver"], model["num_iter"]) == expected


def test_generate_is_the_same_for_the_same_seed(kalmanet, run):
    def text_of(*more):
        return kalmanet(
            "generate",
            "--model",
            run,
            "--prompt",
            "line 1",
            "--max-new-tokens",
            60,
            "--threads",
            1,
            *more,
        ).stdout

    first = text_of("--seed", 3)
    assert first.startswith("line 1") and len(first) > 40
    assert text_of("--seed", 3) == first
    assert text_of("--seed", 4) != first
    greedy = text_of("--temperature", 0)
    assert text_of("--temperature", 0, "--seed", 9) == greedy
    assert text_of("--top-k", 1, "--seed", 9) == greedy


def test_generate_takes_its_prompt_from_anywhere(kalmanet, run, tmp_path):
    common = ["generate", "--model", run, "--max-new-tokens", 20, "--seed", 1]
    expected = kalmanet(*common, "--prompt", "of a text").stdout
    (tmp_path / "prompt").write_text("of a text")
    assert kalmanet(*common, "--prompt-file", tmp_path / "prompt").stdout == expected
    assert kalmanet(*common, "--prompt-file", "-", stdin="of a text").stdout == expected
    assert kalmanet(*common, stdin="of a text").stdout == expected
    without = kalmanet(*common, "--prompt", "of a text", "--no-echo").stdout
    assert "of a text" + without == expected
    kalmanet(*common, "--prompt", "")


def test_generate_reports_speed_memory_and_state(kalmanet, run):
    done = kalmanet(
        "generate",
        "--model",
        run,
        "--prompt",
        "x",
        "--max-new-tokens",
        2100,
        "--stats",
        "--threads",
        1,
    )
    assert re.search(r"^\d+ tokens in [\d.]+ s \(\d+ tokens/s\)", done.stderr, re.M)
    if "end of text" not in done.stderr:
        assert re.search(r"memory after 1000 tokens [\d.]+ MiB, at the end", done.stderr)
        assert re.search(r"first thousand [\d.]+ tokens/s, last whole thousand", done.stderr)


def test_eval_does_not_depend_on_the_window(kalmanet, run, text):
    def score(window):
        out = kalmanet(
            "eval",
            "--model",
            run,
            "--text",
            text,
            "--window",
            window,
            "--max-bytes",
            4000,
            "--json",
        ).stdout
        return json.loads(out)

    small, large = score(33), score(4096)
    assert small["bytes"] == large["bytes"] == 3999
    assert small["bits_per_byte"] == pytest.approx(large["bits_per_byte"], rel=1e-5)
    assert 1 < large["bits_per_byte"] < 7
    assert large["state_resets"] == 0
    shown = kalmanet("eval", "--model", run, "--text", text, "--max-bytes", 500).stdout
    assert "bits per byte" in shown and "a word" in shown


def test_info_counts_parameters_and_memory(kalmanet, run):
    shown = json.loads(kalmanet("info", run, "--json").stdout)
    assert shown["parameters"] == shown["elements"] == sum(shown["dtypes"].values())
    memory = shown["sequence_memory"]
    assert [row["tokens"] for row in memory] == [1024, 32768, 131072]
    assert len({row["state_bytes"] for row in memory}) == 1
    # 2 layers of 2 heads: two 8 x 8 states each, and three convolution windows of 16 x 4.
    assert memory[0]["state_bytes"] == 2 * 4 * (2 * 2 * 64 + 3 * 16 * 4)
    # A cache: keys and values of 2 layers, 16 floats a token.
    assert memory[0]["kv_cache_bytes"] == 2 * 2 * 16 * 4 * 1024
    text = kalmanet("info", run).stdout
    assert "key-value cache" in text and "128.0" not in text.splitlines()[0]
    weights = run / "latest" / "model.safetensors"
    assert "model.norm.weight" in kalmanet("info", weights).stdout
    assert "model.norm.weight" in kalmanet("info", run, "--tensors").stdout


def test_experiment_recall(kalmanet, tmp_path):
    out = tmp_path / "recall"
    done = kalmanet(
        "experiment",
        "recall",
        "--out",
        out,
        "--steps",
        4,
        "--pairs",
        4,
        "--batch",
        4,
        "--vocab",
        64,
        "--width",
        16,
        "--eval-every",
        2,
    )
    data = json.loads((out / "recall.json").read_text())
    assert [run["variant"] for run in data["runs"]] == ["gka", "linear", "learned"]
    for run in data["runs"]:
        assert run["seconds"] > 0 and run["processor_seconds"] > 0
        assert [point["step"] for point in run["curve"]] == [2, 4]
        assert f"{run['accuracy']:.4f}" in done.stdout
    assert (out / "recall.png").exists() or "no picture" in done.stdout


def test_pictures_are_left_out_where_they_cannot_be_drawn(kalmanet, text, tmp_path):
    import os

    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    environment = dict(os.environ, KALMANET_PYTHON=str(broken))
    done = kalmanet.train(text, tmp_path / "run", "--steps", 2, "--plot", env=environment)
    assert "no loss curve" in done.stdout and "matplotlib" in done.stdout
    done = kalmanet.train(text, tmp_path / "with", "--steps", 2, "--plot")
    assert (tmp_path / "with" / "loss.png").exists() or "no loss curve" in done.stdout


def test_experiment_speed(kalmanet):
    out = kalmanet(
        "experiment",
        "speed",
        "--contexts",
        "16,32",
        "--rounds",
        1,
        "--seconds",
        0.01,
        "--tokens",
        32,
        "--json",
    ).stdout
    results = json.loads(out)["results"]
    assert [(r["model"], r["context"], r["batch"]) for r in results] == [
        ("gka", 16, 2),
        ("gka-fixed", 16, 2),
        ("attention", 16, 2),
        ("gka", 32, 1),
        ("gka-fixed", 32, 1),
        ("attention", 32, 1),
    ]
    assert all(r["tokens_per_second"] > 0 for r in results)
    assert all(r["tokens_per_processor_second"] > 0 for r in results)
