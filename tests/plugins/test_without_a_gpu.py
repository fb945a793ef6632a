"""What is for GPUs says so where there is none, in one line, and succeeds."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: 'make test-gpu' uses it")
@pytest.mark.parametrize(
    "script", ["tests/plugins/run_on_gpu.py", "benchmarks/kernels.py", "benchmarks/gpu.py"]
)
def test_nothing_is_run(script):
    ran = subprocess.run(
        [sys.executable, str(REPOSITORY / script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={"PATH": "", "PYTHONPATH": str(REPOSITORY)},
    )
    assert ran.returncode == 0, ran.stderr
    (line,) = ran.stdout.splitlines()
    assert "No NVIDIA GPU here" in line
    assert "nothing was" in line
