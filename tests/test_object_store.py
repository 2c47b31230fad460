"""Stores in the place of folders: fsspec's own in memory; tests/integration has real servers."""

import json
import sys
from pathlib import Path

import fsspec
import pytest

from medclip_jax import config, files, object_store
from medclip_jax.errors import ConfigError, WorkdirError
from medclip_jax.inference import inputs

STORE = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def bucket(monkeypatch, tmp_path):
    """An empty store and an empty cache, as of a new machine each time `machine` is called."""
    STORE.store.clear()
    STORE.pseudo_dirs[:] = [""]

    def machine(name: str) -> None:
        monkeypatch.setenv("MEDCLIP_CACHE", str(tmp_path / name))
        object_store._STAGED.clear()

    machine("first")
    yield machine
    STORE.store.clear()


def test_the_forms_of_a_url(tmp_path, monkeypatch):
    for name in ("runs/busi", "/a/b", "C:/x", "folder:x", "org/name@main", "unknown:/x", "~"):
        assert not object_store.is_url(name)
    assert object_store.is_url("memory://b/run")
    monkeypatch.chdir(tmp_path)
    Path("memory:").mkdir()
    assert not object_store.is_url("memory:/x")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("foo://b/run", "foo:// is no store that is known here: give a folder, gs:// or s3://"),
        ("GS2://b/run", "is no store that is known"),
        ("memory:/b/run", "give it as memory://bucket/folder"),
        ("memory://", "give it as memory://bucket/folder"),
        ("simplecache::s3://b/x", None),
        ("memory://b::s3://x", "is no store"),
        ("memory://key:secret@b/x", "credentials come from the environment"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_made(name, message, tmp_path):
    if message is None:
        assert not object_store.is_url(name)
        return
    for use in (object_store.is_url, object_store.place, files.expanded, inputs.find):
        with pytest.raises(ConfigError, match=message) as caught:
            use([name] if use is inputs.find else name)
        assert "secret" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["data.root", "cache", "teacher", "clip.checkpoint", "meta.data"])
def test_every_field_that_names_a_place_is_checked(field):
    c = config.base(name="folder", root="")
    value = ("busi=foo://b/x",) if field == "meta.data" else "foo://b/x"
    with c.unlocked():
        c.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match="foo:// is no store that is known here"):
        config.resolve(c)


def test_a_library_that_is_missing_is_named(monkeypatch):
    def absent(scheme):
        raise ImportError("Please install adlfs")

    monkeypatch.setattr(sys.modules["fsspec.registry"], "get_filesystem_class", absent)
    with pytest.raises(ConfigError, match=r"pip install 'medclip-jax\[cloud\]' \(Please install"):
        object_store.is_url("abfs://b/x")


def test_what_is_read_is_copied_once_and_again_where_it_changed(bucket, monkeypatch):
    STORE.pipe({"/b/data/a.png": b"one", "/b/data/sub/b.png": b"two", "/b/other": b"x"})
    path = files.expanded("memory://b/data")
    assert {p.relative_to(path).as_posix() for p in path.rglob("*.png")} == {"a.png", "sub/b.png"}
    STORE.pipe({"/b/data/a.png": b"three"})
    STORE.rm_file("/b/data/sub/b.png")
    bucket("first")
    fetched = []
    real = object_store.Store.get

    def get(self, name, there):
        fetched.append(name)
        real(self, name, there)

    monkeypatch.setattr(object_store.Store, "get", get)
    assert files.expanded("memory://b/data") == path and fetched == ["a.png"]
    assert (path / "a.png").read_bytes() == b"three" and not (path / "sub/b.png").exists()
    assert files.expanded("memory://b/other").read_bytes() == b"x"  # one object
    assert object_store.local("memory://b/data/*.png") == path / "*.png"
    with pytest.raises(WorkdirError, match="memory://b/nothing: nothing is there"):
        files.expanded("memory://b/nothing")


@pytest.mark.parametrize("name", ["../../evil", "/ok", "/evil", "a//evil", "./evil"])
def test_names_that_no_file_can_have_are_left_out(caplog, name):
    for key in (f"/b/d/{name}", "/b/d/ok"):
        STORE.store[key] = STORE.open("/x", "wb")
    path = files.expanded("memory://b/d")
    assert [p.name for p in path.rglob("*") if p.is_file()] == ["ok"]
    assert "no file can have such a name" in caplog.text


def test_a_folder_is_sent_with_what_completes_it_last_and_fetched_elsewhere(bucket, monkeypatch):
    order = []
    real = object_store.Store.put

    def put(self, name, here):
        order.append(name)
        real(self, name, here)

    monkeypatch.setattr(object_store.Store, "put", put)
    with object_store.folder("memory://b/run") as path:
        files.write_json(path / "metrics.json", {"a": 1})
        for name in ("config.json", "checkpoints/1/d/x", "checkpoints/2.orbax-checkpoint-tmp/y"):
            files.write_bytes(path / name, name.encode())
        for name in (".lock", ".x.1.0123456789abcdef.tmp"):
            (path / name).touch()
    assert order[-1] == "metrics.json" and len(order) == 3
    assert set(STORE.store) == {f"/b/run/{n}" for n in order}
    bucket("second")
    with object_store.folder("memory://b/run") as other:
        assert other != path and json.loads((other / "metrics.json").read_text()) == {"a": 1}
        (other / "checkpoints/1/d/x").unlink()
        files.write_bytes(other / "config.json", b"new")
    assert STORE.cat("/b/run/config.json") == b"new"
    assert set(STORE.store) == {"/b/run/metrics.json", "/b/run/config.json"}
    bucket("first")  # had another state: the store has the word
    with object_store.folder("memory://b/run", sends=False) as path:
        assert (path / "config.json").read_bytes() == b"new"
        assert not (path / "checkpoints/1/d/x").exists()


