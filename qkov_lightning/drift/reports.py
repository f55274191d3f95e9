"""A drift report for every reader: people, Markdown, programs, GitHub and JUnit."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from qkov_lightning.drift.drift import DriftReport, Finding
from qkov_lightning.measure.names import pair_label, printable
from qkov_lightning.scores.scores import SCORES

MAX_ROWS = 50
MAX_ANNOTATIONS = 10
"""GitHub shows ten annotations of one step."""

ACCEPT = "If this is meant to be, accept it as the new baseline:"


def headline(report: DriftReport) -> str:
    """The verdict in one sentence."""
    judged = f"{report.num_tests} quantities, {' and '.join(report.scores)}"
    if not report.drifted:
        return f"No interference drift beyond {report.tolerance:g} ({judged})."
    return (
        f"Interference drifted beyond {report.tolerance:g} in {len(report.cells)} cells; {describe(report.findings[0])} "
        f"({judged})."
    )


def describe(finding: Finding) -> str:
    """One quantity in words: where, which tasks, how far."""
    where = finding.name if finding.layer_name is None else f"{finding.name} ({finding.layer_name})"
    return printable(
        f"{where}: {finding.score} of {finding.task_b} pushing on {finding.task_a} went from {finding.baseline:.3g} to "
        f"{finding.current:.3g}, a rise of {finding.rise:.3g} ± {finding.standard_error:.2g}, "
        f"surely above {finding.lower_bound:.3g} (adjusted p = {finding.p_value:.2g})"
    )


def as_text(report: DriftReport, update_command: str) -> str:
    """The verdict, then a line for each finding and how to accept them, or the nearest miss."""
    lines = [headline(report), ""]
    if report.drifted:
        lines += [f"  {describe(finding)}" for finding in report.findings[:MAX_ROWS]]
        lines += [*_left_out(report), ""]
        lines += [ACCEPT, f"  {update_command}", ""] if update_command else []
    elif report.nearest:
        lines += ["Nearest to the limit:", f"  {describe(report.nearest[0])}", ""]
    return "\n".join([*lines, _conditions(report)]) + "\n"


def as_markdown(report: DriftReport, update_command: str) -> str:
    """The verdict and a table of the findings, or of the nearest misses."""
    rows = report.findings[:MAX_ROWS] if report.drifted else report.nearest[:3]
    header = ("where", "layer", "score", "pushes", "on", "baseline", "now", "rise", "surely above", "p")
    table = [header, ("---",) * len(header)]
    table += [
        (
            finding.name,
            _markdown(finding.layer_name or ""),
            _markdown(finding.score),
            _markdown(finding.task_b),
            _markdown(finding.task_a),
            f"{finding.baseline:.3g}",
            f"{finding.current:.3g}",
            f"{finding.rise:.3g} ± {finding.standard_error:.2g}",
            f"{finding.lower_bound:.3g}",
            f"{finding.p_value:.2g}",
        )
        for finding in rows
    ]
    title = "Interference drifted" if report.drifted else "No interference drift"
    lines = [f"### {title}", "", _markdown(headline(report)), ""]
    if rows and not report.drifted:
        lines += ["Nearest to the limit:", ""]
    lines += ["| " + " | ".join(row) + " |" for row in table] if rows else []
    if report.drifted:
        lines += ["", *_left_out(report)]
        lines += [ACCEPT, "", f"    {update_command}"] if update_command else []
    return "\n".join([*lines, "", _conditions(report)]) + "\n"


def as_json(report: DriftReport, update_command: str) -> str:
    """Everything, for programs; infinities, which JSON lacks, are null."""
    data: dict[str, Any] = {
        "drifted": report.drifted,
        "headline": headline(report),
        "update_command": update_command,
    }
    data |= asdict(report)
    for finding in (*data["findings"], *data["nearest"]):
        for name, value in finding.items():
            if isinstance(value, float) and value in {float("inf"), float("-inf")}:
                finding[name] = None
    return json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def as_github(report: DriftReport, update_command: str) -> str:
    """Annotations of a GitHub Actions step, then the text."""
    annotations = [
        github_annotation(f"Interference drift: {finding.name}", describe(finding))
        for finding in report.findings[:MAX_ANNOTATIONS]
    ]
    return "".join(annotations) + as_text(report, update_command)


def github_annotation(title: str, message: str) -> str:
    """An error annotation: what its syntax would take for its own is escaped."""
    message = message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    title = title.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return f"::error title={title.replace(':', '%3A').replace(',', '%2C')}::{message}\n"


FORMATS: Mapping[str, Callable[[DriftReport, str], str]] = {
    "text": as_text,
    "markdown": as_markdown,
    "json": as_json,
    "github": as_github,
}


def refusal(message: str, format: str) -> str:
    """A comparison that could not be made, in one of ``FORMATS``."""
    message = printable(message)
    if format == "json":
        return json.dumps({"drifted": None, "error": message}, indent=2, ensure_ascii=False) + "\n"
    if format == "markdown":
        return f"### Interference was not compared\n\n{_markdown(message)}\n"
    annotation = github_annotation("Interference was not compared", message) if format == "github" else ""
    return f"{annotation}Not compared: {message}\n"


def as_junit(report: DriftReport) -> str:
    """JUnit XML: a test case per score and pair of tasks that was judged."""
    suite = ElementTree.Element("testsuite", name="qkov gate", errors="0", skipped="0")
    failures = 0
    tests = 0
    for score in report.scores:
        for a, b in itertools.permutations(report.tasks, 2):
            if SCORES[score].symmetric and report.tasks.index(a) > report.tasks.index(b):
                continue
            tests += 1
            name = printable(f"{score}: {pair_label(a, b)}")
            case = ElementTree.SubElement(suite, "testcase", classname="interference", name=name, time="0")
            found = [f for f in report.findings if (f.score, f.task_a, f.task_b) == (score, a, b)]
            if found:
                failures += 1
                failure = ElementTree.SubElement(case, "failure", message=describe(found[0]), type="drift")
                failure.text = "\n".join(describe(finding) for finding in found[:MAX_ROWS])
    suite.set("tests", str(tests))
    suite.set("failures", str(failures))
    return _junit(suite)


def junit_error(message: str) -> str:
    """JUnit XML of a comparison that could not be made."""
    suite = ElementTree.Element(
        "testsuite", name="qkov gate", tests="1", failures="0", errors="1", skipped="0"
    )
    case = ElementTree.SubElement(suite, "testcase", classname="interference", name="comparable", time="0")
    ElementTree.SubElement(case, "error", message=printable(message), type="not comparable")
    return _junit(suite)


def _junit(suite: ElementTree.Element) -> str:
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _left_out(report: DriftReport) -> list[str]:
    left = len(report.findings) - MAX_ROWS
    return [f"  ... and {left} more"] if left > 0 else []


def _conditions(report: DriftReport) -> str:
    which = "the same samples" if report.same_samples else "other samples"
    return (
        f"Tolerance {report.tolerance:g}, false alarms at most {report.alpha:.0%}, smallest task: "
        f"{report.num_samples[0]} samples in the baseline, {report.num_samples[1]} now ({which})."
    )


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    escaped = printable(text).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\`*_[]|#" else c for c in escaped)
