"""Metrics that survive a crash, the progress line, plots, the log; signals."""

import io
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
from moeconv_train import stopping
from moeconv_train.logs import metrics
from moeconv_train.logs.console import logged
from moeconv_train.logs.metrics import Metrics, train_line
from moeconv_train.logs.progress import Progress

from moeconv.errors import OutputError, TrainingError
from moeconv.maxtext.sidecar import MetricsLine


def scalars(loss=2.0, weights=10, **extra):
    return {
        "learning/lm_loss": loss,
        "learning/loss": loss + 0.01,
        "learning/total_weights": weights,
        "learning/moe_lb_loss": 0.01,
        "learning/raw_grad_norm": 1.5,
        "learning/current_learning_rate": 1e-3,
        **extra,
    }


def opened(directory, start):
    found = Metrics(directory, Progress(None, 99))
    found.begin(start)
    return found


def write(directory, start, steps):
    """What a run writes from one checkpoint on; no time is known."""
    file = opened(directory, start)
    for step in range(start, start + steps):
        file.train(scalars(loss=5 - step / 10), step, 2.0, late=True)
        if step % 4 == 3:
            file.evaluation({"eval/avg_loss": 4.0}, step)
    file.close()
    return file


def read(directory):
    text = (directory / "metrics.jsonl").read_text()
    return [MetricsLine.model_validate_json(line) for line in text.splitlines()]


def test_a_line_is_what_the_schema_says():
    extra = {"learning/loss_scale": 2.0**15, "learning/skipped_steps": 3.0}
    line = train_line(scalars(**extra), 6, 100, 0.5)
    assert (line.step, line.tokens, line.tokens_per_second) == (7, 110, 20)
    assert (line.loss, line.total_loss) == (2.0, 2.01)
    assert (line.loss_scale, line.skipped_steps) == (32768, 3)
    assert line.model_extra == {"load_balance_loss": 0.01, "grad_norm": 1.5}
    # A skipped step's gradient is not finite, which JSON cannot say.
    overflow = train_line(scalars(**{"learning/raw_grad_norm": float("inf")}), 0, 0, None)
    assert "grad_norm" not in overflow.model_extra and overflow.seconds is None


