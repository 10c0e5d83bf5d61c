"""TRL 1.12's PPOTrainer until a time is up: held-out reward and KL after every iteration, measured outside its clock.

It learns as its users run it: weights that train in float32 under bf16 autocast (updates of this size vanish in bf16 weights),
the value model from the reward model, TRL's own settings but for the task's.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import work
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

task = work.task()
tokenizer = AutoTokenizer.from_pretrained(task["model"], padding_side="left")
tokenizer.pad_token = "<|endoftext|>"  # ends nothing in this chat model
assert tokenizer.pad_token_id != tokenizer.eos_token_id
policy = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32)
reference = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.bfloat16)
reward = AutoModelForSequenceClassification.from_pretrained(task["reward"], dtype=torch.bfloat16)
value = AutoModelForSequenceClassification.from_pretrained(task["reward"], dtype=torch.float32)
for model in (policy, reference, reward, value):
    model.config.pad_token_id = tokenizer.pad_token_id
held = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids).flip(0) for ids in task["held"]], batch_first=True, padding_value=tokenizer.pad_token_id).flip(1)  # fmt: skip


@torch.no_grad()
def measure():
    """Mean normalised score of one completion of each held-out prompt, and mean KL to the reference (log-ratio, summed)."""
    torch.manual_seed(task["seed"] + 10**6)
    mask = (held != tokenizer.pad_token_id).long()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = policy.generate(
            held, attention_mask=mask, do_sample=True, temperature=task["temperature"], top_k=0, top_p=1.0,
            max_new_tokens=task["response"], eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        answer = rows[:, held.shape[1] :]
        ended = (answer == tokenizer.eos_token_id).int().cumsum(1)
        real = (ended == 0) | ((answer == tokenizer.eos_token_id) & (ended == 1))
        seen = torch.cat((mask, real.long()), 1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        logps = []
        for model in (policy, reference):
            logits = model(rows, attention_mask=seen, position_ids=positions).logits[:, held.shape[1] - 1 : -1].float()
            logps.append((logits / task["temperature"]).log_softmax(-1).gather(2, answer[..., None])[..., 0] * real)
        hidden = reward.model(rows, attention_mask=seen, position_ids=positions).last_hidden_state
        last = (seen * torch.arange(rows.shape[1])).argmax(1)
        raw = reward.score(hidden[torch.arange(len(rows)), last]).float()[:, 0]
    return float((raw.mean() + task["bias"] - task["mean"]) / task["scale"]), float((logps[0] - logps[1]).sum(1).mean())


curve, spent = [[0.0, *measure()]], 0.0
begun = None


class Clock(TrainerCallback):
    def on_train_begin(self, *_, **__):
        global begun
        begun = time.perf_counter()

    def on_step_end(self, args, state, control, **__):
        global begun, spent
        spent += time.perf_counter() - begun
        curve.append([spent, *measure()])
        print(curve[-1], file=sys.stderr, flush=True)
        if spent > task["limit"]:
            work.report(curve=curve)
            sys.stdout.flush()
            os._exit(0)
        begun = time.perf_counter()


with tempfile.TemporaryDirectory() as folder:
    config = PPOConfig(
        output_dir=folder, per_device_train_batch_size=task["rows"], gradient_accumulation_steps=1, num_mini_batches=task["minibatches"],
        num_ppo_epochs=4, total_episodes=task["rows"] * 1000, response_length=task["response"], temperature=task["temperature"],
        kl_coef=task["kl_coef"] * task["scale"], learning_rate=task["learning_rate"], lr_scheduler_type="constant", stop_token="eos",
        num_sample_generations=0, gradient_checkpointing=False, bf16=True, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, logging_steps=1000, local_rollout_forward_batch_size=task["rows"], seed=task["seed"],
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": task["train"] * 20})
    PPOTrainer(config, tokenizer, policy, reference, reward, data, value, eval_dataset=data.select(range(1)), callbacks=[Clock()]).train()
