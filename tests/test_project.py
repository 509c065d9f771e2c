"""The files beside the code: what the Makefile offers, what the sdist holds, changelog and citation."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import mmmamba
from documents import ROOT, anchors, code_spans, commands, links, table
from mmmamba import cli
from mmmamba.checkpoints.layouts import LAYOUTS
from mmmamba.model.mixers import kinds

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SCRIPTS = sorted(path for path in (ROOT / "scripts").rglob("*") if path.suffix in (".py", ".sh"))


def tracked() -> list[str]:
    """Every file that git tracks, as a path from the root; skips the test where this is no checkout."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [name for name in listed.split("\0") if (ROOT / name).is_file()]


# ---------------------------------------------------------------------------------------------- make


def targets() -> dict[str, str]:
    """Each target of the Makefile that is a word, with its commands."""
    return dict(re.findall(r"^([a-z][a-z-]*):[^\n=]*\n((?:\t.*\n)*)", MAKEFILE, re.MULTILINE))


def test_every_target_is_phony_and_has_a_line_in_help() -> None:
    [phony] = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)
    assert set(phony.split()) == set(targets())
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    lines = {line.split()[1]: line for line in shown.splitlines()}
    assert set(lines) == set(targets())
    assert all(len(line.split()) > 4 and len(line) <= 120 for line in lines.values())


def test_lint_checks_style_format_and_types() -> None:
    lint = targets()["lint"]
    assert [command in lint for command in ("ruff check", "ruff format --check", "mypy")] == [True] * 3


def test_the_packages_that_all_stand_on_are_typed_strictly() -> None:
    overrides = PROJECT["tool"]["mypy"]["overrides"]
    [strict] = [one for one in overrides if one.get("warn_return_any")]
    assert {"mmmamba.model.*", "mmmamba.ops.*", "mmmamba.checkpoints.*"} <= set(strict["module"])
    assert strict["disallow_untyped_defs"] and strict["disallow_any_generics"]
    [kernels] = [one for one in overrides if one.get("disallow_untyped_defs") is False]
    assert all(re.search(r"kernels$", name) for name in kernels["module"])


def test_no_function_is_more_complex_than_the_limit() -> None:
    """The rule is on, with a limit that a screen holds, and only jitted kernels are exempt."""
    lint = PROJECT["tool"]["ruff"]["lint"]
    assert "C90" in lint["select"] and lint["mccabe"]["max-complexity"] <= 12
    exempt = [name for name, rules in lint["per-file-ignores"].items() if "C901" in rules]
    assert exempt == ["src/mmmamba/ops/**/*kernels.py"]


def test_clean_removes_what_git_ignores_of_tools_and_builds() -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8")
    tools = re.search(r"# environments and tools\n(.*?)\n\n# builds\n(.*?)\n\n", ignored, re.DOTALL)
    assert tools
    removed = targets()["clean"].replace("$(VENV)", ".venv")
    for line in "\n".join(tools.groups()).split():
        name = line.strip("/").removeprefix("*")
        assert name == ".py[cod]" or name in removed, f"make clean leaves {line}"


# ---------------------------------------------------------------------------------------------- distributions


def test_the_sdist_holds_every_tracked_file() -> None:
    """Files and folders are listed with a leading slash, so that no other file of the name is meant."""
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert all(name.startswith("/") and (ROOT / name[1:]).exists() for name in included)
    always = {"/pyproject.toml"}
    for name in tracked():
        assert f"/{name.split('/')[0]}" in always | set(included), f"the sdist lacks {name}"


