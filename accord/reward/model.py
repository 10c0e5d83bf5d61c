"""The reward model: the upper layers of the starting policy with a scalar head, on the shared frozen trunk."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accord.data.records import Completion, Content, Prompt
from accord.disk import read_object, whole_folder
from accord.errors import UserError
from accord.nn.budget import TokenBudget
from accord.nn.foreign import ForeignModel
from accord.nn.loading import Model, load_model
from accord.nn.transformer import Transformer
from accord.nn.weights import fingerprint, merged_state, read_tensors, save_folder
from accord.rollout.engine import Reader, encode_named
from accord.rollout.policy import Policy, share_layers
from accord.rollout.rollout import Rollout, from_completions
from accord.rollout.scoring import final_states
from accord.text.tokenizer import Tokenizer

FORMAT = 1


class ScalarModel(nn.Module):
    """Layers from ``cut`` upwards with a linear head: one number a position. Both reward model and critic.

    The layers below ``cut`` belong to the frozen starting model and are shared with it. Of a model that
    accord does not compute itself (``cut`` 0) it is a whole copy.
    """

    def __init__(self, start: Model, cut: int, seed: int = 0) -> None:
        super().__init__()
        self.cut = cut
        if isinstance(start, ForeignModel):
            self.model: Model = copy.deepcopy(start).float().requires_grad_(True)
        else:
            self.model = share_layers(start, cut)
        self.head = nn.Linear(start.output_matrix.shape[1], 1, device=start.device)
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(self.head.weight.shape, generator=generator) / self.head.in_features
        self.head.weight.data.copy_(first)
        nn.init.zeros_(self.head.bias)

    def forward(self, rollout: Rollout, where: Tensor) -> Tensor:
        """(B,T) fp32: the head's output after reading each token that ``where`` (B,T) bool marks, 0 elsewhere.

        Uses the rollout's trunk if it is cut here.
        """
        values: Tensor = self.head(final_states(self.model, rollout, self.cut, where).float())[:, 0]
        return torch.zeros(where.shape, dtype=values.dtype, device=where.device).masked_scatter(where, values)

    def trainable(self) -> dict[str, Tensor]:
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def trunk_fingerprint(self) -> str:
        """Of the embedding and the layers below the cut: equal prints mean equal activations."""
        assert isinstance(self.model, Transformer)
        backbone = self.model.model
        state = {f"embed.{k}": v for k, v in backbone.embed_tokens.state_dict().items()}
        if backbone.positions == "learned":
            state["positions"] = backbone.embed_positions.weight
        for i, block in enumerate(backbone.layers[: self.cut]):
            state |= {f"{i}.{k}": v for k, v in block.state_dict().items()}
        return fingerprint(state)


class RewardModel:
    """Scores completions; higher is preferred.

    Attributes:
        scalar: the network. Its output is the *raw* score, in logits of the Bradley-Terry model.
        mean, scale: of the raw scores of the training completions. :meth:`score` returns
            (raw - mean) / scale, so a score means the same everywhere.
    """

    def __init__(self, scalar: ScalarModel, tokenizer: Tokenizer, raw: dict[str, Any], context: int, mean: float, scale: float) -> None:
        self.scalar, self.tokenizer, self.raw, self._context = scalar, tokenizer, raw, context
        self.mean, self.scale = mean, scale

    @classmethod
    def on(cls, policy: Policy, top_layers: int, seed: int = 0) -> RewardModel:
        """An untrained reward model on the policy's own trunk."""
        policy = policy.frozen()
        if isinstance(policy.model, ForeignModel):
            raise not_computed(f"that of a model of type {policy.raw.get('model_type')}")
        check_top_layers(top_layers, policy.model.depth)
        scalar = ScalarModel(policy.model, policy.model.depth - top_layers, seed)
        return cls(scalar, policy.tokenizer, policy.raw, policy.context, 0.0, 1.0)

    def encode(self, completions: Sequence[Completion]) -> Rollout:
        """Rows of prompt and completion, as the policy's own rollouts are laid out."""
        encoded = encode_completions(self, completions)
        return from_completions(encoded, list(completions), self.tokenizer.pad_id).to(self.scalar.model.device)

    def raw_scores(self, rollout: Rollout) -> Tensor:
        """(B,) raw scores: the head's output after the last response token. Differentiable."""
        return self.scalar(rollout, rollout.at_last).sum(1)

    @torch.no_grad()
    def states(self, rollout: Rollout, token_budget: int = 8192) -> Tensor:
        """(B,H) fp32: what the head reads."""
        out = torch.zeros(len(rollout), self.scalar.head.in_features, device=rollout.tokens.device)

        def work(tokens: int) -> None:
            for rows in rollout.micro_batches(tokens):
                part = rollout.select(rows)
                out[rows] = final_states(self.scalar.model, part, self.scalar.cut, part.at_last).float()

        TokenBudget(token_budget).fit(work)
        return out

    @torch.no_grad()
    def logits(self, rollout: Rollout, token_budget: int = 8192) -> Tensor:
        """(B,) raw - mean. As a classifier: the log-odds of being preferred to an average completion."""
        out = torch.zeros(len(rollout), device=rollout.tokens.device)

        def work(tokens: int) -> None:
            for rows in rollout.micro_batches(tokens):
                out[rows] = self.raw_scores(rollout.select(rows)).float()

        TokenBudget(token_budget).fit(work)
        return out - self.mean

    def score_rollout(self, rollout: Rollout, token_budget: int = 8192) -> Tensor:
        """(B,) normalised scores."""
        return self.logits(rollout, token_budget) / self.scale

    def score(self, prompts: Sequence[Content], completions: Sequence[str]) -> list[float]:
        """Normalised scores of texts."""
        return self.score_rollout(self.encode(self._records(prompts, completions))).tolist()

    def classify(self, prompts: Sequence[Content], completions: Sequence[str]) -> list[dict[str, float]]:
        """``logit`` and ``probability`` that a completion would be preferred to an average one."""
        logits = self.logits(self.encode(self._records(prompts, completions)))
        return [{"logit": z, "probability": p} for z, p in zip(logits.tolist(), logits.sigmoid().tolist(), strict=True)]

    @staticmethod
    def _records(prompts: Sequence[Content], completions: Sequence[str]) -> list[Completion]:
        pairs = zip(prompts, completions, strict=True)
        return [Completion(Prompt(f"row-{i}", p), text, True) for i, (p, text) in enumerate(pairs)]

    def save(self, folder: str | Path, report: Mapping[str, Any] | None = None) -> None:
        """Write a folder that ``transformers`` opens as a sequence classifier with one label; ``report`` is its ``report.json``."""
        tokenizer = _padded_apart(self.tokenizer)
        state = {n: t for n, t in merged_state(self.network).items() if not n.startswith("lm_head")}
        state["score.weight"] = self.scalar.head.weight.detach().cpu()
        kind = str((self.raw.get("architectures") or ["LlamaForCausalLM"])[0]).replace("ForCausalLM", "ForSequenceClassification")
        about = {
            "kind": "reward_model",
            "format": FORMAT,
            "cut": self.scalar.cut,
            "mean": self.mean,
            "scale": self.scale,
            "head_bias": self.scalar.head.bias.item(),
            "trunk": self.scalar.trunk_fingerprint(),
        }
        with whole_folder(Path(folder)) as aside:
            save_folder(
                aside,
                self.raw,
                state,
                architectures=[kind],
                num_labels=1,
                id2label={"0": "score"},
                label2id={"score": 0},
                pad_token_id=tokenizer.pad_id,
            )
            tokenizer.save(aside)
            (aside / "accord.json").write_text(json.dumps(about, indent=2) + "\n")
            if report is not None:
                (aside / "report.json").write_text(json.dumps(report, indent=1) + "\n")

    @classmethod
    def load(cls, name: str | Path, policy: Policy | None = None) -> RewardModel:
        """Open a saved reward model; if its trunk is the policy's, the policy's is used and not held twice.

        Raises:
            UserError: no such folder, not a reward model, or its head is missing.
        """
        folder = Path(name)
        about = read_about(folder)
        tensors = read_tensors(folder)
        if "score.weight" not in tensors:
            raise UserError(f"{folder} has no weight 'score.weight': the head is missing, so no score could be right. Save it again.")
        loaded = load_model(str(folder), None if policy is None else policy.model.compute_dtype)
        if isinstance(loaded.model, ForeignModel):
            raise UserError(f"{folder} is no architecture accord computes; use classifier:{folder} instead.")
        if about["cut"] > loaded.model.depth or tensors["score.weight"].shape != (1, loaded.model.config.hidden_size):
            raise UserError(f"{folder}: accord.json or the weight 'score.weight' is of another model; save the reward model again.")
        scalar = ScalarModel(loaded.model, about["cut"])
        _restore_top(scalar, tensors)
        scalar.head.weight.data.copy_(tensors["score.weight"])
        scalar.head.bias.data.fill_(float(about["head_bias"]))
        scalar.requires_grad_(False)
        context = loaded.model.config.max_position_embeddings
        model = cls(scalar, Tokenizer.load(folder), loaded.raw, context, float(about["mean"]), float(about["scale"]))
        start = None if policy is None else policy.start
        if isinstance(start, Transformer) and start.config == loaded.model.config:
            model._share_trunk(start, str(about["trunk"]))
        return model

    @property
    def context(self) -> int:
        return self._context

    def _share_trunk(self, start: Transformer, print_of_trunk: str) -> None:
        """Hold ``start``'s layers instead of equal copies of them, if they are equal."""
        cut, mine = self.scalar.cut, self.network
        if ScalarModel(start, cut).trunk_fingerprint() == print_of_trunk:
            for i in range(cut):
                mine.model.layers[i] = start.model.layers[i]
            mine.model.embed_tokens, mine.lm_head = start.model.embed_tokens, start.lm_head
            if start.model.positions == "learned":
                mine.model.embed_positions = start.model.embed_positions

    def sits_on(self, start: Model) -> bool:
        """Whether every layer below the cut is ``start``'s own object, so that its activations can be used."""
        if not isinstance(start, Transformer):
            return False
        mine, theirs = self.network.model, start.model
        below = zip(mine.layers[: self.scalar.cut], theirs.layers[: self.scalar.cut], strict=True)
        return mine.embed_tokens is theirs.embed_tokens and all(a is b for a, b in below)

    @property
    def network(self) -> Transformer:
        assert isinstance(self.scalar.model, Transformer)
        return self.scalar.model


