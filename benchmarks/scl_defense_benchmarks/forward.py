"""The one forward pass that decides a label: the judge's, and that of every shim that keeps a success."""

import torch
from torch import Tensor, nn

from scl_defense.errors import UserError

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
def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Float32 logits (N, K) of ``images`` (N, C, H, W), in chunks of one size: the last one is filled up."""
    found = []
    for chunk in images.split(CHUNK):
        filler = images[:1].expand(CHUNK - len(chunk), *images.shape[1:])
        found.append(check_logits(network(torch.cat([chunk, filler])), CHUNK)[: len(chunk)].float())
    return torch.cat(found)


def decide(logits: Tensor) -> Tensor:
    """The predicted label of each row, (N,); -1, which is no class, where a logit is NaN."""
    return torch.where(logits.isnan().any(1), -1, logits.nan_to_num().argmax(1))
