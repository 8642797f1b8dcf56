"""The Python peers of the benchmark: one resident process, one JSON object per line in and out.

Started by svd.rs, which says what to do and how many threads to use. Every time is wall time of the peer's own call:
reading the matrix, and writing the factors for the accuracy to be measured, happen outside of it.
"""

import gc
import json
import logging
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter

# libraries print: what they say goes to stderr, and the answers keep stdout to themselves
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

THREADS = int(sys.argv[1])
PACKAGES = ["torch", "numpy", "scipy", "scikit-learn", "transformers", "safetensors", "threadpoolctl", "svd-training"]

missing = {}  # peer: why it cannot run


def versions():
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def needs(*peers):
    """Runs an import block; what it lacks is noted for the peers that need it."""

    class Block:
        def __enter__(self):
            return self

        def __exit__(self, kind, error, _):
            if kind is not None and issubclass(kind, Exception):
                for peer in peers:
                    missing.setdefault(peer, f"{kind.__name__}: {error}")
                return True

    return Block()


LOWRANK, TORCH_FULL = "torch.svd_lowrank", "torch.linalg.svd"
RANDOMIZED, GESDD = "sklearn.randomized_svd", "scipy gesdd"
MODEL = "svd-training"

import numpy as np  # without these two there is nothing to compare: the error is the answer
import safetensors.numpy

with needs(LOWRANK, TORCH_FULL, MODEL):
    import torch

    torch.set_num_threads(THREADS)
with needs(RANDOMIZED):
    from sklearn.utils.extmath import randomized_svd
with needs(GESDD):
    import scipy.linalg
with needs(MODEL):
    from transformers import AutoModelForCausalLM

BLAS = []
with needs():
    import threadpoolctl

    LIMIT = threadpoolctl.threadpool_limits(THREADS)  # numpy's, scipy's and torch's pools, all of them
    for pool in threadpoolctl.threadpool_info():
        names = [pool.get("internal_api"), pool.get("version"), pool.get("architecture")]
        BLAS.append(" ".join(str(name) for name in names if name) + f" × {pool['num_threads']}")


# ---- one matrix ------------------------------------------------------------------------------------------------


class Matrix:
    """The matrix at hand (m, n), for numpy and torch in the same memory."""

    def __init__(self, path):
        self.array = safetensors.numpy.load_file(path)["matrix"]
        self.tensor = torch.from_numpy(self.array) if LOWRANK not in missing else None
        self.results = {}


# each: (U (m, q), σ (q,), Vᵀ (q, n)), computed as its users call it
def svd_lowrank(matrix, q):
    # svd_training/svd_linear.py of svd-training 0.0.2, SVDLinear.create_from_weight
    u, sigma, v = torch.svd_lowrank(matrix.tensor, q=q, niter=2)
    return u, sigma, v.T


def torch_full(matrix, _):
    return torch.linalg.svd(matrix.tensor, full_matrices=False)


def randomized(matrix, q):
    return randomized_svd(matrix.array, n_components=q, random_state=0)


def gesdd(matrix, _):
    return scipy.linalg.svd(matrix.array, full_matrices=False, lapack_driver="gesdd")


PEERS = {LOWRANK: svd_lowrank, TORCH_FULL: torch_full, RANDOMIZED: randomized, GESDD: gesdd}


def run(matrix, peer, q):
    matrix.results.pop(peer, None)  # its memory is free again before the next round
    gc.collect()
    started = perf_counter()
    result = PEERS[peer](matrix, q)
    seconds = perf_counter() - started
    matrix.results[peer] = result
    return {"seconds": seconds}


def keep(matrix, peer, q, path):
    """Writes the q leading triplets of the peer's last result, vectors in rows."""
    u, sigma, v = (np.asarray(x) for x in matrix.results[peer])
    factors = {"u": u.T[:q], "sigma": sigma[:q], "v": v[:q]}
    safetensors.numpy.save_file({name: np.ascontiguousarray(x, np.float32) for name, x in factors.items()}, path)
    return {}