def not_computed(kind: str) -> UserError:
    return UserError(
        f"A reward model needs an architecture that accord computes itself, such as Llama, Mistral or Qwen; {kind} is not one. "
        "Give another model, or let a function or a classifier give the reward (accord rl --reward)."
    )


def check_top_layers(top_layers: int, depth: int, name: str = "top_layers") -> None:
    """``name``: of the setting.

    Raises:
        UserError: the model has not so many layers.
    """
    if not 1 <= top_layers <= depth:
        raise UserError(f"{name} is {top_layers}; this model has {depth} layers, so use 1 to {depth}.")


def encode_completions(reader: Reader, completions: Sequence[Completion]) -> list[tuple[list[int], list[int]]]:
    """Ids of each prompt, and of its completion.

    Raises:
        UserError: a prompt has no tokens or does not leave room for its completion, or a completion is empty.
    """
    encoded = []
    for c in completions:
        answer = list(c.tokens) or reader.tokenizer.encode_completion(c.text, c.finished)
        if not answer:
            raise UserError(f"Prompt '{c.prompt.id}', completion {c.index} is empty; there is nothing to score.")
        asked = encode_named(reader.tokenizer, c.prompt)
        if len(asked) + len(answer) > reader.context:
            raise UserError(
                f"Prompt '{c.prompt.id}' has {len(asked)} tokens and its completion {c.index} has {len(answer)}, which together exceeds the "
                f"model's context of {reader.context}. Shorten the longer one, or leave it out."
            )
        encoded.append((asked, answer))
    return encoded


