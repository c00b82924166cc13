"""The cases that layerzoo brings: one module for each family, with a tuple `CASES`."""

from importlib import import_module

from layerzoo.bench.case import Case

FAMILIES = ("linear", "ssm")


def all_cases() -> list[Case]:
    """Every case; raises ValueError where two have the same id."""
    cases: dict[str, Case] = {}
    for family in FAMILIES:
        for case in import_module(f"layerzoo.bench.cases.{family}").CASES:
            if case.id in cases:
                raise ValueError(f"bench: two cases are called {case.id}")
            cases[case.id] = case
    return list(cases.values())
