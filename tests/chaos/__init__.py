"""Random faults of all kinds, injected one after another into one training."""
