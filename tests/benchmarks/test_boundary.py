"""FAB's search and its projections, against torchattacks' own and against bisection in float64."""

import pytest
import torch
import torchattacks
from scl_defense_benchmarks import boundary
from scl_defense_benchmarks.boundary import nearest_found
from scl_defense_benchmarks.projections import SPARE, Planes
from scl_defense_benchmarks.torchattacks_adapter import FAB
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchattacks.attacks import fab as library_fab

from scl_defense.threat import ThreatModel

NORMS = {"linf": "Linf", "l2": "L2"}


def _moves(points: Tensor, normals: Tensor, offsets: Tensor, norm: str) -> Tensor:
    planes = Planes(normals, norm, [torch.full_like(points, torch.nan) for _ in range(SPARE)])
    return planes.moves((normals * points).sum(1) - offsets, -points, 1 - points)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("far", [0.0, 0.02, 0.1, 0.5, 4.0])
@pytest.mark.parametrize("size", [1, 7, 300])
def test_a_projection_without_sorting_is_torchattacks_own(far, size, norm):
    rng = torch.Generator().manual_seed(size)
    points = torch.rand(40, size, generator=rng).round(decimals=2)  # equal rooms, and some pixels on their walls
    normals = torch.randn(40, size, generator=rng) * torch.rand(40, size, generator=rng) ** 3
    normals[:, ::5] *= torch.rand(40, 1, generator=rng) < 0.5  # zeros in some
    normals[normals.abs() < 1e-6] = 0  # which the library's L2 takes for zero from 1e-8 on
    aims = points + far * (torch.rand(40, size, generator=rng) - 0.5)
    offsets = (normals * aims).sum(1)
    kept = [value.clone() for value in (points, normals, offsets)]
    found = _moves(points, normals, offsets, norm)
    library = getattr(library_fab, f"projection_{norm}")(points, normals, offsets)
    torch.testing.assert_close(found, library, rtol=1e-4, atol=2e-6)
    assert all(map(torch.equal, (points, normals, offsets), kept))


@pytest.mark.parametrize("norm", NORMS)
def test_a_projection_lands_on_the_plane_by_the_shortest_way(norm):
    """Against bisection in float64 on how far to go along the steepest direction."""
    rng = torch.Generator().manual_seed(0)
    points, normals = torch.rand(30, 50, generator=rng).double(), torch.randn(30, 50, generator=rng).double()
    offsets = (normals * torch.rand(30, 50, generator=rng)).sum(1)  # a point of the box lies on every plane
    moves = _moves(points, normals, offsets, norm)
    torch.testing.assert_close((normals * (points + moves)).sum(1), offsets)
    assert ((points + moves) >= -1e-12).all() and ((points + moves) <= 1 + 1e-12).all()
    aim = torch.sign(offsets - (normals * points).sum(1))[:, None]
    direction = aim * (torch.sign(normals) if norm == "linf" else normals)
    low, high = torch.zeros(30, 1).double(), torch.full((30, 1), 1000.0).double()
    for _ in range(80):
        middle = (low + high) / 2
        reached = (normals * (points + middle * direction).clamp(0, 1)).sum(1, keepdim=True)
        short = (offsets[:, None] - reached) * aim > 0
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    torch.testing.assert_close(points + moves, (points + high * direction).clamp(0, 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("small", [1e-4, 1e-6, 1e-10])
def test_one_coordinate_that_outweighs_all_others_and_cannot_move(norm, small):
    """Against bisection in float64: in float32 the others are nothing beside it, and they alone are free."""
    rng = torch.Generator().manual_seed(3)
    points, normals = torch.rand(20, 200, generator=rng), torch.randn(20, 200, generator=rng) * small
    points[:, 0], normals[:, 0] = 0, 1  # it would have to go down
    gaps = 0.05 * normals[:, 1:].abs().sum(1)
    planes = Planes(normals, norm, [torch.empty_like(points) for _ in range(SPARE)])
    moves = planes.moves(gaps, -points, 1 - points).double()
    exact, room = normals.double(), points.double()
    direction = -(exact.sign() if norm == "linf" else exact)
    low, high = torch.zeros(20, 1).double(), torch.full((20, 1), 1e15).double()
    for _ in range(200):
        middle = (low + high) / 2
        ends = (-room, 1 - room)
        gained = -(exact * (middle * direction).clamp(*ends)).sum(1, keepdim=True)
        short = gained < gaps.double()[:, None]
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    expected = (high * direction).clamp(-room, 1 - room)
    torch.testing.assert_close(moves, expected, rtol=1e-3, atol=1e-5)


def _network() -> nn.Module:
    torch.manual_seed(1)
    first = nn.Linear(50, 20)
    first.weight.data *= 3
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), nn.Linear(20, 6)).eval().requires_grad_(False)


