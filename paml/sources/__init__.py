"""Where images come from: each module turns files into parts, which give (key, image) pairs."""
