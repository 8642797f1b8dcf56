//! What can go wrong, as facts. Advice on what to do next is added at the edge (`cli/advice.rs`).

use std::fmt;
use std::path::PathBuf;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything an operation can fail with: each variant carries the facts and never repeats its source.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // -- files ------------------------------------------------------------------------------
    #[error("cannot {action} {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("no space left while writing {}", path.display())]
    DiskFull { path: PathBuf },
    #[error("{} needs {needed} bytes, its disk has {free} free", path.display())]
    DiskTooSmall {
        path: PathBuf,
        needed: u64,
        free: u64,
    },
    #[error("{} needs {needed} bytes of the disk, {allowed} are allowed", path.display())]
    RoomTooSmall {
        path: PathBuf,
        needed: u64,
        allowed: u64,
    },
    #[error("{} is not valid JSON", path.display())]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("{} is not a directory with a model in it: {missing} is missing", path.display())]
    NotAModel { path: PathBuf, missing: String },
    #[error("{} is not a directory with a model in it: {missing} is missing, beside {found}, which is not read", path.display())]
    OtherFormat {
        path: PathBuf,
        missing: String,
        found: String,
    },
    #[error("{} is not a directory with a model for text in it: tokenizer.json is missing", path.display())]
    NoTokenizer { path: PathBuf },
    #[error("{} already holds {found}", path.display())]
    OutputOccupied { path: PathBuf, found: String },
    #[error("{} already holds an unfinished training run", path.display())]
    UnfinishedTraining { path: PathBuf },
    #[error("{} holds {} work of another job: {what} was {before}, now {now}", path.display(),
        if *finished { "the finished" } else { "unfinished" })]
    OutputMismatch {
        path: PathBuf,
        finished: bool,
        what: String,
        before: String,
        now: String,
    },
    #[error("{} is the unfinished work of `svdhub {verb}`", path.display())]
    Unfinished { path: PathBuf, verb: String },
    #[error("another svdhub process is working in {}", path.display())]
    OutputLocked { path: PathBuf },
    #[error("{} is only part {part} of a decomposition", path.display())]
    OnlyAPart { path: PathBuf, part: String },
    #[error("{} is not a part of a decomposition: part.json is missing", path.display())]
    NotAPart { path: PathBuf },
    #[error("of the decomposition there is no {}", missing.join(", no "))]
    PartsMissing { missing: Vec<String> },
    #[error("{what} is in {} and again in {}", first.display(), second.display())]
    PartTwice {
        what: String,
        first: PathBuf,
        second: PathBuf,
    },
    #[error(
        "{} and {} are not parts of one decomposition: {what} is {before} in the first, {now} in the second",
        dirs[0].display(),
        dirs[1].display()
    )]
    PartsDiffer {
        what: String,
        dirs: Box<[PathBuf; 2]>,
        before: String,
        now: String,
    },
    #[error("module `{module}` of {} needs {wanted}, and {stored} singular triplets of it are stored", path.display())]
    RankBeyond {
        path: PathBuf,
        module: String,
        wanted: String,
        stored: usize,
    },
    #[error("the vectors of {} are stored in bf16: they cannot become f32 again", path.display())]
    FactorsRounded { path: PathBuf },
    #[error("{} is a link that leads out of its directory, to {}", path.display(), target.display())]
    LinkOutside { path: PathBuf, target: PathBuf },
    #[error("{} cannot be published: {reason}", path.display())]
    NotPublishable { path: PathBuf, reason: &'static str },
    #[error("{} has {found} bytes, at most {most} are read of such a file", path.display())]
    TooLarge {
        path: PathBuf,
        found: u64,
        most: u64,
    },
    #[error("{} is there already, and svdhub did not write it as it is", path.display())]
    ForeignFile { path: PathBuf },

    // -- weights ----------------------------------------------------------------------------
    #[error("{} is not a safetensors file: {reason}", path.display())]
    Header { path: PathBuf, reason: String },
    #[error("{} is cut short: expected {expected} bytes, found {found}", path.display())]
    Truncated {
        path: PathBuf,
        expected: u64,
        found: u64,
    },
    #[error("index {} names the file `{file}`, which is not there", index.display())]
    ShardMissing { index: PathBuf, file: String },
    #[error("index {} places tensor `{tensor}` in `{file}`, which does not hold it", index.display())]
    IndexedTensorMissing {
        index: PathBuf,
        tensor: String,
        file: String,
    },
    #[error("tensor `{tensor}` in {} is not named by the index", path.display())]
    TensorNotIndexed { tensor: String, path: PathBuf },
    #[error("index {} names `{name}`, which is not a plain file name", index.display())]
    UnsafeName { index: PathBuf, name: String },
    #[error("tensor `{tensor}` is missing from {}", path.display())]
    TensorMissing { tensor: String, path: PathBuf },
    #[error("tensor `{tensor}` in {}: expected shape {expected:?}, found {found:?}", path.display())]
    Shape {
        tensor: String,
        path: PathBuf,
        expected: Vec<usize>,
        found: Vec<usize>,
    },
    #[error("tensor `{tensor}` in {}: expected dtype {expected}, found {found}", path.display())]
    Dtype {
        tensor: String,
        path: PathBuf,
        expected: String,
        found: String,
    },
    #[error("tensor `{tensor}` in {} holds {value} at element {index:?}", path.display())]
    NotFinite {
        tensor: String,
        path: PathBuf,
        value: f32,
        index: Vec<usize>,
    },
    #[error("tensor `{tensor}` of the merged model would hold {value} at element {index:?}")]
    MergedNotFinite {
        tensor: String,
        value: f32,
        index: Vec<usize>,
    },
    #[error("the rows of `{tensor}` or of its partner in {} are not orthonormal: they are off by {found:.1e}", path.display())]
    NotOrthonormal {
        tensor: String,
        path: PathBuf,
        found: f64,
    },
    #[error("{what} in {}: expected sha256 {expected}, found {found}", path.display())]
    Checksum {
        what: Summed,
        path: PathBuf,
        expected: String,
        found: String,
    },
    #[error("`{tensor}` in {} is not what was written: expected blake3 {expected}, found {found}", path.display())]
    PartChanged {
        tensor: String,
        path: PathBuf,
        expected: String,
        found: String,
    },

    // -- models -----------------------------------------------------------------------------
    #[error("{}: the architecture `{found}` is not supported (supported: {supported})", path.display())]
    Architecture {
        path: PathBuf,
        found: String,
        supported: String,
    },
    #[error("{}: `{key}` {reason}", path.display())]
    Config {
        path: PathBuf,
        key: String,
        reason: String,
    },
    #[error("{}: the `svd` section {reason}", path.display())]
    SvdSection { path: PathBuf, reason: String },
    #[error("{} is not a decomposition: its config.json has no `svd` section", path.display())]
    NotAnArtifact { path: PathBuf },
    #[error("{}: the `spectrum` section {reason}", path.display())]
    Report { path: PathBuf, reason: String },
    #[error("the report in {} holds no spectrum, and the tensors that would tell it are not there", path.display())]
    NoSpectrum { path: PathBuf },
    #[error("the adapter {} was trained on another decomposition: expected {what} {expected}, found {found}", adapter.display())]
    AdapterMismatch {
        adapter: PathBuf,
        what: &'static str,
        expected: String,
        found: String,
    },
    #[error("{}: the pin of its base {reason}", path.display())]
    Pin { path: PathBuf, reason: String },
    #[error("{}: {reason}", path.display())]
    Adapter { path: PathBuf, reason: String },
    #[error("{what} cannot be exported to {target}: {reason}")]
    NotExpressible {
        what: String,
        target: &'static str,
        reason: String,
    },
    #[error("{} needs its base model {base}", artifact.display())]
    BaseNeeded { artifact: PathBuf, base: String },
    #[error("cannot read {value:?} as {what}: {reason}")]
    Parse {
        what: &'static str,
        value: String,
        reason: String,
    },
    #[error("no tensor of {} is decomposed: {reason}", path.display())]
    NothingToDecompose { path: PathBuf, reason: String },
    #[error("a budget of {budget} singular values is less than one for each of the {matrices} matrices of {}", path.display())]
    BudgetTooSmall {
        path: PathBuf,
        budget: u64,
        matrices: usize,
    },
    #[error("{} was written to while it was decomposed", path.display())]
    BaseChanged { path: PathBuf },
    #[error("the head of {} cannot be untied: {reason}", path.display())]
    HeadNotTied { path: PathBuf, reason: String },

    // -- numbers ----------------------------------------------------------------------------
    #[error("LAPACK's {routine} failed on a {rows} × {columns} matrix (info = {info})")]
    Lapack {
        routine: &'static str,
        rows: usize,
        columns: usize,
        info: i32,
    },
    #[error("the singular values of `{module}` do not fit f32: its norm is {norm:.1e}")]
    BeyondSingle { module: String, norm: f64 },
    #[error(
        "no algorithm reached the tolerance on `{module}`: residual {residual:.1e}, orthogonality {orthogonality:.1e}, wanted {tolerance:.1e}; σ_q+1/σ_q {tail:.2}"
    )]
    Uncertified {
        module: String,
        residual: f64,
        orthogonality: f64,
        tail: f64,
        tolerance: f64,
    },
    #[error("the gradient of {tensor} became {value} at step {step}")]
    BrokenGradient {
        tensor: String,
        step: usize,
        value: f32,
    },
    #[error("the loss on {data} is not a number")]
    BrokenLoss { data: String },
    #[error("the logits behind {token} tokens are not all finite")]
    BrokenLogits { token: usize },
    #[error("tensor `{tensor}` of {} has the name of a part of a decomposition", path.display())]
    NameTaken { tensor: String, path: PathBuf },
    #[error("no gradient reaches {}", dead.join(", "))]
    DeadGradient { dead: Vec<String> },
    #[error("the loss became {loss} at step {step}")]
    Diverged { step: usize, loss: f32 },
    #[error("`{name}` became {value} in training")]
    Overflown { name: String, value: f32 },
    #[error("the tensor library failed")]
    Candle(#[from] candle_core::Error),
    #[error("the device {device} cannot be used: {reason}")]
    Device { device: String, reason: String },
    #[error(
        "{device} has no room for training: planned are {weights} bytes for weights, {moving} for what moves, {activations} \
         for what the backward pass reads again and {passing} for logits and gradients that come and go"
    )]
    DeviceMemory {
        device: String,
        weights: u64,
        moving: u64,
        activations: u64,
        passing: u64,
    },
    #[error("the processes cannot work together: {reason}")]
    Parallel { reason: String },
    #[error("the processes cannot work together: {0}")]
    Clash(Clash),

    // -- data -------------------------------------------------------------------------------
    #[error("{} line {line} is not JSON", path.display())]
    DataLine {
        path: PathBuf,
        line: usize,
        source: serde_json::Error,
    },
    #[error("{} {place}: expected one of the known rows, found {found}", path.display())]
    DataField {
        path: PathBuf,
        place: Place,
        found: String,
    },
    #[error("{} {place} cannot be read as the model reads", path.display())]
    DataRow {
        path: PathBuf,
        place: Place,
        source: Box<Error>,
    },
    #[error("{} holds no chat template, which conversations need", path.display())]
    NoTemplateForChats { path: PathBuf },
    #[error("the chat template rewrites what comes before message {message} once that is there")]
    AnswerUnplaced { message: usize },
    #[error("{data} holds nothing to learn within {window} tokens")]
    NothingLearnt { data: String, window: usize },
    #[error("{} is no table that can be read: {reason}", path.display())]
    Table { path: PathBuf, reason: String },
    #[error("`{repo}` has no file `{path}`; it has {}", few(files))]
    NoSuchData {
        repo: String,
        path: String,
        files: Vec<String>,
    },
    #[error(
        "it is not clear which files of `{repo}` are meant: it has {}",
        few(files)
    )]
    WhichData { repo: String, files: Vec<String> },
    #[error("{} is not UTF-8 text (byte {offset})", path.display())]
    DataEncoding { path: PathBuf, offset: usize },
    #[error("{data} has {found} tokens, at least {needed} are needed")]
    DataTooSmall {
        data: String,
        found: usize,
        needed: usize,
    },
    #[error("the tokenizer {} failed: {reason}", path.display())]
    Tokenizer { path: PathBuf, reason: String },
    #[error("token id {id} of {} is outside the model's vocabulary of {vocabulary}", path.display())]
    TokenOutside {
        path: PathBuf,
        id: u32,
        vocabulary: usize,
    },

    #[error("the prompt is empty")]
    PromptEmpty,
    #[error("the prompt has {found} tokens, and the model of {} reaches {most} positions, those of the answer included", path.display())]
    PromptTooLong {
        path: PathBuf,
        found: usize,
        most: usize,
    },
    #[error("{} has no chat template", path.display())]
    NoChatTemplate { path: PathBuf },

    // -- the Hub ----------------------------------------------------------------------------
    #[error("the Hub at {endpoint} cannot be reached")]
    HubUnreachable {
        endpoint: String,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error(
        "no repository `{repo}` at {endpoint} (or it is private and the token does not open it)"
    )]
    RepoNotFound { repo: String, endpoint: String },
    #[error("no revision `{revision}` in `{repo}`")]
    RevisionNotFound { repo: String, revision: String },
    #[error("no file `{file}` in `{repo}` at {revision}")]
    EntryNotFound {
        repo: String,
        revision: String,
        file: String,
    },
    #[error("`{repo}` is gated: its terms must be accepted at {endpoint}/{repo}")]
    Gated { repo: String, endpoint: String },
    #[error("the Hub does not accept the token ({detail})")]
    Unauthorized { detail: String },
    #[error("the token has no right to {action} ({detail})")]
    Forbidden {
        action: String,
        /// Whether that would have changed something.
        writes: bool,
        detail: String,
    },
    #[error("the Hub's rate limit is reached, next try in {retry_after_s} s")]
    RateLimited { retry_after_s: u64 },
    #[error("the Hub answered {status} to {request}: {detail}")]
    HubStatus {
        status: u16,
        request: String,
        detail: String,
    },
    #[error("the Hub's answer to {request} broke off")]
    AnswerCut { request: String },
    #[error("a link that the Hub gave to {action} opens nothing ({detail})")]
    LinkRefused { action: String, detail: String },
    #[error("the Hub's Xet store does not take the large files")]
    Xet {
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{endpoint} gives this job no token for `{resource}` ({detail})")]
    LoginRefused {
        endpoint: String,
        resource: String,
        detail: String,
    },
    #[error("this job is asked to log in for `{resource}` and has no identity to show")]
    NoIdentity { resource: String },
    #[error("`{repo}` is there already, and everybody can read it")]
    NotPrivate { repo: String },
    #[error("the tag `{tag}` of `{repo}` names another commit, {commit}")]
    TagTaken {
        repo: String,
        tag: String,
        commit: String,
    },
    #[error("the copy of `{repo}` in the cache is not whole: {} is missing", missing.join(", "))]
    NotAllCached { repo: String, missing: Vec<String> },
    #[error("`{branch}` of `{repo}` moved while publishing ({detail})")]
    BranchMoved {
        repo: String,
        branch: String,
        detail: String,
    },
    #[error("the download of `{file}` broke off at {received} of {expected} bytes")]
    DownloadCut {
        file: String,
        received: u64,
        expected: u64,
    },
    #[error(
        "the repository `{repo}` holds the file name `{name}`, which would leave the folder it is downloaded to, or lie where git or svdhub keep their own"
    )]
    HostilePath { repo: String, name: String },
    #[error("`{repo}` is not in the cache and HF_HUB_OFFLINE is set")]
    Offline { repo: String },
    #[error("nothing can be sent to `{repo}`: HF_HUB_OFFLINE is set")]
    OfflineSending { repo: String },
    #[error("`{repo}` does not have the contents of `{file}`, which were sent there from {} and removed", dir.display())]
    NotThereAnyMore {
        repo: String,
        file: String,
        dir: PathBuf,
    },
    #[error("`{repo}` holds other weights: {}", files.join(", "))]
    OtherWeights { repo: String, files: Vec<String> },
    #[error("the remote copy of `{repo}` differs from the local files: {}", differing.join(", "))]
    RemoteDiffers {
        repo: String,
        differing: Vec<String>,
    },
    #[error("{} is gone, and the directory says that it belongs to it", path.display())]
    Lost { path: PathBuf },
    #[error("{} is read neither as text nor as documents", path.display())]
    DataFormat { path: PathBuf },
    #[error("the template {name} failed")]
    Template {
        name: String,
        source: minijinja::Error,
    },
}

