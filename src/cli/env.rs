//! The environment, read in one place: the variables mean what they mean to Python's huggingface_hub.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use svdhub::hub::{HubOptions, Identity, Login, PUBLIC_HUB, Token};
use svdhub::parallel::{Flavour, Meeting, Started};
use svdhub::{Error, Result};

/// Makes candle's threads sleep while they have nothing to do, instead of spinning on a core that others need: a training
/// step takes a tenth longer with its default of 25,000 rounds (2 cores of Zen 5, 2026-11). Called before any thread starts.
pub fn let_waiting_threads_sleep() {
    const SPINS: &str = "CANDLE_BARRIER_POOL_SPIN_LIMIT";
    if std::env::var_os(SPINS).is_none() {
        // SAFETY: this is the only thread.
        unsafe { std::env::set_var(SPINS, "100") };
    }
}

fn told<T: FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.parse().ok()
}

/// How processes that were started with this one find each other, if there are any.
pub fn started() -> Option<Started> {
    let by_mpi = |flavour, size| Started::ByMpi { flavour, size };
    // mpirun of Open MPI; mpirun of MPICH and Intel MPI, and srun --mpi=pmi2; srun --mpi=pmix beside its own count
    if let Some(size) = told("OMPI_COMM_WORLD_SIZE") {
        return Some(by_mpi(Flavour::OpenMpi, size));
    }
    if let Some(size) = told("PMI_SIZE") {
        return Some(by_mpi(Flavour::Mpich, size));
    }
    if std::env::var_os("PMIX_RANK").is_some() {
        return Some(by_mpi(Flavour::OpenMpi, told("SLURM_STEP_NUM_TASKS")?));
    }
    Some(Started::ByTorchrun(Meeting {
        rank: told("RANK")?,
        size: told("WORLD_SIZE")?,
        host: told("MASTER_ADDR")?,
        port: told("MASTER_PORT")?,
    }))
}

/// Which of its machine's processes this one is, from 0.
pub fn place_on_this_machine() -> usize {
    let names = [
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "MPI_LOCALRANKID",
        "LOCAL_RANK",
        "SLURM_LOCALID",
    ];
    names.iter().find_map(|name| told(name)).unwrap_or(0)
}

/// Whether torchrun has started more than this one on this machine.
pub fn shares_this_machine() -> bool {
    told("LOCAL_WORLD_SIZE").is_some_and(|count: usize| count > 1)
}

/// The variables that are set to something.
struct Environment<F>(F);

impl<F: Fn(&str) -> Option<String>> Environment<F> {
    fn get(&self, name: &str) -> Option<String> {
        (self.0)(name).filter(|value| !value.is_empty())
    }

    fn flag(&self, name: &str) -> bool {
        self.get(name).is_some_and(|value| {
            matches!(
                value.to_ascii_uppercase().as_str(),
                "1" | "ON" | "YES" | "TRUE"
            )
        })
    }

    /// A path, whose `~` is the home directory, and whose `$NAME` and `${NAME}` are other variables that are set.
    fn path(&self, name: &str) -> Option<PathBuf> {
        let text = self.expanded(&self.get(name)?);
        match text.strip_prefix("~/") {
            Some(rest) => Some(self.user().join(rest)),
            None => Some(text.into()),
        }
    }

    /// As Python's os.path.expandvars: what is not set stays as it is.
    fn expanded(&self, text: &str) -> String {
        let mut done = String::new();
        let mut left = text;
        while let Some((before, behind)) = left.split_once('$') {
            done.push_str(before);
            let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
            let (name, rest) = match behind.strip_prefix('{') {
                Some(braced) => braced.split_once('}').unwrap_or(("", behind)),
                None => {
                    let end = behind.find(|c| !is_word(c)).unwrap_or(behind.len());
                    behind.split_at(end)
                }
            };
            match Some(name).filter(|name| !name.is_empty()).and_then(&self.0) {
                Some(value) => {
                    done.push_str(&value);
                    left = rest;
                }
                None => {
                    done.push('$');
                    left = behind;
                }
            }
        }
        done + left
    }

    fn user(&self) -> PathBuf {
        self.get("HOME").unwrap_or_else(|| ".".into()).into()
    }

    /// `$HF_HOME`, or the usual place.
    fn home(&self) -> PathBuf {
        let cache = || {
            let cache = self.path("XDG_CACHE_HOME");
            cache.unwrap_or_else(|| self.user().join(".cache"))
        };
        let home = self.path("HF_HOME");
        home.unwrap_or_else(|| cache().join("huggingface"))
    }

    fn cache(&self) -> PathBuf {
        let cache = self.path("HF_HUB_CACHE");
        let cache = cache.or_else(|| self.path("HUGGINGFACE_HUB_CACHE"));
        cache.unwrap_or_else(|| self.home().join("hub"))
    }

