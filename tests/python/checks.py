#!/usr/bin/env python3
"""Judges what svdhub wrote by programs that are not ours.

    checks.py artifact BASE DECOMPOSITION MERGED
    checks.py peft BASE EXPORT MERGED [--tied-head]
    checks.py lora BASE ADAPTER LOGITS
    checks.py svd-training EXPORT MERGED

`artifact` reads a decomposition by its specification alone: JSON schema, sums, singular values against LAPACK in f64, every weight
restored in another order of summation; transformers must refuse it, and load the untrained MERGED as BASE, byte for byte.

`peft` loads BASE and EXPORT through PeftModel.from_pretrained: exactly the adapter's modules are touched, the weights
that PEFT adds differ from the merged model's change by what report.json measured, and where that is nothing, the
logits are the merged model's and so are the weights after merge_and_unload. With --tied-head the adapter holds the head
of a base whose head is the embedding: merging goes wrong there, and is done on an untied copy, as PEFT recommends.

`lora` loads BASE and ADAPTER, a LoRA that svdhub trained, through PeftModel.from_pretrained: exactly the adapter's
modules are touched, and its logits are those of the decoder that trained it, which lie in LOGITS with the ids they answer;
so are those after merge_and_unload.

`svd-training` makes the library's model with create_from_model, loads EXPORT strictly, and compares logits, and weights
after merge().

Exits with 0 and prints one line of JSON, or with 1 and one line of what differs.
"""
import argparse
import json
import pathlib
import sys
import tempfile
import warnings

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = pathlib.Path(__file__).resolve().parent
LENGTH = 48
# Two orders of summation in f32: each of some fifty products on the way adds a few 2⁻²⁴ of its size. Seen: up to 1e-6.
LOGITS = 1e-5
# The merged weights are rounded once to f32, and so are B and A; the sums that PEFT forms are f32, too.
WEIGHTS = 2e-6


class Differs(Exception):
    pass


def check(holds, message):
    if not holds:
        raise Differs(message)


def load(directory, **options):
    model = AutoModelForCausalLM.from_pretrained(
        directory, torch_dtype=torch.float32, attn_implementation="eager", **options
    )
    return model.eval()


def logits(model):
    vocabulary = model.config.vocab_size
    ids = torch.tensor([[(i * i * 7 + i * 3 + 1) % vocabulary for i in range(LENGTH)]])
    with torch.no_grad():
        return model(ids, use_cache=False).logits[0].double()


def compare_logits(what, found, wanted, tolerance=LOGITS):
    scale = wanted.abs().max()
    check(scale > 1e-3, f"{what}: the logits are dead")
    off = ((found - wanted).abs().max() / scale).item()
    check(off < tolerance, f"{what}: logits are {off:.1e} off, allowed {tolerance:.0e}")
    return off


def compare_weights(what, found, wanted):
    """State dicts of the same names, each tensor within roundings of its largest element."""
    check(found.keys() == wanted.keys(), f"{what}: names differ: {sorted(found.keys() ^ wanted.keys())[:5]}")
    worst = 0.0
    for name, tensor in wanted.items():
        scale = tensor.abs().max().clamp(min=1e-30)
        off = ((found[name].double() - tensor.double()).abs().max() / scale).item()
        check(off < WEIGHTS, f"{what}: `{name}` is {off:.1e} off")
        worst = max(worst, off)
    return worst


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def artifact(arguments):
    """What an independent reader of SPEC.md makes of a decomposition that nobody trained."""
    import hashlib
    from importlib.metadata import version

    import jsonschema
    from safetensors import safe_open
    from transformers import AutoModel

    facts = {name: version(name) for name in ("jsonschema", "safetensors", "torch", "transformers")}
    directory, base_dir = pathlib.Path(arguments.decomposition), pathlib.Path(arguments.base)
    for loader in (AutoModel, AutoModelForCausalLM):
        try:
            loader.from_pretrained(directory)
        except OSError:
            continue
        raise Differs(f"{loader.__name__} takes the decomposition for a model")

    section = json.loads((directory / "config.json").read_text())["svd"]
    schema = json.loads((HERE / "../../src/format/svd-section.schema.json").read_text())
    jsonschema.validate(section, schema)
    index = json.loads((directory / "svd.safetensors.index.json").read_text())
    sums = index["metadata"]["sha256"]
    for file, expected in sums["files"].items():
        check(hashlib.sha256((directory / file).read_bytes()).hexdigest() == expected, f"sha256 of {file}")
    held, total = {}, 0
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(directory / file, "pt") as shard:
            for name in shard.keys():
                tensor = shard.get_tensor(name)
                check(index["weight_map"][name] == file, f"the index has another place for {name}")
                check(hashlib.sha256(raw(tensor)).hexdigest() == sums["tensors"][name], f"sha256 of {name}")
                held[name], total = tensor, total + tensor.nbytes
    check(held.keys() == index["weight_map"].keys(), "index and shards differ")
    check(total == index["metadata"]["total_size"], "total_size")

    base = {}
    for file, expected in section["base"]["sha256"].items():
        check(hashlib.sha256((base_dir / file).read_bytes()).hexdigest() == expected, f"the base's {file}")
        base |= load_file(base_dir / file)
    torch.manual_seed(0)
    worst = 0.0
    for module, record in section["modules"].items():
        m = base[f"{record['tied_to'] or module}.weight"]
        check(hashlib.sha256(raw(m)).hexdigest() == record["sha256"], f"sha256 of {module}")
        u, sigma, v = (held[f"{module}.{part}"].double() for part in ("u", "sigma", "v"))
        check(bool((sigma[:-1] >= sigma[1:]).all()), f"{module}: σ does not descend")
        truth = torch.linalg.svdvals(m.double())[: record["q"]]
        worst = max(worst, ((sigma - truth).abs() / truth).max().item())
        if section["layout"] == "residual":
            # another order than anybody else's, and PyTorch's way to 16 bits, which is through f32
            order = torch.randperm(record["q"])
            product = (u[order] * sigma[order, None]).T @ v[order]
            restored = (held[f"{module}.residual"].double() + product).to(m.dtype).flatten()
            if record["exceptions"]:
                at = held[f"{module}.exact_index"].to(torch.int64)
                restored[at] = held[f"{module}.exact_value"]
            check(raw(restored) == raw(m), f"{module}: M does not come back")
    check(worst <= section["algorithm"]["tolerance"], f"σ is {worst:.1e} off")
    if section["layout"] == "residual":
        carried = base.keys() - {f"{module}.weight" for module in section["modules"]}
        check(all(raw(held[name]) == raw(base[name]) for name in carried), "what is carried along differs")

    merged = AutoModelForCausalLM.from_pretrained(arguments.merged, torch_dtype="auto")
    original = AutoModelForCausalLM.from_pretrained(base_dir, torch_dtype="auto")
    ours = merged.state_dict()
    for name, tensor in original.state_dict().items():
        check(raw(ours[name]) == raw(tensor), f"{name} of the merged model")
    return facts | {"modules": len(section["modules"]), "sigma_error": worst}


