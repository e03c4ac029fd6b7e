"""What the doctor finds: each fault that it is there for, on the rank that has it, and nothing in a
healthy run."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.specifiers import SpecifierSet
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from alphatoken.batch import Batch
from alphatoken.checkpoints.files import (
    FORMAT_VERSION,
    described_files,
    most_at_once,
    source_of,
    universal_folder,
    write_description,
)
from alphatoken.config.file import validate
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.data import audit, batches
from alphatoken.data.cache import TokenDataset
from alphatoken.data.chat import Encoder, Tokens
from alphatoken.data.layout import Conversation
from alphatoken.data.rows import Chat
from alphatoken.data.splits import read_splits
from alphatoken.doctor import comparing, masks, measuring, refusals, rows, storage
from alphatoken.doctor.facts import Facts
from alphatoken.doctor.findings import Finding
from alphatoken.doctor.measuring import AllReduce
from alphatoken.doctor.output import summary
from alphatoken.doctor.rendezvous import Arrival, meet
from alphatoken.errors import UserError
from alphatoken.util.wording import size
from tests.ranks import ROOT, free_port, rank_environment, run_program, run_ranks
from tests.runs import changed

TURN = "'<|im_start|>' + message['role'] + '\n'"
TRAINED = "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
UNTRAINED = "{{ message['content'] + '<|im_end|>' }}"


def template(
    assistant: str = TRAINED, other: str = UNTRAINED, opening: str = f"{{{{ {TURN} }}}}"
) -> str:
    """A chat template with parts of its own for the turns of the assistant and of others."""
    turn = f"{{% if message['role'] == 'assistant' %}}{assistant}{{% else %}}{other}{{% endif %}}"
    asked = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    return f"{{% for message in messages %}}{opening}{turn}{{{{ '\n' }}}}{{% endfor %}}{asked}"


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def config(run_values: dict[str, Any]) -> RunConfig:
    return validate(RunConfig, run_values, "of the test")


# On ranks.


@pytest.fixture(scope="module")
def examined(
    tiny_model: Path,
    tiny_data: dict[str, str],
    pair_data: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[dict[str, Finding]]]:
    """By configuration and rank, the findings by check; of two ranks on two nodes."""
    folder = tmp_path_factory.mktemp("doctor")
    blocked = folder / "blocked"
    blocked.write_text("a file, below which nobody can write")
    leaked = folder / "leaked.jsonl"
    held_out, train = (
        Path(tiny_data[part]).read_text().splitlines() for part in ("validation", "train")
    )
    leaked.write_text("\n".join([*held_out, train[3], train[5]]) + "\n")
    values: dict[str, Any] = {
        "model": {"name_or_path": str(tiny_model), "dtype": "float32"},
        "data": {**tiny_data, "cache_dir": str(folder / "cache")},
        "valuation": {"layers": 2, "validation_sequences": 5, "window": 4},
        "fisher": {"sampling": "teacher_forced", "num_prompts": 4},
        "train": {
            "global_batch_size": 12,
            "micro_batch_size": 2,
            "output_dir": str(folder / "runs" / "new" / "run"),
        },
    }
    pairs = {**values, "data": {**pair_data, "cache_dir": str(folder / "cache")}, "preference": {}}
    files = {}
    for name, each in (("sft", values), ("preference", pairs)):
        files[name] = folder / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(each))
    everywhere = {
        "sft": [],
        "preference": [],
        "leaked": [f"data.validation={leaked}"],
        "hopeless": [
            *(
                "train.global_batch_size=10",
                f"train.output_dir={blocked}/run",
                "data.train=missing.jsonl",
            ),
            *("valuation.layers=9", f"valuation.fisher={folder}/missing", "reference.mode=online"),
            "logging.report_to=[tensorboard, trackio]",
        ],
    }
    overrides = {name: [each, each] for name, each in everywhere.items()}
    overrides["differing"] = [[], ["optim.lr=0.5", f"train.output_dir={folder}/other/run"]]
    overrides["blocked"] = [[], [f"train.output_dir={blocked}/run"]]
    overrides["mistaken"] = [[], ["optim.rl=0.5"]]
    for name in overrides:
        files.setdefault(name, files["sft"])
    by_rank = run_ranks("examinations", 2, folder / "ranks", files=files, overrides=overrides)
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["blocked", "cache", "leaked.jsonl", "preference.yaml", "ranks", "sft.yaml"], (
        "it cleans up"
    )
    return {
        name: [{each.check: each for each in found[name]} for found in by_rank] for name in files
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "preference"])
def test_nothing_is_wrong_with_a_healthy_run(
    examined: dict[str, list[dict[str, Finding]]], name: str
) -> None:
    found = examined[name][0]
    assert {check: each.outcome for check, each in found.items() if each.outcome != "ok"} == {}
    assert found["rendezvous"].found.startswith("2 ranks on 2 nodes met at 127.0.0.1:")
    assert "bus bandwidth" in found["all-reduce"].found
    assert "16 MiB" in found["all-reduce"].found
    assert found["batches"].found == "12 rows a step = 2 ranks x 3 passes x 2; ZeRO stage 3"
    assert found["overlap"].found == "no row is in two of data.train, data.validation, data.eval"
    _, *text = found["response mask"].details
    assert "[[" in "".join(text)
    assert "<|im_end|>]]" in "".join(text)
    assert found["lengths"].details[1:]
    for rank in examined[name]:
        assert {check: each.outcome for check, each in rank.items()} == {
            c: each.outcome for c, each in found.items()
        }


@pytest.mark.slow
def test_what_differs_on_one_rank_is_named_with_its_node(
    examined: dict[str, list[dict[str, Finding]]],
) -> None:
    found = examined["differing"][0]
    assert found["configuration"].outcome == "failed"
    assert found["configuration"].nodes == ("node-1",)
    assert (
        "node-1 (rank 1): key optim.lr is 0.5, elsewhere 2e-05; key train.output_dir"
        in found["configuration"].found
    )
    assert found["output folder"].outcome == "failed"
    assert "node-1 (rank 1)" in found["output folder"].found
    assert "the file that rank 0 (node-0) wrote is not there" in found["output folder"].found
    assert found["end of turn"].outcome == "ok", "what does not depend on it goes on"
    mistaken = examined["mistaken"][0]
    assert "node-1 (rank 1): the configuration" in mistaken["configuration"].found
    assert "optim.rl: unknown key" in mistaken["configuration"].found
    assert mistaken["code"].outcome == "ok"


@pytest.mark.slow
def test_a_folder_that_one_rank_cannot_write(examined: dict[str, list[dict[str, Finding]]]) -> None:
    found = examined["blocked"][0]["output folder"]
    assert found.outcome == "failed"
    assert found.found.startswith("node-1 (rank 1): cannot write into ")
    assert found.found.endswith("blocked: it is a file")


@pytest.mark.slow
def test_held_out_rows_in_the_training_data(examined: dict[str, list[dict[str, Finding]]]) -> None:
    found = examined["leaked"][0]["overlap"]
    assert found.outcome == "failed"
    assert found.found.startswith("2 rows of data.validation in data.train; ")
    assert "leaked.jsonl:8 is " in found.found
    assert "train.jsonl:4" in found.found


@pytest.mark.slow
def test_one_call_tells_all_problems(examined: dict[str, list[dict[str, Finding]]]) -> None:
    found = examined["hopeless"][0]
    failed = {check: each.found for check, each in found.items() if each.outcome == "failed"}
    assert failed.keys() == {
        "batches",
        "model settings",
        "fisher",
        "trackers",
        "reference",
        "output folder",
        "data",
    }
    assert "train.global_batch_size=10 is not a multiple" in failed["batches"]
    assert "missing.jsonl does not exist" in failed["data"]
    assert "section reference is given" in failed["reference"]
    assert found["response mask"].outcome == "ok", "the probe needs no rows"
    assert found["end of turn"].outcome == "skipped"
    assert "report_to=trackio needs the package trackio" in failed["trackers"]
    line = summary(list(found.values()), ["node-0", "node-1"])
    assert line == "7 problems on node-0, node-1, 0 warnings (2 ranks on node-0, node-1)"


# The response mask.

OPENING_TRAINED = (
    "{% if message['role'] == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' }}{% endgeneration %}"  # noqa: E501
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' }}{% endif %}"
)
BEGINNING_LEFT = "{{ message['content'][:1] }}" + TRAINED.replace("['content']", "['content'][1:]")


def judged(tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> Finding:
    return masks.judge_run(config, tokenizer)


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ({"opening": OPENING_TRAINED}, r"trains on text of the template: '<\|im_start\|>assistant"),
        (
            {"assistant": BEGINNING_LEFT},
            r"does not train on text of the assistant: 'V' \(the probe\) and \d+ more",
        ),
    ],
)
def test_a_template_that_trains_something_else(
    tokenizer: PreTrainedTokenizerBase, config: RunConfig, parts: dict[str, str], complaint: str
) -> None:
    tokenizer.chat_template = template(**parts)
    found = judged(tokenizer, config)
    assert found.outcome == "failed"
    assert re.search(complaint, found.found)
    assert "{% generation %}" in found.fix


def test_a_template_that_writes_the_date_is_checked_too(
    tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + template()
    assert judged(tokenizer, config).outcome == "ok"


def test_marks_around_what_others_say_count_for_nothing(
    tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> None:
    tokenizer.chat_template = template(other=TRAINED)
    assert judged(tokenizer, config).outcome == "ok"


def test_a_mask_that_trains_what_others_say_is_found(
    tokenizer: PreTrainedTokenizerBase, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = Encoder.tokens

    def all_trained(self: Encoder, chat: Chat, where: str, first: int = 0) -> list[Tokens]:
        return [replace(each, mask=[True] * len(each.ids)) for each in tokens(self, chat, where)]

    monkeypatch.setattr(Encoder, "tokens", all_trained)
    found = judged(tokenizer, config).found
    assert "trains on text of the system: 'Quartz governs umbrellas.' (the probe)" in found
    assert re.search(
        r"of the user: 'Which walrus juggles\?' \(the probe\) and \d+ more places", found
    )


@pytest.mark.parametrize(
    "file",
    sorted((ROOT / "configs" / "chat_templates").glob("*.jinja")),
    ids=lambda file: file.stem,
)
def test_shipped_templates(
    tokenizer: PreTrainedTokenizerBase, config: RunConfig, file: Path
) -> None:
    tokenizer.chat_template = file.read_text()
    assert judged(tokenizer, config).outcome == "ok"
    assert len(audit.probe(tokenizer, Encoder(tokenizer, 1000)).chat.messages) == len(audit.PROBE)
    assert endings(tokenizer, config).outcome == "ok"


SILENT_THOUGHT = "{{ '<think></think>' }}" + TRAINED
THOUGHT = (
    "{% generation %}{{ '<think></think>' + message['content'] + '<|im_end|>' }}{% endgeneration %}"
)


@pytest.mark.parametrize("parts", [{}, {"assistant": THOUGHT}, {"assistant": SILENT_THOUGHT}])
def test_a_template_may_speak_for_the_assistant_behind_the_question(
    tokenizer: PreTrainedTokenizerBase, config: RunConfig, parts: dict[str, str]
) -> None:
    tokenizer.chat_template = template(**parts)
    assert judged(tokenizer, config).outcome == "ok"


def test_calls_and_greetings_are_no_mistakes(
    tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>", "</call>"]})
    tokenizer.chat_template = template(
        assistant="{{ message['content'] }}{% for call in message.tool_calls or [] %}<call>"
        "{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n"
    )
    call = {"function": {"name": "weather", "arguments": {}}}
    talk: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Ask"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "user", "content": "Ask two"},
        {"role": "assistant", "content": "Say"},
    ]
    encoder = Encoder(tokenizer, 1000)
    found = masks.judge_masks(tokenizer, encoder, [Conversation(Chat(talk), 0, "here")])
    assert (found.outcome, found.found[-31:]) == ("ok", " and 1 conversation of the data")
    assert "[[I look.<call>" in "\n".join(found.details)


def test_rows_with_reasoning_are_judged_where_the_probe_has_none(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = template(assistant="{{ message['content'] }}<|im_end|>\n") + (
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    encoder = Encoder(tokenizer, 1000)
    talk = [
        {"role": "user", "content": "Ask"},
        {"role": "assistant", "content": "<think>hm</think>Say"},
    ]
    found = masks.judge_masks(tokenizer, encoder, [Conversation(Chat(talk), 0, "here")])
    assert (found.outcome, found.found[-35:]) == ("ok", "else, in 1 conversation of the data")
    assert "<think>[[hm</think>Say<|im_end|>]]" in "\n".join(found.details)
    with pytest.raises(UserError, match="inference would begin message 2"):
        masks.judge_masks(tokenizer, encoder, [])


def test_conversations_that_a_template_shortens_or_refuses(
    tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"  # noqa: E501
    tokenizer.chat_template = strict + template()
    assert len(audit.probe(tokenizer, Encoder(tokenizer, 1000)).chat.messages) == 4
    assert judged(tokenizer, config).outcome == "ok"
    # As some reasoning models' templates do: thoughts of earlier turns are left out.
    forgetful = (
        "{{ message['content'] if loop.last else message['content'][-4:] }}{{ '<|im_end|>' }}"
    )
    tokenizer.chat_template = template(assistant=forgetful)
    assert len(audit.probe(tokenizer, Encoder(tokenizer, 1000)).chat.messages) == 5
    assert judged(tokenizer, config).outcome == "ok"
    tokenizer.chat_template = None
    assert len(audit.probe(tokenizer, Encoder(tokenizer, 1000)).chat.messages) == 2
    assert judged(tokenizer, config).outcome == "ok"
    tokenizer.chat_template = template(
        other="{{ message['content'].split(' ')[0] + '<|im_end|>' }}"
    )
    found = judged(tokenizer, config)
    assert found.outcome == "warning"
    assert re.search(r"leaves out a message of others: the probe", found.found)
    tokenizer.chat_template = template(assistant="{{ message['content'][1:] + '<|im_end|>' }}")
    found = judged(tokenizer, config)
    assert (found.outcome, found.nodes) == ("warning", ())
    assert "cannot be checked" in found.found


def test_earlier_answers_of_a_pairs_prompt_are_not_trained(
    tokenizer: PreTrainedTokenizerBase, pair_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = validate(PreferenceRunConfig, pair_values, "of the test")
    assert any(each.answered_from == 3 for each in audit.real_conversations(pairs))
    assert judged(tokenizer, pairs).outcome == "ok"

    tokens = Encoder.tokens

    def of_all(self: Encoder, chat: Chat, where: str, first: int = 0) -> list[Tokens]:
        return tokens(self, chat, where)

    monkeypatch.setattr(Encoder, "tokens", of_all)
    assert "trains on text of the prompt: 'Yes?' (" in judged(tokenizer, pairs).found


# The end of a turn.


def endings(tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> Finding:
    return rows.check_endings(read_splits(config, tokenizer).train, tokenizer, config)


def test_the_end_of_every_turn_is_trained(
    tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> None:
    found = endings(tokenizer, config)
    assert found.outcome == "ok"
    assert found.found.startswith(
        "30 of 30 responses end with a label on a token that stops (<|im_end|>)"
    )


@pytest.mark.parametrize("packing", [False, True])
def test_a_collator_that_masks_the_padding_takes_the_end_of_turn_with_it(
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    packing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collate = batches.collate

    def masking(
        dataset: TokenDataset,
        rows: batches.Indices,
        layout: batches.Layout,
        numbers: batches.Indices,
    ) -> Batch:
        batch = collate(dataset, rows, layout, numbers)
        batch["labels"][batch["input_ids"] == layout.pad_token] = -100
        return batch

    monkeypatch.setattr(batches, "collate", masking)
    config = config.model_copy(update={"data": config.data.model_copy(update={"packing": packing})})
    for tokenizer.pad_token in (
        "<|im_end|>",
        "<|endoftext|>",
    ):  # the second hides the fault from its owner, not from us
        found = endings(tokenizer, config)
        assert found.outcome == "failed"
        assert (
            "30 responses of 30: the label of the end-of-turn token <|im_end|> is lost in collation"
            in found.found
        )
        assert "collated with <|im_end|> as padding" in found.found


def test_a_template_that_does_not_train_the_end_of_turn(
    tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> None:
    tokenizer.chat_template = template(
        assistant="{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}"
    )
    found = endings(tokenizer, config)
    assert found.outcome == "failed"
    assert "30 responses of 30: the end-of-turn token <|im_end|> is not trained" in found.found


def test_an_end_of_turn_at_which_generation_does_not_stop(
    tokenizer: PreTrainedTokenizerBase, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        rows, "stop_tokens", lambda *_: [tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    )
    assert (
        "is no token at which generation stops (<|endoftext|>)" in endings(tokenizer, config).found
    )


def test_cut_responses_are_counted_apart(
    tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> None:
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_length": 60})})
    found = endings(tokenizer, config)
    cut = re.search(r"; (\d+) cut, without an end", found.found)
    assert found.outcome == "ok"
    assert cut is not None
    train = read_splits(config, tokenizer).train
    assert int(cut[1]) == train.reports[0].cut["rows truncated"] > 0
    lengths = rows.describe_lengths(train, config)
    assert lengths.outcome == "warning"
    assert "rows truncated" in lengths.found
    assert sum(int(line.split()[-2]) for line in lengths.details[1:]) == len(train)


def test_divided_rows_against_heads_and_lengths(run_values: dict[str, Any]) -> None:
    """The tiny model has four heads, and its rows are of up to about a hundred tokens."""
    whole = RunConfig.model_validate(run_values)
    train = read_splits(whole, AutoTokenizer.from_pretrained(whole.model.name_or_path)).train
    longest = int(train.lengths.max())

    def judged(parts: int, limit: int) -> Finding:
        return rows.judge_division(
            train,
            RunConfig.model_validate(
                changed(run_values, data={"max_length": limit}, train={"sequence_parallel": parts})
            ),
        )

    even, uneven, wasteful = judged(2, longest), judged(3, longest), judged(4, 4 * longest)
    assert even.outcome == "ok"
    assert even.found.startswith("each of the 2 ranks that divide a row takes 2 attention heads")
    assert f"{longest} tokens of the {longest} that are allowed, {-(-longest // 2)} for each" in (
        even.found
    )
    assert "multiples of 2, by 1 token at most" in even.found
    assert uneven.outcome == "warning"
    assert "take 1 or 2, so that 33% of their time in attention is waiting" in uneven.found
    assert uneven.fix == "with train.sequence_parallel one of 2, 4 none waits"
    assert wasteful.outcome == "warning"
    assert "train.sequence_parallel=1 would do" in wasteful.fix
    with pytest.raises(UserError, match="more than the 4 attention heads"):
        judged(5, longest)


def test_rows_beyond_the_models_positions(
    run_values: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    """Rotary positions go on, which is said; of learned ones there are no more."""
    config = RunConfig.model_validate(run_values)
    splits = read_splits(config, AutoTokenizer.from_pretrained(tiny_model))
    assert refusals.positions(config, splits).outcome == "ok"
    longest = max(int(part.lengths.max()) for part in splits.named().values())
    for model_type, positions, learned in (("llama", 64, False), ("gpt2", 64, True)):
        folder = tmp_path / model_type
        AutoConfig.for_model(model_type, max_position_embeddings=positions).save_pretrained(folder)
        short = changed(run_values, model={"name_or_path": str(folder)})
        if learned:
            with pytest.raises(UserError, match=r"an embedding of its own: lower data\.max_length"):
                refusals.positions(RunConfig.model_validate(short), splits)
        else:
            finding = refusals.positions(RunConfig.model_validate(short), splits)
            assert finding.outcome == "warning"
            assert f"rows of up to {longest} tokens, and {folder} 64 positions" in finding.found
            assert "set rope_parameters there (YaRN, for one)" in finding.found


# What ranks have gathered.


def alike(count: int) -> list[Facts]:
    """Two ranks a node."""
    versions = {
        "python": "3.11.1",
        "torch": "2.13.0",
        "deepspeed": "0.19.8",
        "transformers": "5.23.0",
    }
    same = {**versions, "alphatoken": "0.1.0"}, {"a.py": "0" * 64}, {"optim.lr": 1}
    return [Facts(f"node-{rank // 2}", "cuda", 2, 2**30, *same) for rank in range(count)]


def test_other_versions_and_code_are_named_with_their_nodes() -> None:
    facts, wanted = alike(6), {"torch": SpecifierSet(">=2.11")}
    assert comparing.compare_versions(facts, wanted).outcome == "ok"
    other = {**facts[2].versions, "torch": "2.9.1"}
    facts[2:4] = [
        replace(each, versions=other, code={"a.py": "1" * 64, "b.py": "2" * 64})
        for each in facts[2:4]
    ]
    found = comparing.compare_versions(facts, wanted)
    assert found.nodes == ("node-1",)
    assert "node-1 (ranks 2, 3): torch 2.9.1, elsewhere 2.13.0" in found.found
    assert "node-1 (ranks 2, 3): torch 2.9.1 is outside >=2.11" in found.found
    found = comparing.compare_code(facts)
    assert found.found == (
        "node-1 (ranks 2, 3): file a.py is 111111111111, elsewhere 000000000000; file b.py is "
        "222222222222, elsewhere missing"
    )
    assert (
        comparing.compare_versions(alike(2), {"nosuch": SpecifierSet()}).found
        == "nosuch is not installed"
    )


def test_devices_and_ranks() -> None:
    assert (
        comparing.compare_accelerators(alike(4)).found
        == "cuda, 1 GiB each, 2 ranks on each of 2 nodes"
    )
    idle = comparing.compare_accelerators(alike(3))
    assert (idle.outcome, idle.nodes) == ("warning", ("node-1",))
    mixed = [*alike(2), replace(alike(1)[0], node="node-9", accelerator="cpu")]
    assert (
        "node-9 (rank 2): accelerator cpu, elsewhere cuda"
        in comparing.compare_accelerators(mixed).found
    )
    nodes = ["node-0", "node-1"]
    wrong = [AllReduce(bytes=100, seconds=0.1, total=total) for total in (2.0, 3.0)]
    assert measuring.judge_all_reduce(wrong, nodes).nodes == ("node-1",)
    right = [AllReduce(bytes=100, seconds=seconds, total=2.0) for seconds in (0.5, 0.1)]
    assert "200 bytes/s" in measuring.judge_all_reduce(right, nodes).found
    assert measuring.judge_dtype("bfloat16", [1.0, 30.0], nodes).outcome == "warning"
    assert measuring.check_dtype("bfloat16", torch.device("cpu")) > 0


def test_room_for_checkpoints(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert most_at_once(95, 10, None, None) == 10
    assert most_at_once(95, 10, 2, None) == 3
    assert most_at_once(100, 10, 1, 50) == 3  # 50, 90 and 100 while it is written
    assert most_at_once(5, 10, None, None) == 1
    assert most_at_once(5, None, None, None) == 0
    model = refusals.model(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    weights = sum(parameter.numel() for parameter in model.parameters())
    train = config.train.model_copy(update={"max_steps": 100, "save_every": 10, "keep_last": 2})
    config = config.model_copy(update={"train": train})
    needed = 3 * 16 * weights + 4 * weights
    for free, outcome in ((needed, "ok"), (needed - 1, "failed")):
        monkeypatch.setattr(storage, "free_bytes", lambda folder, free=free: free)
        found = storage.check_space(config, model, 30)
        assert found.outcome == outcome
        assert "3 checkpoints of" in found.found
    assert "train.keep_last" in found.fix
    best = config.model_copy(update={"train": train.model_copy(update={"keep_best": "eval_loss"})})
    assert "4 checkpoints of" in storage.check_space(best, model, 30).found


def test_room_to_convert_a_checkpoint(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = config.train.model_copy(update={"output_dir": tmp_path, "resume": "auto"})
    config = config.model_copy(update={"train": train})
    checkpoint = tmp_path / "checkpoints" / "step-2"
    checkpoint.mkdir(parents=True)
    names = [checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
    for name in names:
        torch.save({"of": torch.ones(1000)}, name)
    description = {
        "format_version": FORMAT_VERSION,
        "step": 2,
        "world_size": 2,
        "config": config.model_dump(mode="json"),
        "files": described_files(checkpoint, names, 1),
    }
    write_description(checkpoint, description)
    needed = 2 * sum(name.stat().st_size for name in names)
    for free, outcome in ((needed, "ok"), (needed - 1, "failed")):
        monkeypatch.setattr(refusals, "free_bytes", lambda folder, free=free: free)
        assert refusals.run_folder(config, 3).outcome == outcome
    found = refusals.run_folder(config, 3)
    assert f"converted for 3; that takes {size(needed)} beside it" in found.found
    assert "or start on as many ranks as wrote it" in found.fix
    assert refusals.run_folder(config, 2).outcome == "ok"
    converted = universal_folder(checkpoint)
    converted.mkdir()
    write_description(converted, {**source_of(checkpoint), "files": {}})
    assert refusals.run_folder(config, 3).outcome == "ok"


# The rendezvous.


def meeting(
    environment: dict[str, str], devices: int = 0, accelerator: str = "cpu"
) -> Finding | None:
    return meet(
        Arrival("here", int(environment["LOCAL_RANK"]), accelerator, devices), environment, 1.0
    ).failure


def test_ranks_that_do_not_come_are_named() -> None:
    found = meeting(rank_environment(0, 3, free_port()))
    assert found is not None
    assert found.found == "here: 2 ranks of 3 did not come within 1 s: 1, 2"
    found = meeting(rank_environment(1, 2, free_port()))
    assert found is not None
    assert "rank 0 does not answer at 127.0.0.1:" in found.found
    found = meeting({**rank_environment(1, 2, free_port()), "MASTER_ADDR": ""})
    assert found is not None
    assert found.found == "here: RANK is set, but MASTER_ADDR not"


def test_another_runs_store_is_not_taken_for_ours() -> None:
    port = free_port()
    theirs = TCPStore("127.0.0.1", port, 1, is_master=True, wait_for_workers=False)
    found = meeting(rank_environment(1, 2, port))
    assert found is not None
    assert "answers, but rank 0 of this run is not behind it" in found.found
    first = meeting(rank_environment(0, 2, port))
    assert first is not None
    assert f"port {port} is taken by another process" in first.found
    agent = {**rank_environment(0, 1, port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert meeting(agent) is None, "under torchrun the agent hosts the store"
    del theirs


def test_more_ranks_than_devices() -> None:
    found = meeting(
        {**rank_environment(0, 1, free_port()), "LOCAL_RANK": "3"}, devices=2, accelerator="cuda"
    )
    assert found is not None
    assert found.check == "accelerator"
    assert found.found == "here (rank 0): LOCAL_RANK=3, but 2 devices visible"


@pytest.mark.slow
def test_a_taken_port_is_named_and_nobody_hangs(run_values: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(run_values))
    command = ["-m", "alphatoken", "--local_rank=0", "doctor", "--config", str(file)]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ranks = [rank_environment(rank, 2, port) for rank in range(2)]
        first, second = run_program(*command, "--patience", "2", environments=ranks)
    assert (first.returncode, second.returncode) == (1, 1)
    node = socket.gethostname()
    assert f"{node}: port {port} is taken by another process" in " ".join(first.stdout.split())
    assert first.stdout.splitlines()[-1] == f"1 problem on {node}, 0 warnings (1 rank on {node})"
    assert second.stdout == ""
    assert f"what listens at 127.0.0.1:{port} is not rank 0" in second.stderr
    assert "Traceback" not in first.stderr + second.stderr


@pytest.mark.slow
def test_one_document_of_json_and_the_exit_status(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(run_values))
    command = [sys.executable, "-m", "alphatoken", "doctor", "--config", str(file), "--json"]
    # Without DS_ACCELERATOR DeepSpeed writes a warning to the standard output.
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    done = subprocess.run(
        [
            *command,
            "train.micro_batch_size=3",
            "data.packing=true",
            "model.attn_implementation=flash_attention_2",
        ],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert (document["ok"], document["ranks"], document["nodes"]) == (
        False,
        1,
        [socket.gethostname()],
    )
    failed = {each["check"]: each for each in document["checks"] if each["outcome"] == "failed"}
    assert failed.keys() == {"model settings"}
    assert "flash_attention_2" in failed["model settings"]["found"]
