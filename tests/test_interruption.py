"""Ctrl-C is never lost."""

import signal
import weakref

import pytest

from edgeprune.interruption import Interruption


@pytest.fixture(autouse=True)
def heard():
    """A shell that runs the tests in the background makes them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Node:
    """Something that can be referred to weakly."""


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_at_once():
    with pytest.raises(KeyboardInterrupt), Interruption():
        press()


def test_dropped_by_the_interpreter(capsys):
    """In the callback of a weak reference an exception is printed and dropped."""
    with Interruption() as interruption:
        interruption.check()
        node = Node()
        reference = weakref.ref(node, lambda _: press())
        del node
        assert reference() is None
        with pytest.raises(KeyboardInterrupt):
            interruption.check()
    assert capsys.readouterr().err == ""


def test_converted_by_a_library():
    with pytest.raises(KeyboardInterrupt) as caught, Interruption():  # noqa: PT012 - the conversion
        try:
            press()
        except KeyboardInterrupt as error:
            raise RuntimeError("a callback failed") from error
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_other_errors_stay():
    with pytest.raises(ValueError, match="another"), Interruption():
        raise ValueError("another")


def test_other_dropped_errors_are_reported(monkeypatch):
    reported = []
    monkeypatch.setattr("sys.unraisablehook", reported.append)

    def fail(_):
        raise ValueError("dropped")

    with Interruption():
        node = Node()
        reference = weakref.ref(node, fail)
        del node
    assert reference() is None
    assert [str(entry.exc_value) for entry in reported] == ["dropped"]


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with Interruption():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_who_ignores_it_keeps_ignoring_it():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            press()
            interruption.check()
    finally:
        signal.signal(signal.SIGINT, previous)
