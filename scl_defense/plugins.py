"""Finding, checking and loading plugins. One bad plugin is set aside and reported; the others go on.

pluggy ignores a misspelt hook until asked, a function without its marker always, stops at the first broken entry
point, and loses every answer when one plugin raises. So each plugin is loaded, checked and called by itself here.
"""

import copy
import hashlib
import importlib.util
import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from scl_defense import hookspecs
from scl_defense.containment import Uncontained, contained
from scl_defense.errors import ComponentError, SclDefenseError, UserError, nearest
from scl_defense.registry import KINDS, Owner, Registry

GROUP = "scl_defense"


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A plugin that was set aside, and why."""

    plugin: str
    owner: Owner
    reason: str
    details: str


class PluginHost:
    """Loaded plugins and the registries they filled.

    Parameters
    ----------
    files: single-file plugins (``--plugin FILE.py``). These run code: a fault in one is an error, not a quarantine.
    disabled: names of entry points or distributions to leave out (``SCL_DEFENSE_DISABLE_PLUGINS=a,b``).
    """

    def __init__(self, *, files: Iterable[str | Path] = (), disabled: Iterable[str] = ()):
        self.registries = {kind: Registry(kind) for kind in KINDS}
        self.loaded: dict[str, Owner] = {}
        self.quarantined: list[Quarantined] = []
        self._pm = pluggy.PluginManager(hookspecs.PROJECT)
        self._pm.add_hookspecs(hookspecs)
        if os.environ.get("SCL_DEFENSE_TRACE") == "1":
            self._pm.trace.root.setwriter(lambda text: sys.stderr.write(text))
            self._pm.enable_tracing()
        off = set(disabled)
        points = sorted(entry_points(group=GROUP), key=lambda point: point.name)
        taken = Counter(point.name for point in points)
        for point in points:
            owner = _owner_of(point)
            if not off & {point.name, owner.name}:
                # Two distributions may both call their entry point "plugin".
                name = point.name if taken[point.name] == 1 else f"{owner.name}:{point.name}"
                self._quarantine_on_error(name, owner, point.load)
        for file in files:
            self._load_file(Path(file))

    # -- what the rest of the project asks

    def __getitem__(self, kind: str) -> Registry:
        return self.registries[kind]

    def call(self, hook: str, **arguments: Any) -> Any:
        """Call a hook of all plugins (``load_checkpoint``: the first answer wins)."""
        return self.first(hook, **arguments)[0]

    def first(self, hook: str, **arguments: Any) -> tuple[Any, str]:
        """The first answer that is not ``None``, and who gave it. Raises :class:`ComponentError`: who failed."""
        for implementation in reversed(getattr(self._pm.hook, hook).get_hookimpls()):
            name, owner = implementation.plugin_name, self.loaded.get(implementation.plugin_name)
            try:
                answer = self._only(implementation.plugin, hook, **arguments)
            except SclDefenseError:
                raise
            except Exception as error:
                text = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise ComponentError(f"{hook} of plugin '{name}' ({owner}) failed: {text}") from error
            if answer is not None:
                return answer, f"plugin '{name}' ({owner})"
        return None, "nobody"

    def register_commands(self, cli: Any) -> None:
        """Let every plugin add commands; one that raises is quarantined."""
        for name in list(self.loaded):
            plugin = self._pm.get_plugin(name)
            if hasattr(plugin, "register_commands"):
                owner = self.loaded[name]
                if not self._guarded(name, owner, lambda p=plugin: self._only(p, "register_commands", cli=cli)):
                    # Its components stay usable, so it stays in the record of what made a result.
                    self.loaded[name] = owner

    def provenance(self) -> list[dict[str, str]]:
        """Plugins and versions, as every checkpoint and result records them."""
        return [
            {"plugin": name, "distribution": owner.name, "version": owner.version}
            for name, owner in sorted(self.loaded.items())
        ]

    # -- loading

    def _load_file(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"plugin file '{path}' does not exist; --plugin takes the path of one Python file")
        try:
            owner = Owner(path.stem, hashlib.sha256(path.read_bytes()).hexdigest()[:12], str(path))
        except OSError as error:
            raise UserError(f"plugin file '{path}' cannot be read: {error.strerror}") from None

        def load() -> ModuleType:
            name = f"scl_defense_file_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}_{path.stem}"
            spec = importlib.util.spec_from_file_location(name, path)
            if spec is None or spec.loader is None:
                raise ImportError("not a Python file (its name must end in .py)")
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module  # dataclasses and pickling look their module up there
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise
            return module

        self._quarantine_on_error(str(path), owner, load)
        bad = next((q for q in self.quarantined if q.plugin == str(path)), None)
        if bad is not None:
            raise UserError(f"plugin file '{path}' was not loaded: {bad.reason}")

    def _quarantine_on_error(self, name: str, owner: Owner, load: Any) -> None:
        def register() -> None:
            with contained(name) as own:
                plugin = load()
                own.add(plugin.__name__)
            _check_markers(plugin)
            if self._pm.is_registered(plugin):
                raise ComponentError("the same module is already loaded")
            self._pm.register(plugin, name=name)
            self._fill(plugin, owner)

        if self._guarded(name, owner, register):
            self.loaded[name] = owner

    def _guarded(self, name: str, owner: Owner, action: Any) -> bool:
        try:
            action()
        except Uncontained:
            raise
        except (Exception, SystemExit) as error:
            text = " ".join(str(error).split())
            reason = text if isinstance(error, ComponentError) else f"{type(error).__name__}: {text}"
            self.quarantined.append(Quarantined(name, owner, reason, traceback.format_exc()))
            if self._pm.has_plugin(name):
                self._pm.unregister(name=name)
            self.loaded.pop(name, None)
            return False
        return True

    def _fill(self, plugin: Any, owner: Owner) -> None:
        # All of a plugin's names or none: collected first, so that a plugin that fails half-way leaves nothing.
        collected: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        scratch = {kind: Registry(kind) for kind in KINDS}
        for kind in KINDS:

            def register(name: str, target: type | str, *, summary: str, kind: str = kind) -> None:
                scratch[kind].add(name, target, summary=summary, owner=owner)
                collected.append((kind, (name, target), {"summary": summary}))

            if hasattr(plugin, f"register_{kind}s"):
                self._only(plugin, f"register_{kind}s", register=register)
        filled = {kind: copy.deepcopy(registry) for kind, registry in self.registries.items()}
        for kind, arguments, keywords in collected:
            filled[kind].add(*arguments, owner=owner, **keywords)
        self.registries = filled

    def _only(self, plugin: Any, hook: str, **arguments: Any) -> Any:
        others = [other for other in self._pm.get_plugins() if other is not plugin]
        return self._pm.subset_hook_caller(hook, remove_plugins=others)(**arguments)


def _owner_of(point: EntryPoint) -> Owner:
    dist = point.dist
    if dist is None:
        return Owner(point.name, "unknown", point.value)
    return Owner(dist.name or point.name, dist.version or "unknown", point.value)  # a damaged dist-info has neither


def _hooks() -> list[str]:
    marker = f"{hookspecs.PROJECT}_spec"
    return sorted(name for name, value in vars(hookspecs).items() if hasattr(value, marker))


def _functions(plugin: Any) -> Iterator[tuple[str, Any]]:
    for name in dir(plugin):
        value = getattr(plugin, name, None)
        if callable(value) and not isinstance(value, type):
            yield name, value


def _check_markers(plugin: Any) -> None:
    """Raise :class:`ComponentError` for a misspelt hook, a forgotten marker, or a plugin without any hook."""
    known, marker = _hooks(), f"{hookspecs.PROJECT}_impl"
    marked = [name for name, value in _functions(plugin) if hasattr(value, marker)]
    for name in marked:
        if name not in known:
            raise ComponentError(f"'{name}' is marked as a hook but there is no such hook{nearest(name, known)}")
    for name, value in _functions(plugin):
        if name in known and name not in marked and getattr(value, "__module__", None) == plugin.__name__:
            raise ComponentError(f"function '{name}' has a hook's name but no @hookimpl marker; add it or rename it")
    if not marked:
        raise ComponentError(f"it implements no hook; mark at least one of {', '.join(known)} with @hookimpl")


@lru_cache(maxsize=8)
def _cached(files: tuple[tuple[str, int], ...], disabled: tuple[str, ...]) -> PluginHost:
    return PluginHost(files=[path for path, _ in files], disabled=disabled)


def default_host(files: Iterable[str | Path] = ()) -> PluginHost:
    """The host of this process for these plugin files; environment ``SCL_DEFENSE_DISABLE_PLUGINS`` is honoured."""
    off = os.environ.get("SCL_DEFENSE_DISABLE_PLUGINS", "")
    dated = tuple((str(file), Path(file).stat().st_mtime_ns if Path(file).is_file() else 0) for file in files)
    return _cached(dated, tuple(name.strip() for name in off.split(",") if name.strip()))
