"""How a repository on the Hugging Face Hub is named on the command line. Apart, so that a wrong name is told at once."""

from __future__ import annotations

import re
from dataclasses import dataclass

from planners.errors import SettingsError

_PART = r"[A-Za-z0-9][\w.-]*"
_ADDRESS = re.compile(rf"hf:(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[\w.-]+))?(?:/(?P<file>[\w./-]+))?")


@dataclass(frozen=True)
class Address:
    """`hf:owner/repo[@revision][/FILE]`."""

    repo: str
    revision: str | None = None
    file: str | None = None


def parse_address(text: str) -> Address:
    """Read `hf:owner/repo`; SettingsError for another spelling."""
    match = _ADDRESS.fullmatch(text)
    if match is None or ".." in text:
        raise SettingsError(
            "Not the address of a repository on the Hugging Face Hub",
            found=text,
            expected="hf:owner/repo, hf:owner/repo@REVISION or hf:owner/repo/FILE",
            remedy="copy owner/repo from the address of the repository's page",
        )
    return Address(**match.groupdict())
