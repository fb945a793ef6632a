"""``edgeprune inspect``."""

import json
from pathlib import Path

import click

from edgeprune.json_data import to_json
from edgeprune.terminal import console


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", help="A device: say how far pruning pays on it.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def inspect(bundle: Path, target: str | None, as_json: bool) -> None:
    """Show what BUNDLE holds: sites, graphs, sizes, tokens and FLOPs."""
    from edgeprune import inspection, inspection_report, knee

    found = inspection.inspect(bundle)
    on_target = None if target is None else knee.find_knee(found, target)
    if as_json:
        more = {} if on_target is None else {"knee": to_json(on_target)}
        click.echo(json.dumps(to_json(found) | more, ensure_ascii=False))
        return
    console().print(inspection_report.render_inspection(found))
    if on_target is not None:
        click.echo(knee.knee_sentence(on_target))
