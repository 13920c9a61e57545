"""What the libraries do to a network, to random state and to logging; and that the guard takes it back."""

import contextlib
import copy
import logging
import logging.config
import os
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torchattacks
from scl_defense_benchmarks import art_adapter, torchattacks_adapter
from scl_defense_benchmarks.library_guard import library_call, seeded_globals, without_logging_setup
from scl_defense_benchmarks.shims import LibraryNetwork
from torch import nn
from torch.overrides import TorchFunctionMode

from scl_defense.draws import OwnDraws
from scl_defense.threat import ThreatModel

LINF, L2 = ThreatModel("linf", "0.1"), ThreatModel("l2", "0.5")
CALLS = {
    "torchattacks:fgsm": (torchattacks_adapter.FGSM(), LINF),
    "torchattacks:pgd": (torchattacks_adapter.PGD(steps=2), LINF),
    "torchattacks:pgdl2": (torchattacks_adapter.PGD(steps=2), L2),
    "torchattacks:cw": (torchattacks_adapter.CW(c=(1.0,), steps=3), L2),
    "art:fgsm": (art_adapter.FGSM(), LINF),
    "art:pgd": (art_adapter.PGD(steps=2), LINF),
    "art:cw": (art_adapter.CW(steps=2, binary_search_steps=1), L2),
}


@pytest.fixture
def borrowed(network):
    """A network in training with frozen batch norm, one frozen weight and gradients from the last step."""
    net = copy.deepcopy(network).train()
    net.norm1.eval()
    net.conv1.weight.requires_grad_(False)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 7.0) if parameter.requires_grad else None
    return net


def state_of(net: nn.Module):
    return {
        "modes": [module.training for module in net.modules()],
        "values": [value.clone() for value in (*net.parameters(), *net.buffers())],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in net.parameters()],
        "needs": [p.requires_grad for p in net.parameters()],
    }


def assert_same_state(before, after):
    assert before["modes"] == after["modes"]
    assert before["needs"] == after["needs"]
    assert all(torch.equal(a, b) for a, b in zip(before["values"], after["values"], strict=True))
    for a, b in zip(before["grads"], after["grads"], strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a[0] == b[0] and torch.equal(a[1], b[1]))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("outer", [contextlib.nullcontext, torch.no_grad])
def test_the_network_comes_back_as_it_was(borrowed, victims, rng, name, outer):
    attack, threat = CALLS[name]
    before = state_of(borrowed)
    with outer():
        attack(borrowed, victims[0][:3], victims[1][:3], threat, rng())
    assert_same_state(before, state_of(borrowed))


def test_raw_torchattacks_unfreezes_batch_norm(borrowed, victims):
    torchattacks.FGSM(borrowed)(victims[0][:3], victims[1][:3])
    assert borrowed.norm1.training  # the fault that the guard takes back


def test_raw_torchattacks_cw_pollutes_gradients(borrowed, victims):
    torchattacks.CW(borrowed, steps=2)(victims[0][:3], victims[1][:3])
    assert not torch.equal(borrowed.classifier.weight.grad, torch.full_like(borrowed.classifier.weight, 7.0))


def test_raw_art_leaves_eval_mode_and_drops_gradients(borrowed, victims):
    estimator = art_adapter.PyTorchClassifier(
        borrowed, loss=nn.CrossEntropyLoss(), input_shape=(1, 8, 8), nb_classes=10, device_type="cpu"
    )
    art_adapter.FastGradientMethod(estimator, eps=0.1).generate(victims[0][:3].numpy(), victims[1][:3].numpy())
    assert not borrowed.training
    assert not torch.equal(borrowed.classifier.weight.grad, torch.full_like(borrowed.classifier.weight, 7.0))


@pytest.mark.parametrize("name", CALLS)
def test_the_network_comes_back_after_an_exception(borrowed, victims, rng, name):
    attack, threat = CALLS[name]
    before = state_of(borrowed)
    passes = []

    def fail_late(module, inputs, output):
        passes.append(len(output))
        if len(passes) > 1 or name.endswith("fgsm"):
            raise RuntimeError("out of memory, say")

    handle = borrowed.register_forward_hook(fail_late)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        attack(borrowed, victims[0][:3], victims[1][:3], threat, rng())
    handle.remove()
    assert passes
    assert_same_state(before, state_of(borrowed))


