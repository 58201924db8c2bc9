"""config/schema.json: the JSON schema of a study, with the options of every registered method and of every law."""

from __future__ import annotations

import json
from pathlib import Path

from coppice.documentation.packaged import packaged_laws, packaged_methods
from coppice.laws.contracts import Law
from coppice.methods.registry import Method
from coppice.records.base import Json
from coppice.study.schema import Step, Study

PATH = Path("config/schema.json")


def render(root: Path) -> str:
    """The file. root: the repository, of which it needs nothing."""
    return json.dumps(schema(), indent=1) + "\n"


def schema() -> Json:
    """The JSON schema of a study, with the options of every registered method and of every law."""
    study = Study.model_json_schema()
    definitions = study["$defs"]
    definitions["Step"] = {"oneOf": [step_schema(method, definitions) for method in packaged_methods()]}
    definitions["Law"] = {"oneOf": [law_schema(name, law, definitions) for name, law in packaged_laws().items()]}
    items = study["properties"]["recipes"]["items"]
    names = definitions["Recipe"]["properties"]["steps"]["anyOf"][0]
    study["properties"]["recipes"]["items"] = {"anyOf": [names, items]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A study of Coppice", **study}


def step_schema(method: Method, definitions: Json) -> Json:
    """The JSON schema of a step by `method`; types that its options refer to are added to `definitions`."""
    options = method.options.model_json_schema()
    definitions.update(options.pop("$defs", {}))
    properties = {"method": {"const": method.name}, **options.get("properties", {})}
    if method.contract == "layer" or method.needs():
        properties["calibration"] = {
            "type": "string",
            "description": Step.model_fields["calibration"].description,
        }
    return {
        "title": method.name,
        "type": "object",
        "properties": properties,
        "required": ["method", *options.get("required", [])],
        "additionalProperties": False,
    }


def law_schema(name: str, law: Law, definitions: Json) -> Json:
    """The JSON schema of a law of a study; types that its options refer to are added to `definitions`."""
    options = law.options.model_json_schema()
    definitions.update(options.pop("$defs", {}))
    return {
        "title": name,
        "type": "object",
        "properties": {"law": {"const": name}, **options.get("properties", {})},
        "required": ["law", *options.get("required", [])],
        "additionalProperties": False,
    }
