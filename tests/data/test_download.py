"""Fetching BUSI, from a server on this machine."""

import functools
import http.server
import threading
import zipfile

import pytest

from medclip_jax.data import datasets, tfds_builders
from medclip_jax.errors import DataError


def test_builders_say_where_they_come_from(tmp_path):

    info = tfds_builders.Busi(data_dir=str(tmp_path)).info
    assert "104863" in info.citation and "CC BY 4.0" in info.description
    assert info.homepage.startswith("https://scholar.cu.edu.eg/") and info.release_notes
    assert tfds_builders.FolderAD(data_dir=str(tmp_path)).info.citation


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine in place of the official one; yields (folder, requests)."""

    (tmp_path / "web").mkdir()
    asked = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            asked.append(self.path)

    handler = functools.partial(Quiet, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/Dataset_BUSI.zip"
        monkeypatch.setattr(tfds_builders, "BUSI_URL", url)
        yield tmp_path / "web", asked
        running.shutdown()


def test_busi_is_downloaded_once(busi, cache, server):
    web, asked = server
    with zipfile.ZipFile(web / "Dataset_BUSI.zip", "w") as archive:
        for path in busi.rglob("*.png"):
            archive.write(path, path.relative_to(busi.parent))
    first = datasets.load("busi", None, cache)
    assert [r.id for r in first] == [r.id for r in datasets.load("busi", busi, cache)]
    assert all(r.path.is_relative_to(cache) for r in first)
    assert datasets.load("busi", None, cache) == first and len(asked) == 1


def test_builder_downloads_by_itself(busi, cache, server):

    web, _ = server
    with zipfile.ZipFile(web / "Dataset_BUSI.zip", "w") as archive:
        for path in busi.rglob("*.png"):
            archive.write(path, path.relative_to(busi.parent))
    builder = tfds_builders.Busi(data_dir=str(cache))
    builder.download_and_prepare()
    source = builder.as_data_source(split="full")
    assert len(source) == 20 and {row["label"] for row in source} == {0, 1}


def test_failed_and_broken_downloads_say_how_to_fetch_by_hand(cache, server):
    web, _ = server
    with pytest.raises(DataError, match=r"could not be downloaded.*fetch it by hand.*data\.root"):
        datasets.load("busi", None, cache)
    (web / "Dataset_BUSI.zip").write_bytes(b"<html>moved</html>")
    for _ in range(2):  # the broken archive is not kept
        with pytest.raises(DataError, match=r"broken archive.*fetch it by hand"):
            datasets.load("busi", None, cache)
