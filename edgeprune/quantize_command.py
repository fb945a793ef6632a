"""``edgeprune quantize``."""

import json
from pathlib import Path

import click

from edgeprune.interruption import Interruption
from edgeprune.json_data import to_json
from edgeprune.terminal import console


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the quantized bundle."
)
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="JSONL file of pictures and questions, or a folder of pictures, to calibrate with and to compare on.",
)
@click.option("--prompt", help="The question about every picture of a folder.")
@click.option("--decoder", default="int8", show_default=True, help="int8, int4, fp8 or none.")
@click.option("--vision", default="none", show_default=True, help="The same for tower and projector.")
@click.option(
    "--for", "form", default="onnxruntime", show_default=True, help="The runtime: onnxruntime or tensorrt."
)
@click.option("--block-size", default=128, show_default=True, help="INT4 weights that share a scale.")
@click.option("--samples", default=32, show_default=True, help="How many samples to draw.")
@click.option("--seed", default=0, show_default=True, help="Seed of the draw.")
@click.option("--max-new-tokens", default=16, show_default=True, help="Most tokens to generate.")
@click.option("--threads", type=int, help="Threads of an operator.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_obj
def quantize(
    interruption: Interruption,
    bundle: Path,
    output: Path,
    data: Path,
    prompt: str | None,
    decoder: str,
    vision: str,
    form: str,
    block_size: int,
    samples: int,
    seed: int,
    max_new_tokens: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Make a quantized bundle of BUNDLE and compare the two."""
    from edgeprune.extras import require

    for module in ("onnx", "onnx_ir", "onnxruntime"):
        require(module, extra="quantize", purpose="to quantize bundles")
    from edgeprune.calib import quantize as quantizing
    from edgeprune.calib.progress import QuantizationBars
    from edgeprune.calib.quantization_options import QuantizationOptions
    from edgeprune.quantization_report import render_quantization

    options = QuantizationOptions(
        decoder=None if decoder == "none" else decoder,
        vision=None if vision == "none" else vision,
        form=form,
        block_size=block_size,
        samples=samples,
        seed=seed,
        max_new_tokens=max_new_tokens,
        threads=threads,
    )
    with QuantizationBars(interruption.check) as progress:
        made = quantizing.quantize(bundle, output, data, options, prompt=prompt, progress=progress)
    entry = made.manifest.quantization
    assert entry is not None
    if as_json:
        click.echo(json.dumps(to_json(entry)))
    else:
        console().print(render_quantization(entry, made.path.name))
