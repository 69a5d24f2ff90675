//! What a store's refusals mean to the person who named it.

use std::path::Path;

use object_store::Error as StoreError;
use object_store::client::HttpError;
use spec::Error;

/// Characters of a store's own words that a message repeats.
const SHOWN_CHARS: usize = 240;

/// Where credentials are asked for that nothing else gives.
const METADATA: [&str; 2] = ["169.254.169.254", "metadata.google.internal"];

/// One message for what kept the store from `doing` something with `place`.
pub(super) fn told(doing: &str, place: &Path, e: &StoreError) -> Error {
    let place = &place.display().to_string();
    if is_missing_bucket(e) {
        return Error::user(format!("{doing} {place}: there is no such bucket"))
            .hint(format!("create it, or mend its name{}", endpoint(place)));
    }
    if METADATA.iter().any(|host| e.to_string().contains(host)) {
        let asked = format!("{doing} {place}: no credentials; the machine's cloud was asked: {}", short(e));
        return Error::user(asked).hint(credentials(place));
    }
    match (e, refusal(e)) {
        (StoreError::NotFound { .. }, _) => Error::user(format!("{doing} {place}: it is not there"))
            .hint("give the URL of a checkpoint, or of the place where a run's checkpoints lie"),
        (StoreError::NotSupported { .. } | StoreError::NotImplemented { .. }, _) => {
            Error::user(format!("{doing} {place}: the store cannot do that: {}", short(e)))
                .hint("checkpoints need create-only puts (If-None-Match), multipart uploads and ranged reads")
        }
        (_, Some(Refusal::Unknown)) => {
            Error::user(format!("{doing} {place}: the store does not accept the credentials{}", code(e)))
                .hint(credentials(place))
        }
        (_, Some(Refusal::Denied)) => Error::user(format!("{doing} {place}: the store denies it{}", code(e)))
            .hint("the credentials need the right to list, read, write and delete objects under that URL"),
        (_, None) => failed(doing, place, e),
    }
}

/// Why a store that has answered does not do what it was asked for.
enum Refusal {
    /// It does not know who asks.
    Unknown,
    /// It knows, and does not let him.
    Denied,
}

fn refusal(e: &StoreError) -> Option<Refusal> {
    let unknown = [
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "AuthenticationFailed",
        "InvalidToken",
        "ExpiredToken",
    ];
    // Lists come without a kind of their own.
    let status = |code: &str| short(e).contains(&format!("status code: {code} "));
    match e {
        StoreError::Unauthenticated { .. } => Some(Refusal::Unknown),
        StoreError::PermissionDenied { .. } if unknown.iter().any(|u| code(e).contains(u)) => {
            Some(Refusal::Unknown)
        }
        StoreError::PermissionDenied { .. } => Some(Refusal::Denied),
        _ if status("401") || (status("403") && unknown.iter().any(|u| code(e).contains(u))) => {
            Some(Refusal::Unknown)
        }
        _ if status("403") => Some(Refusal::Denied),
        _ => None,
    }
}

/// What is neither the user's nor a plain refusal: no answer, or an answer that says that the store has failed.
fn failed(doing: &str, place: &str, e: &StoreError) -> Error {
    if let Some(http) = http_error(e) {
        return Error::failure(format!("{doing} {place}: no answer from the store: {}", deepest(http)))
            .hint(format!("see that it can be reached from here{}", endpoint(place)));
    }
    let words = short(e);
    let hint = match words.contains("region") {
        true => "set AWS_REGION to the bucket's",
        false => "try again later",
    };
    Error::failure(format!("{doing} {place}: {words}")).hint(format!("{hint}{}", endpoint(place)))
}

/// What S3 and Azure call the refusal, in the XML that they answer with; in brackets, or nothing.
fn code(e: &StoreError) -> String {
    let words = e.to_string();
    let code = words.split_once("<Code>").and_then(|(_, rest)| rest.split_once("</Code>"));
    code.map(|(code, _)| format!(" ({})", code.chars().take(SHOWN_CHARS).collect::<String>()))
        .unwrap_or_default()
}

pub(super) fn is_missing_bucket(e: &StoreError) -> bool {
    let words = e.to_string();
    ["NoSuchBucket", "ContainerNotFound", "bucket does not exist"].iter().any(|sign| words.contains(sign))
}

/// Which variables give credentials for a URL of this scheme.
pub(super) fn credentials(url: &str) -> String {
    let how = match url.split_once("://").map_or("", |(scheme, _)| scheme) {
        "gs" => "set GOOGLE_APPLICATION_CREDENTIALS to a service account's file",
        "az" | "azure" | "abfs" | "abfss" => {
            "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (or AZURE_STORAGE_SAS_TOKEN)"
        }
        _ => "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN if they are temporary)",
    };
    format!("{how}, in the environment of every rank")
}

/// Where requests went, if the environment says.
fn endpoint(url: &str) -> String {
    if !url.starts_with("s3") {
        return String::new();
    }
    let set = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"];
    let set = set.iter().find_map(|key| Some((key, std::env::var(key).ok()?)));
    set.map(|(key, value)| format!("; {key} is {value}")).unwrap_or_default()
}

fn http_error(e: &StoreError) -> Option<&HttpError> {
    let mut at: Option<&(dyn std::error::Error + 'static)> = Some(e);
    while let Some(error) = at {
        if let Some(http) = error.downcast_ref::<HttpError>() {
            return Some(http);
        }
        at = error.source();
    }
    None
}

/// The innermost cause: the outer ones only repeat the request.
fn deepest(e: &(dyn std::error::Error + 'static)) -> String {
    let mut at = e;
    while let Some(inner) = at.source() {
        at = inner;
    }
    at.to_string()
}

/// The store's words without the request that they repeat.
fn short(e: &StoreError) -> String {
    let words = e.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    let (before, said) = words.split_once(" - ").unwrap_or(("", &words));
    let retries = before.split_once(", after ").and_then(|(_, rest)| rest.split(',').next());
    let cut: String = said.chars().take(SHOWN_CHARS).collect();
    match retries {
        Some(retries) => format!("{} (after {retries})", cut.trim_end_matches([':', ' '])),
        None => cut,
    }
}
