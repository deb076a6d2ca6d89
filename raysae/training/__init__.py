"""Training one SAE: spec, step, schedules, loop. Knows nothing of Ray."""
