"""Whether what is trained is what the assistant says: an account of each token of a conversation,
made without the code that makes the response mask (`layout`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import Source
from alphatoken.data.chat import Encoder, Tokens
from alphatoken.data.preview import marked
from alphatoken.data.rows import (
    Chat,
    Message,
    as_chat,
    as_pair,
    has_text,
)
from alphatoken.data.sources import OpenSource, location
from alphatoken.data.tokenizer import chat_rules
from alphatoken.doctor.findings import Finding
from alphatoken.doctor.layout import Conversation, Layout, lay_out
from alphatoken.errors import UserError
from alphatoken.util.wording import plural

# Words that occur in no template, each in one turn only.
PROBE: tuple[Message, ...] = (
    {"role": "system", "content": "Quartz governs umbrellas."},
    {"role": "user", "content": "Which walrus juggles?"},
    {"role": "assistant", "content": "Velvet pigeons do, mostly."},
    {"role": "user", "content": "And tuba gherkins?"},
    {"role": "assistant", "content": "Only foxes yodel."},
)
LOOKED_AT = 32  # rows of the data


@dataclass(frozen=True)
class Account:
    """What the mask of a conversation does wrong, by (whose text, text), and the whole text with [[
    ]] around what is trained."""

    foreign: tuple[tuple[str, str], ...]
    """Trained, although it is somebody else's or the template's own."""
    lacking: tuple[tuple[str, str], ...]
    """Said by the assistant and not trained."""
    shown: str

    def complaints(self) -> Iterator[tuple[str, str]]:
        """What is wrong, and the text it is about."""
        for kind, texts in (("trains on", self.foreign), ("does not train on", self.lacking)):
            for whose, text in texts:
                yield f"{kind} text of the {whose}", text


def real_conversations(config: RunConfig, limit: int = LOOKED_AT) -> list[Conversation]:
    """Reads the first usable rows of every training source, about `limit` in all, both answers of a
    pair.

    Raises UserError for bad rows.
    """
    share = max(1, limit // len(config.data.train))
    pairs = isinstance(config, PreferenceRunConfig)
    of_sources = (
        itertools.islice(_conversations(source, pairs=pairs), share) for source in config.data.train
    )
    return list(itertools.chain.from_iterable(of_sources))


def _conversations(source: Source, *, pairs: bool) -> Iterator[Conversation]:
    for row in OpenSource(source).read():
        where = location(source, row.number)
        if pairs:
            pair = as_pair(row.fields, where)
            for answer in (pair.chosen, pair.rejected):
                if has_text(pair.prompt.messages) and has_text(answer, "assistant"):
                    first = len(pair.prompt.messages)
                    yield Conversation(pair.prompt.and_then(answer), first, where)
        else:
            chat = as_chat(row.fields, where)
            if has_text(chat.messages, "assistant"):
                yield Conversation(chat, 0, where)


def probe(tokenizer: PreTrainedTokenizerBase, encoder: Encoder) -> Conversation:
    """The longest part of PROBE that can be encoded: all, without the system message, or one
    question and answer.

    Some templates take no system message; some cannot tell earlier answers apart, which rows of one
    answer do not need. Raises UserError where not even those can be encoded.
    """
    for messages in (PROBE, PROBE[1:], PROBE[1:3]):
        conversation = Conversation(Chat(list(messages)), 0, "the probe")
        try:
            accounts(tokenizer, encoder, conversation)
        except UserError as error:
            refused = error
            continue
        return conversation
    raise refused


def accounts(
    tokenizer: PreTrainedTokenizerBase, encoder: Encoder, conversation: Conversation
) -> list[Account] | None:
    """Checks the masks that `encoder` gives the rows of a conversation. None where messages cannot
    be found in the template's text.

    Raises UserError where the conversation cannot be encoded.
    """
    if encoder.rules.turns == "last":
        answers = filter(conversation.is_trained, range(len(conversation.chat.messages)))
        conversation = Conversation(conversation.chat, max(answers, default=0), conversation.where)
    chat, first = conversation.chat, conversation.answered_from
    found = encoder.tokens(chat, conversation.where, first)
    parts = conversation.parts([tokens.rendering.messages for tokens in found])
    checked = [
        _account(tokenizer, encoder, part, tokens)
        for part, tokens in zip(parts, found, strict=False)
    ]
    known = [each for each in checked if each is not None]
    return known if len(known) == len(checked) else None


def _account(
    tokenizer: PreTrainedTokenizerBase, encoder: Encoder, conversation: Conversation, tokens: Tokens
) -> Account | None:
    layout = lay_out(tokenizer, encoder, conversation, tokens)
    if layout is None:
        return None
    allowed = _template_text_of_answers(layout, tokenizer, encoder)
    foreign, lacking = [], []
    for place, trained in enumerate(layout.mask):
        owner = layout.owner(place)
        if owner is None:
            is_foreign = trained and place not in allowed
            if is_foreign and tokenizer.decode([layout.ids[place]]).strip():
                foreign.append((place, "template"))
        elif trained and not conversation.is_trained(owner):
            foreign.append((place, conversation.speaker(owner)))
        elif not trained and conversation.is_trained(owner):
            # A first token that the tokenizer has fused with what precedes it is not the
            # answer's own, and neither is what inference gives it (`<think>`).
            own = max(layout.spans[owner][0], _given(layout, encoder, owner))
            is_own = layout.offsets[place][0] >= own
            lacking += [(place, "assistant")] * is_own
    return Account(
        foreign=_runs(tokenizer, layout.ids, foreign),
        lacking=_runs(tokenizer, layout.ids, lacking),
        shown=marked(layout.ids, layout.mask, tokenizer).plain,
    )


def judge_run(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Finding:
    """`judge_masks` for a run's own rows; on the probe alone where they cannot be read, which is
    another check's."""
    try:
        conversations = real_conversations(config)
    except UserError:
        conversations = []
    encoder = Encoder(tokenizer, config.data.max_length, chat_rules(config, tokenizer))
    return judge_masks(tokenizer, encoder, conversations)