def test_raw_torchattacks_stays_in_eval_mode_after_an_exception(borrowed, victims):
    with pytest.raises(IndexError):
        torchattacks.FGSM(borrowed)(victims[0][:3], torch.tensor([99, 0, 0]))
    assert not borrowed.training


def test_batch_norm_statistics_do_not_move_even_when_the_library_trains(borrowed, victims, rng):
    before = state_of(borrowed)
    with library_call(borrowed, rng=rng()):
        borrowed.train()
        borrowed(victims[0])
        borrowed.classifier.weight.requires_grad_(True)
        borrowed.zero_grad()
    assert_same_state(before, state_of(borrowed))


def draws():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


@pytest.mark.parametrize("name", CALLS)
def test_the_global_generators_are_where_they_were(network, victims, rng, name):
    attack, threat = CALLS[name]
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = draws()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    attack(network, victims[0][:3], victims[1][:3], threat, rng())
    assert draws() == expected


def test_raw_libraries_draw_from_the_global_generators(network, victims):
    images, labels = victims[0][:3], victims[1][:3]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    torchattacks.PGD(network, steps=1)(images, labels)
    assert not torch.equal(before, torch.get_rng_state())
    estimator = art_adapter.PyTorchClassifier(
        network, loss=nn.CrossEntropyLoss(), input_shape=(1, 8, 8), nb_classes=10, device_type="cpu"
    )
    np.random.seed(1)
    pgd = art_adapter.ProjectedGradientDescent(estimator, eps=0.1, eps_step=0.1, max_iter=1, num_random_init=1)
    pgd.set_params(verbose=False)
    pgd.generate(images.numpy(), labels.numpy())
    first = np.random.rand()
    np.random.seed(1)
    assert first != np.random.rand()


def test_inside_the_globals_follow_the_passed_generator(rng):
    found = []
    for outside, inside in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(outside)
        np.random.seed(outside)
        random.seed(outside)
        with library_call(rng=rng(inside)):
            found.append(draws())
    assert found[0] == found[1]
    assert all(a != b for a, b in zip(found[0], found[2], strict=True))


def test_two_calls_in_a_row_draw_differently(rng):
    shared, found = rng(1), []
    for _ in range(2):
        with library_call(rng=shared):
            found.append(torch.rand(3).tolist())
    assert found[0] != found[1]


def test_seeded_globals_restore_after_an_exception():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with pytest.raises(ValueError), seeded_globals(4):
        raise ValueError
    assert torch.equal(torch.rand(2), expected)


def test_chatter_is_swallowed_and_gradients_are_recorded(rng, capsys):
    with torch.no_grad(), library_call(rng=rng()):
        print("Attack mode is changed")
        print("progress", file=sys.stderr)
        assert torch.is_grad_enabled()
    assert capsys.readouterr() == ("", "")


def test_logging_is_as_it_was(rng):
    root, ours = logging.getLogger(), logging.getLogger("scl_defense.test_guard")
    handler = logging.NullHandler()
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        before = [(item.level, item.propagate, item.disabled, list(item.handlers)) for item in (root, ours)]
        with library_call(rng=rng()):
            logging.disable(logging.CRITICAL)
            for item in (root, ours):
                item.setLevel(logging.CRITICAL)
                item.addHandler(logging.NullHandler())
            ours.propagate, ours.disabled = False, True
            ours.removeHandler(handler)
        assert [(item.level, item.propagate, item.disabled, list(item.handlers)) for item in (root, ours)] == before
        assert ours.isEnabledFor(logging.INFO)
    finally:
        ours.removeHandler(handler)


def test_only_the_named_package_is_kept_from_configuring_logging(tmp_path):
    original = logging.config.dictConfig
    passed = []
    logging.config.dictConfig = passed.append
    try:
        other = {"version": 1, "loggers": {"other": {}}}
        with without_logging_setup("somepackage"):
            logging.config.dictConfig({"version": 1, "loggers": {"somepackage": {}, "tests": {}}})
            logging.config.dictConfig(other)
        assert passed == [other]
        assert logging.config.dictConfig == passed.append
    finally:
        logging.config.dictConfig = original
        logging.getLogger("somepackage").handlers.clear()


