"""Where images come from: each module turns files into (key, image) pairs."""
