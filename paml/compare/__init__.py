"""A grid of methods and seeds under one budget: what is to be trained, and the table that comes of it."""
