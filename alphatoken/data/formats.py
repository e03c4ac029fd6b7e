"""The forms that rows have as others publish them, each turned into one of ours.

Ours are `messages` (with `tools`), `prompt` and `response`, and `prompt`, `chosen` and `rejected`
(`rows`). A format is recognised by its columns: it is the first of `FORMATS` that a row has all
columns of. A source may name it (`format:`). To read another one, add an entry to `FORMATS`, and
its name to that of `config.sections`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from alphatoken.data.rows import Message
from alphatoken.errors import UserError

Fields = dict[str, Any]
Convert = Callable[[Fields, str], Fields]
"""From a row and its name in errors, ours. Raises UserError for a row that is not of the format."""

OURS = frozenset({"messages", "tools", "prompt", "response", "chosen", "rejected"})
"""What is read of a row of no known format: one with a prompt alone, say."""
SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}


@dataclass(frozen=True)
class Format:
    """How rows of a form become ours."""

    needs: tuple[str, ...]
    """Columns that tell the format."""
    convert: Convert
    also: tuple[str, ...] = ()
    """Columns that are read where they are there."""
    lacks: tuple[str, ...] = ()
    """Columns that a row of the format does not have."""

    def fits(self, fields: Mapping[str, Any]) -> bool:
        """Whether a row has the columns of the format."""
        return all(fields.get(name) is not None for name in self.needs) and not any(
            fields.get(name) is not None for name in self.lacks
        )


def format_of(fields: Mapping[str, Any]) -> str | None:
    """The name of a row's format; None where no format fits."""
    return next((name for name, each in FORMATS.items() if each.fits(fields)), None)


def converted(fields: Fields, name: str, where: str) -> tuple[Fields, frozenset[str]]:
    """A row in one of our forms, and the columns that were not read; `name` is a format, or auto: a
    row of no known format stays as it is.

    Raises UserError, naming `where`, for a row that is not of the format.
    """
    known = format_of(fields) if name == "auto" else name
    if known is None:
        return fields, frozenset(fields) - OURS
    chosen = FORMATS[known]
    missing = [column for column in chosen.needs if fields.get(column) is None]
    if missing:
        raise UserError(
            f"{where}: format={known} needs a column {missing[0]!r}; this row has "
            f"{', '.join(sorted(fields))}"
        )
    unread = frozenset(fields) - {*chosen.needs, *chosen.also}
    return chosen.convert(fields, where), unread


def turns_of(transcript: str, where: str) -> list[Message]:
    """The turns of a text in which `Human:` and `Assistant:` speak. Raises UserError for another
    text."""
    before, *parts = SPEAKER.split(transcript)
    if before.strip() or not parts:
        raise UserError(
            f"{where}: a transcript must begin with 'Human:' or 'Assistant:', but this one begins "
            f"{transcript[:40]!r}"
        )
    return [
        {"role": SPEAKERS[speaker], "content": text.strip()}
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def _kept(*names: str) -> Convert:
    """A row of one of our forms."""
    return lambda fields, where: {name: fields[name] for name in names if name in fields}


def _asked(question: str, answer: str, system: str | None = None) -> Convert:
    """A question and an answer in columns of other names."""

    def convert(fields: Fields, where: str) -> Fields:
        turns = [*_one("user", fields[question]), *_one("assistant", fields[answer])]
        return {"messages": [*_system(fields, system), *turns]}

    return convert


def _one(role: str, text: Any) -> list[Message]:
    return [{"role": role, "content": text}]


def _system(fields: Fields, name: str | None) -> list[Message]:
    text = fields.get(name) if name else None
    return _one("system", text) if text else []


def _told(fields: Fields, ours: Fields, where: str) -> Fields:
    """One of our rows with the system's text before it that stands in a column of its own."""
    system = _system(fields, "system") or _system(fields, "system_prompt")
    if not system:
        return ours
    prompt = ours.get("prompt")
    start = _one("user", prompt) if isinstance(prompt, str) else prompt
    told = dict(ours)
    for name in ("messages", "prompt", "chosen", "rejected"):
        turns = start if name == "prompt" else ours.get(name)
        if not isinstance(turns, list) or not turns:
            continue
        # An answer that does not repeat the prompt stays as it is.
        if name not in {"messages", "prompt"} and start and turns[0] != start[0]:
            continue
        if isinstance(turns[0], dict) and turns[0].get("role") == "system":
            if turns[0].get("content") != system[0]["content"]:
                raise UserError(
                    f"{where}: the column of the system's text and the first message of {name!r} "
                    "say different things: leave one out"
                )
            continue
        told[name] = [*system, *turns]
    return told


def _prompt_response(fields: Fields, where: str) -> Fields:
    names = ("prompt", "response", "tools")
    return _told(fields, {name: fields[name] for name in names if name in fields}, where)


def _question_pair(fields: Fields, where: str) -> Fields:
    """A question with two answers."""
    answers = {name: fields[name] for name in ("chosen", "rejected")}
    return _told(fields, _pair({"prompt": fields["question"], **answers}, where), where)


def _alpaca(fields: Fields, where: str) -> Fields:
    """Instruction and input are one question; earlier questions and answers are in `history`."""
    given, history = fields.get("input"), fields.get("history") or []
    for name in ("instruction", "input"):
        if not isinstance(fields.get(name) or "", str):
            raise UserError(f"{where}: {name!r} must be text, but is {str(fields[name])[:80]}")
    question = f"{fields['instruction']}\n\n{given}" if given else fields["instruction"]
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in history
    ):
        raise UserError(
            f"{where}: 'history' must be a list of [question, answer], but is {str(history)[:80]}"
        )
    exchanges = [*history, (question, fields["output"])]
    turns = [
        turn
        for asked, said in exchanges
        for turn in (*_one("user", asked), *_one("assistant", said))
    ]
    return {"messages": [*_system(fields, "system"), *turns]}


