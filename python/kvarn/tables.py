"""Tables: rich's on a terminal, aligned text elsewhere.

SPDX-License-Identifier: MIT
"""

import sys


def plain(head: "list[str]", body: "list[list[str]]") -> str:
    """Aligned text: the first column to the left, the others to the right."""
    rows = [head, *body]
    # a cell followed by empty ones only may run over them
    tight = [row[:max((i + 1 for i, cell in enumerate(row) if cell), default=0)] for row in rows]
    widths = [max((len(row[i]) for row in tight if len(row) > i and not (len(row) == i + 1 < len(head) and i)), default=0)
              for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) if i and len(row) == len(head) else cell.ljust(width)
                               for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in tight)


def show(head: "list[str]", body: "list[list[str]]") -> None:
    """Prints a table to stdout."""
    if not sys.stdout.isatty():
        print(plain(head, body))
        return
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain(head, body))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in body:
        style = "bold green" if row[0].startswith("kvarn") else None
        table.add_row(*row, style=style)
    Console().print(table)
