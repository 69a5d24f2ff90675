use std::path::Path;

/// Inputs that were left out, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Files that are not UTF-8.
    pub not_utf8: u64,
    /// Files or documents without text.
    pub empty: u64,
    /// Files that could not be read.
    pub unreadable: u64,
    /// JSON documents that could not be read.
    pub bad_documents: u64,
    /// The first files that are not UTF-8.
    pub not_utf8_names: Vec<String>,
    /// What was wrong with the first files and documents that could not be read.
    pub messages: Vec<String>,
}

/// Messages kept about what cannot be read; the rest is counted.
const MESSAGES_MAX: usize = 20;
/// Names kept.
const NAMES_MAX: usize = 5;

impl Skipped {
    pub(crate) fn not_utf8(&mut self, path: &Path) {
        self.not_utf8 += 1;
        if self.not_utf8_names.len() < NAMES_MAX {
            self.not_utf8_names.push(path.display().to_string());
        }
    }

    pub(crate) fn unreadable(&mut self, message: String) {
        self.unreadable += 1;
        self.message(message);
    }

    pub(crate) fn bad_document(&mut self, message: String) {
        self.bad_documents += 1;
        self.message(message);
    }

    /// Adds what another thread left out.
    pub(crate) fn add(&mut self, other: Skipped) {
        self.not_utf8 += other.not_utf8;
        self.empty += other.empty;
        self.unreadable += other.unreadable;
        self.bad_documents += other.bad_documents;
        self.not_utf8_names.extend(other.not_utf8_names);
        self.not_utf8_names.truncate(NAMES_MAX);
        self.messages.extend(other.messages);
        self.messages.truncate(MESSAGES_MAX);
    }

    fn message(&mut self, message: String) {
        if self.messages.len() < MESSAGES_MAX {
            self.messages.push(message);
        }
    }

    /// What to tell the user, a line each; nothing where nothing was left out.
    pub fn warnings(&self) -> Vec<String> {
        let names = &self.not_utf8_names;
        let more = if self.not_utf8 > names.len() as u64 { ", ..." } else { "" };
        let names = if names.is_empty() { String::new() } else { format!(": {}{more}", names.join(", ")) };
        let counts = [
            (self.not_utf8, "inputs not UTF-8", names.as_str()),
            (self.empty, "inputs without text", ""),
            (self.unreadable, "inputs not readable", ""),
            (self.bad_documents, "bad documents", ""),
        ];
        let counts = counts.into_iter().filter(|(count, ..)| *count > 0);
        let mut lines: Vec<String> =
            counts.map(|(count, what, names)| format!("left out {count} {what}{names}")).collect();
        lines.extend(self.messages.iter().cloned());
        lines
    }
}
