"""CAM networks: a backbone, a 1x1 convolution to one map per class, BoostLU, global average pooling."""

from paml.models.boost import BoostSettings, boost_lu
from paml.models.cam import CamClassifier, ModelSettings, build_model

__all__ = ["BoostSettings", "CamClassifier", "ModelSettings", "boost_lu", "build_model"]
