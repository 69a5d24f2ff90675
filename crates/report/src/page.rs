//! The frame of a page: one file, no network, a strict policy that says so.

use crate::Figure;
use crate::text::escape;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");
/// Nothing is loaded from anywhere; errors are kept where a test, or a person, finds them.
const POLICY: &str =
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:";
const ERRORS: &str = "addEventListener('error',e=>{document.documentElement.dataset.error=e.message});\
    addEventListener('securitypolicyviolation',e=>{document.documentElement.dataset.error=e.violatedDirective+' '+e.blockedURI});";

/// A page under construction.
pub(crate) struct Page {
    title: String,
    head: String,
    body: String,
    nav: Vec<(&'static str, &'static str)>,
}

impl Page {
    /// A page whose answer stands first.
    pub(crate) fn new(title: &str, answer: &str) -> Self {
        let head =
            format!("<h1>{}</h1><p class=\"answer\" id=\"answer\">{}</p>", escape(title), escape(answer));
        Page { title: title.to_owned(), head, body: String::new(), nav: Vec::new() }
    }

    /// The figures that everybody asks for, beside the answer: (number, what it is).
    pub(crate) fn facts(&mut self, facts: &[(String, String)]) {
        self.head += "<ul class=\"facts\">";
        for (value, name) in facts {
            self.head += &format!("<li><b>{}</b><span>{}</span></li>", escape(value), escape(name));
        }
        self.head += "</ul>";
    }

    /// Begins a section.
    pub(crate) fn section(&mut self, id: &'static str, title: &'static str) {
        if !self.nav.is_empty() {
            self.body += "</section>";
        }
        self.nav.push((id, title));
        self.body += &format!("<section id=\"s-{id}\"><h2>{}</h2>", escape(title));
    }

    /// A figure with its numbers beside it.
    pub(crate) fn figure(&mut self, f: &Figure) {
        let name = escape(&f.title);
        self.body += &format!(
            "<figure id=\"{id}\" aria-labelledby=\"{id}-h\"><h3 id=\"{id}-h\">{name}</h3><p class=\"says\">{}</p><div class=\"both\"><div class=\"draw\">{}</div><div class=\"rows\" tabindex=\"0\" role=\"region\" aria-label=\"{name}: the numbers\">{}</div></div></figure>",
            escape(&f.says),
            f.drawing,
            f.table.html(&f.title),
            id = f.id,
        );
    }

    /// HTML made elsewhere in this crate.
    pub(crate) fn html(&mut self, html: &str) {
        self.body += html;
    }

    /// The page, with what machines read inside it.
    pub(crate) fn finish(mut self, data: &serde_json::Value) -> String {
        if !self.nav.is_empty() {
            self.body += "</section>";
        }
        let nav: String =
            self.nav.iter().map(|(id, name)| format!("<a href=\"#s-{id}\">{}</a>", escape(name))).collect();
        let nav = if nav.is_empty() { nav } else { format!("<nav aria-label=\"Sections\">{nav}</nav>") };
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<meta name=\"color-scheme\" content=\"light dark\">\n<meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\n<title>{}</title>\n<style>{STYLE}</style>\n<script>{ERRORS}</script>\n</head>\n<body>\n<a class=\"skip\" href=\"#main\">To the figures</a>\n<header>{}</header>\n{nav}\n<main id=\"main\">{}</main>\n<footer>Made by phalanx {}. The answer as data is inside this file; every number is an estimate with the assumptions stated.</footer>\n<script type=\"application/json\" id=\"data\">{}</script>\n<script>{SCRIPT}</script>\n</body>\n</html>\n",
            escape(&self.title),
            self.head,
            self.body,
            env!("CARGO_PKG_VERSION"),
            embedded(data)
        )
    }
}

/// JSON that cannot end the element around it.
fn embedded(data: &serde_json::Value) -> String {
    let text = serde_json::to_string(data).expect("numbers and text are JSON");
    text.replace('<', "\\u003c")
}

/// The data of a page made here.
///
/// ```
/// # use report::data_of;
/// assert_eq!(data_of("<script type=\"application/json\" id=\"data\">{\"a\":1}</script>"), Some("{\"a\":1}"));
/// assert_eq!(data_of("<p>"), None);
/// ```
pub fn data_of(page: &str) -> Option<&str> {
    let from = page.split_once("<script type=\"application/json\" id=\"data\">")?.1;
    Some(from.split_once("</script>")?.0)
}
