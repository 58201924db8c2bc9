"""`tracking`: where results are mirrored to."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from coppice.study.schema.section import Section


class Tracking(Section):
    """Where results are mirrored to."""

    uri: str | None = Field(default=None, description="MLflow tracking URI; null: results/mlflow.db.")
    weights: Literal["none", "pareto", "all"] = Field(
        default="none",
        description="Nodes whose weights are uploaded: none, those on the Pareto front of size and quality, or all.",
    )

    @field_validator("uri")
    @classmethod
    def _without_a_password(cls, value: str | None) -> str | None:
        if value and re.search(r"://[^/@:]*:.*@", value):
            raise ValueError(
                "An address with a password would appear in logs and reports; leave the password out, and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (for a database: PGUSER and PGPASSWORD)."
            )
        return value
