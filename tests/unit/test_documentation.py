"""What is generated is in step with the code, and the schema says what `load_study` says."""

from __future__ import annotations

import jsonschema
import pytest
from studies import small_study

from coppice import documentation
from coppice.methods.base import methods


def test_the_files_in_the_repository_are_up_to_date():
    assert documentation.outdated() == [], "run `python -m coppice.documentation`"


def test_a_file_that_was_changed_by_hand_is_out_of_date(tmp_path):
    documentation.write(tmp_path)
    assert documentation.outdated(tmp_path) == []
    (tmp_path / "config" / "README.md").write_text("by hand")
    assert [path.name for path in documentation.outdated(tmp_path)] == ["README.md"]


def test_the_schema_accepts_a_study():
    jsonschema.validate(small_study(), documentation.schema())


@pytest.mark.parametrize(
    "change",
    [
        {"sed": 1},
        {"steps": {"a": {"method": "rtn"}}},
        {"steps": {"a": {"method": "nothing"}}},
        {"models": {"a": {"path": "b", "hub": "c"}}},
        {"recipes": ["a"]},
    ],
)
def test_the_schema_refuses_what_is_no_study(change):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**small_study(), **change}, documentation.schema())


def test_every_method_has_its_row_and_every_option_a_description():
    page = documentation.methods_page()
    for name, method in methods().items():
        assert f"| [{name}](#{name}) | {method.family} |" in page
        for option, field in method.options.model_fields.items():
            assert field.description, f"{name}.{option} has no description"


def test_every_key_of_the_config_has_a_description():
    for _, _, types in documentation.PARTS:
        for section in types:
            for key, field in section.model_fields.items():
                assert field.description or key == "options", f"{section.__name__}.{key} has no description"
