"""Every kind of file that somebody else may send: its logits are those of the network that was saved."""

import io
import json
import os
import pickle
import tarfile
import warnings
import zipfile

import foreign_modules
import pytest
import torch
from safetensors.torch import save_file
from scl_defense_benchmarks.containers import imports_of, kind_of
from scl_defense_benchmarks.subject import open_subject
from torch import nn

from scl_defense import UserError, load_classifier
from scl_defense.models import Network
from scl_defense.plugins import default_host

DIGITS = {"classes": tuple("0123456789"), "image_shape": (1, 8, 8)}
FACTORY = {"model": "foreign_modules:LeNet", **DIGITS}


@pytest.fixture(scope="module")
def lenet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = foreign_modules.LeNet()
        net.norm.running_mean.normal_()
    return net.eval()


@pytest.fixture(scope="module")
def ours():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        encoder = default_host()["model"].get("small-cnn")(width=4)((1, 8, 8))
        return Network(encoder, 10, [0.0], [1.0]).eval()


@pytest.fixture
def images():
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def same(path, network, images, **options):
    loaded = load_classifier(path, options={**FACTORY, **options})
    assert torch.equal(loaded.network(images), network(images)) and not loaded.network.training
    return loaded


# -- state dicts of a network of the user's own

CONTAINERS = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"epoch": 3, "state_dict": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "model": lambda s: {"model": prefixed(s, "module.")},
    "net": lambda s: {"net": prefixed(s, "_orig_mod.module."), "acc": 93.1},
    "list of one": lambda s: {"acc": torch.tensor(0.9), "state_dict": [s]},
    "deep": lambda s: {"state": 1, "model": {"state_dict": prefixed(s, "model.")}},
    "lightning": lambda s: {"state_dict": prefixed(s, "network."), "hyper_parameters": {"lr": 0.1}},
    "only ema": lambda s: {"model_ema": prefixed(s, "module."), "epoch": 4},
    "numbers beside": lambda s: {**s, "epoch": 7},
    "old batch norm": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    "half": lambda s: s,
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_wrapped_weights_are_found(tmp_path, lenet, images, kind):
    torch.save(CONTAINERS[kind](lenet.state_dict()), tmp_path / "w.pt")
    same(tmp_path / "w.pt", lenet, images)


def test_two_sets_of_weights_are_never_chosen_between_silently(tmp_path, lenet, images):
    other = {name: torch.zeros_like(value) for name, value in lenet.state_dict().items()}
    torch.save({"model": other, "ema": {"module": lenet.state_dict()}, "model_ema": lenet.state_dict()}, tmp_path / "w")
    with pytest.raises(UserError, match="2 sets of weights: model, model_ema; choose: --weights model"):
        load_classifier(tmp_path / "w", options=FACTORY)
    loaded = same(tmp_path / "w", lenet, images, weights="ema.module")
    assert loaded.meta["weights"] == "ema.module"
    with pytest.raises(UserError, match="has no part 'emma'"):
        load_classifier(tmp_path / "w", options={**FACTORY, "weights": "emma"})


def test_half_precision_weights_are_computed_in_float32(tmp_path, lenet, images):
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in lenet.state_dict().items()}, tmp_path / "w.pt")
    logits = load_classifier(tmp_path / "w.pt", options=FACTORY).network(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, lenet(images), atol=1e-2, rtol=0)


# -- encoder and head


def parts(network):
    state = network.state_dict()
    encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    head = {k.removeprefix("classifier."): v for k, v in state.items() if k.startswith("classifier.")}
    return encoder, head


SMALL = {"model": "small-cnn", "model_options": {"width": 4}}