def raw(tensor):
    """A tensor's bytes as safetensors stores them."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def with_adapter(base, adapter):
    """The model with PEFT's adapter on it, loaded without complaint; the layers it touches, and those it saves whole."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, str(adapter)).eval()
    said = [str(w.message) for w in said]
    loaded = [text for text in said if "missing" in text or "unexpected" in text or "not found" in text]
    check(not loaded, f"PEFT complains: {loaded}")
    # exactly the modules of the adapter
    modules = dict(model.base_model.model.named_modules())
    touched = {name for name, module in modules.items() if isinstance(module, LoraLayer)}
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    stored = load_file(adapter / "adapter_model.safetensors")
    held = {key[len(prefix) : -len(suffix)] for key in stored if key.endswith(suffix)}
    check(touched == held, f"PEFT touches other modules than the adapter holds: {sorted(touched ^ held)[:5]}")
    saved = {name for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)}
    config = json.loads((adapter / "adapter_config.json").read_text())
    check(saved == set(config["modules_to_save"] or []), f"PEFT saves other modules: {sorted(saved)[:5]}")
    return model, touched, saved


def peft(arguments):
    import peft
    from peft import PeftModel

    facts = {"peft": peft.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    export = pathlib.Path(arguments.export)
    report = json.loads((export / "report.json").read_text())["export"]
    config = json.loads((export / "adapter_config.json").read_text())
    base, merged = load(arguments.base), load(arguments.merged)
    before, after = tensors(base), tensors(merged)
    untouched = logits(base)
    model, touched, saved = with_adapter(base, export)
    inner = model.base_model.model
    check(touched == set(report["modules"]), "report.json names other modules")
    check(sorted(saved) == sorted(report["modules_to_save"]), "report.json names other modules_to_save")

    # in the space of weights: what PEFT adds against what merging changed
    off_all = change_all = 0.0
    for name in touched:
        layer = inner.get_submodule(name)
        added = layer.get_delta_weight("default").double()
        key = f"{name}.weight"
        original = before[key].double()
        # where the head is the embedding, the merged model has it under both names
        change = after[key].double() - original
        off, size = (change - added).norm().item(), change.norm().item()
        wanted = report["modules"][name]["measured_error"]
        if size > 0.0:
            # rounding the merged weight to f32 is no part of what report.json measured
            slack = 1e-5 + 2.0**-24 * original.norm().item() / size
            check(abs(off / size - wanted) < slack, f"{name}: error {off / size:.3e}, report.json says {wanted:.3e}")
        else:
            check(added.norm().item() == 0.0, f"{name}: is not changed by merging, but by PEFT")
        off_all, change_all = off_all + off**2, change_all + size**2
    error = (off_all / change_all) ** 0.5 if change_all else 0.0
    check(abs(error - report["measured_error"]) < 1e-5, f"error {error:.3e}, report.json says {report['measured_error']:.3e}")
    check(abs(error - report["predicted_error"]) < 1e-4, f"error {error:.3e}, foretold {report['predicted_error']:.3e}")
    facts |= {"modules": len(touched), "saved": len(saved), "rank": config["r"], "weight_error": error}

    answers = logits(model)
    moved = ((answers - untouched).abs().max() / untouched.abs().max()).item()
    facts["moved"] = moved
    check(moved > 1e-2 or not change_all, f"the adapter moves the logits by {moved:.1e} only: this shows nothing")
    if report["predicted_error"] == 0.0:
        facts["logits"] = compare_logits("adapter", answers, logits(merged))
        if arguments.tied_head:
            check(base.config.tie_word_embeddings, "the base has a head of its own")
            # what export warns of: one matrix cannot be the moved head and the unmoved embedding
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mixed = logits(model.merge_and_unload())
            off = ((mixed - answers).abs().max() / answers.abs().max()).item()
            check(off > 100 * LOGITS, f"merging on a tied base is only {off:.1e} off: the warning of export is idle")
            facts["merged_tied_off"] = off
            with tempfile.TemporaryDirectory() as folder:
                untied = load(arguments.base, tie_word_embeddings=False)
                untied.lm_head.weight.data = untied.model.embed_tokens.weight.data.clone()
                untied.save_pretrained(folder)
                untied.config.save_pretrained(folder)
                model = PeftModel.from_pretrained(load(folder), arguments.export).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            whole = model.merge_and_unload()
        facts["logits_merged"] = compare_logits("merge_and_unload", logits(whole), logits(merged))
        facts["weights_merged"] = compare_weights("merge_and_unload", tensors(whole), after)
    return facts


def lora(arguments):
    import peft

    facts = {"peft": peft.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    adapter = pathlib.Path(arguments.adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    asked = json.loads(pathlib.Path(arguments.logits).read_text())
    ids, wanted = torch.tensor([asked["ids"]]), torch.tensor(asked["logits"], dtype=torch.double)
    base = load(arguments.base)
    with torch.no_grad():
        untouched = base(ids, use_cache=False).logits[0].double()
    model, touched, saved = with_adapter(base, adapter)
    linear = {name for name, module in load(arguments.base).named_modules() if isinstance(module, torch.nn.Linear)}
    if base.config.tie_word_embeddings:
        linear.discard("lm_head")
    check(touched == linear, f"not all linear layers: {sorted(touched ^ linear)[:5]}")
    facts |= {"modules": len(touched), "saved": len(saved), "rank": config["r"], "alpha": config["lora_alpha"]}

    facts["moved"] = ((wanted - untouched).abs().max() / untouched.abs().max()).item()
    check(facts["moved"] > 1e-2, f"the adapter moves the logits by {facts['moved']:.1e} only: this shows nothing")
    with torch.no_grad():
        facts["logits"] = compare_logits("adapter", model(ids, use_cache=False).logits[0].double(), wanted)
        whole = model.merge_and_unload()
        facts["logits_merged"] = compare_logits("merged", whole(ids, use_cache=False).logits[0].double(), wanted)
    return facts


def svd_training(arguments):
    from importlib.metadata import version

    from svd_training.svd_linear import SVDLinear
    from svd_training.svd_model import SVDForCausalLM

    facts = {name: version(name) for name in ("svd-training", "torch", "transformers")}
    export = pathlib.Path(arguments.export)
    report = json.loads((export / "report.json").read_text())["export"]
    merged = load(arguments.merged)
    wanted = logits(merged)
    try:
        AutoModelForCausalLM.from_pretrained(export)
        check(False, "transformers takes the state dict, M′ and all, for a model")
    except OSError:
        pass
    torch.manual_seed(0)
    empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(export), attn_implementation="eager")
    model = SVDForCausalLM.create_from_model(empty, rank_fraction=report["rank_fraction"]).eval()
    state = load_file(export / "svd_training.safetensors")
    model.load_state_dict(state, strict=True)
    layers = [module for module in model.modules() if isinstance(module, SVDLinear)]
    check(len(layers) == sum(key.endswith(".sigma") for key in state), "the library has other layers")
    facts |= {"layers": len(layers), "logits": compare_logits("SVDForCausalLM", logits(model), wanted)}
    model.merge()
    facts["logits_merged"] = compare_logits("merge()", logits(model), wanted)
    ours = dict(merged.state_dict())
    facts["weights_merged"] = compare_weights("merge()", tensors(model), ours)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        facts["logits_saved"] = compare_logits("saved and loaded", logits(load(folder)), wanted)
    return facts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    mode = modes.add_parser("artifact")
    mode.add_argument("base")
    mode.add_argument("decomposition")
    mode.add_argument("merged")
    mode = modes.add_parser("peft")
    mode.add_argument("base")
    mode.add_argument("export")
    mode.add_argument("merged")
    mode.add_argument("--tied-head", action="store_true")
    mode = modes.add_parser("lora")
    mode.add_argument("base")
    mode.add_argument("adapter")
    mode.add_argument("logits")
    mode = modes.add_parser("svd-training")
    mode.add_argument("export")
    mode.add_argument("merged")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    try:
        modes = {"artifact": artifact, "lora": lora, "peft": peft, "svd-training": svd_training}
        facts = modes[arguments.mode](arguments)
    except Differs as difference:
        print(f"{arguments.mode}: {difference}", file=sys.stderr)
        sys.exit(1)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
