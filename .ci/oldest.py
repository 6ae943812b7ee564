"""Print the oldest release that pyproject.toml allows of everything but torch, as requirements for pip."""

from __future__ import annotations

from pathlib import Path

import tomli
from packaging.requirements import Requirement

project = tomli.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
for line in project["dependencies"]:
    requirement = Requirement(line)
    if requirement.name != "torch" and (requirement.marker is None or requirement.marker.evaluate()):
        oldest = next(bound.version for bound in requirement.specifier if bound.operator == ">=")
        print(f"{requirement.name}=={oldest}")
