"""On CUDA: the same numbers as on the CPU, within rounding. Skipped where there is no such device."""

import pytest
import torch
from conftest import save_model
from test_ppo import SMALL, letters

from accord.nn.transformer import Transformer
from accord.reward.sources import build_reward
from accord.rl.experience import score_rollout
from accord.rl.registry import ALGORITHMS
from accord.rl.selftest import self_test
from accord.rl.settings import RLSettings
from accord.rl.trainer import State
from accord.rollout.engine import Engine
from accord.rollout.policy import Policy
from accord.rollout.sampling import Sampling
from accord.rollout.scoring import score

pytestmark = pytest.mark.gpu
SAMPLING = Sampling(temperature=0.9, max_new_tokens=24, seed=3)


@pytest.fixture
def both(tmp_path):
    """The same tiny model on the CPU and on the GPU, in float32."""
    folder = save_model(tmp_path / "model", "llama")
    return [Policy.load(str(folder), "float32", device) for device in ("cpu", "cuda")]


def test_recorded_decoding_writes_what_the_cpu_writes(both, prompts):
    cpu, cuda = (Engine(policy, rows=5).sample(prompts, 3, SAMPLING) for policy in both)
    assert torch.equal(cuda.tokens.cpu(), cpu.tokens)
    assert torch.equal(cuda.finished.cpu(), cpu.finished)
    torch.testing.assert_close(cuda.engine_logprobs.cpu(), cpu.engine_logprobs, rtol=0, atol=1e-3)


def test_scores_agree_with_the_sampler(both, prompts):
    rollout = Engine(both[1], rows=5).sample(prompts, 3, SAMPLING)
    again = score(both[1].model, rollout, 0, 0.9, 256)
    torch.testing.assert_close(again.logprobs, rollout.engine_logprobs, rtol=0, atol=1e-3)


def test_logits_in_bf16(tmp_path):
    folder = save_model(tmp_path / "model", "llama")
    exact, rounded = (Policy.load(str(folder), dtype, device).model for dtype, device in (("float32", "cpu"), ("bfloat16", "cuda")))
    assert isinstance(exact, Transformer) and isinstance(rounded, Transformer)
    tokens = torch.arange(40).view(2, 20)
    torch.testing.assert_close(rounded(tokens.cuda()).float().cpu(), exact(tokens), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("adaptation", ["split", "lora", "full"])
@pytest.mark.parametrize("algorithm", ["ppo", "trpo", "dqn", "nlpo"])
def test_a_step_is_the_cpus(both, prompts, adaptation, algorithm):
    known = {name: value for name, value in SMALL.items() if name not in ALGORITHMS[algorithm].unused}
    settings = RLSettings(**{**known, "adaptation": adaptation, "algorithm": algorithm, "minibatches": 1})
    trained = []
    for policy in both:
        source = build_reward(letters, policy)
        state = State.begin(policy, source, settings)
        guide = state.algorithm.guide()
        rollout = Engine(state.policy).sample(prompts[:4], 2, settings.sampling(0), keep_trunk=True, guide=guide)
        old = state.algorithm.old_model(state.policy)
        scored = score_rollout(state.policy, state.critic, source, rollout, settings, guide, old)
        self_test(state.policy, scored, settings)
        experience = state.algorithm.advantages(scored, settings.kl_coef)
        state.optimizer.set_step(0)
        state.algorithm.update(state.policy, state.critic, state.optimizer, experience, 0)
        trained.append({n: p.detach().cpu() for n, p in state.policy.trainable().items()})
    for name, mine in trained[0].items():
        # AdamW's first steps move by the learning rate whatever the gradient's size, so a sign may differ where it is all but 0.
        share = ((trained[1][name] - mine).abs() > 1e-4).float().mean()
        assert float(share) < 0.02, name
