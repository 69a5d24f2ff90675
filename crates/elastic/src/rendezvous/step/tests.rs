use super::*;
use proptest::prelude::*;

const SECOND: Duration = Duration::from_secs(1);

/// Nodes around one store, on one clock that a test moves.
struct World {
    shared: Agreed,
    nodes: Vec<(Node, Life)>,
    beats: BTreeMap<NodeId, i64>,
    now: Duration,
    news: Vec<(usize, News)>,
}

#[derive(Clone, Copy, PartialEq)]
enum Life {
    Alive,
    /// Neither beats nor acts.
    Dead,
}

fn rules(min: usize, max: usize) -> Rules {
    Rules { min, max, is_static: false }
}

fn member(name: &str, nproc: usize) -> Member {
    let id = NodeId { node_rank: 0, addr: name.into(), pid: 1, serial: 0 };
    Member { id, host: name.into(), nproc, role: "default".into(), master_port: 1000, door: 0, standby: 0 }
}

impl World {
    fn new() -> World {
        let (shared, nodes, news) = (Agreed::default(), Vec::new(), Vec::new());
        World { shared, nodes, beats: BTreeMap::new(), now: Duration::ZERO, news }
    }

    /// Adds a node that wants to join; the first hosts the store.
    fn add(&mut self, me: Member, rules: Rules, patient: bool) -> usize {
        let mut node = Node::new(me, rules, Times::default(), patient, self.nodes.is_empty());
        node.wish(Wish::Join, None, self.now);
        self.nodes.push((node, Life::Alive));
        self.nodes.len() - 1
    }

    fn wish(&mut self, node: usize, wish: Wish) {
        self.nodes[node].0.wish(wish, None, self.now);
    }

    /// One look of one node.
    fn turn(&mut self, index: usize) {
        let (node, life) = &mut self.nodes[index];
        if *life == Life::Dead {
            return;
        }
        *self.beats.entry(node.id().clone()).or_insert(0) += 1;
        let beats: Vec<(NodeId, i64)> = node
            .watched(&self.shared)
            .into_iter()
            .filter_map(|id| self.beats.get(&id).map(|b| (id.clone(), *b)))
            .collect();
        for action in node.step(&self.shared, &beats, self.now) {
            match action {
                Action::Put(next) => self.shared = *next,
                Action::Tell(news) => self.news.push((index, news)),
            }
        }
    }

    /// All nodes look in turn, a second apart, for `seconds`; then what they were told meanwhile.
    fn pass(&mut self, seconds: u32) -> Vec<(usize, News)> {
        for _ in 0..seconds {
            for _ in 0..8 {
                (0..self.nodes.len()).for_each(|i| self.turn(i));
            }
            self.now += SECOND;
        }
        std::mem::take(&mut self.news)
    }

    fn seats(&mut self, seconds: u32) -> Vec<(usize, usize, usize, usize, u64)> {
        let mut seats: Vec<_> = self
            .pass(seconds)
            .into_iter()
            .filter_map(|(i, news)| match news {
                News::Seated(s) => Some((i, s.group_rank, s.base_rank, s.world, s.round)),
                _ => None,
            })
            .collect();
        seats.sort_unstable();
        seats
    }
}

/// Three nodes a, b, c of 2 workers each, running.
fn running(rules: Rules, patient: bool) -> World {
    let mut world = World::new();
    for name in ["a", "b", "c"] {
        world.add(member(name, 2), rules, patient);
    }
    assert_eq!(world.seats(40).len(), 3);
    world
}

#[test]
fn ranks_are_prefix_sums_in_the_order_of_ids() {
    let mut world = World::new();
    world.add(member("b", 3), rules(3, 3), false);
    world.add(member("c", 1), rules(3, 3), false);
    assert_eq!(world.seats(100), [], "two of three wait");
    world.add(member("a", 2), rules(3, 3), false);
    assert_eq!(world.seats(2), [(0, 1, 2, 6, 0), (1, 2, 5, 6, 0), (2, 0, 0, 6, 0)]);
}

#[test]
fn roles_have_ranks_of_their_own() {
    let mut world = World::new();
    for (name, role) in [("a", "x"), ("b", "y"), ("c", "x")] {
        world.add(Member { role: role.into(), ..member(name, 2) }, rules(3, 3), false);
    }
    world.pass(2);
    let seat = seat(&world.shared, &member("c", 2).id).unwrap();
    assert_eq!((seat.base_rank, seat.role_base_rank, seat.role_world), (4, 2, 4));
}