/// What of processes that were started together does not fit.
#[derive(Debug, thiserror::Error)]
pub enum Clash {
    #[error("{windows} windows in a step cannot be divided evenly among {processes} processes")]
    Uneven { windows: usize, processes: usize },
    #[error("{on_gpus} of {processes} compute on GPUs, and the others on CPUs")]
    Mixed { on_gpus: usize, processes: usize },
    #[error(
        "torchrun tells them apart by LOCAL_RANK, which is {place} here, and --device cuda:{number} gives all of them one GPU"
    )]
    OneGpu { place: usize, number: usize },
    #[error("NCCL refuses these GPUs, as where two processes share one")]
    SharedGpu,
}

/// The first of many names.
fn few(names: &[String]) -> String {
    const NAMED: usize = 12;
    match names {
        [] => "none that holds rows or text".into(),
        [named @ .., _] if named.len() >= NAMED => {
            let named = &named[..NAMED];
            format!("{} and {} more", named.join(", "), names.len() - NAMED)
        }
        names => names.join(", "),
    }
}

/// Where a row stands in a file of data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Line(usize),
    /// Of a list.
    Item(usize),
    /// Of a table.
    Row(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Line(number) => write!(f, "line {number}"),
            Self::Item(number) => write!(f, "item {number}"),
            Self::Row(number) => write!(f, "row {number}"),
        }
    }
}