@pytest.mark.parametrize(
    "prefix", ["", "encoder.", "module.encoder.", "encoder.module.", "backbone.", "model.encoder."]
)
@pytest.mark.parametrize("head_prefix", ["", "fc.", "module.linear."])
def test_a_head_in_a_file_of_its_own(tmp_path, ours, images, prefix, head_prefix):
    encoder, head = parts(ours)
    projector = {"head.0.weight": torch.zeros(8, 8), "head.0.bias": torch.zeros(8)} if prefix else {}
    torch.save({"model": {**prefixed(encoder, prefix), **projector}, "epoch": 1}, tmp_path / "e.pt")
    torch.save({"model": prefixed(head, head_prefix)}, tmp_path / "h.pt")
    loaded = same(tmp_path / "e.pt", ours, images, **SMALL, head=tmp_path / "h.pt")
    assert len(loaded.meta.get("unused", [])) == len(projector) and len(loaded.meta["head_sha256"]) == 64


def test_encoder_and_head_in_two_dicts_of_one_file(tmp_path, ours, images):
    encoder, head = parts(ours)
    torch.save(
        {"encoder": encoder, "classifier": {"fc.weight": head["weight"], "fc.bias": head["bias"]}}, tmp_path / "w"
    )
    same(tmp_path / "w", ours, images, **SMALL)


def test_a_head_fills_the_last_layer_of_a_foreign_network(tmp_path, lenet, images):
    state = lenet.state_dict()
    save_file({"weight": state["out.weight"], "bias": state["out.bias"]}, tmp_path / "h.safetensors")
    torch.save({k: v for k, v in state.items() if not k.startswith("out.")}, tmp_path / "e.pt")
    same(tmp_path / "e.pt", lenet, images, head=str(tmp_path / "h.safetensors"))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (None, "no linear head .* --head"),
        ("nowhere.pt", "'nowhere.pt' does not exist"),
        ({"a.weight": torch.zeros(10, 128), "b.weight": torch.zeros(3, 3)}, "is no linear head"),
        ({"weight": torch.zeros(10, 7), "bias": torch.zeros(10)}, r"is \(10, 7\), this network's is \(10, 128\)"),
    ],
)
def test_heads_that_do_not_fit(tmp_path, ours, head, message):
    torch.save(parts(ours)[0], tmp_path / "e.pt")
    if isinstance(head, dict):
        torch.save(head, tmp_path / "h.pt")
        head = tmp_path / "h.pt"
    with pytest.raises(UserError, match=message):
        load_classifier(tmp_path / "e.pt", options={**DIGITS, **SMALL, "head": head})


# -- which network


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("small-cnn", {"width": 3}, (1, 8, 8)),
        ("resnet18", {"width": 4, "stem": "cifar"}, (3, 32, 32)),
        ("resnet18", {"width": 4, "stem": "imagenet"}, (3, 64, 64)),
        ("preact-resnet18", {"width": 4}, (3, 32, 32)),
        ("wide-resnet", {"depth": 16, "widen": 2}, (3, 32, 32)),
    ],
)
def test_ours_are_recognised_by_names_and_shapes(tmp_path, name, options, shape):
    encoder = default_host()["model"].get(name)(**options)(shape)
    network = Network(encoder, 10, [0.0] * shape[0], [1.0] * shape[0]).eval()
    body, head = parts(network)
    torch.save({"state_dict": {**prefixed(body, "module."), **prefixed(head, "module.fc.")}}, tmp_path / "w.pt")
    about = {**DIGITS, "image_shape": shape}
    loaded = load_classifier(tmp_path / "w.pt", options=about)
    assert loaded.meta["model"] == name and options.items() <= loaded.meta["model_options"].items()
    assert "every tensor" in loaded.meta["guessed"]
    images = torch.rand(2, *shape)
    assert torch.equal(loaded.network(images), network(images))
    body.pop(next(n for n in body if n.endswith("weight")))
    torch.save({**body, **prefixed(head, "fc.")}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"fit no registered model .* --model"):
        load_classifier(tmp_path / "w.pt", options=about)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("foreign_modules:LeNett", {}, "did you mean 'LeNet'"),
        ("foreign_modulez:LeNet", {}, "cannot be imported: ModuleNotFoundError"),
        ("foreign_modules:broken", {}, "RuntimeError: no such thing"),
        ("foreign_modules:number", {}, "gives a int, not a torch.nn.Module"),
        ("foreign_modules:LeNet", {"hiden": "3"}, "unexpected keyword"),
        ("foreign_modules:LeNet", {"hidden": "32"}, r"is \(16, 144\), this network's is \(32, 144\)"),
        ("foreign_modules:conv_small", {}, "missing .* unknown .* check --model"),
        ("torchvision:resnet19", {}, "did you mean 'resnet18'"),
        ("torchvision:resnet18", {}, "read 3 channels, this data has 1"),
        ("lenet", {}, "no model named 'lenet'.*torchvision:NAME"),
    ],
)
def test_a_network_that_cannot_be_built_is_one_line(tmp_path, lenet, model, options, message):
    torch.save(lenet.state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=message) as error:
        load_classifier(tmp_path / "w.pt", options={**DIGITS, "model": model, "model_options": options})
    assert "\n" not in str(error.value)


