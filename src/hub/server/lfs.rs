//! Large files: where each is sent, in one piece or in parts, and what has arrived.

use axum::body::Bytes;
use axum::http::header;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::reply::{Call, Refusal, Reply, header_text, list, refuse, text};
use super::repo::Refused;
use super::routes::{Hub, Visit};
use super::xet::Right;
use crate::sum::hex;

/// The bytes that an address on the CDN permits to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target<'a> {
    /// All of the object with this sha256.
    Object(&'a str),
    /// One part of it, counted from 1.
    Part(&'a str, usize),
}

/// The most parts of one object, as S3 has it.
const PARTS_MAX: u64 = 10_000;

/// What LFS speaks, where the bytes themselves do not travel.
const LFS_JSON: &str = "application/vnd.git-lfs+json";

/// What an upload to the CDN promises, if its address was given out by this Hub.
pub fn upload_target<'a>(hub: &Hub, call: &'a Call) -> Result<Target<'a>, Refusal> {
    let number = call.segments.get(2).and_then(|number| number.parse().ok());
    match (call.segments.as_slice(), number) {
        ([folder, oid], _) if folder == "objects" => {
            check_signature(hub, call, "upload", oid)?;
            Ok(Target::Object(oid))
        }
        ([folder, oid, _], Some(number)) if folder == "parts" => {
            check_signature(hub, call, &format!("part {number}"), oid)?;
            Ok(Target::Part(oid, number))
        }
        _ => refuse(403, "The signature of this address is wrong"),
    }
}

/// The address on the CDN that permits one thing with one object.
pub fn object_url(hub: &Hub, verb: &str, oid: &str) -> String {
    let signature = signature(hub, verb, oid);
    format!("{}/objects/{oid}?signature={signature}", hub.cdn)
}

/// Answers a download from the CDN, which knows no accounts: the signed address is the permission.
pub fn download(hub: &Hub, call: &Call) -> Result<Reply, Refusal> {
    match call.segments.as_slice() {
        [folder, oid] if folder == "objects" => {
            check_signature(hub, call, "download", oid)?;
            match hub.store.object(oid) {
                Some((path, size)) => Ok(Reply::file(path, size, oid, call)),
                None => refuse(404, "No such object"),
            }
        }
        _ => refuse(403, "The signature of this address is wrong"),
    }
}

/// Puts the parts of an object together, as the last request of an upload in parts asks for.
pub fn complete(hub: &Hub, call: &Call) -> Result<Reply, Refusal> {
    let oid = call.parameter("oid").unwrap_or_default();
    check_signature(hub, call, "complete", oid)?;
    if header_text(&call.headers, header::CONTENT_TYPE) != Some(LFS_JSON) {
        return refuse(415, format!("Expected {LFS_JSON}"));
    }
    let body = call.json()?;
    let mut parts = Vec::new();
    for part in list(&body, "parts")? {
        let number = part["partNumber"].as_u64().unwrap_or(0) as usize;
        let etag = text(part, "etag")?.trim_matches('"').to_owned();
        parts.push((number, etag));
    }
    if parts.iter().map(|(number, _)| *number).ne(1..=parts.len()) {
        return refuse(400, "The parts are not numbered 1, 2, …");
    }
    hub.store.join_parts(oid, &parts)?;
    Ok(Reply::done())
}

