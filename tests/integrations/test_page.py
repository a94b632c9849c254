"""The page of other trainers: its tables are of the versions that the modules take, and its lines are Python."""

from __future__ import annotations

import importlib
import re

import measure
import pytest


@pytest.mark.parametrize(("name", "shown"), [("trl", "TRL"), ("verl", "verl"), ("openrlhf", "OpenRLHF")])
def test_a_table_is_of_the_version_that_the_module_takes(name: str, shown: str) -> None:
    module = importlib.import_module(f"asyppo_kernels.integrations.{name}")
    section = re.search(rf"<!-- {name}: begin.*?-->(.*?)<!-- {name}: end", measure.PAGE.read_text(), re.S)
    assert re.match(rf"\n{shown} {re.escape(module.TESTED)}[.,]", section[1])
    assert section[1].count("\n|") > 3


@pytest.mark.parametrize("trainer", ["prime-rl", "slime"])
def test_lines_to_copy_compile(trainer: str) -> None:
    compile(measure.lines_of(trainer), trainer, "exec")
    assert f"## {trainer}" in measure.PAGE.read_text()
