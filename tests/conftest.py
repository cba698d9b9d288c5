"""The test session's environment, set before anything imports jax, and its MaxText lab."""

import os
import signal

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

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def maxtext_lab(tmp_path_factory: pytest.TempPathFactory):
    """A `maxtext_lab.Lab`: real MaxText checkpoints, each written once a session."""
    import maxtext_lab

    return maxtext_lab.Lab(tmp_path_factory.mktemp("maxtext"))
