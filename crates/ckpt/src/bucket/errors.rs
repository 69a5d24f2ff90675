//! What a store's refusals mean to the person who named it.

use std::path::Path;

use object_store::Error as StoreError;
use object_store::client::HttpError;
use spec::Error;

/// Characters of a store's own words that a message repeats.
const SHOWN_CHARS: usize = 240;

/// One message for what kept the store from `doing` something with `place`.
pub(super) fn told(doing: &str, place: &Path, e: &StoreError) -> Error {
    let place = place.display();
    if is_missing_bucket(e) {
        return Error::user(format!("{doing} {place}: there is no such bucket"))
            .hint(format!("create it, or mend its name{}", endpoint()));
    }
    let code = code(e).map(|c| format!(" ({c})")).unwrap_or_default();
    let unknown = ["InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthenticationFailed", "InvalidToken", "ExpiredToken"];
    match e {
        StoreError::NotFound { .. } => Error::user(format!("{doing} {place}: it is not there"))
            .hint("give the URL of a checkpoint, or of the place where a run's checkpoints lie"),
        StoreError::PermissionDenied { .. } if !unknown.iter().any(|u| code.contains(u)) => {
            Error::user(format!("{doing} {place}: the store denies it{code}"))
                .hint("the credentials need the right to list, read, write and delete objects under that URL")
        }
        StoreError::PermissionDenied { .. } | StoreError::Unauthenticated { .. } => {
            Error::user(format!("{doing} {place}: the store does not accept the credentials{code}"))
                .hint(credentials(&place.to_string()))
        }
        StoreError::NotSupported { .. } | StoreError::NotImplemented { .. } => {
            Error::user(format!("{doing} {place}: the store cannot do that: {}", short(e)))
                .hint("checkpoints need create-only puts (If-None-Match), multipart uploads and ranged reads")
        }
        _ => failed(doing, &place.to_string(), e),
    }
}

/// What is neither the user's nor a plain refusal: no answer, or an answer that says that the store has failed.
fn failed(doing: &str, place: &str, e: &StoreError) -> Error {
    if let Some(http) = http_error(e) {
        return Error::failure(format!("{doing} {place}: no answer from the store: {}", deepest(http)))
            .hint(format!("see that it can be reached from here{}", endpoint()));
    }
    let words = short(e);
    let hint = match words.contains("region") {
        true => "set AWS_REGION to the bucket's",
        false => "try again later",
    };
    Error::failure(format!("{doing} {place}: {words}")).hint(format!("{hint}{}", endpoint()))
}

/// What S3, Google and Azure call the refusal, in the XML that they answer with.
fn code(e: &StoreError) -> Option<String> {
    let words = e.to_string();
    let (_, rest) = words.split_once("<Code>")?;
    let (code, _) = rest.split_once("</Code>")?;
    Some(code.chars().take(SHOWN_CHARS).collect())
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
fn endpoint() -> String {
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
