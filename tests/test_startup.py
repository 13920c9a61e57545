"""What the front door costs: listing plugins and explaining a wrong name must import nothing heavy."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import scl_defense


def run(code, *paths, **environment):
    """Run code in a fresh interpreter that sees these folders; what it prints."""
    root = Path(scl_defense.__file__).parents[1]
    path = os.pathsep.join(str(p) for p in (*paths, root, os.environ.get("PYTHONPATH", "")) if str(p))
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = {"torch", "numpy", "scipy", "pydantic", "click", "rich", "torchvision", "torchattacks", "art", "sklearn"}
REPORT = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"


def test_importing_the_package_imports_nothing_heavy():
    imported = set(run(f"import scl_defense\n{REPORT}").split())
    assert "scl_defense" in imported and not imported & HEAVY


def test_a_host_imports_the_hook_modules_and_nothing_else(site):
    site.install("toys")
    (site.folder / "toys_parts.py").write_text("import torch\nclass Part: pass\n")
    code = f"""
        from scl_defense.plugins import PluginHost
        host = PluginHost()
        assert host["generator"].entry("toys").summary == "A generator."
        assert "did you mean" in str(error(host))
        {REPORT}
    """
    helper = """
        def error(host):
            try:
                host["generator"].get("tois")
            except Exception as error:
                return error
    """
    imported = set(run(textwrap.dedent(helper) + textwrap.dedent(code), site.folder).split())
    assert {"toys", "scl_defense"} <= imported
    assert "toys_parts" not in imported and not imported & HEAVY


BUILTIN = {"builtin": "scl_defense_plugins.hooks", "benchmarks": "scl_defense_benchmarks.hooks"}


@pytest.mark.parametrize("point", BUILTIN)
def test_the_hook_modules_of_the_project_import_nothing_heavy(site, point):
    module = BUILTIN[point]
    site.install("builtin-under-test", module="unused", point=f"{point}-under-test", target=module)
    code = f"""
        import sys
        from scl_defense.plugins import PluginHost
        from importlib.metadata import entry_points
        others = {{p.dist.name for p in entry_points(group="scl_defense")}} - {{"builtin-under-test"}}
        host = PluginHost(disabled=others)
        assert host.quarantined == [], host.quarantined
        assert sum(len(registry) for registry in host.registries.values()) > 0
        print(*(name for name in sys.modules if name.startswith("{module.partition(".")[0]}")))
        {REPORT}
    """
    root = Path(scl_defense.__file__).parents[1]
    first, second = run(code, site.folder, root / "plugins", root / "benchmarks").splitlines()
    assert set(first.split()) == {module.partition(".")[0], module}
    assert not set(second.split()) & HEAVY
