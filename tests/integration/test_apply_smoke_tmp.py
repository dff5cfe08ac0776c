from __future__ import annotations
from tests.integration import governed
def test_x(db, tmp_path):
    import time
    s = governed.shop(db, tmp_path)
    t=time.monotonic(); a = governed.image(db); print("image", time.monotonic()-t, len(a))
    t=time.monotonic(); p = s.plan(); print("plan", time.monotonic()-t, p.summary, p.hazards)
    assert governed.image(db) == a
    t=time.monotonic(); s.settle(); print("settle", time.monotonic()-t)
    assert governed.image(db) != a
