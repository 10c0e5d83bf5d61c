"""TRL 1.12's PPOTrainer, the last release that has one: every model in bf16, no checkpointing of activations."""

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import work
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

task = work.task()
tokenizer = AutoTokenizer.from_pretrained(task["model"], padding_side="left")
tokenizer.pad_token_id = 0
policy, reference = (AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.bfloat16) for _ in range(2))
reward, value = (AutoModelForSequenceClassification.from_pretrained(task["model"], num_labels=1, dtype=torch.bfloat16) for _ in range(2))
lora = None
if task.get("lora"):
    from peft import LoraConfig

    lora, reference = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), None
ends = []


class Clock(TrainerCallback):
    def on_step_end(self, *_, **__):
        ends.append(time.perf_counter())


with tempfile.TemporaryDirectory() as folder:
    config = PPOConfig(
        output_dir=folder, per_device_train_batch_size=work.ROWS, gradient_accumulation_steps=1,  # an optimizer step a minibatch
        num_mini_batches=task["minibatches"], num_ppo_epochs=task["epochs"], total_episodes=work.ROWS * (1 + task["steps"]),
        response_length=work.RESPONSE, temperature=1.0, num_sample_generations=0, gradient_checkpointing=False, bf16=False, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1000, local_rollout_forward_batch_size=work.ROWS,
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": [work.encode(tokenizer, text) for text in work.texts(work.ROWS * (2 + task["steps"]))]})
    trainer = PPOTrainer(config, tokenizer, policy, reference, reward, data, value, eval_dataset=data.select(range(1)), callbacks=[Clock()], peft_config=lora)  # fmt: skip
    trainer.train()
work.report(seconds=statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False)))