def reference(matrix, q):
    """All singular values in f64, good to better than 1e-7 relative down to the q-th.

    The Gram matrix errs by about κ²·2⁻⁵³ where κ = σ₁/σ_q: enough up to κ = 1e4; beyond, LAPACK's dgesdd, which errs by κ·2⁻⁵³.
    """
    a = matrix.array if matrix.array.shape[0] <= matrix.array.shape[1] else matrix.array.T
    a = a.astype(np.float64)
    sigma = np.sqrt(np.linalg.eigvalsh(a @ a.T)[::-1].clip(0.0))
    how = "numpy eigvalsh of the Gram matrix, f64"
    if sigma[0] > 1e4 * sigma[q - 1]:
        sigma, how = np.linalg.svd(a, compute_uv=False), "numpy svd (dgesdd, values only), f64"
    return {"sigma": sigma.tolist(), "how": how}


# ---- a whole model ---------------------------------------------------------------------------------------------


class Restated:
    """What svd-training 0.0.2 computes (svd_model.py and svd_linear.py), for where the package is not installed."""

    TARGETS = ("down_proj", "up_proj", "gate_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "qkv_proj")

    def __init__(self, u, sigma, v, weight):
        self.u, self.sigma, self.v, self.weight = (x.contiguous() for x in (u, sigma, v, weight))

    @staticmethod
    def create_from_weight(weight, rank_fraction=0.1, niter=2):
        q = int(min(weight.shape) * rank_fraction)
        u, sigma, v = torch.svd_lowrank(weight, q=q, niter=niter)
        return Restated(u, sigma, v, weight - u @ torch.diag(sigma) @ v.T)

    @staticmethod
    def create_from_model(model, rank_fraction):
        made = [Restated.create_from_weight(model.lm_head.weight, rank_fraction)]
        for layer in model.model.layers:
            for name, module in layer.named_modules():
                if name.split(".")[-1] in Restated.TARGETS:
                    made.append(Restated.create_from_weight(module.weight, rank_fraction))
        return made


def model(directory, f):
    """svd-training's create_from_model on a freshly loaded model, in f32 as its users must on a CPU."""
    try:
        from svd_training.svd_linear import SVDLinear as linear
        from svd_training.svd_model import SVDForCausalLM as whole

        how = f"svd-training {versions().get('svd-training', '(no version)')}"
    except ImportError:
        linear, whole, how = Restated, Restated, "svd-training 0.0.2, restated: the package is not installed"
    logging.disable(logging.INFO)  # a line per matrix, which we do not want to time
    loaded = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)
    head, calls, original = loaded.lm_head.weight, [], linear.create_from_weight

    def timed(weight, *rest):
        started = perf_counter()
        made = original(weight, *rest)
        calls.append((weight is head, perf_counter() - started))
        return made

    linear.create_from_weight = staticmethod(timed)
    try:
        gc.collect()
        started = perf_counter()
        made = whole.create_from_model(loaded, f)
        seconds = perf_counter() - started
        del made
    finally:
        linear.create_from_weight = staticmethod(original)
    return {
        "how": how,
        "seconds": seconds,
        "head_seconds": sum(spent for is_head, spent in calls if is_head),
        "linear_layers": len(calls),
    }


# ---- the conversation ------------------------------------------------------------------------------------------


def warm_up():
    """Starts the thread pools and touches each peer once, so that no round pays for it."""
    a = np.random.default_rng(0).standard_normal((64, 96), np.float32)
    small = Matrix.__new__(Matrix)
    small.array, small.results = a, {}
    small.tensor = torch.from_numpy(a) if LOWRANK not in missing else None
    for peer in PEERS:
        if peer not in missing:
            with needs(peer):
                run(small, peer, 8)


def main():
    warm_up()
    matrix = None
    for line in sys.stdin:
        request = json.loads(line)
        what = request.pop("do")
        try:
            if what == "hello":
                answer = {"versions": versions(), "blas": BLAS, "missing": missing}
            elif what == "load":
                matrix = None
                matrix, answer = Matrix(**request), {}
            elif what == "model":
                matrix = None
                answer = model(**request)
            else:
                answer = {"run": run, "keep": keep, "reference": reference}[what](matrix, **request)
        except Exception as error:  # one peer's failure is its own: the benchmark says so and goes on
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=ANSWERS, flush=True)


main()