    /// Where Xet remembers what it has sent, unless it is switched off.
    fn xet(&self) -> Option<PathBuf> {
        if self.flag("HF_HUB_DISABLE_XET") {
            return None;
        }
        let cache = self.path("HF_XET_CACHE");
        Some(cache.unwrap_or_else(|| self.home().join("xet")))
    }

    fn token(&self) -> Option<Token> {
        if self.flag("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            return None;
        }
        let file = self.path("HF_TOKEN_PATH");
        let file = file.unwrap_or_else(|| self.home().join("token"));
        let text = self.get("HF_TOKEN").filter(|text| !text.trim().is_empty());
        let text = text.or_else(|| std::fs::read_to_string(file).ok())?;
        let text = text.replace(['\r', '\n'], "");
        let text = text.trim();
        (!text.is_empty()).then(|| Token::new(text))
    }

    /// The login that `HF_OIDC_RESOURCE` asks for; where it does, nothing else is tried.
    fn login(&self) -> Result<Option<Login>> {
        let Some(resource) = self.get("HF_OIDC_RESOURCE") else {
            return Ok(None);
        };
        let given = self.get("HF_OIDC_ID_TOKEN");
        let runner = || {
            let url = self.get("ACTIONS_ID_TOKEN_REQUEST_URL")?;
            let token = Token::new(self.get("ACTIONS_ID_TOKEN_REQUEST_TOKEN")?);
            Some(Identity::Runner { url, token })
        };
        let identity = given.map(|token| Identity::Token(Token::new(token)));
        match identity.or_else(runner) {
            Some(identity) => Ok(Some(Login { resource, identity })),
            None => Err(Error::NoIdentity { resource }),
        }
    }

    fn options(&self, endpoint: Option<&str>) -> Result<HubOptions> {
        let endpoint = endpoint.map(str::to_string);
        let endpoint = endpoint.or_else(|| self.get("HF_ENDPOINT"));
        let endpoint = endpoint.unwrap_or_else(|| PUBLIC_HUB.into());
        let mut options = HubOptions::new(endpoint.trim(), self.cache());
        options.xet = self.xet();
        options.offline = self.flag("HF_HUB_OFFLINE") || self.flag("TRANSFORMERS_OFFLINE");
        if !options.offline {
            options.login = self.login()?;
        }
        options.token = self.token();
        let seconds = self.get("HF_HUB_DOWNLOAD_TIMEOUT");
        let seconds = seconds.and_then(|text| text.parse().ok());
        if let Some(seconds) = seconds.filter(|&seconds: &u64| seconds > 0) {
            // a year is as good as for ever, and can be added to a clock
            options.patience = Duration::from_secs(seconds.min(365 * 24 * 3600));
        }
        Ok(options)
    }
}

fn environment() -> Environment<impl Fn(&str) -> Option<String>> {
    Environment(|name: &str| std::env::var(name).ok())
}

/// Which Hub to talk to, as whom, and where its files are kept. A flag wins over the environment.
pub fn hub_options(endpoint: Option<&str>) -> Result<HubOptions> {
    environment().options(endpoint)
}

