"""The files beside the code: what the Makefile offers, what the sdist holds, changelog and citation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import mmmamba
from documents import ROOT, links

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
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    lines = {line.split()[1]: line for line in shown.splitlines()}
    assert set(lines) == set(targets())
    assert all(len(line.split()) > 4 and len(line) <= 120 for line in lines.values())


def test_lint_checks_style_format_and_types() -> None:
    lint = targets()["lint"]
    assert [command in lint for command in ("ruff check", "ruff format --check", "mypy")] == [True] * 3


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


# ---------------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_begins_with_what_it_does_and_how_it_is_called(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    head = text.split('"""')[1] if script.suffix == ".py" else "\n".join(re.findall(r"^#(?!!) ?(.*)$", text, re.M))
    first, _, rest = head.strip().partition("\n")
    assert len(first) > 20 and first[0].isupper()
    if "def main" in text or script.suffix == ".sh":
        assert f" {script.relative_to(ROOT)}" in rest, f"{script.name} does not say how it is called"


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
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for person in paper["authors"]:
        assert f"{person['given-names']} {person['family-names']}" in " ".join(readme.split())
    assert paper["title"] in readme and "arXiv:2502.13145" in paper["journal"]
