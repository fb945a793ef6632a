"""``edgeprune fit``."""

import os
from pathlib import Path

import click

from edgeprune.interruption import Interruption


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--method", required=True, help="What learns: atp or dyrate.")
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="JSONL file: pictures, questions, answers."
)
@click.option(
    "--target-tokens",
    required=True,
    metavar="N|P%",
    help="Visual tokens of a prompt, averaged over the decoder's layers, or a share of the unpruned ones.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the new checkpoint; CHECKPOINT's name and the method's, here, by default.",
)
@click.option("--preset", help="Named settings of the method.")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A parameter of the method, as JSON."
)
@click.option(
    "--train",
    "train_settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="How it is trained: learning_rate, lambda_target …",
)
@click.option(
    "--trainable", default="heads", show_default=True, help="heads, or all: the language model, too."
)
@click.option("--steps", default=500, show_default=True, help="Optimizer steps.")
@click.option("--batch-size", default=32, show_default=True, help="Samples of a step, of all processes.")
@click.option("--samples", type=int, help="How many to draw from the data; all by default.")
@click.option("--seed", default=0, show_default=True, help="Seed of the draw and of the training.")
@click.option(
    "--decoder-learning-rate", default=2e-5, show_default=True, help="The language model's, with all."
)
@click.option("--precision", default="float32", show_default=True, help="float32 or bfloat16.")
@click.option("--device", help="cpu or cuda; a GPU if there is one by default.")
@click.option("--save-every", default=100, show_default=True, help="Steps between two states on disk.")
@click.option("--restart", is_flag=True, help="Forget what an interrupted fit has done.")
@click.option(
    "--clip",
    type=click.Path(path_type=Path),
    help="CLIP checkpoint of the vision tower, for LLaVA's own layout.",
)
@click.pass_obj
def fit(
    interruption: Interruption,
    checkpoint: Path,
    method: str,
    data: Path,
    target_tokens: str,
    output: Path | None,
    preset: str | None,
    settings: tuple[str, ...],
    train_settings: tuple[str, ...],
    trainable: str,
    steps: int,
    batch_size: int,
    samples: int | None,
    seed: int,
    decoder_learning_rate: float,
    precision: str,
    device: str | None,
    save_every: int,
    restart: bool,
    clip: Path | None,
) -> None:
    """Learn a method's thresholds or rates from DATA and write CHECKPOINT with them as a new one."""
    from edgeprune.extras import require

    for module in ("torch", "safetensors", "transformers"):
        require(module, extra="fit", purpose="to fit checkpoints")
    from edgeprune.calib import fit as fitting
    from edgeprune.calib.fit_progress import FitBar
    from edgeprune.calib.token_target import TokenTarget

    training = fitting.training_from_settings(method, train_settings)
    options = fitting.FitOptions(
        TokenTarget.parse(target_tokens),
        steps=steps,
        batch_size=batch_size,
        samples=samples,
        seed=seed,
        trainable=trainable,
        decoder_learning_rate=decoder_learning_rate,
        precision=precision,
        device=device,
        save_every=save_every,
    )
    chosen = fitting.choose_method(checkpoint, method, preset, settings)
    if output is None:
        output = Path(f"{checkpoint.resolve().name}-{method}")
    others_tell = int(os.environ.get("RANK", "0")) > 0
    with FitBar(interruption.check, silent=others_tell) as progress:
        try:
            found = fitting.fit(
                checkpoint,
                data,
                output,
                chosen,
                options,
                training=training,
                clip=clip,
                restart=restart,
                progress=progress,
            )
        except KeyboardInterrupt:
            click.echo(
                f"edgeprune: {progress.done} of {progress.steps or steps} steps are done; the same command goes on "
                "from the state on disk",
                err=True,
            )
            raise
    if others_tell:
        return
    click.echo(
        f"{output}: {found.tokens:.1f} of {found.unpruned_tokens:g} visual tokens, target {found.target:.1f}; "
        f"{found.right:.1%} of {found.held_out} answers right as a whole"
    )
    if abs(found.tokens - found.target) > 0.1 * found.target:
        click.echo(
            f"edgeprune: the tokens ended {abs(found.tokens / found.target - 1):.0%} from the target: train longer "
            "with --steps, or weight it more with --train lambda_target=…",
            err=True,
        )