def test_a_factory_in_a_file(tmp_path, lenet, images):
    torch.save(lenet.state_dict(), tmp_path / "w.pt")
    file = tmp_path / "my_net.py"
    file.write_text(
        "from foreign_modules import LeNet\ndef make(num_classes, hidden):\n    return LeNet(num_classes, hidden)\n"
    )
    same(tmp_path / "w.pt", lenet, images, model=f"{file}:make", model_options={"hidden": "16"})


def test_torchvision(tmp_path):
    from torchvision.models import resnet18

    network = resnet18(num_classes=4).eval()
    torch.save({"state_dict": prefixed(network.state_dict(), "module.")}, tmp_path / "w.pt")
    images = torch.rand(2, 3, 32, 32)
    options = {"classes": tuple("abcd"), "image_shape": (3, 32, 32), "model": "torchvision:resnet18"}
    assert torch.equal(load_classifier(tmp_path / "w.pt", options=options).network(images), network(images))


def test_timm(tmp_path):
    timm = pytest.importorskip("timm", reason="the extra timm is not installed")
    network = timm.create_model("resnet10t", num_classes=4, in_chans=1).eval()
    torch.save(network.state_dict(), tmp_path / "w.pt")
    images = torch.rand(2, 1, 32, 32)
    options = {"classes": tuple("abcd"), "image_shape": (1, 32, 32), "model": "timm:resnet10t"}
    assert torch.equal(load_classifier(tmp_path / "w.pt", options=options).network(images), network(images))
    with pytest.raises(UserError, match="did you mean 'resnet10t'"):
        load_classifier(tmp_path / "w.pt", options={**options, "model": "timm:resnet10tt"})


