"""Names that become parts of paths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmmamba.distill.recipe import DistillRecipe, TeachRecipe, load_recipe
from mmmamba.errors import UserError
from mmmamba.file_names import check_name, file_labels, unique

WRONG = [
    "", " ", ".", "..", "../x", "../../x", "/etc/x", "a/b", "a\\b", "..\\x", ".hidden", "-rf", "~root", "x.", "x ",
    "a\nb", "a\0b", "a\u2028b", "a\u202eb", "\ud800", "n" * 101,
]  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_leads_out_of_its_folder_or_hides_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="the name"):
        check_name(name, "the name")


@pytest.mark.parametrize("name", ["pico-linear", "my run", "v1.2+x", "größe", "名前", "n" * 100])
def test_names_that_are_fine(name: str) -> None:
    assert check_name(name, "the name") == name


@pytest.mark.parametrize(("cls", "recipe"), [(DistillRecipe, "pico-linear"), (TeachRecipe, "pico-teacher")])
def test_a_recipes_name_cannot_lead_out_of_runs(cls: type, recipe: str) -> None:
    with pytest.raises(UserError, match=r"name '\.\./\.\./x' must be a name, not a path"):
        load_recipe(cls, recipe, ["name=../../x"])
    assert load_recipe(cls, recipe, ["name=mine"]).name == "mine"


@given(st.lists(st.text(max_size=120), unique=True, max_size=8))
def test_labels_become_file_names_of_their_own(labels: list[str]) -> None:
    names = list(file_labels(labels).values())
    assert len({name.casefold() for name in names}) == len(labels)
    for name in names:
        assert "/" not in name and name not in (".", "..") and 0 < len(name.encode()) <= 110


def test_a_taken_label_gets_a_number() -> None:
    assert unique("blind", ["a"]) == "blind"
    assert unique("blind", ["blind", "blind (2)"]) == "blind (3)"
