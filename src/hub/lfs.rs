//! Large files to the Hub: each streamed from the disk, in one piece or in the parts that the Hub asks for.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use reqwest::Method;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use serde_json::{Value, json};

use super::client::{Asked, is_same_origin};
use super::local::LocalFile;
use super::sender::Sent;
use super::upload::Push;
use crate::contents::Section;
use crate::error::{Error, Result};
use crate::event::{Gauge, Stage, Unit};
use crate::workers;

/// Objects that are asked about together; their links are fresh when their turn comes.
const BATCH_OBJECTS: usize = 32;
const PARALLEL_UPLOADS: usize = 4;
/// An expired link is replaced this many times.
const FRESH_LINKS: usize = 3;
/// What LFS speaks, where the bytes themselves do not travel.
const LFS_JSON: &str = "application/vnd.git-lfs+json";

/// How large files are to be sent.
pub(super) enum Told<'a> {
    /// By Xet: those that may not be there.
    Xet(Vec<&'a LocalFile>),
    /// By LFS: of each file, what is to be done.
    Lfs(Vec<Value>),
}

impl Push<'_> {
    /// Sends the contents of LFS files that the Hub does not have; says how many bytes that were.
    pub fn send_large(&self, files: &[LocalFile]) -> Result<u64> {
        let mut contents = BTreeSet::new();
        let large: Vec<&LocalFile> = files
            .iter()
            .filter(|f| f.lfs && !f.unchanged && contents.insert(&f.sha256))
            .collect();
        if large.is_empty() {
            return Ok(0);
        }
        let bytes = large.iter().map(|f| f.size).sum();
        self.observer.start(Stage::Upload, bytes, Unit::Bytes);
        let sent = AtomicU64::new(0);
        for group in large.chunks(BATCH_OBJECTS) {
            let told = match self.objects(group, self.hub.options.xet.is_some())? {
                Told::Xet(lacking) => {
                    sent.fetch_add(self.send_chunks(&lacking)?, Ordering::Relaxed);
                    let bytes = |files: &[&LocalFile]| files.iter().map(|f| f.size).sum::<u64>();
                    let there = bytes(group) - bytes(&lacking);
                    self.observer.advance(Stage::Upload, there, &group[0].name);
                    continue;
                }
                Told::Lfs(told) => told,
            };
            let work: Vec<(&LocalFile, &Value)> = group.iter().copied().zip(&told).collect();
            workers::for_each(&work, PARALLEL_UPLOADS, |(file, told)| {
                sent.fetch_add(self.deliver(file, told)?, Ordering::Relaxed);
                Ok(())
            })?;
        }
        self.observer.finish(Stage::Upload);
        Ok(sent.into_inner())
    }

    /// What the Hub says of each of these: where it goes, or that it is there; or that all go by Xet, where we offer that.
    pub(super) fn objects<'f>(&self, files: &[&'f LocalFile], with_xet: bool) -> Result<Told<'f>> {
        let url = format!(
            "{}/{}.git/info/lfs/objects/batch",
            self.hub.endpoint(),
            self.repo
        );
        let what = self.asked("upload a large file", url);
        let asked = files.iter();
        let asked: Vec<Value> = asked
            .map(|f| json!({"oid": f.sha256, "size": f.size}))
            .collect();
        let mut transfers = vec!["basic", "multipart"];
        if with_xet {
            transfers.push("xet");
        }
        let mut body = json!({
            "operation": "upload",
            "transfers": transfers,
            "hash_algo": "sha256",
            "objects": asked,
        });
        // who proposes need not be allowed to write where that would land, which the Hub looks at as soon as it is named
        if !self.opens_pull_request() {
            body["ref"] = json!({"name": self.git_ref()});
        }
        let post = |url: &str| {
            self.hub
                .request(Method::POST, url)
                .header(ACCEPT, LFS_JSON)
                .header(CONTENT_TYPE, LFS_JSON)
                .body(body.to_string())
        };
        let (answer, _): (Value, _) = match self.hub.answer(&what, &post) {
            // a Hub that takes large files by Xet alone has no such address
            Err(Error::HubStatus {
                status: 404 | 405 | 501,
                ..
            }) if with_xet => return Ok(Told::Xet(files.to_vec())),
            answer => answer?,
        };
        let objects = answer["objects"].as_array();
        let told = files
            .iter()
            .map(|file| {
                let mut objects = objects.into_iter().flatten();
                let told = objects.find(|o| o["oid"] == file.sha256.as_str());
                let Some(told) = told else {
                    let detail = format!("its answer does not say where `{}` goes", file.name);
                    return Err(refused(200, &what, detail));
                };
                if let Some(message) = told["error"]["message"].as_str() {
                    let status = told["error"]["code"].as_u64().unwrap_or(0) as u16;
                    let message = self.hub.without_token(message.into());
                    return Err(refused(status, &what, message));
                }
                Ok(told.clone())
            })
            .collect::<Result<Vec<Value>>>()?;
        if !with_xet || answer["transfer"] != "xet" {
            return Ok(Told::Lfs(told));
        }
        let pairs = files.iter().zip(&told);
        let lacking = pairs.filter(|(_, told)| told["actions"]["upload"].is_object());
        let lacking: Vec<&LocalFile> = lacking.map(|(file, _)| *file).collect();
        // a Hub that names none has all, or never does: what is there costs no second transfer
        let all = lacking.is_empty();
        Ok(Told::Xet(if all { files.to_vec() } else { lacking }))
    }

    /// Brings one object to where it goes, and says how many bytes were sent.
    fn deliver(&self, file: &LocalFile, told: &Value) -> Result<u64> {
        let mut told = told.clone();
        let gauge = Gauge::new(self.observer, Stage::Upload, &file.name, 0);
        for fresh in 0.. {
            match self.send_object(file, &told["actions"], &gauge) {
                Err(Error::LinkRefused { .. }) if fresh < FRESH_LINKS => {
                    match self.objects(&[file], false)? {
                        Told::Lfs(mut fresh_told) => told = fresh_told.swap_remove(0),
                        Told::Xet(_) => unreachable!("Xet was not offered"),
                    }
                }
                result => {
                    gauge.reach(file.size);
                    return result;
                }
            }
        }
        unreachable!("the last try returns")
    }

    fn send_object(&self, file: &LocalFile, actions: &Value, gauge: &Gauge) -> Result<u64> {
        let upload = &actions["upload"];
        let sent = if upload.is_object() {
            self.send_contents(file, upload, gauge)?;
            file.size
        } else {
            0
        };
        let verify = &actions["verify"];
        if let Some(href) = verify["href"].as_str() {
            let body = json!({"oid": file.sha256, "size": file.size});
            let what = self.asked("confirm an upload", self.hub.at_endpoint(href));
            self.hub.send(&what, &|url| {
                let request = self.hub.request(Method::POST, url);
                let asked = headers_for(url, &what, &verify["header"]);
                request.headers(asked).json(&body)
            })?;
        }
        Ok(sent)
    }

    /// In one piece, or in the parts the Hub asks for; each is repeated by itself.
    fn send_contents(&self, file: &LocalFile, upload: &Value, gauge: &Gauge) -> Result<()> {
        let href = upload["href"].as_str().unwrap_or_default();
        let href = self.hub.at_endpoint(href);
        let header = &upload["header"];
        let lies_here: Section;
        let contents = match self.contents {
            Some(contents) => contents,
            None => {
                lies_here = Section::of(&file.path, 0, file.size);
                &lies_here
            }
        };
        let sent = |range| Sent {
            contents,
            range,
            gauge,
            unread: Mutex::default(),
        };
        let Some(chunk) = chunk_size(header) else {
            self.put(&href, sent(0..file.size), header)?;
            return Ok(());
        };
        let what = self.asked("complete an upload", href);
        let addresses = part_addresses(header);
        if addresses.len() as u64 != file.size.div_ceil(chunk) {
            let detail = format!(
                "it gives {} addresses for {} bytes in parts of {chunk}",
                addresses.len(),
                file.size
            );
            return Err(refused(200, &what, detail));
        }
        let mut parts = Vec::new();
        for (index, (number, address)) in addresses.into_iter().enumerate() {
            let start = index as u64 * chunk;
            let end = file.size.min(start + chunk);
            let etag = self.put(address, sent(start..end), &Value::Null)?;
            parts.push(json!({"partNumber": number, "etag": etag}));
        }
        let body = json!({"oid": file.sha256, "parts": parts});
        self.hub.send(&what, &|url| {
            self.hub
                .request(Method::POST, url)
                .timeout(self.hub.upload_patience(file.size))
                .header(ACCEPT, LFS_JSON)
                .header(CONTENT_TYPE, LFS_JSON)
                .body(body.to_string())
        })?;
        Ok(())
    }

    /// Sends part of a file, and says the tag of what arrived.
    fn put(&self, href: &str, sent: Sent, header: &Value) -> Result<String> {
        let what = self.asked("upload a large file", href.into());
        let sender = self.hub.sender(PARALLEL_UPLOADS)?;
        let patience = self.hub.upload_patience(sent.range.end - sent.range.start);
        let response = self.hub.send_by(&what, &|url| {
            let asked = headers_for(url, &what, header);
            let request = self.hub.request(Method::PUT, url).headers(asked).build()?;
            sender.send(&request, &sent, patience)
        });
        let unread = sent.unread.into_inner();
        if let Some(error) = unread.unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let response = response?;
        let etag = response.headers().get("etag").and_then(|e| e.to_str().ok());
        Ok(etag.unwrap_or_default().to_string())
    }

    pub fn asked(&self, action: &'static str, url: String) -> Asked {
        Asked::of(action, url, self.repo, &self.revision)
    }
}