def test_a_resumed_run_has_each_step_once(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for directory in (whole, parts):
        directory.mkdir()
    write(whole, 0, 12)
    write(parts, 0, 9)
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 10, "lo')  # killed in the middle of a line
    write(parts, 5, 7)
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    steps = [line.step for line in read(parts) if line.kind == "train"]
    assert steps == list(range(1, 13))
    assert [line.step for line in read(parts) if line.kind == "eval"] == [4, 8, 12]


def test_the_tokens_go_on_counting(tmp_path):
    write(tmp_path, 0, 4)
    assert opened(tmp_path, 4).tokens == 40
    assert opened(tmp_path, 2).tokens == 20
    assert opened(tmp_path, 0).tokens == 0
    assert read(tmp_path) == []


@pytest.mark.parametrize(
    "damage", [b"{", b"\xff\xfe", b"[" * 10_000, b"null", b'{"kind": "train", "step": NaN}']
)
def test_a_damaged_line_costs_itself_only(tmp_path, damage):
    """Everything behind one was erased once, without a copy."""
    write(tmp_path, 0, 12)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    before = b"\n".join([*lines[:2], damage, *lines[3:]]) + b"\n"
    path.write_bytes(before)
    opened(tmp_path, 12).close()
    assert path.read_bytes().splitlines() == [*lines[:2], *lines[3:]]
    assert (tmp_path / "metrics.jsonl.1").read_bytes() == before
    opened(tmp_path, 12).close()
    assert not (tmp_path / "metrics.jsonl.2").exists()


def test_what_a_resume_leaves_out_is_kept_each_time(tmp_path):
    write(tmp_path, 0, 12)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    write(tmp_path, 8, 2)
    second = (tmp_path / "metrics.jsonl").read_bytes()
    write(tmp_path, 4, 1)
    assert (tmp_path / "metrics.jsonl.1").read_bytes() == whole
    assert (tmp_path / "metrics.jsonl.2").read_bytes() == second


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_metrics_that_are_no_file_are_refused(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(OutputError, match=r"metrics\.jsonl: .*; move it away"):
        opened(tmp_path, 0)


def test_a_loss_that_is_no_number_is_no_line(tmp_path):
    file = write(tmp_path, 0, 1)
    before = file.path.read_text()
    file = opened(tmp_path, 1)
    file.train(scalars(loss=float("nan")), 1, 0.0)
    file.close()
    assert file.path.read_text() == before and before.count("\n") == 1
    # It was trained on, and the loss to tell at the end is that of the step before.
    assert (file.completed, file.tokens, file.loss) == (2, 20, None)


def test_a_run_that_only_skips_is_ended(tmp_path):
    file = Metrics(tmp_path, Progress(None, 99), patience=3)
    file.begin(0)

    def step(number, overflow, loss=1.0):
        extra = {"learning/overflow": overflow, "learning/loss_scale": 1.0}
        file.train(scalars(loss=loss, **extra), number, 0.0)

    for number, overflow in enumerate((1, 1, 0, 1, 1)):
        step(number, overflow)
    with pytest.raises(TrainingError, match=r"of 3 steps in a row were not finite.* run_name"):
        step(5, 1, loss=float("nan"))
    assert len(read(tmp_path)) == 5


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run_steps(progress, clock, steps, seconds=2.0, save_at=None):
    """A save waits for its step, so that the one before is logged late."""
    for step in range(1, steps + 1):
        clock.now += seconds + (30.0 if step == save_at else 0.0)
        taken = progress.lap(late=step == save_at)
        line = MetricsLine(
            kind="train", step=step, loss=3.0, seconds=taken, loss_scale=2.0**15, skipped_steps=2
        )
        progress.step(line, 1000)


def test_the_rate_is_of_the_steps_whose_time_is_known():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(stream, 100, peak=1000.0, clock=clock)
    run_steps(progress, clock, 20, save_at=7)
    last = stream.getvalue().splitlines()[-1]
    assert "of 100 (" in last and "loss 3.0000" in last and "scale 32768 (2 skipped)" in last
    assert "500 tokens/s" in last and "MFU 50.0%" in last
    # A line every ten seconds, the first at once.
    assert len(stream.getvalue().splitlines()) <= 2 + (clock.now - 100) / 10


class Logger:
    """MaxText's MetricLogger, as far as its order of events goes."""

    def __init__(self):
        self.start_step, self.buffered_metrics, self._pending_eval_step_count = 0, [], 0
        self._eval_loop_start = None

    def write_metrics(self, metrics, step, metric_type="train"):
        self.written = [*getattr(self, "written", []), metric_type]

    def buffer_and_write_metrics(self, metrics, step, step_time_delta=None, is_training=True):
        for entry in self.buffered_metrics:
            self.write_metrics(*entry)
        self.buffered_metrics = []
        if not is_training:
            self._pending_eval_step_count += 1
            return
        self.buffered_metrics.append((metrics, step))
        if self._pending_eval_step_count:
            self.write_metrics(*self.buffered_metrics.pop())
            self._pending_eval_step_count = 0

    def flush(self):
        for entry in self.buffered_metrics:
            self.write_metrics(*entry)


class Result(float):
    def __new__(cls, there):
        made = super().__new__(cls, 2.0)
        made.there = there
        return made

    def is_ready(self):
        return self.there


def test_a_step_is_late_around_saves_and_evaluations_and_at_the_end(monkeypatch):
    found = {}

    class Recorder:
        def begin(self, start_step):
            pass

        def train(self, scalars, step, paused, late=False):
            found[step] = late

    def found_in_step(there=False):
        return {"scalar": {"learning/lm_loss": Result(there)}}

    name = "maxtext.common.metric_logger"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(MetricLogger=Logger))
    stock = Logger.buffer_and_write_metrics
    with metrics.install(Recorder()):
        maxtexts = Logger()
        for step in range(7):
            if step == 4:  # evaluated
                maxtexts.buffer_and_write_metrics({"scalar": {}}, 0, is_training=False)
            maxtexts.buffer_and_write_metrics(found_in_step(there=step == 2), step)  # 2 was saved
        maxtexts.flush()
        # One line for each batch of an evaluation would fill the log.
        maxtexts.write_metrics({"scalar": {}}, 0, "running_eval")
    assert set(maxtexts.written) == {"train"}
    assert found == {0: False, 1: True, 2: False, 3: True, 4: True, 5: False, 6: True}
    assert Logger.buffer_and_write_metrics is stock


def test_a_time_that_is_not_known_is_left_out():
    clock = Clock()
    progress = Progress(io.StringIO(), 10, clock=clock)
    taken = []
    for late in (False, False, True, False, False):
        clock.now += 2
        taken.append(progress.lap(late))
    assert taken == [None, 2, None, None, 2]


def test_without_a_known_peak_there_is_no_mfu():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(stream, 10, clock=clock)
    run_steps(progress, clock, 10)
    assert "tokens/s" in stream.getvalue() and "MFU" not in stream.getvalue()
    assert "step 10 of 10 (100.0%)" in stream.getvalue()  # the last step is always shown


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(15, "30.0 s"), (45, "0:01:30"), (30_600, "17:00:00"), (46_800, "1 day, 2:00:00")],
)
def test_the_time_left_is_for_people(seconds, said):
    clock, stream = Clock(), io.StringIO()
    run_steps(Progress(stream, 4, clock=clock), clock, 2, seconds=seconds)
    assert stream.getvalue().splitlines()[-1].endswith(f"  {said} left")


