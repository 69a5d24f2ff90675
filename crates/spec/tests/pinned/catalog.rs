//! A catalogue of one's own: what is refused of it, and which machines it makes.

use std::fmt::Write as _;

use spec::cluster::Knob;
use spec::{Catalog, EntryKind, NumberFormat};

use crate::check::check;
use crate::said;

/// An entry of each kind that makes machines: tori with and without a shape, meshes and switches; nodes with and without a
/// fabric; pods by units, by nodes and by accelerators.
const MINE: &str = include_str!("mine.toml");

fn mine() -> Catalog {
    Catalog::with_files(&[("mine.toml", MINE)]).expect("a sound catalogue")
}

#[test]
fn a_catalogue_of_ones_own_is_shown_and_listed() {
    let catalog = mine();
    let mut all = String::new();
    let own = |name: &str| name.starts_with("my-") || name.starts_with("My ");
    for name in catalog.names().iter().filter(|name| own(name)) {
        let shown = catalog.show(name).unwrap_or_else(|e| said(&e));
        writeln!(all, "{name}:\n{shown}").unwrap();
    }
    for kind in EntryKind::ALL.map(Some).into_iter().chain([None]) {
        let listed = catalog.list(kind).into_iter().filter(|l| own(&l.name));
        writeln!(all, "{kind:?}: {:?}", listed.collect::<Vec<_>>()).unwrap();
        let parsed = kind.map(|k| (k.name(), EntryKind::parse(k.name())));
        writeln!(all, "  {parsed:?}").unwrap();
    }
    let clusters: Vec<String> = catalog.cluster_names().into_iter().filter(|name| own(name)).collect();
    writeln!(all, "clusters: {}", clusters.join(", ")).unwrap();
    writeln!(all, "sources: {:?} {:?}", catalog.source("my-book"), catalog.source("my-bok")).unwrap();
    let (before, after) =
        (Catalog::builtin().unwrap().check().unwrap(), catalog.check().expect("a sound catalogue"));
    writeln!(
        all,
        "{} more entries, {} numbers, {} ranges, {} platforms",
        after.entries - before.entries,
        after.numbers - before.numbers,
        after.ranges - before.ranges,
        after.platforms - before.platforms
    )
    .unwrap();
    check("catalog_shown", &all);
}

#[test]
fn machines_of_ones_own_are_put_together() {
    let catalog = mine();
    let mut all = String::new();
    let names = [
        "my-torus-pod",
        "my-torus-node",
        "my-cube-pod",
        "my-mesh-node",
        "my-units",
        "my-units-0su",
        "my-units-1su",
        "my-units-2su",
        "my-units-3su",
        "my-units-5su",
        "my-mesh-3su",
        "my-mesh",
        "my-few",
        "my-lonely",
        "my-torus",
        "my-switch",
        "my-meshes",
        "my-part",
        "my-quote",
        "My Units",
        "nvidia my mesh",
    ];
    for name in names {
        let doubt = catalog.meaning(name).ok().and_then(|m| m.doubt(name)).unwrap_or_default();
        writeln!(all, "{name}: {doubt}").unwrap();
        let parts =
            |c: &spec::Cluster| -> Vec<String> { format!("{c:?}").split(", ").map(str::to_owned).collect() };
        // All of it, then what another number of accelerators changes.
        let mut known: Vec<String> = Vec::new();
        for n in [None, Some(0), Some(1), Some(3), Some(8), Some(9), Some(16), Some(48), Some(64), Some(100)]
        {
            let found = catalog.cluster(name, n).map_or_else(
                |e| said(&e),
                |c| {
                    let new: Vec<String> = parts(&c).into_iter().filter(|p| !known.contains(p)).collect();
                    known.extend(new.iter().cloned());
                    new.join(", ")
                },
            );
            writeln!(all, "  {n:?}: {found}").unwrap();
        }
    }
    check("catalog_machines", &all);
}

/// What a question about another machine changes of this one, and what it is called by.
#[test]
fn machines_are_scaled_and_cut() {
    let catalog = mine();
    let mut all = String::new();
    for name in ["my-cube-pod", "my-units-2su"] {
        let cluster = catalog.cluster(name, None).expect("a machine");
        let parts = |text: &str| -> Vec<String> { text.split(", ").map(str::to_owned).collect() };
        let as_is = parts(&format!("{cluster:?}"));
        let mut moved = |what: String, other: &spec::Cluster| {
            let other: Vec<String> =
                parts(&format!("{other:?}")).into_iter().filter(|p| !as_is.contains(p)).collect();
            writeln!(all, "{name} {what}: {}", other.join(", ")).unwrap();
        };
        for knob in Knob::ALL {
            moved(format!("{knob:?} x 3"), &cluster.clone().scaled(knob, 3.0));
        }
        for slice in [0, 1, 2, 12, 16, 64, 65] {
            moved(format!("in slices of {slice}"), &cluster.clone().in_slices(slice));
        }
    }
    for (name, node) in
        [("my-torus", "my-torus-node"), ("my-switch", "my-switch-node"), ("my-mesh", "my-mesh-node")]
    {
        let chip = catalog.cluster(node, None).expect("a node").accelerator;
        let rates: Vec<String> = NumberFormat::all()
            .map(|f| {
                let value = |m: Option<spec::Measure>| m.map_or(0.0, |m| m.value);
                format!("{f} of {} B: {:e} {:e}", f.bytes(), value(chip.peak(f)), value(chip.matmul(f)))
            })
            .collect();
        writeln!(
            all,
            "{name} has {}; in 16 bits {}; {}",
            chip.formats(),
            chip.sixteen_bit(),
            rates.join(", ")
        )
        .unwrap();
    }
    check("catalog_scaled", &all);
}

