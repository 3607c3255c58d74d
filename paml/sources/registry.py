"""Where labels and images come from. A source is two functions in one registry.

To add a source, write one module and add it here, with its settings if it has some. `paml prepare` finds it by its
name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from paml.sources.coco import CocoSettings, detect_coco, read_coco
from paml.sources.cub import detect_cub, read_cub
from paml.sources.fiftyone import FiftyOneSettings, detect_fiftyone, read_fiftyone
from paml.sources.hf import HFSettings, detect_hf, read_hf
from paml.sources.label_studio import LabelStudioSettings, detect_label_studio, read_label_studio
from paml.sources.nus_wide import detect_nus_wide, read_nus_wide
from paml.sources.records import Records
from paml.sources.release import detect_openimages
from paml.sources.table import TableSettings, detect_table, read_table
from paml.sources.voc import VocSettings, detect_voc, read_voc
from paml.sources.webdataset import WebDatasetSettings, detect_webdataset, read_webdataset


class Source(NamedTuple):
    """One format of labels."""

    detect: Callable[[str], str | None]
    """Why a file or folder looks like this format, in a few words; None if it does not. Cheap; never raises."""
    read: Callable[[str, str | None, Any], Records] | None
    """The records of (labels, images, the format's settings). None for Open Images, whose tables have many millions of
    rows and are built from its files directly. Raises PamlError."""


SOURCES: Mapping[str, Source] = {
    "openimages": Source(detect_openimages, None),
    "table": Source(detect_table, read_table),
    "coco": Source(detect_coco, read_coco),
    "voc": Source(detect_voc, read_voc),
    "nus_wide": Source(detect_nus_wide, read_nus_wide),
    "cub": Source(detect_cub, read_cub),
    "webdataset": Source(detect_webdataset, read_webdataset),
    "hf": Source(detect_hf, read_hf),
    "label_studio": Source(detect_label_studio, read_label_studio),
    "fiftyone": Source(detect_fiftyone, read_fiftyone),
}
"""The formats that `paml prepare --source` takes."""


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """The settings of the sources that have some."""

    table: TableSettings = field(default_factory=TableSettings)
    """The source `table`."""
    coco: CocoSettings = field(default_factory=CocoSettings)
    """The source `coco`."""
    voc: VocSettings = field(default_factory=VocSettings)
    """The source `voc`."""
    webdataset: WebDatasetSettings = field(default_factory=WebDatasetSettings)
    """The source `webdataset`."""
    hf: HFSettings = field(default_factory=HFSettings)
    """The source `hf`."""
    label_studio: LabelStudioSettings = field(default_factory=LabelStudioSettings)
    """The source `label_studio`."""
    fiftyone: FiftyOneSettings = field(default_factory=FiftyOneSettings)
    """The source `fiftyone`."""
