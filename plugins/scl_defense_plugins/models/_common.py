"""What the encoders of this folder share: the check of the image shape and He's initialisation."""

from torch import nn

from scl_defense.errors import UserError


def check_shape(name: str, image_shape: tuple[int, int, int], smallest: int) -> int:
    """The number of channels. Raises :class:`UserError` for images that this encoder would shrink to nothing."""
    channels, height, width = image_shape
    if min(height, width) < smallest:
        raise UserError(
            f"model '{name}' needs images of at least {smallest}x{smallest}, not {height}x{width}; "
            "use small-cnn (from 8x8) or larger images"
        )
    return channels


def initialise(module: nn.Module) -> None:
    """He et al. 2015: convolutions normal with variance 2 / fan-out; batch norm starts as the identity."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
