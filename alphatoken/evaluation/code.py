"""Tasks whose answers are programs that are run: HumanEval and MBPP, pass@1 of the likeliest
answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from alphatoken.config.evaluation import EvaluationTask
from alphatoken.distributed import collectives
from alphatoken.errors import UserError
from alphatoken.evaluation.judge import Judge, document
from alphatoken.evaluation.measures import Item
from alphatoken.evaluation.rows import Questions, Setting, Task, raw_rows, text_of
from alphatoken.evaluation.sandbox import Limits, check_sandbox, run_program
from alphatoken.evaluation.tokens import tokens_of_text


@dataclass(frozen=True)
class Problem:
    """What a model goes on from, and what makes a program of how it does."""

    prompt: str
    before: str
    """What stands before the model's answer in the program."""
    tests: str
    """What stands behind it."""


def humaneval_problem(fields: dict[str, Any], where: str) -> Problem:
    """A row of HumanEval: the head of a function, whose body the model writes."""
    prompt, test, name = (text_of(fields, key, where) for key in ("prompt", "test", "entry_point"))
    return Problem(prompt, prompt, f"{test}\ncheck({name})\n")


def mbpp_problem(fields: dict[str, Any], where: str) -> Problem:
    """A row of MBPP: a task in words with its tests, asked without examples in the words that its
    authors ask it in."""
    text = text_of(fields, "text", where)
    tests = fields.get("test_list")
    if not isinstance(tests, list) or not all(isinstance(each, str) for each in tests):
        raise UserError(f"{where}: 'test_list' must be a list of texts, but is {str(tests)[:80]}")
    shown = "\n".join(tests)
    prompt = (
        f"You are an expert Python programmer, and here is your task: {text} Your code should pass "
        f"these tests:\n\n{shown}\n[BEGIN]\n"
    )
    setup = fields.get("test_setup_code") or ""
    return Problem(prompt, "", f"{setup}\n{shown}\n")


ENDS = {
    "humaneval": re.compile(r"\n(?=class |def |#|if |print\(|@|assert |```)"),
    "mbpp": re.compile(r"\[DONE\]|\n```|\n(?=assert |print\(|\[BEGIN\])"),
}
"""Where an answer is over: what comes next is another program."""
PROBLEMS: dict[str, Callable[[dict[str, Any], str], Problem]] = {
    "humaneval": humaneval_problem,
    "mbpp": mbpp_problem,
}


class Programs(Task):
    """How often the program that the model writes passes its tests."""

    def __init__(self, setting: Setting, task: EvaluationTask) -> None:
        self.settings = task
        config, tokenizer = setting.config.evaluation, setting.tokenizer
        self._limits = Limits(config.code_seconds, config.code_megabytes)
        check_sandbox(self._limits)
        self.questions = Questions[Problem](setting, task)
        self._prompts: list[list[int]] = []
        for where, row in raw_rows(setting, task):
            problem = PROBLEMS[task.task](row.fields, where)
            ids = tokens_of_text(tokenizer, problem.prompt)
            if len(ids) > config.max_length:
                self.questions.counts[f"skipped: prompt over {config.max_length} tokens"] += 1
                continue
            self.questions.add(where, row.fields, problem)
            self._prompts.append(ids)
        prompts = [document(ids) for ids in self._prompts]
        self.questions.checked(prompts, more=task.max_new_tokens)

    def judge(self, judge: Judge) -> list[Item]:
        answers = judge.answers(self._prompts, self.settings.max_new_tokens)
        answers = [ENDS[self.settings.task].split(answer, maxsplit=1)[0] for answer in answers]
        asked = [each.asked for each in self.questions.kept]
        programs = [
            f"{each.before}{answer}\n{each.tests}"
            for each, answer in zip(asked, answers, strict=True)
        ]
        judge.on_batch()
        passed = self._passed(programs, judge.on_program)
        return self.questions.results({"pass_at_1": passed, "answer": answers})

    def _passed(self, programs: Sequence[str], on_program: Callable[[], None]) -> list[float]:
        """Whether each program runs to its end; each rank runs its share of them."""

        def own() -> dict[int, float]:
            found = {}
            mine = range(collectives.rank(), len(programs), collectives.world_size())
            for number in mine:
                on_program()
                found[number] = float(run_program(programs[number], self._limits))
            return found

        everywhere: dict[int, float] = {}
        for of_rank in collectives.gather_objects(collectives.agree(own)):
            everywhere |= of_rank
        return [everywhere[number] for number in range(len(programs))]
