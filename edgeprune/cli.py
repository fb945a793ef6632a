"""The command line: each command calls the function of the same name."""

import json
from pathlib import Path
from typing import Any

import click
from rich.table import Table

import edgeprune
from edgeprune.calibrate_command import calibrate
from edgeprune.errors import EdgepruneError, PictureError
from edgeprune.fit_command import fit
from edgeprune.inspect_command import inspect
from edgeprune.interruption import Interruption
from edgeprune.json_data import to_json
from edgeprune.profile_command import profile
from edgeprune.quantize_command import quantize
from edgeprune.terminal import console


class _Group(click.Group):
    """Prints our own errors as one line; ``--debug`` shows where they come from."""

    def invoke(self, ctx: click.Context) -> Any:
        ctx.obj = Interruption()
        try:
            with ctx.obj:
                return super().invoke(ctx)
        except EdgepruneError as error:
            if ctx.params.get("debug"):
                raise
            message = " ".join(str(error).split())
            click.echo(f"edgeprune: {message}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("edgeprune: interrupted; nothing was left half-written", err=True)
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(edgeprune.__version__, prog_name="edgeprune")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Export, check and run vision-language models with in-network visual-token pruning."""


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the bundle.")
@click.option(
    "--method",
    multiple=True,
    help="Pruning method instead of the checkpoint's own, or FILE.py:CLASS; repeatable; 'none' exports it unpruned.",
)
@click.option(
    "--preset", multiple=True, help="Named settings of the method; METHOD=PRESET with several methods."
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A parameter of the method, as JSON; METHOD.NAME=VALUE with several methods.",
)
@click.option(
    "--clip",
    type=click.Path(path_type=Path),
    help="CLIP checkpoint of the vision tower, for ivtp and LLaVA's own layout.",
)
@click.option("--dtype", default="float32", show_default=True, help="float32 or float16.")
@click.option("--opset", default=23, show_default=True, help="ONNX opset, 20 to 23.")
@click.option(
    "--check-image", multiple=True, type=click.Path(path_type=Path), help="Picture to compare the graphs on."
)
@click.pass_obj
def export(
    interruption: Interruption,
    checkpoint: Path,
    output: Path,
    method: tuple[str, ...],
    preset: tuple[str, ...],
    settings: tuple[str, ...],
    clip: Path | None,
    dtype: str,
    opset: int,
    check_image: tuple[Path, ...],
) -> None:
    """Export CHECKPOINT as a bundle, compared with PyTorch graph by graph."""
    from edgeprune.extras import require

    for module in ("torch", "onnx", "onnx_ir", "onnxscript"):
        require(module, extra="export", purpose="to export checkpoints")
    from edgeprune.export import exporter
    from edgeprune.export.progress import ProgressBars
    from edgeprune.prune.choice import choose_methods
    from edgeprune.runtimes.preprocessing import read_picture

    methods = choose_methods(checkpoint, method, preset, settings)
    with ProgressBars(interruption.check) as progress:
        bundle = exporter.export(
            checkpoint,
            output,
            methods=methods,
            clip=clip,
            dtype=dtype,
            opset=opset,
            images=[read_picture(path) for path in check_image],
            progress=progress,
        )
    megabytes = sum(entry.bytes for entry in bundle.manifest.files()) / 1e6
    worst = max(entry.max_abs_diff for entry in bundle.manifest.parity.values())
    identical = [entry.indices_identical for entry in bundle.manifest.parity.values()]
    click.echo(
        f"{output}: {len(bundle.manifest.graphs)} graphs, {megabytes:.1f} MB; largest difference from PyTorch "
        f"{worst:.1e}; kept indices identical: {'yes' if False not in identical else 'no'}"
    )


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--image", "images", multiple=True, type=click.Path(path_type=Path), help="A picture; repeatable."
)
@click.option("--prompt", required=True, help="The question.")
@click.option("--max-new-tokens", default=64, show_default=True, help="Most tokens to generate.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--top-k", default=0, show_default=True, help="Draw from the k most likely tokens; 0 = all.")
@click.option(
    "--top-p", default=1.0, show_default=True, help="Draw from the smallest set with this probability."
)
@click.option("--seed", type=int, help="Seed of the draws.")
@click.option("--stop", multiple=True, help="Text that ends the answer; repeatable.")
@click.option("--stream", is_flag=True, help="Print the answer while it is generated.")
@click.option(
    "--overlay",
    type=click.Path(path_type=Path),
    help="Write a picture of the kept tokens, one file per picture.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print text, token ids, kept tokens and timings as JSON."
)
@click.option(
    "--backend",
    default="onnxruntime",
    show_default=True,
    help="onnxruntime, or tensorrt for engines that were built.",
)
@click.option("--provider", help="Of ONNX Runtime: cpu (default), cuda, tensorrt or tensorrt_rtx.")
@click.option("--threads", type=int, help="Threads of an operator of ONNX Runtime.")
def run(
    bundle: Path,
    images: tuple[Path, ...],
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    stop: tuple[str, ...],
    stream: bool,
    overlay: Path | None,
    as_json: bool,
    backend: str,
    provider: str | None,
    threads: int | None,
) -> None:
    """Answer a question about pictures with BUNDLE."""
    if overlay is not None:
        from edgeprune.runtimes.overlay import check_overlay_path, save_overlay

        if not images:
            raise PictureError("--overlay draws on a picture: give one with --image")
        check_overlay_path(overlay)
    options = edgeprune.SamplingOptions(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop
    )
    with edgeprune.open_session(bundle, backend=backend, provider=provider, threads=threads) as session:
        steps = session.stream(images, prompt, options)
        begun = False
        while True:
            try:
                piece = next(steps)
            except StopIteration as finished:
                answer: edgeprune.Answer = finished.value
                break
            if stream and not as_json:
                # The first word's space belongs between prompt and answer.
                shown = piece if begun else piece.lstrip()
                begun = begun or bool(shown)
                click.echo(shown, nl=False)
        if as_json:
            click.echo(json.dumps(answer.to_json(), ensure_ascii=False))
        else:
            click.echo("" if stream else answer.text.lstrip())
            for line in _answer_lines(answer):
                click.echo(line, err=True)
        if overlay is not None:
            for index, image in enumerate(images):
                # Further pictures get files of their own: out.png, out-2.png …
                path = overlay.with_name(f"{overlay.stem}-{index + 1}{overlay.suffix}") if index else overlay
                save_overlay(session.overlay(image, answer, index), path)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Compare with the checkpoint it came from."
)
@click.option(
    "--clip",
    type=click.Path(path_type=Path),
    help="CLIP checkpoint of the vision tower, for ivtp and LLaVA's own layout.",
)
@click.option(
    "--method", multiple=True, metavar="FILE.py:CLASS", help="A method of your own that the bundle uses."
)
def verify(bundle: Path, checkpoint: Path | None, clip: Path | None, method: tuple[str, ...]) -> None:
    """Check hashes and graphs of BUNDLE and, with its checkpoint, the parity again."""
    from edgeprune import verification

    if method:
        from edgeprune.extras import require

        require("torch", extra="export", purpose="to load a method of your own")
        from edgeprune.prune.own_method import load_own_method

        for name in method:
            load_own_method(name)
    found = verification.verify(bundle, checkpoint=checkpoint, clip=clip)
    click.echo(f"{found.files} files unchanged, {found.graphs} graphs valid")
    for name, parity in found.parity.items():
        indices = {True: ", kept indices identical: yes", None: ""}.get(parity.indices_identical, "")
        click.echo(f"{name}: max difference {parity.max_abs_diff:.1e} in {parity.cases} runs{indices}")


main.add_command(inspect)
main.add_command(calibrate)
main.add_command(quantize)
main.add_command(fit)
main.add_command(profile)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", required=True, help="Device to build for; edgeprune targets lists them.")
@click.option(
    "--precision", help="fp32, fp16, int8, int4 or fp8; it must be the bundle's, and is by default."
)
@click.option(
    "--profiles",
    "profile_choice",
    default="auto",
    show_default=True,
    help="auto, one, split, or a JSON file of optimization profiles.",
)
@click.option("--max-images", type=int, help="Most typical pictures in a prompt.")
@click.option("--max-sequence", type=int, help="Most tokens of a prompt with its answer.")
@click.option("--workspace", type=float, metavar="MIB", help="Most scratch memory of a layer.")
@click.option("--memory", type=float, metavar="GIB", help="Memory of the device, if not the target's.")
@click.option(
    "--plugin",
    default="auto",
    show_default=True,
    help="TensorRT's plugins of the operators: auto, on, off.",
)
@click.option(
    "--kit",
    type=click.Path(path_type=Path),
    help="Write what to carry to the device, and build nothing here.",
)
@click.pass_obj
def build(
    interruption: Interruption,
    bundle: Path,
    target: str,
    precision: str | None,
    profile_choice: str,
    max_images: int | None,
    max_sequence: int | None,
    workspace: float | None,
    memory: float | None,
    plugin: str,
    kit: Path | None,
) -> None:
    """Build the TensorRT engines of BUNDLE for a device and put them into it."""
    from edgeprune.runtimes import device_kit, engine_build
    from edgeprune.runtimes.build_options import BuildOptions

    options = BuildOptions(
        target,
        precision,
        profile_choice,
        max_images,
        max_sequence,
        workspace_mib=workspace,
        memory_gib=memory,
        plugin=plugin,
    )
    if kit is not None:
        written = device_kit.write_kit(bundle, kit, options)
        click.echo(f"{kit}: {written} files; carry the folder to the device and run build.sh there")
        return
    from edgeprune.export.progress import ProgressBars

    with ProgressBars(interruption.check) as progress:
        engines = engine_build.build(bundle, options, progress=progress)
    tried = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in engines.strategy_bytes.items())
    plugins = (
        "no plugin" if engines.plugin_version is None else f"operators by plugin {engines.plugin_version}"
    )
    click.echo(
        f"{bundle}: {len(engines.engines)} {engines.precision} engines for {target} (SM {engines.sm}) with "
        f"{engines.builder} {engines.tensorrt_version}; profiles '{engines.strategy}' ({tried}); {plugins}"
    )


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def targets(as_json: bool) -> None:
    """List the devices that engines are built for."""
    from edgeprune import targets as target_table

    found = target_table.targets()
    if as_json:
        click.echo(json.dumps(to_json(found), ensure_ascii=False))
        return
    table = Table("target", "device", "SM", "GiB", "GB/s", "dense TOPS", "without", "TensorRT")
    for entry in found:
        rates = ", ".join(f"{name} {rate:g}" for name, rate in entry.tops.items())
        lacking = [name for name in target_table.PRECISIONS if name not in entry.precisions]
        memory = f"{entry.memory_bytes / target_table.GIB:.0f}{' shared' if entry.shared_memory else ''}"
        versions = f"{entry.tensorrt[0]} … {entry.tensorrt[1]}{', RTX' if entry.rtx else ''}"
        table.add_row(
            entry.name,
            entry.title,
            str(entry.sm),
            memory,
            f"{entry.bandwidth / 1e9:.0f}",
            rates or "unknown",
            ", ".join(lacking) or "-",
            versions,
        )
    console().print(table)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def doctor(as_json: bool) -> None:
    """Show what is installed and what a missing piece is needed for."""
    from edgeprune import environment

    found = environment.doctor()
    if as_json:
        click.echo(json.dumps(to_json(found)))
        return
    terminal = console()
    terminal.print(
        f"edgeprune {found.edgeprune}, Python {found.python}, {found.machine}, {found.cpu_cores} cores",
        highlight=False,
    )
    terminal.print(f"ONNX Runtime providers: {', '.join(found.providers) or 'none'}", highlight=False)
    table = Table("module", "version", "needed for", "remedy")
    for piece in found.pieces:
        table.add_row(piece.name, piece.version or "missing", piece.purpose, piece.remedy.replace("[", "\\["))
    terminal.print(table)


def _answer_lines(answer: "edgeprune.Answer") -> list[str]:
    lines = [
        f"{site.name}, {site.place}: {site.kept} of {site.tokens_in} visual tokens kept"
        for site in answer.sites
    ]
    lines += [
        f"{site.name}: {left} visual tokens left after {generated} generated tokens"
        for site in answer.sites
        for generated, left in site.evictions
    ]
    times = answer.timings_ms
    prefill = sum(
        value for name, value in times.items() if name.startswith(("prefill.", "select.", "gather."))
    )
    lines.append(
        f"{answer.prompt_tokens} prompt tokens; vision {times.get('vision', 0):.1f} ms, prefill {prefill:.1f} ms, "
        f"first token {times['time_to_first_token']:.1f} ms, decode {answer.decode_tokens_per_second:.0f} tokens/s"
    )
    return lines


if __name__ == "__main__":
    main()
