"""Print the installed versions as a constraints file: `python .ci/constraints.py > constraints.txt`."""

from __future__ import annotations

import importlib.metadata
import re

HEADER = """\
# The versions that the tests pass with: `pip install -c constraints.txt ...` (`make constraints` rewrites this file).
# A release that needs a newer Python than lightllm does carries a marker; on an older Python pip picks the version."""
OLDEST_PYTHON = (3, 10)
NOT_OURS_TO_PIN = {"lightllm", "pip", "setuptools", "wheel"}


def pin(distribution: importlib.metadata.Distribution) -> str:
    """Write one line: the public version (a build tag such as +cpu left out) and the Python that it needs."""
    name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
    minors = re.findall(r">=\s*3\.(\d+)", distribution.metadata.get("Requires-Python", ""))
    oldest = max((3, int(minor)) for minor in minors) if minors else OLDEST_PYTHON
    marker = f' ; python_version >= "{oldest[0]}.{oldest[1]}"' if oldest > OLDEST_PYTHON else ""
    return f"{name}=={distribution.version.split('+')[0]}{marker}"


if __name__ == "__main__":
    pins = {pin(distribution) for distribution in importlib.metadata.distributions()}
    print(HEADER)
    print("\n".join(sorted(line for line in pins if line.split("==")[0] not in NOT_OURS_TO_PIN)))