/// What stands in the catalogue, and what is put in its place.
const WRONG: &[(&str, &str)] = &[
    ("what = \"a book\"", "what = \"\""),
    ("what = \"a book\"", "what = \"  \""),
    ("what = \"a book\"", "wht = \"a book\""),
    ("what = \"a book\"", ""),
    ("what = \"a book\"", "what = 3"),
    ("what = \"a book\"", "what = 2026-01-01"),
    ("date = \"2026-02\"", ""),
    ("date = \"2026-02\"", "date = \"2026-2\""),
    ("date = \"2026-02\"", "date = \"1949\""),
    ("date = \"2026-02\"", "date = \"1950\""),
    ("date = \"2026-02\"", "date = \"2100-12-31\""),
    ("date = \"2026-02\"", "date = \"2101\""),
    ("date = \"2026-02\"", "date = \"2026-00\""),
    ("date = \"2026-02\"", "date = \"2026-13\""),
    ("date = \"2026-02\"", "date = \"2026-12-32\""),
    ("date = \"2026-02\"", "date = \"2026-12-00\""),
    ("date = \"2026-02\"", "date = \"2026-12-01-01\""),
    ("date = \"2026-02\"", "date = \"20x6\""),
    ("date = \"2026-02\"", "date = \"+202\""),
    ("date = \"2026-02\"", "date = 2026-02-03"),
    ("grade = \"vendor\"", ""),
    ("[source.my-book]", "[source]\nmy-boo = 3\n[source.my-book]"),
    ("[family.my-family]", "[family]\nother = 3\n[family.my-family]"),
    ("[family.my-family]", "[famly.my-family]"),
    ("software = \"megatron-core-2024\"", ""),
    ("matrix_units = \"systolic\"", "matrix_units = \"cubes\""),
    ("vendor = \"me\"", "vendor = \"\""),
    ("vendor = \"me\"", "vendor = true"),
    ("vendor = \"me\"", "vender = \"me\""),
    ("vendor = \"me\"", "zzzzzzzz = \"me\""),
    ("vendor = \"me\"", "vendor = "),
    ("vendor = \"me\"", "base = 3"),
    ("vendor = \"me\"", "base = \"my-tours\""),
    ("peak.fp16 = {", "peak.bf61 = {"),
    ("peak.fp16 = {", "peak.fp16 = 3 #"),
    ("peak.fp16 = {", "peak = 3 #"),
    ("shares_host_memory = true", "shares_host_memory = \"yes\""),
    ("shares_host_memory = true", "shares_host_memory = false"),
    ("aliases = [\"My Units\"]", "aliases = \"My Units\""),
    ("aliases = [\"My Units\"]", "aliases = [3]"),
    ("aliases = [\"My Units\"]", "aliases = [\"my few\"]"),
    ("aliases = [\"My Units\"]", "aliases = [\"my units\", \"MY-UNITS\"]"),
    ("node = \"my-switch-node\"", "node = \"my-switch-nod\""),
    ("storage = \"my-store\"", "storage = \"zzzzzzzzzzzz\""),
    ("usual = \"my-mesh\"", "usual = \"my-mes\""),
    ("means = [\"my-few\", \"my-units\"]", "means = [\"my-fewer\"]"),
    ("see = [\"my-net\"]", "see = [\"my-nett\"]"),
    ("see = [\"my-net\"]", ""),
    ("shape = \"4x4x4\"", "shape = \"4x4x\""),
    ("shape = \"4x4x4\"", "shape = \"2x2x2\""),
    ("shape = \"4x4x4\"", "shape = \"8x8\""),
    ("nodes = { value = 3,", "nodes = { value = 3.5,"),
    ("nodes = { value = 3,", "nodes = { value = 0,"),
    ("nodes = { value = 3,", "nodes = { value = -3,"),
    ("nodes = { value = 3,", "nodes = { value = inf,"),
    ("nodes = { value = 3,", "nodes = { value = 1e9,"),
    ("nodes = { value = 3,", "nodes = { value = 0x3,"),
    ("nodes = { value = 3,", "nodes = { value = 1_0,"),
    ("nodes = { value = 3,", "nodes = { value = \"3\","),
    ("nodes = { value = 3,", "nodes = { low = 3,"),
    ("nodes = { value = 3,", "nodes = { value = 3, low = 4,"),
    ("nodes = { value = 3,", "nodes = { value = 3, high = 2,"),
    ("nodes = { value = 3,", "nodes = { value = 3, low = 3, high = 3,"),
    ("nodes = { value = 3,", "nodes = { value = 3, low = 2.5,"),
    ("nodes = { value = 3,", "nodes = { value = 3, low = 0,"),
    ("nodes = { value = 3,", "nodes = { value = 3, high = inf,"),
    ("nodes = { value = 3,", "nodes = { value = 3, hgh = 4,"),
    ("nodes = { value = 3,", "nodes = { value = 3, note = \"three\","),
    ("nodes = { value = 3,", "nodes = { value = 3, direction = \"one-way\","),
    ("nodes = { value = 3,", "nodes = { value = 3, sparsity = \"dense\","),
    ("nodes = { value = 3,", "accelerators = { value = 17000000,"),
    ("unit = \"units\"", "unit = \"GB\""),
    ("unit = \"units\", source = \"my-book\"", "unit = \"units\", source = \"my-bok\""),
    ("unit = \"units\", source = \"my-book\"", "unit = \"units\", source = \"zzzzzzzzzz\""),
    ("unit = \"units\", source = \"my-book\"", "unit = \"units\", source = \"http://my\""),
    ("unit = \"units\", source = \"my-book\"", "unit = \"units\", source = \"my shelf\""),
    ("unit = \"units\", source = \"my-book\"", "unit = \"units\", source = \"\""),
    ("direction = \"both-ways\"", "direction = \"sideways\""),
    ("direction = \"both-ways\"", "note = \"both\""),
    ("sparsity = \"sparse\"", "sparsity = \"half\""),
    ("sparsity = \"sparse\"", "note = \"half\""),
    ("hop_latency = ", "#"),
    ("message = ", "#"),
    ("tier2 = ", "#"),
    ("oversubscription1 = ", "#"),
    ("all_reduce.2 = ", "all_reduce.1 = "),
    ("all_reduce.2 = ", "all_reduce.16777217 = "),
    ("all_reduce.2 = ", "all_reduce.16777216 = "),
    ("all_reduce.2 = ", "all_reduce.two = "),
    ("write_per_unit = ", "#"),
    ("[platform.my-few]", "[platform.my-few]\n[platform.my-few]"),
    ("[platform.my-few]", "[platform.\"\"]"),
    ("[platform.my-few]", "[platform.my-units]"),
    ("[platform.my-few]", "[node.my-few]"),
];