#[test]
fn the_fewest_nodes_start_after_the_last_call_and_the_most_at_once() {
    let mut world = World::new();
    world.add(member("a", 1), rules(2, 3), false);
    world.add(member("b", 1), rules(2, 3), false);
    assert_eq!(world.seats(29), []);
    assert_eq!(world.seats(3).len(), 2);
    let mut world = running(rules(2, 3), false);
    // A fourth is a spare.
    world.add(member("d", 1), rules(2, 3), false);
    assert_eq!(world.seats(700), []);
    assert_eq!(world.shared.waiting.len(), 1);
}

#[test]
fn too_few_nodes_are_named_at_the_deadline() {
    let mut world = World::new();
    world.add(member("a", 1), Rules { is_static: true, ..rules(4, 4) }, false);
    let mut two = member("b", 1);
    two.id.node_rank = 2;
    world.add(two, Rules { is_static: true, ..rules(4, 4) }, false);
    assert_eq!(world.pass(599), []);
    let news = world.pass(5);
    let text = format!("{news:?}");
    assert!(text.contains("2 of 4 nodes came within 600 s"), "{text}");
    assert!(text.contains("missing: node ranks 1, 3"), "{text}");
    assert_eq!(news.len(), 2, "the host's deadline closes the job for the other too: {text}");
}

#[test]
fn a_node_rank_claimed_twice_is_refused_with_both_names() {
    let mut world = World::new();
    let rules = Rules { is_static: true, ..rules(3, 3) };
    world.add(member("a", 1), rules, false);
    world.add(member("b", 1), rules, false);
    let text = format!("{:?}", world.pass(2));
    assert!(text.contains("node rank 0 is claimed by both a") && text.contains("and b"), "{text}");
}

#[test]
fn other_rules_are_refused_with_both_names() {
    let mut world = World::new();
    world.add(member("a", 1), rules(2, 2), false);
    world.add(member("b", 1), rules(2, 3), false);
    let text = format!("{:?}", world.pass(2));
    assert!(
        text.contains("b wants --nnodes=2:3") && text.contains("a started the job with --nnodes=2:2"),
        "{text}"
    );
}

#[test]
fn a_failure_with_restarts_left_starts_a_new_round_for_all_at_once() {
    let mut world = running(rules(3, 3), true);
    world.wish(1, Wish::Regroup(0, "rank 2 failed".into()));
    let told = world.pass(1);
    assert_eq!(told.len(), 3, "{told:?}");
    assert!(told.iter().all(|(_, n)| *n == News::Regroup("rank 2 failed".into())), "{told:?}");
    (0..3).for_each(|i| world.wish(i, Wish::Join));
    let seats = world.seats(1);
    assert!(seats.len() == 3 && seats.iter().all(|s| s.4 == 1), "no last call: {seats:?}");
}

#[test]
fn a_failure_for_good_closes_the_job_for_all_at_once() {
    let mut world = running(rules(2, 3), true);
    world.wish(2, Wish::Close("rank 5 failed".into()));
    let told = world.pass(1);
    assert_eq!(told.len(), 3);
    assert!(told.iter().all(|(_, n)| *n == News::Closed(Closed::Failed("rank 5 failed".into()))), "{told:?}");
}

#[test]
fn a_vanished_node_is_told_to_all_survivors_after_the_keep_alive_time() {
    let mut world = running(rules(2, 3), false);
    world.nodes[1].1 = Life::Dead;
    assert_eq!(world.pass(14), []);
    let told = world.pass(3);
    let names: Vec<usize> = told.iter().map(|(i, _)| *i).collect();
    assert_eq!(names, [0, 2]);
    assert!(told.iter().all(|(_, n)| matches!(n, News::Regroup(why) if why.contains("node b"))), "{told:?}");
    world.wish(0, Wish::Join);
    world.wish(2, Wish::Join);
    assert_eq!(world.seats(2), [(0, 0, 0, 4, 1), (2, 1, 2, 4, 1)], "the two go on without a last call");
}

