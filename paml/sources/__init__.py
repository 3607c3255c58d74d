"""Where labels and images come from. `registry.py` lists the formats."""
