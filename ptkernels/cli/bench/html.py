"""The report as one HTML page without external resources."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .plots import comparison, figures
from .report import FIRST_NUMBER, HEADER, cells, machine_lines, mean_lines, milliseconds, model_lines, note_lines
from .results import Results, Row

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem }
h2 { font-size: 1.2rem; margin-top: 2.5rem }
table { border-collapse: collapse; font-size: .85rem }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap }
th { border-bottom: 2px solid #888 }
.number { text-align: right; font-variant-numeric: tabular-nums }
.fast { color: #1b7a43; font-weight: 600 }
.slow { color: #b03030; font-weight: 600 }
.failed td { background: #fbe9e9 }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto }
svg { max-width: 100%; height: auto }
.scroll { overflow-x: auto }
"""


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A page of headings and their (already escaped) content."""
    body = "\n".join(f"<section><h2>{escape(heading)}</h2>\n{content}\n</section>" for heading, content in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def report_page(results: Results) -> str:
    """The page of one run."""
    sections = [("Machine", _lines(machine_lines(results)))]
    if results.status != "complete":
        sections.insert(0, ("Partial results", "<p>The run did not finish; what it had measured is shown.</p>"))
    sections += figures(results)
    for op in dict.fromkeys(row.op for row in results.rows):
        rows = [row for row in results.rows if row.op == op]
        sections.append((op, _lines(mean_lines(rows)) + _table(rows)))
    if results.model is not None:
        sections.append(("Pretrained model on real sentences", _lines(model_lines(results.model))))
    if results.notes:
        sections.append(("Notes", _lines(note_lines(results.notes))))
    return page("ptkernels benchmark", sections)


def comparison_page(names: tuple[str, str], pairs: list[tuple[Row, Row]], lines: Sequence[str]) -> str:
    """The page of two runs side by side."""
    return page("ptkernels benchmarks compared", [("Time", comparison(pairs, names)), ("Cases", _lines(lines))])


def _lines(lines: Sequence[str]) -> str:
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _table(rows: Sequence[Row]) -> str:
    """The rows as printed, then the time of every peer."""
    peers = tuple(dict.fromkeys(name for row in rows for name in row.peers))
    names = (*HEADER, *(f"{name} ms" for name in peers))
    header = "".join(f"<th{_number(index)}>{escape(name)}</th>" for index, name in enumerate(names))
    body = "\n".join(_table_row(row, peers) for row in rows)
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _table_row(row: Row, peers: Sequence[str]) -> str:
    ratio_class = "" if row.ratio is None else " fast" if row.ratio >= 1 else " slow"
    times = (milliseconds(row.peers.get(name)) for name in peers)
    content = "".join(
        f"<td{_number(index, ratio_class if index == HEADER.index('ratio') else '')}>{escape(cell)}</td>"
        for index, cell in enumerate((*cells(row), *times))
    )
    return f"<tr{' class=failed' if row.seconds is None else ''}>{content}</tr>"


def _number(index: int, extra: str = "") -> str:
    return f' class="number{extra}"' if index >= FIRST_NUMBER else ""
