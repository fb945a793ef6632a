"""What each compiled kernel takes of a GPU, from ptxas' reports.

``python -m edgeprune.plugins.resources [FOLDER]`` prints the table of docs/kernels.md.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_KERNEL = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<architecture>\d+)'\n.*\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers"
)
# Element types and numbers among the template arguments of a mangled name, I…E behind the kernel's own name.
_TYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}
_ARGUMENT = re.compile(r"6__half|13__nv_bfloat16|f|Li\d+E")


@dataclass(frozen=True)
class KernelResources:
    """One kernel, compiled for one architecture.

    Attributes:
        kernel: Its name with its template arguments.
        architecture: Compute capability, without the dot.
        registers: Per thread.
        stack_bytes: Per thread; anything but 0 is memory where registers were meant.
        spill_bytes: Stores and loads of spilled registers.
    """

    kernel: str
    architecture: int
    registers: int
    stack_bytes: int
    spill_bytes: int


def read_resources(report: Path) -> list[KernelResources]:
    """The kernels of one ``<source>.ptxas.txt``."""
    return [
        KernelResources(
            kernel=_readable(found["symbol"]),
            architecture=int(found["architecture"]),
            registers=int(found["registers"]),
            stack_bytes=int(found["stack"]),
            spill_bytes=int(found["stores"]) + int(found["loads"]),
        )
        for found in _KERNEL.finditer(report.read_text(encoding="utf-8"))
    ]


def _readable(symbol: str) -> str:
    """``multiply_keys<float16, 8>`` from a mangled name in edgeprune's anonymous namespace."""
    rest = symbol.removeprefix("_ZN9edgeprune")
    name = ""
    while length := re.match(r"\d+", rest):  # namespaces, then the kernel
        start = length.end()
        end = start + int(length[0])
        name, rest = rest[start:end], rest[end:]
    if not rest.startswith("I"):
        return name
    arguments, rest = [], rest[1:]
    while argument := _ARGUMENT.match(rest):
        text, rest = argument[0], rest[argument.end() :]
        arguments.append(_TYPES.get(text, text.removeprefix("Li").removesuffix("E")))
    return f"{name}<{', '.join(arguments)}>"


def table(folder: Path) -> Iterator[str]:
    """Markdown: registers of every kernel on every architecture."""
    kernels: dict[tuple[str, str], dict[int, int]] = {}
    for report in sorted(folder.glob("*.ptxas.txt")):
        for one in read_resources(report):
            source = report.name.removesuffix(".ptxas.txt")
            kernels.setdefault((source, one.kernel), {})[one.architecture] = one.registers
    architectures = sorted({number for registers in kernels.values() for number in registers})
    yield f"| file | kernel | {' | '.join(f'sm_{number}' for number in architectures)} |"
    yield f"|---|---|{'---|' * len(architectures)}"
    for (source, kernel), registers in sorted(kernels.items()):
        cells = [str(registers.get(number, "")) for number in architectures]
        yield f"| {source} | `{kernel}` | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.stdout.write("\n".join(table(Path(sys.argv[1] if len(sys.argv) > 1 else "out/plugins"))) + "\n")
