"""TRL's SFTTrainer, every weight trained, in bf16: the steps of one epoch, which is what a second one adds."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import trl
import work
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

task = work.task()
tokenizer = AutoTokenizer.from_pretrained(task["model"])
model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.bfloat16)


def run(count, epochs):
    prompts, answers, _ = zip(*work.pairs(count), strict=True)
    with tempfile.TemporaryDirectory() as folder:
        config = trl.SFTConfig(
            output_dir=folder, per_device_train_batch_size=task["batch"], num_train_epochs=epochs, gradient_checkpointing=False, bf16=False,
            use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1000, max_length=128,
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": list(prompts), "completion": list(answers)})
        trl.SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer).train()


run(task["batch"], 1)  # one step to warm up
one, two = (work.clock(lambda n=n: run(task["examples"], n)) for n in (1, 2))
work.report(seconds=two - one)
