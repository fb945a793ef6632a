"""``edgeprune profile``."""

import json
from pathlib import Path

import click

from edgeprune.interruption import Interruption
from edgeprune.terminal import console


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--against",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A bundle to measure in turns with it, as a rule the unpruned one; repeatable.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder of pictures, or JSONL file of samples. Without data and pictures, some are drawn.",
)
@click.option(
    "--image", "images", multiple=True, type=click.Path(path_type=Path), help="A picture; repeatable."
)
@click.option("--prompt", help="The question.")
@click.option("--runs", default=20, show_default=True, help="Answers of every bundle that count.")
@click.option("--warmup", default=1, show_default=True, help="Answers of every bundle before that.")
@click.option("--max-new-tokens", default=16, show_default=True, help="Tokens of every answer.")
@click.option(
    "--backend",
    default="onnxruntime",
    show_default=True,
    help="onnxruntime, or tensorrt for engines that were built.",
)
@click.option("--provider", help="Of ONNX Runtime: cpu (default), cuda, tensorrt or tensorrt_rtx.")
@click.option("--threads", type=int, help="Threads of an operator of ONNX Runtime.")
@click.option("--target", "targets", multiple=True, help="Device to predict from its data sheet; repeatable.")
@click.option("--precision", help="Of the weights there: fp16, int8, int4 …")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with figures.")
@click.option("--trace", type=click.Path(path_type=Path), help="Write a trace for Perfetto or Chrome.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.pass_obj
def profile(
    interruption: Interruption,
    bundle: Path,
    against: tuple[Path, ...],
    data: Path | None,
    images: tuple[Path, ...],
    prompt: str | None,
    runs: int,
    warmup: int,
    max_new_tokens: int,
    backend: str,
    provider: str | None,
    threads: int | None,
    targets: tuple[str, ...],
    precision: str | None,
    html: Path | None,
    trace: Path | None,
    as_json: bool,
) -> None:
    """Measure where the time of BUNDLE goes, stage by stage, and what its pruning saves."""
    from edgeprune.export.progress import ProgressBars
    from edgeprune.runtimes.profiling import profiler, samples
    from edgeprune.runtimes.profiling.files import check_output, write_page, write_trace
    from edgeprune.runtimes.profiling.terminal import render_profile

    options = profiler.ProfileOptions(
        runs=runs,
        warmup=warmup,
        max_new_tokens=max_new_tokens,
        backend=backend,
        provider=provider,
        threads=threads,
        targets=targets,
        precision=precision,
    )
    for path in (html, trace):
        if path is not None:
            check_output(path)
    chosen = samples.choose(data, images, prompt, runs)
    with ProgressBars(interruption.check) as progress:
        found = profiler.profile(bundle, chosen, against=against, options=options, progress=progress)
    if html is not None:
        write_page(found, html)
    if trace is not None:
        write_trace(found, trace)
    if as_json:
        click.echo(json.dumps(found.report.to_json(), ensure_ascii=False))
    else:
        console().print(render_profile(found.report))
