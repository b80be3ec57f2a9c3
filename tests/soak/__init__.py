"""The soak: random programs, faults, suspensions and limits, from one seed."""