/// What a sum was taken of.
#[derive(Debug, Clone)]
pub enum Summed {
    Tensor(String),
    /// Something else, in words.
    Words(String),
}

impl<T: Into<String>> From<T> for Summed {
    fn from(words: T) -> Self {
        Self::Words(words.into())
    }
}

impl fmt::Display for Summed {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Tensor(name) => write!(f, "tensor `{name}`"),
            Self::Words(words) => f.write_str(words),
        }
    }
}

impl Error {
    /// Whether a device refused memory: CUDA's own words, and those of cuBLAS where it finds none to begin with.
    pub fn is_out_of_device_memory(&self) -> bool {
        const WORDS: [&str; 3] = [
            "OUT_OF_MEMORY",
            "ALLOC_FAILED",
            "CUBLAS_STATUS_NOT_INITIALIZED",
        ];
        match self {
            Self::Candle(error) => {
                let text = error.to_string();
                WORDS.iter().any(|words| text.contains(words))
            }
            _ => false,
        }
    }

    /// Wraps an I/O error with what was tried on which path; a full disk gets a name of its own.
    pub fn io(action: &'static str, path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        let path = path.into();
        if source.kind() == std::io::ErrorKind::StorageFull {
            Self::DiskFull { path }
        } else {
            Self::Io {
                action,
                path,
                source,
            }
        }
    }
}

/// Adds what was tried, and on which path, to the result of an I/O call.
pub trait IoContext<T> {
    fn context(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn context(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|source| Error::io(action, path, source))
    }
}
