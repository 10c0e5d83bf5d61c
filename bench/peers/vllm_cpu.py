"""vLLM on a CPU, sampling: all prompts at once, so that they are read in one step and then decoded side by side."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import work
from vllm import LLM, SamplingParams

task = work.task()
model = LLM(
    task["model"], dtype="bfloat16", max_model_len=512, max_num_seqs=max(task["rows"]), max_num_batched_tokens=8192, enable_prefix_caching=False,
    disable_log_stats=True,
)  # fmt: skip
tokenizer = model.get_tokenizer()
out = {}
for rows in task["rows"]:
    prompts = [{"prompt_token_ids": work.encode(tokenizer, text)} for text in work.texts(rows)]

    def run(new, prompts=prompts):
        got = model.generate(prompts, SamplingParams(temperature=1.0, max_tokens=new, ignore_eos=True, detokenize=False), use_tqdm=False)
        assert all(len(answer.outputs[0].token_ids) == new for answer in got)

    out[str(rows)] = work.a_step(run)
work.report(seconds=out)
