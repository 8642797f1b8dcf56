"""torch.svd_lowrank on a GPU, as svd-training calls it, and the values in f64.

    svd_gpu_peer.py GPU RANK_FRACTION MATRIX.safetensors…

Prints a JSON object for each matrix: seconds with the matrix on the GPU before and its factors left there, and seconds from
this process's memory and back to it.
"""

import json
import sys
from time import perf_counter

import torch
from safetensors.torch import load_file

DEVICE, FRACTION = f"cuda:{sys.argv[1]}", float(sys.argv[2])

for path in sys.argv[3:]:
    here = load_file(path)["matrix"]
    matrix = here.to(DEVICE)
    q = int(FRACTION * min(matrix.shape))
    seconds, seconds_from_memory = [], []
    for _ in range(6):
        torch.cuda.synchronize()
        started = perf_counter()
        _, sigma, _ = torch.svd_lowrank(matrix, q=q, niter=2)
        torch.cuda.synchronize()
        seconds.append(perf_counter() - started)
        started = perf_counter()
        for factor in torch.svd_lowrank(here.to(DEVICE), q=q, niter=2):
            factor.cpu()
        seconds_from_memory.append(perf_counter() - started)
    short = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).double()
    values = torch.linalg.eigvalsh(short @ short.T).flip(0)[:q].sqrt()
    answer = {
        "seconds": seconds[1:],
        "seconds_from_memory": seconds_from_memory[1:],
        "sigma": sigma.tolist(),
        "reference": values.tolist(),
    }
    print(json.dumps(answer), flush=True)
