//! Numbers as people read them, and text that HTML does not obey.

/// Text inside HTML, attributes included.
///
/// Control characters that no page may hold are dropped.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() && c != '\n' && c != '\t' => {}
            c => out.push(c),
        }
    }
    out
}

/// A time in the unit that reads best.
pub(crate) fn seconds(s: f64) -> String {
    match s.abs() {
        x if x >= 1e5 => format!("{:.1} days", s / 86_400.0),
        x if x >= 7200.0 => format!("{:.1} h", s / 3600.0),
        x if x >= 300.0 => format!("{:.1} min", s / 60.0),
        x if x >= 1.0 => format!("{} s", digits(s, 3)),
        x if x >= 1e-3 => format!("{:.1} ms", s * 1e3),
        x if x > 0.0 => format!("{:.1} us", s * 1e6),
        _ => "0 s".to_owned(),
    }
}

/// Bytes in decimal units, as accelerators are sold.
pub(crate) fn bytes(b: f64) -> String {
    match b.abs() {
        x if x >= 1e15 => format!("{:.2} PB", b / 1e15),
        x if x >= 1e12 => format!("{:.2} TB", b / 1e12),
        x if x >= 1e9 => format!("{:.1} GB", b / 1e9),
        x if x >= 1e6 => format!("{:.1} MB", b / 1e6),
        _ => format!("{:.1} kB", b / 1e3),
    }
}

/// Dollars, in millions from ten of them.
pub(crate) fn dollars(usd: f64) -> String {
    match usd.abs() {
        x if x >= 1e9 => format!("${:.2}B", usd / 1e9),
        x if x >= 1e7 => format!("${:.1}M", usd / 1e6),
        x if x >= 1e6 => format!("${:.2}M", usd / 1e6),
        x if x >= 1000.0 => format!("${}", count(usd)),
        _ => format!("${usd:.2}"),
    }
}

/// A whole number with commas.
pub(crate) fn count(x: f64) -> String {
    let whole = format!("{:.0}", x.abs());
    let mut out = String::new();
    for (i, c) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    if x < 0.0 && whole != "0" { format!("-{out}") } else { out }
}

/// A share as percent.
pub(crate) fn percent(share: f64) -> String {
    let p = 100.0 * share;
    if p != 0.0 && p.abs() < 1.0 { format!("{p:.2} %") } else { format!("{p:.1} %") }
}

/// So many significant digits, without an exponent below a billion.
pub(crate) fn digits(x: f64, significant: i32) -> String {
    if x == 0.0 || !x.is_finite() {
        return format!("{x}");
    }
    let before = x.abs().log10().floor() as i32;
    if before >= 9 {
        return format!("{x:.*e}", (significant - 1).max(0) as usize);
    }
    format!("{x:.*}", (significant - 1 - before).max(0) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        let check = |shown: String, expected: &str| assert_eq!(shown, expected);
        check(seconds(6.4213), "6.42 s");
        check(seconds(0.0123), "12.3 ms");
        check(seconds(86_400.0 * 69.0), "69.0 days");
        check(seconds(600.0), "10.0 min");
        check(bytes(75.9e9), "75.9 GB");
        check(dollars(112_345_678.0), "$112.3M");
        check(dollars(1_234_567.0), "$1.23M");
        check(dollars(2.5), "$2.50");
        check(count(16_384.0), "16,384");
        check(percent(0.407), "40.7 %");
        check(digits(0.001234, 2), "0.0012");
        check(digits(123.4, 2), "123");
        check(digits(4.2e22, 3), "4.20e22");
    }

    #[test]
    fn markup_in_names_stays_text() {
        assert_eq!(escape("<script>\"a\" & 'b'\u{7}"), "&lt;script&gt;&quot;a&quot; &amp; &#39;b&#39;");
    }
}
