"""Losses in blocks against the whole matrix, and what they must not do: store it, or depend on where blocks end."""

import pytest
import torch
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scl_defense import blocks
from scl_defense.blocks import class_sums, logsumexp_all, logsumexp_others
from scl_defense.losses import infonce, ntxent, supcon, unit

CLOSE = {torch.float32: 1e-6, torch.float64: 1e-10}
KINDS = ["classes", "pairs", "lonely"]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels_of(kind, rows):
    """Ten classes; pairs in shuffled order; or a few pairs among rows that are alone in their class."""
    if kind == "classes":
        return torch.arange(rows) * 7 % 10
    if kind == "pairs":
        return (torch.arange(rows) // 2)[torch.randperm(rows, generator=torch.Generator().manual_seed(1))]
    return (torch.arange(rows) - 3).clamp(min=rows // 2)


def dense_supcon(embed, labels, temperature):
    z = torch.nn.functional.normalize(embed, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool)
    similarity = z @ z.T / temperature
    logarithm = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    positive = (labels[:, None] == labels[None, :]) & ~itself
    count = positive.sum(1)
    return -(torch.where(positive, logarithm, 0).sum(1) / count.clamp(min=1))[count > 0].mean()


def dense_infonce(embed, references, temperature):
    z, r = (torch.nn.functional.normalize(rows, dim=1) for rows in (embed, references))
    return torch.nn.functional.cross_entropy(z @ r.T / temperature, torch.arange(len(z)), reduction="none")


def value_and_gradients(loss, *tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    value = loss(*leaves)
    return value.detach(), torch.autograd.grad(value.sum(), leaves)


def assert_same(left, right, *tensors):
    """Values and gradients (in length) agree to 1e-6 in float32 and to 1e-10 in float64, relatively."""
    close = CLOSE[tensors[0].dtype]
    (value, gradients), (expected, wanted) = (value_and_gradients(loss, *tensors) for loss in (left, right))
    torch.testing.assert_close(value, expected, rtol=close, atol=close)
    for gradient, other in zip(gradients, wanted, strict=True):
        assert (gradient - other).norm() <= close * other.norm().clamp(min=1e-6)


# -- the same numbers


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("rows", [21, blocks.ROWS, blocks.ROWS + 1, 2 * blocks.ROWS + 88, blocks.KEPT + 76])
@pytest.mark.parametrize("kind", KINDS)
def test_supcon_is_the_dense_form(kind, rows, dtype):
    labels = labels_of(kind, rows)
    assert_same(
        lambda z: supcon(z, labels, 0.1),
        lambda z: dense_supcon(z.double(), labels, 0.1).to(dtype),
        3 * normal(rows, 16, dtype=dtype),
    )


@pytest.mark.parametrize("temperature", [0.005, 0.011, 0.02, 3.0])
def test_any_temperature(temperature):
    """Below 1/80 exp(1 / temperature) does not fit into float32."""
    labels = labels_of("classes", 300)
    for dtype in CLOSE:
        embed = normal(300, 8, dtype=dtype)
        embed[100:103] = embed[50]  # the largest similarity there is
        value, (gradient,) = value_and_gradients(lambda z: supcon(z, labels, temperature), embed)
        expected, (wanted,) = value_and_gradients(lambda z: dense_supcon(z, labels, temperature), embed.double())
        torch.testing.assert_close(value.double(), expected, rtol=20 * CLOSE[dtype], atol=0)
        assert (gradient - wanted).norm() <= 20 * CLOSE[dtype] * wanted.norm()


@pytest.mark.slow
@pytest.mark.parametrize("views", [2, 3])
def test_ntxent_and_supcon_are_those_of_pytorch_metric_learning(views):
    embed, identity = normal(views, 220, 9), torch.arange(220).repeat(views)
    assert_same(lambda z: ntxent(z, 0.2), lambda z: SupConLoss(temperature=0.2)(z.flatten(0, 1), identity), embed)
    if views == 2:
        assert_same(lambda z: ntxent(z, 0.2), lambda z: NTXentLoss(temperature=0.2)(z.flatten(0, 1), identity), embed)
    labels = labels_of("classes", 660)
    assert_same(lambda z: supcon(z, labels, 0.2), lambda z: SupConLoss(temperature=0.2)(z, labels), normal(660, 9))


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("rows", [64, 257, 700])
def test_infonce_is_a_cross_entropy(rows, dtype):
    assert_same(
        lambda z, r: infonce(z, r, 0.1),
        lambda z, r: dense_infonce(z.double(), r.double(), 0.1).to(dtype),
        normal(rows, 12, dtype=dtype),
        normal(rows, 12, seed=1, dtype=dtype),
    )


def test_infonce_rows_are_separable_in_blocks_too():
    embed, references = normal(400, 6).requires_grad_(), normal(400, 6, seed=1)
    (gradient,) = torch.autograd.grad(infonce(embed, references)[300], embed)
    assert gradient[300].abs().sum() > 0
    assert not gradient[torch.arange(400) != 300].any()


@pytest.mark.parametrize("kept", [0, 100])
@pytest.mark.parametrize("rows", [2, 4, 11])
def test_gradients_by_finite_differences(rows, kept, monkeypatch):
    monkeypatch.setattr(blocks, "ROWS", 4)
    monkeypatch.setattr(blocks, "KEPT", kept)
    z, references = unit(normal(rows, 3)).requires_grad_(), unit(normal(5, 3, seed=1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: logsumexp_others(z, 0.3), z)
    assert torch.autograd.gradcheck(lambda z: logsumexp_others(z, 0.0014), z, eps=1e-9, rtol=1e-3, atol=1e-1)
    assert torch.autograd.gradcheck(lambda z, r: logsumexp_all(z, r, 0.3), (z, references))
    group = torch.arange(rows) * 3 % 4
    assert torch.autograd.gradcheck(lambda z: class_sums(z, group, 4), z)


@pytest.mark.parametrize("classes", [1, 3, blocks.CLASSES, blocks.CLASSES + 1, 3 * blocks.CLASSES])
def test_class_sums(classes):
    """An empty class has the sum 0; more than CLASSES are summed in sorted order."""
    z, group = normal(500, 4), torch.arange(500) * 13 % max(classes - 1, 1)
    expected = torch.zeros(classes, 4, dtype=torch.float64).index_add(0, group, z)
    torch.testing.assert_close(class_sums(z, group, classes), expected, rtol=0, atol=1e-12)


# -- how they are computed


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that an operation has returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes():
                self.numbers = max(self.numbers, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def memory(loss, *tensors):
    """(numbers in the largest tensor, numbers saved for the backward pass)."""
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with Largest() as mode, saved_tensors_hooks(pack, lambda tensor: tensor):
        value_and_gradients(loss, *tensors)
    return mode.numbers, sum(saved)


LARGE = {
    "supcon": lambda z: supcon(z, labels_of("classes", len(z))),
    "supcon-pairs": lambda z: supcon(z, labels_of("pairs", len(z))),
    "supcon-cold": lambda z: supcon(z, labels_of("classes", len(z)), 0.005),
    "ntxent": lambda z: ntxent(z.view(2, -1, z.shape[1])),
    "infonce": lambda z: infonce(z, z.roll(1, 0).detach()),
}


@pytest.mark.parametrize("name", LARGE)
def test_memory_is_linear_in_the_rows(name):
    """Doubling the rows doubles every tensor at most; the similarities would have four times as many numbers."""
    (largest, saved), (twice, saved_twice) = (
        memory(LARGE[name], normal(rows, 8, dtype=torch.float32)) for rows in (1280, 2560)
    )
    assert twice <= 2 * largest and saved_twice <= 2 * saved
    assert twice <= 2560 * blocks.ROWS and saved_twice <= 2560 * 8 * 8
    assert memory(lambda z: dense_supcon(z, labels_of("classes", len(z)), 0.1), normal(512, 8))[0] >= 512**2


@pytest.mark.parametrize("name", LARGE)
def test_two_runs_are_bitwise_equal_and_autocast_changes_nothing(name):
    embed = normal(1200, 8, dtype=torch.float32)
    value, (gradient,) = value_and_gradients(LARGE[name], embed)
    torch.use_deterministic_algorithms(True)
    try:
        again, (same,) = value_and_gradients(LARGE[name], embed)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(again, value) and torch.equal(same, gradient)
    with torch.autocast("cpu", torch.bfloat16):  # the backward pass inside it, too
        again, (same,) = value_and_gradients(LARGE[name], embed)
    assert torch.equal(again, value) and torch.equal(same, gradient)


@pytest.mark.parametrize("rows", [300, 1200])
def test_the_graph_can_be_kept_but_has_no_second_derivative(rows):
    embed = normal(rows, 8).requires_grad_()
    loss = supcon(embed, labels_of("classes", rows))
    first, second = (torch.autograd.grad(loss, embed, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(loss, embed, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
