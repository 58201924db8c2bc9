from __future__ import annotations

import argparse
import json
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from manifests import provenance, token_set
from recoveries import curve, half_masked, interruption, kill_after_a_state, losses
from safetensors.torch import load_file
from tiny import VOCABULARY, tiny_model
from tokenizers import Tokenizer, models
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from coppice.data.windows import Windows, load_windows, save_windows
from coppice.errors import UserError
from coppice.files import sha256, write_json
from coppice.methods.recover import full, lora
from coppice.models import surgery
from coppice.models.architectures.base import blocks
from coppice.models.checkpoint import load_model, read_manifest, save_checkpoint
from coppice.models.contracts import Removal
from coppice.models.modules import LowRankCorrectionLinear
from coppice.recovery import distributed, objective, stage
from coppice.recovery.journal import Journal
from coppice.recovery.schedule import batch_schedule, learning_rate
from coppice.recovery.trainer import RecoveryTrainer

LENGTH = 16
OPTIONS = {"text": "a", "validation": "b", "length": LENGTH, "tokens": 640, "batch_size": 4, "learning_rate": 1e-2}


@pytest.fixture(autouse=True)
def one_thread():
    """Child processes are forked; threads of the parent would not follow."""
    torch.set_num_threads(1)


def windows(count: int, role: str, tokenizer: str, seed: int, padding: int = 0) -> Windows:
    """Counting up by one or two from a random token, so that there is something to learn; `padding` ends each."""
    random = np.random.default_rng(seed)
    start, stride = random.integers(3, VOCABULARY, (count, 1)), random.integers(1, 3, (count, 1))
    tokens = (3 + (start + stride * np.arange(LENGTH)) % (VOCABULARY - 3)).astype(np.int32)
    documents = np.repeat(np.arange(count, dtype=np.int32)[:, None], LENGTH, axis=1)
    if padding:
        documents[:, -padding:] = -1
    manifest = token_set(
        fingerprint=f"{role}-{seed}-{count}-{padding}",
        tokenizer=tokenizer,
        windows=count,
        length=LENGTH,
        role=role,
        text={"builtin": role},
    )
    return Windows(tokens, documents, np.arange(count) + 1000 * (1 + seed), manifest)


