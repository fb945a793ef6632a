"""``make test-gpu``: runs the kernels, the engines and ONNX Runtime's providers where there is an NVIDIA GPU.

Where there is none it says so in one line.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from edgeprune.this_machine import this_machine

TESTS = Path(__file__).resolve().parents[1]


def main() -> int:
    """The exit status."""
    machine = this_machine()
    if machine is None and not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            print("There is nvidia-smi, but no driver answers: check it with nvidia-smi; nothing was run")
            return 1
        print("No NVIDIA GPU here: nothing was run")
        return 0
    if machine is not None:
        print(f"{machine.title}, SM {machine.sm}, torch {torch.__version__}")
    status = pytest("runtimes/gpu_engines.py")
    if not torch.cuda.is_available():
        print("This torch is built for the CPU, so the kernels were not run: install the CUDA build of torch")
        return 1
    return status or pytest("plugins/gpu_kernels.py")


def pytest(file: str) -> int:
    """Run a file of tests; single precision means single precision, or kept indices could differ."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:xdist", str(TESTS / file)]
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}
    return subprocess.run(command, check=False, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
