"""The one forward pass that decides a label: the judge's, and that of every shim that keeps a success."""

import torch
from torch import Tensor, nn

from scl_defense.errors import UserError

#: Of the largest logit: so far apart two logits can lie by rounding alone. bfloat16 keeps 8 bits of a number; float32
#: 24, of which a network that is computed in another order loses some.
ROUNDING = {"fp32": 2.0**-14, "bf16": 2.0**-7}

# Every forward pass of a check has this many images: how many the attack had at a time must not reach the label.
CHUNK = 64


def check_logits(output: object, count: int) -> Tensor:
    """``output`` if it is one floating tensor (count, K) with K >= 2; raises :class:`UserError` otherwise."""
    if not isinstance(output, Tensor):
        raise UserError(
            f"the network returns a {type(output).__name__}; an attack needs one tensor of logits (N, K): "
            "wrap the network so that it returns the logits alone"
        )
    if output.dim() != 2 or len(output) != count or output.shape[1] < 2 or not output.is_floating_point():
        raise UserError(
            f"the network returns {output.dtype} {tuple(output.shape)} for {count} images; an attack needs floating "
            f"point logits ({count}, K) with K >= 2 classes"
        )
    return output


@torch.no_grad()
def logits_of(network: nn.Module, images: Tensor, multiple: int = CHUNK) -> Tensor:
    """Float32 logits (N, K) of ``images`` (N, C, H, W), in chunks of one size: the last one is filled up.

    multiple: what decides no verdict, and is always asked of the same images together, may do with a smaller last
    chunk: filled up to a multiple of that.
    """
    found = []
    for chunk in images.split(CHUNK):
        size = len(chunk) + -len(chunk) % multiple
        filler = images[:1].expand(size - len(chunk), *images.shape[1:])
        found.append(check_logits(network(torch.cat([chunk, filler])), size)[: len(chunk)].float())
    return torch.cat(found)


def decide(logits: Tensor) -> Tensor:
    """The predicted label of each row, (N,); -1, which is no class, where a logit is NaN."""
    return torch.where(logits.isnan().any(1), -1, logits.nan_to_num().argmax(1))


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y per image, (N,): positive where the label is wrong (Carlini & Wagner 2017, f_6)."""
    own = logits.gather(1, labels[:, None])
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own.squeeze(1)


def clearly_wrong(logits: Tensor, labels: Tensor, precision: str = "fp32") -> Tensor:
    """(N,): another logit is the largest, by more than rounding in ``precision`` can do (:data:`ROUNDING`)."""
    return margin(logits, labels) > ROUNDING[precision] * logits.abs().amax(1)
