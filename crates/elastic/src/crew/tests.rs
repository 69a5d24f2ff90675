use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn limits(max_restarts: u32) -> Limits {
    Limits { max_restarts, min_places: 3, ..Limits::default() }
}

/// Three workers that run; those in `recover` have said that they can.
fn running(limits: Limits, recover: &[usize]) -> Crew {
    let mut crew = Crew::new(3, limits);
    assert_eq!(crew.step(Event::Tick, Duration::ZERO), [Action::Join]);
    seat(&mut crew, Duration::ZERO);
    for place in recover {
        assert_eq!(crew.step(Event::Said(*place, Report::CanRecover), Duration::ZERO), []);
    }
    crew
}

fn seat(crew: &mut Crew, now: Duration) {
    crew.step(Event::Seated, now);
    for place in crew.in_use() {
        if !crew.lives(place) {
            crew.step(Event::Started(place), now);
        }
    }
}

fn lose(crew: &mut Crew, place: usize, now: Duration) -> Vec<Action> {
    crew.step(Event::Lost(place, format!("worker {place} died")), now)
}

/// What follows, whether it is this node's own trouble, and a part of the reason.
fn check(actions: &[Action], expected: (Next, bool, &str)) {
    let Some(Action::End(end)) = actions.first() else { panic!("no end: {actions:?}") };
    assert_eq!((&end.next, end.own), (&expected.0, expected.1), "{actions:?}");
    assert!(end.why.contains(expected.2), "{actions:?}");
}

#[test]
fn workers_that_cannot_recover_are_started_over_while_restarts_last() {
    let mut crew = running(limits(1), &[]);
    check(&lose(&mut crew, 1, SECOND), (Next::StartOver, true, "worker 1 died"));
    assert_eq!(crew.step(Event::Tick, SECOND * 2), [], "the others must be gone first");
    crew.step(Event::Lost(0, "stopped".into()), SECOND * 2);
    assert_eq!(crew.step(Event::Lost(2, "stopped".into()), SECOND * 2), [Action::Join]);
    seat(&mut crew, SECOND * 2);
    check(&lose(&mut crew, 0, SECOND * 3), (Next::GiveUp, true, "worker 0 died"));
    assert_eq!(crew.restarts(), 1);
}

#[test]
fn survivors_go_on_and_the_lost_place_is_filled() {
    let mut crew = running(limits(1), &[0, 1, 2]);
    check(&lose(&mut crew, 1, SECOND), (Next::Meet, true, "worker 1 died"));
    assert_eq!(crew.wakes_at(), Some(SECOND + SETTLE));
    assert_eq!(crew.step(Event::Tick, SECOND + SETTLE), [Action::Join]);
    assert!(crew.lives(0) && !crew.lives(1) && crew.lives(2));
    seat(&mut crew, SECOND);
    check(&lose(&mut crew, 2, SECOND * 2), (Next::GiveUp, true, "worker 2 died"));
}

#[test]
fn two_deaths_at_once_cost_one_restart() {
    let mut crew = running(limits(1), &[0, 1, 2]);
    check(&lose(&mut crew, 1, SECOND), (Next::Meet, true, "worker 1"));
    assert_eq!(lose(&mut crew, 2, SECOND), []);
    seat(&mut crew, SECOND);
    assert_eq!((crew.restarts(), crew.lives(2)), (1, true));
}

#[test]
fn workers_on_their_way_into_the_world_are_replaced_with_the_lost_one() {
    let mut crew = running(limits(1), &[0]);
    let actions = lose(&mut crew, 1, SECOND);
    check(&actions, (Next::Meet, true, "worker 1"));
    assert!(matches!(actions[1..], [Action::Kill(2, _)]), "{actions:?}");
    assert_eq!(crew.step(Event::Tick, SECOND + SETTLE), [], "it must be gone first");
    assert_eq!(crew.step(Event::Lost(2, "SIGKILL".into()), SECOND + SETTLE), [Action::Join]);
}

#[test]
fn a_stopped_worker_is_killed_and_replaced() {
    let mut crew = running(limits(1), &[0, 1, 2]);
    for place in [0, 2] {
        crew.step(Event::Said(place, Report::Beat { ops: 1, waits: true }), SECOND * 4);
    }
    assert_eq!(crew.wakes_at(), Some(Limits::SILENT));
    let actions = crew.step(Event::Tick, Limits::SILENT);
    assert!(
        matches!(&actions[..], [Action::Kill(1, why)] if why.contains("no sign of life for 5.0 s")),
        "{actions:?}"
    );
    assert_eq!(crew.step(Event::Tick, Limits::SILENT + SECOND), [], "once");
    check(&lose(&mut crew, 1, Limits::SILENT + SECOND), (Next::Meet, true, "no sign of life"));
}

#[test]
fn a_worker_that_hangs_is_told_from_one_that_waits() {
    let mut crew = running(limits(1), &[0, 1, 2]);
    let mut killed = Vec::new();
    for second in 1..=Limits::HUNG.as_secs() {
        let now = SECOND * u32::try_from(second).unwrap();
        for (place, ops, waits) in [(0, second, false), (1, 7, false), (2, 7, true)] {
            killed.extend(crew.step(Event::Said(place, Report::Beat { ops, waits }), now));
        }
    }
    assert_eq!(killed, [], "it came to its seventh op in the first second");
    let now = Limits::HUNG + SECOND;
    let beats = [0, 2, 1].map(|p| crew.step(Event::Said(p, Report::Beat { ops: 7, waits: p == 2 }), now));
    assert!(
        matches!(&beats.concat()[..], [Action::Kill(1, why)] if why.contains("stood still")),
        "{beats:?}"
    );
}

