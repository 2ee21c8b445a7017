"""Shared by all tests: the long stage, and skips that CI does not allow."""

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests of the long stage too")
    parser.addoption("--soak", action="store_true", help="run the tests that no stage runs yet too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for mark in ("long", "soak"):
        if not config.getoption(f"--{mark}"):
            chosen = [item for item in items if mark not in item.keywords]
            config.hook.pytest_deselected(items=[item for item in items if mark in item.keywords])
            items[:] = chosen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if report.skipped and os.environ.get("CI"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where everything must run: {report.longrepr}"
    return report
