"""Training in one process: step, loop, state and checkpoints. Nothing here uses Ray."""
