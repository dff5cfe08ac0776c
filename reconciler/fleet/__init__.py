"""Above the flow: the same plan, approval, apply and drift for many databases, on one machine or on several.

    fleet.yaml ─ files.load ─▶ Fleet ─ members.resolve ─▶ Members ─ waves.assign ─▶ Members by wave
                                                             │
          pool.run: look.look, look.planned or apply ◀───────┘───▶ report.FleetReport

`groups` puts targets with the same effects under one approval, `rollout` applies it in waves. `queue` spreads the looks
over machines by procrastinate, `results` keeps what they saw in one database.
"""

from __future__ import annotations
