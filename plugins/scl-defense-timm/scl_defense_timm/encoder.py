"""A network of timm as an encoder."""

import inspect
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from scl_defense.errors import UserError, nearest
from scl_defense.types import Field, component


@component
class TimmEncoder:
    """A network of timm (Wightman 2019, PyTorch Image Models) without its classifier: pooled features, random weights.

    It is built for the images that it gets: their channels and, where the architecture is made for one size (vision
    transformers), their size. ``pretrained=true`` downloads timm's weights for the architecture; they were trained on
    images normalised as timm says, while here mean and std are those of the data.
    """

    name: Annotated[
        str, Field(min_length=1, description="name in timm, like convnext_atto; timm.list_models() has all")
    ] = "resnet10t"
    pretrained: Annotated[bool, Field(description="start from timm's weights, which are downloaded")] = False
    drop: Annotated[float, Field(ge=0, lt=1, description="dropout before the head")] = 0.0
    drop_path: Annotated[float, Field(ge=0, lt=1, description="stochastic depth")] = 0.0

    def __call__(self, image_shape: tuple[int, int, int]) -> nn.Module:
        import timm

        bare = self.name.partition(".")[0]  # what follows the dot names weights
        if not timm.is_model(bare):
            raise UserError(f"timm has no model '{self.name}'{nearest(bare, timm.list_models())}")
        channels, height, width = image_shape
        given: dict[str, Any] = {"in_chans": channels, "num_classes": 0, "pretrained": self.pretrained}
        given |= {
            name: value for name, value in (("drop_rate", self.drop), ("drop_path_rate", self.drop_path)) if value
        }
        if _one_size(bare):
            given["img_size"] = (height, width)
        said = f"timm's '{self.name}' cannot be built for images {channels}x{height}x{width}"
        try:
            network = timm.create_model(self.name, **given)
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise UserError(f"{said}: {type(error).__name__}: {text}; choose another name") from None
        encoder = Encoder(network)
        _try(encoder, image_shape, said)
        return encoder


class Encoder(nn.Module):
    """(N, C, H, W) -> (N, D): timm's features, pooled."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.feature_dim = int(network.num_features)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


def _one_size(name: str) -> bool:
    """Whether an architecture is built for one image size, as vision transformers are."""
    import timm

    if timm.models.is_model(name):
        config = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
        if config is not None and config.fixed_input_size:
            return True
    return "img_size" in inspect.signature(timm.models.model_entrypoint(name)).parameters


def _try(encoder: Encoder, image_shape: tuple[int, int, int], said: str) -> None:
    """One pass in eval mode: small images end as nothing in a deep network, and some pool to another width."""
    before = torch.random.get_rng_state()
    try:
        with torch.no_grad():
            features = encoder.eval()(torch.full((2, *image_shape), 0.5))
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{said}: {type(error).__name__}: {text}; choose another name, or larger images") from None
    finally:
        encoder.train()
        torch.random.set_rng_state(before)
    if features.dim() != 2:
        raise UserError(
            f"{said}: it gives features {tuple(features.shape)} and not one row an image; choose another name"
        )
    encoder.feature_dim = features.shape[1]  # heads may be narrower or wider than num_features
