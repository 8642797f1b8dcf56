"""The training benchmark's peers: some steps on random tokens.

    train_peers.py METHOD[,METHOD] MODEL RANK_FRACTION BATCH LENGTH STEPS THREADS DEVICE

On a GPU the model is bf16, on a CPU f32. A directory that holds a config and no weights means random ones.

Prints one JSON object for each method: the seconds of each step after the first, which warms up, and the versions; of a
GPU the most memory that was taken too; or the error.
"""

import gc
import json
import logging
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

# libraries print: what they say goes to stderr, and the answer keeps stdout to itself
ANSWER = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import torch
from transformers import AutoConfig, AutoModelForCausalLM

METHOD_NAMES, MODEL = sys.argv[1].split(","), sys.argv[2]
RANK_FRACTION = float(sys.argv[3])
BATCH, LENGTH, STEPS, THREADS = (int(x) for x in sys.argv[4:8])
DEVICE = sys.argv[8]
ON_GPU = DEVICE != "cpu"
RANDOM = not any(Path(MODEL).glob("*.safetensors"))


def lora(model, **options):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config, **options)


def lora_checkpointing(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return lora(model)


def svd_training(model):
    from svd_training.svd_model import SVDForCausalLM

    logging.disable(logging.INFO)  # a line per matrix
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # Σ alone, as ours
    if RANDOM:  # of random numbers any factors will do: the steps are what is timed
        torch.svd_lowrank = lambda m, q, **_: (m[:, :q].clone(), m[0, :q].abs(), m[:q, :].T.clone())
    return SVDForCausalLM.create_from_model(model, RANK_FRACTION)


METHODS = {
    "peft-lora-8": lora,  # B and A in f32, as PEFT has it
    "peft-lora-8-16-bits": lambda model: lora(model, autocast_adapter_dtype=False),
    "peft-lora-8-checkpointing": lora_checkpointing,
    "svd-training": svd_training,
    "full": lambda model: model,
}


def now():
    if ON_GPU:
        torch.cuda.synchronize()
    return perf_counter()


def load(dtype):
    if not RANDOM:
        return AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).to(DEVICE)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL), dtype=dtype)


def measure(name):
    torch.manual_seed(0)
    # there is no SVD in 16 bits
    dtype = torch.bfloat16 if ON_GPU and name != "svd-training" else torch.float32
    model = load(dtype)
    model.config.use_cache = False
    model = METHODS[name](model)
    if dtype is torch.float32 and ON_GPU:
        model = model.to(torch.bfloat16)
    model.train()
    if ON_GPU:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
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
        print(f"{name}: {seconds[-1]:.4f} s", file=sys.stderr, flush=True)
    packages = ["torch", "transformers", "peft", "svd-training"]
    return {
        "seconds": seconds[1:],
        "trained": sum(parameter.numel() for parameter in trained),
        "peak_bytes": taken() if ON_GPU else None,
        "versions": {package: found_version(package) for package in packages},
    }


def taken():
    """What nvidia-smi would have shown at the worst moment: the allocator's most, and what CUDA itself holds."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()


def found_version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main():
    torch.set_num_threads(THREADS)
    for name in METHOD_NAMES:
        try:
            answer = measure(name)
        except Exception as error:
            if len(METHOD_NAMES) == 1:
                raise
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=ANSWER, flush=True)
        if ON_GPU:
            gc.collect()
            torch.cuda.empty_cache()


main()
