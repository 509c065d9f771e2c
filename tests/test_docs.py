"""The guides tell the truth: their commands run, their recipes load, their keys, names and links exist."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import io
import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import mmmamba
from documents import PAGES, ROOT, Command, anchors, code_spans, commands, fences, links, table
from mmmamba import cli
from mmmamba.ablation.plan import cells_of, load_plan
from mmmamba.checkpoints import load, save_student
from mmmamba.config_files import from_dict, load_yaml, to_dict
from mmmamba.data.jsonl import parse as parse_record
from mmmamba.data.processor import Processor
from mmmamba.distill.recipe import (
    RECIPES,
    DataConfig,
    DistillRecipe,
    TeachRecipe,
    find_recipe,
    load_recipe,
)
from mmmamba.distill.train_config import StageConfig
from mmmamba.evaluation.suite import NANO_ABILITIES
from mmmamba.inference.conversation import Chat
from mmmamba.inference.session import save_session
from mmmamba.model import Mamba2Options, ModelConfig, StackConfig
from small_run import conversation, make_data, stage_file, write_jsonl
from videos import write_video

docstring_parser = pytest.importorskip("docstring_parser")

GUIDE, PLAN = ROOT / "docs" / "recipes.md", ROOT / "docs" / "architecture.md"
DECISIONS = ROOT / "docs" / "decisions.md"
COMMANDS = list({command.words: command for command in reversed(commands("mmmamba"))}.values())[::-1]  # each once
MAKES = commands("make")
LEAVES = {
    f"{word} {sub}".strip(): verb
    for word, entry in cli.VERBS.items()
    for sub, verb in ([("", entry)] if isinstance(entry, cli.Verb) else entry.items())
}
ONE_STEP = {
    "distill": [f"stage{n}.{key}" for n in (1, 2, 3) for key in ("steps=1", "batch_size=2", "compile=false")],
    "teach": ["train.steps=1", "train.batch_size=2", "train.compile=false"],
}


# ---------------------------------------------------------------------------------------------- a place to run in


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """A folder with all that the guides' commands speak of, of tiny size: models, data, pictures, results."""
    place = tmp_path_factory.mktemp("guides")
    teacher = load(teacher_folder)
    (place / "assets").mkdir()
    for name in ("nano-teacher", "pico-teacher"):
        shutil.copytree(teacher_folder, place / "assets" / name)
    student = mmmamba.seed(teacher, mixer=Mamba2Options(rope=True))
    hybrid = mmmamba.seed(teacher, ("attention", *("mamba2",) * 4), Mamba2Options(rope=True))
    for size in ("nano", "pico"):
        for name, model in {"linear": student, "hybrid": hybrid}.items():
            save_student(model, place / "assets" / f"{size}-{name}", teacher=teacher_folder, delta=False)

    room = place / "room"
    pairs = [(before, word) for command in COMMANDS for before, word in pairwise(command.words)]
    finished = {word for _, word in pairs if re.fullmatch(r"runs/[\w-]+/model", word)}
    teachers = {word for before, word in pairs if before in ("--teacher", "--against")}
    for name in finished:
        shutil.copytree(place / "assets" / ("nano-teacher" if name in teachers else "nano-linear"), room / name)
    wanted = [found["data"] for found in map(load_yaml, RECIPES.glob("*.yaml")) if "data" in found]
    for root in {data["root"] for data in wanted}:
        for file in {room / root / source["path"] for data in wanted for source in data["sources"]}:
            shutil.copy(make_data(file.parent, samples=2), file)
    tests = [{"conversations": conversation("how many ?", "1"), "ability": name} for name in NANO_ABILITIES]
    for source, some in (("easy-vqa", tests[:1]), ("primer", tests[1:])):
        write_jsonl(room / "data" / "nano" / source / "test.jsonl", some)
    Image.new("RGB", (70, 50), "red").save(room / "picture.png")
    (room / "val2014").mkdir()
    shutil.copy(room / "picture.png", room / "val2014" / "a.png")
    pope = [{"question_id": 1, "image": "a.png", "text": "Is there a dog?", "label": "no"}]
    write_jsonl(room / "coco_pope_random.json", pope)
    record = {"image": "picture.png", "conversations": conversation("Is there a dog?", "no")}
    write_jsonl(room / "pope.jsonl", [record])
    (room / "mydata").mkdir()
    shutil.copy(room / "picture.png", room / "mydata" / "test-0-red.png")
    write_video(room / "clip.mp4", range(0, 2000, 100))
    (room / "story.txt").write_text("one shape, and another")
    mine = room / "runs" / "mine" / "model"
    talk = Chat(load(mine), Processor.from_folder(mine), max_new_tokens=2)
    list(talk.ask("what ?"))
    save_session(room / "talk.state", talk)
    shutil.copytree(teacher_folder, room / "HoVLE")
    published = mmmamba.seed(teacher)
    for stage in (2, 3):
        stage_file(published, room / f"stage{stage}.pt", stage)
    for part in ("train", "test"):
        write_jsonl(room / "mydata" / f"{part}.jsonl", [{**record, "image": "test-0-red.png"}] * 2)
    return place


