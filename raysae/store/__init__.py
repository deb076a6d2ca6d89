"""The activation store: harvested once, held in the Ray object store, read by all workers."""
