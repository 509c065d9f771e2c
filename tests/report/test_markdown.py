"""A user's text in a Markdown page is text: no HTML, no link, no picture, no new line or cell."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmmamba.report.markdown import code, text
from mmmamba.report.table import Table, table_of

EVIL = "<script>alert(1)</script> [x](javascript:alert(1)) ![p](http://x/y.png) | `c` *b*\n\n# head\u2028\x1b[31m"


@pytest.mark.parametrize(
    "page",
    [
        text(EVIL),
        Table(title=EVIL, columns=[EVIL, "n"], rows=[[EVIL, EVIL]], details=[["", EVIL]]).markdown(),
        table_of(EVIL, ("", "found"), [(EVIL, EVIL)]).markdown(),
    ],
)
def test_markup_of_a_users_text_does_nothing(page: str) -> None:
    assert "<" not in page and "\x1b" not in page and "\u2028" not in page
    assert not re.search(r"(?<!\\)\]\(|(?<!\\)\[x\]|!\[", page.replace("\\[", "")) or "\\[x](" in page
    assert not re.search(r"^# head", page, re.MULTILINE)
    for line in page.splitlines():
        if line.startswith("| ") and "script" in line:
            assert len(re.findall(r"(?<!\\)\|", line)) == 3, "as many cells as columns"


@given(st.text(max_size=60))
def test_a_code_span_holds_any_text_on_one_line(value: str) -> None:
    span = code(value)
    assert "\n" not in span
    fence = re.match("`+", span)
    assert fence is not None
    assert fence[0] not in re.split("(?<!`)" + fence[0] + "(?!`)", span, maxsplit=2)[1]


def test_what_is_harmless_stays_as_it_is() -> None:
    for value in ("nano-linear", "my_model v1.2", "[92.1, 93.0]", "größe, 3 %", "a (b) [c]"):
        assert text(value) == value
    assert code("runs/x") == "`runs/x`"
