"""A Hub on loopback for each test, and outputs that are converted once a session."""

from collections.abc import Callable, Iterator
from pathlib import Path

import cli_runner
import hub_server
import huggingface_hub
import outputs
import pytest
from huggingface_hub.utils import close_session

from moeconv.hub.plot import draw_losses
from moeconv.maxtext.run_record import RunRecord


@pytest.fixture(scope="session", autouse=True)
def drawn_once() -> Iterator[None]:
    """The same losses are drawn once: that takes a third of the time of a push."""
    drawn: dict[str, bytes | None] = {}

    def draw(run: RunRecord | None) -> bytes | None:
        if repr(run) not in drawn:
            drawn[repr(run)] = draw_losses(run)
        return drawn[repr(run)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moeconv.hub.prepare.draw_losses", draw)
        yield


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    """The server; this process takes it for the Hub, with alice's token."""
    with hub_server.Hub(tmp_path / "hub") as made:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.url + template)
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
        monkeypatch.setenv("HF_TOKEN", hub_server.WRITE)
        yield made
        close_session()


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits in these tests; how long they would have is kept."""
    taken: list[float] = []
    monkeypatch.setattr("time.sleep", taken.append)
    return taken


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified output in two shards, of a run that tells of itself; not to be changed."""
    folder = tmp_path_factory.mktemp("push")
    out = outputs.convert_run(
        outputs.write_run(folder / "run"), folder / "out", max_shard_bytes=60_000
    )
    assert len(list(out.glob("*.safetensors"))) == 2
    outputs.attest(out, outputs.parity(1e-6))
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return outputs.copy(made, tmp_path / "out")


Push = Callable[..., cli_runner.Ran]


@pytest.fixture
def push(hub: hub_server.Hub, out: Path) -> Push:
    """`moeconv push OUT ARGS` as a user would."""
    return lambda *args: cli_runner.moeconv("push", out, *args)
