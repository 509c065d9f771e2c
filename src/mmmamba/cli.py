"""``mmmamba VERB …``: one flat table of verbs, nothing else.

Each verb is a plain function in the module that does the work; its docstring is the help and its signature the options
(parameters before the ``*`` are positional). A verb's module is imported only when that verb is called.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, get_origin, get_type_hints

from mmmamba import console
from mmmamba.errors import UserError, printable
from mmmamba.version import __version__

ABOUT = "mmmamba turns decoder-only multimodal Transformers into linear-time state space models."
OK, USAGE, INTERRUPTED, BROKEN_PIPE = 0, 2, 130, 141


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A verb: its function, its line and example in the overview, and what to do after an interruption."""

    function: str  # "module:name"
    summary: str
    example: str
    go_on: str = "run the same command to start again"


VERBS: Mapping[str, Verb | Mapping[str, Verb]] = {
    "teach": Verb(
        function="mmmamba.distill.train_teacher:teach",
        summary="train a small softmax teacher from scratch, following a recipe",
        example="mmmamba teach nano-teacher --out runs/nano-teacher",
        go_on="add --resume to the same command to continue from the last checkpoint",
    ),
    "distill": Verb(
        function="mmmamba.distill.distill:distill",
        summary="turn a teacher into a linear or hybrid student, following a recipe",
        example="mmmamba distill pico-linear --out runs/pico-linear",
        go_on="add --resume to the same command to continue from the last checkpoint",
    ),
    "eval": Verb(
        function="mmmamba.evaluation.evaluate:evaluate",
        summary="measure what a model can do, alone or against another",
        example="mmmamba eval nano-linear --against nano-teacher",
    ),
    "ablate": Verb(
        function="mmmamba.ablation.ablate:ablate",
        summary="find out what matters in a recipe: distil and test many variants, over several seeds",
        example="mmmamba ablate nano-ablation --only placement",
        go_on="run the same command to continue with the cell it was in",
    ),
    "bench": Verb(
        function="mmmamba.benchmark.bench:bench",
        summary="measure what models cost: latency, prefill, memory, throughput, with plots",
        example="mmmamba bench --geometry nano",
        go_on="add --resume to the same command to continue with what is left to measure",
    ),
    "chat": Verb(
        function="mmmamba.inference.chat:chat",
        summary="ask a model about pictures",
        example='mmmamba chat nano-linear --image photo.png "What is in the picture?"',
        go_on="run the same command for a new conversation",
    ),
    "inspect": Verb(
        function="mmmamba.inspection:inspect",
        summary="show what a model is made of and what it costs, without loading it",
        example="mmmamba inspect pico-hybrid",
    ),
    "convert": Verb(
        function="mmmamba.convert:convert",
        summary="write a model in another layout: for transformers, or like the published students",
        example="mmmamba convert nano-linear nano-linear-whole",
    ),
    "data": {
        "build": Verb(
            function="mmmamba.data.build:build",
            summary="make the built-in training and test data",
            example="mmmamba data build --out data/nano",
            go_on="run the same command; finished sources are kept",
        ),
        "check": Verb(
            function="mmmamba.data.check:check",
            summary="read a data set as training would, and report what is in it and what is wrong",
            example="mmmamba data check mydata/train.jsonl --teacher pico-teacher",
        ),
        "convert": Verb(
            function="mmmamba.evaluation.converters:convert_dataset",
            summary="convert the files of a public benchmark to our JSONL",
            example="mmmamba data convert pope coco_pope_random.json --image-root val2014 --out pope.jsonl",
        ),
    },
    "demo": Verb(
        function="mmmamba.demo:demo",
        summary="see the whole way at small size: teacher, distillation, student, comparison",
        example="mmmamba demo",
    ),
    "version": Verb(
        function="mmmamba.cli:version",
        summary="print the versions of mmmamba and of the packages it uses",
        example="mmmamba version",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code (0 done, 2 wrong usage or input, 130 interrupted)."""
    args = list(sys.argv[1:] if argv is None else argv)
    verb: Verb | None = None
    try:
        console.prepare(args)
        _check_place()
        if args[:1] == ["--version"]:
            args = ["version"]
        verb, name, rest = _find(VERBS, "mmmamba", args)
        if verb is not None:
            try:
                call = _parse(verb, name, rest)
            except SystemExit as done:  # tyro leaves this way after --help (0) and after wrong usage (2)
                return done.code if isinstance(done.code, int) else USAGE
            call()
        sys.stdout.flush()  # flush here, so that a closed pipe is noticed inside this `try`
        return OK
    except UserError as error:
        console.complain(f"error: {error}")
        return USAGE
    except KeyboardInterrupt:
        console.complain(f"\ninterrupted: {verb.go_on if verb else Verb.go_on}")
        return INTERRUPTED
    except BrokenPipeError:
        console.discard_stdout()  # the reader (head, less) has gone
        return BROKEN_PIPE
    except OSError as error:  # such as a full disk or a folder that may not be read: show the system's reason
        console.complain(f"error: {printable(console.why_not_written(error))}")
        return USAGE


def _check_place() -> None:
    """Refuse a working folder that was removed: in it, PyTorch's libraries end the process with an obscure message.

    Also make matplotlib draw to files. A notebook may have set a backend that is not installed here.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the folder that this runs in was removed; change to another one") from error
    os.environ["MPLBACKEND"] = "agg"


def parse(argv: Sequence[str]) -> partial[Any]:
    """The call that a command line asks for, without making it: its ``func``, ``args`` and ``keywords``.

    Raises:
        UserError: when there is no such verb.
        SystemExit: help was asked for (0) or the arguments are wrong (2). The text has been printed.
    """
    verb, name, rest = _find(VERBS, "mmmamba", list(argv))
    if verb is None:
        raise SystemExit(OK)
    return _parse(verb, name, rest)


def version() -> None:
    """Print the versions of mmmamba and of the packages it uses, for a bug report."""
    import platform
    from importlib.metadata import version as installed

    print(f"mmmamba {__version__}")
    print(f"python {platform.python_version()} ({platform.platform()})")
    for package in ("torch", "numpy", "tokenizers", "safetensors", "pillow"):
        print(f"{package} {installed(package)}")


def _find(
    verbs: Mapping[str, Verb | Mapping[str, Verb]], prog: str, args: list[str]
) -> tuple[Verb | None, str, list[str]]:
    """(verb, its full name, its arguments). The verb is None if the overview was asked for; it was printed then."""
    if not args:
        console.complain(_overview(verbs, prog))
        raise UserError(f"{prog} needs a verb: {', '.join(verbs)}")
    word, *rest = args
    if word in ("-h", "--help"):
        print(_overview(verbs, prog))
        return None, prog, rest
    if word not in verbs:
        nearest = difflib.get_close_matches(word, verbs, n=1, cutoff=0.4)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"known: {', '.join(verbs)}"
        raise UserError(f"{prog} has no verb '{word}' ({hint})")
    found = verbs[word]
    return (found, f"{prog} {word}", rest) if isinstance(found, Verb) else _find(found, f"{prog} {word}", rest)


def _overview(verbs: Mapping[str, Verb | Mapping[str, Verb]], prog: str) -> str:
    """The text of ``mmmamba --help``: one line for each verb, with an example under it."""
    lines = [f"usage: {prog} VERB …", ""]
    if prog == "mmmamba":
        lines += [ABOUT, ""]
    for word, entry in verbs.items():
        leaves = {word: entry} if isinstance(entry, Verb) else {f"{word} {sub}": verb for sub, verb in entry.items()}
        for name, verb in leaves.items():
            lines += [f"  {name:<13} {verb.summary}", f"  {'':<13}   {verb.example}"]
    return "\n".join([*lines, "", f"{prog} VERB --help explains a verb and its options."])


def _parse(verb: Verb, name: str, args: Sequence[str]) -> partial[Any]:
    """Parse ``args`` by the signature of the verb's function. Returns the call, not made yet."""
    import tyro

    module, _, attribute = verb.function.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    if "-h" in args or "--help" in args:
        # tyro's `description` would join and break lines in its own way, and would not wrap them.
        print(_description(function, verb, name), end="\n\n")
    return tyro.cli(
        _from_command_line(function),
        prog=name,
        args=args,
        description="",
        config=(tyro.conf.PositionalMetavarFromFieldName, tyro.conf.DisallowNone),
    )


def _from_command_line(function: Callable[..., Any]) -> Callable[..., partial[Any]]:
    """A function that binds ``function`` to its arguments. Its signature tells tyro how the command line looks.

    Parameters before the ``*`` become positional. A list or tuple after it becomes an option that can be repeated
    (``--image a.png --image b.png``), so that no option takes the positional argument after it.
    """
    import tyro

    signature = inspect.signature(function)
    hints = get_type_hints(function, include_extras=True)
    several_defaults: dict[str, Any] = {}
    parameters = []
    for parameter in signature.parameters.values():
        hint, default = hints[parameter.name], parameter.default
        if default is None:
            hint = Annotated[hint, tyro.conf.arg(help_behavior_hint="(optional)")]
        if parameter.kind is not parameter.KEYWORD_ONLY:
            hint = Annotated[hint, tyro.conf.Positional]
        elif _is_several(hints[parameter.name]):
            hint = Annotated[hint, tyro.conf.UseAppendAction]
            if default and default is not parameter.empty:
                # tyro would append to the default. Here, given values replace it.
                several_defaults[parameter.name] = default
                shown = " ".join(str(item) for item in default)
                hint = Annotated[hint, tyro.conf.arg(help_behavior_hint=f"(repeatable; default: {shown})")]
                parameter = parameter.replace(default=type(default)())
        parameters.append(parameter.replace(annotation=hint))

    def bind(*args: Any, **options: Any) -> partial[Any]:
        for name, default in several_defaults.items():
            options[name] = options.get(name) or default
        return partial(function, *args, **options)

    bind.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    bind.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    bind.__doc__ = _joined_entries(function.__doc__ or "")
    bind.__name__ = function.__name__
    return bind


def _is_several(hint: Any) -> bool:
    origin = get_origin(hint) or hint
    return isinstance(origin, type) and issubclass(origin, Sequence) and not issubclass(origin, (str, bytes))


def _description(function: Callable[..., Any], verb: Verb, name: str) -> str:
    """The docstring up to its ``Args:``, wrapped for this terminal. An example is added if it has none."""
    lines = inspect.cleandoc(function.__doc__ or verb.summary).splitlines()
    sections = ("Args:", "Returns:", "Raises:", "Yields:")
    text = "\n".join(lines[: next((i for i, line in enumerate(lines) if line in sections), len(lines))]).strip()
    if f"{name} " not in text:
        text += f"\n\nFor example:\n\n    {verb.example}"
    width = min(100, shutil.get_terminal_size().columns)
    paragraphs = text.replace("::\n", ":\n").replace("``", "`").split("\n\n")
    return "\n\n".join(part if part.startswith(" ") else textwrap.fill(part, width) for part in paragraphs)


def _joined_entries(docstring: str) -> str:
    """``docstring`` with each entry under ``Args:`` on one line, so that the help can wrap it to the terminal."""
    return re.sub(r"\n {8,}(?=\S)", " ", inspect.cleandoc(docstring))