def save_node(folder: Path, node: str, model, marks=(), dtype=torch.float32, dense=None) -> Path:
    """A checkpoint with a tokenizer of its own."""
    source = folder.parent / f"{folder.name}-source"
    source.mkdir(parents=True)
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="w0")).save(str(source / "tokenizer.json"))
    write_json(source / "tokenizer_config.json", {"bos_token": "w1"})
    made = provenance(node=node, traits=sorted(marks))
    save_checkpoint(model, folder, source, made, dtype, read_manifest(dense).dense if dense else None)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A dense root, a masked child of it, and windows for both."""
    folder = tmp_path_factory.mktemp("place")
    save_node(folder / "dense", "dense", tiny_model(num_hidden_layers=2))
    masked = half_masked(tiny_model(num_hidden_layers=2))
    save_node(folder / "masked", "dense/half", masked, ["masked"], dense=folder / "dense")
    tokenizer = sha256(folder / "dense" / "tokenizer.json")
    save_windows(windows(24, "recovery", tokenizer, 0), folder / "tokens")
    save_windows(windows(8, "validation", tokenizer, 1), folder / "validation")
    return folder


def recover(place: Path, output: Path, parent="masked", method="full", budgets=(), seed=0, every=1e9, **options):
    step = {"name": "grow", "method": method, "options": OPTIONS | options}
    return stage.recover(
        stage.Recovery(
            node=f"dense/{parent}/grow",
            parent=place / parent,
            dense=place / "dense",
            tokens=place / "tokens",
            validation=place / "validation",
            step=step,
            budgets=budgets,
            seed=seed,
            state=output.parent / f"{output.name}-state",
            state_every=every,
            output=output,
        )
    )


@pytest.fixture(scope="module")
def recovered(place, tmp_path_factory) -> Path:
    """An undisturbed run."""
    output = tmp_path_factory.mktemp("recovered") / "node"
    recover(place, output, budgets=(100, 128, 400, 10_000))
    return output


def test_recovery_lowers_the_held_out_loss(recovered):
    rows = [row for row in curve(recovered) if row["validation_loss"] is not None]
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"] - 0.1


def test_curve_has_held_out_losses_at_zero_at_the_budgets_and_at_the_end(recovered):
    rows = curve(recovered)
    measured = [(row["tokens"], row["budget"]) for row in rows if row["validation_loss"] is not None]
    # Steps end at multiples of 64 tokens: 100 and 128 are both met at 128, 400 at 448; 10,000 lies beyond the run.
    assert measured == [(0, False), (128, True), (448, True), (640, False)]
    assert [row["tokens"] for row in rows] == list(range(0, 641, 64))
    assert rows[0]["train_loss"] is None
    assert all(row["train_loss"] > 0 for row in rows[1:])
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 * step for step in range(11)])
    assert all(row["seconds"] < later["seconds"] for row, later in pairwise(rows))


def test_dense_loss_is_the_root_s_on_the_same_windows(place, recovered):
    tokens = torch.from_numpy(load_windows(place / "validation").tokens).long()
    with torch.no_grad():
        expected = load_model(place / "dense")(input_ids=tokens, labels=tokens).loss.item()
    assert [row["dense_loss"] for row in curve(recovered)] == pytest.approx([expected] * 11, rel=1e-5)


def test_last_loss_is_that_of_the_saved_model(place, recovered):
    loss = objective.held_out_loss(load_model(recovered), load_windows(place / "validation"), 3, "float32")
    assert curve(recovered)[-1]["validation_loss"] == pytest.approx(loss, rel=1e-5)


def test_manifest(place, recovered):
    manifest = read_manifest(recovered)
    assert manifest.parent == "dense/half"
    assert manifest.traits == ["masked"]
    assert manifest.step.family == "recover"
    assert manifest.dense == read_manifest(place / "dense").dense
    recovery = manifest.recovery
    assert (recovery.tokens, recovery.tokens_requested, recovery.steps) == (640, 640, 10)
    assert recovery.budgets == [100, 128, 400, 10_000]
    assert recovery.epochs == pytest.approx(40 / 24)
    assert manifest.files["curve.parquet"].sha256 == sha256(recovered / "curve.parquet")
    assert json.loads((recovered / "config.json").read_text())["use_cache"] is True


def test_masks_are_kept_bit_for_bit_and_the_parent_is_left_alone(place, recovered, tmp_path):
    before = sha256(place / "masked" / "model.safetensors")
    recover(place, tmp_path / "node", weight_decay=0.1)
    assert sha256(place / "masked" / "model.safetensors") == before
    for folder in (recovered, tmp_path / "node"):
        linear = blocks(load_model(folder))[0].mlp.down_proj
        assert linear.masked
        assert not linear.weight[:, ::2].view(torch.int32).any()
        assert linear.weight[:, 1::2].all()


def test_same_seed_gives_the_same_run_and_another_seed_another(place, recovered, tmp_path):
    for seed in (0, 1):
        recover(place, tmp_path / str(seed), budgets=(100, 128, 400, 10_000), seed=seed)
    assert losses(tmp_path / "0") == losses(recovered)
    assert read_manifest(tmp_path / "0").fingerprint == read_manifest(recovered).fingerprint
    assert losses(tmp_path / "1")[-1] != losses(recovered)[-1]


@pytest.fixture(scope="module")
def ragged(place, tmp_path_factory) -> Path:
    """The same place, its training windows with unequal numbers of targets."""
    folder = tmp_path_factory.mktemp("ragged")
    for name in ("dense", "masked", "validation"):
        (folder / name).symlink_to(place / name)
    changed = load_windows(place / "tokens")
    changed.documents[::3, 5:] = -1
    save_windows(changed, folder / "tokens")
    return folder


@pytest.fixture(scope="module")
def written_out(ragged):
    """The training loop by hand: the model after it, and the tokens and mean loss of each step."""
    model, options = load_model(ragged / "masked"), full.Options(**OPTIONS | {"tokens": 300})
    full.prepare(model, options)
    data = load_windows(ragged / "tokens")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    order = batch_schedule((data.documents >= 0).sum(1), 4, 300, 0).order
    steps = []
    for step, indices in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step, len(order))
        tokens, present = torch.from_numpy(data.tokens[indices]).long(), torch.from_numpy(data.documents[indices] >= 0)
        loss = model(input_ids=tokens, labels=tokens.where(present, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((int(present.sum()), loss.item()))
    return model, steps


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 1, "gradient_checkpointing": True}])
def test_training_is_adamw_on_the_mean_loss_of_each_step(ragged, written_out, tmp_path, options):
    model, steps = written_out
    recover(ragged, tmp_path / "node", tokens=300, **options)
    rows = curve(tmp_path / "node")[1:]
    assert [row["tokens"] for row in rows] == np.cumsum([tokens for tokens, _ in steps]).tolist()
    assert [row["train_loss"] for row in rows] == pytest.approx([loss for _, loss in steps], rel=1e-4)
    ours = load_model(tmp_path / "node").state_dict()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_killed_run_goes_on_and_ends_as_if_undisturbed(place, recovered, tmp_path, method, capfd):
    options = {"rank": 2, "dropout": 0.2} if method == "lora" else {}
    reference = recovered
    if method == "lora":
        reference = tmp_path / "reference"
        recover(place, reference, method="lora", budgets=(100, 128, 400, 10_000), **options)
    arguments = {"method": method, "budgets": (100, 128, 400, 10_000), "every": 0.0, **options}

    state = tmp_path / "node-state" / "state.safetensors"
    kill_after_a_state(lambda: recover(place, tmp_path / "node", **arguments), state)
    assert not (tmp_path / "node" / "manifest.json").exists()

    capfd.readouterr()
    recover(place, tmp_path / "node", **arguments)
    assert "Resuming after step" in capfd.readouterr().out
    assert losses(tmp_path / "node") == losses(reference)
    assert read_manifest(tmp_path / "node").fingerprint == read_manifest(reference).fingerprint
    assert not state.parent.exists()


def interrupted(place: Path, output: Path, **options) -> Path:
    """The state of a run that stopped after its fourth step."""
    with interruption(after=4):
        recover(place, output, every=0.0, **options)
    return output.parent / f"{output.name}-state" / "state.safetensors"


LADDER = {"budgets": tuple(range(64, 641, 64)), "warmup": 0}


@pytest.fixture
def lawful(monkeypatch):
    """Held-out losses 2 + 3 / sqrt(x) after x tokens, so that at x the rest gains 3 / sqrt(x) - 3 / sqrt(640)."""

    def measure(journal, model):
        journal.add_row(2 + 3 / np.sqrt(max(journal.run.tokens(journal.progress.step), 1)))

    monkeypatch.setattr(Journal, "measure", measure)


@pytest.fixture(scope="module")
def eight_steps(place, tmp_path_factory) -> str:
    """Fingerprint of the weights after eight steps, 512 tokens."""
    output = tmp_path_factory.mktemp("eight") / "node"
    return recover(place, output, tokens=512, warmup=0).fingerprint


@pytest.mark.parametrize(
    ("gain", "steps"),
    # 0.0231 nats are left after seven steps, 0.0140 after eight; the asymptotes of levels 3 to 5 are the first to tell.
    [(0.02, 8), (10.0, 5), (1e-9, 10)],
)
def test_a_run_whose_rest_pays_too_little_ends_early(place, lawful, eight_steps, tmp_path, gain, steps):
    manifest = recover(place, tmp_path / "node", stop_gain=gain, **LADDER)
    recovery = manifest.recovery
    assert (recovery.stopped_early, recovery.steps, recovery.tokens) == (steps < 10, steps, 64 * steps)
    assert recovery.tokens_requested == 640
    assert recovery.epochs == pytest.approx(4 * steps / 24)
    assert manifest.achieved == {"tokens": 64 * steps}
    assert [row["tokens"] for row in curve(tmp_path / "node")] == [64 * step for step in range(steps + 1)]
    assert (manifest.fingerprint == eight_steps) == (steps == 8)


def test_an_interrupted_run_ends_early_where_an_undisturbed_one_does(place, lawful, eight_steps, tmp_path, monkeypatch):
    arguments = {"stop_gain": 0.02, **LADDER}
    interrupted(place, tmp_path / "node", **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(
            "coppice.models.checkpoint.save_checkpoint", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            recover(place, tmp_path / "node", **arguments)
    # The state after the stop says that nothing is left to train.
    monkeypatch.setattr(RecoveryTrainer, "train", None)
    manifest = recover(place, tmp_path / "node", **arguments)
    assert manifest.recovery.stopped_early
    assert manifest.fingerprint == eight_steps


def test_state_of_another_run_is_refused_and_the_difference_named(place, tmp_path):
    state = interrupted(place, tmp_path / "node")
    with pytest.raises(UserError, match=r"options.learning_rate \(was 0.01, is 0.02\).*remove .*state.safetensors"):
        recover(place, tmp_path / "node", learning_rate=2e-2)
    with pytest.raises(UserError, match=r"in budgets \(was \[\], is \[64\]\), seed \(was 0, is 1\);"):
        recover(place, tmp_path / "node", seed=1, budgets=(64,))
    assert state.exists()
    state.unlink()
    recover(place, tmp_path / "node", learning_rate=2e-2)


def test_a_run_resumes_on_another_number_of_gpus(place, tmp_path, capfd):
    interrupted(place, tmp_path / "node", tokens=320)
    manifest = recover(place, tmp_path / "node", tokens=320, gpus=2)
    assert "Resuming after step" in capfd.readouterr().out
    assert manifest.requested["gpus"] == 2


@pytest.mark.parametrize(
    ("codes", "sentence"),
    [
        # The first failed with a sentence and the second was told to end; the second was killed and the first lost it.
        ((1, -signal.SIGTERM), "The state is broken."),
        ((1, -signal.SIGKILL), "Process 2 of 2 was killed by SIGKILL, as happens when memory runs out; run the same"),
    ],
)
def test_of_several_processes_the_one_that_ended_the_others_is_named(tmp_path, codes, sentence):
    failures = {}
    for rank, code in enumerate(codes):
        file = tmp_path / f"{rank}.json"
        if code > 0:
            file.write_text(json.dumps({"message": "The state is broken.", "timestamp": 5}))
        failures[rank] = ProcessFailure(local_rank=rank, pid=0, exitcode=code, error_file=str(file))
    assert distributed._failure_message(ChildFailedError("recover", failures), 2).startswith(sentence)


def test_broken_state_is_named(place, tmp_path):
    state = tmp_path / "node-state" / "state.safetensors"
    state.parent.mkdir()
    state.write_bytes(b"no")
    with pytest.raises(UserError, match=r"state.safetensors is broken .*; remove it"):
        recover(place, tmp_path / "node")


def test_run_killed_after_training_saves_without_training_again(place, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            "coppice.models.checkpoint.save_checkpoint", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            recover(place, tmp_path / "node", budgets=(100, 128, 400, 10_000))
    monkeypatch.setattr(RecoveryTrainer, "train", None)
    assert recover(place, tmp_path / "node", budgets=(100, 128, 400, 10_000)).recovery.steps == 10


def test_divergence_names_step_and_tokens_and_leaves_nothing(place, tmp_path, monkeypatch):
    summed = objective.summed_loss
    calls = iter(range(100))
    # The first two calls are the held-out loss before training: eight windows by fours.
    monkeypatch.setattr(
        objective, "summed_loss", lambda *given: summed(*given) * (float("nan") if next(calls) == 4 else 1)
    )
    with pytest.raises(UserError, match=r"the loss is nan at step 3 \(192 tokens\).*lower learning_rate \(0.01\)"):
        recover(place, tmp_path / "node", every=0.0)
    assert not (tmp_path / "node").exists() or not any((tmp_path / "node").iterdir())
    assert not (tmp_path / "node-state").exists()


def test_lora_over_a_masked_parent_leaves_its_weights_alone(place, tmp_path):
    manifest = recover(place, tmp_path / "node", method="lora", rank=2)
    assert manifest.traits == ["compensated", "masked"]
    model, parent = load_model(tmp_path / "node"), load_model(place / "masked")
    composite = blocks(model)[0].mlp.down_proj
    assert isinstance(composite, LowRankCorrectionLinear)
    assert torch.equal(composite.base.weight, blocks(parent)[0].mlp.down_proj.weight)
    assert composite.compensation.second.weight.any()
    assert not torch.equal(blocks(model)[0].mlp.up_proj.weight, blocks(parent)[0].mlp.up_proj.weight)
    loss = objective.held_out_loss(model, load_windows(place / "validation"), 8, "float32")
    assert curve(tmp_path / "node")[-1]["validation_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("method", ["full", "lora", "scratch"])
def test_blocks_of_different_widths_are_trained(place, tmp_path, method):
    narrower = surgery.remove(
        tiny_model(num_hidden_layers=2), Removal(kv_groups=((1,), ()), neurons=((0, 5, 6, 46, 47), ()))
    )
    parent = save_node(tmp_path / "parent", "dense/narrower", narrower, ["smaller"], dense=place / "dense")
    manifest = recover(
        place, tmp_path / "node", parent=parent, method=method, **{"rank": 2} if method == "lora" else {}
    )
    rows = [row for row in curve(tmp_path / "node") if row["validation_loss"] is not None]
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"] - 0.1
    model = load_model(tmp_path / "node")
    assert blocks(model)[0].mlp.up_proj.out_features == 43 and blocks(model)[1].mlp.up_proj.out_features == 48
    assert manifest.parameters == read_manifest(parent).parameters


def test_scratch_forgets_the_weights_and_trains_for_as_much_computation(place, tmp_path):
    manifest = recover(place, tmp_path / "masked", method="scratch", equal="flops", tokens=300)
    parent = read_manifest(place / "masked")
    asked = -(-300 * parent.dense_parameters // parent.parameters.nonzero)
    assert asked > 300
    recovery = manifest.recovery
    # Steps are of 64 tokens.
    assert (recovery.tokens_requested, recovery.tokens) == (asked, -(-asked // 64) * 64)
    assert recovery.tokens == recovery.tokens_total == manifest.achieved["tokens"] == 64 * recovery.steps
    assert curve(tmp_path / "masked")[-1]["tokens"] == recovery.tokens
    assert manifest.parameters == parent.parameters
    # Of the dense root itself, the loss before training is that of the new weights, and the dense loss is the root's.
    dense = recover(place, tmp_path / "dense", parent="dense", method="scratch", equal="flops", tokens=300)
    assert dense.recovery.tokens_requested == 300
    rows = [curve(tmp_path / name)[0] for name in ("dense", "masked")]
    assert rows[0]["dense_loss"] == pytest.approx(rows[1]["dense_loss"])
    assert rows[0]["validation_loss"] == pytest.approx(np.log(VOCABULARY), rel=0.02)
    assert abs(rows[0]["dense_loss"] - rows[0]["validation_loss"]) > 0.1


def test_weights_are_trained_in_float32_and_stored_in_the_parents_dtype(place, tmp_path):
    """Updates far below bfloat16's resolution add up."""
    for name in ("tokens", "validation"):
        (tmp_path / name).symlink_to(place / name)
    save_node(tmp_path / "dense", "dense", tiny_model(num_hidden_layers=2), dtype=torch.bfloat16)
    recover(tmp_path, tmp_path / "node", parent="dense", tokens=2000, learning_rate=1e-4, warmup=0)
    assert {tensor.dtype for tensor in load_file(tmp_path / "node" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "node" / "config.json").read_text())["dtype"] == "bfloat16"
    model, parent = (load_model(tmp_path / name) for name in ("node", "dense"))
    weight, before = (blocks(each)[0].mlp.up_proj.weight for each in (model, parent))
    # Neighbours of these weights are 2^-10 or further away, updates at most 1e-4.
    large = before.abs() > 0.125
    assert ((weight - before)[large] != 0).float().mean() > 0.5
    rows = curve(tmp_path / "node")
    assert rows[0]["validation_loss"] == rows[0]["dense_loss"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokenizer": "other"}, "with another tokenizer than that of"),
        ({"length": 15}, "training windows have 15 tokens, but the step's length is 16"),
        ({"hashes": 1}, "8 documents lie in both texts"),
    ],
)
def test_windows_that_do_not_fit_are_refused(place, tmp_path, change, sentence):
    for name in ("dense", "masked", "validation"):
        (tmp_path / name).symlink_to(place / name)
    changed = windows(24, "recovery", sha256(place / "dense" / "tokenizer.json"), change.get("hashes", 0))
    if "length" in change:
        changed = replace(changed, tokens=changed.tokens[:, :15], documents=changed.documents[:, :15])
    fields = {key: value for key, value in change.items() if key != "hashes"}
    changed = replace(changed, manifest=changed.manifest.model_copy(update=fields))
    save_windows(changed, tmp_path / "tokens")
    with pytest.raises(UserError, match=sentence):
        recover(tmp_path, tmp_path / "node")


