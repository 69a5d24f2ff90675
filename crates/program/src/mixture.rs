//! Layouts that a mixture of experts trains under with the numbers of any other.

use spec::{Error, ExpertRows, Layout, ModelSpec, Reduce, Result, Zero};

use crate::NORM_CHUNK;

/// Refuses what would make the numbers of a mixture depend on its layout, or leave rows out.
///
/// # Errors
/// Which key of the layout it is, and the values that work.
pub fn check_mixture(model: &ModelSpec, l: &Layout) -> Result<()> {
    let Some(e) = model.experts else { return Ok(()) };
    let cuts = [("tp", l.tp), ("cp", l.cp)].into_iter().find(|(_, ranks)| *ranks > 1);
    if let (true, Some((axis, ranks))) = (e.router.balance_loss > 0.0, cuts) {
        return Err(Error::user(format!(
            "model.experts.balance_loss with layout.{axis} = {ranks}: it is of whole sequences, which no rank routes there",
        ))
        .hint(format!("set layout.{axis}=1, or model.experts.balance_loss=0")));
    }
    if l.ep == 1 {
        return Ok(());
    }
    if l.expert_rows == ExpertRows::Even {
        return Err(Error::user(
            "layout.expert_rows = \"even\" has no room for uneven choices: it is for planning",
        )
        .hint("set layout.expert_rows=all"));
    }
    if l.zero >= Zero::Gradients && l.shard_dp() * l.cp * l.tp < l.ep {
        return Err(Error::user(format!(
            "layout.shard = {} cuts the {} ranks that hold all experts, whose gradients are sharded after each micro-batch",
            l.shard_dp(),
            l.ep
        ))
        .hint(format!("set layout.shard={} or more, or layout.zero to 0 or 1", l.ep / (l.cp * l.tp))));
    }
    // The gradient norm is summed by chunks, which must not straddle ranks.
    let odd = |ep: usize| {
        let held = e.count / ep;
        let biases = if model.mlp_bias { [held * model.hidden, 2 * held * e.ffn] } else { [0; 2] };
        [[held * e.ffn * model.hidden, 0], biases]
            .concat()
            .into_iter()
            .find(|n| !n.is_multiple_of(NORM_CHUNK))
    };
    if let (Reduce::Tree, Some(elements)) = (l.reduce, odd(l.ep)) {
        let works =
            (1..=e.count).filter(|ep| e.count.is_multiple_of(*ep) && (*ep == 1 || odd(*ep).is_none()));
        let works: Vec<String> = works.map(|ep| ep.to_string()).collect();
        return Err(Error::user(format!(
            "layout.ep = {}: a rank's experts have {elements} elements, no multiple of {NORM_CHUNK}, by which the norm is summed",
            l.ep,
        ))
        .hint(format!("values of layout.ep that work: {}; with layout.reduce=ring any does", works.join(", "))));
    }
    Ok(())
}
