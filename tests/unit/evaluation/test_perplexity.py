from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from coppice import uncertainty
from coppice.data.windows import tokenize
from coppice.errors import UserError
from coppice.evaluation import perplexity

from .conftest import WORLD


@pytest.fixture(scope="module")
def windows(checkpoint):
    return tokenize(checkpoint, WORLD, "evaluation", 5, 48)


def losses_by_hand(model, windows):
    """-ln p of each token but a window's first, one window at a time, without its padding."""
    found = {}
    for tokens, documents in zip(windows.tokens, windows.documents, strict=True):
        kept = torch.as_tensor(tokens[documents >= 0]).long()
        with torch.no_grad():
            log_probabilities = model(kept[None]).logits[0].double().log_softmax(-1)
        for place in range(1, len(kept)):
            found.setdefault(int(documents[place]), []).append(-log_probabilities[place - 1, kept[place]].item())
    return found


@pytest.mark.parametrize("pack", [True, False])
def test_each_token_but_a_windows_first_is_scored_and_padding_is_not(checkpoint, model, pack):
    windows = tokenize(checkpoint, WORLD, "evaluation", 5, 64, pack=pack)
    assert pack == bool((windows.documents >= 0).all())
    expected = losses_by_hand(model, windows)
    metrics, items = perplexity.measure(model, windows, "people")
    loss, measured = metrics
    scored = np.concatenate(list(expected.values()))
    assert loss["metric"] == "loss_people"
    assert measured["metric"] == "perplexity_people"
    assert loss["n"] == loss["protocol"]["tokens"] == len(scored)
    assert loss["value"] == pytest.approx(np.mean(scored), rel=1e-5)
    assert measured["value"] == pytest.approx(math.exp(np.mean(scored)), rel=1e-5)
    assert {int(item["item"]): item["length"] for item in items} == {k: len(v) for k, v in expected.items()}
    for item in items:
        assert item["log_likelihood"] == pytest.approx(-sum(expected[int(item["item"])]), rel=1e-5)


def test_standard_errors_are_those_of_documents(model, windows):
    (loss, measured), items = perplexity.measure(model, windows, "people")
    sums = -np.array([item["log_likelihood"] for item in items])
    _, stderr = uncertainty.ratio_of_sums(sums, np.array([item["length"] for item in items]))
    assert loss["stderr"] == pytest.approx(stderr)
    assert measured["stderr"] == pytest.approx(measured["value"] * stderr)
    assert measured["low"] < measured["value"] < measured["high"]
    assert loss["protocol"]["sampled"] == "documents"


def test_windows_are_sampled_where_there_is_one_document(model, windows):
    one = replace(
        windows,
        documents=np.zeros_like(windows.documents),
        manifest=windows.manifest.model_copy(update={"documents": 1}),
    )
    (loss, _), items = perplexity.measure(model, one, "people")
    assert loss["protocol"]["sampled"] == "windows"
    assert len(items) == 5
    assert loss["stderr"] > 0
    single = replace(
        one, tokens=one.tokens[:1], documents=one.documents[:1], manifest=one.manifest.model_copy(update={"windows": 1})
    )
    assert [metric["stderr"] for metric in perplexity.measure(model, single, "people")[0]] == [None, None]


def test_the_batch_does_not_change_the_loss(model, windows, monkeypatch):
    whole = perplexity.measure(model, windows, "people")[0][0]["value"]
    monkeypatch.setattr(perplexity, "LOGITS", 1)
    assert perplexity.measure(model, windows, "people")[0][0]["value"] == pytest.approx(whole, rel=1e-6)


def test_the_protocol_is_recorded(model, windows):
    protocol = perplexity.measure(model, windows, "people")[0][0]["protocol"]
    assert protocol == {
        "text": WORLD,
        "role": "evaluation",
        "length": 48,
        "stride": 48,
        "windows": 5,
        "bos": 2,
        "packed": True,
        "documents": windows.manifest.documents,
        "tokens": 5 * 47,
        "tokens_fingerprint": windows.manifest.fingerprint,
        "sampled": "documents",
    }


def test_windows_must_fit(checkpoint, model):
    with pytest.raises(UserError, match="'people' has windows of 65 tokens, but the model's context ends at 64"):
        perplexity.measure(model, tokenize(checkpoint, WORLD, "evaluation", 1, 65), "people")
    with pytest.raises(UserError, match="'people' scores no token"):
        perplexity.measure(model, tokenize(checkpoint, WORLD, "evaluation", 1, 1), "people")


def test_stories_have_the_reference_perplexity(stories, shared_data):
    source = {"path": str(shared_data / "text_tinystories_val" / "validation.jsonl"), "splits": {"evaluation": 1}}
    windows = tokenize(shared_data / "stories260K" / "hf", source, "evaluation", None, 512)
    loss, measured = perplexity.measure(stories[0], windows, "stories")[0]
    assert loss["n"] == 74_606
    assert loss["value"] == pytest.approx(1.4537, abs=1e-4)
    assert measured["value"] == pytest.approx(4.2788, rel=1e-4)
