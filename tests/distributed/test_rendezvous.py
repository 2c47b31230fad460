"""How processes meet: threads stand for them, and the loopback for the network."""

import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from medclip_jax.distributed import rendezvous
from medclip_jax.errors import ConfigError, ProcessError
from tests.support.ports import free_port


@pytest.fixture(autouse=True)
def in_threads(monkeypatch):
    """JAX's service is not started, and nothing ends this process."""
    ends: list[int] = []
    monkeypatch.setattr(rendezvous, "serve", lambda host, n: f"{host}:{rendezvous.free_port()}")
    monkeypatch.setattr(rendezvous, "_end", lambda: ends.append(1))
    monkeypatch.setattr(rendezvous, "GRACE", 0)
    real = rendezvous._connect

    def connect(host, port, deadline, where):
        return socket.socket() if "service" in where else real(host, port, deadline, where)

    opened: list[socket.socket] = []
    init = rendezvous.Peer.__init__

    def note(self, connection):
        opened.append(connection)
        init(self, connection)

    monkeypatch.setattr(rendezvous, "_connect", connect)
    monkeypatch.setattr(rendezvous.Peer, "__init__", note)
    yield ends
    for connection in opened:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()
    time.sleep(0.05)  # until their threads have ended


def meet(*places: tuple[int, int], facts=({}, {}, {}), timeout: float = 5):
    """What `join` gives, or raises, in processes with these (number, processes)."""
    address = f"127.0.0.1:{free_port()}"

    def one(i, place):
        try:
            return rendezvous.join(address, place[1], place[0], timeout, facts[i])
        except (ConfigError, ProcessError) as error:
            return error

    with ThreadPoolExecutor(len(places)) as pool:
        return [x.result() for x in [pool.submit(one, i, p) for i, p in enumerate(places)]]


def test_three_meet_agree_and_part(in_threads):
    links = meet((0, 3), (1, 3), (2, 3), facts=[{"seed": 1, "layers": (1, 2)}] * 3)
    assert len({x.service for x in links}) == 1
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda x: x.agree({"the supports": "ab"}), links))
        agreed = [
            pool.submit(x.agree, {"the supports": t}) for x, t in zip(links, "aba", strict=True)
        ]
        said = [str(x.exception()) for x in agreed]
    assert len(set(said)) == 1
    assert said[0].startswith("process 1 differs from process 0 in the supports ('b', not 'a')")
    assert not in_threads


def test_all_part_together_and_a_loss_is_noticed_until_then(in_threads):
    main, other = meet((0, 2), (1, 2))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(other.part)
        time.sleep(0.2)
        assert not first.done()  # process 0 writes the report
        main.part()
        first.result(5)
    other.peers[0].connection.shutdown(socket.SHUT_RDWR)
    time.sleep(0.2)
    assert not in_threads and not main.lost.is_set()
    main, other = meet((0, 2), (1, 2))
    other.peers[0].connection.shutdown(socket.SHUT_RDWR)
    assert main.lost.wait(5)
    with pytest.raises(ProcessError, match="has ended or cannot be reached"):
        main.agree({})


@pytest.mark.parametrize(
    ("places", "facts", "message"),
    [
        (((0, 2), (1, 2)), ({"lr": 1}, {"lr": 2}), r"process 1 .* lr \(2, not 1\)"),
        (((0, 2), (1, 2)), ({"a": 1}, {}), r"process 1 .* a \(None, not 1\)"),
        (((0, 2), (1, 3)), ({}, {}), "1/3 wants to join, and 2 have 0 to 1, each once"),
        (((0, 3), (1, 3), (1, 3)), ({},) * 3, "1/3 wants to join, and 3 have 0 to 2, each once"),
    ],
)
def test_all_are_refused_alike(places, facts, message):
    for error in meet(*places, facts=facts):
        assert isinstance(error, ConfigError)
        with pytest.raises(ConfigError, match=message):
            raise error


def test_an_absent_process_is_named_to_those_that_came():
    first, second = meet((0, 3), (2, 3), timeout=0.5)
    for error in (first, second):
        assert isinstance(error, ProcessError)
        assert str(error).startswith("process 1 of 3 did not join at 127.0.0.1:")
    (alone,) = meet((1, 2), timeout=0.5)
    assert "cannot be reached at 127.0.0.1:" in str(alone) and "refused" in str(alone)


@pytest.mark.parametrize("host", ["192.0.2.7", "nowhere.invalid"])
def test_process_0_listens_where_it_is_told_or_says_why_not(host):
    with pytest.raises(ConfigError, match=f"process 0 cannot listen at {host}:9876 \\("):
        rendezvous.join(f"{host}:9876", 2, 0, 1, {})


def test_a_port_that_is_taken_and_a_listener_of_another_kind():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"cannot listen at .* \(Address already in use\)"):
            rendezvous.join(address, 2, 0, 1, {})
        with ThreadPoolExecutor(1) as pool:
            joining = pool.submit(rendezvous.join, address, 2, 1, 1, {})
            connection, _ = other.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\n")
            with pytest.raises(ProcessError, match="is not process 0 of this run"):
                joining.result(5)
            connection.close()


def test_a_stranger_ends_nothing_and_other_addresses_are_closed(in_threads):
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        main = pool.submit(rendezvous.join, f"127.0.0.1:{port}", 2, 0, 5, {"seed": 1})
        lies = [b'{"process": "1", "processes": 2, "facts": {}}\n']  # a number that is text
        lies += [b'{"process": 1, "processes": 2, "facts": [3]}\n', b'{"process": "x"}\n']
        for words in (b"GET / HTTP/1.1\n", b"{}\n", b"3\n", *lies, b"half"):
            stranger = rendezvous._connect("127.0.0.1", port, time.monotonic() + 2, "")
            stranger.sendall(words)
            stranger.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), 1)
        other = rendezvous.join(f"127.0.0.1:{port}", 2, 1, 5, {"seed": 1})
        assert main.result(5).service == other.service
    with pytest.raises(ConnectionRefusedError):  # all are there
        socket.create_connection(("127.0.0.1", port), 1)


def test_a_difference_names_three_and_counts_the_rest():
    theirs = {name: 2 for name in "abcde"} | {"layers": [1]}
    text = rendezvous.difference([{name: 1 for name in "abcde"} | {"layers": (1,)}, theirs])
    assert text.startswith("process 1 differs from process 0 in a (2, not 1), b (2, not 1), c (2, ")
    assert " and 2 more: start all with the same command" in text
    assert rendezvous.difference([{"x": (1,)}, {"x": [1]}]) == ""
    assert json.dumps(rendezvous.GREETING)
