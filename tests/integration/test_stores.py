"""Real servers on the loopback: an S3 (moto) and a GCS emulator. By hand:

pip install gcsfs s3fs "moto[s3,server]" gcp-storage-emulator; pytest -m slow FILE
"""

import shutil
import subprocess
import sys
import time

import pytest

from medclip_jax import files, object_store
from medclip_jax.errors import WorkdirError
from tests.support.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SERVERS = {
    "s3": ("s3fs", "moto.server", ["-H", "127.0.0.1", "-p", "{port}"]),
    "gs": (
        *("gcsfs", "gcp_storage_emulator"),
        ["start", "--host=127.0.0.1", "--port={port}", "--in-memory"],
    ),
}


@pytest.fixture(params=SERVERS)
def store(request, monkeypatch, tmp_path):
    """(scheme, its file system, the server's process) with an empty bucket called `bucket`."""
    library, server, arguments = SERVERS[request.param]
    pytest.importorskip(library)
    pytest.importorskip(server.partition(".")[0])
    import fsspec

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    monkeypatch.setenv("MEDCLIP_CACHE", str(tmp_path / "cache"))
    object_store._STAGED.clear()
    process = subprocess.Popen(
        [sys.executable, "-m", server, *(word.format(port=port) for word in arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    fsspec.filesystem(request.param).clear_instance_cache()
    system = fsspec.filesystem(request.param, skip_instance_cache=True)
    for _ in range(100):
        try:
            system.mkdir("bucket")
            break
        except Exception:
            time.sleep(0.2)
    yield request.param, system, process
    process.kill()
    process.wait()


def test_a_run_goes_there_and_comes_back_on_another_machine(store, tmp_path):
    scheme, system, _ = store
    with object_store.folder(f"{scheme}://bucket/run") as path:
        files.write_bytes(path / "metrics.json", b"{}")
        files.write_bytes(path / "checkpoints/1/x", b"c" * 100)
    system.invalidate_cache()
    assert sorted(system.find("bucket")) == [
        *("bucket/run/checkpoints/1/x", "bucket/run/metrics.json")
    ]
    shutil.rmtree(tmp_path / "cache")
    with object_store.folder(f"{scheme}://bucket/run") as path:
        assert (path / "checkpoints/1/x").read_bytes() == b"c" * 100
        (path / "checkpoints/1/x").unlink()
    system.invalidate_cache()
    assert system.find("bucket") == ["bucket/run/metrics.json"]


def test_what_is_not_there_is_a_sentence(store):
    scheme, *_ = store
    with pytest.raises(WorkdirError, match="nothing is there"):
        object_store.local(f"{scheme}://bucket/none")
    for write in (False, True):
        with pytest.raises(WorkdirError, match=r"nobucket/run cannot be used \(no such bucket"):
            with object_store.folder(f"{scheme}://nobucket/run", write):
                raise AssertionError("it began")


def test_a_connection_that_is_cut_loses_nothing(store):
    scheme, _, process = store
    with pytest.raises(WorkdirError, match="nothing is lost, it is in") as caught:
        with object_store.folder(f"{scheme}://bucket/run") as path:
            files.write_bytes(path / "metrics.json", b"{}")
            process.kill()
            process.wait()
    assert (path / "metrics.json").read_bytes() == b"{}" and str(path) in str(caught.value)