def judge_masks(
    tokenizer: PreTrainedTokenizerBase, encoder: Encoder, conversations: Sequence[Conversation]
) -> Finding:
    """That the mask covers the assistant's turns and nothing else, in a probe and in rows of the
    data; shows one row.

    Rows with reasoning may be encoded where the probe, which has none, is not: then they alone are
    judged. Raises UserError for a template that the probe cannot be encoded with, without rows.
    """
    complaints: dict[str, list[str]] = {}
    known: list[tuple[Conversation, list[Account]]] = []
    probes: list[Conversation] = []
    try:
        probes.append(probe(tokenizer, encoder))
    except UserError:
        if not conversations:
            raise
    for each in (*probes, *conversations):
        try:
            found = accounts(tokenizer, encoder, each)
        except UserError as error:
            complaints.setdefault("cannot be encoded", []).append(str(error))
            continue
        if found is not None:
            known.append((each, found))
            for what, said in itertools.chain.from_iterable(one.complaints() for one in found):
                complaints.setdefault(what, []).append(f"{clipped(said, 60)!r} ({each.where})")
    rows = f"{plural(len(conversations), 'conversation')} of the data"
    details: tuple[str, ...] = ()
    if shown_row := next((each for each in known if each[0] not in probes), None):
        row, found = shown_row
        shown = "\n".join(clipped(one.shown) for one in found)
        details = (f"What is trained of {row.where}, in [[ ]]:", *shown.splitlines())
    if complaints:
        text = "; ".join(
            f"{what}: {texts[0]}" + _and_more(texts) for what, texts in complaints.items()
        )
        fix = (
            "put {% generation %} around what the assistant says in the chat template, or take it "
            "off the rest"
        )
        return Finding("response mask", "failed", text, fix, details=details)
    unknown = len(probes) + len(conversations) - len(known)
    if unknown:
        among = f"a probe and {rows}" if probes else rows
        text = f"{unknown} of {among} cannot be checked: the template rewrites what they say"
        return Finding("response mask", "warning", text, "look at the row below", details=details)
    tried = "".join(f"a probe of {len(each.chat.messages)} turns and " for each in probes)
    text = f"trains what the assistant says and nothing else, in {tried}{rows}"
    return Finding("response mask", "ok", text, details=details)


def clipped(text: str, length: int = 1200) -> str:
    """A text without its middle, where it is long."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]} ... {text[-half:]}"


def _and_more(texts: Sequence[str]) -> str:
    return f" and {plural(len(texts) - 1, 'more place')}" if len(texts) > 1 else ""


def _template_text_of_answers(
    layout: Layout, tokenizer: PreTrainedTokenizerBase, encoder: Encoder
) -> set[int]:
    """Places of tokens that the template says for the assistant: behind what asks for an answer,
    and up to the end of turn."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    stops = {tokenizer.eos_token_id, *encoder.rules.stop_tokens}
    allowed = set[int]()
    for index, (_, end) in enumerate(layout.spans):
        if not layout.conversation.is_trained(index):
            continue
        allowed |= _opening(layout, encoder, index)
        is_last = index + 1 == len(layout.spans)
        limit = len(layout.text) + 1 if is_last else layout.spans[index + 1][0]
        behind = [place for place, (left, _) in enumerate(layout.offsets) if end <= left < limit]
        # Calls stand behind the content, with marks of their own.
        calls = layout.conversation.chat.messages[index].get("tool_calls")
        ends = [layout.ids[place] in (stops if calls else special) for place in behind]
        closing = ends.index(True) if True in ends else len(behind)
        allowed.update(behind[:closing])
        for place in behind[closing:]:
            if layout.ids[place] not in special:
                break
            allowed.add(place)  # several end a turn together where they stand side by side
            if layout.ids[place] in stops:
                break
    return allowed


def _opening(layout: Layout, encoder: Encoder, index: int) -> set[int]:
    """Places of the template's tokens between what asks for message `index` and its content."""
    given = _given(layout, encoder, index)
    if not given:
        return set()
    start, _ = layout.spans[index]
    return {
        place
        for place, (left, right) in enumerate(layout.offsets)
        if given <= left < right <= start
    }


def _given(layout: Layout, encoder: Encoder, index: int) -> int:
    """Characters of the text that ask for message `index`; 0 where the text does not begin with
    what asks."""
    if index == 0:
        return 0
    conversation = layout.conversation
    asked = encoder.prompt_text(conversation.chat.first(index), conversation.where)
    return len(asked) if layout.text.startswith(asked) else 0


def _runs(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], places: Sequence[tuple[int, str]]
) -> tuple[tuple[str, str], ...]:
    """Neighbouring places of one owner as text."""
    runs = []
    for (_, whose), group in itertools.groupby(
        enumerate(places), key=lambda each: (each[1][0] - each[0], each[1][1])
    ):
        runs.append((whose, tokenizer.decode([ids[place] for _, (place, _) in group])))
    return tuple(runs)