def _sharegpt(fields: Fields, where: str) -> Fields:
    return {
        "messages": [*_system(fields, "system"), *_sharegpt_turns(fields["conversations"], where)],
        "tools": fields.get("tools"),
    }


def _sharegpt_turns(turns: Any, where: str) -> list[Message]:
    if not isinstance(turns, list):
        raise UserError(f"{where}: 'conversations' must be a list, but is {str(turns)[:80]}")
    if turns and all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return turns
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        speaker = str(turn.get("from")) if isinstance(turn, dict) else None
        if speaker not in SHAREGPT_ROLES or "value" not in turn:
            raise UserError(
                f"{where}: turn {number} of 'conversations' needs 'value' and 'from', one of "
                f"{', '.join(SHAREGPT_ROLES)}, but is {str(turn)[:80]}"
            )
        said: Message = {"content": turn["value"]}
        if speaker == "function_call":
            calls = _json(turn["value"], f"{where}: turn {number}")
            several = calls if isinstance(calls, list) else [calls]
            said = {"content": None, "tool_calls": [{"function": call} for call in several]}
        of_turn = {name: turn[name] for name in ("weight", "train") if name in turn}
        messages.append({"role": SHAREGPT_ROLES[speaker], **said, **of_turn})
    return messages


def _sharegpt_pair(fields: Fields, where: str) -> Fields:
    chosen, rejected = (_sharegpt_turns([fields[name]], where) for name in ("chosen", "rejected"))
    prompt = _sharegpt(fields, where)
    return {
        "prompt": prompt["messages"],
        "chosen": chosen,
        "rejected": rejected,
        "tools": prompt["tools"],
    }


def _completion(fields: Fields, where: str) -> Fields:
    """Prompt and completion, as text or as messages."""
    prompt, completion = fields["prompt"], fields["completion"]
    for name in ("prompt", "completion"):
        if not isinstance(fields[name], str | list):
            raise UserError(
                f"{where}: {name!r} must be text or a list of messages, but is "
                f"{str(fields[name])[:80]}"
            )
    if isinstance(prompt, str) and isinstance(completion, str):
        asked = {"prompt": prompt, "response": completion, "tools": fields.get("tools")}
        return _told(fields, asked, where)
    turns = [
        *(_one("user", prompt) if isinstance(prompt, str) else prompt),
        *(_one("assistant", completion) if isinstance(completion, str) else completion),
    ]
    return _told(fields, {"messages": turns, "tools": fields.get("tools")}, where)


