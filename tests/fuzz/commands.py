"""Command lines: drawn from the verbs' own signatures, with values that nobody means."""

from __future__ import annotations

import importlib
import inspect
import io
import random
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import small_run
from fuzz import mutate
from fuzz.models import folder_of
from mmmamba import cli
from mmmamba.errors import UserError
from mmmamba.model import MAMBA2

# What ends within moments whatever it is asked; of the others only the command line is read.
RUN = ("inspect", "convert", "data check", "data convert", "version")
WRITTEN = ("out", "dst")  # never a path out of the folder: it would be written
NAMES = ["o", "a b", "-", "--", "\n", "é", "$x^$", "[/b]", "\x1b[31m", "\udcff", "x" * 300, "a/b/c", ".hidden"]


def seeds(folder: Path) -> dict[str, Any]:
    leaves: dict[str, cli.Verb] = {}
    for word, entry in cli.VERBS.items():
        subs = {f"{word} {sub}": verb for sub, verb in entry.items()} if isinstance(entry, Mapping) else {word: entry}
        leaves |= {name: verb for name, verb in subs.items() if isinstance(verb, cli.Verb)}
    signatures = {}
    for name, verb in leaves.items():
        module, _, attribute = verb.function.partition(":")
        signatures[name] = inspect.signature(getattr(importlib.import_module(module), attribute)).parameters
    model = folder_of(folder / "m", (MAMBA2, MAMBA2))
    return {"signatures": signatures, "model": str(model), "data": str(small_run.make_data(folder / "data", 2))}


def commands(rng: random.Random, seeds: dict[str, Any], here: Path) -> None:
    name = rng.choice([*seeds["signatures"], *RUN])
    args = name.split()
    if rng.random() < 0.05:
        args[-1] = rng.choice([args[-1] + "x", "", "-h", *mutate.STRINGS])
    for parameter in seeds["signatures"][name].values():
        value = _value(rng, parameter.name, seeds)
        if parameter.kind is not parameter.KEYWORD_ONLY:
            if parameter.default is parameter.empty or rng.random() < 0.5:
                args.append(value)
        elif parameter.default is parameter.empty or rng.random() < 0.15:
            flag = f"--{parameter.name.replace('_', '-')}"
            together = rng.random() < 0.2
            given = [f"{flag}={value}"] if together else [flag, value]
            args += [flag] if isinstance(parameter.default, bool) else given
    if rng.random() < 0.1:
        args.insert(rng.randrange(len(args) + 1), rng.choice([*mutate.STRINGS, "--help", "--nothing", "-x"]))
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    try:
        if name in RUN and args[: len(name.split())] == name.split():
            code = cli.main(args)
        else:
            code = _parsed(args)
        said = sys.stderr.getvalue()
    finally:
        sys.stdout, sys.stderr = out, err
    assert code in (0, 2), code
    own = not "".join(args).isprintable()  # tyro repeats what it was given
    assert "Traceback" not in said and (own or not re.search(r"[\x00-\x08\x0e-\x1f\x7f]", said)), said
    if code:
        raise UserError("refused")


def _parsed(args: list[str]) -> int:
    try:
        cli.parse(args)
    except UserError:
        return 2
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 2
    return 0


def _value(rng: random.Random, name: str, seeds: dict[str, Any]) -> str:
    if name in WRITTEN:
        return rng.choice(NAMES)
    if rng.random() < 0.4:
        return str(rng.choice([seeds["model"], seeds["data"], "pico-linear", "1", "2", "auto", "float32"]))
    return rng.choice([*mutate.STRINGS, *map(str, mutate.NUMBERS)])
