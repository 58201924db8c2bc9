from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from tiny import ARCHITECTURES, logits, tiny_model, tiny_tokens

from coppice.errors import UserError
from coppice.methods.prune.shortgpt import Options, choose
from coppice.methods.registry import method
from coppice.models.contracts import Structure
from coppice.models.surgery import remove

# Read by tests/rows.py.
ROWS = [{"ratio": 0.5}]

FIVE = SimpleNamespace(structure=Structure(blocks=5, kv_groups=2, neurons=8))
THREE = SimpleNamespace(structure=Structure(3, 1, 1))
SIMILARITY = {"similarity": torch.tensor([0.2, 0.9, 0.5, 0.95, -0.4])}


def similarity(model, tokens):
    """[L] mean cosine of each block's input and output."""
    with torch.no_grad():
        states = [model.get_input_embeddings()(tokens)]
        hooks = [
            block.register_forward_hook(lambda _, inputs, output: states.append(output)) for block in model.model.layers
        ]
        model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    cosine = torch.nn.functional.cosine_similarity
    return {"similarity": torch.stack([cosine(h, after, dim=-1).mean() for h, after in pairwise(states)])}


@pytest.mark.parametrize(
    ("options", "removed"),
    [
        ({"blocks": 0}, ()),
        ({"blocks": 1}, (3,)),
        ({"blocks": 2}, (1, 3)),
        ({"blocks": 4}, (0, 1, 2, 3)),
        ({"ratio": 0.0}, ()),
        ({"ratio": 0.39}, (3,)),
        ({"ratio": 0.4}, (1, 3)),
        ({"ratio": 0.6}, (1, 2, 3)),
    ],
)
def test_the_least_influential_blocks_go(options, removed):
    removal = choose(FIVE, SIMILARITY, Options(**options))
    assert removal.blocks == removed and not removal.kv_groups and not removal.neurons
    assert removal.record["achieved"] == {"blocks": len(removed), "block_ratio": len(removed) / 5}


def test_the_influence_is_recorded():
    record = choose(FIVE, SIMILARITY, Options(blocks=1)).record
    assert record["block_influence"] == pytest.approx([0.8, 0.1, 0.5, 0.05, 1.4])
    assert record["removed_blocks"] == [3] and record["asked"] == {"blocks": 1, "block_ratio": None}


def test_one_shot_choices_are_nested():
    chosen = [set(choose(FIVE, SIMILARITY, Options(blocks=number)).blocks) for number in range(5)]
    assert all(smaller < larger for smaller, larger in pairwise(chosen))


@pytest.mark.parametrize("options", [{}, {"blocks": 1, "ratio": 0.2}, {"ratio": 1.0}, {"blocks": -1}, {"sparsity": 1}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValidationError):
        Options(**options)


def test_one_block_must_remain():
    with pytest.raises(UserError, match="delete 5 blocks of a model that has 5"):
        choose(FIVE, SIMILARITY, Options(blocks=5))


def test_a_similarity_that_is_not_finite_is_named():
    with pytest.raises(UserError, match="block 2"):
        choose(FIVE, {"similarity": torch.tensor([0.2, 0.9, torch.nan, 0.95, -0.4])}, Options(blocks=1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_identity_block_goes_first_and_is_not_missed(architecture):
    model, tokens = tiny_model(architecture, dtype=torch.float64), tiny_tokens()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    removal = choose(THREE, similarity(model, tokens), Options(blocks=1))
    influence = torch.tensor(removal.record["block_influence"])
    assert removal.blocks == (1,)
    assert influence[1].abs() < 1e-12 and (influence >= -1e-12).all() and (influence <= 2).all()
    expected = logits(model, tokens)
    torch.testing.assert_close(logits(remove(model, removal), tokens), expected, rtol=0, atol=1e-12)


def test_influence_does_not_see_the_scale_of_the_residual_stream():
    """Blocks see norms of the stream alone: scaling what enters it and what is added to it scales every h."""
    model, tokens = tiny_model(dtype=torch.float64, rms_norm_eps=0.0), tiny_tokens()
    expected = choose(THREE, similarity(model, tokens), Options(blocks=1)).record["block_influence"]
    with torch.no_grad():
        model.model.embed_tokens.weight *= 3
        for block in model.model.layers:
            block.self_attn.o_proj.weight *= 3
            block.mlp.down_proj.weight *= 3
    scaled = choose(THREE, similarity(model, tokens), Options(blocks=1)).record["block_influence"]
    assert scaled == pytest.approx(expected, rel=1e-10)


def test_it_is_registered():
    registered = method("shortgpt")
    assert (registered.family, registered.contract) == ("prune", "structure")
    assert (
        registered.needs() == {"blocks"} and registered.adds_traits == {"smaller"} and not registered.incompatible_with
    )
