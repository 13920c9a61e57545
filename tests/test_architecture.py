"""The boundaries between the parts, as failing tests. Everything here reads source text; nothing is imported."""

import ast
import socket
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "scl_defense"
PLUGINS = ROOT / "plugins" / "scl_defense_plugins"
BENCHMARKS = ROOT / "benchmarks" / "scl_defense_benchmarks"

# A module imports from the lines above its own, and from its own line too where the line is below `types`.
ORDER = (
    ("errors", "deprecation", "launcher", "draws", "blocks"),
    ("containment",),
    ("threat", "losses", "registry", "hookspecs", "guard", "folding", "runtime", "shown", "memory"),
    ("types", "plugins", "libraries"),
    ("ascent", "augment", "models", "config", "data"),
    ("sharing",),
    ("checkpoint", "probe", "logs", "generation", "optim", "schedules", "passes", "recovery", "trained"),
    ("compose", "mixture", "replay", "stored"),
    ("runstate",),
    ("train",),
    ("protocols", "testing", "scaffold"),
    ("pytest_plugin", "cli", "__main__"),
)
LEVEL = {name: level for level, line in enumerate(ORDER) for name in line}
# What a plugin may use. `models`: a trainer builds the Network. `libraries`: an attack of another library.
# `hookspecs`: the type of `register`.
PUBLIC = {"types", "threat", "losses", "ascent", "errors", "models", "hookspecs", "libraries"}
# What a command of a third party may call beside it, in files that define no component.
FOR_COMMANDS = {"config", "plugins", "generation", "runtime", "data", "checkpoint"}


@dataclass(frozen=True)
class Import:
    """``module`` is absolute; ``name`` is what ``from module import name`` takes, or None."""

    module: str
    name: str | None
    line: int
    typing_only: bool

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module

    def of(self, package: str) -> bool:
        return f"{self.module}.".startswith(f"{package}.") or self.full == package


def imports(source: str, package: str) -> Iterator[Import]:
    """Every import of a module that lies in ``package``, wherever it stands: in functions too."""

    def visit(node: ast.AST, typing_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, node.lineno, typing_only)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, typing_only)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for part in node.body:
                yield from visit(part, True)
            for part in node.orelse:
                yield from visit(part, typing_only)
        else:
            for part in ast.iter_child_nodes(node):
                yield from visit(part, typing_only)

    yield from visit(ast.parse(source), False)


def package_of(path: Path) -> str:
    root = next(root for root in (CORE, PLUGINS, BENCHMARKS) if path.is_relative_to(root))
    return ".".join(path.relative_to(root.parent).parts[:-1])


def sources(*roots: Path) -> list[Path]:
    """Python files below the roots; the tests must never walk nothing."""
    files = sorted(path for root in roots for path in root.rglob("*.py") if "build" not in path.parts)
    assert files, f"no Python file below {roots}"
    return files


def runtime_imports(path: Path) -> list[Import]:
    return [found for found in imports(path.read_text(), package_of(path)) if not found.typing_only]


def where(path: Path, found: Import) -> str:
    return f"{path.relative_to(ROOT)}:{found.line} imports {found.full}"


def core_module(found: Import) -> str | None:
    """Which module of the core an import means: a name of LEVEL, or ``""`` for the package itself."""
    if not found.of("scl_defense"):
        return None
    parts = found.full.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else "" if len(parts) <= 2 else parts[1]


