"""TRL's GRPOTrainer and RLOOTrainer: one update an iteration, a reward function that costs nothing."""

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import trl
import work
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

task = work.task()
tokenizer = AutoTokenizer.from_pretrained(task["model"], padding_side="left")
tokenizer.pad_token_id = 0
policy = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.bfloat16)
ends = []


class Clock(TrainerCallback):
    def on_step_end(self, *_, **__):
        ends.append(time.perf_counter())


kinds = {"grpo": (trl.GRPOTrainer, trl.GRPOConfig), "rloo": (trl.RLOOTrainer, trl.RLOOConfig)}
Trainer, Config = kinds[task["algorithm"]]
with tempfile.TemporaryDirectory() as folder:
    config = Config(
        output_dir=folder, per_device_train_batch_size=work.ROWS, gradient_accumulation_steps=1, num_generations=4, num_iterations=1,
        max_completion_length=work.RESPONSE, temperature=1.0, beta=0.05, gradient_checkpointing=False, bf16=False, use_cpu=True,
        max_steps=1 + task["steps"], report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1000,
        generation_kwargs={"min_new_tokens": work.RESPONSE},
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": work.texts(work.ROWS * (1 + task["steps"]))})
    Trainer(
        model=policy, reward_funcs=lambda completions, **_: [len(c) / 100 for c in completions], args=config, train_dataset=data,
        processing_class=tokenizer, callbacks=[Clock()],
    ).train()  # fmt: skip
work.report(seconds=statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False)))
