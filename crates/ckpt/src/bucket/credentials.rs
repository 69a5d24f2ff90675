//! Where credentials come from, and what is said when there are none.

use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use spec::{Error, Result};

/// Where clouds tell a machine who it is; nobody answers elsewhere.
const METADATA: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(169, 254, 169, 254)), 80);

/// Metadata come from the host that the machine runs on.
const METADATA_WAIT: Duration = Duration::from_secs(1);

/// Variables of which one says how requests are signed, or that they are not.
const S3: &[&str] = &[
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_METADATA_ENDPOINT",
    "AWS_SKIP_SIGNATURE",
];
const GOOGLE: &[&str] = &[
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_SKIP_SIGNATURE",
];
const AZURE: &[&str] = &[
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_TOKEN",
    "AZURE_CLIENT_ID",
    "AZURE_STORAGE_CLIENT_ID",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_MSI_ENDPOINT",
    "AZURE_STORAGE_USE_EMULATOR",
    "AZURE_SKIP_SIGNATURE",
];

/// Refuses a store for which nothing says who is asking: its client would look for a cloud's metadata for minutes.
pub(super) fn check(scheme: &str, name: &str) -> Result<()> {
    let set = |variables: &[&str]| variables.iter().any(|v| std::env::var_os(v).is_some());
    let known = match scheme {
        "s3" | "s3a" => set(S3) || of_profile().is_some(),
        "gs" => {
            set(GOOGLE)
                || home(".config/gcloud/application_default_credentials.json").is_some_and(|p| p.exists())
        }
        "az" | "azure" | "abfs" | "abfss" => set(AZURE),
        _ => return Ok(()),
    };
    if known || TcpStream::connect_timeout(&METADATA, METADATA_WAIT).is_ok() {
        return Ok(());
    }
    Err(Error::user(format!("{name}: no credentials, and this machine has no identity in a cloud"))
        .hint(super::errors::credentials(name)))
}

/// What a profile of the file that AWS's tools share says.
#[derive(Debug, PartialEq)]
pub(super) struct Keys {
    pub(super) key: String,
    pub(super) secret: String,
    pub(super) token: Option<String>,
}

/// The keys of `AWS_PROFILE` or the default one, unless variables give others.
pub(super) fn of_profile() -> Option<Keys> {
    if S3.iter().any(|v| std::env::var_os(v).is_some()) {
        return None;
    }
    let file = std::env::var_os("AWS_SHARED_CREDENTIALS_FILE").map(PathBuf::from);
    let text = std::fs::read_to_string(file.or_else(|| home(".aws/credentials"))?).ok()?;
    keys(&text, &std::env::var("AWS_PROFILE").unwrap_or_else(|_| "default".to_owned()))
}

fn keys(text: &str, profile: &str) -> Option<Keys> {
    let (mut inside, mut found) = (false, [None, None, None]);
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            inside = name.trim() == profile;
        } else if let Some((name, value)) = line.split_once('=').filter(|_| inside) {
            let names = ["aws_access_key_id", "aws_secret_access_key", "aws_session_token"];
            if let Some(at) = names.iter().position(|n| *n == name.trim()) {
                found[at] = Some(value.trim().to_owned());
            }
        }
    }
    let [key, secret, token] = found;
    Some(Keys { key: key?, secret: secret?, token })
}

fn home(path: &str) -> Option<PathBuf> {
    std::env::var_os("HOME").map(|home| PathBuf::from(home).join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_read_from_its_section() {
        let text = "# of two accounts\n[default]\naws_access_key_id = A\naws_secret_access_key=B=\n\n[ other ]\n\
                    aws_access_key_id=C\naws_secret_access_key = D\naws_session_token = E\n[half]\naws_access_key_id=F\n";
        let of = |profile| keys(text, profile);
        let (key, secret) = ("A".to_owned(), "B=".to_owned());
        assert_eq!(of("default"), Some(Keys { key, secret, token: None }));
        let token = Some("E".to_owned());
        assert_eq!(of("other"), Some(Keys { key: "C".to_owned(), secret: "D".to_owned(), token }));
        assert_eq!((of("half"), of("gone")), (None, None));
    }
}
