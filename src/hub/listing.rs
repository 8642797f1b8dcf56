//! What a repository holds: its files as the Hub lists them, page by page, and which of their names may become paths.

use reqwest::Method;
use reqwest::header::{HeaderMap, LINK};
use serde::Deserialize;

use super::cache::STATE as DOWNLOAD_STATE;
use super::client::{Asked, Hub, LIST, segment};
use crate::error::{Error, Result};
use crate::sum::is_hex;
use crate::workspace::STATE_DIR;

/// One file of a repository, as the Hub lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteFile {
    pub path: String,
    pub size: u64,
    /// sha256 of an LFS file, git blob sha1 of a regular one: the ETag of its download.
    pub oid: String,
    /// What git holds: of an LFS file, the id of its pointer.
    pub blob_id: String,
    pub xet_hash: Option<String>,
    pub lfs: bool,
}

/// Of a listing: a thousand files are on each.
const PAGES_MAX: usize = 1000;

impl Hub {
    /// Every file of a commit, whatever its name: whether it may be written is asked where it is fetched.
    ///
    /// Asked without hf-hub, whose listing drops the sha256 of large files (1.0.0 expects it under another name).
    pub fn files(&self, repo: &str, commit: &str) -> Result<Vec<RemoteFile>> {
        #[derive(Deserialize)]
        struct Entry {
            #[serde(rename = "type")]
            kind: String,
            path: String,
            oid: String,
            #[serde(default)]
            size: u64,
            lfs: Option<Large>,
            #[serde(rename = "xetHash")]
            xet_hash: Option<String>,
        }
        #[derive(Deserialize)]
        struct Large {
            oid: String,
        }
        let tree = format!("tree/{}?recursive=true", segment(commit));
        let mut what = Asked::of(LIST, self.api_url(repo, &tree), repo, commit);
        let mut files = Vec::new();
        for _ in 0..PAGES_MAX {
            let (entries, headers) = self.answer(&what, &|url| self.request(Method::GET, url))?;
            let next = next_page(&headers).map(|url| self.at_endpoint(&url));
            let entries: Vec<Entry> = entries;
            for entry in entries.into_iter().filter(|e| e.kind == "file") {
                let oid = entry.lfs.as_ref().map_or(&entry.oid, |lfs| &lfs.oid);
                // it names the file's contents in the cache
                let digits = if entry.lfs.is_some() { 64 } else { 40 };
                if !is_hex(oid, digits) {
                    return Err(Error::HostilePath {
                        repo: repo.into(),
                        name: self.without_token(oid.clone()),
                    });
                }
                files.push(RemoteFile {
                    path: entry.path,
                    size: entry.size,
                    lfs: entry.lfs.is_some(),
                    blob_id: entry.oid.clone(),
                    xet_hash: entry.xet_hash,
                    oid: entry.lfs.map_or(entry.oid, |lfs| lfs.oid),
                });
            }
            match next {
                None => return Ok(files),
                // a page elsewhere is none of this Hub's, and one that comes again leads in circles
                Some(url) if self.is_ours(&url) && url != what.url => what.url = url,
                Some(_) => {
                    return Err(Error::HubStatus {
                        status: 200,
                        request: what.action.into(),
                        detail: "the next page of its listing leads elsewhere".into(),
                    });
                }
            }
        }
        Err(Error::HubStatus {
            status: 200,
            request: what.action.into(),
            detail: format!("its listing goes on after {PAGES_MAX} pages"),
        })
    }
}

/// The address of the next page: the link `<url>; rel="next"` among others (RFC 8288, 3).
fn next_page(headers: &HeaderMap) -> Option<String> {
    let links = headers.get_all(LINK).iter();
    let links = links.filter_map(|links| links.to_str().ok());
    links.flat_map(parsed_links).find_map(|(url, rel)| {
        let mut relations = rel.split_ascii_whitespace();
        let is_next = relations.any(|relation| relation.eq_ignore_ascii_case("next"));
        is_next.then(|| url.to_string())
    })
}

/// Each address of a `Link` header with its first `rel`.
fn parsed_links(text: &str) -> Vec<(&str, String)> {
    let mut links = Vec::new();
    let mut left = text;
    while let Some((url, rest)) = left.split_once('<').and_then(|(_, it)| it.split_once('>')) {
        // up to the comma behind its parameters: one in quotes is none
        let mut quote = None;
        let end = rest.find(|c| {
            match (quote, c) {
                (None, '"' | '\'') => quote = Some(c),
                (Some(open), c) if open == c => quote = None,
                (None, ',') => return true,
                _ => {}
            }
            false
        });
        let (parameters, behind) = rest.split_at(end.unwrap_or(rest.len()));
        let mut named = parameters.split(';').filter_map(|it| it.split_once('='));
        let rel = named.find(|(name, _)| name.trim().eq_ignore_ascii_case("rel"));
        let rel = rel.map_or("", |(_, value)| value.trim());
        links.push((url, rel.trim_matches(['"', '\'']).to_string()));
        left = behind;
    }
    links
}

/// Refuses to fetch files whose names lead out of the folder they are downloaded to, or into what git and svdhub keep there.
pub(super) fn refuse_hostile(repo: &str, files: &[RemoteFile]) -> Result<()> {
    match files.iter().find(|file| !stays_inside(&file.path)) {
        None => Ok(()),
        Some(file) => Err(Error::HostilePath {
            repo: repo.into(),
            name: file.path.clone(),
        }),
    }
}

/// Whether a repository's path names a file inside the folder it is downloaded to.
pub(super) fn stays_inside(path: &str) -> bool {
    !path.is_empty()
        && !path.starts_with(DOWNLOAD_STATE)
        && !path.contains(['\\', '\0'])
        && path
            .split('/')
            .all(|part| !["", ".", "..", ".git", STATE_DIR].contains(&part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_leave_the_folder_are_seen() {
        for bad in [
            "../x",
            "a/../../x",
            "/etc/passwd",
            "a//b",
            "",
            "a\\b",
            "a/./b",
            "x\0y",
            ".git/hooks/post-checkout",
            "a/.svdhub/job.json",
        ] {
            assert!(!stays_inside(bad), "{bad:?}");
        }
        for good in [
            "a",
            "a/b.c",
            "..a/b",
            "12:30.txt",
            "model-00001-of-00002.safetensors",
        ] {
            assert!(stays_inside(good), "{good:?}");
        }
    }

    #[test]
    fn the_next_page_is_found_however_its_link_is_written() {
        let next = |links: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(LINK, links.parse().expect("a header"));
            next_page(&headers)
        };
        for links in [
            r#"<u?c=1>; rel="next""#,
            "<u?c=1>; rel=next",
            "<u?c=1>;Rel='next'",
            r#"<first>; rel="first", <u?c=1>; title="a,b;c"; rel="last next""#,
        ] {
            assert_eq!(next(links).as_deref(), Some("u?c=1"), "{links}");
        }
        assert_eq!(next(r#"<u?c=3,x>; rel="next""#).as_deref(), Some("u?c=3,x"));
        for none in [
            r#"<u>; rel="prev""#,
            r#"<u>; title="next""#,
            "u; rel=next",
            "",
        ] {
            assert_eq!(next(none), None, "{none}");
        }
    }
}
