"""Files made to do harm: no code of theirs runs, nothing is unpacked without a limit, nothing lands elsewhere."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import torch
from mangling import members, zipped

from scl_defense import checkpoint
from scl_defense.cli.app import run
from scl_defense.data import open_data
from scl_defense.errors import UserError
from scl_defense.plugins import PluginHost

TINY = ["--limit", "40", "--val-limit", "8", "--val-steps", "1", "--epochs", "1", "-m", "width=2", "--quiet"]


class Call:
    """Whoever unpickles this calls ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Built:
    """The call is in the state that is put into an innocent object."""

    def __init__(self, inner):
        self.inner = inner

    def __reduce__(self):
        return dict, (), None, None, iter([("x", self.inner)])


TOUCH = "open('ran', 'w').close()"
EVIL = {
    "os.system": lambda: Call(os.system, "touch ran"),
    "builtins.eval": lambda: Call(eval, TOUCH),
    "builtins.exec": lambda: Call(exec, TOUCH),
    "subprocess": lambda: Call(subprocess.call, ["touch", "ran"]),
    "open": lambda: Call(open, "ran", "w"),
    "import": lambda: Call(__import__, "os"),
    "getattr": lambda: Call(getattr, 1, "real"),
    "pickle in pickle": lambda: Call(pickle.loads, pickle.dumps(Call(os.system, "touch ran"))),
    "torch.load": lambda: Call(torch.load, "nested.pt"),
    "in an item": lambda: Built(Call(os.system, "touch ran")),
    "deep": lambda: [[[{"a": ({"b": Call(os.system, "touch ran")},)}]]],
}


def container(kind, content, path, good):
    """Write ``content`` as this kind of file."""
    if kind == "torch":
        torch.save({"state_dict": {"w": torch.zeros(2)}, "x": content}, path)
    elif kind == "ours":
        torch.save({**checkpoint.read(good)[0], "optimizer": content}, path)
    elif kind == "old torch":
        torch.save({"x": content}, path, _use_new_zipfile_serialization=False)
    elif kind == "old tar":
        with tarfile.open(path, "w") as archive:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                part = pickle.dumps(content if name == "storages" else {}, protocol=2)
                member = tarfile.TarInfo(name)
                member.size = len(part)
                archive.addfile(member, io.BytesIO(part))
    elif kind == "zip member":  # beside a good data.pkl
        parts = members(good.read_bytes())
        (data,) = [name for name in parts if name.endswith("data.pkl")]
        extra = pickle.dumps(content, protocol=2)
        path.write_bytes(zipped({**parts, data.replace("data.pkl", "constants.pkl"): extra, "evil.pkl": extra}))
    elif kind == "ascii pickle":
        path.write_bytes(pickle.dumps(content, protocol=0))
    else:
        path.write_bytes(pickle.dumps(content))


