"""Devices, precision, seeds and signals."""

import json
import os
import signal
import sys
import threading

import pytest
import torch

from scl_defense.errors import UserError
from scl_defense.runtime import (
    STOPS,
    autocast,
    derive_seed,
    deterministic,
    select_device,
    stop_on_signal,
    stream,
    versions,
)

# -- devices


def test_auto_takes_cuda_where_there_is_one(monkeypatch):
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert select_device("auto").type == expected
    assert select_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cuda:-1", "cudaa", "meta", "xpu", "Auto", "8", "cpu,cuda"])
def test_unknown_devices_are_one_line(name):
    with pytest.raises(UserError) as caught:
        select_device(name)
    assert "\n" not in str(caught.value)
    assert f"'{name}'" in str(caught.value)


@pytest.mark.parametrize(("count", "name"), [(0, "cuda"), (0, "cuda:0"), (1, "cuda:1"), (2, "cuda:7")])
def test_a_missing_gpu_says_how_many_there_are(monkeypatch, count, name):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UserError, match=f"{count} CUDA devices found; try --device cpu"):
        select_device(name)


def test_a_gpu_that_is_there_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device("cuda:1") == torch.device("cuda:1")


def test_missing_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="try --device cpu"):
        select_device("mps")


# -- precision


def test_precision_is_that_of_the_products():
    cpu, matrix = torch.device("cpu"), torch.ones(2, 2)
    with autocast(cpu, "fp32"):
        assert (matrix @ matrix).dtype == torch.float32
    with autocast(cpu, "bf16"):
        assert (matrix @ matrix).dtype == torch.bfloat16
    assert (matrix @ matrix).dtype == torch.float32


# -- seeds


def test_seeds_of_different_streams_differ():
    asked = [
        (seed, purpose, *counters)
        for seed in (0, 1, 11)
        for purpose in ("augment", "attack", "1")
        for counters in ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (11,), (1, 1), (1, 11), (11, 1))
    ]
    assert len({derive_seed(*key) for key in asked}) == len(asked)


def test_seeds_fit_every_generator():
    seeds = [derive_seed(seed, "x", step) for seed in (0, 2**40, -1) for step in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62 and len({seed % 2 for seed in seeds}) == 2
    torch.Generator().manual_seed(2**63 - 1)


def test_seeds_are_the_same_in_every_process_and_release():
    """Pinned: resuming a run of an older release must continue the same streams."""
    assert derive_seed(0, "augment", 3, 14) == 80505723761232531
    drawn = torch.randint(0, 1000, (4,), generator=stream(0, "augment", 3, 14))
    assert torch.equal(drawn, torch.randint(0, 1000, (4,), generator=torch.Generator().manual_seed(80505723761232531)))


def test_streams_are_independent_of_each_other_and_of_the_global_generator():
    before = torch.get_rng_state()
    first, again, next_step = (torch.rand(4, generator=stream(0, "attack", 0, step)) for step in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, next_step)
    assert torch.equal(torch.get_rng_state(), before)


# -- what made a number


def test_versions_name_what_can_change_a_number():
    found = versions()
    assert {"python", "platform", "torch", "torchvision", "numpy", "torchattacks", "scl-defense"} <= set(found)
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert json.loads(json.dumps(found)) == found


def test_a_missing_package_is_said_to_be_missing(monkeypatch):
    import importlib.metadata as metadata

    original = metadata.version

    def version(name):
        if name == "torchattacks":
            raise metadata.PackageNotFoundError(name)
        return original(name)

    monkeypatch.setattr(metadata, "version", version)
    assert versions()["torchattacks"] == "missing"


# -- the same numbers on every device


def test_deterministic_algorithms_are_asked_for_inside_alone(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_cannot_be_deterministic_is_one_line():
    with pytest.raises(UserError, match=r"--deterministic cannot be kept: put_ .*--device cpu"), deterministic():
        torch.zeros(3).put_(torch.tensor([1, 1]), torch.ones(2))
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="another matter"), deterministic():
        raise RuntimeError("another matter")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_training_on_cuda_ends_with_the_same_weights(tmp_path):
    from scl_defense import checkpoint, train

    recipe = {"limit": 256, "epochs": 2, "val_limit": 32, "val_steps": 1, "device": "cuda", "deterministic": True}
    runs = [train(**recipe, out=str(tmp_path), name=name) for name in ("one", "two")]
    one, two = (checkpoint.read(run.last)[0]["network"] for run in runs)
    assert all(torch.equal(one[name], two[name]) for name in one)


# -- signals


@pytest.mark.parametrize("number", STOPS)
def test_the_first_signal_asks_and_the_second_stops(number):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_on_signal() as request:
        assert not request
        os.kill(os.getpid(), number)
        assert request and request.signum == number
        os.kill(os.getpid(), number)
        pytest.fail("the second signal must stop at once")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_handlers_come_back_after_an_exception():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), stop_on_signal():
        assert signal.getsignal(signal.SIGTERM) != before[1]
        _ = 1 / 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_each_request_starts_afresh():
    for _ in range(2):
        with stop_on_signal() as request:
            assert not request
            os.kill(os.getpid(), signal.SIGTERM)
            assert request


def test_outside_the_main_thread_signals_keep_their_meaning():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with stop_on_signal() as request:
            seen.append((bool(request), signal.getsignal(signal.SIGINT) == before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, True)]
