"""Files of a folder that somebody else filled: inside, regular, of a sane size."""

import os
import socket
from pathlib import Path

import pytest

from moeconv.untrusted import files
from moeconv.untrusted.files import UnsafeFileError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("key")
    folder = tmp_path / "run"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "real").write_text("fine")
    return folder


def test_a_file_and_a_link_that_stays_inside_are_read(folder: Path):
    (folder / "link").symlink_to("sub/real")
    (folder / "folder").symlink_to("sub")
    for name in ("sub/real", "link", "folder/real", "./sub/real"):
        assert files.read_inside(folder, name) == b"fine"


@pytest.mark.parametrize("name", ["../secret", "sub/../../secret", "/etc/passwd", "", "."])
def test_a_name_that_leads_out_is_refused(folder: Path, name: str):
    with pytest.raises(OSError) as caught:
        files.read_inside(folder, name)
    assert isinstance(caught.value, UnsafeFileError | IsADirectoryError)


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
@pytest.mark.parametrize("what", ["file", "folder", "chain"])
def test_a_link_that_leads_out_is_refused(folder: Path, what: str, relative: bool):
    outside = Path("..") if relative else folder.parent
    name = "link"
    if what == "folder":
        (folder / "link").symlink_to(outside)
        name = "link/secret"
    elif what == "chain":
        (folder / "sub" / "more").symlink_to(Path("..") / outside if relative else outside)
        (folder / "link").symlink_to("sub/more/secret")
    else:
        (folder / "link").symlink_to(outside / "secret")
    with pytest.raises(UnsafeFileError, match="leads out of"):
        files.read_inside(folder, name)
    with pytest.raises(UnsafeFileError, match="leads out of"):
        files.inside(folder, name)


def test_a_sibling_with_the_same_beginning_is_outside(folder: Path):
    (folder.parent / "run-other").mkdir()
    (folder.parent / "run-other" / "secret").write_text("key")
    (folder / "link").symlink_to("../run-other/secret")
    with pytest.raises(UnsafeFileError):
        files.read_inside(folder, "link")


def test_links_of_the_hubs_cache_stay_in_their_repository(tmp_path: Path):
    repo = tmp_path / "models--me--model"
    snapshot = repo / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "blobs" / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert files.read_inside(snapshot, "config.json") == b"{}"
    (tmp_path / "models--you--other").mkdir()
    (tmp_path / "models--you--other" / "secret").write_text("key")
    (snapshot / "link").symlink_to("../../../models--you--other/secret")
    with pytest.raises(UnsafeFileError):
        files.read_inside(snapshot, "link")


@pytest.mark.parametrize("at", ["private.pem", "refs/main", "snapshots/4567/x", "blobs-not/x"])
def test_a_snapshot_leads_only_to_itself_and_to_blobs(tmp_path: Path, at: str):
    repo = tmp_path / "models--me--model"
    below = repo / "snapshots" / "0123" / "below"
    below.mkdir(parents=True)
    (repo / at).parent.mkdir(parents=True, exist_ok=True)
    (repo / at).write_text("key")
    (below.parent / "config.json").write_text("{}")
    (below / "link").symlink_to(repo / at)
    (below / "fine").symlink_to("../config.json")
    assert files.read_inside(below, "fine") == b"{}"
    for folder, name in ((below, "link"), (below.parent, "below/link")):
        with pytest.raises(UnsafeFileError, match="leads out"):
            files.read_inside(folder, name)


def test_special_files_are_refused_at_once(folder: Path):
    os.mkfifo(folder / "fifo")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(folder / "socket"))
    for name in ("fifo", "socket"):
        with pytest.raises(OSError):
            files.open_inside(folder, name)
        with pytest.raises(OSError):
            files.open_regular(folder / name)
    with pytest.raises(UnsafeFileError, match="not a regular file"):
        files.open_regular(Path("/dev/zero"))
    server.close()


def test_a_file_over_the_limit_is_refused(folder: Path):
    with pytest.raises(UnsafeFileError, match="larger than"):
        files.read_inside(folder, "sub/real", limit=3)
    assert files.read_inside(folder, "sub/real", limit=4) == b"fine"


def test_loops_dangling_links_and_odd_names_are_os_errors(folder: Path):
    (folder / "loop").symlink_to("loop")
    (folder / "gone").symlink_to("nothing")
    with pytest.raises(FileNotFoundError):
        files.read_inside(folder, "gone")
    for name in ("loop", "a\0b", "half\ud800"):
        with pytest.raises(OSError):
            files.read_inside(folder, name)


def test_is_file(folder: Path):
    os.mkfifo(folder / "fifo")
    assert files.is_file(folder, "sub/real")
    assert not files.is_file(folder, "sub")
    assert not files.is_file(folder, "nothing/at/all")
    with pytest.raises(UnsafeFileError):
        files.is_file(folder, "fifo")


def test_where_no_link_is_followed(folder: Path):
    (folder / "link").symlink_to("sub/real")
    (folder / "folder").symlink_to("sub")
    for name in ("link", "folder/real"):
        with pytest.raises(UnsafeFileError, match="is a link; put the file itself there"):
            files.open_inside(folder, name, links=False)
        with pytest.raises(UnsafeFileError, match="is a link"):
            files.is_file(folder, name, links=False)
    assert files.read_inside(folder, "sub/real", links=False) == b"fine"
    (folder.parent / "mine").symlink_to(folder)
    assert files.read_inside(folder.parent / "mine", "sub/real", links=False) == b"fine"


def test_a_folder_that_a_library_may_read(folder: Path):
    (folder / "link").symlink_to("sub/real")
    (folder / "nowhere").symlink_to("none")
    files.demand_inside(folder)
    (folder / "out").symlink_to("../secret")
    with pytest.raises(UnsafeFileError, match="leads out of"):
        files.demand_inside(folder)
    (folder / "out").unlink()
    os.mkfifo(folder / "fifo")
    with pytest.raises(UnsafeFileError, match="FIFO"):
        files.demand_inside(folder)
