"""A plug-in with a missing or mistyped part of its contract is refused by name when it is registered."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from coppice.errors import UserError
from coppice.methods import incompatible, registry
from coppice.methods.catalogue import catalogue
from coppice.methods.declaration import LayerMethod, Resources, RotationMethod, Source
from coppice.methods.options import LayerOptions, MethodOptions

HEAD = """
from coppice.models.replacements import Masked
from coppice.methods.declaration import Source
from coppice.methods.declaration import CacheMethod, LayerMethod, Resources, StructureMethod, TrainingMethod
from coppice.methods.options import LayerOptions, MethodOptions, RecoverOptions

FAMILY = "prune"
SOURCE = Source("A title", "arXiv 0000.00000", "1")


def compress(linear, statistics, options):
    return Masked(linear.weight, linear.weight != 0)


"""
GOOD = "METHOD = LayerMethod(source=SOURCE, options=LayerOptions, compress=compress)\n"


@pytest.fixture(autouse=True)
def _fresh_registry() -> Iterator[None]:
    registry.methods.cache_clear()
    yield
    registry.methods.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a module as the plug-in `toy-method`, or as several of that name."""
    monkeypatch.syspath_prepend(tmp_path)

    def as_plug_in(text: str, name: str = "toy-method", value: str = "toy_plug_in") -> None:
        (tmp_path / "toy_plug_in.py").write_text(HEAD + text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, "toy_plug_in", raising=False)
        entry_point = EntryPoint(name=name, value=value, group="coppice.methods")
        monkeypatch.setattr(registry, "entry_points", lambda group: [entry_point])

    return as_plug_in


def refusal() -> str:
    with pytest.raises(UserError) as raised:
        registry.methods()
    return str(raised.value)


def test_a_plug_in_is_a_method_like_any_other(install: Callable[..., None], tmp_path: Path) -> None:
    install(GOOD)
    method = registry.method("toy-method")
    assert (method.family, method.contract, method.file) == ("prune", "layer", tmp_path / "toy_plug_in.py")
    assert method.layer.compress.__name__ == "compress"


def layer(fields: str) -> str:
    return f"METHOD = LayerMethod(source=SOURCE, {fields})\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "METHOD is missing; declare the method as METHOD = LayerMethod(...)"),
        ("METHOD = compress\n", "METHOD is <function compress"),
        ("METHOD = LayerMethod\n", "METHOD is <class"),
        (layer("options=LayerOptions"), "missing 1 required keyword-only argument: 'compress'"),
        (layer("options=LayerOptions, compress=compress, needs={'moments'}, extra=1"), "argument 'extra'"),
        (layer("options=LayerOptions, compress=None"), "`compress` is None, not a function"),
        (layer("options=LayerOptions, compress='compress'"), "`compress` is 'compress', not a function"),
        (
            layer("options=LayerOptions, compress=lambda linear, options: None"),
            "`compress` does not take the 3 arguments that it is called with",
        ),
        (
            layer("options=LayerOptions, compress=compress, scales=lambda: None"),
            "`scales` does not take the 3 arguments",
        ),
        (layer("options=LayerOptions, compress=compress, traits=compress"), "`traits` does not take the 2 arguments"),
        (layer("options=MethodOptions, compress=compress"), "not a class that extends LayerOptions"),
        (layer("options=dict, compress=compress"), "`options` is <class 'dict'>, not a class that extends"),
        (layer("options=LayerOptions(), compress=compress"), "not a class that extends LayerOptions"),
        (
            "METHOD = LayerMethod(source='arXiv', options=LayerOptions, compress=compress)\n",
            "`source` is 'arXiv', not a Source",
        ),
        (
            layer("options=LayerOptions, compress=compress, needs=['moments']"),
            "`needs` is ['moments'], not a frozenset",
        ),
        (
            layer("options=LayerOptions, compress=compress, needs=frozenset({'moment'})"),
            "`needs` names 'moment', which is not known. Did you mean 'moments'?",
        ),
        (
            layer("options=LayerOptions, compress=compress, adds_traits=frozenset({'mask'})"),
            "`adds_traits` names 'mask', which is not known. Did you mean 'masked'?",
        ),
        (
            layer("options=LayerOptions, compress=compress, incompatible_with={'quantised': 'it is'}"),
            "`incompatible_with` names 'quantised', which is not known. Did you mean 'quantized'?",
        ),
        (layer("options=LayerOptions, compress=compress, incompatible_with={'quantized'}"), "not a mapping of traits"),
        (
            layer("options=LayerOptions, compress=compress, incompatible_with={'quantized': 'because it is'}"),
            "must be half a sentence, to be read after 'because' and without that word",
        ),
        (layer("options=LayerOptions, compress=compress, draws='yes'"), "`draws` is 'yes', not True or False"),
        (layer("options=LayerOptions, compress=compress, resources='model'"), "`resources` is 'model', not Resources"),
        (
            layer("options=LayerOptions, compress=compress, resources=Resources(reach='models')"),
            "`resources.reach` names 'models', which is not known. Did you mean 'model'?",
        ),
        (
            layer("options=LayerOptions, compress=compress, plan=lambda decoder, options: {}"),
            'it has a `plan`, so declare resources=Resources(reach="model")',
        ),
        (
            "METHOD = StructureMethod(source=SOURCE, options=MethodOptions, choose=compress, "
            "needs=frozenset({'windows'}))\n",
            'it needs `windows`, so declare resources=Resources(reach="model")',
        ),
        ("FAMILY = 'pruning'\n" + GOOD, "FAMILY is 'pruning'; it must be one of prune, decompose"),
        ("del FAMILY\n" + GOOD, "FAMILY is None; it must be one of"),
        (
            "FAMILY = 'recover'\n" + GOOD,
            "METHOD is a LayerMethod, and a method of the family 'recover' is a TrainingMethod",
        ),
        (
            "METHOD = TrainingMethod(source=SOURCE, options=RecoverOptions, prepare=lambda model, options: model, "
            "finish=lambda model, options: model)\n",
            "METHOD is a TrainingMethod, and a method of the family 'prune' is a LayerMethod or a StructureMethod",
        ),
        ("raise RuntimeError('no such GPU.')\n", "cannot be registered: no such GPU. Fix that package"),
        ("import no_such_module\n", "No module named 'no_such_module'"),
        ("assert False\n", "cannot be registered: AssertionError. Fix that package, or uninstall it."),
    ],
)
def test_a_broken_plug_in_is_refused_by_name(install: Callable[..., None], text: str, sentence: str) -> None:
    install(text)
    message = refusal()
    assert message.startswith("Method 'toy-method' (")
    assert "toy_plug_in" in message
    assert sentence in message
    assert message.endswith(".")


