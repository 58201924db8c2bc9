"""The study: every key of the config, typed once, one file a section.

A section's file also has `problems(study)`: the sentences about references and files of that section, which one section
alone cannot check. `loading` joins them.
"""

from coppice.models.sources import SHIPPED
from coppice.study.schema.calibrations import Calibration
from coppice.study.schema.evaluations import Connectivity, Cost, Evaluation, Intrinsic, Protocol, Quality
from coppice.study.schema.laws import Law
from coppice.study.schema.models import MODEL_TYPES, HubModel, LocalModel, ShippedModel
from coppice.study.schema.recipes import Recipe
from coppice.study.schema.roofline import Roofline
from coppice.study.schema.steps import Step
from coppice.study.schema.study import Study
from coppice.study.schema.texts import BuiltinText, FileText, HubText
from coppice.study.schema.tracking import Tracking

__all__ = [
    "MODEL_TYPES",
    "SHIPPED",
    "BuiltinText",
    "Calibration",
    "Connectivity",
    "Cost",
    "Evaluation",
    "FileText",
    "HubModel",
    "HubText",
    "Intrinsic",
    "Law",
    "LocalModel",
    "Protocol",
    "Quality",
    "Recipe",
    "Roofline",
    "ShippedModel",
    "Step",
    "Study",
    "Tracking",
]