#[test]
fn too_few_survivors_end_the_job_unless_a_restart_is_allowed() {
    let check = |patient: bool, closed: bool| {
        let mut world = running(rules(3, 3), patient);
        world.nodes[2].1 = Life::Dead;
        let told = world.pass(17);
        let is_closed = |n: &News| matches!(n, News::Closed(Closed::Failed(why)) if why.contains("node c (agent pid 1) is lost"));
        assert!(told.len() == 2 && told.iter().all(|(_, n)| is_closed(n) == closed), "{told:?}");
        if !closed {
            world.wish(0, Wish::Join);
            world.wish(1, Wish::Join);
            world.add(member("d", 1), rules(3, 3), true);
            assert_eq!(world.seats(3).len(), 3, "another node takes the place");
        }
    };
    check(false, true);
    check(true, false);
}

#[test]
fn a_node_and_its_watcher_may_die_together() {
    let mut world = World::new();
    for name in ["a", "b", "c", "d", "e"] {
        world.add(member(name, 1), rules(2, 5), false);
    }
    world.pass(2);
    [1, 2, 3].iter().for_each(|i| world.nodes[*i].1 = Life::Dead);
    world.pass(17);
    world.wish(0, Wish::Join);
    world.wish(4, Wish::Join);
    assert_eq!(world.seats(40), [(0, 0, 0, 2, world.shared.round), (4, 1, 1, 2, world.shared.round)]);
}

#[test]
fn a_node_that_leaves_is_no_failure_while_enough_are_left() {
    let mut world = running(rules(2, 3), false);
    world.wish(1, Wish::Leave("it was stopped by SIGTERM".into()));
    let told = world.pass(1);
    assert!(told.contains(&(1, News::Left)), "{told:?}");
    let others = told.iter().filter(|(_, n)| matches!(n, News::Regroup(why) if why.contains("SIGTERM")));
    assert_eq!(others.count(), 2);
    let mut world = running(rules(3, 3), false);
    world.wish(1, Wish::Leave("it was stopped by SIGTERM".into()));
    let told = world.pass(1);
    let closed = told.iter().filter(|(_, n)| matches!(n, News::Closed(Closed::Failed(_)))).count();
    assert_eq!(closed, 3, "{told:?}");
}

#[test]
fn the_host_of_the_store_takes_the_job_with_it() {
    let mut world = running(rules(1, 3), true);
    world.wish(0, Wish::Leave("it was stopped by SIGTERM".into()));
    let told = world.pass(2);
    let closed =
        |n: &News| matches!(n, News::Closed(Closed::Failed(why)) if why.contains("a hosted the job's store"));
    assert!(told.len() == 3 && told.iter().all(|(_, n)| closed(n)), "{told:?}");
}

#[test]
fn a_new_node_starts_a_new_round_if_there_is_room() {
    let mut world = World::new();
    world.add(member("a", 1), rules(1, 2), false);
    assert_eq!(world.seats(40).len(), 1);
    world.add(member("b", 1), rules(1, 2), false);
    let told = world.pass(1);
    assert_eq!(told, [(0, News::Regroup("node b (agent pid 1) wants to join".into()))]);
    world.wish(0, Wish::Join);
    assert_eq!(world.seats(1), [(0, 0, 0, 2, 1), (1, 1, 1, 2, 1)]);
}

#[test]
fn success_waits_for_all() {
    let mut world = running(rules(3, 3), false);
    world.wish(0, Wish::Finish(0));
    world.wish(1, Wish::Finish(0));
    assert_eq!(world.pass(200), []);
    world.wish(2, Wish::Finish(0));
    let told = world.pass(1);
    assert!(told.len() == 3 && told.iter().all(|(_, n)| *n == News::Closed(Closed::Succeeded)), "{told:?}");
    assert_eq!(world.shared.seen.len(), 3);
}

#[test]
fn the_host_waits_until_all_have_seen_the_end_or_are_given_up() {
    let mut world = running(rules(3, 3), false);
    world.nodes[2].1 = Life::Dead;
    world.wish(0, Wish::Close("rank 0 failed".into()));
    let told = world.pass(10);
    assert_eq!(told.iter().map(|(i, _)| *i).collect::<Vec<_>>(), [1]);
    let told = world.pass(10);
    assert_eq!(told.iter().map(|(i, _)| *i).collect::<Vec<_>>(), [0]);
}

#[test]
fn a_node_that_is_done_starts_over_when_another_fails() {
    let mut world = running(rules(3, 3), true);
    world.wish(0, Wish::Finish(0));
    world.pass(1);
    world.wish(1, Wish::Regroup(0, "rank 2 failed".into()));
    assert_eq!(world.pass(1).len(), 3);
}

