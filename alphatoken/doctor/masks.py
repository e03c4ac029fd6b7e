"""What the doctor says of the response mask (`data.audit`)."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from alphatoken.config.run import RunConfig
from alphatoken.data.audit import and_more, audit, clipped, probe, real_conversations
from alphatoken.data.chat import Encoder
from alphatoken.data.layout import Conversation
from alphatoken.data.tokenizer import chat_rules
from alphatoken.doctor.findings import Finding, Outcome
from alphatoken.errors import UserError
from alphatoken.util.wording import plural


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
    probes: list[Conversation] = []
    try:
        probes.append(probe(tokenizer, encoder))
    except UserError:
        if not conversations:
            raise
    found = audit(tokenizer, encoder, [*probes, *conversations])
    rows = f"{plural(len(conversations), 'conversation')} of the data"
    details: tuple[str, ...] = ()
    if shown_row := next((each for each in found.known if each[0] not in probes), None):
        row, accounts = shown_row
        shown = "\n".join(clipped(one.shown) for one in accounts)
        details = (f"What is trained of {row.where}, in [[ ]]:", *shown.splitlines())
    if complaints := found.complaints():
        text = "; ".join(f"{what}: {each[0]}" + and_more(each) for what, each in complaints.items())
        firsts = [each[0] for each in complaints.values()]
        fix = "; ".join(dict.fromkeys(first.fix for first in firsts))
        notable = all(each.severity == "notable" for each in firsts)
        outcome: Outcome = "warning" if notable else "failed"
        return Finding("response mask", outcome, text, fix, details=details)
    if found.unknown:
        among = f"a probe and {rows}" if probes else rows
        text = f"{found.unknown} of {among} cannot be checked: the template rewrites what they say"
        return Finding("response mask", "warning", text, "look at the row below", details=details)
    tried = "".join(f"a probe of {len(each.chat.messages)} turns and " for each in probes)
    text = f"{encoder.rule}; that is what the assistant says and nothing else, in {tried}{rows}"
    return Finding("response mask", "ok", text, details=details)
