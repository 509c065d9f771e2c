"""What `from mmmamba.ops import …` gives: functions, though some folders have the same names."""

from __future__ import annotations

import importlib
import importlib.resources
import inspect
import pkgutil
import subprocess
import sys

import pytest

from mmmamba import ops

FOLDERS = [found.name for found in pkgutil.iter_modules(ops.__path__) if found.ispkg]
SHARED = sorted({*FOLDERS} & {*ops.__all__})


def test_every_public_name_is_a_function_or_a_class() -> None:
    assert all(inspect.isfunction(getattr(ops, name)) or inspect.isclass(getattr(ops, name)) for name in ops.__all__)


@pytest.mark.parametrize("name", SHARED)
def test_a_folder_does_not_hide_its_function(name: str) -> None:
    first = f"import mmmamba.ops.{name}.reference\nfrom mmmamba.ops import {name}\nassert callable({name})"
    subprocess.run([sys.executable, "-c", first], check=True)
    for module in pkgutil.iter_modules(importlib.import_module(f"mmmamba.ops.{name}").__path__):
        importlib.import_module(f"mmmamba.ops.{name}.{module.name}")
        assert inspect.isfunction(getattr(ops, name))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_has_its_contract_twin_and_mathematics(folder: str) -> None:
    module = importlib.import_module(f"mmmamba.ops.{folder}")
    files = {path.name for path in importlib.resources.files(module).iterdir()}
    assert {"README.md", "reference.py"} <= files and {"kernels.py", "launch.py"} & files
    assert set(module.__all__) <= set(ops.__all__)