def test_length_beyond_the_model_is_refused(place, tmp_path):
    for name in ("tokens", "validation"):
        (tmp_path / name).symlink_to(place / name)
    save_node(tmp_path / "dense", "dense", tiny_model(num_hidden_layers=2, max_position_embeddings=8))
    with pytest.raises(UserError, match=r"length is 16, but the model of .* reads 8 at most"):
        recover(tmp_path, tmp_path / "node", parent="dense")


def test_method_that_refuses_the_parent(place, tmp_path):
    for name in ("dense", "tokens", "validation"):
        (tmp_path / name).symlink_to(place / name)
    model = tiny_model(num_hidden_layers=2)
    save_node(tmp_path / "packed", "dense/packed", model, ["quantized"], dense=place / "dense")
    with pytest.raises(UserError, match="because packed integers cannot be trained; use lora"):
        recover(tmp_path, tmp_path / "node", parent="packed")


def test_command_line(place, tmp_path):
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    stage.add_arguments(parser)
    step = {"name": "grow", "method": "full", "options": OPTIONS | {"tokens": 64}}
    words = ["--node", "dense/grow", "--step", json.dumps(step), "--budgets", "64,32", "--seed", "3"]
    words += ["--output", str(tmp_path / "node"), "--state", str(tmp_path / "state"), "--parent", str(place / "dense")]
    for name in ("dense", "tokens", "validation"):
        words += [f"--{name}", str(place / name)]
    stage.run(parser.parse_args(words))
    assert [row["budget"] for row in curve(tmp_path / "node")] == [False, True]
    assert read_manifest(tmp_path / "node").seed == 3


