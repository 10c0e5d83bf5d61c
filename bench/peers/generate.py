"""transformers.generate: plain (its default cache), with a static cache, and compiled."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import work
from transformers import AutoModelForCausalLM, AutoTokenizer

task = work.task()
model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.bfloat16).eval()
tokenizer = AutoTokenizer.from_pretrained(task["model"])
ways = {"plain": {}, "static": {"cache_implementation": "static", "disable_compile": True}, "compiled": {"cache_implementation": "static"}}
if task["way"] == "compiled":
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # it would go on uncompiled without a word
    model.forward = torch.compile(model.forward, dynamic=True)
    ways["compiled"]["disable_compile"] = True  # generate compiles on a GPU only; this is the same by hand
out = {}
for rows in task["rows"]:
    ids = torch.tensor([work.encode(tokenizer, text) for text in work.texts(rows)])

    @torch.no_grad()
    def run(new, ids=ids):
        got = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new,
            min_new_tokens=new, pad_token_id=0, **ways[task["way"]],
        )  # fmt: skip
        assert got.shape[1] == ids.shape[1] + new

    if task["way"] == "compiled":
        run(8), run(40)  # every shape that is timed
    out[str(rows)] = work.a_step(run)
work.report(seconds=out)