IMPORTS = textwrap.dedent(
    """
    import importlib, logging, sys
    handler = logging.FileHandler(sys.argv[1], mode="w")
    logging.getLogger("run").addHandler(handler)
    logging.getLogger("run").warning("first")
    from scl_defense_benchmarks import art_adapter
    logging.getLogger("run").warning("adapter imported")
    assert logging.getLogger("tests").handlers == [], "ART configured the logger of somebody's tests"
    importlib.reload(sys.modules["art"])  # what a bare ``import art`` does
    logging.getLogger("run").warning("art imported")
    """
)


@pytest.mark.slow
def test_importing_art_kills_log_files_and_importing_the_adapter_does_not(tmp_path):
    log = tmp_path / "run.log"
    command, home = [sys.executable, "-c", IMPORTS, str(log)], os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=home)
    assert done.returncode == 0, done.stderr
    # Nothing is written after the bare import: the handler was closed, and mode "w" never opens again.
    assert log.read_text().splitlines() == ["first", "adapter imported"]
    assert (tmp_path / ".art").is_dir()  # documented in library_guard.py; there is no switch against it


def test_listing_the_attacks_imports_no_library():
    script = (
        "import sys; from scl_defense_benchmarks import hooks; "
        "names = []; hooks.register_attacks(lambda name, target, *, summary: names.append(name)); "
        "heavy = {'torch', 'art', 'torchattacks', 'numpy', 'scipy', 'rich'} & set(sys.modules); "
        "assert len(names) > 10 and not heavy, (names, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


class Draws(nn.Module):
    """A network that draws never, always, or only where its images want a gradient."""

    def __init__(self, when):
        super().__init__()
        self.when, self.layer = when, nn.Linear(4, 3)

    def forward(self, images):
        with Negated():  # a mode of the network's own
            flat = torch.flatten(images, 1)
        drawn = self.when == "always" or (self.when == "gradient" and images.requires_grad)
        return self.layer(flat + torch.rand(flat.shape) if drawn else flat)


class Negated(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        return -made if func is torch.flatten else made


@pytest.mark.parametrize("when", ["never", "always", "gradient"])
@pytest.mark.parametrize("wanted", [False, True])
def test_a_pass_is_unheard_by_what_catches_draws_once_it_was_seen_to_draw_nothing(monkeypatch, when, wanted):
    heard, catch = [], OwnDraws.__torch_function__

    def hear(self, func, types, args=(), kwargs=None):
        heard.append(func.__name__)
        return catch(self, func, types, args, kwargs)

    monkeypatch.setattr(OwnDraws, "__torch_function__", hear)
    network, images = Draws(when), torch.rand(2, 1, 2, 2).requires_grad_(wanted)
    draws = when == "always" or (when == "gradient" and wanted)
    torch.manual_seed(3)
    expected = [network(images) for _ in range(3)] + [torch.rand(2)]
    assert torch.equal(expected[0], expected[1]) is not draws
    with OwnDraws(3):
        inside = LibraryNetwork(LibraryNetwork(network, images.device), images.device)  # a pass inside a pass
        found, passes = [], []
        for _ in range(3):
            heard.clear()
            found.append(inside(images))
            passes.append("linear" in heard)
        assert passes == [True, draws, draws]
        heard.clear()
        found.append(torch.rand(2))  # the library's own draws are caught as ever
        assert heard == ["rand"]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_pass_without_a_gradient_says_nothing_of_one_with_it():
    network, images = Draws("gradient"), torch.rand(2, 1, 2, 2)
    wanting = images.clone().requires_grad_()
    torch.manual_seed(3)
    expected = [network(wanting) for _ in range(2)]
    with OwnDraws(3):
        shim = LibraryNetwork(network, images.device)
        shim(images), shim(images)  # from here on unheard
        for one in expected:
            assert torch.equal(shim(wanting), one)