#[test]
fn a_world_that_failed_while_all_live_meets_again_at_the_price_of_a_restart() {
    let stranded = |crew: &mut Crew, now| {
        for place in 0..3 {
            let report = Report::Stranded { lost: Some(1), why: "the link was cut".into() };
            assert_eq!(crew.step(Event::Said(place, report), now), []);
        }
        crew.step(Event::Tick, now + Limits::STRANDED)
    };
    let mut crew = running(limits(1), &[0, 1, 2]);
    check(&stranded(&mut crew, SECOND), (Next::Meet, true, "the link was cut"));
    seat(&mut crew, SECOND * 2);
    check(&stranded(&mut crew, SECOND * 3), (Next::GiveUp, true, "the link was cut"));
}

#[test]
fn a_death_explains_a_failed_world() {
    let mut crew = running(limits(9), &[0, 1, 2]);
    crew.step(Event::Said(0, Report::Stranded { lost: Some(1), why: "rank 1 was lost".into() }), SECOND);
    check(&lose(&mut crew, 1, SECOND), (Next::Meet, true, "worker 1 died"));
    seat(&mut crew, SECOND);
    assert_eq!(crew.step(Event::Tick, SECOND * 3), [], "orders end it");
    assert_eq!(crew.restarts(), 1);
}

#[test]
fn a_place_that_keeps_failing_is_tried_after_pauses_and_then_left_out() {
    let mut crew = running(Limits { min_places: 2, ..limits(9) }, &[0, 1, 2]);
    let mut now = SECOND;
    let mut pauses = Vec::new();
    for _ in 1..KEEPS_FAILING {
        check(&lose(&mut crew, 1, now), (Next::Meet, true, "worker 1"));
        let begins = crew.wakes_at().unwrap();
        pauses.push(begins - now);
        now = begins;
        let beat = Report::Beat { ops: 1, waits: true };
        let told = [0, 2].map(|place| crew.step(Event::Said(place, beat.clone()), now));
        assert_eq!(told.concat(), [Action::Join]);
        seat(&mut crew, now);
        crew.step(Event::Said(1, Report::CanRecover), now);
    }
    assert_eq!(pauses, [SETTLE, FIRST_PAUSE]);
    check(&lose(&mut crew, 1, now), (Next::Meet, true, "keeps failing before a step is done"));
    assert_eq!((crew.in_use(), crew.restarts()), (vec![0, 2], KEEPS_FAILING - 1));
}

#[test]
fn a_step_forgives() {
    let mut crew = running(Limits { min_places: 1, ..limits(99) }, &[0, 1, 2]);
    for i in 1..20 {
        let now = SECOND * i;
        lose(&mut crew, 1, now);
        assert_eq!(crew.step(Event::Tick, now + SETTLE), [Action::Join], "no longer pause");
        seat(&mut crew, now);
        crew.step(Event::Said(1, Report::CanRecover), now);
        crew.step(Event::Said(0, Report::Step { step: 1 }), now);
        crew.step(Event::Said(2, Report::Step { step: 1 }), now);
        assert!(crew.stepped());
    }
    assert_eq!(crew.in_use(), [0, 1, 2]);
}

#[test]
fn a_node_goes_on_with_fewer_when_its_restarts_are_spent() {
    let mut crew = running(Limits { min_places: 1, ..limits(0) }, &[0, 1, 2]);
    check(&lose(&mut crew, 0, SECOND), (Next::Meet, true, "no restart is left: its place stays empty"));
    seat(&mut crew, SECOND);
    check(&lose(&mut crew, 1, SECOND), (Next::Meet, true, "no restart is left"));
    seat(&mut crew, SECOND);
    check(&lose(&mut crew, 2, SECOND), (Next::GiveUp, true, "worker 2"));
}

#[test]
fn other_nodes_call_at_no_cost() {
    let mut crew = running(limits(0), &[0, 1, 2]);
    check(&crew.step(Event::Called("node b left".into()), SECOND), (Next::Meet, false, "node b left"));
    let mut crew = running(limits(0), &[]);
    check(&crew.step(Event::Called("node b left".into()), SECOND), (Next::StartOver, false, "node b left"));
}

#[test]
fn a_process_that_cannot_be_killed_ends_it() {
    let mut crew = running(limits(5), &[0, 1, 2]);
    let mut now = Duration::ZERO;
    let mut ends = Vec::new();
    while ends.is_empty() && now < SECOND * 60 {
        now += SECOND;
        for place in [0, 2] {
            ends.extend(crew.step(Event::Said(place, Report::Beat { ops: 1, waits: true }), now));
        }
        ends.retain(|a| matches!(a, Action::End(_)));
    }
    check(&ends, (Next::GiveUp, true, "SIGKILL does not end it"));
}

#[test]
fn success_is_everybodys() {
    let mut crew = running(limits(1), &[0, 1, 2]);
    for place in 0..3 {
        assert!(!crew.is_done());
        crew.step(Event::Done(place), SECOND);
    }
    assert!(crew.is_done());
    let mut crew = running(limits(1), &[0, 1, 2]);
    crew.step(Event::Done(0), SECOND);
    check(&lose(&mut crew, 1, SECOND), (Next::Meet, true, "worker 1"));
    assert!(!crew.lives(0), "it takes part in the next world too");
}
