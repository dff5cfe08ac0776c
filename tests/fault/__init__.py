"""Faults and races against an apply: kills, cut connections, hostile sessions."""
