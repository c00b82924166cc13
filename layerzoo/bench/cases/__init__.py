"""The cases there are: layerzoo's, one module for each family with a tuple `CASES`, and those of plugins."""

from fnmatch import fnmatchcase
from importlib import import_module

from layerzoo.bench.case import Case
from layerzoo.zoo.plugins import plugins

FAMILIES = ("core", "linear", "moe", "ssm")


def all_cases() -> tuple[list[Case], list[str]]:
    """Every case, and in words what keeps a plugin from adding its own: that never keeps others from running.

    A plugin's module of cases (the key `bench` of its manifest) is imported here.
    """
    cases = [case for family in FAMILIES for case in import_module(f"layerzoo.bench.cases.{family}").CASES]
    problems = []
    for plugin in plugins():
        if plugin.state != "ok" or not plugin.bench:
            continue
        try:
            cases += _of_plugin(plugin.name, plugin.bench)
        except Exception as error:  # isolation: whatever is wrong with one plugin stays with it
            problems.append(f"the cases of plugin {plugin.name}: {type(error).__name__}: {error}")
    return cases, problems


def _of_plugin(name: str, module: str) -> list[Case]:
    cases = list(import_module(module).CASES)
    seen = set()
    for case in cases:
        if not isinstance(case, Case):
            raise TypeError(f"{module}.CASES must hold cases, got {case!r}")
        if not case.name.startswith(f"{name}:"):
            raise ValueError(f"a case of the plugin {name} must be called {name}:something, got {case.name!r}")
        if case.id in seen:
            raise ValueError(f"two cases are called {case.id}")
        seen.add(case.id)
    return cases


def select(pattern: str) -> tuple[list[Case], list[str]]:
    """The cases whose id, or whose id before a slash, matches one of the globs in `pattern`, between which are commas;
    and the problems of `all_cases`.

    Raises ValueError for a glob that no case matches.
    """
    cases, problems = all_cases()
    chosen: set[str] = set()
    for glob in pattern.split(","):
        found = {case.id for case in cases if fnmatchcase(case.id, glob) or fnmatchcase(case.id, f"{glob}/*")}
        if not found:
            names = ", ".join(sorted({case.name for case in cases}))
            raise ValueError(
                "; ".join([f"bench: pattern must match a case, got {glob!r}; there are {names}", *problems])
            )
        chosen |= found
    return [case for case in cases if case.id in chosen], problems
