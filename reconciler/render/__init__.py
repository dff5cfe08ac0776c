"""Last edge of the flow: plans, drift, approvals and outcomes as people and programs read them."""