/// Replaces what stands in the catalogue by something that is wrong, or just not.
#[test]
fn catalogues_are_refused_as_they_were() {
    let mut all = String::new();
    let as_it_was = format!("{:?}", mine());
    for &(from, to) in WRONG {
        assert!(MINE.contains(from), "{from}");
        let text = MINE.replacen(from, to, 1);
        let found = match Catalog::with_files(&[("mine.toml", &text)]) {
            Err(e) => said(&e),
            Ok(c) if format!("{c:?}") == as_it_was => "changes nothing".to_owned(),
            Ok(c) => {
                format!("read, {:?}", c.check().map(|_| c.cluster("my-few", None).map(|c| c.accelerators)))
            }
        };
        writeln!(all, "{from} -> {to}: {found}").unwrap();
    }
    for (first, second) in
        [(MINE, MINE), ("", MINE), (MINE, "[source.my-book]\nwhat = \"b\"\ndate = \"2026\"\n")]
    {
        let found =
            Catalog::with_files(&[("a.toml", first), ("b.toml", second)]).map(|c| c.list(None).len() > 50);
        writeln!(all, "twice: {}", found.map_or_else(|e| said(&e), |many| many.to_string())).unwrap();
    }
    check("catalog_refused", &all);
}

/// An entry under its own name as base changes some keys of the one that ships; under another it takes its place.
#[test]
fn entries_that_ship_are_changed_or_replaced() {
    let catalog = Catalog::builtin().expect("the catalogue");
    let number = "{ value = 2, unit = \"TB\", source = \"my lab\", date = \"2026\" }";
    let change = |base: &str| {
        let text = format!("[accelerator.h100-sxm5]\nbase = \"{base}\"\nmemory = {number}\n");
        Catalog::with_files(&[("mine.toml", &text)]).expect("a sound catalogue")
    };
    let chip = |c: &Catalog| c.get(EntryKind::Accelerator, "h100-sxm5").expect("it is there").clone();
    let (was, own, other) = (chip(&catalog), chip(&change("h100-sxm5")), chip(&change("a100-80-sxm")));
    assert_eq!(own.measure("memory").map(|m| m.value), Some(2e12));
    let rest = |e: &spec::catalog::Entry| {
        let mut fields = e.fields.clone();
        fields.remove("memory");
        fields
    };
    assert_eq!(rest(&own), rest(&was), "its aliases too");
    assert!(rest(&other) != rest(&was));
    assert_eq!(other.text("vendor"), was.text("vendor"));
    assert!(other.list("aliases").is_empty(), "those are of one entry alone");
}
