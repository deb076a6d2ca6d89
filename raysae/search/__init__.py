"""The search: Ray Tune with Optuna over the worker pool, and what it leaves in the run folder."""