/// Logs for debugging, where `SVDHUB_LOG` asks for them.
pub fn start_logging() {
    if let Some(filter) = environment().get("SVDHUB_LOG") {
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .init();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn options(variables: &[(&str, &str)]) -> HubOptions {
        let get = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name)?;
            Some(found.1.to_string())
        };
        Environment(get).options(None).expect("options")
    }

    #[test]
    fn caches_lie_where_pythons_do() {
        let cache = |variables| options(variables).cache;
        let usual = [("HOME", "/u")];
        assert_eq!(cache(&usual), Path::new("/u/.cache/huggingface/hub"));
        let xdg = [("HOME", "/u"), ("XDG_CACHE_HOME", "/c")];
        assert_eq!(cache(&xdg), Path::new("/c/huggingface/hub"));
        let home = [("HOME", "/u"), ("XDG_CACHE_HOME", "/c"), ("HF_HOME", "~/h")];
        assert_eq!(cache(&home), Path::new("/u/h/hub"));
        let old = [("HF_HOME", "/h"), ("HUGGINGFACE_HUB_CACHE", "/old")];
        assert_eq!(cache(&old), Path::new("/old"));
        let all = [
            ("HF_HOME", "/h"),
            ("HUGGINGFACE_HUB_CACHE", "/old"),
            ("HF_HUB_CACHE", "/new"),
        ];
        assert_eq!(cache(&all), Path::new("/new"));
        for (written, found) in [
            ("$SCRATCH/hf", "/s/hf/hub"),
            ("${SCRATCH}2", "/s2/hub"),
            ("/a/$NONE/${NONE/$", "/a/$NONE/${NONE/$/hub"),
        ] {
            let named = [("SCRATCH", "/s"), ("HF_HOME", written)];
            assert_eq!(options(&named).cache, Path::new(found));
        }
        let empty = [("HOME", "/u"), ("HF_HOME", ""), ("HF_HUB_CACHE", "")];
        assert_eq!(cache(&empty), Path::new("/u/.cache/huggingface/hub"));
    }

    #[test]
    fn flags_and_numbers_are_read_as_python_reads_them() {
        let offline = |value| options(&[("HF_HUB_OFFLINE", value)]).offline;
        for yes in ["1", "true", "ON", "Yes"] {
            assert!(offline(yes), "{yes}");
        }
        for no in ["0", "false", "", "2"] {
            assert!(!offline(no), "{no}");
        }
        assert!(options(&[("TRANSFORMERS_OFFLINE", "1")]).offline);
        let patience = |value| options(&[("HF_HUB_DOWNLOAD_TIMEOUT", value)]).patience;
        assert_eq!(patience("3"), Duration::from_secs(3));
        assert_eq!(patience("soon"), options(&[]).patience);
        assert_eq!(patience("0"), options(&[]).patience);
    }

    #[test]
    fn xet_is_used_unless_it_is_switched_off_and_remembers_where_pythons_does() {
        let xet = |variables: &[(&str, &str)]| options(variables).xet;
        let usual = [("HOME", "/u")];
        assert_eq!(
            xet(&usual).as_deref(),
            Some(Path::new("/u/.cache/huggingface/xet"))
        );
        let home = [("HF_HOME", "/h"), ("HF_HUB_CACHE", "/new")];
        assert_eq!(xet(&home).as_deref(), Some(Path::new("/h/xet")));
        let named = [("HF_HOME", "/h"), ("HF_XET_CACHE", "/x")];
        assert_eq!(xet(&named).as_deref(), Some(Path::new("/x")));
        for off in ["1", "true", "YES", "on"] {
            assert_eq!(xet(&[("HF_HUB_DISABLE_XET", off)]), None, "{off}");
        }
        for on in ["0", "", "no", "2"] {
            assert!(xet(&[("HF_HUB_DISABLE_XET", on)]).is_some(), "{on}");
        }
    }

    #[test]
    fn the_endpoint_is_the_flag_then_the_variable_then_the_public_one() {
        let get = |name: &str| (name == "HF_ENDPOINT").then(|| "http://mine/".to_string());
        let endpoint = |flag| Environment(get).options(flag).expect("options").endpoint;
        assert_eq!(endpoint(Some("http://flag")), "http://flag");
        assert_eq!(endpoint(None), "http://mine/");
        assert_eq!(options(&[]).endpoint, PUBLIC_HUB);
    }

    #[test]
    fn a_token_comes_from_the_variable_or_a_file() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("elsewhere");
        std::fs::write(&file, "hf_file\n").expect("writes");
        std::fs::write(dir.path().join("token"), " hf_home\r\n").expect("writes");
        let home = dir.path().to_str().expect("UTF-8");
        let file = file.to_str().expect("UTF-8");
        let token = |variables: &[(&str, &str)]| {
            let token = options(variables).token;
            token.map(|token| token == Token::new("hf_file"))
        };
        let is = |variables: &[(&str, &str)], text: &str| {
            assert_eq!(
                options(variables).token,
                Some(Token::new(text)),
                "{variables:?}"
            );
        };
        is(&[("HF_HOME", home)], "hf_home");
        is(&[("HF_HOME", home), ("HF_TOKEN_PATH", file)], "hf_file");
        is(&[("HF_HOME", home), ("HF_TOKEN", " hf_set\n")], "hf_set");
        assert_eq!(token(&[("HF_HOME", "/nowhere")]), None);
        let quiet = [("HF_HOME", home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")];
        assert_eq!(token(&quiet), None);
    }

    #[test]
    fn a_job_logs_in_where_it_is_asked_to() {
        let runner = [
            ("HF_OIDC_RESOURCE", "org/name"),
            ("ACTIONS_ID_TOKEN_REQUEST_URL", "http://runner"),
            ("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "secret"),
            ("HF_TOKEN", "hf_x"),
        ];
        let login = options(&runner).login.expect("a login");
        assert_eq!(login.resource, "org/name");
        assert!(matches!(&login.identity, Identity::Runner { url, .. } if url == "http://runner"));
        let given = [
            ("HF_OIDC_RESOURCE", "org/name"),
            ("HF_OIDC_ID_TOKEN", "jwt"),
        ];
        let login = options(&given).login.expect("a login");
        assert!(matches!(login.identity, Identity::Token(_)));
        assert!(options(&runner[1..]).login.is_none());
        let get = |name: &str| (name == "HF_OIDC_RESOURCE").then(|| "org/name".to_string());
        let refused = Environment(get).options(None);
        assert!(matches!(refused, Err(Error::NoIdentity { .. })));
    }
}
