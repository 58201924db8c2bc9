"""The step of a shell line written by hand: each mistake is a sentence."""

from __future__ import annotations

from typing import Any

import pytest

from coppice.cli import main
from coppice.errors import UserError
from coppice.methods.registry import method


def refusal(step: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main(["compress", "--node", "a/x", "--parent", "none", "--output", "none", "--step", step])
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        ("half", "is not JSON"),
        ("[]", "does not map names to values"),
        ('{"options": {"target_modules": ["q_proj"]}}', "lacks 'name'"),
        ('{"name": "x", "method": "magnitude"}', "lacks 'options'"),
        ('{"name": "x", "method": 3, "options": {}}', "has a wrong value of 'method'"),
        ('{"name": "x", "method": "magnitude", "options": []}', "has a wrong value of 'options'"),
    ],
)
def test_what_is_not_a_step_is_refused(step: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert problem in refusal(step, capsys)


@pytest.mark.parametrize("stage", ["compress", "recover"])
def test_a_malformed_step_of_each_stage_is_no_fault(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([stage, "--step", "[]"])
    assert "does not map names to values" in capsys.readouterr().err


@pytest.mark.parametrize("given", [{"linears": ["q_proj"]}, {"linears": ["q_proj"], "target_modules": ["q_proj"]}])
def test_an_old_option_is_refused_with_its_new_name(given: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"^The options of method 'magnitude' are not valid: The option `linears` is now"
    ):
        method("magnitude").validate_options({"sparsity": 0.5, **given})


def test_an_old_method_is_refused_with_its_new_name() -> None:
    with pytest.raises(UserError, match=r"^The method `round-inputs` is now `activation-quant`; rename it.$"):
        method("round-inputs")
