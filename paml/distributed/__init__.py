"""Training, tuning, preparation and prediction on a Ray cluster. The only package that imports Ray."""
