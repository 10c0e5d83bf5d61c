"""Judges: a policy that accord loads, or an OpenAI-compatible service."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from accord.constitution.endpoint import Endpoint, is_endpoint, name_of, text_of
from accord.constitution.judging import OPTIONS, Judge, Question, Verdict
from accord.data.records import Completion, Pair, PairGroup, Prompt
from accord.nn.budget import TokenBudget
from accord.rollout.engine import Engine
from accord.rollout.policy import Policy
from accord.rollout.sampling import Sampling
from accord.service import Refused
from accord.supervised.comparisons import Comparisons

DECIDE = "So which is better? Answer with (A) or (B) only."
THOUGHTS = 200
"""Tokens of a chain of thought, at most."""
SURE = 1e-3
"""What is left for the other option where a service says which it chooses and not how likely."""


class PolicyJudge:
    """A policy's log-probabilities of the two options as its answer, normalised over them.

    A question that is longer than its context has no verdict.
    """

    def __init__(self, policy: Policy, name: str, micro_batch_tokens: int = 4096, seed: int = 0) -> None:
        self.name, self._policy, self._budget, self._seed = name, policy, TokenBudget(micro_batch_tokens), seed

    def answer(self, questions: Sequence[Question]) -> list[Verdict]:
        prompts = [self._prompt(i, q.text) for i, q in enumerate(questions)]
        thinking = [i for i, q in enumerate(questions) if q.thinking]
        room = self._policy.context - THOUGHTS - len(self._policy.tokenizer.encode_plain(DECIDE)) - 32
        fitting = [i for i in thinking if len(self._policy.tokenizer.encode_prompt(prompts[i].content)) <= room]
        if fitting:
            sampling = Sampling(1.0, max_new_tokens=THOUGHTS, seed=self._seed)
            thoughts = Engine(self._policy).sample([prompts[i] for i in fitting], 1, sampling).texts
            for i, thought in zip(fitting, thoughts, strict=True):
                prompts[i] = self._prompt(i, questions[i].text, thought.strip() or "I cannot say.")
        space = "" if self._policy.tokenizer.has_chat_template else " "
        answers = [self._policy.tokenizer.encode_completion(space + option, False) for option in OPTIONS]
        longest, context = max(map(len, answers)), self._policy.context
        sizes = [len(self._policy.tokenizer.encode_prompt(p.content)) for p in prompts]
        too_long = {i for i, size in enumerate(sizes) if size + longest > context} | (set(thinking) - set(fitting))
        groups = [
            PairGroup(
                p, tuple(Completion(p, text, False, k, tuple(ids)) for k, (text, ids) in enumerate(zip(OPTIONS, answers, strict=True))), (Pair(0, 1),)
            )
            for i, p in enumerate(prompts) if i not in too_long
        ]  # fmt: skip
        found = Comparisons(self._policy, groups, None, "questions").logprobs(self._policy.model, self._budget, "Judge") if groups else []
        told = iter(found)
        out = []
        for i, size in enumerate(sizes):
            if i in too_long:
                out.append(Verdict(None, f"the question has {size} tokens, which is too long for the judge's context of {context}"))
                continue
            a, b = next(told).double().log_softmax(0).tolist()
            out.append(Verdict((a, b)))
        return out

    def _prompt(self, number: int, text: str, thought: str | None = None) -> Prompt:
        name = f"question-{number}"
        if not self._policy.tokenizer.has_chat_template:
            return Prompt(name, f"{text}\n\n{'' if thought is None else thought + chr(10) * 2 + DECIDE + chr(10) * 2}Answer:")
        messages = [{"role": "user", "content": text}]
        if thought is not None:
            messages += [{"role": "assistant", "content": thought}, {"role": "user", "content": DECIDE}]
        return Prompt(name, messages)


class EndpointJudge:
    """A model of a service (:class:`accord.constitution.endpoint.Endpoint`). The verdict is read off the log-probabilities where the letter
    stands, or, where a service gives none, off the letter."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.name, self._endpoint, self._numbers = endpoint.model, endpoint, {"logprobs": True, "top_logprobs": 20}

    def answer(self, questions: Sequence[Question]) -> list[Verdict]:
        first: dict[Question, int] = {}
        for q in questions:
            first.setdefault(q, len(first))
        told = self._endpoint.each(self._verdict, list(first), "Judge")
        return [told[first[q]] for q in questions]

    def _verdict(self, question: Question) -> Verdict:
        messages = [{"role": "user", "content": question.text}]
        try:
            if question.thinking:
                thought = text_of(self._endpoint.ask({"messages": messages, "max_tokens": THOUGHTS, "temperature": 0}))
                messages += [{"role": "assistant", "content": thought}, {"role": "user", "content": DECIDE}]
            body = {"messages": messages, "max_tokens": 8, "temperature": 0}
            try:
                return verdict_of(self._endpoint.ask(body | self._numbers))
            except Refused as refused:
                if refused.status not in (400, 422) or "logprobs" not in refused.cause or not self._numbers:
                    raise
                self._numbers = {}  # a service that does not know them
                return verdict_of(self._endpoint.ask(body))
        except Refused as refused:
            return Verdict(None, f"the judge {refused.cause}")


def verdict_of(choice: Mapping[str, Any]) -> Verdict:
    """The verdict in a service's answer: where it says the letter, log P of both, of the alternatives that the service names there. A letter
    that is not among them is no likelier than the least likely of them, nor than what all of them leave."""
    said = text_of(choice)
    letters = {*re.findall(r"\(([AB])\)", said)} or {*re.findall(r"^\W*([AB])\W*$", said)}
    if len(letters) != 1:
        return Verdict(None, f"the judge answered neither (A) nor (B) alone, but {said.strip()[:60]!r}")
    letter = letters.pop()
    told = choice.get("logprobs")
    tokens = told.get("content") if isinstance(told, dict) else None
    for token in tokens if isinstance(tokens, list) else []:
        if not isinstance(token, dict) or _letter(token.get("token")) != letter:
            continue
        listed = [
            t
            for t in (token.get("top_logprobs") or [token])
            if isinstance(t, dict) and isinstance(t.get("logprob"), int | float) and math.isfinite(t["logprob"])
        ]
        mass = [[t["logprob"] for t in listed if _letter(t.get("token")) == option] for option in "AB"]
        if not any(mass):
            break
        left = 1 - math.fsum(math.exp(t["logprob"]) for t in listed)
        least = min(*(t["logprob"] for t in listed), math.log(max(left, SURE**4)))
        a, b = (float(np.logaddexp.reduce(m)) if m else least for m in mass)
        total = float(np.logaddexp(a, b))
        return Verdict((a - total, b - total))
    sure, other = math.log(1 - SURE), math.log(SURE)
    return Verdict((sure, other) if letter == "A" else (other, sure))


def _letter(token: object) -> str | None:
    """A or B, if that is what a token is, but for what stands around it."""
    word = token.strip(" \n\t()[]*\"'.:,") if isinstance(token, str) else ""
    return word if word in ("A", "B") else None


def judge_of(spec: str, model: str | None, load: Callable[[str], Policy], **endpoint: Any) -> Judge:
    """``http(s)://...`` with a model's name there, or what :func:`accord.load` loads."""
    if is_endpoint(spec):
        return EndpointJudge(Endpoint.named("Judge", spec, model, "--judge-model", **endpoint))
    return PolicyJudge(load(spec), name_of(spec))