fn refused(status: u16, what: &Asked, detail: String) -> Error {
    Error::HubStatus {
        status,
        request: what.action.into(),
        detail,
    }
}

fn chunk_size(header: &Value) -> Option<u64> {
    let size = &header["chunk_size"];
    let parsed = size.as_str().and_then(|size| size.parse().ok());
    parsed.or(size.as_u64()).filter(|&size| size > 0)
}

/// The addresses of the parts by their numbers, which are the keys that are numbers.
fn part_addresses(header: &Value) -> Vec<(u64, &str)> {
    let entries = header.as_object().into_iter().flatten();
    let mut addresses: Vec<(u64, &str)> = entries
        .filter_map(|(key, url)| Some((key.parse().ok()?, url.as_str()?)))
        .collect();
    addresses.sort_unstable();
    addresses
}

/// The headers that an action asks for, to be sent in the place of our own of the same names: where it leads, and not where
/// a redirect leads from there.
fn headers_for(url: &str, what: &Asked, headers: &Value) -> HeaderMap {
    let mut asked = HeaderMap::new();
    if !is_same_origin(url, &what.url) {
        return asked;
    }
    for (name, value) in headers.as_object().into_iter().flatten() {
        let value = value.as_str().map(HeaderValue::try_from);
        // what cannot be a header is none
        if let (Ok(name), Some(Ok(mut value))) = (HeaderName::try_from(name.as_str()), value) {
            // some of them open what only we should
            value.set_sensitive(true);
            asked.insert(name, value);
        }
    }
    asked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_sent_in_the_order_of_their_numbers() {
        let header = json!({"chunk_size": "5", "00002": "b", "00010": "c", "00001": "a"});
        assert_eq!(chunk_size(&header), Some(5));
        assert_eq!(part_addresses(&header), [(1, "a"), (2, "b"), (10, "c")]);
        assert_eq!(chunk_size(&json!({"chunk_size": "0"})), None);
        assert_eq!(chunk_size(&json!({"Authorization": "x"})), None);
    }

    #[test]
    fn headers_of_an_action_take_the_place_of_ours() {
        let request = reqwest::blocking::Client::new()
            .post("http://127.0.0.1:9")
            .header("Authorization", "Bearer ours");
        let asked = json!({"authorization": "Bearer theirs", "x-other": "y", "bad name": "z"});
        let what = Asked::of("put", "http://127.0.0.1:9/there".into(), "o/n", "main");
        let elsewhere = headers_for("http://127.0.0.1:10/there", &what, &asked);
        assert!(
            elsewhere.is_empty(),
            "what opens one server is not shown to another"
        );
        let asked = headers_for("http://127.0.0.1:9/then", &what, &asked);
        let request = request.headers(asked).build().expect("a request");
        let sent = request.headers().get_all("authorization");
        assert_eq!(sent.iter().collect::<Vec<_>>(), ["Bearer theirs"]);
        assert_eq!(request.headers().len(), 2);
    }
}
