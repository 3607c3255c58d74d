"""CAM networks: a backbone, a 1×1 convolution to one map a class, BoostLU, global average pooling."""

from paml.models.boost import BoostSettings, boost_lu
from paml.models.cam import CamClassifier, ModelSettings, build_model

__all__ = ["BoostSettings", "CamClassifier", "ModelSettings", "boost_lu", "build_model"]
