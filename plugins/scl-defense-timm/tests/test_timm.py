"""timm's networks as encoders: the contract, and their features against timm's own."""

import pytest
import timm
import torch
from scl_defense_timm.encoder import TimmEncoder

from scl_defense import UserError
from scl_defense.testing import assert_contract


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_contract(name):
    assert_contract(TimmEncoder(name=name), "model", "timm")


def test_it_is_installed_and_listed():
    from scl_defense.plugins import PluginHost

    host = PluginHost()
    if "timm" not in host["model"]:
        pytest.skip("the plugin is not installed: pip install -e .")
    assert host["model"].get("timm") is TimmEncoder


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "mobilenetv3_small_050"])
def test_features_are_timms_own(name):
    """What timm's network gives its classifier, computed from timm's own two halves."""
    torch.manual_seed(0)
    encoder = TimmEncoder(name=name)((3, 32, 32)).eval()
    images = torch.rand((4, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=7).eval()
    shared = {key: value for key, value in encoder.network.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(shared, strict=False)
    assert unexpected == [] and {key.rpartition(".")[0] for key in missing} == {
        ".".join(part for part in theirs.default_cfg["classifier"].split("."))
    }
    with torch.no_grad():
        wanted = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
        found = encoder(images)
    assert found.shape == (4, encoder.feature_dim)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 40, 64)])
def test_any_number_of_channels_and_size(shape):
    for name in ("resnet10t", "vit_tiny_patch16_224"):
        if name.startswith("vit") and (shape[1] % 16 or shape[2] % 16):
            continue
        encoder = TimmEncoder(name=name)(shape).eval()
        assert encoder(torch.rand(2, *shape)).shape == (2, encoder.feature_dim)


@pytest.mark.parametrize(
    ("options", "shape", "says"),
    [
        ({"name": "convnext_ato"}, (3, 32, 32), "timm has no model 'convnext_ato'; did you mean 'convnext_atto'"),
        ({"name": "convnext_atto"}, (1, 8, 8), "cannot be built for images 1x8x8"),
    ],
)
def test_mistakes_are_one_line(options, shape, says):
    with pytest.raises(UserError) as caught:
        TimmEncoder(**options)(shape)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_building_draws_only_what_timm_draws():
    """The trial pass in the constructor must not move the generator that seeds the rest of a run."""
    torch.manual_seed(0)
    TimmEncoder(drop=0.5)((3, 32, 32))
    after = torch.rand(3)
    torch.manual_seed(0)
    timm.create_model("resnet10t", num_classes=0, drop_rate=0.5)
    assert torch.equal(after, torch.rand(3))