def home(path: Path) -> str:
    """The module of LEVEL that a file of the core belongs to, or ``""`` for ``__init__``."""
    first = path.relative_to(CORE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


# -- directions


def test_every_module_of_the_core_has_its_place():
    unknown = {home(path) for path in sources(CORE)} - set(LEVEL) - {""}
    assert not unknown, f"give {sorted(unknown)} a place in ORDER: which modules may import it?"


def test_the_core_imports_downwards():
    wrong = []
    for path in sources(CORE):
        mine = home(path)
        for found in runtime_imports(path):
            theirs = core_module(found)
            if theirs is None or theirs == mine:
                continue
            if mine == "":
                fine = theirs in ("errors", "hookspecs")
            elif theirs == "":  # a name of the package itself: its version, or something it imports when first used
                fine = found.name in ("__version__", "hookimpl", "UserError", "ComponentError") or mine == "cli"
            else:
                above, below = (LEVEL.get(name, len(ORDER)) for name in (mine, theirs))
                fine = below < above or below == above > LEVEL["types"]
            if not fine:
                wrong.append(where(path, found))
    assert not wrong, "\n".join(wrong)


def test_the_core_has_no_import_cycle():
    graph: dict[str, set[str]] = {}
    for path in sources(CORE):
        needed = {core_module(found) for found in runtime_imports(path)}
        graph.setdefault(home(path), set()).update(needed - {None, "", home(path)})
    assert len(graph) > 10
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_core_never_imports_plugins_or_benchmarks():
    wrong = [
        where(path, found)
        for path in sources(CORE)
        for found in runtime_imports(path)
        if found.of("scl_defense_plugins") or found.of("scl_defense_benchmarks")
    ]
    assert not wrong, "\n".join(wrong)


def test_plugins_use_the_public_core_alone():
    wrong = []
    for path in sources(PLUGINS):
        for found in runtime_imports(path):
            module = core_module(found)
            if module is None or module in PUBLIC or (module == "" and found.name == "hookimpl"):
                continue
            wrong.append(where(path, found))
    assert not wrong, "\n".join(wrong)


def test_plugins_stand_alone():
    """A component uses helpers of its own folder at most; the page of hooks names components as strings."""
    wrong = []
    for path in sources(PLUGINS):
        mine = package_of(path)
        for found in runtime_imports(path):
            own = mine != "scl_defense_plugins" and f"{found.full}.".startswith(f"{mine}.")
            if found.of("scl_defense_benchmarks") or (found.of("scl_defense_plugins") and not own):
                wrong.append(where(path, found))
    assert not wrong, "\n".join(wrong)


def test_benchmarks_know_neither_plugins_nor_the_command_line():
    wrong = [
        where(path, found)
        for path in sources(BENCHMARKS)
        for found in runtime_imports(path)
        if found.of("scl_defense_plugins") or core_module(found) in ("cli", "testing")
    ]
    assert not wrong, "\n".join(wrong)


def test_separate_distributions_are_third_parties():
    folders = [folder for folder in (ROOT / "plugins").glob("*/") if (folder / "pyproject.toml").is_file()]
    wrong = []
    for folder in folders:
        for path in sources(folder):
            found_here = list(imports(path.read_text(), path.parent.name))
            allowed = PUBLIC | ({"testing"} if path.name.startswith(("test_", "conftest")) else set())
            if not any(found.full == "scl_defense.types.component" for found in found_here):
                allowed |= FOR_COMMANDS
            for found in found_here:
                # Names of the package itself (hookimpl, ThreatModel, UserError) are public by definition.
                known = core_module(found) in allowed | {None, ""}
                if not known or found.of("scl_defense_plugins") or found.of("scl_defense_benchmarks"):
                    wrong.append(where(path, found))
    assert not wrong, "\n".join(wrong)


# -- who may use which library


def users_of(library: str) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in sources(CORE, PLUGINS, BENCHMARKS)
        for found in runtime_imports(path)
        if found.of(library)
    }


def test_pluggy_stays_in_two_files():
    assert users_of("pluggy") == {"scl_defense/hookspecs.py", "scl_defense/plugins.py"}


def test_click_stays_in_the_command_line():
    users = users_of("click")
    assert users and all(user.startswith("scl_defense/cli/") for user in users), users


@pytest.mark.parametrize("library", ["torchattacks", "art"])
def test_each_attack_library_stays_in_one_adapter(library):
    (user,) = users_of(library)
    assert user == f"benchmarks/scl_defense_benchmarks/{library}_adapter.py"


@pytest.mark.parametrize(("library", "file"), [("ray", "on_ray"), ("submitit", "on_slurm")])
def test_each_cluster_library_stays_in_one_executor(library, file):
    assert users_of(library) == {f"benchmarks/scl_defense_benchmarks/study/executors/{file}.py"}


def test_only_runtime_knows_of_other_processes():
    mentions = {
        path.relative_to(ROOT).as_posix()
        for path in sources(CORE, PLUGINS, BENCHMARKS)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed")
    }
    assert (users_of("torch.distributed") | mentions) <= {"scl_defense/runtime.py"}


# -- what may run code that came with data