def test_what_anything_says_is_in_the_log(tmp_path, capfd):
    import logging
    import subprocess

    path = tmp_path / "training.log"
    with logged(path) as user:
        print("printed")
        os.write(2, b"by compiled code\n")
        subprocess.run(["sh", "-c", "echo by a child"], check=True)
        logging.getLogger("some.library").info("logged")
        user.write("for the user\n")
    print("after")
    text = path.read_text()
    for said in ("printed", "by compiled code", "by a child", "I some.library: logged"):
        assert said in text
    out, err = capfd.readouterr()
    assert (out, err) == ("after\n", "for the user\n")
    assert "for the user" not in text


def test_the_first_signal_waits_for_the_step_and_the_second_does_not():
    notes = []
    stopper = stopping.Stopper(None, notes.append)
    with stopper.handling():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)  # nothing to save yet
        stopper = stopping.Stopper(None, notes.append)
        with stopper.handling():
            stopper.stepping = True
            os.kill(os.getpid(), signal.SIGINT)
            assert stopper.due() == "interrupted" and "SIGINT: saving a checkpoint" in notes[-1]
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_in_the_middle_of_a_write_writes_nothing():
    stopper = stopping.Stopper(None, lambda _: pytest.fail("written by the handler"))
    stopper.stepping = True
    stopper.signalled(signal.SIGINT)


def test_nobody_has_to_read_the_progress():
    """A real pipe whose reader is gone: what is left of it fails neither now nor at the end."""
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        progress = Progress(stream, 10)
        progress.note("heard")
        os.close(reader)
        progress.note("not heard")
        assert progress.stream is None
        progress.note("nor this")
        progress.step(train_line(scalars(), 0, 0, 0.5), 10)
        progress.step(train_line(scalars(), 9, 0, 0.5), 10)
    closed = Progress(io.StringIO(), 10)
    closed.stream.close()
    closed.step(train_line(scalars(), 0, 0, 0.5), 10)
    assert closed.stream is None


def test_the_time_limit_counts_from_the_beginning():
    now = time.monotonic()
    assert stopping.Stopper(60, print, begun=now).due() is None
    assert stopping.Stopper(60, print, begun=now - 60).due() == "time limit"
    assert stopping.Stopper(60, print).due() is None
    assert stopping.Stopper(None, print, begun=0.0).due() is None