@pytest.fixture
def room(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a fresh copy of the furnished one, with tiny models under the built-in names."""
    shutil.copytree(furnished / "room", tmp_path / "room")
    monkeypatch.chdir(tmp_path / "room")
    for module in ("model_source", "write"):
        monkeypatch.setattr(f"mmmamba.checkpoints.{module}.ASSETS", furnished / "assets")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    return tmp_path / "room"


# ---------------------------------------------------------------------------------------------- commands


def test_there_is_something_to_test() -> None:
    verbs = {command.words[1] for command in COMMANDS}
    assert {"teach", "distill", "eval", "chat", "data"} <= verbs
    assert {"demo", "test"} <= {command.words[1] for command in MAKES}


def _marked(command: Command) -> Any:
    """A plan at HoVLE's size takes most of a minute; ``tests/distill/test_dry_run.py`` has the dry run in small."""
    long = {"--dry-run", "--geometry"} <= set(command.words)
    return pytest.param(command, marks=pytest.mark.slow) if long else command


@pytest.mark.parametrize("command", [_marked(command) for command in COMMANDS], ids=str)
def test_command_runs(command: Command, room: Path) -> None:
    """Every command is parsed, and run for real; what would take minutes with fewer steps and shorter answers."""
    argv = list(command.words[1:])
    call = cli.parse(argv)
    given = call.keywords
    changes: dict[str, Any] = {"device": "cpu"} if "device" in given else {}
    if argv[0] in ONE_STEP:
        kind = DistillRecipe if argv[0] == "distill" else TeachRecipe
        load_recipe(kind, given["recipe"], given["set"])  # as it stands in the guide
        if given.get("dry_run"):  # of short rows: operations are counted one by one
            short = [f"{stage}.micro_tokens=256" for stage in ("stage1", "stage2", "stage3")]
            changes["set"] = (*given["set"], "data.max_length=256", *short)
            result = room
        else:
            changes["set"] = (*given["set"], *ONE_STEP[argv[0]], "data.cache=false", "data.workers=0")
            result = Path(given["out"]) / "model" / "config.json"
            shutil.rmtree(given["out"], ignore_errors=True)
    elif argv[0] == "eval":
        changes |= {"limit": 1, "max_new_tokens": 2}
        result = (given["out"] or Path("runs") / f"eval-{Path(given['model']).name}") / "results.json"
    elif argv[0] == "bench":
        changes |= {"contexts": "16", "measure": ("decode",), "resume": False}
        result = (given["report"] or Path("runs") / "bench-nano") / "results.json"
    elif argv[0] == "chat":
        changes["max_new_tokens"] = 2
        result = room
    elif argv[0] == "inspect":
        result = room
    elif argv[0] == "convert":
        result = given["dst"] / "config.json"
    elif argv[:2] == ["data", "convert"]:
        given["out"].unlink(missing_ok=True)
        result = given["out"]
    elif argv[:2] == ["data", "check"]:
        result = room if given["out"] is None else given["out"] / "check.json"
    elif argv[0] == "ablate":
        changes |= {"list": True, "merge": (), "report": False, "into": ()}  # what those read comes of other commands
        result = room
    elif argv[:2] == ["data", "build"] and given["scale"] <= 0.01:
        result = given["out"] / "manifest.json"
    else:
        assert argv[0] in ("demo", "data")
        return
    call.func(**{**given, **changes})
    assert result.exists()


@pytest.mark.parametrize("command", MAKES, ids=str)
def test_make_command_exists(command: Command) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in command.words[1:]:
        name, equals, _ = word.partition("=")
        if equals:
            assert re.search(rf"\$\({name}\)", makefile), f"the Makefile reads no variable {name}"
        else:
            assert re.search(rf"^{name}:", makefile, re.MULTILINE), f"the Makefile has no target {name}"
    if shutil.which("make"):
        dry = subprocess.run(["make", "-n", *command.words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert dry.returncode == 0, dry.stderr


def test_a_wrong_command_would_be_seen(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("distill pico-linear --no-such-option", "eval", "chat pico-linear a b"):
        with pytest.raises(SystemExit) as done:
            cli.parse(wrong.split())
        assert done.value.code == 2
    with pytest.raises(mmmamba.UserError, match="did you mean 'distill'"):
        cli.parse(["destill"])
    with pytest.raises(mmmamba.UserError, match=r"unknown key 'stage3\.step'"):
        test_command_runs(Command("x", ("mmmamba", "distill", "pico-linear", "--set", "stage3.step=1")), room)
    with pytest.raises(SystemExit) as done:
        cli.parse(["--help"])
    assert done.value.code == 0 and "VERB" in capsys.readouterr().out


def test_scripts_exist_and_take_what_is_said() -> None:
    scripts = [command for command in commands("python") if command.words[1].startswith("scripts/")]
    assert scripts
    for command in scripts:
        text = (ROOT / command.words[1]).read_text()
        options = [word for word in command.words[2:] if word.startswith("--")]
        assert all(f'"{option}"' in text for option in options), str(command)


# ---------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("name", LEAVES)
def test_help_has_an_example_and_describes_every_argument(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, _, attribute = LEAVES[name].function.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    assert cli.main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    teaching, _, options = shown.partition(f"usage: mmmamba {name} ")
    assert f"mmmamba {name}" in teaching
    said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", options).split())
    entries = {entry.arg_name: entry.description for entry in docstring_parser.parse(function.__doc__ or "").params}
    for parameter in inspect.signature(function).parameters:
        description = entries.get(parameter)
        assert description, f"mmmamba {name} does not describe {parameter}"
        first_words = description.split()[:3]
        assert " ".join(first_words) in said, f"mmmamba {name} --help does not show what {parameter} is"


# ---------------------------------------------------------------------------------------------- other fences


@pytest.mark.parametrize("fence", fences("python"), ids=lambda fence: fence.where)
def test_python_runs(fence: Any, room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    exec(compile(fence.text, fence.where, "exec"), {})


def test_the_data_made_in_the_guide_can_be_trained_on(room: Path) -> None:
    page = ROOT / "docs" / "getting_started.md"
    shutil.rmtree("mydata")
    for fence in fences("python", (page,)):
        exec(compile(fence.text, fence.where, "exec"), {})
    for command in commands("mmmamba", pages=(page,)):
        if "mydata" in " ".join(command.words):
            test_command_runs(command, room)


@pytest.mark.parametrize("fence", fences("yaml"), ids=lambda fence: fence.where)
def test_recipe_loads(fence: Any, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(fence.text)
    if "tables:" in fence.text:
        assert cells_of(*load_plan(file))
        return
    recipe = load_recipe(DistillRecipe if "stage1" in fence.text else TeachRecipe, file)
    assert recipe.name


@pytest.mark.parametrize("fence", fences("json"), ids=lambda fence: fence.where)
def test_record_is_read(fence: Any) -> None:
    line = json.dumps(json.loads(fence.text)).encode()
    assert parse_record(line, where="guide:1", image_root=Path("/")).turns


# ---------------------------------------------------------------------------------------------- keys and names


@pytest.mark.parametrize(
    ("heading", "kind"),
    {
        "Keys of a distillation recipe": DistillRecipe,
        "Keys of data": DataConfig,
        "Keys of a stage": StageConfig,
        "The mixer": Mamba2Options,
        "Keys of a teaching recipe": TeachRecipe,
        "Keys of a model": ModelConfig,
        "Keys of a stack": StackConfig,
    }.items(),
)
def test_every_key_is_explained_with_its_default(heading: str, kind: Any) -> None:
    said = {}
    for keys, default, meaning in table(GUIDE, heading):
        assert meaning
        said |= {key: default.strip("`") for key in re.findall(r"`(\w+)`", keys)}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    assert set(said) == set(fields)
    for name, field in fields.items():
        value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if value is dataclasses.MISSING:
            assert said[name] == "required", name
        elif dataclasses.is_dataclass(value):
            assert from_dict(type(value), yaml.safe_load(said[name])) == value, name
        else:
            found = yaml.safe_load(said[name])
            assert (float(found) if isinstance(value, float) else found) == to_dict(value), name


def test_recipes_are_listed() -> None:
    listed = {name for row in table(GUIDE, "Recipes") for name in re.findall(r"`([\w.-]+)`", row[0])}
    assert listed == {path.stem for path in RECIPES.glob("*.yaml")}
    for name in listed:
        if "tables" in load_yaml(find_recipe(name)):
            cells_of(*load_plan(name))
        else:
            load_recipe(TeachRecipe if "teacher" in name else DistillRecipe, find_recipe(name))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_options_and_files_exist(page: Path) -> None:
    scripts = "".join(path.read_text() for path in (ROOT / "scripts").rglob("*.py"))
    options = {"--help", "--index-url", *re.findall(r'"(--[a-z0-9-]+)"', scripts)}
    for verb in LEAVES.values():
        module, _, attribute = verb.function.partition(":")
        names = inspect.signature(getattr(importlib.import_module(module), attribute)).parameters
        options |= {"--" + name.replace("_", "-") for name in names}
    for code in code_spans(page):
        for option in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", code):
            assert option in options, f"no verb has {option}"
        if re.fullmatch(r"(tests|src|scripts|docs)/[\w/.]+", code):
            assert (ROOT / code).exists() or code.endswith("assets"), code
        if name := re.fullmatch(r"mmmamba\.(\w+)", code):
            assert getattr(mmmamba, name[1])
        if words := re.fullmatch(r"mmmamba ([a-z]+)( [a-z]+)?", code):
            assert words[1] in cli.VERBS, code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        if target.startswith("https://"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_package_index_is_named_and_no_line_ends_in_a_space(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"pytorch\.org|pypi\.org|pythonhosted|PyPI", text)
    assert not re.search(r"[ \t]$| [\"']$", text, re.MULTILINE)


def test_every_guide_is_linked_from_the_readme_and_from_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= set(links(PAGES[0]))
    assert {page.name for page in PAGES[1:] if page != index} <= set(links(index))


# ---------------------------------------------------------------------------------------------- the house


def imported(package: Path) -> set[str]:
    """The first-level parts of mmmamba that the files of a package (or a module) import, anywhere in them."""
    found = set()
    for file in package.rglob("*.py") if package.is_dir() else [package.with_suffix(".py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {name.split(".")[1] for name in names if name.startswith("mmmamba.")}
    return found - {package.name}


def test_every_path_in_the_architecture_exists() -> None:
    """Paths start at the top of the repository or in ``src/mmmamba``."""
    paths = [
        code for page in (PLAN, DECISIONS) for code in code_spans(page) if re.fullmatch(r"[\w.-]+(/[\w.-]*)+", code)
    ]
    assert len(paths) > 30
    for path in paths:
        assert any((root / path).exists() for root in (ROOT, ROOT / "src" / "mmmamba")), path


def test_newcomers_questions_are_answered_by_paths() -> None:
    answers = table(PLAN, "Where to find things")
    assert len(answers) >= 10
    for question, answer in answers:
        assert re.search(r"`[\w/]+(\.py|/)`", answer), question


def test_imports_keep_to_the_plan() -> None:
    source = ROOT / "src" / "mmmamba"
    rows = table(PLAN, "Which package may import which")
    everyone = {name for packages, _, _ in rows[:2] for name in re.findall(r"`(\w+)`", packages)}
    seen = set()
    for packages, allowed, _ in rows:
        names = re.findall(r"`(\w+)`", packages)
        seen |= set(names)
        if allowed == "all":
            continue
        for name in names:
            extra = imported(source / name) - set(re.findall(r"`(\w+)`", allowed)) - everyone
            assert not extra, f"{name} imports {', '.join(sorted(extra))}"
    parts = {path.stem for path in source.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert seen == {part for part in parts if not part.startswith("_")}
