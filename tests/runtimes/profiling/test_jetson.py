"""Energy from readings of power; no sensor is at hand."""

import sys
import types

from edgeprune.runtimes.profiling.jetson import PowerSensor, board_state, energy


def test_energy_is_the_mean_power_inside_of_the_answers():
    readings = [(0.5, 100.0), (1.5, 10.0), (1.9, 20.0), (2.5, 100.0), (3.5, 30.0)]
    found = energy(readings, [(1.0, 2.0), (3.0, 4.0)], tokens=10)
    assert (found.watts, found.readings) == (20.0, 3)
    # 20 W for two seconds, ten tokens.
    assert found.joules_per_token == 4.0


def test_without_readings_or_tokens_there_is_no_energy():
    assert energy([], [(0.0, 1.0)], tokens=3) is None
    assert energy([(2.0, 10.0)], [(0.0, 1.0)], tokens=3) is None
    assert energy([(0.5, 10.0)], [(0.0, 1.0)], tokens=0) is None


def test_without_the_package_nothing_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "jtop", None)
    with PowerSensor() as sensor:
        pass
    assert (sensor.readings, sensor.state) == ([], {})


def test_without_its_service_nothing_is_read(monkeypatch):
    class JtopError(Exception):
        pass

    class Client:
        def __init__(self, interval):
            self.interval = interval

        def start(self):
            raise JtopError("the service does not run")

    monkeypatch.setitem(sys.modules, "jtop", types.SimpleNamespace(jtop=Client, JtopException=JtopError))
    with PowerSensor() as sensor:
        pass
    assert sensor.readings == []


def test_power_mode_and_clocks_in_words():
    stats = {"nvp model": "MAXN", "jetson_clocks": "ON", "Power TOT": 21000}
    assert board_state(stats, {"gpu": {"freq": {"cur": 1300500}}}) == {
        "nvpmodel": "MAXN",
        "jetson_clocks": "ON",
        "gpu clock": "1300 MHz",
    }
