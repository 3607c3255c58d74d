"""Many runs of one recipe: comparisons of methods, and sweeps of settings."""
