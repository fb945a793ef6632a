"""How much of the weights beside them ONNX files really read; one file of weights may serve several graphs."""

import re
from pathlib import Path

# An entry of external_data, as protobuf writes it: key (field 1) "length", value (field 2) of so many digits.
_LENGTH = re.compile(rb"\x0a\x06length\x12([\x01-\x13])(\d+)")


def external_bytes(onnx_file: Path) -> int:
    """Bytes of the tensors that an ONNX file keeps in external data, read without the package onnx.

    A machine that only builds engines need not have it; the file holds no weights and is small.
    """
    content = onnx_file.read_bytes()
    return sum(int(digits[: length[0]]) for length, digits in _LENGTH.findall(content))
