//! The families, as rows of switches: a new one is a row, not a decoder.

/// What a family calls its modules.
#[derive(Debug, PartialEq, Eq)]
pub struct Names {
    /// In front of all but the head's; a checkpoint of the inner model alone goes without.
    pub prefix: &'static str,
    pub embedding: &'static str,
    pub norm: &'static str,
    pub head: &'static str,
    pub query_key_value: Projections,
    pub output: &'static str,
    pub gate_up: Projections,
    pub down: &'static str,
    pub query_norm: &'static str,
    pub key_norm: &'static str,
}

/// Several projections of one input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Projections {
    Apart(&'static [&'static str]),
    /// One matrix, with one projection's rows after the other's.
    Stacked(&'static str),
    /// One matrix, with the rows of each head together.
    ByHead(&'static str),
}

/// What a norm makes of its input before the weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// x over the root of its mean square.
    RootMeanSquare,
    /// x less its mean, over its standard deviation; a bias follows the weight.
    Layer,
}

/// Where a block has its norms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlaces {
    /// Before attention and before the MLP.
    Before,
    /// After both.
    After,
    /// Before and after both.
    Around,
}

impl NormPlaces {
    /// The modules before attention, after it, before the MLP, after it.
    pub fn modules(self) -> [Option<&'static str>; 4] {
        let (input, attention) = ("input_layernorm", "post_attention_layernorm");
        let (before, after) = ("pre_feedforward_layernorm", "post_feedforward_layernorm");
        match self {
            Self::Before => [Some(input), None, Some(attention), None],
            Self::After => [None, Some(attention), None, Some(after)],
            Self::Around => [Some(input), Some(attention), Some(before), Some(after)],
        }
    }
}

/// What `q_norm` and `k_norm` take the mean over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueryKeyNorm {
    None,
    EachHead,
    AllHeads,
}

/// What the gate of an MLP goes through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Activation {
    Silu,
    /// x·Φ(x) by its approximation with a hyperbolic tangent.
    GeluTanh,
    /// x·Φ(x)
    Gelu,
    /// Not known to this decoder: plan and decompose work, training refuses.
    Unsupported(String),
}

impl Activation {
    pub(super) fn named(name: &str) -> Self {
        match name {
            "silu" | "swish" => Self::Silu,
            "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Self::GeluTanh,
            "gelu" => Self::Gelu,
            other => Self::Unsupported(other.into()),
        }
    }
}

