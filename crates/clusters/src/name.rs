//! Names that schedulers accept.

use spec::{Error, Result};

/// Longest DNS label (RFC 1123, section 2.1).
pub(crate) const LABEL_MAX: usize = 63;

/// A label of RFC 1123: lower-case letters, digits and hyphens, beginning with a letter and ending with no hyphen, short
/// enough that `suffix` more characters fit. Kubernetes asks for a leading letter where the name becomes a service's.
///
/// ```
/// assert!(clusters::name::label("--name", "llama-3", 10).is_ok());
/// assert!(clusters::name::label("--name", "Llama_3", 10).is_err());
/// ```
///
/// # Errors
/// What is wrong with it, with a name that would do.
pub fn label(flag: &str, text: &str, suffix: usize) -> Result<()> {
    let most = LABEL_MAX - suffix;
    let is_inside = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let fits = text.len() <= most
        && text.chars().all(is_inside)
        && text.starts_with(|c: char| c.is_ascii_lowercase())
        && !text.ends_with('-');
    if fits {
        return Ok(());
    }
    let error = Error::user(format!(
        "{flag}={text}: expected a name of RFC 1123 with at most {most} characters: a-z, 0-9 and hyphens, beginning with \
         a letter and not ending with a hyphen"
    ));
    let near = nearest(text, most);
    Err(if near.is_empty() { error } else { error.hint(format!("{flag}={near}")) })
}

/// The nearest name that would do, or nothing.
fn nearest(text: &str, most: usize) -> String {
    let lower = text.to_ascii_lowercase();
    let kept: String =
        lower.chars().map(|c| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' }).collect();
    let from_letter = kept.trim_start_matches(|c: char| !c.is_ascii_lowercase());
    from_letter.chars().take(most).collect::<String>().trim_end_matches('-').to_owned()
}

/// A subdomain of RFC 1123: labels with dots between them, as names of secrets and claims may be.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn subdomain(flag: &str, text: &str) -> Result<()> {
    /// Longest name (RFC 1123, section 2.1).
    const MOST: usize = 253;
    let is_part = |part: &str| {
        let is_end = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        !part.is_empty()
            && part.chars().all(|c| is_end(c) || c == '-')
            && part.starts_with(is_end)
            && part.ends_with(is_end)
    };
    if text.len() <= MOST && text.split('.').all(is_part) {
        return Ok(());
    }
    Err(Error::user(format!("{flag}={text}: expected a name of RFC 1123: a-z, 0-9, hyphens and dots"))
        .hint("kubectl get secrets,pvc shows the names that there are"))
}

/// A name of an environment variable.
///
/// # Errors
/// It is none.
pub fn variable(flag: &str, text: &str) -> Result<()> {
    let is_inside = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if text.chars().all(is_inside) && text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
        return Ok(());
    }
    Err(Error::user(format!("{flag}={text}: expected the name of a variable: letters, digits and _")))
}

/// A reference to an image, `[HOST[:PORT]/]PATH[:TAG][@DIGEST]`, in the characters that such have.
///
/// # Errors
/// It cannot be one, or names no version and would be another one tomorrow.
pub fn image(flag: &str, text: &str) -> Result<()> {
    let is_inside = |c: char| c.is_ascii_alphanumeric() || "-._/:@".contains(c);
    let is_end = |c: char| c.is_ascii_alphanumeric();
    let path = text.split('@').next().unwrap_or_default();
    let last = path.rsplit('/').next().unwrap_or_default();
    let name = &path[..path.len() - last.len() + last.find(':').unwrap_or(last.len())];
    let repository = name.split_once('/').map_or(name, |(_, rest)| rest);
    let is_one = text.chars().all(is_inside)
        && text.starts_with(is_end)
        && text.ends_with(|c: char| is_end(c) || c == '_')
        && !text.contains("//")
        && !repository.contains(|c: char| c.is_ascii_uppercase());
    if !is_one {
        return Err(Error::user(format!("{flag}={text}: expected an image like ghcr.io/you/phalanx:0.1.0"))
            .hint("names of images are in lower case; build one from the Containerfile"));
    }
    if !last.contains(':') && !text.contains('@') || last.ends_with(":latest") {
        return Err(Error::user(format!("{flag}={text} names no version: nodes would run different ones"))
            .hint("give a tag other than latest, or a digest"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(found: &Result<()>, expected: Option<&str>) {
        match expected {
            None => assert!(found.is_ok(), "{found:?}"),
            Some(words) => {
                let error = found.as_ref().expect_err(words);
                let text = format!("{error} {}", error.hint_text().unwrap_or_default());
                assert!(text.contains(words) && error.exit_code() == 2, "{text}");
            }
        }
    }

    #[test]
    fn names_of_jobs() {
        check(&label("--name", "a", 10), None);
        check(&label("--name", &"a".repeat(53), 10), None);
        check(&label("--name", &"a".repeat(54), 10), Some("at most 53"));
        check(&label("--name", "Llama_3.1", 0), Some("--name=llama-3-1"));
        check(&label("--name", "3b", 0), Some("--name=b"));
        check(&label("--name", "run-", 0), Some("--name=run"));
        check(&label("--name", "", 0), Some("RFC 1123"));
        check(&label("--name", "läuft", 0), Some("--name=l-uft"));
        check(&subdomain("--claim", "a.b-c.d"), None);
        check(&subdomain("--claim", "a..b"), Some("--claim=a..b"));
        check(&subdomain("--claim", "A"), Some("RFC 1123"));
        check(&variable("--env", "_A1"), None);
        check(&variable("--env", "1A"), Some("--env=1A"));
    }

    #[test]
    fn images() {
        check(&image("--image", "phalanx:0.1.0"), None);
        check(&image("--image", "registry.example:5000/a/b:1"), None);
        check(&image("--image", "a/b@sha256:0123"), None);
        check(&image("--image", "Upper.example/a/b:V1"), None);
        check(&image("--image", "phalanx"), Some("no version"));
        check(&image("--image", "registry.example:5000/phalanx"), Some("no version"));
        check(&image("--image", "phalanx:latest"), Some("no version"));
        for wrong in ["", "a b:1", "a/B:1", "-a:1", "a//b:1", "a:", "https://a/b:1"] {
            check(&image("--image", wrong), Some("like ghcr.io/you/phalanx"));
        }
    }
}
