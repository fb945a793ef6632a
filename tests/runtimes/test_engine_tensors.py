"""The table of addresses: what does not fit an engine never reaches it."""

import numpy as np
import pytest

from edgeprune.errors import BackendError
from edgeprune.runtimes.backend import DeviceTensor
from edgeprune.runtimes.engine_tensors import EngineTensor, check_output_shape, input_addresses

HIDDEN = EngineTensor("hidden_states", np.dtype(np.float16), (1, -1, 8), False)
COUNT = EngineTensor("num_keep", np.dtype(np.int64), (), True)


def given(**changes) -> dict[str, DeviceTensor]:
    values = {"address": 512, "shape": (1, 5, 8), "dtype": np.dtype(np.float16), "owner": None} | changes
    return {
        "hidden_states": DeviceTensor(**values),
        "num_keep": DeviceTensor(768, (), np.dtype(np.int64), None),
        "what nobody reads": DeviceTensor(3, (1,), np.dtype(np.int64), None),
    }


def test_inputs_on_the_device_get_their_addresses():
    assert input_addresses("segment0", (HIDDEN, COUNT), given()) == {"hidden_states": 512}
    assert HIDDEN.is_dynamic
    assert not COUNT.is_dynamic


def test_empty_tensors_have_an_address():
    assert input_addresses("segment0", (HIDDEN,), given(shape=(1, 0, 8))) == {"hidden_states": 512}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": np.dtype(np.float32)}, "'hidden_states' is float16 to the engine and float32 here"),
        ({"shape": (1, 5, 9)}, r"is \(1, -1, 8\) to the engine and \(1, 5, 9\) here"),
        ({"shape": (5, 8)}, r"and \(5, 8\) here"),
    ],
)
def test_another_engine_is_told_apart(changes, message):
    with pytest.raises(BackendError, match=f"segment0: .*{message}: build the engines again"):
        input_addresses("segment0", (HIDDEN,), given(**changes))


def test_an_input_that_is_missing():
    with pytest.raises(BackendError, match="segment0: the engine reads 'hidden_states', which"):
        input_addresses("segment0", (HIDDEN,), {})


@pytest.mark.parametrize("address", [0, 128, 513])
def test_addresses_that_tensorrt_does_not_take(address):
    with pytest.raises(ValueError, match="which TensorRT does not take"):
        input_addresses("segment0", (HIDDEN,), given(address=address))


def test_outputs_whose_size_is_unknown_or_does_not_fit():
    place = given()["hidden_states"]
    check_output_shape("segment0", "out", (1, 5, 8), place)
    check_output_shape("segment0", "out", (1, 7, 8), None)
    with pytest.raises(BackendError, match="segment0: the size of 'out' depends on data"):
        check_output_shape("segment0", "out", (1, -1, 8), None)
    with pytest.raises(BackendError, match=r"'out' has the shape \(1, 6, 8\), expected was \(1, 5, 8\)"):
        check_output_shape("segment0", "out", (1, 6, 8), place)
