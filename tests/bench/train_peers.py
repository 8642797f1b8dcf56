"""One of the training benchmark's peers: some steps on random tokens, in a process of its own.

    train_peers.py METHOD MODEL RANK_FRACTION BATCH LENGTH STEPS THREADS DEVICE

On a GPU the model is bf16, on a CPU f32.

Prints one JSON object: the seconds of each step after the first, which warms up, and the versions.
"""

import json
import logging
import os
import sys
from importlib.metadata import version
from time import perf_counter

# libraries print: what they say goes to stderr, and the answer keeps stdout to itself
ANSWER = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import torch
from transformers import AutoModelForCausalLM

METHOD, MODEL = sys.argv[1:3]
RANK_FRACTION = float(sys.argv[3])
BATCH, LENGTH, STEPS, THREADS = (int(x) for x in sys.argv[4:8])
DEVICE = sys.argv[8]
ON_GPU = DEVICE != "cpu"


def lora(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def lora_checkpointing(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return lora(model)


def svd_training(model):
    from svd_training.svd_model import SVDForCausalLM

    logging.disable(logging.INFO)  # a line per matrix
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # Σ alone, as ours
    return SVDForCausalLM.create_from_model(model, RANK_FRACTION)


METHODS = {
    "peft-lora-8": lora,
    "peft-lora-8-checkpointing": lora_checkpointing,
    "svd-training": svd_training,
    "full": lambda model: model,
}


def now():
    if ON_GPU:
        torch.cuda.synchronize()
    return perf_counter()


def main():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    # there is no SVD in 16 bits
    dtype = torch.bfloat16 if ON_GPU and METHOD != "svd-training" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).to(DEVICE)
    model.config.use_cache = False
    model = METHODS[METHOD](model)
    if dtype is torch.float32 and ON_GPU:
        model = model.to(torch.bfloat16)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    seconds = []
    for _ in range(STEPS + 1):
        ids = torch.randint(0, model.config.vocab_size, (BATCH, LENGTH), device=DEVICE)
        started = now()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(now() - started)
    packages = ["torch", "transformers", "peft", "svd-training"]
    answer = {
        "seconds": seconds[1:],
        "trained": sum(parameter.numel() for parameter in trained),
        "versions": {package: version(package) for package in packages},
    }
    print(json.dumps(answer), file=ANSWER, flush=True)


main()
