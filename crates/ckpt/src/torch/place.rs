use crate::manifest::Kind;

/// The tensor of bytes that holds what a manifest says beside its tensors.
pub(crate) const META: &str = "phalanx.meta";

/// In front of the names of averaged parameters.
const AVERAGES: &str = "ema.";

/// What a tensor of a training state is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Param,
    ExpAvg,
    ExpAvgSq,
    /// The average of a parameter over steps.
    Ema,
    /// The optimiser's count of steps of one parameter.
    Step,
}

impl Place {
    pub(crate) fn of(kind: Kind) -> Self {
        match kind {
            Kind::Param => Place::Param,
            Kind::ExpAvg => Place::ExpAvg,
            Kind::ExpAvgSq => Place::ExpAvgSq,
            Kind::Ema => Place::Ema,
        }
    }

    pub(crate) fn kind(self) -> Option<Kind> {
        match self {
            Place::Param => Some(Kind::Param),
            Place::ExpAvg => Some(Kind::ExpAvg),
            Place::ExpAvgSq => Some(Kind::ExpAvgSq),
            Place::Ema => Some(Kind::Ema),
            Place::Step => None,
        }
    }

    fn state(self) -> &'static str {
        match self {
            Place::Param | Place::Ema => "",
            Place::ExpAvg => "exp_avg",
            Place::ExpAvgSq => "exp_avg_sq",
            Place::Step => "step",
        }
    }

    /// The name that PyTorch's state dictionaries have for it.
    pub(crate) fn name(self, parameter: &str) -> String {
        match self {
            Place::Param => format!("model.{parameter}"),
            Place::Ema => format!("{AVERAGES}{parameter}"),
            _ => format!("optim.state.{parameter}.{}", self.state()),
        }
    }

    /// What a tensor is, and of which parameter, by the names that PyTorch, torchtitan (`optimizer.state.NAME.exp_avg`)
    /// and Megatron (`optimizer.state.exp_avg.NAME`) give.
    pub(crate) fn parse(name: &str) -> (Self, &str) {
        let body = ["optim.", "optimizer."].iter().find_map(|front| name.strip_prefix(front)).unwrap_or(name);
        if let Some(of) = body.strip_prefix("state.") {
            for place in [Place::ExpAvgSq, Place::ExpAvg, Place::Step] {
                let behind = of.strip_suffix(place.state()).and_then(|of| of.strip_suffix('.'));
                let in_front = of.strip_prefix(place.state()).and_then(|of| of.strip_prefix('.'));
                if let Some(parameter) = behind.or(in_front) {
                    return (place, parameter.strip_prefix("model.").unwrap_or(parameter));
                }
            }
        }
        match name.strip_prefix(AVERAGES) {
            Some(parameter) => (Place::Ema, parameter),
            None => (Place::Param, name.strip_prefix("model.").unwrap_or(name)),
        }
    }

    /// The keys of the nested dictionaries that lead to a tensor with a name of [`Place::name`].
    pub(crate) fn path(name: &str) -> Vec<&str> {
        match name.strip_prefix("optim.state.").and_then(|of| of.rsplit_once('.')) {
            Some((parameter, state)) => vec!["optim", "state", parameter, state],
            None => name.splitn(2, '.').collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_every_writer() {
        for (name, expected) in [
            ("model.layers.0.attn.q.weight", (Place::Param, "layers.0.attn.q.weight")),
            ("layers.0.w", (Place::Param, "layers.0.w")),
            ("optim.state.layers.0.w.exp_avg", (Place::ExpAvg, "layers.0.w")),
            ("optimizer.state.layers.0.w.exp_avg_sq", (Place::ExpAvgSq, "layers.0.w")),
            ("state.layers.0.w.step", (Place::Step, "layers.0.w")),
            (
                "optimizer.state.exp_avg.decoder.final_layernorm.weight",
                (Place::ExpAvg, "decoder.final_layernorm.weight"),
            ),
            ("optimizer.state.exp_avg_sq.decoder.w", (Place::ExpAvgSq, "decoder.w")),
        ] {
            assert_eq!(Place::parse(name), expected, "{name}");
        }
        for place in [Place::Param, Place::ExpAvg, Place::ExpAvgSq, Place::Ema, Place::Step] {
            assert_eq!(Place::parse(&place.name("a.b")), (place, "a.b"));
        }
        assert_eq!(Place::path("optim.state.a.b.exp_avg"), ["optim", "state", "a.b", "exp_avg"]);
        assert_eq!(Place::path("model.a.b"), ["model", "a.b"]);
    }
}
