"""The suites by name."""

from __future__ import annotations

from benchmarks.dreambench import DreamBench
from benchmarks.dreamedit import DreamEditBench
from benchmarks.pie_bench import PieBench
from benchmarks.suite import Options, Suite, SuiteError
from benchmarks.world_suite import WorldSuite
from p2p_subject.errors import did_you_mean

SUITES: dict[str, type[Suite]] = {suite.name: suite for suite in (WorldSuite, PieBench, DreamBench, DreamEditBench)}


def suite_class(name: str) -> type[Suite]:
    """Look a suite up; `SuiteError` lists the names for an unknown one."""
    if name not in SUITES:
        raise SuiteError(f"suite {name!r};{did_you_mean(name, SUITES)} expected one of {', '.join(SUITES)}")
    return SUITES[name]


def open_suite(name: str, options: Options) -> Suite:
    """Open a suite by its name, its data checked."""
    return suite_class(name)(options)
