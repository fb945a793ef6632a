"""A model for benchmarks at the smallest size; its folder is shared, as a user's --workdir may be."""

import pytest
from random_llava import LlavaSize


@pytest.fixture(scope="session")
def small_size() -> LlavaSize:
    return LlavaSize(
        hidden_size=64,
        intermediate_size=96,
        num_layers=4,
        num_heads=4,
        vocab_size=320,
        vision_hidden_size=64,
        vision_layers=2,
        image_size=64,
        patch_size=8,
    )


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmarks")
