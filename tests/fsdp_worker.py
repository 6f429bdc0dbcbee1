"""Run by `test_fsdp.py`, in one process or under FSDP2 in several: prints the losses of three training steps, and what the
model answers then."""

import os

import torch
from tiny_models import random_prompts, tiny_model
from torch.distributed.fsdp import fully_shard

from saisa_hf.training import freeze_all_but


world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
model = tiny_model("qwen2").train()
freeze_all_but(model, "projectors+language_model")
if world > 1:
    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
prompts = random_prompts(seed=3)
labels = prompts.input_ids.masked_fill(prompts.attention_mask == 0, -100).masked_fill(prompts.visual, -100)
rows = slice(rank * 4 // world, (rank + 1) * 4 // world)
first, last = sum(prompts.images[: rows.start]), sum(prompts.images[: rows.stop])
assert last > first
for _ in range(3):
    loss = model(
        input_ids=prompts.input_ids[rows],
        attention_mask=prompts.attention_mask[rows],
        pixel_values=prompts.pixel_values[first:last],
        labels=labels[rows],
        num_items_in_batch=int((labels != -100).sum()),
        skip_logits=True,
        use_cache=False,
    ).loss
    (loss * world).backward()  # FSDP averages over the processes
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach().clone()
    if world > 1:
        torch.distributed.all_reduce(total)
    if rank == 0:
        print(f"loss {total.item():.8f}")
model.eval()
with torch.no_grad():
    prompt = {name: x[rows] for name, x in prompts.prompt.items() if name != "pixel_values"}
    prompt["pixel_values"] = prompts.pixel_values[first:last]
    logits = model(**prompt).logits[prompts.text[rows]]
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)[:, -4:]
parts = [torch.zeros(3, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.long)]
parts[0] += torch.stack([logits.double().sum(), logits.double().abs().sum(), logits.double().square().sum()])
parts[1][rows] = answer
if world > 1:
    for part in parts:
        torch.distributed.all_reduce(part)
if rank == 0:
    print("logits", *parts[0].tolist(), "answers", *parts[1].flatten().tolist())
if world > 1:
    sharded = {type(module).__name__ for module in model.modules() if hasattr(module, "unshard")}
    assert sharded == {"FSDPSaisaDecoderLayer", "FSDPSaisaForConditionalGeneration"}, sharded
    torch.distributed.destroy_process_group()
