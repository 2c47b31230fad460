"""gs://, s3:// and other URLs that fsspec knows, in the place of local paths.

What is read is staged: listed once, and what is new or changed is copied below the user's cache. A
folder that is written is staged too: what is in the store is fetched first, so that a run resumes,
and what is finished goes there every MIRROR_EVERY seconds and at the end, the files that complete a
run last. An object appears whole; sizes are compared after each round.
"""

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from medclip_jax.errors import ConfigError, UserError, WorkdirError, one_line

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)(.*)", re.DOTALL)
MIRROR_EVERY = 20  # seconds
THREADS = 16  # objects at a time
LAST = ("metrics.json", "results.csv")  # say that the rest is there
TEMPORARY = re.compile(r"(^|/)(\.lock|\.[^/]+\.tmp|[^/]*orbax-checkpoint-tmp[^/]*)(/|$)")
VERSION_KEYS = ("ETag", "etag", "generation", "md5Hash", "LastModified", "mtime", "created")
_STAGED: dict[str, Path] = {}  # by URL, of this process


def is_url(name: str | os.PathLike[str]) -> bool:
    """Is this a URL, and not a path? Raises ConfigError for one that cannot be used."""
    if not (match := URL.match(str(name))):
        return False
    from fsspec.registry import get_filesystem_class, known_implementations

    scheme, slashes, rest = match.groups()
    known = scheme in known_implementations
    if slashes == "/" and (not known or Path(f"{scheme}:").exists()):
        return False  # a folder of such a name
    if ":" in rest.partition("/")[0].rpartition("@")[0]:
        raise ConfigError(f"{scheme}://: credentials come from the environment, not from a URL")
    if not known or "::" in rest:
        text = f"{scheme}:// is no store that is known here: give a folder, gs:// or s3://"
        raise ConfigError(f"{name}: {text}")
    if slashes == "/" or not rest.strip("/"):
        raise ConfigError(f"{name}: give it as {scheme}://bucket/folder")
    try:
        get_filesystem_class(scheme)
    except ImportError as error:
        raise ConfigError(
            f"{name}: {scheme}:// needs another library: pip install 'medclip-jax[cloud]' "
            f"({one_line(error)})"
        ) from None
    return True


def path_of(name: str | os.PathLike[str]) -> Path:
    """A path, ~ written out. Raises ConfigError for a home that is not known, or a zero byte."""
    if "\0" in str(name):
        raise ConfigError(f"{name}: a zero byte is in no path")
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{name}: that home folder is not known here: give a path without ~, for the cache too "
            "(config.cache or $MEDCLIP_CACHE)"
        ) from None