CONTAINERS = ["torch", "ours", "old torch", "old tar", "zip member", "ascii pickle", "pickle"]
COMMANDS = {
    "info": lambda path: ["info", path],
    "benchmark": lambda path: ["benchmark", path, "--attacks", "noise:draws=1", "--n", "5", "--probes", "none",
                               "--quiet"],
    "benchmark with data": lambda path: [
        "benchmark", path, "--data", "digits", "--model", "small-cnn", "--attacks", "noise:draws=1", "--n", "5",
        "--probes", "none", "--quiet",
    ],
    "head": lambda path: ["benchmark", "{good}", "--data", "digits", "--head", path, "--quiet"],
    "agreement": lambda path: ["agreement", path],
    "finetune": lambda path: ["finetune", path, "--dry-run"],
    "init": lambda path: ["train", *TINY, "--init", path],
    "resume": lambda path: ["train", "--resume", path],
    "stored examples": lambda path: ["train", *TINY, "--generator", f"file:{path}"],
    "recipe": lambda path: ["train", "--config", path],
    "study": lambda path: ["study", path],
    "label map": lambda path: ["benchmark", "{good}", "--label-map", path],
    "data": lambda path: ["train", *TINY, "--data", path],
    "plugins": lambda path: ["plugins", "list", path],
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    assert run(["train", *TINY, "--generator", "none", "--out", str(folder), "--name", "run"]) == 0
    return folder / "run" / "best.pt"


@pytest.mark.parametrize("kind", CONTAINERS)
def test_no_reader_runs_what_a_file_says(kind, good, tmp_path, monkeypatch, capsys, book):
    """Every command that reads a file, every way in which a pickle calls something."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nested.pt").write_bytes(pickle.dumps(Call(os.system, "touch ran")))
    for what, make in EVIL.items():
        path = tmp_path / "evil.pt"
        container(kind, make(), path, good)
        for name, line in COMMANDS.items():
            if kind != "torch" and name not in ("info", "benchmark", "benchmark with data", "resume", "data"):
                continue
            arguments = [str(part).format(good=good) if part == "{good}" else str(part) for part in line("evil.pt")]
            code = run(arguments)
            err = capsys.readouterr().err
            assert not (tmp_path / "ran").exists(), (what, name)
            # A stray member that nobody reads makes a file no worse.
            assert code == 2 or (kind == "zip member" and code == 0), (what, name, code, err)
            assert "unexpected" not in err and "weights_only=False" not in err and len(err.strip().splitlines()) <= 1
        book("malicious files refused")


def test_the_payloads_do_harm_where_they_are_trusted(tmp_path):
    """The files above are not harmless by mistake: plain ``pickle`` runs them."""
    script = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    for what in ("os.system", "builtins.eval", "subprocess", "pickle in pickle", "in an item", "deep"):
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps(EVIL[what]()))
        subprocess.run([sys.executable, "-S", "-c", script, "evil.pkl"], cwd=tmp_path, check=True, timeout=60)
        assert (tmp_path / "ran").exists(), what
        (tmp_path / "ran").unlink()


# -- more than a machine holds


def peak(action):
    """The most that Python allocated meanwhile, in MB."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["data/0", "data.pkl", "extra"])
def test_a_zip_bomb_is_not_unpacked(name, good, tmp_path, book):
    parts = members(good.read_bytes())
    stem = next(iter(parts)).split("/")[0]
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for part, content in parts.items():
            if part != f"{stem}/{name}":
                archive.writestr(part, content)
        with archive.open(f"{stem}/{name}", "w", force_zip64=True) as stream:
            for _ in range(300):
                stream.write(bytes(1 << 20))
    assert path.stat().st_size < 2_000_000

    def refused():
        with pytest.raises(UserError, match="would unpack to"):
            checkpoint.load_classifier(path)

    assert peak(refused) < 60
    book("malicious files refused")


def npy(header, payload=b""):
    text = header.encode() + b" " * 16 + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + payload


@pytest.mark.parametrize(
    ("shape", "says"),
    [("(1000000000000, 8, 8, 1)", "claims"), ("(4, 8, 8, 1)", "claims"), ("(-1, 8, 8)", "not a readable")],
)
def test_an_absurd_shape_in_an_npz_is_refused_before_room_is_made(shape, says, tmp_path, book):
    absurd = npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}", bytes(64))
    buffer = io.BytesIO()
    np.save(buffer, np.arange(4))
    parts = {f"{half}_{what}.npy": absurd if what == "images" else buffer.getvalue()
             for half in ("train", "test") for what in ("images", "labels")}  # fmt: skip
    (tmp_path / "x.npz").write_bytes(zipped(parts))
    with pytest.raises(UserError, match=says):
        open_data(str(tmp_path / "x.npz"))
    book("malicious files refused")


def test_a_bomb_in_an_npz_is_refused(tmp_path, monkeypatch, book):
    monkeypatch.setattr("scl_defense_plugins.datasets.npz.INFLATED", 1 << 20)  # the real one takes a gigabyte
    images = np.zeros((200_000, 8, 8), dtype=np.uint8)
    np.savez_compressed(tmp_path / "x.npz", train_images=images, train_labels=np.arange(200_000) % 2,
                        test_images=images, test_labels=np.arange(200_000) % 2)  # fmt: skip
    with pytest.raises(UserError, match="would unpack to"):
        open_data(str(tmp_path / "x.npz"))
    book("malicious files refused")


