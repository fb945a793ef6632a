from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import BundleError
from edgeprune.json_data import from_json, to_json


@dataclass(frozen=True)
class Leaf:
    name: str
    sizes: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class Tree:
    weight: float
    leaves: tuple[Leaf, ...]
    by_name: dict[str, Leaf]
    best: Leaf | None
    limit: int | None = None
    flag: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


LEAF = {"name": "a", "sizes": [1, "n"]}
TREE = {"weight": 0.5, "leaves": [LEAF], "by_name": {"x": LEAF}, "best": None}
leaves = st.builds(Leaf, st.text(), st.lists(st.integers() | st.text()).map(tuple))
trees = st.builds(
    Tree,
    weight=st.floats(allow_nan=False, allow_infinity=False),
    leaves=st.lists(leaves).map(tuple),
    by_name=st.dictionaries(st.text(), leaves),
    best=st.none() | leaves,
    limit=st.none() | st.integers(),
    flag=st.booleans(),
    extra=st.dictionaries(st.text(), st.none() | st.integers() | st.lists(st.text())),
)


@given(trees)
@settings(max_examples=30, deadline=None)
def test_round_trip(tree):
    assert from_json(Tree, to_json(tree), "tree") == tree


def test_plain_values_of_nested_dataclasses():
    tree = Tree(1.0, (Leaf("a", (1, "n")),), {"x": Leaf("b")}, None, extra={"t": (1, (2,))})
    assert to_json(tree) == {
        "weight": 1.0,
        "leaves": [{"name": "a", "sizes": [1, "n"]}],
        "by_name": {"x": {"name": "b", "sizes": []}},
        "best": None,
        "limit": None,
        "flag": False,
        "extra": {"t": [1, [2]]},
    }


def test_integers_become_floats_where_floats_are_expected():
    weight = from_json(Tree, TREE | {"weight": 2}, "tree").weight
    assert (type(weight), weight) == (float, 2.0)


def test_defaults_are_filled_in():
    tree = from_json(Tree, TREE, "tree")
    assert (tree.limit, tree.flag, tree.extra) == (None, False, {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": "1"}, "tree.weight is '1', expected float"),
        ({"weight": True}, "tree.weight is 'True', expected float"),
        ({"weight": None}, "tree.weight is 'None', expected float"),
        ({"leaves": LEAF}, "tree.leaves is .*, expected a list"),
        ({"leaves": [LEAF, {"sizes": []}]}, r"tree.leaves\[1\] lacks the field 'name'"),
        (
            {"leaves": [LEAF | {"sizes": [1, True]}]},
            r"tree.leaves\[0\].sizes\[1\] is 'True', expected int or str",
        ),
        ({"by_name": []}, r"tree.by_name is '\[\]', expected an object"),
        ({"by_name": {"x": LEAF | {"name": 1}}}, "tree.by_name.x.name is '1', expected str"),
        ({"best": 3}, "tree.best is '3', expected an object"),
        ({"limit": 1.5}, "tree.limit is '1.5', expected int or NoneType"),
        ({"flag": 0}, "tree.flag is '0', expected bool"),
        ({"colour": 1, "age": 2}, "tree has an unknown field 'age'"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(BundleError, match=f"^{message}$"):
        from_json(Tree, TREE | fields, "tree")


def test_long_values_are_cut_in_messages():
    with pytest.raises(BundleError) as caught:
        from_json(Tree, TREE | {"limit": "9" * 10_000}, "tree")
    assert len(str(caught.value)) < 120
