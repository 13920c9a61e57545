"""What is measured on a network while it trains: the linear probe, clean accuracy and a short PGD.

The probe is the standard linear protocol (SLF): logistic regression on the frozen encoder's features, solved to
convergence by L-BFGS, one fixed recipe for every method. The robust validation accuracy chooses the best checkpoint;
it is no evaluation of record (that is the benchmark layer's).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from scl_defense.ascent import ascend
from scl_defense.data import Split
from scl_defense.folding import Folding
from scl_defense.guard import frozen
from scl_defense.models import Network
from scl_defense.runtime import ranks
from scl_defense.sharing import features_of
from scl_defense.threat import ThreatModel

PROBE_DECAY = 1e-3
PROBE_ITERATIONS = 200


def fit_probe(network: Network, split: Split, *, batch_size: int = 512) -> None:
    """Fit ``network.classifier`` on the frozen, un-augmented features of ``split`` (multinomial logistic regression).

    Features are standardised for the solver and the scaling is folded into the weights, so the classifier stays one
    linear layer. Deterministic: no random numbers, full batches.
    """
    with frozen(network), torch.no_grad():
        features = torch.cat([features_of(network, split, part) for part in _parts(len(split), batch_size)])
    weight, bias = fit_linear(features.float(), split.labels, network.num_classes)
    with torch.no_grad():
        network.classifier.weight.copy_(weight)
        network.classifier.bias.copy_(bias)
        ranks().as_first([network.classifier.weight, network.classifier.bias])


def fit_linear(features: Tensor, labels: Tensor, num_classes: int, decay: float = PROBE_DECAY) -> tuple[Tensor, Tensor]:
    """Minimise mean cross-entropy + decay/2 ||W||^2 over standardised features. Returns weight (K, D), bias (K,)."""
    mean, std = features.mean(0), features.std(0).clamp(min=1e-5)
    scaled = (features - mean) / std
    weight = torch.zeros(num_classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=features.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=PROBE_ITERATIONS, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(scaled, weight, bias), labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    weight, bias = weight.detach(), bias.detach()
    return weight / std, bias - (weight / std) @ mean


def accuracy(
    network: Network,
    split: Split,
    threat: ThreatModel,
    *,
    steps: int,
    rng: torch.Generator,
    batch_size: int = 512,
    folding: Folding | None = None,
) -> tuple[float, float]:
    """Clean accuracy, and the share still right after PGD on the cross-entropy (``steps`` steps, random start).

    Several processes share out the images of every batch; what is drawn for an image is what one process would draw.
    folding: batch norms that the attack passes need not compute; what is right is decided by the network as it is.
    """
    everybody, right, survived = ranks(), 0, 0
    with frozen(network):
        for part in _parts(len(split), batch_size):
            rows = everybody.rows(part.stop - part.start)
            own = slice(part.start + rows.start, part.start + rows.stop)
            images, labels = split.float_images(own), split.labels[own]
            with torch.no_grad():
                correct = network(images).argmax(1) == labels if len(images) else labels == labels
            counts = everybody.everyones(int(correct.sum()))
            before, count = sum(counts[: everybody.rank]), sum(counts)
            right += count
            images, labels = images[correct], labels[correct]
            if count == 0:
                continue

            def loss(adversarial: Tensor, labels: Tensor = labels) -> Tensor:
                return F.cross_entropy(network(adversarial), labels, reduction="none")

            shared = everybody.lockstep(slice(before, before + len(images)), count, rng)
            with shared, (folding or Folding()).folded(network):
                adversarial = ascend(loss, images, threat, steps=steps, rng=rng)
            if len(images):
                with torch.no_grad():
                    survived += int((network(adversarial).argmax(1) == labels).sum())
    survived = int(everybody.sum(torch.tensor(survived)))
    return right / len(split), survived / len(split)


def _parts(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
