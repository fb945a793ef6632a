"""``make test-gpu``: runs gpu_kernels.py where there is an NVIDIA GPU, and says so in one line where there is none."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch


def main() -> int:
    """The exit status."""
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        test = Path(__file__).with_name("gpu_kernels.py")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(test)]
        return subprocess.run(command, check=False).returncode
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        print("There is an NVIDIA GPU, but this torch is built for the CPU: install the CUDA build of torch")
        return 1
    print("No NVIDIA GPU here: nothing was run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
