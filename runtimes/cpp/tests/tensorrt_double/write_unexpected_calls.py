"""Writes classes that implement every call of some of TensorRT's interfaces by ending the process.

The interfaces differ between versions; the double overrides the calls that it knows.

``python write_unexpected_calls.py INCLUDE OUTPUT``
"""

import re
import sys
from pathlib import Path

CLASSES = {
    "NvInferImpl.h": ("VRuntime", "VCudaEngine", "VExecutionContext"),
    "NvInferRuntime.h": ("IPluginRegistry",),
}
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_CALL = re.compile(r"virtual\s+([^;{}]*?)\s*\b(\w+)\s*\(([^;{}]*)\)\s*(const)?\s*(noexcept)?\s*=\s*0\s*;")


def main() -> None:
    """Write the file."""
    include, output = Path(sys.argv[1]), Path(sys.argv[2])
    lines = [
        "// Written by write_unexpected_calls.py.",
        '#pragma GCC diagnostic ignored "-Wunused-parameter"',
        '#pragma GCC diagnostic ignored "-Wdeprecated-declarations"',
        "namespace nvinfer1 {",
    ]
    for header, names in CLASSES.items():
        for name in names:
            lines += _unexpected(include, header, name)
    output.write_text("\n".join([*lines, "}  // namespace nvinfer1", ""]))


def _unexpected(include: Path, header: str, name: str) -> list[str]:
    files = [include / header, *sorted(include.glob("NvInferRuntime*.h"))]
    for file in files:
        text = _COMMENT.sub("", file.read_text())
        found = re.search(rf"class {name}\b[^;{{]*\{{(.*?)\n\}};", text, re.DOTALL)
        if found is not None:
            break
    else:
        sys.exit(f"{include} has no class {name}: the double does not fit this TensorRT")
    base = f"apiv::{name}" if name.startswith("V") else name
    calls = [f"class Unexpected{name} : public {base} {{", " public:"]
    for result, call, arguments, const, noexcept in _CALL.findall(found[1]):
        if call.startswith("~") or result.endswith("~"):
            continue
        qualifiers = " ".join(word for word in (const, noexcept) if word)
        said = f'gpu_double::violation("TensorRT\'s double does not know {name}::{call}");'
        calls.append(f"  {' '.join(result.split())} {call}({arguments}) {qualifiers} override {{ {said} }}")
    return [*calls, "};"]


if __name__ == "__main__":
    main()
