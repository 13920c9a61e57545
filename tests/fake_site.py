"""Fake installed distributions for tests of the plugin host; the fixture ``site`` is in conftest.py."""

import importlib
import textwrap
from importlib.metadata import entry_points
from pathlib import Path

from scl_defense.plugins import GROUP, PluginHost

GOOD = """
    from scl_defense import hookimpl

    @hookimpl
    def register_generators(register):
        register("{name}", "{module}_parts:Part", summary="A generator.")
"""
READER = """
    from scl_defense import UserError, hookimpl

    @hookimpl
    def load_checkpoint(path, options):
        seen.append("{name}")
        return answer(path, options)

    seen = []
"""
INSTALLED = {point.dist.name for point in entry_points(group=GROUP) if point.dist}


class Site:
    """A folder of fake installed distributions, on the path of this process."""

    def __init__(self, folder: Path):
        self.folder = folder

    def install(self, name, source=GOOD, *, version="1.0", module=None, point=None, target=None):
        """Write the distribution ``name`` with one module and one entry point; a second call adds another one."""
        module = module or name.replace("-", "_").lower()
        text = textwrap.dedent(source).replace("{name}", name.lower()).replace("{module}", module)
        (self.folder / f"{module}.py").write_text(text)
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        with open(info / "entry_points.txt", "a") as file:
            file.write(f"[{GROUP}]\n" if file.tell() == 0 else "")
            file.write(f"{point or name.lower()} = {target or module}\n")
        importlib.invalidate_caches()
        return self

    def host(self, **options):
        options["disabled"] = {*INSTALLED, *options.get("disabled", ())}
        return PluginHost(**options)


def write(folder: Path, name: str, source: str) -> Path:
    """A plugin of one file."""
    path = folder / name
    path.write_text(textwrap.dedent(source).replace("{name}", "mine").replace("{module}", "mine"))
    return path