def test_no_tracked_file_is_ignored() -> None:
    """Builds leave out what ``.gitignore`` names, tracked or not."""
    tracked()
    listed = subprocess.run(["git", "ls-files", "-ci", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    assert listed.stdout == b""


def test_a_link_to_a_folder_stays_out_of_the_sdist() -> None:
    """Hatchling follows a link, and then leaves out the folder that it leads to."""
    sdist = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]
    assert sdist["exclude"] == ["/recipes"] and sdist["skip-excluded-dirs"] is True
    folders = {name.split("/")[0] for name in tracked()}
    assert not [name for name in folders if (ROOT / name).is_symlink() and (ROOT / name).is_dir()]


# ---------------------------------------------------------------------------------------------- the docs site

SITE = runpy.run_path(str(ROOT / "scripts" / "docs_site.py"))


def named(nav: Any) -> list[str]:
    """Every page in a part of the nav of mkdocs.yml."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in named(entry)]


def test_the_nav_names_every_page_once() -> None:
    nav = named(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert len(nav) == len(set(nav))
    assert set(nav) == pages | set(SITE["pages"]()) | set(SITE["references"]())


def test_the_api_reference_has_every_package_and_module() -> None:
    source = ROOT / "src" / "mmmamba"
    text = "\n".join(SITE["references"]().values())
    found = {path.stem for path in source.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(re.findall(r"^::: mmmamba\.(\w+)$", text, re.MULTILINE)) == {
        name for name in found if not name.startswith("_")
    }


def test_links_of_a_page_that_moves_lead_to_pages_of_the_site(tmp_path: Path) -> None:
    text = "[a](docs/bench.md#how), [b](CHANGELOG.md), [c](src/mmmamba/cli.py), [d](https://x.y)\n```sh\n[e](docs/bench.md)\n```\n"
    moved = SITE["moved"](text, ROOT / "CONTRIBUTING.md", "operators/x.md")
    assert moved == text.replace("docs/bench.md#", "../bench.md#").replace("CHANGELOG.md", "../changelog.md").replace(
        "[c](src/mmmamba/cli.py)", "c"
    )


def test_docstrings_become_markdown() -> None:
    assert (
        SITE["plain"]("See :func:`~mmmamba.x`.\n\nExample::\n\n    y\n")
        == "See `mmmamba.x`.\n\nFor example:\n\n    y\n"
    )
    entries = "Args:\n    a, b: two\n        lines.\n    c: one.\n"
    assert SITE["plain"](entries) == "Args:\n    a: two\n        lines.\n    b: two\n        lines.\n    c: one.\n"


@pytest.mark.slow  # 20 s
def test_the_docs_site_is_built_without_warnings(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        pytest.importorskip(package, reason="needs pip install 'mmmamba[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    loaded = set()
    for page in (tmp_path / "site").rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        loaded |= set(re.findall(r"<(?:script|img|iframe)[^>]* src=\"?(https?:[^\" >]+)", html))
        loaded |= set(re.findall(r"<link[^>]* rel=\"?(?:stylesheet|preconnect)[^>]* href=\"?(https?:[^\" >]+)", html))
    assert not loaded, f"pages load from the network: {sorted(loaded)}"


# ---------------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_begins_with_what_it_does_and_how_it_is_called(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    head = text.split('"""')[1] if script.suffix == ".py" else "\n".join(re.findall(r"^#(?!!) ?(.*)$", text, re.M))
    first, _, rest = head.strip().partition("\n")
    assert len(first) > 20 and first[0].isupper()
    if "def main" in text or script.suffix == ".sh":
        assert f" {script.relative_to(ROOT)}" in rest, f"{script.name} does not say how it is called"


# ---------------------------------------------------------------------------------------------- contributing

CONTRIBUTING = ROOT / "CONTRIBUTING.md"
HOW_TO = ("Add a mixer", "Add an operator", "Add a teacher family", "Add a recipe", "Report a number")


def files(heading: str) -> list[str]:
    """The paths in the table under a heading of CONTRIBUTING.md; ``<name>`` is for any name."""
    return [
        path for row in table(CONTRIBUTING, heading) for path in re.findall(r"`([\w./<>-]+/[\w./<>-]*)`", " ".join(row))
    ]


def test_every_path_in_contributing_exists() -> None:
    """A path with a ``<name>`` stands for at least one file that exists."""
    paths = [code for code in code_spans(CONTRIBUTING) if re.match(r"(src|tests|docs|scripts)\b[\w./<>-]*$", code)]
    assert len(paths) > 20
    for path in paths:
        assert list(ROOT.glob(re.sub(r"<\w+>", "*", path))), f"CONTRIBUTING.md names {path}, which does not exist"
    for heading in HOW_TO:
        assert files(heading), f"no file is named under '{heading}'"


def test_links_and_commands_of_contributing_are_real() -> None:
    for link in links(CONTRIBUTING):
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists() and (not anchor or anchor in anchors(ROOT / path)), link
    make = {word[5:] for word in code_spans(CONTRIBUTING) if word.startswith("make ")}
    make |= {command.words[1] for command in commands("make", pages=(CONTRIBUTING,))}
    assert {"setup", "lint", "test", "test-all", "docs", "dist"} <= make <= set(targets())
    for command in commands("mmmamba", pages=(CONTRIBUTING,)):
        cli.parse(list(command.words[1:]))
    for words in (code.split() for code in code_spans(CONTRIBUTING) if code.startswith("mmmamba ")):
        assert words[1] in cli.VERBS


def test_an_operator_is_the_files_that_contributing_names() -> None:
    """Every folder of ``ops`` has each file of the table, and every README has its page."""
    place = ROOT / "src" / "mmmamba" / "ops"
    operators = sorted(path.parent for path in place.glob("*/__init__.py"))
    assert len(operators) > 10
    exported = (place / "__init__.py").read_text(encoding="utf-8")
    listed = [path for path in files("Add an operator") if path.startswith("src/mmmamba/ops/<operator>/")]
    assert [path.rpartition("/")[2] for path in listed[:4]] == [
        "__init__.py",
        "reference.py",
        "kernels.py",
        "README.md",
    ]
    for folder in operators:
        for name in ("__init__.py", "reference.py", "README.md"):
            assert (folder / name).is_file(), f"{folder.name} has no {name}"
        assert list(folder.glob("*kernels.py")), f"{folder.name} has no kernels"
        assert f"from mmmamba.ops.{folder.name} import" in exported
        assert f"operators/{folder.name}.md" in SITE["pages"]()


def test_a_mixer_is_the_files_that_contributing_names() -> None:
    """Each registered kind is defined in a file of its own in ``model/mixers``, which the package imports."""
    place = ROOT / "src" / "mmmamba" / "model" / "mixers"
    imported = (place / "__init__.py").read_text(encoding="utf-8")
    ours = {name: kind for name, kind in kinds().items() if kind.__module__.startswith("mmmamba.")}
    assert len(ours) > 1
    for kind in ours.values():
        package, _, file = kind.__module__.rpartition(".")
        assert package == "mmmamba.model.mixers" and f"from {kind.__module__} import" in imported
        assert f"@register\nclass {kind.__name__}(" in (place / f"{file}.py").read_text(encoding="utf-8")
    assert len({kind.__module__ for kind in ours.values()}) == len(ours)


def test_a_teacher_family_is_the_files_that_contributing_names() -> None:
    """Each layout's module has the three functions under the names in the table, and a test file."""
    place = ROOT / "src" / "mmmamba" / "checkpoints"
    families = {layout.config.__module__.rpartition(".")[2] for layout in LAYOUTS} - {"layouts"}  # ours is in `student`
    assert {"hovle", "llama", "release", "solo"} <= families
    for family in families:
        text = (place / f"{family}.py").read_text(encoding="utf-8")
        for function in (f"config_from_{family}", f"read_{family}", f"write_{family}"):
            assert f"def {function}(" in text
        assert list((ROOT / "tests" / "checkpoints").glob(f"test_{family}*.py"))
    assert files("Add a teacher family")[:2] == [
        "src/mmmamba/checkpoints/<family>.py", "src/mmmamba/checkpoints/layouts.py",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------- changelog, citation


def test_the_changelog_keeps_its_form() -> None:
    page = ROOT / "CHANGELOG.md"
    text = page.read_text(encoding="utf-8")
    versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    kinds = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert all(target.startswith("https://") or (ROOT / target).exists() for target in links(page))


def test_the_citation_names_this_package_and_the_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "title", "message", "authors", "type"} <= set(cited)  # what the format asks for
    project = PROJECT["project"]
    assert (cited["title"], cited["version"], cited["license"]) == ("mmmamba", project["version"], project["license"])
    assert cited["version"] == mmmamba.__version__
    assert [author["name"] for author in cited["authors"]] == [author["name"] for author in project["authors"]]
    assert cited["keywords"] == project["keywords"]
    [paper] = cited["references"]
    assert "arXiv:2502.13145" in paper["journal"] and len(paper["authors"]) == 8
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert paper["url"] in readme
