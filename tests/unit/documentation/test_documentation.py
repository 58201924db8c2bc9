"""What is generated is in step with the code, and the schema says what `load_study` says."""

from __future__ import annotations

import dataclasses

import jsonschema
import pytest
import yaml
from pydantic import Field
from studies import small_study

from coppice.documentation import config_page, config_schema, laws_page, methods_page, packaged, readme_page
from coppice.documentation.generated import ROOT, outdated_files, write_files
from coppice.laws import registry as laws
from coppice.laws.options import LawOptions
from coppice.methods.registry import methods


def test_the_files_in_the_repository_are_up_to_date():
    assert outdated_files() == [], "run `python -m coppice.documentation`"


def test_a_file_that_was_changed_by_hand_is_out_of_date(tmp_path):
    write_files(tmp_path)
    assert outdated_files(tmp_path) == []
    (tmp_path / "config" / "README.md").write_text("by hand")
    assert [path.name for path in outdated_files(tmp_path)] == ["README.md"]


def test_what_is_written_by_hand_around_the_laws_stays(tmp_path):
    (tmp_path / "docs").mkdir()
    page = f"# By hand\n\n{laws_page.BEGIN}\nold\n{laws_page.END}\n\nThe end.\n"
    (tmp_path / laws_page.PATH).write_text(page)
    rendered = laws_page.render(tmp_path)
    assert rendered.startswith(f"# By hand\n\n{laws_page.BEGIN}\n\n| law |")
    assert rendered.endswith(f"\n\n{laws_page.END}\n\nThe end.\n")
    assert "old" not in rendered.splitlines()


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(config_schema.schema())


def test_the_schema_accepts_a_study(schema):
    schema.check_schema(schema.schema)
    schema.validate(small_study())


def test_the_schema_accepts_laws_with_their_options(schema):
    study = yaml.safe_load((ROOT / "config/examples/knowledge.yaml").read_text(encoding="utf-8"))
    assert len(study["laws"]) > 1
    schema.validate(study)


@pytest.mark.parametrize(
    "change",
    [
        {"sed": 1},
        {"steps": {"a": {"method": "rtn"}}},
        {"steps": {"a": {"method": "nothing"}}},
        {"models": {"a": {"path": "b", "hub": "c"}}},
        {"recipes": ["a"]},
        {"laws": {"a": {"law": "p3"}}},
        {"laws": {"a": {"law": "p2", "gian": 0.01}}},
        {"laws": {"a": {"law": "p2", "options": {"gain": 0.01}}}},
        {"laws": {"a": {"law": "p2", "gain": 0}}},
    ],
)
def test_the_schema_refuses_what_is_not_a_study(schema, change):
    with pytest.raises(jsonschema.ValidationError):
        schema.validate({**small_study(), **change})


def test_every_method_has_its_row_and_every_option_a_description():
    page = methods_page.render(ROOT)
    for name, method in methods().items():
        assert f"| [{name}](#{name}) | {method.family} |" in page
        for option, field in method.options.model_fields.items():
            assert field.description, f"{name}.{option} has no description"


def test_every_law_has_its_section_and_every_option_a_description():
    page = laws_page.render(ROOT)
    for name in laws.names():
        law = laws.load(name)
        assert f"| [{name}](#{name}) | `{law.source['equation']}` |" in page
        assert f"(arXiv {law.source['arxiv']})" in page
        section = page.partition(f"\n### {name}\n")[2].partition("\n### ")[0]
        for column in law.columns:
            assert f"| `{column}` |" in section
        for parameter in law.form.parameters if law.form else ():
            assert f"| `{parameter}` |" in section
        for part in (*law.rivals, *law.held_out):
            assert f"`{part}`" in section
        for option, field in law.options.model_fields.items():
            assert field.description, f"{name}.{option} has no description"
            assert option in laws_page.unchanged_options(law.options) or f"\n| `{option}` |" in section


def test_options_that_a_law_changes_are_listed_and_the_others_are_not():
    class Options(LawOptions):
        tolerance: float = Field(default=0.2, description=LawOptions.model_fields["tolerance"].description)

    assert laws_page.unchanged_options(Options) == set(LawOptions.model_fields) - {"tolerance"}


def test_every_key_of_the_config_has_a_description():
    for _, _, types in config_page.PARTS:
        for section in types:
            for key, field in section.model_fields.items():
                assert field.description or key == "options", f"{section.__name__}.{key} has no description"


def test_methods_and_laws_of_other_packages_are_not_in_the_repository(monkeypatch, tmp_path):
    stranger = dataclasses.replace(methods()["rtn"], name="stranger", file=tmp_path / "stranger.py")
    monkeypatch.setattr(packaged, "methods", lambda: methods() | {"stranger": stranger})
    names = [method.name for method in packaged.packaged_methods()]
    assert sorted(names) == sorted(methods())
    assert "stranger" not in readme_page.render(ROOT)