def dangers(source: str) -> Iterator[tuple[int, str]]:
    """Calls that execute what a file says, or open the door to it."""
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.keyword):
            safe = {"weights_only": "True", "allow_pickle": "False"}.get(node.arg or "")
            if safe and ast.unparse(node.value) != safe:
                yield node.value.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "builtins.eval", "builtins.exec"):
                yield line, f"{called}()"
            if called == "torch.load" and not any(keyword.arg == "weights_only" for keyword in node.keywords):
                yield line, "torch.load() without weights_only=True"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in (
            "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "marshal.load", "joblib.load",
        ):  # fmt: skip
            yield line, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "dill", "cloudpickle", "joblib"):
            yield line, f"from {node.module} import ..."
        elif isinstance(node, ast.Import) and {"dill", "cloudpickle"} & {alias.name for alias in node.names}:
            yield line, ast.unparse(node)
        if (isinstance(node, ast.Attribute) and node.attr in ("add_safe_globals", "safe_globals")) or (
            isinstance(node, ast.alias) and node.name in ("add_safe_globals", "safe_globals")
        ):
            yield line, "add_safe_globals"


TRUSTED = ROOT / "benchmarks" / "scl_defense_benchmarks" / "trusted_pickle.py"  # behind --trust-pickle


def test_no_file_can_run_code():
    folders = [folder for folder in (CORE, ROOT / "plugins", ROOT / "benchmarks") if folder.exists()]
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {danger}"
        for path in sources(*folders)
        for line, danger in dangers(path.read_text())
        if path != TRUSTED
    ]
    assert not wrong, "\n".join(wrong)
    assert sorted(danger for _, danger in dangers(TRUSTED.read_text())) == ["pickle.load", "weights_only=False"]


def test_one_file_alone_reaches_the_trusted_pickle():
    callers = users_of("scl_defense_benchmarks.trusted_pickle")
    assert callers == {"benchmarks/scl_defense_benchmarks/containers.py"}


# -- what is shipped


def test_every_package_is_shipped_and_no_other():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {package_of(path) for path in sources(CORE, PLUGINS, BENCHMARKS)}
    assert set(settings["packages"]) == there
    assert {ROOT / folder for folder in settings["package-dir"].values()} == {CORE, PLUGINS, BENCHMARKS}
    assert not (ROOT / "plugins" / "__init__.py").exists() and not (ROOT / "benchmarks" / "__init__.py").exists()


def test_every_test_file_is_collected():
    """Two test files of one name in different folders hide each other, as there are no test packages."""
    files = sources(ROOT / "tests")
    names = [path.name for path in files if path.name.startswith("test_")]
    assert Path(__file__) in files
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)


# -- the rules themselves


@pytest.mark.parametrize(
    ("source", "full", "typing_only"),
    [
        ("import a.b", "a.b", False),
        ("from a import b", "a.b", False),
        ("def f():\n    from a import b", "a.b", False),
        ("try:\n    import a\nexcept ImportError:\n    pass", "a", False),
        ("from . import b", "top.sub.b", False),
        ("from .c import b", "top.sub.c.b", False),
        ("from ..c import b", "top.c.b", False),
        ("if TYPE_CHECKING:\n    import a", "a", True),
        ("if not TYPE_CHECKING:\n    import a", "a", False),
    ],
)
def test_imports_are_found_wherever_they_stand(source, full, typing_only):
    (found,) = imports(source, "top.sub")
    assert (found.full, found.typing_only) == (full, typing_only)


def test_packages_whose_names_begin_alike_are_told_apart():
    (found,) = imports("from scl_defense_plugins.hooks import x", "p")
    assert found.of("scl_defense_plugins") and not found.of("scl_defense")
    (found,) = imports("import artful", "p")
    assert not found.of("art")
    assert next(imports("from torch import distributed", "p")).of("torch.distributed")


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("torch.load(f, weights_only=False)", 1),
        ("torch.load(f)", 1),
        ("torch.load(f, weights_only=flag)", 1),
        ("torch.load(f, weights_only=True)", 0),
        ("np.load(f, allow_pickle=True)", 1),
        ("np.load(f, allow_pickle=False)", 0),
        ("eval(text)", 1),
        ("model.eval()", 0),
        ("pickle.loads(data)", 1),
        ("from pickle import load", 1),
        ("pickle.dumps(data)", 0),
        ("torch.serialization.add_safe_globals([A])", 1),
        ("from torch.serialization import add_safe_globals", 1),
        ("'eval(x)'  # eval(x)", 0),
    ],
)
def test_dangers_are_found(source, count):
    assert len(list(dangers(source))) == count


def test_the_network_is_blocked_and_this_machine_is_not():
    for address in ("203.0.113.1", "2001:db8::1"):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as sock, pytest.raises(OSError, match="must not use the network"):
            sock.connect((address, 80))
    with pytest.raises(OSError, match="must not use the network"):
        socket.create_connection(("example.invalid", 80), timeout=1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