def test_timm_is_an_extra(tmp_path, lenet, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    torch.save(lenet.state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"pip install 'scl-defense\[timm\]'"):
        load_classifier(tmp_path / "w.pt", options={**DIGITS, "model": "timm:resnet18"})


# -- graphs


def gradients(network, images):
    images = images.clone().requires_grad_(True)
    network(images).logsumexp(1).sum().backward()
    return images.grad


def same_graph(path, network, images, **options):
    loaded = load_classifier(path, options={**DIGITS, **options})
    torch.testing.assert_close(loaded.network(images), network(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(loaded.network, images), gradients(network, images), atol=1e-5, rtol=1e-4)
    return loaded


def test_torchscript(tmp_path, lenet, images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.script(lenet).save(str(tmp_path / "net.pt"))
    loaded = same_graph(tmp_path / "net.pt", lenet, images)
    assert loaded.meta["container"] == "torchscript" and not loaded.network.training
    with pytest.raises(UserError, match="brings its own network; leave model out"):
        load_classifier(tmp_path / "net.pt", options=FACTORY)
    with pytest.raises(UserError, match="name the data set with --data"):
        load_classifier(tmp_path / "net.pt", options={})


class Reader(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :10] + torch.from_file("/etc/hostname", size=1)


def test_torchscript_that_touches_files_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.script(Reader()).save(str(tmp_path / "net.pt"))
    with pytest.raises(UserError, match="from_file, which can read or write files"):
        load_classifier(tmp_path / "net.pt", options=DIGITS)


@pytest.mark.parametrize("fixed", [True, False])
def test_torch_export(tmp_path, lenet, images, fixed):
    shapes = None if fixed else ({0: torch.export.Dim("n", min=1, max=1024)},)
    torch.export.save(torch.export.export(lenet, (images[:2],), dynamic_shapes=shapes), tmp_path / "net.pt2")
    loaded = same_graph(tmp_path / "net.pt2", lenet, images)
    loaded.network.train().eval()  # whoever lends it to a library does this
    torch.testing.assert_close(loaded.network(images[:1]), loaded.network(images)[:1])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"torch.ops.aten.relu.default"', '"torch.hub.load"', "the operator 'torch.hub.load'"),
        ('"name": "relu"', '"name": "relu=0\\nimport os"', "the name"),
        ('"expr_str": "Symbol(', '"expr_str": "print(', "the expression"),
    ],
)
def test_an_export_that_would_run_something_else_is_refused(tmp_path, lenet, images, old, new, message):
    shapes = ({0: torch.export.Dim("n", min=1, max=1024)},)
    torch.export.save(torch.export.export(lenet, (images[:2],), dynamic_shapes=shapes), tmp_path / "net.pt2")
    with zipfile.ZipFile(tmp_path / "net.pt2") as source, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("model.json"):
                assert old.encode() in content
                content = content.replace(old.encode(), new.encode())
                json.loads(content)
            target.writestr(name, content)
    with pytest.raises(UserError, match=message):
        load_classifier(tmp_path / "evil.pt2", options=DIGITS)


@pytest.mark.parametrize("batch", ["n", 2])
def test_onnx(tmp_path, lenet, images, batch):
    onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
    pytest.importorskip("onnx2torch", reason="the extra onnx is not installed")
    from onnx import TensorProto, helper, numpy_helper

    state = {name: value.numpy() for name, value in lenet.state_dict().items() if value.dim()}
    norm = [f"norm.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    nodes = [
        helper.make_node("Conv", ["images", "conv.weight", "conv.bias"], ["a"], kernel_shape=[3, 3]),
        helper.make_node("BatchNormalization", ["a", *norm], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "hidden.weight", "hidden.bias"], ["e"], transB=1),
        helper.make_node("Relu", ["e"], ["f"]),
        helper.make_node("Gemm", ["f", "out.weight", "out.bias"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])],
        [numpy_helper.from_array(value, name) for name, value in state.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8), tmp_path / "net.onnx"
    )
    same_graph(tmp_path / "net.onnx", lenet, images)


def test_onnx_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    (tmp_path / "net.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"pip install 'scl-defense\[onnx\]'"):
        load_classifier(tmp_path / "net.onnx", options=DIGITS)


@pytest.mark.parametrize("name", ["net.onnx", "net.safetensors", "net.pt", "net.pt2"])
def test_nonsense_is_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(100) if name.startswith("net.pt") else b"\xff" * 100)
    with pytest.raises(UserError) as error:
        load_classifier(tmp_path / name, options=DIGITS)
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


