"""libFuzzer's targets find nothing in a minute, reach what they are for, and a target that fails is reported."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY, SANITIZE, alone

from edgeprune.errors import BackendError
from edgeprune.runtimes.cpp.build import FUZZERS, build_fuzzers, fetch
from edgeprune.runtimes.cpp.fuzzing import fuzz, picture_files, write_seeds

OUTPUT = REPOSITORY / "out" / "cpp-fuzz"
SECONDS = 60
EMPTY_TARGET = (
    '#include <cstddef>\nextern "C" int LLVMFuzzerTestOneInput(const char*, size_t) { return 0; }\n'
)

pytestmark = pytest.mark.skipif(SANITIZE, reason="the targets have sanitizers anyway")


@pytest.fixture(scope="module")
def fuzzers(tmp_path_factory) -> Iterator[dict[str, Path]]:
    """The targets; where clang or its libFuzzer is missing, say so."""
    if shutil.which("clang") is None or shutil.which("clang++") is None:
        pytest.skip("no clang: install clang and its compiler-rt (on Debian 12: clang libclang-rt-14-dev)")
    source = tmp_path_factory.mktemp("clang") / "empty.cpp"
    source.write_text(EMPTY_TARGET)
    command = ["clang++", "-fsanitize=fuzzer,address,undefined", source, "-o", source.with_suffix("")]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("clang has no libFuzzer: install its compiler-rt (on Debian 12: libclang-rt-14-dev)")
    with alone(OUTPUT):
        try:
            fetch(OUTPUT / "dependencies")
        except BackendError as error:
            pytest.skip(f"the header-only libraries cannot be fetched: {' '.join(str(error).split())[-300:]}")
        yield build_fuzzers(OUTPUT)


def test_a_minute_of_each_target_finds_nothing(fuzzers, example_bundle, tmp_path):
    write_seeds(example_bundle, tmp_path / "seeds")
    runs = fuzz(fuzzers, tmp_path, SECONDS)
    assert [run.name for run in runs] == list(FUZZERS)
    for run in runs:
        assert run.finding is None, run.finding
        assert run.executions > 100
        # Inputs that reached code that no seed had reached.
        assert len(list((tmp_path / "corpus" / run.name).iterdir())) > 20


def test_a_target_that_fails_is_a_finding(tmp_path):
    program = tmp_path / "broken"
    program.write_text("#!/bin/sh\necho 'ERROR: AddressSanitizer: heap-use-after-free'\nexit 77\n")
    program.chmod(0o755)
    (run,) = fuzz({"picture": program}, tmp_path, 1)
    assert run.finding == "ERROR: AddressSanitizer: heap-use-after-free"


def test_seeds_are_a_bundles_files_and_pictures_of_every_mode(atp_bundle, tmp_path):
    write_seeds(atp_bundle, tmp_path)
    manifest = json.loads((tmp_path / "manifest" / "0").read_text())
    assert manifest == json.loads((atp_bundle / "manifest.json").read_text())
    tokenizer, text = (tmp_path / "tokenizer" / "0").read_text().split("\n", 1)
    assert json.loads(tokenizer) == json.loads((atp_bundle / "tokenizer.json").read_text())
    assert text
    assert len(list((tmp_path / "picture").iterdir())) == len(picture_files()) == 16


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BackendError, match="gives no seeds"):
        write_seeds(tmp_path, tmp_path / "seeds")
