//! What to do about an error. The library says what is; here is said what helps.

use svdhub::Error;
use svdhub::error::Clash;
use svdhub::job::MATRICES;
use svdhub::kind::Kind;

/// What the heads of language models are called.
const HEADS: [&str; 2] = ["lm_head.", "embed_out."];

/// One sentence that gets the user on, where there is one.
pub fn advice(error: &Error) -> Option<String> {
    let text = match error {
        Error::DiskFull { path, .. } if path.ends_with(".svdhub/training.safetensors") => {
            "free some space, and run the same command with --resume"
        }
        Error::DiskFull { .. } | Error::DiskTooSmall { .. } => {
            "free some space, or choose another disk with --out; the same command then goes on, or begins anew"
        }
        Error::RoomTooSmall { .. } => {
            "allow more with --disk, or make less of each file with a smaller --shard-size; the largest matrix has to fit"
        }
        Error::UnfinishedTraining { .. } => "add --resume to go on, or choose another --out",
        Error::OutputOccupied { .. } => "choose another --out; nothing there was touched",
        Error::OutputMismatch { finished: true, .. } => {
            "choose another --out; nothing there was touched"
        }
        Error::OutputMismatch { .. } => {
            "repeat the first command to finish that job, or choose another --out"
        }
        Error::Unfinished { .. } => "run that command again: it goes on or begins anew by itself",
        Error::OnlyAPart { .. } => {
            "join it with the other parts: `svdhub assemble DIR... --out DIR`"
        }
        Error::NotAPart { .. } => "parts are what `svdhub decompose MODEL --part I/N` writes",
        Error::PartsMissing { .. } => {
            "run `svdhub decompose` with the same options and --part for what is missing, or name its directory too"
        }
        Error::PartTwice { .. } => "name each part once",
        Error::PartsDiffer { .. } => {
            "repeat one of them with the options of the other, in a new directory"
        }
        Error::Checksum { path, .. } | Error::PartChanged { path, .. }
            if path.parent().is_some_and(|dir| dir.ends_with(MATRICES)) =>
        {
            "copy it again, or remove that file and run its `svdhub decompose --part` again: only this matrix is then repeated"
        }
        Error::Checksum { path, .. } if path.parent().is_some_and(|dir| dir.ends_with("blobs")) => {
            "the bytes changed in the Hub's cache: remove that file and run the same command again, which fetches it anew"
        }
        Error::PartChanged { path, .. } if path.ends_with("training.safetensors") => {
            "what went on from here would not be the run that was begun: begin anew in another --out"
        }
        Error::PartChanged { .. } => "run the command again: this matrix is then repeated",
        Error::ForeignFile { .. } => {
            "remove it, or choose another place; nothing there was touched"
        }
        Error::LinkOutside { .. } => {
            "put the file itself in its place if the link is yours; a stranger's link is best deleted"
        }
        Error::OutputLocked { .. } => "wait for it, or choose another --out",
        Error::Truncated { .. } | Error::Header { .. } | Error::ShardMissing { .. } => {
            "the file was cut short or damaged on its way: fetch or copy it again"
        }
        Error::IndexedTensorMissing { .. } | Error::TensorNotIndexed { .. } => {
            "index and shards come from different versions: fetch or copy the model again"
        }
        Error::TensorMissing { tensor, .. }
            if !tensor.contains(".layers.")
                && HEADS.iter().any(|head| tensor.starts_with(head)) =>
        {
            "without a head the model predicts no token: take the checkpoint of a …ForCausalLM"
        }
        Error::TensorMissing { path, .. } if path.ends_with(".svdhub/training.safetensors") => {
            "that state is damaged: begin anew in another --out"
        }
        Error::OtherFormat { .. } => {
            "convert it once: `AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)` in transformers"
        }
        Error::TensorMissing { .. } | Error::Shape { .. } => {
            "weights and config.json do not belong together: check that both come from the same model"
        }
        Error::MergedNotFinite { .. } => "use a smaller factor for the adapter, or a wider --dtype",
        Error::NotFinite { .. } => {
            "the file itself is broken there; ask its author, or take an earlier revision (org/name@revision)"
        }
        Error::Dtype { found, .. } if found == "F64" => {
            "convert it to F32 first: `model.float().save_pretrained(…)` in transformers"
        }
        Error::Dtype { .. } => "decompose the unquantised checkpoint of this model",
        Error::Checksum { .. } => {
            "the bytes changed on disk or on their way: fetch or copy them again"
        }
        Error::NotOrthonormal { .. } => {
            "the bytes changed on disk or on their way: fetch or copy them again"
        }
        Error::RankBeyond { .. } => "ask for fewer, or decompose the base with as many as you need",
        Error::FactorsRounded { .. } => "decompose the base again for vectors in f32",
        Error::NotAnArtifact { .. } => "run `svdhub decompose` on it first",
        Error::Report { .. } => {
            "report and weights come from different versions: fetch or copy the decomposition again"
        }
        Error::NoSpectrum { .. } => {
            "an earlier svdhub made it: fetch all of it (`svdhub verify` does), then inspect it again"
        }
        Error::AdapterMismatch { .. } => {
            "use the decomposition the adapter was trained on: svd_adapter.json names it"
        }
        Error::NotExpressible { .. } => {
            "`svdhub merge` keeps everything that was trained, in an ordinary model"
        }
        Error::BaseNeeded { .. } => "give the base model's directory with --base",
        Error::NothingToDecompose { .. } => {
            "`svdhub plan` shows the module names that patterns match"
        }
        Error::BudgetTooSmall { .. } => {
            "give a larger --budget, or fewer matrices with --include and --exclude"
        }
        Error::BeyondSingle { .. } | Error::Uncertified { .. } => {
            "leave this weight as it is with --exclude"
        }
        Error::BaseChanged { .. } => {
            "repeat the command once nobody writes there; into another --out, if the bytes are others now"
        }
        Error::HeadNotTied { .. } => "leave out --untie-head",
        Error::Diverged { .. } => "lower --lr",
        Error::Overflown { .. } => "lower --lr or --weight-decay",
        Error::DeadGradient { .. } => {
            "this is a defect of svdhub: please report it with the model's config.json"
        }
        Error::BrokenGradient { .. } => "lower --lr",
        Error::BrokenLoss { .. } => {
            "the numbers left the range of f32: check the weights with `svdhub verify`"
        }
        Error::NameTaken { .. } => "rename the tensor, or leave it out of the checkpoint",
        Error::DataField { .. } => {
            "rows have a `text`, or `messages` of `role` and `content`, or `prompt` and `completion`, or `instruction`, `input` \
             and `output`"
        }
        Error::DataRow { source, .. } if matches!(**source, Error::NoTemplateForChats { .. }) => {
            "put a chat_template.jinja beside the model's tokenizer, or give rows of `prompt` and `completion`, which need none"
        }
        Error::DataRow { source, .. } if matches!(**source, Error::AnswerUnplaced { .. }) => {
            "with --loss-on all, everything in the conversations is learnt"
        }
        Error::NoSuchData { .. } | Error::WhichData { .. } => {
            "name one, or several with a `*`: hf://datasets/org/name/FILE"
        }
        Error::NothingLearnt { .. } => {
            "answers are the assistant's messages whose weight is not 0, or completions: if they come late, give a larger --length"
        }
        Error::DataLine { .. } => {
            "each line must be one JSON object; a plain text needs another ending than .jsonl"
        }
        Error::DataTooSmall { .. } => "give a longer text",
        Error::PromptEmpty => "give some text for the model to go on from",
        Error::PromptTooLong { .. } => "give a shorter prompt",
        Error::NoChatTemplate { .. } => {
            "leave out --chat: the model then goes on from the prompt as it is"
        }
        Error::BrokenLogits { .. } => {
            "the numbers left the range of f32: check the weights with `svdhub verify`"
        }
        Error::HubUnreachable { .. } => {
            "check the network and --endpoint; with HF_HUB_OFFLINE=1 the cache alone is used"
        }
        Error::RepoNotFound { .. } => {
            "check the spelling; a private repository needs a token in HF_TOKEN that may read it"
        }
        Error::RevisionNotFound { .. } => "name a branch, a tag or a full commit after the @",
        Error::Gated { .. } => {
            "accept the terms there with your account, then set HF_TOKEN to one of its tokens"
        }
        Error::Unauthorized { .. } => {
            "set HF_TOKEN to a valid token (huggingface.co/settings/tokens)"
        }
        Error::Forbidden { writes: true, .. } => {
            "the token needs the `write` role, or rights on this repository"
        }
        Error::Forbidden { .. } => {
            "the token must be allowed to read this repository: a fine-grained one names it, or all gated ones that its account may read"
        }
        Error::RateLimited { .. } => "wait, or set HF_TOKEN: the limits of an account are higher",
        Error::BranchMoved { .. } => "somebody pushed in between: run the same command again",
        Error::DownloadCut { .. } => "run the same command again: it goes on where it stopped",
        Error::OfflineSending { .. } => "unset HF_HUB_OFFLINE and run the same command again",
        Error::Offline { .. } | Error::NotAllCached { .. } => {
            "unset HF_HUB_OFFLINE once to fetch it"
        }
        Error::HubStatus { status: 500.., .. } => {
            "the trouble is at the Hub: run the same command again later"
        }
        Error::AnswerCut { .. } => "run the same command again",
        Error::LinkRefused { .. } => {
            "run the same command again; links expire, early where this machine's clock is wrong"
        }
        Error::Xet { .. } => {
            "run the same command again later: what has arrived is not sent again; HF_HUB_DISABLE_XET=1 sends by LFS, where the Hub takes that"
        }
        Error::LoginRefused { .. } => {
            "name this workflow among the trusted publishers of that repository, or unset HF_OIDC_RESOURCE"
        }
        Error::NoIdentity { .. } => {
            "give the job `permissions: id-token: write`, or an id token in HF_OIDC_ID_TOKEN"
        }
        Error::NotPrivate { .. } => {
            "leave out --private, choose another name, or make it private on its settings page first"
        }
        Error::TagTaken { .. } => "choose another --tag, or delete that one first",
        Error::NotPublishable { .. } => "move it out of the directory",
        Error::NotThereAnyMore { .. } => {
            "name the repository it was made for; or remove the directory, and make it again"
        }
        Error::OtherWeights { .. } => {
            "a loader would take them for these or beside them: --replace deletes them in the same commit (the repository's \
             history keeps them), or choose another repository or --branch; nothing of this is sent twice"
        }
        Error::Lost { .. } => "make or fetch the directory again: what is left of it is no whole",
        Error::NotAModel { path, .. } if Kind::of(path) != Kind::Model => match Kind::of(path) {
            Kind::Decomposition => {
                "it is a decomposition: train, evaluate, generate, merge, inspect, convert and verify take it; plan and \
                 decompose want its base"
            }
            Kind::Adapter | Kind::Lora => {
                "it is an adapter: name what it was trained on first, and this one with --adapter"
            }
            _ => "it is an export for svd-training, which no verb here reads",
        },
        Error::DataFormat { .. } => {
            "give plain text, .jsonl with a row in each line, or .json with a list of rows, or .parquet: Hugging Face's datasets write \
             the second by `to_json`, the last by `to_parquet`"
        }
        Error::RemoteDiffers { .. } => "run the same command again: it sends what differs",
        Error::Device { .. } => "use --device cpu",
        error if error.is_out_of_device_memory() => {
            "end other programs that use this GPU, or compute with --device cpu"
        }
        Error::DeviceMemory { .. } => {
            "--recompute keeps of each block only what it reads; a --micro-batch below --batch and a shorter --length need less in proportion"
        }
        Error::Clash(Clash::Uneven { .. }) => {
            "choose a --batch that is a multiple of the number of processes"
        }
        Error::Clash(Clash::OneGpu { .. }) => {
            "use --device auto, or --device cuda: each process then takes a GPU of its own"
        }
        Error::Clash(Clash::Mixed { .. }) => "show each process a GPU, or use --device cpu",
        Error::Clash(Clash::SharedGpu) => {
            "start no more processes on a machine than it has GPUs, and leave out --device"
        }
        Error::Parallel { .. } => {
            "start it as `mpirun -n N svdhub train … --parallel`, or with srun and its option --mpi, where that MPI is installed; on GPUs `torchrun --nproc-per-node N --no-python svdhub train … --parallel` does too"
        }
        Error::NoTokenizer { .. } => {
            "text needs a fast tokenizer: put the model's tokenizer.json there"
        }
        Error::Architecture { .. } => {
            "this version takes no model of another family, neither to decompose nor to train it"
        }
        _ => return None,
    };
    Some(text.into())
}
