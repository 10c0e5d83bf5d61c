"""Writers of answers, critiques and revisions: a policy that accord loads, or an OpenAI-compatible service."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from accord.constitution.endpoint import Endpoint, is_endpoint, name_of, text_of
from accord.nn.weights import sampled_fingerprint
from accord.rollout.engine import Engine
from accord.rollout.policy import Policy
from accord.rollout.sampling import Sampling
from accord.service import Refused
from accord.text.tokenizer import Tokenizer

Message = dict[str, str]
TURN = "\n\nHuman:"


class Asked(NamedTuple):
    """What a writer is to continue: a chat that ends with the user's. ``name``: what its luck goes by."""

    name: str
    chat: list[Message]


class Written(NamedTuple):
    """``problem``: why there is no text."""

    text: str
    finished: bool
    problem: str = ""


class Writer(Protocol):
    """Attributes:
    name: as people name it.
    about: what its texts depend on.
    """

    name: str
    about: str

    def write(self, asked: Sequence[Asked]) -> list[Written]:
        """The assistant's next message of each chat."""
        ...


def encode_asked(tokenizer: Tokenizer, chat: Sequence[Message]) -> list[int]:
    """Ids of a chat, up to where the answer starts; without a template as lines that begin with who speaks."""
    if tokenizer.has_chat_template:
        return tokenizer.encode_prompt(chat)
    lines = [f"{'Human' if m['role'] == 'user' else m['role'].capitalize()}: {m['content']}" for m in chat]
    return tokenizer.encode_prompt("\n\n".join([*lines, "Assistant:"]))


class PolicyWriter:
    """A policy, sampled. A chat that does not fit its context with an answer is not answered."""

    def __init__(self, policy: Policy, name: str, temperature: float, max_new_tokens: int, seed: int = 0, rows: int = 64) -> None:
        self.name, self._policy = name, policy
        self.about = f"{name} ({sampled_fingerprint(policy.model)}), temperature {temperature:g}, {max_new_tokens} tokens"
        self._engine, self._sampling = Engine(policy, rows), Sampling(temperature, max_new_tokens=max_new_tokens, seed=seed)

    def write(self, asked: Sequence[Asked]) -> list[Written]:
        room = self._policy.context - self._sampling.max_new_tokens
        contexts = [encode_asked(self._policy.tokenizer, one.chat) for one in asked]
        fitting = [i for i, ids in enumerate(contexts) if len(ids) <= room]
        told = self._engine.go_on([contexts[i] for i in fitting], [asked[i].name for i in fitting], self._sampling) if fitting else []
        out = [
            Written(
                "",
                False,
                f"the conversation has {len(ids)} tokens, which with an answer is too long for a context of {self._policy.context}",
            )
            for ids in contexts
        ]
        for i, (tokens, _, finished) in zip(fitting, told, strict=True):
            text, speaks, _ = self._policy.tokenizer.decode(tokens).partition(TURN)  # without a template it may go on with the user's turn
            out[i] = Written(text.strip(), finished or bool(speaks))
        return out


class EndpointWriter:
    """A model of a service."""

    def __init__(self, endpoint: Endpoint, temperature: float, max_new_tokens: int, seed: int = 0) -> None:
        self.name, self._endpoint, self._seed = endpoint.model, endpoint, seed
        self.about = f"{endpoint.model} at {endpoint.url}, temperature {temperature:g}, {max_new_tokens} tokens"
        self._body = {"temperature": temperature, "max_tokens": max_new_tokens}

    def write(self, asked: Sequence[Asked]) -> list[Written]:
        return self._endpoint.each(self._one, asked)

    def _one(self, asked: Asked) -> Written:
        try:
            luck = int(hashlib.sha256(f"{self._seed} {asked.name}".encode()).hexdigest()[:7], 16)
            choice = self._endpoint.ask({"messages": asked.chat, **self._body, "seed": luck})
            return Written(text_of(choice).strip(), choice.get("finish_reason") != "length")
        except Refused as refused:
            return Written("", False, f"the service {refused.cause}")


def writer_of(
    spec: str, model: str | None, load: Callable[[str], Policy], temperature: float, max_new_tokens: int, seed: int, **endpoint: Any
) -> Writer:
    """``http(s)://...`` with a model's name there, or what :func:`accord.load` loads."""
    if is_endpoint(spec):
        return EndpointWriter(Endpoint.named("Writer", spec, model, "--writer-model", **endpoint), temperature, max_new_tokens, seed)
    return PolicyWriter(load(spec), name_of(spec), temperature, max_new_tokens, seed)