/// What a `model_type` stands for: which switches of the decoder it sets, and what transformers takes where a config
/// says nothing.
pub(super) struct Family {
    pub model_type: &'static str,
    /// Heads of keys and values; none is as many as of queries.
    pub kv_heads: Option<usize>,
    pub head_dim: Option<usize>,
    pub positions_max: usize,
    /// The window a longrope was stretched from; none is the whole.
    pub positions_first: Option<u64>,
    pub tied: bool,
    pub norm: NormKind,
    // a key of the config, and what stands for an absent one
    pub norm_eps: (&'static str, f64),
    pub rope_theta: (&'static str, f64),
    /// Of families of which only a part of each head may turn.
    pub rope_share: Option<(&'static str, f64)>,
    pub activation: (&'static str, &'static str),
    pub gated: bool,
    pub norm_offset: f64,
    pub norm_places: NormPlaces,
    pub query_key_norm: QueryKeyNorm,
    pub windows: Windows,
    pub window: Option<usize>,
    pub biases: Biases,
    pub names: &'static Names,
    /// Layers of a regular kind do not turn queries and keys.
    pub rope_skips_layers: bool,
    /// Layers with a window turn by a rope of their own, unscaled: its θ, by key and value.
    pub rope_of_windows: Option<(&'static str, f64)>,
    pub embedding_scale: EmbeddingScale,
    pub attention_scale: AttentionScale,
    pub attention_cap: Cap,
    pub logits_cap: Cap,
    /// `residual_multiplier`, `logits_scaling`.
    pub multipliers: bool,
    /// Attention and MLP side by side, unless `use_parallel_residual` says no.
    pub parallel: bool,
}

/// Which layers of a family have windows.
pub(super) enum Windows {
    Nowhere,
    Everywhere,
    /// In all layers, unless `layer_types` lists them.
    Listed,
    /// Where `use_sliding_window` is set: from `max_window_layers` on.
    Later,
    /// Where `use_sliding_window` is set: in the layers without a rope.
    WithoutRope,
    /// In all but every n-th.
    AllBut(usize),
    /// The same, of another n where `sliding_window_pattern` says so.
    Pattern(usize),
}

pub(super) enum Biases {
    /// Where `attention_bias` and `mlp_bias` say so.
    Configured,
    /// Of queries, keys and values.
    QueryKeyValue,
    /// In the MLP, and unless `attention_bias` says no in attention.
    Everywhere,
}

pub(super) enum EmbeddingScale {
    One,
    RootOfHidden,
    Multiplier,
}

pub(super) enum AttentionScale {
    RootOfHead,
    /// One over the root of `query_pre_attn_scalar`.
    QueryScalar(f64),
    /// `attention_multiplier`
    Multiplier,
}

/// A soft cap: whether its key counts, and what stands for an absent one.
pub(super) enum Cap {
    Never,
    OrElse(Option<f64>),
}

const APART: Names = Names {
    prefix: "model.",
    embedding: "embed_tokens",
    norm: "norm",
    head: "lm_head",
    query_key_value: Projections::Apart(&[
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
    ]),
    output: "self_attn.o_proj",
    gate_up: Projections::Apart(&["mlp.gate_proj", "mlp.up_proj"]),
    down: "mlp.down_proj",
    query_norm: "self_attn.q_norm",
    key_norm: "self_attn.k_norm",
};

const FUSED: Names = Names {
    query_key_value: Projections::Stacked("self_attn.qkv_proj"),
    gate_up: Projections::Stacked("mlp.gate_up_proj"),
    ..APART
};

const NEOX: Names = Names {
    prefix: "gpt_neox.",
    embedding: "embed_in",
    norm: "final_layer_norm",
    head: "embed_out",
    query_key_value: Projections::ByHead("attention.query_key_value"),
    output: "attention.dense",
    gate_up: Projections::Apart(&["mlp.dense_h_to_4h"]),
    down: "mlp.dense_4h_to_h",
    ..APART
};

const LLAMA: Family = Family {
    model_type: "llama",
    kv_heads: None,
    head_dim: None,
    positions_max: 2048,
    positions_first: None,
    tied: false,
    norm: NormKind::RootMeanSquare,
    norm_eps: ("rms_norm_eps", 1e-6),
    rope_theta: ("rope_theta", 10_000.0),
    rope_share: None,
    activation: ("hidden_act", "silu"),
    gated: true,
    norm_offset: 0.0,
    norm_places: NormPlaces::Before,
    query_key_norm: QueryKeyNorm::None,
    windows: Windows::Nowhere,
    window: None,
    biases: Biases::Configured,
    names: &APART,
    rope_skips_layers: false,
    rope_of_windows: None,
    embedding_scale: EmbeddingScale::One,
    attention_scale: AttentionScale::RootOfHead,
    attention_cap: Cap::Never,
    logits_cap: Cap::Never,
    multipliers: false,
    parallel: false,
};

const GEMMA: Family = Family {
    model_type: "gemma",
    kv_heads: Some(16),
    head_dim: Some(256),
    positions_max: 8192,
    tied: true,
    activation: ("hidden_act", "gelu_pytorch_tanh"),
    norm_offset: 1.0,
    embedding_scale: EmbeddingScale::RootOfHidden,
    ..LLAMA
};

const GEMMA_2: Family = Family {
    model_type: "gemma2",
    kv_heads: Some(4),
    activation: ("hidden_activation", "gelu_pytorch_tanh"),
    norm_places: NormPlaces::Around,
    windows: Windows::AllBut(2),
    window: Some(4096),
    attention_scale: AttentionScale::QueryScalar(256.0),
    attention_cap: Cap::OrElse(Some(50.0)),
    logits_cap: Cap::OrElse(Some(30.0)),
    ..GEMMA
};

const OLMO_2: Family = Family {
    model_type: "olmo2",
    norm_eps: ("rms_norm_eps", 1e-5),
    norm_places: NormPlaces::After,
    query_key_norm: QueryKeyNorm::AllHeads,
    ..LLAMA
};

const MISTRAL: Family = Family {
    model_type: "mistral",
    kv_heads: Some(8),
    positions_max: 131_072,
    windows: Windows::Listed,
    window: Some(4096),
    ..LLAMA
};

/// The families. A new Llama-like one is a row here.
pub(super) const FAMILIES: &[Family] = &[
    LLAMA,
    MISTRAL,
    // what transformers calls a Mistral that lists its layers
    Family {
        model_type: "ministral",
        ..MISTRAL
    },
    Family {
        model_type: "qwen2",
        kv_heads: Some(32),
        positions_max: 32_768,
        windows: Windows::Later,
        window: Some(4096),
        biases: Biases::QueryKeyValue,
        ..LLAMA
    },
    Family {
        model_type: "qwen3",
        kv_heads: Some(32),
        positions_max: 32_768,
        head_dim: Some(128),
        query_key_norm: QueryKeyNorm::EachHead,
        windows: Windows::Later,
        window: Some(4096),
        ..LLAMA
    },
    Family {
        model_type: "phi3",
        positions_max: 4096,
        positions_first: Some(4096),
        rope_share: Some(("partial_rotary_factor", 1.0)),
        norm_eps: ("rms_norm_eps", 1e-5),
        windows: Windows::Everywhere,
        names: &FUSED,
        ..LLAMA
    },
    Family {
        model_type: "smollm3",
        kv_heads: Some(4),
        positions_max: 32_768,
        tied: true,
        rope_theta: ("rope_theta", 2_000_000.0),
        windows: Windows::WithoutRope,
        rope_skips_layers: true,
        ..LLAMA
    },
    GEMMA,
    GEMMA_2,
    Family {
        model_type: "gemma3_text",
        positions_max: 131_072,
        rope_theta: ("rope_theta", 1_000_000.0),
        query_key_norm: QueryKeyNorm::EachHead,
        windows: Windows::Pattern(6),
        rope_of_windows: Some(("rope_local_base_freq", 10_000.0)),
        // transformers reads the cap of scores and does not use it
        attention_cap: Cap::Never,
        logits_cap: Cap::OrElse(None),
        ..GEMMA_2
    },
    OLMO_2,
    Family {
        model_type: "olmo3",
        windows: Windows::AllBut(4),
        window: Some(4096),
        rope_of_windows: Some(("rope_theta", 10_000.0)),
        ..OLMO_2
    },
    Family {
        model_type: "granite",
        embedding_scale: EmbeddingScale::Multiplier,
        attention_scale: AttentionScale::Multiplier,
        multipliers: true,
        ..LLAMA
    },
    Family {
        model_type: "gpt_neox",
        norm: NormKind::Layer,
        norm_eps: ("layer_norm_eps", 1e-5),
        rope_theta: ("rotary_emb_base", 10_000.0),
        rope_share: Some(("rotary_pct", 0.25)),
        activation: ("hidden_act", "gelu"),
        gated: false,
        parallel: true,
        biases: Biases::Everywhere,
        names: &NEOX,
        ..LLAMA
    },
];

/// Language models that no row of the table could describe, and why.
pub(super) const KNOWN_TO_DIFFER: [(&str, &str); 2] = [
    (
        "gpt2",
        "stores its linear weights transposed and learns its positions, and this decoder does neither",
    ),
    (
        "gemma3",
        "has a vision tower beside the language model, and only language models are known (gemma3_text)",
    ),
];

/// √(8/π) and 0.044715: GELU's approximation is x·sigmoid(√(8/π)·(x + 0.044715·x³)) (Hendrycks & Gimpel 2016).
pub const TANH_GELU: (f64, f64) = (1.595_769_121_605_730_7, 0.044715);

/// How scores are made of q·k: `cap·tanh(scale·q·k / cap)`, or without a cap `scale·q·k`.
#[derive(Debug, Clone, Copy)]
pub struct Scores {
    pub scale: f64,
    pub cap: Option<f64>,
}
