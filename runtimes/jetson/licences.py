"""The licences of what is inside the package for Jetson."""

import re
from pathlib import Path

from edgeprune.errors import BackendError
from edgeprune.runtimes.jetson.static_jpeg import StaticJpeg

# The header-only libraries name the MIT licence and their authors, and carry no text of it.
_AUTHORS = {
    "minja/minja.hpp": re.compile(r"Copyright (.*)"),
    "nlohmann/json.hpp": re.compile(r"SPDX-FileCopyrightText: (.*)"),
    "stb/stb_image.h": re.compile(r"Copyright \(c\) (.*)"),
}
_MIT = """{name}

Copyright (c) {authors}

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def third_party_licences(
    headers: Path, jpeg: StaticJpeg | None, onnxruntime: Path | None, cudart: Path | None
) -> dict[str, str]:
    """Text by the name of a file.

    Args:
        headers: Folder of the header-only libraries.
        jpeg: The libjpeg that is inside.
        onnxruntime: Folder of ONNX Runtime's licences.
        cudart: Folder of the CUDA runtime's licence.

    Raises:
        BackendError: A header does not name its authors.
    """
    texts = {}
    for header, pattern in _AUTHORS.items():
        found = pattern.search((headers / header).read_text(encoding="utf-8"))
        if found is None:
            raise BackendError(f"{headers / header} names no authors: fetch it again")
        texts[f"{header.partition('/')[0]}.txt"] = _MIT.format(name=header, authors=found[1].strip())
    if jpeg is not None:
        said = "This software is based in part on the work of the Independent JPEG Group.\n\n"
        texts["libjpeg-turbo.txt"] = said + (jpeg.folder / "copyright").read_text(encoding="utf-8")
    if onnxruntime is not None:
        for name in ("LICENSE", "ThirdPartyNotices.txt"):
            texts[f"onnxruntime-{Path(name).stem}.txt"] = (onnxruntime / name).read_text(encoding="utf-8-sig")
    if cudart is not None:
        texts["cuda-runtime.txt"] = (cudart / "License.txt").read_text(encoding="utf-8")
    return texts
