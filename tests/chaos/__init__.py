"""Faults of all kinds that strike one after another over one training."""
