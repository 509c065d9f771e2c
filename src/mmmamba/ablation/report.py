"""What an ablation's results are written to: ``tables.md`` with plots in its folder, and blocks of Markdown pages.

A block (see :mod:`mmmamba.report.blocks`) names a table and the file of its results::

    <!-- ablation: stages of nano-ablation.jsonl -->
    …
    <!-- /ablation -->

The file lies beside the page, and so do the plots (``nano-ablation-stages.svg``). The rest of the page stays as it is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mmmamba.ablation.journal import RESULTS, Results, read
from mmmamba.ablation.plan import Plan
from mmmamba.ablation.plots import dots
from mmmamba.ablation.tables import Measured, markdown
from mmmamba.checkpoints.io import write_atomically
from mmmamba.errors import UserError
from mmmamba.outputs import LEDGER, Ledger
from mmmamba.report.blocks import Block, fill_blocks, find_blocks
from mmmamba.report.plot_style import render

VERB, TABLES = "ablate", "tables.md"
MARK, FORM = "ablation", "TABLE of FILE.jsonl"
FORMATS: tuple[Literal["svg", "png"], ...] = ("svg", "png")

# ---------------------------------------------------------------------------------------------- the folder


def check_report(plan: Plan, folder: Path) -> None:
    """Refuse, before any cell runs, to replace tables or plots that no ablation of ours wrote."""
    if (folder / RESULTS).is_file() and not (folder / LEDGER).exists():
        return  # of an earlier version
    names = [f"{name}.{form}" for name in plan.tables for form in FORMATS]
    Ledger(folder, VERB).check([TABLES, *names], otherwise="give another --out")


def write_report(results: Results, folder: Path) -> None:
    """Write ``tables.md`` and a plot of each table, from the results alone."""
    assert results.plan is not None
    lines = [f"# {results.plan.name}", ""]
    files: dict[str, bytes] = {}
    for name in results.plan.tables:
        drawn = _drawn(results, name, FORMATS)
        files |= {f"{name}.{form}": content for form, content in drawn.items()}
        lines += [f"## {name}", "", markdown(results, name, image=f"{name}.svg" if drawn else "")]
    Ledger(folder, VERB).write({**files, TABLES: "\n".join(lines).encode()})


def _drawn(results: Results, table: str, formats: Sequence[Literal["svg", "png"]]) -> dict[str, bytes]:
    """Format → a table's plot, if any cell of it is measured."""
    measured = Measured.of(results, table)
    if not any(measured.cells.values()):
        return {}
    figure = dots(measured)
    return {form: render(figure, form) for form in formats}


# ---------------------------------------------------------------------------------------------- pages


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that ``mmmamba ablate`` fills."""
    return find_blocks(page, MARK, FORM)


def check_page(page: Path, plan: Plan) -> None:
    """Refuse a page that has no block of this plan."""
    if not any(block.file == f"{plan.name}.jsonl" for block in blocks(page)):
        raise UserError(f"{page}: has no block <!-- ablation: TABLE of {plan.name}.jsonl --> to fill")


def filled(page: Path) -> str:
    """The page with every block filled from its results, as it should be in the file."""
    known = functools.cache(read)

    def content(block: Block) -> str:
        table = ", ".join(block.parts)
        image = f"{_plot_name(Path(block.file).stem, table)}.svg"
        return markdown(known(block.path(block.file)), table, image=image)

    return fill_blocks(page, MARK, FORM, content)


def fill(page: Path, results: Results, file: Path) -> None:
    """Fill a page's blocks again, and put results and plots beside it.

    Raises:
        UserError: when the results that lie beside the page hold runs that ``file`` lacks.
    """
    assert results.plan is not None
    beside = page.parent / f"{results.plan.name}.jsonl"
    if beside.resolve() != file.resolve():
        lost = {result.id for result in read(beside).cells} - {result.id for result in results.cells}
        if lost:
            raise UserError(
                f"{page}: {beside} holds results of {len(lost)} runs that {file} lacks; "
                f"--merge {beside} takes them over, or move it away"
            )
        _write(beside, file.read_bytes())
    for block in blocks(page):
        if block.file == beside.name:
            table = ", ".join(block.parts)
            if table not in results.plan.tables:
                known = ", ".join(results.plan.tables)
                raise UserError(f"{page}:{block.line}: no table '{table}'; known: {known}")
            for form, content in _drawn(results, table, ("svg",)).items():
                _write(page.parent / f"{_plot_name(results.plan.name, table)}.{form}", content)
    _write(page, filled(page).encode())
    print(f"{page}: filled", file=sys.stderr)


def _plot_name(stem: str, table: str) -> str:
    """The file name of a table's plot beside the page, without its suffix."""
    return f"{stem}-{table}"


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
