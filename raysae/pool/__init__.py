"""Long-lived Ray Train workers, and the broker that brings them trials."""