# -- pickles


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def old_file(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def old_tar(content, path):
    with tarfile.open(path, "w") as archive:
        payload = pickle.dumps(content, protocol=2)
        for name in ("sys_info", "pickle", "storages", "tensors"):
            part = payload if name == "pickle" else pickle.dumps({})
            member = tarfile.TarInfo(name)
            member.size = len(part)
            archive.addfile(member, io.BytesIO(part))


def raw(content, path, protocol=pickle.HIGHEST_PROTOCOL):
    path.write_bytes(pickle.dumps(content, protocol))


WRITERS = {"torch": torch.save, "old torch": old_file, "old torch tar": old_tar, "pickle": raw}


def test_old_torch_files_of_tensors_alone_are_read(tmp_path, lenet, images):
    old_file({"state_dict": prefixed(lenet.state_dict(), "module."), "best": 92.7}, tmp_path / "w.th")
    assert kind_of(tmp_path / "w.th") == "old torch"
    same(tmp_path / "w.th", lenet, images)
    whole = (tmp_path / "w.th").read_bytes()
    for cut in (100, 2000, len(whole) - 100):
        (tmp_path / "w.th").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="damaged"):
            load_classifier(tmp_path / "w.th", options=FACTORY)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_pickle_is_not_run_and_what_it_imports_is_said(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    WRITERS[kind]({"state_dict": {"x": Evil()}}, tmp_path / "evil.pt")
    assert kind_of(tmp_path / "evil.pt") == kind
    assert f"{os.system.__module__}.system" in imports_of(tmp_path / "evil.pt", kind)
    with pytest.raises(UserError, match=r"would run code.*(posix|nt)\.system.*--trust-pickle"):
        load_classifier("evil.pt", options=FACTORY)
    assert not (tmp_path / "ran").exists()


def test_names_put_together_by_a_pickle_are_not_overlooked(tmp_path):
    # "po" + "six" by str.join, then STACK_GLOBAL on what is on the stack.
    joined = b"\x80\x04cbuiltins\ngetattr\nVpo\n\x8c\x06system\x93."
    computed = b"\x80\x04cbuiltins\nstr\n)R\x8c\x06system\x93."
    (tmp_path / "a.pkl").write_bytes(joined)
    (tmp_path / "b.pkl").write_bytes(computed)
    assert imports_of(tmp_path / "a.pkl", "pickle") == {"builtins.getattr", "po.system"}
    assert imports_of(tmp_path / "b.pkl", "pickle") == {"builtins.str", "(computed)"}


@pytest.mark.parametrize("kind", ["torch", "old torch", "pickle"])
@pytest.mark.parametrize("nested", [True, False])
def test_a_trusted_pickle_is_announced_then_loaded(tmp_path, lenet, images, kind, nested):
    WRITERS[kind]({"model": lenet, "epoch": 3} if nested else lenet, tmp_path / "whole.pt")
    with pytest.raises(UserError, match="would run code"):
        load_classifier(tmp_path / "whole.pt", options=DIGITS)
    said = []
    loaded = load_classifier(tmp_path / "whole.pt", options={**DIGITS, "trust_pickle": True, "say": said.append})
    assert torch.equal(loaded.network(images), lenet(images)) and loaded.meta["network"] == "LeNet"
    assert len(said) == 1 and "foreign_modules.LeNet" in said[0]


def test_the_announcement_comes_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw(Evil(), tmp_path / "evil.pkl")
    told = []
    options = {**DIGITS, "trust_pickle": True, "say": lambda text: told.append((text, (tmp_path / "ran").exists()))}
    with pytest.raises(UserError):  # os.system returns a number, which is no network
        load_classifier("evil.pkl", options=options)
    assert len(told) == 1 and ".system" in told[0][0] and told[0][1] is False
    assert (tmp_path / "ran").exists()  # trusting it did run it


# -- names that are no file


def test_a_name_that_no_plugin_knows():
    with pytest.raises(UserError, match="no plugin knows checkpoints of 'roboustbench'"):
        open_subject("roboustbench:Carmon2019Unlabeled", default_host(), "cpu", DIGITS)
    with pytest.raises(UserError, match="does not exist"):
        open_subject("nowhere/best.pt", default_host(), "cpu", DIGITS)
