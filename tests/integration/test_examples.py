from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HELD = "Invariants: 22 held, 0 violated, 4 attested, 0 not judged."


def test_the_demo_does_the_main_job_and_leaves_nothing_behind() -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PG", "RECONCILER_"))},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "NO_COLOR": "1",
    }
    done = subprocess.run(
        [ROOT / "examples/dieu45/demo.sh"], check=False, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for wanted in (
        "  functions=515",
        "Plan: 10 to add, 1 to change, 0 to remove.",
        "Apply complete! 10 added, 1 changed, 0 removed.",
        f"{HELD} Proofs: 15 passed, 1 rehearsed. Surface: 16 of 16 as predicted.",
        "  executors_stale=1, executor_name=iu_outbound_default, status_hint=stale, passive=True",
        "No changes. The database matches the desired state.",
        "Drift: 2 objects changed, 0 pending.",
        "exit code 2",
    ):
        assert wanted in lines, done.stdout
    work = next(Path(word).parent for word in done.stdout.split() if word.endswith("/phase2.plan"))
    assert not work.exists()
