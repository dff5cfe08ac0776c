"""Plan, approve and apply changes to the control plane of a PostgreSQL database, and see what moved since.

The map of the flow; every module says its place in its first line::

    state/*.yaml, *.sql ── desired.load ──▶ Desired ─┐
                                                     ├─ diff ─▶ Changes ─ plan.build ─▶ Plan ─ approve ─▶ Approval
    PostgreSQL ── live.read ──▶ Live, Findings ──────┤                      ▲                              │
       ▲   └───── ledger.last ──▶ last applied ──────┘                      │                              ▼
       │                                              (survey: the same calls again) ── apply: lock, same digest?
       └── COMMIT ◀─ ledger entry ◀─ checks ◀─ read again: nothing left? ◀─ execute ◀──────────────────────┘

`kinds` is what is reconciled and `checks` what is verified, one file each. `pg` is the only edge to the database, `cli`
the only one to people. `drift` is desired, last applied and live, three ways.
"""

from __future__ import annotations

__version__ = "0.1.0"
