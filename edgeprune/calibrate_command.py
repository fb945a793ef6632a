"""``edgeprune calibrate``."""

from pathlib import Path

import click

from edgeprune.errors import DataError
from edgeprune.interruption import Interruption
from edgeprune.terminal import console


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="JSONL file of pictures and questions, or a folder of pictures; without it, profiles are chosen anew.",
)
@click.option("--prompt", help="The question about every picture of a folder.")
@click.option("--samples", type=int, help="How many to draw; all by default.")
@click.option("--seed", default=0, show_default=True, help="Seed of the draw.")
@click.option("--max-new-tokens", default=64, show_default=True, help="Most tokens to generate.")
@click.option("--profiles", default=2, show_default=True, help="Most prefill profiles of a segment.")
@click.option("--quantiles", help="Shares to tell, as 0.5,0.9; by default those that the samples allow.")
@click.option(
    "--max-sequence", type=int, help="Most rows that profiles cover; the model's context by default."
)
@click.option(
    "--latency",
    type=click.Path(path_type=Path),
    help="JSON file of measured times instead of the cost model.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Write lengths and profiles as a PNG.")
@click.option("--restart", is_flag=True, help="Forget what an interrupted calibration has done.")
@click.option("--backend", default="onnxruntime", show_default=True, help="onnxruntime or tensorrt.")
@click.option("--provider", help="Of ONNX Runtime: cpu (default), cuda, tensorrt or tensorrt_rtx.")
@click.option("--threads", type=int, help="Threads of an operator of ONNX Runtime.")
@click.option("--ray", metavar="ADDRESS|local", help="Run on the workers of a Ray cluster.")
@click.option(
    "--workers", type=int, help="Workers with --ray; by default as many as the cluster has room for."
)
@click.pass_obj
def calibrate(
    interruption: Interruption,
    bundle: Path,
    data: Path | None,
    prompt: str | None,
    samples: int | None,
    seed: int,
    max_new_tokens: int,
    profiles: int,
    quantiles: str | None,
    max_sequence: int | None,
    latency: Path | None,
    plot: Path | None,
    restart: bool,
    backend: str,
    provider: str | None,
    threads: int | None,
    ray: str | None,
    workers: int | None,
) -> None:
    """Run BUNDLE on example data, note the lengths, and choose optimization profiles."""
    from edgeprune.calib import calibration, runner, statistics
    from edgeprune.calib import plot as plotting
    from edgeprune.calib.progress import SampleBar
    from edgeprune.calibration_report import render_calibration

    if plot is not None:
        plotting.check_plot_path(plot)
    options = calibration.CalibrationOptions(
        samples=samples,
        seed=seed,
        max_new_tokens=max_new_tokens,
        profiles=profiles,
        quantiles=None if quantiles is None else statistics.parse_quantiles(quantiles),
        max_sequence=max_sequence,
        latency=latency,
    )
    engine = runner.Engine(backend, provider, threads)
    chosen: runner.SampleRunner = runner.LocalRunner(engine)
    if ray is not None:
        from edgeprune.calib.ray_runner import RayRunner

        chosen = RayRunner(engine, ray, workers)
    elif workers is not None:
        raise DataError("--workers are those of a Ray cluster: give --ray, too")
    with SampleBar(interruption.check) as progress:
        try:
            entry = calibration.calibrate(
                bundle, data, options, prompt=prompt, runner=chosen, restart=restart, progress=progress
            )
        except KeyboardInterrupt:
            if progress.total:
                done = f"{progress.done} of {progress.total} samples are done"
                click.echo(f"edgeprune: {done}; the same command goes on there", err=True)
            raise
    console().print(render_calibration(entry))
    if data is not None and entry.skipped:
        click.echo(f"samples skipped: {entry.skipped}", err=True)
    if plot is not None:
        plotting.save_plot(entry, plot)
