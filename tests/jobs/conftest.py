import pytest


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch):
    monkeypatch.delenv("OPENDEEP_LAUNCH", raising=False)