def _case(count: int = 23) -> tuple[nn.Module, Tensor, Tensor]:
    network = _network()
    images = torch.rand(count, 2, 5, 5, generator=torch.Generator().manual_seed(5))
    return network, images, network(images).argmax(1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_the_search_is_torchattacks_own(norm, rank, rows, monkeypatch):
    network, images, labels = _case()
    monkeypatch.setattr(boundary, "NUMBERS", rows * images[0].numel())
    attack = torchattacks.FAB(network, norm=NORMS[norm], steps=25)
    attack.multi_targeted, attack.target_class = True, rank
    iterates, ask = [], attack.get_logits
    attack.get_logits = lambda points: (iterates.append(points.detach().clone()), ask(points))[1]
    expected = attack.attack_single_run_targeted(images, labels)
    last = iterates[-1]
    attack.get_logits = ask
    kept = images.clone(), labels.clone()
    targets = network(images).argsort(1)[:, -rank]
    found = nearest_found(attack, images, labels, targets)
    torch.testing.assert_close(found.nearest, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.last, last, rtol=1e-3, atol=1e-4)
    assert found.distance.isfinite().sum() > 15 and found.seen.all()
    measured = (found.nearest - images).flatten(1)
    measured = measured.abs().amax(1) if norm == "linf" else measured.norm(dim=1)
    wrong = found.distance.isfinite()
    torch.testing.assert_close(found.distance[wrong], measured[wrong])
    assert (network(found.nearest[wrong]).argmax(1) != labels[wrong]).all() and (measured[~wrong] == 0).all()
    assert torch.equal(images, kept[0]) and torch.equal(labels, kept[1])


@pytest.mark.parametrize("norm", NORMS)
def test_an_image_without_a_finite_slope_stays_where_it_is_and_the_others_go_on(norm):
    class Broken(nn.Module):
        def __init__(self, network: nn.Module):
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> Tensor:
            logits = self.network(images)
            # The root's slope is infinite at zero, and that of what it is multiplied with not a number.
            return logits + (images[:, 0, 0, :1] - images[:, 0, 0, :1].detach() * marked(images)).abs().sqrt() * 0

    def marked(images: Tensor) -> Tensor:
        return (images[:, 1, 4, 4:5] > 2 / 3).float().detach()

    network, images, labels = _case()
    images = images.clone()
    images[:, 0, 0, 0] = images[:, 0, 0, 0].clamp(min=0.1)
    attack, whole = (torchattacks.FAB(net, norm=NORMS[norm], steps=3) for net in (Broken(network), network))
    targets = network(images).argsort(1)[:, -2]
    found, expected = (nearest_found(one, images, labels, targets) for one in (attack, whole))
    stopped = images[:, 1, 4, 4] > 2 / 3
    assert 3 < stopped.sum() < 20
    assert torch.equal(found.last[stopped], images[stopped]) and not found.seen[stopped].any()
    clear = ~stopped & ((expected.last[:, 1, 4, 4] < 0.6) & (images[:, 1, 4, 4] < 0.4))
    assert clear.sum() > 3 and found.seen[clear].all()
    torch.testing.assert_close(found.last[clear], expected.last[clear], rtol=1e-4, atol=1e-5)
    assert found.nearest.isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_no_scale_of_the_logits_reaches_a_step(norm, scale):
    class Scaled(nn.Module):
        def __init__(self, network: nn.Module):
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> Tensor:
            return self.network(images) * scale

    network, images, labels = _case(9)
    targets = network(images).argsort(1)[:, -2]
    found, expected = (
        nearest_found(torchattacks.FAB(one, norm=NORMS[norm], steps=4), images, labels, targets)
        for one in (Scaled(network), network)
    )
    torch.testing.assert_close(found.last, expected.last, rtol=1e-4, atol=1e-5)
    assert found.seen.all()


def test_a_network_that_computes_parts_again_on_the_way_back_is_attacked():
    class Checkpointed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return checkpoint(network, images, use_reentrant=True)

    network, images, labels = _case(9)
    made = [
        FAB(steps=5, targets=2)(one, images, labels, ThreatModel("linf", "0.1"), torch.Generator().manual_seed(0))
        for one in (Checkpointed(), network)
    ]
    assert torch.equal(*made) and not torch.equal(made[0], images)


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_slope_nothing_was_tried(norm):
    network, images, labels = _case(6)
    flat = nn.Sequential(network, nn.Hardtanh(1e3, 2e3))  # the same logits everywhere
    labels = torch.zeros_like(labels)
    made = FAB(steps=3, targets=2)(flat, images, labels, ThreatModel(norm, "0.1"), torch.Generator().manual_seed(0))
    assert torch.equal(made, images)
