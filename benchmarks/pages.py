"""docs/performance.md: between two marks a suite each run of it writes anew, the rest stays as somebody wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from measure import Report, verdicts


def marks(suite: str) -> tuple[str, str]:
    """Between them stands what `suite` measured."""
    return f"<!-- {suite}: begin -->", f"<!-- {suite}: end -->"


def measured(head: Mapping[str, str], report: Report, folder: str) -> str:
    """The tables and charts as Markdown; the charts lie in `folder`, beside the page."""
    blocks = ["\n".join(f"- {name}: {value}" for name, value in head.items())]
    if report.targets:
        blocks.append(verdicts(report.targets).markdown())
    blocks += [table.markdown() for table in report.tables]
    blocks += [f"![{chart.title}]({folder}/{chart.name}.svg)" for chart in report.charts]
    return "\n\n".join(blocks)


def renewed(page: str, suite: str, text: str) -> str:
    """`page` with `text` between the suite's marks. Raises ValueError where it has not both of them."""
    begin, end = marks(suite)
    before, began, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not began or not ended:
        raise ValueError(f"the page lacks {begin} or {end}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def write(page: Path, head: Mapping[str, str], suite: str, report: Report) -> None:
    """Renew the suite's part of `page`, and its charts in the folder of the page's name."""
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    for chart in report.charts:
        (folder / f"{chart.name}.svg").write_text(chart.svg(), encoding="utf-8")
    text = renewed(page.read_text(encoding="utf-8"), suite, measured(head, report, folder.name))
    page.write_text(text, encoding="utf-8")
