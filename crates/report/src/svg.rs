//! A drawing, and the axes of charts. Colours are CSS variables of the page, so that dark and light follow the reader.

use std::fmt::Write as _;

use crate::text::escape;

/// Width of every drawing in its own units; the page scales it.
pub(crate) const WIDTH: f64 = 720.0;

/// A drawing under construction.
pub(crate) struct Svg {
    body: String,
    height: f64,
}

/// Where a text begins, ends or has its middle.
#[derive(Clone, Copy)]
pub(crate) enum Anchor {
    Start,
    Middle,
    End,
}

impl Svg {
    pub(crate) fn new(height: f64) -> Self {
        Svg { body: String::new(), height }
    }

    pub(crate) fn text(&mut self, x: f64, y: f64, anchor: Anchor, class: &str, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        // Writing to a string cannot fail.
        let _ = write!(
            self.body,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" class=\"{class}\">{}</text>",
            escape(text)
        );
    }

    /// A filled shape with what it says when pointed at.
    pub(crate) fn rect(&mut self, at: [f64; 4], class: &str, mark: Option<usize>, says: &str) {
        let [x, y, w, h] = at;
        let mark = mark.map(|m| format!(" data-mark=\"{m}\"")).unwrap_or_default();
        let _ = write!(
            self.body,
            "<rect x=\"{x:.2}\" y=\"{y:.2}\" width=\"{:.2}\" height=\"{h:.2}\" class=\"{class}\"{mark}>",
            w.max(0.0)
        );
        self.close(says, "rect");
    }

    pub(crate) fn circle(&mut self, x: f64, y: f64, r: f64, class: &str, mark: Option<usize>, says: &str) {
        let mark = mark.map(|m| format!(" data-mark=\"{m}\"")).unwrap_or_default();
        let _ = write!(self.body, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{r}\" class=\"{class}\"{mark}>");
        self.close(says, "circle");
    }

    fn close(&mut self, says: &str, element: &str) {
        if !says.is_empty() {
            let _ = write!(self.body, "<title>{}</title>", escape(says));
        }
        let _ = write!(self.body, "</{element}>");
    }

    pub(crate) fn line(&mut self, from: (f64, f64), to: (f64, f64), class: &str) {
        let _ = write!(
            self.body,
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" class=\"{class}\"/>",
            from.0, from.1, to.0, to.1
        );
    }

    /// The ticks of a scale below a chart that ends at `bottom`.
    pub(crate) fn ticks(&mut self, x: &Scale, bottom: f64, shown: &dyn Fn(f64) -> String) {
        for tick in x.ticks() {
            let at = x.at(tick);
            self.line((at, bottom), (at, bottom + 5.0), "axis");
            self.text(at, bottom + 19.0, Anchor::Middle, "tick", &shown(tick));
        }
    }

    /// A line through points.
    pub(crate) fn curve(&mut self, points: &[(f64, f64)], class: &str) {
        let mut d = String::new();
        for (i, (x, y)) in points.iter().enumerate() {
            let _ = write!(d, "{}{x:.1} {y:.1}", if i == 0 { "M" } else { "L" });
        }
        self.path(&d, class);
    }

    pub(crate) fn path(&mut self, d: &str, class: &str) {
        let _ = write!(self.body, "<path d=\"{d}\" class=\"{class}\"/>");
    }

    /// The whole, named and described for those who do not see it.
    pub(crate) fn finish(self, id: &str, title: &str, desc: &str) -> String {
        format!(
            "<svg viewBox=\"0 0 {WIDTH} {:.0}\" role=\"img\" aria-labelledby=\"{id}-t {id}-d\"><title id=\"{id}-t\">{}</title><desc id=\"{id}-d\">{}</desc>{}</svg>",
            self.height,
            escape(title),
            escape(desc),
            self.body
        )
    }
}

/// From values to places along one direction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    from: f64,
    to: f64,
    low: f64,
    high: f64,
    log: bool,
}

impl Scale {
    /// From zero.
    pub(crate) fn linear(low: f64, high: f64, from: f64, to: f64) -> Self {
        let high = if high > low { high } else { low + 1.0 };
        Scale { from, to, low, high, log: false }
    }

    /// By factors; both ends above zero.
    pub(crate) fn log(low: f64, high: f64, from: f64, to: f64) -> Self {
        let low = low.max(f64::MIN_POSITIVE);
        let high = if high > low { high } else { low * 2.0 };
        Scale { from, to, low, high, log: true }
    }

    pub(crate) fn at(&self, x: f64) -> f64 {
        let share = match self.log {
            true => (x.max(self.low) / self.low).ln() / (self.high / self.low).ln(),
            false => (x - self.low) / (self.high - self.low),
        };
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }

    /// Round values to label, from the first at or above the low end.
    pub(crate) fn ticks(&self) -> Vec<f64> {
        if self.log {
            let factors: &[f64] = if self.high / self.low > 100.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
            let (a, b) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
            let all = (a..=b).flat_map(|e| factors.iter().map(move |f| f * 10f64.powi(e)));
            let round: Vec<f64> = all.filter(|x| *x >= self.low * 0.999 && *x <= self.high * 1.001).collect();
            // Less than half a decade has too few round values.
            if round.len() > 2 {
                return round;
            }
        }
        const ABOUT: f64 = 6.0;
        let rough = (self.high - self.low) / ABOUT;
        let size = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|f| f * size).into_iter().find(|s| *s >= rough).unwrap_or(rough);
        let first = (self.low / step).ceil();
        (0..=12).map(|i| (first + f64::from(i)) * step).take_while(|x| *x <= self.high * 1.0001).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ticks_are_round() {
        assert_eq!(Scale::linear(0.0, 5.0, 0.0, 1.0).ticks(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(Scale::log(1.0, 50.0, 0.0, 1.0).ticks(), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
        assert_eq!(Scale::log(60.0, 86_400.0, 0.0, 1.0).ticks(), [100.0, 1000.0, 10_000.0]);
        assert_eq!(Scale::log(55.0, 72.0, 0.0, 1.0).ticks(), [55.0, 60.0, 65.0, 70.0]);
    }

    proptest! {
        /// Every place lies on the drawing, and order is kept.
        #[test]
        fn scales_keep_order(low in 1e-6f64..1e6, span in 1e-6f64..1e6, a in 0f64..1.0, b in 0f64..1.0) {
            for scale in [Scale::linear(low, low + span, 10.0, 700.0), Scale::log(low, low + span, 10.0, 700.0)] {
                let (x, y) = (scale.at(low + span * a.min(b)), scale.at(low + span * a.max(b)));
                prop_assert!((10.0..=700.0).contains(&x) && x <= y + 1e-9 && y <= 700.0);
                for t in scale.ticks() {
                    prop_assert!((9.99..=700.01).contains(&scale.at(t)));
                }
            }
        }
    }
}