class TestBatchSchedule:
    sizes = np.array([10, 10, 10, 4, 10])

    def test_ends_with_the_step_that_reads_the_last_token(self):
        path = batch_schedule(np.full(8, 10), 2, 61, 0)
        assert path.tokens.tolist() == [20, 40, 60, 80]
        assert batch_schedule(np.full(8, 10), 2, 60, 0).steps == 3

    def test_epochs_are_permutations_that_steps_reach_over(self):
        visited = batch_schedule(self.sizes, 3, 130, 0).order.flatten()
        assert len(visited) == 15
        for epoch in visited.reshape(3, 5):
            assert sorted(epoch) == [0, 1, 2, 3, 4]

    def test_counts_tokens_without_padding(self):
        path = batch_schedule(self.sizes, 5, 88, 0)
        assert path.tokens.tolist() == [44, 88]

    def test_short_schedule_begins_a_long_one(self):
        long, short = (batch_schedule(self.sizes, 2, tokens, 7) for tokens in (400, 90))
        assert np.array_equal(long.order[: short.steps], short.order)
        assert not np.array_equal(batch_schedule(self.sizes, 2, 90, 8).order, short.order)

    def test_a_step_of_more_windows_than_there_are(self):
        assert batch_schedule(self.sizes, 12, 1, 0).order.shape == (1, 12)


