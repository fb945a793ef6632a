"""Reading the Markdown that benchmarks print."""


def table(printed: str, title: str) -> list[dict[str, str]]:
    """The rows of the table whose first column is ``title``, by column; of columns with one name the last."""
    lines = iter(printed.splitlines())
    columns = _cells(next(line for line in lines if line.startswith(f"| {title} |")))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(columns, _cells(line), strict=True)))
    return rows


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]
