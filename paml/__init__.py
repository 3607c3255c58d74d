"""Multi-label image classifiers from partial labels: CAM + BoostLU with large-loss rejection."""

__version__ = "0.1.0"
