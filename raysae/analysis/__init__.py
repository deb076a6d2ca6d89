"""Read-only analyses of trained sparse autoencoders."""