#[test]
fn the_state_survives_the_store() {
    let world = running(rules(2, 3), true);
    let text = serde_json::to_vec(&world.shared).unwrap();
    assert_eq!(serde_json::from_slice::<Agreed>(&text).unwrap(), world.shared);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever fails, dies or comes in whatever order: seats of one round never overlap, and in the end either all
    /// living nodes run one round or the job is closed for all.
    #[test]
    fn rounds_are_consistent(
        events in proptest::collection::vec((0u8..4, 0usize..6, 1u32..25), 1..12),
        min in 1usize..4,
        patient: bool,
    ) {
        let mut world = World::new();
        let rules = rules(min, 4);
        for name in ["a", "b", "c"] {
            world.add(member(name, 2), rules, patient);
        }
        let mut seats: BTreeMap<u64, BTreeMap<usize, usize>> = BTreeMap::new();
        let mut ended = false;
        let mut settle = |world: &mut World, seconds: u32| {
            for _ in 0..seconds {
                for (node, news) in world.pass(1) {
                    match news {
                        News::Seated(s) => {
                            let taken = seats.entry(s.round).or_default().insert(s.group_rank, node);
                            prop_assert!(taken.is_none(), "one seat, two nodes");
                        }
                        News::Regroup(_) => world.wish(node, Wish::Join),
                        News::Closed(_) => ended = true,
                        News::Refused(..) | News::Left | News::Spare => {}
                    }
                }
            }
            Ok(())
        };
        for (kind, node, seconds) in events {
            settle(&mut world, seconds)?;
            let node = node % world.nodes.len();
            match kind {
                0 if node > 0 => world.nodes[node].1 = Life::Dead,
                1 if world.nodes.len() < 6 => {
                    let name = format!("n{}", world.nodes.len());
                    world.add(member(&name, 1), rules, patient);
                }
                2 => {
                    if let Wish::Run(round) = *world.nodes[node].0.wanted() {
                        world.wish(node, Wish::Regroup(round, "a rank failed".into()));
                    }
                }
                _ => {}
            }
        }
        settle(&mut world, 60)?;
        let living: Vec<&Node> = world.nodes.iter().filter(|(_, l)| *l == Life::Alive).map(|(n, _)| n).collect();
        let run: Vec<_> = living.iter().filter(|n| matches!(n.wanted(), Wish::Run(_))).collect();
        if !ended && living.len() >= min {
            let place = living.len().min(4);
            prop_assert_eq!(run.len(), place, "{:?}", world.shared);
            prop_assert!(run.iter().all(|n| *n.wanted() == Wish::Run(world.shared.round)));
        }
    }
}

#[test]
fn fuzzed_states_are_refused_or_acted_on() {
    let mut world = World::new();
    for name in ["a", "b", "c"] {
        world.add(member(name, 2), rules(2, 3), true);
    }
    let mut good = Vec::new();
    for i in 0..9 {
        world.turn(i % 3);
        good.push(serde_json::to_vec(&world.shared).unwrap());
    }
    let me = member("b", 2);
    crate::fuzz_test::fuzz(
        "rendezvous",
        &good,
        &["members", "Running", "b"],
        |input| input,
        |input| {
            let Ok(shared) = Agreed::read(input) else { return false };
            for wish in [Wish::Join, Wish::Run(0), Wish::Finish(0), Wish::Leave("x".into())] {
                let mut node = Node::new(me.clone(), rules(2, 3), Times::default(), true, false);
                node.wish(wish, None, Duration::ZERO);
                let _ = node.waits_for(&shared);
                let _ = node.step(&shared, &[], SECOND * 1000);
            }
            true
        },
    );
}

#[test]
fn an_agent_that_has_died_is_not_waited_for() {
    let mut world = running(rules(2, 3), false);
    world.nodes[1].1 = Life::Dead;
    let dead = world.nodes[1].0.id().clone();
    world.nodes[0].0.gone(vec![dead]);
    let told = world.pass(1);
    let why = |n: &News| matches!(n, News::Regroup(why) if why.contains("node b") && why.contains("its agent has died"));
    assert!(told.len() == 2 && told.iter().all(|(_, n)| why(n)), "{told:?}");
}