def test_an_entry_point_to_nothing_is_refused_by_name(install: Callable[..., None]) -> None:
    install(GOOD, value="toy_plug_in:METHODS")
    assert re.match(r"Method 'toy-method' \(toy_plug_in:METHODS\) cannot be registered: .*'METHODS'", refusal())


def test_two_methods_of_one_name(install: Callable[..., None]) -> None:
    install(GOOD, name="wanda")
    assert re.match(r"Two methods are named 'wanda': .*prune/wanda\.py and .*toy_plug_in\.py\.$", refusal())


def test_names_that_a_module_imports_are_no_part_of_its_contract(install: Callable[..., None]) -> None:
    install(
        "from functools import cache\n\nFAMILY = 'recover'\nMETHOD = TrainingMethod(source=SOURCE, "
        "options=RecoverOptions, prepare=lambda model, options: model, finish=lambda model, options: model)\n"
    )
    assert registry.method("toy-method").contract == "training"


def declare(**fields: Any) -> LayerMethod:
    def compress(linear: Any, statistics: Any, options: Any) -> Any:
        return None

    return LayerMethod(source=Source("", "", ""), options=LayerOptions, compress=compress, **fields)


def test_a_plan_declares_that_it_reaches_the_model() -> None:
    with pytest.raises(TypeError, match="it has a `plan`"):
        declare(plan=lambda decoder, options: {}, resources=Resources(reach="block"))
    assert declare(plan=lambda decoder, options: {}, resources=Resources(reach="model")).plan is not None


def test_a_rotation_declares_whether_heads_are_rotated() -> None:
    with pytest.raises(TypeError, match="`options` has no field `heads`"):
        RotationMethod(source=Source("", "", ""), options=MethodOptions, rotation=lambda width, options: None)


def test_what_reaches_the_model_is_declared_by_every_method_that_does() -> None:
    reach = {name: method.resources.reach for name, method in registry.methods().items()}
    assert {reach[name] for name in ("wanda", "gptq", "svd", "eora")} == {"linear"}
    assert {reach[name] for name in ("shortgpt", "llm-pruner")} == {"block"}
    assert {reach[name] for name in ("asvd", "qpruner", "full", "lora")} == {"model"}


def test_an_incompatibility_is_a_sentence_about_the_first_trait() -> None:
    method = registry.method("wanda")
    assert method.incompatibility(frozenset({"masked", "smaller"})) is None
    assert method.incompatibility(frozenset({"quantized", "compensated"})) == (
        "compensated",
        incompatible.PRUNE["compensated"],
    )


def test_no_reason_is_written_twice() -> None:
    """Two methods with the same reason share it, so that it is one object."""
    seen: dict[str, str] = {}
    for method in registry.methods().values():
        for reason in method.incompatible_with.values():
            assert seen.setdefault(reason, reason) is reason, reason


def test_programs_read_reach_and_draws() -> None:
    entries = catalogue()
    assert entries["asvd"]["resources"]["reach"] == "model"
    assert entries["wanda"]["resources"]["reach"] == "linear"
    assert entries["dobi-svd"]["draws"] and not entries["wanda"]["draws"]
