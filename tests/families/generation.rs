//! Tokens one after the other: with a cache as without, and the ones that transformers chooses.

use candle_core::{DType, Device, Tensor};

use svdhub::generate::choice::{Choice, Sampling};
use svdhub::generate::{Options, Stop, go_on};
use svdhub::model::config::Scaling;
use svdhub::model::{Cache, Decoder, Trained};

use crate::memory::Memory;
use crate::transformers::{golden, ids, list, model};

/// The untrained decoder of a golden family.
fn decoder(name: &str) -> Decoder {
    let (config, tensors) = model(&golden(name));
    let memory = Memory {
        tensors,
        factors: None,
    };
    Decoder::load(
        &config,
        &memory,
        Trained::default(),
        &Device::Cpu,
        DType::F32,
    )
    .expect("loads")
}

/// The likeliest tokens, without an end.
pub fn greedy(tokens_max: usize) -> Options {
    Options {
        tokens_max,
        choice: Choice {
            samples: false,
            sampling: Sampling::default(),
            repetition_penalty: 1.0,
            ends: Vec::new(),
        },
        chat: None,
        now: Default::default(),
        device: Device::Cpu,
    }
}

fn new_tokens(decoder: &Decoder, prompt: &[u32], options: &Options) -> (Vec<u32>, Stop) {
    let mut told = Vec::new();
    let (ids, stop) = go_on(decoder, prompt, options, &mut |id| {
        told.push(id);
        Ok(())
    })
    .expect("goes on");
    assert_eq!(ids, told);
    (ids, stop)
}

fn values(logits: &Tensor) -> Vec<f32> {
    logits
        .flatten_all()
        .and_then(|l| l.to_vec1())
        .expect("values")
}

fn assert_cached(name: &str, decoder: &Decoder) {
    let ids = ids(&golden(name));
    // what was read keeps its angles where θ grows with the sequence: the same only until it grows
    let grows = (decoder.config.ropes.iter()).any(|r| matches!(r.scaling, Scaling::Dynamic { .. }));
    let last = if grows { 16 } else { 40 };
    // pieces of one token and of many, across each window and each original length
    for pieces in [
        &[9, 1, 1, 4, 1, 9, 2, 6, 1, 6][..],
        &[1, 2, 3, 10, 13, 1, 5, 5][..],
    ] {
        let mut cache = Cache::default();
        let mut read = 0;
        for &piece in pieces {
            let piece = piece.min(last - read);
            if piece == 0 {
                break;
            }
            let new = ids.narrow(1, read, piece).expect("a piece");
            let cached = decoder.next_logits(&mut cache, &new).expect("reads on");
            read += piece;
            assert_eq!(cache.tokens(), read);
            let all = ids.narrow(1, 0, read).expect("a beginning");
            let wanted = decoder
                .logits(&all)
                .and_then(|l| Ok(l.narrow(1, read - 1, 1)?));
            let (cached, wanted) = (values(&cached), values(&wanted.expect("reads at once")));
            let scale = wanted.iter().fold(0f32, |m, x| m.max(x.abs()));
            let off = cached
                .iter()
                .zip(&wanted)
                .fold(0f32, |m, (a, b)| m.max((a - b).abs()))
                / scale;
            // the same numbers, summed by matrix products of other shapes
            assert!(off < 1e-5, "{name}: {off:.1e} off behind {read} tokens");
        }
        assert_eq!(read, last);
    }
}

fn assert_greedy(name: &str, decoder: &Decoder) {
    let golden = &golden(name)["greedy"];
    let tokens =
        |key: &str| -> Vec<u32> { list(&golden[key]).iter().map(|&id| id as u32).collect() };
    let (prompt, wanted) = (tokens("prompt"), tokens("new"));
    let mut options = greedy(wanted.len());
    options.choice.repetition_penalty = golden["repetition_penalty"].as_f64().expect("a penalty");
    let (ids, stop) = new_tokens(decoder, &prompt, &options);
    assert_eq!((ids, stop), (wanted, Stop::Tokens), "{name}");
}

macro_rules! generation {
    ($($test:ident: $name:literal;)*) => {
        $(#[test]
        fn $test() {
            let decoder = decoder($name);
            assert_cached($name, &decoder);
            assert_greedy($name, &decoder);
        })*
    };
}

generation! {
    llama_goes_on: "llama";
    llama_3_goes_on: "llama3";
    llama_with_linear_rope_scaling_goes_on: "llama-linear";
    llama_with_a_rope_that_grows_goes_on: "llama-dynamic";
    llama_with_yarn_goes_on: "llama-yarn";
    mistral_goes_on: "mistral";
    qwen2_goes_on: "qwen2";
    qwen3_goes_on: "qwen3";
    phi3_with_longrope_goes_on: "phi3-longrope";
    phi4_mini_goes_on: "phi4-mini";
    gemma_goes_on: "gemma";
    gemma_2_goes_on: "gemma2";
    gemma_3_goes_on: "gemma3";
    smollm3_goes_on: "smollm3";
    smollm3_with_windows_goes_on: "smollm3-windows";
    olmo2_goes_on: "olmo2";
    olmo3_goes_on: "olmo3";
    granite_goes_on: "granite";
    pythia_goes_on: "gpt-neox";
    pythia_in_series_goes_on: "gpt-neox-serial";
}

#[test]
fn a_text_stops_at_its_end_at_the_number_asked_for_and_at_the_last_position() {
    let decoder = decoder("llama");
    let prompt = [3, 1, 4];
    let (all, stop) = new_tokens(&decoder, &prompt, &greedy(1000));
    assert_eq!((all.len() + 3, stop), (64, Stop::Positions));
    let mut options = greedy(5);
    assert_eq!(
        new_tokens(&decoder, &prompt, &options),
        (all[..5].to_vec(), Stop::Tokens)
    );
    let end = all
        .iter()
        .position(|&id| id == all[3])
        .expect("it is there")
        + 1;
    options.choice.ends = vec![63, all[3]];
    assert!(!all[..end].contains(&63));
    assert_eq!(
        new_tokens(&decoder, &prompt, &options),
        (all[..end].to_vec(), Stop::End)
    );
    assert_eq!(
        new_tokens(&decoder, &prompt, &greedy(0)),
        (vec![], Stop::Tokens)
    );
}

#[test]
fn a_stretched_rope_reaches_further_than_its_original_window() {
    // 16 positions, stretched by 4
    let (all, stop) = new_tokens(&self::decoder("llama-dynamic"), &[3, 1, 4], &greedy(1000));
    assert_eq!((all.len() + 3, stop), (64, Stop::Positions));
}
