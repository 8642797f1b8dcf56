//! Every family and every method on a GPU, where there is one: what they give on the CPU.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use svdhub::model::{
    Cache, Decoder, Lora, Method, Parametrisation, Segment, Segments, Trained, gpu,
};

use crate::differences::{decomposed, move_from_zero};
use crate::memory::Memory;
use crate::transformers::{golden, ids, model};

const FAMILIES: [&str; 20] = [
    "llama",
    "llama3",
    "llama-linear",
    "llama-dynamic",
    "llama-yarn",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3-longrope",
    "phi4-mini",
    "gemma",
    "gemma2",
    "gemma3",
    "smollm3",
    "smollm3-windows",
    "olmo2",
    "olmo3",
    "granite",
    "gpt-neox",
    "gpt-neox-serial",
];

const METHODS: [Method; 5] = [
    Method::Sigma(Parametrisation::Absolute),
    Method::Sigma(Parametrisation::Relative),
    Method::Lora(Lora {
        rank: 3,
        alpha: 5,
        seed: 1,
    }),
    Method::LoraXs { rank: 4 },
    Method::Full,
];

/// Loss, gradients, logits of packed and padded rows, and those of a token read with a cache.
struct Found {
    loss: f64,
    gradients: BTreeMap<String, Tensor>,
    logits: [Tensor; 2],
}

fn found(name: &str, method: Method, device: &Device, dtype: DType) -> Found {
    let golden = golden(name);
    let (config, tensors) = model(&golden);
    let memory = Memory {
        tensors,
        factors: Some(Box::new(decomposed)),
    };
    let trained = Trained {
        linear: Some(method),
        norms: true,
        embeddings: true,
    };
    let decoder = Decoder::load(&config, &memory, trained, device, dtype).expect("loads");
    move_from_zero(&decoder);
    let ids = ids(&golden).to_device(device).expect("uploads");
    let (b, t) = ids.dims2().expect("rows");
    let row = vec![
        Segment::Sequence(t / 2),
        Segment::Padding(1),
        Segment::Sequence(t - t / 2 - 1),
    ];
    let segments = Segments::new(vec![row; b]);
    let kept = decoder
        .gradients_of(&ids, &segments, false)
        .expect("gradients");
    let again = decoder
        .gradients_of(&ids, &segments, true)
        .expect("gradients");
    assert_eq!(kept.loss.to_bits(), again.loss.to_bits());
    let packed = decoder.logits_of(&ids, &segments).expect("logits");
    let mut cache = Cache::default();
    let read = |cache: &mut Cache, from: usize, count: usize| {
        let ids = ids.narrow(1, from, count).and_then(|ids| ids.contiguous());
        decoder
            .next_logits(cache, &ids.expect("tokens"))
            .expect("logits")
    };
    read(&mut cache, 0, t - 1);
    let next = read(&mut cache, t - 1, 1);
    // padding has logits that mean nothing
    let first = packed.narrow(1, 0, t / 2).expect("a sequence");
    Found {
        loss: kept.loss.into(),
        gradients: kept.tensors,
        logits: [first, next],
    }
}

/// ‖a − b‖ / ‖b‖
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let wide = |x: &Tensor| {
        x.to_device(&Device::Cpu)
            .and_then(|x| x.to_dtype(DType::F64))
    };
    let norm = |x: Tensor| x.sqr().and_then(|x| x.sum_all()?.to_scalar::<f64>());
    let (a, b) = (wide(a).expect("a"), wide(b).expect("b"));
    let difference = norm((a - &b).expect("one shape")).expect("a norm");
    (difference / norm(b).expect("a norm").max(1e-30)).sqrt()
}

#[test]
fn every_family_and_method_gives_on_a_gpu_what_it_gives_on_the_cpu() {
    let device = match gpu::open(0) {
        Ok(device) => device,
        Err(error) => return eprintln!("SKIPPED, no GPU: {error}"),
    };
    // of single precision; and of bf16, whose roundings a few layers multiply
    for (dtype, near, of_gradients) in [(DType::F32, 1e-4, 1e-3), (DType::BF16, 0.1, 0.3)] {
        let mut worst = (0.0f64, 0.0f64);
        let mut missed = Vec::new();
        for name in FAMILIES {
            for method in METHODS {
                let wanted = found(name, method, &Device::Cpu, DType::F32);
                let found = found(name, method, &device, dtype);
                let mut hold = |what: &str, off: f64, allowed: f64| {
                    // NaN is not near
                    if off.partial_cmp(&allowed) != Some(Ordering::Less) {
                        missed.push(format!("{name}, {method:?}, {what}: {off:.1e} off"));
                    }
                };
                hold("loss", (found.loss - wanted.loss).abs() / wanted.loss, near);
                for (found, wanted) in found.logits.iter().zip(&wanted.logits) {
                    let off = distance(found, wanted);
                    worst.0 = worst.0.max(off);
                    hold("logits", off, near);
                }
                for (variable, wanted) in &wanted.gradients {
                    let off = match found.gradients.get(variable) {
                        Some(found) => distance(found, wanted),
                        None => f64::INFINITY,
                    };
                    worst.1 = worst.1.max(off);
                    hold(variable, off, of_gradients);
                }
            }
        }
        assert!(missed.is_empty(), "{dtype:?}:\n{}", missed.join("\n"));
        eprintln!(
            "{dtype:?}: logits {:.1e}, gradients {:.1e} off at worst",
            worst.0, worst.1
        );
    }
}