class TestLearningRate:
    def rates(self, **options):
        chosen = full.Options(**OPTIONS | options)
        return [learning_rate(chosen, step, 8) for step in range(8)]

    def test_constant_after_warm_up(self):
        assert self.rates(warmup=4) == pytest.approx([0.0025, 0.005, 0.0075, *[0.01] * 5])

    def test_warm_up_as_a_share(self):
        assert self.rates(warmup=0.25) == pytest.approx([0.005, *[0.01] * 7])

    def test_no_warm_up(self):
        assert self.rates(warmup=0) == [0.01] * 8

    def test_cosine_falls_to_zero(self):
        rates = self.rates(warmup=0, schedule="cosine")
        assert rates[0] == 0.01
        assert rates[4] == pytest.approx(0.005)
        assert 0 < rates[7] < 0.0005

    @pytest.mark.parametrize("schedule", ["constant", "cosine"])
    def test_warm_up_longer_than_the_run(self, schedule):
        assert self.rates(warmup=100, schedule=schedule)[-1] == 0.01
        # The scheduler asks for one more rate than there are steps.
        learning_rate(full.Options(**OPTIONS | {"warmup": 100, "schedule": schedule}), 8, 8)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"micro_batch_size": 3}, "batch_size 4 is not a multiple of micro_batch_size 3"),
        ({"gpus": 3}, "batch_size 4 is not a multiple of gpus 3; make it one"),
        ({"gpus": 2, "micro_batch_size": 4}, "batch_size 4 is not a multiple of gpus 2 times micro_batch_size 4"),
        ({"betas": (0.9, 1.0)}, "both must be at least 0 and less than 1"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"tokens": 0}, "tokens"),
        ({"schedule": "linear"}, "schedule"),
        ({"dropout": 1}, "dropout"),
        ({"stop_gain": 0.0}, "stop_gain"),
        ({"stop_gain": 0.01, "schedule": "cosine"}, "stop_gain is set with the schedule 'cosine'"),
    ],
)
def test_options_are_validated(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        lora.Options(**OPTIONS | options)
