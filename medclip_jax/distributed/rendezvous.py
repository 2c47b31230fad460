"""How several processes find one another, compare what they run, and notice that one is lost.

Process 0 listens at the address that all are given, there alone, and only until all have joined.
Each of the others keeps one connection to it, of JSON lines; where it closes without a last word,
the process is lost and the run ends. JAX's own service would end it with an abort and a C++ stack,
and so would JAX where a partner is absent: it is asked for nothing before all are there, and its
service runs in a process of its own, which outlives process 0 for a moment.
"""

import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from medclip_jax.errors import ConfigError, ProcessError, UserError

GREETING = {"medclip_jax": "rendezvous 1"}
MOST_LINE = 1 << 20  # bytes
ANSWER = 5  # seconds until a listener must have greeted
GRACE = 3  # seconds that the main thread has to end by itself when a process is lost
TAKES = {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
LOST = (
    "Another process of the run has ended or cannot be reached: start all of them again, the same "
    "commands resume from the last checkpoint."
)
SERVICE = """
import sys, time
from jaxlib import _jax
address, processes, patience = sys.argv[1], *map(int, sys.argv[2:])
service = _jax.get_distributed_runtime_service(address, processes, heartbeat_timeout=patience)
print(flush=True)
sys.stdin.read()  # ends with process 0
time.sleep(5)  # until the others have noticed
"""

_SERVICES: list[subprocess.Popen] = []  # kept, as its input closes with the object
Facts = Mapping[str, Any]  # name -> value of JSON's types


class Peer:
    """A connection to another process: lines out, a queue of the lines that come in."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.lines: queue.Queue = queue.Queue()  # None: it is closed
        self.leaving = threading.Event()  # it may close
        for name, value in TAKES.items():
            level = socket.SOL_SOCKET if name[0] == "S" else socket.IPPROTO_TCP
            if hasattr(socket, name):
                connection.setsockopt(level, getattr(socket, name), value)

    def send(self, message: Mapping) -> None:
        with suppress(OSError):  # lost, which shows where it is read
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def listen(self, ended: Callable[[], None]) -> None:
        """Read lines on a thread; call `ended` where they end without a last word."""

        def read() -> None:
            with suppress(OSError, ValueError, TypeError), self.connection.makefile("rb") as lines:
                while line := lines.readline(MOST_LINE):
                    message = json.loads(line)
                    if "bye" in message or "error" in message:
                        self.leaving.set()
                    self.lines.put(message)
            self.lines.put(None)
            if not self.leaving.is_set():
                ended()

        threading.Thread(target=read, daemon=True).start()

    def next(self, timeout: float | None = None) -> dict:
        """The next line. Raises ProcessError if it has ended, queue.Empty if it takes too long."""
        message = self.lines.get(timeout=timeout)
        if message is None:
            self.lines.put(None)
            raise ProcessError(LOST)
        if "error" in message:
            raise (ConfigError if message.get("config") else ProcessError)(message["error"])
        return message


class Links:
    """This process's connections: process 0 has one to each other, each other one to process 0."""

    def __init__(self, peers: Mapping[int, Peer], service: str = "") -> None:
        self.peers, self.service = dict(peers), service  # host:port of JAX's
        self.lost = threading.Event()

    def watch(self) -> None:
        """From now on a process that is lost ends this one, within GRACE seconds."""
        for peer in self.peers.values():
            peer.listen(self._ended)

    def _ended(self) -> None:
        self.lost.set()
        time.sleep(GRACE)
        _end()

    def agree(self, facts: Facts) -> None:
        """Raise ConfigError in all processes alike if these differ in any."""
        if 0 in self.peers:
            self.peers[0].send({"facts": facts})
            self.peers[0].next()
            return
        every = [facts, *(self.peers[i].next()["facts"] for i in sorted(self.peers))]
        _answer(self.peers.values(), difference(every))

    def part(self) -> None:
        """Wait until all have done their work: where one waits, another may still write."""
        if self.lost.is_set():
            return
        try:
            for peer in self.peers.values():
                if 0 in self.peers:
                    peer.send({"bye": True})
                peer.next()  # its last word, as everybody's work is done
            for peer in self.peers.values():
                peer.send({"bye": True})
        except UserError:
            _end()


def join(coordinator: str, processes: int, process: int, timeout: float, facts: Facts) -> Links:
    """Find the others and compare `facts`. coordinator: host:port of process 0.

    Raises ConfigError where the address cannot be used or the processes differ, ProcessError where
    they do not meet within `timeout` seconds.
    """
    host, _, port = coordinator.rpartition(":")
    host, deadline = host.strip("[]"), time.monotonic() + timeout
    hello = {"process": process, "processes": processes, "facts": facts}
    if process == 0:
        return _gather(host, int(port), hello, deadline, timeout)
    peer = Peer(_connect(host, int(port), deadline, f"{coordinator} within {timeout:g} s"))
    links = Links({0: peer})
    peer.send(hello)
    links.watch()
    try:
        if peer.next(ANSWER) != GREETING:
            raise queue.Empty
    except (queue.Empty, ProcessError):
        links.lost.set()
        raise ProcessError(
            f"what listens at {coordinator} is not process 0 of this run: give its address"
        ) from None
    links.service = address = peer.next()["address"]
    number, soon = int(address.rpartition(":")[2]), time.monotonic() + ANSWER
    _connect(host, number, soon, f"{address}, JAX's service,").close()
    return links


def difference(every: Sequence[Facts]) -> str:
    """What the first process that differs from process 0 has otherwise; "" where none does."""
    every = json.loads(json.dumps(every))  # lists for tuples
    ours = every[0]
    for i, theirs in enumerate(every):
        names = [n for n in sorted({*ours, *theirs}) if ours.get(n) != theirs.get(n)]
        if names:
            shown = (f"{n} ({theirs.get(n)!r}, not {ours.get(n)!r})" for n in names[:3])
            more = f" and {len(names) - 3} more" if names[3:] else ""
            return (
                f"process {i} differs from process 0 in {', '.join(shown)}{more}: start all with "
                "the same command, versions and data"
            )
    return ""


def _gather(host: str, port: int, hello: dict, deadline: float, timeout: float) -> Links:
    """Process 0's part: let the others in, compare, start JAX's service, say where it is."""
    n, peers = hello["processes"], dict[int, Peer]()
    every = {0: hello["facts"]}
    with _listener(host, port) as listener:
        while len(peers) < n - 1:
            try:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                peer, theirs = _greet(listener.accept()[0])
            except TimeoutError:
                absent = ", ".join(str(i) for i in range(1, n) if i not in peers)
                text = f"process {absent} of {n} did not join at {host}:{port} within {timeout:g} s"
                text += ": start all of them, or raise config.join_timeout"
                _answer(peers.values(), text, config=False)
            except (OSError, ValueError):
                continue  # a stranger
            number = theirs["process"]
            if theirs["processes"] != n or number in peers or not 0 < number < n:
                text = f"{number}/{theirs['processes']} wants to join, and {n} have 0 to {n - 1}"
                _answer([*peers.values(), peer], f"{text}, each once: change config.distributed")
            peers[number], every[number] = peer, theirs["facts"]
    if text := difference([every[i] for i in range(n)]):
        _answer(peers.values(), text)
    links = Links(peers, serve(host, n))
    for peer in peers.values():
        peer.connection.settimeout(None)
        peer.send({"address": links.service})
    links.watch()
    return links


def _greet(connection: socket.socket) -> tuple[Peer, dict]:
    """A process that wants to join. Raises ValueError for what is none."""
    try:
        peer = Peer(connection)
        peer.send(GREETING)
        line, deadline = bytearray(), time.monotonic() + ANSWER
        while not line.endswith(b"\n"):  # byte by byte: what follows is read by Peer.listen
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            if not (byte := connection.recv(1)) or len(line) > MOST_LINE:
                raise ValueError
            line += byte
        theirs = json.loads(line)
        kinds = [type(theirs[name]) for name in ("process", "processes", "facts")]
        if kinds != [int, int, dict]:
            raise ValueError
        return peer, theirs
    except (OSError, ValueError, KeyError, TypeError) as error:
        connection.close()
        raise ValueError from error


def _listener(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"process 0 cannot listen at {host}:{port} ({_reason(error)}): give an address of its "
            "machine and a free port in config.distributed"
        ) from error


def _connect(host: str, port: int, deadline: float, where: str) -> socket.socket:
    """A connection, tried until the deadline."""
    while True:
        try:
            left = deadline - time.monotonic()
            connection = socket.create_connection((host, port), timeout=max(0.1, min(2, left)))
            connection.settimeout(None)
            return connection
        except OSError as error:
            if time.monotonic() > deadline:
                raise ProcessError(
                    f"process 0 cannot be reached at {where} ({_reason(error)}): start "
                    "it, give its address in config.distributed, or raise config.join_timeout"
                ) from error
        time.sleep(0.1)


def serve(host: str, processes: int) -> str:
    """JAX's service on a free port of `host`, in a process of its own. Returns its address."""
    for _ in range(3):  # somebody may take the port meanwhile
        port = free_port(host)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        service = subprocess.Popen(
            [sys.executable, "-c", SERVICE, address, str(processes), "86400"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run
        )
        if service.stdout and service.stdout.readline():
            _SERVICES.append(service)
            return address
    raise ProcessError(f"JAX's service could not be started at {host}: give another address")


def free_port(host: str = "127.0.0.1") -> int:
    """A port of this machine's address `host` that nothing listens at."""
    with _listener(host, 0) as free:
        return free.getsockname()[1]


def _reason(error: OSError) -> str:
    code = error.errno or 0  # below 0 of a name that nobody knows
    return os.strerror(code) if code > 0 else error.strerror or str(error)


def _answer(peers: Iterable[Peer], error: str, config: bool = True) -> None:
    """Say to all that all is well, or say what is wrong and raise it here."""
    for peer in peers:
        peer.send({"error": error, "config": config} if error else {"ok": True})
        if error:
            peer.leaving.set()
    if error:
        raise (ConfigError if config else ProcessError)(error)


def _end() -> None:
    """End this process from any thread: the main one may wait for what does not come."""
    with suppress(OSError):
        sys.stderr.flush()
        os.write(2, f"error: {LOST}\n".encode())
    os._exit(2)
