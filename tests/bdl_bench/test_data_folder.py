"""Files that are there, downloaded whole, or missing with an error that says which."""

import gzip
import hashlib
import io
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bdl_bench.data.folder import MissingDataError, Source, data_folder, reading
from estimators.errors import DataError

FILES = ("set/a.bin", "set/b.bin")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BDL_BENCH_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """serve(name, content) -> an address on this machine, and the checksum of the content."""
    directory = tmp_path_factory.mktemp("served")

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=directory)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def serve(name, content):
            (directory / name).write_bytes(content)
            return f"http://127.0.0.1:{server.server_port}/{name}", f"md5:{hashlib.md5(content).hexdigest()}"

        yield serve
        server.shutdown()


def source(downloads, files=FILES):
    return Source("set", files, "https://example.org/set", downloads)


NOWHERE = {"http://127.0.0.1:9/archive.tar": None}
"""An address at which nothing is served."""


def tar_of(*names):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in names:
            content = f"new {name}".encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def test_the_folder_is_the_one_named_else_one_in_the_cache_of_the_user(monkeypatch):
    monkeypatch.setenv("BDL_BENCH_DATA", "~/sets")
    assert data_folder() == Path.home() / "sets"
    monkeypatch.delenv("BDL_BENCH_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert data_folder() == Path("/cache/bdl-bench")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_folder() == Path.home() / ".cache" / "bdl-bench"


def test_files_that_are_there_are_used_from_a_folder_that_is_not_written_to(folder):
    (folder / "set").mkdir(parents=True)
    for file in FILES:
        (folder / file).write_text("mine")
    before = sorted(folder.rglob("*"))
    assert source(NOWHERE).paths() == [folder / file for file in FILES]
    assert sorted(folder.rglob("*")) == before


def test_what_is_missing_is_downloaded_and_what_is_there_stays(folder, served):
    (folder / "set").mkdir(parents=True)
    (folder / "set/a.bin").write_text("mine")
    url, checksum = served("archive.tar.gz", tar_of(*FILES, "set/unwanted.bin"))
    paths = source({url: checksum}).paths()
    assert [path.read_text() for path in paths] == ["mine", "new set/b.bin"]
    assert sorted(path.name for path in folder.rglob("*")) == [".set.lock", "a.bin", "b.bin", "set"]


def test_compressed_and_plain_files_are_put_where_they_belong(folder, served):
    compressed = dict(served(f"{name}.gz", gzip.compress(name.encode())) for name in ("a.bin", "b.bin"))
    assert [path.read_text() for path in source(compressed).paths()] == ["a.bin", "b.bin"]
    plain = dict([served("data.csv", b"1,2")])
    (path,) = source(plain, ["tables/c.csv"]).paths()
    assert (path, path.read_text()) == (folder / "tables/c.csv", "1,2")


@pytest.mark.parametrize("fault", ["incomplete", "checksum", "unreadable", "no server", "no such file"])
def test_a_download_that_fails_leaves_no_part_and_names_what_is_missing(folder, served, fault):
    whole = tar_of(*FILES)
    content = {"incomplete": tar_of(FILES[0]), "checksum": whole, "unreadable": whole[:20]}.get(fault, b"")
    url, checksum = served(f"{fault.replace(' ', '-')}.tar.gz", content)
    downloads = {
        "checksum": {url: "md5:" + 32 * "0"},
        "no server": NOWHERE,
        "no such file": {f"{url}/absent.tar": None},
    }.get(fault, {url: checksum})
    with pytest.raises(MissingDataError, match=r"set/b\.bin.*https://example\.org/set.*BDL_BENCH_DATA"):
        source(downloads).paths()
    assert [p for p in folder.rglob("*") if p.name != ".set.lock"] == []


def test_a_folder_that_cannot_be_made_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BDL_BENCH_DATA", str(tmp_path / "file" / "data"))
    with pytest.raises(MissingDataError, match=r"NotADirectoryError|FileExistsError"):
        source(NOWHERE).paths()


def test_an_error_while_a_file_is_read_names_it_and_what_was_expected():
    with (
        pytest.raises(DataError, match=r"numbers at table\.csv.*KeyError: 'x'.*downloaded again"),
        reading(Path("table.csv"), "numbers"),
    ):
        {}["x"]
