"""What people see: folded tables, sizes, progress."""

import io
import subprocess
import sys

import cli_runner
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeconv.cli.output import Meter, Output
from moeconv.errors import UsageError
from moeconv.printing import fold
from moeconv.sizes import format_size, parse_size


def test_layers_and_experts_fold_into_ranges():
    names = [f"model.layers.{n}.mlp.experts.{e}.w1.weight" for n in (1, 3, 5) for e in range(8)]
    assert fold((n, "x") for n in names) == [
        ("model.layers.{1,3...5}.mlp.experts.{0...7}.w1.weight", "x", 24)
    ]


def test_what_differs_is_not_folded():
    assert fold([("layers.0.a", "f32"), ("layers.1.a", "bf16")]) == [
        ("layers.0.a", "f32", 1),
        ("layers.1.a", "bf16", 1),
    ]


def test_a_gap_is_shown():
    lines = fold([(f"layers.{n}.a", None) for n in (0, 1, 4)])
    assert lines == [("layers.{0,1,4}.a", None, 3)]


def test_a_range_is_not_a_product_that_does_not_exist():
    """Layers 0 and 1 with different experts must not fold to a rectangle."""
    lines = fold([("layers.0.e.0", None), ("layers.0.e.1", None), ("layers.1.e.5", None)])
    assert sum(count for _, _, count in lines) == 3
    assert all("{0,1}.e.{0,1,5}" not in text for text, _, _ in lines)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("4GiB", 4 * 2**30), ("512MiB", 512 * 2**20), ("1.5kb", 1500), ("7", 7)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 parsecs", "0", "1e9"])
def test_bad_sizes(text):
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


@given(st.integers(0, 10**16))
def test_sizes_are_short(count):
    assert len(format_size(count)) <= 9


def test_progress_without_a_terminal_is_plain_lines(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with Output().progress(1000, 2000) as meter:
        meter(1000, 2000)
    text = stream.getvalue()
    assert "read 1 kB of 1 kB, wrote 2 kB of 2 kB" in text
    assert "\x1b" not in text


def test_time_left_follows_the_rate(monkeypatch):
    lines = []
    meter = Meter(100, 100)
    meter.report = lines.append
    meter.begun -= 10
    meter(50, 0)
    meter.report_now()
    assert "s left" in lines[-1]
    left = float(lines[-1].rsplit(", ", 1)[1].split()[0])
    assert 25 < left < 35


def test_quiet_says_only_warnings(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    output = Output(quiet=True)
    output.note("on the way")
    output.warn("careful")
    with output.progress(1, 1) as meter:
        meter(1, 1)
    assert stream.getvalue() == "warning: careful\n"


def test_plots_are_drawn_in_a_notebook_s_shell():
    """Jupyter names a backend to every command, which is not in an environment of our own."""
    source = (
        "import sys\nfrom moeconv.cli.main import main\nsys.argv[1:] = ['--version']\n"
        "try:\n    main()\nexcept SystemExit:\n    import matplotlib\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", source],
        env=cli_runner.environment(MPLBACKEND="module://matplotlib_inline.backend_inline"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
