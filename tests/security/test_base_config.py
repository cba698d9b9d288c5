"""A `base_config` names a file beside the config: whoever wrote the config may be a stranger."""

import pytest

from moeconv.arch.config_sources import load_config_file
from moeconv.errors import ConfigError


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "run" / "below").mkdir(parents=True)
    (tmp_path / "secret.yml").write_text("vocab_size: 7\n")
    return tmp_path / "secret.yml"


@pytest.mark.parametrize("name", ["../secret.yml", "below/../../secret.yml", "absolute"])
@pytest.mark.parametrize("nested", [False, True])
def test_it_leads_not_out(secret, name, nested):
    run = secret.parent / "run"
    name = str(secret) if name == "absolute" else name
    path = run / "run.yml"
    path.write_text(f"base_config: {'team.yml' if nested else name}\n")
    (run / "team.yml").write_text(f"base_config: {name}\n")
    with pytest.raises(ConfigError) as caught:
        load_config_file(path)
    for word in (str(run), "base_config", name[:50], "leads out", "copy"):
        assert word in str(caught.value)


def test_nor_does_a_link(secret):
    run = secret.parent / "run"
    (run / "team.yml").symlink_to(secret)
    (run / "run.yml").write_text("base_config: team.yml\n")
    with pytest.raises(ConfigError, match=r"base_config team.yml .*leads out of"):
        load_config_file(run / "run.yml")


def test_one_below_is_read_and_maxtexts_own_is_not_opened(secret):
    run = secret.parent / "run"
    (run / "below" / "team.yml").write_text("base_config: /maxtext/configs/base.yml\nsteps: 3\n")
    (run / "run.yml").write_text("base_config: below/team.yml\n")
    assert load_config_file(run / "run.yml")["steps"] == 3
