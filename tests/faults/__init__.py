"""Fault injection: jobs whose ranks are killed, held against the dense truth."""