def test_what_was_not_sent_is_kept_and_sent_by_the_next_run(monkeypatch):
    with object_store.folder("memory://b/run") as path:
        files.write_bytes(path / "first", b"1")
    with monkeypatch.context() as patch:
        patch.setattr(object_store.Store, "put", cut)
        with pytest.raises(WorkdirError, match=r"ConnectionError: cut.*nothing is lost, it is in"):
            with object_store.folder("memory://b/run") as path:
                files.write_bytes(path / "second", b"2")
    object_store._STAGED.clear()
    with object_store.folder("memory://b/run") as again:
        assert (again / "second").read_bytes() == b"2"
    assert STORE.cat("/b/run/second") == b"2" and STORE.cat("/b/run/first") == b"1"


def cut(self, name, here):
    with self._errors():
        raise ConnectionError("cut")


NEW = {name: name.encode() for name in ("a", "b/c", "config.json", "metrics.json", "z")}


def cut_after(most: int):
    """A Store.put whose connection is cut after so many objects."""
    real, left = object_store.Store.put, [most]

    def put(self, name, here):
        if not left[0]:
            cut(self, name, here)
        left[0] -= 1
        real(self, name, here)

    return put


def contents(path: Path) -> dict[str, bytes]:
    each = (p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in each}


@pytest.mark.parametrize("most", range(len(NEW)))
def test_wherever_a_send_is_cut_the_same_command_loses_nothing(monkeypatch, most):
    monkeypatch.setattr(object_store, "THREADS", 1)
    with object_store.folder("memory://b/run") as path:
        files.write_bytes(path / "config.json", b"older words")
    with monkeypatch.context() as patch, pytest.raises(WorkdirError, match="nothing is lost"):
        patch.setattr(object_store.Store, "put", cut_after(most))
        with object_store.folder("memory://b/run") as path:
            for name, data in NEW.items():
                files.write_bytes(path / name, data)
    object_store._STAGED.clear()
    with object_store.folder("memory://b/run") as again:
        assert contents(again) == NEW
    assert {n.removeprefix("/b/run/"): STORE.cat(n) for n in STORE.store} == NEW


def test_what_a_round_that_failed_sent_is_known_as_ours(monkeypatch):
    """The next round has no need to send it, so its version is read by the next command."""
    monkeypatch.setattr(object_store, "THREADS", 1)
    store = object_store.Store("memory://b/run")
    for name, data in NEW.items():
        files.write_bytes(store.path / name, data)
    with monkeypatch.context() as patch, pytest.raises(WorkdirError, match="cut"):
        patch.setattr(object_store.Store, "put", cut_after(2))
        store.send()
    store.send()
    files.write_bytes(store.path / "a", b"newer, not sent")
    again = object_store.Store("memory://b/run")
    again.fetch()
    assert contents(again.path) == NEW | {"a": b"newer, not sent"}
    STORE.pipe("/b/run/a", b"of somebody else")  # the store has the word
    assert again.fetch() == 5 and contents(again.path) == NEW | {"a": b"of somebody else"}
    # of the same size too: the round that went well has read the versions of the one before
    other = {name: bytes(len(data)) for name, data in NEW.items()}
    for name, data in other.items():
        STORE.pipe(f"/b/run/{name}", data)
    assert again.fetch() == 5 and contents(again.path) == other


def test_an_object_that_is_not_whole_is_sent_again(monkeypatch):
    store, real = object_store.Store("memory://b/run"), type(STORE).pipe_file
    files.write_bytes(store.path / "a", b"whole")
    with monkeypatch.context() as patch, pytest.raises(WorkdirError, match=r"a is not whole.*2 b"):
        patch.setattr(type(STORE), "pipe_file", lambda fs, key, data: real(fs, key, data[:2]))
        store.send()
    again = object_store.Store("memory://b/run")
    again.fetch()
    again.send()
    assert STORE.cat("/b/run/a") == (store.path / "a").read_bytes() == b"whole"


def test_half_an_object_is_an_error_not_a_file(monkeypatch):
    STORE.pipe({"/b/data/a.png": b"whole"})

    def half(self, key, local, **_):
        Path(local).write_bytes(b"who")

    monkeypatch.setattr(type(STORE), "get_file", half)
    with pytest.raises(WorkdirError, match="3 of 5 bytes of a.png arrived"):
        files.expanded("memory://b/data")
    assert not list(object_store.place("memory://b/data").glob("*"))
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("error", "message"),
    [(PermissionError("403"), "no permission: 403"), (TimeoutError(), "TimeoutError")],
)
def test_a_store_that_refuses_is_said_before_anything_is_done(monkeypatch, error, message):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(type(STORE), "pipe_file", refuse)
    with pytest.raises(WorkdirError, match=rf"memory://b/run cannot be used \({message}"):
        with object_store.folder("memory://b/run"):
            raise AssertionError("it began")


def test_one_file_is_written(tmp_path):
    with object_store.file("memory://b/out/model.zip") as path:
        files.write_bytes(path, b"exported")
    assert STORE.cat("/b/out/model.zip") == b"exported"
    with object_store.file(str(tmp_path / "here")) as path:
        assert path == tmp_path / "here"


def test_the_local_cache_must_be_local(monkeypatch):
    monkeypatch.setenv("MEDCLIP_CACHE", "memory://b/cache")
    with pytest.raises(ConfigError, match="MEDCLIP_CACHE must be a local folder"):
        object_store.place("memory://b/run")
