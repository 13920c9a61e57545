"""The encoders: shapes, equality with independent implementations, and that the small one learns."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scl_defense.config import make
from scl_defense.data import open_data
from scl_defense.errors import UserError
from scl_defense.models import Network, to_channels_last
from scl_defense.plugins import PluginHost

HOST = PluginHost()
SMALL = {  # every registered model, small enough for a test
    "small-cnn": {"width": 4},
    "resnet18": {"width": 4},
    "preact-resnet18": {"width": 4},
    "wide-resnet": {"depth": 10, "widen": 1},
}
NAMES = [entry.name for entry in HOST["model"] if entry.owner.name == "scl-defense"]


def build(name, image_shape, **options):
    return make(HOST, "model", name, options)(image_shape)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_every_model_is_tested():
    assert set(NAMES) == set(SMALL)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 40, 24), (3, 64, 64)])
@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_gives_features_and_all_its_weights_matter(name, shape):
    torch.manual_seed(0)
    encoder = build(name, shape, **SMALL[name])
    images = torch.rand(3, *shape, requires_grad=True)
    features = encoder(images)
    assert features.shape == (3, encoder.feature_dim) and isinstance(encoder.feature_dim, int)
    assert features.isfinite().all()
    (features * torch.randn_like(features)).sum().backward()
    assert images.grad.abs().amax((1, 2, 3)).min() > 0
    if (
        name == "small-cnn" or min(shape[1:]) > 8
    ):  # at 8 x 8 the last maps of a ResNet are one pixel: borders are cut off
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_in_eval_mode_an_image_is_encoded_for_itself_and_seeds_repeat(name):
    torch.manual_seed(0)
    encoder = build(name, (3, 16, 16), **SMALL[name])
    torch.manual_seed(0)
    twin = build(name, (3, 16, 16), **SMALL[name])
    images = torch.rand(6, 3, 16, 16)
    encoder(images)  # batch-norm statistics move
    twin.load_state_dict(encoder.state_dict())
    encoder.eval(), twin.eval()
    together = encoder(images)
    assert torch.allclose(together[2:3], encoder(images[2:3]), atol=1e-6)
    assert torch.equal(together, twin(images))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_builds_the_same_weights(name):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(torch.cat([p.detach().flatten() for p in build(name, (3, 16, 16), **SMALL[name]).parameters()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    ("name", "shape", "options", "expected"),
    [
        # Published counts of the 10-class networks (the last row: ours), less their linear layer (features x 10 + 10).
        ("resnet18", (3, 32, 32), {}, 11_173_962 - 5_130),
        ("resnet18", (3, 224, 224), {"stem": "imagenet"}, 11_689_512 - 513_000),  # 1000 classes
        ("preact-resnet18", (3, 32, 32), {}, 11_172_170 - 5_130),
        ("wide-resnet", (3, 32, 32), {}, 36_479_194 - 6_410),
        ("wide-resnet", (3, 32, 32), {"depth": 34}, 46_160_474 - 6_410),
        ("wide-resnet", (3, 32, 32), {"depth": 40, "widen": 2}, 2_243_546 - 1_290),
        ("small-cnn", (1, 28, 28), {}, 97_392),
    ],
)
def test_the_networks_have_their_published_sizes(name, shape, options, expected):
    with torch.device("meta"):
        assert parameters(build(name, shape, **options)) == expected


def test_resnet18_with_the_imagenet_stem_is_torchvisions():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    theirs = resnet18(weights=None)
    images = torch.rand(4, 3, 64, 64)
    theirs(images)  # other batch-norm statistics than the initial ones
    encoder = build("resnet18", (3, 64, 64), stem="imagenet")
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    encoder.load_state_dict(state, strict=True)
    theirs.fc = nn.Identity()
    for training in (False, True):
        theirs.train(training), encoder.train(training)
        assert torch.allclose(encoder(images), theirs(images), atol=1e-5)


def test_resnet18_with_the_cifar_stem_differs_from_torchvisions_in_the_stem_alone():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    theirs = resnet18(weights=None)
    theirs.conv1, theirs.maxpool, theirs.fc = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity(), nn.Identity()
    encoder = build("resnet18", (3, 16, 16))
    encoder.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.rand(4, 3, 16, 16)
    assert torch.allclose(encoder(images), theirs(images), atol=1e-5)


# The two pre-activation networks, written from their papers' figures as plain functions of the state dict, eval mode.


def bn_relu(x, state, key):
    keys = ("running_mean", "running_var", "weight", "bias")
    return F.relu(F.batch_norm(x, *(state[f"{key}.{part}"] for part in keys)))


def preact_block(x, state, key, stride, shortcut):
    ready = bn_relu(x, state, f"{key}.bn1")
    kept = F.conv2d(ready, state[shortcut], stride=stride) if shortcut in state else x
    out = F.conv2d(ready, state[f"{key}.conv1.weight"], stride=stride, padding=1)
    return F.conv2d(bn_relu(out, state, f"{key}.bn2"), state[f"{key}.conv2.weight"], padding=1) + kept


def preact_reference(x, state):
    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            key, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            x = preact_block(x, state, key, stride, f"{key}.shortcut.0.weight")
    return bn_relu(x, state, "bn").mean((2, 3))


def wide_reference(x, state, blocks):
    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for block in range(blocks):
            key, stride = f"block{stage}.layer.{block}", 2 if stage > 1 and block == 0 else 1
            x = preact_block(x, state, key, stride, f"{key}.convShortcut.weight")
    return bn_relu(x, state, "bn1").mean((2, 3))


def lively(encoder, images):
    """Batch norms with statistics and affine parameters of their own, so that leaving one out is seen."""
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.3)
    encoder(images)
    return encoder.eval()


def test_preact_resnet18_equals_its_definition():
    torch.manual_seed(0)
    images = torch.rand(4, 3, 16, 16)
    encoder = lively(build("preact-resnet18", (3, 16, 16), width=6), images)
    assert torch.allclose(encoder(images), preact_reference(images, encoder.state_dict()), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "strides"), [((1, 8, 8), (1, 2, 2, 1)), ((3, 15, 20), (1, 2, 2, 1)), ((1, 28, 28), (1, 2, 2, 2))]
)
def test_small_cnn_equals_its_definition(shape, strides):
    torch.manual_seed(0)
    images = torch.rand(4, *shape)
    encoder = lively(build("small-cnn", shape, width=4), images)
    state, x = encoder.state_dict(), images
    for k, stride in enumerate(strides):
        x = F.conv2d(x, state[f"stages.{3 * k}.weight"], stride=stride, padding=1)
        x = bn_relu(x, state, f"stages.{3 * k + 1}")
    assert encoder.feature_dim == 4 * x.shape[1] == 32 * 4
    assert torch.allclose(encoder(images), F.adaptive_avg_pool2d(x, 2).flatten(1), atol=1e-5)


@pytest.mark.parametrize(("depth", "widen"), [(10, 1), (16, 2)])
def test_wide_resnet_equals_its_definition(depth, widen):
    torch.manual_seed(0)
    images = torch.rand(4, 3, 16, 16)
    encoder = lively(build("wide-resnet", (3, 16, 16), depth=depth, widen=widen, dropout=0.3), images)
    expected = wide_reference(images, encoder.state_dict(), (depth - 4) // 6)
    assert torch.allclose(encoder(images), expected, atol=1e-5)  # dropout does nothing in eval mode


def test_dropout_works_in_train_mode_alone():
    torch.manual_seed(0)
    images = torch.rand(4, 3, 16, 16)
    plain = build("wide-resnet", (3, 16, 16), depth=10, widen=1)
    dropping = build("wide-resnet", (3, 16, 16), depth=10, widen=1, dropout=0.5)
    dropping.load_state_dict(plain.state_dict())
    assert torch.equal(plain(images), plain(images))
    assert not torch.allclose(dropping(images), dropping(images))
    assert not torch.allclose(dropping(images), plain(images))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("wide-resnet", {"depth": 29}, "depth.*6 n \\+ 4.*28.*not 29"),
        ("wide-resnet", {"depth": 4}, "depth.*10"),
        ("wide-resnet", {"dropout": 1}, "dropout.*less than 1"),
        ("resnet18", {"stem": "mnist"}, "stem.*cifar.*imagenet"),
        ("small-cnn", {"width": 0}, "width.*greater than or equal to 1"),
        ("small-cnn", {"widht": 8}, "widht.*did you mean 'width'"),
    ],
)
def test_wrong_options_are_user_errors(name, options, words):
    with pytest.raises(UserError, match=words):
        make(HOST, "model", name, options)


@pytest.mark.parametrize("name", NAMES)
def test_images_that_are_too_small_are_refused_in_words(name):
    with pytest.raises(UserError, match=f"'{name}' needs images of at least 8x8, not 8x7"):
        build(name, (1, 8, 7), **SMALL[name])
    if name == "resnet18":
        with pytest.raises(UserError, match="at least 32x32, not 28x28"):
            build(name, (1, 28, 28), stem="imagenet")


@pytest.mark.slow  # seconds
def test_the_small_cnn_learns_the_digits():
    """Cross-entropy for some seconds; a linear classifier on the pixels reaches 96 % on this split."""
    data = open_data("digits")
    train, test = data.split("train", val_fraction=0), data.split("test")
    torch.manual_seed(0)
    network = Network(build("small-cnn", data.image_shape), data.num_classes, data.mean, data.std)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=20 * 12)
    images = train.float_images()
    for _ in range(20):
        for idx in torch.randperm(len(train)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(network(images[idx]), train.labels[idx]).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        accuracy = (network(test.float_images()).argmax(1) == test.labels).float().mean().item()
    assert accuracy > 0.97


class _Flat(nn.Module):
    """Works with rows in order only: ``view`` of a feature map."""

    feature_dim = 4 * 6 * 6

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images):
        return self.convolution(images).relu().view(len(images), -1)


def test_channels_last_changes_the_order_alone_and_leaves_what_cannot_work_with_it():
    torch.manual_seed(0)
    images = torch.rand(4, 3, 8, 8)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder.feature_dim = 4
    network = Network(encoder, 3, (0.5,) * 3, (0.5,) * 3).eval()
    before, statistics = network(images), encoder[1].running_mean.clone()
    assert to_channels_last(network, images)
    assert encoder[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(images), before)
    assert torch.equal(encoder[1].running_mean, statistics) and int(encoder[1].num_batches_tracked) == 0

    rigid = Network(_Flat(), 3, (0.5,) * 3, (0.5,) * 3)
    assert not to_channels_last(rigid, torch.rand(4, 3, 6, 6))
    assert rigid.encoder.convolution.weight.is_contiguous()
    rigid.train()(torch.rand(4, 3, 6, 6)).sum().backward()
