"""Where the files that come with the project are: dataset manifests and cluster descriptions.

An installed wheel carries them inside the package, as ``ssn/_resources/<kind>``; a checkout has them at its root.
"""

from __future__ import annotations

from pathlib import Path

from ssn.errors import SSNError


def resource_dir(kind: str) -> Path:
    """The folder of a kind of packaged file (``datasets`` or ``clusters``): the wheel's copy, else the checkout's.

    Raises:
        SSNError: neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "_resources" / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    raise SSNError(f"the packaged folder {kind!r} is missing beside {package}; reinstall the package")


def list_resources(kind: str) -> dict[str, Path]:
    """The YAML files of a kind, by name without suffix, sorted."""
    return {path.stem: path for path in sorted(resource_dir(kind).glob("*.yaml"))}
