"""Where images and labels come from. A source is a function in one of two registries.

To add a source, write one module and add one line here. `paml prepare` finds it by its name.
"""

from collections.abc import Callable, Mapping

from paml.sources.coco import coco
from paml.sources.cub import cub
from paml.sources.folder import bucket_source, folder_source
from paml.sources.full import LabeledSplit
from paml.sources.nus_wide import nus_wide
from paml.sources.parts import ImageRequest, ImageSet
from paml.sources.tars import tar_source
from paml.sources.voc import voc

IMAGE_SOURCES: Mapping[str, Callable[[ImageRequest], ImageSet]] = {
    "folder": folder_source,
    "bucket": bucket_source,
    "tars": tar_source,
}
"""Images of one split, whose labels come from a release or a label file (the setting `images_from`)."""

LABELED_SETS: Mapping[str, Callable[..., Mapping[str, LabeledSplit]]] = {
    "voc": voc,
    "coco": coco,
    "nus_wide": nus_wide,
    "cub": cub,
}
"""Images and all their labels by split, from (folder of the unpacked set, folder of the tables to write)."""
