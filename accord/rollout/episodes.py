"""Episodes of several turns as a rollout: the policy writes, the environment answers, and so on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from accord.data.records import Prompt
from accord.errors import UserError
from accord.rollout.engine import Engine, encode_checked
from accord.rollout.environments import Environment, Game
from accord.rollout.guides import Guide
from accord.rollout.rollout import Rollout, Row, from_rows
from accord.rollout.sampling import Sampling


@dataclass(kw_only=True)
class _Playing(Row):
    name: str
    game: Game
    text: list[str] = field(default_factory=list)
    over: bool = False
    cut: bool = False


def play(
    engine: Engine, environment: Environment, prompts: Sequence[Prompt], per_prompt: int, sampling: Sampling, guide: Guide | None = None
) -> Rollout:
    """``per_prompt`` episodes from each prompt. ``rollout.step_rewards`` holds what the environment gave, at each turn's end.

    ``finished`` is True where the environment ended the episode, False where the limit on turns or the
    model's context did.
    """
    policy, seen, rows = engine.policy, dict[str, int](), list[_Playing]()
    for prompt in prompts:
        again = seen[prompt.id] = seen.get(prompt.id, -1) + 1
        for k in range(per_prompt):
            name = f"{prompt.id}#{again}/{k}"
            ids = encode_checked(policy, prompt, environment.turn_tokens)
            luck = int.from_bytes(hashlib.sha256(f"{sampling.seed}/{name}".encode()).digest()[:8], "big")
            game = begin(environment, prompt, luck)
            row = _Playing(prompt, k, name=name, game=game)
            row.extend(ids, chosen=False)
            rows.append(row)
    limit = replace(sampling, max_new_tokens=environment.turn_tokens)
    for turn in range(environment.max_turns):
        playing = [row for row in rows if not row.over]
        if not playing:
            break
        written = engine.go_on([row.tokens for row in playing], [f"{row.name}/{turn}" for row in playing], limit, guide)
        for row, (tokens, logprobs, finished) in zip(playing, written, strict=True):
            row.extend(tokens, chosen=True, logprobs=logprobs)
            row.text.append(policy.tokenizer.decode(tokens))
            answer = _ask(environment, row, finished)
            row.rewards[-1] = answer[0]
            row.over = answer[2]
            if not row.over:
                row.text.append(answer[1])
                try:
                    row.extend(policy.tokenizer.encode_turn(answer[1], finished), chosen=False)
                except UserError as error:
                    raise UserError(f"Environment '{environment.name}' answered what the model cannot read: {error}") from None
                if len(row.tokens) + environment.turn_tokens > policy.context:
                    row.over = row.cut = True
    ended = [row.over and not row.cut for row in rows]
    return from_rows(rows, ended, [" | ".join(row.text) for row in rows], policy.tokenizer.pad_id, policy.device, sampled=True)


def begin(environment: Environment, prompt: Prompt, luck: int) -> Game:
    """An episode from this prompt.

    Raises:
        UserError: the environment cannot start from it.
    """
    try:
        return environment.start(prompt, luck)
    except Exception as error:
        raise UserError(
            f"Environment '{environment.name}' cannot start from prompt '{prompt.id}' ({prompt.text[:60]!r}): {type(error).__name__}: "
            f"{error}. Its prompts look like {environment.prompts()[0].text!r}."
        ) from error


def _ask(environment: Environment, row: _Playing, finished: bool) -> tuple[float, str, bool]:
    try:
        answer = row.game.answer(row.text[-1], finished)
        if not isinstance(answer, tuple) or len(answer) != 3:
            raise UserError(f"answer() must return an Answer(reward, text, over), not {answer!r}.")
        reward, text, over = answer
        reward = float(reward)
    except Exception as error:
        raise UserError(f"Environment '{environment.name}' failed on {row.text[-1]!r}: {type(error).__name__}: {error}") from error
    if not isinstance(text, str):
        raise UserError(f"Environment '{environment.name}' answered {row.text[-1]!r} with {text!r}; an Answer's text is a string.")
    if reward != reward or abs(reward) == float("inf"):
        raise UserError(f"Environment '{environment.name}' gave {reward} for {row.text[-1]!r} of '{row.prompt.id}'; give a finite number.")
    return reward, text, bool(over)