def user_cache() -> Path:
    """Where things are kept that no other folder was named for."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("MEDCLIP_CACHE") or f"{home}/medclip_jax")


def place(name: str) -> Path:
    """Where a workdir, cache or output lies here; nothing is fetched yet."""
    return Store(name).path if is_url(name) else path_of(name)


def local(name: str) -> Path:
    """The local copy of what a URL names (of a pattern: the folder before it), made once.

    Raises WorkdirError if nothing is there or it cannot be fetched.
    """
    if pattern := re.fullmatch(r"([^*?[]+)/([^/]*[*?[].*)", name):
        return local(pattern[1]) / pattern[2]
    if name not in _STAGED:
        store = Store(name)
        if not store.fetch():
            raise WorkdirError(f"{name}: nothing is there: give another")
        _STAGED[name] = store.path
    return _STAGED[name]


@contextmanager
def folder(name: str, sends: bool = True) -> Iterator[Path]:
    """The folder itself; of a URL a local one: fetched first, and sent meanwhile and at the end.

    Raises WorkdirError if the store cannot be read or, before anything is done, be written.
    """
    if not is_url(name):
        yield path_of(name)
        return
    store, stop = Store(name), threading.Event()
    store.fetch()
    _STAGED[name] = store.path
    if not sends:
        yield store.path
        return
    store.probe()
    thread = threading.Thread(target=store.keep_sending, args=(stop,), daemon=True)
    thread.start()
    try:
        yield store.path
    finally:
        stop.set()
        thread.join()
        try:
            store.send()
        except WorkdirError as error:
            text = f"nothing is lost, it is in {store.path}: the same command sends it"
            raise WorkdirError(f"{error}; {text}") from None


@contextmanager
def file(name: str) -> Iterator[Path]:
    """A local file to write, which is sent at the end if `name` is a URL."""
    if not is_url(name):
        yield path_of(name)
        return
    store = Store(name)
    store.probe()
    yield store.path
    store.put("", {"": [0, 0]})


class Store:
    """A URL, its local copy, and what both were when they were last the same."""

    def __init__(self, name: str) -> None:
        import fsspec

        if URL.match(os.environ.get("MEDCLIP_CACHE", "")):
            raise ConfigError("$MEDCLIP_CACHE must be a local folder: config.cache may be a URL")
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # tracebacks of its retries
        self.name = name
        with self._errors():
            self.fs, self.root = fsspec.core.url_to_fs(name)
        self.root = self.root.rstrip("/")
        base = path_of(user_cache()) / "staged"
        parts = [part for part in self.root.split("/") if part not in ("", ".", "..")]
        self.path = base.joinpath(name.partition("://")[0], *parts)
        self._record = base / ".state" / hashlib.sha256(name.encode()).hexdigest()[:16]
        self._sent: dict[str, list] = {}  # name -> [version in the store, size and time here]

    def fetch(self) -> int:
        """Copy what is lacking here; returns how many objects there are."""
        with suppress(OSError, ValueError):
            self._sent = json.loads(self._record.read_text("utf-8"))
        there = self.listing()
        for name, (version, now) in self._sent.items():  # sent from here, its version not read yet
            if not version and name in there and (not now or there[name][0] == now[0]):
                self._sent[name][0] = there[name][1]
        if {n: v for n, (_, v) in there.items()} != {n: x[0] for n, x in self._sent.items()}:
            # somebody changed the store: what was not sent from here is dropped
            for name in self._here().keys() - there.keys():
                (self.path / name).unlink(missing_ok=True)
            here, old = self._here(), self._sent
            now = {n: [v, here.get(n)] for n, (_, v) in there.items()}
            self._sent = {n: x for n, x in now.items() if old.get(n) == x}
        absent = [n for n in there if n not in self._sent or not (self.path / n).is_file()]
        self._each(self.get, absent, there)
        here = self._here()
        self._sent |= {n: [there[n][1], here.get(n)] for n in absent}
        self._remember()
        return len(there)

    def send(self) -> None:
        """Copy what has changed here, the files of LAST at the end; remove what was removed."""
        here = self._here()
        changed = [n for n, now in here.items() if self._sent.get(n, [0, 0])[1] != now]
        removed = [n for n in self._sent if n not in here]
        try:
            for last in (False, True):
                self._each(self.put, [n for n in changed if (n in LAST) is last], here)
            for name in removed:
                with self._errors(), suppress(FileNotFoundError):
                    self.fs.rm_file(self._key(name))
                del self._sent[name]
            there = self.listing() if changed or not all(x[0] for x in self._sent.values()) else {}
            for n in [n for n, x in self._sent.items() if n in changed or not x[0]]:
                size, version = there.get(n, (None, ""))
                if size != self._sent[n][1][0]:
                    self._sent[n][1] = None  # it is sent again
                    raise WorkdirError(f"{self._key(n)} is not whole in the store ({size} bytes)")
                self._sent[n][0] = version
        finally:  # what was sent before a cut is known as ours
            self._remember()

    def keep_sending(self, stop: threading.Event) -> None:
        """Send every MIRROR_EVERY seconds until `stop` is set."""
        while not stop.wait(MIRROR_EVERY):
            try:
                self.send()
            except (UserError, OSError) as error:  # again in the next round
                logging.warning("%s", error)

    def probe(self) -> None:
        """Write and remove an object: who may not is told at once."""
        key = self._key(f".medclip_jax.{os.getpid()}.tmp")
        with self._errors():
            self.fs.pipe_file(key, b"")
            self.fs.rm_file(key)

    def listing(self) -> dict[str, tuple[int, str]]:
        """Names below the URL -> size and version, in one listing; "" is the URL's own object."""
        with self._errors():
            self.fs.invalidate_cache()
            try:
                found = self.fs.find(self.root, detail=True)
            except FileNotFoundError:  # of a bucket, or of a folder that is not there yet
                self.fs.ls(self.root.partition("/")[0] or self.root)
                found = {}
        names = {}
        for key, info in found.items():
            name = key[len(self.root) :].removeprefix("/")
            if key.endswith("/") or info.get("type") == "directory" or TEMPORARY.search(name):
                continue
            if ".." in name.split("/") or "\0" in name or str(Path("/", name)) != f"/{name}":
                logging.warning("%r: no file can have such a name: it is left out", key)
                continue
            version = next((str(info[k]) for k in VERSION_KEYS if info.get(k)), "")
            names[name] = (int(info["size"]), version)
        return names

    def _here(self) -> dict[str, list[int]]:
        """Files of the local folder -> size and time."""
        found = {}
        for folder, _, names in os.walk(self.path):
            for path in (Path(folder, name) for name in names):
                name = path.relative_to(self.path).as_posix()
                if not TEMPORARY.search(name):
                    with suppress(OSError):  # it is gone meanwhile
                        status = path.stat()
                        found[name] = [status.st_size, status.st_mtime_ns]
        return found

    def get(self, name: str, there: Any) -> None:
        """Fetch an object whole, of the size that the listing says."""
        place = self.path / name
        temporary = place.with_name(f".{place.name[:40]}.{os.getpid()}.{os.urandom(8).hex()}.tmp")
        with self._errors():
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.fs.get_file(self._key(name), str(temporary))
                if (size := temporary.stat().st_size) != there[name][0]:
                    raise ValueError(f"{size} of {there[name][0]} bytes of {name} arrived")
                temporary.replace(place)
            finally:
                temporary.unlink(missing_ok=True)

    def put(self, name: str, here: Any) -> None:
        """Send a file as it is now; `here` has the time of the state that it is at least in."""
        with suppress(FileNotFoundError):  # removed meanwhile
            data = (self.path / name).read_bytes()
            with self._errors():
                self.fs.pipe_file(self._key(name), data)
            self._sent[name] = ["", [len(data), here[name][1]]]

    def _each(self, what: Callable[[str, Any], None], names: list[str], about: Any) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            for future in [pool.submit(what, name, about) for name in names]:
                future.result()

    def _remember(self) -> None:
        self._record.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._record.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self._sent), "utf-8")
        temporary.replace(self._record)

    def _key(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Whatever a store's library raises is one sentence."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # of many libraries, which have no common type
            kinds = {PermissionError: "no permission", FileNotFoundError: "no such bucket"}
            kind = next((kinds[e] for e in kinds if isinstance(error, e)), type(error).__name__)
            raise WorkdirError(
                f"{self.name} cannot be used ({kind}: {one_line(error)[:200]}): check the bucket's "
                "name, the credentials in the environment and the network"
            ) from error
