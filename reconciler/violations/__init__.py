"""Beside the flow: can anything violate an invariant? Violations are made on a rehearsal, and each has to be seen.

An invariant that nothing can violate says nothing, and is called vacuous. What is made is rolled back every time, and
the invariant's own code judges it, asked as an apply asks just before COMMIT. Never on a target.

    trial       the invariant on trial: do something, ask it, undo it
    samples     values worth trying in a column, from the constants of a condition and from the column's type
    relations   what must be known of a relation
    rows        rows that a relation could hold
    writing     rows into real tables, and what stands in their way
    tampering   what somebody could do to a table, a function or an extension
    objects     real objects for queries about the catalog
    scene       what a query reads
    search      what would make a query answer otherwise
    synthesis   every form of invariant, and the verdict on it
"""

from __future__ import annotations

from reconciler.violations.synthesis import Violation, synthesise
from reconciler.violations.trial import Attempt

__all__ = ["Attempt", "Violation", "synthesise"]
