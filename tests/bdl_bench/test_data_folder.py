"""Files that are there, downloaded whole, or missing with an error that says which."""

from pathlib import Path

import pytest

from bdl_bench.data.folder import MissingDataError, Source, data_folder
from bdl_bench.data.packages import torchvision_datasets
from estimators.errors import UnsupportedError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BDL_BENCH_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def source(download, files=("set/a.bin", "set/b.bin")):
    return Source("set", files, "https://example.org/set", download)


def never(into):  # noqa: ARG001
    raise AssertionError("nothing is to be downloaded")


def writes(*names):
    def download(into):
        for name in names:
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            (into / name).write_text(f"new {name}")

    return download


def test_the_folder_is_the_one_named_else_one_in_the_cache_of_the_user(monkeypatch):
    monkeypatch.setenv("BDL_BENCH_DATA", "~/sets")
    assert data_folder() == Path.home() / "sets"
    monkeypatch.delenv("BDL_BENCH_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert data_folder() == Path("/cache/bdl-bench")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_folder() == Path.home() / ".cache" / "bdl-bench"


def test_files_that_are_there_are_used_from_a_folder_that_is_not_written_to(folder):
    writes("set/a.bin", "set/b.bin")(folder)
    before = sorted(folder.rglob("*"))
    assert source(never).paths() == [folder / "set/a.bin", folder / "set/b.bin"]
    assert sorted(folder.rglob("*")) == before


def test_what_is_missing_is_downloaded_and_what_is_there_stays(folder):
    (folder / "set").mkdir(parents=True)
    (folder / "set/a.bin").write_text("mine")
    paths = source(writes("set/a.bin", "set/b.bin", "set/unwanted.bin")).paths()
    assert [path.read_text() for path in paths] == ["mine", "new set/b.bin"]
    assert not (folder / "set/unwanted.bin").exists()


@pytest.mark.parametrize(
    "download",
    [writes("set/a.bin"), lambda into: 1 / 0, lambda into: (writes("set/a.bin")(into), 1 / 0)],  # noqa: ARG005
)
def test_a_download_that_fails_leaves_no_part_and_names_what_is_missing(folder, download):
    with pytest.raises(MissingDataError, match=r"set/b\.bin.*https://example\.org/set.*BDL_BENCH_DATA"):
        source(download).paths()
    assert [p for p in folder.rglob("*") if p.name != ".set.lock"] == []


def test_a_folder_that_cannot_be_made_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BDL_BENCH_DATA", str(tmp_path / "file" / "data"))
    with pytest.raises(MissingDataError, match=r"NotADirectoryError|FileExistsError"):
        source(never).paths()


def test_an_error_that_says_what_to_install_is_not_hidden(folder):  # noqa: ARG001
    def download(into):  # noqa: ARG001
        raise UnsupportedError("torchvision", received="none", remedy="pip install torchvision.")

    with pytest.raises(UnsupportedError, match="pip install"):
        source(download).paths()


def test_torchvision_that_does_not_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision.datasets.mnist", None)
    with pytest.raises(UnsupportedError, match="pip install torchvision"):
        torchvision_datasets("mnist")
