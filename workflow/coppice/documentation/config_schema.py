"""config/schema.json: the JSON schema of a study, with the options of every registered method and of every law."""

from __future__ import annotations

import json
from pathlib import Path

from coppice.laws import registry as laws
from coppice.methods.registry import Method, methods
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
    definitions["Step"] = {"oneOf": [step_schema(method, definitions) for method in methods().values()]}
    definitions["Law"] = {"oneOf": [law_schema(name, definitions) for name in laws.names()]}
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


def law_schema(name: str, definitions: Json) -> Json:
    """The JSON schema of a law of a study; types that its options refer to are added to `definitions`."""
    options = laws.load(name).options.model_json_schema()
    definitions.update(options.pop("$defs", {}))
    return {
        "title": name,
        "type": "object",
        "properties": {"law": {"const": name}, **options.get("properties", {})},
        "required": ["law", *options.get("required", [])],
        "additionalProperties": False,
    }
