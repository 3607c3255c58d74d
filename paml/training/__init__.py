"""Training in one process: the step, the loop, its state and its checkpoints. No Ray in here."""
