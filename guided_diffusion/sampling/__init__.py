"""Drawing samples: samplers, solvers, and sets of samples on disk."""
