"""What holds for every test: no network, no settings of the developer's shell, repeatable properties."""

import functools
import ipaddress
import json
import os
import socket
import sys

import fake_site
import pytest
from hypothesis import settings

# Repeatable in CI; HYPOTHESIS_PROFILE=search looks for new examples.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=100)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Nothing listens on the discard port of the loopback: a child process that honours proxies gets nowhere either.
_DEAD_PROXY = "http://127.0.0.1:9"
_PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config, specs):
    """One worker a core: two of them with a thread for every core each would fight, at several times the cost."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(specs))))


class NetworkBlocked(OSError):
    """A test tried to leave this machine. An ``OSError``: the code under test sees what an offline machine gives."""


def _is_here(host: object) -> bool:
    name = host.decode() if isinstance(host, bytes) else str(host)
    if name in ("", "localhost", "None"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or _is_this_machine(address)


@functools.cache
def _is_this_machine(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is one of ours: only those can be bound. The nodes of a Ray on this machine talk by it."""
    if address.is_unspecified or address.is_multicast:
        return False
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as trial:
            trial.bind((str(address), 0))
        return True
    except OSError:
        return False


def _guarded(original, host_of):
    def call(*args, **kwargs):
        host = host_of(*args, **kwargs)
        if host is not None and not _is_here(host):
            raise NetworkBlocked(f"the tests must not use the network: {original.__name__} to {host!r}")
        return original(*args, **kwargs)

    return call


def _host_of_address(sock, *args):
    # The address comes last in connect(address), sendto(data, address) and sendto(data, flags, address).
    internet = sock.family in (socket.AF_INET, socket.AF_INET6)
    return args[-1][0] if internet and args and isinstance(args[-1], tuple) else None


@pytest.fixture(autouse=True)
def no_network(request, monkeypatch):
    """Only this machine can be reached; tests marked ``install`` need a package index and are let through."""
    if request.node.get_closest_marker("install"):
        return
    for method in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, method, _guarded(getattr(socket.socket, method), _host_of_address))
    monkeypatch.setattr(socket, "getaddrinfo", _guarded(socket.getaddrinfo, lambda host, *_, **__: host))
    for name in _PROXIES:
        monkeypatch.setenv(name, _DEAD_PROXY)


@pytest.fixture(autouse=True)
def no_shell_settings(monkeypatch):
    """What a developer has set for his own runs must not decide a test."""
    for name in ("SCL_DEFENSE_DISABLE_PLUGINS", "SCL_DEFENSE_TRACE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def book():
    """``book(kind, n)``: so many more of a kind, written where ``reliability/figures.py`` adds them up, or nowhere."""

    def add(kind: str, n: int = 1) -> None:
        if place := os.environ.get("SCL_DEFENSE_FIGURES"):
            with open(place, "a") as stream:  # one short line: whole even when two workers write
                stream.write(json.dumps({"kind": kind, "n": n}) + "\n")

    return add


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of fake installed distributions, on the path of this process."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield fake_site.Site(folder)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
