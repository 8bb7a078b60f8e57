"""Self-contained HTML reports: text, sortable tables and figures in one file that needs no network.

Everything shown is escaped (Jinja2 with autoescape), so a run's name or configuration cannot inject markup.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from approx_attn.output import MISSING, Rows
from approx_attn.run.record import write_text_atomically


@dataclass
class Section:
    """A headed part of a report: paragraphs, tables, figures and folded details, in the order added."""

    heading: str
    parts: list[dict[str, Any]] = field(default_factory=list)

    def text(self, paragraph: str) -> Section:
        """Add a paragraph of plain text."""
        self.parts.append({"kind": "text", "text": paragraph})
        return self

    def table(self, rows: Rows, caption: str = "") -> Section:
        """Add at least one row from header to cell; a click on a header sorts. Columns of numbers align right."""
        lines = [["" if cell is None else str(cell) for cell in row.values()] for row in rows]
        numeric = [all(map(_reads_as_number, column)) for column in zip(*lines, strict=True)]
        self.parts.append(
            {"kind": "table", "headers": list(rows[0]), "rows": lines, "numeric": numeric, "caption": caption}
        )
        return self

    def figure(self, figure: Figure, caption: str) -> Section:
        """Add a matplotlib figure as an embedded PNG; the caption is also its alternative text."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=144)
        image = base64.b64encode(buffer.getvalue()).decode()
        self.parts.append({"kind": "figure", "image": image, "caption": caption})
        return self

    def details(self, summary: str, content: str) -> Section:
        """Add preformatted text that opens on a click."""
        self.parts.append({"kind": "details", "summary": summary, "content": content})
        return self


@dataclass
class Report:
    """A page with a title, a line below it, and sections."""

    title: str
    subtitle: str = ""
    sections: list[Section] = field(default_factory=list)

    def section(self, heading: str) -> Section:
        """Start a section and return it for filling."""
        section = Section(heading)
        self.sections.append(section)
        return section

    def html(self) -> str:
        """The whole page."""
        environment = Environment(
            loader=PackageLoader("approx_attn.comparison", "templates"), autoescape=True, undefined=StrictUndefined
        )
        return environment.get_template("report.html").render(report=self)

    def save(self, path: str | Path) -> Path:
        """Write the page atomically and return where it is."""
        write_text_atomically(path, self.html())
        return Path(path)


def _reads_as_number(cell: str) -> bool:
    first = cell.split(" ")[0].lstrip("<").rstrip("×%").replace(",", "")
    if first in ("", MISSING):
        return True
    try:
        float(first)
    except ValueError:
        return False
    return True