def _padded_apart(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a padding token that ends nothing, if it has one to spare.

    ``transformers`` reads a classifier's answer at the last token that is not padding; where padding is the
    end token, that would be the token before the end.
    """
    apart = Tokenizer(copy.deepcopy(tokenizer.inner), tokenizer.eos_ids)
    added = sorted(apart.inner.added_tokens_decoder.items())
    spare = [str(token) for number, token in added if token.special and number not in apart.eos_ids]
    if apart.pad_id in apart.eos_ids and spare:
        apart.inner.pad_token = spare[0]
        apart.pad_id = apart.inner.pad_token_id
    return apart


def _restore_top(scalar: ScalarModel, tensors: dict[str, Tensor]) -> None:
    """Put the trained layers back in the precision they were saved in, not the trunk's."""
    for name, parameter in scalar.model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(tensors[name])


def read_about(folder: Path) -> dict[str, Any]:
    path = folder / "accord.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a reward model saved by accord (no accord.json); train one with accord reward.")
    about = read_object(path)
    if about.get("kind") != "reward_model" or about.get("format") != FORMAT:
        raise UserError(
            f"{path}: kind {about.get('kind')!r} format {about.get('format')!r}; this accord reads reward_model format {FORMAT}."
        )
    for name, kinds in {"cut": (int,), "mean": (int, float), "scale": (int, float), "head_bias": (int, float), "trunk": (str,)}.items():
        value = about.get(name)
        if not isinstance(value, kinds) or isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{path}: field '{name}' is {value!r}; save the reward model again.")
    if about["cut"] < 0 or not 0 < about["scale"] < 1e38 or max(abs(about["mean"]), abs(about["head_bias"])) > 1e38:
        raise UserError(f"{path}: its cut, scale, mean or head_bias can be of no reward model; save it again.")
    return about
