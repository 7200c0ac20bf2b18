"""docs/performance.md: the part between two marks is written anew by each run, the rest stays as somebody wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from measure import Report, verdicts

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def measured(head: Mapping[str, str], reports: Sequence[Report], folder: str) -> str:
    """The tables and charts as Markdown; the charts lie in `folder`, beside the page."""
    lines = [f"- {name}: {value}" for name, value in head.items()]
    blocks = ["\n".join(lines), verdicts([each for report in reports for each in report.targets]).markdown()]
    for report in reports:
        blocks += [table.markdown() for table in report.tables]
        blocks += [f"![{chart.title}]({folder}/{chart.name}.svg)" for chart in report.charts]
    return "\n\n".join(blocks)


def renewed(page: str, text: str) -> str:
    """`page` with `text` between the marks. Raises ValueError where it has not both of them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def write(page: Path, head: Mapping[str, str], reports: Sequence[Report]) -> None:
    """Renew `page` and the charts in the folder of its name."""
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    for report in reports:
        for chart in report.charts:
            (folder / f"{chart.name}.svg").write_text(chart.svg(), encoding="utf-8")
    page.write_text(renewed(page.read_text(encoding="utf-8"), measured(head, reports, folder.name)), encoding="utf-8")
