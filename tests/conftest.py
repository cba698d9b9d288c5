"""The test session's environment, set before anything imports jax, and its MaxText lab."""

import gc
import hashlib
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

# A job in the background ignores Ctrl-C, and so would every process that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Four host devices, so that checkpoints can be sharded.
_FLAGS = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
if _FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What XLA has compiled on such a CPU is not compiled again; it is keyed by the program.
_CPU = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line[:5] == "flags"][:1]
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moeconv-tests"
_JAX_CACHE = _CACHE / f"jax-{hashlib.sha256(repr(_CPU).encode()).hexdigest()[:12]}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_JAX_CACHE))
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
if "PYTEST_XDIST_WORKER" in os.environ:
    # One core a process: threads of several that wait for each other by spinning cost minutes.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

pytest_plugins = ["proof_plugin"]

_MEMORY = Path("/dev/shm")


def pytest_configure(config: pytest.Config) -> None:
    """The default suite compiles much and computes little: XLA for CPU need not optimise.

    It also writes many small files, each of which is synced: in memory, where the system has room.
    """
    if config.option.markexpr != "not slow":
        return
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    room = os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > 2**33
    if room and "TMPDIR" not in os.environ:
        tempfile.tempdir = os.environ["TMPDIR"] = str(_MEMORY)


@pytest.fixture(scope="session")
def maxtext_lab(tmp_path_factory: pytest.TempPathFactory):
    """A `maxtext_lab.Lab`: real MaxText checkpoints, each written once a session."""
    import maxtext_lab

    return maxtext_lab.Lab(tmp_path_factory.mktemp("maxtext"))


# What takes most of a minute: MaxText's config, and with it jax, flax, torch and transformers.
_MAXTEXT = "maxtext.configs.pyconfig"
# The first test after which it was there.
_imported: list[str] = []


def _needs_maxtext(item: pytest.Item) -> bool:
    return "maxtext_lab" in item.fixturenames or item.get_closest_marker("maxtext") is not None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Tests of one file share a process, and so do all that need MaxText: it is imported once.

    But for proofs, which are each longer than that. Here, because xdist looks for groups before any
    `pytest_collection_modifyitems` of ours.
    """
    proof = item.get_closest_marker("proof")
    if proof:
        group = proof.args[0]
    else:
        group = "maxtext" if _needs_maxtext(item) else item.nodeid.split("::")[0]
    item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Groups that xdist does not see would be spread without a word."""
    if getattr(session.config.option, "loadgroup", False) and session.items:
        assert "@" in session.items[0].nodeid, "pytest-xdist does not group with this pytest"
    gc.freeze()


@pytest.fixture(autouse=True)
def _maxtext_only_where_it_is_said(request: pytest.FixtureRequest):
    """A test that imports MaxText by the way would import it in a second process."""
    yield
    if _MAXTEXT in sys.modules and not _imported:
        _imported.append(request.node.nodeid)
        gc.freeze()  # a collection would go through all of its classes, for half a second
        assert _needs_maxtext(request.node), "imports MaxText: mark it with pytest.mark.maxtext"