impl Visit<'_> {
    pub fn lfs_batch(&self, batch: &Value) -> Result<Reply, Refusal> {
        let upload = batch["operation"] != "download";
        let offers = |transfer: &str| {
            let transfers = batch["transfers"].as_array();
            transfers.is_some_and(|all| all.iter().any(|word| word == transfer))
        };
        let xet = upload && self.hub.cas.is_some() && offers("xet");
        let part_bytes = self.hub.part_bytes.filter(|_| offers("multipart"));
        let mut verify = json!({"href": format!("{}.git/info/lfs/verify", self.page())});
        // the public Hub names what opens that address; a client that adds its own to it has one too many
        if let Some(token) = header_text(&self.call.headers, header::AUTHORIZATION) {
            verify["header"] = json!({"Authorization": token});
        }
        let mut objects = Vec::new();
        for object in list(batch, "objects")? {
            let (oid, size) = (text(object, "oid")?, &object["size"]);
            let found = self.hub.store.object(oid);
            let there = found.is_some_and(|(_, found)| *size == found);
            let mut answer = json!({"oid": oid, "size": size, "authenticated": true});
            // No `actions` at all says that there is nothing to do; clients stumble over `null`.
            match (upload, there) {
                (true, true) => {}
                (true, false) if xet => {
                    let pass = self.xet_pass(Right::Write, batch["ref"]["name"].as_str())?;
                    answer["actions"] = json!({"upload": pass});
                }
                (true, false) => {
                    let size = size.as_u64().unwrap_or(0);
                    match part_bytes {
                        Some(bytes) if bytes > 0 && size.div_ceil(bytes) > PARTS_MAX => {
                            let message = format!("more than {PARTS_MAX} parts of {bytes} bytes");
                            answer["error"] = json!({"code": 422, "message": message});
                        }
                        _ => {
                            let upload = self.upload_action(oid, size, part_bytes);
                            answer["actions"] = json!({"upload": upload, "verify": verify});
                        }
                    }
                }
                (false, true) => {
                    let download = json!({"href": object_url(self.hub, "download", oid)});
                    answer["actions"] = json!({"download": download});
                }
                (false, false) => {
                    answer["error"] = json!({"code": 404, "message": "No such object"})
                }
            }
            objects.push(answer);
        }
        let transfer = if xet {
            "xet"
        } else if part_bytes.is_some() {
            "multipart"
        } else {
            // what every client must understand, whatever it offers
            "basic"
        };
        Ok(
            Reply::json(json!({"transfer": transfer, "objects": objects}))
                .header("content-type", LFS_JSON),
        )
    }

    /// Where an object goes; what fits one part goes in one piece.
    fn upload_action(&self, oid: &str, size: u64, part_bytes: Option<u64>) -> Value {
        let Some(part_bytes) = part_bytes.filter(|&bytes| bytes > 0 && size > bytes) else {
            return json!({"href": object_url(self.hub, "upload", oid)});
        };
        let mut header = json!({"chunk_size": part_bytes.to_string()});
        for number in 1..=size.div_ceil(part_bytes) {
            let signature = signature(self.hub, &format!("part {number}"), oid);
            let cdn = &self.hub.cdn;
            let url = format!("{cdn}/parts/{oid}/{number}?signature={signature}");
            header[format!("{number:05}")] = json!(url);
        }
        let signature = signature(self.hub, "complete", oid);
        let base = &self.call.base;
        let href = format!("{base}/api/complete_multipart?oid={oid}&signature={signature}");
        json!({"href": href, "header": header})
    }

    pub fn lfs_verify(&self) -> Result<Reply, Refusal> {
        let object = self.call.json()?;
        match self.hub.store.object(text(&object, "oid")?) {
            Some((_, size)) if object["size"] == size => Ok(Reply::done()),
            _ => refuse(404, "Object does not exist or has another size"),
        }
    }
}

/// An object, or a part of one, on its way to the disk.
pub struct Receiving<'a> {
    incoming: super::store::Incoming<'a>,
    target: Target<'a>,
    is_empty: bool,
}

impl<'a> Receiving<'a> {
    pub fn begin(hub: &'a Hub, call: &'a Call) -> Result<Self, Refusal> {
        let target = upload_target(hub, call)?;
        let incoming = hub.store.receive().map_err(Refused::Disk)?;
        Ok(Self {
            incoming,
            target,
            is_empty: true,
        })
    }

    pub fn write(&mut self, piece: &Bytes) -> Result<(), Refusal> {
        self.is_empty &= piece.is_empty();
        Ok(self.incoming.write(piece).map_err(Refused::Disk)?)
    }

    pub fn finish(self) -> Result<Reply, Refusal> {
        if self.is_empty {
            return refuse(501, "S3 takes no empty objects");
        }
        let etag = match self.target {
            Target::Object(oid) => self.incoming.finish(Some(oid))?,
            Target::Part(oid, number) => self.incoming.finish_part(oid, number)?,
        };
        Ok(Reply::empty(200).header("etag", format!("\"{etag}\"")))
    }
}

fn check_signature(hub: &Hub, call: &Call, verb: &str, oid: &str) -> Result<(), Refusal> {
    if call.parameter("signature") == Some(&signature(hub, verb, oid)) {
        Ok(())
    } else {
        refuse(403, "The signature of this address is wrong")
    }
}

fn signature(hub: &Hub, verb: &str, oid: &str) -> String {
    hex(&Sha256::digest(format!("{} {verb} {oid}", hub.secret))[..16])
}
