import onnx
import pytest

from edgeprune.errors import BundleError
from edgeprune.runtimes.onnx_operators import OperatorNode, operator_nodes, without_functions


def test_the_operators_of_a_site_are_found(atp_bundle, combined_bundle):
    found = operator_nodes((atp_bundle / "site0.onnx").read_bytes())
    assert set(found) == {
        OperatorNode("AttentionScore", "probabilities"),
        OperatorNode("TokenSelect", "threshold"),
    }
    assert operator_nodes((atp_bundle / "gather.onnx").read_bytes()) == (OperatorNode("TokenGather", None),)
    assert operator_nodes((atp_bundle / "segment0.onnx").read_bytes()) == ()
    modes = {node.mode for node in operator_nodes((combined_bundle / "site0.onnx").read_bytes())}
    assert "soft_nms" in modes


def test_functions_go_and_everything_else_stays(atp_bundle):
    for path in sorted(atp_bundle.glob("*.onnx")):
        expected = onnx.load(path, load_external_data=False)
        del expected.functions[:]
        assert onnx.load_from_string(without_functions(path.read_bytes())) == expected


@pytest.mark.parametrize("content", [b"\x3a", b"\xff" * 20, b"\x3a\x7fabc", b"\x0b", b"\x09abc"])
def test_what_is_no_onnx_file_is_refused(content):
    with pytest.raises(BundleError, match="cannot be read: copy the bundle again"):
        operator_nodes(content)
    with pytest.raises(BundleError, match="cannot be read: copy the bundle again"):
        without_functions(content)
