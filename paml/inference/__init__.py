"""Use of trained models: predict, export, calibrate. No Ray here."""
