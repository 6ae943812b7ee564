"""`trimkv doctor`: a check of everything that a run needs."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from trimkv_cli.commands.options import JSON
from trimkv_cli.settings import option

if TYPE_CHECKING:
    from trimkv_cli.loading.checkup import Finding


def doctor(
    *,
    measure: bool = option(
        False, "Measure what a process takes without a model, and how fast packed weights are, for later plans."
    ),
    json: bool = JSON,
) -> None:
    """Check versions, device, number formats, folders, terminal and the built-in model; exit 1 on a fault.

    trimkv doctor

    trimkv doctor --measure

    trimkv doctor --json | jq .
    """
    from trimkv_cli.loading.checkup import calibrate, checkup
    from trimkv_cli.ui.plain import print_answer

    findings = [*(calibrate() if measure else ()), *checkup()]
    healthy = all(finding.status != "fault" for finding in findings)
    checks = [asdict(finding) for finding in findings]
    print_answer(jsonlib.dumps({"ok": healthy, "checks": checks}, indent=2) if json else _as_text(findings))
    if not healthy:
        raise typer.Exit(1)


def _as_text(findings: list[Finding]) -> str:
    from trimkv_cli.ui.plain import columns

    lines = columns([(finding.status, finding.name, finding.detail) for finding in findings])
    hints = [f"\nhint: {finding.hint}" if finding.hint else "" for finding in findings]
    return "\n".join(line + hint for line, hint in zip(lines, hints, strict=True))
