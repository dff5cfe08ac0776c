from __future__ import annotations
import json
from tests.integration.test_least_privilege import planner, states, reading, TABLES
def test_x(dieu45, tmp_path):
    st = states(tmp_path, dieu45)
    for skip in (None, "public.job_queue", "public.event_outbox", "public.iu_sql_event_route"):
        r=planner(dieu45, tables=tuple(t for t in TABLES if t!=skip))
        for c in ("plan","drift"):
            d=json.loads(reading(c, dieu45, r, st, "--format", "json").stdout)
            print(skip, c, [(v["address"],v["status"],v["missing"],v["detail"]) for k in ("invariants","surface","proofs") for v in d.get(k,[]) if v["status"] not in ("held","deferred")])