def png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeeze, row = zlib.compressobj(9), bytes(1 + width // 8)
    pixels = b"".join(squeeze.compress(row) for _ in range(height)) + squeeze.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_an_image_bomb_is_refused(tmp_path, book):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.png").write_bytes(png(20_000, 20_000))
    with pytest.raises(UserError, match="cannot be read"):
        open_data(str(tmp_path))
    book("malicious files refused")


def laughing(levels=45):
    found = ["ha"]
    for _ in range(levels):
        found = [found, found]
    return found


def deep(levels=400):
    found = []
    for _ in range(levels):
        found = [found]
    return found


ABSURD = {
    "a tensor that is larger than its data": (
        lambda c: c["network"].update({"classifier.weight": torch.zeros(1).expand(10, 10**12)}), "larger than its data"
    ),
    "a network that is larger than its weights": (
        lambda c: c["model_options"].update({"width": 1024}), "it describes"
    ),
    "more classes than outputs": (lambda c: c.update(classes=[str(i) for i in range(20_000)]), "20000 classes"),
    "lists within lists within lists": (lambda c: c.update(random=laughing()), "larger than"),
    "depth": (lambda c: c.update(random=deep()), "deeper than"),
    "an image of a million pixels a side": (lambda c: c.update(image_shape=[1, 10**6, 10**6]), "from 1 to 4096"),
    "a class name that a terminal obeys": (lambda c: c["classes"].__setitem__(0, "\x1b]0;owned\x07"),
                                           "control characters"),
}  # fmt: skip


@pytest.mark.parametrize("what", ABSURD)
def test_an_absurd_checkpoint_is_refused_before_anything_is_built(what, good, tmp_path, capsys, book):
    change, says = ABSURD[what]
    content, _ = checkpoint.read(good)
    change(content)
    torch.save(content, tmp_path / "x.pt")

    def refused():
        with pytest.raises(UserError, match=says):
            checkpoint.load_classifier(tmp_path / "x.pt")

    assert peak(refused) < 100
    for command in (["info"], ["benchmark", "--quiet"], ["finetune", "--dry-run"]):
        code = run([command[0], str(tmp_path / "x.pt"), *command[1:]])
        captured = capsys.readouterr()
        assert code in (0, 2) and "\x1b" not in captured.out + captured.err, (command, captured.err)
        assert "unexpected" not in captured.err
    book("malicious files refused")


def test_a_storage_cannot_claim_more_than_the_file_holds(good, tmp_path, book):
    """The numbers of a tensor are in a member of their own; how many there are stands in the pickle."""
    state = {"fc.weight": torch.arange(12345.0).view(5, 2469)}
    torch.save(state, tmp_path / "x.pt")
    parts = members((tmp_path / "x.pt").read_bytes())
    (name,) = [name for name in parts if name.endswith("data.pkl")]
    old, new = b"M" + struct.pack("<H", 12345), b"J" + struct.pack("<i", 2**31 - 1)
    assert parts[name].count(old) == 1
    (tmp_path / "x.pt").write_bytes(zipped({**parts, name: parts[name].replace(old, new)}))
    with pytest.raises(UserError, match=r"damaged|larger than"):
        checkpoint.read_tensors(tmp_path / "x.pt")
    book("malicious files refused")


# -- names


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped-absolute", "a/../../../escaped", "C:\\escaped"])
def test_a_name_in_an_archive_leads_nowhere(name, good, tmp_path, monkeypatch, capsys, book):
    """Archives are read, never unpacked: no name in one is a path on this machine."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    (inner / "x.pt").write_bytes(zipped({**members(good.read_bytes()), name: b"escaped"}))
    np.savez(inner / "x.npz", train_images=np.zeros((4, 8, 8), np.uint8))
    (inner / "y.npz").write_bytes(zipped({**members((inner / "x.npz").read_bytes()), f"{name}.npy": b"escaped"}))
    before = sorted(tmp_path.rglob("*"))
    for line in (["info", "x.pt"], ["train", *TINY, "--data", "y.npz"], ["train", "--init", "y.npz", *TINY]):
        assert run(line) in (0, 2)
    capsys.readouterr()
    assert sorted(tmp_path.rglob("*")) == before and not os.path.exists("/tmp/escaped-absolute")
    book("malicious files refused")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[methods."../../x"]\ngenerator = "none"\n[batteries.a]\nattacks = "fgsm"\n', "a name is made of"),
        ('[methods.a]\n[batteries."../x"]\nattacks = "fgsm"\n', "no file name"),
        ('[methods.a]\nout = "/etc"\n[batteries.a]\nattacks = "fgsm"\n', "is not for a recipe to set"),
        ('[methods.a]\nname = "../x"\n[batteries.a]\nattacks = "fgsm"\n', "is not for a recipe to set"),
    ],
)
def test_a_study_writes_below_its_own_folder_alone(text, says, tmp_path, monkeypatch, capsys, book):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.toml").write_text(text)
    assert run(["study", "x.toml"]) == 2
    assert says in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["x.toml"]
    book("malicious files refused")


TOML = {
    "a date": "epochs = 2026-11-23",
    "infinity": "lr = inf",
    "not a number": "lr = nan",
    "a truth": "epochs = true",
    "a list": "epochs = [3]",
    "a table for a name": "[generator]\nname = 'pgd'",
    "a name for a table": "generator_options = 'steps=3'",
    "the same key twice": "epochs = 3\nepochs = 4",
    "a number of thousands of digits": f"seed = {'9' * 5000}",
    "brackets in brackets": f"logger = {'[' * 5000}{']' * 5000}",
    "tables in tables": f"[generator_options{'.a' * 2000}]\nx = 1",
    "a null byte": 'data = "a\\u0000b"',
    "an escape sequence": 'data = "\\u001b[31mred"',
    "another encoding": b"\xff\xfee\x00",
    "a byte order mark": b"\xef\xbb\xbfepochs = 3",
    "YAML that would build an object": "!!python/object/apply:os.system ['touch ran']",
    "a YAML anchor bomb": "a: &a [x, x]\nb: &b [*a, *a]",
    "a template": "data = '{{ 7 * 7 }}'",
    "a name of a Python object": "trainer = 'os:system'",
    "unicode that looks like a key": "еpochs = 3",  # a Cyrillic letter
}  # fmt: skip


@pytest.mark.parametrize("what", TOML)
@pytest.mark.parametrize("command", ["train", "study"])
def test_a_surprising_recipe_is_one_line(what, command, tmp_path, monkeypatch, capsys, book):
    monkeypatch.chdir(tmp_path)
    text = TOML[what]
    (tmp_path / "x.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert run([command, "--config", "x.toml"] if command == "train" else [command, "x.toml"]) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: ") and "unexpected" not in err
    assert "\x1b" not in err
    assert not (tmp_path / "ran").exists() and [path.name for path in tmp_path.iterdir()] == ["x.toml"]
    book("malicious files refused")


# -- what a terminal would obey

ESCAPE = "\x1b]0;owned\x07\x1b[31m<script>alert(1)</script>"


def test_names_reach_no_terminal_as_commands(good, tmp_path, monkeypatch, capsys, book):
    monkeypatch.chdir(tmp_path)
    content, _ = checkpoint.read(good)
    config = json.loads(content["config"]) | {"data": ESCAPE, "generator": ESCAPE}
    changed = {**content, "generator": ESCAPE, "trainer": ESCAPE, "config": json.dumps(config), "model_owner": ESCAPE,
               "plugins": [{"plugin": ESCAPE, "distribution": ESCAPE, "version": ESCAPE}]}  # fmt: skip
    torch.save(changed, "x.pt")
    torch.save({**changed, "model": ESCAPE}, "y.pt")
    os.mkdir(tmp_path / "data")
    for name in ("a", ESCAPE.replace("/", "")):
        os.mkdir(tmp_path / "data" / name)
    lines = [
        ["info", "x.pt"], ["benchmark", "x.pt"], ["benchmark", "y.pt"], ["finetune", "x.pt"], ["info", ESCAPE],
        ["train", "--data", ESCAPE], ["train", "--generator", ESCAPE], ["train", "--data", "data"], [ESCAPE],
        ["benchmark", str(good), "--attacks", ESCAPE], ["study", ESCAPE], ["train", "--plugin", ESCAPE],
        ["train", "-g", f"{ESCAPE}=1"], ["train", "--eps", ESCAPE], ["train", "--resume", ESCAPE],
    ]  # fmt: skip
    for line in lines:
        run(line)
        captured = capsys.readouterr()
        assert "\x1b" not in captured.out + captured.err and "\x07" not in captured.out + captured.err, line
        assert "unexpected" not in captured.err, captured.err
    book("malicious files refused", 3)


def test_a_data_set_or_plugin_with_such_names_is_refused(site, tmp_path):
    np.savez(tmp_path / "x.npz", train_images=np.zeros((4, 8, 8), np.uint8), train_labels=np.arange(4) % 2,
             test_images=np.zeros((4, 8, 8), np.uint8), test_labels=np.arange(4) % 2,
             classes=np.array(["a", ESCAPE]))  # fmt: skip
    with pytest.raises(UserError, match="control characters"):
        open_data(str(tmp_path / "x.npz"), host=PluginHost())
    site.install(
        "painter",
        "from scl_defense import hookimpl\n"
        "@hookimpl\n"
        "def register_generators(register):\n"
        f"    register('toy', 'm:C', summary={ESCAPE!r})\n",
    )
    host = site.host()
    assert [one.owner.name for one in host.quarantined] == ["painter"]
    assert "one non-empty line" in host.quarantined[0].reason


DOORS = {  # option -> the commands that have it, and what their help says of it
    "--plugin": (["train", "benchmark", "generate", "finetune", "report", "study", "agreement"], "(it runs code)"),
    "--model NAME|PKG:FACTORY": (["benchmark", "agreement"], "(it runs code)"),
    "--data NAME|PATH|PKG:FUNCTION": (["benchmark", "agreement"], "(it runs code)"),
    "--trust-pickle": (["benchmark", "agreement"], "runs code when opened"),
}


@pytest.mark.parametrize("door", DOORS)
def test_the_doors_that_run_code_say_so(door, capsys):
    commands, words = DOORS[door]
    for command in commands:
        run([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert door in text and words in text[text.index(door) :][:300], (command, text)


def test_the_contract_test_says_so_too(capsys):
    run(["plugins", "check", "--help"])
    assert "runs code" in " ".join(capsys.readouterr().out.split())