def _pair(fields: Fields, where: str) -> Fields:
    """A prompt with two answers, each a text, a message or a list of them; or two transcripts. What
    a row has as `messages` besides is for supervised runs."""
    branches: Fields = {
        name: [fields[name]] if isinstance(fields[name], dict) else fields[name]
        for name in ("chosen", "rejected")
    }
    prompt = fields.get("prompt")
    both: Fields = {name: fields[name] for name in ("tools", "messages") if name in fields}
    if all(isinstance(text, str) and SPEAKER.match(text) for text in branches.values()):
        turns = {name: turns_of(str(text), where) for name, text in branches.items()}
        # With another prompt than the one they begin with, they are answers that look like it.
        begins = {"role": "user", "content": str(prompt).strip()}
        if (
            prompt is None
            or (isinstance(prompt, str) and SPEAKER.match(prompt))
            or all(turn[0] == begins for turn in turns.values())
        ):
            return _told(fields, {**both, **turns}, where)
    if isinstance(prompt, str) and SPEAKER.match(prompt):
        asked = turns_of(prompt, where)
        if asked[-1] == {"role": "assistant", "content": ""}:
            prompt = asked[:-1]
    given = {} if prompt is None else {"prompt": prompt}
    return _told(fields, {**both, **given, **branches}, where)


def _two_responses(fields: Fields, where: str) -> Fields:
    """Two answers, and the number of the better one."""
    better = fields.get("better_response_id")
    if isinstance(better, bool) or better not in (0, 1):
        raise UserError(
            f"{where}: 'better_response_id' must be 0 or 1, but is {better!r}: which of the two "
            "responses is chosen?"
        )
    chosen = int(better)  # a column with missing values is one of 0.0 and 1.0
    return {
        "prompt": fields["prompt"],
        "chosen": fields[f"response_{chosen}"],
        "rejected": fields[f"response_{1 - chosen}"],
    }


def _ranked(fields: Fields, where: str) -> Fields:
    """Several answers with scores: the best against the worst."""
    given = fields["completions"] if isinstance(fields["completions"], list) else []
    rated = [
        (each.get("overall_score", each.get("score")), each.get("response", each.get("text")))
        for each in given
        if isinstance(each, dict)
    ]
    scored = [(_number(score), text) for score, text in rated if text]
    known = [(score, text) for score, text in scored if score is not None]
    if len(known) < 2 or min(known)[0] == max(known)[0]:
        raise UserError(
            f"{where}: 'completions' needs at least two answers with different 'overall_score', "
            f"but has {len(known)} with a score"
        )
    best = max(known, key=lambda pair: pair[0])
    worst = min(known, key=lambda pair: pair[0])
    return {"prompt": fields["instruction"], "chosen": best[1], "rejected": worst[1]}


def _unpaired(fields: Fields, where: str) -> Fields:
    raise UserError(
        f"{where}: 'completion' with 'label' is an answer that was judged alone (KTO), and pairs "
        "are trained here: leave the rows with label=false out and train on the others with "
        "recipes/sft.py (format: completion), or give pairs"
    )


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _json(text: Any, where: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where} is a function call that is no JSON: {error}") from None


FORMATS: dict[str, Format] = {
    "labels": Format(("input_ids", "labels"), _kept("input_ids", "labels")),
    "loss_mask": Format(("input_ids", "loss_mask"), _kept("input_ids", "loss_mask")),
    "sharegpt_pair": Format(
        ("conversations", "chosen", "rejected"), _sharegpt_pair, also=("system", "tools")
    ),
    "orca_pair": Format(
        ("question", "chosen", "rejected"),
        _question_pair,
        also=("system", "system_prompt"),
        lacks=("prompt",),
    ),
    "pair": Format(("chosen", "rejected"), _pair, also=("prompt", "system", "tools", "messages")),
    "messages": Format(
        ("messages",), _kept("messages", "tools"), also=("tools",), lacks=("response",)
    ),
    "prompt_response": Format(("prompt", "response"), _prompt_response, also=("system", "tools")),
    "unpaired": Format(("completion", "label"), _unpaired, also=("prompt",)),
    "completion": Format(("prompt", "completion"), _completion, also=("system", "tools")),
    "sharegpt": Format(("conversations",), _sharegpt, also=("system", "tools")),
    "alpaca": Format(("instruction", "output"), _alpaca, also=("input", "system", "history")),
    "orca": Format(
        ("question", "response"),
        _asked("question", "response", "system_prompt"),
        also=("system_prompt",),
    ),
    "problem_solution": Format(("problem", "solution"), _asked("problem", "solution")),
    "instruction_response": Format(("instruction", "response"), _asked("instruction", "response")),
    "two_responses": Format(
        ("prompt", "response_0", "response_1"), _two_responses, also=("better_response_id",)
    ),
    "ranked": Format(("instruction", "completions"), _ranked),
    "question_answer": Format(("question", "answer"), _asked("question", "answer")),
}
