"""A run that is killed, interrupted or out of disk loses only the steps since its checkpoint."""

import resource
import signal

from command import TINY_MODEL, TINY_RUN, checkpoint_steps, metrics, wait_for_step

STEPS = 300


def arguments(text, out, steps=STEPS, checkpoint_every=10):
    fixed = ["train", "--text", text, "--out", out, *TINY_MODEL, *TINY_RUN]
    evaluation = ["--eval-every", 50, "--eval-tokens", 64, "--final-eval-tokens", 64]
    return [*fixed, "--steps", steps, "--checkpoint-every", checkpoint_every, *evaluation]


def weights(run):
    return (run / "latest" / "model.safetensors").read_bytes()


def test_three_kills_change_no_bit(kalmanet, text, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    kalmanet(*arguments(text, straight))
    reached = []
    for wanted in (20, 100, 180):
        more = ["--resume"] if reached else []
        process = kalmanet.start(*arguments(text, killed), *more)
        reached.append(wait_for_step(killed, wanted, process))
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL, f"finished before the kill at step {wanted}"
        process.communicate()
    done = kalmanet("train", "--out", killed, "--resume")
    assert "resuming at step" in done.stderr
    assert weights(killed) == weights(straight), f"weights differ after kills past {reached}"
    for name in ("model.safetensors", "optimizer.safetensors"):
        one = (killed / "latest" / name).read_bytes()
        assert one == (straight / "latest" / name).read_bytes(), name
    steps = [line["step"] for line in metrics(killed) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    losses = [[x["loss"] for x in metrics(r) if "loss" in x] for r in (straight, killed)]
    assert losses[0] == losses[1]


def test_an_interrupt_saves_and_says_how_to_go_on(kalmanet, text, tmp_path):
    for number in (signal.SIGINT, signal.SIGTERM):
        out = tmp_path / number.name
        process = kalmanet.start(*arguments(text, out, 1000000, 5))
        wait_for_step(out, 5, process)
        process.send_signal(number)
        shown, errors = process.communicate(timeout=60)
        assert process.returncode == 130, (shown, errors)
        assert "saved" in shown and "--resume" in shown
        last = checkpoint_steps(out)[-1]
        assert f"stopped at step {last} of 1000000" in shown
        assert metrics(out)[-1]["step"] <= last


def test_a_damaged_checkpoint_is_skipped(kalmanet, text, tmp_path):
    out = tmp_path / "run"
    kalmanet.train(text, out, "--steps", 6, "--checkpoint-every", 2, "--keep", 3)
    expected = weights(out)
    newest = out / "checkpoints" / "step-00000006" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    done = kalmanet("train", "--out", out, "--resume")
    assert "skipped a damaged checkpoint" in done.stderr and "resuming at step 4" in done.stderr
    assert weights(out) == expected


def test_no_room_is_an_error_before_training(kalmanet, text, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = kalmanet.train(text, tmp_path / "run", "--steps", 5, code=1, preexec_fn=limit)
    assert "error: cannot reserve" in done.stderr and "free some space" in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_disk_that_fills_up_stops_the_run_and_loses_nothing(kalmanet, text, tmp_path):
    straight, out = tmp_path / "straight", tmp_path / "run"
    kalmanet(*arguments(text, straight))
    process = kalmanet.start(*arguments(text, out))
    wait_for_step(out, 20, process)
    # From now on no file can grow past 1000 bytes: what a full disk does to the next checkpoint.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 1, (shown, errors)
    assert "error: cannot write" in errors
    assert not list((out / "checkpoints").glob("*.tmp"))
    kalmanet("train", "--out", out, "--resume")
    assert weights(out) == weights(straight)
